#!/usr/bin/env python3
"""Writes the standard QM9 as SD files: 130,831 molecules, B3LYP geometries, twelve targets.

    pip download --no-deps qm9pack==1.0.3
    python3 dev/make_qm9.py --package qm9pack-1.0.3-py3-none-any.whl --out DIR   (RDKit; 2 minutes)

The source is the package qm9pack (MIT) of one of the authors of QM9 (Ramakrishnan et al. 2014):
SMILES, positions and properties. Written are DIR/qm9.train.sdf, qm9.valid.sdf and qm9.test.sdf:
110,000, 10,000 and the rest, by a shuffle with the seed --seed (1). Which package file: the wheel,
or the folder of the installed package.

Every record is verified. Its heavy atoms stand in the order of the SMILES: elements must agree, and
the distance of two heavy atoms, divided by the sum of their covalent radii, must be below 1.3 where
the SMILES has a bond and above 1.15 where it has none (strained rings come near both); where that
does not fit, a match of the graph of all pairs below 1.2 is searched for. Each hydrogen belongs to
the nearest heavy atom, and every heavy atom must have as many as the SMILES says. What fails is
left out and listed, with the reason.

Labels are SD tags, in the units of the literature: mu (Debye), alpha (Bohr^3), homo, lumo, gap
(eV), r2 (Bohr^2), zpve (eV), u0, u298, h298, g298 (eV, less those of the free atoms at the same
level, from QM9's own table), cv (cal / mol K, as it is).
"""

import argparse
import csv
import io
import json
import os
import random
import sys
import zipfile

import numpy as np
from rdkit import Chem, RDLogger

EV = 27.211386  # of a Hartree
COUNTS = (("train", 110000), ("valid", 10000), ("test", None))
RADII = {"H": 0.31, "C": 0.76, "N": 0.71, "O": 0.66, "F": 0.57}  # Cordero et al. 2008, Angstrom
LONGEST, SHORTEST, BETWEEN = 1.3, 1.15, 1.2  # bond, no bond, either; times the sum of the radii
# Free atoms, Hartree, from QM9's atomref.txt: U0, U, H, G at 298.15 K.
ATOMS = {"H": (-0.500273, -0.498857, -0.497912, -0.510927),
         "C": (-37.846772, -37.845355, -37.844411, -37.861317),
         "N": (-54.583861, -54.582445, -54.581501, -54.598897),
         "O": (-75.064579, -75.063163, -75.062219, -75.079532),
         "F": (-99.718730, -99.717314, -99.716370, -99.733544)}
# label: column of the package, factor
PLAIN = {"mu": ("Dipole_debye", 1), "alpha": ("Polarizability_bohr3", 1), "homo": ("HOMO_au", EV),
         "lumo": ("LUMO_au", EV), "gap": ("HOMO_LUMO_gap_au", EV), "r2": ("R2_bohr2", 1),
         "zpve": ("ZPVE_au", EV), "cv": ("Heatcapacity_Cv_cal_mol_K", 1)}
ENERGIES = {"u0": "InternalEnergy_0K_au", "u298": "InternalEnergy_298K_au",
            "h298": "Enthalphy_298K_au", "g298": "GibbsFreeEnergy_298K_au"}


def rows(package):
    """The rows of the three tables of the package, in the order of QM9."""
    for part in ("qm9_part1.csv", "qm9_part2.csv", "qm9_part3.csv"):
        if os.path.isdir(package):
            with open(os.path.join(package, "data", part), newline="") as table:
                yield from csv.DictReader(table)
        else:
            with zipfile.ZipFile(package) as wheel, wheel.open(f"qm9pack/data/{part}") as table:
                yield from csv.DictReader(io.TextIOWrapper(table, newline=""))


def matched(mol, elements, pos):
    """Which heavy atom of the file each atom of the SMILES is, or None."""
    radius = np.array([RADII[element] for element in elements])
    ratio = np.linalg.norm(pos[:, None] - pos[None], axis=-1) / (radius[:, None] + radius[None])
    np.fill_diagonal(ratio, np.inf)
    if [atom.GetSymbol() for atom in mol.GetAtoms()] == elements:
        bonded = Chem.GetAdjacencyMatrix(mol).astype(bool)
        if (ratio[bonded] < LONGEST).all() and (ratio[~bonded] > SHORTEST).all():
            return list(range(len(elements)))
    near = ratio < BETWEEN
    plain, query = Chem.RWMol(), Chem.RWMol()  # both graphs with single bonds only
    for element in elements:
        plain.AddAtom(Chem.Atom(element))
    for i, j in zip(*np.nonzero(np.triu(near))):
        plain.AddBond(int(i), int(j), Chem.BondType.SINGLE)
    for atom in mol.GetAtoms():
        query.AddAtom(Chem.Atom(atom.GetSymbol()))
    for bond in mol.GetBonds():
        query.AddBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), Chem.BondType.SINGLE)
    if plain.GetNumAtoms() != query.GetNumAtoms() or plain.GetNumBonds() != query.GetNumBonds():
        return None
    return list(plain.GetSubstructMatch(query)) or None


def record(row):
    """(SD record, None) or (None, why not)."""
    mol = Chem.MolFromSmiles(row["SMILES"])
    if mol is None:
        return None, "SMILES not read"
    elements = [element.strip(" '") for element in row["Elements"].strip("[]").split(",")]
    pos = np.array(json.loads(row["XYZ_Ang"].replace(".,", ".0,").replace(".]", ".0]")))
    heavy = [i for i, element in enumerate(elements) if element != "H"]
    where = matched(mol, [elements[i] for i in heavy], pos[heavy])
    if where is None:
        return None, "the distances make another graph than the SMILES"
    hydrogens = [i for i, element in enumerate(elements) if element == "H"]
    owner = {i: int(np.argmin(np.linalg.norm(pos[heavy] - pos[i], axis=-1))) for i in hydrogens}
    for atom in mol.GetAtoms():
        if atom.GetTotalNumHs() != sum(k == where[atom.GetIdx()] for k in owner.values()):
            return None, "another number of hydrogens at an atom than in the SMILES"
    Chem.Kekulize(mol)
    place = {heavy[k]: atom for atom, k in enumerate(where)}  # file's atom -> atom of the SMILES
    order = [heavy[k] for k in where] + hydrogens
    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), int(bond.GetBondTypeAsDouble()))
             for bond in mol.GetBonds()]
    bonds += [(place[heavy[owner[i]]], len(heavy) + k, 1) for k, i in enumerate(hydrogens)]
    charges = [(atom.GetIdx() + 1, atom.GetFormalCharge()) for atom in mol.GetAtoms()
               if atom.GetFormalCharge()]
    lines = [row["XYZ_file"].removesuffix(".xyz"), "     qm9            3D", "",
             f"{len(order):3d}{len(bonds):3d}  0  0  0  0  0  0  0  0999 V2000"]
    lines += ["%10.4f%10.4f%10.4f %-3s 0  0  0  0  0  0  0  0  0  0  0  0"
              % (*(pos[i] + 0.0), elements[i]) for i in order]
    lines += [f"{a + 1:3d}{b + 1:3d}{kind:3d}  0" for a, b, kind in bonds]
    if charges:
        lines.append(f"M  CHG{len(charges):3d}" + "".join(f"{a:4d}{c:4d}" for a, c in charges))
    lines.append("M  END")
    labels = {name: float(row[column]) * unit for name, (column, unit) in PLAIN.items()}
    for k, (name, column) in enumerate(ENERGIES.items()):
        free = sum(ATOMS[element][k] for element in elements)
        labels[name] = (float(row[column]) - free) * EV
    for name, value in labels.items():
        lines += [f">  <{name}>", f"{value:.6f}", ""]
    return "\n".join(lines) + "\n$$$$\n", None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", required=True, help="the wheel, or the package's folder")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    RDLogger.DisableLog("rdApp.*")
    os.makedirs(options.out, exist_ok=True)
    records, refused = [], []
    for row in rows(options.package):
        text, why = record(row)
        if text is None:
            refused.append((row["XYZ_file"], row["SMILES"], why))
        else:
            records.append(text)
    random.Random(options.seed).shuffle(records)
    first = 0
    for part, count in COUNTS:
        here = records[first:None if count is None else first + count]
        first += len(here)
        with open(os.path.join(options.out, f"qm9.{part}.sdf"), "w") as out:
            out.writelines(here)
        print(f"{part}: {len(here)} molecules")
    with open(os.path.join(options.out, "qm9.refused.csv"), "w", newline="") as out:
        csv.writer(out).writerows(refused)
    print(f"{len(refused)} left out, see qm9.refused.csv")


if __name__ == "__main__":
    main()
