"""Cheap reward terms of the kind that practitioners add to a reward model.

Each is a trl reward function, looks at the text alone and knows nothing of the judge. Scales are
about one: over samples of the base model the standard deviation is between 0.2 and 0.5.
"""

from __future__ import annotations

import re

from align_cbrl.llm.conversations import answer_text, request_text

_WORD = re.compile(r"[A-Za-z]+")


def length(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Length in units of 40 characters, at most 2.

    Args:
        prompts: not used.
        completions: the texts to score.
        **columns: not used.

    Returns:
        One value in [0, 2] for each completion.
    """
    return [min(2.0, len(text.strip()) / 40) for text in map(answer_text, completions)]


def brevity(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Minus the words beyond eight, in units of four: a soft limit on the length.

    Args:
        prompts: not used.
        completions: the texts to score.
        **columns: not used.

    Returns:
        One value, at most 0, for each completion.
    """
    return [-max(0, len(text.split()) - 8) / 4 for text in map(answer_text, completions)]


def repetition(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Minus eight times the share of words that already occurred, at least -2.

    Args:
        prompts: not used.
        completions: the texts to score.
        **columns: not used.

    Returns:
        One value in [-2, 0] for each completion; 0 for a text without words.
    """
    values = []
    for text in map(answer_text, completions):
        words = [word.lower() for word in _WORD.findall(text)]
        share = 1.0 - len(set(words)) / len(words) if words else 0.0
        values.append(max(-2.0, -8.0 * share))
    return values


def final_period(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 where the text ends in a period, else 0.

    Args:
        prompts: not used.
        completions: the texts to score.
        **columns: not used.

    Returns:
        One value, 0 or 1, for each completion.
    """
    return [float(text.rstrip().endswith(".")) for text in map(answer_text, completions)]


def capital_first(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 where the text starts with a capital letter, else 0.

    Args:
        prompts: not used.
        completions: the texts to score.
        **columns: not used.

    Returns:
        One value, 0 or 1, for each completion.
    """
    return [float(text.lstrip()[:1].isupper()) for text in map(answer_text, completions)]


def prompt_overlap(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Share of the prompt's words of three letters or more that the text repeats, times two.

    Words count as equal where their first four letters are, so that "read" is in "reading".

    Args:
        prompts: the texts whose words count; names are split at underscores.
        completions: the texts to score.
        **columns: not used.

    Returns:
        One value in [0, 2] for each completion; 0 where the prompt has no such word.
    """
    values = []
    for prompt, text in zip(map(request_text, prompts), map(answer_text, completions), strict=True):
        wanted = {word.lower()[:4] for word in _WORD.findall(prompt) if len(word) > 2} - {"def"}
        used = {word.lower()[:4] for word in _WORD.findall(text)}
        values.append(2.0 * len(wanted & used) / len(wanted) if wanted else 0.0)
    return values


def markup(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Minus the share of characters that are neither letters nor ordinary prose, times ten.

    Args:
        prompts: not used.
        completions: the texts to score.
        **columns: not used.

    Returns:
        One value in [-2, 0] for each completion; 0 for an empty text.
    """
    values = []
    for text in map(answer_text, completions):
        odd = sum(not (char.isalpha() or char in " .,'-") for char in text)
        values.append(max(-2.0, -10.0 * odd / len(text)) if text else 0.0)
    return values
