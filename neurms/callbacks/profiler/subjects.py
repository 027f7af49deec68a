"""Which layers of a model are profiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from neurms.core.ground.layout import Layout, layout_of
from neurms.core.taps.activity import Activity, activity_of
from neurms.core.taps.signals import ShowsSignals, SignalSink, SignalTap

__all__ = ["Subject", "chosen_subjects", "subjects_of"]


@dataclass(frozen=True, eq=False)
class Subject:
    """One profiled layer.

    Args:
        name: The module's qualified name, wrappers' parts left out.
        module: The module.
        weight: Its weight.
        biases: Other parameters of its own, whose update and state count for it.
        layout: How the weight is seen as units x features.
        activity: Axes of H and D.
    """

    name: str
    module: nn.Module
    weight: Tensor
    biases: tuple[Tensor, ...]
    layout: Layout
    activity: Activity

    @property
    def kind(self) -> str:
        """Class name of the module."""
        return str(self.module._get_name())

    def tap(self, sink: SignalSink) -> ShowsSignals:
        """Return a tap, not yet attached, that shows the layer's D and H to ``sink``."""
        return SignalTap(self.module, self.weight, sink, activity=self.activity)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The weight and the biases."""
        return (self.weight, *self.biases)


def subjects_of(model: nn.Module, layers: Sequence[str] | None = None) -> list[Subject]:
    """Return the layers that can be profiled, in the model's order.

    Linear layers, convolutions of 1 to 3 dimensions and embeddings count, with a trainable weight
    of their own that no other module shares.

    Args:
        model: The model, possibly wrapped for compilation or data parallelism.
        layers: Name patterns (``fnmatch``) of the layers wanted; None takes all.

    Raises:
        TypeError: ``layers`` is one string.
        ValueError: A pattern matches no layer, or the model has none.
    """
    shared = _shared(model)
    found: dict[int, Subject] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or id(weight) in shared or not weight.requires_grad:
            continue
        subject = _subject(_plain(name) or module._get_name(), module, weight)
        if subject is not None:
            found.setdefault(id(module), subject)
    return chosen_subjects(list(found.values()), layers, type(model).__name__)


def chosen_subjects(
    subjects: list[Subject], layers: Sequence[str] | None, model: str
) -> list[Subject]:
    """Return the subjects that patterns name, all of them for None.

    Raises:
        TypeError: ``layers`` is one string.
        ValueError: A pattern matches no layer, or there is none.
    """
    if isinstance(layers, str):
        raise TypeError(f"layers={layers!r} must be a sequence of patterns; write ({layers!r},)")
    if not subjects:
        raise ValueError(
            f"model={model} has no layer to profile: no Linear, convolution or "
            "Embedding with a trainable weight that it shares with no other module"
        )
    for pattern in layers or ():
        if not any(fnmatchcase(s.name, pattern) for s in subjects):
            names = ", ".join(s.name for s in subjects[:8])
            raise ValueError(f"layers={pattern!r} matches no layer; layers are: {names}")
    if layers is None:
        return subjects
    return [s for s in subjects if any(fnmatchcase(s.name, pattern) for pattern in layers)]


def _subject(name: str, module: nn.Module, weight: Tensor) -> Subject | None:
    if isinstance(module, NonDynamicallyQuantizableLinear):
        # Part of nn.MultiheadAttention, which reads its weight and never calls it.
        return None
    layout, activity = layout_of(module, "weight"), activity_of(module)
    if layout is None or activity is None or weight.numel() == 0:
        return None
    others = module._parameters.items()
    biases = tuple(p for key, p in others if p is not None and key != "weight" and p.requires_grad)
    return Subject(name, module, weight, biases, layout, activity)


def _shared(model: nn.Module) -> set[int]:
    """Return the ids of parameters that several modules hold."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _plain(name: str) -> str:
    parts = name.split(".")
    if parts and parts[0] == "module":
        parts = parts[1:]
    return ".".join(part for part in parts if part != "_orig_mod")
