"""Names of 0.1.0 that still work in 0.2.0, with a FutureWarning: modules that moved, and recipes that were renamed.

This file and its two calls of `install` go in 0.3.0.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

MODULES: dict[str, tuple[str, ...]] = {
    f"{package}.{old}": tuple(f"{package}.{module}" for module in new.split(" + "))
    for package, moves in {
        "align_cbrl": {
            **{
                name: f"runs.{name}"
                for name in ("config", "imports", "checkpoints", "metrics", "run_folder", "compare")
            },
            "report": "runs.report + runs.charts",
            **{
                name: f"estimators.{name}"
                for name in (
                    *("certificate", "critics", "degenerate", "geometric"),
                    *("zeroth_order", "replay", "search", "random_numbers"),
                )
            },
            "hypergradient": "estimators.policy_response + estimators.hypergradient + estimators.baselines",
            "myopic": "estimators.baselines",
            "randomly_truncated": "estimators.truncated",
            **{name: f"objectives.{name}" for name in ("cross_fitted", "worst_group", "preference_data")},
        },
        "align_cbrl.llm": {
            "completions": "sampling + prompts + scoring",
            **{name: f"leaders.{name}" for name in ("beta", "calibration", "lora", "model_card", "terms")},
            "reward_mixture": "leaders.mixture",
            "reward_model_leader": "leaders.reward_model",
            "shaping": "leaders.shaped",
            **{
                name: f"followers.{name}"
                for name in ("adapters", "population", "prompt_order", "schedule", "tilted", "trained", "training")
            },
            **{f"trl_{name}": f"followers.trl.{name}" for name in ("rloo", "grpo", "observed")},
            "judge_cache": "judges.cache",
            "remote_judge": "judges.remote",
        },
        "toy_cmdp": {
            **{name: f"tables.{name}" for name in ("arguments", "cmdp", "line_transition", "sparse", "transition")},
            **{name: f"referee.{name}" for name in ("closed_forms", "exact", "frozen_policy")},
            "follower": "followers.exact",
            "iterative": "followers.iterative",
            "neural_follower": "followers.neural",
            "solve": "followers.solve",
            "observed_policy": "estimators.observed_policy",
            "plug_in": "estimators.plug_in",
            "search": "estimators.climbs",
            "rivals": "estimators",
            **{
                f"rivals.{name}": f"estimators.{name}"
                for name in ("amd", "bchg", "value_penalty", "visit_averaged", "visits")
            },
            **{
                name: f"problems.{name}"
                for name in (
                    *("four_rooms", "free_rewards", "gridworld", "mechanism", "meta_rl", "parallel", "preferences"),
                    *("principal_agent", "random_cmdp", "stackelberg_game", "tax_design"),
                )
            },
        },
    }.items()
    for old, new in moves.items()
}
"""Old module name -> where its names are now; several modules where it was divided."""

RECIPES: dict[str, tuple[str, dict[str, str]]] = {
    "docstrings": ("tune_weights", {"config.yaml": "docstrings.yaml", "reward_model.yaml": "head.yaml"}),
    "reward_weights": ("tune_weights", {"config.yaml": "replies.yaml", "smoke.yaml": "replies_smoke.yaml"}),
}
"""Old recipe name -> the new one, and the new names of those of its files that were renamed."""


def recipe(name: str, config: str | None) -> tuple[str, str | None]:
    """A recipe and the name of its configuration, with names of 0.1.0 replaced.

    Example:
        >>> recipe("four_rooms", "smoke.yaml")
        ('four_rooms', 'smoke.yaml')
    """
    if name not in RECIPES:
        return name, config
    new, files = RECIPES[name]
    file = "config.yaml" if config is None else config if config.endswith(".yaml") else f"{config}.yaml"
    renamed = files.get(file, config)
    words = new if renamed is None else f"{new} --config {renamed}"
    warnings.warn(f"the recipe {name} is now {words}; the old name stops working in 0.3.0", FutureWarning, stacklevel=2)
    return new, renamed


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module by its old name: the module itself, not a copy, so that its classes are the same."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in MODULES:
            return None
        new = " and ".join(MODULES[name])
        message = f"the module {name} is now {new}; the old name stops working in 0.3.0"
        warnings.warn(message, FutureWarning, stacklevel=2)  # the import system's own frames are skipped
        return importlib.util.spec_from_loader(name, self)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        found = [importlib.import_module(new) for new in MODULES[name]]
        if len(found) == 1:
            sys.modules[name] = found[0]  # the import system returns what stands here
        for part in found:
            vars(module).update({key: value for key, value in vars(part).items() if not key.startswith("__")})


class _Package(ModuleType):
    """A package whose functions keep their names: importing toy_cmdp.four_rooms must not hide toy_cmdp.four_rooms()."""

    def __setattr__(self, name: str, value: object) -> None:
        moved = isinstance(value, ModuleType) and f"{self.__name__}.{name}" in MODULES
        if not (moved and name in vars(self)):
            super().__setattr__(name, value)


_FINDER = _Finder()


def install(package: str) -> None:
    """Let the old modules of a package be imported; called by the package itself."""
    sys.modules[package].__class__ = _Package
    if _FINDER not in sys.meta_path:
        # In front: the ordinary finder would load toy_cmdp.rivals.amd once more, from the new package's folder.
        sys.meta_path.insert(0, _FINDER)
