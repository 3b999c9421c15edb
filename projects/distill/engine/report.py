"""The report of a run: rewritten at each evaluation, so that a running training can be watched."""

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ..data.datasets import class_indices
from ..errors import DistillError
from ..evaluation.coco_format import AnnotatedSet, open_set
from ..evaluation.own_coco import ResultCollector
from ..modeling.teacher import Teacher
from ..report.detections import FILE, TeacherDetections, spread
from ..report.install import MISSING, installed
from ..report.runs import Row, read_run
from ..structures import NetworkInfo
from ..utils.text import clause
from .hooks import current_scalars
from .teacher_outputs import classes_on, teacher_outputs

logger = logging.getLogger(__name__)

ANALYZED = 200  # test images of an analysis, which then takes seconds also on COCO
TEACHER_IMAGES = 100  # analyzed images on which the teacher detects
BASELINE = "baseline"  # title of its run
Described = tuple[Teacher, NetworkInfo]


class RunReport:
    """Writes the report of a training. A failure is a warning: no training ends because of it.

    Args:
        cfg: the whole config.
        teacher: function that returns the teacher and its description, or None without a teacher
            that detects boxes. The teacher runs once.
    """

    def __init__(self, cfg: CfgNode, teacher: Callable[[], Described | None] = lambda: None):
        self.cfg = cfg
        self.folder = Path(cfg.OUTPUT_DIR)
        self.teacher: Callable[[], Described | None] | None = teacher

    def write(self, newest: tuple[int, Row] | None = None) -> None:
        """Write the page.

        Args:
            newest: an iteration and its scalars that ``metrics.json`` does not have yet.
        """
        try:
            self._write(newest)
        except Exception as e:
            reason = f"{type(e).__name__}: {clause(e)}"
            logger.warning("The report cannot be written (%s); the training goes on", reason)

    def _write(self, newest: tuple[int, Row] | None) -> None:
        from ..report.page import NAME, write_report

        node = self.cfg.REPORT
        runs = [read_run(Path(node.BASELINE), BASELINE)] if node.BASELINE else []
        runs.append(read_run(self.folder, self.folder.resolve().name, newest))
        data, problem = self._data
        if data and self.teacher:
            self._detect(data)
        path = self.folder / NAME
        write_report(path, runs, data, shown=node.IMAGES, most=ANALYZED, problem=problem)
        logger.info("Report: %s", path)

    @cached_property
    def _data(self) -> tuple[AnnotatedSet | None, str]:
        """The test set, or the sentence that says why its detections are not analyzed."""
        if len(self.cfg.DATASETS.TEST) > 1:
            return None, "There are several test sets, and the detections of the last are kept."
        if not (self.folder / FILE).is_file():
            return None, "The evaluation has written no detections in COCO's format."
        try:
            return open_set(self.cfg, self.cfg.DATASETS.TEST[0]), ""
        except DistillError as e:
            return None, str(e)

    def _detect(self, data: AnnotatedSet) -> None:
        """Let the teacher detect in some test images, and keep its detections in a file."""
        found, self.teacher = self.teacher() if self.teacher else None, None
        if found is None:
            return
        (name,), (teacher, info) = self.cfg.DATASETS.TEST, found
        images = spread(sorted(data.truth.imgs), min(TEACHER_IMAGES, ANALYZED))
        entries = [x for x in DatasetCatalog.get(name) if x["image_id"] in {*images}]
        collector = ResultCollector(name, class_indices(self.cfg, name), self.cfg.MODEL.MASK_ON)
        for inputs, outputs in teacher_outputs(
            self.cfg, teacher, classes_on(self.cfg, name, info), entries
        ):
            collector.process(inputs, outputs)
        TeacherDetections(images, collector.evaluate()).write(self.folder)


class ReportHook(HookBase):
    """Writes the report after each evaluation, in the main process.

    Args:
        period: iterations between two evaluations; 0: only at the end.
        report: writes the page.
    """

    def __init__(self, period: int, report: RunReport):
        self.period = period
        self.report = report

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        evaluated = done == self.trainer.max_iter or (self.period and done % self.period == 0)
        if evaluated and comm.is_main_process():
            newest = current_scalars(get_event_storage())
            self.report.write((self.trainer.iter, newest))


def reports(cfg: CfgNode) -> bool:
    """Return whether a training writes a report; if only plotly is missing, log how to get it."""
    wanted = cfg.REPORT.ENABLED and bool(cfg.DATASETS.TEST)
    if wanted and not installed() and comm.is_main_process():
        logger.info("REPORT.ENABLED is True, but there will be no report.html. %s", MISSING)
    return wanted and installed()
