"""Networks of detectron2's LazyConfigs, under the name of a meta-architecture."""

from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.modeling import META_ARCH_REGISTRY

from ..errors import ConfigError


@META_ARCH_REGISTRY.register()
def LazyNetwork(cfg: CfgNode) -> Any:
    """Build the ``model`` of the LazyConfig ``MODEL.LAZY.FILE``.

    Raises:
        ConfigError: the file may not be read, or its network not be built.
    """
    from ..config.lazy import load_lazy  # which needs the networks' config keys

    node = cfg.MODEL.LAZY
    lazy = load_lazy(node.FILE, node.OPTS, allow_code=cfg.MODEL.get("ALLOW_CODE", False))
    try:
        return instantiate(lazy.model)
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"LazyConfig '{node.FILE}' needs the package {e.name}, which is not installed."
        ) from e
