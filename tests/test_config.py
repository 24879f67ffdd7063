"""Configurations: types, overrides, and the messages for what is wrong."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Literal

import pytest

from align_cbrl.errors import InputError
from align_cbrl.runs.config import fingerprint, load_config, nearest, to_dict


@dataclasses.dataclass
class Inner:
    steps: int = 10
    lr: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps: expected at least 1, got {self.steps}")


@dataclasses.dataclass
class Term:
    path: str
    weight: float = 1.0


@dataclasses.dataclass
class Deeper:
    lr: float = 0.1
    inner: Inner = dataclasses.field(default_factory=Inner)


@dataclasses.dataclass
class Config:
    name: str = "run"
    seed: int = 0
    quiet: bool = False
    model: str | None = None
    clip: float | None = 1.0
    file: Path = Path("a.json")
    mode: Literal["full", "head"] = "head"
    sizes: list[int] = dataclasses.field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.999)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    terms: list[Term] = dataclasses.field(default_factory=list)
    inner: Inner = dataclasses.field(default_factory=lambda: Inner(steps=3))
    switch: Literal["on", "off"] = "on"
    deeper: Deeper | None = None
    named: dict[str, Term] = dataclasses.field(default_factory=dict)
    source: str | Inner | None = None


@dataclasses.dataclass
class Required:
    path: str


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_defaults_stay_without_a_file() -> None:
    assert load_config(Config, None, []) == Config()


def test_every_kind_of_field_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        name: "7"
        seed: 3
        quiet: true
        model: null
        clip: 1e-3
        file: b/c.json
        mode: full
        sizes: [1, 2]
        betas: [0, 0.5]
        weights: {proxy: 1, length: -1e-2}
        terms: [{path: a.b}, {path: c.d, weight: 2}]
        inner: {lr: .5}
        """,
    )
    config = load_config(Config, path, [])
    assert config == Config(
        name="7",
        seed=3,
        quiet=True,
        clip=1e-3,
        file=Path("b/c.json"),
        mode="full",
        sizes=[1, 2],
        betas=(0.0, 0.5),
        weights={"proxy": 1.0, "length": -0.01},
        terms=[Term("a.b"), Term("c.d", 2.0)],
        inner=Inner(steps=3, lr=0.5),  # steps: from the field's default, not from Inner's
    )
    assert isinstance(config.betas[0], float) and isinstance(config.weights["proxy"], float)


@pytest.mark.parametrize(("written", "read"), [("off", "off"), ("on", "on"), ('"off"', "off")])
def test_on_and_off_are_words_where_words_are_asked_for(tmp_path: Path, written: str, read: str) -> None:
    """YAML reads them as false and true; in quotes it does not."""
    assert load_config(Config, write(tmp_path, f"switch: {written}"), []).switch == read
    assert load_config(Config, None, [f"switch={written}"]).switch == read


def test_overrides_win_over_the_file_and_reach_into_lists_and_mappings(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\nterms: [{path: a.b}]\n")
    overrides = ["seed=4", "inner.steps=7", "terms.0.weight=2.5", "weights.proxy=1e-1", "clip=null", "sizes=[1]"]
    config = load_config(Config, path, overrides)
    assert (config.seed, config.inner.steps, config.terms, config.weights, config.clip, config.sizes) == (
        *(4, 7, [Term("a.b", 2.5)], {"proxy": 0.1}, None, [1]),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 1", r"config\.yaml: sed: unknown key; did you mean 'seed'"),
        (
            "inner: {stepps: 1}",
            r"config\.yaml: inner\.stepps: unknown key; did you mean 'steps'\? There are: lr, steps",
        ),
        ("seed: 1.5", r"config\.yaml: seed: expected an integer, got the number 1\.5"),
        ("seed: true", r"seed: expected an integer, got true"),
        ("inner: {lr: fast}", r"inner\.lr: expected a number, got the string 'fast'"),
        ("clip: true", r"clip: expected a number or null, got true"),
        ("quiet: 1", r"quiet: expected true or false, got the integer 1"),
        ("name: 12", r"name: expected a string, got the integer 12; put it in quotes"),
        ("sizes: [1, x]", r"sizes\.1: expected an integer, got the string 'x'"),
        ("betas: [1]", r"betas: expected a list of 2 items: a number, a number, got the list \[1\]"),
        ("weights: [1]", r"weights: expected a mapping, each value a number, got the list \[1\]"),
        ("terms: [{weight: 1}]", r"terms\.0\.path: is required: expected a string"),
        ("inner: 3", r"inner: expected a mapping of Inner's fields, got the integer 3"),
        ("mode: heda", r"mode: expected 'full' or 'head', got the string 'heda'; did you mean 'head'"),
        ("inner: {steps: 0}", r"config\.yaml: inner\.steps: expected at least 1, got 0"),
        ("- 1", r"expected a mapping of keys to values, got the list \[1\]"),
        (
            "steps: 3",
            r"config\.yaml: steps: unknown key; did you mean inner\.steps or deeper\.inner\.steps or source\.steps\?$",
        ),
        ("lr: 3", r"lr: unknown key; did you mean inner\.lr or deeper\.lr or source\.lr\?$"),
        ("weight: 3", r"weight: unknown key; did you mean 'weights'[^?]*\? There are: "),
        ("mode: off", r"mode: expected 'full' or 'head', got false; put it in quotes to make it a string"),
        ("deeper: {inner: {setps: 1}}", r"deeper\.inner\.setps: unknown key; did you mean 'steps'\?"),
        ("deeper: {inner: 3}", r"deeper\.inner: expected a mapping of Inner's fields, got the integer 3"),
        ("named: {b: {wait: 1}}", r"named\.b\.wait: unknown key; "),
        ("named: {b: {path: 1}}", r"named\.b\.path: expected a string, got the integer 1; put it in quotes"),
        ("source: {steps: x}", r"source\.steps: expected an integer, got the string 'x'"),
        ("source: {stpes: 1}", r"source\.stpes: unknown key; did you mean 'steps'"),
        ("source: [1]", r"source: expected a string or a mapping of Inner's fields or null, got the list \[1\]"),
        ("seed: 1\nseed: 2", r"not valid YAML: the key 'seed' stands twice .*line 2, column 1"),
        ("inner: {lr: 1, lr: 2}", r"not valid YAML: the key 'lr' stands twice"),
        ("7: 1", r"config\.yaml: 7: unknown key"),
        ("a: [1", r"config\.yaml: not valid YAML: .*line"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(Config, write(tmp_path, text), [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.setps=3", r"--set inner\.setps=3: inner\.setps: unknown key; did you mean 'steps'"),
        ("iner.steps=3", r"--set iner\.steps=3: iner: unknown key; did you mean 'inner'"),
        ("seed=x", r"--set seed=x: seed: expected an integer"),
        ("seed", r"--set seed: expected key=value"),
        ("=1", r"expected key=value"),
        ("seed.a=1", r"seed is the integer 3, it has no 'a'"),
        ("sizes.2=1", r"sizes is a list of 1; expected the number of an item from 0, got '2'"),
        ("sizes=[1", r"--set sizes=\[1: the value is not valid YAML"),
        ("inner.steps=0", r"--set inner\.steps=0: inner\.steps: expected at least 1"),
    ],
)
def test_what_is_wrong_in_an_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, "seed: 3\nsizes: [1]\n")
    with pytest.raises(InputError, match=message):
        load_config(Config, path, [override])


def test_a_missing_file_and_a_missing_key_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: cannot read the configuration: No such file"):
        load_config(Config, tmp_path / "none.yaml", [])
    with pytest.raises(InputError, match=r"path: is required: expected a string"):
        load_config(Required, None, [])


def test_a_configuration_survives_the_way_to_plain_data_and_back(tmp_path: Path) -> None:
    config = Config(sizes=[1], terms=[Term("a.b")], weights={"x": 1.0})
    path = write(tmp_path, __import__("yaml").safe_dump(to_dict(config)))
    assert load_config(Config, path, []) == config
    with pytest.raises(InputError, match=r"expected an instance of a dataclass"):
        to_dict(Config)


@dataclasses.dataclass
class FromFunction:
    function: str
    budget: int | None = None


@dataclasses.dataclass
class FromServer:
    url: str
    model: str
    rate: float | None = None
    budget: int | None = None


@dataclasses.dataclass
class WithJudge:
    judge: FromFunction | FromServer = dataclasses.field(default_factory=lambda: FromFunction("a.b", budget=1))


@pytest.mark.parametrize(
    ("text", "overrides", "judge"),
    [
        ("", [], FromFunction("a.b", 1)),
        ("judge: {budget: 2}", [], FromFunction("a.b", 2)),
        ("judge: {url: x, model: m}", [], FromServer("x", "m")),
        ("judge: {function: null, url: x, model: m}", [], FromServer("x", "m")),
        ("", ["judge.url=x", "judge.model=m"], FromServer("x", "m")),
        ("judge: {function: c.d, budget: 5}", ["judge.url=x", "judge.model=m"], FromServer("x", "m")),
        (
            "judge: {function: c.d, budget: 5}",
            ["judge.model=m", "judge.url=x", "judge.rate=2"],
            FromServer("x", "m", 2.0),
        ),
        ("judge: {function: c.d}", ["judge.function=null", "judge.url=x", "judge.model=m"], FromServer("x", "m")),
        ("judge: {function: c.d}", ["judge={url: x, model: m}"], FromServer("x", "m")),
        ("judge: {function: c.d}", ["judge={url: x}", "judge.model=m"], FromServer("x", "m")),
        ("judge: {url: x, model: m, rate: 3}", ["judge.function=e.f"], FromFunction("e.f", 1)),
        ("judge: {url: x, model: m, rate: 3}", ["judge.url=y"], FromServer("y", "m", 3.0)),
        ("judge: {url: x, model: m, rate: 3}", ["judge.budget=4"], FromServer("x", "m", 3.0, 4)),
    ],
)
def test_a_key_that_names_another_variant_replaces_the_files(
    tmp_path: Path, text: str, overrides: list[str], judge: object
) -> None:
    assert load_config(WithJudge, write(tmp_path, text), overrides).judge == judge


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("judge: {function: a, url: x}", [], r"expected exactly one of function, url, got \['function', 'url'\]"),
        ("", ["judge.function=a", "judge.url=x"], "expected exactly one of function, url"),
        ("", ["judge={function: a, url: x}"], "expected exactly one of function, url"),
        ("judge: {function: a}", ["judge.url=x"], "judge.model: is required"),
        ("judge: {function: a}", ["judge.url=x", "judge.model=m", "judge.rte=2"], "did you mean 'rate'"),
        ("judge: {function: a, rate: 2}", [], "judge.rate: unknown key"),
    ],
)
def test_two_variants_at_once_are_refused(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(WithJudge, write(tmp_path, text), overrides)


def test_the_fingerprint_depends_on_the_values_alone() -> None:
    assert fingerprint(Config()) == fingerprint(Config()) == fingerprint(to_dict(Config()))
    assert fingerprint(Config()) != fingerprint(Config(inner=Inner(lr=math.nextafter(0.1, 1))))
    assert len(fingerprint(Config())) == 64
    with pytest.raises(InputError, match=r"a\.b: expected plain data, got object"):
        fingerprint({"a": {"b": object()}})


def test_nearest_without_a_near_name_lists_what_there_is() -> None:
    assert nearest("zzz", ["alpha", "beta"]) == "there are: alpha, beta"
    assert nearest("zzz", []) == "there are none"


ALIASES = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "aliases stand for more than 100,000 values"),
        ("seed:\n" + "".join(f"  {line}\n" for line in ALIASES.splitlines()), "aliases stand for more than"),
        ("seed: &a [*a]", "contains itself"),
        ("seed: &a {b: *a}", "contains itself"),
        ("? [a, b]\n: 1", "expected a key that is a text, got a list or a mapping"),
        ("{{a: 1}: 2}", "expected a key that is a text"),
        ("seed: " + "9" * 32_000, "a number of 32,000 digits"),
        ("seed: 0x" + "f" * 32_000, "a number of 32,002 digits"),
        ("rate: " + "9" * 399, "expected a finite number"),
        ("rate: " + "9" * 32_000 + "x", "expected a number"),
        ("rate: 1e999", "expected a finite number"),
        ("rate: .nan", "expected a finite number"),
        ("seed: " + "[" * 3000, "nested more than 40 deep"),
        ("seed: " + "{a: " * 3000, "nested more than 40 deep"),
        ("".join(" " * i + "a:\n" for i in range(300)), "nested more than 40 deep"),
        ("seed: 2001-99-99", "month must be in 1..12"),
        ("seed: !!binary '=='", "expected an integer|base64"),
        ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("name: " + "a" * 300_000, "more than 262,144 characters"),
    ],
)
def test_hostile_yaml_is_refused_in_words_and_soon(tmp_path: Path, text: str, message: str) -> None:
    @dataclasses.dataclass
    class Plain:
        seed: int = 0
        rate: float = 0.0
        name: str = ""

    file = tmp_path / "config.yaml"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(InputError, match=message) as refused:
        load_config(Plain, file)
    assert len(str(refused.value)) < 700
    assert time.process_time() - began < 2
    if text.startswith(("seed: ", "rate: ")) and "\n" not in text:  # and as an override
        with pytest.raises(InputError, match=message):
            load_config(Plain, None, [text.replace(": ", "=", 1)])
