"""Groups of rows against loops over the labels."""

from __future__ import annotations

import pytest
import torch

from align_cbrl.groups import Groups


@pytest.mark.parametrize("seed", range(5))
def test_every_operation_is_the_loop_over_labels(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-3, 4, (40,), generator=generator)
    value = torch.randn(40, generator=generator, dtype=torch.float64)
    groups = Groups.of(labels)
    own = [value[labels == label] for label in groups.labels]
    assert groups.labels.tolist() == sorted(set(labels.tolist())) and groups.sizes.tolist() == [len(v) for v in own]
    for found, wanted in (
        (groups.sum(value), [v.sum() for v in own]),
        (groups.mean(value), [v.mean() for v in own]),
        (groups.max(value), [v.max() for v in own]),
        (groups.logsumexp(value), [v.logsumexp(0) for v in own]),
        (groups.first(value), [v[0] for v in own]),
    ):
        torch.testing.assert_close(found, torch.stack(wanted))
    torch.testing.assert_close(groups.sum(groups.centred(value)), torch.zeros(groups.count, dtype=torch.float64))
    weight = value.exp()
    torch.testing.assert_close(groups.sum(groups.share(weight)), torch.ones(groups.count, dtype=torch.float64))
    rows = [row for _, table in groups.tables() for row in table.flatten().tolist()]
    assert sorted(rows) == list(range(40))
    for number, table in groups.tables():
        assert all(set(labels[r].tolist()) == {int(groups.labels[n])} for n, r in zip(number, table, strict=True))


def test_columns_are_grouped_as_rows_are() -> None:
    groups = Groups.of(torch.tensor([1, 0, 1]))
    value = torch.tensor([[1.0, 2.0], [5.0, 6.0], [3.0, 6.0]])
    assert groups.mean(value).tolist() == [[5.0, 6.0], [2.0, 4.0]]
    assert groups.centred(value).tolist() == [[-1.0, -2.0], [0.0, 0.0], [1.0, 2.0]]


def test_a_group_whose_logarithms_are_all_minus_infinity_is_minus_infinity() -> None:
    value = torch.tensor([-torch.inf, 1.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    found = Groups.of(torch.tensor([0, 1, 0])).logsumexp(value)
    assert found.tolist() == [-torch.inf, 1.0]
