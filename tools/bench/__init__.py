"""Benchmarks: `python -m triptych.tools.bench`."""
