"""The trainer: detectron2's, for plain and distilled students alike."""

import contextlib
import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from inspect import getattr_static
from itertools import chain
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.engine.hooks import PeriodicCheckpointer, PeriodicWriter
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluators
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import GeneralizedRCNNWithTTA, SemanticSegmentor
from detectron2.solver import LRScheduler
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, has_event_storage
from torch import nn

from ..checkpoint.compare import optimizer_misfits, refuse_misfits, tensor_misfits
from ..checkpoint.load import ONCE_SAVED, load_strictly, readable
from ..checkpoint.save import (
    HeadState,
    StudentCheckpointer,
    StudentState,
    check_states,
    write_checked,
)
from ..config import one_per_teacher, student_class
from ..config.resume import training_values
from ..config.student import write_student
from ..data.augment.mapper import AugmentingMapper
from ..data.cityscapes import SemanticMapper
from ..data.contiguous import with_contiguous_images
from ..data.datasets import check_labels, load_training_sets, predicted_classes
from ..data.detections import DetectionsMapper
from ..data.ignored_regions import IgnoredRegionsMapper
from ..data.loader import EvaluationLoader, TrainLoader, build_train_loader, data_seed
from ..data.registration import label_digests
from ..data.unlabeled import images_digest, load_unlabeled
from ..errors import WeightsError, of_teacher
from ..evaluation.images import ImageEvaluator
from ..evaluation.sliding_window import with_sliding_window
from ..families import build_family
from ..modeling.balance import balance_of
from ..modeling.distillation import infos_by_teacher
from ..modeling.feature_cache import check_cache
from ..modeling.init_from_teacher import init_from_teacher
from ..modeling.meta_arch import DistillModel, build_distill_model, build_student
from ..modeling.quantization import PART, build_quantization
from ..modeling.teacher import Teacher
from ..solver.ema import EMAHook
from ..solver.groups import split_implicit
from ..solver.lr_scheduler import build_lr_scheduler
from ..solver.warmup import build_warmup, split_biases
from ..utils.old_names import HOOKS, with_renamed_keys
from .evaluators import build_evaluators, check_metric_names, check_results, check_test_sets
from .hooks import (
    BestCheckpointHook,
    CheckpointHook,
    EvalHook,
    FinalCheckpointHook,
    KDRatioHook,
    LossHealthHook,
    QuantizationHook,
    TelemetryHook,
)
from .nonfinite import FiniteGuard
from .report import Described, ReportHook, RunReport, reports
from .resume import Changes, checked_changes, log_changes, schedule_misfits
from .setup import be_deterministic, check_batch_size, scale_to_workers
from .telemetry import RowWriter, add_row, drop_torn_row, rename_losses
from .trackers import TrackerWriter, check_installed
from .train_loop import TrainLoop

logger = logging.getLogger(__name__)


class EndOfTraining(BaseException):
    """End of a training before ``SOLVER.MAX_ITER``; no Exception, so detectron2 logs no failure."""


class Trainer(DefaultTrainer):
    """Trainer of a plain detectron2 network, or of a distilled student if the config names heads.

    The data are checked before any weight is loaded. Checkpoints are stock checkpoints of the
    student; ``student.yaml`` beside them is its plain detectron2 config.

    Args:
        cfg: as :func:`distill.engine.setup_config` returns it.
        extra_hooks: appended to those of :meth:`build_hooks`.

    Raises:
        ConfigError, DataError, WeightsError: before training starts.
    """

    def __init__(self, cfg: CfgNode, extra_hooks: Sequence[HookBase] = ()):
        TrainerBase.__init__(self)
        self.iter: int
        if cfg.DETERMINISTIC:
            be_deterministic()
        given, cfg = cfg, scale_to_workers(cfg)
        check_batch_size(cfg)
        check_installed(cfg)
        self.sets = load_training_sets(cfg)
        self.unlabeled = load_unlabeled(cfg, self.sets)
        self.check_evaluation(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self.cfg = cfg
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.student: nn.Module = getattr(model, "student", model)
        self.quantization = build_quantization(cfg, self.student)
        self.heads: Any = model.heads if isinstance(model, DistillModel) else nn.ModuleDict()
        self.teachers = model.teachers if isinstance(model, DistillModel) else {}
        self._check_caches(cfg, model)
        hashes = {name: teacher.weights_hash for name, teacher in self.teachers.items()}
        images = images_digest(self.unlabeled)
        self.values = training_values(given, hashes, label_digests(cfg), images)
        # detectron2 passes the local rank. Under SLURM, a task may see its own GPU only.
        devices = None if cfg.MODEL.DEVICE == "cpu" else [torch.cuda.current_device()]
        self._trainer = TrainLoop(
            create_ddp_model(model, broadcast_buffers=False, device_ids=devices),
            self.build_train_loader(cfg),
            optimizer,
            amp=cfg.SOLVER.AMP.ENABLED,
            device=cfg.MODEL.DEVICE,
            seed=self.seed,
            guard=FiniteGuard(cfg, model, self.student, self.seed, self.quantization),
            heads=tuple(self.heads),
            cosine_period=cfg.MODEL.DISTILL.COSINE_PERIOD,
            accumulate=cfg.SOLVER.ACCUMULATE,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        ema = cfg.SOLVER.EMA
        self.ema = EMAHook(self.student, ema.DECAY, ema.WARMUP_ITERS) if ema.DECAY else None
        self.head_state = HeadState(self.heads)
        self.balance = balance_of(model)
        # The trainer's state comes last: it has the iteration to which everything else belongs.
        self.checkpointer = StudentCheckpointer(
            self.student,
            cfg.OUTPUT_DIR,
            allow_pickle=cfg.MODEL.ALLOW_PICKLE,
            weights_in_place=self.averaged,
            student_state=StudentState(self.student),
            distill=self.head_state,
            **({} if self.balance is None else {"balance": self.balance}),
            **({} if self.quantization is None else {PART: self.quantization}),
            trainer=self,
        )
        self.register_hooks([*self.build_hooks(), *extra_hooks])
        if comm.is_main_process():
            write_student(cfg)

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, the first one if there are several, or None."""
        return next(iter(self.teachers.values()), None)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the student has the weights that are evaluated and saved."""
        return self.ema.applied() if self.ema else contextlib.nullcontext()

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_distill_model(cfg)
        logger.info("Model:\n%s", model)
        return model

    def _check_caches(self, cfg: CfgNode, model: nn.Module) -> None:
        """Refuse a cache of a teacher's maps that would become too large."""
        labeled = [entry for _, entries in self.sets for entry in entries]
        for one in one_per_teacher(cfg):
            teacher = self.teachers.get(one.name)
            if isinstance(model, DistillModel) and teacher and teacher.cache:
                shapes = teacher.map_shapes(model.teacher_maps(one.name))
                with of_teacher(one.name):
                    check_cache(one.cfg, shapes, [*labeled, *self.unlabeled])

    def build_train_loader(self, cfg: CfgNode, start: int = 0) -> TrainLoader:
        """Return the training data from iteration ``start`` on."""
        check_labels(cfg, [entry for _, entries in self.sets for entry in entries])
        seed = data_seed(cfg, self.seed)
        return build_train_loader(
            *(cfg, self.sets, train_mapper(cfg)),
            seed=seed,
            start=start,
            unlabeled=self.unlabeled,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> EvaluationLoader:
        return EvaluationLoader(cfg, dataset_name)

    def build_writers(self) -> list[EventWriter]:
        log = os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")
        drop_torn_row(log)
        rename_losses(log)
        *others, rows, tensorboard = super().build_writers()
        rows.close()
        trainer = weakref.proxy(self)
        trackers = [
            TrackerWriter(name, self.cfg, lambda: trainer.start_iter > 0)
            for name in self.cfg.TRACKERS
        ]
        return [*others, RowWriter(log), *trackers, tensorboard]

    def build_hooks(self) -> list[HookBase]:
        cfg = self.cfg
        period, keep = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.KEEP_CHECKPOINTS
        periodic = CheckpointHook(self.checkpointer, period, keep)
        before: list[HookBase] = []
        writers: list[PeriodicWriter] = []
        final = FinalCheckpointHook(periodic, writers)
        for hook in super().build_hooks():
            if isinstance(hook, PeriodicWriter):
                writers.append(hook)
            elif isinstance(hook, hooks.EvalHook):
                before.append(final)
                before += self._evaluation_hooks(hook._func)
            elif not isinstance(hook, PeriodicCheckpointer):
                before.append(hook)
        loop = self._trainer
        left_out = lambda: len(loop.data_loader.left_out)  # noqa: E731
        before.append(TelemetryHook(cfg.SOLVER.IMS_PER_BATCH, left_out))
        if self.heads and self.balance is None:
            before.insert(0, KDRatioHook(tuple(self.heads)))
        if self.quantization is not None:
            before.insert(0, QuantizationHook(self.quantization))
        before = [hook for hook in (self.ema, build_warmup(cfg)) if hook] + before
        before.append(LossHealthHook(self.heads, self.balance))
        # Last, so that all that happens at an iteration is done before its checkpoint is written.
        after = [final] if cfg.TEST.BEST_METRIC else []
        if reports(cfg):
            after.append(ReportHook(cfg.TEST.EVAL_PERIOD, RunReport(cfg, self._described_teachers)))
        return [*before, *writers, periodic, *after]

    def _evaluation_hooks(self, evaluate: Callable[[], Any]) -> list[HookBase]:
        """Return the evaluation, and what depends on its results.

        Test-time augmentation, which takes 18 forwards per image, comes only at the end. The best
        checkpoint's hook stands before it, because it may end the training.
        """
        test, period = self.cfg.TEST, self.cfg.TEST.EVAL_PERIOD
        found: list[HookBase] = [EvalHook(period, evaluate, self.averaged)]
        if test.BEST_METRIC:
            patience = self.cfg.SOLVER.PATIENCE
            found.append(BestCheckpointHook(self.checkpointer, period, test.BEST_METRIC, patience))
        if test.AUG.ENABLED:
            found.append(EvalHook(0, self._test_augmented, self.averaged))
        return found

    def _described_teachers(self) -> list[Described]:
        """Return the teachers that detect boxes, with their configs and descriptions."""
        if not self.teachers:
            return []
        infos = infos_by_teacher(self.cfg, build_family(self.student), self.teachers)
        parts = {one.name: one.cfg for one in one_per_teacher(self.cfg)}
        return [
            (parts[name], self.teachers[name], info)
            for name, (_, info) in infos.items()
            if info and info.has_boxes
        ]

    def _test_augmented(self) -> Any:
        results = self.test_with_TTA(self.cfg, self.student)
        self._last_eval_results.update(results)
        return results

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the newest intact checkpoint of ``OUTPUT_DIR``, or ``MODEL.WEIGHTS``.

        A resumed run ends with the same bits as an uninterrupted one.

        Args:
            resume: if False, or if there is no checkpoint, load ``MODEL.WEIGHTS``, and copy the
                parts that ``MODEL.DISTILL.INHERIT`` names from the teacher.

        Raises:
            WeightsError: the file is missing or unreadable; or every checkpoint is damaged, or the
                newest is of another training.
        """
        last = self.checkpointer.newest_intact() if resume and comm.is_main_process() else None
        last = comm.all_gather(last)[0]
        if last is None:
            weights = self.cfg.MODEL.WEIGHTS
            if weights:
                with readable(weights, "MODEL.WEIGHTS"):
                    self.checkpointer.load(weights, checkpointables=[])
                    self.checkpointer.check_filled()
            if self.teacher and self.cfg.MODEL.DISTILL.INHERIT:
                self._init_from(self.teacher)
            return
        with readable(last, "--resume"):
            changes = self.checkpointer.resume(last, self._check_resume)
        self.start_iter = self.iter + 1
        log_changes(changes, self.start_iter)
        if any(key.startswith("SOLVER.") for key in changes):
            self._renew_learning_rates()
        self._trainer.seed = self._trainer.guard.seed = self.seed
        self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg, self.start_iter))

    def _init_from(self, teacher: Teacher) -> None:
        infos = infos_by_teacher(self.cfg, build_family(self.student), self.teachers)[""]
        own, theirs = ((x.classes, x.sem_seg_classes) for x in infos if x)
        parts = self.cfg.MODEL.DISTILL.INHERIT
        init_from_teacher(self.student, teacher.model, parts, own == theirs)

    def train(self) -> Any:
        """Train, and return the results of the last evaluation.

        Raises:
            ResultsError: they are not those of ``TEST.EXPECTED_RESULTS``.
        """
        self._last_eval_results: Any = None
        try:
            TrainerBase.train(self, self.start_iter, self.max_iter)
        except EndOfTraining:
            pass
        finally:
            self._trainer.close()
        if self._last_eval_results is not None:
            check_results(self.cfg, self._last_eval_results)
        return self._last_eval_results

    def after_step(self) -> None:
        super().after_step()
        if self.iter + 1 == self.max_iter < self.cfg.SOLVER.MAX_ITER:  # a hook has lowered it
            self.iter += 1  # as at the end of the schedule
            raise EndOfTraining

    def state_dict(self) -> dict[str, Any]:
        own = {"seed": self.seed, "world_size": comm.get_world_size(), "config": self.values}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._check_place(state_dict)
        hooks = self._checked_hooks(state_dict.get("hooks", {}))
        super().load_state_dict({**state_dict, "hooks": hooks})
        self.seed = state_dict["seed"]
        world = comm.get_world_size()
        if self.cfg.SOLVER.REFERENCE_WORLD_SIZE and state_dict["world_size"] != world:
            self._rescale(state_dict["world_size"] / world)

    def _check_resume(self, path: str, checkpoint: dict[str, Any]) -> Changes:
        """Compare a checkpoint, of which nothing is assigned yet, with this training.

        Returns:
            The keys of the config whose new value takes effect.

        Raises:
            WeightsError: it has another config, or a tensor that does not fit.
        """
        state = checkpoint["trainer"]
        self._check_place(state)
        changes = checked_changes(path, state, self.values)
        hooks = self._checked_hooks(state.get("hooks", {}))
        names = {x: name for name, x in self._trainer.model.named_parameters()}
        misfits = chain(
            tensor_misfits(checkpoint["model"], self.student.state_dict(), ONCE_SAVED),
            self.head_state.misfits(checkpoint["distill"]),
            self.quantization.misfits(checkpoint[PART]) if self.quantization else (),
            self.ema.misfits(hooks["EMAHook"]) if self.ema and "EMAHook" in hooks else (),
            optimizer_misfits(state["_trainer"]["optimizer"], self.optimizer, names),
            schedule_misfits(hooks.get("LRScheduler", {}), state["iteration"], self.scheduler),
        )
        refuse_misfits(path, misfits, f"; changed: {', '.join(changes)}" if changes else "")
        return changes

    @staticmethod
    def _check_place(state: dict[str, Any]) -> None:
        place = {key: state.get(key) for key in ("iteration", "seed")}
        if not all(isinstance(x, int) and x >= 0 for x in place.values()):
            raise ValueError(
                f"its iteration and seed are {place}; both must be whole numbers from 0"
            )

    def _checked_hooks(self, states: dict[str, Any]) -> dict[str, Any]:
        """Return the states of the hooks under their current names.

        A state that fits no hook is an error, where detectron2 only warns. The moving average may
        start without a state, from the weights of the checkpoint.
        """
        states = with_renamed_keys(states, HOOKS, "The checkpoint")
        own = {type(hook).__qualname__: hook for hook in self._hooks}
        needed = [name for name, hook in own.items() if hook is not self.ema and hook.state_dict()]
        remedy = "set SOLVER.EMA.DECAY, TEST.BEST_METRIC and your own hooks as they were"
        check_states("hook", states, own, needed, remedy)
        return states

    def _rescale(self, factor: float) -> None:
        """Continue with another number of processes, by which detectron2 scales the schedule.

        Args:
            factor: ratio of the new to the old number of iterations.
        """
        done = round((self.iter + 1) * factor)
        logger.warning("Iteration %d is now %d: the number of processes changed", self.iter, done)
        self.iter = done - 1
        self._renew_learning_rates()

    def _renew_learning_rates(self) -> None:
        """Set the learning rates of the next iteration by the config of this training."""
        fresh = self.build_optimizer(self.cfg, self._trainer.model)
        rates = [group["lr"] for group in fresh.param_groups]
        self.scheduler.base_lrs, self.scheduler.last_epoch = rates, self.iter + 1
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["initial_lr"] = rate
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr()):
            group["lr"] = rate

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        sgd = cfg.SOLVER.OPTIMIZER == "SGD"
        optimizer = super().build_optimizer(cfg, model) if sgd else build_adamw(cfg, model)
        split_implicit(cfg, optimizer, model)
        split_biases(cfg, optimizer, model)
        return optimizer

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluators:
        """Return the evaluators of a data set, by its ``evaluator_type``.

        Args:
            dataset_name: name of a registered data set.
            output_folder: for the files that they write; None: ``OUTPUT_DIR/inference``.
        """
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        evaluators = build_evaluators(cfg, dataset_name, folder)
        drawn = cfg.TEST.VIS_IMAGES and not output_folder  # not with TEST.AUG
        if drawn and has_event_storage() and comm.is_main_process():
            classes = predicted_classes(cfg, dataset_name)
            evaluators.append(ImageEvaluator(dataset_name, classes))
        return DatasetEvaluators(evaluators)

    @classmethod
    def check_evaluation(cls, cfg: CfgNode, *, training: bool = True) -> None:
        """Raise an error before the training if the evaluation after it would fail.

        The metrics of a subclass that evaluates in its own way are unknown, and are not checked.
        """
        check_test_sets(cfg)
        own = ("build_evaluator", "test")
        if all(getattr_static(cls, x) is getattr_static(Trainer, x) for x in own):
            check_metric_names(cfg, training=training)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Any:
        return super().test(cfg, with_sliding_window(cfg, model), evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> "OrderedDict[str, Any]":
        """Evaluate with detectron2's test-time augmentation, ``TEST.AUG``.

        Args:
            model: a plain ``GeneralizedRCNN``.

        Returns:
            The results of :meth:`test`, with the suffix ``_TTA`` in the names of tasks, or of data
            sets if there are several.
        """
        logger.info("Evaluating with test-time augmentation")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{name}_TTA", result) for name, result in results.items())


def build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW with the groups of parameters that detectron2's SGD has."""
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


def train_mapper(cfg: CfgNode) -> Callable[..., Any]:
    """Return detectron2's mapper, or that of semantic labels, ignored regions or augmentations.

    Images with a teacher's detections have a mapper that moves these, too.
    """
    metadata = [MetadataCatalog.get(name) for name in cfg.DATASETS.TRAIN]
    semantic = any(data.get("evaluator_type") == "cityscapes_sem_seg" for data in metadata)
    if semantic or issubclass(student_class(cfg), SemanticSegmentor):
        return SemanticMapper(cfg, is_train=True)  # its augmentations copy the image
    ignoring = any(data.get("ignored_regions") for data in metadata)
    if cfg.INPUT.AUGMENT.STEPS:
        return AugmentingMapper(cfg, ignoring)
    plain = IgnoredRegionsMapper if ignoring else DatasetMapper
    kind = DetectionsMapper if cfg.MODEL.DISTILL.TEACHER.DETECTIONS else plain
    return with_contiguous_images(kind(cfg, is_train=True))


def evaluate(
    cfg: CfgNode, weights: str | None = None, trainer: type[Trainer] = Trainer
) -> "OrderedDict[str, Any]":
    """Evaluate the student; none of the teacher's files is needed.

    Args:
        cfg: config of the training, or a plain one.
        weights: checkpoint; defaults to ``cfg.MODEL.WEIGHTS``.
        trainer: the class that evaluates.

    Raises:
        ResultsError: the results are not those of ``TEST.EXPECTED_RESULTS``.
    """
    trainer.check_evaluation(cfg, training=False)
    student = load_student(cfg, weights or cfg.MODEL.WEIGHTS)
    results: OrderedDict[str, Any] = trainer.test(cfg, student)
    if cfg.TEST.AUG.ENABLED:
        results.update(trainer.test_with_TTA(cfg, student))
    check_results(cfg, results)
    return results


def evaluate_finished(cfg: CfgNode, path: str, trainer: type[Trainer] = Trainer) -> None:
    """Evaluate a training whose last evaluation may be missing, and keep the results.

    They go where the training itself would have written them: to ``metrics.json``, and to
    ``model_best.pth`` if they are the best.

    Args:
        cfg: config of the training.
        path: its final checkpoint.
        trainer: the class that evaluates.
    """
    metrics = flatten_results_dict(evaluate(cfg, path, trainer))
    if not comm.is_main_process():
        return
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    add_row(os.path.join(cfg.OUTPUT_DIR, "metrics.json"), checkpoint["iteration"], metrics)
    if reports(cfg):
        RunReport(cfg).write()
    if not cfg.TEST.BEST_METRIC:
        return
    checkpointer = StudentCheckpointer(nn.Identity(), cfg.OUTPUT_DIR)
    hook = BestCheckpointHook(checkpointer, 0, cfg.TEST.BEST_METRIC, cfg.SOLVER.PATIENCE)
    if best := hook.complete(checkpoint, metrics):
        write_checked(os.path.join(cfg.OUTPUT_DIR, "model_best.pth"), best)
    if best or cfg.SOLVER.PATIENCE or os.path.exists(f"{path}.tmp"):
        write_checked(path, checkpoint)


def load_student(cfg: CfgNode, weights: str) -> nn.Module:
    """Return the student, a plain detectron2 network, with its weights.

    Args:
        cfg: config of the training, or a plain one. With ``SOLVER.QAT``, the student is quantized
            as in the training.
        weights: checkpoint of the student.

    Raises:
        WeightsError: the checkpoint does not fit the student, or lacks its quantization.
    """
    model = build_student(cfg)
    load_strictly(model, weights, "MODEL.WEIGHTS", allow_pickle=cfg.MODEL.ALLOW_PICKLE)
    quantization = build_quantization(cfg, model)
    if quantization is not None and not quantization.load(weights):
        raise WeightsError(
            f"SOLVER.QAT.ENABLED is True, but '{weights}' is of a training without it; name "
            "another checkpoint, or set it to False."
        )
    return model
