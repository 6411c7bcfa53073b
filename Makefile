# make            builds moleblend and data_prep, and train.bin and valid.bin from the bundled sample
# make test       builds and runs every test; the last line is "N passed, N failed"
# make moleculesde  the sibling program, see moleculesde/README.md
# make bench      speed of the kernels and of a training step, next to the machine's FMA peak
# make mpi        builds moleblend_mpi for clusters (needs Open MPI or another MPI)
# make check      static analysis: gcc -fanalyzer, clang-tidy, cppcheck
# make asan tsan  the tests under AddressSanitizer + UBSan; short runs under TSan (clang, libomp's Archer)
# make debug      unoptimised programs for a debugger
# make clean
#
# CC=clang        another compiler                 ARCH=     portable code, for any machine
# OMP=0           without OpenMP (one thread)

CC ?= gcc
ARCH ?= $(NATIVE)
OMP ?= 1
WARN = -std=c11 -Wall -Wextra -Wshadow -Wvla -Wdouble-promotion -Wno-psabi
FAST = -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp-simd
CFLAGS ?=
LIBS = -lm

# Is there an OpenMP that links and runs? On a Mac, libomp from Homebrew is tried too.
PROBE = (printf '\#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n' > build/omp.c \
        && $(CC) $(1) build/omp.c -o build/omp $(2) && build/omp) 2> /dev/null
BREW := $(shell brew --prefix libomp 2> /dev/null)
MADE := $(shell mkdir -p build && echo 'int one;' > build/arch.c)
# Not every compiler knows it.
NATIVE := $(shell $(CC) -march=native -c build/arch.c -o build/arch.o 2> /dev/null && echo -march=native)
ifneq ($(OMP),0)
ifeq ($(shell $(call PROBE,-fopenmp,) && echo yes),yes)
  OMPFLAGS = -fopenmp
else ifneq ($(BREW),)
ifeq ($(shell $(call PROBE,-Xpreprocessor -fopenmp -I$(BREW)/include,-L$(BREW)/lib -lomp) && echo yes),yes)
  OMPFLAGS = -Xpreprocessor -fopenmp -I$(BREW)/include
  LIBS += -L$(BREW)/lib -lomp
endif
endif
endif
LIB = moleblend.h $(wildcard lib/*.h) Makefile
COMMANDS = $(wildcard commands/*.h)
PREP = $(wildcard prep/*.h)
ALL = $(WARN) $(FAST) $(ARCH) $(OMPFLAGS) $(CFLAGS)

all: moleblend data_prep train.bin valid.bin
	@echo "built with $(CC), $(if $(OMPFLAGS),OpenMP,one thread ($(if $(filter 0,$(OMP)),OMP=0,no OpenMP found: install libomp, or use gcc))). Next: ./moleblend train.bin"

moleblend: moleblend.c $(COMMANDS) $(LIB)
	$(CC) $(ALL) moleblend.c -o $@ $(LIBS)

# For clusters: one program on many machines, `mpirun -n 4 ./moleblend_mpi train.bin --micro-batch 32`
mpi: moleblend_mpi
moleblend_mpi: moleblend.c $(COMMANDS) $(LIB)
	OMPI_CC="$(CC)" mpicc $(ALL) -DMB_MPI moleblend.c -o $@ $(LIBS)

data_prep: data_prep.c $(PREP) $(LIB)
	$(CC) $(ALL) data_prep.c -o $@ $(LIBS)

build/test: test.c $(wildcard tests/*.h) moleblend.c data_prep.c $(COMMANDS) $(PREP) $(LIB)
	$(CC) $(ALL) test.c -o $@ $(LIBS)

SDE = moleculesde/moleculesde.c moleculesde/model.h moleculesde/run.c moleblend.c $(COMMANDS) $(LIB)

moleculesde/moleculesde: $(SDE)
	$(CC) $(ALL) moleculesde/moleculesde.c -o $@ $(LIBS)

moleculesde: moleculesde/moleculesde

build/test_moleculesde: moleculesde/test_moleculesde.c tests/harness.h $(SDE)
	$(CC) $(ALL) moleculesde/test_moleculesde.c -o $@ $(LIBS)

build/bench_openblas: dev/bench.c moleblend.c $(LIB)
	$(CC) $(ALL) -DOPENBLAS dev/bench.c -o $@ $(LIBS) -lopenblas

build/bench: dev/bench.c moleblend.c $(LIB)
	$(CC) $(ALL) dev/bench.c -o $@ $(LIBS)

valid.bin: train.bin
train.bin: data/sample.sdf data_prep
	./data_prep -o '{}.bin' --split 0.9,0.1 --split-by random --labels logP,TPSA data/sample.sdf

test: all build/test moleculesde build/test_moleculesde
	cp build/test test
	OMP_WAIT_POLICY=passive build/test_moleculesde
	OMP_WAIT_POLICY=passive ./test

bench: all build/bench
	build/bench

asan:
	$(MAKE) clean
	$(MAKE) test CC="$(CC)" OMP=$(OMP) CFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"
	$(MAKE) clean

tsan: export TSAN_OPTIONS = ignore_noninstrumented_modules=1
tsan:
	$(MAKE) clean
	$(MAKE) moleblend moleculesde data_prep train.bin CC=clang CFLAGS="-O1 -g -fsanitize=thread"
	./moleblend train.bin --size tiny --steps 5 -o build/tsan.safetensors
	./moleblend finetune train.bin --init build/tsan.safetensors --epochs 1 -o build/tsan2.safetensors
	./moleblend embed valid.bin --model build/tsan.safetensors -o build/tsan.npy
	./moleculesde/moleculesde train.bin --dim 32 --batch-size 16 --steps 3 -o build/tsan3.safetensors
	$(MAKE) clean

debug:
	$(CC) $(WARN) -O0 -g $(OMPFLAGS) moleblend.c -o moleblend $(LIBS)
	$(CC) $(WARN) -O0 -g $(OMPFLAGS) data_prep.c -o data_prep $(LIBS)

check:
	dev/check.sh

clean:
	rm -rf build moleblend moleblend_mpi data_prep test train.bin valid.bin moleculesde/moleculesde

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

.PHONY: check mpi all test moleculesde bench asan tsan debug clean help
