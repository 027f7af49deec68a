"""DDP or FSDP2 by Lightning: two processes, one batch; what rules sum they sum over both."""

import argparse

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from neurms.integrations.lightning import optimizer_config


class Classifier(lightning.LightningModule):
    def __init__(self, rule: str, lr: float) -> None:
        super().__init__()
        self.rule, self.lr = rule, lr
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def configure_model(self) -> None:
        # Lightning calls this before it makes the optimizer; ModelParallelStrategy has a mesh.
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        inputs, labels = batch
        right = (self.net(inputs).argmax(1) == labels).float().mean()
        self.log("accuracy", right, sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        return optimizer_config(self, self.rule, lr=self.lr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", default="neurms", help="a name from neurms.available()")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--devices", type=int, default=2, help="processes")
    parser.add_argument("--accelerator", default="cpu", help="cpu, gpu, ...")
    parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def strategy_of(arguments: argparse.Namespace) -> Strategy | str:
    if arguments.devices == 1:
        return "auto"
    if arguments.shard:
        return ModelParallelStrategy(arguments.devices, tensor_parallel_size=1)
    return DDPStrategy()


def main() -> None:
    arguments = parse_arguments()
    lightning.seed_everything(0, verbose=False)
    inputs, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(inputs / 16.0).float(), torch.tensor(targets)
    trainer = lightning.Trainer(
        max_epochs=2 if arguments.quick else arguments.epochs,
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        strategy=strategy_of(arguments),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    # Lightning deals the batches out to the processes by a sampler of its own.
    trainer.fit(
        Classifier(arguments.optimizer, arguments.lr),
        DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=32, shuffle=True),
        DataLoader(TensorDataset(images[1400:], labels[1400:]), batch_size=256),
    )
    if trainer.is_global_zero:
        print(f"accuracy {float(trainer.callback_metrics['accuracy']):.1%}")


if __name__ == "__main__":
    main()
