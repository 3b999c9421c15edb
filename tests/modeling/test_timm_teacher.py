"""Models of timm as teachers of features: transformers too, at their own size and strides."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from distill import DistillModel
from distill.config import teacher_config, validate_config
from distill.errors import ConfigError, WeightsError
from distill.heads.fpn import on_grid
from distill.modeling.teacher import Teacher, build_teacher
from distill.structures import Batch
from tests.support.networks import image_dict, kd_losses, tiny_cfg

FILE = "MODEL.DISTILL.TEACHER.CONFIG_FILE"
WEIGHTS = "MODEL.DISTILL.TEACHER.WEIGHTS"
HEADS = ("FitNet", "PKD", "CWD", "IMA", "MKD", "SSIM", "AT", "Cosine", "SKD")
TRANSFORMERS = {  # with random weights: their strides and the mean of a channel
    "vit_tiny_patch16_224": (16, 127.5),
    "vit_small_patch14_dinov2": (14, 123.675),
    "vit_small_patch14_reg4_dinov2": (14, 123.675),
    "vit_small_patch16_dinov3": (16, 123.675),
}


def config(name: str, *opts: Any, family: str = "faster") -> CfgNode:
    return tiny_cfg(family, FILE, f"timm/{name}", *opts)


def tokens_of(name: str, *opts: Any) -> Teacher:
    torch.manual_seed(0)
    return build_teacher(config(name, *opts), trained=False)


def saved(name: str, folder: Path) -> tuple[nn.Module, str]:
    torch.manual_seed(1)
    model = timm.create_model(name)
    path = folder / f"{name}.pth"
    torch.save(model.state_dict(), path)
    return model, str(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_has_the_map_of_its_last_block(name: str) -> None:
    stride, mean = TRANSFORMERS[name]
    teacher = tokens_of(name)
    (shape,) = teacher.family.feature_shapes.values()
    assert shape.stride == stride and teacher.family.outputs == {"features"}
    assert float(teacher.model.pixel_mean[0]) == pytest.approx(mean)
    with torch.no_grad():
        images = teacher.family.preprocess([torch.zeros(3, 50, 71)], (64, 96))
        (tokens,) = teacher.model.backbone(images).values()
    height, width = -(-64 // stride), -(-96 // stride)
    assert tokens.shape == (1, shape.channels, height, width)
    # After the final norm, whose weights are still 1 and 0.
    torch.testing.assert_close(tokens.mean(1), torch.zeros(1, height, width), atol=1e-4, rtol=0)


def test_other_blocks() -> None:
    teacher = tokens_of(
        "test_vit", "MODEL.DISTILL.TEACHER.OPTS", ["MODEL.TIMM.OUT_INDICES", (1, 4)]
    )
    assert list(teacher.family.feature_shapes) == ["blocks.1", "blocks.4"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2"])
def test_cells_lie_where_the_students_do(name: str) -> None:
    """One changed patch of an odd image changes the student's cell around its centre most."""
    teacher = tokens_of(name)
    (shape,) = teacher.family.feature_shapes.values()
    size, stride = (304, 448), shape.stride
    student = torch.zeros(1, 1, size[0] // 16, size[1] // 16)
    batch = Batch([], size)

    def seen(image: Tensor) -> Tensor:
        images = teacher.family.preprocess([image], size)
        (tokens,) = teacher.model.backbone(images).values()
        return on_grid(tokens, student, 16, stride, batch)

    blank = torch.full((3, *size), 120.0)
    with torch.no_grad():
        before = seen(blank)
        for row, column in ((2, 3), (10, 17), (size[0] // stride - 1, size[1] // stride - 1)):
            image = blank.clone()
            cell = [slice(stride * k, stride * (k + 1)) for k in (row, column)]
            image[:, cell[0], cell[1]] = 255 * torch.rand(3, stride, stride)
            change = (seen(image) - before).norm(dim=1)[0]
            at = divmod(int(change.argmax()), change.shape[1])
            for k, true in zip(at, (row, column)):
                assert abs(16 * (k + 0.5) - stride * (true + 0.5)) <= 8 + 1e-6


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
@pytest.mark.parametrize("family", ["faster", "retinanet", "semantic"])
def test_feature_heads_learn_from_it(family: str, name: str, tmp_path: Path) -> None:
    model, path = saved(name, tmp_path)
    keys = ("MODEL.DISTILL.IMA.SCOPE", "image", "MODEL.DISTILL.SKD.IN_FEATURES", ("p4",))
    cfg = config(name, WEIGHTS, path, "MODEL.DISTILL.HEADS", HEADS, *keys, family=family)
    student = DistillModel(cfg).train()
    found = kd_losses(
        student, [image_dict(0, 64, 80, semantic=True), image_dict(1, 70, 64, semantic=True)]
    )
    assert all(x.isfinite() for x in found.values())
    sum(found.values()).backward()
    grads = [p.grad for p in student.student.backbone.parameters() if p.requires_grad]
    assert any(g is not None and g.abs().sum() > 0 for g in grads)
    assert not any("blocks" in k or "stages" in k for k in student.state_dict())
    own = student.teacher.model.state_dict()
    first = next(k for k in own if k.endswith("weight"))
    name_of_first = first.removeprefix("backbone.features.").removeprefix("model.")
    plain = {k.replace(".", "_"): v for k, v in model.state_dict().items()}
    assert torch.equal(own[first], plain[name_of_first.replace(".", "_")])


def test_heads_of_predictions_are_refused(tmp_path: Path) -> None:
    path = saved("test_vit", tmp_path)[1]
    cfg = config("test_vit", WEIGHTS, path, "MODEL.DISTILL.HEADS", ("ROIKD",))
    with pytest.raises(ConfigError, match=r"ROIKD .* rois, which the teacher \(FeatureExtractor\)"):
        DistillModel(cfg)


@pytest.mark.parametrize(
    ("name", "opts", "words"),
    [
        ("vit_small_patch14_dinov9", (), "no such model; nearest: .*dinov2"),
        ("swin_tiny_patch4_window7_224", (), "only images of one size"),
        ("test_vit", (WEIGHTS, "/nowhere.pth"), "does not exist"),
    ],
)
def test_refusals(name: str, opts: tuple[str, ...], words: str) -> None:
    with pytest.raises((ConfigError, WeightsError), match=words):
        build_teacher(config(name, *opts), trained=bool(opts))


def test_the_config_of_the_teacher() -> None:
    cfg = teacher_config(config("test_vit.r160_in1k"))
    assert cfg.MODEL.TIMM.PRETRAINED and cfg.INPUT.FORMAT == "RGB"
    assert not teacher_config(config("test_vit"), trained=False).MODEL.TIMM.PRETRAINED


def test_it_only_teaches() -> None:
    model = tokens_of("test_vit").model
    maps = model([{"image": torch.zeros(3, 40, 56)}])
    assert [tuple(x.shape[2:]) for x in maps.values()] == [(3, 4)]
    cfg = tiny_cfg("faster", "MODEL.META_ARCHITECTURE", "FeatureExtractor")
    with pytest.raises(ConfigError, match="FeatureExtractor only teaches"):
        validate_config(cfg, training=False)
