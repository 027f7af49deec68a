"""Hugging Face's Trainer with an optimizer of this library, on a small random LLaMA."""

import argparse
import tempfile
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from neurms.integrations.transformers import trainer_optimizers

LENGTH = 64


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", default="racs", help="a name from neurms.available()")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def help_texts() -> list[dict[str, Tensor]]:
    ascii_text = "\n".join(topics.values()).encode("ascii", errors="replace")
    rows = torch.tensor(list(ascii_text)).unfold(0, LENGTH, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    arguments = parse_arguments()
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            max_steps=20 if arguments.quick else arguments.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=arguments.lr,
            weight_decay=arguments.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            save_strategy="no",
            report_to="none",
            logging_steps=20,
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model,
            training,
            train_dataset=help_texts(),
            # With args=training its learning_rate and weight_decay are the optimizer's.
            optimizers=trainer_optimizers(model, arguments.optimizer, args=training),
        )
        result = trainer.train()
    print(f"mean loss {result.training_loss:.3f} over {result.global_step} steps")


if __name__ == "__main__":
    main()
