"""Many quick cases in one test."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def for_each(names: str, values: Iterable[Any]) -> Callable[..., Callable[..., None]]:
    """``pytest.mark.parametrize`` in a single test, where pytest would take longer than the cases.

    Args:
        names: arguments of the test, separated by commas.
        values: one per case; tuples if there are several arguments.
    """
    keys, cases = [x.strip() for x in names.split(",")], list(values)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def every(*args: Any, **kwargs: Any) -> None:
            for case in cases:
                own = dict(zip(keys, case if len(keys) > 1 else [case], strict=True))
                try:
                    test(*args, **kwargs, **own)
                except Exception as e:
                    raise AssertionError(f"{own}: {e}") from e

        signature = inspect.signature(test)
        others = [x for name, x in signature.parameters.items() if name not in keys]
        every.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return every

    return decorate
