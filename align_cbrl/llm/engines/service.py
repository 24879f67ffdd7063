"""`RewardService`: the leader's present reward for any engine, and leader steps on what it was asked."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import threading
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from align_cbrl.errors import CheckpointError, InputError, RunStopped, first_line
from align_cbrl.estimators.observing import observe
from align_cbrl.llm import Judge
from align_cbrl.llm.engines.journal import Answer, Journal
from align_cbrl.llm.engines.requests import ScoreRequest, rollout_columns, row_of
from align_cbrl.llm.engines.settings import SCORES, ServeSettings
from align_cbrl.llm.followers.stepwise import StepwiseHPGD
from align_cbrl.llm.followers.trainer_response import TrainerPolicy
from align_cbrl.llm.logs import completion_rollouts, load_rollouts
from align_cbrl.llm.scoring import check_arguments
from align_cbrl.objectives.observations import LogRatio
from align_cbrl.problem import Problem
from align_cbrl.rollouts import Rollouts
from align_cbrl.runs.facts import PRACTICAL_OF_JUDGE
from align_cbrl.runs.imports import load_object
from align_cbrl.runs.lock import only_here
from align_cbrl.runs.metrics import MetricsLog, finite
from align_cbrl.runs.run_folder import claim
from align_cbrl.runs.secrets import redact

REWARD = "reward"
"""The folder of the learned reward, beside the checkpoints."""

_PAUSE = 10.0  # seconds before a step that failed is tried again
_MOST_FIXED = 64  # numbers a completion that are kept with it; larger ones are computed again
_LEAVE = 30.0  # seconds that a judge has to answer when the service is closed; later it is asked again
_FREE = ("hpgd.steps", "hpgd.checkpoint_every", "token_variable", "largest_body",
         *(f"judge.{name}" for name in PRACTICAL_OF_JUDGE))  # fmt: skip


class RewardService:
    """Scores completions with the leader's present reward, and has the leader learn from a share of them.

    Every few batches the newest completions are judged, group by group, and the leader takes a step on them in a thread
    of its own; requests are answered meanwhile, and wait for nothing but the step's own arithmetic. Completions of a
    prompt form a group if they come in one request, and those that come one at a time if they come in one period.

    All that it knows is in its folder: requests.sqlite, judge_cache.sqlite, checkpoints/ and metrics.jsonl. A process
    that was killed at any moment goes on where it was: what was answered is answered alike when it is asked again, and
    counted once; what was judged is paid for once.

    Args:
        settings: the server's.
        out: its folder; made if need be.

    Attributes:
        version: of the reward, the number of leader steps.
        failure: why the last leader step was not taken, in words, or None.

    Raises:
        InputError: what the settings name does not load, or does not fit together.
        CheckpointError: another process works in `out`, or it is the folder of other settings.
    """

    def __init__(self, settings: ServeSettings, out: Path) -> None:
        self.settings, self.out = settings, out
        self.failure: str | None = None
        self._lock = threading.Lock()  # of the leader, its terms and the journal
        self._arrived = threading.Event()
        self._ended = threading.Event()
        self._learning: threading.Thread | None = None
        self._taken: int | None = None  # the period of the last step
        self._build()

    @classmethod
    @contextlib.contextmanager
    def opened(cls, settings: ServeSettings, out: Path, *, learning: bool = True) -> Iterator[RewardService]:
        """The service that a folder holds, alone in it, for as long as the block runs.

        Args:
            settings: the server's.
            out: its folder.
            learning: start the thread that takes leader steps; without it `step_if_due` has to be called.
        """
        with only_here(out):
            claim(out, settings, recipe="serve", free=_FREE)
            service = cls(settings, out)
            try:
                if learning:
                    service._start()
                yield service
            finally:
                service._close()

    @property
    def version(self) -> int:
        """Number of leader steps taken."""
        return self._loop.step

    @property
    def finished(self) -> bool:
        """Whether all leader steps are taken, so that the reward stays as it is."""
        return self._loop.step >= self.settings.hpgd.steps

    def reward(self, request: ScoreRequest) -> Answer:
        """The rewards of a request's completions, and the version that they are of.

        A request that was answered before gets the same answer, and counts once.

        Raises:
            InputError: log-probabilities that the objective needs are missing; or a reward function that returned what
                is no finite number for each completion.
            RunStopped: a reward function raised on every attempt.
            CheckpointError: the disk is full.
        """
        if self._needs_log_probs and request.learn and request.log_probs is None:
            raise MissingLogProbsError(
                "request: expected log_policy and log_prior, since the objective has a price on divergence; add them, "
                "or set objective: {kind: expected}"
            )
        with self._lock:
            if (known := self._journal.answer(request.digest)) is not None:
                return known
            arguments = {"prompts": request.prompts, "completions": request.completions, **request.columns}
            with torch.no_grad():
                fixed = self.leader.fixed_scores(**arguments)
                scores = self.leader.score(**arguments) if fixed is None else self.leader.score_from(fixed, **arguments)
            listed: list[float] = scores.double().tolist()
            for i, value in enumerate(listed):
                if not abs(value) < float("inf"):
                    raise InputError(f"{type(self.leader).__name__}: expected finite rewards, got {value} for "
                                     f"completion {i}")  # fmt: skip
            answer = Answer(listed, self.version)
            if not request.learn:
                return answer
            self._journal.keep(
                request.digest, answer, self._rows(request, fixed), count=request.size, period=self.settings.period
            )
        self._arrived.set()
        return answer

    def step_if_due(self) -> bool:
        """Take a leader step if a period has ended; whether there was one to be taken, or to be left out.

        Raises:
            InputError, RunStopped, CheckpointError: the step failed; its completions wait for another attempt, or for a
                newer period.
        """
        with self._lock:
            period = None if self.finished else self._journal.due()
            batch = None if period is None else self._batch(self._journal.rows(period))
            if period is not None and batch is None:
                self._journal.drop(period)
                self._fail(
                    "no two completions of one prompt came in this period, so that the leader cannot compare them; "
                    "send all completions of a prompt in one request, or make batch_size and every larger"
                )
        if period is None or batch is None:
            return period is not None
        # The judge is asked while requests are answered. What it says is kept before anything is made of it.
        batch = batch.knowing(observe(self.problem, batch).lasting)
        with self._lock:
            if period != self._taken:  # or only its checkpoint is missing, where the disk was full
                self._journal.taking(period, self._loop.step)
                row = self._loop.take(batch)
                self._taken = period
                self._log.append(row)
            self._loop.save(self.out)
            self._journal.drop(period)
            self.failure = None
        if self.finished:
            self.save_reward()
        return True

    def status(self) -> dict[str, Any]:
        """What there is to know: version, counts, what was paid, the reward, the last step's metrics, a failure."""
        counts = self._journal.counts
        judge = self._judge
        known = {
            "version": self.version,
            "steps": self.settings.hpgd.steps,
            **{name: counts[name] for name in ("requests", "repeated", "completions")},
            "judged": judge.spent,
            "reward": self.leader.describe(),
            "last": self._loop.history[-1] if self._loop.history else None,
            "failure": self.failure,
        }
        found: dict[str, Any] = finite(known, "status")
        return found

    def save_reward(self) -> None:
        """Write the present reward to the folder `reward`, which `load_reward` reads."""
        new, place = self.out / f".{REWARD}.new", self.out / REWARD
        shutil.rmtree(new, ignore_errors=True)
        with self._lock:
            self.leader.save_pretrained(new)
        shutil.rmtree(place, ignore_errors=True)
        new.rename(place)

    # ---------------------------------------------------------------------------------------------- inside

    def _build(self) -> None:
        settings, out = self.settings, self.out
        terms = settings.terms()
        self.leader = settings.leader.build(
            terms, None if settings.reference is None else load_rollouts(settings.reference)
        )
        judge = settings.judge
        self._judge = (judge if judge.cache is not None else dataclasses.replace(judge, cache=SCORES)).build(out)
        check_arguments("judge", self._judge.function, _there(self._judge, settings))
        costs = {name: Judge(load_object(path), name=f"cost {name}") for name, path in settings.costs.items()}
        objective = settings.objective.build(self._judge, costs, natural=settings.hpgd.step == "natural")
        self._needs_log_probs = any(isinstance(observation, LogRatio) for observation in objective.observations())
        response = settings.response.build()
        self.problem = Problem(self.leader, objective, TrainerPolicy(response.temperature))
        config = settings.hpgd.build(contexts_per_step=1, group_size=2, seed=0)  # the engine's business
        response.check(config)
        self.words = response.words
        self._loop = StepwiseHPGD(self.problem, settings.hpgd.optimizer(self.leader), response.estimator, config)
        self._loop.begin(out)
        self._journal = Journal(out / "requests.sqlite")
        self._journal.restarted(self._loop.step)
        self._log = MetricsLog(out / "metrics.jsonl")
        self._log.rewrite(self._loop.history)

    def _rows(self, request: ScoreRequest, fixed: torch.Tensor | None) -> list[dict[str, Any]]:
        """What the leader learns from of a request: all of it, or nothing."""
        if self.finished or self._journal.counts["seen"] + request.size <= self.settings.window:
            return []
        kept = None if fixed is None or fixed[0].numel() > _MOST_FIXED or fixed.ndim != 2 else fixed.double().tolist()
        return [row_of(request, i, None if kept is None else kept[i]) for i in range(request.size)]

    def _batch(self, numbered: list[tuple[int, dict[str, Any]]]) -> Rollouts | None:
        """The completions of a period in groups; None where no prompt has two."""
        together: dict[tuple[int, str], list[Mapping[str, Any]]] = defaultdict(list)
        for request, row in numbered:
            together[request, repr(row["prompt"])].append(row)
        groups = [rows for rows in together.values() if len(rows) > 1]
        alone: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for (_, prompt), rows in together.items():
            if len(rows) == 1:
                alone[prompt] += rows
        groups += [rows for rows in alone.values() if len(rows) > 1]
        if not groups:
            return None
        rows = [row for group in groups for row in group]
        group = torch.tensor([number for number, members in enumerate(groups) for _ in members])
        batch = completion_rollouts(group=group, **rollout_columns(rows))
        if any(row["fixed"] is None for row in rows):
            return batch
        return batch.knowing({self.leader: torch.tensor([row["fixed"] for row in rows], dtype=torch.float64)})

    def _start(self) -> None:
        self._learning = threading.Thread(target=self._learn, name="leader", daemon=True)
        self._arrived.set()  # a step may have been due when the last process ended
        self._learning.start()

    def _learn(self) -> None:
        while not self._ended.is_set():
            self._arrived.wait()
            self._arrived.clear()
            if self._ended.is_set():
                return
            try:
                while not self._ended.is_set() and self.step_if_due():
                    pass
            except Exception as error:  # whatever it is, requests are answered; it is said, and tried again
                known = isinstance(error, (InputError, RunStopped, CheckpointError))
                self._fail(str(error) if known else f"{type(error).__name__}: {first_line(error)}")
                if not known:
                    tqdm.write(redact(traceback.format_exc()))
                self._ended.wait(_PAUSE)
                self._arrived.set()

    def _fail(self, reason: str) -> None:
        self.failure = redact(reason)
        tqdm.write(f"the leader's step {self.version + 1} was not taken: {self.failure}")

    def _close(self) -> None:
        self._ended.set()
        self._arrived.set()
        if self._learning is not None:
            self._learning.join(_LEAVE)
        if self._learning is None or not self._learning.is_alive():
            self._log.close()
            self._journal.close()
        self.save_reward()


class MissingLogProbsError(InputError):
    """A request without what the objective needs of it."""


def _there(judge: Any, settings: ServeSettings) -> list[str]:
    """What a judge may ask for by name."""
    several = ["completions_a", "completions_b"] if not isinstance(judge, Judge) else []
    return ["prompts", "completions", *several, *settings.columns]
