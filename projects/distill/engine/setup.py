"""The start of a run: its config, device, data sets and schedule, before anything is built."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

from ..config import load_config, unlabeled_per_batch, validate_config
from ..data.registration import register_own_sets
from ..errors import ConfigError

logger = logging.getLogger(__name__)


def setup_config(config_file: str, opts: Sequence[Any] = (), *, training: bool = True) -> CfgNode:
    """Return the config of a run: loaded, with its data sets registered, validated and frozen.

    Args:
        config_file: yaml path, or "" for the defaults.
        opts: KEY VALUE overrides.
        training: False for evaluation, which needs neither the teacher nor the training data.

    Raises:
        ConfigError, DataError: one sentence that names what to change.
    """
    return finish_config(load_config(config_file, opts), training=training)


def finish_config(cfg: CfgNode, *, training: bool = True) -> CfgNode:
    """Choose the device of a loaded config, register its data sets, validate and freeze it.

    Raises:
        ConfigError, DataError: one sentence that names what to change.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is %s, but there is no GPU: using the CPU", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE.startswith("cuda:"):  # memory and kernels are then measured there, too
        torch.cuda.set_device(cfg.MODEL.DEVICE)
    register_own_sets(cfg, None if training else cfg.DATASETS.TEST)
    validate_config(cfg, training=training)
    cfg.freeze()
    return cfg


def be_deterministic() -> None:
    """Use CUDA algorithms that give the same bits every time, as the CPU's do."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses without it
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def scale_to_workers(cfg: CfgNode) -> CfgNode:
    """Scale the schedule to the number of processes, as detectron2's ``auto_scale_workers`` does.

    The moving average, the calibration, the switch of augmentations, the schedules of the heads
    and YOLOX's L1 loss are scaled, too.
    """
    scaled: CfgNode = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
    factor = scaled.SOLVER.MAX_ITER / cfg.SOLVER.MAX_ITER
    if factor == 1:
        return scaled
    scaled = scaled.clone()
    scaled.defrost()
    ema = scaled.SOLVER.EMA
    ema.DECAY **= 1 / factor  # as much of the average is forgotten over as many images
    ema.WARMUP_ITERS = round(ema.WARMUP_ITERS * factor)
    qat = scaled.SOLVER.QAT
    qat.CALIBRATION_ITERS = round(qat.CALIBRATION_ITERS * factor)
    augment = scaled.INPUT.AUGMENT
    augment.SWITCH_ITER = round(augment.SWITCH_ITER * factor)
    unlabeled = scaled.MODEL.DISTILL.UNLABELED
    unlabeled.WARMUP_ITERS = round(unlabeled.WARMUP_ITERS * factor)
    if scaled.MODEL.YOLOX.L1_FROM_ITER > 0:
        scaled.MODEL.YOLOX.L1_FROM_ITER = round(scaled.MODEL.YOLOX.L1_FROM_ITER * factor)
    for head in scaled.MODEL.DISTILL.HEADS:
        section = scaled.MODEL.DISTILL[head.upper()]
        for key in [key for key in section if key.endswith(("_ITER", "_ITERS"))]:
            section[key] = round(section[key] * factor)
    scaled.freeze()
    return scaled


def check_batch_size(cfg: CfgNode) -> None:
    """Raise ConfigError if processes and parts cannot share a batch evenly."""
    world, parts = comm.get_world_size(), cfg.SOLVER.ACCUMULATE
    if cfg.SOLVER.IMS_PER_BATCH % (world * parts):
        of_parts = f", times SOLVER.ACCUMULATE {parts}" if parts > 1 else ""
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a multiple of the "
            f"{world} processes{of_parts}."
        )
    unlabeled = unlabeled_per_batch(cfg)
    if cfg.DATASETS.UNLABELED and (unlabeled == 0 or unlabeled % (world * parts)):
        raise ConfigError(
            f"DATASETS.UNLABELED_RATIO is {cfg.DATASETS.UNLABELED_RATIO}, which gives {unlabeled} "
            f"unlabelled images per {cfg.SOLVER.IMS_PER_BATCH} labelled ones; make it a multiple "
            f"of {world * parts}."
        )
