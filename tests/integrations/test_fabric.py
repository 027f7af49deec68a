"""Lightning Fabric beside an optimizer of this library: one loop, its checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import neurms

lightning = pytest.importorskip("lightning")

RULES = {"neurms": {"variant": "F", "momentum": 0.9}, "racs": {}}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def prepared(name: str) -> tuple[Any, Any, Any]:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = network()
    groups = [{"params": model[2], "lr": 0.03}]
    optimizer = neurms.create(name, model, lr=0.01, groups=groups, **RULES[name])
    return fabric, *fabric.setup(model, optimizer)


def train(fabric: Any, model: Any, optimizer: Any, steps: int) -> None:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        fabric.backward(model(inputs).square().mean())
        optimizer.step()


@pytest.mark.parametrize("name", RULES)
def test_a_loop_of_fabric_s_is_a_plain_loop(name: str) -> None:
    fabric, model, optimizer = prepared(name)
    train(fabric, model, optimizer, 3)
    plain = network()
    by_hand = neurms.create(
        name, plain, lr=0.01, groups=[{"params": plain[2], "lr": 0.03}], **RULES[name]
    )
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        by_hand.zero_grad()
        plain(inputs).square().mean().backward()
        by_hand.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", RULES)
def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    fabric, model, optimizer = prepared(name)
    train(fabric, model, optimizer, 2)
    fabric.save(tmp_path / "run.ckpt", {"model": model, "optimizer": optimizer})
    train(fabric, model, optimizer, 2)
    fabric, again, other = prepared(name)
    fabric.load(tmp_path / "run.ckpt", {"model": again, "optimizer": other})
    train(fabric, again, other, 2)
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
