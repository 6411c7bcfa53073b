// prep/rows.h - files that say something of records: --labels-from, --skip-list, file:PATH. Their
// rows are found by their keys
//
//   table_open(), table_close()     a file
//   table_find(), table_key()       the row of a record, of a key
//   table_use(), table_notes()      which rows records have taken; rows of none, and of two
//   first_field()                   a row's key, and where the rest of it begins

// A file of rows that say something of records, each by its name or number: labels (a CSV file with
// a header), or lists of records to leave out and of parts of a split (their fields end at commas
// or tabs if every line has one, else at blanks: separator ' '; then the line as a whole is a key
// too, for a name with blanks).
typedef struct {
    const char *path;
    const uint8_t *bytes;
    char separator;
    int is_list;
    size_t size, n_rows, n_slots;
    const char **row;        // (n_rows + 1) where each begins; the last: the end
    Span *key;               // (2, n_rows) of lists the lines; the first fields; n = 0: none
    Arena arena;             // holds the keys whose quotes are undone
    uint32_t *slot;          // (n_slots) hash table: 1 + the place of a key
    int *task_of_column, n_columns;  // labels: what each column is
    uint8_t *used;           // (n_rows) bits: a record has taken it by its line, by its first field
    size_t repeated;         // rows whose first field an earlier one has
} Table;

static uint32_t hash_name(Span name) {
    uint32_t hash = 2166136261u;  // FNV-1a
    for (int k = 0; k < name.n; k++) hash = (hash ^ (uint8_t)name.p[k]) * 16777619u;
    return hash ^ hash >> 17;
}

// The first field of a row, quotes undone (in `arena` memory); *rest: what follows its separator,
// NULL if there is none. Separator ' ': tabs are one too.
static Span first_field(Arena *arena, char separator, const char *row, const char *end,
                        const char **rest) {
    Span text = trim((Span){row, (int)(end - row)}), key = {text.p, 0};
    int blank = separator == ' ';
    end = text.p + text.n;
    *rest = text.p;
    if (starts_with(text, "\"")) {
        if (blank && memchr(text.p, '\t', (size_t)text.n)) separator = '\t';
        csv_field(arena, rest, end, separator, &key);
    } else {
        while (*rest < end && **rest != separator && !(blank && **rest == '\t')) ++*rest;
        key.n = (int)((*rest)++ - text.p);
    }
    if (*rest > end) *rest = NULL;
    return trim(key);
}

// Slot of this key, or the free one where it would stand.
static uint32_t *table_slot(const Table *t, Span key) {
    size_t at = hash_name(key) % t->n_slots;
    for (; t->slot[at]; at = (at + 1) % t->n_slots) {
        Span there = t->key[t->slot[at] - 1];
        if (there.n == key.n && memcmp(there.p, key.p, (size_t)key.n) == 0) break;
    }
    return &t->slot[at];
}

// 1 + the place of a key, 0 if it is not there; place % n_rows is its row.
static size_t table_key(const Table *t, Span key) { return t->n_rows ? *table_slot(t, key) : 0; }

// The same of a record: of its name, or else, if that is no number itself, of its number.
static size_t table_find(const Table *t, Span name, int64_t number) {
    char text[24];
    int n = snprintf(text, sizeof text, "%lld", (long long)number), other;
    size_t place = table_key(t, name);
    return place || parse_whole(name, &other) ? place : table_key(t, (Span){text, n});
}

// Notes that a record has taken the row of a key, by its place + 1.
static void table_use(Table *t, size_t place) {
    if (place) t->used[(place - 1) % t->n_rows] |= place > t->n_rows ? 2 : 1;
}

// Finds the rows and what separates their fields. A line of nothing is none, but in a table of one
// column it is a cell.
static void table_rows(Table *t, const char *p, const char *end) {
    const char *quote, *next = p < end ? line_end(p, end) : NULL, *rest;
    size_t room = 0, commas = 0, tabs = 0, last = 0;
    int one;
    char own = format_by_name(t->path, (int)strlen(t->path)) == FORMAT_TSV ? '\t' : ',';
    if (!t->is_list) t->separator = find_separator(p, end, own, "");
    one = !t->is_list && p < end && !memchr(p, t->separator, (size_t)((next ? next : end) - p));
    for (; p < end; p = next) {
        quote = NULL;
        next = t->is_list ? line_end(p, end) : csv_row_end(p, end, t->separator, &quote);
        if (!next && quote) next = line_end(quote, end);  // never closed: only that line is lost
        if (!next) next = end;
        int blank = trim((Span){p, (int)(next - p)}).n == 0;
        int cell = !t->is_list && (one || memchr(p, t->separator, (size_t)(next - p)));
        if (blank && (!cell || !t->n_rows)) continue;
        if (t->n_rows + 1 >= room) t->row = xrealloc(t->row, room = 2 * room + 64, sizeof *t->row);
        t->row[t->n_rows++] = p;
        t->row[t->n_rows] = next;
        if (!blank) last = t->n_rows;
        if (!t->is_list) continue;
        first_field(&t->arena, ',', p, next, &rest);
        commas += rest != NULL;
        first_field(&t->arena, '\t', p, next, &rest);
        tabs += rest != NULL;
    }
    t->n_rows = last;
    if (t->is_list) t->separator = commas == last ? ',' : tabs == last ? '\t' : ' ';
}

// Opens a table; of two rows with one key the first counts. `path` must live as long.
static void table_open(Table *t, const char *path, int is_list) {
    *t = (Table){.path = path, .is_list = is_list};
    t->bytes = file_bytes(path, &t->size);
    const char *p = (const char *)t->bytes, *end = p + t->size, *rest;
    p += check_first_bytes(path, p, t->size, " > FILE");
    CHECK(!t->size || memchr(p, '\n', (size_t)(end - p)) || !memchr(p, '\r', (size_t)(end - p)),
          "%s: its lines end in CR alone; type: tr '\\r' '\\n' < %s > FILE", path,
          shell_path(path));
    arena_reset(&t->arena);
    table_rows(t, p, end);
    CHECK(t->n_rows > 0 && t->n_rows < UINT32_MAX / 4, "%s: expected rows, found none", path);
    size_t n = t->n_rows;
    t->n_slots = 4 * n + 1;
    t->slot = xmalloc(t->n_slots, sizeof *t->slot);
    t->key = xmalloc(2 * n, sizeof *t->key);
    t->used = xmalloc(n, 1);
    for (size_t k = 0; k < 2 * n; k++) {  // all lines, then all first fields
        const char *from = t->row[k % n], *to = t->row[k % n + 1];
        if (k >= n) t->key[k] = first_field(&t->arena, t->separator, from, to, &rest);
        else if (t->separator == ' ') t->key[k] = trim((Span){from, (int)(to - from)});
        if (!t->key[k].n) continue;
        uint32_t *slot = table_slot(t, t->key[k]);
        t->repeated += k >= n && *slot > n;
        if (!*slot) *slot = (uint32_t)k + 1;
    }
}

// Says which rows no record has taken, or can take; which are ambiguous.
static void table_notes(const Table *t) {
    size_t unused = 0, both = 0, first = 0, twofold = 0;
    if (!t->n_rows) return;
    for (size_t k = t->n_rows; k-- > (t->is_list ? 0 : 1);) {  // of others row 0 is the header
        if (!t->used[k]) unused++, first = k;
        if (t->used[k] == 3) both++, twofold = k;
    }
    const Span *a = &t->key[t->n_rows + first], *b = &t->key[t->n_rows + twofold];
    if (unused)
        fprintf(stderr, "note    %s: %zu rows belong to no record, the first is row %zu, "
                "\"%.*s\"\n", t->path, unused, first + 1, min_int(a->n, 60), a->p);
    if (both)
        fprintf(stderr, "note    %s: %zu rows name one record as a whole and another by their "
                "first word, the first is row %zu, \"%.*s\"; put names in quotes\n", t->path, both,
                twofold + 1, min_int(b->n, 60), b->p);
    if (t->repeated && !t->is_list)
        fprintf(stderr, "note    %s: %zu rows begin as an earlier one does; by title, the first "
                "counts\n", t->path, t->repeated);
}

static void table_close(Table *t) {
    file_release(t->bytes, t->size);
    arena_free(&t->arena);
    FREE_ALL(t->row, t->slot, t->key, t->task_of_column, t->used);
}
