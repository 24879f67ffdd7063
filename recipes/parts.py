"""A study in parts: finished ones are found again, and seeds run side by side."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.run_folder import write_json


def measured(file: Path, count: int, measure: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of problems 0, ..., count - 1, one line each in `file`; those that are there are not measured again."""
    done = len(MetricsLog.read(file)) if file.exists() else 0
    with MetricsLog(file) as log:
        for number in range(done, count):
            log.append({"problem": number, **measure(number)})
            print(f"problem {number + 1} of {count}", flush=True)
    return MetricsLog.read(file)


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned, from `file` if it is there; made, and kept whole, otherwise."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, make())
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


Work = Callable[[Any, int, Path, Path], None]
"""work(config, seed, folder of the seed, cache): one seed of a study, from wherever it stopped."""


def each_seed(work: Work, config: Any, out: Path, seeds: Sequence[int], jobs: int | None) -> None:
    """Do `work` for every seed, in `out`/seed-N, several at a time.

    Args:
        work: a function of a module.
        config: handed on.
        out: the run's folder; what runs share is cached beside it.
        seeds: of the study.
        jobs: processes; None for one a core. With one, everything happens in this process.
    """
    jobs = min(len(seeds), jobs or os.cpu_count() or 1)
    tasks = [(work, config, seed, out / f"seed-{seed}", out.parent / "cache", jobs) for seed in seeds]
    if jobs == 1:
        for task in tasks:
            _one_seed(task)
        return
    # A new interpreter each: torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_one_seed, tasks))


def _one_seed(task: tuple[Work, Any, int, Path, Path, int]) -> None:
    work, config, seed, folder, cache, jobs = task
    if jobs > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    folder.mkdir(parents=True, exist_ok=True)
    work(config, seed, folder, cache)


def of_each_seed(out: Path, seeds: Sequence[int], name: str) -> list[dict[str, Any]]:
    """The part `name` of every seed, as `kept` left it."""
    return [json.loads((out / f"seed-{seed}" / f"{name}.json").read_text(encoding="utf-8")) for seed in seeds]
