"""Hypergradients of every leader and objective on a language model whose completions can all be enumerated.

Exact: the best response over all 57 completions of each prompt, J as a differentiable function of x, and autograd.
Sampled: completions drawn from that best response, through `PolicyResponse`. The two must agree within four standard
errors, along the exact gradient and along random directions. Estimates of risks whose slopes are not linear have a bias
of order 1 / G, so that those take large groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import pytest
import tiny_reward_models
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_cbrl import (
    BestOf,
    Constrained,
    CrossFitted,
    CVaR,
    Distinct,
    ExpectedUtility,
    FunctionOfMeans,
    KLPriced,
    Leader,
    MeanVariance,
    Objective,
    PolicyResponse,
    PreferenceLikelihood,
    Problem,
    Rollouts,
    SetUtility,
    WorstGroup,
)
from align_cbrl.llm import LearnedBeta, LengthShaping, LoRA, RewardMixture, RewardModel, RewardModelLeader, Shaped
from align_cbrl.objectives import target_shares
from align_cbrl.problem import Observed

TEMPERATURE = 0.7
TOPICS = ["law", "art", "law", "art"]  # of the four prompts


@dataclasses.dataclass
class World:
    """All completions of all prompts: [P, N] tables, and the rollouts that hold each once."""

    enumeration: lm.Enumeration
    tokenizer: Any
    log_prior: Tensor  # [P, N]
    cost: Tensor  # [P, N]
    texts: list[str]
    reward_model: Path

    def rollouts(self, prompt: Tensor, answer: Tensor, log_policy: Tensor | None = None) -> Rollouts:
        """Rows (prompt, answer), groups being prompts."""
        where = (prompt, answer)
        return Rollouts.bandit(
            contexts=prompt,
            steps={
                "prompt": [lm.PROMPTS[p] for p in prompt.tolist()],
                "completion": [self.texts[a] for a in answer.tolist()],
                "completion_ids": [self.enumeration.completions[a] for a in answer.tolist()],
                "topic": [TOPICS[p] for p in prompt.tolist()],
                "row": prompt * len(self.texts) + answer,
            },
            log_policy=None if log_policy is None else log_policy[where],
            log_prior=self.log_prior[where],
        )

    def everything(self) -> Rollouts:
        """Every completion of every prompt, once."""
        prompts, count = len(lm.PROMPTS), len(self.texts)
        return self.rollouts(torch.arange(prompts).repeat_interleave(count), torch.arange(count).repeat(prompts))

    def table(self, values: Tensor) -> Callable[[Any, Rollouts], Tensor]:
        """A utility that looks its values up."""
        return lambda leader, rollouts: values.reshape(-1)[rollouts.steps["row"]][:, None]

    def response(self, leader: Leader) -> tuple[Tensor, Tensor]:
        """r_x and log pi* [P, N], differentiable in x."""
        reward = leader.reward(self.everything()).double().view(self.log_prior.shape)
        temperature = leader.follower_temperature()
        temperature = TEMPERATURE if temperature is None else temperature.double()
        return reward, torch.log_softmax(self.log_prior + reward / temperature, -1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = lm.build(tmp_path_factory.mktemp("enumerable"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    enumeration = lm.Enumeration.random(seed=11)
    log_prior = enumeration.log_probs(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    reward_model = tiny_reward_models.build(tmp_path_factory.mktemp("reward_model") / "llama")
    # Prompts differ in what they are worth, so that the worst of them are clearly the worst.
    enumeration.utility = enumeration.utility + torch.tensor([0.0, 6.0, 3.0, 9.0])[:, None]
    return World(
        enumeration,
        tokenizer,
        torch.log_softmax(log_prior, -1),
        torch.randn(log_prior.shape, generator=torch.Generator().manual_seed(12), dtype=torch.float64),
        tokenizer.batch_decode(enumeration.completions, skip_special_tokens=True),
        reward_model,
    )


# ---- objectives: how the library is told, the exact J, and the size of groups that shows four standard errors ----


@dataclasses.dataclass(frozen=True)
class Wanted:
    make: Callable[[World], Objective]
    exact: Callable[[World, Tensor, Tensor], Tensor]  # reward, log pi* -> J
    group: int


def expected(world: World) -> ExpectedUtility:
    return ExpectedUtility(world.table(world.enumeration.utility))


def values(world: World, log_policy: Tensor) -> Tensor:
    """What each prompt is worth, [P]."""
    return (log_policy.exp() * world.enumeration.utility).sum(-1)


def divergence(world: World, log_policy: Tensor) -> Tensor:
    return (log_policy.exp() * (log_policy - world.log_prior)).sum(-1).mean()


def exact_likelihood(world: World, reward: Tensor, log_policy: Tensor) -> Tensor:
    utility, policy = world.enumeration.utility, log_policy.exp()
    preferred = torch.sigmoid((utility[:, :, None] - utility[:, None, :]) / 0.8)
    difference = reward[:, :, None] - reward[:, None, :]
    pair = preferred * torch.nn.functional.logsigmoid(difference)
    pair = pair + (1 - preferred) * torch.nn.functional.logsigmoid(-difference)
    return (policy[:, :, None] * policy[:, None, :] * pair).sum((1, 2)).mean()


def said(world: World) -> Callable[[Rollouts, Tensor, Tensor], Tensor]:
    """The preferences of `exact_likelihood`, said pair by pair."""

    def preference(rollouts: Rollouts, first: Tensor, second: Tensor) -> Tensor:
        score = world.enumeration.utility.reshape(-1)[rollouts.steps["row"]]
        return torch.sigmoid((score[first] - score[second]) / 0.8)

    return preference


def exact_best_of(world: World, log_policy: Tensor, size: int) -> Tensor:
    """The highest of k scores: answers in order of their score, and the k-th power of the probability below each."""
    score, order = world.enumeration.utility.sort(-1)
    below = log_policy.exp().gather(-1, order).cumsum(-1)
    reached = below**size - torch.nn.functional.pad(below[:, :-1], (1, 0)) ** size
    return (reached * score).sum(-1).mean()


def first_tokens(world: World) -> Tensor:
    """The kind of an answer: its first token, [P, N]."""
    return torch.tensor([ids[0] for ids in world.enumeration.completions]).expand(world.log_prior.shape)


def exact_distinct(world: World, log_policy: Tensor, size: int) -> Tensor:
    """Kinds of good answers among k: one less the probability that none of the k is of the kind, summed up."""
    kinds, good = first_tokens(world), world.cost > 0
    total = torch.zeros(len(log_policy), dtype=torch.float64)
    for kind in kinds.unique():
        total = total + 1 - (1 - (log_policy.exp() * (good & (kinds == kind))).sum(-1)) ** size
    return total.mean()


def agreeing(world: World) -> Callable[[Rollouts, Tensor], Tensor]:
    """A judge of sets of three: the product of their costs."""
    return lambda rollouts, sets: world.cost.reshape(-1)[rollouts.steps["row"]][sets].prod(-1)


LENGTHS = [0.2, 0.3, 0.5]  # shares wanted of answers of no, one and two words


def words_of(world: World) -> Tensor:
    return torch.tensor([len(text.split()) for text in world.texts]).expand(world.log_prior.shape)


def of_lengths(world: World) -> list[ExpectedUtility]:
    return [ExpectedUtility(world.table((words_of(world) == n).double())) for n in range(3)]


def exact_targets(world: World, log_policy: Tensor) -> Tensor:
    shares = torch.stack([(log_policy.exp() * (words_of(world) == n)).sum(-1).mean() for n in range(3)])
    wanted = torch.tensor(LENGTHS, dtype=torch.float64)
    return -(wanted * (wanted / shares).log()).sum()


def of_topics(worth: Tensor) -> Tensor:
    return torch.stack([worth[[0, 2]].mean(), worth[[1, 3]].mean()])


OBJECTIVES = {
    "expected": Wanted(expected, lambda w, r, p: values(w, p).mean(), 8),
    "preference": Wanted(
        lambda w: PreferenceLikelihood(w.table(w.enumeration.utility), scale=0.8), exact_likelihood, 8
    ),
    "preference of pairs": Wanted(
        lambda w: PreferenceLikelihood(preference=said(w), partners=2), exact_likelihood, 8
    ),
    "cvar": Wanted(
        lambda w: CrossFitted(CVaR(expected(w), 0.6)), lambda w, r, p: CVaR(expected(w), 0.6).aggregate(
            values(w, p), torch.full((4,), 0.25, dtype=torch.float64)), 64,
    ),
    "worst_group": Wanted(
        lambda w: CrossFitted(WorstGroup(expected(w), "topic")), lambda w, r, p: of_topics(values(w, p)).min(), 64
    ),
    "mean_variance": Wanted(
        lambda w: CrossFitted(MeanVariance(expected(w), 0.5)),
        lambda w, r, p: values(w, p).mean() - 0.5 * values(w, p).var(correction=0), 8,
    ),
    "kl_priced": Wanted(
        lambda w: KLPriced(expected(w), 0.3), lambda w, r, p: values(w, p).mean() - 0.3 * divergence(w, p), 8
    ),
    "constrained": Wanted(
        lambda w: Constrained(expected(w), ExpectedUtility(w.table(w.cost)), bound=0.1, rate=0.1, multiplier=0.7),
        lambda w, r, p: values(w, p).mean() - 0.7 * ((p.exp() * w.cost).sum(-1).mean() - 0.1), 8,
    ),
    "best of 3": Wanted(
        lambda w: SetUtility(BestOf(w.table(w.enumeration.utility)), 3), lambda w, r, p: exact_best_of(w, p, 3), 8
    ),
    "good kinds among 4": Wanted(
        lambda w: SetUtility(Distinct(w.table(first_tokens(w)), w.table(w.cost), least=1e-12), 4),
        lambda w, r, p: exact_distinct(w, p, 4), 8,
    ),
    "judge of sets": Wanted(
        lambda w: SetUtility(agreeing(w), 3, subsets=16),
        lambda w, r, p: ((p.exp() * w.cost).sum(-1) ** 3).mean(), 8,
    ),
    "targets": Wanted(
        lambda w: FunctionOfMeans(target_shares(LENGTHS), of_lengths(w)), lambda w, r, p: exact_targets(w, p), 64
    ),
}  # fmt: skip


# ---- leaders ----


def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(c.split())) for c in completions]


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(c.count("a") - c.count("e")) for c in completions]


def echo(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(w in p.split() for w in c.split())) for p, c in zip(prompts, completions, strict=True)]


def mixture(constraint: str) -> RewardMixture:
    terms = {"echo": echo, "length": length, "letters": letters}
    return RewardMixture(terms, {"echo": 0.6, "length": 0.3, "letters": 0.4}, budget=3.0, constraint=constraint)


def reward_model(world: World, trainable: str) -> RewardModelLeader:
    lora = LoRA(rank=2, alpha=8.0) if trainable == "lora" else None
    leader = RewardModelLeader(RewardModel(world.reward_model), trainable, strength=1.2, lora=lora)
    with torch.no_grad():  # an adapter's B starts at zero, where nothing moves its A
        for name, p in leader.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    return leader


LEADERS: dict[str, Callable[[World], Any]] = {
    "linear": lambda w: lm.LinearLeader(w.enumeration, torch.tensor([0.5, -0.3, 0.2, 0.4, -0.1], dtype=torch.float64)),
    "mixture free": lambda w: mixture("free"),
    "mixture positive": lambda w: mixture("positive"),
    "mixture softmax": lambda w: mixture("softmax"),
    "model head": lambda w: reward_model(w, "head"),
    "model lora": lambda w: reward_model(w, "lora"),
    "model all": lambda w: reward_model(w, "all"),
    "shaped by mixture": lambda w: Shaped(echo, mixture("free")),
    "shaped by model": lambda w: Shaped(echo, reward_model(w, "head")),
    "length shaping": lambda w: LengthShaping(echo, target=1.0, weight=0.5, learn_target=True),
    "beta around mixture": lambda w: LearnedBeta(mixture("softmax"), 0.6, low=0.1, high=2.0),
    "beta around head": lambda w: LearnedBeta(reward_model(w, "head"), 0.9, low=0.1, high=2.0),
}
FAST = ("linear", "mixture softmax", "beta around mixture")


def calibrated(world: World, name: str) -> Any:
    leader = LEADERS[name](world)
    if hasattr(leader, "calibrate"):
        leader.calibrate(world.everything())
    return leader


# ---- the comparison ----


def flat(gradients: list[Tensor | None], parameters: list[Tensor]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1).double() for g, p in pairs])


def deviation(world: World, leader: Leader, wanted: Wanted, *, batches: int, seed: int = 0, **changes: Any) -> float:
    """The largest of the deviations from the exact hypergradient, in standard errors."""
    objective = changes.pop("objective", None) or wanted.make(world)
    follower = type("Enumerated", (), {"temperature": TEMPERATURE, "discount": 0.0})()
    problem = Problem(leader, objective, follower)
    parameters = problem.parameters
    reward, log_policy = world.response(leader)
    exact = torch.autograd.grad(wanted.exact(world, reward, log_policy), parameters, allow_unused=True)
    exact = flat(list(exact), parameters)
    assert exact.norm() > 1e-3  # or else there would be nothing to be compared

    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(6, len(exact), generator=generator, dtype=torch.float64)
    directions = torch.cat([exact[None], directions])
    log_policy, group = log_policy.detach(), changes.get("group", wanted.group)
    prompt = torch.arange(len(lm.PROMPTS)).repeat_interleave(group)
    estimates = []
    for _ in range(batches):
        answer = torch.multinomial(log_policy.exp(), group, replacement=True, generator=generator).reshape(-1)
        for p in parameters:
            p.grad = None
        PolicyResponse(chunks=2).backward(problem, world.rollouts(prompt, answer, log_policy))
        estimates.append(directions @ flat([p.grad for p in parameters], parameters))
    along = torch.stack(estimates)
    error = along.std(0) / batches**0.5
    return float(((along.mean(0) - directions @ exact) / error).abs().max())


@pytest.mark.parametrize("leader", FAST)
def test_hypergradients_within_four_standard_errors(world: World, leader: str) -> None:
    z = {name: deviation(world, calibrated(world, leader), w, batches=40) for name, w in OBJECTIVES.items()}
    assert max(z.values()) <= 4, z


@pytest.mark.slow
@pytest.mark.parametrize("leader", LEADERS)
def test_the_whole_grid_within_four_standard_errors(world: World, leader: str) -> None:
    z = {name: deviation(world, calibrated(world, leader), w, batches=100, seed=1) for name, w in OBJECTIVES.items()}
    print(f"{leader:20s}", " ".join(f"{name} {value:.1f}" for name, value in z.items()))
    assert max(z.values()) <= 4, z


def test_an_answer_may_have_any_number_of_partners_but_not_the_wrong_factor(world: World) -> None:
    wanted, leader = OBJECTIVES["preference of pairs"], calibrated(world, "linear")

    class Unscaled(PreferenceLikelihood):
        def summarize(self, observed: Observed) -> Any:
            evaluation = super().summarize(observed)
            return dataclasses.replace(evaluation, credit=evaluation.credit / 2)  # G = 3: (G - 2) / (G - 1)

    for partners, group in ((2, 3), (2, 5)):
        objective = PreferenceLikelihood(preference=said(world), partners=partners)
        assert deviation(world, leader, wanted, batches=150, objective=objective, group=group) <= 4
    wrong = Unscaled(preference=said(world), partners=2)
    assert deviation(world, leader, wanted, batches=300, objective=wrong, group=3) > 6
