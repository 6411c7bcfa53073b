// moleblend.h - what moleblend.c and data_prep.c share
//
//   1 errors           DIE, CHECK: one line on stderr, exit 1, unfinished outputs removed
//   2 memory           xmalloc, xrealloc: sizes are checked before they are multiplied
//   3 output files     OutFile: written beside the target, renamed when complete
//   4 being stopped    signals that ask for an orderly end; threads and CPU time on a busy machine
//   5 random numbers   Philox4x32-10: a draw depends on nothing but its name
//   6 options          one table drives parsing, range checks and --help
//   7 progress         done, rate and time left, on stderr
//   8 molecules        the record both programs exchange, and its vocabularies
//   9 dataset files    format (documented there), writer, reader
//  10 tensor files     safetensors: reader, writer, what is in a file
//  11 metrics          ROC-AUC, average precision, RMSE, MAE, R2
//
// All functions are static inline: a program is one .c file and this header, nothing to link.
#ifndef MOLEBLEND_H
#define MOLEBLEND_H

#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L  // fsync, mmap, isatty; harmless where they do not exist
#endif
#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#define MB_POSIX 1
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#define MB_POSIX 0
#include <io.h>
#endif

#ifndef MB_PROGRAM
#define MB_PROGRAM "moleblend"  // the name in front of every error message
#endif

#define MB_VERSION "1.0"

#if !defined(_OPENMP) && (defined(__GNUC__) || defined(__clang__))
#pragma GCC diagnostic ignored "-Wunknown-pragmas"  // without OpenMP its pragmas mean nothing
#endif
#ifdef _OPENMP
#define MB_OPENMP 1
#else
#define MB_OPENMP 0
#endif
#if defined(__GNUC__) || defined(__clang__)
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE static inline
#endif

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }
static inline size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

// n rounded up to a multiple of m.
static inline int round_up(int n, int m) { return (n + m - 1) / m * m; }

// =================================================================================================
// 1 Errors. A message states the file (and line or record), what was expected and what was found:
//   DIE("%s:%d: expected a bond count, found \"%s\"", path, line, text)
// There is no other way out of a program that failed.
// =================================================================================================

#if defined(__GNUC__) || defined(__clang__)
#define MB_PRINTF(fmt, first) __attribute__((format(printf, fmt, first)))
#define MB_NORETURN __attribute__((noreturn))
#else
#define MB_PRINTF(fmt, first)
#define MB_NORETURN
#endif

// A file being written: `tmp` until out_commit() renames it to `path`.
typedef struct OutFile {
    FILE *file;
    char *path, *tmp;
    struct OutFile *next;  // list of unfinished outputs, see mb_unfinished
} OutFile;

static OutFile *mb_unfinished;  // outputs to remove when the program dies

// Ends the program with this exit code; unfinished outputs are removed.
MB_NORETURN static inline void mb_exit(int code) {
    for (OutFile *out = mb_unfinished; out; out = out->next) {
        if (MB_POSIX) remove(out->tmp);  // while its lock is held
        if (out->file) fclose(out->file);
        if (!MB_POSIX) remove(out->tmp);
    }
    exit(code);
}

// Prints "PROGRAM: message", removes unfinished outputs, exits 1. If several threads fail, the
// first one speaks and the others wait for the end.
MB_NORETURN MB_PRINTF(1, 2) static inline void mb_die(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
#ifdef _OPENMP
#pragma omp critical(mb_die)
#endif
    {
        fflush(stdout);
        fputs(MB_PROGRAM ": ", stderr);
        vfprintf(stderr, fmt, args);
        fputc('\n', stderr);
        mb_exit(EXIT_FAILURE);
    }
    abort();  // not reached; a compiler cannot know
}
#define DIE(...) mb_die(__VA_ARGS__)
#define CHECK(cond, ...) do { if (!(cond)) DIE(__VA_ARGS__); } while (0)

// Dies if something that was printed got lost, on a full disk for example.
static inline void stdout_check(void) {
    CHECK(fflush(stdout) == 0 && !ferror(stdout), "standard output: write failed: %s",
          strerror(errno));
}

// =================================================================================================
// 2 Memory
// =================================================================================================

// a * b, or the end of the program if that does not fit.
static inline size_t mul_size(size_t a, size_t b) {
    CHECK(b == 0 || a <= SIZE_MAX / b, "out of memory: %zu x %zu bytes cannot be addressed", a, b);
    return a * b;
}

// `count` zeroed elements of `size` bytes; never NULL. The caller frees.
static inline void *xmalloc(size_t count, size_t size) {
    size_t bytes = mul_size(count, size);
    void *p = calloc(bytes ? bytes : 1, 1);
    CHECK(p, "out of memory: %.1f MiB were refused", (double)bytes / (1 << 20));
    return p;
}

// Resizes p (which may be NULL) to `count` elements of `size` bytes; new elements are not zeroed.
static inline void *xrealloc(void *p, size_t count, size_t size) {
    size_t bytes = mul_size(count, size);
    p = realloc(p, bytes ? bytes : 1);
    CHECK(p, "out of memory: %.1f MiB were refused", (double)bytes / (1 << 20));
    return p;
}

// printf into fresh memory. The caller frees.
MB_PRINTF(1, 2) static inline char *xprintf(const char *fmt, ...) {
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, fmt, args);
    va_end(args);
    CHECK(n >= 0, "cannot format \"%s\"", fmt);
    char *text = xmalloc((size_t)n + 1, 1);
    vsnprintf(text, (size_t)n + 1, fmt, again);
    va_end(again);
    return text;
}

// =================================================================================================
// 3 Output files. Whole or not at all: data goes to PATH.tmp, which out_commit() flushes to the
//   disk and renames. Every write is checked; a full disk shows at the latest in out_commit().
//   PATH may only be a regular file or nothing: to rename onto a device would remove it.
//   PATH.tmp is locked while it is written, so two programs with one output never mix.
// =================================================================================================

#if MB_POSIX
// Opens and locks PATH.tmp, emptied; dies if another program has it. If that program renamed it
// between our opening and locking it, we hold a file that is no longer PATH.tmp: once more.
static inline FILE *out_lock(const char *tmp) {
    for (;;) {
        struct stat mine, named;
        struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        int fd = open(tmp, O_RDWR | O_CREAT, 0666);
        CHECK(fd >= 0, "%s: cannot write: %s", tmp, strerror(errno));
        if (fcntl(fd, F_SETLK, &lock) != 0 && (errno == EACCES || errno == EAGAIN)) {
            long holder = fcntl(fd, F_GETLK, &lock) == 0 ? (long)lock.l_pid : 0;
            DIE("%s: process %ld is writing it; wait for it, or give another -o", tmp, holder);
        }
        if (fstat(fd, &mine) == 0 && stat(tmp, &named) == 0 && mine.st_ino == named.st_ino &&
            ftruncate(fd, 0) == 0)
            return fdopen(fd, "wb");
        close(fd);
    }
}
#endif

// Opens PATH.tmp for writing. `out` must stay where it is until out_commit().
static inline void out_open(OutFile *out, const char *path) {
#if MB_POSIX
    struct stat info;
    CHECK(stat(path, &info) != 0 || S_ISREG(info.st_mode),
          "%s: cannot write: expected a regular file", path);
#endif
    out->path = xprintf("%s", path);
    out->tmp = xprintf("%s.tmp", path);
#if MB_POSIX
    out->file = out_lock(out->tmp);
#else
    out->file = fopen(out->tmp, "wb");
#endif
    CHECK(out->file, "%s: cannot write: %s", out->tmp, strerror(errno));
    setvbuf(out->file, NULL, _IOFBF, 1 << 16);
    out->next = mb_unfinished;
    mb_unfinished = out;
}

static inline void out_write(OutFile *out, const void *data, size_t size) {
    CHECK(fwrite(data, 1, size, out->file) == size, "%s: write failed: %s", out->tmp,
          strerror(errno));
}

// Takes a closed file off the list of unfinished outputs.
static inline void out_forget(OutFile *out) {
    OutFile **link = &mb_unfinished;
    while (*link != out) link = &(*link)->next;
    *link = out->next;
    free(out->path);
    free(out->tmp);
}

// Closes the file and removes it: PATH stays as it was.
static inline void out_discard(OutFile *out) {
    if (MB_POSIX) remove(out->tmp);
    fclose(out->file);
    if (!MB_POSIX) remove(out->tmp);
    out_forget(out);
}

// Dies now, not after hours of work, if PATH cannot be written.
static inline void out_probe(const char *path) {
    OutFile out;
    out_open(&out, path);
    out_discard(&out);
}

// Makes the file durable and gives it its name, before its lock ends with the file.
static inline void out_commit(OutFile *out) {
    int bad = fflush(out->file) != 0 || ferror(out->file);
#if MB_POSIX
    bad = bad || (fsync(fileno(out->file)) != 0 && errno != EINVAL);  // EINVAL: not a disk file
#else
    bad = bad || fclose(out->file) != 0;  // an open file cannot be renamed there
    out->file = NULL;
    remove(out->path);  // nor an existing one replaced
#endif
    CHECK(!bad, "%s: write failed: %s", out->tmp, strerror(errno));
    CHECK(rename(out->tmp, out->path) == 0, "%s: cannot rename to %s: %s", out->tmp, out->path,
          strerror(errno));
    if (out->file) fclose(out->file);
    out_forget(out);
}

// =================================================================================================
// 4 Being stopped, and sharing the machine. SIGINT, SIGTERM and SIGHUP ask for an orderly end: the
//   work at hand is finished and saved. Another one, two seconds later or more (timeout(1) sends
//   each twice), ends the program at once.
// =================================================================================================

static inline double now_seconds(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static volatile sig_atomic_t mb_signal;  // the one that came, or 0

static inline void mb_on_signal(int number) {
    static volatile time_t first;
    if (mb_signal && time(NULL) > first + 1) {
        signal(number, SIG_DFL);
        raise(number);
    }
    if (!mb_signal) first = time(NULL);
    mb_signal = number;
}

// From here on a signal sets mb_signal. One that is ignored (nohup) stays so.
static inline void signals_catch(void) {
#if MB_POSIX  // signal() may forget its handler after the first one
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    for (int k = 0; k < 3; k++) {
        struct sigaction action = {.sa_handler = mb_on_signal, .sa_flags = SA_RESTART}, before;
        sigemptyset(&action.sa_mask);
        if (sigaction(numbers[k], NULL, &before) == 0 && before.sa_handler != SIG_IGN)
            sigaction(numbers[k], &action, NULL);
    }
#else
    signal(SIGINT, mb_on_signal);
    signal(SIGTERM, mb_on_signal);
#endif
}

// CPUs that the quotas of our control groups (Linux: containers, batch systems) allow, 0 if there
// is none. `root` stands in front of every path; "" but in tests. Version 2 has "QUOTA PERIOD" or
// "max ..." in cpu.max, version 1 two files; the quotas of the groups above hold too.
static inline double cpu_quota(const char *root) {
    double cpus = 0;
    char line[1024], name[1200], *path = xprintf("%s/proc/self/cgroup", root);
    FILE *groups = fopen(path, "r");  // lines NUMBER:CONTROLLERS:GROUP
    free(path);
    while (groups && fgets(line, sizeof line, groups)) {
        char *kind = strchr(line, ':'), *group = kind ? strchr(kind + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        group[strcspn(group, "\n")] = 0;
        snprintf(name, sizeof name, ",%s,", kind + 1);
        if (kind[1] && !strstr(name, ",cpu,")) continue;
        for (char *slash = group; slash;) {
            double number[2] = {0, 0};  // quota, period
            for (int k = 0; k < (kind[1] ? 2 : 1); k++) {
                static const char *const files[] = {"cpu.cfs_quota_us", "cpu.cfs_period_us"};
                path = xprintf("%s/sys/fs/cgroup%s%s/%s", root, kind[1] ? "/cpu" : "", group,
                               kind[1] ? files[k] : "cpu.max");
                FILE *f = fopen(path, "r");
                if (f && fscanf(f, "%lf %lf", &number[k], &number[1]) < 1) number[k] = 0;
                if (f) fclose(f);
                free(path);
            }
            if (number[0] > 0 && number[1] > 0 && (cpus == 0 || number[0] / number[1] < cpus))
                cpus = number[0] / number[1];
            slash = strrchr(group, '/');
            if (slash) *slash = 0;
        }
    }
    if (groups) fclose(groups);
    return cpus;
}

// ---- threads. One that waits at the end of a parallel loop spins for a while, because waking it
//   takes longer than most loops. Beside other programs that is a disaster: the spinning threads
//   take the time that the one they wait for needs. So, where the environment says nothing, waiting
//   is short, and steps that do not get the CPUs they ask for are done with fewer threads. That
//   changes no result: threads share out results, never a sum.

#ifdef _OPENMP
static int mb_threads;   // most threads that we use; 0: threads_set() was not called
static int mb_adapting;  // may that number be lowered?
#endif

// Threads to provide memory for.
static inline int thread_count(void) {
#ifdef _OPENMP
    return mb_threads ? mb_threads : omp_get_max_threads();
#else
    return 1;
#endif
}

static inline int thread_id(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// To be called first in main(): makes waiting short. A hundredth of gcc's default is as fast on an
// idle machine. gcc's runtime has read its environment before main() begins, so the program begins
// again with another one.
static inline void threads_calm(char **argv) {
#if defined(_OPENMP) && MB_POSIX
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT") || getenv("KMP_BLOCKTIME")) return;
    if (setenv("MB_CALM", "1", 1) || setenv("GOMP_SPINCOUNT", "2000", 1)) return;
#if defined(__linux__) && !defined(__clang__)
    char path[4096];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    if (n <= 0) return;
    path[n] = 0;
    execv(path, argv);  // if that fails: on as we are
#endif
#endif
    (void)argv;
}

// Sets the number of threads: `wanted`, or if that is 0 what the environment says, or as many as
// there are CPUs that we may use, by affinity and by quota.
static inline void threads_set(int64_t wanted) {
#ifdef _OPENMP
    double quota = cpu_quota("");
    mb_adapting = MB_POSIX && !wanted && getenv("MB_CALM") && !getenv("OMP_NUM_THREADS");
    if (!wanted && !getenv("OMP_NUM_THREADS") && quota > 0 && quota < omp_get_num_procs())
        wanted = quota < 1 ? 1 : (int64_t)(quota + 0.5);
    if (wanted) omp_set_num_threads((int)wanted);
    mb_threads = omp_get_max_threads();
#endif
    (void)wanted;
}

// To be called between steps. After two steps in which we got less than 0.6 CPUs a thread, the next
// 25 have as many threads as we got CPUs; then all are tried again.
static inline void threads_adapt(void) {
#ifdef _OPENMP
    static double wall, cpu;
    static int poor, rest;
    double now = now_seconds(), used = (double)clock() / CLOCKS_PER_SEC;
    int threads = omp_get_max_threads();
    if (!mb_adapting || now - wall < 0.01) return;  // too short to tell
    double got = (used - cpu) / (now - wall);
    poor = threads == mb_threads && wall > 0 && got < 0.6 * threads ? poor + 1 : 0;
    if (poor == 2) {
        omp_set_num_threads(got < 1.5 ? 1 : (int)(got + 0.5));
        rest = 25;
    } else if (threads < mb_threads && --rest == 0) {
        omp_set_num_threads(mb_threads);
        poor = 1;  // once is enough now
    }
    wall = now;
    cpu = used;
#endif
}

// =================================================================================================
// 5 Random numbers. Philox4x32-10 (Salmon et al., SC 2011; constants from there): a keyed mixing of
//   a 128-bit counter, no state. The counter is the draw's name (purpose, step, place, index), so a
//   draw does not depend on thread count, evaluation order, or on whether a run was resumed.
// =================================================================================================

enum RngPurpose {  // part of every draw's name; changing a number changes every run
    RNG_INIT, RNG_SHUFFLE, RNG_SPLIT, RNG_BLEND, RNG_FEATURE, RNG_NOISE,
    RNG_DENOISE_DROP, RNG_EMBED_DROP,
    RNG_ATTENTION_DROP = 1 << 8,   // + layer
    RNG_ACTIVATION_DROP = 2 << 8,  // + layer
    RNG_PATH_DROP = 3 << 8,        // + layer, two draws each
};

#define PHILOX_MUL0 0xD2511F53u
#define PHILOX_MUL1 0xCD9E8D57u
#define PHILOX_WEYL0 0x9E3779B9u
#define PHILOX_WEYL1 0xBB67AE85u

typedef struct { uint32_t word[4]; } Philox;

static inline Philox philox(Philox counter, uint64_t key) {
    uint32_t a = counter.word[0], b = counter.word[1], c = counter.word[2], d = counter.word[3];
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p = (uint64_t)PHILOX_MUL0 * a, q = (uint64_t)PHILOX_MUL1 * c;
        uint32_t next_a = (uint32_t)(q >> 32) ^ b ^ k0, next_c = (uint32_t)(p >> 32) ^ d ^ k1;
        b = (uint32_t)q;
        d = (uint32_t)p;
        a = next_a;
        c = next_c;
        k0 += PHILOX_WEYL0;
        k1 += PHILOX_WEYL1;
    }
    return (Philox){{a, b, c, d}};
}

// 32 random bits named (purpose, step, place, index) under this seed.
static inline uint32_t rng_bits(uint64_t seed, uint32_t purpose, uint32_t step, uint32_t place,
                                uint32_t index) {
    return philox((Philox){{index >> 2, place, step, purpose}}, seed).word[index & 3];
}

// Uniform in [0, 1): 24 bits, exactly representable in float32.
static inline float rng_uniform(uint64_t seed, uint32_t purpose, uint32_t step, uint32_t place,
                                uint32_t index) {
    return (float)(rng_bits(seed, purpose, step, place, index) >> 8) * 0x1p-24f;
}

// Standard normal (Box-Muller; uses the uniforms 2*index and 2*index + 1 of the same name).
static inline float rng_normal(uint64_t seed, uint32_t purpose, uint32_t step, uint32_t place,
                               uint32_t index) {
    double u = 1.0 - (double)rng_uniform(seed, purpose, step, place, 2 * index);  // (0, 1]
    double v = (double)rng_uniform(seed, purpose, step, place, 2 * index + 1);
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}

// Fills order[0..n) with a random permutation of 0..n-1 (Fisher-Yates), named (purpose, step).
static inline void rng_permutation(uint32_t *order, size_t n, uint64_t seed, uint32_t purpose,
                                   uint32_t step) {
    for (size_t i = 0; i < n; i++) order[i] = (uint32_t)i;
    for (size_t i = n; i > 1; i--) {
        uint64_t bits = rng_bits(seed, purpose, step, 0, (uint32_t)i);
        size_t j = (size_t)((bits * i) >> 32);
        uint32_t swap = order[i - 1];
        order[i - 1] = order[j];
        order[j] = swap;
    }
}

// =================================================================================================
// 6 Options. `--name value`, or `--name` alone for a flag. A table row holds the name, where the
//   value goes (its content at the start is the default), its bounds and its line of help.
// =================================================================================================

typedef enum { OPT_FLAG, OPT_INT, OPT_NUMBER, OPT_TEXT } OptionKind;

typedef struct {
    const char *name;      // with its dashes; NULL marks a heading, printed from `help`
    OptionKind kind;
    void *value;           // int *, int64_t *, double * or const char **
    double min, max;       // bounds of OPT_INT and OPT_NUMBER, both allowed
    const char *argument;  // what help calls the value, e.g. "N" or "FILE"
    const char *help;
    unsigned commands;     // bit set of the commands that take it (0: all)
} Option;

// Edit distance of two short strings (Levenshtein), at most 99.
static inline int edit_distance(const char *a, const char *b) {
    int row[64], n = (int)strlen(b);
    if (n > 63) return 99;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int above = row[j], best = diagonal + (a[i - 1] != b[j - 1]);
            if (above + 1 < best) best = above + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diagonal = above;
            row[j] = best;
        }
    }
    return row[n] < 99 ? row[n] : 99;
}

// Stores the value of one option, or dies with what was expected and what was found.
static inline void option_store(const Option *o, const char *text) {
    char *end = NULL;
    errno = 0;
    if (o->kind == OPT_TEXT) {
        *(const char **)o->value = text;
    } else if (o->kind == OPT_INT) {
        long long v = strtoll(text, &end, 10);
        CHECK(end != text && *end == 0 && !errno && (double)v >= o->min && (double)v <= o->max,
              "%s: expected a whole number from %.0f to %.0f, found \"%s\"", o->name, o->min,
              o->max, text);
        *(int64_t *)o->value = v;
    } else {
        double v = strtod(text, &end);
        CHECK(end != text && *end == 0 && v >= o->min && v <= o->max,
              "%s: expected a number from %g to %g, found \"%s\"", o->name, o->min, o->max, text);
        *(double *)o->value = v;
    }
}

// Parses argv[1..argc) against table[0..n) for one command (a bit, or 0). Other words go to
// words[0..max_words); returns how many there are. Dies on anything it does not know.
static inline int options_parse(const Option *table, int n, unsigned command, int argc, char **argv,
                                const char **words, int max_words) {
    int n_words = 0;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (arg[0] != '-' || arg[1] == 0) {
            CHECK(n_words < max_words, "unexpected argument \"%s\"; see --help", arg);
            words[n_words++] = arg;
            continue;
        }
        const Option *found = NULL, *nearest = NULL;
        int nearest_distance = 99;
        for (const Option *o = table; o < table + n; o++) {
            if (!o->name || (o->commands && command && !(o->commands & command))) continue;
            int distance = edit_distance(arg, o->name);
            if (distance == 0) found = o;
            if (distance < nearest_distance) {
                nearest_distance = distance;
                nearest = o;
            }
        }
        CHECK(found || !nearest || nearest_distance > 4, "unknown option %s; did you mean %s?", arg,
              nearest->name);
        CHECK(found, "unknown option %s; see --help", arg);
        if (found->kind == OPT_FLAG) {
            *(int *)found->value = 1;
        } else {
            CHECK(i + 1 < argc, "%s: expected a value (%s) after it", arg, found->argument);
            option_store(found, argv[++i]);
        }
    }
    return n_words;
}

// The value of an option as text.
static inline void option_value(char text[64], const Option *o) {
    if (o->kind == OPT_FLAG) snprintf(text, 64, "%d", *(int *)o->value);
    if (o->kind == OPT_INT) snprintf(text, 64, "%lld", (long long)*(int64_t *)o->value);
    if (o->kind == OPT_NUMBER) snprintf(text, 64, "%g", *(double *)o->value);
    if (o->kind == OPT_TEXT)
        snprintf(text, 64, "%s", *(const char **)o->value ? *(const char **)o->value : "");
}

// "--name value" of all rows that belong to `commands`, in fresh memory.
static inline char *options_describe(const Option *table, int n, unsigned commands) {
    char *all = xprintf("%s", ""), value[64];
    for (const Option *o = table; o < table + n; o++) {
        if (!o->name || !(o->commands & commands)) continue;
        option_value(value, o);
        char *longer = xprintf("%s%s%s %s", all, *all ? " " : "", o->name, value);
        free(all);
        all = longer;
    }
    return all;
}

// Prints the rows of the table that belong to a command (0: all), with their defaults.
static inline void options_print(const Option *table, int n, unsigned command) {
    for (const Option *o = table; o < table + n; o++) {
        if (o->commands && command && !(o->commands & command)) continue;
        if (!o->name) {
            printf("\n%s\n", o->help);
            continue;
        }
        char left[80], value[64];
        snprintf(left, sizeof left, "%s %s", o->name, o->argument ? o->argument : "");
        option_value(value, o);
        int shown = o->kind != OPT_FLAG && *value && (o->kind != OPT_INT || strcmp(value, "0"));
        printf("  %-24s %s%s%s%s\n", left, o->help, shown ? " (default " : "", shown ? value : "",
               shown ? ")" : "");
    }
}

// valid.bin (or test.bin) beside train.bin: the same path with the last "train" replaced, if there
// is such a file; else NULL. Lives as long as the program.
static inline const char *sibling(const char *train_path, const char *part) {
    static char paths[2][4096];
    const char *at = NULL;
    for (const char *s = train_path; (s = strstr(s, "train")); s++) at = s;
    char *path = paths[part[0] == 't'];
    if (!at || strlen(train_path) + 8 > sizeof paths[0]) return NULL;
    snprintf(path, sizeof paths[0], "%.*s%s%s", (int)(at - train_path), train_path, part, at + 5);
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    fclose(f);
    return path;
}

// A field of a CSV row on stdout, quoted if it must be.
static inline void print_csv(const char *text, size_t length) {
    int quote = 0;
    for (size_t k = 0; k < length; k++) quote |= strchr(",\"\r\n", text[k]) != NULL;
    if (quote) putchar('"');
    for (size_t k = 0; k < length; k++) {
        if (text[k] == '"') putchar('"');
        putchar(text[k]);
    }
    if (quote) putchar('"');
}

// =================================================================================================
// 7 Progress. One line on stderr, redrawn in place on a terminal and repeated now and then
//   elsewhere; stdout carries results only.
// =================================================================================================

typedef struct {
    double start, shown;  // seconds; when the work began, when a line was last shown
    double first;         // what had been done before this run (a resumed one)
    int terminal;
} Progress;

static inline Progress progress_begin(double already_done) {
    Progress p = {now_seconds(), 0, already_done, 0};
#if MB_POSIX
    p.terminal = isatty(fileno(stderr));
#else
    p.terminal = _isatty(_fileno(stderr));
#endif
    return p;
}

// Shows "text  12.3 %  1234 UNIT/s  1:23 left" if the last line is old enough (0.2 s on a
// terminal, 10 s elsewhere) or `last` is set. total = 0: unknown. work = units done in this run.
static inline void progress_show(Progress *p, double done, double total, double work,
                                 const char *unit, const char *text, int last) {
    double now = now_seconds(), elapsed = now - p->start;
    if (!last && now - p->shown < (p->terminal ? 0.2 : 10.0)) return;
    if (!last && !p->terminal && p->shown == 0) {  // the first plain line waits its turn too
        p->shown = now;
        return;
    }
    p->shown = now;
    fprintf(stderr, "%s%s", p->terminal ? "\r" : "", text);
    if (total > 0) fprintf(stderr, "  %5.1f %%", 100 * done / total);
    if (elapsed > 0) fprintf(stderr, "  %.0f %s/s", work / elapsed, unit);
    if (total > 0 && done > p->first && !last) {
        double left = elapsed / (done - p->first) * (total - done);
        fprintf(stderr, "  %d:%02d left", (int)(left / 60), (int)left % 60);
    }
    fprintf(stderr, "%s", p->terminal ? (last ? "\033[K\n" : "\033[K") : "\n");
    fflush(stderr);
}

// =================================================================================================
// 8 Molecules: heavy atoms 0..n-1 with the nine atom features and bonds with the three bond
//   features of OGB (Hu et al. 2020, ogb.utils.features), each an index into its list of values.
// =================================================================================================

enum { ATOM_FEATURES = 9, BOND_FEATURES = 3 };

// Number of values of each atom feature; where there is a "misc" value it is the last one.
//   atomic number Z-1 (118: Z = 0), chiral tag, total degree, formal charge + 5, total H,
//   radical electrons, hybridization, aromatic, in a ring
static const uint8_t ATOM_FEATURE_SIZES[ATOM_FEATURES] = {119, 5, 12, 12, 10, 6, 6, 2, 2};

// A bond's three features as one code 0..59: 12 * type + 2 * stereo + conjugated
//   type: single, double, triple, aromatic, misc; stereo: none, Z, E, cis, trans, any
enum { BOND_TYPES = 5, BOND_STEREOS = 6, BOND_CODES = BOND_TYPES * BOND_STEREOS * 2 };

enum { MAX_ATOMS = 65535, MAX_BONDS = 65535, MAX_NAME = 65535, MAX_TASKS = 65535 };

typedef struct {
    int n_atoms, n_bonds, n_tasks;
    int has_pos;           // positions are a property of the whole molecule
    int name_length;
    uint8_t *atom_feat;    // (n_atoms, 9)
    uint16_t *bonds;       // (n_bonds, 2) atom indices; undirected, each bond once
    uint8_t *bond_code;    // (n_bonds)
    float *pos;            // (n_atoms, 3) Angstrom, valid if has_pos
    float *labels;         // (n_tasks), NaN = missing
    char *name;            // name_length bytes and a 0
    int atom_room, bond_room, task_room, name_room;  // allocated sizes
} Molecule;

// Makes room for a molecule of these sizes and sets its counts. Start from a zeroed struct; the
// owner calls molecule_free().
static inline void molecule_resize(Molecule *m, int n_atoms, int n_bonds, int n_tasks,
                                   int name_length) {
    if (n_atoms > m->atom_room || !m->atom_feat) {
        m->atom_room = n_atoms;
        m->atom_feat = xrealloc(m->atom_feat, (size_t)n_atoms, ATOM_FEATURES);
        m->pos = xrealloc(m->pos, (size_t)n_atoms, 3 * sizeof(float));
    }
    if (n_bonds > m->bond_room || !m->bonds) {
        m->bond_room = n_bonds;
        m->bonds = xrealloc(m->bonds, (size_t)n_bonds, 2 * sizeof(uint16_t));
        m->bond_code = xrealloc(m->bond_code, (size_t)n_bonds, 1);
    }
    if (n_tasks > m->task_room || !m->labels) {
        m->task_room = n_tasks;
        m->labels = xrealloc(m->labels, (size_t)n_tasks, sizeof(float));
    }
    if (name_length + 1 > m->name_room || !m->name) {
        m->name_room = name_length + 1;
        m->name = xrealloc(m->name, (size_t)name_length + 1, 1);
    }
    m->n_atoms = n_atoms;
    m->n_bonds = n_bonds;
    m->n_tasks = n_tasks;
    m->name_length = name_length;
    m->name[name_length] = 0;
}

static inline void molecule_free(Molecule *m) {
    free(m->atom_feat);
    free(m->bonds);
    free(m->bond_code);
    free(m->pos);
    free(m->labels);
    free(m->name);
    *m = (Molecule){0};
}

// =================================================================================================
// 9 Dataset files. All numbers little-endian whatever the host, no padding:
//
//   header, 64 bytes
//      0  8  magic "MOLBLEND"          32  8  file size in bytes
//      8  4  format version, 1         40  4  most atoms of a molecule
//     12  4  number of tasks           44  4  most bonds of a molecule
//     16  8  number of molecules       48 12  zero
//     24  8  offset of the index       60  4  CRC-32 of header (these four as 0) and task names
//   task names     per task: u16 length, bytes
//   records        one a molecule, in order:
//     u32 CRC-32 of the rest of the record; u16 atoms; u16 bonds; u16 flags (1: has positions);
//     u16 length of the name; u8 atom_feat[atoms][9]; u16 bonds[bonds][2]; u8 bond_code[bonds];
//     f32 pos[atoms][3] if the flag is set; f32 labels[tasks]; name bytes
//   index          u64 per molecule: offset << 16 | atoms; u32 CRC-32 of these
//
// CRC-32 is zlib's. Header and index are checked on opening, a record whenever it is read, so a
// dataset larger than memory opens at once and damage is still found before it is used.
// =================================================================================================

static const char DATASET_MAGIC[8] = {'M', 'O', 'L', 'B', 'L', 'E', 'N', 'D'};
enum { DATASET_VERSION = 1, DATASET_HEADER = 64, RECORD_HEADER = 12 };

static inline uint32_t get_u16(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }
static inline uint32_t get_u32(const uint8_t *p) { return get_u16(p) | get_u16(p + 2) << 16; }
static inline uint64_t get_u64(const uint8_t *p) {
    return (uint64_t)get_u32(p) | (uint64_t)get_u32(p + 4) << 32;
}
static inline float get_f32(const uint8_t *p) {
    uint32_t bits = get_u32(p);
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
static inline uint8_t *put_u16(uint8_t *p, uint32_t v) {
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
    return p + 2;
}
static inline uint8_t *put_u32(uint8_t *p, uint32_t v) { return put_u16(put_u16(p, v), v >> 16); }
static inline uint8_t *put_u64(uint8_t *p, uint64_t v) {
    return put_u32(put_u32(p, (uint32_t)v), (uint32_t)(v >> 32));
}
static inline uint8_t *put_f32(uint8_t *p, float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return put_u32(p, bits);
}

// CRC-32 (reflected polynomial 0xEDB88320) of more bytes; start with crc = 0. Eight half bytes at
// once: table[k][x] is what x contributes if k more half bytes follow it.
static inline uint32_t crc32_add(uint32_t crc, const uint8_t *p, size_t n) {
    static const uint32_t table[8][16] = {
        {0x00000000, 0x1DB71064, 0x3B6E20C8, 0x26D930AC, 0x76DC4190, 0x6B6B51F4, 0x4DB26158,
         0x5005713C, 0xEDB88320, 0xF00F9344, 0xD6D6A3E8, 0xCB61B38C, 0x9B64C2B0, 0x86D3D2D4,
         0xA00AE278, 0xBDBDF21C},
        {0x00000000, 0x77073096, 0xEE0E612C, 0x990951BA, 0x076DC419, 0x706AF48F, 0xE963A535,
         0x9E6495A3, 0x0EDB8832, 0x79DCB8A4, 0xE0D5E91E, 0x97D2D988, 0x09B64C2B, 0x7EB17CBD,
         0xE7B82D07, 0x90BF1D91},
        {0x00000000, 0x4AC21251, 0x958424A2, 0xDF4636F3, 0xF0794F05, 0xBABB5D54, 0x65FD6BA7,
         0x2F3F79F6, 0x3B83984B, 0x71418A1A, 0xAE07BCE9, 0xE4C5AEB8, 0xCBFAD74E, 0x8138C51F,
         0x5E7EF3EC, 0x14BCE1BD},
        {0x00000000, 0x191B3141, 0x32366282, 0x2B2D53C3, 0x646CC504, 0x7D77F445, 0x565AA786,
         0x4F4196C7, 0xC8D98A08, 0xD1C2BB49, 0xFAEFE88A, 0xE3F4D9CB, 0xACB54F0C, 0xB5AE7E4D,
         0x9E832D8E, 0x87981CCF},
        {0x00000000, 0x1C26A370, 0x384D46E0, 0x246BE590, 0x709A8DC0, 0x6CBC2EB0, 0x48D7CB20,
         0x54F16850, 0xE1351B80, 0xFD13B8F0, 0xD9785D60, 0xC55EFE10, 0x91AF9640, 0x8D893530,
         0xA9E2D0A0, 0xB5C473D0},
        {0x00000000, 0x01C26A37, 0x0384D46E, 0x0246BE59, 0x0709A8DC, 0x06CBC2EB, 0x048D7CB2,
         0x054F1685, 0x0E1351B8, 0x0FD13B8F, 0x0D9785D6, 0x0C55EFE1, 0x091AF964, 0x08D89353,
         0x0A9E2D0A, 0x0B5C473D},
        {0x00000000, 0x5019579F, 0xA032AF3E, 0xF02BF8A1, 0x9B14583D, 0xCB0D0FA2, 0x3B26F703,
         0x6B3FA09C, 0xED59B63B, 0xBD40E1A4, 0x4D6B1905, 0x1D724E9A, 0x764DEE06, 0x2654B999,
         0xD67F4138, 0x866616A7},
        {0x00000000, 0xB8BC6765, 0xAA09C88B, 0x12B5AFEE, 0x8F629757, 0x37DEF032, 0x256B5FDC,
         0x9DD738B9, 0xC5B428EF, 0x7D084F8A, 0x6FBDE064, 0xD7018701, 0x4AD6BFB8, 0xF26AD8DD,
         0xE0DF7733, 0x58631056}};
    crc = ~crc;
    for (; n >= 4; p += 4, n -= 4) {
        uint32_t x = crc ^ ((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 |
                            (uint32_t)p[3] << 24);
        crc = table[7][x & 15] ^ table[6][x >> 4 & 15] ^ table[5][x >> 8 & 15] ^
              table[4][x >> 12 & 15] ^ table[3][x >> 16 & 15] ^ table[2][x >> 20 & 15] ^
              table[1][x >> 24 & 15] ^ table[0][x >> 28];
    }
    for (; n; p++, n--) {
        crc ^= *p;
        crc = crc >> 4 ^ table[0][crc & 15];
        crc = crc >> 4 ^ table[0][crc & 15];
    }
    return ~crc;
}

// Bytes of a record with these counts.
static inline size_t record_size(int n_atoms, int n_bonds, int n_tasks, int name_length,
                                 int has_pos) {
    return RECORD_HEADER + (size_t)n_atoms * (ATOM_FEATURES + (has_pos ? 12 : 0)) +
           (size_t)n_bonds * 5 + (size_t)n_tasks * 4 + (size_t)name_length;
}

// Writes the record of m to buf, which has room for record_size() bytes; returns the size.
static inline size_t record_encode(uint8_t *buf, const Molecule *m) {
    uint8_t *p = buf + 4;
    p = put_u16(p, (uint32_t)m->n_atoms);
    p = put_u16(p, (uint32_t)m->n_bonds);
    p = put_u16(p, m->has_pos ? 1 : 0);
    p = put_u16(p, (uint32_t)m->name_length);
    memcpy(p, m->atom_feat, (size_t)m->n_atoms * ATOM_FEATURES);
    p += (size_t)m->n_atoms * ATOM_FEATURES;
    for (int k = 0; k < 2 * m->n_bonds; k++) p = put_u16(p, m->bonds[k]);
    memcpy(p, m->bond_code, (size_t)m->n_bonds);
    p += m->n_bonds;
    for (int k = 0; m->has_pos && k < 3 * m->n_atoms; k++) p = put_f32(p, m->pos[k]);
    for (int k = 0; k < m->n_tasks; k++) p = put_f32(p, m->labels[k]);
    memcpy(p, m->name, (size_t)m->name_length);
    p += m->name_length;
    put_u32(buf, crc32_add(0, buf + 4, (size_t)(p - buf) - 4));
    return (size_t)(p - buf);
}

// Reads a record of `size` bytes, whose checksum is not looked at, into m. Returns NULL, or what is
// wrong with it.
static inline const char *record_content(Molecule *m, const uint8_t *p, size_t size, int n_tasks) {
    if (size < RECORD_HEADER) return "record is too short";
    int n_atoms = (int)get_u16(p + 4), n_bonds = (int)get_u16(p + 6), has_pos = (int)get_u16(p + 8);
    int name_length = (int)get_u16(p + 10);
    if (n_atoms < 1) return "molecule without atoms";
    if (has_pos > 1) return "unknown record flags";
    if (size != record_size(n_atoms, n_bonds, n_tasks, name_length, has_pos))
        return "record size does not fit its counts";
    molecule_resize(m, n_atoms, n_bonds, n_tasks, name_length);
    m->has_pos = has_pos;
    p += RECORD_HEADER;
    memcpy(m->atom_feat, p, (size_t)n_atoms * ATOM_FEATURES);
    p += (size_t)n_atoms * ATOM_FEATURES;
    for (int k = 0; k < n_atoms * ATOM_FEATURES; k++)
        if (m->atom_feat[k] >= ATOM_FEATURE_SIZES[k % ATOM_FEATURES])
            return "atom feature out of range";
    for (int k = 0; k < 2 * n_bonds; k++, p += 2) m->bonds[k] = (uint16_t)get_u16(p);
    for (int k = 0; k < n_bonds; k++) {
        if (m->bonds[2 * k] >= n_atoms || m->bonds[2 * k + 1] >= n_atoms ||
            m->bonds[2 * k] == m->bonds[2 * k + 1])
            return "bond to an atom that is not there";
        if (p[k] >= BOND_CODES) return "bond feature out of range";
        m->bond_code[k] = p[k];
    }
    p += n_bonds;
    for (int k = 0; has_pos && k < 3 * n_atoms; k++, p += 4) {
        m->pos[k] = get_f32(p);
        if (!(fabsf(m->pos[k]) <= 1e6f)) return "position is not a sensible number";
    }
    for (int k = 0; k < n_tasks; k++, p += 4) {
        m->labels[k] = get_f32(p);
        if (isinf(m->labels[k])) return "label is infinite";
    }
    memcpy(m->name, p, (size_t)name_length);
    return NULL;
}

// The same, if the checksum is right.
static inline const char *record_decode(Molecule *m, const uint8_t *p, size_t size, int n_tasks) {
    if (size >= RECORD_HEADER && get_u32(p) != crc32_add(0, p + 4, size - 4))
        return "record is damaged (checksum)";
    return record_content(m, p, size, n_tasks);
}

// ---- writer
typedef struct {
    OutFile out;
    uint64_t *index;
    size_t count, index_room;
    uint64_t offset;
    uint32_t max_atoms, max_bonds;
    int n_tasks;
    uint8_t *head;  // header and task names
    size_t head_size;
} DatasetWriter;

// Starts a dataset file with these tasks (task_names may be NULL if n_tasks is 0).
static inline void dataset_create(DatasetWriter *w, const char *path, int n_tasks,
                                  char *const *task_names) {
    *w = (DatasetWriter){.n_tasks = n_tasks};
    w->head_size = DATASET_HEADER;
    for (int t = 0; t < n_tasks; t++) {
        CHECK(strlen(task_names[t]) <= MAX_NAME, "%s: a task name is too long", path);
        w->head_size += 2 + strlen(task_names[t]);
    }
    w->head = xmalloc(w->head_size, 1);
    uint8_t *p = w->head + DATASET_HEADER;
    for (int t = 0; t < n_tasks; t++) {
        size_t length = strlen(task_names[t]);
        p = put_u16(p, (uint32_t)length);
        memcpy(p, task_names[t], length);
        p += length;
    }
    out_open(&w->out, path);
    out_write(&w->out, w->head, w->head_size);  // a placeholder; dataset_finish() fills it in
    w->offset = w->head_size;
}

// Appends a record made by record_encode().
static inline void dataset_append(DatasetWriter *w, const uint8_t *record, size_t size) {
    uint32_t n_atoms = get_u16(record + 4), n_bonds = get_u16(record + 6);
    if (w->count == w->index_room) {
        w->index_room = w->index_room ? 2 * w->index_room : 1024;
        w->index = xrealloc(w->index, w->index_room, sizeof *w->index);
    }
    CHECK(w->offset < (uint64_t)1 << 47 && w->count < UINT32_MAX, "%s: dataset is too large",
          w->out.path);
    w->index[w->count++] = w->offset << 16 | n_atoms;
    w->offset += size;
    if (n_atoms > w->max_atoms) w->max_atoms = n_atoms;
    if (n_bonds > w->max_bonds) w->max_bonds = n_bonds;
    out_write(&w->out, record, size);
}

// Writes index and header, and gives the file its name. Frees everything w owns.
static inline void dataset_finish(DatasetWriter *w) {
    uint32_t crc = 0;
    for (size_t i = 0; i <= w->count; i++) {
        uint8_t entry[8];
        if (i < w->count) {
            put_u64(entry, w->index[i]);
            crc = crc32_add(crc, entry, 8);
        } else {
            put_u32(entry, crc);
        }
        out_write(&w->out, entry, i < w->count ? 8 : 4);
    }
    memcpy(w->head, DATASET_MAGIC, 8);
    put_u32(w->head + 8, DATASET_VERSION);
    put_u32(w->head + 12, (uint32_t)w->n_tasks);
    put_u64(w->head + 16, w->count);
    put_u64(w->head + 24, w->offset);
    put_u64(w->head + 32, w->offset + 8 * (uint64_t)w->count + 4);
    put_u32(w->head + 40, w->max_atoms);
    put_u32(w->head + 44, w->max_bonds);
    put_u32(w->head + 60, crc32_add(0, w->head, w->head_size));
    CHECK(fseek(w->out.file, 0, SEEK_SET) == 0, "%s: cannot seek: %s", w->out.tmp, strerror(errno));
    out_write(&w->out, w->head, w->head_size);
    out_commit(&w->out);
    free(w->head);
    free(w->index);
}

// ---- reader
typedef struct {
    const char *path;     // as given to dataset_open(), which does not copy it
    const uint8_t *data;  // the whole file, mapped or read
    size_t size, count;
    const uint8_t *index;
    int n_tasks, max_atoms, max_bonds;
    char **task_names;    // (n_tasks)
    int mapped;
} Dataset;

// The whole of a file, memory-mapped where the platform can (*mapped), or read. Dies if it cannot.
static inline const uint8_t *file_bytes(const char *path, size_t *size, int *mapped) {
    const uint8_t *data = NULL;
    *mapped = 0;
#if MB_POSIX
    struct stat info;
    int fd = open(path, O_RDONLY);
    CHECK(fd >= 0 && fstat(fd, &info) == 0, "%s: cannot read: %s", path, strerror(errno));
    CHECK(S_ISREG(info.st_mode), "%s: cannot read: expected a regular file", path);
    CHECK((uintmax_t)info.st_size <= SIZE_MAX, "%s: too large for this machine", path);
    *size = (size_t)info.st_size;
    if (*size > 0) {
        void *map = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0);
        *mapped = map != MAP_FAILED;
        if (*mapped) data = map;
    }
    close(fd);
    if (data) return data;
#endif
    FILE *f = fopen(path, "rb");
    CHECK(f, "%s: cannot read: %s", path, strerror(errno));
    uint8_t *buf = NULL;
    size_t room = 0, got = 0, n;
    do {
        room = room ? 2 * room : 1 << 16;
        buf = xrealloc(buf, room, 1);
        n = fread(buf + got, 1, room - got, f);
        got += n;
    } while (got == room);
    CHECK(!ferror(f), "%s: read failed: %s", path, strerror(errno));
    fclose(f);
    *size = got;
    return buf;
}

static inline void file_release(const uint8_t *data, size_t size, int mapped) {
#if MB_POSIX
    if (mapped) {
        munmap((void *)(uintptr_t)data, size);
        return;
    }
#endif
    (void)size;
    (void)mapped;
    free((void *)(uintptr_t)data);
}

// Opens and checks header, task names and index. Dies with the reason if anything is wrong.
static inline void dataset_open(Dataset *d, const char *path) {
    *d = (Dataset){.path = path};
    d->data = file_bytes(path, &d->size, &d->mapped);
    const uint8_t *h = d->data;
    CHECK(d->size >= DATASET_HEADER && memcmp(h, DATASET_MAGIC, 8) == 0,
          "%s: not a dataset file (expected one made by data_prep)", path);
    CHECK(get_u32(h + 8) == DATASET_VERSION, "%s: expected format version %d, found %u", path,
          DATASET_VERSION, (unsigned)get_u32(h + 8));
    CHECK(get_u64(h + 32) == d->size, "%s: truncated: expected %llu bytes, found %zu", path,
          (unsigned long long)get_u64(h + 32), d->size);
    uint64_t count = get_u64(h + 16), index = get_u64(h + 24);
    CHECK(count <= UINT32_MAX && index <= d->size && d->size - index == 8 * count + 4 &&
          get_u32(h + 12) <= MAX_TASKS && get_u32(h + 40) <= MAX_ATOMS &&
          get_u32(h + 44) <= MAX_BONDS, "%s: damaged header (counts do not fit the file)", path);
    d->count = (size_t)count;
    d->index = h + index;
    d->n_tasks = (int)get_u32(h + 12);
    d->max_atoms = (int)get_u32(h + 40);
    d->max_bonds = (int)get_u32(h + 44);
    d->task_names = xmalloc((size_t)d->n_tasks, sizeof *d->task_names);
    size_t at = DATASET_HEADER;
    for (int t = 0; t < d->n_tasks; t++) {
        size_t length = at + 2 <= index ? get_u16(h + at) : SIZE_MAX;
        CHECK(length <= MAX_NAME && length <= index - at - 2, "%s: damaged task names", path);
        d->task_names[t] = xprintf("%.*s", (int)length, (const char *)h + at + 2);
        at += 2 + length;
    }
    uint8_t head[DATASET_HEADER];
    memcpy(head, h, DATASET_HEADER);
    put_u32(head + 60, 0);
    uint32_t crc = crc32_add(crc32_add(0, head, DATASET_HEADER), h + DATASET_HEADER,
                             at - DATASET_HEADER);
    CHECK(crc == get_u32(h + 60), "%s: damaged header (checksum)", path);
    CHECK(crc32_add(0, d->index, 8 * d->count) == get_u32(d->index + 8 * d->count),
          "%s: damaged index (checksum)", path);
    for (size_t i = 0; i < d->count; i++) {
        uint64_t entry = get_u64(d->index + 8 * i), begin = entry >> 16, next = index;
        if (i + 1 < d->count) next = get_u64(d->index + 8 * (i + 1)) >> 16;
        CHECK(begin >= at && next >= begin && next <= index &&
                  next - begin >= RECORD_HEADER + (entry & 0xffff) * ATOM_FEATURES,
              "%s: damaged index (molecule %zu does not fit its record)", path, i);
    }
}

static inline void dataset_close(Dataset *d) {
    file_release(d->data, d->size, d->mapped);
    for (int t = 0; t < d->n_tasks; t++) free(d->task_names[t]);
    free(d->task_names);
}

// Atoms of molecule i, without touching its record.
static inline int dataset_atoms(const Dataset *d, size_t i) {
    return (int)get_u16(d->index + 8 * i);
}

// Has molecule i positions? Reads only the head of its record.
static inline int dataset_has_pos(const Dataset *d, size_t i) {
    return get_u16(d->data + (get_u64(d->index + 8 * i) >> 16) + 8) & 1;
}

// A number that tells datasets apart: of the index, and the checksums of up to 4096 records.
static inline uint32_t dataset_fingerprint(const Dataset *d) {
    uint32_t crc = get_u32(d->index + 8 * d->count);
    for (size_t i = 0; i < d->count; i += d->count / 4096 + 1)
        crc = crc32_add(crc, d->data + (get_u64(d->index + 8 * i) >> 16), 4);
    return crc;
}

// Reads molecule i into m (see Molecule for ownership). Returns NULL, or what is wrong with it.
static inline const char *dataset_try(const Dataset *d, size_t i, Molecule *m) {
    uint64_t begin = get_u64(d->index + 8 * i) >> 16;
    uint64_t end = i + 1 < d->count ? get_u64(d->index + 8 * (i + 1)) >> 16
                                    : (uint64_t)(d->index - d->data);
    const char *wrong = record_decode(m, d->data + begin, (size_t)(end - begin), d->n_tasks);
    if (!wrong && m->n_atoms != dataset_atoms(d, i)) wrong = "atom count differs from the index";
    if (!wrong && (m->n_atoms > d->max_atoms || m->n_bonds > d->max_bonds))
        wrong = "more atoms or bonds than the header allows";
    return wrong;
}

// The same; dies if the record is damaged. Not for parallel loops.
static inline void dataset_read(const Dataset *d, size_t i, Molecule *m) {
    const char *wrong = dataset_try(d, i, m);
    CHECK(!wrong, "%s: molecule %zu: %s", d->path, i, wrong);
}

// Dies unless both have the same tasks.
static inline void dataset_same_tasks(const Dataset *a, const Dataset *b) {
    int same = a->n_tasks == b->n_tasks;
    for (int t = 0; same && t < a->n_tasks; t++)
        same = strcmp(a->task_names[t], b->task_names[t]) == 0;
    CHECK(same, "%s: expected the tasks of %s", b->path, a->path);
}

// =================================================================================================
// 10 Tensor files (.safetensors): u64 length of the header, a JSON header {"name": {"dtype",
//   "shape", "data_offsets"}, ..., "__metadata__": {...}}, raw little-endian data
// =================================================================================================

typedef struct {
    char *name;
    char dtype[8];
    int rank;
    size_t shape[4], count;
    const uint8_t *data;  // in the file; count elements
} TensorEntry;

typedef struct {
    const char *path;     // as given
    const uint8_t *bytes;
    size_t size;
    int mapped;
    TensorEntry *entries;
    int count;
    char **meta;          // 2 * meta_count: key, value
    int meta_count;
} TensorFile;

// Reads the JSON header: text between at and end.
typedef struct {
    const char *path, *begin, *at, *end;
} JsonReader;

MB_NORETURN static inline void json_fail(const JsonReader *r, const char *expected) {
    DIE("%s: damaged tensor file: expected %s at byte %zu of the header", r->path, expected,
        (size_t)(r->at - r->begin));
}

// Is c the next character after white space? Takes it if so.
static inline int json_take(JsonReader *r, char c) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\n' || *r->at == '\r' || *r->at == '\t'))
        r->at++;
    if (r->at == r->end || *r->at != c) return 0;
    r->at++;
    return 1;
}

static inline void json_expect(JsonReader *r, char c) {
    char text[4] = {'\'', c, '\'', 0};
    if (!json_take(r, c)) json_fail(r, text);
}

// A string, in fresh memory; \u escapes beyond ASCII become '?'.
static inline char *json_string(JsonReader *r) {
    json_expect(r, '"');
    size_t n = 0, room = 64;
    char *text = xmalloc(room, 1);
    while (r->at < r->end && *r->at != '"') {
        char c = *r->at++;
        if (c == '\\' && r->at < r->end) {
            static const char from[] = "bfnrt", to[] = "\b\f\n\r\t";
            c = *r->at++;
            const char *known = strchr(from, c);
            if (c == 'u') {
                unsigned code = 0;
                for (int digit = 0; digit < 4; digit++, r->at++) {
                    if (r->at == r->end || !isxdigit((unsigned char)*r->at))
                        json_fail(r, "\\uXXXX");
                    int value = isdigit((unsigned char)*r->at) ? *r->at - '0'
                                                               : tolower(*r->at) - 'a' + 10;
                    code = code * 16 + (unsigned)value;
                }
                c = code > 0 && code < 128 ? (char)code : '?';
            } else if (known && c) {
                c = to[known - from];
            }
        }
        if (n + 1 == room) text = xrealloc(text, room *= 2, 1);
        text[n++] = c;
    }
    text[n] = 0;
    if (r->at == r->end) json_fail(r, "the end of a string");
    r->at++;
    return text;
}

static inline size_t json_size(JsonReader *r) {
    json_take(r, ' ');
    size_t value = 0;
    const char *first = r->at;
    for (; r->at < r->end && *r->at >= '0' && *r->at <= '9'; r->at++) {
        if (value > SIZE_MAX / 10 - 1) json_fail(r, "a smaller number");
        value = value * 10 + (size_t)(*r->at - '0');
    }
    if (r->at == first) json_fail(r, "a number");
    return value;
}

// [a, b, ...] into values; returns how many, at most max.
static inline int json_sizes(JsonReader *r, size_t *values, int max) {
    int n = 0;
    json_expect(r, '[');
    if (json_take(r, ']')) return 0;
    do {
        if (n == max) json_fail(r, "a shorter list");
        values[n++] = json_size(r);
    } while (json_take(r, ','));
    json_expect(r, ']');
    return n;
}

// Bytes of an element, 0 if the type is unknown.
static inline size_t dtype_size(const char *dtype) {
    static const struct { const char *name; size_t size; } types[] = {
        {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8}, {"I32", 4},
        {"I16", 2}, {"I8", 1}, {"U8", 1}, {"BOOL", 1}};
    for (size_t k = 0; k < sizeof types / sizeof types[0]; k++)
        if (strcmp(dtype, types[k].name) == 0) return types[k].size;
    return 0;
}

// {"dtype": ..., "shape": [...], "data_offsets": [begin, end]} of the tensor t.
static inline void json_tensor(JsonReader *r, TensorEntry *t, const uint8_t *data,
                               size_t data_size) {
    size_t range[2] = {1, 0};
    json_expect(r, '{');
    do {
        char *key = json_string(r);
        json_expect(r, ':');
        if (strcmp(key, "dtype") == 0) {
            char *dtype = json_string(r);
            snprintf(t->dtype, sizeof t->dtype, "%.7s", dtype);
            free(dtype);
        } else if (strcmp(key, "shape") == 0) {
            t->rank = json_sizes(r, t->shape, 4);
        } else if (strcmp(key, "data_offsets") == 0) {
            if (json_sizes(r, range, 2) != 2) json_fail(r, "two offsets");
        } else {
            json_fail(r, "dtype, shape or data_offsets");
        }
        free(key);
    } while (json_take(r, ','));
    json_expect(r, '}');
    t->count = 1;
    for (int k = 0; k < t->rank; k++) t->count = mul_size(t->count, t->shape[k]);
    size_t size = dtype_size(t->dtype);
    CHECK(size, "%s: tensor %s: unknown type \"%s\"", r->path, t->name, t->dtype);
    CHECK(range[0] <= range[1] && range[1] <= data_size &&
              range[1] - range[0] == mul_size(t->count, size),
          "%s: damaged tensor file: the data of %s does not fit its shape or the file", r->path,
          t->name);
    t->data = data + range[0];
}

// {"key": "value", ...}
static inline void json_metadata(JsonReader *r, TensorFile *f) {
    json_expect(r, '{');
    if (json_take(r, '}')) return;
    do {
        if ((f->meta_count & (f->meta_count - 1)) == 0)
            f->meta = xrealloc(f->meta, 2 * (2 * (size_t)f->meta_count + 1), sizeof *f->meta);
        f->meta[2 * f->meta_count] = json_string(r);
        json_expect(r, ':');
        f->meta[2 * f->meta_count + 1] = json_string(r);
        f->meta_count++;
    } while (json_take(r, ','));
    json_expect(r, '}');
}

// Opens a .safetensors file; dies with the reason if it is not one. Call tensor_file_close().
static inline void tensor_file_open(TensorFile *f, const char *path) {
    *f = (TensorFile){.path = path};
    f->bytes = file_bytes(path, &f->size, &f->mapped);
    uint64_t length = f->size >= 8 ? get_u64(f->bytes) : UINT64_MAX;
    CHECK(length <= f->size - 8, "%s: not a .safetensors file (the header does not fit)", path);
    const char *text = (const char *)f->bytes + 8;
    JsonReader r = {path, text, text, text + length};
    const uint8_t *data = f->bytes + 8 + length;
    json_expect(&r, '{');
    do {
        char *name = json_string(&r);
        json_expect(&r, ':');
        if (strcmp(name, "__metadata__") == 0) {
            free(name);
            json_metadata(&r, f);
            continue;
        }
        if ((f->count & (f->count - 1)) == 0)  // full at every power of two
            f->entries = xrealloc(f->entries, 2 * (size_t)f->count + 1, sizeof *f->entries);
        f->entries[f->count] = (TensorEntry){.name = name};
        json_tensor(&r, &f->entries[f->count++], data, f->size - 8 - (size_t)length);
    } while (json_take(&r, ','));
    json_expect(&r, '}');
}

static inline void tensor_file_close(TensorFile *f) {
    for (int k = 0; k < f->count; k++) free(f->entries[k].name);
    for (int k = 0; k < 2 * f->meta_count; k++) free(f->meta[k]);
    free(f->entries);
    free(f->meta);
    file_release(f->bytes, f->size, f->mapped);
    *f = (TensorFile){0};
}

// The tensor of this name, or NULL.
static inline const TensorEntry *tensor_find(const TensorFile *f, const char *name) {
    for (int k = 0; k < f->count; k++)
        if (strcmp(f->entries[k].name, name) == 0) return &f->entries[k];
    return NULL;
}

// Element k of a tensor of floating-point numbers, as float32.
static inline float tensor_value(const TensorEntry *t, size_t k) {
    uint32_t bits = t->dtype[0] == 'B' ? get_u16(t->data + 2 * k) << 16 : 0;
    float value;
    if (strcmp(t->dtype, "F32") == 0) return get_f32(t->data + 4 * k);
    if (strcmp(t->dtype, "F64") == 0) {
        uint64_t wide = get_u64(t->data + 8 * k);
        double number;
        memcpy(&number, &wide, 8);
        return (float)number;
    }
    if (strcmp(t->dtype, "F16") == 0) {  // sign, 5 bits of exponent, 10 of fraction
        uint32_t half = get_u16(t->data + 2 * k), exponent = half >> 10 & 31;
        if (exponent == 0) return ldexpf((float)(half & 1023), -24) * (half >> 15 ? -1.0f : 1.0f);
        bits = (half & 0x8000u) << 16 | (exponent == 31 ? 255 : exponent + 112) << 23 |
               (half & 1023) << 13;
    }
    memcpy(&value, &bits, 4);
    return value;
}

// The value of a metadata key, or NULL.
static inline const char *tensor_meta(const TensorFile *f, const char *key) {
    for (int k = 0; k < f->meta_count; k++)
        if (strcmp(f->meta[2 * k], key) == 0) return f->meta[2 * k + 1];
    return NULL;
}

// ---- writing

typedef struct { char *text; size_t length, room; } Text;

MB_PRINTF(2, 3) static inline void text_add(Text *t, const char *fmt, ...) {
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    size_t n = (size_t)vsnprintf(NULL, 0, fmt, args);
    va_end(args);
    if (t->length + n + 1 > t->room)
        t->text = xrealloc(t->text, t->room = 2 * (t->length + n + 1), 1);
    vsnprintf(t->text + t->length, n + 1, fmt, again);
    va_end(again);
    t->length += n;
}

// "key": "value", with what JSON needs escaped.
static inline void text_add_meta(Text *t, const char *key, const char *value) {
    text_add(t, "%s\"%s\":\"", t->text[t->length - 1] == '{' ? "" : ",", key);
    for (; *value; value++) {
        if (*value == '"' || *value == '\\')
            text_add(t, "\\%c", *value);
        else if ((unsigned char)*value < 32)
            text_add(t, "\\u%04x", (unsigned)*value);
        else
            text_add(t, "%c", *value);
    }
    text_add(t, "\"");
}

static inline void out_floats(OutFile *out, const float *x, size_t count) {
    uint8_t chunk[4096];
    for (size_t i = 0; i < count; i += 1024) {
        size_t n = count - i < 1024 ? count - i : 1024;
        for (size_t k = 0; k < n; k++) put_f32(chunk + 4 * k, x[i + k]);
        out_write(out, chunk, 4 * n);
    }
}

// A matrix to be written, or with rows = 0 a vector.
typedef struct {
    char *name;
    size_t rows, columns;
    const float *data;
} TensorOut;

// Writes n float32 tensors. meta: JSON text of the metadata.
static inline void tensor_file_write(const char *path, const TensorOut *tensors, size_t n,
                              const char *meta) {
    Text head = {0};
    size_t offset = 0;
    text_add(&head, "{\"__metadata__\":%s", meta);
    for (const TensorOut *t = tensors; t < tensors + n; t++) {
        size_t end = offset + 4 * max_size(t->rows, 1) * t->columns;
        text_add(&head, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[", t->name);
        if (t->rows || strcmp(t->name, "log") == 0) text_add(&head, "%zu,", t->rows);
        text_add(&head, "%zu],\"data_offsets\":[%zu,%zu]}", t->columns, offset, end);
        offset = end;
    }
    text_add(&head, "}");
    while (head.length % 8) text_add(&head, " ");
    OutFile out;
    uint8_t length[8];
    out_open(&out, path);
    put_u64(length, head.length);
    out_write(&out, length, 8);
    out_write(&out, head.text, head.length);
    for (const TensorOut *t = tensors; t < tensors + n; t++)
        out_floats(&out, t->data, max_size(t->rows, 1) * t->columns);
    out_commit(&out);
    free(head.text);
}

// ---- what is in a file

static inline void info_dataset(const char *path) {
    Dataset data;
    Molecule m = {0};
    dataset_open(&data, path);
    double atoms = 0, bonds = 0, with_pos = 0;
    double *present = xmalloc((size_t)data.n_tasks, sizeof *present);
    for (size_t i = 0; i < data.count; i++) {
        dataset_read(&data, i, &m);
        atoms += m.n_atoms;
        bonds += m.n_bonds;
        with_pos += m.has_pos;
        for (int t = 0; t < data.n_tasks; t++) present[t] += !isnan(m.labels[t]);
    }
    double n = data.count ? (double)data.count : 1;
    printf("%s: dataset, %zu molecules, %zu bytes\n", path, data.count, data.size);
    printf("  atoms      mean %.1f, most %d\n  bonds      mean %.1f, most %d\n", atoms / n,
           data.max_atoms, bonds / n, data.max_bonds);
    printf("  positions  %.0f molecules\n", with_pos);
    for (int t = 0; t < data.n_tasks; t++)
        printf("  task       %s: %.0f labels\n", data.task_names[t], present[t]);
    free(present);
    molecule_free(&m);
    dataset_close(&data);
}

static inline void info_tensors(const char *path) {
    TensorFile f;
    tensor_file_open(&f, path);
    size_t count = 0;
    for (int k = 0; k < f.count; k++) count += f.entries[k].count;
    printf("%s: tensor file, %d tensors, %zu numbers\n", path, f.count, count);
    for (int k = 0; k < f.meta_count; k++) printf("  %s: %s\n", f.meta[2 * k], f.meta[2 * k + 1]);
    for (int k = 0; k < f.count; k++) {
        printf("  %-70s %s (", f.entries[k].name, f.entries[k].dtype);
        for (int d = 0; d < f.entries[k].rank; d++)
            printf("%s%zu", d ? ", " : "", f.entries[k].shape[d]);
        printf(")\n");
    }
    tensor_file_close(&f);
}

// Prints what is in a dataset or tensor file.
static inline void file_info(const char *path) {
    size_t size;
    int mapped;
    const uint8_t *bytes = file_bytes(path, &size, &mapped);
    int dataset = size >= 8 && memcmp(bytes, DATASET_MAGIC, 8) == 0;
    file_release(bytes, size, mapped);
    if (dataset) info_dataset(path);
    else info_tensors(path);
}

// =================================================================================================
// 11 Metrics of one task; labels that are NaN are left out
// =================================================================================================

typedef enum { TASK_CLASSIFICATION, TASK_REGRESSION } TaskKind;

typedef struct { float score, label; } Scored;

static inline int scored_compare(const void *a, const void *b) {
    float x = ((const Scored *)a)->score, y = ((const Scored *)b)->score;
    return (x > y) - (x < y);
}

// The labelled predictions of task y, sorted by score, in fresh memory.
static inline Scored *scored_sorted(size_t *count, const float *scores, const float *labels,
                                    size_t n, size_t Y, size_t y) {
    Scored *list = xmalloc(n, sizeof *list);
    *count = 0;
    for (size_t i = 0; i < n; i++)
        if (!isnan(labels[i * Y + y]))
            list[(*count)++] = (Scored){scores[i * Y + y], labels[i * Y + y]};
    qsort(list, *count, sizeof *list, scored_compare);
    return list;
}

// End of the run of equal scores that begins at i.
static inline size_t tie_end(const Scored *list, size_t n, size_t i) {
    size_t end = i + 1;
    while (end < n && list[end].score == list[i].score) end++;
    return end;
}

// Area under the ROC curve by the rank sum, tied scores sharing their mean rank; NaN if only one
// class is there. Labels above 0.5 are positive.
static inline double roc_auc(const Scored *sorted, size_t n) {
    double positives = 0, rank_sum = 0;
    for (size_t i = 0; i < n;) {
        size_t end = tie_end(sorted, n, i);
        double rank = 0.5 * (double)(i + 1 + end);
        for (; i < end; i++) {
            positives += sorted[i].label > 0.5f;
            rank_sum += sorted[i].label > 0.5f ? rank : 0;
        }
    }
    double negatives = (double)n - positives;
    if (positives == 0 || negatives == 0) return (double)NAN;
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives);
}

// Average precision: sum over thresholds of precision * step in recall; NaN without positives.
static inline double average_precision(const Scored *sorted, size_t n) {
    double total = 0, found = 0, sum = 0;
    for (size_t i = 0; i < n; i++) total += sorted[i].label > 0.5f;
    for (size_t end = n; end > 0;) {  // from the highest score down, ties together
        size_t begin = end - 1;
        while (begin > 0 && sorted[begin - 1].score == sorted[end - 1].score) begin--;
        double before = found;
        for (size_t i = begin; i < end; i++) found += sorted[i].label > 0.5f;
        sum += (found - before) * found / (double)(n - begin);
        end = begin;
    }
    return total > 0 ? sum / total : (double)NAN;
}

enum { METRIC_AUC, METRIC_AP, METRIC_RMSE, METRIC_MAE, METRIC_R2, METRICS };
static const char *const METRIC_NAMES[METRICS] = {"ROC-AUC", "AP", "RMSE", "MAE", "R2"};

// All metrics of task y that make sense for its kind, NaN for the others and where undefined.
// scores (n, Y): logits (in float32 large probabilities are all 1), or predicted values.
static inline void task_metrics(double metric[METRICS], TaskKind kind, const float *scores,
                         const float *labels, size_t n, size_t Y, size_t y) {
    size_t count;
    Scored *list = scored_sorted(&count, scores, labels, n, Y, y);
    double square = 0, absolute = 0, mean = 0, variance = 0;
    int varied = 0;  // constant labels have a variance too, of rounding
    for (int k = 0; k < METRICS; k++) metric[k] = (double)NAN;
    for (size_t i = 0; i < count; i++) mean += (double)list[i].label / (double)count;
    for (size_t i = 0; i < count; i++) {
        double error = (double)list[i].score - (double)list[i].label;
        varied |= list[i].label != list[0].label;
        square += error * error;
        absolute += fabs(error);
        variance += ((double)list[i].label - mean) * ((double)list[i].label - mean);
    }
    if (kind == TASK_CLASSIFICATION) {
        metric[METRIC_AUC] = roc_auc(list, count);
        metric[METRIC_AP] = average_precision(list, count);
    } else if (count > 0) {
        metric[METRIC_RMSE] = sqrt(square / (double)count);
        metric[METRIC_MAE] = absolute / (double)count;
        metric[METRIC_R2] = varied ? 1 - square / variance : (double)NAN;
    }
    free(list);
}

// Means over the tasks in which a metric is defined; NaN if there is none, and of errors in the
// labels' units, which several tasks need not share.
static inline void mean_metrics(double mean[METRICS], TaskKind kind, const float *scores,
                         const float *labels, size_t n, size_t Y) {
    double sum[METRICS] = {0}, count[METRICS] = {0}, metric[METRICS];
    for (size_t y = 0; y < Y; y++) {
        task_metrics(metric, kind, scores, labels, n, Y, y);
        for (int k = 0; k < METRICS; k++) {
            if (isnan(metric[k])) continue;
            sum[k] += metric[k];
            count[k] += 1;
        }
    }
    for (int k = 0; k < METRICS; k++) {
        int units = Y > 1 && (k == METRIC_RMSE || k == METRIC_MAE);
        mean[k] = count[k] > 0 && !units ? sum[k] / count[k] : (double)NAN;
    }
}

#endif
