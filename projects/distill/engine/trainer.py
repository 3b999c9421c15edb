"""The trainer: detectron2's, for plain and distilled students alike."""

import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluators
from detectron2.modeling import build_model
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn

from ..checkpoint import StudentCheckpointer, StudentState
from ..config import (
    building,
    distill_architectures,
    get_distill_cfg,
    merge_from_file,
    merge_from_list,
    student_config,
    validate_config,
)
from ..data.datasets import load_training_set, register_coco_format
from ..data.kitti import IgnoredRegionsMapper
from ..errors import ConfigError
from ..meta_arch import DistillModel
from ..weights import load_strictly, readable
from .evaluators import check_test_sets, evaluator_builders
from .hooks import DistillRatio
from .loop import TrainLoop

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains ``cfg.MODEL.META_ARCHITECTURE``, a plain detectron2 network or a ``Distill*`` one.

    Data are checked before any weight is loaded. Checkpoints are stock checkpoints of the student;
    ``OUTPUT_DIR/student.yaml`` is its plain detectron2 config.

    Args:
        cfg: a config that :func:`validate_config` has passed.
        extra_hooks: appended to detectron2's.

    Raises:
        ConfigError, DataError, WeightsError: before training starts.
    """

    def __init__(self, cfg: CfgNode, extra_hooks: Sequence[HookBase] = ()):
        TrainerBase.__init__(self)
        cfg = scale_to_workers(cfg)
        check_batch_size(cfg)
        dataset = load_training_set(cfg)
        check_test_sets(cfg)
        with building("student"):
            model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = build_detection_train_loader(cfg, dataset=dataset, mapper=train_mapper(cfg))
        self.student: nn.Module = getattr(model, "student", model)
        checkpointables: dict[str, Any] = {"student_state": StudentState(self.student)}
        if isinstance(model, DistillModel):
            checkpointables["distill"] = model.heads
        cpu = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        ddp = create_ddp_model(model, broadcast_buffers=False, **cpu)
        self._trainer = TrainLoop(
            ddp, loader, optimizer, amp=cfg.SOLVER.AMP.ENABLED, device=cfg.MODEL.DEVICE
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # The trainer's state last: it says which iteration everything before belongs to.
        self.checkpointer = StudentCheckpointer(
            self.student, cfg.OUTPUT_DIR, **checkpointables, trainer=self
        )
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks([*self.build_hooks(), *extra_hooks])
        if comm.is_main_process():
            write_student_yaml(cfg)

    def build_hooks(self) -> list[HookBase]:
        hooks = super().build_hooks()
        if self.cfg.MODEL.META_ARCHITECTURE in distill_architectures():
            hooks.insert(0, DistillRatio(self.cfg.MODEL.DISTILL.HEADS))
        return hooks

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint of ``OUTPUT_DIR`` if ``resume``, else ``MODEL.WEIGHTS``.

        Raises:
            WeightsError: the file is missing or unreadable.
        """
        last = self.checkpointer.get_checkpoint_file() if resume else ""
        path, key = (last, "--resume") if last else (self.cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
        with readable(path, key) if path else contextlib.nullcontext():
            super().resume_or_load(resume)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        optimizer = torch.optim.AdamW(
            params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY, fused=True
        )
        return maybe_add_gradient_clipping(cfg, optimizer)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluators:
        """The evaluators of a data set, by its ``evaluator_type``."""
        builders = evaluator_builders(dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))
        return DatasetEvaluators([build() for build in builders])


def train_mapper(cfg: CfgNode) -> DatasetMapper:
    """detectron2's mapper, or the one that knows ignored regions if a training set has some."""
    metadata = [MetadataCatalog.get(name) for name in cfg.DATASETS.TRAIN]
    ignoring = any(data.get("ignored_regions") for data in metadata)
    return (IgnoredRegionsMapper if ignoring else DatasetMapper)(cfg, is_train=True)


def scale_to_workers(cfg: CfgNode) -> CfgNode:
    """detectron2's ``auto_scale_workers``, the schedules of the heads included."""
    scaled: CfgNode = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
    factor = scaled.SOLVER.MAX_ITER / cfg.SOLVER.MAX_ITER
    if factor == 1 or cfg.MODEL.META_ARCHITECTURE not in distill_architectures():
        return scaled
    scaled = scaled.clone()
    scaled.defrost()
    for head in scaled.MODEL.DISTILL.HEADS:
        section = scaled.MODEL.DISTILL[head.upper()]
        section.WARMUP_ITERS = round(section.WARMUP_ITERS * factor)
        section.STOP_ITER = round(section.STOP_ITER * factor)
    scaled.freeze()
    return scaled


def check_batch_size(cfg: CfgNode) -> None:
    world = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % world:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a multiple of the "
            f"{world} processes."
        )


def write_student_yaml(cfg: CfgNode) -> None:
    """Write the student's plain detectron2 config beside its checkpoints."""
    student = student_config(cfg)
    student.MODEL.WEIGHTS = os.path.join(os.path.abspath(cfg.OUTPUT_DIR), "model_final.pth")
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    with open(os.path.join(cfg.OUTPUT_DIR, "student.yaml"), "w") as f:
        f.write(student.dump())


def setup_config(config_file: str, opts: Sequence[Any] = (), *, training: bool = True) -> CfgNode:
    """Load, register data, validate.

    Args:
        config_file: yaml path, or "" for the defaults.
        opts: KEY VALUE overrides.
        training: False for evaluation, which needs neither the teacher nor the training data.

    Raises:
        ConfigError, DataError: one sentence that names what to change.
    """
    cfg = get_distill_cfg()
    if config_file:
        merge_from_file(cfg, config_file)
    merge_from_list(cfg, list(opts))
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is %s, but there is no GPU: using the CPU", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    register_coco_format(cfg, None if training else cfg.DATASETS.TEST)
    validate_config(cfg, training=training)
    cfg.freeze()
    return cfg


def evaluate(cfg: CfgNode, weights: str | None = None) -> "OrderedDict[str, Any]":
    """Evaluate the student alone; needs none of the teacher's files.

    Args:
        cfg: of the training or plain.
        weights: checkpoint; defaults to ``cfg.MODEL.WEIGHTS``.
    """
    plain = student_config(cfg)
    check_test_sets(plain)
    with building("student"):
        model = build_model(plain)
    load_strictly(model, weights or plain.MODEL.WEIGHTS, "MODEL.WEIGHTS")
    return Trainer.test(plain, model)
