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
        ("Net.strides = {'fine': 16}", r"'fine' of stride 16 has shape \(1, 5, 32, 34\)"),
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


def detecting(boxes: str, scores: str, labels: str = "torch.zeros(2)") -> str:
    """A line that lets the network detect the same in every image."""
    found = f"{{'boxes': {boxes}, 'scores': {scores}, 'labels': {labels}}}"
    return f"Net.detect = lambda self, images: [{found} for x in images]"


def test_it_detects(tmp_path: Path) -> None:
    line = detecting("torch.tensor([[1, 2, 30, 40.0]])", "torch.ones(1)", "torch.tensor([1.0])")
    function = written(tmp_path, f"Net.classes = ['a', 'b']; {line}")
    teacher = build_teacher(config(function, CODE, True))
    found = teacher.model.backbone.detect(torch.zeros(2, 3, 32, 32))
    assert [x.pred_classes.tolist() for x in found] == [[1], [1]]
    assert "detections" in teacher.family.outputs and teacher.family.classes == ("a", "b")
    with pytest.raises(ConfigError, match="CLASSES lists 1 names, but the teacher predicts 2"):
        DistillModel(
            config(function, CODE, True, HEADS, ("FitNet",), "MODEL.DISTILL.TEACHER.CLASSES", ["a"])
        )


TWO = ("torch.zeros(2, 4)", "torch.zeros(2)")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (detecting("torch.zeros(2, 4)", "torch.zeros(3)"), r"\(R, 4\), \(R,\) and \(R,\)"),
        (detecting("torch.zeros(2, 5)", "torch.zeros(2)"), r"the shapes must be"),
        ("Net.detect = lambda self, x: {}", "must return a list with a dict per image"),
        ("Net.detect = lambda self, x: [{}]", "the shapes must be"),
        (f"Net.classes = ['a']; {detecting(*TWO, 'torch.ones(2)')}", "it names 1 classes"),
    ],
)
def test_wrong_detections(line: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        build_teacher(config(written(tmp_path, line), CODE, True))


def test_a_network_may_fail_for_an_image(tmp_path: Path) -> None:
    """Its reason is one sentence."""
    cfg = config(written(tmp_path), CODE, True, HEADS, ("Cosine",))
    model = DistillModel(cfg).train()

    def fails(images: torch.Tensor) -> None:
        raise ValueError("too\nlarge")

    model.teacher.model.backbone.network.forward = fails
    with pytest.raises(ConfigError, match=r"^The teacher fails: too large\.$"):
        kd_losses(model, [image_dict(0, 32, 32)])


def example(name: str, folder: Path) -> str:
    """Write an example of the page about teachers; return its function."""
    page = ROOT / "docs" / "how-to" / "teachers.md"
    (found,) = (x for x in blocks(page, "python") if x.title == name)
    (folder / name).write_text(found.text)
    return f"{folder / name}:build"


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.slow
def test_the_example_of_torchvision_teaches(tmp_path: Path) -> None:
    keys = ("MODEL.DISTILL.IMA.INSTANCES", "teacher", "MODEL.DISTILL.IMA.INSTANCE_SCORE", 0.0)
    function = example("torchvision_teacher.py", tmp_path)
    cfg = config(function, CODE, True, HEADS, ("PKD", "IMA"), *keys)
    model = DistillModel(cfg).train()
    model.teacher.model.backbone.network.detector.roi_heads.score_thresh = 0.0
    found = kd_losses(model, [image_dict(0, 64, 80)])
    assert all(x.isfinite() for x in found.values()) and found["loss_ima"] > 0


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.slow
def test_the_example_of_transformers_teaches(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    keys = ("MODEL.DISTILL.IMA.INSTANCES", "teacher", "MODEL.DISTILL.IMA.INSTANCE_SCORE", 0.3)
    function = example("huggingface_teacher.py", tmp_path)
    model = DistillModel(config(function, CODE, True, HEADS, ("PKD", "IMA"), *keys)).train()
    found = kd_losses(model, [image_dict(0, 200, 250)])
    assert all(x.isfinite() for x in found.values()) and found["loss_ima"] > 0
    assert model.teacher.family.classes == ("LABEL_0", "LABEL_1")
