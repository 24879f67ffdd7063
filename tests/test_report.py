"""Reports: self-contained, escaped, and clear about what is wrong."""

from __future__ import annotations

import html
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from align_cbrl.errors import InputError
from align_cbrl.runs.charts import Panel, curves_png, legend, mean_curve, panels_svg
from align_cbrl.runs.report import Charts, Details, Figure, Intervals, Matrix, Sample, Section, Table, write_report


class _WellFormed(HTMLParser):
    """Fails on a tag that is not closed in order, and keeps every address the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_report_is_one_well_formed_file_with_everything_inside(tmp_path: Path) -> None:
    panels = [
        Panel("Judge", "step", "score", {"plain": ([0, 1], [0.1, None]), "hpgd": ([0, 1], [0.1, 0.7], [0.1, 0.1])}),
        Panel("KL <b>", "step", "$<i>$", {"plain": ([0], [math.inf])}, levels={"<u>": 1.0}, note="<s>"),
    ]
    png = curves_png(tmp_path / "curves.png", panels)
    assert png.read_bytes().startswith(b"\x89PNG")
    path = write_report(
        tmp_path / "deep" / "report.html",
        title="A <title> & more",
        subtitle="under it",
        sections=[
            Section(
                "Result",
                "One.\n\nTwo <b>.",
                [
                    Table(["name", "judge"], [["base", 0.5], ["hpgd", -0.25], ["x", None]], "Caption.", "hpgd"),
                    Figure(png, 'The "curves"'),
                    Charts(panels, "<tt>"),
                    Charts(panels),
                    Intervals([("<em>", 0.5, 0.25, 0.75), ("b", -0.5, -0.75, -0.25), ("c", 0.1, -1.0, 1.2)]),
                    Sample(
                        "def f(x: int) -> int:",
                        {"base": "<script>alert(1)</script>", "hpgd": " "},
                        {"base": {"judge": 0.5, '"<dd>': -1.25}},
                    ),
                    Details("config", "a: <hr>"),
                ],
            )
        ],
    )
    page = path.read_text(encoding="utf-8")
    parser = _WellFormed()
    parser.feed(page)
    assert not parser.open
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in parser.addresses)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert page.count("<script") == 1 and "&lt;script&gt;" in page  # its own
    for tag in ("i", "u", "s", "tt", "dd>:", "hr", "em"):
        assert f"<{tag}>" not in page and f"&lt;{tag.rstrip('>:')}&gt;" in page
    assert "−1.25" in page and "+0.50" in page
    verdicts = re.findall(r'class="verdict">([^<]*)<', page)
    assert verdicts == ["above 0", "below 0", "0 inside"]
    names = re.findall(r' id="([^"]*)"', page)
    assert len(names) == len(set(names))
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(names)
    assert "A &lt;title&gt; &amp; more" in page and "<p>Two &lt;b&gt;.</p>" in page
    assert 'class="highlight"' in page and "−0.250" in page and "0.500" in page and "–" in page and "(empty)" in page


def test_bad_tables_and_images_are_named(tmp_path: Path) -> None:
    def write(content: Table | Figure) -> None:
        write_report(tmp_path / "report.html", title="", sections=[Section("", "", [content])])

    with pytest.raises(InputError, match=r"Table: expected 2 cells \(a, b\), got \[1\]"):
        write(Table(["a", "b"], [[1]]))
    with pytest.raises(InputError, match=r"Figure: cannot read .*none\.png: No such file"):
        write(Figure(tmp_path / "none.png", ""))
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(InputError, match=r"text\.png is not a PNG file"):
        write(Figure(tmp_path / "text.png", ""))


def test_curves_that_cannot_be_drawn_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"at least one panel"):
        curves_png(tmp_path / "a.png", [])
    with pytest.raises(InputError, match=r"panel 'Judge', curve 'hpgd': expected .* got \[2, 1\]"):
        curves_png(tmp_path / "a.png", [Panel("Judge", "", "", {"hpgd": ([0, 1], [0])})])


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'align-cbrl\[plots\]'"):
        curves_png(tmp_path / "a.png", [Panel("Judge", "", "", {})])


def test_many_curves_share_a_legend_below_the_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure as Canvas

    seen = []
    monkeypatch.setattr(Canvas, "savefig", lambda canvas, path, **_: seen.append(canvas))
    for count in (4, 5):
        curves = {f"curve {i}": ([0.0, 1.0], [0.0, float(i)]) for i in range(count)}
        curves_png(tmp_path / "curves.png", [Panel("one", "x", "y", curves), Panel("two", "x", "y", curves)])
    few, many = seen
    assert [len(canvas.legends) for canvas in seen] == [0, 1]
    assert all(axes.get_legend() is not None for axes in few.axes)
    assert all(axes.get_legend() is None for axes in many.axes)
    assert len(many.legends[0].get_texts()) == 5


def cells(page: str) -> list[list[tuple[bool, str]]]:
    """The rows of a page's matrix: whether each cell is marked, and its text."""
    body = page.split('class="matrix"', 1)[1].split("</table>", 1)[0]
    return [
        [
            ("best" in attributes, re.sub("<[^>]*>", " ", text))
            for attributes, text in re.findall(r"<td([^>]*)>(.*?)</td>", row)
        ]
        for row in body.split("<tr>")[2:]
    ]


def test_a_matrix_marks_the_best_of_each_column(tmp_path: Path) -> None:
    matrix = Matrix(
        "trained / measured",
        ["score", "<cost>"],
        ["a", "b", "c"],
        [[0.5, 2.0], [0.75, None], [0.25, 1.0]],
        [[0.01, 0.1], [None, 0.1], [0.02, math.nan]],
        ["largest", "smallest"],
        "Three seeds.",
    )
    page = write_report(tmp_path / "a.html", title="", sections=[Section("", "", [matrix])]).read_text()
    assert cells(page) == [
        [(False, "0.500 ± 0.01 "), (False, "2.000 ± 0.1 ")],
        [(True, "0.750"), (False, "–")],
        [(False, "0.250 ± 0.02 "), (True, "1.000")],
    ]
    assert re.findall(r"--shade:(\d+)%", page) == ["50", "0", "100", "0", "100"]
    assert "&lt;cost&gt;" in page and "Three seeds." in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [[1.0]]}, r"Matrix\.values: expected 1 rows \(a\) of 2 numbers, got 1 rows of \[1\]"),
        ({"errors": [[1.0, 1.0]] * 2}, r"Matrix\.errors: expected 1 rows .* got 2 rows of \[2\]"),
        ({"best": ["largest"]}, r"Matrix\.best: expected 'largest' or 'smallest', or 2 of these"),
        ({"best": "biggest"}, r"Matrix\.best: expected 'largest' or 'smallest', or 2 of these, got 'biggest'"),
    ],
)
def test_a_matrix_of_another_shape_is_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    matrix = Matrix(**{"corner": "", "columns": ["x", "y"], "rows": ["a"], "values": [[1.0, 2.0]], **arguments})
    with pytest.raises(InputError, match=message):
        write_report(tmp_path / "a.html", title="", sections=[Section("", "", [matrix])])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The canvases that `curves_png` would have saved."""
    from matplotlib.figure import Figure as Canvas

    seen: list[Any] = []
    monkeypatch.setattr(Canvas, "savefig", lambda canvas, path, **_: seen.append(canvas))
    return seen


def test_points_levels_and_logarithmic_axes(tmp_path: Path, drawn: list[Any]) -> None:
    curve = ([0.0, 0.1, 1.0], [1.0, 2.0, 3.0])
    panel = Panel(
        "KL", "nats", "score",
        curves={"hpgd": curve},
        points={"hpgd": (*curve, [0.1, 0.1, None]), "plain": curve},
        levels={"target": 2.5},
        log_x=True,
    )  # fmt: skip
    curves_png(tmp_path / "a.png", [panel])
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log" and axes.get_yscale() == "linear"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["target", "hpgd", "plain"]
    level = axes.get_lines()[0]
    assert list(level.get_ydata()) == [2.5, 2.5]
    bars = axes.containers[0].lines[2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars[:2]] == [[0.9, 1.1], [1.9, 2.1]]
    same = {line.get_color() for line in axes.get_lines()[1:3]}
    assert len(same) == 1  # a curve and its own points share their colour


def test_the_seventh_curve_has_the_first_colour_and_another_stroke(tmp_path: Path, drawn: list[Any]) -> None:
    curves = {f"curve {i}": ([0.0, 1.0], [0.0, float(i)]) for i in range(24)}
    curves_png(tmp_path / "a.png", [Panel("many", "", "", curves)])
    lines = drawn[0].axes[0].get_lines()
    assert lines[0].get_color() == lines[6].get_color()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 24


def test_a_picture_is_shown_at_its_printed_size(tmp_path: Path) -> None:
    png = curves_png(tmp_path / "a.png", [Panel("one", "", "", {"x": ([0, 1], [0, 1])})])
    page = write_report(tmp_path / "a.html", title="", sections=[Section("", "", [Figure(png, "")])]).read_text()
    assert f'style="--width:{round(5.6 * 96)}px"' in page


@pytest.mark.parametrize("name", [r"$\frac{$", "$", "a $5 and $6 price", r"\$x$", "$$", r"$\undefined$", "_{^$}"])
def test_any_text_may_name_a_curve(tmp_path: Path, name: str) -> None:
    line = ([1.0, 2.0], [0.5, 0.6])
    panel = Panel(name, name, name, {name: line}, points={f"{name} points": line}, levels={f"{name} level": 0.5})
    assert curves_png(tmp_path / "curves.png", [panel]).stat().st_size > 0
    (drawing,) = panels_svg([panel], "a")
    assert f">{html.escape(name, quote=False)}<" in drawing


def test_a_page_decides_the_colours_of_its_charts() -> None:
    panel = Panel("one", "x", "y", {"a": ([0, 1], [0, 1], [0.1, 0.1])}, {"b": ([0, 1], [1, 0])}, {"c": 0.5})
    (drawing,) = panels_svg([panel], "a")
    assert "#" not in re.sub(r"(url\(#|href=\"#)", "", drawing)  # no colour of its own, which one scheme could not read
    assert {"var(--c0)", "var(--c1)", "var(--level)", "var(--line)", "var(--soft)"} <= set(
        re.findall(r"var\([^)]*\)", drawing)
    )
    assert "font-family" not in drawing and " width=" not in drawing.partition(">")[0]
    assert panels_svg([panel], "a") == [drawing] != panels_svg([panel], "b")
    assert [(pen.name, pen.dots) for pen in legend([panel])] == [("a", False), ("b", True), ("c", False)]


def test_a_mean_ends_where_a_seed_does() -> None:
    runs: list[dict[float, float | None]] = [{1: 0.0, 2: 0.0, 3: 0.0}, {1: 1.0, 2: 1.0}, {1: 2.0, 2: 2.0, 3: None}]
    curve, remark = mean_curve(runs)
    assert curve == ([1, 2], [1.0, 1.0], [pytest.approx(1 / math.sqrt(3))] * 2)  # at 3 the mean would fall to 0
    assert remark == "the mean over 3 seeds ends at 2; the last seed goes on to 3"
    assert mean_curve(runs[:1]) == (([1, 2, 3], [0.0, 0.0, 0.0]), "")
    assert mean_curve([{1: 0.0}, {2: 0.0}]) == (([], [], []), "no mean: the 2 seeds share no point")
    with pytest.raises(InputError, match="expected at least one run"):
        mean_curve([])


def test_steps_are_whole_numbers(tmp_path: Path, drawn: list[Any]) -> None:
    for places in ([1, 2, 3], [0.5, 1.0, 3.0]):
        curves_png(tmp_path / "a.png", [Panel("one", "", "", {"x": (places, [0, 1, 0])})])
    whole, parts = ({tick == round(tick) for tick in canvas.axes[0].get_xticks()} for canvas in drawn)
    assert whole == {True} and False in parts
