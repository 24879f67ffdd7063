"""The judge and the reward terms, on texts written by hand."""

from __future__ import annotations

import pytest
from align_cbrl.recipes.worlds.docstrings import judge, rewards
from align_cbrl.recipes.worlds.docstrings.judge import COMPONENTS, docstring_judge, signature_words

PROMPT = 'def read_header(path, encoding=...):\n    """'
GOOD = "Read the header of the file at path."

TERMS = [
    rewards.length,
    rewards.brevity,
    rewards.repetition,
    rewards.final_period,
    rewards.capital_first,
    rewards.prompt_overlap,
    rewards.markup,
]


def score(text: str, prompt: str = PROMPT) -> float:
    return docstring_judge([prompt], [text])[0]


def test_weights_sum_to_one_and_components_stay_in_range():
    assert sum(weight for weight, _ in COMPONENTS) == pytest.approx(1)
    texts = [GOOD, "", ".", "x", "Returns a.\nb", "the the the the", "A" * 300, "## `x` -> **y**"]
    for text in texts:
        assert 0 <= score(text) <= 1
        for _, component in COMPONENTS:
            assert 0 <= component(PROMPT, text) <= 1


def test_a_flawless_docstring_scores_one():
    assert score(GOOD) == pytest.approx(1)
    assert score(f"  {GOOD}\n") == pytest.approx(1)


@pytest.mark.parametrize("text", ["", "   ", "...", "12 34 ->", ")(*&^%"])
def test_a_text_without_words_scores_zero(text):
    assert score(text) == 0


@pytest.mark.parametrize("text", ["foo foo foo foo foo foo", "xq zzv", "->> the the the", "):"])
def test_garbage_scores_low(text):
    assert score(text) < 0.45


@pytest.mark.parametrize(
    "worse",
    [
        "Reads the header of the file at path.",
        "The header of the file at path.",
        "read the header of the file at path.",
        "Read the header of the file at path",
        "Read the header of the file at path...",
        "Read the header\nof the file at path.",
        "Read the header header header of the path path path.",
        "Read the header of the given file that is found at the specified path on this machine.",
        "Read it.",
        "Read `header` -> [path](x): #1.",
        "Open some other thing with it.",
    ],
)
def test_every_fault_costs(worse):
    assert score(worse) < score(GOOD) - 0.02


def test_imperative_wants_the_bare_verb():
    grades = [judge.imperative("", text) for text in ("Return it.", "Returns it.", "String it.")]
    assert grades == [1.0, 0.25, 0.0]
    assert judge.imperative("", "Tries it.") == 0.25
    assert judge.imperative("", "Return.") == 1.0


def test_concise_is_flat_between_three_and_nine_words():
    counts = [0, 1, 3, 9, 10, 14, 30]
    grades = [judge.concise("", " ".join(["word"] * count)) for count in counts]
    assert grades == pytest.approx([0, 1 / 3, 1, 1, 0.8, 0, 0])


def test_final_period_is_one_period():
    grades = [judge.final_period("", text) for text in ("A b.", "A b", "A b..", "A b?")]
    assert grades == [1, 0, 0, 0]


def test_informative_counts_words_of_the_signature():
    assert signature_words("def setBgColor(new_color=...):") == ["set", "bg", "color", "new"]
    texts = ("Read the header.", "Reading something.", "Do it.")
    assert [judge.informative(PROMPT, text) for text in texts] == [1, 0.75, 0]
    assert judge.informative("def f():", "Do it.") == 1


def test_not_repetitive_falls_with_repeated_content():
    texts = ("Read file header.", "Read file file header.", "file file", "the of a")
    assert [judge.not_repetitive("", text) for text in texts] == [1, 0.5, 0, 0]


def test_judge_is_deterministic_ignores_columns_and_checks_lengths():
    first = docstring_judge([PROMPT] * 2, [GOOD, "bad"], signature=["a", "b"])
    assert first == docstring_judge([PROMPT] * 2, [GOOD, "bad"])
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        docstring_judge([PROMPT] * 2, [GOOD])


@pytest.mark.parametrize("term", TERMS)
def test_terms_return_one_finite_float_for_each_completion(term):
    texts = ["", GOOD, "x" * 500, "the the the", "`a`\n**b**"]
    values = term(prompts=[PROMPT] * len(texts), completions=texts, signature=texts)
    assert len(values) == len(texts)
    assert all(isinstance(value, float) and -2.5 <= value <= 2.5 for value in values[:2])


def test_terms_on_examples():
    assert rewards.length([""] * 3, ["", "x" * 20, "x" * 400]) == [0, 0.5, 2]
    assert rewards.brevity([""] * 2, ["a b", " ".join("abcdefghijkl")]) == [0, -1]
    assert rewards.repetition([""] * 3, ["", "a b", "a A b c d e f g"]) == [0, 0, -1]
    assert rewards.final_period([""] * 2, ["a. ", "a"]) == [1, 0]
    assert rewards.capital_first([""] * 3, ["", "A", "a"]) == [0, 1, 0]
    assert rewards.prompt_overlap([PROMPT] * 2, ["Reading headers.", "Go."]) == [1, 0]
    assert rewards.markup([""] * 3, ["", "A b.", "`````"]) == [0, 0, -2]
