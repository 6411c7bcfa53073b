#!/usr/bin/env python3
"""Writes data/sample.sdf: about 2,000 real, small, diverse molecules with 3D coordinates.

    python3 dev/make_sample.py > data/sample.sdf        (RDKit 2022.09; a minute)
    python3 dev/make_sample.py --csv data/sample.sdf > data/sample.csv

The molecules are the first 5,000 of the National Cancer Institute's open collection (public
domain), which come with RDKit as Data/NCI/first_5K.smi, and a few very small ones, which it lacks.
Of each size class, the most diverse ones are taken (MaxMin over Morgan fingerprints). Conformers:
ETKDGv3 with a fixed seed, then MMFF94 until converged. A record holds heavy atoms only; hydrogens
are implied by charges and valences, as usual. A molecule is left out if RDKit reads other features
from its record than from the one with all hydrogens, so nothing is lost.

Every molecule stands in its principal frame (what `data_prep --orient principal` computes). The
two labels, Crippen logP and the topological polar surface area, are computed too: with them,
fine-tuning has something to learn whose answer is known. The same RDKit version writes the same
bytes. --csv writes the same molecules as SMILES with a label to classify: is the estimate of
drug-likeness, QED (Bickerton et al. 2012), above 0.6?
"""

import argparse
import os
import random
import sys

import numpy as np
from rdkit import Chem, RDConfig, RDLogger
from rdkit.Chem import AllChem, Crippen, QED, rdMolDescriptors
from rdkit.SimDivFilters.rdSimDivPickers import MaxMinPicker

from ogb_features import molecule_features, read_molblock

SEED = 20231117
ELEMENTS = {"H", "B", "C", "N", "O", "F", "Na", "Si", "P", "S", "Cl", "K", "Se", "Br", "I"}
# Number of molecules for each range of sizes (heavy atoms); the mean size comes out near 15.
QUOTAS = [(1, 6, 110), (7, 9, 310), (10, 12, 440), (13, 15, 400), (16, 18, 300), (19, 22, 220),
          (23, 28, 140), (29, 36, 50), (37, 50, 30)]
VERY_SMALL = [
    ("methane", "C"), ("ammonia", "N"), ("water", "O"), ("hydrogen sulfide", "S"),
    ("ammonium", "[NH4+]"), ("hydroxide", "[OH-]"), ("phosphine", "P"), ("silane", "[SiH4]"),
    ("methanol", "CO"), ("methyl radical", "[CH3]"), ("hydrogen cyanide", "C#N"),
    ("carbon dioxide", "O=C=O"), ("sodium acetate", "[Na+].CC(=O)[O-]"),
    ("ammonium chloride", "[NH4+].[Cl-]"), ("glycine zwitterion", "[NH3+]CC([O-])=O"),
]


def candidates():
    """(name, molecule) of every usable structure, each once."""
    path = os.path.join(RDConfig.RDDataDir, "NCI", "first_5K.smi")
    with open(path) as lines:
        named = [("NSC" + number, smiles) for smiles, number in map(str.split, lines)]
    seen, found = set(), []
    for name, smiles in VERY_SMALL + named:
        mol = Chem.MolFromSmiles(smiles)
        if mol is None or not all(atom.GetSymbol() in ELEMENTS for atom in mol.GetAtoms()):
            continue
        if any(atom.GetIsotope() for atom in mol.GetAtoms()):
            continue
        canonical = Chem.MolToSmiles(mol)
        if canonical in seen:
            continue
        seen.add(canonical)
        found.append((name, mol))
    return found


def conformer(mol, attempts=0, steps=5000, unfinished=False):
    """The molecule with hydrogens and one MMFF94 geometry, or None: after so many attempts to embed
    it (0: RDKit's choice) and steps, converged or, if that will do, unfinished."""
    mol = Chem.AddHs(mol)
    if not AllChem.MMFFHasAllMoleculeParams(mol):
        return None
    options = AllChem.ETKDGv3()
    options.randomSeed, options.maxIterations = SEED, attempts
    if AllChem.EmbedMolecule(mol, options) != 0:
        return None
    more = AllChem.MMFFOptimizeMolecule(mol, maxIters=steps, ignoreInterfragInteractions=False)
    if more != 0 and not (unfinished and more == 1):
        return None
    Chem.AssignStereochemistryFrom3D(mol)  # what the SMILES left open is now decided
    return mol


def principal_frame(pos):
    """Positions (n, 3) about their centre, in the axes of the gyration tensor in order of
    decreasing extent; the third moment along each of the first two is positive, the third axis
    makes the frame right-handed."""
    pos = pos - pos.mean(axis=0)
    _, axes = np.linalg.eigh(pos.T @ pos)  # columns, ascending
    axes = axes[:, ::-1].copy()
    for k in (0, 1):
        if ((pos @ axes[:, k]) ** 3).sum() < 0:
            axes[:, k] *= -1
    axes[:, 2] = np.cross(axes[:, 0], axes[:, 1])
    return pos @ axes


def record(name, mol):
    """The SDF record of a molecule with hydrogens and geometry, or None if it loses something."""
    heavy = Chem.RemoveHs(mol)
    n = heavy.GetNumAtoms()
    if any(atom.GetAtomicNum() == 1 for atom in heavy.GetAtoms()):
        return None
    where = heavy.GetConformer()
    pos = principal_frame(where.GetPositions())
    if any(np.linalg.norm(pos[i] - pos[j]) < 0.9 for i in range(n) for j in range(i)):
        return None
    for i, (x, y, z) in enumerate(np.round(pos, 4) + 0.0):  # + 0.0 turns -0 into 0
        where.SetAtomPosition(i, (x, y, z))
    heavy.SetProp("_Name", name)
    block = Chem.MolToMolBlock(heavy, includeStereo=False)
    lean, full = read_molblock(block), read_molblock(Chem.MolToMolBlock(mol))
    if lean is None or full is None or molecule_features(lean) != molecule_features(full):
        return None
    if not np.array_equal(lean.GetConformer().GetPositions(), np.round(pos, 4)):
        return None
    return (f"{block}>  <logP>\n{Crippen.MolLogP(lean):.4f}\n\n"
            f">  <TPSA>\n{rdMolDescriptors.CalcTPSA(lean):.2f}\n\n$$$$\n")


def write_csv(path):
    """The molecules of an SD file as CSV: SMILES, name, label."""
    print("smiles,name,druglike")
    for mol in Chem.SDMolSupplier(path):
        print(f"{Chem.MolToSmiles(mol)},{mol.GetProp('_Name')},{int(QED.qed(mol) > 0.6)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE.sdf", help="write the CSV of this file instead")
    options = parser.parse_args()
    RDLogger.DisableLog("rdApp.*")
    if options.csv:
        write_csv(options.csv)
        return
    pool = candidates()
    records, dropped = [], 0
    for low, high, quota in QUOTAS:
        group = [(name, mol) for name, mol in pool if low <= mol.GetNumAtoms() <= high]
        prints = [rdMolDescriptors.GetMorganFingerprintAsBitVect(mol, 2, 2048) for _, mol in group]
        small = [k for k, (name, _) in enumerate(group) if not name.startswith("NSC")]
        order = small + [k for k in MaxMinPicker().LazyBitVectorPick(
            prints, len(group), len(group), small, SEED) if k not in small]
        kept = 0
        for k in order:
            if kept == quota:
                break
            mol = conformer(group[k][1])
            text = record(group[k][0], mol) if mol is not None else None
            if text is None:
                dropped += 1
                continue
            records.append(text)
            kept += 1
        print(f"{low}..{high} atoms: {kept} of {len(group)}", file=sys.stderr)
    random.Random(SEED).shuffle(records)
    sys.stdout.write("".join(records))
    print(f"{len(records)} molecules; {dropped} passed over: no geometry or parameters, or the "
          "features change without explicit hydrogens", file=sys.stderr)


if __name__ == "__main__":
    main()
