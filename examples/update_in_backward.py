"""Update weights inside backward: the big gradients never exist, which saves their memory."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

import neurms


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a small width and a few steps")
    return parser.parse_args()


def gradient_bytes(model: nn.Module) -> int:
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = (v for state in optimizer.state.values() for v in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def trained(
    make: Callable[[nn.Module], torch.optim.Optimizer], width: int, steps: int
) -> tuple[float, int, int]:
    """Return the last loss, and the bytes of gradients and of optimizer state at a step."""
    torch.manual_seed(0)
    teacher = nn.Linear(64, 8)
    model = nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 8)
    )
    optimizer = make(model)
    gradients = 0
    for _ in range(steps):
        inputs = torch.randn(128, 64)
        loss = nn.functional.mse_loss(model(inputs), teacher(inputs).detach())
        optimizer.zero_grad()
        loss.backward()
        gradients = gradient_bytes(model)
        # What is left for the step: biases, and committing the statistics.
        optimizer.step()
    return loss.item(), gradients, state_bytes(optimizer)


def main() -> None:
    arguments = parse_arguments()
    width, steps = (64, 5) if arguments.quick else (arguments.width, arguments.steps)
    makers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "AdamW": lambda model: torch.optim.AdamW(model.parameters()),
        "NeuRMS": lambda model: neurms.NeuRMS(model, lr=1e-3),
        "NeuRMS in backward": lambda model: neurms.NeuRMS(model, lr=1e-3, update="backward"),
        "RMNP": lambda model: neurms.RMNP(model, nesterov=False),
        # Its gradients enter the momentum: what is left of both is one number for each weight.
        "RMNP in backward": lambda model: neurms.RMNP(model, nesterov=False, update="backward"),
    }
    print(f"{'':20}{'last loss':>12}{'gradients':>16}{'state':>16}")
    for name, make in makers.items():
        loss, gradients, state = trained(make, width, steps)
        print(f"{name:20}{loss:12.4f}{gradients:10,} bytes{state:10,} bytes")


if __name__ == "__main__":
    main()
