"""The README.md that a saved leader carries: what it is, its weights, its budget, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """---
library_name: align-cbrl
tags:
- align-cbrl
- reward-function
- trl
---

# {kind}

{summary}

Learned and saved by align-cbrl {version}. Scores are for training: they rank completions of one prompt.

| what | value |
|---|---|
{rows}

## Use

The folder is a reward function for any trl trainer:

```python
from align_cbrl.llm import load_reward

reward = load_reward("path/to/this/folder")
```

`reward(prompts=[...], completions=[...])` returns one number a completion. From the hub, the folder is
`huggingface_hub.snapshot_download("owner/name")`. {code}
"""


def model_card(kind: str, summary: str, values: Mapping[str, Any], functions: list[str], version: str) -> str:
    """A model card in Markdown, with the header that the hub reads.

    Args:
        kind: the leader's class.
        summary: one paragraph on what it computes.
        values: what the table shows, by name.
        functions: import paths of functions that loading imports.
        version: of this library.

    Example:
        >>> card = model_card("RewardMixture", "A weighted sum.", {"weight of `short`": 0.5}, ["a.b"], "1.0")
        >>> "| weight of `short` | 0.5 |" in card, "runs the code of" in card
        (True, True)
    """
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items())
    if functions:
        code = f"Loading imports, and so runs the code of, {', '.join(f'`{_cell(f)}`' for f in functions)}."
    else:
        code = "Loading runs no code from this folder."
    return _CARD.format(kind=kind, summary=summary, version=version, rows=rows, code=code)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
