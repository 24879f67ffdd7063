"""Figures of Four Rooms: fines on the map, and where the follower spends its time without and with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import toy_cmdp
from align_cbrl.errors import InputError
from align_cbrl.problem import Problem
from toy_cmdp.followers.solve import continuation
from toy_cmdp.problems.four_rooms import GOALS, FourRoomsLeader, Goals
from toy_cmdp.tables.transition import policy_system

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROWS, _COLUMNS = 13, 13
_START, _TARGET = (4, 1), (8, 4)
_WALL, _INK, _SOFT = "#c4cad1", "#22272e", "#57606a"
_FINES, _TIME = "Reds", "Blues"


def occupancy(problem: Problem) -> Tensor:
    """Expected discounted number of steps taken in each cell, sum_t gamma^t Pr(s_t = s), [C, S].

    Example:
        >>> tuple(occupancy(toy_cmdp.four_rooms()).shape)
        (2, 104)
    """
    follower: Any = problem.follower
    with torch.no_grad():
        tables, solution = follower.solve(problem.leader)
        weights = continuation(follower.cmdp, follower.discount, tables.reward) * solution.log_policy.exp()
        return policy_system(tables.transition, weights).solve(tables.initial, transpose=True)


def with_weights(
    weights: Sequence[float] | None, *, temperature: float, price: float, slip: float, goals: Goals = GOALS
) -> Problem:
    """Four Rooms at the given weights, [105]; None stands for no fines at all."""
    problem = toy_cmdp.four_rooms(temperature=temperature, price=price, slip=slip, horizon=1, goals=goals)
    with torch.no_grad():
        if weights is None:
            problem.parameters[0].zero_()[-1] = 100.0  # the whole budget unspent
        else:
            problem.parameters[0].copy_(torch.tensor(weights, dtype=torch.float64))
    return problem


def fines(problem: Problem) -> Tensor:
    """What acting in each cell costs the follower, [S]."""
    assert isinstance(problem.leader, FourRoomsLeader)
    return -problem.leader.incentive().detach()


def before_and_after_png(
    path: Path, weights: Sequence[float], *, temperature: float, price: float, slip: float, goals: Goals = GOALS
) -> Path:
    """Fines, and the follower's occupancy without and with them for each of its goals.

    Raises:
        InputError: matplotlib is not installed.
    """
    led = with_weights(weights, temperature=temperature, price=price, slip=slip, goals=goals)
    bare = with_weights(None, temperature=temperature, price=price, slip=slip, goals=goals)
    before, after = occupancy(bare), occupancy(led)
    panels: list[tuple[str, Tensor, tuple[tuple[int, int], ...], str]] = [("fines", fines(led), goals, _FINES)]
    for context, goal in enumerate(goals):
        panels.append((f"goal {goal}: without fines", before[context], (goal,), _TIME))
        panels.append((f"goal {goal}: with fines", after[context], (goal,), _TIME))
    longest = float(torch.stack([before, after]).max())
    canvas = _canvas(len(panels), 1)
    for i, (title, values, marked, colours) in enumerate(panels):
        axes = canvas.add_subplot(1, len(panels), i + 1)
        image = _map(axes, values, colours, longest if colours == _TIME else None, marked)
        axes.set_title(title, loc="left", fontsize=9.5, color=_INK)
        if i in (0, len(panels) - 1):
            label = "fine" if i == 0 else "discounted steps in the cell"
            canvas.colorbar(image, ax=axes, shrink=0.72, label=label).outline.set_visible(False)
    return _save(canvas, path)


def fines_png(path: Path, cells: Sequence[tuple[str, Sequence[float]]], columns: int, goals: Goals = GOALS) -> Path:
    """The fines of several leaders, each on a map of its own: (title, weights [105]) a map, on one scale.

    Raises:
        InputError: matplotlib is not installed.
    """
    maps = [(title, fines(with_weights(weights, temperature=1.0, price=1.0, slip=0.44))) for title, weights in cells]
    most = max(float(values.max()) for _, values in maps)
    lines = -(-len(maps) // columns)
    canvas = _canvas(columns, lines)
    image, every = None, []
    for i, (title, values) in enumerate(maps):
        axes = canvas.add_subplot(lines, columns, i + 1)
        every.append(axes)
        image = _map(axes, values, _FINES, most, goals)
        axes.set_title(title, loc="left", fontsize=9.5, color=_INK)
    if image is not None:
        canvas.colorbar(image, ax=every, shrink=0.5, label="fine").outline.set_visible(False)
    return _save(canvas, path)


def _canvas(columns: int, lines: int) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("maps need matplotlib, which is not installed: pip install 'align-cbrl[plots]'") from error
    canvas = Figure(figsize=(2.9 * columns + 0.8, 2.9 * lines), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(canvas)
    return canvas


def _map(axes: Axes, values: Tensor, colours: str, top: float | None, goals: Sequence[tuple[int, int]]) -> Any:
    """One quantity of the 104 cells on the map; walls are grey."""
    grid = torch.full((_ROWS, _COLUMNS), torch.nan, dtype=torch.float64)
    for place, (row, column) in enumerate(toy_cmdp.four_rooms_map()):
        grid[row, column] = values[place]
    axes.set_facecolor(_WALL)
    image = axes.imshow(grid.numpy(), cmap=colours, vmin=0, vmax=top)
    marks = [("S", _START), ("T", _TARGET), *(("G", goal) for goal in goals)]
    for mark, (row, column) in marks:
        dark = float(grid[row, column]) > 0.6 * (top or float(values.max()))
        axes.text(
            column,
            row,
            mark,
            ha="center",
            va="center",
            fontsize=8.5,
            fontweight="bold",
            color="white" if dark else _INK,
        )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=_SOFT)
    return image


def _save(canvas: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, format="png")
    return path
