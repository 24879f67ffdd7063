"""The contracts of contextual bilevel RL: `Leader`, `Objective`, `Critic`, `Follower`, and the `Problem` they form.

Shapes throughout: B paths, T steps. A language model's completions are the case T = 1.
"""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align_cbrl.checks import checked
from align_cbrl.distributed import rank, share
from align_cbrl.errors import InputError
from align_cbrl.functional import leaves_of
from align_cbrl.rollouts import Rollouts


class Leader(nn.Module, abc.ABC):
    """What the leader controls: a module whose parameters x shape the follower's world.

    Only `reward` has to be written. The others are for leaders that move the transitions, the initial state or the
    follower's prior; they return None where the leader leaves those alone.
    """

    @abc.abstractmethod
    def reward(self, rollouts: Rollouts) -> Tensor:
        """The follower's rewards r_x [B, T], differentiable in the leader's parameters."""

    def log_transition(self, rollouts: Rollouts) -> Tensor | None:
        """log P_x(s_{t+1} | s_t, a_t) in nats [B, T], or None when the leader does not move the transitions."""
        return None

    def log_initial(self, rollouts: Rollouts) -> Tensor | None:
        """log rho_x(s_0) in nats [B], or None when the leader does not move the initial state."""
        return None

    def log_prior(self, rollouts: Rollouts) -> Tensor | None:
        """log prior_x(a_t | s_t) in nats [B, T], or None when the leader does not move the prior."""
        return None

    def follower_temperature(self) -> Tensor | None:
        """The follower's temperature lambda, a positive scalar differentiable in x, or None: it is not the leader's.

        Where there is one, it replaces `Follower.temperature`. It is asked for anew at every backward pass.
        """
        return None

    def fixed_features(self, rollouts: Rollouts) -> Tensor | None:
        """What the reward is made of and does not move with x, such as the scores of reward functions; first axis B.

        `prepare` computes it once for a batch, and `reward` finds it in `rollouts.known[self]`. Default: None.
        """
        return None

    def first_order(self, rollouts: Rollouts) -> Tensor | None:
        """r_x and dr_x/dx of each path at the present x, where one backward pass gives all of them; first axis B.

        `reward` finds it in `rollouts.known[self]`, and all that a leader step asks of these paths is then made from
        one pass through the leader: certificate, weights, gradient and metric. It is worth nothing once x has moved.
        Default: None, and each of them makes its own pass.
        """
        return None

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts with the `fixed_features` of this leader in `known`; they are not computed again."""
        if self in rollouts.known:
            return rollouts
        with torch.no_grad():
            features = self.fixed_features(rollouts)
        return rollouts if features is None else rollouts.knowing({self: features})

    def project(self) -> None:
        """Bring the parameters back into the leader's budget; called after every leader step. Default: no budget."""


class Observation(abc.ABC):
    """A number of every step that an objective is made of: a utility, a log-ratio, a group label.

    Objectives declare what they need; whoever evaluates them provides it. An estimator computes an observation from
    rollouts, chunk by chunk, and the referee of `toy_cmdp` computes it as a table. Equal observations are computed
    once, so that an objective and the constraint around it may share a judge.

    Attributes:
        name: used in messages.
        moves: whether it may depend on the leader's parameters directly, and not only through the policy.
        lasting: whether it stays the same for the same paths, whatever the leader and the weights of the paths.
    """

    name: str = "observation"
    moves: bool = False
    lasting: bool = False

    @abc.abstractmethod
    def of(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """The observation of every step [B, T], with its graph to the leader's parameters where it `moves`."""


@checked
@dataclasses.dataclass(frozen=True)
class Observed:
    """An objective's observations: on samples, or as tables over all states and actions.

    Attributes:
        values: the observations, [B, T] on samples and [C, S, A] as tables.
        rollouts: the samples; None for tables.
        policy: the follower's policy pi(a | s) [C, S, A]; None for samples.
    """

    values: Mapping[Observation, Tensor]
    rollouts: Rollouts | None = None
    policy: Tensor | None = None

    def __getitem__(self, observation: Observation) -> Tensor:
        return self.values[observation]

    @property
    def lasting(self) -> Mapping[Observation, Tensor]:
        """The observations that stay the same for the same paths, such as a judge's scores."""
        return {o: value for o, value in self.values.items() if o.lasting}

    @property
    def samples(self) -> Rollouts:
        """The rollouts. Raises InputError for tables, on which an objective that asks for them has no exact value."""
        if self.rollouts is None:
            raise InputError("this objective is made of sampled data, so it has no exact value on a table")
        return self.rollouts


@checked
@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An objective, or a term of one, on a batch of rollouts.

    Attributes:
        value: scalar, the estimate of the objective, differentiable in the observations that it was made of.
        credit: [B, T], detached: the objective's influence on the policy, df/dpi, up to a constant per state, on
            the scale of a utility per step. It equals the utility itself for an expected utility.
    """

    value: Tensor
    credit: Tensor


class Risk(abc.ABC):
    """A function of what the policy is worth in every context; the mean is the simplest.

    It must shift with its argument, risk(f + c) = risk(f) + c for a constant c, as all coherent risk measures do.
    """

    @abc.abstractmethod
    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """The risk of the contexts' values [K] under their probabilities [K]: scalar, differentiable in the values."""

    @abc.abstractmethod
    def estimate(self, term: Term, observed: Observed, discount: float) -> Evaluation:
        """The risk of a term on samples, and the credit that goes with it."""


class Joint(abc.ABC):
    """A function of what several terms are worth over all contexts, where J is not their sum."""

    @abc.abstractmethod
    def combine(self, worths: Tensor) -> Tensor:
        """What J holds of terms that are worth `worths` [M]: scalar, differentiable in them."""

    @abc.abstractmethod
    def estimate(self, parts: Sequence[Evaluation], observed: Observed) -> Evaluation:
        """The same on samples, from the terms' evaluations, and the credit that goes with it."""


@checked
@dataclasses.dataclass(frozen=True)
class Term:
    """A part of an objective: `risk` of what the policy is worth in each context.

    Attributes:
        utility: [B, T], or [C, S, A] as a table. Its discounted sum along paths, averaged, is a context's value f_c.
        credit: of the same shape, df_c/dpi up to a constant per state. It is the utility itself where f_c is linear in
            the policy.
        risk: what is made of the contexts' values.
        joint: what is made of this term's worth and that of the others with the same `joint`; None: it is added to J.
    """

    utility: Tensor
    credit: Tensor
    risk: Risk
    joint: Joint | None = None

    def plus(self, other: Tensor) -> Term:
        """The term with `other` added to its utility, hence to its credit."""
        return dataclasses.replace(self, utility=self.utility + other, credit=self.credit + other)


class Objective(abc.ABC):
    """What the leader wants: J = sum of `terms` + `constant`, known through `observations` (or see `Joint`).

    Attributes:
        discount: the leader's discount gammaF in [0, 1).
        is_mean: whether every term is a mean over contexts, so that a risk may be put around the objective.
        is_linear: whether the credit of every term is its utility, so that f_c is linear in the policy.
        one_step: whether it is defined for problems of one step only, such as completions.
        remembers: whether it keeps values of earlier batches, and evaluates a batch together with them.
    """

    discount: float = 0.0
    is_mean: bool = True
    is_linear: bool = True
    one_step: bool = False
    remembers: bool = False

    @abc.abstractmethod
    def observations(self) -> tuple[Observation, ...]:
        """What it needs to know of every step."""

    @abc.abstractmethod
    def terms(self, observed: Observed) -> list[Term]:
        """The parts that J is the sum of; wrappers put what they add to the first one, or append their own.

        No access to the leader is allowed here, so that observations can be computed, and differentiated, in chunks.
        """

    @property
    def constant(self) -> float:
        """What J holds besides its terms."""
        return 0.0

    @property
    def price_of_a_nat(self) -> float:
        """What J charges for a nat of divergence from the prior, or how far it bends down with one: natural steps are
        no longer than F^-1 g divided by it. 0: as long as their bound.
        """
        return 0.0

    def observe(self, leader: Leader, rollouts: Rollouts) -> Observed:
        """Its observations of a batch; those that the rollouts carry already (`Rollouts.known`) are not made again.

        Raises:
            InputError: an observation that is said not to move depends on the leader's parameters, or paths of several
                steps for an objective of one.
        """
        if self.one_step and rollouts.horizon > 1:
            raise InputError(ONE_STEP.format(name=type(self).__name__, what=f"paths of up to {rollouts.horizon} steps"))
        needed = dict.fromkeys(self.observations())  # equal ones once
        values = {o: rollouts.known[o] if o in rollouts.known else _observed(o, leader, rollouts) for o in needed}
        return Observed(values, rollouts)

    def summarize(self, observed: Observed) -> Evaluation:
        """Value and credit [B, T] of a whole batch from its observations."""
        terms = self.terms(observed)
        evaluated = [(term.joint, term.risk.estimate(term, observed, self.discount)) for term in terms]
        parts = [part for joint, part in evaluated if joint is None]
        for joint in dict.fromkeys(joint for joint, _ in evaluated if joint is not None):
            parts.append(joint.estimate([part for whose, part in evaluated if whose is joint], observed))
        value, credit = parts[0].value, parts[0].credit
        for part in parts[1:]:
            value, credit = value + part.value, credit + part.credit
        return Evaluation(value + self.constant if self.constant else value, credit)

    def evaluate(self, leader: Leader, rollouts: Rollouts) -> Evaluation:
        """Value, differentiable in x, and credit [B, T] of a batch of rollouts."""
        return self.summarize(self.observe(leader, rollouts))

    def update(self, observed: Callable[[], Observed]) -> dict[str, float]:
        """Adapt what the objective itself keeps, such as a multiplier; called once per leader step, after the gradient.

        Args:
            observed: gives what the gradient was computed from: the whole batch, of all processes.

        Returns:
            Metrics. By default there is nothing to adapt, and there are none.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of `update`; the same types as `Follower.state_dict`. Default: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def combined(terms: Sequence[Term], worths: Sequence[Tensor]) -> Tensor:
    """J less its constant, from what each of its terms is worth: a scalar, differentiable in them."""
    total = torch.zeros_like(worths[0])
    for joint in dict.fromkeys(term.joint for term in terms):
        own = torch.stack([worth for term, worth in zip(terms, worths, strict=True) if term.joint is joint])
        total = total + (own.sum() if joint is None else joint.combine(own))
    return total


ONE_STEP = (
    "{name}: expected a problem of one step, such as completions, in which every state is terminal, got {what}; an "
    "ExpectedUtility has to be told its discount there: without one it would be worth its first step alone"
)


def require_still(name: str, leader: Leader | None, *values: Tensor) -> None:
    """Raise `InputError` if values that are said not to depend on the leader have a graph to its parameters.

    Such a graph would be cut, and with it the direct term of the hypergradient.
    """
    if leader is None:
        return
    own = {id(parameter) for parameter in leader.parameters() if parameter.requires_grad}
    if any(id(leaf) in own for leaf in leaves_of(*values)):
        raise InputError(
            f"{name}: it depends on the parameters of {type(leader).__name__}, but is said not to, so that its own "
            "derivative (the direct term) would be left out; pass depends_on_leader=True to ExpectedUtility, or "
            "moves=True to an observation; detach it where it is meant to be constant"
        )


def _observed(observation: Observation, leader: Leader, rollouts: Rollouts) -> Tensor:
    """The observation; one that does not move is computed with a graph to see that it does not, and nothing saved."""
    if observation.moves:
        return observation.of(leader, rollouts)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda _: torch.empty(0)):
        value = observation.of(leader, rollouts)
    require_still(observation.name, leader, value)
    return value.detach()


@checked
@dataclasses.dataclass(frozen=True)
class Critique:
    """What a critic says of the leader's credit along the paths.

    Attributes:
        advantage: [B, T], A_F(s_t, a_t) of the credit under the follower's policy.
        value: [B, T + 1], V_F(s_t), or None when the critic does not know it.
        soft_value: [B, T + 1], the follower's own V_lambda(s_t), or None. Both are needed only by leaders that move
            the transitions or the initial state; after the end of a path they are zero.
    """

    advantage: Tensor
    value: Tensor | None = None
    soft_value: Tensor | None = None


class Critic(abc.ABC):
    """Estimates the leader's advantage along the paths.

    Two conditions make the hypergradient right, and neither is a matter of variance only. The advantage must not be
    formed from the future of the same path, which is correlated with that path's own reward gradient. And it must be
    centred at every state, E_{a ~ pi}[A(s, a)] = 0, since the reward gradient it is multiplied with is not: an
    arbitrary baseline, harmless in a policy gradient, is a bias here.
    """

    @abc.abstractmethod
    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        """Advantage [B, T], and values where known, of `credit` [B, T]."""


OnRollouts = Callable[[Rollouts, dict[str, float]], bool]
"""Called by a follower with its rollouts and metrics when the leader may step; returns False to end the run."""


class Follower(abc.ABC):
    """Trains its own policy to best-respond to the leader, and can be observed through rollouts.

    Attributes:
        temperature: lambda > 0, the weight of KL(policy || prior) in what the follower maximises.
        discount: the follower's gamma in [0, 1). A language model takes one step: 0.

    Either may be a tensor [C] with one number for each context: contexts carry the follower's identity, so that a
    population of followers with different temperatures, discounts and rewards is one `Follower`.
    """

    temperature: float | Tensor
    discount: float | Tensor

    @abc.abstractmethod
    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` contexts drawn by nature: long [count]."""

    @abc.abstractmethod
    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """Improve the policy towards the best response to the leader's present rewards; returns metrics."""

    @abc.abstractmethod
    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        """`group_size` paths of the present policy for each of the contexts [N]: B = N * group_size."""

    def follow(
        self,
        leader: Leader,
        on_rollouts: OnRollouts,
        *,
        start: int,
        steps: int,
        contexts_per_step: int,
        group_size: int,
        seed: int,
    ) -> None:
        """Best-respond and hand out rollouts, once per leader step from `start` to `steps`.

        This is the one place that decides who drives whom: it alternates `turn`, which the leader's step waits for, and
        `leader_stepped`. A follower whose trainer owns its loop overrides it and calls `on_rollouts` from inside that
        loop.
        """
        for step in range(start, steps):
            rollouts, metrics = self.turn(
                leader, step, contexts_per_step=contexts_per_step, group_size=group_size, seed=seed
            )
            go_on = on_rollouts(rollouts, metrics)
            self.leader_stepped()
            if not go_on:
                return

    def turn(
        self, leader: Leader, step: int, *, contexts_per_step: int, group_size: int, seed: int
    ) -> tuple[Rollouts, dict[str, float]]:
        """The follower's part of leader step `step`: a response, and the rollouts that the leader then sees.

        Every step draws from a generator seeded by (seed, step) alone, so that a resumed run repeats itself. In several
        processes all draw the same contexts, and each rolls out its share of them: rank 0 goes on with that generator,
        every other rank has one of its own, seeded by (seed, step, rank). The arguments are those of `follow`.
        """
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        contexts = self.sample_contexts(contexts_per_step, generator)
        metrics = self.respond_for(leader, step, contexts)
        if rank() > 0:
            generator.manual_seed(step_seed(step_seed(seed, step), rank()))
        return self.rollout(contexts[share(len(contexts))], group_size, generator), metrics

    def respond_for(self, leader: Leader, step: int, contexts: Tensor) -> dict[str, float]:
        """`respond`, of a follower that also has to know for which leader step. Default: `respond`."""
        return self.respond(leader, contexts)

    def leader_stepped(self) -> None:
        """Called after the leader's step on the rollouts of the last `turn`. Default: nothing to do."""

    def sampler_evidence(self) -> dict[str, float]:
        """Nats of evidence that its paths are not samples of the policy that their log-probabilities belong to, by what
        seems to be wrong (`SamplerEvidence.by_alternative`). Default: none is kept.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: nested dictionaries and lists of tensors, numbers, strings, booleans and None."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@checked
@dataclasses.dataclass(frozen=True)
class Problem:
    """A contextual bilevel problem: the leader ascends `objective`, knowing that `follower` best-responds.

    Raises:
        InputError: a temperature that is not positive (the follower's, or the one that the leader sets), a discount
            outside [0, 1), or a leader without trainable parameters.
    """

    leader: Leader
    objective: Objective
    follower: Follower

    def __post_init__(self) -> None:
        check_temperature("follower.temperature", self.follower.temperature)
        check_discount("follower.discount", self.follower.discount)
        check_discount("objective.discount", self.objective.discount)
        if not any(p.requires_grad for p in self.leader.parameters()):
            raise InputError(
                f"leader: {type(self.leader).__name__} has no trainable parameters; register them with "
                "nn.Parameter and leave requires_grad True"
            )
        temperature_of(self.leader, self.follower)  # raises where the leader's is none

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The leader's trainable parameters, x."""
        return [p for p in self.leader.parameters() if p.requires_grad]

    @property
    def temperature(self) -> float | Tensor:
        """lambda: the leader's own, a scalar with its graph, where it sets one, and otherwise the follower's."""
        return temperature_of(self.leader, self.follower)


def temperature_of(leader: Leader, follower: Follower) -> float | Tensor:
    """The temperature that `follower` responds with to `leader`, differentiable where the leader sets it.

    Raises:
        InputError: a leader's temperature that is no positive scalar.
    """
    own = leader.follower_temperature()
    if own is None:
        return follower.temperature
    name = f"{type(leader).__name__}.follower_temperature"
    if own.ndim != 0:
        raise InputError(f"{name}: expected a scalar tensor, got shape {tuple(own.shape)}")
    check_temperature(name, own)
    return own


def require_fixed_temperature(problem: Problem, name: str) -> float | Tensor:
    """The follower's own temperature, for estimators that have no term for one that moves.

    Raises:
        InputError: the leader sets the temperature.
    """
    if problem.leader.follower_temperature() is not None:
        raise InputError(
            f"{name}: {type(problem.leader).__name__} sets the follower's temperature, for which this estimator has no "
            "term; use PolicyResponse"
        )
    return problem.follower.temperature


def check_temperature(name: str, value: float | Tensor, contexts: int | None = None) -> None:
    """Raise `InputError` unless `value` is a positive, finite temperature, or one for each of the contexts."""
    for number in _numbers(name, value, contexts):
        if not (0 < number < float("inf")):
            raise InputError(
                f"{name}: expected a positive temperature lambda, got {number}; without it the best response is not "
                "Boltzmann and the hypergradient is undefined"
            )


_LONGEST = 1e-9  # 1 - discount; values are then as large as 1e9 rewards, known to seven digits in double precision


def check_discount(name: str, value: float | Tensor, contexts: int | None = None) -> None:
    """Raise `InputError` unless `value` lies in [0, 1), or each of its numbers where there is one a context.

    Within 1e-9 of one it is accepted with a warning, since values then lose more digits than a policy can do without.
    """
    for number in _numbers(name, value, contexts):
        if not (0 <= number < 1):
            raise InputError(f"{name}: expected a discount in [0, 1), got {number}")
        if 1 - number <= _LONGEST:
            warnings.warn(
                f"{name}: {number!r} is within {_LONGEST:g} of one: values reach {1 / (1 - number):.0e} rewards, and "
                "differences between actions, which the policy is made of, are lost in their rounding; lower it",
                stacklevel=3,
            )


def per_path(value: float | Tensor, contexts: Tensor) -> float | Tensor:
    """A follower's temperature or discount along paths: the number, or [B] where there is one for each context.

    Args:
        value: a number, a scalar tensor, or [C].
        contexts: long [B], the context of each path.

    Example:
        >>> per_path(torch.tensor([0.25, 0.5]), torch.tensor([1, 1, 0])).tolist()
        [0.5, 0.5, 0.25]
    """
    return value.to(contexts.device)[contexts] if isinstance(value, Tensor) and value.ndim else value


def _numbers(name: str, value: float | Tensor, contexts: int | None) -> list[float]:
    if not isinstance(value, Tensor):
        return [value]
    if value.ndim == 0:
        return [float(value.detach())]
    if value.ndim != 1 or len(value) == 0 or (contexts is not None and len(value) != contexts):
        expected = "[C], one a context" if contexts is None else f"[{contexts}], one a context"
        raise InputError(f"{name}: expected a number or a tensor {expected}, got shape {tuple(value.shape)}")
    numbers: list[float] = value.detach().unique().tolist()  # NaN, if there is one, stays
    return numbers


def step_seed(seed: int, step: int) -> int:
    """A seed for outer step `step` of a run seeded `seed`: distinct pairs give unrelated streams (splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + step + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1
