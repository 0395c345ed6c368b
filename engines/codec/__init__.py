"""Payloads between stages as a manifest and bytes, without pickle."""
