"""Test dynamic k by hand, with ties, and its independence of the order of boxes and points."""

import torch
from torch import Tensor

from distill.nets.assign import dynamic_k
from distill.nets.assign.dynamic import EXCLUDED, PENALISED
from tests.support.cases import for_each
from tests.support.operations import Recorder


def tiers(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def test_k_is_the_truncated_sum_of_the_best_ious() -> None:
    cost = torch.tensor([[4.0, 3, 2, 1, 0]])
    free = tiers([0] * 5)
    for ious, topk, k in [
        ([0.9, 0.9, 0.1, 0, 0], 5, 1),
        ([0.9, 0.9, 0.3, 0, 0], 5, 2),
        ([1.0, 1, 1, 1, 1], 3, 3),
        ([1.0, 1, 1, 1, 1], 13, 5),
        ([0.0, 0, 0, 0, 0], 5, 1),
    ]:
        matched, quality = dynamic_k(cost, torch.tensor([ious]), free, topk)
        assert matched.tolist() == [-1] * (5 - k) + [0] * k
        assert quality.tolist() == torch.tensor([0.0] * (5 - k) + ious[5 - k :]).tolist()


def test_excluded_points_count_neither_in_k_nor_as_a_match() -> None:
    cost, iou = torch.tensor([[0.0, 1, 2, 3]]), torch.tensor([[0.9, 0.9, 0.4, 0.4]])
    tier = tiers([EXCLUDED, 0, 0, 0])
    assert dynamic_k(cost, iou, tier, 10)[0].tolist() == [-1, 0, -1, -1]
    everything = tiers([EXCLUDED] * 4)
    assert dynamic_k(cost, iou, everything, 10)[0].tolist() == [-1] * 4
    infinite = torch.full_like(cost, torch.inf)  # an excluded point never replaces a candidate
    assert dynamic_k(infinite, iou, tier, 10)[0].tolist() == [-1, 0, -1, -1]


def test_a_shared_point_goes_to_the_cheapest_of_all_boxes() -> None:
    """Boxes 0 and 1 select the first point. Box 2 is cheaper there, but cheaper still elsewhere."""
    cost = torch.tensor([[5.0, 9, 9], [4, 9, 9], [3, 2, 9]])
    iou = torch.tensor([[0.1, 0, 0], [0.2, 0, 0], [0.3, 0.4, 0]])
    matched, quality = dynamic_k(cost, iou, torch.zeros_like(cost).int(), 3)
    assert matched.tolist() == [2, 2, -1]
    assert torch.equal(quality, torch.tensor([0.3, 0.4, 0]))


def test_a_penalised_pair_comes_after_all_others() -> None:
    cost, iou = torch.tensor([[0.0, 1e9, 2], [1.0, 5, 2e9]]), torch.zeros(2, 3)
    tier = tiers([PENALISED, 0, PENALISED], [PENALISED, PENALISED, PENALISED])
    matched, _ = dynamic_k(cost, iou, tier, 3)
    assert matched.tolist() == [1, 0, -1]  # box 1 has penalised points only
    both = tiers([PENALISED, 0, 0], [PENALISED, PENALISED, PENALISED])
    one = torch.tensor([[9.0, 9, 9], [9.0, 0, 9]])
    # Both select the second point. Box 1 is cheaper, but penalised.
    assert dynamic_k(one, iou, both, 3)[0].tolist() == [-1, 0, -1]


def test_ties_go_to_the_lower_index() -> None:
    cost, iou = torch.zeros(3, 40), torch.full((3, 40), 0.5)
    matched, _ = dynamic_k(cost, iou, torch.zeros_like(cost).int(), 5)
    assert matched.tolist() == [0, 0, *[-1] * 38]


@for_each("seed", range(5))
def test_the_order_does_not_matter(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cost, iou = torch.rand(2, 7, 50, generator=generator)
    tier = torch.randint(2, (7, 50), generator=generator)
    tier[:, torch.rand(50, generator=generator) < 0.2] = EXCLUDED
    matched, quality = dynamic_k(cost, iou, tier, 10)
    rows, columns = (torch.randperm(n, generator=generator) for n in (7, 50))
    mixed = [x[rows][:, columns] for x in (cost, iou, tier)]
    found, found_quality = dynamic_k(*mixed, 10)
    assert torch.equal(torch.where(found < 0, -1, rows[found]), matched[columns])
    assert torch.equal(found_quality, quality[columns])
    assert len(matched.unique()) > 4


@for_each("shape", [(0, 4), (4, 0), (0, 0)])
def test_nothing_to_match(shape: tuple[int, int]) -> None:
    empty = torch.zeros(shape, dtype=torch.float64)
    matched, quality = dynamic_k(empty, empty, empty.int(), 10)
    assert matched.tolist() == [-1] * shape[1] and quality.tolist() == [0] * shape[1]
    assert matched.dtype == torch.long and quality.dtype == torch.float64


def test_no_wait() -> None:
    with Recorder() as recorder:
        dynamic_k(torch.rand(3, 9), torch.rand(3, 9), torch.zeros(3, 9).int(), 5)
    assert not recorder.waits and "topk" in recorder.names
