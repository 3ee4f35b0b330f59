"""What a search answers, and what of its configuration is data.

Shapes: B rows, A actions. Where nodes draw their actions (`WorldModelConfig.num_sampled_actions`) A
is the number K of those that the root has drawn.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax.base import display, files
from kvjax.base.compilation import is_traced
from kvjax.config import SearchConfig
from kvjax.mcts import explorer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dials:
    """What of a `SearchConfig` is data to a compiled search."""

    temperature: jax.Array  # [] float32
    discount: jax.Array  # [] float32


def split(search: SearchConfig) -> tuple[Dials, SearchConfig]:
    """What is data, and a configuration that is the same for all that differ only in it."""
    return _split(search) if is_traced() else _split_on_device(search)


def _split(search: SearchConfig) -> tuple[Dials, SearchConfig]:
    dials: Any = (np.asarray(x, np.float32) for x in (search.temperature, search.discount))
    return Dials(*dials), dataclasses.replace(search, temperature=0.0, discount=1.0)


@functools.lru_cache
def _split_on_device(search: SearchConfig) -> tuple[Dials, SearchConfig]:
    """Kept there, so that a call moves nothing."""
    dials, same = _split(search)
    return jax.device_put(dials), same


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SearchOutput(display.Drawn):
    """Result of one search per row.

    Attributes:
      action: [B] int32, what to do; [B, numbers] float32 where actions are continuous.
      visit_counts: [B, A] int32, of the root's actions.
      root_value: [B], mean value of the root.
      q_values: [B, A], of the root's actions, 0 where never visited.
      prior: [B, A], the network's policy over legal actions, noise left out.
      network_value: [B], the network's own value of the root.
      mean_depth: [B], edges below the root, mean over simulations.
      finite: [B] bool, False: the model answered NaN or infinity, or no action is legal; discard
        the row. A logit of -inf is as good as any, if the row has others.
      action_weights: [B, A], the policy target: shares of visits, or mctx's improved policy
        ("gumbel").
      kept: `kvjax.Kept` for the next search, with `SearchConfig.kept_nodes`; else None.
      tree: `kvjax.SearchTree`, where the search was asked to return it; else None.
      sampled_actions: [B, K] int32 or [B, K, numbers] float32, the actions that the root has drawn,
        in the order of `visit_counts`; None of a model whose nodes have all actions.
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
    tree: Any = None
    sampled_actions: Any = None

    def _picture(self) -> display.Picture | None:
        return display.search_output(self)

    def to_html(
        self,
        path: str | Path | None = None,
        *,
        row: int = 0,
        tokens: Sequence[str] | None = None,
        title: str = "A search, simulation by simulation",
        note: str = "",
    ) -> str:
        """One row's tree as a page to step through: nodes, windows, and what a full window drops.

        The page is one file that loads nothing else. The search must have had `return_tree=True`.

        Args:
          path: where to write it; nowhere by default.
          row: of the batch [B].
          tokens: names of the K tokens that a step adds, as `("action", "latent")` of UniZero's.
          title: of the page.
          note: a sentence that stands below windows.

        Returns:
          The page's text.

        Raises:
          ValueError: the output holds no tree or several searches, there is no such row, or
            `tokens` are not K names.
          OSError: the file cannot be written.
        """
        page = explorer.page(self, row=row, tokens=tokens, title=title, note=note)
        if path is not None:
            with files.replacing(path) as file:
                file.write(page.encode())
        return page
