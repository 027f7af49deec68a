"""The page on images: perceptrons at equal wall-clock, ablations, CIFAR-10, the autoencoder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.perceptron_rows import cells
from benchmarks.tables.ablations import ablations
from benchmarks.tables.autoencoder import autoencoder
from benchmarks.tables.cifar import cifar
from benchmarks.tables.perceptrons import budgets, head
from benchmarks.tables.sensitivity import sensitivity
from benchmarks.tables.step_times import times

Content = dict[str, Any]


def page(contents: dict[str, Content]) -> str:
    """Return the page; sections whose results are not there are left out.

    Args:
        contents: Results files by name.
    """
    timed = contents["step_times"]
    found = cells(contents["perceptrons"]["runs"], timed["runs"])
    sections = [head(found), budgets(found, contents["perceptrons"]), times(timed)]
    settings = [contents[name] for name in ABLATED if name in contents]
    made = [sensitivity(settings)] if settings else []
    made += [section(contents[name]) for name, section in SECTIONS.items() if name in contents]
    return "\n".join([*sections, *filter(None, made)])


ABLATED = ("ablations", "ablations_fashion_mnist")
"""The results files of the settings of NeuRMS, by data set."""
SECTIONS: dict[str, Callable[[Content], str]] = {
    "ablations": ablations,
    "ablations_fashion_mnist": ablations,
    "ablations_fashion_mnist_110": functools.partial(ablations, rho=False),
    "cifar": cifar,
    "autoencoder": autoencoder,
}
"""Results files that may be missing, and their sections."""
NAMES = ("perceptrons", "step_times", *SECTIONS)
"""The results files of the page."""
