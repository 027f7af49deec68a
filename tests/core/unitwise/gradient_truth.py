"""Variant P by its formulas, in float64: what the optimizer is held against.

Nothing of the library is used: a layer's gradient and its bias's are put side by side as one
matrix, and the update follows the formulas line by line.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def _clipped(moments: list[float], kappa: float, one_sided: bool) -> Tensor:
    factors = [0.0 if x == 0 else x**-0.5 for x in moments]
    alive = sorted(x for x in factors if x)
    if not alive:
        return torch.zeros(len(moments), dtype=torch.float64)
    median = alive[(len(alive) - 1) // 2]
    low = 0.0 if one_sided else median / kappa
    bounded = [min(max(x, low), median * kappa) if x else 0.0 for x in factors]
    return torch.tensor(bounded, dtype=torch.float64)


def _matrix(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return a weight as units x (inputs of a group x kernel positions)."""
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        units = tensor.shape[1] * module.groups
        rows = []
        for unit in range(units):
            group, own = divmod(unit, tensor.shape[1])
            inputs = tensor.shape[0] // module.groups
            rows.append(tensor[group * inputs : (group + 1) * inputs, own].flatten())
        return torch.stack(rows)
    return tensor.flatten(1)


def _unmatrix(module: nn.Module, matrix: Tensor, like: Tensor) -> Tensor:
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        result = torch.zeros_like(like)
        inputs = like.shape[0] // module.groups
        for unit, row in enumerate(matrix):
            group, own = divmod(unit, like.shape[1])
            part = slice(group * inputs, (group + 1) * inputs)
            result[part, own] = row.view(inputs, *like.shape[2:])
        return result
    return matrix.view_as(like)


class Truth:
    """Trains a float64 copy of a model by variant P; what it does not know stays as it is.

    Args:
        model: Copied; linear layers, convolutions and attention projections are under the rule.
        lr: Learning rate.
        beta: Decay of the moments.
        kappa: Width of the clip.
        momentum: Decay of the average.
        weight_decay: Decoupled decay of weights.
        nesterov: Whether the average moves weights with the gradient once more in it.
        moments: What squares are summed up: the "gradient"'s or the moving "average"'s.
        damping: How much of their mean moments of columns are taken for.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.01,
        beta: float = 0.95,
        kappa: float = 10.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        moments: str = "gradient",
        damping: float = 0.0,
    ) -> None:
        self.nesterov, self.moments, self.damping = nesterov, moments, damping
        self.model = copy.deepcopy(model).double()
        self.lr, self.beta, self.kappa = lr, beta, kappa
        self.momentum, self.weight_decay = momentum, weight_decay
        self.state: dict[str, dict[str, Any]] = {}
        self.t = 0

    def step(self) -> None:
        """Move every layer by the gradients that its parameters hold."""
        self.t += 1
        for name, module in self.model.named_modules():
            names = [("weight", "bias"), ("in_proj_weight", "in_proj_bias")]
            # Projections of several widths share one bias, which is no column of theirs.
            names += [(f"{letter}_proj_weight", "none") for letter in "qkv"]
            for weight, bias in names:
                own = getattr(module, weight, None)
                if isinstance(own, nn.Parameter) and own.dim() > 1:
                    self._move(f"{name}.{weight}", module, own, getattr(module, bias, None))

    @torch.no_grad()
    def _move(self, name: str, module: nn.Module, w: Tensor, b: Tensor | None) -> None:
        assert w.grad is not None
        g = _matrix(module, w.grad)
        if b is not None:
            assert b.grad is not None
            g = torch.cat([g, b.grad[:, None]], 1)
        state = self.state.setdefault(name, {"q": 0.0, "s": 0.0, "m": 0.0})
        state["m"] = self.momentum * state["m"] + (1 - self.momentum) * g
        x = self.momentum * state["m"] + (1 - self.momentum) * g if self.nesterov else state["m"]
        y = x if self.moments == "average" else g
        state["q"] = self.beta * state["q"] + (1 - self.beta) * (y * y).sum(1)
        state["s"] = self.beta * state["s"] + (1 - self.beta) * (y * y).sum(0)
        q, s = (state[key] / (1 - self.beta**self.t) for key in "qs")
        total = (q.sum() + s.sum()) / 2
        damped = (s + self.damping * s.mean()) / (1 + self.damping) * (s > 0)
        how = self.kappa, self.moments == "average"
        left, right = _clipped(q.tolist(), *how), _clipped(damped.tolist(), *how)
        u = x * torch.outer(left, right) * total**0.5
        n = g.shape[1] - (b is not None)
        w.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * _unmatrix(module, u[:, :n], w))
        if b is not None:
            b.sub_(self.lr * u[:, n])
