"""Training and evaluation with detectron2's trainer, for plain and distilled students."""

from .trainer import Trainer, evaluate, load_student, setup_config

__all__ = ["Trainer", "evaluate", "load_student", "setup_config"]
