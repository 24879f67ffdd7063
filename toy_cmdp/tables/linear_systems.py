"""Linear systems with normal noise and quadratic costs, one a context, as functions of the leader.

Axes: C contexts, B paths, T steps; n numbers make a state, m an action, and d = n + m a pair of both.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from align_cbrl.checks import Positive, Range, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts

_DEFINITE = 1e-9  # of a covariance or a cost: how negative an eigenvalue may be, as a share of the largest one
_NOISELESS = 1e-12  # share of the largest eigenvalue of a covariance up to which a direction has no noise
_MOVED = 1e-9  # likewise, of a derivative


Horizon = Annotated[int, Range(1, 10_000)]
"""Steps that a leader counts."""


@checked
@dataclasses.dataclass(frozen=True)
class LinearSystems:
    """Systems s' = A s + B u + noise at the leader's present parameters; each tensor is differentiable or constant.

    A constant push, such as an open-loop action of the leader's, is a column of A for a state that stays 1.

    Attributes:
        dynamics: A [C, n, n].
        control: B [C, n, m].
        noise: [C, n, n], covariance of what is added to the next state; directions without noise are allowed.
        state_cost, action_cost: Q [C, n, n] and R [C, m, m] of the follower, whose reward is -(s'Qs + u'Ru).
        initial_mean, initial_covariance: [C, n] and [C, n, n], of the first state's normal law.

    Raises:
        InputError: shapes that disagree. What the tensors hold is looked at by `check`.

    Example:
        >>> one = torch.ones(1, 1, 1, dtype=torch.float64)
        >>> systems = LinearSystems(one, one, one, one, one, one[0], one)
        >>> systems.contexts, systems.states, systems.actions
        (1, 1, 1)
    """

    dynamics: Tensor
    control: Tensor
    noise: Tensor
    state_cost: Tensor
    action_cost: Tensor
    initial_mean: Tensor
    initial_covariance: Tensor

    def __post_init__(self) -> None:
        if self.control.ndim != 3 or 0 in self.control.shape:
            raise InputError(f"control: expected shape [C, n, m], none of them 0, got {tuple(self.control.shape)}")
        c, n, m = self.control.shape
        shapes = {"action_cost": (c, m, m), "initial_mean": (c, n)}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            shape = (c, n, m) if field.name == "control" else shapes.get(field.name, (c, n, n))
            if tuple(value.shape) != shape or value.dtype != torch.float64:
                raise InputError(
                    f"{field.name}: expected float64 of shape {shape} (C, n, m = {c}, {n}, {m}, from `control`), got "
                    f"{value.dtype} {tuple(value.shape)}"
                )

    @property
    def contexts(self) -> int:
        """C, how many systems."""
        return self.control.shape[0]

    @property
    def states(self) -> int:
        """n, numbers in a state."""
        return self.control.shape[1]

    @property
    def actions(self) -> int:
        """m, numbers in an action."""
        return self.control.shape[2]

    @property
    def joint(self) -> Tensor:
        """[A B], [C, n, d]."""
        return torch.cat([self.dynamics, self.control], -1)

    @property
    def cost(self) -> Tensor:
        """The quadratic form of the follower's cost of a pair, [C, d, d]: Q and R on the diagonal."""
        return block_diagonal(self.state_cost, self.action_cost)

    def detach(self) -> LinearSystems:
        """The same numbers without a graph."""
        return LinearSystems(*(getattr(self, field.name).detach() for field in dataclasses.fields(self)))

    def check(self) -> None:
        """Look at the numbers.

        Raises:
            InputError: NaN or infinite entries, covariances or state costs that are not symmetric or have a negative
                eigenvalue, an action cost that is not positive definite; the message names tensor and context.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name).detach()
            bad = (~torch.isfinite(value)).nonzero()
            if len(bad):
                index = bad[0].tolist()
                raise InputError(
                    f"{field.name}: expected finite numbers, got {value[tuple(index)].item()} in context {index[0]} at "
                    f"{index[1:]}"
                )
        for name in ("noise", "initial_covariance", "state_cost", "action_cost"):
            value = getattr(self, name).detach()
            size = value.abs().amax((-1, -2))  # [C]
            lopsided = ((value - value.mT).abs().amax((-1, -2)) > _DEFINITE * size).nonzero()
            if len(lopsided):
                raise InputError(f"{name}: expected a symmetric matrix, got another in context {int(lopsided[0])}")
            lowest = torch.linalg.eigvalsh(value)[:, 0]
            strict = name == "action_cost"
            wrong = (lowest <= 0 if strict else lowest < -_DEFINITE * size).nonzero()
            if len(wrong):
                context = int(wrong[0])
                raise InputError(
                    f"{name}: expected a positive {'definite' if strict else 'semidefinite'} matrix, got eigenvalue "
                    f"{float(lowest[context]):g} in context {context}"
                    + ("; without a cost of acting the follower's actions have no bound" if strict else "")
                )


class LinearLeader(Leader):
    """A leader given by its linear systems.

    Rollouts carry `steps["state"]`, [B, T + 1, n], and `steps["action"]`, [B, T, m], both float64.

    Example:
        >>> from toy_cmdp import building
        >>> tuple(building().leader.systems().dynamics.shape)
        (1, 4, 4)
    """

    @abc.abstractmethod
    def systems(self) -> LinearSystems:
        """The systems at the present parameters."""

    def reward(self, rollouts: Rollouts) -> Tensor:
        """-(s'Qs + u'Ru), [B, T]."""
        systems = self.systems()
        return -form(along_paths(systems.cost, rollouts.contexts), pairs(rollouts))

    def log_transition(self, rollouts: Rollouts) -> Tensor | None:
        """The log-density of s_{t+1}, [B, T], on the space that the noise reaches; None if the law is constant.

        Raises:
            InputError: the leader moves a part of the next state that has no noise, which has no density.
        """
        with torch.enable_grad():
            systems = self.systems()
            joint, noise = systems.joint, systems.noise
        if not (joint.requires_grad or noise.requires_grad):
            return None
        self._require_noise("noise", noise, joint)
        mean = pairs(rollouts) @ along_paths(joint, rollouts.contexts).mT
        return _log_normal(rollouts.steps["state"][:, 1:] - mean, noise, rollouts.contexts)

    def log_initial(self, rollouts: Rollouts) -> Tensor | None:
        """The log-density of s_0, [B], likewise.

        Raises:
            InputError: as for `log_transition`.
        """
        with torch.enable_grad():
            systems = self.systems()
            mean, covariance = systems.initial_mean, systems.initial_covariance
        if not (mean.requires_grad or covariance.requires_grad):
            return None
        self._require_noise("initial_covariance", covariance, mean[..., None])
        off = rollouts.steps["state"][:, :1] - mean[rollouts.contexts][:, None]
        return _log_normal(off, covariance, rollouts.contexts)[:, 0]

    def _require_noise(self, name: str, covariance: Tensor, moved: Tensor) -> None:
        """Raise `InputError` if x moves `moved` [C, n, k], or the covariance itself, where that has no extent."""
        still = _noiseless(covariance)
        if not bool(still.any()):
            return
        parameters = [p for p in self.parameters() if p.requires_grad]
        for matrix in (moved, covariance):
            if not matrix.requires_grad:
                continue
            # By a fixed weight for each entry no derivative cancels but by chance.
            weight = torch.linspace(1, 2, matrix.numel(), dtype=matrix.dtype).view_as(matrix)
            whole, part = (
                max(
                    (
                        float(gradient.abs().max())
                        for gradient in torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
                        if gradient is not None
                    ),
                    default=0.0,
                )
                for total in ((weight * matrix).sum(), (weight * (still @ matrix)).sum())
            )
            if part > _MOVED * whole:
                context = int(still.abs().amax((-1, -2)).nonzero()[0])
                raise InputError(
                    f"{name}: {type(self).__name__} moves a part of the state that has no noise in context {context}, "
                    "so that its law has no density to differentiate; give that part noise, or use a route that needs "
                    "none: leader_value, ZerothOrder or FittedSystem"
                )


class StructuredLeader(LinearLeader):
    """A leader that knows how its systems are made, but for numbers of nature's in which [A B] is linear."""

    @abc.abstractmethod
    def nature(self) -> Tensor:
        """The numbers in every context, [C, K]."""

    def own_states(self) -> int:
        """How many entries at the end of the state the leader makes itself, which say nothing of nature. Default: 0."""
        return 0

    @abc.abstractmethod
    def supposing(
        self, numbers: Tensor, noise: Tensor, initial_mean: Tensor, initial_covariance: Tensor
    ) -> StructuredLeader:
        """This leader, with the same parameters, in another world.

        Args:
            numbers: [C, K].
            noise: [C, n, n], of the whole state; parts that the leader makes itself are passed over.
            initial_mean: [C, n], likewise.
            initial_covariance: [C, n, n], likewise.
        """


Form = Callable[[LinearLeader], Tensor]
"""A matrix or a number in every context, as a function of the leader."""


@checked
class MomentUtility(abc.ABC):
    """A leader's utility of pairs whose mean under a normal law has a closed form; hand it to `ExpectedUtility`.

    The leader counts the first `horizon` steps; the follower, who plays without end, does not know. An undiscounted sum
    is one in which the utility of step t counts `discount`^-t, which the objective's discount takes back.

    Args:
        horizon: steps that count.
        undiscounted: None for utilities that count alike, or the objective's discount.
    """

    def __init__(self, horizon: Horizon, undiscounted: Positive | None = None) -> None:
        self.horizon = horizon
        powers = torch.arange(horizon, dtype=torch.float64)
        self.weight = torch.ones_like(powers) if undiscounted is None else undiscounted**-powers  # [T]

    @abc.abstractmethod
    def mean(self, leader: LinearLeader, contexts: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
        """E u(p) for pairs p ~ N(mean, covariance), [B, K], differentiable in all of them and in the leader.

        Args:
            leader: at whose parameters.
            contexts: long [B].
            mean: [B, K, d].
            covariance: [B or 1, K or 1, d, d]; zero for the utility itself.
        """

    def __call__(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """u(s_t, u_t) as it counts, [B, T]: zero from the horizon on."""
        pair = pairs(rollouts)
        none = pair.new_zeros(1, 1, pair.shape[-1], pair.shape[-1])
        counted = min(self.horizon, rollouts.horizon)
        value = self.mean(require_linear(leader), rollouts.contexts, pair[:, :counted], none)
        value = self.weight[:counted] * value
        return torch.nn.functional.pad(value, (0, rollouts.horizon - counted))


@checked
class QuadraticUtility(MomentUtility):
    """-(p'M_x p) - c_x of the pair p = (s, u).

    Args:
        form: maps the leader to M [C, d, d].
        charge: maps it to c [C], paid at every step; None for none.
        horizon, undiscounted: as for `MomentUtility`.
    """

    def __init__(
        self, form: Form, charge: Form | None = None, *, horizon: Horizon, undiscounted: Positive | None = None
    ) -> None:
        super().__init__(horizon, undiscounted)
        self._form, self._charge = form, charge

    def mean(self, leader: LinearLeader, contexts: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
        """See `MomentUtility.mean`."""
        matrix = along_paths(self._form(leader), contexts)
        value = -form(matrix, mean) - (matrix[:, None] * covariance).sum((-1, -2))
        return value if self._charge is None else value - self._charge(leader)[contexts][:, None]


@checked
class BumpUtility(MomentUtility):
    """exp(-sum_i (p_i - centre_i)^2 / (2 width_i^2)) over some entries of the pair, the same for all contexts.

    Args:
        entries: which of the d entries, k of them.
        centre, width: [k].
        horizon, undiscounted: as for `MomentUtility`.
    """

    def __init__(
        self,
        entries: list[Whole],
        centre: Tensor,
        width: Tensor,
        *,
        horizon: Horizon,
        undiscounted: Positive | None = None,
    ) -> None:
        super().__init__(horizon, undiscounted)
        self._entries = entries
        for name, value in (("centre", centre), ("width", width)):
            if tuple(value.shape) != (len(entries),) or not bool(torch.isfinite(value).all()):
                raise InputError(f"{name}: expected {len(entries)} finite numbers, one an entry, got {value.tolist()}")
        if not entries or not bool((width > 0).all()):
            raise InputError(f"width: expected at least one entry and positive widths, got {width.tolist()}")
        self._centre, self._width = centre.double(), width.double()

    def mean(self, leader: LinearLeader, contexts: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
        """See `MomentUtility.mean`: det(I + S)^(-1/2) exp(-q' (I + S)^-1 q / 2) in units of the widths."""
        off = (mean[..., self._entries] - self._centre) / self._width  # [B, K, k]
        spread = covariance[..., self._entries, :][..., self._entries]
        wide = spread / (self._width[:, None] * self._width) + torch.eye(len(self._width), dtype=mean.dtype)
        inverse = torch.linalg.inv(wide)
        if inverse.shape[1] == 1:
            exponent = form(inverse[:, 0], off)
        else:
            exponent = ((off[..., None, :] @ inverse)[..., 0, :] * off).sum(-1)
        return torch.exp(-exponent / 2) * torch.linalg.det(wide) ** -0.5


def pairs(rollouts: Rollouts) -> Tensor:
    """(s_t, u_t) along the paths, [B, T, d].

    Raises:
        InputError: rollouts without "state" and "action".
    """
    if "state" not in rollouts.steps or "action" not in rollouts.steps or rollouts.steps["state"].ndim != 3:
        raise InputError(
            'rollouts.steps: expected "state" [B, T + 1, n] and "action" [B, T, m] of a linear system, got '
            f"{sorted(rollouts.steps)}"
        )
    return torch.cat([rollouts.steps["state"][:, :-1], rollouts.steps["action"]], -1)


def form(matrix: Tensor, vector: Tensor) -> Tensor:
    """v'Mv for M [B or 1, k, k] and v [B, T, k]: [B, T].

    Example:
        >>> form(2 * torch.eye(2)[None], torch.ones(1, 1, 2)).tolist()
        [[4.0]]
    """
    return ((vector @ matrix) * vector).sum(-1)


def along_paths(matrix: Tensor, contexts: Tensor) -> Tensor:
    """matrix[contexts], [B, ...] of [C, ...]; of one context [1, ...], which torch multiplies in one go."""
    return matrix if len(matrix) == 1 else matrix[contexts]


def block_diagonal(one: Tensor, other: Tensor) -> Tensor:
    """[..., n, n] and [..., m, m] on the diagonal of [..., d, d], zero elsewhere.

    Example:
        >>> block_diagonal(torch.ones(1, 1), 2 * torch.ones(1, 1)).tolist()
        [[1.0, 0.0], [0.0, 2.0]]
    """
    n, m = one.shape[-1], other.shape[-1]
    pad = torch.nn.functional.pad
    return torch.cat([pad(one, (0, m)), pad(other, (n, 0))], -2)


def require_linear(leader: Leader) -> LinearLeader:
    """The leader, if it is given by linear systems.

    Raises:
        InputError: it is not.
    """
    if not isinstance(leader, LinearLeader):
        raise InputError(f"leader: expected a LinearLeader, got {type(leader).__name__}")
    return leader


def _noiseless(covariance: Tensor) -> Tensor:
    """The projection on the directions without extent, [..., n, n], without graph."""
    values, vectors = torch.linalg.eigh(covariance.detach())
    still = values <= _NOISELESS * values[..., -1:].clamp(min=torch.finfo(values.dtype).tiny)
    across = vectors * still[..., None, :]
    return across @ across.mT


def _log_normal(off: Tensor, covariance: Tensor, contexts: Tensor) -> Tensor:
    """log N(off; 0, covariance) on the space that it spans: [B, T, n], [C, n, n] and long [B] to [B, T]."""
    still = _noiseless(covariance)
    # Directions without extent get that of the largest one, and nothing of `off` lies in them.
    size = covariance.detach().diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=torch.finfo(off.dtype).tiny)
    factor = torch.linalg.cholesky(covariance + size[..., None, None] * still)
    inside = off.mT - along_paths(still, contexts) @ off.mT  # [B, n, T]
    unit = torch.eye(off.shape[-1], dtype=off.dtype)
    white = along_paths(torch.linalg.solve_triangular(factor, unit, upper=False), contexts) @ inside
    empty = still.diagonal(dim1=-2, dim2=-1).sum(-1)
    log_size = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - empty * size.log()
    constant = log_size + (off.shape[-1] - empty) * math.log(2 * math.pi)
    return -((white**2).sum(-2) + constant[contexts][:, None]) / 2
