"""A world: where prompts come from, and who makes the policy and the reward model that a configuration leaves null."""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path
from typing import Literal

from datasets import DatasetDict
from transformers import AutoConfig

from align_cbrl import InputError
from align_cbrl.llm.loading import loading
from align_cbrl.plain import plain
from align_cbrl.runs.inputs import Data, Name, Policy, Proxy

from .cache import cached
from .docstrings.policy import train_policy as train_docstring_policy
from .docstrings.proxy import train_proxy as train_docstring_proxy
from .docstrings.shipped import POLICY as SHIPPED_POLICY
from .docstrings.shipped import PROXY as SHIPPED_PROXY
from .replies.policy import Family, train_policy
from .replies.proxy import train_proxy

_SIGNATURES = "align_cbrl.recipes.worlds.docstrings.data.load_docstrings"
PROXY = "proxy"
"""Name of the reward model's term in a mixture."""


@dataclasses.dataclass(frozen=True)
class PolicySettings:
    """A policy besides the world's own.

    Attributes:
        model: folder or hub id; null makes one of the family and size below, on the replies of the world.
        family: architecture.
        hidden_size: width.
        layers: depth.
    """

    model: Policy | None = None
    family: Family = "llama"
    hidden_size: int = 64
    layers: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class World(abc.ABC):
    """Who is trained, on what, and which rewards there are.

    Attributes:
        data: prompts: a function, a file, a folder or a hub id.
        model: folder or hub id of the policy and reference; null: the world's own.
        proxy: folder or hub id of the reward model; null: a flawed one for the world's own policy, while the first of
            `rewards` stands in for it where `model` names a policy and the data have no completions.
        proxy_pairs: preference pairs for the reward model that is made.
        rewards: further reward functions by name, as `package.module.function` or `file.py:function`.
        costs: what a constrained objective may bound, likewise.
        reference_prompts: training prompts on whose completions by the reference the rewards are standardised.
    """

    name: str = ""
    data: Data = ""
    model: Policy | None = None
    proxy: Proxy | None = None
    proxy_pairs: int = 4000
    rewards: dict[str, Name] = dataclasses.field(default_factory=dict)
    costs: dict[str, Name] = dataclasses.field(default_factory=dict)
    reference_prompts: int = 128

    def __post_init__(self) -> None:
        if PROXY in self.rewards:
            raise InputError(f"rewards: {PROXY!r} is the name of the reward model's own term; choose another")
        for name, least in (("proxy_pairs", 2), ("reference_prompts", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    @abc.abstractmethod
    def make_policy(self, data: DatasetDict, seed: int, cache: Path) -> str:
        """Folder of a policy of this world, trained when it is not there yet."""

    def another_policy(self, settings: PolicySettings, seed: int, cache: Path) -> str:
        """Folder or hub id of a policy besides this world's own."""
        if settings.model is None:
            raise InputError(f"model: expected a folder or a hub id in the world {self.name!r}, got null")
        return settings.model

    def policy(self) -> str | None:
        """Folder or hub id of the policy, where none has to be trained; None where one has."""
        return self.model

    def has_proxy(self, data: DatasetDict) -> bool:
        """Whether there will be a reward model. Raises InputError where one should be trained and cannot."""
        return self.proxy is not None or self.makes_proxy(data)

    @abc.abstractmethod
    def makes_proxy(self, data: DatasetDict) -> bool:
        """Whether `make_proxy` trains one on these data. Raises InputError where it should and cannot."""

    @abc.abstractmethod
    def size(self) -> tuple[float, int]:
        """About how many parameters and layers the policy has that is made."""

    @abc.abstractmethod
    def rows_of_policy(self, rows: int) -> float:
        """How many rows the policy that is made is trained on, of data with this many, passes counted."""

    @abc.abstractmethod
    def make_proxy(self, model: str, data: DatasetDict, seed: int, cache: Path) -> str | None:
        """Folder of a flawed reward model for `model`, trained when it is not there yet; None where none can be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Docstrings(World):
    """Signatures and docstrings of the running Python's standard library.

    Attributes:
        base_epochs: of training another small Llama on the data, and a reward model for it; null: the policy and the
            reward model that come with this world.
    """

    name: Literal["docstrings"] = "docstrings"
    data: Data = _SIGNATURES
    proxy_pairs: int = 3000
    reference_prompts: int = 64
    base_epochs: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_epochs is not None and not self.base_epochs > 0:
            raise InputError(f"base_epochs: expected a positive number or null, got {self.base_epochs}")
        if self.model is None and self.base_epochs is None and self.data != _SIGNATURES:
            raise InputError(
                "model: null stands for a policy that writes docstrings, which data of one's own do not ask for; name "
                "a folder or a hub id, or set world.base_epochs to train a small policy on the data's completions"
            )

    def make_policy(self, data: DatasetDict, seed: int, cache: Path) -> str:
        """The policy of this world, or a small Llama trained on prompts and completions of the data."""
        if self.base_epochs is None:
            return SHIPPED_POLICY
        _need_completions(data, "model")
        facts, epochs = {**self._rows(data, seed), "epochs": self.base_epochs}, self.base_epochs
        return str(
            cached(
                cache, "base", facts, lambda out: train_docstring_policy(data["train"], out, seed=seed, epochs=epochs)
            )
        )  # fmt: skip

    def make_proxy(self, model: str, data: DatasetDict, seed: int, cache: Path) -> str | None:
        """A reward model with a weakness for length and pet phrases."""
        if not self.makes_proxy(data):
            return SHIPPED_PROXY if model == SHIPPED_POLICY else None
        facts = {**self._rows(data, seed), "model": model, "pairs": self.proxy_pairs}
        return str(
            cached(
                cache, "proxy", facts,
                lambda out: train_docstring_proxy(model, data["train"], out, seed=seed, pairs=self.proxy_pairs),
            )
        )  # fmt: skip

    def makes_proxy(self, data: DatasetDict) -> bool:
        """Unless one is named, or the first of the rewards stands in for it."""
        if self.proxy is not None or self.policy() == SHIPPED_POLICY:
            return False
        if self.model is not None and self.rewards and "completion" not in data["train"].column_names:
            return False
        _need_completions(data, "proxy")
        return True

    def policy(self) -> str | None:
        """The policy that is named, or the one of this world."""
        return self.model or (SHIPPED_POLICY if self.base_epochs is None else None)

    def has_proxy(self, data: DatasetDict) -> bool:
        """Also the one of this world."""
        return self.policy() == SHIPPED_POLICY or super().has_proxy(data)

    def size(self) -> tuple[float, int]:
        """Of the small Llama."""
        return 1.3e6, 2

    def rows_of_policy(self, rows: int) -> float:
        """All of them, in as many epochs."""
        return rows * (self.base_epochs or 0.0)

    def _rows(self, data: DatasetDict, seed: int) -> dict[str, object]:
        return {"seed": seed, "data": self.data, "rows": len(data["train"]), "first": plain(data["train"][0])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replies(World):
    """Requests to a support desk, and a policy that replies as the desk used to.

    Attributes:
        family: architecture of the policy that is made.
        hidden_size: its width.
        layers: its depth.
        rows: replies that it learns from.
    """

    name: Literal["replies"] = "replies"
    data: Data = "align_cbrl.recipes.worlds.replies.data.load_requests"
    family: Family = "llama"
    hidden_size: int = 64
    layers: int = 2
    rows: int = 6000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 1:
            raise InputError(f"rows: expected at least 1, got {self.rows}")
        if self.model is not None and self.proxy is None and not self.rewards:
            raise InputError("rewards: expected at least one where model names a policy and proxy is null, got none")

    def make_policy(self, data: DatasetDict, seed: int, cache: Path) -> str:
        """A small policy of the configured family and size."""
        own = PolicySettings(family=self.family, hidden_size=self.hidden_size, layers=self.layers)
        return self.another_policy(own, seed, cache)

    def another_policy(self, settings: PolicySettings, seed: int, cache: Path) -> str:
        """The one that is named, or a small one that is trained on the replies of this world."""
        if settings.model is not None:
            return settings.model
        size = {
            "family": settings.family, "hidden_size": settings.hidden_size, "layers": settings.layers,
            "rows": self.rows,
        }  # fmt: skip
        return str(cached(cache, "policy", {"seed": seed, **size}, lambda out: train_policy(out, seed=seed, **size)))  # type: ignore[arg-type]

    def make_proxy(self, model: str, data: DatasetDict, seed: int, cache: Path) -> str | None:
        """A reward model that misreads length and big words; none for somebody else's policy."""
        if not self.makes_proxy(data):
            return None
        facts = {"seed": seed, "model": Path(model).name, "pairs": self.proxy_pairs}
        prompts = list(data["train"]["prompt"])
        return str(
            cached(
                cache, "proxy", facts,
                lambda out: train_proxy(model, prompts, out, seed=seed, pairs=self.proxy_pairs),
            )
        )  # fmt: skip

    def makes_proxy(self, data: DatasetDict) -> bool:
        """For the policy of this world, unless a reward model is named."""
        return self.model is None and self.proxy is None

    def size(self) -> tuple[float, int]:
        """Of the policy of this family."""
        return 12.0 * self.layers * self.hidden_size**2, self.layers

    def rows_of_policy(self, rows: int) -> float:
        """Those of the desk's log, three times."""
        return 3.0 * self.rows


WorldSettings = Docstrings | Replies
"""The world of a recipe, by `name`."""


def size_of(model: str) -> tuple[float, int]:
    """About how many parameters and layers a policy has, by its configuration alone.

    Raises:
        InputError: its configuration does not load.
    """
    with loading("model", model):
        config = AutoConfig.from_pretrained(model).get_text_config()
    layers, width = getattr(config, "num_hidden_layers", 12), getattr(config, "hidden_size", 768)
    return float(12 * layers * width**2 + getattr(config, "vocab_size", 0) * width), int(layers)


def _need_completions(data: DatasetDict, name: str) -> None:
    if "completion" not in data["train"].column_names:
        raise InputError(
            f"{name}: null trains one from the data's 'completion' column, which is missing (columns: "
            f"{data['train'].column_names}); give a hub id or a folder"
        )
