"""Find a first learning rate for a new rule: as far a journey as AdamW's, then a few around it."""

import argparse
import copy
import statistics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import neurms


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", default="neurms", help="a name from neurms.available()")
    parser.add_argument("--adamw-lr", type=float, default=2e-3, help="the rate that works now")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def trained(
    model: nn.Module, name: str, lr: float, steps: int, images: Tensor, labels: Tensor
) -> nn.Module:
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    optimizer = neurms.create(name, model, lr=lr)
    for _ in range(steps):
        batch = torch.randint(1400, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model


def journey(before: nn.Module, after: nn.Module) -> float:
    """Return the RMS distance that the weights of the middle layer (by distance) have moved."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return statistics.median((b - a).square().mean().sqrt().item() for a, b in pairs if a.ndim > 1)


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    inputs, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(inputs / 16.0).float(), torch.tensor(targets)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )

    def after(name: str, lr: float, steps: int) -> nn.Module:
        return trained(model, name, lr, steps, images, labels)

    # Few steps, and a rate too small to matter: the distance is then in proportion to it.
    short, small = 10, arguments.adamw_lr / 10
    wanted = journey(model, after("adamw", small, short)) * 10
    lr = small * wanted / journey(model, after(arguments.optimizer, small, short))

    steps = 30 if arguments.quick else arguments.steps
    candidates = [("adamw", arguments.adamw_lr)]
    candidates += [(arguments.optimizer, lr * factor) for factor in (1 / 3, 1.0, 3.0)]
    for name, rate in candidates:
        logits = after(name, rate, steps)(images[1400:])
        loss = nn.functional.cross_entropy(logits, labels[1400:]).item()
        right = (logits.argmax(1) == labels[1400:]).float().mean().item()
        print(f"{name:12} lr {rate:.2e}  validation loss {loss:.3f}  accuracy {right:.1%}")


if __name__ == "__main__":
    main()
