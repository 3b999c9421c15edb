"""Images of ``DATASETS.UNLABELED``, whose annotations are never read."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..errors import DataError
from ..utils.text import shortened
from .checks.issues import name_of
from .datasets import load_dicts
from .registration import own_files

logger = logging.getLogger(__name__)

_KEPT = ("file_name", "image_id", "height", "width")  # keys of dataset dicts that are no labels


def load_unlabeled(
    cfg: CfgNode, labeled: Sequence[tuple[str, Sequence[dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """Return dataset dicts of the images of all sets in ``DATASETS.UNLABELED``, without labels.

    Args:
        cfg: the whole config.
        labeled: names and dataset dicts of the training sets; a warning names the images that have
            the file name of one of these.

    Raises:
        DataError: a data set is unreadable or empty, or its first image is missing.
    """
    sets = [(name, unlabeled_images(name)) for name in cfg.DATASETS.UNLABELED]
    known = {_base_name(x) for _, dicts in labeled for x in dicts}
    for name, dicts in sets:
        if not PathManager.isfile(dicts[0]["file_name"]):
            raise DataError(
                f"There is no image {dicts[0]['file_name']}, which data set '{name}' of "
                "DATASETS.UNLABELED lists; correct the image folder."
            )
        shared = sorted({_base_name(x) for x in dicts} & known)
        if shared:
            logger.warning(
                "Data set '%s' of DATASETS.UNLABELED has %d file names of labelled images: %s. "
                "Remove them if they are the same images",
                *(name, len(shared), shortened(shared, 3)),
            )
    return [x for _, dicts in sets for x in dicts]


def unlabeled_images(name: str) -> list[dict[str, Any]]:
    """Return the images of a registered data set as dataset dicts without objects.

    Raises:
        DataError: they cannot be read, or there are no images.
    """
    files = own_files(name)
    dicts = files.images() if files else load_dicts(name)
    if not dicts:
        issues = files.issues(False) if files else ()
        reason = next((x.detail for x in issues if x.fatal), "it has no images")
        raise DataError(f"Data set '{name}' of DATASETS.UNLABELED: {reason}.")
    return [{k: x[k] for k in _KEPT if k in x} | {"annotations": []} for x in dicts]


def images_digest(dicts: Iterable[dict[str, Any]]) -> str:
    """Return a hash of the images' names in their order, the same wherever the folders are."""
    names = "\0".join(map(_base_name, dicts))
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()


def _base_name(entry: dict[str, Any]) -> str:
    return PurePath(name_of(entry)).name
