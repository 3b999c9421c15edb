"""Data sets as a config uses them, and their checks before a training."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
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
from ..utils.text import clause, quoted
from .checks.coco_file import CocoFile
from .checks.images import LABEL_VALUES, inspect_headers
from .checks.issues import (
    ESCAPE,
    Issue,
    config_issues,
    crowd_issues,
    entry_issues,
    metadata_roots,
    name_of,
    object_counts,
    path_issues,
    voc_issues,
)
from .checks.keypoints import keypoint_issues
from .checks.voc_folder import VOCFolder
from .checks.yolo_folder import read_data_yaml
from .cityscapes import check_ground_truth
from .class_order import class_issues, in_one_order, indices_by_name, relabelled
from .detection_file import DetectionFile, detection_file
from .normalise import GROUPS, leave_out_groups
from .registration import OwnFiles, OwnSet, is_own_set, own_files, own_set

logger = logging.getLogger(__name__)

_LISTED = ("coco", "coco_panoptic_seg", "kitti", "lvis", "pascal_voc")  # a file lists the images
_CITYSCAPES = ("cityscapes_instance", "cityscapes_sem_seg")
_SEMANTIC = (PanopticFPN, SemanticSegmentor)
# Key of the dataset dicts that has the labels, name of the labels, and architectures that need them
_TRAINED_ON = (
    ("annotations", "objects", (GeneralizedRCNN, DenseDetector, ProposalNetwork)),
    ("sem_seg_file_name", "semantic labels", _SEMANTIC),
)
MORE_PREDICTED = "more classes predicted than known"
_DECODED = 8  # number of images whose semantic labels are decoded before a training
_SAMPLE = 100  # number of images of which one must exist, if bad images are dropped


def class_names(cfg: CfgNode, semantic: bool = False) -> tuple[str, ...] | None:
    """Return the class names of the first training set, or None if they are unknown.

    Args:
        cfg: config of the student or of the teacher.
        semantic: return the names of semantic classes instead of those with instances.
    """
    if not cfg.DATASETS.TRAIN:
        return None
    name, key = cfg.DATASETS.TRAIN[0], "stuff_classes" if semantic else "thing_classes"
    own = own_set(cfg, name)
    if own and own.classes:
        return own.classes if own.semantic == semantic else None
    registered = name in DatasetCatalog.list()
    metadata = MetadataCatalog.get(name) if registered else None
    if own and (metadata is None or metadata.get("json_file") != own.places[0]):
        # It is a teacher's data set, or that of an earlier training, which is not registered here.
        return _names_in_file(own, cfg.DATASETS.KEEP_GROUP_CATEGORIES)
    if metadata is None:
        return None
    if metadata.get(key) is None and metadata.get("evaluator_type") == "coco":
        load_dicts(name)  # the annotation file has the names
    names = metadata.get(key)
    return tuple(names) if names else None


def _names_in_file(own: OwnSet, keep_groups: bool) -> tuple[str, ...] | None:
    """Return the class names of a data set that is not registered, or None if it is unreadable."""
    path = own.places[0]
    try:
        if own.key == "YOLO_FORMAT":
            return read_data_yaml(path).names
        return _read_names(path, keep_groups, os.stat(path).st_mtime_ns)
    except (OSError, ValueError):
        return None


@cache
def _read_names(annotations: str, keep_groups: bool, changed: int) -> tuple[str, ...] | None:
    """Read the category names in detectron2's order, by id, or None if they cannot be read.

    A file is read once, as several test sets need the names of the training.
    """
    content = CocoFile(annotations, "").content
    try:
        if not keep_groups:
            leave_out_groups(content)
        return tuple(c["name"] for c in sorted(content["categories"], key=lambda c: c["id"]))
    except (KeyError, TypeError):
        return None


def model_classes(cfg: CfgNode) -> tuple[str, ...] | None:
    """Return the class names of the model's outputs, or None if they are unknown.

    They are those of the first training set. If the config describes that data set, the model may
    have fewer or more classes. Otherwise another number means that the names are not its
    own: the config of an evaluation may still have the training set of its ``_BASE_``.
    """
    _, predicted = number_of_classes(cfg)
    try:
        names = class_names(cfg)
    except DataError:  # an evaluation does not need the training set
        return None
    if names is None or predicted is None:
        return None
    own = is_own_set(cfg, cfg.DATASETS.TRAIN[0])
    return names[:predicted] if own or len(names) == predicted else None


def predicted_classes(cfg: CfgNode, name: str) -> tuple[str, ...]:
    """Return the class names by which a test set's evaluator understands a model's outputs."""
    known = model_classes(cfg) if is_own_set(cfg, name) else None
    return known or tuple(MetadataCatalog.get(name).get("thing_classes") or ())


def class_indices(cfg: CfgNode, name: str) -> list[int] | None:
    """Return for each class of the model its index in a test set, -1 for one that the set lacks.

    None: the classes of the test set are those of the model, or these are unknown.
    """
    known, own = predicted_classes(cfg, name), tuple(MetadataCatalog.get(name).thing_classes)
    if known == own:
        return None
    nameless = (number_of_classes(cfg)[1] or 0) - len(known)
    return [*indices_by_name(known, own), *[-1] * nameless]


def in_model_order(cfg: CfgNode, name: str, dicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return dataset dicts with the class indices of the model, without objects of other classes.

    Args:
        cfg: the whole config.
        name: name of the data set.
        dicts: its dataset dicts, with its own class indices.
    """
    known, own = predicted_classes(cfg, name), MetadataCatalog.get(name).get("thing_classes") or ()
    return dicts if known == tuple(own) else relabelled(dicts, indices_by_name(own, known))


def load_dicts(name: str, files: OwnFiles | None = None) -> list[dict[str, Any]]:
    """Return the dataset dicts of a data set; every error of its reader becomes a DataError.

    Args:
        name: name of the data set.
        files: its files if the config describes it and they have been read.
    """
    try:
        return files.dataset_dicts(name) if files else DatasetCatalog.get(name)
    except DataError:
        raise
    except ModuleNotFoundError as e:
        raise DataError(
            f"Data set '{name}' needs the package {e.name}, which is not installed; run "
            f"`pip install --no-deps {e.name}`."
        ) from e
    except Exception as e:
        path, reason = MetadataCatalog.get(name).get("json_file"), f"{type(e).__name__} {clause(e)}"
        if issue := _reason(name):
            path, reason = (path or issue.where), issue.detail
        raise DataError(
            f"Data set '{name}' cannot be read from {path or 'its files'}: {reason}."
        ) from e


def _reason(name: str) -> Issue | None:
    """Return the first issue for which detectron2 cannot read a data set; None if unknown."""
    metadata = MetadataCatalog.get(name)
    files = own_files(name)
    if files is None and metadata.get("json_file"):
        files = CocoFile(metadata.json_file, metadata.get("image_root") or "")
    elif files is None and metadata.get("dirname") and metadata.get("split"):
        files = VOCFolder(metadata.dirname, metadata.split, metadata.get("thing_classes") or ())
    issues = files.issues(masks=False) if files else ()
    voc = isinstance(files, VOCFolder)  # detectron2's reader needs all annotations of VOC
    return next((x for x in issues if _unavoidable(x) or (voc and x.fatal)), None)


def load_training_set(cfg: CfgNode) -> list[dict[str, Any]]:
    """Return the dataset dicts of :func:`load_training_sets` in one list."""
    return [entry for _, dicts in load_training_sets(cfg) for entry in dicts]


def load_training_sets(cfg: CfgNode) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the dataset dicts of all training sets, without fatal issues.

    Returns:
        Names and dicts of the data sets, in the order of ``DATASETS.TRAIN``.

    Raises:
        DataError: a data set is unreadable, empty or does not fit the config; or a path leads out
            of its folder. Different classes of the data sets, no object but crowds, and a missing
            first image are errors too. A wrong annotation is an error if
            ``DATALOADER.ON_BAD_IMAGE`` is stop. So are detections of unknown images or classes in
            ``MODEL.DISTILL.TEACHER.DETECTIONS``.
    """
    names, detections = tuple(cfg.DATASETS.TRAIN), detection_file(cfg)
    sets = [(name, _checked_set(cfg, name, detections)) for name in names]
    if detections:
        detections.check_complete()
    dicts = [image for _, images in sets for image in images]
    if not any("annotations" in image for image in dicts):
        return sets
    if not all("annotations" in image for image in dicts):
        raise DataError(f"DATASETS.TRAIN {names} mixes sets with and without instances.")
    sets = in_one_order(sets)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        sets = [(name, filter_images_with_only_crowd_annotations(x)) for name, x in sets]
    if cfg.MODEL.KEYPOINT_ON:
        for name in names:
            _raise_first(name, _other_keypoints(cfg, name))
        sets = _with_keypoints(sets, cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE)
    dicts = [image for _, images in sets for image in images]
    if not dicts:
        raise DataError(
            f"No image of DATASETS.TRAIN {names} has an annotation; set "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train on images without annotations."
        )
    classes = [MetadataCatalog.get(name).get("thing_classes") for name in names]
    if all(classes):
        print_instances_class_histogram(dicts, classes[0])
    return sets


def _other_keypoints(cfg: CfgNode, name: str) -> Iterator[Issue]:
    """Yield an issue if the keypoints of a data set are not those of the first training set."""
    first = next(iter(cfg.DATASETS.TRAIN), name)
    own, known = (tuple(MetadataCatalog.get(x).get("keypoint_names") or ()) for x in (name, first))
    if own and known and own != known:
        detail = (
            f"it has the keypoints {quoted(own)}, unlike DATASETS.TRAIN '{first}', "
            f"{quoted(known)}; name the same in the same order"
        )
        yield Issue("other keypoints", name, detail, True)


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


def _checked_set(cfg: CfgNode, name: str, detections: DetectionFile | None) -> list[dict[str, Any]]:
    # The files of detectron2's own data sets are not checked: they are large and correct.
    files = own_files(name) if is_own_set(cfg, name) else None
    fatal = [issue for issue in _issues_on_disk(cfg, name, files) if issue.fatal]
    if any(map(_unavoidable, fatal)):
        raise _error(name, [issue for issue in fatal if _unavoidable(issue)])
    dicts = load_dicts(name, files)
    if not dicts:
        raise DataError(f"Data set '{name}' of DATASETS.TRAIN has no images.")
    if detections:  # before images are left out, which the file may name
        dicts = detections.attached(name, dicts, class_names(cfg) or ())
    if files:
        _log_remarks(name, files.remarks)
    fatal += [x for x in _issues_as_read(cfg, name, dicts, files is not None) if x.fatal]
    if files and _is_semantic(name):
        fatal += _header_issues(name, dicts)
    drop = cfg.DATALOADER.ON_BAD_IMAGE == "drop"
    if drop and not any(map(_unavoidable, fatal)):
        dicts = _drop_images(name, dicts, fatal)
    elif fatal:
        raise _error(name, fatal)
    # One image is enough to detect a wrong folder; a check of all images would take long.
    if not any(PathManager.isfile(x["file_name"]) for x in dicts[: _SAMPLE if drop else 1]):
        first = dicts[0]["file_name"]
        windows = ", or file_name, whose backslashes are no separators here" * ("\\" in first)
        raise DataError(
            f"There is no image {first}, which data set '{name}' of DATASETS.TRAIN lists; correct "
            f"the image folder{windows}."
        )
    return dicts


def _is_semantic(name: str) -> bool:
    return bool(MetadataCatalog.get(name).get("evaluator_type") == "sem_seg")


def _header_issues(name: str, dicts: Sequence[dict[str, Any]]) -> list[Issue]:
    """Return the issues of all headers; the labels of the first few images are decoded, too."""
    decoded = _with_label_values(name, dicts[:_DECODED])
    return inspect_headers([*decoded, *dicts[_DECODED:]], f"check the images of {name}")


def _with_label_values(name: str, dicts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    metadata = MetadataCatalog.get(name)
    if not metadata.get("own_files") or not _is_semantic(name):
        return [*dicts]
    values = len(metadata.stuff_classes), metadata.ignore_label
    return [{**x, LABEL_VALUES: values} for x in dicts]


def _log_remarks(name: str, issues: Sequence[Issue]) -> None:
    for issue in issues:
        if not issue.fatal:
            logger.warning("Data set '%s': %s", name, issue.detail)


def _unavoidable(issue: Issue) -> bool:
    """Return True for a fatal issue that dropping images does not avoid."""
    return issue.fatal and not issue.image


def _coco_file(name: str) -> CocoFile | None:
    """Read the file of a data set in COCO's format that a program has registered; None for others.

    Its content is not normalised.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
        return None
    return CocoFile(metadata.json_file, metadata.get("image_root") or "")


def _issues_on_disk(cfg: CfgNode, name: str, files: OwnFiles | None) -> Iterator[Issue]:
    """Yield the issues that must be found before detectron2 reads a data set."""
    metadata = MetadataCatalog.get(name)
    if files is None and metadata.get("dirname") and metadata.get("split"):
        yield from voc_issues(metadata.dirname, metadata.split)
    if files:
        yield from files.issues(cfg.MODEL.MASK_ON)
    if isinstance(files, CocoFile):
        if cfg.MODEL.KEYPOINT_ON and files.rules and not files.problem:
            number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
            yield from keypoint_issues(files.content, files.path, number)
        if name in cfg.DATASETS.TRAIN and _has_groups(files):
            yield from _too_many_classes(cfg, name, len(files.content["categories"]), files)
    elif files and _is_semantic(name):
        yield from _semantic_class_issues(cfg, name)


def _has_groups(files: OwnFiles) -> bool:
    """Return True if an annotation file has group categories, which are left out."""
    return any(issue.kind == GROUPS for issue in files.remarks)


def _semantic_class_issues(cfg: CfgNode, name: str) -> Iterator[Issue]:
    """Yield the reasons why the class indices of labels are not those of the model."""
    student, own = student_class(cfg), tuple(MetadataCatalog.get(name).stuff_classes)
    if not issubclass(student, _SEMANTIC):
        if name in cfg.DATASETS.TEST:
            detail = f"it has semantic labels only, which {student.__name__} does not predict"
            yield Issue("no semantic output", name, detail, True)
        return
    predicted = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if predicted != len(own):
        detail = (
            f"it has {len(own)} semantic classes; set MODEL.SEM_SEG_HEAD.NUM_CLASSES, which is "
            f"{predicted}, to their number"
        )
        yield Issue("another number of semantic classes", name, detail, True)
    first = own_set(cfg, next(iter(cfg.DATASETS.TRAIN), name))
    if first and first.semantic and first.classes != own:
        detail = (
            f"its classes are {quoted(own)}, but those of DATASETS.TRAIN '{first.name}' are "
            f"{quoted(first.classes)}; labels are indices, so the order must be the same"
        )
        yield Issue("other semantic classes", name, detail, True)


def _too_many_classes(cfg: CfgNode, name: str, known: int, files: OwnFiles) -> Iterator[Issue]:
    """Yield an issue if the model predicts more classes than the training set has.

    Args:
        cfg: the whole config.
        name: name of a training or test set.
        known: number of classes of the training set.
        files: files of the data set ``name``.
    """
    key, predicted = number_of_classes(cfg)
    if predicted is not None and predicted > known:
        detail = f"{key} is {predicted}, but DATASETS.TRAIN has {known} classes; set it to {known}"
        if _has_groups(files):
            detail += ", or DATASETS.KEEP_GROUP_CATEGORIES True for a model with a group category"
        yield Issue(MORE_PREDICTED, name, detail, True)


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
    if name in cfg.DATASETS.TRAIN and predicted is not None:
        yield from crowd_issues(dicts, name)


def _error(name: str, issues: Sequence[Issue], hint: str = "") -> DataError:
    first = min(issues, key=lambda issue: not _unavoidable(issue))
    more = ""
    if len(issues) > 1:
        more = (
            f" (the first of {len(issues)} issues; `distill check-data --config-file F` shows all)"
        )
    if all(issue.image for issue in issues):
        hint = "; correct it, or set DATALOADER.ON_BAD_IMAGE drop to train without such images"
    where = f", {first.where}" if first.where != name else ""
    return DataError(f"Data set '{name}'{where}: {first.detail}{more}{hint}.")


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
    kind = metadata.get("evaluator_type")
    if kind in _CITYSCAPES:
        if kind == "cityscapes_instance" and not cfg.MODEL.MASK_ON:
            raise DataError(f"Data set '{name}' evaluates masks; set MODEL.MASK_ON True.")
        check_ground_truth(name)
    own = own_files(name)
    if kind not in _LISTED and own is None:
        return
    _raise_first(name, filter(_unavoidable, _issues_on_disk(cfg, name, own)))
    dicts = load_dicts(name, own)
    if not dicts:
        raise DataError(f"Data set '{name}' of DATASETS.TEST has no images.")
    roots = metadata_roots(metadata)
    issues = [issue for entry in dicts for issue in path_issues(entry, roots)]
    issues += _evaluation_issues(cfg, name, dicts, own or _coco_file(name))
    _raise_first(name, issues)
    if kind != "kitti":  # its reader has opened all images
        remedy = "; correct it or leave it out: an evaluation needs all images of DATASETS.TEST"
        _raise_first(name, _header_issues(name, dicts), remedy)
    _log_remarks(name, issues)
    if own and name not in cfg.DATASETS.TRAIN:
        _log_remarks(name, own.remarks)


def _raise_first(name: str, issues: Iterable[Issue], remedy: str = "") -> None:
    """Raise a DataError that names the first fatal issue; an evaluation drops no image."""
    fatal = [issue._replace(image="") for issue in issues if issue.fatal]
    if fatal:
        raise _error(name, fatal, remedy)


def _evaluation_issues(
    cfg: CfgNode, name: str, dicts: Sequence[dict[str, Any]], files: OwnFiles | None
) -> Iterator[Issue]:
    """Yield the issues of a readable data set that would stop or spoil its evaluation."""
    (_, predicted), limit = number_of_classes(cfg), cfg.TEST.DETECTIONS_PER_IMAGE
    more = [number for number in object_counts(dicts) if number > limit]
    if predicted is not None and more:
        detail = (
            f"images with more objects than TEST.DETECTIONS_PER_IMAGE, which is {limit}: "
            f"{len(more)}; set it to {max(more)} or more to find all"
        )
        yield Issue("more objects than detections", name, detail, False)
    if cfg.MODEL.KEYPOINT_ON:
        yield from _other_keypoints(cfg, name)
    if files:
        if not _is_semantic(name):
            yield from _class_issues(cfg, name, files)
        yield from files.evaluation_issues(cfg.MODEL.MASK_ON)


def _class_issues(cfg: CfgNode, name: str, files: OwnFiles) -> Iterator[Issue]:
    """Yield the differences between the classes of the model and those of a test set."""
    own = tuple(MetadataCatalog.get(name).thing_classes)
    known = model_classes(cfg) if is_own_set(cfg, name) else None
    key, predicted = number_of_classes(cfg)
    if known is not None:
        yield from _too_many_classes(cfg, name, len(known), files)
        yield from class_issues(known, own, name)
    elif predicted is not None and predicted > len(own):
        detail = (
            f"{key} is {predicted}, but the data set has {len(own)} classes; correct it, or list "
            "all classes of the training there, in their order"
        )
        yield Issue(MORE_PREDICTED, name, detail, True)


def find_issues(cfg: CfgNode, name: str) -> tuple[list[Issue], list[dict[str, Any]]]:
    """Find all issues of a data set's annotations, including remarks, without raising an error.

    Args:
        cfg: the whole config. Its classes and masks are checked for a set of ``DATASETS.TRAIN``.
        name: name of the registered data set.

    Returns:
        The issues, and the dataset dicts of the images that may be opened, as far as they can be
        read.
    """
    own = own_files(name)
    files = own or _coco_file(name)
    issues = list(_issues_on_disk(cfg, name, files))
    if files is None and issues:  # the reader would open files outside the folder
        return issues, []
    try:
        dicts = load_dicts(name, own)
        reason = "" if dicts else "it has no images"
    except DataError as e:
        dicts, reason = [], str(e).rstrip(".")
    if not dicts:
        if not any(map(_unavoidable, issues)):
            issues.append(Issue("unreadable data set", name, reason, True))
        return issues, files.images() if files else []
    issues += _issues_as_read(cfg, name, dicts, files is not None)
    if name in cfg.DATASETS.TEST:
        issues += _evaluation_issues(cfg, name, dicts, files)
    escaping = {issue.image for issue in issues if issue.kind == ESCAPE}
    good = [entry for entry in dicts if name_of(entry) not in escaping]
    return issues, _with_label_values(name, good)


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
