"""How a search walks and chooses."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from kvjax.base.values import (
    is_integer,
    is_number,
    make_plain,
    require,
    require_above_zero,
    require_hashable,
    require_numbers,
    require_one_of,
    require_positive,
)

MAX_SIMULATIONS = 2**24 - 1
"""A tree holds no more: its node indices are exact in float32."""

Tree = Literal["lightzero", "muzero", "gumbel"]
TREES = ("lightzero", "muzero", "gumbel")
Q_TRANSFORMS = ("tree", "siblings", "mix_value")
_UNREAD: dict[Tree, tuple[str, ...]] = {
    "lightzero": ("q_transform", "max_considered_actions"),
    "muzero": ("max_considered_actions",),
    "gumbel": ("temperature", "dirichlet_alpha", "pb_c_init", "pb_c_base"),
}
"""Fields of a `SearchConfig` that a tree has no use for, `kept_nodes` left out."""


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How a search walks and chooses.

    `tree` says by whose rules a tree grows: "lightzero", or mctx's policies "muzero" and "gumbel".
    `temperature` 0 takes the most visited action, the first one on ties ("muzero" draws among them,
    as mctx does); above 0 it samples proportionally to `visits ** (1 / temperature)`.
    `noise_fraction` 0 means no root noise.
    `kept_nodes` is how many nodes below the action that was taken the next search begins with, at
    most; 0, as in LightZero, begins each search anew. See `kvjax.mcts.subtree`.
    `q_transform` says how "muzero" and "gumbel" scale Q values: "siblings" or "mix_value", mctx's
    `qtransform_by_parent_and_siblings` and `qtransform_completed_by_mix_value`, or "tree", by the
    extremes of the whole tree as LightZero does; or it is a function like mctx's, of a tree that
    holds one node. None is "mix_value" for "gumbel"; for "muzero" it is "tree" in `kvjax.search`
    and mctx's own, "siblings", in `kvjax.tree_search`.
    "gumbel" considers `max_considered_actions` at the root, reads of the noise only whether there
    is any, and has no use for `temperature`, `dirichlet_alpha`, `pb_c_init` and `pb_c_base`.
    Searches that differ in temperature and discount alone share one compiled program.

    Raises:
      TypeError: `q_transform` is a function without a hash.
      ValueError: a value lies outside its range, or the tree has no use for it.
    """

    num_simulations: int = 25  # of one search, each of which makes a node
    tree: Tree = "lightzero"
    discount: float = 0.997  # of a step, in (0, 1]
    noise_fraction: float = 0.0
    dirichlet_alpha: float = 0.3  # of the root noise
    temperature: float = 0.0
    pb_c_init: float = 1.25  # weight of the prior in an edge's score
    pb_c_base: float = 19652.0  # visits from which that weight grows
    max_depth: int | None = None  # edges below the root
    kept_nodes: int = 0
    q_transform: str | Callable[..., Any] | None = None
    max_considered_actions: int = 16

    def __post_init__(self) -> None:
        make_plain(self)
        require_positive(self, "num_simulations", "max_considered_actions")
        is_function = callable(self.q_transform) and not isinstance(self.q_transform, type)
        if not (self.q_transform is None or is_function):
            require_one_of("q_transform", self.q_transform, Q_TRANSFORMS)
        require_hashable("q_transform", self.q_transform)
        require_one_of("tree", self.tree, TREES)
        self._check_size()
        if self.max_depth is not None:
            require_positive(self, "max_depth")
        require_numbers(self, "noise_fraction", "temperature", "pb_c_init")
        require_above_zero(self, "dirichlet_alpha", "pb_c_base")
        discount = self.discount
        in_range = is_number(discount) and 0.0 < discount <= 1.0
        require(in_range, f"discount must be in (0, 1], got {discount!r}")
        fraction = self.noise_fraction
        require(0.0 <= fraction <= 1.0, f"noise_fraction must be in [0, 1], got {fraction}")
        temperature = self.temperature
        require(temperature >= 0.0, f"temperature must be at least 0, got {temperature}")
        self._check_unread()

    def _check_size(self) -> None:
        simulations, kept = self.num_simulations, self.kept_nodes
        require(
            simulations <= MAX_SIMULATIONS,
            f"num_simulations must be at most {MAX_SIMULATIONS}, got {simulations}: a tree"
            " holds no more nodes",
        )
        require(
            is_integer(kept) and kept >= 0,
            f"kept_nodes must be an integer, at least 0, got {kept!r}",
        )
        require(
            kept + simulations <= MAX_SIMULATIONS,
            f"kept_nodes must be at most {MAX_SIMULATIONS - simulations} beside {simulations}"
            f" simulations, got {kept}: a tree holds no more nodes",
        )
        require(
            kept == 0 or self.tree != "gumbel",
            f'kept_nodes must be 0 with tree "gumbel", got {kept}: its root halves the actions that'
            " it considers by the visits of one search",
        )

    def _check_unread(self) -> None:
        for name in _UNREAD[self.tree]:
            value, default = getattr(self, name), getattr(SearchConfig, name)
            require(
                value == default,
                f'{name} must be {default} with tree "{self.tree}", which does not read it, got'
                f" {value!r}",
            )

    @property
    def num_nodes(self) -> int:
        """Nodes N that a tree has room for: the root, the kept ones, one per simulation."""
        return 1 + self.kept_nodes + self.num_simulations
