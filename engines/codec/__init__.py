"""Payloads between stages as a manifest and bytes: `codec` packs and unpacks, `manifest` and `checksum` check.

Nothing is unpickled. A manifest is not trusted: the worst that hostile bytes can do is to raise `CodecError`.
"""
