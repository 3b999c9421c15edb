"""Registration of data sets by the config, and their checks before a training."""

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
    filter_images_with_few_keypoints,
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
from ..utils.text import clause
from .checks.coco_file import CocoFile
from .checks.issues import (
    ESCAPE,
    Issue,
    config_issues,
    entry_issues,
    metadata_roots,
    name_of,
    path_issues,
    voc_issues,
)
from .cityscapes import check_ground_truth

logger = logging.getLogger(__name__)

_LISTED = ("coco", "coco_panoptic_seg", "kitti", "lvis", "pascal_voc")  # a file lists the images
_CITYSCAPES = ("cityscapes_instance", "cityscapes_sem_seg")
_SEMANTIC = (PanopticFPN, SemanticSegmentor)
# Key of the dataset dicts that has the labels, name of the labels, and architectures that need them
_TRAINED_ON = (
    ("annotations", "objects", (GeneralizedRCNN, DenseDetector, ProposalNetwork)),
    ("sem_seg_file_name", "semantic labels", _SEMANTIC),
)
_SAMPLE = 100  # number of images of which one must exist, if bad images are dropped


def register_coco_format(cfg: CfgNode, names: Sequence[str] | None = None) -> None:
    """Register ``DATASETS.COCO_FORMAT``: (name, annotations.json, image folder) triples.

    Args:
        cfg: the whole config.
        names: names of the data sets to register; None: all.

    Raises:
        DataError: a triple is malformed, a path is missing, or a name is registered for other
            files.
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
                f"DATASETS.COCO_FORMAT: the name '{name}' is already registered for other files; "
                "choose another."
            )
        register_coco_instances(name, {}, annotations, images)


def class_names(cfg: CfgNode, semantic: bool = False) -> tuple[str, ...] | None:
    """Return the class names of the first training set, or None if they are unknown.

    Args:
        cfg: config of the student or of the teacher.
        semantic: return the names of semantic classes instead of those with instances.
    """
    if not cfg.DATASETS.TRAIN:
        return None
    name, key = cfg.DATASETS.TRAIN[0], "stuff_classes" if semantic else "thing_classes"
    annotations = {entry[0]: entry[1] for entry in cfg.DATASETS.COCO_FORMAT}.get(name)
    registered = name in DatasetCatalog.list()
    metadata = MetadataCatalog.get(name) if registered else None
    if annotations and (metadata is None or metadata.get("json_file") != annotations):
        return _coco_names(annotations)  # a teacher's data set, which is not registered here
    if metadata is None:
        return None
    if metadata.get(key) is None and metadata.get("evaluator_type") == "coco":
        _load(name)  # the annotation file has the names
    names = metadata.get(key)
    return tuple(names) if names else None


def _coco_names(annotations: str) -> tuple[str, ...] | None:
    """Return the category names in detectron2's order, by id, or None if they cannot be read."""
    try:
        with open(annotations) as f:
            categories = json.load(f)["categories"]
        return tuple(c["name"] for c in sorted(categories, key=lambda c: c["id"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _load(name: str) -> list[dict[str, Any]]:
    """Return the dataset dicts of a data set; every error of its reader becomes a DataError."""
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
        reason = f"{type(e).__name__} {clause(e)}"
        if path:
            issues = CocoFile(path, metadata.get("image_root") or "").issues(masks=False)
            reason = next((f.detail for f in issues if _unavoidable(f)), reason)
        raise DataError(
            f"Data set '{name}' cannot be read from {path or 'its files'}: {reason}."
        ) from e


def load_training_set(cfg: CfgNode) -> list[dict[str, Any]]:
    """Return the dataset dicts of :func:`load_training_sets` in one list."""
    return [entry for _, dicts in load_training_sets(cfg) for entry in dicts]


def load_training_sets(cfg: CfgNode) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the dataset dicts of all training sets, without fatal issues.

    Returns:
        Names and dicts of the data sets, in the order of ``DATASETS.TRAIN``.

    Raises:
        DataError: a data set is unreadable, empty or does not fit the config; or a path leads out
            of its folder. Different classes of the data sets, and a missing first image, are errors
            too. A wrong annotation is an error if ``DATALOADER.ON_BAD_IMAGE`` is stop.
    """
    names = tuple(cfg.DATASETS.TRAIN)
    sets = [(name, _checked_set(cfg, name)) for name in names]
    dicts = [image for _, images in sets for image in images]
    if not any("annotations" in image for image in dicts):
        return sets
    if not all("annotations" in image for image in dicts):
        raise DataError(f"DATASETS.TRAIN {names} mixes sets with and without instances.")
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        sets = [(name, filter_images_with_only_crowd_annotations(x)) for name, x in sets]
    if cfg.MODEL.KEYPOINT_ON:
        sets = _with_keypoints(sets, cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE)
    dicts = [image for _, images in sets for image in images]
    if not dicts:
        raise DataError(
            f"No image of DATASETS.TRAIN {names} has an annotation; set "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train on images without annotations."
        )
    try:
        with suppress(AttributeError):  # if the class names are unknown
            check_metadata_consistency("thing_classes", names)
            print_instances_class_histogram(dicts, MetadataCatalog.get(names[0]).thing_classes)
    except ValueError as e:  # its message names the data sets and classes
        raise DataError(f"DATASETS.TRAIN: {clause(e)}.") from e
    return sets


def _with_keypoints(
    sets: list[tuple[str, list[dict[str, Any]]]], least: int
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the data sets without the images that have fewer keypoints."""
    kept = [(name, filter_images_with_few_keypoints(x, least)) for name, x in sets]
    if any(x for _, x in sets) and not any(x for _, x in kept):
        raise DataError(
            f"No image of DATASETS.TRAIN {tuple(name for name, _ in sets)} has {least} keypoints; "
            "lower MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE."
        )
    return kept


def check_labels(cfg: CfgNode, dicts: Sequence[dict[str, Any]]) -> None:
    """Check that all images have the labels that the network trains on.

    Raises:
        DataError: an image has no such labels, or they have more semantic classes than the network.
    """
    student = student_class(cfg)
    for key, what, architectures in _TRAINED_ON:
        if issubclass(student, architectures) and not all(key in image for image in dicts):
            raise DataError(
                f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has images without {what} "
                f"('{key}'), on which {student.__name__} trains; choose another set or "
                "MODEL.META_ARCHITECTURE."
            )
    if issubclass(student, _SEMANTIC):
        _check_semantic_classes(cfg)


def _check_semantic_classes(cfg: CfgNode) -> None:
    predicted = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for name in cfg.DATASETS.TRAIN:
        known = len(MetadataCatalog.get(name).get("stuff_classes") or ())
        if known > predicted:  # a GPU would end the training with an unreadable index error
            raise DataError(
                f"DATASETS.TRAIN '{name}' has {known} semantic classes; set "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES, which is {predicted}, to their number."
            )


def is_own_set(cfg: CfgNode, name: str) -> bool:
    """Return True if ``DATASETS.COCO_FORMAT``, which a plain config lacks, has the data set."""
    return name in {entry[0] for entry in cfg.DATASETS.get("COCO_FORMAT", ())}


def _checked_set(cfg: CfgNode, name: str) -> list[dict[str, Any]]:
    own = is_own_set(cfg, name)
    # The files of detectron2's own data sets are not checked: they are large and correct.
    on_disk = _issues_on_disk(cfg, name, _coco_file(name) if own else None)
    fatal = [issue for issue in on_disk if issue.fatal]
    if any(map(_unavoidable, fatal)):
        raise _error(name, [issue for issue in fatal if _unavoidable(issue)])
    dicts = _load(name)
    if not dicts:
        raise DataError(f"Data set '{name}' of DATASETS.TRAIN has no images.")
    fatal += [issue for issue in _issues_as_read(cfg, name, dicts, own) if issue.fatal]
    drop = cfg.DATALOADER.ON_BAD_IMAGE == "drop"
    if drop and not any(map(_unavoidable, fatal)):
        dicts = _drop_images(name, dicts, fatal)
    elif fatal:
        raise _error(name, fatal)
    # One image is enough to detect a wrong folder; a check of all images would take long.
    if not any(PathManager.isfile(x["file_name"]) for x in dicts[: _SAMPLE if drop else 1]):
        raise DataError(
            f"There is no image {dicts[0]['file_name']}, which data set '{name}' of "
            "DATASETS.TRAIN lists; correct the image folder."
        )
    return dicts


def _unavoidable(issue: Issue) -> bool:
    """Return True for a fatal issue that dropping images does not avoid."""
    return issue.fatal and not issue.image


def _coco_file(name: str) -> CocoFile | None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
        return None
    return CocoFile(metadata.json_file, metadata.get("image_root") or "")


def _issues_on_disk(cfg: CfgNode, name: str, file: CocoFile | None) -> Iterator[Issue]:
    """Yield the issues that must be found before detectron2 reads a data set."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("dirname") and metadata.get("split"):
        yield from voc_issues(metadata.dirname, metadata.split)
    if file:
        yield from file.issues(cfg.MODEL.MASK_ON)


def _issues_as_read(
    cfg: CfgNode, name: str, dicts: Sequence[dict[str, Any]], file_checked: bool
) -> Iterator[Issue]:
    """Yield the issues of the dataset dicts.

    Args:
        cfg: the whole config.
        name: name of the data set.
        dicts: its dataset dicts.
        file_checked: the annotation file has been checked, so only the config is checked here.
    """
    metadata = MetadataCatalog.get(name)
    roots, classes = metadata_roots(metadata), metadata.get("thing_classes")
    mask_format = cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else ""
    key, predicted = number_of_classes(cfg)
    for entry in dicts:
        if not file_checked:
            known = len(classes) if classes else None
            yield from entry_issues(entry, roots, known, cfg.MODEL.MASK_ON)
        if name in cfg.DATASETS.TRAIN:
            yield from config_issues(entry, predicted, key, mask_format)


def _error(name: str, issues: Sequence[Issue]) -> DataError:
    first = min(issues, key=lambda issue: not _unavoidable(issue))
    more = hint = ""
    if len(issues) > 1:
        more = (
            f" (the first of {len(issues)} issues; `distill check-data --config-file F` shows all)"
        )
    if all(issue.image for issue in issues):
        hint = "; correct it, or set DATALOADER.ON_BAD_IMAGE drop to train without such images"
    return DataError(f"Data set '{name}', {first.where}: {first.detail}{more}{hint}.")


def _drop_images(
    name: str, dicts: list[dict[str, Any]], issues: Sequence[Issue]
) -> list[dict[str, Any]]:
    """Return the images without issues.

    Dropping a wrong box instead of its image would make the object background.
    """
    bad = {issue.image for issue in issues}
    good = [image for image in dicts if name_of(image) not in bad]
    if not good:
        raise DataError(
            f"DATALOADER.ON_BAD_IMAGE drop leaves no image of data set '{name}'; the first issue "
            f"is in {issues[0].where}: {issues[0].detail}."
        )
    if bad:
        kinds = Counter(kind for kind, _ in {(issue.kind, issue.image) for issue in issues})
        logger.warning(
            "Data set '%s': dropped %d of %d images (%s); `distill check-data` lists them",
            *(name, len(dicts) - len(good), len(dicts)),
            ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common()),
        )
    return good


def check_test_set(cfg: CfgNode, name: str) -> None:
    """Check that a test set can be evaluated after the training.

    Raises:
        DataError: the data set is unreadable, empty or lacks a file; or a path leads out of its
            folder. Annotations that are not sufficient for COCO's evaluation are errors, too.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") in _CITYSCAPES:
        if metadata.evaluator_type == "cityscapes_instance" and not cfg.MODEL.MASK_ON:
            raise DataError(f"Data set '{name}' evaluates masks; set MODEL.MASK_ON True.")
        check_ground_truth(name)
    if metadata.get("evaluator_type") not in _LISTED:
        return
    issues = []
    if metadata.get("dirname"):
        issues = list(voc_issues(metadata.dirname, metadata.split))
    if not issues:
        dicts = _load(name)
        if not dicts:
            raise DataError(f"Data set '{name}' of DATASETS.TEST has no images.")
        roots = metadata_roots(metadata)
        issues = [issue for entry in dicts for issue in path_issues(entry, roots)]
        issues += _evaluation_issues(cfg, name, _coco_file(name))
    if issues:
        raise _error(name, [issue._replace(image="") for issue in issues])


def _evaluation_issues(cfg: CfgNode, name: str, file: CocoFile | None) -> Iterator[Issue]:
    """Yield the issues that would stop COCO's evaluation of a readable data set."""
    if file is None:
        return
    (key, predicted), known = number_of_classes(cfg), len(MetadataCatalog.get(name).thing_classes)
    if predicted is not None and predicted > known:
        detail = f"the model predicts {predicted} classes, but the data set has {known}; set {key}"
        yield Issue("more classes predicted than known", name, detail, True)
    yield from file.evaluation_issues(cfg.MODEL.MASK_ON)


def find_issues(cfg: CfgNode, name: str) -> tuple[list[Issue], list[dict[str, Any]]]:
    """Find all issues of a data set's annotations, including remarks, without raising an error.

    Args:
        cfg: the whole config. Its classes and masks are checked for a set of ``DATASETS.TRAIN``.
        name: name of the registered data set.

    Returns:
        The issues, and the dataset dicts of the images that may be opened, as far as they can be
        read.
    """
    file = _coco_file(name)
    issues = list(_issues_on_disk(cfg, name, file))
    if file is None and issues:  # the reader would open files outside the folder
        return issues, []
    try:
        dicts = _load(name)
        reason = "" if dicts else "it has no images"
    except DataError as e:
        dicts, reason = [], str(e).rstrip(".")
    if not dicts:
        if not any(map(_unavoidable, issues)):
            issues.append(Issue("unreadable data set", name, reason, True))
        return issues, file.images() if file else []
    issues += _issues_as_read(cfg, name, dicts, file is not None)
    if name in cfg.DATASETS.TEST:
        issues += _evaluation_issues(cfg, name, file)
    escaping = {issue.image for issue in issues if issue.kind == ESCAPE}
    return issues, [entry for entry in dicts if name_of(entry) not in escaping]


def number_of_classes(cfg: CfgNode) -> tuple[str, int | None]:
    """Return the key and the number of the student's instance classes; None without instances."""
    student = student_class(cfg)
    sections = []
    if issubclass(student, GeneralizedRCNN):
        sections = ["ROI_HEADS"]
    elif issubclass(student, DenseDetector):  # a user's class may use the section of its base class
        sections = [x.__name__.upper() for x in student.__mro__ if x.__name__.upper() in cfg.MODEL]
    if not sections:
        return "", None
    return f"MODEL.{sections[0]}.NUM_CLASSES", cfg.MODEL[sections[0]].NUM_CLASSES
