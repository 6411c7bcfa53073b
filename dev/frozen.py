#!/usr/bin/env python3
"""What are a pretrained model's vectors worth without fine-tuning? Linear models on what
`moleblend embed` writes, beside fingerprints, descriptors and an untrained network, over several
scaffold splits.

    python3 dev/frozen.py --work DIR --moleculenet FOLDER [--model NAME=FILE ...]
    python3 dev/frozen.py --work DIR --table [--valid]

A column is a model and a recipe: what stands side by side, with + between, and what learns from it.

    ecfp forest         Morgan fingerprints of radius 2, 2,048 bits; 500 trees
    desc forest         RDKit's descriptors (207 in 2022.09, without Ipc), 500 trees
    desc                the same; ridge or logistic regression
    untrained@1: last   an untrained network's vectors, the mean over the atoms, of its last layer
    small: 0+2+last     layers 0, 2 and the last of the model small=FILE
    small: last+desc    its last layer and descriptors; `all` is all layers

Linear models see columns less their mean, over their deviation (of the training part), up to 10 of
it. Their penalty is chosen on the validation part, label by label, and so is a forest's share of
features a split (above 5,000 molecules: the root, and logistic regression's penalties by whole
decades); nothing is trained on the validation part, and the test part decides nothing. NAME@2 is a
model pretrained with another seed, untrained@2 another untrained one: a cell is the mean over the seeds, and in comparisons each counts.

Split 0 is the study's (`data_prep --split-by scaffold`, see study.py); in the others scaffolds go
in random order to test, validation and training part, those with more than a twentieth of the
molecules to the last. Datasets, descriptors and vectors stay in DIR, and every result appends a
line to frozen.jsonl: what is there is not done again, so it can be stopped, and continued with more
models, recipes, tasks or splits. The tables: the study's split, and mean and deviation of the
others; how often the row's column beats the one above, of all tasks, splits and seeds; by how much
it is better than --against. --valid: of the validation parts, to choose by. One thread. Needs
RDKit and scikit-learn."""

import os
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import collections
import hashlib
import itertools
import json
import random
import statistics
import subprocess
import time
import warnings

import numpy as np
from study import DATA_PREP, HERE, MOLEBLEND, PARTS, TASKS, base, call, plain, size_options

BASELINES = "ecfp forest,desc forest,desc"
RECIPES = "last,0+2+last,all,last+desc,0+2+last+desc"
RIDGE = [10.0 ** (k / 2) for k in range(-6, 11)]     # penalties
LOGISTIC = [10.0 ** (k / 2) for k in range(-10, 3)]  # their inverse, as scikit-learn has it
TREES, SHARES, LARGE = 500, ("sqrt", 0.3), 5000  # above so many molecules: the first share alone,
#                                                  and every other penalty of LOGISTIC
OUTLIER = 10  # deviations
KEY = ("task", "split", "model", "recipe", "digest")  # of a result


# ---- molecules and splits
def molecules(options, task, part=None):
    """(SMILES, labels with NaN where there is none) of a dataset."""
    path = os.path.join(options.work, f"{task}.{part}.bin" if part else f"{task}.bin")
    if not os.path.exists(path):
        source = plain(os.path.join(options.moleculenet or ".", task + ".csv"), options.work)
        if source is None:
            raise SystemExit(f"{path} is not there, nor {task}.csv in --moleculenet")
        for name, more in ((".{}.bin", ["--split", "0.8,0.1,0.1"]), (".bin", [])):
            call([DATA_PREP, "-o", os.path.join(options.work, task + name), "--labels", "all",
                  "--stereo", options.stereo, *more, source], stderr=subprocess.DEVNULL)
    text = call([DATA_PREP, "--dump", path], stdout=subprocess.PIPE, text=True).stdout
    rows = [json.loads(line) for line in text.splitlines()]
    return [row["name"] for row in rows], np.array([row["labels"] for row in rows], float)


def rdkit_molecules(smiles):
    from rdkit import Chem, RDLogger
    RDLogger.DisableLog("rdApp.*")
    return [Chem.MolFromSmiles(text) for text in smiles]


def split(options, task, smiles, number):
    """Which molecules are in which part: {part: indices}."""
    if number == 0:  # the names are the SMILES; equal ones are in one part
        where = {name: part for part in PARTS for name in molecules(options, task, part)[0]}
        part_of = [where[name] for name in smiles]
    else:
        from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
        groups = collections.defaultdict(list)
        for k, mol in enumerate(rdkit_molecules(smiles)):
            groups[MurckoScaffoldSmiles(mol=mol, includeChirality=False)].append(k)
        order, n = sorted(groups.values()), len(smiles)
        random.Random(number).shuffle(order)
        part_of, room = ["train"] * n, {"test": n // 10, "valid": n // 10, "train": n}
        for group in order:
            part = next(part for part in room if len(group) <= room[part]) \
                if len(group) <= n // 20 else "train"
            room[part] -= len(group)
            for k in group:
                part_of[k] = part
    return {part: np.flatnonzero(np.array(part_of) == part) for part in PARTS}


# ---- what is known of a molecule
def kept(make):
    """make(options, task, ...), an array, from its file if that is there."""
    def load(options, task, *rest):
        words = [task, make.__name__, *(str(word).replace(os.sep, "_") for word in rest)]
        path = os.path.join(options.work, ".".join(words) + ".npy")
        if not os.path.exists(path):
            np.save(path[:-4] + ".part.npy", make(options, task, *rest))
            os.rename(path[:-4] + ".part.npy", path)
        return np.load(path)
    return load


@kept
def ecfp(options, task):
    from rdkit.Chem import rdMolDescriptors
    return np.array([np.frombuffer(bits.encode(), np.uint8) - ord("0") for bits in (
        rdMolDescriptors.GetMorganFingerprintAsBitVect(mol, 2, 2048).ToBitString()
        for mol in rdkit_molecules(molecules(options, task)[0]))])


@kept
def desc(options, task):
    from rdkit.Chem import Descriptors
    known = [f for name, f in Descriptors.descList if name != "Ipc"]  # beyond any float
    values = [[f(mol) for f in known] for mol in rdkit_molecules(molecules(options, task)[0])]
    return np.nan_to_num(np.clip(np.array(values, float), -1e30, 1e30)).astype(np.float32)


MADE = {"ecfp": ecfp, "desc": desc}


@kept
def layers(options, task, name, digest):
    """(molecules, layers, width) of a model, whose digest stands in the array's name."""
    at = os.path.join(options.work, f"{task}.{os.getpid()}")
    call([MOLEBLEND, "embed", os.path.join(options.work, task + ".bin"), "--model",
          options.models[name], "--layer", "all", "--modality", "2d", "--readout", "mean",
          "--threads", "1", "-o", at + ".npy"], stderr=subprocess.DEVNULL)
    with open(at + ".csv") as names:
        count = next(names).count(",layer ")
    vectors = np.load(at + ".npy")
    for ending in (".npy", ".csv"):
        os.remove(at + ending)
    return vectors.reshape(len(vectors), count, -1)


def features(options, task, name, recipe):
    """(molecules, columns) of a recipe without its learner."""
    def columns_of(part):
        if part in MADE:
            return MADE[part](options, task)
        vectors = layers(options, task, name, options.digests[name])
        vectors = vectors if part == "all" else vectors[:, -1 if part == "last" else int(part)]
        return vectors.reshape(len(vectors), -1)

    return np.concatenate([columns_of(part) for part in recipe.split("+")], axis=1)


# ---- learners: the predictions of each of several settings, for the validation and the test part
def forests(x, y, others, classes, count):
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    for share in SHARES[:1] if count > LARGE else SHARES:
        model = (RandomForestClassifier if classes else RandomForestRegressor)(
            TREES, max_features=share, random_state=1, n_jobs=1).fit(x, y)
        yield share, [model.predict_proba(other)[:, 1] if classes else model.predict(other)
                      for other in others]


def standardized(x, *others):
    mean, deviation = x.mean(axis=0, dtype=float), x.std(axis=0, dtype=float)
    scale = np.where(deviation > 1e-7 * np.abs(mean) + 1e-12, 1 / np.maximum(deviation, 1e-30), 0)
    return [np.clip((part - mean) * scale, -OUTLIER, OUTLIER) for part in (x, *others)]


def ridge(x, y, others, *_):
    wide = x.shape[1] > len(x)
    shift = x.mean(axis=0)  # not quite 0 where columns were clipped
    x = x - shift
    values, basis = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    for penalty in RIDGE:
        solve = lambda right: basis @ ((basis.T @ right) / (values + penalty))
        weight = x.T @ solve(y - y.mean()) if wide else solve(x.T @ (y - y.mean()))
        yield penalty, [y.mean() + (other - shift) @ weight for other in others]


def logistic(x, y, others, _, count):
    from sklearn.linear_model import LogisticRegression
    model = LogisticRegression(max_iter=200, tol=1e-5 * len(x), warm_start=True)
    x, *others = [part.astype(np.float32) for part in (x, *others)]
    for model.C in LOGISTIC[::2] if count > LARGE else LOGISTIC:
        model.fit(x, y)
        yield model.C, [other @ model.coef_[0] for other in others]


def score(labels, said, classes):
    from sklearn.metrics import roc_auc_score
    if classes:
        return float(roc_auc_score(labels, said)) if len(set(labels)) == 2 else float("nan")
    return float(np.sqrt(np.mean((said - labels) ** 2)))


def evaluate(options, task, name, recipe, labels, parts):
    """One result: means over the labels, and each label's setting."""
    classes, begin = TASKS[task][0] == "classification", time.process_time()
    recipe, _, forest = recipe.partition(" ")
    x = features(options, task, name, recipe)
    x = [x[parts[part]] for part in PARTS]
    x = x if forest else standardized(*x)
    learn, best = forests if forest else logistic if classes else ridge, []
    for column in labels.T:
        y = [column[parts[part]] for part in PARTS]
        (train, truth), *others = [(a[~np.isnan(b)], b[~np.isnan(b)]) for a, b in zip(x, y)]
        rows = [(*(score(b, out, classes) for (_, b), out in zip(others, said)), setting)
                for setting, said in learn(train, truth, [a for a, _ in others], classes,
                                           len(labels))]
        best.append((max if classes else min)(rows, key=lambda row: row[0]))
    return {"valid": float(np.nanmean([row[0] for row in best])),
            "test": float(np.nanmean([row[1] for row in best])),
            "settings": [row[2] for row in best],
            "seconds": round(time.process_time() - begin, 1)}


# ---- all columns, and the tables
def columns(options):
    """(model, recipe) of each."""
    return [("", recipe) for recipe in options.baselines] \
        + [(name, recipe) for name in options.models for recipe in options.recipes]


def results(options):
    with open(os.path.join(options.work, "frozen.jsonl"), "a+") as lines:
        lines.seek(0)
        rows = [json.loads(line) for line in lines]
    return {tuple(row[name] for name in KEY): row for row in rows}


def key(options, task, number, name, recipe):
    used = name if set(recipe.split(" ")[0].split("+")) - set(MADE) else ""
    return (task, number, used, recipe, options.digests[used] if used else "")


def run(options):
    done = results(options)
    for task, number in itertools.product(options.tasks, range(options.splits)):
        todo = [key(options, task, number, *column) for column in columns(options)]
        todo = [this for this in todo if this not in done]
        name, _, first = task.partition(":")
        if todo:
            smiles, labels = molecules(options, name)
            labels = labels[:, :int(first or labels.shape[1])]
            parts = split(options, name, smiles, number)
        for this in todo:
            row = evaluate(options, name, *this[2:4], labels, parts)
            with open(os.path.join(options.work, "frozen.jsonl"), "a") as out:
                out.write(json.dumps({**dict(zip(KEY, this)), **row}) + "\n")
            print(*this, row, flush=True)


def print_table(heading, rows):
    print("\n| " + " | ".join(heading) + " |\n" + "|---" * len(heading) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def table(options):
    done, scores = results(options), collections.defaultdict(list)  # (task, split, title): seeds
    title = lambda name, recipe: f"{base(name)}: {recipe}" if name else recipe
    titles = list(dict.fromkeys(title(*column) for column in columns(options)))
    for name, recipe in columns(options):
        for task, number in itertools.product(options.tasks, range(options.splits)):
            row = done.get(key(options, task, number, name, recipe))
            if row:
                scores[task, number, title(name, recipe)].append(
                    row["valid" if options.valid else "test"])

    mean = lambda values: statistics.fmean(values) if values else float("nan")
    spread = lambda values: statistics.stdev(values) if len(values) > 1 else float("nan")
    classes = lambda task: TASKS[task.partition(":")[0]][0] == "classification"

    def cell(task, one):
        more = [mean(scores[task, number, one]) for number in range(1, options.splits)
                if scores[task, number, one]]  # what is done so far
        return f"{mean(scores[task, 0, one]):.3f} / {mean(more):.3f} ± {spread(more):.3f}"

    def gains(task, one, other):
        """By how much the first is better than the second, pair by pair."""
        return [a - b if classes(task) else b - a for number in range(options.splits)
                for a in scores[task, number, one] for b in scores[task, number, other]]

    share = lambda values: f"{sum(gain > 0 for gain in values)} of {len(values)}"
    print_table(["task", *titles], [
        [f"{task}, {'ROC-AUC' if classes(task) else 'RMSE'}",
         *(cell(task, one) for one in titles)] for task in options.tasks])
    print_table(["is better than", *titles], [
        [one, *(share([gain for task in options.tasks for gain in gains(task, one, other)])
                if one != other else "" for other in titles)] for one in titles])
    print_table([f"better than {options.against} by", *options.tasks], [
        [one, *(f"{mean(row):+.3f} ± {spread(row):.3f}, {share(row)}"
                for row in (gains(task, one, options.against) for task in options.tasks))]
        for one in titles if one != options.against])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, metavar="DIR", help="everything is written there")
    parser.add_argument("--moleculenet", metavar="FOLDER", help="esol.csv and so on, .gz too")
    parser.add_argument("--model", action="append", metavar="NAME=FILE",
                        help="any number of times (default small=data/small.safetensors)")
    parser.add_argument("--tasks", default="esol,freesolv,lipo,bace,bbbp,clintox,tox21:3",
                        help="NAME:N, the first N labels of a task (tox21's twelve take hours)")
    parser.add_argument("--splits", type=int, default=6, help="the study's and others (default 6)")
    parser.add_argument("--recipes", default=RECIPES, help=f"of models (default {RECIPES})")
    parser.add_argument("--baselines", default=BASELINES, help="recipes without a model")
    parser.add_argument("--untrained", type=int, default=2, help="seeds (default 2; 0: none)")
    parser.add_argument("--size", default="small", help="of the untrained network")
    parser.add_argument("--stereo", default="rdkit", help="chiral tags (default rdkit)")
    parser.add_argument("--table", action="store_true", help="only of what has been done")
    parser.add_argument("--valid", action="store_true", help="show the validation parts")
    parser.add_argument("--against", default="small: last", metavar="COLUMN")
    options = parser.parse_args()
    for name in ("tasks", "recipes", "baselines"):
        setattr(options, name, [word for word in getattr(options, name).split(",") if word])
    for task in options.tasks:
        name, _, first = task.partition(":")
        if name not in TASKS or name == "qm9" or not (first or "1").isdigit() or first == "0":
            parser.error(f"--tasks: of {', '.join(TASKS)}, but for qm9; tox21:3 is its first three")
    warnings.filterwarnings("ignore", message="lbfgs failed to converge")
    os.makedirs(options.work, exist_ok=True)

    options.models = {}
    for seed in range(1, options.untrained + 1):
        path = os.path.join(options.work, f"untrained.{options.size}.{seed}.safetensors")
        if not os.path.exists(path):
            task = options.tasks[0].partition(":")[0]
            molecules(options, task)
            call([MOLEBLEND, os.path.join(options.work, task + ".bin"), "--steps", "1",
                  "--lr", "0", "--seed", str(seed), "--threads", "1", "-o", path,
                  *size_options(options.size)], stdout=subprocess.DEVNULL)
            os.remove(path + ".state")
        options.models[f"untrained@{seed}"] = path
    small = "small=" + os.path.join(HERE, "..", "data", "small.safetensors")
    options.models.update(text.split("=", 1) for text in options.model or [small])
    options.digests = {name: hashlib.sha256(open(path, "rb").read()).hexdigest()[:8]
                       for name, path in options.models.items()}
    if not options.table:
        run(options)
    table(options)


if __name__ == "__main__":
    main()
