"""The ends of a rack: embedding, final norm and head. A stack that trains alone may have its own.

    head:  h = N(GELU(A h + a))        `head_transform`, as BERT's for masked tokens (Devlin et al. 2019, arXiv 1810.04805)
           h = P h                     to the width of the matrix, where it is another: low rank, or tied to a narrow table
           logits = h W^T + b          `head_bias`
           logits = c tanh(logits / c) `logit_softcap` (Bello et al. 2017, arXiv 1611.09940; Gemma 2, arXiv 2408.00118)

The loss reads a head in two parts, so that all logits never exist: `inner`, then `matrix`, `bias` and `softcap` in
chunks (`kernels.linear_cross_entropy`).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.kernels.linear import linear
from stackwise.kernels.linear_cross_entropy import capped
from stackwise.model.embedding import Embedding
from stackwise.model.linear import Linear
from stackwise.model.registry import NORM_LAYERS

if TYPE_CHECKING:
    from stackwise.model.spec import RackSpec


class HeadTransform(nn.Module):
    """Dense, GELU, norm: [..., D] -> [..., D]."""

    def __init__(self, spec: RackSpec) -> None:
        super().__init__()
        self.dense = Linear(spec.d_model, spec.d_model, bias=spec.has_bias)
        self.norm = NORM_LAYERS.get(spec.norm)(spec.d_model, spec.norm_eps, spec.has_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.norm(F.gelu(self.dense(hidden)))
        return out


class Head(nn.Module):
    """hidden -> logits. Holds no matrix of its own when it is tied to the embedding."""

    def __init__(self, spec: RackSpec, embedding: Embedding) -> None:
        super().__init__()
        self.transform = HeadTransform(spec) if spec.head_transform else None
        self.transposed = spec.tied and spec.tie_adapter == "transpose" and embedding.adapter is not None
        narrow = spec.head_adapter and not self.transposed
        self.adapter = Linear(spec.d_model, spec.head_width, bias=False) if narrow else None
        self._tied: list[Any] = (
            [embedding] if spec.tied else []
        )  # in a list: it is not registered a second time
        if spec.tied:
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(torch.empty(spec.vocab_size, spec.head_width))
        self.bias = nn.Parameter(torch.zeros(spec.vocab_size)) if spec.head_bias else None
        self.softcap = spec.logit_softcap

    @classmethod
    def of(cls, matrix: Tensor) -> Head:
        """The head that is this [V, D] matrix and no more."""
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head._tied = [SimpleNamespace(matrix=matrix)]
        head.transform = head.adapter = head.bias = head.softcap = None
        head.transposed = False
        return head

    @property
    def matrix(self) -> Tensor:
        """The [V, W] matrix, whoever owns it."""
        matrix: Tensor = self._tied[0].matrix if self._tied else self.weight
        return matrix

    @property
    def is_plain(self) -> bool:
        """Whether hidden states meet the matrix as they are."""
        return self.transform is None and self.adapter is None and not self.transposed

    def inner(self, hidden: Tensor) -> Tensor:
        """What the matrix is multiplied with: [..., D] -> [..., W]."""
        if self.transform is not None:
            hidden = self.transform(hidden)
        if self.transposed:
            adapter = self._tied[0].adapter
            assert isinstance(adapter, Linear)
            return linear(hidden, adapter.weight.t())
        return hidden if self.adapter is None else self.adapter(hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> logits [..., V]."""
        return capped(linear(self.inner(hidden), self.matrix, self.bias), self.softcap)


class InOut(nn.Module):
    """Embedding, norm and head as a rack has them; without values."""

    def __init__(self, spec: RackSpec) -> None:
        super().__init__()
        self.embedding = Embedding(spec)
        make_norm = NORM_LAYERS.get(spec.norm)
        self.norm = (
            make_norm(spec.d_model, spec.norm_eps, spec.has_bias) if spec.final_norm else nn.Identity()
        )
        self.head = Head(spec, self.embedding)

    @torch.no_grad()
    def copy_from(self, other: nn.Module) -> InOut:
        """Take over the values of the parts of the same name, and their device; returns itself."""
        values = other.state_dict()
        for name, tensor in self.named_parameters():
            tensor.data = values[name].clone()
        return self
