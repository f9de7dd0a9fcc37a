"""A rack as plain tensors, one stack at a time: formats unpacked, adapters and norms folded in."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stackwise.curriculum.growth import plain_tensors
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec
from stackwise.precision.convert import dense_tensors


class PlainRack:
    """What a rack would hold if it were plain. `spec` describes that, `empty` are its tensors without values.

    `fold` false: adapter sets are left out, not folded in. An embedding that a stack has for itself alone is left out.
    """

    def __init__(self, rack: Rack, *, fold: bool = True) -> None:
        self.rack, self.fold = rack, fold
        self.spec: RackSpec = rack.spec.with_stacks(
            [
                replace(
                    stack,
                    weight_format="fp32",
                    adapters=(),
                    compute_dtype=None,
                    frozen_format=None,
                    adapters_only=False,
                    spectral=False,
                    own_io=False,
                )
                for stack in rack.spec.stacks
            ]
        )
        with torch.device("meta"):
            self.empty: dict[str, Tensor] = Rack(self.spec).state_dict()
        self._rest = {n: t for n, t in rack.state_dict().items() if not n.startswith("stacks.")}
        self._uid, self._held = "", dict[str, Tensor]()

    def get(self, name: str) -> Tensor:
        """One tensor. Those of a stack are made together and kept until another stack is asked for."""
        if not name.startswith("stacks."):
            return self._rest[name].detach()
        _, uid, rest = name.split(".", 2)
        if uid != self._uid:
            self._held = {}
            stack = next(stack for stack in self.rack.stacks if stack.uid == uid)
            self._uid, self._held = uid, plain_tensors(stack) if self.fold else dense_tensors(stack)
        return self._held[rest].detach()
