"""The `kvjax` command: results on standard output, progress and messages on standard error."""

import argparse
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvjax import __version__
from kvjax.base import files
from kvjax.base.values import listed
from kvjax.config import WINDOW_MODES, EnvironmentConfig, SearchConfig
from kvjax.lightzero.checkpoint import described
from kvjax.lightzero.checkpoint.reading import SAID
from kvjax.model import checkpoint
from kvjax.model.checkpoint import Checkpoint
from kvjax.tools.agent import Found, find_agent
from kvjax.tools.planner import ROUTES

DEFAULT_AGENT = "cartpole_masked"

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

    play = _command(commands, "play", _play, "play episodes with a trained agent")
    play.add_argument(
        "checkpoint",
        nargs="?",
        default=DEFAULT_AGENT,
        help=f"a shipped agent ({', '.join(checkpoint.shipped())}), a .safetensors file or a"
        " LightZero .pth.tar file",
    )
    _add_model_options(play)
    play.add_argument("--episodes", type=int, default=8)
    play.add_argument("--simulations", type=int, default=SearchConfig().num_simulations)
    play.add_argument("--seed", type=int, default=0, help="episode i is reset with seed + i")
    play.add_argument(
        "--no-context", action="store_true", help="push every step as an episode's first"
    )
    play.add_argument(
        "--route", choices=ROUTES, default="tree", help="the tree in one jit, or on the host"
    )
    play.add_argument("--gif", metavar="PATH", help="write the first episode as an animation")

    verify = _command(commands, "verify", _verify, "replay a recorded LightZero trace")
    verify.add_argument("trace", metavar="TRACE.npz")
    verify.add_argument("--route", choices=ROUTES, default="tree")
    verify.add_argument(
        "--tolerance",
        type=float,
        help="largest error: absolute of a model's answers (1e-4), relative of root values"
        " (1e-5 of trees, 1e-4 of episodes)",
    )
    verify.add_argument(
        "--checkpoint", help="who played an episode trace (default: the shipped agent that did)"
    )

    convert = _command(commands, "convert", _convert, "write a LightZero checkpoint as safetensors")
    convert.add_argument("checkpoint", metavar="CKPT")
    convert.add_argument("output", metavar="OUT.safetensors")
    _add_model_options(convert)

    bench = _command(commands, "bench", _bench, "measure speed as ratios in one run")
    bench.add_argument("what", choices=("search", "ops", "bridge", "exactness"))
    bench.add_argument("--only", default="", metavar="SUBSTRING", help="e.g. embed=64,envs=8")
    bench.add_argument("--plot", metavar="PATH", help="exactness: also draw the errors")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.set_defaults(run=run)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group(
        "the model",
        "what a LightZero file does not tell: heads and context are taken from the run's"
        " total_config.py where that lies beside the file or a folder above; a kvjax file must"
        " agree with what is said",
    )
    model.add_argument("--num-heads", type=int)
    model.add_argument("--context-length", type=int, help="tokens")
    model.add_argument(
        "--window-mode", choices=WINDOW_MODES, help="what a full window does, and rotary positions"
    )
    model.add_argument(
        "--image-shape", type=_image_shape, metavar="C,H,W", help="where sides make equal tensors"
    )
    model.add_argument("--simnorm-group", type=int, help="size of SimNorm's groups (8)")
    model.add_argument("--rope-theta", type=float, help="base of rotary angles (10000)")
    model.add_argument(
        "--support", type=_support, metavar="FIRST,LAST", help="bins, as in --support=-50,50"
    )
    model.add_argument(
        "--use-policy-logits-clip",
        choices=("ignore",),
        help="read a model that clips the policy's logits, which kvjax does not do",
    )
    model.add_argument("--env", help="Gymnasium environment")
    model.add_argument(
        "--observation-scale", type=_numbers, metavar="X,X,...", help="factors of the observation"
    )


_MODEL_OPTIONS = (
    "num_heads",
    "context_length",
    "window_mode",
    "image_shape",
    "simnorm_group",
    "rope_theta",
    "support",
    "use_policy_logits_clip",
    "env",
)
"""Options that say something of the model to `find_agent`."""


def _numbers(text: str) -> tuple[float, ...]:
    return _parts(text, float, "numbers, as in 1,0,2.5")


def _image_shape(text: str) -> tuple[int, ...]:
    return _parts(text, int, "three integers, as in 3,84,84", 3)


def _support(text: str) -> tuple[int, ...]:
    return _parts(text, int, "two integers, as in -50,50", 2)


def _parts(
    text: str, kind: Callable[[str], Any], expected: str, count: int | None = None
) -> tuple[Any, ...]:
    parts = text.split(",")
    try:
        if count in (None, len(parts)):
            return tuple(map(kind, parts))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


def _find_agent(args: argparse.Namespace) -> Found:
    """Reads a shipped, kvjax or LightZero checkpoint; its environment, options first."""
    said = {name: getattr(args, name) for name in _MODEL_OPTIONS}
    with _warnings_shown():
        found = find_agent(args.checkpoint, **said)
    environment = _environment(args, found.agent)
    return dataclasses.replace(
        found, agent=dataclasses.replace(found.agent, environment=environment)
    )


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """What kvjax warns of goes to standard error, whatever handlers the root logger has."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("kvjax: %(message)s"))
    logger = logging.getLogger("kvjax")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _environment(args: argparse.Namespace, agent: Checkpoint) -> EnvironmentConfig | None:
    """What the checkpoint says of its environment, options first."""
    stored = agent.environment
    if args.env is None and stored is None:
        if args.observation_scale is not None:
            raise ValueError("--observation-scale needs --env")
        return None
    env_id = args.env if stored is None or args.env is not None else stored.env_id
    scale = args.observation_scale
    if scale is None and stored is not None and env_id == stored.env_id:
        scale = stored.observation_scale
    return EnvironmentConfig(env_id, scale)


def _origins(found: Found) -> list[str]:
    """What the model's tensors do not tell, and who said it."""
    config, origins = found.agent.config, found.origins
    shown = {
        "num_heads": f"{config.num_heads} heads",
        "context_length": f"context of {config.context_length} tokens",
        "window_mode": f'window mode "{config.window_mode}"',
    }
    for name in ("image_shape", "simnorm_group", "rope_theta", "support"):
        if origins[name] == SAID or origins[name].endswith(described.NAMES):
            shown[name] = f"{name} {getattr(config, name)}"
    return [f"{text}, {origins[name]}" for name, text in shown.items()]


def _play(args: argparse.Namespace) -> int:
    from kvjax.tools.play import AnimationError, Status, play

    found = _find_agent(args)
    search_config = SearchConfig(num_simulations=args.simulations)
    with _progress_bar() as bar:
        task = bar.add_task("compiling", total=1.0)

        def show(status: Status) -> None:
            mean = f", mean return {status.mean_return:.1f}" if status.finished else ""
            text = f"{status.finished}/{args.episodes} episodes, {status.steps} steps{mean}"
            bar.update(task, completed=status.fraction, description=text)

        try:
            summary = play(
                found.agent,
                episodes=args.episodes,
                search_config=search_config,
                seed=args.seed,
                route=args.route,
                keep_context=not args.no_context,
                gif_path=args.gif,
                progress=show,
            )
        except AnimationError as error:
            _measured.append(functools.partial(_print_summary, args, found, error.summary))
            raise
    _print_summary(args, found, summary, args.gif)
    return 0


def _print_summary(
    args: argparse.Namespace, found: Found, summary: Any, animation: str | None = None
) -> None:
    if args.json:
        _print_json(dataclasses.asdict(summary) | {"origins": dict(found.origins)})
        return
    _print_table(
        "kvjax play",
        {
            "returns": " ".join(f"{score:g}" for score in summary.returns),
            "mean return": f"{summary.mean_return:.1f}",
            "steps": str(summary.steps),
            "searches per second": f"{summary.searches_per_second:.0f}"
            f" ({args.simulations} simulations each)",
            "compile time": f"{summary.compile_seconds:.1f} s",
            "whole run": f"{summary.seconds:.1f} s",
        }
        | {"model": "\n".join(_origins(found))}
        | ({"animation": animation} if animation else {}),
    )


def _verify(args: argparse.Namespace) -> int:
    from kvjax.tools.parity.verify import verify

    report = verify(args.trace, route=args.route, tolerance=args.tolerance, agent=args.checkpoint)
    fields = report.as_json()
    if args.json:
        _print_json(fields)
    else:
        del fields["trace"]
        verdict = {"verdict": "within tolerance" if fields.pop("ok") else "NOT within tolerance"}
        rows = dict(_flat("", fields)) | verdict
        _print_table(f"kvjax verify {Path(args.trace).name}", rows)
    return 0 if report.ok else 1


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Rows of a table: names and texts of nested fields."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}, {key}" if name else key.replace("_", " "), inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _flat(f"{name} {index}", inner)
    else:
        yield name, f"{value:.3g}" if isinstance(value, float) else str(value)


def _convert(args: argparse.Namespace) -> int:
    with _warnings_shown():
        files.require_writable(args.output)
    found = _find_agent(args)
    checkpoint.save(args.output, found.agent)
    if args.json:
        _print_json(
            {
                "output": args.output,
                "config": dataclasses.asdict(found.agent.config),
                "ignored": found.ignored,
                "origins": dict(found.origins),
                "notes": found.agent.notes,
            }
        )
    else:
        print(f"{args.output}: {found.agent.config}")
        print("\n".join(_origins(found)))
        print(f"left out, inference does not read them: {listed(found.ignored) or 'nothing'}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from kvjax.tools.bench import bridge, exactness, ops, search

    runs: dict[str, Callable[..., dict[str, Any]]] = {
        "search": search.run,
        "ops": ops.run,
        "bridge": bridge.run,
        "exactness": functools.partial(exactness.run, plot=args.plot),
    }
    if args.plot and args.what != "exactness":
        raise ValueError(f"--plot belongs to bench exactness, not to bench {args.what}")
    rows: list[dict[str, Any]] = []
    _measured.append(lambda: _print_result(args, {"rows": rows, "complete": False}))
    with _progress_bar() as bar:
        task = bar.add_task("measuring", total=1.0)
        result = runs[args.what](
            only=args.only,
            progress=lambda fraction, text: bar.update(task, completed=fraction, description=text),
            rows=rows,
        )
    _measured.clear()
    _print_result(args, result)
    return 0


def _print_result(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """A benchmark's result, or the rows of one that did not come to its end, if there are any."""
    complete = result.get("complete", True)
    if args.json and (complete or result["rows"]):
        _print_json(result)
        return
    if result["rows"]:
        _print_rows(f"kvjax bench {args.what}", result["rows"])
    for extra in result.keys() - {"machine", "versions", "rows", "complete"}:
        found = result[extra]
        _print_rows(extra, found if isinstance(found, list) else [found])


class _Output(Console):
    """A console that leaves it to `main` what a closed pipe means."""

    def on_broken_pipe(self) -> None:
        """Raises what rich would end the process for, with exit code 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@contextlib.contextmanager
def _progress_bar() -> Iterator[Progress]:
    """A bar on standard error, which is gone where an error's line takes its place."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_Output(stderr=True)) as bar:
        try:
            yield bar
        except BaseException:
            bar.live.transient = True
            bar.console.quiet = not bar.console.is_interactive
            raise


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, allow_nan=False))


def _print_table(title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    _Output().print(table)


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    columns = [name for name, value in rows[0].items() if not isinstance(value, list)]
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        shown = (row[name] for name in columns)
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in shown))
    _Output().print(table)


if __name__ == "__main__":
    sys.exit(main())
