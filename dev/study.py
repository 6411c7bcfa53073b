#!/usr/bin/env python3
"""Does pretraining help? Pretrains, fine-tunes from several starts with equal tuning, and prints
the table.

    python3 dev/study.py prepare  --work DIR --qm9 FOLDER --moleculenet FOLDER [--more drugs.sdf]
                                  [--descriptors descriptors.csv]
    python3 dev/study.py pretrain --work DIR [--size small --steps 4000 --starts blend,sum,sde]
    python3 dev/study.py finetune --work DIR [--tasks esol,bbbp --starts scratch,blend --seeds 3]
    python3 dev/study.py forest   --work DIR [--tasks ...]          (RDKit and scikit-learn)
    python3 dev/study.py table    --work DIR

`prepare` writes the datasets: for pretraining the training part of QM9 in principal frames (the
folder is what make_qm9.py wrote; losses are shown on its validation part) and --more molecules
(make_geometries.py); MoleculeNet (esol.csv and so on, .gz too) by scaffold split (80/10/10);
QM9's labels by its split. `pretrain` makes the checkpoints blend (the paper's method), sum (no
blending: every relation of every pair is shown) and sde (MoleculeSDE), on one thread each, and says
the CPU time that each took.

`finetune` runs every task from every start: scratch, blend and sum are MoleBLEND's encoder, gin
and sde MoleculeSDE's GIN. Each learning rate is tried with seed 1; the one with the best validation
result is repeated with the other seeds: the same number of trials for every start, and the test
part decides nothing. NAME@2 is the same start, pretrained with seed 2; the table takes both
together. The ablation: `pretrain`, `finetune` and `table --valid` with --starts blend,blend@2,
equal,equal@2 and so on (STARTS has the names), which compares on the validation parts. desc is a
network fine-tuned on --descriptors of molecules of no task, desc-blend the same from `blend`. Every
run appends a line to results.jsonl; what is there already is not run again, so it can be stopped
and continued. `forest` does the same with a random forest of 500 trees on ECFP4 (Morgan fingerprints of
radius 2, 2,048 bits), tried with two shares of features a split. The table shows mean and standard
deviation over the seeds, in brackets how many runs these are and the learning rate. qm9 is one
network for three labels and gives three lines, from MoleBLEND's starts only.
"""

import argparse
import gzip
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
MOLEBLEND = os.path.join(HERE, "..", "moleblend")
MOLECULESDE = os.path.join(HERE, "..", "moleculesde", "moleculesde")
DATA_PREP = os.path.join(HERE, "..", "data_prep")
PARTS = ("train", "valid", "test")

# name: (kind, modality, metric, epochs)
TASKS = {
    "esol": ("regression", "2d", "RMSE", 25), "freesolv": ("regression", "2d", "RMSE", 40),
    "lipo": ("regression", "2d", "RMSE", 12), "bbbp": ("classification", "2d", "ROC-AUC", 8),
    "bace": ("classification", "2d", "ROC-AUC", 12),
    "sider": ("classification", "2d", "ROC-AUC", 12),
    "clintox": ("classification", "2d", "ROC-AUC", 20),
    "tox21": ("classification", "2d", "ROC-AUC", 6), "qm9": ("regression", "3d", "MAE", 3),
}
QUANTUM = ("gap", "homo", "mu")  # the labels of qm9, which one network learns together
# name: (program that trains it, options of the pretraining or None if there is none)
STARTS = {
    "scratch": (MOLEBLEND, None), "blend": (MOLEBLEND, []), "sum": (MOLEBLEND, ["--no-blend"]),
    "gin": (MOLECULESDE, None), "sde": (MOLECULESDE, []),
    # the ablation; blend shows path, bonds, distance of 0.2, 0.2, 0.6 of the pairs
    "equal": (MOLEBLEND, "--pair-spd 0.33 --pair-edge 0.33 --pair-3d 0.34".split()),
    "flat": (MOLEBLEND, "--pair-spd 0.4 --pair-edge 0.4 --pair-3d 0.2".split()),
    "no-denoise": (MOLEBLEND, ["--weight-denoise", "0"]),
    "no-spd": (MOLEBLEND, ["--weight-spd", "0"]), "no-edge": (MOLEBLEND, ["--weight-edge", "0"]),
    "no-3d": (MOLEBLEND, ["--weight-3d", "0"]),
    # no pretraining by blending: fine-tuned on descriptors, from scratch or from `blend`
    "desc": (MOLEBLEND, []), "desc-blend": (MOLEBLEND, []),
}
DESCRIPTORS = "--epochs 4 --batch-size 64 --lr 5e-4 --precision bf16".split()


def base(start):
    """The name of a start without the seed of its pretraining."""
    return start.partition("@")[0]


def size_options(size):
    """The options of a model size: a name, or layers,dim,ffn,heads,kernels."""
    if "," not in size:
        return ["--size", size]
    names = ("--layers", "--dim", "--ffn", "--heads", "--kernels")
    return [word for pair in zip(names, size.split(",")) for word in pair]


def call(command, **more):
    print("$ " + " ".join(command), file=sys.stderr, flush=True)
    return subprocess.run(command, check=True, **more)


def cpu_seconds():
    """CPU time of all programs that were called and have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def plain(path, work):
    """The path of a file, or of an unpacked copy of FILE.gz in the work folder; None if neither is
    there."""
    if os.path.exists(path):
        return path
    if not os.path.exists(path + ".gz"):
        return None
    target = os.path.join(work, os.path.basename(path))
    with gzip.open(path + ".gz", "rb") as source, open(target, "wb") as out:
        shutil.copyfileobj(source, out)
    return target


# ==================================================================================================
# The stages
# ==================================================================================================

def prepare(options):
    at = lambda name: os.path.join(options.work, name)
    if options.qm9:
        source = lambda part: os.path.join(options.qm9, f"qm9.{part}.sdf")
        for part, more in (("train", [options.more] if options.more else []), ("valid", [])):
            call([DATA_PREP, "-o", at(f"pretrain.{part}.bin"), "--orient", "principal",
                  "--stereo", options.stereo, source(part), *more])
        for part in PARTS:
            call([DATA_PREP, "-o", at(f"qm9.{part}.bin"), "--labels", ",".join(QUANTUM),
                  "--orient", "principal", "--stereo", options.stereo, source(part)])
    if options.descriptors:
        call([DATA_PREP, "-o", at("descriptors.{}.bin"), "--labels", "all", "--split", "0.96,0.04",
              "--split-by", "random", "--stereo", options.stereo, options.descriptors])
    for task in TASKS:
        if task == "qm9" or not options.moleculenet:
            continue
        path = plain(os.path.join(options.moleculenet, task + ".csv"), options.work)
        if path is None:
            print(f"{task}: no file in {options.moleculenet}, left out", file=sys.stderr)
            continue
        call([DATA_PREP, "-o", at(task + ".{}.bin"), "--labels", "all", "--split", "0.8,0.1,0.1",
              "--split-by", "scaffold", "--stereo", options.stereo, path])


def pretrain(options):
    at = lambda name: os.path.join(options.work, name)
    for name in options.starts:
        (program, extra), seed = STARTS[base(name)], name.partition("@")[2] or "1"
        if extra is None:
            continue
        if os.path.exists(at(name + ".safetensors")) and not options.again:
            print(f"{name}.safetensors is there already", file=sys.stderr)
            continue
        command = [program, at("pretrain.train.bin"), "--valid", at("pretrain.valid.bin"),
                   "--threads", "1", "--seed", seed, *extra, "-o",
                   at(name + ".unfinished.safetensors")]
        if base(name).startswith("desc"):
            begin_at = ["--init", at("blend.safetensors")] if base(name) == "desc-blend" \
                else size_options(options.size)
            command = [program, "finetune", at("descriptors.train.bin"), "--valid",
                       at("descriptors.valid.bin"), "--threads", "1", "--seed", seed, *begin_at,
                       *DESCRIPTORS, "-o", at(name + ".unfinished.safetensors")]
        elif program == MOLEBLEND:
            command += [*size_options(options.size), "--steps", str(options.steps), "--batch-size",
                        str(options.pretrain_batch), "--lr", str(options.pretrain_lr), "--hold",
                        "0", "--beta2", "0.999"]
        else:
            command += ["--steps", str(options.sde_steps)]
        begin = cpu_seconds()
        with open(at(name + ".txt"), "w") as out:
            call(command, stdout=out)
            out.write(f"CPU seconds {cpu_seconds() - begin:.0f}\n")
        os.rename(at(name + ".unfinished.safetensors"), at(name + ".safetensors"))


def metrics(line):
    """The metrics on a line of output: {name: value}."""
    return {name: float(value)
            for name, value in re.findall(r"([A-Z][\w-]*)\s+(-?[\d.]+(?:e-?\d+)?)", line)}


def finetune_once(options, task, start, lr, seed):
    """One run: {"valid": ..., "test": {metric: value}, "epoch": ..., "seconds": CPU time}; for qm9
    also "each": {label: {metric: value}} of the test part."""
    kind, modality = TASKS[task][:2]
    program, begins = STARTS[base(start)][0], STARTS[base(start)][1] is not None
    at = lambda name: os.path.join(options.work, name)
    command = [program, "finetune", at(task + ".train.bin"), "--valid", at(task + ".valid.bin"),
               "--test", at(task + ".test.bin"), "--task", kind, "--epochs",
               str(settings(options, task)["epochs"]), "--batch-size", str(options.batch),
               "--lr", repr(lr), "--seed", str(seed), "--threads", "1", "-o",
               at(f"study.{os.getpid()}.safetensors")]
    if program == MOLEBLEND:
        command += ["--modality", modality, "--readout", options.readout, "--patience",
                    str(options.patience), *([] if begins else size_options(options.size))]
    else:
        command += ["--encoder", modality]
    command += ["--init", at(start + ".safetensors")] if begins else []
    begin = cpu_seconds()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")

    kept = re.findall(r"(\d+)\s+\S+\s+(\S+)\s+best so far", done.stdout)
    found = re.search(r"(?:; test|^test:)\s+(.*)$", done.stdout, re.M)
    if not kept or not found:
        sys.exit(f"{' '.join(command)}\nno result in:\n{done.stdout}")
    each = {label: metrics(line) for label in QUANTUM if task == "qm9"
            for line in re.findall(rf"^{label} +(.*)$", done.stdout, re.M)}
    return {"valid": float(kept[-1][1]), "epoch": int(kept[-1][0]),
            "test": metrics(found.group(1)), **({"each": each} if each else {}),
            "seconds": round(cpu_seconds() - begin, 1)}


def tuned(options, task, start, rates, run):
    """The runs of one cell of the table: every rate with seed 1, the best with the other seeds."""
    def once(lr, seed):
        row = {"task": task, "start": start, "lr": lr, "seed": seed, **settings(options, task)}
        if cell(row) in done:
            return done[cell(row)]
        row.update(run(options, task, start, lr, seed))
        with open(os.path.join(options.work, "results.jsonl"), "a") as out:
            out.write(json.dumps(row) + "\n")
        metric = TASKS[task][2]
        shown = [values[metric] for values in row.get("each", {0: row["test"]}).values()]
        print(f"{task} {start} {lr} seed {seed}: valid {row['valid']:g}, test {metric} "
              f"{', '.join(map(str, shown))}, {row['seconds']:.0f} CPU s", flush=True)
        return row

    done = {cell(row): row for row in results(options)}
    if os.path.exists(os.path.join(options.work, task + ".train.bin")):
        best = best_run([once(lr, 1) for lr in rates], task)
        for seed in range(2, options.seeds + 1):
            once(best["lr"], seed)


def finetune(options):
    for task in options.tasks:
        for start in options.starts:
            needed = os.path.join(options.work, start + ".safetensors")
            if task == "qm9" and STARTS[base(start)][0] == MOLECULESDE:
                continue  # which does not print its three labels one by one
            if STARTS[base(start)][1] is None or os.path.exists(needed):
                tuned(options, task, start, options.lrs, finetune_once)
    table(options)


def forest(options):
    import numpy as np
    from rdkit import Chem, DataStructs, RDLogger
    from rdkit.Chem import rdMolDescriptors
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    from sklearn.metrics import roc_auc_score

    RDLogger.DisableLog("rdApp.*")

    def read(task, part):
        """(fingerprints, labels with NaN where there is none)"""
        path = os.path.join(options.work, f"{task}.{part}.bin")
        text = call([DATA_PREP, "--dump", path], stdout=subprocess.PIPE, text=True).stdout
        rows = [json.loads(line) for line in text.splitlines()]
        bits = np.zeros((len(rows), 2048), np.uint8)
        for k, row in enumerate(rows):  # the names are the SMILES
            mol = Chem.MolFromSmiles(row["name"])
            fingerprint = rdMolDescriptors.GetMorganFingerprintAsBitVect(mol, 2, 2048)
            DataStructs.ConvertToNumpyArray(fingerprint, bits[k])
        return bits, np.array([row["labels"] for row in rows], float)

    def once(_, task, start, features, seed):
        kind = TASKS[task][0]
        model = RandomForestClassifier if kind == "classification" else RandomForestRegressor
        begin, scores = time.process_time(), {"valid": [], "test": []}
        for k in range(data["train"][1].shape[1]):
            bits, labels = data["train"][0], data["train"][1][:, k]
            here = ~np.isnan(labels)
            trees = model(500, max_features=features, random_state=seed, n_jobs=1)
            trees.fit(bits[here], labels[here])
            for part in scores:
                bits, labels = data[part][0], data[part][1][:, k]
                here = ~np.isnan(labels)
                if kind == "regression":
                    wrong = trees.predict(bits[here]) - labels[here]
                    scores[part].append(float(np.sqrt((wrong ** 2).mean())))
                elif len(set(labels[here])) == 2:
                    chance = trees.predict_proba(bits[here])[:, 1]
                    scores[part].append(float(roc_auc_score(labels[here], chance)))
        return {"valid": statistics.fmean(scores["valid"]), "epoch": 0,
                "test": {TASKS[task][2]: statistics.fmean(scores["test"])},
                "seconds": round(time.process_time() - begin, 1)}

    for task in options.tasks:
        if task != "qm9" and os.path.exists(os.path.join(options.work, task + ".train.bin")):
            data = {part: read(task, part) for part in PARTS}
            tuned(options, task, "forest", options.features, once)
    table(options)


# ==================================================================================================
# The table
# ==================================================================================================

def settings(options, task):
    """What all runs of a task have in common."""
    return {"epochs": options.epochs or TASKS[task][3], "size": options.size,
            "readout": options.readout}


def cell(row):
    """What must be equal for two runs to be the same; a forest has no size."""
    common = () if row["start"] == "forest" else (row["epochs"], row["size"], row["readout"])
    return (row["task"], row["start"], row["lr"], row["seed"], *common)


def results(options):
    path = os.path.join(options.work, "results.jsonl")
    if not os.path.exists(path):
        return []
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def best_run(rows, task):
    return (max if TASKS[task][0] == "classification" else min)(rows, key=lambda row: row["valid"])


def table(options):
    rows = [row for row in results(options)
            if cell(row) == cell({**row, **settings(options, row["task"])})]
    starts = [start for start in [*STARTS, "forest"]
              if any(base(row["start"]) == start for row in rows)]
    print("\n| task | metric | " + " | ".join(starts) + " |")
    print("|---" * (len(starts) + 2) + "|")
    lines = [(task, label) for task in options.tasks
             for label in (QUANTUM if task == "qm9" and not options.valid else [None])]
    for task, label in lines:
        kind, modality, metric = TASKS[task][:3]
        shown = []
        for start in starts:
            values, rates = [], set()
            for name in {row["start"] for row in rows if base(row["start"]) == start}:
                here = [row for row in rows if row["task"] == task and row["start"] == name]
                if not any(row["seed"] == 1 for row in here):
                    continue
                best = best_run([row for row in here if row["seed"] == 1], task)["lr"]
                rates.add(str(best))
                values += [row["valid"] if options.valid else
                           (row["each"][label] if label else row["test"])[metric]
                           for row in here if row["lr"] == best]
            deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
            shown.append(f"{statistics.fmean(values):.3f} ± {deviation:.3f} "
                         f"({len(values)}; {', '.join(sorted(rates))})" if values else "")
        if any(shown):
            better = "higher is better" if kind == "classification" else "lower is better"
            where = "validation" if options.valid else metric
            print(f"| {label or task} ({modality}) | {where}, {better} | "
                  + " | ".join(shown) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "pretrain", "finetune", "forest", "table"))
    parser.add_argument("--work", required=True, metavar="DIR", help="everything is written there")
    parser.add_argument("--qm9", metavar="FOLDER", help="what make_qm9.py wrote")
    parser.add_argument("--more", metavar="FILE", help="further molecules to pretrain on")
    parser.add_argument("--moleculenet", metavar="FOLDER", help="esol.csv and so on")
    parser.add_argument("--descriptors", metavar="FILE", help="what make_geometries.py -o wrote")
    parser.add_argument("--stereo", default="rdkit", help="chiral tags; the tables have RDKit's")
    parser.add_argument("--size", default="small",
                        help="a name, or layers,dim,ffn,heads,kernels (default small)")
    parser.add_argument("--steps", type=int, default=4000, help="of pretraining (default 4000)")
    parser.add_argument("--sde-steps", type=int, default=3600, help="of MoleculeSDE, batches of 64")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pretrain-batch", type=int, default=128)
    parser.add_argument("--pretrain-lr", type=float, default=1e-3)
    parser.add_argument("--again", action="store_true", help="pretrain even if it has been done")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--starts", default="scratch,blend,sum,gin,sde")
    parser.add_argument("--valid", action="store_true", help="table: the validation results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", default="3e-4,1e-3")
    parser.add_argument("--features", default="sqrt,0.3",
                        help="forest: tried for each split of a tree (default sqrt,0.3)")
    parser.add_argument("--epochs", type=int, default=0, help="instead of the task's own (TASKS)")
    parser.add_argument("--patience", type=int, default=0)
    parser.add_argument("--readout", default="mean")
    options = parser.parse_args()
    options.tasks, options.starts = options.tasks.split(","), options.starts.split(",")
    options.lrs = [float(lr) for lr in options.lrs.split(",")]
    options.features = [part if part == "sqrt" else float(part)
                        for part in options.features.split(",")]
    for name, known in ([(task, TASKS) for task in options.tasks]
                        + [(base(start), STARTS) for start in options.starts]):
        if name not in known:
            parser.error(f"unknown: {name}; there are {', '.join(known)}")
    os.makedirs(options.work, exist_ok=True)
    {"prepare": prepare, "pretrain": pretrain, "finetune": finetune, "forest": forest,
     "table": table}[options.stage](options)


if __name__ == "__main__":
    main()
