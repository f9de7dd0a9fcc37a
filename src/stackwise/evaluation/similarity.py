"""How alike the representations of one and the same tokens are: linear CKA and cosine. Shape letters: P points, D width.

    CKA(X, Y) = |Yc^T Xc|^2 / (|Xc^T Xc| |Yc^T Yc|)       Frobenius norms, columns centred over all tokens
                                                          (Kornblith et al. 2019, arXiv 1905.00414)
    cosine(X, Y) = mean over tokens of x . y / (|x| |y|)  not centred

Both are in float64 from sums over tokens, [P D, P D] and [P, P], so no token is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = 11585
"""P times D at most: the sums then take 1 GiB."""

Matrix = list[list[float | None]]


class Similarity:
    """Sums over tokens of `points` representations of width `width`, and the matrices that they make.

    Where P D is above `largest`, CKA looks at as many fixed orthonormal random directions of the width as fit,
    `directions` of them, and is an estimate; otherwise it is exact and `directions` is the width.
    """

    def __init__(self, points: int, width: int, device: torch.device, *, largest: int = LARGEST) -> None:
        self.points, self.width = points, width
        self.directions = min(width, max(1, largest // points))
        # Apple's GPUs have no float64.
        self.device = torch.device("cpu") if device.type == "mps" else device
        size = points * self.directions
        self._products = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        self._sum = torch.zeros(size, dtype=torch.float64, device=self.device)
        self._cosines = torch.zeros(points, points, dtype=torch.float64, device=self.device)
        self.tokens = 0
        self._onto: Tensor | None = None
        if self.directions < width:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(width, self.directions, dtype=torch.float64, generator=generator)
            self._onto = torch.linalg.qr(drawn)[0].to(self.device)

    def add(self, states: Sequence[Tensor]) -> None:
        """The states [n, D] of the next n tokens at every point."""
        x_PnD = torch.stack([state.to(self.device).double() for state in states])
        unit = (x_PnD / x_PnD.norm(dim=-1, keepdim=True).clamp_min(1e-300)).flatten(1)
        self._cosines += unit @ unit.t()
        if self._onto is not None:
            x_PnD = x_PnD @ self._onto
        rows = x_PnD.transpose(0, 1).flatten(1)
        self._products += rows.t() @ rows
        self._sum += rows.sum(0)
        self.tokens += len(rows)

    def cka(self) -> Matrix:
        """[P, P], 1 on the diagonal; null beside a point that says the same about every token."""
        mean = self._sum / max(1, self.tokens)
        centred = self._products - self.tokens * torch.outer(mean, mean)
        shared = centred.view(self.points, self.directions, self.points, self.directions).square().sum((1, 3))
        own = shared.diagonal().sqrt()
        scale = self._products.view(self.points, self.directions, self.points, self.directions)
        # What centring leaves of a constant is rounding.
        size = torch.stack([scale[p, :, p].square().sum().sqrt() for p in range(self.points)])
        constant = own <= 1e-12 * size
        return _listed(shared / torch.outer(own, own), constant)

    def cosine(self) -> Matrix:
        """[P, P]; null beside a point that is zero at every token."""
        cosines = self._cosines / max(1, self.tokens)
        return _listed(cosines, cosines.diagonal() == 0)


def _listed(matrix: Tensor, unknown: Tensor) -> Matrix:
    """As lists, null in the rows and columns that are not known; no more than 1 by rounding."""
    known = (~unknown).tolist()
    return [
        [min(1.0, value) if known[i] and known[j] else None for j, value in enumerate(row)]
        for i, row in enumerate(matrix.tolist())
    ]
