"""Folder of images without labels."""

from collections.abc import Iterator
from typing import Any

from .images import images_below
from .issues import Issue


class ImageFolder:
    """Images of a folder and of the folders below it.

    Args:
        folder: the folder.

    Attributes:
        remarks: always empty, since there are no annotations.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.remarks: list[Issue] = []
        self.paths = images_below(folder)

    def issues(self, masks: bool = True) -> Iterator[Issue]:
        if not self.paths:
            yield Issue("no image", self.folder, "it has no images", True)

    def evaluation_issues(self, masks: bool = True) -> Iterator[Issue]:
        yield Issue("no labels", self.folder, "its images have no labels to compare with", True)

    def dataset_dicts(self, name: str) -> list[dict[str, Any]]:
        return self.images()

    def images(self) -> list[dict[str, Any]]:
        return [{"file_name": path} for path in self.paths]
