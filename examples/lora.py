"""LoRA by peft with an optimizer of this library: adapters of a small LLaMA, its base frozen."""

import argparse
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import neurms

LENGTH = 64


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", default="rmnp", help="a name from neurms.available()")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def rows(text: str) -> Tensor:
    ascii_text = text.encode("ascii", errors="replace")
    return torch.tensor(list(ascii_text)).unfold(0, LENGTH, LENGTH)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, steps: int
) -> list[float]:
    losses = []
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (16,))]
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    text = "\n".join(topics.values())
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
    # The base learns English; its adapters are to learn that all letters are capitals.
    adamw = torch.optim.AdamW(model.parameters(), lr=2e-3)
    train(model, adamw, rows(text), 60 if arguments.quick else 300)

    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    optimizer = neurms.create(arguments.optimizer, adapted, lr=arguments.lr)
    steps = 40 if arguments.quick else arguments.steps
    losses = train(adapted, optimizer, rows(text.upper()), steps)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    print(
        f"loss {losses[0]:.2f} -> {sum(losses[-5:]) / 5:.2f}: {trained:,} parameters trained, "
        f"{optimizer.state_bytes():,} bytes of state"
    )


if __name__ == "__main__":
    main()
