"""NeuRMSCallback through whole runs: loops, ends, resuming, several optimizers, neighbours."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neurms

pytest.importorskip("lightning")

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    StochasticWeightAveraging,
)
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.tuner import Tuner

from neurms.callbacks import NeuRMSCallback
from tests.callbacks.lightning_runs import (
    Adversaries,
    Classifier,
    CountTaps,
    Validated,
    WithNeuRMS,
    assert_bit_equal,
    assert_same,
    by_hand,
    data,
    fitted,
    scaled,
    taps_of,
    trainer,
)


def test_other_loops_leave_no_statistics():
    callback, module = NeuRMSCallback(variant="U"), Validated()
    run = trainer(callback, num_sanity_val_steps=2, val_check_interval=1, limit_val_batches=2)
    run.fit(module, data(), data())
    assert_same(module, by_hand())
    before = copy.deepcopy(callback.state_dict()["layers"])
    run.validate(module, data(), verbose=False)
    run.test(module, data(), verbose=False)
    run.predict(module, data())
    torch.testing.assert_close(callback.state_dict()["layers"], before, rtol=0.0, atol=0.0)
    assert taps_of(module) == 0


class Probe(Callback):
    """Back-propagates for its own purposes, as a diagnostic may, and leaves the gradients."""

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        F.cross_entropy(100 * module.net(batch[0]), batch[1]).backward()


def test_gradients_dropped_without_a_step_take_their_statistics_along():
    assert_same(fitted(Classifier(), NeuRMSCallback(variant="U"), Probe()), by_hand())


class Stop(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise self.error


@pytest.mark.parametrize(
    ("error", "seen"), [(ValueError("stop"), ValueError), (KeyboardInterrupt(), SystemExit)]
)
def test_no_tap_survives_an_exception(error, seen):
    module = Classifier()
    with pytest.raises(seen):
        fitted(module, NeuRMSCallback(variant="U"), Stop(error))
    assert taps_of(module) == 0


@pytest.mark.parametrize("same_trainer", [True, False])
def test_a_second_fit_starts_afresh_as_optimizers_do(same_trainer):
    callback, module = NeuRMSCallback(variant="U"), Classifier()
    counts = CountTaps()
    run = trainer(callback, counts, max_epochs=1)
    run.fit(module, data())
    middle = copy.deepcopy(module)
    if same_trainer:
        run.fit_loop.max_epochs = 2
        run.fit(module, data())
    else:
        trainer(callback, counts, max_epochs=1).fit(module, data())
    fitted(middle, NeuRMSCallback(variant="U"), max_epochs=1)
    assert_bit_equal(module, middle)
    assert counts.counts == {2}


@pytest.mark.parametrize(
    "settings", [{}, {"variant": "F", "momentum": 0.5}, {"update": "backward"}], ids=str
)
def test_a_resumed_run_is_bit_equal(tmp_path, settings):
    through = Classifier()
    run = trainer(NeuRMSCallback(**{"variant": "U", **settings}), max_epochs=2)
    first = trainer(NeuRMSCallback(**{"variant": "U", **settings}), max_epochs=1)
    run.fit(through, data())
    first.fit(Classifier(), data())
    first.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    resumed = Classifier()
    trainer(NeuRMSCallback(**{"variant": "U", **settings}), max_epochs=2).fit(
        resumed, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert_bit_equal(resumed, through)


def test_a_checkpoint_of_other_settings_is_an_error(tmp_path):
    first = trainer(NeuRMSCallback(variant="U"), max_epochs=1)
    first.fit(Classifier(), data())
    first.save_checkpoint(tmp_path / "u.ckpt")
    with pytest.raises(ValueError, match="variant='U', now it is 'F'"):
        trainer(NeuRMSCallback(variant="F"), max_epochs=2).fit(
            Classifier(), data(), ckpt_path=tmp_path / "u.ckpt"
        )


@pytest.mark.parametrize("set_to_none", [True, False])
def test_two_optimizers_in_manual_optimization(set_to_none):
    module, callback = Adversaries(set_to_none), NeuRMSCallback(variant="U")
    trainer(callback, max_epochs=1).fit(module, data())
    reference = Adversaries()
    parts = [neurms.NeuRMS(m, lr=0.1, variant="U") for m in (reference.generator, reference.critic)]
    for batch in data():
        for which, optimizer in enumerate(parts):
            optimizer.zero_grad()
            reference.losses(batch)[which].backward()
            optimizer.step()
    assert_same(module, reference)
    steps = {name: s["step"] for name, s in callback.state_dict()["layers"].items()}
    assert steps == {"generator.weight": 3, "critic.weight": 3}


def test_manual_clipping_acts_on_the_raw_gradient():
    class Clipped(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            self.clip_gradients(optimizer, 0.05, "norm")
            optimizer.step()

    module = Clipped()
    fitted(module, NeuRMSCallback(variant="U"))
    assert_same(module, by_hand(clip=0.05))


def test_a_neurms_beside_a_plain_optimizer_is_left_to_itself():
    class Mixed(Adversaries):
        def configure_optimizers(self) -> Any:
            return [
                neurms.NeuRMS(self.generator, lr=0.1, variant="F"),
                torch.optim.SGD(self.critic.parameters(), lr=0.1),
            ]

    module, counts = Mixed(), CountTaps()
    trainer(NeuRMSCallback(variant="U"), counts, max_epochs=1).fit(module, data())
    assert counts.counts == {2}
    reference = Adversaries()
    parts = [
        neurms.NeuRMS(reference.generator, lr=0.1, variant="F"),
        neurms.NeuRMS(reference.critic, lr=0.1, variant="U"),
    ]
    for batch in data():
        for which, optimizer in enumerate(parts):
            optimizer.zero_grad()
            reference.losses(batch)[which].backward()
            optimizer.step()
    assert_same(module, reference)


def test_a_thawed_backbone_is_preconditioned_from_then_on():
    class Thawing(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(self.net[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    callback = NeuRMSCallback(variant="U")
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fitted(Thawing(), callback, thaw, max_epochs=2)
    steps = sorted(s["step"] for s in callback.state_dict()["layers"].values())
    assert steps == [3, 6]


@pytest.mark.parametrize("update", ["step", "backward"])
def test_a_module_with_neurms_is_not_preconditioned_twice(update):
    module, counts = WithNeuRMS(update=update), CountTaps()
    callback = NeuRMSCallback(update=update, variant="U")
    fitted(module, callback, counts)
    assert_same(module, by_hand())
    assert counts.counts == {2}
    assert taps_of(module) == 0
    assert callback.state_dict() == {}
    assert len(callback.plan()) == 4


def test_a_module_with_neurms_gets_the_loss_scale():
    module = WithNeuRMS()
    fitted(module, NeuRMSCallback(variant="U"), **scaled(init_scale=1024.0))
    assert_same(module, by_hand())


@pytest.mark.parametrize(
    "settings",
    [{}, {"update": "backward"}, {"variant": "P", "update": "backward", "momentum": 0.0}],
    ids=str,
)
def test_a_kept_neurms_is_tapped_again_by_the_next_fit(settings):
    class Kept(WithNeuRMS):
        def configure_optimizers(self) -> Any:
            self.kept = getattr(self, "kept", None) or super().configure_optimizers()
            return self.kept

    module, callback = Kept(**settings), NeuRMSCallback()
    fitted(module, callback, max_epochs=1)
    assert taps_of(module) == 0
    fitted(module, callback, max_epochs=1)
    assert_same(module, by_hand(steps=6, **settings))


@pytest.mark.parametrize("variant", ["U", "B", "F"])
def test_backward_updates_beside_sgd(variant):
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    settings = {"variant": variant, "update": "backward"}
    module = fitted(Scheduled(), NeuRMSCallback(**{"variant": "U", **settings}), max_epochs=2)
    at_step = fitted(Scheduled(), NeuRMSCallback(variant=variant), max_epochs=2)
    assert_same(module, at_step)
    assert taps_of(module) == 0


def test_backward_updates_in_bfloat16_are_those_of_the_optimizer_itself():
    settings = {"update": "backward", "gemm": "bfloat16"}
    module = fitted(Classifier(), NeuRMSCallback(**{"variant": "U", **settings}))
    own, plain = fitted(WithNeuRMS(**settings)), fitted(WithNeuRMS(update="backward"))
    assert_same(module, own)
    weights = zip(own.parameters(), plain.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize("variant", ["F", "P"])
def test_a_few_scalars_are_logged(variant):
    run = trainer(NeuRMSCallback(variant=variant), log_every_n_steps=1)
    run.fit(Classifier(momentum=0.0), data())
    logged = {k: float(v) for k, v in run.callback_metrics.items() if k.startswith("neurms/")}
    assert logged.keys() == {
        f"neurms/{name}"
        for name in ("clipped_fraction", "scale_median", "feature_scale_median", "skipped_steps")
    }
    assert 0 <= logged["neurms/clipped_fraction"] <= 1
    assert logged["neurms/scale_median"] > 0


@pytest.mark.parametrize("module", [Classifier, WithNeuRMS, Adversaries])
def test_logging_works_for_every_kind_of_module_and_can_be_switched_off(module):
    for log in (True, False):
        run = trainer(NeuRMSCallback(log=log, variant="U"), log_every_n_steps=1)
        run.fit(module(), data())
        assert ("neurms/scale_median" in run.callback_metrics) == log


def test_barebones():
    module = Classifier()
    Trainer(
        max_steps=6, barebones=True, accelerator="cpu", callbacks=[NeuRMSCallback(variant="U")]
    ).fit(module, data())
    assert_same(module, by_hand())


def test_the_profiler_shows_the_work():
    profiler = SimpleProfiler()
    fitted(Classifier(), NeuRMSCallback(variant="U"), profiler=profiler)
    assert len(profiler.recorded_durations["[NeuRMS]precondition"]) == 6


def test_averaging_callbacks_beside_it():
    ema = EMAWeightAveraging()
    module = fitted(Classifier(), NeuRMSCallback(variant="U"), ema, max_epochs=2)
    assert taps_of(module) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        averaged = fitted(
            Classifier(),
            NeuRMSCallback(variant="U"),
            StochasticWeightAveraging(0.01, 1),
            max_epochs=3,
        )
    assert all(torch.isfinite(p).all() for p in averaged.parameters())


def test_the_learning_rate_finder_leaves_no_trace(tmp_path):
    module = Classifier()
    run = trainer(NeuRMSCallback(variant="U"), max_epochs=2, default_root_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Tuner(run).lr_find(module, data(), num_training=3, update_attr=False)
    assert taps_of(module) == 0
    run.fit(module, data())
    assert_same(module, by_hand())


def test_a_compiled_submodule_is_seen():
    module = Classifier()
    module.net.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted(module, NeuRMSCallback(log=False, variant="U"))
    assert_same(module, by_hand())


class Halves(Classifier):
    """Sees its own half of every batch on each of two ranks."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step([part[self.global_rank :: 2] for part in batch], index)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", ["B", "F"])
def test_two_processes_with_half_batches_are_one(variant):
    module = Halves()
    fitted(
        module,
        NeuRMSCallback(variant=variant),
        strategy="ddp_spawn",
        devices=2,
        use_distributed_sampler=False,
    )
    assert_same(module, by_hand(variant=variant), tolerance=1e-5)
