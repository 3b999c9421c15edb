"""Overlaps and anchors against detectron2's own."""

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.structures import pairwise_iou as detectron2_iou
from detectron2.structures.boxes import pairwise_intersection
from torch import Tensor

from distill.losses.boxes import anchor_grid, box_centerness, pairwise_iou, pairwise_overlap
from tests.support.networks import tiny_model


def random_boxes(number: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(number, 2, generator=g) * 60
    return torch.cat([corner, corner + torch.rand(number, 2, generator=g) * 40], 1)


@pytest.mark.parametrize("numbers", [(17, 40), (0, 3), (3, 0)])
def test_the_iou_is_detectron2s_to_the_bit(numbers: tuple[int, int]) -> None:
    a, b = (random_boxes(n, seed) for seed, n in enumerate(numbers))
    assert torch.equal(pairwise_iou(a, b), detectron2_iou(Boxes(a), Boxes(b)))
    assert torch.equal(pairwise_overlap(a, b), pairwise_intersection(Boxes(a), Boxes(b)))


def test_boxes_without_area_and_missing_ones_overlap_nothing() -> None:
    odd = torch.tensor([[4.0, 4, 4, 4], [torch.nan] * 4])
    assert not pairwise_iou(odd, torch.cat([odd, torch.tensor([[0.0, 0, 8, 8]])])).any()


def test_iou_by_hand() -> None:
    a, b = (
        torch.tensor([[0.0, 0, 4, 2]]),
        torch.tensor([[2.0, 0, 6, 2], [0, 0, 4, 2], [9, 9, 10, 10]]),
    )
    torch.testing.assert_close(pairwise_iou(a, b), torch.tensor([[1 / 3, 1, 0]]))
    assert pairwise_overlap(a, b).tolist() == [[4, 8, 0]]


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("family", ["faster", "retinanet", "fcos"])
def test_the_anchors_are_the_generators_own(family: str, offset: float) -> None:
    model = tiny_model(family, "MODEL.ANCHOR_GENERATOR.OFFSET", offset)
    generator = getattr(model, "proposal_generator", model).anchor_generator
    sizes = [(5, 7), (3, 4), (2, 2), (1, 1)]
    expected = generator([torch.empty(1, 1, *size) for size in sizes])
    cells = zip(generator.cell_anchors, generator.strides, sizes)
    for (anchors, stride, size), boxes in zip(cells, expected):
        found = anchor_grid(anchors, stride, generator.offset, *size)
        assert found.shape == (*size, len(anchors), 4)
        torch.testing.assert_close(found.flatten(0, 2), boxes.tensor)


def test_centerness_by_hand() -> None:
    anchors = torch.tensor([[3.0, 3, 5, 5], [0, 3, 2, 5], [-4, 0, -2, 2]])
    box = torch.tensor([[0.0, 0, 8, 8]]).expand(3, 4)
    expected = torch.tensor([1.0, (1 / 7) ** 0.5, 0])
    torch.testing.assert_close(box_centerness(anchors, box), expected)
