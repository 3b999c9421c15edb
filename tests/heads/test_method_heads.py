"""The heads of the comparison methods on hand-made outputs, against their formulas.

Expected values are computed from the maps, the boxes and the head's own parameters, without
distill.losses: by tests/reference/literal_methods.py and plain loops.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from distill.heads import DKD, FGD, FGFI, FKD, FRS, KD, MGD, PKD, DeFeat, ReviewKD
from distill.heads.classes import ClassMap
from distill.heads.dense import AnchorGrids
from distill.heads.fgd import GlobalContext
from distill.heads.fkd import NonLocal
from distill.heads.fpn import Level
from distill.heads.review import MIDDLE, AttentionBasedFusion
from distill.structures import DenseLayout, DenseOutputs, ROIs
from tests.reference import literal_methods as literal
from tests.support.networks import built_head, outputs

CANVAS = (64, 80)  # the second image is smaller
SIZES = {"p3": (8, 10), "p4": (4, 5)}
LEVELS = [Level("p3", "c3", 8, 8), Level("p4", "c4", 16, 16)]
BOXES = [[[3.0, 5.0, 42.0, 37.0], [8.0, 8.0, 16.0, 16.0], [30.5, 20.25, 79.0, 60.0]], []]
CLASSES = ("circle", "square", "star")


def truth(boxes=None):
    found = []
    for size, own in zip([CANVAS, (48, 64)], BOXES if boxes is None else boxes):
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor(own).reshape(-1, 4))
        instances.gt_classes = torch.arange(len(own))
        found.append(instances)
    return found


def heard(student=3, teacher=4, boxes=None, seed=0):
    """Return outputs of two networks with so many channels for two images, in float64."""
    g = torch.Generator().manual_seed(seed)

    def maps(channels, prefix):
        return {
            f"{prefix}{name[1]}": torch.randn(2, channels, *size, generator=g).double()
            for name, size in SIZES.items()
        }

    ours, theirs = maps(student, "p"), maps(teacher, "c")
    for x in ours.values():
        x.requires_grad_()
    return outputs(CANVAS, truth(boxes), **ours), outputs(CANVAS, truth(boxes), **theirs)


def of_both_levels(cls, channels=(3, 4), **kw):
    torch.manual_seed(0)
    return cls(levels=LEVELS, channels=[channels] * 2, **kw).double()


def number(x):
    return x.detach().double().numpy()


def pairs(head, student, teacher):
    """Level names, adapted student maps and teacher maps as arrays."""
    for level in LEVELS:
        s = head.adapters[level.student](student.features[level.student])
        yield level.student, number(s), number(teacher.features[level.teacher])


def check(head, student, teacher, expected):
    """The head's losses are the expected ones, and its gradient reaches all that learns."""
    found = head(student, teacher)
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=1e-6)
    assert all(abs(x) > 1e-9 for x in expected.values())
    sum(found.values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in student.features.values())
    assert all(p.grad is not None for p in head.parameters())
    assert all(not x.requires_grad for x in teacher.features.values())


# ---- PKD


@pytest.mark.parametrize("channels", [(4, 4), (3, 4)])
def test_pkd_is_a_sum_over_the_levels(channels):
    head, (student, teacher) = of_both_levels(PKD, channels, weight=6.0), heard(*channels)
    assert isinstance(head.adapters["p3"], nn.Identity if channels == (4, 4) else nn.Conv2d)
    expected = {
        f"loss_pkd/{name}": 6 * literal.pkd(s, t) for name, s, t in pairs(head, student, teacher)
    }
    check(head, student, teacher, expected)


# ---- MGD


def generated(generator, x):
    first, activation, last = generator
    assert isinstance(activation, nn.ReLU)
    assert {x.weight.shape for x in (first, last)} == {(4, 4, 3, 3)}
    hidden = F.conv2d(torch.from_numpy(x), first.weight, first.bias, padding=1).clamp(min=0)
    return number(F.conv2d(hidden, last.weight, last.bias, padding=1))


@pytest.mark.parametrize("channels", [(4, 4), (3, 4)])
def test_mgd_generates_the_teacher_from_what_is_kept_of_the_student(channels):
    head = of_both_levels(MGD, channels, weight=0.5, mask_ratio=0.65, seed=7)
    student, teacher = heard(*channels)
    g = torch.Generator().manual_seed(7)
    expected = {}
    for name, s, t in pairs(head, student, teacher):
        drawn = torch.rand(2, 1, *SIZES[name], generator=g)
        keep = (drawn <= 1 - 0.65).double().numpy()
        value = literal.mgd(s, t, lambda x, n=name: generated(head.generators[n], x), keep)
        expected[f"loss_mgd/{name}"] = 0.5 * value
    check(head, student, teacher, expected)


class Kept(nn.Module):
    """A generator that shows the cells it is given."""

    def forward(self, x):
        self.cells = x[:, 0] != 0
        assert torch.equal(self.cells, x[:, 1] != 0)  # all channels of a cell together
        return x


def masks(head, calls=1):
    ones = outputs(CANVAS, p3=torch.ones(4, 2, 50, 60), p4=torch.ones(4, 2, 25, 30))
    other = outputs(CANVAS, c3=ones.features["p3"], c4=ones.features["p4"])
    seen = []
    for _ in range(calls):
        head(ones, other)
        seen += [head.generators[name].cells for name in SIZES]
    return seen


def masking(ratio=0.65, seed=7):
    head = MGD(levels=LEVELS, channels=[(2, 2)] * 2, mask_ratio=ratio, seed=seed)
    for name in SIZES:
        head.generators[name] = Kept()
    return head


def test_mgds_masks_come_from_the_seed_alone():
    heads = masking(), masking()
    before = torch.get_rng_state()
    first, again = (masks(x, calls=2) for x in heads)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], first[2]) and not torch.equal(first[1], first[3])
    assert not torch.equal(first[0][0], first[0][1])  # sums over two images
    assert not torch.equal(first[0], masks(masking(seed=8))[0])


@pytest.mark.parametrize("ratio", [0.0, 0.45, 0.65, 0.75])
def test_mgd_masks_a_share_of_lambda_out(ratio):
    share = 1 - masks(masking(ratio))[0].double().mean().item()  # over 12000 cells
    assert share == pytest.approx(ratio, abs=4 * (ratio * (1 - ratio) / 12000) ** 0.5)


def test_mgds_masks_start_anew_where_the_trainer_reseeds():
    head = masking()
    first = masks(head)
    head.random.reseed(7)
    assert torch.equal(masks(head)[0], first[0])


# ---- FGD


def with_context(block, x):
    """Return a map after its context block, by loops over images and cells."""
    down, norm, activation, up = block.transform
    assert isinstance(activation, nn.ReLU) and isinstance(norm, nn.LayerNorm)
    weight, bias = number(block.where.weight)[0, :, 0, 0], block.where.bias.item()
    result = x.copy()
    for n, image in enumerate(x):
        logits = np.einsum("chw,c->hw", image, weight) + bias
        share = literal.softmax(logits.ravel()).reshape(logits.shape)
        context = (image * share).sum((1, 2))
        hidden = number(down.weight)[:, :, 0, 0] @ context + number(down.bias)
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + norm.eps)
        hidden = hidden * number(norm.weight).ravel() + number(norm.bias).ravel()
        hidden = np.maximum(hidden, 0)
        added = number(up.weight)[:, :, 0, 0] @ hidden + number(up.bias)
        result[n] += added[:, None, None]
    return result


FACTORS = {"alpha": 2.0, "beta": 0.7, "gamma": 0.3, "lambda_": 0.05}


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("channels", [(4, 4), (3, 4)])
def test_fgd_is_its_four_terms(channels, started):
    head = of_both_levels(FGD, channels, weight=3.0, temperature=0.8, **FACTORS)
    if started:
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.5)
    student, teacher = heard(*channels)
    expected = {}
    for name, s, t in pairs(head, student, teacher):
        terms = literal.fgd(s, t, BOXES, CANVAS, 0.8)
        relation = literal.fgd_relation(
            *(with_context(block, x) for block, x in zip(head.contexts[name], (s, t)))
        )
        value = sum(f * x for f, x in zip(FACTORS.values(), (*terms, relation)))
        expected[f"loss_fgd/{name}"] = 3 * value
    check(head, student, teacher, expected)


def test_fgds_relation_is_the_squared_distance_at_the_start():
    off = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "lambda_": 1.0}
    head, (student, teacher) = of_both_levels(FGD, (4, 4), temperature=0.5, **off), heard(4, 4)
    found = head(student, teacher)
    for name, s, t in pairs(head, student, teacher):
        assert found[f"loss_fgd/{name}"].item() == pytest.approx(((s - t) ** 2).sum() / 2)


def test_fgds_blocks_are_of_each_network_and_level():
    head = of_both_levels(FGD, (3, 4), temperature=0.5, **FACTORS)
    blocks = [block for pair in head.contexts.values() for block in pair]
    assert len({id(p) for block in blocks for p in block.parameters()}) == 4 * 8
    for block in blocks:
        assert block.transform[0].weight.shape == (2, 4, 1, 1)
        last = block.transform[-1]
        assert not any(x.any() for x in (block.where.bias, last.weight, last.bias))


def test_a_context_block_starts_with_kaimings_deviation():
    torch.manual_seed(0)
    weights = torch.cat([GlobalContext(256).where.weight.flatten() for _ in range(40)])
    assert weights.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.03)  # fan in, gain √2


def test_fgd_without_any_box_has_no_foreground():
    weights = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0, "lambda_": 0.0}
    head = of_both_levels(FGD, (4, 4), temperature=0.5, **weights)
    found = head(*heard(4, 4, boxes=[[], []]))
    assert all(x == 0 for x in found.values())
    sum(found.values()).backward()
    assert all(p.grad is not None for p in head.parameters())


# ---- FGFI and DeFeat


SIDES = {"p3": (12.0, 24.0), "p4": (30.0, 60.0)}  # sides of both anchors of a cell


def layout(offset=0.5):
    """Two square anchors a cell of either level."""
    cells = [torch.tensor([[-s / 2, -s / 2, s / 2, s / 2] for s in SIDES[n]]) for n in SIZES]
    return DenseLayout(False, [*SIZES], [8, 16], cells, offset, (0.4, 0.5))


def anchors_of(name, offset=0.5):
    """(H, W, A, 4) by loops."""
    (height, width), stride = SIZES[name], 8 if name == "p3" else 16
    grid = np.zeros((height, width, 2, 4))
    for i, j, a in np.ndindex(height, width, 2):
        x, y, half = (j + offset) * stride, (i + offset) * stride, SIDES[name][a] / 2
        grid[i, j, a] = [x - half, y - half, x + half, y + half]
    return grid


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_the_grids_are_the_anchors(offset):
    for found, name in zip(AnchorGrids(layout(offset))([*SIZES.values()]), SIZES):
        np.testing.assert_array_equal(found.numpy(), anchors_of(name, offset))


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_fgfi_imitates_near_the_objects(threshold):
    """An object is compared with the anchors of both levels."""
    grids = AnchorGrids(layout())
    head = of_both_levels(FGFI, grids=grids, threshold=threshold, weight=10.0)
    for adapter in head.adapters.values():
        nn.init.normal_(adapter.weight)
    student, teacher = heard()
    every = np.concatenate([anchors_of(n).reshape(1, -1, 2, 4) for n in SIZES], 1)
    near = np.stack([literal.fgfi_mask(every, boxes, threshold)[0] for boxes in BOXES])
    near = dict(zip(SIZES, np.split(near, [80], axis=1)))
    assert all(0 < x[0].mean() < 1 and not x[1].any() for x in near.values())
    expected = {}
    for name, s, t in pairs(head, student, teacher):
        mask = near[name].reshape(2, *SIZES[name])
        expected[f"loss_fgfi/{name}"] = 10 * literal.fgfi(s, t, mask)
    check(head, student, teacher, expected)


def test_defeat_has_each_object_on_one_level():
    head = of_both_levels(DeFeat, foreground_weight=3.0, background_weight=12.0)
    boxes = [[*BOXES[0], [-40.0, -40.0, 100.0, 90.0]], [[17.0, 18.0, 21.0, 22.0]]]
    student, teacher = heard(boxes=boxes)
    for adapter in head.adapters.values():
        nn.init.normal_(adapter.weight)
    assert [literal.defeat_level(x, 2) for x in boxes[0]] == [0, 0, 0, 1]
    expected = {}
    for k, (name, s, t) in enumerate(pairs(head, student, teacher)):
        mask = np.stack([literal.defeat_mask(x, *SIZES[name], 8 * 2**k, k, 2) for x in boxes])
        assert 0 < mask.mean() < 1
        inside, outside = literal.defeat(s, t, mask)
        expected[f"loss_defeat/{name}"] = (3 * inside + 12 * outside) / 2
    check(head, student, teacher, expected)


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


# ---- FRS


def dense(classes=3, seed=3):
    """(N, H·W·A, K) logits a level, two anchors a cell, of both networks."""
    g = torch.Generator().manual_seed(seed)
    rows = {name: h * w * 2 for name, (h, w) in SIZES.items()}
    logits = [
        [torch.randn(2, r, classes, generator=g).double() * 2 for r in rows.values()]
        for _ in range(2)
    ]
    return [DenseOutputs(x, [], [*SIZES.values()]) for x in logits]


@pytest.mark.parametrize("shared", [CLASSES, ("star", "hexagon", "circle")])
def test_frs_weighs_cells_by_the_teachers_best_class(shared):
    """The score is of all classes that the teacher knows, the class term of those of both."""
    head = of_both_levels(
        FRS,
        classes=ClassMap(CLASSES, shared),
        feature_weight=0.5,
        class_weight=2.0,
        weight=3.0,
    )
    student, teacher = heard()
    student.dense, teacher.dense = dense()
    for x in student.dense.logits:
        x.requires_grad_()
    columns = ([0, 1, 2], [0, 1, 2]) if shared == CLASSES else ([0, 2], [2, 0])
    expected = {}
    for k, (name, s, t) in enumerate(pairs(head, student, teacher)):
        height, width = SIZES[name]
        ours, theirs = (
            number(x.dense.logits[k]).reshape(2, height, width, 2, 3) for x in (student, teacher)
        )
        score = literal.expit(theirs).max((3, 4))
        picked = [x[..., c].reshape(2, height, width, -1) for x, c in zip((ours, theirs), columns)]
        logits = [x.transpose(0, 3, 1, 2) for x in picked]
        expected[f"loss_frs/{name}/feature"] = 1.5 * literal.frs(s, t, score)
        expected[f"loss_frs/{name}/class"] = 6 * literal.frs_classes(*logits, score)
    check(head, student, teacher, expected)
    assert all(x.grad.abs().sum() > 0 for x in student.dense.logits)


def test_frs_warms_up_linearly_for_500_iterations():
    head = built_head(FRS, "retinanet")
    for iteration, factor in ((0, 0.0), (250, 0.5), (500, 1.0), (10**5, 1.0)):
        with EventStorage(iteration):
            assert head.factor() == factor


# ---- FKD


def non_local(block, x):
    """Return z = x + W(y), y by loops over images, cells and pooled cells."""
    query, key, value = (
        number(F.conv2d(torch.from_numpy(x), f.weight, f.bias))
        for f in (block.query, block.key, block.value)
    )
    stride = block.pool.kernel_size
    read = np.zeros_like(query)
    height, width = x.shape[2:]
    for n in range(len(x)):
        keys, values = [], []
        for top in range(0, height, stride):
            for left in range(0, width, stride):
                cell = (n, slice(None), slice(top, top + stride), slice(left, left + stride))
                keys.append(key[cell].max((1, 2)))
                values.append(value[cell].max((1, 2)))
        for i, j in np.ndindex(height, width):
            for k, v in zip(keys, values):
                read[n, :, i, j] += query[n, :, i, j] @ k * v / len(keys)
    convolution, norm = block.outside
    out = np.einsum("oc,nchw->nohw", number(convolution.weight)[:, :, 0, 0], read)
    out += number(convolution.bias)[:, None, None]
    return x + batch_normalized(norm, out)


def batch_normalized(norm, x):
    """As in training."""
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    scale, shift = (number(p)[:, None, None] for p in (norm.weight, norm.bias))
    return (x - mean) / np.sqrt(variance + norm.eps) * scale + shift


def length(gap):
    return np.sqrt((gap**2).sum())


@pytest.mark.parametrize("started", [False, True])
def test_fkd_is_its_four_lengths(started):
    weights = {"attention_weight": 2.0, "pooled_weight": 0.5, "relation_weight": 0.3}
    head = of_both_levels(FKD, temperature=0.5, weight=3.0, **weights)
    if started:
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.3)
    student, teacher = heard()
    expected = {}
    for name, s, t in pairs(head, student, teacher):
        assert s.shape[1] == 3  # not adapted before
        own = head.compared[name]
        adapted = number(own.map(torch.from_numpy(s)))
        mask = [
            (literal.spatial_attention(a, 0.5) + literal.spatial_attention(b, 0.5)) / 2
            for a, b in zip(s, t)
        ]
        weighted = np.stack(mask).reshape(2, 1, *SIZES[name])
        attended = length(np.sqrt(weighted) * (adapted - t))
        means = s.mean((2, 3)) @ number(own.channels.weight).T + number(own.channels.bias)
        channels = length(means - t.mean((2, 3)))
        across = torch.from_numpy(s.mean(1, keepdims=True))
        cells = length(
            number(F.conv2d(across, own.cells.weight, own.cells.bias, padding=1))
            - t.mean(1, keepdims=True)
        )
        related = number(own.relation(torch.from_numpy(non_local(own.of_student, s))))
        relation = length(related - non_local(own.of_teacher, t))
        value = 2 * attended + 0.5 * (channels + cells) + 0.3 * relation
        expected[f"loss_fkd/{name}"] = 3 * value
    check(head, student, teacher, expected)


def test_fkds_attended_term_is_the_literal_one():
    head = of_both_levels(
        FKD, (4, 4), temperature=0.5, attention_weight=1.0, pooled_weight=0.0, relation_weight=0.0
    )
    for own in head.compared.values():
        nn.init.dirac_(own.map.weight)
        nn.init.zeros_(own.map.bias)
    student, teacher = heard(4, 4)
    found = head(student, teacher)
    for name, s, t in pairs(head, student, teacher):
        expected = literal.fkd_attention(s, t, 0.5)
        assert found[f"loss_fkd/{name}"].item() == pytest.approx(expected)


def test_fkds_non_local_block_starts_as_the_identity():
    torch.manual_seed(0)
    block, x = NonLocal(6, 4, 2), torch.randn(2, 6, 5, 7)
    assert torch.equal(block(x), x)
    nn.init.ones_(block.outside[1].weight)
    assert (block(x) - x).abs().max() > 0.1


def test_fkds_relation_of_large_maps_fits_half_precision():
    """Sums over keys would overflow before they are divided by their number."""
    block = NonLocal(2, 4, 2)
    for layer in (block.key, block.value):
        nn.init.constant_(layer.bias, 20.0)
    nn.init.ones_(block.outside[1].weight)
    with torch.autocast("cpu", torch.float16):
        out = block(torch.randn(1, 2, 64, 64))  # 1024 keys of 400
    assert out.isfinite().all()


def test_fkds_sizes_are_the_authors():
    head = built_head(FKD, "faster", teacher_channels=24)
    blocks = [head.compared[f"p{k}"].of_student for k in range(2, 7)]
    assert [x.pool.kernel_size for x in blocks] == [8, 4, 2, 2, 2]
    assert [x.query.out_channels for x in blocks] == [64, 64, 128, 128, 128]
    assert {head.compared[f"p{k}"].of_teacher.query.in_channels for k in range(2, 7)} == {24}


# ---- ReviewKD


def fused(block, x, coarser):
    """Return the compared map and the one for the finer level, by loops over cells."""
    inside, norm = block.inside
    x = batch_normalized(norm, np.einsum("oc,nchw->nohw", number(inside.weight)[:, :, 0, 0], x))
    if coarser is not None:
        height, width = x.shape[2:]
        y = np.zeros_like(x)
        for i, j in np.ndindex(height, width):
            nearest = i * coarser.shape[2] // height, j * coarser.shape[3] // width
            y[:, :, i, j] = coarser[:, :, nearest[0], nearest[1]]
        weight = number(block.attention.weight)[:, :, 0, 0]
        logits = np.einsum("oc,nchw->nohw", weight, np.concatenate([x, y], 1))
        share = literal.expit(logits + number(block.attention.bias)[:, None, None])
        x = share[:, :1] * x + share[:, 1:] * y
    outside, norm = block.outside
    made = number(F.conv2d(torch.from_numpy(x), outside.weight, padding=1))
    return batch_normalized(norm, made), x


def test_reviewkd_fuses_from_coarse_to_fine():
    head, (student, teacher) = of_both_levels(ReviewKD, weight=2.0), heard()
    coarser, expected = None, {}
    for name, s, t in reversed([*pairs(head, student, teacher)]):
        assert s.shape[1] == 3  # not adapted before
        made, coarser = fused(head.fusions[name], s, coarser)
        expected[f"loss_reviewkd/{name}"] = 2 * literal.hcl([made], [t])
    check(head, student, teacher, expected)


def test_reviewkds_convolutions_start_as_the_authors_have_them():
    torch.manual_seed(0)
    block = AttentionBasedFusion(16, 24, coarsest=False)
    for convolution, fan in ((block.inside[0], 16), (block.outside[0], MIDDLE * 9)):
        assert convolution.bias is None
        bound = (3 / fan) ** 0.5  # kaiming_uniform with a = 1 has gain 1
        assert 0.99 * bound < convolution.weight.abs().max() <= bound
    bound = (1 / (2 * MIDDLE)) ** 0.5  # torch's own
    assert 0.95 * bound < block.attention.weight.abs().max() <= bound
    assert block.attention.weight.shape == (2, 2 * MIDDLE, 1, 1)
    assert AttentionBasedFusion(16, 24, coarsest=True).attention is None


def test_the_coarsest_level_alone_has_nothing_to_fuse():
    head = built_head(ReviewKD, "faster")
    assert [n for n in head.fusions if head.fusions[n].attention is None] == ["p6"]


# ---- KD and DKD


def boxes(rows=7, classes=3, stages=1):
    """Return both networks' outputs for boxes of so many stages, with float64 logits."""
    g = torch.Generator().manual_seed(stages)
    found = []
    for _ in range(2):
        found.append(
            [
                ROIs(
                    [torch.zeros(rows, 4)],
                    torch.randn(rows, classes + 1, generator=g).double() * 2,
                    torch.zeros(rows, 1, 4),
                    torch.arange(rows) % (classes + 1),  # the last is background
                )
                for _ in range(stages)
            ]
        )
    student, teacher = outputs(CANVAS), outputs(CANVAS)
    student.rois, teacher.rois = found
    for x in student.rois:
        x.logits.requires_grad_()
    return student, teacher


ROI_HEADS = {
    KD: ({"temperature": 2.0}, lambda s, t, labels: literal.kd(s, t, 2.0)),
    DKD: (
        {"alpha": 1.5, "beta": 0.25, "temperature": 2.0},
        lambda s, t, labels: literal.dkd(s, t, labels, 1.5, 0.25, 2.0),
    ),
}
of_boxes = pytest.mark.parametrize("cls", ROI_HEADS)


@of_boxes
@pytest.mark.parametrize("stages", [1, 3])
def test_box_heads_are_means_over_all_sampled_boxes_and_stages(cls, stages):
    keys, formula = ROI_HEADS[cls]
    student, teacher = boxes(stages=stages)
    head = cls(classes=ClassMap(CLASSES, CLASSES), weight=3.0, **keys)
    (found,) = head(student, teacher).values()
    each = [
        formula(number(s.logits), number(t.logits), s.labels.numpy())
        for s, t in zip(student.rois, teacher.rois)
    ]
    assert found.item() == pytest.approx(3 * np.mean(each))
    found.backward()
    assert all((x.logits.grad.abs().sum(1) > 0).all() for x in student.rois)


@of_boxes
def test_box_heads_leave_out_what_the_teacher_does_not_know(cls):
    """The teacher's classes are star, hexagon, circle: nothing is said of boxes of squares."""
    keys, formula = ROI_HEADS[cls]
    student, teacher = boxes()
    head = cls(classes=ClassMap(CLASSES, ("star", "hexagon", "circle")), **keys)
    (found,) = head(student, teacher).values()
    known = np.arange(7) % 4 != 1
    s, t = number(student.rois[0].logits), number(teacher.rois[0].logits)
    s, t = s[known][:, [0, 2, 3]], t[known][:, [2, 0, 3]]
    labels = np.array([0, -1, 1, 2])[np.arange(7) % 4][known]
    assert found.item() == pytest.approx(formula(s, t, labels))


@of_boxes
def test_no_sampled_box_is_a_connected_zero(cls):
    student, teacher = boxes(rows=0)
    head = cls(classes=ClassMap(CLASSES, CLASSES), **ROI_HEADS[cls][0])
    (found,) = head(student, teacher).values()
    found.backward()
    assert found == 0 and student.rois[0].logits.grad is not None


@of_boxes
def test_box_heads_have_the_authors_keys(cls):
    head = built_head(cls, "faster")
    assert head.weight == 1 and head.temperature == 1
    assert cls is KD or (head.alpha, head.beta) == (1, 0.25)


# ---- Maps of a single cell


@pytest.mark.parametrize("cls", [PKD, MGD, FGD, DeFeat, FKD, ReviewKD])
def test_the_one_cell_of_one_picture_trains(cls):
    keys = {
        MGD: {"mask_ratio": 0.0, "seed": 0},
        FGD: {"temperature": 0.5, **FACTORS},
        DeFeat: {"foreground_weight": 3.0, "background_weight": 12.0},
        FKD: {"temperature": 0.5, "attention_weight": 1.0, "pooled_weight": 1.0}
        | {"relation_weight": 1.0},
    }
    head = of_both_levels(cls, **keys.get(cls, {}))
    maps = [torch.randn(1, c, k, k).double() for c in (3, 4) for k in (2, 1)]
    for x in maps[:2]:
        x.requires_grad_()
    own = truth([BOXES[0][:1]])
    student = outputs((16, 16), own, p3=maps[0], p4=maps[1])
    found = head(student, outputs((16, 16), own, c3=maps[2], c4=maps[3]))
    total = sum(found.values())
    total.backward()
    assert total.isfinite() and all(x.grad.isfinite().all() for x in maps[:2])
    assert all(p.grad.isfinite().all() for p in head.parameters())
