"""Test that bad images are named, and that unusual images can be used."""

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from PIL import Image
from torch.utils.data import DataLoader

from distill.data.checks import images
from distill.data.checks.images import file_issues, inspect_images
from distill.data.guarded_mapper import BadImage, GuardedMapper
from tests.support.networks import tiny_cfg, tiny_model

WIDTH, HEIGHT = 40, 30
CASES = 60  # number of damaged files per format
ROTATED = 6  # EXIF's "rotate by 90 degrees to show"
Entry = dict[str, Any]


def noise(width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def entry_of(path: Path, width: int = WIDTH, height: int = HEIGHT, **keys: Any) -> Entry:
    box = [0, 0, width, height]
    annotation = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
    annotation |= keys.pop("annotation", {})
    names = {"file_name": str(path), "width": width, "height": height, "image_id": 1}
    return {**names, "annotations": [annotation], **keys}


def guarded(family: str = "faster", *opts: Any) -> GuardedMapper:
    small = ("INPUT.MIN_SIZE_TRAIN", (32,), "INPUT.MAX_SIZE_TRAIN", 400)
    return GuardedMapper(DatasetMapper(tiny_cfg(family, *small, *opts), is_train=True))


def save(path: Path, image: Image.Image | None = None, **options: Any) -> None:
    (image or noise()).save(path, **options)


def truncate(path: Path) -> None:
    save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_exif(path: Path, image: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[images.ExifTag.Orientation] = orientation
    image.save(path, exif=exif)


def deep(dtype: Any) -> Image.Image:
    return Image.fromarray(np.full((HEIGHT, WIDTH), 1000, dtype=dtype))


# ------------------------------------------------------------------------------- bad images

BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("a.jpg", lambda p: None, "no such file"),
    "folder": ("a.jpg", lambda p: p.mkdir(), "folder"),
    "pipe": ("a.jpg", os.mkfifo, "no such file"),
    "0 bytes": ("a.jpg", lambda p: p.touch(), "0 bytes"),
    "truncated JPEG": ("a.jpg", truncate, "truncated"),
    "truncated PNG": ("a.png", truncate, "cannot be read"),
    "text": ("a.jpg", lambda p: p.write_text("version https://git-lfs"), "Pillow does not know"),
    "16 bits": ("a.png", lambda p: save(p, deep(np.uint16)), "convert it to 8 bits"),
    "32 bits": ("a.tif", lambda p: save(p, deep(np.int32)), "convert it to 8 bits"),
    "float": ("a.tif", lambda p: save(p, deep(np.float32)), "convert it to 8 bits"),
    "another size": ("a.png", lambda p: save(p, noise(50, 60)), "50 x 60 pixels, but is annotated"),
    "rotated": (
        *("a.jpg", lambda p: with_exif(p, noise(), ROTATED)),
        "30 x 40 pixels, but is annotated as 40 x 30, because its EXIF orientation 6",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_image_is_named(case: str, tmp_path: Path) -> None:
    name, write, words = BAD[case]
    write(tmp_path / name)
    entry = entry_of(tmp_path / name)
    bad = guarded()(entry)
    assert isinstance(bad, BadImage) and bad.file_name == str(tmp_path / name)
    assert words in bad.reason and "\n" not in bad.reason and bad.file_name not in bad.reason
    (issue,) = file_issues(entry)
    assert issue.fatal and issue.image == bad.file_name and issue.detail == bad.reason


def test_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 3)
    assert "decompression bomb" in guarded()(entry_of(tmp_path / "a.png")).reason


def test_an_image_that_is_resized_to_height_0(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(10_000, 1))
    bad = guarded()(entry_of(tmp_path / "a.png", 10_000, 1))
    assert isinstance(bad, BadImage) and "cannot handle it (ValueError: height and" in bad.reason


def palette(path: Path, colours: list[int]) -> None:
    labels = Image.new("P", (WIDTH, HEIGHT))
    labels.putpalette(colours)
    labels.save(path)


LABELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda p: None, "no such file (labels.png)"),
    "0 bytes": (lambda p: p.touch(), "0 bytes (labels.png)"),
    "truncated": (truncate, "cannot be read"),
    "16 bits": (lambda p: save(p, deep(np.uint16)), "convert it to 8 bits"),
    "another size": (lambda p: save(p, noise(50, 60, "L")), "50 x 60 pixels, but"),
    "coloured": (lambda p: palette(p, [9, 200, 7, 1, 2, 3] * 128), "greyscale"),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("annotated", [True, False], ids=["sized", "unsized"])
def test_bad_labels_are_named(
    case: str, annotated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write, words = LABELS[case]
    save(tmp_path / "a.png")
    write(tmp_path / "labels.png")
    entry = {"file_name": "a.png", "sem_seg_file_name": "labels.png"}
    entry |= {"width": WIDTH, "height": HEIGHT} if annotated else {}
    bad = guarded("semantic")(entry)
    assert isinstance(bad, BadImage) and bad.file_name == "a.png" and words in bad.reason


def test_labels_in_grey_colours_are_labels(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    palette(tmp_path / "labels.png", [k // 3 for k in range(768)])
    entry = {
        "file_name": str(tmp_path / "a.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
    }
    assert guarded("semantic")(entry)["sem_seg"].unique().tolist() == [0]


@pytest.mark.parametrize("mask", [{"size": [HEIGHT, WIDTH], "counts": "o" * 40}, [[1, 1, 2]], [7]])
def test_a_mask_that_the_mapper_cannot_read(mask: Any, tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    entry = entry_of(tmp_path / "a.png", annotation={"segmentation": mask})
    bad = guarded("mask", "INPUT.MASK_FORMAT", "bitmask")(entry)
    assert isinstance(bad, BadImage) and "annotations[0]" in bad.reason


ODD = (None, "x", -1, float("inf"), float("nan"), [], {}, True, [["x"]], 10**400, b"\xff", "\0")


@pytest.mark.parametrize("key", ["file_name", "width", "height", "annotations"])
def test_odd_values_of_an_entry_never_raise(key: str, tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for value in ODD:
        entry = {**entry_of(tmp_path / "a.png"), key: value}
        harmless = key == "annotations" and value in ([], {})
        assert isinstance(guarded()(entry), BadImage) != harmless, value
        list(file_issues(entry))


@pytest.mark.parametrize("key", ["bbox", "bbox_mode", "category_id", "segmentation"])
def test_odd_values_of_an_annotation_never_raise(key: str, tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    mapper = guarded("mask", "INPUT.MASK_FORMAT", "bitmask")
    masked = {"segmentation": [[1, 1, 9, 1, 9, 9]]}
    for value in ODD:
        mapped = mapper(entry_of(tmp_path / "a.png", annotation={**masked, key: value}))
        assert isinstance(mapped, (BadImage, dict))


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Replace up to three of the first 200 bytes, and in half of the cases cut the end off."""
    content = bytearray(whole[: rng.choice((len(whole), rng.randrange(1, len(whole))))])
    for _ in range(rng.randrange(4)):
        content[rng.randrange(min(len(content), 200))] = rng.randrange(256)
    return bytes(content)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "webp", "bmp", "ppm"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore:Image size:RuntimeWarning")
def test_broken_bytes_never_raise(suffix: str, tmp_path: Path) -> None:
    save(tmp_path / f"a.{suffix}")
    whole, rng, mapper = (tmp_path / f"a.{suffix}").read_bytes(), random.Random(0), guarded()
    entry = entry_of(tmp_path / "b")
    outcomes = set()
    for _ in range(CASES):
        Path(entry["file_name"]).write_bytes(damaged(whole, rng))
        outcomes.add(type(mapper(entry)))
    assert outcomes == {dict, BadImage}


# ------------------------------------------------------------------------------- good images

GOOD: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "CMYK": ("a.jpg", lambda p: save(p, noise(mode="CMYK"))),
    "palette": ("a.png", lambda p: save(p, noise(mode="P"))),
    "palette with transparency": ("a.png", lambda p: save(p, noise(mode="P"), transparency=b"\0")),
    "grey": ("a.jpg", lambda p: save(p, noise(mode="L"))),
    "grey with transparency": ("a.png", lambda p: save(p, noise(mode="LA"))),
    "transparency": ("a.png", lambda p: save(p, noise(mode="RGBA"))),
    "one bit": ("a.png", lambda p: save(p, noise(mode="1"))),
    "rotated": ("a.jpg", lambda p: with_exif(p, noise(HEIGHT, WIDTH), ROTATED)),
    "upright": ("a.jpg", lambda p: with_exif(p, noise(), 1)),
}
REMARKS = {"CMYK": ["CMYK"], "rotated": ["EXIF rotation"]}


@pytest.mark.parametrize("case", GOOD)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_an_odd_image_works(case: str, tmp_path: Path) -> None:
    name, write = GOOD[case]
    write(tmp_path / name)
    entry = entry_of(tmp_path / name)
    mapped = guarded()(entry)
    assert mapped["image"].dtype == torch.uint8 and mapped["image"].float().std() > 10
    assert len(mapped["instances"]) == 1
    issues = list(file_issues(entry))
    assert [x.kind for x in issues] == REMARKS.get(case, [])
    assert not any(x.fatal for x in issues)


@pytest.mark.parametrize("size", [(1, 1), (10_000, 10)], ids=["1x1", "10000x10"])
def test_extreme_sizes_train(size: tuple[int, int], tmp_path: Path, storage: Any) -> None:
    save(tmp_path / "a.png", noise(*size))
    save(tmp_path / "b.png")
    mapper = guarded("faster", "INPUT.MAX_SIZE_TRAIN", 1333)
    batch = [mapper(entry_of(tmp_path / "a.png", *size)), mapper(entry_of(tmp_path / "b.png"))]
    losses = tiny_model("faster")(batch)
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()


# --------------------------------------------------------------------------- errors of the mapper


def failing(error: Exception) -> Callable[[Entry], Any]:
    def mapper(entry: Entry) -> Any:
        raise error

    return mapper


BUGS = (AttributeError("a"), NameError("a"), TypeError("a"), KeyError("a"), ImportError("a"))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
def test_a_bug_of_the_mapper_passes(bug: Exception, tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(type(bug)) as raised:
        GuardedMapper(failing(bug))(entry_of(tmp_path / "a.png"))
    assert raised.value is bug


@pytest.mark.parametrize(
    "error", [OSError("gone\nagain"), ValueError("gone again."), MemoryError()]
)
def test_errors_that_an_image_may_cause_are_returned(error: Exception, tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    bad = GuardedMapper(failing(error))(entry_of(tmp_path / "a.png"))
    assert bad.reason.startswith("the mapper cannot handle it") and "\n" not in bad.reason
    assert type(error).__name__ in bad.reason


def test_no_pixel_left(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    mapper = GuardedMapper(lambda entry: {"image": torch.zeros(3, 0, 9)})
    assert "no pixel" in mapper(entry_of(tmp_path / "a.png")).reason


def test_the_output_of_the_mapper_is_returned(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    entry = entry_of(tmp_path / "a.png")
    assert GuardedMapper(lambda e: e)(entry) is entry
    assert GuardedMapper(lambda e: None)(entry) is None  # detectron2's sign for another image


@pytest.mark.e2e
def test_the_mapper_works_in_a_data_worker(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    entries = [entry_of(tmp_path / name) for name in ("a.png", "b.png")]
    mapper = pickle.loads(pickle.dumps(guarded()))
    mapped = DataLoader([0, 1], num_workers=1, collate_fn=lambda x: mapper(entries[x[0]]))  # type: ignore[arg-type]
    good, bad = mapped
    assert good["image"].shape[0] == 3
    assert bad == BadImage(str(tmp_path / "b.png"), "there is no such file")


# ------------------------------------------------------------------------------- many images


@pytest.mark.e2e
@pytest.mark.parametrize("workers", [0, 2])
def test_many_images_in_their_order(workers: int, tmp_path: Path) -> None:
    entries = [entry_of(tmp_path / f"{k}.png") for k in range(9)]
    for k in range(0, 9, 2):
        save(tmp_path / f"{k}.png")
    found = list(inspect_images(entries, workers))
    assert [[x.kind for x in issues] for issues in found] == [[], ["missing file"]] * 4 + [[]]


@pytest.mark.e2e
def test_a_crashing_decoder_costs_its_own_image_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(entry: Entry) -> Any:
        if entry["file_name"].endswith("1.png"):
            os._exit(9)
        return iter(())

    monkeypatch.setattr(images, "file_issues", crash)  # forked processes inherit it
    monkeypatch.setattr(images, "_WINDOW", 2)
    found = list(inspect_images([entry_of(tmp_path / f"{k}.png") for k in range(5)], 1))
    assert [len(issues) for issues in found] == [0, 1, 0, 0, 0]
    assert "crashes" in found[1][0].detail and found[1][0].fatal
