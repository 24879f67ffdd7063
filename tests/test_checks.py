"""What `checked` makes of annotations; that every public constructor has it is tested with the malformed inputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from align_cbrl.checks import Count, Discount, Positive, Probability, Whole, check, checked
from align_cbrl.errors import InputError
from align_cbrl.hpgd import HPGDConfig


@pytest.mark.parametrize(
    ("hint", "taken", "refused"),
    [
        (Count, [1, 7], [0, -1, True, 1.0, math.nan, "1", None, 2**63, 10**400]),
        (Whole, [0], [-1, False]),
        (Positive, [1e-300, 3, 0.5], [0.0, -0.0, math.nan, math.inf, 10**400, True, "0.5", 1j]),
        (Positive | None, [None, 1.0], [0, "none"]),
        (Positive | Tensor, [torch.zeros(2), 0.1], [0.0, [0.1]]),
        (Probability, [0, 1, 0.5], [1.0000001, -1e-12]),
        (Discount, [0, 0.999], [1, 1.0]),
        (Literal["on", "off"], ["on"], ["auto", True, None]),
        (Sequence[str], [[], ["a"], ("a", "b")], ["a", b"a", [1], None, {"a": 1}]),
        (tuple[int, float], [(1, 2.0)], [(1,), (1, "2"), [1, 2.0]]),
        (Mapping[str, float], [{"a": 1.0}], [{"a": math.nan}, {1: 1.0}, [("a", 1.0)]]),
        (bool, [True, False], [0, 1, "true", None]),
        (Any, [None, object()], []),
    ],
)
def test_annotations_are_what_they_say(hint: Any, taken: list[Any], refused: list[Any]) -> None:
    for value in taken:
        check("x", value, hint)
    for value in refused:
        with pytest.raises(InputError, match=r"^x.*: expected .*, got "):
            check("x", value, hint)


def test_inherited_fields_of_another_module_are_found() -> None:
    @checked
    @dataclasses.dataclass(frozen=True)
    class More(HPGDConfig):
        further: Whole = 0

    assert More(steps=3, further=1).further == 1
    with pytest.raises(InputError, match=r"More\.steps: expected a whole number >= 1, got 0"):
        More(steps=0)
    with pytest.raises(InputError, match=r"More\.further: expected a whole number >= 0, got -1"):
        More(further=-1)


def test_what_fits_one_of_several_kinds_is_never_written_out() -> None:
    """The law of tax design was printed, dense, at every step, which then took fifteen times as long."""

    class Long:
        written = 0

        def __repr__(self) -> str:
            type(self).written += 1
            return "long"

    check("x", Long(), Tensor | Long)
    assert Long.written == 0
    with pytest.raises(InputError, match="x: expected a tensor or None, got long, a Long"):
        check("x", Long(), Tensor | None)
    assert Long.written > 0  # the test can fail


def test_a_key_is_written_out_where_it_is_plain() -> None:
    """A leader is a key of `Rollouts.known`: writing its network out took an eighth of a leader step."""

    class Network:
        def __repr__(self) -> str:
            raise AssertionError("was written out")

    check("known", {Network(): 1.5}, Mapping[Any, float])
    with pytest.raises(InputError, match=r"known\[a Network\]: expected a finite number, got 'x'"):
        check("known", {Network(): "x"}, Mapping[Any, float])
    with pytest.raises(InputError, match=r"known\['rate'\]: expected a finite number, got 'x'"):
        check("known", {"rate": "x"}, Mapping[Any, float])


def test_a_long_list_is_looked_at_as_a_whole() -> None:
    """512 completions of 256 tokens took 0.6 s, and a whole run's share of that, one token after another."""
    check("ids", [list(range(300))] * 300, list[list[int]])
    for wrong in (True, 2**63, -(2**64), 1.0, None):
        with pytest.raises(InputError, match=r"^ids\[0\]\[300\]: expected a whole number"):
            check("ids", [[*range(300), wrong]], list[list[int]])
    with pytest.raises(InputError, match=r"^names\[1\]: expected a text"):
        check("names", ["a", 1], list[str])


def test_a_number_too_long_to_print_is_refused_in_words() -> None:
    with pytest.raises(
        InputError, match=r"HPGDConfig\.steps: expected a whole number >= 1, got something that cannot be"
    ):
        HPGDConfig(steps=10**5000)
