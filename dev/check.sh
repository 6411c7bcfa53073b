#!/usr/bin/env bash
# Static analysis of the two programs: dev/check.sh. Needs gcc 12, clang-tidy 14 and cppcheck 2.10 (other
# versions say other things). Each tool is asked for what it is good at; what it still gets wrong stands
# at the end of this script, each with the reason. Anything else is printed, and the exit code is 1.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/.."
out=$(mktemp)
trap 'rm -f "$out" "$out".*' EXIT

# gcc follows memory and files through functions: leaks, double frees, uses after free. Not asked: null
# pointers and uninitialised values, which it sees wherever a loop or CHECK() decides. Plain C without
# optimisation and OpenMP, because it cannot read vectors and outlined loops.
for program in moleblend data_prep; do
    gcc -std=c11 -O0 -DPLAIN_C -fanalyzer -Wanalyzer-malloc-leak -Wanalyzer-file-leak \
        -Wanalyzer-double-free -Wanalyzer-use-after-free -Wanalyzer-double-fclose \
        -Wanalyzer-free-of-non-heap -Wanalyzer-mismatching-deallocation -Wanalyzer-shift-count-overflow \
        -Wanalyzer-write-to-const -Wanalyzer-unsafe-call-within-signal-handler \
        -Wno-analyzer-null-dereference -Wno-analyzer-null-argument \
        -Wno-analyzer-use-of-uninitialized-value -Wno-analyzer-possible-null-dereference \
        -Wno-analyzer-possible-null-argument -c $program.c -o "$out.o" 2> "$out.gcc.$program" || true
done

# clang-tidy: its path analysis, and mistakes of a line. Not asked:
#   easily-swappable-parameters              most functions here take several ints
#   narrowing-conversions, implicit-widening-of-multiplication-result, signed-char-misuse,
#   misplaced-widening-cast                  sizes are checked where they are read; int8_t is a number
#   sizeof-expression                        arrays of pointers are meant
#   suspicious-string-compare                memcmp() as a condition means "differs"
#   DeprecatedOrUnsafeBufferHandling         memcpy_s() is in no libc that we know
#   Padding                                  a table with 2 bytes of it
checks='-*,bugprone-*,clang-analyzer-*,-bugprone-easily-swappable-parameters'
checks+=',-bugprone-narrowing-conversions,-bugprone-implicit-widening-of-multiplication-result'
checks+=',-bugprone-signed-char-misuse,-bugprone-misplaced-widening-cast,-bugprone-sizeof-expression'
checks+=',-bugprone-suspicious-string-compare,-clang-analyzer-optin.performance.Padding'
checks+=',-clang-analyzer-security.insecureAPI.DeprecatedOrUnsafeBufferHandling'
for program in moleblend data_prep; do
    clang-tidy --quiet --checks="$checks" $program.c -- -std=c11 -march=native \
        > "$out.tidy.$program" 2> /dev/null || true
done

# cppcheck: misuse of the library, bounds, resources.
for program in moleblend data_prep; do
    cppcheck --std=c11 --enable=warning,performance,portability -q -D__unix__ -D__linux__ \
        --suppress=missingIncludeSystem $program.c 2> "$out.cppcheck.$program" || true
done

# ---- what they say, how often in each file

cat "$out".*.* | grep -hE '(warning|error|performance|portability): ' |
    sed -E 's/^[^ ]*\/([^/ ]*):[0-9]+:[0-9]+: /\1: /; s/^([^ :]*):[0-9]+:[0-9]+: /\1: /' |
    sort | uniq -c | sed 's/^ *//' > "$out"
sed -n '/^# KNOWN$/,$s/^# \(.*[^ ]\) *| .*/\1/p' "$0" > "$out.known"
grep -vxFf "$out" "$out.known" | sed 's/^/known, and gone: /' || true
if grep -vxFf "$out.known" "$out"; then exit 1; fi
echo "clean but for $(wc -l < "$out") known findings"
exit 0

# What is wrong about them:
# KNOWN
# 1 data_prep.c: warning: leak of '*s.next.bytes' [CWE-401] [-Wanalyzer-malloc-leak]| buffers change places
# 1 data_prep.c: warning: 2nd function call argument is an uninitialized value [clang-analyzer-core.CallAndMessage]| a part's number is below the number of parts
# 1 data_prep.c: warning: Access to field 'atom' results in a dereference of an undefined pointer value [clang-analyzer-core.NullDereference]| as many links are set as n says
# 1 text.h: warning: The left operand of '>=' is a garbage value [clang-analyzer-core.UndefinedBinaryOperatorResult]| next_line() sets the line in any case
# 1 fast.h: error: Uninitialized variable: tile [uninitvar]| the kernel fills it
# 1 moleblend.c: warning: Array access (from variable 'row') results in a null pointer dereference [clang-analyzer-core.NullDereference]| fine-tuning has a history
# 1 moleblend.c: warning: Division by zero [clang-analyzer-core.DivideZero]| a batch has molecules
# 1 moleblend.c: warning: Null pointer passed to 1st parameter expecting 'nonnull' [clang-analyzer-core.NonNullParamChecker]| main() counts the words of a command
# 1 moleblend.c: warning: Uninitialized variable: dbias [uninitvar]| pair_head() fills it
# 1 metrics.h: warning: Uninitialized variable: metric [uninitvar]| there is a seed at least
# 2 moleblend.h: error: va_list 'args' was opened but not closed by va_end(). [va_end_missing]| mb_die() does not return
# 1 moleblend.h: warning: The left operand of '==' is a garbage value [clang-analyzer-core.UndefinedBinaryOperatorResult]| dataset_create() comes first
# 1 moleblend.h: warning: Array access (from variable 'p') results in a null pointer dereference [clang-analyzer-core.NullDereference]| the record of a line that is none is not read
