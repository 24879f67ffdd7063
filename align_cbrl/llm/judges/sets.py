"""`SetJudge`: a judge that scores k completions of one prompt together."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.llm.judges.judge import Asked
from align_cbrl.llm.scoring import score_arguments
from align_cbrl.plain import plain
from align_cbrl.rollouts import Rollouts

_SAMPLE = 4  # sets of the first call that are judged in another order, too
_ROUNDING = 1e-6  # by which verdicts on one set may differ, relative to 1 + |score|


@checked
class SetJudge(Asked):
    """A judge that scores k completions of one prompt together: the `score` of a `SetUtility`.

    A set is asked about once, whatever the order of its completions. Of the first call a few sets are judged in another
    order as well, once for each object, to see that the order does not matter.

    Args:
        function: called as f(prompts=..., completions=..., **columns), where each item of completions is the list of a
            set's completions and other items are those of its first one; it returns one number for each set.
        **options: those of `Judge`; a set counts as one completion.

    Raises:
        InputError: a score that depends on the order; a score that is no finite number, or another number of scores.

    Example:
        >>> import torch
        >>> def different(prompts, completions):
        ...     return [float(len(set(texts))) for texts in completions]
        >>> judge = SetJudge(different)
        >>> steps = {"prompt": ["q"] * 3, "completion": ["yes", "no", "yes"]}
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0, 0]), steps=steps)
        >>> judge(rollouts, torch.tensor([[0, 1], [0, 2], [1, 2]])).tolist()
        [2.0, 1.0, 2.0]
    """

    unit = "sets"

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__(function, **options)
        self._order_checked = bool(getattr(function, "sorts_completions", False))

    def __call__(self, rollouts: Rollouts, sets: Tensor) -> Tensor:
        """Scores [M] of the sets of rows, long [M, k], float64."""
        arguments = score_arguments(rollouts)
        completions = arguments.pop("completions")
        arguments.pop("completion_ids", None)
        name = [json.dumps(completion, sort_keys=True, default=plain) for completion in completions]
        # In one order, so that a set is one row of the cache; columns are the first one's in that order, too.
        rows = [sorted(row, key=lambda i: name[i]) for row in sets.tolist()]

        def judged(sets: list[list[int]]) -> Tensor:
            columns = {key: [values[row[0]] for row in sets] for key, values in arguments.items()}
            return self.scores({**columns, "completions": [[completions[i] for i in row] for row in sets]})

        said = judged(rows)
        if not self._order_checked:
            self._check_order([row for row in rows if name[row[0]] != name[row[-1]]], judged)
        return said

    def _check_order(self, rows: list[list[int]], judged: Callable[[list[list[int]]], Tensor]) -> None:
        """Judge a few sets with the first completion put last; there must be different ones in them."""
        some = rows[:_SAMPLE]
        if not some:
            return
        first, again = judged(some).tolist(), judged([[*row[1:], row[0]] for row in some]).tolist()
        for one, other in zip(first, again, strict=True):
            if abs(one - other) > _ROUNDING * (1 + abs(one)):
                raise InputError(
                    f"{self.name}: expected a score that does not depend on the order of the completions, got {one:g} "
                    f"for a set and {other:g} for the same in another order; sort them, or average over orders, inside "
                    "the function"
                )
        self._order_checked = True
