// moleblend.h - what moleblend.c and data_prep.c share
//
//   1 errors           DIE, CHECK: one line on stderr, exit 1, unfinished outputs removed
//   2 memory           xmalloc, xrealloc: sizes are checked before they are multiplied
//   3 files            OutFile: written beside the target, renamed when complete; files read whole
//   4 being stopped    signals that ask for an orderly end; threads and CPU time on a busy machine
//   5 random numbers   Philox4x32-10: a draw depends on nothing but its name
//   6 options          one table drives parsing, range checks and --help
//   7 progress         done, rate and time left, on stderr
//   8 molecules        the record both programs exchange, and its vocabularies
//   9 dataset files    format (documented there), writer, reader
//  10 tensor files     safetensors: reader, writer, what is in a file
//  11 metrics          ROC-AUC, average precision, RMSE, MAE, R2, reliability
//
// All functions are static inline: a program is one .c file and this header, nothing to link.
#ifndef MOLEBLEND_H
#define MOLEBLEND_H

#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L  // fsync, mmap, isatty; harmless where they do not exist
#endif
#define _ISOC11_SOURCE 1         // aligned_alloc, for compilers that say C99 (tcc)
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64     // files over 2 GiB on 32-bit machines
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
#include <fcntl.h>
#include <sys/stat.h>
#if defined(_WIN32)
#include <io.h>
#define isatty _isatty
#define access _access
#define F_OK 0
#define fileno _fileno
#else
#include <unistd.h>
#endif
#if defined(_WIN32) || defined(__wasi__)  // no file locks, no sigaction, no mmap
#define MB_POSIX 0
#else
#define MB_POSIX 1
#include <sys/mman.h>
#include <sys/resource.h>
#endif
#ifdef __wasi__
#define tmpfile() fopen(MB_PROGRAM ".tmp", "w+b")  // it has none; this one stays
#endif

// x87 without -std=c11 keeps float variables in registers of 80 bits: wrong numbers.
#if defined(__GNUC__) && (FLT_EVAL_METHOD == 2 || FLT_EVAL_METHOD < 0) && \
    (defined(__clang__) || !defined(__STRICT_ANSI__))
#error "floats would not be rounded to float: add -std=c11, or better: -msse2 -mfpmath=sse"
#endif

#ifndef MB_PROGRAM
#define MB_PROGRAM "moleblend"  // the name in front of every error message
#endif

#define MB_VERSION "1.0"

#if defined(__GNUC__) || defined(__clang__)
#ifndef _OPENMP
#pragma GCC diagnostic ignored "-Wunknown-pragmas"  // without OpenMP its pragmas mean nothing
#endif
#ifndef __MINGW_PRINTF_FORMAT
#define __MINGW_PRINTF_FORMAT printf  // MinGW has one of its own
#endif
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define MB_PRINTF(fmt, first) __attribute__((format(__MINGW_PRINTF_FORMAT, fmt, first)))
#define MB_NORETURN __attribute__((noreturn))
#else
#define ALWAYS_INLINE static inline
#define MB_PRINTF(fmt, first)
#define MB_NORETURN
#endif

#ifdef _OPENMP
#include <omp.h>
#define MB_OPENMP 1
#else  // one thread
#define MB_OPENMP 0
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_num_procs(void) { return 1; }
static inline int omp_get_thread_num(void) { return 0; }
static inline void omp_set_num_threads(int threads) { (void)threads; }
#endif

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }
static inline size_t max_size(size_t a, size_t b) { return a > b ? a : b; }
static inline size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

// n rounded up to a multiple of m.
static inline int round_up(int n, int m) { return (n + m - 1) / m * m; }

// =================================================================================================
// 1 Errors. A message states the file (and line or record), what was expected and what was found:
//   DIE("%s:%d: expected a bond count, found \"%s\"", path, line, text)
// There is no other way out of a program that failed.
// =================================================================================================

// A file being written: `tmp` until out_commit() renames it to `path`.
typedef struct OutFile {
    FILE *file;
    char *path, *tmp;
    struct OutFile *next;  // list of unfinished outputs, see mb_unfinished
} OutFile;

static OutFile *mb_unfinished;  // outputs to remove at exit, whoever calls that

static inline void outs_remove(void) {
    for (OutFile *out = mb_unfinished; out; out = out->next) {
        if (!MB_POSIX && out->file) fclose(out->file);  // see out_discard()
        if (strcmp(out->path, "-") != 0) remove(out->tmp);
    }
}

// Ends the program with this exit code; success becomes failure if stdout could not be written.
MB_NORETURN static inline void mb_exit(int code) {
    errno = 0;
    if (code == 0 && (fflush(stdout) != 0 || ferror(stdout))) {
        fprintf(stderr, MB_PROGRAM ": standard output: write failed: %s\n",
                strerror(errno ? errno : EIO));
        code = EXIT_FAILURE;
    }
    exit(code);
}

// Prints "PROGRAM: message", removes unfinished outputs, exits 1. If several threads fail, the
// first one speaks and the others wait for the end.
MB_NORETURN MB_PRINTF(1, 2) static inline void mb_die(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
#pragma omp critical(mb_die)
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

// Frees everything that it is given.
#define FREE_ALL(...) free_list((void *[]){__VA_ARGS__}, sizeof((void *[]){__VA_ARGS__}))
static inline void free_list(void **list, size_t bytes) {
    for (size_t k = 0; k < bytes / sizeof *list; k++) free(list[k]);
}

typedef struct { char *text; size_t length, room; } Text;  // a string that grows

// Makes room for n more bytes and a 0, and counts them in; returns where they go.
static inline char *text_room(Text *t, size_t n) {
    size_t need = t->length + n + 1;
    if (need > t->room) t->text = xrealloc(t->text, t->room = need + t->length, 1);
    t->length += n;
    t->text[t->length] = 0;
    return t->text + t->length - n;
}

static inline void text_bytes(Text *t, const void *bytes, size_t n) {
    memcpy(text_room(t, n), bytes, n);
}

static inline void text_add_list(Text *t, const char *fmt, va_list args) {
    va_list again;
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, fmt, again);
    va_end(again);
    CHECK(n >= 0, "cannot format \"%s\"", fmt);
    vsnprintf(text_room(t, (size_t)n), (size_t)n + 1, fmt, args);
}

// printf to the end of a text, which starts zeroed. The caller frees t->text.
MB_PRINTF(2, 3) static inline void text_add(Text *t, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    text_add_list(t, fmt, args);
    va_end(args);
}

// printf into fresh memory. The caller frees.
MB_PRINTF(1, 2) static inline char *xprintf(const char *fmt, ...) {
    Text t = {0};
    va_list args;
    va_start(args, fmt);
    text_add_list(&t, fmt, args);
    va_end(args);
    return t.text;
}

// =================================================================================================
// 3 Files. An output is whole or not there: data go to PATH.tmp, which out_commit() flushes to the
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
        if (fstat(fd, &mine) == 0 && stat(tmp, &named) == 0 && mine.st_ino == named.st_ino) {
            CHECK(ftruncate(fd, 0) == 0, "%s: cannot write: %s", tmp, strerror(errno));
            return fdopen(fd, "wb");
        }
        close(fd);
    }
}
#else
static inline FILE *out_lock(const char *tmp) { return fopen(tmp, "wb"); }
#endif

// Opens PATH.tmp for writing, or for "-" a file without name that out_commit() copies to stdout.
// `out` must stay where it is until out_commit().
static inline void out_open(OutFile *out, const char *path) {
    static int hooked;
    if (!hooked) hooked = atexit(outs_remove) == 0;
    struct stat info;
    int is_stdout = strcmp(path, "-") == 0;
    CHECK(is_stdout || stat(path, &info) != 0 || S_ISREG(info.st_mode),
          "%s: cannot write: expected a regular file", path);
    out->path = xprintf("%s", path);
    out->tmp = is_stdout ? xprintf("standard output") : xprintf("%s.tmp", path);
    out->file = is_stdout ? tmpfile() : out_lock(out->tmp);
    CHECK(out->file, "%s: cannot write: %s", out->tmp, strerror(errno));
    setvbuf(out->file, NULL, _IOFBF, 1 << 16);
    out->next = mb_unfinished;
    mb_unfinished = out;
}

static inline void out_write(OutFile *out, const void *data, size_t size) {
    CHECK(!size || fwrite(data, 1, size, out->file) == size, "%s: write failed: %s", out->tmp,
          strerror(errno));
}

// Writes over what is at `offset`.
static inline void out_rewrite(OutFile *out, long offset, const void *data, size_t size) {
    CHECK(fseek(out->file, offset, SEEK_SET) == 0, "%s: cannot seek: %s", out->tmp,
          strerror(errno));
    out_write(out, data, size);
}

// Closes the file, if it is open, and takes it off the list of unfinished outputs.
static inline void out_close(OutFile *out) {
    OutFile **link = &mb_unfinished;
    if (out->file) fclose(out->file);
    while (*link != out) link = &(*link)->next;
    *link = out->next;
    free(out->path);
    free(out->tmp);
}

// Removes the file: PATH stays as it was.
static inline void out_discard(OutFile *out) {
    if (!MB_POSIX) {  // an open file cannot be removed there
        fclose(out->file);
        out->file = NULL;
    }
    remove(out->tmp);
    out_close(out);
}

// Dies now, not after hours of work, if PATH cannot be written.
static inline void out_probe(const char *path) {
    OutFile out;
    out_open(&out, path);
    out_discard(&out);
}

// Makes the file durable and gives it its name, before its lock ends with the file.
static inline void out_commit(OutFile *out) {
    if (strcmp(out->path, "-") == 0) {
        char bytes[4096];
        CHECK(fflush(out->file) == 0 && fseek(out->file, 0, SEEK_SET) == 0, "%s: write failed: %s",
              out->tmp, strerror(errno));
        for (size_t n; (n = fread(bytes, 1, sizeof bytes, out->file)) > 0;)
            fwrite(bytes, 1, n, stdout);  // mb_exit() will see whether it came through
        out_close(out);
        return;
    }
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
#if MB_POSIX  // the folder holds the name; where it cannot be flushed, the system sees to it
    const char *slash = strrchr(out->path, '/');
    char *folder = xprintf("%.*s.", slash ? (int)(slash - out->path) + 1 : 0, out->path);
    int fd = open(folder, O_RDONLY);
    if (fd >= 0) fsync(fd);
    if (fd >= 0) close(fd);
    free(folder);
#endif
    out_close(out);
}

// ---- files that are read

#if MB_POSIX
static struct { const char *path; const uint8_t *bytes; size_t size; } mb_mapped[8];

// SIGBUS: a page is not there. It comes of reading a file's bytes, so stdio may be used.
static inline void mb_on_sigbus(int number, siginfo_t *info, void *context) {
    uintptr_t at = (uintptr_t)info->si_addr;
    (void)context;
    for (int k = 0; k < 8; k++)
        CHECK(at - (uintptr_t)mb_mapped[k].bytes >= mb_mapped[k].size,
              "%s: was cut short while it was read, or its disk failed", mb_mapped[k].path);
    signal(number, SIG_DFL);
}
#endif

// All bytes of a stream, in fresh memory.
static inline uint8_t *stream_bytes(FILE *f, const char *path, size_t *size) {
    uint8_t *bytes = NULL;
    size_t room = 0;
    CHECK(f, "%s: cannot read: %s", path, strerror(errno));
    for (*size = 0; *size == room; *size += fread(bytes + *size, 1, room - *size, f))
        bytes = xrealloc(bytes, room = 2 * room + 65536, 1);
    CHECK(!ferror(f), "%s: read failed: %s", path, strerror(errno));
    return bytes;
}

static uint8_t *mb_stdin;  // what was read from stdin, which can be asked for more than once

// The whole of a file, memory-mapped where the platform can, else read; of stdin if path is "-".
// Dies if it cannot. `path` must live as long as the bytes.
static inline const uint8_t *file_bytes(const char *path, size_t *size) {
    static size_t stdin_size;
    if (strcmp(path, "-") == 0) {
        if (!mb_stdin) mb_stdin = stream_bytes(stdin, "standard input", &stdin_size);
        *size = stdin_size;
        return mb_stdin;
    }
#if MB_POSIX
    struct stat info;
    struct sigaction action = {.sa_sigaction = mb_on_sigbus, .sa_flags = SA_SIGINFO};
    int fd = open(path, O_RDONLY | O_NONBLOCK), k = 0;  // not to wait for a FIFO
    CHECK(fd >= 0 && fstat(fd, &info) == 0, "%s: cannot read: %s", path, strerror(errno));
    CHECK(S_ISREG(info.st_mode), "%s: cannot read: expected a regular file", path);
    CHECK((uintmax_t)info.st_size <= SIZE_MAX, "%s: too large for this machine", path);
    *size = (size_t)info.st_size;
    void *map = *size ? mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;
    CHECK(map != MAP_FAILED, "%s: cannot map: %s", path, strerror(errno));
    close(fd);
    while (k < 7 && mb_mapped[k].size) k++;
    mb_mapped[k].path = path;
    mb_mapped[k].bytes = map;
    mb_mapped[k].size = *size;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, NULL);
    return map;
#else
    FILE *f = fopen(path, "rb");
    uint8_t *bytes = stream_bytes(f, path, size);
    fclose(f);
    return bytes;
#endif
}

static inline void file_release(const uint8_t *bytes, size_t size) {
    if (!bytes || bytes == mb_stdin) return;
#if MB_POSIX
    for (int k = 0; k < 8; k++)
        if (mb_mapped[k].bytes == bytes) mb_mapped[k].size = 0;
    munmap((void *)(uintptr_t)bytes, size);
#else
    (void)size;
    free((void *)(uintptr_t)bytes);
#endif
}

// =================================================================================================
// 4 Being stopped, and sharing the machine. SIGINT, SIGTERM and SIGHUP ask for an orderly end: the
//   work at hand is finished and saved. Another one, 1.5 seconds later or more (timeout(1) sends
//   each twice), ends the program at once.
// =================================================================================================

// Seconds since some moment, by a clock that nobody sets.
static inline double now_seconds(void) {
#ifdef _WIN32
    return (double)clock() / CLOCKS_PER_SEC;  // there it counts waiting too
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#endif
}

static volatile sig_atomic_t mb_signal;  // the one that came, or 0

static inline void mb_on_signal(int number) {
    static volatile double first;
    if (mb_signal && now_seconds() > first + 1.5) {
        signal(number, SIG_DFL);
        raise(number);
    }
    if (!mb_signal) first = now_seconds();
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

// The least limit of our control group and the groups above it, 0: none. Version 2 has it in
// `file` ("LIMIT" or "LIMIT PERIOD"), version 1 in the controller's file `old`, where a limit over
// a period stands in two: old is "cpu.cfs_quota_us", the other cpu.cfs_period_us. root: "", or for
// tests a folder.
static inline double group_limit(const char *root, const char *file, const char *controller,
                                 const char *old) {
    double least = 0, number[2];
    char line[1024], *path = xprintf("%s/proc/self/cgroup", root);
    FILE *groups = fopen(path, "r");  // lines NUMBER:CONTROLLERS:GROUP; of version 2: 0::GROUP
    free(path);
    while (groups && fgets(line, sizeof line, groups)) {
        char *group = strstr(line, ":/"), *found = strstr(line, controller);
        int second = strncmp(line, "0::/", 4) == 0;
        size_t n = found ? strcspn(found, ",:") : 0;
        if (!group || (!second && (!found || found > group || n != strlen(controller)))) continue;
        for (char *end = line + strcspn(line, "\n"); end > group; end = strrchr(line, '/')) {
            *end = 0;
            double limit = 0;
            for (int k = 0; k < 1 + (!second && strstr(old, "quota")); k++) {
                path = xprintf("%s/sys/fs/cgroup/%s%s/%s", root, second ? "" : controller,
                               group + 1, second ? file : k ? "cpu.cfs_period_us" : old);
                FILE *f = fopen(path, "r");
                int read = f ? fscanf(f, "%lf %lf", &number[0], &number[1]) : 0;
                if (read > 0) limit = k ? limit / number[0] : number[0];
                if (read > 1) limit /= number[1];
                if (f) fclose(f);
                free(path);
            }
            if (limit > 0 && (least == 0 || limit < least)) least = limit;
        }
    }
    if (groups) fclose(groups);
    return least;
}

// Bytes that this process can still get, as far as the system says: memory that is free or can be
// freed, the limits of our control group and of the address space. root: see group_limit().
static inline double memory_limit(const char *root) {
    double least = group_limit(root, "memory.max", "memory", "memory.limit_in_bytes"), kib;
    char line[128], *path = xprintf("%s/proc/meminfo", root);
    FILE *f = fopen(path, "r");
    if (least == 0) least = (double)INFINITY;
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %lf", &kib) == 1) least = fmin(least, 1024 * kib);
    if (f) fclose(f);
    free(path);
#if MB_POSIX
    struct rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
        least = fmin(least, (double)limit.rlim_cur);
#endif
    return least;
}

// Dies if `what` needs more memory than there is.
static inline void memory_check(uint64_t bytes, const char *what, const char *hint) {
    double there = fmin(memory_limit(""), (double)SIZE_MAX);
    CHECK((double)bytes <= there, "%s needs %.1f GiB of memory, and %.1f GiB are free; try %s",
          what, (double)bytes / (1 << 30), there / (1 << 30), hint);
}

// ---- threads. One that waits at the end of a parallel loop spins for a while, because waking it
//   takes longer than most loops. Beside other programs that is a disaster: the spinning threads
//   take the time that the one they wait for needs. So, where the environment says nothing, waiting
//   is short, and steps that do not get the CPUs they ask for are done with fewer threads. That
//   changes no result: threads share out results, never a sum.

static int mb_threads;   // most threads that we use; 0: threads_set() was not called
static int mb_adapting;  // may that number be lowered?

// Threads to provide memory for.
static inline int thread_count(void) { return mb_threads ? mb_threads : omp_get_max_threads(); }
static inline int thread_id(void) { return omp_get_thread_num(); }

// To be called first in main(). A write beyond `ulimit -f` shall fail, not kill, and no file be
// opened in the place of a closed stdout or stderr. Waiting is made short: a hundredth of gcc's
// default is as fast on an idle machine. gcc's runtime has read its environment before main()
// begins, so the program begins again with another one.
static inline void program_begin(char **argv) {
#if MB_POSIX
    signal(SIGXFSZ, SIG_IGN);
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0) open("/dev/null", O_RDWR);
#endif
#ifdef _WIN32  // lines end as they do elsewhere
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
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
    double quota = group_limit("", "cpu.max", "cpu", "cpu.cfs_quota_us");
    mb_adapting = MB_POSIX && !wanted && getenv("MB_CALM") && !getenv("OMP_NUM_THREADS");
    if (!wanted && !getenv("OMP_NUM_THREADS") && quota > 0 && quota < omp_get_num_procs())
        wanted = quota < 1 ? 1 : (int64_t)(quota + 0.5);
    if (wanted) omp_set_num_threads((int)wanted);
    mb_threads = omp_get_max_threads();
}

// To be called between steps. After two steps in which we got less than 0.6 CPUs a thread, the next
// 25 have as many threads as we got CPUs; then all are tried again.
static inline void threads_adapt(void) {
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
            int above = row[j];
            row[j] = min_int(min_int(above, row[j - 1]) + 1, diagonal + (a[i - 1] != b[j - 1]));
            diagonal = above;
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

// Parses argv[1..argc) against table[0..n) for one command (a bit, or 0) and marks the rows that it
// met in given[0..n). Other words go to words[0..max_words); returns how many there are. Dies on
// anything it does not know.
static inline int options_parse(const Option *table, int n, unsigned command, int argc, char **argv,
                                const char **words, int max_words, char *given) {
    int n_words = 0;
    for (int i = 1; i < argc; i++) {
        const char *arg = strcmp(argv[i], "-h") == 0 ? "--help" : argv[i];
        const char *value = arg[0] == '-' && arg[1] == '-' ? strchr(arg, '=') : NULL;
        if (value) arg = xprintf("%.*s", (int)(value++ - arg), arg);
        if (arg[0] != '-' || arg[1] == 0) {
            CHECK(n_words < max_words, "unexpected argument \"%s\"; see --help", arg);
            words[n_words++] = arg;
            continue;
        }
        const Option *nearest = NULL;
        int least = 99;
        for (const Option *o = table; o < table + n; o++) {
            if (!o->name || (o->commands && command && !(o->commands & command))) continue;
            int distance = edit_distance(arg, o->name);
            if (distance < least) {
                least = distance;
                nearest = o;
            }
        }
        CHECK(least > 4 || least == 0, "unknown option %s; did you mean %s?", arg, nearest->name);
        CHECK(least == 0, "unknown option %s; see --help", arg);
        given[nearest - table] = 1;
        if (nearest->kind == OPT_FLAG) {
            CHECK(!value, "%s: expected no value", arg);
            *(int *)nearest->value = 1;
        } else {
            CHECK(value || i + 1 < argc, "%s: expected a value (%s) after it", arg,
                  nearest->argument);
            option_store(nearest, value ? value : argv[++i]);
        }
    }
    return n_words;
}

// The value of an option as text, in fresh memory.
static inline char *option_value(const Option *o) {
    if (o->kind == OPT_FLAG) return xprintf("%d", *(int *)o->value);
    if (o->kind == OPT_INT) return xprintf("%lld", (long long)*(int64_t *)o->value);
    if (o->kind == OPT_TEXT)
        return xprintf("%s", *(const char **)o->value ? *(const char **)o->value : "");
    double number = *(double *)o->value;
    char *text = xprintf("%g", number);
    if (strtod(text, NULL) == number) return text;
    free(text);
    return xprintf("%.17g", number);
}

// "--name value", a line each, of all rows that belong to `commands`, in fresh memory.
static inline char *options_describe(const Option *table, int n, unsigned commands) {
    Text all = {0};
    for (const Option *o = table; o < table + n; o++) {
        if (!o->name || !(o->commands & commands)) continue;
        char *value = option_value(o);
        text_add(&all, "%s %s\n", o->name, value);
        free(value);
    }
    return all.text;
}

// Takes the values of an options_describe() text, as read from `path`, for all rows that are not
// given. One that is given and differs is named on stderr; if it is not a larger number of a row of
// `grows`, the program dies after the last of them.
static inline void options_resume(const Option *table, int n, unsigned grows, const char *given,
                                  const char *text, const char *path) {
    int refused = 0;
    for (const char *line = text, *end; (end = strchr(line, '\n')); line = end + 1) {
        size_t name = strcspn(line, " \n");
        const Option *o = table;
        while (o < table + n && !(o->name && strlen(o->name) == name && line[name] == ' ' &&
                                  memcmp(o->name, line, name) == 0)) o++;
        CHECK(o < table + n, "%s: unknown option %.*s; it is of another version", path,
              (int)(end - line), line);
        char *then = xprintf("%.*s", (int)(end - line - name - 1), line + name + 1);
        char *now = option_value(o);
        int larger = o->commands & grows && strtod(now, NULL) > strtod(then, NULL);
        if (given[o - table] && strcmp(now, then) != 0) {
            fprintf(stderr, "%s: the run began with \"%s\", now it is \"%s\"\n", o->name, then,
                    now);
            refused += !larger;
        } else if (o->kind == OPT_FLAG) {
            *(int *)o->value = then[0] == '1';
        } else if (o->kind != OPT_TEXT || *then) {
            option_store(o, then);
            if (o->kind == OPT_TEXT) then = NULL;  // the option has it now
        }
        free(then);
        free(now);
    }
    CHECK(!refused, "%s: --resume needs the run's own options; leave out those that differ", path);
}

// Prints the rows of the table that belong to a command (0: all), with their defaults.
static inline void options_print(const Option *table, int n, unsigned command) {
    for (const Option *o = table; o < table + n; o++) {
        if (o->commands && command && !(o->commands & command)) continue;
        if (!o->name) {
            printf("\n%s\n", o->help);
            continue;
        }
        char left[80], *value = option_value(o);
        snprintf(left, sizeof left, "%s %s", o->name, o->argument ? o->argument : "");
        int shown = o->kind != OPT_FLAG && *value && (o->kind != OPT_INT || strcmp(value, "0"));
        printf("  %-24s %s%s%s%s\n", left, o->help, shown ? " (default " : "", shown ? value : "",
               shown ? ")" : "");
        free(value);
    }
}

// valid.bin (or test.bin) beside train.bin: the same path with the last "train" replaced, if there
// is such a file; else NULL. Lives as long as the program.
static inline const char *sibling(const char *train_path, const char *part) {
    const char *at = NULL;
    for (const char *s = train_path; (s = strstr(s, "train")); s++) at = s;
    if (!at) return NULL;
    char *path = xprintf("%.*s%s%s", (int)(at - train_path), train_path, part, at + 5);
    if (access(path, F_OK) == 0) return path;  // not fopen(), which waits for a FIFO
    free(path);
    return NULL;
}

// A field of a CSV row, quoted if it must be.
static inline void print_csv(FILE *out, const char *text, size_t length) {
    int quote = 0;
    for (size_t k = 0; k < length; k++) quote |= strchr(",\"\r\n", text[k]) != NULL;
    if (quote) fputc('"', out);
    for (size_t k = 0; k < length; k++) {
        if (text[k] == '"') fputc('"', out);
        fputc(text[k], out);
    }
    if (quote) fputc('"', out);
}

// path with another ending in the place of `ending`, or behind it, in fresh memory.
static inline char *path_with(const char *path, const char *ending, const char *other) {
    size_t n = strlen(path), m = strlen(ending);
    if (n > m && strcmp(path + n - m, ending) == 0) n -= m;
    return xprintf("%.*s%s", (int)n, path, other);
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
    p.terminal = isatty(fileno(stderr));
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
    uint32_t number;       // of its record in the input of data_prep, from 1 on
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
    if (n_atoms > m->atom_room || n_bonds > m->bond_room || n_tasks > m->task_room ||
        name_length >= m->name_room) {
        m->atom_room = max_int(n_atoms, m->atom_room);
        m->bond_room = max_int(n_bonds, m->bond_room);
        m->task_room = max_int(n_tasks, m->task_room);
        m->name_room = max_int(name_length + 1, m->name_room);
        m->atom_feat = xrealloc(m->atom_feat, (size_t)m->atom_room, ATOM_FEATURES);
        m->pos = xrealloc(m->pos, (size_t)m->atom_room, 3 * sizeof(float));
        m->bonds = xrealloc(m->bonds, (size_t)m->bond_room, 2 * sizeof(uint16_t));
        m->bond_code = xrealloc(m->bond_code, (size_t)m->bond_room, 1);
        m->labels = xrealloc(m->labels, (size_t)m->task_room, sizeof(float));
        m->name = xrealloc(m->name, (size_t)m->name_room, 1);
    }
    m->n_atoms = n_atoms;
    m->n_bonds = n_bonds;
    m->n_tasks = n_tasks;
    m->name_length = name_length;
    m->name[name_length] = 0;
}

static inline void molecule_free(Molecule *m) {
    FREE_ALL(m->atom_feat, m->bonds, m->bond_code, m->pos, m->labels, m->name);
    *m = (Molecule){0};
}

// =================================================================================================
// 9 Dataset files. All numbers little-endian whatever the host, no padding:
//
//   header, 64 bytes
//      0  8  magic "MOLBLEND"          32  8  file size in bytes
//      8  4  format version, 2         40  4  most atoms of a molecule
//     12  4  number of tasks           44  4  most bonds of a molecule
//     16  8  number of molecules       48  8  number of skipped records
//     24  8  offset of the index       56  4  zero
//                                      60  4  CRC-32 of header (these four as 0) and task names
//   task names     per task: u16 length, bytes
//   records        one a molecule, in order:
//     u32 CRC-32 of the rest of the record; u16 atoms; u16 bonds; u16 flags (1: has positions);
//     u16 length of the name; u8 atom_feat[atoms][9]; u16 bonds[bonds][2]; u8 bond_code[bonds];
//     f32 pos[atoms][3] if the flag is set; f32 labels[tasks]; name bytes
//   skipped        a record of the input each that is no molecule here: u32 its number, from 1 on;
//     u16 length of its name; u16 length of the reason; name bytes; reason bytes
//   index          u64 per molecule: offset << 16 | atoms; then u32 per molecule: its number in the
//     input; u64 offset of the skipped records; u32 CRC-32 of these and of the skipped records
//
// CRC-32 is zlib's. Header and index are checked on opening, a record whenever it is read, so a
// dataset larger than memory opens at once and damage is still found before it is used.
// =================================================================================================

static const char DATASET_MAGIC[8] = {'M', 'O', 'L', 'B', 'L', 'E', 'N', 'D'};
enum { DATASET_VERSION = 2, DATASET_HEADER = 64, RECORD_HEADER = 12 };

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
// once: table[k][x] is what x contributes if k more half bytes follow it. The table is linear: of
// each row what the four bits do is enough.
#define CRC_PAIR(x, a) (x), (x) ^ (a)
#define CRC_QUAD(x, a, b) CRC_PAIR(x, a), CRC_PAIR((x) ^ (b), a)
#define CRC_ROW(a, b, c, d) \
    {CRC_QUAD(0, a, b), CRC_QUAD(c, a, b), CRC_QUAD(d, a, b), CRC_QUAD((c) ^ (d), a, b)}
static inline uint32_t crc32_add(uint32_t crc, const uint8_t *p, size_t n) {
    static const uint32_t table[8][16] = {
        CRC_ROW(0x1DB71064, 0x3B6E20C8, 0x76DC4190, 0xEDB88320),
        CRC_ROW(0x77073096, 0xEE0E612C, 0x076DC419, 0x0EDB8832),
        CRC_ROW(0x4AC21251, 0x958424A2, 0xF0794F05, 0x3B83984B),
        CRC_ROW(0x191B3141, 0x32366282, 0x646CC504, 0xC8D98A08),
        CRC_ROW(0x1C26A370, 0x384D46E0, 0x709A8DC0, 0xE1351B80),
        CRC_ROW(0x01C26A37, 0x0384D46E, 0x0709A8DC, 0x0E1351B8),
        CRC_ROW(0x5019579F, 0xA032AF3E, 0x9B14583D, 0xED59B63B),
        CRC_ROW(0xB8BC6765, 0xAA09C88B, 0x8F629757, 0xC5B428EF)};
    crc = ~crc;
    for (; n >= 4; p += 4, n -= 4) {
        uint32_t x = crc ^ get_u32(p);
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

// Reads a record of `size` bytes into m, without a look at its checksum. Returns NULL, or what is
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

// ---- writer
typedef struct {
    OutFile out;
    uint8_t *head, *index;  // header and task names; 8 bytes a molecule
    uint32_t *number;       // (count) of the molecules' records in the input
    Text skips;             // records that were skipped, as they will be in the file
    size_t head_size, count, room, skipped;
    uint64_t offset;
    uint32_t max_atoms, max_bonds;
    int n_tasks;
} DatasetWriter;

// Starts a dataset file with these tasks (task_names may be NULL if n_tasks is 0).
static inline void dataset_create(DatasetWriter *w, const char *path, int n_tasks,
                                  char *const *task_names) {
    *w = (DatasetWriter){.n_tasks = n_tasks, .head_size = DATASET_HEADER};
    w->head = xmalloc(DATASET_HEADER, 1);
    for (int t = 0; t < n_tasks; t++) {
        size_t length = strlen(task_names[t]), at = w->head_size;
        CHECK(length <= MAX_NAME, "%s: a task name is too long", path);
        w->head = xrealloc(w->head, w->head_size += 2 + length, 1);
        memcpy(put_u16(w->head + at, (uint32_t)length), task_names[t], length);
    }
    out_open(&w->out, path);
    out_write(&w->out, w->head, w->head_size);  // a placeholder; dataset_finish() fills it in
    w->offset = w->head_size;
}

// Notes a record that is skipped: its number in the input, name and why.
static inline void dataset_skip(DatasetWriter *w, uint32_t number, const char *name,
                                size_t name_length, const char *reason) {
    uint8_t head[8];
    size_t length = strlen(reason);
    if (name_length > MAX_NAME) name_length = MAX_NAME;
    put_u32(head, number);
    put_u16(head + 4, (uint32_t)name_length);
    put_u16(head + 6, (uint32_t)length);
    text_bytes(&w->skips, head, 8);
    text_bytes(&w->skips, name, name_length);
    text_bytes(&w->skips, reason, length);
    w->skipped++;
}

// Appends a record made by record_encode(), which has this number in the input.
static inline void dataset_append(DatasetWriter *w, const uint8_t *record, size_t size,
                                  uint32_t number) {
    uint32_t n_atoms = get_u16(record + 4), n_bonds = get_u16(record + 6);
    if (w->count == w->room) {
        w->index = xrealloc(w->index, w->room = 2 * w->room + 1024, 8);
        w->number = xrealloc(w->number, w->room, sizeof *w->number);
    }
    w->number[w->count] = number;
    CHECK(w->offset < (uint64_t)1 << 47 && w->count < UINT32_MAX, "%s: dataset is too large",
          w->out.path);
    put_u64(w->index + 8 * w->count++, w->offset << 16 | n_atoms);
    w->offset += size;
    if (n_atoms > w->max_atoms) w->max_atoms = n_atoms;
    if (n_bonds > w->max_bonds) w->max_bonds = n_bonds;
    out_write(&w->out, record, size);
}

// Writes index and header, and gives the file its name. Frees everything w owns.
static inline void dataset_finish(DatasetWriter *w) {
    uint64_t index = w->offset + w->skips.length;
    uint8_t end[12];
    w->index = xrealloc(w->index, w->count, 12);
    for (size_t i = 0; i < w->count; i++) put_u32(w->index + 8 * w->count + 4 * i, w->number[i]);
    put_u64(end, w->offset);
    uint32_t crc = crc32_add(crc32_add(0, w->index, 12 * w->count), end, 8);
    put_u32(end + 8, crc32_add(crc, (const uint8_t *)w->skips.text, w->skips.length));
    out_write(&w->out, w->skips.text, w->skips.length);
    out_write(&w->out, w->index, 12 * w->count);
    out_write(&w->out, end, 12);
    memcpy(w->head, DATASET_MAGIC, 8);
    put_u32(w->head + 8, DATASET_VERSION);
    put_u32(w->head + 12, (uint32_t)w->n_tasks);
    put_u64(w->head + 16, w->count);
    put_u64(w->head + 24, index);
    put_u64(w->head + 32, index + 12 * (uint64_t)w->count + 12);
    put_u32(w->head + 40, w->max_atoms);
    put_u32(w->head + 44, w->max_bonds);
    put_u64(w->head + 48, w->skipped);
    put_u32(w->head + 60, crc32_add(0, w->head, w->head_size));
    out_rewrite(&w->out, 0, w->head, w->head_size);
    out_commit(&w->out);
    FREE_ALL(w->head, w->index, w->number, w->skips.text);
}

// ---- reader
typedef struct {
    const char *path;     // as given to dataset_open(), which does not copy it
    const uint8_t *data;  // the whole file, mapped or read
    size_t size, count, skipped;
    const uint8_t *index, *skips;
    int n_tasks, max_atoms, max_bonds;
    char **task_names;    // (n_tasks)
} Dataset;

// A record of the input that is not in the dataset.
typedef struct {
    uint32_t number;
    size_t name_length, reason_length;
    const char *name, *reason;
} Skipped;

// Reads a skipped record at p, the first at d->skips; returns where the next stands, NULL if this
// one is not whole.
static inline const uint8_t *dataset_skipped(Skipped *s, const Dataset *d, const uint8_t *p) {
    if (d->index - p < 8) return NULL;
    *s = (Skipped){get_u32(p), get_u16(p + 4), get_u16(p + 6), NULL, NULL};
    if ((size_t)(d->index - p) - 8 < s->name_length + s->reason_length) return NULL;
    s->name = (const char *)p + 8;
    s->reason = s->name + s->name_length;
    return (const uint8_t *)s->reason + s->reason_length;
}

// Opens and checks header, task names and index. Dies with the reason if anything is wrong.
static inline void dataset_open(Dataset *d, const char *path) {
    *d = (Dataset){.path = path};
    d->data = file_bytes(path, &d->size);
    const uint8_t *h = d->data;
    CHECK(d->size >= DATASET_HEADER && memcmp(h, DATASET_MAGIC, 8) == 0,
          "%s: not a dataset file (expected one made by data_prep)", path);
    CHECK(get_u32(h + 8) == DATASET_VERSION, "%s: expected format version %d, found %u; make it "
          "again with data_prep", path, DATASET_VERSION, (unsigned)get_u32(h + 8));
    CHECK(get_u64(h + 32) == d->size, "%s: truncated: expected %llu bytes, found %zu", path,
          (unsigned long long)get_u64(h + 32), d->size);
    uint64_t count = get_u64(h + 16), index = get_u64(h + 24);
    CHECK(count <= UINT32_MAX && index <= d->size && d->size - index == 12 * count + 12 &&
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
    const uint8_t *end = d->index + 12 * d->count;
    uint64_t skips = get_u64(end);
    CHECK(skips >= at && skips <= index, "%s: damaged index (skipped records)", path);
    d->skips = h + skips;
    crc = crc32_add(crc32_add(0, d->index, 12 * d->count + 8), d->skips, (size_t)(index - skips));
    CHECK(crc == get_u32(end + 8), "%s: damaged index (checksum)", path);
    d->skipped = (size_t)get_u64(h + 48);
    const uint8_t *p = d->skips;
    Skipped skipped;
    for (size_t k = 0; k < d->skipped; k++)
        CHECK((p = dataset_skipped(&skipped, d, p)), "%s: damaged list of skipped records", path);
    CHECK(p == d->index, "%s: damaged list of skipped records", path);
    for (size_t i = 0; i < d->count; i++) {
        uint64_t entry = get_u64(d->index + 8 * i), begin = entry >> 16, next = skips;
        if (i + 1 < d->count) next = get_u64(d->index + 8 * (i + 1)) >> 16;
        CHECK(begin >= at && next >= begin && next <= skips &&
                  next - begin >= RECORD_HEADER + (entry & 0xffff) * ATOM_FEATURES,
              "%s: damaged index (molecule %zu does not fit its record)", path, i);
    }
}

static inline void dataset_close(Dataset *d) {
    file_release(d->data, d->size);
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
    uint32_t crc = get_u32(d->index + 12 * d->count + 8);
    for (size_t i = 0; i < d->count; i += d->count / 4096 + 1)
        crc = crc32_add(crc, d->data + (get_u64(d->index + 8 * i) >> 16), 4);
    return crc;
}

// Reads molecule i into m (see Molecule for ownership). Returns NULL, or what is wrong with it.
static inline const char *dataset_try(const Dataset *d, size_t i, Molecule *m) {
    uint64_t begin = get_u64(d->index + 8 * i) >> 16, end = (uint64_t)(d->skips - d->data);
    if (i + 1 < d->count) end = get_u64(d->index + 8 * (i + 1)) >> 16;
    const uint8_t *record = d->data + begin;
    size_t size = (size_t)(end - begin);  // at least RECORD_HEADER, says dataset_open()
    if (get_u32(record) != crc32_add(0, record + 4, size - 4))
        return "record is damaged (checksum)";
    const char *wrong = record_content(m, record, size, d->n_tasks);
    m->number = get_u32(d->index + 8 * d->count + 4 * i);
    if (!wrong && m->name_length == 0) {  // a record without name is known by its number
        molecule_resize(m, m->n_atoms, m->n_bonds, m->n_tasks, 10);
        m->name_length = snprintf(m->name, 11, "%lu", (unsigned long)m->number);
    }
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
//   "shape", "data_offsets"}, ..., "__metadata__": {...}}, raw little-endian data. Ours say in the
//   metadata, as eight hex digits, the CRC-32 of the whole file with zeros for these digits; it is
//   checked on opening. A file without one is taken.
// =================================================================================================

#define TENSOR_CRC "moleblend.crc32"

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
    TensorEntry *entries;
    int count;
    char **meta;          // 2 * meta_count: key, value
    int meta_count;
    const uint8_t *crc;   // the digits of the checksum; NULL if there is none
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
    static const char escaped[] = "bfnrt", meant[] = "\b\f\n\r\t";
    json_expect(r, '"');
    const char *close = r->at;
    while (close < r->end && *close != '"') close += *close == '\\' ? 2 : 1;
    if (close >= r->end) json_fail(r, "the end of a string");
    char *text = xmalloc((size_t)(close - r->at) + 1, 1), *to = text;
    for (; r->at < close; r->at++) {
        char c = *r->at;
        if (c == '\\') {
            c = *++r->at;
            const char *known = strchr(escaped, c);
            if (c == 'u') {
                char digits[5] = {0}, *stop;
                memcpy(digits, r->at + 1, close - r->at > 4 ? 4 : 0);
                unsigned long code = strtoul(digits, &stop, 16);
                if (stop != digits + 4) json_fail(r, "\\uXXXX");
                c = code > 0 && code < 128 ? (char)code : '?';
                r->at += 4;
            } else if (known && c) {
                c = meant[known - escaped];
            }
        }
        *to++ = c;
    }
    r->at++;
    return text;
}

// The next key of an object, behind its brace or a value, in fresh memory; NULL at the end.
static inline char *json_key(JsonReader *r) {
    int first = r->at[-1] == '{';
    if (json_take(r, '}')) return NULL;
    if (!first) json_expect(r, ',');
    char *key = json_string(r);
    json_expect(r, ':');
    return key;
}

// [a, b, ...] into values; returns how many, at most max.
static inline int json_sizes(JsonReader *r, size_t *values, int max) {
    int n = 0;
    json_expect(r, '[');
    if (json_take(r, ']')) return 0;
    do {
        size_t value = 0, digits = 0;
        json_take(r, ' ');
        for (; r->at < r->end && *r->at >= '0' && *r->at <= '9'; r->at++, digits++) {
            if (value > SIZE_MAX / 10 - 1) json_fail(r, "a smaller number");
            value = value * 10 + (size_t)(*r->at - '0');
        }
        if (!digits || n == max) json_fail(r, digits ? "a shorter list" : "a number");
        values[n++] = value;
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
    for (char *key; (key = json_key(r)); free(key)) {
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
    }
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
    for (char *key; (key = json_key(r)); f->meta_count++) {
        f->meta = xrealloc(f->meta, 2 * (size_t)f->meta_count + 2, sizeof *f->meta);
        f->meta[2 * f->meta_count] = key;
        f->meta[2 * f->meta_count + 1] = json_string(r);
        if (strcmp(key, TENSOR_CRC) == 0) f->crc = (const uint8_t *)r->at - 9;  // and a quote
    }
}

// Dies if the checksum is not that of the file.
static inline void tensor_file_check(const TensorFile *f) {
    char digits[9];
    uint32_t crc = crc32_add(0, f->bytes, (size_t)(f->crc - f->bytes));
    crc = crc32_add(crc, (const uint8_t *)"00000000", 8);
    crc = crc32_add(crc, f->crc + 8, (size_t)(f->bytes + f->size - f->crc) - 8);
    snprintf(digits, sizeof digits, "%08x", (unsigned)crc);
    CHECK(memcmp(digits, f->crc, 8) == 0, "%s: damaged tensor file (%s does not fit; a program "
          "that rewrites the file must leave it out)", f->path, TENSOR_CRC);
}

// Opens a .safetensors file; dies with the reason if it is not one. Call tensor_file_close().
static inline void tensor_file_open(TensorFile *f, const char *path) {
    *f = (TensorFile){.path = path};
    f->bytes = file_bytes(path, &f->size);
    uint64_t length = f->size >= 8 ? get_u64(f->bytes) : 0;
    CHECK(f->size >= 8 && length <= f->size - 8,
          "%s: not a .safetensors file (the header does not fit)", path);
    const char *text = (const char *)f->bytes + 8;
    JsonReader r = {path, text, text, text + length};
    const uint8_t *data = f->bytes + 8 + length;
    json_expect(&r, '{');
    for (char *name; (name = json_key(&r));) {
        if (strcmp(name, "__metadata__") == 0) {
            free(name);
            json_metadata(&r, f);
            continue;
        }
        if ((f->count & (f->count - 1)) == 0)  // full at every power of two
            f->entries = xrealloc(f->entries, 2 * (size_t)f->count + 1, sizeof *f->entries);
        f->entries[f->count] = (TensorEntry){.name = name};
        json_tensor(&r, &f->entries[f->count++], data, f->size - 8 - (size_t)length);
    }
    if (f->crc) tensor_file_check(f);
}

static inline void tensor_file_close(TensorFile *f) {
    for (int k = 0; k < f->count; k++) free(f->entries[k].name);
    for (int k = 0; k < 2 * f->meta_count; k++) free(f->meta[k]);
    free(f->entries);
    free(f->meta);
    file_release(f->bytes, f->size);
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

// Reads the tensor of this name, a float32 matrix, into rows (most, columns); returns how many rows
// it has, 0 if it is not there: an empty one is not written.
static inline int64_t tensor_rows(float *rows, int64_t most, size_t columns, const TensorFile *f,
                                  const char *name) {
    const TensorEntry *t = tensor_find(f, name);
    if (!t) return 0;
    CHECK(strcmp(t->dtype, "F32") == 0 && t->rank == 2 && t->shape[1] == columns &&
          t->shape[0] <= (size_t)most, "%s: damaged state: expected a table %s of at most %lld "
          "rows", f->path, name, (long long)most);
    for (size_t k = 0; k < t->count; k++) rows[k] = tensor_value(t, k);
    return (int64_t)t->shape[0];
}

// ---- writing

// "key": "value", a printf text, with what JSON needs escaped.
MB_PRINTF(3, 4) static inline void text_add_meta(Text *t, const char *key, const char *fmt, ...) {
    Text value = {0};
    va_list args;
    va_start(args, fmt);
    text_add_list(&value, fmt, args);
    va_end(args);
    text_add(t, "%s\"%s\":\"", t->text[t->length - 1] == '{' ? "" : ",", key);
    for (const char *c = value.text; *c; c++) {
        if ((unsigned char)*c < 32) text_add(t, "\\u%04x", (unsigned)*c);
        else text_add(t, "%s%c", *c == '"' || *c == '\\' ? "\\" : "", *c);
    }
    text_add(t, "\"");
    free(value.text);
}

// Writes numbers; returns `crc` continued over their bytes.
static inline uint32_t out_floats(OutFile *out, const float *x, size_t count, uint32_t crc) {
    uint8_t chunk[4096];
    for (size_t i = 0; i < count; i += 1024) {
        size_t n = count - i < 1024 ? count - i : 1024;
        for (size_t k = 0; k < n; k++) put_f32(chunk + 4 * k, x[i + k]);
        out_write(out, chunk, 4 * n);
        crc = crc32_add(crc, chunk, 4 * n);
    }
    return crc;
}

// A matrix to be written, or with rows = 0 a vector.
typedef struct {
    char *name;
    size_t rows, columns;
    const float *data;
} TensorOut;

// Writes n float32 tensors. meta: a JSON object, not empty, of the metadata.
static inline void tensor_file_write(const char *path, const TensorOut *tensors, size_t n,
                                     const char *meta) {
    Text head = {0};
    size_t offset = 0;
    text_add(&head, "{\"__metadata__\":{\"" TENSOR_CRC "\":\"");
    size_t crc_at = 8 + head.length;
    text_add(&head, "00000000\",%s", meta + 1);
    for (const TensorOut *t = tensors; t < tensors + n; t++) {
        size_t end = offset + 4 * max_size(t->rows, 1) * t->columns;
        text_add(&head, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[", t->name);
        if (t->rows) text_add(&head, "%zu,", t->rows);
        text_add(&head, "%zu],\"data_offsets\":[%zu,%zu]}", t->columns, offset, end);
        offset = end;
    }
    text_add(&head, "}");
    while (head.length % 8) text_add(&head, " ");
    OutFile out;
    uint8_t length[8];
    char digits[9];
    out_open(&out, path);
    put_u64(length, head.length);
    out_write(&out, length, 8);
    out_write(&out, head.text, head.length);
    uint32_t crc = crc32_add(crc32_add(0, length, 8), (const uint8_t *)head.text, head.length);
    for (const TensorOut *t = tensors; t < tensors + n; t++)
        crc = out_floats(&out, t->data, max_size(t->rows, 1) * t->columns, crc);
    snprintf(digits, sizeof digits, "%08x", (unsigned)crc);
    out_rewrite(&out, (long)crc_at, digits, 8);
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
    const uint8_t *bytes = file_bytes(path, &size);
    int dataset = size >= 8 && memcmp(bytes, DATASET_MAGIC, 8) == 0;
    file_release(bytes, size);
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

// ROC-AUC by the rank sum, tied scores sharing their mean rank, NaN if only one class is there; and
// average precision: the sum over thresholds of precision * step in recall, NaN without positives.
// Labels above 0.5 are positive.
static inline void ranking_metrics(double *auc, double *ap, const Scored *sorted, size_t n) {
    double positives = 0, below = 0, rank_sum = 0, precision_sum = 0;
    for (size_t i = 0; i < n; i++) positives += sorted[i].label > 0.5f;
    for (size_t i = 0, end; i < n; i = end) {  // a run of equal scores
        double here = 0;
        end = i;
        do here += sorted[end++].label > 0.5f;
        while (end < n && sorted[end].score == sorted[i].score);
        rank_sum += here * 0.5 * (double)(i + 1 + end);
        precision_sum += here * (positives - below) / (double)(n - i);
        below += here;
    }
    double pairs = positives * ((double)n - positives);
    *auc = pairs > 0 ? (rank_sum - positives * (positives + 1) / 2) / pairs : (double)NAN;
    *ap = positives > 0 ? precision_sum / positives : (double)NAN;
}

enum { METRIC_AUC, METRIC_AP, METRIC_RMSE, METRIC_MAE, METRIC_R2, METRICS };
static const char *const METRIC_NAMES[METRICS] = {"ROC-AUC", "AP", "RMSE", "MAE", "R2"};

// All metrics of task y that make sense for its kind, NaN for the others and where undefined.
// scores (n, Y): logits (in float32 large probabilities are all 1), or predicted values.
static inline void task_metrics(double metric[METRICS], TaskKind kind, const float *scores,
                                const float *labels, size_t n, size_t Y, size_t y) {
    size_t count = 0;
    Scored *list = xmalloc(n, sizeof *list);
    for (size_t i = 0; i < n; i++)
        if (!isnan(labels[i * Y + y]))
            list[count++] = (Scored){scores[i * Y + y], labels[i * Y + y]};
    qsort(list, count, sizeof *list, scored_compare);
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
        ranking_metrics(&metric[METRIC_AUC], &metric[METRIC_AP], list, count);
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

// mean (columns) of the rows first..last-1 of a table.
static inline void rows_mean(double *mean, const float *rows, int columns, int64_t first,
                             int64_t last) {
    for (int k = 0; k < columns; k++) {
        mean[k] = 0;
        for (int64_t i = first; i < last; i++)
            mean[k] += (double)rows[i * columns + k] / (double)(last - first);
    }
}

// How far probabilities p of class 1 can be believed: the mean squared distance to the labels that
// are there (Brier 1950), and how often class 1 was found where p was in each fifth of 0..1.
static inline void print_reliability(FILE *out, const float *p, const float *labels, size_t n) {
    double count[5] = {0}, said[5] = {0}, found[5] = {0}, brier = 0, all = 0;
    for (size_t k = 0; k < n; k++) {
        if (isnan(labels[k])) continue;
        int bin = min_int((int)(p[k] * 5), 4);
        double error = (double)p[k] - (double)labels[k];
        count[bin] += 1;
        said[bin] += (double)p[k];
        found[bin] += (double)labels[k];
        brier += error * error;
        all += 1;
    }
    if (all == 0) return;
    fprintf(out, "Brier score %.4f; where the probability is\n", brier / all);
    for (int k = 0; k < 5; k++)
        if (count[k] > 0)
            fprintf(out, "  %.1f to %.1f, of %.0f: said %.2f, found %.2f\n", k / 5.0, (k + 1) / 5.0,
                    count[k], said[k] / count[k], found[k] / count[k]);
}

#endif
