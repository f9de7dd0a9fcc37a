"""Token vectors: a table, what brings its rows to the model's width, and what is added and normalised behind it.

    x = table[id]                                 [E]
    x = A x, or  B GELU(A x + a) + b              to the model's width, where a table of another width or an MLP asks
    x = x / rms(x)                                `embedding_norm: true`
    x = scale x                                   Gemma multiplies by sqrt(D) (Gemma Team 2024, arXiv 2403.08295)

and, once positions and time are added (`close`):

    x = x + types[kind of sentence]               BERT (Devlin et al. 2019, arXiv 1810.04805)
    x = N(x)                                      `embedding_norm: learned`: BERT, ModernBERT (arXiv 2412.13663)

Narrow tables: Lan et al. 2020 (ALBERT, arXiv 1909.11942). Shape letters: V vocabulary, E width of the table, D of the
model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.kernels.embedding import look_up
from stackwise.model.linear import Linear
from stackwise.model.registry import NORM_LAYERS
from stackwise.model.spec import RackSpec


class WidthMLP(nn.Module):
    """Linear, GELU, Linear: [..., E] -> [..., D]."""

    def __init__(self, width: int, hidden: int, d_model: int) -> None:
        super().__init__()
        self.inner = Linear(width, hidden)
        self.outer = Linear(hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(F.gelu(self.inner(x)))
        return out


class Embedding(nn.Embedding):
    """Integer ids of any shape -> token vectors [..., D]; `weight` is the table [V, E]. Without values."""

    def __init__(self, spec: RackSpec) -> None:
        # Without torch's own random start: `init_weights` gives one, and on the meta device the other would import
        # the compiler, which takes a second.
        super().__init__(
            spec.vocab_size, spec.table_width, _weight=torch.empty(spec.vocab_size, spec.table_width)
        )
        width, d_model = spec.table_width, spec.d_model
        self.adapter: nn.Module | None = None
        if spec.adapter_hidden:
            self.adapter = WidthMLP(width, spec.adapter_hidden, d_model)
        elif width != d_model:
            self.adapter = Linear(width, d_model, bias=False)
        self.unit = spec.embedding_norm is True
        self.eps, self.scale = spec.norm_eps, spec.embedding_scale
        self.types = nn.Parameter(torch.empty(spec.token_types, d_model)) if spec.token_types else None
        learned = spec.embedding_norm == "learned"
        self.norm = NORM_LAYERS.get(spec.norm)(d_model, spec.norm_eps, spec.has_bias) if learned else None

    def forward(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`dtype` of the result; null is the table's."""
        narrow = dtype is not None and self.weight.dtype != dtype
        x = look_up(ids, self.weight, dtype) if narrow and dtype is not None else super().forward(ids)
        if self.adapter is not None:
            x = self.adapter(x).to(x.dtype)  # autocast makes it narrower; the residual stream is not
        if self.unit:
            x = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        return x if self.scale == 1.0 else x * self.scale

    def close(self, x_BTD: Tensor, token_types: Tensor | None) -> Tensor:
        """What comes behind the sum with positions. token_types int64 [B, T]; null: all are of the first kind."""
        if self.types is not None:
            x_BTD = x_BTD + (self.types[0] if token_types is None else F.embedding(token_types, self.types))
        return x_BTD if self.norm is None else self.norm(x_BTD).to(x_BTD.dtype)
