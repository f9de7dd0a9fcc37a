"""Gemma (Mesnard et al. 2024, arXiv 2403.08295), and what its successors share with it.

Norms multiply by 1 + weight, embeddings are scaled by the square root of the width, gates are a GELU by tanh.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stackwise.config.errors import Problem
from stackwise.interop.families.common import (
    FULL,
    LLAMA_KEYS,
    LLAMA_SETTINGS,
    SLIDING,
    TIED,
    attention_rows,
    feed_forward_rows,
    gated_block,
    layer_types,
    llama_ends,
    read_rope,
    read_windows,
    write_rope,
)
from stackwise.interop.family import Family, Key, Settings, words
from stackwise.interop.table import Row, row
from stackwise.model.block_spec import BlockSpec
from stackwise.model.spec import RackSpec

SETTINGS: Settings = {
    **LLAMA_SETTINGS,
    "norm": "rmsnorm_offset",
    "ffn_type": "geglu_tanh",
    "bias": False,
}
SANDWICHED: Settings = {**SETTINGS, "norm_placement": "both"}
"""Of Gemma 2 and 3: norms in front of and behind both sub-layers."""
IGNORED = words("cache_implementation")
WINDOW = 4096
"""Where config.json has no `sliding_window`."""


def keys(**defaults: Any) -> tuple[Key, ...]:
    """The keys of Llama with Gemma's defaults, and those that differ from model to model."""
    changed = {"head_dim": 256, "tie_word_embeddings": True, **defaults}
    return tuple(replace(k, default=changed.get(k.theirs, k.default)) for k in LLAMA_KEYS)


def read_scale_and_biases(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    """The factor on embeddings, and biases of the attention."""
    width, biases = settings.get("d_model"), config.get("attention_bias", False)
    if isinstance(width, int):
        settings["embedding_scale"] = width**0.5
    if not isinstance(biases, bool):
        problems.append(Problem("attention_bias", "must be true or false", biases))
    settings["attention_bias"] = "all" if biases else "none"


def write_biases(spec: RackSpec) -> dict[str, Any]:
    return {"attention_bias": spec.blocks[0].out_bias}


def read_score_width(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    """What attention scores are divided by the root of."""
    width = config.get("query_pre_attn_scalar", 256)
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        problems.append(Problem("query_pre_attn_scalar", "must be a positive integer", width))
    settings["score_width"] = width


def write_score_width(spec: RackSpec) -> dict[str, Any]:
    block = spec.blocks[0]
    width = block.score_width or block.head_dim
    return {"query_pre_attn_scalar": int(width) if width == int(width) else width}


def read_pattern(
    config: dict[str, Any], settings: Settings, problems: list[Problem], every: Any
) -> list[str]:
    """Layers with a window by `layer_types`; without it all but the last of `every` so many. Returns their kinds."""
    kinds, layers = config.get("layer_types"), settings.get("n_layers")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        problems.append(Problem("sliding_window_pattern", "must be a positive integer", every))
    elif isinstance(layers, int):
        kinds = kinds or [SLIDING if (layer + 1) % every else FULL for layer in range(layers)]
        read_windows(kinds, config.get("sliding_window", WINDOW), settings, problems)
    return kinds or []


def write_pattern(spec: RackSpec) -> dict[str, Any]:
    width = next((block.window for block in spec.blocks if block.window is not None), WINDOW)
    return {"layer_types": layer_types(spec), "sliding_window": width}


def sandwiched_block(spec: BlockSpec) -> list[Row]:
    """A layer of Gemma 2 and 3."""
    return [
        row("input_layernorm.weight", "attn_norm.weight"),
        row("post_attention_layernorm.weight", "attn_out_norm.weight"),
        row("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
        row("post_feedforward_layernorm.weight", "ffn_out_norm.weight"),
        *attention_rows(spec),
        *feed_forward_rows("mlp", "ffn"),
    ]


def _read(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    read_rope(config, settings, problems)
    read_scale_and_biases(config, settings, problems)


def _write(spec: RackSpec) -> dict[str, Any]:
    return write_rope(spec) | write_biases(spec)


FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    settings=SETTINGS,
    keys=keys(max_position_embeddings=8192),
    fixed={
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),  # files of the first release say gelu and mean the other
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (False,),
    },
    ignored=IGNORED,
    read=_read,
    write=_write,
    layer="model.layers.{}.",
    ends=llama_ends,
    block=gated_block,
    copies=TIED,
)
