"""A run's report: one self-contained HTML file with its text, tables, charts and samples."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2

from align_cbrl.errors import InputError
from align_cbrl.runs.charts import Panel, gaps, legend, panels_svg, themed
from align_cbrl.runs.files import write_whole

Cell = str | float | int | None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under column heads. Numbers are set to three decimals and aligned; None is a dash.

    Attributes:
        columns: the heads.
        rows: one value a column; a value that is text may hold its own standard error, as "0.71 ± 0.02".
        caption: a line under the table.
        highlight: the first cell of the row to set off, or None; the best row, or one that is shown to be better.
        marked: cells to set off, by the numbers of row and column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    highlight: str | None = None
    marked: Collection[tuple[int, int]] = ()


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
class Intervals:
    """Differences with their intervals, drawn on one scale beside zero, and whether each is told apart from it.

    Attributes:
        rows: (name, mean, low, high); low and high are None, or not finite, where there is no interval.
        caption: what the intervals are of, and how sure they are.
    """

    rows: Sequence[tuple[str, float, float | None, float | None]]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Charts:
    """Panels of curves, drawn as SVG: they follow the page's colours and width, and one legend names their curves."""

    panels: Sequence[Panel]
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
        scores: by policy, the scores of its completion by name; policies may be left out. The page sorts by them.
    """

    prompt: str
    completions: Mapping[str, str]
    scores: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Details:
    """A text that is folded away until it is asked for, such as a configuration, in a fixed-width face."""

    summary: str
    text: str


Item = Table | Matrix | Intervals | Charts | Figure | Sample | Details
"""What a section shows under its text."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A head, paragraphs (separated by empty lines), and then tables, charts and samples in the order given."""

    title: str
    text: str = ""
    content: Sequence[Item] = ()


def write_report(
    path: Path,
    *,
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    stamp: str = "",
    alarms: Sequence[str] = (),
) -> Path:
    """Write one HTML file that needs no other: style, script and pictures are inside, and no address is loaded.

    It is read without its script, too, which only filters samples.

    Args:
        path: of the file.
        title: of the page.
        sections: in their order.
        subtitle: under the title.
        stamp: a word beside the title that is not to be overlooked, such as "smoke".
        alarms: lines above everything else.

    Raises:
        InputError: a table or matrix row with another number of cells than columns, charts that cannot be drawn, or an
            image that is not a readable PNG.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "score": _score}
    page = environment.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        stamp=stamp,
        alarms=alarms,
        sections=[_section(section, number) for number, section in enumerate(sections)],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def _section(section: Section, number: int) -> dict[str, Any]:
    """What the template needs of a section."""
    paragraphs = [paragraph for part in section.text.split("\n\n") if (paragraph := part.strip())]
    content = [_item(item, f"{number}-{i}") for i, item in enumerate(section.content)]
    samples = [fields for kind, fields in content if kind == "sample"]
    policies = list(dict.fromkeys(name for sample in samples for name in sample["completions"]))
    of_policies = [scores for sample in samples for scores in sample["scores"].values()]
    return {
        "title": section.title,
        "id": f"section-{number}",
        "paragraphs": paragraphs,
        "content": content,
        "policies": policies,
        "score_names": list(dict.fromkeys(name for scores in of_policies for name in scores)),
    }


def _item(item: Item, salt: str) -> tuple[str, dict[str, Any]]:
    """The name of the template's macro for an item, and what that needs."""
    fields = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    if isinstance(item, Table):
        return "table", {**fields, "numeric": _numeric(item)}
    if isinstance(item, Matrix):
        return "matrix", {**fields, "cells": _cells(item)}
    if isinstance(item, Intervals):
        return "intervals", {**fields, "rows": _bars(item)}
    if isinstance(item, Charts):
        drawings = panels_svg(item.panels, salt)  # which matplotlib has escaped
        pens = [dataclasses.replace(pen, colour=themed(pen.colour)) for pen in legend(item.panels)]
        return "charts", {**fields, "drawings": drawings, "legend": pens}
    if isinstance(item, Figure):
        return "figure", {**fields, **_image(item.png)}
    return ("details" if isinstance(item, Details) else "sample"), fields


def _bars(item: Intervals) -> list[dict[str, Any]]:
    """Of every row: its numbers, its interval in per cent of the scale's width, and how it lies to zero."""
    known = [tuple(gaps(row[1:])) for row in item.rows]
    ends = [0.0, *(value for numbers in known for value in numbers if math.isfinite(value))]
    low, width = min(ends), (max(ends) - min(ends)) or 1.0

    def at(value: float) -> float:
        return round(2 + 96 * (value - low) / width, 2)

    found = []
    for (name, *_), (mean, left, right) in zip(item.rows, known, strict=True):
        whole = math.isfinite(left) and math.isfinite(right)
        verdict = "no interval" if not whole else "above 0" if left > 0 else "below 0" if right < 0 else "0 inside"
        ranged = {"low": at(left), "high": at(right)} if whole else {"low": None, "high": None}
        place = at(mean) if math.isfinite(mean) else None
        numbers = {"mean": _signed(mean), "interval": f"{_signed(left)} to {_signed(right)}" if whole else "–"}
        found.append({"name": name, "at": place, "zero": at(0.0), "verdict": verdict, **ranged, **numbers})
    return found


def _signed(value: float) -> str:
    """Three decimals, or three digits where these would be zeros."""
    if not math.isfinite(value):
        return "–"
    small = value != 0 and abs(value) < 0.001
    return (f"{value:+.2e}" if small else f"{value:+.3f}").replace("-", "−")


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


def _cells(matrix: Matrix) -> list[list[tuple[float, float | None, int | None, bool]]]:
    """Of every cell: value, error or None, shade in per cent or None, and whether it is its column's best."""
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
    cells: list[list[tuple[float, float | None, int | None, bool]]] = [[] for _ in matrix.rows]
    for j, wish in enumerate(wanted):
        column = gaps([row[j] for row in matrix.values])
        known = [v for v in column if math.isfinite(v)]
        low, high = min(known, default=math.nan), max(known, default=math.nan)
        for row, value, error in zip(cells, column, (row[j] for row in errors), strict=True):
            share = 0.5 if low == high else (value - low) / (high - low)
            shade = round(100 * (share if wish == "largest" else 1 - share)) if math.isfinite(value) else None
            spread = error if error is not None and math.isfinite(value + error) else None
            row.append((value, spread, shade, value == (high if wish == "largest" else low)))
    return cells


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


def _score(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:+.2f}".replace("-", "−")


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
