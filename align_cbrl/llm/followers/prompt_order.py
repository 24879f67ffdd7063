"""Which prompts an optimizer step trains on: a function of the seed and the step alone."""

from __future__ import annotations

import torch

from align_cbrl.problem import step_seed

_EPOCHS = 1 << 62  # set apart from the seeds of steps, which draw the completions


class PromptOrder:
    """Epochs of freshly shuffled prompts, cut into batches; a last batch that is not full is left out.

    Nothing is remembered between steps, so that a run continued at any step sees the prompts of one that never stopped.

    Args:
        count: prompts to choose from, at least `per_step`.
        per_step: distinct prompts in a batch.
        seed: of the shuffles.

    Example:
        >>> order = PromptOrder(count=5, per_step=2, seed=0)
        >>> [len(set(order(step))) for step in range(3)]
        [2, 2, 2]
        >>> order(7) == PromptOrder(count=5, per_step=2, seed=0)(7)
        True
        >>> len(set(order(6) + order(7)))  # steps 6 and 7 are one epoch
        4
    """

    def __init__(self, count: int, per_step: int, seed: int) -> None:
        self.count, self.per_step, self.seed = count, per_step, seed
        self._epoch, self._rows = -1, list[int]()

    def __call__(self, step: int) -> list[int]:
        """The rows of the prompts of optimizer step `step`, counted from 0."""
        epoch, place = divmod(step, self.count // self.per_step)
        if epoch != self._epoch:  # kept only to save the shuffling
            generator = torch.Generator().manual_seed(step_seed(self.seed, _EPOCHS + epoch))
            self._epoch, self._rows = epoch, torch.randperm(self.count, generator=generator).tolist()
        return self._rows[place * self.per_step : (place + 1) * self.per_step]
