"""From queries, keys and values to what a token takes from those it sees; shared by all kinds of projections.

Shape letters: B batch, T new tokens, S seen tokens, N heads, H head width.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from stackwise.kernels.attention import attention
from stackwise.model.visibility import Mask


def attend(
    q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, mask: Mask, dropout: float, softcap: float | None = None
) -> Tensor:
    """softmax(q k / sqrt(H)) v over the visible keys; rows that see none give 0. -> [B, N, T, H].

    The mask's bias is added to the scores; `softcap` c makes the products c tanh(q k / (c sqrt(H))).
    """
    out = attention(
        q_BNTH,
        k_BNSH,
        v_BNSH,
        visible=mask.visible,
        causal=mask.is_causal,
        dropout=dropout,
        bias=mask.bias,
        softcap=softcap,
    )
    return out if mask.dead is None else out.masked_fill(mask.dead, 0.0)


def attend_widths(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSV: Tensor,
    mask: Mask,
    dropout: float,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """`attend` with a factor of its own on the products and values of a width of their own. -> [B, N, T, V].

    Zeros fill up the narrower ones: kernels that never hold all scores want one width.
    """
    width, value = q_BNTH.shape[-1], v_BNSV.shape[-1]
    wide = max(width, value)
    q_BNTH = q_BNTH * (scale * math.sqrt(wide))
    if width < wide:
        q_BNTH, k_BNSH = F.pad(q_BNTH, (0, wide - width)), F.pad(k_BNSH, (0, wide - width))
    if value < wide:
        v_BNSV = F.pad(v_BNSV, (0, wide - value))
    return attend(q_BNTH, k_BNSH, v_BNSV, mask, dropout, softcap)[..., :value]
