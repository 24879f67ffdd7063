"""Leaders that shape the rewards of language models: r_x(prompt, completion)."""

from __future__ import annotations

import abc
import importlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align_cbrl.errors import InputError
from align_cbrl.imports import load_object
from align_cbrl.llm.completions import score_arguments
from align_cbrl.llm.judges import ScoreFunction, call_score_function, check_scores
from align_cbrl.llm.reward_models import RewardModel
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts


class LanguageLeader(Leader):
    """A leader whose reward is a function of prompt and completion."""

    @abc.abstractmethod
    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x of B completions: [B], differentiable in x."""

    @abc.abstractmethod
    def save_pretrained(self, path: str | Path) -> None:
        """Write the reward to a folder that `load_reward` turns into a reward function."""

    def reward(self, rollouts: Rollouts) -> Tensor:
        """r_x [B, 1]."""
        return self.score(**score_arguments(rollouts))[:, None]

    def reward_function(self) -> Callable[..., list[float]]:
        """The present reward as a trl reward function; it follows the leader as its parameters move."""

        def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
            with torch.no_grad():
                scores: list[float] = self.score(prompts, completions, **columns).tolist()
            return scores

        reward.__name__ = type(self).__name__
        return reward


class RewardMixture(LanguageLeader):
    """A weighted sum of reward functions, x being the weights: r_x = sum_k x_k (f_k - shift_k) / scale_k.

    Each term is standardised once, by `calibrate`, so that weights compare. The weights live in an ellipsoid, those
    whose reward spreads by at most `budget` among one prompt's reference completions: the leader chooses what to
    reward, the budget how much reward there is, and with the temperature how far the follower may leave its reference.

    Args:
        terms: reward functions by name, called as f(prompts=..., completions=..., **columns); reward models too.
        weights: where x starts, by name; missing names start at zero.
        budget: largest standard deviation of r_x within a prompt of the calibrating rollouts; the largest norm of the
            weights before calibration.

    Attributes:
        weight: the parameter x, float64 [K], in the order of `terms`.

    Raises:
        InputError: no terms, a weight for an unknown term, a start outside the budget, or a budget that is not
            positive.

    Example:
        >>> def short(prompts, completions, **columns):
        ...     return [-float(len(c)) for c in completions]
        >>> mixture = RewardMixture({"short": short}, {"short": 1.0}, budget=2.0)
        >>> mixture.score(["a", "a"], ["b", "bcd"]).tolist()
        [-1.0, -3.0]
    """

    shift: Tensor
    scale: Tensor
    correlation: Tensor

    def __init__(
        self, terms: Mapping[str, ScoreFunction], weights: Mapping[str, float] | None = None, budget: float = 1.0
    ) -> None:
        super().__init__()
        if not terms:
            raise InputError("RewardMixture.terms: expected at least one reward function, got none")
        if not (0 < budget < float("inf")):
            raise InputError(f"RewardMixture.budget: expected a positive number, got {budget}")
        self.terms = dict(terms)
        weights = {next(iter(terms)): budget} if weights is None else dict(weights)
        if unknown := sorted(set(weights) - set(terms)):
            raise InputError(f"RewardMixture.weights: no terms named {unknown}; the terms are {list(terms)}")
        self.budget = budget
        start = torch.tensor([float(weights.get(name, 0.0)) for name in terms], dtype=torch.float64)
        if start.norm() > budget * (1 + 1e-9):
            raise InputError(f"RewardMixture.weights: their norm {start.norm():.4g} exceeds the budget {budget:.4g}")
        self.weight = nn.Parameter(start)
        self.register_buffer("shift", torch.zeros(len(terms), dtype=torch.float64))
        self.register_buffer("scale", torch.ones(len(terms), dtype=torch.float64))
        self.register_buffer("correlation", torch.eye(len(terms), dtype=torch.float64))

    def features(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """The standardised terms, float64 [B, K], without gradients."""
        arguments = {"prompts": prompts, "completions": completions, **columns}
        scores = [
            check_scores(name, call_score_function(term, arguments), len(completions))
            for name, term in self.terms.items()
        ]
        return (torch.stack(scores, dim=1) - self.shift) / self.scale

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x [B]. Raises InputError when a term returns None, the wrong length, or NaN."""
        return self.features(prompts, completions, **columns) @ self.weight

    @torch.no_grad()
    def calibrate(self, rollouts: Rollouts) -> None:
        """Standardise every term on these rollouts: mean zero, and mean variance within a prompt's group one.

        The variance is taken within groups since only differences between completions of one prompt move a policy.
        A term that never varies there keeps scale one. The terms' correlations within groups shape the budget.
        """
        self.shift.zero_()
        self.scale.fill_(1.0)
        features = self.features(**score_arguments(rollouts))  # [B, K]
        _, place, sizes = torch.unique(rollouts.group[:, 0], return_inverse=True, return_counts=True)
        mean = torch.zeros(len(sizes), features.shape[1], dtype=features.dtype).index_add(0, place, features)
        within = features - (mean / sizes[:, None])[place]
        deviation = (within.pow(2).sum(0) / (len(within) - len(sizes))).sqrt()
        self.shift.copy_(features.mean(0))
        self.scale.copy_(torch.where(deviation > 1e-8, deviation, torch.ones_like(deviation)))
        scaled = within / self.scale
        self.correlation.copy_(scaled.T @ scaled / (len(within) - len(sizes)))

    @torch.no_grad()
    def spread(self) -> float:
        """Standard deviation of r_x within a prompt of the calibrating rollouts (the weights' norm before that)."""
        return float((self.weight @ self.correlation @ self.weight).clamp(min=0).sqrt())

    @torch.no_grad()
    def project(self) -> None:
        """Scale the weights back to the budget."""
        spread = self.spread()
        if spread > self.budget:
            self.weight.mul_(self.budget / spread)

    def weights(self) -> dict[str, float]:
        """The present weights by name."""
        return dict(zip(self.terms, self.weight.tolist(), strict=True))

    def save_pretrained(self, path: str | Path) -> None:
        """Write weights, standardisation and the terms (reward models are copied, functions named by dotted path).

        Raises:
            InputError: a term that is neither a reward model nor an importable function, such as a lambda.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        terms = {}
        for name, term in self.terms.items():
            if isinstance(term, RewardModel):
                term.save_pretrained(path / name)
                terms[name] = {"reward_model": name}
            else:
                terms[name] = {"function": _dotted_path(name, term, path)}
        record = {
            "kind": "RewardMixture",
            "terms": terms,
            "weights": self.weights(),
            "budget": self.budget,
            "shift": self.shift.tolist(),
            "scale": self.scale.tolist(),
            "correlation": self.correlation.tolist(),
        }
        (path / "reward.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class RewardModelLeader(LanguageLeader):
    """A reward model whose own parameters are x: r_x = strength * (RM_x(prompt, completion) - shift) / scale.

    Args:
        model: the reward model to start from.
        trainable: "head", the last layer only, or "all".
        strength: reward per standard deviation of the starting model's scores within a prompt.
        budget: the largest relative change of the trainable parameters, ||x - x_0|| <= budget * ||x_0||. It keeps
            the leader bounded (theory: trap 4).

    Raises:
        InputError: another value of `trainable`, or a budget or strength that is not positive.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, model: RewardModel, trainable: str = "head", strength: float = 1.0, budget: float = 1.0) -> None:
        super().__init__()
        for name, value in (("strength", strength), ("budget", budget)):
            if not (0 < value < float("inf")):
                raise InputError(f"RewardModelLeader.{name}: expected a positive number, got {value}")
        if trainable not in ("head", "all"):
            raise InputError(f"RewardModelLeader.trainable: expected 'head' or 'all', got {trainable!r}")
        self.reward_model = model
        self.network = model.model  # registers the parameters
        self.network.requires_grad_(trainable == "all")
        if trainable == "head":
            model.head.requires_grad_(True)
        self.trainable, self.strength, self.budget = trainable, strength, budget
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self._start = [p.detach().clone() for p in self._moving()]

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x [B]."""
        return self.strength * (self.reward_model.score(prompts, completions) - self.shift) / self.scale

    @torch.no_grad()
    def calibrate(self, rollouts: Rollouts) -> None:
        """Standardise by the starting model's scores: mean zero, mean variance within a prompt's group one."""
        arguments = score_arguments(rollouts)
        scores = self.reward_model.score(arguments["prompts"], arguments["completions"])
        _, place, sizes = torch.unique(rollouts.group[:, 0].to(scores.device), return_inverse=True, return_counts=True)
        mean = torch.zeros(len(sizes), dtype=scores.dtype, device=scores.device).index_add(0, place, scores) / sizes
        deviation = ((scores - mean[place]).pow(2).sum() / (len(scores) - len(sizes))).sqrt()
        self.shift.copy_(scores.mean())
        self.scale.copy_(deviation.clamp(min=1e-8))

    @torch.no_grad()
    def project(self) -> None:
        """Pull the parameters back to within the budget of where they started."""
        moving = self._moving()
        moved = torch.stack([(p - s).norm() for p, s in zip(moving, self._start, strict=True)]).norm()
        allowed = self.budget * torch.stack([s.norm() for s in self._start]).norm()
        if moved > allowed:
            for p, s in zip(moving, self._start, strict=True):
                p.copy_(s + (p - s) * (allowed / moved))

    def save_pretrained(self, path: str | Path) -> None:
        """Write the reward model and its standardisation."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self.reward_model.save_pretrained(path / "model")
        record = {
            "kind": "RewardModelLeader",
            "trainable": self.trainable,
            "strength": self.strength,
            "budget": self.budget,
            "shift": self.shift.item(),
            "scale": self.scale.item(),
        }
        (path / "reward.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _moving(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]


def load_leader(path: str | Path) -> RewardMixture | RewardModelLeader:
    """The leader that `save_pretrained` wrote to `path`. Raises InputError when there is none."""
    path = Path(path)
    record_file = path / "reward.json"
    if not record_file.is_file():
        raise InputError(f"load_leader: no reward.json in {path}; expected a folder written by save_pretrained")
    record = json.loads(record_file.read_text(encoding="utf-8"))
    if record["kind"] == "RewardModelLeader":
        model = RewardModel(path / "model")
        leader = RewardModelLeader(model, record["trainable"], record["strength"], record["budget"])
        leader.shift.fill_(record["shift"])
        leader.scale.fill_(record["scale"])
        return leader
    terms: dict[str, ScoreFunction] = {}
    for name, term in record["terms"].items():
        if "reward_model" in term:
            terms[name] = RewardModel(path / term["reward_model"])
        else:
            file, _, attribute = term["function"].rpartition(":")
            terms[name] = load_object(f"{path / file}:{attribute}" if file.endswith(".py") else term["function"])
    mixture = RewardMixture(terms, budget=record["budget"])
    mixture.weight.data.copy_(torch.tensor(list(record["weights"].values()), dtype=torch.float64))
    mixture.correlation.copy_(torch.tensor(record["correlation"], dtype=torch.float64))
    mixture.shift.copy_(torch.tensor(record["shift"], dtype=torch.float64))
    mixture.scale.copy_(torch.tensor(record["scale"], dtype=torch.float64))
    return mixture


def load_reward(path: str | Path) -> Callable[..., list[float]]:
    """The learned reward in `path` as a trl reward function.

    Three lines use it::

        from align_cbrl.llm import load_reward
        reward = load_reward("runs/docstrings/reward")
        trainer = RLOOTrainer(model, reward_funcs=reward, train_dataset=prompts)
    """
    return load_leader(path).reward_function()


def _dotted_path(name: str, term: ScoreFunction, folder: Path) -> str:
    """How to import `term` again; the source file of a function from outside any package is copied to `folder`."""
    module, qualified = getattr(term, "__module__", None), getattr(term, "__qualname__", "<lambda>")
    if module is None or "<" in qualified:
        raise InputError(
            f"RewardMixture.terms[{name!r}]: expected a reward model or a function defined at the top of a module, so "
            f"that the reward can be saved, got {term!r}"
        )
    try:
        if module != "__main__" and getattr(importlib.import_module(module), qualified, None) is term:
            return f"{module}.{qualified}"
    except ImportError:
        pass  # loaded from a file by path: carry the file along
    source = Path(term.__code__.co_filename)
    if not (folder / source.name).exists() or not (folder / source.name).samefile(source):
        shutil.copyfile(source, folder / source.name)
    return f"{source.name}:{qualified}"
