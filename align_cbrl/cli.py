"""The command line: `align-cbrl run`, `check`, `ls`, `cp`, `report`, `compare`, `serve`, `step` and `validate`.

What needs torch is imported by the commands that need it: help, names and completion are there at once.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align_cbrl import __version__, moved
from align_cbrl.errors import CheckpointError, InputError, RunStopped, first_line
from align_cbrl.runs.config import Sources, load_config, nearest
from align_cbrl.runs.config_help import describe
from align_cbrl.runs.files import storage_failure
from align_cbrl.runs.imports import load_object, load_recipe, recipe_folder, recipe_names, require_package
from align_cbrl.runs.inputs import check_inputs
from align_cbrl.runs.interrupt import acting_interrupt
from align_cbrl.runs.outline import outline
from align_cbrl.runs.preflight import Preflight, check_paths
from align_cbrl.runs.progress import duration
from align_cbrl.runs.secrets import redact

_DESCRIPTION = """\
Contextual bilevel reinforcement learning for RLHF.

  leader    owns parameters x and shapes the reward r_x: weights of a mixture, or a reward model.
  follower  a policy that best-responds to r_x, kept near its prior by a KL term of weight lambda
            (the temperature): a language model trained by trl, or a table solved exactly.
  judge     what the leader really wants: it scores the follower's answers and is never trained on.
  context   what nature draws: a prompt, or a task of a table.

The leader climbs the judge's score through the follower's response: it knows how the policy will
change when the reward does. Plain RLHF has the follower only, and a reward that nobody questions.
"""

_EXAMPLES = """\
examples:
  align-cbrl ls                                            the recipes and their configurations
  align-cbrl run tune_weights                              tune reward weights around a trl follower
  align-cbrl run tune_weights --config smoke.yaml          the same in a minute, to see it work
  align-cbrl run tune_weights --set hpgd.steps=50          change values of the configuration
  align-cbrl run tune_weights --help                       every key of its configuration
  align-cbrl check tune_weights --config my.yaml           is everything there that it names?
  align-cbrl cp tune_weights my_recipe/                    a recipe to change, and to run by path
  align-cbrl run tune_weights --out runs/tune_weights --resume
                                                           continue after a stop, or start
  align-cbrl run my_recipe/                                a recipe of your own: a folder
  align-cbrl report runs/tune_weights                      write its report again
  align-cbrl compare runs/tune_weights runs/mine           runs side by side
  align-cbrl serve leader.yaml                             rewards for any other engine
  align-cbrl step --leader runs/reward --rollouts logs.jsonl --out runs/reward-2
                                                           a leader step from an engine's logs
  align-cbrl run four_rooms --config table.yaml            fines on a map: the whole table
  align-cbrl validate                                      every gradient route against the referee
  align-cbrl validate my_problem.py:toll_road --json       on a problem of your own

exit codes: 0 done; 1 a validation failed; 2 something given is wrong; 3 the run stopped, or its
checkpoint cannot be used; 128 + n the signal n: 130 Ctrl-C, 143 SIGTERM.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors of the user's or the run's become one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # set by the shell that wants to know how a word may go on
        importlib.import_module("argcomplete").autocomplete(parser)
    options = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    usual, warnings.formatwarning = warnings.formatwarning, _warning_line
    try:
        return command(options)
    except InputError as error:
        return _fail(f"error: {error}", 2)
    except RunStopped as error:
        return _stopped(options, arguments, f"stopped: {error}")
    except KeyboardInterrupt as error:
        number = next((given for given in error.args if isinstance(given, int)), signal.SIGINT)
        resumable = options.command is _run
        return _fail(f"stopped; resume with: {_resume_command(arguments)}" if resumable else "stopped", 128 + number)
    except BrokenPipeError:
        if options.command is _run:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever reads has seen enough, as `head` has
        return 128 + 13  # SIGPIPE, which not every system has
    except Exception as error:
        if (refused := storage_failure(error)) is not None:
            said = str(error) if isinstance(error, CheckpointError) else f"{refused}; repair that"
            return _stopped(options, arguments, f"stopped: {said}")
        if isinstance(error, CheckpointError):
            return _fail(f"error: {error}", 3)
        if options.command is not _run:
            raise
        print(redact(traceback.format_exc()), file=sys.stderr)  # it is not ours: where it was raised is needed
        return _stopped(options, arguments, f"stopped by {type(error).__name__}: {first_line(error)}")
    finally:
        warnings.formatwarning = usual


def _warning_line(message: Warning | str, *where: Any, **more: Any) -> str:
    """A warning without the file and line that raised it."""
    return f"warning: {redact(str(message))}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="align-cbrl",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run a recipe",
        description="Run a recipe: a configured job that keeps every finished stage in its output folder.",
        epilog=f"recipes: {', '.join(recipe_names())}",
        add_help=False,
    )
    run.set_defaults(command=_run, parser=run)
    _add_recipe(run)
    run.add_argument("-h", "--help", action="store_true", help="show this; after a recipe, its configuration's keys")
    run.add_argument(
        "--resume", action="store_true", help="continue the run in the output folder; start it where there is none"
    )

    check = commands.add_parser(
        "check",
        help="look at everything that a run would need, and train nothing",
        description="Load the data, tokenizers and configurations that a recipe's configuration names, ask judge and "
        "rewards about two completions, and look for packages and room on the disk. `run` begins with the same.",
        epilog=f"recipes: {', '.join(recipe_names())}",
    )
    check.set_defaults(command=_check, parser=check, resume=False)
    _add_recipe(check)

    listed = commands.add_parser(
        "ls", help="list the recipes and their configurations", description="The recipes, with their YAML files."
    )
    listed.set_defaults(command=_list)

    copied = commands.add_parser(
        "cp",
        help="copy a recipe, to change it",
        description="Copy a recipe's files into a new folder, which `align-cbrl run FOLDER` runs.",
        epilog=f"recipes: {', '.join(recipe_names())}",
    )
    copied.set_defaults(command=_copy)
    copied.add_argument("recipe", metavar="RECIPE", help="a name from the list below").completer = _recipes_like  # type: ignore[attr-defined]
    copied.add_argument("folder", metavar="FOLDER", type=Path, help="a folder that is not there yet")

    report = commands.add_parser(
        "report",
        help="write a finished run's report again",
        description="Write report.html and its figures again, from what the folder of a finished run holds.",
    )
    report.set_defaults(command=_report)
    report.add_argument("folder", metavar="DIR", type=Path, help="where `align-cbrl run` wrote")

    compare = commands.add_parser(
        "compare",
        help="put runs side by side",
        description="Settings that differ, final rows, learned rewards and curves of several runs: tables on the "
        "terminal, and all of it in compare.html. Of different recipes, what they share.",
    )
    compare.set_defaults(command=_compare)
    compare.add_argument("folders", metavar="DIR", type=Path, nargs="+", help="where `align-cbrl run` wrote")
    compare.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="for compare.html (default: here)")

    _add_engines(commands)
    validate = commands.add_parser(
        "validate",
        help="check every gradient route against the exact referee",
        description="Compare every route to the hypergradient with the exact one, on tables: relative errors for the "
        "exact routes, deviations in standard errors (z) for the sampled ones. Errors are shares of the norm; "
        "where a bias is forgiven, z counts only what exceeds it. p is the probability of such a z where the route is "
        "right; what fails one is so small that one report in a hundred, on right routes, has a row that fails. Rivals "
        "are biased by design and are not judged: their error is there to be seen.",
    )
    validate.set_defaults(command=_validate)
    validate.add_argument(
        "problems",
        metavar="PROBLEM",
        nargs="*",
        help="which problems: names, or file.py:function for a function that returns one of yours (default: all)",
    )
    validate.add_argument("--json", action="store_true", help="print the rows as JSON")
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that read a recipe's configuration."""
    recipe = parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="a name from the list below, or a folder with a recipe.py"
    )
    recipe.completer = _recipes_like  # type: ignore[attr-defined]  # argcomplete reads it
    config = parser.add_argument(
        "--config", metavar="FILE", help="a YAML file, or the name of one in the recipe's folder (default: config.yaml)"
    )
    config.completer = _configs_like  # type: ignore[attr-defined]  # as above
    _add_overrides(parser, "seed=1 hpgd.steps=50")
    parser.add_argument("--out", metavar="DIR", type=Path, help="output folder (default: runs/RECIPE[-CONFIG])")


def _add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help=f"change values of the configuration: {example}",
    )


class _Job(NamedTuple):
    """A recipe whose configuration was looked at."""

    name: str
    recipe: Any
    config: Any
    out: Path
    notes: Preflight


def _add_engines(commands: Any) -> None:
    """The commands for engines that are not ours."""
    serve = commands.add_parser(
        "serve",
        help="a reward server for any other engine",
        description="Answer any engine's requests with the leader's present reward, and have the leader learn from a "
        "share of the completions (docs/serving.md). Its folder holds all that it knows: started again, it goes on.",
    )
    serve.set_defaults(command=_serve)
    serve.add_argument("config", metavar="LEADER_CONFIG", type=Path, help="a YAML file (docs/serving.md)")
    _add_overrides(serve, "every=2 hpgd.steps=50")
    serve.add_argument("--out", metavar="DIR", type=Path, help="the server's folder (default: runs/CONFIG)")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind to (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8123, help="0 for any that is free (default: 8123)")

    step = commands.add_parser(
        "step",
        help="leader steps from logs",
        description="Take one or more leader steps on completions that an engine has logged, and write the new leader "
        "(docs/serving.md).",
    )
    step.set_defaults(command=_step)
    step.add_argument("--leader", metavar="DIR", type=Path, required=True, help="folder of a saved leader")
    step.add_argument("--rollouts", metavar="FILE", type=Path, required=True, help="jsonl, json, csv or parquet")
    step.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the new leader")
    step.add_argument("--config", metavar="FILE", type=Path, help="a YAML file (default: the column score, one step)")
    _add_overrides(step, "hpgd.steps=3")
    step.add_argument("--trust-code", action="store_true", help="import reward functions that the folder names")


def _serve(options: argparse.Namespace) -> int:
    require_package("uvicorn", "serve", "align-cbrl serve")
    require_package("starlette", "serve", "align-cbrl serve")
    settings: Any = importlib.import_module("align_cbrl.llm.engines.settings")
    http: Any = importlib.import_module("align_cbrl.llm.engines.http")
    config = load_config(settings.ServeSettings, options.config, options.overrides)
    out = options.out or Path("runs") / options.config.stem

    def ready(url: str, service: Any) -> None:
        steps = f"{service.version} of {config.hpgd.steps} leader steps taken, through {service.words}"
        print(f"serving {url}/score and {url}/get_reward from {out}: {steps}", flush=True)

    http.serve(config, out, host=options.host, port=options.port, ready=ready)
    return 0


def _step(options: argparse.Namespace) -> int:
    settings: Any = importlib.import_module("align_cbrl.llm.engines.settings")
    logged: Any = importlib.import_module("align_cbrl.llm.engines.logged")
    config = load_config(settings.StepSettings, options.config, options.overrides)
    rows = logged.steps_from_logs(config, options.leader, options.rollouts, options.out, trust_code=options.trust_code)
    for row in rows:
        print(json.dumps({name: value for name, value in row.items() if not name.endswith(("seconds", "share"))}))
    print(f"leader: {options.out}")
    return 0


def _run(options: argparse.Namespace) -> int:
    if options.recipe is not None and options.help:
        print(_recipe_help(moved.recipe(options.recipe, options.config)[0]))
        return 0
    if options.recipe is None and options.help:
        options.parser.print_help()
        return 0
    with acting_interrupt():
        began = time.perf_counter()
        job = _looked_at(options)
        job.notes.conclude()
        print(f"checked in {duration(time.perf_counter() - began)}; nothing is missing", flush=True)
        _start(job, options.resume)
    return 0


def _start(job: _Job, resume: bool) -> None:
    from align_cbrl.runs.lock import only_here
    from align_cbrl.runs.run_folder import ABOUT, DESCRIPTION, claim, finish, nothing_kept, read_about

    out = job.out
    ours = not out.exists() or (nothing_kept(out) and {file.name for file in out.iterdir()} <= DESCRIPTION)
    with only_here(out):
        if not resume:
            _refuse_a_run_in(out)
        try:
            job.recipe.run(job.config, out, resume)
        except InputError:
            if ours:
                _release(out)
            raise
        finally:
            # A user's recipe may leave the description of its folder to us; `report` and `compare` need it.
            if out.is_dir() and not (out / ABOUT).exists():
                claim(out, job.config, recipe=job.name)
        if read_about(out)["sessions"][-1]["ended"] is None:
            finish(out)


def _check(options: argparse.Namespace) -> int:
    notes = _looked_at(options).notes
    width = max(map(len, notes.right), default=0)
    for key, what in notes.right.items():
        print(f"{key:<{width}}  {what}")
    notes.conclude()
    print("nothing is missing")
    return 0


def _looked_at(options: argparse.Namespace) -> _Job:
    """Read a configuration and look at everything that it names; the first line is printed before torch is imported."""
    if options.recipe is None:
        options.parser.error(f"expected a recipe: one of {', '.join(recipe_names())}, or a folder with a recipe.py")
    name, given = moved.recipe(options.recipe, options.config)
    path = _config_path(recipe_folder(name), given)
    stem, folder = path.stem, recipe_folder(name).resolve().name
    out: Path = options.out or Path("runs") / (folder if stem == "config" or not given else f"{folder}-{stem}")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: expected a folder, this is a file")
    print(f"{name} with {path.name}, into {out}: looking at all that it names, before anything is trained", flush=True)
    _glance(recipe_folder(name) / "recipe.py", path, options.overrides, out)
    from align_cbrl.distributed import initialize, world_size

    initialize()
    if world_size() > 1:
        raise InputError(
            f"recipe {name!r}: expected one process, got {world_size()}; its stages read each other's files. "
            "Several processes run a script of your own (docs/scaling.md)"
        )
    recipe = _recipe(name)
    config: Any = load_config(recipe.Config, path, options.overrides)
    if not options.resume:
        _refuse_a_run_in(out)
    notes = Preflight(config, Sources.read(path, options.overrides), out)
    check_paths(config, notes)
    getattr(recipe, "preflight", lambda config, notes: notes.need_room(0))(config, notes)
    return _Job(name, recipe, config, out, notes)


def _glance(recipe: Path, path: Path, overrides: Sequence[str], out: Path) -> None:
    """Refuse what can be seen to be wrong before torch is imported, which takes longer than to train a small model."""
    try:
        cls = outline(recipe)
        config: Any = None if cls is None else load_config(cls, path, overrides)
    except InputError:
        raise
    except Exception:  # of code that needs more than its own source, or is wrong: its import will say so
        return
    if config is None:
        return
    notes = Preflight(config, Sources.read(path, overrides), out)
    check_paths(config, notes)
    check_inputs(config, notes)
    notes.need_room(0)
    notes.conclude()


def _refuse_a_run_in(out: Path) -> None:
    from align_cbrl.runs.run_folder import nothing_kept

    if out.exists() and not nothing_kept(out):
        raise InputError(
            f"{out} already holds a run: continue it with --resume, choose another --out, or remove the folder"
        )


def _list(options: argparse.Namespace) -> int:
    for name in recipe_names():
        folder = recipe_folder(name)
        about = ast.get_docstring(ast.parse((folder / "recipe.py").read_text(encoding="utf-8"))) or ""
        print(f"{name}: {about.partition(chr(10))[0]}")
        for file in sorted(folder.glob("*.yaml"), key=lambda file: (file.name != "config.yaml", file.name)):
            print(f"    {file.name:<20} {_first_sentence(file.read_text(encoding='utf-8'))}".rstrip())
    return 0


def _first_sentence(text: str) -> str:
    """The first sentence of the comment that a YAML file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    sentence = re.split(r"\.(?: (?=[A-Z])|$)", " ".join(line.lstrip("# ") for line in lines))[0]
    return textwrap.shorten(sentence, 100, placeholder=" ...")


def _copy(options: argparse.Namespace) -> int:
    if options.recipe not in recipe_names():
        raise InputError(f"there is no recipe {options.recipe!r}; {nearest(options.recipe, recipe_names())}")
    target: Path = options.folder
    if target.exists():
        raise InputError(f"{target}: expected a folder that is not there yet; choose another name, or remove it")
    shutil.copytree(recipe_folder(options.recipe), target, ignore=shutil.ignore_patterns("__pycache__"))
    for file in target.rglob("*.py"):  # what lies beside the recipes is imported by its name from elsewhere
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub(r"^(\s*from )\.\.(?=\w)", r"\1align_cbrl.recipes.", text, flags=re.M), encoding="utf-8")
    print(f"{target}: change it, and run it with: align-cbrl run {shlex.quote(str(target))}/")
    return 0


def _recipes_like(prefix: str, **_: Any) -> list[str]:
    """How a recipe's name may go on; folders of one's own too."""
    folders = [f"{file.parent}/" for file in Path().glob(f"{prefix}*/recipe.py")] if prefix else []
    return [name for name in recipe_names() if name.startswith(prefix)] + folders


def _configs_like(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """How the name of a recipe's YAML file, or of one here, may go on."""
    folders = [Path(), *([recipe_folder(parsed_args.recipe)] if parsed_args.recipe else [])]
    return sorted({file.name for folder in folders for file in folder.glob(f"{prefix}*.yaml")})


def _recipe(name: str) -> Any:
    """The module of a recipe, which has what every recipe needs."""
    recipe = load_recipe(name)
    for needed in ("Config", "run"):
        if not hasattr(recipe, needed):
            raise InputError(f"recipe {name!r}: its recipe.py has no {needed}; docs/extending.md shows what it needs")
    return recipe


def _recipe_help(name: str) -> str:
    """What a recipe does, its YAML files, and the keys of its configuration."""
    recipe = _recipe(name)
    files = ", ".join(sorted(file.name for file in recipe_folder(name).glob("*.yaml")))
    return (
        f"usage: align-cbrl run {name} [--config FILE] [--set KEY=VALUE ...] [--out DIR] [--resume]\n\n"
        f"{inspect.getdoc(recipe) or ''}\n\nfiles for --config: {files}\n\n"
        f"keys for --set and YAML files; a file's values replace these defaults:\n\n{describe(recipe.Config)}"
    )


def _release(out: Path) -> None:
    """Remove a folder in which nothing happened before the mistake was found; scores that were paid for stay."""
    from align_cbrl.runs.run_folder import nothing_kept

    if nothing_kept(out) and not any(out.rglob("*.sqlite")):
        shutil.rmtree(out)


def _report(options: argparse.Namespace) -> int:
    from align_cbrl.runs.run_folder import read_about, read_summary

    read_summary(options.folder)
    name = read_about(options.folder)["recipe"]
    try:
        recipe: Any = load_recipe(name)
    except InputError as error:
        raise InputError(f"{options.folder}: {error}") from error
    if not hasattr(recipe, "report"):
        raise InputError(f"{options.folder}: the recipe {name!r} writes no report")
    recipe.report(options.folder)
    print(f"report: {options.folder / 'report.html'}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    module: Any = importlib.import_module("align_cbrl.runs.compare")
    runs = module.read_runs(options.folders)
    for title, table in module.comparison(runs):
        print(f"\n{title}")
        rows = [[_cell(table, i, j) for j in range(len(row))] for i, row in enumerate(table.rows)]
        print(_aligned([table.columns, *rows], left=range(2)) if rows else "none")
    print(f"\nreport: {module.write_comparison(options.out, runs)}")
    return 0


def _cell(table: Any, row: int, column: int) -> str:
    """A cell of a comparison; the best of a row has a star."""
    value = table.rows[row][column]
    return f"{'–' if value is None else value}{' *' if (row, column) in table.marked else ''}"


def _config_path(folder: Path, given: str | None) -> Path:
    """The YAML file to read: a path as it stands, or else a file of the recipe's folder, with or without `.yaml`."""
    if given is None:
        return folder / "config.yaml"
    variants = sorted(file.name for file in folder.glob("*.yaml"))
    for candidate in (Path(given), folder / given, folder / f"{given}.yaml"):
        if candidate.is_file():
            return candidate
    raise InputError(f"--config {given}: no such file, here or in the recipe; {nearest(given, variants)}")


def _validate(options: argparse.Namespace) -> int:
    validation: Any = importlib.import_module("toy_cmdp.validate")
    problems = {name: _problem(name, validation) for name in options.problems or validation.PROBLEMS}
    rows = [dataclasses.asdict(row) for row in validation.validate(problems)]
    if options.json:
        plain = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in rows]
        print(json.dumps(plain, indent=2))
    else:
        print(_table(rows))
    failed = sum(row["passed"] is False for row in rows)
    if failed:
        print(f"{failed} of {len(rows)} checks failed", file=sys.stderr)
    return 1 if failed else 0


def _problem(name: str, validation: Any) -> Callable[[int], Any]:
    """The builder of a problem, by its name or as `file.py:function`."""
    if ":" not in name:
        if name not in validation.PROBLEMS:
            raise InputError(f"there is no problem {name!r}; {nearest(name, list(validation.PROBLEMS))}")
        builder: Callable[[int], Any] = validation.PROBLEMS[name]
        return builder
    function = load_object(name)
    if not callable(function):
        raise InputError(f"{name}: expected a function that returns a problem, got {function!r}")
    return lambda seed: validation.check_problem(
        function(seed=seed) if "seed" in inspect.signature(function).parameters else function(), name
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a validation, aligned; a problem's name stands at its first row only."""
    # z counts standard errors beyond the bias that is forgiven, so the two are never shown apart.
    columns = ("problem", "route", "relative error", "standard error", "forgiven", "z", "p", "seconds", "")
    lines = [list(columns)]
    previous = None
    for row in rows:
        lines.append(
            [
                row["problem"] if row["problem"] != previous else "",
                row["route"],
                _number(row["relative_error"], ".1e"),
                _number(row["standard_error"] or None, ".1e"),
                _number(row.get("allowance") or None, ".1e"),
                _number(row["z"] if row["standard_error"] else None, ".2f"),
                _number(row.get("p") if row["standard_error"] else None, ".1g"),
                _number(row["seconds"], ".2f"),
                {True: "ok", False: "FAILED", None: ""}[row["passed"]],
            ]
        )
        previous = row["problem"]
    return _aligned(lines, left=(0, 1, 8))


def _aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """The lines with their columns aligned: those of words to the left, those of numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            v.ljust(w) if i in left else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _number(value: float | None, form: str) -> str:
    """A number, or a dash where a route has none: exact ones have no standard error."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _resume_command(arguments: Sequence[str]) -> str:
    again = list(arguments) if "--resume" in arguments else [*arguments, "--resume"]
    return shlex.join(["align-cbrl", *again])


def _stopped(options: argparse.Namespace, arguments: Sequence[str], message: str) -> int:
    if options.command is not _run:
        return _fail(message.replace("stopped", "error", 1), 2)
    return _fail(f"{message}\nresume with: {_resume_command(arguments)}", 3)


def _fail(message: str, code: int) -> int:
    print(redact(message), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
