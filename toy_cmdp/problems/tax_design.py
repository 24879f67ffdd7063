"""Tax design (Thoma et al. 2024): a government sets three VAT rates and an income tax, households work and consume.

The mathematics, with proofs and measured orders of convergence, is in docs/tax_design.md. Axes: C contexts, S assets,
A actions; H hours, N = 125 baskets of goods, L choices of consumption of at most K baskets each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, checked
from align_cbrl.errors import InputError
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem, check_temperature
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.tables.arguments import check_size
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility
from toy_cmdp.tables.line_transition import LineTransition

_PREFERENCES = ((0.6, 0.3, 0.1), (0.1, 0.7, 0.2))  # exponents of the three goods, one row a household
_HOURS = tuple(0.89 * i for i in range(10))
_QUANTITIES = tuple(1.25 * i for i in range(5))  # of each good; its price is 1, and so is the wage
_LIMIT, _NOISE = 100.0, 5.0  # assets lie in [-100, 100]; standard deviation of their noise before truncation
_START_DEVIATION = 2**0.5
_DISCOUNT = 0.9
_RATES = ("vat_1", "vat_2", "vat_3", "tau")


class TaxLeader(TabularLeader):
    """Sets three VAT rates, which move rewards, and the income tax tau, which moves transitions; all move welfare.

    The follower's temperature is needed only where an action is a level of consumption: its reward is then the soft
    maximum over the baskets of that level, and the leader's utility the mean over them under their Boltzmann law.

    Attributes:
        logits: the parameter, [4]; `rates` are 2 sigmoid(logits).
        assets: [S], the grid, from -100 to 100.
        hours, consumption: [A], hours of work and total quantity consumed of every action.
    """

    assets: Tensor
    initial: Tensor
    hours: Tensor
    consumption: Tensor
    _baskets: Tensor
    _preferences: Tensor
    _appeal: Tensor
    _members: Tensor
    _present: Tensor

    def __init__(self, rates: Tensor, *, temperature: float, grid: int, joint: bool) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.special.logit(rates / 2))
        self._temperature = temperature

        assets = torch.linspace(-_LIMIT, _LIMIT, grid, dtype=torch.float64)
        weight = torch.ones_like(assets)  # of the trapezoidal rule
        weight[[0, -1]] = 0.5
        initial = weight * torch.exp(-0.5 * (assets / _START_DEVIATION) ** 2)
        self.register_buffer("assets", assets)
        self.register_buffer("initial", (initial / initial.sum()).expand(len(_PREFERENCES), -1).contiguous())

        counts = torch.tensor(list(itertools.product(range(len(_QUANTITIES)), repeat=3)))  # [N, 3]
        baskets = torch.tensor(_QUANTITIES, dtype=torch.float64)[counts]
        preferences = torch.tensor(_PREFERENCES, dtype=torch.float64)
        choice = torch.arange(len(counts)) if joint else counts.sum(-1)  # the choice that each basket belongs to
        choices = int(choice.max()) + 1
        of_choice = [(choice == i).nonzero()[:, 0] for i in range(choices)]
        members = nn.utils.rnn.pad_sequence(of_choice, batch_first=True)  # [L, K]
        present = nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in of_choice], batch_first=True).bool()
        hours = torch.tensor(_HOURS, dtype=torch.float64)
        self.register_buffer("_baskets", baskets)
        self.register_buffer("_preferences", preferences)
        self.register_buffer("_appeal", (baskets ** preferences[:, None]).prod(-1))  # [C, N], the reward at no VAT
        self.register_buffer("_members", members)
        self.register_buffer("_present", present)
        self.register_buffer("hours", hours.repeat_interleave(choices))
        self.register_buffer("consumption", baskets.sum(-1)[members[:, 0]].repeat(len(hours)))

    @property
    def rates(self) -> Tensor:
        """vat_1, vat_2, vat_3 and tau, [4], each in (0, 2)."""
        return 2 * torch.sigmoid(self.logits)

    def tables(self) -> Tables:
        """Reward U(s; 1) - 0.1 h^2 + utility of consumption; entropy regularisation; one law P for all contexts."""
        saving = (1 - self.rates[3]) * self.hours - self.consumption
        goods = self._temperature * torch.logsumexp(self._composition(), -1)  # [C, L]
        labour = 0.1 * torch.tensor(_HOURS, dtype=goods.dtype)[:, None] ** 2
        reward = _asset_utility(self.assets, 1.0)[:, None] + (goods[:, None] - labour).flatten(1)[:, None]
        return Tables(reward, LineTransition(self.assets, saving, _NOISE), self.initial)

    def welfare(self) -> Tensor:
        """The leader's utility u_x, [C, S, A]: U(s; 0) + 15 mean_i(c_i / (1 + vat_i)) / 5 + 5 log(1 + revenue)."""
        vat, tau = self.rates[:3], self.rates[3]
        net = self._baskets / (1 + vat)  # [N, 3]
        wages = torch.tensor(_HOURS, dtype=net.dtype)[:, None]
        revenue = (net * vat).sum(-1) + tau * wages  # [H, N]
        welfare = 3 * net.mean(-1) + 5 * torch.log1p(revenue)
        mean = torch.einsum("clk,hlk->chl", torch.softmax(self._composition(), -1), welfare[:, self._members])
        return _asset_utility(self.assets, 0.0)[:, None] + mean.flatten(1)[:, None]

    def consumed(self) -> Tensor:
        """The mean quantity of each good in every action, [C, A, 3]."""
        law = torch.softmax(self._composition(), -1)
        goods = torch.einsum("clk,lkg->clg", law, self._baskets[self._members])
        return goods.repeat(1, len(_HOURS), 1)

    def _composition(self) -> Tensor:
        """prod_i (c_i / (1 + vat_i))^pref_i / lambda of the baskets of every choice, [C, L, K]; -inf is padding."""
        net = self._appeal * torch.exp(-(self._preferences @ torch.log1p(self.rates[:3])))[:, None]  # [C, N]
        return (net[:, self._members] / self._temperature).masked_fill(~self._present, -torch.inf)


def _asset_utility(assets: Tensor, factor: float) -> Tensor:
    """U(s; k) = k log(1 + s / 20) for s > 0 and s otherwise, [S], with the Euler-Maclaurin correction of its kink.

    Across a kink at a node the trapezoidal rule is off by step^2 / 12 times the jump of the slope, whatever smooth
    density it is weighted with. A value less by step / 12 times the jump at that node takes this term away.
    """
    utility = torch.where(assets > 0, factor * torch.log1p(assets.clamp(min=0) / 20), assets)
    jump = 1 - factor / 20  # the slope below zero less the slope above
    return utility - jump * (assets[1] - assets[0]) / 12 * (assets == 0)


@checked
def tax_design(
    temperature: float = 0.1,
    *,
    grid: Count = 201,
    rates: Sequence[float] = (0.3, 0.3, 0.3, 0.3),
    joint: bool = False,
    horizon: Count | None = None,
) -> Problem:
    """The published problem on a grid of assets: social welfare under the taxes to which two households respond.

    Two households (contexts) with preferences (0.6, 0.3, 0.1) and (0.1, 0.7, 0.2), equally likely. Actions: 10 hours
    of work x 13 levels of total consumption; the composition of a level is integrated out (docs/tax_design.md), so
    that J and its gradient are those of the 1,250 joint actions. Regularisation is by entropy; gamma = gammaF = 0.9;
    episodes never end.

    Args:
        temperature: lambda; published: 0.1, 0.2, 0.3.
        grid: number of assets, odd, so that the kink of U at zero is a node. P holds grid x 130 x grid numbers.
        rates: initial vat_1, vat_2, vat_3 and tau, each in (0, 2); published: 0.3.
        joint: keep all 1,250 joint actions, to compare with.
        horizon: longest sampled path; by default 0.9^T <= 1e-3. Published: 200.

    Raises:
        InputError: a temperature that is not positive, a grid that is even or below 3, rates out of range.

    Example:
        >>> from toy_cmdp.referee.exact import leader_value
        >>> round(leader_value(tax_design(temperature=0.3, grid=41)).item(), 1)
        35.3
    """
    check_temperature("temperature", temperature)
    if grid < 3 or grid % 2 == 0:
        raise InputError(f"grid: expected an odd number of assets >= 3, so that zero is one of them, got {grid}")
    check_size(len(_PREFERENCES) * grid * len(_HOURS) * (len(_QUANTITIES) ** 3 if joint else 13), grid=grid)
    start = torch.tensor(list(rates), dtype=torch.float64)
    if start.shape != (len(_RATES),) or not bool(((start > 0) & (start < 2)).all()):
        raise InputError(f"rates: expected {', '.join(_RATES)}, each in (0, 2), got {list(rates)}")
    leader = TaxLeader(start, temperature=temperature, grid=grid, joint=joint)

    def utility(leader: TabularLeader) -> Tensor:
        assert isinstance(leader, TaxLeader)
        return leader.welfare()

    contexts = len(_PREFERENCES)
    cmdp = ContextualMDP(
        context_probabilities=torch.full((contexts,), 1 / contexts, dtype=torch.float64),
        terminal=torch.zeros(contexts, grid, dtype=torch.bool),
        context_names=[f"preferences {one}" for one in _PREFERENCES],
        state_names=[f"assets {one:g}" for one in leader.assets.tolist()],
        action_names=[
            f"hours {h:g}, consumption {c:g}"
            for h, c in zip(leader.hours.tolist(), leader.consumption.tolist(), strict=True)
        ],
    )
    objective = ExpectedUtility(TabularUtility(utility), discount=_DISCOUNT, depends_on_leader=True)
    return Problem(leader, objective, ExactFollower(cmdp, temperature, _DISCOUNT, horizon=horizon))
