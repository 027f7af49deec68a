"""``neurms plan``: which rule each parameter of somebody's model would get."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from neurms.cli.errors import UsageError
from neurms.cli.functions import model_from
from neurms.core.ground.errors import meant
from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.plan import Plan
from neurms.core.optimizers.registry import available, create

__all__ = ["as_json", "plan_of", "print_plan"]


def plan_of(reference: str, optimizer: str) -> Plan:
    """Return an optimizer's plan for a model.

    Args:
        reference: ``module:function``.
        optimizer: A name of this library's own rules.

    Raises:
        UsageError: There is no such function, it returns no model, or the optimizer has no plan
            for it.
    """
    if optimizer not in available():
        near = meant(optimizer, available())
        names = ", ".join(available())
        raise UsageError(f"--optimizer {optimizer} is not known{near}; choose one of {names}")
    model = model_from(reference)
    try:
        made = create(optimizer, model, lr=1e-3)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{reference} makes a model without a plan; {error}") from None
    if not isinstance(made, PreconditionedOptimizer):
        raise UsageError(
            f"--optimizer {optimizer} is torch's own, which treats every parameter alike: no plan; "
            "choose a rule of this library, such as neurms or racs"
        )
    return made.plan()


def as_json(plan: Plan) -> str:
    """Return a plan for machines: its rows, and the total of their bytes."""
    rows = [asdict(row) for row in plan]
    return json.dumps({"parameters": rows, "state_bytes": plan.state_bytes}, indent=1)


def print_plan(plan: Plan) -> None:
    """Print a plan; in a terminal that is too narrow for it, with names and reasons folded."""
    console = Console()
    text = str(plan)
    if not console.is_terminal or max(map(len, text.splitlines())) <= console.width:
        print(text)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("parameter", "rule", "reason", "shape"):
        table.add_column(heading, overflow="fold")
    table.add_column("state bytes", justify="right", overflow="fold")
    for row in plan:
        shape = "x".join(map(str, row.shape)) or "()"
        table.add_row(row.name, row.rule, row.reason, shape, f"{row.state_bytes:,}")
    table.add_row("total", "", "", "", f"{plan.state_bytes:,}")
    console.print(table, markup=False, highlight=False)
