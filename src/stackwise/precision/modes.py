"""Precision modes by name: what a stack computes in, and how it is stored once it is frozen."""

from __future__ import annotations

from typing import NamedTuple

from stackwise.config.errors import ConfigError, Problem, did_you_mean
from stackwise.precision.settings import HINTS, PrecisionKeys


class Mode(NamedTuple):
    """A precision of a stack."""

    name: str
    compute_dtype: str
    """float32 computes as is, the others by autocast over fp32 weights."""
    weight_format: str
    """How the matrices are stored once the stack is frozen; with adapters, from its birth."""
    adapters: bool = False
    """Whether the matrices never train, and adapters over them do."""


MODES = {
    mode.name: mode
    for mode in (
        Mode("full", "float32", "fp32"),
        Mode("half", "float16", "fp16"),
        Mode("bfloat16", "bfloat16", "bf16"),
        Mode("fp8", "bfloat16", "fp8"),
        Mode("nvfp4", "bfloat16", "nvfp4"),
        Mode("nf4", "bfloat16", "nf4"),
        Mode("qlora", "bfloat16", "nf4", adapters=True),
    )
}

_FORMAT_OF_DTYPE = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def mode_of(name: str) -> Mode:
    """The mode called `name`; another name is a ValueError with the known ones."""
    if name not in MODES:
        hint = HINTS.get(name) or did_you_mean(name, MODES)
        raise ValueError(
            f"unknown precision {name!r}; known: {', '.join(MODES)}" + (f"; {hint}" if hint else "")
        )
    return MODES[name]


def check_compute(mode: Mode, device: str, key: str = "training.progressive.new_stack_precision") -> None:
    """ConfigError about `key` where a kind of device (cpu, cuda, mps) cannot compute in the mode."""
    if mode.compute_dtype == "float16" and device == "cpu":
        raise ConfigError(
            Problem(
                key,
                "cannot be used on a CPU, which has no float16 arithmetic and emulates it about a hundred times slower",
                mode.name,
                ", ".join(name for name, other in MODES.items() if other.compute_dtype != "float16"),
                "training.progressive.trunk_precision fp16 stores frozen stacks that way and computes as usual",
            )
        )


def frozen_format(
    keys: PrecisionKeys, mode: str | None, run_dtype: str = "float32", device: str = "cpu"
) -> str:
    """`StackSpec.weight_format` of a stack in a mode once it is frozen, in a run on a kind of device.

    `trunk_precision`; else the mode's own; else, the stack following the run, fp32 on the CPU and the format of
    `run_dtype` elsewhere. Adapters train over a base that is stored from the start, in the mode's format.
    """
    chosen = None if mode is None else mode_of(mode)
    if chosen is not None and (chosen.adapters or keys.trunk_precision is None):
        return chosen.weight_format
    if keys.trunk_precision is not None:
        return keys.trunk_precision
    return "fp32" if device == "cpu" else _FORMAT_OF_DTYPE[run_dtype]
