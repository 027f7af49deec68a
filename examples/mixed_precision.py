"""Mixed precision: bfloat16 needs nothing; float16 wants its loss scale known to NeuRMS."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import neurms


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, targets = load_digits(return_X_y=True)
    images = torch.tensor(inputs / 16.0).float().to(device)
    labels = torch.tensor(targets).to(device)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)

    dtype = torch.float16 if arguments.precision == "fp16" else torch.bfloat16
    scaler = torch.amp.GradScaler(device, enabled=arguments.precision == "fp16")
    # Error signals reach NeuRMS with the loss scale on them: it divides by what this returns. A
    # step that the scaler skips, because something overflowed, commits no statistics.
    loss_scale = scaler.get_scale if scaler.is_enabled() else None
    optimizer = neurms.NeuRMS(model, lr=arguments.lr, variant="F", loss_scale=loss_scale)
    for _ in range(60 if arguments.quick else arguments.steps):
        batch = torch.randint(1400, (64,))
        with torch.autocast(device, dtype=dtype, enabled=arguments.precision != "fp32"):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    with torch.no_grad():
        right = model(images[1400:]).argmax(1) == labels[1400:]
    print(f"accuracy {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
