"""What stands between this machine and a server: proxies that the environment names."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens at this name or address."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def is_this_machine(host: str) -> bool:
    """Whether a connection to this name or address never leaves the machine. 0.0.0.0 and :: lead nowhere else,
    though what listens there can be reached from elsewhere."""
    name = host.lower().rstrip(".")
    address = _address(name)
    if address is None:
        return f".{name}".endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def through_proxy(url: str) -> str:
    """For messages: the proxy that the environment names for `url`, without a password; "" where there is none."""
    parts, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    scheme, mark, rest = proxy.rpartition("://")
    return f" through the proxy {scheme}{mark}{rest.rpartition('@')[2]} (NO_PROXY={parts.hostname} goes round it)"
