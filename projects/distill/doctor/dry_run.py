"""Networks, optimizer and batches of a training before its first step."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..checkpoint.load import STATISTICS
from ..checkpoint.save import StudentState
from ..config import one_per_teacher
from ..engine.setup import check_batch_size
from ..engine.trainer import Trainer
from ..families import Family
from ..heads import DistillHead
from ..modeling.balance import GradientBalance
from ..modeling.distillation import infos_by_teacher
from ..modeling.meta_arch import DistillModel
from ..modeling.teacher import Teacher
from ..modeling.unlabeled import is_unlabeled
from ..structures import NetworkInfo
from ..utils.seeding import seed_globally
from .report import Weights

LATE = 10**9  # an iteration after all schedules of the heads

Inputs = list[dict[str, Any]]
UNFILLED = -77777.0  # no weight has this value, so it marks tensors that a file does not have


@dataclass
class DryRun:
    """Training before its first step, in this process.

    Attributes:
        cfg: config, scaled to one process.
        model: the model in training mode: a :class:`DistillModel`, or the plain student.
        student: the student in it.
        autocast: opens the context of a forward, with the training's precision.
        batches: endless iterator; unlabelled images follow the labelled ones.
        images: number of labelled training images.
        weights: tensors that ``MODEL.WEIGHTS`` filled.
        family: None for a plain network, whose outputs are not recorded.
        teacher: the only teacher; None if no head needs one, or if there are several.
        heads: heads by name; empty without distillation.
        infos: descriptions of student and teacher; None if there is no such network.
        balance: sets the heads' weights; None if they are fixed.
        parts: with several teachers, see :meth:`by_teacher`; otherwise empty.
    """

    cfg: CfgNode
    model: nn.Module
    student: nn.Module
    optimizer: torch.optim.Optimizer
    autocast: Callable[[], AbstractContextManager[Any]]
    batches: Iterator[Inputs]
    images: int
    weights: Weights
    family: Family | None
    teacher: Teacher | None
    heads: dict[str, DistillHead]
    infos: tuple[NetworkInfo | None, NetworkInfo | None]
    balance: GradientBalance | None = None
    parts: dict[str, "DryRun"] = field(default_factory=dict)

    def by_teacher(self) -> dict[str, "DryRun"]:
        """Return this training as each teacher sees it: its config, and only its heads.

        The only teacher has the name "". Heads that need no teacher have it, too.
        """
        return self.parts or {"": self}


def build_dry_run(cfg: CfgNode, folder: str) -> DryRun:
    """Build the training of ``cfg`` as the trainer does, and load its weights.

    Args:
        cfg: config of the training.
        folder: folder to use instead of ``OUTPUT_DIR``, which is not changed.

    Raises:
        DistillError: the training would fail before its first step.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = folder
    cfg.SEED = max(cfg.SEED, 0)
    # The parts of a batch are alike: one of them is examined.
    check_batch_size(cfg)
    cfg.SOLVER.IMS_PER_BATCH //= cfg.SOLVER.ACCUMULATE
    cfg.SOLVER.ACCUMULATE = 1
    cfg.DATALOADER.NUM_WORKERS = 0  # starting workers takes longer than loading two batches
    cfg.freeze()
    seed_globally(cfg.SEED)
    trainer = Trainer(cfg)
    weights = load_weights(trainer)
    loop: Any = trainer._trainer
    model: nn.Module = getattr(loop.model, "module", loop.model).train()
    dry_run = DryRun(
        cfg=trainer.cfg,
        model=model,
        student=trainer.student,
        optimizer=loop.optimizer,
        autocast=loop.autocast,
        batches=iter(loop.data_loader),
        images=sum(len(entries) for _, entries in trainer.sets),
        weights=weights,
        family=None,
        teacher=None,
        heads={},
        infos=(None, None),
        balance=trainer.balance,
    )
    if isinstance(model, DistillModel):
        add_distillation(dry_run, model)
    return dry_run


def add_distillation(dry_run: DryRun, model: DistillModel) -> None:
    """Add the teachers and the heads of a distilled student."""
    heads: dict[str, Any] = dict(model.heads.items())
    dry_run.family, dry_run.heads = model.family, heads
    infos = infos_by_teacher(dry_run.cfg, model.family, model.teachers)
    if not dry_run.cfg.MODEL.DISTILL.TEACHERS:
        dry_run.teacher, dry_run.infos = model.teacher, infos[""]
        return
    for one in one_per_teacher(dry_run.cfg):
        dry_run.parts[one.name] = replace(
            dry_run,
            cfg=one.cfg,
            teacher=model.teachers.get(one.name),
            heads={name: x for name, x in heads.items() if x.taught_by == one.name},
            infos=infos[one.name],
            parts={},
        )


def load_weights(trainer: Trainer) -> Weights:
    """Load ``MODEL.WEIGHTS`` as the training does, and return which tensors it filled."""
    file, student = trainer.cfg.MODEL.WEIGHTS, trainer.student
    state = {k: v for k, v in student.state_dict().items() if isinstance(v, Tensor)}
    tensors = {k: v for k, v in state.items() if not k.endswith(STATISTICS)}
    before = {k: v.clone() for k, v in tensors.items()}
    for x in tensors.values():
        x.fill_(UNFILLED)
    trainer.resume_or_load(resume=False)
    kept = [k for k, x in tensors.items() if bool((x == UNFILLED).all())]
    for k in kept:
        tensors[k].copy_(before[k])
    groups: dict[str, int] = {}
    for k in kept:
        group = k.split(".")[0]
        groups[group] = groups.get(group, 0) + 1
    return Weights(file, len(tensors) - len(kept), len(tensors), groups)


def labeled_images(batch: Inputs) -> Inputs:
    """Return the images of a batch that are not of ``DATASETS.UNLABELED``."""
    return [x for x in batch if not is_unlabeled(x)]


@contextmanager
def preserved(dry_run: DryRun) -> Iterator[None]:
    """Set the learning rates to 0 in this context, and undo all other changes after it."""
    state = {k: _on_cpu(v) for k, v in dry_run.model.state_dict().items()}
    student_state = StudentState(dry_run.student)
    saved = student_state.state_dict()
    groups = dry_run.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    try:
        yield
    finally:
        dry_run.model.load_state_dict(state)
        student_state.load_state_dict(saved)
        dry_run.optimizer.zero_grad()
        dry_run.optimizer.state.clear()
        for group, rate in zip(groups, rates):
            group["lr"] = rate


def _on_cpu(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.copy(value)


@contextmanager
def full_weight(dry_run: DryRun) -> Iterator[None]:
    """Give all heads their full weight in this context, as late in a training.

    They are past their warm-up and their first phases, and they neither stop nor fade.
    """
    heads, balance = dry_run.heads.values(), dry_run.balance
    saved = [(head, head.stop_iter) for head in heads]
    fade = balance.fade if balance else 0.0
    for head in heads:
        head.stop_iter = 0
    if balance:
        balance.fade = 0.0
    try:
        with EventStorage(LATE):
            yield
    finally:
        for head, stop in saved:
            head.stop_iter = stop
        if balance:
            balance.fade = fade
