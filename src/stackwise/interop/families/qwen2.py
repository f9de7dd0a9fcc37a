"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv 2407.10671, 2412.15115): Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from stackwise.config.errors import Problem
from stackwise.interop.families.common import (
    LLAMA_KEYS,
    LLAMA_SETTINGS,
    TIED,
    gated_block,
    llama_ends,
    read_layer_types,
    read_rope,
    write_layer_types,
    write_rope,
)
from stackwise.interop.family import Family, Settings
from stackwise.model.spec import RackSpec


def _read(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    read_rope(config, settings, problems)
    read_layer_types(config, settings, problems)


def _write(spec: RackSpec) -> dict[str, Any]:
    return write_rope(spec) | write_layer_types(spec)


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    settings={**LLAMA_SETTINGS, "bias": False, "attention_bias": "qkv"},
    keys=LLAMA_KEYS,
    fixed={"hidden_act": ("silu",)},
    read=_read,
    write=_write,
    layer="model.layers.{}.",
    ends=llama_ends,
    block=gated_block,
    copies=TIED,
)
