// lib/files.h - files. An output is whole or not there: data go to PATH.tmp, which out_commit()
// flushes to the disk and renames. Every write is checked; a full disk shows at the latest there
//
//   out_open(), out_write(), out_rewrite(), out_commit(), out_discard()   an output
//   npy_begin()                       an output that is an array in NumPy's format
//   out_probe()                       dies if it may not, or cannot be written
//   file_note()                       an input or output: none is another one, see FileUse;
//                                     files_input(), files_output(): the same of a command line
//   check_ours(), check_file_ours()   what an output replaces begins as ours do
//   link_target(), folder_of()        where a path leads
//   file_bytes(), file_release()      a whole file, mapped or read
//
// PATH may only be a regular file or nothing: to rename onto a device would remove it. If it is a
// symbolic link, what it leads to is replaced. PATH.tmp is locked while it is written, so two
// programs with one output never mix.

// ---- which file a path means

// Where a path leads if its last part is a symbolic link, be it to nothing; in fresh memory.
static inline char *link_target(const char *path) {
    char *at = xprintf("%s", path);
#if MB_POSIX
    char to[4096];
    ssize_t n;
    for (int links = 0; (n = readlink(at, to, sizeof to)) >= 0; links++) {
        const char *slash = to[0] == '/' ? NULL : strrchr(at, '/');
        CHECK(links < 40 && n < (ssize_t)sizeof to, "%s: too many symbolic links", path);
        char *next = xprintf("%.*s%.*s", slash ? (int)(slash - at) + 1 : 0, at, (int)n, to);
        free(at);
        at = next;
    }
#endif
    return at;
}

// The folder that holds a file, as FOLDER/. or just a dot; in fresh memory.
static inline char *folder_of(const char *path) {
    const char *slash = strrchr(path, '/');
    return xprintf("%.*s.", slash ? (int)(slash - path) + 1 : 0, path);
}

// A file that the program reads or writes.
typedef struct {
    char *path, *place, *file;  // as given; its folder and name; its device and inode, NULL: none
    int output;
} FileUse;

static FileUse *mb_files;  // until the program ends
static int mb_n_files;

#if MB_POSIX
// Device and inode of what is at a path, as text in fresh memory; NULL if nothing is.
static inline char *file_number(const char *path) {
    struct stat info;
    if (stat(path, &info) != 0) return NULL;
    return xprintf("%llx:%llx", (unsigned long long)info.st_dev, (unsigned long long)info.st_ino);
}
#endif

// Which file a path means, whatever its spelling.
static inline FileUse file_use(const char *path, int output) {
    FileUse f = {xprintf("%s", path), link_target(path), NULL, output};
#if MB_POSIX
    char *target = f.place, *folder = folder_of(target), *number = file_number(folder);
    const char *slash = strrchr(target, '/');
    f.file = file_number(target);
    f.place = xprintf("%s/%s", number ? number : folder, slash ? slash + 1 : target);
    FREE_ALL(target, folder, number);
#elif defined(_WIN32)
    char *full = _fullpath(NULL, path, 0);
    for (char *p = full; p && *p; p++) *p = (char)tolower((unsigned char)*p);
    if (full) f.place = full;
#endif
    return f;
}

// Notes a file. Dies if it is a noted one, by place or inode, and one of them is an output. Outputs
// get new inodes when they are written: they are held against each other by their places.
static inline void file_note(const char *path, int output) {
    FileUse f = file_use(path, output);
    for (int k = 0; k < mb_n_files; k++) {
        const FileUse *g = &mb_files[k];
        int same = strcmp(f.place, g->place) == 0 ||
                   (f.output != g->output && f.file && g->file && strcmp(f.file, g->file) == 0);
        CHECK(!same || !(f.output || g->output), "%s: is the same file as the %s %s; give the "
              "output another name", path, g->output ? "output" : "input", g->path);
    }
    mb_files = xrealloc(mb_files, (size_t)mb_n_files + 1, sizeof *mb_files);
    mb_files[mb_n_files++] = f;
}

// Notes a file that will be read, before any output is opened. NULL and "-" are no files.
static inline void files_input(const char *path) {
    if (path && strcmp(path, "-") != 0) file_note(path, 0);
}

// Notes an output and its temporary file: each once, so two outputs with one name are found. An
// output that is not noted is by out_open().
static inline void files_output(const char *path) {
    CHECK(*path, "expected the name of an output, found \"\"");
    file_note(path, 1);
    char *target = link_target(path), *tmp = xprintf("%s.tmp", target);
    if (strcmp(path, "-") != 0) file_note(tmp, 1);
    FREE_ALL(target, tmp);
}

// ---- outputs

// Do the bytes begin as the pattern says? ? is any byte, * the rest of a line, | ends the pattern.
static inline int begins_as(const char *p, const char *end, const char *pattern) {
    for (; *pattern && *pattern != '|'; pattern++) {
        if (*pattern == '*') while (p < end && *p != '\n') p++;
        else if (p == end || (*pattern != '?' && *pattern != *p)) return 0;
        else p++;
    }
    return 1;
}

// The rule by which what exists is replaced: it is empty, or its first n bytes are those with which
// the output begins, by one of the patterns in `begins` (NULL: it has none).
static inline void check_ours(const char *path, const char *bytes, size_t n, const char *begins) {
    int ours = n == 0;
    for (const char *q = begins; q && !ours; q = strchr(q + 1, '|'))
        ours = begins_as(bytes, bytes + n, q + (*q == '|'));
    CHECK(ours, "%s: exists, and does not begin as the output that would replace it; remove it, or "
          "give the output another name", path);
}

enum { BEGIN_BYTES = 1024 };  // that a pattern is held against

// The same of a file, if it is there.
static inline void check_file_ours(const char *path, const char *begins) {
    char bytes[BEGIN_BYTES];
    FILE *f = fopen(path, "rb");
    size_t n = f ? fread(bytes, 1, sizeof bytes, f) : 0;
    CHECK(f ? !ferror(f) : errno == ENOENT, "%s: cannot read what is there: %s", path,
          strerror(errno));
    if (f) fclose(f);
    check_ours(path, bytes, n, begins);
}

// Opens and locks TMP, emptied; dies if another program has it. If that program renamed it between
// our opening and locking it, we hold a file that is no longer TMP: once more. A symbolic link is
// not followed.
static inline FILE *out_lock(const char *tmp, const char *begins) {
#if MB_POSIX
    for (;;) {
        struct stat mine, named;
        struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        int fd = open(tmp, O_RDWR | O_CREAT | O_NOFOLLOW, 0666);
        CHECK(fd >= 0 || errno != ELOOP, "%s: cannot write: it is a symbolic link; remove it", tmp);
        CHECK(fd >= 0 && fstat(fd, &mine) == 0, "%s: cannot write: %s", tmp, strerror(errno));
        CHECK(S_ISREG(mine.st_mode) && mine.st_nlink < 2,
              "%s: cannot write: expected a regular file with one name", tmp);
        if (fcntl(fd, F_SETLK, &lock) != 0 && (errno == EACCES || errno == EAGAIN)) {
            long holder = fcntl(fd, F_GETLK, &lock) == 0 ? (long)lock.l_pid : 0;
            DIE("%s: process %ld is writing it; wait for it, or give another -o", tmp, holder);
        }
        if (stat(tmp, &named) == 0 && mine.st_ino == named.st_ino) {
            char bytes[BEGIN_BYTES];
            ssize_t n = pread(fd, bytes, sizeof bytes, 0);
            check_ours(tmp, bytes, n > 0 ? (size_t)n : 0, begins);
            CHECK(n >= 0 && ftruncate(fd, 0) == 0, "%s: cannot write: %s", tmp, strerror(errno));
            return fdopen(fd, "wb");
        }
        close(fd);
    }
#else
    check_file_ours(tmp, begins);
    return fopen(tmp, "wb");
#endif
}

// Opens PATH.tmp for writing, or for "-" a file without name that out_commit() copies to stdout.
// Dies if PATH is an input or another output, or is there and is not ours. `begins`: how what is
// written begins, see check_ours(); NULL: nothing will be. `out` must stay where it is until
// out_commit().
static inline void out_open(OutFile *out, const char *path, const char *begins) {
    static int hooked;
    struct stat info;
    int is_stdout = strcmp(path, "-") == 0, noted = 0;
    if (!hooked) hooked = atexit(outs_remove) == 0;
    for (int k = 0; k < mb_n_files; k++)
        noted |= mb_files[k].output && strcmp(mb_files[k].path, path) == 0;
    if (!noted) files_output(path);
    if (!is_stdout && stat(path, &info) == 0) {
        CHECK(S_ISREG(info.st_mode), "%s: cannot write: expected a regular file", path);
        check_file_ours(path, begins);
    }
    out->path = xprintf("%s", path);
    out->target = link_target(path);
    out->tmp = is_stdout ? xprintf("standard output, by a temporary file")
                         : xprintf("%s.tmp", out->target);
    out->file = is_stdout ? tmpfile() : out_lock(out->tmp, begins);
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
    FREE_ALL(out->path, out->target, out->tmp);
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
static inline void out_probe(const char *path, const char *begins) {
    OutFile out;
    out_open(&out, path, begins);
    out_discard(&out);
}

// Makes the file durable and gives it its name, before its lock ends with the file.
static inline void out_commit(OutFile *out) {
    int bad = fflush(out->file) != 0 || ferror(out->file);
    if (strcmp(out->path, "-") == 0) {
        char bytes[4096];
        CHECK(!bad && fseek(out->file, 0, SEEK_SET) == 0, "%s: write failed: %s", out->tmp,
              strerror(errno));
        for (size_t n; (n = fread(bytes, 1, sizeof bytes, out->file)) > 0;)
            fwrite(bytes, 1, n, stdout);  // mb_exit() will see whether it came through
        CHECK(!ferror(out->file), "%s: read failed: %s", out->tmp, strerror(errno));
        out_close(out);
        return;
    }
#if MB_POSIX
    bad = bad || (fsync(fileno(out->file)) != 0 && errno != EINVAL);  // EINVAL: not a disk file
#else
    bad = bad || fclose(out->file) != 0;  // an open file cannot be renamed there
    out->file = NULL;
    remove(out->target);  // nor an existing one replaced
#endif
    CHECK(!bad, "%s: write failed: %s", out->tmp, strerror(errno));
    CHECK(rename(out->tmp, out->target) == 0, "%s: cannot rename to %s: %s", out->tmp, out->path,
          strerror(errno));
#if MB_POSIX  // the folder holds the name; where it cannot be flushed, the system sees to it
    char *folder = folder_of(out->target);
    int fd = open(folder, O_RDONLY);
    if (fd >= 0) fsync(fd);
    if (fd >= 0) close(fd);
    free(folder);
#endif
    out_close(out);
}

// Begins an array in NumPy's format: (rows, columns), or (rows) if columns is 0.
static inline void npy_begin(OutFile *out, const char *path, const char *type, size_t rows,
                             size_t columns) {
    char header[96], second[32] = "";
    if (columns) snprintf(second, sizeof second, " %zu", columns);
    snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': (%zu,%s), }",
             type, rows, second);
    out_open(out, path, "\x93NUMPY????{'descr': '<?4', 'fortran_order': False, 'shape': (");
    fprintf(out->file, "\x93NUMPY%c%c%c%c%-117s\n", 1, 0, 118, 0, header);  // of 128 bytes
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
