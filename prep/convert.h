// prep/convert.h - chunks of records are converted in parallel, each thread with its own memory,
// and written in the order they were read. Nothing depends on the number of threads
//
//   PrepOptions, Conversion          the command line; what to do with every record
//   find_task()                      the task of a name
//   convert_records() -> Outcome     encodes a chunk; what became of each record

// The command line.
typedef struct {
    const char *output, *smiles, *labels, *name, *split, *split_by, *orient, *format, *dump, *range;
    const char *stereo, *labels_from, *labels_by, *skip_list, *rejects;
    int64_t seed, max_atoms;
    double max_reject;
    int keep_hydrogens, largest_fragment, strict, help, version;
    int principal, by_number;  // what --orient and --labels-by say
} PrepOptions;

// Place of --stereo in TAG_KINDS, N_TAG_KINDS if it is none of them; what is not given is RDKit's.
static unsigned tag_kind(const PrepOptions *o) {
    unsigned k = 0;
    while (o->stereo && k < N_TAG_KINDS && strcmp(o->stereo, TAG_KINDS[k]) != 0) k++;
    return k;
}

#define SKIP_LISTED "in --skip-list"  // a kind of fault

// What to do with every record.
typedef struct {
    int n_tasks;
    char **task_names;
    int *slots;              // hash table of TASK_SLOTS: 1 + the task of a name, see find_task()
    const PrepOptions *opt;
    int want_keys;           // for a scaffold split, or one that is given
    Table labels, skips, parts;  // without rows if not given
    const char *part_column; // CSV column or SD tag of the part; NULL: none
    Text left_out;           // lines on what --labels all does not take
} Conversion;

// One thread's memory.
typedef struct {
    ChemMol mol;
    Molecule molecule;
    Molecule check;          // what a reader makes of the encoded record
    Text bytes;              // encoded records of the chunk, and names of those that are refused
    OddCell *odd;            // unusual cells of the chunk
    int n_odd, odd_room;
} Worker;

// Frees everything w owns.
static void worker_free(Worker *w) {
    mol_free(&w->mol);
    molecule_free(&w->molecule);
    molecule_free(&w->check);
    FREE_ALL(w->bytes.text, w->odd);
}

// What became of a record.
typedef struct {
    int worker, ok, none, n_atoms;  // none: it is not a record after all
    int first_odd, n_odd;    // unusual cells, of the worker's
    int mixture;             // several fragments
    size_t side_row;         // of --labels-from; 0: there is none
    size_t skip, in_part;    // 1 + place of its key in --skip-list, in file:PATH; 0: there is none
    uint64_t molecule;       // equal for equal molecules, see graph_key()
    size_t offset, size;     // of the record, or of its name if it is refused, in worker's bytes
    Span name;
    int64_t n_lines;         // line breaks in the record
    ScaffoldKey key;         // for a scaffold split; of a given split, key.a is the part
    Fault fault, note;       // why it is refused; what was left out of it (kind NULL: nothing)
} Outcome;

// Line breaks between p and end.
static int64_t count_lines(const char *p, const char *end) {
    int64_t n = 0;
    while (p < end && (p = memchr(p, '\n', (size_t)(end - p)))) p++, n++;
    return n;
}

// Encodes the molecule at the end of the worker's bytes. One record that a reader refuses would
// make the whole dataset useless, so the reader's own checks decide whether this one is kept.
static int store_molecule(Worker *w, Outcome *o) {
    const Molecule *m = &w->molecule;
    size_t size = record_size(m->n_atoms, m->n_bonds, m->n_tasks, m->name_length, m->has_pos);
    o->offset = w->bytes.length;
    uint8_t *record = (uint8_t *)text_room(&w->bytes, size);
    o->size = record_encode(record, m);
    const char *wrong = record_content(&w->check, record, o->size, m->n_tasks);
    if (wrong) w->bytes.length = o->offset;
    if (wrong) return fault_at(&o->fault, 0, 0, "cannot be written", "%s", wrong);
    o->n_atoms = m->n_atoms;
    return 0;
}

// Where a name's task stands, or would stand, in the hash table.
static int *find_slot(const Conversion *c, Span name) {
    uint32_t at = hash_name(name) % TASK_SLOTS;
    while (c->slots[at] && !span_is(name, c->task_names[c->slots[at] - 1]))
        at = (at + 1) % TASK_SLOTS;
    return &c->slots[at];
}

// The task of a name, or -1.
static int find_task(const Conversion *c, Span name) {
    return c->n_tasks ? *find_slot(c, name) - 1 : -1;
}

// Reads a label. An unusual cell is noted with `line`, see OddCell.
static void read_label(Worker *w, Outcome *o, int64_t line, Span cell, int decimal, int task,
                       float *labels) {
    if (w->n_odd == w->odd_room)
        w->odd = xrealloc(w->odd, (size_t)(w->odd_room = 2 * w->odd_room + 64), sizeof *w->odd);
    OddCell *odd = &w->odd[w->n_odd];
    if (!odd_cell(odd, cell, decimal, &labels[task])) return;
    odd->task = task;
    odd->line = line;
    o->n_odd++;
    w->n_odd++;
}

// A field behind those that the header names: which of them is which cannot be told. place: of a
// row that is not the record itself.
static int surplus_field(Outcome *o, const char *place, int columns, Span field) {
    return fault_at(&o->fault, 1, 0, "more fields than the header", "%.60sexpected %d fields as in "
                    "the header, found another, \"%.*s\": an unquoted comma, or row numbers "
                    "without a name?", place, columns, min_int(field.n, 20), field.p);
}

// Reads the labels of a record from --labels-from: of the row that begins with its title, or
// (--labels-by number) of the row of its number.
static int read_side_labels(const Conversion *c, const Record *r, Worker *w, float *labels,
                            Outcome *o) {
    const Table *t = &c->labels;
    int by_number = c->opt->by_number;
    size_t key = by_number ? 0 : table_key(t, o->name);
    size_t row = by_number ? (size_t)r->number : key ? (key - 1) % t->n_rows : 0;
    if (row == 0 || row >= t->n_rows) return 0;  // row 0 is the header
    o->side_row = row;
    Record text = {.text = t->row[row], .size = (size_t)(t->row[row + 1] - t->row[row])};
    const char *p = text.text, *end = row_end(&text);
    Span field;
    for (int k = 0; csv_field(&w->mol.arena, &p, end, t->separator, &field); k++) {
        if (k >= t->n_columns && trim(field).n) {
            char place[64];
            snprintf(place, sizeof place, "row %zu of --labels-from: ", row + 1);
            return surplus_field(o, place, t->n_columns, field);
        }
        if (k < t->n_columns && t->task_of_column[k] >= 0)
            read_label(w, o, (int64_t)row + 1, field, t->separator == ';', t->task_of_column[k],
                       labels);
    }
    return 0;
}

// The part that a word names, or the end of the record.
static int read_part(const Conversion *c, Arena *arena, const Record *r, Span word, Outcome *o) {
    static const char *const names[] = {"train", "valid", "test", "training", "validation", "test",
                                        "train", "val", "test"};
    if (c->parts.n_rows) {
        o->in_part = table_find(&c->parts, o->name, r->number);
        if (!o->in_part)
            return fault_at(&o->fault, 0, 0, "in no part", "%s does not name it", c->parts.path);
        const char *const *row = c->parts.row + (o->in_part - 1) % c->parts.n_rows;
        const char *begin, *end = row[1];
        first_field(arena, c->parts.separator, row[0], end, &begin);
        if (!begin) begin = end;
        while (begin < end && strchr("\", \t", *begin)) begin++;
        word = trim((Span){begin, (int)(end - begin)});
    }
    for (int k = 0; k < 9; k++)
        if (word_is(word, names[k])) return o->key.a = (uint64_t)(k % 3), 0;
    return fault_at(&o->fault, 0, 0, "in no part", "expected train, valid or test, found \"%.*s\"",
                    min_int(word.n, 40), word.p);
}

// Reads labels and, if a tag is asked for, name and part from the data items of an SD record.
static void read_tags(const Conversion *c, Worker *w, Lines in, float *labels, Span *part,
                      Outcome *o) {
    Span tag, value, first;
    while (next_tag(&in, &tag, &value)) {
        int task = find_task(c, tag);
        Lines lines = {value.p, value.p + value.n, 0};
        next_line(&lines, &first);
        if (c->opt->name && span_is(tag, c->opt->name)) o->name = trim(first);
        if (c->part_column && span_is(tag, c->part_column)) *part = trim(first);
        if (task >= 0 && !c->labels.n_rows)
            read_label(w, o, in.line - count_lines(value.p, in.at), value, 0, task, labels);
    }
}

// Splits "SMILES |extension| name" of a .smi line or a CSV cell. The extension goes on to the end
// of the line: where it ends read_smiles() finds out. Control signs and signs that are no ASCII
// (blanks of Unicode, mostly) are left off the ends of a SMILES.
// RDKit: SmilesToMol
static void split_smiles(Span line, Span *smiles, Span *extension, Span *name) {
    Span text = line.n && line.p[0] == '\t' ? trim_right(line) : trim(line);  // a tab: it is empty
    int k = 0, end;
    while (text.n && (signed char)text.p[0] <= 32 && text.p[0] != '\t') text.p++, text.n--;
    while (k < text.n && !memchr(" \t\n", text.p[k], 3)) k++;
    for (end = k; end > 0 && (signed char)text.p[end - 1] <= 32;) end--;
    *smiles = (Span){text.p, end};
    *name = trim((Span){text.p + k, text.n - k});
    *extension = name->n && name->p[0] == '|' ? *name : (Span){name->p, 0};
    if (extension->n) {
        const char *close = memchr(name->p + 1, '|', (size_t)name->n - 1);
        *name = close ? trim((Span){close + 1, (int)(name->p + name->n - close) - 1})
                      : (Span){name->p, 0};
    }
}

// Reads the fields of a CSV row that matter.
static int read_row(const Source *s, const Record *r, Worker *w, float *labels, Span *smiles,
                    Span *extension, Span *part, Outcome *o) {
    const char *p = r->text, *end = row_end(r);
    int column = 0, found = 0;
    Span field, rest;
    for (; csv_field(&w->mol.arena, &p, end, s->separator, &field); column++) {
        if (column >= s->n_columns) {
            if (trim(field).n) return surplus_field(o, "", s->n_columns, field);
            continue;
        }
        if (column == s->smiles_column) {
            found = 1;
            split_smiles(trim(field), smiles, extension, &rest);
        }
        if (column == s->name_column) o->name = trim(field);
        if (column == s->part_column) *part = trim(field);
        int task = s->task_of_column[column];
        if (task >= 0) read_label(w, o, 0, field, s->separator == ';', task, labels);
    }
    if (found) return 0;
    return fault_at(&o->fault, 1, 0, "no SMILES field",
                    "expected a SMILES in field %d, found %d fields", s->smiles_column + 1, column);
}

// Reads and perceives one record; on success o says where the encoded molecule is. `in` moves over
// the lines of a mol block.
static int build_record(const Conversion *c, const Source *s, const Record *r, Worker *w,
                        Lines *in, Outcome *o) {
    ChemMol *m = &w->mol;
    Span smiles = {"", 0}, extension = {"", 0}, title = {"", 0}, part = {"", 0};
    o->name = (Span){"", 0};
    o->note.kind = NULL;
    mol_clear(m);
    m->stereo = (int)tag_kind(c->opt);
    if (r->kind == RECORD_TOO_LONG)
        return fault_at(&o->fault, 1, 0, "record too long", "the record is longer than %d MiB",
                        RECORD_BYTES_MAX >> 20);
    if (r->quote) {
        const char *line = whole_lines(r->text, r->quote);
        return fault_at(&o->fault, 1 + (int)count_lines(r->text, r->quote),
                        (int)(r->quote - (line ? line : r->text)) + 1, "unclosed quote",
                        "the quote that opens here is never closed: the row is given up");
    }
    float *labels = arena_take(&m->arena, (size_t)c->n_tasks, sizeof *labels);
    for (int t = 0; t < c->n_tasks; t++) labels[t] = NAN;
    if (s->format == FORMAT_SDF) {
        int failed = read_mol_block(m, in, &title, &o->fault);
        o->name = trim(title);
        if (failed) return -1;
        if (c->n_tasks || c->opt->name || c->part_column) read_tags(c, w, *in, labels, &part, o);
    } else {
        if (s->format == FORMAT_SMI) {
            split_smiles((Span){r->text, (int)(row_end(r) - r->text)}, &smiles, &extension,
                         &o->name);
        } else if (read_row(s, r, w, labels, &smiles, &extension, &part, o)) {
            return -1;
        }
        int extended = extension.n && s->format == FORMAT_SMI;
        if (!o->name.n && s->name_column < 0) o->name = smiles;
        if (read_smiles(m, smiles, &extension, &o->fault)) return -1;
        if (extended && trim(extension).n) o->name = trim(extension);
    }
    o->skip = table_find(&c->skips, o->name, r->number);
    if (o->skip)
        return fault_at(&o->fault, 0, 0, SKIP_LISTED, "%s names it", c->skips.path);
    if ((c->parts.n_rows || c->part_column) && read_part(c, &m->arena, r, part, o)) return -1;
    if (c->labels.n_rows && read_side_labels(c, r, w, labels, o)) return -1;
    if (perceive(m, c->opt->keep_hydrogens, c->opt->largest_fragment, (int)c->opt->max_atoms,
                 &o->fault)) return -1;
    if (fill_molecule(m, &w->molecule, c->n_tasks, o->name, c->opt->principal, &o->note,
                      &o->fault)) return -1;
    memcpy(w->molecule.labels, labels, (size_t)c->n_tasks * sizeof *labels);
    if (store_molecule(w, o)) return -1;
    o->molecule = graph_key(m, 0).a;
    o->mixture = mark_fragments(m, arena_ints(&m->arena, m->n_atoms)) > 1;
    if (c->want_keys && !c->parts.n_rows && !c->part_column) o->key = scaffold_key(m);
    return 0;
}

// The same, but a record that has used up its budget is refused, whatever came of it.
static int convert_record(const Conversion *c, const Source *s, const Record *r, Worker *w,
                          Lines *in, Outcome *o) {
    int result = build_record(c, s, r, w, in, o);
    if (w->mol.arena.left > 0) return result;
    return fault_at(&o->fault, 0, 0, "too intricate",
                    "%d atoms and %d bonds take more work or memory than one record may",
                    w->mol.n_atoms, w->mol.n_bonds);
}

// Records that are not molecules: rests of others, empty lines (but a row of separators is one, of
// empty cells), comments and the header line of a
// .smi file. `first`: it is the first of its file.
static int is_no_record(const Source *s, const Record *r, int first) {
    if (r->kind == RECORD_REST || s->format == FORMAT_SDF) return r->kind == RECORD_REST;
    Span text = trim((Span){r->text, (int)r->size});
    if (text.n == 0 && is_table(s)) return !memchr(r->text, s->separator, r->size);
    if (text.n == 0 || s->format != FORMAT_SMI) return text.n == 0;
    return r->text[0] == '#' || (first && starts_with_word(text, "SMILES"));
}

// Keeps the name of a record that is refused; what it points to ends with the next record.
static void keep_name(Worker *w, Outcome *o) {
    o->size = (size_t)min_int(o->name.n, MAX_NAME);
    o->offset = w->bytes.length;
    text_bytes(&w->bytes, o->name.p, o->size);
}

// Converts n records with all threads; one of them first reads the bytes that follow.
static void convert_records(const Conversion *c, Source *s, Record *records, int n,
                            Worker *workers, Outcome *outcomes) {
    for (int k = 0; k < n; k++)
        if (!is_no_record(s, &records[k], s->line == 1 && k == 0))
            records[k].number = ++s->n_records;
#pragma omp parallel
    {
#pragma omp single nowait
        if (s->starved) source_read_ahead(s);
#pragma omp for schedule(dynamic, 16)
        for (int k = 0; k < n; k++) {
            Outcome *o = &outcomes[k];
            const Record *r = &records[k];
            Lines in = {r->text, r->text + r->size, 0};
            o->worker = thread_id();
            o->first_odd = workers[o->worker].n_odd;
            o->n_odd = 0;
            o->side_row = o->skip = o->in_part = 0;
            o->none = r->number == 0;
            o->ok = !o->none && convert_record(c, s, r, &workers[o->worker], &in, o) == 0;
            if (!o->ok && !o->none) keep_name(&workers[o->worker], o);
            o->n_lines = in.line + count_lines(in.at, in.end);
        }
    }
}
