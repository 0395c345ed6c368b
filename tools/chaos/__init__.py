"""Chaos test: inject faults into a cluster under load, and check its invariants."""
