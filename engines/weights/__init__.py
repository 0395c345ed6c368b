"""The weights of components: find their files, check and load them, and hold them on a device or the host.

`loading` loads components and stubs, `placement` says how their weights are held (`quantization`, `offload`,
`adapters`), `files` finds weight files and `inspection` checks them without loading.
"""
