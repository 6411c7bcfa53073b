// prep/splits.h - the dataset, or its parts: the encoded records go to a temporary file first; when
// their number (and scaffolds) are known, they are copied to the parts, in input order within each
//
//   parse_fractions()                   --split
//   split_by_order(), split_by_scaffold()   who goes where
//   part_path()                         the name of a part
//   output_open(), output_finish()      one dataset, or a pool and its parts

enum { PARTS_MAX = 3 };

static const char *const PART_NAMES[PARTS_MAX] = {"train", "valid", "test"};

typedef struct {
    OutFile file;            // of records, each behind its size and number
    ScaffoldKey *key;        // (count), only for scaffold splits
    size_t count, room;
} Pool;

#define POOL_BEGINS "records of data_prep\n"

// Appends a record and, for scaffold splits, its key.
static void pool_append(Pool *p, const uint8_t *record, size_t size, uint32_t number,
                        const ScaffoldKey *key) {
    if (key && p->count == p->room) {
        p->room = p->room ? 2 * p->room : 4096;
        p->key = xrealloc(p->key, p->room, sizeof *p->key);
    }
    if (key) p->key[p->count] = *key;
    p->count++;
    out_write(&p->file, &size, sizeof size);
    out_write(&p->file, &number, sizeof number);
    out_write(&p->file, record, size);
}

// Parts by position in `order` (NULL: input order): first fraction[0], then fraction[1], ...
static void split_by_order(uint8_t *part, size_t n, const uint32_t *order, const double *fraction,
                           int n_parts) {
    double edge = 0;
    size_t at = 0;
    for (int p = 0; p < n_parts; p++) {
        edge += fraction[p];
        size_t stop = p + 1 == n_parts ? n : (size_t)(edge * (double)n + 1e-9);
        for (; at < stop && at < n; at++) part[order ? order[at] : at] = (uint8_t)p;
    }
}

typedef struct { size_t first, start, size; } ScaffoldGroup;  // of the sorted entries
typedef struct { ScaffoldKey key; size_t molecule; } ScaffoldEntry;

// By scaffold, then by position.
static int compare_scaffold_entries(const void *a, const void *b) {
    const ScaffoldEntry *x = a, *y = b;
    if (x->key.a != y->key.a) return x->key.a < y->key.a ? -1 : 1;
    if (x->key.b != y->key.b) return x->key.b < y->key.b ? -1 : 1;
    return (x->molecule > y->molecule) - (x->molecule < y->molecule);
}

// Largest group first; among equals the one with the later first member.
static int compare_scaffold_groups(const void *a, const void *b) {
    const ScaffoldGroup *x = a, *y = b;
    if (x->size != y->size) return x->size < y->size ? 1 : -1;
    return (x->first < y->first) - (x->first > y->first);
}

// Parts by scaffold (MoleculeNet, OGB): whole groups go to the first part that they do not
// overfill, what fits none goes to the last. Returns the size of the largest group.
static size_t split_by_scaffold(uint8_t *part, const ScaffoldKey *key, size_t n,
                              const double *fraction, int n_parts) {
    ScaffoldEntry *entries = xmalloc(n, sizeof *entries);
    ScaffoldGroup *groups = xmalloc(n, sizeof *groups);
    size_t n_groups = 0, filled[PARTS_MAX] = {0};
    for (size_t i = 0; i < n; i++) entries[i] = (ScaffoldEntry){key[i], i};
    qsort(entries, n, sizeof *entries, compare_scaffold_entries);
    for (size_t i = 0; i < n; i++) {
        ScaffoldEntry *e = &entries[i];
        if (i == 0 || e->key.a != e[-1].key.a || e->key.b != e[-1].key.b)
            groups[n_groups++] = (ScaffoldGroup){e->molecule, i, 0};
        groups[n_groups - 1].size++;
    }
    qsort(groups, n_groups, sizeof *groups, compare_scaffold_groups);
    for (size_t g = 0; g < n_groups; g++) {
        size_t total = groups[g].size;
        double cutoff = 0;
        int p = 0;
        for (; p + 1 < n_parts; p++) {
            total += filled[p];
            cutoff += fraction[p];
            if ((double)total <= cutoff * (double)n + 1e-9) break;
        }
        filled[p] += groups[g].size;
        for (size_t k = 0; k < groups[g].size; k++)
            part[entries[groups[g].start + k].molecule] = (uint8_t)p;
    }
    size_t largest = n ? groups[0].size : 0;
    FREE_ALL(entries, groups);
    return largest;
}

// Path of one part: {} in the pattern becomes its name; else "train" in the file name does, or
// the name goes before the ending: data.bin -> data.train.bin.
static char *part_path(const char *pattern, const char *part) {
    const char *base = strrchr(pattern, '/');
    base = base ? base + 1 : pattern;
    const char *hole = strstr(pattern, "{}"), *train = strstr(base, "train");
    const char *dot = strrchr(base, '.'), *at = hole ? hole : train ? train : dot;
    if (!at) return xprintf("%s.%s", pattern, part);
    return xprintf("%.*s%s%s%s", (int)(at - pattern), pattern, hole || train ? "" : ".", part,
                   hole ? at + 2 : train ? at + 5 : at);
}

// What the header of a dataset says of how its molecules were prepared.
static uint32_t prep_flags(const PrepOptions *opt) {
    return (opt->largest_fragment ? PREP_LARGEST_FRAGMENT : 0u) +
           (opt->keep_hydrogens ? PREP_HYDROGENS : 0u) + PREP_STEREO * tag_kind(opt);
}

// Copies the pooled records to their parts, which get one identity: the checksum of all records and
// of where they went. Those that were skipped, noted in a writer without file, are listed in the
// first part, so that the parts together account for the whole input.
static void write_parts(Pool *pool, const uint8_t *part, int n_parts, const char *pattern,
                        const Conversion *c, const DatasetWriter *skipped) {
    DatasetWriter writers[PARTS_MAX];
    uint8_t *record = NULL;
    size_t room = 0, size;
    uint32_t split = 0;
    CHECK(fflush(pool->file.file) == 0, "%s: write failed: %s", pool->file.tmp, strerror(errno));
    FILE *in = fopen(pool->file.tmp, "rb");
    CHECK(in && fseek(in, sizeof POOL_BEGINS - 1, SEEK_SET) == 0, "%s: cannot read: %s",
          pool->file.tmp, strerror(errno));
    for (int p = 0; p < n_parts; p++) {
        char *path = part_path(pattern, PART_NAMES[p]);
        dataset_create(&writers[p], path, c->n_tasks, c->task_names);
        free(path);
    }
    for (size_t i = 0; i < pool->count; i++) {
        uint32_t number;
        int whole = fread(&size, sizeof size, 1, in) == 1 &&
                    fread(&number, sizeof number, 1, in) == 1;
        if (whole && size > room) record = xrealloc(record, room = 2 * size, 1);
        CHECK(whole && fread(record, 1, size, in) == size, "%s: read failed: %s", pool->file.tmp,
              strerror(errno));
        dataset_append(&writers[part[i]], record, size, number);
        split = crc32_add(crc32_add(split, record, 4), &part[i], 1);
    }
    fclose(in);
    free(record);
    writers[0].skips = skipped->skips;
    writers[0].skipped = skipped->skipped;
    for (int p = 0; p < n_parts; p++) {
        writers[p].flags = prep_flags(c->opt);
        fprintf(stderr, "%-8s %8zu molecules -> %s\n", PART_NAMES[p], writers[p].count,
                writers[p].out.path);
        writers[p].split = split ? split : 1;
        dataset_finish(&writers[p]);
    }
}

// Fractions "0.8,0.1,0.1", or counts of which one may be "rest", as "110000,10000,rest", into f;
// returns how many. The rest is -1.
static int parse_fractions(const char *text, double *f) {
    const char *p = text;
    double sum = 0;
    int n = 0, rest = 0, whole = 1, good = 1;
    for (; *p && n < PARTS_MAX && good; n++, p += *p == ',') {
        char *end;
        int is_rest = strncmp(p, "rest", 4) == 0;
        f[n] = is_rest ? -1 : strtod(p, &end);
        good = is_rest ? !rest++ : end != p && f[n] >= 0;
        whole = whole && (is_rest || f[n] == floor(f[n]));
        sum += is_rest ? 0 : f[n];
        p = is_rest ? p + 4 : end;
        good = good && (*p == ',' || *p == 0);
    }
    int counts = whole && sum > 1;
    CHECK(good && n >= 2 && *p == 0 && (counts || (!rest && fabs(sum - 1) < 1e-6)),
          "--split: expected 2 or 3 fractions that add up to 1, such as 0.8,0.1,0.1, or counts, "
          "such as 1000,100,rest, found \"%s\"", text);
    return n;
}

// Makes fractions of counts, of n molecules.
static void counts_to_fractions(double *f, int n_parts, size_t n) {
    double sum = 0;
    int rest = 0;
    for (int k = 0; k < n_parts; k++) sum += fmax(f[k], 0), rest |= f[k] < 0;
    if (sum <= 1 + 1e-6) return;
    CHECK(rest ? sum <= (double)n : fabs(sum - (double)n) < 0.5,
          "--split: asks for %.0f molecules, there are %zu%s", sum, n,
          rest ? "" : "; one part may be rest");
    for (int k = 0; k < n_parts; k++) f[k] = (f[k] < 0 ? (double)n - sum : f[k]) / (double)n;
}

// Where kept records go: straight to one dataset, or to a pool that is split later.
typedef struct {
    int n_parts;             // 1: no split
    double fraction[PARTS_MAX];
    DatasetWriter writer;
    Pool pool;
} Output;

// Opens the dataset, or the pool. The tasks are known.
static void output_open(Output *out, const Conversion *c) {
    if (out->n_parts == 1) {
        dataset_create(&out->writer, c->opt->output, c->n_tasks, c->task_names);
        return;
    }
    char *name = xprintf("%s.records", c->opt->output);
    out_open(&out->pool.file, name, POOL_BEGINS);
    out_write(&out->pool.file, POOL_BEGINS, sizeof POOL_BEGINS - 1);
    free(name);
}

// Says what is odd about the parts; dies if there is nothing to train on. group: molecules of the
// most frequent scaffold, if the split is by scaffold.
static void check_parts(const uint8_t *part, size_t n, int n_parts, size_t group) {
    size_t count[PARTS_MAX] = {0};
    for (size_t i = 0; i < n; i++) count[part[i]]++;
    CHECK(count[0], "the training part is empty: %zu, %zu and %zu molecules in the parts", count[0],
          count[1], count[2]);
    for (int p = 1; p < n_parts; p++)
        if (!count[p]) fprintf(stderr, "note    the %s part is empty\n", PART_NAMES[p]);
    if (max_size(count[1], count[2]) <= count[0]) return;
    fprintf(stderr, "note    the training part is not the largest");
    if (group > count[0])
        fprintf(stderr, ": %zu of %zu molecules have the same scaffold (or all no ring) and stay "
                "together, too many for it; --split-by random ignores scaffolds", group, n);
    fputc('\n', stderr);
}

// Splits if asked to, and gives the outputs their names.
static void output_finish(Output *out, const Conversion *c, Summary *sum) {
    const PrepOptions *opt = c->opt;
    if (out->n_parts == 1) {
        print_twins(sum->twins, out->writer.count, NULL);
        fprintf(stderr, "%zu molecules -> %s\n", out->writer.count, opt->output);
        out->writer.flags = prep_flags(opt);
        dataset_finish(&out->writer);
        return;
    }
    size_t n = out->pool.count, group = 0;
    uint8_t *part = xmalloc(n, 1);
    uint32_t *order = NULL;
    counts_to_fractions(out->fraction, out->n_parts, n);
    if (c->parts.n_rows || c->part_column) {
        for (size_t i = 0; i < n; i++) part[i] = (uint8_t)out->pool.key[i].a;
    } else if (strcmp(opt->split_by, "scaffold") == 0) {
        group = split_by_scaffold(part, out->pool.key, n, out->fraction, out->n_parts);
    } else {
        if (strcmp(opt->split_by, "random") == 0) {
            order = xmalloc(n, sizeof *order);
            rng_permutation(order, n, (uint64_t)opt->seed, RNG_SPLIT, 0);
        }
        split_by_order(part, n, order, out->fraction, out->n_parts);
    }
    check_parts(part, n, out->n_parts, group);
    print_twins(sum->twins, n, part);
    write_parts(&out->pool, part, out->n_parts, opt->output, c, &out->writer);
    out_discard(&out->pool.file);
    FREE_ALL(out->pool.key, order, part);
}
