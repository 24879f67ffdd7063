"""The contract of leaders that shape the rewards of language models, and how they are saved and loaded."""

from __future__ import annotations

import abc
import inspect
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub import HfApi
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError, first_line
from align_cbrl.llm.leaders.import_names import class_name, imported_class
from align_cbrl.llm.leaders.saved import RECORD, read_record, write_card, write_record
from align_cbrl.llm.leaders.trust import code_is_trusted, trusting
from align_cbrl.llm.scoring import ScoreFunction, score_arguments
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts

L = TypeVar("L", bound="LanguageLeader")

_DEFINED: dict[str, type[LanguageLeader]] = {}
"""Every class of leaders that has been defined in this process, by its name `module:QualName`."""

_OWN = "align_cbrl.llm.leaders."


class Watcher(Protocol):
    """Who is told what a leader's reward function has scored."""

    def saw(
        self,
        leader: LanguageLeader,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Any],
        fixed: Tensor | None,
    ) -> None:
        """The completions, after they were scored, with the leader's `fixed_scores` of them."""


class LanguageLeader(Leader):
    """A leader whose reward is a function of prompt and completion.

    A subclass defines `score`, and `record` and `from_record` to be saved and loaded. It registers itself when it is
    defined. A saved folder names its class, so that a class defined in any module that can be imported is loaded like
    those of this library.

    The parts of a reward that do not move with the parameters, such as the scores of reward functions, are expensive
    and stay the same through a leader step. A subclass that declares them, by `fixed_scores` and `score_from`, has them
    computed once per completion; `HPGD` carries them along in `Rollouts.known`.

    Example:
        >>> class Longer(LanguageLeader):
        ...     def __init__(self, weight):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.tensor(float(weight)))
        ...     def score(self, prompts, completions, **columns):
        ...         return self.weight * torch.tensor([float(len(text)) for text in completions])
        ...     def record(self, path):
        ...         return {"weight": self.weight.item()}
        ...     @classmethod
        ...     def from_record(cls, path, record):
        ...         return cls(record["weight"])
        >>> Longer(0.5).reward_function()(prompts=["a", "a"], completions=["bc", "bcde"])
        [1.0, 2.0]
    """

    _watcher: weakref.ref[Watcher] | None = None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        _DEFINED[f"{cls.__module__}:{cls.__qualname__}"] = cls

    @abc.abstractmethod
    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x of B completions: [B], differentiable in x."""

    @abc.abstractmethod
    def record(self, path: Path) -> Mapping[str, Any]:
        """Plain data from which `from_record` makes the leader again.

        Args:
            path: the folder that the leader is saved to; tensors and models go to files in it.
        """

    @classmethod
    @abc.abstractmethod
    def from_record(cls, path: Path, record: Mapping[str, Any]) -> LanguageLeader:
        """The leader whose `record` was saved to the folder `path`."""

    def fixed_scores(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor | None:
        """The parts of r_x that do not move with x: [B, K] without graph, or None, the default, where it has none."""
        return None

    def score_from(self, fixed: Tensor, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x of B completions [B], as `score`, given what `fixed_scores` returned for them."""
        return self.score(prompts, completions, **columns)

    def calibrate(self, rollouts: Rollouts) -> None:
        """Set the reward's scale on completions of the reference, several per prompt. Default: nothing to set."""

    def describe(self) -> dict[str, Any]:
        """What has been learned, by name, for logs and the model card: numbers and short texts."""
        return {name: list(p.shape) for name, p in self.named_parameters() if p.requires_grad}

    def fixed_features(self, rollouts: Rollouts) -> Tensor | None:
        """See `Leader.fixed_features`: the `fixed_scores` of the rollouts' completions."""
        if type(self).fixed_scores is LanguageLeader.fixed_scores:  # rollouts may then lack what it would be asked of
            return None
        return self.fixed_scores(**score_arguments(rollouts))

    def reward(self, rollouts: Rollouts) -> Tensor:
        """r_x [B, 1]."""
        arguments, fixed = score_arguments(rollouts), rollouts.known.get(self)
        scores = self.score(**arguments) if fixed is None else self.score_from(fixed, **arguments)
        return scores[:, None]

    def reward_function(self) -> Callable[..., list[float]]:
        """The reward as a trl reward function, which follows the leader as its parameters move."""

        def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
            with torch.no_grad():
                fixed = self.fixed_scores(prompts, completions, **columns)
                scores = (
                    self.score(prompts, completions, **columns)
                    if fixed is None
                    else self.score_from(fixed, prompts, completions, **columns)
                )
            watcher = None if self._watcher is None else self._watcher()
            if watcher is not None:
                watcher.saw(self, prompts, completions, columns, fixed)
            listed: list[float] = scores.tolist()
            return listed

        reward.__name__ = type(self).__name__
        return reward

    def watched_by(self, watcher: Watcher) -> None:
        """Have `watcher.saw` told what the reward function scores; one watcher at a time, which is not kept alive."""
        self._watcher = weakref.ref(watcher)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the leader to a folder that `load_leader` and `load_reward` read, with a model card.

        Raises:
            InputError: another process could not import the leader's class, or a reward function that it is made of,
                such as a lambda.
        """
        name, folder = class_name(type(self)), Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        record = self.record(folder)
        write_record(folder, name, record)
        budget = {"budget": record["budget"]} if record.get("budget") is not None else {}
        write_card(folder, type(self), {**self.describe(), **budget})

    @classmethod
    def from_pretrained(
        cls: type[L],
        path: str | Path,
        *,
        trust_code: bool = False,
        terms: Mapping[str, ScoreFunction] = MappingProxyType({}),
    ) -> L:
        """The leader that `save_pretrained` wrote to `path`; its parameters can be trained further.

        Arguments and errors are those of `load_leader`; a leader of another class is refused as well.
        """
        leader = load_leader(path, trust_code=trust_code, terms=terms)
        if not isinstance(leader, cls):
            raise InputError(
                f"{cls.__name__}.from_pretrained: {path} holds a {type(leader).__name__}; load it with "
                f"{type(leader).__name__}.from_pretrained or load_leader"
            )
        return leader

    def push_to_hub(self, repo_id: str, private: bool | None = None, commit_message: str = "Upload the reward") -> str:
        """Save the leader and upload the folder to the Hugging Face hub, with the user's own token.

        No other method needs a network.

        Args:
            repo_id: `owner/name`; the repository is created if it does not exist.
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


@checked
def load_leader(
    path: str | Path, *, trust_code: bool = False, terms: Mapping[str, ScoreFunction] = MappingProxyType({})
) -> LanguageLeader:
    """The leader that `save_pretrained` wrote to `path`, a local folder. No network is needed.

    A folder may come from anywhere, and can name any function of any module. Without `trust_code` nothing that it names
    is imported or run but reward functions and leaders of this library, and classes of leaders that this process has
    imported already; anything else is refused by its name. Models are read from safetensors, never as code.

    Args:
        path: the folder.
        trust_code: import the classes and functions that the folder names, and the .py files in it, which runs them.
        terms: reward functions by the name of their term, in place of those that the folder names; of a frozen reward
            the name is "frozen".

    Raises:
        InputError: there is no leader in `path`; it names code that is not trusted, a class that cannot be imported, or
            one that is no leader; it has no such terms; or the folder is damaged. The message names the reason.
    """
    folder = Path(path)
    record = read_record(folder)
    with trusting(trust_code, terms):
        leader = _class_of(record, folder)
        try:
            return leader.from_record(folder, record)
        except Exception as error:  # the class may be anybody's
            reason = str(error)
            if not isinstance(error, InputError):
                reason = f"it is damaged or from another version ({type(error).__name__}: {first_line(error)})"
            raise InputError(f"load_leader: {folder} holds a {leader.__name__} that does not load: {reason}") from error


@checked
def load_reward(
    path: str | Path, *, trust_code: bool = False, terms: Mapping[str, ScoreFunction] = MappingProxyType({})
) -> Callable[..., list[float]]:
    """The learned reward in the folder `path` as a trl reward function; arguments and errors are as of `load_leader`.

    Three lines use it::

        from align_cbrl.llm import load_reward
        reward = load_reward("runs/tune_weights/reward")
        trainer = RLOOTrainer(model, reward_funcs=reward, train_dataset=prompts)
    """
    return load_leader(path, trust_code=trust_code, terms=terms).reward_function()


def _class_of(record: Mapping[str, Any], folder: Path) -> type[LanguageLeader]:
    if "class" not in record:  # of version 0.1, which named the classes of this library only
        own = {c.__name__: c for n, c in _DEFINED.items() if n.startswith(_OWN) and not inspect.isabstract(c)}
        if record["kind"] not in own:
            raise InputError(
                f"load_leader: {folder / RECORD}: expected one of {sorted(own)} as 'kind', got {record['kind']!r}"
            )
        return own[record["kind"]]
    if record["class"] not in _DEFINED and not code_is_trusted():
        raise InputError(
            f"load_leader: {folder} holds a leader of the class {record['class']}, and importing its module would run "
            "code that this folder names; if you trust it, import the class first, or pass trust_code=True"
        )
    try:
        found = _DEFINED.get(record["class"]) or imported_class(record["class"])
    except InputError as error:
        raise InputError(f"load_leader: {folder} holds a leader of the class {record['class']}, but {error}") from error
    if not issubclass(found, LanguageLeader) or inspect.isabstract(found):
        raise InputError(
            f"load_leader: {folder / RECORD} names the class {record['class']}, which is no LanguageLeader that can be "
            "made; the folder is damaged, or not from this library"
        )
    return found
