"""What the demo trains: a tiny language model, or a perceptron on images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from neurms.cli.data import DatasetError, hold_out, load
from neurms.cli.network import Decoder, perceptron

__all__ = ["TASKS", "Images", "Manual", "Task", "manual", "task"]

Part = Literal["validation", "test"]

CURVE = 12
"""Points of a run's validation curve."""


class Task(ABC):
    """A network, its batches, and what they are judged by.

    Attributes:
        name: As ``--data`` has it.
        source: Where the data is from.
        described: The network and the data in a sentence.
        figure: What a run ends with.
        steps: Of every run.
        warmup: Share of the steps over which rates rise, before a cosine to 0.
    """

    name: str
    source: str
    described: str
    figure: Literal["test loss", "accuracy"]
    steps: int
    warmup: float

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """Return the network with the first weights of that seed."""

    @abstractmethod
    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the loss of the next batch that the generator draws."""

    @abstractmethod
    def judged(self, model: nn.Module, part: Part) -> float:
        """Return the mean loss over a held-out part."""

    def final(self, model: nn.Module) -> float:
        """Return the figure that a run ends with."""
        return self.judged(model, "test")

    def rate(self, step: int) -> float:
        """Return by what a step's rate is multiplied."""
        rise = round(self.warmup * self.steps)
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))


def manual() -> Mapping[str, Tensor]:
    """Return the reference manual that comes with Python as bytes, in three parts.

    Returns:
        ``"train"``, ``"validation"`` and ``"test"``: of every topic 18, 1 and 1 twentieths, uint8.

    Raises:
        DatasetError: This Python comes without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DatasetError(
            "this Python comes without its manual (pydoc_data.topics); install its full standard "
            "library, or choose --data digits"
        ) from None
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for topic in topics.values():
        text = topic.encode()
        first, second = len(text) * 18 // 20, len(text) * 19 // 20
        parts["train"].append(text[:first])
        parts["validation"].append(text[first:second])
        parts["test"].append(text[second:])
    return {
        part: torch.frombuffer(bytearray(b"\n".join(pieces)), dtype=torch.uint8)
        for part, pieces in parts.items()
    }


class Manual(Task):
    """A decoder of bytes on Python's own manual.

    Args:
        steps: Of every run.
    """

    name = "manual"
    figure = "test loss"
    warmup = 0.1
    width, layers, heads, context, batch = 64, 2, 2, 64, 8

    def __init__(self, steps: int = 200) -> None:
        self.steps = steps
        self._parts = manual()
        self.source = "Python's own library reference (pydoc_data)"
        self.described = (
            f"{len(self._parts['train']):,} bytes to train on; a decoder of {self.layers} layers, "
            f"width {self.width}, {self.batch} windows of {self.context} bytes a step"
        )

    def model(self, seed: int) -> nn.Module:
        """Return the decoder with the first weights of that seed."""
        torch.manual_seed(seed)
        return Decoder(self.width, self.layers, self.heads, self.context)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the loss of windows that the generator draws."""
        return self._loss(model, "train", self.batch, generator)

    @torch.no_grad()
    def judged(self, model: nn.Module, part: Part) -> float:
        """Return the mean loss over a part's windows, the same ones every time."""
        return float(self._loss(model, part, 96, torch.Generator().manual_seed(1234)))

    def _loss(self, model: nn.Module, part: str, count: int, generator: torch.Generator) -> Tensor:
        tokens = self._parts[part]
        starts = torch.randint(len(tokens) - self.context, (count, 1), generator=generator)
        windows = tokens[starts + torch.arange(self.context + 1)].long()
        return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


class Images(Task):
    """A perceptron on handwritten digits or clothes, whose validation part ends a run, too.

    Args:
        name: One of :data:`~neurms.cli.data.DATASETS`.
        epochs: Passes over the training part; None takes the set's own number.
        seed: Of the split.
    """

    figure = "accuracy"
    warmup = 0.0

    def __init__(self, name: str, epochs: int | None = None, seed: int = 0) -> None:
        small = name == "digits"
        self.name = name
        self.batch, self.width = (64, 256) if small else (128, 512)
        epochs = epochs or (15 if small else 2)
        data = load(name)
        self.source = data.source
        self._train, self._held = hold_out(data.train, 360 if small else 10_000, seed)
        self.steps = epochs * (len(self._train) // self.batch)
        self._order = torch.empty(0, dtype=torch.long)
        self.described = (
            f"{len(self._train):,} images to train on, {len(self._held):,} to validate; "
            f"{self._features}-{self.width}-{self.width}-10 with ReLU, batch {self.batch}, "
            f"{epochs} epochs"
        )

    @property
    def _features(self) -> int:
        return self._train.inputs.shape[1]

    def model(self, seed: int) -> nn.Module:
        """Return the perceptron with the first weights of that seed."""
        torch.manual_seed(seed)
        self._order = self._order[:0]
        return perceptron(self._features, self.width)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the loss of the next batch of an order that is drawn for each epoch."""
        if len(self._order) < self.batch:
            self._order = torch.randperm(len(self._train), generator=generator)
        index, self._order = self._order[: self.batch], self._order[self.batch :]
        return cross_entropy(model(self._train.inputs[index]), self._train.labels[index])

    @torch.no_grad()
    def judged(self, model: nn.Module, part: Part) -> float:
        """Return the mean loss over the validation images."""
        return float(cross_entropy(model(self._held.inputs), self._held.labels))

    @torch.no_grad()
    def final(self, model: nn.Module) -> float:
        """Return the share of validation images that are classified rightly."""
        hits = model(self._held.inputs).argmax(1) == self._held.labels
        return float(hits.double().mean())


TASKS = ("manual", "digits", "mnist", "fashion_mnist")


def task(data: str, epochs: int | None = None, seed: int = 0) -> Task:
    """Return a task by name.

    Args:
        data: One of :data:`TASKS`.
        epochs: Of images; for the manual, of 200 steps each.
        seed: Of a split of images.
    """
    if data == "manual":
        return Manual(200 * (epochs or 1))
    return Images(data, epochs, seed)
