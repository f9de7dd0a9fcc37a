"""How well a rack predicts held-out text: perplexity and bits per byte, exactly."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stackwise.data.corpus import TokenSplit
from stackwise.data.loader import EvalLoader
from stackwise.evaluation.windows import Progress, check_windows, unseen, watched
from stackwise.model.rack import Rack
from stackwise.training.validate import bits_per_byte, validate


@dataclass(frozen=True)
class Perplexity:
    """The loss of a rack on a split.

    `nats_per_token` is the mean negative log likelihood over `tokens` targets, each counted once. `bits_per_byte`
    is that loss over the whole split, per byte of its text; it compares models with different tokenizers, and is
    null where the split does not know its bytes. `label` says what the figure is: an exact likelihood.
    """

    nats_per_token: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    windows: int
    seq_len: int
    stride: int | None = None
    label: str = "exact"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def perplexity(
    rack: Rack,
    split: TokenSplit,
    *,
    seq_len: int,
    batch_size: int = 8,
    batches: int | None = None,
    stride: int | None = None,
    packing: bool = True,
    doc_mask: bool = True,
    pad_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    rows_per_chunk: int | None = None,
    progress: Progress = unseen,
) -> Perplexity:
    """Evaluate a causal rack over the windows of a split, in order.

    Every window of `seq_len` tokens is predicted from nothing but its own beginning. Without `stride` windows do not
    overlap, and a rest that fills none is left out, as in training. With it they begin every `stride` tokens, each
    token is a target once, and all but the first of a document have `seq_len - stride` tokens before them, or as many
    as the document has: the smaller the stride, the nearer to the model's best, and the dearer, by seq_len / stride.
    `packing`, `doc_mask` and `pad_id` are those of the training data. The mean is weighted by tokens and summed in float64: in float32 it does
    not depend on `batch_size` (up to 1e-6), and the same call gives the same figure. `batches` limits the work to
    `batches * batch_size` windows spread over the split; null is all of it. `progress` hears of every batch.

    ValueErrors: a rack that is not causal, windows longer than its `max_seq_len`, a stride longer than a window. DataErrors:
    token ids that it does not know, a split that fills no window.
    """
    if not rack.is_causal:
        raise ValueError("perplexity needs a causal rack, and this one attends in both directions")
    check_windows(rack, split, seq_len)
    windows = EvalLoader(
        split,
        seq_len=seq_len,
        batch_size=batch_size,
        batches=batches,
        stride=stride,
        packing=packing,
        doc_mask=doc_mask,
        pad_id=pad_id,
    )
    nll, tokens = validate(rack, watched(windows, progress), dtype=dtype, rows_per_chunk=rows_per_chunk)
    mean = nll / tokens
    return Perplexity(
        nats_per_token=mean,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=bits_per_byte(mean, split.n_tokens, split.n_bytes),
        tokens=tokens,
        windows=windows.rows,
        seq_len=seq_len,
        stride=stride,
    )
