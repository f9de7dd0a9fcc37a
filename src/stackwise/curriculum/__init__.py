"""Stages, splits, the curricula and the progressive builder."""
