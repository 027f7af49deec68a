"""Numbers as people read them."""

from __future__ import annotations

import math

__all__ = ["bytes_text", "number", "percent", "raised", "time_text"]

MISSING = "–"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None) -> str:
    """Return a number in about three digits, without a programmer's exponents.

    Example:
        >>> number(0.1234), number(2490.0), number(1.2e-7), number(None)
        ('0.123', '2,490', '1.2·10⁻⁷', '–')
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value and not 1e-3 <= abs(value) < 1e9:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}·10{raised(int(power))}"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def raised(power: int) -> str:
    """Return a power as raised figures.

    Example:
        >>> raised(-12)
        '⁻¹²'
    """
    return str(power).translate(_RAISED)


def percent(value: float | None) -> str:
    """Return a share in percent, in about two digits.

    Example:
        >>> percent(0.0123), percent(0.3017), percent(0.0002), percent(0.0)
        ('1.2 %', '30 %', '< 0.1 %', '0 %')
    """
    if value is None:
        return MISSING
    if 0 < value < 0.0005:
        return "< 0.1 %"
    return f"{100 * value:.0f} %" if value >= 0.0995 or value == 0 else f"{100 * value:.1f} %"


def time_text(microseconds: float | None) -> str:
    """Return a time with its unit.

    Example:
        >>> time_text(12.3), time_text(4567.0), time_text(0.0), time_text(2.5e6)
        ('12.3 µs', '4.57 ms', '0 µs', '2.5 s')
    """
    return MISSING if microseconds is None else _in_units(microseconds, ("µs", "ms", "s"))


def bytes_text(count: float | None) -> str:
    """Return a number of bytes with its unit.

    Example:
        >>> bytes_text(512), bytes_text(999_700), bytes_text(3_500_000)
        ('512 B', '1 MB', '3.5 MB')
    """
    return MISSING if count is None else _in_units(count, ("B", "kB", "MB", "GB", "TB"))


def _in_units(value: float, units: tuple[str, ...]) -> str:
    """Return a value in the first of units, each a thousand of the one before, that suits it."""
    for unit in units[:-1]:
        # From here on three digits would round to 1000.
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{number(value)} {units[-1]}"
