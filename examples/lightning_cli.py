"""LightningCLI: the optimizer's rule, NeuRMS and the profiler all come from YAML.

Run ``python examples/lightning_cli.py fit --config examples/lightning_cli.yaml``; every setting can
be overridden behind it, such as ``--model.rule racs --model.lr 0.02``.
"""

import lightning
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from neurms.integrations.lightning import optimizer_config


class Classifier(lightning.LightningModule):
    """An MLP whose optimizer is named by its settings.

    Args:
        rule: A name from ``neurms.available()``.
        lr: Learning rate.
        warmup_steps: Steps of linear warmup before the cosine decay.
        width: Hidden units.
    """

    def __init__(
        self, rule: str = "sgd", lr: float = 0.01, warmup_steps: int = 10, width: int = 128
    ) -> None:
        super().__init__()
        self.rule, self.lr, self.warmup_steps = rule, lr, warmup_steps
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        inputs, labels = batch
        self.log("accuracy", (self.net(inputs).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict[str, object]:
        return optimizer_config(
            self, self.rule, lr=self.lr, schedule="cosine", warmup_steps=self.warmup_steps
        )


class Digits(lightning.LightningDataModule):
    """scikit-learn's handwritten digits.

    Args:
        batch_size: Images in a training batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        inputs, labels = load_digits(return_X_y=True)
        images = torch.tensor(inputs / 16.0).float()
        self.train = TensorDataset(images[:1400], torch.tensor(labels[:1400]))
        self.valid = TensorDataset(images[1400:], torch.tensor(labels[1400:]))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.valid, 512)


def main() -> None:
    cli = LightningCLI(Classifier, Digits, save_config_callback=None)
    print(f"accuracy {float(cli.trainer.callback_metrics['accuracy']):.1%}")


if __name__ == "__main__":
    main()
