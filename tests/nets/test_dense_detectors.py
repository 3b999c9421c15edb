"""Test FCOS, ATSS, GFL and RepPoints: sizes by hand, losses and boxes against loops in float64."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from distill.nets import add_nets_config
from distill.nets.gfl import distribution_focal, quality_focal
from tests.reference.assign import iou, random_boxes, slow_atss, slow_nearest
from tests.support.networks import DENSE, NUM_CLASSES, outspoken_model, tiny_cfg

Array = Any
Row = Sequence[float]
SIZE = 128  # side of the images in pixels


# ---- Sizes


def conv(inputs: int, outputs: int, kernel: int, bias: bool = True) -> int:
    return inputs * outputs * kernel**2 + (outputs if bias else 0)


def resnet_50() -> int:
    """Count the convolutions only: the norms are frozen and have no parameters."""
    total, inputs = conv(3, 64, 7, bias=False), 64
    for blocks, middle in [(3, 64), (4, 128), (6, 256), (3, 512)]:
        outputs = 4 * middle
        total += conv(inputs, outputs, 1, bias=False)  # shortcut of the first block
        for _ in range(blocks):
            total += conv(inputs, middle, 1, bias=False) + conv(middle, middle, 3, bias=False)
            total += conv(middle, outputs, 1, bias=False)
            inputs = outputs
    return total


def fpn(below_p6: int) -> int:
    lateral = sum(conv(channels, 256, 1) for channels in (512, 1024, 2048))
    return lateral + 3 * conv(256, 256, 3) + conv(below_p6, 256, 3) + conv(256, 256, 3)


def tower(convolutions: int, bias: bool) -> int:
    return convolutions * (conv(256, 256, 3, bias) + 2 * 256)  # with GN


HEADS = {
    "fcos": 2 * tower(4, True) + conv(256, 80, 3) + conv(256, 4, 3) + conv(256, 1, 3),
    "atss": 2 * tower(4, True) + conv(256, 80, 3) + conv(256, 4, 3) + conv(256, 1, 3) + 5,
    "gfl": 2 * tower(4, True) + conv(256, 80, 3) + conv(256, 4 * 17, 3) + 5,
    "reppoints": (
        2 * tower(3, False)
        + (conv(256, 256, 3) + conv(256, 18, 1))  # first points
        + (conv(256, 256, 3, bias=False) + conv(256, 18, 1))  # refined points
        + (conv(256, 256, 3, bias=False) + conv(256, 80, 1))  # classes
        + 2  # factors of the moments
    ),
}


@pytest.mark.parametrize("family", DENSE)
def test_parameters_with_r50(family: str) -> None:
    cfg = get_cfg()
    add_nets_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = DENSE[family], "cpu"
    of_c5 = family == "reppoints"
    cfg.MODEL.BACKBONE.NAME = f"build_{'retinanet' if of_c5 else 'fcos'}_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    parameters = sum(p.numel() for p in build_model(cfg).parameters())
    assert parameters == resnet_50() + fpn(2048 if of_c5 else 256) + HEADS[family]


# ---- Reference losses


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def entropy(logit: Array, target: Array) -> Array:
    """Return the binary cross entropy with logits."""
    return np.logaddexp(0, logit) - logit * target


def focal(logits: Array, labels: Sequence[int]) -> float:
    """Return the sum for α = 0.25, γ = 2; label K is background, -1 is left out."""
    total = 0.0
    for row, label in zip(logits, labels):
        for k, x in enumerate(row if label >= 0 else ()):
            p = sigmoid(x)
            total += (0.25 * (1 - p) ** 2 if k == label else 0.75 * p**2) * entropy(x, k == label)
    return total


def giou_gap(a: Row, b: Row) -> float:
    """Return 1 − GIoU."""
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    overlap = iou(a, b)
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    union = area / (1 + overlap)
    return 1 - overlap + (hull - union) / hull


def centre(box: Row) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def sides(box: Row, at: tuple[float, float]) -> list[float]:
    """Return the distances from a point to the left, top, right and bottom."""
    return [at[0] - box[0], at[1] - box[1], box[2] - at[0], box[3] - at[1]]


def centerness(box: Row, at: tuple[float, float]) -> float:
    left, top, right, bottom = sides(box, at)
    ratio = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
    return math.sqrt(ratio)


class Scene:
    """An image, the outputs of a head for it, and reference losses as loops over its priors."""

    def __init__(self, model: Any, number: int):
        g = torch.Generator().manual_seed(number)
        boxes = (0, 1, 2, 7, *torch.randint(1, 9, (16,), generator=g).tolist())[number]
        self.gt = random_boxes(boxes, g).clamp(max=SIZE)
        self.classes = torch.randint(NUM_CLASSES, (boxes,), generator=g)
        instances = Instances((SIZE, SIZE), gt_boxes=Boxes(self.gt), gt_classes=self.classes)
        image = torch.randint(0, 256, (3, SIZE, SIZE), generator=g).float()
        self.inputs = [{"image": image, "instances": instances}]
        with torch.no_grad(), EventStorage():
            self.losses = {k: v.item() for k, v in model(self.inputs).items()}
            features = model.backbone(model.preprocess_image(self.inputs).tensor)
            maps = [features[name] for name in model.head_in_features]
            output = model.head(maps)
        self.levels = [x.tensor.double() for x in model.anchor_generator(maps)]
        self.priors = torch.cat(self.levels).tolist()
        # (R, D) rows in the order of the priors, one per cell.
        self.rows = [
            np.concatenate([x[0].permute(1, 2, 0).flatten(0, 1).double().numpy() for x in part])
            for part in output
        ]

    def labels(self, assigned: Sequence[int]) -> list[int]:
        return [NUM_CLASSES if i < 0 else int(self.classes[i]) for i in assigned]

    def matched(self, assigned: Sequence[int]) -> list[tuple[int, list[float]]]:
        """Return (prior, box) of the positives."""
        return [(r, self.gt[i].double().tolist()) for r, i in enumerate(assigned) if i >= 0]


def slow_atss_losses(scene: Scene) -> dict[str, float]:
    logits, deltas, centernesses = scene.rows
    assigned = slow_atss(scene.levels, scene.gt, 9)
    positives = scene.matched(assigned)
    box_sum = weights = centre_sum = 0.0
    for r, box in positives:
        x1, y1, x2, y2 = scene.priors[r]
        x, y = centre(scene.priors[r])
        dx, dy, dw, dh = deltas[r] / np.array([10, 10, 5, 5])
        x, y, w, h = x + dx * (x2 - x1), y + dy * (y2 - y1), (x2 - x1), (y2 - y1)
        w, h = (side * math.exp(min(d, math.log(1000 / 16))) for side, d in ((w, dw), (h, dh)))
        weight = centerness(box, centre(scene.priors[r]))
        box_sum += weight * giou_gap([x - w / 2, y - h / 2, x + w / 2, y + h / 2], box)
        weights += weight
        centre_sum += entropy(centernesses[r, 0], weight)
    number = max(len(positives), 1)
    return {
        "loss_cls": focal(logits, scene.labels(assigned)) / number,
        "loss_box_reg": 2 * box_sum / (weights or 1),
        "loss_centerness": centre_sum / number,
    }


def slow_gfl_losses(scene: Scene) -> dict[str, float]:
    logits, bins = scene.rows
    assigned = slow_atss(scene.levels, scene.gt, 9)
    positives, labels = scene.matched(assigned), scene.labels(assigned)
    quality = np.zeros_like(logits)
    box_sum = dfl_sum = weights = 0.0
    for r, box in positives:
        x, y = centre(scene.priors[r])
        stride = (scene.priors[r][2] - scene.priors[r][0]) / 8
        prob = np.exp(bins[r].reshape(4, 17))
        prob /= prob.sum(1, keepdims=True)
        left, top, right, bottom = (prob * np.arange(17)).sum(1) * stride
        found = [x - left, y - top, x + right, y + bottom]
        quality[r, labels[r]] = iou(found, box)
        weight = sigmoid(logits[r]).max()
        box_sum += weight * giou_gap(found, box)
        weights += weight
        for side, distance in enumerate(sides(box, (x, y))):
            target = min(max(distance / stride, 0), 15.9)
            low = int(target)
            near = (low + 1 - target) * np.log(prob[side, low])
            dfl_sum -= weight / 4 * (near + (target - low) * np.log(prob[side, low + 1]))
    qfl = (np.abs(quality - sigmoid(logits)) ** 2 * entropy(logits, quality)).sum()
    return {
        "loss_qfl": qfl / max(len(positives), 1),
        "loss_box_reg": 2 * box_sum / max(weights, 1),
        "loss_dfl": 0.25 * dfl_sum / max(weights, 1),
    }


def slow_fcos_losses(scene: Scene) -> dict[str, float]:
    """Return the losses of detectron2's FCOS. Its normalizer starts at 300 and moves by a tenth."""
    logits, distances, centernesses = scene.rows
    strides = [p[2] - p[0] for p in scene.priors]
    assigned = [-1] * len(scene.priors)
    for r, prior in enumerate(scene.priors):
        x, y = centre(prior)
        low = 0 if strides[r] == min(strides) else 4 * strides[r]
        high = math.inf if strides[r] == max(strides) else 8 * strides[r]
        best = math.inf
        for i, box in enumerate(scene.gt.double().tolist()):
            middle, reach = centre(box), sides(box, (x, y))
            near = max(abs(x - middle[0]), abs(y - middle[1])) < 1.5 * strides[r]
            area = (box[2] - box[0]) * (box[3] - box[1])
            if near and min(reach) > 0 and low < max(reach) < high and area < best:
                assigned[r], best = i, area
    box_sum = centre_sum = 0.0
    for r, box in scene.matched(assigned):
        x, y = centre(scene.priors[r])
        left, top, right, bottom = np.maximum(distances[r], 0) * strides[r]
        box_sum += giou_gap([x - left, y - top, x + right, y + bottom], box)
        centre_sum += entropy(centernesses[r, 0], centerness(box, (x, y)))
    number = 0.9 * 300 + 0.1 * max(len(scene.matched(assigned)), 1)
    return {
        "loss_fcos_cls": focal(logits, scene.labels(assigned)) / number,
        "loss_fcos_loc": box_sum / number,
        "loss_fcos_ctr": centre_sum / number,
    }


def slow_reppoints_losses(scene: Scene) -> dict[str, float]:
    logits, refined, first = scene.rows
    strides = torch.tensor([p[2] - p[0] for p in scene.priors])
    middles = torch.tensor([centre(p) for p in scene.priors])

    def box_at(r: int, corners: Array) -> list[float]:
        x, y = centre(scene.priors[r])
        return list(corners * strides[r].item() + np.array([x, y, x, y]))

    def smooth_l1(rows: Array, assigned: Sequence[int]) -> float:
        total = 0.0
        for r, box in scene.matched(assigned):
            for a, b in zip(box_at(r, rows[r]), box):
                gap = abs(a - b) / (4 * strides[r].item())
                total += gap - 0.055 if gap > 0.11 else gap**2 / 0.22
        return total / max(len(scene.matched(assigned)), 1)

    nearest = slow_nearest(middles, strides, scene.gt, 4.0)
    overlaps = np.zeros((len(scene.gt), len(scene.priors)))
    for i, box in enumerate(scene.gt.double().tolist()):
        overlaps[i] = [iou(box_at(r, row), box) for r, row in enumerate(first)]
    overlapping, labels = [-1] * len(scene.priors), [NUM_CLASSES] * len(scene.priors)
    for r in range(len(scene.priors) if len(scene.gt) else 0):
        i = int(overlaps[:, r].argmax())
        # The priors that overlap a box most are assigned to it, however small the overlap.
        most = (overlaps[:, r] == overlaps.max(1)) & (overlaps[:, r] > 0)
        if overlaps[i, r] >= 0.5 or most.any():
            overlapping[r], labels[r] = i, int(scene.classes[i])
        elif overlaps[i, r] >= 0.4:
            labels[r] = -1
    return {
        "loss_cls": focal(logits, labels) / max(len(scene.matched(overlapping)), 1),
        "loss_points_init": 0.5 * smooth_l1(first, nearest),
        "loss_points_refine": smooth_l1(refined, overlapping),
    }


SLOW: dict[str, Callable[[Scene], dict[str, float]]] = {
    "fcos": slow_fcos_losses,
    "atss": slow_atss_losses,
    "gfl": slow_gfl_losses,
    "reppoints": slow_reppoints_losses,
}


def decided_model(family: str, seed: int = 0) -> Any:
    """Build a tiny network far from its initialization: no class probability is near 0.01."""
    model: Any = outspoken_model(family, seed=seed)
    for parameter in model.head.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", DENSE)
def test_losses_against_loops(family: str) -> None:
    for number in range(20):
        model = decided_model(family, number)
        scene = Scene(model, number)
        expected = SLOW[family](scene)
        assert scene.losses.keys() == expected.keys()
        for name, value in expected.items():
            assert scene.losses[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (number, name)


def test_an_image_without_positives_counts_one_in_gfl() -> None:
    """As in the authors' code, the normalizer of the classes of the joint batch is larger by 1."""
    model = decided_model("gfl")
    full, empty = Scene(model, 2), Scene(model, 0)
    with torch.no_grad(), EventStorage():
        joint = model(full.inputs + empty.inputs)["loss_qfl"].item()
    number = len(full.matched(slow_atss(full.levels, full.gt, 9)))
    both = full.losses["loss_qfl"] * number + empty.losses["loss_qfl"]
    assert number and joint == pytest.approx(both / (number + 1), rel=1e-4)


def test_class_probabilities_weigh_gfls_boxes_without_a_gradient() -> None:
    model = decided_model("gfl")
    scene = Scene(model, 2)
    with EventStorage():
        losses = model(scene.inputs)
    for name in ("loss_box_reg", "loss_dfl"):
        (gradient,) = torch.autograd.grad(
            losses[name], model.head.cls_score.weight, retain_graph=True, allow_unused=True
        )
        assert gradient is None
    assert torch.autograd.grad(losses["loss_qfl"], model.head.cls_score.weight)[0].any()


def test_an_object_that_no_box_meets_takes_no_points() -> None:
    """RepPoints predicts its boxes: there may be none near an object."""
    model = decided_model("reppoints")
    found = torch.tensor([[[0.0, 0, 40, 40], [30, 30, 60, 60], [80, 80, 90, 90]]])
    gt = torch.tensor([[0.0, 0, 50, 50], [100, 100, 104, 104]])
    truth = Instances((SIZE, SIZE), gt_boxes=Boxes(gt), gt_classes=torch.tensor([2, 1]))
    targets = model.refine_targets(found, [truth])
    assert targets.labels.tolist() == [[2, NUM_CLASSES, NUM_CLASSES]]
    assert torch.equal(targets.boxes[0, 0], gt[0])
    nothing = model.refine_targets(found, [truth[1:]])
    assert nothing.labels.eq(NUM_CLASSES).all()


def test_quality_focal_by_hand() -> None:
    """At logit 0, σ is ½ and the cross entropy is log 2, whatever the quality."""
    loss = quality_focal(torch.zeros(3), torch.tensor([0.0, 0.5, 0.9]))
    torch.testing.assert_close(loss, torch.tensor([0.25, 0.0, 0.16]) * math.log(2))
    linear = quality_focal(torch.zeros(1), torch.ones(1), beta=1.0)
    assert linear.item() == pytest.approx(math.log(2) / 2)


def test_distribution_focal_by_hand() -> None:
    """A uniform distribution over 5 bins gives log 5. Distances end at 3.9, before the last bin."""
    uniform, distances = torch.zeros(2, 20), torch.tensor([[0.0, 1, 2.5, 9], [-1, 3.9, 4, 1]])
    torch.testing.assert_close(
        distribution_focal(uniform, distances, 4), torch.full((2,), 5.0).log()
    )
    sides = torch.zeros(1, 4, 5)
    sides[..., 3] = 2.0  # the probability of bin 3 is e² / (e² + 4)
    expected = math.log(math.exp(2) + 4) - 2 * 0.25  # distance 2.25 gives bin 3 the weight 1/4
    loss = distribution_focal(sides.flatten(1), torch.full((1, 4), 2.25), 4)
    assert loss.item() == pytest.approx(expected)
    assert distribution_focal(uniform[:0], distances[:0], 4).shape == (0,)


def test_gradients_of_gfls_losses() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    quality = torch.rand(4, 3, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: quality_focal(x, quality), logits)
    sides = torch.randn(3, 4 * 9, generator=g, dtype=torch.float64, requires_grad=True)
    distances = 9 * torch.rand(3, 4, generator=g, dtype=torch.float64) - 0.5
    assert torch.autograd.gradcheck(lambda x: distribution_focal(x, distances, 8), sides)


# ---- Boxes


def bins_of(distances: Tensor) -> Tensor:
    """Return (P, 68) logits with given expectations: (P, 4) distances in strides, in [0, 16)."""
    low = distances.floor()
    logits = torch.full((*distances.shape, 17), -50.0)
    logits.scatter_(2, low.long()[..., None], (low + 1 - distances).log()[..., None])
    logits.scatter_(2, low.long()[..., None] + 1, (distances - low).log()[..., None])
    return logits.flatten(1)


@pytest.mark.parametrize("family", DENSE)
def test_what_is_assigned_is_found(family: str) -> None:
    """Outputs that equal the targets decode to the objects."""
    model = outspoken_model(family).eval()
    gt = torch.tensor([[10.0, 20, 50, 44], [60, 50, 120, 120], [70, 5, 90, 30]])
    truth = Instances((SIZE, SIZE), gt_boxes=Boxes(gt), gt_classes=torch.tensor([2, 0, 1]))
    sizes = [(SIZE // stride, SIZE // stride) for stride in (4, 8, 16, 32, 64)]
    features = [torch.zeros(1, 16, *size) for size in sizes]
    priors = model.anchor_generator(features)
    if family == "fcos":
        labels, boxes = (x[0] for x in model.label_anchors(priors, [truth]))
    else:
        labels, boxes = (x[0] for x in model.targets(priors, [truth]))
    positive = labels < NUM_CLASSES
    logits = torch.full((len(labels), NUM_CLASSES), -9.0)
    logits[positive, labels[positive]] = torch.linspace(2, 3, int(positive.sum()))
    deltas = model.box2box_transform.get_deltas(Boxes.cat(priors).tensor, boxes)
    deltas = bins_of(deltas.clamp(0.01, 15.9)) if family == "gfl" else deltas
    rows = [logits, deltas, *([torch.full((len(labels), 1), 9.0)] * (family in ("fcos", "atss")))]
    cells = [h * w for h, w in sizes]
    output = [
        [x.T.reshape(1, -1, *size) for x, size in zip(part.split(cells), sizes)] for part in rows
    ]
    (found,) = model.forward_inference(model.preprocess_image(image_dicts()), features, output)
    best = [found[found.pred_classes == k][0] for k in (2, 0, 1)]
    torch.testing.assert_close(torch.cat([x.pred_boxes.tensor for x in best]), gt, atol=0.2, rtol=0)
    assert float(found.scores.max()) > 0.9 and len(found) == len(gt)


def image_dicts() -> list[dict[str, Any]]:
    return [{"image": torch.zeros(3, SIZE, SIZE)}]


# ---- RepPoints' head


def test_the_moments_of_nine_points() -> None:
    """The points of a grid, one cell apart, have deviation √(6/8). The factors scale the box."""
    head: Any = tiny_head()
    points = head.kernel.expand(1, 18, 2, 2) + torch.tensor([2.0, 3.0] * 9).view(1, 18, 1, 1)
    side = math.sqrt(6 / 8)
    expected = torch.tensor([3 - side, 2 - side, 3 + side, 2 + side])
    torch.testing.assert_close(head.boxes(points)[0, :, 1, 1], expected)
    with torch.no_grad():
        head.moment.copy_(torch.tensor([math.log(2), math.log(3)]))  # y, x
    expected = torch.tensor([3 - 3 * side, 2 - 2 * side, 3 + 3 * side, 2 + 2 * side])
    torch.testing.assert_close(head.boxes(points)[0, :, 1, 1], expected)


def tiny_head() -> Any:
    return build_model(tiny_cfg("reppoints")).head


def test_features_are_read_at_the_points() -> None:
    """Check the deformable convolutions against bilinear samples at each cell's points."""
    torch.manual_seed(0)
    head = tiny_head()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 16, 6, 7)
    classes, located = head.cls_subnet(x), head.points_subnet(x)
    first = head.init_points(F.relu(head.init_conv(located)))
    y, x_at = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")

    def read(features: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros(2, len(weight), 6, 7)
        for point in range(9):
            rows, columns = y + first[:, 2 * point], x_at + first[:, 2 * point + 1]
            grid = torch.stack([(columns + 0.5) / 7 * 2 - 1, (rows + 0.5) / 6 * 2 - 1], -1)
            sampled = F.grid_sample(features, grid, align_corners=False)
            kernel = weight[:, :, point // 3, point % 3]
            total += torch.einsum("oc,nchw->nohw", kernel, sampled)
        return total

    logits = head.cls_score(F.relu(read(classes, head.cls_conv.weight)))
    refined = head.refine_points(F.relu(read(located, head.refine_conv.weight))) + first
    (got_logits,), (got_refined,), (got_first,) = head([x])
    torch.testing.assert_close(got_logits, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got_refined, head.boxes(refined), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got_first, head.boxes(first))


def test_how_much_of_the_gradient_passes() -> None:
    """A tenth of the gradient reaches the first points, and a hundredth reaches the moments."""
    head = tiny_head()
    heard = []
    head.init_points.register_forward_hook(lambda *a: heard.append(a[2].retain_grad() or a[2]))
    x = torch.randn(1, 16, 4, 4)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    head([x])[0][0].sum().backward()
    gradient = heard[0].grad
    offset = heard[0].detach().requires_grad_()
    classes = head.cls_conv(head.cls_subnet(x), offset - head.kernel)
    head.cls_score(F.relu(classes)).sum().backward()
    torch.testing.assert_close(gradient, 0.1 * offset.grad)

    nn.init.zeros_(head.refine_points.weight)  # the refined points are the first ones
    head.init_points.zero_grad()
    head([x])[1][0].sum().backward()
    assert not head.init_points.weight.grad.any()

    points = torch.randn(1, 18, 1, 1)
    head.moment.grad = None
    head.boxes(points)[:, 2:].sum().backward()
    spread = points.view(9, 2).std(0) * head.moment.detach().exp()
    torch.testing.assert_close(head.moment.grad, 0.01 * spread)
