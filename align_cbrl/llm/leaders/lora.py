"""Low-rank adapters in a reward model (Hu et al. 2021, arXiv 2106.09685), through peft."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from align_cbrl.checks import Count, Positive, checked
from align_cbrl.errors import InputError, first_line
from align_cbrl.llm.reward_models import HEADS, RewardModel, import_peft
from align_cbrl.runs.config import nearest

_ADAPTER = "default"
_PREFIX = "base_model.model."  # what PeftModel puts before the names of an adapter's tensors in a file


@checked
@dataclasses.dataclass(frozen=True)
class LoRA:
    """The size and place of an adapter: W_0 becomes W_0 + (alpha / rank) B A, with B zero at the start.

    Attributes:
        rank: of B A.
        alpha: the scale's numerator.
        target_modules: names of the adapted layers, such as ("q_proj", "v_proj"); None: every linear layer but the
            head, whatever the architecture calls them.

    Raises:
        InputError: a rank below 1, an alpha that is not positive, or a target that is the head or lm_head.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.target_modules is not None and not self.target_modules:
            raise InputError("lora.target_modules: expected at least one name, or null for every linear layer")
        for target in self.target_modules or ():
            if target.split(".")[-1] == "lm_head":
                raise InputError(
                    "lora.target_modules: a reward model has no lm_head, that is a language model's; name layers of "
                    "its body, such as q_proj"
                )
            if target.split(".")[-1] in HEADS:
                raise InputError(
                    f"lora.target_modules: {target!r} is the score head, a single row, of which a low-rank change is "
                    "any change; use trainable='head' to train it"
                )


class Adapter:
    """An adapter put into a reward model's body in place; its A and B are the only parameters that train.

    Args:
        model: the reward model.
        lora: where and how large.

    Raises:
        InputError: peft is not installed, a target does not exist in this model, or is not a linear layer.
    """

    def __init__(self, model: RewardModel, lora: LoRA) -> None:
        self._peft = peft = import_peft()
        network, self._model = model.model, model
        if any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in network.modules()):
            raise InputError(f"reward model {model.path!r}: holds an adapter already; load it anew from its folder")
        _check_targets(model, lora)
        network.requires_grad_(False)
        self.config = peft.LoraConfig(
            task_type="SEQ_CLS",  # by which peft leaves the head out of "all-linear"
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules="all-linear" if lora.target_modules is None else list(lora.target_modules),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in network.modules()),  # GPT-2
            bias="none",
            base_model_name_or_path="../model",
        )
        try:
            peft.inject_adapter_in_model(self.config, network, adapter_name=_ADAPTER)
        except ValueError as error:
            raise InputError(f"reward model {model.path!r}: peft refuses the adapter: {first_line(error)}") from error
        self.layers: dict[str, nn.Module] = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer) and _ADAPTER in module.lora_A
        }

    def change(self) -> tuple[Tensor, Tensor]:
        """Norms of the weights' change, scaling ||B A||, and of what is adapted, ||W_0||, over all adapted layers.

        B is zero at the start and A is not, so a relative change of A and B themselves would say nothing. Costs
        products of rank x rank only: ||B A||^2 = sum((B'B) o (A A')).
        """
        changed, start = [], []
        for layer in self.layers.values():
            down, up = self._factors(layer)
            square = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
            changed.append(square.sqrt() * layer.scaling[_ADAPTER])  # type: ignore[index]  # peft is not typed
            start.append(layer.base_layer.weight.norm())  # type: ignore[union-attr, operator]  # as above
        return torch.stack(changed).norm(), torch.stack(start).norm()

    def path_gradients(
        self, score: Callable[[], Tensor], parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, Tensor] | None:
        """Scores, and the gradient of each with respect to some A and B, from one forward and one backward pass.

        A and B are applied to every token apart, so that a path's gradient is a product of what a matrix read of its
        tokens and of the derivative of its own score by what the matrix said.

        Args:
            score: makes b scores, each of a path of its own.
            parameters: those that train.

        Returns:
            [b], and [b, n] in the order of `parameters`; None where one of them is neither A nor B, or an adapted layer
            does not see the paths along its first axis, such as an expert that gets some of their tokens.
        """
        seen: list[tuple[Any, Tensor, Tensor]] = []

        def keep(factor: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((factor, arguments[0].detach(), output))

        layers: Iterable[Any] = self.layers.values()  # peft is not typed
        factors = [factor for layer in layers for factor in (layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER])]
        if not {*parameters} <= {factor.weight for factor in factors}:
            return None
        hooks = [factor.register_forward_hook(keep) for factor in factors]
        try:
            with torch.enable_grad():
                scores = score()
        finally:
            for hook in hooks:
                hook.remove()
        if any(read.ndim != 3 or len(read) != len(scores) for _, read, _ in seen):
            return None
        slopes = torch.autograd.grad(scores.sum(), [said for _, _, said in seen], allow_unused=True)
        found = {f.weight: scores.new_zeros(len(scores), *f.weight.shape) for f in factors}
        for (factor, read, _), slope in zip(seen, slopes, strict=True):
            if slope is not None:
                found[factor.weight] += (slope.transpose(1, 2) @ read.to(slope)).to(scores)  # [b, out, T] [b, T, in]
        return scores.detach(), torch.cat([found[p].flatten(1) for p in parameters], dim=1)

    def ups(self) -> dict[str, nn.Parameter]:
        """The matrices B, by their names in the model: with all of them zero the model is its base."""
        return {f"{name}.lora_B.{_ADAPTER}.weight": self._factors(layer)[1] for name, layer in self.layers.items()}

    def base_weights(self) -> dict[str, Tensor]:
        """The state of the model without the adapter, under the names it had."""
        state = self._model.model.state_dict()
        return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}

    def save(self, path: Path) -> None:
        """Write the adapter to a folder that `peft.PeftModel.from_pretrained` loads onto the base in `../model`."""
        # Without the task type: peft would look for a trained head in the file of a classifier.
        dataclasses.replace(self.config, task_type=None).save_pretrained(path)
        tensors = {f"{_PREFIX}{name}": value.contiguous().cpu() for name, value in self._state().items()}
        safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")

    def load(self, path: Path) -> None:
        """Read what `save` wrote. Raises InputError when it is missing or does not fit."""
        file = path / "adapter_model.safetensors"
        if not file.is_file():
            raise InputError(f"load_leader: the adapter's weights are missing, expected {file}")
        saved = {name.removeprefix(_PREFIX): value for name, value in safetensors.torch.load_file(file).items()}
        own = self._state()
        # Checked here, since peft leaves a tensor that the file lacks at its random start.
        if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
            raise InputError(f"load_leader: {file} does not fit the reward model beside it; save the leader again")
        self._peft.set_peft_model_state_dict(self._model.model, saved, adapter_name=_ADAPTER)

    def _state(self) -> dict[str, Tensor]:
        """A and B, by the names that peft gives them; nothing of the base."""
        # "auto" in place of False would look for the base's configuration on the hub.
        state: dict[str, Tensor] = self._peft.get_peft_model_state_dict(
            self._model.model, adapter_name=_ADAPTER, save_embedding_layers=False
        )
        return state

    @staticmethod
    def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
        return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


def _check_targets(model: RewardModel, lora: LoRA) -> None:
    modules = dict(model.model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))}
    body = {name.split(".")[-1] for name in linear if name.split(".")[0] not in HEADS}
    for target in lora.target_modules or ():
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not found:
            raise InputError(f"lora.target_modules: {model.path!r} has no layer {target!r}; {nearest(target, body)}")
        if other := sorted(set(found) - linear):
            raise InputError(f"lora.target_modules: {other[0]!r} is no linear layer; {nearest(target, body)}")
        if heads := [name for name in found if name.split(".")[0] in HEADS]:
            raise InputError(
                f"lora.target_modules: {target!r} also names {heads[0]!r} in the score head; use trainable='head' to "
                "train that"
            )
