"""Sparse transitions against the dense tables that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from align_cbrl import InputError
from toy_cmdp.tables import sparse
from toy_cmdp.tables.sparse import SparseTransition

_STATES, _ACTIONS, _SUCCESSORS, _CONTEXTS = 7, 3, 4, 3


def _transition(contexts: int, *, same: bool, dtype: torch.dtype = torch.float64) -> SparseTransition:
    """Random successors, some of them equal; the same for all actions if `same`."""
    generator = torch.Generator().manual_seed(0)
    size = (_STATES, _ACTIONS, _SUCCESSORS)
    successor = torch.randint(_STATES, (_STATES, 1 if same else _ACTIONS, _SUCCESSORS), generator=generator)
    assert any(len(set(row.tolist())) < _SUCCESSORS for row in successor.flatten(0, 1))
    logits = torch.randn(contexts, *size, generator=generator, dtype=dtype)
    return SparseTransition(successor.expand(size), torch.softmax(logits, -1).requires_grad_())


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()


def _grid(side: int) -> SparseTransition:
    """Four moves on a torus, one mistaken in five."""
    state = torch.arange(side * side).view(side, side)
    moves = [state.roll(shift, axis).flatten() for axis in (0, 1) for shift in (1, -1)]
    law = torch.full((4, 4), 0.2 / 3, dtype=torch.float64).fill_diagonal_(0.8)
    size = (side * side, 4, 4)
    return SparseTransition(torch.stack(moves, 1)[:, None].expand(size), law.expand(1, *size))


def _residual(transition: SparseTransition, weights: Tensor, solution: Tensor, right: Tensor, transpose: bool) -> float:
    if transpose:
        image = transition.push(weights * solution[..., None])
    else:
        image = (weights * transition.expect(solution)).sum(-1)
    return float((right - solution + image).norm() / right.norm())


@pytest.mark.parametrize("contexts", [1, _CONTEXTS])
@pytest.mark.parametrize("same", [True, False])
def test_sparse_is_dense(contexts: int, same: bool) -> None:
    transition = _transition(contexts, same=same)
    dense = transition.to_dense()
    assert transition.shape == dense.shape
    torch.testing.assert_close(dense.sum(-1), torch.ones_like(dense[..., 0]))
    full = dense.expand(_CONTEXTS, -1, -1, -1)
    value, mass = _random(_CONTEXTS, _STATES), _random(_CONTEXTS, _STATES, _ACTIONS)
    cotangent = _random(_CONTEXTS, _STATES, _ACTIONS).detach()

    results = {
        "expect": (transition.expect(value), torch.einsum("csat,ct->csa", full, value), value),
        "push": (transition.push(mass), torch.einsum("csat,csa->ct", full, mass), mass),
    }
    for name, (ours, theirs, argument) in results.items():
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")
        weight = cotangent if ours.ndim == 3 else cotangent[..., 0]
        inputs = (transition.probability, argument)
        got = torch.autograd.grad((weight * ours).sum(), inputs, retain_graph=True)
        expected = torch.autograd.grad((weight * theirs).sum(), inputs, retain_graph=True)
        torch.testing.assert_close(got, expected, msg=lambda m, name=name: f"gradients of {name}: {m}")


@pytest.mark.parametrize("contexts", [1, _CONTEXTS])
def test_between_is_the_dense_entry(contexts: int) -> None:
    transition = _transition(contexts, same=False)
    index = torch.cartesian_prod(*(torch.arange(n) for n in (_CONTEXTS, _STATES, _ACTIONS, _STATES))).T
    ours = transition.between(*index.view(4, _CONTEXTS * _STATES, -1))
    dense = transition.to_dense().expand(_CONTEXTS, -1, -1, -1)
    torch.testing.assert_close(ours.flatten(), dense.flatten())
    weight = _random(ours.numel()).detach()
    got = torch.autograd.grad((weight * ours.flatten()).sum(), transition.probability)
    torch.testing.assert_close(got, torch.autograd.grad((weight * dense.flatten()).sum(), transition.probability))


@pytest.mark.parametrize("iterative", [False, True])
@pytest.mark.parametrize("contexts", [1, _CONTEXTS])
@pytest.mark.parametrize("same", [True, False])
def test_system_is_dense(iterative: bool, contexts: int, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if iterative:
        monkeypatch.setattr(sparse, "_DIRECT_STATES", 0)
    transition = _transition(contexts, same=same)
    weights = 0.9 * torch.softmax(_random(_CONTEXTS, _STATES, _ACTIONS).detach(), -1)
    weights[:, 2] = 0  # a terminal state
    right = _random(_CONTEXTS, _STATES).detach()
    dense = transition.to_dense().detach().expand(_CONTEXTS, -1, -1, -1)
    matrix = torch.eye(_STATES, dtype=torch.float64) - torch.einsum("csa,csat->cst", weights, dense)
    system = transition.system(weights)
    for transpose in (False, True):
        expected = torch.linalg.solve(matrix.mT if transpose else matrix, right)
        torch.testing.assert_close(system.solve(right, transpose=transpose), expected, rtol=1e-12, atol=1e-12)
        assert system.solve(0 * right, transpose=transpose).abs().max() == 0


def test_single_precision() -> None:
    transition = _transition(1, same=True, dtype=torch.float32)
    value = _random(1, _STATES, dtype=torch.float32)
    assert transition.expect(value).dtype == torch.float32
    weights = 0.9 * torch.softmax(_random(1, _STATES, _ACTIONS, dtype=torch.float32).detach(), -1)
    solution = transition.system(weights).solve(value.detach())
    assert solution.dtype == torch.float32
    assert _residual(transition.detach(), weights, solution, value.detach(), False) < 1e-6


@pytest.mark.parametrize("transpose", [False, True])
def test_more_than_20000_states(transpose: bool) -> None:
    transition = _grid(150)
    states = transition.shape[1]
    weights = 0.99 * torch.softmax(3 * _random(2, states, 4).detach(), -1)
    right = _random(2, states).detach()
    system = transition.system(weights)
    solution = system.solve(right, transpose=transpose)
    assert _residual(transition, weights, solution, right, transpose) < 1e-13
    rough = system.solve(right, transpose=transpose, tolerance=0.01)
    assert 1e-8 < _residual(transition, weights, rough, right, transpose) <= 0.01


def test_a_long_cycle_is_factored(monkeypatch: pytest.MonkeyPatch) -> None:
    states = 5_000
    ring = SparseTransition(
        ((torch.arange(states) + 1) % states)[:, None, None], torch.ones(1, states, 1, 1, dtype=torch.float64)
    )
    weights = torch.full((1, states, 1), 0.999, dtype=torch.float64)
    right = _random(1, states).detach()
    assert _residual(ring, weights, ring.system(weights).solve(right), right, False) < 1e-13
    monkeypatch.setattr(sparse, "_LAST_RESORT_STATES", 0)
    with pytest.raises(InputError, match=r"context 0: the linear solver stopped .* lower the discount"):
        ring.system(weights).solve(right)


@pytest.mark.parametrize("kind", ["ring", "chain", "back_and_forth", "two_steps"])
def test_long_ways_are_solved_as_dense_ones(kind: str) -> None:
    """Krylov methods diverge on them; a residual must not count as small because the solution is huge."""
    states, discount = 2_050, 0.999  # more than are factored at once
    here = torch.arange(states)
    other = {
        "ring": here,  # stay
        "chain": here,
        "back_and_forth": here.roll(1),
        "two_steps": here.roll(-2),  # periodic
    }[kind]
    ahead = (here + 1).clamp(max=states - 1) if kind == "chain" else here.roll(-1)
    successor = torch.stack([ahead, other], -1)[:, :, None]
    transition = SparseTransition(successor, torch.ones(1, states, 2, 1, dtype=torch.float64))
    weights = discount * torch.softmax(8 * _random(1, states, 2).detach(), -1)  # nearly deterministic
    right = torch.zeros(1, states, dtype=torch.float64)
    right[0, states // 2] = 1
    system = transition.system(weights)
    for transpose in (False, True):
        solution = system.solve(right, transpose=transpose)
        assert _residual(transition, weights, solution, right, transpose) < 1e-11  # its rounding error is |x| eps
        assert 1 <= float(solution.abs().max()) <= (states if transpose else 1) / (1 - discount) + 1e-9


def test_a_huge_solution_does_not_make_its_residual_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(matrix: object, right: np.ndarray, target: float) -> tuple[np.ndarray, int]:
        return np.full(right.shape, 6e159), 1

    states = 2_050
    ring = SparseTransition(torch.arange(states).roll(-1)[:, None, None], torch.ones(1, states, 1, 1).double())
    weights = torch.full((1, states, 1), 0.9, dtype=torch.float64)
    right = _random(1, states).detach()
    monkeypatch.setattr(sparse, "_bicgstab", diverged)
    assert _residual(ring, weights, ring.system(weights).solve(right), right, False) < 1e-13  # factored instead
    monkeypatch.setattr(sparse, "_LAST_RESORT_STATES", 0)
    with pytest.raises(InputError, match=r"stopped at a relative residual of 1 "):
        ring.system(weights).solve(right)


def test_factors_are_not_trusted_either(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def solve(self, right: np.ndarray, trans: str) -> np.ndarray:
            return 2.5 * right

    monkeypatch.setattr(sparse.scipy.sparse.linalg, "splu", lambda matrix: Wrong())
    transition = _transition(1, same=False)
    weights = 0.9 * torch.softmax(_random(1, _STATES, _ACTIONS).detach(), -1)
    with pytest.raises(InputError, match="factored to a relative residual"):
        transition.system(weights).solve(_random(1, _STATES).detach())


def test_patterns_are_shared_and_graphs_cut() -> None:
    transition = _transition(1, same=False)
    weights = torch.full((1, _STATES, _ACTIONS), 0.3, dtype=torch.float64)
    other = torch.full_like(transition.probability, 0.25).detach()
    before = transition.detach()
    assert transition.requires_grad and not before.requires_grad and before.detach() is before
    solved = before.system(weights).solve(torch.ones(1, _STATES, dtype=torch.float64))
    fresh = SparseTransition(transition.successor, other).system(weights)
    shared = transition.with_probability(other)
    assert shared._pattern is transition._pattern and len(shared._pattern) == 1
    right = _random(1, _STATES).detach()
    torch.testing.assert_close(shared.system(weights).solve(right), fresh.solve(right))
    torch.testing.assert_close(solved, torch.full_like(solved, 10.0))  # the weights add up to 0.9


def test_tensors_of_other_kinds() -> None:
    good = _transition(1, same=False)
    with pytest.raises(InputError, match=r"successor: expected a long tensor \[S, A, K\], got torch.float32"):
        SparseTransition(good.successor.float(), good.probability)
    with pytest.raises(InputError, match=r"probability: expected a floating-point tensor"):
        SparseTransition(good.successor, good.probability[0])
    with pytest.raises(InputError, match=r"probability: .* got torch.int64"):
        SparseTransition(good.successor, good.probability.long())
    three = _transition(_CONTEXTS, same=False)
    with pytest.raises(InputError, match=r"value: expected shape \(3, 7\), got \(1, 7\)"):
        three.expect(torch.zeros(1, _STATES))
    with pytest.raises(InputError, match=r"mass: expected shape \('C', 7, 3\), got \(1, 7, 4\)"):
        good.push(torch.zeros(1, _STATES, 4))
    weights = torch.full((1, _STATES, _ACTIONS), 0.3, dtype=torch.float64)
    with pytest.raises(InputError, match=r"right: expected shape \(1, 7\), got \(7,\)"):
        good.system(weights).solve(torch.zeros(_STATES))
    with pytest.raises(InputError, match=r"right: context 0: expected finite numbers"):
        good.system(weights).solve(torch.full((1, _STATES), torch.nan))
    with pytest.raises(InputError, match=r"weights: context 0: .* singular"):
        good.system(weights * torch.nan)
    stay = SparseTransition(torch.zeros(1, 1, 1, dtype=torch.long), torch.ones(1, 1, 1, 1))
    with pytest.raises(InputError, match=r"weights: context 0: .* singular"):
        stay.system(torch.ones(1, 1, 1))


def test_contents_that_are_no_laws() -> None:
    good = _transition(2, same=False).detach()
    good.check()

    def changed(index: tuple[int, ...], number: float) -> SparseTransition:
        probability = good.probability.clone()
        probability[index] = number
        return good.with_probability(probability)

    with pytest.raises(InputError, match=r"expected probabilities, got nan in context 1, state 2, action 0 to state"):
        changed((1, 2, 0, 3), torch.nan).check()
    with pytest.raises(InputError, match=r"expected probabilities, got -0.5 in context 0, state 6, action 2 to state"):
        changed((0, 6, 2, 0), -0.5).check()
    with pytest.raises(InputError, match=r"sum to one, got sum .* in context 0, state 6, action 2"):
        changed((0, 6, 2, 0), 3.0).check()
    with pytest.raises(InputError, match=r"sum to one, got sum inf in context 1, state 0, action 1"):
        changed((1, 0, 1, 0), torch.inf).check()
    for wrong in (-1, _STATES):
        successor = good.successor.clone()
        successor[4, 1, 2] = wrong
        with pytest.raises(InputError, match=rf"got {wrong} as successor 2 in context 0, state 4, action 1"):
            SparseTransition(successor, good.probability).check()
    with pytest.raises(InputError, match="in nowhere"):
        changed((1, 2, 0, 3), torch.nan).check(lambda index: "nowhere")
