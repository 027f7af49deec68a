"""trainer_optimizers in real Trainers on a tiny LLaMA, and the same model under Accelerate."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurms
from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.taps.hooks import HookTap

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.pytorch_utils import Conv1D

from neurms.integrations.transformers import optimizer_cls_and_kwargs, trainer_optimizers

VOCABULARY, LENGTH, SEQUENCES = 24, 6, 16
RULES = {
    "neurms": {"lr": 0.02, "variant": "F", "momentum": 0.9},
    "racs": {"lr": 0.02},
    "alice": {"lr": 0.02, "rank": 4, "leading": 2, "interval": 2},
}

pytestmark = [
    # Trainer 5: its default for CPU loaders, and its own renamed arguments.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(2)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
    )
    # In float64 a batch and its halves differ by nothing that a basis could turn on.
    return model.double()


def sequences() -> list[dict[str, Tensor]]:
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    chosen = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 123.0,  # must not reach an optimizer that was handed in
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**chosen, **changed})


class InOrder(Trainer):
    """A Trainer that does not shuffle, in every version."""

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(self.train_dataset, 4, collate_fn=default_data_collator)
        return self.accelerator.prepare(loader)


def trained(
    folder: Path,
    name: str,
    *,
    kind: type[Trainer] = Trainer,
    resume: Path | None = None,
    **changed: Any,
) -> nn.Module:
    model = llama()
    trainer = kind(
        model,
        arguments(folder, **changed),
        train_dataset=sequences(),
        optimizers=trainer_optimizers(model, name, **RULES[name]),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model


def assert_equal(left: nn.Module, right: nn.Module, tolerance: float = 0.0) -> None:
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", RULES)
def test_the_trainer_does_what_a_loop_does(tmp_path, name) -> None:
    ours = trained(tmp_path, name, kind=InOrder)
    by_hand = llama()
    optimizer = neurms.create(name, by_hand, **RULES[name])
    rows = sequences()
    for start in range(0, SEQUENCES, 4):
        batch = torch.stack([row["input_ids"] for row in rows[start : start + 4]])
        optimizer.zero_grad()
        by_hand(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    assert_equal(ours, by_hand, 1e-9)


@pytest.mark.parametrize("name", RULES)
def test_accumulated_micro_batches_are_one_batch(tmp_path, name) -> None:
    halves = trained(tmp_path, name, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_equal(halves, trained(tmp_path, name), 1e-9)


@pytest.mark.parametrize("name", RULES)
def test_a_resumed_run_is_bit_equal(tmp_path, name) -> None:
    # The first run saves half way and goes on to its end: that end is the truth.
    through = trained(tmp_path, name, save_strategy="steps", save_steps=2)
    resumed = trained(tmp_path / "second", name, resume=tmp_path / "checkpoint-2")
    assert_equal(resumed, through)


def test_the_trainer_s_schedule_drives_the_optimizer(tmp_path) -> None:
    model = llama()
    optimizer, scheduler = trainer_optimizers(model, "racs", lr=0.02)
    assert scheduler is None
    trainer = Trainer(
        model,
        arguments(tmp_path, lr_scheduler_type="linear", max_steps=4),
        train_dataset=sequences(),
        optimizers=(optimizer, scheduler),
    )
    trainer.train()
    assert trainer.lr_scheduler.base_lrs == [0.02]
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_our_schedule_drives_the_optimizer(tmp_path) -> None:
    model, args = llama(), arguments(tmp_path, max_steps=3, learning_rate=0.1)
    optimizer, scheduler = trainer_optimizers(
        model, "rmnp", args=args, schedule="linear", warmup_steps=1
    )
    rates = []
    optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    Trainer(model, args, train_dataset=sequences(), optimizers=(optimizer, scheduler)).train()
    assert rates == pytest.approx([0.05, 0.1, 0.05])


def test_clipping_acts_on_raw_gradients(tmp_path) -> None:
    """RMNP normalises rows, so that a clipped gradient gives the same first step."""
    model, clipped = llama(), llama()
    for one, limit in ((model, 0.0), (clipped, 1e-3)):
        Trainer(
            one,
            arguments(tmp_path, max_steps=1, max_grad_norm=limit),
            train_dataset=sequences(),
            optimizers=trainer_optimizers(one, "rmnp", lr=0.1, fallback_lr=0.0),
        ).train()
    assert_equal(model, clipped, 1e-9)


def test_taps_come_off() -> None:
    model = llama()
    optimizer, _ = trainer_optimizers(model, variant="U")
    assert _taps(model)
    optimizer.detach()
    assert not _taps(model)
    copy.deepcopy(model)


@pytest.mark.parametrize("name", ["neurms", "rmnp"])
def test_backward_update_is_refused_before_any_tap(name: str) -> None:
    model = llama()
    with pytest.raises(UnsupportedTrainingError, match='use update="step"'):
        trainer_optimizers(model, name, update="backward")
    assert not _taps(model)


def test_float16_wants_the_scale(tmp_path) -> None:
    args = arguments(tmp_path, learning_rate=0.1)
    args.fp16 = True  # the constructor would refuse it on a CPU
    with pytest.raises(UnsupportedTrainingError, match="loss_scale=lambda"):
        trainer_optimizers(llama(), variant="U", args=args)
    trainer_optimizers(llama(), variant="U", args=args, loss_scale=lambda: 1.0)
    trainer_optimizers(llama(), args=args)  # P asks for no taps, whose sums the scale would change
    trainer_optimizers(llama(), "racs", args=args)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"name": "adan"}, ValueError, "name='adan'"),
        ({"schedule": "cosine"}, ValueError, "total_steps=None takes args.max_steps"),
        ({"schedule": "cosine", "total_steps": 0}, ValueError, "total_steps=0"),
        ({"warmup_steps": 3}, ValueError, "needs a schedule"),
        ({"learning_rate": 0.1}, TypeError, "learning_rate"),
    ],
)
def test_bad_arguments(settings, error, message) -> None:
    with pytest.raises(error, match=message):
        trainer_optimizers(llama(), **settings)


def test_rate_and_decay_of_the_arguments_are_honoured(tmp_path) -> None:
    """As the Trainer's own AdamW has them: all is decayed but biases and norms."""
    args = arguments(tmp_path, learning_rate=0.01, weight_decay=0.3, adam_beta2=0.99)
    ours, theirs = llama(), llama()
    optimizer, _ = trainer_optimizers(ours, "adamw", args=args)
    trainer = Trainer(theirs, args, train_dataset=sequences())
    trainer.create_optimizer()
    _step(ours, optimizer)
    _step(theirs, trainer.optimizer)
    assert_equal(ours, theirs, 1e-12)
    for name in RULES:
        model = llama()
        made, _ = trainer_optimizers(model, name, args=args)
        decays = {n: g["weight_decay"] for g in made.param_groups for n in g["param_names"]}
        spared = {name for name, decay in decays.items() if not decay}
        assert spared == {name for name in decays if "norm" in name}
        assert {g["lr"] for g in made.param_groups} == {0.01}
        assert {tuple(g["fallback_betas"]) for g in made.param_groups} == {(0.9, 0.99)}
        for group in made.param_groups:
            assert group["fallback_weight_decay"] == group["weight_decay"]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    batch = torch.stack([row["input_ids"] for row in sequences()[:4]])
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


def test_optim_args_are_settings(tmp_path) -> None:
    text = "variant=F, momentum=0.9,s_max=50"
    args = arguments(tmp_path, learning_rate=0.01, optim_args=text)
    optimizer, _ = trainer_optimizers(llama(), "neurms", args=args)
    group = optimizer.param_groups[0]
    assert (group["variant"], group["momentum"], group["s_max"]) == ("F", 0.9, 50)


def test_the_trainer_s_default_rate_is_warned_of(tmp_path) -> None:
    default = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.warns(UserWarning, match=r"5e-05, .* racs trains at its own default, lr=0\.02"):
        optimizer, _ = trainer_optimizers(llama(), "racs", args=default)
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert trainer_optimizers(llama(), "adamw", args=default)[0].param_groups[0]["lr"] == 5e-5
    trainer_optimizers(llama(), "racs", args=default, lr=0.1)


@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        ({"learning_rate": 0.2}, {"lr": 0.1}, r"lr=0\.1 was passed and args.learning_rate is 0\.2"),
        ({"weight_decay": 0.2}, {"weight_decay": 0.1}, r"args.weight_decay is 0\.2; leave one"),
        ({"weight_decay": 0.2}, {"groups": []}, "write weight_decay in the groups"),
        ({"optim": "sgd"}, {}, "args.optim='sgd' chooses another optimizer"),
        ({"optim_args": "beta"}, {}, "must be settings with commas"),
        ({"optim_args": "beta=0.8"}, {"beta": 0.9}, r"args.optim_args has beta=0\.8"),
        ({"adam_epsilon": 1e-6}, {}, "args.adam_epsilon=1e-06 has no part in 'racs'"),
        ({"adam_beta1": 0.8}, {"fallback_betas": (0.9, 0.99)}, "fallback_betas=.* leave one"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, changed, settings, message) -> None:
    args = arguments(tmp_path, **{"learning_rate": 0.1, **changed})
    with pytest.raises(ValueError, match=message):
        trainer_optimizers(llama(), "racs", args=args, **settings)


@pytest.mark.parametrize("name", RULES)
def test_the_trainer_makes_the_optimizer_of_its_own_model(tmp_path, name) -> None:
    args = arguments(tmp_path, learning_rate=RULES[name]["lr"])
    trainer = InOrder(
        args=args,
        model_init=llama,
        train_dataset=sequences(),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(name, args=args, **RULES[name]),
    )
    trainer.train()
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), _kind(name))
    assert_equal(trainer.model, trained(tmp_path, name, kind=InOrder))


def _kind(name: str) -> type:
    return type(neurms.create(name, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))))


def test_older_releases_take_classes_only(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedTrainingError, match="use optimizers=trainer_optimizers"):
        optimizer_cls_and_kwargs("racs")


def gpt2() -> nn.Module:
    torch.manual_seed(3)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
    # Without dropout, so that two models see the same.
    rest = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **rest, **tokens)).double()


@pytest.mark.parametrize("name", ["muon", "neurms"])
def test_the_linear_layers_of_gpt2_get_the_rule(name) -> None:
    optimizer = neurms.create(name, gpt2())
    ruled = {row.name for row in optimizer.plan() if row.rule == name and row.name[-1] == "t"}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert ruled == {f"transformer.h.{i}.{own}.weight" for i in (0, 1) for own in layers}


@pytest.mark.parametrize("name", ["muon", "racs", "rmnp", "neurms"])
def test_weights_stored_features_first_move_as_linear_layers_do(name) -> None:
    features_first, plain = Conv1D(7, 5), nn.Linear(5, 7)
    with torch.no_grad():
        features_first.weight.copy_(plain.weight.T)
        features_first.bias.copy_(plain.bias)
    inputs, tail = torch.randn(6, 5).double(), nn.Linear(7, 2)
    weights = []
    for layer in (features_first, plain):
        model = nn.Sequential(layer, nn.Tanh(), copy.deepcopy(tail)).double()
        optimizer = neurms.create(name, model, **({"variant": "F"} if name == "neurms" else {}))
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(weights[0].T, weights[1], rtol=1e-9, atol=1e-12)


def test_parameters_are_not_enough() -> None:
    with pytest.raises(TypeError, match="model=list"):
        trainer_optimizers(list(llama().parameters()), "racs")


@pytest.mark.parametrize("name", RULES)
def test_accelerate_accumulates_and_steps_as_a_loop_does(name) -> None:
    rows = torch.stack([row["input_ids"] for row in sequences()])
    by_hand = llama()
    optimizer = neurms.create(name, by_hand, **RULES[name])
    for batch in rows.split(8):
        optimizer.zero_grad()
        by_hand(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = llama()
    model, optimizer = accelerator.prepare(model, neurms.create(name, model, **RULES[name]))
    for batch in rows.split(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(accelerator.unwrap_model(model), by_hand, 1e-9)


def _taps(model: nn.Module) -> list[object]:
    hooks = (hook for layer in model.modules() for hook in layer._forward_hooks.values())
    return [hook for hook in hooks if isinstance(hook, HookTap)]
