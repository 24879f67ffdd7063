"""Posted prices over an inventory and a horizon, to buyers who differ in valuation and patience.

Dynamic pricing: Gallego and van Ryzin, "Optimal Dynamic Pricing of Inventories with Stochastic Demand over Finite
Horizons", Management Science 40 (1994); logit demand: Talluri and van Ryzin, "The Theory and Practice of Revenue
Management" (2004), chapter 7.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, Discount, Probability, Range, Whole, checked
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.tables.arguments import check_size, finite_tensor, nature_law
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility


class MechanismLeader(TabularLeader):
    """Posts a price for every (inventory, period).

    State n T + t: n + 1 units are left in period t. The last state is the empty shop: nothing is decided there.

    Attributes:
        weights: the parameter, [N, T]; its softplus is the price of a unit.
        sold: [S, A], units that change hands: what is ordered, or what is left.
        value: [C, S, A], what they are worth to the buyer.
    """

    sold: Tensor
    value: Tensor
    transition: Tensor
    initial: Tensor
    log_prior_table: Tensor

    def __init__(self, weights: Tensor, welfare_weight: float, **tables: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)
        self._welfare_weight = welfare_weight
        for name, table in tables.items():
            self.register_buffer(name, table)

    def prices(self) -> Tensor:
        """The price of a unit with n + 1 units left in period t, [N, T]."""
        return nn.functional.softplus(self.weights)

    def revenue(self) -> Tensor:
        """What is paid, [S, A]."""
        return nn.functional.pad(self.prices().flatten(), (0, 1))[:, None] * self.sold

    def utility(self) -> Tensor:
        """Revenue and welfare (the value of what is sold, production being free) by their weights, [C, S, A]."""
        share = self._welfare_weight
        return (1 - share) * self.revenue() + share * self.value

    def tables(self) -> Tables:
        """The buyer earns value less payment; a uniform prior, under which the empty shop is worth nothing."""
        return Tables(self.value - self.revenue(), self.transition, self.initial, self.log_prior_table)


@checked
def mechanism(
    *,
    valuations: Any = (0.6, 1.0),
    type_probabilities: Any = None,
    inventory: Count = 2,
    horizon: Count = 3,
    max_quantity: Count = 1,
    satiation: Annotated[float, Range(0, 1, open="low")] = 1.0,
    welfare_weight: Probability = 0.0,
    temperature: float | Tensor = 0.2,
    discount: float | Tensor = 0.0,
    leader_discount: Discount = 0.95,
    seed: Whole = 0,
) -> Problem:
    """The leader posts prices by (inventory, time); contexts are valuations, drawn once for a selling season.

    In every period the buyer orders 0 to `max_quantity` units, accept or reject when that is one. With `discount` 0
    a new buyer comes every period, all of one type in a season; above 0 it is one buyer who stays and may wait for
    a lower price, the more patient the higher it is. Demand is logit: one unit at price p is taken with probability
    sigma((valuation - p) / lambda) by a buyer who does not look ahead.

    Args:
        valuations: [C], what a type's first unit is worth to it.
        type_probabilities: [C], uniform by default.
        inventory: N, units for sale.
        horizon: T, periods.
        max_quantity: the largest order; orders above the stock are filled up to it.
        satiation: in (0, 1], what each further unit sold in the season is worth relative to the one before.
        welfare_weight: in [0, 1]: 0 for revenue, 1 for welfare.
        temperature: lambda, in units of price, a number or one for each type, [C].
        discount: the buyer's patience gamma, likewise.
        leader_discount: gammaF.
        seed: of the initial weights, N(0, 0.1^2).

    Raises:
        InputError: sizes below one, valuations or probabilities of wrong shape or range, a weight, satiation,
            temperature or discount out of range.

    Example:
        >>> problem = mechanism(inventory=2, horizon=3)
        >>> tuple(problem.leader.prices().shape), tuple(problem.leader.tables().reward.shape)
        ((2, 3), (2, 7, 2))
    """
    worth = finite_tensor("valuations", valuations, ("C",))
    contexts, states, actions = len(worth), inventory * horizon + 1, max_quantity + 1
    # Filled in one by one, which takes as long as some 250 numbers at once.
    sizes = {"inventory": inventory, "horizon": horizon, "max_quantity": max_quantity}
    check_size(states * actions * max(states, 250), **sizes)

    sold = torch.zeros(states, actions, dtype=torch.float64)
    value = torch.zeros(contexts, states, actions, dtype=torch.float64)
    transition = torch.zeros(1, states, actions, states, dtype=torch.float64)
    terminal = torch.zeros(contexts, states, dtype=torch.bool)
    terminal[:, -1] = True
    transition[:, -1, :, -1] = 1
    for stock in range(1, inventory + 1):
        for period in range(horizon):
            state = (stock - 1) * horizon + period
            terminal[:, state] = period == horizon - 1
            for order in range(actions):
                units = min(order, stock)
                left = stock - units
                following = (left - 1) * horizon + period + 1 if left and period + 1 < horizon else states - 1
                gone = inventory - stock
                sold[state, order] = units
                value[:, state, order] = worth * sum(satiation**k for k in range(gone, gone + units))
                transition[:, state, order, following] = 1
    initial = torch.zeros(contexts, states, dtype=torch.float64)
    initial[:, (inventory - 1) * horizon] = 1

    def utility(leader: TabularLeader) -> Tensor:
        assert isinstance(leader, MechanismLeader)
        return leader.utility()

    weights = 0.1 * torch.randn(inventory, horizon, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    leader = MechanismLeader(
        weights,
        welfare_weight,
        sold=sold,
        value=value,
        transition=transition,
        initial=initial,
        log_prior_table=torch.full_like(value, -math.log(actions)),
    )
    cmdp = ContextualMDP(nature_law("type_probabilities", type_probabilities, contexts), terminal)
    objective = ExpectedUtility(TabularUtility(utility), discount=leader_discount, depends_on_leader=True)
    return Problem(leader, objective, ExactFollower(cmdp, temperature, discount, horizon=horizon))
