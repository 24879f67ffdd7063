"""Which fields of trl's configurations a user may set: every one is decided, and what moves the fixed point refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import pytest

from align_cbrl import InputError
from align_cbrl.llm import GRPOFollower, RLOOFollower, TrainedFollower
from align_cbrl.llm.followers.trl import settings as trl_settings
from align_cbrl.llm.settings.follower import TrainedSettings
from align_cbrl.runs.config import load_config

KINDS = (RLOOFollower, GRPOFollower)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.build(tmp_path_factory.mktemp("enumerable"))


def make(folder: Path, kind: type[TrainedFollower] = RLOOFollower, **settings: Any) -> TrainedFollower:
    return kind(folder, lm.prompt_dataset(), 0.5, prompts_per_step=2, group_size=2, settings=settings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_the_installed_trl_is_decided(kind: type[TrainedFollower]) -> None:
    """A field that a new trl adds belongs in one of the tables; until then it is refused."""
    names = {field.name for field in dataclasses.fields(kind.fields.config)}
    assert names - kind.fields.decided() == set()
    assert kind.fields.decided() - names == set()  # nor is anything decided that trl has dropped


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_is_decided_twice(kind: type[TrainedFollower]) -> None:
    fields = kind.fields
    tables = [
        trl_settings.ALLOWED | fields.allowed,
        {*trl_settings.FIXED, *fields.fixed} - {"beta"},  # of GRPO: set, and the follower's temperature to users
        set(trl_settings.OWN),
        {*trl_settings.REFUSED, *fields.refused},
    ]
    assert sum(map(len, tables)) == len(set().union(*tables))


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_nobody_has_decided_about_is_refused(kind: type[TrainedFollower]) -> None:
    newer = dataclasses.make_dataclass("Newer", [("sharpness", float, 1.0)], bases=(kind.fields.config,))
    with pytest.raises(InputError, match=r"sharpness=1\.0: nobody has shown that this field of trl 1\.16"):
        dataclasses.replace(kind.fields, config=newer).check({"sharpness": 1.0})


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_that_is_not_allowed_is_refused_by_name(kind: type[TrainedFollower]) -> None:
    for field in dataclasses.fields(kind.fields.config):
        if field.name in trl_settings.ALLOWED | kind.fields.allowed:
            continue
        with pytest.raises(InputError, match=rf"\b{field.name}\b"):
            kind.fields.check({field.name: "a value that nobody means"})


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_leave_the_fixed_point_alone_reach_trl(folder: Path, kind: type[TrainedFollower]) -> None:
    harmless = {"adam_beta2": 0.99, "logging_steps": 3, "max_grad_norm": 0.5, "temperature": 1.0, "top_p": None}
    config = make(folder, kind, **harmless)._config
    assert (config.adam_beta2, config.logging_steps, config.max_grad_norm) == (0.99, 3, 0.5)
    for name, (values, _) in {**trl_settings.FIXED, **kind.fields.fixed}.items():
        if name != "steps_per_generation":  # which trl fills in
            assert getattr(config, name) in values or str(getattr(config, name)) in values, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_weights": [3.0]}, r"reward_weights=\[3\.0\]: another reward than the leader's"),
        ({"weight_decay": 0.5}, r"weight_decay=0\.5: pulls the policy to zero weights"),
        ({"generation_kwargs": {"max_new_tokens": 2}}, "generation_kwargs=.*: samples are not the policy's"),
        ({"optim": "schedule_free_adamw"}, "optim='schedule_free_adamw'"),
        ({"optim_args": "weight_decay=0.1"}, "optim_args=.*may decay weights"),
        ({"router_aux_loss_coef": 0.1}, "balancing experts is another objective"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"vllm_structured_outputs_regex": "a*"}, "vllm_structured_outputs_regex=.*cuts the policy's support"),
        ({"cache_implementation": "quantized"}, "cache_implementation"),
        ({"learning_rate": 1e-5}, "settings: learning_rate follows from .* own arguments; set its learning_rate"),
        ({"beta": 0.1}, "settings: beta follows .*; set its temperature"),
        ({"seed": 3}, "settings: seed follows"),
        ({"generation_batch_size": 8}, "set its prompts_per_step and group_size"),
        ({"output_dir": "x"}, "output_dir='x': the follower's state is saved with the run"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True: rewards and judges read the prompts' columns"),
        ({"learning_rat": 1e-5}, "'learning_rat' is no field of trl.RLOOConfig; did you mean 'learning_rate'"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm: expected a finite number, got nan"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected a positive integer, got 0"),
        ({"chat_template_kwargs": "no_think"}, "chat_template_kwargs: expected arguments of the template"),
        ({"model_init_kwargs": {"revision": "main"}}, r"model_init_kwargs: expected some of .*got \['revision'\]"),
    ],
)
def test_what_biases_or_is_given_elsewhere_is_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    """When the follower is made, and already when a configuration is read."""
    with pytest.raises(InputError, match=message):
        make(folder, **settings)
    with pytest.raises(InputError, match=message):
        TrainedSettings(settings=settings)


def test_vllm_is_given_once() -> None:
    with pytest.raises(InputError, match="use_vllm is given by vllm"):
        TrainedSettings(vllm=True, settings={"use_vllm": False})
    with pytest.raises(InputError, match="learning_rate follows from"):
        load_config(TrainedSettings, None, ["settings={learning_rate: 0.1}"])
