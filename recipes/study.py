"""A study: seeds side by side, finished parts found again, tables and curves over seeds, one report.

A recipe brings its configuration, what is done for one seed, and what is compared; the rest is here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from align_cbrl import InputError, RunStopped
from align_cbrl.checks import Count, Whole, check
from align_cbrl.runs.charts import Panel, curves_png, mean_curve
from align_cbrl.runs.config import load_config
from align_cbrl.runs.facts import PRACTICAL_OF_JUDGE
from align_cbrl.runs.files import read_json, sync_tree
from align_cbrl.runs.imports import load_recipe, recipe_of
from align_cbrl.runs.interrupt import Interrupt, acting_interrupt, end_with_parent, noted_interrupt, pass_on
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.preflight import Preflight
from align_cbrl.runs.report import Charts, Intervals, Item, Sample, Section, Table
from align_cbrl.runs.run_folder import claim, read_kept, read_summary, write_json, write_summary
from align_cbrl.runs.run_report import write_run_report

from .statistics import counted, interval, mean_and_error, shown

FRESH_SEED = 1_000_003
"""Added to the seed for a fresh follower: other prompts in another order, other samples."""

Parts = Mapping[str, Sequence[Mapping[str, Any]]]
"""The kept parts of all seeds, by name."""


@dataclasses.dataclass(frozen=True)
class SeedSettings:
    """Which seeds a study has, and how many run at a time.

    Attributes:
        seeds: of the study.
        jobs: seeds at a time; null: one per core.
    """

    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    jobs: int | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            raise InputError("seeds: expected at least one, got none")
        check("seeds", self.seeds, list[Whole])
        check("jobs", self.jobs, Count | None)


# ---------------------------------------------------------------------------------------------------- running


def measured(file: Path, count: int, measure: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of problems 0, ..., count - 1, one line each in `file`; those that are there are not measured again."""
    done = len(MetricsLog.read(file)) if file.exists() else 0
    with MetricsLog(file) as log:
        for number in range(done, count):
            log.append({"problem": number, **measure(number)})
            print(f"problem {number + 1} of {count}", flush=True)
    return MetricsLog.read(file)


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned, from `file` if it is there; made, and kept whole with the `seconds` it took, otherwise.

    What `make` wrote into the file's folder is on the disk before the file is.
    """
    found: dict[str, Any] | None = read_kept(file)
    if found is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        made = {**make(), "seconds": time.perf_counter() - began}
        sync_tree(file.parent)
        write_json(file, made)
        found = read_json(file)
    return found


USAGE = "judge_usage.json"
"""In a seed's folder: what was spent on a judge that is paid by the request."""

Work = Callable[[Any, int, Path, Path], None]
"""work(config, seed, folder of the seed, cache): one seed of a study, from wherever it stopped."""


def each_seed(work: Work, config: Any, out: Path, seeds: Sequence[int], jobs: int | None) -> None:
    """Do `work` for every seed, in `out`/seed-N, several at a time.

    Args:
        work: a function of a module.
        config: handed on.
        out: the run's folder; models that runs share are cached beside it.
        seeds: of the study.
        jobs: processes; None for one per core. With one, everything happens in this process.
    """
    jobs = min(len(seeds), jobs or os.cpu_count() or 1)
    tasks = [(work, config, seed, out / f"seed-{seed}", out.parent / "cache", jobs) for seed in seeds]
    if jobs == 1:
        for task in tasks:
            _one_seed(task)
        return
    # A new interpreter each: torch's threads do not survive a fork. It has to know a recipe that was loaded from a
    # folder before it can unpickle anything of it.
    pool = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(recipe_of(work),)
    )
    with acting_interrupt(first=pass_on):
        try:
            with pool:
                list(pool.map(_one_seed_of_many, tasks))
        except BrokenProcessPool as error:
            raise RunStopped("a worker process ended unexpectedly, killed perhaps for want of memory") from error


class _Worker:
    """What a worker process knows of signals: between two seeds they are noted, within one they act."""

    def __init__(self) -> None:
        self._handlers = contextlib.ExitStack()  # until the process ends
        self.interrupt = Interrupt()

    def begin(self, recipe: str | None) -> None:
        """End with the process that started this one, and know a recipe that was loaded from a folder."""
        end_with_parent()
        self.interrupt = self._handlers.enter_context(noted_interrupt())
        load_recipe(recipe)

    def one_seed(self, task: tuple[Work, Any, int, Path, Path, int]) -> None:
        """As `_one_seed`, unless the run was asked to stop."""
        if self.interrupt.asked:
            raise self.interrupt.stop()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // task[-1]))
        try:
            with acting_interrupt(first=self._note):
                _one_seed(task)
        except KeyboardInterrupt:  # also one that leader steps noted for themselves; the next seed waits in the queue
            self.interrupt.asked = True
            raise

    def _note(self, number: int) -> None:
        self.interrupt.asked, self.interrupt.signal = True, number


_worker = _Worker()


def _begin_worker(recipe: str | None) -> None:
    _worker.begin(recipe)


def _one_seed_of_many(task: tuple[Work, Any, int, Path, Path, int]) -> None:
    _worker.one_seed(task)


def _one_seed(task: tuple[Work, Any, int, Path, Path, int]) -> None:
    work, config, seed, folder, cache, _ = task
    folder.mkdir(parents=True, exist_ok=True)
    work(config, seed, folder, cache)


@dataclasses.dataclass(frozen=True)
class Study:
    """A recipe over seeds.

    Attributes:
        recipe: its name.
        config: its configuration, a dataclass with the fields of `SeedSettings`.
        one_seed: does everything for one seed, in parts that are `kept`.
        summarize: maps (config, out) to what summary.json holds besides the configuration. Under `rows`, one dictionary
            for each policy, with `name` and figures; under `comparisons`, intervals by name.
        sections: maps (config, out, summary) to the sections of the report.
        title: maps (config, summary) to the report's title and subtitle.
        lines: maps a summary to what is printed below its tables.
        labels: names of the rows, as tables show them.
        figures: names of the figures, as tables show them.
        aims: which figures are better when they are "largest" or "smallest"; `align-cbrl compare` marks the best.
        best_by: the figure whose best policy is set off in the table; None where rows are not to be ranked.
    """

    recipe: str
    config: type[Any]
    one_seed: Work
    summarize: Callable[[Any, Path], dict[str, Any]]
    sections: Callable[[Any, Path, dict[str, Any]], list[Section]]
    title: Callable[[Any, dict[str, Any]], tuple[str, str]]
    figures: Mapping[str, str]
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lines: Callable[[dict[str, Any]], list[str]] = lambda summary: []
    aims: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"judge": "largest"})
    best_by: str | None = None

    def preflight(self, config: Any, notes: Preflight) -> None:
        """What every study needs; the `preflight` of a recipe that needs no more."""
        notes.need_package("matplotlib", "plots", "curves")

    def run(self, config: Any, out: Path, resume: bool) -> None:
        """Every seed, then summary.json, report.html and a table on the terminal.

        Args:
            config: an instance of the configuration.
            out: the run's folder.
            resume: unused: finished parts are found again, and the caller guards folders that were not meant to be.

        Raises:
            CheckpointError: `out` holds a run of another configuration.
        """
        claim(
            out,
            config,
            recipe=self.recipe,
            free=["jobs", "tracking", *(f"judge.{name}" for name in PRACTICAL_OF_JUDGE)],
        )
        each_seed(self.one_seed, config, out, config.seeds, config.jobs)
        usage = judge_usage(out, config.seeds)
        found = {**self.summarize(config, out), "aims": dict(self.aims)}
        write_summary(out, {**found, **({"judge_usage": usage} if usage else {})})
        self.report(out)
        self.show(out)

    def report(self, out: Path) -> None:
        """Write report.html and its curves again, from what a finished run left in `out`."""
        summary, config = read_summary(out), load_config(self.config, out / "config.yaml")
        title, subtitle = self.title(config, summary)
        sections = [*self.sections(config, out, summary), *judged(summary), minutes(out, config.seeds)]
        write_run_report(out, title=title, subtitle=subtitle, sections=sections)

    def show(self, out: Path) -> None:
        """Print the rows and comparisons of a finished run."""
        summary = read_summary(out)
        shown_figures = [f for f in self.figures if any(row.get(f) is not None for row in summary["rows"])]
        width = 2 + max(len(self._label(row)) for row in summary["rows"])
        print(f"\n{'':<{width}}" + "".join(f"{self.figures[f]:>17}" for f in shown_figures))
        for row in summary["rows"]:
            print(f"{self._label(row):<{width}}" + "".join(f"{_cell(row.get(f)):>17}" for f in shown_figures))
        comparisons = summary.get("comparisons", {})
        if comparisons:
            print()
        for name, value in comparisons.items():
            print(f"{name}: {shown(value)}")
        for line in self.lines(summary):
            print(line)
        if "judge_usage" in summary:
            print(f"judge: {usage_in_words(summary['judge_usage'])}")
        print(f"report: {out / 'report.html'}")

    def result(self, summary: Mapping[str, Any], caption: str) -> list[Item]:
        """The rows of a summary, the best of them set off, and its comparisons where there are any.

        Args:
            summary: what summary.json holds.
            caption: what is measured; over what means and errors are follows by itself.
        """
        shown_figures = [f for f in self.figures if any(row.get(f) is not None for row in summary["rows"])]
        rows = [[self._label(row), *(_cell(row.get(f)) for f in shown_figures)] for row in summary["rows"]]
        several = len(summary["config"]["seeds"]) > 1
        caption += f" Mean and standard error over {'seeds' if several else 'test prompts, of one seed'}."
        known = [row for row in summary["rows"] if self.best_by and _mean(row.get(self.best_by)) is not None]
        most = max((_mean(row[self.best_by]) or 0.0 for row in known), default=None)
        best = [self._label(row) for row in known if _mean(row[self.best_by]) == most]
        highlight = best[0] if len(best) == 1 else None
        if highlight is not None:
            caption += f" Set off: the highest {self.figures[self.best_by or '']}, be it by chance."
        found: list[Item] = [Table(["policy", *(self.figures[f] for f in shown_figures)], rows, caption, highlight)]
        if summary.get("comparisons"):
            found.append(compared(summary["comparisons"]))
        return found

    def _label(self, row: Mapping[str, Any]) -> str:
        return self.labels.get(row["name"], row["name"])


# ------------------------------------------------------------------------------------------------ summarizing


def parts_of(out: Path, seeds: Sequence[int], *names: str) -> dict[str, list[dict[str, Any]]]:
    """The parts of every seed, as `kept` left them, by name."""
    return {name: [read_json(out / f"seed-{seed}" / f"{name}.json") for seed in seeds] for name in names}


def judge_usage(out: Path, seeds: Sequence[int]) -> dict[str, float] | None:
    """What was spent on a judge that is paid by the request, over all seeds; None for another judge."""
    files = [file for seed in seeds if (file := out / f"seed-{seed}" / USAGE).exists()]
    # Seeds that share a cache have one account; the largest is the latest.
    last = {found["cache"]: found for found in sorted(map(read_json, files), key=lambda found: found["calls"])}
    names = [name for name in next(iter(last.values()), {}) if name != "cache"]
    known = [name for name in names if all(found[name] is not None for found in last.values())]
    return {name: sum(found[name] for found in last.values()) for name in known} or None


def usage_in_words(usage: Mapping[str, float]) -> str:
    """What was spent, in one line.

    Example:
        >>> usage_in_words({"calls": 1200, "failed": 3, "prompt_tokens": 90000, "completion_tokens": 2400, "cost": 0.9,
        ...     "unread": 2, "fallbacks": 1})
        '1,200 calls answered, 3 failed; 90,000 + 2,400 tokens; cost 0.9; 2 replies without a score, 1 fallback scores'
    """
    cost = f"; cost {usage['cost']:.4g}" if "cost" in usage else ""
    return (
        f"{usage['calls']:,} calls answered, {usage['failed']:,} failed; {usage['prompt_tokens']:,} + "
        f"{usage['completion_tokens']:,} tokens{cost}; {usage['unread']:,} replies without a score, "
        f"{usage['fallbacks']:,} fallback scores"
    )


def over_seeds(parts: Sequence[Mapping[str, Any]], figure: str) -> dict[str, float] | None:
    """Mean and standard error of a figure over seeds; of one seed, its own, over prompts. None where it is missing."""
    if figure not in parts[0]:
        return None
    if len(parts) == 1:
        own: dict[str, float] = parts[0][figure]
        return own
    return mean_and_error([part[figure]["mean"] for part in parts])


def rows_of(parts: Parts, figures: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each policy: its name, and its figures over seeds."""
    return [{"name": name, **{f: over_seeds(runs, f) for f in figures}} for name, runs in parts.items()]


def difference(parts: Parts, first: str, second: str, figure: str = "judge") -> dict[str, Any]:
    """A figure of one policy less that of another: mean, error and 95 % interval, and `over` what.

    It is paired by seed. With one seed it is paired by test prompt, where both parts have the figure `by_prompt`: what
    other prompts would say of these two policies, and nothing about another seed.
    """
    if len(parts[first]) == 1:
        of_prompts = [parts[name][0].get("by_prompt", {}).get(figure) for name in (first, second)]
        if all(of_prompts):
            values = [a - b for a, b in zip(*of_prompts, strict=True)]
            return {**interval(values), "over": "prompts"}
    pairs = zip(parts[first], parts[second], strict=True)
    return {**interval([a[figure]["mean"] - b[figure]["mean"] for a, b in pairs]), "over": "seeds"}


# -------------------------------------------------------------------------------------------------- reporting


def seeds_in_words(config: Any) -> str:
    """How many seeds, as in "5 seeds"."""
    return counted(len(config.seeds), "seed")


def compared(comparisons: Mapping[str, Mapping[str, Any]], units: str = "seeds") -> Intervals:
    """Differences by name, as `statistics.interval` or `difference` gave them, drawn on one scale.

    Args:
        comparisons: by name.
        units: over what they are, unless they say so themselves.
    """
    kinds = [
        "over test prompts of one seed, which say nothing about another seed" if over == "prompts" else f"over {over}"
        for over in sorted({f.get("over", units) for f in comparisons.values() if f["low"] is not None})
    ]
    return Intervals(
        [(name, found["mean"], found["low"], found["high"]) for name, found in comparisons.items()],
        f"Paired differences and their 95 % intervals (Student's t), {'; '.join(kinds)}."
        if kinds
        else f"Differences without an interval: more {units} would give one.",
    )


def judged(summary: Mapping[str, Any]) -> list[Section]:
    """What was spent on a judge that is paid by the request; nothing for another judge."""
    if "judge_usage" not in summary:
        return []
    return [Section("What the judge was asked", f"{usage_in_words(summary['judge_usage'])}.")]


def minutes(out: Path, seeds: Sequence[int]) -> Section:
    """How long every part took, over all seeds."""
    taken: dict[str, list[float]] = {}
    for seed in seeds:
        for file in sorted((out / f"seed-{seed}").glob("*.json")):
            part = read_json(file)
            if isinstance(part, dict) and "seconds" in part:
                taken.setdefault(file.stem, []).append(part["seconds"] / 60)
    rows = [[name, *(f"{f(values):.1f}" for f in (sum, max))] for name, values in taken.items()]
    total = sum(sum(values) for values in taken.values())
    caption = f"{total:.1f} minutes in all, of {counted(len(seeds), 'seed')}; seeds may have run side by side."
    return Section("Minutes", "", [Table(["part", "all seeds", "longest seed"], rows, caption)])


def curves(
    out: Path, panels: Sequence[tuple[str, str, str, str, str]], runs: Mapping[str, Sequence[Any]], log_x: bool = False
) -> Charts:
    """A panel for each (title, x label, y label, x, y), with a line for each of the runs that has both; curves.png too.

    Args:
        out: where curves.png is drawn.
        panels: as above; x and y are keys of a point.
        runs: by name, one curve of points for each seed. The mean is drawn where all seeds have a point.
        log_x: whether the x axes are logarithmic.
    """
    drawn = []
    for title, x_label, y_label, x, y in panels:
        lines, remarks = {}, []
        for name, of_seeds in runs.items():
            points = [{p[x]: p[y] for p in curve if p.get(x) is not None and y in p} for curve in of_seeds]
            if any(value is not None for seed in points for value in seed.values()):
                lines[name], remark = mean_curve(points)
                remarks += [f"{name}: {remark}"] if remark else []
        drawn.append(Panel(title, x_label, y_label, lines, log_x=log_x, note="; ".join(remarks)))
    curves_png(out / "curves.png", drawn)
    single = all(len(of_seeds) == 1 for of_seeds in runs.values())
    return Charts(drawn, "Of one seed." if single else "Mean over seeds, and one standard error around it.")


def samples(parts: Parts, labels: Mapping[str, str], names: Sequence[str]) -> list[Sample]:
    """What several policies made of the same prompts, with the scores that are known; of the first seed."""
    by_name = {labels[name]: parts[name][0]["samples"] for name in names if name in parts}
    first = next(iter(by_name.values()))
    return [
        Sample(
            first[i]["prompt"],
            {name: found[i]["completion"] for name, found in by_name.items()},
            {name: found[i]["scores"] for name, found in by_name.items() if "scores" in found[i]},
        )
        for i in range(len(first))
    ]


def described(reward: Mapping[str, Any]) -> str:
    """What a leader says of itself, in one line."""
    return ", ".join(
        f"{name.removeprefix('weight of ')} {value:+.2f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in reward.items()
    )


def _mean(value: Mapping[str, float] | None) -> float | None:
    return None if value is None or value["mean"] is None or not math.isfinite(value["mean"]) else value["mean"]


def _cell(value: Mapping[str, float] | None) -> str:
    return "–" if value is None or _mean(value) is None else shown(value)
