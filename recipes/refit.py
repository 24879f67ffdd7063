"""The rival that uses the judge's labels without a response term: describe the judge, train on, describe it again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from align_cbrl.groups import Groups
from align_cbrl.llm import LanguageLeader, RewardMixture, TrainedFollower, score_arguments
from align_cbrl.llm.settings.objective import ObjectiveSettings
from align_cbrl.rollouts import Rollouts
from align_cbrl.runs.metrics import MetricsLog

from .worlds.bench import Bench


def refit(
    bench: Bench,
    name: str,
    leader: LanguageLeader,
    *,
    spread: float,
    price: float = 0.0,
    passes: int = 0,
    learning_rate: float = 1e-3,
) -> tuple[TrainedFollower, list[dict[str, Any]]]:
    """Iterated retraining: a follower in training, whose reward is fitted anew to all of the judge's labels so far.

    It sees the judge on the same batches as HPGD, at the same follower steps. What is fitted is the judge's score
    within prompts: of a mixture by least squares within its constraint, the weights then on the boundary of its budget,
    or, where divergence has a price, at temperature / price times the judge's own scale, which is what a policy that
    pays that price would ask for (docs/derivation.md); of a reward model by Adam on batches of all labels so far,
    scaled so that their standard deviation is `spread`.

    Args:
        bench: gives follower, judge and test prompts.
        name: of the folder under the seed's.
        leader: fitted; left with what it learned.
        spread: of a reward model's scores within a prompt.
        price: of a nat of divergence, score per nat; 0: none. For a mixture.
        passes: for a reward model, batches that are fitted at each leader step.
        learning_rate: of Adam.

    Returns:
        The follower as it stands at the end, and the curve: points as of `Bench.tune`.
    """
    settings = bench.settings
    follower = bench.follower(bench.seed)
    batches: list[tuple[Rollouts, Tensor]] = []
    curve = MetricsLog(bench.out / name / "curve.jsonl")
    curve.truncate_after(0)
    parameters = [p for p in leader.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=learning_rate)
    generator = torch.Generator().manual_seed(bench.seed)

    def on_rollouts(rollouts: Rollouts, metrics: dict[str, float]) -> bool:
        verdict = bench.judge(None, rollouts)[:, 0]
        batches.append((rollouts, _within(verdict, rollouts)))
        unit = spread / torch.cat([label for _, label in batches]).std().clamp(min=1e-12)
        if isinstance(leader, RewardMixture):
            seen = [_within(leader.features(**score_arguments(batch)), batch) for batch, _ in batches]
            scale = settings.follower.temperature / price if price else None
            leader.fit(torch.cat(seen), torch.cat([label for _, label in batches]), scale)
        else:
            for place in torch.randint(len(batches), (passes,), generator=generator).tolist():
                batch, label = batches[place]
                adam.zero_grad()
                error = _within(leader.reward(batch)[:, 0], batch) - (unit * label).float()
                error.square().mean().backward()
                adam.step()
        taken, step, every = metrics["follower_steps"], len(batches), settings.measure.every
        if every is None or taken % every < settings.follower.schedule.interval or step == settings.hpgd.steps:
            point = {"judge": verdict.mean().item()} if every is None else bench.point(follower)
            curve.append({"step": taken, "judged": step * rollouts.size, **point})
        return step < settings.hpgd.steps

    with curve:
        follower.follow(
            leader, on_rollouts, start=0, steps=settings.hpgd.steps,
            contexts_per_step=settings.follower.prompts_per_step, group_size=settings.follower.group_size,
            seed=bench.seed,
        )  # fmt: skip
    leader.save_pretrained(bench.out / name / "reward")
    return follower, bench.curve(name)


def price_of(objective: ObjectiveSettings) -> float:
    """The price of a nat of divergence that an objective names; 0 where it names none.

    Example:
        >>> from align_cbrl.llm.settings.objective import ExpectedSettings, KLPricedSettings
        >>> price_of(KLPricedSettings(price=0.1)), price_of(ExpectedSettings())
        (0.1, 0.0)
    """
    return getattr(objective, "price", None) or 0.0


def _within(values: Tensor, rollouts: Rollouts) -> Tensor:
    """Values [B] or [B, K] less their prompt's mean."""
    return Groups.of(rollouts.group[:, 0].to(values.device)).centred(values)
