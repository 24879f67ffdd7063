"""Charts of curves: as a PNG file for documents, and as SVG for a page, whose colours and width they then follow."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align_cbrl.errors import InputError

Curve = tuple[Sequence[float | None], ...]
"""(x, y), or (x, y, half-width of a band around y); what is not finite, or None, leaves a gap."""

COLOURS = ("#2f5d8a", "#c8553d", "#4f8a5b", "#8a6bb1", "#b8892b", "#5b6770")
_INK, _SOFT, _LINE, _AXIS, _LEVEL = "#22272e", "#57606a", "#e6e8eb", "#b9bfc6", "#8b949e"
_STROKES = ("-", "--", ":", "-.")  # one more for each round through the colours
_DASHES = {"-": "none", "--": "5 3", ":": "1.5 2.5", "-.": "6 2 1.5 2"}  # the same in a page's legend
_LEVEL_STROKES: tuple[Any, ...] = ((0, (4, 3)), (0, (1, 2)), (0, (8, 2, 1, 2)))
_LEGEND = 4  # names in a panel of a PNG file, above which one legend stands below the picture
_SIZES = {1: (5.6, 3.5), 2: (5.2, 3.4), 3: (3.8, 3.0)}  # inches of a panel, by panels in a row
_ON_PAGE = (4.3, 2.8)  # inches of a panel on a page, whose width it takes: text is read on a phone, too
_FONTS = {"font.family": "sans-serif", "font.size": 10.5, "axes.titlesize": 11.5}
_THEME = {
    **{colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)},
    _INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _LINE: "var(--line)",
    _AXIS: "var(--axis)",
    _LEVEL: "var(--level)",
}
"""Colours of the drawing and what they are called in a page's style sheet, which has a dark scheme too."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One diagram.

    Attributes:
        title: above the diagram.
        x_label: with the unit, if there is one.
        y_label: likewise.
        curves: by name, (x, y), and optionally (x, y, half-width of a band around y). Values that are not finite, or
            None, leave a gap. A name has one colour in all panels; from the seventh on, another stroke too.
        points: by name, likewise, drawn as dots with error bars.
        levels: horizontal reference lines by name.
        log_x, log_y: whether an axis is logarithmic; what is not positive is then left out.
        note: below the diagram on a page, such as where seeds drop out.
    """

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    points: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Pen:
    """How a name is drawn in all panels of a picture, for its legend.

    Attributes:
        name: of the curve, the points or the level.
        colour: of `COLOURS`, or of levels.
        dashes: an SVG dash array.
        dots: whether it is drawn as points only.
    """

    name: str
    colour: str
    dashes: str
    dots: bool


def mean_curve(runs: Sequence[Mapping[float, float | None]]) -> tuple[Curve, str]:
    """The mean curve of several runs where all of them have a value: a mean over those that are left would jump.

    Args:
        runs: y by x, one mapping a seed.

    Returns:
        (x, mean, standard error), (x, y) of a single run, and in words where the mean ends before the last run does,
        "" where it does not.

    Raises:
        InputError: no runs.

    Example:
        >>> mean_curve([{1: 0.0, 2: 1.0}, {1: 1.0}])
        (([1], [0.5], [0.5]), 'the mean over 2 seeds ends at 1; the last seed goes on to 2')
    """
    if not runs:
        raise InputError("mean_curve: expected at least one run")
    known = [{x: float(y) for x, y in run.items() if y is not None and math.isfinite(y)} for run in runs]
    common = sorted(set.intersection(*map(set, known)))
    columns = [[run[x] for run in known] for x in common]
    means = [statistics.fmean(column) for column in columns]
    last = max((x for run in known for x in run), default=None)
    if len(runs) == 1 or last is None:
        return (common, means), ""
    errors = [statistics.stdev(column) / math.sqrt(len(runs)) for column in columns]
    if not common:
        return ([], [], []), f"no mean: the {len(runs)} seeds share no point"
    remark = f"the mean over {len(runs)} seeds ends at {common[-1]:.4g}; the last seed goes on to {last:.4g}"
    return (common, means, errors), remark if last > common[-1] else ""


def curves_png(path: Path, panels: Sequence[Panel]) -> Path:
    """Draw the panels side by side, at most three in a row, into a PNG file.

    Raises:
        InputError: there is nothing to draw, the lengths of a curve's values differ, or matplotlib is not installed.
    """
    _check(panels)
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    width, height = _SIZES[columns]
    with _fonts():
        canvas = _canvas(width * columns, height * rows, "white")
        pens = _pens(panels)
        # Too many for a legend that hides no curve.
        crowded = any(len({*panel.curves, *panel.points, *panel.levels}) > _LEGEND for panel in panels)
        for position, panel in enumerate(panels, start=1):
            axes = canvas.add_subplot(rows, columns, position)
            _draw(axes, panel, pens)
            axes.set_title(_literal(panel.title), loc="left", fontweight="bold", color=_INK, pad=8)
            handles, _ = axes.get_legend_handles_labels()
            if not crowded and len(handles) > 1:
                axes.legend(fontsize=9.5, handlelength=1.8, labelcolor=_INK, framealpha=0.75, edgecolor="none")
        if crowded:
            shown: dict[str, Any] = {}
            for axes in canvas.axes:
                for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                    shown.setdefault(label, handle)
            canvas.legend(
                list(shown.values()), list(shown), loc="outside lower center", ncols=min(len(shown), 2 * columns),
                frameon=False, fontsize=9.5, handlelength=1.8, labelcolor=_INK,
            )  # fmt: skip
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, format="png")
    return path


def panels_svg(panels: Sequence[Panel], salt: str) -> list[str]:
    """Each panel as an SVG element for a page, without title and legend, in the colours of the page's style sheet.

    Text stays text, so that it can be zoomed, searched and read aloud.

    Args:
        panels: of one picture; a name has one colour in all of them.
        salt: another one for every picture of a page, which its identifiers are made of.

    Raises:
        InputError: as `curves_png`.
    """
    _check(panels)
    pens = _pens(panels)
    return [_svg(panel, pens, f"{salt}-{i}") for i, panel in enumerate(panels)]


def legend(panels: Sequence[Panel]) -> list[Pen]:
    """The names of a picture's curves, points and levels, and how each is drawn."""
    drawn = {name for panel in panels for name in panel.curves}
    found = [Pen(name, colour, _DASHES[stroke], name not in drawn) for name, (colour, stroke) in _pens(panels).items()]
    levels: dict[str, str] = {}
    for panel in panels:
        for i, name in enumerate(panel.levels):
            _, dashes = _LEVEL_STROKES[i % len(_LEVEL_STROKES)]
            levels.setdefault(name, " ".join(map(str, dashes)))
    return [*found, *(Pen(name, _LEVEL, dashes, False) for name, dashes in levels.items())]


def themed(text: str) -> str:
    """A drawing whose colours are replaced by those of the page's style sheet."""
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: _THEME.get(found[0], found[0]), text)


def gaps(values: Sequence[float | None]) -> list[float]:
    """Numbers, with NaN for None and for what is not finite."""
    return [math.nan if v is None or not math.isfinite(v) else float(v) for v in values]


def _check(panels: Sequence[Panel]) -> None:
    if not panels:
        raise InputError("curves_png: expected at least one panel")
    for panel in panels:
        for name, values in (*panel.curves.items(), *panel.points.items()):
            if len(values) not in (2, 3) or len({len(v) for v in values}) != 1:
                raise InputError(
                    f"curves_png: panel {panel.title!r}, curve {name!r}: expected (x, y) or (x, y, half-width) of "
                    f"equal lengths, got {[len(v) for v in values]}"
                )


def _pens(panels: Sequence[Panel]) -> dict[str, tuple[str, str]]:
    """Colour and stroke of each name."""
    names = list(dict.fromkeys(name for panel in panels for name in (*panel.curves, *panel.points)))
    return {
        name: (COLOURS[i % len(COLOURS)], _STROKES[i // len(COLOURS) % len(_STROKES)]) for i, name in enumerate(names)
    }


def _fonts(**more: Any) -> Any:
    """matplotlib's settings while a picture is drawn."""
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise InputError("curves need matplotlib, which is not installed: pip install 'align-cbrl[plots]'") from error
    return rc_context({**_FONTS, **more})


def _canvas(width: float, height: float, face: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    canvas = Figure(
        figsize=(width, height), dpi=190, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08), facecolor=face
    )
    FigureCanvasAgg(canvas)
    return canvas


def _svg(panel: Panel, pens: Mapping[str, tuple[str, str]], salt: str) -> str:
    buffer = io.StringIO()
    with _fonts(**{"svg.fonttype": "none", "svg.hashsalt": salt}):
        canvas = _canvas(*_ON_PAGE, "none")
        axes = canvas.add_subplot()
        axes.set_facecolor("none")
        _draw(axes, panel, pens)
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return themed(_inline(buffer.getvalue()))


def _inline(drawing: str) -> str:
    """An SVG file as an element of a page: as wide as its box, in the page's face, without what nobody refers to."""
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"font-family: [^;\"]*; ?", "", drawing[drawing.index("<svg") :]).replace("xlink:href", "href")
    used = set(re.findall(r"#([\w-]+)[)\"]", drawing))
    drawing = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", drawing)
    drawing = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", tag[0]), drawing)
    drawing = re.sub(r">\s+<", "><", drawing.replace("\n", " "))
    while (shorter := re.sub(r"<g>\s*</g>|<defs></defs>|<g[^>]*/>", "", drawing)) != drawing:
        drawing = shorter
    size = re.search(r'viewBox="[^"]*"', drawing)
    assert size is not None  # matplotlib gives it always
    return f"<svg {size[0]}{drawing[drawing.index('>') :]}".strip()


def _draw(axes: Any, panel: Panel, pens: Mapping[str, tuple[str, str]]) -> None:
    """One panel, with the colour and stroke of each name."""
    if panel.log_x:
        axes.set_xscale("log", nonpositive="mask")
    if panel.log_y:
        axes.set_yscale("log", nonpositive="mask")
    for i, (name, level) in enumerate(panel.levels.items()):
        stroke = _LEVEL_STROKES[i % len(_LEVEL_STROKES)]  # they share a colour, so that they are told apart by this
        axes.axhline(level, color=_LEVEL, linewidth=1.2, linestyle=stroke, label=_literal(name), zorder=1)
    for name, (x, y, *band) in panel.curves.items():
        colour, stroke = pens[name]
        horizontal, vertical = gaps(x), gaps(y)
        dots = "o" if len(vertical) < 2 else None  # a line of one point cannot be seen
        axes.plot(
            horizontal, vertical, color=colour, linestyle=stroke, linewidth=1.8, label=_literal(name), marker=dots
        )
        if band:
            half = gaps(band[0])
            low = [v - h for v, h in zip(vertical, half, strict=True)]
            high = [v + h for v, h in zip(vertical, half, strict=True)]
            axes.fill_between(horizontal, low, high, color=colour, alpha=0.15, linewidth=0)
    for name, (x, y, *error) in panel.points.items():
        label = None if name in panel.curves else _literal(name)  # a curve through its own points is named once
        axes.errorbar(
            gaps(x), gaps(y), yerr=gaps(error[0]) if error else None, color=pens[name][0], linestyle="none",
            marker="o", markersize=4.5, alpha=0.8, markeredgewidth=0, elinewidth=1.2, label=label,
        )  # fmt: skip
    axes.set_xlabel(_literal(panel.x_label), color=_SOFT)
    axes.set_ylabel(_literal(panel.y_label), color=_SOFT)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_AXIS)
    axes.tick_params(which="both", colors=_SOFT, length=0)
    axes.margins(x=0.02 if panel.curves else 0.06)
    places = [x for of, *_ in (*panel.curves.values(), *panel.points.values()) for x in gaps(of)]
    if not panel.log_x and all(x == round(x) for x in places if math.isfinite(x)):  # no half of a step
        _whole_numbers(axes.xaxis)
    for logarithmic, axis in ((panel.log_x, axes.xaxis), (panel.log_y, axes.yaxis)):
        if logarithmic:
            _number_decades(axis)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))


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
