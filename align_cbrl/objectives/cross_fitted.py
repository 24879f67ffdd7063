"""Risk over contexts from small batches: no sample weighs itself, and contexts are remembered across steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.groups import Groups
from align_cbrl.objectives.risk import OverContexts, check_equal_groups
from align_cbrl.objectives.wrapping import Wrapping
from align_cbrl.problem import Evaluation, Objective, Observed, Risk, Term

_ROWS = 4096  # slopes that are computed at once


@checked
class CrossFitted(Wrapping, Risk):
    """Cross-fitted risk over contexts: each sample's weight is computed without that sample.

    The gradient of g(f_1, ..., f_K), f_c being what context c is worth, is sum_c g_c(f) df_c: each context counts by
    the slope of the risk at its value. Taken from one batch as it is, slope and gradient come from the same G
    completions, and their covariance is a bias of order 1 / G. The covariance within a group is a mean over pairs,

        Cov(u, dr) = E (u_i - u_j) (dr_i - dr_j) / 2,

    so here each pair is weighed by the slope at the value that the *other* G - 2 completions give:

        credit_i = sum_j W_j s_ij (u_i - u_j),    s_ij = the slope without i and j, over the context's probability.

    Where the slope is linear in the values, as for `MeanVariance`, the estimate is unbiased given the contexts.
    Elsewhere what remains is the curvature of the slope times the variance of a mean of G - 2. It can exceed what was
    removed where few contexts decide (docs/objectives.md has figures), and shrinks with the contexts that a group has.

    A batch of a few prompts also says little about nature's law: which quarter of all prompts is the worst, or how a
    group does that the batch happens to lack. The values of the last `memory` contexts, of earlier steps, are kept
    beside the batch's own. They are up to memory / (contexts a step) steps old, and probabilities are shares of both.

    Pairs and sets of completions share members: what they say is not independent of a slope without two completions,
    and taking it there mostly makes the bias larger (docs/objectives.md). A risk of such a value is only remembered.

    Args:
        objective: a risk over contexts: `CVaR`, `MeanVariance`, `EntropicRisk`, `WorstContext` or `WorstGroup`.
        memory: how many contexts of earlier steps are remembered; 0 for none, where a batch holds all contexts.

    Raises:
        InputError: another kind of objective, a negative memory, paths of several steps, groups of fewer than 3, or a
            group whose paths all have weight zero.

    Example:
        >>> from align_cbrl import ExpectedUtility, MeanVariance, Rollouts
        >>> steps = {"score": torch.tensor([1.0, 3.0, 2.0, 6.0, 6.0, 6.0]).double()}
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0, 0, 1, 1, 1]), steps=steps)
        >>> score = ExpectedUtility(lambda leader, rollouts: rollouts.steps["score"][:, None])
        >>> CrossFitted(MeanVariance(score, 0.1)).evaluate(None, rollouts).value.item()  # 4 - 0.1 * 4
        3.6
    """

    def __init__(self, objective: Objective, memory: Whole = 0) -> None:
        risk: Objective = objective
        while isinstance(risk, Wrapping) and not isinstance(risk, (OverContexts, CrossFitted)):
            risk = risk.objective
        if not isinstance(risk, OverContexts):
            raise InputError(
                "CrossFitted.objective: expected a risk over contexts (CVaR, MeanVariance, EntropicRisk, WorstContext "
                f"or WorstGroup), got {type(objective).__name__}; nothing else has weights to be fitted"
            )
        self.objective = objective
        self.memory = memory
        self._fitted = risk
        self._past: list[tuple[int, float, float]] = []  # label, value, mass relative to the mean of its step
        self._seen: list[tuple[int, float, float]] = []  # the same of the batch that was evaluated last

    @property
    def remembers(self) -> bool:  # type: ignore[override]  # a field of the base class
        """Whether there is a memory."""
        return self.memory > 0

    def terms(self, observed: Observed) -> list[Term]:
        """The wrapped objective's; the risk of the first is cross-fitted."""
        first, *others = self.objective.terms(observed)
        return [dataclasses.replace(first, risk=self), *others]

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """As the fitted risk aggregates: with all contexts known there is nothing to fit."""
        return self._fitted.aggregate(values, probabilities)

    def estimate(self, term: Term, observed: Observed, discount: float) -> Evaluation:
        """The risk over batch and memory, and the cross-fitted credit [B, 1]."""
        name, rollouts = f"CrossFitted({type(self._fitted).__name__})", observed.samples
        if rollouts.horizon != 1:
            raise InputError(f"{name}: expected rollouts of one step, got a horizon of {rollouts.horizon}")
        score = term.utility.detach()[:, 0]
        weight = rollouts.path_weight(score.dtype).to(score.device)
        points = Groups.of(rollouts.group[:, 0].to(score.device))
        if int(points.sizes.min()) < 3:
            raise InputError(
                f"{name}: expected groups of at least 3 completions, got one of {int(points.sizes.min())}; two make a "
                "pair and the others weigh it"
            )
        mass, total = points.sum(weight), points.sum(weight * score)
        if bool((mass == 0).any()):
            raise InputError(f"{name}: every path of group {int(points.labels[mass == 0][0])} has weight zero")
        value, share = total / mass, mass / mass.mean()  # [N], one for each decision point

        mine = points.first(self._fitted.labels(observed).to(score.device))  # [N], that of each point's first path
        self._seen = list(zip(mine.tolist(), value.tolist(), share.tolist(), strict=True))

        labels = torch.cat([mine.new_tensor([entry[0] for entry in self._past], dtype=torch.long), mine])
        named = Groups.of(labels)
        past = score.new_tensor([entry[1:] for entry in self._past]).view(-1, 2)  # [memory, 2]
        values, shares = torch.cat([past[:, 0], value]), torch.cat([past[:, 1], share])
        of_label = named.sum(shares)
        means, probabilities = named.sum(shares * values) / of_label, of_label / of_label.sum()  # [K]
        here = named.place[len(self._past) :]  # [N]

        linear = self._fitted.is_linear
        if not linear:
            check_equal_groups(name, observed)
        influence = score if linear else term.credit.detach()[:, 0].to(score)
        credit, importance = torch.zeros_like(score), torch.zeros_like(score)
        for at, rows in points.tables():  # groups of one size at a time: [n], [n, G]
            size = rows.shape[1]
            w, u, k = weight[rows], score[rows], here[at]
            rest = mass[at][:, None, None] - w[:, :, None] - w[:, None, :]  # [n, G, G]: the mass without i and j
            others = total[at][:, None, None] - (w * u)[:, :, None] - (w * u)[:, None, :]
            # Importance weights may all lie on i and j; such a pair has nobody else to ask.
            alone = rest <= 1e-9 * mass[at][:, None, None] if linear else torch.ones_like(rest, dtype=torch.bool)
            without = torch.where(alone, value[at][:, None, None], others / torch.where(alone, 1.0, rest))
            change = share[at] / of_label[k]
            moved = means[k][:, None, None] + change[:, None, None] * (without - value[at][:, None, None])
            slope = self._slopes(means, probabilities, k[:, None, None].expand_as(moved), moved)  # [n, G, G]
            difference = influence[rows][:, :, None] - influence[rows][:, None, :]
            credit[rows] = ((w / mass[at][:, None])[:, None, :] * slope * difference).sum(2)
            # The mean over partners leaves i out as well: what u_i itself is multiplied with in the direct term.
            importance[rows] = (slope.sum(2) - slope.diagonal(dim1=1, dim2=2)) / (size - 1)
        worth = self._fitted.aggregate_groups(means, probabilities)
        moving = (weight * importance * (term.utility[:, 0] - score)).mean()  # zero, with the gradient that is wanted
        return Evaluation(value=worth.detach() + moving, credit=credit[:, None])

    def _slopes(self, means: Tensor, probabilities: Tensor, label: Tensor, moved: Tensor) -> Tensor:
        """The risk's slope at one label's value, over its probability, when that value is `moved`: all of any shape."""
        shape, label, moved = moved.shape, label.reshape(-1), moved.reshape(-1)
        slopes = []
        for start in range(0, len(moved), _ROWS):
            here = label[start : start + _ROWS]
            rows = means.expand(len(here), -1).clone()
            rows[torch.arange(len(here), device=here.device), here] = moved[start : start + _ROWS]
            slope = torch.func.vmap(torch.func.grad(self._fitted.aggregate_groups), in_dims=(0, None))(
                rows, probabilities
            )
            slopes.append(slope.gather(1, here[:, None])[:, 0] / probabilities[here])
        return torch.cat(slopes).view(shape)

    def update(self, observed: Callable[[], Observed]) -> dict[str, float]:
        """Remember the values of the batch evaluated last, forget the oldest, and let the wrapped objective adapt."""
        if self.memory:
            self._past = [*self._past, *self._seen][-self.memory :]
        self._seen = []
        return self.objective.update(observed)

    def state_dict(self) -> dict[str, Any]:
        """The remembered values, and what the wrapped objective keeps."""
        columns = [list(column) for column in zip(*self._past, strict=True)] or [[], [], []]
        return {
            "labels": columns[0],
            "values": columns[1],
            "masses": columns[2],
            "objective": self.objective.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._past = list(zip(state["labels"], state["values"], state["masses"], strict=True))
        self.objective.load_state_dict(state["objective"])
