#!/usr/bin/env python3
"""Checks the tables of expected features in test.c against RDKit with OGB's lists.

    /usr/bin/python3 dev/check_tables.py

Prints every row of PREP_SMILES, PREP_MOLS and PREP_V3000 whose expected description is not RDKit's, as the
line to put there; exits 1 if there is one. How a molecule is described says prep_describe() in
test.c. RDKit 2022.09 is the version the tables hold.
"""

import os
import re
import sys

from rdkit import Chem, RDLogger

from ogb_features import atom_features, bond_features

TEST_C = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "test.c")
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


def describe(mol):
    """The description of a molecule as test.c writes it; "refused" for None."""
    if mol is None:
        return "refused"
    words = []
    for a in mol.GetAtoms():
        symbol = a.GetSymbol() if a.GetAtomicNum() else "*"
        words.append(symbol + "".join("%x" % v for v in atom_features(a)[1:]))
    for b in mol.GetBonds():
        digits = "".join("%x" % v for v in bond_features(b))
        words.append("%d-%d:%s" % (b.GetBeginAtomIdx(), b.GetEndAtomIdx(), digits))
    return " ".join(words)


def mol_block(is_3d, atoms, bonds, properties):
    """The V2000 mol block of a row of PREP_MOLS."""
    atoms, bonds = atoms.split(), bonds.split()
    lines = ["name", "  test              " + ("3D" if is_3d else "2D"), "",
             "%3d%3d  0  0  0  0  0  0  0  0999 V2000" % (len(atoms), len(bonds))]
    for atom in atoms:
        f = atom.split(",") + ["0"] * 3
        x, y, z = (float(v) for v in f[1:4])
        mass, charge, valence = (int(v) for v in f[4:7])
        lines.append("%10.4f%10.4f%10.4f %-3s%2d%3d  0  0  0%3d" %
                     (x, y, z, f[0], mass, charge, valence))
    for bond in bonds:
        i, j, kind, stereo = (int(v) for v in re.findall(r"\d+", bond + "/0")[:4])
        lines.append("%3d%3d%3d%3d" % (i, j, kind, stereo))
    lines += [p for p in properties.split("|") if p] + ["M  END", ""]
    return "\n".join(lines)


def v3000_block(text):
    """The V3000 mol block of a row of PREP_V3000."""
    lines = ("COUNTS " + text).split("|") + ["END CTAB"]
    return ("\n  test              2D\n\n  0  0  0     0  0            999 V3000\n"
            "M  V30 BEGIN CTAB\nM  V30 %s\nM  END\n" % "\nM  V30 ".join(lines))


def rows(source, table):
    """The strings of every row of a table of test.c; adjacent literals are joined."""
    text = source[source.index("} %s[] = {" % table):]
    text = text[text.index("\n"):text.index("\n};")]
    text = re.sub(r'"\s*\n\s*"', "", text)
    for row in re.findall(r"\{(.*?)\},?(?=\s*(?:\{|$))", text, re.S):
        strings = [bytes(s, "ascii").decode("unicode_escape") for s in STRING.findall(row)]
        number = re.search(r'",\s*(\d),', row)
        yield strings, int(number.group(1)) if number else 0


def main():
    RDLogger.DisableLog("rdApp.*")
    source, checked, wrong = open(TEST_C).read(), 0, 0
    cases = [(s[0], s[-1], Chem.MolFromSmiles(s[1])) for s, _ in rows(source, "PREP_SMILES")]
    cases += [(s[0], s[-1], Chem.MolFromMolBlock(mol_block(is_3d, *s[1:4])))
              for s, is_3d in rows(source, "PREP_MOLS")]
    cases += [(s[0], s[-1], Chem.MolFromMolBlock(v3000_block(s[1])))
              for s, _ in rows(source, "PREP_V3000")]
    for rule, expected, mol in cases:
        checked += 1
        if describe(mol) != expected:
            wrong += 1
            print('%s: "%s"' % (rule, describe(mol)))
    print("%d rows checked, %d wrong" % (checked, wrong))
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
