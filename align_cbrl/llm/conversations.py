"""Texts and conversations: one answer to what was said, wherever words are counted, shown or scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages with a role, to go through a chat template, rather than a text.

    Example:
        >>> is_conversation([{"role": "user", "content": "Hello"}]), is_conversation("Hello")
        (True, False)
    """
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping) and "role" in prompt[0]


def answer_text(completion: Any) -> str:
    """What the assistant says in a completion: a text as it is; of a list of messages, the assistant's contents.

    Args:
        completion: a text, or a list of messages, as trl hands either to reward functions. Messages of others, such as
            a tool's results, are left out, and parts of a content that are no text.

    Example:
        >>> answer_text("Good day"), answer_text([{"role": "assistant", "content": "Good day"}])
        ('Good day', 'Good day')
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(content_text(turn["content"]) for turn in completion if turn["role"] == "assistant")


def request_text(prompt: Any) -> str:
    """What a policy is asked: a text as it is; of a conversation, its last turn.

    Example:
        >>> request_text([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}])
        'Hello'
    """
    return prompt if isinstance(prompt, str) else content_text(prompt[-1]["content"])


def shown_text(prompt: Any) -> str:
    r"""A prompt as a reader sees it: a text as it is, a conversation turn by turn.

    Example:
        >>> shown_text([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}])
        'system: Be kind.\nuser: Hello'
    """
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {content_text(turn['content'])}" for turn in prompt)


def content_text(content: Any) -> str:
    """The text of a message's content: a text, a list of parts of which some are text, or None."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
