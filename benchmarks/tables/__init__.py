"""The results pages under ``docs/``, written from the results kept in the repository.

python -m benchmarks.tables          # rewrite the pages and figures
python -m benchmarks.tables --check  # fail if a page is not what the files say

One module for each theme, each with functions from the content of results files to a section of
Markdown; ``page`` puts those of ``docs/results.md`` in order, ``pages`` names all pages.
"""

from benchmarks.tables.pages import DOCS, ROOT, draw, pages

__all__ = ["DOCS", "ROOT", "draw", "pages"]
