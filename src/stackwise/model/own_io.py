"""What a stack that trains alone may have to itself: embedding, final norm and head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stackwise.kernels.linear import linear
from stackwise.model.registry import NORM_LAYERS

if TYPE_CHECKING:
    from stackwise.model.spec import RackSpec


class Head(nn.Module):
    """hidden -> logits. Holds no weight of its own when it is tied to the embedding."""

    def __init__(self, d_model: int, vocab_size: int, tied_to: nn.Embedding | None) -> None:
        super().__init__()
        if tied_to is None:
            self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        else:
            self.register_parameter("weight", None)
            self._tied = [tied_to]  # in a list, so that the embedding is not registered a second time

    @property
    def matrix(self) -> nn.Parameter:
        """The [V, D] matrix, whoever owns it."""
        return self.weight if self.weight is not None else self._tied[0].weight

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return linear(hidden_BTD, self.matrix)


class InOut(nn.Module):
    """Embedding, norm and head as a rack has them; without values."""

    def __init__(self, spec: RackSpec) -> None:
        super().__init__()
        # Without torch's own random start: `init_weights` gives one, and on the meta device the other would import
        # the compiler, which takes a second.
        self.embedding = nn.Embedding.from_pretrained(
            torch.empty(spec.vocab_size, spec.d_model), freeze=False
        )
        self.norm = NORM_LAYERS.get(spec.norm)(spec.d_model, spec.norm_eps, any(b.bias for b in spec.blocks))
        self.head = Head(spec.d_model, spec.vocab_size, self.embedding if spec.tied else None)

    @torch.no_grad()
    def copy_from(self, other: nn.Module) -> InOut:
        """Take over the values of the parts of the same name, and their device; returns itself."""
        values = other.state_dict()
        for name, tensor in self.named_parameters():
            tensor.data = values[name].clone()
        return self
