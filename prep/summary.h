// prep/summary.h - what is said at the end: counts, reasons, labels, molecules that stand twice
//
//   count_fault(), find_reason()  records refused, or kept with a note, by reason
//   describe_fault()              one of them in words
//   print_summary(), print_labels(), print_twins()

// Skipped records, counted by kind, with the first few of each.
typedef struct {
    const char *kind;
    int is_note;             // these records are kept
    int64_t count;
    char *example[EXAMPLES];
} Reason;

#define REJECTS_BEGIN "record,name,line,reason\n"

enum { LABELS_SHOWN = 50 };

// What is kept of a molecule to find others like it.
typedef struct {
    uint64_t key;
    uint32_t labels, index;  // CRC-32 of its labels; its place in the output
} Twin;

typedef struct {
    Reason reasons[32];
    int n_reasons;
    int64_t n_read, n_kept, n_atoms, unmatched, mixtures;
    OutFile rejects;         // open if asked for
    Tally *tally;            // (n_tasks) of the labels of what is kept
    Twin *twins;             // (n_kept)
    size_t twin_room;
} Summary;

// "FILE:LINE: reason", with the column if it is known.
static char *describe_fault(const Source *s, int64_t line, const Fault *f) {
    long long at = (long long)(line + (f->line > 0 ? f->line - 1 : 0));
    if (f->column > 0)
        return xprintf("%s:%lld: column %d: %s", s->path, at, f->column, f->text);
    return xprintf("%s:%lld: %s", s->path, at, f->text);
}

// The place of a kind among the reasons, that behind the last if it is new.
static int find_reason(const Summary *sum, const char *kind) {
    int k = 0;
    while (k < sum->n_reasons && strcmp(sum->reasons[k].kind, kind) != 0) k++;
    return k;
}

// Counts a skipped record, or one of which there is something to note, and keeps the description if
// it is one of the first of its kind.
static void count_fault(Summary *sum, const Source *s, int64_t line, const Fault *f, int is_note) {
    int k = find_reason(sum, f->kind);
    if (k == 32) return;
    if (k == sum->n_reasons) sum->reasons[sum->n_reasons++] = (Reason){f->kind, is_note, 0, {NULL}};
    Reason *r = &sum->reasons[k];
    if (r->count < EXAMPLES) r->example[r->count] = describe_fault(s, line, f);
    r->count++;
}

// Prints what was read, kept and skipped to stderr; frees the examples.
static void print_summary(Summary *sum, int n_sources) {
    fprintf(stderr, "read %lld records from %d file%s, kept %lld (%lld atoms)\n",
            (long long)sum->n_read, n_sources, n_sources == 1 ? "" : "s", (long long)sum->n_kept,
            (long long)sum->n_atoms);
    if (sum->n_read > sum->n_kept)
        fprintf(stderr, "skipped %lld:\n", (long long)(sum->n_read - sum->n_kept));
    for (int q = 0; q < 2 * sum->n_reasons; q++) {  // first the skipped ones
        Reason *r = &sum->reasons[q % sum->n_reasons];
        if (r->is_note != (q >= sum->n_reasons)) continue;
        fprintf(stderr, "%s%8lld  %s\n", r->is_note ? "note" : "", (long long)r->count, r->kind);
        for (int e = 0; e < EXAMPLES && e < r->count; e++) {
            fprintf(stderr, "          %s\n", r->example[e]);
            free(r->example[e]);
        }
    }
    if (sum->unmatched)
        fprintf(stderr, "records of which --labels-from says nothing: %lld\n",
                (long long)sum->unmatched);
    if (sum->mixtures)
        fprintf(stderr, "records of several fragments, such as salts: %lld (--largest-fragment "
                "keeps one of each)\n", (long long)sum->mixtures);
}

// Prints what the labels are - of many, the first and the unusual -, and what is taken for none.
static void print_labels(const Conversion *c, const Summary *sum) {
    int64_t bad = 0, unsaid = 0;
    for (int t = 0; t < c->n_tasks; t++) {
        const Tally *y = &sum->tally[t];
        if (t >= LABELS_SHOWN && !y->bad && !y->censored && !y->form) {
            unsaid++;
            continue;
        }
        fprintf(stderr, "label   %s: %s, %lld present, %lld missing\n", c->task_names[t],
                y->fractions ? "numbers" : "classes", (long long)y->present, (long long)y->missing);
        for (int k = 0; k < 2; k++) {
            char *cells = tally_examples(y, k);
            if (cells)
                fprintf(stderr, "          %lld %s: %s\n", (long long)(k ? y->bad : y->censored),
                        k ? "unusable" : "censored", cells);
            free(cells);
        }
        for (int k = 0; k < FORMS; k++) {
            if (!(y->form >> k & 1)) continue;
            fprintf(stderr, "          %s%s", FORM_NAMES[k],
                    k == 0 && y->fractions ? ", beside other numbers" : "");
            if (y->odd[k].text)
                fprintf(stderr, ", the first \"%s\" (%s)", y->odd[k].text, y->odd[k].place);
            fputc('\n', stderr);
        }
        bad += y->bad;
    }
    if (unsaid) fprintf(stderr, "label   ... and %lld more\n", (long long)unsaid);
    if (bad)
        fprintf(stderr, "labels that are no numbers up to %g, taken as missing: %lld\n", LABEL_MAX,
                (long long)bad);
    if (c->left_out.text) fputs(c->left_out.text, stderr);
}

// By molecule, then in the order of the output.
static int compare_twins(const void *a, const void *b) {
    const Twin *x = a, *y = b;
    if (x->key != y->key) return x->key < y->key ? -1 : 1;
    return (x->index > y->index) - (x->index < y->index);
}

// Says how many records have a molecule that another has too, stereo aside; how many of these have
// different labels or stand in different parts. part: (n), NULL if there are none.
static void print_twins(Twin *twins, size_t n, const uint8_t *part) {
    size_t repeats = 0, differ = 0, apart = 0;
    if (n) qsort(twins, n, sizeof *twins, compare_twins);
    for (size_t i = 0, j; i < n; i = j) {
        int labels = 0, parts = 0;
        for (j = i + 1; j < n && twins[j].key == twins[i].key; j++) {
            labels |= twins[j].labels != twins[i].labels;
            parts |= part && part[twins[j].index] != part[twins[i].index];
        }
        repeats += j - i - 1;
        differ += (size_t)labels;
        apart += (size_t)parts;
    }
    if (repeats)
        fprintf(stderr, "note    %zu record%s the molecule of another, stereo aside; of %zu "
                "molecules the labels differ\n", repeats, repeats > 1 ? "s repeat" : " repeats",
                differ);
    if (apart)
        fprintf(stderr, "note    %zu molecules stand in more than one part, stereo aside: what is "
                "tested there was learnt\n", apart);
}
