"""Data sets: registration by config alone, and the checks before training."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.modeling import (
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
    SemanticSegmentor,
)
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.file_io import PathManager

from ..config import student_class
from ..errors import DataError
from .checks.coco_file import CocoFile
from .checks.issues import (
    ESCAPE,
    Fault,
    config_faults,
    entry_faults,
    metadata_roots,
    name_of,
    one_line,
    path_faults,
    voc_faults,
)
from .cityscapes import check_ground_truth

logger = logging.getLogger(__name__)

_LISTED = ("coco", "coco_panoptic_seg", "kitti", "lvis", "pascal_voc")  # a file names the pictures
_CITYSCAPES = ("cityscapes_instance", "cityscapes_sem_seg")
# Keys of the dataset dicts from which detectron2's mapper makes what its networks train on.
_SEMANTIC = (PanopticFPN, SemanticSegmentor)
_TRAINED_ON = (
    ("annotations", "objects", (GeneralizedRCNN, DenseDetector, ProposalNetwork)),
    ("sem_seg_file_name", "semantic labels", _SEMANTIC),
)
_SAMPLE = 100  # pictures of which one has to be there, if bad ones are dropped


def register_coco_format(cfg: CfgNode, names: Sequence[str] | None = None) -> None:
    """Register ``DATASETS.COCO_FORMAT``: (name, annotations.json, image folder) triples.

    Args:
        cfg: the whole config.
        names: data sets to register; None: all.

    Raises:
        DataError: a triple is malformed, a path is missing, or a name stands for other files.
    """
    for entry in cfg.DATASETS.COCO_FORMAT:
        triple = isinstance(entry, (tuple, list)) and len(entry) == 3
        if not triple or not all(isinstance(x, str) for x in entry):
            raise DataError(
                f"DATASETS.COCO_FORMAT: {entry!r} is not a (name, annotations.json, image folder) "
                "triple."
            )
        name, annotations, images = entry
        if names is not None and name not in names:
            continue
        if not os.path.isfile(annotations):
            raise DataError(f"DATASETS.COCO_FORMAT '{name}': there is no file '{annotations}'.")
        if not os.path.isdir(images):
            raise DataError(f"DATASETS.COCO_FORMAT '{name}': there is no folder '{images}'.")
        if name in DatasetCatalog.list():
            metadata = MetadataCatalog.get(name)
            if (metadata.get("json_file"), metadata.get("image_root")) == (annotations, images):
                continue
            raise DataError(
                f"DATASETS.COCO_FORMAT: the name '{name}' already stands for other files; "
                "choose another."
            )
        register_coco_instances(name, {}, annotations, images)


def class_names(cfg: CfgNode, semantic: bool = False) -> tuple[str, ...] | None:
    """Class names of the first training set; None if they cannot be known.

    Args:
        cfg: of the student or the teacher.
        semantic: names of semantic classes instead of those with instances.
    """
    if not cfg.DATASETS.TRAIN:
        return None
    name, key = cfg.DATASETS.TRAIN[0], "stuff_classes" if semantic else "thing_classes"
    annotations = {entry[0]: entry[1] for entry in cfg.DATASETS.COCO_FORMAT}.get(name)
    registered = name in DatasetCatalog.list()
    metadata = MetadataCatalog.get(name) if registered else None
    if annotations and (metadata is None or metadata.get("json_file") != annotations):
        return _coco_names(annotations)  # a teacher's own set, which nobody trains on here
    if metadata is None:
        return None
    if metadata.get(key) is None and metadata.get("evaluator_type") == "coco":
        _load(name)  # COCO's names stand in its annotation file
    names = metadata.get(key)
    return tuple(names) if names else None


def _coco_names(annotations: str) -> tuple[str, ...] | None:
    """Category names in detectron2's order, by id; None if the file cannot tell them."""
    try:
        with open(annotations) as f:
            categories = json.load(f)["categories"]
        return tuple(c["name"] for c in sorted(categories, key=lambda c: c["id"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _load(name: str) -> list[dict[str, Any]]:
    """The dataset dicts of a registered set; whatever its reader raises is a fault of its files."""
    try:
        return DatasetCatalog.get(name)
    except DataError:
        raise
    except ModuleNotFoundError as e:
        raise DataError(
            f"Data set '{name}' needs the package {e.name}, which is not installed; run "
            f"`pip install --no-deps {e.name}`."
        ) from e
    except Exception as e:
        metadata = MetadataCatalog.get(name)
        path = metadata.get("json_file")
        reason = f"{type(e).__name__} {one_line(e)}"
        if path:
            faults = CocoFile(path, metadata.get("image_root") or "").faults(masks=False)
            reason = next((f.detail for f in faults if _incurable(f)), reason)
        raise DataError(
            f"Data set '{name}' cannot be read from {path or 'its files'}: {reason}."
        ) from e


def load_training_set(cfg: CfgNode) -> list[dict[str, Any]]:
    """The dataset dicts of :func:`load_training_sets` in one list."""
    return [entry for _, dicts in load_training_sets(cfg) for entry in dicts]


def load_training_sets(cfg: CfgNode) -> list[tuple[str, list[dict[str, Any]]]]:
    """The training pictures as detectron2 dataset dicts, without fatal faults.

    Returns:
        Names and dicts of the data sets, in the order of ``DATASETS.TRAIN``.

    Raises:
        DataError: a set is unreadable or empty, the sets' classes differ, a path leads out of its
            folder, the config's classes or masks do not fit, the first picture is missing; or an
            annotation is wrong and ``DATALOADER.ON_BAD_IMAGE`` is stop.
    """
    names = tuple(cfg.DATASETS.TRAIN)
    sets = [(name, _checked_set(cfg, name)) for name in names]
    dicts = [picture for _, pictures in sets for picture in pictures]
    if not any("annotations" in picture for picture in dicts):
        return sets
    if not all("annotations" in picture for picture in dicts):
        raise DataError(f"DATASETS.TRAIN {names} mixes sets with and without instances.")
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        sets = [(name, filter_images_with_only_crowd_annotations(x)) for name, x in sets]
        dicts = [picture for _, pictures in sets for picture in pictures]
    if not dicts:
        raise DataError(
            f"No picture of DATASETS.TRAIN {names} has an annotation; set "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train on pictures without any."
        )
    try:
        with suppress(AttributeError):  # the names of the classes are unknown
            check_metadata_consistency("thing_classes", names)
            print_instances_class_histogram(dicts, MetadataCatalog.get(names[0]).thing_classes)
    except ValueError as e:  # it names the sets and classes
        raise DataError(f"DATASETS.TRAIN: {one_line(e)}.") from e
    return sets


def check_labels(cfg: CfgNode, dicts: Sequence[dict[str, Any]]) -> None:
    """Refuse pictures without the kind of labels that the network trains on.

    Raises:
        DataError: a picture has none, or they have more semantic classes than the network.
    """
    student = student_class(cfg)
    for key, what, architectures in _TRAINED_ON:
        if issubclass(student, architectures) and not all(key in picture for picture in dicts):
            raise DataError(
                f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has pictures without {what} "
                f"('{key}'), on which {student.__name__} trains; choose another set or "
                "MODEL.META_ARCHITECTURE."
            )
    if issubclass(student, _SEMANTIC):
        _check_semantic_classes(cfg)


def _check_semantic_classes(cfg: CfgNode) -> None:
    predicted = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for name in cfg.DATASETS.TRAIN:
        known = len(MetadataCatalog.get(name).get("stuff_classes") or ())
        if known > predicted:  # on a GPU, training would die of an index that nobody can read
            raise DataError(
                f"DATASETS.TRAIN '{name}' has {known} semantic classes; set "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES, which is {predicted}, to their number."
            )


def is_own_set(cfg: CfgNode, name: str) -> bool:
    """Whether a data set is one of ``DATASETS.COCO_FORMAT``, which a plain config lacks."""
    return name in {entry[0] for entry in cfg.DATASETS.get("COCO_FORMAT", ())}


def _checked_set(cfg: CfgNode, name: str) -> list[dict[str, Any]]:
    own = is_own_set(cfg, name)
    # Of detectron2's own sets only what it has read is looked at: COCO's files are large and right.
    on_disk = _faults_on_disk(cfg, name, _coco_file(name) if own else None)
    fatal = [fault for fault in on_disk if fault.fatal]
    if any(map(_incurable, fatal)):
        raise _stop(name, [fault for fault in fatal if _incurable(fault)])
    dicts = _load(name)
    if not dicts:
        raise DataError(f"Data set '{name}' of DATASETS.TRAIN has no pictures.")
    fatal += [fault for fault in _faults_as_read(cfg, name, dicts, own) if fault.fatal]
    drop = cfg.DATALOADER.ON_BAD_IMAGE == "drop"
    if drop and not any(map(_incurable, fatal)):
        dicts = _without(name, dicts, fatal)
    elif fatal:
        raise _stop(name, fatal)
    # One picture shows a wrong folder; looking for all of them would take long.
    if not any(PathManager.isfile(x["file_name"]) for x in dicts[: _SAMPLE if drop else 1]):
        raise DataError(
            f"There is no picture {dicts[0]['file_name']}, which data set '{name}' of "
            "DATASETS.TRAIN lists; correct the image folder."
        )
    return dicts


def _incurable(fault: Fault) -> bool:
    """Whether leaving out a picture is no help."""
    return fault.fatal and not fault.picture


def _coco_file(name: str) -> CocoFile | None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
        return None
    return CocoFile(metadata.json_file, metadata.get("image_root") or "")


def _faults_on_disk(cfg: CfgNode, name: str, file: CocoFile | None) -> Iterator[Fault]:
    """Faults that are to be found before detectron2 reads a data set."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("dirname") and metadata.get("split"):
        yield from voc_faults(metadata.dirname, metadata.split)
    if file:
        yield from file.faults(cfg.MODEL.MASK_ON)


def _faults_as_read(
    cfg: CfgNode, name: str, dicts: Sequence[dict[str, Any]], file_judged: bool
) -> Iterator[Fault]:
    """Faults of the dataset dicts, as far as the annotation file has not shown them already."""
    metadata = MetadataCatalog.get(name)
    roots, classes = metadata_roots(metadata), metadata.get("thing_classes")
    mask_format = cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else ""
    key, predicted = number_of_classes(cfg)
    for entry in dicts:
        if not file_judged:
            known = len(classes) if classes else None
            yield from entry_faults(entry, roots, known, cfg.MODEL.MASK_ON)
        if name in cfg.DATASETS.TRAIN:
            yield from config_faults(entry, predicted, key, mask_format)


def _stop(name: str, faults: Sequence[Fault]) -> DataError:
    first = min(faults, key=lambda fault: not _incurable(fault))
    more = hint = ""
    if len(faults) > 1:
        more = (
            f" (the first of {len(faults)} faults; `distill check-data --config-file F` shows all)"
        )
    if all(fault.picture for fault in faults):
        hint = "; correct it, or set DATALOADER.ON_BAD_IMAGE drop to train without such pictures"
    return DataError(f"Data set '{name}', {first.where}: {first.detail}{more}{hint}.")


def _without(
    name: str, dicts: list[dict[str, Any]], faults: Sequence[Fault]
) -> list[dict[str, Any]]:
    """The pictures without faults; one without a wrong box alone would teach it as background."""
    bad = {fault.picture for fault in faults}
    good = [picture for picture in dicts if name_of(picture) not in bad]
    if not good:
        raise DataError(
            f"DATALOADER.ON_BAD_IMAGE drop leaves no picture of data set '{name}'; the first fault "
            f"is in {faults[0].where}: {faults[0].detail}."
        )
    if bad:
        kinds = Counter(kind for kind, _ in {(fault.kind, fault.picture) for fault in faults})
        logger.warning(
            "Data set '%s': left out %d of %d pictures (%s); `distill check-data` shows them",
            *(name, len(dicts) - len(good), len(dicts)),
            ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common()),
        )
    return good


def check_test_set(cfg: CfgNode, name: str) -> None:
    """Refuse a test set of files or lists that could not be evaluated after the training.

    Raises:
        DataError: it is unreadable, has no pictures, a path leads out of its folder, a file of
            Cityscapes is missing, or an annotation lacks what COCO's evaluation needs.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") in _CITYSCAPES:
        if metadata.evaluator_type == "cityscapes_instance" and not cfg.MODEL.MASK_ON:
            raise DataError(f"Data set '{name}' evaluates masks; set MODEL.MASK_ON True.")
        check_ground_truth(name)
    if metadata.get("evaluator_type") not in _LISTED:
        return
    faults = []
    if metadata.get("dirname"):
        faults = list(voc_faults(metadata.dirname, metadata.split))
    if not faults:
        dicts = _load(name)
        if not dicts:
            raise DataError(f"Data set '{name}' of DATASETS.TEST has no pictures.")
        roots = metadata_roots(metadata)
        faults = [fault for entry in dicts for fault in path_faults(entry, roots)]
        faults += _evaluation_faults(cfg, name, _coco_file(name))
    if faults:
        raise _stop(name, [fault._replace(picture="") for fault in faults])


def _evaluation_faults(cfg: CfgNode, name: str, file: CocoFile | None) -> Iterator[Fault]:
    """What would stop COCO's evaluation of a set that can be read."""
    if file is None:
        return
    (key, predicted), known = number_of_classes(cfg), len(MetadataCatalog.get(name).thing_classes)
    if predicted is not None and predicted > known:
        detail = f"the model predicts {predicted} classes, of which the set has {known}; set {key}"
        yield Fault("more classes predicted than known", name, detail, True)
    yield from file.evaluation_faults(cfg.MODEL.MASK_ON)


def find_faults(cfg: CfgNode, name: str) -> tuple[list[Fault], list[dict[str, Any]]]:
    """All faults of a registered set's annotations, remarks included. Never raises.

    Args:
        cfg: the whole config; its classes and masks have to fit if ``DATASETS.TRAIN`` has the set.
        name: of the set.

    Returns:
        The faults, and the pictures whose files may be opened, as far as they can be read.
    """
    file = _coco_file(name)
    faults = list(_faults_on_disk(cfg, name, file))
    if file is None and faults:  # the reader would follow its list out of the folder
        return faults, []
    try:
        dicts = _load(name)
        reason = "" if dicts else "it has no pictures"
    except DataError as e:
        dicts, reason = [], str(e).rstrip(".")
    if not dicts:
        if not any(map(_incurable, faults)):
            faults.append(Fault("unreadable data set", name, reason, True))
        return faults, file.pictures() if file else []
    faults += _faults_as_read(cfg, name, dicts, file is not None)
    if name in cfg.DATASETS.TEST:
        faults += _evaluation_faults(cfg, name, file)
    escaping = {fault.picture for fault in faults if fault.kind == ESCAPE}
    return faults, [entry for entry in dicts if name_of(entry) not in escaping]


def number_of_classes(cfg: CfgNode) -> tuple[str, int | None]:
    """Instance classes that the configured student predicts, and their key; None if it has none."""
    student = student_class(cfg)
    sections = []
    if issubclass(student, GeneralizedRCNN):
        sections = ["ROI_HEADS"]
    elif issubclass(student, DenseDetector):  # a user's own may have the section of its base class
        sections = [x.__name__.upper() for x in student.__mro__ if x.__name__.upper() in cfg.MODEL]
    if not sections:
        return "", None
    return f"MODEL.{sections[0]}.NUM_CLASSES", cfg.MODEL[sections[0]].NUM_CLASSES
