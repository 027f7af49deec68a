"""NeuRMS by its formulas, in float64, layer by layer: what the optimizer is held against.

Nothing of the library is used. D comes from autograd at each layer's output, H is unfolded by hand
(one gather per kernel position), G = D^T H is multiplied out, and the update follows the paper's
algorithm line by line.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.core.unitwise.root_truth import inverse_root

DEFAULTS: dict[str, Any] = {
    "lr": 0.01,
    "variant": "U",
    "beta": 0.99,
    "eps": 1e-8,
    "v_min": 1e-12,
    "s_min": 0.0,
    "s_max": 100.0,
    "c_min": 0.0,
    "c_max": 100.0,
    "bias_correction": True,
    "momentum": 0.0,
    "momentum_coupling": "gradient",
    "agc": None,
    "clip": "absolute",
    "kappa": 10.0,
    "loss_reduction": "mean",
    "weight_decay": 0.0,
    "normalize": None,
}


class _Watch(torch.autograd.Function):
    """The identity whose backward shows D to a function, which may replace it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, look: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.look = look
        return output.clone()

    @staticmethod
    def backward(ctx: Any, errors: Tensor) -> tuple[Tensor, None]:
        return ctx.look(errors), None


@dataclass
class Layer:
    """One layer's state and what its last pass showed."""

    module: nn.Module
    v: Tensor | float = 0.0
    u: Tensor | float = 0.0
    t: int = 0
    velocities: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[str, list[Tensor]] = field(default_factory=dict)
    inputs: Tensor | None = None
    errors: Tensor | None = None
    sent: Tensor | None = None
    scaled: dict[str, Tensor] = field(default_factory=dict)


class Truth:
    """Trains a float64 copy of a model by the formulas.

    Args:
        model: Copied; its Linear and convolution layers are under the rule, each used once.
        settings: NeuRMS's.
    """

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        self.settings = {**DEFAULTS, **settings}
        self.model = copy.deepcopy(model).double()
        self.layers = {
            name: Layer(module)
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
        }
        self.input_gradient: Tensor | None = None

    def step(
        self, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], x: Tensor, y: Tensor
    ) -> None:
        """Take one step on one batch."""
        x = x.double().requires_grad_()
        handles = [
            layer.module.register_forward_hook(self._watcher(layer))
            for layer in self.layers.values()
        ]
        value = loss(self.model, x, y)
        for handle in handles:
            handle.remove()
        (self.input_gradient,) = torch.autograd.grad(value, x)
        for layer in self.layers.values():
            self._update(layer)

    def _watcher(self, layer: Layer) -> Callable[..., Tensor]:
        def look(errors: Tensor) -> Tensor:
            layer.errors = layer.sent = errors
            if self.settings["variant"] == "B":
                self._observe(layer)
                layer.sent = _along(self._factors(layer)[0], errors, layer.module) * errors
            return layer.sent

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            layer.inputs = args[0].detach()
            return _Watch.apply(output, look)

        return hook

    def _observe(self, layer: Layer) -> None:
        """Advance v and u by the batch's per-row mean squares."""
        errors, inputs = (_rows(t, layer.module) for t in (layer.errors, layer.inputs))
        per_row = errors * (len(errors) if self.settings["loss_reduction"] == "mean" else 1)
        beta = self.settings["beta"]
        layer.v = beta * layer.v + (1 - beta) * per_row.square().mean(0)
        layer.u = beta * layer.u + (1 - beta) * inputs.square().mean(0)
        layer.t += 1

    def _factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        p = self.settings
        correction = 1 - p["beta"] ** layer.t if p["bias_correction"] else 1.0
        factors = []
        for moment, low, high in (
            (layer.v, p["s_min"], p["s_max"]),
            (layer.u, p["c_min"], p["c_max"]),
        ):
            root = inverse_root(moment / correction, p["eps"], p["v_min"])
            if p["clip"] == "relative":
                median = root.sort().values[(len(root) - 1) // 2]
                low, high = median / p["kappa"], median * p["kappa"]
            factors.append(root.clip(low, high))
        return factors[0], factors[1]

    @torch.no_grad()
    def _update(self, layer: Layer) -> None:
        p, variant = self.settings, self.settings["variant"]
        if variant != "B":
            self._observe(layer)
        s, c = self._factors(layer)
        c = c if variant == "F" else torch.ones_like(c)
        gradients = {"weight": weight_gradient(layer.module, layer.inputs, layer.sent)}
        if layer.module.bias is not None:
            gradients["bias"] = _rows(layer.sent, layer.module).sum(0)
        for name, gradient in gradients.items():
            parameter = getattr(layer.module, name)
            scale = _outer(s, c, layer.module) if name == "weight" else s
            update = gradient if variant == "B" else gradient * scale
            layer.scaled[name] = update
            if p["momentum"]:
                velocity = p["momentum"] * layer.velocities.get(name, 0.0) + update
                layer.velocities[name] = velocity
                coupled = p["momentum_coupling"] == "gradient+velocity"
                update = velocity * scale if coupled else velocity
            if p["normalize"]:
                seen = layer.lengths.setdefault(name, [])
                seen.append(update.square().mean().sqrt())
                ages = range(len(seen) - 1, -1, -1)
                total = sum(0.9**age * r for age, r in zip(ages, seen, strict=True))
                update = update / (total / sum(0.9**age for age in ages))
            if p["agc"] is not None and name == "weight":
                update = _row_clipped(update, parameter, p["agc"], layer.module)
            if name == "weight":
                parameter.mul_(1 - p["lr"] * p["weight_decay"])
            parameter.sub_(p["lr"] * update)


def weight_gradient(module: nn.Module, inputs: Tensor, errors: Tensor) -> Tensor:
    """Return G = D^T H, H unfolded by hand."""
    if isinstance(module, nn.Linear):
        return _rows(errors, module).T @ _rows(inputs, module)
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    # A transposed convolution is a convolution from its output to its input.
    wide, narrow = (errors, inputs) if transposed else (inputs, errors)
    columns = torch.stack(list(_gathers(wide, narrow.shape[2:], module)), dim=2)
    groups = module.groups
    columns = columns.unflatten(1, (groups, -1)).flatten(4)
    narrow = narrow.unflatten(1, (groups, -1)).flatten(3)
    product = torch.einsum("bgol,bgitl->goit", narrow, columns)
    return product.reshape(module.weight.shape)


def _gathers(wide: Tensor, positions: torch.Size, module: nn.Module) -> Iterator[Tensor]:
    padding = [width for width in reversed(module.padding) for _ in range(2)]
    padded = F.pad(wide, padding)
    for offset in itertools.product(*(range(size) for size in module.kernel_size)):
        taken = padded
        for axis, start in enumerate(offset):
            first, stride = start * module.dilation[axis], module.stride[axis]
            index = first + stride * torch.arange(positions[axis])
            # An output padding makes a transposed convolution's output shorter than its reach.
            short = int(index.max()) + 1 - taken.shape[axis + 2]
            if short > 0:
                widths = [0] * (2 * (taken.ndim - axis - 3)) + [0, short]
                taken = F.pad(taken, widths)
            taken = taken.index_select(axis + 2, index)
        yield taken


def _rows(tensor: Tensor, module: nn.Module) -> Tensor:
    """Return (rows, channels)."""
    channels_last = tensor if isinstance(module, nn.Linear) else tensor.movedim(1, -1)
    return channels_last.reshape(-1, channels_last.shape[-1])


def _along(factors: Tensor, errors: Tensor, module: nn.Module) -> Tensor:
    if isinstance(module, nn.Linear):
        return factors
    return factors.reshape(1, -1, *[1] * (errors.ndim - 2))


def _outer(s: Tensor, c: Tensor, module: nn.Module) -> Tensor:
    """Return s_i c_j in the shape of the weight, entry by entry."""
    scale = torch.empty_like(module.weight)
    if isinstance(module, nn.Linear):
        return s[:, None] * c[None, :]
    units, features = len(s) // module.groups, len(c) // module.groups
    for i, j in itertools.product(range(scale.shape[0]), range(scale.shape[1])):
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            scale[i, j] = c[i] * s[(i // features) * units + j]
        else:
            scale[i, j] = s[i] * c[(i // units) * features + j]
    return scale


def _row_clipped(update: Tensor, weight: Tensor, agc: float, module: nn.Module) -> Tensor:
    """Shorten the rows of a Linear or an ordinary convolution."""
    clipped = update.clone()
    for i in range(len(weight)):
        bound = agc * max(float(weight[i].norm()), 1e-3)
        length = float(update[i].norm())
        if length > bound:
            clipped[i] *= bound / length
    return clipped
