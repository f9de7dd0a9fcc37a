"""Heads for tasks: one vector or number per row of tokens, or per token, from a rack's hidden states.

    SequenceClassifier   logits [B, C] = W pool(h) + b
    PairClassifier       the same of two sentences, told apart by token types (Devlin et al. 2019, arXiv 1810.04805)
    SequenceRegressor    numbers [B]
    TokenClassifier      logits [B, T, C] = W h + b
    ValueHead            numbers [B, T], such as the expected reward from a token on

h [B, T, D] is what the language model's head would read. Shape letters: B rows, T tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.config.errors import did_you_mean
from stackwise.model.init import keyed_generator
from stackwise.model.linear import Linear
from stackwise.model.names import PlainNames
from stackwise.model.rack import Rack

IGNORE = -100
"""Label of a token that is not scored."""
POOLINGS = ("mean", "cls", "last")


def pool(hidden_BTD: Tensor, mask_BT: Tensor | None = None, how: str = "mean") -> Tensor:
    """One vector per row, [B, D]: the mean over its tokens, its first token (cls) or its last; padding never counts.

    mask bool or 0/1 [B, T], 0 = padding on either side; null: there is none. A row of padding alone is a ValueError.
    """
    _check_pooling(how)
    if mask_BT is None:
        mask_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.bool, device=hidden_BTD.device)
    mask_BT = mask_BT.bool()
    if not bool(mask_BT.any(1).all()):
        empty = (~mask_BT.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"there is nothing to pool: rows {empty} are all padding")
    if how == "mean":
        shares = mask_BT / mask_BT.sum(1, keepdim=True)
        # not a product: what is not a number at padding would stay one
        kept = hidden_BTD.masked_fill(~mask_BT.unsqueeze(-1), 0.0)
        return torch.einsum("btd,bt->bd", kept, shares.to(kept.dtype))
    at = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand_as(mask_BT)
    at = (
        at.masked_fill(~mask_BT, mask_BT.shape[1]).amin(1)
        if how == "cls"
        else at.masked_fill(~mask_BT, -1).amax(1)
    )
    return hidden_BTD[torch.arange(len(at), device=at.device), at]


def _check_pooling(how: str) -> None:
    if how not in POOLINGS:
        close = did_you_mean(how, POOLINGS)
        raise ValueError(
            f"pooling must be {', '.join(POOLINGS)}, got {how!r}" + (f"; {close}" if close else "")
        )


class _OnRack(PlainNames):
    """A rack and a linear layer on what its head would read. The layer starts near zero, from `seed`."""

    def __init__(self, rack: Rack, outputs: int, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        width = rack.spec.d_model
        self.rack = rack
        self.reader: Callable[[Tensor, Tensor | None, Tensor | None], Tensor] | None = None
        """(ids, mask, positions) -> [B, T, D] in place of the rack's own way, for racks that need to be told more."""
        self.dropout = nn.Dropout(dropout)
        self.out = Linear(width, outputs, device=rack.device, dtype=rack.dtype)
        with torch.no_grad():
            self.out.bias.zero_()
            start = torch.empty(outputs, width)
            self.out.weight.copy_(
                start.normal_(0.0, 0.02 * (768 / width) ** 0.5, generator=keyed_generator(seed, "task head"))
            )

    def hidden(
        self, input_ids: Tensor, mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """[B, T, D]. Padding takes no position, so a row reads alike wherever it is padded."""
        positions = None
        if mask is not None:
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        if self.reader is not None:
            return self.reader(input_ids, mask, positions)
        return self.rack.forward_features(
            input_ids, mask, position_ids=positions, token_type_ids=token_type_ids
        )

    def get_parameter_count(self) -> int:
        """Parameters, each tensor once."""
        return sum(p.numel() for p in self.parameters())


class _Pooled(_OnRack):
    """The layer reads one vector per row."""

    def __init__(self, rack: Rack, outputs: int, pooling: str, dropout: float, seed: int) -> None:
        super().__init__(rack, outputs, dropout, seed)
        _check_pooling(pooling)
        self.pooling = pooling

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        pooled = pool(self.hidden(input_ids, attention_mask, token_type_ids), attention_mask, self.pooling)
        outputs: Tensor = self.out(self.dropout(pooled))
        return outputs


class SequenceClassifier(_Pooled):
    """ids [B, T] -> logits [B, C], from the pooled hidden states. `pooling`: mean, cls or last."""

    def __init__(
        self, rack: Rack, n_classes: int, *, pooling: str = "mean", dropout: float = 0.0, seed: int = 0
    ) -> None:
        """n_classes < 2, an unknown pooling, a dropout outside [0, 1): ValueError."""
        if n_classes < 2:
            raise ValueError(
                f"n_classes must be at least 2, got {n_classes}; for numbers take SequenceRegressor"
            )
        super().__init__(rack, n_classes, pooling, dropout, seed)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats; labels int64 [B]."""
        return F.cross_entropy(logits.float(), labels)


class PairClassifier(SequenceClassifier):
    """The class of two sentences in one row. The rack must have token types for both (ValueError)."""

    def __init__(
        self, rack: Rack, n_classes: int, *, pooling: str = "mean", dropout: float = 0.0, seed: int = 0
    ) -> None:
        if rack.spec.token_types < 2:
            raise ValueError(
                f"sentences of a pair are told apart by two token types, and the rack has {rack.spec.token_types}: "
                "build it with model.token_types=2, or join the pair in one text for SequenceClassifier"
            )
        super().__init__(rack, n_classes, pooling=pooling, dropout=dropout, seed=seed)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        if token_type_ids is None:
            raise ValueError("a pair needs token_type_ids [B, T]: 0 in the first sentence, 1 in the second")
        return super().forward(input_ids, attention_mask, token_type_ids=token_type_ids)


class SequenceRegressor(_Pooled):
    """ids [B, T] -> numbers [B], from the pooled hidden states. Wrong values are ValueErrors as of `SequenceClassifier`."""

    def __init__(self, rack: Rack, *, pooling: str = "mean", dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__(rack, 1, pooling, dropout, seed)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        return super().forward(input_ids, attention_mask, token_type_ids=token_type_ids).squeeze(-1)

    def loss(self, numbers: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error; targets [B]."""
        return F.mse_loss(numbers.float(), targets.float())


class TokenClassifier(_OnRack):
    """ids [B, T] -> logits [B, T, C]."""

    def __init__(self, rack: Rack, n_classes: int, *, dropout: float = 0.0, seed: int = 0) -> None:
        if n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, got {n_classes}; for numbers take ValueHead")
        super().__init__(rack, n_classes, dropout, seed)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        logits: Tensor = self.out(self.dropout(self.hidden(input_ids, attention_mask, token_type_ids)))
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats over labels int64 [B, T] that are not -100; none at all is a ValueError."""
        if not bool((labels != IGNORE).any()):
            raise ValueError("no token has a label: all are -100")
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


class ValueHead(_OnRack):
    """ids [B, T] -> numbers [B, T]."""

    def __init__(self, rack: Rack, *, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__(rack, 1, dropout, seed)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        values: Tensor = self.out(self.dropout(self.hidden(input_ids, attention_mask))).squeeze(-1)
        return values

    def loss(self, values: Tensor, targets: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean squared error over tokens that are not padding; targets [B, T]."""
        errors = (values.float() - targets.float()).square()
        return errors.mean() if attention_mask is None else errors[attention_mask.bool()].mean()


class Rows(NamedTuple):
    """Rows of unequal length, padded on the right: int64 [B, T], bool [B, T], int64 [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor


def padded(
    rows: Sequence[Sequence[int]], seconds: Sequence[Sequence[int]] | None = None, *, pad_id: int = 0
) -> Rows:
    """Rows of ids, or pairs of them, side by side. An empty row, or unequal numbers of rows: ValueError."""
    if seconds is not None and len(seconds) != len(rows):
        raise ValueError(f"there are {len(rows)} first sentences and {len(seconds)} second ones")
    pairs = [(list(a), [] if seconds is None else list(seconds[i])) for i, a in enumerate(rows)]
    lengths = [len(a) + len(b) for a, b in pairs]
    if not lengths or min(lengths) == 0:
        raise ValueError("every row needs a token")
    shape = (len(pairs), max(lengths))
    ids, types = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
    for i, (a, b) in enumerate(pairs):
        ids[i, : lengths[i]] = torch.tensor(a + b)
        types[i, len(a) : lengths[i]] = 1
    mask = torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]
    return Rows(ids, mask, types)
