"""What a search answers, and what of its configuration is data.

Shapes: B rows, A actions.
"""

import dataclasses
from typing import Any

import jax

from kvjax.base import display


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dials:
    """What of a `SearchConfig` is data to a compiled search."""

    temperature: jax.Array  # [] float32
    discount: jax.Array  # [] float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SearchOutput(display.Drawn):
    """Result of one search per row.

    Attributes:
      action: [B] int32, what to do.
      visit_counts: [B, A] int32, of the root's actions.
      root_value: [B], mean value of the root.
      q_values: [B, A], of the root's actions, 0 where never visited.
      prior: [B, A], the network's policy over legal actions, noise left out.
      network_value: [B], the network's own value of the root.
      mean_depth: [B], edges below the root, mean over simulations.
      finite: [B] bool, False: the model answered NaN or infinity, or no action is legal; discard
        the row.
      action_weights: [B, A], the policy target: shares of visits, or mctx's improved policy
        ("gumbel").
      kept: `kvjax.Kept` for the next search, with `SearchConfig.kept_nodes`; else None.
    """

    action: jax.Array
    visit_counts: jax.Array
    root_value: jax.Array
    q_values: jax.Array
    prior: jax.Array
    network_value: jax.Array
    mean_depth: jax.Array
    finite: jax.Array
    action_weights: jax.Array
    kept: Any = None

    def _picture(self) -> display.Picture | None:
        return display.search_output(self)
