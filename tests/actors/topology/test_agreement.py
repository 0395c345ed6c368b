"""What the head and an instance must have read alike, and what may differ between their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from triptych.actors import load_topology
from triptych.actors.topology import agreement

Write = Callable[..., Path]
HOSTS = """
[[hosts]]
name = "a"
address = "10.0.0.1"
[[hosts]]
name = "b"
address = "10.0.0.2"
"""
ROLES = """
[[roles]]
kind = "encoder"
host = "a"
[[roles]]
kind = "denoiser"
host = "b"
[[roles]]
kind = "decoder"
host = "a"
"""
FILE = """[model]
path = "."
dtype = "float32"
[[model.lora]]
name = "ink"
path = "ink.safetensors"
[head]
host = "a"
port = 5555
[transfer]
trusted_network = true
"""
SAME = {
    "a folder of its own": ('path = "."', 'path = "/models/flux"'),
    "an adapter elsewhere": ('"ink.safetensors"', '"/loras/ink.safetensors"'),
    "where it listens": ('address = "10.0.0.2"\n', 'address = "10.0.0.2"\nbind = "*"\n'),
    "the key of a host": ('address = "10.0.0.2"\n', f'address = "10.0.0.2"\npublic_key = "{"x" * 40}"\n'),
    "time limits": ("port = 5555", "port = 5555\nrequest_timeout_s = 60"),
    "what it takes at once": ('kind = "denoiser"', 'kind = "denoiser"\nslots = 8'),
    "more instances after it": ('kind = "decoder"', 'kind = "decoder"\ncount = 3'),
}
OTHER = {
    "the type of the computation": ('dtype = "float32"', 'dtype = "bfloat16"'),
    "the strength of an adapter": ('"ink.safetensors"', '"ink.safetensors"\nscale = 0.5'),
    "where the head is": ("port = 5555", "port = 5600"),
    "where its own mailbox is": ("10.0.0.2", "10.0.0.3"),
    "the format of its weights": ('kind = "denoiser"', 'kind = "denoiser"\nquantization = "int8"'),
    "its step cache": ('kind = "denoiser"', 'kind = "denoiser"\ncache = "first_block:0.1"'),
}


def digest(write: Write, old: str = "", new: str = "") -> str:
    text = FILE + HOSTS + ROLES
    assert old in text
    return agreement(load_topology(write("", roles=text.replace(old, new) if old else text, model="")), "denoiser-0")


@pytest.mark.parametrize("case", SAME)
def test_what_is_a_hosts_own_may_differ(write: Write, case: str) -> None:
    assert digest(write, *SAME[case]) == digest(write)


@pytest.mark.parametrize("case", OTHER)
def test_what_the_image_or_the_way_to_each_other_depends_on_may_not(write: Write, case: str) -> None:
    assert digest(write, *OTHER[case]) != digest(write)
