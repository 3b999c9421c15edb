"""Training and evaluation: detectron2's trainer for plain and distilled students alike."""

import contextlib
import logging
import os
import sys
import time
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    launch,
)
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.modeling import build_model
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.multiprocessing import ProcessExitedException

from .checkpoint import StudentCheckpointer, StudentState, load_strictly, readable
from .config import (
    building,
    distill_architectures,
    get_distill_cfg,
    merge_from_file,
    merge_from_list,
    student_config,
    validate_config,
)
from .data.datasets import check_test_set, load_training_set, register_coco_format
from .data.kitti import IgnoredRegionsMapper
from .errors import ConfigError, DistillError
from .evaluation.kitti import KITTIEvaluator, coco_evaluator
from .meta_arch import DistillModel

logger = logging.getLogger(__name__)


class TrainLoop(SimpleTrainer):
    """detectron2's training step with automatic mixed precision on every device.

    CUDA computes in float16 with a gradient scaler, the CPU in bfloat16 without one;
    detectron2's ``AMPTrainer`` insists on CUDA.
    """

    def __init__(self, model: nn.Module, loader: Any, optimizer: Any, *, amp: bool, device: str):
        super().__init__(model, loader, optimizer)
        cuda = device.startswith("cuda")
        dtype = torch.float16 if cuda else torch.bfloat16
        self.autocast = lambda: torch.autocast(device.split(":")[0], dtype, enabled=amp)
        self.scaler = torch.amp.GradScaler(enabled=amp and cuda)

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with self.autocast():
            losses = self.model(data)
        self.optimizer.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.scaler.unscale_(self.optimizer)  # detectron2 clips inside the optimizer's step
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):  # none if the saved run did not scale
            self.scaler.load_state_dict(state_dict["grad_scaler"])


class DistillRatio(HookBase):
    """Logs each distillation loss over the task loss, per head and level, from iteration 0."""

    def __init__(self, heads: Sequence[str]):
        self.prefixes = tuple(f"loss_{name.lower()}" for name in heads)

    def after_step(self) -> None:
        storage = get_event_storage()
        losses = {k: v for k, (v, _) in storage.latest().items() if k.startswith("loss")}
        distilled = {k: v for k, v in losses.items() if k.split("/")[0] in self.prefixes}
        task = sum(losses.values()) - sum(distilled.values())
        ratios = {f"kd_ratio/{k[5:]}": v / max(task, 1e-12) for k, v in distilled.items()}
        storage.put_scalars(**ratios, smoothing_hint=True)


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


def evaluator_builders(dataset_name: str, folder: str) -> list[Callable[[], Any]]:
    """Functions that build the evaluators of a data set, which read its annotations.

    Raises:
        ConfigError: the data set's ``evaluator_type`` is none or unknown.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    builders: dict[str, list[Callable[[], Any]]] = {
        "coco": [lambda: COCOEvaluator(dataset_name, output_dir=folder)],
        "cityscapes_instance": [lambda: CityscapesInstanceEvaluator(dataset_name)],
        "cityscapes_sem_seg": [lambda: CityscapesSemSegEvaluator(dataset_name)],
        "kitti": [
            lambda: coco_evaluator(dataset_name, folder),
            lambda: KITTIEvaluator(dataset_name),
        ],
        "pascal_voc": [lambda: PascalVOCDetectionEvaluator(dataset_name)],
        "sem_seg": [lambda: SemSegEvaluator(dataset_name, output_dir=folder)],
        "coco_panoptic_seg": [
            lambda: SemSegEvaluator(dataset_name, output_dir=folder),
            lambda: COCOEvaluator(dataset_name, output_dir=folder),
            lambda: COCOPanopticEvaluator(dataset_name, folder),
        ],
    }
    if kind not in builders:
        raise ConfigError(
            f"DATASETS.TEST '{dataset_name}' has evaluator type '{kind}'; "
            f"evaluators exist for: {', '.join(builders)}."
        )
    return builders[kind]


def train_mapper(cfg: CfgNode) -> DatasetMapper:
    """detectron2's mapper, or the one that knows ignored regions if a training set has some."""
    metadata = [MetadataCatalog.get(name) for name in cfg.DATASETS.TRAIN]
    ignoring = any(data.get("ignored_regions") for data in metadata)
    return (IgnoredRegionsMapper if ignoring else DatasetMapper)(cfg, is_train=True)


def check_test_sets(cfg: CfgNode) -> None:
    """Find before the training what would stop the evaluation after it.

    Raises:
        ConfigError, DataError: a test set has no evaluator, no pictures or unreadable annotations.
    """
    for name in cfg.DATASETS.TEST:
        evaluator_builders(name, cfg.OUTPUT_DIR)
        check_test_set(name)


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


def run(args: Namespace) -> Any:
    """One process of a training or evaluation."""
    cfg = setup_config(args.config_file, args.opts, training=False)
    finished = finished_checkpoint(cfg) if args.resume else None
    if not args.eval_only and not finished:
        register_coco_format(cfg)
        validate_config(cfg)
    # It remarks on a CUDA toolkit without a GPU; stderr is for our one line.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="distill")
    default_setup(cfg, args)
    if args.eval_only:
        return evaluate(cfg)
    if finished:
        logger.info("%s is trained already; evaluating %s", cfg.OUTPUT_DIR, finished)
        return evaluate(cfg, finished)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def finished_checkpoint(cfg: CfgNode) -> str | None:
    """The final checkpoint of a finished run; it needs no teacher any more."""
    path = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if not os.path.isfile(path):
        return None
    with readable(path, "--resume"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
    return path if saved.get("iteration", -1) + 1 >= cfg.SOLVER.MAX_ITER else None


def main(argv: Sequence[str] | None = None) -> int:
    """``train_net.py``: detectron2's command line, also under ``torchrun``.

    Returns:
        The exit code: 0, or 2 after one sentence that says what to change.
    """
    args = default_argument_parser().parse_args(argv)
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _join_torchrun()
            _run_or_exit(args)
        else:
            launch(
                _run_or_exit,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )
    except SystemExit as e:
        return int(e.code or 0)
    except ProcessExitedException as e:  # one of several processes ended so
        return e.exit_code
    return 0


def _run_or_exit(args: Namespace) -> None:
    try:
        run(args)
        comm.synchronize()  # nobody leaves while another process still talks to it
    except DistillError as e:
        if comm.get_local_rank() == 0:  # all processes find the same
            print("error:", " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():  # gloo's threads would abort the interpreter's exit
            torch.distributed.destroy_process_group()


def _join_torchrun() -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
