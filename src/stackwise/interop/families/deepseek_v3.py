"""DeepSeek-V3 and R1 (Liu et al. 2024, arXiv 2412.19437): a sigmoid router with groups and offsets.

The layers for predicting further tokens at once, behind the last one, are left out.
"""

from __future__ import annotations

from typing import Any

from stackwise.config.errors import Problem
from stackwise.interop.changes import Same
from stackwise.interop.families import deepseek
from stackwise.interop.families.common import TIED, llama_ends
from stackwise.interop.family import Family, Key, Settings
from stackwise.interop.table import Row
from stackwise.model.block_spec import BlockSpec
from stackwise.model.spec import RackSpec


def _block(spec: BlockSpec) -> list[Row]:
    return deepseek.rows(spec, Same(), offsets=True)


def _read(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    deepseek.read(config, settings, problems)


def _write(spec: RackSpec) -> dict[str, Any]:
    return deepseek.write(spec)


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    settings={**deepseek.SETTINGS, "moe.router": "sigmoid", "moe.balancing": "bias"},
    keys=(
        *deepseek.KEYS,
        Key("n_group", "moe.groups", default=1),
        Key("topk_group", "moe.top_groups", default=1),
        Key("norm_topk_prob", "moe.normalise", default=True),
    ),
    fixed={
        **deepseek.FIXED,
        "rope_interleave": (True,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "num_nextn_predict_layers": (0, 1),
    },
    ignored=deepseek.IGNORED,
    read=_read,
    write=_write,
    layer="model.layers.{}.",
    ends=llama_ends,
    block=_block,
    skipped=(r"model\.layers\.61\..*",),
    copies=TIED,
)
