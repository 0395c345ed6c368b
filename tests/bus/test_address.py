from __future__ import annotations

import pytest

from bus import Address, AddressError, parse_address


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


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("inproc://a", True),
        ("ipc:///a", True),
        ("tcp://localhost:1", True),
        ("tcp://127.1.2.3:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://0.0.0.0:1", False),
        ("tcp://*:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tcp://gpu-7:1", False),
    ],
)
def test_knows_loopback(text: str, loopback: bool) -> None:
    assert parse_address(text).loopback is loopback
