"""Prints the table of docs/statistics.md out of `kvjax.store.statistics.METRICS`.

python docs/make_statistics.py
"""

from kvjax.store.statistics import METRICS


def table() -> str:
    """A row for each number."""
    head = ["| name | kind | unit | meaning |", "|---|---|---|---|"]
    rows = (f"| `{m.name}` | {m.kind} | {m.unit} | {m.meaning} |" for m in METRICS)
    return "\n".join([*head, *rows])


if __name__ == "__main__":
    print(table())
