// lib/files.h - Files. An output is whole or not there: data go to PATH.tmp, which out_commit() flushes to the
//   disk and renames. Every write is checked; a full disk shows at the latest in out_commit().
//   PATH may only be a regular file or nothing: to rename onto a device would remove it.
//   PATH.tmp is locked while it is written, so two programs with one output never mix.

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
