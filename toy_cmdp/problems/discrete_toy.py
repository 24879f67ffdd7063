"""Three states, a leader whose draw the follower sees, and a response that a wrong backup misses.

DiscreteToy4: Kudo et al., "Sample-Efficient Hypergradient Estimation for Decentralized Bi-Level Reinforcement
Learning", ICAPS 2026 (arXiv 2603.14867).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from align_cbrl.checks import Positive, Range, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.tables.arguments import check_size, finite_tensor
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility
from toy_cmdp.tables.linear_systems import Horizon
from toy_cmdp.tables.sparse import SparseTransition

_STATES, _DRAWS, _ACTIONS = 3, 2, 3  # S, A, B; the leader's 0 and 1; the follower's s, a, b
_CELLS = _STATES * _DRAWS
_BACKUPS = 20_000


class DiscreteToyLeader(TabularLeader):
    """Commits to f(1 | s), whose draws the follower sees: a state of the table is (step, s, draw).

    The steps count to the leader's horizon and stand still there: the follower plays on without end, unaware of it.

    Attributes:
        logits: the parameter, [3]; f(1 | s) is their sigmoid, for s = S, A, B.
    """

    reward_table: Tensor
    successor: Tensor

    def __init__(self, logits: Tensor, reward: Tensor, horizon: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self._horizon = horizon
        after = _moves().repeat(horizon + 1, 1, 1)[..., None] * _DRAWS + torch.arange(_DRAWS)  # cell of (s', draw)
        step = torch.arange(horizon + 1).add(1).clamp(max=horizon).repeat_interleave(_CELLS)
        self.register_buffer("successor", after.flatten(0, 1) + _CELLS * step[:, None, None])
        self.register_buffer("reward_table", reward.flatten(0, 1).repeat(horizon + 1, 1)[None])

    def commitment(self) -> Tensor:
        """f(1 | s), [3]."""
        return torch.sigmoid(self.logits)

    def tables(self) -> Tables:
        """The law of the next draw and the first one move with the leader; entropy regularisation."""
        f = self.commitment()
        draws = torch.stack([1 - f, f], -1)  # [3, 2]
        probability = draws[self.successor[..., 0] % _CELLS // _DRAWS]
        initial = torch.nn.functional.pad(draws[0], (0, len(self.successor) - _DRAWS))
        return Tables(self.reward_table, SparseTransition(self.successor, probability[None]), initial[None])


@checked
def discrete_toy(
    *,
    reward: float = 1.0,
    commitment: Any = None,
    horizon: Horizon = 150,
    temperature: Positive = 0.05,
    discount: Annotated[float, Range(0, 1, open="low high")] = 0.99,
    undiscounted: bool = False,
    seed: Whole = 0,
) -> Problem:
    """The leader wants the follower to go from S to A; once there, the follower may take the way over B.

    From S, a leads to A and b to B, each worth 1 to the follower, and a worth 1 to the leader. In A, after the leader's
    0, s leads to S and b to B, the latter worth `reward` to the follower; after the leader's 1 everything leads to S,
    and costs 1. From B, s leads to S. Anything else stays where it is.

    Args:
        reward: R, of the way from A to B.
        commitment: f(1 | s) for S, A and B, each in (0, 1); drawn at random by default.
        horizon: steps that the leader counts.
        temperature: lambda.
        discount: of both; the follower plays without end.
        undiscounted: whether the leader sums without its discount.
        seed: of the commitment.

    Raises:
        InputError: probabilities of another shape or not inside (0, 1), numbers out of range.

    Example:
        >>> from toy_cmdp import leader_value
        >>> round(leader_value(discrete_toy(commitment=[0.5, 0.17, 0.5])).item(), 2)
        27.31
    """
    check_size((horizon + 1) * _CELLS * _ACTIONS * 100, horizon=horizon)
    drawn = torch.randn(_STATES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if commitment is not None:
        given = finite_tensor("commitment", commitment, (_STATES,))
        if bool(((given <= 0) | (given >= 1)).any()):
            raise InputError(f"commitment: expected probabilities inside (0, 1), got {given.tolist()}")
        drawn = torch.logit(given)
    steps = torch.arange(horizon, dtype=torch.float64)
    worth = discount**-steps if undiscounted else torch.ones_like(steps)
    earned = torch.zeros(1, horizon + 1, _STATES, _DRAWS, _ACTIONS, dtype=torch.float64)
    earned[0, :horizon, 0, :, 1] = worth[:, None]
    table = earned.reshape(1, -1, _ACTIONS)
    cmdp = ContextualMDP(
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, table.shape[1], dtype=torch.bool),
        state_names=[f"step {t}, {s}, {b}" for t in range(horizon + 1) for s in "SAB" for b in range(_DRAWS)],
        action_names=("s", "a", "b"),
    )
    objective = ExpectedUtility(TabularUtility(lambda leader: table), discount=discount)
    follower = ExactFollower(cmdp, temperature, discount)
    return Problem(DiscreteToyLeader(drawn, _rewards(reward), horizon), objective, follower)


@checked
def discrete_toy_value(
    commitment: Tensor,
    *,
    backup: Literal["standard", "averaged"] = "standard",
    reward: float = 1.0,
    horizon: Horizon = 150,
    temperature: Positive = 0.05,
    discount: Annotated[float, Range(0, 1, open="low high")] = 0.99,
    undiscounted: bool = False,
) -> Tensor:
    """What commitments are worth to the leader, [N], if the follower backs values up in one of two ways.

    After its next action the follower will see the leader's draw b before it chooses, so that its value there is
    V(s) = E_b lambda log sum_a exp(Q(s, b, a) / lambda): the standard backup. The published code takes the
    log-sum-exp of E_b Q(s, b, .) instead, as if it had to choose without seeing b. In both, the policy is
    softmax(Q(s, b, .) / lambda).

    Args:
        commitment: f(1 | s), [N, 3].
        backup: "standard" or "averaged", the published one.
        reward: as for `discrete_toy`, and so on.
        horizon: steps that the leader counts.
        temperature: lambda.
        discount: of both.
        undiscounted: whether the leader sums without its discount.

    Raises:
        InputError: probabilities of another shape or outside [0, 1], numbers out of range.

    Example:
        >>> f = torch.tensor([[0.5, 0.16, 0.5]], dtype=torch.float64)
        >>> round(discrete_toy_value(f, backup="averaged").item(), 2)
        27.26
    """
    f = finite_tensor("commitment", commitment, ("N", _STATES))
    if bool(((f < 0) | (f > 1)).any()):
        raise InputError("commitment: expected probabilities in [0, 1]")
    draws = torch.stack([1 - f, f], -1)  # [N, S, 2]
    gain, moves = _rewards(reward), _moves().view(_STATES, _DRAWS, _ACTIONS)
    value, q = torch.zeros_like(f), torch.zeros(len(f), _STATES, _DRAWS, _ACTIONS, dtype=f.dtype)
    for _ in range(_BACKUPS):
        q = gain + discount * value[:, moves]
        if backup == "standard":
            new = (draws * temperature * torch.logsumexp(q / temperature, -1)).sum(-1)
        else:
            new = temperature * torch.logsumexp((draws[..., None] * q).sum(2) / temperature, -1)
        done = bool((new - value).abs().max() < 1e-13)
        value = new
        if done:
            break
    policy = torch.softmax(q / temperature, -1)
    at = torch.zeros_like(f)
    at[:, 0] = 1.0
    total = torch.zeros(len(f), dtype=f.dtype)
    for t in range(horizon):
        mass = at[:, :, None, None] * draws[..., None] * policy  # [N, S, 2, A]
        total += (1.0 if undiscounted else discount**t) * mass[:, 0, :, 1].sum(-1)
        at = torch.zeros_like(at).index_add(1, moves.reshape(-1), mass.flatten(1))
    return total


def _moves() -> Tensor:
    """The next of S, A, B, long [6, 3], by (state, draw) and action."""
    following = torch.arange(_STATES)[:, None, None].repeat(1, _DRAWS, _ACTIONS)
    following[0, :, 1], following[0, :, 2] = 1, 2
    following[1, 0, 0], following[1, 0, 2] = 0, 2
    following[1, 1] = 0
    following[2, :, 0] = 0
    return following.view(_CELLS, _ACTIONS)


def _rewards(way: float) -> Tensor:
    """The follower's, [S, 2, A]."""
    gain = torch.zeros(_STATES, _DRAWS, _ACTIONS, dtype=torch.float64)
    gain[0, :, 1:] = 1
    gain[1, 1] = -1
    gain[1, 0, 2] = way
    return gain
