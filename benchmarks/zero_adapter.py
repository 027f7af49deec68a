"""Three ways to the moments of variant P: reading the gradient, probing D and H, a zero adapter.

    neurms bench zero_adapter

For signs z and y, G z is the gradient of a, and G^T y that of b, in W + a z^T + y b^T at a = 0 and
b = 0: autograd itself can carry what variant P estimates. But it carries it beside the gradient,
whose exact sums are one read away; and a weight that has no gradient moves by D^T H, for which D
and H must be caught all the same, and they give both products. Here is what each way adds to a
layer's forward and backward. Medians of interleaved rounds, fresh data, denormals flushed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.harness import RESULTS, Results
from benchmarks.interleaved import Turn, interleaved, shown
from neurms.compiled.probes import mean_squares, probe_products
from neurms.compiled.square_sums import square_sums

__all__ = ["WAYS", "AdaptedLinear", "Sums"]

WIDTHS = (256, 1024)
BATCHES = (128, 1024)
PROBES = 4

Sums = tuple[Tensor, Tensor]
"""Row sums (m,) and column sums (n,) of the squares of a gradient, float64."""


def signs(size: int, generator: torch.Generator | None = None) -> Tensor:
    """Return probes (size, PROBES) of random signs."""
    drawn = torch.randint(0, 2, (size, PROBES), generator=generator)
    return drawn.mul_(2).sub_(1).float()


class AdaptedLinear(nn.Module):
    """A layer whose weight is W + A Z^T + Y B^T, with A and B at zero.

    Args:
        weight: W, (m, n).
        right: Z, (n, k).
        left: Y, (m, k).
    """

    def __init__(self, weight: nn.Parameter, right: Tensor, left: Tensor) -> None:
        super().__init__()
        self.weight, self.right, self.left = weight, right, left
        self.a = nn.Parameter(torch.zeros(weight.size(0), right.size(1)))
        self.b = nn.Parameter(torch.zeros(weight.size(1), left.size(1)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return H (W + A Z^T + Y B^T)^T without the sum in parentheses."""
        through = linear(inputs @ self.right, self.a) + linear(inputs @ self.b, self.left)
        return linear(inputs, self.weight) + through

    def sums(self) -> Sums:
        """Return the estimates that the gradients of A and B hold."""
        assert self.a.grad is not None
        assert self.b.grad is not None
        return mean_squares(self.a.grad), mean_squares(self.b.grad)


def plain(weight: nn.Parameter, inputs: Tensor, errors: Tensor) -> None:
    """Go forward and backward, for the gradient alone."""
    linear(inputs, weight).backward(errors)


def exact(weight: nn.Parameter, inputs: Tensor, errors: Tensor) -> Sums:
    """Read the gradient once."""
    plain(weight, inputs, errors)
    assert weight.grad is not None
    (rows,), (columns,) = square_sums([weight.grad])
    return rows, columns


def probed(weight: nn.Parameter, inputs: Tensor, errors: Tensor) -> Sums:
    """Multiply D and H by probes."""
    plain(weight, inputs, errors)
    right, left = signs(weight.size(1)), signs(weight.size(0))
    rows, columns = probe_products(errors, inputs, right, left)
    return mean_squares(rows), mean_squares(columns)


def adapted(weight: nn.Parameter, inputs: Tensor, errors: Tensor) -> Sums:
    """Have autograd multiply by probes."""
    layer = AdaptedLinear(weight, signs(weight.size(1)), signs(weight.size(0)))
    layer(inputs).backward(errors)
    return layer.sums()


WAYS: dict[str, Callable[[nn.Parameter, Tensor, Tensor], Any]] = {
    "gradient alone": plain,
    "exact sums": exact,
    "probes of D and H": probed,
    "zero adapter": adapted,
}


def _turn(way: Callable[[nn.Parameter, Tensor, Tensor], Any], width: int, batch: int) -> Turn:
    weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def prepare(number: int) -> Callable[[], Any]:
        weight.grad = None
        # As in a network, where the error goes on upstream.
        inputs = torch.randn(batch, width).requires_grad_()
        errors = torch.randn(batch, width)
        return lambda: way(weight, inputs, errors)

    return prepare


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "zero_adapter.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = Results(arguments.out, {"threads": arguments.threads, "probes": PROBES})
    for width in WIDTHS:
        for batch in BATCHES:
            turns = {name: _turn(way, width, batch) for name, way in WAYS.items()}
            found = interleaved(turns, "gradient alone", rounds=arguments.rounds)
            key = f"{width}x{width} batch {batch}"
            print(f"{key}, {arguments.threads} threads\n{shown(found)}", flush=True)
            results.runs[key] = found
    results.save()


if __name__ == "__main__":
    main()
