#!/usr/bin/env python3
"""Does pretraining help? Pretrains, fine-tunes from several starts with equal tuning, and prints
the table.

    python3 dev/study.py prepare  --work DIR --qm9 qm9.sdf --moleculenet FOLDER
                                  [--qm9-labels labels.csv --qm9-labelled some.sdf] [--more lig.sdf]
    python3 dev/study.py pretrain --work DIR [--size small --steps 4000]
    python3 dev/study.py finetune --work DIR [--tasks esol,bbbp --starts scratch,blend --seeds 3]
    python3 dev/study.py table    --work DIR

Files may be plain, .gz or .xz. `prepare` writes the datasets: QM9 in principal frames for
pretraining (a twentieth for validation), MoleculeNet by scaffold split (80/10/10), the quantum
labels by random split. `pretrain` makes the checkpoints blend (the paper's method), sum (no
blending: every relation of every pair is shown) and, if `prepare` was given --more molecules, wide
(blended, on QM9 and these). `finetune` runs every combination of task, start,
learning rate and seed, and appends a line for each to results.jsonl; what is there already is not
run again, so it can be stopped and continued. The test result of a cell is the one at the learning
rate whose mean validation result is best, for every start alike: mean and standard deviation over
the seeds.
"""

import argparse
import csv
import gzip
import json
import lzma
import os
import re
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "..", "moleblend")
DATA_PREP = os.path.join(HERE, "..", "data_prep")

# name: (kind, modality, metric)
TASKS = {
    "esol": ("regression", "2d", "RMSE"), "freesolv": ("regression", "2d", "RMSE"),
    "lipo": ("regression", "2d", "RMSE"), "bbbp": ("classification", "2d", "ROC-AUC"),
    "bace": ("classification", "2d", "ROC-AUC"), "sider": ("classification", "2d", "ROC-AUC"),
    "clintox": ("classification", "2d", "ROC-AUC"), "gap": ("regression", "3d", "MAE"),
    "dipole": ("regression", "3d", "MAE"),
}
QUANTUM = {"gap": "gap_eV", "dipole": "dipole_D"}  # task: column of the labels
STARTS = {"scratch": None, "blend": "blend.safetensors", "sum": "sum.safetensors",
          "wide": "wide.safetensors"}


def opened(path):
    opener = gzip.open if path.endswith(".gz") else lzma.open if path.endswith(".xz") else open
    return opener(path, "rt", encoding="latin-1")


def call(command):
    print("$ " + " ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True)


def size_options(size):
    """The options of a model size: a name, or layers,dim,ffn,heads,kernels."""
    if "," not in size:
        return ["--size", size]
    names = ("--layers", "--dim", "--ffn", "--heads", "--kernels")
    return [word for pair in zip(names, size.split(",")) for word in pair]


def unpacked(path, work):
    """The path of a plain copy of a file in the work folder, or the file itself."""
    if not path.endswith((".gz", ".xz")):
        return path
    target = os.path.join(work, os.path.basename(path)[:-3])
    with opened(path) as source, open(target, "w", encoding="latin-1") as out:
        out.writelines(source)
    return target


# ==================================================================================================
# The three stages
# ==================================================================================================

def prepare(options):
    at = lambda name: os.path.join(options.work, name)
    if options.qm9:
        call([DATA_PREP, "-o", at("qm9.{}.bin"), "--orient", "principal", "--split", "0.95,0.05",
              "--split-by", "random", unpacked(options.qm9, options.work)])
        if options.more:
            call([DATA_PREP, "-o", at("wide.{}.bin"), "--orient", "principal", "--split",
                  "0.95,0.05", "--split-by", "random", unpacked(options.qm9, options.work),
                  unpacked(options.more, options.work)])
    for name in TASKS:
        if name in QUANTUM or not options.moleculenet:
            continue
        paths = [os.path.join(options.moleculenet, name + end) for end in (".csv", ".csv.gz")]
        path = next((path for path in paths if os.path.exists(path)), None)
        if path is None:
            print(f"{name}: no file in {options.moleculenet}, left out", file=sys.stderr)
            continue
        call([DATA_PREP, "-o", at(name + ".{}.bin"), "--labels", "all", "--split", "0.8,0.1,0.1",
              "--split-by", "scaffold", unpacked(path, options.work)])
    if options.qm9_labels and options.qm9_labelled:
        with opened(options.qm9_labels) as table:
            labels = {row["id"]: row for row in csv.DictReader(table)}
        with opened(options.qm9_labelled) as source, open(at("labelled.sdf"), "w") as out:
            title = None
            for line in source:
                title = line.strip() if title is None else title
                if line.startswith("$$$$"):
                    for column in QUANTUM.values():
                        out.write(f">  <{column}>\n{labels[title][column]}\n\n")
                    title = None
                out.write(line)
        for name, column in QUANTUM.items():
            call([DATA_PREP, "-o", at(name + ".{}.bin"), "--labels", column, "--orient",
                  "principal", "--split", "0.8,0.1,0.1", "--split-by", "random",
                  at("labelled.sdf")])


def pretrain(options):
    at = lambda name: os.path.join(options.work, name)
    for name, data, extra in (("blend", "qm9", []), ("sum", "qm9", ["--no-blend"]),
                              ("wide", "wide", [])):
        if not os.path.exists(at(data + ".train.bin")):
            continue
        if os.path.exists(at(name + ".safetensors")) and not options.again:
            print(f"{name}.safetensors is there already", file=sys.stderr)
            continue
        start = time.time()
        with open(at(name + ".txt"), "w") as out:
            command = [PROGRAM, at(data + ".train.bin"), "--valid", at(data + ".valid.bin"),
                       *size_options(options.size), "--steps", str(options.steps),
                       "--batch-size", str(options.pretrain_batch), "--lr",
                       str(options.pretrain_lr), "--hold", "0", "--beta2", "0.999",
                       "--warmup", str(options.steps // 20 + 1), "--seed", "1", "-o",
                       at(name + ".unfinished.safetensors"), *extra]
            print("$ " + " ".join(command), file=sys.stderr, flush=True)
            subprocess.run(command, check=True, stdout=out)
            out.write(f"seconds {time.time() - start:.0f}\n")
        os.rename(at(name + ".unfinished.safetensors"), at(name + ".safetensors"))


def finetune_once(options, task, start, lr, seed):
    """One run: {"valid": ..., "test": {metric: value}, "epoch": ..., "seconds": ...}."""
    kind, modality, _ = TASKS[task]
    at = lambda name: os.path.join(options.work, name)
    command = [PROGRAM, "finetune", at(task + ".train.bin"), "--valid", at(task + ".valid.bin"),
               "--test", at(task + ".test.bin"), "--task", kind, "--modality", modality,
               "--readout", options.readout, "--epochs", str(options.epochs),
               "--patience", str(options.patience), "--batch-size", str(options.batch),
               "--lr", repr(lr), "--seed", str(seed), "-o", at(f"study.{os.getpid()}.safetensors")]
    command += ["--init", at(STARTS[start])] if STARTS[start] else size_options(options.size)
    begin = time.time()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    found = re.search(r"best epoch (\d+), valid ([-\d.einf]+); test\s+(.*)", done.stdout)
    if not found:
        sys.exit(f"{' '.join(command)}\nno result in:\n{done.stdout}")
    test = dict(re.findall(r"([A-Z][\w-]*)\s+(-?[\d.]+(?:e-?\d+)?)", found.group(3)))
    return {"valid": float(found.group(2)), "epoch": int(found.group(1)),
            "test": {name: float(value) for name, value in test.items()},
            "seconds": round(time.time() - begin, 1)}


def finetune(options):
    done = {cell(row) for row in results(options)}
    wanted = [(task, start, lr, seed) for seed in range(1, options.seeds + 1)
              for task in options.tasks for start in options.starts for lr in options.lrs]
    for k, (task, start, lr, seed) in enumerate(wanted):
        row = {"task": task, "start": start, "lr": lr, "seed": seed, "epochs": options.epochs,
               "size": options.size, "readout": options.readout}
        if cell(row) in done or not os.path.exists(os.path.join(options.work, task + ".train.bin")):
            continue
        row.update(finetune_once(options, task, start, lr, seed))
        with open(os.path.join(options.work, "results.jsonl"), "a") as out:
            out.write(json.dumps(row) + "\n")
        metric = TASKS[task][2]
        print(f"{k + 1}/{len(wanted)} {task} {start} lr {lr:g} seed {seed}: "
              f"valid {row['valid']:g}, test {metric} {row['test'].get(metric)}, "
              f"{row['seconds']:.0f} s", flush=True)
    table(options)


# ==================================================================================================
# The table
# ==================================================================================================

def cell(row):
    """What must be equal for two runs to be the same."""
    return tuple(row[key] for key in ("task", "start", "lr", "seed", "epochs", "size", "readout"))


def results(options):
    path = os.path.join(options.work, "results.jsonl")
    if not os.path.exists(path):
        return []
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def best_rate(rows, kind):
    """(learning rate, its rows) with the best mean validation result."""
    by_lr = {}
    for row in rows:
        by_lr.setdefault(row["lr"], []).append(row)
    most = max(len(group) for group in by_lr.values())
    by_lr = {lr: group for lr, group in by_lr.items() if len(group) == most}
    mean = lambda lr: statistics.fmean(row["valid"] for row in by_lr[lr])
    lr = max(by_lr, key=mean) if kind == "classification" else min(by_lr, key=mean)
    return lr, by_lr[lr]


def table(options):
    rows = [row for row in results(options) if row["size"] == options.size
            and row["epochs"] == options.epochs and row["readout"] == options.readout]
    starts = [start for start in options.starts if any(row["start"] == start for row in rows)]
    print("\n| task | metric | " + " | ".join(starts) + " | learning rates | seeds |")
    print("|---" * (len(starts) + 4) + "|")
    for task in options.tasks:
        kind, modality, metric = TASKS[task]
        shown, rates, seeds = [], [], []
        for start in starts:
            here = [row for row in rows if row["task"] == task and row["start"] == start]
            if not here:
                shown.append("")
                continue
            lr, group = best_rate(here, kind)
            values = [row["test"][metric] for row in group]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            shown.append(f"{statistics.fmean(values):.3f} ± {deviation:.3f}")
            rates.append(f"{lr:g}")
            seeds.append(str(len(values)))
        if rates:
            better = "higher is better" if kind == "classification" else "lower is better"
            print(f"| {task} ({modality}) | {metric}, {better} | " + " | ".join(shown)
                  + f" | {', '.join(rates)} | {', '.join(sorted(set(seeds)))} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "pretrain", "finetune", "table"))
    parser.add_argument("--work", required=True, metavar="DIR", help="everything is written there")
    parser.add_argument("--qm9", metavar="FILE", help="molecules to pretrain on")
    parser.add_argument("--more", metavar="FILE", help="further molecules, for `wide`")
    parser.add_argument("--qm9-labelled", metavar="FILE", help="molecules with quantum labels")
    parser.add_argument("--qm9-labels", metavar="FILE", help="CSV: id, gap_eV, dipole_D")
    parser.add_argument("--moleculenet", metavar="FOLDER", help="esol.csv and so on")
    parser.add_argument("--size", default="small",
                        help="a name, or layers,dim,ffn,heads,kernels (default small)")
    parser.add_argument("--steps", type=int, default=4000, help="of pretraining (default 4000)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pretrain-batch", type=int, default=128)
    parser.add_argument("--pretrain-lr", type=float, default=1e-3)
    parser.add_argument("--again", action="store_true", help="pretrain even if it has been done")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--starts", default=",".join(STARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", default="1e-4,3e-4,1e-3")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--patience", type=int, default=0)
    parser.add_argument("--readout", default="mean")
    options = parser.parse_args()
    options.tasks, options.starts = options.tasks.split(","), options.starts.split(",")
    options.lrs = [float(lr) for lr in options.lrs.split(",")]
    for name, known in [(t, TASKS) for t in options.tasks] + [(s, STARTS) for s in options.starts]:
        if name not in known:
            parser.error(f"unknown: {name}; there are {', '.join(known)}")
    os.makedirs(options.work, exist_ok=True)
    {"prepare": prepare, "pretrain": pretrain, "finetune": finetune, "table": table}[options.stage](
        options)


if __name__ == "__main__":
    main()
