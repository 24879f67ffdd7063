"""`Usage`: what a judge that is paid by the request was asked, and `Prices`, what that came to."""

from __future__ import annotations

import dataclasses

from align_cbrl.checks import NonNegative, Whole, checked

_MILLION = 1_000_000


@checked
@dataclasses.dataclass(frozen=True)
class Prices:
    """What a provider charges, in whatever currency.

    Attributes:
        prompt: for a million tokens that are sent.
        completion: for a million tokens that come back.
    """

    prompt: NonNegative
    completion: NonNegative


@checked
@dataclasses.dataclass(frozen=True)
class Usage:
    """What a judge was asked and what it reports to have spent on that; usages add up.

    Attributes:
        calls: requests that were answered: those that are paid for.
        failed: requests that were not: put off (429, 5xx), refused, timed out or cut off. Providers do not charge for
            the first two; of a request that timed out nobody but the provider knows.
        prompt_tokens: tokens sent, as the answers say.
        completion_tokens: tokens that came back, as the answers say.
        unread: answers without a score in them, which are paid for like others.
        fallbacks: completions that got the fallback score.

    Example:
        >>> total = Usage(calls=1, prompt_tokens=900, completion_tokens=100) + Usage(calls=1, failed=2)
        >>> total.calls, total.failed, total.tokens, total.cost(Prices(prompt=2.0, completion=8.0))
        (2, 2, 1000, 0.0026)
    """

    calls: Whole = 0
    failed: Whole = 0
    prompt_tokens: Whole = 0
    completion_tokens: Whole = 0
    unread: Whole = 0
    fallbacks: Whole = 0

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.prompt_tokens + self.completion_tokens

    def cost(self, prices: Prices) -> float:
        """What the tokens cost, in the currency of the prices."""
        return (self.prompt_tokens * prices.prompt + self.completion_tokens * prices.completion) / _MILLION

    def __add__(self, other: Usage) -> Usage:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Usage(*(a + b for a, b in zip(mine, theirs, strict=True)))
