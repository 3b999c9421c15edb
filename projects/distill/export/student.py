"""The student in the folder of a training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from PIL import Image

from ..config.student import get_student_cfg
from ..engine import load_student, setup_config
from ..engine.evaluators import check_test_sets
from ..errors import ConfigError
from .parity import network_pixels, reference
from .runner import Prediction
from .writer import network_info

Predict = Callable[[Image.Image], Prediction]

CONFIG, TRAINED = "student.yaml", "config.yaml"  # files of a training


def student_cfg(folder: Path, device: str = "cpu") -> CfgNode:
    """Return the config of the student in a folder, for a device.

    Raises:
        ConfigError: if the folder is not one of a training.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"'{folder}' has no {CONFIG}; name the OUTPUT_DIR of a training.")
    cfg = get_student_cfg(str(folder / CONFIG))
    cfg.MODEL.DEVICE = device
    return cfg


def student_predictor(folder: Path) -> tuple[Predict, list[str], list[str]]:
    """Return a function that predicts with the student in a folder.

    The names of its classes of objects, and of those of pixels, follow.
    """
    cfg = student_cfg(folder, "cuda" if torch.cuda.is_available() else "cpu")
    model = load_student(cfg, cfg.MODEL.WEIGHTS).eval()
    info = network_info(cfg, model, None)

    def predict(image: Image.Image) -> Prediction:
        return reference(model, network_pixels(image, info), (image.height, image.width), info)

    return predict, info["thing_classes"], info["stuff_classes"]


def test_cfg(folder: Path, opts: Sequence[Any] = ()) -> CfgNode:
    """Return the config of the training in a folder, whose test sets are registered.

    Args:
        folder: OUTPUT_DIR of the training.
        opts: KEY VALUE overrides.

    Raises:
        ConfigError: if there is no test set.
    """
    config = next(x for x in (folder / TRAINED, folder / CONFIG) if x.is_file())
    cfg = setup_config(str(config), [*opts, "MODEL.DEVICE", "cpu"], training=False)
    if not cfg.DATASETS.TEST:
        raise ConfigError(f"DATASETS.TEST of '{config}' is empty; name images by --image-folder.")
    check_test_sets(cfg)
    return cfg
