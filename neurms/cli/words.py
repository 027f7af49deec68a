"""What is wrong with a command line, in one sentence each: names, values, numbers of words.

The parser's own messages are boxes of several lines, and it does not guess commands.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from neurms.cli.errors import UsageError
from neurms.core.ground.errors import meant

__all__ = ["check_words"]

_HELP = ("-h", "--help")


@dataclass(frozen=True)
class _Word:
    """A positional word or an option of a command.

    Args:
        name: As it is typed, or as the help calls it.
        kind: Its type without None.
        positional: Whether it has no name of its own.
        required: Whether the command needs it.
    """

    name: str
    kind: Any
    positional: bool
    required: bool

    def check(self, value: str) -> None:
        """Raise unless a value can be one of this word's."""
        if self.kind in (int, float):
            try:
                self.kind(value)
            except ValueError:
                number = "a whole number" if self.kind is int else "a number"
                raise UsageError(f"{self.name} {value} must be {number}") from None
        elif get_origin(self.kind) is Literal and value not in get_args(self.kind):
            choices = get_args(self.kind)
            near = meant(value, choices)
            raise UsageError(
                f"{self.name} {value} is not known{near}; choose one of {', '.join(choices)}"
            )


def check_words(words: Sequence[str], commands: Mapping[str, Callable[..., int]]) -> None:
    """Raise unless a command line spells a command, its options and their values.

    Args:
        words: What follows the program's name.
        commands: Name -> the function whose signature is the command's.

    Raises:
        UsageError: It does not; the message says what would.
    """
    if not words or words[0].startswith(("--tyro", *_HELP)):
        return
    command, rest = words[0], list(words[1:])
    if command not in commands:
        known = [*commands, "--version", "--help"]
        raise UsageError(
            f"there is no command {command!r}{meant(command, known)}; choose one of "
            f"{', '.join(commands)}, or neurms --help"
        )
    if not set(_HELP) & set(rest):
        _check(command, rest, list(_words_of(commands[command])))


def _check(command: str, rest: Sequence[str], known: Sequence[_Word]) -> None:
    options = {word.name: word for word in known if not word.positional}
    places = [word for word in known if word.positional]
    given: list[str] = []
    left = iter(rest)
    for word in left:
        if word.startswith("-") and not _is_number(word):
            _check_option(command, word, left, options)
        else:
            given.append(word)
    for place, word in zip(places, given, strict=False):
        place.check(word)
    needed = [place.name for place in places if place.required]
    usage = " ".join(
        ["neurms", command, *(p.name if p.required else f"[{p.name}]" for p in places)]
    )
    if len(given) < len(needed):
        raise UsageError(f"neurms {command} needs {needed[len(given)]}; write {usage}")
    if len(given) > len(places):
        raise UsageError(
            f"neurms {command} has no use for {given[len(places)]!r}; write {usage}, then options "
            f"such as {next(iter(options), '--help')}"
        )


def _check_option(
    command: str, word: str, left: Iterator[str], options: Mapping[str, _Word]
) -> None:
    """Check an option, and the value that follows it."""
    name, equals, value = word.partition("=")
    name = name[:2] + name[2:].replace("_", "-")
    if name not in options:
        raise UsageError(
            f"neurms {command} has no option {name!r}{meant(name, options)}; its options are "
            f"{', '.join(options)}"
        )
    option = options[name]
    if option.kind is bool:
        if equals:
            raise UsageError(f"{name} takes no value; write {name} alone")
        return
    if not equals:
        value = next(left, "")
    if not value or (not equals and value.startswith("-") and not _is_number(value)):
        raise UsageError(f"{name} needs a value; write {name} {_sample(option.kind)}")
    option.check(value)


def _words_of(function: Callable[..., int]) -> Iterator[_Word]:
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *marks = get_args(hint) if get_origin(hint := hints[name]) is Annotated else [hint]
        positional = tyro.conf.Positional in marks
        metavar = next((m.metavar for m in marks if getattr(m, "metavar", None)), name.upper())
        shown = metavar if positional else f"--{name.replace('_', '-')}"
        kinds = [part for part in get_args(kind) if part is not NoneType]
        plain = kinds[0] if NoneType in get_args(kind) else kind
        yield _Word(shown, plain, positional, parameter.default is inspect.Parameter.empty)


def _sample(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return str(get_args(kind)[0])
    return {int: "NUMBER", float: "NUMBER", str: "NAME"}.get(kind, "PATH")


def _is_number(word: str) -> bool:
    return word[1:].replace(".", "", 1).isdigit()
