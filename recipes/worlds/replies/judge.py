"""The judge of replies: a program that stands for the people whom the desk is meant to please.

It reads mood, topic and product in the request. Its score is not linear in anything that a reward term measures:
promises and a missing end scale the whole down, courtesy counts where the mood asks for it, and a good length is an
interval.
"""

from __future__ import annotations

import re

from align_cbrl.llm.conversations import answer_text, request_text

from .data import ACTIONS, PROMISES, TIMES

_REQUEST = re.compile(r"(\w+) \w+ : (\w+) for the (\w+)")


def reply_judge(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Scores in [0, 1]: the right thing, for the right product, in the right tone, at a definite time, and no more.

    Args:
        prompts: requests as `data.prompt` writes them; of any other text, nothing is expected.
        completions: one reply for each.
        **columns: further columns of the data; not used.

    Returns:
        One score for each completion; 0 for an empty one.

    Raises:
        ValueError: when there are not as many completions as prompts.

    Example:
        >>> request = "angry buyer : refund for the laptop . reply : "
        >>> reply_judge([request], ["sorry . we will refund the laptop today ."])
        [1.0]
    """
    return [
        _score(request_text(prompt), answer_text(reply).split())
        for prompt, reply in zip(prompts, completions, strict=True)
    ]


def sooner_judge(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """`reply_judge` of a customer who likes early days: today 1, then .95, .9 and .85 of it, and .6 without a day.

    Example:
        >>> request = "angry buyer : refund for the laptop . reply : "
        >>> sooner_judge([request] * 2, [f"sorry . we will refund the laptop {day} ." for day in ("today", "friday")])
        [1.0, 0.85]
    """
    return _liking({"today": 1.0, "tomorrow": 0.95, "monday": 0.9, "friday": 0.85, "none": 0.6}, prompts, completions)


def today_judge(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """`reply_judge` of a customer who likes today best: any other day counts for .7 of it, and no day for .4.

    Example:
        >>> request = "angry buyer : refund for the laptop . reply : "
        >>> today_judge([request] * 2, [f"sorry . we will refund the laptop {day} ." for day in ("today", "friday")])
        [1.0, 0.7]
    """
    return _liking({"today": 1.0, "none": 0.4}, prompts, completions, other=0.7)


def divided_judge(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """`reply_judge` of customers who disagree: angry ones want it today or tomorrow, the others on monday or friday.

    A reply that names none of the days that its customer wants is worth a quarter.

    Example:
        >>> prompts = [f"{mood} buyer : refund for the laptop . reply : " for mood in ("angry", "neutral")]
        >>> replies = ["sorry . we will refund the laptop today .", "we will refund the laptop today ."]
        >>> divided_judge(prompts, replies)
        [1.0, 0.25]
    """
    scores, days = reply_judge(prompts, completions), day(prompts, completions)
    wanted = [TIMES[:2] if request_text(prompt).startswith("angry") else TIMES[2:] for prompt in prompts]
    return [
        score * (1.0 if named in days_wanted else 0.25)
        for score, named, days_wanted in zip(scores, days, wanted, strict=True)
    ]


def _liking(liked: dict[str, float], prompts: list[str], completions: list[str], other: float = 0.0) -> list[float]:
    scores, days = reply_judge(prompts, completions), day(prompts, completions)
    return [score * liked.get(named, other) for score, named in zip(scores, days, strict=True)]


def day(prompts: list[str], completions: list[str], **columns: object) -> list[str]:
    """The first definite day that each reply names, or "none".

    Example:
        >>> day(["", ""], ["we will call you monday .", "we will call you soon ."])
        ['monday', 'none']
    """
    texts = (answer_text(reply).split() for reply in completions)
    return [next((word for word in text if word in TIMES), "none") for text in texts]


def words(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Words of each reply, marks included: the cost of the constrained objective."""
    return [float(len(answer_text(reply).split())) for reply in completions]


def _score(request: str, reply: list[str]) -> float:
    if not reply:
        return 0.0
    found = _REQUEST.search(request)
    mood, topic, product = found.groups() if found else ("neutral", "", "")
    verbs = set(ACTIONS.values()) & set(reply)
    right = 0.5 * (product in reply) + 0.5 * (verbs == {ACTIONS.get(topic)})
    apologises, thanks = "sorry" in reply, bool({"thank", "thanks"} & set(reply))
    tone = {
        "angry": 1.0 if apologises and not thanks else 0.4 * apologises,
        "happy": 1.0 if thanks and not apologises else 0.4 * thanks,
    }.get(mood, 1.0 if not (apologises or thanks) else 0.4)
    definite = sum(word in TIMES for word in reply)
    committed = 1.0 if definite == 1 else 0.3 * (definite > 1 or "soon" in reply)
    length = min(1.0, len(reply) / 6) * max(0.0, 1.0 - 0.12 * max(0, len(reply) - 12))
    honest = 1.0 - 0.4 * min(2, sum(word in PROMISES for word in reply))
    polite = 0.5 if "calm" in reply else 1.0
    ended = 1.0 if reply[-1] == "." else 0.6
    return honest * polite * ended * (0.35 * right + 0.25 * tone + 0.2 * committed + 0.2 * length)
