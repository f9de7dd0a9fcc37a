"""Gemma 2 (Riviere et al. 2024, arXiv 2408.00118): windows in every other layer, capped scores and logits."""

from __future__ import annotations

from typing import Any

from stackwise.config.errors import Problem
from stackwise.interop.families.common import TIED, llama_ends, read_rope, write_rope
from stackwise.interop.families.gemma import (
    IGNORED,
    SANDWICHED,
    keys,
    read_pattern,
    read_scale_and_biases,
    read_score_width,
    sandwiched_block,
    write_biases,
    write_pattern,
    write_score_width,
)
from stackwise.interop.family import Family, Key, Settings
from stackwise.model.spec import RackSpec


def _read(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    read_rope(config, settings, problems)
    read_scale_and_biases(config, settings, problems)
    read_score_width(config, settings, problems)
    read_pattern(config, settings, problems, every=2)


def _write(spec: RackSpec) -> dict[str, Any]:
    return write_rope(spec) | write_biases(spec) | write_score_width(spec) | write_pattern(spec)


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    settings=SANDWICHED,
    keys=(
        *keys(max_position_embeddings=8192),
        # null means no cap there, a missing key one of 50 or 30: null is refused
        Key("attn_logit_softcapping", "attention_softcap"),
        Key("final_logit_softcapping", "logit_softcap"),
    ),
    fixed={"hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,)},
    ignored=IGNORED | {"hidden_act"},
    read=_read,
    write=_write,
    layer="model.layers.{}.",
    ends=llama_ends,
    block=sandwiched_block,
    copies=TIED,
)
