"""Which URLs a request may have called: hosts that the topology lists, and of them no address that is not listed. Pure.

A client must not make this server call what only this server reaches (server-side request forgery). So a URL is checked
when it comes, and the addresses that its name leads to each time before they are connected to.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import httpx

from triptych.actors.topology import is_ip, is_loopback, is_network

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
MAX_PORT: Final = 65_535
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
"""RFC 6052: a gateway of the network connects to the address of IPv4 in the last 32 bits."""
_EXAMPLE: Final = "as in https://hooks.example.com/path"


class WebhookTargetError(Exception):
    """A URL that is not called: why, as a sentence without its subject."""


@dataclass(frozen=True)
class WebhookTarget:
    """A URL that may be called, if its name leads to an address that may."""

    url: httpx.URL
    host: str
    """A name in lower case, or an address."""
    port: int


def check_webhook_url(text: str, hosts: Sequence[str]) -> WebhookTarget:
    """Check a URL as a client gives it.

    Args:
        text: The URL.
        hosts: `[webhooks] hosts`.

    Raises:
        WebhookTargetError: It is no URL, or none that may be called.
    """
    if not hosts:
        raise WebhookTargetError("cannot be called: this server has no [webhooks] hosts, ask for the result instead")
    try:
        url = httpx.URL(text)
        host = url.raw_host.decode("ascii").lower().strip("[]").removesuffix(".")
    except (httpx.InvalidURL, UnicodeError, ValueError) as error:
        raise WebhookTargetError(f"must be a URL, {_EXAMPLE} ({error})") from None
    if url.scheme not in ("http", "https") or not host:
        raise WebhookTargetError(f"must be a URL that begins with https://, {_EXAMPLE}")
    if url.userinfo:
        raise WebhookTargetError("must have no user and password in it: the receiver knows us by the signature")
    if url.port is not None and not 1 <= url.port <= MAX_PORT:
        raise WebhookTargetError(f"must have a port from 1 to {MAX_PORT}, not {url.port}")
    if not _is_listed(host, hosts):
        raise WebhookTargetError(f"leads to {host}, which is none of the server's [webhooks] hosts")
    if url.scheme == "http" and not is_loopback(host):
        raise WebhookTargetError(f"must begin with https://, {_EXAMPLE}")
    return WebhookTarget(url, host, url.port or (443 if url.scheme == "https" else 80))


def check_address(text: str, host: str, hosts: Sequence[str]) -> str:
    """Return an address that a host leads to; raises WebhookTargetError unless it may be called.

    Args:
        text: The address.
        host: As it is in the URL.
        hosts: `[webhooks] hosts`.
    """
    address = _address(text.partition("%")[0])
    if _in_listed_network(address, hosts) or (host == "localhost" and address.is_loopback):
        return text
    if not address.is_global or address.is_multicast:
        raise WebhookTargetError(
            f"leads to {address}, a private address that the server's [webhooks] hosts do not list"
        )
    return text


def _is_listed(host: str, hosts: Sequence[str]) -> bool:
    if is_ip(host):
        return _in_listed_network(_address(host), hosts)
    names = [each.lower() for each in hosts]
    return host in names or any(each.startswith("*.") and host.endswith(each[1:]) for each in names)


def _in_listed_network(address: Address, hosts: Sequence[str]) -> bool:
    return any(address in ipaddress.ip_network(each) for each in hosts if is_network(each))


def _address(text: str) -> Address:
    """Return an address; that of IPv4 where IPv6 only wraps it: mapped, or for a gateway (NAT64, 6to4)."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
