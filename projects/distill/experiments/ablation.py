"""Compare methods and their variants on rendered images, with the same students and seeds.

    distill ablate ima mkd --seeds 3

A study is a teacher, a baseline and variants of its distillation. All students of a study share
one teacher, as in the papers. Every seed trains the baseline and each variant from the same initial
weights on the same images, so differences are paired. Finished runs are reused.
"""

import argparse
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..section import check_choice
from ..utils.arguments import at_least
from ..utils.io import write_json
from ..utils.progress import Progress
from ..utils.provenance import command, commit, versions
from .demo import Demo
from .runner import Stage
from .summary import differences, mean_std, replicates

HEADS = "MODEL.DISTILL"


@dataclass(frozen=True)
class Study:
    """One method on one pair of networks, whose configs are found by the rule of their names.

    Args:
        method: folder of the distillation's config.
        student, teacher: names of their configs; the teacher is "self" for self-distillation.
        switches: KEY VALUE overrides of the distillation by the name of the variant.
        folder: folder of the configs.
        metric: the metric to compare.
    """

    method: str
    student: str
    teacher: str
    switches: dict[str, tuple[Any, ...]]
    folder: str = "Shapes-Detection"
    metric: str = "AP"

    @property
    def baseline(self) -> str:
        """Config of the student without distillation."""
        return f"{self.folder}/{self.student}.yaml"

    @property
    def distilled(self) -> str:
        """Config of the student with the method."""
        return f"{self.folder}/{self.method}/{self.teacher}-{self.student}.yaml"

    @property
    def teacher_config(self) -> str:
        """Config of the teacher; "" for self-distillation."""
        return "" if self.teacher == "self" else f"{self.folder}/{self.teacher}.yaml"

    @property
    def layout(self) -> str:
        """Layout of the rendered data."""
        return "cityscapes" if self.metric == "mIoU" else "coco"


def overrides(head: str, keys: dict[str, Any]) -> tuple[Any, ...]:
    """Return the KEY VALUE overrides of one head's section."""
    return tuple(x for key, value in keys.items() for x in (f"{HEADS}.{head}.{key}", value))


def methods(**heads: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the overrides, by name, with which one head replaces all others."""
    return {
        name: (f"{HEADS}.HEADS", (name,), *overrides(name.upper(), keys))
        for name, keys in heads.items()
    }


def switches(head: str, **variants: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the overrides of one head by variant; underscores in names become spaces."""
    return {name.replace("_", " "): overrides(head, keys) for name, keys in variants.items()}


IMA_OFF = {"MASK_RATIO": 0.0, "STANDARDIZE": False, "DEFLATE": False}
MKD_TERMS = {"fea": "FEA", "multiscale": "MULTISCALE", "FDMD": "FDMD", "FAD": "FAD"}
MKD_OFF = {f"{term}_WEIGHT": 0.0 for term in MKD_TERMS.values()}
MKD_ALONE = {f"{k}_only": {**MKD_OFF, f"{term}_WEIGHT": 1.0} for k, term in MKD_TERMS.items()}
NORMALIZED = {"NORMALIZE": "channel"}
MKD_VARIANTS: dict[str, dict[str, Any]] = {
    **MKD_ALONE,
    "distances": {"MULTISCALE_POWER": 1},
    "scales_2_4_8": {"SCALES": (2, 4, 8)},
    "normalized": NORMALIZED,
    "normalized_scales_2_4_8": {**NORMALIZED, "SCALES": (2, 4, 8)},
    **{f"normalized_{name}": {**NORMALIZED, **keys} for name, keys in MKD_ALONE.items()},
}
ALL_LEVELS: dict[str, dict[str, Any]] = {
    "all_levels": {"IN_FEATURES": ()},
    **{f"all_levels_{name}": {**keys, "IN_FEATURES": ()} for name, keys in MKD_VARIANTS.items()},
}
FRCNN = ("faster_rcnn_R_10_FPN_32", "faster_rcnn_R_18_FPN_64")
RETINANET = ("retinanet_R_18_FPN_32", "retinanet_R_18_FPN_64")
GFL = ("gfl_R_18_FPN_32", "gfl_R_18_FPN_64")
RTMDET = ("rtmdet_PAFPN_32", "rtmdet_PAFPN_64")
CONVOLUTIONS = ("conv_p3", "conv_p4", "conv_p5")  # RTMDet's neck before its norms
DENSE = (("TID", "atss"), ("IMA", "fcos"), ("IMA", "reppoints"))
TID_VARIANTS: dict[str, dict[str, Any]] = {
    "cls_only": {"SCORE": "cls"},
    "reg_only": {"SCORE": "reg"},
    "key_only": {"AREA": "key"},
    "weak_only": {"AREA": "weak"},
    "raw_IoU": {"RAW_IOU": True},
    "gamma_0.1": {"GAMMA": 0.1},
    "gamma_0.2": {"GAMMA": 0.2},
}
ZERO = {"OUTSIDE_KEY": "zero"}
TID_SWITCHES = switches(
    "TID",
    **TID_VARIANTS,
    zero=ZERO,
    **{f"zero_{name}": {**ZERO, **keys} for name, keys in TID_VARIANTS.items()},
)
MSSD_TERMS = switches("MSSD", distill_only={"MASK_WEIGHT": 0.0}, mask_only={"DISTILL_WEIGHT": 0.0})
INSTANCES = switches("IMA", scope_image={"SCOPE": "image"}, detections={"INSTANCES": "teacher"})
STUDIES = {
    "ima": Study(
        "IMA",
        *FRCNN,
        switches(
            "IMA",
            scope_image={"SCOPE": "image"},
            plain_features=IMA_OFF,
            mask_only={**IMA_OFF, "MASK_RATIO": 0.15},
            mask_and_standardization={"DEFLATE": False},
            deflation_to_the_letter={"SCALE_ON": "raw", "SCALE_FLOOR": 0.0},
        ),
    ),
    "mkd": Study("MKD", *FRCNN, switches("MKD", **MKD_VARIANTS, **ALL_LEVELS)),
    "tid": Study("TID", *FRCNN, TID_SWITCHES),
    "tid_retinanet": Study("TID", *RETINANET, TID_SWITCHES),
    "tid_gfl": Study("TID", *GFL, TID_SWITCHES),
    "ima_retinanet": Study("IMA", *RETINANET, INSTANCES),
    "ima_gfl": Study("IMA", *GFL, INSTANCES),
    "mkd_retinanet": Study("MKD", *RETINANET, switches("MKD", **MKD_VARIANTS, **ALL_LEVELS)),
    "mssd": Study(
        "MSSD",
        "faster_rcnn_R_10_PAFPN_32",
        "self",
        switches(
            "MSSD",
            distill_only={"MASK_WEIGHT": 0.0},
            mask_only={"DISTILL_WEIGHT": 0.0},
            binary_mask={"MASK": "binary"},
            gamma_1={"GAMMA": 1.0},
        ),
    ),
    "mask": Study(
        "IMA",
        "mask_rcnn_R_10_FPN_32",
        "mask_rcnn_R_18_FPN_64",
        methods(MaskLogitKD={}, MKD={"IN_FEATURES": ("p2",)}),
        "Shapes-InstanceSegmentation",
        "mask AP",
    ),
    "semantic": Study(
        "IMA",
        "pspnet_R_10",
        "deeplabv3_R_18",
        {
            **switches("IMA", scope_image={"SCOPE": "image"}, statistics={"STATISTICS": "image"}),
            **methods(
                MKD={"IN_FEATURES": ("sem_seg_head",)},
                CWD={"IN_FEATURES": ("sem_seg_head",), "TEMPERATURE": 4.0},
                CWDLogits={},
                PixelKD={},
                SKD={},
                IFVD={},
                CIRKD={"PIXELS": 2000, "REGIONS": 500},
                MasKDLogits={"TOKEN_ITERS": 100},
            ),
        },
        "Shapes-SemanticSegmentation",
        "mIoU",
    ),
    "mssd_retinanet": Study("MSSD", "retinanet_R_18_PAFPN_32", "self", {}),
    **{
        f"{method.lower()}_{detector}": Study(
            method, f"{detector}_R_18_FPN_32", f"{detector}_R_18_FPN_64", {}
        )
        for method, detector in DENSE
    },
    "mkd_rtmdet": Study(
        "MKD", *RTMDET, switches("MKD", **MKD_VARIANTS, convolutions={"IN_FEATURES": CONVOLUTIONS})
    ),
    "cwd_rtmdet": Study(
        "CWD",
        *RTMDET,
        switches(
            "CWD",
            to_the_end={"STOP_ITER": 0},
            not_normalized={"NORMALIZE": "none"},
            outputs={"IN_FEATURES": ()},
        ),
    ),
    "mkd_rtmdet_ins": Study(
        "MKD",
        "rtmdet_ins_PAFPN_32",
        "rtmdet_ins_PAFPN_64",
        {**switches("MKD", normalized=NORMALIZED), **methods(PointMaskKD={})},
        "Shapes-InstanceSegmentation",
        "mask AP",
    ),
    **{
        f"mssd_{detector}": Study("MSSD", f"{detector}_PAFPN_32", "self", MSSD_TERMS)
        for detector in ("yolov5", "yolox")
    },
    "mssd_fcos": Study("MSSD", "fcos_R_18_PAFPN_32", "self", {}),
}


class Ablation:
    """Runs the stages of studies.

    Args:
        demo: where and how stages run.
        teacher_seed: seed of the teacher that all students share.
        opts: KEY VALUE overrides of the distilled configs, for tuning.
    """

    def __init__(self, demo: Demo, teacher_seed: int, opts: list[str]):
        self.demo = demo
        self.teacher_seed = teacher_seed
        self.opts = tuple(opts)

    def study(self, study: Study, seeds: list[int], variants: list[str] | None) -> dict[str, Any]:
        """Return the metric of every seed by variant, including the teacher and the baseline."""
        results: dict[str, Any] = {}
        teacher: tuple[Any, ...] = ()
        if study.teacher_config:
            stage = self.demo.stage("teacher", self.teacher_seed, study.teacher_config)
            results["teacher"] = [self.demo.run(stage)[study.metric]]
            teacher = (
                *(f"{HEADS}.TEACHER.CONFIG_FILE", study.teacher_config),
                *(f"{HEADS}.TEACHER.WEIGHTS", str(stage.weights)),
            )
        chosen = {"full": (), **study.switches}
        if variants is not None:
            chosen = {name: chosen[name] for name in variants}
        for seed in seeds:
            stages = [self.demo.stage("baseline", seed, study.baseline)]
            stages += [self._variant(study, k, seed, teacher, v) for k, v in chosen.items()]
            for stage in stages:
                results.setdefault(stage.name, []).append(self.demo.run(stage)[study.metric])
        return results

    def _variant(
        self, study: Study, name: str, seed: int, teacher: tuple[Any, ...], opts: tuple[Any, ...]
    ) -> Stage:
        return self.demo.stage(name, seed, study.distilled, *teacher, *self.opts, *opts)


def print_table(title: str, metric: str, results: dict[str, Any]) -> None:
    table = Table(title=f"{title}: {metric} on the shapes data", box=box.SIMPLE)
    for column in ("", metric, "- baseline, paired"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in results.items():
        gains = differences(values, results["baseline"])
        gain = "" if name in ("teacher", "baseline") else mean_std(gains)
        table.add_row(name, mean_std(values), gain)
    Console().print(table)


def result_suffix(args: argparse.Namespace) -> str:
    """Suffix of the raw file: runs of other variants, seeds or overrides do not replace it."""
    described = f"{args.seeds} {args.variants} {args.opts}"
    digest = hashlib.sha256(described.encode()).hexdigest()[:6]
    return f"{'_tuning' if args.tune else ''}_{digest}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("studies", nargs="+", choices=STUDIES, metavar=f"{{{','.join(STUDIES)}}}")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="students of each variant")
    parser.add_argument(
        "--variants",
        type=lambda names: names.split(","),
        help="comma-separated names; default: full and all switches",
    )
    parser.add_argument("--tune", action="store_true", help="other scenes and seeds than reported")
    parser.add_argument("--out", type=Path, default=Path("output/ablation"))
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE of the distilled configs")


def run(args: argparse.Namespace) -> int:
    for study in args.studies:
        for name in args.variants or ():
            check_choice(f"--variants of {study}", name, ("full", *STUDIES[study].switches))
    out = args.out.resolve()
    os.makedirs(out, exist_ok=True)
    data_seed, seeds = replicates(args.tune, args.seeds)
    for name in args.studies:
        with Progress() as progress:
            demo = Demo(out, data_seed, progress, STUDIES[name].layout)
            demo.render()
            ablation = Ablation(demo, seeds[0], args.opts)
            results = ablation.study(STUDIES[name], seeds, args.variants)
        metric = STUDIES[name].metric
        print_table(name, metric, results)
        facts = {"seeds": seeds, "data_seed": data_seed, "teacher_seed": seeds[0]}
        facts |= {"opts": args.opts, "command": command(), "commit": commit()}
        path = out / f"{name}{result_suffix(args)}.json"
        write_json(path, {metric: results, **facts, "versions": versions()})
        print(f"wrote {path}")
    return 0
