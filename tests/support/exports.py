"""Students, images and files of the tests of exports."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image
from torch import nn

from distill.export.graphs import build_graph, exportable
from distill.export.parity import Parity, compare
from distill.export.writer import FORMATS, Exported, export_info, keep_outputs, load, write
from tests.support.networks import CLASSES, outspoken_model, tiny_cfg, write_config

PSP = (
    *("MODEL.BACKBONE.NAME", "build_shallow_resnet_backbone"),
    *("MODEL.SEM_SEG_HEAD.NAME", "PSPHead", "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res5"]),
)
ASPP = (*PSP[:2], "MODEL.SEM_SEG_HEAD.NAME", "ASPPHead", *PSP[4:])
SIZES = ((90, 120), (50, 97))  # heights and widths of images
SCORE = 0.01  # networks that are not trained are sure of nothing


def confident(family: str, *opts: Any) -> nn.Module:
    """A network in evaluation mode that detects something."""
    model: Any = outspoken_model(family, *opts).eval()
    if hasattr(model, "test_score_thresh"):
        model.test_score_thresh = min(model.test_score_thresh, SCORE)
    if hasattr(model, "combine_overlap_thresh"):
        model.combine_stuff_area_thresh, model.combine_instances_score_thresh = 20, 0.1
    return model


def scene(seed: int, height: int, width: int) -> Image.Image:
    """An image of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def scenes() -> list[Image.Image]:
    return [scene(k, *size) for k, size in enumerate(SIZES)]


def without_resizing(cfg: CfgNode) -> CfgNode:
    """Let the network see images in their own size, which is small."""
    cfg.INPUT.MIN_SIZE_TEST = 0
    return cfg


def exported(
    model: nn.Module,
    cfg: CfgNode,
    folder: Path,
    form: str = "torchscript",
    size: tuple[int, int] | None = None,
    normalizes: bool = True,
    final: bool = True,
    features: bool = False,
) -> tuple[Exported, Exported]:
    """Export a network; return the file with all outputs, and the one that is kept."""
    copy = exportable(model)
    full, kept = (folder / f"{x}{FORMATS[form]}" for x in ("full", "kept"))
    build = partial(build_graph, copy, normalizes=normalizes, with_features=features)
    chosen = build(with_raw=not final, with_final=final)
    info = export_info(cfg, chosen, size)
    write(build(), info, full, form)
    keep_outputs(chosen, full, kept, form)
    return load(full, 1), load(kept, 1)


def parity_of(model: nn.Module, files: tuple[Exported, Exported], images: Any = None) -> Parity:
    normalizes = files[0].info["preprocessing"] == "inside"
    graph = build_graph(model, normalizes=normalizes, with_final=False)
    return compare(model, graph, *files, scenes() if images is None else images)


def student_folder(family: str, folder: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """Write what a training leaves: student.yaml, model_final.pth and classes.json."""
    folder.mkdir()
    cfg = without_resizing(tiny_cfg(family))
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")
    for node in (cfg.MODEL.RETINANET, cfg.MODEL.ATSS):
        node.SCORE_THRESH_TEST = SCORE
    write_config(cfg, folder / "student.yaml")
    torch.save({"model": outspoken_model(family).state_dict()}, folder / "model_final.pth")
    (folder / "classes.json").write_text(json.dumps({"thing_classes": classes}))
    return folder
