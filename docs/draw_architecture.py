"""Draws docs/architecture.png: three ways through the packages, room by room.

    python docs/draw_architecture.py

A package is a floor, and imports point down only. To the right is what comes next.
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

PAGE = Path(__file__).parent / "architecture.png"
FLOORS = ("base", "ops", "store", "model", "mcts", "lightzero")
INK = "#7c8aa0"
WAYS = {
    "An observation becomes an action (kvjax.search)": (
        "#d9822b",
        "mcts/search model/contexts model/step model/unizero model/modes ops/window mcts/policies"
        " mcts/tokens mcts/tree mcts/unizero_tree model/unizero",
    ),
    "A latent finds its slot (kvjax.recurrent_inference)": (
        "#3b7dd8",
        "mcts/inference ops/hashing store/windows store/pool model/step model/unizero model/modes"
        " store/windows store/pool",
    ),
    "A torch tensor goes through attach (update_cache_context, retrieve_or_generate_kvcache)": (
        "#2f9e6e",
        "lightzero/attached lightzero/bridge lightzero/scope base/dlpack lightzero/layout"
        " store/pool lightzero/scope base/dlpack lightzero/attached",
    ),
}


def draw() -> None:
    """Writes the picture."""
    figure, panels = plt.subplots(len(WAYS), 1, figsize=(10, 8.4), layout="constrained")
    for panel, (title, (colour, rooms)) in zip(panels, WAYS.items(), strict=True):
        places = [room.split("/") for room in rooms.split()]
        heights = [FLOORS.index(floor) for floor, _ in places]
        panel.plot(range(len(places)), heights, "o-", color=colour, linewidth=2)
        for x, (height, (_, room)) in enumerate(zip(heights, places, strict=True)):
            above = 9 if height >= max(heights[max(x - 1, 0) : x + 2]) else -18
            panel.annotate(
                room, (x, height), (0, above), textcoords="offset points", ha="center", color=INK
            )
        panel.set_title(title, loc="left", fontsize=11, color=colour)
        panel.set_yticks(range(len(FLOORS)), FLOORS)
        panel.set_ylim(-0.5, len(FLOORS) - 0.2)
        panel.set_xlim(-0.5, len(places) - 0.5)
        panel.set_xticks([])
        panel.tick_params(colors=INK, length=0)
        panel.grid(axis="y", color=INK, alpha=0.25)
        for side in panel.spines.values():
            side.set_visible(False)
    figure.savefig(PAGE, dpi=110, transparent=True, metadata={"Software": None})


if __name__ == "__main__":
    draw()
