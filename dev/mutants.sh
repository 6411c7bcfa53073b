#!/usr/bin/env bash
# Do the tests bite? Puts the small faults of mutants.txt, one at a time, into a copy of the source,
# builds it and runs what `make test` runs: first the groups of tests that should notice, then all
# the rest. The last lines say how many were killed, area by area, and which survived. Exit code 1
# if fewer than 95 % were killed, if one survived that mutants.txt does not explain, or if an anchor
# or a build fails. How to mend an anchor: at the top of mutants.txt.
# Usage: dev/mutants.sh [--check] [--expected] [--keep] [--limit S] [--jobs N] [NUMBER|A-B|FILE...]
#   --check     try the anchors alone      --expected  only the groups that should notice
#   --keep      leave the copies, say where    --limit S   seconds for a run of tests, default 300
#   --jobs N    at a time, default 2       NUMBER, A-B, FILE: only these mutants
# Left out is the group "busy machine", whose verdict depends on the load. It takes 15 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=2 limit=300 check=0 expected=0 keep=0 wanted=()
while [ $# -gt 0 ]; do
    case $1 in
        --check) check=1 ;;
        --expected) expected=1 ;;
        --keep) keep=1 ;;
        --limit) limit=$2; shift ;;
        --jobs) jobs=$2; shift ;;
        -*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 1 ;;
        *) wanted+=("$1") ;;
    esac
    shift
done

# ---- the table: file[n], groups[n], what[n], old[n], new[n], why[n] (explained), area[n]
n=0 now=
while IFS= read -r line; do
    case $line in
        '== '*) now=${line#== } ;;
        '- '*) old[n]=${line#- } ;;
        '+ '*) new[n]=${line#+ } ;;
        '= '*) why[n]=${line#= } ;;
        \#* | '') ;;
        *) n=$((n + 1)) area[n]=$now why[n]='' old[n]='' new[n]=''
           file[n]=${line%% | *} what[n]=${line##* | } line=${line#* | }
           groups[n]=${line%% | *} ;;
    esac
done < dev/mutants.txt

is_wanted() {
    [ ${#wanted[@]} -eq 0 ] && return 0
    local w
    for w in "${wanted[@]}"; do
        case $w in
            *[!0-9-]*) [[ ${file[$1]} = *"$w"* ]] && return 0 ;;
            *) [ "$1" -ge "${w%-*}" ] && [ "$1" -le "${w#*-}" ] && return 0 ;;
        esac
    done
    return 1
}

# The file of mutant $1 with its fault on stdout; fails, saying why, if the anchor does not fit.
mutate() {
    OLD=${old[$1]} NEW=${new[$1]} NAME="mutant $1, ${file[$1]}" LC_ALL=C awk '
        BEGIN { RS = "\1" }  # the whole file is one record
        {
            old = ENVIRON["OLD"]
            at = index($0, old)
            rest = substr($0, at + length(old))
            if (old == "" || !at || index(rest, old)) {
                print ENVIRON["NAME"] ": the anchor " (at ? "stands twice" : "is gone") ": " \
                    old > "/dev/stderr"
                exit 1
            }
            printf "%s%s%s", substr($0, 1, at - 1), ENVIRON["NEW"], rest
        }' "${file[$1]}"
}

# The groups of mutant $1 into the array `names`, and the program that has them into `program`.
groups_of() {
    program=build/test
    [[ ${groups[$1]} = sde:* ]] && program=build/test_moleculesde
    IFS=, read -ra names <<< "${groups[$1]#sde:}"
    names=("${names[@]# }")
}

bad=0
for ((k = 1; k <= n; k++)); do
    is_wanted $k || continue
    mutate $k > /dev/null || bad=1
    groups_of $k
    for name in "${names[@]}"; do
        grep -qF "{\"$name\", " "$([ $program = build/test ] && echo test.c \
            || echo moleculesde/test_moleculesde.c)" || { echo "mutant $k: no group \"$name\""; bad=1; }
    done
done
[ $bad -eq 0 ] || exit 1
if [ $check -eq 1 ]; then
    echo "$n mutants, every anchor fits"
    exit 0
fi

# ---- the copies, one a worker; programs without faults are kept beside it
top=$(mktemp -d "${TMPDIR:-/tmp}/mutants.XXXXXX")
programs=(moleblend data_prep build/test moleculesde/moleculesde build/test_moleculesde)
make=(make -s "CFLAGS=-O1" "CC=${CC:-gcc}")
export OMP_WAIT_POLICY=passive
trap '[ $keep -eq 1 ] || rm -rf "$top"' EXIT

# Tests of the program $1 with these arguments, in the current folder; 0: all passed.
tests() {
    (ulimit -f 4000000 -v 30000000; timeout -k 5 "$limit" "$@") > test.log 2>&1 < /dev/null
}

# A copy of the source with all programs in the folder $1.
prepare() {
    cp -rp "$top/source" "$1"
    mkdir "$1.base"
    cd "$1"
    "${make[@]}" "${programs[@]}" train.bin > make.log 2>&1 || { cat make.log >&2; return 1; }
    cp -p --parents "${programs[@]}" train.bin valid.bin "$1.base"
}

# Tries mutant $1 in the current folder; says "killed BY", "survived" or "error WHY".
try() {
    local name names program build=(moleblend data_prep build/test train.bin)
    groups_of "$1"
    [ $program = build/test ] || build=(data_prep train.bin moleculesde/moleculesde $program)
    if [ ! -e "$copy.passed.${groups[$1]}" ]; then  # without the fault they must pass
        for name in "${names[@]}"; do
            tests $program --stop "$name" || { echo "error \"$name\" fails without a fault"; return; }
        done
        touch "$copy.passed.${groups[$1]}"
    fi
    (cd "$top/source" && mutate "$1") > "${file[$1]}"
    "${make[@]}" "${build[@]}" > make.log 2>&1 || { echo "error does not build"; return; }
    for name in "${names[@]}"; do
        tests $program --stop "$name" || { said "$name"; return; }
    done
    [ $expected -eq 0 ] || { echo survived; return; }
    "${make[@]}" "${programs[@]}" train.bin > make.log 2>&1 \
        || { echo "error does not build"; return; }
    [ $program = build/test ] || names=()
    tests build/test --stop --without "busy machine" "${names[@]}" || { said "the rest"; return; }
    groups_of "$1"
    [ $program = build/test ] && names=(none)
    tests build/test_moleculesde --stop --without "${names[@]}" || { said "the rest of sde"; return; }
    echo survived
}

# The outcome of tests that failed: the first one that did.
said() {
    local first
    first=$(grep -a -m 1 FAILED test.log | cut -c 1-90 || true)
    echo "killed by $1: ${first:-no end in $limit s, or a crash}"
}

# A worker: takes mutants as long as there are some.
work() {
    local k outcome start
    copy=$top/$1
    prepare "$copy" || { echo "the source without faults does not build" > "$top/failed"; return; }
    for ((k = 1; k <= n; k++)); do
        is_wanted $k && mkdir "$top/taken.$k" 2> /dev/null || continue
        start=$SECONDS
        outcome=$(try $k)
        printf '%3d  %4d s  %s  [%s: %s]\n' $k $((SECONDS - start)) "$outcome" "${file[$k]}" \
            "${what[$k]}"
        echo "$outcome" > "$top/outcome.$k"
        cp -p "$top/source/${file[$k]}" "${file[$k]}"
        cp -rp "$copy.base/." .
    done
}

mkdir "$top/source"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp -p --parents -t "$top/source"
for ((w = 1; w <= jobs; w++)); do (work $w) & done
wait
[ ! -e "$top/failed" ] || { cat "$top/failed"; exit 1; }

# ---- the end: by area
declare -A killed survived
all=0 dead=0 unexplained=0 errors=0
survivors=
for ((k = 1; k <= n; k++)); do
    [ -e "$top/outcome.$k" ] || continue
    outcome=$(cat "$top/outcome.$k") all=$((all + 1)) a=${area[$k]}
    case $outcome in
        killed*) killed[$a]=$((${killed[$a]:-0} + 1)) dead=$((dead + 1)) ;;
        survived) survived[$a]=$((${survived[$a]:-0} + 1))
            [ -n "${why[$k]}" ] || unexplained=$((unexplained + 1))
            survivors+="  $k ${file[$k]}: ${what[$k]}; ${why[$k]:-NOT EXPLAINED}"$'\n' ;;
        *) errors=$((errors + 1)) ;;
    esac
done
echo
for a in method fine-tuning machinery chemistry MoleculeSDE; do
    printf '%-12s %3d killed, %d survived\n' $a "${killed[$a]:-0}" "${survived[$a]:-0}"
done
printf 'survivors:\n%s' "${survivors:-  none
}"
[ $keep -eq 0 ] || echo "copies: $top"
echo "$dead of $all killed, $((all ? 100 * dead / all : 0)) %; $errors errors"
[ $((100 * dead)) -ge $((95 * all)) ] && [ $unexplained -eq 0 ] && [ $errors -eq 0 ]
