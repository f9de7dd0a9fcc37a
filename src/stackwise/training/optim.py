"""Optimizers of a stage: built from what trains, state keyed by parameter name.

    set_factor        rates of the step
    in_backward       around the backward pass; under memory fused every tensor steps there
    gradient_norm, clip, step, zero_grad

Frozen parameters hold no bytes here: the optimizers of a stage know only what trains in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stackwise.config.errors import ConfigError, Problem
from stackwise.curriculum.stage import Stage
from stackwise.model.rack import Rack
from stackwise.training.optim_kinds import make_optimizer
from stackwise.training.optim_rules import NARROW, Rule, is_block_matrix, memory_of, rule_for
from stackwise.training.optim_state import HostMoments, place
from stackwise.training.rounding import Rounding
from stackwise.training.settings import TrainingSettings

__all__ = ["OptimizerState", "Optimizers", "carried", "is_block_matrix", "rule_for", "set_widths"]

OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> name of the moment -> tensor."""


class Optimizers:
    """All optimizers of a stage behind one step. Covers every trainable parameter exactly once.

    Parameters may be on several devices. Under the modes without fp32 masters large matrices become bf16 here when
    they start to train and fp32 again when they stop; no number changes on the way back.
    """

    def __init__(self, rack: Rack, stage: Stage, settings: TrainingSettings) -> None:
        opt = settings.optimizer
        self.names: dict[Tensor, str] = {p: name for name, p in rack.named_parameters() if p.requires_grad}
        set_widths(rack, settings)
        self.rounding = Rounding(self.names, settings.seed)
        self.fused = opt.memory == "fused"
        self._host = HostMoments() if opt.state_device == "host" else None
        newest = max(rack.spec.stacks, key=lambda stack: stack.build_index).uid
        self._check_groups(rack, settings)
        # Moments that come and go, and steps within the backward pass, are taken one parameter at a time.
        apart = self.fused or self._host is not None
        kinds: dict[Any, dict[Rule, list[Tensor]]] = {}
        for p, name in self.names.items():
            rule = rule_for(name, p, stage, newest, settings)
            key = (rule.optimizer, rule.memory, p.device, p if apart else None)
            kinds.setdefault(key, {}).setdefault(rule, []).append(p)
        self.optimizers: list[torch.optim.Optimizer] = []
        for (kind, memory, *_), rules in kinds.items():
            groups: list[dict[str, Any]] = [
                {"params": params, "lr": rule.lr, "base_lr": rule.lr, "weight_decay": rule.weight_decay}
                for rule, params in rules.items()
            ]
            optimizer = make_optimizer(kind, memory, groups, opt, self.rounding)
            if self._host is not None:
                self._host.watch(optimizer)
            self.optimizers.append(optimizer)
        self._norms: list[Tensor] = []
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

    # --- a step --------------------------------------------------------------------------------------------------

    def set_factor(self, factor: float, step: int = 0) -> float:
        """Set every group's rate to factor x its peak; returns the first group's. `step` counts over the whole run."""
        self.rounding.step = step
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        return float(self.optimizers[0].param_groups[0]["lr"])

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Around the one backward pass of a step.

        Under memory fused each tensor steps as soon as its gradient is complete, and the gradient goes. A tensor
        whose gradient is not finite does not step; `gradient_norm` is then not finite either.
        """
        if not self.fused:
            yield
            return
        self._norms = []
        own = {o.param_groups[0]["params"][0]: o for o in self.optimizers}

        def step(parameter: Tensor) -> None:
            assert parameter.grad is not None
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            self._norms.append(norm)
            if torch.isfinite(norm):
                own[parameter].step()
            parameter.grad = None

        hooks = [p.register_post_accumulate_grad_hook(step) for p in self.names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def gradient_norm(self) -> Tensor:
        """Norm over all gradients of the step, fp32, on the first parameter's device."""
        device = next(iter(self.names)).device
        grads = [p.grad for p in self.names if p.grad is not None]
        norms = [*self._norms, *(torch._foreach_norm(grads, 2.0, dtype=torch.float32) if grads else ())]
        if not norms:
            return torch.zeros((), device=device)
        return torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))

    def clip(self, limit: float, norm: Tensor) -> None:
        """Scale all gradients so that their norm, now `norm`, becomes `limit`."""
        torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)

    def step(self) -> None:
        """Update every parameter that has a gradient; those that stepped in the backward pass have none left."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    # --- state ---------------------------------------------------------------------------------------------------

    def state(self) -> OptimizerState:
        """Moments by parameter name; tensors are the live ones."""
        if self._host is not None:
            self._host.wait()
        state: OptimizerState = {}
        for optimizer in self.optimizers:
            for parameter, held in optimizer.state.items():
                state[self.names[parameter]] = {k: torch.as_tensor(v) for k, v in held.items()}
        return state

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over copies of the moments of parameters that train here; others are ignored."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    held = state.get(self.names[parameter])
                    if held is None:
                        continue
                    if self._host is not None:
                        taken = {k: self._host.keep(parameter, k, v.clone()) for k, v in held.items()}
                    else:
                        taken = {k: place(v.clone(), parameter, group) for k, v in held.items()}
                    optimizer.state[parameter] = taken

    def state_bytes(self) -> int:
        """Bytes of the moments, step counters included, wherever they are."""
        return sum(t.nbytes for held in self.state().values() for t in held.values())

    def host_bytes(self) -> int:
        """Those of them that `training.optimizer.state_device` host keeps in main memory."""
        if self._host is None:
            return 0
        return sum(t.nbytes for held in self.state().values() for t in held.values() if t.dim() > 0)


@torch.no_grad()
def set_widths(rack: Rack, settings: TrainingSettings) -> None:
    """bf16 for matrices that train without a master; fp32 again for those that did, unless frozen to a format.

    To be called once it is known what trains, before the weights are placed; `Optimizers` calls it as well.
    """
    memory = settings.optimizer.memory
    if memory not in NARROW:
        return
    formatted = tuple(f"stacks.{stack.uid}." for stack in rack.stacks if stack.weight_format != "fp32")
    for name, p in rack.named_parameters():
        if p.requires_grad and memory_of(name, p, memory) == "int8_nomaster":
            p.data = p.data.to(torch.bfloat16)
        elif p.dtype == torch.bfloat16 and (p.requires_grad or not name.startswith(formatted)):
            p.data = p.data.to(torch.float32)


def carried(state: OptimizerState, how: str, copies: Mapping[str, str]) -> OptimizerState:
    """What of the last stage's moments the next one starts with.

    reset: nothing. carry: those of parameters that go on, by name. copy: also those of new blocks, taken from the
    blocks they are copies of (Shen et al. 2022, arXiv 2203.06211); `copies`: name prefix of the new -> of the old.
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
