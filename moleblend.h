// moleblend.h - what moleblend.c and data_prep.c share
//
//   1 errors           DIE, CHECK: one line on stderr, exit 1, unfinished outputs removed
//   2 memory           xmalloc, xrealloc: sizes are checked before they are multiplied
//   3 random numbers   Philox4x32-10: a draw depends on nothing but its name
//   4 molecules        what both programs exchange, and its vocabularies
//   5 dataset files    format (documented there), reader; the writer is prep/writer.h
//   lib/               files, machine, options, progress, tensors, metrics: see each #include
//
// All functions are static inline: a program is one .c file and headers, nothing to link.
#ifndef MOLEBLEND_H
#define MOLEBLEND_H

#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L  // fsync, mmap, isatty; harmless where they do not exist
#endif
#define _ISOC11_SOURCE 1         // aligned_alloc, for compilers that say C99 (tcc)
#define _DARWIN_C_SOURCE 1       // O_NOFOLLOW on a Mac
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
static int mb_temporary;  // it has no tmpfile(); these, an input's copy and an output, stay
#define tmpfile() fopen(mb_temporary++ ? MB_PROGRAM "2.tmp" : MB_PROGRAM ".tmp", "w+b")
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

#if (defined(__GNUC__) && !defined(__OPTIMIZE__)) || defined(__TINYC__)
#define MB_OPTIMIZED 0
#else
#define MB_OPTIMIZED 1  // as far as the compiler says
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

typedef ptrdiff_t idx;  // counts and offsets: signed, so that differences and comparisons hold
static inline idx min_idx(idx a, idx b) { return a < b ? a : b; }
static inline idx max_idx(idx a, idx b) { return a > b ? a : b; }

// =================================================================================================
// 1 Errors. A message states the file (and line or record), what was expected and what was found:
//   DIE("%s:%d: expected a bond count, found \"%s\"", path, line, text)
// There is no other way out of a program that failed.
// =================================================================================================

// A file being written: `tmp` until out_commit() renames it to `target`, which is `path` or what
// that leads to as a symbolic link.
typedef struct OutFile {
    FILE *file;
    char *path, *target, *tmp;
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

// `count` zeroed floats that begin at a cache line, so that no vector straddles two: 3 % of a
// training step. hint: what to try if memory is refused. The caller frees.
static inline float *floats_alloc(size_t count, const char *hint) {
#ifdef _WIN32  // has no aligned_alloc()
    (void)hint;
    return xmalloc(count, sizeof(float));
#else
    enum { LINE = 64 };
    size_t bytes = mul_size(count / (LINE / sizeof(float)) + 1, LINE);
    float *x = aligned_alloc(LINE, bytes);
    CHECK(x, "out of memory: %.1f MiB were refused; try %s", (double)bytes / (1 << 20), hint);
    return memset(x, 0, bytes);
#endif
}

#include "lib/files.h"     // out_open(), out_commit(): outputs whole or not at all; file_bytes()
#include "lib/machine.h"   // signals_catch(), memory_check(), threads_set(): sharing the machine
#include "lib/bf16.h"      // gemm_bf16, rounded(): the precision of matrix products

// =================================================================================================
// 3 Random numbers. Philox4x32-10 (Salmon et al., SC 2011; constants from there): a keyed mixing of
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

#include "lib/options.h"   // options_parse(): one table drives parsing, range checks and --help
#include "lib/progress.h"  // progress_show(): done, rate and time left, on stderr

// =================================================================================================
// 4 Molecules: heavy atoms 0..n-1 with the nine atom features and bonds with the three bond
//   features of OGB (Hu et al. 2020, ogb.utils.features), each an index into its list of values.
// =================================================================================================

enum { ATOM_FEATURES = 9, BOND_FEATURES = 3 };

// Number of values of each atom feature; where there is a "misc" value it is the last one.
//   atomic number Z-1 (118: Z = 0), chiral tag, total degree, formal charge + 5, total H,
//   radical electrons, hybridization, aromatic, in a ring
static const uint8_t ATOM_FEATURE_SIZES[ATOM_FEATURES] = {119, 5, 12, 12, 10, 6, 6, 2, 2};

static const char *const SYMBOLS =  // three characters for each Z - 1
    "H  He Li Be B  C  N  O  F  Ne Na Mg Al Si P  S  Cl Ar K  Ca Sc Ti V  Cr Mn Fe Co Ni Cu Zn "
    "Ga Ge As Se Br Kr Rb Sr Y  Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I  Xe Cs Ba La Ce Pr Nd "
    "Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W  Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th "
    "Pa U  Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og *  ";

// A bond's three features as one code 0..59: 12 * type + 2 * stereo + conjugated
//   type: single, double, triple, aromatic, misc; stereo: none, Z, E, cis, trans, any
enum { BOND_TYPES = 5, BOND_STEREOS = 6, BOND_CODES = BOND_TYPES * BOND_STEREOS * 2 };

enum { MAX_ATOMS = 65535, MAX_BONDS = 65535, MAX_NAME = 65535, MAX_TASKS = 65535 };

// The size of a label: squares of errors, and sums of 1e8 of them, still fit a float.
#define LABEL_MAX 1e15

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
// 5 Dataset files. All numbers little-endian whatever the host, no padding:
//
//   header, 64 bytes
//      0  8  magic "MOLBLEND"          32  8  file size in bytes
//      8  4  format version, 2         40  4  most atoms of a molecule
//     12  4  number of tasks           44  4  most bonds of a molecule
//     16  8  number of molecules       48  4  number of skipped records
//     24  8  offset of the index       52  4  which split it is a part of; 0: of none, or not known
//                                      56  4  flags: how its molecules were prepared, see below
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

#define DATASET_BEGINS "MOLBLEND"
enum { DATASET_VERSION = 2, DATASET_HEADER = 64, RECORD_HEADER = 12 };
enum { PREP_LARGEST_FRAGMENT = 1 };  // flags: only the largest fragment of each record
enum { PREP_STEREO = 2 };            // flags: it times the kind of the chiral tags, below 4
enum { PREP_HYDROGENS = 8 };         // flags: hydrogen atoms are atoms

// What CW and CCW of a dataset refer to (data_prep --stereo): the order in which the file lists an
// atom's neighbours, as in the release; ranks, so that order does not matter; there are none.
enum { TAGS_RDKIT, TAGS_INVARIANT, TAGS_NONE, N_TAG_KINDS };
static const char *const TAG_KINDS[N_TAG_KINDS] = {"rdkit", "invariant", "none"};

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

typedef struct {
    const char *path;     // as given to dataset_open(), which does not copy it
    const uint8_t *data;  // the whole file, mapped or read
    size_t size, count, skipped;
    const uint8_t *index, *skips;
    uint32_t flags, split;  // split: which it is a part of, 0: not known
    int n_tasks, max_atoms, max_bonds;
    char **task_names;    // (n_tasks)
    const char *stereo;   // one of TAG_KINDS
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
    CHECK(d->size >= DATASET_HEADER && memcmp(h, DATASET_BEGINS, 8) == 0,
          "%s: not a dataset file (expected one made by data_prep)", path);
    CHECK(get_u32(h + 8) == DATASET_VERSION, "%s: expected format version %d, found %u; make it "
          "again with data_prep", path, DATASET_VERSION, (unsigned)get_u32(h + 8));
    CHECK(get_u64(h + 32) == d->size, "%s: %s: expected %llu bytes, found %zu", path,
          get_u64(h + 32) > d->size ? "truncated" : "has bytes behind its end",
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
    d->flags = get_u32(h + 56);
    CHECK(d->flags / PREP_STEREO % 4 < N_TAG_KINDS && d->flags < 2 * PREP_HYDROGENS,
          "%s: flags %u: made by a newer data_prep", path, (unsigned)d->flags);
    d->stereo = TAG_KINDS[d->flags / PREP_STEREO % 4];
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
    d->skipped = get_u32(h + 48);
    d->split = get_u32(h + 52);
    const uint8_t *p = d->skips;
    Skipped skipped;
    for (size_t k = 0; k < d->skipped && p; k++) p = dataset_skipped(&skipped, d, p);
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

// Opens the part beside a training set, if there is a path; one that is empty is left out, said, as
// is that it comes of another split.
static inline void dataset_open_part(Dataset *d, const char *path, const Dataset *train) {
    files_input(path);  // of a resumed run its state may name it
    if (path) dataset_open(d, path);
    if (path && d->split && train->split && d->split != train->split)
        fprintf(stderr, "note    %s: comes of another split than %s; both may have the same "
                "molecules: make them again, by one data_prep --split\n", path, train->path);
    if (!path || d->count) return;
    fprintf(stderr, "note    %s: the dataset is empty and is left out\n", path);
    dataset_close(d);
    *d = (Dataset){0};
}

// Atoms of molecule i, without touching its record.
static inline int dataset_atoms(const Dataset *d, size_t i) {
    return (int)get_u16(d->index + 8 * i);
}

// Has molecule i positions? Reads only the head of its record.
static inline int dataset_has_pos(const Dataset *d, size_t i) {
    return get_u16(d->data + (get_u64(d->index + 8 * i) >> 16) + 8) & 1;
}

// A dataset's fingerprint: of its index, and the checksums of all records; 0: none is open.
static inline uint32_t data_print(const Dataset *d) {
    uint32_t crc = d->data ? get_u32(d->index + 12 * d->count + 8) : 0;
    for (size_t i = 0; i < d->count; i++)
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

// The molecule that `text` names, by its index from 0 on or by its name; says so if that also is
// another's name. Dies if there is none.
static inline size_t dataset_find(const Dataset *d, const char *text) {
    char *end = NULL;
    unsigned long long index = strtoull(text, &end, 10);
    int is_index = isdigit((unsigned char)text[0]) && *end == 0 && index < d->count;
    size_t found = is_index ? (size_t)index : d->count, others = 0, other = d->count;
    Molecule m = {0};
    for (size_t i = 0; i < d->count; i++) {
        if (i == found || dataset_try(d, i, &m) || strcmp(m.name, text) != 0) continue;
        if (found == d->count) found = i;
        else if (others++ == 0) other = i;
    }
    CHECK(found < d->count, "%s: expected the index of one of its %zu molecules, from 0 on, or a "
          "name, found \"%s\"", d->path, d->count, text);
    if (others)
        fprintf(stderr, "note    %s: \"%s\" is taken as molecule %zu; %zu more of that name, the "
                "first %zu\n", d->path, text, found, others, other);
    molecule_free(&m);
    return found;
}

// Dies unless both have the same tasks.
static inline void dataset_same_tasks(const Dataset *a, const Dataset *b) {
    int same = a->n_tasks == b->n_tasks;
    for (int t = 0; same && t < a->n_tasks; t++)
        same = strcmp(a->task_names[t], b->task_names[t]) == 0;
    CHECK(same, "%s: expected the tasks of %s", b->path, a->path);
}

// Says so if the chiral tags of a dataset (unless it is not open) are not those of `path`; a model
// that does not say (stereo is NULL) has RDKit's.
static inline void note_stereo(const Dataset *d, const char *path, const char *stereo) {
    if (!stereo) stereo = TAG_KINDS[TAGS_RDKIT];
    if (d->data && strcmp(stereo, d->stereo) != 0)
        fprintf(stderr, "note    %s: made with --stereo %s, %s with %s\n", d->path, d->stereo, path,
                stereo);
}

#include "lib/tensors.h"   // tensor_file_open(), tensor_file_write(): safetensors; file_info()
#include "lib/metrics.h"   // task_metrics(): ROC-AUC, average precision, RMSE, MAE, R2, reliability

#endif
