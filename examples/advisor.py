"""Let the profiler choose the rule: watch a short AdamW run, then train by its advice."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import neurms


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="steps of the training proper")
    parser.add_argument("--watch", type=int, default=60, help="steps of AdamW that are watched")
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    batch = torch.randint(1400, (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
    optimizer.step()


def main() -> None:
    arguments = parse_arguments()
    inputs, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(inputs / 16.0).float(), torch.tensor(targets)

    model = network()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with neurms.profile(model, adamw, every_n_steps=10, warmup_steps=5) as profiler:
        for _ in range(arguments.watch):
            step(model, adamw, images, labels)
    advice = profiler.report().advice()
    for one in advice:
        print(one)

    model = network()
    rates = {"F": 1e-2, "U": 1e-2}
    print(advice.choice(model, rates).code())
    optimizer = advice.apply(model, rates)
    for _ in range(60 if arguments.quick else arguments.steps):
        step(model, optimizer, images, labels)
    with torch.no_grad():
        right = model(images[1400:]).argmax(1) == labels[1400:]
    print(f"{type(optimizer).__name__}: accuracy {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
