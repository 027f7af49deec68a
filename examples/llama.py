"""A small LLaMA on the text of Python's own help, trained by RACS or Alice."""

import argparse
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import neurms

SETTINGS = {
    "racs": {"lr": 0.02},
    # The rank and the switching interval of the paper belong to matrices of thousands.
    "alice": {"lr": 0.02, "rank": 32, "leading": 10, "interval": 50},
    "adamw": {"lr": 3e-3},
}
LENGTH = 64


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", choices=SETTINGS, default="racs")
    parser.add_argument("--lr", type=float, help="learning rate; by default the optimizer's")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
    )


def batch_of(text: Tensor, size: int) -> Tensor:
    starts = torch.randint(len(text) - LENGTH, (size,))
    return torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    ascii_text = "\n".join(topics.values()).encode("ascii", errors="replace")
    text = torch.tensor(list(ascii_text))
    model = tiny_llama()
    settings = dict(SETTINGS[arguments.optimizer])
    if arguments.lr is not None:
        settings["lr"] = arguments.lr
    optimizer = neurms.create(arguments.optimizer, model, **settings)
    steps = 20 if arguments.quick else arguments.steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings["lr"], total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    losses = []
    for step in range(1, steps + 1):
        batch = batch_of(text, 16)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, steps // 5) == 0:
            print(f"step {step:4d}  loss {losses[-1]:.3f}")
    values = [value for state in optimizer.state.values() for value in state.values()]
    held = sum(value.nbytes for value in values if isinstance(value, Tensor))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} with {held:,} bytes of optimizer state")


if __name__ == "__main__":
    main()
