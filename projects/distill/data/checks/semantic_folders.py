"""Folders of images and of their semantic labels, which have the same names."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from .images import IMAGE_SUFFIXES
from .issues import Issue


class SemanticFolders:
    """Folder of images, and folder of PNG files with their class indices.

    Args:
        images: folder of the images.
        labels: folder of the labels; that of ``a.jpg`` is ``a.png``.

    Attributes:
        remarks: a remark for labels without images.
    """

    def __init__(self, images: str, labels: str):
        files = sorted(x for x in os.listdir(images) if Path(x).suffix.lower() in IMAGE_SUFFIXES)
        stems = [Path(x).stem for x in files]
        self._dicts = [
            {
                "file_name": os.path.join(images, file),
                "sem_seg_file_name": os.path.join(labels, f"{stem}.png"),
            }
            for file, stem in zip(files, stems)
        ]
        more = {x for x in os.listdir(labels) if x.endswith(".png")} - {f"{x}.png" for x in stems}
        detail = f"labels without an image: {len(more)} (the first, {min(more, default='')})"
        self.remarks = [Issue("labels without an image", labels, detail, False)] if more else []
        self._found = []
        if not files:
            self._found.append(Issue("no image", images, "it has no images", True))
        count = Counter(stems)
        if double := [x for x, y in zip(files, stems) if count[y] > 1]:
            detail = f"'{double[0]}' and '{double[1]}' have the same labels; rename one"
            self._found.append(Issue("images of one name", images, detail, True))

    def issues(self, masks: bool = True) -> Iterator[Issue]:
        yield from self._found
        yield from self.remarks

    def evaluation_issues(self, masks: bool = True) -> Iterator[Issue]:
        yield from ()

    def dataset_dicts(self, name: str) -> list[dict[str, Any]]:
        """Return detectron2's dataset dicts.

        Args:
            name: name of the data set, for messages.

        Raises:
            DataError: there are no images, or two images have the same labels.
        """
        for issue in self._found:
            raise DataError(f"Data set '{name}', {issue.where}: {issue.detail}.")
        return [dict(x) for x in self._dicts]

    def images(self) -> list[dict[str, Any]]:
        return [{"file_name": x["file_name"]} for x in self._dicts]
