"""What the README shows works as it stands there."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model

from distill.config import get_distill_cfg, merge_from_file, student_config
from distill.data.shapes import SceneConfig, write_coco
from tests.support.processes import call, script, starts_processes

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
@starts_processes
def test_the_example_of_a_head_trains(tmp_path: Path) -> None:
    (example,) = (b for b in blocks("python") if "DISTILL_HEAD_REGISTRY" in b)
    assert len(example.splitlines()) <= 30
    path = tmp_path / "cosine.py"
    path.write_text(example)
    for split in ("train", "val"):
        write_coco(tmp_path / "shapes", split, 4, 0, SceneConfig(height=64, width=64))
    config = ROOT / "configs" / "quick" / "faster_rcnn_distilled.yaml"
    teacher = get_distill_cfg()
    merge_from_file(teacher, str(ROOT / "configs" / "quick" / "faster_rcnn_teacher.yaml"))
    torch.save({"model": build_model(student_config(teacher)).state_dict()}, tmp_path / "t.pth")
    data = f"{tmp_path}/shapes"
    sets = [
        (f"readme_{s}", f"{data}/annotations/instances_{s}.json", f"{data}/images/{s}")
        for s in ("train", "val")
    ]
    opts = {
        "MODEL.DISTILL.HEADS": ("Cosine",),
        "MODEL.DISTILL.COSINE.WEIGHT": 2.0,
        "MODEL.DISTILL.TEACHER.WEIGHTS": str(tmp_path / "t.pth"),
        "DATASETS.COCO_FORMAT": sets,
        "DATASETS.TRAIN": ("readme_train",),
        "DATASETS.TEST": ("readme_val",),
        "SOLVER.MAX_ITER": 2,
        "SOLVER.IMS_PER_BATCH": 2,
        "OUTPUT_DIR": str(tmp_path / "out"),
    }
    argv = ["--config-file", str(config), *(str(x) for pair in opts.items() for x in pair)]
    done = call(script, path, argv, ROOT, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    logged = (tmp_path / "out" / "metrics.json").read_text()
    assert "loss_cosine/p2" in logged and "kd_ratio/cosine/p2" in logged


def test_the_yaml_examples_load(tmp_path: Path) -> None:
    for text in blocks("yaml"):
        content = yaml.safe_load(text)
        content.pop("_BASE_", None)
        path = tmp_path / "example.yaml"
        path.write_text(yaml.safe_dump(content))
        cfg = get_distill_cfg()
        merge_from_file(cfg, str(path))
        for section, keys in content.items():
            assert set(keys) <= set(cfg[section])


def test_named_files_exist() -> None:
    for name in re.findall(r"(?:configs|tools|projects)/[\w/.-]+\.(?:yaml|py)", README):
        assert (ROOT / name).is_file(), name


def anchor(heading: str) -> str:
    """The fragment that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = [x for x in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in x]
    for link in links:
        file, _, fragment = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), link
