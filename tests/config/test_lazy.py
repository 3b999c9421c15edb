"""LazyConfigs as teachers: those of the model zoo by name, others only if the user says so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from distill import DistillModel
from distill.config import load_config, teacher_config
from distill.errors import ConfigError, WeightsError
from distill.modeling.teacher import Teacher, build_teacher
from distill.nets.lazy import ZOO
from tests.support.networks import image_dict, kd_losses, tiny_cfg

FILE, OPTS = "MODEL.DISTILL.TEACHER.CONFIG_FILE", "MODEL.DISTILL.TEACHER.OPTS"
WEIGHTS, CODE = "MODEL.DISTILL.TEACHER.WEIGHTS", "MODEL.ALLOW_CODE"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.py"
DETECTORS = sorted(
    name
    for name in (p.relative_to(ZOO).as_posix() for p in ZOO.rglob("*.py"))
    if not name.startswith(("common/", "Misc/"))
)
VITDET = """
from functools import partial

from detectron2.config import LazyCall as L
from detectron2.modeling import ViT, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.model_zoo import get_config

open({marker!r}, "w").close()  # shows that the file was run
model = get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py").model
model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, drop_path_rate=0.0,
               window_size=2, window_block_indexes=[0], use_rel_pos=True, out_feature="last_feat"),
    in_feature="${{.net.out_feature}}",
    out_channels=24,
    scale_factors=(4.0, 2.0, 1.0, 0.5),
    top_block=L(LastLevelMaxPool)(),
    norm="LN",
    square_pad=128,
)
model.proposal_generator.head.in_channels = 24
model.roi_heads.box_head.input_shape.channels = 24
model.roi_heads.mask_head.input_shape.channels = 24
model.roi_heads.num_classes = 2
model.input_format = "RGB"
"""


def config(name: str | Path, *opts: Any, family: str = "faster") -> CfgNode:
    return tiny_cfg(family, FILE, str(name), *opts)


def random_teacher(name: str | Path, *opts: Any) -> Teacher:
    torch.manual_seed(0)
    return build_teacher(config(name, *opts), trained=False)


@pytest.fixture
def vitdet(tmp_path: Path) -> Path:
    path = tmp_path / "vitdet.py"
    path.write_text(VITDET.format(marker=str(tmp_path / "was run")))
    return path


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Build networks without values of weights."""

    def build(cfg: CfgNode) -> Any:
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)

    monkeypatch.setattr("distill.modeling.teacher.build_model", build)
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_of_the_zoo_teaches(name: str, meta: None) -> None:
    teacher = random_teacher(name)
    outputs = teacher.family.outputs
    expected = {"features", "dense", "dense_boxes", "detections"}
    if "C4" not in name:
        dense = "retinanet" in name or "fcos" in name
        expected |= {"head_features", "targets"} if dense else {"rois"}
        expected |= {"masks"} if "mask" in name or "panoptic" in name else set()
        expected |= {"sem_seg"} if "panoptic" in name else set()
    assert outputs == expected
    assert teacher.family.num_classes == (1 if "Keypoints" in name else 80)


def test_weights_classes_and_format_are_the_zoos() -> None:
    cfg = teacher_config(config("new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"))
    assert cfg.MODEL.WEIGHTS.endswith("42073830/model_final_f96b26.pkl")
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.INPUT.FORMAT == "BGR"
    with pytest.raises(WeightsError, match=r"TEACHER\.WEIGHTS is empty"):
        build_teacher(config("COCO-Detection/fcos_R_50_FPN_1x.py"))


def test_overrides(meta: None) -> None:
    cfg = config(RETINANET, OPTS, ["model.num_classes", 7, "model.head.num_convs", 4])
    with pytest.raises(ConfigError, match=r"has no key 'model\.head\.num_convs'"):
        build_teacher(cfg, trained=False)
    assert random_teacher(RETINANET, OPTS, ["model.num_classes", 7]).family.num_classes == 7


# ---- Code runs only if the user allows it.


def test_a_file_of_ones_own_is_not_run(vitdet: Path) -> None:
    for name in (vitdet, f"{ZOO}/../../../{vitdet}", f"../..{vitdet}"):
        with pytest.raises(ConfigError, match=r"runs code .*add 'MODEL\.ALLOW_CODE True'"):
            random_teacher(name)
    assert not (vitdet.parent / "was run").exists()


def test_a_config_cannot_allow_itself(vitdet: Path) -> None:
    path = vitdet.parent / "student.yaml"
    path.write_text(
        f"MODEL:\n  ALLOW_CODE: True\n  DISTILL: {{TEACHER: {{CONFIG_FILE: {vitdet}}}}}\n"
    )
    with pytest.raises(ConfigError, match="counts only on the command line"):
        load_config(str(path))
    path.write_text(f"MODEL:\n  META_ARCHITECTURE: LazyNetwork\n  LAZY: {{FILE: {vitdet}}}\n")
    with pytest.raises(ConfigError, match="runs code"):
        random_teacher(path)
    assert not (vitdet.parent / "was run").exists()


def test_an_override_calls_nothing() -> None:
    for opts in (
        ["model._target_", "os.getcwd"],
        ["model.backbone", {"_target_": "os.getcwd"}],
    ):
        with pytest.raises(ConfigError, match="_target_"):
            random_teacher(RETINANET, OPTS, opts)


def test_a_saved_yaml_is_code_too(tmp_path: Path) -> None:
    path = tmp_path / "saved.yaml"
    path.write_text("model: !!python/object/apply:os.mkdir [made]\n")
    with pytest.raises(ConfigError, match="runs code"):
        random_teacher(path)
    assert not Path("made").exists()


def test_no_file_shadows_a_name_of_the_zoo(
    vitdet: Path, tmp_path: Path, meta: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / RETINANET).parent.mkdir()
    vitdet.rename(tmp_path / RETINANET)
    teacher = random_teacher(RETINANET, CODE, True)
    assert type(teacher.model).__name__ == "RetinaNet"


@pytest.mark.e2e
@pytest.mark.slow
def test_a_vitdet_of_ones_own_teaches(vitdet: Path) -> None:
    teacher = random_teacher(vitdet, CODE, True)
    path = vitdet.parent / "teacher.pth"
    torch.save({"model": teacher.model.state_dict()}, path)
    heads = ("FitNet", "IMA", "ROIKD", "DenseKD", "MaskLogitKD")
    opts = (CODE, True, WEIGHTS, str(path), "MODEL.DISTILL.HEADS", heads)
    opts += ("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14, "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    opts += ("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]])
    model = DistillModel(config(vitdet, *opts, family="mask"))
    assert model.teacher is not None and model.teacher.flip_channels
    found = kd_losses(model.train(), [image_dict(0, 64, 80)])
    assert all(x.isfinite() for x in found.values())
    sum(found.values()).backward()
    assert not any("net.blocks" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise OSError('no such disk')", "cannot be read: OSError no such disk"),
        ("optimizer = dict(lr=1)", "has no `model`"),
        ("from detectron2.config import LazyCall as L\nimport nowhere", "nowhere"),
    ],
)
def test_wrong_files(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        random_teacher(path, CODE, True)
    with pytest.raises(ConfigError, match="There is no LazyConfig"):
        random_teacher(tmp_path / "missing.py", CODE, True)
