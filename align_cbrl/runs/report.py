"""A run's report: one self-contained HTML file with its text, tables, curves and samples."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2

from align_cbrl.errors import InputError
from align_cbrl.runs.files import write_whole

Cell = str | float | int | None
_LEVEL_STROKES: tuple[Any, ...] = ((0, (4, 3)), (0, (1, 2)), (0, (8, 2, 1, 2)))
_LEGEND = 4  # names in a panel, above which one legend stands below the picture
COLOURS = ("#2f5d8a", "#c8553d", "#4f8a5b", "#8a6bb1", "#b8892b", "#5b6770")
_SIZES = {1: (5.6, 3.5), 2: (5.2, 3.4), 3: (3.8, 3.0)}  # inches of a panel, by panels in a row
_STROKES = ("-", "--", ":", "-.")  # one more for each round through the colours


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under column heads. Numbers are set to three decimals and aligned; None is a dash.

    Attributes:
        columns: the heads.
        rows: one value a column; a value that is text may hold its own standard error, as "0.71 ± 0.02".
        caption: a line under the table.
        highlight: the first cell of the row to set off, or None.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    highlight: str | None = None


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A heat table: what each row reaches on each column's measure, with each column's best marked.

    Columns are measured in units of their own, so a cell's shade compares it with its column only.

    Attributes:
        corner: above the row names, what rows and columns are, as "trained for / measured by".
        columns: the measures.
        rows: the names of the rows.
        values: one number a column for each row; None, or a number that is not finite, is a dash.
        errors: standard errors in the same shape, or None.
        best: whether the largest or the smallest number is the best, for all columns or for each.
        caption: a line under the table.
    """

    corner: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    errors: Sequence[Sequence[float | None]] | None = None
    best: Literal["largest", "smallest"] | Sequence[Literal["largest", "smallest"]] = "largest"
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A PNG file, embedded, with the caption that is also its description for those who cannot see it."""

    png: Path
    caption: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and what several policies made of it, side by side.

    Attributes:
        prompt: shown as it is, in a fixed-width face.
        completions: by policy.
        notes: by policy, a short line under its completion (its scores); policies may be left out.
    """

    prompt: str
    completions: Mapping[str, str]
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)


Item = Table | Matrix | Figure | Sample
"""What a section shows under its text."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A head, paragraphs (separated by empty lines), and then tables, figures and samples in the order given."""

    title: str
    text: str = ""
    content: Sequence[Item] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
    """One diagram of `curves_png`.

    Attributes:
        title: above the diagram.
        x_label: with the unit, if there is one.
        y_label: likewise.
        curves: by name, (x, y), and optionally (x, y, half-width of a band around y). Values that are not finite, or
            None, leave a gap. A name has one colour in all panels; from the seventh on, another stroke too.
        points: by name, likewise, drawn as dots with error bars.
        levels: horizontal reference lines by name.
        log_x, log_y: whether an axis is logarithmic; what is not positive is then left out.
    """

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, tuple[Sequence[float | None], ...]] = dataclasses.field(default_factory=dict)
    points: Mapping[str, tuple[Sequence[float | None], ...]] = dataclasses.field(default_factory=dict)
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False


def write_report(path: Path, *, title: str, sections: Sequence[Section], subtitle: str = "") -> Path:
    """Write one HTML file that needs no other: the style and the images are inside.

    Raises:
        InputError: a table or matrix row with another number of cells than columns, or an image that is not a readable
            PNG.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    page = environment.get_template("report.html").render(
        title=title, subtitle=subtitle, sections=[_section(section) for section in sections]
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def curves_png(path: Path, panels: Sequence[Panel]) -> Path:
    """Draw the panels side by side, at most three in a row, into a PNG file.

    Raises:
        InputError: there is nothing to draw, the lengths of a curve's values differ, or matplotlib is not installed.
    """
    if not panels:
        raise InputError("curves_png: expected at least one panel")
    for panel in panels:
        for name, values in (*panel.curves.items(), *panel.points.items()):
            if len(values) not in (2, 3) or len({len(v) for v in values}) != 1:
                raise InputError(
                    f"curves_png: panel {panel.title!r}, curve {name!r}: expected (x, y) or (x, y, half-width) of "
                    f"equal lengths, got {[len(v) for v in values]}"
                )
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise InputError("curves need matplotlib, which is not installed: pip install 'align-cbrl[plots]'") from error

    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    with rc_context({"font.family": "sans-serif", "font.size": 10.5, "axes.titlesize": 11.5}):
        width, height = _SIZES[columns]
        canvas = Canvas(
            figsize=(width * columns, height * rows),
            dpi=190,
            layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08),
            facecolor="white",
        )
        FigureCanvasAgg(canvas)
        names = list(dict.fromkeys(name for panel in panels for name in (*panel.curves, *panel.points)))
        pens = {
            name: (COLOURS[i % len(COLOURS)], _STROKES[i // len(COLOURS) % len(_STROKES)])
            for i, name in enumerate(names)
        }
        # Too many for a legend that hides no curve.
        crowded = any(len({*panel.curves, *panel.points, *panel.levels}) > _LEGEND for panel in panels)
        for position, panel in enumerate(panels, start=1):
            _draw(canvas.add_subplot(rows, columns, position), panel, pens, legend=not crowded)
        if crowded:
            shown: dict[str, Any] = {}
            for axes in canvas.axes:
                for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                    shown.setdefault(label, handle)
            canvas.legend(
                list(shown.values()), list(shown), loc="outside lower center", ncols=min(len(shown), 2 * columns),
                frameon=False, fontsize=9.5, handlelength=1.8, labelcolor="#22272e",
            )  # fmt: skip
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, format="png")
    return path


def _draw(axes: Any, panel: Panel, pens: Mapping[str, tuple[str, str]], *, legend: bool) -> None:
    """One panel, with the colour and stroke of each name."""
    if panel.log_x:
        axes.set_xscale("log", nonpositive="mask")
    if panel.log_y:
        axes.set_yscale("log", nonpositive="mask")
    for i, (name, level) in enumerate(panel.levels.items()):
        stroke = _LEVEL_STROKES[i % len(_LEVEL_STROKES)]  # they share a colour, so that they are told apart by this
        axes.axhline(level, color="#8b949e", linewidth=1.2, linestyle=stroke, label=_literal(name), zorder=1)
    for name, (x, y, *band) in panel.curves.items():
        colour, stroke = pens[name]
        horizontal, vertical = _gaps(x), _gaps(y)
        dots = "o" if len(vertical) < 2 else None  # a line of one point cannot be seen
        axes.plot(
            horizontal, vertical, color=colour, linestyle=stroke, linewidth=1.8, label=_literal(name), marker=dots
        )
        if band:
            half = _gaps(band[0])
            low = [v - h for v, h in zip(vertical, half, strict=True)]
            high = [v + h for v, h in zip(vertical, half, strict=True)]
            axes.fill_between(horizontal, low, high, color=colour, alpha=0.15, linewidth=0)
    for name, (x, y, *error) in panel.points.items():
        label = None if name in panel.curves else _literal(name)  # a curve through its own points is named once
        axes.errorbar(
            _gaps(x), _gaps(y), yerr=_gaps(error[0]) if error else None, color=pens[name][0], linestyle="none",
            marker="o", markersize=4.5, alpha=0.8, markeredgewidth=0, elinewidth=1.2, label=label,
        )  # fmt: skip
    axes.set_title(_literal(panel.title), loc="left", fontweight="bold", color="#22272e", pad=8)
    axes.set_xlabel(_literal(panel.x_label), color="#57606a")
    axes.set_ylabel(_literal(panel.y_label), color="#57606a")
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b9bfc6")
    axes.tick_params(which="both", colors="#57606a", length=0)
    axes.margins(x=0.02 if panel.curves else 0.06)
    handles, _ = axes.get_legend_handles_labels()
    if legend and len(handles) > 1:
        axes.legend(fontsize=9.5, handlelength=1.8, labelcolor="#22272e", framealpha=0.75, edgecolor="none")
    for logarithmic, axis in ((panel.log_x, axes.xaxis), (panel.log_y, axes.yaxis)):
        if logarithmic:
            _number_decades(axis)


def _number_decades(axis: Any) -> None:
    """Label 1, 2 and 5 of each decade as plain numbers; where there are many decades, the powers of ten alone."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if 0 < low < high < 500 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _literal(text: str) -> str:
    """A text as it stands: between two dollars matplotlib would read mathematics, and fail where it is none."""
    return text.replace("$", r"\$")


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if v is None or not math.isfinite(v) else float(v) for v in values]


def _section(section: Section) -> dict[str, Any]:
    """What the template needs of a section."""
    paragraphs = [paragraph for part in section.text.split("\n\n") if (paragraph := part.strip())]
    return {"title": section.title, "paragraphs": paragraphs, "content": [_item(item) for item in section.content]}


def _item(item: Item) -> tuple[str, dict[str, Any]]:
    """The name of the template's macro for an item, and what that needs."""
    fields = vars(item)
    if isinstance(item, Table):
        return "table", {**fields, "numeric": _numeric(item)}
    if isinstance(item, Matrix):
        return "matrix", {**fields, "cells": _cells(item)}
    if isinstance(item, Figure):
        return "figure", {**fields, **_image(item.png)}
    return "sample", fields


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers only."""
    for row in table.rows:
        if len(row) != len(table.columns):
            raise InputError(
                f"Table: expected {len(table.columns)} cells ({', '.join(table.columns)}), got {list(row)}"
            )
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    return [
        any(_is_numeric(v) for v in column) and all(_is_numeric(v) or v in (None, "–") for v in column)
        for column in columns
    ]


def _cells(matrix: Matrix) -> list[list[tuple[float, float | None, str | None, bool]]]:
    """Of every cell: its value, its error or None, its colour or None, and whether it is its column's best."""
    width = len(matrix.columns)
    errors = matrix.errors if matrix.errors is not None else [[None] * width] * len(matrix.rows)
    for name, rows in (("values", matrix.values), ("errors", errors)):
        if len(rows) != len(matrix.rows) or any(len(row) != width for row in rows):
            raise InputError(
                f"Matrix.{name}: expected {len(matrix.rows)} rows ({', '.join(matrix.rows)}) of {width} numbers, got "
                f"{len(rows)} rows of {sorted({len(row) for row in rows})}"
            )
    wanted = [matrix.best] * width if isinstance(matrix.best, str) else list(matrix.best)
    if len(wanted) != width or not {"largest", "smallest"}.issuperset(wanted):
        raise InputError(f"Matrix.best: expected 'largest' or 'smallest', or {width} of these, got {matrix.best!r}")
    cells: list[list[tuple[float, float | None, str | None, bool]]] = [[] for _ in matrix.rows]
    for j, wish in enumerate(wanted):
        column = _gaps([row[j] for row in matrix.values])
        known = [v for v in column if math.isfinite(v)]
        low, high = min(known, default=math.nan), max(known, default=math.nan)
        for row, value, error in zip(cells, column, (row[j] for row in errors), strict=True):
            share = 0.5 if low == high else (value - low) / (high - low)
            shade = _shade(share if wish == "largest" else 1 - share) if math.isfinite(value) else None
            spread = error if error is not None and math.isfinite(value + error) else None
            row.append((value, spread, shade, value == (high if wish == "largest" else low)))
    return cells


def _shade(share: float) -> str:
    """From white at a column's worst to the accent's tint at its best."""
    worst, best = (255, 255, 255), (169, 200, 229)
    return "#" + "".join(f"{round(w + share * (b - w)):02x}" for w, b in zip(worst, best, strict=True))


def _is_numeric(value: Cell) -> bool:
    if isinstance(value, str):  # "0.71 ± 0.02"
        return value[:1].isdigit() or (value[:1] in "+-−" and value[1:2].isdigit())
    return isinstance(value, (int, float))


def _cell(value: Cell) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}".replace("-", "−")
    return str(value)


def _image(png: Path) -> dict[str, Any]:
    """The bytes of an image in base64, and its width on the page or None."""
    try:
        content = Path(png).read_bytes()
    except OSError as error:
        raise InputError(f"Figure: cannot read {png}: {error.strerror}") from error
    if not content.startswith(b"\x89PNG"):
        raise InputError(f"Figure: {png} is not a PNG file")
    return {"data": base64.b64encode(content).decode(), "width": _printed_width(content)}


def _printed_width(png: bytes) -> int | None:
    """Width on the page in CSS pixels, 96 an inch, of an image that gives its resolution (the chunk pHYs)."""
    at = png.find(b"pHYs", 0, 4096)
    if at < 0 or png[at + 12 : at + 13] != b"\x01":  # pixels a metre
        return None
    return round(int.from_bytes(png[16:20], "big") / int.from_bytes(png[at + 4 : at + 8], "big") / 0.0254 * 96)
