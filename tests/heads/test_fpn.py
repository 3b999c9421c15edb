"""Level matching, adapters, alignment of unlike canvases."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from distill.errors import ConfigError
from distill.heads import FGD, FGFI, FKD, FRS, MGD, PKD, DeFeat, FitNet, FPNDistillHead, ReviewKD
from distill.heads.fpn import Level, match_levels
from distill.structures import NetworkInfo
from tests.support.heads import BOXES, ground_truth, two_level_head
from tests.support.networks import built_head, feature_head, outputs, tiny_cfg

BOX = (0.0, 0.0, 32.0, 32.0)


def levels_of(channels=4, **strides):
    return {name: ShapeSpec(channels=channels, stride=s) for name, s in strides.items()}


def pairs(student, teacher, names=()):
    return [(x.student, x.teacher) for x in match_levels(student, teacher, names)]


FPN = levels_of(p2=4, p3=8, p4=16, p5=32, p6=64)


def test_levels_pair_by_equal_stride_whatever_their_names():
    teacher = levels_of(c5=32, c4=16, c3=8)
    assert match_levels(FPN, teacher, ()) == [
        Level("p3", "c3", 8, 8),
        Level("p4", "c4", 16, 16),
        Level("p5", "c5", 32, 32),
    ]


def test_named_levels_alone_are_paired_finest_first():
    assert pairs(FPN, FPN, ("p5", "p3")) == [("p3", "p3"), ("p5", "p5")]


def test_a_named_level_without_equal_stride_takes_the_nearest():
    teacher = levels_of(a=8, b=32)
    assert match_levels(FPN, teacher, ("p2", "p3", "p6")) == [
        Level("p2", "a", 4, 8),
        Level("p3", "a", 8, 8),
        Level("p6", "b", 64, 32),
    ]


def test_networks_without_an_equal_stride_pair_all_levels_with_the_nearest():
    teacher = levels_of(z=16, w=32)
    assert pairs(levels_of(x=4, y=8), teacher) == [("x", "z"), ("y", "z")]


def test_a_teacher_of_one_stride_is_paired_with_the_nearest_level():
    assert pairs(FPN, levels_of(tokens=14)) == [("p4", "tokens")]
    assert pairs(FPN, levels_of(early=16, late=16)) == [("p4", "late")]
    assert pairs(levels_of(res4=16, res5=16), levels_of(a=14, b=14, c=14)) == [
        ("res4", "b"),
        ("res5", "c"),
    ]


def test_dilated_stages_pair_the_deepest_with_the_deepest():
    plain = levels_of(res3=8, res4=16, res5=32)
    dilated = levels_of(res3=8, res4=16, res5=16)
    assert pairs(dilated, dilated) == [("res3", "res3"), ("res4", "res4"), ("res5", "res5")]
    assert pairs(dilated, plain) == [("res3", "res3"), ("res4", "res4"), ("res5", "res4")]
    assert pairs(plain, dilated) == [("res3", "res3"), ("res4", "res5")]
    more_dilated = levels_of(res3=8, res4=8, res5=8)
    assert pairs(more_dilated, dilated) == [("res3", "res3"), ("res4", "res3"), ("res5", "res3")]


def test_an_unknown_level_is_named_with_the_nearest_first():
    with pytest.raises(ConfigError) as e:
        match_levels(levels_of(res4=16, p33=8, p4=16), FPN, ("p4", "p3"))
    assert str(e.value) == (
        "IN_FEATURES: the student's backbone has no output 'p3'; it has: p33, p4, res4."
    )


def ramp(stride, height, width):
    """(1, 2, H, W): x and y of each cell's centre in pixels."""
    y, x = ((torch.arange(n) + 0.5) * stride for n in (height, width))
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)])[None]


def test_equal_maps_pass_untouched():
    student, teacher = torch.randn(2, 1, 1, 4, 4)
    ((s, t),) = feature_head(FitNet).maps(
        outputs((32, 32), p3=student), outputs((32, 32), p3=teacher)
    )
    assert torch.equal(s, student)
    assert torch.equal(t, teacher)


def test_the_teachers_padding_is_cut_not_resized():
    student = ramp(8, 4, 5)
    teacher = torch.full((1, 2, 8, 8), 1e6)
    teacher[..., :4, :5] = student
    one = feature_head(FitNet, channels=(2, 2))
    ((s, t),) = one.maps(outputs((32, 40), p3=student), outputs((32, 40), p3=teacher))
    assert torch.equal(t, s)


@pytest.mark.parametrize("padding", [0, 3])
def test_a_finer_teacher_is_averaged_to_the_students_cells(padding):
    student, teacher = ramp(16, 3, 2), torch.full((1, 2, 6 + padding, 4 + padding), 1e6)
    teacher[..., :6, :4] = ramp(8, 6, 4)
    one = feature_head(FitNet, level=Level("p4", "p3", 16, 8), channels=(2, 2))
    ((s, t),) = one.maps(outputs((48, 32), p4=student), outputs((48, 32), p3=teacher))
    torch.testing.assert_close(t, s)  # centres average to the centre


@pytest.mark.parametrize("padding", [0, 2])
def test_a_coarser_teacher_is_interpolated_at_the_students_cells(padding):
    student, teacher = ramp(8, 8, 6), torch.full((1, 2, 4 + padding, 3 + padding), 1e6)
    teacher[..., :4, :3] = ramp(16, 4, 3)
    one = feature_head(FitNet, level=Level("p3", "p4", 8, 16), channels=(2, 2))
    ((s, t),) = one.maps(outputs((64, 48), p3=student), outputs((64, 48), p4=teacher))
    inside = (..., slice(1, -1), slice(1, -1))  # beyond the outer centres nothing is known
    torch.testing.assert_close(t[inside], s[inside])
    assert t.max() < 64


def test_a_canvas_that_is_no_multiple_of_the_stride_keeps_its_last_cell():
    teacher = ramp(16, 4, 4)
    one = feature_head(FitNet, level=Level("p4", "p4", 16, 16), channels=(2, 2))
    student = outputs((40, 56), p4=torch.zeros(1, 2, 3, 4))
    ((_, t),) = one.maps(student, outputs((40, 56), p4=teacher))
    assert torch.equal(t, teacher[..., :3, :])


def test_adapters_only_where_channels_differ():
    levels = [Level("p3", "p3", 8, 8), Level("p4", "p4", 16, 16)]
    both = FitNet(levels=levels, channels=[(2, 2), (2, 5)])
    assert isinstance(both.adapters["p3"], nn.Identity)
    assert {k: tuple(v.shape) for k, v in both.state_dict().items()} == {
        "adapters.p4.weight": (5, 2, 1, 1),
        "adapters.p4.bias": (5,),
    }


def test_the_adapter_acts_on_the_student():
    one = feature_head(FitNet, channels=(1, 2))
    with torch.no_grad():
        one.adapters["p3"].weight[:, 0, 0, 0] = torch.tensor([2.0, 3.0])
        one.adapters["p3"].bias[:] = torch.tensor([0.0, 1.0])
    student, teacher = torch.ones(1, 1, 2, 2), torch.zeros(1, 2, 2, 2)
    ((s, _),) = one.maps(outputs((16, 16), p3=student), outputs((16, 16), p3=teacher))
    assert s[0, :, 0, 0].tolist() == [2, 4]
    losses = one(outputs((16, 16), p3=student), outputs((16, 16), p3=teacher))
    assert losses["loss_fitnet/p3"] == (4 + 16) / 2


def test_levels_are_averaged_and_named():
    levels = [Level("p3", "p3", 8, 8), Level("p4", "p4", 16, 16)]
    both = FitNet(levels=levels, channels=[(1, 1), (1, 1)], weight=10.0)
    student = outputs((16, 16), p3=torch.full((1, 1, 2, 2), 2.0), p4=torch.full((1, 1, 1, 1), 3.0))
    teacher = outputs((16, 16), p3=torch.zeros(1, 1, 2, 2), p4=torch.zeros(1, 1, 1, 1))
    assert {k: v.item() for k, v in both(student, teacher).items()} == {
        "loss_fitnet/p3": 10 * 4 / 2,
        "loss_fitnet/p4": 10 * 9 / 2,
    }


def test_a_subclass_writes_one_method():
    class StrideTimesGap(FPNDistillHead):
        def loss(self, student, teacher, stride, batch):
            return stride * (student - teacher).mean() + batch.padded_size[0]

    one = feature_head(StrideTimesGap)
    student, teacher = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    losses = one(outputs((32, 32), p3=student), outputs((32, 32), p3=teacher))
    assert losses == {"loss_stridetimesgap/p3": 8 + 32}


@pytest.mark.parametrize("teacher_channels, parameters", [(16, 0), (24, 5 * (16 * 24 + 24))])
def test_built_from_a_config(teacher_channels, parameters):
    fitnet_head = built_head(FitNet, "retinanet", teacher_channels=teacher_channels)
    assert [x.student for x in fitnet_head.levels] == ["p2", "p3", "p4", "p5", "p6"]
    assert sum(p.numel() for p in fitnet_head.parameters()) == parameters


def test_named_features_of_a_config():
    fitnet_head = built_head(FitNet, "retinanet", "MODEL.DISTILL.FITNET.IN_FEATURES", ("p4", "p3"))
    assert [x.student for x in fitnet_head.levels] == ["p3", "p4"]


def test_a_spec_is_all_that_a_feature_head_reads():
    spec = NetworkInfo("student", ("Net",), FPN, frozenset({"features"}), ())
    wide = NetworkInfo("teacher", ("Net",), levels_of(8, c4=16), frozenset({"features"}), ())
    fitnet_head = FitNet(tiny_cfg("retinanet"), spec, wide)
    assert fitnet_head.levels == [Level("p4", "c4", 16, 16)]
    assert fitnet_head.adapters["p4"].out_channels == 8


# ---- Tests of several methods.


@pytest.mark.parametrize("cls", [FGFI, DeFeat])
def test_adapters_of_fgfi_and_defeat_start_small(cls):
    convolution = cls.adapter(64, 128)
    assert isinstance(convolution, nn.Conv2d) and convolution.kernel_size == (3, 3)
    weight = convolution.weight
    assert weight.abs().max() <= 2e-4  # normal, cut at two deviations, which leaves 0.88 of them
    assert weight.std().item() == pytest.approx(0.88e-4, rel=0.02)
    assert convolution.bias.abs().max() > 1e-3  # as torch has it


@pytest.mark.parametrize("cls", [FGFI, DeFeat, FRS])
def test_equal_channels_are_adapted_too(cls):
    assert sum(p.numel() for p in cls.adapter(4, 4).parameters()) == 4 * 4 * 9 + 4


@pytest.mark.parametrize("cls", [PKD, MGD, FGD, DeFeat, FKD, ReviewKD])
def test_the_one_cell_of_one_image_trains(cls):
    keys = {
        MGD: {"mask_ratio": 0.0, "seed": 0},
        FGD: {"temperature": 0.5, "alpha": 2.0, "beta": 0.7, "gamma": 0.3, "lambda_": 0.05},
        DeFeat: {"foreground_weight": 3.0, "background_weight": 12.0},
        FKD: {"temperature": 0.5, "attention_weight": 1.0, "pooled_weight": 1.0}
        | {"relation_weight": 1.0},
    }
    head = two_level_head(cls, **keys.get(cls, {}))
    maps = [torch.randn(1, c, k, k).double() for c in (3, 4) for k in (2, 1)]
    for x in maps[:2]:
        x.requires_grad_()
    own = ground_truth([BOXES[0][:1]])
    student = outputs((16, 16), own, p3=maps[0], p4=maps[1])
    found = head(student, outputs((16, 16), own, c3=maps[2], c4=maps[3]))
    total = sum(found.values())
    total.backward()
    assert total.isfinite() and all(x.grad.isfinite().all() for x in maps[:2])
    assert all(p.grad.isfinite().all() for p in head.parameters())
