"""One model written twice, for Keras and for torch, with the same weights and the same function."""

from __future__ import annotations

import math
from typing import Any

import keras
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS, WIDTH = 2, 3


def keras_model(dtype: str = "float64", data_format: str = "channels_last") -> Any:
    """Conv2D with a fused activation, self-attention, Dense with a fused activation, a head."""
    shape = (6, 6, 2) if data_format == "channels_last" else (2, 6, 6)
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    inputs = keras.Input(shape)
    conv = keras.layers.Conv2D(5, 3, activation="tanh", data_format=data_format, name="conv")
    hidden = conv(inputs)
    if data_format == "channels_first":
        hidden = keras.layers.Permute((2, 3, 1))(hidden)
    # Over two axes, since Keras computes attention over one in single precision on torch; without
    # biases, since a key's has no gradient but rounding errors, which AdamW would blow up.
    attention = keras.layers.MultiHeadAttention(
        HEADS, WIDTH, use_bias=False, attention_axes=(1, 2), name="attention"
    )
    tokens = keras.layers.Add()([hidden, attention(hidden, hidden)])
    pooled = keras.layers.Flatten()(keras.layers.AveragePooling2D(4)(tokens))
    split = keras.layers.EinsumDense(
        "ab,bcd->acd", (2, 3), activation="tanh", bias_axes="cd", name="split"
    )
    hidden = keras.layers.Flatten()(split(pooled))
    hidden = keras.layers.Dense(6, activation="tanh", name="hidden")(hidden)
    return Exact(inputs, keras.layers.Dense(3, name="head")(hidden))


class Exact(keras.Model):  # type: ignore[misc]
    """A model whose loss is torch's, since Keras takes means in single precision."""

    def compute_loss(self, x: Any, y: Any, y_pred: Any, *_: Any, **__: Any) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(torch.as_tensor(y_pred), torch.as_tensor(y).long())


class TorchTwin(nn.Module):
    """The torch side: the attention's projections are Linear modules, as taps need them."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        inner = HEADS * WIDTH
        self.conv = nn.Conv2d(2, 5, 3, dtype=dtype)
        self.query = nn.Linear(5, inner, bias=False, dtype=dtype)
        self.key = nn.Linear(5, inner, bias=False, dtype=dtype)
        self.value = nn.Linear(5, inner, bias=False, dtype=dtype)
        self.output = nn.Linear(inner, 5, bias=False, dtype=dtype)
        self.split = nn.Linear(5, 6, dtype=dtype)
        self.hidden = nn.Linear(6, 6, dtype=dtype)
        self.head = nn.Linear(6, 3, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Map channels-last images to logits."""
        tokens = self.conv(images.permute(0, 3, 1, 2)).tanh().permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = (
            layer(tokens).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH)).softmax(-1)
        tokens = tokens + self.output((weights @ v).transpose(1, 2).flatten(-2))
        logits: Tensor = self.head(self.hidden(self.split(tokens.mean(1)).tanh()).tanh())
        return logits


def as_torch(path: str, value: Tensor) -> tuple[str, Tensor]:
    """Return the torch name and the torch form of a Keras variable."""
    layer, kind = path.split("/")[-2:]
    layer = {"attention_output": "output"}.get(layer, layer)
    if kind == "bias":
        return f"{layer}.bias", value.reshape(-1)
    if layer == "conv":
        return "conv.weight", value.permute(3, 2, 0, 1)
    inputs = value.shape[:-1] if layer in ("output", "hidden", "head") else value.shape[:1]
    return f"{layer}.weight", value.reshape(math.prod(inputs), -1).T


def torch_model(model: Any) -> TorchTwin:
    """Return the torch twin of a Keras model, weights copied."""
    twin = TorchTwin(model.trainable_variables[0].value.dtype)
    twin.load_state_dict({k: v.contiguous() for k, v in weights_of(model).items()})
    return twin


def weights_of(model: Any) -> dict[str, Tensor]:
    """Return a Keras model's weights under torch names and in torch form."""
    return dict(as_torch(v.path, v.value.detach().clone()) for v in model.trainable_variables)


def batches(steps: int, size: int = 8, dtype: torch.dtype = torch.float64) -> list[tuple[Any, Any]]:
    """Return batches of images and labels."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(steps, size, 6, 6, 2, generator=generator, dtype=dtype)
    labels = torch.randint(3, (steps, size), generator=generator)
    return list(zip(images.numpy(), labels.numpy(), strict=True))


def train_torch(
    twin: TorchTwin, optimizer: Any, data: list[tuple[Any, Any]], accumulate: int = 1
) -> None:
    """Train the torch side."""
    for step, (images, labels) in enumerate(data, start=1):
        loss = F.cross_entropy(twin(torch.from_numpy(images)), torch.from_numpy(labels))
        (loss / accumulate).backward()
        if step % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def compiled(model: Any, optimizer: Any, **settings: Any) -> Any:
    """Return the model, compiled."""
    model.compile(optimizer=optimizer, loss="mse", **settings)
    return model


def train_keras(model: Any, data: list[tuple[Any, Any]]) -> None:
    """Train the Keras side, batch by batch."""
    for images, labels in data:
        model.train_on_batch(images, labels)


def distance(model: Any, twin: TorchTwin) -> float:
    """Return the greatest difference between the weights of both."""
    own = twin.state_dict()
    return max(float((own[k] - v).abs().max()) for k, v in weights_of(model).items())
