"""Tiny distillation that can be run, killed and resumed, and checks of its results."""

import hashlib
import json
import random
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from distill.checkpoint.save import PERIODIC, checksum_file
from distill.data.shapes import SceneConfig, write_coco
from tests.support.networks import distill_opts, write_config
from tests.support.processes import start
from tests.support.trainings import differences, trainable_cfg, write_teacher

from .child import Act, Place, nothing, train
from .ledger import Hung

ITERATIONS = 12
CHECKPOINT_PERIOD = 2
KEEP = 3
EVAL_PERIOD = 4
METRIC = "bbox/AP"
LIMIT = 120.0  # seconds after which a process counts as hung; it needs one or two

SESSIONS: set[int] = set()
"""Ids of the children; each child leads a session with the processes that it starts."""


class Child:
    """Process that trains.

    Args:
        argv: arguments of ``train_net.py``.
        output: OUTPUT_DIR as the process sees it.
        log: start of the names of log files: stdout goes to ``<log>.out``, stderr to ``<log>.err``,
            and the steps go to ``<log>.json``.
        place, act, disk: see :func:`.child.train`.
    """

    def __init__(
        self, argv: Sequence[str], output: Path, log: Path, place: Place | None, act: Act, disk: int
    ):
        self.log = log
        out, err, steps = (Path(f"{log}.{suffix}") for suffix in ("out", "err", "json"))
        arguments = (list(argv), output, steps, place, act, disk)
        self.process = start(train, *arguments, out=out, err=err)
        SESSIONS.add(self.pid)

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    def wait(self, seconds: float = LIMIT) -> int:
        """Wait for the end; return the exit code, or the negative number of the killing signal.

        Raises:
            Hung: the process did not end in time.
        """
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise Hung(f"no end after {seconds:.0f} s, {self.log}")
        return self.process.exitcode

    def wait_until(self, path: Path, seconds: float = LIMIT) -> None:
        """Wait for a file, or the end of the process."""
        deadline = time.monotonic() + seconds
        while not path.exists() and self.process.is_alive():
            if time.monotonic() > deadline:
                self.process.kill()
                raise Hung(f"no {path} after {seconds:.0f} s")
            time.sleep(0.005)

    @property
    def out(self) -> str:
        return Path(f"{self.log}.out").read_text()

    @property
    def err(self) -> str:
        return Path(f"{self.log}.err").read_text()

    def sentence(self) -> str:
        """Wait for the end with exit code 2, and return the sentence that says why.

        Raises:
            AssertionError: the process ended in another way.
        """
        code = self.wait()
        assert code == 2, f"exit code {code}: {self.err[-1500:]}"
        assert "Traceback" not in self.out + self.err, self.log
        (line,) = [x for x in self.err.splitlines() if x.startswith("error: ")]
        assert self.err.splitlines()[-1] == line, self.err
        return line

    @property
    def steps(self) -> list[Place]:
        """Steps of the training, for a child that ended without a disturbance."""
        return [tuple(x) for x in json.loads(Path(f"{self.log}.json").read_text())]


class Training:
    """Distillation of a few iterations, with evaluations in between and at the end.

    Args:
        folder: folder for its images, its teacher and its config.
    """

    def __init__(self, folder: Path):
        write_coco(folder, "train", 6, config=SceneConfig(height=64, width=64, min_size=0.25))
        self.annotations = folder / "annotations" / "instances_train.json"
        self.images = folder / "images" / "train"
        self.teacher = folder / "teacher" / "teacher.pth"
        shapes = ("shapes_faults", str(self.annotations), str(self.images))
        opts = [
            *write_teacher(folder / "teacher", "faster", "MODEL.ROI_HEADS.NUM_CLASSES", 8),
            *distill_opts("faster", ["IMA", "ROIKD"]),
            *("SOLVER.MAX_ITER", ITERATIONS, "SOLVER.CHECKPOINT_PERIOD", CHECKPOINT_PERIOD),
            *("SOLVER.KEEP_CHECKPOINTS", KEEP, "DATASETS.TEST", (shapes[0],)),
            *("TEST.EVAL_PERIOD", EVAL_PERIOD, "TEST.BEST_METRIC", METRIC),
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "INPUT.MAX_SIZE_TEST", 64),
        ]
        cfg = trainable_cfg("faster", shapes, folder / "unused", *opts, norm="BN")
        self.config = folder / "config.yaml"
        for cfg.SEED in range(100):  # until every evaluation is the best so far
            write_config(cfg, self.config)
            output = folder / str(cfg.SEED) / "output"
            self.finish(output)
            values = [float(x[METRIC]) for x in metrics(output)[1].values()]
            if values == sorted(set(values)):
                break

    def start(
        self,
        output: Path,
        *opts: Any,
        resume: bool = False,
        place: Place | None = None,
        act: Act = nothing,
        disk: int = 0,
        log: Path | None = None,
    ) -> Child:
        """Start the training in a child process.

        Args:
            output: OUTPUT_DIR.
            opts: KEY VALUE overrides.
            resume: continue a training.
            place, act, disk: see :func:`.child.train`.
            log: start of the names of log files; by default in the parent folder of ``output``.
        """
        argv = ["--config-file", str(self.config), *(["--resume"] if resume else [])]
        argv += ["OUTPUT_DIR", str(output), *map(str, opts)]
        output.parent.mkdir(parents=True, exist_ok=True)
        log = log or output.parent / f"log{sum(1 for _ in output.parent.glob('log*.out'))}"
        return Child(argv, output, log, place, act, disk)

    def finish(self, output: Path, *opts: Any, **kw: Any) -> Child:
        """Run the training to its end.

        Raises:
            AssertionError: the exit code is not 0.
        """
        child = self.start(output, *opts, **kw)
        code = child.wait()
        assert code == 0, f"exit code {code}: {child.err[-1500:]}"
        return child


class Reference:
    """Files of a training without faults, with which others are compared.

    Args:
        training: training that is run twice, once with all checkpoints kept.
        folder: folder for its output.
        opts: KEY VALUE overrides.
    """

    def __init__(self, training: Training, folder: Path, *opts: Any):
        every, output = folder / "every", folder / "output"
        training.finish(every, "SOLVER.KEEP_CHECKPOINTS", 0, *opts)
        self.checkpoints = {path.name: read(path) for path in every.glob("model_*.pth")}
        started = time.monotonic()
        self.steps = training.finish(output, *opts).steps
        self.seconds = time.monotonic() - started
        self.names = names(output)
        self.bytes = sum(size(path) for path in output.glob("model_*"))
        self.metrics = metrics(output)
        self.check_intact(output)

    def check_intact(self, output: Path) -> None:
        """Check that no checkpoint of an interrupted run is damaged or missing.

        Raises:
            AssertionError: a checkpoint is damaged or missing.
        """
        for path in output.glob("model_*.pth"):
            check_sum(path)
            found = read(path)
            if path.name == "model_best.pth":  # equals the checkpoint of an evaluated iteration
                at = self.checkpoints.get(f"model_{found['iteration']:07d}.pth")
                at = at or self.checkpoints["model_final.pth"]
                found, at = found["model"], at["model"]
            else:
                at = self.checkpoints[path.name]
                if path.name == "model_final.pth":  # first written before the last evaluation
                    found, at = without_best(found), without_best(at)
            changed = differences(found, at)
            assert not changed, f"{path.name}: {len(changed)} values such as {changed[0]}"
        present = {int(x[1]) for x in map(PERIODIC.fullmatch, names(output)) if x}
        newest = max(present, default=0)
        needed = [k for k in range(newest + 1) if (k + 1) % CHECKPOINT_PERIOD == 0][-KEEP:]
        assert present >= set(needed), f"{output}: {set(needed) - present} are lost"

    def check_checkpoints(self, output: Path) -> None:
        """Check that a finished run has the checkpoints of an undisturbed run, bit by bit.

        One checksum may be missing, if the kill came after the rename of its file. A few bytes of
        a checksum or of the tag may remain as a temporary file.

        Raises:
            AssertionError: the checkpoints differ.
        """
        rests = {x for x in names(output) if x.endswith(".tmp") and size(output / x) < 100}
        wrong = (names(output) - rests) ^ self.names
        wrong = {x for x in wrong if not x.endswith(".sha256") or x not in self.names}
        assert not wrong, f"{output}: {wrong} are missing or should not be there"
        for name in self.names:
            if name.endswith(".pth"):
                check_sum(output / name)
                changed = differences(read(output / name), self.checkpoints[name])
                assert not changed, f"{name}: {len(changed)} values such as {changed[0]}"

    def check_recovered(self, output: Path, written: Collection[int] = ()) -> None:
        """Check the checkpoints, and that metrics.json has all losses and evaluations.

        Args:
            output: OUTPUT_DIR of a finished run.
            written: iterations whose losses were written before the resume, see :func:`metrics`. A
                run that ends early also writes those of its last iteration.

        Raises:
            AssertionError: checkpoints or metrics differ.
        """
        self.check_checkpoints(output)
        losses, evaluations = self.metrics
        found, expected = metrics(output), (losses.union(written), evaluations)
        assert found == expected, f"metrics {found} instead of {expected}"


# Pattern of a step, and its stage; the first row that matches counts. The kill comes before the
# step.
STAGES = (
    (r"metrics\.json", "while metrics.json is written"),
    (r"^remove model_N", "while old checkpoints are removed"),
    (r"^(open|write) \S+\.pth\.tmp", "inside torch.save"),
    (r"^(fsync|replace) \S+\.pth(\.tmp)?$|^remove", "between torch.save and rename"),
    (r"last_checkpoint|after \S+\.sha256$", "between checksum and last_checkpoint"),
    ("", "between rename and checksum"),
)
WRITES = 5  # number of writes to one file that are killed


def places_by_stage(steps: list[Place]) -> dict[str, dict[str, Place]]:
    """Choose one place of each sort of step, and several of writes, by stage.

    Two steps are of the same sort if they do the same for a checkpoint of the same kind. The kinds
    are periodic, best and final.
    """
    sorts: dict[str, list[Place]] = defaultdict(list)
    checkpoint = last = ""  # checkpoint that is written, and file of the step before
    for place in steps:
        name = re.sub(r"\d{7}", "N", place[1])
        if not name.startswith(("model", "last", "metrics")):
            name = f"folder after {last}"
        checkpoint = name.removesuffix(".pth.tmp") if name.endswith(".pth.tmp") else checkpoint
        sorts[f"{place[0]} {name} ({checkpoint})"].append(place)
        last = name
    found: dict[str, dict[str, Place]] = defaultdict(dict)
    generator = random.Random(0)
    for sort, members in sorts.items():
        step = sort.partition(" (")[0]
        stage = next(stage for pattern, stage in STAGES if re.search(pattern, step))
        number = min(WRITES if sort.startswith("write") else 1, len(members))
        for place in generator.sample(members, number):
            found[stage][f"{sort} {place[1]} {place[2]}"] = place
    return found


def survivors(sessions: Collection[int]) -> list[int]:
    """Return the ids of running processes in the sessions of some children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # if the process has just ended
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":  # a zombie has ended
                found.append(int(path.parent.name))
    return found


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def without_best(checkpoint: Any) -> Any:
    """Return a checkpoint without the best value, which the last evaluation may change."""
    trainer = checkpoint["trainer"]
    hooks = {k: x for k, x in trainer["hooks"].items() if k != "BestCheckpointHook"}
    return {**checkpoint, "trainer": {**trainer, "hooks": hooks}}


def names(output: Path) -> set[str]:
    """Return the names of all files of checkpoints, complete or not."""
    files = [*output.glob("model_*"), *output.glob("last_checkpoint*")]
    return {path.name for path in files}


def size(path: Path) -> int:
    return path.stat().st_size


def check_sum(path: Path) -> None:
    """Check that the checksum, if it exists, is right."""
    file = Path(checksum_file(str(path)))
    if file.exists():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert file.read_text() == f"{digest}  {path.name}\n", path


def metrics(output: Path) -> tuple[set[int], dict[int, Any]]:
    """Return the iterations with a loss in metrics.json, and the evaluations as text."""
    rows = [json.loads(x) for x in (output / "metrics.json").read_text().splitlines()]
    evaluations = {
        x["iteration"]: {k: str(v) for k, v in x.items() if k.startswith("bbox/")}
        for x in rows
        if METRIC in x
    }
    return {x["iteration"] for x in rows if "total_loss" in x}, evaluations


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[tuple[int, Path]]:
    """Mount a file system in memory at ``folder``, without root rights.

    Yields:
        The process that sees it, for :func:`.child.enter`, and its path for other processes.
    """
    folder.mkdir(parents=True)
    mount = f'mount -t tmpfs -o size={megabytes}m tmpfs "$0" && echo mounted && read -r _'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin and holder.stdout
        assert holder.stdout.readline() == "mounted\n"
        try:
            yield holder.pid, Path(f"/proc/{holder.pid}/root{folder}")
        finally:
            holder.stdin.close()
