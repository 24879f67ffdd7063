"""The recipe for preferences without a judge: a file of pairs, from the command line as a user would."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import datasets
import enumerable_lm as lm
import pytest
from align_cbrl.recipes.preference_dataset.data import annotated_replies, load_parts
from align_cbrl.recipes.preference_dataset.recipe import Config
from align_cbrl.recipes.worlds.replies.judge import reply_judge
from rebuilt import report_is_rebuilt

from align_cbrl import InputError
from align_cbrl.cli import main
from align_cbrl.llm import load_reward
from align_cbrl.runs.config import load_config


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(prompt: str) -> tuple[str, str]:
    """An answer that repeats the prompt's first word, and one that does not."""
    first = prompt.split()[0]
    return first, "f" if first != "f" else "e"


PROMPTS = [" ".join(words) for words in itertools.permutations("abcdef", 2)]
ROWS = [{"prompt": p, "chosen": words_of(p)[0], "rejected": words_of(p)[1]} for p in PROMPTS]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a file of pairs, and the truth that its labels come from."""
    folder = tmp_path_factory.mktemp("material")
    lm.build(folder / "model")
    write(folder / "pairs.jsonl", ROWS)
    (folder / "own.py").write_text(
        "def truth(prompts, completions):\n"
        "    return [float(p.split()[0] in c.split()) for p, c in zip(prompts, completions, strict=True)]\n"
        "def echo(prompts, completions):\n"
        "    return [float(len(set(p.split()) & set(c.split()))) for p, c in zip(prompts, completions, strict=True)]\n"
    )
    return folder


def command(material: Path, out: Path, *overrides: str) -> list[str]:
    return [
        "run", "preference_dataset", "--config", "smoke.yaml", "--out", str(out), "--set",
        f"preferences={material}/pairs.jsonl", f"model={material}/model", f"truth={material}/own.py:truth",
        f"rewards={{echo: '{material}/own.py:echo'}}", "reward_training.epochs=3", "follower.max_completion_length=2",
        "hpgd.steps=2", *overrides,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ["label_weight=0.1"],
        ["leader.kind=reward_model", "objective.kind=preference", "rewards={}", "truth=null", "pairs_per_step=3"],
    ],
    ids=["mixture", "head"],
)
def test_a_file_of_pairs_is_all_it_takes(
    material: Path, tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    datasets.enable_progress_bars()
    assert main(command(material, out, *overrides)) == 0
    assert "Tokenizing" not in capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ["base", "plain", "pooled", "direct", "hpgd", "fresh"]
    assert rows["base"]["wins"]["mean"] == pytest.approx(0.5, abs=1e-6)  # over itself
    assert rows["base"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert ("truth" in rows["base"]) == ("truth=null" not in overrides)
    assert all(0 <= share["mean"] <= 1 for share in summary["agreement"].values())
    assert (
        len(load_reward(out / "seed-0" / "hpgd" / "reward", trust_code=True)(prompts=["a b"], completions=["a"])) == 1
    )
    assert report_is_rebuilt(out)
    assert main([*command(material, out, *overrides), "--resume"]) == 0
    assert json.loads((out / "summary.json").read_text())["rows"] == summary["rows"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": r["prompt"], "chosen": r["chosen"]} for r in ROWS], "expected columns 'chosen' and 'rejected'"),
        (
            [{"prompt": r["prompt"], "chosen": r["chosen"], "rejcted": r["rejected"]} for r in ROWS],
            "rename_column('rejcted', 'rejected')",
        ),
        ([{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in ROWS], "look swapped"),
        ([{**r, "rejected": r["chosen"]} for r in ROWS], "none of 30 pairs is left"),
        (ROWS[:4], "at least 2 prompts in each part"),
    ],
    ids=["missing", "misspelt", "swapped", "equal", "few"],
)
def test_pairs_refused(
    material: Path, tmp_path: Path, rows: list[dict], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write(tmp_path / "bad.jsonl", rows)
    assert main(command(material, tmp_path / "run", f"preferences={bad}")) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()  # nothing was trained for it


def test_parts_share_no_prompt_and_take_every_pair(material: Path) -> None:
    parts = load_parts(str(material / "pairs.jsonl"), (0.3, 0.2), seed=1)
    prompts = [set(part["prompt"]) for part in (parts.train, parts.judge, parts.test)]
    assert [len(p) for p in prompts] == [15, 9, 6]
    assert set.union(*prompts) == set(PROMPTS)
    assert load_parts(str(material / "pairs.jsonl"), (0.3, 0.2), seed=2).test["prompt"] != parts.test["prompt"]


def test_a_test_split_is_held_out_less_what_was_trained_on(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from datasets import Dataset, DatasetDict\n"
        "def rows(names):\n"
        "    return Dataset.from_list([{'prompt': p, 'chosen': 'x', 'rejected': 'y'} for p in names])\n"
        "def data():\n"
        "    return DatasetDict(train=rows(list('abcc')), test=rows(list('cdefg')))\n"
    )
    parts = load_parts(f"{tmp_path}/own.py:data", (0.1, 0.1), seed=0)
    assert parts.train["prompt"] == list("abcc") and parts.prompts()["train"]["prompt"] == list("abc")
    assert sorted([*parts.judge["prompt"], *parts.test["prompt"]]) == list("defg")


def test_careful_annotators_want_what_the_judge_wants_and_hurried_ones_what_is_long() -> None:
    data = annotated_replies()
    assert data["test"][:5] == annotated_replies()["test"][:5]
    assert not set(data["train"]["prompt"]) & set(data["test"]["prompt"])
    agreed, longer = {}, {}
    for split, rows in data.items():
        assert all(row["chosen"] != row["rejected"] for row in rows)
        good, bad = (reply_judge(list(rows["prompt"]), list(rows[name])) for name in ("chosen", "rejected"))
        agreed[split] = sum(g > b for g, b in zip(good, bad, strict=True)) / len(rows)
        longer[split] = sum(len(row["chosen"].split()) > len(row["rejected"].split()) for row in rows) / len(rows)
    assert 0.7 < agreed["test"] < 0.95 and agreed["train"] < agreed["test"] - 0.1
    assert longer["train"] > longer["test"] + 0.1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("split.judge=0.9", "shares that leave some for training"),
        ("label_weight=-1", "label_weight >= 0"),
        ("reward_training.epochs=0", "positive numbers"),
        ("seeds=[]", "at least one"),
    ],
)
def test_settings_refused(material: Path, override: str, message: str) -> None:
    config = Path(__file__).parents[1] / "recipes" / "preference_dataset" / "config.yaml"
    with pytest.raises(InputError, match=message):
        load_config(Config, config, [override])
