"""The docstring data: what is extracted, and that the test split is unseen."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("datasets")

from align_cbrl.recipes.worlds.docstrings.data import (
    MAX_COMPLETION_CHARS,
    MAX_PROMPT_CHARS,
    extract_pairs,
    load_docstrings,
    standard_library_files,
)


@pytest.fixture(scope="module")
def splits():
    return load_docstrings()


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_standard_library_gives_thousands_of_pairs(splits):
    assert 5000 <= len(splits["train"]) + len(splits["test"]) <= 9000
    assert len(splits["test"]) >= 300


def test_no_prompt_is_in_both_splits(splits):
    assert not set(splits["train"]["prompt"]) & set(splits["test"]["prompt"])


def test_pairs_are_short_unique_and_well_formed(splits):
    for split in splits.values():
        prompts, completions = list(split["prompt"]), list(split["completion"])
        assert len(set(zip(prompts, completions, strict=True))) == len(prompts)
        for row in zip(prompts, completions, split["signature"], strict=True):
            prompt, completion, signature = row
            assert prompt == f'def {signature}:\n    """'
            assert len(prompt) <= MAX_PROMPT_CHARS
            assert 0 < len(completion) <= MAX_COMPLETION_CHARS
            assert completion == completion.strip() and "\n" not in completion


def test_signatures_lose_receiver_annotations_and_values(tmp_path):
    write(
        tmp_path,
        "a.py",
        "class C:\n"
        "    def go(self, x: int, /, y=3, *, z, w=None, **more):\n"
        '        """Go to the place.\n\n        Slowly.\n        """\n'
        'async def wait(*args):\n    """Wait for all of them."""\n',
    )
    rows, unparsable = extract_pairs(tmp_path)
    assert unparsable == 0
    assert {row["signature"]: row["completion"] for row in rows} == {
        "go(x, y=..., *, z, w=..., **more)": "Go to the place.",
        "wait(*args)": "Wait for all of them.",
    }


def test_files_are_not_imported_and_broken_ones_are_counted(tmp_path):
    write(tmp_path, "broken.py", "def f(:\n")
    write(tmp_path, "binary.py", "\0")
    write(tmp_path, "raises.py", 'raise SystemExit\ndef f():\n    """Do the work."""\n')
    rows, unparsable = extract_pairs(tmp_path)
    assert [row["completion"] for row in rows] == ["Do the work."]
    assert unparsable == 2


def test_third_party_packages_and_test_suites_are_skipped(tmp_path):
    text = 'def f():\n    """Do the work."""\n'
    for name in ("b.py", "a/c.py", "site-packages/x.py", "test/y.py", "a/tests/z.py"):
        write(tmp_path, name, text)
    assert [path.as_posix() for path in standard_library_files(tmp_path)] == ["a/c.py", "b.py"]
    # The same pair twice is one row.
    assert len(extract_pairs(tmp_path)[0]) == 1


def test_split_is_by_module_and_deterministic(tmp_path):
    for i in range(40):
        body = "".join(f'def f{i}_{j}():\n    """Do the work {i}."""\n' for j in range(3))
        write(tmp_path, f"m{i}.py", body)
    first = load_docstrings(root=tmp_path, test_percent=30)
    second = load_docstrings(root=tmp_path, test_percent=30)
    assert first["train"].to_list() == second["train"].to_list()
    modules = [{text.split()[-1] for text in split["completion"]} for split in first.values()]
    assert modules[0].isdisjoint(modules[1])


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="test_percent"):
        load_docstrings(test_percent=0)
    with pytest.raises(FileNotFoundError, match="no Python source"):
        load_docstrings(root=tmp_path)
