"""HPGD: respond, roll out, differentiate, step, log, checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from align_cbrl.checks import Count, Positive, Whole, checked
from align_cbrl.distributed import (
    any_rank,
    barrier,
    broadcast_,
    check_same,
    gather_rows,
    initialize,
    is_main,
    together,
    world_size,
)
from align_cbrl.errors import CheckpointError, InputError, first_line
from align_cbrl.estimators.certificate import Certificate, can_be_weighted, certify, corrected
from align_cbrl.estimators.hypergradient import Hypergradient
from align_cbrl.estimators.natural import Natural, natural_step
from align_cbrl.estimators.observing import observe, of_all_ranks
from align_cbrl.estimators.policy_response import PolicyResponse
from align_cbrl.estimators.replay import Memory, all_at_present, at_present, taken_for_response
from align_cbrl.estimators.reward_pass import with_reward
from align_cbrl.estimators.shortage import make_room, out_of_memory
from align_cbrl.functional import effective_sample_size
from align_cbrl.problem import Leader, Observed, Problem, step_seed
from align_cbrl.rollouts import Rollouts
from align_cbrl.runs.checkpoints import Identity, load_checkpoint, newest_step, save_checkpoint
from align_cbrl.runs.facts import flat, optimizer_settings, settings_of, versions
from align_cbrl.runs.interrupt import end_with_launcher, noted_interrupt
from align_cbrl.runs.lock import only_here
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.progress import Progress, warn_beside_bars

_CHECKPOINTS = "checkpoints"
_LEAP = 3.0  # natural steps are long where features vary little, but seldom so much longer than all parameters
_TAKEN_BACK = 0.1  # of a step: where a budget leaves less, it decides alone
_SHOWN = ("objective", "kl", "gap")
"""Of a leader step's metrics, those beside the bar."""

Observer = Callable[[dict[str, float], Rollouts], None]
"""Called after each leader step with its row of metrics and the rollouts it was taken on; changes neither."""


@checked
@dataclasses.dataclass(frozen=True)
class HPGDConfig:
    """Settings of the outer loop.

    Attributes:
        steps: leader steps.
        contexts_per_step: contexts drawn afresh for each leader step.
        group_size: paths (completions) per context.
        max_gradient_norm: the leader's gradient is scaled down to this norm; None leaves it.
        correction: of samples of a follower that lags, by importance weights within each prompt's group: "on", "off",
            or "auto", where `Certificate.correction_pays` decides at every leader step. Off, samples are taken for
            those of the best response, and remembered ones weighted only by how the leader's reward has changed since:
            the leader then steers the policy that is trained, however it misses its best response. For one-step
            problems with log-probabilities; elsewhere there is none.
        natural: take natural steps, on all remembered batches, instead of the optimizer's (`Natural`): the default
            of `hpgd.step` in the YAML of language models. For one-step problems with log-probabilities, and for
            estimators with a model; None: the optimizer's.
        replays: further updates of the optimizer after each leader step, each on a batch of an earlier step (or this
            one), drawn at random and weighted as samples of the best response to the leader as it is by then. They
            cost no samples of the follower; a `Judge` remembers its scores. For one-step problems with
            log-probabilities. Natural steps use all batches anyway.
        seed: of contexts and paths.
        checkpoint_every: leader steps between checkpoints.
        progress: show a progress bar.
    """

    steps: Count = 100
    contexts_per_step: Count = 8
    group_size: Count = 8
    max_gradient_norm: Positive | None = 1.0
    correction: Literal["auto", "on", "off"] = "auto"
    natural: Natural | None = None
    replays: Whole = 0
    seed: Whole = 0
    checkpoint_every: Count = 10
    progress: bool = True

    def __post_init__(self) -> None:
        if self.natural is not None and self.replays:
            raise InputError(
                f"HPGDConfig.replays: expected 0 with natural steps, which use all remembered batches each time, got "
                f"{self.replays}"
            )


@checked
class HPGD:
    """Hyper policy gradient descent (Thoma et al. 2024), here an ascent of the leader's objective.

    Args:
        problem: leader, objective and follower.
        optimizer: over the leader's parameters, made with `maximize=True`, since `.grad` holds the ascent direction;
            None for natural steps (`HPGDConfig.natural`), which need none.
        hypergradient: the estimator; HPGD's own by default.
        config: the loop's settings.
        out: folder for metrics.jsonl and checkpoints/; None keeps everything in memory.
        fingerprint: identifies what the run was configured with; a checkpoint of another one is refused, and where it
            is a mapping of plain data, by what differs. Defaults to `config` and the settings of problem, optimizer and
            estimator: what their constructors were given and keep, functions by their content, and versions.
        observers: called after each leader step, in every process; a tracker of experiments, say.

    Attributes:
        step: leader steps taken.
        history: one dictionary of metrics a leader step: `step`, `objective`, `gradient_norm`, `leader_seconds`,
            `follower_seconds`, `leader_share` (of wall time so far), `skipped_steps` (without a gradient, so far),
            `judge_calls` (completions that the objective's judges were asked about since the run began), what a
            language leader has learned (the numbers of `LanguageLeader.describe`, such as `weight of length`),
            `step_nats` (of a natural step: how far the best response moves, before the budget), the
            estimator's and the follower's own metrics and, for one-step problems with log-probabilities, those of
            `Certificate.metrics` and `corrected` (1 where the samples were weighted).

    Raises:
        InputError: an optimizer that would descend, or one beside natural steps, or neither; in `run`, a gradient that
            is not finite.

    Example:
        >>> import toy_cmdp
        >>> problem = toy_cmdp.random_cmdp(seed=0)
        >>> optimizer = torch.optim.SGD(problem.leader.parameters(), lr=0.1, maximize=True)
        >>> critic = toy_cmdp.exact.ExactCritic()
        >>> config = HPGDConfig(steps=3, progress=False)
        >>> run = HPGD(problem, optimizer, PolicyResponse(critic), config)
        >>> run.run()
        >>> len(run.history)
        3
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: torch.optim.Optimizer | None = None,
        hypergradient: Hypergradient | None = None,
        config: HPGDConfig | None = None,
        out: str | Path | None = None,
        fingerprint: Identity | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        config = HPGDConfig() if config is None else config
        if (optimizer is None) == (config.natural is None):
            raise InputError(
                "optimizer: expected one, or natural steps, HPGDConfig(natural=Natural()), which need none; got "
                f"{'neither' if optimizer is None else 'both'}"
            )
        if optimizer is not None and not all(group.get("maximize", False) for group in optimizer.param_groups):
            raise InputError("optimizer: expected maximize=True, since the leader ascends; it would descend as it is")
        if config.natural is not None and problem.objective.remembers:
            raise InputError(
                f"{type(problem.objective).__name__}: expected no memory of its own with natural steps, which are "
                "taken on all remembered batches, where it would count them twice; use CrossFitted(..., memory=0)"
            )
        self.problem = problem
        self.optimizer = optimizer
        self.hypergradient = PolicyResponse() if hypergradient is None else hypergradient
        self.config = config
        self.out = None if out is None else Path(out)
        self.fingerprint: Identity = (
            self._facts(but=("steps", "checkpoint_every", "progress")) if fingerprint is None else fingerprint
        )
        self.observers = tuple(observers)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._seconds = {"leader": 0.0, "follower": 0.0}
        saved = self.out is not None
        natural = config.natural
        self._memory = Memory(saved=saved) if natural is None else Memory(natural.remembered(problem) - 1, saved)
        self._between_steps = True  # not while a step has moved some of what a checkpoint holds
        self._told: set[str] = set()  # what has been warned of
        self._judges = list({id(judge): judge for judge in _judges_of(problem.objective)}.values())
        self._asked_before = 0.0  # judges' calls in steps that other processes took, less those before this run

    def run(self, resume: bool = False) -> None:
        """Take leader steps until `config.steps`.

        Ctrl-C, and the signals that schedulers send (SIGTERM, SIGHUP, SIGUSR1), let the leader step under way finish;
        then a checkpoint is saved and KeyboardInterrupt raised. A second Ctrl-C stops at once. Whatever else ends the
        run, a mistake in a reward function or in an observer, the last whole leader step is saved too.

        In several processes (docs/scaling.md) the leader starts as it is on rank 0, every rank takes the same steps,
        and rank 0 alone writes; all of them read the checkpoint.

        Args:
            resume: continue from the newest valid checkpoint in `out`, if there is one.

        Raises:
            InputError: `out` holds a run that is not to be resumed; several processes with an estimator that knows its
                own rollouts only, or with folders `out` that differ; a launch command that starts fewer processes than
                it asks for.
            KeyboardInterrupt, RunStopped: stopped early; the run can be resumed.
            CheckpointError: the checkpoint is of another configuration, or none is valid, or the disk is full, or
                another process works in `out`.
        """
        with contextlib.ExitStack() as stack:
            initialize()
            end_with_launcher()
            if self.out is not None:
                with together("taking the folder of the run"):
                    stack.enter_context(only_here(self.out / _CHECKPOINTS))
            self._prepare(resume)
            if self.step >= self.config.steps:
                return
            log = self._open_log(stack)
            bar = stack.enter_context(self._bar())
            interrupt = stack.enter_context(noted_interrupt())
            returned_at = time.perf_counter()

            def on_rollouts(rollouts: Rollouts, metrics: dict[str, float]) -> bool:
                nonlocal returned_at
                row = self._timed_step(rollouts, metrics, returned_at)
                if log is not None:
                    log.append(row)
                for observer in self.observers:
                    observer(row, rollouts)
                bar.update(**{name: row[name] for name in _SHOWN if name in row})
                done = self.step >= self.config.steps
                interrupt.asked = any_rank(interrupt.asked)  # all stop after the same step, or some would wait
                if done or interrupt.asked or self.step % self.config.checkpoint_every == 0:
                    if log is not None:
                        log.sync()
                    self._save()
                returned_at = time.perf_counter()
                return not (done or interrupt.asked)

            try:
                self.problem.follower.follow(
                    self.problem.leader,
                    on_rollouts,
                    start=self.step,
                    steps=self.config.steps,
                    contexts_per_step=self.config.contexts_per_step,
                    group_size=self.config.group_size,
                    seed=self.config.seed,
                )
            except CheckpointError:  # saying it once is enough
                raise
            except Exception:
                self._save_after_failure()
                raise
        barrier()  # what rank 0 has written is there on every rank
        if interrupt.asked and self.step < self.config.steps:
            raise interrupt.stop()

    def leader_step(self, rollouts: Rollouts) -> dict[str, float]:
        """One step of the leader on a batch of the follower's rollouts; returns its metrics.

        Raises:
            InputError: a gradient that is not finite; the leader is then left as it is.
        """
        problem, leader = self.problem, self.problem.leader

        # The leader's reward functions are asked here, and only here: what they say does not move with the leader.
        rollouts = self._prepared(rollouts)

        # One pass through the leader, where it can tell its reward to first order; what is remembered goes without.
        expanded = self._expanded(rollouts)

        # How far is the follower from its best response? Where it lags, its samples can be weighted to stand for it.
        certificate = self._certify(expanded)
        seen = corrected(expanded, certificate) if certificate is not None and self._pays(certificate) else expanded

        # What the objective needs to know of every step: the judge is asked here, and only here.
        observed = None
        if self.hypergradient.observes:
            observed = observe(problem, seen, self.hypergradient.chunks)
            seen = seen.knowing(observed.values)

        # A natural step is taken on all that was judged so far, weighted to the present best response.
        batch = seen
        if self.config.natural is not None and observed is not None and can_be_weighted(problem, seen):
            self._memory.batches = [self._known(older) for older in self._memory.batches]
            older = [self._expanded(batch) for batch in self._memory.batches]
            batch = all_at_present(problem, older, seen, self.hypergradient.chunks)
            batch = batch.knowing(observe(problem, batch, self.hypergradient.chunks).values)

        # The hypergradient, through the follower's response, into the leader's `.grad`.
        leader.zero_grad(set_to_none=True)
        row = self.hypergradient.backward(problem, batch)
        if not math.isfinite(row["gradient_norm"]):
            raise InputError(
                f"{type(leader).__name__}: its gradient is not finite at leader step {self.step + 1} "
                f"(norm {row['gradient_norm']}), although rewards and utilities are; look for a square root or a "
                "logarithm at zero. The leader was left as it is"
            )

        # What the objective itself keeps follows the batch: a multiplier, a memory of contexts.
        def observations() -> Observed:
            everywhere = of_all_ranks(observed or observe(problem, seen))
            self._between_steps = False
            return everywhere

        row |= problem.objective.update(observations)

        # What is to be remembered, as samples of whom they are taken for; the leader's present reward is needed for it.
        lasting = rollouts.knowing({} if observed is None else observed.lasting)
        if self.config.correction == "off" and can_be_weighted(problem, rollouts) and self._remembers(rollouts):
            taken = taken_for_response(problem, expanded, self.hypergradient.chunks)
            lasting = dataclasses.replace(lasting, log_policy=taken.log_policy)

        # The step, back into the leader's budget, and again on remembered batches.
        self._between_steps = False
        if self.config.natural is not None and row["gradient_norm"] > 0:
            row |= self._natural_step(batch, self.config.natural)
            row["skipped_steps"] = self._skipped_before()
        else:
            row["skipped_steps"] = self._skipped_before() + self._apply(row["gradient_norm"])
        if self._remembers(rollouts):
            self._memory.add(lasting)
        if self.config.replays:
            row |= self._replay()
        row |= self._learned()
        if certificate is not None:
            row |= {**certificate.metrics(), "corrected": float(seen.weight is not rollouts.weight)}
        return row

    def _remembers(self, rollouts: Rollouts) -> bool:
        if self.config.natural is not None:
            return can_be_weighted(self.problem, rollouts)
        return self.config.replays > 0

    def _learned(self) -> dict[str, float]:
        """What the leader has learned, where it says so in numbers, and what its judges were asked so far."""
        describe = getattr(self.problem.leader, "describe", None)
        learned = {} if describe is None else {k: v for k, v in describe().items() if isinstance(v, float)}
        asked = self._asked()
        return learned if asked is None else {**learned, "judge_calls": self._asked_before + asked}

    def _count_from_here(self) -> None:
        """Leave out what the judges were asked before this run, for somebody else; count an earlier part of it."""
        before = self.history[-1].get("judge_calls", 0.0) if self.history else 0.0
        self._asked_before = before - (self._asked() or 0.0)

    def _asked(self) -> float | None:
        """How many completions the objective's judges were asked about in this process's life; None without a judge."""
        if not self._judges:
            return None
        return float(gather_rows(torch.tensor([[sum(judge.calls for judge in self._judges)]])).sum())

    def _apply(self, gradient_norm: float) -> bool:
        """Step along `.grad`, and bring the leader back into its budget; returns whether the step was skipped."""
        if gradient_norm == 0:  # an optimizer with momentum would go on where nothing points
            self._tell_once(
                "skipped",
                "the leader's gradient is zero, so that its step is skipped (metric skipped_steps): no prompt's "
                "completions differ in what they are rewarded and judged for; raise the follower's temperature, draw "
                "larger groups, or use a judge with finer scores",
            )
            return True
        if self.config.max_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.problem.parameters, self.config.max_gradient_norm)
        assert self.optimizer is not None  # or the step would be a natural one
        self.optimizer.step()
        self.problem.leader.project()
        return False

    def _natural_step(self, batch: Rollouts, settings: Natural) -> dict[str, float]:
        """A natural step, on a batch whose gradient is in `.grad`; metrics: `step_nats`, how far the response moves."""
        problem = self.problem
        metric = self.hypergradient.metric(problem, batch)
        gradient = torch.cat([_flat(p.grad, p) for p in problem.parameters])
        step = natural_step(gradient, metric, settings, problem.objective.price_of_a_nat)
        if step.copies is not None:
            first, second = (_parameter_name(problem.leader, number) for number in step.copies)
            self._tell_once(
                "copies",
                f"{first} and {second} of {type(problem.leader).__name__} reward the same: completions of a prompt "
                "differ in both alike, so that only their sum is learned, and shared between them; drop one of the two",
            )
        with torch.no_grad():
            length, size = float(step.change.norm()), math.hypot(*(float(p.norm()) for p in problem.parameters))
            leap = [p.clone() for p in problem.parameters] if length > _LEAP * size else None
            pieces = step.change.split([p.numel() for p in problem.parameters])
            for parameter, piece in zip(problem.parameters, pieces, strict=True):
                parameter.add_(piece.view_as(parameter).to(parameter))
            problem.leader.project()
            if leap is not None:
                moves = (float((p - old).norm()) for p, old in zip(problem.parameters, leap, strict=True))
                self._tell_of_budget(math.hypot(*moves) / length)
        return {"step_nats": step.nats}

    def _tell_of_budget(self, left: float) -> None:
        """A norm of the parameters is no measure of how far the best response moves, and may end a leader's way."""
        if left < _TAKEN_BACK:
            self._tell_once(
                "budget",
                f"leader step {self.step + 1}: the leader's budget takes {1 - left:.0%} of a natural step back, which "
                f"is longer than the parameters of {type(self.problem.leader).__name__} themselves, so that it hardly "
                "moves; raise the budget, of a reward model to None (null in YAML), and bound the divergence by a "
                "price (KLPriced, kl_priced) instead",
            )

    def _replay(self) -> dict[str, float]:
        """Updates on remembered batches; metrics: what share of each the importance weights leave, on average."""
        shares = []
        for batch in self._memory.draw(self.config.replays, step_seed(self.config.seed, self.step)):
            batch = at_present(self.problem, self._differentiable(self._prepared(batch)), self.hypergradient.chunks)
            assert batch.weight is not None
            shares.append(float(effective_sample_size(batch.weight, batch.group[:, 0]).sum() / batch.size))
            self.problem.leader.zero_grad(set_to_none=True)
            found = self.hypergradient.backward(self.problem, batch)
            if 0 < found["gradient_norm"] < math.inf:
                self._apply(found["gradient_norm"])
        return {"replay_effective_sample_size": sum(shares) / len(shares)}

    def _prepared(self, rollouts: Rollouts) -> Rollouts:
        with together("scoring the completions"):
            return self.problem.leader.prepare(rollouts)

    def _expanded(self, rollouts: Rollouts) -> Rollouts:
        """The paths with the leader's reward to first order at its present parameters, where it can tell that."""
        leader = self.problem.leader
        if leader in rollouts.known or type(leader).first_order is Leader.first_order:
            return rollouts
        with together("scoring the completions"):
            try:
                pieces = [leader.first_order(piece) for piece in rollouts.chunks(self.hypergradient.chunks)]
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                pieces = [None]
                make_room()
        found = [piece for piece in pieces if piece is not None]
        return rollouts if len(found) < len(pieces) else rollouts.knowing({leader: torch.cat(found)})

    def _differentiable(self, rollouts: Rollouts) -> Rollouts:
        """Remembered paths with the leader's reward and its graph, from the one pass that weights them.

        A new batch goes without: the graph would fill the memory while the judge, a model perhaps, is asked.
        """
        if any_rank(self.hypergradient.chunks > 1):  # the backward pass is cut into pieces
            return self._expanded(rollouts)
        with together("scoring the completions"):
            try:
                return with_reward(self.problem, rollouts)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                make_room()
        return rollouts

    def _known(self, batch: Rollouts) -> Rollouts:
        """A remembered batch with its scores, which a resumed run has to look up once."""
        batch = self._prepared(batch)
        if all(o in batch.known for o in self.problem.objective.observations() if o.lasting):
            return batch
        return batch.knowing(observe(self.problem, batch, self.hypergradient.chunks).lasting)

    def _certify(self, rollouts: Rollouts) -> Certificate | None:
        if not self.hypergradient.best_response:
            return None
        certificate = certify(
            self.problem,
            rollouts,
            self.history,
            chunks=self.hypergradient.chunks,
            correctable=self.config.correction != "off",
        )
        if certificate is not None and certificate.alarm is not None:
            subject = "sampler" if certificate.missampled else "alarm"
            self._tell_once(subject, f"leader step {self.step + 1}: {certificate.alarm} (docs/certificate.md)")
        return certificate

    def _pays(self, certificate: Certificate) -> bool:
        wanted = certificate.correction_pays if self.config.correction == "auto" else self.config.correction == "on"
        return wanted and certificate.weight is not None

    def _timed_step(self, rollouts: Rollouts, metrics: dict[str, float], returned_at: float) -> dict[str, float]:
        """A leader step, and how long it and the follower's turn before it took."""
        began = time.perf_counter()
        row = self.leader_step(rollouts)
        self.step, self._between_steps = self.step + 1, True
        ended = time.perf_counter()
        self._seconds["leader"] += ended - began
        self._seconds["follower"] += began - returned_at
        row = {
            "step": self.step,
            **row,
            **metrics,
            "leader_seconds": ended - began,
            "follower_seconds": began - returned_at,
            "leader_share": self._seconds["leader"] / sum(self._seconds.values()),
        }
        self.history.append(row)
        return row

    def _skipped_before(self) -> float:
        return self.history[-1].get("skipped_steps", 0.0) if self.history else 0.0

    def _prepare(self, resume: bool) -> None:
        """Refuse what cannot work, and restore a checkpoint."""
        if world_size() > 1 and not self.hypergradient.over_ranks:
            raise InputError(
                f"{type(self.hypergradient).__name__}: expected one process, got {world_size()}; only PolicyResponse "
                "and its variants gather what other processes sampled"
            )
        self._check_ranks()
        if self.out is not None:
            self.problem.follower.state_dict()  # what cannot be saved should be known before anything is trained
        if self.out is not None and resume:
            self._restore(self.out)
        elif self.out is not None and self.step == 0:
            _refuse_a_run_in(self.out)
        self._count_from_here()
        steps = gather_rows(torch.tensor([self.step])).tolist()
        if len(set(steps)) > 1:
            raise InputError(
                f"out: expected one folder that every process sees, got checkpoints of steps {steps} on ranks 0 to "
                f"{world_size() - 1}; put it on a shared disk"
            )
        broadcast_(self.problem.leader)

    def _check_ranks(self) -> None:
        """Refuse processes that were built from different things, which would compute something that nobody asked."""
        if world_size() > 1:
            check_same(flat(self._facts(but=("progress",), practical=True)))  # a bar on one rank is no difference

    def _open_log(self, stack: contextlib.ExitStack) -> MetricsLog | None:
        if self.out is None:
            return None
        log = stack.enter_context(MetricsLog(self.out / "metrics.jsonl"))
        log.rewrite(self.history)  # without the steps to be redone, and whatever a kill left behind
        return log

    def _bar(self) -> Progress:
        # Seeds side by side share a log.
        name = "leader" if self.out is None else f"{self.out.parent.name} {self.out.name}, leader".lstrip()
        return Progress(self.config.steps, name, self.step, self.config.progress and is_main())

    def _tell_once(self, subject: str, message: str) -> None:
        if subject not in self._told and is_main():
            warn_beside_bars(message)
        self._told.add(subject)

    def _facts(self, but: tuple[str, ...], practical: bool = False) -> dict[str, Any]:
        """What the run is made of, without the settings `but` of the loop; `practical`: see `settings_of`."""
        problem = self.problem
        return {
            "config": {name: value for name, value in dataclasses.asdict(self.config).items() if name not in but},
            "leader": settings_of(problem.leader, practical),
            "follower": settings_of(problem.follower, practical),
            "objective": settings_of(problem.objective, practical),
            "hypergradient": settings_of(self.hypergradient, practical),
            "optimizer": None if self.optimizer is None else optimizer_settings(self.optimizer),
            "version": versions(),
        }

    def _save(self) -> None:
        if self.out is None or not is_main():  # what nobody writes need not be copied
            return
        state = {
            "leader": self.problem.leader.state_dict(),
            "optimizer": {} if self.optimizer is None else self.optimizer.state_dict(),
            "follower": self.problem.follower.state_dict(),
            "objective": self.problem.objective.state_dict(),
            "hypergradient": self.hypergradient.state_dict(),
            "memory": self._memory.state_dict(),
            "history": self.history,
            "seconds": self._seconds,
        }
        save_checkpoint(self.out / _CHECKPOINTS, self.step, state, fingerprint=self.fingerprint)

    def _save_after_failure(self) -> None:
        """Save the last whole leader step, unless a step broke down half way or the leader itself did."""
        if not (self._between_steps and all(bool(torch.isfinite(p).all()) for p in self.problem.parameters)):
            return
        try:
            self._save()
        except Exception as error:  # the failure that brought us here is the one to be raised
            warnings.warn(f"leader step {self.step} could not be saved: {first_line(error)}", stacklevel=2)

    def _restore(self, out: Path) -> None:
        found = load_checkpoint(out / _CHECKPOINTS, fingerprint=self.fingerprint)
        if found is None:
            return
        self.step, state = found
        self.problem.leader.load_state_dict(state["leader"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.problem.follower.load_state_dict(state["follower"])
        self.problem.objective.load_state_dict(state["objective"])
        self.hypergradient.load_state_dict(state["hypergradient"])
        self._memory.load_state_dict(state.get("memory", []))
        self.history = state["history"]
        self._seconds = state["seconds"]
        self._count_from_here()


def _judges_of(part: Any, depth: int = 5) -> list[Any]:
    """What counts its calls, as a `Judge` does, among the parts of an objective; also behind a wrapper around it."""
    part = inspect.unwrap(part) if callable(part) else part
    if isinstance(getattr(part, "calls", None), int):
        return [part]
    if depth == 0 or isinstance(part, (Tensor, torch.nn.Module)):
        return []
    ours = type(part).__module__.startswith("align_cbrl.") and hasattr(part, "__dict__")
    inside = (
        part if isinstance(part, (list, tuple)) else vars(part).values() if ours and hasattr(part, "__dict__") else ()
    )
    return [judge for each in inside for judge in _judges_of(each, depth - 1)]


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """A gradient as numbers in a row; zeros where nothing depends on the parameter."""
    return (torch.zeros_like(parameter) if gradient is None else gradient).detach().flatten()


def _parameter_name(leader: Leader, number: int) -> str:
    """The name of the leader's trainable number with this place among all of them, such as weight[2]."""
    for name, parameter in leader.named_parameters():
        if parameter.requires_grad:
            if number < parameter.numel():
                return f"{name}[{number}]"
            number -= parameter.numel()
    raise IndexError(number)


def _refuse_a_run_in(out: Path) -> None:
    """Refuse a folder with leader steps in it, which a new run would destroy."""
    log = out / "metrics.jsonl"
    if newest_step(out / _CHECKPOINTS) or (log.exists() and log.stat().st_size > 0):
        raise InputError(
            f"out={str(out)!r}: holds a run already, which would be lost; run(resume=True) continues it; choose "
            "another folder for a new one, or remove this one"
        )
