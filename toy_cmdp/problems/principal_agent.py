"""Principal and agent: a contract pays on outcomes, the effort behind them is hidden, the agent cannot be fined.

Moral hazard with limited liability: Innes, "Limited Liability and Incentive Contracting with Ex-Ante Action Choices",
Journal of Economic Theory 52 (1990); Laffont and Martimort, "The Theory of Incentives" (2002), chapter 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, Discount, Positive, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.tables.arguments import check_size, finite_tensor, law_tensor, nature_law
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility


class PrincipalAgentLeader(TabularLeader):
    """A contract: the payment w(h, o) >= 0 for outcome o after the history h of earlier outcomes.

    K outcomes; a state is a history of outcomes. Payments enter rewards as expectations over the outcome. The agent
    is risk-neutral, so that its Bellman equation holds nothing else of them, and a sampled path then has no noise
    from an outcome's payment.

    Attributes:
        weights: the parameter, [S, K]; softplus of it is paid, or max_payment times its sigmoid.
        law: [A, K], how likely outcome o is after effort a.
        costs: [C, A], what effort costs a type.
        output: [K], what an outcome is worth to the principal.
    """

    law: Tensor
    costs: Tensor
    output: Tensor
    transition: Tensor
    initial: Tensor

    def __init__(self, weights: Tensor, max_payment: float | None, **tables: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)
        self._max_payment = max_payment
        for name, table in tables.items():
            self.register_buffer(name, table)

    def payments(self) -> Tensor:
        """w(h, o), [S, K]."""
        if self._max_payment is None:
            return nn.functional.softplus(self.weights)
        return self._max_payment * torch.sigmoid(self.weights)

    def expected_payment(self) -> Tensor:
        """E[w(h, o) | effort], [S, A]."""
        return self.payments() @ self.law.T

    def utility(self) -> Tensor:
        """The principal's expected output less the expected payment, [C, S, A]."""
        return (self.law @ self.output - self.expected_payment()).expand(len(self.costs), -1, -1)

    def tables(self) -> Tables:
        """The agent earns the expected payment less the cost of its effort; entropy regularisation."""
        return Tables(self.expected_payment() - self.costs[:, None], self.transition, self.initial)


@checked
def principal_agent(
    *,
    outcome_law: Any = ((0.8, 0.2), (0.2, 0.8)),
    output: Any = (0.0, 1.0),
    costs: Any = ((0.0, 0.1), (0.0, 0.2)),
    type_probabilities: Any = None,
    periods: Count = 1,
    max_payment: Positive | None = None,
    temperature: float | Tensor = 0.05,
    discount: float | Tensor = 0.95,
    leader_discount: Discount = 0.95,
    seed: Whole = 0,
) -> Problem:
    """The leader is the principal, who writes the contract; contexts are cost types of the agent.

    Every period the agent makes an effort, an outcome is drawn, and the contract pays on it and on all outcomes before
    it. There are 1 + K + ... + K^(periods - 1) histories, the states, the first of them the start.

    Args:
        outcome_law: [A, K], the law of the K >= 2 outcomes for each of A >= 2 efforts.
        output: [K], the worth of an outcome to the principal, in units of payment.
        costs: [C, A], the cost of an effort to a type, >= 0, in the same units.
        type_probabilities: [C], uniform by default.
        periods: number of efforts.
        max_payment: None for payments without an upper bound, otherwise the largest payment.
        temperature: the agent's lambda, a number or one for each type, [C].
        discount: the agent's gamma, likewise.
        leader_discount: the principal's gammaF.
        seed: of the initial weights, N(0, 0.1^2).

    Raises:
        InputError: fewer than two outcomes or efforts, shapes that disagree, numbers that are not finite, laws that do
            not sum to one, negative costs, a largest payment, temperature or discount out of range.

    Example:
        >>> problem = principal_agent(periods=2)
        >>> tuple(problem.leader.payments().shape), tuple(problem.leader.tables().reward.shape)
        ((3, 2), (2, 3, 2))
    """
    cost = finite_tensor("costs", costs, ("C", "A"))
    contexts, efforts = cost.shape
    if bool((cost < 0).any()):
        raise InputError(f"costs: expected numbers >= 0, got {cost.min().item()}")
    worth = finite_tensor("output", output, ("K",))
    outcomes = len(worth)
    if efforts < 2:
        raise InputError(f"costs: expected two or more efforts (columns), got {efforts}")
    if outcomes < 2:
        raise InputError(f"output: expected two or more outcomes, got {outcomes}")
    law = law_tensor("outcome_law", outcome_law, (efforts, outcomes))

    histories = (outcomes ** min(periods, 64) - 1) // (outcomes - 1)
    check_size(efforts * histories**2, periods=periods)
    first = [sum(outcomes**k for k in range(t)) for t in range(periods + 1)]  # where a period's histories begin
    states, last = first[periods], first[periods - 1]
    transition = torch.zeros(1, states, efforts, states, dtype=torch.float64)
    transition[:, last:, :, 0] = 1  # unused: the last effort ends the episode
    for state in range(last):  # histories are numbered period by period, so that the successors are consecutive
        transition[:, state, :, state * outcomes + 1 : (state + 1) * outcomes + 1] = law
    initial = torch.zeros(contexts, states, dtype=torch.float64)
    initial[:, 0] = 1
    terminal = (torch.arange(states) >= last).expand(contexts, states).clone()

    def utility(leader: TabularLeader) -> Tensor:
        assert isinstance(leader, PrincipalAgentLeader)
        return leader.utility()

    weights = torch.randn(states, outcomes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    leader = PrincipalAgentLeader(
        0.1 * weights, max_payment, law=law, costs=cost, output=worth, transition=transition, initial=initial
    )
    cmdp = ContextualMDP(nature_law("type_probabilities", type_probabilities, contexts), terminal)
    objective = ExpectedUtility(TabularUtility(utility), discount=leader_discount, depends_on_leader=True)
    return Problem(leader, objective, ExactFollower(cmdp, temperature, discount, horizon=periods))
