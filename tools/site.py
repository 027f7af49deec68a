"""For the documentation: what mkdocs takes from ``pyproject.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

__all__ = ["on_config", "repository"]

NAMES = ("repository", "source", "source code", "github")
"""Names of the project's links that lead to its code, as packaging's standard has them."""


def repository(project: Path) -> str | None:
    """Return the address of the code, None where the project states none.

    Args:
        project: A ``pyproject.toml``.
    """
    urls = tomllib.loads(project.read_text())["project"].get("urls", {})
    return next((url for name, url in urls.items() if name.lower() in NAMES), None)


def on_config(config: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Give the site its link to the code, where there is an address."""
    config["repo_url"] = repository(Path(config["config_file_path"]).parent / "pyproject.toml")
    return config
