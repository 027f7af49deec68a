"""The sub-commands, and what runs each of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from neurms.cli.errors import UsageError
from neurms.cli.words import check_words
from neurms.core.ground.errors import NeurmsError

__all__ = ["dispatch"]

_DESCRIPTION = """Optimizers that precondition a layer by the statistics of its units and features.

Start with `neurms demo`; if something does not work, with `neurms doctor`.

Exit codes: 0 all went well; 1 it did not, and the last line says why; 2 the command line is
wrong; 130 interrupted. `neurms --version` prints the version.

Completion: `neurms --tyro-write-completion bash FILE` (zsh and tcsh, too), then have your shell
source FILE."""


def dispatch(words: Sequence[str]) -> int:
    """Run the command that ``words`` spell; expected errors are printed, not raised."""
    # A benchmark has options of its own, --help among them, so they are handed on unread.
    if words[:1] == ["bench"] and len(words) > 1 and not words[1].startswith("-"):
        return _explained(lambda: _bench(words[1], words[2:]))
    commands: dict[str, Callable[..., int]] = {
        "demo": demo,
        "doctor": doctor,
        "plan": plan,
        "advise": advise,
        "report": report,
        "bench": bench,
    }
    return _explained(lambda: _parsed(words, commands))


def _parsed(words: Sequence[str], commands: dict[str, Callable[..., int]]) -> int:
    check_words(words, commands)
    code: int = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="neurms",
        description=_DESCRIPTION,
        args=list(words) or ["--help"],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    return code


def demo(
    data: Literal["manual", "digits", "mnist", "fashion_mnist"] = "manual",
    epochs: int | None = None,
    seed: int = 0,
    json: Path | None = None,
    html: Path | None = Path("neurms-demo.html"),
) -> int:
    """Train eight optimizers on a tiny language model and compare them in a table and a picture.

    Every number is measured in this run, in about a minute: the loss, bytes of optimizer state,
    time of a step side by side. One seed on a tiny task is an illustration, no ranking.

    Args:
        data: manual is the reference manual that comes with Python; digits comes with scikit-learn.
            The other two are looked for in the folder NEURMS_DATA and in ~/.cache/neurms, then
            downloaded.
        epochs: Passes over the training images, or of 200 steps of text; by default what the data
            needs.
        seed: Of the first weights and the order of batches, and of a split of images.
        json: Write the figures to this file too.
        html: Write picture and table to this file, over an older one; None writes none.
    """
    from neurms.cli.demo import run

    run(data, epochs, seed, json, html)
    return 0


def doctor(kernels: bool = False, json: bool = False) -> int:
    """Show what neurms finds on this machine: versions, threads, compiler, backends, denormals.

    The exit code is 1 if something that neurms needs is missing.

    Args:
        kernels: Also time what each kernel gets from each backend.
        json: Print JSON instead of text.
    """
    from neurms.cli.doctor import examine

    return examine(kernels=kernels, json=json)


def plan(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODULE:FUNCTION")],
    optimizer: str = "neurms",
    json: bool = False,
) -> int:
    """Print which rule each parameter of a model would get, why, and the bytes of its state.

    Args:
        model: Where the model comes from: a function without arguments that returns it, such as
            my_package.models:build. The current folder is searched too.
        optimizer: One of the library's own optimizers, by the name that neurms.create takes.
        json: Print JSON for machines, not a table: the rows, and the total of their bytes.
    """
    from neurms.cli.planning import as_json, plan_of, print_plan

    found = plan_of(model, optimizer)
    if json:
        print(as_json(found))
    else:
        print_plan(found)
    return 0


def advise(
    training: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODULE:FUNCTION")],
    lr: float = 1e-3,
    steps: int = 60,
    json: bool = False,
) -> int:
    """Watch a short AdamW run of your model, and print the optimizer that suits each layer.

    What is printed last is Python code: the rule of each layer, by what the profiler has seen of
    it, at the rate at which it travels as far as AdamW does in its first steps.

    Args:
        training: A function without arguments that returns (model, loss), where loss(model)
            computes the loss of another batch each time; or (model, batches), whose dictionaries
            the model takes and returns an output with .loss; or (model, batches, criterion), for
            criterion(model(inputs), targets).
        lr: The learning rate that suits AdamW here.
        steps: Steps of AdamW that are watched.
        json: Print JSON for machines, not text: advice, rates, code.
    """
    from neurms.cli.advising import run

    run(training, lr, steps, as_json=json)
    return 0


def report(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    other: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN2")] = None,
    html: Path | None = None,
    csv: Path | None = None,
    partial: bool = False,
    json: bool = False,
) -> int:
    """Show a profiled run again from its files, or set two runs side by side.

    A run is the folder that the profiler wrote to (output=...), its run.jsonl, or a file that
    report.to_json wrote.

    Args:
        run: The run.
        other: A second run to compare it with, layer by layer.
        html: Write the report, or both side by side, to this file, as a page that needs nothing
            else.
        csv: Write the first run's rows to this file.
        partial: Take what can be read of a run file that is cut off.
        json: Print JSON for machines, not tables: each run's rows and advice.
    """
    from neurms.cli.report import show

    return show(run, other, html=html, csv=csv, partial=partial, as_json=json)


def bench(name: Annotated[str | None, tyro.conf.Positional] = None, json: bool = False) -> int:
    """Run a benchmark of the checkout: neurms bench NAME [its options].

    Without a name, list them. `neurms bench NAME --help` shows a benchmark's own options.

    Args:
        name: A file of benchmarks/, without its ending.
        json: Print the list as JSON, not as text.
    """
    from neurms.cli.benchmarks import listing

    print(listing(as_json=json))
    return 0


def _bench(name: str, arguments: Sequence[str]) -> int:
    from neurms.cli.benchmarks import run

    return run(name, arguments)


def _explained(command: Callable[[], int]) -> int:
    """Run a command; an error that its message explains becomes one line and an exit code."""
    try:
        return command()
    except NeurmsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
