"""Write a structure of your own: matrices in, matrices out; the rest comes with the recipe."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import neurms
from neurms.core.transforms.safeguards import NormGrowthLimiter


@dataclass(frozen=True)
class FeatureMeans(neurms.Structure):
    """Q (x) I: every feature's gradient divided by a running RMS of that feature's gradient.

    Args:
        beta: Decay of the mean squares.
        eps: Added to a mean square before its root.
    """

    beta: float = 0.9
    eps: float = 1e-12

    def init(self, matrix: Tensor) -> dict[str, Tensor]:
        # Every tensor of the state starts with the matrix's batch axes: (..., m, n) -> (..., n).
        return {"q": matrix.new_zeros((*matrix.shape[:-2], matrix.shape[-1]))}

    def observe(self, gradient: Tensor, state: dict[str, Tensor], context: neurms.Context) -> None:
        state["q"].lerp_(gradient.square().mean(dim=-2), 1 - self.beta)

    def precondition(
        self, gradient: Tensor, state: dict[str, Tensor], context: neurms.Context
    ) -> Tensor:
        corrected = state["q"] / (1 - self.beta**context.step)
        return gradient * (corrected + self.eps).rsqrt().unsqueeze(-2)


@neurms.register
class FeatureRMS(neurms.PreconditionedOptimizer):
    """The optimizer around it: routing, AdamW for the rest, checks, checkpoints, memory plan."""

    rule = "feature_rms"

    def __init__(
        self, params: Any, lr: float = 1e-3, beta: float = 0.9, gamma: float = 1.1, **common: Any
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "gamma": gamma}, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> neurms.Recipe:
        # What composes with any structure is not written again: here, a bound on growing steps.
        return neurms.Recipe((FeatureMeans(settings["beta"]), NormGrowthLimiter(settings["gamma"])))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    inputs, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(inputs / 16.0).float(), torch.tensor(targets)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    # By its name, as Lightning's optimizer_config and keras_optimizer take it, too.
    optimizer = neurms.create("feature_rms", model, lr=arguments.lr)
    print(optimizer.plan())
    for _ in range(60 if arguments.quick else arguments.steps):
        batch = torch.randint(1400, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        right = model(images[1400:]).argmax(1) == labels[1400:]
    print(f"accuracy {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
