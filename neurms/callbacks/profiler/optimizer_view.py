"""What a profiler reads off an optimizer: this library's, or anybody's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from neurms.callbacks.profiler.subjects import Subject
from neurms.core.diagnostics.dominance import Dominance, row_dominance
from neurms.core.diagnostics.unit_statistics import limiter_hit, subspace_energy
from neurms.core.low_rank.extension import LowRank, flips
from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.plan import meta_like, tensor_bytes
from neurms.core.structures.base import Context
from neurms.core.structures.shared_basis import SharedBasisBlocks
from neurms.core.unitwise.scale_summary import MomentLayer, at_bounds
from neurms.core.unitwise.statistics import PendingSums
from neurms.core.unitwise.tapped import TappedLayer

__all__ = ["OptimizerView"]

_MOMENTA = ("momentum", "momentum_buffer", "exp_avg")


class OptimizerView:
    """Read-only questions to the optimizers of a run.

    Args:
        optimizers: The optimizers; each parameter belongs to one of them at most.
        preconditioner: Iterable of the tapped layers of a
            :class:`~neurms.core.unitwise.preconditioner.GradientPreconditioner` beside them, or
            None.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], preconditioner: Iterable[TappedLayer] | None = None
    ) -> None:
        self.optimizers = list(optimizers)
        self._preconditioner = preconditioner

    @property
    def name(self) -> str:
        """Class names of the optimizers, and of what preconditions their gradients."""
        names = [type(optimizer).__name__ for optimizer in self.optimizers]
        names += ["NeuRMSCallback"] if self._preconditioner is not None else []
        return " + ".join(dict.fromkeys(names)) or "unknown"

    def _found(self, parameter: Tensor) -> tuple[Optimizer | None, Mapping[str, Any]]:
        """Return the optimizer that moves a parameter, and the group that it is in."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if any(p is parameter for p in group["params"]):
                    return optimizer, group
        return None, {}

    def optimizer_of(self, parameter: Tensor) -> Optimizer | None:
        """Return the optimizer that moves a parameter."""
        return self._found(parameter)[0]

    def group_of(self, parameter: Tensor) -> Mapping[str, Any]:
        """Return the settings that hold for a parameter."""
        return self._found(parameter)[1]

    def rule_of(self, parameter: Tensor) -> str:
        """Return the name of the rule that moves a parameter."""
        optimizer = self.optimizer_of(parameter)
        if self.tapped(parameter) is not None and not self.is_ours(parameter):
            return f"neurms + {type(optimizer).__name__}"
        if not isinstance(optimizer, PreconditionedOptimizer):
            return type(optimizer).__name__ if optimizer is not None else "none"
        return optimizer.routes[parameter].rule

    def is_ours(self, parameter: Tensor) -> bool:
        """Whether the parameter's optimizer tells of its spans itself."""
        return isinstance(self.optimizer_of(parameter), PreconditionedOptimizer)

    def tapped(self, weight: Tensor) -> TappedLayer | None:
        """Return the NeuRMS layer of a weight, whoever owns it."""
        sources = [getattr(optimizer, "layers", ()) for optimizer in self.optimizers]
        for source in (*sources, self._preconditioner or ()):
            for layer in source:
                if layer.weight is weight:
                    found: TappedLayer = layer
                    return found
        return None

    def variant_of(self, weight: Tensor) -> str | None:
        """Return NeuRMS's variant for a weight, None if it is not under NeuRMS."""
        layer = self.tapped(weight)
        if layer is not None:
            return layer.rule.variant
        return "P" if self._of_moments(weight) is not None else None

    def _of_moments(self, weight: Tensor) -> MomentLayer | None:
        """Return the variant-P matrix of a weight that has taken a step, whoever owns it."""
        sources = [*self.optimizers, self._preconditioner]
        found = (
            layer
            for source in sources
            for layer in getattr(source, "moment_layers", tuple)()
            if layer.weight is weight
        )
        return next(found, None)

    # ---------------------------------------------------------------- statistics

    @torch.no_grad()
    def foreseen_moments(
        self, weight: Tensor, pending: PendingSums
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return NeuRMS's v (m,) and u (n,) as the step that is due will leave them.

        Args:
            weight: The weight.
            pending: What was observed since the last step, summed over ranks.

        Returns:
            None where the optimizer keeps no such moments, or for variant B, whose v describes D
            before it was scaled while the gradient is made of what came out; u is None but for F.
        """
        layer = self.tapped(weight)
        if layer is None or layer.rule.upstream:
            return None
        structure, moments = layer.rule.structure, layer.moments(pending)
        if moments.units is None:
            return None
        state, step = layer.state, int(layer.state.get("step", 0)) + 1
        sights = {"v": moments.units, "u": moments.features if structure.factored else None}
        # A copy, which the structure moves as it will move its own.
        blended = {
            key: state[key].to(sight, copy=True) if key in state else torch.zeros_like(sight)
            for key, sight in sights.items()
            if sight is not None
        }
        structure.observe(weight, blended, Context(step, moments=moments))
        found = {key: moment / structure.divisor(step) for key, moment in blended.items()}
        v, u = found["v"], found.get("u")
        if layer.heads:
            v = v.repeat_interleave(layer.route.layout.units // layer.heads)
        return v, u

    @torch.no_grad()
    def clipped_units(self, weight: Tensor) -> int | None:
        """Return how many unit factors stand at a bound, None where there are no factors."""
        matrix = self._of_moments(weight)
        if matrix is not None:
            return int(matrix.sides()[0].clipped.sum())
        layer = self.tapped(weight)
        if layer is None or not layer.state.get("step"):
            return None
        structure = layer.rule.structure
        s, _ = layer.factors()
        return int(at_bounds(s, structure, (structure.s_min, structure.s_max)).sum())

    @torch.no_grad()
    def dominance(self, subject: Subject, gradient: Tensor | None) -> tuple[Dominance, str] | None:
        """Return the row dominance of the momentum, or of the gradient where none is kept.

        Returns:
            The statistics and ``"momentum"`` or ``"gradient"``; None without either.
        """
        state = self.state_of(subject.weight)
        for key in _MOMENTA:
            momentum = state.get(key)
            matrix = _in_shape(momentum, subject)
            if matrix is not None:
                found = row_dominance(matrix)
                return None if found is None else (found, "momentum")
        matrix = _in_shape(gradient, subject)
        found = None if matrix is None else row_dominance(matrix)
        return None if found is None else (found, "gradient")

    @torch.no_grad()
    def kept_energy(self, subject: Subject, gradient: Tensor | None) -> float | None:
        """Return the share of the gradient's energy within a low-rank method's subspace."""
        matrix = _in_shape(gradient, subject)
        basis = self.state_of(subject.weight).get("basis")
        if matrix is None or not isinstance(basis, Tensor):
            return None
        for transform in self._transforms(subject.weight):
            structure = getattr(transform, "structure", transform)
            for candidate in (transform, structure):
                if isinstance(candidate, LowRank):
                    side = flips(matrix, candidate.transpose)
                    return subspace_energy(matrix, basis, on_features=side)
                if isinstance(candidate, SharedBasisBlocks):
                    return subspace_energy(matrix, basis, on_features=True)
        return None

    def limiter_norm(self, weight: Tensor) -> float | None:
        """Return a norm-growth limiter's last norm, None where there is no limiter."""
        phi = self.state_of(weight).get("phi")
        return float(phi) if isinstance(phi, Tensor) and phi.numel() == 1 else None

    def limiter_hit(self, weight: Tensor, before: float | None) -> bool | None:
        """Return whether the limiter cut the last step; ``before`` is its norm before it."""
        after = self.limiter_norm(weight)
        gamma = self.group_of(weight).get("gamma", 1.01)
        if before is None or after is None:
            return None
        return limiter_hit(before, after, float(gamma))

    # ---------------------------------------------------------------- state

    def state_of(self, parameter: Tensor) -> Mapping[str, Any]:
        """Return a parameter's state, a preconditioner's entries included."""
        optimizer = self.optimizer_of(parameter)
        state: dict[str, Any] = dict(optimizer.state.get(parameter, {})) if optimizer else {}
        extra = getattr(self._preconditioner, "state", {})
        return {**state, **extra.get(parameter, {})}

    def state_bytes(self, parameters: Iterable[Tensor]) -> int:
        """Return the measured bytes of the parameters' state."""
        return sum(tensor_bytes(dict(self.state_of(p))) for p in parameters)

    def predicted_bytes(self, parameters: Iterable[Tensor]) -> int | None:
        """Return the bytes that this library predicts, None for other optimizers."""
        total = 0
        for parameter in parameters:
            optimizer = self.optimizer_of(parameter)
            if not isinstance(optimizer, PreconditionedOptimizer):
                return None
            route, group = optimizer.routes[parameter], self.group_of(parameter)
            total += tensor_bytes(optimizer.state_for(meta_like(parameter), route, group))
        return total

    def total_bytes(self) -> int:
        """Return the bytes of all state of all optimizers."""
        own = sum(tensor_bytes(dict(s)) for o in self.optimizers for s in o.state.values())
        extra = getattr(self._preconditioner, "state", {})
        return own + sum(tensor_bytes(state) for state in extra.values())

    def _transforms(self, weight: Tensor) -> Sequence[Any]:
        optimizer = self.optimizer_of(weight)
        if not isinstance(optimizer, PreconditionedOptimizer):
            return ()
        if optimizer.routes[weight].is_fallback:
            return ()
        return optimizer.recipe_of(self.group_of(weight)).transforms


def _in_shape(tensor: object, subject: Subject) -> Tensor | None:
    """Return a tensor of the weight's size in the units x features view, else None."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return None
    assert isinstance(tensor, Tensor)
    if tensor.shape == subject.weight.shape:
        return subject.layout.matrix(tensor.detach())
    # Recipes keep their state in the units x features view.
    return tensor.detach() if tensor.shape == subject.layout.matrix_shape else None
