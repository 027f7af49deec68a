"""Where a table comes from, said below it."""

from __future__ import annotations

from typing import Any


def made_by(content: dict[str, Any]) -> str:
    """Return the command, machines and commits of a results file as a line of Markdown."""
    environment = content["environment"]
    commits = dict.fromkeys([environment["commit"], *content.get("commits", [])])
    machines = dict.fromkeys([environment["machine"], *content.get("machines", [])])
    command = content["command"].split(" --")[0]
    return (
        f"*`{command}`, commit {', '.join(map(str, commits))}, torch "
        f"{environment['versions']['torch']}, {', '.join(machines)}.*"
    )
