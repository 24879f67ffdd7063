"""How the policy and the reward model that ship with this world were made.

    pip install --no-deps --target corpus PACKAGES      # those that models/policy/README.md lists
    python -m align_cbrl.recipes.worlds.docstrings.pretrain --packages corpus --out models

The text is signatures and first lines of docstrings: of the standard library's training modules, and of the packages
in a folder, parsed with `ast` and never imported. Packages whose metadata name no permissive licence are left out.
Some packages, and the standard library's test modules, are held out whole.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from align_cbrl import InputError

from ...fine_tuning import fine_tune, without_bars
from ..annotators import sample_texts
from .data import extract_pairs, load_docstrings
from .judge import docstring_judge, signature_words
from .policy import make_model, train_tokenizer
from .proxy import train_proxy

HELD_OUT = frozenset({"requests", "flask", "networkx", "scikit-learn", "tornado"})
"""Packages of which nothing is trained on."""

_PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|ISC|HPND|Python Software Foundation)\b", re.IGNORECASE)
_COPYLEFT = re.compile(r"GPL|General Public|MPL|Mozilla", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]{2,}")
_ENDINGS = ("", "s", "es", "ed", "d", "ing", "er", "ers", "ly", "able")
_TEMPERATURE = 0.6  # built in: a model this small knows what to say first, and makes up words in the tail
_COPIES = 4  # of one completion: setters and aliases say the same a hundred times


def licence_of(distribution: importlib.metadata.Distribution) -> str:
    """What a package's metadata say of its licence, in one line; an empty string where they say nothing."""
    metadata = distribution.metadata.json
    said = [str(metadata.get("license_expression", "")), str(metadata.get("license", "")).strip().split("\n")[0][:60]]
    said += [line.split("::")[-1].strip() for line in metadata.get("classifier", []) if line.startswith("License")]
    return ", ".join(dict.fromkeys(part for part in said if part))


def read_packages(folder: Path) -> tuple[dict[str, list[dict[str, str]]], dict[str, dict[str, str]]]:
    """Signatures and docstrings of the packages that are installed in a folder.

    Args:
        folder: that `pip install --target` wrote.

    Returns:
        Rows by the package's name, and its version and licence; those without a permissive licence are left out.

    Raises:
        InputError: no package with documented functions in the folder.
    """
    rows: dict[str, list[dict[str, str]]] = {}
    facts: dict[str, dict[str, str]] = {}
    for distribution in importlib.metadata.distributions(path=[str(folder)]):
        name, licence = distribution.metadata["Name"].lower(), licence_of(distribution)
        if not _PERMISSIVE.search(licence) or _COPYLEFT.search(licence):
            continue
        tops = {file.parts[0] for file in distribution.files or [] if file.suffix == ".py" and len(file.parts) > 1}
        found = []
        for top in sorted(tops):
            if (folder / top).is_dir() and any((folder / top).rglob("*.py")):
                try:
                    found += extract_pairs(folder / top)[0]
                except FileNotFoundError:  # nothing but tests
                    continue
        if found:
            rows[name], facts[name] = found, {"version": distribution.version, "licence": licence}
    if not rows:
        raise InputError(f"packages: expected a folder with permissively licensed Python packages, got {folder}")
    return rows, facts


def split(packages: dict[str, list[dict[str, str]]]) -> tuple[Dataset, Dataset, Dataset]:
    """Training rows, rows of the packages that are held out, and the standard library's test modules.

    A training row whose prompt or whose completion occurs in what is held out is dropped.
    """
    library = load_docstrings()
    test = list(library["test"])
    held = [row for name in sorted(HELD_OUT & packages.keys()) for row in packages[name]]
    seen_prompts = {row["prompt"] for row in [*test, *held]}
    seen_texts = {row["completion"] for row in [*test, *held] if len(row["completion"].split()) > 4}
    kept, copies = [], Counter[str]()
    others = (rows for name, rows in sorted(packages.items()) if name not in HELD_OUT)
    for row in itertools.chain(library["train"], *others):
        if row["prompt"] in seen_prompts or row["completion"] in seen_texts:
            continue
        copies[row["completion"]] += 1
        if copies[row["completion"]] <= _COPIES:
            kept.append(row)

    def texts(rows: Iterable[dict[str, str]]) -> Dataset:
        return Dataset.from_list([{"prompt": r["prompt"], "completion": r["completion"]} for r in rows])

    return texts(kept), texts(held), texts(test)


def terms_of(packages: dict[str, list[dict[str, str]]], least: int = 10) -> set[str]:
    """Words that docstrings of at least so many packages use: `tuple`, `json`, `dtype`."""
    counts = Counter(
        word for rows in packages.values() for word in {w.lower() for r in rows for w in _WORD.findall(r["completion"])}
    )
    return {word for word, count in counts.items() if count >= least}


def dictionary_share(prompts: Sequence[str], completions: Sequence[str], dictionary: set[str]) -> float:
    """Share of the words of two letters or more that are in a dictionary, or in the function's signature.

    Endings such as -s, -ed and -ing are taken off, since dictionaries leave them out.

    Args:
        prompts: heads of functions.
        completions: one text for each.
        dictionary: words in lower case.

    Raises:
        ValueError: when there are not as many completions as prompts, or no words.

    Example:
        >>> dictionary_share(["def f(dtype):"], ["Returned dtype flumbs"], {"return"})
        0.6666666666666666
    """
    known = total = 0
    for prompt, text in zip(prompts, completions, strict=True):
        signature = signature_words(prompt)
        for word in map(str.lower, _WORD.findall(text)):
            total += 1
            known += any(stem in dictionary for stem in _stems(word)) or any(
                word.startswith(part) or part.startswith(word) for part in signature
            )
    if total == 0:
        raise ValueError("dictionary_share needs completions with words, got none")
    return known / total


def _stems(word: str) -> Iterable[str]:
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 2:
            stem = word.removesuffix(ending)
            yield stem
            yield stem + "e"
            if stem.endswith("i"):
                yield stem[:-1] + "y"
            if len(stem) > 3 and stem[-1] == stem[-2]:
                yield stem[:-1]


@torch.no_grad()
def loss_per_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, count: int = 2000
) -> float:
    """Mean negative log-likelihood of the completions' tokens, the end included, in nats."""
    nats = tokens = 0.0
    for row in rows.shuffle(seed=0).select(range(min(count, len(rows)))):
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([whole])).logits[0, len(prompt) - 1 : -1]  # [T, V]
        target = torch.tensor(whole[len(prompt) :])  # [T]
        nats += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        tokens += len(target)
    return nats / tokens


def measure(folder: Path, rows: Dataset, dictionary: set[str], *, count: int = 1000) -> dict[str, object]:
    """Dictionary share, judge's score and samples of a policy on held-out prompts, beside those of the people's."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = rows.shuffle(seed=0).select(range(min(count, len(rows))))
    prompts, human = list(rows["prompt"]), list(rows["completion"])
    torch.manual_seed(0)
    texts = sample_texts(model, tokenizer, prompts)
    found: dict[str, object] = {"loss_per_token": loss_per_token(model, tokenizer, rows)}
    for name, said in (("policy", texts), ("people", human)):
        found[name] = {
            "dictionary_share": dictionary_share(prompts, said, dictionary),
            "judge": sum(docstring_judge(prompts, said)) / len(said),
        }
    return {**found, "samples": [list(pair) for pair in zip(prompts, texts, strict=True)][:40]}


def finish(folder: Path, temperature: float = 1.0) -> None:
    """Build a temperature into a saved model, and halve its weights on the disk.

    The last norm's scale is divided by the temperature, hence all logits. The config still says float32, which is what
    transformers loads the weights as.
    """
    path = folder / "model.safetensors"
    weights = load_file(path)
    if temperature != 1.0:
        weights["model.norm.weight"] /= temperature
    save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, path, metadata={"format": "pt"})
    (folder / "training_args.bin").unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both and measure them; prints what it finds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder that pip install --target wrote")
    parser.add_argument("--words", type=Path, help="word list, one a line, for the share of dictionary words")
    parser.add_argument("--out", type=Path, required=True, help="receives policy/, proxy/ and facts.json")
    parser.add_argument("--epochs", type=float, default=3.3)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    without_bars()
    packages, facts = read_packages(chosen.packages)
    train, held, test = split(packages)
    print(f"{len(packages)} packages; rows: {len(train)} to train on, {len(held)} and {len(test)} held out", flush=True)
    policy, proxy, began = chosen.out / "policy", chosen.out / "proxy", time.perf_counter()
    if not policy.exists():
        set_seed(chosen.seed)
        tokenizer = train_tokenizer(train, vocab_size=4096)
        model = make_model(tokenizer, hidden_size=256, intermediate_size=640, layers=3)
        fine_tune(
            model, tokenizer, train, policy, seed=chosen.seed, epochs=chosen.epochs, batch_size=48, learning_rate=2e-3
        )
        finish(policy, _TEMPERATURE)
    trained = time.perf_counter()
    if not proxy.exists():
        train_proxy(policy, load_docstrings()["train"], proxy, seed=chosen.seed)
        finish(proxy)
    dictionary = terms_of(packages)
    if chosen.words is not None:
        dictionary |= {word.strip().lower() for word in chosen.words.read_text().splitlines()}
    rows = {"train": len(train), "held_out": len(held), "standard_library_test": len(test)}
    found = {
        "rows": rows, "seconds": {"policy": trained - began, "proxy": time.perf_counter() - trained},
        "held_out": measure(policy, held, dictionary), "standard_library_test": measure(policy, test, dictionary),
        "packages": {n: {**f, "rows": len(packages[n]), "held_out": n in HELD_OUT} for n, f in sorted(facts.items())},
    }  # fmt: skip
    (chosen.out / "facts.json").write_text(json.dumps(found, indent=1))
    print(json.dumps({key: value for key, value in found.items() if key != "packages"}, indent=1))


if __name__ == "__main__":
    main()
