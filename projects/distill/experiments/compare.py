"""Distill one student by many methods, from the same start on the same images, and compare them.

    distill compare --config-file F --heads FitNet FGD MGD FGD+DKD --seeds 3 [KEY VALUE ...]

Every seed trains the student without distillation and with each method. They start from the same
weights and see the same images in the same order, so differences are paired. Each has its 95 %
interval and a verdict, which is corrected for the number of methods. --decide 5 trains methods that
seem worse than the student alone with five fresh seeds, which then decide about them.

Without --heads, every registered head that works for the config's student and teacher takes part.
The config's sections hold the values of the heads; --set changes one for one method.

The result is a table, raw values and a figure in --out. Finished runs are reused, an interrupted
one continues from its checkpoint, and a method that fails is a row with its reason.

Exit code: 0; 1 if a method failed; 2 after one sentence if nothing can be compared.
"""

import argparse
from collections.abc import Sequence

from ..config import get_distill_cfg
from ..errors import ConfigError
from ..heads import DISTILL_HEAD_REGISTRY, teacher_needed
from ..section import check_choice
from ..utils.arguments import at_least
from ..utils.io import write_json, write_text
from .compare_report import MethodTable, Row
from .paired import (
    NetworkPair,
    PairedTrainings,
    add_paired_arguments,
    chosen_metric,
    method_config,
    remarks,
    student_alone,
)


class MethodComparison(PairedTrainings):
    """Trains the methods that the arguments name, and writes the results after every run."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.report = MethodTable(screening=self.seeds)
        self.configs = {self.report.baseline.name: student_alone(self.cfg)}
        self.skipped: dict[str, str] = {}

    def run(self) -> int:
        """Returns the exit code."""
        self._choose()
        self._train(self.report.methods, self.seeds)
        if self.args.decide:
            first = self.seeds[-1] + 1
            self.report.fresh = list(range(first, first + self.args.decide))
            flagged = self.report.flagged()
            names = ", ".join(row.name for row in flagged) or "none"
            print(f"worse than the baseline in the screening: {names}")
            if flagged:
                self._train(flagged, self.report.fresh)
        self.report.print()
        self.report.draw(self.out / "comparison.png")
        print(f"wrote {self.out}/comparison.md, .json and .png")
        return int(any(x.failures for x in (self.report.baseline, *self.report.methods)))

    def _train(self, methods: list[Row], seeds: Sequence[int]) -> None:
        for seed in seeds:
            for row in (self.report.baseline, *methods):
                if seed not in row.failures:
                    stage = self.runner.describe(row.name, seed, self.configs[row.name])
                    result = self.attempt(row, stage)
                    if result and not self.report.metric:
                        self.report.metric = chosen_metric(self.args.metric, result)
                    self._write()

    def _choose(self) -> None:
        """Find the methods that work; then train the teacher if that is asked for."""
        names = self.args.heads or [name for name, _ in DISTILL_HEAD_REGISTRY]
        teacher = self.own_teacher(names)
        for name in names:
            opts = [x for method, *pair in self.args.set if method == name for x in pair]
            self.configs[name] = method_config(self.cfg, name, opts)
        taught = any(teacher_needed(self.configs[name]) for name in names)
        pair = NetworkPair(self.cfg, taught=taught, trained=not teacher)
        refused: dict[str, str] = {}
        for name in names:
            try:
                row = Row(name, pair.extra_parameters(self.configs[name]))
            except ConfigError as e:
                refused[name] = str(e)
            else:
                row.notes = remarks(self.configs[name])
                self.report.methods.append(row)
        reasons = [f"{name}: {why}" for name, why in refused.items()]
        if not self.report.methods:
            raise ConfigError(f"None of the methods works here: {' '.join(reasons)}")
        for sentence in reasons:
            print(f"left out: {sentence}")
        if self.args.heads:
            for name, why in refused.items():
                row = Row(name, failures=dict.fromkeys(self.seeds, why))
                self.report.methods.append(row)
        else:
            self.skipped = refused
        comparable = [self.configs[row.name] for row in self.report.methods if not row.failures]
        if teacher and any(map(teacher_needed, comparable)):
            result = self.run_stage(teacher)
            self.report.teacher = Row(teacher.name, results={teacher.seed: result})
            self.report.metric = chosen_metric(self.args.metric, result)

    def _write(self) -> None:
        left_out = "".join(f"- {name}: {why}\n" for name, why in self.skipped.items())
        note = f"\nLeft out:\n\n{left_out}" if left_out else ""
        write_text(self.out / "comparison.md", self.report.markdown() + note)
        content = {
            "metric": self.report.metric,
            "seeds": self.seeds,
            "fresh_seeds": list(self.report.fresh),
            "rows": self.report.raw(),
            "skipped": self.skipped,
            **self.facts(),
        }
        write_json(self.out / "comparison.json", content)


# ---- The command line.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_paired_arguments(parser, "output/compare")
    parser.add_argument(
        "--heads",
        nargs="+",
        metavar="METHOD",
        default=[],
        help="each a method; A+B: both at once; default: all that work",
    )
    parser.add_argument("--seeds", type=at_least(1), default=1, help="trainings of each method")
    parser.add_argument(
        "--decide",
        type=at_least(2),
        metavar="SEEDS",
        help="further seeds for the methods that seem worse than the student alone. Only these "
        "seeds decide about them",
    )
    parser.add_argument(
        "--set",
        nargs=3,
        action="append",
        default=[],
        metavar=("METHOD", "KEY", "VALUE"),
        help="override for one method; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    split_overrides(args, "heads")
    check_names(args)
    return MethodComparison(args).run()


def split_overrides(args: argparse.Namespace, *options: str) -> None:
    """Move KEY VALUE that stand right after an option's several values to the other overrides."""
    sections = get_distill_cfg()
    for option in options:
        values = getattr(args, option)
        overrides = (k for k, x in enumerate(values) if x.split(".")[0] in sections)
        end = next(overrides, len(values))
        setattr(args, option, list(dict.fromkeys(values[:end])))
        args.opts = values[end:] + args.opts


def check_names(args: argparse.Namespace) -> None:
    registered = [name for name, _ in DISTILL_HEAD_REGISTRY]
    for method in args.heads:
        for head in method.split("+"):
            check_choice("--heads", head, registered)
    for method, *_ in args.set:
        check_choice("--set", method, args.heads or registered)
