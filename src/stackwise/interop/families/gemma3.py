"""Gemma 3 for text (Kamath et al. 2025, arXiv 2503.19786): windows in five of six layers, two rotations, QK-norm."""

from __future__ import annotations

from typing import Any

from stackwise.config.errors import Problem
from stackwise.interop.families.common import (
    FULL,
    SLIDING,
    TIED,
    layer_types,
    llama_ends,
    read_rope,
    write_rope,
)
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

_FAR, _NEAR = 1_000_000.0, 10_000.0
"""Bases of the rotation in layers that see everything and in those with a window."""


def _read(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    read_scale_and_biases(config, settings, problems)
    read_score_width(config, settings, problems)
    every = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
    kinds = read_pattern(config, settings, problems, every)
    rope = config.get("rope_parameters", {})
    if not isinstance(rope, dict) or not all(isinstance(part, dict | None) for part in rope.values()):
        problems.append(Problem("rope_parameters", "must be a map of maps or null", rope))
        return
    if stray := sorted(rope.keys() - {FULL, SLIDING}):
        problems.append(Problem("rope_parameters", "has a key that is not understood", stray[0]))
    far = {"rope_parameters": rope.get(FULL), "rope_scaling": config.get("rope_scaling")}
    read_rope({**far, "rope_theta": config.get("rope_theta", _FAR)}, settings, problems)
    near = dict(rope.get(SLIDING) or {})
    theta = near.pop("rope_theta", config.get("rope_local_base_freq", _NEAR))
    if near.pop("rope_type", "default") != "default" or near:
        problems.append(Problem(f"rope_parameters.{SLIDING}", "is not understood", rope[SLIDING]))
    if SLIDING in kinds:
        settings["local_rope_theta"] = theta


def _write(spec: RackSpec) -> dict[str, Any]:
    """Rotations in the older form, which every version of Transformers reads."""
    by_kind = dict(zip(layer_types(spec), spec.blocks, strict=True))
    far, near = by_kind.get(FULL), by_kind.get(SLIDING)
    rope = {"rope_theta": _FAR, "rope_scaling": None} if far is None else write_rope(spec, far)
    rope["rope_local_base_freq"] = _NEAR if near is None else near.rope_theta
    return rope | write_biases(spec) | write_score_width(spec) | write_pattern(spec)


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    settings={**SANDWICHED, "qk_norm": True},
    keys=(
        *keys(max_position_embeddings=131_072),
        Key("final_logit_softcapping", "logit_softcap", default=None),
    ),
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (False,),
        "attn_logit_softcapping": (None,),  # Transformers reads it and does not cap
    },
    ignored=IGNORED | {"hidden_act"},
    read=_read,
    write=_write,
    layer="model.layers.{}.",
    ends=llama_ends,
    block=sandwiched_block,
    copies=TIED,
)
