"""Several processes in plain PyTorch: DDP, or FSDP2 with ``--shard``, started by torchrun.

    torchrun --nproc-per-node=2 examples/torchrun.py --shard

The same global batch gives the same weights on any number of processes.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import neurms


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", default="neurms", help="a name from neurms.available()")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="over all processes")
    parser.add_argument("--save", type=Path, help="file for the weights")
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of the whole")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # On a machine with accelerators: backend "nccl", one device for each process.
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    digits, targets = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(digits / 16.0).float(), torch.tensor(targets)

    inner = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    if arguments.shard:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in (inner[0], inner[2]):
            fully_shard(layer, mesh=mesh)
        model = fully_shard(inner, mesh=mesh)
    else:
        model = DistributedDataParallel(inner)
    # After the model was sharded: its parameters are others now.
    optimizer = neurms.create(arguments.optimizer, inner, lr=arguments.lr)

    for _ in range(1 if arguments.quick else arguments.epochs):
        # Every process draws the same order and takes its own share of each batch.
        for batch in torch.randperm(1408).split(arguments.batch_size):
            own = batch.chunk(ranks)[rank]
            loss = nn.functional.cross_entropy(model(inputs[own]), labels[own])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    right = (model(inputs[1408:]).argmax(1) == labels[1408:]).float().mean()
    weights = get_model_state_dict(inner, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        print(f"accuracy {float(right):.1%} on {ranks} processes")
        if arguments.save:
            torch.save(weights, arguments.save)
    # No process lets go while another still waits for its part.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
