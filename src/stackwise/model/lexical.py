"""Pretrained embedding tables as layers, and how much tokens are alike by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.model.describe import table_of
from stackwise.model.init import Start, init_weights
from stackwise.model.own_io import Head, InOut
from stackwise.model.pretrained import Table, find_table
from stackwise.model.spec import RackSpec

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig
    from stackwise.model.embedding import Embedding
    from stackwise.model.rack import Rack


@torch.no_grad()
def take_table(ends: Rack | InOut, table: Table) -> None:
    """Fill the embedding with a pretrained table; tokens that it lacks start at the mean of its rows."""
    embedding, values = ends.embedding, table.read()
    embedding.weight[: table.rows] = values.to(embedding.weight)
    new = embedding.weight[table.rows :] if embedding.extra is None else embedding.extra
    if len(new):
        new.copy_(values.double().mean(0).to(new).expand_as(new))


def take_table_of(config: StackWiseConfig, rack: Rack) -> None:
    """Fill a new rack's embedding as its configuration says; nothing where the table is fresh."""
    if (table := table_of(config)) is not None:
        take_table(rack, table)


class LexicalKernelManager(nn.Module):
    """The table of a pretrained family as an embedding layer: ids -> [..., target_model_dim], and a head tied to it.

    `family` and `embedding_option` as in `model.tokenizer_embedding`; `target_model_dim` null is the table's width.
    Where the widths differ, or with `adapter_hidden_dim`, an adapter stands in between; it trains, and so does the
    table unless `freeze_embeddings`. ConfigError for a family that is not found.
    """

    def __init__(
        self,
        family: str,
        embedding_option: str = "embed_tokens",
        freeze_embeddings: bool = True,
        target_model_dim: int | None = None,
        adapter_hidden_dim: int | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        table = find_table(family, embedding_option)
        if target_model_dim is not None and target_model_dim < 1:
            raise ValueError(f"target_model_dim must be at least 1, got {target_model_dim}")
        spec = RackSpec(
            table.rows,
            target_model_dim or table.width,
            (),
            tied=True,
            embedding_width=table.width,
            adapter_hidden=adapter_hidden_dim or 0,
            frozen_rows=table.rows if freeze_embeddings else 0,
            final_norm=False,
        )
        self.family, self.vocab_size, self.embedding_dim = family, table.rows, table.width
        self.ends = InOut(spec)
        init_weights(self.ends, Start.of(spec, seed))
        take_table(self.ends, table)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 of any shape -> [..., target_model_dim]."""
        out: Tensor = self.ends.embedding(ids)
        return out

    def get_embeddings(self) -> Embedding:
        """The embedding layer: table and adapter."""
        return self.ends.embedding

    def get_lm_head(self) -> Head:
        """hidden [..., target_model_dim] -> logits [..., V], by the same table."""
        return self.ends.head

    def tie_weight(self) -> Tensor:
        """The table [V, E] that a head is tied to."""
        return self.ends.embedding.matrix

    def lexical_kernel(self, ids: Tensor) -> Tensor:
        """Cosine of the angles between the tokens' rows of the table: ids int64 [B, T] -> [B, T, T]."""
        rows = F.normalize(self.ends.embedding.rows(ids), dim=-1)
        return rows @ rows.transpose(-1, -2)
