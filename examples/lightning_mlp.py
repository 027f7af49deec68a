"""An MLP in Lightning with NeuRMS by one callback, profiled by another."""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from neurms.callbacks import NeuRMSCallback, PreconditionerProfiler


class Classifier(lightning.LightningModule):
    """Knows nothing of NeuRMS: it returns plain SGD."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        inputs, labels = batch
        accuracy = (self.net(inputs).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=["P", "U", "B", "F"], default="P")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate of SGD")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", default="runs/lightning_mlp", help="folder of the profile")
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    lightning.seed_everything(0, verbose=False)
    inputs, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(inputs / 16.0).float(), torch.tensor(labels))
    train, valid = random_split(digits, [1400, len(digits) - 1400])
    profiler = PreconditionerProfiler(every_n_steps=10, output=arguments.output)
    trainer = lightning.Trainer(
        max_epochs=2 if arguments.quick else arguments.epochs,
        callbacks=[NeuRMSCallback(variant=arguments.variant, momentum=0.5), profiler],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not arguments.quick,
    )
    trainer.fit(
        Classifier(arguments.lr),
        DataLoader(train, batch_size=64, shuffle=True),
        DataLoader(valid, batch_size=512),
    )
    print(f"accuracy {float(trainer.callback_metrics['accuracy']):.1%}")
    print(f"the profile again: neurms report {arguments.output}")


if __name__ == "__main__":
    main()
