"""Masked diffusion with absorbing noise in the SUBS parameterisation (Sahoo et al. 2024, arXiv 2406.07524).

    NELBO per token = 1/T E_t [ r'(t)/r(t) sum over masked i of -log p(x_i | z_t) ]                       (t form)
                    = 1/T sum over n = 1..T of E over masks of n [ mean over masked i of -log p(x_i | z) ]  (count form)

The second is the first, integrated over t (Ou et al. 2024, arXiv 2406.03736). The mask token has probability 0, and
visible tokens are copied, so they cost nothing. T counts the tokens that may be masked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from stackwise.objectives import bits, masking
from stackwise.objectives.base import Noise
from stackwise.objectives.masked import Keys, Masked, counts_over, over


@dataclass
class Diffusion(Masked):
    """The objective `diffusion`. Divided by all tokens that may be masked, so that the loss is nats per token.

    Padding and special tokens are never masked, scored or counted by the divisor; special ones are seen, padding is not.

    Over a range of noise the loss is that of the range alone: the mean over its shares. `form`, `weighting`, `clip` and
    `t_eps` are keys of `objective`.
    """

    form: str = "count"
    weighting: str = "nelbo"
    clip: Noise = (0.3, 0.8)
    t_eps: float = 1e-3
    name: str = "diffusion"

    @property
    def banned(self) -> int | None:
        """The mask token."""
        return self.vocabulary.mask_id

    def for_evaluation(self) -> Self:
        """The bound in its count form, whatever is trained with."""
        return replace(super().for_evaluation(), form="count", weighting="nelbo")

    def _masks(
        self, keys: Keys, eligible: Tensor, u: Tensor, noise: Noise | None, counts: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        noise = noise or (self.clip if self.weighting == "clipped" else None)
        present = eligible.sum(1)
        if self.form == "t" and counts is None:
            t, span = self._times(u, noise)
            uniforms = bits.uniforms(self.seed, keys.ids, keys.draws, eligible.shape[1], "masks")
            masks = masking.below(uniforms, eligible, self.schedule.rate(t))
            weights = self.schedule.weight(t) * span
        else:
            shares = over(noise, u) if counts is None else counts / present.clamp_min(1)
            counts = counts_over(noise, u, present) if counts is None else counts
            t = self._time_of(shares)
            masks = self._choose(keys, eligible, counts)
            weights = present / masks.sum(1).clamp_min(1)
        extra: dict[str, Tensor] = {}
        if self.weighting != "uniform":
            extra = {"weights": weights.float(), "totals": present.float()}
        if self.tells_time:
            extra["time"] = t.float()
        if self.corruption == "gaussian":
            extra["rates"] = self.schedule.rate(t).float()
        return masks, extra

    def _times(self, u: Tensor, noise: Noise | None) -> tuple[Tensor, float]:
        """Times whose shares of noise fill a range, and what turns their integral into the mean over its shares."""
        low, high = noise or (0.0, 1.0)
        first, last = (float(self.schedule.inverse(1 - share)) for share in (low, high))
        if low == high:
            t = torch.full_like(u, last)
            return t, 1 / (high * float(self.schedule.weight(last)))
        return (first + (last - first) * u).clamp_min(self.t_eps), (last - first) / (high - low)
