"""The nine atom and three bond features of OGB (Hu et al. 2020, ogb.utils.features), computed with
RDKit: what data_prep must reproduce. Written from the published lists of values; each feature is
the index into its list, and a value outside the list counts as the last entry ("misc")."""

import numpy as np
from rdkit import Chem

ATOM_LISTS = [
    ("atomic number", list(range(1, 119)) + ["misc"]),
    ("chiral tag", ["CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW", "CHI_OTHER",
                    "misc"]),
    ("total degree", list(range(0, 11)) + ["misc"]),
    ("formal charge", list(range(-5, 6)) + ["misc"]),
    ("total hydrogens", list(range(0, 9)) + ["misc"]),
    ("radical electrons", list(range(0, 5)) + ["misc"]),
    ("hybridization", ["SP", "SP2", "SP3", "SP3D", "SP3D2", "misc"]),
    ("aromatic", [False, True]),
    ("in a ring", [False, True]),
]
BOND_LISTS = [
    ("bond type", ["SINGLE", "DOUBLE", "TRIPLE", "AROMATIC", "misc"]),
    ("bond stereo", ["STEREONONE", "STEREOZ", "STEREOE", "STEREOCIS", "STEREOTRANS", "STEREOANY"]),
    ("conjugated", [False, True]),
]
ATOM_NAMES = [name for name, _ in ATOM_LISTS]
BOND_NAMES = [name for name, _ in BOND_LISTS]
ATOM_INDEX = [{value: k for k, value in enumerate(values)} for _, values in ATOM_LISTS]
BOND_INDEX = [{value: k for k, value in enumerate(values)} for _, values in BOND_LISTS]


def _indices(values, tables):
    return tuple(table.get(value, len(table) - 1) for value, table in zip(values, tables))


def atom_features(atom):
    """The nine features of an RDKit atom."""
    return _indices((atom.GetAtomicNum(), str(atom.GetChiralTag()), atom.GetTotalDegree(),
                     atom.GetFormalCharge(), atom.GetTotalNumHs(), atom.GetNumRadicalElectrons(),
                     str(atom.GetHybridization()), atom.GetIsAromatic(), atom.IsInRing()),
                    ATOM_INDEX)


def bond_features(bond):
    """The three features of an RDKit bond."""
    return _indices((str(bond.GetBondType()), str(bond.GetStereo()), bond.GetIsConjugated()),
                    BOND_INDEX)


def molecule_features(mol):
    """(atoms, bonds): a list of nine-tuples in atom order, and {(i, j): features} with i < j."""
    atoms = [atom_features(atom) for atom in mol.GetAtoms()]
    bonds = {}
    for bond in mol.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        bonds[min(i, j), max(i, j)] = bond_features(bond)
    return atoms, bonds


def ogb_graph(mol):
    """The arrays that ogb.utils.mol.smiles2graph makes of a molecule, at its cost: every value is
    searched in its list, every bond is stored in both directions. For timing."""
    def search(values, lists):
        found = []
        for value, (_, allowed) in zip(values, lists):
            try:
                found.append(allowed.index(value))
            except ValueError:
                found.append(len(allowed) - 1)
        return found

    atoms = []
    for atom in mol.GetAtoms():
        atoms.append(search([atom.GetAtomicNum(), str(atom.GetChiralTag()), atom.GetTotalDegree(),
                             atom.GetFormalCharge(), atom.GetTotalNumHs(),
                             atom.GetNumRadicalElectrons(), str(atom.GetHybridization()),
                             atom.GetIsAromatic(), atom.IsInRing()], ATOM_LISTS))
    edges, attributes = [], []
    for bond in mol.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        row = search([str(bond.GetBondType()), str(bond.GetStereo()), bond.GetIsConjugated()],
                     BOND_LISTS)
        edges += [(i, j), (j, i)]
        attributes += [row, row]
    return (np.array(atoms, dtype=np.int64), np.array(edges, dtype=np.int64).T,
            np.array(attributes, dtype=np.int64))


def read_molblock(block):
    """What RDKit makes of an SDF record (None: refused), as Chem.SDMolSupplier reads it."""
    return Chem.MolFromMolBlock(block, sanitize=True, removeHs=True)
