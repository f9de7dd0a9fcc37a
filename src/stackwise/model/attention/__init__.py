"""Attention: projections by kind (mha, mla), and what they share (core)."""

from stackwise.model.attention import mha as mha
from stackwise.model.attention import mla as mla
