"""Lightning Fabric: a loop of your own, with Fabric's devices and precision."""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import neurms


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", default="neurms", help="a name from neurms.available()")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--precision", default="bf16-mixed", help="as Fabric names it")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=arguments.precision)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    inputs, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(inputs / 16.0).float(), torch.tensor(targets)
    loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = neurms.create(arguments.optimizer, model, lr=arguments.lr)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader)
    for _ in range(2 if arguments.quick else arguments.epochs):
        for batch, targets in loader:
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(model(batch), targets))
            optimizer.step()
    with torch.no_grad():
        right = model(images[1400:]).argmax(1) == labels[1400:]
    fabric.print(f"accuracy {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
