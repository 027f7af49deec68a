"""The demo's networks: a perceptron for images, a small decoder for text."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

__all__ = ["Decoder", "perceptron"]


def perceptron(features: int, width: int, classes: int = 10) -> nn.Sequential:
    """Return a multilayer perceptron features-width-width-classes with ReLU."""
    return nn.Sequential(
        OrderedDict(
            hidden1=nn.Linear(features, width),
            relu1=nn.ReLU(),
            hidden2=nn.Linear(width, width),
            relu2=nn.ReLU(),
            head=nn.Linear(width, classes),
        )
    )


class Decoder(nn.Module):
    """A language model of bytes: embeddings, blocks of causal attention and GELU, a head.

    Args:
        width: Of the residual stream.
        layers: Blocks.
        heads: Of attention, a divisor of ``width``.
        context: The longest window.
    """

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, length, 256) for tokens (batch, length)."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.first_norm(x)
        query, key, value = (
            part(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(torch.flatten(mixed.transpose(1, 2), 2))
        return x + self.down(gelu(self.up(self.second_norm(x))))  # type: ignore[no-any-return]
