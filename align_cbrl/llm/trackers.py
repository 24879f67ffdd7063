"""Experiment trackers: leader steps and sample completions in TensorBoard, Weights & Biases, MLflow and others."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import Tensor

from align_cbrl.checks import Count, checked
from align_cbrl.distributed import is_main
from align_cbrl.errors import InputError
from align_cbrl.llm.conversations import answer_text, shown_text
from align_cbrl.llm.leaders.base import LanguageLeader
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts
from align_cbrl.runs.config import nearest
from align_cbrl.runs.facts import flat
from align_cbrl.runs.secrets import redact, redacted

Utility = Callable[[Leader, Rollouts], Tensor]
_COLUMNS = ["prompt", "completion", "judge", "reward"]


@checked
class Tracker:
    """Sends the metrics of leader steps, and sample completions as a table, to trackers known to accelerate.

    An observer for `HPGD(..., observers=[tracker])`, and a context manager that closes the trackers. Of several
    processes the first one tracks. What a tracker refuses is a warning, never the end of a run: every row is in
    metrics.jsonl too.

    Args:
        report_to: "none", or one or several of accelerate's names: "tensorboard", "wandb", "mlflow", ...
        out: the run's folder; trackers that write files do so under out/`project`.
        config: of the run, kept with it; its leaves must be plain data.
        leader: gives the samples' rewards, after its step.
        every: leader steps between tables of samples. Trackers without text, such as MLflow, get numbers only.
        samples: prompts in a table, with one completion each.
        project: the trackers' name for all runs of this kind.

    Raises:
        InputError: a tracker that accelerate does not know, or that is not installed; a count that is not positive.

    Example:
        >>> tracker = Tracker("none")
        >>> tracker({"step": 1, "objective": 0.5}, Rollouts.bandit(contexts=torch.tensor([0]), steps={}))
    """

    def __init__(
        self,
        report_to: str | Sequence[str] = "none",
        out: Path = Path("runs"),
        *,
        config: Mapping[str, Any] | None = None,
        leader: LanguageLeader | None = None,
        every: Count = 10,
        samples: Count = 4,
        project: str = "align-cbrl",
    ) -> None:
        self.names = tracker_names(report_to)
        self.out, self.leader, self.every, self.samples, self.project = out, leader, every, samples, project
        self.config = {} if config is None else dict(config)
        self._scores: dict[tuple[int, str], float] = {}
        self._trackers: list[Any] | None = None  # started at the first row: the step is known then, and the processes

    def watch(self, utility: Utility) -> Utility:
        """`utility`, whose scores are remembered for the samples: no judge is asked twice for the tracker's sake."""

        @functools.wraps(utility, updated=())  # so that a judge's calls are still counted
        def watched(leader: Leader, rollouts: Rollouts) -> Tensor:
            scores = utility(leader, rollouts)
            if self.names:
                self._scores.update(zip(_keys(rollouts), scores.detach()[:, 0].tolist(), strict=True))
            return scores

        return watched

    def __call__(self, row: Mapping[str, float], rollouts: Rollouts) -> None:
        """Send one leader step."""
        if self.names and is_main():
            step = int(row["step"])
            numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
            table = self._table(rollouts) if step % self.every == 0 and "completion" in rollouts.steps else []
            try:
                for tracker in self._started(step):
                    tracker.log(numbers, step=step)
                    if table and hasattr(tracker, "log_table"):
                        tracker.log_table("samples", columns=_COLUMNS, data=table, step=step)
                    elif table and tracker.name != "mlflow":  # it takes numbers only
                        tracker.log({"samples": markdown(_COLUMNS, table)}, step=step)
            except Exception as error:  # of somebody else's service, and of any kind
                warnings.warn(
                    f"report_to {self.names}: step {step} was not tracked: {redact(repr(error))}", stacklevel=2
                )
        self._scores.clear()

    def close(self) -> None:
        """Let every tracker finish what it has begun."""
        for tracker in self._trackers or []:
            tracker.finish()
        self._trackers = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _started(self, step: int) -> list[Any]:
        if self._trackers is None:
            self._trackers = []
            for name in self.names:
                kind = LOGGER_TYPE_TO_CLASS[name]
                settings: dict[str, Any] = {"logging_dir": str(self.out)} if kind.requires_logging_directory else {}
                if name == "tensorboard":
                    settings["purge_step"] = step  # a resumed run takes some steps again
                tracker = kind(self.project, **settings)
                tracker.start()
                config = flat(redacted(self.config))
                tracker.store_init_configuration({key: _plain(value) for key, value in config.items()})
                self._trackers.append(tracker)
        return self._trackers

    def _table(self, rollouts: Rollouts) -> list[list[Any]]:
        """The first completion of each of the first prompts."""
        first: dict[int, int] = {}
        for i, context in enumerate(rollouts.contexts.tolist()):
            first.setdefault(context, i)
        shown = rollouts.select(list(first.values())[: self.samples])
        rewards: list[float | None] = [None] * shown.size
        if self.leader is not None:
            with torch.no_grad():
                rewards = self.leader.reward(shown)[:, 0].tolist()
        scores = [self._scores.get(key) for key in _keys(shown)]
        prompts, completions = map(shown_text, shown.steps["prompt"]), map(answer_text, shown.steps["completion"])
        return [list(line) for line in zip(prompts, completions, scores, rewards, strict=True)]


def tracker_names(report_to: str | Sequence[str]) -> list[str]:
    """The trackers that are asked for, each once; none for "none".

    Raises:
        InputError: one that accelerate does not know, or that is not installed.

    Example:
        >>> tracker_names("none")
        []
    """
    names = [report_to] if isinstance(report_to, str) else list(dict.fromkeys(report_to))
    if names == ["none"]:
        return []
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"report_to: unknown tracker {name!r}; {nearest(name, ['none', *LOGGER_TYPE_TO_CLASS])}")
        if LOGGER_TYPE_TO_CLASS[name].__module__ == "accelerate.tracking" and name not in installed:
            raise InputError(
                f"report_to: {name} is not installed; pip install {name}, or set report_to to 'none' or to one of "
                f"{', '.join(installed) or 'what you install'}"
            )
    return names


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    r"""A table in Markdown; line breaks in a cell are shown as ↵, numbers to three decimals, None as a dash.

    Example:
        >>> print(markdown(["prompt", "judge"], [["a|b", 0.5], ["c", None]]))
        | prompt | judge |
        |---|---|
        | a\|b | 0.500 |
        | c | – |
    """
    lines = [list(columns), *([_cell(value) for value in row] for row in rows)]
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value).replace("|", "\\|").replace("\n", " ↵ ")


def _keys(rollouts: Rollouts) -> list[tuple[int, str]]:
    return list(zip(rollouts.contexts.tolist(), map(answer_text, rollouts.steps["completion"]), strict=True))


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
