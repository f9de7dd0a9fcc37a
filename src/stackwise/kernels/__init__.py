"""Fused operations: each a plain PyTorch reference beside a faster form, chosen by one dispatcher."""
