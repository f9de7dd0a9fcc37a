"""Where and in which number format to compute."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stackwise.config.errors import ConfigError, Problem
from stackwise.config.root import StackWiseConfig
from stackwise.config.rules import program_of
from stackwise.precision.modes import check_compute, frozen_format, mode_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def available_devices() -> list[str]:
    """Devices that `training.device` may name here."""
    names = ["cpu"]
    if torch.cuda.is_available():
        names += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def pick_device(name: str) -> torch.device:
    """auto: cuda, else mps, else cpu. An absent device is a ConfigError naming those present."""
    present = available_devices()
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if d in present)
    if name not in present:
        raise ConfigError(
            [Problem("training.device", "is not present here", name, ", ".join(["auto", *present]))]
        )
    return torch.device(name)


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; elsewhere bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the device has it, else float32. float16 on a CPU is a ConfigError."""
    if name == "auto":
        return torch.bfloat16 if has_native_bfloat16(device) else torch.float32
    if name == "float16" and device.type == "cpu":
        raise ConfigError(
            [
                Problem(
                    "training.dtype",
                    "cannot be used on a CPU, which has no float16 arithmetic and emulates it about a hundred times "
                    "slower",
                    name,
                    "auto, float32, bfloat16",
                )
            ]
        )
    return DTYPES[name]


def run_format(config: StackWiseConfig, dtype: torch.dtype, device: torch.device) -> str:
    """How stacks of a run are stored once they freeze. A precision that the device cannot compute in: ConfigError.

    Where stacks come and go, rounding at each departure would lose what the last visit taught: they stay in fp32
    unless a format is asked for.
    """
    keys = config.training.progressive
    for i, record in enumerate(config.training.stages or ()):
        if record.precision is not None:
            check_compute(mode_of(record.precision), device.type, f"training.stages.{i}.precision")
    if (
        program_of(config) in ("cyclic", "by_hand")
        and keys.trunk_precision == keys.new_stack_precision is None
    ):
        return "fp32"
    if keys.new_stack_precision is not None:
        check_compute(mode_of(keys.new_stack_precision), device.type)
    return frozen_format(keys, keys.new_stack_precision, str(dtype).removeprefix("torch."), device.type)


@contextmanager
def computing_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Autocast to `dtype`; float32 computes as is."""
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        yield


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks for the next step instead of handing them back to the system.

    Tensors of a training step are freed and asked for again thousands of times; on Linux each round trip costs page
    faults, up to half of the time of elementwise operations on the CPU. Blocks up to 32 MiB are kept.
    """
    if platform.system() != "Linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 << 20)
        libc.mallopt(m_trim_threshold, 512 << 20)
    except (OSError, AttributeError):
        return  # another C library than glibc: nothing to set, and nothing lost but speed


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Deterministic kernels inside the block, when asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
