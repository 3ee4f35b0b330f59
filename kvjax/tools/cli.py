"""The `kvjax` command: results on standard output, progress and messages on standard error."""

import argparse
import contextlib
import dataclasses
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvjax import __version__
from kvjax.base import files
from kvjax.base.values import listed, require
from kvjax.config import TREES, SearchConfig
from kvjax.lightzero.checkpoint import save
from kvjax.model import checkpoint
from kvjax.tools import play_command, training
from kvjax.tools.machine import keep_compiled
from kvjax.tools.options import add_model_options, agent_of, origins
from kvjax.tools.output import (
    print_json,
    print_rows,
    print_table,
    progress_bar,
    warnings_shown,
)
from kvjax.tools.play_command import DEFAULT_AGENT
from kvjax.tools.routes import ROUTES

LIGHTZERO = ".pth.tar"
BENCHMARKS = ("search", "ops", "bridge", "exactness", "weights", "all")
"""Modules of `kvjax.tools.bench`, and all of them."""

_OF_ONE = {"plot": "exactness", "devices": "search", "output": "all", "into": "all"}
"""Options that belong to one benchmark."""

_USER_ERRORS = (ValueError, OSError, ImportError, MemoryError)
_TOLD_BY_JAX = ("RESOURCE_EXHAUSTED", "Unable to initialize backend")
"""What jax says in a `RuntimeError` that is no fault of a program."""
_BAD_INPUT = 2
_INTERRUPTED = 130

_measured: list[Callable[[], None]] = []
"""Print what a command has measured that has not come to its end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 0 only on success."""
    args = _parser().parse_args(argv)
    logging.getLogger("jax").setLevel(logging.ERROR)
    _measured.clear()
    try:
        if not args.no_compilation_cache:
            keep_compiled()
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except _USER_ERRORS as error:
        return _stop(args.command, str(error) or type(error).__name__, _BAD_INPUT)
    except KeyboardInterrupt:
        return _stop(args.command, "interrupted", _INTERRUPTED)
    except RuntimeError as error:
        if not any(text in str(error) for text in _TOLD_BY_JAX):
            raise
        return _stop(args.command, str(error), _BAD_INPUT)


def leave() -> None:
    """Prints what has been measured so far and leaves no unfinished file: the process ends."""
    files.discard_unfinished()
    _print_measured()


def _stop(command: str, why: str, code: int) -> int:
    _print_measured()
    with contextlib.suppress(OSError):
        print(f"kvjax {command}: {' '.join(why.split())}", file=sys.stderr)
    return code


def _print_measured() -> None:
    with contextlib.suppress(OSError):  # standard output may be what failed
        while _measured:
            _measured.pop()()
        sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvjax", description=__doc__)
    parser.add_argument("--version", action="version", version=f"kvjax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    play_command.add_options(
        _command(commands, "play", _play, "play episodes with a trained agent")
    )
    _add_explore(commands)
    _add_train(commands)

    verify = _command(commands, "verify", _verify, "replay a recorded LightZero trace")
    verify.add_argument("trace", metavar="TRACE.npz")
    _add_route(verify)
    verify.add_argument(
        "--tolerance",
        type=float,
        help="largest error: absolute of a model's answers (1e-4), relative of root values"
        " (1e-5 of trees, 1e-4 of episodes)",
    )
    verify.add_argument(
        "--checkpoint", help="who played an episode trace (default: the shipped agent that did)"
    )

    text = "write a LightZero checkpoint as safetensors, or either as a LightZero checkpoint"
    convert = _command(commands, "convert", _convert, text)
    convert.add_argument("checkpoint", metavar="CKPT", help="as of play")
    convert.add_argument(
        "output", metavar="OUT", help=f"*.safetensors, or *{LIGHTZERO} for LightZero"
    )
    add_model_options(convert)
    convert.add_argument(
        "--no-encoder",
        dest="encoder",
        action="store_const",
        const=None,
        default="own",
        help="leave the encoder out: observations are then latents",
    )
    convert.add_argument(
        "--compiled",
        action="store_true",
        help=f"*{LIGHTZERO}: with names as the policy of LightZero 0.2.0 loads them",
    )

    bench = _command(commands, "bench", _bench, "measure speed as ratios in one run")
    bench.add_argument("what", choices=BENCHMARKS)
    bench.add_argument("--only", default="", metavar="SUBSTRING", help="e.g. embed=64,envs=8")
    bench.add_argument(
        "--devices", type=int, metavar="N", help="search: kvjax on N devices; a CPU is divided"
    )
    bench.add_argument(
        "--output", metavar="DIR", help="all: what it measures and draws, row by row"
    )
    bench.add_argument(
        "--into", action="append", metavar="FILE.md", help="all: writes its marked tables anew"
    )
    bench.add_argument("--plot", metavar="PATH", help="exactness: also draw the errors")
    return parser


def _add_explore(commands: Any) -> None:
    text = "write one search of an episode as a page to step through"
    explore = _command(commands, "explore", _explore, text)
    explore.add_argument("checkpoint", nargs="?", default=DEFAULT_AGENT, help="as of play")
    add_model_options(explore)
    explore.add_argument("--output", required=True, metavar="PATH.html")
    explore.add_argument("--step", type=int, default=10, help="which of the episode's, from 0")
    explore.add_argument("--simulations", type=int, default=50)
    explore.add_argument("--tree", choices=TREES, default=SearchConfig().tree, help="whose rules")
    explore.add_argument("--seed", type=int, default=0, help="the episode is reset with it")


def _add_train(commands: Any) -> None:
    train = _command(commands, "train", training.run, "train an agent from nothing")
    train.add_argument("--env", required=True, help="cartpole, cartpole_masked or tmaze")
    train.add_argument("--output", required=True, metavar="DIR", help="takes agents and curves")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--max-env-steps", type=int, default=20_000, help="default: 20000")
    train.add_argument(
        "--target",
        type=float,
        help="mean return that ends the run (default: the environment's; inf for none)",
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of TrainConfig, as in --set learning_rate=1e-3",
    )
    train.add_argument(
        "--resume", action="store_true", help="go on with what DIR holds, if it holds a run"
    )


def _add_route(parser: argparse.ArgumentParser) -> None:
    text = "the tree in one jit, or on the host"
    parser.add_argument("--route", choices=ROUTES, default="tree", help=text)


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="compile everything anew, instead of keeping it in $XDG_CACHE_HOME/kvjax",
    )
    parser.set_defaults(run=run)
    return parser


def _play(args: argparse.Namespace) -> int:
    return play_command.run(args, _measured)


def _explore(args: argparse.Namespace) -> int:
    from kvjax.tools.explore import explore

    with warnings_shown():
        files.require_writable(args.output)
    found = agent_of(args)
    search = SearchConfig(num_simulations=args.simulations, tree=args.tree)
    explored = explore(found.agent, args.output, step=args.step, search=search, seed=args.seed)
    if args.json:
        print_json(dataclasses.asdict(explored) | {"origins": dict(found.origins)})
    else:
        ended = "" if explored.step == args.step else ", the episode's last"
        print(f"{args.output}: step {explored.step}{ended}, action {explored.action}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from kvjax.tools.parity.verify import verify

    report = verify(args.trace, route=args.route, tolerance=args.tolerance, agent=args.checkpoint)
    if args.json:
        print_json(report.as_json())
    else:
        print_table(f"kvjax verify {Path(args.trace).name}", report.as_text())
    return 0 if report.ok else 1


def _convert(args: argparse.Namespace) -> int:
    with warnings_shown():
        files.require_writable(args.output)
    found = agent_of(args)
    agent, model = found.agent, None
    if args.output.endswith(LIGHTZERO):
        with warnings_shown():
            model = save(agent.params, agent.config, args.output, compiled=args.compiled)
    else:
        require(not args.compiled, f"--compiled is for *{LIGHTZERO}, got {args.output}")
        checkpoint.save(args.output, agent)
    if args.json:
        print_json(
            {
                "output": args.output,
                "config": dataclasses.asdict(agent.config),
                "ignored": found.ignored,
                "origins": dict(found.origins),
                "notes": agent.notes,
            }
            | ({} if model is None else {"policy.model": model})
        )
    else:
        print(f"{args.output}: {agent.config}\n{origins(found)}")
        print(f"left out, inference does not read them: {listed(found.ignored) or 'nothing'}")
        if model is not None:
            print(f"LightZero's policy.model: {model}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    more = {name: getattr(args, name) for name in _OF_ONE if getattr(args, name) is not None}
    for name in more:
        if args.what != _OF_ONE[name]:
            raise ValueError(f"--{name} belongs to bench {_OF_ONE[name]}, not to bench {args.what}")
    module = "everything" if args.what == "all" else args.what
    run = importlib.import_module(f"kvjax.tools.bench.{module}").run
    rows: list[dict[str, Any]] = []
    _measured.append(lambda: _print_result(args, {"rows": rows, "complete": False}))
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=1.0)

        def show(share: float, text: str) -> None:
            bar.update(task, completed=share, description=text)

        result = run(only=args.only, progress=show, rows=rows, **more)
    _measured.clear()
    _print_result(args, result)
    return 0


def _print_result(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """A benchmark's result, or the rows of one that did not come to its end, if there are any."""
    complete = result.get("complete", True)
    if args.json and (complete or result["rows"]):
        print_json(result)
        return
    for part, found in result.get("parts", {}).items():
        print_rows(f"kvjax bench {part}", found["rows"])
    if "parts" in result:
        return
    if result["rows"]:
        print_rows(f"kvjax bench {args.what}", result["rows"])
    for extra in result.keys() - {"machine", "versions", "rows", "complete"}:
        found = result[extra]
        print_rows(extra, found if isinstance(found, list) else [found])


if __name__ == "__main__":
    sys.exit(main())
