"""One task of LightZero's multi-task models (`WorldModelMT` of main), as a model of one task.

Tasks share the transformer, the positions and the actions' table; heads, and in principle encoders,
are each task's own or shared. Heads are narrower than those of main's other models, which are still
there and not read. `task_embed_option` says what a task's embedding is for:

* "add_task_embed": it is added to every observation's token, also to that of a predicted latent.
  Observations stand in a window's even slots and nothing else does, so it is folded into the even
  rows of the position table. Latents stay without it; LightZero's root latents are with it. Not in
  window mode "reset": LightZero then keeps an imagined latent without its embedding.
* "concat_task_embed": it ends the encoder's latents and the actions' tokens, which are narrower by
  that. The table's rows are completed here; the encoder's latents by the model (`task_size`).
  Predicted latents have the full width by themselves.
* "register_task_embed": tokens that are computed anew beside each token; they read it and the
  window, and it reads them. No weights of a model of one task do that: refused.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from kvjax.base.values import is_integer, listed, require
from kvjax.config import BLOCK, WorldModelConfig
from kvjax.lightzero.checkpoint.tensors import HEADS, Sorted, Tensors
from kvjax.model.world_model import check_parameter

TASK, OPTION = "task_id", "task_embed_option"
"""Options of `kvjax.lightzero.load`: which task, and what the tasks' embeddings are for."""

ADD, CONCAT, REGISTER, NONE = "add_task_embed", "concat_task_embed", "register_task_embed", "none"
USES = (ADD, CONCAT, REGISTER, NONE)

_BEGIN, _ANY = r"(?:^|(?<=\.))", "|".join(HEADS)
_HEAD = rf"{_BEGIN}({_ANY})_multi_task\.(\d+)\."
_ENCODER = rf"{_BEGIN}(representation_network|tokenizer\.encoder)\.(\d+)\."
_ACTION = rf"{_BEGIN}(act_embedding_table)\.(\d+)\.(?=0\.)"  # of continuous actions
_UNREAD = rf"{_BEGIN}(?:({_ANY})\.head_module|transformer\.task_embed)\."

_EMBEDDINGS, _POSITIONS = "task_emb.weight", "pos_emb.weight"
_ACTIONS = "act_embedding_table.weight"

_TORCH_EPSILON = 1e-7
"""What torch's `Embedding(max_norm=...)` adds to the norm that it divides by."""


@dataclasses.dataclass(frozen=True)
class Selected:
    """One task's tensors, heads and encoder by the names that models of one task have."""

    state: Any
    task: int | None = None  # None: the model has one task
    count: int | None = None  # of the model's tasks, where that is known
    ignored: tuple[str, ...] = ()  # what other tasks have, as the source names it


def select(state: Any, task: Any, told: int | None = None) -> Selected:
    """Takes one task's tensors out of a state dict; hands back what is no multi-task model's.

    By LightZero's rules: a single head is shared, and a task that lacks an encoder has the first.

    Args:
      state: tensors by name, or what is no state dict.
      task: `task_id` as it was said.
      told: number of tasks by the model's configuration.

    Raises:
      ValueError: the task is not said, is none of the model's, or the model has one task.
    """
    names = [name for name in state if isinstance(name, str)] if isinstance(state, Mapping) else []
    heads, encoders = _indices(_HEAD, names), _indices(_ENCODER, names)
    if not heads:
        require(task is None, f"{TASK} is for multi-task models, this model has one task")
        found = [name for name in names if name.endswith(_EMBEDDINGS)]
        told_of = "unsupported variant: multi-task models without heads of tasks"
        require(not found, f"{told_of} (tensor {listed(found)})")
        return Selected(state)
    rows = [_length(state[name]) for name in names if name.endswith(_EMBEDDINGS)]
    counts = (told or 0, *rows, *(n + 1 for n in heads | encoders))
    count = None if max(counts) == 1 and told is None else max(counts)
    task = _checked(task, count)
    kept = {
        _HEAD: task if len(heads) > 1 else min(heads),
        _ENCODER: task if task in encoders else 0,
        _ACTION: task,
    }
    renamed = {name: _renamed(name, kept) if isinstance(name, str) else name for name in state}
    return Selected(
        {new: state[name] for name, new in renamed.items() if new is not None},
        task,
        count,
        tuple(name for name, new in renamed.items() if new is None),
    )


def notes(one: Selected) -> tuple[str, ...]:
    """What whoever runs the model of one task should know: whose it is."""
    if one.task is None:
        return ()
    of_all = "" if one.count is None else f" of {one.count} tasks, 0 .. {one.count - 1}"
    return (f"this is task {one.task} of a multi-task model{of_all}",)


def _indices(pattern: str, names: Iterable[str]) -> set[int]:
    return {int(found[2]) for name in names if (found := re.search(pattern, name))}


def _length(tensor: Any) -> int:
    return int(next(iter(getattr(tensor, "shape", ())), 0))


def _checked(task: Any, count: int | None) -> int:
    """The task; where all is shared and nobody tells how many there are, any is the same."""
    if task is None and count in (None, 1):
        return 0
    require(task is not None, f"the model has {count} tasks: pass {TASK}=, 0 .. {(count or 1) - 1}")
    there = "of at least 0" if count is None else f"in 0 .. {count - 1}"
    require(
        is_integer(task) and task >= 0 and (count is None or task < count),
        f"{TASK} must be an integer {there}, got {task!r}",
    )
    return int(task)


def _renamed(name: str, kept: Mapping[str, int]) -> str | None:
    """A tensor's name in a model of one task; None of those that the task does not read."""
    if re.search(_UNREAD, name):
        return None
    for pattern, index in kept.items():
        if found := re.search(pattern, name):
            is_ours = int(found[2]) == index
            return f"{name[: found.start()]}{found[1]}.{name[found.end() :]}" if is_ours else None
    return name


def set_embedding_apart(found: Sorted, task: int | None) -> Sorted:
    """Takes the tasks' embeddings from the weights and keeps this task's.

    Raises:
      ValueError: they are no table, or this task has no row.
    """
    if task is None or _EMBEDDINGS not in found.weights:
        return found
    weights = dict(found.weights)
    table = weights.pop(_EMBEDDINGS)
    require(
        table.ndim == 2 and task < len(table),
        f"{_EMBEDDINGS} has shape {table.shape}, expected a row for task {task}",
    )
    return dataclasses.replace(found, weights=weights, embedding=table[task])


def fold(
    found: Sorted, config: WorldModelConfig, said: str | None, told: str | None
) -> tuple[Tensors, WorldModelConfig]:
    """The weights of a model of one task, with the task's embedding in them, and what says so.

    Args:
      found: what `set_embedding_apart` left.
      config: of the model of one task.
      said: `task_embed_option` as it was said.
      told: what the model's configuration says of it; "none" where it is not used.

    Raises:
      ValueError: nobody says what the embedding is for, or it is for what kvjax does not have; the
        tensors contradict it or do not fit.
    """
    use = _use(found, config, said, told)
    weights = dict(found.weights)
    if use == NONE or found.embedding is None:
        return weights, config
    vector = _vector(found.embedding, config.task_size or config.embed_dim, config.simnorm_group)
    if use == ADD:
        require(
            config.window_mode != "reset",
            f'{ADD} excludes window_mode "reset": LightZero forgets the embedding of an imagined'
            " latent there",
        )
        table = weights.get(_POSITIONS, np.zeros(0))
        check_parameter(_POSITIONS, table, (config.max_tokens or 0, config.embed_dim))
        weights[_POSITIONS] = table.copy()
        weights[_POSITIONS][::BLOCK] += vector
        return weights, dataclasses.replace(config, task_in_positions=True)
    actions = weights[_ACTIONS]
    ends = np.broadcast_to(vector, (len(actions), len(vector)))
    weights[_ACTIONS] = np.concatenate([actions, ends], axis=1)
    return weights | ({_EMBEDDINGS: vector[None]} if config.has_encoder else {}), config


def _use(found: Sorted, config: WorldModelConfig, said: str | None, told: str | None) -> str:
    require(said in (None, *USES), f"{OPTION} must be one of {', '.join(USES)}, got {said!r}")
    if found.embedding is None:
        require(said in (None, NONE), f"{OPTION} is {said}, but there is no {_EMBEDDINGS}")
        return NONE
    if config.task_size:
        require(
            said in (None, CONCAT),
            f"{OPTION} is {said}, but tokens of actions are {config.task_size} narrower than"
            f" others: that is {CONCAT}",
        )
        return CONCAT
    use = said or told
    require(
        use is not None,
        f"the tensors do not tell what {_EMBEDDINGS} is for: pass {OPTION}=, {ADD} or {NONE}, or"
        " keep the run's total_config.py beside the file",
    )
    require(use != CONCAT, f"{OPTION} is {CONCAT}, but tokens of actions are as wide as others")
    require(
        use in (ADD, NONE),
        f"unsupported variant: {use}: its register tokens are computed anew beside each token,"
        " which no weights of one task can do",
    )
    return str(use)


def _vector(row: np.ndarray[Any, Any], size: int, group: int) -> np.ndarray[Any, Any]:
    """A task's embedding as LightZero uses it: its norm at most 1, then SimNorm."""
    check_parameter(_EMBEDDINGS, row, (size,))
    require(
        size % group == 0, f"simnorm_group must divide the embedding of a task, {size}: {group}"
    )
    norm = float(np.linalg.norm(row))
    groups = (row / (norm + _TORCH_EPSILON) if norm > 1.0 else row).reshape(-1, group)
    weights = np.exp(groups - groups.max(axis=1, keepdims=True))
    shares: np.ndarray[Any, Any] = weights / weights.sum(axis=1, keepdims=True)
    return shares.reshape(-1).astype(np.float32)
