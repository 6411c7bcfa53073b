#!/usr/bin/env python3
"""Feeds damaged files to the programs and reports every crash, hang and sanitizer report.

    make asan; python3 dev/fuzz.py --data-prep PROGRAM --moleblend PROGRAM [--rounds 2000]
    python3 dev/fuzz.py --data-prep PROGRAM --only smi,sdf --seconds 600 INPUT...
    python3 dev/fuzz.py --data-prep PROGRAM --as-is FOLDER-OR-FILE...

Give it programs built with -fsanitize=address,undefined. Inputs are mutated copies of the bundled
sample, of a list of SMILES, and of files the programs themselves write (INPUT...: more of them).
Where a format has checksums, they are mostly mended after the damage, so that it reaches the code
behind them. What must happen: exit code 0, or 1 with a message, within --timeout seconds, and no
unfinished output left behind. Every input that shows otherwise is kept in --keep, with the command
that shows it. --as-is runs data_prep on given files as they are (a collection of odd ones).
"""

import argparse
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter

HERE = os.path.dirname(os.path.abspath(__file__))
SAMPLE = os.path.join(HERE, "..", "data", "sample.sdf")
SMILES = """CCO
c1ccccc1C(=O)[O-].[Na+]
C/C=C/C#N
F/C(Cl)=C(\\Br)I
N[C@@H](C)C(=O)O
C[C@H]1CC[C@@H](O)CC1
[13CH3][C@@](F)(Cl)Br
C%12CCCCC%12
C1CC1C%(123)CC%(123)
[nH]1cccc1
O=c1[nH]c(=O)c2[nH]cnc2[nH]1
[Cu+2].[O-]S(=O)(=O)[O-]
CC(C)(C)[Si](C)(C)O
[H][H]
[2H]C([2H])([2H])O
C:1:C:C:C:C:C1
[Fe@OH12](Cl)(Br)(F)(I)(N)O
*c1ccc(*)cc1
N->[Pt](Cl)(Cl)<-N
CC(=O)N |$;;;_AP1$|
O=[N+]([O-])c1ccccc1
c1ccc2c(c1)c1ccccc1[se]2
C1=CC=CC=CC=C1
[C@]12(CCCCC1)CCCCC2
S1SSSSSSS1
"""
V3000 = """ethanol
  test            3D

  0  0  0     0  0            999 V3000
M  V30 BEGIN CTAB
M  V30 COUNTS 3 2 0 0 1
M  V30 BEGIN ATOM
M  V30 1 C 0.0 0.0 0.0 0
M  V30 2 C 1.5 0.0 0.1 0 CFG=1
M  V30 3 O 2.0 1.4 -
M  V30 0.0 0 CHG=-1 MASS=18
M  V30 END ATOM
M  V30 BEGIN BOND
M  V30 1 1 1 2
M  V30 2 1 2 3 CFG=1
M  V30 END BOND
M  V30 END CTAB
M  END
>  <logP>
0.1

$$$$
"""
INTERESTING = [0, 1, -1, 2, 7, 127, 128, 255, 256, 999, 1000, 32767, 65535, 65536, 2 ** 31 - 1,
               -2 ** 31, 2 ** 32 - 1, 2 ** 32, 2 ** 63 - 1, 2 ** 64 - 1]


# ==================================================================================================
# Mutations: bytes in, bytes out
# ==================================================================================================

def mutate_bytes(rng, data, others):
    """One to a few blind changes of a byte string."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(8)
        if what == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif what == 1 and data:
            data[at % len(data)] = rng.randrange(256)
        elif what == 2:
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice(INTERESTING) & (256 ** size - 1)
            data[at:at + size] = value.to_bytes(size, "little")
        elif what == 3:
            del data[at:]
        elif what == 4:
            del data[at:at + rng.choice((1, 2, 4, 16, 100))]
        elif what == 5:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 4, 16))))
        elif what == 6 and data:
            begin = rng.randrange(len(data))
            data[at:at] = data[begin:begin + rng.choice((1, 8, 60, 500))]
        elif others:
            other = rng.choice(others)
            begin = rng.randrange(len(other) + 1)
            data[at:] = other[begin:]
    return bytes(data)


def mutate_text(rng, data, others):
    """Changes that know lines, numbers and the alphabet of the file."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, others)
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        k = rng.randrange(len(lines))
        line, what = lines[k], rng.randrange(9)
        if what == 0:
            del lines[k:k + rng.choice((1, 1, 3))]
            lines = lines or [b""]
        elif what == 1:
            lines[k:k] = [line] * rng.choice((1, 2, 50))
        elif what == 2:
            numbers = list(re.finditer(rb"-?\d+(\.\d+)?", line))
            if numbers:
                n = rng.choice(numbers)
                value = rng.choice([str(rng.choice(INTERESTING)), "nan", "inf", "1e308", "-0",
                                    "1e-320", "x", "", "9" * 400]).encode()
                if rng.random() < 0.5:  # keep the columns
                    value = value[:n.end() - n.start()].rjust(n.end() - n.start())
                lines[k] = line[:n.start()] + value + line[n.end():]
        elif what == 3 and line:
            at = rng.randrange(len(line))
            lines[k] = line[:at] + bytes([rng.choice(data)]) + line[at + rng.randrange(2):]
        elif what == 4 and line:
            begin, end = sorted((rng.randrange(len(line) + 1), rng.randrange(len(line) + 1)))
            lines[k] = line[:begin] + line[begin:end] * rng.choice((0, 2, 40, 3000)) + line[end:]
        elif what == 5:
            j = rng.randrange(len(lines))
            lines[k], lines[j] = lines[j], lines[k]
        elif what == 6:
            lines[k] = line + rng.choice((b"\r", b"\t", b" ", b'"', b"\0", b"\xff\xfe", b"," * 9))
        elif what == 7:
            lines = lines[:k + 1]
        elif others:
            other = rng.choice(others).split(b"\n")
            j = rng.randrange(len(other))
            lines[k:k] = other[j:j + rng.choice((1, 5, 40))]
    end = b"\r\n" if rng.random() < 0.1 else b"\n"
    return end.join(lines)


def mend_dataset(data):
    """Recomputes the checksums and the sizes of a dataset file as far as its structure allows."""
    data = bytearray(data)
    try:
        tasks, count, index = struct.unpack_from("<IQQ", data, 12)
        struct.pack_into("<Q", data, 32, len(data))
        entries = struct.unpack_from(f"<{count}Q", data, index) if count < 10 ** 6 else ()
        starts = [entry >> 16 for entry in entries] + [index]
        for begin, end in zip(starts, starts[1:]):
            if begin + 4 <= end <= len(data):
                struct.pack_into("<I", data, begin, zlib.crc32(data[begin + 4:end]))
        struct.pack_into("<I", data, index + 8 * count, zlib.crc32(data[index:index + 8 * count]))
        names_end = 64
        for _ in range(min(tasks, 70000)):
            names_end += 2 + struct.unpack_from("<H", data, names_end)[0]
        data[60:64] = bytes(4)
        struct.pack_into("<I", data, 60, zlib.crc32(data[:names_end]))
    except (struct.error, IndexError, OverflowError, MemoryError):
        pass
    return bytes(data)


def mutate_dataset(rng, data, others):
    """Damages a dataset file anywhere, often in a header field or a record's counts."""
    data = bytearray(data)
    if rng.random() < 0.5 and len(data) > 80:
        index = struct.unpack_from("<Q", data, 24)[0]
        where = rng.choice([8, 12, 16, 24, 32, 40, 44, 48, index] +
                           [(struct.unpack_from("<Q", data, index)[0] >> 16) + k
                            for k in (4, 6, 8, 10, 12, 30)] + [rng.randrange(len(data) - 8)])
        size = rng.choice((1, 2, 4, 8))
        value = rng.choice(INTERESTING + [rng.randrange(256)]) & (256 ** size - 1)
        if where + size <= len(data):
            data[where:where + size] = value.to_bytes(size, "little")
    else:
        data = mutate_bytes(rng, data, others)
    return mend_dataset(data) if rng.random() < 0.7 else bytes(data)


def mutate_safetensors(rng, data, others):
    """Damages the header's meaning (names, shapes, types, offsets), its text, or any byte."""
    if rng.random() < 0.4 or len(data) < 16:
        return mutate_bytes(rng, data[:rng.choice((200, 4000, len(data)))], others)
    size = struct.unpack_from("<Q", data)[0]
    header, body = data[8:8 + size], data[8 + size:]
    try:
        if rng.random() < 0.3:
            raise ValueError
        table = json.loads(header)
        table.get("__metadata__", {}).pop("moleblend.crc32", None)  # or nothing else is looked at
        name = rng.choice(list(table))
        what = rng.randrange(7)
        if name == "__metadata__" or what == 0:
            key = rng.choice(list(table.get("__metadata__", {"": ""})))
            table.setdefault("__metadata__", {})[key] = rng.choice(
                ["", "x" * 5000, "-1", "0", "1e9", "9" * 11, "nan", "768", "\u00e9\U0001f600"])
        elif what == 1:
            del table[name]
        elif what == 2:
            table[name]["shape"] = rng.choice([[], [0], [-1], [2 ** 40, 2 ** 40], [1] * 100, [1.5],
                                               ["3"], [65536, 65536], table[name]["shape"] + [1]])
        elif what == 3:
            table[name]["dtype"] = rng.choice(["F16", "F64", "BF16", "I64", "", "F32 ", 3, None])
        elif what == 4:
            table[name]["data_offsets"] = rng.choice(
                [[0, 0], [4, 0], [0, 2 ** 63], [-8, 8], [len(body), len(body) + 4], [0], [1, 2, 3],
                 [2 ** 64, 2 ** 64 + 4], table[rng.choice(list(table))].get("data_offsets", [])])
        elif what == 5:
            table[rng.choice([name + "x", name[:-1], "x" * 70000, ""])] = table.pop(name)
        else:
            table[name] = rng.choice([{}, [], None, 1, {"shape": {}}, [[[[]]]] * 50])
        header = json.dumps(table).encode()
        if rng.random() < 0.02:
            header = b"[" * 100000
    except (ValueError, KeyError, TypeError, AttributeError):
        header = mutate_text(rng, header, [])
    size = len(header) if rng.random() < 0.8 else rng.choice(INTERESTING) & (2 ** 64 - 1)
    return struct.pack("<Q", size) + header + body


# ==================================================================================================
# Seeds and commands
# ==================================================================================================

def write(path, data):
    with open(path, "wb") as f:
        f.write(data)


def read(path):
    with open(path, "rb") as f:
        return f.read()


class Target:
    """A kind of input: its seeds, how to damage one, and the commands that read it. In a command,
    {in} is the damaged file and {dir} a scratch folder."""

    def __init__(self, suffix, mutate, seeds, commands):
        self.suffix, self.mutate, self.seeds, self.commands = suffix, mutate, seeds, commands


def make_targets(options, folder):
    blocks = read(SAMPLE).split(b"$$$$\n")[:60]
    sdf = [b"$$$$\n".join(blocks[k:k + 3]) + b"$$$$\n" for k in range(0, 60, 3)] + [V3000.encode()]
    labels = [f"{smiles},{k},{'' if k % 3 else 0.5}"
              for k, smiles in enumerate(SMILES.split("\n")[:-1]) if "," not in smiles]
    table = "smiles,first,second\n" + "\n".join(labels) + '\n"C""C",1,2\n"CC\nO",3,4\n'
    prep, blend = options.data_prep, options.moleblend
    targets = {}
    if prep:
        out = [prep, "-o", "{dir}/out.bin"]
        targets["sdf"] = Target("sdf", mutate_text, sdf, [
            out + ["{in}"], out + ["--labels", "all", "--orient", "principal", "{in}"],
            out + ["--keep-hydrogens", "--max-atoms", "5", "{in}"]])
        mol = [block.split(b"M  END")[0] + b"M  END\n" for block in sdf]
        targets["mol"] = Target("mol", mutate_text, mol, [out + ["{in}"]])
        targets["smi"] = Target("smi", mutate_text, [line.encode() + b" x\n" for line in
                                                     SMILES.split("\n")[:-1]] + [SMILES.encode()],
                                [out + ["{in}"]])
        split = [prep, "-o", "{dir}/out.{}.bin", "--split", "0.8,0.1,0.1"]
        targets["csv"] = Target("csv", mutate_text, [table.encode()], [
            out + ["--smiles", "smiles", "--labels", "first,second", "{in}"],
            out + ["--labels", "all", "{in}"], split + ["--split-by", "scaffold", "{in}"]])
        small = os.path.join(folder, "seed.sdf")
        data = os.path.join(folder, "seed.bin")
        write(small, b"$$$$\n".join(blocks[:20]) + b"$$$$\n")
        subprocess.run([prep, "-o", data, "--labels", "all", small], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        commands = [[prep, "--dump", "{in}"], [prep, "--dump", "{in}", "--range", "3:9"]]
        if blend:
            commands += [[blend, "info", "{in}"], [blend, "show", "{in}", "0"],
                         [blend, "{in}", "--size", "tiny", "--steps", "2", "--batch-size", "8",
                          "-o", "{dir}/out.safetensors"]]
        targets["bin"] = Target("bin", mutate_dataset, [read(data)], commands)
    if prep and blend:
        model = os.path.join(folder, "seed.safetensors")
        tuned = os.path.join(folder, "tuned.safetensors")
        pretrain = [blend, data, "--size", "tiny", "--steps", "2", "--batch-size", "8", "-o"]
        finetune = [blend, "finetune", data, "--valid", data, "--epochs", "1", "--task",
                    "regression", "--init"]
        seeds = []
        for command, path in ((pretrain + [model], model),
                              (finetune + [model, "-o", tuned], tuned)):
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            if done.returncode == 0:
                seeds.append(read(path))
            else:
                print(f"no seed: {' '.join(command)}\n    {done.stderr.decode().strip()[-200:]}")
        targets["model"] = Target("safetensors", mutate_safetensors, seeds, [
            [blend, "info", "{in}"], [blend, "predict", data, "--model", "{in}"],
            [blend, "embed", data, "--model", "{in}", "-o", "{dir}/out.npy"],
            pretrain + ["{dir}/out.safetensors", "--init", "{in}"],
            finetune + ["{in}", "-o", "{dir}/out.safetensors"]])
    if options.only:
        targets = {name: targets[name] for name in options.only.split(",")}
    return targets


# ==================================================================================================
# Running
# ==================================================================================================

def verdict(code, said, folder):
    """What is wrong with the outcome of a run, or None."""
    if "ERROR: " in said and "Sanitizer" in said or "runtime error:" in said:
        found = re.search(r"(ERROR: \w+Sanitizer: \S+|runtime error: [^\n]{0,80})", said)
        where = re.search(r"#\d+ 0x\w+ in (\S+) [^\n]*?([\w.]+:\d+)", said)
        return (found.group(1) if found else "sanitizer report") + (
            f" in {where.group(1)} {where.group(2)}" if where else "")
    if code not in (0, 1):
        return f"exit code {code}"
    if code == 1 and not said.strip():
        return "exit code 1 without a message"
    if any(name.endswith(".tmp") for name in os.listdir(folder)):
        return "unfinished output left behind"
    return None


def run(command, timeout, folder):
    env = dict(os.environ, OMP_NUM_THREADS="1",
               ASAN_OPTIONS="exitcode=99:allocator_may_return_null=1:max_allocation_size_mb=2000:"
                            "detect_leaks=0",  # a program that ends with an error frees nothing
               UBSAN_OPTIONS="halt_on_error=1:exitcode=98:print_stacktrace=1")
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=timeout, env=env)
    except subprocess.TimeoutExpired:
        return f"no end after {timeout} s", -1
    return verdict(done.returncode, done.stderr.decode("latin-1"), folder), done.returncode


def as_is(options, folder):
    """Runs data_prep on every molecule file below the inputs; returns the number of failures."""
    paths = []
    for path in options.inputs:
        if os.path.isdir(path):
            paths += sorted(os.path.join(at, name) for at, _, names in os.walk(path)
                            for name in names)
        else:
            paths.append(path)
    kinds = (".sdf", ".mol", ".smi", ".csv", ".tsv")
    paths = [path for path in paths if path.lower().endswith(kinds)]
    accepted, failures, slowest = 0, 0, (0.0, "")
    for path in paths:
        start = time.time()
        wrong, code = run([options.data_prep, "-o", os.path.join(folder, "out.bin"), path],
                          options.timeout, folder)
        slowest = max(slowest, (time.time() - start, path))
        accepted += code == 0
        failures += wrong is not None
        if wrong:
            print(f"{wrong}: {path}", flush=True)
    print(f"{len(paths)} files, {accepted} gave molecules, {failures} failures; "
          f"slowest {slowest[0]:.1f} s: {slowest[1]}")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="INPUT",
                        help="more seeds (.sdf .mol .smi .csv)")
    parser.add_argument("--data-prep", help="the program, built with sanitizers")
    parser.add_argument("--moleblend", help="the program, built with sanitizers")
    parser.add_argument("--as-is", action="store_true", help="run the inputs unchanged")
    parser.add_argument("--only", help="kinds of input: sdf,mol,smi,csv,bin,model")
    parser.add_argument("--rounds", type=int, default=1000, help="runs, in all")
    parser.add_argument("--seconds", type=float, default=0, help="stop after that long instead")
    parser.add_argument("--timeout", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", default="fuzz.found", help="folder for what fails")
    options = parser.parse_args()
    if not options.data_prep:
        parser.error("--data-prep is needed (it also writes the first dataset)")
    options.data_prep = os.path.abspath(options.data_prep)
    options.moleblend = options.moleblend and os.path.abspath(options.moleblend)
    rng = random.Random(options.seed)
    failures, runs, refused = Counter(), Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        if options.as_is:
            sys.exit(1 if as_is(options, folder) else 0)
        targets = make_targets(options, folder)
        for path in options.inputs:
            kind = path.rsplit(".", 1)[-1].lower()
            if kind in targets:
                targets[kind].seeds.append(read(path))
        start = time.time()
        scratch = os.path.join(folder, "scratch")
        names, k = list(targets), 0
        while (time.time() - start < options.seconds) if options.seconds else k < options.rounds:
            name = names[k % len(names)]
            target = targets[name]
            k += 1
            seed = rng.choice(target.seeds)
            data = target.mutate(rng, seed, target.seeds)
            shutil.rmtree(scratch, ignore_errors=True)
            os.mkdir(scratch)
            source = os.path.join(scratch, f"input.{target.suffix}")
            write(source, data)
            template = rng.choice(target.commands)
            command = [word.replace("{in}", source).replace("{dir}", scratch) for word in template]
            wrong, code = run(command, options.timeout, scratch)
            runs[name] += 1
            refused[name] += code == 1
            if wrong:
                failures[name, wrong] += 1
                if failures[name, wrong] <= 3:
                    os.makedirs(options.keep, exist_ok=True)
                    kept = os.path.join(options.keep, f"{name}.{options.seed}.{k}.{target.suffix}")
                    write(kept, data)
                    shown = " ".join(word.replace(source, kept).replace(scratch, ".")
                                     for word in command)
                    print(f"{wrong}\n    {shown}", flush=True)
    for name in names:
        print(f"{name}: {runs[name]} runs, {refused[name]} refused with a message")
    print(f"{sum(runs.values())} runs, {sum(failures.values())} failures, "
          f"{len(failures)} different ones")
    for (name, wrong), count in failures.most_common():
        print(f"  {count:5d}  {name}: {wrong}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
