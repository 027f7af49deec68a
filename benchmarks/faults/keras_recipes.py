"""What a Keras run needs beside this library to be resumed bit for bit; shown in the guide."""

# The methods are hooks that Lightning and Keras describe.
# ruff: noqa: D102

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras


class AtomicSave(keras.callbacks.Callback):
    """Saves the whole model every few steps; the file is complete or it is not there."""

    def __init__(self, path, every):
        super().__init__()
        self.path, self.every = str(path), every

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) % self.every == 0:
            partial = f"{self.path}.partial.keras"
            self.model.save(partial)
            os.replace(partial, self.path)


class SeedsByStep(keras.callbacks.Callback):
    """Dropout's mask is a function of the step, since files do not hold what it has drawn."""

    def on_train_batch_begin(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        for variable in self.model.non_trainable_variables:
            if variable.path.endswith("seed_generator_state"):
                variable.assign([int(variable[0]), 1000 * step])
