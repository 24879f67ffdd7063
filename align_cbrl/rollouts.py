"""`Rollouts`: everything that passes from the follower's world to the leader's."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.distributed import any_rank, gather_together, world_size
from align_cbrl.errors import InputError


@checked
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """A frozen batch of B paths of at most T steps, sampled from the follower.

    A language model's completions are the case T = 1: the action is the whole completion.

    Attributes:
        contexts: long [B], the context each path was drawn under.
        mask: bool [B, T], True where a step was taken; each row is True, ..., True, False, ..., False.
        group: long [B, T], the decision point of each step. Steps with the same number are independent actions taken
            at the same state of the same context, such as the G completions of one prompt.
        steps: what a leader, an objective or a critic needs to score the steps. Every value is a tensor or a
            sequence whose first axis is B (states and actions of a table; prompts and completions of a
            language model).
        log_policy: float [B, T], log-probability (nats) of each action under the follower, or None when unknown.
        log_prior: float [B, T], the same under the prior (a language model's reference policy), or None.
        weight: float [B], importance weight of each path with mean one; 1 everywhere for paths drawn from the
            follower itself.
        known: what has been computed of the paths already, by what computed it: an observation, or a leader whose
            reward is made of features that do not move. First axis B. It saves scoring a completion twice, is never
            looked up by name, and so shares no namespace with `steps`.
        density: whether actions are continuous: `log_policy` and `log_prior` are then logarithms of densities, which
            may be positive. With finitely many actions a positive number is a mistake, and refused.
        part: whether these are paths selected from a batch, whose weights need not have mean one. `select` sets it.

    Raises:
        InputError: when shapes disagree, a mask has a hole, contexts or groups are no whole numbers, weights are
            negative or far from mean one, or a log-probability is not finite, or positive without `density`.

    Example:
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps={"completion": ["yes", "no"]})
        >>> rollouts.size, rollouts.horizon
        (2, 1)
    """

    contexts: Tensor
    mask: Tensor
    group: Tensor
    steps: Mapping[str, Any]
    log_policy: Tensor | None = None
    log_prior: Tensor | None = None
    weight: Tensor | None = None
    known: Mapping[Hashable, Tensor] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    density: bool = False
    part: bool = dataclasses.field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or self.mask.dtype != torch.bool:
            raise InputError(
                f"Rollouts.mask: expected a bool tensor [B, T], got {self.mask.dtype} {tuple(self.mask.shape)}"
            )
        size, horizon = self.mask.shape
        if size == 0 or horizon == 0:
            raise InputError(f"Rollouts.mask: expected at least one path and one step, got {size} x {horizon}")
        if (self.mask[:, 1:] & ~self.mask[:, :-1]).any() or not self.mask[:, 0].all():
            raise InputError("Rollouts.mask: each path must start at step 0 and stay True until it ends")
        _check_shape("contexts", self.contexts, (size,))
        _check_shape("group", self.group, (size, horizon))
        for name in ("contexts", "group"):
            value = getattr(self, name)
            if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                raise InputError(
                    f"Rollouts.{name}: expected whole numbers (torch.long), got {value.dtype}, in which NaN and "
                    "fractions would name contexts that do not exist; convert it with .long()"
                )
        if self.weight is not None:
            _check_shape("weight", self.weight, (size,))
            if not torch.isfinite(self.weight).all() or (self.weight < 0).any():
                raise InputError("Rollouts.weight: expected finite, non-negative importance weights")
            mean = float(self.weight.double().mean())
            if not self.part and not (1 / _WEIGHT_MEAN <= mean <= _WEIGHT_MEAN):
                raise InputError(
                    f"Rollouts.weight: expected importance weights with mean one, got mean {mean:g}, by which every "
                    "gradient would be multiplied; divide them by it"
                )
        for name in ("log_policy", "log_prior"):
            value = getattr(self, name)
            if value is not None:
                _check_shape(name, value, (size, horizon))
                check_finite(name, value, self)
                if self.density:
                    continue
                # Of a weighted path it is an estimate, log pi + log W, which its weight may lift above zero.
                room = 0.0 if self.weight is None else self.weight.detach().to(value).log().clamp(min=0.0)[:, None]
                highest = float(torch.where(self.mask.to(value.device), value.detach() - room, -torch.inf).max())
                if highest > _LOG_ROUNDING:
                    raise InputError(
                        f"Rollouts.{name}: expected log-probabilities in nats, at most 0, got {highest:g}; pass "
                        "log_softmax values, not logits or probabilities; densities of continuous actions may be "
                        "positive: declare them with density=True"
                    )
        for name, value in self.steps.items():
            came = len(value) if hasattr(value, "__len__") else value
            if came != size:
                raise InputError(f"Rollouts.steps[{name!r}]: expected {size} paths, got {came!r:.60}")
        for key, tensor in self.known.items():
            if len(tensor) != size:
                raise InputError(f"Rollouts.known[{key!r}]: expected {size} paths, got {len(tensor)}")

    @classmethod
    def bandit(
        cls, *, contexts: Tensor, steps: Mapping[str, Any], density: bool = False, **fields: Tensor | None
    ) -> Rollouts:
        """Paths of a single step (T = 1) whose decision point is their context.

        Args:
            contexts: long [B].
            steps: as for `Rollouts`.
            density: likewise.
            **fields: `log_policy`, `log_prior` as [B] (a column is added) and `weight` as [B].
        """
        columns: dict[str, Any] = {
            name: value[:, None] if value is not None and name != "weight" else value for name, value in fields.items()
        }
        return cls(
            contexts=contexts,
            mask=torch.ones(len(contexts), 1, dtype=torch.bool, device=contexts.device),
            group=contexts[:, None],  # [B] -> [B, 1]
            steps=steps,
            density=density,
            **columns,
        )

    @classmethod
    def joined(cls, batches: Sequence[Rollouts]) -> Rollouts:
        """The paths of several batches as one; decision points of different batches stay apart.

        Each batch has weights or log-probabilities where the others have them, and `steps` of the same names; of what
        is `known`, that which is known of all stays.

        Example:
            >>> one = Rollouts.bandit(contexts=torch.tensor([4, 4]), steps={"completion": ["yes", "no"]})
            >>> both = Rollouts.joined([one, one])
            >>> both.contexts.tolist(), both.group[:, 0].tolist(), both.steps["completion"]
            ([4, 4, 4, 4], [8, 8, 9, 9], ['yes', 'no', 'yes', 'no'])
        """
        # Not numbered anew: a decision point may have paths in other processes, which count by themselves.
        numbers = [len(batches) * batch.group + i for i, batch in enumerate(batches)]
        first = batches[0]
        fields = {name: [getattr(batch, name) for batch in batches] for name in ("contexts", "mask", *_OPTIONAL)}
        whole: dict[str, Any] = {
            name: None if getattr(first, name) is None else torch.cat(values) for name, values in fields.items()
        }

        def column(name: str) -> Any:
            values = [batch.steps[name] for batch in batches]
            return torch.cat(values) if isinstance(values[0], Tensor) else [row for value in values for row in value]

        common = [key for key in first.known if all(key in batch.known for batch in batches)]
        return cls(
            **whole,
            group=torch.cat(numbers),
            steps={name: column(name) for name in first.steps},
            known={key: torch.cat([batch.known[key] for batch in batches]) for key in common},
            density=first.density,
        )

    @property
    def size(self) -> int:
        """Number of paths, B."""
        return self.mask.shape[0]

    @property
    def horizon(self) -> int:
        """Number of steps, T, of the longest path."""
        return self.mask.shape[1]

    def path_weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Importance weights [B] of the paths: ones when none were given."""
        if self.weight is None:
            return torch.ones(self.size, dtype=dtype, device=self.mask.device)
        return self.weight.to(dtype)

    def select(self, index: slice | Sequence[int]) -> Rollouts:
        """The paths at `index`, in that order."""
        positions = torch.arange(self.size)[index]

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[positions.to(value.device)]
            return [value[i] for i in positions.tolist()]

        fields = {name: getattr(self, name) for name in ("contexts", "mask", "group", *_OPTIONAL)}
        picked: dict[str, Any] = {name: None if value is None else pick(value) for name, value in fields.items()}
        return Rollouts(
            **picked,
            steps={name: pick(value) for name, value in self.steps.items()},
            known={key: pick(value) for key, value in self.known.items()},
            density=self.density,
            part=True,
        )

    def knowing(self, known: Mapping[Any, Tensor]) -> Rollouts:
        """The same paths, with more that is known of them.

        Example:
            >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps={})
            >>> rollouts.knowing({"length": torch.tensor([3.0, 5.0])}).select([1]).known
            {'length': tensor([5.])}
        """
        return dataclasses.replace(self, known={**self.known, **known})

    def over_ranks(self) -> Rollouts:
        """The paths of all ranks, in the order of `distributed.gather_rows`, with empty `steps`; every rank must ask.

        What an objective's summary, a group's mean or a certificate needs of a batch that several processes share. In
        one process these are the rollouts themselves.

        Raises:
            InputError: several processes and paths of more than one step, whose decision points are numbered on each
                rank apart.
        """
        if world_size() == 1:
            return self
        if any_rank(self.horizon != 1):
            raise InputError(
                f"rollouts: expected one step in a run of {world_size()} processes, such as completions, got a horizon "
                f"of {self.horizon}; run paths of several steps in one process"
            )
        fields = {name: getattr(self, name) for name in ("contexts", "mask", "group", *_OPTIONAL)}
        present = {name: value for name, value in fields.items() if value is not None}
        gathered: dict[str, Any] = dict(zip(present, gather_together(list(present.values())), strict=True))
        return Rollouts(**gathered, steps={}, density=self.density)

    def chunks(self, count: int) -> list[Rollouts]:
        """The paths cut into at most `count` consecutive pieces of nearly equal size."""
        if count < 1:
            raise InputError(f"chunks: expected a positive number of pieces, got {count}")
        if count == 1:
            return [self]
        length = -(-self.size // count)
        return [self.select(slice(start, start + length)) for start in range(0, self.size, length)]


_LOG_ROUNDING = 0.01  # of a log-probability of zero; sums of half-precision ones over many tokens are off by less
_WEIGHT_MEAN = 10.0  # a few paths' importance weights stray from mean one, but not that far
_OPTIONAL = ("log_policy", "log_prior", "weight")


def check_finite(name: str, value: Tensor, rollouts: Rollouts) -> None:
    """Raise `InputError` naming the first context and step at which `value` [B, T] is NaN or infinite."""
    bad = ~torch.isfinite(value) & rollouts.mask.to(value.device)
    if bad.any():
        path, step = (int(i) for i in bad.nonzero()[0])
        raise InputError(
            f"{name}: expected finite numbers, got {value[path, step].item()} in context "
            f"{int(rollouts.contexts[path])} at step {step} (path {path}); {int(bad.sum())} of "
            f"{int(rollouts.mask.sum())} steps are affected"
        )


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise InputError(f"Rollouts.{name}: expected shape {shape}, got {tuple(value.shape)}")
