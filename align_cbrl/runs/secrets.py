"""Keys and passwords are kept out of what a run writes: messages, snapshots, logs, caches and trackers.

They belong into environment variables. Where one stands in a URL or in a configuration all the same, `redact` and
`redacted` put `***` in its place, at every point where the library writes something down.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_NAMES = frozenset(
    "key apikey token secret password passwd pwd passphrase authorization auth bearer credential credentials signature "
    "sig".split()
)
_NO_SECRETS = frozenset("pad eos bos unk sep cls mask stop max new min end start num".split())  # as in pad_token
_SHORTEST = 8  # characters of a secret in the environment: shorter ones are also ordinary words
_URL = re.compile(r"\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>|]+")
_SCHEME = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{3,}")
_PAIR = re.compile(r"(?i)(?<![A-Za-z0-9])([A-Za-z0-9_.-]+)(['\"]?\s*[=:]\s*['\"]?)([^\s&'\",;)}\]]+)")
_KNOWN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,})")


def is_secret_name(name: str) -> bool:
    """Whether what stands under this name is to be kept out of sight: `api_key`, `HF_TOKEN`, but not `pad_token`.

    Example:
        >>> [is_secret_name(name) for name in ("api_key", "X-Api-Key", "hfToken", "pad_token", "token_variable")]
        [True, True, True, False, False]
    """
    words = re.findall(r"[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]+", name)
    lowered = [word.lower() for word in words]
    return bool(lowered) and lowered[-1] in _NAMES and not (lowered[-1] == "token" and set(lowered) & _NO_SECRETS)


def redact(text: str) -> str:
    """A text with `***` for every secret in it.

    Those are user and password of a URL, values of its query under names such as `api_key`, what follows
    `Authorization:`, tokens of well-known forms, and the value of every environment variable with such a name, unless
    it is where something lies: the shell's PWD and OLDPWD are no passwords, and the path of a key file is no key.

    Example:
        >>> redact("POST https://me:pw@judge.example/score?api_key=abc&size=3: Authorization: Bearer xyz")
        'POST https://***@judge.example/score?api_key=***&size=3: Authorization: Bearer ***'
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and is_secret_name(name) and not os.path.exists(value):
            for form in {value, urllib.parse.quote(value, safe=""), urllib.parse.quote_plus(value)}:
                text = text.replace(form, HIDDEN)
    text = _URL.sub(lambda found: _url(found[0]), text)
    text = _SCHEME.sub(lambda found: f"{found[1]} {HIDDEN}", text)
    text = _PAIR.sub(_pair, text)
    return _KNOWN.sub(HIDDEN, text)


def redacted(tree: Any, name: str = "") -> Any:
    """Plain data, with `***` under every secret name, and every text through `redact`.

    Example:
        >>> redacted({"url": "https://judge.example/?token=abc", "login": {"password": "pw", "retries": 3}})
        {'url': 'https://judge.example/?token=***', 'login': {'password': '***', 'retries': 3}}
    """
    if isinstance(tree, Mapping):
        return {redact(key) if isinstance(key, str) else key: redacted(value, str(key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [redacted(value, name) for value in tree]
    if tree is None or isinstance(tree, bool):
        return tree
    if is_secret_name(name):
        return HIDDEN
    return redact(tree) if isinstance(tree, str) else tree


def _url(text: str) -> str:
    before, mark, query = text.partition("?")
    scheme, slashes, rest = before.partition("://")
    host, slash, path = rest.partition("/")
    user, at, bare = host.rpartition("@")
    if not at and "@" in path and ":" in host:  # a slash in the password
        _, _, bare, slash, path = *rest.rpartition("@"), "", ""
        user = HIDDEN
    login = f"{HIDDEN}@" if user else ""
    return f"{scheme}{slashes}{login}{bare}{slash}{path}{mark}{_query(query)}"


def _query(query: str) -> str:
    parts = re.split(r"([&;#])", query)
    return "".join(_parameter(part) for part in parts)


def _parameter(part: str) -> str:
    name, equals, value = part.partition("=")
    return f"{name}={HIDDEN}" if equals and value and is_secret_name(urllib.parse.unquote(name)) else part


def _pair(found: re.Match[str]) -> str:
    """Of "name: value" in a text, where "key=value" is more often an explanation than a key."""
    told = found[1].lower() == "key" or found[3].lower() in ("bearer", "basic")
    return f"{found[1]}{found[2]}{HIDDEN}" if is_secret_name(found[1]) and not told else found[0]
