"""The report of a run's folder: what its recipe found, how its leaders climbed, and what it was made with."""

from __future__ import annotations

import datetime
import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align_cbrl.runs.charts import Panel, mean_curve
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.report import Cell, Charts, Details, Item, Section, Table, write_report
from align_cbrl.runs.run_folder import read_about

Logs = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
"""Rows of `HPGD.history` by the name of the loop and the seed, each "" where a folder has no such name."""

_SAMPLER = 6.9  # nats of `sampler_evidence` from which an alarm is about the sampler (docs/certificate.md)
_EVIDENCE = {
    "gap": "gap at the end (nats)",
    "effective_sample_size": "lowest effective sample size",
    "sampler_evidence": "sampler evidence (nats)",
    "skipped_steps": "steps without a gradient",
    "judge_calls": "completions judged",
}


def write_run_report(out: Path, *, title: str, sections: Sequence[Section], subtitle: str = "") -> Path:
    """Write report.html of a claimed folder: these sections, then the leaders' steps and what the run was made with.

    The page is stamped where the configuration is a smoke test, and begins with the alarms of the leaders' steps.

    Args:
        out: the run's folder, whose page may be moved with it or without it.
        title: of the page.
        sections: of the recipe.
        subtitle: under the title.

    Raises:
        InputError: `out` is no folder of a run, or as `write_report`.
    """
    about, logs = read_about(out), leader_logs(out)
    return write_report(
        out / "report.html",
        title=title,
        subtitle=subtitle,
        sections=[*sections, *leader_sections(logs), made_with(about)],
        stamp="smoke test" if is_smoke(about) else "",
        alarms=alarms(logs),
    )


def is_smoke(about: Mapping[str, Any]) -> bool:
    """Whether a run was started with `--config` of a file that is named a smoke test, whose figures mean nothing.

    Example:
        >>> is_smoke({"sessions": [{"command": "align-cbrl run lqr --config replies_smoke.yaml"}]})
        True
    """
    for session in about["sessions"]:
        words = shlex.split(session["command"])
        given = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
        given += [after for word, after in itertools.pairwise(words) if word == "--config"]
        if any("smoke" in Path(name).stem for name in given):
            return True
    return False


def leader_logs(out: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The leaders' steps below a run's folder: of the run itself, of its seeds, and of the loops in them."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    files = [file for pattern in ("", "seed-*/", "seed-*/*/") for file in out.glob(f"{pattern}metrics.jsonl")]
    for file in sorted(files):
        rows = MetricsLog.read(file)
        if rows and "leader_share" in rows[-1]:  # HPGD's; a follower that trains on a frozen reward has none
            seed, name, *_ = [*file.parent.relative_to(out).parts, "", ""]
            found.setdefault(name, {})[seed.removeprefix("seed-")] = rows
    return found


def alarms(logs: Logs) -> list[str]:
    """A line for every leader whose follower's distance, or whose sampler, has raised an alarm."""
    lines = []
    for name, seeds in logs.items():
        for seed, rows in seeds.items():
            count = sum(bool(row.get("alarm")) for row in rows)
            if not count:
                continue
            evidence = max((row["sampler_evidence"] for row in rows if row.get("sampler_evidence")), default=0.0)
            what = (
                f"completions are not samples of the policy ({evidence:.1f} nats of evidence)"
                if evidence >= _SAMPLER
                else "the follower lags behind its best response, or its weighted samples stand on too few completions"
            )
            lines.append(f"Alarm at {count} of {len(rows)} leader steps{_of(name, seed)}: {what}.")
    return lines


def leader_sections(logs: Logs) -> list[Section]:
    """Learned weights over leader steps, and each leader's evidence; nothing where no leader took steps of HPGD."""
    if not logs:
        return []
    content: list[Item] = []
    if panels := [panel for name, seeds in logs.items() if (panel := _weights(name, seeds)) is not None]:
        content.append(Charts(panels, "Learned weights after each leader step; bands: one standard error over seeds."))
    known = [
        key
        for key in _EVIDENCE
        if any(row.get(key) is not None for of in logs.values() for r in of.values() for row in r)
    ]
    rows = [
        _evidence(name, seed, steps, known)
        for name, seeds in logs.items()
        for seed, steps in sorted(seeds.items(), key=lambda item: (len(item[0]), item[0]))
    ]
    heads = ["leader", "seed", "leader steps", "with an alarm", *(_EVIDENCE[key] for key in known), "share of time"]
    table = Table(
        heads,
        rows,
        "The gap is a lower bound, in expectation, of the divergence from the best response; sampler evidence raises "
        f"an alarm from {_SAMPLER} nats. Share of time: the leader's, of its own and its follower's.",
    )
    return [Section("The leader's steps", "", [*content, table])]


def made_with(about: Mapping[str, Any]) -> Section:
    """The command, versions, commit, seeds and configuration of a run, from its run.json."""
    last = about["sessions"][-1]
    seconds = sum(_seconds(session) for session in about["sessions"])
    commands = list(dict.fromkeys(session["command"] for session in about["sessions"]))
    rows = [
        ["recipe", about["recipe"]],
        *(["command", command] for command in commands),
        *([key, str(value)] for key, value in about.get("seeds", {}).items()),
        ["started", about["sessions"][0]["started"]],
        ["wall time", f"{seconds / 60:.1f} minutes in {_counted(len(about['sessions']), 'session')}"],
        ["commit", commit(last.get("git"))],
        ["versions", ", ".join(f"{name} {version}" for name, version in last["versions"].items() if version)],
        ["platform", last["platform"]],
    ]
    text = yaml.safe_dump(about["config"], sort_keys=False, allow_unicode=True)
    return Section("Made with", "", [Table(["what", "value"], rows), Details("The whole configuration", text)])


def commit(git: Mapping[str, Any] | None) -> str:
    """The commit of a session's checkout, in words."""
    if not git:
        return "not in a checkout"
    return git["commit"][:10] + (" and changes" if git["dirty"] else "")


def _weights(name: str, seeds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Panel | None:
    keys = [key for key in next(iter(seeds.values()))[0] if key == "beta" or key.startswith("weight")]
    drawn = {
        key.removeprefix("weight of "): mean_curve(
            [{row["step"]: row.get(key) for row in rows} for rows in seeds.values()]
        )
        for key in keys
    }
    note = "; ".join(f"{key}: {remark}" for key, (_, remark) in drawn.items() if remark)
    title = f"Learned weights, {name}" if name else "Learned weights"
    curves = {key: curve for key, (curve, _) in drawn.items()}
    return Panel(title, "leader step", "weight", curves, note=note) if curves else None


def _evidence(name: str, seed: str, rows: Sequence[Mapping[str, Any]], known: Sequence[str]) -> list[Cell]:
    def value(key: str) -> Cell:
        values = [row[key] for row in rows if row.get(key) is not None]
        if not values:
            return None
        if key in ("skipped_steps", "judge_calls"):
            return f"{values[-1]:,.0f}"
        return float(
            min(values) if key == "effective_sample_size" else max(values) if key == "sampler_evidence" else values[-1]
        )

    count = sum(bool(row.get("alarm")) for row in rows) if any("alarm" in row for row in rows) else None
    share = f"{rows[-1]['leader_share']:.1%}"
    return [name or "the leader", seed or "–", len(rows), count, *(value(key) for key in known), share]


def _of(name: str, seed: str) -> str:
    return (f" of {name}" if name else "") + (f", seed {seed}" if seed else "")


def _seconds(session: Mapping[str, Any]) -> float:
    """How long a session took; 0 for one that was killed, of which nobody knows."""
    if session["ended"] is None:
        return 0.0
    began, ended = (datetime.datetime.fromisoformat(session[key]) for key in ("started", "ended"))
    return (ended - began).total_seconds()


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")
