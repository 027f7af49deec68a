"""Accelerate: NeuRMS is prepared like any optimizer, accumulation and clipping included."""

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import neurms


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", default="neurms", help="a name from neurms.available()")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    inputs, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(inputs / 16.0).float(), torch.tensor(targets)
    loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    # The optimizer is made of the model as it is, before Accelerate wraps either.
    optimizer = neurms.create(arguments.optimizer, model, lr=arguments.lr)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(2 if arguments.quick else arguments.epochs):
        for batch, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(batch), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    with torch.no_grad():
        right = model(images[1400:].to(accelerator.device)).argmax(1).cpu() == labels[1400:]
    accelerator.print(f"accuracy {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
