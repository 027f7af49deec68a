"""Alice in Keras: digits by ``fit``, saved, loaded, and continued bit for bit."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
from sklearn.datasets import load_digits

from neurms.integrations.keras import keras_alice

x, y = load_digits(return_X_y=True)
x, y = x.astype("float32") / 16.0, y.astype("int32")
dense = keras.layers.Dense
model = keras.Sequential(
    [keras.layers.Input((64,)), dense(128, "relu"), dense(64, "relu"), dense(10)]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(
    optimizer=keras_alice(rank=16, leading=8, interval=20), loss=loss, metrics=["accuracy"]
)
model.fit(x[:1400], y[:1400], batch_size=64, epochs=10, verbose=0)
print(f"accuracy {model.evaluate(x[1400:], y[1400:], verbose=0)[1]:.1%}")

model.save("keras_alice.keras")
loaded = keras.saving.load_model("keras_alice.keras")
for one in (model, loaded):
    one.fit(x[:1400], y[:1400], batch_size=64, shuffle=False, verbose=0)
same = all(
    np.array_equal(a, b) for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True)
)
print("continued bit for bit" if same else "the loaded model went another way")
