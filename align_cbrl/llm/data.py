"""Prompts from wherever they are: a function, a file, a folder, or the hub."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from align_cbrl.errors import InputError, first_line
from align_cbrl.imports import load_object
from align_cbrl.llm.completions import check_prompts

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_prompts(source: str, *, test_share: float = 0.15, seed: int = 0) -> DatasetDict:
    """Train and test prompts, with the columns that come along.

    Args:
        source: `package.module.function` or `file.py:function`, called without arguments; a file (json, jsonl, csv,
            parquet, or txt with a prompt a line); a folder written by `save_to_disk` or of data files; or a hub id.
        test_share: share of the rows set aside when the source has no "test" split.
        seed: of that split.

    Returns:
        "train" and "test", whose prompts are disjoint.

    Raises:
        InputError: nothing loads from `source`, it has no train split, or no prompt column.
    """
    path = Path(source).expanduser()
    try:
        if path.suffix in _FORMATS:
            if not path.is_file():
                raise InputError(f"data {source!r}: there is no such file")
            data = load_dataset(_FORMATS[path.suffix], data_files=str(path))
            if path.suffix == ".txt":
                data = data.rename_column("text", "prompt")
        elif path.is_dir():
            saved = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
            data = load_from_disk(str(path)) if saved else load_dataset(str(path))
        elif source.partition(":")[0].endswith(".py") or ("/" not in source and "." in source):
            data = load_object(source)()
        else:
            data = load_dataset(source)
    except InputError:
        raise
    except Exception as error:  # the loading code of `datasets`, or of the user's function, raises what it likes
        raise InputError(
            f"data {source!r}: expected package.module.function, file.py:function, a data file, a folder or a hub id; "
            f"loading it raised {type(error).__name__}: {first_line(error)}"
        ) from error
    if isinstance(data, Dataset):
        data = DatasetDict({"train": data})
    if not isinstance(data, DatasetDict) or "train" not in data:
        got = list(data) if isinstance(data, dict) else type(data).__name__
        raise InputError(f"data {source!r}: expected a Dataset, or a DatasetDict with a 'train' split, got {got}")
    check_prompts(data["train"], 2)
    if "test" not in data:
        data = _split(data["train"], test_share, seed)
    check_prompts(data["test"], 1)
    seen = {str(prompt) for prompt in data["train"]["prompt"]}
    test = data["test"].select([i for i, p in enumerate(data["test"]["prompt"]) if str(p) not in seen])
    if len(test) == 0:
        raise InputError(f"data {source!r}: every test prompt also occurs among the training prompts")
    return DatasetDict({"train": data["train"], "test": test})


def _split(data: Dataset, test_share: float, seed: int) -> DatasetDict:
    """By distinct prompt, so that one that occurs twice does not fall on both sides."""
    prompts = sorted({str(prompt) for prompt in data["prompt"]})
    if len(prompts) < 2:
        raise InputError("data: expected at least 2 distinct prompts, one to train on and one to test on")
    order = Dataset.from_dict({"prompt": prompts}).shuffle(seed=seed)["prompt"]
    held_out = set(order[: max(1, round(test_share * len(prompts)))])
    inside = [str(prompt) in held_out for prompt in data["prompt"]]
    return DatasetDict(
        {
            "train": data.select([i for i, test in enumerate(inside) if not test]),
            "test": data.select([i for i, test in enumerate(inside) if test]),
        }
    )
