"""What a search asks of a model, and what it is told of the roots.

A model says how many tokens a step adds, how many a stored window has, what a full one drops, and
one pure function: what a step from a node brings. Tables, slots, trees, selection and backup are
the search's affair; attention, positions and heads are the model's.

Shapes: B rows, A actions, K tokens that a step adds, T slots of a stored window.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.base import meshes
from kvjax.base.arrays import validate_legal, validate_range
from kvjax.base.values import describe, require, require_hashable, require_positive


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Node:
    """One node of each row, as a model sees it.

    Attributes:
      tokens: pytree of [B, T, ...], the node's window out of the tables; with `TreeModel.in_place`
        [B, P, ...], that part of it that was added below the root.
      valid: [B, T] or [B, P] bool, which of these slots hold a token; they are the first ones.
      length: [B] int32, tokens of the whole window.
      state: pytree of [B, ...], what the step that made the node returned beside its tokens.
      depth: [B] int32, edges below the root.
      root: pytree of [B, ...], the `data` of the roots.
      at_root: [B] int32, how many tokens of the whole window are the root's, the last that it has.
      number: [] int32, of the node that the step makes; roots are 0.
    """

    tokens: Any
    valid: jax.Array
    length: jax.Array
    state: Any
    depth: jax.Array
    root: Any
    at_root: Any = None
    number: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transition:
    """What a step from a node brings.

    Attributes:
      reward: [B].
      value: [B], of the new node.
      policy: [B, A], logits of the new node.
      discount: [B], what the new node's value counts for its parent: 0 behind the end of an
        episode, -1 where the other player is to move; None: the search's.
      legal: [B, A] bool, of the new node; None: all actions. No other is ever tried, which mctx
        with lowest logits does not promise: its "muzero" may try one whose Q value is guessed high.
    """

    reward: jax.Array
    value: jax.Array
    policy: jax.Array
    discount: jax.Array | None = None
    legal: jax.Array | None = None


Step = Callable[[Any, jax.Array, Node, jax.Array], tuple[Any, Any, Transition]]


@dataclasses.dataclass(frozen=True)
class TreeModel:
    """What a search needs of a model. Static: one for each configuration, not one for each call.

    Attributes:
      block: K, tokens that a step adds; 1 for a model without tokens.
      size: T, tokens of the longest window that is stored; 1 for a model without tokens. A step
        from a window of L tokens may place its own up to L + K - 1, nodes behind an end included.
      step: `(params, rng, node, action [B]) -> (tokens, state, Transition)`, a pure function. The
        tokens are those of the new node, a pytree of [K, B, ...] like the roots' [B, T, ...]; the
        state is a pytree of [B, ...] like the roots'. It is asked once in each simulation, for all
        rows, with a key of its own; on a mesh for those of a device, unless it reads its key.
      carry: of a window that has no room for a block, the new block's last `carry` tokens are kept
        and no others; None: it loses its oldest K tokens.
      in_place: a node is handed the tokens that were added below its root and no others. The model
        reads the root's own where they lie, in the root's data, and how many of them are left in
        `Node.at_root`. For long windows, which are then not copied in every simulation.
      chance: nodes at odd depths are chance nodes: their "actions" are outcomes, of which that is
        tried next whose probability is largest for its visits (Stochastic MuZero, Antonoglou et
        al., 2022). Both kinds of nodes have A entries, K tokens and one structure of states;
        `legal` leaves out the entries for which one kind has no use.

    Raises:
      TypeError: the step has no hash.
      ValueError: a size is no positive integer, or carry is no part of a block.
    """

    block: int
    size: int
    step: Step
    carry: int | None = None
    in_place: bool = False
    chance: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "block", "size")
        require(callable(self.step), f"step must be a function, got {self.step!r}")
        require_hashable("step", self.step)
        kept = self.carry
        require(
            kept is None or (isinstance(kept, int) and 0 <= kept <= self.block),
            f"carry must be None or an integer in 0 .. {self.block} (block), got {kept!r}",
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Root:
    """Where a search begins.

    Attributes:
      tokens: pytree of [B, T, ...], the window of each row; what lies behind its length is not
        read. `()` for a model without tokens, whose nodes are their state alone.
      length: [B] int32, tokens of each window, 0 .. T; None for a model without tokens.
      policy: [B, A], the network's logits.
      value: [B], the network's.
      state: pytree of [B, ...], what belongs to a node beside its tokens: a latent, an environment.
      data: pytree of [B, ...], what every node of a row is told: a clock, a prompt.
      legal: [B, A] bool; None: all actions.
    """

    tokens: Any
    length: Any
    policy: Any
    value: Any
    state: Any = None
    data: Any = None
    legal: Any = None


def root_of(root: Any) -> Root:
    """A `Root` as it is; or mctx's `RootFnOutput` as one, its embedding a mapping of the rest.

    Raises:
      TypeError: it is neither.
    """
    if isinstance(root, Root):
        return root
    embedding: Any = getattr(root, "embedding", None)
    names = set(embedding) if isinstance(embedding, Mapping) else set()
    if not {"tokens", "length"} <= names <= {"tokens", "length", "state", "data", "legal"}:
        raise TypeError(
            "root must be a kvjax.Root, or a mctx.RootFnOutput whose embedding is a mapping with"
            f" tokens and length (and state, data, legal), got {type(root).__name__}"
            + ("" if embedding is None else f" with embedding {type(embedding).__name__}")
            + (f" of {', '.join(map(str, embedding))}" if names else "")
        )
    return Root(policy=root.prior_logits, value=root.value, **embedding)


def validate_root(root: Root, model: TreeModel) -> None:
    """Refuses roots whose arrays do not fit together or into the model's windows.

    Raises:
      ValueError: with the field's name, what was expected and what came.
    """
    require(
        model.block <= model.size,
        f"a model's block must be at most its size {model.size}, got {model.block}: a stored window"
        " has no room for what a step adds",
    )
    shape = np.shape(root.policy)
    require(
        len(shape) == 2 and all(size >= 1 for size in shape),
        f"root.policy must have shape [B, A], at least one row and one action, got {shape}",
    )
    rows = shape[0]
    expected = {"length": (rows,), "value": (rows,), "legal": shape}
    kinds = {"length": jnp.integer, "policy": jnp.floating, "value": jnp.floating}
    left_out = {name for name in ("length", "legal") if getattr(root, name) is None}
    if jax.tree.leaves(root.tokens):
        left_out.discard("length")
    for name, wanted in expected.items():
        came = np.shape(getattr(root, name))
        fits = name in left_out or came == wanted
        require(fits, f"root.{name} must have shape {wanted}, got {came}")
    for name in [name for name in kinds if name not in left_out]:
        kind = kinds[name]
        dtype = jnp.result_type(getattr(root, name))
        is_kind = jnp.issubdtype(dtype, kind)
        require(is_kind, f"root.{name} must be {kind.__name__} numbers, got {dtype}")
    if root.legal is not None:
        dtype = jnp.result_type(root.legal)
        require(dtype == np.bool_, f"root.legal must be bool, got {dtype}")
        validate_legal(root.legal, " of root.legal")
    prefixes = {"tokens": (rows, model.size), "state": (rows,), "data": (rows,)}
    for name, prefix in prefixes.items():
        for path, leaf in jax.tree.leaves_with_path(getattr(root, name)):
            came = np.shape(leaf)
            require(
                came[: len(prefix)] == prefix,
                f"root.{name}{jax.tree_util.keystr(path)} must have shape"
                f" [{', '.join(map(str, prefix))}, ...], got {came}",
            )
    validate_range("root.length", root.length, 0, model.size)


def with_length(root: Root) -> Root:
    """Roots without tokens are 0 tokens long."""
    if root.length is not None:
        return root
    return dataclasses.replace(root, length=jnp.zeros_like(root.value, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a model's transitions hold, known when a search is compiled."""

    discounted: bool = False  # discounts of their own
    masked: bool = False  # legal actions


def checked(model: TreeModel, params: Any, rng: jax.Array, root: Root) -> tuple[TreeModel, Facts]:
    """The model with a step whose transitions are `Transition`s of float32, and what these hold.

    Raises:
      TypeError, ValueError: the step hands back something else than the search can keep; with what
        was expected and what came.
    """
    step = _in_words(model.step)
    rows = jnp.asarray(root.length, jnp.int32)
    valid = jnp.zeros((rows.shape[0], model.size), bool)
    number = jnp.zeros((), jnp.int32)
    node = Node(root.tokens, valid, rows, root.state, rows, root.data, rows, number)
    run = functools.partial(meshes.run_automatic, step, results=meshes.spec())
    tokens, state, came = jax.eval_shape(lambda *x: run(x), params, rng, node, rows)

    def one_block(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = (model.block, leaf.shape[0], *leaf.shape[2:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)  # type: ignore[no-untyped-call]

    _require_same("tokens", tokens, jax.tree.map(one_block, jax.eval_shape(lambda: root.tokens)))
    _require_same("state", state, jax.eval_shape(lambda: root.state))
    _validate_transition(came, np.shape(root.policy))
    return dataclasses.replace(model, step=step), Facts(
        came.discount is not None, came.legal is not None
    )


def draws(model: TreeModel, params: Any, rng: jax.Array, root: Root) -> bool:
    """Whether a model's step reads its key. It may also, where it only hands it on."""
    shape: Any = jax.ShapeDtypeStruct
    rows = np.shape(root.policy)[:1]
    count, valid = shape(rows, np.int32), shape((*rows, model.size), bool)
    node = Node(root.tokens, valid, count, root.state, count, root.data, count)
    given = jax.tree.map(lambda x: shape(np.shape(x), x.dtype), (params, rng, node))
    program = jax.make_jaxpr(model.step)(*given, count).jaxpr
    key = program.invars[len(jax.tree.leaves(params))]
    return any(x is key for step in program.eqns for x in step.invars)


def _in_words(step: Step) -> Step:
    """A model's step, whose answer is a `Transition` even where it is mctx's."""

    def in_words(
        params: Any, rng: jax.Array, node: Node, action: jax.Array
    ) -> tuple[Any, Any, Transition]:
        answer = step(params, rng, node, action)
        if not isinstance(answer, tuple) or len(answer) != 3:
            raise TypeError(
                "the model's step must return (tokens, state, Transition), got"
                f" {type(answer).__name__}"
                + (f" of {len(answer)}" if isinstance(answer, tuple) else "")
            )
        tokens, state, came = answer
        _require_arrays("tokens", tokens)
        _require_arrays("state", state)
        policy = getattr(came, "policy", getattr(came, "prior_logits", None))
        if policy is None or not all(hasattr(came, x) for x in ("reward", "value", "discount")):
            raise TypeError(
                "the model's step must return a kvjax.Transition or a mctx.RecurrentFnOutput, got"
                f" {type(came).__name__}"
            )
        return (
            tokens,
            state,
            Transition(
                reward=_number("reward", came.reward),
                value=_number("value", came.value),
                policy=_number("policy", policy),
                discount=None if came.discount is None else _number("discount", came.discount),
                legal=_array("legal", getattr(came, "legal", None)),
            ),
        )

    return in_words


def _require_arrays(name: str, values: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(values):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            raise TypeError(
                f"the model's step must return arrays in {name}{jax.tree_util.keystr(path)}, got"
                f" {describe(leaf)}"
            )


def _array(name: str, value: Any) -> Any:
    is_array = value is None or hasattr(value, "dtype")
    require(is_array, f"Transition.{name} must be an array, got {describe(value)}")
    return value


def _number(name: str, value: Any) -> jax.Array:
    dtype = getattr(value, "dtype", None)
    is_number = dtype is not None and (
        jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    )
    came = describe(value) if dtype is None else f"{dtype} {value.shape}"
    require(is_number, f"Transition.{name} must be an array of numbers, got {came}")
    return jnp.asarray(value).astype(jnp.float32)


def _validate_transition(came: Transition, shape: tuple[int, int]) -> None:
    rows = shape[:1]
    expected = {"reward": rows, "value": rows, "policy": shape, "discount": rows, "legal": shape}
    for name, wanted in expected.items():
        value = getattr(came, name)
        if value is not None:
            got = value.shape
            require(got == wanted, f"Transition.{name} must have shape {wanted}, got {got}")
    if came.legal is not None:
        dtype = came.legal.dtype
        require(dtype == np.bool_, f"Transition.legal must be bool, got {dtype}")


def _require_same(name: str, came: Any, wanted: Any) -> None:
    """Refuses a part of a step's answer that is not what the roots began."""
    begun, got = (str(jax.tree.structure(x)) for x in (wanted, came))
    require(
        begun == got,
        f"the model's step must return {name} of the same structure as root.{name}, {begun}, got"
        f" {got}",
    )
    for (path, expected), leaf in zip(
        jax.tree.leaves_with_path(wanted), jax.tree.leaves(came), strict=True
    ):
        same = (expected.shape, expected.dtype) == (leaf.shape, leaf.dtype)
        require(
            same,
            f"the model's step must return {name}{jax.tree_util.keystr(path)} as"
            f" {expected.dtype} {expected.shape}, like root.{name}, got {leaf.dtype} {leaf.shape}",
        )
