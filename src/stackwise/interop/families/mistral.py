"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama with a sliding window."""

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
    read_rope,
    read_sliding_window,
    write_rope,
    write_sliding_window,
)
from stackwise.interop.family import Family, Settings
from stackwise.model.spec import RackSpec


def _read(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    read_rope(config, settings, problems)
    read_sliding_window(config, settings, problems)


def _write(spec: RackSpec) -> dict[str, Any]:
    return write_rope(spec) | write_sliding_window(spec)


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    settings={**LLAMA_SETTINGS, "bias": False},
    keys=LLAMA_KEYS,
    fixed={"hidden_act": ("silu",)},
    read=_read,
    write=_write,
    layer="model.layers.{}.",
    ends=llama_ends,
    block=gated_block,
    skipped=(ROTARY_BUFFER,),
    copies=TIED,
)
