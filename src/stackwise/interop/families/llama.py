"""Llama 1 to 3 (Touvron et al. 2023, arXiv 2302.13971; Grattafiori et al. 2024, arXiv 2407.21783): RMSNorm, SwiGLU, rotary."""

from __future__ import annotations

from typing import Any

from stackwise.config.errors import Problem
from stackwise.interop.families.common import (
    LLAMA_KEYS,
    LLAMA_SETTINGS,
    ROTARY_BUFFER,
    TIED,
    gated_block,
    llama_ends,
    read_biases,
    read_rope,
    write_biases,
    write_rope,
)
from stackwise.interop.family import Family, Settings
from stackwise.model.spec import RackSpec


def _read(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    read_rope(config, settings, problems)
    read_biases(config, settings, problems)


def _write(spec: RackSpec) -> dict[str, Any]:
    return write_rope(spec) | write_biases(spec)


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    settings=LLAMA_SETTINGS,
    keys=LLAMA_KEYS,
    fixed={
        "hidden_act": ("silu",),
        "pretraining_tp": (1, 2, 4, 8),  # how many parts a product was computed in
    },
    read=_read,
    write=_write,
    layer="model.layers.{}.",
    ends=llama_ends,
    block=gated_block,
    copies=TIED,
    skipped=(ROTARY_BUFFER,),
)
