r"""Draws `docs/learning.png`: returns while kvjax learns, and while LightZero does.

for seed in 0 1 2 3 4; do kvjax train --env cartpole_masked --seed $seed --output poles$seed; done
for seed in 0 2; do
    python examples/train_masked_cartpole.py --only original --seeds $seed > lightzero$seed.json
done
for seed in 0 1 2; do kvjax train --env tmaze --seed $seed --output maze$seed; done
kvjax train --env tmaze --output blind --set context_length=4 --set seek_start=0 \
    --max-env-steps 8000
python docs/draw_learning.py --poles poles? --lightzero lightzero?.json --maze maze? --blind blind
"""

import argparse
import csv
import json
from pathlib import Path

OUTPUT = Path(__file__).parent / "learning.png"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("poles", "maze", "blind"):
        parser.add_argument(f"--{name}", nargs="+", type=Path, default=[], metavar="DIR")
    parser.add_argument("--lightzero", nargs="+", type=Path, default=[], metavar="JSON")
    args = parser.parse_args()
    draw(
        {
            "kvjax": [of_csv(path) for path in args.poles],
            "LightZero 0.2.0": [of_json(path) for path in args.lightzero],
        },
        {
            "kvjax": [of_csv(path) for path in args.maze],
            "kvjax, context of one step": [of_csv(path) for path in args.blind],
        },
    )


def of_csv(folder):
    """Steps and mean returns of a run of `kvjax train`."""
    with (folder / "curve.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["mean_return"]]
    return [(int(row["env_steps"]), float(row["mean_return"])) for row in rows]


def of_json(path):
    """The same of a run of `examples/train_masked_cartpole.py --only`."""
    evaluations = json.loads(path.read_text().splitlines()[-1])["evaluations"]
    return [(each["env_steps"], each["return"]) for each in evaluations]


def draw(poles, maze):
    """Two panels, a line for each run."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    titles = "CartPole without velocities", "T-maze"
    for axis, curves, title, solved in zip(panels, (poles, maze), titles, (195, 0.95), strict=True):
        for (name, runs), color in zip(curves.items(), ("tab:blue", "tab:orange"), strict=True):
            for index, run in enumerate(runs):
                steps, returns = zip(*run, strict=True)
                label = name if index == 0 else None
                axis.plot(steps, returns, color=color, linewidth=1, label=label)
                axis.plot(steps[-1:], returns[-1:], color=color, marker="o", markersize=3)
        axis.locator_params(axis="x", nbins=6)
        axis.axhline(solved, color="grey", linewidth=0.5)
        axis.set(title=title, xlabel="environment steps", ylabel="mean return")
        axis.legend(fontsize="small", loc="lower right")
    panels[1].set_ylim(-1, 1.05)
    figure.savefig(OUTPUT, dpi=110)


if __name__ == "__main__":
    main()
