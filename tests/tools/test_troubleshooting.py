"""The troubleshooting page holds every message of the source, each with a cure."""

import ast
import textwrap

import pytest

from tools import messages as reading
from tools.messages import Message, messages
from tools.troubleshooting import CURES, PAGE, cure_of, page

FOUND = messages()


def test_the_page_is_what_its_command_writes() -> None:
    assert PAGE.read_text() == page(), "run: python -m tools.troubleshooting"


def test_every_message_is_on_the_page() -> None:
    shown = PAGE.read_text()
    missing = {message for message in FOUND if message.problem not in shown}
    assert not missing


def test_every_kind_of_error_has_its_section() -> None:
    shown = PAGE.read_text().splitlines()
    assert {message.kind for message in FOUND} <= {line.removeprefix("### ") for line in shown}


def test_every_message_says_what_to_do() -> None:
    """By its own second half, by saying what a value must be, or by a cure written for the page."""
    helpless = [one for one in FOUND if not cure_of(one) and " must " not in one.text]
    assert not helpless, "give the message a cure after a semicolon"


def test_no_cure_is_left_over() -> None:
    stale = [
        start
        for start in CURES
        if not any(one.problem.startswith(start) and not one.cure for one in FOUND)
    ]
    assert not stale


@pytest.fixture
def read(tmp_path, monkeypatch):
    def of(source: str) -> list[Message]:
        (tmp_path / "module.py").write_text(textwrap.dedent(source))
        monkeypatch.setattr(reading, "ROOT", tmp_path)
        return messages(tmp_path)

    return of


def test_values_become_blanks(read) -> None:
    (message,) = read('raise ValueError(f"lr={lr!r} is " + why + f"; lower {name}")')
    assert message == Message("ValueError", "lr=… is …; lower …", "module.py", 1)
    assert (message.problem, message.cure) == ("lr=… is …", "lower …")


def test_a_helper_s_error_is_of_the_class_that_it_returns(read) -> None:
    source = """
    def refused(what: str) -> KeyError:
        return KeyError(what)

    def f():
        raise refused("no such key")
    """
    assert [one.kind for one in read(source)] == ["KeyError"]


def test_warnings_count_and_passed_on_errors_do_not(read) -> None:
    source = """
    import warnings
    warnings.warn("old; use new", DeprecationWarning)
    warnings.warn("plain")
    try:
        f()
    except OSError as error:
        raise RuntimeError(str(error)) from error
    raise
    """
    assert [one.kind for one in read(source)] == ["DeprecationWarning", "UserWarning"]


def test_no_raise_of_the_package_is_overlooked() -> None:
    """Counted another way: raises of a call whose argument spells out words."""
    places = {(one.place, one.line) for one in FOUND}
    for path in sorted((reading.ROOT / "neurms").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                spelled = any(
                    isinstance(part, ast.Constant) and len(str(part.value)) > 12
                    for argument in node.exc.args
                    for part in ast.walk(argument)
                )
                place = path.relative_to(reading.ROOT).as_posix()
                assert not spelled or (place, node.exc.lineno) in places, (place, node.lineno)
