"""A function of means over all contexts: target shares, F1, a harmonic mean, a ratio."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from align_cbrl.checks import NonNegative, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.functional import leaves_of
from align_cbrl.objectives.expected import MEAN, mean_term
from align_cbrl.problem import Evaluation, Joint, Objective, Observation, Observed, Term

_ONE = 1e-6  # by which target shares may miss a total of one
_PARTITION = 0.05  # by which shares found may: weights have mean one up to noise


@checked
class FunctionOfMeans(Objective, Joint):
    """A function of means over all contexts, J = h(E c_1, ..., E c_m): "30 % short answers, 5 % refusals", F1, a ratio.

    Each c_j is an objective that is a mean, with a credit of its own. J's credit is sum_j dh/dm_j credit_j: what a
    completion is worth depends on where the means stand, which no score of a completion can say. h's slopes are taken
    at the batch's means; where h is not linear they are correlated with what they multiply, a bias of one over the
    completions of the batch, and noisy. A `memory` averages the means with those of earlier contexts, up to memory /
    (contexts a step) steps old.

    Args:
        h: maps means [m] to a scalar, smooth: `target_shares`, `f1`, `harmonic_mean`, `ratio`, or one's own.
        utilities: what the means are of, in h's order: objectives such as `ExpectedUtility` or `SetUtility`, means over
            contexts with one discount.
        memory: how many contexts of earlier steps are remembered, in whole steps; 0 for none.

    Raises:
        InputError: no utilities, one that is no mean over contexts or has another discount; an h whose value or slope
            at the present means is not finite, or which depends on the leader other than through the means.

    Example:
        >>> from align_cbrl import ExpectedUtility, Rollouts
        >>> steps = {"help": torch.tensor([1.0, 0.0]), "words": torch.tensor([3.0, 1.0])}
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps=steps)
        >>> helpful = ExpectedUtility(lambda leader, rollouts: rollouts.steps["help"][:, None])
        >>> words = ExpectedUtility(lambda leader, rollouts: rollouts.steps["words"][:, None])
        >>> found = FunctionOfMeans(ratio, [helpful, words]).evaluate(None, rollouts)
        >>> found.value.item(), found.credit[:, 0].tolist()  # 0.5 / 2; slopes 1 / 2 and -0.5 / 4
        (0.25, [0.125, -0.125])
    """

    is_mean = False
    is_linear = False

    def __init__(self, h: Callable[[Tensor], Tensor], utilities: Sequence[Objective], memory: Whole = 0) -> None:
        if not utilities:
            raise InputError("FunctionOfMeans.utilities: expected at least one")
        for i, utility in enumerate(utilities):
            if not utility.is_mean:
                raise InputError(
                    f"FunctionOfMeans.utilities[{i}]: expected a mean over contexts, got {type(utility).__name__}"
                )
        discounts = sorted({utility.discount for utility in utilities})
        if len(discounts) > 1:
            raise InputError(f"FunctionOfMeans.utilities: expected one discount, got {discounts}")
        self.h = h
        self.utilities = tuple(utilities)
        self.memory = memory
        self._past: list[tuple[int, list[float]]] = []  # contexts and means of earlier steps
        self._seen: tuple[int, list[float]] | None = None  # the same of the batch that was evaluated last

    @property
    def discount(self) -> float:  # type: ignore[override]  # a field of the base class, here that of the utilities
        """The utilities' gammaF."""
        return self.utilities[0].discount

    @property
    def one_step(self) -> bool:  # type: ignore[override]  # as above
        """Whether one of the utilities is for problems of one step only."""
        return any(utility.one_step for utility in self.utilities)

    @property
    def remembers(self) -> bool:  # type: ignore[override]  # as above
        """Whether there is a memory, here or in one of the utilities."""
        return self.memory > 0 or any(utility.remembers for utility in self.utilities)

    @property
    def price_of_a_nat(self) -> float:
        """That of h, where it names one: how far J bends down with a nat, at most."""
        return float(getattr(self.h, "price_of_a_nat", 0.0))

    def observations(self) -> tuple[Observation, ...]:
        """Those of the utilities."""
        return tuple(o for utility in self.utilities for o in utility.observations())

    def terms(self, observed: Observed) -> list[Term]:
        """Nothing, to which a price may be added, and the utilities' means, jointly."""
        means = [mean_term(utility, observed) for utility in self.utilities]
        nothing = torch.zeros_like(means[0].utility.detach())
        joint = [Term(mean.utility, mean.credit, MEAN, joint=self) for mean in means]
        return [Term(nothing, nothing, MEAN), *joint]

    def combine(self, worths: Tensor) -> Tensor:
        """h of the means [m]."""
        means = self._means(worths)
        self._slopes(means.detach())
        return self.h(means)

    def estimate(self, parts: Sequence[Evaluation], observed: Observed) -> Evaluation:
        """h at the means of batch and memory, with its slopes there."""
        means = self._means(torch.stack([part.value for part in parts]))
        self._seen = (int(observed.samples.contexts.unique().numel()), means.tolist())
        remembered = [*self._past, self._seen]
        contexts = means.new_tensor([count for count, _ in remembered])
        present = (contexts @ means.new_tensor([past for _, past in remembered])) / contexts.sum()  # [m]
        value, slopes = self._slopes(present)
        credit = torch.stack([slope * part.credit for slope, part in zip(slopes, parts, strict=True)]).sum(0)
        return Evaluation(value + (slopes * (means - means.detach())).sum(), credit)

    def update(self, observed: Callable[[], Observed]) -> dict[str, float]:
        """Remember the means of the batch evaluated last, forget the oldest, and let the utilities adapt."""
        if self.memory and self._seen is not None:
            self._past.append(self._seen)
            while sum(count for count, _ in self._past) > self.memory:
                del self._past[0]
        self._seen = None
        return {name: value for u in self.utilities for name, value in u.update(observed).items()}

    def state_dict(self) -> dict[str, Any]:
        """The remembered means, and what the utilities keep."""
        return {
            "contexts": [count for count, _ in self._past],
            "means": [means for _, means in self._past],
            "utilities": [utility.state_dict() for utility in self.utilities],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._past = list(zip(state["contexts"], state["means"], strict=True))
        for utility, own in zip(self.utilities, state["utilities"], strict=True):
            utility.load_state_dict(own)

    def _means(self, worths: Tensor) -> Tensor:
        return worths + worths.new_tensor([utility.constant for utility in self.utilities])

    def _slopes(self, means: Tensor) -> tuple[Tensor, Tensor]:
        """h's value and slopes [m] at means [m], without graph."""
        with torch.enable_grad():
            leaf = means.detach().requires_grad_(True)
            value = self.h(leaf)
            if not isinstance(value, Tensor) or value.ndim:
                raise InputError(f"FunctionOfMeans.h: expected a scalar of {len(means)} means, got {value!r:.60}")
            if any(other is not leaf for other in leaves_of(value)):
                raise InputError(
                    "FunctionOfMeans.h: it depends on parameters other than through the means, whose own derivative "
                    "would be left out; make what depends on them one of the utilities"
                )
            (slopes,) = torch.autograd.grad(value, leaf)
        if not (bool(torch.isfinite(value)) and bool(torch.isfinite(slopes).all())):
            raise InputError(
                "FunctionOfMeans.h: expected a finite value and slope at the present means, got "
                f"{value.item():g} and {slopes.tolist()} at {means.tolist()}; a class that nothing belongs to, or a "
                "denominator of zero, is the usual reason: draw larger batches, remember earlier contexts "
                "(memory=...), or use an h that is smooth there"
            )
        return value.detach(), slopes


@checked
def target_shares(shares: Sequence[NonNegative]) -> Callable[[Tensor], Tensor]:
    """h for shares of classes that should hit a target: -KL(target || means), at most zero, and zero there.

    The means are those of the classes' indicators, 1 where a completion is of a class and 0 elsewhere.

    A nat between policies moves the shares by a nat at most, so that near the target J bends down by no more than one
    per nat: F^-1 g is at most Newton's step, and natural steps are no longer than that. They end where the target is.

    Args:
        shares: the targets, one a class, which sum to one: classes exclude each other and leave nothing out.

    Raises:
        InputError: targets that do not sum to one; in use, classes of which completions are in none or in several.

    Example:
        >>> h = target_shares([0.25, 0.75])
        >>> h(torch.tensor([0.25, 0.75])).item(), round(h(torch.tensor([0.5, 0.5])).item(), 4)
        (0.0, -0.1308)
    """
    total = sum(shares)
    if abs(total - 1) > _ONE:
        raise InputError(
            f"target_shares: expected shares that sum to one, got {list(shares)} with sum {total:g}; add a class for "
            "all the rest"
        )
    return _TargetShares(tuple(shares))


@dataclasses.dataclass(frozen=True)
class _TargetShares:
    shares: tuple[float, ...]
    price_of_a_nat: ClassVar[float] = 1.0

    def __call__(self, means: Tensor) -> Tensor:
        _expect("target_shares", means, len(self.shares))
        found = float(means.detach().sum())
        if abs(found - 1) > _PARTITION:
            raise InputError(
                f"target_shares: expected classes of which each completion is in one, got shares {means.tolist()} "
                f"with sum {found:g}"
            )
        wanted = [i for i, share in enumerate(self.shares) if share > 0]
        target = means.new_tensor([self.shares[i] for i in wanted])
        return (target * (means[wanted] / target).log()).sum()


@checked
def f1(means: Tensor) -> Tensor:
    """F1 from the shares [3] of true positives, of what is called positive, and of what is positive: 2 t / (c + p).

    Example:
        >>> f1(torch.tensor([0.25, 0.5, 0.5])).item()
        0.5
    """
    _expect("f1", means, 3)
    return 2 * means[0] / (means[1] + means[2])


@checked
def harmonic_mean(means: Tensor) -> Tensor:
    """The harmonic mean of two means [2], 2 a b / (a + b), which the smaller one rules; both should be positive.

    Example:
        >>> harmonic_mean(torch.tensor([1.0, 0.5])).item()
        0.6666666865348816
    """
    _expect("harmonic_mean", means, 2)
    return 2 * means[0] * means[1] / (means[0] + means[1])


@checked
def ratio(means: Tensor) -> Tensor:
    """The ratio of two means [2], a / b: what is gained per unit of what is spent.

    Example:
        >>> ratio(torch.tensor([1.0, 4.0])).item()
        0.25
    """
    _expect("ratio", means, 2)
    return means[0] / means[1]


def _expect(name: str, means: Tensor, count: int) -> None:
    if tuple(means.shape) != (count,):
        raise InputError(f"{name}: expected the means of {count} utilities, got {len(means)}")
