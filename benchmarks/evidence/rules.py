"""Which rules of ``benchmarks/README.md`` a results file breaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.evidence.design import EDITION, NETWORK_SEEDS, PERCEPTRON_SEEDS
from benchmarks.evidence.ledger import Row, rows

__all__ = ["searched", "violations"]

FALLBACK = frozenset({"fallback_lr", "fallback_momentum"})

FUSED = ("adam", "adamw", "adamw, two rates", "sgd")
"""Rules of torch that have a fused kernel."""

SEARCHED: Mapping[str, frozenset[str]] = {
    "adamw": frozenset({"lr", "momentum", "memory"}),
    "adamw, two rates": frozenset({"lr", "momentum", "memory"}) | FALLBACK,
    "sgd": frozenset({"lr", "momentum"}),
    "moments": frozenset({"lr", "memory"}) | FALLBACK,
    "racs": frozenset({"lr", "memory"}) | FALLBACK,
    "rmnp": frozenset({"lr", "momentum"}) | FALLBACK,
    "muon": frozenset({"lr", "momentum"}) | FALLBACK,
    "block_adam": frozenset({"lr", "momentum", "memory"}) | FALLBACK,
    "shampoo": frozenset({"lr", "momentum"}) | FALLBACK,
    "sketchy": frozenset({"lr", "momentum", "memory"}) | FALLBACK,
    "shared_basis": frozenset({"lr", "momentum"}) | FALLBACK,
    "neurms": frozenset({"lr", "memory"}),
    "neurms, normalized": frozenset({"lr", "memory"}),
}
"""What the search of a rule has to vary, by the rule's name."""


def searched(rule: str, settings: Mapping[str, Any]) -> frozenset[str]:
    """Return what the search of a rule has to vary, with what is fixed of it."""
    required = SEARCHED.get(rule, frozenset({"lr"}))
    if settings.get("moments") == "average":
        # Its one average is the momentum's, as RMNP's.
        required = required - {"memory"} | {"momentum"}
    return required


def violations(content: Mapping[str, Any]) -> list[str]:
    """Return what a results file breaks, a sentence each; none where it holds to the rules."""
    design = content["settings"].get("design")
    if design is None or design.get("edition") != EDITION:
        return [f"it has no design of edition {EDITION}"]
    found = list(_design(design))
    for row in rows(content):
        found += [f"{row.name}: {what}" for what in _row(row)]
    for key, run in content["runs"].items():
        found += [f"{key}: {what}" for what in _run(design, run)]
    return found


def _design(design: Mapping[str, Any]) -> Iterator[str]:
    if design["chosen_on"] == design["reported_on"]:
        yield "settings are chosen on the split that is reported"
    if both := set(design["seeds"]) & set(design["tuning_seeds"]):
        yield f"seeds {sorted(both)} are tuned on and reported"
    if tuple(design["seeds"]) not in (NETWORK_SEEDS, PERCEPTRON_SEEDS):
        yield f"its seeds {design['seeds']} are not those that were fixed beforehand"
    if not design["margin"] > 0:
        yield "it states no margin for what counts as level"


def _row(row: Row) -> Iterator[str]:
    required = searched(row.about["rule"], row.about["settings"])
    if missing := sorted(required - set(row.about["axes"])):
        yield f"its search leaves out {missing}"
    if row.about["rule"] in ("adamw", "adamw, two rates", "adam", "sgd") and not row.about[
        "settings"
    ].get("fused"):
        yield "torch's fused kernel is not used"
    if not row.reported:
        return
    if len(row.trials) != row.design["trials"]:
        yield f"{len(row.trials)} trials instead of {row.design['trials']}"
    for settings, runs in row.trials.items():
        if set(runs) != set(row.design["tuning_seeds"]):
            yield f"{dict(settings)} was tried with seeds {sorted(runs)}"
    if set(row.reported) != {row.chosen}:
        yield f"it reports {[dict(s) for s in row.reported]}, chosen was {dict(row.chosen)}"
    if set(row.reported.get(row.chosen, {})) != set(row.design["seeds"]):
        yield f"it reports the seeds {sorted(row.reported.get(row.chosen, {}))}"


def _run(design: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[str]:
    trial = run["kind"] == "trial"
    split = design["chosen_on"] if trial else design["reported_on"]
    if split not in run:
        yield f"it has no figure of the {split} split"
    if trial and design["reported_on"] in run:
        yield "a trial has looked at the split that is reported"
    if run.get("precision") != design["precision"]:
        yield f"its precision is {run.get('precision')}, not {design['precision']}"
    commit = run.get("commit")
    if not commit or "+" in commit:
        yield f"its commit is {commit}, not a clean one"
    if not run.get("machine"):
        yield "it does not say on which machine it ran"
