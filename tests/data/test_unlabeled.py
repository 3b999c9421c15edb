"""Images of DATASETS.UNLABELED: their stream, their folders, and what is refused."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from PIL import Image

from distill.analysis.check_data import check
from distill.config import validate_config
from distill.config.resume import changed_values, training_values
from distill.data.loader import build_train_loader
from distill.data.registration import register_own_sets
from distill.data.unlabeled import images_digest, load_unlabeled
from distill.engine.setup import check_batch_size
from distill.engine.trainer import train_mapper
from distill.errors import ConfigError, DataError
from distill.structures import UNLABELED
from distill.utils.progress import Progress
from tests.support.networks import distill_opts
from tests.support.trainings import Shapes, trainable_cfg, write_teacher

pytestmark = pytest.mark.usefixtures("catalogues")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    (path / "below").mkdir(parents=True)
    for k in range(5):
        pixels = np.random.RandomState(k).randint(0, 255, (40 + k, 64, 3), np.uint8)
        Image.fromarray(pixels).save(path / ("below" if k % 2 else ".") / f"{k}.png")
    return path


def config(shapes: Shapes, folder: Path, *opts: Any, heads: Any = ("FitNet",)) -> CfgNode:
    own = ("DATASETS.FOLDER_FORMAT", (("more", str(folder)),), "DATASETS.UNLABELED", ("more",))
    teacher = write_teacher(folder.parent, "faster", "MODEL.ROI_HEADS.NUM_CLASSES", 8)
    chosen = distill_opts("faster", heads) if heads else ()
    return trainable_cfg("faster", shapes, folder.parent, *chosen, *teacher, *own, *opts)


def sets(shapes: Shapes, number: int = 6) -> list[tuple[str, list[dict[str, Any]]]]:
    files = sorted(Path(shapes[2]).iterdir())[:number]
    dicts = [{"file_name": str(x), "height": 64, "width": 64, "annotations": []} for x in files]
    return [(shapes[0], dicts)]


def batches(cfg: CfgNode, shapes: Shapes, number: int, start: int = 0) -> list[Any]:
    labeled = sets(shapes)
    dicts = load_unlabeled(cfg, labeled)
    mapper = train_mapper(cfg)
    loader = build_train_loader(cfg, labeled, mapper, seed=3, start=start, unlabeled=dicts)
    return list(islice(loader, number))


def plain(batch: Any) -> list[Any]:
    return [(Path(x["file_name"]).name, x["image"].tolist()) for x in batch]


STEPS = ("INPUT.AUGMENT.STEPS", ("mosaic", "affine", "mixup"), "INPUT.AUGMENT.SIZE", [32, 32])


@pytest.mark.parametrize("steps", [(), STEPS])
def test_streams_are_exact_and_independent(steps: Any, shapes: Shapes, folder: Path) -> None:
    cfg = config(shapes, folder, "DATASETS.UNLABELED_RATIO", 1.5, "SOLVER.IMS_PER_BATCH", 2, *steps)
    found = batches(cfg, shapes, 4)
    assert [[UNLABELED in x for x in batch] for batch in found] == [[False] * 2 + [True] * 3] * 4
    assert [plain(x) for x in batches(cfg, shapes, 2, start=2)] == [plain(x) for x in found[2:]]
    alone = config(shapes, folder, *steps)
    alone.DATASETS.UNLABELED = ()
    assert [plain(x) for x in batches(alone, shapes, 4)] == [plain(x[:2]) for x in found]
    order = [Path(x["file_name"]).stem for batch in found for x in batch[2:]]
    assert {*order[:5]} == {*"01234"} and order[:5] != order[5:10]
    assert all(len(x["instances"]) == 0 for batch in found for x in batch[2:])


def test_annotations_are_never_read(shapes: Shapes, folder: Path) -> None:
    cfg = config(shapes, folder, "DATASETS.UNLABELED", (shapes[0],))
    dicts = load_unlabeled(cfg, sets(shapes, 0))
    assert len(dicts) == 6 and all(x["annotations"] == [] for x in dicts)
    assert {*dicts[0]} <= {"file_name", "image_id", "height", "width", "annotations"}


def test_images_that_are_labelled_too(
    shapes: Shapes, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(shapes, folder)
    load_unlabeled(cfg, sets(shapes))
    assert not caplog.records
    load_unlabeled(cfg, [("labeled", [{"file_name": "/other/3.png"}])])
    assert "'more' of DATASETS.UNLABELED has 1 file names of labelled images: 3.png" in caplog.text


def test_a_resume_compares_the_images(shapes: Shapes, folder: Path) -> None:
    cfg = config(shapes, folder)
    dicts = load_unlabeled(cfg, [])
    old = training_values(cfg, unlabeled=images_digest(dicts))
    moved = [{**x, "file_name": f"/moved/{Path(x['file_name']).name}"} for x in dicts]
    assert not changed_values(old, training_values(cfg, unlabeled=images_digest(moved)))
    fewer = training_values(cfg, unlabeled=images_digest(dicts[1:]))
    assert list(changed_values(old, fewer)) == ["DATASETS.UNLABELED (images)"]


def test_check_data_decodes_them(shapes: Shapes, folder: Path) -> None:
    cfg = config(shapes, folder)
    with Progress(True) as progress:
        assert check(cfg, True, 0, progress)["more"] == []
        (folder / "5.png").write_bytes(b"no image")
        (issue,) = check(cfg, True, 0, progress)["more"]
    assert issue.fatal and issue.where.endswith("5.png")


def test_an_unreadable_image_is_named(shapes: Shapes, folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"\.png: .*ON_BAD_IMAGE drop"):
        batches(config(shapes, folder), shapes, 1)


@pytest.mark.parametrize(
    "opts, message",
    [
        (("DATASETS.UNLABELED", ("mor",)), "UNLABELED.* 'mor'.*more"),
        (("DATASETS.TRAIN", ("more",)), "TRAIN names 'more' of .*FOLDER_FORMAT.* no labels"),
        (("DATASETS.TEST", ("more",)), "TEST names 'more' of .*FOLDER_FORMAT.* no labels"),
        (("MODEL.DISTILL.HEADS", ()), r"UNLABELED is \('more',\), but no head of .* teacher"),
        (("MODEL.DISTILL.HEADS", ("LGD",)), "no head of .*'LGD'.* has a teacher"),
        (("MODEL.KEYPOINT_ON", True), "KEYPOINT_ON is True"),
        (("TEST.PRECISE_BN.ENABLED", True), "UNLABELED.* but TEST.PRECISE_BN.ENABLED"),
        (("DATASETS.UNLABELED_RATIO", 0.0), "UNLABELED_RATIO is 0.0; it must be above 0"),
        (("MODEL.DISTILL.UNLABELED.SCORE", [1.5]), r"SCORE is \[1.5\]; it must be"),
    ],
)
def test_refusals(opts: Any, message: str, shapes: Shapes, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_config(config(shapes, folder, *opts))


@pytest.mark.parametrize("ratio", [0.1, 0.75])
def test_a_ratio_that_gives_no_images_for_a_part(
    ratio: float, shapes: Shapes, folder: Path
) -> None:
    parts = ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE", 2)
    check_batch_size(config(shapes, folder, *parts))
    with pytest.raises(ConfigError, match=r"UNLABELED_RATIO is .* a multiple of 2"):
        check_batch_size(config(shapes, folder, *parts, "DATASETS.UNLABELED_RATIO", ratio))


def test_an_empty_folder(shapes: Shapes, folder: Path) -> None:
    cfg = config(shapes, folder)
    for path in folder.rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"'more' of DATASETS.UNLABELED: it has no images"):
        load_unlabeled(cfg, [])


@pytest.mark.parametrize("entry", [("more",), ("more", "a", "b"), "more", ("more", 3)])
def test_malformed_entries(entry: Any, shapes: Shapes, folder: Path) -> None:
    cfg = config(shapes, folder)
    cfg.DATASETS.FOLDER_FORMAT = (entry,)
    with pytest.raises(DataError, match=r"FOLDER_FORMAT: .* is not a \(name, image folder\) pair"):
        register_own_sets(cfg)


def test_a_missing_folder(shapes: Shapes, folder: Path) -> None:
    with pytest.raises(DataError, match=r"FOLDER_FORMAT 'more': there is no folder '.*gone'"):
        config(shapes, folder, "DATASETS.FOLDER_FORMAT", (("more", str(folder / "gone")),))
