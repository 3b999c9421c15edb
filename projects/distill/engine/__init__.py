"""Training and evaluation: detectron2's trainer for plain and distilled students alike."""

from .launch import main
from .trainer import Trainer, evaluate, setup_config

__all__ = ["Trainer", "evaluate", "main", "setup_config"]
