"""Comparisons that hold up to a sceptical reader: the rules of ``benchmarks/README.md`` as code.

``space`` says what a search may try and ``search`` tries it; ``design`` fixes the numbers of a
comparison before it runs; ``contest`` runs it; ``ledger`` reads it back row by row, ``rules`` says
which rules a results file breaks and ``verdicts`` what its rows show. ``entrants`` lists the
methods, ``text`` and ``images`` the tasks.
"""
