"""Optima that are known without gradient ascent: closed forms, roots of one equation, and enumerations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import Count, Discount, NonNegative, Positive, checked
from align_cbrl.errors import InputError
from align_cbrl.problem import check_discount, check_temperature
from toy_cmdp.problems.free_rewards import check_bounds
from toy_cmdp.tables.arguments import check_size, finite_tensor


@checked
def optimal_bonus(
    success: tuple[float, float], cost: NonNegative, output: NonNegative = 1.0, temperature: NonNegative = 0.0
) -> tuple[float, float]:
    """The best contract for one period, one type, two efforts and two outcomes: (bonus, profit).

    A failure is worth and paid nothing; a success is worth `output` and paid the bonus b. With p and P the
    probabilities of success without and with effort, D = P - p, the agent makes the effort with probability
    sigma(z), z = (b D - cost) / lambda, and the profit is (p + D sigma(z)) (output - b). Its derivative has the sign of

        f(z) = D^2 (output - b) / lambda - (1 + e^z) (P + p e^-z),

    which is concave with its maximum at e^z = p / P: the profit has one local maximum beyond, f's upper root, found
    here by bisection, and possibly one at b = 0. As lambda -> 0,

        b = cost / D + (lambda / D) [log(1 / lambda) + log(D^2 (output - cost / D) / P)] + o(lambda).

    With p = 0 it is `logit_price` read backwards: D (output - b) = lambda (1 + W(exp((D output - cost) / lambda - 1))).

    Args:
        success: (p, P), with p < P.
        cost: of the effort, >= 0.
        output: worth of a success, > 0.
        temperature: lambda; 0 gives the textbook's contract, b = cost / D where an effort pays, else 0.

    Raises:
        InputError: probabilities that are not 0 <= p < P <= 1, a negative cost, output or temperature.

    Example:
        >>> bonus, profit = optimal_bonus((0.2, 0.8), cost=0.15)
        >>> round(bonus, 6), round(profit, 6)
        (0.25, 0.6)
    """
    low, high = success
    if not 0 <= low < high <= 1:
        raise InputError(f"success: expected probabilities 0 <= p < P <= 1, got {success}")
    lift, idle = high - low, low * output
    if temperature == 0:
        bonus = cost / lift
        profit = high * (output - bonus)
        return (bonus, profit) if profit >= idle else (0.0, idle)

    def profit_at(z: float) -> tuple[float, float]:
        bonus = (cost + temperature * z) / lift
        effort = 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))
        return bonus, (low + lift * effort) * (output - bonus)

    def log_excess(z: float) -> float:
        """The logarithm of the ratio of f's two terms, which has f's sign and cannot overflow."""
        margin = output - (cost + temperature * z) / lift
        if margin <= 0:
            return -math.inf
        softplus = max(z, 0.0) + math.log1p(math.exp(-abs(z)))
        spread = math.log(high) if low == 0 else math.log(high) + _log1p_exp(math.log(low / high) - z)
        return math.log(lift**2 * margin / temperature) - softplus - spread

    start = -cost / temperature  # no bonus
    lower = start if low == 0 else max(start, math.log(low / high))
    upper = (output * lift - cost) / temperature
    if upper <= lower or log_excess(lower) <= 0:
        return profit_at(start)
    for _ in range(200):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if log_excess(middle) > 0 else (lower, middle)
    return max(profit_at(lower), profit_at(start), key=lambda found: found[1])


@checked
def threshold_rewards(utility: Any, bounds: tuple[float, float], temperature: float) -> tuple[Tensor, Tensor]:
    """The optimum of `free_rewards`, by enumeration: rewards [C, A] and the value of each context [C].

    dJ/dr(a) = pi(a) (u(a) - J) / lambda, so that an optimal reward is the highest where u(a) > J and the lowest where
    u(a) < J: a threshold, which is the optimal value itself. With y(a) = exp(r(a) / lambda), J = sum y u / sum y is a
    ratio of linear functions of y over a box: it has no local optimum that is not global.

    Args:
        utility: [C, A].
        bounds: (lowest, highest) reward.
        temperature: lambda.

    Raises:
        InputError: as `free_rewards`.

    Example:
        >>> rewards, value = threshold_rewards([[3.0, 1.0, 0.0]], (0.0, 1.0), temperature=0.5)
        >>> rewards.tolist(), round(value.item(), 3)
        ([[1.0, 0.0, 0.0]], 2.467)
    """
    check_bounds(bounds)
    check_temperature("temperature", temperature)
    gain = finite_tensor("utility", utility, ("C", "A"))
    low, high = bounds
    # Candidate k pays the highest reward to every action whose utility is at least that of action k.
    candidates = torch.where(gain[:, None, :] >= gain[:, :, None], high, low).to(gain.dtype)  # [C, A, A]
    values = (torch.softmax(candidates / temperature, -1) * gain[:, None]).sum(-1)  # [C, A]
    best = values.max(1)
    return candidates[torch.arange(len(gain)), best.indices], best.values


def wright_omega(y: float) -> float:
    """W(e^y), the w > 0 with w + log w = y (Lambert's W without its overflow), by Newton's method on log w.

    Example:
        >>> round(wright_omega(1.0), 12)
        1.0
    """
    log_w = y if y < 1 else math.log(y)
    for _ in range(50):  # e^l + l is convex and increasing: monotone after the first step, quadratic at the end
        step = (math.exp(log_w) + log_w - y) / (math.exp(log_w) + 1)
        log_w -= step
        if abs(step) <= math.ulp(log_w):
            break
    return math.exp(log_w)


@checked
def logit_price(valuation: float, temperature: Positive, opportunity_cost: float = 0.0) -> float:
    """The p that maximises sigma((valuation - p) / lambda) (p - opportunity_cost).

    The first-order condition is p - opportunity_cost = lambda / (1 - sigma), and with W Lambert's function

        p = opportunity_cost + lambda [1 + W(exp((valuation - opportunity_cost) / lambda - 1))] ;

    the maximum is lambda W(...).

    Raises:
        InputError: a temperature that is not positive.

    Example:
        >>> round(logit_price(valuation=2.0, temperature=1.0), 6)
        2.0
    """
    check_temperature("temperature", temperature)
    return opportunity_cost + temperature * (1 + wright_omega((valuation - opportunity_cost) / temperature - 1))


@checked
def optimal_prices(
    valuation: float, inventory: Count, horizon: Count, temperature: float, leader_discount: Discount
) -> tuple[Tensor, Tensor]:
    """The best prices [N, T] and the revenue to come [N, T], for single units, one type and buyers who do not wait.

    Dynamic programming in the revenue to come, V(n, t) = V'(n) + max_p sigma(...) (p - [V'(n) - V'(n - 1)]), where
    V'(n) = gammaF V(n, t + 1): the unit's opportunity cost is what it would still earn, and `logit_price` has the
    maximum. Prices fall with the inventory and, towards the end, with time (Gallego and van Ryzin 1994, theorem 1).

    Raises:
        InputError: sizes below one, a temperature or discount out of range.

    Example:
        >>> prices, revenue = optimal_prices(1.0, inventory=2, horizon=2, temperature=0.2, leader_discount=1.0 - 1e-8)
        >>> bool(prices[0, 0] > prices[0, 1]) and bool(prices[0, 0] > prices[1, 0])
        True
    """
    check_temperature("temperature", temperature)
    check_discount("leader_discount", leader_discount)
    check_size(250 * inventory * horizon, inventory=inventory, horizon=horizon)  # computed one by one
    prices = torch.zeros(inventory, horizon, dtype=torch.float64)
    revenue = torch.zeros_like(prices)
    for t in reversed(range(horizon)):
        later = [
            0.0,
            *(leader_discount * revenue[:, t + 1] if t + 1 < horizon else prices.new_zeros(inventory)).tolist(),
        ]
        for n in range(1, inventory + 1):
            cost = later[n] - later[n - 1]
            prices[n - 1, t] = logit_price(valuation, temperature, cost)
            revenue[n - 1, t] = later[n] + prices[n - 1, t] - cost - temperature
    return prices, revenue


def _log1p_exp(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))
