"""Heads for pairs that read each sentence by itself and compare what they found.

    TwinClassifier   logits [B, C]
    TwinRegressor    numbers [B]

A rack needs neither token types nor sight of both sentences at once, so causal racks do as well as encoders. With the
token vectors h of both sentences and u, v their means, a linear layer reads

    |u - v|, u * v                        Conneau et al. 2017 (InferSent, arXiv 1705.02364)
    cos(u, v)
    mean over tokens of a sentence of the largest cosine with a token of the other one, both ways
                                          Zhang et al. 2020 (BERTScore, arXiv 1904.09675)

the last three of the hidden states and once more of the embedding's vectors. Means are weighted by softplus(w h), learned
from equal weights on. Shape letters: B pairs, T tokens, D width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.model.heads import _OnRack
from stackwise.model.init import keyed_generator
from stackwise.model.linear import Linear
from stackwise.model.rack import Rack

LEVELS = 2
"""Where similarities are taken: what the embedding gives, and what the head would read."""
SIMILARITIES = 3 * LEVELS


def similarities(a_BSD: Tensor, a_BS: Tensor, b_BTD: Tensor, b_BT: Tensor) -> Tensor:
    """[B, 3]: cosine of the weighted means; share of the first sentence found in the second, and of the second in the first.

    a_BS, b_BT: weights of the tokens, 0 for padding.
    """
    a_BSD, b_BTD = F.normalize(a_BSD, dim=-1), F.normalize(b_BTD, dim=-1)
    a_BS, b_BT = a_BS / a_BS.sum(1, keepdim=True), b_BT / b_BT.sum(1, keepdim=True)
    whole_B = F.cosine_similarity(
        torch.einsum("bsd,bs->bd", a_BSD, a_BS), torch.einsum("btd,bt->bd", b_BTD, b_BT)
    )
    cosines_BST = a_BSD @ b_BTD.mT
    a_found = cosines_BST.masked_fill(b_BT[:, None] == 0, -1.0).amax(2)
    b_found = cosines_BST.masked_fill(a_BS[:, :, None] == 0, -1.0).amax(1)
    return torch.stack((whole_B, (a_found * a_BS).sum(1), (b_found * b_BT).sum(1)), dim=1)


class Twin(_OnRack):
    """A linear layer on the comparison of two sentences."""

    def __init__(self, rack: Rack, outputs: int, dropout: float, seed: int) -> None:
        super().__init__(rack, outputs, dropout, seed)
        width = rack.spec.d_model
        self.out = Linear(2 * width + SIMILARITIES, outputs, device=rack.device, dtype=rack.dtype)
        self.weight_of = Linear(width, 1, device=rack.device, dtype=rack.dtype)
        self.mean = nn.Buffer(torch.zeros(SIMILARITIES, device=rack.device))
        self.scale = nn.Buffer(torch.ones(SIMILARITIES, device=rack.device))
        with torch.no_grad():
            for parameter in (self.out.bias, self.weight_of.bias, self.weight_of.weight):
                parameter.zero_()
            self.out.weight.normal_(0.0, 0.02, generator=keyed_generator(seed, "twin head"))

    def features(self, ids: Tensor, mask: Tensor, second_ids: Tensor, second_mask: Tensor) -> Tensor:
        """float [B, 2 D + 6]: what the linear layer reads."""
        length = max(ids.shape[1], second_ids.shape[1])
        rows = torch.cat([F.pad(part, (0, length - part.shape[1])) for part in (ids, second_ids)])
        real = torch.cat([F.pad(part.bool(), (0, length - part.shape[1])) for part in (mask, second_mask)])
        hidden = self.hidden(rows, real)
        weights = F.softplus(self.weight_of(hidden).squeeze(-1).float()) * real
        (a, b), (a_weights, b_weights) = hidden.float().chunk(2), weights.chunk(2)
        a_low, b_low = self.rack.look_up(rows).float().chunk(2)
        u, v = (
            torch.einsum("btd,bt->bd", h, w / w.sum(1, keepdim=True))
            for h, w in ((a, a_weights), (b, b_weights))
        )
        alike = torch.cat(
            (similarities(a_low, a_weights, b_low, b_weights), similarities(a, a_weights, b, b_weights)),
            dim=1,
        )
        return torch.cat(((u - v).abs(), u * v, (alike - self.mean) / self.scale), dim=1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, second_ids: Tensor, second_mask: Tensor
    ) -> Tensor:
        """ids [B, S] and [B, T] with masks, 0 = padding on the right."""
        features = self.features(input_ids, attention_mask, second_ids, second_mask)
        outputs: Tensor = self.out(self.dropout(features))
        return outputs

    @torch.no_grad()
    def measure(self, *inputs: Tensor) -> None:
        """Let the similarities of these rows have mean 0 and deviation 1 in what the linear layer reads."""
        self.mean.zero_()
        self.scale.fill_(1.0)
        alike = self.features(*inputs)[:, -SIMILARITIES:]
        self.mean.copy_(alike.mean(0))
        self.scale.copy_(alike.std(0, correction=0).clamp_min(1e-3))


class TwinClassifier(Twin):
    """The class of a pair."""

    def __init__(self, rack: Rack, n_classes: int, *, dropout: float = 0.0, seed: int = 0) -> None:
        """n_classes < 2, a dropout outside [0, 1): ValueError."""
        if n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, got {n_classes}; for numbers take TwinRegressor")
        super().__init__(rack, n_classes, dropout, seed)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats; labels int64 [B]."""
        return F.cross_entropy(logits.float(), labels)


class TwinRegressor(Twin):
    """The number of a pair."""

    def __init__(self, rack: Rack, *, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__(rack, 1, dropout, seed)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, second_ids: Tensor, second_mask: Tensor
    ) -> Tensor:
        return super().forward(input_ids, attention_mask, second_ids, second_mask).squeeze(-1)

    def loss(self, numbers: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error; targets [B]."""
        return F.mse_loss(numbers.float(), targets.float())
