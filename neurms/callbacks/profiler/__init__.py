"""The profiler: what each layer costs, whether its statistics hold, and what to do about it.

==============================  ==================================================================
:class:`Profiler`               the engine, beside any torch optimizer
:func:`profile`                 the same for plain loops (``neurms.profile``)
:class:`ProfilerReport`         rows, table, CSV, JSON, HTML, advice
:class:`LayerRow`               one layer's row
:class:`Advice`                 which rule suits a layer, and why
:func:`read_run`                a run file, read back
==============================  ==================================================================
"""

from neurms.callbacks.profiler.advice import Advice
from neurms.callbacks.profiler.engine import Profiler, profile
from neurms.callbacks.profiler.report import ProfilerReport
from neurms.callbacks.profiler.rows import LayerRow
from neurms.callbacks.profiler.runs import Run, RunFileError, read_run

__all__ = [
    "Advice",
    "LayerRow",
    "Profiler",
    "ProfilerReport",
    "Run",
    "RunFileError",
    "profile",
    "read_run",
]
