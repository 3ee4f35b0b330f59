"""A search for any cached model, in one jit: roots and a model's step in, actions out.

Shapes: B rows, A actions, K tokens that a step adds, T slots of a stored window, N nodes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import meshes
from kvjax.base.arrays import ArrayLike, validate_range
from kvjax.base.compilation import is_traced, jit_small_operations
from kvjax.base.meshes import Share
from kvjax.base.values import require, require_type
from kvjax.config import SearchConfig
from kvjax.mcts import policies, search_tree, subtree
from kvjax.mcts import tokens as own_tokens
from kvjax.mcts.output import Dials, SearchOutput, split
from kvjax.mcts.policies import Grown
from kvjax.mcts.protocol import (
    Facts,
    Root,
    TreeModel,
    checked,
    draws,
    root_of,
    validate_root,
    with_length,
)
from kvjax.mcts.search_tree import SearchTree
from kvjax.mcts.subtree import Kept, Past
from kvjax.mcts.tree import Rules, Tree
from kvjax.model.checks import validate_key

ANEW = -1
"""In place of the action that led to a root: nothing is kept."""

_NARROW = 512
"""Numbers of one token up to which loops are faster in one thread."""


def tree_search(
    params: Any,
    rng: jax.Array,
    root: Root | Any,
    model: TreeModel,
    *,
    search: SearchConfig,
    kept: Kept | None = None,
    last_action: ArrayLike | None = None,
    return_tree: bool = False,
) -> SearchOutput:
    """Plans each row's next action with any model whose nodes hold tokens. One jitted call.

    A node stores the K tokens that its step added, and reads those of its ancestors where they lie.

    Args:
      params: handed to the model's step: any pytree.
      rng: a JAX PRNG key.
      root: where the search begins, a `kvjax.Root`; or mctx's `RootFnOutput` with the mapping
        `{"tokens": .., "length": .., "state": .., "data": .., "legal": ..}` as its embedding. If
        the rows of `policy` lie on a mesh, each device searches its own.
      model: what a step does (static: each new `TreeModel` of another function is compiled anew).
      search: the search's configuration (static).
      kept: with `kept_nodes`, the previous call's `out.kept`, from which rows go on that took an
        action it had tried; nothing by default. Drop it when the parameters change.
      last_action: [B] integer, beside `kept`: the actions that led from its roots to these; -1
        begins a row anew.
      return_tree: whether the output has the whole tree.

    Returns:
      A `SearchOutput`. A row in which the model answers NaN, or in which an episode goes on without
      a legal action, is reported in `finite`; other rows do not notice.

    Raises:
      TypeError: an argument, or what the model's step returns, is of another type.
      ValueError: shapes or dtypes do not fit together, or host arrays hold values out of range;
        `kept` without `kept_nodes`, or of another configuration.
    """
    args, static = _checked(params, rng, root, model, search, kept, last_action, return_tree)
    output: SearchOutput = _tree_search(*args, **static)
    return output


def compiled_tree_search(*args: Any, **options: Any) -> jax.stages.Compiled:
    """What `tree_search` runs for these arguments: its text, and how much memory it takes."""
    options = {"kept": None, "last_action": None, "return_tree": False} | options
    args, static = _checked(*args, **options)
    program: jax.stages.Compiled = _tree_search.lower(*args, **static).compile()
    return program


def _checked(
    params: Any,
    rng: jax.Array,
    root: Any,
    model: TreeModel,
    search: SearchConfig,
    kept: Kept | None,
    last_action: ArrayLike | None,
    return_tree: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `tree_search` as the jitted one takes them."""
    validate_key(rng)
    require_type("model", model, TreeModel, "kvjax.TreeModel")
    require_type("search", search, SearchConfig, "kvjax.SearchConfig")
    root = _arrays(root_of(root))
    validate_root(root, model)
    if search.q_transform is None and search.tree != "lightzero":
        name = "siblings" if search.tree == "muzero" else "mix_value"
        search = dataclasses.replace(search, q_transform=name)
    if kept is not None:
        subtree.require_kept_nodes(search)
        require_type("kept", kept, Kept, "kvjax.Kept")
        require(last_action is not None, "kept needs last_action, which led to the roots")
    before = None
    if search.kept_nodes > 0:
        require(
            not model.chance,
            f"kept_nodes must be 0 for a model with chance nodes, got {search.kept_nodes}: the next"
            " root lies two edges below",
        )
        kept = _begin(params, rng, root, model=model, search=search) if kept is None else kept
        before = kept, _actions(last_action, root)
    dials, search = split(search)
    static = {"model": model, "search": search, "return_tree": return_tree}
    width = sum(np.prod(x.shape[2:], dtype=int) for x in jax.tree.leaves(root.tokens))
    return (params, rng, root, before, dials), static | {
        "narrow": width <= _NARROW,
        "rows": meshes.rows_of(root.policy),
    }


def _arrays(root: Root) -> Root:
    names = "length", "policy", "value", "legal"
    lists = {name: getattr(root, name) for name in names}
    arrays = {name: _as_array(value) for name, value in lists.items() if value is not None}
    return jax.tree.map(_as_array, dataclasses.replace(root, **arrays))  # type: ignore[no-any-return]


def _as_array(x: Any) -> ArrayLike:
    return x if isinstance(x, jax.Array) else np.asarray(x)


def _actions(last_action: ArrayLike | None, root: Root) -> ArrayLike:
    rows, num_actions = np.shape(root.policy)
    if last_action is None:
        return _anew(rows) if is_traced() else _anew_kept(rows)
    actions = _as_array(last_action)
    is_integer = jnp.issubdtype(actions.dtype, jnp.integer)
    require(
        actions.shape == (rows,) and is_integer,
        f"last_action must be integers of shape {(rows,)}, got {actions.dtype} {actions.shape}",
    )
    validate_range("last_action", actions, ANEW, num_actions - 1)
    return actions


def _anew(rows: int) -> jax.Array:
    return jnp.full((rows,), ANEW, jnp.int32)


@functools.lru_cache
def _anew_kept(rows: int) -> jax.Array:
    """Kept on the device, so that a call moves nothing there."""
    actions: jax.Array = jax.jit(_anew, static_argnums=0)(rows)
    return actions


@functools.partial(jax.jit, static_argnames=("model", "search"))
def _begin(
    params: Any, rng: jax.Array, root: Root, *, model: TreeModel, search: SearchConfig
) -> Kept:
    """Trees in which no row finds its action."""
    root = with_length(root)
    _, facts = checked(model, params, rng, root)
    fields = policies.num_fields(search, discounted=facts.discounted, raw=True)
    return subtree.begin(model, root, search, fields)


@functools.partial(
    jit_small_operations,
    one_thread=lambda narrow, **_: narrow,
    static_argnames=("model", "search", "return_tree", "narrow", "rows"),
)
def _tree_search(
    params: Any,
    rng: jax.Array,
    root: Root,
    before: tuple[Kept, jax.Array] | None,
    dials: Dials,
    *,
    model: TreeModel,
    search: SearchConfig,
    return_tree: bool,
    narrow: bool,
    rows: Any = None,
) -> SearchOutput:
    """`before` is what was kept, and the actions that followed; `rows`, how they lie on a mesh."""
    del narrow
    root = with_length(root)
    model, facts = checked(model, params, rng, root)
    if rows is not None and draws(model, params, rng, root):
        rows = None  # a step draws for all rows at once
    how: dict[str, Any] = {"facts": facts, "return_tree": return_tree, "share": Share.of(rows)}
    run = functools.partial(_plan, model=model, search=search, **how)
    kept, axes = None if before is None else before[0], meshes.axes_of(rows, root.policy)
    arguments, whole = (params, rng, root, before, dials), meshes.spec()
    of_rows = meshes.spec(axes)
    past = None if before is None else (meshes.specs(kept, axes, 1), of_rows)
    lie, results = (whole, whole, of_rows, past, whole), by_rows(axes, kept, return_tree)
    output: SearchOutput = meshes.run(run, arguments, rows, lie, results)
    return output


def _plan(
    params: Any, rng: jax.Array, root: Root, before: Any, dials: Dials, **how: Any
) -> SearchOutput:
    """`plan` for a root that is the user's, whose clock counts searches."""
    past = None
    if before is not None:
        kept, last_action = before
        past = Past(kept, last_action, jnp.where(last_action < 0, 0, kept.timestep + 1))
    return plan(params, rng, _cast(root), past, dials, raw=True, **how)


def _cast(root: Root) -> Root:
    """Numbers as the tree keeps them."""
    return dataclasses.replace(
        root,
        length=jnp.asarray(root.length, jnp.int32),
        policy=jnp.asarray(root.policy, jnp.float32),
        value=jnp.asarray(root.value, jnp.float32),
    )


def plan(
    params: Any,
    rng: jax.Array,
    root: Root,
    past: Past | None,
    dials: Dials,
    *,
    model: TreeModel,
    facts: Facts,
    search: SearchConfig,
    raw: bool,
    share: Share,
    return_tree: bool = False,
) -> SearchOutput:
    """The search itself, traced.

    Args:
      params: what the model's step is given.
      root: of float32 and int32.
      past: what an earlier search has kept.
      dials: in place of the search's.
      facts: what the model's transitions hold.
      raw: whether trees keep what the network said of each node, even if no rule reads it.
      share: which rows of a batch these are.
    """

    def grow(rules: Rules, tree: Tree, rng: jax.Array) -> Grown:
        tokens = own_tokens.init_tokens(model, root, search.num_nodes)
        if past is not None:
            tree, tokens = subtree.promote(past, tree, tokens, root.legal, model, search, rules)
        return own_tokens.run(
            model, params, rng, rules, tree, tokens, root.data, dials.discount, search
        )

    fields = policies.num_fields(search, discounted=facts.discounted, raw=raw)
    begins = policies.Beginning(
        root.policy, root.value, root.legal, fields, facts.masked, model.chance, share
    )
    output, (tree, tokens) = policies.plan(rng, begins, grow, dials, search)
    whole = (
        search_tree.of(tree, tokens, root, dials.discount, model, search) if return_tree else None
    )
    kept = None if past is None else Kept(tree, tokens, past.timestep)
    return dataclasses.replace(output, kept=kept, tree=whole)


def by_rows(rows: Any, kept: Kept | None, return_tree: bool = False) -> Any:
    """How an output lies on a mesh: a `SearchOutput` of `PartitionSpec`s.

    Args:
      rows: the axes of devices over which rows lie.
    """
    fields: Any = {field.name: meshes.spec(rows) for field in dataclasses.fields(SearchOutput)}
    fields["kept"] = meshes.specs(kept, rows, 1)
    if return_tree:
        names = [field.name for field in dataclasses.fields(SearchTree)]
        whole: Any = dict.fromkeys(names, meshes.spec(rows))
        fields["tree"] = SearchTree(**whole | {"tables": meshes.spec(None, rows)})
    specs: Any = SearchOutput(**fields)
    return specs
