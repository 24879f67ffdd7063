"""Reward terms of the kind that practitioners add to a reward model: trl reward functions that look at the text."""

from __future__ import annotations

from collections.abc import Callable

from align_cbrl.llm.conversations import answer_text, request_text

from .data import ACTIONS, PROMISES, TIMES


def _counting(words: set[str]) -> Callable[[list[str]], float]:
    return lambda reply: float(sum(word in words for word in reply))


def length(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Words in tens, at most 2."""
    return [min(2.0, len(text.split()) / 10) for text in map(answer_text, completions)]


def brevity(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Minus the words beyond ten, in fives: a soft limit on the length."""
    return [-max(0, len(text.split()) - 10) / 5 for text in map(answer_text, completions)]


def apology(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 where the reply apologises."""
    return [float("sorry" in text.split()) for text in map(answer_text, completions)]


def thanks(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 where the reply thanks."""
    return [float(bool({"thank", "thanks"} & set(text.split()))) for text in map(answer_text, completions)]


def promises(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """How many big words: guarantee, always, best, amazing, free."""
    return [_counting(set(PROMISES))(text.split()) for text in map(answer_text, completions)]


def times(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """How many definite days."""
    return [_counting(set(TIMES))(text.split()) for text in map(answer_text, completions)]


def today(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 where the reply says today."""
    return [float("today" in text.split()) for text in map(answer_text, completions)]


def tomorrow(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 where the reply says tomorrow."""
    return [float("tomorrow" in text.split()) for text in map(answer_text, completions)]


def monday(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 where the reply says monday."""
    return [float("monday" in text.split()) for text in map(answer_text, completions)]


def friday(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 where the reply says friday."""
    return [float("friday" in text.split()) for text in map(answer_text, completions)]


def short(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 for at most eight words, marks included."""
    return [float(len(text.split()) <= 8) for text in map(answer_text, completions)]


def big_word(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 where the reply has a big word: guarantee, always, best, amazing, free."""
    return [float(count > 0) for count in promises(prompts, completions)]


def manner(prompts: list[str], completions: list[str], **columns: object) -> list[str]:
    """The kind of each reply: "promise" with a big word, else "short" for at most eight words, else "full".

    Example:
        >>> manner([""] * 3, ["it is free .", "please wait .", "we will refund the laptop today . thanks ."])
        ['promise', 'short', 'full']
    """
    kinds = zip(big_word(prompts, completions), short(prompts, completions), strict=True)
    return ["promise" if big else "short" if few else "full" for big, few in kinds]


def actions(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """How many things the reply says will be done."""
    return [_counting(set(ACTIONS.values()))(text.split()) for text in map(answer_text, completions)]


def overlap(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Distinct words of four letters or more that reply and request share."""
    return [
        float(len({word for word in prompt.split() if len(word) > 3} & set(text.split())))
        for prompt, text in zip(map(request_text, prompts), map(answer_text, completions), strict=True)
    ]


def final_period(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 where the reply ends in a full stop."""
    return [float(text.split()[-1:] == ["."]) for text in map(answer_text, completions)]


def angry_help(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """What `overlap` and `times` count, where the customer is angry; 0 elsewhere."""
    return _help("angry", prompts, completions)


def neutral_help(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """The same where the customer is neutral."""
    return _help("neutral", prompts, completions)


def happy_help(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """The same where the customer is happy."""
    return _help("happy", prompts, completions)


def _help(mood: str, prompts: list[str], completions: list[str]) -> list[float]:
    scores = zip(map(request_text, prompts), overlap(prompts, completions), times(prompts, completions), strict=True)
    return [(shared + days) * (prompt.split()[:1] == [mood]) for prompt, shared, days in scores]
