"""A Lightning training that torchrun starts on several ranks; leaves the weights in a file."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from neurms.callbacks import NeuRMSCallback
from neurms.integrations.lightning import optimizer_config
from tests.core.distributed.trainings import ROWS, Network, batch

STEPS = 4


class Module(lightning.LightningModule):
    """Sees its rank's share of every global batch."""

    def __init__(self, rule: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self.rule, self.settings = rule, settings
        self.net = Network().double()

    def configure_model(self) -> None:
        if getattr(self, "device_mesh", None) is None:
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = (part.chunk(self.trainer.world_size)[self.global_rank] for part in batch)
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self) -> Any:
        if self.rule == "callback":
            return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.5)
        return optimizer_config(self, self.rule, **self.settings)


def trained(rule: str, strategy: str) -> dict[str, Tensor]:
    """Fit and return the whole weights."""
    steps = [batch(step, torch.float64) for step in range(STEPS)]
    x, y = (torch.cat(parts) for parts in zip(*steps, strict=True))
    chosen: dict[str, Strategy] = {
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "fsdp2": ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
        ),
    }
    module = Module(rule, {"lr": 0.05, **({"rank": 3, "leading": 1} if rule == "alice" else {})})
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2 if strategy in chosen else 1,
        strategy=chosen.get(strategy, "auto"),
        callbacks=[NeuRMSCallback(variant="F", log=False)] if rule == "callback" else [],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), ROWS))
    options = StateDictOptions(full_state_dict=True)
    return dict(get_model_state_dict(module.net, options=options))


def main(strategy: str, path: str, *rules: str) -> None:
    """Fit under every rule and save the weights."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {
        f"{rule}.{name}": value for rule in rules for name, value in trained(rule, strategy).items()
    }
    if int(os.environ["RANK"]) == 0:
        torch.save(found, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
