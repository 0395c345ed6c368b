"""Memory of the host and of devices.

`arena` maps the memory of a pool, `buddy` and `leases` decide who may use which bytes of it, `streams` moves payloads
between it and a device, `host_memory_pool` reuses memory of the host.
"""
