"""Loaders of batches; a training batch depends only on the run's seed and the iteration."""

import copy
import logging
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import cv2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, build_detection_test_loader
from detectron2.data.build import _train_loader_from_config, trivial_batch_collator
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config import unlabeled_per_batch
from ..errors import ConfigError, DataError
from ..structures import UNLABELED
from ..utils.seeding import derived_seed, private_randomness
from .augment.mapper import AugmentingMapper
from .contiguous import with_contiguous_images
from .guarded_mapper import BadImage, GuardedMapper
from .stream import REACH, Sample, Surroundings

logger = logging.getLogger(__name__)

UNLABELED_STREAM = 1  # with the run's seed, it gives the seed of the unlabelled images
MAX_REPLACEMENTS = 20  # number of bad images in a row that is an error of the data set


class Batches(Sampler[list[Sample]]):
    """Sampler of this process's batches, in the order of detectron2's samplers and grouping.

    Args:
        sampler: sampler of detectron2, whose stream the processes share.
        batch_size: samples per batch.
        groups: group of each image; all images of a batch are of one group. None: no groups.
        start: iteration at which the batches begin. Earlier batches are counted, but not loaded.
    """

    def __init__(
        self,
        sampler: TrainingSampler | RepeatFactorTrainingSampler,
        batch_size: int,
        groups: Sequence[bool] | None = None,
        start: int = 0,
    ):
        self.sampler = sampler
        self.batch_size = batch_size
        self.groups = groups
        self.start = start

    def __iter__(self) -> Iterator[list[Sample]]:
        return islice(self._all_batches(), self.start, None)

    def _all_batches(self) -> Iterator[list[Sample]]:
        waiting: dict[bool, list[Sample]] = {False: [], True: []}
        iteration = 0
        for sample in self._samples():
            group = waiting[self.groups[sample.image] if self.groups else False]
            group.append(sample)
            if len(group) == self.batch_size:
                yield [x._replace(iteration=iteration) for x in group]
                group.clear()
                iteration += 1

    def _samples(self) -> Iterator[Sample]:
        """Yield this process's share of the stream, as detectron2's samplers do."""
        rank, world = comm.get_rank(), comm.get_world_size()
        # Iterating over the sampler would give only this process's share, without its partners.
        recent: deque[int] = deque(maxlen=REACH)
        for position, image in enumerate(self.sampler._infinite_indices()):
            if position % world == rank:
                yield Sample(position, image, recent=tuple(recent))
            recent.append(image)


class Samples(Dataset[Any]):
    """Data set that maps an image with random numbers of its position in the stream.

    Args:
        dicts: detectron2's dataset dicts.
        mapper: a mapper with detectron2's contract, or an :class:`AugmentingMapper`. Images that
            it cannot map become a :class:`BadImage`.
        seed: seed of the run.
        drop: replace bad images by other images, instead of returning a :class:`BadImage`.
    """

    def __init__(
        self,
        dicts: Sequence[dict[str, Any]],
        mapper: Callable[..., Any],
        seed: int,
        drop: bool = False,
    ):
        self.dicts = dicts
        self.mapper = GuardedMapper(mapper)
        self.seed = seed
        self.drop = drop

    def __getitem__(self, sample: Sample) -> dict[str, Any] | BadImage:
        index, bad = sample.image, []
        for attempt in range(MAX_REPLACEMENTS):
            key = (self.seed, sample.position, attempt)
            with private_randomness(*key):
                mapped = self._mapped(sample._replace(image=index))
            if isinstance(mapped, BadImage):
                if not self.drop:
                    return mapped
                bad.append(mapped)
            elif mapped is not None:  # with None, a mapper of detectron2 asks for another image
                return {**mapped, "left_out": bad} if bad else mapped
            index = derived_seed(*key) % len(self.dicts)
        if bad:
            reason = f"{bad[0].reason}; {len(bad) - 1} other images in its place are bad, too"
            return BadImage(bad[0].file_name, reason)
        return BadImage(self.dicts[index]["file_name"], "the mapper returned None for all")

    def _mapped(self, sample: Sample) -> Any:
        entry = self.dicts[sample.image]
        if isinstance(self.mapper.mapper, AugmentingMapper):
            return self.mapper(entry, Surroundings(sample, self.dicts, self.seed))
        return self.mapper(entry)


class MixedBatches(Sampler[list[Sample]]):
    """Sampler of batches with labelled samples first, and then unlabelled ones.

    Args:
        labeled, unlabeled: samplers of the two streams, which do not depend on each other.
    """

    def __init__(self, labeled: Batches, unlabeled: Batches):
        self.labeled = labeled
        self.unlabeled = unlabeled

    def __iter__(self) -> Iterator[list[Sample]]:
        for labeled, unlabeled in zip(self.labeled, self.unlabeled):
            yield [*labeled, *(x._replace(unlabeled=True) for x in unlabeled)]


class MixedSamples(Dataset[Any]):
    """Samples of both streams; the unlabelled ones are marked by :data:`UNLABELED`."""

    def __init__(self, labeled: Samples, unlabeled: Samples):
        self.labeled = labeled
        self.unlabeled = unlabeled

    def __getitem__(self, sample: Sample) -> dict[str, Any] | BadImage:
        if not sample.unlabeled:
            return self.labeled[sample]
        mapped = self.unlabeled[sample]
        return mapped if isinstance(mapped, BadImage) else {**mapped, UNLABELED: True}


class TrainLoader:
    """Endless iterable of this process's batches.

    Args:
        samples: data set of the samples.
        batches: sampler of the batches.
        workers: number of data processes; 0: load in this process.
        timeout: seconds to wait for a worker; 0: without a limit.

    Attributes:
        left_out: reasons by file name of the images that were dropped so far.
    """

    def __init__(
        self,
        samples: Samples | MixedSamples,
        batches: Batches | MixedBatches,
        *,
        workers: int,
        timeout: float,
    ):
        self.samples, self.batches = samples, batches
        self.left_out: dict[str, str] = {}
        self.loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=trivial_batch_collator,
            timeout=timeout if workers else 0,
            generator=torch.Generator(),  # otherwise the loader uses the global generator
            worker_init_fn=_start_worker,
        )

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batch in _fetched(self.loader):
            for entry in batch:
                if isinstance(entry, BadImage):
                    raise _unusable(entry, "DATALOADER.ON_BAD_IMAGE drop trains without them")
                for bad in entry.pop("left_out", ()):
                    self._note(bad)
            yield batch

    def _note(self, bad: BadImage) -> None:
        if bad.file_name not in self.left_out:
            self.left_out[bad.file_name] = bad.reason
            logger.warning(
                "Dropped %s: %s (%d so far)", bad.file_name, bad.reason, len(self.left_out)
            )


class EvaluationLoader:
    """detectron2's test loader with a DataError that names the bad image.

    It never drops images, because the results would not be those of the whole test set. The first
    ``TEST.VIS_IMAGES`` images of a process have their dataset dict as ``truth``.
    """

    def __init__(self, cfg: CfgNode, name: str):
        mapper = GuardedMapper(inference_mapper(cfg))
        self.loader = build_detection_test_loader(cfg, name, mapper=mapper)
        self.loader.worker_init_fn = _start_worker
        self.drawn = cfg.TEST.VIS_IMAGES

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        drawn = islice(self.loader.sampler, self.drawn)
        for batch in _fetched(self.loader):
            for entry in batch:
                if isinstance(entry, BadImage):
                    raise _unusable(entry, "an evaluation needs all images of its data set")
            for entry, index in zip(batch, drawn):
                entry["truth"] = self.loader.dataset._dataset[index]
            yield batch


def inference_mapper(cfg: CfgNode) -> DatasetMapper:
    """Build detectron2's mapper for images without annotations.

    It needs no keypoints, whose names detectron2 would take from ``DATASETS.TRAIN``. These sets may
    be of another training, or gone.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.KEYPOINT_ON = False
    return with_contiguous_images(DatasetMapper(cfg, is_train=False))


def _fetched(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of torch's loader, and turn a lost connection to a worker into an error.

    torch notices a dead worker only later.
    """
    try:
        yield from loader
    except (ConnectionError, EOFError) as e:
        raise DataError(
            "a data worker was killed or crashed: lower DATALOADER.NUM_WORKERS if memory is short, "
            "and continue with --resume."
        ) from e


def _unusable(image: BadImage, remedy: str) -> DataError:
    return DataError(
        f"Image {image.file_name}: {image.reason}. `distill check-data` lists all such "
        f"images; {remedy}."
    )


def _start_worker(worker: int) -> None:
    """Prepare a data worker.

    It ends if its parent was killed during the start; torch notices later kills.

    If the parent ends while a batch is sent, the sending thread loses the connection. It must not
    print a traceback after the parent's own message.
    """
    cv2.setNumThreads(0)  # there are as many workers as cores; and a fork may lose the threads
    parent = multiprocessing.parent_process()
    if multiprocessing.get_start_method() != "forkserver" and parent and parent.pid != os.getppid():
        os._exit(1)
    show = sys.excepthook  # only for threads: errors of the worker itself reach the parent
    lost = (ConnectionError, EOFError)
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, lost) else show(kind, *rest)


# Samplers for which detectron2 would read the data sets again, with the images that were dropped.
_WEIGHTED = ("WeightedTrainingSampler", "WeightedCategoryTrainingSampler")
_BY_CATEGORY = ("RepeatFactorTrainingSampler", "WeightedCategoryTrainingSampler")


def build_sampler(
    cfg: CfgNode, sets: Sequence[tuple[str, list[dict[str, Any]]]]
) -> TrainingSampler | RepeatFactorTrainingSampler:
    """Build detectron2's sampler ``DATALOADER.SAMPLER_TRAIN`` for the images of all sets.

    Args:
        cfg: the whole config.
        sets: names and dataset dicts of the training sets.

    Raises:
        ConfigError: the sampler selects no image, or it needs classes that the images lack.
    """
    name = cfg.DATALOADER.SAMPLER_TRAIN
    dicts = [entry for _, entries in sets for entry in entries]
    if name in _BY_CATEGORY and not all("annotations" in x for x in dicts):
        raise ConfigError(
            f"DATALOADER.SAMPLER_TRAIN {name} repeats images with rare classes, but DATASETS.TRAIN "
            f"{tuple(cfg.DATASETS.TRAIN)} has no annotated objects; use TrainingSampler."
        )
    ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
    if name == "RandomSubsetTrainingSampler" and len(dicts) * ratio < 1:
        raise ConfigError(
            f"DATALOADER.RANDOM_SUBSET_RATIO is {ratio}, which leaves none of the {len(dicts)} "
            "images; raise it."
        )
    if name in _WEIGHTED:
        return RepeatFactorTrainingSampler(repeat_factors(cfg, sets, name in _BY_CATEGORY))
    return _train_loader_from_config(cfg, lambda entry: entry, dataset=dicts)["sampler"]


def repeat_factors(
    cfg: CfgNode, sets: Sequence[tuple[str, list[dict[str, Any]]]], by_category: bool
) -> Tensor:
    """Return the relative frequency of each image in detectron2's weighted samplers.

    Args:
        cfg: the whole config.
        sets: names and dataset dicts of the training sets.
        by_category: multiply by the factors of rare classes, and divide by the smallest product.

    Returns:
        (N,) numbers above 0, in the order of the sets.
    """
    by_set = dict(cfg.DATASETS.TRAIN_REPEAT_FACTOR)
    factors = torch.cat([torch.full((len(x),), float(by_set.get(name, 1))) for name, x in sets])
    if not by_category:
        return factors
    node = cfg.DATALOADER
    by_class = [
        RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            entries, node.REPEAT_THRESHOLD, sqrt=node.REPEAT_SQRT
        )
        for _, entries in sets
    ]
    factors = torch.cat(by_class) * factors
    return factors / factors.min()


def data_seed(cfg: CfgNode, seed: int) -> int:
    """Return the seed of the training images in a run with a seed."""
    return cfg.DATALOADER.SEED if cfg.DATALOADER.SEED >= 0 else seed


def build_train_loader(
    cfg: CfgNode,
    sets: Sequence[tuple[str, list[dict[str, Any]]]],
    mapper: Callable[..., Any],
    *,
    seed: int,
    start: int = 0,
    unlabeled: Sequence[dict[str, Any]] = (),
) -> TrainLoader:
    """Build the training loader of a config.

    Unlabelled images have a stream of their own, with its own seed. So the labelled images of a
    batch are to the bit those of a training without unlabelled images.

    Args:
        cfg: the whole config.
        sets: names and dataset dicts of the training sets.
        mapper: a mapper with detectron2's contract, or an :class:`AugmentingMapper`.
        seed: seed of the run, which determines the order of the images and their augmentations.
        start: iteration at which the batches begin.
        unlabeled: dataset dicts of ``DATASETS.UNLABELED``, without labels.
    """
    dicts = [entry for _, entries in sets for entry in entries]
    with private_randomness(seed):  # detectron2's samplers take their seeds from NumPy's state
        sampler = build_sampler(cfg, sets)
    number = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    samples: Samples | MixedSamples
    batches: Batches | MixedBatches
    samples, batches = _stream(cfg, dicts, mapper, sampler, number, seed, start)
    if unlabeled:
        seed = derived_seed(seed, UNLABELED_STREAM)
        sampler = TrainingSampler(len(unlabeled), seed=seed)
        mapper = copy.deepcopy(mapper)  # its cache has the images by their index
        number = unlabeled_per_batch(cfg) // comm.get_world_size()
        own = _stream(cfg, unlabeled, mapper, sampler, number, seed, start)
        samples, batches = MixedSamples(samples, own[0]), MixedBatches(batches, own[1])
    return TrainLoader(
        samples, batches, workers=cfg.DATALOADER.NUM_WORKERS, timeout=cfg.DATALOADER.TIMEOUT
    )


def _stream(
    cfg: CfgNode,
    dicts: Sequence[dict[str, Any]],
    mapper: Callable[..., Any],
    sampler: TrainingSampler | RepeatFactorTrainingSampler,
    number: int,
    seed: int,
    start: int,
) -> tuple[Samples, Batches]:
    """Return the samples of an endless stream, and its batches of ``number`` images."""
    groups = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        groups = [x.get("width", 0) > x.get("height", 0) for x in dicts]
    drop = cfg.DATALOADER.ON_BAD_IMAGE == "drop"
    samples = Samples(DatasetFromList(list(dicts), copy=False), mapper, seed, drop)
    return samples, Batches(sampler, number, groups, start)
