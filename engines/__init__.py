"""Tensors and devices: the pipeline split, the state codec, denoise stepping, buffers, transfer, streams.

Plain classes without sockets or actors. Importing this package imports no torch; its modules do.
"""

import logging

# Where torchao is installed, diffusers imports it, and it warns each time of extensions for other machines.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
