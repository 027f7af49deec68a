"""Numbers at the places where their unit changes."""

import pytest

from neurms.report.formats import bytes_text


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
