"""Natural steps against Adam's, in the recipes of two tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from align_cbrl.recipes.natural_steps import NaturalConfig, best_settings, row, steps_needed
from rebuilt import report_is_rebuilt

from align_cbrl import InputError
from align_cbrl.cli import main

TINY = ["natural.steps=2", "natural.nats=[0.01]", "natural.learning_rates=[0.1]", "natural.tuning_seeds=[100]"]


def test_steps_are_counted_to_99_percent_of_the_gain() -> None:
    assert steps_needed([1.0, 1.98, 1.99, 2.0], 2.0) == 2
    assert steps_needed([1.0, 2.0, 1.0], 2.0) == 1  # it got there, whatever came after
    assert steps_needed([1.0, 1.98], 2.0) == math.inf


def test_the_reference_is_the_better_end_and_what_never_comes_there_is_not_counted() -> None:
    pairs = [
        {
            "natural_values": [0.0, 1.0, 1.0],
            "adam_values": [0.0, 0.5, 0.9],
            "natural_seconds": 2.0,
            "adam_seconds": 1.0,
        },
        {
            "natural_values": [0.0, 0.5, 0.5],
            "adam_values": [0.0, 0.5, 1.0],
            "natural_seconds": 4.0,
            "adam_seconds": 1.0,
        },
    ]
    found = row({"temperature": 0.1}, pairs)
    assert found["natural_reached"] == found["adam_reached"] == 1
    assert (found["natural_least"], found["natural_most"]) == (1, None)
    assert found["natural_value"] == 0.75
    assert found["natural_value_se"] == pytest.approx(0.25)
    assert (found["natural_milliseconds"], found["adam_milliseconds"]) == (3000, 1000)


def test_each_kind_gets_the_setting_that_is_there_first() -> None:
    def trial(seed: int, kind: str, setting: float, *values: float) -> dict[str, Any]:
        return {"seed": seed, "kind": kind, "setting": setting, "values": [0.0, *values], "seconds": 1.0}

    some = [
        trial(0, "adam", 0.1, 0.5, 1.0, 0.99), trial(1, "adam", 0.1, 50.0, 99.5, 99.2),
        trial(0, "adam", 0.2, 0.2, 0.5, 1.0), trial(1, "adam", 0.2, 20.0, 50.0, 100.0),
        trial(0, "adam", 0.3, 0.1, 0.1, 0.1), trial(1, "adam", 0.3, 1.0, 1.0, 1.0),  # at once where it ends, and low
        trial(0, "natural", 0.3, 0.5, 0.5, 0.4), trial(1, "natural", 0.3, 0.0, 0.0, 0.0),
        trial(0, "natural", 0.4, 0.5, 0.5, 0.5), trial(1, "natural", 0.4, 0.0, 0.0, 0.0),
    ]  # fmt: skip
    trials = [{"problem": number, **one} for number, one in enumerate(some)]  # as they are kept
    assert best_settings(trials) == {"adam": 0.1, "natural": 0.4}  # of two that never come there, the higher end


def test_seeds_that_are_reported_are_not_chosen_on() -> None:
    with pytest.raises(InputError, match=r"tuning_seeds: expected none of the seeds that are reported, got \[30\]"):
        NaturalConfig(seeds=(30, 31), tuning_seeds=(30,))
    with pytest.raises(InputError, match="steps: expected a whole number >= 1, got 0"):
        NaturalConfig(steps=0)


@pytest.mark.parametrize(
    ("recipe", "settings", "cells"),
    [
        ("tax_design", ["grid=11"], 3),
        ("four_rooms", ["table={temperatures: [0.003, 0.005], prices: [3.0]}"], 2),
    ],
)
def test_both_recipes_compare_the_two(tmp_path: Path, recipe: str, settings: list[str], cells: int) -> None:
    arguments = ["run", recipe, "--config", "natural.yaml", "--out", str(tmp_path / "run"), "--set", *TINY, *settings]
    assert main([*arguments, "natural.seeds=[30]"]) == 0
    before = (tmp_path / "run" / "ascents.jsonl").read_text()
    assert main([*arguments, "natural.seeds=[30, 31]", "--resume"]) == 0
    assert (tmp_path / "run" / "ascents.jsonl").read_text().startswith(before)  # what is finished is kept
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["rows"]) == cells
    for one in summary["rows"]:
        assert one["starts"] == 2
        assert one["adam_value"] != one["natural_value"]
        assert one["adam_reached"] + one["natural_reached"] >= 2  # the better end reaches its own
    assert report_is_rebuilt(tmp_path / "run")
