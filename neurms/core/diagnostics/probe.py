"""Diagnostics of the premises that the methods rest on, measured beside any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from neurms.compiled.backends import validate_backend
from neurms.core.diagnostics.factorization import factor_correlation
from neurms.core.ground.errors import check_choice
from neurms.core.routing import Route
from neurms.core.structures.base import Context, Moments
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.taps.accumulation import graph_task
from neurms.core.taps.hooks import HookTap, forget_compiled_graphs
from neurms.core.taps.protocol import Sums
from neurms.core.unitwise.layers import neurms_routes
from neurms.core.unitwise.rule import LossReduction
from neurms.core.unitwise.statistics import PendingSums

__all__ = ["FactorizationProbe"]


class FactorizationProbe:
    """How faithful the factored second moment is, layer by layer: the correlation rho.

    NeuRMS reads the size of a gradient's entries off its margins, G_ij^2 ~ v_i u_j. The probe keeps
    two moving averages of its own,

        v_i <- beta v_i + (1 - beta) mean_rows(D_i^2)
        u_j <- beta u_j + (1 - beta) mean_rows(H_j^2)

    and :meth:`rho` gives Pearson's correlation over all ij of G_ij^2 and v_i u_j, without forming
    v u^T. It only observes: the optimizer may be any, and trajectories do not change.

    Averages move once for each optimizer step. The probe notices a step by gradients that are None
    again when the next backward pass begins, as ``zero_grad()`` leaves them; micro-batches in
    between are summed. A loop that keeps gradient tensors (``set_to_none=False``) calls
    :meth:`commit` itself.

    Args:
        model: The model; every trainable, untied Linear and convolution is probed.
        beta: Decay of the averages.
        loss_reduction: Whether the loss is a ``"mean"`` or a ``"sum"`` over rows, which matters
            only if batches differ in size.
        loss_scale: Callable that returns a GradScaler's current scale, or None.
        exclude: Name patterns of layers to leave out.
        backend: How the reductions run.

    Raises:
        ValueError: ``beta``, ``loss_reduction`` or ``backend`` is out of range, a pattern matches
            nothing, or no layer of the model can be probed.

    Reference:
        NeuRMS draft, diagnostic rho. The correlation is the same whatever factor v and u carry, so
        there is no bias correction. On several ranks each one sees its own rows only.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)
        ... )
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with FactorizationProbe(model) as probe:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(16, 8)).square().mean().backward()
        ...         optimizer.step()
        ...     rho = probe.rho()
        >>> list(rho)
        ['0', '2']
    """

    def __init__(
        self,
        model: nn.Module,
        beta: float = 0.99,
        *,
        loss_reduction: LossReduction = "mean",
        loss_scale: Callable[[], float] | None = None,
        exclude: Sequence[str] = (),
        backend: str = "auto",
    ) -> None:
        # No bias correction: the correlation is the same whatever factor v and u carry.
        self.structure = UnitFeatureDiagonal(beta=beta, factored=True)
        self.loss_reduction: LossReduction = check_choice(
            "loss_reduction", loss_reduction, ("mean", "sum")
        )
        self.loss_scale = loss_scale
        self.backend = validate_backend(backend)
        routes = neurms_routes(model, type(self).__name__, "rule", exclude)
        self._layers = {
            route.name.removesuffix(".weight"): _ProbedLayer(route, self)
            for route in routes
            if not route.is_fallback and route.parameter.ndim >= 2
        }

    def attach(self) -> Self:
        """Put the taps in place; again does nothing. Attach before NeuRMS's variant B is made.

        B replaces D on its way, and taps see D in the reverse order of their making; the D that
        belongs to B's gradient is the one that B has scaled.
        """
        for layer in self._layers.values():
            layer.tap.attach()
        forget_compiled_graphs()
        return self

    def detach(self) -> None:
        """Remove the taps; averages stay readable."""
        for layer in self._layers.values():
            layer.tap.detach()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *error: object) -> None:
        self.detach()

    def commit(self) -> None:
        """Move what was seen since the last step into the averages."""
        for layer in self._layers.values():
            layer.commit()

    def rho(self) -> dict[str, float]:
        """Return each layer's correlation of G^2 with v u^T; nothing changes.

        Call it between the backward pass and ``zero_grad()``. G is ``.grad`` as it is then, and
        what was seen since the last step counts as already averaged in.

        Returns:
            Layer name -> rho in [-1, 1], NaN where one side is constant. Layers that have no
            gradient (frozen, unused, or updated inside backward) or were never seen are left out.
        """
        found = {}
        for name, layer in self._layers.items():
            if layer.weight.grad is not None and (moments := layer.averaged()) is not None:
                rho = factor_correlation(
                    layer.weight.grad, layer.route.layout, *moments, self.backend
                )
                found[name] = float(rho)
        return found


class _ProbedLayer:
    """The sink of one layer's tap: pending sums and the two averages."""

    def __init__(self, route: Route, probe: FactorizationProbe) -> None:
        assert route.module is not None
        self.route = route
        self.weight = route.parameter
        self.tap = HookTap(route.module, self.weight, self, features=True, backend=probe.backend)
        self._probe = probe
        self._pending = PendingSums()
        self._averages: tuple[Tensor, Tensor] | None = None
        self._task: int | None = None

    def add(self, sums: Sums) -> None:
        """Take one firing; the first one after a step closes the window before it."""
        task = graph_task()
        if task != self._task and self.weight.grad is None:
            self.commit()
        self._task = task
        self._pending.add(sums)

    def rescale(self, sums: Sums) -> Tensor | None:
        """Leave D alone."""
        return None

    def loss_scale(self) -> float | None:
        """Return the factor that the loss carries."""
        return None if self._probe.loss_scale is None else float(self._probe.loss_scale())

    def averaged(self) -> tuple[Tensor, Tensor] | None:
        """Return v and u with the pending sums averaged in, None before the first backward."""
        moments = self._pending.moments(self._probe.loss_reduction)
        # A window that overflowed would stay in the averages for good.
        if not (_complete(moments) and self._pending.is_finite()):
            return self._averages
        assert moments.units is not None
        assert moments.features is not None
        v, u = self._averages or (
            torch.zeros_like(moments.units),
            torch.zeros_like(moments.features),
        )
        state = {"v": v.clone(), "u": u.clone()}
        self._probe.structure.observe(self.weight, state, Context(1, moments=moments))
        return state["v"], state["u"]

    def commit(self) -> None:
        """Make the averages of now those that the next window starts from."""
        self._averages = self.averaged()
        self._pending.clear()


def _complete(moments: Moments) -> bool:
    return moments.units is not None and moments.features is not None
