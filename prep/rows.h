// prep/rows.h - files that say something of records: --labels-from, --skip-list, file:PATH. Their
// rows are found by their keys
//
//   table_open(), table_close()     a file
//   table_find(), table_slot()      the row of a record, of a key
//   first_field()                   a row's key, and where the rest of it begins

// A file of rows that say something of records, each by its name or number: labels (a CSV file with
// a header), or lists of records to leave out and of parts of a split (their fields end at commas
// if every line has one, else at blanks: separator ' ').
typedef struct {
    const char *path;
    const uint8_t *bytes;
    char separator;
    size_t size, n_rows, n_slots;
    const char **row;        // (n_rows + 1) where each begins; the last: the end
    Span *key;               // (n_rows) the first field of each, in the file or in `arena`
    Arena arena;
    uint32_t *slot;          // (n_slots) hash table: 1 + the row of a key
    int *task_of_column, n_columns;  // labels: what each column is
    uint8_t *used;           // labels: (n_rows) whether a record has taken it
    size_t repeated;         // rows whose key an earlier one has
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

// Slot of the row with this key, or the free one where it would stand.
static uint32_t *table_slot(const Table *t, Span key) {
    size_t at = hash_name(key) % t->n_slots;
    for (; t->slot[at]; at = (at + 1) % t->n_slots) {
        Span there = t->key[t->slot[at] - 1];
        if (there.n == key.n && memcmp(there.p, key.p, (size_t)key.n) == 0) break;
    }
    return &t->slot[at];
}

// 1 + the row of a record: that of its name, or else of its number; 0 if there is none.
static size_t table_find(const Table *t, Span name, int64_t number) {
    char text[24];
    int n = snprintf(text, sizeof text, "%lld", (long long)number);
    size_t row = t->n_rows ? *table_slot(t, name) : 0;
    return row || !t->n_rows ? row : *table_slot(t, (Span){text, n});
}

// Opens a table; of two rows with one key the first counts. `path` must live as long.
static void table_open(Table *t, const char *path, int is_list) {
    *t = (Table){.path = path};
    t->bytes = file_bytes(path, &t->size);
    const char *p = (const char *)t->bytes, *end = p + t->size, *quote = NULL, *next, *rest;
    CHECK(!t->size || memchr(p, '\n', t->size) || !memchr(p, '\r', t->size),
          "%s: its lines end in CR alone; type: tr '\\r' '\\n' < %s > FILE", path, path);
    size_t room = 0, commas = 0;
    arena_reset(&t->arena);
    next = t->size ? line_end(p, end) : NULL;
    if (!is_list) t->separator = find_separator(p, end, ',', "");
    for (; p < end; p = next) {
        next = is_list ? line_end(p, end) : csv_row_end(p, end, t->separator, &quote);
        if (!next) next = end;
        if (trim((Span){p, (int)(next - p)}).n == 0) continue;
        if (t->n_rows + 1 >= room) t->row = xrealloc(t->row, room = 2 * room + 64, sizeof *t->row);
        t->row[t->n_rows++] = p;
        t->row[t->n_rows] = next;
        if (is_list) first_field(&t->arena, ',', p, next, &rest);
        commas += is_list && rest;
    }
    if (is_list) t->separator = commas == t->n_rows ? ',' : ' ';
    CHECK(t->n_rows > 0 && t->n_rows < UINT32_MAX, "%s: expected rows, found none", path);
    t->n_slots = 2 * t->n_rows + 1;
    t->slot = xmalloc(t->n_slots, sizeof *t->slot);
    t->key = xmalloc(t->n_rows, sizeof *t->key);
    for (size_t k = 0; k < t->n_rows; k++) {
        t->key[k] = first_field(&t->arena, t->separator, t->row[k], t->row[k + 1], &rest);
        uint32_t *slot = table_slot(t, t->key[k]);
        t->repeated += *slot != 0;
        if (!*slot) *slot = (uint32_t)k + 1;
    }
}

static void table_close(Table *t) {
    file_release(t->bytes, t->size);
    arena_free(&t->arena);
    FREE_ALL(t->row, t->slot, t->key, t->task_of_column, t->used);
}
