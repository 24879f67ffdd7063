"""`AnswerKind`: which completions are answers of one kind."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.identity import identity_of
from align_cbrl.llm.scoring import call_patiently, score_arguments
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.objectives.observations import number_of
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts


@checked
class AnswerKind:
    """A number for the kind of answer that each completion is: equal for answers of one kind (`Distinct.kind`).

    What counts as the same is the user's: the result of a calculation, the day that a reply promises, short or long.

    Args:
        function: called as f(prompts=..., completions=..., **columns); returns one name for each completion, such as a
            text, a number, or None.
        name: of the function, for messages.

    Raises:
        InputError: another number of names than completions, or names of a type of which nothing is known.

    Example:
        >>> def length(completions):
        ...     return ["short" if len(text) < 4 else "long" for text in completions]
        >>> steps = {"prompt": ["q"] * 3, "completion": ["yes", "no", "perhaps"]}
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0, 0]), steps=steps)
        >>> kind = AnswerKind(length)
        >>> numbers = kind(None, rollouts)
        >>> bool(numbers[0] == numbers[1]), bool(numbers[0] == numbers[2])
        (True, False)
        >>> [share.evaluate(None, rollouts).value.item() for share in kind.shares(["short", "long"])]
        [0.66..., 0.33...]
    """

    def __init__(self, function: Callable[..., Sequence[Any]], name: str = "kind of answer") -> None:
        self.function = function
        self.name = name
        self._last: tuple[weakref.ref[Rollouts], list[Any]] | None = None

    @property
    def identity(self) -> str | None:
        """What the function is, by its content; None where that cannot be read."""
        return identity_of(self.function)

    def __call__(self, leader: Leader | None, rollouts: Rollouts) -> Tensor:
        """The numbers, long [B, 1]."""
        return torch.tensor([self._number(kind) for kind in self._kinds(rollouts)])[:, None]

    def shares(self, kinds: Sequence[Any]) -> list[ExpectedUtility]:
        """The shares of these kinds of answers, in their order: the utilities of `target_shares`.

        An answer of any other kind is refused when it comes, by its name.
        """
        known = {self._number(kind): kind for kind in kinds}

        def share_of(wanted: int) -> ExpectedUtility:
            def is_one(leader: Leader | None, rollouts: Rollouts) -> Tensor:
                numbers = self(leader, rollouts)
                for kind, number in zip(self._kinds(rollouts), numbers[:, 0].tolist(), strict=True):
                    if number not in known:
                        raise InputError(f"{self.name}: expected one of {list(kinds)}, got {kind!r:.60}")
                return (numbers == wanted).double()

            return ExpectedUtility(is_one)

        return [share_of(number) for number in known]

    def _number(self, kind: Any) -> int:
        return number_of(kind, f"{self.name}: expected names")

    def _kinds(self, rollouts: Rollouts) -> list[Any]:
        """The names [B]; the function is asked once, however many shares are made of what it says."""
        if self._last is None or self._last[0]() is not rollouts:
            arguments = score_arguments(rollouts)
            said = call_patiently(self.name, self.function, arguments)
            if isinstance(said, (str, bytes)) or not hasattr(said, "__len__") or len(said) != rollouts.size:
                came = f"{len(said)}" if hasattr(said, "__len__") else f"a {type(said).__name__}"
                raise InputError(f"{self.name}: expected {rollouts.size} names, one per completion, got {came}")
            self._last = (weakref.ref(rollouts), list(said))
        return self._last[1]
