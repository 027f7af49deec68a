"""timm's create_optimizer_v2 with an optimizer of this library, on a small vision transformer."""

import argparse

import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from torch import nn

import neurms


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", default="racs", help="a name from neurms.available()")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def announce(name: str, model: nn.Module) -> str:
    """Register a rule with timm for a model, and return the name that timm knows it by."""

    def made(groups: list[dict], **settings: object) -> torch.optim.Optimizer:
        # timm sorts parameters by weight decay; the model still says which are matrices.
        return neurms.create(name, model, groups=groups, **settings)

    # timm takes what stands before an underscore for a wrapper, such as lookahead.
    short = "neurms" + name.replace("_", "")
    default_registry.register(OptimInfo(short, made, has_eps=False))
    return short


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    inputs, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(inputs / 16.0).float().view(-1, 1, 8, 8), torch.tensor(targets)
    model = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=2, num_heads=4
    )
    optimizer = create_optimizer_v2(
        model,
        opt=announce(arguments.optimizer, model),
        lr=arguments.lr,
        weight_decay=arguments.weight_decay,
    )
    for _ in range(6 if arguments.quick else arguments.epochs):
        for batch in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(images[1400:]).argmax(1) == labels[1400:]
    print(f"accuracy {right.float().mean():.1%} with {optimizer.state_bytes():,} bytes of state")


if __name__ == "__main__":
    main()
