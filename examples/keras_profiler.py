"""Keras: NeuRMS in fit, with the profiler's table and advice when it ends."""

import argparse
import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
from sklearn.datasets import load_digits

from neurms.callbacks.keras import NeuRMSCallback, PreconditionerProfiler
from neurms.integrations.keras import keras_neurms


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=["U", "B", "F", "P"], default="F")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", help="folder for the run and its report.html")
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = x.astype("float32").reshape(-1, 8, 8, 1) / 16.0, y.astype("int32")
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=keras_neurms(learning_rate=0.01, variant=arguments.variant, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    profiler = PreconditionerProfiler(every_n_steps=10, output=arguments.output)
    model.fit(
        x[:1400],
        y[:1400],
        validation_data=(x[1400:], y[1400:]),
        batch_size=64,
        epochs=2 if arguments.quick else arguments.epochs,
        verbose=0,
        callbacks=[NeuRMSCallback(), profiler],
    )
    for advice in profiler.report().advice():
        print(advice)
    print(f"accuracy {model.evaluate(x[1400:], y[1400:], verbose=0)[1]:.1%}")


if __name__ == "__main__":
    main()
