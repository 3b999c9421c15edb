"""Test that a run names files that vanish, and continues when they are back."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .child import Place, hide, kill, unhide
from .ledger import Ledger
from .runs import ITERATIONS, Child, Reference, Training, metrics

FIRST: Place = ("open", "model_0000001.pth.tmp", 0)  # places of checkpoints
FOURTH: Place = ("open", "model_0000007.pth.tmp", 0)
LAST: Place = ("open", "model_final.pth.tmp", 0)
WORKERS = (0, 2)


class Copies(NamedTuple):
    """Training with copies of its files, which may vanish."""

    training: Training
    images: list[Path]
    annotations: Path
    teacher: Path
    opts: tuple[Any, ...]

    def start(self, output: Path, *opts: Any, **kw: Any) -> Child:
        return self.training.start(output, *self.opts, *opts, **kw)

    def finish(self, output: Path, *opts: Any, **kw: Any) -> Child:
        return self.training.finish(output, *self.opts, *opts, **kw)


def copies(training: Training, folder: Path) -> Copies:
    """Copy all files that a training reads."""
    images, annotations = folder / "images", folder / "annotations.json"
    shutil.copytree(training.images, images)
    shutil.copy(training.annotations, annotations)
    shutil.copy(training.teacher, folder / "teacher.pth")
    sets = [("shapes_faults", str(annotations), str(images))]
    opts = ("DATASETS.COCO_FORMAT", sets)
    opts += ("MODEL.DISTILL.TEACHER.WEIGHTS", folder / "teacher.pth")
    return Copies(training, sorted(images.iterdir()), annotations, folder / "teacher.pth", opts)


def test_image_that_is_needed(
    training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    def case(workers: int, image: int, folder: Path) -> None:
        run, output = copies(training, folder), folder / "output"
        path, opts = run.images[image], ("DATALOADER.NUM_WORKERS", workers)
        sentence = run.start(output, *opts, place=FIRST, act=partial(hide, path)).sentence()
        assert str(path) in sentence
        reference.check_intact(output)
        if image != 0:  # without the first image a run does not start
            assert str(path) in run.start(output, *opts, resume=True).sentence()
        unhide(path)
        run.finish(output, *opts, resume=True)
        reference.check_recovered(output)

    cases = {
        f"{workers} workers, image {image}": partial(case, workers, image)
        for workers in WORKERS
        for image in (0, 2, 5)
    }
    ledger.inject("an image vanishes, ON_BAD_IMAGE stop", cases, tmp_path)


def test_image_of_the_last_evaluation(
    training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    """The final checkpoint is there, and a resume only evaluates."""

    def case(workers: int, folder: Path) -> None:
        run, output = copies(training, folder), folder / "output"
        opts = ("DATALOADER.NUM_WORKERS", workers)
        act = partial(hide, run.images[2])
        assert str(run.images[2]) in run.start(output, *opts, place=LAST, act=act).sentence()
        reference.check_intact(output)
        written = (output / "model_final.pth").stat().st_mtime_ns
        assert str(run.images[2]) in run.start(output, *opts, resume=True).sentence()
        assert (output / "model_final.pth").stat().st_mtime_ns == written
        unhide(run.images[2])
        run.finish(output, *opts, resume=True)
        reference.check_recovered(output)

    cases = {f"{workers} workers": partial(case, workers) for workers in WORKERS}
    ledger.inject("the last evaluation fails", cases, tmp_path)


DROP = ("DATALOADER.ON_BAD_IMAGE", "drop", "DATASETS.TEST", "()", "TEST.BEST_METRIC", "")


def test_image_that_is_dropped(training: Training, ledger: Ledger, tmp_path: Path) -> None:
    """The run reports the image and continues without it, also after a kill."""
    run = copies(training, tmp_path)
    hide(run.images[3])
    without = Reference(training, tmp_path / "reference", *run.opts, *DROP)

    def vanishes(workers: int, folder: Path) -> None:
        run = copies(training, folder)
        opts = (*DROP, "DATALOADER.NUM_WORKERS", workers)
        act = partial(hide, run.images[3])
        child = run.finish(folder / "output", *opts, place=FIRST, act=act)
        assert child.out.count(f"Dropped {run.images[3]}") == 1
        assert '"data/left_out": 1' in (folder / "output" / "metrics.json").read_text()

    def killed(workers: int, folder: Path) -> None:
        output, opts = folder / "output", (*DROP, "DATALOADER.NUM_WORKERS", workers)
        assert run.start(output, *opts, place=FOURTH, act=kill).wait() == -9
        without.check_intact(output)
        run.finish(output, *opts, resume=True)
        without.check_recovered(output)

    cases = {f"{x} workers, vanishes": partial(vanishes, x) for x in WORKERS}
    cases |= {f"{x} workers, is missing, kill": partial(killed, x) for x in WORKERS}
    ledger.inject("an image vanishes, ON_BAD_IMAGE drop", cases, tmp_path)


def interrupted(run: Copies, reference: Reference, output: Path) -> None:
    """Kill a run after its third checkpoint."""
    assert run.start(output, place=FOURTH, act=kill).wait() == -9
    reference.check_intact(output)


def test_inputs_before_a_resume(
    training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    def case(choose: Callable[[Copies], Path], folder: Path) -> None:
        run, output = copies(training, folder), folder / "output"
        interrupted(run, reference, output)
        path = choose(run)
        hide(path)
        assert str(path) in run.start(output, resume=True).sentence()
        unhide(path)
        run.finish(output, resume=True)
        reference.check_recovered(output)

    cases = {
        "annotations": partial(case, lambda run: run.annotations),
        "folder of the images": partial(case, lambda run: run.images[0].parent),
        "teacher": partial(case, lambda run: run.teacher),
    }
    ledger.inject("an input is missing at the resume", cases, tmp_path)


CHANGES: dict[str, tuple[Any, ...]] = {
    "optimizer": ("SOLVER.OPTIMIZER", "ADAMW"),
    "heads": ("MODEL.DISTILL.HEADS", "('IMA',)"),
    "channels": ("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.DISTILL.HEADS", "('IMA', 'ROIKD')"),
    "groups of the decay": ("SOLVER.WEIGHT_DECAY_BIAS", 0.5),
    "batch": ("SOLVER.IMS_PER_BATCH", 4),
    "seed": ("SEED", 77),
}


def test_another_config_at_a_resume(
    training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    """It is refused by name, and the old config continues."""

    def case(opts: tuple[Any, ...], folder: Path) -> None:
        run, output = copies(training, folder), folder / "output"
        interrupted(run, reference, output)
        sentence = run.start(output, *opts, resume=True).sentence()
        assert "--resume: " in sentence and opts[0] in sentence, sentence
        reference.check_intact(output)
        run.finish(output, resume=True)
        reference.check_recovered(output)

    cases = {name: partial(case, opts) for name, opts in CHANGES.items()}
    ledger.inject("another config at the resume", cases, tmp_path)


def test_outputs_before_a_resume(
    training: Training, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    """A resume needs none of these files: it writes them again or appends to them."""

    def case(gone: str, folder: Path) -> None:
        run, output = copies(training, folder), folder / "output"
        interrupted(run, reference, output)
        for path in output.glob(gone):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        run.finish(output, resume=True)
        reference.check_checkpoints(output)
        assert (output / "student.yaml").is_file() and (output / "config.yaml").is_file()
        rows = metrics(output)[0]
        assert max(rows) == ITERATIONS - 1 and rows <= reference.metrics[0]

    names = ("student.yaml", "config.yaml", "metrics.json", "log.txt", "events*", "inference")
    cases = {name: partial(case, name) for name in names}
    ledger.inject("an output is missing at the resume", cases, tmp_path)
