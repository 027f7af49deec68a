"""Train a small network on scikit-learn's handwritten digits, in a plain PyTorch loop.

Run ``python examples/plain_pytorch.py`` for NeuRMS, or name another method:
``python examples/plain_pytorch.py --optimizer racs --lr 0.02``.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import neurms


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", default="neurms", help="a name from neurms.available()")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def load(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits scaled to [0, 1]: training inputs and labels, then validation's."""
    digits = load_digits()
    train, valid, train_labels, valid_labels = train_test_split(
        digits.data / 16.0, digits.target, test_size=0.25, random_state=seed
    )
    return (
        torch.tensor(train, dtype=torch.float32),
        torch.tensor(train_labels),
        torch.tensor(valid, dtype=torch.float32),
        torch.tensor(valid_labels),
    )


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    inputs, labels, valid_inputs, valid_labels = load(arguments.seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = neurms.create(arguments.optimizer, model, lr=arguments.lr)

    for epoch in range(1, (2 if arguments.quick else arguments.epochs) + 1):
        for batch in torch.randperm(len(inputs)).split(arguments.batch_size):
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (model(valid_inputs).argmax(1) == valid_labels).float().mean().item()
        print(f"epoch {epoch:2d}  last batch's loss {loss.item():.3f}  accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
