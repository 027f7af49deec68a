"""What a training step costs in Keras: ``python benchmarks/keras_step.py``.

Two ratios of medians over interleaved runs, so that drift of the machine hits all alike:

- keras_racs against plain torch: step(keras_racs) over step(torch, neurms.RACS) plus Keras's own
  overhead, which is step(keras SGD) - step(torch SGD). At most 1.05.
- keras_racs against keras.optimizers.Adam. At most 1.2.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from torch import nn

import neurms
from neurms.integrations.keras import keras_neurms, keras_racs

Step = Callable[[], object]


def keras_step(optimizer: keras.optimizers.Optimizer, width: int, batch: int) -> Step:
    """Return one step of ``fit``'s own train function, on data that is a tensor already."""
    dense = [keras.layers.Dense(width, activation="relu") for _ in range(3)]
    model = keras.Sequential([keras.layers.Input((width,)), *dense])
    model.compile(optimizer=optimizer, loss="mse")
    x, y = np.ones((2, batch, width), "float32")
    model.train_on_batch(x, y)
    data = [(torch.randn(batch, width), torch.randn(batch, width))]
    return lambda: model.train_function(data)


def torch_step(make: Callable[[nn.Module], torch.optim.Optimizer], width: int, batch: int) -> Step:
    """Return the same step written in plain torch."""
    layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers)
    optimizer = make(model)
    x, y = torch.randn(batch, width), torch.randn(batch, width)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    return step


def medians(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Return each step's median milliseconds over interleaved rounds, each in a new order.

    What ran just before (Adam's allocations, say) weighs on a step; the order spreads that evenly.
    With one thread the clock is the process's own, which other processes do not disturb.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 3):
        for name in random.sample(list(steps), len(steps)):
            step = steps[name]
            start = clock()
            step()
            if turn >= 3:
                times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    size = (arguments.width, arguments.batch)
    # The last Dense gets the rule too, so that both frameworks do the same work.
    found = medians(
        {
            "torch SGD": torch_step(lambda m: torch.optim.SGD(m.parameters(), lr=0.01), *size),
            "torch RACS": torch_step(lambda m: neurms.RACS(m, head="rule"), *size),
            "keras SGD": keras_step(keras.optimizers.SGD(), *size),
            "keras Adam": keras_step(keras.optimizers.Adam(), *size),
            "keras_racs": keras_step(keras_racs(head="rule"), *size),
            "keras_neurms U": keras_step(keras_neurms(variant="U"), *size),
            "keras_neurms F": keras_step(keras_neurms(variant="F"), *size),
        },
        arguments.rounds,
    )
    for name, milliseconds in found.items():
        print(f"{name:16} {milliseconds:8.2f} ms")
    overhead = found["keras SGD"] - found["torch SGD"]
    against_torch = found["keras_racs"] / (found["torch RACS"] + overhead)
    print(f"keras_racs / (torch RACS + Keras's overhead {overhead:.2f} ms) = {against_torch:.3f}")
    print(f"keras_racs / keras Adam = {found['keras_racs'] / found['keras Adam']:.3f}")


if __name__ == "__main__":
    main()
