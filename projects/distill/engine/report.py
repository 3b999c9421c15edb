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
from ..report.runs import Row, read_run, run_names
from ..structures import NetworkInfo
from ..utils.text import clause
from .hooks import current_scalars
from .teacher_outputs import classes_on, teacher_outputs

logger = logging.getLogger(__name__)

ANALYZED = 200  # test images of an analysis, which then takes seconds also on COCO
TEACHER_IMAGES = 100  # test images in which the teacher detects
Described = tuple[CfgNode, Teacher, NetworkInfo]
"""Config with a teacher, the teacher, and its description."""


def no_teachers() -> list[Described]:
    """Stand for the teachers of a training without one."""
    return []


class RunReport:
    """Writes the report of a training. A failure is a warning: no training ends because of it.

    Args:
        cfg: the whole config.
        teachers: function that returns the teachers that detect boxes. It is called once.
    """

    def __init__(self, cfg: CfgNode, teachers: Callable[[], list[Described]] = no_teachers):
        self.cfg = cfg
        self.folder = Path(cfg.OUTPUT_DIR)
        self.teachers = teachers

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
        others = [Path(node.BASELINE)] if node.BASELINE else []
        *names, own = run_names([*others, self.folder])
        runs = [read_run(folder, name) for folder, name in zip(others, names)]
        runs.append(read_run(self.folder, own, newest))
        data, problem = self._data
        if data:
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
        """Let the teachers detect in some test images once, and keep the detections in a file.

        A class that several teachers know is detected by the first of them.
        """
        described, self.teachers = self.teachers(), no_teachers
        if not described:
            return
        (name,) = self.cfg.DATASETS.TEST
        images = spread(sorted(data.truth.imgs), TEACHER_IMAGES)
        entries = [x for x in DatasetCatalog.get(name) if x["image_id"] in {*images}]
        collector = ResultCollector(name, class_indices(self.cfg, name), self.cfg.MODEL.MASK_ON)
        known: set[str] = set()
        for cfg, teacher, info in described:
            classes = classes_on(cfg, name, info, known)
            known |= {*info.classes}
            for inputs, outputs in teacher_outputs(cfg, teacher, classes, entries):
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
