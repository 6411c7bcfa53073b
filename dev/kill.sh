#!/usr/bin/env bash
# Nothing is lost: kills pretraining and fine-tuning with SIGKILL at 30 random moments and before
# and after every rename and fsync, resumes each with another number of threads, and compares what
# the resumed run wrote with the uninterrupted run, byte by byte. Needs strace for the second part.
# Usage: dev/kill.sh [RANDOM_KILLS]; run it where moleblend and train.bin are.
set -euo pipefail
kills=${1:-30}
out=build/kill
export OMP_WAIT_POLICY=passive
common="train.bin --valid valid.bin --size tiny --dim 32 --ffn 32 --batch-size 64"
declare -A run=([pretrain]="pretrain $common --steps 30 --save-every 7"
                [finetune]="finetune $common --epochs 1 --seeds 2 --save-every 9")
bad=0

# Resumes run $1 after a kill, $2 says which, and compares its outputs with the uninterrupted run.
compare() {
    threads=$((1 + RANDOM % 3))
    # shellcheck disable=SC2086
    ./moleblend ${run[$1]} --resume --threads $threads -o $out/b.safetensors > $out/log 2>&1 \
        || { echo "$1, $2: does not resume:"; cat $out/log; bad=$((bad + 1)); return; }
    columns=1-8  # of the log: all but the speed
    other=0
    for file in "$out/$1".*safetensors; do cmp -s "$file" "${file/$1/b}" || other=1; done
    [ $other = 0 ] \
        && cmp -s <(cut -d, -f$columns $out/$1.log.csv) <(cut -d, -f$columns $out/b.log.csv) \
        && ! ls $out/*.tmp > /dev/null 2>&1 \
        || { echo "$1, $2: other bytes, or a .tmp is left"; bad=$((bad + 1)); }
}

mkdir -p $out
for name in pretrain finetune; do
    rm -f $out/b.*
    start=$(date +%s%N)
    # shellcheck disable=SC2086
    ./moleblend ${run[$name]} -o $out/$name.safetensors > $out/log 2>&1
    ms=$((($(date +%s%N) - start) / 1000000))
    for ((k = 0; k < kills; k++)); do
        rm -f $out/b.*
        at=$((ms * (RANDOM % 1000) / 1000 + 1))
        # shellcheck disable=SC2086
        { ./moleblend ${run[$name]} -o $out/b.safetensors > $out/log 2>&1 & p=$!
          sleep "$((at / 1000)).$(printf %03d $((at % 1000)))"
          kill -9 $p; wait $p; } 2> /dev/null || true
        compare $name "killed after $at ms"
    done
    echo "$name: $kills random kills"
    command -v strace > /dev/null || { echo "no strace: renames and fsyncs not tried"; continue; }
    for call in rename fsync; do
        for ((k = 1; ; k++)); do
            rm -f $out/b.*
            # shellcheck disable=SC2086
            { strace -f -q -o /dev/null -e trace=$call -e inject=$call:signal=KILL:when=$k \
                ./moleblend ${run[$name]} -o $out/b.safetensors > $out/log 2>&1; } 2> /dev/null \
                && break
            compare $name "killed at $call $k"
        done
        echo "$name: killed at each of $((k - 1)) calls of $call"
    done
done
[ $bad -eq 0 ] || { echo "$bad runs lost something"; exit 1; }
echo "every resumed run wrote the bytes of the uninterrupted one"
