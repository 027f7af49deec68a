"""Part-of-speech tags of ancient Greek by a small Transformer, as in the shared-basis paper.

Nine-place tags (word class, person, number, tense, ...), each whole tag a class. A word is the sum
of hashed embeddings of itself and of its last three and two letters; the text is cut into windows
of 32 words. Embedding and head go to AdamW at the rate that is best for Adam, as in the other
benchmarks on text.

    NEURMS_DATA=... python -m benchmarks.pos
"""

from __future__ import annotations

import argparse
import lzma
import math
import os
import statistics
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neurms
from benchmarks.gpt2_model import Block
from benchmarks.harness import RESULTS, Results
from benchmarks.language import Method, recorded, tuned

WINDOW, BATCH, WIDTH, LAYERS, HEADS = 32, 16, 128, 2, 4
BUCKETS = (8192, 4096, 1024)
STEPS, TUNE_STEPS, SEEDS = 160, 80, 3
ROOTS: dict[str, Any] = {"grafting": "rmsprop_normalized", "momentum": 0.9}
METHODS = {
    "adam": Method("adamw", (1e-3, 2e-3, 4e-3), {"weight_decay": 0.0}),
    "block_adam": Method("block_adam", (1e-3, 2e-3, 4e-3)),
    "shampoo": Method("shampoo", (3e-4, 1e-3, 3e-3), ROOTS | {"interval": 20}),
    "sketchy": Method("sketchy", (3e-4, 1e-3, 3e-3), ROOTS | {"rank": 16}),
    "shared_basis": Method("shared_basis", (3e-4, 1e-3, 3e-3), {"rank": 16}),
}

Text = tuple[Tensor, Tensor]


class Tagger(nn.Module):
    """Hashed words, learned positions, pre-norm blocks without a causal mask; logits of tags."""

    def __init__(self, tags: int) -> None:
        super().__init__()
        self.words = nn.ModuleList(nn.Embedding(size, WIDTH) for size in BUCKETS)
        self.places = nn.Embedding(WINDOW, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, causal=False) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, tags)
        for embedding in [*self.words, self.places]:
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits (batch, window, tags) for hashes (batch, window, 3)."""
        x = torch.stack([table(words[..., i]) for i, table in enumerate(self.words)]).sum(0)
        x = x + self.places(torch.arange(words.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def read(part: str) -> list[tuple[str, str]]:
    """Return (word, nine-place tag) of a part of the treebank, in the order of the text."""
    folder = os.environ.get("NEURMS_DATA")
    if folder is None:
        raise SystemExit("set NEURMS_DATA to the folder that holds greek_pos/train.tsv.xz")
    with lzma.open(Path(folder) / "greek_pos" / f"{part}.tsv.xz", "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file if line.strip()]
    return [(row[0], row[2]) for row in rows]


def encode(pairs: list[tuple[str, str]], tags: dict[str, int]) -> Text:
    """Return windows of hashes (count, window, 3) and of tags, -1 for one that training lacks."""
    pairs = pairs[: len(pairs) // WINDOW * WINDOW]
    hashes = [
        [zlib.crc32(part.encode()) % size for part, size in zip(_parts(word), BUCKETS, strict=True)]
        for word, _ in pairs
    ]
    labels = [tags.get(tag, -1) for _, tag in pairs]
    return torch.tensor(hashes).view(-1, WINDOW, 3), torch.tensor(labels).view(-1, WINDOW)


def _parts(word: str) -> tuple[str, str, str]:
    lower = word.lower()
    return lower, lower[-3:], lower[-2:]


@torch.no_grad()
def accuracy(model: nn.Module, text: Text) -> float:
    """Return the share of words with the right tag; an unknown tag counts as missed."""
    hits = [
        int((model(words).argmax(-1) == labels).sum())
        for words, labels in zip(text[0].split(64), text[1].split(64), strict=True)
    ]
    return sum(hits) / text[1].numel()


def train(
    parts: tuple[Text, Text],
    tags: int,
    method: Method,
    lr: float,
    seed: int,
    steps: int,
    lr0: float,
) -> dict[str, Any]:
    """Train once; return accuracy on the development part, the last losses and seconds."""
    torch.manual_seed(seed)
    model = Tagger(tags)
    settings = dict(method.settings, lr=lr)
    if method.rule != "adamw":
        settings |= {"fallback_lr": lr0}
    optimizer = neurms.create(method.rule, model, **settings)
    warmup = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: (t + 1) / warmup if t < warmup else max(0.0, (steps - t) / (steps - warmup)),
    )
    (words, labels), development = parts
    generator = torch.Generator().manual_seed(10_000 + seed)
    losses, start = [], time.process_time()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(words), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(words[chosen]).flatten(0, 1), labels[chosen].flatten())
        loss.backward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return {"diverged": step, "accuracy": 0.0}
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - start
    return {
        "accuracy": accuracy(model, development),
        "loss": statistics.fmean(losses[-steps // 10 :]),
        "cpu_seconds": seconds,
    }


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", default=",".join(METHODS), help="optimizers, by comma")
    parser.add_argument("--out", type=Path, default=RESULTS / "pos.json")
    arguments = parser.parse_args()
    pairs = read("train")
    tags = {tag: i for i, tag in enumerate(sorted({tag for _, tag in pairs}))}
    parts = encode(pairs, tags), encode(read("dev"), tags)
    settings = {
        "model": {"width": WIDTH, "layers": LAYERS, "hidden": 4 * WIDTH, "buckets": BUCKETS},
        "batch": BATCH,
        "window": WINDOW,
        "steps": STEPS,
        "tune_steps": TUNE_STEPS,
        "tags": len(tags),
        "train_words": len(pairs),
        "methods": recorded(METHODS),
    }
    record = Results(arguments.out, settings)
    lr0 = 0.0
    for name in dict.fromkeys(["adam", *arguments.only.split(",")]):
        method = METHODS[name]

        def missed(lr: float, n: str = name, m: Method = method, f: float = lr0) -> float:
            key = f"tune {n} lr={lr:g} steps={TUNE_STEPS}"
            run = record.run(key, partial(train, parts, len(tags), m, lr, 0, TUNE_STEPS, f))
            return 1 - float(run["accuracy"])

        lr = tuned(method.rates, missed)
        lr0 = lr if name == "adam" else lr0
        for seed in range(1, arguments.seeds + 1):
            record.run(
                f"final {name} lr={lr:g} seed={seed} steps={STEPS}",
                partial(train, parts, len(tags), method, lr, seed, STEPS, lr0),
            )


if __name__ == "__main__":
    main()
