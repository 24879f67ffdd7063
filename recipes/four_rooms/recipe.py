"""HPGD on Four Rooms, with the exact hypergradient or from sampled paths."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import torch

import toy_cmdp
from align_cbrl import HPGD, HPGDConfig, Hypergradient, InputError, PolicyResponse
from align_cbrl.config import fingerprint, to_dict
from align_cbrl.metrics import MetricsLog
from align_cbrl.report import Figure, Panel, Section, Table, curves_png, write_report


@dataclasses.dataclass(frozen=True)
class Config:
    """See config.yaml. Raises InputError for a number of paths that is not positive."""

    seed: int = 0
    temperature: float = 0.001
    price: float = 1.0
    slip: float = 0.44
    exact: bool = True
    steps: int = 400
    learning_rate: float = 0.1
    paths: int = 50

    def __post_init__(self) -> None:
        if self.paths < 1:
            raise InputError(f"paths: expected a positive number, got {self.paths}")


def run(config: Config, out: Path, resume: bool) -> None:
    """Ascend the leader's value; write metrics.jsonl, summary.json, weights.json, curves.png and report.html.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    began = time.perf_counter()
    problem = toy_cmdp.four_rooms(
        temperature=config.temperature,
        price=config.price,
        slip=config.slip,
        seed=config.seed,
        horizon=1 if config.exact else None,  # the exact gradient needs no paths
    )
    hypergradient: Hypergradient = PolicyResponse(toy_cmdp.ExactCritic())
    if config.exact:
        hypergradient = toy_cmdp.ImplicitHypergradient()
    start = toy_cmdp.leader_value(problem).item()
    optimizer = torch.optim.Adam(problem.parameters, lr=config.learning_rate, maximize=True)
    loop = HPGDConfig(
        steps=config.steps,
        contexts_per_step=1 if config.exact else config.paths,
        group_size=1,
        max_gradient_norm=None if config.exact else 1.0,
        seed=config.seed,
        checkpoint_every=20,
    )
    settings = {
        name: value for name, value in to_dict(config).items() if name != "steps"
    }  # a resumed run may be longer
    HPGD(problem, optimizer, hypergradient, loop, out, fingerprint=fingerprint(settings)).run(resume=resume)

    value = toy_cmdp.leader_value(problem).item()
    row = {"temperature": config.temperature, "price": config.price, "start": start, "value": value}
    weights = torch.cat([p.detach().flatten() for p in problem.parameters]).tolist()
    (out / "weights.json").write_text(json.dumps(weights) + "\n", encoding="utf-8")
    summary = {
        "recipe": "four_rooms",
        "rows": [row],
        "seconds": time.perf_counter() - began,
        "config": to_dict(config),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _report(out, config, row)
    print(f"exact leader value: {start:.4f} at the start, {value:.4f} after {config.steps} steps")
    print(f"report: {out / 'report.html'}")


def _report(out: Path, config: Config, row: dict[str, float]) -> None:
    log = MetricsLog.read(out / "metrics.jsonl")
    label = "exact" if config.exact else f"estimate from {config.paths} paths"
    values = ([r["step"] for r in log], [r["objective"] for r in log])
    curves_png(out / "curves.png", [Panel("Leader's value before each step", "leader step", "J", {label: values})])
    write_report(
        out / "report.html",
        title="Four Rooms",
        subtitle=f"lambda {config.temperature}, price {config.price}, slip {config.slip}, seed {config.seed}",
        sections=[
            Section(
                "Result",
                "Exact expected discounted return of the leader, from the start.",
                [
                    Table(list(row), [[f"{v:.4g}" for v in row.values()]]),
                    Figure(out / "curves.png", "Leader's value against leader steps."),
                ],
            )
        ],
    )
