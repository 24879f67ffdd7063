"""The configurations of `align-cbrl serve` and `align-cbrl step`, in the words of `align-cbrl run`."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

from align_cbrl.checks import Count, Range, checked
from align_cbrl.errors import InputError
from align_cbrl.llm import RewardModel
from align_cbrl.llm.prompts import RESERVED
from align_cbrl.llm.scoring import ScoreFunction, check_arguments
from align_cbrl.llm.settings.hpgd import HPGDSettings
from align_cbrl.llm.settings.judge import JudgeSettings
from align_cbrl.llm.settings.leader import LeaderSettings, MixtureSettings
from align_cbrl.llm.settings.objective import ExpectedSettings, ObjectiveSettings
from align_cbrl.llm.settings.response import BestResponseSettings, NextStepSettings, ResponseSettings
from align_cbrl.runs.imports import load_object

PROXY = "proxy"
SCORES = "judge_cache.sqlite"
"""The judge's scores, in the folder of a server or of steps from logs."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

Share = Annotated[float, Range(0, 1, open="low")]


def _gradient(steps: int = HPGDSettings.steps) -> HPGDSettings:
    return HPGDSettings(step="gradient", steps=steps)


def _check_steps(hpgd: HPGDSettings, response: ResponseSettings) -> None:
    """Refuse what needs a best response where there is none, in the words of the YAML."""
    if isinstance(response, BestResponseSettings):
        return
    for name, value, usual in (("step", hpgd.step, "gradient"), ("replays", hpgd.replays, 0)):
        if value != usual:
            raise InputError(
                f"hpgd.{name}: expected {usual} with response.kind: next_step, which has no best response that earlier "
                f"completions could be weighted for, got {value}; or set response: {{kind: best_response, "
                "temperature: ...}"
            )


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """A reward server.

    Attributes:
        judge: what the leader really wants. Its scores are always kept on disk.
        proxy: folder or hub id of a reward model, the mixture's first term; null: the first of `rewards` is it.
        rewards: reward functions by name, as `package.module.function` or `file.py:function`.
        costs: what a constrained objective may bound, likewise.
        reference: a file of completions of the reference policy, several a prompt, on which the terms are standardised;
            null, for a mixture: weights are in units of the terms until the first leader step.
        columns: of the data, which come with every request and reach rewards and judge by name.
        labels: the one of them that OpenRLHF's labels are; null: its labels are left out.
        ends: texts that end a completion and are cut off, such as <|im_end|>, since OpenRLHF sends special tokens.
        leader: which reward is learned.
        objective: what the leader wants of the judge's scores.
        response: how the engine's policy responds to a reward.
        hpgd: the leader's steps. After `steps` of them the reward stays as it is. Every step is saved, whatever
            `checkpoint_every`.
        batch_size: completions that the engine trains on between two updates of its policy.
        every: batches between leader steps.
        share: of the completions that the judge is asked about and the leader learns from: the newest before a step.
            null: those of the last batch, 1 / every.
        token_variable: environment variable with a token that requests must carry (Authorization: Bearer ...); null:
            none, for a server on this machine.
        largest_body: of a request, in MiB.

    Raises:
        InputError: no reward, or steps that the response has no use for.
    """

    judge: JudgeSettings
    proxy: str | None = None
    rewards: dict[str, str] = dataclasses.field(default_factory=dict)
    costs: dict[str, str] = dataclasses.field(default_factory=dict)
    reference: str | None = None
    columns: list[str] = dataclasses.field(default_factory=list)
    labels: str | None = None
    ends: list[str] = dataclasses.field(default_factory=list)
    leader: LeaderSettings = dataclasses.field(default_factory=MixtureSettings)
    objective: ObjectiveSettings = dataclasses.field(default_factory=ExpectedSettings)
    response: ResponseSettings = dataclasses.field(default_factory=NextStepSettings)
    hpgd: HPGDSettings = dataclasses.field(default_factory=_gradient)
    batch_size: Count = 64
    every: Count = 1
    share: Share | None = None
    token_variable: str | None = None
    largest_body: Count = 16

    def __post_init__(self) -> None:
        if not self.rewards and self.proxy is None:
            raise InputError("rewards: expected at least one reward function, or a proxy, got neither")
        if PROXY in self.rewards:
            raise InputError(f"rewards: {PROXY!r} is the name of the reward model's own term; choose another")
        if self.labels is not None and self.labels not in self.columns:
            raise InputError(f"labels: expected one of columns {self.columns}, got {self.labels!r}; add it to columns")
        if taken := [name for name in self.columns if name in RESERVED or name == "prompt"]:
            raise InputError(f"columns: {taken[0]!r} is a name that the library uses itself; choose another")
        if "" in self.ends:
            raise InputError("ends: expected texts, got an empty one, which would cut every completion away")
        if self.token_variable is not None and not _VARIABLE.fullmatch(self.token_variable):
            raise InputError(
                "token_variable: expected the name of an environment variable, such as REWARD_TOKEN, got something "
                "else; the token itself belongs into that variable"
            )
        if self.leader.beta is not None:
            raise InputError("leader.beta: expected null, since the engine keeps its own coefficient of the KL term")
        _check_steps(self.hpgd, self.response)

    @property
    def period(self) -> int:
        """Completions between leader steps."""
        return self.batch_size * self.every

    @property
    def window(self) -> int:
        """Completions of a period after which the leader learns from what comes."""
        share = 1 / self.every if self.share is None else self.share
        return self.period - max(1, round(share * self.period))

    def terms(self) -> dict[str, ScoreFunction]:
        """What the reward is made of; every function is looked at for columns that requests do not have.

        Raises:
            InputError: a term, a cost or a judge that does not load, or that takes a column which is not in `columns`.
        """
        rewards = {name: load_object(path) for name, path in self.rewards.items()}
        named = {f"reward {name}": function for name, function in rewards.items()}
        named |= {f"cost {name}": load_object(path) for name, path in self.costs.items()}
        for name, function in named.items():
            if not callable(function):
                raise InputError(f"{name}: expected a function, got {function!r:.60}")
            check_arguments(name, function, ["prompts", "completions", *self.columns])
        return rewards if self.proxy is None else {PROXY: RewardModel(self.proxy), **rewards}


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Leader steps from logs.

    Attributes:
        judge: what the leader really wants; null: the column "score" of the logs.
        objective: what the leader wants of the scores.
        response: how the policy responds to a reward.
        hpgd: the leader's steps, of which `steps` are taken.
        prompts_per_step: prompts of a step; null: all that the logs have.

    Raises:
        InputError: steps that the response has no use for.

    Example:
        >>> StepSettings().hpgd.steps
        1
    """

    judge: JudgeSettings | None = None
    objective: ObjectiveSettings = dataclasses.field(default_factory=ExpectedSettings)
    response: ResponseSettings = dataclasses.field(default_factory=NextStepSettings)
    hpgd: HPGDSettings = dataclasses.field(default_factory=lambda: _gradient(steps=1))
    prompts_per_step: Count | None = None

    def __post_init__(self) -> None:
        _check_steps(self.hpgd, self.response)
