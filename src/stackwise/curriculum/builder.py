"""ProgressiveRackBuilder: a rack that grows at either end under one's own hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stackwise.adapters.ranks import STACK
from stackwise.config.errors import ConfigError, Problem, did_you_mean
from stackwise.config.shape import names_of
from stackwise.curriculum.assemble import build_rack
from stackwise.curriculum.builder_adapters import BuilderAdapters
from stackwise.curriculum.builder_precision import BuilderPrecision
from stackwise.curriculum.builder_time import check_time
from stackwise.curriculum.growth import adopt, grow
from stackwise.curriculum.layout import new_stack
from stackwise.curriculum.settings import CurriculumKeys
from stackwise.curriculum.split import apply_training
from stackwise.curriculum.stage import Growth
from stackwise.model.block import Stack
from stackwise.model.describe import rack_spec, stack_blocks
from stackwise.model.files import load_weights, save_weights
from stackwise.model.init import start_spectral_norm
from stackwise.model.lexical import take_table_of
from stackwise.model.rack import Rack, count_parameters
from stackwise.model.spec import RackSpec
from stackwise.model.spectral import add_spectral_norm
from stackwise.precision.modes import mode_of
from stackwise.storage.errors import CheckpointError

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


class ProgressiveRackBuilder(BuilderAdapters, BuilderPrecision):
    """Builds a rack stack by stack.

    Give a config, or dimensions, or both if they agree (else ValueError); neither is a TypeError. `build_rack` always
    returns the current rack; its modules stay the same across growth, so what was trained stays trained.
    `default_precision`: the mode of stacks that are given none (`precision.modes`); full leaves it to the config.
    """

    def __init__(
        self,
        config: StackWiseConfig | None = None,
        building_mode: str | None = None,
        default_precision: str = "full",
        *,
        vocab_size: int | None = None,
        d_model: int | None = None,
        d_ff: int | None = None,
        n_heads: int | None = None,
        **dimensions: Any,
    ) -> None:
        given: dict[str, Any] = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "d_ff": d_ff,
            "n_heads": n_heads,
            **dimensions,
        }
        self.config = _config_of(config, {key: value for key, value in given.items() if value is not None})
        self.building_mode = _checked_mode(building_mode or self.config.training.progressive.building_mode)
        self.default_precision = mode_of(default_precision).name
        self._modes, self._full = {}, {}
        self._base = rack_spec(self.config, 0)
        self._rack: Rack | None = None

    # --- growth ------------------------------------------------------------------------------------------------

    @property
    def max_stacks(self) -> int:
        return self.config.training.progressive.max_stacks

    @property
    def n_stacks(self) -> int:
        return 0 if self._rack is None else len(self._rack.stacks)

    def append_stack(
        self,
        stack: Stack | None = None,
        n_blocks: int | None = None,
        precision: str | None = None,
        qlora_rank: int | None = None,
        qlora_alpha: float | None = None,
    ) -> Stack:
        """Add a stack at the right end, next to the head. The first starts random, later ones by `new_stack_init`.

        `stack`: a module of your own to add as it is. With `training.progressive.qlora_enabled`, or a `qlora_rank` or
        `qlora_alpha` of its own, the stack gets an adapter set `stack`; with `progressive_qlora` the older ones get a
        set `trunk`. More than `max_stacks`, another width, n_blocks < 1, an unknown precision or a rank < 1: ValueError.
        Where time is depth, so is a stack for which no noise is left, and growth at the other end than the mode's warns.
        """
        return self._arrive(stack, n_blocks, precision, qlora_rank, qlora_alpha, at_left=False)

    def prepend_stack(
        self,
        stack: Stack | None = None,
        n_blocks: int | None = None,
        precision: str | None = None,
        qlora_rank: int | None = None,
        qlora_alpha: float | None = None,
    ) -> Stack:
        """Add a stack at the left end, next to the embedding; otherwise like `append_stack`."""
        return self._arrive(stack, n_blocks, precision, qlora_rank, qlora_alpha, at_left=True)

    def _arrive(
        self,
        stack: Stack | None,
        n_blocks: int | None,
        precision: str | None,
        rank: int | None,
        alpha: float | None,
        at_left: bool,
    ) -> Stack:
        check_time(self.config, self.building_mode, self.n_stacks, at_left)
        mode = self._mode(precision)
        needs_set = mode is not None and mode_of(mode).adapters
        if needs_set and rank is None:
            rank = self.config.training.progressive.qlora_rank
        planned = self._planned_set(self._next_index, rank, alpha)
        added = self._add(stack, n_blocks, at_left, self._init)
        self._set_mode(added, mode)
        return self._adapt(added, planned)

    def fill(self, n_stacks: int) -> None:
        """Add random stacks, next to the head or under prepend and independent to the embedding, up to `n_stacks`."""
        while self.n_stacks < n_stacks:
            at_left = self.building_mode in ("prepend", "independent")
            self._add(None, None, at_left, "random")

    @property
    def _next_index(self) -> int:
        return new_stack(() if self._rack is None else self._rack.spec.stacks, ()).build_index

    @property
    def _init(self) -> str:
        return self.config.training.progressive.new_stack_init

    def _add(self, stack: Stack | None, n_blocks: int | None, at_left: bool, init: str) -> Stack:
        if self.n_stacks >= self.max_stacks:
            raise ValueError(
                f"the rack has {self.n_stacks} stacks and training.progressive.max_stacks is {self.max_stacks}; raise it"
            )
        seed, held = self.config.training.seed, self._rack
        spec = self._base if held is None else held.spec
        shapes = stack_blocks(self.config)
        nth = min(self.n_stacks, len(shapes) - 1)
        shape = shapes[-1 - nth if at_left else nth]
        count = len(shape) if n_blocks is None else n_blocks
        if stack is not None and stack.d_model != spec.d_model:
            raise ValueError(f"the stack is {stack.d_model} wide, the rack {spec.d_model}")
        if count < 1:
            raise ValueError(f"n_blocks must be at least 1, got {count}")
        blocks = tuple(shape[i % len(shape)] for i in range(count)) if stack is None else stack.spec.blocks
        if held is not None and stack is None:
            growth = Growth("prepend" if at_left else "append", count, init, blocks=blocks)
            self._rack = grow(held, growth, seed)[0]
        else:
            new = new_stack(spec.stacks, blocks)
            if stack is not None:
                stack.build_index, stack.uid = new.build_index, new.uid
                new = stack.spec
            own = {} if stack is None else {new.uid: stack}
            if held is None:
                self._rack = Rack(spec.with_stacks([new]), seed=seed, stacks=list(own.values()) or None)
                take_table_of(self.config, self._rack)
            else:
                grown = spec.with_stacks([new, *spec.stacks] if at_left else [*spec.stacks, new])
                self._rack = adopt(held, grown, seed, own=own)
        arrived = self._rack.stacks[0 if at_left else -1]
        if self.config.model.spectral_norm and stack is None:
            add_spectral_norm(arrived)
            start_spectral_norm(arrived, seed, f"stacks.{arrived.uid}.")
            self._note()
        return arrived

    def build_rack(self) -> Rack:
        """The current rack, the same object until the next growth. No stacks yet: ValueError."""
        if self._rack is None:
            raise ValueError("the builder has no stacks yet; call append_stack() first")
        return self._rack

    def replace_rack(self, rack: Rack) -> None:
        """Take over a rack that a trainer has grown."""
        self._rack = rack

    # --- freezing ----------------------------------------------------------------------------------------------

    def freeze_trunk(self, stack_indices: int | Iterable[int] | slice | None = None) -> list[int]:
        """Freeze the stacks at these positions (null: all but the newest), store them in their format, and return them.

        Everything else trains: the other stacks, tail, norm and head, and the embedding only when no stack is frozen.
        A position outside the rack is an IndexError.
        """
        rack = self.build_rack()
        positions = self._positions(stack_indices)
        units = {f"stack:{s.uid}" for i, s in enumerate(rack.stacks) if i not in positions}
        units |= {"tail", "norm"} | (set() if positions else {"embedding"})
        if not rack.is_tied or not positions:
            units.add("head")
        apply_training(rack, units)
        for position in positions:
            self._store(rack.stacks[position])
        return positions

    def _positions(self, given: int | Iterable[int] | slice | None) -> list[int]:
        rack = self.build_rack()
        count = len(rack.stacks)
        if given is None:
            newest = max(range(count), key=lambda i: rack.stacks[i].build_index)
            return [i for i in range(count) if i != newest]
        if isinstance(given, slice):
            return list(range(count))[given]
        listed = [given] if isinstance(given, int) else list(given)
        for i in listed:
            if not -count <= i < count:
                raise IndexError(f"stack {i} of a rack of {count} stacks")
        return sorted({i % count for i in listed})

    # --- facts -------------------------------------------------------------------------------------------------

    def get_stack_info(self, stack_idx: int) -> dict[str, Any]:
        """What the stack at a position is: names, sizes, precision, whether it is frozen."""
        rack = self.build_rack()
        self._positions(stack_idx)
        stack = rack.stacks[stack_idx]
        trainable = sum(p.numel() for p in stack.parameters() if p.requires_grad)
        return {
            "stack_idx": stack.stack_id,
            "uid": stack.uid,
            "build_index": stack.build_index,
            "n_blocks": len(stack.blocks),
            **self._precision_info(stack),
            "lora": {spec.name: {"rank": spec.rank, "alpha": spec.alpha} for spec in stack.adapters},
            "qlora_rank": next((spec.rank for spec in stack.adapters if spec.name == STACK), None),
            "frozen": trainable == 0,
            "total_parameters": count_parameters(stack),
            "trainable_parameters": trainable,
        }

    def get_rack_info(self) -> dict[str, Any]:
        """What the rack is, with one entry per stack."""
        return {
            "current_stacks": self.n_stacks,
            "max_stacks": self.max_stacks,
            "building_mode": self.building_mode,
            "default_precision": self.default_precision,
            "stack_info": [self.get_stack_info(i) for i in range(self.n_stacks)],
        }

    # --- files -------------------------------------------------------------------------------------------------

    def save_stack(self, stack_idx: int, path: str | Path) -> Path:
        """Write one stack as a safetensors file with its description; returns the path."""
        rack = self.build_rack()
        self._positions(stack_idx)
        stack = rack.stacks[stack_idx]
        spec = RackSpec.to_dict(rack.spec.with_stacks([stack.spec]))["stacks"][0]
        return save_weights(path, stack.state_dict(), kind="stack", spec=spec)

    def load_stack(self, stack_idx: int, path: str | Path) -> bool:
        """Load the weights of a saved stack, of any run, into the stack at a position.

        Any mismatch lists the tensors and changes nothing: CheckpointError, as for a damaged file. Returns True.
        """
        rack = self.build_rack()
        self._positions(stack_idx)
        tensors, _ = load_weights(path, kind="stack")
        _load(rack.stacks[stack_idx], tensors, path)
        return True

    def save_rack(self, path: str | Path) -> Path:
        """Write the whole rack as one safetensors file with its description; returns the path."""
        rack = self.build_rack()
        return save_weights(path, rack.state_dict(), kind="rack", spec=rack.spec.to_dict())

    def load_rack(self, path: str | Path) -> bool:
        """Load a saved rack; an empty builder takes its description, another must have the same tensors.

        Any mismatch lists the tensors and changes nothing: CheckpointError, as for a damaged file. Returns True.
        """
        tensors, spec = load_weights(path, kind="rack")
        try:
            rack = build_rack(RackSpec.from_dict(spec)) if self._rack is None else self._rack
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} describes no rack that this version knows: {error}") from error
        _load(rack, tensors, path)
        self._rack = rack
        return True


@torch.no_grad()
def _load(module: nn.Module, tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Copy tensors by name; every missing, extra or unequal one is listed in one CheckpointError."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - own.keys()]
    for name in own.keys() & tensors.keys():
        found, needed = tensors[name], own[name]
        if found.shape != needed.shape:
            problems.append(f"{name} is {list(found.shape)}, needed {list(needed.shape)}")
        elif found.dtype != needed.dtype and not (found.is_floating_point() and needed.is_floating_point()):
            problems.append(f"{name} is {found.dtype}, needed {needed.dtype}")
    if problems:
        raise CheckpointError(f"{path} does not fit: " + "; ".join(sorted(problems)), path=Path(path))
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _config_of(config: StackWiseConfig | None, given: dict[str, Any]) -> StackWiseConfig:
    from stackwise.config.root import StackWiseConfig

    if config is None and not given:
        raise TypeError("give a config, or dimensions: vocab_size, d_model, d_ff, n_heads")
    if config is None:
        return StackWiseConfig.from_dict({"model": given})
    for key, value in given.items():
        held = getattr(config.model, key)
        if held not in (None, value):
            raise ValueError(f"{key}={value} contradicts the config's model.{key}={held}")
    if not given:
        return config
    model = config.model.model_copy(update=given)
    return config.model_copy(update={"model": model})


def _checked_mode(mode: str) -> str:
    field = CurriculumKeys.model_fields["building_mode"]
    if mode not in names_of(field):
        raise ConfigError(
            Problem(
                "building_mode",
                "is unknown",
                mode,
                ", ".join(names_of(field)),
                did_you_mean(mode, names_of(field)),
            )
        )
    return mode
