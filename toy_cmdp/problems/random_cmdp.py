"""Random CMDPs in which one parameter vector moves rewards, transitions, initial law, prior and utility together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, Discount, NonNegative, Whole, checked
from align_cbrl.objectives import ExpectedUtility, KLPriced
from align_cbrl.problem import Objective, Problem
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.tables.arguments import check_size
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility


class RandomLeader(TabularLeader):
    """Every table is a smooth function of base + sum_i x_i direction_i, its entries drawn from N(0, 1).

    Attributes:
        x: the parameter, [n].
    """

    def __init__(self, x: Tensor, shapes: dict[str, tuple[int, ...]], support: dict[str, Tensor], seed: int) -> None:
        super().__init__()
        self.x = nn.Parameter(x)
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            base = torch.randn(shape, generator=generator, dtype=torch.float64)
            if name in support:
                base = base.masked_fill(~support[name], -torch.inf)
            self.register_buffer(f"{name}_base", base)
            directions = torch.randn(*shape, len(x), generator=generator, dtype=torch.float64)
            self.register_buffer(f"{name}_directions", directions / len(x) ** 0.5)

    def _field(self, name: str) -> Tensor:
        base, directions = self.get_buffer(f"{name}_base"), self.get_buffer(f"{name}_directions")
        return base + directions @ self.x

    def utility(self) -> Tensor:
        """The leader's u_x, [C, S, A]."""
        return torch.tanh(self._field("utility"))

    def tables(self) -> Tables:
        """Rewards in (-1, 1), laws by softmax."""
        return Tables(
            reward=torch.tanh(self._field("reward")),
            transition=torch.softmax(self._field("transition"), -1),
            initial=torch.softmax(self._field("initial"), -1),
            log_prior=torch.log_softmax(self._field("prior"), -1),
        )


@checked
def random_cmdp(
    *,
    contexts: Count = 2,
    states: Count = 4,
    actions: Count = 3,
    parameters: Count = 5,
    temperature: float = 0.5,
    discount: float = 0.9,
    leader_discount: Discount = 0.8,
    price: NonNegative = 0.0,
    seed: Whole = 0,
    horizon: Count | None = None,
) -> Problem:
    """A random problem in which x moves r, P, rho, the prior and u together.

    Args:
        contexts: C.
        states: S, or the size of a layer.
        actions: A.
        parameters: the size of x.
        temperature: lambda.
        discount: the follower's gamma.
        leader_discount: the leader's gammaF.
        price: of the divergence from the prior; above zero the objective is `KLPriced`.
        seed: of everything.
        horizon: if given, the states form that many layers of `states` each, a path visits one state of each and
            ends in the last layer, so that `enumerate_paths(problem, horizon)` is complete.

    Raises:
        InputError: a size below one, or a temperature, discount or price out of range.

    Example:
        >>> random_cmdp(seed=3).leader.x.shape
        torch.Size([5])
    """
    layers = 1 if horizon is None else horizon
    total = states * layers
    sizes = {"contexts": contexts, "states": states, "actions": actions, "parameters": parameters, "horizon": layers}
    check_size(contexts * total**2 * actions * (1 + parameters), **sizes)
    layer = torch.arange(total) // states
    support = {}
    terminal = torch.zeros(contexts, total, dtype=torch.bool)
    if horizon is not None:
        following = (layer[:, None] + 1).clamp(max=layers - 1) == layer  # [S, S]; the last layer's rows are unused
        support = {
            "initial": (layer == 0).expand(contexts, total),
            "transition": following[None, :, None, :].expand(contexts, total, actions, total),
        }
        terminal[:, layer == layers - 1] = True

    generator = torch.Generator().manual_seed(seed + 1_000_003)
    x = torch.randn(parameters, generator=generator, dtype=torch.float64)
    nature = torch.softmax(torch.randn(contexts, generator=generator, dtype=torch.float64), 0)
    table = (contexts, total, actions)
    shapes = {
        "reward": table,
        "transition": (*table, total),
        "initial": (contexts, total),
        "prior": table,
        "utility": table,
    }

    def utility(leader: TabularLeader) -> Tensor:
        assert isinstance(leader, RandomLeader)
        return leader.utility()

    objective: Objective = ExpectedUtility(TabularUtility(utility), discount=leader_discount, depends_on_leader=True)
    if price != 0:
        objective = KLPriced(objective, price)
    follower = ExactFollower(
        ContextualMDP(nature, terminal), temperature, discount, horizon=horizon, leader_discount=leader_discount
    )
    return Problem(RandomLeader(x, shapes, support, seed), objective, follower)
