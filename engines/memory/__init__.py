"""Memory of the host and of devices: arenas, leases on blocks, streams."""
