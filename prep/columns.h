// prep/columns.h - columns and tasks of tables, tags of SD files
//
//   name_tasks(), columns_of_tasks()      the tasks that --labels names, and where they stand
//   read_header(), read_side_header()     a table's header: names, SMILES, labels, parts
//   check_tags()                          warns of tags that no record has
//   survey_source(), survey_finish()      --labels all: which columns can be learnt

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
    FREE_ALL(c->task_names, c->slots);
}

static int wants_all(const PrepOptions *opt) {
    return opt->labels && strcmp(opt->labels, "all") == 0;
}

// Tasks from "A,B,C" as given. A name with a comma stands in quotes, or has \, for it.
static void name_tasks(Conversion *c) {
    const char *p = c->opt->labels ? c->opt->labels : "";
    char *name = xmalloc(strlen(p) + 1, 1);
    for (; *p && !wants_all(c->opt); p += *p == ',') {
        int n = 0, quoted = p[strspn(p, " ")] == '"';
        if (quoted) p += strspn(p, " ") + 1;
        for (; *p && (quoted ? *p != '"' || p[1] == '"' : *p != ','); p++) {
            if (p[0] == (quoted ? '"' : '\\') && p[1] == (quoted ? '"' : ',')) p++;
            name[n++] = *p;
        }
        p += strcspn(p, ",");
        Span text = trim((Span){name, n});
        CHECK(text.n, "--labels: expected names separated by commas, found \"%s\"", c->opt->labels);
        add_task(c, text);
    }
    free(name);
}

// ---- --labels all: all inputs are looked through before the first record is converted

typedef struct {
    Conversion names;        // its tasks are the columns and tags, but those that have a role
    Tally *tally;            // (names.n_tasks) of each
    int room;
} Survey;

// Counts a cell of a column or tag; `line` is its place in `path`. A null cell only names it.
static void survey_cell(Survey *v, Span name, Span cell, int decimal, const char *path,
                        int64_t line) {
    OddCell odd;
    float label;
    int t = find_task(&v->names, name);
    if (t < 0) {
        add_task(&v->names, name);
        t = v->names.n_tasks - 1;
        if (t >= v->room)
            v->tally = xrealloc(v->tally, (size_t)(v->room = 2 * t + 64), sizeof *v->tally);
        v->tally[t] = (Tally){0};
    }
    if (!cell.p) return;
    if (odd_cell(&odd, cell, decimal, &label)) tally_odd(&v->tally[t], &odd, path, line);
    tally_value(&v->tally[t], label);
}

// Counts the cells of a row; those of columns without a name are no labels.
static void survey_row(Survey *v, const Record *row, char separator, const Span *names, int n,
                       const char *path, int64_t line, Arena *arena) {
    const char *p = row->text, *end = row_end(row);
    Span cell;
    arena_reset(arena);
    for (int k = 0; k < n && csv_field(arena, &p, end, separator, &cell); k++)
        if (names[k].n) survey_cell(v, names[k], cell, separator == ';', path, line);
}

// Takes the names off columns that --labels all leaves out, and says which these are: those without
// a name, for they are a table's own numbering (pandas reads and writes these as "Unnamed: 0"), and
// those of an earlier column's name.
static void leave_out_columns(Conversion *c, Span *names, int n) {
    Conversion seen = {0};  // its tasks are the names so far
    int left = 0;
    for (int k = 0; k < n; k++) {
        if (starts_with(names[k], "Unnamed: ")) names[k].n = 0;
        int again = names[k].n && find_task(&seen, names[k]) >= 0;
        if (names[k].n && !again) add_task(&seen, names[k]);
        else if (left++ < 20)
            text_add(&c->left_out, "--labels all leaves out column %d: %s\n", k + 1,
                     again ? "another has its name" : "it has no name");
        if (again) names[k].n = 0;
    }
    if (left > 20) text_add(&c->left_out, "--labels all leaves out %d more such\n", left - 20);
    free_tasks(&seen);
}

// Makes tasks of the columns and tags that have usable values, and no more others, those that are
// censored or missing aside; says of the others why they are none. Dies if no task is left.
static void survey_finish(Conversion *c, Survey *v) {
    for (int k = 0; k < v->names.n_tasks; k++) {
        Tally *t = &v->tally[k];
        const char *name = v->names.task_names[k];
        if (t->present && t->present >= t->bad) {
            add_task(c, (Span){name, (int)strlen(name)});
        } else if (t->bad || t->censored) {
            const Example *first = t->example[t->bad > 0];
            text_add(&c->left_out, "--labels all leaves out \"%.60s\": %lld of %lld cells are %s, "
                     "the first is \"%s\" (%s)\n", name, (long long)(t->bad ? t->bad : t->censored),
                     (long long)(t->present + t->bad + t->censored),
                     t->bad ? "no numbers" : "censored", first->text, first->place);
        } else {
            text_add(&c->left_out, "--labels all leaves out \"%.60s\": no values\n", name);
        }
        tally_free(t);
    }
    free_tasks(&v->names);
    free(v->tally);
    if (!c->n_tasks) fputs(c->left_out.text ? c->left_out.text : "", stderr);
    CHECK(c->n_tasks, "--labels all: no column or tag holds labels; name them: --labels A,B");
}

// ---- headers of tables

// "it has "A", "B" and 3 more; did you mean "A"?" in fresh memory, of a name that is not there.
// guess: the index of a column that is meant for another reason, or -1.
static char *describe_columns(const Span *names, int n, const char *wanted, int guess) {
    Text t = {0};
    int least = (int)strlen(wanted) / 2 + 1;
    for (int k = 0; k < n; k++) {
        char *name = xprintf("%.*s", min_int(names[k].n, 60), names[k].p);
        int distance = word_is(names[k], wanted) ? 0 : edit_distance(name, wanted);
        if (k < 30) text_add(&t, "%s\"%s\"", k ? ", " : "it has ", name);
        if (distance < least && names[k].n) least = distance, guess = k;
        free(name);
    }
    if (n > 30) text_add(&t, " and %d more", n - 30);
    if (guess >= 0) text_add(&t, "; did you mean \"%.*s\"?", names[guess].n, names[guess].p);
    return t.text;
}

// The longest of some cells that is a SMILES, -1 if none is.
static int find_smiles(const Span *cells, int n) {
    ChemMol m = {0};
    Fault fault;
    int best = -1;
    for (int k = 0; k < n; k++) {
        mol_clear(&m);
        Span cell = trim(cells[k]);
        int longer = cell.n > (best < 0 ? 1 : trim(cells[best]).n);
        if (longer && read_smiles(&m, cell, NULL, &fault) == 0) best = k;
    }
    mol_free(&m);
    return best;
}

// Dies because there is no column for the SMILES; says which it could be by the row that follows
// (NULL: none does), and what to do if the header is a row itself.
static void no_smiles_column(const Source *s, const char *wanted, const Record *row) {
    Arena arena = {0};
    Span *cells = xmalloc((size_t)s->n_columns, sizeof *cells);
    const char *file = strcmp(s->path, "-") ? shell_path(s->path) : "FILE";
    int n = 0, header = find_smiles(s->columns, s->n_columns), guess = -1;
    arena_reset(&arena);
    const char *p = row ? row->text : NULL;
    while (n < s->n_columns &&
           csv_field(&arena, &p, row ? row_end(row) : NULL, s->separator, &cells[n])) n++;
    guess = find_smiles(cells, n);
    if (header >= 0 && (!n || guess == header)) {
        Text names = {0};
        for (int k = 0; k < s->n_columns; k++)
            text_add(&names, k == header ? "%csmiles" : "%cy%d", s->separator, k + 1);
        DIE("%s:1: expected a header, found the SMILES \"%.*s\"; put one in front: (echo '%s'; cat "
            "%s) | ./data_prep --format csv ... -", s->path, min_int(s->columns[header].n, 60),
            s->columns[header].p, names.text + 1, file);
    }
    CHECK(!starts_with(s->columns[0], "#"), "%s:1: expected a column \"%s\", found a comment; type:"
          " grep -v '^#' %s | ./data_prep --format csv ... -", s->path, wanted, file);
    for (int k = 0; k < n; k++)
        CHECK(!word_is(trim(cells[k]), wanted), "%s:1: expected a column \"%s\", which the row "
              "below names; type: tail -n +2 %s | ./data_prep --format csv ... -", s->path, wanted,
              file);
    CHECK(s->n_columns > 1 || !memchr(s->columns->p, ' ', (size_t)s->columns->n),
          "%s:1: expected a column \"%s\"; if its fields end at blanks, type: tr -s ' ' , < %s | "
          "./data_prep --format csv ... -", s->path, wanted, file);
    for (int k = 0; k < s->n_columns && guess < 0; k++)
        for (int j = 0; j + 6 <= s->columns[k].n && guess < 0; j++)
            if (word_is((Span){s->columns[k].p + j, 6}, "smiles")) guess = k;
    char *there = describe_columns(s->columns, s->n_columns, wanted, guess);
    DIE("%s:1: expected a column \"%s\"; name the SMILES column with --smiles; %s", s->path, wanted,
        there);
}

// Dies because a column that an option names is not there.
static void no_column(const char *path, const Span *names, int n, const char *wanted,
                      const char *option) {
    char *there = describe_columns(names, n, wanted, -1);
    DIE("%s:1: expected a column \"%s\" (%s); %s", path, wanted, option, there);
}

// The fields of a header in the arena, as names of one line each; *n: how many.
static Span *header_names(Arena *arena, const Record *header, char separator, int *n) {
    const char *p = header->text, *end = row_end(header);
    Span *names = NULL, name;
    int room = 0;
    for (*n = 0; csv_field(arena, &p, end, separator, &name); ++*n) {
        if (*n == room) names = arena_grow(arena, names, &room, sizeof *names);
        char *text = arena_take(arena, (size_t)name.n + 1, 1);
        for (int k = 0; k < name.n; k++) text[k] = (unsigned char)name.p[k] < 32 ? ' ' : name.p[k];
        names[*n] = trim((Span){text, name.n});
    }
    return names;
}

// Gives column k, of this name, a role that only one can have: *column, -1 as long as none has.
static void claim_column(const char *path, int *column, Span name, int k) {
    CHECK(*column < 0, "%s:1: columns %d and %d are both named \"%.*s\"; rename one", path,
          *column + 1, k + 1, min_int(name.n, 60), name.p);
    *column = k;
}

// Which column of the names is which task: (n) in fresh memory, -1 for none. Those that are missing
// or there twice end the program unless all labels are taken as they come.
static int *columns_of_tasks(const Conversion *c, const char *path, const Span *names, int n) {
    int *task = xmalloc((size_t)n, sizeof *task);
    int *column = xmalloc((size_t)c->n_tasks, sizeof *column);  // of each task
    for (int t = 0; t < c->n_tasks; t++) column[t] = -1;
    for (int k = 0; k < n; k++) {
        task[k] = find_task(c, names[k]);
        if (task[k] >= 0 && wants_all(c->opt) && column[task[k]] >= 0) task[k] = -1;
        if (task[k] >= 0) claim_column(path, &column[task[k]], names[k], k);
    }
    for (int t = 0; t < c->n_tasks && !wants_all(c->opt); t++)
        if (column[t] < 0) no_column(path, names, n, c->task_names[t], "--labels");
    free(column);
    return task;
}

// The header of --labels-from: which column is which task; of --labels all, each with labels.
static void read_side_header(Conversion *c) {
    Table *t = &c->labels;
    Arena arena = {0}, cells = {0};
    Survey v = {0};
    Record row = {.text = t->row[0], .size = (size_t)(t->row[1] - t->row[0])};
    arena_reset(&arena);
    Span *names = header_names(&arena, &row, t->separator, &t->n_columns);
    if (wants_all(c->opt)) {
        leave_out_columns(c, names, t->n_columns);
        if (!c->opt->by_number) names[0].n = 0;  // the records' names
        for (size_t k = 1; k < t->n_rows; k++) {
            row = (Record){.text = t->row[k], .size = (size_t)(t->row[k + 1] - t->row[k])};
            survey_row(&v, &row, t->separator, names, t->n_columns, t->path, (int64_t)k + 1,
                       &cells);
        }
        survey_finish(c, &v);
    }
    t->task_of_column = columns_of_tasks(c, t->path, names, t->n_columns);
    arena_free(&arena);
    arena_free(&cells);
}

// Says at once, not after the run, if none of the first records of an SD file has a tag that is
// asked for, and what they have.
static void check_tags(const Conversion *c, const Source *s, const Record *records, int n) {
    char *seen = xmalloc((size_t)c->n_tasks, 1);
    const char *name = c->opt->name;
    Text there = {0};
    for (int k = 0; k < n; k++) {
        Lines in = {records[k].text, records[k].text + records[k].size, 0};
        Span tag, value;
        while (next_tag(&in, &tag, &value)) {
            if (find_task(c, tag) >= 0) seen[find_task(c, tag)] = 1;
            if (name && span_is(tag, name)) name = NULL;
            if (k == 0) text_add(&there, "%s%.*s", there.length ? ", " : "", tag.n, tag.p);
        }
    }
    for (int t = name ? -1 : 0; t < c->n_tasks; t++)
        if (t < 0 || !seen[t])
            fprintf(stderr, "note    %s: none of the first %d records has an SD tag \"%s\" (%s); "
                    "the first has: %.300s\n", s->path, n, t < 0 ? name : c->task_names[t],
                    t < 0 ? "--name" : "--labels", there.length ? there.text : "none");
    FREE_ALL(seen, there.text);
}

// Reads the header of a CSV source: which column is the SMILES, the name, the part. `row`: the one
// that follows, NULL if none does.
static void read_header(const Conversion *c, Source *s, const Record *header, const Record *row) {
    const char *smiles = c->opt->smiles ? c->opt->smiles : "smiles";
    CHECK(!header->quote && !header->kind, "%s:1: the header %s", s->path,
          header->quote ? "has a quote that is never closed" : "is too long");
    arena_reset(&s->arena);
    s->columns = header_names(&s->arena, header, s->separator, &s->n_columns);
    s->smiles_column = s->name_column = s->part_column = -1;
    int exact = 0, names = 0;  // columns that --smiles names to the letter; that --name does
    for (int k = 0; k < s->n_columns && c->opt->smiles; k++)
        exact += span_is(s->columns[k], smiles);
    for (int k = 0; k < s->n_columns; k++) {
        Span name = s->columns[k];
        if (exact ? span_is(name, smiles) : word_is(name, smiles))
            claim_column(s->path, &s->smiles_column, name, k);
        if (c->opt->name && span_is(name, c->opt->name) && names++ == 0) s->name_column = k;
        if (c->part_column && span_is(name, c->part_column))
            claim_column(s->path, &s->part_column, name, k);
    }
    if (s->smiles_column < 0) no_smiles_column(s, smiles, row);
    if (c->part_column && s->part_column < 0)
        no_column(s->path, s->columns, s->n_columns, c->part_column, "--split-by");
    if (c->opt->name && s->name_column < 0)
        no_column(s->path, s->columns, s->n_columns, c->opt->name, "--name");
    if (names > 1 && (c->n_tasks || !wants_all(c->opt)))  // once, not in the survey too
        fprintf(stderr, "note    %s: %d columns are named \"%s\": the first is taken\n", s->path,
                names, c->opt->name);
    s->line += count_lines(header->text, header->text + header->size);
}

// Counts the cells of all tables and the tags of all SD records of a source.
static void survey_source(Conversion *c, Survey *v, Source *s, Record *records) {
    Arena arena = {0};
    for (int n; (n = next_records(s, records)) > 0;)
        for (int k = 0; k < n; k++) {
            Record *r = &records[k];
            if (mb_signal) mb_exit(128 + mb_signal);
            if (is_table(s) && !s->columns) {
                read_header(c, s, r, n > 1 ? r + 1 : NULL);
                leave_out_columns(c, s->columns, s->n_columns);
                const int roles[] = {s->smiles_column, s->name_column, s->part_column};
                for (int j = 0; j < 3; j++)
                    if (roles[j] >= 0) s->columns[roles[j]].n = 0;
                for (int j = 0; j < s->n_columns; j++)
                    if (s->columns[j].n) survey_cell(v, s->columns[j], (Span){NULL, 0}, 0, NULL, 0);
                continue;
            }
            Lines in = {r->text, r->text + r->size, 0};
            Span name, value;
            if (is_table(s) && !r->kind && !r->quote && trim((Span){r->text, (int)r->size}).n)
                survey_row(v, r, s->separator, s->columns, s->n_columns, s->path, s->line, &arena);
            for (int j = 0; j < 3 && s->format == FORMAT_SDF; j++) next_line(&in, &name);  // titles
            while (s->format == FORMAT_SDF && next_tag(&in, &name, &value))
                if (!(c->opt->name && span_is(name, c->opt->name)) &&
                    !(c->part_column && span_is(name, c->part_column)))
                    survey_cell(v, name, value, 0, s->path,
                                s->line + in.line - count_lines(value.p, in.at));
            s->line += count_lines(r->text, r->text + r->size);
        }
    arena_free(&arena);
}

// ---- the summary
