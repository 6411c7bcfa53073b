// prep/columns.h - columns and tasks of tables, tags of SD files; the summary

// Appends a task unless there is one of that name.
static void add_task(Conversion *c, Span name) {
    if (find_task(c, name) >= 0) return;
    if (!c->slots) c->slots = xmalloc(TASK_SLOTS, sizeof *c->slots);
    CHECK(c->n_tasks < MAX_TASKS, "--labels: more than %d labels", MAX_TASKS);
    c->task_names = xrealloc(c->task_names, (size_t)c->n_tasks + 1, sizeof *c->task_names);
    c->task_names[c->n_tasks] = xprintf("%.*s", name.n, name.p);
    *find_slot(c, name) = ++c->n_tasks;
}

// Frees the tasks.
static void free_tasks(Conversion *c) {
    for (int t = 0; t < c->n_tasks; t++) free(c->task_names[t]);
    free(c->task_names);
    free(c->slots);
}

// Says that --labels all takes a column or tag for no label, at which record (0: it is empty).
static void say_left_out(Span name, int record, int *count) {
    if (++*count == 11) fprintf(stderr, "... and more\n");
    if (*count > 10) return;
    fprintf(stderr, "--labels all leaves out \"%.*s\": ", min_int(name.n, 60), name.p);
    if (record) fprintf(stderr, "no usable number in record %d\n", record);
    else fprintf(stderr, "no values\n");
}

// Tasks from "A,B,C" as given.
static void name_tasks(Conversion *c) {
    const char *p = c->opt->labels;
    if (!p || strcmp(p, "all") == 0) return;
    while (*p) {
        size_t n = strcspn(p, ",");
        Span name = trim((Span){p, (int)n});
        CHECK(name.n, "--labels: expected names separated by commas, found \"%s\"", c->opt->labels);
        add_task(c, name);
        p += n + (p[n] == ',');
    }
}

// --labels all, SDF: every tag whose values in the first records are numbers or missing.
static void find_tag_tasks(Conversion *c, const Record *records, int n) {
    Conversion words = {0};  // tags with a value that is no number
    int left_out = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int k = 0; k < n && k < 1000; k++) {
            Lines in = {records[k].text, records[k].text + records[k].size, 0};
            Span tag, value;
            float label;
            while (next_tag(&in, &tag, &value)) {
                if (c->opt->name && span_is(tag, c->opt->name)) continue;
                if (find_task(&words, tag) >= 0) continue;
                if (pass == 1) add_task(c, tag);
                if (pass == 1 || parse_label(value, &label)) continue;
                add_task(&words, tag);
                say_left_out(tag, k + 1, &left_out);
            }
        }
    free_tasks(&words);
}

// --labels all, CSV: what the columns hold in the first rows: nothing (0), numbers (-1), or else
// the number of a row, from 1, that has something else.
static void find_number_columns(const Source *s, const Record *rows, int n, int *content) {
    Arena arena = {0};
    for (int k = 0; k < n && k < 1000; k++) {
        const char *p = rows[k].text, *end = row_end(&rows[k]);
        Span field;
        float label;
        arena_reset(&arena);
        for (int column = 0; csv_field(&arena, &p, end, separator_of(s), &field); column++) {
            if (column >= s->n_columns) break;
            if (content[column] > 0) continue;
            if (!parse_label(field, &label)) content[column] = k + 1;
            else if (!isnan(label)) content[column] = -1;
        }
    }
    arena_free(&arena);
}

// The header of --labels-from: which column is which task; of --labels all, each with numbers.
static void read_side_header(Conversion *c, int all) {
    Table *t = &c->labels;
    Arena arena = {0};
    Record header = {.text = t->row[0], .size = (size_t)(t->row[1] - t->row[0])};
    Source s = {.path = t->path, .format = t->separator == '\t' ? FORMAT_TSV : FORMAT_CSV};
    Record *rows = xmalloc(1000, sizeof *rows);
    int n = 0;
    arena_reset(&arena);
    for (size_t k = 1; k < t->n_rows && k <= 1000; k++, n++)
        rows[n] = (Record){.text = t->row[k], .size = (size_t)(t->row[k + 1] - t->row[k])};
    const char *p = header.text, *end = row_end(&header);
    Span name;
    for (s.n_columns = 0; csv_field(&arena, &p, end, t->separator, &name);) s.n_columns++;
    int *content = arena_ints(&arena, s.n_columns), left_out = 0;
    find_number_columns(&s, rows, n, content);
    t->task_of_column = xmalloc((size_t)s.n_columns, sizeof *t->task_of_column);
    t->n_columns = s.n_columns;
    p = header.text;
    for (int k = 0; csv_field(&arena, &p, end, t->separator, &name); k++) {
        if (all && k > 0 && content[k] == -1) add_task(c, trim(name));
        else if (all && k > 0) say_left_out(name, content[k], &left_out);
        t->task_of_column[k] = k > 0 || !all ? find_task(c, trim(name)) : -1;
    }
    for (int task = 0, found; task < c->n_tasks; task++) {
        for (found = 0; found < t->n_columns && t->task_of_column[found] != task;) found++;
        CHECK(found < t->n_columns, "%s:1: expected a column \"%s\" (--labels)", t->path,
              c->task_names[task]);
    }
    free(rows);
    arena_free(&arena);
}

// Says at once, not after the run, if none of the first records of an SD file has a tag that is
// asked for, and what they have.
static void check_tags(const Conversion *c, const Source *s, const Record *records, int n) {
    char *seen = xmalloc((size_t)c->n_tasks, 1);
    Text there = {0};
    for (int k = 0; k < n; k++) {
        Lines in = {records[k].text, records[k].text + records[k].size, 0};
        Span tag, value;
        while (next_tag(&in, &tag, &value)) {
            if (find_task(c, tag) >= 0) seen[find_task(c, tag)] = 1;
            if (k == 0) text_add(&there, "%s%.*s", there.length ? ", " : "", tag.n, tag.p);
        }
    }
    for (int t = 0; t < c->n_tasks; t++)
        if (!seen[t])
            fprintf(stderr, "note    %s: none of the first %d records has an SD tag \"%s\" "
                    "(--labels); the first has: %.300s\n", s->path, n, c->task_names[t],
                    there.length ? there.text : "none");
    free(seen);
    free(there.text);
}

// Gives column k a role that only one can have.
static void claim_column(const Source *s, int *column, int k, Span name) {
    CHECK(*column < 0, "%s:1: columns %d and %d are both named \"%.*s\"; rename one", s->path,
          *column + 1, k + 1, min_int(name.n, 60), name.p);
    *column = k;
}

// Reads the header of a CSV source: which column is the SMILES, the name, which task. `first`:
// tasks of --labels all are still to be found, in the rows that follow.
static void read_header(Conversion *c, Source *s, const Record *header, const Record *rows,
                        int n_rows, int first) {
    Arena arena = {0};
    const char *p = header->text, *end = row_end(header);
    Span name, *names = NULL;
    int n = 0, room = 0, left_out = 0;
    CHECK(!header->quote && !header->kind, "%s:1: the header %s", s->path,
          header->quote ? "has a quote that is never closed" : "is too long");
    arena_reset(&arena);
    while (csv_field(&arena, &p, end, separator_of(s), &name)) {
        if (n == room) names = arena_grow(&arena, names, &room, sizeof *names);
        char *text = arena_take(&arena, (size_t)name.n + 1, 1);  // a name is one line
        for (int k = 0; k < name.n; k++) text[k] = (unsigned char)name.p[k] < 32 ? ' ' : name.p[k];
        names[n++] = trim((Span){text, name.n});
    }
    s->n_columns = n;
    s->smiles_column = s->name_column = s->part_column = -1;
    s->task_of_column = xmalloc((size_t)n, sizeof *s->task_of_column);
    for (int k = 0; k < n; k++) {
        if (word_is(names[k], c->opt->smiles ? c->opt->smiles : "smiles"))
            claim_column(s, &s->smiles_column, k, names[k]);
        if (c->opt->name && span_is(names[k], c->opt->name))
            claim_column(s, &s->name_column, k, names[k]);
        if (c->part_column && span_is(names[k], c->part_column))
            claim_column(s, &s->part_column, k, names[k]);
    }
    CHECK(!c->part_column || s->part_column >= 0, "%s:1: expected a column \"%s\" (--split-by)",
          s->path, c->part_column);
    CHECK(s->smiles_column >= 0, "%s:1: expected a column \"%s\"; name the SMILES column with "
          "--smiles", s->path, c->opt->smiles ? c->opt->smiles : "smiles");
    CHECK(!c->opt->name || s->name_column >= 0, "%s:1: expected a column \"%s\" (--name)", s->path,
          c->opt->name);
    int *content = arena_ints(&arena, n);
    if (first) find_number_columns(s, rows, n_rows, content);
    for (int k = 0; k < n && first; k++) {
        if (k == s->smiles_column || k == s->name_column || k == s->part_column) continue;
        if (content[k] == -1) add_task(c, names[k]);
        else say_left_out(names[k], content[k], &left_out);
    }
    int *column = arena_ints(&arena, c->n_tasks);
    for (int t = 0; t < c->n_tasks; t++) column[t] = -1;
    for (int k = 0; k < n; k++) {
        int t = s->task_of_column[k] = find_task(c, names[k]);
        if (t >= 0) claim_column(s, &column[t], k, names[k]);
    }
    for (int t = 0; t < c->n_tasks; t++)
        CHECK(column[t] >= 0, "%s:1: expected a column \"%s\" (--labels)", s->path,
              c->task_names[t]);
    arena_free(&arena);
}

// ---- the summary

enum { EXAMPLES = 3 };

// Skipped records, counted by kind, with the first few of each.
typedef struct {
    const char *kind;
    int64_t count;
    char *example[EXAMPLES];
} Reason;

#define REJECTS_BEGIN "record,name,line,reason\n"

typedef struct {
    Reason reasons[32];
    int n_reasons;
    int64_t n_read, n_kept, n_atoms, bad_labels, unmatched;
    OutFile rejects;         // open if asked for
    uint8_t *labelled;       // (n_tasks) whether some record has a value
} Summary;

// "FILE:LINE: reason", with the column if it is known.
static char *describe_fault(const Source *s, int64_t line, const Fault *f) {
    long long at = (long long)(line + (f->line > 0 ? f->line - 1 : 0));
    if (f->column > 0)
        return xprintf("%s:%lld: column %d: %s", s->path, at, f->column, f->text);
    return xprintf("%s:%lld: %s", s->path, at, f->text);
}

// Counts a skipped record and keeps its description if it is one of the first of its kind.
static void count_fault(Summary *sum, const Source *s, int64_t line, const Fault *f) {
    int k = 0;
    while (k < sum->n_reasons && strcmp(sum->reasons[k].kind, f->kind) != 0) k++;
    if (k == 32) return;
    if (k == sum->n_reasons) sum->reasons[sum->n_reasons++] = (Reason){.kind = f->kind};
    Reason *r = &sum->reasons[k];
    if (r->count < EXAMPLES) r->example[r->count] = describe_fault(s, line, f);
    r->count++;
}

static int has_reason(const Summary *sum, const char *kind) {
    for (int k = 0; k < sum->n_reasons; k++)
        if (strcmp(sum->reasons[k].kind, kind) == 0) return 1;
    return 0;
}

// Prints what was read, kept and skipped to stderr; frees the examples.
static void print_summary(Summary *sum, int n_sources) {
    fprintf(stderr, "read %lld records from %d file%s, kept %lld (%lld atoms)\n",
            (long long)sum->n_read, n_sources, n_sources == 1 ? "" : "s", (long long)sum->n_kept,
            (long long)sum->n_atoms);
    if (sum->n_read > sum->n_kept)
        fprintf(stderr, "skipped %lld:\n", (long long)(sum->n_read - sum->n_kept));
    for (int k = 0; k < sum->n_reasons; k++) {
        Reason *r = &sum->reasons[k];
        fprintf(stderr, "%8lld  %s\n", (long long)r->count, r->kind);
        for (int e = 0; e < EXAMPLES && e < r->count; e++) {
            fprintf(stderr, "          %s\n", r->example[e]);
            free(r->example[e]);
        }
    }
    if (sum->unmatched)
        fprintf(stderr, "records of which --labels-from says nothing: %lld\n",
                (long long)sum->unmatched);
    if (sum->bad_labels)
        fprintf(stderr, "labels that are no numbers up to %g, taken as missing: %lld\n",
                LABEL_MAX, (long long)sum->bad_labels);
}
