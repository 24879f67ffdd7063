"""HPGD around a tiny model and a chat judge, as a process that may be killed: URL, folder, concurrency."""

from __future__ import annotations

import sys
from pathlib import Path

import enumerable_lm as lm

from align_cbrl import HPGD, ExpectedUtility, HPGDConfig, Natural, Problem
from align_cbrl.llm import ChatJudge, Judge, JudgeCache, Prices, RewardMixture, TiltedFollower

STEPS = 6


def long(completions: list[str]) -> list[float]:
    return [float(len(text.split())) for text in completions]


def early(completions: list[str]) -> list[float]:
    return [float("a" in text or "b" in text) for text in completions]


def run(url: str, folder: Path, concurrency: int) -> tuple[HPGD, Judge]:
    chat = ChatJudge(
        url, "m", folder / "rubric.txt", scale=(0, 9), token_variable="MY_CHAT_ACCESS", attempts=6,
        concurrency=concurrency, prices=Prices(1.0, 2.0),
    )  # fmt: skip
    judge = Judge(chat, cache=JudgeCache(folder / "run/judge_cache.sqlite"), retries=12, wait=0.01)
    follower = TiltedFollower(lm.build(folder / "policy"), lm.prompt_dataset(), 1.0, max_completion_length=2)
    leader = RewardMixture({"long": long, "early": early}, {"long": 0.5}, budget=1.0)
    config = HPGDConfig(steps=STEPS, contexts_per_step=4, group_size=12, natural=Natural(), progress=False)
    hpgd = HPGD(Problem(leader, ExpectedUtility(judge), follower), config=config, out=folder / "run")
    hpgd.run(resume=True)
    return hpgd, judge


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
