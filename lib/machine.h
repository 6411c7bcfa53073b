// lib/machine.h - being stopped, and sharing the machine
//
//   signals_catch(), mb_signal       SIGINT, SIGTERM and SIGHUP ask for an orderly end
//   now_seconds()                    a clock
//   memory_limit(), memory_check()   what a machine, a container or ulimit leaves us
//   program_begin()                  the first call of main()
//   threads_set(), threads_adapt()   no more threads than CPUs are free
//   thread_count(), thread_id()
//
// At a signal the work at hand is finished and saved. Another one, 1.5 seconds later or more
// (timeout(1) sends each twice), ends the program at once.

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

// The number behind `key` at the begin of a line of FOLDER/FILE, or with key "" on its first line,
// divided by the next one, if another follows; 0 if there is none.
static inline double read_number(const char *folder, const char *file, const char *key) {
    char line[256], *path = xprintf("%s/%s", folder, file);
    FILE *f = fopen(path, "r");
    double number = 0, period;
    while (f && number == 0 && fgets(line, sizeof line, f))
        if (strncmp(line, key, strlen(key)) == 0 &&
            sscanf(line + strlen(key), "%lf %lf", &number, &period) == 2) number /= period;
    if (f) fclose(f);
    free(path);
    return number;
}

// Bytes that a control group (second: of version 2) uses and that cannot be freed: pages of files
// can, those of memory not.
static inline double group_memory(const char *folder, int second) {
    return read_number(folder, second ? "memory.current" : "memory.usage_in_bytes", "") -
           read_number(folder, "memory.stat", second ? "inactive_file " : "total_inactive_file ") -
           read_number(folder, "memory.stat", second ? "active_file " : "total_active_file ");
}

// The least limit of our control group and the groups above it, 0: none; of the controller "cpu" in
// CPUs, of "memory" what is left of it. root: "", or for tests a folder.
static inline double group_limit(const char *root, const char *controller) {
    int cpu = strcmp(controller, "cpu") == 0;
    const char *const files[] = {cpu ? "cpu.cfs_quota_us" : "memory.limit_in_bytes",
                                 cpu ? "cpu.max" : "memory.max"};
    double least = 0;
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
            char *folder = xprintf("%s/sys/fs/cgroup/%s%s", root, second ? "" : controller,
                                   group + 1);
            double limit = read_number(folder, files[second], "");
            if (cpu && !second) limit /= read_number(folder, "cpu.cfs_period_us", "");
            if (!cpu && limit > 0) limit = fmax(limit - group_memory(folder, second), 1);
            if (limit > 0 && (least == 0 || limit < least)) least = limit;
            free(folder);
        }
    }
    if (groups) fclose(groups);
    return least;
}

// Bytes that this process can still get, as far as the system says: memory that is free or can be
// freed, what is left of our control group's and of the address space. root: see group_limit().
static inline double memory_limit(const char *root) {
    double least = group_limit(root, "memory");
    char *proc = xprintf("%s/proc", root);
    double kib = read_number(proc, "meminfo", "MemAvailable:");
    if (least == 0) least = (double)INFINITY;
    if (kib > 0) least = fmin(least, 1024 * kib);
#if MB_POSIX
    struct rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
        least = fmin(least, (double)limit.rlim_cur -
                            1024 * read_number(proc, "self/status", "VmSize:"));
#endif
    free(proc);
    return fmax(least, 0);
}

// Dies if `what` needs more memory than there is, with some for what is not worth a check.
static inline void memory_check(uint64_t bytes, const char *what, const char *hint) {
    double there = fmin(memory_limit(""), (double)SIZE_MAX), mib = 1 << 20;
    double need = (double)bytes * 1.0625 + 8 * mib;
    CHECK(need <= there, "%s needs %.0f MiB of memory, and %.0f MiB are free; try %s", what,
          ceil(need / mib), floor(there / mib), hint);
}

// ---- threads. One that waits at the end of a parallel loop spins for a while, because waking it
//   takes longer than most loops. Beside other programs that is a disaster: the spinning threads
//   take the time that the one they wait for needs. So, where the environment says nothing, waiting
//   is short, and steps that do not get the CPUs they ask for are done with fewer threads. That
//   changes no result: threads share out results, never a sum.

enum { MAX_THREADS = 1024 };  // that lib/memory.h has scratch memory for
static int mb_threads;   // most threads that we use; 0: threads_set() was not called
static int mb_adapting;  // may that number be lowered?

// Threads to provide memory for.
static inline int thread_count(void) { return mb_threads ? mb_threads : omp_get_max_threads(); }
static inline int thread_id(void) { return omp_get_thread_num(); }

// To be called first in main(). A write beyond `ulimit -f` shall fail, not kill, and no file be
// opened in the place of a closed stdout or stderr; what is written to the former shall not pass.
// Waiting is made short: a hundredth of gcc's default is as fast on an idle machine. gcc's runtime
// has read its environment before main() begins, so the program begins again with another one.
static inline void program_begin(char **argv) {
#if MB_POSIX
    signal(SIGXFSZ, SIG_IGN);
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0) open("/dev/null", fd == 1 ? O_RDONLY : O_RDWR);
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
    double quota = group_limit("", "cpu");
    mb_adapting = MB_POSIX && !wanted && getenv("MB_CALM") && !getenv("OMP_NUM_THREADS");
    if (!wanted && !getenv("OMP_NUM_THREADS") && quota > 0 && quota < omp_get_num_procs())
        wanted = quota < 1 ? 1 : (int64_t)(quota + 0.5);
    if (wanted) omp_set_num_threads((int)wanted);
    mb_threads = omp_get_max_threads();
    CHECK(mb_threads <= MAX_THREADS, "OMP_NUM_THREADS: expected at most %d threads, found %d",
          MAX_THREADS, mb_threads);
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
