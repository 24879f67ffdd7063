"""Time and memory of a leader step against a follower step (`python -m align_cbrl.recipes.benchmarks.leader_step`).

The follower is RLOO with 64 completions of 24 tokens a step, the leader steps after every one of its steps, on the
completions that it has just trained on. Policies are Llamas of several sizes with random weights, and reward models as
large as the policy; prompts, tokenizer, judge and reward terms are those of the docstrings world, whose policy is
192x2 and whose leader is the mixture. Every step is timed, with what the processors worked beside what a clock says,
since a busy machine holds up the clock. It uses a CUDA device where there is one, and names it.

Memory is the most that a phase held beyond what it began with: of the process as Linux counts it, or of the device. The
peak's counter is set back between phases, which some systems do not allow; there the figures are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerBase

from align_cbrl import HPGD, ExpectedUtility, HPGDConfig, InputError, Problem, Rollouts
from align_cbrl.llm import Judge, LanguageLeader, RewardMixture, RewardModel, RewardModelLeader, RLOOFollower
from align_cbrl.problem import Leader, OnRollouts

from ..worlds.docstrings import rewards
from ..worlds.docstrings.data import load_docstrings
from ..worlds.docstrings.judge import docstring_judge
from ..worlds.docstrings.policy import make_model, train_tokenizer

SIZES = ("64x2", "192x2", "256x4", "384x6", "512x7")
"""Width x layers of the policy; about 0.2, 1.4, 4, 12 and 25 million parameters."""

LEADERS = ("mixture", "head", "lora", "all")
TERMS = ("length", "brevity", "repetition", "final_period", "capital_first", "prompt_overlap", "markup")
"""Of the mixture, beside the reward model: eight in all, as in the recipe."""

_PROMPTS, _GROUP, _TOKENS = 8, 8, 24
_SETTLING = 2  # pairs of steps before the first that counts: memory is allocated, the optimizer's moments are made


@dataclasses.dataclass(frozen=True)
class Phase:
    """What one step of the leader or the follower took.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of all the process's threads; with a device, of what prepares its work.
        memory: bytes at the peak beyond the beginning; None where it cannot be told.
    """

    seconds: float
    cpu_seconds: float
    memory: int | None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A policy and a leader, step by step.

    Attributes:
        size: width x layers of the policy and the reward model.
        parameters: of the policy.
        leader: which one.
        leader_parameters: how many it learns.
        follower_steps: each step of the follower.
        leader_steps: the leader's step after it.
    """

    size: str
    parameters: int
    leader: str
    leader_parameters: int
    follower_steps: list[Phase]
    leader_steps: list[Phase]

    def shares(self, clock: str = "cpu_seconds") -> dict[str, float]:
        """Median, 0.9 quantile and maximum over steps of the leader's time as a share of the follower's.

        Args:
            clock: "seconds" or "cpu_seconds".

        Example:
            >>> def phases(*seconds):
            ...     return [Phase(s, s, None) for s in seconds]
            >>> Measurement("64x2", 1, "mixture", 8, phases(1.0, 2.0, 4.0), phases(0.1, 0.1, 0.1)).shares()
            {'median': 0.05, 'q90': 0.09, 'max': 0.1}
        """
        pairs = zip(self.leader_steps, self.follower_steps, strict=True)
        ratios = torch.tensor([getattr(a, clock) / getattr(b, clock) for a, b in pairs], dtype=torch.float64)
        return {
            "median": round(ratios.quantile(0.5).item(), 4),
            "q90": round(ratios.quantile(0.9).item(), 4),
            "max": round(ratios.max().item(), 4),
        }


class Meter:
    """Clock, processor time and peak memory since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begin()

    def read(self) -> Phase:
        """What was used since the last reading."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds, cpu = time.perf_counter() - self._seconds, time.process_time() - self._cpu
        peak = self._peak()
        phase = Phase(seconds, cpu, None if peak is None or self._held is None else max(0, peak - self._held))
        self._begin()
        return phase

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._held: int | None = torch.cuda.memory_allocated(self.device)
        else:
            self._held = _resident("VmRSS") if _forget_peak() else None
        self._seconds, self._cpu = time.perf_counter(), time.process_time()

    def _peak(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident("VmHWM")


class _Metered(RLOOFollower):
    """A follower whose steps, and the leader's steps between them, are read off a meter."""

    def follow(self, leader: Leader, on_rollouts: OnRollouts, **arguments: Any) -> None:
        """See `Follower.follow`."""
        self.follower_steps: list[Phase] = []
        self.leader_steps: list[Phase] = []
        meter = Meter(self.policy.device)

        def metered(rollouts: Rollouts, metrics: dict[str, float]) -> bool:
            self.follower_steps.append(meter.read())
            go_on = on_rollouts(rollouts, metrics)
            self.leader_steps.append(meter.read())
            return go_on

        super().follow(leader, metered, **arguments)


def measure(
    size: str, leader: str, steps: int, *, prompts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase
) -> Measurement:
    """Time `steps` pairs of a follower step and a leader step.

    Raises:
        InputError: a size that is not width x layers, or an unknown leader.
    """
    width, layers = _parse(size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        torch.manual_seed(0)
        policy = make_model(tokenizer, hidden_size=width, layers=layers)
        policy.save_pretrained(path / "policy")
        tokenizer.save_pretrained(path / "policy")
        policy.config.num_labels = 1
        LlamaForSequenceClassification(policy.config).save_pretrained(path / "reward")
        tokenizer.save_pretrained(path / "reward")
        follower = _Metered(
            path / "policy", prompts, 0.5, max_completion_length=_TOKENS, prompts_per_step=_PROMPTS, group_size=_GROUP,
            learning_rate=3e-4, interval=1,
        )  # fmt: skip
        reward_model = RewardModel(path / "reward")
        reward_model.model.to(device)
        learned = _leader(leader, reward_model)
        learned.calibrate(follower.rollout(torch.arange(_PROMPTS), _GROUP, torch.Generator().manual_seed(0)))
        parameters = [p for p in learned.parameters() if p.requires_grad]
        run = HPGD(
            Problem(learned, ExpectedUtility(Judge(docstring_judge)), follower),
            torch.optim.Adam(parameters, lr=1e-4, maximize=True),
            config=HPGDConfig(steps=_SETTLING + steps, contexts_per_step=_PROMPTS, group_size=_GROUP, progress=False),
        )
        run.run()
        return Measurement(
            size,
            sum(p.numel() for p in policy.parameters()),
            leader,
            sum(p.numel() for p in parameters),
            follower.follower_steps[_SETTLING:],
            follower.leader_steps[_SETTLING:],
        )


def _leader(kind: str, reward_model: RewardModel) -> LanguageLeader:
    if kind == "mixture":
        return RewardMixture({"proxy": reward_model, **{name: getattr(rewards, name) for name in TERMS}})
    if kind == "head":
        return RewardModelLeader(reward_model, "head")
    if kind == "lora":
        return RewardModelLeader(reward_model, "lora")
    if kind == "all":
        return RewardModelLeader(reward_model, "all")
    raise InputError(f"--leaders: expected some of {', '.join(LEADERS)}, got {kind!r}")


def _parse(size: str) -> tuple[int, int]:
    width, _, layers = size.partition("x")
    if not (width.isdecimal() and layers.isdecimal() and int(layers) > 0) or int(width) % 4 or int(width) == 0:
        raise InputError(f"--sizes: expected width x layers, such as 192x2, the width divisible by 4, got {size!r}")
    return int(width), int(layers)


def _resident(entry: str) -> int | None:
    """An entry of /proc/self/status in bytes; None where there is no such thing."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{entry}:"):
                return int(line.split()[1]) * 1024
    return None


def _forget_peak() -> bool:
    """Set the process's peak of resident memory back to what it holds now; False where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def describe(measurement: Measurement) -> list[str]:
    """A row of the table: medians over steps, and shares."""

    def median(phases: Sequence[Phase], of: Callable[[Phase], float]) -> float:
        return float(torch.tensor([of(phase) for phase in phases], dtype=torch.float64).median())

    def megabytes(phases: Sequence[Phase]) -> str:
        known = [phase.memory for phase in phases if phase.memory is not None]
        return f"{max(known) / 2**20:.0f}" if known else "-"

    m = measurement
    cells = [m.size, f"{m.parameters:,}", m.leader, f"{m.leader_parameters:,}"]
    for phases in (m.follower_steps, m.leader_steps):
        cells += [
            f"{1e3 * median(phases, lambda p: p.seconds):.1f}",
            f"{1e3 * median(phases, lambda p: p.cpu_seconds):.1f}",
        ]
    for clock in ("seconds", "cpu_seconds"):
        cells.append(" / ".join(f"{share:.1%}" for share in m.shares(clock).values()))
    return [*cells, megabytes(m.follower_steps), megabytes(m.leader_steps)]


HEADS = (
    "policy", "parameters", "leader", "learned", "follower ms", "its cpu ms", "leader ms", "its cpu ms",
    "share: median / 0.9 / max", "share of cpu: median / 0.9 / max", "follower MiB", "leader MiB",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, a row as soon as it is known, and write the steps; 2 for arguments that are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="WIDTHxLAYERS", help="of the policy")
    parser.add_argument("--leaders", nargs="+", default=list(LEADERS), metavar="LEADER", help=", ".join(LEADERS))
    parser.add_argument("--steps", type=int, default=20, help="pairs of steps that are timed")
    parser.add_argument("--out", type=Path, help="JSON file for the device and every step")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.steps < 1:
        raise InputError(f"--steps: expected at least 1, got {options.steps}")
    for size in options.sizes:
        _parse(size)
    for leader in options.leaders:
        if leader not in LEADERS:
            raise InputError(f"--leaders: expected some of {', '.join(LEADERS)}, got {leader!r}")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    data = load_docstrings()["train"]
    tokenizer = train_tokenizer(data)
    prompts = data.remove_columns([name for name in data.column_names if name != "prompt"])
    about = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "completions": _PROMPTS * _GROUP,
        "tokens": _TOKENS,
    }
    print(f"{about['device']}, {about['threads']} threads; {_PROMPTS * _GROUP} completions of {_TOKENS} tokens")
    print(" | ".join(HEADS), flush=True)
    measurements = []
    for size in options.sizes:
        for leader in options.leaders:
            measurement = measure(size, leader, options.steps, prompts=prompts, tokenizer=tokenizer)
            measurements.append(measurement)
            print(" | ".join(describe(measurement)), flush=True)
            if options.out is not None:
                rows = [
                    {
                        **dataclasses.asdict(m),
                        "share": m.shares("seconds"),
                        "share_of_cpu": m.shares("cpu_seconds"),
                    }
                    for m in measurements
                ]
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
