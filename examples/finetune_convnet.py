"""Fine-tune a convolutional net: trained on digits 0 to 4, taught 5 to 9 with a new head."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import neurms


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", default="neurms", help="a name from neurms.available()")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of the fine-tuning")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 5),
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, steps: int
) -> None:
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    inputs, targets = load_digits(return_X_y=True)
    images = torch.tensor(inputs / 16.0).float().view(-1, 1, 8, 8)
    labels = torch.tensor(targets)
    old, new = labels < 5, labels >= 5
    steps = 60 if arguments.quick else arguments.steps

    model = network()
    train(model, neurms.NeuRMS(model, lr=1e-2), images[old], labels[old], steps)

    # The first block stays as it is. Frozen parameters get no gradients, so no state either.
    for layer in (model[0], model[1]):
        layer.requires_grad_(False)
    model[-1] = nn.Linear(32 * 16, 5)
    optimizer = neurms.create(arguments.optimizer, model, lr=arguments.lr)
    fresh_images, fresh_labels = images[new], labels[new] - 5
    train(model, optimizer, fresh_images[:700], fresh_labels[:700], steps)

    model.eval()
    with torch.no_grad():
        right = model(fresh_images[700:]).argmax(1) == fresh_labels[700:]
    print(f"accuracy on the new digits {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
