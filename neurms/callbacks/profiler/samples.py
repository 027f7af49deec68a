"""What one profiled step and one profiled run are written down as."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import nn

from neurms.callbacks.profiler.optimizer_view import OptimizerView
from neurms.callbacks.profiler.probe import LayerProbe, Values
from neurms.core.ground.ranks import world_size

__all__ = ["FORECAST", "descriptions", "environment", "layer_values", "memory_forecast"]

Totals = Mapping[tuple[str, Hashable], float]

FORECAST = ("neurms", "rmnp", "racs", "alice", "shared_basis", "muon", "soap", "adamw")
"""The rules whose state a report forecasts."""

_SPANS = ("forward", "backward", "reduce", "scale", "update", "bookkeeping")


def layer_values(
    probe: LayerProbe, view: OptimizerView, totals: Totals, measured: Values, norm: float | None
) -> Values:
    """Return what one step shows of a layer: times, statistics, state.

    Args:
        probe: The layer's probe, still in its window.
        view: The optimizers, after their step.
        totals: Microseconds by kind of span and layer.
        measured: The layer's statistics, taken before the step.
        norm: The norm-growth limiter's norm before the step, or None.
    """
    name, subject = probe.subject.name, probe.subject
    values: Values = {f"{kind}_us": totals.get((kind, name), 0.0) for kind in _SPANS}
    # A foreign optimizer's step has no parts.
    values["update_us"] += totals.get(("step", name), 0.0)
    values["gemm_us"] = probe.gemm_us()
    values |= measured
    gradient = subject.weight.grad if probe.gradient is None else probe.gradient
    found = view.dominance(subject, gradient)
    if found is not None:
        values["dominance"], values["dominance_of"] = list(found[0]), found[1]
    values["clipped_units"] = view.clipped_units(subject.weight)
    values["subspace_energy"] = view.kept_energy(subject, gradient)
    values["limiter_hit"] = view.limiter_hit(subject.weight, norm)
    values["state_bytes"] = view.state_bytes(subject.parameters)
    return values


def descriptions(probes: Sequence[LayerProbe], view: OptimizerView) -> dict[str, Values]:
    """Return what does not change from step to step, by layer."""
    found: dict[str, Values] = {}
    for probe in probes:
        subject, layout = probe.subject, probe.subject.layout
        found[subject.name] = {
            "kind": subject.kind,
            "shape": list(subject.weight.shape),
            "units": layout.units,
            "features": layout.features,
            "matrix_shape": list(layout.matrix_shape),
            "taps": layout.taps,
            "rule": view.rule_of(subject.weight),
            "variant": view.variant_of(subject.weight),
            "predicted_state_bytes": view.predicted_bytes(subject.parameters),
        }
    return found


def environment(device: torch.device) -> Values:
    """Return where a run takes place."""
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "ranks": world_size(),
        "torch": torch.__version__,
    }


def memory_forecast(model: nn.Module) -> dict[str, int]:
    """Return the state bytes that the best-known rules would take for a model, by name."""
    from neurms.core.optimizers.memory import memory_report

    forecast = {}
    for name in FORECAST:
        # A rule that has nothing to do in this model has no forecast.
        with suppress(TypeError, ValueError):
            forecast[name] = memory_report(model, name).state_bytes
    return forecast
