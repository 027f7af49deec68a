"""Keras: compile with any rule, fit, save, load, and go on bit for bit."""

import argparse
import os
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
from sklearn.datasets import load_digits

from neurms.integrations.keras import (
    keras_alice,
    keras_eigen_adam,
    keras_neurms,
    keras_racs,
    keras_rmnp,
    keras_shared_basis,
)

OPTIMIZERS = {
    "racs": lambda: keras_racs(learning_rate=0.05),
    "neurms": lambda: keras_neurms(learning_rate=0.03, variant="F", momentum=0.9),
    "rmnp": keras_rmnp,
    "alice": lambda: keras_alice(rank=16, leading=8, interval=20),
    "eigen_adam": keras_eigen_adam,
    "shared_basis": lambda: keras_shared_basis(rank=8),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="racs")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = x.astype("float32") / 16.0, y.astype("int32")
    dense = keras.layers.Dense
    model = keras.Sequential(
        [keras.layers.Input((64,)), dense(128, "relu"), dense(64, "relu"), dense(10)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=OPTIMIZERS[arguments.optimizer](), loss=loss, metrics=["accuracy"])
    epochs = 3 if arguments.quick else arguments.epochs
    model.fit(x[:1400], y[:1400], batch_size=64, epochs=epochs, verbose=0)
    print(f"accuracy {model.evaluate(x[1400:], y[1400:], verbose=0)[1]:.1%}")

    # The file holds the optimizer's state: both go on as one would have.
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model.keras")
        loaded = keras.saving.load_model(Path(folder) / "model.keras")
    for one in (model, loaded):
        one.fit(x[:1400], y[:1400], batch_size=64, shuffle=False, verbose=0)
    pairs = zip(model.get_weights(), loaded.get_weights(), strict=True)
    same = all(np.array_equal(a, b) for a, b in pairs)
    print("continued bit for bit" if same else "the loaded model went another way")


if __name__ == "__main__":
    main()
