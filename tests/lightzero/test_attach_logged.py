"""Counters in LightZero's own logs."""

import ast
import importlib.util
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest

from kvjax import lightzero
from kvjax.tools.bench import lightzero_020

if not lightzero_020.available():
    pytest.skip("LightZero 0.2.0 is not installed", allow_module_level=True)

SMALL = {"observation_size": 4, "num_actions": 2, "embed_dim": 16, "num_layers": 1, "num_heads": 2}


class Board(dict):
    """A TensorBoard that keeps what it is given."""

    def add_scalar(self, name, value, at):
        self[name] = value, at


def methods_of(module, name):
    """LightZero's own class with one method: the whole module imports what its training needs."""
    folder = Path(importlib.util.find_spec("lzero").origin).parent
    tree = ast.parse((folder / "worker" / f"{module}.py").read_text())
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef)]
    (method,) = [node for node in body if getattr(node, "name", "") == name]
    names = {"np": np, "Callable": Callable, "Optional": Optional, "Tuple": tuple, "Dict": dict}
    names["Any"] = Any
    exec(compile(ast.Module([method], []), module, "exec"), names)
    return type(module, (), {name: names[name]})


@pytest.fixture
def handle():
    model = lightzero_020.build_model(**SMALL, context_length=4, num_envs=2, num_simulations=2)
    return lightzero.attach(model.world_model), model


def made(kind, name, **state):
    """A worker without environments and policy."""
    worker = kind.__new__(kind)
    vars(worker).update(_logger=logging.getLogger(name), _tb_logger=Board(), _instance_name=name)
    vars(worker).update(state)
    return worker


def test_a_collector_tells_when_it_reports(handle, caplog):
    class Policy:
        gumbel_algo = use_wandb = False

    episode = {"step": 3, "time": 1.0, "reward": 2.0, "visit_entropy": 0.5}
    state = {"_rank": 0, "_collect_print_freq": 10, "_total_envstep_count": 7}
    state |= {"_last_train_iter": 0, "_total_episode_count": 1, "_total_duration": 0.0}
    state |= {"collect_with_pure_policy": False, "policy_config": Policy}
    worker = made(
        methods_of("muzero_collector", "_output_log"), "collector", _episode_info=[episode], **state
    )
    handle[0].log_with(worker)
    with caplog.at_level(logging.INFO):
        worker._output_log(5)
        assert "kvjax" not in caplog.text
        worker._output_log(10)
    assert "collect end" in caplog.text
    assert "node_pool_hits" in caplog.text
    assert worker._tb_logger["collector_iter/kvjax_misses"] == (0, 10)
    assert worker._tb_logger["collector_step/kvjax_nodes_slots"][1] == 7


def test_an_evaluator_tells_and_answers_as_before(handle, monkeypatch):
    kind = methods_of("muzero_evaluator", "eval")
    assert list(inspect.signature(kind.eval).parameters)[1:4] == [
        "save_ckpt_fn",
        "train_iter",
        "envstep",
    ]
    asked = []
    monkeypatch.setattr(kind, "eval", lambda self, *args, **named: asked.append((args, named)))
    worker = made(kind, "evaluator")
    handle[0].log_with(worker, scope="evaluate")
    worker.eval(None, 3, envstep=9, n_episode=2)
    assert asked == [((None, 3, 9), {"n_episode": 2})]
    assert not worker._tb_logger  # nobody was in that scope
    with handle[0].scope("evaluate"):
        pass
    worker.eval(None, 4, 11)
    assert worker._tb_logger["evaluator_step/kvjax_queries"] == (0, 11)
    handle[0].detach()
    worker._tb_logger.clear()
    worker.eval(None, 5, 12)
    assert len(asked) == 3
    assert not worker._tb_logger


def test_other_workers_are_refused(handle):
    with pytest.raises(ValueError, match="a collector or an evaluator of LightZero, got a list"):
        handle[0].log_with([])
