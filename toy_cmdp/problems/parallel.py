"""Many leaders in one problem: seeds and cells of a study, solved and sampled as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Leader, Problem, require_fixed_temperature
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.problems.parallel_linear import parallel_linear
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility, require_tabular
from toy_cmdp.tables.linear_systems import LinearLeader
from toy_cmdp.tables.sparse import SparseTransition


class ParallelLeaders(TabularLeader):
    """L leaders side by side: the contexts of leader l are l C, ..., l C + C - 1.

    Attributes:
        leaders: the leaders themselves; their parameters are this leader's.
    """

    leaders: nn.ModuleList

    def __init__(self, leaders: Sequence[TabularLeader]) -> None:
        super().__init__()
        self.leaders = nn.ModuleList(leaders)
        self._shared = self._common_transition()

    def members(self) -> list[TabularLeader]:
        """The leaders, in order."""
        return [require_tabular(leader) for leader in self.leaders if isinstance(leader, Leader)]

    def tables(self) -> Tables:
        """The leaders' tables one after the other; a constant law that all share stays one."""
        tables = [leader.tables() for leader in self.members()]
        transition = self._shared
        if transition is None:
            laws = [
                t.transition.expand(len(t.reward), -1, -1, -1)
                for t in tables
                if not isinstance(t.transition, SparseTransition)
            ]
            transition = torch.cat(laws)
        priors = [t.log_prior for t in tables if t.log_prior is not None]
        if len(priors) not in (0, len(tables)):
            raise InputError("parallel: expected all leaders to have a log_prior or none; entropy is not a prior")
        return Tables(
            torch.cat([t.reward for t in tables]),
            transition,
            torch.cat([t.initial for t in tables]),
            torch.cat(priors) if priors else None,
        )

    def project(self) -> None:
        """Every leader's own budget."""
        for leader in self.members():
            leader.project()

    def _common_transition(self) -> Tensor | SparseTransition | None:
        """The constant law that all leaders share, or None. Decided once: tables that are constant stay so."""
        with torch.enable_grad():
            laws = [leader.tables().transition for leader in self.members()]
        first = laws[0]
        if first.shape[0] == 1 and not first.requires_grad and all(_equal(first, law) for law in laws[1:]):
            return first
        if any(isinstance(law, SparseTransition) for law in laws):
            raise InputError("parallel: expected one constant sparse law, shared by all contexts and leaders")
        return None


class ParallelFollower(ExactFollower):
    """The best responses to all leaders; contexts are drawn for each leader in equal number."""

    def __init__(self, followers: Sequence[ExactFollower], cmdp: ContextualMDP) -> None:
        super().__init__(
            cmdp,
            _per_context([f.temperature for f in followers], followers),
            _per_context([f.discount for f in followers], followers),
            horizon=max(f.horizon for f in followers),
        )
        self._followers = list(followers)

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` contexts, count / L for each leader by its own law of nature, long [count].

        Raises:
            InputError: a count that is no multiple of the number of leaders.
        """
        leaders = len(self._followers)
        if count % leaders:
            raise InputError(f"contexts: expected a multiple of the {leaders} leaders, got {count}")
        offset, drawn = 0, []
        for follower in self._followers:
            drawn.append(offset + follower.sample_contexts(count // leaders, generator))
            offset += follower.cmdp.contexts
        return torch.cat(drawn)


@checked
def parallel(problems: Sequence[Problem]) -> Problem:
    """One problem whose value is the mean of the given ones' values.

    No leader's parameters touch another's value, so that each parameter's gradient is that of its own problem divided
    by the number of problems: an optimizer that works entry by entry does for each what it would do alone (Adam is
    indifferent to the factor but for its epsilon). Tables are solved context by context, and a transition law that
    all share is kept once.

    Args:
        problems: of equal numbers of states and actions and one leader's discount, each objective an
            `ExpectedUtility` of a `TabularUtility`; temperatures and discounts may differ. Or all linear, with one
            temperature, discount and horizon.

    Raises:
        InputError: no problems, or some that cannot be put side by side.

    Example:
        >>> from toy_cmdp import leader_value, random_cmdp
        >>> problems = [random_cmdp(seed=0), random_cmdp(seed=1, temperature=0.2)]
        >>> both = leader_value(parallel(problems)).item()
        >>> abs(both - sum(leader_value(p).item() for p in problems) / 2) < 1e-12
        True
    """
    if not problems:
        raise InputError("problems: expected at least one")
    if isinstance(problems[0].leader, LinearLeader):
        return parallel_linear(problems)
    leaders = [require_tabular(problem.leader) for problem in problems]
    followers: list[ExactFollower] = []
    utilities: list[TabularUtility] = []
    moving = []
    for problem in problems:
        follower, objective = problem.follower, problem.objective
        if not isinstance(follower, ExactFollower):
            raise InputError(f"problems: expected ExactFollower in each, got {type(follower).__name__}")
        if not isinstance(objective, ExpectedUtility) or not isinstance(objective.utility_function, TabularUtility):
            raise InputError(
                f"problems: expected ExpectedUtility(TabularUtility(...)) in each, got {type(objective).__name__}"
            )
        require_fixed_temperature(problem, "parallel")
        followers.append(follower)
        utilities.append(objective.utility_function)
        moving.append(objective.depends_on_leader)
    discounts = sorted({problem.objective.discount for problem in problems})
    if len(discounts) > 1:
        raise InputError(f"problems: expected one discount of the leader's, got {discounts}")
    states = {follower.cmdp.states for follower in followers}
    if len(states) > 1:
        raise InputError(f"problems: expected equal numbers of states, got {sorted(states)}")

    def utility(leader: TabularLeader) -> Tensor:
        assert isinstance(leader, ParallelLeaders)
        return torch.cat([u.table(member) for u, member in zip(utilities, leader.members(), strict=True)])

    cmdp = ContextualMDP(
        torch.cat([f.cmdp.context_probabilities for f in followers]) / len(problems),
        torch.cat([f.cmdp.terminal for f in followers]),
        context_names=[
            f"{name} of problem {i}"
            for i, f in enumerate(followers)
            for name in (f.cmdp.context_names or range(f.cmdp.contexts))
        ],
        state_names=followers[0].cmdp.state_names,
        action_names=followers[0].cmdp.action_names,
    )
    objective = ExpectedUtility(
        TabularUtility(utility),
        discount=discounts[0],
        depends_on_leader=any(moving),
    )
    return Problem(ParallelLeaders(leaders), objective, ParallelFollower(followers, cmdp))


def _per_context(values: Sequence[float | Tensor], followers: Sequence[ExactFollower]) -> float | Tensor:
    """One number if it is the same for all, otherwise one for each context."""
    columns = [
        torch.as_tensor(value, dtype=torch.float64).expand(follower.cmdp.contexts)
        for value, follower in zip(values, followers, strict=True)
    ]
    joined = torch.cat(columns)
    return float(joined[0]) if bool((joined == joined[0]).all()) else joined


def _equal(one: Tensor | SparseTransition, other: Tensor | SparseTransition) -> bool:
    if isinstance(one, SparseTransition) or isinstance(other, SparseTransition):
        return one is other
    return one is other or (one.shape == other.shape and not other.requires_grad and bool(torch.equal(one, other)))
