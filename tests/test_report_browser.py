"""Reports in a real browser: no page that scrolls sideways, nothing cut off, texts that can be read in both schemes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

from align_cbrl.runs.charts import Panel, curves_png
from align_cbrl.runs.report import (
    Charts,
    Details,
    Figure,
    Intervals,
    Matrix,
    Sample,
    Section,
    Table,
    write_report,
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt install chromium")

LONG = "an_identifier_that_nobody_would_break_" * 4

CUT = """(() => {
  const edge = document.documentElement.clientWidth, found = [];
  for (const element of document.querySelectorAll("body *")) {
    const box = element.getBoundingClientRect();
    if (!box.width || element.closest("defs, clipPath")) continue;
    const scroll = element.closest(".scroll");
    if (!scroll && (box.right > edge + 1 || box.left < -1))
      found.push("off the page: " + element.outerHTML.slice(0, 90));
    const style = getComputedStyle(element), hides = ["hidden", "clip"].includes(style.overflowX);
    if (hides && element.scrollWidth > element.clientWidth + 1 && !(element instanceof SVGElement))
      found.push("cut: " + element.outerHTML.slice(0, 90));
  }
  for (const table of document.querySelectorAll("table")) {
    const box = table.closest(".scroll");
    if (!box || (box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX !== "auto"))
      found.push("a table that cannot be scrolled");
  }
  for (const words of document.querySelectorAll(".verdict, .mean, .range"))
    if (words.getClientRects().length && words.getBoundingClientRect().height > 40)
      found.push("stands on its head: " + words.outerHTML);
  return found;
})()"""
"""What is off the page, cut by its box, or a wide table outside of a box of its own that scrolls."""

FAINT = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  const check = (element, colour, least, what) => {
    const reached = ratio(rgba(colour), behind(element));
    if (reached < least) found.push(`${what} ${reached.toFixed(2)}: ${element.outerHTML.slice(0, 120)}`);
  };
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!element.checkVisibility() || ["SCRIPT", "OPTION"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    if (own) check(element, element instanceof SVGElement ? style.fill : style.color, 4.5, "text");
    const drawn = element.closest(".panel svg, .legend svg, .bar") && ["path", "line"].includes(element.tagName);
    const root = getComputedStyle(document.body);
    const grid = ["--line", "--axis"].map((name) => rgba(root.getPropertyValue(name)).join());
    if (drawn && style.stroke !== "none" && !grid.includes(rgba(style.stroke).join()))
      check(element, style.stroke, 3, "line");
  }
  return found;
})()"""
"""Texts and lines whose contrast to what is behind them is below 4.5 and 3 (WCAG 2.2, AA)."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything that a report may have, and more of it than fits."""
    out = tmp_path_factory.mktemp("report")
    steps = [float(step) for step in range(30)]
    curves = {
        f"curve {i} with a long name": (steps, [math.sin(i + s / 9) for s in steps], [0.1] * 30) for i in range(7)
    }
    panels = [
        Panel("One", "leader step", "score", curves, levels={"best": 0.5, "second": 0.2}, note=f"A note. {LONG}"),
        Panel("Two, whose title is longer than a panel on a phone", "nats", "x" * 30, dict(list(curves.items())[:2])),
        Panel("Three", "s", "J", {}, points={"dots": (steps, steps, steps)}, log_x=True),
    ]
    columns = ["policy", *(f"figure {i}" for i in range(12))]
    rows = [[name, *("−12.345 ± 0.678",) * 12] for name in ("HPGD", "plain RLHF on the proxy", LONG)]
    matrix = [[float(i * j) for j in range(6)] for i in range(4)]
    samples = [
        Sample(
            f"prompt {i} {LONG if i == 1 else ''}",
            {"base": f"text {i}", "HPGD": f"{LONG}\n  indented" if i == 1 else f"other {i}", "third": " ", "4": "x"},
            {"base": {"judge": i / 10, "a term of the reward": -1.5}, "HPGD": {"judge": 1 - i / 10}},
        )
        for i in range(5)
    ]
    return write_report(
        out / "report.html",
        title=f"A title {LONG}",
        subtitle=f"A subtitle, {LONG}",
        stamp="smoke test",
        alarms=[f"Alarm: {LONG}"],
        sections=[
            Section(f"Result {LONG}", f"Words. {LONG}\n\nMore words.", [Table(columns, rows, LONG, "HPGD", {(0, 2)})]),
            Section(
                "Comparisons",
                "",
                [
                    Intervals(
                        [("a", 0.5, 0.1, 0.9), (LONG, -0.5, -0.6, -0.4), ("c", 1e-10, -1e-9, 1e-9), ("", 0, None, None)]
                    ),
                    Matrix("trained / measured", [f"measure {i}" for i in range(6)], list("abcd"), matrix, matrix),
                ],
            ),
            Section(
                "Curves",
                "",
                [Charts(panels, "A caption."), Charts(panels[:1]), Figure(curves_png(out / "a.png", panels), "x")],
            ),
            Section("Samples", "Of the first seed.", samples),
            Section("Made with", "", [Table(["what", "value"], [["command", LONG]]), Details("All of it", LONG)]),
        ],
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_and_everything_is_legible(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width, scheme)
    assert browser.value("document.documentElement.clientWidth") == width
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.value(CUT) == []
    dark = browser.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] < 60")
    assert dark == (scheme == "dark")
    browser.value("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert browser.value(FAINT) == []
    assert browser.value("document.documentElement.scrollWidth") == width


def test_panels_stand_below_each_other_on_a_phone(browser: Browser, page: Path) -> None:
    edges = (
        "new Set([...document.querySelectorAll('.panels')[0].children].map((p) => p.getBoundingClientRect().left)).size"
    )
    sizes = (
        "Math.min(...[...document.querySelectorAll('.panel text')]"
        ".map((text) => parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a))"
    )
    for width, columns in ((1280, 3), (390, 1)):
        browser.open(page, width)
        assert browser.value(edges) == columns
        assert browser.value(sizes) > 10  # CSS pixels


def test_samples_are_filtered_and_ordered(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    shown = (
        "[...document.querySelectorAll('.sample')].filter((sample) => !sample.hidden)"
        ".map((sample) => sample.querySelector('pre').textContent.split(' ')[1]).join('')"
    )

    def choose(name: str, value: str) -> None:
        browser.value(
            f"(() => {{ const field = document.querySelector('.filters [name={name}]'); field.value = {value!r};"
            "field.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )

    assert browser.value("document.querySelector('.filters output').value") == "5 of 5 prompts"
    assert browser.value(shown) == "01234"
    choose("text", "OTHER 3")
    assert browser.value(shown) == "3"
    assert browser.value("document.querySelector('.filters output').value") == "1 of 5 prompts"
    choose("text", "")
    choose("policy", "HPGD")
    assert browser.value("document.querySelectorAll('.card:not([hidden])').length") == 5
    choose("text", "text 3")  # of the policy that is hidden
    assert browser.value(shown) == ""
    choose("text", "")
    choose("order", "+judge")
    assert browser.value(shown) == "43210"
    choose("policy", "base")
    assert browser.value(shown) == "01234"
    choose("order", "-judge")
    assert browser.value(shown) == "43210"
    choose("order", "")
    assert browser.value(shown) == "01234"


def test_without_its_script_everything_is_there(browser: Browser, page: Path) -> None:
    browser.open(page, 1280, script=False)
    assert browser.value("document.querySelectorAll('.card').length") == 20
    assert browser.value("document.querySelector('.filters').checkVisibility()") is False
    assert browser.value("[...document.querySelectorAll('.card, svg, table')].every((e) => e.checkVisibility())")
