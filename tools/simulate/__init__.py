"""Simulations: scheduling policies on a trace, and the head with any number of instances."""
