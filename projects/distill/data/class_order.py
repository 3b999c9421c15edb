"""Classes of several data sets, matched by their names."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.data import MetadataCatalog

from ..errors import DataError
from ..utils.text import quoted
from .checks.issues import Issue

logger = logging.getLogger(__name__)

Sets = list[tuple[str, list[dict[str, Any]]]]


def indices_by_name(classes: Sequence[str], others: Sequence[str]) -> list[int]:
    """Return the index in ``others`` of each of the classes, -1 for one that is not there."""
    index = {name: k for k, name in enumerate(others)}
    return [index.get(name, -1) for name in classes]


def _differences(classes: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the classes that a data set lacks, and those that only it has."""
    return [x for x in classes if x not in own], [x for x in own if x not in classes]


def in_one_order(sets: Sets) -> Sets:
    """Return training sets whose class indices are those of the first set.

    Args:
        sets: names and dataset dicts. If the class names of a set are unknown, nothing changes.

    Raises:
        DataError: the sets have different classes.
    """
    classes = [list(MetadataCatalog.get(name).get("thing_classes") or ()) for name, _ in sets]
    if not all(classes):
        return sets
    return [_ordered(sets[0][0], classes[0], *x, own) for x, own in zip(sets, classes)]


def _ordered(
    first: str, classes: list[str], name: str, dicts: list[dict[str, Any]], own: list[str]
) -> tuple[str, list[dict[str, Any]]]:
    if own == classes:
        return name, dicts
    lacking, unknown = _differences(classes, own)
    if lacking or unknown or len(set(own)) < len(own) or len(own) != len(classes):
        parts = [("lacks", lacking), ("also has", unknown)]
        detail = " and ".join(f"{verb} {quoted(x)}" for verb, x in parts if x)
        raise DataError(
            f"DATASETS.TRAIN '{name}' {detail or 'repeats a name'}, unlike '{first}'; list the "
            "same classes in the categories of all training sets."
        )
    logger.warning(
        "DATASETS.TRAIN '%s': its classes have another order than those of '%s' and are matched by "
        "name",
        *(name, first),
    )
    return name, relabelled(dicts, indices_by_name(own, classes))


def relabelled(dicts: list[dict[str, Any]], index: Sequence[int]) -> list[dict[str, Any]]:
    """Return dataset dicts with other class indices.

    Args:
        dicts: dataset dicts with annotations.
        index: the new index of each class; objects of a class with -1 are left out.
    """

    def objects(image: dict[str, Any]) -> list[dict[str, Any]]:
        new = ({**x, "category_id": index[x["category_id"]]} for x in image["annotations"])
        return [x for x in new if x["category_id"] >= 0]

    return [{**image, "annotations": objects(image)} for image in dicts]


def class_issues(classes: Sequence[str], own: Sequence[str], name: str) -> Iterator[Issue]:
    """Yield the differences between the classes of a model and those of a test set.

    Args:
        classes: classes of the model, which are those of ``DATASETS.TRAIN``.
        own: classes of the test set.
        name: name of the test set.
    """
    if list(classes) == list(own):
        return
    if len(set(own)) < len(own) or len(set(classes)) < len(classes):
        detail = (
            "two classes have the same name, so classes cannot be matched by name; rename one in "
            "the categories of this set and of DATASETS.TRAIN"
        )
        yield Issue("classes of one name", name, detail, True)
        return
    lacking, unknown = _differences(classes, own)
    if len(unknown) == len(own):
        detail = (
            f"it has none of the classes of DATASETS.TRAIN, {quoted(classes)}, but "
            f"{quoted(own)}; use the same names in the categories of both"
        )
        yield Issue("no class in common", name, detail, True)
        return
    if unknown:
        detail = (
            f"DATASETS.TRAIN lacks its classes {quoted(unknown)}, so the model never finds them; "
            "train with them, or use the names of DATASETS.TRAIN"
        )
        yield Issue("classes that the training lacks", name, detail, False)
    if lacking:
        detail = (
            f"it lacks the classes {quoted(lacking)} of DATASETS.TRAIN; detections of these "
            "classes are left out, and the others are matched by name"
        )
        yield Issue("classes that the test set lacks", name, detail, False)
    if not (unknown or lacking):
        detail = "its classes have another order than those of DATASETS.TRAIN; they match by name"
        yield Issue("classes in another order", name, detail, False)
