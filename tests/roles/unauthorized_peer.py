"""Another user of the host at a component's port: reads a JSON object from stdin.

`{"address": "tcp://...", "frames": [base64, ...], "paths": [...]}`. It becomes uid 65534, sends every frame
without keys and with keys of its own, and prints what came of it, as JSON: the events of each connection, the answers,
and what kept it from reading each path.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
from pathlib import Path

import zmq

NOBODY = 65534
_SUCCEEDED = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
_FAILED = {
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "hung up on",
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): "no CURVE",
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): "unknown key",
}


def probe(address: str, frames: list[bytes], *, curve: bool) -> tuple[list[str], int]:
    """Return the events up to the one that is the end of it, and how many answers came."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        if curve:
            (socket.curve_publickey, socket.curve_secretkey), socket.curve_serverkey = (
                zmq.curve_keypair(),
                zmq.curve_keypair()[0],
            )
        events = socket.get_monitor_socket(_SUCCEEDED | sum(_FAILED))
        events.rcvtimeo = 20_000
        socket.connect(address)
        for frame in frames:
            socket.send(frame)
        seen: list[str] = []
        while seen.count("hung up on") < 3 and seen[-1:] != ["no CURVE"]:
            event, _ = struct.unpack("=Hi", events.recv_multipart()[0])
            seen.append(_FAILED.get(event, "let in"))
            if event == _SUCCEEDED:
                return seen, int(socket.poll(5_000) and len(socket.recv_multipart()))
        socket.disable_monitor()
        return seen, int(socket.poll(0))


def unreadable(path: str) -> str:
    """Return the name of the error with which a path cannot be read, "" if it can."""
    try:
        Path(path).read_bytes() if Path(path).is_file() else next(Path(path).iterdir())
    except OSError as error:
        return type(error).__name__
    return ""


if __name__ == "__main__":
    task = json.load(sys.stdin)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    sent = [base64.b64decode(frame) for frame in task["frames"]]
    found = {"curve" if curve else "plain": probe(task["address"], sent, curve=curve) for curve in (False, True)}
    print(json.dumps({**found, "unreadable": {path: unreadable(path) for path in task["paths"]}}))
