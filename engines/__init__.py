"""Tensors and devices: the pipeline split, the state codec, denoise stepping, buffers, transfer, streams.

Plain classes without sockets or actors. Importing this package imports no torch; its modules do.
"""
