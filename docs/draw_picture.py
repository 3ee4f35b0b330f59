"""Draws docs/picture.svg: a search tree whose nodes hold two tokens each, and one node's window.

    python docs/draw_picture.py

The picture reads on white and on black: no background, no black or white text.
"""

from pathlib import Path

PAGE = Path(__file__).parent / "picture.svg"

WIDTH, HEIGHT = 760, 350
ACTION, LATENT, PATH, QUIET = "#d9822b", "#3b7dd8", "#c2410c", "#94a3b8"
INK = "#7c8aa0"
CELL = 26
KEPT = 5  # tokens of a context of 8 after it has slid

# Nodes: name, x, y, its action; the root holds what was really observed.
ROOT = (150, 70)
NODES = {
    "b": (80, 150, ROOT),
    "c": (230, 150, ROOT),
    "d": (40, 230, (80, 150)),
    "e": (120, 230, (80, 150)),
    "f": (210, 230, (230, 150)),
    "g": (290, 230, (230, 150)),
    "h": (290, 310, (290, 230)),
}
CHOSEN = ("c", "g", "h")
WINDOW_X, WINDOW_Y = 420, 168


def cell(x: float, y: float, colour: str, label: str = "", filled: bool = True) -> str:
    fill = f'fill="{colour}"' if filled else 'fill="none" stroke-dasharray="3 3"'
    text = f'<text x="{x + CELL / 2}" y="{y + 17}" fill="#fff" text-anchor="middle">{label}</text>'
    box = f'<rect x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" rx="4"'
    return f'{box} {fill} stroke="{colour}"/>' + (text if label else "")


def node(name: str, x: float, y: float) -> str:
    """Two tokens: the action that led here, and the latent that the model imagined."""
    left = x - CELL
    return cell(left, y - 12, ACTION, f"a{name}") + cell(left + CELL, y - 12, LATENT, f"z{name}")


def edge(child: str) -> str:
    x, y, (from_x, from_y) = NODES[child]
    colour, width = (PATH, 3) if child in CHOSEN else (QUIET, 1.5)
    ends = f'x1="{from_x}" y1="{from_y + 12}" x2="{x}" y2="{y - 13}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def label(x: float, y: float, text: str, size: int = 13, anchor: str = "start") -> str:
    place = f'x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{INK}">{text}</text>'


def tree() -> list[str]:
    x, y = ROOT
    root = [cell(x - 39 + CELL * i, y - 12, *kind) for i, kind in enumerate(ROOT_TOKENS)]
    root[:2] = ['<g opacity="0.4">', *root[:2], "</g>"]  # no longer in the window
    nodes = [node(name, at_x, at_y) for name, (at_x, at_y, _) in NODES.items()]
    return [*map(edge, NODES), *root, *nodes, label(x, 30, "a tree of own tokens", 15, "middle")]


ROOT_TOKENS = ((LATENT, "z0"), (ACTION, "a1"), (LATENT, "z1"))


def window() -> list[str]:
    """What the newest node reads: the last five tokens before it. Its own two come behind them."""
    *path, newest = CHOSEN
    tokens = list(ROOT_TOKENS)
    for name in path:
        tokens += [(ACTION, f"a{name}"), (LATENT, f"z{name}")]
    kept = tokens[-KEPT:]
    cells = [cell(WINDOW_X + CELL * i, WINDOW_Y, *token) for i, token in enumerate(kept)]
    for i, colour in enumerate((ACTION, LATENT, QUIET), len(kept)):
        cells.append(cell(WINDOW_X + CELL * i, WINDOW_Y, colour, filled=False))
    x, y, _ = NODES[newest]
    tip = WINDOW_X + CELL * (KEPT + 1) - 1
    curve = f"M {x + 32} {y} C {x + 170} {y}, {tip} {WINDOW_Y + 120}, {tip} {WINDOW_Y + 38}"
    arrow = f'<path d="{curve}" fill="none" stroke="{PATH}" stroke-width="2"/>'
    corners = f"{tip},{WINDOW_Y + 29} {tip - 5},{WINDOW_Y + 39} {tip + 5},{WINDOW_Y + 39}"
    arrow += f'<polygon points="{corners}" fill="{PATH}"/>'
    return [
        *cells,
        arrow,
        label(WINDOW_X, 30, "the newest node's window", 15),
        label(WINDOW_X, WINDOW_Y - 70, "The last tokens of its path are gathered when"),
        label(WINDOW_X, WINDOW_Y - 52, "it is expanded. A token's keys and values are"),
        label(WINDOW_X, WINDOW_Y - 34, "stored once, never copied along the tree."),
        label(tip + 14, WINDOW_Y + 58, "its own two tokens"),
        cell(tip + 14, WINDOW_Y + 96, ACTION) + label(tip + 46, WINDOW_Y + 113, "action"),
        cell(tip + 104, WINDOW_Y + 96, LATENT) + label(tip + 136, WINDOW_Y + 113, "latent"),
    ]


def picture() -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
    head += f' width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="11">'
    return "\n".join([head, *tree(), *window(), "</svg>"]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(picture())
