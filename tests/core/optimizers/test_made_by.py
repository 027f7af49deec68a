"""The note in a state dict: what made it, read by people and by nothing else."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import neurms
from neurms.compiled.native import load as loading
from neurms.core.optimizers.made_by import MADE_BY, made_by
from tests.core.optimizers.training import assert_same_state, make, small_model, train


def trained(name: str, **settings: Any) -> tuple[nn.Module, Any]:
    model = small_model()
    optimizer = make(name, model, **settings)
    train(model, optimizer, 2)
    return model, optimizer


def test_releases_processor_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_loaded", {"kernels": loading._Loaded(None, "from there, avx9")})
    assert made_by("auto") == {
        "neurms": neurms.__version__,
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "kernels": "from there, avx9",
    }
    assert [made_by(name)["kernels"] for name in ("eager", "inductor")] == ["eager", "inductor"]
    assert {type(value) for value in made_by("auto").values()} == {str}


@pytest.mark.parametrize("loaded", [{}, {"kernels": None}])
def test_native_kernels_that_were_not_loaded_are_not_loaded_to_be_named(
    monkeypatch: pytest.MonkeyPatch, loaded: dict[str, None]
) -> None:
    def refuse() -> None:
        raise AssertionError("the native library was asked for")

    monkeypatch.setattr(loading, "_loaded", loaded)
    monkeypatch.setattr(loading, "_load", refuse)
    assert made_by("auto")["kernels"] == "eager"


@pytest.mark.parametrize("name", ["racs", "neurms"])
def test_any_note_or_none_is_taken(name: str) -> None:
    model, optimizer = trained(name)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved[MADE_BY] == made_by("auto")
    without = {key: value for key, value in saved.items() if key != MADE_BY}
    for other in (without, {**saved, MADE_BY: {"kernels": "abacus"}}, {**saved, MADE_BY: None}):
        train(model, optimizer, 1)
        optimizer.load_state_dict(other)
        assert_same_state(optimizer.state_dict(), saved)


def test_a_preconditioner_s_state_has_it_too() -> None:
    model = small_model()
    preconditioner = neurms.GradientPreconditioner(model, backend="eager", variant="U")
    saved = preconditioner.state_dict()
    assert saved[MADE_BY] == made_by("eager")
    del saved[MADE_BY]
    preconditioner.load_state_dict(saved)


def test_a_file_loads_with_weights_only() -> None:
    _, optimizer = trained("rmnp")
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)[MADE_BY] == made_by("auto")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["racs", "neurms"])
def test_through_distributed_checkpoints(name: str, tmp_path: Path) -> None:
    """A whole state dict takes the note along; torch's own reader of optimizers drops it."""
    model, optimizer = trained(name)
    saved = copy.deepcopy(optimizer.state_dict())
    saved[MADE_BY]["kernels"] = "another's"
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "whole", no_dist=True)
    found = {"optimizer": optimizer.state_dict()}
    dcp.load(found, checkpoint_id=tmp_path / "whole", no_dist=True)
    assert found["optimizer"][MADE_BY] == saved[MADE_BY] != made_by("auto")

    parts = get_optimizer_state_dict(model, optimizer)
    assert parts.keys() == {"state", "param_groups"}
    dcp.save({"optimizer": parts}, checkpoint_id=tmp_path / "parts", no_dist=True)
    dcp.load({"optimizer": parts}, checkpoint_id=tmp_path / "parts", no_dist=True)
    set_optimizer_state_dict(model, optimizer, parts)
    assert_same_state(optimizer.state_dict()["state"], saved["state"])


def test_a_lightning_checkpoint_has_it(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return neurms.RACS(self, lr=0.01)

    def fit(**settings: Any) -> Any:
        trainer = lightning.Trainer(
            max_epochs=settings.pop("max_epochs"),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = torch.utils.data.TensorDataset(torch.randn(4, 4))
        trainer.fit(Module(), torch.utils.data.DataLoader(data, 2), **settings)
        return trainer

    path = tmp_path / "last.ckpt"
    fit(max_epochs=1).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["optimizer_states"][0]
    assert saved[MADE_BY] == made_by("auto")
    assert fit(max_epochs=2, ckpt_path=path, weights_only=True).global_step == 4


def test_what_a_hook_makes_of_it_is_what_is_returned() -> None:
    _, optimizer = trained("rmnp")
    seen: list[bool] = []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(MADE_BY in saved))
    handle = optimizer.register_state_dict_post_hook(lambda _, saved: {"inner": saved})
    saved = optimizer.state_dict()
    assert set(saved) == {"inner"}
    assert MADE_BY in saved["inner"]
    handle.remove()
    assert MADE_BY in optimizer.state_dict()
    assert seen == [True, True]
