"""Qwen 3 (Yang et al. 2025, arXiv 2505.09388): Llama with normalised queries and keys."""

from __future__ import annotations

from typing import Any

from stackwise.config.errors import Problem
from stackwise.interop.families.common import (
    LLAMA_KEYS,
    LLAMA_SETTINGS,
    TIED,
    gated_block,
    llama_ends,
    read_biases,
    read_layer_types,
    read_rope,
    write_biases,
    write_layer_types,
    write_rope,
)
from stackwise.interop.family import Family, Settings
from stackwise.model.spec import RackSpec


def _read(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    read_rope(config, settings, problems)
    read_layer_types(config, settings, problems)
    read_biases(config, settings, problems)


def _write(spec: RackSpec) -> dict[str, Any]:
    return (
        write_rope(spec) | write_layer_types(spec) | {"attention_bias": write_biases(spec)["attention_bias"]}
    )


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    settings={**LLAMA_SETTINGS, "qk_norm": True},
    keys=LLAMA_KEYS,
    fixed={"hidden_act": ("silu",), "mlp_bias": (False,)},
    read=_read,
    write=_write,
    layer="model.layers.{}.",
    ends=llama_ends,
    block=gated_block,
    copies=TIED,
)
