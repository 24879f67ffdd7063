"""Every wrapper around every objective, in every order: against the enumerated J, or refused by name when built.

J and its derivatives are computed here from first principles on a bandit whose answers can all be written down: the
policy is differentiated by autograd, and none of the library's credits, risks or estimators is used on that side.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_cbrl import (
    BestOf,
    Constrained,
    CrossFitted,
    CVaR,
    EntropicRisk,
    ExpectedUtility,
    FunctionOfMeans,
    InputError,
    KLPriced,
    Leader,
    MeanVariance,
    Objective,
    PolicyResponse,
    PreferenceData,
    PreferenceLikelihood,
    Problem,
    Regularised,
    Rollouts,
    SetUtility,
    WorstContext,
    WorstGroup,
)
from align_cbrl.estimators.observing import observe
from align_cbrl.objectives import ratio
from toy_cmdp import ContextualMDP, ExactFollower, Tables, TabularLeader, TabularUtility, leader_value
from toy_cmdp.referee.exact import exact_world, expected_policy_response

CONTEXTS, ANSWERS, TEMPERATURE = 4, 3, 0.7
GENERATOR = torch.Generator().manual_seed(11)


def table() -> Tensor:
    return torch.rand(CONTEXTS, ANSWERS, generator=GENERATOR, dtype=torch.float64)


SCORE, COST, TASTE, PRIOR = table(), table(), table(), torch.log_softmax(table(), -1)
REWARD, MOVED = table(), table()
TOPICS = ["law", "art", "law", "art"]
LAW = torch.full((CONTEXTS,), 1 / CONTEXTS, dtype=torch.float64)


class Bandit(TabularLeader):
    """Rewards and utilities that move with x in R^3; a fixed prior."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64))
        self.prior = PRIOR[:, None]
        self.law = torch.ones(1, 1, ANSWERS, 1, dtype=torch.float64)
        self.first = torch.ones(CONTEXTS, 1, dtype=torch.float64)

    def tables(self) -> Tables:
        return Tables(reward_at(self.x)[:, None], self.law, self.first, self.prior)


def reward_at(x: Tensor) -> Tensor:
    return x[0] * REWARD + x[1] * MOVED.sin() + x[2] * REWARD * MOVED


def moving_score(x: Tensor) -> Tensor:
    return SCORE * (1 + 0.3 * x[0]) + 0.2 * x[1] * TASTE


def utility(of: Callable[[Tensor], Tensor]) -> TabularUtility:
    return TabularUtility(lambda leader: of(leader.x)[:, None])  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Exact:
    """J by first principles: f [C] of a policy and x as a sum of parts, each with what is made of the contexts."""

    parts: list[tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]]

    def value(self, x: Tensor) -> Tensor:
        policy = torch.softmax(reward_at(x) / TEMPERATURE + PRIOR, -1)
        return sum((risk(f(policy, x)) for f, risk in self.parts), start=torch.zeros((), dtype=torch.float64))


def mean(f: Tensor) -> Tensor:
    return (LAW * f).sum()


def expected(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda policy, x: (policy * of(x)).sum(-1)


def pairs(policy: Tensor, x: Tensor) -> Tensor:
    r, s = reward_at(x), TASTE / 0.5
    d, p = r[:, :, None] - r[:, None, :], torch.sigmoid(s[:, :, None] - s[:, None, :])
    likelihood = p * torch.nn.functional.logsigmoid(d) + (1 - p) * torch.nn.functional.logsigmoid(-d)
    return (policy[:, :, None] * policy[:, None, :] * likelihood).sum((1, 2))


def best_of_three(policy: Tensor, x: Tensor) -> Tensor:
    """E max(s(y), s(y'), s(y'')), answer by answer; s is the taste."""
    s = TASTE
    best = torch.maximum(torch.maximum(s[:, :, None, None], s[:, None, :, None]), s[:, None, None, :])
    return torch.einsum("ca,cb,cd,cabd->c", policy, policy, policy, best)


def moving_cost(x: Tensor) -> Tensor:
    return 1 + COST + (0.1 * x[2] * SCORE) ** 2


def both_means(policy: Tensor, x: Tensor) -> Tensor:
    return torch.stack([expected(moving_score)(policy, x), expected(moving_cost)(policy, x)])  # [2, C]


def of_means(f: Tensor) -> Tensor:
    a, b = (LAW * f).sum(-1)
    return a / b


def nothing(policy: Tensor, x: Tensor) -> Tensor:
    """What a price is added to: a function of means has no value in a context."""
    return torch.zeros(CONTEXTS, dtype=torch.float64)


CHOSEN, REJECTED = torch.tensor([0, 2, 1]), torch.tensor([1, 0, 2])


def labelled() -> PreferenceData:
    def answers(action: Tensor) -> Rollouts:
        steps = {"state": torch.tensor([[0, -1]] * 3), "action": action[:, None]}
        return Rollouts.bandit(contexts=torch.arange(3), steps=steps)

    return PreferenceData(answers(CHOSEN), answers(REJECTED))


def labels(policy: Tensor, x: Tensor) -> Tensor:
    r = reward_at(x)
    d = r[torch.arange(3), CHOSEN] - r[torch.arange(3), REJECTED]
    return torch.nn.functional.logsigmoid(d).mean().expand(CONTEXTS)


# The objectives: made for the library, and what they are by first principles.
BASES: dict[str, tuple[Callable[[], Objective], Exact]] = {
    "expected": (
        lambda: ExpectedUtility(utility(moving_score), depends_on_leader=True),
        Exact([(expected(moving_score), mean)]),
    ),
    "preferences": (
        lambda: PreferenceLikelihood(utility(lambda x: TASTE), scale=0.5),
        Exact([(pairs, mean)]),
    ),
    "labels": (labelled, Exact([(labels, mean)])),
    "sets": (lambda: SetUtility(BestOf(utility(lambda x: TASTE)), size=3), Exact([(best_of_three, mean)])),
    "means": (
        lambda: FunctionOfMeans(
            ratio, [ExpectedUtility(utility(of), depends_on_leader=True) for of in (moving_score, moving_cost)]
        ),
        Exact([(nothing, mean), (both_means, of_means)]),
    ),
}
LONG = ("expected", "preferences", "labels")  # with three wrappers; the others with two


def priced(exact: Exact) -> Exact:
    def with_price(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda policy, x: f(policy, x) - 0.3 * (policy * (policy.log() - PRIOR)).sum(-1)

    (f, risk), *rest = exact.parts
    return Exact([(with_price(f), risk), *rest])


def constrained(exact: Exact) -> Exact:
    cost = expected(lambda x: COST + 0.1 * x[2] * SCORE)
    return Exact([*exact.parts, (lambda policy, x: -0.6 * (cost(policy, x) - 0.2), mean)])


def regularised(exact: Exact) -> Exact:
    return Exact([*exact.parts, (lambda policy, x: 0.4 * labels(policy, x), mean)])


def at_risk(risk: Callable[[Tensor], Tensor]) -> Callable[[Exact], Exact]:
    def whole(exact: Exact) -> Exact:
        def total(policy: Tensor, x: Tensor) -> Tensor:
            return sum((f(policy, x) for f, _ in exact.parts), start=torch.zeros(CONTEXTS, dtype=torch.float64))

        return Exact([(total, risk)])

    return whole


def cvar(f: Tensor) -> Tensor:  # the worst 40 % of four equal contexts: the worst, and 0.6 of the second
    worst = f.sort().values
    return (worst[0] + 0.6 * worst[1]) / 1.6


def worst_topic(f: Tensor) -> Tensor:
    groups = torch.stack([f[torch.tensor([t == name for t in TOPICS])].mean() for name in ("law", "art")])
    return -0.2 * (torch.logsumexp(-groups / 0.2, 0) - math.log(2))


def soft_worst(f: Tensor) -> Tensor:
    return -0.2 * (torch.logsumexp(-f / 0.2, 0) - math.log(CONTEXTS))


def same(exact: Exact) -> Exact:
    return exact


WRAPPERS: dict[str, tuple[Callable[[Objective], Objective], Callable[[Exact], Exact]]] = {
    "priced": (lambda o: KLPriced(o, 0.3), priced),
    "constrained": (
        lambda o: Constrained(
            o,
            ExpectedUtility(utility(lambda x: COST + 0.1 * x[2] * SCORE), depends_on_leader=True),
            bound=0.2,
            rate=0.1,
            multiplier=0.6,
        ),
        constrained,
    ),
    "regularised": (lambda o: Regularised(o, labelled(), 0.4), regularised),
    "mean_variance": (
        lambda o: MeanVariance(o, 0.7),
        at_risk(lambda f: mean(f) - 0.7 * mean((f - mean(f)) ** 2)),
    ),
    "cvar": (lambda o: CVaR(o, 0.4), at_risk(cvar)),
    "entropic": (lambda o: EntropicRisk(o, 1.5), at_risk(lambda f: -(mean((-1.5 * f).exp())).log() / 1.5)),
    "worst_context": (lambda o: WorstContext(o, 0.2), at_risk(soft_worst)),
    "worst_group": (lambda o: WorstGroup(o, "topic", 0.2), at_risk(worst_topic)),
    "cross_fitted": (lambda o: CrossFitted(o), same),
}
RISKS = {"mean_variance", "cvar", "entropic", "worst_context", "worst_group"}


def chains() -> list[tuple[str, ...]]:
    """A base and up to three different wrappers around it, from the inside out."""
    orders = [order for n in range(4) for order in itertools.permutations(WRAPPERS, n)]
    return [(base, *order) for base in BASES for order in orders if base in LONG or len(order) < 3]


def reason_to_refuse(chain: tuple[str, ...]) -> str | None:
    """The name of the wrapper that cannot stand where it stands, by the rules that the docstrings give."""
    base, *wrappers = chain
    risky = False
    fitted = False
    for name in wrappers:
        if name in RISKS:
            if risky or base == "means":
                return {"cvar": "CVaR", "entropic": "EntropicRisk", "mean_variance": "MeanVariance"}.get(name, "Worst")
            risky = True
        if name == "cross_fitted":
            if not risky or fitted:
                return "CrossFitted"
            fitted = True
        if name == "regularised" and base == "labels" and wrappers.index(name) == 0:
            return "Regularised"
    return None


def build(chain: tuple[str, ...]) -> tuple[Objective, Exact]:
    made, exact = BASES[chain[0]]
    objective = made()
    for name in chain[1:]:
        wrap, transform = WRAPPERS[name]
        objective, exact = wrap(objective), transform(exact)
    return objective, exact


ALL = chains()
REFUSED = [chain for chain in ALL if reason_to_refuse(chain)]
ACCEPTED = [chain for chain in ALL if not reason_to_refuse(chain)]


def test_how_many_compositions_there_are() -> None:
    assert len(ALL) == 3 * (1 + 9 + 72 + 504) + 2 * (1 + 9 + 72)
    assert len(ACCEPTED) > 300 and len(REFUSED) > 300


def test_what_makes_no_sense_is_refused_by_name() -> None:
    for chain in REFUSED:
        with pytest.raises(InputError, match=str(reason_to_refuse(chain))):
            build(chain)


def problem_of(objective: Objective) -> Problem:
    cmdp = ContextualMDP(LAW, torch.ones(CONTEXTS, 1, dtype=torch.bool))
    return Problem(Bandit(), objective, ExactFollower(cmdp, temperature=TEMPERATURE, discount=0.0))


def close(found: Tensor, wanted: Tensor, chain: tuple[str, ...]) -> None:
    error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-3))
    assert error < 1e-9, f"{' > '.join(chain)}: {error:.2e}, {found.tolist()} against {wanted.tolist()}"


def test_tables_agree_with_enumeration() -> None:
    """J, its gradient, and the expectation of PolicyResponse: the referee's routes."""
    for chain in ACCEPTED:
        objective, exact = build(chain)
        problem = problem_of(objective)
        (x,) = problem.parameters
        if "worst_group" in chain:  # its groups are a column of data
            with pytest.raises(InputError, match="WorstGroup"):
                leader_value(problem)
            continue
        wanted = exact.value(x)
        (gradient,) = torch.autograd.grad(wanted, x)
        found = leader_value(problem)
        close(found.detach(), wanted.detach(), chain)
        close(torch.autograd.grad(found, x)[0], gradient, chain)
        close(exact_world(problem).objective, wanted.detach(), chain)
        close(expected_policy_response(problem)[0], gradient, chain)


class Enumerated(Leader):
    """The bandit as a leader of completions: every answer of every prompt in the batch, weighted by its probability."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(x.detach().clone())

    def reward(self, rollouts: Rollouts) -> Tensor:
        return reward_at(self.x)[rollouts.contexts, rollouts.steps["action"][:, 0]][:, None]


def enumerated(x: Tensor) -> Rollouts:
    policy = torch.softmax(reward_at(x.detach()) / TEMPERATURE + PRIOR, -1)
    contexts = torch.arange(CONTEXTS).repeat_interleave(ANSWERS)
    action = torch.arange(ANSWERS).repeat(CONTEXTS)
    return Rollouts.bandit(
        contexts=contexts,
        steps={
            "action": action[:, None],
            "state": torch.tensor([[0, -1]]).expand(len(action), -1),
            "topic": [TOPICS[c] for c in contexts.tolist()],
        },
        log_policy=policy.log().reshape(-1),
        log_prior=PRIOR.reshape(-1),
        weight=policy.reshape(-1) * ANSWERS,
    )


def score_of(of: Callable[[Tensor], Tensor]) -> Callable[[Any, Rollouts], Tensor]:
    return lambda leader, rollouts: of(leader.x)[rollouts.contexts, rollouts.steps["action"][:, 0]][:, None]


@pytest.fixture
def language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], tuple[Leader, Rollouts]]:
    """The same tables for all 57 completions of four prompts; the prior is a Llama's, and the leader reads tokens."""
    folder = lm.build(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    enumeration = lm.Enumeration.random(seed=3)
    prior = torch.log_softmax(enumeration.log_probs(AutoModelForCausalLM.from_pretrained(folder), tokenizer), -1)
    shape = tuple(prior.shape)
    monkeypatch.setitem(globals(), "ANSWERS", shape[1])
    monkeypatch.setitem(globals(), "PRIOR", prior)
    for name in ("SCORE", "COST", "TASTE", "REWARD", "MOVED"):
        monkeypatch.setitem(globals(), name, torch.rand(shape, generator=GENERATOR, dtype=torch.float64))

    class Tokens(lm.LinearLeader):
        """r_x of a completion, found by its tokens; labelled pairs are rows of the tables."""

        def reward(self, rollouts: Rollouts) -> Tensor:
            if "completion_ids" not in rollouts.steps:
                return reward_at(self.x)[rollouts.contexts, rollouts.steps["action"][:, 0]][:, None]
            place = enumeration.index(rollouts.steps["prompt"], rollouts.steps["completion_ids"])
            return reward_at(self.x)[place][:, None]

    def world(x: Tensor) -> tuple[Leader, Rollouts]:
        plain = enumerated(x)
        tokens = enumeration.completions * CONTEXTS
        prompts = [lm.PROMPTS[c] for c in plain.contexts.tolist()]
        steps = {**plain.steps, "prompt": prompts, "completion_ids": tokens}
        return Tokens(enumeration, x), dataclasses.replace(plain, steps=steps)

    return world


def bandit(x: Tensor) -> tuple[Leader, Rollouts]:
    return Enumerated(x), enumerated(x)


@pytest.fixture
def sampled_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Utilities that read completions instead of tables."""
    monkeypatch.setitem(globals(), "utility", score_of)


class ExactCredit:
    """The critic of a bandit that is enumerated: credit less its exact mean under the policy."""

    def evaluate(self, problem: Any, rollouts: Rollouts, credit: Tensor) -> Any:
        from align_cbrl import Critique

        weight = rollouts.path_weight().view(CONTEXTS, ANSWERS) / ANSWERS
        by_context = credit[:, 0].view(CONTEXTS, ANSWERS)
        return Critique((by_context - (weight * by_context).sum(1, keepdim=True)).reshape(-1, 1))


@pytest.mark.parametrize("world", ["bandit", "language_model"])
def test_samples_agree_with_enumeration(world: str, request: pytest.FixtureRequest, sampled_functions: None) -> None:
    """PolicyResponse on weighted rollouts that hold every answer: J and its gradient are exact, not estimates.

    Pairs and sets within a group leave out an answer's pair with itself, and cross-fitting leaves out pairs; both are
    right in expectation over samples only, and have tests of their own. What is checked of them here is that wrapping
    does not change them: a chain around a cross-fitted risk is the chain around the plain one, where that is linear.
    """
    x = torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64)
    make = bandit if world == "bandit" else request.getfixturevalue(world)
    for chain in ACCEPTED:
        if chain[0] in ("preferences", "sets") or "cross_fitted" in chain:
            continue
        objective, exact = build(chain)
        leader, rollouts = make(x)
        follower = type("Fixed", (), {"temperature": TEMPERATURE, "discount": 0.0})()
        problem = Problem(leader, objective, follower)
        leaf = x.clone().requires_grad_(True)
        wanted = exact.value(leaf)
        (gradient,) = torch.autograd.grad(wanted, leaf)
        found = PolicyResponse(ExactCredit(), chunks=3).backward(problem, rollouts)  # type: ignore[arg-type]
        close(torch.tensor(found["objective"], dtype=torch.float64), wanted.detach(), chain)
        (moved,) = leader.parameters()
        assert moved.grad is not None
        close(moved.grad, gradient, chain)


def test_wrapping_commutes_with_cross_fitting(sampled_functions: None) -> None:
    """Price, constraint and regulariser around CrossFitted(risk) are CrossFitted(those around the risk), sample by
    sample; so are they around or inside the price, which is charged on the utility."""
    x = torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64)
    rollouts = dataclasses.replace(enumerated(x), weight=None)

    def gradient(chain: tuple[str, ...]) -> Tensor:
        objective, _ = build(chain)
        leader = Enumerated(x)
        follower = type("Fixed", (), {"temperature": TEMPERATURE, "discount": 0.0})()
        value = PolicyResponse().backward(Problem(leader, objective, follower), rollouts)["objective"]
        assert leader.x.grad is not None
        return torch.cat([leader.x.grad, torch.tensor([value], dtype=torch.float64)])

    for risk in sorted(RISKS):
        for outer in ("priced", "constrained", "regularised"):
            around = gradient(("expected", risk, "cross_fitted", outer))
            torch.testing.assert_close(around, gradient(("expected", risk, outer, "cross_fitted")))
            if outer == "priced":
                torch.testing.assert_close(around, gradient(("expected", outer, risk, "cross_fitted")))


def test_a_price_around_the_worst_group_prices_the_utility_alone() -> None:
    """In 0.1.0 the numbers of the groups stood beside the utility, and were priced too: two groups became four."""
    steps = {"score": torch.tensor([0.2, 1.0, -0.4, 0.6]), "topic": ["law", "law", "art", "art"]}
    rollouts = Rollouts.bandit(
        contexts=torch.arange(4), steps=steps,
        log_policy=torch.tensor([-0.5, -1.0, -0.1, -2.0]), log_prior=torch.tensor([-1.5, -1.0, -1.1, -1.0]),
    )  # fmt: skip
    score = ExpectedUtility(lambda leader, r: r.steps["score"][:, None])
    leader = Enumerated(torch.zeros(3))
    outside = KLPriced(WorstGroup(score, "topic"), 0.5).evaluate(leader, rollouts)
    inside = WorstGroup(KLPriced(score, 0.5), "topic").evaluate(leader, rollouts)
    priced = steps["score"] - 0.5 * torch.tensor([1.0, 0.0, 1.0, -1.0])
    assert outside.value.item() == pytest.approx(min(priced[:2].mean(), priced[2:].mean()).item())
    assert outside.value.item() == inside.value.item()
    torch.testing.assert_close(outside.credit, inside.credit)


def test_one_judge_is_asked_once_for_objective_and_cost(sampled_functions: None) -> None:
    asked = []

    def judge(leader: Any, rollouts: Rollouts) -> Tensor:
        asked.append(rollouts.size)
        return rollouts.steps["action"].double()

    objective = Constrained(ExpectedUtility(judge), ExpectedUtility(judge), 0.0, 0.1)
    rollouts = enumerated(torch.zeros(3, dtype=torch.float64))
    problem = Problem(Enumerated(torch.zeros(3)), objective, type("F", (), {"temperature": 1.0, "discount": 0.0})())
    observed = observe(problem, rollouts, chunks=2)
    assert asked == [6, 6]
    objective.observe(problem.leader, rollouts.knowing(observed.lasting))
    assert asked == [6, 6]
