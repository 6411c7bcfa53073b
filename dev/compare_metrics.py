#!/usr/bin/env python3
"""Compares the metrics of moleblend.c with scikit-learn's, on random scores and labels with many
ties and missing labels. Needs scikit-learn and a C compiler.

    python3 dev/compare_metrics.py [--trials 300]
"""

import argparse
import os
import subprocess
import tempfile

import numpy as np
from sklearn import metrics

HERE = os.path.dirname(os.path.abspath(__file__))
DRIVER = r"""
#define MOLEBLEND_TEST
#include "moleblend.c"
// Input: kind, n, Y, then n * Y scores, then n * Y labels ("nan": missing). Output: a line a task.
int main(void) {
    int kind, n, Y;
    while (scanf("%d %d %d", &kind, &n, &Y) == 3) {
        float *scores = xmalloc((size_t)(n * Y), 4), *labels = xmalloc((size_t)(n * Y), 4);
        for (int k = 0; k < 2 * n * Y; k++)
            if (scanf("%f", (k < n * Y ? scores : labels - n * Y) + k) != 1) return 1;
        for (int y = 0; y <= Y; y++) {
            double m[METRICS];
            if (y < Y)
                task_metrics(m, (TaskKind)kind, scores, labels, (size_t)n, (size_t)Y, (size_t)y);
            else task_means(m, (TaskKind)kind, scores, labels, (size_t)n, (size_t)Y);
            for (int k = 0; k < METRICS; k++) printf("%.12g ", m[k]);
            printf("\n");
        }
        free(scores);
        free(labels);
    }
    return 0;
}
"""


def expected(kind, score, label):
    """[ROC-AUC, AP, RMSE, MAE, R2] of one task, NaN where scikit-learn has no answer."""
    there = ~np.isnan(label)
    score, label = score[there].astype(np.float64), label[there].astype(np.float64)
    nan = float("nan")
    if kind == 0:
        both = len(set(label)) == 2
        return [metrics.roc_auc_score(label, score) if both else nan,
                metrics.average_precision_score(label, score) if label.sum() else nan,
                nan, nan, nan]
    if len(label) == 0:
        return [nan] * 5
    return [nan, nan, metrics.mean_squared_error(label, score) ** 0.5,
            metrics.mean_absolute_error(label, score),
            metrics.r2_score(label, score) if len(set(label)) > 1 else nan]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300)
    trials = parser.parse_args().trials
    random = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as work:
        source, program = os.path.join(work, "driver.c"), os.path.join(work, "driver")
        with open(source, "w") as out:
            out.write(DRIVER)
        subprocess.run(["cc", "-O2", "-w", "-I", os.path.join(HERE, ".."), source, "-o", program,
                        "-lm"], check=True)
        worst, compared = 0.0, 0
        for trial in range(trials):
            kind, n, tasks = trial % 2, int(random.integers(1, 60)), int(random.integers(1, 4))
            step = random.choice([0.5, 0.1, 0.001])  # coarse: many ties
            score = (np.round(random.random((n, tasks)) / step) * step).astype(np.float32)
            label = random.random((n, tasks)).astype(np.float32) * 4
            if kind == 0:
                label = (label > 2.5).astype(np.float32)
            label[random.random((n, tasks)) < 0.25] = np.nan
            text = f"{kind} {n} {tasks}\n" + " ".join(f"{x:.9g}" for x in score.ravel()) + "\n" \
                   + " ".join(f"{x:.9g}" for x in label.ravel()) + "\n"
            lines = subprocess.run([program], input=text, capture_output=True, text=True,
                                   check=True).stdout.splitlines()
            want = np.array([expected(kind, score[:, y], label[:, y]) for y in range(tasks)])
            mean = np.array([np.nanmean(c) if not np.isnan(c).all() else np.nan for c in want.T])
            got = np.array([[float(x) for x in line.split()] for line in lines])
            want = np.vstack([want, mean])
            if (np.isnan(got) != np.isnan(want)).any():
                raise SystemExit(f"trial {trial}: defined elsewhere:\n{got}\n{want}")
            difference = np.abs(got - want) / np.maximum(1, np.abs(want))
            worst = max(worst, np.nanmax(difference, initial=0))
            compared += int((~np.isnan(want)).sum())
    print(f"{trials} trials, {compared} metrics compared with scikit-learn: "
          f"largest difference {worst:.1e}")
    raise SystemExit(int(worst > 1e-6))


if __name__ == "__main__":
    main()
