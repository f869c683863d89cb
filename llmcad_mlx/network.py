"""What stands between this machine and a server: proxies that the environment names."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def is_this_machine(host: str) -> bool:
    """Whether a connection to this name or address never leaves the machine."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    inner = getattr(address, "ipv4_mapped", None) or address
    return bool(inner.is_loopback or inner.is_unspecified)


def through_proxy(url: str) -> str:
    """For messages: the proxy that the environment names for `url`, without a password; "" where there is none."""
    parts, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    scheme, mark, rest = proxy.rpartition("://")
    return f" through the proxy {scheme}{mark}{rest.rpartition('@')[2]} (NO_PROXY={parts.hostname} goes round it)"
