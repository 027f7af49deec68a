"""Numbers as people read them."""

from __future__ import annotations

import math

__all__ = ["bytes_text", "number", "percent", "time_text"]

MISSING = "–"


def number(value: float | None) -> str:
    """Return a number in about three digits.

    Example:
        >>> number(0.1234), number(1234.5), number(1.2e-7), number(None)
        ('0.123', '1,234', '1.2e-07', '–')
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """Return a share in percent.

    Example:
        >>> percent(0.0123)
        '1.2 %'
    """
    return MISSING if value is None else f"{100 * value:.1f} %"


def time_text(microseconds: float | None) -> str:
    """Return a time with its unit.

    Example:
        >>> time_text(12.3), time_text(4567.0), time_text(0.0)
        ('12.3 µs', '4.57 ms', '0 µs')
    """
    if microseconds is None:
        return MISSING
    if microseconds >= 1000:
        return f"{microseconds / 1000:.3g} ms"
    return f"{microseconds:.3g} µs"


def bytes_text(count: float | None) -> str:
    """Return a number of bytes with its unit.

    Example:
        >>> bytes_text(512), bytes_text(999_700), bytes_text(3_500_000)
        ('512 B', '1 MB', '3.5 MB')
    """
    if count is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        # From here on three digits would round to 1000.
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{number(count)} TB"
