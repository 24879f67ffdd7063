"""A tabular RLHF: a reward model of too few features, judged by a true score on what the policy itself writes.

The leader's objective on pairs drawn from pi* is PARL's: Chakraborty et al., "PARL: A Unified Framework for Policy
Alignment in Reinforcement Learning from Human Feedback", ICLR 2024; preferences are Bradley and Terry's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, NonNegative, Whole, checked
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Objective, Problem
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.tables.arguments import check_size
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility


class PreferencesLeader(TabularLeader):
    """A linear reward model, r_x(prompt, response) = features . x.

    Attributes:
        x: the parameter, [D].
        features: [C, A, D].
        score: [C, 1, A], the truth.
        truth: [D], the score's weights; score = features . truth where nothing is misspecified.
    """

    features: Tensor
    score: Tensor
    truth: Tensor
    transition: Tensor
    initial: Tensor
    log_prior_table: Tensor

    def __init__(self, x: Tensor, **tables: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)
        for name, table in tables.items():
            self.register_buffer(name, table)

    def tables(self) -> Tables:
        """One state, which ends the episode; the prior is the reference policy."""
        return Tables((self.features @ self.x)[:, None], self.transition, self.initial, self.log_prior_table)


@checked
def preferences(
    *,
    prompts: Count = 4,
    responses: Count = 6,
    features: Count = 3,
    misspecification: NonNegative = 0.5,
    objective: Callable[[TabularUtility], Objective] = ExpectedUtility,
    temperature: float | Tensor = 0.5,
    seed: Whole = 0,
) -> Problem:
    """The leader tunes a reward model, the follower is the policy trained on it, contexts are prompts.

    The true score of a response is features . truth plus `misspecification` times a part N(0, 1) that no reward model
    of these features can express. Features and truth are N(0, 1) too, the truth scaled so that the score it explains
    has variance one; the reference policy is a softmax of N(0, 1) logits.

    Args:
        prompts: C, drawn uniformly.
        responses: A.
        features: D.
        misspecification: >= 0, in standard deviations of the expressible score.
        objective: makes the leader's objective of the true score: `ExpectedUtility`, `PreferenceLikelihood`, or a
            function such as `lambda score: KLPriced(ExpectedUtility(score), 0.5)`.
        temperature: lambda, a number or one for each prompt, [C].
        seed: of everything, the initial weights N(0, 0.1^2) among it.

    Raises:
        InputError: a size below one, a misspecification or temperature out of range.

    Example:
        >>> problem = preferences(prompts=2, responses=5)
        >>> tuple(problem.leader.score.shape), tuple(problem.leader.tables().reward.shape)
        ((2, 1, 5), (2, 1, 5))
    """
    check_size(prompts * responses * features, prompts=prompts, responses=responses, features=features)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    phi, truth = normal(prompts, responses, features), normal(features) / features**0.5
    hidden, logits, start = normal(prompts, responses), normal(prompts, responses), normal(features)
    leader = PreferencesLeader(
        0.1 * start,
        features=phi,
        score=(phi @ truth + misspecification * hidden)[:, None],
        truth=truth,
        transition=torch.ones(1, 1, responses, 1, dtype=torch.float64),
        initial=torch.ones(prompts, 1, dtype=torch.float64),
        log_prior_table=torch.log_softmax(logits, -1)[:, None],
    )

    def score(leader: TabularLeader) -> Tensor:
        assert isinstance(leader, PreferencesLeader)
        return leader.score

    nature = torch.full((prompts,), 1 / prompts, dtype=torch.float64)
    cmdp = ContextualMDP(nature, torch.ones(prompts, 1, dtype=torch.bool))
    return Problem(leader, objective(TabularUtility(score)), ExactFollower(cmdp, temperature, 0.0))
