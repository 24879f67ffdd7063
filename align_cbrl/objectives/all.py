"""Objectives: what the leader wants of the best response.

`ExpectedUtility` is the plain one. The others wrap an objective and may be combined: a price on divergence, a
constraint, and risk over nature's draw. `PreferenceLikelihood` is for rollouts of one step. `WorstGroup`, `CrossFitted`
and `PreferenceData` have files of their own.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from align_cbrl.distributed import gather_rows, together
from align_cbrl.errors import InputError
from align_cbrl.functional import discount_powers
from align_cbrl.problem import Evaluation, Leader, Objective, check_discount
from align_cbrl.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class ExpectedUtility(Objective):
    """The expected discounted utility, J = E sum_t gammaF^t u(s_t, a_t) (Thoma et al. 2024).

    Attributes:
        utility_function: maps (leader, rollouts) to utilities [B, T].
        discount: gammaF in [0, 1); irrelevant for rollouts of one step.
        depends_on_leader: True when the utility depends on x, which adds the direct term du/dx.

    Example:
        >>> from align_cbrl import Rollouts
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps={"score": torch.tensor([1.0, 3.0])})
        >>> objective = ExpectedUtility(lambda leader, rollouts: rollouts.steps["score"][:, None])
        >>> objective.summarize(objective.utility(None, rollouts), rollouts).value.item()
        2.0
    """

    utility_function: Callable[[Leader, Rollouts], Tensor]
    discount: float = 0.0
    depends_on_leader: bool = False

    def __post_init__(self) -> None:
        check_discount("ExpectedUtility.discount", self.discount)

    def utility(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """u(s_t, a_t) [B, T]. Raises InputError when the utility function returns another shape."""
        utility = self.utility_function(leader, rollouts)
        if tuple(utility.shape) != tuple(rollouts.mask.shape):
            raise InputError(
                f"utility: expected shape {tuple(rollouts.mask.shape)} (paths, steps), got {tuple(utility.shape)}"
            )
        return utility

    def summarize(self, utility: Tensor, rollouts: Rollouts) -> Evaluation:
        """The weighted mean of the discounted sums; the credit is the utility itself."""
        mask = rollouts.mask.to(utility.device)
        totals = _discounted(utility, mask, self.discount)  # [B]
        value = (rollouts.path_weight(utility.dtype).to(utility.device) * totals).mean()
        return Evaluation(value=value, credit=utility.detach())


class Wrapping(Objective):
    """An objective made of another one, to which it leaves whatever it does not override.

    Raises:
        InputError: what is wrapped is not worth the mean of something over paths.
    """

    objective: Objective

    def __post_init__(self) -> None:
        if isinstance(self.objective, PreferenceLikelihood):
            raise InputError(
                f"{type(self).__name__}.objective: expected one that is the mean of a utility, "
                f"got {type(self.objective).__name__}, which is made of pairs"
            )

    @property
    def discount(self) -> float:  # type: ignore[override]  # a field of the base class, here that of what is wrapped
        """The wrapped objective's gammaF."""
        return self.objective.discount

    @property
    def depends_on_leader(self) -> bool:  # type: ignore[override]  # as above
        """Whether the wrapped objective's utility depends on the leader."""
        return self.objective.depends_on_leader

    def utility(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """The wrapped objective's utility [B, T]."""
        return self.objective.utility(leader, rollouts)

    def direct_term(self, leader: Leader, rollouts: Rollouts, weight: Tensor) -> Tensor | None:
        """The wrapped objective's own."""
        return self.objective.direct_term(leader, rollouts, weight)

    def summarize(self, utility: Tensor, rollouts: Rollouts) -> Evaluation:
        """As the wrapped objective summarizes."""
        return self.objective.summarize(utility, rollouts)

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """As the wrapped objective aggregates."""
        return self.objective.aggregate(values, probabilities)

    def update(self, leader: Leader, rollouts: Rollouts) -> dict[str, float]:
        """The wrapped objective's."""
        return self.objective.update(leader, rollouts)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped objective's."""
        return self.objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the wrapped objective's."""
        self.objective.load_state_dict(state)


@dataclasses.dataclass(frozen=True)
class KLPriced(Wrapping):
    """Another objective less a price for leaving the prior: u - kappa log(pi / prior), per step.

    It is a budget for leaders whose power has none: without one, a leader buys utility with unlimited divergence
    (docs/derivation.md).

    Attributes:
        objective: the objective to price.
        price: kappa >= 0, utility per nat.
    """

    objective: Objective
    price: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("KLPriced.price", self.price, low=0, low_included=True)

    def direct_term(self, leader: Leader, rollouts: Rollouts, weight: Tensor) -> Tensor | None:
        """The priced objective's own, plus kappa log prior where the leader moves the prior."""
        direct = self.objective.direct_term(leader, rollouts, weight)
        log_prior = leader.log_prior(rollouts)
        if log_prior is None or self.price == 0:
            return direct
        priced = (
            self.price
            * torch.where(rollouts.mask.to(log_prior.device), weight * log_prior, torch.zeros_like(log_prior)).sum()
        )
        return priced if direct is None else direct + priced

    def utility(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """u - kappa (log pi - log prior) [B, T]. Raises InputError when Rollouts lack the log-probabilities."""
        if rollouts.log_policy is None or rollouts.log_prior is None:
            raise InputError("KLPriced: expected rollouts with log_policy and log_prior; this follower provides none")
        utility = self.objective.utility(leader, rollouts)
        moved = leader.log_prior(rollouts)
        log_prior = rollouts.log_prior if moved is None else moved
        divergence = (rollouts.log_policy - log_prior).to(utility.device, utility.dtype)
        return utility - self.price * torch.where(
            rollouts.mask.to(divergence.device), divergence, torch.zeros_like(divergence)
        )


@dataclasses.dataclass
class Constrained(Wrapping):
    """Maximise an objective subject to E sum_t gammaF^t c(s_t, a_t) <= bound, by ascent in the dual.

    The leader climbs the Lagrangian J_u - mu (J_c - bound). After every leader step the multiplier follows the
    constraint, mu <- max(0, mu + rate (J_c - bound)), J_c estimated from the step's own rollouts. The cost is asked
    for twice a step: once in the Lagrangian, once for the multiplier. A `Judge` answers the second time from its cache.

    Attributes:
        objective: an expectation, J_u.
        cost: what is bounded: utility c, with the same discount as the objective.
        bound: the largest expected cost allowed.
        rate: of the multiplier, in units of utility per unit of cost squared and step.
        multiplier: mu >= 0, the price of a unit of cost; where it starts, and where it is.

    Example:
        >>> from align_cbrl import Rollouts
        >>> scores = {"score": torch.tensor([1.0, 3.0]), "length": torch.tensor([4.0, 8.0])}
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps=scores)
        >>> score = ExpectedUtility(lambda leader, rollouts: rollouts.steps["score"][:, None])
        >>> length = ExpectedUtility(lambda leader, rollouts: rollouts.steps["length"][:, None])
        >>> objective = Constrained(score, cost=length, bound=5.0, rate=0.5)
        >>> objective.update(None, rollouts)
        {'constraint': 6.0, 'multiplier': 0.5}
        >>> objective.evaluate(None, rollouts).value.item()  # 2 - 0.5 (6 - 5)
        1.5
    """

    objective: Objective
    cost: Objective
    bound: float
    rate: float
    multiplier: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("Constrained.bound", self.bound)
        _check_number("Constrained.rate", self.rate, low=0)
        _check_number("Constrained.multiplier", self.multiplier, low=0, low_included=True)
        if self.cost.discount != self.objective.discount:
            raise InputError(
                f"Constrained.cost: expected the objective's discount {self.objective.discount}, "
                f"got {self.cost.discount}; both are sums over the same paths"
            )

    @property
    def depends_on_leader(self) -> bool:  # type: ignore[override]  # as in the class it wraps
        """Whether the utility or the cost depends on the leader."""
        return self.objective.depends_on_leader or self.cost.depends_on_leader

    def utility(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """u - mu c, [B, T]."""
        return self.objective.utility(leader, rollouts) - self.multiplier * self.cost.utility(leader, rollouts)

    def direct_term(self, leader: Leader, rollouts: Rollouts, weight: Tensor) -> Tensor | None:
        """The objective's own, less mu times the cost's."""
        terms = [
            self.objective.direct_term(leader, rollouts, weight),
            self.cost.direct_term(leader, rollouts, -self.multiplier * weight),
        ]
        given = [term for term in terms if term is not None]
        return sum(given[1:], given[0]) if given else None

    def summarize(self, utility: Tensor, rollouts: Rollouts) -> Evaluation:
        """The Lagrangian's value; the credit is u - mu c."""
        evaluation = self.objective.summarize(utility, rollouts)
        return dataclasses.replace(evaluation, value=evaluation.value + self.multiplier * self.bound)

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """The Lagrangian: the expectation of u - mu c, plus mu times the bound."""
        return self.objective.aggregate(values, probabilities) + self.multiplier * self.bound

    def update(self, leader: Leader, rollouts: Rollouts) -> dict[str, float]:
        """One step of dual ascent. Metrics: `constraint`, the estimated cost, and `multiplier`."""
        metrics = self.objective.update(leader, rollouts)
        with torch.no_grad():
            with together("computing the constraint's cost"):
                utility = self.cost.utility(leader, rollouts)
            # In several processes the multiplier is the same everywhere: it follows the whole batch's cost.
            cost = self.cost.summarize(gather_rows(utility), rollouts.over_ranks()).value.item()
        if cost != cost:
            raise InputError("Constrained.cost: expected a finite cost, got NaN; the multiplier was left as it is")
        self.multiplier = max(0.0, self.multiplier + self.rate * (cost - self.bound))
        return {**metrics, "constraint": cost, "multiplier": self.multiplier}

    def state_dict(self) -> dict[str, Any]:
        """The multiplier, and what the wrapped objective keeps."""
        return {"multiplier": self.multiplier, "objective": self.objective.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.multiplier = state["multiplier"]
        self.objective.load_state_dict(state["objective"])


class OverContexts(Wrapping):
    """A function of what the wrapped objective is worth in each context, instead of its mean.

    The credit of a step is its utility times the derivative of the function with respect to its context's value,
    divided by the context's probability: the same path counts for more where the function is steeper. On samples a
    context's value is the mean over its paths, and its probability their share; both are consistent, and biased by
    O(1 / paths of the context), since one sample makes the weight and what is weighted. `CrossFitted` removes that.
    """

    def labels(self, utility: Tensor, rollouts: Rollouts) -> list[int]:
        """The number of what each path's value belongs to, [B]: its context."""
        labels: list[int] = rollouts.contexts.tolist()
        return labels

    def risk(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """The objective from the values [K] and probabilities [K] of whatever `labels` names."""
        return self.aggregate(values, probabilities)

    @abc.abstractmethod
    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """The objective from the contexts' values [K] and probabilities [K]."""

    def summarize(self, utility: Tensor, rollouts: Rollouts) -> Evaluation:
        """Value, and credit [B, T]: the wrapped objective's credit, weighted by context."""
        mask = rollouts.mask.to(utility.device)
        weight = rollouts.path_weight(utility.dtype).to(utility.device)  # [B]
        totals = _discounted(utility, mask, self.discount)  # [B]
        names, place = number_labels(self.labels(utility, rollouts))
        utility = utility[:, : rollouts.horizon]  # what labels were made of may stand beside it
        place = place.to(utility.device)

        def by_context(value: Tensor) -> Tensor:  # [B] -> [K]
            return torch.zeros(len(names), dtype=value.dtype, device=value.device).index_add(0, place, value)

        mass = by_context(weight)
        if bool((mass == 0).any()):
            raise InputError(
                f"{type(self).__name__}: every path of context {names[int((mass == 0).nonzero()[0])]!r} has weight "
                "zero, so that its value is unknown"
            )
        probabilities = mass / mass.sum()
        with torch.enable_grad():
            values = by_context(weight * totals) / mass
            value = self.risk(values, probabilities)
            if not values.requires_grad:
                leaf = values.detach().requires_grad_(True)
                (slope,) = torch.autograd.grad(self.risk(leaf, probabilities), leaf)
            else:
                (slope,) = torch.autograd.grad(value, values, retain_graph=True)
        importance = slope.detach() / probabilities
        return Evaluation(value=value, credit=utility.detach() * importance[place][:, None])


@dataclasses.dataclass(frozen=True)
class MeanVariance(OverContexts):
    """The mean over contexts less `aversion` times their variance: E f - kappa Var f, f_c the value in context c.

    Attributes:
        objective: an expectation in every context.
        aversion: kappa >= 0, per unit of utility.

    Example:
        >>> objective = MeanVariance(ExpectedUtility(lambda leader, rollouts: None), aversion=0.5)
        >>> objective.aggregate(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])).item()
        1.5
    """

    objective: Objective
    aversion: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("MeanVariance.aversion", self.aversion, low=0, low_included=True)

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """E f - kappa Var f."""
        mean = (probabilities * values).sum()
        return mean - self.aversion * (probabilities * (values - mean) ** 2).sum()


@dataclasses.dataclass(frozen=True)
class CVaR(OverContexts):
    """The mean over the worst `share` of nature's draw: the conditional value at risk of f_c (Rockafellar and Uryasev).

    Attributes:
        objective: an expectation in every context.
        share: alpha in (0, 1]; 1 is the mean, and towards 0 it becomes the worst context.

    Example:
        >>> objective = CVaR(ExpectedUtility(lambda leader, rollouts: None), share=0.5)
        >>> objective.aggregate(torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.full((4,), 0.25)).item()
        1.5
    """

    objective: Objective
    share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.share <= 1):
            raise InputError(f"CVaR.share: expected a share in (0, 1], got {self.share}")

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """The mean of the worst contexts, the last of them counted as far as it reaches into the share."""
        order = torch.argsort(values.detach())
        mass = probabilities[order]
        weight = (self.share - (mass.cumsum(0) - mass)).clamp(min=0).minimum(mass) / self.share
        return (weight * values[order]).sum()


@dataclasses.dataclass(frozen=True)
class EntropicRisk(OverContexts):
    """The entropic certainty equivalent over nature's draw, -(1 / theta) log E exp(-theta f).

    Attributes:
        objective: an expectation in every context.
        aversion: theta > 0, per unit of utility: towards 0 the mean, towards infinity the worst context.

    Example:
        >>> objective = EntropicRisk(ExpectedUtility(lambda leader, rollouts: None), aversion=2.0)
        >>> round(objective.aggregate(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])).item(), 4)
        0.2831
    """

    objective: Objective
    aversion: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("EntropicRisk.aversion", self.aversion, low=0)

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """-(1 / theta) log E exp(-theta f)."""
        # Normalised again: what the probabilities miss of one by rounding would be divided by theta.
        log_law = torch.log_softmax(probabilities.log(), 0)
        return -torch.logsumexp(log_law - self.aversion * values, 0) / self.aversion


@dataclasses.dataclass(frozen=True)
class WorstContext(OverContexts):
    """The worst context's value, however rare it is; or a soft minimum.

    Attributes:
        objective: an expectation in every context.
        temperature: tau >= 0, in units of utility. 0 is the minimum, which is not differentiable where two contexts
            are worst; above 0 it is -tau log mean_c exp(-f_c / tau), every context counted once.

    Example:
        >>> objective = WorstContext(ExpectedUtility(lambda leader, rollouts: None))
        >>> objective.aggregate(torch.tensor([4.0, 1.0]), torch.tensor([0.9, 0.1])).item()
        1.0
    """

    objective: Objective
    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("WorstContext.temperature", self.temperature, low=0, low_included=True)

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """The minimum, or the soft one, over contexts that nature may draw."""
        values = values[probabilities > 0]
        if self.temperature == 0:
            return values.min()
        count = torch.tensor(float(len(values)), dtype=values.dtype, device=values.device)
        return -self.temperature * (torch.logsumexp(-values / self.temperature, 0) - count.log())


@dataclasses.dataclass(frozen=True)
class PreferenceLikelihood(Objective):
    """How well the leader's reward explains preferences on pairs of the follower's own answers (PARL's objective).

    For rollouts of one step,

        J = E_c E_{y, y' ~ pi*} l(y, y'),    l = p log sigma(r - r') + (1 - p) log sigma(r' - r),

    where p is the probability that y is preferred to y': sigma((score - score') / scale) where a judge scores answers
    (Bradley and Terry), or what a judge of pairs says. x enters twice: in the likelihood, the direct term, and in what
    pairs there are, the response. Pairs are those within a group. J is quadratic in the policy, so that the credit of
    y is twice its mean over partners. A group's mean, which `GroupCritic` compares with, holds the partners as well;
    that shrinks the covariance by (G - 2) / (G - 1), which the credit makes up for: groups of at least 3 are needed,
    and the estimate is then unbiased. The factor is the same however many partners an answer has, as long as all have
    as many (docs/objectives.md).

    Attributes:
        score: maps (leader, rollouts) to scores [B, 1] that do not depend on x: a judge, or a table.
        scale: of the score, > 0: smaller means surer preferences.
        preference: instead of `score`, maps (rollouts, first, second), the latter row numbers long [M], to the
            probabilities [M] that the first row's answer is preferred: a `PairwiseJudge`, or a table.
        partners: with how many others of its group each answer is paired: an even number, or None for all of them.
            A judge of pairs is asked about G * partners / 2 pairs a group.

    Raises:
        InputError: neither or both of score and preference; a scale that is not positive; an odd number of partners.

    Example:
        >>> objective = PreferenceLikelihood(lambda leader, rollouts: rollouts.steps["score"][:, None])
        >>> objective.pair(torch.tensor(0.0), torch.tensor(0.0)).item() == torch.tensor(0.5).log().item()
        True
    """

    score: Callable[[Leader, Rollouts], Tensor] | None = None
    scale: float = 1.0
    preference: Callable[[Rollouts, Tensor, Tensor], Tensor] | None = None
    partners: int | None = None
    discount: float = 0.0
    depends_on_leader: bool = True

    def __post_init__(self) -> None:
        _check_number("PreferenceLikelihood.scale", self.scale, low=0)
        if (self.score is None) == (self.preference is None):
            raise InputError("PreferenceLikelihood: expected either score or preference, one of the two")
        if self.partners is not None and (self.partners < 2 or self.partners % 2):
            raise InputError(f"PreferenceLikelihood.partners: expected an even number >= 2, got {self.partners}")
        if self.discount != 0 or not self.depends_on_leader:
            raise InputError("PreferenceLikelihood: expected discount 0 and depends_on_leader True; they are not free")

    def pair(self, reward_difference: Tensor, score_difference: Tensor) -> Tensor:
        """The expected log-likelihood l of a pair, from r - r' and score - score', of any shape."""
        return pair_likelihood(reward_difference, torch.sigmoid(score_difference / self.scale))

    def utility(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """What pairs are made of: the reward r_x and the score side by side [B, 2], or the reward alone [B, 1]."""
        if rollouts.horizon != 1:
            raise InputError(
                f"PreferenceLikelihood: expected rollouts of one step, got a horizon of {rollouts.horizon}"
            )
        reward = leader.reward(rollouts)
        if self.score is None:
            return reward
        score = self.score(leader, rollouts)
        if tuple(score.shape) != (rollouts.size, 1):
            raise InputError(
                f"PreferenceLikelihood.score: expected shape ({rollouts.size}, 1), got {tuple(score.shape)}"
            )
        return torch.cat([reward, score.detach().to(reward)], 1)

    def direct_term(self, leader: Leader, rollouts: Rollouts, weight: Tensor) -> Tensor | None:
        """The sum of weight * r_x: the score does not move."""
        return (weight[:, :1] * leader.reward(rollouts)).sum()

    def summarize(self, utility: Tensor, rollouts: Rollouts) -> Evaluation:
        """Mean over groups of the mean over their pairs; a judge of pairs is asked here, once about each pair.

        Raises:
            InputError: groups of fewer than 3, more partners than others in a group, or preferences outside [0, 1].
        """
        group = rollouts.group[:, 0].to(utility.device)
        path_weight = rollouts.path_weight(utility.dtype).to(utility.device)
        _, place, sizes = torch.unique(group, return_inverse=True, return_counts=True)
        if int(sizes.min()) < 3:
            raise InputError(
                f"PreferenceLikelihood: expected groups of at least 3 answers, got one of {int(sizes.min())}; two make "
                "the pair and a third is what it is compared with"
            )
        value, credit = utility.new_zeros(()), utility.new_zeros(rollouts.size)
        for size in sizes.unique().tolist():  # groups of one size at a time: [N G] -> [N, G]
            rows = (sizes[place] == size).nonzero()[:, 0]
            rows = rows[torch.argsort(place[rows], stable=True)].view(-1, size)
            reward, weight = utility[rows, 0], path_weight[rows]
            paired = self._paired(size).to(weight)  # [G, G]
            preferred = self._preferred(utility, rollouts, rows, paired)  # [N, G, G]
            likelihood = pair_likelihood(reward[:, :, None] - reward[:, None, :], preferred)
            partner = weight[:, None, :] * paired
            mean = (partner * likelihood).sum(2) / partner.sum(2).clamp(min=torch.finfo(weight.dtype).tiny)  # [N, G]
            of_group = weight * partner.sum(2)
            total = of_group.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
            value = value + (of_group / total * mean).sum()
            credit[rows] = (2 * (size - 1) / (size - 2) * mean).detach()
        return Evaluation(value=value / len(sizes), credit=credit[:, None])

    def _paired(self, size: int) -> Tensor:
        """bool [G, G]: who is paired with whom. Answers stand on a ring, each paired with its nearest neighbours."""
        distance = (torch.arange(size)[:, None] - torch.arange(size)[None, :]) % size
        if self.partners is None:
            return distance > 0
        if self.partners > size - 1:
            raise InputError(
                f"PreferenceLikelihood.partners: expected at most {size - 1}, the others of a group of {size}, got "
                f"{self.partners}"
            )
        return (distance > 0) & (torch.minimum(distance, size - distance) <= self.partners // 2)

    def _preferred(self, utility: Tensor, rollouts: Rollouts, rows: Tensor, paired: Tensor) -> Tensor:
        """The probability that row i's answer is preferred to row j's, [N, G, G]; 1/2 where they are no pair."""
        if self.preference is None:
            score = utility[rows, 1]
            return torch.sigmoid((score[:, :, None] - score[:, None, :]) / self.scale)
        if not rollouts.steps:
            raise InputError(
                "PreferenceLikelihood.preference: a judge of pairs reads both answers, and in several processes "
                "they may lie in different ones; run one process, or use a score"
            )
        i, j = torch.triu(paired, 1).nonzero(as_tuple=True)
        said = self.preference(rollouts, rows[:, i].reshape(-1), rows[:, j].reshape(-1))  # [N * pairs]
        if tuple(said.shape) != (rows.shape[0] * len(i),) or not bool(((said >= 0) & (said <= 1)).all()):
            raise InputError(
                f"PreferenceLikelihood.preference: expected {rows.shape[0] * len(i)} probabilities in [0, 1], one a "
                f"pair, got shape {tuple(said.shape)}: {said.flatten()[:4].tolist()}..."
            )
        said = said.to(utility).view(rows.shape[0], -1)
        preferred = torch.full((rows.shape[0], *paired.shape), 0.5, dtype=utility.dtype, device=utility.device)
        preferred[:, i, j], preferred[:, j, i] = said, 1 - said
        return preferred


def pair_likelihood(reward_difference: Tensor, preferred: Tensor | float) -> Tensor:
    """p log sigma(d) + (1 - p) log sigma(-d), the expected log-likelihood of a pair (Bradley and Terry).

    Args:
        reward_difference: d = r(first) - r(second), of any shape.
        preferred: p, the probability that the first is preferred; 1 where that is known.

    Example:
        >>> pair_likelihood(torch.tensor(0.0), 1.0).item() == torch.tensor(0.5).log().item()
        True
    """
    forward = torch.nn.functional.logsigmoid(reward_difference)
    backward = torch.nn.functional.logsigmoid(-reward_difference)
    return preferred * forward + (1 - preferred) * backward


def number_labels(labels: Sequence[Any]) -> tuple[list[Any], Tensor]:
    """The distinct labels in the order in which they first occur, and for each row the number of its own: long [B].

    Example:
        >>> number_labels(["law", "art", "law"])
        (['law', 'art'], tensor([0, 1, 0]))
    """
    number: dict[Any, int] = {}
    place = [number.setdefault(label, len(number)) for label in labels]
    return list(number), torch.tensor(place)


def _discounted(utility: Tensor, mask: Tensor, discount: float) -> Tensor:
    """The discounted sum of every path, [B, T] to [B]."""
    powers = discount_powers(discount, utility.shape[1], utility)  # [T]
    return torch.where(mask, utility * powers, torch.zeros_like(utility)).sum(1)


def _check_number(name: str, value: float, *, low: float = -float("inf"), low_included: bool = False) -> None:
    if not (low < value < float("inf") or (low_included and value == low)):
        bound = "" if low == -float("inf") else f" {'>=' if low_included else '>'} {low:g}"
        raise InputError(f"{name}: expected a finite number{bound}, got {value}")
