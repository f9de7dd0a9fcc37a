"""Attention: projections by kind (mha), and what they share (core)."""

from stackwise.model.attention import mha as mha
