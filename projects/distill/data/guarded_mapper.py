"""Mapper that returns a reason instead of raising an error for a bad image."""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

from ..utils.text import clause
from .checks.images import file_issues, header_issues
from .checks.issues import Issue, config_issues, entry_issues, name_of

# Types of errors that transforms raise for an image whose size or content they cannot handle. A bug
# of the mapper mostly raises others: AttributeError, NameError, TypeError, KeyError.
_UNFIT = (OSError, ValueError, AssertionError, ArithmeticError, MemoryError, RuntimeError)


class BadImage(NamedTuple):
    """Replacement in a batch for an image that cannot be used.

    Attributes:
        file_name: path of the image.
        reason: one clause without newline.
    """

    file_name: str
    reason: str


class GuardedMapper:
    """Mapper that returns a :class:`BadImage` if a file or an annotation is wrong.

    If the mapper raises an error, the files and annotations are checked for the reason. Without a
    fatal issue, errors that augmentations raise for unusual images become the reason. All other
    errors are bugs and are raised again.

    Args:
        mapper: a mapper with detectron2's contract.
    """

    def __init__(self, mapper: Callable[..., Any]):
        self.mapper = mapper

    def __call__(self, entry: dict[str, Any], *more: Any) -> Any:
        """Map detectron2's dataset dict, or return a :class:`BadImage`.

        Args:
            entry: the dataset dict.
            more: further arguments of the mapper.
        """
        # The headers come before the mapper, which would wait for a pipe and clip 16 bits to white.
        issue = next(header_issues(entry), None)
        if issue:
            return BadImage(name_of(entry), _reason(issue))
        try:
            mapped = self.mapper(entry, *more)
        except Exception as e:
            reason = self._find_reason(entry, e)
            if reason is None:
                raise
        else:
            reason = _output_problem(mapped)
        return BadImage(name_of(entry), reason) if reason else mapped

    def _find_reason(self, entry: dict[str, Any], error: Exception) -> str | None:
        masks = getattr(self.mapper, "use_instance_mask", False)
        mask_format = self.mapper.instance_mask_format if masks else ""  # type: ignore[attr-defined]
        for issue in chain(
            file_issues(entry),
            entry_issues(entry, masks=masks),
            config_issues(entry, mask_format=mask_format),
        ):
            if issue.fatal:
                return _reason(issue)
        if isinstance(error, _UNFIT):
            return f"the mapper cannot handle it ({type(error).__name__}: {clause(error)})"
        return None


def _reason(issue: Issue) -> str:
    place = issue.where.removeprefix(issue.image).strip(" ()")
    return f"{issue.detail} ({place})" if place else issue.detail


def _output_problem(mapped: Any) -> str | None:
    """Return the problem of a mapped image, or None."""
    if not isinstance(mapped, Mapping):
        return None
    arrays = [mapped[key] for key in ("image", "sem_seg") if key in mapped]
    sizes = {tuple(x.shape[-2:]) for x in arrays if hasattr(x, "shape")}
    if any(0 in size for size in sizes):
        return "the augmentations leave no pixel of it"
    return f"image and semantic labels differ in size: {sizes}" if len(sizes) > 1 else None
