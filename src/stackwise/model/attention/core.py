"""From queries, keys and values to what a token takes from those it sees; shared by all kinds of projections.

Shape letters: B batch, T new tokens, S seen tokens, N heads, H head width.
"""

from __future__ import annotations

from torch import Tensor

from stackwise.kernels.attention import attention
from stackwise.model.visibility import Mask


def attend(q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, mask: Mask, dropout: float) -> Tensor:
    """softmax(q k / sqrt(H)) v over the visible keys; rows that see none give 0. -> [B, N, T, H]."""
    out = attention(q_BNTH, k_BNSH, v_BNSH, visible=mask.visible, causal=mask.is_causal, dropout=dropout)
    return out if mask.dead is None else out.masked_fill(mask.dead, 0.0)
