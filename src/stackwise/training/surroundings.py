"""What besides the settings decides the last bits of a run: versions, device, threads, flags."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

from stackwise.tracking.environment import package_version


def surroundings(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """JSON-able. Two runs with equal values, equal settings and equal data give the same bits on a CPU."""
    cuda = device.type == "cuda"
    return {
        "stackwise": package_version("stackwise"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """`torch 2.12 -> 2.13`, for everything that is not as it was."""
    return [
        f"{name} {there.get(name)} -> {here.get(name)}"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
