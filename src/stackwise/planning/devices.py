"""Devices to plan for: memory, speed, link to the host. No torch is imported until a real device is asked for.

Speeds are peaks of dense matrix products from the makers' data sheets, in TFLOP/s; a run sustains a share of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from stackwise.config.errors import ConfigError, Problem, did_you_mean

GB = 10**9
SUSTAINED = 0.4
"""Share of the peak that a run is taken to sustain, where nothing was measured."""
TIGHT = 0.85
"""Share of the memory from which a plan fits only just."""


@dataclass(frozen=True)
class Device:
    """What a plan must know of a device.

    `memory` in bytes; `reserved` of them go to the driver, kernels and gaps between tensors. `peaks` in TFLOP/s by
    compute dtype; `link` in bytes/s from and to the host.
    """

    name: str
    kind: str
    memory: int
    reserved: int
    peaks: Mapping[str, float]
    link: float
    share: float = SUSTAINED

    def rate(self, dtype: str) -> float:
        """FLOP per second that a run in `dtype` is taken to sustain, to two digits: more would pretend to know."""
        return float(f"{self.share * self.peaks.get(dtype, self.peaks['float32']) * 1e12:.1e}")

    def verdict(self, n_bytes: int) -> str:
        """yes, tight (above 85 % of the memory) or no; `n_bytes` without what is reserved."""
        whole = n_bytes + self.reserved
        return "no" if whole > self.memory else "tight" if whole > TIGHT * self.memory else "yes"

    @property
    def has_bfloat16(self) -> bool:
        return "bfloat16" in self.peaks


def _accelerator(
    name: str, gigabytes: int, half: float, full: float, link: float, bf16: bool = True
) -> Device:
    peaks = {"float16": half, "float32": full} | ({"bfloat16": half} if bf16 else {})
    return Device(name, "cuda", gigabytes * GB, round(gigabytes * GB * 6 / 141), peaks, link * GB)


DEVICES = {
    device.name: device
    for device in (
        _accelerator("h200", 141, 989, 67, 50),
        _accelerator("h100-80", 80, 989, 67, 50),
        _accelerator("a100-80", 80, 312, 19.5, 25),
        _accelerator("a100-40", 40, 312, 19.5, 25),
        _accelerator("l40s", 48, 362, 91.6, 25),
        _accelerator("rtx4090", 24, 165, 82.6, 25),
        _accelerator("rtx3090", 24, 71, 35.6, 25),
        _accelerator("t4", 16, 65, 8.1, 12, bf16=False),
    )
}
"""Devices by name. What is reserved is 6 GB of 141, and the same share of the others."""
PRESENT = ("cpu", "cuda", "mps")
"""Names that stand for a device of this machine."""


def device_named(name: str) -> Device:
    """A device of the table, or one of this machine: cpu, cuda, cuda:N, mps.

    An unknown name, or a device that is not present, is a ConfigError with the names and the nearest spelling.
    """
    lowered = name.lower()
    if lowered in DEVICES:
        return DEVICES[lowered]
    if lowered.partition(":")[0] in PRESENT:
        return _present(lowered)
    known = [*DEVICES, *PRESENT]
    raise ConfigError(
        Problem("--device", "is unknown", name, ", ".join(known), did_you_mean(lowered, known) or "")
    )


def limited(device: Device, budget_gib: float | None) -> Device:
    """The device with a budget of its own, in GiB, in place of its memory; nothing is reserved from it."""
    if budget_gib is None:
        return device
    if not budget_gib > 0:
        raise ConfigError(Problem("--budget-gib", "must be above 0", budget_gib))
    return replace(device, memory=round(budget_gib * 2**30), reserved=0)


def _present(name: str) -> Device:
    """A device of this machine, as it is."""
    if name == "cpu":
        memory = _machine_memory()
        rate = _measured_peak("cpu")
        return Device("cpu", "cpu", memory, 0, {"float32": rate, "bfloat16": rate}, 10.0 * GB)
    import torch

    from stackwise.training.device import pick_device

    device = pick_device(name)
    if device.type == "mps":
        rate = _measured_peak("mps")
        return Device("mps", "mps", _machine_memory(), 0, {"float32": rate, "float16": rate}, 100.0 * GB)
    facts = torch.cuda.get_device_properties(device)
    base = next(
        (d for key, d in DEVICES.items() if key.split("-")[0] in facts.name.lower().replace(" ", "")), None
    )
    if base is None:
        rate = _measured_peak("cuda")
        base = Device(name, "cuda", 0, 0, {"float32": rate / 4, "float16": rate, "bfloat16": rate}, 12.0 * GB)
    memory = int(facts.total_memory)
    return replace(base, name=facts.name, memory=memory, reserved=round(memory * 6 / 141))


def _machine_memory() -> int:
    """Bytes of memory of this machine, or of the container's limit."""
    from stackwise.tracking.environment import memory_bytes

    memory = memory_bytes()
    if memory is None:
        raise ConfigError(
            Problem("--device", "the memory of this machine is not known", "cpu", hint="give --budget-gib")
        )
    return memory


@lru_cache(maxsize=4)
def _measured_peak(kind: str) -> float:
    """TFLOP/s of a product of two matrices, measured in a few tenths of a second."""
    import time

    import torch

    dtype = torch.float32 if kind in ("cpu", "mps") else torch.bfloat16
    n = 512 if kind == "cpu" else 4096
    a = torch.ones(n, n, dtype=dtype, device=kind)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best / 1e12
