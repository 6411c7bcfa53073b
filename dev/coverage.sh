#!/usr/bin/env bash
# Branch coverage of the tests: dev/coverage.sh
#
# Builds the programs and the tests with clang's counters in build/coverage/, runs all tests there -
# those that start the programs count too -, and prints for each source file how many of its
# branches (every condition's two outcomes, macros expanded) were taken by any of the three. Which
# were not is in build/coverage/missed.txt. Needs clang, llvm (llvm-profdata, llvm-cov), python3.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD work=$PWD/build/coverage
llvm() { local tool=$1; shift; "$(command -v "$tool" || command -v "$tool-14")" "$@"; }

rm -rf "$work"
mkdir -p "$work/build"
cd "$work"
for file in "$root"/*.c "$root"/*.h "$root"/{lib,commands,prep,tests,data,Makefile,README.md}; do ln -s "$file" .; done
flags="-std=c11 -O1 -w -march=native -fprofile-instr-generate -fcoverage-mapping"
echo 'int main(void) { return 0; }' > build/omp.c
! clang -fopenmp build/omp.c -o build/omp 2> /dev/null || flags="$flags -fopenmp"
export LLVM_PROFILE_FILE=$work/build/%4m.profraw OMP_WAIT_POLICY=passive
for program in moleblend data_prep; do clang $flags $program.c -o $program -lm & done
clang $flags -Wno-unused-function test.c -o build/test -lm
wait
./data_prep -o '{}.bin' --split 0.9,0.1 --split-by random --labels logP,TPSA data/sample.sdf \
    2> /dev/null
build/test | tee test.log | grep -E 'FAILED|passed, [0-9]* failed$' || true

llvm llvm-profdata merge -o all.profdata build/*.profraw
llvm llvm-cov export -instr-profile=all.profdata build/test -object moleblend -object data_prep \
    > coverage.json
python3 - << 'END'
# A function that stands in several programs has counters in each (none where it is not used): they
# are added.
import json, os
functions = {}
for f in json.load(open("coverage.json"))["data"][0]["functions"]:
    called_at = {r[6]: r for r in f["regions"] if r[7] == 1}  # of macros, by the number of their text
    rows = []
    for b in f["branches"]:
        at, text = b[:2], b[6]
        while text in called_at:
            at, text = called_at[text][:2], called_at[text][5]
        rows.append([tuple(at), b[4], b[5]])
    key = os.path.relpath(f["filenames"][0]), *f["regions"][0][:2]
    before = functions.setdefault(key, (f["name"].split(":")[-1], []))[1]
    before += [[at, 0, 0] for at, _, _ in rows[len(before):]]
    for old, new in zip(before, rows):
        old[1], old[2] = old[1] + new[1], old[2] + new[2]
files, missed = {}, open("missed.txt", "w")
for (path, _, _), (name, rows) in sorted(functions.items()):
    if path == "test.c" or path.startswith("tests/"):
        continue
    count = files.setdefault(path, [0, 0])
    source = open(path).read().split("\n")
    for (line, column), yes, no in rows:
        count[0] += (yes > 0) + (no > 0)
        count[1] += 2
        for side, n in ("true", yes), ("false", no):
            if n == 0:
                missed.write(f"{path}:{line}:{column} {name} never {side}: {source[line - 1].strip()}\n")
print(f"{'file':20} {'taken':>7} {'of':>7} {'percent':>8}")
for path, (taken, total) in files.items():
    print(f"{path:20} {taken:7} {total:7} {100 * taken / total:8.1f}")
END
