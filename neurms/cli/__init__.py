"""The command line: ``neurms demo | doctor | plan | advise | report | bench``.

Also ``python -m neurms``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import neurms

__all__ = ["main"]

_EXTRA = {
    "rich": "report",
    "tyro": "report",
    "lightning": "lightning",
    "pytorch_lightning": "lightning",
    "sklearn": "demo",
    "optuna": "bench",
    "scipy": "bench",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; None reads ``sys.argv``.

    Returns:
        The exit code: 0 when all went well, 1 for a failure that was explained, 2 for a wrong
        command line, 130 when interrupted. What the parser itself refuses, it leaves through
        ``SystemExit``, with code 2 too.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        # Before any import that an extra brings.
        print(f"neurms {neurms.__version__}")
        return 0
    try:
        from neurms.cli.commands import dispatch

        code = dispatch(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read has gone, as `head` does; the interpreter must not flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        print(f"error: {_cured(error)}", file=sys.stderr)
        return 1


def _cured(error: ImportError) -> str:
    """Return a message that names the extra to install; re-raise what no extra cures."""
    package = (error.name or "").partition(".")[0]
    if package in _EXTRA:
        return f'this command needs {package}: pip install "neurms[{_EXTRA[package]}]"'
    # Our own import errors carry their cure and, unlike the interpreter's, no module's name.
    if error.name is None:
        return str(error)
    raise error
