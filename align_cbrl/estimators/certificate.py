"""`Certificate`: how far a follower of one step is from its best response, and what to do about it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from align_cbrl.checks import Count, checked
from align_cbrl.distributed import gather_rows, own_rows, together, world_size
from align_cbrl.estimators.hypergradient import check_reward
from align_cbrl.estimators.reward_pass import reward_of
from align_cbrl.estimators.sampler_evidence import ALARM, mean_evidence, sampler_alarm, total_evidence
from align_cbrl.functional import best_response_gap, debiased_gap, effective_sample_size, tilt_weights
from align_cbrl.problem import Problem, per_path
from align_cbrl.rollouts import Rollouts

_FAR = 0.1  # nats at which a third to a half of an uncorrected hypergradient is bias (docs/certificate.md)
_FAR_CORRECTED = 0.3  # the same, corrected
_BEYOND = 1.0  # nats from which weights no longer reach the best response
_NEAR = 1e-3  # nats below which there is nothing to correct but rounding
_FEW = 2.0  # effective samples a group below which weighted samples say little
_RECENT = 10  # leader steps that the trend is read from
_FIRST = 6  # leader steps before the follower is judged: it starts at the reference
_SIGNAL = 0.015  # squared correlation of what is averaged with rho, at which the rule was measured to err least


@checked
@dataclasses.dataclass(frozen=True)
class Certificate:
    """The distance of a sampled policy pi from the best response pi* to the present leader, T = 1.

    Attributes:
        gap: nats, the mean over groups of log mean exp(rho) - mean rho (`best_response_gap`): in expectation at most
            KL(pi || pi*), for every group size. None when the samples are weighted, and stand for pi* already, and for
            a single completion.
        gap_se: standard error of `gap` over groups; within the group where there is only one.
        gap_debiased: nats, the same by `debiased_gap`: nearly unbiased when small, but no bound.
        gap_debiased_se: its standard error.
        effective_sample_size: of the importance weights pi* / pi, or of those given, as a share of the batch.
        kl: KL(pi || prior) in nats, pi* in place of pi when the samples are weighted.
        paths: completions in the batch.
        group_size: completions a group, on average.
        weight: [B], the importance weights with mean one in each group that turn the batch into samples of pi*; None
            when it is weighted already.
        alarm: what to change, in words, or None.
        sampler_evidence: nats of evidence that the follower's completions are not samples of its policy, over the run
            (`SamplerEvidence`); None where it keeps none. From `sampler_evidence.ALARM` on the alarm is about that.
    """

    gap: float | None
    gap_se: float | None
    gap_debiased: float | None
    gap_debiased_se: float | None
    effective_sample_size: float
    kl: float
    paths: int
    group_size: float
    weight: Tensor | None = dataclasses.field(repr=False, compare=False)
    alarm: str | None = None
    sampler_evidence: float | None = None

    def metrics(self) -> dict[str, float]:
        """The numbers, for a row of `HPGD.history`; `alarm` is 1 or 0."""
        row = {
            "gap": self.gap,
            "gap_se": self.gap_se,
            "gap_debiased": self.gap_debiased,
            "effective_sample_size": self.effective_sample_size,
            "kl": self.kl,
            "sampler_evidence": self.sampler_evidence,
            "alarm": float(self.alarm is not None),
        }
        return {name: value for name, value in row.items() if value is not None}

    @property
    def missampled(self) -> bool:
        """Whether the completions are not samples of the policy, so that all other numbers are of another one."""
        return self.sampler_evidence is not None and self.sampler_evidence >= ALARM

    @property
    def correction_pays(self) -> bool:
        """Whether the bias of leaving pi for pi* outweighs the variance that the importance weights add.

        Averages under pi and under pi* of what a hypergradient averages differ by its covariance with rho. With
        Var(rho) = 2 gap and a squared correlation c, the squared bias is c 2 gap times the variance of one of the B
        paths; normal rho give the weights' variance as exp(2 gap) - 1, hence

            correct when 2 c B gap > exp(2 gap) - 1 and gap > 2 standard errors, c = 0.015,

        the debiased gap throughout, and at least 0.001 nats. c was chosen, and the rule compared with others, on
        enumerable language models (docs/certificate.md). The effective sample size of small groups is not used: it
        misses the weights' tail.
        """
        gap, error = self.gap_debiased, self.gap_debiased_se
        if gap is None or error is None:
            return False
        bias = 2 * _SIGNAL * self.paths * gap
        return gap > max(2 * error, _NEAR) and bias > math.expm1(min(2 * gap, 700.0))


@checked
def certify(
    problem: Problem,
    rollouts: Rollouts,
    history: Sequence[Mapping[str, float]] = (),
    *,
    chunks: Count = 1,
    correctable: bool = True,
) -> Certificate | None:
    """Measure the follower's distance from its best response on its own samples; nothing is enumerated.

    rho_i = r_x(y_i) / lambda - log(pi(y_i) / prior(y_i)) is log(pi*(y_i) / pi(y_i)) up to a constant of the prompt
    (docs/derivation.md, section 9).

    Args:
        problem: its leader scores the paths anew, without graph.
        rollouts: of one step; log-probabilities under policy and prior are needed.
        history: earlier rows of `HPGD.history`, which the alarm reads the trend from.
        chunks: into how many pieces the paths are cut when they are scored; bounds memory.
        correctable: whether samples will be weighted where that pays; a follower may then be farther away before the
            alarm goes off.

    Returns:
        None for paths of several steps, and for rollouts without log-probabilities.

    Raises:
        InputError: a reward of another shape, or not finite.

    Example:
        >>> import torch
        >>> import toy_cmdp
        >>> problem = toy_cmdp.preferences(seed=0)
        >>> contexts = torch.arange(2)
        >>> _ = problem.follower.respond(problem.leader, contexts)
        >>> rollouts = problem.follower.rollout(contexts, 8, torch.Generator().manual_seed(0))
        >>> found = certify(problem, rollouts)
        >>> round(found.gap, 9), round(found.effective_sample_size, 9)  # the follower is exact
        (0.0, 1.0)
    """
    if not can_be_weighted(problem, rollouts):
        return None
    with torch.no_grad():
        log_ratio, divergence, whole = log_ratio_to_response(problem, rollouts, chunks)
        group = whole.group[:, 0].to(log_ratio.device)
        groups = int(group.unique().numel())
        weight = None if whole.weight is None else whole.weight.to(log_ratio)
        plain: tuple[float | None, float | None] = (None, None)
        debiased = plain
        if weight is None:
            weight = tilt_weights(log_ratio, group)
            plain = _mean_and_error(best_response_gap(log_ratio, group), log_ratio)
            debiased = _mean_and_error(debiased_gap(log_ratio, group), log_ratio)
        size = float(effective_sample_size(weight, group).sum() / whole.size)
        found = Certificate(
            *plain,
            *debiased,
            effective_sample_size=size,
            kl=float((whole.path_weight().to(divergence) * divergence).mean()),
            paths=whole.size,
            group_size=whole.size / groups,
            weight=weight[own_rows(rollouts.size)] if whole.weight is None else None,
        )
    evidence = _evidence(problem)
    wrong = sampler_alarm(evidence) if evidence else None
    return dataclasses.replace(
        found,
        alarm=_alarm(found, history, correctable) if wrong is None else wrong,
        sampler_evidence=total_evidence(evidence) if evidence else None,
    )


def can_be_weighted(problem: Problem, rollouts: Rollouts) -> bool:
    """Whether these are paths of one step with the log-probabilities that importance weights are made of."""
    one_step = rollouts.horizon == 1 and bool(torch.as_tensor(problem.follower.discount).max() == 0)
    return one_step and rollouts.log_policy is not None and rollouts.log_prior is not None


def log_ratio_to_response(problem: Problem, rollouts: Rollouts, chunks: int) -> tuple[Tensor, Tensor, Rollouts]:
    """rho and log(pi / prior) [B], and their paths: those of all ranks, since a group may straddle them."""
    with together("scoring the completions"):
        scored = torch.cat([reward_of(problem.leader, piece).double() for piece in rollouts.chunks(chunks)])
        check_reward(problem.leader, scored, rollouts)
    reward, whole = gather_rows(scored[:, 0]), rollouts.over_ranks()
    temperature = per_path(problem.temperature, whole.contexts.to(reward.device))
    assert whole.log_policy is not None and whole.log_prior is not None  # `can_be_weighted`
    divergence = (whole.log_policy - whole.log_prior)[:, 0].to(reward)
    return reward / temperature - divergence, divergence, whole


def corrected(rollouts: Rollouts, certificate: Certificate) -> Rollouts:
    """The rollouts as weighted samples of the best response, with its log-probabilities as estimated in each group.

    log pi* = log pi + rho - log Z, and exp(rho_i) / Z is the weight W_i, Z estimated by the group. The estimate is
    consistent as groups grow, with a bias of order 1 / G. Rollouts that are weighted already stay as they are.

    Example:
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps={}, log_policy=torch.tensor([-1.0, -1.0]))
        >>> found = Certificate(0.1, 0.0, 0.1, 0.0, 0.9, 0.0, 2, 2.0, weight=torch.tensor([0.5, 1.5]))
        >>> corrected(rollouts, found).weight.tolist()
        [0.5, 1.5]
    """
    if certificate.weight is None or rollouts.log_policy is None:
        return rollouts
    weight = certificate.weight.to(rollouts.mask.device)
    log_weight = weight.clamp(min=math.ulp(0.0)).log().to(rollouts.log_policy)
    return dataclasses.replace(rollouts, weight=weight, log_policy=rollouts.log_policy + log_weight[:, None])


def _evidence(problem: Problem) -> dict[str, float]:
    """Of all processes: each bets on what it sampled itself."""
    own = problem.follower.sampler_evidence()
    if not own or world_size() == 1:
        return own
    stakes = gather_rows(torch.tensor([list(own.values())], dtype=torch.float64))
    return mean_evidence([dict(zip(own, row, strict=True)) for row in stakes.tolist()])


def _mean_and_error(gaps: Tensor, log_ratio: Tensor) -> tuple[float | None, float | None]:
    """The mean over groups and its standard error; a single group's error by the delta method within it.

    A single completion says nothing.
    """
    if len(log_ratio) < 2:
        return None, None
    if len(gaps) > 1:
        return float(gaps.mean()), float(gaps.std() / math.sqrt(len(gaps)))
    influence = torch.softmax(log_ratio, 0) * len(log_ratio) - log_ratio
    return float(gaps.mean()), float(influence.std() / math.sqrt(len(log_ratio)))


def _alarm(now: Certificate, history: Sequence[Mapping[str, float]], correctable: bool) -> str | None:
    if now.gap_debiased is None or now.gap_debiased_se is None:
        effective = now.effective_sample_size * now.group_size
        if now.weight is not None or effective >= _FEW:  # a single completion, or enough of weighted ones
            return None
        return (
            f"the weighted samples stand on {effective:.1f} of {now.group_size:.0f} completions a prompt: raise the "
            "temperature, draw larger groups, or train the follower instead of tilting it"
        )
    earlier = [row["gap_debiased"] for row in history if "gap_debiased" in row]
    far = _FAR_CORRECTED if correctable and now.correction_pays else _FAR
    if len(earlier) + 1 < _FIRST or now.gap_debiased - 2 * now.gap_debiased_se <= far:
        return None
    recent = torch.tensor([*earlier, now.gap_debiased][-_RECENT:], dtype=torch.float64)
    half = len(recent) // 2
    before, after = recent[:half], recent[half:]
    change = float(after.mean() - before.mean())
    noise = math.sqrt(float(before.var() / len(before) + after.var() / len(after)))
    measured = (
        f"the follower is {now.gap_debiased:.2g} nats (standard error {now.gap_debiased_se:.1g}) from its best response"
    )
    if change > 2 * noise:
        advice = (
            "and the distance has been rising: the leader moves faster than the follower can; take more follower steps "
            "between leader steps (a longer interval), or lower the leader's learning rate"
        )
    elif change < -2 * noise:
        advice = (
            "and the distance is falling: the leader began too early; give the follower a longer warmup, or a longer "
            "interval for now"
        )
    else:
        advice = (
            "and the distance stays: the follower hovers around its best response; train it on a larger batch, or "
            "lower the follower's learning rate, or let it decay"
        )
    effective = now.effective_sample_size * now.group_size
    if now.gap_debiased > _BEYOND or effective < _FEW:
        advice += (
            f". The best response is too far away to be reached or corrected for (of {now.group_size:.0f} completions "
            f"a prompt {effective:.1f} count under it): raise the temperature"
        )
    return f"{measured}, {advice}"
