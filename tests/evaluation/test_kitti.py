"""Test KITTI's metrics: cases by hand, a reference with loops, COCO's metrics, and a training."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from distill.data.kitti import KITTI_CLASSES, Label, load_kitti, register_kitti
from distill.data.shapes import SceneConfig, write_kitti
from distill.evaluation import kitti
from distill.evaluation.kitti import (
    Detections,
    KITTIEvaluator,
    coco_evaluator,
    kitti_average_precision,
)
from distill.launch.main import main
from tests.support.networks import tiny_cfg, write_config

LEVELS = ("easy", "moderate", "hard")
Box = tuple[float, float, float, float]
Found = tuple[str, Box, float]  # class, box, score

TALL: Box = (10, 10, 60, 70)  # counts at every difficulty
ELSEWHERE: Box = (100, 10, 150, 70)


def label(kind: str, box: Box, occlusion: int = 0, truncation: float = 0.0) -> Label:
    return Label(kind, truncation, occlusion, box)


def detections(found: Sequence[Found]) -> Detections:
    return Detections(
        np.array([box for _, box, _ in found], dtype=float).reshape(-1, 4),
        np.array([score for *_, score in found], dtype=float),
        np.array([KITTI_CLASSES.index(kind) for kind, *_ in found], dtype=np.int64),
    )


# ------------------------------------------------------------------------------ counted by hand
# Every case has 41 images with a car that is found with score 0.5, and adds labels and detections
# to each image. 41 objects reach all 40 recall positions: AP is the precision at threshold 0.5.


def ap(labels: Sequence[Label], found: Sequence[Found], kind: str = "Car") -> list[float]:
    """Return the AP of ``kind`` at the three difficulties, in percent."""
    own = label(kind, TALL), (kind, TALL, 0.5)
    data = [[own[0], *labels]] * 41, [detections([own[1], *found])] * 41
    results = kitti_average_precision(*data)
    return [round(results[f"{kind}/{level}"], 6) for level in LEVELS]


PERFECT, HALF = [100.0] * 3, [50.0] * 3
CASES: dict[str, tuple[list[Label], list[Found], list[float]]] = {
    "all found": ([], [], PERFECT),
    "a false positive each": ([], [("Car", ELSEWHERE, 0.9)], HALF),
    "a false positive of lower score": ([], [("Car", ELSEWHERE, 0.4)], PERFECT),
    "of another class": ([], [("Cyclist", ELSEWHERE, 0.9)], PERFECT),
    "half of all missed": ([label("Car", ELSEWHERE)], [], HALF),
    "second detection of a car": ([], [("Car", (10, 10, 60, 66), 0.5)], HALF),
    "on a Van": ([label("Van", ELSEWHERE)], [("Car", ELSEWHERE, 0.9)], PERFECT),
    "a Van missed": ([label("Van", ELSEWHERE)], [], PERFECT),
    "on a Truck": ([label("Truck", ELSEWHERE)], [("Car", ELSEWHERE, 0.9)], HALF),
    "on a Person_sitting": ([label("Person_sitting", ELSEWHERE)], [("Car", ELSEWHERE, 0.9)], HALF),
    # Three quarters of the detection lie in the region, which is much larger.
    "in DontCare": ([label("DontCare", (90, 0, 500, 55))], [("Car", ELSEWHERE, 0.9)], PERFECT),
    "half in DontCare": ([label("DontCare", (90, 0, 500, 40))], [("Car", ELSEWHERE, 0.9)], HALF),
    "DontCare missed": ([label("DontCare", ELSEWHERE)], [], PERFECT),
    "too small": ([], [("Car", (100, 10, 150, 34.9), 0.9)], PERFECT),
    "too small at easy": ([], [("Car", (100, 10, 150, 49.9), 0.9)], [100, 50, 50]),
    "just not too small": ([], [("Car", (100, 10, 150, 35), 0.9)], [100, 50, 50]),
    "partly occluded, missed": ([label("Car", ELSEWHERE, 1)], [], [100, 50, 50]),
    "largely occluded, missed": ([label("Car", ELSEWHERE, 2)], [], [100, 100, 50]),
    "occlusion unknown, missed": ([label("Car", ELSEWHERE, 3)], [], PERFECT),
    "occluded, found": ([label("Car", ELSEWHERE, 3)], [("Car", ELSEWHERE, 0.9)], PERFECT),
    "truncated by the limit, missed": ([label("Car", ELSEWHERE, 0, 0.15)], [], HALF),
    "truncated, missed": ([label("Car", ELSEWHERE, 0, 0.2)], [], [100, 50, 50]),
    "more truncated, missed": ([label("Car", ELSEWHERE, 0, 0.4)], [], [100, 100, 50]),
    "most truncated, missed": ([label("Car", ELSEWHERE, 0, 0.6)], [], PERFECT),
    # A height of 40 px is not enough at easy.
    "low, missed": ([label("Car", (100, 10, 150, 50))], [], [100, 50, 50]),
    # Missed objects give recall 1/2 at precision 1/2.
    "overlap 41/59": ([label("Car", ELSEWHERE)], [("Car", (109, 10, 159, 70), 0.5)], [25.0] * 3),
    "overlap 42/58": ([label("Car", ELSEWHERE)], [("Car", (108, 10, 158, 70), 0.5)], PERFECT),
    "found, just not too small": (
        [label("Car", (100, 10, 150, 36))],
        [("Car", (100, 10, 150, 35), 0.5)],
        PERFECT,
    ),
    # In the kit, a detection that is too small to count, of any class, hides the score of the right
    # one. All are found at 0.5, but only half of the scores are recorded.
    "hidden by a small one": (
        [label("Car", (100, 10, 150, 36))],
        [("Cyclist", (100, 10, 150, 34.9), 0.9), ("Car", (100, 10, 150, 36), 0.5)],
        [100, 50, 50],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_counted_by_hand(case: str) -> None:
    labels, found, expected = CASES[case]
    assert ap(labels, found) == expected


@pytest.mark.parametrize("kind", ["Pedestrian", "Cyclist"])
def test_people_overlap_by_half(kind: str) -> None:
    there = label(kind, ELSEWHERE)
    assert ap([there], [(kind, (116, 10, 166, 70), 0.5)], kind) == PERFECT  # 34/66
    assert ap([there], [(kind, (117, 10, 167, 70), 0.5)], kind) == [25.0] * 3  # 33/67
    sitting = label("Person_sitting", ELSEWHERE)
    expected = PERFECT if kind == "Pedestrian" else HALF
    assert ap([sitting], [(kind, ELSEWHERE, 0.9)], kind) == expected


def test_two_objects_by_hand() -> None:
    labels = [[label("Car", TALL), label("Car", ELSEWHERE)]]
    found = [("Car", TALL, 0.9), ("Car", (200, 10, 250, 70), 0.85), ("Car", ELSEWHERE, 0.8)]
    results = kitti_average_precision(labels, [detections(found)])
    # The thresholds 0.9 (recall 0) and 0.8 (recall 1/40) have precision 1 and 2/3. There are no
    # further positions.
    assert results["Car/moderate"] == pytest.approx(100 * (2 / 3) / 40)
    assert math.isnan(results["Cyclist/hard"])
    assert results["mAP/moderate"] == results["Car/moderate"]


def test_precision_is_the_best_at_that_recall_or_beyond() -> None:
    labels = [[label("Car", TALL)]] * 82
    wrong = [("Car", ELSEWHERE, 0.7)]
    first = [detections([("Car", TALL, 0.6), *wrong])] * 41
    second = [detections([("Car", TALL, 0.5)])] * 41
    # At 0.6, 41 are right and 41 wrong. At 0.5, 82 are right and 41 wrong, which raises the
    # precision at all positions.
    results = kitti_average_precision(labels, first + second)
    assert results["Car/easy"] == pytest.approx(100 * 2 / 3)


def test_no_detections_at_all() -> None:
    results = kitti_average_precision([[label("Car", TALL)]], [Detections.empty()])
    assert results["Car/easy"] == 0 and math.isnan(results["Pedestrian/easy"])
    assert results["mAP/easy"] == 0
    assert math.isnan(kitti_average_precision([[]], [Detections.empty()])["mAP/hard"])


# ------------------------------------------------------------------------------------- reference


def overlap(a: Box, b: Box, of_first: bool = False) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area_a, area_b = ((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return width * height / (area_a if of_first else area_a + area_b - width * height)


class Slow:
    """Reference for one class and difficulty, with lists and loops.

    It shares no code with the package.
    """

    def __init__(self, kind: str, limits: tuple[int, int, float]):
        self.kind, self.limits = kind, limits
        self.enough = 0.7 if kind == "Car" else 0.5
        self.similar = {"Car": "Van", "Pedestrian": "Person_sitting"}.get(kind)

    def must_be_found(self, x: Label) -> bool:
        height, occlusion, truncation = self.limits
        tall = x.box[3] - x.box[1] > height
        return (
            x.type == self.kind
            and tall
            and not (x.occlusion > occlusion or x.truncation > truncation)
        )

    def image(
        self, labels: list[Label], found: list[Found], threshold: float | None
    ) -> tuple[list[float], int]:
        """Return the scores of the true positives and the number of false ones.

        Without a threshold, only the first is defined.
        """
        left = [x for x in found if threshold is None or x[2] >= threshold]
        small = [x for x in left if x[1][3] - x[1][1] < self.limits[0]]
        right = []
        for x in labels:
            if x.type not in (self.kind, self.similar):
                continue
            able = [d for d in left if d in small or d[0] == self.kind]
            able = [d for d in able if overlap(d[1], x.box) > self.enough]
            large = [d for d in able if d not in small]
            if threshold is None and able:
                taken = max(able, key=lambda d: d[2])
            elif threshold is not None and large:
                taken = max(large, key=lambda d: overlap(d[1], x.box))
            elif able:
                taken = able[0]
            else:
                continue
            left.remove(taken)
            if self.must_be_found(x) and taken not in small:
                right.append(taken[2])
        regions = [x.box for x in labels if x.type == "DontCare"]
        wrong = [d for d in left if d[0] == self.kind and d not in small]
        wrong = [d for d in wrong if all(overlap(d[1], r, True) <= self.enough for r in regions)]
        return right, len(wrong)

    def ap(self, labels: list[list[Label]], found: list[list[Found]]) -> float:
        objects = sum(self.must_be_found(x) for image in labels for x in image)
        if not objects:
            return math.nan
        pairs = list(zip(labels, found))
        scores = sorted((s for p in pairs for s in self.image(*p, None)[0]), reverse=True)
        precisions, wanted = [], 0.0
        for i in range(len(scores)):
            here, behind = (i + 1) / objects, (i + 2) / objects
            if i == len(scores) - 1 or not behind - wanted < wanted - here:
                counts = [self.image(*p, scores[i]) for p in pairs]
                true = sum(len(right) for right, _ in counts)
                precisions.append(true / (true + sum(wrong for _, wrong in counts) or 1))
                wanted += 0.025
        precisions += [0.0] * 41
        return 100 * sum(max(precisions[i:]) for i in range(1, 41)) / 40


def random_images(seed: int, num_images: int) -> tuple[list[list[Label]], list[list[Found]]]:
    """Return crowded images with boxes near the limits of height and overlap, and tied scores."""
    rng = np.random.default_rng(seed)
    kinds = [*KITTI_CLASSES * 3, "Van", "Person_sitting", "DontCare", "Truck"]
    labels, found = [], []
    for _ in range(num_images):
        objects: list[Label] = []
        for _ in range(rng.integers(1, 7)):
            x, y = rng.uniform(0, 150, 2)
            height = rng.choice([24, 26, 28, 40, 41, 44, 60, 70])
            box = (x, y, x + rng.uniform(20, 60), y + height)
            occlusion, truncation = (
                int(rng.choice([0, 0, 0, 1, 2, 3])),
                rng.choice([0, 0, 0.2, 0.4]),
            )
            objects.append(Label(str(rng.choice(kinds)), float(truncation), occlusion, box))
        image: list[Found] = []
        for x in objects:
            for _ in range(rng.integers(0, 4)):
                moved = np.array(x.box) + rng.uniform(-3, 3, 4)
                kind = x.type if x.type in KITTI_CLASSES and rng.random() < 0.8 else ""
                kind = kind or str(rng.choice(KITTI_CLASSES))
                score = float(rng.integers(1, 60)) / 60
                image.append((kind, tuple(moved.tolist()), score))  # type: ignore[arg-type]
        labels.append(objects)
        found.append(image)
    return labels, found


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 3))])
def test_equals_the_rules_spelt_out(seed: int) -> None:
    labels, found = random_images(seed, 250)
    results = kitti_average_precision(labels, [detections(x) for x in found])
    limits = {"easy": (40, 0, 0.15), "moderate": (25, 1, 0.3), "hard": (25, 2, 0.5)}
    for level in LEVELS:
        expected = [Slow(kind, limits[level]).ap(labels, found) for kind in KITTI_CLASSES]
        assert min(expected) > 1 and max(expected) < 90
        values = [results[f"{kind}/{level}"] for kind in KITTI_CLASSES]
        assert values == pytest.approx(expected, abs=1e-6)
        assert results[f"mAP/{level}"] == pytest.approx(sum(expected) / 3, abs=1e-6)


# ------------------------------------------------------------------------------ data on the disk


def write_data(root: Path, labels: Sequence[Sequence[Label]]) -> None:
    for folder in ("image_2", "label_2"):
        (root / "training" / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets").mkdir(exist_ok=True)
    for i, objects in enumerate(labels):
        Image.new("RGB", (160, 160)).save(root / "training" / "image_2" / f"{i:06d}.png")
        rows = [
            f"{x.type} {x.truncation} {x.occlusion} 0 {' '.join(map(str, x.box))} 1 1 1 0 0 0 0\n"
            for x in objects
        ]
        (root / "training" / "label_2" / f"{i:06d}.txt").write_text("".join(rows))
    names = "".join(f"{i:06d}\n" for i in range(len(labels)))
    (root / "ImageSets" / "val.txt").write_text(names)


def feed(evaluator: Any, dicts: list[dict[str, Any]], found: Sequence[Sequence[Found]]) -> None:
    for image, boxes in zip(dicts, found):
        instances = Instances((image["height"], image["width"]))
        values = detections(boxes)
        instances.pred_boxes = Boxes(torch.tensor(values.boxes, dtype=torch.float32))
        instances.scores = torch.tensor(values.scores, dtype=torch.float32)
        instances.pred_classes = torch.tensor(values.classes)
        evaluator.process([image], [{"instances": instances}])


@pytest.fixture
def own_kitti(tmp_path: Path) -> Iterator[Path]:
    """Return the root of the registered ``own_kitti``."""
    register_kitti("own_kitti", tmp_path / "kitti", "val")
    yield tmp_path / "kitti"
    DatasetCatalog.remove("own_kitti")
    MetadataCatalog.remove("own_kitti")


def as_found(labels: Sequence[Sequence[Label]]) -> list[list[Found]]:
    return [
        [(x.type, x.box, 0.9) for x in objects if x.type in KITTI_CLASSES] for objects in labels
    ]


@pytest.mark.slow
def test_ground_truth_is_perfect(own_kitti: Path) -> None:
    """The data are the shapes, with their own boxes and limits."""
    config = SceneConfig(height=160, width=160, min_size=0.2)
    write_kitti(own_kitti, "val", 90, config=config)
    labels = [kitti.read_labels(x["label_file"]) for x in load_kitti(own_kitti, "val")]
    evaluator = KITTIEvaluator("own_kitti")
    feed(evaluator, load_kitti(own_kitti, "val"), as_found(labels))
    results = evaluator.evaluate()["kitti"]
    assert results["Car/moderate"] == results["Pedestrian/hard"] == 100
    for level, (height, occlusion, truncation) in kitti.DIFFICULTIES.items():
        for kind in KITTI_CLASSES:
            own = [x for objects in labels for x in objects if x.type == kind]
            own = [x for x in own if x.box[3] - x.box[1] > height and x.occlusion <= occlusion]
            n = sum(x.truncation <= truncation for x in own)
            assert results[f"{kind}/{level}"] == pytest.approx(100 * min(n - 1, 40) / 40)


def test_processes_are_gathered(own_kitti: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, found = random_images(7, 80)
    write_data(own_kitti, labels)
    dicts = load_kitti(own_kitti, "val")
    whole, *parts = (KITTIEvaluator("own_kitti") for _ in range(3))
    feed(whole, dicts, found)
    feed(parts[0], dicts[::2], found[::2])
    feed(parts[1], dicts[1::2], found[1::2])
    expected = whole.evaluate()
    assert 0 < expected["kitti"]["Car/hard"] < 100
    assert parts[0].evaluate() != expected
    monkeypatch.setattr(kitti.comm, "gather", lambda own, dst: [x.detections for x in parts])
    assert parts[0].evaluate() == expected
    monkeypatch.setattr(kitti.comm, "is_main_process", lambda: False)
    assert parts[1].evaluate() == {}


def test_coco_terms_ignore_what_kitti_ignores(own_kitti: Path, tmp_path: Path) -> None:
    far = (100, 100, 140, 150)
    kinds = {"Van": "Car", "Person_sitting": "Pedestrian", "DontCare": "Cyclist"}
    labels = [[label(kind, TALL) for kind in ("Car",)] + [label(other, far)] for other in kinds]
    labels[1][0], labels[2][0] = label("Pedestrian", TALL), label("Cyclist", TALL)
    found = [[(kind, (101, 101, 139, 149), 0.95), (kind, TALL, 0.9)] for kind in kinds.values()]
    write_data(own_kitti, labels)

    def evaluate(output: str) -> dict[str, float]:
        evaluator = coco_evaluator("own_kitti", str(tmp_path / output))
        evaluator.reset()
        feed(evaluator, load_kitti(own_kitti, "val"), found)
        return evaluator.evaluate()["bbox"]

    results = evaluate("out")
    assert results["AP"] == pytest.approx(100)
    assert [results[f"AP-{kind}"] for kind in KITTI_CLASSES] == pytest.approx([100] * 3)
    assert MetadataCatalog.get("own_kitti").get("json_file") is None

    labels[0][1] = label("Truck", far)  # other data with the same name and folder
    write_data(own_kitti, labels)
    assert evaluate("out")["AP-Car"] == pytest.approx(50)


# ------------------------------------------------------------------------------ end to end


@pytest.mark.e2e
def test_train_and_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        write_kitti(tmp_path / "datasets" / "kitti", split, 3, 0, SceneConfig(height=96, width=128))
    opts: list[Any] = [
        *("DATASETS.TRAIN", ("kitti_train",), "DATASETS.TEST", ("kitti_val",)),
        *("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 1e-4),
        *("DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path / "out")),
        *("INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MIN_SIZE_TEST", 96),
    ]
    config = write_config(tiny_cfg("faster", *opts, norm="BN"), tmp_path / "config.yaml")
    assert main(["--config-file", str(config)]) == 0
    last = json.loads((tmp_path / "out" / "metrics.json").read_text().splitlines()[-1])
    assert {"bbox/AP", "bbox/AP-Car", "kitti/Car/easy", "kitti/mAP/moderate"} <= set(last)
    assert not list((tmp_path / "out").rglob("*coco_format*"))
