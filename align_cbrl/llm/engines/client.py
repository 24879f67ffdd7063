"""Reward functions that ask `align-cbrl serve`, for verl, OpenRLHF and trl. Nothing but Python: copy it anywhere.

The address is in REWARD_URL (http://127.0.0.1:8123/score), the token, if there is one, in REWARD_TOKEN. A request is
sent again while the server restarts, with the same id, and counts once.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
import uuid
from typing import Any


def ask(prompts: Any, completions: Any, patience: float = 600.0, **fields: Any) -> Any:
    """The server's reply, a dictionary with "rewards" and "version"; RuntimeError with its reason if it refuses."""
    said = {"id": uuid.uuid4().hex, "prompts": list(prompts), "completions": list(completions), **fields}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('REWARD_TOKEN', '')}"}
    url = os.environ.get("REWARD_URL", "http://127.0.0.1:8123/score")
    request = urllib.request.Request(url, json.dumps(said, default=lambda value: value.tolist()).encode(), headers)
    until = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(request, timeout=patience) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
            if error.code != 503 or time.monotonic() > until:
                raise RuntimeError(f"reward server: {error.code} {reason}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:  # not there, or gone before it had answered
            if time.monotonic() > until:
                raise RuntimeError(f"reward server: no answer from {url}: {error}") from None
        time.sleep(0.5)


def compute_scores(
    data_sources: Any, solution_strs: Any, ground_truths: Any, extra_infos: Any, prompt: str = "question",
    columns: Any = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """For verl's batch reward manager; `prompt` and `columns` name what is taken from extra_info, or ground_truth."""
    known = {"ground_truth": ground_truths, "data_source": data_sources}
    taken = {name: list(known[name] if name in known else [row[name] for row in extra_infos]) for name in columns}
    learn = all(row.get("split", "train") == "train" for row in extra_infos)  # verl validates with the same function
    reply = ask([row[prompt] for row in extra_infos], solution_strs, columns=taken, learn=learn)
    return [{"score": reward, "leader_version": reply["version"]} for reward in reply["rewards"]]


def compute_score(data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any, **settings: Any) -> Any:
    """For verl's other reward managers, which ask about one completion at a time."""
    settings = {name: value for name, value in settings.items() if name in ("prompt", "columns")}
    return compute_scores([data_source], [solution_str], [ground_truth], [extra_info], **settings)[0]


def reward(prompts: Any, completions: Any, columns: Any = (), **given: Any) -> Any:
    """For trl's reward_funcs; wrap it in functools.partial to name columns of the data that the server needs."""
    reply = ask(prompts, completions, columns={name: given[name] for name in columns})
    if "log_metric" in given:
        given["log_metric"]("leader/version", float(reply["version"]))
    return reply["rewards"]
