"""Sinks that remember, and float64 truth to hold them against."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from neurms.core.taps import HookTap, Sums


class Recorder:
    """A sink that keeps what it is given."""

    def __init__(self, *, factors: Tensor | None = None, scale: Tensor | float | None = None):
        self.received: list[Sums] = []
        self.factors = factors
        self.rescaled = 0
        self.scale = scale
        # A sink belongs to an optimizer and must never be copied or pickled with a model.
        self.unpicklable = lambda: None

    def add(self, sums: Sums) -> None:
        self.received.append(sums)

    def rescale(self, sums: Sums) -> Tensor | None:
        self.rescaled += 1
        return self.factors

    def loss_scale(self) -> Tensor | float | None:
        return self.scale

    @property
    def units(self) -> Tensor:
        return torch.stack([sums.unit_square_sum for sums in self.received]).sum(0)

    @property
    def features(self) -> Tensor:
        return torch.stack([sums.feature_square_sum for sums in self.received]).sum(0)

    @property
    def rows(self) -> int:
        return sum(sums.rows for sums in self.received)


def tap(layer: nn.Module, *, features: bool = True, **sink) -> tuple[HookTap, Recorder]:
    """Attach a tap with its recorder to a layer."""
    recorder = Recorder(**sink)
    hook_tap = HookTap(layer, layer.weight, recorder, features=features)
    hook_tap.attach()
    return hook_tap, recorder


def truth(
    model: nn.Module, layer: str, loss: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (D, H) of a layer in float64 from autograd itself, on an untapped copy."""
    model = copy.deepcopy(model).double()
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: seen.append((args[0], output))
    )
    value = loss(model, x.double() if x.is_floating_point() else x)
    handle.remove()
    ((inputs, outputs),) = seen
    (errors,) = torch.autograd.grad(value, outputs)
    return errors, inputs.detach()


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Assert agreement relative to the largest entry."""
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=rtol,
        atol=rtol * float(expected.detach().abs().max()),
    )
