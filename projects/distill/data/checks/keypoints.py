"""Keypoints of an annotation file in COCO's format."""

import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from .issues import Issue

_KEY = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
_COLOUR = (102, 204, 255)  # lines in drawings
_SIDES = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}

Content = Mapping[str, Any]


def keypoint_names(content: Content) -> tuple[str, ...]:
    """Return the names of the keypoints; empty if categories have different or wrong ones.

    A category without keypoints may stand next to those that have them.
    """
    lists = list(_by_category(content).values())
    if not lists or any(_problem(x) or x != lists[0] for x in lists):
        return ()
    return tuple(lists[0])


def keypoint_metadata(content: Content) -> dict[str, Any]:
    """Return the metadata by which detectron2 flips and draws keypoints.

    A horizontal flip swaps two keypoints whose names differ only in left and right.
    """
    names = keypoint_names(content)
    other = {x: re.sub("left", lambda m: _SIDES.get(m[0], m[0]), x, flags=re.I) for x in names}
    skeletons = [x.get("skeleton") for x in _with_keypoints(content)]
    return {
        "keypoint_names": names,
        "keypoint_flip_map": tuple((x, y) for x, y in other.items() if x != y and y in names),
        "keypoint_connection_rules": [
            (names[a - 1], names[b - 1], _COLOUR) for a, b in _edges(skeletons[:1], len(names))
        ],
    }


def keypoint_issues(content: Content, path: str, predicted: int) -> Iterator[Issue]:
    """Yield the reasons why a network cannot learn the keypoints of a file, or be evaluated on it.

    Args:
        content: content of the file.
        path: path of the file.
        predicted: number of keypoints that the network predicts.
    """
    by_category = _by_category(content)
    if not by_category:
        detail = (
            "MODEL.KEYPOINT_ON is True, but no category has keypoints; set it to False, or list "
            "their names as 'keypoints' of the categories"
        )
        yield Issue("no keypoints", path, detail, True)
        return
    first = next(iter(by_category))
    for category, names in by_category.items():
        if problem := _problem(names):
            yield Issue("wrong keypoints", path, f"category '{category}' {problem}", True)
        elif names != by_category[first]:
            detail = (
                f"categories '{first}' and '{category}' have different keypoints; a network "
                "predicts the same for all, so name the same, or none"
            )
            yield Issue("different keypoints", path, detail, True)
    number = len(keypoint_names(content))
    if number and number != predicted:
        detail = f"{_KEY} is {predicted}, but its categories have {number} keypoints; set it so"
        yield Issue("another number of keypoints", path, detail, True)
    yield from _wrong_lengths(content, path, number)


def _wrong_lengths(content: Content, path: str, number: int) -> Iterator[Issue]:
    annotations = content.get("annotations")
    for annotation in annotations if number and isinstance(annotations, list) else ():
        points = annotation.get("keypoints") if isinstance(annotation, dict) else None
        if isinstance(points, list) and len(points) != 3 * number:
            detail = (
                f"its keypoints are {len(points)} numbers, not {3 * number}: x, y and visibility "
                f"of {number} keypoints"
            )
            where = f"{path} (annotation {annotation.get('id')!r:.99})"
            yield Issue("wrong keypoints", where, detail, True)


def _with_keypoints(content: Content) -> list[dict[str, Any]]:
    categories = content.get("categories")
    entries = categories if isinstance(categories, list) else []
    return [x for x in entries if isinstance(x, dict) and x.get("keypoints")]


def _by_category(content: Content) -> dict[str, Any]:
    return {f"{x.get('name')!s:.99}": x["keypoints"] for x in _with_keypoints(content)}


def _problem(names: Any) -> str:
    """Return the problem of a category's keypoints, or ""."""
    if not isinstance(names, list) or not all(isinstance(x, str) for x in names):
        return f"has keypoints {reprlib.repr(names)}, which is not a list of names"
    repeated = [x for x in names if names.count(x) > 1]
    return f"has the keypoint '{repeated[0]}' twice; rename one" if repeated else ""


def _edges(skeletons: list[Any], number: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs of a skeleton that are numbers of keypoints, from 1."""
    for skeleton in skeletons:
        for pair in skeleton if isinstance(skeleton, list) else ():
            numbers = isinstance(pair, list) and len(pair) == 2
            if numbers and all(type(x) is int and 0 < x <= number for x in pair):
                yield pair[0], pair[1]
