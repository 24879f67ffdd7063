"""What a recipe around a language model needs, looked at before anything is trained."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from align_cbrl import InputError
from align_cbrl.llm import Judge, load_prompts
from align_cbrl.llm.conversations import is_conversation
from align_cbrl.llm.followers.base import check_policy
from align_cbrl.llm.loading import stored_bytes
from align_cbrl.llm.prompts import check_count
from align_cbrl.llm.reward_models import check_reward_model
from align_cbrl.llm.scoring import check_arguments, refusing_what_raises, scores_of_once
from align_cbrl.llm.settings.judge import RewardModelJudgeSettings
from align_cbrl.llm.settings.objective import ObjectiveSettings
from align_cbrl.runs.config import nearest, variant_key
from align_cbrl.runs.imports import load_object
from align_cbrl.runs.preflight import Preflight

from ..fine_tuning import without_bars
from .bench import BenchSettings
from .world import PROXY

_ANSWERS = ("Yes.", "No, I do not think so.")
"""What the policy might say, where the data have no completions to show to a judge."""

_SMALL_POLICY = 6e6  # bytes of one that a world makes
_COPIES = 24
"""Copies of the policy, in single precision, that a seed may leave: two checkpoints of each of three stages with the
optimizer's two moments, one more while it is written, and the saved policies."""


def check_bench(
    settings: BenchSettings,
    notes: Preflight,
    *,
    seeds: Sequence[int],
    objectives: Mapping[str, ObjectiveSettings] | None = None,
    policies: Mapping[str, str | None] | None = None,
) -> None:
    """Load data, tokenizers and configurations, and ask the judge, rewards and costs about two completions, once each.

    Models are not loaded, but for their configurations and the names of their weights.

    Args:
        settings: of the recipe.
        notes: collects what is wrong.
        seeds: of the study.
        objectives: what the leader may want, by the key under which it stands; None: `settings.objective`.
        policies: further policies' folders or hub ids, by key; None values are made.
    """
    without_bars()
    world, data = settings.world, None
    with notes.about("world.data"):
        data = load_prompts(world.data, seed=seeds[0])
        check_count(data["test"], 2)  # a standard error needs two
        notes.found("world.data", f"{len(data['train']):,} training and {len(data['test']):,} test prompts")
    if (policy := world.policy()) is not None:
        with notes.about("world.model"):
            notes.found("world.model", check_policy(policy))
    for key, model in (policies or {}).items():
        if model is not None:
            with notes.about(key):
                notes.found(key, check_policy(model))
    if world.proxy is not None:
        with notes.about("world.proxy"):
            notes.found("world.proxy", check_reward_model(world.proxy))
    notes.need_room(len(seeds) * _COPIES * _stored(policy))
    with notes.about("follower"):
        settings.follower.check()
    if data is None:
        return
    rows = two_rows(data["train"], None if notes.refused("world.model") else policy)
    _check_follower(settings, notes, data, seeds[0])
    judge = check_judge(settings, notes, rows)
    terms = _check_functions(settings, notes, rows)
    with notes.about("world.proxy"):
        proxy = world.has_proxy(data)
        with notes.about("leader"):
            settings.leader.check(([PROXY] if proxy else []) + terms, proxy)
    with notes.about("hpgd"):
        settings.hpgd.build(settings.follower.prompts_per_step, settings.follower.group_size, seeds[0])
    for key, objective in ({"objective": settings.objective} if objectives is None else objectives).items():
        _check_objective(settings, notes, key, objective, judge, rows)


def two_rows(data: Dataset, model: str | None) -> dict[str, list[Any]]:
    """Two prompts with a completion each, and the data's columns, as scoring functions get them by name."""
    some = data.select(range(min(2, len(data))))
    columns = {name: list(some[name]) for name in some.column_names if name not in ("prompt", "completion")}
    prompts = list(some["prompt"])
    said = list(some["completion"]) if "completion" in some.column_names else list(_ANSWERS[: len(prompts)])
    ids = [[1, 2] for _ in said]
    if model is not None:
        try:
            ids = [list(row) for row in AutoTokenizer.from_pretrained(model)(list(map(str, said)))["input_ids"]]
        except Exception:  # what is wrong with it is said by whoever checks the policy
            ids = [[1, 2] for _ in said]
    if is_conversation(prompts[0]):
        said = [text if is_conversation(text) else [{"role": "assistant", "content": str(text)}] for text in said]
    return {"prompts": prompts, "completions": said, "completion_ids": ids, **columns}


def check_judge(settings: BenchSettings, notes: Preflight, rows: Mapping[str, list[Any]]) -> Judge | None:
    """The judge, asked about two completions; None where something is wrong with it."""
    given = settings.judge
    key = f"judge.{variant_key(type(given))}"
    if isinstance(given, RewardModelJudgeSettings):
        with notes.about(key):
            notes.found(key, check_reward_model(given.reward_model))
        return Judge(_nothing, name="judge")
    asked: Judge | None = None
    with notes.about(key), tempfile.TemporaryDirectory() as folder:
        # A service may stumble once. Scores are kept only in a cache that is no file of the run's folder.
        judge = dataclasses.replace(given, retries=min(given.retries, 1)).build(Path(folder))
        if not isinstance(judge, Judge):
            raise InputError("expected a judge that scores completions, got one that compares pairs or scores sets")
        _check_columns("judge", judge.function, rows)
        with refusing_what_raises("judge"):
            scores = judge.scores(dict(rows)).tolist()
        notes.found(key, f"{', '.join(f'{score:.3g}' for score in scores)} for two completions")
        asked = judge
    return asked


def _check_follower(settings: BenchSettings, notes: Preflight, data: DatasetDict, seed: int) -> None:
    with notes.about("follower.prompts_per_step"):
        check_count(data["train"], settings.follower.prompts_per_step)
    if (policy := settings.world.policy()) is None or notes.refused("world.model"):
        return
    prompts = {part: data[part].remove_columns([n for n in data[part].column_names if n == "completion"])
               for part in ("train", "test")}  # fmt: skip
    if len(prompts["train"]) < settings.follower.prompts_per_step:
        return
    with notes.about("world.data"):
        settings.follower.build(policy, prompts["train"], seed).check(prompts["test"])


def _check_functions(settings: BenchSettings, notes: Preflight, rows: Mapping[str, list[Any]]) -> list[str]:
    """Ask rewards and costs about two completions; the names of the rewards."""
    world = settings.world
    for kind, functions in (("rewards", world.rewards), ("costs", world.costs)):
        for name, path in functions.items():
            key, label = f"world.{kind}.{name}", f"{kind.removesuffix('s')} {name}"
            with notes.about(key):
                function = load_object(path)
                if not callable(function):
                    raise InputError(f"expected a function, got {function!r:.60}")
                _check_columns(label, function, rows)
                scores = scores_of_once(label, function, rows).tolist()
                notes.found(key, f"{', '.join(f'{score:.3g}' for score in scores)} for two completions")
    return list(world.rewards)


def _check_objective(
    settings: BenchSettings,
    notes: Preflight,
    key: str,
    objective: ObjectiveSettings,
    judge: Judge | None,
    rows: Mapping[str, list[Any]],
) -> None:
    costs = {name: Judge(_nothing, name=f"cost {name}") for name in settings.world.costs}
    with notes.about(key):
        objective.build(
            Judge(_nothing, name="judge") if judge is None else judge, costs, natural=settings.hpgd.step == "natural"
        )
    if (answer := getattr(objective, "answer", None)) is not None:
        with notes.about(f"{key}.answer"):
            _check_columns("answer", load_object(answer), rows)
    if (column := getattr(objective, "column", None)) is not None:
        with notes.about(f"{key}.column"):
            columns = [name for name in rows if name not in ("prompts", "completions", "completion_ids")]
            if column not in columns:
                raise InputError(f"the data have no column {column!r}; {nearest(column, columns)}")


def _check_columns(name: str, function: Callable[..., Any], rows: Mapping[str, list[Any]]) -> None:
    check_arguments(name, function, list(rows))


def _stored(model: str | None) -> float:
    """Bytes of a policy in single precision; of one on the hub nothing is known."""
    return _SMALL_POLICY if model is None else float(stored_bytes(model))


def _nothing(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Stands for a judge that is not loaded here."""
    return [0.0 for _ in completions]
