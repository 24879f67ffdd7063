"""What a leader can know of how a trl trainer's policy responds to a reward, by the trainer's settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.estimators.policy_response import PolicyResponse
from align_cbrl.estimators.step_response import Scale, StepResponse
from align_cbrl.hpgd import HPGDConfig
from align_cbrl.problem import Follower, Leader
from align_cbrl.rollouts import Rollouts

_SAMPLING = {
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0},
    "generation_kwargs": None,
}
"""Settings with which completions are samples of the policy itself."""

_PLAIN = {
    **{"sync_ref_model": False, "mask_truncated_completions": False, "top_entropy_quantile": 1.0},
    **{"entropy_coef": 0.0, "use_adaptive_entropy": False},
}
"""Settings with which trl's KL term has the Boltzmann response, at least nearly, as its fixed point."""


@dataclasses.dataclass(frozen=True)
class TrainerResponse:
    """How the policy of a trainer responds: towards the best response at a temperature, or by its next step.

    Attributes:
        estimator: `PolicyResponse` for the best response, `StepResponse` else.
        temperature: lambda, trl's beta; 1 without a best response, where only the direction of the gradient counts.
        words: for the line that is shown when training starts.
        sampling: what has completions not be samples of the policy that log-probabilities belong to, or None.
    """

    estimator: PolicyResponse
    temperature: float
    words: str
    sampling: str | None = None

    @property
    def is_best(self) -> bool:
        """Whether there is a best response, whose distance the certificate measures."""
        return self.estimator.best_response

    def check(self, config: HPGDConfig) -> None:
        """Raise InputError for steps on remembered batches where there is no best response."""
        for name, value in (("replays", config.replays), ("natural", config.natural)):
            if value and not self.is_best:
                raise InputError(
                    f"HPGDConfig.{name}={value}: expected none; an old batch can be weighted to stand for a best "
                    f"response only, and the leader goes through {self.words}"
                )


def response_of(args: Any) -> TrainerResponse:
    """The response that a `trl.GRPOConfig` or `trl.RLOOConfig` has.

    RLOO with beta > 0 settles at the Boltzmann response of temperature beta; GRPO with beta > 0 and scale_rewards
    "none" nearly so (0.02 nats off, docs/language_followers.md). All else has no best response that the leader's
    gradient could go through; its next step has.

    Args:
        args: of the trainer; read, not changed.

    Raises:
        InputError: neither of the two; or settings for which the trainer's advantage is another one than is known here.

    Example:
        >>> from types import SimpleNamespace
        >>> grpo = SimpleNamespace(beta=0.0, num_generations=8, scale_rewards="group")
        >>> response_of(grpo).words
        "the trainer's next step (scale_rewards='group'), since beta is 0; the certificate is not applicable"
        >>> rloo = SimpleNamespace(beta=0.05, num_generations=8, normalize_advantages=False)
        >>> response_of(rloo).words
        'the best response at temperature 0.05 (beta); its distance is the metric leader/gap'
    """
    grpo, rloo = hasattr(args, "scale_rewards"), hasattr(args, "normalize_advantages")
    if not (grpo or rloo):
        raise InputError(
            f"args: expected a trl.GRPOConfig or a trl.RLOOConfig, got {type(args).__name__}; a LeaderCallback needs "
            "to know what the trainer makes of rewards. For other engines see docs/serving.md"
        )
    _refuse_unknown_advantages(args)
    scale: Scale = {True: "group", False: "none"}.get(args.scale_rewards, args.scale_rewards) if grpo else "none"
    if scale == "group" and args.num_generations == 2:
        raise InputError(
            "num_generations=2: expected at least 3 with scale_rewards='group'; the advantages of two completions are "
            "+0.71 and -0.71 whatever their rewards, so that weights move nothing but the sign; use more, or "
            "scale_rewards='none'"
        )
    sampling = _first_other(args, _SAMPLING)
    why = "beta is 0" if not args.beta else f"scale_rewards is {scale!r}" if scale != "none" else None
    why = why or sampling or _first_other(args, _PLAIN)
    if why is None:
        words = f"the best response at temperature {args.beta:g} (beta); its distance is the metric leader/gap"
        return TrainerResponse(PolicyResponse(), args.beta, words)
    divided = f" (scale_rewards={scale!r})" if grpo else ""
    words = f"the trainer's next step{divided}, since {why}; the certificate is not applicable"
    return TrainerResponse(StepResponse(scale=scale), 1.0, words, sampling)


def _refuse_unknown_advantages(args: Any) -> None:
    """Settings that change what an advantage is, and have an equivalent."""
    if getattr(args, "multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        raise InputError(
            f"multi_objective_aggregation={args.multi_objective_aggregation!r}: expected 'sum_then_normalize', since "
            "the trainer is given one reward function, the leader's, which has summed them"
        )
    if getattr(args, "normalize_advantages", False):
        raise InputError(
            "normalize_advantages=True: expected False; it divides by the spread of the batch, KL term included, so "
            "that neither the temperature nor the next step is known; with GRPOTrainer use scale_rewards='batch'"
        )
    if getattr(args, "reward_clip_range", None) is not None:
        raise InputError(
            f"reward_clip_range={args.reward_clip_range}: expected None; where the reward is clipped the leader's "
            "gradient is lost; clip the reward functions that the leader is made of"
        )


def _first_other(args: Any, settings: dict[str, Any]) -> str | None:
    """The first setting that is not as it is here, in words; those that a version of trl does not have are."""
    for name, usual in settings.items():
        value = getattr(args, name, usual)
        if value != usual and not (usual is None and not value) and not (name == "top_k" and value is None):
            return f"{name} is {value!r}"
    return None


class TrainerPolicy(Follower):
    """The policy of a trainer that owns its loop: HPGD has to know its temperature, and is handed its completions.

    Args:
        temperature: lambda.
    """

    discount: float = 0.0
    temperature: float

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        """Never: the trainer draws the prompts."""
        raise InputError(_ITS_OWN)

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """Never: the trainer trains."""
        raise InputError(_ITS_OWN)

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        """Never: the trainer samples."""
        raise InputError(_ITS_OWN)


_ITS_OWN = "LeaderCallback: the trainer owns the loop; call trainer.train(), not HPGD.run"
