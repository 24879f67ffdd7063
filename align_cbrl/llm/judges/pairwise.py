"""`PairwiseJudge`: a judge that compares two completions of the same prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.llm.judges.judge import Asked
from align_cbrl.llm.scoring import score_arguments
from align_cbrl.rollouts import Rollouts


@checked
class PairwiseJudge(Asked):
    """A judge that compares two completions of the same prompt: the `preference` of a `PreferenceLikelihood`.

    Args:
        function: called as f(prompts=..., completions_a=..., completions_b=..., **columns). For each pair it returns
            the probability in [0, 1] that a is preferred; a judge that only decides returns 0, 0.5 or 1. It is not
            called for two equal completions, whose probability is 1/2.
        both_orders: whether each pair is judged as (a, b) and as (b, a) and the two answers are averaged. This removes
            the position bias that many judges have.
        **options: those of `Judge`; a pair in one order counts as one completion.

    Example:
        >>> def longer(prompts, completions_a, completions_b):
        ...     return [float(len(a) > len(b)) for a, b in zip(completions_a, completions_b)]
        >>> judge = PairwiseJudge(longer)
        >>> steps = {"prompt": ["q", "q"], "completion": ["yes", "no"]}
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps=steps)
        >>> judge(rollouts, torch.tensor([0, 1]), torch.tensor([1, 0])).tolist(), judge.calls
        ([1.0, 0.0], 2)
    """

    unit = "comparisons"
    bounds = (0.0, 1.0)

    def __init__(self, function: Callable[..., Any], *, both_orders: bool = True, **options: Any) -> None:
        super().__init__(function, **options)
        self.both_orders = both_orders

    def __call__(self, rollouts: Rollouts, first: Tensor, second: Tensor) -> Tensor:
        """Probabilities [M] that the completion of row first[m] is preferred to that of row second[m], float64."""
        arguments = score_arguments(rollouts)
        completions = arguments.pop("completions")
        arguments.pop("completion_ids", None)
        pairs = [
            (i, j) for i, j in zip(first.tolist(), second.tolist(), strict=True) if completions[i] != completions[j]
        ]
        asked = pairs + [(j, i) for i, j in pairs] if self.both_orders else pairs
        judged: dict[tuple[int, int], float] = {}
        if asked:
            columns = {name: [values[i] for i, _ in asked] for name, values in arguments.items()}
            a, b = [completions[i] for i, _ in asked], [completions[j] for _, j in asked]
            scores = self.scores({**columns, "completions_a": a, "completions_b": b})
            judged = dict(zip(asked, scores.tolist(), strict=True))
        preferred = []
        for i, j in zip(first.tolist(), second.tolist(), strict=True):
            p = judged.get((i, j), 0.5)
            preferred.append((p + 1 - judged.get((j, i), 0.5)) / 2 if self.both_orders else p)
        return torch.tensor(preferred, dtype=torch.float64)
