"""Profiled runs, read again: rows, tables, pages, advice.

Everything here needs a run file and nothing of the training that wrote it.

==============================  ==================================================================
:class:`ProfilerReport`         rows, table, CSV, JSON, HTML, advice
:class:`LayerRow`               one layer's row
:class:`Advice`                 which rule suits a layer, and why
:class:`AdviceList`             advice on all layers, with ``apply`` for the optimizer it makes
:func:`read_run`                a run file, read back as a :class:`Run`
==============================  ==================================================================
"""

from neurms.report.advice import Advice
from neurms.report.applied import AdviceList
from neurms.report.report import ProfilerReport
from neurms.report.rows import LayerRow
from neurms.report.runs import Run, RunFileError, read_run

__all__ = ["Advice", "AdviceList", "LayerRow", "ProfilerReport", "Run", "RunFileError", "read_run"]
