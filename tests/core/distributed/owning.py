"""Trainings in which every matrix has an owner, beside those in which every rank does all."""

from __future__ import annotations

from typing import Any

from tests.core.distributed.trainings import train

FORMS = ("replicate", "owner")


def forms(rank: int, ranks: int, *, settings: dict[str, Any], **job: Any) -> dict[str, Any]:
    """Train once in each form."""
    return {
        form: train(rank, ranks, settings={**settings, "distribute": form}, **job) for form in FORMS
    }
