"""DeepSeek-V2 (Liu et al. 2024, arXiv 2405.04434): a softmax router whose weights are not divided by their sum."""

from __future__ import annotations

from typing import Any

from stackwise.config.errors import Problem
from stackwise.interop.changes import Same
from stackwise.interop.families import deepseek
from stackwise.interop.families.common import TIED, llama_ends
from stackwise.interop.family import Family, Settings
from stackwise.interop.table import Row
from stackwise.model.block_spec import BlockSpec
from stackwise.model.spec import RackSpec


def _block(spec: BlockSpec) -> list[Row]:
    return deepseek.rows(spec, Same(), offsets=False)


def _read(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    deepseek.read(config, settings, problems)
    groups, chosen = config.get("n_group"), config.get("topk_group")
    if config.get("topk_method", "greedy") == "group_limited_greedy":
        settings |= {"moe.groups": groups or 1, "moe.top_groups": chosen or 1}


def _write(spec: RackSpec) -> dict[str, Any]:
    experts = next((block.experts for block in spec.blocks if block.experts is not None), None)
    grouped = experts is not None and experts.top_groups < experts.groups
    method = {"topk_method": "group_limited_greedy" if grouped else "greedy"}
    numbers = {"n_group": experts.groups, "topk_group": experts.top_groups} if experts and grouped else {}
    return deepseek.write(spec) | method | numbers


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    settings={**deepseek.SETTINGS, "moe.router": "softmax", "moe.normalise": False},
    keys=deepseek.KEYS,
    fixed={
        **deepseek.FIXED,
        "norm_topk_prob": (False,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
    },
    ignored=deepseek.IGNORED,
    read=_read,
    write=_write,
    layer="model.layers.{}.",
    ends=llama_ends,
    block=_block,
    copies=TIED,
)
