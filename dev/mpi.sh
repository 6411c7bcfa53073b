#!/usr/bin/env bash
# The same bytes for any number of MPI ranks, whatever the threads, and without MPI; a rank that is
# killed loses nothing; one that fails says why, ranks without work are said. Needs moleblend, train.bin, valid.bin and moleblend_mpi (`make mpi`) here.
# Usage: dev/mpi.sh [RANKS...]
set -euo pipefail
export OMP_WAIT_POLICY=passive OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
out=build/mpi
common="train.bin --valid valid.bin --size tiny --dim 32 --ffn 32 --batch-size 50 --micro-batch 8"
pretrain="$common --steps 40 --save-every 4"
finetune="finetune $common --epochs 2 --seeds 2"
mkdir -p $out

# ranks N ARGUMENTS...: runs moleblend_mpi on N ranks.
ranks() { mpirun --oversubscribe -np "$1" ./moleblend_mpi "${@:2}" > $out/log 2>&1; }
same() { cmp "$out/$1.safetensors" "$out/$2.safetensors" && echo "$3: the same bytes"; }

# shellcheck disable=SC2086
{
    ./moleblend $pretrain -o $out/p.safetensors > $out/log 2>&1
    ./moleblend $finetune -o $out/f.safetensors > $out/log 2>&1
    for n in ${@:-1 2 3 4 8}; do
        for threads in 1 2; do
            ranks "$n" $pretrain --threads $threads -o $out/q.safetensors || { cat $out/log; exit 1; }
            same p q "pretraining, $n ranks of $threads threads"
        done
        ranks "$n" $finetune --threads 1 -o $out/g.safetensors || { cat $out/log; exit 1; }
        same f g "fine-tuning, $n ranks"
    done
    rm -f $out/k.*
    ranks 3 $pretrain --threads 1 -o $out/k.safetensors & job=$!
    while [ ! -s $out/k.safetensors.state ]; do sleep 0.02; done
    kill -9 "$(pgrep -f 'moleblend_mpi train' | tail -n 1)" || true
    wait $job || true
    ranks 2 $pretrain --resume -o $out/k.safetensors
    same p k "a rank of three killed, resumed on two"
    # molecule 9 is damaged, and the first to read it is rank 1
    at=$(($(od -An -t u8 -j $(($(od -An -t u8 -j 24 -N 8 train.bin) + 72)) -N 8 train.bin) >> 16))
    cp train.bin $out/bad.bin
    printf '\377' | dd of=$out/bad.bin bs=1 seek=$((at + 20)) conv=notrunc 2> $out/log
    ! ranks 2 $out/bad.bin --valid valid.bin --size tiny --dim 16 --steps 90 --batch-size 40 \
        --micro-batch 20 -o $out/b.safetensors
    grep "rank 1: moleblend: $out/bad.bin: molecule 9: record is damaged" $out/log
    ranks 3 $common --micro-batch 0 --steps 1 -o $out/b.safetensors
    grep "a batch of 50 molecules is 1 part: 2 of 3 ranks have nothing to train with" $out/log
}
