"""Settings of the room; they are part of `training.progressive`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from stackwise.config.base import Settings
from stackwise.config.types import Flag

WeightFormat = Literal["fp32", "fp16", "bf16", "fp8", "nvfp4", "nf4"]
Precision = Literal["full", "half", "bfloat16", "fp8", "nvfp4", "nf4", "qlora"]

HINTS = dict.fromkeys(("fp4", "nf_fp8"), "the 4-bit formats are nvfp4 and nf4")
"""Names that people look for, and where to find what they mean."""


def _hinted(value: Any) -> Any:
    if isinstance(value, str) and value in HINTS:
        raise PydanticCustomError("unknown_name", "is unknown: {hint}", {"hint": HINTS[value]})
    return value


StackPrecision = Annotated[Precision, BeforeValidator(_hinted)]
"""A precision that a stack can have, by name."""


class PrecisionKeys(Settings):
    """The precision of stacks while they train and once they are frozen."""

    trunk_precision: Annotated[WeightFormat, BeforeValidator(_hinted)] | None = None
    """How the matrices of frozen stacks are stored. Stacks after them train on the rounded outputs. null: the format that goes with `new_stack_precision`; without that fp32 on the CPU and the format of `training.dtype` elsewhere."""
    new_stack_precision: StackPrecision | None = None
    """Number format a new stack computes in, and is stored in once it is frozen: full fp32, half fp16, bfloat16, or bfloat16 stored as fp8, nvfp4 or nf4; qlora trains adapters over an nf4 base. null: as `training.dtype` says."""
    fake_quant: Flag = False
    """Round the matrices of a training stack to the format in which it will be frozen, at every use; gradients pass as if they had not been rounded."""
