"""Networks of a user's own code as teachers of features and detections."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode

from distill import DistillModel
from distill.errors import ConfigError
from distill.modeling.teacher import build_teacher
from tests.docs.pages import ROOT, blocks
from tests.support.networks import image_dict, kd_losses, tiny_cfg

FILE, CODE = "MODEL.DISTILL.TEACHER.CONFIG_FILE", "MODEL.ALLOW_CODE"
HEADS = "MODEL.DISTILL.HEADS"
NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    strides = {{"fine": 8, "coarse": 32}}

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 5, 8, 8), nn.Conv2d(3, 7, 32, 32)

    def forward(self, images):
        self.seen = images
        return {{"fine": self.fine(images / 255), "coarse": self.coarse(images / 255)}}

def build(weights):
    net = Net()
    {line}
    return net
"""


def written(folder: Path, line: str = "pass") -> str:
    path = folder / "net.py"
    path.write_text(NETWORK.format(line=line))
    return f"{path}:build"


def config(function: str, *opts: Any) -> CfgNode:
    return tiny_cfg("faster", FILE, function, *opts)


@pytest.mark.e2e
def test_it_teaches_its_features(tmp_path: Path) -> None:
    cfg = config(written(tmp_path), CODE, True, HEADS, ("FitNet", "Cosine"))
    model = DistillModel(cfg).train()
    levels = [(x.student, x.teacher) for x in model.heads["FitNet"].levels]
    assert levels == [("p3", "fine"), ("p5", "coarse")]
    found = kd_losses(model, [image_dict(0, 50, 70), image_dict(1, 64, 40)])
    assert len(found) == 4 and all(x.isfinite() and x > 0 for x in found.values())
    sum(found.values()).backward()
    assert all(p.grad is not None for p in model.heads.parameters())
    assert not any("fine" in name for name in model.state_dict())
    seen = model.teacher.model.backbone.network.seen  # whole cells, RGB in [0, 255]
    first = image_dict(0, 50, 70)["image"].flip(0)
    assert seen.shape == (2, 3, 64, 96) and torch.equal(seen[0, :, :50, :70], first.float())


def test_it_is_called_with_the_weights(tmp_path: Path) -> None:
    torch.save({"bias": torch.full((5,), 3.0)}, tmp_path / "bias.pth")
    line = "weights and net.fine.bias.data.copy_(torch.load(weights)['bias'])"
    opts = (CODE, True, "MODEL.DISTILL.TEACHER.WEIGHTS", str(tmp_path / "bias.pth"))
    cfg = config(written(tmp_path, line), *opts)
    biases = [
        build_teacher(cfg, trained=trained).model.backbone.network.fine.bias
        for trained in (True, False)
    ]
    assert bool((biases[0] == 3).all()) and not bool((biases[1] == 3).any())


def test_code_runs_only_if_the_user_allows_it(tmp_path: Path) -> None:
    function = written(tmp_path, f"open({str(tmp_path / 'was run')!r}, 'w')")
    with pytest.raises(ConfigError, match=r"is code; add 'MODEL\.ALLOW_CODE True'"):
        build_teacher(config(function))
    opts = ("MODEL.DISTILL.TEACHER.OPTS", [CODE, True])
    with pytest.raises(ConfigError, match="counts only on the command line"):
        build_teacher(config(function, *opts))
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("net = 3", "returns a int, no nn.Module"),
        ("raise OSError('no such disk')", "'build' of .* raises OSError no such disk"),
        ("del Net.strides", "needs an attribute `strides`"),
        ("Net.strides = {'fine': 16}", r"'fine' of stride 16 has shape \(1, 5, 4, 6\)"),
        ("Net.strides = {'other': 32}", "'other' of stride 32 has shape None"),
        ("Net.forward = lambda self, x: [x]", "returns a list, not maps by name"),
    ],
)
def test_wrong_networks(line: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        build_teacher(config(written(tmp_path, line), CODE, True))


@pytest.mark.parametrize(("function", "words"), [("none.py:build", "no file"), ("net.py:x", "'x'")])
def test_wrong_names(function: str, words: str, tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(ConfigError, match=words):
        build_teacher(config(f"{tmp_path}/{function}", CODE, True))


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.slow
def test_the_example_of_torchvision_teaches(tmp_path: Path) -> None:
    page = ROOT / "docs" / "how-to" / "teachers.md"
    (example,) = (x for x in blocks(page, "python") if x.title == "torchvision_teacher.py")
    path = tmp_path / example.title
    path.write_text(example.text)
    keys = ("MODEL.DISTILL.IMA.INSTANCES", "teacher", "MODEL.DISTILL.IMA.INSTANCE_SCORE", 0.0)
    cfg = config(f"{path}:build", CODE, True, HEADS, ("PKD", "IMA"), *keys)
    model = DistillModel(cfg).train()
    model.teacher.model.backbone.network.detector.roi_heads.score_thresh = 0.0
    found = kd_losses(model, [image_dict(0, 64, 80)])
    assert all(x.isfinite() for x in found.values()) and found["loss_ima"] > 0
