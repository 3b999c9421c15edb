"""Rendered scenes of geometric shapes, written in the layouts of COCO, Cityscapes, VOC and KITTI.

Each writer renders one split, and several splits may have the same root. The files are collected in
a temporary folder and moved at the end, so that an interrupted call leaves no complete split. A
split that exists is kept if it was written with the same settings. Otherwise a
:class:`FileExistsError` is raised, unless ``overwrite=True``.
"""

from .cityscapes import CITYSCAPES_STUFF, CITYSCAPES_THINGS, write_cityscapes
from .coco import write_coco
from .common import SplitWriter
from .kitti import KITTI_CLASSES, KITTI_FOLD, write_kitti
from .scenes import (
    CLASSES,
    SCENES_VERSION,
    STUFF_CLASSES,
    Scene,
    SceneConfig,
    iter_scenes,
    make_scene,
    mask_to_box,
)
from .voc import VOC_NAMES, write_voc

LAYOUTS: dict[str, SplitWriter] = {
    "coco": write_coco,
    "cityscapes": write_cityscapes,
    "voc": write_voc,
    "kitti": write_kitti,
}

__all__ = [
    "CITYSCAPES_STUFF",
    "CITYSCAPES_THINGS",
    "CLASSES",
    "KITTI_CLASSES",
    "KITTI_FOLD",
    "LAYOUTS",
    "SCENES_VERSION",
    "STUFF_CLASSES",
    "VOC_NAMES",
    "Scene",
    "SceneConfig",
    "SplitWriter",
    "iter_scenes",
    "make_scene",
    "mask_to_box",
    "write_cityscapes",
    "write_coco",
    "write_kitti",
    "write_voc",
]
