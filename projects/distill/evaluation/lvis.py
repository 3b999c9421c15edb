"""LVIS's evaluation. It needs the package ``lvis``, which is not among the requirements."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
from detectron2.evaluation import lvis_evaluation


class LVISEvaluator(lvis_evaluation.LVISEvaluator):
    """detectron2's evaluator with any version of NumPy.

    The newest ``lvis`` of PyPI, 0.5.3, asks NumPy for ``float``, which NumPy 1.24 removed.
    """

    def evaluate(self) -> Any:
        with _numpy_with_float():
            return super().evaluate()


@contextmanager
def _numpy_with_float() -> Iterator[None]:
    from lvis import eval as evaluation

    evaluation.np = SimpleNamespace(**{**vars(np), "float": float})
    try:
        yield
    finally:
        evaluation.np = np
