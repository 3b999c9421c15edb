"""Feature maps with mean 0 and deviation 1 in each channel."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

LEAST_VALUES = 8  # per channel; fewer say little of its mean and deviation
NORMALIZE = ("none", "channel")  # names of "the maps themselves" and channel_normalized
NORMALIZE_EPS = 1e-5  # added to the variance, as in batch normalization


def channel_normalized(*maps: Tensor) -> tuple[list[Tensor], Tensor]:
    """Normalize the channels of maps as batch normalization does, without weight and bias.

    The statistics of a channel run over N, H and W of all processes. A gradient passes through
    them.

    Args:
        maps: (N, C, H, W) each, of the same N, H and W. A process may have no image.

    Returns:
        maps: the normalized maps.
        enough: scalar, 1 if a channel has at least ``LEAST_VALUES`` values, otherwise 0.
    """
    own = maps[0].shape[0] * maps[0].shape[2] * maps[0].shape[3]
    sums = [x.sum((0, 2, 3)) for x in maps]
    *means, count = _over_processes([*sums, sums[0].new_tensor([own])])
    count = count.detach().clamp(min=1)
    centred = [x - (mean / count)[:, None, None] for x, mean in zip(maps, means)]
    squares = _over_processes([x.square().sum((0, 2, 3)) for x in centred])
    deviations = [(x / count + NORMALIZE_EPS).sqrt() for x in squares]
    normalized = [x / deviation[:, None, None] for x, deviation in zip(centred, deviations)]
    return normalized, (count >= LEAST_VALUES).squeeze(0).to(maps[0].dtype)


def _over_processes(sums: list[Tensor]) -> list[Tensor]:
    """Return vectors summed over all processes, by one exchange."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return sums
    return list(all_reduce(torch.cat(sums)).split([len(x) for x in sums]))
