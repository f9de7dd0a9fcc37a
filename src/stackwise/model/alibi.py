"""Attention with linear biases: distance makes a key less likely, and positions have no other part (without torch).

    score of head h for tokens i, j:   q k / sqrt(H) - m_h |i - j|        (Press et al. 2022, arXiv 2108.12409)

For N heads, a power of two, m_h = 2^(-8 h / N), h = 1 .. N. Other counts take the slopes of the power of two below and
fill up with every other slope of the one above. Causal attention has j <= i; looking both ways, distance is symmetric.
Nothing depends on a trained length.
"""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=64)
def slopes(n_heads: int) -> tuple[float, ...]:
    """m_h of every head."""
    power = 1 << (n_heads.bit_length() - 1)
    own = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-8.0 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return tuple(own + between[: n_heads - power])
