"""Config keys, how they are loaded, and the checks before a start."""

from ..errors import building
from .architecture import distill_architectures, student_architecture, student_class
from .defaults import add_distill_config, get_distill_cfg
from .load import find_config, load_config, merge_from_file, merge_from_list
from .resolve import balance_mode, student_config, teacher_config, unlabeled_per_batch
from .several import OneTeacher, one_per_teacher
from .validate import validate_config

__all__ = [
    "OneTeacher",
    "add_distill_config",
    "balance_mode",
    "building",
    "distill_architectures",
    "find_config",
    "get_distill_cfg",
    "load_config",
    "merge_from_file",
    "merge_from_list",
    "one_per_teacher",
    "student_architecture",
    "student_class",
    "student_config",
    "teacher_config",
    "unlabeled_per_batch",
    "validate_config",
]
