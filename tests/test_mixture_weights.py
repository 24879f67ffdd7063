"""The weights of a mixture: terms that never varied or vary little, and where searches and fits may put them."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from align_cbrl.recipes.tune_weights.recipe import Config
from align_cbrl.recipes.tune_weights.search import SearchSettings, search
from torch import Tensor

from align_cbrl import InputError, Rollouts
from align_cbrl.llm import LengthShaping, RewardMixture, Shaped
from align_cbrl.llm.leaders.mixture import Constraint
from align_cbrl.llm.scoring import ScoreFunction
from align_cbrl.llm.settings.leader import MixtureSettings
from align_cbrl.runs.config import load_config
from align_cbrl.runs.imports import load_recipe, recipes_folder

TEXTS = ["x" * (1 + (3 * i) % 7) for i in range(16)]
BATCH = Rollouts.bandit(
    contexts=torch.arange(4).repeat_interleave(4), steps={"prompt": ["q"] * 16, "completion": TEXTS}
)
CONSTRAINTS = get_args(Constraint)


def scored(unit: float, offset: float = 0.0) -> ScoreFunction:
    return lambda completions: [offset + unit * len(text) for text in completions]


def bonus(completions: list[str]) -> list[float]:
    """Never earned among the calibrating completions."""
    return [1000.0 * text.startswith("{") for text in completions]


def mixture(terms: dict[str, ScoreFunction], constraint: Constraint = "free", **settings: Any) -> RewardMixture:
    made = RewardMixture(terms, settings.pop("weights", None), constraint=constraint, **settings)
    made.calibrate(BATCH)
    return made


@pytest.mark.parametrize("unit", [1e-300, 1e-12, 1e-9, 1.0, 1e9, 1e150])
def test_terms_of_any_unit_are_standardised_alike(unit: float) -> None:
    made = mixture({"length": scored(1.0), "other": scored(unit)})
    first, second = made.features(["q"] * 16, TEXTS).T
    torch.testing.assert_close(first, second)
    frozen = LengthShaping(scored(unit), target=3)
    frozen.calibrate(BATCH)
    torch.testing.assert_close(frozen.frozen_score(["q"] * 16, TEXTS), first)


@pytest.mark.parametrize(
    "still",
    [
        bonus,
        lambda completions: [0.1] * len(completions),
        lambda completions: [1e12 + 1e-4 * len(text) for text in completions],  # below double precision
        lambda completions: torch.tensor([3.0 + 1e-7 * len(text) for text in completions]),  # below single precision
    ],
)
def test_a_term_that_never_varied_is_named_and_its_weight_stays_within_the_budget(still: ScoreFunction) -> None:
    for constraint in CONSTRAINTS:
        with pytest.warns(UserWarning, match=r"RewardMixture.terms: 'still': the same score .* budget 2 bounds"):
            made = mixture({"length": scored(1.0), "still": still}, constraint, weights={"length": 1.0}, budget=2.0)
        with torch.no_grad():
            (parameter,) = made.parameters()
            parameter.copy_(torch.tensor([0.0, 1e6]))
        made.project()
        assert abs(made.weights()["still"]) <= 2.0 * (1 + 1e-9) and made.scale[1] == 1.0
        assert made.spread() <= 2.0 * (1 + 1e-9)
    with pytest.warns(UserWarning, match="'still'"):
        correction = RewardMixture({"still": still}, {})
        corrected = Shaped(scored(1.0), correction, budget=0.5)
        corrected.calibrate(BATCH)
    with torch.no_grad():
        correction.weight.fill_(1e6)
    corrected.project()
    assert correction.weight.item() == pytest.approx(0.5)
    with pytest.raises(InputError, match="frozen: cannot be standardised"):
        LengthShaping(still, target=3).calibrate(BATCH)


def test_plain_rlhf_on_a_proxy_that_never_varied_says_so() -> None:
    with pytest.warns(UserWarning, match="'proxy': .* a policy learns nothing from such a term until"):
        MixtureSettings().build({"proxy": bonus}, BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MixtureSettings().build({"proxy": scored(1e-12)}, BATCH)


def test_a_start_of_correlated_terms_keeps_the_budget() -> None:
    made = mixture({"length": scored(1.0), "copy": scored(2.0)}, weights={"length": 0.6, "copy": 0.6}, budget=1.0)
    assert made.weights() == pytest.approx({"length": 0.5, "copy": 0.5}) and made.spread() == pytest.approx(1.0)


TERMS: dict[str, ScoreFunction] = {
    "length": scored(1.0),
    "copy": scored(2.0),
    "short": scored(-1.0),
    "odd": lambda completions: [float(len(text) % 2) for text in completions],
}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_directions_end_in_the_constraint_on_the_boundary_of_the_budget(constraint: Constraint) -> None:
    generator = torch.Generator().manual_seed(0)
    made = mixture(TERMS, constraint, weights={"length": 0.5}, budget=0.5)
    for i in range(50):
        direction = torch.rand(4, generator=generator, dtype=torch.float64) * 2 - 1 if i else torch.zeros(4)
        made.aim(direction)
        weight = made.effective_weight().detach()
        assert made.spread() <= 0.5 * (1 + 1e-9) and weight.abs().max() <= 500
        if constraint == "free" and i:
            torch.testing.assert_close(weight / weight.norm(), direction / direction.norm())
        assert constraint == "free" or (weight >= 0).all()
        assert constraint != "softmax" or weight.sum().item() == pytest.approx(0.5)
        assert constraint != "positive" or i == 0 or bool((weight[direction < 0] == 0).all())
    made.aim(torch.tensor([1.0, -1.0, 0.0, 0.0]))  # a term and its copy cancel
    assert 0.1 < made.effective_weight().detach().abs().max() <= 500
    made.aim(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    share = made.weights()["length"] / sum(made.weights().values())
    assert share == pytest.approx(1 / 1.03 if constraint == "softmax" else 1.0)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_fit_is_the_best_of_the_constraint(constraint: Constraint) -> None:
    terms = {name: TERMS[name] for name in ("length", "odd")}
    terms["square"] = lambda completions: [len(text) ** 2.0 for text in completions]
    made = mixture(terms, constraint, weights={"length": 1.0})
    features = made.features(["q"] * 16, TEXTS)
    within = features - features.view(4, 4, 3).mean(1).repeat_interleave(4, 0)
    labels = within @ torch.tensor([-1.0, 0.5, 1.5], dtype=torch.float64)  # cutting at zero is not the best

    def describes() -> float:
        described = within @ made.effective_weight().detach()
        return float(described @ labels / described.norm() / labels.norm())

    made.fit(within, labels)
    fitted, weight = describes(), made.effective_weight().detach()
    assert (weight >= 0).all() or constraint == "free"
    assert fitted == pytest.approx(1.0) or constraint != "free"
    for i in range(300):
        drawn = torch.rand(3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        made.aim(2 * drawn - 1 if constraint == "free" else drawn)
        assert describes() <= fitted + (1e-3 if constraint == "softmax" else 1e-9)  # a softmax keeps a hundredth
    made.fit(within, -within[:, 0])
    assert made.spread() <= 1 + 1e-9


@pytest.mark.parametrize("constraint", ["free", "positive"])
def test_a_fit_at_a_scale_is_the_least_squares_weights_times_it(constraint: Constraint) -> None:
    made = mixture({name: TERMS[name] for name in ("length", "odd")}, constraint, weights={"length": 0.5})
    features = made.features(["q"] * 16, TEXTS)
    within = features - features.view(4, 4, 2).mean(1).repeat_interleave(4, 0)
    wanted = torch.tensor([0.3, 0.1], dtype=torch.float64)
    made.fit(within, within @ wanted, 0.5)
    torch.testing.assert_close(made.effective_weight().detach(), 0.5 * wanted, rtol=1e-9, atol=1e-12)
    made.fit(within, within @ wanted, 1e6)  # no further than the budget
    assert made.spread() == pytest.approx(made.budget)


@pytest.mark.parametrize("kind", ["random", "tpe"])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_every_trial_keeps_the_constraint_and_a_stopped_search_continues(
    kind: Any, constraint: Constraint, tmp_path: Path
) -> None:
    class Follower:
        def train(self, leader: RewardMixture, steps: int) -> None:
            self.weights = leader.effective_weight().detach()

        def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
            return torch.zeros(count)

        def rollout(self, *_: Any) -> Tensor:
            return self.weights

    bench: Any = SimpleNamespace(
        seed=0, data={"train": TEXTS}, follower=lambda seed: Follower(), point=lambda follower: {"judge": 0.0},
        judge=lambda _, weights: weights @ torch.tensor([1.0, 2.0, -1.0, -2.0], dtype=torch.float64),
        leader=lambda: mixture(TERMS, constraint, weights={"length": 1.0}),
    )  # fmt: skip
    trials = search(bench, kind, SearchSettings(trials=12), tmp_path / "a")
    for trial in trials:
        weight = torch.tensor(list(trial["weights"].values()), dtype=torch.float64)
        assert constraint == "free" or (weight >= 0).all()
        assert constraint != "softmax" or weight.sum().item() == pytest.approx(1.0)
        assert float((weight @ bench.leader().correlation @ weight).sqrt()) <= 1 + 1e-9
    assert len({tuple(trial["weights"].values()) for trial in trials}) == 12
    search(bench, kind, SearchSettings(trials=5), tmp_path / "b")
    assert search(bench, kind, SearchSettings(trials=12), tmp_path / "b") == trials


def test_rivals_of_a_learned_temperature_are_refused() -> None:
    from align_cbrl.llm.settings.leader import BetaSettings

    leader = MixtureSettings(beta=BetaSettings(start=0.5, low=0.1, high=1.0))
    Config(leader=leader)
    with pytest.raises(InputError, match=r"leader.beta: tpe, refit search weights at a fixed temperature"):
        Config(leader=leader, methods=["hpgd", "tpe", "refit"])


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("tune_weights", "search.trials=0", r"trials: expected a whole number >= 1, got 0"),
        ("reward_model", "strengths=[0.5, .nan]", r"strengths.*1\]?: expected a finite number"),
        ("reward_model", "plain_strength=.inf", "plain_strength: expected a finite number"),
        ("reward_model", "refit_passes=0", "refit_passes: expected a whole number >= 1, got 0"),
        ("reward_model", "variants.head.learning_rate=-1", r"head.learning_rate: expected a finite number > 0"),
        ("reward_model", "variants.lora.replays=2", r"variants.lora.*replays: belongs to a learning_rate"),
        ("overoptimization", "grid=[1, 0]", r"grid.1: expected a finite number > 0"),
    ],
)
def test_numbers_of_the_recipes_are_finite_and_in_range(recipe: str, override: str, message: str) -> None:
    loaded: Any = load_recipe(recipe)
    with pytest.raises(InputError, match=message):
        load_config(loaded.Config, recipes_folder() / recipe / "config.yaml", [override])
