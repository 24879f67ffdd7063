"""Runs side by side: what they share, what differs, and what cannot be compared."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_cbrl.errors import InputError
from align_cbrl.runs.compare import Reached, comparison, read_runs, write_comparison
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.report import Table
from align_cbrl.runs.run_folder import claim, write_summary


@dataclasses.dataclass
class Inner:
    lr: float = 0.1


@dataclasses.dataclass
class Config:
    seed: int = 0
    judge: str = "a"
    inner: Inner = dataclasses.field(default_factory=Inner)


@dataclasses.dataclass
class Other:
    seed: int = 0
    price: float | None = None


def make(out: Path, config: Any, summary: dict[str, Any] | None = None, rows: int = 0, recipe: str = "mine") -> Path:
    claim(out, config, recipe=recipe)
    with MetricsLog(out / "metrics.jsonl") as log:
        for step in range(1, rows + 1):
            log.append({"step": step, "objective": 0.1 * step + config.seed, "kl": None if config.seed else 0.5})
    if summary is not None:
        write_summary(out, summary)
    return out


def finished(judge: float) -> dict[str, Any]:
    hpgd = {"name": "hpgd", "judge": {"mean": judge, "se": 0.01}, "kl": judge / 2, "kl_se": 0.25, "note": True}
    return {"rows": [{"name": "base", "judge": 0.5}, hpgd], "leader": {"reward": f"proxy {judge:+.2f}"}}


def tables(*folders: Path) -> dict[str, Table]:
    return dict(comparison(read_runs(folders)))


def test_settings_rows_and_rewards_stand_side_by_side(tmp_path: Path) -> None:
    one = make(tmp_path / "runs" / "one", Config(), finished(0.7))
    two = make(tmp_path / "runs" / "two", Config(seed=1, inner=Inner(0.2)), finished(0.8))
    found = tables(one, two)
    assert list(found["Settings that differ"].columns) == ["setting", "one", "two"]
    assert found["Settings that differ"].rows == [["seed", "0", "1"], ["inner.lr", "0.1", "0.2"]]
    assert found["What they reached"].rows == [
        ["base", "judge", "0.5", "0.5"],
        ["hpgd", "judge", "0.7 ± 0.01", "0.8 ± 0.01"],
        ["hpgd", "kl", "0.35 ± 0.25", "0.4 ± 0.25"],
    ]
    assert found["Learned rewards"].rows == [["one", "proxy +0.70"], ["two", "proxy +0.80"]]


def test_the_best_is_marked_and_differences_have_intervals(tmp_path: Path) -> None:
    def summary(judge: float, kl: float, aim: str = "largest") -> dict[str, Any]:
        row = {"name": "hpgd", "judge": {"mean": judge, "se": 0.1, "n": 5}, "kl": kl, "words": 7.0}
        return {"rows": [row], "aims": {"judge": aim, "kl": "smallest"}}

    folders = [
        make(tmp_path / "a", Config(), summary(0.5, 1.0)),
        make(tmp_path / "b", Config(seed=1), summary(1.0, 0.5)),
        make(tmp_path / "c", Config(seed=2), summary(0.4, 0.5)),
    ]
    found = tables(*folders)
    # The judge of b; of kl, two are as small as each other, and nobody aims at words.
    assert found["What they reached"].marked == {(0, 3)}
    differences = found["Differences"]
    assert list(differences.columns) == ["row", "figure", "b less a", "c less a"]
    assert differences.rows == [
        ["hpgd", "judge", "+0.5, 95 % [+0.174, +0.826]", "-0.1, 95 % [-0.426, +0.226]"],
        ["hpgd", "kl", "-0.5", "-0.5"],
        ["hpgd", "words", "+0", "+0"],
    ]
    page = write_comparison(tmp_path / "page", read_runs(folders)).read_text()
    assert len(re.findall(r'<td class="[^"]*best"', page)) == 1
    assert [verdict in page for verdict in ("above 0", "0 inside", "no interval")] == [True, True, True]
    other = make(tmp_path / "d", Config(seed=3), summary(2.0, 0.1, "smallest"))
    assert tables(folders[0], other)["What they reached"].marked == {(1, 3)}  # they disagree about the judge


def test_intervals_of_differences_are_welchs() -> None:
    from scipy import stats

    first, second = [0.1, 0.5, 0.2, 0.9], [1.0, 1.3, 0.7]

    def reached(values: list[float]) -> Reached:
        return Reached(float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5), len(values))

    theirs = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    difference, low, high = reached(second).less(reached(first))
    assert difference == pytest.approx(np.mean(second) - np.mean(first))
    assert (low, high) == pytest.approx((theirs.low, theirs.high))
    assert Reached(1.0, 0.1, 5).less(Reached(0.5)) == (0.5, None, None)
    assert Reached(1.0, 0.1, 5).less(Reached(0.5, 0.1, 1)) == (0.5, None, None)
    assert Reached(1.0, 0.0, 5).less(Reached(0.5, 0.0, 5)) == (0.5, 0.5, 0.5)


def test_curves_of_seeds_that_end_say_so(tmp_path: Path) -> None:
    folders = []
    for name in ("one", "two"):
        out = make(tmp_path / name, Config(), {"rows": [{"value": 1.0}]})
        (out / "metrics.jsonl").unlink(missing_ok=True)
        for seed, count in enumerate((3, 2)):
            with MetricsLog(out / f"seed-{seed}" / "hpgd" / "metrics.jsonl") as log:
                for step in range(count):
                    log.append({"step": step, "objective": 5.0 * seed})
        folders.append(out)
    from align_cbrl.runs.compare import _panels

    (panel,) = _panels(read_runs(folders))
    assert panel.curves["one"] == ([0, 1], [2.5, 2.5], [2.5, 2.5])  # no cliff at step 2
    assert panel.note.startswith("one: the mean over 2 seeds ends at 1; the last seed goes on to 2; two: ")


def test_rows_without_names_are_numbered(tmp_path: Path) -> None:
    rows = [{"temperature": t, "value": 1.0} for t in (0.1, 0.2)]
    found = tables(*(make(tmp_path / name, Config(), {"rows": rows}) for name in "ab"))
    assert [line[:2] for line in found["What they reached"].rows] == [
        ["row 1", "temperature"],
        ["row 1", "value"],
        ["row 2", "temperature"],
        ["row 2", "value"],
    ]
    assert found["Settings that differ"].rows == []


def test_of_different_recipes_what_they_share(tmp_path: Path) -> None:
    one = make(tmp_path / "one", Config(), finished(0.7), rows=3)
    two = make(
        tmp_path / "two", Other(seed=3), {"rows": [{"name": "hpgd", "judge": 0.6, "price": 2.0}]}, 2, recipe="other"
    )
    found = tables(one, two)
    assert found["What they reached"].rows == [["hpgd", "judge", "0.7 ± 0.01", "0.6"]]
    assert found["Settings that differ"].rows == [
        ["recipe", "mine", "other"],
        ["seed", "0", "3"],
    ]


def test_the_page_holds_everything_and_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def spy(path: Path, panels: Any) -> Path:
        from align_cbrl.runs.charts import curves_png

        drawn.extend(panels)
        return curves_png(path, panels)

    monkeypatch.setattr("align_cbrl.runs.compare.curves_png", spy)
    one = make(tmp_path / "one", Config(), finished(0.7), rows=3)
    two = make(tmp_path / "two", Config(seed=1), rows=2)  # still running: its curves are there already
    runs = read_runs([one, two])
    page = write_comparison(tmp_path / "page", runs).read_text()
    assert (
        '<svg viewBox="0 0' in page and "<img" not in page and "They share no figures" in page and "proxy +0.70" in page
    )
    (panel,) = drawn  # one run has no kl
    assert panel.curves["one"] == ([1, 2, 3], pytest.approx([0.1, 0.2, 0.3]))
    assert panel.curves["two"] == ([1, 2], pytest.approx([1.1, 1.2]))
    assert "Differences" not in page  # one of them has not ended
    again = write_comparison(tmp_path / "page", [runs[0], runs[0]]).read_text()
    assert "None: the same configuration." in again


@pytest.mark.parametrize("below", [".", "hpgd"])
def test_seeds_of_a_run_are_averaged(tmp_path: Path, below: str) -> None:
    folders = []
    for name in ("one", "two"):
        out = make(tmp_path / name, Config(), {"rows": [{"value": 1.0}]})
        (out / "metrics.jsonl").unlink(missing_ok=True)
        for seed, values in enumerate(((1.0, 2.0), (3.0, 4.0))):
            with MetricsLog(out / f"seed-{seed}" / below / "metrics.jsonl") as log:
                for step, value in enumerate(values):
                    log.append({"step": step, "objective": value})
        folders.append(out)
    from align_cbrl.runs.compare import _panels

    (panel,) = _panels(read_runs(folders))
    assert panel.curves["one"] == ([0, 1], [2.0, 3.0], [1.0, 1.0])


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    one = make(tmp_path / "one", Config(), finished(0.7))
    with pytest.raises(InputError, match=r"compare: expected at least two folders"):
        read_runs([one])
    with pytest.raises(InputError, match=r"one: given twice"):
        read_runs([one, tmp_path / "." / "one"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: not the folder of a run: it has no run\.json"):
        read_runs([one, tmp_path / "empty"])
    with pytest.raises(InputError, match=r"two: the run of mine has not ended, there are no rows yet"):
        read_runs([one, make(tmp_path / "two", Config())])
