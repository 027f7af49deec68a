"""Which parameter gets which rule, and why.

Routing goes by the kind of module that owns a parameter, never by its name: hidden linear layers,
convolutions and attention projections have a units x features matrix to precondition, while
embeddings, norms, biases, tied weights and the output head do better, or can only do, with AdamW.
Recurrent weights are such matrices, and so is the parameter of which a mask or a parametrization
makes a weight. A parameter that a module of another kind holds itself is not taken for one: it may
be a table of positions or a state, and nothing tells which of its axes counts outputs.
Every choice carries its reason, so that
:meth:`~neurms.core.optimizers.base.PreconditionedOptimizer.plan` can print it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.ground.layout import Layout, default_layout, layout_of
from neurms.core.ground.owners import Owner, owners_of
from neurms.core.ground.wrappers import unwrapped

__all__ = [
    "ASKED",
    "FALLBACK",
    "Head",
    "Route",
    "RoutedModel",
    "applies_to_nothing",
    "check_patterns",
    "excluded",
    "head_of",
    "movable",
    "refuse_placeholder",
    "route_model",
    "route_tensors",
]

FALLBACK = "fallback"
Head = Literal["rule", "fallback"]

ASKED = "asked for by its group"
"""The reason of a parameter whose group names the fallback."""

_EXCLUDED = "excluded by"
_ATTENTION_MATRICES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True, eq=False)
class Route:
    """What happens to one parameter.

    Args:
        name: Qualified parameter name, the first one for a tied parameter.
        parameter: The parameter itself.
        kind: Class name of the module that owns it, ``"tensor"`` for bare parameters.
        rule: Name of the rule, or ``"fallback"`` for AdamW.
        reason: Why, in a few words.
        layout: How it is seen as units x features.
        module: The owning module, None for bare parameters.
    """

    name: str
    parameter: Tensor
    kind: str
    rule: str
    reason: str
    layout: Layout
    module: nn.Module | None = None

    @property
    def is_fallback(self) -> bool:
        """Whether AdamW takes this parameter."""
        return self.rule == FALLBACK


class RoutedModel(nn.Module):
    """Stands for a model whose parameters somebody has routed already, a Keras model's for one.

    Args:
        routes: One for each parameter.
        tap_for: Makes the tap of a layer for a rule that needs one; who brings it attaches it, too.
    """

    def __init__(
        self, routes: Sequence[Route], tap_for: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__()
        self.routes = list(routes)
        self.tap_for = tap_for


def route_tensors(named: Iterable[tuple[str, Tensor]], rule: str) -> list[Route]:
    """Route bare parameters: two axes or more get the rule, scalars and vectors the fallback."""
    routes = []
    for name, tensor in named:
        matrix = tensor.ndim >= 2
        reason = f"{tensor.ndim} axes" if matrix else f"{tensor.ndim}-D tensor: no matrix"
        if rule == FALLBACK:
            reason = ASKED
        routes.append(
            Route(
                name,
                tensor,
                "tensor",
                rule if matrix else FALLBACK,
                reason,
                default_layout(tensor),
            )
        )
    return routes


def route_model(
    model: nn.Module, rule: str, *, head: Head = "fallback", exclude: Sequence[str] = ()
) -> list[Route]:
    """Route every parameter of a model by the kind of module that owns it.

    Args:
        model: The model.
        rule: Name of the rule for matrices.
        head: What the output head (the last linear layer) gets.
        exclude: Name patterns (``fnmatch``; a module's name covers all its parameters) that are
            sent to the fallback.

    Returns:
        One route for each distinct parameter, in the order of ``model.named_parameters()``.

    Raises:
        ValueError: A pattern of ``exclude`` matches no parameter, or a parameter is lazy.
        UnsupportedTrainingError: The model is wrapped by FSDP1, or partitioned by ZeRO-3.
        TypeError: It is a Keras model.
    """
    if isinstance(model, RoutedModel):
        return model.routes
    model = unwrapped(model)
    _refuse_keras(model, rule)
    _refuse_lazy(model)
    owners = owners_of(model)
    last_linear = head_of(model)
    routes = []
    for name, parameter in model.named_parameters():
        owner, *others = owners[id(parameter)]
        module = owner.module
        chosen, reason = _choose(parameter, owner, len(others), rule)
        if module is last_linear and owner.name == "weight" and chosen == rule:
            chosen, reason = (rule, "output head") if head == "rule" else (FALLBACK, "output head")
        layout = layout_of(module, owner.name, parameter) or default_layout(parameter)
        routes.append(Route(name, parameter, type(module).__name__, chosen, reason, layout, module))
    return excluded(routes, exclude)


def _refuse_keras(model: nn.Module, rule: str) -> None:
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(model, getattr(keras, "Model", ())):
        raise TypeError(
            f"model={type(model).__name__} is a Keras model, whose layers torch does not see; "
            "compile it with an optimizer of Keras's kind: from neurms.integrations.keras import "
            f"keras_optimizer, then model.compile(optimizer=keras_optimizer({rule!r}), ...)"
        )


def _refuse_lazy(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"parameter {name!r} has no shape yet; run one batch through the model before "
                "building the optimizer"
            )
        refuse_placeholder(name, parameter)


def refuse_placeholder(name: str, parameter: Tensor) -> None:
    """Raise for a parameter whose shape is not its layer's, since its numbers lie elsewhere.

    Raises:
        UnsupportedTrainingError: DeepSpeed's ZeRO-3 or FSDP1 has partitioned it.
    """
    flat = sys.modules.get("torch.distributed.fsdp._flat_param")
    if flat is not None and isinstance(parameter, flat.FlatParameter):
        raise UnsupportedTrainingError(
            f"parameter {name!r} is a flat piece of FullyShardedDataParallel, without rows and "
            "columns; shard with torch.distributed.fsdp.fully_shard"
        )
    whole = getattr(parameter, "ds_shape", None)
    if whole is not None and tuple(whole) != tuple(parameter.shape):
        raise UnsupportedTrainingError(
            f"parameter {name!r} is a placeholder of DeepSpeed's ZeRO-3 for one of shape "
            f"{tuple(whole)}, which no rule would see; shard with "
            "torch.distributed.fsdp.fully_shard, or use DeepSpeed without ZeRO"
        )


def head_of(model: nn.Module) -> nn.Linear | None:
    """Return the output head: the last linear layer in registration order, or None."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linears[-1] if linears else None


def excluded(routes: list[Route], patterns: Sequence[str], *, every: bool = True) -> list[Route]:
    """Return ``routes`` with every parameter that a pattern names sent to the fallback.

    With ``every`` each pattern must match, see :func:`check_patterns`.
    """
    if every:
        check_patterns(routes, patterns)
    for pattern in patterns:
        routes = [
            replace(route, rule=FALLBACK, reason=f"{_EXCLUDED} {pattern!r}")
            if _matches(route.name, pattern)
            else route
            for route in routes
        ]
    return routes


def movable(route: Route, units: int, features: int) -> Route:
    """Return a route that leads to the fallback if its rule never moves so small a matrix.

    Args:
        route: A parameter's route.
        units: Fewest units that its rule can move.
        features: Fewest features.
    """
    m, n = route.layout.matrix_shape
    if route.is_fallback or (m >= units and n >= features) or not m * n:
        return route
    count, least, what = (n, features, "feature") if n < features else (m, units, "unit")
    plural = "" if count == 1 else "s"
    reason = f"{count} {what}{plural}, and {route.rule} moves matrices of at least {least}"
    return replace(route, rule=FALLBACK, reason=reason)


def _surprises(route: Route) -> bool:
    """Return whether a rule might have been expected to take a parameter."""
    expected = ("output head", "embedding", "matrices of at least")
    return route.parameter.ndim >= 2 and not any(word in route.reason for word in expected)


def applies_to_nothing(rule: str, routes: Iterable[Route]) -> str:
    """Return a warning if every parameter has gone to the fallback unasked, "" otherwise.

    Only where a matrix other than a head or an embedding is among them.
    """
    own = [route for route in routes if route.parameter.requires_grad]
    asked = (ASKED, _EXCLUDED)
    if not own or not all(r.is_fallback and not r.reason.startswith(asked) for r in own):
        return ""
    # A model of one layer has but a head, which every rule leaves to AdamW: no surprise.
    if not any(_surprises(route) for route in own):
        return ""
    reasons = sorted({route.reason for route in own})[:3]
    return (
        f"{rule} applies to 0 of {len(own)} parameters ({'; '.join(reasons)}): AdamW takes all of "
        "them at fallback_lr, and lr only scales that rate; choose another rule, or pass the "
        "matrices themselves (named_parameters()) to have them under the rule"
    )


def check_patterns(routes: Iterable[Route], patterns: Sequence[str]) -> None:
    """Raise unless ``patterns`` are name patterns each of which matches one of ``routes``."""
    if isinstance(patterns, str):
        raise TypeError(
            f"exclude={patterns!r} must be a sequence of patterns; write ({patterns!r},)"
        )
    names = [route.name for route in routes]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(
                f"exclude={pattern!r} matches no parameter; names look like: {', '.join(names[:5])}"
            )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _choose(parameter: Tensor, owner: Owner, others: int, rule: str) -> tuple[str, str]:
    module, name = owner.module, owner.name
    if others:
        return FALLBACK, f"tied: shared by {others + 1} modules"
    made = ", parametrized" if owner.made == "parametrized" else ""
    if parameter.ndim < 2:
        vector = f"{parameter.ndim}-D tensor: no matrix"
        return FALLBACK, f"bias{made}" if name == "bias" else vector
    if not owner.whole:
        return FALLBACK, "scales of a parametrized weight"
    kind = _kind(module, name, parameter)
    if kind == "embedding":
        return FALLBACK, kind
    if kind:
        return rule, f"{kind}, {owner.made}" if owner.made else kind
    return (
        FALLBACK,
        f"{type(module).__name__}.{name}: not a linear, convolution, recurrent or attention weight",
    )


def _kind(module: nn.Module, name: str, parameter: Tensor) -> str:
    """Return what a parameter of two axes or more does in its module, "" where that is unknown."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, nn.MultiheadAttention) and name in _ATTENTION_MATRICES:
        return "attention projection"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and name.startswith("weight_"):
        return "recurrent weight"
    if layout_of(module, name, parameter) is None:
        return ""
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    return "convolution" if convolution else "hidden linear layer"
