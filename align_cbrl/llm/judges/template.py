"""`Template`: a question to a language model, with places for the prompt and for what is judged."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from pathlib import Path

from align_cbrl.errors import InputError

# {{name}} stands for the characters {name}. Other braces, such as those of JSON, are ordinary characters.
_PLACE = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")

_ARGUMENTS = ("prompts", "completions_a", "completions_b")  # of scoring functions, which are no columns

SINGLE, PAIR, SET = ("completion",), ("completion_a", "completion_b"), ("completions",)
"""The places of what is judged: one completion, a pair, or several together."""


class Template:
    """A question with places, which are filled once: what stands in a prompt or completion is never taken for a place.

    Args:
        template: a text, or the path of a file with one. Its places are `{prompt}`, those of `SINGLE`, `PAIR` or `SET`,
            and columns of the data by name.

    Attributes:
        name: for messages: the file, or "the template".
        text: of the template.
        judged: which of `SINGLE`, `PAIR` and `SET` it asks about.
        columns: of the data, that it shows.

    Raises:
        InputError: a file that cannot be read, no place for the prompt, or none or several kinds of places for what is
            judged.

    Example:
        >>> template = Template('To {prompt} somebody said {completion}. Answer {"score": 0} to {{name}}.')
        >>> template.fill({"prompt": "Hi", "completion": "{prompt}!"})
        'To Hi somebody said {prompt}!. Answer {"score": 0} to {name}.'
    """

    def __init__(self, template: str | Path) -> None:
        self.name = f"template {template}" if isinstance(template, Path) else "template"
        self.text = _read(template) if isinstance(template, Path) else template
        places = {found[2] for found in _PLACE.finditer(self.text) if found[2]}
        fitting = [judged for judged in (SINGLE, PAIR, SET) if set(judged) <= places]
        some = [judged for judged in (SINGLE, PAIR, SET) if set(judged) & places]
        if "prompt" not in places or len(fitting) != 1 or some != fitting:
            raise InputError(
                f"{self.name}: expected the places {{prompt}} and {{completion}}; to compare pairs {{prompt}}, "
                "{completion_a} and {completion_b}; to score several together {prompt} and {completions}; got "
                f"{', '.join(f'{{{name}}}' for name in sorted(places)) or 'none'}"
            )
        self.judged = fitting[0]
        self.columns = tuple(sorted(places - {"prompt", *self.judged}))
        if wrong := [name for name in self.columns if name in _ARGUMENTS or keyword.iskeyword(name)]:
            raise InputError(
                f"{self.name}: {{{wrong[0]}}} is no column of the data; did you mean {{prompt}}, or {{{{{wrong[0]}}}}} "
                "for the word in braces?"
            )

    def fill(self, values: Mapping[str, str]) -> str:
        """The question, with a value in every place."""
        return _PLACE.sub(lambda found: values[found[2]] if found[2] else f"{{{found[1]}}}", self.text)


def _read(file: Path) -> str:
    try:
        return file.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        why = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(
            f"template {file}: cannot be read ({why}); name a file with the question to the judge"
        ) from error
