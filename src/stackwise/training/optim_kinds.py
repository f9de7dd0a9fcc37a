"""Optimizers by name: our own, those of torch.optim, and any `module:Class`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from stackwise.config.errors import ConfigError, Problem, did_you_mean
from stackwise.training.adam8bit import Adam8bit
from stackwise.training.muon import Muon
from stackwise.training.rounding import Rounding
from stackwise.training.settings import OptimizerSettings

KEY = "training.optimizer.optimizer_type"


def make_optimizer(
    kind: str,
    memory: str,
    groups: list[dict[str, Any]],
    opt: OptimizerSettings,
    rounding: Rounding | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over parameter groups. What its class does not accept is a ConfigError."""
    extra: dict[str, Any] = dict(opt.custom_params) if kind == opt.optimizer_type else {}
    betas = (opt.betas[0], opt.betas[1])
    try:
        if kind == "Muon":
            eight_bit = memory != "full"
            return Muon(
                groups, lr=opt.lr, momentum=opt.momentum, eight_bit=eight_bit, rounding=rounding, **extra
            )
        if kind == "SGD":
            return torch.optim.SGD(groups, lr=opt.lr, momentum=opt.momentum, **extra)
        if kind not in ("Adam", "AdamW"):
            return _class_of(kind, opt)(groups, lr=opt.lr, **extra)
        if memory == "full":
            cls = torch.optim.Adam if kind == "Adam" else torch.optim.AdamW
            return cls(groups, lr=opt.lr, betas=betas, eps=opt.eps, **{"fused": True, **extra})
        decoupled = kind == "AdamW"
        return Adam8bit(
            groups, lr=opt.lr, betas=betas, eps=opt.eps, decoupled=decoupled, rounding=rounding, **extra
        )
    except TypeError as error:
        with_memory = "" if memory == "full" else f" with training.optimizer.memory {opt.memory}"
        message = f"is not accepted by {kind}{with_memory}: {error}"
        raise ConfigError([Problem("training.optimizer.custom_params", message, extra)]) from None


def _class_of(kind: str, opt: OptimizerSettings) -> Any:
    """The class that `kind` names."""
    path, _, name = kind.rpartition(":")
    path = path or "torch.optim"
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        hint = "install it, or put its folder on PYTHONPATH"
        raise ConfigError([Problem(KEY, f"{path} cannot be imported ({error})", kind, hint=hint)]) from None
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        known = [
            k
            for k, v in vars(module).items()
            if isinstance(v, type) and issubclass(v, torch.optim.Optimizer) and v is not torch.optim.Optimizer
        ]
        allowed = f"a torch.optim.Optimizer of {path}" + (f": {', '.join(known)}" if known else "")
        message = f"{path} has no optimizer {name}"
        raise ConfigError([Problem(KEY, message, kind, allowed, did_you_mean(name, known))])
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        message = "computes the loss several times per step, which the training loop does not offer"
        raise ConfigError([Problem(KEY, message, kind, hint="choose an optimizer whose step takes nothing")])
    accepted = inspect.signature(cls).parameters
    decays = any(group.weight_decay for group in opt.groups) or bool(opt.weight_decay)
    if decays and "weight_decay" not in accepted:
        message = f"{name} has no weight decay"
        hint = "set training.optimizer.weight_decay=0, also in groups"
        raise ConfigError([Problem("training.optimizer.weight_decay", message, opt.weight_decay, hint=hint)])
    return cls
