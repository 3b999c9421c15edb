"""Draw what each method of a config looks at in one image, or the training samples of a config.

    distill visualize --config-file FILE --image 000000000012.jpg [--weights student.pth]
        [--out output/visualize] [KEY VALUE ...]
    distill visualize --config-file FILE --samples 8 [--iteration 0] [--out output/visualize]
        [KEY VALUE ...]

One figure per method is written: MSSD's masks (paper, Fig. 3), MKD's joint attention and
frequency-masked features, IMA's instances and their α, TID's scores, areas and M (paper, Fig. 4),
level by level over the image. The heads compute all of it. Both networks are in evaluation mode,
and the image has the size of the evaluation.

Training samples are drawn as the student gets them, with their boxes and masks, in one figure.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Boxes
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint.load import load_strictly, readable
from ..config import one_per_teacher, teacher_config
from ..data.datasets import class_names, in_model_order, load_training_set
from ..data.detection_file import detection_file
from ..engine import setup_config
from ..engine.trainer import train_mapper
from ..errors import ConfigError, DataError, WeightsError
from ..heads import IMA, MKD, MSSD, TID, DistillHead
from ..heads.fpn import cell_labels
from ..heads.ima import CROPPED
from ..losses import joint_attention, tid_mask
from ..losses.frequency import frequency_filtered
from ..losses.tid import tid_areas
from ..modeling.meta_arch import DistillModel, build_distill_model
from ..structures import Batch, NetworkOutputs
from ..utils.arguments import add_config_arguments, at_least
from .training_samples import draw_samples
from .visualize_figure import Grid, Panel, ShownImage, draw

RANDOM = "random"  # --weights of a student that was never trained
MAX_OBJECTS = 8  # instances in a figure, the largest
ALPHA = r"$\alpha$"
UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, AssertionError)


@dataclass(frozen=True)
class View:
    """An image and the outputs of the student and a teacher for it.

    Attributes:
        image: the image as the student gets it, with the ground-truth boxes.
        classes: names of the semantic classes, empty if they are unknown.
        student, teacher: outputs for a batch of only this image.
    """

    image: ShownImage
    classes: tuple[str, ...]
    student: NetworkOutputs
    teacher: NetworkOutputs | None


def mssd_grid(head: MSSD, view: View) -> Grid:
    masks = [head.mask(view.student, k, stride)[0] for k, stride in head.strides.items()]
    name = "binary mask" if head.binary else f"mask M, σ² = {head.sigma2:g}"
    return level_row(name, head.strides.items(), masks, (0, 1))


def mkd_grid(head: MKD, view: View) -> Grid:
    levels, maps = feature_maps(head, view)
    student, name = [s for s, _ in maps], "student mean|F|"
    grid: Grid = {}
    if "fad" in head.term_weights and head.options["attention"]:
        attention = [joint_attention(s, t)[0, 0] for s, t in maps]
        grid |= level_row("attention A", levels, attention, (0, 1))
    if "fdmd" in head.term_weights:
        student = [frequency_filtered(s, head.masks(s)) for s in student]
        name = f"student mean|F̂|\nζ = {head.masks.mask_ratio:g}"
    grid |= level_row(name, levels, [magnitude(s[0]) for s in student])
    return grid | level_row("teacher mean|F|", levels, [magnitude(t[0]) for _, t in maps])


def ima_grid(head: IMA, view: View) -> Grid:
    levels, maps = feature_maps(head, view)
    if head.scope in CROPPED:
        return crop_grid(head, view, maps)
    student = level_row("student mean|F|", levels, [magnitude(s[0]) for s, _ in maps])
    teacher = level_row("teacher mean|F|", levels, [magnitude(t[0]) for _, t in maps])
    if head.scope == "class":
        return class_grid(head, view, maps) | student | teacher
    scales = [head.scales(s, t, None).item() for s, t in maps]
    noted = zip(student.items(), scales)
    return {k: replace(x, note=f"{ALPHA} {scale:.2f}") for (k, x), scale in noted} | teacher


def crop_grid(head: IMA, view: View, maps: list[tuple[Tensor, Tensor]]) -> Grid:
    """Return one column per instance, the largest ones (scopes box and mask)."""
    found, weight = head.instances(view.student, view.teacher)
    boxes = Boxes(found[0])
    crops: dict[int, tuple[Tensor, Tensor, float]] = {}
    for rows, s, t in head.crops(maps, found):
        scales = head.scales(s, t, None if weight is None else weight[rows]).tolist()
        numbers = torch.arange(len(boxes), device=s.device)[rows].tolist()
        crops |= dict(zip(numbers, zip(s, t, scales)))
    labels = view.image.labels
    if head.selection is not None:
        labels = [f"detection {i + 1}" for i in range(len(boxes))]
    levels = head.levels_of([boxes])
    grid: Grid = {}
    for i in sorted(boxes.area().argsort(descending=True)[:MAX_OBJECTS].tolist()):
        column, level = labels[i], head.levels[int(levels[i])]
        student, teacher, scale = crops[i]
        left, top, right, bottom = found[0][i].tolist()
        area = Panel(None, (left, top, right, bottom), zoom=True)
        note = f"{level.student}, stride {level.stride}\n{ALPHA} {scale:.2f}"
        grid["image", column] = replace(area, note=note)
        if weight is not None:
            grid["mask", column] = replace(area, array=array(weight[i, 0]), limits=(0, 1))
        grid["student mean|F|", column] = replace(area, array=array(magnitude(student)))
        grid["teacher mean|F|", column] = replace(area, array=array(magnitude(teacher)))
    return grid


def class_grid(head: IMA, view: View, maps: list[tuple[Tensor, Tensor]]) -> Grid:
    """Return the cells of each class, and its α on them (scope class)."""
    names = view.classes or tuple(f"class {k}" for k in range(head.num_classes))
    truth = view.student.batch.sem_seg
    cells: Grid = {}
    alphas: Grid = {}
    for level, (s, t) in zip(head.levels, maps):
        labels = cell_labels(truth.to(s.device), *s.shape[2:])
        scales = head.class_scales(s, t, labels)[0]
        known = (labels[0] >= 0) & (labels[0] < head.num_classes)
        alpha = scales[labels[0].clamp(0, head.num_classes - 1)].where(known, torch.nan)
        one = [(level.student, level.stride)]
        marks = []
        for k in labels[0][known].unique():
            y, x = (central_cell(labels[0] == k) + 0.5) * level.stride
            marks.append((float(x), float(y), f"{scales[k]:.2f}"))
        shown = labels[0].float().where(known, torch.nan)
        cells |= level_row("cells of classes", one, [shown], classes=names)
        alphas |= level_row(f"{ALPHA} of classes", one, [alpha], (0, 1), marks=tuple(marks))
    return cells | alphas


def tid_grid(head: TID, view: View) -> Grid:
    assert view.teacher is not None
    student, teacher = head.with_objects(view.student, view.teacher), view.teacher
    levels = [(x.student, x.stride) for x in head.levels]
    judgement = head.judgement(student, teacher, 0)
    key, weak = tid_areas(*judgement, **{**head.value_options, "outside_key": "zero"})
    masks = [tid_mask(v)[0] for v in head.values(student, teacher)]
    highest = torch.stack(judgement[:2]).max().item()
    largest = max(x.max().item() for x in masks)
    rows = {
        "Score_T": (judgement.score_teacher, (0, highest)),
        "Score_S": (judgement.score_student, (0, highest)),
        "key area: Score_key": (key, (0, highest)),
        "weak area: Score_weak": (weak, (1, 1.5)),
    }
    grid: Grid = {}
    for name, (points, limits) in rows.items():
        maps = [x[0] for x in head.by_level(points[None], student)]
        grid |= level_row(name, levels, maps, limits)
    return grid | level_row("M", levels, masks, (0, largest))


GRIDS: dict[type[DistillHead], Callable[[Any, View], Grid]] = {
    MSSD: mssd_grid,
    MKD: mkd_grid,
    IMA: ima_grid,
    TID: tid_grid,
}


def level_row(
    name: str,
    levels: Iterable[tuple[str, int]],
    maps: Sequence[Tensor],
    limits: tuple[float, float] | None = None,
    **options: Any,
) -> Grid:
    """Return one row with one panel per level.

    Args:
        name: name of the row.
        levels: names, and strides in pixels.
        maps: (Hi, Wi) each.
        limits, options: see :class:`Panel`.
    """
    grid = {}
    for (level, stride), x in zip(levels, maps):
        area = 0.0, 0.0, float(x.shape[1] * stride), float(x.shape[0] * stride)
        grid[name, f"{level}, stride {stride}"] = Panel(array(x), area, limits, **options)
    return grid


def feature_maps(
    head: MKD | IMA, view: View
) -> tuple[list[tuple[str, int]], list[tuple[Tensor, Tensor]]]:
    """Return names and strides of the head's levels, and adapted student and teacher maps."""
    assert view.teacher is not None
    levels = [(x.student, x.stride) for x in head.levels]
    return levels, head.maps(view.student, view.teacher)


def magnitude(maps: Tensor) -> Tensor:
    """Return (H, W), the mean of |F| over the channels of (C, H, W)."""
    return maps.abs().mean(0)


def central_cell(member: Tensor) -> Tensor:
    """Return row and column of the true cell of an (H, W) mask nearest to the mean of all."""
    cells = member.nonzero().float()
    return cells[(cells - cells.mean(0)).square().sum(1).argmin()]


def array(x: Tensor) -> NDArray[np.float32]:
    return x.float().cpu().numpy()


def missing_truth(head: DistillHead, entry: dict[str, Any]) -> str | None:
    """Return the ground truth that the head's figure shows but ``entry`` lacks, or None."""
    scope = head.scope if isinstance(head, IMA) else ""
    if (isinstance(head, (MSSD, TID)) or scope in CROPPED) and "instances" not in entry:
        return "ground-truth boxes"
    if scope in CROPPED and not len(entry["instances"]):
        return "a ground-truth box"
    if scope == "class" and "sem_seg" not in entry:
        return "semantic labels"
    return None


def find_image(cfg: CfgNode, image: str, needs: str = "") -> dict[str, Any]:
    """Find the entry of an image in the test and training sets of the config, in this order.

    Args:
        cfg: names the data sets.
        image: its path, the end of its path, or its index, counted through the sets.
        needs: why a data set must have it, for the message.

    Raises:
        DataError: no data set has it.
    """
    sets = tuple(dict.fromkeys((*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)))
    parts, path = Path(image).parts, os.path.abspath(image)
    detections = detection_file(cfg)
    count = 0
    for name in sets:
        single = cfg.clone()
        single.defrost()
        single.DATASETS.TRAIN, single.DATALOADER.FILTER_EMPTY_ANNOTATIONS = (name,), False
        single.MODEL.DISTILL.TEACHER.DETECTIONS = ""  # they are of all training sets
        entries = in_model_order(cfg, name, load_training_set(single))
        if detections and name in cfg.DATASETS.TRAIN:
            entries = detections.attached(name, entries, class_names(cfg) or ())
        for index, entry in enumerate(entries, count):
            own = entry["file_name"]
            named = Path(own).parts[-len(parts) :] == parts or os.path.abspath(own) == path
            if named or image == str(index):
                return {**entry, "dataset": name}
        count += len(entries)
    raise DataError(
        f"--image: '{image}' is neither file name nor index of the {count} images of "
        f"{', '.join(sets)}{needs}."
    )


def read_input(cfg: CfgNode, heads: dict[str, DistillHead], image: str) -> dict[str, Any]:
    """Return a ``batched_inputs`` entry in the size of the evaluation, with its ground truth.

    If no head shows ground truth, any file can be named.

    Raises:
        DataError: the image does not exist, is unreadable, or lacks ground truth of a head.
    """
    needs = [f"{x} {name} shows" for name, head in heads.items() if (x := missing_truth(head, {}))]
    if os.path.isfile(image) and not needs:
        entry: dict[str, Any] = {"file_name": image}
    else:
        entry = find_image(cfg, image, f", whose {' and '.join(needs)}" if needs else "")
    try:
        mapped = train_mapper(without_augmentation(cfg))(entry)
    except UNREADABLE as e:
        raise DataError(f"'{entry['file_name']}' cannot be read as an image: {e}.") from e
    for name, head in heads.items():
        if lack := missing_truth(head, mapped):
            raise DataError(f"{name} shows {lack}, but '{entry['file_name']}' has none.")
    return mapped


def without_augmentation(cfg: CfgNode) -> CfgNode:
    """Return the config with training images as in the evaluation."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TRAIN = (cfg.INPUT.MIN_SIZE_TEST,)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.AUGMENT.STEPS = ()
    cfg.INPUT.CROP.ENABLED = False
    return cfg


def build(cfg: CfgNode) -> tuple[DistillModel, dict[str, DistillHead]]:
    """Build the distilled student in evaluation mode; return it and its heads with a figure.

    Raises:
        ConfigError: no head has a figure.
    """
    torch.manual_seed(max(cfg.SEED, 0))
    model = build_distill_model(cfg).eval()
    heads: dict[str, Any] = dict(model.heads) if isinstance(model, DistillModel) else {}
    drawn = {name: head for name, head in heads.items() if type(head) in GRIDS}
    if not drawn:
        raise ConfigError(
            f"MODEL.DISTILL.HEADS {tuple(heads)} has no figure; there are figures of "
            f"{', '.join(cls.__name__ for cls in GRIDS)}."
        )
    assert isinstance(model, DistillModel), "it has heads"
    return model, drawn


def load_weights(model: DistillModel, cfg: CfgNode, weights: str) -> tuple[str, list[str]]:
    """Load the student, and the weights of its heads that the checkpoint has.

    Args:
        weights: a checkpoint, ``RANDOM``, or "" for the final one of ``cfg.OUTPUT_DIR``.

    Returns:
        The source of the student's weights, and the heads whose adapters are untrained.

    Raises:
        WeightsError: there is no such checkpoint, or it does not fit.
    """
    path = weights or os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if not weights and not os.path.isfile(path):
        raise WeightsError(
            f"There is no '{path}', the final checkpoint of the config's OUTPUT_DIR; name another "
            f"with --weights, or --weights {RANDOM} for an untrained student."
        )
    states: dict[str, Tensor] = {}
    if path != RANDOM:
        load_strictly(model.student, path, "--weights", allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        with readable(path, "--weights"):
            local = PathManager.get_local_path(path)
            saved = torch.load(local, "cpu", weights_only=True) if path.endswith(".pth") else {}
        states = saved.get("distill", {})
    fresh = []
    for name, head in model.heads.items():
        own = {k.partition(".")[2]: v for k, v in states.items() if k.startswith(f"{name}.")}
        try:
            if own:
                head.load_state_dict(own)
        except RuntimeError as e:
            raise WeightsError(f"--weights: '{path}' does not fit the config's {name}: {e}") from e
        if not own and isinstance(head, (MKD, IMA)) and list(head.adapters.parameters()):
            fresh.append(name)
    return path, fresh


@torch.no_grad()
def look(
    model: DistillModel, heads: Sequence[DistillHead], cfg: CfgNode, entry: dict[str, Any]
) -> dict[str, View]:
    """Record the outputs of all networks for one image, by the teacher of the heads."""
    image = entry["image"]
    images = model.family.preprocess([image], tuple(image.shape[1:]))
    instances = [entry["instances"].to(model.device)] if "instances" in entry else []
    batch = Batch([entry], (images.shape[2], images.shape[3]), instances)
    student = model.family.ask(images, NetworkOutputs(batch), needs_of(heads))
    asked = {
        name: needs_of([x for x in heads if x.needs_teacher and x.taught_by == name])
        for name in model.teachers
    }
    answers = {name: x.ask(student, asked[name]) for name, x in model.teachers.items()}
    rgb = convert_image_to_rgb(image.permute(1, 2, 0), cfg.INPUT.FORMAT)
    known = class_names(cfg)
    labels = [i for x in instances for i in x.gt_classes.tolist()]
    shown = ShownImage(
        np.asarray(rgb).clip(0, 255).astype(np.uint8),
        [box for boxes in batch.boxes for box in boxes.tolist()],
        [f"{n} {known[i] if known else f'class {i}'}" for n, i in enumerate(labels, 1)],
    )
    classes = class_names(cfg, semantic=True) or ()
    names = {head.taught_by for head in heads}
    return {name: View(shown, classes, student, answers.get(name)) for name in names}


def needs_of(heads: Iterable[DistillHead]) -> frozenset[str]:
    return frozenset().union(*(head.needs for head in heads))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    shown = parser.add_mutually_exclusive_group(required=True)
    shown.add_argument("--image", help="file name or index in DATASETS.TEST, TRAIN")
    shown.add_argument("--samples", type=at_least(1), help="number of training samples")
    parser.add_argument(
        "--iteration", type=at_least(0), default=0, help="iteration of the first training sample"
    )
    parser.add_argument("--out", type=Path, default=Path("output/visualize"))
    parser.add_argument(
        "--weights",
        default="",
        help=f"student's checkpoint, or {RANDOM}; default: OUTPUT_DIR/model_final.pth",
    )


def run(args: argparse.Namespace) -> int:
    cfg = setup_config(args.config_file, args.opts)
    if args.samples:
        path = args.out / "samples.jpg"
        draw_samples(cfg, args.samples, args.iteration, path)
        print(f"wrote {path}")
    else:
        draw_methods(cfg, args.image, args.weights, args.out)
    return 0


def draw_methods(cfg: CfgNode, image: str, weights: str, out: Path) -> None:
    """Write one figure per head of the config; see the options of the command."""
    model, heads = build(cfg)
    weights, fresh = load_weights(model, cfg, weights)
    entry = read_input(cfg, heads, image)
    views = look(model, list(heads.values()), cfg, entry)
    parts = {one.name: one.cfg for one in one_per_teacher(cfg)}
    file = Path(entry["file_name"])
    out.mkdir(parents=True, exist_ok=True)
    for name, head in heads.items():
        lines = [
            f"{name}: {file.name} of {entry.get('dataset', 'no data set')}",
            f"student: {'random weights' if weights == RANDOM else weights}",
        ]
        if head.needs_teacher:
            lines.append(f"teacher: {teacher_config(parts[head.taught_by]).MODEL.WEIGHTS}")
        if name in fresh:
            lines.append("adapters: fresh, no checkpoint has trained them")
        view = views[head.taught_by]
        with torch.no_grad():
            grid = GRIDS[type(head)](head, view)
        objects = len(view.image.labels)
        if any(panel.zoom for panel in grid.values()) and objects > MAX_OBJECTS:
            lines.append(f"the {MAX_OBJECTS} largest of {objects} objects")
        path = out / f"{file.stem}_{name.lower()}.png"
        draw(grid, view.image, "\n".join(lines), path)
        print(*lines, f"wrote {path}", sep="\n  ")
    for name in model.heads:
        if name not in heads:
            print(f"{name} has no figure")
