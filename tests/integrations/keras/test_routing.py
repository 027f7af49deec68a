"""Who gets the rule, in Keras models."""

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers

import neurms
from neurms.core.optimizers.plan import PlanRow
from neurms.integrations.keras import keras_neurms, keras_optimizer, keras_racs, keras_rmnp


def rows(model: Any, optimizer: Any) -> dict[str, PlanRow]:
    optimizer.build(model.trainable_variables)
    return {row.name.removeprefix("sequential/"): row for row in optimizer.plan()}


def tokens_model() -> Any:
    ids = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(11, 8, name="table")(ids)
    hidden = hidden + layers.MultiHeadAttention(2, 4, name="attention")(hidden, hidden)
    hidden = hidden + layers.GroupQueryAttention(4, 4, 2, name="grouped")(hidden, hidden)
    hidden = layers.LayerNormalization(name="norm")(hidden)
    hidden = layers.LSTM(6, name="recurrent")(hidden)
    hidden = layers.Dense(7, activation="relu", name="hidden")(hidden)
    return keras.Model(ids, layers.Dense(3, name="head")(hidden))


def test_kernels_get_the_rule_and_the_rest_adamw() -> None:
    plan = rows(tokens_model(), keras_rmnp())
    ruled = {name for name, row in plan.items() if row.rule == "rmnp"}
    assert ruled == {
        *(f"attention/{part}/kernel" for part in ("query", "key", "value", "attention_output")),
        *(f"grouped/{part}/kernel" for part in ("query", "key", "value", "attention_output")),
        *("recurrent/lstm_cell/kernel", "recurrent/lstm_cell/recurrent_kernel", "hidden/kernel"),
    }
    assert plan["table/embeddings"].reason == "embedding"
    assert plan["head/kernel"].reason == "output head"
    assert plan["recurrent/lstm_cell/kernel"].reason == "recurrent weight"
    assert plan["attention/query/bias"].reason == "bias"


def test_neurms_takes_head_and_biases_and_leaves_what_it_cannot_tap() -> None:
    plan = rows(tokens_model(), keras_neurms(variant="U"))
    assert plan["head/kernel"].rule == plan["head/bias"].rule == "neurms"
    assert plan["attention/query/bias"].rule == "neurms"
    for name in ("recurrent/lstm_cell/kernel", "table/embeddings", "norm/gamma"):
        assert plan[name].rule == "fallback"


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])
def test_recurrent_kernels_move_as_torchs_do(kind: str) -> None:
    layer = getattr(layers, kind)(4)
    layer.build((None, 5, 3))
    kernels = [layer.cell.kernel, layer.cell.recurrent_kernel]
    twins = [torch.nn.Parameter(kernel.value.detach().T.clone()) for kernel in kernels]
    model = keras.Sequential([layer])
    optimizer, twin = keras_optimizer("muon", 0.1), neurms.Muon(twins, lr=0.1)
    model.compile(optimizer)
    optimizer.build(model.trainable_variables)
    torch.manual_seed(0)
    gradients = [torch.randn(variable.shape) for variable in model.trainable_variables]
    for parameter, gradient in zip(twins, gradients, strict=False):
        parameter.grad = gradient.T.clone()
    optimizer.apply(gradients)
    twin.step()
    for kernel, parameter in zip(kernels, twins, strict=True):
        torch.testing.assert_close(kernel.value.detach().T, parameter.detach())


def test_a_cells_bias_goes_with_no_kernel() -> None:
    layer = layers.GRU(4, name="gru")
    layer.build((None, 5, 3))
    plan = rows(keras.Sequential([layer]), keras_neurms(variant="P"))
    assert {name: row.rule for name, row in plan.items()} == {
        "gru/gru_cell/kernel": "neurms",
        "gru/gru_cell/recurrent_kernel": "neurms",
        "gru/gru_cell/bias": "fallback",
    }


def test_separable_convolutions_lora_and_frozen_layers_say_why() -> None:
    model = keras.Sequential(
        [
            layers.Input((8, 8, 2)),
            layers.SeparableConv2D(3, 3, name="separable"),
            layers.Flatten(),
            layers.Dense(4, name="adapted"),
            layers.Dense(4, name="frozen"),
            layers.Dense(2),
        ]
    )
    model.get_layer("adapted").enable_lora(2)
    model.get_layer("frozen").trainable = False
    plan = rows(model, keras_neurms(variant="U"))
    assert "two kernels" in plan["separable/depthwise_kernel"].reason
    assert plan["adapted/lora_kernel_a"].reason == "LoRA factor"
    assert plan["adapted/kernel"].reason == plan["frozen/kernel"].reason == "frozen"
    assert plan["frozen/kernel"].state_bytes == 0


def test_tied_variables_and_bare_ones() -> None:
    first = layers.Dense(4)
    first.build((None, 4))
    second = layers.Dense(4)
    second.build((None, 4))
    second._trainable_variables.append(first._kernel)
    bare = keras.Variable(np.ones((3, 5), "float32"))
    optimizer = keras_racs()
    optimizer.build([first._kernel, bare])
    tied, alone = optimizer.plan()
    assert tied.reason == "tied: shared by 2 layers"
    assert (alone.rule, alone.state_bytes) == ("racs", 4 * (3 + 5 + 1))


@pytest.mark.parametrize("pattern", ["hidden", "hidden/kernel", "hid*", "*/hidden/*", "attention"])
def test_patterns_name_layers_and_paths(pattern: str) -> None:
    inputs = keras.Input((5, 8))
    hidden = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    hidden = layers.Dense(3, name="hidden")(hidden)
    model = keras.Model(inputs, layers.Dense(2)(hidden))
    if pattern.startswith("*/"):
        model = keras.Sequential(
            [layers.Input((8,)), layers.Dense(3, name="hidden"), layers.Dense(2)]
        )
    plan = rows(model, keras_neurms(exclude=[pattern], variant="U"))
    excluded = [name for name, row in plan.items() if row.reason == f"excluded by {pattern!r}"]
    assert excluded
    assert all(("attention" if pattern == "attention" else "hidden") in name for name in excluded)
    assert any(row.rule == "neurms" for row in plan.values())


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    model = tokens_model()
    optimizer = keras_racs(exclude=["nothing"])
    with pytest.raises(ValueError, match="exclude='nothing' matches no variable; paths look like"):
        optimizer.build(model.trainable_variables)
    assert not optimizer.built


def test_head_is_a_setting() -> None:
    assert rows(tokens_model(), keras_racs(head="rule"))["head/kernel"].rule == "racs"
    assert (
        rows(tokens_model(), keras_neurms(head="fallback", variant="U"))["head/kernel"].rule
        == "fallback"
    )


def test_routing_is_the_same_before_and_after_compile() -> None:
    model = tokens_model()
    early = [row.rule for row in rows(model, keras_racs()).values()]
    model.compile(optimizer=keras_racs(), loss="mse")
    model.train_on_batch(np.zeros((2, 5), "int32"), np.zeros((2, 3)))
    assert [row.rule for row in model.optimizer.plan()] == early


def test_built_in_names_give_keras_optimizers() -> None:
    optimizer = keras_optimizer("adamw", learning_rate=0.5, weight_decay=0.1)
    assert isinstance(optimizer, keras.optimizers.AdamW)
    assert float(optimizer.learning_rate.value) == 0.5
