#!/usr/bin/env bash
# dev/ports.sh [PLATFORM...]   (all of them by default; --list names them)
#
# Builds the programs and the tests for each platform, runs what can be run, under an emulator where
# it must, and prints a row of PORTS.md's table for each: tests passed (the bundled golden files
# among them; moleculesde's behind a plus), whether its datasets are byte for byte those of x86-64
# with gcc, and how far from it the losses of five training steps, what it makes of a checkpoint
# written there, and what is made there of its own checkpoint are: the largest of the relative errors
# (Euclidean norm) of the three. More than 1e-4 is a failure. The exit code is 1 if anything
# failed. Logs: build/ports/PLATFORM-N/log.
#
#   PORTS_GROUPS=all|quick   all groups of tests, or without the slow ones (default: quick where
#                            arithmetic is slow: by an emulator, by x87, by tcc)
#   PORTS_PYTHON=python3     with the packages ziglang and wasmtime, for WASI and macOS
# Debian: apt-get install clang libomp-dev musl-tools tcc qemu-user-static wine64 wine
#   gcc-12-multilib gcc-mingw-w64-x86-64-posix gcc-arm-linux-gnueabihf
#   gcc-{aarch64,s390x,riscv64,powerpc64le}-linux-gnu libc6-dev-{arm64,s390x,armhf,riscv64,ppc64el}-cross
set -uo pipefail
cd "$(dirname "$0")/.."
top=$PWD work=$PWD/build/ports failed=0
python=${PORTS_PYTHON:-python3}
export OMP_WAIT_POLICY=passive WINEDEBUG=-all WINEPREFIX=$work/wine
names="sse2 avx2 avx512 plain musl i386 i386-gnu aarch64 armhf riscv64 ppc64le s390x windows tcc wasi macos"
slow=(heads geometry attention model bias "500 atoms" messages using machine "flipped bits" reproducible "resumed tuning"
      "not finite" quotas poison)
tedious=(stereo optimiser "pretraining report" judging notes seeds "seeds alone" outputs options "tuning options" predictions "two runs"
         precision)  # by an emulator these take an hour
alone=(functions "random numbers" "matrix products" relations linear gelu attention geometry bias embedding
       heads model packing "500 atoms" "numbers at edges" masks metrics dataset checkpoint data_prep
       "golden files" molecules draws "plain losses" "task loss" scales LayerNorm "parameter table"
       rounding "bf16 products" "dropped layers" "fine-tuning head" optimiser)
programs=(program messages)  # groups of moleculesde's tests that start programs, and the slow ones
sde_slow=("${programs[@]}" "2D -> 3D" "3D -> 2D" model "fine-tuning head")
sde_tedious=(outputs runs options "tuning options")
shell=(stereo tables options precision)  # rows of these build on files that a Unix shell makes
sde_shell=(judging outputs runs options "tuning options")
fast="-ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp-simd"
m32="gcc -m32 -I/usr/include/x86_64-linux-gnu"  # Debian's gcc-12-multilib leaves the path to us

# What a platform is: compilers (one directory each), flags, what runs its programs, what they end in.
platform() {
    compilers=() flags=-O3 warn='-Wall -Wextra' std=-std=c11 run='' end='' needs='' libs=-lm tests=${PORTS_GROUPS:-all} refused=''
    case $1 in
    sse2)     label="x86-64, SSE2" compilers=(gcc clang) flags="-O3 -fopenmp" ;;
    avx2)     label="x86-64, AVX2" compilers=(gcc clang) flags="-O3 -fopenmp -march=x86-64-v3" ;;
    avx512)   label="x86-64, AVX-512" compilers=(gcc clang) flags="-O3 -fopenmp -march=x86-64-v4"
              grep -q avx512vl /proc/cpuinfo || run=none ;;
    plain)    label="x86-64, \`-DPLAIN_C\`" compilers=(gcc clang) flags="-O3 -DPLAIN_C" ;;
    musl)     label="x86-64, musl, static" compilers=(musl-gcc) flags="-O3 -static" ;;
    i386)     label="32-bit x86 (x87)" compilers=("$m32") tests=${PORTS_GROUPS:-quick} ;;
    i386-gnu) label="32-bit x86 without \`-std=c11\`: x87 refused, SSE2" compilers=("$m32") std=''
              refused="$m32 -fsyntax-only moleblend.c" flags="-O3 -msse2 -mfpmath=sse" ;;
    aarch64)  label="ARM, 64-bit"; emulated aarch64 aarch64-linux-gnu ;;
    armhf)    label="ARM, 32-bit"; emulated arm arm-linux-gnueabihf ;;
    riscv64)  label="RISC-V, 64-bit"; emulated riscv64 riscv64-linux-gnu ;;
    ppc64le)  label="POWER, 64-bit"; emulated ppc64le powerpc64le-linux-gnu ;;
    s390x)    label="s390x, 64-bit, big-endian"; emulated s390x s390x-linux-gnu ;;
    windows)  label="Windows, x86-64, under wine" compilers=(x86_64-w64-mingw32-gcc-posix)
              flags="-O3 -static" run="wine" end=.exe ;;
    tcc)      label="x86-64, no optimiser" compilers=(tcc) flags='' warn='' tests=${PORTS_GROUPS:-quick} ;;
    wasi)     label="WebAssembly (WASI), wasmtime" compilers=("$python -m ziglang cc -target wasm32-wasi")
              flags="-O2 -D_WASI_EMULATED_SIGNAL -D_WASI_EMULATED_PROCESS_CLOCKS"
              libs="-lm -lwasi-emulated-signal -lwasi-emulated-process-clocks"
              run="$python $work/wasi.py" end=.wasm needs=wasmtime ;;
    macos)    label="macOS, ARM and x86-64" flags=-O2 run=none needs=ziglang
              compilers=("$python -m ziglang cc -target aarch64-macos" "$python -m ziglang cc -target x86_64-macos") ;;
    *) echo "unknown platform $1; expected one of: $names" >&2; exit 2 ;;
    esac
}

emulated() {  # QEMU_NAME GCC_PREFIX
    compilers=("$2-gcc") flags="-O2 -static" run="qemu-$1-static" end=.bin tests=${PORTS_GROUPS:-quick}
}

missing() {  # COMPILER: prints what the platform needs and this machine lacks
    local tool
    for tool in ${1%% *} ${run%% *}; do
        [ "$tool" = none ] || command -v "$tool" > /dev/null || { echo "$tool"; return; }
    done
    for tool in $needs; do "$python" -c "import ziglang, $tool" 2> /dev/null || { echo "$tool"; return; }; done
    [[ $1 != *-m32* ]] || echo 'int one;' | $1 -x c -c - -o /dev/null 2> /dev/null || echo gcc-12-multilib
}

port() { (cd "$dir" && $run ./"$1$end" "${@:2}"); }  # a program of the platform, in its directory

build() {  # COMPILER
    mkdir -p "$dir/build" "$dir/moleculesde"
    cp -- *.c *.h README.md Makefile "$dir"
    cp -r -- lib commands prep tests "$dir"
    cp -- moleculesde/*.[ch] "$dir/moleculesde"
    ln -sfn "$top/data" "$dir/data"
    local program
    for program in moleblend data_prep test moleculesde/{,test_}moleculesde; do
        $1 $std $warn $fast $flags $program.c -o "$dir/$program$end" $libs || return 1
        [ "$end" = .bin ] || continue  # a wrapper, so that the tests can call it too
        printf '#!/bin/sh\nexec %s "%s.bin" "$@"\n' "$run" "$dir/$program" > "$dir/$program"
        chmod +x "$dir/$program"
    done
}

tiny="--size tiny --dim 32 --ffn 32 --batch-size 8 --threads 1"
datasets() {  # what `make` makes of the sample, and a small one
    port data_prep -o '{}.bin' --split 0.9,0.1 --split-by random --labels logP,TPSA data/sample.sdf &&
        port data_prep -o 'head.{}.bin' --split 0.9,0.1 --labels logP,TPSA head.sdf
}
checkpoint() { port moleblend head.train.bin $tiny --steps 5 -o m.safetensors; }
embed() { port moleblend embed head.valid.bin --model "$1" -o "$2"; }
predict() { port moleblend predict head.valid.bin --model "$1"; }

npy() { od -An -v -w4 -t f4 -j $((10 + $(od -An -t u2 -j 8 -N 2 "$1"))) "$1"; }      # its numbers
csv() {  # FILE NAMES: the numbers of these columns
    awk -F, 'NR == 1 { for (k = 1; k <= NF; k++) use[k] = index(" " names " ", " " $k " "); next }
             { for (k = 1; k <= NF; k++) if (use[k]) print $k }' names="$2" "$1"
}
gap() {  # relative error of two lists of numbers; 9 if they are not as long, or not numbers
    paste "$1" "$2" | awk '{ if (NF != 2 || $0 ~ /[nN]|\r/) bad = 1; d += ($1 - $2) ^ 2; n += $2 ^ 2 }
                           END { print NR == 0 || bad || n == 0 ? 9 : sqrt(d / n) }'
}

reference() {  # gcc, SSE2, one thread, in $dir: what all others are compared with
    end='' run='' std=-std=c11 flags=-O2 libs=-lm
    build gcc && datasets && checkpoint && embed m.safetensors m.npy &&
        port moleblend finetune head.train.bin $tiny --epochs 1 -o tuned.safetensors &&
        predict tuned.safetensors > "$dir/tuned.csv"
}

compare() {  # sets $same and $error; works on the platform's files and the reference's
    local file worst losses="total denoise spd edge 3d"
    same="same bytes" error=FAILED
    datasets || { same=FAILED; return; }
    for file in {,head.}{train,valid}.bin; do cmp "$base/$file" "$dir/$file" || same=FAILED; done
    cp "$base/tuned.safetensors" "$dir/tuned.safetensors"
    checkpoint && embed m.safetensors m.npy && predict tuned.safetensors > "$dir/tuned.csv" || return
    ! grep $'\r' "$dir/tuned.csv" || return
    (dir=$base run='' end='' && embed "$dir_here/m.safetensors" "$dir_here/read.npy") || return
    worst=$({ gap <(csv "$dir/m.log.csv" "$losses") <(csv "$base/m.log.csv" "$losses")
              gap <(csv "$dir/tuned.csv" "logP TPSA") <(csv "$base/tuned.csv" "logP TPSA")
              gap <(npy "$dir/read.npy") <(npy "$dir/m.npy"); } | tee -a /dev/stderr | sort -g | tail -n 1)
    error=$(awk -v e="$worst" 'BEGIN { if (e <= 1e-4) printf "%.0e", e; else print "FAILED" }')
}

run_tests() {  # PROGRAM ARGUMENT...: adds to $passed
    local last verdict="FAILED: "
    port "$@" && verdict=''
    last=$(tail -n 1 "$dir/log" | tr -d '\r')
    case $last in *", 0 failed") last=${last%% *} ;; *) verdict="FAILED: " ;; esac
    passed+="${passed:+ + }$verdict$last"
}

try() {  # COMPILER: sets $passed, $same, $error
    same=- error=- passed=''
    local without=() sde_without=("no group")
    if [ -n "$refused" ] && $refused; then passed="FAILED: compiles"; return; fi
    build "$1" || { passed="FAILED: does not compile"; return; }
    [ "$run" != none ] || { passed="compiled and linked"; return; }
    [ "$tests" = all ] || without=("${slow[@]}")
    [ "$tests" = all ] || [[ $run != qemu* ]] || without+=("${tedious[@]}")
    case $end in .wasm | .exe) sde_without=("${programs[@]}") ;; esac
    [ "$tests" = all ] || sde_without=("${sde_slow[@]}")
    [ "$tests" = all ] || [[ $run != qemu* ]] || sde_without+=("${sde_tedious[@]}")
    case $end in .wasm | .exe) without+=("${shell[@]}") sde_without+=("${sde_shell[@]}") ;; esac
    compare
    if [ "$end" = .wasm ]; then  # where no program can start another
        run_tests test "${alone[@]}"
    else
        run_tests test --without "busy machine" "${without[@]}"  # that one tells of the machine's load
    fi
    run_tests moleculesde/test_moleculesde --without "${sde_without[@]}"
    [ "$tests" = all ] && [ "$end" != .wasm ] || passed+=" (quick)"
}

[ "${1:-}" != --list ] || { echo $names; exit; }
mkdir -p "$work"
cat > "$work/wasi.py" << 'PYTHON'
import os, sys, wasmtime
config = wasmtime.Config()
config.cache = True
engine, wasi = wasmtime.Engine(config), wasmtime.WasiConfig()
linker, store = wasmtime.Linker(engine), wasmtime.Store(engine)
linker.define_wasi()
wasi.argv = sys.argv[1:]
wasi.inherit_stdin(), wasi.inherit_stdout(), wasi.inherit_stderr()
wasi.preopen_dir(".", "."), wasi.preopen_dir(os.path.realpath("data"), "data")
store.set_wasi(wasi)
try:
    linker.instantiate(store, wasmtime.Module.from_file(engine, sys.argv[1])).exports(store)["_start"](store)
except wasmtime.ExitTrap as end:
    sys.exit(end.code)
PYTHON

for name in "${@:-$names}"; do for name in $name; do platform "$name"; done; done  # all known?
base=$work/reference dir=$work/reference
mkdir -p "$dir"
awk '{ print } /^\$\$\$\$/ && ++n == 120 { exit }' data/sample.sdf > "$dir/head.sdf"
reference > "$dir/log" 2>&1 || { echo "the reference failed: $dir/log"; exit 1; }
echo "| platform | compiler | tests passed | datasets | numbers | date |"
echo "|---|---|---|---|---|---|"
for name in $(echo "${@:-$names}"); do
    platform "$name"
    row=("" "" "" "") n=0
    for compiler in "${compilers[@]}"; do
        dir=$work/$name-$((++n)) dir_here=$dir
        lacks=$(missing "$compiler")
        if [ -n "$lacks" ]; then
            cells=("$compiler" "not tried: no $lacks" - -)
        else
            rm -rf "$dir"
            mkdir -p "$dir"
            cp "$base/head.sdf" "$dir"
            try "$compiler" >> "$dir/log" 2>&1 < /dev/null
            tool=${compiler%% *}
            [[ $compiler != *ziglang* ]] || tool="zig's clang"
            cells=("$tool $($compiler -dumpversion 2> /dev/null)" "$passed" "$same" "$error")
            [[ "${cells[*]}" != *FAILED* ]] || failed=1
        fi
        for k in 0 1 2 3; do [ "${row[k]}" = "${cells[k]}" ] || row[k]+="${row[k]:+, }${cells[k]}"; done
    done
    echo "| $label | ${row[0]} | ${row[1]} | ${row[2]} | ${row[3]} | $(date +%F) |"
done
echo
echo "tests passed: moleblend's and data_prep's + moleculesde's"
echo "quick: without the groups $(printf '%s, ' "${slow[@]}")and on WASI only $(printf '%s, ' "${alone[@]}")which start no programs;"
echo "by an emulator also without $(printf '%s, ' "${tedious[@]}")on Windows $(printf '%s, ' "${shell[@]}")"
echo "of moleculesde's without $(printf '%s, ' "${sde_slow[@]}")by an emulator $(printf '%s, ' "${sde_tedious[@]}")on WASI and Windows without $(printf '%s, ' "${programs[@]}" "${sde_shell[@]}")"
exit $failed
