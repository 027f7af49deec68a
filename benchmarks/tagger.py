"""Part-of-speech tags of ancient Greek and a small Transformer, as in the shared-basis paper.

Nine-place tags (word class, person, number, tense, ...), each whole tag a class. A word is the sum
of hashed embeddings of itself and of its last three and two letters; the text is cut into windows
of 32 words.
"""

from __future__ import annotations

import lzma
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpt2_model import Block

__all__ = ["BUCKETS", "LAYERS", "WIDTH", "WINDOW", "Tagger", "Text", "accuracy", "encode", "read"]

WINDOW, WIDTH, LAYERS, HEADS = 32, 128, 2, 4
BUCKETS = (8192, 4096, 1024)

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
        raise SystemExit("error: set NEURMS_DATA to the folder that holds greek_pos/train.tsv.xz")
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
