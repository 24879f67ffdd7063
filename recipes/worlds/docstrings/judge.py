"""The judge: a program that scores the first line of a docstring by PEP 257 and plain sense.

It stands for the people whom the language model is meant to please. It looks only at the text, is
deterministic and needs no model. Its score is a weighted mean of the graded components below.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from align_cbrl.llm.conversations import answer_text, request_text

# Verbs that start a good summary line. A list, because the mood of an English word cannot be
# read off its ending ("process" is imperative, "returns" is not, "string" is no verb at all).
IMPERATIVES = frozenset(
    """
    abort accept access acquire activate add adjust advance allocate allow analyze append apply
    apportion arrange ask assemble assert assign associate attach attempt await backup bind
    block break bring browse build bump cache calculate call cancel capture cast change check
    choose clean cleanup clear clip clone close collapse collect combine comment commit compare
    compile complete compose compress compute concatenate configure confirm connect consider
    construct consume continue convert copy count cover create customize cut deactivate debug
    decide declare decode decompress decorate decrease decrement define delay delegate delete
    delimit deliver describe deselect destroy detach detect determine dictate disable
    disassemble discard disconnect dismiss dispatch display divide do download draw drop dump
    duplicate edit emit empty emulate enable encode encrypt end enforce enqueue ensure enter
    enumerate erase escape establish evaluate examine exchange exclude execute exit expand
    expect export express extend extract fail feed fetch figure fill filter finalize find finish
    fire fix flag flatten flip flush focus fold follow force forget fork format forward free
    freeze gather generate get give go grab grant grow guarantee guess handle hash hide
    highlight hold identify ignore implement import include increase increment indent index
    indicate infer inform init initialise initialize initiate insert inspect install instantiate
    instruct interpret interrupt introduce invalidate invert invoke issue iterate join keep kill
    launch leave let limit link list listen load locate lock log look lookup lower make manage
    map mark match measure merge mimic minimize modify monitor mount move multiply negate
    normalize notify obtain omit open optimize order override pack pad parse pass paste patch
    pause peek perform permit pick pickle ping place play plot pop populate position post
    prepare prepend present preserve press prevent print probe process produce prompt propagate
    protect provide prune pull purge push put query queue quit quote raise randomize read
    rebuild receive recognize recompute reconstruct record recover redirect redo reduce refactor
    refresh refuse regenerate register reinitialize reject release reload remember remove rename
    render repeat replace reply report represent request require reserve reset resize resolve
    respond restart restore restrict retrieve return reuse reverse revert rewind rewrite rotate
    round route run sanitize save scale scan schedule scroll search see seek select send
    separate serialize serve set setup shift show shrink shuffle shut shutdown sign signal
    simplify simulate skip sleep slice sort spawn specify split start stop store stringify strip
    submit substitute subtract sum supply support suppress suspend swap switch synchronize take
    talk tell terminate test time toggle tokenize trace track transfer transform translate
    traverse trigger trim truncate try turn tweak unbind uncompress undo unlink unload unlock
    unpack unpickle unquote unregister unset unwrap update upgrade upload use validate verify
    visit wait wake walk warn watch withdraw work wrap write yield zip
    """.split()
)

# Words that carry no information about the function.
_STOP_WORDS = frozenset(
    "a an and are args as at be by for from if in init is it kw kwargs kwds of on or self that the "
    "this to with cls def none true false".split()
)

_WORD = re.compile(r"[A-Za-z]+")
_CAMEL = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def _words(text: str) -> list[str]:
    """Return the lower-case words of a prose text."""
    return [word.lower() for word in _WORD.findall(text)]


def _stem(word: str) -> str:
    """Return a crude stem, so that "handles", "handled" and "handle" agree."""
    for ending in ("ing", "es", "ed", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def signature_words(prompt: str) -> list[str]:
    """Return the distinct informative words of a prompt's signature, in order, lower case.

    `def setBgColor(new_color=...):` gives `set`, `bg`, `color`, `new`. Single letters and stop
    words are left out.
    """
    found = [word.lower() for word in _CAMEL.findall(prompt.removeprefix("def "))]
    kept = (word for word in found if len(word) > 1 and word not in _STOP_WORDS)
    return list(dict.fromkeys(kept))


def imperative(prompt: str, completion: str) -> float:
    """1 for an imperative first word, 0.25 for its third person ("Returns"), else 0."""
    word = next(iter(completion.split()), "").rstrip(".,:;").lower()
    if word in IMPERATIVES:
        return 1.0
    singular = {word.removesuffix("s"), word.removesuffix("es")}
    if word.endswith("ies"):
        singular.add(word.removesuffix("ies") + "y")
    return 0.0 if singular.isdisjoint(IMPERATIVES) else 0.25


def concise(prompt: str, completion: str) -> float:
    """1 for 3 to 9 words; a fifth less for every word above, a third less for each below 3."""
    count = len(completion.split())
    if count < 3:
        return count / 3
    return max(0.0, 1.0 - max(0, count - 9) / 5)


def final_period(prompt: str, completion: str) -> float:
    """1 for a sentence that ends in one period, else 0 ("..." is no end)."""
    return float(completion.endswith(".") and not completion.endswith(".."))


def informative(prompt: str, completion: str) -> float:
    """1 where the text uses two words of the signature, 0.75 for one word, 0 for none.

    A word is used where one of the two begins with the other: "attr" in "attribute". A signature
    with a single informative word asks for that one; a signature with none asks for nothing.
    """
    wanted = {_stem(word) for word in signature_words(prompt)}
    used = {_stem(word) for word in _words(completion)}
    hits = sum(any(_related(want, word) for word in used) for want in wanted)
    if hits >= min(2, len(wanted)):
        return 1.0
    return 0.75 * hits


def _related(first: str, second: str) -> bool:
    short, long = sorted((first, second), key=len)
    return first == second or (len(short) >= 3 and long.startswith(short))


def plain(prompt: str, completion: str) -> float:
    """1 for a single line with a capital in front; halved for either fault and for odd symbols."""
    score = 1.0
    if "\n" in completion or '"""' in completion:
        score /= 2
    if not completion[:1].isupper():
        score /= 2
    letters = sum(char.isalpha() or char in " .,'-" for char in completion)
    if letters < 0.9 * len(completion):
        score /= 2
    return score


def not_repetitive(prompt: str, completion: str) -> float:
    """1 where all content words differ; falls to 0 where half of them are repeats."""
    words = [_stem(word) for word in _words(completion) if word not in _STOP_WORDS]
    if not words:
        return 0.0
    return max(0.0, 1.0 - 2.0 * (1.0 - len(set(words)) / len(words)))


# (weight, component); the weights sum to one. Mood and form are what PEP 257 asks for explicitly,
# hence half of the mass; brevity and the words of the signature stand for usefulness.
COMPONENTS: tuple[tuple[float, Callable[[str, str], float]], ...] = (
    (0.25, imperative),
    (0.20, concise),
    (0.20, final_period),
    (0.15, informative),
    (0.10, plain),
    (0.10, not_repetitive),
)


def docstring_judge(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Score completions as the first line of the docstring of the prompted function.

    Args:
        prompts: heads of functions, `def name(args):` and the opening quotes.
        completions: one text for each prompt; surrounding white space is ignored.
        **columns: further columns of the dataset; ignored (trl passes them all).

    Returns:
        One score in [0, 1] for each completion, the `COMPONENTS` mean; 0 for a text without
        words.

    Raises:
        ValueError: when there are not as many completions as prompts.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
    return [
        _score(request_text(prompt), answer_text(completion).strip())
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _score(prompt: str, completion: str) -> float:
    if _WORD.search(completion) is None:
        return 0.0
    return sum(weight * part(prompt, completion) for weight, part in COMPONENTS)
