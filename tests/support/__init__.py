"""Networks, trainings and processes that the tests of several modules use.

With it, detectron2 starts a run sooner. By default, it looks a key up by writing the whole config
as YAML and reading it again, four times a start. This takes longer than a short training.
"""

from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import defaults


def get_key(cfg: CfgNode, *keys: str, default: Any = None) -> Any:
    """The first key that exists; those of lazy configs have dots."""
    return next((cfg[key] for key in keys if key in cfg), default)


defaults._try_get_key = get_key
