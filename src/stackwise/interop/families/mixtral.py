"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): Llama with a mixture of experts in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stackwise.config.errors import Problem
from stackwise.interop.families.common import (
    LLAMA_KEYS,
    LLAMA_SETTINGS,
    TIED,
    attention_rows,
    llama_ends,
    norm_rows,
    read_rope,
    read_sliding_window,
    write_rope,
    write_sliding_window,
)
from stackwise.interop.family import Family, Key, Settings, words
from stackwise.interop.table import Row, row
from stackwise.model.block_spec import BlockSpec
from stackwise.model.spec import RackSpec

_MOE = "block_sparse_moe"


def _block(spec: BlockSpec) -> list[Row]:
    assert spec.experts is not None
    rows = [*norm_rows(), *attention_rows(spec), row(f"{_MOE}.gate.weight", "ffn.router.weight")]
    for expert in range(spec.experts.n_experts):
        for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            rows.append(
                row(f"{_MOE}.experts.{expert}.{theirs}.weight", f"ffn.experts.{expert}.{ours}.weight")
            )
    return rows


def _read(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    read_rope(config, settings, problems)
    read_sliding_window(config, settings, problems)


def _write(spec: RackSpec) -> dict[str, Any]:
    return write_rope(spec) | write_sliding_window(spec)


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    settings={**LLAMA_SETTINGS, "bias": False, "moe.router": "softmax", "moe.normalise": True},
    keys=(
        *(replace(k, default=1e-5) if k.theirs == "rms_norm_eps" else k for k in LLAMA_KEYS),
        Key("num_local_experts", "moe.n_experts", default=8),
        Key("num_experts_per_tok", "moe.top_k", default=2),
        Key("router_aux_loss_coef", "moe.aux_weight", default=0.001),
    ),
    fixed={"hidden_act": ("silu",), "router_jitter_noise": (0.0,)},
    ignored=words("output_router_logits"),
    read=_read,
    write=_write,
    layer="model.layers.{}.",
    ends=llama_ends,
    block=_block,
    copies=TIED,
)
