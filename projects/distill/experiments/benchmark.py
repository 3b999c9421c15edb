"""Measure what distillation costs on top of the student's step and the teacher's forward.

    distill benchmark --config-file F [--size 320x512 --batch 2] [KEY VALUE ...]

Weights and images are random: only time is measured. Every round times the plain student's step.
Then, for each head by itself and for all heads together, it times the teacher's answer and the
distilled step. The report has medians and the ratio distilled / (plain + teacher). If the weights
set themselves, it has the distilled step without and with the balance, and their ratio. The time
that the balance adds is a mean over the rounds, because it measures terms in every tenth step only.

With ``--heads-only``, every round times the forward of the student's backbone, and each head's
losses with their backward to the features. The report has medians and their ratio. It also has the
largest tensor that the head makes, relative to the largest feature map, and the MiB that autograd
keeps for it.

With ``--losses`` no config is needed: losses on random P3 to P7 of 256 channels are timed with
their backward, beside a plain mean squared error.
"""

import argparse
import functools
import json
import platform
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage, get_event_storage
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..config import student_config
from ..data.datasets import number_of_classes
from ..data.detections import Found
from ..engine import setup_config
from ..errors import ConfigError
from ..families import build_family
from ..modeling.balance import GradientBalance, balance_of
from ..modeling.distillation import build_all_heads, build_balance, build_teachers, infos_by_teacher
from ..modeling.meta_arch import DistillModel
from ..modeling.teacher import Teacher
from ..structures import DETECTIONS, NetworkOutputs, tensors_of
from ..utils.arguments import add_config_arguments, at_least, size
from ..utils.progress import Progress
from ..utils.provenance import command, commit
from ..utils.timing import seconds
from .benchmark_losses import measure_losses


def synthetic_batch(
    batch: int, height: int, width: int, classes: int, objects: int, seed: int
) -> list[Any]:
    """Return ``batched_inputs`` of random images with boxes, polygons and labels of pixels."""
    g = torch.Generator().manual_seed(seed)
    entries = []
    for _ in range(batch):
        low = torch.rand((objects, 2), generator=g) * torch.tensor([width, height]) * 0.6
        size = torch.tensor([width, height]) * (0.1 + 0.3 * torch.rand((objects, 2), generator=g))
        boxes = torch.cat([low, low + size], 1)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(classes, (objects,), generator=g)
        corners = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()]
        instances.gt_masks = PolygonMasks(corners)
        image = torch.randint(0, 256, (3, height, width), generator=g).float()
        labels = torch.randint(classes, (height, width), generator=g)
        found = Found(boxes.numpy(), np.ones(objects), instances.gt_classes.numpy())
        entry: dict[str, Any] = {"image": image, "instances": instances, "sem_seg": labels}
        entry[DETECTIONS] = found.instances((height, width))
        entries.append({**entry, "height": height, "width": width})
    return entries


def build(cfg: CfgNode) -> tuple[nn.Module, dict[str, Teacher], nn.ModuleDict]:
    """Build the student, its teachers and the configured heads, all untrained."""
    torch.manual_seed(0)
    student = build_model(student_config(cfg)).train()
    teachers = build_teachers(cfg, trained=False)
    heads = build_all_heads(cfg, infos_by_teacher(cfg, build_family(student), teachers))
    return student, teachers, heads.to(cfg.MODEL.DEVICE)


def step(model: nn.Module, inputs: list[Any]) -> None:
    model.zero_grad(set_to_none=True)
    balance = balance_of(model)
    with balance.step() if balance is not None else nullcontext():
        sum(model(inputs).values()).backward()


def measure(
    cfg: CfgNode, inputs: list[Any], repeats: int, progress: Progress
) -> dict[str, dict[str, float]]:
    """Return median seconds by heads: ``plain``, ``teacher``, ``distilled`` and their ``ratio``.

    With a balance there are also ``balanced`` and ``overhead``, the ratio of ``balanced`` to
    ``distilled``.
    """
    student, teachers, heads = build(cfg)
    sets = {name: [name] for name in heads} | {"all": list(heads)}
    infos = infos_by_teacher(cfg, build_family(student), teachers)
    described, _ = next(iter(infos.values()))

    def model_of(names: list[str], balance: GradientBalance | None = None) -> DistillModel:
        own = nn.ModuleDict({n: heads[n] for n in names})
        return DistillModel(student=student, teacher=teachers, heads=own, balance=balance).train()

    models = {key: model_of(names) for key, names in sets.items()}
    balances = {key: build_balance(cfg, described, heads) for key in sets}
    balanced = {key: model_of(sets[key], x) for key, x in balances.items() if x is not None}
    cuda = cfg.MODEL.DEVICE.startswith("cuda")
    plain: list[float] = []
    asked: dict[str, list[float]] = {key: [] for key in models}
    distilled: dict[str, list[float]] = {key: [] for key in models}
    scaled: dict[str, list[float]] = {key: [] for key in balanced}
    for _ in progress.track(range(repeats + 1), description="rounds"):  # the first warms up
        get_event_storage().step()
        plain.append(seconds(functools.partial(step, student, inputs), cuda))
        for key, model in models.items():
            asked[key].append(seconds(_question(model, inputs), cuda))
            distilled[key].append(seconds(functools.partial(step, model, inputs), cuda))
            if key in balanced:
                scaled[key].append(seconds(functools.partial(step, balanced[key], inputs), cuda))
    medians = {
        key: {
            "plain": statistics.median(plain[1:]),
            "teacher": statistics.median(asked[key][1:]),
            "distilled": statistics.median(distilled[key][1:]),
        }
        for key in models
    }
    for row in medians.values():
        row["ratio"] = row["distilled"] / (row["plain"] + row["teacher"])
    for key, times in scaled.items():
        added = statistics.fmean(b - a for a, b in zip(distilled[key][1:], times[1:]))
        medians[key]["balanced"] = medians[key]["distilled"] + added
        medians[key]["overhead"] = medians[key]["balanced"] / medians[key]["distilled"]
    return medians


def _said(model: DistillModel, inputs: list[Any]) -> NetworkOutputs:
    """Return the recorded outputs of the student for ``inputs``."""
    needs = model.active_needs()
    with torch.no_grad(), model.family.record(needs) as calls:
        model.student(inputs)
    return model.family.read(calls, model.family.batch(calls, inputs), needs)


def _question(model: DistillModel, inputs: list[Any]) -> Callable[[], Any]:
    """Return the call in which the teachers answer the student, to be timed."""
    student = _said(model, inputs)
    return lambda: _answers(model, student)


def _answers(model: DistillModel, student: NetworkOutputs) -> dict[str, NetworkOutputs]:
    """Return the answer of each teacher whose heads are in the model."""
    needs = {name: model.active_needs(teacher=name) for name in model.teachers}
    return {name: x.ask(student, needs[name]) for name, x in model.teachers.items() if needs[name]}


def measure_heads(
    cfg: CfgNode, inputs: list[Any], repeats: int, progress: Progress
) -> dict[str, dict[str, float]]:
    """Return costs by head.

    They are the median seconds of ``head`` and ``backbone``, their ``ratio``, the ``largest``
    tensor and the MiB ``kept``.
    """
    network, teachers, heads = build(cfg)
    model = DistillModel(student=network, teacher=teachers, heads=heads).train()
    student = _said(model, inputs)
    answers = _answers(model, student)
    for x in tensors_of(student):
        x.requires_grad_(x.is_floating_point())
    cuda = cfg.MODEL.DEVICE.startswith("cuda")
    images = model.family.preprocess([x["image"] for x in inputs], student.batch.padded_size)

    def answer_to(head: Any) -> NetworkOutputs | None:
        return answers[head.taught_by] if head.needs_teacher else student

    def backward(head: nn.Module) -> None:
        sum(head(student, answer_to(head)).values()).backward()

    @torch.no_grad()
    def forward() -> None:
        network.backbone(images)  # type: ignore[operator]

    largest, kept = {}, {}
    for name, head in heads.items():
        with LargestTensor() as mode:
            backward(head)
        largest[name] = mode.numel / max(x.numel() for x in student.features.values())
        kept[name] = mebibytes_kept(functools.partial(head, student, answer_to(head)), head)
    times: dict[str, list[float]] = {name: [] for name in ("backbone", *heads)}
    for _ in progress.track(range(repeats), description="rounds"):
        times["backbone"].append(seconds(forward, cuda))
        for name, head in heads.items():
            times[name].append(seconds(functools.partial(backward, head), cuda))
    medians = {name: statistics.median(x) for name, x in times.items()}
    backbone = medians.pop("backbone")
    return {
        name: {
            **{"head": x, "backbone": backbone, "ratio": x / backbone},
            **{"largest": largest[name], "kept": kept[name]},
        }
        for name, x in medians.items()
    }


def mebibytes_kept(forward: Callable[[], Any], head: nn.Module) -> float:
    """MiB that autograd stores in a forward, without the head's own parameters."""
    own = {x.untyped_storage().data_ptr() for x in head.parameters()}
    sizes: dict[int, int] = {}
    stored = []  # or another tensor would get the memory of one that is gone

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        stored.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = forward()
    del losses
    return sum(sizes.values()) / 2**20


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that an operation has returned, views excluded."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, Tensor):
                    parts = 2 if x.is_complex() else 1
                    self.numel = max(self.numel, x.numel() * parts)
        return result


def sections(cfg: CfgNode) -> list[CfgNode]:
    return [cfg.MODEL.DISTILL[name.upper()] for name in cfg.MODEL.DISTILL.HEADS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, required=False)
    parser.add_argument(
        "--size",
        type=size,
        metavar="HEIGHTxWIDTH",
        help="pixels of an image; default: 320x512, of --losses 800x1333",
    )
    parser.add_argument("--batch", type=at_least(1), default=2, help="images of a step")
    parser.add_argument("--objects", type=at_least(0), default=8, help="boxes of an image")
    parser.add_argument("--repeats", type=at_least(1), default=20, help="rounds")
    parser.add_argument("--heads-only", action="store_true", help="time only the losses")
    parser.add_argument("--losses", action="store_true", help="time losses on random maps")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    args.size = args.size or ((800, 1333) if args.losses else (320, 512))
    with Progress(args.json) as progress:
        medians = _measured(args, progress)
    if args.json:
        facts = {"commit": commit(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        facts |= {"machine": platform.machine(), "command": command()}
        print(json.dumps({**facts, "medians": medians}, indent=1))
        return 0
    unit = "losses" if args.losses else "heads" if args.heads_only else "steps"
    unit += " and their backward" if args.losses or args.heads_only else ""
    height, width = args.size
    title = f"Median seconds of {args.repeats} {unit}, {args.batch} x {height}x{width}"
    table = Table(title=title)
    columns = list(next(iter(medians.values())))
    for column in ("losses" if args.losses else "heads", *columns):
        table.add_column(column)
    for key, row in medians.items():
        table.add_row(key, *(f"{row[k]:.3f}" for k in columns))
    Console().print(table)
    return 0


def _measured(args: argparse.Namespace, progress: Progress) -> dict[str, dict[str, float]]:
    """Return the numbers of each row of the table.

    Raises:
        ConfigError: if there is no config to measure.
    """
    height, width = args.size
    if args.losses:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return measure_losses((height, width), args.batch, args.repeats, device, progress)
    if not args.config_file:
        raise ConfigError("name what to measure: --config-file FILE, or --losses.")
    cfg = setup_config(args.config_file, args.opts)
    classes = number_of_classes(cfg)[1] or 1
    inputs = synthetic_batch(args.batch, height, width, classes, args.objects, seed=0)
    measured = measure_heads if args.heads_only else measure
    with EventStorage(max(node.WARMUP_ITERS for node in sections(cfg))):
        return measured(cfg, inputs, args.repeats, progress)
