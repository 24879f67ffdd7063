"""Customers' requests and what a desk of mixed quality used to reply: prompts, completions, topics.

The desk is a grammar, drawn from at random, so that a policy trained on it writes good and bad replies alike, and
that a follower has something to choose from. Every word and every mark is a token.
"""

from __future__ import annotations

import itertools
import random

from datasets import Dataset, DatasetDict

MOODS = ("angry", "neutral", "happy")
PRODUCTS = tuple(
    """laptop phone camera printer headset tablet monitor keyboard watch router speaker charger scanner
    projector console drone microphone mouse display cable""".split()
)
ACTIONS = {
    "refund": "refund",
    "repair": "repair",
    "delivery": "deliver",
    "exchange": "replace",
    "upgrade": "upgrade",
}
"""By topic, the verb of what has to be done about it."""

PROMISES = ("guarantee", "always", "best", "amazing", "free")
TIMES = ("today", "tomorrow", "monday", "friday")
_OPENERS = ("customer", "client", "buyer")


def prompt(mood: str, opener: str, topic: str, product: str) -> str:
    """A request; the space at the end keeps the reply's first word a word of its own.

    Example:
        >>> prompt("angry", "buyer", "refund", "laptop")
        'angry buyer : refund for the laptop . reply : '
    """
    return f"{mood} {opener} : {topic} for the {product} . reply : "


def load_requests() -> DatasetDict:
    """Requests with the columns `prompt`, `completion` (what the desk replied), `topic`, `mood` and `product`.

    Requests about a sixth of the products are set aside as the test split, so that no test prompt was trained on.
    """
    rng = random.Random(0)
    held_out = set(PRODUCTS[::6])
    rows: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    for mood, opener, topic, product in itertools.product(MOODS, _OPENERS, ACTIONS, PRODUCTS):
        rows[product in held_out].append(
            {
                "prompt": prompt(mood, opener, topic, product),
                "completion": _reply(rng, mood, topic, product),
                "topic": topic,
                "mood": mood,
                "product": product,
            }
        )
    splits = {}
    for name, test in (("train", False), ("test", True)):
        rng.shuffle(rows[test])
        splits[name] = Dataset.from_list(rows[test])
    return DatasetDict(splits)


def desk_log(rows: int, seed: int) -> Dataset:
    """What the desk used to reply, for a policy to learn: `prompt` and `completion`, products of both splits."""
    rng = random.Random(seed)
    log = []
    for _ in range(rows):
        mood, opener, product = rng.choice(MOODS), rng.choice(_OPENERS), rng.choice(PRODUCTS)
        topic = rng.choice(list(ACTIONS))
        log.append({"prompt": prompt(mood, opener, topic, product), "completion": _reply(rng, mood, topic, product)})
    return Dataset.from_list(log)


def vocabulary() -> list[str]:
    """Every word that a request or a reply may hold, sorted."""
    words = {word for row in desk_log(4000, seed=0) for text in row.values() for word in text.split()}
    return sorted(words)


def _reply(rng: random.Random, mood: str, topic: str, product: str) -> str:
    parts = []
    apologises = rng.random() < {"angry": 0.5, "neutral": 0.3, "happy": 0.25}[mood]
    thanks = rng.random() < {"angry": 0.25, "neutral": 0.3, "happy": 0.45}[mood]
    if rng.random() < 0.15:
        parts.append(rng.choice(("dear valued customer .", "hello .")))
    if apologises:
        parts.append(rng.choice(("sorry for the trouble .", "we are sorry .", "sorry .")))
    if thanks:
        parts.append(rng.choice(("thank you for writing .", "thanks .", "thank you .")))
    if rng.random() < 0.85:
        verb = ACTIONS[topic] if rng.random() < 0.65 else rng.choice(list(ACTIONS.values()))
        thing = product if rng.random() < 0.65 else rng.choice((rng.choice(PRODUCTS), "item"))
        when = rng.choice((*TIMES, "soon", "", "")) if rng.random() < 0.75 else ""
        who = rng.choice(("we will", "we can", "our team will"))
        parts.append(" ".join(f"{who} {verb} the {thing} {when} .".split()))
    for _ in range(2):
        if rng.random() < 0.3:
            parts.append(
                rng.choice(
                    (
                        "we guarantee it .",
                        "we always offer the best service .",
                        "it is amazing .",
                        "it is free .",
                        "please wait .",
                        "our team is here to help .",
                        "calm down .",
                    )
                )
            )
    if not parts or rng.random() < 0.1:
        parts.append(rng.choice(("please wait .", "we will see .", "our team will call you soon .")))
    text = " ".join(parts)
    return text.removesuffix(" .") if rng.random() < 0.15 else text
