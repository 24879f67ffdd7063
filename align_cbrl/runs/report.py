"""A run's report: one self-contained HTML file with its text, tables, curves and samples."""

from __future__ import annotations

import base64
import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from align_cbrl.errors import InputError

Cell = str | float | int | None
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
    body = "\n".join(_section(section) for section in sections)
    lead = f'<p class="subtitle">{html.escape(subtitle)}</p>' if subtitle else ""
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{html.escape(title)}</h1>{lead}</header>\n{body}\n</main>\n</body>\n</html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
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
    for name, level in panel.levels.items():
        axes.axhline(level, color="#8b949e", linewidth=1.2, linestyle=(0, (4, 3)), label=name, zorder=1)
    for name, (x, y, *band) in panel.curves.items():
        colour, stroke = pens[name]
        horizontal, vertical = _gaps(x), _gaps(y)
        dots = "o" if len(vertical) < 2 else None  # a line of one point cannot be seen
        axes.plot(horizontal, vertical, color=colour, linestyle=stroke, linewidth=1.8, label=name, marker=dots)
        if band:
            half = _gaps(band[0])
            low = [v - h for v, h in zip(vertical, half, strict=True)]
            high = [v + h for v, h in zip(vertical, half, strict=True)]
            axes.fill_between(horizontal, low, high, color=colour, alpha=0.15, linewidth=0)
    for name, (x, y, *error) in panel.points.items():
        label = None if name in panel.curves else name  # a curve through its own points is named once
        axes.errorbar(
            _gaps(x), _gaps(y), yerr=_gaps(error[0]) if error else None, color=pens[name][0], linestyle="none",
            marker="o", markersize=4.5, alpha=0.8, markeredgewidth=0, elinewidth=1.2, label=label,
        )  # fmt: skip
    axes.set_title(panel.title, loc="left", fontweight="bold", color="#22272e", pad=8)
    axes.set_xlabel(panel.x_label, color="#57606a")
    axes.set_ylabel(panel.y_label, color="#57606a")
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


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if v is None or not math.isfinite(v) else float(v) for v in values]


def _section(section: Section) -> str:
    paragraphs = [p.strip() for p in section.text.split("\n\n") if p.strip()]
    parts = [f"<p>{html.escape(p)}</p>" for p in paragraphs]
    for item in section.content:
        if isinstance(item, Table):
            parts.append(_table(item))
        elif isinstance(item, Matrix):
            parts.append(_matrix(item))
        elif isinstance(item, Figure):
            parts.append(_figure(item))
        else:
            parts.append(_sample(item))
    return f"<section>\n<h2>{html.escape(section.title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise InputError(
                f"Table: expected {len(table.columns)} cells ({', '.join(table.columns)}), got {list(row)}"
            )
    numeric = [
        any(_is_numeric(row[i]) for row in table.rows)
        and all(_is_numeric(row[i]) or row[i] in (None, "–") for row in table.rows)
        for i in range(len(table.columns))
    ]
    classes = [' class="number"' if n else "" for n in numeric]
    head = "".join(f"<th{c}>{html.escape(name)}</th>" for c, name in zip(classes, table.columns, strict=True))
    lines = []
    for row in table.rows:
        mark = ' class="highlight"' if table.highlight is not None and row and row[0] == table.highlight else ""
        cells = "".join(f"<td{c}>{html.escape(_cell(v))}</td>" for c, v in zip(classes, row, strict=True))
        lines.append(f"<tr{mark}>{cells}</tr>")
    caption = f"<figcaption>{html.escape(table.caption)}</figcaption>" if table.caption else ""
    return (
        f'<figure class="table"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>{caption}</figure>"
    )


def _matrix(matrix: Matrix) -> str:
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
    columns = [_gaps([row[j] for row in matrix.values]) for j in range(width)]
    marked = [
        (max if wish == "largest" else min)((v for v in column if math.isfinite(v)), default=math.nan)
        for wish, column in zip(wanted, columns, strict=True)
    ]
    lines = []
    for i, name in enumerate(matrix.rows):
        cells = [f'<th scope="row">{html.escape(name)}</th>']
        for j, column in enumerate(columns):
            value, error = column[i], errors[i][j]
            known = [v for v in column if math.isfinite(v)]
            share = 0.5 if not known or max(known) == min(known) else (value - min(known)) / (max(known) - min(known))
            share = share if wanted[j] == "largest" else 1 - share
            style = f' style="background:{_shade(share)}"' if math.isfinite(value) else ""
            best = ' class="best"' if value == marked[j] else ""
            note = "" if error is None or not math.isfinite(value + error) else f"<small>± {error:.2g}</small>"
            cells.append(f"<td{best}{style}>{_cell(value)}{note}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in matrix.columns)
    caption = f"<figcaption>{html.escape(matrix.caption)}</figcaption>" if matrix.caption else ""
    return (
        f'<figure class="table"><div class="scroll"><table class="matrix"><thead><tr><th>{html.escape(matrix.corner)}'
        f"</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{caption}</figure>"
    )


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


def _figure(figure: Figure) -> str:
    try:
        content = Path(figure.png).read_bytes()
    except OSError as error:
        raise InputError(f"Figure: cannot read {figure.png}: {error.strerror}") from error
    if not content.startswith(b"\x89PNG"):
        raise InputError(f"Figure: {figure.png} is not a PNG file")
    data = base64.b64encode(content).decode()
    caption = html.escape(figure.caption)
    width = _printed_width(content)
    style = "" if width is None else f' style="width:{width}px"'
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"{style}><figcaption>{caption}</figcaption>'
        "</figure>"
    )


def _printed_width(png: bytes) -> int | None:
    """Width on the page in CSS pixels, 96 an inch, of an image that gives its resolution (the chunk pHYs)."""
    at = png.find(b"pHYs", 0, 4096)
    if at < 0 or png[at + 12 : at + 13] != b"\x01":  # pixels a metre
        return None
    return round(int.from_bytes(png[16:20], "big") / int.from_bytes(png[at + 4 : at + 8], "big") / 0.0254 * 96)


def _sample(sample: Sample) -> str:
    cards = []
    for name, completion in sample.completions.items():
        note = sample.notes.get(name, "")
        text = html.escape(completion) if completion.strip() else '<span class="empty">(empty)</span>'
        foot = f'<div class="note">{html.escape(note)}</div>' if note else ""
        cards.append(f'<div class="card"><h3>{html.escape(name)}</h3><pre>{text}</pre>{foot}</div>')
    return (
        f'<article class="sample"><pre class="prompt">{html.escape(sample.prompt)}</pre>'
        f'<div class="cards">{"".join(cards)}</div></article>'
    )


_STYLE = """
:root { --ink: #22272e; --soft: #57606a; --line: #e3e6ea; --paper: #fff; --wash: #f6f7f9; --accent: #2f5d8a; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink);
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 24px 96px; }
header { margin-bottom: 40px; padding-bottom: 24px; border-bottom: 3px solid var(--accent); }
h1 { margin: 0; font-size: 2.1rem; line-height: 1.2; letter-spacing: -0.015em; }
.subtitle { margin: 10px 0 0; color: var(--soft); font-size: 1.1rem; max-width: 46em; }
section { margin: 28px 0; padding: 28px 32px 32px; background: var(--paper); border: 1px solid var(--line);
  border-radius: 12px; }
h2 { margin: 0 0 12px; font-size: 1.3rem; letter-spacing: -0.01em; }
p { margin: 0 0 14px; max-width: 46em; }
figure { margin: 20px 0 8px; }
figcaption { margin-top: 10px; color: var(--soft); font-size: 0.9rem; max-width: 52em; }
img { display: block; max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.95rem; font-variant-numeric: tabular-nums; }
th { padding: 8px 16px 8px 12px; color: var(--soft); font-weight: 600; text-align: left; white-space: nowrap;
  border-bottom: 2px solid var(--line); }
td { padding: 9px 16px 9px 12px; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
.highlight td { background: #edf3f9; font-weight: 600; }
.highlight td:first-child { box-shadow: inset 3px 0 0 var(--accent); }
.matrix { table-layout: fixed; min-width: 640px; }
.matrix th:first-child { width: 22%; white-space: normal; }
.matrix th[scope="row"] { color: var(--ink); border-bottom: 1px solid var(--line); }
.matrix th[scope="col"] { padding: 8px; text-align: center; white-space: normal; vertical-align: bottom; }
.matrix td { text-align: center; white-space: nowrap; padding: 8px 10px; border: 1px solid #fff; }
.matrix small { display: block; color: var(--soft); font-size: 0.78rem; line-height: 1.2; }
.matrix .best { font-weight: 700; box-shadow: inset 0 0 0 2px var(--accent); }
.sample { margin: 22px 0 0; padding-top: 20px; border-top: 1px solid var(--line); }
h2 + .sample { margin-top: 4px; padding-top: 0; border-top: 0; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 0.86rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.prompt { padding: 10px 14px; background: var(--wash); border-left: 3px solid #c4cad1; border-radius: 0 6px 6px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 12px; margin-top: 12px; }
.card { display: flex; flex-direction: column; padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; }
.card h3 { margin: 0 0 6px; font-size: 0.8rem; color: var(--accent); letter-spacing: 0.01em; }
.card .note { margin-top: auto; padding-top: 10px; color: var(--soft); font-size: 0.8rem;
  font-variant-numeric: tabular-nums; }
.empty { color: var(--soft); font-style: italic; }
@media (max-width: 640px) { main { padding: 28px 12px 56px; } section { padding: 20px 16px; }
  h1 { font-size: 1.6rem; } }
@media print { body { background: #fff; font-size: 12px; } section { break-inside: avoid; border: 0; padding: 8px 0; } }
"""
