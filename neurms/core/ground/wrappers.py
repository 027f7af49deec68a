"""Models that torch.distributed wraps."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from neurms.core.ground.errors import UnsupportedTrainingError

__all__ = ["unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, whose parameters keep their own names then.

    Names match checkpoints and seed random draws: they must not depend on a wrapper.

    Args:
        model: Any model.

    Raises:
        UnsupportedTrainingError: A part of it is an FSDP1 module, whose parameters are flat pieces
            that have lost their rows.
    """
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is not None and any(
        isinstance(part, module.FullyShardedDataParallel) for part in model.modules()
    ):
        raise UnsupportedTrainingError(
            "FullyShardedDataParallel flattens parameters, so that no weight is a matrix any more; "
            "shard with torch.distributed.fsdp.fully_shard (Lightning: ModelParallelStrategy)"
        )
    return model.module if isinstance(model, DistributedDataParallel) else model
