#!/usr/bin/env python3
"""Writes an SD file of drug-like molecules with computed geometries, for pretraining; or, as a
CSV file, their SMILES and RDKit's descriptors.

    python3 dev/make_geometries.py -o drugs.sdf hiv.csv muv.csv toxcast.csv tox21.csv
        [--without esol.test.bin ...] [--limit 30000] [--processes 2]        (RDKit; hours)
    python3 dev/make_geometries.py -o descriptors.csv ...

Every molecule of the CSV files (a column `smiles`; .gz too) is taken once, by its canonical SMILES
without stereo marks, if it is one piece of at least 4 and at most --max-atoms heavy atoms. Left out
are the molecules of the datasets named by --without (made by data_prep from the tasks that will be
fine-tuned; their names must be the SMILES), so that pretraining never sees a test molecule. The
rest is shuffled with a seed: --limit takes a random sample. Geometries: ETKDGv3 with a fixed seed,
then at most 500 steps of MMFF94; what fails is left out and counted. Heavy atoms only, as in
data/sample.sdf. Descriptors: all of Descriptors.descList but Ipc, which grows beyond any float, cut
off below and above at the 0.1 % of the molecules that are furthest out, and without those that are
the same for 99 of 100; a cell is empty where there is no number.
Counts and the time go to stdout.
"""

import argparse
import csv
import gzip
import json
import math
import multiprocessing
import os
import random
import subprocess
import time

from rdkit import Chem, RDLogger
from rdkit.Chem import Descriptors

from make_sample import conformer

DATA_PREP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data_prep")


def key(smiles):
    """Canonical SMILES without stereo marks; None if RDKit does not read it."""
    mol = Chem.MolFromSmiles(smiles)
    return None if mol is None else Chem.MolToSmiles(mol, isomericSmiles=False)


def names(dataset):
    """The names of the molecules of a dataset."""
    done = subprocess.run([DATA_PREP, "--dump", dataset], stdout=subprocess.PIPE, check=True,
                          text=True)
    return [json.loads(line)["name"] for line in done.stdout.splitlines()]


def record(smiles):
    """SD record of a SMILES with one MMFF94 geometry, or None."""
    mol = conformer(Chem.MolFromSmiles(smiles), attempts=5, steps=500, unfinished=True)
    if mol is None:
        return None
    mol.SetProp("_Name", smiles)
    return Chem.MolToMolBlock(Chem.RemoveHs(mol), includeStereo=False) + "$$$$\n"


def descriptors(smiles):
    """A row of the table: the descriptors by name."""
    mol = Chem.MolFromSmiles(smiles)
    values = {name: f(mol) for name, f in Descriptors.descList if name != "Ipc"}
    return {"smiles": smiles, **{name: value if math.isfinite(value) else ""
                                 for name, value in values.items()}}


def write_descriptors(rows, path):
    """The rows without outliers and without columns that are nearly constant."""
    for name in list(rows[0])[1:]:
        values = sorted(row[name] for row in rows if row[name] != "")
        far = len(values) // 1000
        if not values or values[len(values) // 200] == values[-1 - len(values) // 200]:
            for row in rows:
                del row[name]
            continue
        low, high = values[far], values[-1 - far]
        for row in rows:
            if row[name] != "":
                row[name] = f"{min(max(row[name], low), high):.6g}"
    with open(path, "w", newline="") as out:
        table = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print(f"{len(rows[0]) - 1} descriptors")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", metavar="FILE.csv")
    parser.add_argument("-o", required=True, dest="out", metavar="FILE.sdf|FILE.csv")
    parser.add_argument("--without", nargs="*", default=[], metavar="FILE.bin")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--max-atoms", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    RDLogger.DisableLog("rdApp.*")
    begin = time.time()
    hidden = {key(name) for dataset in options.without for name in names(dataset)}
    found, unread, unfit, kept_back = {}, 0, 0, set()
    for path in options.tables:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt") as table:
            for row in csv.DictReader(table):
                mol = Chem.MolFromSmiles(row["smiles"])
                if mol is None:
                    unread += 1
                    continue
                plain = Chem.MolToSmiles(mol, isomericSmiles=False)
                if plain in hidden:
                    kept_back.add(plain)
                elif "." in plain or not 4 <= mol.GetNumHeavyAtoms() <= options.max_atoms:
                    unfit += 1
                else:
                    found.setdefault(plain, Chem.MolToSmiles(mol))
    chosen = sorted(found.values())
    random.Random(options.seed).shuffle(chosen)
    print(f"{len(found)} molecules; left out: {unread} not read, {unfit} of several pieces or of "
          f"another size, {len(kept_back)} of the datasets --without", flush=True)
    if options.limit:
        chosen = chosen[:options.limit]
    if options.out.endswith(".csv"):
        with multiprocessing.Pool(options.processes) as pool:
            write_descriptors(list(pool.imap(descriptors, chosen, chunksize=50)), options.out)
        print(f"{len(chosen)} molecules; {time.time() - begin:.0f} s")
        return
    good = 0
    with multiprocessing.Pool(options.processes) as pool, open(options.out, "w") as out:
        for text in pool.imap(record, chosen, chunksize=50):
            if text is not None:
                out.write(text)
                good += 1
    print(f"{good} of {len(chosen)} have a geometry; {time.time() - begin:.0f} s "
          f"with {options.processes} processes")


if __name__ == "__main__":
    main()
