"""Leaders that shape the rewards of language models, r_x(prompt, completion), and how they are saved and loaded."""

from __future__ import annotations

import abc
import inspect
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi
from torch import Tensor

import align_cbrl
from align_cbrl.errors import InputError
from align_cbrl.llm.leaders.model_card import model_card
from align_cbrl.llm.scoring import score_arguments
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts

L = TypeVar("L", bound="LanguageLeader")

_RECORD = "reward.json"


class LanguageLeader(Leader):
    """A leader whose reward is a function of prompt and completion."""

    @abc.abstractmethod
    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x of B completions: [B], differentiable in x."""

    @abc.abstractmethod
    def save_pretrained(self, path: str | Path) -> None:
        """Write the reward to a folder that `load_reward` turns into a reward function."""

    def calibrate(self, rollouts: Rollouts) -> None:
        """Set the reward's scale by completions of the reference, several a prompt. Default: it has none to set."""

    def describe(self) -> dict[str, Any]:
        """What has been learned, by name, for logs and the model card: numbers and short texts."""
        return {name: list(p.shape) for name, p in self.named_parameters() if p.requires_grad}

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

    @classmethod
    def from_pretrained(cls: type[L], path: str | Path) -> L:
        """The leader that `save_pretrained` wrote to `path`, ready to learn on.

        Raises:
            InputError: `path` holds none, or one of another class.
        """
        leader = load_leader(path)
        if not isinstance(leader, cls):
            raise InputError(
                f"{cls.__name__}.from_pretrained: {path} holds a {type(leader).__name__}; load it with "
                f"{type(leader).__name__}.from_pretrained or load_leader"
            )
        return leader

    def push_to_hub(self, repo_id: str, private: bool | None = None, commit_message: str = "Upload the reward") -> str:
        """Save and upload to the Hugging Face hub, with the user's own token; the only method that needs a network.

        Args:
            repo_id: `owner/name`; the repository is created if there is none.
            private: whether a repository that is created is private; None leaves that to the owner's settings.
            commit_message: of the upload.

        Returns:
            The address of the upload.
        """
        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))


def write_record(leader: LanguageLeader, path: Path, record: Mapping[str, Any]) -> None:
    """Write reward.json, which `load_leader` reads, and the model card README.md; the last act of `save_pretrained`.

    Args:
        leader: saved; its class names the kind.
        path: its folder.
        record: what its class needs to make it again, plain data.
    """
    kind = type(leader).__name__
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"kind": kind, "version": align_cbrl.__version__, **record}, indent=2)
    (path / _RECORD).write_text(text + "\n", encoding="utf-8")
    summary = " ".join((inspect.getdoc(type(leader)) or "").split("\n\n")[0].split())
    values = {**leader.describe(), **({"budget": record["budget"]} if "budget" in record else {})}
    card = model_card(kind, summary, values, _functions(record), align_cbrl.__version__)
    (path / "README.md").write_text(card, encoding="utf-8")


def load_leader(path: str | Path) -> LanguageLeader:
    """The leader that `save_pretrained` wrote to `path`, a local folder; needs no network.

    Functions that are terms of its reward are imported: load what you trust.

    Raises:
        InputError: there is none, or its reward.json is damaged or from a newer version.
    """
    # Imported here: these modules build on this one.
    from align_cbrl.llm.leaders.beta import LearnedBeta
    from align_cbrl.llm.leaders.mixture import RewardMixture
    from align_cbrl.llm.leaders.reward_model import RewardModelLeader
    from align_cbrl.llm.leaders.shaped import LengthShaping, Shaped

    path = Path(path)
    file = path / _RECORD
    if not file.is_file():
        raise InputError(f"load_leader: no {_RECORD} in {path}; expected a folder written by save_pretrained")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        kinds: dict[str, Any] = {
            kind.__name__: kind for kind in (RewardMixture, RewardModelLeader, Shaped, LengthShaping, LearnedBeta)
        }
        kind = record["kind"]
        if kind not in kinds:
            raise InputError(f"load_leader: {file}: expected one of {sorted(kinds)} as 'kind', got {kind!r}")
        leader: LanguageLeader = kinds[kind].from_record(path, record)
        return leader
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"load_leader: {file} is damaged or from another version ({type(error).__name__}: {error}); save the "
            "leader again"
        ) from error


def load_reward(path: str | Path) -> Callable[..., list[float]]:
    """The learned reward in `path` as a trl reward function.

    Three lines use it::

        from align_cbrl.llm import load_reward
        reward = load_reward("runs/docstrings/reward")
        trainer = RLOOTrainer(model, reward_funcs=reward, train_dataset=prompts)
    """
    return load_leader(path).reward_function()


def _functions(record: Any) -> list[str]:
    """Import paths of the functions in a record, wherever they stand."""
    if not isinstance(record, Mapping):
        return []
    own = [record["function"]] if isinstance(record.get("function"), str) else []
    return own + [path for value in record.values() for path in _functions(value)]
