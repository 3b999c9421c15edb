"""Decide if a distillation pays on your data, beyond noise and for equal time.

    distill prove --config-file F --seeds 5 --margin 0.5 [KEY VALUE ...]

Every seed trains four students, from the same weights on the same images in the same order. They
are the student alone, the distilled student, and one that is distilled by a teacher with random
weights. The fourth trains alone by a longer schedule, which takes as much time as the distillation.
The ratio of the step times is measured once, before the first run.

The verdict is GO, NO-GO or INCONCLUSIVE. Its rule is written to --out before the first run. GO
needs a gain above --margin over the student alone, and also over the longer schedule. A false GO
has a chance of at most 2.5 %. With --looks, the command may end after fewer seeds.

The result is one HTML page and one JSON file. Finished runs are reused, and an interrupted one
continues from its checkpoint.

Exit code: 0 for every verdict; 1 if a training failed; 2 after one sentence about a wrong input.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode

from ..config import one_per_teacher, teacher_config
from ..config.detectron2_rules import leaves
from ..config.load import scale_schedule
from ..engine.evaluators import metric_names
from ..errors import ConfigError
from ..heads import teacher_needed
from ..utils.arguments import at_least
from ..utils.io import write_json, write_text
from ..utils.progress import Progress
from .compare_report import Row
from .decision import INCONCLUSIVE, Decision, Rule
from .detections import image_bootstrap, problem, read_detections
from .paired import (
    NetworkPair,
    PairedTrainings,
    add_paired_arguments,
    chosen_metric,
    method_config,
    random_teacher,
    remarks,
    student_alone,
    thawed,
)
from .prove_page import ALONE, EQUAL_TIME, RANDOM, REFERENCES, page
from .step_times import step_seconds
from .verdict import MOST_SEEDS, Gain

FIXED = ("margin", "looks", "seeds", "metric", "error")  # parts of a rule

Gains = dict[str, list[float]]


class Proof(PairedTrainings):
    """Trains the arms of a proof, and writes page and numbers after every run."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, args.first_seed)
        check_independence(self.cfg)
        self.rule = Rule(args.margin, looks(args.looks, args.seeds))
        self.distilled = "+".join(self.cfg.MODEL.DISTILL.HEADS)
        self.teacher = self.own_teacher([self.distilled])
        distilled = method_config(self.cfg, self.distilled, [])
        self.taught = teacher_needed(distilled)
        pair = NetworkPair(self.cfg, taught=self.taught, trained=not self.teacher)
        pair.extra_parameters(distilled)  # which refuses heads that do not work
        known = None if self.cfg.TEST.AUG.ENABLED else metric_names(self.cfg)
        self.metric = known and chosen_metric(args.metric, dict.fromkeys(known))
        self.configs = {ALONE: student_alone(self.cfg), self.distilled: distilled}
        if self.taught:
            self.configs[RANDOM] = self._with_random_teacher(distilled)
        self.times = self._step_times()
        self.configs[EQUAL_TIME] = prolonged(self.configs[ALONE], self.times["ratio"])
        self.rows = {name: Row(name) for name in self.configs}
        self.stages = {
            name: {seed: self.runner.describe(name, seed, cfg) for seed in self.seeds}
            for name, cfg in self.configs.items()
        }
        self.plan = self._plan()
        self.decision: Decision | None = None
        self.details: dict[str, Any] = {}

    def _with_random_teacher(self, distilled: CfgNode) -> CfgNode:
        cfg = thawed(distilled)
        node = cfg.MODEL.DISTILL
        sections = {x["NAME"]: x for x in node.TEACHERS}
        for one in one_per_teacher(distilled):
            if teacher_needed(one.cfg):
                described = list(leaves(teacher_config(one.cfg, trained=False)))
                digest = hashlib.sha256(f"{described}{self.runner.code}".encode()).hexdigest()[:12]
                path = self.out / "stages" / f"{RANDOM}-{digest}.pth"
                random_teacher(path, one.cfg, self.teacher_seed + 1_000)
                sections.get(one.name, node.TEACHER)["WEIGHTS"] = str(path)
        return cfg

    # ---- The time of a step, and the plan.

    def _step_times(self) -> dict[str, Any]:
        """Return seconds of a step by training and their ratio, which are measured only once."""
        timed = self.configs[RANDOM if self.teacher else self.distilled]  # before it is trained
        configs = {ALONE: self.configs[ALONE], self.distilled: timed}
        stages = {k: self.runner.describe(k, self.teacher_seed, x) for k, x in configs.items()}
        if self.teacher:
            stages[self.teacher.name] = self.teacher
        key, path = [x.folder.name for x in stages.values()], self.out / "step_times.json"
        if path.is_file() and (kept := json.loads(path.read_text()))["of"] == key:
            return dict(kept)
        with Progress() as progress:
            cfgs = {name: stage.cfg for name, stage in stages.items()}
            found = step_seconds(cfgs, self.out / "step_times.txt", progress)
        # A distilled step has the student's inside, so a ratio below 1 is noise.
        ratio = round(max(1.0, found[self.distilled] / found[ALONE]), 4)
        times = {"of": key, "seconds": found, "ratio": ratio}
        write_json(path, times)
        return times

    def _plan(self) -> dict[str, Any]:
        """Return what is fixed before the first run."""
        return {
            **self.rule.raw(),
            "seeds": self.seeds,
            "metric": self.metric,
            "rule": self.rule.sentence(self.metric or "the metric of the task"),
            "heads": list(self.cfg.MODEL.DISTILL.HEADS),
            "notes": remarks(self.configs[self.distilled]),
            "iterations": {k: x.SOLVER.MAX_ITER for k, x in self.configs.items()},
            "step_times": self.times,
            "resamples": self.args.resamples,
            "stages": {
                name: [stage.folder.name for stage in stages.values()]
                for name, stages in self.stages.items()
            },
        }

    def _fix_plan(self) -> None:
        """Write the plan before the first run.

        Raises:
            ConfigError: some of its runs were already seen under another rule.
        """
        path = self.out / "prove.json"
        if path.is_file():
            before = json.loads(path.read_text())["plan"]
            finished = {x.parent.name for x in (self.out / "stages").glob("*/result.json")}
            seen = finished & folders(before) & folders(self.plan)
            changed = [key for key in FIXED if before[key] != self.plan[key]]
            if seen and changed:
                key = changed[0]
                raise ConfigError(
                    f"The rule in '{path}' was fixed before its runs: {key} is {before[key]}, not "
                    f"{self.plan[key]}. Keep it, or take new seeds with --first-seed."
                )
        self._write()

    def _print_cost(self) -> None:
        seconds, iterations = self.times["seconds"], self.plan["iterations"]
        # The random teacher costs as much as the trained one.
        per_step = {EQUAL_TIME: seconds[ALONE], RANDOM: seconds[self.distilled], **seconds}
        stages = [stage for stages in self.stages.values() for stage in stages.values()]
        stages += [self.teacher] if self.teacher else []
        left = [x for x in stages if not (x.folder / "result.json").is_file()]
        steps = sum(x.cfg.SOLVER.MAX_ITER for x in left)
        hours = sum(x.cfg.SOLVER.MAX_ITER * per_step[x.name] for x in left) / 3600
        print(self.plan["rule"])
        print(
            f"step: {seconds[ALONE]:.3f} s alone, {seconds[self.distilled]:.3f} s distilled; for "
            f"equal time, the student alone trains {iterations[EQUAL_TIME]:,} iterations instead "
            f"of {iterations[ALONE]:,}"
        )
        print(
            f"cost: {len(left)} trainings, {steps:,} iterations, {hours:.1f} hours of steps, "
            f"evaluations not counted; {len(stages) - len(left)} trainings are finished"
        )

    # ---- The runs.

    def run(self) -> int:
        """Returns the exit code."""
        self._fix_plan()
        self._print_cost()
        if self.teacher:
            self.run_stage(self.teacher)
        for look in self.rule.looks:
            self._train(self.seeds[:look])
            if any(self.rows[x].failures for x in (self.distilled, *REFERENCES)):
                break
            self.decision = self.rule.decide(self._gains(self.distilled, look))
            if self.decision:
                self.details = self._details(self.seeds[: self.decision.seeds])
                break
        self._write()
        self._print_verdict()
        return int(any(row.failures for row in self.rows.values()))

    def _train(self, seeds: Sequence[int]) -> None:
        for seed in seeds:
            for name, row in self.rows.items():
                if seed in row.results or seed in row.failures:
                    continue
                result = self.attempt(row, self.stages[name][seed])
                if result is None:
                    continue
                self.metric = self.metric or chosen_metric(self.args.metric, result)
                if result[self.metric] is None:
                    row.failures[seed] = f"{self.metric} is not defined on the test set."
                self._write()

    def _gains(self, name: str, number: int) -> Gains:
        """Return the gains of an arm over the references, in the order of the first seeds."""
        values = {k: row.values(self.metric or "") for k, row in self.rows.items()}
        seeds = [x for x in self.seeds[:number] if all(x in values[k] for k in (name, *REFERENCES))]
        return {k: [values[name][x] - values[k][x] for x in seeds] for k in REFERENCES}

    # ---- The report.

    def _details(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Return what the detections of the compared arms say beyond the metric."""
        arms = (*REFERENCES, self.distilled)
        stages = {name: [self.stages[name][seed] for seed in seeds] for name in arms}
        metric = self.metric or ""
        reason = problem(self.cfg, metric, [x for arm in stages.values() for x in arm])
        if reason:
            return {"problem": reason}
        with Progress() as progress:
            found = read_detections(self.cfg, metric, stages, progress)
            gains = image_bootstrap(found, self.distilled, self.args.resamples, progress)
        errors = {name: [x.errors for x in arm] for name, arm in found.items()}
        return {"errors": errors, "bootstrap": {k: x._asdict() for k, x in gains.items()}}

    def _control(self) -> dict[str, Any] | None:
        """Return the verdict about the random teacher, as if it were the distillation."""
        if not (self.taught and self.decision) or self.rows[RANDOM].failures:
            return None
        gains = self._gains(RANDOM, self.decision.seeds)
        found = self.rule.decide(gains)
        return {"verdict": found.verdict if found else INCONCLUSIVE, "gains": gains}

    def _report(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
        decision = self.decision
        gains = self._gains(self.distilled, decision.seeds if decision else len(self.seeds))
        return {
            "plan": self.plan,
            "metric": self.metric,
            "distilled": self.distilled,
            "verdict": decision.verdict if decision else None,
            "decision": decision._asdict() if decision else None,
            "gains": gains,
            "random_teacher": self._control(),
            "rows": {
                name: {"results": row.results, "failures": row.failures}
                for name, row in self.rows.items()
            },
            "details": self.details,
            **self.facts(),
        }

    def _write(self) -> None:
        report = self._report()
        write_json(self.out / "prove.json", report)
        write_text(self.out / "prove.html", page(report))

    def _print_verdict(self) -> None:
        if not self.decision:
            print("no verdict, because a training failed; start the same command again")
        else:
            for name, values in self._gains(self.distilled, self.decision.seeds).items():
                low, high = self.decision.bounds[name]
                mean = Gain(tuple(values)).mean
                print(f"{self.metric} - {name}: {mean:+.2f} [{low:.2f}, {high:.2f}]")
            print(f"{self.decision.verdict} after {self.decision.seeds} seeds{self._advice()}")
        print(f"wrote {self.out / 'prove.html'} and {self.out / 'prove.json'}")

    def _advice(self) -> str:
        decision = self.decision
        if decision is None or decision.verdict != INCONCLUSIVE:
            return ""
        if decision.fresh_seeds is None:
            return f"; more than {MOST_SEEDS} fresh seeds would decide"
        after = self.args.first_seed + self.args.seeds
        number = decision.fresh_seeds
        return (
            f"; {number} fresh seeds would decide: --seeds {number} --first-seed {after} and the "
            "same arguments"
        )


def folders(plan: Mapping[str, Any]) -> set[str]:
    return {x for found in plan["stages"].values() for x in found}


def prolonged(cfg: CfgNode, factor: float) -> CfgNode:
    """Return ``cfg`` with a schedule of its own that is ``factor`` times as long."""
    longer = thawed(cfg)
    solver = longer.SOLVER
    solver.MAX_ITER, steps = scale_schedule(solver.MAX_ITER, solver.STEPS, factor)
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":  # others ignore the steps
        solver.STEPS = steps
    solver.WARMUP_ITERS = round(factor * solver.WARMUP_ITERS)
    return longer


def check_independence(cfg: CfgNode) -> None:
    """Refuse what makes runs of different seeds alike, or hides the cost of the teacher.

    Raises:
        ConfigError: they would share their data, or the teacher's maps.
    """
    if cfg.DATALOADER.SEED >= 0:
        raise ConfigError(
            f"DATALOADER.SEED is {cfg.DATALOADER.SEED}, but the seeds of a proof must see images "
            "in different orders; set it to -1."
        )
    if any(one.cfg.MODEL.DISTILL.TEACHER.CACHE.DIR for one in one_per_teacher(cfg)):
        raise ConfigError(
            "MODEL.DISTILL.TEACHER.CACHE.DIR is set, but a proof counts the time of the teacher; "
            "empty it."
        )


def looks(early: Sequence[int], seeds: int) -> tuple[int, ...]:
    """Return the rising numbers of seeds at which a proof may end.

    Raises:
        ConfigError: there are fewer seeds.
    """
    if early and max(early) > seeds:
        raise ConfigError(f"--looks has {max(early)}, but --seeds is {seeds}; lower the look.")
    return tuple(sorted({*early, seeds}))


# ---- The command line.


def whole_numbers(text: str) -> list[int]:
    return [at_least(2)(x) for x in text.split(",")]


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_paired_arguments(parser, "output/prove")
    parser.add_argument(
        "--seeds", type=at_least(2), default=5, help="trainings of each student; default: 5"
    )
    parser.add_argument(
        "--first-seed",
        type=at_least(0),
        default=0,
        help="seeds to leave out, because they chose the method or had no verdict; default: 0",
    )
    parser.add_argument(
        "--looks",
        type=whole_numbers,
        default=[],
        metavar="N,N",
        help="numbers of seeds after which the command may end; default: only after all",
    )
    parser.add_argument(
        "--margin",
        type=finite,
        default=0.0,
        help="gain that is worth the effort, in points of the metric; default: 0",
    )
    parser.add_argument(
        "--resamples",
        type=at_least(100),
        default=1000,
        help="resamples of the bootstrap over the test images; default: 1000",
    )


def run(args: argparse.Namespace) -> int:
    return Proof(args).run()
