"""What one trained parameter gets: optimizer, rate, decay, and how much memory its update holds."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from stackwise.curriculum.stage import Stage
from stackwise.model.names import adapter_set_of
from stackwise.training.settings import TrainingSettings

FEWEST = 4096
"""Tensors with fewer numbers keep fp32 weights and moments: they weigh little, and blocks would fit them badly."""

NARROW = ("int8_nomaster", "fused")
"""Modes in which weights are kept in bf16."""

EIGHT_BIT = ("AdamW", "Adam", "Muon")
"""Optimizers whose moments can be kept in eight bits."""


class Rule(NamedTuple):
    """`memory`: full (fp32), int8 (8-bit moments) or int8_nomaster (the same, and bf16 weights)."""

    optimizer: str
    memory: str
    lr: float
    weight_decay: float


def own_name(name: str) -> str:
    """The name without the stack in front where it is the embedding, norm or head of a stack's own."""
    return name.partition(".io.")[2] or name


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Matrices inside blocks, adapters apart: what Muon takes."""
    name = own_name(name)
    inside = name.startswith(("stacks.", "tail.")) and adapter_set_of(name) is None
    return parameter.dim() == 2 and inside and "_conv." not in name


def memory_of(name: str, parameter: Tensor, memory: str) -> str:
    """What `training.optimizer.memory` means for one parameter.

    Adapters train in fp32. Of the large tensors all but positions, the time input and convolutions are matrices that bf16 serves.
    """
    if memory == "full" or parameter.numel() < FEWEST or adapter_set_of(name) is not None:
        return "full"
    matrix = parameter.dim() == 2 and not name.startswith(("positions.", "time.")) and "_conv." not in name
    return "int8_nomaster" if memory in NARROW and matrix else "int8"


def kind_of(name: str, parameter: Tensor, kind: str) -> str:
    """The optimizer of one parameter: Muon leaves what is no matrix of a block to AdamW."""
    return "AdamW" if kind == "Muon" and not is_block_matrix(name, parameter) else kind


def rule_for(name: str, parameter: Tensor, stage: Stage, newest: str, settings: TrainingSettings) -> Rule:
    """The rule of one parameter in a stage. `newest`: uid of the stack built last."""
    opt = settings.optimizer
    kind = kind_of(name, parameter, opt.optimizer_type)
    lr = opt.adam_lr or opt.lr if kind != opt.optimizer_type else opt.lr
    if adapter_set_of(name) is not None:
        own, lr = None, stage.adapter_lr or settings.progressive.qlora_lr
    elif name.startswith(f"stacks.{newest}."):
        own = stage.lr
    elif name.startswith("stacks."):
        own = stage.trunk_lr
    else:
        own = stage.io_lr
    # a stage's rate is said for `lr`; with Muon the rest keeps its proportion
    factor = 1.0 if own is None else own / opt.lr
    decays = (
        parameter.dim() >= 2
        and not own_name(name).startswith(("embedding.", "positions.", "time."))
        and "_conv." not in name
    )
    decay = opt.weight_decay if decays else 0.0
    for group in opt.groups:
        if re.search(group.match, name):
            lr = group.lr if group.lr is not None else lr
            decay = group.weight_decay if group.weight_decay is not None else decay
            break
    return Rule(kind, memory_of(name, parameter, opt.memory), lr * factor, decay)
