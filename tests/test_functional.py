from __future__ import annotations

import math

import pytest
import torch

from align_cbrl import InputError
from align_cbrl.functional import (
    best_response_gap,
    effective_sample_size,
    eligibility_trace,
    group_advantage,
    returns_to_go,
    tilt_weights,
)


def test_trace_is_the_double_sum_it_stands_for() -> None:
    """w_k = sum_{j <= k} gamma^{k-j} gammaF^j A_j."""
    advantage = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] + [False] * 5])
    got = eligibility_trace(advantage, mask, discount=0.7, leader_discount=0.9)
    for b in range(3):
        for k in range(6):
            want = sum(0.7 ** (k - j) * 0.9**j * advantage[b, j].item() for j in range(k + 1)) if mask[b, k] else 0.0
            assert math.isclose(got[b, k].item(), want, rel_tol=1e-12, abs_tol=1e-12)


def test_returns_to_go_stop_where_the_path_does() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0]])
    assert returns_to_go(values, torch.tensor([[True, True, False]]), 0.5).tolist() == [[2.0, 2.0, 0.0]]


def test_group_advantage_is_leave_one_out_in_any_order() -> None:
    credit = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    group = torch.tensor([5, 2, 9] * 4)
    got = group_advantage(credit, group, torch.ones(12, dtype=torch.float64))
    for i in range(12):
        others = [credit[j].item() for j in range(12) if group[j] == group[i] and j != i]
        assert math.isclose(got[i].item(), credit[i].item() - sum(others) / len(others), rel_tol=1e-12)


def test_group_advantage_makes_the_covariance_unbiased() -> None:
    """Mean over all pairs of draws from a small law, by enumeration."""
    law = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    u = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    r = torch.tensor([0.3, 0.1, -1.0], dtype=torch.float64)
    mean = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            draw = torch.tensor([i, j])
            a = group_advantage(u[draw], torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.float64))
            mean += law[i] * law[j] * (a * r[draw]).mean()
    exact = (law * u * r).sum() - (law * u).sum() * (law * r).sum()
    assert math.isclose(mean.item(), exact.item(), rel_tol=1e-12)


def test_a_lonely_sample_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"group size: expected at least 2.*got 1 for group 4"):
        group_advantage(torch.ones(3), torch.tensor([3, 3, 4]), torch.ones(3))


def test_all_weight_on_one_sample_says_nothing() -> None:
    got = group_advantage(torch.tensor([1.0, 5.0]), torch.zeros(2, dtype=torch.long), torch.tensor([1.0, 0.0]))
    assert got.tolist() == [0.0, 0.0]


def test_tilt_weights_are_a_softmax_with_mean_one() -> None:
    ratio = torch.tensor([1.0, 800.0, 2.0, 801.0], dtype=torch.float64)
    group = torch.tensor([0, 1, 0, 1])
    got = tilt_weights(ratio, group)
    want = 2 * torch.softmax(torch.tensor([1.0, 2.0], dtype=torch.float64), 0)
    torch.testing.assert_close(got[group == 0], want)
    torch.testing.assert_close(got[group == 1], 2 * torch.softmax(torch.tensor([0.0, 1.0], dtype=torch.float64), 0))


def test_effective_sample_size_between_one_and_the_group() -> None:
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 3.0])
    assert effective_sample_size(weight, torch.tensor([0, 0, 0, 1, 1, 1])).tolist() == pytest.approx([3.0, 1.0])


def test_gap_is_zero_only_at_the_best_response() -> None:
    group = torch.tensor([0, 0, 1, 1])
    ratio = torch.tensor([0.3, 0.3, 1.0, 2.0], dtype=torch.float64)
    gap = best_response_gap(ratio, group)
    assert gap[0] == 0
    assert math.isclose(gap[1].item(), math.log((math.e + math.e**2) / 2) - 1.5)
