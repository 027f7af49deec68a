"""Capture of what backpropagation shows a layer: its inputs H and its error signals D.

==============================  ==================================================================
:class:`HookTap`                hooks beside an unchanged layer; column sums of squares of D and H
:class:`BackwardUpdateTap`      a Linear whose backward writes its update; no gradient is formed
:class:`Sums`                   what one backward firing of a layer delivers
:class:`Sink`                   who receives sums from a :class:`HookTap`
:class:`UpdateSink`             who receives D and H from a :class:`BackwardUpdateTap`
:class:`Activity`               which axes of H and D count features and units
:func:`activity_of`             the :class:`Activity` of a module
:func:`forget_compiled_graphs`  makes functions compiled before attaching see the taps
==============================  ==================================================================

In graphs of torch.compile, :class:`~neurms.core.taps.probe.Probe` stands for the hooks.
"""

from neurms.core.taps.activity import Activity, activity_of
from neurms.core.taps.backward import BackwardUpdateTap
from neurms.core.taps.hooks import HookTap, forget_compiled_graphs
from neurms.core.taps.protocol import Sink, Sums, UpdateSink

__all__ = [
    "Activity",
    "BackwardUpdateTap",
    "HookTap",
    "Sink",
    "Sums",
    "UpdateSink",
    "activity_of",
    "forget_compiled_graphs",
]
