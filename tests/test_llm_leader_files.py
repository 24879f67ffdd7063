"""Leaders on disk: written, read again to the same scores and the same budget, carried to the hub, or refused."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import peft
import pytest
import safetensors.torch
import tiny_reward_models
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import align_cbrl
from align_cbrl import InputError, Rollouts
from align_cbrl.llm import (
    LanguageLeader,
    LearnedBeta,
    LengthShaping,
    LoRA,
    RewardMixture,
    RewardModel,
    RewardModelLeader,
    Shaped,
    load_leader,
    load_reward,
)
from align_cbrl.runs.imports import load_object

PROMPTS = ["a b"] * 8
TEXTS = ["a", "b a", "c d", "e", "f f a", "a c b d", "b", "d e f"]
IDS = [[2] * (1 + (3 * i) % 5) for i in range(8)]
REFERENCE = Rollouts.bandit(
    contexts=torch.arange(8) % 2, steps={"prompt": PROMPTS, "completion": TEXTS, "completion_ids": IDS}
)
WORDS = load_object("enumerable_lm.length_reward")
OWN = "def {name}(prompts, completions, **columns):\n    return [float(c.count('{letter}')) for c in completions]\n"


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    return {name: tiny_reward_models.build(root / name, name) for name in tiny_reward_models.ARCHITECTURES}


def move(leader: LanguageLeader, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in leader.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def make(name: str, classifiers: dict[str, Path]) -> LanguageLeader:
    if name in ("free", "positive", "softmax"):
        terms = {"words": WORDS, "model": RewardModel(classifiers["gpt2"])}
        return RewardMixture(terms, {"words": 0.5, "model": 0.2}, constraint=name)  # type: ignore[arg-type]
    if name == "length":
        return LengthShaping(RewardModel(classifiers["llama"]), target=3.0, weight=0.2, learn_target=True)
    if name == "shaped mixture":
        return Shaped(RewardModel(classifiers["llama"]), RewardMixture({"words": WORDS}, {"words": 0.1}))
    *shaped, architecture, trainable = name.split()
    lora = LoRA(2, 3.0) if trainable == "lora" else None
    checkpointing = name == "qwen3 all"
    leader = RewardModelLeader(
        RewardModel(classifiers[architecture]),
        trainable,  # type: ignore[arg-type]
        1.5,
        budget=0.4,
        lora=lora,
        gradient_checkpointing=checkpointing,
    )
    return Shaped(WORDS, leader, budget=0.2) if shaped else leader


LEADERS = (
    "free", "positive", "softmax", "length", "shaped mixture", "llama head", "llama lora", "llama all", "gpt2 head",
    "gpt2 lora", "gpt2 all", "qwen2 lora", "qwen3 lora", "qwen3 all", "shaped llama lora", "shaped gpt2 head",
)  # fmt: skip


@pytest.mark.parametrize("name", LEADERS)
def test_a_saved_leader_is_the_same_leader(name: str, classifiers: dict[str, Path], tmp_path: Path) -> None:
    leader = make(name, classifiers)
    leader.calibrate(REFERENCE)
    move(leader)
    leader.save_pretrained(tmp_path / "reward")
    arguments: dict[str, Any] = {"prompts": PROMPTS, "completions": TEXTS[::-1], "completion_ids": IDS[::-1]}
    want = leader.score(**arguments)
    assert load_reward(tmp_path / "reward", trust_code=True)(**arguments) == want.tolist()
    again = type(leader).from_pretrained(tmp_path / "reward", trust_code=True)
    # Still the same to learn on: gradients, and what the budget is measured from, after being moved further.
    want.sum().backward()
    again.score(**arguments).sum().backward()
    for p, q in zip(leader.parameters(), again.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    for one in (leader, again):
        move(one, 3.0)
        one.project()
    # Parameters that loading and saving lists in another order would be moved otherwise: none is.
    torch.testing.assert_close(again.score(**arguments), leader.score(**arguments), rtol=1e-9, atol=1e-9)
    again.save_pretrained(tmp_path / "twice")
    assert load_reward(tmp_path / "twice", trust_code=True)(**arguments) == again.score(**arguments).tolist()


def test_the_budget_of_a_loaded_leader_is_measured_from_where_it_started(
    classifiers: dict[str, Path], tmp_path: Path
) -> None:
    for trainable in ("head", "lora", "all"):
        leader = RewardModelLeader(RewardModel(classifiers["llama"]), trainable, budget=0.1)  # type: ignore[arg-type]
        move(leader)
        leader.project()
        assert leader.change() == pytest.approx(0.1)
        leader.save_pretrained(tmp_path / trainable)
        assert RewardModelLeader.from_pretrained(tmp_path / trainable).change() == pytest.approx(0.1)


def test_without_a_budget_nothing_is_pulled_back(classifiers: dict[str, Path], tmp_path: Path) -> None:
    for trainable in ("head", "lora", "all"):
        leader = RewardModelLeader(RewardModel(classifiers["llama"]), trainable, budget=None)  # type: ignore[arg-type]
        move(leader)
        moved = leader.change()
        leader.project()
        assert leader.change() == moved > 0.0
        leader.save_pretrained(tmp_path / trainable)
        again = RewardModelLeader.from_pretrained(tmp_path / trainable)
        again.project()
        assert again.budget is None and again.change() == pytest.approx(moved)
        assert "| budget |" not in (tmp_path / trainable / "README.md").read_text()


def test_a_start_that_is_gone_matters_only_to_the_budget(classifiers: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(classifiers["llama"], base)
    leader = RewardModelLeader(RewardModel(base), "all")
    leader.save_pretrained(tmp_path / "reward")
    shutil.rmtree(base)
    again = RewardModelLeader.from_pretrained(tmp_path / "reward")
    torch.testing.assert_close(again.score(PROMPTS, TEXTS), leader.score(PROMPTS, TEXTS))
    with pytest.raises(InputError, match=r"its budget is measured from '.*base', which does not load; put it back"):
        again.project()
    tiny_reward_models.build(base, "llama", seed=5)
    with pytest.raises(InputError, match="is not the model it started from, whose parameters had the norm"):
        again.project()
    shutil.rmtree(base)
    tiny_reward_models.build(base, "qwen2")
    with pytest.raises(InputError, match="is another architecture"):
        again.project()


def test_an_adapter_lies_beside_its_base_and_peft_reads_it(classifiers: dict[str, Path], tmp_path: Path) -> None:
    leader = RewardModelLeader(RewardModel(classifiers["llama"]), "lora", lora=LoRA(2, 3.0, ("q_proj", "down_proj")))
    move(leader)
    leader.save_pretrained(tmp_path)
    want = leader.reward_model.score(PROMPTS, TEXTS)
    untouched = RewardModel(tmp_path / "model").score(PROMPTS, TEXTS)
    torch.testing.assert_close(untouched, RewardModel(classifiers["llama"]).score(PROMPTS, TEXTS), rtol=0, atol=0)
    assert (want - untouched).abs().max() > 1e-3
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    merged = RewardModel(classifiers["llama"])
    merged.model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(merged.score(PROMPTS, TEXTS), want, rtol=1e-9, atol=1e-9)
    # A peft adapter's folder is a reward model too, merged into its base.
    torch.testing.assert_close(RewardModel(tmp_path / "adapter").score(PROMPTS, TEXTS), want, rtol=1e-6, atol=1e-6)


def test_an_adapters_file_holds_the_adapter_alone_and_has_to_be_whole(
    classifiers: dict[str, Path], tmp_path: Path
) -> None:
    leader = RewardModelLeader(RewardModel(classifiers["gpt2"]), "lora", lora=LoRA(2, 3.0))
    move(leader)
    leader.save_pretrained(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    factors = {n: p for n, p in leader.network.named_parameters() if p.requires_grad}
    assert {name.removeprefix("base_model.model.").replace("weight", "default.weight") for name in tensors} == set(
        factors
    )
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in factors.values())
    name = next(iter(tensors))
    for changed in (
        {key: value for key, value in tensors.items() if key != name},
        {**tensors, name: tensors[name][:, :1].contiguous()},
        {**tensors, "base_model.model.score.weight": torch.zeros(1, 1)},
    ):
        safetensors.torch.save_file(changed, file)
        with pytest.raises(InputError, match="does not fit the reward model beside it; save the leader again"):
            load_leader(tmp_path)


def test_files_and_folders_are_named_safely(tmp_path: Path, classifiers: dict[str, Path]) -> None:
    terms: dict[str, Any] = {}
    for place, letter in (("one", "a"), ("two", "b")):  # two files of the same name
        (tmp_path / place).mkdir()
        (tmp_path / place / "own.py").write_text(OWN.format(name="count", letter=letter))
        terms[place] = load_object(f"{tmp_path / place / 'own.py'}:count")
    for name in ("../escape", "a/b", "a_b", "A_B", "", "é|x"):
        terms[name] = RewardModel(classifiers["gpt2"])
    mixture = RewardMixture(terms, {name: 0.1 * (i + 1) for i, name in enumerate(terms)}, budget=9.0)
    folder = tmp_path / "deep" / "reward"
    for _ in range(2):  # saving again changes nothing
        mixture.save_pretrained(folder)
        names = sorted(file.name for file in folder.iterdir())
        assert sorted(file.name for file in tmp_path.iterdir()) == ["deep", "one", "two"]  # nothing escaped
        assert len(names) == 2 + 2 + 6 and "own_1.py" in names
    for place in ("one", "two"):  # the saved reward stands alone, in a process that never saw the originals
        shutil.rmtree(tmp_path / place)
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    again = load_leader(folder, trust_code=True)
    assert isinstance(again, RewardMixture)
    assert again.weights() == mixture.weights()
    assert again.score(PROMPTS, TEXTS).tolist() == mixture.score(PROMPTS, TEXTS).tolist()


def test_the_free_mixtures_of_version_0_1_load(tmp_path: Path) -> None:
    record = {
        "kind": "RewardMixture",
        "terms": {"words": {"function": "enumerable_lm.length_reward"}},
        "weights": {"words": 0.5},
        "budget": 1.0,
        "shift": [2.0],
        "scale": [4.0],
        "correlation": [[1.0]],
    }
    (tmp_path / "reward.json").write_text(json.dumps(record))
    mixture = RewardMixture.from_pretrained(tmp_path, trust_code=True)
    assert mixture.constraint == "free"
    assert mixture.score(["a"], ["a b c d"]).tolist() == [0.25]


@pytest.mark.parametrize("name", ["softmax", "shaped llama lora", "length", "gpt2 all"])
def test_the_model_card_says_what_it_is(name: str, classifiers: dict[str, Path], tmp_path: Path) -> None:
    leader = make(name, classifiers)
    leader.calibrate(REFERENCE)
    leader.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: align-cbrl\n")
    assert f"# {type(leader).__name__}" in card and f"align-cbrl {align_cbrl.__version__}" in card
    for what, value in leader.describe().items():
        assert f"| {what} | {value:.6g} |" in card if isinstance(value, float) else f"| {what} | {value} |" in card
    assert "| budget |" in card
    assert str(classifiers["gpt2"].parent) not in card
    runs_code = "runs the code of, `enumerable_lm.length_reward`" in card
    assert runs_code == (name in ("softmax", "shaped llama lora"))
    trust = ", trust_code=True" if runs_code else ""
    assert f'reward = load_reward("path/to/this/folder"{trust})' in card


def test_pushing_uploads_the_saved_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, repo_id: str, **settings: Any) -> None:
            calls.append(("create", {"repo_id": repo_id, **settings}))

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
            score = load_reward(folder_path, trust_code=True)(prompts=["a"], completions=["a b c"])
            names = sorted(file.name for file in Path(folder_path).iterdir())
            calls.append(("upload", {"repo_id": repo_id, "score": score, "names": names}))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("align_cbrl.llm.leaders.base.HfApi", Api)
    mixture = RewardMixture({"words": WORDS}, {"words": 0.5})
    assert mixture.push_to_hub("me/reward", private=True) == "https://hub/me/reward"
    assert calls == [
        ("create", {"repo_id": "me/reward", "private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/reward", "score": [1.5], "names": ["README.md", "reward.json"]}),
    ]


def test_saved_leaders_refused(tmp_path: Path) -> None:
    mixture = RewardMixture({"words": WORDS}, {"words": 0.5})
    mixture.save_pretrained(tmp_path)
    file = tmp_path / "reward.json"
    good = json.loads(file.read_text())
    unnamed = {key: value for key, value in good.items() if key != "class"}
    with pytest.raises(InputError, match=r"holds a RewardMixture; load it with RewardMixture\.from_pretrained"):
        Shaped.from_pretrained(tmp_path, trust_code=True)
    for record, message in (
        ({**unnamed, "kind": "RewardMixtur"}, "as 'kind', got 'RewardMixtur'"),
        (unnamed, "is damaged: it names no class"),
        ({k: v for k, v in good.items() if k != "budget"}, r"is damaged or from another version \(KeyError: 'budget'"),
        ({**good, "terms": {"words": {"reward_model": "../x"}}}, "expected a name inside the saved leader's folder"),
        ({**good, "terms": {"words": {"function": "../x.py:f"}}}, "expected a name inside the saved leader's folder"),
        ([], "is damaged: it names no class"),
    ):
        file.write_text(json.dumps(record))
        with pytest.raises(InputError, match=message):
            load_leader(tmp_path, trust_code=True)
    file.write_text('{"kind": ')
    with pytest.raises(InputError, match=r"is damaged \(Expecting value"):
        load_reward(tmp_path)


@pytest.mark.parametrize("name", LEADERS)
def test_folders_of_version_0_1_load(name: str, classifiers: dict[str, Path], tmp_path: Path) -> None:
    """They name the kind of leader in place of its class."""
    leader = make(name, classifiers)
    leader.calibrate(REFERENCE)
    move(leader)
    leader.save_pretrained(tmp_path)
    for file in tmp_path.rglob("reward.json"):
        record = json.loads(file.read_text())
        record["kind"] = record.pop("class").rpartition(":")[2]
        file.write_text(json.dumps({**record, "version": "0.1.0"}))
    arguments: dict[str, Any] = {"prompts": PROMPTS, "completions": TEXTS, "completion_ids": IDS}
    assert load_reward(tmp_path, trust_code=True)(**arguments) == leader.score(**arguments).tolist()


# ---- leaders of one's own ----

LEADER = '''
import torch
from torch import nn
from align_cbrl.llm import Correction, LanguageLeader


class WordLimit(LanguageLeader):
    """Charges for every word beyond a learned limit, and is saved with a file of its own."""

    def __init__(self, limit):
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(float(limit), dtype=torch.float64))
        self.table = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def score(self, prompts, completions, **columns):
        words = torch.tensor([len(text.split()) for text in completions], dtype=torch.float64)
        return -nn.functional.softplus(words - self.limit) + self.table.sum()

    def record(self, path):
        torch.save(self.table.detach(), path / "table.pt")
        return {"limit": self.limit.item()}

    @classmethod
    def from_record(cls, path, record):
        leader = cls(record["limit"])
        leader.table.data.copy_(torch.load(path / "table.pt"))
        return leader


class Family:
    class Inner(WordLimit):
        pass


class Charge(WordLimit, Correction):
    deviation = WordLimit.score

    def shrink(self, factor):
        pass

    def check_correction_of(self, frozen):
        pass
'''


def in_a_fresh_process(code: str, *folders: Path) -> str:
    """What `code` prints; `folders` are on its PYTHONPATH."""
    root = Path(align_cbrl.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, *folders)))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A user's module, importable from a folder of its own."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own_leader.py").write_text(LEADER)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield importlib.import_module("own_leader")
    del sys.modules["own_leader"]


@pytest.mark.parametrize("wrapped", ["alone", "inner", "beta", "correction"])
def test_a_users_leader_is_loaded_in_another_process(wrapped: str, own: Any, tmp_path: Path) -> None:
    leader: Any = own.Family.Inner(2.5) if wrapped == "inner" else own.WordLimit(2.5)
    move(leader)
    if wrapped == "beta":
        leader = LearnedBeta(leader, 0.5, low=0.1, high=1.0)
    if wrapped == "correction":
        leader = Shaped(WORDS, own.Charge(2.5))
    leader.save_pretrained(tmp_path / "reward")
    code = (
        "import json\nfrom align_cbrl.llm import load_leader\n"
        f"leader = load_leader({str(tmp_path / 'reward')!r}, trust_code=True)\n"
        f"scores = leader.score({PROMPTS!r}, {TEXTS!r}).tolist()\n"
        "print(json.dumps([type(leader).__qualname__, [p.tolist() for p in leader.parameters()], scores]))"
    )
    name, parameters, scores = json.loads(
        in_a_fresh_process(code, tmp_path / "code", Path(__file__).parent).splitlines()[-1]
    )
    assert name == type(leader).__qualname__
    assert parameters == [p.tolist() for p in leader.parameters()]
    assert scores == leader.score(PROMPTS, TEXTS).tolist()
    card = (tmp_path / "reward" / "README.md").read_text()
    assert "runs the code of, `own_leader:" in card


def test_a_class_that_cannot_be_imported_is_refused_when_saved(own: Any, tmp_path: Path) -> None:
    class Local(own.WordLimit):  # type: ignore[misc, name-defined]
        pass

    by_path = load_object(f"{tmp_path / 'code' / 'own_leader.py'}:WordLimit")
    for leader, message in (
        (Local(1), "Local: cannot be saved.*it is defined inside a function; define it at the top of a module"),
        (by_path(1), "WordLimit: cannot be saved.*was loaded from a file by its path; put the file's folder on PYTHON"),
    ):
        with pytest.raises(InputError, match=message):
            leader.save_pretrained(tmp_path / "reward")
    before = own.WordLimit
    importlib.reload(own)
    with pytest.raises(InputError, match="own_leader:WordLimit is not this class"):
        before(1).save_pretrained(tmp_path / "reward")
    assert not (tmp_path / "reward").exists()  # refused before anything is written
    script = LEADER + (
        "\nfrom align_cbrl import InputError\ntry:\n    WordLimit(1).save_pretrained('nowhere')\n"
        "except InputError as error:\n    print(error)\n"
    )
    printed = in_a_fresh_process(script)
    assert "WordLimit: cannot be saved" in printed
    assert "it is defined in the script or session that is running; move it to a module of its own" in printed


def test_a_class_that_does_not_load_is_named_with_the_reason(own: Any, tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    own.WordLimit(1).save_pretrained(folder)
    record = json.loads((folder / "reward.json").read_text())
    assert record["class"] == "own_leader:WordLimit"
    (tmp_path / "code" / "own_broken.py").write_text("1 / 0\n")
    for name, message in (
        ("gone:WordLimit", r"class gone:WordLimit, but the module 'gone' cannot be imported \(ModuleNotFoundError"),
        ("own_broken:WordLimit", r"'own_broken' cannot be imported \(ZeroDivisionError.*PYTHONPATH"),
        ("own_leader:WordLimits", "the module 'own_leader' has no class 'WordLimits'; was it renamed or moved"),
        ("collections:OrderedDict", "names the class collections:OrderedDict, which is no LanguageLeader"),
        ("align_cbrl.llm:LanguageLeader", "which is no LanguageLeader that can be made"),
        ("os:system", "the module 'os' has no class 'system'"),
        (f"{tmp_path}/code/own_leader.py:WordLimit", "is not the name of a class; expected module:Class"),
        ("own_leader", "is not the name of a class; expected module:Class"),
    ):
        (folder / "reward.json").write_text(json.dumps({**record, "class": name}))
        with pytest.raises(InputError, match=message):
            load_leader(folder, trust_code=True)
    (folder / "reward.json").write_text(json.dumps(record))
    (folder / "table.pt").unlink()
    with pytest.raises(InputError, match=r"holds a WordLimit that does not load: it is damaged.*FileNotFoundError"):
        load_leader(folder)


@pytest.mark.parametrize("term", [str.upper, len, load_object, "text", object()])
def test_terms_that_cannot_be_found_again(term: Any, tmp_path: Path) -> None:
    if not callable(term):
        with pytest.raises(InputError, match=r"RewardMixture.terms\['odd'\]: expected a function, got"):
            RewardMixture({"odd": term})
        return
    mixture = RewardMixture({"odd": term})
    if getattr(term, "__module__", None) in ("builtins", "align_cbrl.runs.imports"):  # importable: saved by name
        mixture.save_pretrained(tmp_path)
    else:
        with pytest.raises(InputError, match="term 'odd': expected a reward model or a function defined at the top"):
            mixture.save_pretrained(tmp_path)


# ---- reward models from folders of many kinds ----


def messages(prompt: str, answer: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]


@pytest.mark.parametrize("architecture", tiny_reward_models.ARCHITECTURES)
def test_architectures_score_texts_and_conversations(architecture: str, classifiers: dict[str, Path]) -> None:
    model = RewardModel(classifiers[architecture])
    assert model.head_name == "score"
    pairs = [messages("a b", "c"), messages("c d e", "f a"), messages("b e", "d")]
    prompts, answers = [p for p, _ in pairs], [c for _, c in pairs]
    plain = model(["a b", "c d e", "b e"], ["c", "f a", "d"])
    # The template writes no end of sequence; the same tokens with it are another text.
    ids = [model.tokenizer(f"{p[0]['content']} {c[0]['content']}")["input_ids"] for p, c in pairs]
    with torch.no_grad():
        want = [model.model(input_ids=torch.tensor([row])).logits.item() for row in ids]
    assert model(prompts, answers) == pytest.approx(want, abs=1e-6)
    assert plain != pytest.approx(want, abs=1e-3)
    leader = RewardModelLeader(RewardModel(classifiers[architecture]), "lora")
    leader.score(prompts, answers).sum().backward()
    assert all(p.grad is not None for p in leader.parameters() if p.requires_grad)


def test_a_template_writes_its_own_special_tokens(classifiers: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(classifiers["llama"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<eos> $A", special_tokens=[("<eos>", 1)]
    )
    tokenizer.save_pretrained(tmp_path / "model")
    model = RewardModel(tmp_path / "model")
    seen: list[list[int]] = []
    forward = model.model.forward

    def spy(**inputs: Any) -> Any:
        seen.append(inputs["input_ids"][0].tolist())
        return forward(**inputs)

    model.model.forward = spy
    prompt, answer = messages("a b", "c")
    model([prompt], [answer])
    model(["a b"], [" c"])
    assert seen == [[2, 3, 4], [1, 2, 3, 4, 1]]


def test_conversations_refused(classifiers: dict[str, Path]) -> None:
    model = RewardModel(classifiers["llama"])
    prompt, answer = messages("a", "b")
    with pytest.raises(InputError, match="expected prompt and completion both as texts or both as lists of messages"):
        model([prompt], ["b"])
    with pytest.raises(InputError, match="expected as many prompts as completions, at least one, got 0 and 0"):
        model([], [])
    model.tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"its tokenizer has no chat template; set tokenizer\.chat_template"):
        model([prompt], [answer])


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    folder = lm.build(tmp_path / "policy")
    with pytest.raises(InputError, match=r"holds no weights for the score head \(score.weight\), so it is a language"):
        RewardModel(folder)


def test_a_score_that_is_not_a_number_is_refused(classifiers: dict[str, Path]) -> None:
    model = RewardModel(classifiers["llama"])
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="expected finite scores, got nan for completion 0: 'b'"):
        model(["a"], ["b"])


def test_long_texts_lose_their_beginning(classifiers: dict[str, Path]) -> None:
    model = RewardModel(classifiers["llama"], max_length=3)
    with pytest.warns(UserWarning, match="reads 3 tokens of a text and got 8, so that prompts lose their beginning"):
        assert model(["a b c d e"], [" f a "]) == model(["d e f"], [" f a "])
    assert model(["a b c d e"], [" f a "]) != model(["a b c d e"], [" f b "])


def test_adapter_folders(classifiers: dict[str, Path], tmp_path: Path) -> None:
    # As trl's RewardTrainer leaves it: a language model below, the head saved with the adapter.
    policy = lm.build(tmp_path / "policy")
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    adapted = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    reference = RewardModel(classifiers["llama"])
    reference.model = adapted.eval()
    reference.model.config.pad_token_id = 0
    want = reference(["a b"], ["c"])
    assert RewardModel(tmp_path / "adapter")(["a b"], ["c"]) == pytest.approx(want, abs=1e-5)

    adapter = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(adapter.read_text())
    adapter.write_text(json.dumps({**settings, "modules_to_save": None}))
    with pytest.raises(InputError, match="holds no weights for the score head"):
        RewardModel(tmp_path / "adapter")
    adapter.write_text(json.dumps({**settings, "target_modules": ["q_proj", "lm_head"]}))
    with pytest.raises(InputError, match="its adapter lies on lm_head, which a reward model does not have"):
        RewardModel(tmp_path / "adapter")
    adapter.write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match="neither a hub id nor a folder that loads"):
        RewardModel(tmp_path / "adapter")
