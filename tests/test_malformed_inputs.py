"""Every public constructor looks at its arguments: each is fed rubbish, one argument at a time, by hypothesis."""

from __future__ import annotations

import collections
import importlib
import inspect
import json
import math
import pkgutil
import signal
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import tiny_models
import tiny_reward_models
import torch
from datasets import Dataset, DatasetDict
from enumerable_lm import length_reward
from hypothesis import given, settings
from hypothesis import strategies as st

import align_cbrl
import toy_cmdp
from align_cbrl import checks, gym, llm
from align_cbrl.errors import CheckpointError, InputError, RunStopped
from align_cbrl.llm.settings import follower, hpgd, judge, leader, objective, tracking

# Raised and caught, or met only as the base of a user's class; numbers never enter them.
NOT_CONSTRUCTED = {"InputError", "RunStopped", "CheckpointError"}


def _public() -> dict[str, Any]:
    """Every class and function that a package names in `__all__`."""
    packages: list[types.ModuleType] = [align_cbrl, toy_cmdp, llm]
    for base in (align_cbrl, toy_cmdp):
        for module in pkgutil.walk_packages(base.__path__, base.__name__ + "."):
            if module.ispkg and "recipes" not in module.name:
                packages.append(importlib.import_module(module.name))
    found = {}
    for package in packages:
        for name in getattr(package, "__all__", ()):
            thing = getattr(package, name)
            if (inspect.isclass(thing) or inspect.isfunction(thing)) and name not in NOT_CONSTRUCTED:
                found[name] = thing
    return found


PUBLIC = _public()
SETTINGS = {
    kind.__name__: kind
    for module in (follower, hpgd, judge, leader, objective, tracking)
    for kind in vars(module).values()
    if inspect.isclass(kind) and kind.__module__ == module.__name__ and hasattr(kind, "__dataclass_fields__")
}


def _arguments(thing: Any) -> list[inspect.Parameter]:
    function = thing.__init__ if inspect.isclass(thing) else thing
    given_ = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return [p for p in given_ if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


@pytest.mark.parametrize("name", sorted({**PUBLIC, **SETTINGS}))
def test_every_public_constructor_is_checked(name: str) -> None:
    thing = {**PUBLIC, **SETTINGS}[name]
    if _arguments(thing):
        function = thing.__init__ if inspect.isclass(thing) else thing
        assert function.__code__.co_filename == checks.__file__, f"{name}: put @checked above it (align_cbrl/checks.py)"


def _utility(leader: Any, rollouts: Any) -> torch.Tensor:
    return torch.zeros(rollouts.mask.shape)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Arguments that each public constructor takes, by name; those with a default need none."""
    folder = tmp_path_factory.mktemp("models")
    policy = tiny_models.build(folder / "policy", "llama")
    scorer = llm.RewardModel(tiny_reward_models.build(folder / "scorer"))
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": p, "chosen": "a", "rejected": "b"}) for p in "abcdefgh"))
    prompts = Dataset.from_dict({"prompt": [f"prompt {i}" for i in range(8)]})
    problem = toy_cmdp.random_cmdp()
    cmdp = problem.follower.cmdp
    feedback: Any = toy_cmdp.lqr()
    tables = problem.leader.tables()
    rollouts = align_cbrl.Rollouts.bandit(contexts=torch.tensor([0, 0, 1, 1]), steps={"cell": torch.arange(4)[:, None]})
    expected = align_cbrl.ExpectedUtility(_utility)
    mixture = llm.RewardMixture({"length": length_reward})
    of_cmdp = {"cmdp": cmdp, "temperature": 0.5, "discount": 0.9}
    of_follower = {"model": str(policy), "prompts": prompts, "temperature": 1.0}
    table = torch.zeros(2, 3, 4)
    column = torch.zeros(4)
    optimizer = torch.optim.SGD(problem.leader.parameters(), lr=0.1, maximize=True)
    pendulum = gymnasium.make("Pendulum-v1")
    one_world = gym.Contexts([pendulum], [1.0])
    in_pendulum = {"action_nodes": torch.zeros(4, 1, 16, 1)}
    return {
        "GymFollower": {"environments": [lambda: gymnasium.make("Pendulum-v1")], "temperature": 0.1, "discount": 0.9},
        "NetworkLeader": {"environment": pendulum},
        "Contexts": {"environments": [pendulum], "probabilities": [1.0]},
        "LeaderReward": {"environment": one_world, "leader": gym.NetworkLeader(pendulum)},
        "policy_nodes": {"rollouts": align_cbrl.Rollouts.bandit(contexts=rollouts.contexts, steps=in_pendulum)},
        "Rollouts": {"contexts": rollouts.contexts, "mask": rollouts.mask, "group": rollouts.group, "steps": {}},
        "Observed": {"values": {}},
        "Term": {"utility": column, "credit": column, "risk": align_cbrl.objectives.Mean()},
        "Evaluation": {"value": torch.zeros(()), "credit": column},
        "Critique": {"advantage": column},
        "Problem": {"leader": problem.leader, "objective": expected, "follower": problem.follower},
        "ExpectedUtility": {"utility_function": _utility},
        "KLPriced": {"objective": expected, "price": 0.1},
        "Constrained": {"objective": expected, "cost": expected, "bound": 0.0, "rate": 0.1},
        "MeanVariance": {"objective": expected, "aversion": 1.0},
        "CVaR": {"objective": expected, "share": 0.5},
        "EntropicRisk": {"objective": expected, "aversion": 1.0},
        "WorstContext": {"objective": expected},
        "WorstGroup": {"objective": expected, "column": "kind"},
        "CrossFitted": {"objective": align_cbrl.CVaR(expected, 0.5)},
        "PreferenceLikelihood": {"score": _utility},
        "SetUtility": {"score": align_cbrl.BestOf(_utility), "size": 3},
        "PassAt": {"score": _utility},
        "BestOf": {"score": _utility},
        "Distinct": {"kind": _utility},
        "SetFunction": {"function": lambda scores: scores.amax(-1), "score": _utility},
        "FunctionOfMeans": {"h": align_cbrl.objectives.ratio, "utilities": [expected, expected]},
        "target_shares": {"shares": [0.25, 0.75]},
        "PreferenceData": {"chosen": rollouts, "rejected": rollouts},
        "Regularised": {
            "objective": expected,
            "pairs": align_cbrl.PreferenceData(rollouts, rollouts),
            "weight": 1.0,
        },
        "RandomlyTruncated": {"estimator": align_cbrl.PolicyResponse(), "max_level": 3},
        "Truncated": {"estimator": align_cbrl.PolicyResponse(), "iterations": 3},
        "ZerothOrder": {"radius": 0.1},
        "RegressionCritic": {"state": lambda rollouts: rollouts.steps["cell"]},
        "DrawnNodes": {"draw": lambda rollouts, generator: torch.zeros(rollouts.size, rollouts.horizon, 1)},
        "LinearSystems": vars(feedback.leader.systems()),
        "QuadraticUtility": {"form": lambda leader: torch.zeros(1, 4, 4).double(), "horizon": 5},
        "MomentUtility": {"horizon": 5},
        "BumpUtility": {"entries": [0], "centre": torch.zeros(1), "width": torch.ones(1), "horizon": 5},
        "FeedbackLeader": {"gain": feedback.leader.gain.detach(), "world": feedback.leader.world, "variance": 1.0},
        "FeedbackWorld": vars(feedback.leader.world),
        "LinearQuadraticFollower": {
            "context_probabilities": torch.ones(1),
            "temperature": 0.1,
            "discount": 0.9,
            "horizon": 5,
        },
        "discrete_toy_value": {"commitment": torch.full((1, 3), 0.5)},
        "FittedCritic": {"cell": lambda rollouts: rollouts.steps["cell"]},
        "HPGD": {"problem": problem, "optimizer": optimizer},
        "Certificate": {
            "gap": None,
            "gap_se": None,
            "gap_debiased": None,
            "gap_debiased_se": None,
            "effective_sample_size": 1.0,
            "kl": 0.0,
            "paths": 4,
            "group_size": 2.0,
            "weight": None,
        },
        "certify": {"problem": problem, "rollouts": rollouts},
        "exchange_ascent": {"problem": toy_cmdp.four_rooms(horizon=1), "value": lambda: 0.0, "climb": lambda: 0.0},
        "successive_halving": {
            "climb": toy_cmdp.ExactClimb([problem] * 4, steps=4, learning_rate=0.1),
            "starts": 4,
            "halving": align_cbrl.Halving(steps=4, cuts=((2, 1),)),
        },
        "ContextualMDP": {"context_probabilities": cmdp.context_probabilities, "terminal": cmdp.terminal},
        "SparseTransition": {
            "successor": torch.zeros(2, 2, 1, dtype=torch.long),
            "probability": torch.ones(2, 2, 1),
        },
        "TabularUtility": {"table": lambda leader: table},
        "Tables": {"reward": tables.reward, "transition": tables.transition, "initial": tables.initial},
        "parallel": {"problems": [problem, problem]},
        "enumerate_paths": {"problem": toy_cmdp.random_cmdp(horizon=2), "horizon": 2},
        "expected_policy_response": {"problem": problem},
        "leader_value": {"problem": problem},
        "logit_price": {"valuation": 1.0, "temperature": 0.1},
        "optimal_bonus": {"success": (0.2, 0.8), "cost": 0.1},
        "optimal_prices": {
            "valuation": 1.0,
            "inventory": 2,
            "horizon": 3,
            "temperature": 0.1,
            "leader_discount": 0.9,
        },
        "threshold_rewards": {"utility": torch.randn(2, 3), "bounds": (0.0, 1.0), "temperature": 0.5},
        "SoftSolution": {"log_policy": table, "q": table, "value": table[..., 0], "iterations": 1, "residual": 0.0},
        "soft_policy_iteration": {"tables": tables, **of_cmdp},
        "soft_value_iteration": {"tables": tables, **of_cmdp},
        "ExactFollower": of_cmdp,
        "SoftValueIteration": {**of_cmdp, "iterations": 2},
        "NaturalPolicyGradient": {**of_cmdp, "iterations": 2},
        "SoftQLearning": {**of_cmdp, "iterations": 2},
        "NeuralSoftQFollower": of_cmdp,
        "PlugIn": {"cmdp": cmdp},
        "ObservedPolicyResponse": {"cmdp": cmdp, "position": torch.arange(cmdp.states)},
        "BCHG": {"critic": toy_cmdp.ExactCritic(), "cell": lambda rollouts: rollouts.steps["cell"]},
        "SarsaCritic": {"cell": lambda rollouts: rollouts.steps["cell"]},
        "VisitAveraged": {"cell": lambda rollouts: rollouts.steps["cell"]},
        "ExactClimb": {"problems": [problem] * 2, "steps": 3, "learning_rate": 0.1},
        "SampledClimb": {
            "problems": [problem] * 2,
            "steps": 3,
            "learning_rate": 0.1,
            "environment_steps": 100,
            "seed": 0,
            "estimator": lambda joint: toy_cmdp.PlugIn(joint.follower.cmdp),
        },
        "RewardMixture": {"terms": {"length": length_reward}},
        "RewardModelLeader": {"model": scorer},
        "Shaped": {"frozen": length_reward, "correction": llm.RewardMixture({"length": length_reward})},
        "LengthShaping": {"frozen": length_reward, "target": 10.0},
        "LearnedBeta": {"leader": mixture, "beta": 0.5, "low": 0.1, "high": 2.0},
        "RewardModel": {"path": str(folder / "scorer")},
        "load_leader": {"path": str(folder)},
        "load_reward": {"path": str(folder)},
        "LanguageFollower": of_follower,
        "TiltedFollower": of_follower,
        "TrainedFollower": of_follower,
        "LeaderCallback": {"leader": mixture, "objective": expected},
        "RLOOFollower": of_follower,
        "GRPOFollower": of_follower,
        "Population": {"members": [llm.TiltedFollower(**of_follower)] * 2},
        "LoggedFollower": {"rollouts": rollouts, "temperature": 0.5},
        "Judge": {"function": length_reward},
        "PairwiseJudge": {"function": length_reward},
        "SetJudge": {"function": length_reward},
        "AnswerKind": {"function": length_reward},
        "RemoteJudge": {"url": "http://localhost:1/score"},
        "ChatJudge": {"url": "http://localhost:1/v1", "model": "m", "template": "{prompt} {completion}"},
        "Prices": {"prompt": 1.0, "completion": 2.0},
        "Completions": {
            "context": torch.tensor([0]),
            "columns": {"prompt": ["a"]},
            "token_ids": [[1]],
            "text": ["b"],
            "log_policy": torch.zeros(1),
            "log_prior": torch.zeros(1),
        },
        "score_arguments": {"rollouts": rollouts},
        "load_prompts": {"source": str(rows)},
        "load_preferences": {"source": str(rows)},
        "Preferences": {"data": DatasetDict({"train": prompts}), "dropped": 0},
        "judge_identity": {"thing": length_reward},
        "call_score_function": {
            "function": length_reward,
            "arguments": {"prompts": ["a"], "completions": ["b"]},
        },
        "check_scores": {"name": "judge", "scores": [1.0, 2.0], "count": 2},
        "pair_likelihood": {"reward_difference": torch.zeros(3), "preferred": 1.0},
        "Utility": {"function": _utility},
        "GroupLabel": {"column": "kind"},
        "FunctionSettings": {"function": "builtins.len"},
        "RewardModelJudgeSettings": {"reward_model": str(folder)},
        "RemoteSettings": {"url": "http://localhost:1/score"},
        "ChatSettings": {"chat": "http://localhost:1/v1", "model": "m", "template": "judge.txt"},
        "BetaSettings": {"start": 0.5, "low": 0.1, "high": 2.0},
        "LengthSettings": {"target": 10.0},
        "KLPricedSettings": {"price": 0.1},
        "CVaRSettings": {"share": 0.5},
        "WorstGroupSettings": {"column": "kind"},
        "MeanVarianceSettings": {"aversion": 1.0},
        "SetSettings": {"size": 3},
        "OwnSettings": {"function": "align_cbrl.ExpectedUtility"},
        "TargetSettings": {"answer": "builtins.len", "shares": {"short": 1.0}},
        "MeansSettings": {"function": "ratio", "cost": "builtins.len"},
        "ConstrainedSettings": {"cost": "builtins.len", "bound": 0.0, "rate": 0.1},
    }


# A function that fails when it is called speaks for itself, so there is none among these.
RUBBISH: list[Any] = [
    None, True, -1, 0, 50_001, 2**40, 2**70, 10**400, 0.5, -1.0, math.nan, math.inf, -math.inf, 1e308, "", "auto",
    b"x", [], [None], [math.nan], {}, {"a": None}, {1: 2}, (), object(), 1j, Path("/no/such"), torch.zeros(0),
    torch.full((4,), math.nan), torch.zeros(2, 3, 4, 5), torch.tensor(["a" == "b"]), Dataset.from_dict({"x": [1]}),
]  # fmt: skip

rubbish = st.one_of(
    st.sampled_from(RUBBISH),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=5),
    st.lists(st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5)), max_size=4),
    st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.integers(), st.floats()), max_size=3),
    st.lists(st.integers(0, 4), min_size=1, max_size=4).map(torch.zeros),
)

# Those that need minutes to be valid, and one that hands the caller's arguments to the caller's function; checked by
# the same mechanism.
ELSEWHERE = {"train_follower", "sample_completions", "call_score_function"}


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _outcome(thing: Callable[..., Any], arguments: dict[str, Any], name: str) -> str:
    """What became of a call: "taken", "named", "refused" (without naming the argument), "hang" or a traceback."""
    try:
        with _limit(10), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            thing(**arguments)
    except (InputError, CheckpointError, RunStopped) as error:
        return "named" if name in str(error) else f"refused: {error}"
    except TimeoutError:
        return "hang"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    return "taken"


def _each_argument() -> list[tuple[str, str]]:
    everything = {**PUBLIC, **SETTINGS}
    return [
        (name, argument.name)
        for name, thing in sorted(everything.items())
        if name not in ELSEWHERE and not inspect.isabstract(thing)
        for argument in _arguments(thing)
    ]


def test_rubbish_is_refused_by_name(
    valid: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a path may be rubbish that can be made
    everything = {**PUBLIC, **SETTINGS}
    bad, refused, named = [], 0, 0
    for name, argument in _each_argument():
        for value in RUBBISH:
            outcome = _outcome(everything[name], {**valid.get(name, {}), argument: value}, argument)
            if outcome == "hang" or outcome.startswith("traceback"):
                bad.append(f"{name}({argument}={value!r:.40}): {outcome:.150}")
            refused += outcome != "taken"
            named += outcome == "named"
    assert not bad, "\n".join(bad)
    assert named >= 0.95 * refused, f"{named} of {refused} refusals name the argument"


@pytest.mark.slow
def test_anything_is_refused_by_name(
    valid: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many of each outcome: `python -m pytest tests/test_malformed_inputs.py -m slow -s`."""
    monkeypatch.chdir(tmp_path)  # a path may be rubbish that can be made
    everything = {**PUBLIC, **SETTINGS}
    found: collections.Counter[str] = collections.Counter()

    @settings(max_examples=4000, deadline=None)
    @given(st.sampled_from(_each_argument()), rubbish)
    def one(at: tuple[str, str], value: Any) -> None:
        name, argument = at
        outcome = _outcome(everything[name], {**valid.get(name, {}), argument: value}, argument)
        found[outcome.split(":")[0]] += 1
        assert outcome.startswith(("taken", "named", "refused")), f"{name}({argument}={value!r}): {outcome}"

    one()
    print(dict(found))
    assert found["named"] >= 0.95 * (found["named"] + found["refused"])
