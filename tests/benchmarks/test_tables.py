"""The results page says what the results files say."""

from __future__ import annotations

from benchmarks import tables


def test_page_is_made_from_the_files() -> None:
    assert tables.PAGE.read_text() == tables.page()
