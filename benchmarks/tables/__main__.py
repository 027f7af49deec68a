"""``python -m benchmarks.tables``."""

from __future__ import annotations

import sys

from benchmarks.tables.pages import draw, pages


def main() -> None:
    """Write the pages and draw the figures, or check the pages."""
    made = pages()
    if "--check" in sys.argv[1:]:
        if stale := [
            path.name
            for path, text in made.items()
            if not path.is_file() or path.read_text() != text
        ]:
            raise SystemExit(
                f"{', '.join(stale)} is not what benchmarks/results says; run it without --check"
            )
        return
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    draw()


if __name__ == "__main__":
    main()
