"""Training and evaluation with detectron2's trainer, for plain and distilled students."""

from .setup import finish_config, setup_config
from .trainer import Trainer, evaluate, evaluate_finished, load_student

__all__ = [
    "Trainer",
    "evaluate",
    "evaluate_finished",
    "finish_config",
    "load_student",
    "setup_config",
]
