"""The model card that a saved leader carries: what it is, its weights, its budget, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_BODY = """
# {kind}

{summary}

Learned and saved by align-cbrl {version}. The scores are meant for training: they rank completions of the same prompt.

| what | value |
|---|---|
{rows}

## Use

The folder is a reward function for any trl trainer:

```python
from align_cbrl.llm import load_reward

reward = load_reward("path/to/this/folder"{trust})
```

`reward(prompts=[...], completions=[...])` returns one score per completion. To load it from the hub, download the
folder first: `huggingface_hub.snapshot_download("owner/name")`. {code}
"""


def model_card(kind: str, summary: str, values: Mapping[str, Any], imports: Sequence[str], version: str) -> ModelCard:
    """The model card of a saved leader, with the metadata that the hub reads.

    Args:
        kind: the name of the leader's class.
        summary: one paragraph on what it computes.
        values: what the table shows, by name.
        imports: import paths of the functions and classes whose code loading runs.
        version: of this library.

    Example:
        >>> card = model_card("RewardMixture", "A weighted sum.", {"weight of `short`": 0.5}, ["a.b"], "1.0")
        >>> "| weight of `short` | 0.5 |" in card.text, "runs the code of" in card.text
        (True, True)
        >>> card.data.tags
        ['align-cbrl', 'reward-function', 'trl']
    """
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items())
    if imports:
        names = ", ".join(f"`{_cell(name)}`" for name in imports)
        code = (
            f"Loading imports, and so runs the code of, {names}: read it first, or pass functions of yours as `terms`."
        )
    else:
        code = "Loading runs no code from this folder."
    data = ModelCardData(library_name="align-cbrl", tags=["align-cbrl", "reward-function", "trl"])
    trust = ", trust_code=True" if imports else ""
    body = _BODY.format(kind=kind, summary=summary, version=version, rows=rows, code=code, trust=trust)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}", ignore_metadata_errors=False)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
