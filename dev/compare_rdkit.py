#!/usr/bin/env python3
"""Compares data_prep with RDKit + OGB, record by record.

    python3 dev/compare_rdkit.py FILE...  [--limit N] [--smiles COLUMN] [--list FILE]
                                 [--variant smiles|renumber|hydrogens]
    python3 dev/compare_rdkit.py --speed FILE

FILE: .sdf, .mol, .smi, .csv or .tsv, also .gz and .xz of these. The reference is
Chem.MolFromMolBlock(record, sanitize=True, removeHs=True) or Chem.MolFromSmiles, with OGB's lists
(ogb_features.py); RDKit 2022.09 is the version data_prep follows. Two records are identical if both
programs refuse them, or if all of these agree: atoms and their order, nine atom features, bonds as
unordered pairs with three features each, positions as float32. A molecule without atoms counts as
refused. Records with more than --max-atoms atoms are left out.

Every record is handed to data_prep under its number as its name, so none can be mistaken.
--variant compares other records made from the given ones: `smiles` writes each molecule as a random
SMILES, `renumber` shuffles its atoms and turns it in space, `hydrogens` also adds hydrogens with
coordinates (the last two need .sdf or .mol).
--speed times both programs on one file, one thread each: RDKit reading, perceiving and computing
the OGB arrays, against data_prep writing a dataset file.
"""

import argparse
import csv
import gzip
import json
import io
import lzma
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter

import numpy as np
from rdkit import Chem, RDLogger, rdBase

from ogb_features import (ATOM_LISTS, ATOM_NAMES, BOND_LISTS, BOND_NAMES, molecule_features,
                          ogb_graph, read_molblock)

HERE = os.path.dirname(os.path.abspath(__file__))
CHUNK = 20000  # records handed to data_prep at once


def opened(path):
    """A text stream of a plain, .gz or .xz file, line ends untouched, any byte allowed."""
    opener = gzip.open if path.endswith(".gz") else lzma.open if path.endswith(".xz") else open
    return opener(path, "rt", encoding="latin-1", newline="")


def kind_of(path):
    """'sdf', 'mol', 'smi', 'csv' or 'tsv', from the name."""
    stem = path[:-3] if path.endswith((".gz", ".xz")) else path
    kind = os.path.splitext(stem)[1][1:].lower()
    if kind not in ("sdf", "mol", "smi", "csv", "tsv"):
        sys.exit(f"{path}: expected .sdf, .mol, .smi, .csv or .tsv (also .gz, .xz)")
    return kind


def sdf_records(stream):
    """The records of an SD file, each with its closing line if it has one."""
    lines = []
    for line in stream:
        lines.append(line)
        if line.startswith("$$$$"):
            yield "".join(lines)
            lines = []
    if any(line.strip() for line in lines):
        yield "".join(lines)


def records_of(path, smiles_column):
    """The records of a file: mol blocks or SMILES."""
    kind = kind_of(path)
    with opened(path) as stream:
        if kind == "mol":
            yield stream.read()
        elif kind == "sdf":
            yield from sdf_records(stream)
        elif kind == "smi":
            for line in stream:
                fields = line.split(None, 1)
                if fields:  # with its CXSMILES extension, if it has one
                    yield fields[0] + (" " + fields[1].rstrip() if fields[1:] and
                                       fields[1].startswith("|") else "")
        else:
            rows = csv.reader(stream, delimiter="\t" if kind == "tsv" else ",")
            header = next(rows)
            matches = [k for k, name in enumerate(header) if name == smiles_column] or [
                k for k, name in enumerate(header) if name.lower() == smiles_column.lower()]
            if not matches:
                sys.exit(f"{path}: no column {smiles_column}; there are: {', '.join(header)}")
            for row in rows:
                if row:
                    yield row[matches[0]] if matches[0] < len(row) else ""


def write_input(path, kind, records, first):
    """Writes records to a file of the given kind, each under its number as its name."""
    with open(path, "w", encoding="latin-1", newline="") as out:
        if kind in ("csv", "tsv"):
            rows = csv.writer(out, delimiter="\t" if kind == "tsv" else ",")
            rows.writerow(["number", "smiles"])
            rows.writerows([first + k, smiles] for k, smiles in enumerate(records))
        elif kind == "smi":
            out.writelines(f"{smiles} {first + k}\n" for k, smiles in enumerate(records))
        else:
            for k, block in enumerate(records):
                title, newline, rest = block.partition("\n")
                end = "\r" if title.endswith("\r") else ""
                if title.startswith("$$$$"):
                    end, rest = "", title + newline
                out.write(f"{first + k}{end}\n{rest}")


class DataPrep:
    """Runs data_prep on records; keeps what it said."""

    def __init__(self, program, max_atoms, folder):
        self.program, self.max_atoms, self.folder = program, max_atoms, folder
        self.crashes = []

    def run(self, kind, records, first=0):
        """{number: molecule as dumped} of the accepted records; self.said = its messages."""
        source = os.path.join(self.folder, f"input.{kind}")
        target = os.path.join(self.folder, "output.bin")
        if os.path.exists(target):
            os.remove(target)
        write_input(source, kind, records, first)
        command = [self.program, "-o", target, "--max-atoms", str(self.max_atoms),
                   "--stereo", "rdkit", source]
        if kind in ("csv", "tsv"):
            command += ["--smiles", "smiles", "--name", "number"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.said = (done.stdout + done.stderr).decode("utf-8", "replace")
        if done.returncode not in (0, 1):
            self.crashes.append((first, done.returncode))
        if not os.path.exists(target):
            return {}
        found = {}
        dump = subprocess.Popen([self.program, "--dump", target], stdout=subprocess.PIPE)
        for line in dump.stdout:
            molecule = json.loads(line)
            found[int(molecule["name"])] = molecule
        if dump.wait() != 0:
            self.crashes.append((first, dump.returncode))
        return found


def reference(kind, text):
    """(atoms, bonds, positions or None) by RDKit, or None if refused."""
    try:
        mol = read_molblock(text) if kind in ("sdf", "mol") else Chem.MolFromSmiles(text)
    except Exception:  # RDKit throws on some broken input instead of returning None
        mol = None
    if mol is None or mol.GetNumAtoms() == 0:
        return None
    atoms, bonds = molecule_features(mol)
    pos = None
    if mol.GetNumConformers():
        pos = mol.GetConformer().GetPositions().astype(np.float32)
    return atoms, bonds, pos


def value_name(lists, feature, value):
    return str(lists[feature][1][value])


def differences(ref, ours, compare_pos):
    """{class: description} of what differs between RDKit's and our molecule."""
    atoms, bonds, pos = ref
    our_atoms = [tuple(row) for row in ours["atom_feat"]]
    our_bonds = {(min(b[:2]), max(b[:2])): tuple(b[2:]) for b in ours["bonds"]}
    if [a[0] for a in atoms] != [a[0] for a in our_atoms]:
        return {"atoms": f"RDKit {len(atoms)} atoms, ours {len(our_atoms)}"}
    found = {}
    for i, (a, b) in enumerate(zip(atoms, our_atoms)):
        for f in range(len(ATOM_NAMES)):
            if a[f] != b[f]:
                element = Chem.GetPeriodicTable().GetElementSymbol(a[0] + 1) if a[0] < 118 else "*"
                found.setdefault(ATOM_NAMES[f], f"atom {i} ({element}): RDKit "
                                 f"{value_name(ATOM_LISTS, f, a[f])}, ours "
                                 f"{value_name(ATOM_LISTS, f, b[f])}")
    if bonds.keys() != our_bonds.keys() or len(our_bonds) != len(ours["bonds"]):
        extra = sorted(bonds.keys() ^ our_bonds.keys())[:3]
        found["bonds"] = f"bonds in one only: {extra}"
    for pair in bonds.keys() & our_bonds.keys():
        for f in range(len(BOND_NAMES)):
            if bonds[pair][f] != our_bonds[pair][f]:
                found.setdefault(BOND_NAMES[f], f"bond {pair[0]}-{pair[1]}: RDKit "
                                 f"{value_name(BOND_LISTS, f, bonds[pair][f])}, ours "
                                 f"{value_name(BOND_LISTS, f, our_bonds[pair][f])}")
    if compare_pos:
        # A file may hold a flat drawing: whether those are positions is data_prep's choice, so
        # their absence is a difference only if some coordinate leaves the plane.
        # Nor are positions a geometry if two atoms are in one place: then data_prep leaves them out.
        if ours["pos"] is None:
            if pos is not None and np.any(pos[:, 2] != 0) and len(
                    np.unique(np.round(pos, 3), axis=0)) == len(pos):
                found["positions"] = "RDKit has positions, ours has none"
        elif pos is None:
            found["positions"] = "ours has positions, RDKit has none"
        elif not np.array_equal(np.array(ours["pos"], np.float32).reshape(-1, 3), pos):
            worst = np.abs(np.array(ours["pos"], np.float32).reshape(-1, 3) - pos).max()
            found["positions"] = f"largest deviation {worst:g}"
    return found


def variant_of(kind, text, variant, rng):
    """Another record of the same molecule, or None if RDKit cannot read this one."""
    mol = Chem.MolFromSmiles(text) if kind not in ("sdf", "mol") else Chem.MolFromMolBlock(
        text, sanitize=True, removeHs=variant == "smiles")
    if mol is None or mol.GetNumAtoms() == 0:
        return None
    if variant == "smiles":
        return Chem.MolToSmiles(mol, doRandom=True)
    if variant == "hydrogens":
        mol = Chem.AddHs(mol, addCoords=True)
    mol = Chem.RenumberAtoms(mol, rng.permutation(mol.GetNumAtoms()).tolist())
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    turn[:, 0] *= np.sign(np.linalg.det(turn))  # no mirror image
    where = mol.GetConformer()
    for i, xyz in enumerate(where.GetPositions() @ turn):
        where.SetAtomPosition(i, xyz)
    return Chem.MolToMolBlock(mol, includeStereo=False) + "$$$$\n"


def rdkit_says(kind, text):
    """The last line RDKit logs about a record."""
    RDLogger.EnableLog("rdApp.*")
    rdBase.LogToPythonStderr()
    kept, sys.stderr = sys.stderr, io.StringIO()
    reference(kind, text)
    said, sys.stderr = sys.stderr.getvalue(), kept
    RDLogger.DisableLog("rdApp.*")
    lines = [line for line in said.splitlines() if line.strip() and "****" not in line]
    return lines[0][:160] if lines else "(nothing)"


class Tally:
    """Counts over the records of one file."""

    def __init__(self):
        self.total = self.same = self.same_verdict = self.left_out = 0
        self.accepted = 0
        self.classes, self.single, self.example = Counter(), Counter(), {}

    def add(self, kind, number, text, ref, ours, listing):
        self.total += 1
        self.accepted += ref is not None
        self.same_verdict += (ref is None) == (ours is None)
        if ref is None and ours is None:
            self.same += 1
            return
        if ref is None or ours is None:
            found = {"verdict: RDKit accepts, data_prep refuses" if ours is None else
                     "verdict: RDKit refuses, data_prep accepts": ""}
        else:
            found = differences(ref, ours, kind in ("sdf", "mol"))
        if not found:
            self.same += 1
            return
        key = " + ".join(sorted(found))
        self.classes[key] += 1
        self.single.update(found.keys())
        if key not in self.example or len(text) < len(self.example[key][1]):
            self.example[key] = (number, text, "; ".join(v for v in found.values() if v))
        if listing:
            shown = text if kind not in ("sdf", "mol") else text.partition("\n")[0].strip()
            print(number, key, "; ".join(found.values()), shown, sep="\t", file=listing)


def shown_record(kind, text):
    """A record in one line: its title and RDKit's SMILES for a mol block."""
    if kind not in ("sdf", "mol"):
        return text[:200]
    mol = Chem.MolFromMolBlock(text, sanitize=False)
    smiles = Chem.MolToSmiles(mol) if mol else "(unreadable)"
    return f"{text.partition(chr(10))[0].strip()} {smiles}"[:200]


def report(path, kind, tally, prep, rows):
    share = lambda n: 100.0 * n / max(1, tally.total)
    print(f"\n{path}: {tally.total} records compared, {tally.accepted} accepted by RDKit"
          + (f", {tally.left_out} left out (too many atoms)" if tally.left_out else ""))
    print(f"  identical       {tally.same:8d}  {share(tally.same):8.4f} %")
    print(f"  equal verdicts  {tally.same_verdict:8d}  {share(tally.same_verdict):8.4f} %")
    for first, code in prep.crashes:
        print(f"  CRASH: exit code {code} on the records from {first}")
    if tally.classes:
        print("  records by what differs: "
              + ", ".join(f"{name} {n}" for name, n in tally.single.most_common()))
    for key, count in tally.classes.most_common(rows):
        number, text, detail = tally.example[key]
        print(f"  {count:6d}  {key}\n          e.g. record {number}: {shown_record(kind, text)}")
        if detail:
            print(f"          {detail}")
        if key.startswith("verdict"):
            prep.run(kind, [text], number)
            said = " | ".join(prep.said.strip().splitlines()[:3])[:200]
            print(f"          RDKit: {rdkit_says(kind, text)}\n          data_prep: {said}")


def compare(path, options, folder, listing):
    kind = source_kind = kind_of(path)
    if options.variant == "smiles":
        kind = "smi"
    elif options.variant and kind not in ("sdf", "mol"):
        sys.exit(f"{path}: --variant {options.variant} needs .sdf or .mol")
    rng = np.random.default_rng(options.seed)
    rdBase.SeedRandomNumberGenerator(options.seed)
    prep = DataPrep(options.data_prep, options.max_atoms, folder)
    tally, chunk, number = Tally(), [], 0

    def flush():
        ours = prep.run(kind, chunk, number)
        for k, text in enumerate(chunk):
            ref = reference(kind, text)
            if ref is not None and len(ref[0]) > options.max_atoms:
                tally.left_out += 1
            else:
                tally.add(kind, number + k, text, ref, ours.get(number + k), listing)

    for k, text in enumerate(records_of(path, options.smiles)):
        if options.limit and k >= options.limit:
            break
        if options.variant:
            text = variant_of(source_kind, text, options.variant, rng)
        if text is not None:
            chunk.append(text)
        if len(chunk) == CHUNK:
            flush()
            number += len(chunk)
            chunk.clear()
    if chunk:
        flush()
    report(path, kind, tally, prep, options.rows)
    return tally


def speed(path, options, folder):
    """Times RDKit + OGB arrays and data_prep on the same file, alternating, best of three."""
    kind = kind_of(path)
    records = []
    for text in records_of(path, options.smiles):
        if options.limit and len(records) >= options.limit:
            break
        records.append(text)
    source, target = os.path.join(folder, f"speed.{kind}"), os.path.join(folder, "speed.bin")
    write_input(source, kind, records, 0)
    env = dict(os.environ, OMP_NUM_THREADS="1")
    command = [options.data_prep, "-o", target, "--max-atoms", str(options.max_atoms),
               "--stereo", "rdkit", source]
    if kind in ("csv", "tsv"):
        command += ["--smiles", "smiles", "--name", "number"]
    ours, theirs = [], []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       check=True)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        if kind == "sdf":
            mols = Chem.SDMolSupplier(source)
        elif kind == "mol":
            mols = [Chem.MolFromMolFile(source)]
        else:
            mols = (Chem.MolFromSmiles(text) for text in records)
        for mol in mols:
            if mol is None:
                continue
            ogb_graph(mol)
            if mol.GetNumConformers():
                mol.GetConformer().GetPositions()
        theirs.append(time.perf_counter() - start)
    n, a, b = len(records), min(ours), min(theirs)
    print(f"{path}: {n} records, one thread each, best of three\n"
          f"  RDKit + OGB  {b:8.2f} s  {n / b:10.0f} records/s\n"
          f"  data_prep    {a:8.2f} s  {n / a:10.0f} records/s\n"
          f"  ratio        {b / a:8.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--data-prep", default=os.path.join(HERE, "..", "data_prep"),
                        help="the program (default: beside dev/)")
    parser.add_argument("--smiles", default="smiles", help="SMILES column (default: smiles)")
    parser.add_argument("--limit", type=int, default=0, help="first N records of each file only")
    parser.add_argument("--max-atoms", type=int, default=512)
    parser.add_argument("--rows", type=int, default=20, help="classes of differences to show")
    parser.add_argument("--variant", choices=("smiles", "renumber", "hydrogens"))
    parser.add_argument("--seed", type=int, default=1, help="of --variant")
    parser.add_argument("--list", metavar="FILE", help="write every differing record to FILE")
    parser.add_argument("--speed", action="store_true", help="time both programs instead")
    options = parser.parse_args()
    options.data_prep = os.path.abspath(options.data_prep)
    RDLogger.DisableLog("rdApp.*")
    listing = open(options.list, "w") if options.list else None
    worst = 1.0
    with tempfile.TemporaryDirectory() as folder:
        for path in options.files:
            if options.speed:
                speed(path, options, folder)
            else:
                tally = compare(path, options, folder, listing)
                worst = min(worst, tally.same / max(1, tally.total))
    if not options.speed and len(options.files) > 1:
        print(f"\nlowest share of identical records: {100 * worst:.4f} %")


if __name__ == "__main__":
    main()
