"""`LeaderCallback`: a leader in somebody's own trl script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from align_cbrl.checks import Count, checked
from align_cbrl.errors import InputError
from align_cbrl.hpgd import HPGDConfig
from align_cbrl.llm.followers.stepwise import StepwiseHPGD
from align_cbrl.llm.followers.trainer_batch import Reference, trainer_rollouts
from align_cbrl.llm.followers.trainer_response import TrainerPolicy, TrainerResponse, response_of
from align_cbrl.llm.leaders.base import LanguageLeader
from align_cbrl.llm.leaders.mixture import RewardMixture
from align_cbrl.objectives.observations import LogRatio
from align_cbrl.problem import Objective, Problem
from align_cbrl.rollouts import Rollouts

FOLDER = "leader"
"""Of the leader's state, in each of the trainer's checkpoints."""

_UNSHOWN = ("step", "follower_seconds", "leader_share")
"""Of a leader step's metrics, what trl's logs have no use for."""

_STEP = 0.1  # of the weights' budget, the length of a step of Adam's in each of them


@checked
class LeaderCallback(TrainerCallback):
    """Has a leader learn inside a trl script: trl's `GRPOTrainer` or `RLOOTrainer`, as they are.

    The trainer is given the leader's reward function, through which the leader sees every batch, and this callback,
    which takes a leader step on the newest batch every few optimizer steps (docs/trl_script.md)::

        leader = RewardMixture({"correct": correct, "brevity": brevity}, {"correct": 1.0})
        callback = LeaderCallback(leader, ExpectedUtility(Judge(judge)), every=5)
        trainer = GRPOTrainer(model, reward_funcs=leader.reward_function(), callbacks=[callback], ...)

    Through what the leader's gradient goes is read off the trainer's settings (`response_of`) and said in one line when
    training starts: the best response at temperature beta, or, as with GRPO's defaults, the trainer's next step. What
    the leader learns goes into trl's own logs under `leader/`, one optimizer step later, and into `history`. It is
    saved with the trainer's checkpoints, in their folder `leader`, and restored when the trainer resumes.

    Cost of a leader step: the objective's (a judge is asked about the batch), and a backward pass of the leader. Where
    the objective has the log-ratio to the reference (`KLPriced`), or there is a best response whose distance is
    measured, also a forward pass of the batch through policy and reference, and in memory a frozen copy of the policy;
    with an adapter (peft) the reference is the policy without it, and needs none.

    Args:
        leader: its reward function has to be the trainer's only one. A `RewardMixture` that was not calibrated is
            `rescaled` on the first batch it steps on, which leaves the reward as it is.
        objective: what the leader wants.
        every: optimizer steps between leader steps; no fewer than trl trains on one batch for.
        optimizer: of the leader's parameters, with `maximize=True`; Adam for the weights of a mixture, unless `config`
            asks for natural steps, which there are around a best response only.
        config: of the leader's steps; `steps`, `contexts_per_step`, `group_size` and `checkpoint_every` are the
            trainer's business.
        reference: hub id or folder of the reference policy; None: the policy that the trainer is given.

    Attributes:
        history: a row of metrics for each leader step, see `HPGD`.

    Raises:
        InputError: a leader without trainable parameters, or one that sets the follower's temperature; no optimizer for
            a leader that is no mixture. When training starts: settings that `response_of` refuses, `reward_weights`,
            fewer steps between leader steps than a batch is trained on for, replays or natural steps without a best
            response, or a resumed run without the leader's state. In training: a trainer that was not given the
            leader's reward function, or others beside it.

    Example:
        >>> from align_cbrl import ExpectedUtility
        >>> from align_cbrl.llm import Judge
        >>> leader = RewardMixture({"short": lambda completions: [-float(len(text)) for text in completions]})
        >>> judge = Judge(lambda completions: [float("yes" in text) for text in completions])
        >>> LeaderCallback(leader, ExpectedUtility(judge), every=5).history
        []
    """

    def __init__(
        self,
        leader: LanguageLeader,
        objective: Objective,
        *,
        every: Count = 1,
        optimizer: torch.optim.Optimizer | None = None,
        config: HPGDConfig | None = None,
        reference: str | Path | None = None,
    ) -> None:
        Problem(leader, objective, TrainerPolicy(1.0))  # what it refuses is best known here
        if leader.follower_temperature() is not None:
            raise InputError(
                f"leader: {type(leader).__name__} sets the follower's temperature, and a trl trainer keeps its beta; "
                "use RLOOFollower with HPGD for it"
            )
        self.leader, self.objective, self.every = leader, objective, every
        self.config = HPGDConfig() if config is None else config
        self.optimizer = _adam(leader) if optimizer is None and self.config.natural is None else optimizer
        self._reference = Reference(reference)
        self._loop: StepwiseHPGD | None = None
        self._response: TrainerResponse | None = None
        self._args: Any = None
        self._policy: Any = None  # in an optimizer step, from its beginning to its end
        self._tokenizer: Any = None
        self._optimizer_step = 0
        self._batch: Rollouts | None = None
        self._seen = False
        self._shown: dict[str, float] = {}
        leader.watched_by(self)

    @property
    def history(self) -> list[dict[str, float]]:
        """A row of metrics for each leader step."""
        return [] if self._loop is None else self._loop.history

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """The trainer has been made: the policy is still the one that training starts from."""
        self._configure(args)
        if self._needs_log_probs:
            self._reference.freeze(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the settings, restore a resumed run, and say what the leader's gradient goes through."""
        self._configure(args)
        assert self._response is not None
        if self._needs_log_probs and not self._reference.is_there:
            if state.global_step:
                raise InputError(
                    "LeaderCallback: expected it among the trainer's callbacks=[...] from the start, got it added to "
                    "one that resumes, when the policy that training started from is gone; or name reference=..."
                )
            self._reference.freeze(model)
        if self._loop is None:
            problem = Problem(self.leader, self.objective, TrainerPolicy(self._response.temperature))
            self._loop = StepwiseHPGD(problem, self.optimizer, self._response.estimator, self.config)
        folder = _folder(args, state) if state.global_step else None
        if folder is not None and not folder.is_dir():
            raise InputError(
                f"resume: expected the leader's state in {folder}, since the trainer resumes at step "
                f"{state.global_step}; without it the leader would start anew. Resume from a checkpoint in output_dir "
                "that was saved with this callback"
            )
        self._loop.begin(folder)
        self._seen, self._batch = False, None
        if state.is_world_process_zero:
            steps = "every optimizer step" if self.every == 1 else f"every {self.every} optimizer steps"
            tqdm.write(f"LeaderCallback: {steps}, through {self._response.words}")

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """From here on, what the reward function scores is a batch to be trained on."""
        self._policy, self._tokenizer, self._optimizer_step = model, processing_class, state.global_step + 1

    def saw(
        self,
        leader: LanguageLeader,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Any],
        fixed: Tensor | None,
    ) -> None:
        """Called by the leader's reward function with what it has scored; see `LanguageLeader.watched_by`."""
        if self._policy is None or leader is not self.leader:  # an evaluation, or no training at all
            return
        self._seen = True
        for name, value in self._shown.items():
            columns["log_metric"](name, value)
        due = -(-self._optimizer_step // self.every) * self.every
        if due >= self._optimizer_step + math.ceil(self._trained_on_for):
            return  # a newer one will be there by then
        log_probs = None
        if self._needs_log_probs:
            ids = columns["completion_ids"]
            log_probs = self._reference.log_probs(self._policy, self._tokenizer, prompts, ids, self._args)
        rollouts = trainer_rollouts(prompts, completions, columns, self._args.num_generations, log_probs)
        self._batch = rollouts if fixed is None else rollouts.knowing({leader: fixed})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take a leader step on the newest batch, where one is due."""
        self._policy = None
        if not self._seen:
            raise InputError(
                f"reward_funcs: the {type(self.leader).__name__} was asked about no completion of the first optimizer "
                "step; give the trainer reward_funcs=leader.reward_function(), of the leader that LeaderCallback has"
            )
        if state.global_step % self.every or self._batch is None:
            return
        assert self._loop is not None
        batch, self._batch = self._batch, None
        row = self._loop.take(batch)
        self._shown = {f"{FOLDER}/{name}": value for name, value in row.items() if name not in _UNSHOWN}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """See whether trl sums the leader's reward with others."""
        own, found = type(self.leader).__name__, [name.split("/") for name in logs or {}]
        others = {parts[1] for parts in found if len(parts) == 3 and parts[0] == "rewards"} - {own}
        if others:
            raise InputError(
                f"reward_funcs: expected the leader's reward function alone, got {sorted(others)} beside it, whose "
                "rewards it does not know; put them into the leader: RewardMixture.of(reward_funcs, reward_weights)"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the leader, its optimizer and what the objective keeps, beside the policy."""
        assert self._loop is not None
        self._loop.save(_folder(args, state))

    @property
    def _needs_log_probs(self) -> bool:
        assert self._response is not None
        return self._response.is_best or self._has_log_ratio

    @property
    def _has_log_ratio(self) -> bool:
        return any(isinstance(observation, LogRatio) for observation in self.objective.observations())

    @property
    def _trained_on_for(self) -> float:
        """Optimizer steps that trl takes on one batch of completions."""
        args = self._args
        return float(args.num_iterations * args.steps_per_generation / args.gradient_accumulation_steps)

    def _configure(self, args: Any) -> None:
        self._args, self._response = args, response_of(args)
        if getattr(args, "reward_weights", None) is not None:
            raise InputError(
                f"reward_weights={args.reward_weights}: expected None, since the leader weighs its terms itself; start "
                "it there: RewardMixture.of(reward_funcs, reward_weights)"
            )
        if self._trained_on_for > self.every:
            raise InputError(
                f"every={self.every}: expected at least {math.ceil(self._trained_on_for)}, since trl trains for "
                f"{self._trained_on_for:g} optimizer steps on a batch (num_iterations={args.num_iterations}, "
                f"steps_per_generation={args.steps_per_generation}, gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps}), and the leader would step twice on the same completions"
            )
        if self._has_log_ratio and self._response.sampling is not None:
            raise InputError(
                f"KLPriced: expected completions that are samples of the policy itself, but {self._response.sampling}; "
                "the price would be for another policy: set temperature=1, top_p=1, top_k=0 and no min_p, "
                "repetition_penalty or generation_kwargs"
            )
        self._response.check(self.config)


def _adam(leader: LanguageLeader) -> torch.optim.Optimizer:
    if not isinstance(leader, RewardMixture):
        raise InputError(
            f"optimizer: expected one for a {type(leader).__name__}, whose parameters have a scale of their own, such "
            "as torch.optim.Adam(leader.parameters(), lr=1e-3, maximize=True)"
        )
    return torch.optim.Adam(leader.parameters(), lr=_STEP * leader.budget, maximize=True)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / FOLDER
