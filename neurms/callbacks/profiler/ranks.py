"""Statistics of one step, summed over the ranks of a distributed training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neurms.callbacks.profiler.probe import LayerProbe
from neurms.core.ground.ranks import Ranks, world_size
from neurms.core.unitwise.statistics import synchronize

__all__ = ["sum_over_ranks"]


def sum_over_ranks(probes: Sequence[LayerProbe], device: torch.device) -> None:
    """Make every probe's sums those of all ranks; every rank must call it with the same layers."""
    ranks = world_size()
    if ranks == 1:
        return
    layouts = [probe.subject.layout for probe in probes]
    sizes = [(layout.units, layout.features) for layout in layouts]
    reduction, weight = probes[0].loss_reduction, probes[0].subject.weight
    synchronize(
        [probe.pending for probe in probes], sizes, reduction, weight, Ranks((None,), ranks)
    )
    for probe in probes:
        _add_products(probe, ranks, device)


def _add_products(probe: LayerProbe, ranks: int, device: torch.device) -> None:
    # A rank whose batch left the layer out must still take part.
    held = torch.tensor(float(probe.products is not None), device=device)
    torch.distributed.all_reduce(held)
    if not float(held):
        return
    if probe.products is None:
        probe.products = probe.empty_products()
    torch.distributed.all_reduce(probe.products)
    if probe.loss_reduction == "mean":
        probe.products /= float(ranks * ranks)
