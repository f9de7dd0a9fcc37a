"""Faults made on purpose, one module per kind. `benchmarks/faults.py` runs them long, tests/faults runs them short."""
