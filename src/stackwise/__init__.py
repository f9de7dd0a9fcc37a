"""StackWise trains transformer language models stack by stack."""
