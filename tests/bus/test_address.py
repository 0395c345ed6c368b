from __future__ import annotations

import pytest

from triptych.bus import Address, AddressError, parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inproc://denoiser-0.transfer", Address("inproc", "denoiser-0.transfer")),
        ("ipc:///run/triptych/head", Address("ipc", "/run/triptych/head")),
        ("tcp://127.0.0.1:5555", Address("tcp", "127.0.0.1", 5555)),
        ("tcp://[::1]:5555", Address("tcp", "::1", 5555)),
        ("tcp://gpu-7.example:65535", Address("tcp", "gpu-7.example", 65535)),
        ("ipc:///" + "x" * 106, Address("ipc", "/" + "x" * 106)),
    ],
)
def test_parses(text: str, expected: Address) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "head",
        "ipc://",
        "ipc://relative/path",
        "ipc:///run/",
        "ipc:///nul\0byte",
        "ipc:///" + "x" * 107,
        "ipc:///" + "é" * 54,
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65536",
        "tcp://:5555",
        "tcp://a b:5555",
        "udp://127.0.0.1:5555",
        "inproc://",
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(AddressError):
        parse_address(text)
