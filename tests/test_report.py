"""Reports: self-contained, escaped, and clear about what is wrong."""

from __future__ import annotations

import math
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from align_cbrl.errors import InputError
from align_cbrl.report import Figure, Panel, Sample, Section, Table, curves_png, write_report


class _WellFormed(HTMLParser):
    """Fails on a tag that is not closed in order, and keeps every address the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_report_is_one_well_formed_file_with_everything_inside(tmp_path: Path) -> None:
    png = curves_png(
        tmp_path / "curves.png",
        [
            Panel("Judge", "step", "score", {"plain": ([0, 1], [0.1, None]), "hpgd": ([0, 1], [0.1, 0.7], [0.1, 0.1])}),
            Panel("KL", "step", "nats", {"plain": ([0], [math.inf])}),
        ],
    )
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
                    Sample(
                        "def f(x: int) -> int:", {"base": "<script>alert(1)</script>", "hpgd": " "}, {"base": "0.1"}
                    ),
                ],
            )
        ],
    )
    page = path.read_text(encoding="utf-8")
    parser = _WellFormed()
    parser.feed(page)
    assert not parser.open
    assert len(parser.addresses) == 1 and parser.addresses[0].startswith("data:image/png;base64,")
    assert "<script" not in page and "&lt;script&gt;" in page
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
