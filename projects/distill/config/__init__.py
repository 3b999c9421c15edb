"""Config keys, how they are loaded, and the checks before a start."""

from .defaults import add_distill_config, get_distill_cfg
from .load import find_config, merge_from_file, merge_from_list
from .resolve import building, distill_architectures, student_class, student_config, teacher_config
from .validate import validate_config

__all__ = [
    "add_distill_config",
    "building",
    "distill_architectures",
    "find_config",
    "get_distill_cfg",
    "merge_from_file",
    "merge_from_list",
    "student_class",
    "student_config",
    "teacher_config",
    "validate_config",
]
