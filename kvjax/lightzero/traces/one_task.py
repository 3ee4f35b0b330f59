"""A multi-task torch model, asked as models of one task are."""

import inspect
from typing import Any

from kvjax.lightzero.checkpoint import tasks
from kvjax.lightzero.checkpoint.described import by_module


def has_tasks(model: Any) -> bool:
    """Whether a world model is told the task at each call, as main's `WorldModelMT` is."""
    return tasks.TASK in inspect.signature(model.retrieve_or_generate_kvcache).parameters


def of(model: Any, task: int | None) -> Any:
    """Makes a copied model answer for a task; its observations are then latents.

    Its root step gets the methods' names and arguments that `WorldModel` of main has. It leaves the
    latents by which the model knows its roots in `latent_state`: those with the task's embedding.
    """
    if not has_tasks(model):
        return model
    begin, imagine = model.reset_for_initial_inference, model.forward_recurrent_inference

    def root(before: Any, action: Any, latent: Any, timestep: Any) -> Any:
        asked = {"obs": before, "action": action, "current_obs": latent}
        return begin(asked, task_id=task)[0]

    def node(history: Any, index: int, depth: Any, timestep: Any) -> Any:
        return imagine(history, index, depth, task_id=task)

    model.tokenizer.encode_to_obs_embeddings = lambda latent, task_id=0: latent
    model.wm_forward_for_initial_infererence = root
    model.forward_recurrent_inference = node
    return model


def described(model: Any, task: int | None) -> dict[str, Any]:
    """What a trace says of the task, as options of `load`."""
    if not has_tasks(model):
        return {}
    use = by_module(model).embedding_use
    return {tasks.TASK: task or 0} | ({} if use is None else {tasks.OPTION: use})
