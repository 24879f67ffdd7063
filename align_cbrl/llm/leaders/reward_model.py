"""A reward model whose own parameters the leader learns: its head, an adapter, or all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from align_cbrl.checks import Positive, checked
from align_cbrl.errors import InputError, first_line
from align_cbrl.llm.leaders.calibration import deviation_within_prompts
from align_cbrl.llm.leaders.correction import Correction
from align_cbrl.llm.leaders.lora import Adapter, LoRA
from align_cbrl.llm.reward_models import RewardModel
from align_cbrl.llm.sampling import batches
from align_cbrl.llm.scoring import ScoreFunction, score_arguments
from align_cbrl.rollouts import Rollouts
from align_cbrl.runs.config import nearest

Trainable = Literal["head", "lora", "all"]
"""Which of a reward model's parameters are the leader's; see `RewardModelLeader`."""


_LARGEST_EXPANSION = 2**27
"""Numbers of a batch's expansion, one for each path and trained parameter; half a gigabyte."""


@checked
class RewardModelLeader(Correction):
    """A reward model whose own parameters are x: r_x = strength * (RM_x(prompt, completion) - shift) / scale.

    - "head": the last layer.
    - "lora": a low-rank adapter on the body, through peft; the head stays.
    - "all": every parameter.

    Dropout is off whatever `train()` says: the reward is a function. Memory of a leader step is bounded by the
    estimator's `chunks`, and by gradient checkpointing, which recomputes layers instead of keeping their activations.

    `save_pretrained` keeps where the budget is measured from. The head's start is stored. An adapter is stored beside
    the reward model it started from, not merged: merging would round in half precision, and forget the start. Of
    "all" only the name of the folder or hub id it came from is kept; it is read when `project` is first called, since
    a reward that is only used needs no start.

    Args:
        model: the reward model to start from.
        trainable: "head", "lora" or "all".
        strength: reward per standard deviation of the starting model's scores within a prompt.
        budget: the largest relative change, ||x - x_0|| <= budget * ||x_0||; for an adapter, of the weights that it
            changes, scaling * ||B A|| <= budget * ||W_0||, over all adapted matrices. None: no bound but what the
            objective charges for divergence (`KLPriced`) and the length of a step.
        lora: the adapter's size and place; only with "lora".
        gradient_checkpointing: trade time for memory in the backward pass; not with "head", which keeps nothing.

    Raises:
        InputError: another value of `trainable`, options that do not belong to it, a budget or strength that is not
            positive, or an adapter that does not fit the model.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        model: RewardModel,
        trainable: Trainable = "head",
        strength: Positive = 1.0,
        budget: Positive | None = 1.0,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("strength", strength), ("budget", 1.0 if budget is None else budget)):
            if not (0 < value < float("inf")):
                raise InputError(f"RewardModelLeader.{name}: expected a positive number, got {value}")
        if trainable not in get_args(Trainable):
            raise InputError(
                f"RewardModelLeader.trainable: got {trainable!r}; {nearest(str(trainable), get_args(Trainable))}"
            )
        if lora is not None and trainable != "lora":
            raise InputError(f"RewardModelLeader.lora: belongs to trainable='lora', got trainable={trainable!r}")
        if gradient_checkpointing and trainable == "head":
            raise InputError(
                "RewardModelLeader.gradient_checkpointing: saves nothing with trainable='head', which keeps no "
                "activations of the body; leave it out"
            )
        self.reward_model = model
        self.network = model.model  # registers the parameters
        self.trainable, self.strength, self.budget = trainable, strength, budget
        self.gradient_checkpointing = gradient_checkpointing
        self.lora = LoRA() if trainable == "lora" and lora is None else lora
        self.adapter: Adapter | None = None
        self.register_buffer("shift", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self._origin = _Origin()
        if self.lora is not None:
            self.adapter = Adapter(model, self.lora)
        else:
            self.network.requires_grad_(trainable == "all")
            if trainable == "head":
                model.head.requires_grad_(True)
            self._origin.keep(self._moving())
        folder = Path(model.path)
        self._origin_path = str(folder.resolve()) if folder.is_dir() else model.path
        self._origin_norm = self._origin.norm()
        if gradient_checkpointing:
            # Called gradient_checkpointing_enable by earlier versions of transformers 5.
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
            getattr(self.network, new if hasattr(self.network, new) else old)({"use_reentrant": False})
        self.train(self.training)

    def train(self, mode: bool = True) -> RewardModelLeader:
        """Dropout stays off; layers count as training only where that is what turns checkpointing on."""
        super().train(mode)
        self.network.eval()
        if self.gradient_checkpointing:
            for module in self.network.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
        return self

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x [B]."""
        return self._standardised(self.reward_model.score(prompts, completions))

    def fixed_scores(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor | None:
        """What a linear head reads, where it is all that moves, [B, H]: the body is then run once per completion.

        It is found as the derivative of the score with respect to the head's weights, whatever the architecture does
        between the body and the head.
        """
        head = self._linear_head()
        if head is None:
            return None
        found = []
        for piece in batches(len(completions), self.reward_model.batch_size):
            with torch.enable_grad():
                scores = self.reward_model.score(prompts[piece], completions[piece])  # [b]
            each = torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
            (read,) = torch.autograd.grad(scores, [head.weight], each, is_grads_batched=True)  # [b, 1, H]
            found.append(read[:, 0])
        return torch.cat(found)

    def first_order(self, rollouts: Rollouts) -> Tensor | None:
        """See `Leader.first_order`: of an adapter, [B, 2 + n], at the place of x, which comes first.

        None for other leaders, where something besides the adapter trains, with gradient checkpointing, and where it
        would take more than half a gigabyte.
        """
        trained = self._trained()
        size = rollouts.size * sum(p.numel() for p in trained)
        if self.adapter is None or self.gradient_checkpointing or size > _LARGEST_EXPANSION:
            return None
        arguments, found = score_arguments(rollouts), []
        prompts, completions = arguments["prompts"], arguments["completions"]
        for piece in batches(len(completions), self.reward_model.batch_size):
            here = self.adapter.path_gradients(partial(self.score, prompts[piece], completions[piece]), trained)
            if here is None:
                return None
            scores, gradients = here
            place = scores.new_full((len(scores), 1), _place(trained))
            found.append(torch.cat([place, scores[:, None], gradients], dim=1))
        return torch.cat(found)

    def score_from(self, fixed: Tensor, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x [B], given what the head reads; of an adapter, given the expansion at the present x."""
        if self.adapter is not None:
            trained = self._trained()
            if bool((fixed[:, 0] != _place(trained)).any()):
                raise AssertionError("an expansion of the reward was used after the parameters had moved")
            x = torch.cat([p.flatten() for p in trained]).to(fixed)
            return fixed[:, 1] + fixed[:, 2:] @ (x - x.detach())
        head = self._linear_head()
        assert head is not None  # or there would be nothing fixed
        return self._standardised(nn.functional.linear(fixed.to(head.weight), head.weight, head.bias)[:, 0])

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def deviation(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x - r_{x_0} [B], the change of the reward since the start; it costs one forward pass more than `score`."""
        with torch.no_grad():
            start = self.reward_model.score(prompts, completions, self._start())
        return self.strength * (self.reward_model.score(prompts, completions) - start) / self.scale

    @torch.no_grad()
    def calibrate(self, rollouts: Rollouts) -> None:
        """Standardise by the starting model's scores: mean zero, mean variance within a prompt's group one.

        Raises:
            InputError: no prompt has two completions, or the model scores all completions of each prompt alike.
        """
        arguments = score_arguments(rollouts)
        scores = self.reward_model.score(arguments["prompts"], arguments["completions"]).double()
        self.scale.fill_(deviation_within_prompts(f"reward model {self.reward_model.path!r}", scores, rollouts))
        self.shift.copy_(scores.mean())

    @torch.no_grad()
    def change(self) -> float:
        """How far the parameters are from where they started, relative to that; the budget bounds it."""
        if self.adapter is not None:
            changed, start = self.adapter.change()
            return float(changed / start)
        start_tensors = self._start()
        moved = torch.stack([(p - start_tensors[name]).norm() for name, p in self._moving().items()]).norm()
        return float(moved / self._origin.norm())

    @torch.no_grad()
    def project(self) -> None:
        """Pull the parameters back to within the budget of where they started, if there is one.

        Raises:
            InputError: a loaded leader of "all" whose starting model is no longer where it was.
        """
        if self.budget is not None and (change := self.change()) > self.budget:
            self.shrink(self.budget / change)

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Scale the change from the start by `factor` in [0, 1]; of an adapter, the matrices B."""
        if self.adapter is not None:
            for up in self.adapter.ups().values():
                up.mul_(factor)
            return
        start = self._start()
        for name, p in self._moving().items():
            p.copy_(start[name] + (p - start[name]) * factor)

    def check_correction_of(self, frozen: ScoreFunction) -> None:
        """Raise `InputError` where all parameters are trained, or `frozen` is the model that this leader trains."""
        if self.trainable == "all":
            raise InputError(
                "Shaped.correction: a reward model all of whose parameters move is no small correction; use "
                "trainable='head' or 'lora', or a RewardModelLeader alone"
            )
        if self.reward_model is frozen:
            raise InputError(
                "Shaped.frozen: the correction trains this very model, so it would not be frozen; load it twice, "
                "RewardModel(path) for each"
            )

    def describe(self) -> dict[str, Any]:
        """What trains, how many parameters, and the strength."""
        count = sum(p.numel() for p in self.parameters() if p.requires_grad)
        values: dict[str, Any] = {"trainable": self.trainable, "trained parameters": count, "strength": self.strength}
        if self.lora is not None:
            values |= {"LoRA rank": self.lora.rank, "LoRA alpha": self.lora.alpha}
        return values

    def record(self, path: Path) -> dict[str, Any]:
        """The reward model, its standardisation, and the parameters from which the budget is measured."""
        record: dict[str, Any] = {
            "trainable": self.trainable,
            "strength": self.strength,
            "budget": self.budget,
            "gradient_checkpointing": self.gradient_checkpointing,
            "batch_size": self.reward_model.batch_size,
            "max_length": self.reward_model.max_length,
            "shift": self.shift.item(),
            "scale": self.scale.item(),
        }
        if self.adapter is not None and self.lora is not None:
            self.reward_model.save_pretrained(path / "model", self.adapter.base_weights())
            self.adapter.save(path / "adapter")
            record["lora"] = {
                "rank": self.lora.rank,
                "alpha": self.lora.alpha,
                "target_modules": self.lora.target_modules,
            }
        else:
            self.reward_model.save_pretrained(path / "model")
            if self.trainable == "head":
                start = {name: value.contiguous().cpu() for name, value in self._start().items()}
                safetensors.torch.save_file(start, path / "start.safetensors")
            else:
                record |= {"start": self._origin_path, "start_norm": self._origin_norm}
        return record

    @classmethod
    def from_record(cls, path: Path, record: Mapping[str, Any]) -> RewardModelLeader:
        """See `LanguageLeader.from_record`."""
        sizes = {name: record[name] for name in ("batch_size", "max_length") if name in record}
        model = RewardModel(path / "model", **sizes)
        lora = record.get("lora")
        if lora is not None:
            targets = lora["target_modules"]
            lora = LoRA(lora["rank"], lora["alpha"], None if targets is None else tuple(targets))
        leader = cls(
            model,
            record["trainable"],
            record["strength"],
            record["budget"],
            lora,
            record.get("gradient_checkpointing", False),
        )
        leader.shift.fill_(record["shift"])
        leader.scale.fill_(record["scale"])
        if leader.adapter is not None:
            leader.adapter.load(path / "adapter")
        elif (file := path / "start.safetensors").is_file() and leader.trainable == "head":
            leader._origin.keep(safetensors.torch.load_file(file))
        elif "start" in record:
            leader._origin.forget()
            leader._origin_path, leader._origin_norm = record["start"], record["start_norm"]
        return leader

    def _standardised(self, score: Tensor) -> Tensor:
        return self.strength * (score - self.shift) / self.scale

    def _linear_head(self) -> nn.Linear | None:
        """The head where it alone is trained and is one linear layer."""
        head = self.reward_model.head if self.trainable == "head" else None
        return head if isinstance(head, nn.Linear) else None

    def _moving(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def _start(self) -> dict[str, Tensor]:
        """The parameters x_0, by their names in the network."""
        if self.adapter is not None:
            return {name: torch.zeros_like(up) for name, up in self.adapter.ups().items()}
        if not self._origin.known:
            self._origin.keep(self._read_origin())
        return self._origin.tensors()

    def _read_origin(self) -> dict[str, Tensor]:
        """All parameters of the model that a loaded leader of "all" started from."""
        advice = "put it back, or write its new place as 'start' into reward.json"
        try:
            model = RewardModel(self._origin_path).model
        except InputError as error:
            raise InputError(
                f"RewardModelLeader: its budget is measured from {self._origin_path!r}, which does not load; {advice} "
                f"({first_line(error)})"
            ) from error
        start = dict(model.named_parameters())
        own = self._moving()
        if start.keys() != own.keys() or any(start[name].shape != p.shape for name, p in own.items()):
            raise InputError(f"RewardModelLeader: {self._origin_path!r} is another architecture; {advice}")
        norm = float(torch.stack([p.detach().norm() for p in start.values()]).norm())
        if abs(norm - self._origin_norm) > 1e-4 * self._origin_norm:
            raise InputError(
                f"RewardModelLeader: {self._origin_path!r} is not the model it started from, whose parameters had the "
                f"norm {self._origin_norm:.6g}, not {norm:.6g}; {advice}"
            )
        return {name: p.to(own[name]) for name, p in start.items()}


class _Origin(nn.Module):
    """Tensors that move between devices with the leader and are in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self._names: list[str] = []

    @property
    def known(self) -> bool:
        return bool(self._names)

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        self._names = list(tensors)
        for i, tensor in enumerate(tensors.values()):
            self.register_buffer(f"start_{i}", tensor.detach().clone(), persistent=False)

    def forget(self) -> None:
        for i in range(len(self._names)):
            delattr(self, f"start_{i}")
        self._names = []

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"start_{i}") for i, name in enumerate(self._names)}

    def norm(self) -> float:
        if not self._names:
            return 0.0
        return float(torch.stack([tensor.norm() for tensor in self.tensors().values()]).norm())


def _place(parameters: Sequence[nn.Parameter]) -> int:
    """A number that changes whenever x does, and that single precision holds."""
    return sum(p._version for p in parameters) % 2**24
