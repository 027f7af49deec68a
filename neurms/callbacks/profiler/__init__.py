"""The profiler: measures what each layer costs and whether its statistics hold.

==============================  ==================================================================
:class:`Profiler`               the engine, beside any torch optimizer
:func:`profile`                 the same for plain loops (``neurms.profile``)
==============================  ==================================================================

What it found is read in :mod:`neurms.report`.
"""

from neurms.callbacks.profiler.engine import Profiler, profile

__all__ = ["Profiler", "profile"]
