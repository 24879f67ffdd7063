"""A saved leader's folder runs nothing that it names, unless the caller trusts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from align_cbrl.recipes.worlds.replies.rewards import brevity, length

from align_cbrl import InputError
from align_cbrl.llm import LearnedBeta, LengthShaping, RewardMixture, Shaped, load_leader, load_reward
from align_cbrl.llm.leaders.base import LanguageLeader
from align_cbrl.llm.leaders.trust import own_function

MIXTURE = {"class": "align_cbrl.llm.leaders.mixture:RewardMixture", "constraint": "free", "budget": 1.0}
ONE = {"weights": {"a": 1.0}, "shift": [0.0], "scale": [1.0], "correlation": [[1.0]]}


def folder_of(path: Path, record: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    (path / "reward.json").write_text(json.dumps(record))
    return path


def shout(completions: list[str]) -> list[float]:
    return [float(text.isupper()) for text in completions]


@pytest.mark.parametrize(
    "function",
    [
        "subprocess.getoutput", "os.system", "os.path.os.system", "builtins.eval", "builtins.exec", "evil.run",
        "evil.py:run", "./evil.py:run", "../evil.py:run", "/etc/evil.py:run", "sub/evil.py:run", "evil:run", "evil",
        "align_cbrl.cli.sys.exit", "align_cbrl.cli.main", "align_cbrl.runs.imports.load_object",
        "align_cbrl.runs.imports.importlib.import_module", "align_cbrl.llm.leaders.terms.shutil.rmtree",
        "align_cbrl.llm.scoring.call_score_function", "align_cbrl.recipes.worlds.replies.rewards._help",
        "align_cbrl.recipes.worlds.replies.rewards.length.__globals__", "align_cbrl.llm.RewardModel", "align_cbrl.",
        "align_cbrl_evil.run", "align_cbrl.recipes.evil.run", ".evil", "", "align_cbrl.llm.sampling.torch.load",
    ],
)  # fmt: skip
def test_no_function_is_looked_up_but_rewards_of_this_library(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "reward", {**MIXTURE, **ONE, "terms": {"a": {"function": function}}})
    code = f"open({str(tmp_path / 'touched')!r}, 'w').close()\ndef run(completions):\n    return [0.0]\n"
    for place in (folder, tmp_path, folder / "sub"):
        place.mkdir(exist_ok=True)
        (place / "evil.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(folder)
    before = set(sys.modules)
    for load in (load_leader, load_reward, RewardMixture.from_pretrained):
        with pytest.raises(InputError, match=r"term 'a': is the function .* pass trust_code=True, or pass a function"):
            load(folder)
    assert not (tmp_path / "touched").exists()
    assert "evil" not in {name.rpartition(".")[2] for name in set(sys.modules) - before}
    assert load_reward(folder, terms={"a": shout})(prompts=["q"], completions=["A"]) == [1.0]


@pytest.mark.parametrize(
    "name", ["evil:Evil", "os:system", "antigravity:x", "evil.py:Evil", "align_cbrl.cli:main", "align_cbrl.evil:Evil"]
)
def test_no_class_is_imported_but_leaders_that_are_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "reward", {"class": name})
    (tmp_path / "evil.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    nested = folder_of(
        tmp_path / "beta", {"class": "align_cbrl.llm.leaders.beta:LearnedBeta", "beta": 0.5, "low": 0.1, "high": 1.0}
    )
    folder_of(nested / "leader", {"class": name})
    frozen = {"frozen": {"function": "os.system"}, "strength": 1.0, "budget": 1.0, "shift": 0.0, "scale": 1.0}
    shaped = folder_of(tmp_path / "shaped", {"class": "align_cbrl.llm.leaders.shaped:Shaped", **frozen})
    folder_of(shaped / "correction", {**MIXTURE, **ONE, "terms": {"a": {"function": "os.system"}}})
    with pytest.raises(InputError, match=rf"of the class {name}, and importing its module would run code that this"):
        load_leader(folder)
    with pytest.raises(InputError, match=rf"of the class {name}, and importing its module would run code that this"):
        load_leader(nested)
    with pytest.raises(InputError, match=r"term 'a': is the function 'os\.system'"):
        load_leader(shaped)
    with pytest.raises(InputError, match=r"term 'frozen': is the function 'os\.system'"):
        load_leader(shaped, terms={"a": shout})
    assert isinstance(load_leader(shaped, terms={"a": shout, "frozen": shout}), Shaped)
    assert "evil" not in sys.modules and "antigravity" not in sys.modules


class Own(LanguageLeader):
    """Defined in this process, so that its code has run already."""

    def score(self, prompts: Any, completions: Any, **columns: Any) -> torch.Tensor:
        return torch.zeros(len(completions))

    def record(self, path: Path) -> dict[str, Any]:
        return {}

    @classmethod
    def from_record(cls, path: Path, record: Any) -> Own:
        return cls()


def test_what_is_trusted_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = RewardMixture({"length": length, "brevity": brevity}, {"length": 0.5, "brevity": 0.25})
    beta = LearnedBeta(mixture, 0.5, low=0.1, high=1.0)
    shaped = Shaped(length, RewardMixture({"brevity": brevity}, {}))
    for leader in (mixture, beta, LengthShaping(length, 3), shaped):
        folder = tmp_path / type(leader).__name__
        leader.save_pretrained(folder)
        want = leader.score(["q"], ["An answer."]).tolist()
        assert load_reward(folder)(prompts=["q"], completions=["An answer."]) == want
        assert "Loading runs no code from this folder." in (folder / "README.md").read_text()
    assert own_function("align_cbrl.recipes.worlds.replies.rewards.length") is length
    monkeypatch.setattr("align_cbrl.cli.foreign", shout, raising=False)  # found there, and not defined there
    assert own_function("align_cbrl.cli.foreign") is None
    with pytest.raises(InputError, match=r"load_leader.terms: the saved leader has no terms named \['lenght'\]"):
        load_leader(tmp_path / "RewardMixture", terms={"lenght": shout})

    found = load_leader(tmp_path / "RewardMixture", terms={"length": shout})
    assert isinstance(found, RewardMixture) and found.terms == {"length": shout, "brevity": brevity}
    own = folder_of(tmp_path / "own", {"class": f"{Own.__module__}:{Own.__qualname__}"})
    assert isinstance(load_leader(own), Own)

    (
        folder_of(tmp_path / "file", {**MIXTURE, **ONE, "terms": {"a": {"function": "mine.py:run"}}}) / "mine.py"
    ).write_text("def run(completions):\n    return [2.0] * len(completions)\n")
    assert load_reward(tmp_path / "file", trust_code=True)(prompts=["q"], completions=["A"]) == [2.0]
    with pytest.raises(InputError, match=r"is the function 'mine\.py:run'"):  # trust ends with the call
        load_reward(tmp_path / "file")
