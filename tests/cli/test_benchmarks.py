import json
import sys

import pytest

from neurms.cli import benchmarks, main


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "shared.py").write_text('"""No benchmark."""\n')
    (folder / "echo.py").write_text(
        '"""Say what was asked.\n\nMore."""\nimport sys\n'
        'if __name__ == "__main__":\n'
        "    print(sys.argv[1:])\n"
        "    if sys.argv[1:] == ['fail']:\n"
        "        raise SystemExit('it failed')\n"
        "    raise SystemExit(int(len(sys.argv) > 2))\n"
    )
    monkeypatch.setattr(benchmarks, "checkout", lambda: tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = {name for name in sys.modules if name.partition(".")[0] == "benchmarks"}
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_listing(checkout, capsys) -> None:
    assert main(["bench"]) == 0
    listed = capsys.readouterr().out
    assert "echo  Say what was asked." in listed
    assert "shared" not in listed


def test_listing_for_machines(checkout, capsys) -> None:
    assert main(["bench", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"echo": "Say what was asked."}


def test_options_are_handed_on_unread(checkout, capsys) -> None:
    before = sys.argv
    assert main(["bench", "echo", "--help"]) == 0
    assert capsys.readouterr().out == "['--help']\n"
    assert main(["bench", "echo", "--seeds", "3"]) == 1
    assert sys.argv is before


def test_benchmark_that_stops_with_a_message(checkout, capsys) -> None:
    assert main(["bench", "echo", "fail"]) == 1
    assert capsys.readouterr().err == "it failed\n"


def test_unknown_benchmark(checkout, capsys) -> None:
    assert main(["bench", "imagenet"]) == 2
    assert "no benchmark 'imagenet'; choose one of echo" in capsys.readouterr().err


def test_outside_of_a_checkout(monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmarks, "checkout", lambda: None)
    assert main(["bench"]) == 2
    assert "not in the installed package" in capsys.readouterr().err


def test_the_repository_s_own() -> None:
    assert {"mnist", "quick"} <= set(benchmarks.scripts())
