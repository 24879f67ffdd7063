"""The test of the sampler in loops; each test notices a fault that was put in by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from align_cbrl.estimators.sampler_evidence import ALARM, SamplerEvidence, mean_evidence, sampler_alarm, total_evidence

ROWS, LENGTH, PROMPT, SIZE = 6, 18, 4, 7
ENDS = [0, 5]
STRETCHES = [0, 1, 4, 16]
Step = tuple[int, int, list[int], int, Tensor]


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Few tokens, so that texts repeat themselves; 3 never comes, and 1 much less than it should."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, LENGTH, SIZE, generator=generator)
    logits[:, :, [1, 3]] += 1.5
    tokens = torch.tensor([0, 1, 2, 2, 4, 4, 4, 5, 6])[torch.randint(9, (ROWS, LENGTH), generator=generator)]
    prompt = torch.randint(1, SIZE, (ROWS, PROMPT), generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor([1, 3, 9, 18, 18, 17])[:, None]
    prompt_mask = torch.arange(PROMPT) >= torch.tensor([0, 0, 1, 3, 0, 2])[:, None]
    return logits, tokens, mask.long(), prompt, prompt_mask.long()


def sampled(data: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> list[Step]:
    """Of every token: its place, itself, the text before it, and the policy's distribution."""
    logits, tokens, mask, prompt, prompt_mask = data
    found = []
    for row in range(ROWS):
        text = prompt[row][prompt_mask[row].bool()].tolist()
        for place in range(int(mask[row].sum())):
            token = int(tokens[row, place])
            found.append((row, place, list(text), token, logits[row, place].double().softmax(-1)))
            text.append(token)
    return found


def repeating(text: list[int], order: int) -> list[int]:
    """The tokens that would repeat `order` tokens of the text."""
    last = text[len(text) - order + 1 :]
    starts = range(len(text) - order + 1)
    return sorted({text[i + order - 1] for i in starts if text[i : i + order - 1] == last and len(last) == order - 1})


def sets(place: int, text: list[int]) -> dict[int, list[int]]:
    """The sets that are favoured or avoided at a place, by their numbers: repeats, and ends of this stretch."""
    stretch = max(i for i, start in enumerate(STRETCHES) if place >= start)
    return {**{order - 1: repeating(text, order) for order in (1, 2, 3)}, 3 + stretch: ENDS}


def test_what_a_batch_teaches_by_its_definition() -> None:
    evidence, data = SamplerEvidence(), batch(0)
    evidence.add(*data, ends=ENDS)
    seen, in_sets = torch.zeros(2, 2, SIZE, dtype=torch.float64), torch.zeros(2, 7, dtype=torch.float64)
    for _, place, text, token, p in sampled(data):
        for first in range(1 + (place == 0)):
            seen[0, first, token] += 1
            seen[1, first] += p
        for number, members in sets(place, text).items():
            in_sets[:, number] += torch.tensor([float(token in members), float(p[members].sum())])
    assert (in_sets[:, :] > 0).all()  # every kind of set occurs
    found = torch.stack([evidence._seen, evidence._expected])
    torch.testing.assert_close(found, seen, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.stack([evidence._sets_seen, evidence._sets_expected]), in_sets, rtol=0, atol=1e-4)


def test_bets_by_their_definition() -> None:
    """Those on the exponent and on typical tokens, and those on sets and tokens with what a batch has taught."""
    evidence, data = SamplerEvidence(), batch(1)
    evidence.add(*batch(0), ends=ENDS)
    before = {name: value.clone() for name, value in evidence.state_dict().items() if name != "batches"}
    evidence.add(*data, ends=ENDS)

    def favoured(seen: Tensor, expected: Tensor, prior: float) -> Tensor:
        return ((seen + prior) / (expected + prior)).clamp(1 / 20, 20)

    by_set = favoured(before["sets_seen"], before["sets_expected"], 2.0)
    by_token = favoured(before["seen"], before["expected"], 0.5)
    seen, expected = before["seen"], before["expected"]
    deviance = torch.where(seen > 0, seen * (seen.clamp(min=1e-9) / expected).log(), 0) - seen + expected
    by_token[deviance < 6] = 1
    assert by_token.min() == 1 / 20 and 0 < (by_token != 1).sum() < by_token.numel()
    gains = torch.zeros(11, dtype=torch.float64)
    for _, place, text, token, p in sampled(data):
        entropy = -(p * p.log()).sum()
        for number, q in enumerate([*(p**a for a in (0.5, 0.9, 1.1, 2.0)), p * (-(p.log() + entropy).abs()).exp()]):
            gains[number] += (q / q.sum() / p)[token].log()
        for number, members in sets(place, text).items():
            factor = torch.ones(SIZE, dtype=torch.float64)
            factor[members] = by_set[number]
            gains[min(5 + number, 8)] += (factor[token] / (p * factor).sum()).log()
        for first in range(1 + (place == 0)):
            factor = by_token[first]
            gains[9 + first] += (factor[token] / (p * factor).sum()).log()
    entering = torch.tensor(-math.log(2 * 3), dtype=torch.float64)
    want = torch.logaddexp(before["stake"], entering) + gains
    torch.testing.assert_close(evidence._stake, want, rtol=0, atol=1e-4)


def test_nothing_sampled_is_no_evidence() -> None:
    """The part of the stake that has not entered is kept, so that the whole is one where no bet was taken."""
    evidence, (logits, tokens, mask, prompt, prompt_mask) = SamplerEvidence(), batch(0)
    for _ in range(3):
        evidence.add(logits, tokens, 0 * mask, prompt, prompt_mask, ENDS)
        assert total_evidence(evidence.by_alternative()) == pytest.approx(0, abs=1e-12)


def test_what_a_model_never_says_is_much_but_finite_evidence() -> None:
    evidence, (logits, tokens, mask, prompt, prompt_mask) = SamplerEvidence(), batch(0)
    logits = logits.scatter(-1, tokens[..., None], -torch.inf)
    evidence.add(logits, tokens, mask, prompt, prompt_mask, ENDS)
    found = evidence.by_alternative()
    assert all(math.isfinite(nats) for nats in found.values())
    assert total_evidence(found) > 100
    evidence.add(*batch(1), ends=ENDS)
    assert math.isfinite(total_evidence(evidence.by_alternative()))


def test_the_alarm_goes_off_at_its_threshold() -> None:
    for name in ("flatter", "ends", "tokens"):
        assert sampler_alarm({name: ALARM - 1e-6, "other": -50.0}) is None
        assert sampler_alarm({name: ALARM + 1e-6, "other": -50.0}) is not None


def test_a_state_is_a_copy() -> None:
    """A follower that is put back has learned nothing from what it sampled meanwhile."""
    evidence, other = SamplerEvidence(), SamplerEvidence()
    evidence.add(*batch(0), ends=ENDS)
    state = evidence.state_dict()
    other.load_state_dict(state)
    for one in (evidence, other):
        one.add(*batch(1), ends=ENDS)
    again = SamplerEvidence()
    again.load_state_dict(state)
    again.add(*batch(1), ends=ENDS)
    assert again.by_alternative() == evidence.by_alternative() == other.by_alternative()
    other.load_state_dict(state)  # what was seen since is evidence all the same
    assert other.by_alternative() == evidence.by_alternative()


def test_the_mean_of_stakes_is_theirs() -> None:
    several = [{"ends": 2.0, "tokens": -1.0}, {"ends": -3.0, "tokens": 0.5}, {"ends": 0.0, "tokens": 0.0}]
    stakes = [sum(math.exp(nats) for nats in one.values()) for one in several]
    assert math.exp(total_evidence(mean_evidence(several))) == pytest.approx(sum(stakes) / 3, rel=1e-12)
