"""A training under Accelerate's FSDP2, started by torchrun; leaves whole weights in a file."""

from __future__ import annotations

import os
import sys
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import neurms
from neurms.core.ground.shards import is_sharded
from tests.core.distributed.trainings import Network, batch

STEPS = 4


def accelerated() -> Accelerator:
    """Return an accelerator that shards, where this world has several ranks."""
    made = Accelerator(cpu=True)
    if made.num_processes > 1:
        # Accelerate 1.15 says FSDP on accelerators alone; its code does as well here.
        made.state.distributed_type = DistributedType.FSDP
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="size_based_wrap",
            min_num_params=30,
            cpu_ram_efficient_loading=False,
        )
    return made


def trained(rule: str) -> dict[str, Tensor]:
    """Train by a rule and return the whole weights."""
    accelerator = accelerated()
    model = Network().double()
    settings = {"rank": 3, "leading": 1} if rule == "alice" else {}
    # Of the model as it is; Accelerate then puts shards in the place of its parameters.
    optimizer = neurms.create(rule, model, lr=0.05, **settings)
    model, optimizer = accelerator.prepare(model, optimizer)
    cut = accelerator.num_processes > 1
    assert all(is_sharded(parameter) is cut for parameter in model.parameters())
    for step in range(STEPS):
        ranks, rank = accelerator.num_processes, accelerator.process_index
        x, y = (part.chunk(ranks)[rank] for part in batch(step, torch.float64))
        accelerator.backward((model(x) - y).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    return dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))


def main(path: str, *rules: str) -> None:
    """Train by every rule and save the weights."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {f"{rule}.{name}": value for rule in rules for name, value in trained(rule).items()}
    if int(os.environ["RANK"]) == 0:
        torch.save(found, path)
    torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
