"""`NeuralSoftQFollower`: a follower trained by deep soft Q-learning on sampled transitions only."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, Discount, Positive, Probability, Range, Whole, checked
from align_cbrl.errors import InputError, first_line
from align_cbrl.problem import Leader, step_seed, temperature_of
from toy_cmdp.followers.exact import TabularFollower
from toy_cmdp.followers.solve import soft_logits
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, require_tabular
from toy_cmdp.tables.sparse import SparseTransition


@checked
class NeuralSoftQFollower(TabularFollower):
    """A stand-in for somebody else's deep RL: soft Q-learning with a target network, observed through its paths only.

    One network Q(c, s, .) of all actions serves all contexts. `environments` walkers act by the policy, one step an
    update. In the state where a walker stands, a simulator is asked for the rewards of `tries` actions and for `draws`
    next states of each; Adam then takes one step on the squared error of

        Q(c, s, a)  against  r + gamma mean V(c, s'),  V = lambda log sum_a prior(a|s) exp(Q_target(c, s, a) / lambda),

    with V = 0 after an action in a terminal state. The target network is a moving average of the trained one, and it
    is the policy that acts and is observed: averaging removes most of the noise of a constant learning rate. A walker
    starts afresh with probability 1 - gamma, so that states are met as often as they matter to the follower.

    Nothing else of the leader's tables is used: sampled rewards, next states and starts, and the follower's own prior.
    Between outer steps networks, optimizer and walkers are kept (a warm start).

    Args:
        cmdp: nature and the ends of episodes.
        temperature: lambda > 0; a tensor [C] where it depends on the context.
        discount: gamma in [0, 1); likewise.
        features: [C, S, F], what the network sees of a state, of order one; by default which one it is (one-hot). The
            context is always seen.
        action_features: [A, G], what it sees of an action. What is learned of an action is then learned of those
            like it as well; by default each action has weights of its own only.
        updates: gradient steps of one `respond`.
        first_updates: those of the first one, which starts from nothing; `updates` by default.
        environments: walkers.
        tries: actions tried in the state of each walker; the first, by which it goes on, is the policy's, the others
            are drawn from its power 1 / heat, the policy at `heat` times the temperature.
        draws: next states drawn for each action tried.
        heat: see `tries`; at least 1. An action that the policy has dismissed too early is found again.
        exploration: share of the actions, and of the fresh starts, that are drawn uniformly, in [0, 1].
        hidden: width of the two hidden layers.
        learning_rate: Adam's.
        target_rate: the share of the trained network that enters the average at each update.
        horizon, leader_discount: of the rollouts, as for `ExactFollower`.
        seed: of the network's initial weights and of all that is sampled in training.

    Raises:
        InputError: an argument out of range, or features of another shape.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> follower = NeuralSoftQFollower(problem.follower.cmdp, 0.5, 0.9, updates=5)
        >>> sorted(follower.respond(problem.leader, torch.arange(2)))
        ['bellman_error', 'updates']
        >>> follower.rollout(torch.tensor([0, 1]), 4, torch.Generator().manual_seed(0)).size
        8
    """

    def __init__(
        self,
        cmdp: ContextualMDP,
        temperature: float | Tensor,
        discount: float | Tensor,
        features: Tensor | None = None,
        *,
        action_features: Tensor | None = None,
        updates: Count = 200,
        first_updates: Count | None = None,
        environments: Count = 256,
        tries: Count = 16,
        draws: Count = 8,
        heat: Annotated[float, Range(1)] = 10.0,
        exploration: Probability = 0.1,
        hidden: Count = 64,
        learning_rate: Positive = 3e-3,
        target_rate: Annotated[float, Range(0, 1, open="low")] = 0.03,
        horizon: Count | None = None,
        leader_discount: Discount = 0.0,
        seed: Whole = 0,
    ) -> None:
        super().__init__(cmdp, temperature, discount, horizon=horizon, leader_discount=leader_discount)
        self._warmth = self.temperature  # or the leader's, where it sets one
        first_updates = updates if first_updates is None else first_updates
        if features is not None and (features.ndim != 3 or tuple(features.shape[:2]) != (cmdp.contexts, cmdp.states)):
            raise InputError(
                f"features: expected shape ({cmdp.contexts}, {cmdp.states}, F) (contexts, states, features), "
                f"got {tuple(features.shape)}"
            )
        if action_features is not None and action_features.ndim != 2:
            raise InputError(f"action_features: expected shape (actions, features), got {tuple(action_features.shape)}")
        for name, given in (("features", features), ("action_features", action_features)):
            if given is not None and not torch.isfinite(given).all():
                raise InputError(f"{name}: expected finite numbers, got NaN or infinity; check how they were made")
        self.updates, self.first_updates = updates, first_updates
        self.environments, self.tries, self.draws = environments, tries, draws
        self.hidden, self.learning_rate, self.target_rate = hidden, learning_rate, target_rate
        self.heat, self.exploration, self.seed = heat, exploration, seed
        self._inputs = _network_inputs(cmdp, features)  # [C * S, F]
        self._action_features = None if action_features is None else action_features.float()
        self._learner: _Learner | None = None
        self._responses = 0

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """Train on freshly sampled transitions of all contexts.

        Metrics: `updates`, and `bellman_error`, the root mean squared error of Q against its sampled targets over this
        call (it does not vanish: targets are noisy).

        Raises:
            InputError: a leader without tables, invalid tables, or action features of another number of actions.
        """
        with torch.no_grad():
            tables = require_tabular(leader).tables().detach()
            self._warmth = temperature_of(leader, self)
        self.cmdp.check(tables)
        actions = tables.reward.shape[-1]
        if self._learner is None:
            self._learner = self._new_learner(actions)
        updates = self.updates if self._responses else self.first_updates
        generator = torch.Generator().manual_seed(step_seed(self.seed, self._responses))
        error = self._train(tables, updates, generator)
        self._responses += 1
        self._show(tables, self._log_policy(tables))
        return {"updates": float(updates), "bellman_error": error}

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizer, walkers and the number of responses so far."""
        learner = self._learner
        if learner is None:
            return {"responses": 0}
        return {
            "responses": self._responses,
            "actions": learner.network.actions,
            "network": {name: value.clone() for name, value in learner.network.state_dict().items()},
            "target": {name: value.clone() for name, value in learner.target.state_dict().items()},
            "optimizer": copy.deepcopy(learner.optimizer.state_dict()),
            "walkers": learner.walkers.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; `respond` has to be called before the next `rollout`.

        Raises:
            InputError: the state of a follower with other networks.
        """
        learner = None
        if state["responses"]:
            learner = self._new_learner(state["actions"])
            try:
                learner.network.load_state_dict(state["network"])
                learner.target.load_state_dict(state["target"])
            except RuntimeError as error:
                raise InputError(
                    f"state: its network does not fit ({first_line(error)}); it belongs to another follower"
                ) from error
            learner.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            learner.walkers = state["walkers"].clone()
        self._learner, self._sampler, self._responses = learner, None, state["responses"]

    def _new_learner(self, actions: int) -> _Learner:
        given = self._action_features
        if given is not None and len(given) != actions:
            raise InputError(
                f"action_features: expected a row for each of the leader's {actions} actions, got {len(given)}"
            )
        generator = torch.Generator().manual_seed(step_seed(self.seed, -1))
        network = _QNetwork(self._inputs.shape[1], actions, self.hidden, given, generator)
        walkers = torch.empty(0, dtype=torch.long)  # they start with the first response
        return _Learner(network, self.learning_rate, walkers)

    def _train(self, tables: Tables, updates: int, generator: torch.Generator) -> float:
        """Steps of all walkers, and as many gradient steps; the root mean squared Bellman error."""
        learner = self._learner
        assert learner is not None
        world = _Simulator(self.cmdp, tables, self._warmth, self.discount)
        squares = 0.0
        context = torch.arange(self.environments) % self.cmdp.contexts
        state = learner.walkers if len(learner.walkers) else world.start(context, self.exploration, generator)
        everywhere = torch.arange(len(self._inputs))
        for _ in range(updates):
            cell = context * self.cmdp.states + state
            with torch.no_grad():
                logits = world.logits(everywhere, learner.q(self._inputs))
                soft_value = world.temperature[everywhere // self.cmdp.states] * torch.logsumexp(logits, -1)  # [C S]
                action = world.act(logits[cell], self.tries, self.heat, self.exploration, generator)  # [E, M]
                reward, outcomes, over = world.step(cell, action, self.draws, generator)  # [E, M], [E, M, K], [E]
                following = outcomes[:, 0, 0]
                ahead = soft_value[context[:, None, None] * self.cmdp.states + outcomes].mean(-1)
                target = reward + torch.where(over, 0.0, world.discount[context])[:, None] * ahead
            squares += learner.update(self._inputs[cell], action, target, self.target_rate)
            fresh = over | (torch.rand(len(state), generator=generator) >= world.discount[context])
            state = torch.where(fresh, world.start(context, self.exploration, generator), following)
        learner.walkers = state
        return float((squares / updates) ** 0.5)

    def _log_policy(self, tables: Tables) -> Tensor:
        """The observed policy at every state, [C, S, A], in the dtype of the tables."""
        assert self._learner is not None
        c, s, a = tables.reward.shape
        with torch.no_grad():
            q = self._learner.q(self._inputs).to(tables.reward.dtype).view(c, s, a)
        return torch.log_softmax(soft_logits(q, tables.log_prior, self._warmth), -1)


class _QNetwork(nn.Module):
    """Q of all actions, [B, F] to [B, A]: a value and, beside it, advantages."""

    def __init__(
        self, width: int, actions: int, hidden: int, action_features: Tensor | None, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.value = nn.Linear(hidden, 1)
        self.actions = actions
        self.action_features = action_features
        if action_features is None:
            self.advantage: nn.Module = nn.Linear(hidden, actions)
        else:
            self.advantage = nn.Sequential(
                nn.Linear(action_features.shape[1], hidden), nn.SiLU(), nn.Linear(hidden, hidden)
            )
            self.own = nn.Parameter(torch.zeros(actions, hidden))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):  # the usual range, from this generator
                bound = layer.in_features**-0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.zeros_(layer.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        seen = self.trunk(inputs)  # [B, H]
        if self.action_features is None:
            advantage = self.advantage(seen)
        else:
            advantage = seen @ (self.advantage(self.action_features) + self.own).T
        return self.value(seen) + advantage


class _Learner:
    """Networks, optimizer and walkers: all that is kept from one response to the next."""

    def __init__(self, network: _QNetwork, learning_rate: float, walkers: Tensor) -> None:
        self.network = network
        self.target = copy.deepcopy(network).requires_grad_(False)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
        self.walkers = walkers  # long [E], the states where they stand

    def q(self, inputs: Tensor) -> Tensor:
        """Q of the target network, [N, F] to [N, A]."""
        out: Tensor = self.target(inputs)
        return out

    def update(self, inputs: Tensor, action: Tensor, target: Tensor, target_rate: float) -> float:
        """A gradient step on inputs [E, F], actions and targets [E, M]; the mean squared error before it."""
        chosen = self.network(inputs).gather(-1, action)
        loss = (chosen - target.to(chosen.dtype)).pow(2).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.network.parameters()), target_rate)
        return float(loss.detach())


class _Simulator:
    """The leader's present world as a training procedure meets it: starts, and one step at a time."""

    def __init__(
        self, cmdp: ContextualMDP, tables: Tables, temperature: float | Tensor, discount: float | Tensor
    ) -> None:
        self._tables, self._cmdp = tables, cmdp
        self._reward = tables.reward.reshape(-1, tables.reward.shape[-1])  # [C S, A]
        self._log_prior = None if tables.log_prior is None else tables.log_prior.reshape(self._reward.shape).float()
        self._terminal = cmdp.terminal.reshape(-1)
        self.temperature = torch.as_tensor(temperature, dtype=torch.float32).expand(cmdp.contexts)
        self.discount = torch.as_tensor(discount, dtype=torch.float32).expand(cmdp.contexts)

    def logits(self, cell: Tensor, q: Tensor) -> Tensor:
        """log prior + Q / lambda of all actions, [E, A]."""
        scaled = q / self.temperature[cell // self._cmdp.states, None]
        return scaled if self._log_prior is None else self._log_prior[cell] + scaled

    def start(self, context: Tensor, exploration: float, generator: torch.Generator) -> Tensor:
        """First states by rho, the share `exploration` of them uniform over states, long [E]."""
        first = _choose(self._tables.initial[context], 1, generator)[:, 0]
        anywhere = torch.randint(self._cmdp.states, context.shape, generator=generator)
        return torch.where(torch.rand(context.shape, generator=generator) < exploration, anywhere, first)

    def act(self, logits: Tensor, tries: int, heat: float, exploration: float, generator: torch.Generator) -> Tensor:
        """Actions by the policy (the first) and by its power 1 / heat, a share of them uniform, long [E, M]."""
        first = _choose(torch.softmax(logits, -1), 1, generator)
        others = _choose(torch.softmax(logits / heat, -1), tries - 1, generator)
        chosen = torch.cat([first, others], -1)
        anything = torch.randint(logits.shape[-1], chosen.shape, generator=generator)
        return torch.where(torch.rand(chosen.shape, generator=generator) < exploration, anything, chosen)

    def step(
        self, cell: Tensor, action: Tensor, draws: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reward [E, M], next states, long [E, M, K], and whether the episode is over, bool [E]."""
        reward = self._reward[cell[:, None], action].float()
        context, state = (cell // self._cmdp.states)[:, None], (cell % self._cmdp.states)[:, None]
        transition = self._tables.transition
        if isinstance(transition, SparseTransition):
            place = _choose(self._rows(transition.probability, context, state, action), draws, generator)
            outcomes = transition.successor[state, action].gather(-1, place)
        else:
            outcomes = _choose(self._rows(transition, context, state, action), draws, generator)
        return reward, outcomes, self._terminal[cell]

    def _rows(self, law: Tensor, context: Tensor, state: Tensor, action: Tensor) -> Tensor:
        return law[context if len(law) > 1 else 0, state, action]  # [E, M, S], or [E, M, K]


def _choose(law: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Outcomes drawn from each row of probabilities, by inversion: [E, N] to long [E, draws]."""
    cumulative = law.cumsum(-1)
    uniform = torch.rand(*law.shape[:-1], draws, generator=generator, dtype=law.dtype) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, uniform, right=True).clamp(max=law.shape[-1] - 1)


def _network_inputs(cmdp: ContextualMDP, features: Tensor | None) -> Tensor:
    """What the network sees of each state of each context, float32 [C S, F + C]: features and the context one-hot."""
    c, s = cmdp.contexts, cmdp.states
    seen = torch.eye(s).expand(c, s, s) if features is None else features.float()
    which = torch.eye(c)[:, None].expand(c, s, c)
    return torch.cat([seen, which], -1).reshape(c * s, -1)
