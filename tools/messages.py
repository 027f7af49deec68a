"""Every message of the package's errors and warnings, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Message", "messages", "own_classes"]

ROOT = Path(__file__).parent.parent
BLANK = "…"
"""Stands for a value that a message is completed by."""


@dataclass(frozen=True)
class Message:
    """One place in the source that explains itself.

    Args:
        kind: Class of the error, or of the warning.
        text: The message, with ``…`` for every value.
        place: Path in the repository.
        line: Line there.
    """

    kind: str
    text: str
    place: str
    line: int

    @property
    def problem(self) -> str:
        """What is wrong: the message up to its first semicolon or full stop."""
        return self._parts()[0]

    @property
    def cure(self) -> str:
        """What to do about it: the rest, empty where the message has none."""
        return self._parts()[1]

    def _parts(self) -> tuple[str, str]:
        cuts = [cut for mark in ("; ", ". ") if (cut := self.text.find(mark)) > 0]
        if not cuts:
            return self.text.rstrip("."), ""
        return self.text[: min(cuts)], self.text[min(cuts) + 2 :].rstrip(".")


def messages(root: Path = ROOT / "neurms") -> list[Message]:
    """Return the messages of all modules below ``root``, in the order of the source.

    Errors that are raised again, or that carry another error's message, say nothing of their own
    and are left out.
    """
    return [message for path in sorted(root.rglob("*.py")) for message in _of_file(path)]


def own_classes(root: Path = ROOT / "neurms") -> dict[str, str]:
    """Return the error classes of the package, with the first line of what each says of itself."""
    return {
        node.name: (ast.get_docstring(node) or "").partition("\n")[0]
        for path in sorted(root.rglob("errors.py")) + sorted(root.rglob("runs.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }


def _of_file(path: Path) -> Iterator[Message]:
    tree = ast.parse(path.read_text())
    place = path.relative_to(ROOT).as_posix()
    makers = {
        node.name: ast.unparse(node.returns)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.returns is not None
    }
    for call in _explained(ast.walk(tree)):
        name = ast.unparse(call.func).rpartition(".")[2]
        if not name.isidentifier():
            # type(error)(number, text): an error of the file system, in words of ours.
            name = "OSError"
        warns = name == "warn"
        # An error that a helper makes is of the class which the helper returns.
        kind = _category(call) if warns else makers.get(name, name)
        texts = (_text(argument) for argument in call.args)
        if text := next((one for one in texts if any(map(str.isalpha, one))), ""):
            yield Message(kind, " ".join(text.split()), place, call.lineno)


def _explained(nodes: Iterable[ast.AST]) -> Iterator[ast.Call]:
    found = []
    for node in nodes:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.append(node.exc)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            found.append(node)
    yield from sorted(found, key=lambda call: call.lineno)


def _category(call: ast.Call) -> str:
    named = [word.value for word in call.keywords if word.arg == "category"]
    given = [*call.args[1:2], *named]
    return ast.unparse(given[0]) if given else "UserWarning"


def _text(node: ast.expr) -> str:
    """Return the literal parts of a message, with a blank for each value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return BLANK
