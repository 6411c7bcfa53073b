// prep/records.h - a source is cut into records: what ends in $$$$, a line, or a CSV row. A record
// too long to be one is passed over
//
//   source_open(), source_close()     a file or standard input, and what kind of records it has
//   next_records()                    the next chunk of records
//   next_tag()                        SD tags, one after the other
//   csv_field()                       the fields of a row
//   begin_table(), find_separator()   what ends a table's fields

typedef enum { FORMAT_NONE, FORMAT_SDF, FORMAT_SMI, FORMAT_CSV, FORMAT_TSV } Format;

enum { CHUNK_BYTES = 1 << 20, CR_RUN = 64, RECORD_BYTES_MAX = 16 << 20, CHUNK_RECORDS = 8192,
       TASK_SLOTS = 1 << 17 };

typedef struct { char *bytes; size_t begin, end, room; } Buffer;  // unread: [begin, end)

typedef struct {
    const char *path;
    Format format;
    FILE *file;
    Buffer now, next;        // records are taken from `now`; `next` is being filled
    int eof, starved, ready; // no whole record left in `now`; `next` can take its place
    int skipping;            // what comes next is the rest of a record that was too long
    int64_t line;            // number of the line at now.begin, from 1
    int64_t bytes_done, bytes_total;  // total 0: unknown
    char separator;          // of a table: between fields
    int n_columns;           // CSV: what the header says each column is
    Span *columns;           // their names, in `arena`
    Arena arena;
    int smiles_column, name_column, part_column, *task_of_column;
    int64_t n_records;       // given out so far
} Source;

enum { RECORD_FINE, RECORD_TOO_LONG, RECORD_REST };  // REST: what follows a beginning too long

typedef struct {
    const char *text;
    size_t size;
    int kind;
    const char *quote;       // in the last line: opens and is never closed; NULL: none does
    int64_t number;          // in the input, from 1; 0: it is no record
} Record;

// The format of a name that ends in an ending (or is one, like "sdf"), FORMAT_NONE if unknown.
static Format format_by_name(const char *name, int n) {
    static const struct { const char *name; Format format; } known[] = {
        {"sdf", FORMAT_SDF}, {"sd", FORMAT_SDF}, {"mol", FORMAT_SDF}, {"mdl", FORMAT_SDF},
        {"smi", FORMAT_SMI}, {"smiles", FORMAT_SMI}, {"csv", FORMAT_CSV}, {"tsv", FORMAT_TSV}};
    int start = n;
    while (start > 0 && name[start - 1] != '.') start--;
    for (int k = 0; k < 8; k++)
        if (word_is((Span){name + start, n - start}, known[k].name)) return known[k].format;
    return FORMAT_NONE;
}

// Appends at most n more bytes of the file to the next buffer.
static void source_read(Source *s, size_t n) {
    size_t got = fread(s->next.bytes + s->next.end, 1, n, s->file);
    CHECK(!ferror(s->file), "%s: read failed: %s", s->path, strerror(errno));
    s->next.end += got;
    s->bytes_done += (int64_t)got;
    s->eof = got == 0;
}

// Fills the next buffer: what was not used of the other one, then the next bytes of the file, in
// which a CR without LF ends a line and becomes one. Runs beside the conversion of the records in
// that one, see convert_records().
static void source_read_ahead(Source *s) {
    Buffer *next = &s->next;
    size_t rest = s->now.end - s->now.begin;
    if (rest >= next->room / 2) {
        next->room = 2 * next->room + rest;
        next->bytes = xrealloc(next->bytes, next->room, 1);
    }
    memcpy(next->bytes, s->now.bytes + s->now.begin, rest);
    next->begin = 0;
    next->end = rest;
    while (next->end + CR_RUN < next->room && !s->eof)
        source_read(s, next->room - CR_RUN - next->end);
    while (next->end < next->room && !s->eof && next->bytes[next->end - 1] == '\r')
        source_read(s, 1);  // what follows decides
    char *p = next->bytes + rest, *end = next->bytes + next->end;
    while ((p = memchr(p, '\r', (size_t)(end - p)))) {
        size_t run = 0;
        while (p + run < end && p[run] == '\r') run++;
        if (p + run == end || p[run] != '\n') memset(p, '\n', run);
        p += run;
    }
    s->starved = 0;
    s->ready = 1;
}

// Looks at the first n bytes of a file. Dies if they are no text, saying what makes text of them
// and what to do `then`; returns the size of the byte order mark of UTF-8, if there is one.
static size_t check_first_bytes(const char *path, const char *bytes, size_t n, const char *then) {
    static const struct { const char *bytes; size_t n; const char *what, *command; } known[] = {
        {"\xEF\xBB\xBF", 3, NULL, NULL}, {"\x1F\x8B", 2, "compressed by gzip", "gzip -dc"},
        {"\xFD" "7zXZ", 5, "compressed by xz", "xz -dc"},
        {"PK\3\4", 4, "a zip archive", "unzip -p"},
        {"\xFF\xFE", 2, "UTF-16 text", "iconv -f UTF-16 -t UTF-8"},
        {"\xFE\xFF", 2, "UTF-16 text", "iconv -f UTF-16 -t UTF-8"}};
    const char lfs[] = "version https://git-lfs";
    CHECK(n < sizeof lfs || memcmp(bytes, lfs, sizeof lfs - 1) != 0,
          "%s: is a pointer of git-lfs, not the file itself; type: git lfs pull --include %s",
          path, shell_path(path));
    for (int k = 0; k < 6; k++) {
        if (n < known[k].n || memcmp(bytes, known[k].bytes, known[k].n) != 0) continue;
        const char *ending = strrchr(path, '.');
        CHECK(k != 3 || !ending || !word_is((Span){ending, (int)strlen(ending)}, ".xlsx"),
              "%s: is a workbook; save it as CSV", path);
        CHECK(k == 0, "%s: is %s; type: %s %s%s", path, known[k].what, known[k].command,
              strcmp(path, "-") == 0 ? "FILE" : shell_path(path), then);
        return known[k].n;
    }
    return 0;
}

// The same of a source.
static void check_source(Source *s, const char *format) {
    static const char *const names[] = {"FORMAT", "sdf", "smi", "csv", "tsv"};
    const char *dot = strrchr(s->path, '.');
    Format guess = s->format ? s->format : format_by_name(s->path, dot ? (int)(dot - s->path) : 0);
    char *then = xprintf(" | ./data_prep --format %s ... -", format ? format : names[guess]);
    size_t mark = check_first_bytes(s->path, s->next.bytes, s->next.end, then);
    if (s->format != FORMAT_SDF) s->next.begin = mark;  // there it becomes part of the name
    free(then);
}

// A temporary file with all that follows in `from`, which is closed unless it is standard input.
static FILE *file_copy(FILE *from, const char *path) {
    static char bytes[1 << 16];
    FILE *to = tmpfile();
    CHECK(to, "cannot make a temporary file: %s", strerror(errno));
    for (size_t n; (n = fread(bytes, 1, sizeof bytes, from)) > 0;)
        CHECK(fwrite(bytes, 1, n, to) == n, "temporary file: write failed: %s", strerror(errno));
    CHECK(!ferror(from), "%s: read failed: %s", path, strerror(errno));
    CHECK(fflush(to) == 0, "temporary file: write failed: %s", strerror(errno));
    if (from != stdin) fclose(from);
    rewind(to);
    return to;
}

// Signs of a SMILES, without those that make a path.
#define SMILES_SIGNS "BCNOPSFIHclbrnopsaeiu0123456789()[]=#+-@%"

// Opens PATH ("-" is standard input); `format` may be NULL: then the file's ending decides. Of what
// cannot be read twice, *copy (NULL at first) becomes a copy; copy may be NULL: it is read once.
static void source_open(Source *s, const char *path, const char *format, FILE **copy) {
    int standard = strcmp(path, "-") == 0;
    const char *name = format ? format : path;
    *s = (Source){.path = path, .line = 1, .format = format_by_name(name, (int)strlen(name))};
    s->separator = s->format == FORMAT_TSV ? '\t' : ',';
    s->file = copy && *copy ? *copy : standard ? stdin : fopen(path, "rb");
    CHECK(s->file || errno != ENOENT || path[strspn(path, SMILES_SIGNS)] || path[0] == '-',
          "%s: no such file; if it is a SMILES, type: echo '%s' | ./data_prep --format smi ... -",
          path, path);
    CHECK(s->file, "%s: cannot read: %s", path, strerror(errno));
    int regular = !standard;
#if MB_POSIX
    struct stat info;
    if (fstat(fileno(s->file), &info) == 0) {
        CHECK(!S_ISDIR(info.st_mode), "%s: cannot read: it is a directory", path);
        regular = S_ISREG(info.st_mode);
        if (regular) s->bytes_total = (int64_t)info.st_size;
    }
#endif
    if (copy && *copy) rewind(*copy);
    else if (copy && (standard || !regular)) s->file = *copy = file_copy(s->file, path);
    s->now = (Buffer){xmalloc(CHUNK_BYTES, 1), 0, 0, CHUNK_BYTES};
    s->next = (Buffer){xmalloc(CHUNK_BYTES, 1), 0, 0, CHUNK_BYTES};
    source_read_ahead(s);
    check_source(s, format);
    CHECK(s->format, "%s: cannot tell the format%s%s; give --format sdf, smi, csv or tsv", path,
          format ? " from --format " : "", format ? format : "");
}

// Closes the file, unless it is standard input or a copy, and frees what the source owns.
static void source_close(Source *s, int is_copy) {
    if (s->file != stdin && !is_copy) fclose(s->file);
    arena_free(&s->arena);
    FREE_ALL(s->now.bytes, s->next.bytes, s->task_of_column);
}

// The end of the line at p (just after its line break), or NULL if it is not there yet.
static const char *line_end(const char *p, const char *end) {
    const char *stop = memchr(p, '\n', (size_t)(end - p));
    return stop ? stop + 1 : NULL;
}

// End of the SD record at p (just after the line of its $$$$), or NULL if it is not there yet.
static const char *sd_record_end(const char *p, const char *end) {
    for (const char *q = p; (q = memchr(q, '$', (size_t)(end - q))); q++) {
        if (end - q < 4 || memcmp(q, "$$$$", 4) != 0 || (q > p && q[-1] != '\n')) continue;
        return line_end(q, end);
    }
    return NULL;
}

// End of the CSV row at p: the first line break outside quotes. A quote opens only at the start
// of a field. *quote: the one that is open at the end, if that is not there; or that seems to close
// lines further on, but before other text: there another one opens.
static const char *csv_row_end(const char *p, const char *end, char separator, const char **quote) {
    const char *stop = line_end(p, end);
    if (!stop || !memchr(p, '"', (size_t)(stop - p))) return stop;
    int quoted = 0, start = 1;
    for (const char *q = p; q < end; q++) {
        if (quoted) {
            quoted = *q != '"';
            const char *next = q + 1;
            if (quoted || next == end) continue;
            if (*next == '"') quoted = 1, q++;
            while (next < end && *next == ' ') next++;
            if (!quoted && next < end && !memchr("\r\n", *next, 2) && *next != separator &&
                line_end(*quote, q)) return NULL;
        } else if (*q == '\n') {
            return q + 1;
        } else if (*q == '"' && start) {
            quoted = 1;
            *quote = q;
        }
        start = !quoted && *q == separator;
    }
    if (!quoted) *quote = NULL;
    return NULL;
}

// Whether records are rows of a table.
static int is_table(const Source *s) { return s->format == FORMAT_CSV || s->format == FORMAT_TSV; }

// End of the record at p, or of the rest of one that is skipped, or NULL if it is not there yet.
static const char *record_end(const Source *s, const char *p, const char *end, const char **quote) {
    if (s->format == FORMAT_SDF) return sd_record_end(p, end);
    if (is_table(s) && !s->skipping) return csv_row_end(p, end, s->separator, quote);
    return line_end(p, end);
}

// The end of the last whole line from p on, NULL if there is none.
static const char *whole_lines(const char *p, const char *end) {
    while (end > p && end[-1] != '\n') end--;
    return end > p ? end : NULL;
}

// The next records of the source, at most CHUNK_RECORDS; they stay valid until the next call.
// Returns how many, 0 at the end.
static int next_records(Source *s, Record *records) {
    Buffer *now = &s->now;
    for (int n = 0;;) {
        if (s->ready) {
            Buffer used = *now;
            *now = s->next;
            s->next = used;
            s->ready = 0;
        }
        while (n < CHUNK_RECORDS && now->begin < now->end) {
            const char *p = now->bytes + now->begin, *end = now->bytes + now->end, *quote = NULL;
            const char *stop = record_end(s, p, end, &quote);
            int over = (size_t)(end - p) >= RECORD_BYTES_MAX, rest = s->skipping;
            if (stop || !(over || s->eof)) quote = NULL;
            if (quote) stop = line_end(quote, end);  // only that line is lost
            s->skipping = !stop && !s->eof && (over || rest);
            if (s->skipping) stop = whole_lines(p, end);
            if (!stop && (over || s->eof)) stop = end;
            if (!stop) break;
            size_t size = (size_t)(stop - p);
            int too_long = s->skipping || size > RECORD_BYTES_MAX;
            records[n] = (Record){p, size, rest ? RECORD_REST : too_long, quote, 0};
            now->begin += size;
            if (stop == end && s->eof && trim((Span){p, (int)size}).n == 0) continue;
            n++;
        }
        s->starved = n < CHUNK_RECORDS && !s->eof;
        if (n || (now->begin == now->end && s->eof)) return n;
        source_read_ahead(s);
    }
}

// ---- SD tags

// The name in the head of a data item, "> <NAME>"; 0 if the line is none.
static int tag_head(Span line, Span *name) {
    const char *end = line.p + line.n;
    if (!line.n || line.p[0] != '>') return 0;
    const char *open = memchr(line.p + 1, '<', (size_t)line.n - 1);
    const char *close = open ? memchr(open, '>', (size_t)(end - open)) : NULL;
    if (!close) return 0;
    *name = trim((Span){open + 1, (int)(close - open) - 1});
    return name->n > 0;
}

// The next data item of an SD record: its name and its lines, up to an empty one. 0 at the end.
static int next_tag(Lines *in, Span *name, Span *value) {
    Span line, other;
    while (next_line(in, &line)) {
        if (starts_with(line, "$$$$")) return 0;
        if (!tag_head(line, name)) continue;
        *value = (Span){in->at, 0};
        for (Lines before = *in; next_line(in, &line) && trim(line).n; before = *in) {
            if (starts_with(line, "$$$$") || tag_head(line, &other)) {
                *in = before;
                break;
            }
            value->n = (int)(line.p + line.n - value->p);
        }
        *value = trim(*value);
        return 1;
    }
    return 0;
}

// ---- CSV fields

// The next field of a row from *p, quotes undone (in `arena` memory); advances *p behind it. 0 if
// there is none.
static int csv_field(Arena *arena, const char **p, const char *end, char separator, Span *field) {
    const char *q = *p;
    if (!q || q > end) return 0;
    if (q == end || *q != '"') {
        const char *stop = q < end ? memchr(q, separator, (size_t)(end - q)) : NULL;
        *field = (Span){q, (int)((stop ? stop : end) - q)};
        *p = stop ? stop + 1 : end + 1;
        return 1;
    }
    char *copy = NULL;
    int n, quoted;
    for (int pass = 0; pass < 2; pass++) {  // first for its length
        n = 0;
        quoted = 1;
        for (q = *p + 1; q < end; q++) {
            if (!quoted && *q == separator) break;
            if (quoted && *q == '"') {
                quoted = q + 1 < end && q[1] == '"';
                if (!quoted) continue;
                q++;
            }
            if (copy) copy[n] = *q;
            n++;
        }
        if (!copy) copy = arena_take(arena, (size_t)n + 1, 1);
    }
    *field = (Span){copy, n};
    *p = q + 1;
    return 1;
}

// A row without its line break.
static const char *row_end(const Record *r) {
    const char *end = r->text + r->size;
    if (end > r->text && end[-1] == '\n') end--;
    if (end > r->text && end[-1] == '\r') end--;
    return end;
}

// How many fields the row at *p (NULL: none) has if they end at this sign, 0 if a quote would close
// lines further on but end no field; *named: is one of them called `name`? Moves *p to the next
// row, NULL if there is none.
static int count_fields(Arena *arena, const char **p, const char *end, char sign, const char *name,
                        int *named) {
    const char *quote = NULL, *stop = *p ? csv_row_end(*p, end, sign, &quote) : NULL, *q = *p;
    Record row = {.text = *p, .size = *p ? (size_t)((stop ? stop : end) - *p) : 0};
    int n = 0, bad = 0;
    Span field;
    arena_reset(arena);
    for (const char *from = q; q && csv_field(arena, &q, row_end(&row), sign, &field); n++) {
        *named |= word_is(trim(field), name);
        Span raw = trim((Span){from, (int)(q - from) - 1});
        int quotes = 0;
        for (int k = 0; k < raw.n; k++) quotes += raw.p[k] == '"';
        bad |= starts_with(raw, "\"") && quotes % 2 == 0 && raw.p[raw.n - 1] != '"' &&
               memchr(raw.p, '\n', (size_t)raw.n);
        from = q;
    }
    if (bad) n = *named = 0;
    *p = stop && stop < end ? stop : NULL;
    return n;
}

// What separates the fields of the row at p: the first of `own` and the usual signs by which one of
// them is called `name`; or else the one that makes the most fields of this row and the next, best
// of all as many of both; or else of this one.
static char find_separator(const char *p, const char *end, char own, const char *name) {
    const char signs[] = {own, ',', ';', '\t', '|', 0};
    char best = own;
    Arena arena = {0};
    int64_t most = 0;  // the rank of the best: of both rows in the upper half, of this one below
    for (int k = 0, named = 0; signs[k] && !named; k++) {
        const char *at = p;
        int other = 0, n = count_fields(&arena, &at, end, signs[k], name, &named);
        int next = count_fields(&arena, &at, end, signs[k], "", &other);
        int64_t rank = n > 1 ? ((int64_t)2 * min_int(n, next) + (next == n)) << 32 | n : n;
        if (rank > most || named) most = rank, best = signs[k];
    }
    arena_free(&arena);
    return best;
}

// Looks at the first bytes of a table: passes over empty lines and the "sep=;" that Excel writes,
// and finds what separates the fields.
static void begin_table(Source *s, const char *smiles) {
    Buffer *b = &s->next;
    for (; b->begin < b->end && strchr("\r\n", b->bytes[b->begin]); b->begin++)
        s->line += b->bytes[b->begin] == '\n';
    Lines in = {b->bytes + b->begin, b->bytes + b->end, 0};
    Span line;
    next_line(&in, &line);
    if (line.n == 7 && line.p[0] == '"') line.p++, line.n -= 2;
    if (line.n != 5 || !starts_with_word(line, "sep=")) {
        s->separator = find_separator(b->bytes + b->begin, in.end, s->separator, smiles);
        return;
    }
    s->separator = line.p[4];
    b->begin = (size_t)(in.at - b->bytes);
    s->line++;
}
