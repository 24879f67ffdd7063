"""`LeaderSettings`: which reward the leader learns, where it starts, and its budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from align_cbrl import InputError, Rollouts
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
from align_cbrl.llm.scoring import ScoreFunction


@dataclasses.dataclass(frozen=True)
class MixtureSettings:
    """Of a weighted sum of all terms.

    Attributes:
        weights: the constraint on them; see `RewardMixture`.
        start: where they start, by name; null: the strength on the proxy, zero on the others, as in plain RLHF.
    """

    weights: Constraint = "free"
    start: dict[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class RewardModelSettings:
    """Of the proxy reward model, trained itself; see `RewardModelLeader`.

    Attributes:
        trainable: "head", "lora" or "all".
        lora: size and place of the adapter; only with "lora".
        gradient_checkpointing: trade time for memory; not with "head".
    """

    trainable: Trainable = "head"
    lora: LoRA | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.lora is not None and self.trainable != "lora":
            raise InputError(f"lora: belongs to trainable: lora, got trainable: {self.trainable}")
        if self.gradient_checkpointing and self.trainable == "head":
            raise InputError("gradient_checkpointing: saves nothing with trainable: head; leave it out")


@dataclasses.dataclass(frozen=True)
class ShapedSettings:
    """Of a frozen proxy with a small learned correction; see `Shaped`.

    Attributes:
        correction: "terms", a weighted sum of the other terms that starts at zero; or the "head" or a "lora" adapter of
            a reward model, by how much that changes its score.
        weights: the constraint on a weighted sum; only with "terms".
        model: folder or hub id of the reward model; null: the proxy's own. Not with "terms".
        lora: size and place of the adapter; only with "lora".
    """

    correction: Literal["terms", "head", "lora"] = "terms"
    weights: Literal["free", "positive"] = "free"
    model: str | None = None
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        if self.lora is not None and self.correction != "lora":
            raise InputError(f"lora: belongs to correction: lora, got correction: {self.correction}")
        if self.model is not None and self.correction == "terms":
            raise InputError("model: belongs to correction: head or lora; terms need none")
        if self.weights != "free" and self.correction != "terms":
            raise InputError(f"weights: belongs to correction: terms, got correction: {self.correction}")


@dataclasses.dataclass(frozen=True)
class LengthSettings:
    """Of a frozen proxy with a learned charge on length; see `LengthShaping`.

    Attributes:
        target: the length beyond which is charged, in tokens.
        learn_target: whether it is learned besides the weight.
        weight: where the weight starts.
        width: of the bend at the target, in standard deviations of length.
    """

    target: float
    learn_target: bool = False
    weight: float = 0.0
    width: float = 0.25


@dataclasses.dataclass(frozen=True)
class BetaSettings:
    """Of a temperature that is learned besides; see `LearnedBeta`.

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


@dataclasses.dataclass(frozen=True)
class LeaderSettings:
    """Which reward the leader learns; settings of another kind than the chosen one are refused.

    Attributes:
        kind: "mixture" (weights of all terms), "reward_model" (the proxy's own parameters), "shaped" (a frozen proxy
            and a correction) or "length" (a frozen proxy and a charge on length).
        strength: reward per standard deviation of the proxy within a prompt, where the leader starts.
        budget: of a mixture, the largest standard deviation of the reward within a prompt; of a reward model, the
            largest relative change of its parameters; else the largest standard deviation of what is added.
        mixture: null: its defaults.
        reward_model: null: its defaults.
        shaped: null: its defaults.
        length: required by its kind.
        beta: null: the follower's temperature is not learned.

    Raises:
        InputError: settings of another kind, or numbers that contradict each other.
    """

    kind: Literal["mixture", "reward_model", "shaped", "length"] = "mixture"
    strength: float = 1.0
    budget: float = 1.0
    mixture: MixtureSettings | None = None
    reward_model: RewardModelSettings | None = None
    shaped: ShapedSettings | None = None
    length: LengthSettings | None = None
    beta: BetaSettings | None = None

    def __post_init__(self) -> None:
        for name in ("strength", "budget"):
            if not (0 < getattr(self, name) < float("inf")):
                raise InputError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for kind in ("mixture", "reward_model", "shaped", "length"):
            if kind != self.kind and getattr(self, kind) is not None:
                raise InputError(f"{kind}: belongs to kind: {kind}, and this leader is kind: {self.kind}; remove one")
        if self.kind == "length" and self.length is None:
            raise InputError("length: kind: length needs its target, such as length: {target: 40}")
        start_here = self.mixture is None or self.mixture.start is None
        if self.kind == "mixture" and start_here and self.budget < self.strength:
            raise InputError(f"budget: expected at least strength={self.strength}, the start, got {self.budget}")

    def build(self, terms: Mapping[str, ScoreFunction], reference: Rollouts) -> LanguageLeader:
        """The leader, at its start, calibrated.

        Args:
            terms: reward functions and reward models by name, the first being the proxy. A proxy that is trained is
                loaded anew: the given one stays as it is.
            reference: completions of the reference policy, several a prompt.

        Raises:
            InputError: terms that this kind does not use or lacks, or whatever the leader itself refuses.
        """
        leader = self._leader(terms)
        leader.calibrate(reference)
        return leader if self.beta is None else LearnedBeta(
            leader, self.beta.start, low=self.beta.low, high=self.beta.high
        )  # fmt: skip

    def _leader(self, terms: Mapping[str, ScoreFunction]) -> LanguageLeader:
        if not terms:
            raise InputError("leader: expected at least one term, the proxy, got none")
        (name, proxy), *others = terms.items()
        if self.kind == "mixture":
            mixture = self.mixture or MixtureSettings()
            start = {name: self.strength} if mixture.start is None else mixture.start
            return RewardMixture(terms, start, self.budget, mixture.weights)
        if self.kind == "shaped":
            return self._shaped(proxy, dict(others))
        if others:
            raise InputError(
                f"leader: kind: {self.kind} uses the proxy alone, got also the terms {[name for name, _ in others]}; "
                "remove them, or use kind: mixture or shaped"
            )
        if self.kind == "reward_model":
            settings = self.reward_model or RewardModelSettings()
            return RewardModelLeader(
                _load_anew(name, proxy), settings.trainable, self.strength, self.budget, settings.lora,
                settings.gradient_checkpointing,
            )  # fmt: skip
        assert self.length is not None  # checked on construction
        length = self.length
        return LengthShaping(
            proxy, length.target, length.weight, length.learn_target, length.width, self.strength, self.budget
        )

    def _shaped(self, proxy: ScoreFunction, others: Mapping[str, ScoreFunction]) -> Shaped:
        settings = self.shaped or ShapedSettings()
        if settings.correction == "terms":
            if not others:
                raise InputError("leader: a correction by terms needs terms besides the proxy, got none")
            mixture = RewardMixture(others, {}, self.budget, settings.weights)
            return Shaped(proxy, mixture, self.strength, self.budget)
        if others:
            raise InputError(
                f"leader: a correction by a reward model's {settings.correction} does not use the terms "
                f"{list(others)}; remove them, or use correction: terms"
            )
        model = _load_anew("shaped.model", proxy) if settings.model is None else RewardModel(settings.model)
        # The correction's own budget, of its parameters, is left wide: the spread is what is bounded.
        leader = RewardModelLeader(model, settings.correction, self.strength, _WIDE, settings.lora)
        return Shaped(proxy, leader, self.strength, self.budget)


_WIDE = 1e6


def _load_anew(name: str, term: ScoreFunction) -> RewardModel:
    """Another copy of a reward model, to be trained."""
    if not isinstance(term, RewardModel):
        raise InputError(
            f"leader: the term {name!r} is to be trained, which needs a reward model, got {type(term).__name__}; name "
            "its folder or hub id"
        )
    return RewardModel(term.path, term.batch_size, term.max_length)
