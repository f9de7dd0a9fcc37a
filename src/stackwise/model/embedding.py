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

from typing import Any

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
    """Integer ids of any shape -> token vectors [..., D]. Without values.

    `weight` is the table [V, E]. With `frozen_rows` it holds these alone and never trains; `extra` holds the others,
    which do: tokens that a pretrained table lacks.
    """

    def __init__(self, spec: RackSpec) -> None:
        # Without torch's own random start: `init_weights` gives one, and on the meta device the other would import
        # the compiler, which takes a second.
        width, d_model, rows = spec.table_width, spec.d_model, spec.frozen_rows or spec.vocab_size
        super().__init__(rows, width, _weight=torch.empty(rows, width))
        self.frozen = bool(spec.frozen_rows)
        self.extra = (
            nn.Parameter(torch.empty(spec.vocab_size - rows, width)) if rows < spec.vocab_size else None
        )
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

        self.requires_grad_(True)

    @property
    def matrix(self) -> Tensor:
        """The whole table [V, E]."""
        return self.weight if self.extra is None else torch.cat((self.weight, self.extra))

    def requires_grad_(self, requires_grad: bool = True) -> Embedding:
        """Thaw or freeze; frozen rows stay frozen."""
        super().requires_grad_(requires_grad)
        if self.frozen:
            self.weight.requires_grad_(False)
        return self

    def rows(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Rows of the table, [..., E]."""
        known = ids if self.extra is None else ids.clamp_max(len(self.weight) - 1)
        narrow = dtype is not None and self.weight.dtype != dtype
        x = look_up(known, self.weight, dtype) if narrow and dtype is not None else super().forward(known)
        if self.extra is None:
            return x
        new = F.embedding((ids - len(self.weight)).clamp_min(0), self.extra).to(x.dtype)
        return torch.where((ids >= len(self.weight)).unsqueeze(-1), new, x)

    def forward(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`dtype` of the result; null is the table's."""
        x = self.rows(ids, dtype)
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


class OwnEmbedding(nn.Module):
    """A user's module in the embedding's place: ids [B, T] -> [B, T, D].

    It has `vocab_size`, `embedding_dim` E and `tie_weight()`, the table [V, E] that a head can be tied to, or null.
    """

    adapter = types = norm = None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        missing = [n for n in ("vocab_size", "embedding_dim", "tie_weight") if not hasattr(module, n)]
        if missing:
            raise TypeError(
                f"an embedding layer is an nn.Embedding or has vocab_size, embedding_dim and tie_weight(); "
                f"{type(module).__name__} lacks {', '.join(missing)}"
            )
        self.module = module

    @property
    def matrix(self) -> Tensor:
        """The table that a head is tied to. ValueError where there is none of [vocab_size, embedding_dim]."""
        module: Any = self.module
        table: Tensor | None = module.tie_weight()
        wanted = [module.vocab_size, module.embedding_dim]
        if table is None or list(table.shape) != wanted:
            shape = "nothing" if table is None else str(list(table.shape))
            raise ValueError(
                f"the head cannot be tied: tie_weight() of {type(module).__name__} gives {shape}, not {wanted}; "
                "set tie_embeddings=False"
            )
        return table

    @property
    def weight(self) -> Tensor:
        """A parameter that tells device and dtype."""
        return next(self.module.parameters())

    def forward(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        x: Tensor = self.module(ids)
        return x if dtype is None else x.to(dtype)

    def close(self, x_BTD: Tensor, token_types: Tensor | None) -> Tensor:
        """Nothing comes behind it."""
        return x_BTD
