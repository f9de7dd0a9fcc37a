"""Optimizers of a stage: built from what trains, state keyed by parameter name."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stackwise.config.errors import ConfigError, Problem
from stackwise.curriculum.layout import Copies
from stackwise.curriculum.stage import Stage
from stackwise.model.rack import Rack
from stackwise.training.muon import Muon
from stackwise.training.settings import TrainingSettings

OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> name of the moment -> tensor."""


class Rule(NamedTuple):
    """What one parameter gets."""

    optimizer: str
    lr: float
    weight_decay: float


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Matrices inside blocks: what Muon takes."""
    return parameter.dim() == 2 and name.startswith(("stacks.", "tail.")) and "_conv." not in name


def rule_for(name: str, parameter: Tensor, stage: Stage, newest: str, settings: TrainingSettings) -> Rule:
    """Optimizer, peak rate and decay of one parameter in a stage. `newest`: uid of the stack built last."""
    opt = settings.optimizer
    kind = opt.optimizer_type
    lr = opt.lr
    if kind == "Muon" and not is_block_matrix(name, parameter):
        kind, lr = "AdamW", opt.adam_lr or opt.lr
    if name.startswith(f"stacks.{newest}."):
        factor = (stage.lr or opt.lr) / opt.lr
    elif name.startswith("stacks."):
        factor = (stage.trunk_lr or opt.lr) / opt.lr
    else:
        factor = 1.0
    decays = (
        parameter.dim() >= 2 and not name.startswith(("embedding.", "positions.")) and "_conv." not in name
    )
    decay = opt.weight_decay if decays else 0.0
    for group in opt.groups:
        if re.search(group.match, name):
            lr = group.lr if group.lr is not None else lr
            decay = group.weight_decay if group.weight_decay is not None else decay
            break
    return Rule(kind, lr * factor, decay)


class Optimizers:
    """All optimizers of a stage behind one step. Covers every trainable parameter exactly once."""

    def __init__(self, rack: Rack, stage: Stage, settings: TrainingSettings) -> None:
        self.names: dict[Tensor, str] = {p: name for name, p in rack.named_parameters() if p.requires_grad}
        newest = max(rack.spec.stacks, key=lambda stack: stack.build_index).uid
        rules: dict[Rule, list[Tensor]] = {}
        for parameter, name in self.names.items():
            rules.setdefault(rule_for(name, parameter, stage, newest, settings), []).append(parameter)
        self._check_groups(rack, settings)
        kinds: dict[str, list[dict[str, Any]]] = {}
        for rule, params in rules.items():
            kinds.setdefault(rule.optimizer, []).append(
                {"params": params, "lr": rule.lr, "base_lr": rule.lr, "weight_decay": rule.weight_decay}
            )
        self.optimizers = [_make(kind, groups, settings) for kind, groups in kinds.items()]
        covered = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        assert len(covered) == len(set(covered)) == len(self.names), "each parameter belongs to one group"

    @staticmethod
    def _check_groups(rack: Rack, settings: TrainingSettings) -> None:
        names = [name for name, _ in rack.named_parameters()]
        for i, group in enumerate(settings.optimizer.groups):
            if not any(re.search(group.match, name) for name in names):
                raise ConfigError(
                    [
                        Problem(
                            f"training.optimizer.groups.{i}.match",
                            "matches no parameter",
                            group.match,
                            f"a pattern found in names such as {', '.join(names[:2] + names[-2:])}",
                        )
                    ]
                )

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.names)

    def set_factor(self, factor: float) -> float:
        """Set every group's rate to factor x its peak; returns the first group's."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        return float(self.optimizers[0].param_groups[0]["lr"])

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> OptimizerState:
        """Moments by parameter name; tensors are the live ones."""
        state: OptimizerState = {}
        for optimizer in self.optimizers:
            for parameter, held in optimizer.state.items():
                state[self.names[parameter]] = {k: torch.as_tensor(v) for k, v in held.items()}
        return state

    def load(self, state: OptimizerState) -> None:
        """Take over the moments of parameters that train here; others are ignored."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    held = state.get(self.names[parameter])
                    if held is not None:
                        optimizer.state[parameter] = {k: v.clone() for k, v in held.items()}

    def state_bytes(self) -> int:
        """Bytes of the moments (step counters included)."""
        return sum(t.nbytes for held in self.state().values() for t in held.values())


def _make(kind: str, groups: list[dict[str, Any]], settings: TrainingSettings) -> torch.optim.Optimizer:
    opt = settings.optimizer
    main = kind == opt.optimizer_type
    extra: dict[str, Any] = dict(opt.custom_params) if main else {}
    try:
        if kind == "Muon":
            return Muon(groups, lr=opt.lr, momentum=opt.momentum, **extra)
        if kind == "SGD":
            return torch.optim.SGD(groups, lr=opt.lr, momentum=opt.momentum, **extra)
        cls = torch.optim.Adam if kind == "Adam" else torch.optim.AdamW
        betas = (opt.betas[0], opt.betas[1])
        return cls(groups, lr=opt.lr, betas=betas, eps=opt.eps, **{"fused": True, **extra})
    except TypeError as error:
        raise ConfigError(
            [Problem("training.optimizer.custom_params", f"is not accepted by {kind}: {error}", extra)]
        ) from None


def carried(state: OptimizerState, how: str, copies: Copies) -> OptimizerState:
    """What of the last stage's moments the next one starts with.

    reset: nothing. carry: those of parameters that go on, by name. copy: also those of new blocks, taken from the
    blocks they are copies of (Shen et al. 2022, arXiv 2203.06211).
    """
    if how == "reset":
        return {}
    kept = dict(state)
    if how == "copy":
        for new, old in copies.items():
            for name in state:
                if name.startswith(old):
                    kept[new + name.removeprefix(old)] = state[name]
    return kept
