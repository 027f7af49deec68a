"""Numbers at the places where their unit changes."""

import math

import pytest

from neurms.report.formats import bytes_text, number, percent, time_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (2088, "2.09 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1_072_000, "1.07 MB"),
        (3e15, "3,000 TB"),
        (None, "–"),
    ],
)
def test_bytes_have_three_digits_and_never_a_power(count: float | None, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2490.0, "2,490"),
        (999.96, "1,000"),
        (99.96, "100"),
        (12_345_678, "12,345,678"),
        (2.5e12, "2.5·10¹²"),
        (-3e-7, "-3·10⁻⁷"),
        (0.0, "0"),
        (math.inf, "∞"),
        (math.nan, "–"),
    ],
)
def test_numbers_are_for_people(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(999.4, "999 µs"), (999.6, "1 ms"), (999_600, "1 s"), (2.5e9, "2,500 s"), (None, "–")],
)
def test_times_change_their_unit(microseconds: float | None, text: str) -> None:
    assert time_text(microseconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0004, "< 0.1 %"), (0.0006, "0.1 %"), (0.0994, "9.9 %"), (0.0999, "10 %"), (1.0, "100 %")],
)
def test_shares_have_about_two_digits(share: float, text: str) -> None:
    assert percent(share) == text
