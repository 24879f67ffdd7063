"""The published table: every temperature and price, several seeds each, a search of its own for every one of them."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import toy_cmdp
from align_cbrl.checks import Count, Positive
from align_cbrl.errors import CheckpointError, InputError
from align_cbrl.estimators.search import Halving, exchange_ascent, scatter, successive_halving
from align_cbrl.problem import Problem
from align_cbrl.runs.config import fingerprint, to_dict
from align_cbrl.runs.files import write_whole
from align_cbrl.runs.interrupt import end_with_parent
from align_cbrl.runs.run_folder import read_kept
from toy_cmdp.estimators.climbs import ExactClimb, SampledClimb
from toy_cmdp.estimators.plug_in import PlugIn, TransitionMemory
from toy_cmdp.followers.exact import require_exact
from toy_cmdp.problems.four_rooms import GOALS, Goals

GROWING = ("temperatures", "prices", "seeds", "processes")
"""Settings that may differ when a table is resumed: it may be larger, or faster."""
_HORIZON = 200  # longest sampled path; one that is cut loses what is worth 0.99^200 of its return


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How the winner of a search is improved by exchanges.

    Attributes:
        heaviest: how many of its largest weights are moved.
        steps: leader steps after each exchange.
        learning_rate: Adam's in these steps.
    """

    heaviest: Count = 4
    steps: Count = 60
    learning_rate: Positive = 0.05


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """The cells of the table and the search in each. See table.yaml.

    Raises:
        InputError: an empty list, a number that is not positive, or exchanges in a search from samples, which they
            would decide by exact values.
    """

    temperatures: tuple[float, ...] = (0.001, 0.003, 0.005)
    prices: tuple[float, ...] = (1.0, 3.0, 5.0)
    seeds: tuple[int, ...] = tuple(range(10))
    starts: int = 32
    scale: float = 5.0
    learning_rate: float = 0.2
    halving: Halving = dataclasses.field(default_factory=Halving)
    exchange: Exchange | None = None
    environment_steps: int | None = None
    processes: int = 2

    def __post_init__(self) -> None:
        for name in ("temperatures", "prices", "seeds"):
            if not getattr(self, name):
                raise InputError(f"{name}: expected at least one")
        for name in ("starts", "processes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.exchange is not None and self.environment_steps is not None:
            raise InputError(
                "exchange: looks at exact values, which a search from samples must not; set exchange or "
                "environment_steps to null"
            )


@dataclasses.dataclass(frozen=True)
class Unit:
    """One search: a cell of the table and a seed."""

    temperature: float
    price: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"temperature-{self.temperature:g}-price-{self.price:g}-seed-{self.seed}"


def units(config: TableConfig) -> list[Unit]:
    """Every cell with every seed, cell by cell."""
    return [Unit(t, p, s) for t in config.temperatures for p in config.prices for s in config.seeds]


def search(unit: Unit, config: TableConfig, slip: float, goals: Goals = GOALS) -> dict[str, Any]:
    """One search from scattered starts; the winner's exact value is looked at when all is decided.

    Returns:
        `temperature`, `price`, `seed`, `value` (exact, of the winner), `halved` (its value before exchanges),
        `exchanges` (how many were made), `best_start` (its number), `weights` [105],
        `curve` (one [leader step, best, median] for every ten leader steps, over the leaders still climbing; values are
        exact or those in the fitted model, whichever the search decides by), `leader_steps` (of all leaders together),
        `environment_steps` (mean of a leader step; None with exact gradients), and seconds of the processor: `seconds`,
        of which `exchange_seconds` for exchanges.
    """
    began = time.process_time()
    sampled = config.environment_steps is not None
    problems = []
    for start in range(config.starts):
        problem = toy_cmdp.four_rooms(
            temperature=unit.temperature, price=unit.price, slip=slip, horizon=_HORIZON if sampled else 1, goals=goals
        )
        scatter(problem, config.scale, seed=unit.seed, start=start)
        problems.append(problem)
    steps, rate = config.halving.steps, config.learning_rate
    if config.environment_steps is None:
        climb: ExactClimb | SampledClimb = ExactClimb(problems, steps=steps, learning_rate=rate)
    else:
        memory = TransitionMemory()  # the fines do not move the transitions: those of all leaders and steps count

        def estimator(joint: Problem) -> PlugIn:
            cmdp = require_exact(joint.follower).cmdp
            # Undamped: one factor for all leaders would tell Adam nothing, and with the memory there is little noise.
            return PlugIn(cmdp, shrinkage=0.0, damping=0.0, memory=memory)

        climb = SampledClimb(
            problems,
            steps=steps,
            learning_rate=rate,
            estimator=estimator,
            environment_steps=config.environment_steps,
            seed=unit.seed,
        )
    curve: list[list[float]] = []

    def on_values(step: int, values: Tensor) -> None:
        if step % 10 == 0:
            curve.append([step, float(values.max()), float(values.median())])

    winner = successive_halving(climb, config.starts, config.halving, on_values=on_values)
    found = problems[winner]
    halved, made, halving_ended = toy_cmdp.leader_value(found).item(), 0, time.process_time()
    if config.exchange is not None:
        made = _exchange(found, config.exchange)
    ended = time.process_time()
    return {
        **dataclasses.asdict(unit),
        "value": toy_cmdp.leader_value(found).item(),
        "halved": halved,
        "exchanges": made,
        "best_start": winner,
        "weights": found.parameters[0].tolist(),
        "curve": curve,
        "leader_steps": config.halving.cost(config.starts),
        "environment_steps": statistics.fmean(climb.used) if isinstance(climb, SampledClimb) else None,
        "seconds": ended - began,
        "exchange_seconds": ended - halving_ended,
    }


def _exchange(problem: Problem, settings: Exchange) -> int:
    """The number of exchanges that `problem`'s leader is improved by."""

    def climb() -> float:
        steps = settings.steps
        return ExactClimb([problem], steps=steps, learning_rate=settings.learning_rate).advance(steps).item()

    return exchange_ascent(problem, lambda: toy_cmdp.leader_value(problem).item(), climb, heaviest=settings.heaviest)


def run_units(config: TableConfig, slip: float, goals: Goals, out: Path, resume: bool) -> list[dict[str, Any]]:
    """All searches, each in a file of its own under `out`/units; with `resume` those that are there are kept.

    What a search finds does not depend on the number of processes, nor on who else runs.

    Raises:
        CheckpointError: `out` holds searches of another configuration.
    """
    folder = out / "units"
    folder.mkdir(parents=True, exist_ok=True)
    every = units(config)
    settings = to_dict(config)
    for name in GROWING:
        del settings[name]
    mark = fingerprint({**settings, "slip": slip, "goals": goals})
    done: dict[Unit, dict[str, Any]] = {}
    for unit in every:
        record = _read(folder / f"{unit.name}.json") if resume else None
        if record is None:
            continue
        if record["fingerprint"] != mark:
            raise CheckpointError(
                f"{folder / unit.name}.json belongs to another configuration: resume with the one it was made with, "
                "or choose another --out"
            )
        done[unit] = record
    missing = [unit for unit in every if unit not in done]
    with tqdm(total=len(every), initial=len(done), desc="searches") as bar:
        for unit, record in _results(missing, config, slip, goals):
            done[unit] = {**record, "fingerprint": mark}
            write_whole(folder / f"{unit.name}.json", json.dumps(done[unit]) + "\n")
            bar.update()
            bar.set_postfix(value=f"{record['value']:.3f}", refresh=False)
    return [done[unit] for unit in every]


def read_units(config: TableConfig, out: Path) -> list[dict[str, Any]]:
    """The searches of a finished table, in its order.

    Raises:
        InputError: one is missing.
    """
    records = []
    for unit in units(config):
        record = _read(out / "units" / f"{unit.name}.json")
        if record is None:
            raise InputError(f"{out / 'units'}: expected {unit.name}.json, which is missing; resume the run")
        records.append(record)
    return records


def rows(records: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Mean, standard error, minimum, median and maximum of the exact value over seeds, one row a cell.

    Example:
        >>> two = [{"temperature": 0.001, "price": 1.0, "value": v} for v in (1.0, 3.0)]
        >>> rows(two)[0]["mean"], rows(two)[0]["se"]
        (2.0, 1.0)
    """
    cells: dict[tuple[float, float], list[float]] = {}
    for record in records:
        cells.setdefault((record["temperature"], record["price"]), []).append(record["value"])
    return [
        {
            "temperature": temperature,
            "price": price,
            "mean": statistics.fmean(values),
            "se": statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan,
            "min": min(values),
            "median": statistics.median(values),
            "max": max(values),
        }
        for (temperature, price), values in cells.items()
    ]


def _results(
    missing: Sequence[Unit], config: TableConfig, slip: float, goals: Goals
) -> Iterator[tuple[Unit, dict[str, Any]]]:
    if config.processes == 1 or len(missing) < 2:
        for unit in missing:
            yield unit, search(unit, config, slip, goals)
        return
    context = multiprocessing.get_context("spawn")  # a forked process would inherit threads of torch's
    with ProcessPoolExecutor(config.processes, mp_context=context, initializer=_begin_worker) as pool:
        jobs = {pool.submit(search, unit, config, slip, goals): unit for unit in missing}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            for worker in multiprocessing.active_children():  # a search that is not finished is begun again
                worker.kill()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker() -> None:
    """One thread a process; and no process outlives the one that started it, which may be killed."""
    torch.set_num_threads(1)
    end_with_parent()


def _read(path: Path) -> dict[str, Any] | None:
    record: dict[str, Any] | None = read_kept(path)
    return record
