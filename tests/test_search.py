"""Successive halving on climbs whose outcome is known, and tabular climbs against what each leader would do alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align_cbrl import InputError
from align_cbrl.estimators.search import (
    Climb,
    Halving,
    best,
    exchange_ascent,
    exchanges,
    scatter,
    successive_halving,
)
from align_cbrl.problem import Problem
from toy_cmdp import four_rooms, leader_value, lqr, random_cmdp
from toy_cmdp.estimators.climbs import ExactClimb, SampledClimb
from toy_cmdp.estimators.plug_in import PlugIn, TransitionMemory

# --- the halving itself ------------------------------------------------------------------------------------------


class Lines(Climb):
    """Leader i is worth offset_i + slope_i * steps; what was asked of it is noted."""

    def __init__(self, offset: list[float], slope: list[float]) -> None:
        self.offset, self.slope, self.taken = torch.tensor(offset), torch.tensor(slope), 0
        self.alive: list[int] = []
        self.blocks: list[int] = []
        self.leader_steps = 0

    def advance(self, steps: int) -> Tensor:
        self.taken += steps
        self.alive.append(len(self.offset))
        self.blocks.append(steps)
        self.leader_steps += steps * len(self.offset)
        return self.offset + self.slope * self.taken

    def keep(self, chosen: Tensor) -> None:
        assert chosen.tolist() == sorted(chosen.tolist())
        self.offset, self.slope = self.offset[chosen], self.slope[chosen]


def test_the_winner_is_the_best_of_those_that_the_cuts_let_through() -> None:
    climb = Lines(offset=[0.0, 3.0, 1.0, 2.0], slope=[1.0, 0.0, 0.3, 0.1])
    # After 2 steps: 2.0, 3.0, 1.6, 2.2; the first is dropped there, though it would win in the end.
    assert successive_halving(climb, 4, Halving(steps=20, cuts=((2, 2),))) == 3
    late = Lines(offset=[0.0, 3.0, 1.0, 2.0], slope=[1.0, 0.0, 0.3, 0.1])
    assert successive_halving(late, 4, Halving(steps=20, cuts=((5, 2),))) == 0


def test_places_survive_several_cuts() -> None:
    climb = Lines(offset=[9.0, 0.0, 8.0, 1.0, 7.0, 2.0, 6.0], slope=[0.0] * 4 + [1.0] + [0.0] * 2)
    assert successive_halving(climb, 7, Halving(steps=12, cuts=((1, 4), (4, 2), (8, 1)))) == 4


def test_cost_and_blocks_are_as_announced() -> None:
    halving = Halving(steps=30, cuts=((4, 5), (11, 2), (12, 1)))
    climb, seen = Lines(offset=[0.0] * 8, slope=[1.0] * 8), []
    successive_halving(climb, 8, halving, every=10, on_values=lambda step, values: seen.append((step, len(values))))
    assert climb.leader_steps == halving.cost(8) == 8 * 4 + 5 * 7 + 2 * 1 + 18
    assert seen == [(4, 8), (10, 5), (11, 5), (12, 2), (20, 1), (30, 1)]
    assert sum(climb.blocks) == 30


def test_a_cut_that_keeps_more_than_there_are_changes_nothing() -> None:
    climb = Lines(offset=[0.0, 1.0], slope=[0.0, 0.0])
    assert successive_halving(climb, 2, Halving(steps=4, cuts=((1, 16), (2, 8)))) == 1
    assert set(climb.alive) == {2}
    assert Halving(steps=4, cuts=((1, 16), (2, 8))).cost(2) == 8


def test_of_equal_values_the_first_stay() -> None:
    assert best(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0, "cuts": ()}, "steps: expected a whole number >= 1, got 0"),
        ({"steps": 10, "cuts": ((5, 2), (5, 1))}, "growing steps, from 1 to below 10"),
        ({"steps": 10, "cuts": ((10, 2),)}, "growing steps, from 1 to below 10"),
        ({"steps": 10, "cuts": ((0, 2),)}, "growing steps, from 1 to below 10"),
        ({"steps": 10, "cuts": ((2, 2), (5, 2))}, "falling numbers of survivors"),
        ({"steps": 10, "cuts": ((2, 0),)}, "at least one survivor"),
    ],
)
def test_cuts_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Halving(**settings)  # type: ignore[arg-type]


def test_values_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(InputError, match="expected 2 finite numbers, one a leader, after 10 leader steps"):
        successive_halving(Lines([0.0, float("nan")], [1.0, 1.0]), 2, Halving())
    with pytest.raises(InputError, match="expected 3 finite numbers"):
        successive_halving(Lines([0.0, 1.0], [1.0, 1.0]), 3, Halving())
    with pytest.raises(InputError, match="starts: expected a whole number >= 1 and"):
        successive_halving(Lines([], []), 0, Halving())


def test_starts_are_drawn_from_the_seed_and_their_number_alone() -> None:
    def weights(seed: int, start: int, scale: float = 5.0) -> Tensor:
        problem = four_rooms(seed=start)
        scatter(problem, scale, seed=seed, start=start)
        return problem.parameters[0].detach().clone()

    assert torch.equal(weights(0, 1), weights(0, 1))
    assert torch.allclose(weights(0, 1, 10.0), 2 * weights(0, 1))
    drawn = torch.stack([weights(s, k) for s in range(6) for k in range(10)])  # [60, 105]
    assert len(drawn.unique(dim=0)) == 60
    count = drawn.numel()
    assert abs(float(drawn.mean())) <= 4 * 5 / count**0.5
    assert abs(float(drawn.var()) - 25) <= 4 * 25 * (2 / count) ** 0.5
    with pytest.raises(InputError, match="positive, finite scale, got 0"):
        scatter(four_rooms(), 0, seed=0, start=0)


# --- exchanges ---------------------------------------------------------------------------------------------------


def test_exchanges_are_all_vectors_in_which_a_large_entry_has_changed_places() -> None:
    weights = torch.tensor([0.5, 3.0, -1.0, 2.0, 0.0])
    expected = set()
    for i in (1, 3):  # the two largest
        for j in range(5):
            moved = weights.tolist()
            moved[i], moved[j] = moved[j], moved[i]
            expected.add(tuple(moved))
    found = exchanges(weights, 2)
    assert {tuple(row) for row in found.tolist()} == expected - {tuple(weights.tolist())}
    assert len(found) == len(expected) - 1  # none twice
    assert len(exchanges(weights, 5)) == len(exchanges(weights, 50)) == 10  # all pairs


def ranked(place: list[float]) -> tuple[Problem, list[float]]:
    """A leader whose value is sum_i place_i w_i; only the order of its entries matters to an exchange."""
    problem = four_rooms(horizon=1)
    with torch.no_grad():
        problem.parameters[0].zero_()[: len(place)] = torch.arange(len(place), 0, -1, dtype=torch.float64)
    return problem, place


def test_exchanges_are_made_as_long_as_they_help() -> None:
    problem, place = ranked([0.0, 1.0, 5.0, 2.0])  # w = 4, 3, 2, 1
    (weights,) = problem.parameters
    seen: list[float] = []

    def value() -> float:
        seen.append(float(weights[: len(place)].detach() @ torch.tensor(place, dtype=torch.float64)))
        return seen[-1]

    assert exchange_ascent(problem, value, value, heaviest=4) == 3  # 15, 25, 27, 28
    assert weights[:4].tolist() == [1.0, 2.0, 4.0, 3.0]  # in the order of `place`
    assert value() == max(seen) == 5 * 4 + 2 * 3 + 2


def test_an_exchange_is_kept_where_the_climb_falls_off_a_cliff() -> None:
    problem, place = ranked([0.0, 1.0])
    (weights,) = problem.parameters

    def value() -> float:
        return float(weights[:2].detach() @ torch.tensor(place, dtype=torch.float64))

    def falls() -> float:
        with torch.no_grad():
            weights[:2] = -7.0
        return value()

    assert exchange_ascent(problem, value, falls) == 1
    assert weights[:2].tolist() == [1.0, 2.0]


def test_exchanges_refuse_what_they_cannot_move() -> None:
    with pytest.raises(InputError, match=r"expected a leader of one parameter, a vector .*, got \["):
        exchange_ascent(lqr(), lambda: 0.0, lambda: 0.0)
    with pytest.raises(InputError, match="value: expected a finite number, got nan"):
        exchange_ascent(four_rooms(), lambda: float("nan"), lambda: 0.0)


# --- tabular climbs ----------------------------------------------------------------------------------------------


def problems(count: int) -> list[Problem]:
    """Different worlds, so that a mix-up of leaders shows."""
    return [random_cmdp(seed=i, temperature=0.2 + 0.1 * i) for i in range(count)]


def alone(problem: Problem, steps: int, of: int) -> float:
    """A leader's value after `steps` of `of` steps of Adam by itself, its learning rate falling in the second half."""
    optimizer = torch.optim.Adam(problem.parameters, lr=0.1, maximize=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 if step <= of / 2 else 0.1 * 2 * (1 - step / of)
        optimizer.zero_grad()
        leader_value(problem).backward()
        optimizer.step()
    return leader_value(problem).item()


def test_each_leader_climbs_as_it_would_alone_also_after_a_cut() -> None:
    together = problems(4)
    climb = ExactClimb(together, steps=12, learning_rate=0.1)
    values = climb.advance(5)
    assert values.tolist() == pytest.approx([alone(p, 5, 12) for p in problems(4)], abs=1e-9)
    climb.keep(torch.tensor([1, 3]))
    values = climb.advance(7)
    apart = problems(4)
    assert values.tolist() == pytest.approx([alone(apart[i], 12, 12) for i in (1, 3)], abs=1e-9)
    # The leaders that were handed in are the ones that moved, and those that were dropped stayed where they were.
    assert [leader_value(p).item() for p in together] == pytest.approx(
        [alone(p, n, 12) for p, n in zip(problems(4), (5, 12, 5, 12), strict=True)], abs=1e-9
    )


def sampled(count: int = 3, *, environment_steps: int, steps: int = 20, rate: float = 0.1) -> SampledClimb:
    return SampledClimb(
        problems(count),
        steps=steps,
        learning_rate=rate,
        estimator=lambda joint: PlugIn(joint.follower.cmdp),  # type: ignore[attr-defined]
        environment_steps=environment_steps,
        seed=7,
    )


def rooms(count: int, *, seed: int, rate: float) -> SampledClimb:
    """Leaders of one fine map, whose law of motion has to be learned from what all of them meet."""
    leaders = [four_rooms(temperature=0.003, horizon=200) for _ in range(count)]
    for start, leader in enumerate(leaders):
        scatter(leader, 5.0, seed=100, start=start)
    memory = TransitionMemory()
    return SampledClimb(
        leaders,
        steps=40,
        learning_rate=rate,
        estimator=lambda joint: PlugIn(joint.follower.cmdp, shrinkage=0.0, damping=0.0, memory=memory),  # type: ignore[attr-defined]
        environment_steps=4000,
        seed=seed,
    )


def test_sampled_values_approach_those_of_the_leaders() -> None:
    exact = torch.tensor([leader_value(p).item() for p in rooms(8, seed=0, rate=1e-9).problems], dtype=torch.float64)
    early, late = [], []
    for seed in range(3):
        climb = rooms(8, seed=seed, rate=1e-9)  # leaders that stand still
        early.append(climb.advance(1) - exact)
        late.append(climb.advance(29) - exact)
    error = [float(torch.stack(e).pow(2).mean().sqrt()) for e in (early, late)]
    assert error[1] < 0.02  # measured 0.008; the values lie between 0.00 and 0.28
    assert error[1] < 0.2 * error[0]  # of the first model, which has seen one step


def test_sampled_values_are_the_last_three_models_also_after_a_cut() -> None:
    climb, twin = (rooms(4, seed=0, rate=0.1) for _ in range(2))
    single = [twin.advance(1)]
    for _ in range(3):
        twin._values.clear()
        single.append(twin.advance(1))  # of this step alone
    assert torch.equal(climb.advance(4), torch.stack(single[1:]).mean(0))
    before = climb.advance(0)
    climb.keep(torch.tensor([1, 3]))
    assert torch.equal(climb.advance(0), before[[1, 3]])


def test_all_leaders_share_the_environment_steps_and_few_get_more_each() -> None:
    climb = sampled(environment_steps=3000)
    climb.advance(3)
    climb.keep(torch.tensor([2]))
    climb.advance(3)
    assert len(climb.used) == 6
    assert all(0.7 * 3000 <= used <= 1.1 * 3000 for used in climb.used[1:])  # the first guesses at the paths' length


def test_a_sampled_climb_repeats_itself_and_rises() -> None:
    first, second = sampled(environment_steps=3000), sampled(environment_steps=3000)
    before = torch.tensor([leader_value(p).item() for p in problems(3)])
    assert torch.equal(first.advance(12), second.advance(12))
    after = torch.tensor([leader_value(p).item() for p in first.problems])
    assert bool((after > before).all())


def test_a_memory_outlives_a_cut() -> None:
    memory = TransitionMemory()
    leaders = [four_rooms(temperature=0.003, seed=i, horizon=60) for i in range(3)]
    climb = SampledClimb(
        leaders,
        steps=6,
        learning_rate=0.1,
        estimator=lambda joint: PlugIn(joint.follower.cmdp, memory=memory),  # type: ignore[attr-defined]
        environment_steps=600,
        seed=0,
    )
    climb.advance(2)
    met = memory.steps
    climb.keep(torch.tensor([0, 2]))
    climb.advance(2)
    assert memory.steps > met > 0
    with pytest.raises(InputError, match="at least one for each of the 3 leaders, got 2"):
        sampled(environment_steps=2)


@pytest.mark.slow
def test_a_search_leaves_the_poor_optimum_of_a_single_ascent() -> None:
    """Tuned on seeds 100 and above; the published 0.91 is the best of three methods, one ascent ends at 0.58."""
    values = []
    for seed in (0, 1):
        leaders = [four_rooms(temperature=0.001, price=1.0, horizon=1) for _ in range(32)]
        for start, leader in enumerate(leaders):
            scatter(leader, 5.0, seed=seed, start=start)
        halving = Halving()
        winner = successive_halving(ExactClimb(leaders, steps=halving.steps, learning_rate=0.2), 32, halving)
        values.append(leader_value(leaders[winner]).item())
    assert sum(values) / 2 > 0.91


@pytest.mark.slow
def test_an_exchange_leaves_the_optimum_that_a_search_ends_in() -> None:
    """At lambda 0.005 and price 5 the tuning seed 101 ends at 1.087; the best known leader is worth 1.236."""
    leaders = [four_rooms(temperature=0.005, price=5.0, horizon=1) for _ in range(32)]
    for start, leader in enumerate(leaders):
        scatter(leader, 5.0, seed=101, start=start)
    halving = Halving()
    winner = leaders[successive_halving(ExactClimb(leaders, steps=halving.steps, learning_rate=0.2), 32, halving)]
    assert leader_value(winner).item() < 1.1
    made = exchange_ascent(
        winner,
        lambda: leader_value(winner).item(),
        lambda: ExactClimb([winner], steps=60, learning_rate=0.05).advance(60).item(),
    )
    assert made >= 1 and leader_value(winner).item() > 1.22
