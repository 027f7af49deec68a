"""Write the list of all messages into docs/troubleshooting.md: ``python -m tools.troubleshooting``.

The page's first part is written by hand and stays; what follows the marker is made from the source.
"""

from __future__ import annotations

from collections.abc import Iterable

from tools.messages import ROOT, Message, messages, own_classes

__all__ = ["CURES", "PAGE", "cure_of", "page"]

PAGE = ROOT / "docs" / "troubleshooting.md"
MARKER = "<!-- from here on: python -m tools.troubleshooting -->"

CURES = {
    "module … has no attribute …": "see `neurms.__all__` for the public names",
    "NeuRMSCallback has no plan before": "call it in or after `trainer.fit`",
    "the native CPU kernels are not available": "`neurms doctor` shows why; g++ cures it",
    "is recomputed by a checkpoint": 'use `update="step"` with activation checkpointing',
    "is used a second time before": 'as it says, or `update="step"`',
    "trains on … ranks": 'use `update="step"`',
    "is differentiated with create_graph=True": 'use `update="step"`',
    "has its weight's gradient asked for": 'use `update="step"`',
    "is reached by the backward of a forward": 'one forward for each backward, or `update="step"`',
    "is reached by a second backward": 'step after each backward, or `update="step"`',
    "structure=… needs weights": "choose a structure without a trust ratio or similar",
    "subspace, structure and residual all keep": "name the new structure's state otherwise",
    "two transforms of a recipe both keep": "name the new transform's state otherwise",
    "the checkpoint's settings make no optimizer": "it was saved by another version, or edited",
    "the optimizer of layer … no longer exists": "keep the optimizer alive, or `detach()` it",
    "the optimizer of these layers no longer exists": "keep the optimizer alive, or `detach()` it",
    "found no rate above 0": "pass `base_learning_rate=RATE`, as it says",
    "which still rises after": "pass `base_learning_rate=RATE`, as it says",
    "the variables belong to no layer": "leave them out, or give them another optimizer",
    "model=… has no layer to profile": "profile a model that has one",
    "… is fetched through keras.datasets": "as it says",
    "the digits data set comes with scikit-learn": "as it says",
}
"""Start of a message without a cure of its own -> what helps."""


def page() -> str:
    """Return the whole page: its hand-written part, the marker, every message."""
    by_hand = PAGE.read_text().partition(MARKER)[0]
    return f"{by_hand}{MARKER}\n\n{_listed(messages())}"


def cure_of(message: Message) -> str:
    """Return a message's own cure, else the one written here; empty if there is none."""
    own = next((cure for start, cure in CURES.items() if message.problem.startswith(start)), "")
    return message.cure or own


def _listed(found: Iterable[Message]) -> str:
    by_kind: dict[str, dict[str, Message]] = {}
    for message in found:
        by_kind.setdefault(message.kind, {}).setdefault(message.text, message)
    ours = own_classes()
    # First those that only this library raises.
    order = sorted(by_kind, key=lambda kind: (kind not in ours, kind))
    return "\n".join(_section(kind, ours.get(kind, ""), by_kind[kind].values()) for kind in order)


def _section(kind: str, about: str, found: Iterable[Message]) -> str:
    lines = [f"### {kind}", *(["", about] if about else []), ""]
    for message in sorted(found, key=lambda one: one.text):
        lines.append(f"- {_quoted(message.problem)}")
        if cure := cure_of(message):
            lines.append(f"    <br>→ {_escaped(cure) if message.cure else cure}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _escaped(text: str) -> str:
    for mark in "\\`*_<>[]":
        text = text.replace(mark, "\\" + mark)
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)}: {len(messages())} messages")
