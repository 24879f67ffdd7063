"""`SamplerEvidence`: whether completions are samples of the policy that their log-probabilities belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ALARM = math.log(1000.0)
"""Nats of evidence that at most one run in a thousand reaches when its completions are what they are said to be."""

_EXPONENTS = (0.5, 0.9, 1.1, 2.0)
_ORDERS = 3  # repeats of one, two and three tokens
_PLACES = (0, 1, 4, 16)  # where the pieces of a completion begin in which its end is counted
_ALTERNATIVES = (
    "flatter",
    "flatter",
    "sharper",
    "sharper",
    "typical",
    *["repeats"] * _ORDERS,
    "ends",
    "tokens",
    "tokens",
)
_WORDS = {
    "flatter": "unlikely tokens come too often, as with a temperature above 1, penalties, other weights or prompts",
    "sharper": "likely tokens come too often, as with a temperature below 1, a cut support (top_k, min_p), beams",
    "typical": "surprising and obvious tokens are missing, as with typical_p",
    "repeats": "tokens that repeat the text come too rarely or too often, as with penalties and bans of n-grams",
    "ends": "completions end too rarely or too often, as with a minimal length or a suppressed end",
    "tokens": "some tokens come too rarely or too often, as with suppressed tokens, bad words or biases",
}
_PIECE = 2**24  # numbers of a distribution that are looked at together
_UNLIKELY = 6.0  # nats of deviance at which a token is taken for favoured or avoided
_LEAST = -80.0  # log-probability of what a model never says, so that evidence stays finite
_PRIOR = 2.0  # observations that a favoured or avoided set is believed to have behaved in
_FURTHEST = 20.0  # the largest factor by which one is taken to be favoured, or avoided


class SamplerEvidence:
    """Evidence, in nats, that tokens were not drawn from the distributions that they are said to come from.

    It is a bet against the sampler. Each of eleven alternatives says how a token would be drawn if something
    interfered, as a distribution q over the vocabulary that is fixed before the token is seen; the stake is multiplied
    by q(token) / p(token). Under p that ratio has mean one, whatever p and q, so that the stake is a martingale and
    reaches 1000 with probability at most 1 / 1000 (Ville), however long the run and however often one looks. Nothing
    is approximated and nothing has to be independent. Where an alternative is near the truth, the stake grows by
    almost KL(truth || p) a token, and no test can see less than that.

    The alternatives, with equal shares of the stake:

    - p to the power of 0.5, 0.9, 1.1 and 2: other temperatures, cut supports (top_k, top_p, min_p), beams, guidance;
    - p exp(-|log p + entropy|): typical_p, which leaves the mean of log p where it was;
    - tokens that repeat one, two or three tokens of the text, end tokens in four stretches of a completion, and tokens
      whose number so far, anywhere or as the first of a completion, is unlikely, each favoured or avoided as much as
      in the batches before: penalties and n-gram bans, minimal lengths, suppressed tokens and bad words.

    The share of the stake that enters at batch k is 1 / (k (k + 1)), so that what begins late is found as well.

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> logits = torch.randn(64, 8, 20)
        >>> prompt = torch.randint(20, (64, 3))
        >>> right, cold = SamplerEvidence(), SamplerEvidence()
        >>> for found, temperature in ((right, 1.0), (cold, 0.7)):
        ...     tokens = torch.distributions.Categorical(logits=logits / temperature).sample()
        ...     found.add(logits, tokens, torch.ones(64, 8), prompt, torch.ones(64, 3), ends=[0])
        >>> total_evidence(right.by_alternative()) < ALARM < total_evidence(cold.by_alternative())
        True
    """

    def __init__(self) -> None:
        self.batches = 0
        self._stake = torch.full((len(_ALTERNATIVES),), -math.inf, dtype=torch.float64)  # logarithms
        self._seen = torch.zeros(2, 0, dtype=torch.float64)  # of each token [V], anywhere and in the first place, ...
        self._expected = torch.zeros_like(self._seen)
        self._sets_seen = torch.zeros(_ORDERS + len(_PLACES), dtype=torch.float64)  # ... and of each set
        self._sets_expected = torch.zeros_like(self._sets_seen)

    @torch.no_grad()
    def add(
        self,
        logits: Tensor,
        tokens: Tensor,
        mask: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor,
        ends: Sequence[int],
    ) -> None:
        """Bet on a batch of completions, then learn from it.

        Args:
            logits: [R, L, V] of the policy that is said to have been sampled, before each token.
            tokens: long [R, L], what was sampled.
            mask: [R, L], one for each token up to the end, its own included.
            prompt: long [R, P], padded on the left.
            prompt_mask: [R, P].
            ends: tokens that end a completion.
        """
        length, size = logits.shape[1:]
        if self._seen.shape[1] != size:
            self._seen, self._expected = (torch.zeros(2, size, dtype=torch.float64) for _ in range(2))
        device = logits.device
        inside = mask.bool().flatten().to(device)  # [R * L]
        tokens, prompt = tokens.to(device), prompt.to(device)
        text = torch.cat([prompt, tokens], 1)  # [R, T]
        valid = torch.cat([prompt_mask.bool().to(device), mask.bool().to(device)], 1)
        candidates, hits = _repeats(text, valid, length)  # [orders, R, L, T], [orders, R, L]
        by_token = _factor(self._seen, self._expected, 0.5)  # [2, V]
        deviance = torch.special.xlogy(self._seen, self._seen / self._expected.clamp(min=1e-12))
        by_token[deviance - self._seen + self._expected < _UNLIKELY] = 1.0
        by_token = by_token.to(device)
        by_set = _factor(self._sets_seen, self._sets_expected, _PRIOR).to(device)
        place = torch.arange(length, device=device)
        stretch = torch.bucketize(place, torch.tensor(_PLACES, device=device), right=True) - 1  # [L]

        gains = torch.zeros(len(_ALTERNATIVES), dtype=torch.float64, device=device)
        seen = torch.zeros(2, size, dtype=torch.float64, device=device)
        expected = torch.zeros_like(seen)
        in_sets = torch.zeros(2, len(self._sets_seen), dtype=torch.float64, device=device)  # seen, expected
        flat, chosen = logits.reshape(-1, size), tokens.flatten()
        for piece in inside.nonzero()[:, 0].split(max(1, _PIECE // size)):
            row, at = piece // length, piece % length
            log_p = torch.log_softmax(flat[piece].float(), -1).clamp(min=_LEAST)  # [n, V]
            p = log_p.exp()
            drawn = chosen[piece]
            log_drawn = log_p.gather(1, drawn[:, None])[:, 0].double()
            weight = torch.stack([torch.ones_like(at), at == 0]).to(p)  # [2, n]
            seen.index_add_(1, drawn, weight.double())
            expected += weight @ p
            ratios = [(a - 1) * log_drawn - p.pow(a).sum(-1).double().log() for a in _EXPONENTS]
            typical = -(torch.special.entr(p).sum(-1, keepdim=True) + log_p).abs()  # [n, V]
            ratios.append(typical.gather(1, drawn[:, None])[:, 0].double() - (typical.exp() * p).sum(-1).double().log())
            of_text = p.gather(1, text[row])  # [n, T]: of every token of the text, that it comes next
            for order in range(_ORDERS):
                mass = (of_text * candidates[order, row, at]).sum(-1).double().clamp(max=1.0)
                hit = hits[order, row, at].double()
                ratios.append(_tilted(by_set[order], mass, hit))
                in_sets[:, order] += torch.stack([hit.sum(), mass.sum()])
            mass = p[:, list(ends)].sum(-1).double().clamp(max=1.0)
            hit = torch.isin(drawn, torch.tensor(list(ends), device=device)).double()
            ratios.append(_tilted(by_set[_ORDERS:][stretch[at]], mass, hit))
            in_sets.index_add_(1, _ORDERS + stretch[at], torch.stack([hit, mass]))
            mean = (by_token - 1).to(p) @ p.T  # [2, n]
            ratios.extend(weight * (by_token[:, drawn].log() - torch.log1p(mean.double())))
            gains += torch.stack([ratio.sum() for ratio in ratios])

        self.batches += 1
        entering = -math.log(self.batches * (self.batches + 1))
        self._stake = torch.logaddexp(self._stake, torch.tensor(entering, dtype=torch.float64)) + gains.cpu()
        self._expected += expected.cpu()
        self._seen += seen.cpu()
        self._sets_seen += in_sets[0].cpu()
        self._sets_expected += in_sets[1].cpu()

    def by_alternative(self) -> dict[str, float]:
        """Nats of evidence for each of the alternatives; those of one name are put together. Empty before any batch."""
        if self.batches == 0:
            return {}
        not_entered = torch.tensor(-math.log(self.batches + 1), dtype=torch.float64)
        whole = torch.logaddexp(self._stake, not_entered) - math.log(len(_ALTERNATIVES))
        names = dict.fromkeys(_ALTERNATIVES)
        return {
            name: float(torch.logsumexp(whole[[alternative == name for alternative in _ALTERNATIVES]], 0))
            for name in names
        }

    def state_dict(self) -> dict[str, Any]:
        """What further bets depend on."""
        names = ("batches", "_stake", "_seen", "_expected", "_sets_seen", "_sets_expected")
        return {name.strip("_"): _own(getattr(self, name)) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, unless more has been seen since."""
        if state["batches"] <= self.batches:
            return
        self.batches = state["batches"]
        for name in ("stake", "seen", "expected", "sets_seen", "sets_expected"):
            setattr(self, f"_{name}", _own(state[name]))


def total_evidence(by_alternative: Mapping[str, float]) -> float:
    """Nats against the sampler, of all alternatives together.

    Example:
        >>> round(total_evidence({"ends": 3.0, "tokens": -1.0}), 3)
        3.018
    """
    return float(torch.logsumexp(torch.tensor(list(by_alternative.values()), dtype=torch.float64), 0))


def sampler_alarm(by_alternative: Mapping[str, float]) -> str | None:
    """What the evidence says, in words, where it is beyond `ALARM`.

    Example:
        >>> sampler_alarm({"ends": 3.0, "tokens": -1.0}) is None
        True
        >>> sampler_alarm({"ends": 30.0, "tokens": -1.0})[:85]
        'the completions are not samples of the policy that their log-probabilities belong to '
    """
    total = total_evidence(by_alternative)
    if not total >= ALARM:
        return None
    worst = max(by_alternative, key=lambda name: by_alternative[name])
    return (
        f"the completions are not samples of the policy that their log-probabilities belong to ({total:.3g} nats of "
        f"evidence; a right sampler passes {ALARM:.1f} in one run of 1000): {_WORDS[worst]}. The gap, the weights and "
        "the hypergradient are another policy's: find out what changes the samples (a setting of the generation, a "
        "logits processor, a generate() of the model's own, an engine with other weights or another prompt)"
    )


def mean_evidence(several: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Evidence of several samplers, or processes, as one: the mean of their stakes, which is a stake again.

    Example:
        >>> {name: round(nats, 3) for name, nats in mean_evidence([{"ends": 3.0}, {"ends": 0.0}]).items()}
        {'ends': 2.355}
    """
    stakes = torch.tensor([list(evidence.values()) for evidence in several], dtype=torch.float64)
    mean = torch.logsumexp(stakes, 0) - math.log(len(several))
    return dict(zip(several[0], mean.tolist(), strict=True))


def _factor(seen: Tensor, expected: Tensor, prior: float) -> Tensor:
    """How much tokens, or sets of them, are favoured so far."""
    return ((seen + prior) / (expected + prior)).clamp(1 / _FURTHEST, _FURTHEST)


def _tilted(factor: Tensor, mass: Tensor, hit: Tensor) -> Tensor:
    """log q(token) / p(token), [n], where q favours a set of mass `mass` under p by `factor`."""
    return hit * factor.log() - torch.log1p(mass * (factor - 1))


def _repeats(text: Tensor, valid: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Which earlier tokens of the text would, if they came next, repeat 1, 2, 3 tokens of it; and which tokens do.

    Args:
        text: long [R, T], the last `length` of which were sampled.
        valid: bool [R, T].
        length: L.

    Returns:
        candidates: bool [3, R, L, T], each different token marked once.
        hits: bool [3, R, L].
    """
    index = torch.arange(text.shape[1], device=text.device)
    earlier = index[None, :] < index[-length:, None]  # [L, T]
    ids = torch.zeros_like(text)  # the n-gram that ends at each place, n = 0
    whole = torch.ones_like(valid)
    candidates: list[Tensor] = []
    hits: list[Tensor] = []
    for _ in range(_ORDERS):
        before = torch.nn.functional.pad(ids, (1, 0))[:, :-1]  # that ends at the place before
        begun = torch.nn.functional.pad(whole, (1, 0), value=False)[:, :-1] if candidates else whole
        whole = begun & valid
        same = (before[:, -length:, None] == before[:, None, :]) & begun[:, -length:, None] & whole[:, None, :]
        same &= earlier
        # numbered anew, so that nothing overflows however large the vocabulary
        ids = torch.unique(before * (int(text.max()) + 1) + text, return_inverse=True)[1]
        repeats_earlier = (ids[:, :, None] == ids[:, None, :]) & whole[:, None, :] & (index[None, :] < index[:, None])
        first = ~repeats_earlier.any(-1)  # [R, T]
        candidates.append(same & first[:, None, :])
        hits.append((same & (text[:, -length:, None] == text[:, None, :])).any(-1))
    return torch.stack(candidates), torch.stack(hits)


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
