"""Reductions and exchanges over all processes."""

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor


def reduce_mean(count: Tensor, minimum: float = 1.0) -> Tensor:
    """Return the mean of ``count`` over all processes, at least ``minimum`` for the whole batch.

    DistributedDataParallel averages gradients. So a sum divided by this mean has the gradient of
    one process with the joint batch. ``reduce_mean(x).clamp(min=1)`` bounds the mean itself from
    below, as the authors of GFL and RTMDet do: max(mean, 1).
    """
    count = count.detach().clone().float()
    world = comm.get_world_size()
    if world > 1:
        dist.all_reduce(count)
    return count.clamp(min=minimum) / world


def gather(x: Tensor) -> Tensor:
    """Concatenate ``x`` of all processes along the first dimension, without gradient."""
    world = comm.get_world_size()
    if world == 1:
        return x.detach()
    sent = x.detach().contiguous()
    sent = sent.byte() if x.dtype == torch.bool else sent  # gloo sends no bool
    parts = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(parts, sent)
    return torch.cat(parts).to(x.dtype)
