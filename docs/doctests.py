"""Shows the doctests of the docstrings as code: griffe knows them under the heading "Examples:" only."""

from typing import Any

from griffe import Extension, Object


class Doctests(Extension):
    """Renames the section "Example:" of every docstring."""

    def on_object(self, *, obj: Object, **rest: Any) -> None:
        """Change one object's docstring, before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
