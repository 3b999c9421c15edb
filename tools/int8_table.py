#!/usr/bin/env python3
"""Compare ways to make an INT8 student by the AP of their INT8 files, with several seeds.

    python tools/int8_table.py --row fine-tuned output/tuned/stages/baseline-*
        --row QAD output/quantized/stages/TID-* --out output/int8_table

A --row has the folders of trainings, in the same order of the seeds. Gains are paired differences
to the first row. A training with SOLVER.QAT has ranges of its own, the others get those of 100
images of their training set. Finished folders are not measured again.

The table is printed, and table.json in --out has all values.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distill.checkpoint.load import read_part
from distill.engine import load_student
from distill.errors import ConfigError
from distill.experiments.summary import mean_std
from distill.experiments.verdict import Gain, verdicts
from distill.export.int8 import Calibration, export_int8
from distill.export.main import evaluate, evenly_spaced, exported_model, set_files
from distill.export.student import student_cfg, test_cfg
from distill.export.writer import Options
from distill.modeling.quantization import METHODS, PART
from distill.utils.io import write_json
from distill.utils.progress import Progress
from distill.utils.provenance import commit, versions

IMAGES = 4  # compared by the export
CALIBRATION = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", nargs="+", action="append", required=True, metavar="NAME DIR")
    parser.add_argument("--metric", default="bbox/AP")
    parser.add_argument("--out", type=Path, default=Path("output/int8_table"))
    args = parser.parse_args()
    rows = {name: [Path(x) for x in folders] for name, *folders in args.row}
    if len({len(folders) for folders in rows.values()}) > 1 or not all(rows.values()):
        raise ConfigError("Each --row needs a name and as many folders as the others.")
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "tools/int8_table.py", *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(),
        "metric": args.metric,
    }
    with Progress() as progress:
        result["rows"] = {
            name: [
                measured(folder, args.metric, args.out / f"{name}-{k}", progress)
                for k, folder in enumerate(folders)
            ]
            for name, folders in rows.items()
        }
    write_json(args.out / "table.json", result)
    Console().print(table(result["rows"], args.metric))


def measured(folder: Path, metric: str, out: Path, progress: Progress) -> dict[str, Any]:
    """Return the metric of a network in float32 and of its INT8 file, and the report of that.

    Args:
        folder: folder of the training.
        metric: name such as "bbox/AP".
        out: path of the INT8 file and of the result, without a suffix.
        progress: display of the stages.
    """
    path, kept = (out.with_name(f"{out.name}.{x}") for x in ("onnx", "json"))
    if kept.is_file() and (row := json.loads(kept.read_text()))["folder"] == str(folder):
        return row
    cfg, test = student_cfg(folder), test_cfg(folder)
    model = load_student(cfg, cfg.MODEL.WEIGHTS).eval()
    calibration = None
    if read_part(cfg.MODEL.WEIGHTS, PART) is None:
        train = test_cfg(folder, ["DATASETS.TEST", tuple(test.DATASETS.TRAIN)])
        calibration = Calibration(evenly_spaced(set_files(train), CALIBRATION), METHODS[0])
    compared = evenly_spaced(set_files(test), IMAGES)
    report = export_int8(cfg, model, path, compared, Options(), calibration, progress)
    networks = {"float": model, "int8": exported_model(path)}
    values = {k: evaluate(test, x, progress, k)[metric] for k, x in networks.items()}
    row = {"folder": str(folder), **values, "report": asdict(report)}
    write_json(kept, row)
    return row


def table(rows: dict[str, list[dict[str, Any]]], metric: str) -> Table:
    """Return the means, and the paired gains of the INT8 files to those of the first row."""
    values = {
        name: {k: [x[k] for x in found] for k in ("float", "int8")} for name, found in rows.items()
    }
    base, *others = values
    gains = {
        name: Gain(tuple(b - a for a, b in zip(values[base]["int8"], values[name]["int8"])))
        for name in others
    }
    words = verdicts(gains)
    found = Table("", f"{metric} float", f"{metric} INT8", "gain of INT8 [95 %]", "verdict")
    for name, x in values.items():
        gain = str(gains[name]) if name in gains else ""
        found.add_row(name, mean_std(x["float"]), mean_std(x["int8"]), gain, words.get(name, ""))
    return found


if __name__ == "__main__":
    main()
