"""Milliseconds per image of the training data and of an evaluation, on the config's data sets."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat, tee
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data.detection_utils import read_image
from detectron2.data.samplers import TrainingSampler

from ...data.datasets import load_training_sets
from ...data.loader import build_train_loader
from ...engine import Trainer, load_student
from ...engine.trainer import train_mapper
from ...errors import ConfigError
from ...modeling.meta_arch import build_student
from ...utils.progress import Progress
from ...utils.timing import seconds, spread, timed

SEED = 0
Row = dict[str, Any]


def measure_data(cfg: CfgNode, number: int, progress: Progress) -> dict[str, Row]:
    """Return the spread of the ``milliseconds`` per image by part of the training data.

    All parts run in this process, on the same ``number`` images. They are

    - ``decode``: read the file,
    - ``mapper``: read it, and resize and augment image and annotations,
    - ``loader``: the mapper and the batches of this package's loader,
    - ``detectron2``: detectron2's own loader, with its mapper.
    """
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 0
    parts = _data_parts(cfg)
    images = {"loader": cfg.SOLVER.IMS_PER_BATCH, "detectron2": cfg.SOLVER.IMS_PER_BATCH}
    times: dict[str, list[float]] = {name: [] for name in parts}
    for k in progress.track(range(number), description="data"):
        for name, calls in parts.items():
            loaded = images.get(name, 1)
            if k % loaded == 0:
                times[name].append(1000 * seconds(next(calls), False) / loaded)
    return {name: {"milliseconds": spread(x)} for name, x in times.items()}


def _data_parts(cfg: CfgNode) -> dict[str, Iterator[Callable[[], Any]]]:
    """Return endless calls of each part, which load an image or a batch of the same stream."""
    sets = load_training_sets(cfg)
    dicts = [entry for _, entries in sets for entry in entries]
    own, mapped = (build_train_loader(cfg, sets, train_mapper(cfg), seed=SEED) for _ in range(2))
    stock = build_detection_train_loader(
        dicts,
        mapper=DatasetMapper(cfg, is_train=True),
        sampler=TrainingSampler(len(dicts), seed=SEED),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=0,
    )
    for_files, for_images = tee(sample for batch in mapped.batches for sample in batch)
    files = (dicts[x.image]["file_name"] for x in for_files)
    return {
        "decode": (partial(read_image, file, cfg.INPUT.FORMAT) for file in files),
        "mapper": (partial(mapped.samples.__getitem__, x) for x in for_images),
        "loader": repeat(partial(next, iter(own))),
        "detectron2": repeat(partial(next, iter(stock))),
    }


def measure_evaluation(cfg: CfgNode, number: int, progress: Progress) -> dict[str, Row]:
    """Return the spread of the ``milliseconds`` per image by part of an evaluation.

    They are ``load``, ``network``, ``collect`` and ``metrics``, on the first ``number`` images of
    the test set. ``collect`` is what the evaluator does for each image, and ``metrics`` what it
    does at the end. The student has the weights of ``MODEL.WEIGHTS``, or random ones, which find
    little.

    Raises:
        ConfigError: there is no test set.
    """
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 0
    if not cfg.DATASETS.TEST:
        raise ConfigError("--parts evaluation needs DATASETS.TEST.")
    Trainer.check_evaluation(cfg, training=False)
    name = cfg.DATASETS.TEST[0]
    student = load_student(cfg, cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else build_student(cfg)
    student.eval()
    cuda = cfg.MODEL.DEVICE.startswith("cuda")
    times: dict[str, list[float]] = {part: [] for part in ("load", "network", "collect")}
    with TemporaryDirectory() as folder, torch.no_grad():
        evaluator = Trainer.build_evaluator(cfg, name, str(Path(folder) / "inference"))
        evaluator.reset()
        loader = Trainer.build_test_loader(cfg, name)
        batches, number = iter(loader), min(number, len(loader))
        for _ in progress.track(range(number), description="evaluation"):
            inputs, load = timed(partial(next, batches))
            outputs, network = timed(partial(student, inputs), cuda)
            _, collect = timed(partial(evaluator.process, inputs, outputs))
            for part, value in zip(times.values(), (load, network, collect)):
                part.append(1000 * value)
        _, metrics = timed(evaluator.evaluate)
    times["metrics"] = [1000 * metrics / number]
    return {part: {"milliseconds": spread(x)} for part, x in times.items()}
