"""Pretraining as torchtitan does it: meta device, FSDP2, a schedule, whole checkpoints or none.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node=4 --max-restarts=3 examples/pretraining.py --folder run

A rank may be killed at any moment: torchrun starts all anew, and they go on from the newest whole
checkpoint to the very bits of a run to which nothing happened. On another number of ranks the same
command goes on from there, too.
"""

import argparse
import zlib
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import neurms

LENGTH, WIDTH = 64, 64


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", default="neurms", help="a name from neurms.available()")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=24, help="over all processes")
    parser.add_argument("--folder", type=Path, help="checkpoints; goes on from the newest there")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(128, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 128, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Draw each weight by its name: the same on any number of ranks, one at a time in memory."""
    for name, parameter in model.named_parameters():
        own = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.ones(parameter.shape)
        if parameter.ndim > 1:
            whole.normal_(0.0, 0.02, generator=own)
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))


def batch_of(text: Tensor, step: int, size: int) -> Tensor:
    """Draw a step's batch by the step's number: there is no state of it to save."""
    own = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - LENGTH - 1, (size,), generator=own)
    return torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])


def newest(folder: Path) -> Path | None:
    """Return the last checkpoint that is whole: its ``.metadata`` is written when all else is."""
    whole = [path.parent for path in folder.glob("step-*/.metadata")]
    return max(whole, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def main() -> None:
    arguments = parse_arguments()
    steps, every = (20, 5) if arguments.quick else (arguments.steps, arguments.every)
    # On a machine with accelerators: backend "nccl", one device for each process.
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    with torch.device("meta"):
        model = Model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    initialize(model)
    # After the model was sharded: its parameters are others now.
    optimizer = neurms.create(arguments.optimizer, model, lr=arguments.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, 1.0) * (1.0 - step / (steps + 1))
    )

    def states() -> dict:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "schedule": schedule.state_dict()}

    first = 0
    if arguments.folder and (found := newest(arguments.folder)):
        saved = states()
        dcp.load(saved, checkpoint_id=found)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
        schedule.load_state_dict(saved["schedule"])
        first = schedule.last_epoch

    text = torch.tensor(list("\n".join(topics.values()).encode("ascii", errors="replace")))
    losses = [0.0]
    for step in range(first, steps):
        # Whatever draws, such as dropout, draws by the step's number and the rank.
        torch.manual_seed(step * ranks + rank)
        own = batch_of(text, step, arguments.batch_size).tensor_split(ranks)[rank]
        logits = model(own[:, :-1])
        summed = nn.functional.cross_entropy(
            logits.flatten(0, 1), own[:, 1:].flatten(), reduction="sum"
        )
        # FSDP2 averages over ranks; batches need not be divisible by their number.
        loss = summed * (ranks / (arguments.batch_size * LENGTH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if arguments.folder and ((step + 1) % every == 0 or step + 1 == steps):
            dcp.save(states(), checkpoint_id=arguments.folder / f"step-{step + 1}")
    if rank == 0:
        print(f"steps {first} to {steps} on {ranks} processes: loss {losses[-1]:.3f}")
    # No process lets go while another still waits for its part.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
