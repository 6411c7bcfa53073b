#!/usr/bin/env python3
"""How good are the conformers that `moleculesde generate` makes from a graph alone?

    python3 dev/conformers.py --model sde.safetensors --data qm9.test.bin --sdf qm9.test.sdf
        [--count 100 --copies 10]                                               (RDKit 2022.09)

For the first --count molecules of --sdf with at least 4 heavy atoms (--data is the same file
prepared by data_prep): the RMSD of the best of --copies conformers from the geometry in the file,
heavy atoms, symmetric atoms interchanged and the copies turned as fits best (RDKit's GetBestRMS).
Three makers: MoleculeSDE; RDKit's ETKDGv3, from the same graph with its stereo marks, with
hydrogens, without a force field; and by chance: normal deviates as wide along each axis as the
geometry itself. Also how far lengths of bonds are off in the mean over all copies, and in how many
of the best copies every stereo centre is as in the file (without one it is).
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from rdkit import Chem, RDLogger
from rdkit.Chem import AllChem, rdMolAlign

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "moleculesde",
                       "moleculesde")


def with_positions(mol, pos):
    """A copy of a molecule with other positions of its atoms."""
    copy = Chem.Mol(mol)
    copy.RemoveAllConformers()
    conformer = Chem.Conformer(mol.GetNumAtoms())
    for k, (x, y, z) in enumerate(np.asarray(pos, float)):
        conformer.SetAtomPosition(k, (x, y, z))
    copy.AddConformer(conformer)
    return copy


def generated(options, index, mol):
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "copies.sdf")
        done = subprocess.run([PROGRAM, "generate", options.data, str(index), "--model",
                               options.model, "--copies", str(options.copies), "--seed",
                               str(options.seed), "--threads", "1", "-o", out],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr)
        copies = list(Chem.SDMolSupplier(out, sanitize=False, removeHs=False))
    for copy in copies:  # atoms stand in the order of the dataset, which is that of the file
        same = [atom.GetAtomicNum() for atom in copy.GetAtoms()]
        assert same == [atom.GetAtomicNum() for atom in mol.GetAtoms()], "other atoms"
    return [with_positions(mol, copy.GetConformer().GetPositions()) for copy in copies]


def etkdg(options, mol):
    full = Chem.AddHs(mol)
    settings = AllChem.ETKDGv3()
    settings.randomSeed = options.seed
    found = AllChem.EmbedMultipleConfs(full, options.copies, settings)
    n = mol.GetNumAtoms()  # hydrogens come last
    return [with_positions(mol, full.GetConformer(k).GetPositions()[:n]) for k in found]


def by_chance(options, mol, rng):
    pos = mol.GetConformer().GetPositions()
    pos = (pos - pos.mean(0)) @ np.linalg.svd(pos - pos.mean(0))[2].T  # along its axes
    return [with_positions(mol, rng.normal(size=pos.shape) * pos.std(0))
            for _ in range(options.copies)]


def handed(mol):
    """The marks of the stereo centres by the positions."""
    copy = Chem.Mol(mol)
    Chem.AssignStereochemistryFrom3D(copy)
    return Chem.FindMolChiralCenters(copy, useLegacyImplementation=True)


def bond_errors(copy, mol):
    length = lambda m, a, b: (m.GetConformer().GetAtomPosition(a)
                              - m.GetConformer().GetAtomPosition(b)).Length()
    for bond in mol.GetBonds():
        ends = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        yield abs(length(copy, *ends) - length(mol, *ends))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, metavar="FILE.bin")
    parser.add_argument("--sdf", required=True, metavar="FILE.sdf")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    RDLogger.DisableLog("rdApp.*")
    rng = np.random.default_rng(options.seed)
    makers = {"MoleculeSDE": lambda k, mol: generated(options, k, mol),
              "ETKDGv3": lambda k, mol: etkdg(options, mol),
              "by chance": lambda k, mol: by_chance(options, mol, rng)}
    rows = {name: [] for name in makers}
    seconds = dict.fromkeys(makers, 0.0)
    supplier = enumerate(Chem.SDMolSupplier(options.sdf))
    usable = ((k, mol) for k, mol in supplier if mol and mol.GetNumAtoms() >= 4)
    for k, mol in itertools.islice(usable, options.count):
        Chem.AssignStereochemistryFrom3D(mol)
        for name, make in makers.items():
            begin = time.time()
            copies = make(k, mol)
            seconds[name] += time.time() - begin
            if not copies:
                print(f"{name}: no conformer of {mol.GetProp('_Name')}")
                continue
            rms, best = min(((rdMolAlign.GetBestRMS(Chem.Mol(copy), mol), n)
                             for n, copy in enumerate(copies)))
            bond = statistics.fmean(e for copy in copies for e in bond_errors(copy, mol))
            rows[name].append((rms, bond, handed(copies[best]) == handed(mol)))
    print("| | RMSD of the best of %d: mean | median | below 0.5 | below 1.0 | bonds off by | "
          "handedness right | seconds |\n|---|---|---|---|---|---|---|---|" % options.copies)
    for name, found in rows.items():
        rms = [row[0] for row in found]
        share = lambda test: 100 * sum(map(test, found)) / len(found)
        print(f"| {name} | {statistics.fmean(rms):.3f} | {statistics.median(rms):.3f} | "
              f"{share(lambda row: row[0] < 0.5):.0f} % | {share(lambda row: row[0] < 1):.0f} % | "
              f"{statistics.fmean(row[1] for row in found):.3f} | "
              f"{share(lambda row: row[2]):.0f} % | {seconds[name]:.0f} |")
    print(f"{len(rows['MoleculeSDE'])} molecules; lengths in Angstrom")


if __name__ == "__main__":
    main()
