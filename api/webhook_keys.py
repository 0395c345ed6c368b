"""The secrets that sign webhooks, as the Standard Webhooks specification has it (version 1, HMAC-SHA256)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from triptych.api.keys import ApiKeysError, read_secret_lines

PREFIX: Final = "whsec_"
MIN_BYTES: Final = 24
MAX_BYTES: Final = 64
ADVICE: Final = "python -c \"import base64, os; print('whsec_' + base64.b64encode(os.urandom(32)).decode())\""
_LINE: Final = re.compile(
    rf"(?:(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{{0,63}})\s*:\s*)?{PREFIX}(?P<secret>[A-Za-z0-9+/=]+)"
)


class WebhookKeys:
    """The secrets, those of all clients under "".

    Args:
        secrets: By the name of the client's API key.
    """

    def __init__(self, secrets: Mapping[str, Sequence[bytes]]) -> None:
        self._secrets = secrets

    def of(self, owner: str) -> Sequence[bytes]:
        """Return the secrets that sign webhooks of a client; a client that has its own shares none with others."""
        return self._secrets.get(owner) or self._secrets.get("", ())


def load_webhook_keys(path: Path) -> WebhookKeys:
    """Read a file of secrets; empty lines and lines that start with # are ignored.

    Raises:
        ApiKeysError: It cannot be read, others may read it, or a line of it is no secret.
    """
    secrets: dict[str, list[bytes]] = {}
    for number, line in read_secret_lines(path):
        match = _LINE.fullmatch(line)
        secret = _decode(match["secret"]) if match else b""
        if not match or not MIN_BYTES <= len(secret) <= MAX_BYTES:
            problem = f"has no {PREFIX} and base64 of {MIN_BYTES} to {MAX_BYTES} bytes in line {number}"
            raise ApiKeysError(problem, f"make one with {ADVICE}")
        secrets.setdefault(match["name"] or "", []).append(secret)
    if not secrets:
        raise ApiKeysError("holds no secret", f"make one with {ADVICE}")
    return WebhookKeys(secrets)


def signature_headers(secrets: Sequence[bytes], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers that sign a webhook.

    Args:
        secrets: Each signs.
        message_id: The same for each attempt.
        timestamp: Of this attempt, in unix seconds.
        body: As it is sent.
    """
    signed = f"{message_id}.{timestamp}.".encode() + body
    signatures = [base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode() for secret in secrets]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""
