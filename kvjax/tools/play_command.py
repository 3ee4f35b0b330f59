"""`kvjax play`: what it reads from its options, what a resumed run knows of them, what it shows."""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvjax.base.values import require
from kvjax.config import SearchConfig
from kvjax.model import checkpoint
from kvjax.model.checkpoint import Checkpoint
from kvjax.model.folding import WEIGHT_DTYPES
from kvjax.tools import play_saving
from kvjax.tools.agent import Found
from kvjax.tools.machine import mesh_of
from kvjax.tools.options import add_model_options, agent_of, model_options, origins
from kvjax.tools.output import print_json, print_table, progress_bar
from kvjax.tools.routes import ROUTES

DEFAULT_AGENT = "cartpole_masked"
SAVE_EVERY = 20
"""Steps of the batch from one save to the next."""

_AGENT, _ENV = "checkpoint", "env"
_DEFAULTS: dict[str, Any] = {
    "episodes": 8,
    "simulations": SearchConfig().num_simulations,
    "seed": 0,
    "no_context": False,
    "route": "tree",
    "dtype": "float32",
}
"""Options that make a run the one that it is, and what they are unless they are said."""


def add_options(play: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    play.add_argument(
        _AGENT,
        nargs="?",
        help=f"a shipped agent ({', '.join(checkpoint.shipped())}), a .safetensors file or a"
        f" LightZero .pth.tar file (default: {DEFAULT_AGENT})",
    )
    add_model_options(play)
    default = {name: f" (default: {value})" for name, value in _DEFAULTS.items()}
    play.add_argument("--episodes", type=int, help=default["episodes"].strip())
    play.add_argument("--simulations", type=int, help=default["simulations"].strip())
    play.add_argument("--seed", type=int, help=f"episode i is reset with seed + i{default['seed']}")
    play.add_argument(
        "--no-context",
        action="store_const",
        const=True,
        help="push every step as an episode's first",
    )
    text = f"the tree in one jit, or on the host{default['route']}"
    play.add_argument("--route", choices=ROUTES, help=text)
    play.add_argument(
        "--dtype",
        choices=WEIGHT_DTYPES,
        help=f"of the transformer's and the heads' matrices{default['dtype']}",
    )
    play.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="search on N devices at once; a CPU is divided",
    )
    play.add_argument("--gif", metavar="PATH", help="write the first episode as an animation")
    _add_saving(play)


def _add_saving(play: argparse.ArgumentParser) -> None:
    group = play.add_argument_group("going on in another process")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--save", metavar="DIR", help="keep the run there, so that it may be killed at any time"
    )
    which.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with the run that is kept there, which knows its agent and its options",
    )
    group.add_argument(
        "--save-every",
        type=int,
        default=SAVE_EVERY,
        metavar="N",
        help=f"steps of all environments from one save to the next (default: {SAVE_EVERY})",
    )


def run(args: argparse.Namespace, measured: list[Callable[[], None]]) -> int:
    """Plays as the options say, or as those of the run that is resumed.

    Args:
      measured: takes what prints the summary of a run whose animation could not be written.
    """
    from kvjax.tools.play import AnimationError, Status, play

    mesh = mesh_of(args.devices)
    found = _begun(args) if args.resume is None else _resumed(args)
    folder = args.save or args.resume
    with progress_bar() as bar:
        task = bar.add_task("compiling", total=1.0)

        def show(status: Status) -> None:
            mean = f", mean return {status.mean_return:.1f}" if status.finished else ""
            text = f"{status.finished}/{args.episodes} episodes, {status.steps} steps{mean}"
            bar.update(task, completed=status.fraction, description=text)

        try:
            summary = play(
                found.agent,
                episodes=args.episodes,
                search_config=SearchConfig(num_simulations=args.simulations),
                seed=args.seed,
                route=args.route,
                keep_context=not args.no_context,
                gif_path=args.gif,
                mesh=mesh,
                dtype=args.dtype,
                save=folder,
                save_every=args.save_every,
                resume=folder is not None,
                progress=show,
            )
        except AnimationError as error:
            measured.append(functools.partial(_print_summary, args, found, error.summary))
            raise
    _print_summary(args, found, summary, args.gif)
    return 0


def _begun(args: argparse.Namespace) -> Found:
    """The agent of a run that begins, whose options are completed and kept."""
    _complete(args, {_AGENT: DEFAULT_AGENT} | _DEFAULTS)
    found = agent_of(args)
    if args.save is not None:
        play_saving.require_no_run(args.save)
        options = {name: getattr(args, name) for name in (_AGENT, *model_options(), *_DEFAULTS)}
        options[_ENV] = found.agent.environment and found.agent.environment.env_id
        told = {"options": options, "origins": dict(found.origins)}
        with play_saving.alone_in(args.save) as folder:
            play_saving.write_agent(folder, found.agent)
            play_saving.write_command(folder, told)
    return found


def _resumed(args: argparse.Namespace) -> Found:
    """The agent of a run that is resumed; what is said besides must agree with it.

    Raises:
      ValueError: the folder holds no run, or one of another agent or with other options.
    """
    command = play_saving.read_command(args.resume)
    kept = {name: _with_tuples(value) for name, value in command["options"].items()}
    for name in (*_DEFAULTS, _ENV):
        said = getattr(args, name)
        told = f"{args.resume} is a run with {name} {kept[name]}, got {said}"
        require(said in (None, kept[name]), told)
    agent = checkpoint.load(Path(args.resume) / play_saving.AGENT, env=args.env)
    is_said = any(getattr(args, name) is not None for name in (_AGENT, *model_options()))
    _complete(args, kept)
    if is_said:
        _require_same(args.resume, agent, agent_of(args).agent)
    return Found(agent, (), command["origins"])


def _complete(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """What was not said is as in `options`."""
    for name, value in options.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _with_tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _require_same(folder: str, kept: Checkpoint, said: Checkpoint) -> None:
    """Raises `ValueError` unless what is said is the agent that plays."""
    for part in ("config", "environment"):
        ours, theirs = (_fields(getattr(agent, part)) for agent in (kept, said))
        for name in ours | theirs:
            came, wanted = ours.get(name), theirs.get(name)
            require(came == wanted, f"{folder} is a run with {name} {came}, got {wanted}")
    same = play_saving.digest_of(kept) == play_saving.digest_of(said)
    require(same, f"{folder} is a run of an agent with other weights")


def _fields(part: Any) -> dict[str, Any]:
    return {} if part is None else dataclasses.asdict(part)


def _print_summary(
    args: argparse.Namespace, found: Found, summary: Any, animation: str | None = None
) -> None:
    if args.json:
        print_json(dataclasses.asdict(summary) | {"origins": dict(found.origins)})
        return
    rows = {
        "returns": " ".join(f"{score:g}" for score in summary.returns),
        "mean return": f"{summary.mean_return:.1f}",
        "steps": str(summary.steps),
        "searches per second": f"{summary.searches_per_second:.0f}"
        f" ({args.simulations} simulations each)",
        "compile time": f"{summary.compile_seconds:.1f} s",
        "whole run": f"{summary.seconds:.1f} s",
        "model": origins(found),
    }
    print_table("kvjax play", rows | ({"animation": animation} if animation else {}))
