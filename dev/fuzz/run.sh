#!/usr/bin/env bash
# Coverage-guided fuzzing of everything that the programs read: dev/fuzz/run.sh [SECONDS [TARGET...]]
#
#   SECONDS   for each target, one after another (default 60); a target's first finding ends it
#   TARGET    of sdf v3000 smiles csv dataset tensors state sde-tensors sde-state (default all)
#
# Needs clang with its sanitizers and libFuzzer. Corpora grow from run to run in build/fuzz/, which
# may be removed at any time. What was found is in build/fuzz/TARGET.found/; to repeat it:
#   cd build/fuzz/scratch && ../TARGET ../TARGET.found/*
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-60}
shift || true
all="sdf v3000 smiles csv dataset tensors state sde-tensors sde-state"
targets=${*:-$all}
root=$PWD work=$PWD/build/fuzz
mkdir -p "$work/moleculesde"

# ---- copies of the sources: without checksums, which a fuzzer cannot guess; with buffers and a budget
#      of a record that small files use up, so that what takes longer than that has none; with smaller
#      heads, which are most of a small model

copy() {  # FILE 'WHAT IS THERE' 'WHAT IT BECOMES' ...
    cp "$1" "$work/$1"
    for ((k = 2; k < $#; k += 2)); do
        grep -q -- "${!k}" "$1" || { echo "$1: expected \"${!k}\""; exit 1; }
        by=$((k + 1))
        sed -i "s/${!k}/${!by}/" "$work/$1"
    done
}
copy moleblend.h 'crc = ~crc;' 'return (void)table, (void)p, (void)n, 0; crc = ~crc;'
rm -rf "$work"/{lib,commands,prep}
cp -r lib commands prep "$work"
copy data_prep.c
copy prep/arena.h 'BUDGET = [0-9]*' 'BUDGET = 4000000'
copy prep/records.h 'CHUNK_BYTES = 1 << 20' 'CHUNK_BYTES = 1 << 10' \
    'RECORD_BYTES_MAX = 16 << 20' 'RECORD_BYTES_MAX = 1 << 13' 'CHUNK_RECORDS = 8192' 'CHUNK_RECORDS = 16'
copy moleblend.c 'PAIR_WIDTH = 32' 'PAIR_WIDTH = 4'
copy moleculesde/moleculesde.c 'COEFFICIENTS = 128' 'COEFFICIENTS = 16'
cp moleculesde/{run.c,model.h} "$work/moleculesde"

flags="-std=c11 -g -O1 -I $work"
sanitizers="-fsanitize=fuzzer,address,undefined,float-cast-overflow -fno-sanitize-recover=all"
clang $flags $sanitizers -DDATA_PREP dev/fuzz/fuzz.c -o "$work/fuzz_data_prep" -lm
clang $flags $sanitizers dev/fuzz/fuzz.c -o "$work/fuzz_moleblend" -lm
clang $flags $sanitizers -DMOLECULESDE dev/fuzz/fuzz.c -o "$work/fuzz_moleculesde" -lm
for target in sdf v3000 smiles csv; do ln -sf fuzz_data_prep "$work/$target"; done
for target in dataset tensors state; do ln -sf fuzz_moleblend "$work/$target"; done
for target in sde-tensors sde-state; do ln -sf fuzz_moleculesde "$work/$target"; done
for program in data_prep moleblend moleculesde/moleculesde; do
    clang $flags "$work/$program.c" -o "$work/$program" -lm
done

# ---- seeds: small pieces of real files

rm -rf "$work/scratch"
mkdir "$work/scratch"
cd "$work/scratch"
tiny="--layers 1 --dim 8 --ffn 8 --heads 2 --kernels 3"
for target in $all; do
    mkdir -p "$work/$target.corpus" "$work/$target.found"
done

# Molecules of the sample as V2000 in 3D, as V2000 drawn flat, and as V3000 from behind COUNTS on.
seeds_mol_blocks() {
    awk -v sdf="$work/sdf.corpus/" -v v3000="$work/v3000.corpus/" '
        function say(text) { flat = flat text; solid = solid text }
        FNR == 1 || /^\$\$\$\$/ {
            if (line && ++n <= 40) {
                print solid "$$$$" > (sdf "sample" n); close(sdf "sample" n)
                print flat "$$$$" > (sdf "flat" n); close(sdf "flat" n)
                print v3 "$$$$" > (v3000 "sample" n); close(v3000 "sample" n)
            }
            flat = solid = v3 = ""; line = 0
            if (/^\$/) next
        }
        { line++; solid = solid $0 "\n" }
        line == 4 {
            atoms = substr($0, 1, 3) + 0; bonds = substr($0, 4, 3) + 0
            v3 = atoms " " bonds " 0 0 0\nM  V30 BEGIN ATOM\n"
        }
        line > 4 && line <= 4 + atoms {
            v3 = v3 sprintf("M  V30 %d %s %s %s %s 0\n", line - 4, $4, $1, $2, $3)
            $0 = substr($0, 1, 20) "    0.0000" substr($0, 31)
        }
        line == 4 + atoms { v3 = v3 "M  V30 END ATOM\nM  V30 BEGIN BOND\n" }
        line > 4 + atoms && line <= 4 + atoms + bonds {
            bond = line - 4 - atoms; type = substr($0, 7, 3) + 0; stereo = substr($0, 10, 3) + 0
            v3 = v3 sprintf("M  V30 %d %d %d %d%s\n", bond, type, substr($0, 1, 3),
                            substr($0, 4, 3), stereo ? " CFG=" (stereo == 1 ? 1 : 3) : "")
        }
        line == 4 + atoms + bonds { v3 = v3 "M  V30 END BOND\nM  V30 END CTAB\n" }
        line > 4 + atoms + bonds { v3 = v3 $0 "\n" }
        { sub(/3D$/, "2D"); flat = flat $0 "\n" }' "$root/data/sample.sdf"
    cp "$root/data/ethanol.sdf" "$work/sdf.corpus/"
}

# The SMILES of the tests, one a file; and as rows of tables.
seeds_smiles() {
    sed -n '/PREP_SMILES\[\]/,/^};/s/^ *{"[^"]*", "\([^"]*\)",$/\1/p' "$root/tests/chemistry.h" |
        sed 's/\\\\/\\/g' | grep -v , > smiles.txt
    split -l 1 -a 3 smiles.txt "$work/smiles.corpus/test"
    split -l 20 -a 3 smiles.txt "$work/smiles.corpus/tests"
    printf '%s\n' SMILES '# x' 'CC |c:0| ethane' > "$work/smiles.corpus/names"
    for n in 3 7 12; do
        awk 'NR == 1 { print "id,smiles,a,b" } { print "m" NR "," $0 "," NR / 4 "," NR % 2 }' smiles.txt |
            head -n $n > "$work/csv.corpus/plain$n"
        awk 'NR == 1 { print "\"a\",\"smiles\",b,\"i\"\"d\"" } {
             print "\"" NR "\",\"" $0 "\",NaN,\"x\n,\"\"y\"\r" }' smiles.txt |
            tail -n $n > "$work/csv.corpus/quoted$n"
    done
}

# A dataset, a model as pretrained and one as fine-tuned, the state of a run.
seeds_binary() {
    head -n 150 "$root/data/sample.sdf" > small.sdf
    "$work/data_prep" --labels logP,TPSA -o data.bin small.sdf
    "$work/moleblend" data.bin $tiny --steps 2 -o input > pretrained.txt
    "$work/moleblend" finetune data.bin --valid data.bin $tiny --epochs 1 -o model.safetensors
    cp data.bin "$work/dataset.corpus/sample"
    printf 'C\n[Na+].[Cl-] salt\n' > two.smi
    "$work/data_prep" -o two.bin two.smi
    cp two.bin "$work/dataset.corpus/two"
    cp input "$work/tensors.corpus/pretrained"
    cp model.safetensors "$work/tensors.corpus/finetuned"
    cp input.state "$work/state.corpus/done"
    local log begin  # and the state that was there one step before
    log=$(grep -oa '"log":{[^}]*}' input.state)
    begin=${log##*[} begin=${begin%,*}
    LC_ALL=C sed 's/"step":"2"/"step":"1"/; s/"log":{[^}]*}/'"$(sed \
        "s/\\[2,/[1,/; s/$begin,[0-9]*/$begin,$((begin + 32))/" <<< "$log")/" input.state \
        > "$work/state.corpus/half"
}

# The same of moleculesde; of its runs the states at the end and before.
seeds_moleculesde() {
    local k sde="$work/moleculesde/moleculesde" end="--batch-size 2 -o sde" encoder
    local tiny="--dim 8 --layers 1 --blocks 1 --filters 4 --gaussians 3"
    for k in 1 2; do
        "$sde" data.bin $tiny --hidden 8 --width 4 --channels 1 --last-channels 1 --steps $k $end
        cp sde.state "$work/sde-state.corpus/pretrained$k"
    done
    cp sde "$work/sde-tensors.corpus/pretrained"
    for encoder in 2d 3d; do
        "$sde" finetune data.bin --valid data.bin $tiny --encoder $encoder --epochs 1 $end
        cp sde "$work/sde-tensors.corpus/finetuned$encoder"
        sed 's/--epochs 1/--epochs 2/' sde.state > "$work/sde-state.corpus/half$encoder"
        "$sde" finetune data.bin --valid data.bin $tiny --encoder $encoder --epochs 2 $end
        cp sde.state "$work/sde-state.corpus/finetuned$encoder"
    done
}

seeds_mol_blocks
seeds_smiles
{ seeds_binary && seeds_moleculesde; } > seeds.log 2>&1 || { cat seeds.log; exit 1; }

# ---- words that a fuzzer would not find by itself

words() {  # each line of the input a word
    sed 's/\\/\\\\/g; s/"/\\"/g; s/.*/"&"/' > "$1.words"
}
elements="H C N O F P S Cl Br I B Si Se Na Fe U R# R D T * A Q X"
printf '%s\n' $elements 'M  CHG  1   1   1' 'M  RAD  1   1   2' 'M  ISO  1   1  13' 'M  ZBO' 'M  END' \
    'A    1' 'V    1' 'G    1  1' 'M  ALS' 'M  STY' V2000 V3000 3D 2D '  1  2  4  0' '  1  2  2  3' \
    '  1  2  1  1' '  1  2  1  6' '  1  2  1  4' '    0.0000' '999' '> <a>' '> <id>' '$$$$' nan 1e9 |
    words sdf
printf '%s\n' $elements 'M  V30 ' 'BEGIN ATOM' 'END ATOM' 'BEGIN BOND' 'END BOND' 'END CTAB' 'M  END' \
    'COUNTS 2 1 0 0 0' ' CHG=1' ' CHG=-15' ' RAD=2' ' CFG=1' ' CFG=2' ' CFG=3' ' MASS=13' ' MASS=1e300' \
    ' VAL=-1' ' HCOUNT=1' ' EXACHG=1' ' ATTCHORD=(2 1 Al)' ' NOT[C,N]' ' [C,N]' ' ENDPTS=(2 1 2)' \
    ' ATTACH=ALL' ' CLASS=AA' 'BEGIN SGROUP' 'BEGIN COLLECTION' 'LINKNODE' '"' '(' ')' ' -' '> <a>' |
    words v3000
printf '%s\n' $elements c n o s p se as b te '[nH]' '[N+]' '[C-]' '@' '@@' '@TH2' '@AL1' '@SP1' '@TB1' \
    '@OH1' '/' '\' '%10' '%(123)' '->' '<-' '$' '~' ':' '=' '#' '.' '(' ')' '[#6H4]' '[13CH3:1]' \
    '[CH2:2147483647]' '[Fe+2]' '[2H]' 'c1ccccc1' 'C1CC1' '[CH5]' '|' 'C=C' 'H260' | words smiles
cat smiles.words > csv.words
printf '%s\n' smiles SMILES '"' '""' ',' ',,,' 'id' 'a,b' NaN 1e30 1e39 null | words more
cat more.words >> csv.words
printf '%s\n' F32 F16 BF16 F64 I64 BOOL '"dtype":' '"shape":[' '"data_offsets":[0,4]' '__metadata__' \
    '[1,1]' '18446744073709551615' '9223372036854775807' '[]' '{}' '\u0041' '\n' nan inf 1e39 -1 0 \
    '"run":' '"step":"2"' '"label_std":"0"' '"task":"classification"' '"readout":"cls"' \
    '"modality":"3d"' '"checksum":"0"' | words tensors
tee state.words sde-tensors.words < tensors.words > sde-state.words
printf '%s\n' '\x00\x00\x80\x7f' '\x00\x00\xc0\x7f' '\xff\xff' '\xff\xff\x00\x00' '\x00\x00\x01\x00' |
    sed 's/.*/"&"/' > dataset.words

# ---- the runs, in memory if there is a file system for that, and a table

memory=$(mktemp -d "$([ -w /dev/shm ] && echo /dev/shm || echo "$work")/fuzz.XXXXXX")
trap 'rm -rf "$memory"' EXIT
export ASAN_OPTIONS=quarantine_size_mb=8:malloc_context_size=8
declare -A longest=([sdf]=8000 [v3000]=8000 [smiles]=1000 [csv]=4000 [dataset]=4000
                    [tensors]=400000 [state]=1000000 [sde-tensors]=400000 [sde-state]=1000000)
printf '%-11s %12s %8s %10s %9s\n' target executions edges features findings
failed=0
for target in $targets; do
    log=$work/$target.log
    rm -rf "$memory"/*
    cp "$work"/scratch/* "$memory"
    cd "$memory"
    "$work/$target" "$work/$target.corpus" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 \
        -max_len="${longest[$target]}" -dict="$target.words" -close_fd_mask=1 -print_final_stats=1 \
        -artifact_prefix="$work/$target.found/" > "$log" 2>&1 || failed=1
    found=$(find "$work/$target.found" -type f -newer "$memory/data.bin" | wc -l)
    awk -v target="$target" -v found="$found" '
        / cov: / { for (k = 1; k < NF; k++) value[$k] = $(k + 1); cov = value["cov:"]; ft = value["ft:"] }
        /number_of_executed_units/ { n = $2 }
        END { printf "%-11s %12d %8d %10d %9d\n", target, n, cov, ft, found }' "$log"
done
exit $failed
