"""LoRA in a few lines: every linear layer of a model's blocks frozen, beside it a product of two.

Plain modules, so that the benchmark needs no library for it.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Adapted", "adapt"]


class Adapted(nn.Module):
    """``base(x) + scale up(down(x))`` with the base frozen."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (..., units) for ``x`` (..., features)."""
        adapted: Tensor = self.base(x) + self.scale * self.up(self.down(x))
        return adapted


def adapt(model: nn.Module, rank: int = 16, scale: float = 2.0) -> nn.Module:
    """Freeze a model and put adapters beside the linear layers of its ``blocks``; return it."""
    model.requires_grad_(False)
    for parent in list(model.get_submodule("blocks").modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and not isinstance(parent, Adapted):
                setattr(parent, name, Adapted(layer, rank, scale))
    return model
