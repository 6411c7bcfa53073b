#!/usr/bin/env python3
"""Draws what moleblend wrote as CSV, whichever of these it is:

    python3 dev/plot.py moleblend.log.csv losses.svg      pretraining: each loss against the steps
    python3 dev/plot.py finetuned.log.csv epochs.svg      fine-tuning: loss and validation metric
    python3 dev/plot.py predictions.csv predictions.svg   predicted against true; of classes, ROC

The ending of the second name is the format: svg, png, pdf. Needs matplotlib.
"""

import argparse
import csv
import math

import matplotlib
matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "moleblend"  # the same bytes each time
import matplotlib.pyplot as plt


def number(text):
    return float(text) if text else math.nan


def read_columns(path):
    """{column: texts} of a CSV file."""
    with open(path, newline="") as f:
        rows = list(csv.reader(f)) or [[]]
    return {name: [row[k] for row in rows[1:]] for k, name in enumerate(rows[0])}


def panels(count):
    """A figure with `count` panels in rows of three."""
    across = min(count, 3)
    down = -(-count // across)
    figure, axes = plt.subplots(down, across, squeeze=False,
                                figsize=(3.2 * across, 2.8 * down), layout="constrained")
    axes = list(axes.flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def moving_mean(values, width):
    """Means of the last `width` values, fewer at the beginning, without those that are missing."""
    out, total, count = [], 0.0, 0
    for k, value in enumerate(values):
        for change, sign in ((value, 1), (values[k - width] if k >= width else math.nan, -1)):
            if not math.isnan(change):
                total, count = total + sign * change, count + sign
        out.append(total / count if count else math.nan)
    return out


def draw_pretraining(columns):
    """Means over a hundredth of the run, of every loss."""
    names = [name for name in columns if name in ("total", "denoise", "spd", "edge", "3d")]
    steps = [int(step) for step in columns["step"]]
    figure, axes = panels(1)
    for name in names:
        smooth = moving_mean([number(text) for text in columns[name]], max(1, len(steps) // 100))
        shown = slice(0, None, max(1, len(steps) // 300))
        axes[0].plot(steps[shown], smooth[shown], label=name, linewidth=1.2)
    axes[0].set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes[0].legend(fontsize=8, loc="upper right", ncols=2)
    return figure


def draw_finetuning(columns):
    """A line a seed (MoleculeSDE has one): its training loss, its metric on the validation set."""
    figure, axes = panels(2)
    valid = next(name for name in columns if name.startswith("valid"))
    seeds = columns.get("seed", ["1"] * len(columns["epoch"]))
    for seed in dict.fromkeys(seeds):
        rows = [k for k, s in enumerate(seeds) if s == seed]
        epochs = [int(columns["epoch"][k]) for k in rows]
        for axis, name in zip(axes, ("loss", valid)):
            axis.plot(epochs, [number(columns[name][k]) for k in rows], label=f"seed {seed}",
                      linewidth=1.2)
            axis.set(xlabel="epoch", ylabel="training loss" if name == "loss" else name)
    axes[0].legend(fontsize=8)
    return figure


def draw_roc(axis, task, predicted, true):
    """The ROC curve; molecules of the same prediction are one step. Returns the area below."""
    positives = sum(true)
    negatives = len(true) - positives
    pairs = sorted(zip(predicted, true), reverse=True)
    x, y, area = [0.0], [0.0], 0.0
    hits = misses = 0
    for k, (p, t) in enumerate(pairs):
        hits, misses = hits + t, misses + 1 - t
        if k + 1 == len(pairs) or pairs[k + 1][0] != p:
            x.append(misses / negatives)
            y.append(hits / positives)
            area += (x[-1] - x[-2]) * (y[-1] + y[-2]) / 2
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    axis.plot(x, y, linewidth=1.4)
    axis.set(xlabel="false positive rate", ylabel="true positive rate",
             title=f"{task}: ROC-AUC {area:.3f}", aspect="equal")


def draw_scatter(axis, task, predicted, true):
    """Predicted against true, and the line on which both are equal."""
    rmse = math.sqrt(sum((p - t) ** 2 for p, t in zip(predicted, true)) / len(true))
    ends = [min(predicted + true), max(predicted + true)]
    axis.plot(ends, ends, color="0.7", linewidth=0.8)
    axis.scatter(true, predicted, s=7, alpha=0.6, linewidths=0)
    axis.set(xlabel="true", ylabel="predicted", title=f"{task}: RMSE {rmse:.3g}")


def draw_predictions(columns):
    """A panel a task with labels."""
    tasks = [name for name in columns if f"{name} label" in columns]
    if not tasks:
        raise SystemExit("no labels in this file: make the dataset with data_prep --labels")
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks):
        pairs = [(number(p), number(t)) for p, t in zip(columns[task], columns[f"{task} label"])
                 if p and t]
        predicted, true = map(list, zip(*pairs)) if pairs else ([], [])
        if set(true) == {0.0, 1.0}:
            draw_roc(axis, task, predicted, true)
        elif true:
            draw_scatter(axis, task, predicted, true)
        else:
            axis.set(title=f"{task}: no labels")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", help="written by moleblend")
    parser.add_argument("picture", help="to write")
    options = parser.parse_args()
    columns = read_columns(options.csv)
    if "step" in columns:
        figure = draw_pretraining(columns)
    elif "epoch" in columns:
        figure = draw_finetuning(columns)
    elif "record" in columns:
        figure = draw_predictions(columns)
    else:
        raise SystemExit(f"{options.csv}: expected a log or predictions of moleblend")
    fixed = {"metadata": {"Date": None}} if options.picture.endswith(".svg") else {}
    figure.savefig(options.picture, dpi=110, **fixed)


if __name__ == "__main__":
    main()
