"""Parts of topology files that several tests use."""

from __future__ import annotations

MODEL = '[model]\npath = "."\n'
WHOLE = '[[models]]\nname = "{0}"\npath = "{0}"\n[[models.roles]]\nkind = "monolithic"\n'
LORA = '[[model.lora]]\nname = "ink"\npath = "ink.safetensors"\n'
HOST_A = '[[hosts]]\nname = "a"\naddress = "10.0.0.1"\n'
HOST_B = '[[hosts]]\nname = "b"\naddress = "10.0.0.2"\n'
ON_HOSTS = """
[[roles]]
kind = "encoder"
host = "a"
[[roles]]
kind = "denoiser"
hosts = ["b", "a"]
count = 2
[[roles]]
kind = "decoder"
host = "b"
"""
TRUSTED = "[transfer]\ntrusted_network = true\n"
MOONCAKE = '[transfer]\nengine = "mooncake"\ntrusted_network = true\n'
