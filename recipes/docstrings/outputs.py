"""What a finished run leaves behind: summary.json, curves.png, report.html, and a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.report import Figure, Panel, Sample, Section, Table, curves_png, write_report
from align_cbrl.runs.run_folder import Rows, read_summary, write_summary

FIGURES = {"judge": "judge", "proxy": "proxy (sd)", "kl": "KL (nats)", "gap": "gap (nats)", "words": "words"}
CURVES = (
    ("judge", "Judge", "score"),
    ("kl", "Divergence from the reference", "nats"),
    ("gap", "Gap to the best response", "nats"),
)
"""Key of a log's rows, title and unit of what is drawn against follower steps."""

LABELS = {
    "base": "base model",
    "plain": "plain RLHF on the proxy",
    "regression": "weights refitted to the judge by regression",
    "random": "random search over weights",
    "hpgd": "HPGD",
    "fresh": "fresh follower on HPGD's reward",
}


def summarize(out: Path, plain: Path, rows: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    """Write summary.json from the evaluated rows (see `evaluate`); `plain` is the folder of plain RLHF's policy."""
    summary = {
        "rows": [{"name": name, **{key: row[key] for key in FIGURES}} for name, row in rows.items()],
        "leader": rows["hpgd"]["leader"],
        "seconds": dict(seconds),
        "plain": str(plain.resolve()),
    }
    write_summary(out, summary)


def report(out: Path) -> None:
    """Write report.html and curves.png from a finished run's folder."""
    summary, rows = read_summary(out), Rows(out / "rows.json").done
    leader, seconds = summary["leader"], summary["seconds"]
    _draw_curves(out)
    gain = rows["hpgd"]["judge"]["mean"] - rows["plain"]["judge"]["mean"]
    kept = rows["fresh"]["judge"]["mean"] - rows["plain"]["judge"]["mean"]
    write_report(
        out / "report.html",
        title="Pleasing the judge, not the proxy",
        subtitle=f"Docstrings, seed {summary['config']['seed']}: HPGD tunes the reward around an RLOO follower.",
        sections=[
            Section(
                "Result",
                f"On test prompts that neither leader nor follower has seen, the judge's score of the tuned policy is "
                f"{gain:+.3f} against plain RLHF on the proxy; a fresh follower trained on the learned, frozen reward "
                f"keeps {kept:+.3f}.\n\nThe leader saw the judge's verdict on {leader['judge_calls']:,} of the "
                f"follower's {leader['completions']:,} completions ({leader['judge_share']:.0%}) and took "
                f"{leader['leader_share']:.1%} of the wall time of tuning.",
                [
                    Table(
                        ["policy", *FIGURES.values()],
                        [[LABELS[name], *(_figure(row[key]) for key in FIGURES)] for name, row in rows.items()],
                        "Mean and standard error over test prompts. The judge scores from 0 to 1. The proxy is in "
                        "standard deviations of the base model's completions of one prompt. The gap is a lower bound, "
                        "in expectation, of the divergence from the best response to the reward the policy was "
                        "trained on.",
                        highlight=LABELS["hpgd"],
                    )
                ],
            ),
            Section("The learned reward", leader["reward"]),
            Section("Curves", "", [Figure(out / "curves.png", "Training completions, batch by batch.")]),
            Section("Six test prompts", "", _samples(rows)),
            Section(
                "How long it took",
                "",
                [Table(["stage", "seconds"], [[name, round(value, 1)] for name, value in seconds.items()])],
            ),
        ],
    )


def print_table(out: Path) -> None:
    """Print the summary that `write_outputs` left in `out`."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    print(f"\n{'':<34}{'judge':>15}{'proxy (sd)':>15}{'KL (nats)':>15}{'gap (nats)':>15}")
    for row in summary["rows"]:
        cells = "".join(f"{row[key]['mean']:>9.3f} ±{row[key]['se']:.3f}" for key in ("judge", "proxy", "kl", "gap"))
        print(f"{LABELS[row['name']]:<34}{cells}")
    leader = summary["leader"]
    print(f"\nlearned reward: {leader['reward']}")
    print(
        f"judge calls: {leader['judge_calls']:,} on {leader['judge_share']:.0%} of the follower's completions; ", end=""
    )
    print(f"leader's share of time: {leader['leader_share']:.1%}")
    print(f"seconds: {', '.join(f'{name} {value:.0f}' for name, value in summary['seconds'].items())}")
    print(f"report: {out / 'report.html'}")


def _figure(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} ± {value['se']:.3f}"


def policy_logs(out: Path) -> dict[str, list[dict[str, Any]]]:
    """By policy, rows with `step` (of the follower) and the keys of `CURVES`, of a run whose summary is written."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    price = summary["config"]["hpgd"]["kl_price"]
    leader = MetricsLog.read(out / "metrics.jsonl")
    return {
        "plain RLHF": MetricsLog.read(Path(summary["plain"]) / "metrics.jsonl"),
        # The leader's objective is the judge's score less the price of divergence.
        "HPGD": [
            {**row, "judge": row["objective"] + price * row["kl"], "step": row["follower_steps"]} for row in leader
        ],
        "fresh follower": MetricsLog.read(out / "fresh" / "metrics.jsonl"),
    }


def _draw_curves(out: Path) -> None:
    logs = policy_logs(out)
    panels = [
        Panel(
            title,
            "follower steps",
            label,
            {n: ([r["step"] for r in log], [r[k] for r in log]) for n, log in logs.items()},
        )
        for k, title, label in CURVES
    ]
    curves_png(out / "curves.png", panels)


def _samples(rows: Mapping[str, Any], count: int = 6) -> list[Sample]:
    shown = [name for name in ("base", "plain", "hpgd", "fresh") if name in rows]
    return [
        Sample(
            rows["base"]["samples"][i]["prompt"],
            {LABELS[name]: rows[name]["samples"][i]["completion"] for name in shown},
            {
                LABELS[name]: f"judge {rows[name]['samples'][i]['judge']:.2f}, "
                f"proxy {rows[name]['samples'][i]['proxy']:+.1f}"
                for name in shown
            },
        )
        for i in range(min(count, len(rows["base"]["samples"])))
    ]
