// fuzz.c - libFuzzer's entry point: whole runs of a program, inside one process, on files that the
// fuzzer makes up. run.sh compiles it with -DDATA_PREP or -DMOLECULESDE for these programs, without
// for moleblend. The name that it is called by says which kind of file is to be made up: a target
// of run.sh.
//
// The program's main() is called as a function. What would end the process or outlive a run is
// caught by macros: exit() is a jump back to the harness, memory and files are given back there,
// and a mapped file is a block of the heap of just its size, so that AddressSanitizer sees every
// read beyond it. The sources are run.sh's copies, with smaller buffers and without checksums.
//
// Besides what the sanitizers find it is a finding if a run
//   - leaves memory behind though it ended well, or an unfinished output in any case;
//   - takes more than MEMORY_MAX;
//   - of data_prep writes a dataset that its own reader refuses.

#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <sanitizer/asan_interface.h>

enum { MEMORY_MAX = 256 << 20, FILES_MAX = 16 };

// Says what is wrong besides what sanitizers know, and ends with a report.
#define FINDING(...) (dprintf(2, "FINDING: " __VA_ARGS__), dprintf(2, "\n"), abort())

// =================================================================================================
// 1 What a run takes, and gives back
// =================================================================================================

// In front of every block. It is poisoned, so that a write before a block is seen too.
typedef struct Block {
    struct Block *next, **link;
    size_t size, unused[5];
} Block;

static Block *all_blocks;
static size_t memory_used;
static FILE *files[FILES_MAX];
static FILE *said;  // what programs say goes to /dev/null
static jmp_buf program_ended;
static const char *target;
static void (*at_exit)(void);  // what the program wants done then

#define UNCHECKED __attribute__((no_sanitize("address")))

UNCHECKED static void block_unlink(Block *b) {
    *b->link = b->next;
    if (b->next) b->next->link = b->link;
    memory_used -= b->size;
}

// realloc(); for p = NULL a block on a cache line.
UNCHECKED static void *fuzz_realloc(void *p, size_t size) {
    Block *b = p ? (Block *)p - 1 : NULL;
    void *fresh = NULL;
    if (b) block_unlink(b);
    if (size > MEMORY_MAX - memory_used)
        FINDING("%zu MiB and %zu bytes more", memory_used >> 20, size);
    if (b) b = realloc(b, sizeof *b + size);
    else if (posix_memalign(&fresh, sizeof *b, sizeof *b + size) == 0) b = fresh;
    ASAN_UNPOISON_MEMORY_REGION(b, sizeof *b);
    *b = (Block){all_blocks, &all_blocks, size, {0}};
    if (all_blocks) all_blocks->link = &b->next;
    all_blocks = b;
    memory_used += size;
    ASAN_POISON_MEMORY_REGION(b, sizeof *b);
    return b + 1;
}

static void *fuzz_malloc(size_t size) { return fuzz_realloc(NULL, size); }

static void *fuzz_calloc(size_t count, size_t size) {
    return memset(fuzz_realloc(NULL, count * size), 0, count * size);
}

static void fuzz_free(void *p) {
    if (!p) return;
    block_unlink((Block *)p - 1);
    free((Block *)p - 1);
}

// A file that has been opened, or NULL.
static FILE *fuzz_file(FILE *f) {
    int k = 0;
    while (k < FILES_MAX && files[k]) k++;
    if (k == FILES_MAX) FINDING("too many open files");
    return files[k] = f;
}

static int fuzz_fclose(FILE *f) {
    for (int k = 0; k < FILES_MAX; k++)
        if (files[k] == f) files[k] = NULL;
    return fclose(f);
}

// A mapped file: its bytes, in a block of just its size.
static void *fuzz_mmap(int fd, size_t size) {
    char *bytes = fuzz_malloc(size);
    if (read(fd, bytes, size) != (ssize_t)size) FINDING("cannot read a mapped file");
    return bytes;
}

static int target_is(const char *name) { return strcmp(target, name) == 0; }

_Noreturn static void fuzz_exit(int code) { longjmp(program_ended, code + 1); }

#define malloc(size) fuzz_malloc(size)
#define calloc(count, size) fuzz_calloc(count, size)
#define aligned_alloc(alignment, size) fuzz_malloc(size)
#define realloc(p, size) fuzz_realloc(p, size)
#define free(p) fuzz_free(p)
#define fopen(path, mode) fuzz_file(fopen(path, mode))
#define fdopen(fd, mode) fuzz_file(fdopen(fd, mode))
#define fclose(f) fuzz_fclose(f)
#define mmap(at, size, protection, flags, fd, offset) fuzz_mmap(fd, size)
#define fsync(fd) 0
#define munmap(p, size) fuzz_free(p)
#define exit(code) fuzz_exit(code)
#define atexit(function) (at_exit = (function), 0)
#undef stderr
#define stderr said

// =================================================================================================
// 2 The program
// =================================================================================================

#define main program_main
#ifdef DATA_PREP
#include "data_prep.c"
typedef PrepOptions ProgramOptions;
#define program_options prep_opt
#else
#include "moleblend.h"
#define signals_catch() (void)0  // signals are the fuzzer's own
#ifdef MOLECULESDE
#include "moleculesde/moleculesde.c"
#else
#include "moleblend.c"
#endif
typedef Options ProgramOptions;
#define program_options opt
#endif
#undef main

// Gives back what lives until a program ends.
static void end_program(void) {
    for (int k = 0; k < mb_n_files; k++)
        FREE_ALL(mb_files[k].path, mb_files[k].place, mb_files[k].file);
    FREE_ALL(mb_files, mb_stdin);
    mb_files = NULL;
    mb_n_files = 0;
    mb_stdin = NULL;
#ifndef DATA_PREP
    for (int k = 0; k < 16; k++) free(thread_scratch[0].array[k].x);  // there is one thread
    FREE_ALL(pack_room.a, pack_room.b);
    memset(thread_scratch, 0, sizeof *thread_scratch);
    memset(&pack_room, 0, sizeof pack_room);
#endif
}

// Gives back what a run that ended early still holds.
static void clean_up_run(void) {
    mb_unfinished = NULL;
    memset(mb_mapped, 0, sizeof mb_mapped);
    while (all_blocks) fuzz_free(all_blocks + 1);
    for (int k = 0; k < FILES_MAX; k++)
        if (files[k]) fuzz_fclose(files[k]);
}

// Runs the program with this command line; returns its exit code.
static int run_program(const char *command) {
    static ProgramOptions first;
    static int begun;
    char text[512], *argv[40] = {0};
    int argc = 0;
    if (!begun) first = program_options;
    if (!begun) said = (fopen)("/dev/null", "w");
    begun = 1;
    program_options = first;
#ifndef DATA_PREP
    memset(option_given, 0, sizeof option_given);
#endif
    mb_signal = 0;
    snprintf(text, sizeof text, "%s", command);
    for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
    int code = setjmp(program_ended);
    if (code == 0) code = 1 + program_main(argc, argv);
    if (at_exit) at_exit();
    end_program();
    // texts of options that stand in a file stay, as long as a process
    size_t texts = strstr(target, "state") || strstr(target, "sde") ? 1000 : 0;
    if (code == 1 && memory_used > texts) FINDING("%zu bytes not freed", memory_used);
    clean_up_run();
    return code - 1;
}

// =================================================================================================
// 3 One input. Names of files are relative: run.sh starts the fuzzer in a scratch folder, where it
//   has put a dataset and a model.
// =================================================================================================

// What is done to it: one of its target's command lines, drawn by a hash of the input.
static const struct { const char *targets, *command; } RUNS[] = {
#ifdef DATA_PREP
    {"sdf v3000", "data_prep -o out.bin --format sdf input"},
    {"sdf v3000", "data_prep -o out.bin --format sdf input --labels all --orient principal"},
    {"sdf v3000", "data_prep -o out.bin --format sdf input --keep-hydrogens"},
    {"sdf v3000", "data_prep -o out.{}.bin --format sdf input --split 0.5,0.5 "
                  "--name id --labels a"},
    {"smiles", "data_prep -o out.bin --format smi input"},
    {"smiles", "data_prep -o out.bin --format smi input --keep-hydrogens"},
    {"smiles", "data_prep -o out.bin --format smi input --strict --max-atoms 20"},
    {"smiles", "data_prep -o out.{}.bin --format smi input --split 0.5,0.5"},
    {"csv", "data_prep -o out.bin --format csv input"},
    {"csv", "data_prep -o out.bin --format csv input --labels all"},
    {"csv", "data_prep -o out.bin --format csv input --labels a,b --name id"},
    {"csv", "data_prep -o out.{}.bin --format csv input --labels all --split 0.5,0.5 --split-by "
            "random"},
#elif defined(MOLECULESDE)
#define TINY " --dim 8 --layers 1 --blocks 1 --filters 4 --gaussians 3 --batch-size 2 "
#define TINY_SDE TINY "--hidden 8 --width 4 --channels 1 --last-channels 1 -o "
    {"sde-tensors", "moleculesde embed data.bin --model input --encoder 3d -o out.safetensors"},
    {"sde-tensors", "moleculesde predict data.bin --model input"},
    {"sde-tensors", "moleculesde generate data.bin 0 --model input --copies 1 --sample-steps 2 -o "
                    "out.safetensors"},
    {"sde-tensors", "moleculesde data.bin --steps 1 --init input" TINY_SDE "out.safetensors"},
    {"sde-tensors", "moleculesde finetune data.bin --valid data.bin --epochs 1 --init input -o "
                    "out.safetensors"},
    {"sde-state", "moleculesde data.bin --steps 2 --resume" TINY_SDE "input"},
    {"sde-state", "moleculesde finetune data.bin --valid data.bin --epochs 2 --resume" TINY
                  "-o input"},
#else
#define TINY " --layers 1 --dim 8 --ffn 8 --heads 2 --kernels 3 -o "
    {"dataset", "moleblend show input 0"},
    {"dataset", "moleblend predict input --model model.safetensors"},
    {"dataset", "moleblend input --steps 1" TINY "out.safetensors"},
    {"dataset", "moleblend finetune input --valid input --epochs 1" TINY "out.safetensors"},
    {"tensors", "moleblend embed data.bin --model input"},
    {"tensors", "moleblend predict data.bin --model input"},
    {"tensors", "moleblend data.bin --steps 1 --init input -o out.safetensors"},
    {"tensors", "moleblend finetune data.bin --valid data.bin --epochs 1 --init input -o "
                "out.safetensors"},
    {"state", "moleblend data.bin --steps 2 --resume" TINY "input"},
#endif
};
enum { N_RUNS = sizeof RUNS / sizeof RUNS[0] };

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    const char *slash = strrchr((*argv)[0], '/');
    (void)argc;
    target = slash ? slash + 1 : (*argv)[0];
    return 0;
}

// Writes the input where the commands look for it; of V3000 only what is behind COUNTS is made up.
static void write_input(const uint8_t *data, size_t size) {
    static const char v3000[] = "\n  x                   3D\n\n"
                                "  0  0  0     0  0            999 V3000\n"
                                "M  V30 BEGIN CTAB\nM  V30 COUNTS ";
    const char *path = strstr(target, "state") ? "input.state" : "input";
    size_t n = target_is("v3000") ? sizeof v3000 - 1 : 0;
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0 || write(fd, v3000, n) != (ssize_t)n || write(fd, data, size) != (ssize_t)size ||
        close(fd) != 0)
        FINDING("cannot write the input");
}

// The command line for an input. Any change of the input may change it.
static const char *draw_command(const uint8_t *data, size_t size) {
    unsigned hash = 0, n = 0, which[N_RUNS] = {0};
    for (size_t k = 0; k < size; k++) hash = hash * 31 + data[k];
    for (unsigned k = 0; k < N_RUNS; k++)
        if (strstr(RUNS[k].targets, target)) which[n++] = k;
    if (n == 0) FINDING("%s: no target of that name", target);
    return RUNS[which[(hash >> 3) % n]].command;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const unfinished[] = {"out.bin.tmp", "out.{}.bin.records.tmp",
                                             "out.train.bin.tmp", "out.valid.bin.tmp",
                                             "out.safetensors.tmp", "out.run.tmp",
                                             "out.safetensors.state.tmp", "input.run.tmp"};
    const char *command = draw_command(data, size);
    write_input(data, size);
    int code = 0;
    if (target_is("dataset") || target_is("tensors")) code = run_program("moleblend info input");
    if (code == 0) code = run_program(command);
    for (size_t k = 0; k < sizeof unfinished / sizeof *unfinished; k++)
        if (access(unfinished[k], F_OK) == 0) FINDING("%s left behind", unfinished[k]);
#ifdef DATA_PREP
    if (code == 0 && strstr(command, "out.bin") && run_program("data_prep --dump out.bin") != 0)
        FINDING("data_prep cannot read its dataset");
#endif
    return 0;
}

// =================================================================================================
// 4 Mutations that keep sizes consistent, without which hardly any would get beyond the first check
// =================================================================================================

#ifndef DATA_PREP
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

// Of a tensor file mostly the header is changed, and its length with it.
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    static uint8_t rest[1 << 20];
    uint64_t length = size >= 8 ? get_u64(data) : 0;
    if (target_is("dataset") || seed % 8 == 0 || size < 8 || length > size - 8) {
        size = LLVMFuzzerMutate(data, size, max_size);
        if (target_is("dataset") && size >= DATASET_HEADER && seed % 8) put_u64(data + 32, size);
        return size;
    }
    size_t n = size - 8 - length;
    memcpy(rest, data + 8 + length, n);
    length = LLVMFuzzerMutate(data + 8, length, max_size - 8 - n);
    memcpy(data + 8 + length, rest, n);
    put_u64(data, length);
    return 8 + length + n;
}
#endif
