"""Sizes and rates as people write them."""

from __future__ import annotations

import re

from llmcad_mlx.errors import UsageError

_UNITS = {"": 1} | {
    f"{prefix}{binary}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for binary, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_size(text: str, option: str) -> int:
    """Bytes from "6GB", "600 MB", "1.5GiB", "800m" or "123456". Raises UsageError naming `option`."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise UsageError(f"{option}: {text!r} is not a size; write it like 6GB, 600MB or 1.5GiB")
    if text.strip() == found[1]:
        check_unit(float(text), option, "GB")
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


def check_unit(number: float, option: str, unit: str) -> None:
    """Raise UsageError for a number of bytes so small that somebody must have thought of another `unit`."""
    if 0 < number < 1000:
        raise UsageError(f"{option}: {number:g} would be bytes; did you mean {number:g}{unit}?")


def parse_rate(text: str, option: str) -> float:
    """Bytes per second from "250MB/s". Raises UsageError naming `option`."""
    found = _SIZE.fullmatch(re.sub(r"/s\s*$", "", text))
    rate = float(found[1]) * _UNITS[(found[2] or "").lower()] if found is not None else 0.0
    if found is not None and not found[2]:
        check_unit(rate, option, "MB/s")
    if rate <= 0.0:
        raise UsageError(f"{option}: {text!r} is not a rate; write it like 250MB/s")
    return rate


def format_size(num_bytes: int) -> str:
    """ "1.00 GB", "85 MB", "12 kB"."""
    if num_bytes >= 10**9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes >= 10**6 else f"{num_bytes / 1e3:.0f} kB"
