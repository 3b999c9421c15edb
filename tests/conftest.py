"""Tiny networks and pictures that every test shares."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

import distill  # noqa: F401  registers architectures, backbones and heads
from distill.config import get_distill_cfg, merge_from_list

FAMILIES = ("faster", "mask", "cascade", "panoptic", "retinanet", "semantic")
ARCHITECTURES = {
    "retinanet": "RetinaNet",
    "semantic": "SemanticSegmentor",
    "panoptic": "PanopticFPN",
}
DISTILL_ARCHITECTURES = {
    "retinanet": "DistillRetinaNet",
    "semantic": "DistillSemanticSegmentor",
}
NUM_CLASSES = 3


def tiny_cfg(family: str, *opts: Any, fpn: int = 16, norm: str = "FrozenBN") -> CfgNode:
    """A config of a few thousand parameters for one of :data:`FAMILIES`.

    ``DATASETS.TRAIN`` is empty: nothing is registered, class names are unknown.
    """
    cfg = get_distill_cfg()
    cfg.MODEL.META_ARCHITECTURE = ARCHITECTURES.get(family, "GeneralizedRCNN")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.PIXEL_STD = [57.0, 57.0, 57.0]
    cfg.MODEL.MASK_ON = family in ("mask", "cascade", "panoptic")
    cfg.MODEL.BACKBONE.NAME = "build_shallow_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 10
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = fpn
    levels = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]  # p2 ... p6
    cfg.MODEL.RPN.IN_FEATURES = levels
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 30
    cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads" if family == "cascade" else "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = levels[:4]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 4
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = family == "cascade"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.RETINANET.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.RETINANET.IN_FEATURES = levels
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.SEM_SEG_HEAD.NAME = "SemSegFPNHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = levels[:4]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = NUM_CLASSES + 1
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 8
    cfg.MODEL.SEM_SEG_HEAD.NORM = ""
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.SEED = 0
    merge_from_list(cfg, list(opts))
    return cfg


def tiny_model(
    family: str, *opts: Any, seed: int = 0, training: bool = True, **kw: Any
) -> nn.Module:
    """A plain detectron2 network with random weights and FrozenBN, built from its own seed."""
    torch.manual_seed(seed)
    model = build_model(tiny_cfg(family, *opts, **kw))
    return model.train(training)


def picture(
    seed: int, height: int = 64, width: int = 64, objects: int = 2, semantic: bool = False
) -> dict[str, Any]:
    """One random ``batched_inputs`` entry with boxes, classes and box-shaped masks."""
    g = torch.Generator().manual_seed(seed)
    low = torch.rand((objects, 2), generator=g) * torch.tensor([width * 0.5, height * 0.5])
    size = 8 + torch.rand((objects, 2), generator=g) * torch.tensor([width * 0.4, height * 0.4])
    boxes = torch.cat([low, torch.minimum(low + size, torch.tensor([width, height]))], 1)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.randint(NUM_CLASSES, (objects,), generator=g)
    masks = torch.zeros((objects, height, width), dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist()):
        mask[y1:y2, x1:x2] = True
    instances.gt_masks = BitMasks(masks)
    image = torch.randint(0, 256, (3, height, width), generator=g).float()
    entry = {"image": image, "instances": instances, "height": height, "width": width}
    if semantic:
        entry["sem_seg"] = torch.randint(NUM_CLASSES + 1, (height, width), generator=g)
    return entry


@pytest.fixture
def storage() -> Iterator[EventStorage]:
    """detectron2's networks log to the event storage while they train."""
    with EventStorage() as events:
        yield events


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(2)
