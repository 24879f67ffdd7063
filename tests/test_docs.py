"""The documentation tells the truth: its Python runs, its paths exist, and every public name is documented."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
import sys
import types
from pathlib import Path

import enumerable_lm as lm
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

import align_cbrl
import align_cbrl.llm
import toy_cmdp

ROOT = Path(align_cbrl.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

if not (ROOT / "README.md").is_file():
    pytest.skip("the documentation is not part of an installed package", allow_module_level=True)

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w./]+\.py)\n")
SHORTER = {
    "trl_script": {
        "max_steps=100": "max_steps=1, max_completion_length=4, per_device_train_batch_size=8, disable_tqdm=True, "
        "save_strategy='no', logging_strategy='no'"
    }
}
"""What is not run as printed, by page: 100 steps of trl's GRPO, of 256 tokens by default, are too long for a test."""


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, with the line at which each begins."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start(1)].count("\n"), m.group(1)) for m in BLOCK.finditer(text)]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the policy, the reward model and the prompts that the examples name."""
    folder = tmp_path_factory.mktemp("docs")
    lm.build(folder / "models/policy")
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/policy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(lm.VOCABULARY), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=lm.EOS, bos_token_id=None,
        num_labels=1,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder / "models/reward")
    tokenizer.save_pretrained(folder / "models/reward")
    prompts = [" ".join(words) for words in itertools.permutations("abcdef", 3)][:60]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return folder


@pytest.mark.filterwarnings("ignore")  # trl's defaults make transformers and torch warn on a CPU, which is no failure
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page.stem in ("README", "meta_rl", "own_problem")), id=page.stem)
        for page in PAGES
        if blocks(page)
    ],
)
def test_python_in_the_documentation_runs(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page are one program, in their order."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)
    module = types.ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    program = []
    for line, code in blocks(page):
        if code.startswith("# not run\n"):
            continue
        if name := FILE.match(code):
            file = workplace / name.group(1)
            file.parent.mkdir(exist_ok=True)
            file.write_text(code)
        else:
            program.append((line, code))
    for line, code in program:
        for long, short in SHORTER.get(page.stem, {}).items():
            code = code.replace(long, short)
        exec(compile("\n" * line + code, str(page), "exec"), module.__dict__)


def test_every_shortening_is_of_something() -> None:
    text = {page.stem: "".join(code for _, code in blocks(page)) for page in PAGES}
    assert [long for page, changes in SHORTER.items() for long in changes if long not in text[page]] == []


def unlisted(init: Path) -> list[str]:
    """The modules and packages beside `init` that its docstring does not list, each at the beginning of a line."""
    docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
    listed = set(re.findall(r"^ *`?([a-z]\w*)", docstring, re.MULTILINE))
    modules = {file.stem for file in init.parent.glob("*.py")}
    modules |= {file.parent.name for file in init.parent.glob("*/__init__.py")}
    if (init.parent / "config.yaml").is_file():
        modules -= {"recipe"}  # every recipe has one
    return sorted(module for module in modules - listed if not module.startswith("_"))


def test_every_package_lists_its_modules() -> None:
    """`help(package)` is the map of a room."""
    missing = {}
    for package in ("align_cbrl", "toy_cmdp", "recipes"):
        for init in sorted((ROOT / package).rglob("__init__.py")):
            if names := unlisted(init):
                missing[init.parent.relative_to(ROOT).as_posix()] = names
    assert not missing, "\n".join(f"{package}/__init__.py: {', '.join(names)}" for package, names in missing.items())


def test_a_module_that_is_not_listed_is_found(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text('"""A room.\n\n    one  the first\n\nIt also mentions two and sub.\n"""\n')
    for name in ("one.py", "two.py", "_private.py", "sub/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert unlisted(tmp_path / "__init__.py") == ["sub", "two"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_code_and_tests_exist(page: Path) -> None:
    """`path/file.py:name` of the paper index, `test_file.py::test_name` of the derivation."""
    text = page.read_text(encoding="utf-8")
    wrong = []
    for file, name in re.findall(r"`((?:align_cbrl|toy_cmdp|recipes)/[\w/.]+)(?::(\w+))?`", text):
        source = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else ""
        if not (ROOT / file).exists() or (name and not re.search(rf"^(class|def) {name}\b", source, re.MULTILINE)):
            wrong.append(f"{file}:{name}" if name else file)
    file = ""
    for named, test in re.findall(r"`(?:tests/)?(test_\w+\.py)?::(test_\w+)`", text):
        file = named or file
        source = (ROOT / "tests" / file).read_text(encoding="utf-8") if (ROOT / "tests" / file).is_file() else ""
        if f"def {test}(" not in source:
            wrong.append(f"{file}::{test}")
    assert wrong == []


@pytest.mark.parametrize("package", [align_cbrl, align_cbrl.llm, toy_cmdp], ids=lambda package: package.__name__)
def test_every_public_name_has_a_docstring(package: types.ModuleType) -> None:
    bare = []
    for name in package.__all__:
        thing = getattr(package, name)
        if not inspect.getdoc(thing):
            bare.append(name)
        if not inspect.isclass(thing):
            continue
        for attribute, value in vars(thing).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if not attribute.startswith("_") and inspect.isfunction(function) and not inspect.getdoc(function):
                bare.append(f"{name}.{attribute}")
    assert bare == []
