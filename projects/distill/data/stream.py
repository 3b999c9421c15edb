"""Positions in the endless stream of training images."""

from collections.abc import Sequence
from typing import Any, NamedTuple

REACH = 40  # positions before a sample from which its partners come, as in RTMDet's cache


class Sample(NamedTuple):
    """Image at a position of the endless stream of training images.

    Attributes:
        position: position in the stream of all processes.
        image: index of the image in the data set.
        iteration: iteration of the training that gets the sample.
        recent: indices of the images at the ``REACH`` positions before, oldest first.
        unlabeled: the stream is that of ``DATASETS.UNLABELED``, which has its own positions.
    """

    position: int
    image: int
    iteration: int = 0
    recent: tuple[int, ...] = ()
    unlabeled: bool = False


class Surroundings(NamedTuple):
    """Everything on which a sample may depend besides its own image.

    Attributes:
        sample: position, iteration, and the images before it.
        dicts: detectron2's dataset dicts.
        seed: seed of the run.
    """

    sample: Sample
    dicts: Sequence[dict[str, Any]]
    seed: int
