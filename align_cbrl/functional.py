"""The pure tensor mathematics of the hypergradient and of best-response certificates.

Shapes: B paths, T steps. All functions are free of state, of randomness and of the leader.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.groups import Groups


def leaves_of(*values: Tensor) -> list[Tensor]:
    """The tensors that gradients of `values` would end in: parameters, and others that require them.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> [leaf is x for leaf in leaves_of(2 * x.sum(), torch.zeros(3))]
        [True]
    """
    found = {id(value): value for value in values if value.requires_grad and value.grad_fn is None}
    waiting = [value.grad_fn for value in values if value.grad_fn is not None]
    met = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        following = {function for function, _ in node.next_functions if function is not None} - met
        met |= following
        waiting += following
    return list(found.values())


def discount_powers(discount: float, steps: int, like: Tensor) -> Tensor:
    """1, g, g^2, ... [steps]; 0^0 = 1, so a discount of zero keeps the first step only."""
    exponents = torch.arange(steps, device=like.device, dtype=like.dtype)
    return torch.as_tensor(discount, dtype=like.dtype, device=like.device) ** exponents


def returns_to_go(step_values: Tensor, mask: Tensor, discount: float | Tensor) -> Tensor:
    """Discounted sums to the end of the path, sum_{j >= t} g^{j-t} v_j: [B, T] to [B, T]; g a number or [B]."""
    values = torch.where(mask, step_values, torch.zeros_like(step_values))
    out = torch.empty_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        running = values[:, t] + discount * running
        out[:, t] = running
    return out


def eligibility_trace(advantage: Tensor, mask: Tensor, discount: float | Tensor, leader_discount: float) -> Tensor:
    """The trace w_k = gamma w_{k-1} + gammaF^k A_F(s_k, a_k) with w_{-1} = 0.

    A reward paid at step k moves the probability of every action that led to step k; w_k collects the leader's
    advantage of all of them, so that one backward pass through (w_k / lambda) r_k is the whole response.

    Args:
        advantage: [B, T], the leader's advantage A_F.
        mask: bool [B, T].
        discount: the follower's gamma, a number or [B].
        leader_discount: the leader's gammaF.

    Returns:
        w [B, T], zero where the mask is False.

    Example:
        >>> one = torch.ones(1, 3, dtype=torch.float64)
        >>> eligibility_trace(one, one.bool(), discount=0.5, leader_discount=1.0).tolist()
        [[1.0, 1.5, 1.75]]
    """
    powers = discount_powers(leader_discount, advantage.shape[1], advantage)  # [T]
    scaled = torch.where(mask, advantage * powers, torch.zeros_like(advantage))
    out = torch.empty_like(scaled)
    running = torch.zeros_like(scaled[:, 0])
    for k in range(scaled.shape[1]):
        running = discount * running + scaled[:, k]
        out[:, k] = running
    return torch.where(mask, out, torch.zeros_like(out))


def group_advantage(credit: Tensor, group: Tensor, weight: Tensor) -> Tensor:
    """The advantage of each sample over the others of its group, unbiased for the covariance within the group.

    With equal weights this is (G / (G-1)) (c_i - mean c) = c_i - mean_{j != i} c_j. With importance weights W_i that
    sum to one over the group it is (c_i - sum_j W_j c_j) / (1 - sum_j W_j^2).

    Args:
        credit: [N], one number a sample; or [N, K], several, each for itself.
        group: long [N], samples with the same number are independent draws from one decision point.
        weight: [N], non-negative importance weights.

    Returns:
        As `credit`. Samples of a group whose whole weight lies on one sample get zero: it has nothing to be compared
        with.

    Raises:
        InputError: a group of a single sample.

    Example:
        >>> credit = torch.tensor([1.0, 0.0, 2.0, 4.0])
        >>> group_advantage(credit, torch.tensor([7, 7, 9, 9]), torch.ones(4)).tolist()
        [1.0, -1.0, -2.0, 2.0]
    """
    groups = Groups.of(group)
    lonely = groups.sizes < 2
    if lonely.any():
        raise InputError(
            f"group size: expected at least 2 samples for each decision point, got 1 for group "
            f"{int(groups.labels[lonely][0])} ({int(lonely.sum())} of {groups.count} groups); draw group_size >= 2 "
            "completions a prompt, or use a critic that does not compare samples with each other"
        )
    share = _share(groups, weight)
    spread = 1 - groups.sum(share * share)[groups.place]
    if credit.ndim > 1:
        share, spread = share[:, None], spread[:, None]
    mean = groups.sum(share * credit)[groups.place]
    lone = spread < 1e-9
    return torch.where(lone, torch.zeros_like(credit), (credit - mean) / torch.where(lone, 1.0, spread))


def elementary_symmetric(weight: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Sums over all sets of m weights of their products, m = 0 .. order: over all weights, and with each left out.

    They are built up from both ends, without a subtraction. Dividing one weight out of the whole would be shorter, and
    loses every digit where that weight dominates.

    Args:
        weight: [..., n], non-negative.
        order: the largest number of weights in a set.

    Returns:
        Of all weights [..., order + 1], and of all but each of them [..., n, order + 1].

    Example:
        >>> whole, without = elementary_symmetric(torch.tensor([1.0, 2.0, 3.0]), order=2)
        >>> whole.tolist(), without[0].tolist()  # 1 * 2 + 1 * 3 + 2 * 3 = 11, and 2 * 3 without the first
        ([1.0, 6.0, 11.0], [1.0, 5.0, 6.0])
    """
    ends = torch.stack([weight, weight.flip(-1)])[..., None]  # [2, ..., n, 1], from the front and from the back
    sums = weight.new_zeros(2, *weight.shape[:-1], order + 1)
    sums[..., 0] = 1.0
    grown = [sums]
    for more in ends.unbind(-2):
        sums = sums.clone()
        sums[..., 1:] += more * grown[-1][..., :-1]
        grown.append(sums)
    before, after = torch.stack(grown[:-1], -2)  # [..., n, order + 1] each
    after = after.flip(-2)
    without = [(before[..., : m + 1] * after[..., : m + 1].flip(-1)).sum(-1) for m in range(order + 1)]
    return grown[-1][0], torch.stack(without, -1)


def tilt_weights(log_ratio: Tensor, group: Tensor) -> Tensor:
    """Importance weights, with mean one in each group, that turn samples of pi into samples of pi*.

    Args:
        log_ratio: rho_i = r_x(y_i) / lambda - log(pi(y_i) / prior(y_i)) [N], nats; log(pi*/pi) up to a constant.
        group: long [N].

    Returns:
        [N], proportional to exp(rho_i) within each group.

    Example:
        >>> tilt_weights(torch.tensor([0.0, 0.0]), torch.tensor([3, 3])).tolist()
        [1.0, 1.0]
    """
    groups = Groups.of(group)
    log_total = groups.logsumexp(log_ratio)
    return torch.exp(log_ratio - log_total[groups.place]) * groups.sizes[groups.place].to(log_ratio.dtype)


def effective_sample_size(weight: Tensor, group: Tensor) -> Tensor:
    """Kish's (sum W)^2 / sum W^2 of each group, between 1 and the group's size: [N] to [number of groups]."""
    groups = Groups.of(group)
    return 1 / groups.sum(_share(groups, weight) ** 2)


def best_response_gap(log_ratio: Tensor, group: Tensor) -> Tensor:
    """How far the sampled policy is from the best response, in nats, for each group.

    rho_i is constant over a prompt's completions exactly when pi = pi*, and log mean exp(rho) - mean rho >= 0 is a
    lower bound in expectation of KL(pi || pi*) (Jensen). Times lambda it bounds the follower's regret from below.

    Args:
        log_ratio: rho_i [N] as for `tilt_weights`, for samples drawn from pi.
        group: long [N].

    Returns:
        [number of groups], in the order of the sorted group numbers.

    Example:
        >>> best_response_gap(torch.tensor([1.5, 1.5]), torch.tensor([0, 0])).tolist()
        [0.0]
    """
    groups = Groups.of(group)
    log_size = groups.sizes.to(log_ratio.dtype).log()
    return (groups.logsumexp(log_ratio) - log_size - groups.mean(log_ratio)).clamp(min=0)


def debiased_gap(log_ratio: Tensor, group: Tensor) -> Tensor:
    """`best_response_gap` with the bias of its logarithm removed to first order, for each group.

    log mean exp over G samples falls short of log Z by c / G + O(1 / G^2). Quenouille's jackknife combines it with its
    leave-one-out values, G L_G - (G - 1) mean_i L_{-i}, whose error is O(1 / G^2). Close to the best response it is
    unbiased where the plain gap is (G - 1) / G of the truth. It is no longer a bound, and one group's may be negative.

    Args:
        log_ratio: rho_i [N] as for `tilt_weights`, for samples drawn from pi.
        group: long [N], at least two samples each.

    Returns:
        [number of groups], in the order of the sorted group numbers; zero for a group of one sample.

    Example:
        >>> log_ratio = torch.tensor([0.1, -0.1, 0.0, 0.0], dtype=torch.float64)
        >>> debiased_gap(log_ratio, torch.tensor([0, 0, 1, 1])).tolist()  # about a half of the sample variance
        [0.00998337764..., 0.0]
    """
    groups = Groups.of(group)
    gap = torch.zeros(groups.count, dtype=log_ratio.dtype, device=log_ratio.device)
    for number, rows in groups.tables():  # groups of one size at a time: [N], [N, G]
        size = rows.shape[1]
        if size == 1:
            continue
        rho = log_ratio[rows]  # [N, G]
        alone = torch.eye(size, dtype=torch.bool, device=rho.device)
        without = rho[:, None, :].expand(-1, size, -1).masked_fill(alone, -torch.inf)  # [N, G, G]
        whole = torch.logsumexp(rho, 1) - math.log(size)
        left_out = torch.logsumexp(without, 2).mean(1) - math.log(size - 1)
        gap[number] = size * whole - (size - 1) * left_out - rho.mean(1)
    return gap


def _share(groups: Groups, weight: Tensor) -> Tensor:
    if (groups.sum(weight) <= 0).any():
        raise InputError("weight: the importance weights of a group are all zero; its samples carry no information")
    return groups.share(weight)
