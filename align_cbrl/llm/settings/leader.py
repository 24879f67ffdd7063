"""Which reward the leader learns, where it starts, and its budget."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from align_cbrl.checks import Positive, checked
from align_cbrl.errors import InputError
from align_cbrl.llm import (
    LanguageLeader,
    LearnedBeta,
    LengthShaping,
    LoRA,
    RewardMixture,
    RewardModel,
    RewardModelLeader,
    Shaped,
)
from align_cbrl.llm.leaders.mixture import Constraint
from align_cbrl.llm.leaders.reward_model import Trainable
from align_cbrl.llm.reward_models import check_reward_model, import_peft
from align_cbrl.llm.scoring import ScoreFunction
from align_cbrl.rollouts import Rollouts


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class BetaSettings:
    """A temperature that is learned besides the reward; see `LearnedBeta`.

    Attributes:
        start: where it starts.
        low: the smallest allowed.
        high: the largest allowed.
    """

    start: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high < float("inf") and self.low <= self.start <= self.high):
            raise InputError(
                f"expected 0 < low <= start <= high, and low < high, got low={self.low}, start={self.start}, "
                f"high={self.high}"
            )


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Leader(abc.ABC):
    """What all leaders have in common.

    Attributes:
        strength: reward per standard deviation of the proxy within a prompt, where the leader starts.
        beta: bounds of a temperature that is learned besides; null: the follower's temperature is fixed.
    """

    kind: str = ""
    strength: Positive = 1.0
    beta: BetaSettings | None = None

    @abc.abstractmethod
    def _leader(self, terms: Mapping[str, ScoreFunction]) -> LanguageLeader: ...

    def build(self, terms: Mapping[str, ScoreFunction], reference: Rollouts | None) -> LanguageLeader:
        """The leader at its start, calibrated where there are completions of the reference.

        Args:
            terms: reward functions and reward models by name, the first of which is the proxy. A proxy that is trained
                is loaded anew, so that the given one stays as it is.
            reference: completions of the reference policy, several for each prompt; None, for a mixture: its weights
                are in units of the terms themselves.

        Raises:
            InputError: no reference for another kind, terms that this kind does not use or lacks, or whatever the
                leader itself refuses.
        """
        if not terms:
            raise InputError("leader: expected at least one term, the proxy, got none")
        if reference is None and self.kind != "mixture":
            raise InputError(
                f"leader.kind: {self.kind} is calibrated on completions of the reference policy, of which there are "
                "none; give them, or use kind: mixture"
            )
        leader = self._leader(terms)
        if reference is not None:
            leader.calibrate(reference)
        if self.beta is None:
            return leader
        return LearnedBeta(leader, self.beta.start, low=self.beta.low, high=self.beta.high)

    def check(self, terms: Sequence[str], proxy: bool) -> None:
        """Refuse terms that this kind does not use or lacks, and missing packages, before any model is loaded.

        Args:
            terms: names, the proxy first.
            proxy: whether the first of them is a reward model.

        Raises:
            InputError: as `build`; peft is needed and not installed.
        """
        if not terms:
            raise InputError("expected at least one term, the proxy, got none; name a proxy or a reward")
        self._check(dict.fromkeys(terms, _no_score), proxy)

    def _check(self, terms: Mapping[str, ScoreFunction], proxy: bool) -> None:
        self._leader(terms)

    def _proxy_alone(self, terms: Mapping[str, ScoreFunction]) -> tuple[str, ScoreFunction]:
        (first, *others) = terms.items()
        if others:
            raise InputError(
                f"leader: kind: {self.kind} uses the proxy alone, got also the terms {[name for name, _ in others]}; "
                "remove them, or use kind: mixture or shaped"
            )
        return first


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureSettings(_Leader):
    """A weighted sum of all terms; see `RewardMixture`.

    Attributes:
        budget: largest standard deviation of the whole reward within a prompt.
        constraint: on the weights: free, positive or softmax.
        weights: where they start, by name; null: the strength on the proxy and zero elsewhere, as in plain RLHF.
    """

    kind: Literal["mixture"] = "mixture"
    budget: Positive = 1.0
    constraint: Constraint = "free"
    weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.weights is None and self.budget < self.strength:
            raise InputError(f"budget: expected at least strength={self.strength}, the start, got {self.budget}")

    def _leader(self, terms: Mapping[str, ScoreFunction]) -> LanguageLeader:
        start = {next(iter(terms)): self.strength} if self.weights is None else self.weights
        return RewardMixture(terms, start, self.budget, self.constraint)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelSettings(_Leader):
    """The proxy's own parameters; see `RewardModelLeader`.

    Attributes:
        budget: largest relative change of what is trained; null: none, with a price on divergence instead.
        trainable: head, lora or all.
        lora: size and place of the adapter; only with lora.
        gradient_checkpointing: trade time for memory; not with head.
    """

    kind: Literal["reward_model"] = "reward_model"
    budget: Positive | None = 1.0
    trainable: Trainable = "head"
    lora: LoRA | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.lora is not None and self.trainable != "lora":
            raise InputError(f"lora: belongs to trainable: lora, got trainable: {self.trainable}")
        if self.gradient_checkpointing and self.trainable == "head":
            raise InputError("gradient_checkpointing: saves nothing with trainable: head; leave it out")

    def _check(self, terms: Mapping[str, ScoreFunction], proxy: bool) -> None:
        _check_trained(*self._proxy_alone(dict(list(terms.items())[:1])), proxy)
        if self.trainable == "lora":
            import_peft()

    def _leader(self, terms: Mapping[str, ScoreFunction]) -> LanguageLeader:
        model = _load_anew(*self._proxy_alone(terms))
        return RewardModelLeader(
            model, self.trainable, self.strength, self.budget, self.lora, self.gradient_checkpointing
        )


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapedSettings(_Leader):
    """A frozen proxy and a small learned correction; see `Shaped`.

    Attributes:
        budget: largest standard deviation of the correction within a prompt.
        correction: "terms", a weighted sum of the other terms that starts at zero; or the "head" or a "lora" adapter of
            a reward model, by how much that changes its score.
        constraint: on the weights of a sum: free or positive; only with terms.
        model: folder or hub id of the reward model; null: the proxy's own. Not with terms.
        lora: size and place of the adapter; only with lora.
    """

    kind: Literal["shaped"] = "shaped"
    budget: Positive = 1.0
    correction: Literal["terms", "head", "lora"] = "terms"
    constraint: Literal["free", "positive"] = "free"
    model: str | None = None
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        if self.lora is not None and self.correction != "lora":
            raise InputError(f"lora: belongs to correction: lora, got correction: {self.correction}")
        if self.model is not None and self.correction == "terms":
            raise InputError("model: belongs to correction: head or lora; terms need none")
        if self.constraint != "free" and self.correction != "terms":
            raise InputError(f"constraint: belongs to correction: terms, got correction: {self.correction}")

    def _check(self, terms: Mapping[str, ScoreFunction], proxy: bool) -> None:
        if self.correction == "terms":
            self._leader(terms)
            return
        if self.model is not None:
            check_reward_model(self.model)
        else:
            _check_trained(next(iter(terms)), _no_score, proxy)
        if self.correction == "lora":
            import_peft()

    def _leader(self, terms: Mapping[str, ScoreFunction]) -> LanguageLeader:
        (name, proxy), *rest = terms.items()
        others = dict(rest)
        if self.correction == "terms":
            if not others:
                raise InputError("leader: a correction by terms needs terms besides the proxy, got none")
            mixture = RewardMixture(others, {}, self.budget, self.constraint)
            return Shaped(proxy, mixture, self.strength, self.budget)
        if others:
            raise InputError(
                f"leader: a correction by a reward model's {self.correction} does not use the terms "
                f"{list(others)}; remove them, or use correction: terms"
            )
        model = _load_anew(name, proxy) if self.model is None else RewardModel(self.model)
        # No budget of its own: the spread is what is bounded.
        leader = RewardModelLeader(model, self.correction, self.strength, None, self.lora)
        return Shaped(proxy, leader, self.strength, self.budget)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthSettings(_Leader):
    """A frozen proxy and a learned charge on length; see `LengthShaping`.

    Attributes:
        budget: largest weight of the charge.
        target: the length in tokens beyond which is charged.
        weight: where the weight starts.
        learn_target: whether the target is learned besides the weight.
        width: of the bend at the target, in standard deviations of length.
    """

    kind: Literal["length"] = "length"
    budget: Positive = 1.0
    target: float
    weight: float = 0.0
    learn_target: bool = False
    width: Positive = 0.25

    def _check(self, terms: Mapping[str, ScoreFunction], proxy: bool) -> None:
        self._leader(dict(list(terms.items())[:1]))

    def _leader(self, terms: Mapping[str, ScoreFunction]) -> LanguageLeader:
        _, proxy = self._proxy_alone(terms)
        return LengthShaping(proxy, self.target, self.weight, self.learn_target, self.width, self.strength, self.budget)


LeaderSettings = MixtureSettings | RewardModelSettings | ShapedSettings | LengthSettings
"""Which reward the leader learns, by `kind`."""


def _load_anew(name: str, term: ScoreFunction) -> RewardModel:
    """Another copy of a reward model, to be trained."""
    _check_trained(name, term, isinstance(term, RewardModel))
    assert isinstance(term, RewardModel)
    return RewardModel(term.path, term.batch_size, term.max_length)


def _check_trained(name: str, term: ScoreFunction, proxy: bool) -> None:
    """Refuse a term that is to be trained and is no reward model."""
    if not proxy:
        raise InputError(
            f"leader: the term {name!r} is to be trained, which needs a reward model, got {type(term).__name__}; name "
            "its folder or hub id"
        )


def _no_score(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Stands for a term that is not loaded."""
    return [0.0 for _ in completions]
