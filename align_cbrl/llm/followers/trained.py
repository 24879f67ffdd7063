"""What followers that trl trains have in common: steps that can be repeated, and a state to resume from."""

from __future__ import annotations

import abc
import functools
import itertools
import math
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback

from align_cbrl.checks import Count, Positive, Several, Whole, checked
from align_cbrl.distributed import gather_rows, gather_together, is_main, share, world_size
from align_cbrl.errors import InputError
from align_cbrl.estimators.truncated import IterativeFollower
from align_cbrl.functional import best_response_gap
from align_cbrl.llm.conversations import answer_text, is_conversation
from align_cbrl.llm.followers.adapters import WithoutAdapter, check_adapter
from align_cbrl.llm.followers.base import LanguageFollower, language_leader
from align_cbrl.llm.followers.prompt_order import PromptOrder
from align_cbrl.llm.followers.schedule import Schedule
from align_cbrl.llm.followers.trl.observed import (
    CONTEXT,
    AfterEachStep,
    ObservedTrainer,
    prepare_observed,
    whole_parameters,
)
from align_cbrl.llm.followers.trl.settings import Fields
from align_cbrl.llm.leaders.base import LanguageLeader
from align_cbrl.llm.loading import loading
from align_cbrl.llm.prompts import check_count
from align_cbrl.llm.sampling import Completions, decode, repeat_columns
from align_cbrl.llm.scoring import copied
from align_cbrl.problem import Leader, OnRollouts, step_seed, temperature_of
from align_cbrl.rollouts import Rollouts

_LARGEST_SEED = 2**62


@checked
class TrainedFollower(LanguageFollower, IterativeFollower):
    """A policy trained by one of trl's trainers towards the Boltzmann response to the leader's reward.

    Prompts and random numbers of an optimizer step depend on the seed and the step's number alone, and `state_dict`
    holds the rest. So a run that is continued, at any step, repeats the uninterrupted one; on a CPU to the last bit.

    Args:
        model, prompts, temperature, max_completion_length: as for `LanguageFollower`.
        prompts_per_step: distinct prompts in each optimizer step, of all processes together.
        group_size: completions per prompt, at least 2; 4 or more recommended.
        learning_rate: of the policy's AdamW.
        decay_after: optimizer steps at the whole learning rate. At later ones it is decay_after / step of it, so that
            the policy comes to rest at its best response instead of hovering around it; None: constant.
        schedule: how training and leader steps alternate.
        interval, warmup, inside: short for a `Schedule` of these.
        seed: of sampling and prompt order in `train`; `follow` uses the seed it is given.
        peft_config: trains an adapter, such as `peft.LoraConfig(r=16, target_modules="all-linear")`, instead of all
            parameters; the reference is then the policy without it.
        settings: other fields of trl's configuration, of those that are known to leave the best response alone
            (docs/language_followers.md). With `gradient_accumulation_steps` a step's batch is trained on in as many
            pieces.

    Raises:
        InputError: see `LanguageFollower`; fewer prompts than a generation batch; group size 1; settings that are not
            known to leave the best response alone, or that are arguments of the follower; a batch that processes or
            pieces do not divide; an adapter on lm_head; a trl that was not tested.
    """

    fields: ClassVar[Fields]
    """Which fields of trl's configuration may be set."""

    def __init__(
        self,
        model: str | Path,
        prompts: Dataset,
        temperature: float,
        *,
        max_completion_length: Count = 64,
        prompts_per_step: Count = 8,
        group_size: Several = 8,
        learning_rate: Positive = 1e-4,
        decay_after: Count | None = None,
        schedule: Schedule | None = None,
        interval: Count | None = None,
        warmup: Whole | None = None,
        inside: bool | None = None,
        seed: Whole = 0,
        peft_config: Any = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        settings = dict(settings or {})
        self.fields.check(settings)
        super().__init__(
            model,
            prompts,
            temperature,
            max_completion_length=max_completion_length,
            chat_template_kwargs=settings.get("chat_template_kwargs"),
        )
        check_count(prompts, prompts_per_step)
        if peft_config is not None:
            check_adapter(peft_config)
        self.prompts_per_step, self.group_size, self.seed = prompts_per_step, group_size, seed
        self.learning_rate, self.decay_after, self.settings = learning_rate, decay_after, settings
        self.schedule = _schedule(schedule, interval=interval, warmup=warmup, inside=inside)
        self.peft_config = peft_config
        folder = tempfile.mkdtemp(prefix="align_cbrl_trl_")  # trl insists on one; nothing of value goes there
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        pieces = _pieces(prompts_per_step, group_size, settings)
        self._config = self._make_config(
            temperature,
            output_dir=folder,
            per_device_train_batch_size=prompts_per_step * group_size // pieces,
            num_generations=group_size,
            max_completion_length=max_completion_length,
            learning_rate=learning_rate,
            seed=seed,
            **{**settings, "model_init_kwargs": {**(settings.get("model_init_kwargs") or {}), **self._load_settings}},
        )
        self._leader: LanguageLeader | None = None
        self._trainer: ObservedTrainer | None = None
        self._training = False
        self._steps = 0  # optimizer steps that led to the present policy
        self._completions = 0  # completions trained on, also for policies that were put back
        self._scores = torch.zeros(0)  # rewards of the newest batch
        self._begun = 0  # steps of the response under way, which a run that stopped in it does not take again
        self._ready: int | None = None  # the newest leader step whose response is done
        self._handed_out: Completions | None = None  # its completions, where the leader sees those trained on
        self._fixed: Tensor | None = None  # what the leader's reward of the newest batch is made of
        self._known: dict[Any, Tensor] = {}  # the same of those handed out, for `Rollouts.known`
        self._of_all_ranks: Completions | None = None  # of every process: rank 0 saves these
        self._trainer_metrics: dict[str, float] = {}  # trl's own, of the newest response
        self._sums: list[float] | None = None
        self._initial: dict[str, Tensor] = {}  # an adapter's parameters before training
        self._on_step: Callable[[int], bool] = lambda step: True

    @classmethod
    def check_settings(
        cls,
        temperature: float,
        max_completion_length: int,
        prompts_per_step: int,
        group_size: int,
        settings: Mapping[str, Any],
    ) -> None:
        """Refuse what a follower of any model would refuse; arguments as the constructor's.

        Raises:
            InputError: as the constructor.
        """
        cls.fields.check(settings)
        pieces = _pieces(prompts_per_step, group_size, settings)
        with tempfile.TemporaryDirectory() as folder:
            cls._make_config(
                temperature,
                output_dir=folder,
                per_device_train_batch_size=prompts_per_step * group_size // pieces,
                num_generations=group_size,
                max_completion_length=max_completion_length,
                **settings,
            )

    @staticmethod
    @abc.abstractmethod
    def _make_config(temperature: float, /, **settings: Any) -> Any:
        """trl's configuration, checked."""

    @staticmethod
    @abc.abstractmethod
    def _make_trainer(**arguments: Any) -> ObservedTrainer:
        """trl's trainer, observed."""

    @property
    def policy(self) -> PreTrainedModel:
        """The policy being trained."""
        return self._built().accelerator.unwrap_model(self._built().model)

    @property
    def prior(self) -> Any:
        """The frozen reference policy: a model of its own, or the policy without its adapter."""
        reference = self._built().reference
        return WithoutAdapter(self.policy) if reference is None else reference

    @property
    def steps(self) -> int:
        """Optimizer steps that led to the present policy."""
        return self._steps

    @property
    def completions_seen(self) -> int:
        """Completions the follower has been trained on, in all processes together."""
        return self._completions

    @property
    def newest(self) -> Rollouts:
        """The completions of the newest optimizer step (of this process). Raises InputError before the first."""
        if self._trainer is None or self._trainer.observed is None:
            raise InputError("newest: the follower has not been trained yet; call train(leader, steps) first")
        return self._trainer.observed.rollouts()

    def trainer_metrics(self) -> dict[str, float]:
        """trl's own metrics of the newest optimizer step: `trl/reward`, `trl/kl`, `trl/completions/mean_length`, ..."""
        taken = {} if self._trainer is None else self._trainer.take_metrics()
        self._trainer_metrics = taken or self._trainer_metrics
        return dict(self._trainer_metrics)

    def train(self, leader: Leader, steps: int, on_step: Callable[[int], bool] | None = None) -> None:
        """Take `steps` optimizer steps towards the best response to `leader`.

        Args:
            leader: a `LanguageLeader`; its reward is read anew at every step.
            steps: optimizer steps.
            on_step: called after each with the number taken in this call; returns False to end it.

        Raises:
            InputError: a reward that is not finite, or completions that are all empty before any training.
        """
        order = PromptOrder(len(self.prompts), self.prompts_per_step, self.seed)
        self._train(leader, steps, order, lambda step: step_seed(self.seed, step), self._steps, on_step)

    def _train(
        self,
        leader: Leader,
        steps: int,
        rows: Callable[[int], Sequence[int]],
        seed_of: Callable[[int], int],
        first_step: int,
        on_step: Callable[[int], bool] | None = None,
    ) -> None:
        if self._training:
            raise InputError(
                f"{type(self).__name__}: asked to train from inside its own training loop, by an estimator that makes "
                "it respond again; use schedule=Schedule(inside=False, ...)"
            )
        self._leader = language_leader(leader)
        if steps == 0:
            return
        trainer = self._built()
        trainer.rows, trainer.seed_of = rows, seed_of
        trainer.rate_of = functools.partial(self._rate, self._steps)
        trainer.begin(first_step, steps)

        def after_step(step: int) -> bool:
            self._steps += 1
            self._completions += self.prompts_per_step * self.group_size
            return True if on_step is None else on_step(step)

        self._on_step, self._training = after_step, True
        try:
            trainer.train()
        finally:
            self._training = False

    def _rate(self, before: int, step: int) -> float:
        """The part of the learning rate that the step after `before + step` others is taken at."""
        return 1.0 if self.decay_after is None else min(1.0, self.decay_after / (before + step + 1))

    def reset(self) -> None:
        """Back to the untrained policy."""
        self._steps, self._begun, self._ready, self._handed_out = 0, 0, None, None
        self._trainer_metrics = {}
        if self._trainer is None:
            return
        self._copy(self._untrained())
        self._trainer.optimizer = None
        self._trainer.observed = None

    def iterate(
        self, leader: Leader, contexts: Tensor, iterations: int, generator: torch.Generator
    ) -> dict[str, float]:
        """Take `iterations` optimizer steps on the prompts `contexts` only. Metrics: `follower_steps`.

        Each step draws `prompts_per_step` of them without repetition, or all of them, repeated, where they are fewer.
        """
        distinct = torch.unique(contexts.cpu())
        seeds = [int(torch.randint(_LARGEST_SEED, (1,), generator=generator)) for _ in range(iterations)]

        def rows(step: int) -> list[int]:
            order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seeds[step]))
            return list(itertools.islice(itertools.cycle(distinct[order].tolist()), self.prompts_per_step))

        self._train(leader, iterations, rows, lambda step: step_seed(seeds[step], 1), 0)
        return {"follower_steps": float(self._steps)}

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """Train as the schedule says (`warmup` more steps the first time), on prompts of the whole dataset.

        Metrics: `follower_steps` in all, with a tolerance the `response_steps` that this response took, and trl's own
        (`trainer_metrics`).
        """
        begun = self._begun
        before, warmup = self._steps - begun, self.schedule.warmup if self._steps == begun else 0

        def on_step(taken: int) -> bool:
            self._begun = begun + taken
            return not self.schedule.due(self._begun - warmup, self.newest_gap)

        self.train(leader, warmup + self.schedule.most - begun, on_step)
        self._begun = 0
        return self._metrics(self._steps - before)

    def newest_gap(self) -> float:
        """Nats to the best response, estimated on the newest batch: a lower bound in expectation.

        The policy is the one that the batch was sampled from, before the optimizer step.
        """
        assert self._trainer is not None and self._trainer.observed is not None and self._leader is not None
        seen = self._trainer.observed
        with torch.no_grad():
            temperature = float(temperature_of(self._leader, self))
        log_ratio = self._scores / temperature - (seen.log_policy - seen.log_prior)
        # Every rank has to come to the same number, or they would part ways.
        return best_response_gap(gather_rows(log_ratio), gather_rows(seen.context)).mean().item()

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        """Fresh completions of the present policy for these prompts."""
        return self.sample(contexts, group_size, generator).rollouts()

    def sample(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Completions:
        """As `rollout`, before it becomes rollouts."""
        self._check_whole("samples between trainings")
        seed = int(torch.randint(2**31, (1,), generator=generator))
        return self.answers(
            self.policy, self.prior, self.prompts, contexts.tolist(), group_size, seed, evidence=self._evidence
        )

    def turn(
        self, leader: Leader, step: int, *, contexts_per_step: int, group_size: int, seed: int
    ) -> tuple[Rollouts, dict[str, float]]:
        """See `Follower.turn`; where the schedule is inside, the rollouts are those just trained on.

        A response that was made before the run stopped is not made again.
        """
        self.seed = seed
        if not self.schedule.inside:
            return super().turn(leader, step, contexts_per_step=contexts_per_step, group_size=group_size, seed=seed)
        self._check_inside(contexts_per_step, group_size)
        if not self._is_ready(step):
            self.respond(leader, torch.arange(0))
            self._hand_out(step)
        return self._shown(contexts_per_step), self._metrics(0)

    def leader_stepped(self) -> None:
        """See `Follower.leader_stepped`."""
        self._ready, self._handed_out = None, None
        if self._trainer is not None:
            self._trainer.forget_buffer()  # the leader's step has changed what those completions are worth

    def follow(
        self,
        leader: Leader,
        on_rollouts: OnRollouts,
        *,
        start: int,
        steps: int,
        contexts_per_step: int,
        group_size: int,
        seed: int,
    ) -> None:
        """See `Follower.follow`; inside, one train() call whose callback hands out the newest batch.

        Raises:
            InputError: inside the loop, more contexts or another group size than the follower trains on.
        """
        self.seed = seed
        if not self.schedule.inside:
            super().follow(
                leader, on_rollouts, start=start, steps=steps,
                contexts_per_step=contexts_per_step, group_size=group_size, seed=seed,
            )  # fmt: skip
            return
        self._check_inside(contexts_per_step, group_size)
        step = start
        if self._is_ready(step):  # the run stopped after this response, and before the leader's step
            go_on = on_rollouts(self._shown(contexts_per_step), self._metrics(0))
            self.leader_stepped()
            step += 1
            if not go_on or step >= steps:
                return
        warmup = self.schedule.warmup if step == 0 else 0

        def on_step(_: int) -> bool:
            nonlocal step, warmup
            self._begun += 1
            if not self.schedule.due(self._begun - warmup, self.newest_gap):
                return True
            self._hand_out(step)
            metrics = self._metrics(self._begun)
            step, self._begun, warmup = step + 1, 0, 0
            go_on = on_rollouts(self._shown(contexts_per_step), metrics)
            self.leader_stepped()
            return go_on and step < steps

        self.train(leader, warmup + (steps - step) * self.schedule.most - self._begun, on_step)

    def state_dict(self) -> dict[str, Any]:
        """What training the policy further depends on: its trained parameters (an adapter's only, where there is one),
        its optimizer's moments, the number of steps taken, and a response that the leader has not stepped on yet,
        finished or not.
        """
        self._check_whole("checkpoint", with_moments=True)
        sampler = {"sampler": self._evidence.state_dict()} if self._evidence.batches else {}
        if self._trainer is None or self._trainer.optimizer is None:
            return sampler
        seen = None if self._handed_out is None else self._of_all_ranks
        return sampler | {
            "policy": {name: value.detach().to("cpu", copy=True) for name, value in self._trainable().items()},
            "optimizer": _copied(self._trainer.optimizer.state_dict()),
            "reference": self._reference_sums(),
            "steps": self._steps,
            "completions": self._completions,
            "begun": self._begun,
            "ready": self._ready,
            "trainer_metrics": self._trainer_metrics,
            "handed_out": None
            if seen is None
            else {
                "context": seen.context.clone(),
                "token_ids": [list(ids) for ids in seen.token_ids],
                "log_policy": seen.log_policy.clone(),
                "log_prior": seen.log_prior.clone(),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; an empty state is the untrained policy.

        Raises:
            InputError: the state of another policy, or of one that was trained against another reference.
        """
        if "sampler" in state:
            self._evidence.load_state_dict(state["sampler"])
        if "policy" not in state:
            self.reset()
            return
        self._check_whole("checkpoint", with_moments=True)
        trainer = self._built()
        sums = state.get("reference", self._reference_sums())
        if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(sums, self._reference_sums(), strict=True)):
            raise InputError(
                f"state: its policy was trained against another reference than model {self.model_path!r}, so that it "
                "is near another best response; continue with the model that the run started from"
            )
        self._copy(state["policy"])
        trainer.optimizer = None
        trainer.create_optimizer()
        trainer.optimizer.load_state_dict(_copied(state["optimizer"]))
        trainer.observed = None
        self._steps, self._ready = state["steps"], state["ready"]
        self._begun = state.get("begun", 0)
        self._trainer_metrics = state.get("trainer_metrics", {})
        # An estimator that trains the policy for a look, and puts it back, has used completions all the same.
        self._completions = max(self._completions, state["completions"])
        seen = state["handed_out"]
        self._handed_out, self._known = None, {}
        if seen is not None:
            self._of_all_ranks = Completions(columns={}, text=[], **seen)
            mine = share(len(seen["context"]))
            seen = {name: value[mine] for name, value in seen.items()}
            columns = repeat_columns(self.prompts, seen["context"].tolist())
            text = decode(self.tokenizer, seen["token_ids"], is_conversation(columns["prompt"][0]))
            self._handed_out = Completions(columns=columns, text=text, **seen)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the policy and its tokenizer to a folder that transformers loads; of an adapter, the adapter.

        In several processes rank 0 writes. Every rank has to call it where FSDP or DeepSpeed hold the policy in parts,
        which are gathered.

        Raises:
            InputError: parts that cannot be gathered.
        """
        parameters = whole_parameters(self._built())
        if is_main():
            self.policy.save_pretrained(path, state_dict=parameters)
            self.tokenizer.save_pretrained(path)

    def _metrics(self, taken: int) -> dict[str, float]:
        metrics = {"follower_steps": float(self._steps), **self.trainer_metrics()}
        if self.schedule.tolerance is not None:
            metrics["response_steps"] = float(taken)
        return metrics

    def _check_whole(self, what: str, *, with_moments: bool = False) -> None:
        """Refuse what needs the whole policy on every process, or its optimizer's moments too."""
        if world_size() == 1:
            return
        trainer = self._built()
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else 0
        if trainer.is_fsdp_enabled or stage == 3 or (with_moments and stage):
            raise InputError(
                f"{type(self).__name__}: expected a policy that is whole on every process for a {what}, got one that "
                f"{'FSDP' if trainer.is_fsdp_enabled else 'DeepSpeed'} shards; use an inside schedule and HPGD with "
                "out=None, and keep the results yourself (docs/scaling.md), or start with recipes/accelerate/ddp.yaml"
            )

    def _check_inside(self, contexts_per_step: int, group_size: int) -> None:
        if contexts_per_step > self.prompts_per_step or group_size != self.group_size:
            raise InputError(
                f"contexts_per_step={contexts_per_step}, group_size={group_size}: inside the training loop the leader "
                f"sees the follower's own batch of {self.prompts_per_step} prompts x {self.group_size} completions; "
                "ask for no more prompts and the same group size, or set inside=False"
            )
        ranks = world_size()
        if contexts_per_step < self.prompts_per_step and (
            self.prompts_per_step % ranks or contexts_per_step % ranks or self._config.gradient_accumulation_steps > 1
        ):
            raise InputError(
                f"contexts_per_step={contexts_per_step}: a part of the follower's batch of {self.prompts_per_step} "
                f"prompts can be shown only where {ranks} processes divide both and gradient_accumulation_steps is 1; "
                "show the whole batch"
            )

    def respond_for(self, leader: Leader, step: int, contexts: Tensor) -> dict[str, float]:
        """See `Follower.respond_for`; a response that was made before the run stopped is not made again."""
        if self._ready == step:
            return self._metrics(0)
        metrics = self.respond(leader, contexts)
        self._ready = step
        return metrics

    def _hand_out(self, step: int) -> None:
        """Keep the newest batch as the follower's response of leader step `step`."""
        seen = self._built().observed
        assert seen is not None
        self._ready, self._handed_out = step, seen
        self._known = {} if self._fixed is None else {self._leader: self._fixed}
        lengths = torch.tensor([len(ids) for ids in seen.token_ids])
        ids = torch.tensor([[*ids, *[0] * (self.max_completion_length - len(ids))] for ids in seen.token_ids])
        context, log_policy, log_prior, lengths, ids = gather_together(
            [seen.context, seen.log_policy, seen.log_prior, lengths, ids]
        )
        token_ids = [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
        self._of_all_ranks = Completions(context, {}, token_ids, [], log_policy, log_prior)

    def _is_ready(self, step: int) -> bool:
        return self._ready == step and self._handed_out is not None

    def _shown(self, contexts_per_step: int) -> Rollouts:
        assert self._handed_out is not None
        rollouts = self._handed_out.rollouts().knowing(self._known)
        shown = contexts_per_step * self.group_size // world_size()
        return rollouts if shown == rollouts.size else rollouts.select(slice(0, shown))

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}

    def _reference_sums(self) -> list[float]:
        """Tells one reference from another: the sums of its parameters and of their sizes."""
        if self._sums is None:
            reference = self._built().reference
            frozen = self.policy.parameters() if reference is None else reference.parameters()
            kept = [p.detach().double() for p in frozen if reference is not None or not p.requires_grad]
            self._sums = [float(sum(p.sum() for p in kept)), float(sum(p.abs().sum() for p in kept))]
        return self._sums

    def _untrained(self) -> dict[str, Tensor]:
        reference = self._built().reference
        return self._initial if reference is None else dict(reference.named_parameters())

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        """Set the trained parameters."""
        for name, parameter in self._trainable().items():
            if name not in values or values[name].shape != parameter.shape:
                raise InputError(
                    f"state: expected a policy with {name} of shape {tuple(parameter.shape)}; it is another's"
                )
            parameter.copy_(values[name])

    def _reward(
        self, completions: list[Any], completion_ids: list[list[int]], context: list[int], **of_trl: Any
    ) -> list[float]:
        assert self._leader is not None  # train() sets it before trl asks
        columns = {**repeat_columns(self.prompts, context), "completion_ids": copied(completion_ids)}
        prompts, completions = columns.pop("prompt"), copied(completions)  # nothing that the leader gets is trl's
        if self._steps == 0 and not any(answer_text(completion).strip() for completion in completions):
            raise InputError(
                f"model {self.model_path!r}: all {len(completions)} completions of the untrained policy are empty, so "
                "that there is nothing to compare; usual causes are prompts that end in the end-of-sequence token, a "
                "tokenizer that adds one, and a chat template that the model was not trained with"
            )
        with torch.no_grad():
            leader, self._fixed = self._leader, self._leader.fixed_scores(prompts, completions, **columns)
            scores = (
                leader.score(prompts, completions, **columns)
                if self._fixed is None
                else leader.score_from(self._fixed, prompts, completions, **columns)
            )
        scores = scores.double().cpu()
        if not torch.isfinite(scores).all():
            i = int((~torch.isfinite(scores)).nonzero()[0])
            raise InputError(f"leader's reward: got {scores[i].item()} for completion {i}: {completions[i]!r}")
        self._scores = scores
        return scores.tolist()

    def _kl_price(self) -> float:
        assert self._leader is not None
        with torch.no_grad():
            return float(temperature_of(self._leader, self))

    def _built(self) -> ObservedTrainer:
        if self._trainer is None:
            this = weakref.proxy(self)  # the trainer must not keep the follower, and its folder, alive

            def reward(**arguments: Any) -> list[float]:
                scores: list[float] = this._reward(**arguments)
                return scores

            rows = self.prompts.select_columns("prompt").add_column(CONTEXT, list(range(len(self.prompts))))
            with loading("model", self.model_path), warnings.catch_warnings():
                # peft sees that GPT-2's layers are transposed, and says that it does
                warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
                trainer = self._make_trainer(
                    model=self.model_path,
                    reward_funcs=reward,
                    args=self._config,
                    train_dataset=rows,
                    processing_class=self.tokenizer,
                    callbacks=[AfterEachStep(lambda step: this._on_step(step))],
                    peft_config=self.peft_config,
                )
            # With trl's own bar switched off, transformers would print a dictionary after every train().
            trainer.remove_callback(PrinterCallback)
            trainer.kl_price = lambda: this._kl_price()
            trainer.columns_of = lambda rows: repeat_columns(this.prompts, rows)
            trainer.evidence = self._evidence
            prepare_observed(trainer)
            self._trainer = trainer
            self._initial = (
                {n: p.detach().clone() for n, p in self._trainable().items()} if trainer.reference is None else {}
            )
        return self._trainer


def _pieces(prompts_per_step: int, group_size: int, settings: Mapping[str, Any]) -> int:
    """In how many pieces a step's batch is trained on, in all processes."""
    pieces: int = world_size() * settings.get("gradient_accumulation_steps", 1)
    if prompts_per_step * group_size % pieces:
        raise InputError(
            f"prompts_per_step={prompts_per_step}: expected a batch of prompts_per_step * group_size completions "
            f"that {world_size()} processes and gradient_accumulation_steps divide, got "
            f"{prompts_per_step * group_size} completions in {pieces} pieces"
        )
    return pieces


def _schedule(schedule: Schedule | None, **short: Any) -> Schedule:
    given = {name: value for name, value in short.items() if value is not None}
    if schedule is None:
        return Schedule(**given)
    if given:
        raise InputError(
            f"schedule: expected either a Schedule or {', '.join(given)}, got both; put them into the Schedule"
        )
    return schedule


def _copied(value: Any) -> Any:
    """Tensors copied to the CPU, wherever they are nested."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value
