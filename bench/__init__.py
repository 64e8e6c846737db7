"""Benchmarks of zokernels: ``python -m bench.step`` and friends, run from the repository root."""
