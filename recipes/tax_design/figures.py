"""Figures of tax design: rates and welfare over time; what households do, and where that takes them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cbrl import InputError, Problem
from align_cbrl.runs.charts import COLOURS, Panel, mean_curve
from toy_cmdp.problems.tax_design import TaxLeader
from toy_cmdp.referee.exact import exact_world
from toy_cmdp.tables.transition import policy_system

_SHOWN = (-30.0, 60.0)  # where households are nearly always
_RATES = {"vat_1": "VAT, good 1", "vat_2": "VAT, good 2", "vat_3": "VAT, good 3", "tau": "income tax"}
_HOUSEHOLDS = {"objective_0": "household 1", "objective_1": "household 2"}
_LEGEND = {"frameon": False, "fontsize": 9.5, "handlelength": 1.6, "labelcolor": "#22272e"}


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """Exact best responses of both households.

    Attributes:
        assets: [S].
        hours: [C, S], mean hours of work.
        goods: [C, S, 3], mean quantities consumed.
        density: [C, S], discounted distribution of assets, per unit of assets.
    """

    assets: Tensor
    hours: Tensor
    goods: Tensor
    density: Tensor


def behaviour(problem: Problem) -> Behaviour:
    """What households do at the leader's present rates."""
    leader, discount = problem.leader, problem.objective.discount
    assert isinstance(leader, TaxLeader)
    with torch.no_grad():
        world = exact_world(problem)
        system = policy_system(world.tables.detach().transition, discount * world.policy)
        visits = (1 - discount) * system.solve(world.tables.initial, transpose=True)
        return Behaviour(
            assets=leader.assets,
            hours=world.policy @ leader.hours,
            goods=torch.einsum("csa,cag->csg", world.policy, leader.consumed()),
            density=visits / (leader.assets[1] - leader.assets[0]),
        )


def progress(logs: Sequence[Sequence[dict[str, Any]]]) -> list[Panel]:
    """Rates and the two households' welfare before each step, over the runs of all seeds."""
    panels = []
    for names, title, label in ((_RATES, "Tax rates", "rate"), (_HOUSEHOLDS, "Discounted welfare", "J")):
        drawn = {
            shown: mean_curve([{row["step"]: row.get(name) for row in rows} for rows in logs])
            for name, shown in names.items()
        }
        note = "; ".join(f"{shown}: {remark}" for shown, (_, remark) in drawn.items() if remark)
        panels.append(Panel(title, "leader step", label, {n: curve for n, (curve, _) in drawn.items()}, note=note))
    return panels


def behaviour_png(path: Path, before: Behaviour, after: Behaviour) -> Path:
    """One row a household: hours, consumption and assets, before (dashed) and after (solid).

    Raises:
        InputError: matplotlib is not installed.
    """
    shown = (before.assets >= _SHOWN[0]) & (before.assets <= _SHOWN[1])
    assets = before.assets[shown].tolist()
    households = len(before.hours)
    with _canvas(path, (11.4, 3.0 * households)) as canvas:
        from matplotlib.lines import Line2D

        grid = canvas.subplots(households, 3, sharex=True, sharey="col", squeeze=False)
        for c, row in enumerate(grid):
            for state, style, strength in ((before, "--", 0.75), (after, "-", 1.0)):
                curves = [
                    [(state.hours[c], COLOURS[0])],
                    [(state.goods[c, :, good], COLOURS[good]) for good in range(3)],
                    [(state.density[c], COLOURS[0])],
                ]
                for axes, pairs in zip(row, curves, strict=True):
                    for values, colour in pairs:
                        axes.plot(assets, values[shown].tolist(), style, color=colour, linewidth=1.8, alpha=strength)
            titles = (f"Household {c + 1}: hours of work", "consumption", "distribution of assets")
            for axes, title in zip(row, titles, strict=True):
                _dress(axes, title)
        for axes in grid[-1]:
            axes.set_ylim(bottom=0)  # when all rows are drawn: they share the axis
            axes.set_xlabel("assets", color="#57606a")
        dashes = [Line2D([], [], color=COLOURS[0], linestyle=style, linewidth=1.8) for style in ("--", "-")]
        goods = [Line2D([], [], color=COLOURS[good], linewidth=1.8) for good in range(3)]
        grid[0][0].legend(dashes, ["before", "after"], **_LEGEND)
        grid[0][1].legend(goods, [f"good {good + 1}" for good in range(3)], **_LEGEND)
    return path


@contextlib.contextmanager
def _canvas(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure that is written to `path` in the end."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("figures need matplotlib, which is not installed: pip install 'align-cbrl[plots]'") from error
    with rc_context({"font.family": "sans-serif", "font.size": 10.5, "axes.titlesize": 11.5}):
        canvas = Figure(figsize=size, dpi=190, layout="constrained", facecolor="white")
        FigureCanvasAgg(canvas)
        yield canvas
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, format="png")


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", color="#22272e", pad=8)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b9bfc6")
    axes.tick_params(colors="#57606a", length=0)
    axes.margins(x=0.02)
