"""`PolicyResponse`: HPGD's hypergradient, through the Boltzmann best response, in one backward pass."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from align_cbrl.checks import Count, checked
from align_cbrl.distributed import own_rows, sum_gradients_, world_size
from align_cbrl.errors import InputError, first_line
from align_cbrl.estimators.critics import GroupCritic
from align_cbrl.estimators.degenerate import degenerate_groups
from align_cbrl.estimators.hypergradient import Hypergradient, check_reward
from align_cbrl.estimators.observing import direct_term, influence, observe, of_all_ranks
from align_cbrl.estimators.reward_pass import let_go, reward_of
from align_cbrl.estimators.shortage import make_room, out_of_memory
from align_cbrl.functional import discount_powers, eligibility_trace
from align_cbrl.problem import Critic, Critique, Leader, Problem, per_path
from align_cbrl.rollouts import Rollouts, check_finite

_PIECE = 2**18  # entries of a gradient that are squared at once


@checked
@dataclasses.dataclass
class PolicyResponse(Hypergradient):
    """HPGD: the gradient through the Boltzmann best response, by one backward pass whatever the size of x.

    With the trace w_k = gamma w_{k-1} + gammaF^k A_F(s_k, a_k), the gradient of J is the expectation of that of

        value + log rho(s_0) V_F(s_0) + sum_k { (w_k / lambda) r_k + w_k log prior_k
                 + [gammaF^{k+1} V_F(s_{k+1}) + (gamma / lambda) w_k V_lambda(s_{k+1})] log P_k }

    with everything detached but the objective's value, r, log P, log rho and log prior (Thoma et al. 2024;
    derived in docs/derivation.md). Where the leader sets lambda, that of r_k / lambda is differentiated too.
    Completions of a language model are the case T = 1, where it is the covariance of utility and reward gradient within
    each prompt's group, divided by the temperature.

    Attributes:
        critic: gives A_F and, for leaders that move transitions or the initial state, V_F and V_lambda.
        chunks: into how many pieces the paths are cut for the backward pass; bounds memory, changes no result. It is
            doubled, for good, whenever a piece does not fit into memory; the judge is not asked again for that.

    Metrics besides those of `Hypergradient`: `degenerate_groups`, for one step: the share of groups that were skipped,
    since their completions are identical or are all judged alike.

    Raises:
        InputError: a leader on whose parameters nothing depends; a reward of another shape, or NaN or infinite; a
            credit that is not finite; a critic without the values that this leader needs; memory that does not hold a
            single path's backward pass.
    """

    critic: Critic = dataclasses.field(default_factory=GroupCritic)
    chunks: Count = 1
    over_ranks: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """See `Hypergradient.backward`."""
        leader, objective = problem.leader, problem.objective
        before = [None if p.grad is None else p.grad.detach().clone() for p in problem.parameters]
        if world_size() > 1:  # what is summed over ranks below is this gradient only
            problem.leader.zero_grad(set_to_none=True)

        # First pass, without graph: the whole batch's observations, hence its credit, advantage and trace. In several
        # processes the judge is asked about a rank's own paths, and every rank then knows the whole batch's numbers.
        observed = of_all_ranks(observe(problem, rollouts, self.chunks))
        whole, own_paths = observed.samples, own_rows(rollouts.size)
        evaluation, weights = influence(objective, observed, leader)
        with torch.no_grad():
            critique = self.critic.evaluate(problem, whole, evaluation.credit)
            check_finite("advantage", critique.advantage, whole)
            metrics = {}
            if whole.horizon == 1:
                empty, metrics["degenerate_groups"] = degenerate_groups(
                    rollouts, whole, evaluation.credit, critique.advantage
                )
                kept = torch.where(empty[:, None], 0.0, critique.advantage)
                critique = dataclasses.replace(critique, advantage=kept)
            trace = self._trace(problem, whole, critique)  # [B, T]
        weights = {o: weight[own_paths] for o, weight in weights.items()}
        trace, critique = trace[own_paths], _rows(critique, own_paths)

        # Second pass, chunk by chunk: the surrogate, whose weights are all known by now. It is what takes memory, and
        # begins anew in smaller chunks when that runs out. The utilities stay: a judge would have to be paid again.
        origin = [None] * len(before) if world_size() > 1 else before
        while True:
            shortage = None
            try:
                for piece, here in _with_rows(rollouts.chunks(self.chunks)):
                    share = self._surrogate(problem, piece, trace[here], _rows(critique, here)) / whole.size
                    own = direct_term(leader, piece, {o: weight[here] for o, weight in weights.items()})
                    _differentiable(leader, share if own is None else share + own).backward()
                    del share, own
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                shortage = first_line(error)  # the error itself holds on to what fills the memory
            let_go(leader, rollouts)
            if shortage is None:
                break
            for parameter, old in zip(problem.parameters, origin, strict=True):
                parameter.grad = None if old is None else old.clone()
            self._cut_smaller(rollouts.size, shortage)
        if world_size() > 1:
            sum_gradients_(problem.parameters)
            for parameter, old in zip(problem.parameters, before, strict=True):
                if old is not None:
                    parameter.grad = old if parameter.grad is None else parameter.grad + old

        return {
            "objective": evaluation.value.item(),
            "gradient_norm": _norm_of_change(problem, before),
            **metrics,
        }

    def state_dict(self) -> dict[str, Any]:
        """The number of chunks, which may have grown."""
        return {"chunks": self.chunks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; more chunks than it holds stay."""
        self.chunks = max(self.chunks, state.get("chunks", 1))

    def _cut_smaller(self, paths: int, shortage: str) -> None:
        length = -(-paths // self.chunks)
        if length == 1:
            raise InputError(
                f"{type(self).__name__}: memory does not hold the leader's backward pass for a single path "
                f"({shortage}); train fewer of its parameters (a head, LoRA), turn on gradient checkpointing, shorten "
                "the completions, or use a device with more memory"
            )
        self.chunks = min(2 * self.chunks, paths)
        warnings.warn(
            f"the leader's backward pass ran out of memory with chunks of {length} paths ({shortage}); it goes on in "
            f"{self.chunks} chunks of {-(-paths // self.chunks)}: set PolicyResponse(chunks={self.chunks}) to start "
            "there",
            stacklevel=3,
        )
        make_room()

    def _trace(self, problem: Problem, rollouts: Rollouts, critique: Critique) -> Tensor:
        """The weight of each step in the response, [B, T]."""
        return eligibility_trace(
            critique.advantage,
            rollouts.mask.to(critique.advantage.device),
            per_path(problem.follower.discount, rollouts.contexts),
            problem.objective.discount,
        )

    def _surrogate(self, problem: Problem, piece: Rollouts, trace: Tensor, critique: Critique) -> Tensor:
        """The sum over a chunk's paths of everything but the direct term, differentiable in x."""
        leader, leader_discount = problem.leader, problem.objective.discount
        reward = reward_of(leader, piece)
        check_reward(leader, reward, piece)
        weight = piece.path_weight(reward.dtype).to(reward.device)[:, None]  # [B, 1]
        # A follower with reward r at temperature lambda is one with reward r / lambda at temperature 1. What moves with
        # lambda is that reward; V_lambda / lambda below is its value, whose own motion the trace has taken up.
        temperature = _column(per_path(problem.temperature, piece.contexts), reward)
        trace = trace.to(reward.device, reward.dtype)
        total = _masked(weight * trace * (reward / temperature), piece).sum()

        log_prior = leader.log_prior(piece)
        if log_prior is not None:
            check_finite("leader.log_prior", log_prior, piece)
            total = total + _masked(weight * trace * log_prior, piece).sum()

        log_transition = leader.log_transition(piece)
        if log_transition is not None:
            check_finite("leader.log_transition", log_transition, piece)
            value = _required(critique.value, self.critic, "value")[:, 1:]
            soft_value = _required(critique.soft_value, self.critic, "soft_value")[:, 1:]
            powers = leader_discount * discount_powers(leader_discount, piece.horizon, trace)  # gammaF^{k+1}
            discount = _column(per_path(problem.follower.discount, piece.contexts), reward)
            fixed = temperature.detach() if isinstance(temperature, Tensor) else temperature
            credit = powers * value + discount / fixed * trace * soft_value
            total = total + _masked(weight * credit * log_transition, piece).sum()

        log_initial = leader.log_initial(piece)
        if log_initial is not None:
            total = total + (weight[:, 0] * _required(critique.value, self.critic, "value")[:, 0] * log_initial).sum()
        return total


def _with_rows(pieces: Sequence[Rollouts]) -> Iterator[tuple[Rollouts, slice]]:
    """Each piece, and where its paths stand in the whole."""
    start = 0
    for piece in pieces:
        yield piece, slice(start, start + piece.size)
        start += piece.size


def _differentiable(leader: Leader, surrogate: Tensor) -> Tensor:
    if not surrogate.requires_grad:
        raise InputError(
            f"{type(leader).__name__}: neither its reward nor anything else depends on its parameters, so no "
            "incentive can be learned; compute the reward from them with gradients enabled (no torch.no_grad, "
            "no .detach())"
        )
    return surrogate


def _required(value: Tensor | None, critic: Critic, name: str) -> Tensor:
    if value is None:
        raise InputError(
            f"{type(critic).__name__} gives no {name}, which a leader that moves transitions or the initial state needs"
        )
    return value


def _masked(value: Tensor, rollouts: Rollouts) -> Tensor:
    return torch.where(rollouts.mask.to(value.device), value, torch.zeros_like(value))


def _column(value: float | Tensor, like: Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        return value
    return value.to(like)[:, None] if value.ndim else value.to(like)


def _rows(critique: Critique, here: slice) -> Critique:
    value, soft_value = critique.value, critique.soft_value
    return Critique(
        critique.advantage[here],
        None if value is None else value[here],
        None if soft_value is None else soft_value[here],
    )


def _norm_of_change(problem: Problem, before: list[Tensor | None]) -> float:
    squares = 0.0
    for parameter, old in itertools.zip_longest(problem.parameters, before):
        if parameter.grad is not None:
            # Piece by piece: a whole matrix in double precision would take more memory than the step itself.
            for start in range(0, parameter.grad.numel(), _PIECE):
                change = parameter.grad.reshape(-1)[start : start + _PIECE].double()
                if old is not None:
                    change = change - old.reshape(-1)[start : start + _PIECE]
                squares += float(change.dot(change))
    return math.sqrt(squares)
