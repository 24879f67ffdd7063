"""`PlugIn`: fit the unknown transitions on the paths, then take the exact expectation of PolicyResponse in the model.

Axes: C contexts, S states, A actions, K = 1 or C fitted transition tables; B paths of T steps; D directions of n
parameters.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import NonNegative, Positive, checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import Hypergradient, accumulate
from align_cbrl.estimators.metric import MatrixMetric, Metric
from align_cbrl.problem import Problem, Term, require_fixed_temperature
from align_cbrl.rollouts import Rollouts
from toy_cmdp.followers.solve import by_context, continuation, soft_logits
from toy_cmdp.referee.metric import metric_of_policy
from toy_cmdp.referee.tabulated import linearised, tabulated_terms
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, require_tabular
from toy_cmdp.tables.sparse import SparseTransition
from toy_cmdp.tables.transition import expected_next, policy_system, pushed

_Z95 = 1.959963984540054
_SWEEPS = 2  # soft policy iterations for the policy in states that a context's paths never met
_THIN, _THIN_SHARE = 5, 0.3
_PROBES = 4


class TransitionMemory:
    """Transitions seen in earlier outer steps. They stay valid while the leader does not move the transitions.

    The follower's policy changes from step to step, but P(s' | s, a) does not: earlier transitions need no importance
    weights. Each `PlugIn` has one of its own, to which `backward` adds its rollouts; hand one over to share it between
    estimators of the same world.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> TransitionMemory().steps
        0
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self._law: Tensor | None = None  # which world they are of; a resumed run takes the first that it meets
        self._latest: weakref.ref[Tensor] | None = None  # states of the batch that was kept last

    def with_counts(self, counts: Tensor, states: Tensor, law: Tensor) -> Tensor:
        """`counts` and those that are held, [K, S, A, S]; a batch that was kept just now is not counted twice.

        Args:
            counts: of a batch.
            states: the tensor of its states, by which a batch is recognised.
            law: the table P of that shape that its transitions follow.

        Raises:
            InputError: what is held was counted under another law, or the leader moves the law.
        """
        if self.counts is None:
            return counts
        if law.requires_grad:
            raise InputError(
                "PlugIn.memory: the leader moves the transitions, so earlier ones say nothing of the present; drop it"
            )
        if self.counts.shape != counts.shape:
            raise InputError(f"PlugIn.memory: expected counts {tuple(counts.shape)}, got {tuple(self.counts.shape)}")
        if self._law is not None and not torch.equal(self._law, law):
            raise InputError(
                "PlugIn.memory: it holds transitions of another world: P was another table when they were counted; "
                "make one PlugIn for each problem, or pass memory=None"
            )
        return self.counts if self._latest is not None and self._latest() is states else counts + self.counts

    def keep(self, counts: Tensor, states: Tensor, law: Tensor) -> None:
        """Hold the counts that `with_counts` made in place of the earlier ones."""
        self.counts, self._latest, self._law = counts, weakref.ref(states), law.clone()

    @property
    def steps(self) -> int:
        """Number of transitions held."""
        return 0 if self.counts is None else int(self.counts.sum())

    def state_dict(self) -> dict[str, Any]:
        """The counts, [K, S, A, S] or None: what a resumed run needs."""
        return {"counts": None if self.counts is None else self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.counts = None if state["counts"] is None else state["counts"].clone()
        self._law = self._latest = None


@dataclasses.dataclass(frozen=True)
class Projection:
    """The hypergradient along given directions, with what is known of its error.

    Attributes:
        estimate: [D], <g, direction>.
        standard_error: [D]; NaN for all directions where the paths are too few to tell (see `PlugIn.project`).
        lower, upper: [D], a 95 % interval, NaN likewise.
    """

    estimate: Tensor
    standard_error: Tensor

    @property
    def lower(self) -> Tensor:
        """[D]."""
        return self.estimate - _Z95 * self.standard_error

    @property
    def upper(self) -> Tensor:
        """[D]."""
        return self.estimate + _Z95 * self.standard_error


@dataclasses.dataclass(frozen=True)
class FittedModel:
    """What the paths told about the world.

    Attributes:
        transition: [K, S, A, S], rows are laws.
        spread: [K, S, A, S], the law by which the variance of a row is judged: the row itself, but all that was
            reached anywhere in states whose outcome was never seen. A guess must not count as knowledge.
        visits: [K, S, A], transitions seen; infinity where the leader's own table was used.
        log_policy: [C, S, A]: the follower's in states that were met, the model's best response elsewhere.
        initial: [C, S].
        starts: [C], paths of each context; infinity where the leader's own table was used.
        nature: [C], the law of contexts over those that were drawn.
    """

    transition: Tensor
    spread: Tensor
    visits: Tensor
    log_policy: Tensor
    initial: Tensor
    starts: Tensor
    nature: Tensor


@checked
@dataclasses.dataclass(frozen=True)
class PlugIn(Hypergradient):
    """The hypergradient of a model fitted on the paths' transitions, exact in that model.

    The leader knows its own rewards and utility in every state, nature's law and where episodes end, and sees the
    follower's action probabilities in the states that were visited. Only P and rho are unknown (P and rho that the
    leader moves are its own tables, hence known). With

        P_hat(s' | s, a) = (N(s, a, s') + strength * Pbar(s' | s)) / (N(s, a) + strength),

    Pbar the same average over all actions of s, itself with one pseudo-transition back to where paths came to s from,
    the estimate is the exact expectation of `PolicyResponse` (docs/derivation.md; `toy_cmdp.expected_policy_response`)
    over all paths of the *observed* policy in the model. It is consistent, and averages over actions, paths and time in
    closed form; its bias at few paths comes from rows that were hardly seen, which the shrinkage makes look like their
    neighbours. Transitions of all contexts are counted together where the leader's table says that they share P:
    [1, S, A, S].

    What actions that the follower hardly takes lead to is not in one batch, though at low temperatures the response is
    made of them: an ascent needs the transitions of earlier steps, which are remembered by default. And states in which
    nobody ever acted lead back where paths came from: were they shrunk towards staying, the model would hold traps that
    the world does not have, and an ascent would find them.

    Attributes:
        cmdp: nature and the ends of episodes.
        strength: number of pseudo-transitions in each row, > 0.
        shrinkage: weight of noise in the advantages: A_F is multiplied by A_F^2 / (A_F^2 + shrinkage v), v the variance
            of A_F that its own row's visits explain, and centred again. Small advantages of rarely seen actions are
            mostly noise, so that 1 pays for a small batch on its own. 0 leaves them: along an ascent, with memory, what
            is shrunk is the way out of a plateau.
        damping: the gradient is multiplied by max(0, 1 - damping v / |gradient|^2), v the trace of its variance (as in
            `project`, along 4 random directions): where noise drowns it, a part of the step is closer to the truth than
            the whole (James and Stein), such as 0.5 for a small batch on its own. 0 leaves it, and saves the time of
            measuring noise.
        memory: transitions of earlier outer steps to count in; by default those that this estimator was given. It stays
            empty where the leader moves the transitions, and therefore knows them. None: each batch on its own.

    Raises:
        InputError: a strength that is not positive, a negative shrinkage or damping; a leader or objective without
            tables, or with sparse ones; rollouts that lack states, actions or "log_policy_all"; a memory of another
            problem, or with a leader that moves the transitions; a leader on whose parameters nothing depends.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> _ = problem.follower.respond(problem.leader, torch.tensor([0, 1]))
        >>> rollouts = problem.follower.rollout(torch.tensor([0, 1]), 8, torch.Generator().manual_seed(0))
        >>> sorted(PlugIn(problem.follower.cmdp).backward(problem, rollouts))
        ['gradient_norm', 'objective']
    """

    cmdp: ContextualMDP
    strength: Positive = 1.0
    shrinkage: NonNegative = 0.0
    damping: NonNegative = 0.0
    memory: TransitionMemory | None = dataclasses.field(default_factory=TransitionMemory)

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """Add the estimate to `.grad`; `objective` is the model's J."""
        return self.backward_with_values(problem, rollouts)[0]

    def backward_with_values(self, problem: Problem, rollouts: Rollouts) -> tuple[dict[str, float], Tensor]:
        """As `backward`, and what the leader gets from each context in the model, [C], without graph.

        The contexts' values are f_c = rho . V_F of the observed policy; `objective` is what the problem's objective
        makes of them. They cost nothing beyond the gradient. All of them come from one model, whose errors they share,
        so that they compare leaders of a `parallel` problem far better than as many sampled returns do. A context that
        was not drawn has the value 0, unless the leader knows where its paths start.

        Example:
            >>> from toy_cmdp import random_cmdp
            >>> from toy_cmdp.referee.exact import context_values
            >>> problem = random_cmdp()  # its leader moves all tables, and knows them: the model is the world
            >>> contexts = torch.tensor([0, 1])
            >>> _ = problem.follower.respond(problem.leader, contexts)
            >>> rollouts = problem.follower.rollout(contexts, 8, torch.Generator().manual_seed(0))
            >>> _, values = PlugIn(problem.follower.cmdp).backward_with_values(problem, rollouts)
            >>> torch.allclose(values, context_values(problem))
            True
        """
        discount, temperature = problem.follower.discount, require_fixed_temperature(problem, "PlugIn")
        tables = _dense(problem)
        transition, counts = tables.transition, self._counts(tables, rollouts)
        assert isinstance(transition, Tensor)
        model, world, utility = self._model(problem, tables, rollouts, counts, self.shrinkage)
        go_on = continuation(self.cmdp, discount, utility)
        go_on_leader = continuation(self.cmdp, problem.objective.discount, utility)
        weight = world.eta / by_context(temperature, utility)
        direct = (world.mu * utility).sum((-1, -2))  # [C]
        response = (weight * tables.reward).sum((-1, -2))
        if transition.requires_grad:
            next_leader, next_soft = expected_next(transition, world.value), expected_next(transition, world.soft_value)
            moved = go_on_leader * world.mu * next_leader + go_on * weight * next_soft
            response = response + moved.sum((-1, -2))
        if tables.initial.requires_grad:
            response = response + (tables.initial * world.value).sum(-1)
        if tables.log_prior is not None and tables.log_prior.requires_grad:
            response = response + (world.eta * tables.log_prior).sum((-1, -2))
        if not (direct.requires_grad or response.requires_grad):
            raise InputError(
                f"{type(problem.leader).__name__}: neither its tables nor the utility depend on its parameters, so no "
                "incentive can be learned; compute them with gradients enabled (no torch.no_grad, no .detach())"
            )
        surrogate = (model.nature * (direct + response)).sum()
        gradients = torch.autograd.grad(surrogate, problem.parameters, allow_unused=True, retain_graph=self.damping > 0)
        if self.damping > 0:
            # The whole gradient, not its response alone: at an optimum the two terms cancel, and a damped response
            # would leave the direct term to drive the leader away from it.
            outputs = {"utility": utility, "reward": tables.reward, **_moved(tables)}
            share = self._share(problem, model, world, outputs, gradients)
            gradients = tuple(None if g is None else share * g for g in gradients)
        norm = accumulate(problem, gradients)
        if self.memory is not None and not transition.requires_grad:
            self.memory.keep(counts, rollouts.steps["state"], transition)
        return {"objective": world.objective.item(), "gradient_norm": norm}, world.in_context

    def metric(self, problem: Problem, rollouts: Rollouts) -> Metric:
        """The metric of the observed policy, of which the paths are, in the model that `backward` fits.

        F is `exact_metric` with the fitted P and rho in the place of the world's, at the policy that the paths show:
        its errors are the gradient's own, of the same paths, and it is consistent. Shrinkage and damping, which are the
        gradient's, leave it alone.

        Example:
            >>> from toy_cmdp import exact_metric, random_cmdp
            >>> problem = random_cmdp()  # its leader moves all tables, and knows them: the model is the world
            >>> contexts = torch.tensor([0, 1])
            >>> _ = problem.follower.respond(problem.leader, contexts)
            >>> rollouts = problem.follower.rollout(contexts, 8, torch.Generator().manual_seed(0))
            >>> torch.allclose(PlugIn(problem.follower.cmdp).metric(problem, rollouts).matrix, exact_metric(problem))
            True
        """
        temperature, tables = require_fixed_temperature(problem, "PlugIn"), _dense(problem)
        counts = self._counts(tables, rollouts)
        model, world, _ = self._model(problem, tables, rollouts, counts, shrinkage=0.0)
        go_on = continuation(self.cmdp, problem.follower.discount, tables.reward)
        law = tables.transition if "transition" in _moved(tables) else model.transition
        with torch.enable_grad():
            q = tables.reward + go_on * expected_next(law, world.soft_value)
            logits = soft_logits(q, tables.log_prior, temperature)
        mass = model.nature[:, None, None] * world.mu
        found = metric_of_policy(
            problem, logits, world.soft_value, world.policy, mass, model.transition, world.system, go_on
        )
        return MatrixMetric(found)

    def state_dict(self) -> dict[str, Any]:
        """The memory's, if there is one: HPGD keeps it in its checkpoints."""
        return {} if self.memory is None else self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        if self.memory is not None:
            self.memory.load_state_dict(state)

    def project(self, problem: Problem, rollouts: Rollouts, directions: Tensor) -> Projection:
        """The estimate, without shrinkage and damping, along `directions` [D, n], with standard errors.

        The two make the error smaller and its centre biased; intervals want it the other way round. `.grad` and the
        memory are left alone.

        Delta method. With dots for derivatives along a direction, the estimate is rho . W, where

            W = (I - gammaF P_pi)^{-1} E_pi [ u' + gammaF P' V_F + A_F Q' / lambda ],
            Q' = r' + lambda dlog prior + gamma (P' V_lambda + P V'),   V' = E_pi Q',

        and its derivative in P(s' | s, a) is

            I(s, a, s') = gammaF mu(s, a) W(s') + gammaF zeta(s, a) V_F(s') + (gamma / lambda) eta(s, a) V'(s'),

        with zeta the adjoint of Q_F. Given the visits, rows are independent multinomials, so that the variance is
        sum_{s, a} Var_{s' ~ P_hat}(I) / (N(s, a) + strength), plus Var(W(s_0)) / paths for an unknown rho. It is right
        where the estimate is close to linear in P_hat, and says nothing of the bias. Hence the standard errors are NaN
        unless every context that nature may draw was drawn, and at most 30 % of the variance comes from rows that were
        seen fewer than 5 times (measured in docs/estimators.md). Where nothing is unknown they are zero.

        Args:
            problem: as for `backward`.
            rollouts: as for `backward`.
            directions: [D, n], over all of `problem.parameters`, flattened in order.

        Raises:
            InputError: as `backward`, or directions of another shape.
        """
        size = sum(p.numel() for p in problem.parameters)
        if directions.ndim != 2 or directions.shape[1] != size:
            raise InputError(f"directions: expected shape [D, {size}], got {tuple(directions.shape)}")
        tables = _dense(problem)
        counts = self._counts(tables, rollouts)
        model, world, utility = self._model(problem, tables, rollouts, counts, shrinkage=0.0)
        if not problem.objective.is_mean:
            raise InputError(
                f"objective: standard errors are for expectations over contexts, got {type(problem.objective).__name__}"
            )
        outputs = {"utility": utility, "reward": tables.reward, **_moved(tables)}
        estimates, variances, thin = [], [], []
        for dot in _along(problem, outputs, directions):
            with torch.no_grad():
                estimate, variance, thin_variance = self._linearised(problem, model, world, dot)
            estimates.append(estimate)
            variances.append(variance)
            thin.append(thin_variance)
        variance, share = (
            torch.stack(variances),
            torch.stack(thin).sum() / torch.stack(variances).sum().clamp(min=1e-300),
        )
        told = bool(share <= _THIN_SHARE) and bool(((model.starts > 0) | (self.cmdp.context_probabilities == 0)).all())
        return Projection(torch.stack(estimates), variance.sqrt() if told else torch.full_like(variance, torch.nan))

    def _share(
        self,
        problem: Problem,
        model: FittedModel,
        world: _World,
        outputs: dict[str, Tensor],
        gradients: Sequence[Tensor | None],
    ) -> float:
        """What to keep of the gradient, between 0 and 1."""
        signal = sum(float(g.double().pow(2).sum()) for g in gradients if g is not None)
        if signal == 0:
            return 0.0
        # E over directions d ~ N(0, I) of the variance along d is its trace. Any directions will do, and the same
        # ones at every call let a resumed run repeat itself.
        size = sum(p.numel() for p in problem.parameters)
        directions = torch.randn(_PROBES, size, generator=torch.Generator().manual_seed(0), dtype=world.mu.dtype)
        noise = 0.0
        for dot in _along(problem, outputs, directions):
            with torch.no_grad():
                noise += float(self._linearised(problem, model, world, dot)[1]) / _PROBES
        return max(0.0, 1 - self.damping * noise / signal)

    def _linearised(
        self, problem: Problem, model: FittedModel, world: _World, dot: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Estimate along one direction, its variance, and the part of it that rows seen too rarely make up."""
        pi, transition = world.policy, model.transition
        temperature = by_context(problem.follower.temperature, pi)
        go_on = continuation(self.cmdp, problem.follower.discount, pi)
        go_on_leader = continuation(self.cmdp, problem.objective.discount, pi)
        q_dot, w_source = dot["reward"], dot["utility"]
        if "log_prior" in dot:
            q_dot = q_dot + temperature * dot["log_prior"]
        if "transition" in dot:
            q_dot = q_dot + go_on * expected_next(dot["transition"], world.soft_value)
            w_source = w_source + go_on_leader * expected_next(dot["transition"], world.value)
        v_dot = world.system.solve((pi * q_dot).sum(-1))
        q_dot = q_dot + go_on * expected_next(transition, v_dot)
        w_source = w_source + world.advantage * q_dot / temperature
        w = world.leader_system.solve((pi * w_source).sum(-1))  # [C, S]
        estimate = (model.initial * w).sum(-1)
        if "initial" in dot:
            estimate = estimate + (dot["initial"] * world.value).sum(-1)
        estimate = (model.nature * estimate).sum()

        # zeta: d estimate / d Q_F, whose own source mu (Q' - V') / lambda sums to zero over the actions.
        source = world.keep * world.mu * (q_dot - (pi * q_dot).sum(-1, keepdim=True)) / temperature
        source = source - pi * source.sum(-1, keepdim=True)  # the sums are zero but where advantages are shrunk
        marginal = world.leader_system.solve(pushed(transition, go_on_leader * source), transpose=True)
        zeta = source + pi * marginal[..., None]

        # Influence of P(s' | s, a) as sum_j left_j(s, a) right_j(s'), contexts that share P summed over.
        left = torch.stack([go_on_leader * world.mu, go_on_leader * zeta, go_on * world.eta / temperature])
        left = model.nature[:, None, None] * left  # [3, C, S, A]
        right = torch.stack([w, world.value, v_dot])  # [3, C, S]
        variance = _row_variance(model.spread, left, right) / (model.visits + self.strength)  # [K, S, A]
        total = variance.sum()
        thin = torch.where(model.visits < _THIN, variance, 0.0).sum()
        centred = w - (model.initial * w).sum(-1, keepdim=True)
        of_start = (model.initial * centred**2).sum(-1) / model.starts.clamp(min=1)
        return estimate, total + (model.nature**2 * of_start).sum(), thin

    def _model(
        self, problem: Problem, tables: Tables, rollouts: Rollouts, counts: Tensor, shrinkage: float
    ) -> tuple[FittedModel, _World, Tensor]:
        """The model, what follows from it, and the leader's utility table, which alone carries a graph."""
        with torch.no_grad():
            model = self._fit(problem, tables, rollouts, counts)
        leader = require_tabular(problem.leader)
        terms = tabulated_terms(problem.objective, leader, self.cmdp, model.log_policy, tables)
        with torch.no_grad():
            noise = shrinkage / (model.visits + self.strength)
        world = _World(self.cmdp, problem, model, tables.detach(), terms, noise)
        return model, world, world.utility

    def _counts(self, tables: Tables, rollouts: Rollouts) -> Tensor:
        """N(s, a, s') with the memory's, [K, S, A, S]."""
        assert isinstance(tables.transition, Tensor)
        layers, states, actions, _ = tables.transition.shape
        for name, kind in (("state", "[B, T + 1]"), ("action", "[B, T]"), ("log_policy_all", "[B, T, A]")):
            if name not in rollouts.steps:
                raise InputError(f'rollouts.steps: PlugIn expected "{name}" {kind}, got {sorted(rollouts.steps)}')
        goes_on = rollouts.mask & (rollouts.steps["state"][:, 1:] >= 0)
        layer = torch.zeros_like(rollouts.contexts) if layers == 1 else rollouts.contexts
        row = (layer[:, None] * states + rollouts.steps["state"][:, :-1]) * actions + rollouts.steps["action"]
        flat = (row * states + rollouts.steps["state"][:, 1:])[goes_on]
        shape = (layers, states, actions, states)
        counts = torch.bincount(flat, minlength=math.prod(shape)).view(shape).to(tables.reward.dtype)
        if self.memory is None:
            return counts
        return self.memory.with_counts(counts, rollouts.steps["state"], tables.transition)

    def _fit(self, problem: Problem, tables: Tables, rollouts: Rollouts, counts: Tensor) -> FittedModel:
        moved, tables = _moved(tables), tables.detach()
        assert isinstance(tables.transition, Tensor)
        contexts, states = self.cmdp.contexts, self.cmdp.states
        actions = tables.reward.shape[-1]
        dtype = tables.reward.dtype
        first = rollouts.contexts * states + rollouts.steps["state"][:, 0]
        starts = torch.bincount(first, rollouts.path_weight(), minlength=contexts * states).view(contexts, states)
        starts = starts.to(dtype)
        drawn = starts.sum(1)  # [C]
        initial = starts / drawn.clamp(min=torch.finfo(dtype).tiny)[:, None]
        if "initial" in moved:
            initial, paths = tables.initial, torch.full_like(drawn, torch.inf)
        else:
            paths = torch.bincount(rollouts.contexts, minlength=contexts).to(dtype)
        nature = torch.where(drawn > 0, self.cmdp.context_probabilities.to(dtype), 0.0)
        if float(nature.sum()) == 0:
            raise InputError("rollouts: none of the paths is of a context to which nature gives a positive probability")
        nature = nature / nature.sum()

        if "transition" in moved:
            transition, visits = tables.transition, torch.full(tables.transition.shape[:3], torch.inf, dtype=dtype)
            spread = transition
        else:
            visits = counts.sum(-1)
            pooled = _pooled(counts)
            transition = (counts + self.strength * pooled[:, :, None]) / (visits + self.strength)[..., None]
            arrivals = counts.sum((1, 2))[:, None, None]  # [K, 1, 1, S]
            unseen = (visits.sum(-1) == 0)[..., None, None]
            spread = torch.where(unseen, arrivals / arrivals.sum(-1, keepdim=True).clamp(min=1), transition)

        row = (rollouts.contexts[:, None] * states + rollouts.steps["state"][:, :-1])[rollouts.mask]
        seen = torch.zeros(contexts * states, dtype=torch.bool)
        seen[row] = True
        prior = torch.full((contexts, states, actions), -math.log(actions), dtype=dtype)
        log_policy = prior if tables.log_prior is None else tables.log_prior.clone()
        log_policy.view(-1, actions)[row] = rollouts.steps["log_policy_all"][rollouts.mask].to(dtype)
        seen = seen.view(contexts, states)
        log_policy = self._complete(problem, tables, transition, log_policy, seen)
        return FittedModel(transition, spread, visits, log_policy, initial, paths, nature)

    def _complete(
        self, problem: Problem, tables: Tables, transition: Tensor, log_policy: Tensor, seen: Tensor
    ) -> Tensor:
        """Where a context's paths never came, the policy is unknown: take the model's own best response there.

        A uniform policy would pretend that the follower is lost as soon as it leaves its usual ways.
        """
        if bool(seen.all()):
            return log_policy
        temperature = problem.follower.temperature
        go_on = continuation(self.cmdp, problem.follower.discount, log_policy)
        for _ in range(_SWEEPS):
            policy = log_policy.exp()
            soft = (policy * _soft_reward(tables, log_policy, temperature)).sum(-1)
            value = policy_system(transition, go_on * policy).solve(soft)
            q = tables.reward + go_on * expected_next(transition, value)
            best = torch.log_softmax(soft_logits(q, tables.log_prior, temperature), -1)
            log_policy = torch.where(seen[..., None], log_policy, best)
        return log_policy


class _World:
    """Values and occupancies of the observed policy in the model; the utility alone carries a graph."""

    def __init__(
        self,
        cmdp: ContextualMDP,
        problem: Problem,
        model: FittedModel,
        tables: Tables,
        terms: Sequence[Term],
        noise: Tensor,
    ) -> None:
        """`noise` [K, S, A] times the variance of V_F(s') is the advantage's own variance, by which it is shrunk."""
        transition, follower = model.transition, problem.follower
        go_on = continuation(cmdp, follower.discount, tables.reward)
        go_on_leader = continuation(cmdp, problem.objective.discount, tables.reward)
        self.policy = policy = model.log_policy.exp()
        self.system = policy_system(transition, go_on * policy)
        same = bool((torch.as_tensor(follower.discount) == problem.objective.discount).all())
        self.leader_system = self.system if same else policy_system(transition, go_on_leader * policy)
        soft = (policy * _soft_reward(tables, model.log_policy, follower.temperature)).sum(-1)
        self.soft_value = self.system.solve(soft)  # [C, S]

        def in_context(utility: Tensor) -> Tensor:
            return (model.initial * self.leader_system.solve((policy * utility).sum(-1))).sum(-1)

        whole = linearised(problem.objective, terms, in_context, model.nature)
        self.objective, self.utility, self.in_context = whole.value, whole.utility, whole.in_context
        utility, credit = whole.utility.detach(), whole.credit.detach()
        self.value = self.leader_system.solve((policy * utility).sum(-1))
        q = credit + go_on_leader * expected_next(transition, self.value)
        advantage = q - (policy * q).sum(-1, keepdim=True)
        mean, square = expected_next(model.spread, self.value), expected_next(model.spread, self.value**2)
        variance = noise * go_on_leader**2 * (square - mean**2).clamp(min=0)
        tiny = torch.finfo(advantage.dtype).tiny
        self.keep = (advantage**2 + tiny) / (advantage**2 + variance + tiny)  # [C, S, A], 1 without shrinkage
        advantage = self.keep * advantage
        self.advantage = advantage - (policy * advantage).sum(-1, keepdim=True)
        self.mu = self.leader_system.solve(model.initial, transpose=True)[..., None] * policy  # [C, S, A]
        source = self.mu * self.advantage
        marginal = self.system.solve(pushed(transition, go_on * source), transpose=True)
        self.eta = policy * marginal[..., None] + source


def _pooled(counts: Tensor) -> Tensor:
    """Pbar(s' | s), [K, S, S]: outcomes of all actions, and one pseudo-transition back to where paths came from.

    The pseudo-transition alone fills the rows of states in which nobody acted, such as a goal that ends the episodes of
    one context and is passed by those of another. States that were never reached stay: the model does not come there.
    """
    there = counts.sum(2)  # [K, S, S]
    back = there.transpose(1, 2)
    pooled = there + back / back.sum(-1, keepdim=True).clamp(min=1)
    unreached = pooled.sum(-1, keepdim=True) == 0
    pooled = torch.where(unreached, torch.eye(counts.shape[-1], dtype=counts.dtype), pooled)
    return pooled / pooled.sum(-1, keepdim=True)


def _dense(problem: Problem) -> Tables:
    """The leader's tables, if its transitions are dense."""
    tables = require_tabular(problem.leader).tables()
    if isinstance(tables.transition, SparseTransition):
        raise InputError(
            "PlugIn: expected a dense transition table, got a SparseTransition; the model that it fits is dense. On "
            "large sparse problems use PolicyResponse(FittedCritic(cmdp.cell))"
        )
    return tables


def _soft_reward(tables: Tables, log_policy: Tensor, temperature: float | Tensor) -> Tensor:
    divergence = log_policy if tables.log_prior is None else log_policy - tables.log_prior
    return tables.reward - by_context(temperature, log_policy) * divergence


def _moved(tables: Tables) -> dict[str, Tensor]:
    """The tables besides the reward that the leader moves, and therefore knows."""
    named = {"transition": tables.transition, "initial": tables.initial, "log_prior": tables.log_prior}
    return {name: table for name, table in named.items() if isinstance(table, Tensor) and table.requires_grad}


def _along(problem: Problem, outputs: dict[str, Tensor], directions: Tensor) -> Iterator[dict[str, Tensor]]:
    """Derivatives of the tables along each direction of the parameters: gradients of a gradient's dummy weights."""
    moving = {name: table for name, table in outputs.items() if table.requires_grad}
    still = {name: torch.zeros_like(table) for name, table in outputs.items() if not table.requires_grad}
    dummies = [torch.zeros_like(table, requires_grad=True) for table in moving.values()]
    parameters = problem.parameters
    gradients = torch.autograd.grad(
        list(moving.values()), parameters, dummies, create_graph=True, retain_graph=True, allow_unused=True
    )
    used = [gradient is not None for gradient in gradients]
    whole = torch.cat([g.reshape(-1) for g in gradients if g is not None])
    for direction in directions.to(whole.dtype):
        pieces = torch.split(direction, [p.numel() for p in parameters])
        weights = torch.cat([piece for piece, is_used in zip(pieces, used, strict=True) if is_used])
        derivatives = torch.autograd.grad(whole, dummies, weights, retain_graph=True, allow_unused=True)
        found = {
            name: torch.zeros_like(table) if derivative is None else derivative
            for (name, table), derivative in zip(moving.items(), derivatives, strict=True)
        }
        yield {**still, **found}


def _row_variance(transition: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Var_{s' ~ P(. | s, a)} of sum_j left[j](s, a) right[j](s'), [K, S, A]; left [J, C, S, A], right [J, C, S]."""
    if len(transition) == 1:  # contexts that share P are influenced together
        left, right = left.flatten(0, 1)[:, None], right.flatten(0, 1)[:, None]  # [J C, 1, ...]
    influence = torch.einsum("jksa,jkt->ksat", left, right)
    mean = (transition * influence).sum(-1, keepdim=True)
    return (transition * (influence - mean) ** 2).sum(-1)
