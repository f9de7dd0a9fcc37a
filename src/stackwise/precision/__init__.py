"""Compute dtypes and frozen weight formats."""
