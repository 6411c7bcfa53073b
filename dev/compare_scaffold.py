#!/usr/bin/env python3
"""Compares data_prep's scaffold split with the one computed by RDKit, file by file.

    python3 dev/compare_scaffold.py FILE.csv... [--smiles COLUMN]

The reference is MoleculeNet's deterministic procedure: Bemis-Murcko scaffold SMILES without
chirality (RDKit), molecules of one scaffold form a group, groups sorted by (size, first member)
descending, each group going whole into the first of train, valid, test that still has room
(80/10/10 %).
Molecules that RDKit cannot read are left out of both splits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict

from rdkit import Chem, RDLogger
from rdkit.Chem.Scaffolds import MurckoScaffold

from compare_rdkit import HERE, records_of, write_input

PARTS = ("train", "valid", "test")


def reference_split(mols):
    """The part of each molecule, by RDKit's scaffolds."""
    groups = defaultdict(list)
    for i, mol in enumerate(mols):
        groups[MurckoScaffold.MurckoScaffoldSmiles(mol=mol, includeChirality=False)].append(i)
    train_room, valid_room = 0.8 * len(mols), 0.9 * len(mols)
    part, n_train, n_valid = [None] * len(mols), 0, 0
    for group in sorted(groups.values(), key=lambda g: (len(g), g[0]), reverse=True):
        if n_train + len(group) <= train_room:
            name, n_train = "train", n_train + len(group)
        elif n_train + n_valid + len(group) <= valid_room:
            name, n_valid = "valid", n_valid + len(group)
        else:
            name = "test"
        for i in group:
            part[i] = name
    return part, len(groups)


def our_split(program, smiles, folder):
    """The part of each molecule, by data_prep; None where it refused."""
    source = os.path.join(folder, "input.csv")
    write_input(source, "csv", smiles, 0)
    done = subprocess.run([program, "-o", os.path.join(folder, "split.{}.bin"), source,
                           "--smiles", "smiles", "--name", "number", "--split", "0.8,0.1,0.1",
                           "--split-by", "scaffold"],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        sys.exit(f"data_prep failed: {done.stdout.decode()}")
    part = [None] * len(smiles)
    for name in PARTS:
        path = os.path.join(folder, f"split.{name}.bin")
        if not os.path.exists(path):
            continue
        dump = subprocess.run([program, "--dump", path], stdout=subprocess.PIPE, check=True)
        for line in dump.stdout.splitlines():
            part[int(json.loads(line)["name"])] = name
        os.remove(path)
    return part


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--data-prep", default=os.path.join(HERE, "..", "data_prep"))
    parser.add_argument("--smiles", default="smiles", help="SMILES column (default: smiles)")
    parser.add_argument("--show", type=int, default=3, help="differing molecules to show")
    options = parser.parse_args()
    program = os.path.abspath(options.data_prep)
    RDLogger.DisableLog("rdApp.*")
    with tempfile.TemporaryDirectory() as folder:
        for path in options.files:
            smiles, mols = [], []
            for text in records_of(path, options.smiles):
                mol = Chem.MolFromSmiles(text)
                if mol is not None and mol.GetNumAtoms():
                    smiles.append(text)
                    mols.append(mol)
            theirs, n_groups = reference_split(mols)
            ours = our_split(program, smiles, folder)
            same = sum(a == b for a, b in zip(theirs, ours))
            sizes = " ".join(f"{name} {theirs.count(name)}/{ours.count(name)}" for name in PARTS)
            print(f"{path}: {len(mols)} molecules, {n_groups} scaffolds; RDKit/data_prep: {sizes}; "
                  f"in the same part: {same} = {100 * same / max(1, len(mols)):.2f} %", flush=True)
            different = [i for i in range(len(mols)) if theirs[i] != ours[i]]
            for i in different[:options.show]:
                print(f"    molecule {i}: RDKit {theirs[i]}, data_prep {ours[i]}: {smiles[i]}")


if __name__ == "__main__":
    main()
