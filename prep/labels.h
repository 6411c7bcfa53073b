// prep/labels.h - labels: what a cell says, and what a column of cells holds
//
//   parse_label(), odd_cell()       a cell's number, or why it has none; what is odd about it
//   tally_value(), tally_odd()      what a column holds, counted
//   tally_examples()                a few of a column's odd cells, for the summary

typedef enum { CELL_NUMBER, CELL_MISSING, CELL_CENSORED, CELL_BAD } CellKind;

// How a cell is written, if not in the ordinary way: bits.
enum { FORM_WORD = 1, FORM_COMMA = 2, FORM_MINUS = 4, FORM_EITHER = 8, FORM_GROUPS = 16,
       FORM_TINY = 32, FORMS = 6 };
static const char *const FORM_NAMES[FORMS] = {
    "words (true, yes, active, ...) are read as 1 and 0", "decimal commas are read as points",
    "the Unicode minus is read as -", "\"1,234\" may be 1.234 or 1234: it is taken as missing",
    "commas and points between groups of three digits are left out",
    "numbers nearer to 0 than 1.2e-38 are read as 0"};

// Whether s is one of the words (the last is NULL), capitals aside.
static int is_one_of(Span s, const char *const *words) {
    while (*words && !word_is(s, *words)) words++;
    return *words != NULL;
}

// Length of what stands at the start of text as "12,345" does: one to three digits, the first no 0,
// and groups of three, each behind a sign; 0 if there is no such group.
static size_t digit_groups(const char *text, char sign) {
    size_t first = strspn(text, "0123456789"), n = first;
    if (first < 1 || first > 3 || text[0] == '0') return 0;
    while (text[n] == sign && strspn(text + n + 1, "0123456789") == 3) n += 4;
    return n > first ? n : 0;
}

// Takes the sign between groups out of the first n characters of a text.
static void drop_sign(char *text, size_t n, char sign) {
    char *to = text;
    for (size_t k = 0; text[k]; k++)
        if (k >= n || text[k] != sign) *to++ = text[k];
    *to = 0;
}

// Makes a number's comma a point, and takes out what stands between groups of three digits. "1,234"
// may be 1234 or 1.234: 0, unless `decimal` says that commas are decimal ones.
static int undo_comma(char *text, int decimal, int *form) {
    char *comma = strchr(text, ',');
    if (!comma) return 1;
    char *number = text + strspn(text, "+-");
    size_t commas = digit_groups(number, ','), points = digit_groups(number, '.');
    int several = commas > 7;  // groups: 123,456 has one
    if (commas && (number[commas] == '.' || (!number[commas] && several))) {
        drop_sign(number, commas, ',');
        *form |= FORM_GROUPS;
        return 1;
    }
    if (points && number[points] == ',') {  // 1.234,5
        drop_sign(number, points, '.');
        *form |= FORM_GROUPS;
        comma = strchr(text, ',');
    }
    int either = !decimal && commas && !number[commas];
    *form |= either ? FORM_EITHER : FORM_COMMA;
    *comma = '.';
    return !either;
}

// The decimal number that a text is, *label, of a size up to LABEL_MAX; one below FLT_MIN becomes
// 0. Returns 0 if the text is anything else.
static int parse_number(const char *text, float *label, int *form) {
    char *end;
    float v = strtof(text, &end);
    if (!*text || *end || text[strspn(text, "+-.0123456789eE")]) return 0;  // no hexadecimal, "inf"
    if (fabs((double)v) > LABEL_MAX) return 0;
    int zero = !isdigit((unsigned char)text[strcspn(text, "123456789eE")]);
    if (fabsf(v) < FLT_MIN && !zero) v = 0, *form |= FORM_TINY;
    *label = v;
    return 1;
}

// What a cell says. A class is 1 or 0; a number after <, >, ~ is censored; NaN goes to *label if
// there is no number. decimal_comma: see undo_comma(). *form: FORM_ bits.
static CellKind parse_label(Span s, int decimal_comma, float *label, int *form) {
    static const char *const missing[] = {
        "NAN", "-NAN", "+NAN", "NA", "#NA", "N/A", "#N/A", "#N/A N/A", "<NA>", "N.A.", "NONE",
        "NULL", "NIL", "?", "-", "--", ".", "..", "...", "*", "ND", "N.D.", "N/D", "NT", "N.T.",
        "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN", "NAN(IND)", "-NAN(IND)", "MISSING",
        "NOT AVAILABLE", "NOT DETERMINED", "NOT TESTED", NULL};
    static const char *const words[2][9] = {
        {"FALSE", "F", "NO", "N", "INACTIVE", "NEGATIVE", "NEG", NULL},
        {"TRUE", "T", "YES", "Y", "ACTIVE", "POSITIVE", "POS", NULL}};
    static const struct { const char *bytes, *plain; } signs[] = {  // UTF-8
        {"\xE2\x88\x92", "-"}, {"\xE2\x80\x93", "-"}, {"\xE2\x89\xA4", "<"}, {"\xE2\x89\xA5", ">"},
        {"\xE2\x89\x88", "~"}, {"\xC2\xA0", " "}};
    char copy[64];
    int n = 0;
    *label = NAN;
    *form = 0;
    s = trim(s);
    for (int k = 0, sign; k < s.n; k++) {
        if (n + 1 == (int)sizeof copy) return CELL_BAD;
        for (sign = (unsigned char)s.p[k] < 128 ? 6 : 0; sign < 6; sign++)
            if (starts_with((Span){s.p + k, s.n - k}, signs[sign].bytes)) break;
        copy[n++] = sign < 6 ? signs[sign].plain[0] : s.p[k];
        if (sign < 2) *form |= FORM_MINUS;
        if (sign < 6) k += (int)strlen(signs[sign].bytes) - 1;
    }
    copy[n] = 0;
    Span text = trim((Span){copy, n});
    copy[text.p + text.n - copy] = 0;
    int word = text.n && !isdigit((unsigned char)text.p[text.n - 1]);  // they end in no digit
    if (!text.n || (word && is_one_of(text, missing))) return *form = 0, CELL_MISSING;
    for (int class = 0; class < 2 && word; class++) {
        if (!is_one_of(text, words[class])) continue;
        *label = (float)class;
        *form |= FORM_WORD;
        return CELL_NUMBER;
    }
    size_t bound = strspn(text.p, "<>~= "), censored = strcspn(text.p, "<>~") < bound;
    char *number = copy + (text.p - copy) + (censored ? bound : 0);
    int good = undo_comma(number, decimal_comma, form) && parse_number(number, label, form);
    if (!good || censored) *form &= FORM_EITHER, *label = NAN;
    return !good ? CELL_BAD : censored ? CELL_CENSORED : CELL_NUMBER;
}

// ---- what is unusual about a cell, and what all cells of a label say

enum { CELL_TEXT = 40, EXAMPLES = 3 };

typedef struct {
    int task, form;
    CellKind kind;
    int64_t line;            // of its record, from 0; of --labels-from: its row, from 1
    char text[CELL_TEXT];
} OddCell;

// Notes what a cell says in *odd; returns 0 if it is an ordinary number, or missing.
static int odd_cell(OddCell *odd, Span cell, int decimal_comma, float *label) {
    odd->kind = parse_label(cell, decimal_comma, label, &odd->form);
    if (odd->kind < CELL_CENSORED && !odd->form) return 0;
    cell = trim(cell);
    int n = min_int(cell.n, CELL_TEXT - 1);
    for (int k = 0; k < n; k++) odd->text[k] = (unsigned char)cell.p[k] < 32 ? ' ' : cell.p[k];
    odd->text[n] = 0;
    if (n < cell.n) memcpy(odd->text + n - 3, "...", 3);
    return 1;
}

typedef struct { char *text, *place; int64_t count; } Example;

typedef struct {
    int64_t present, missing, censored, bad, fractions;  // fractions: neither 0 nor 1
    int form;
    Example example[2][EXAMPLES];  // of censored and of bad cells: the first few texts
    Example odd[FORMS];      // the first cell that is written so, and read
} Tally;

static void tally_value(Tally *t, float label) {
    if (isnan(label)) t->missing++;
    else t->present++;
    t->fractions += !isnan(label) && label != 0 && label != 1;
}

// Counts an odd cell by its text; `line` is its place in `path`.
static void tally_odd(Tally *t, const OddCell *odd, const char *path, int64_t line) {
    Example *e = t->example[odd->kind == CELL_BAD], *end = e + EXAMPLES;
    t->form |= odd->form;
    for (int k = 0; k < FORMS && odd->kind < CELL_CENSORED; k++)
        if (odd->form >> k & 1 && !t->odd[k].text)
            t->odd[k] = (Example){xprintf("%s", odd->text),
                                  xprintf("%s:%lld", path, (long long)line), 1};
    if (odd->kind < CELL_CENSORED) return;
    t->censored += odd->kind == CELL_CENSORED;
    t->bad += odd->kind == CELL_BAD;
    while (e < end && e->text && strcmp(e->text, odd->text) != 0) e++;
    if (e == end) return;
    if (!e->count++) {
        e->text = xprintf("%s", odd->text);
        e->place = xprintf("%s:%lld", path, (long long)line);
    }
}

// "text" (place), "text" (n times, first place) and so many more, in fresh memory; NULL: none.
static char *tally_examples(const Tally *t, int bad) {
    Text list = {0};
    int64_t others = bad ? t->bad : t->censored;
    for (const Example *e = t->example[bad]; e < t->example[bad] + EXAMPLES && e->text; e++) {
        text_add(&list, "%s\"%s\" (", e > t->example[bad] ? ", " : "", e->text);
        if (e->count > 1) text_add(&list, "%lld times, first ", (long long)e->count);
        text_add(&list, "%s)", e->place);
        others -= e->count;
    }
    if (others) text_add(&list, " and %lld more", (long long)others);
    return list.text;
}

static void tally_free(Tally *t) {
    for (int k = 0; k < 2 * EXAMPLES; k++)
        FREE_ALL(t->example[k / EXAMPLES][k % EXAMPLES].text,
                 t->example[k / EXAMPLES][k % EXAMPLES].place);
    for (int k = 0; k < FORMS; k++) FREE_ALL(t->odd[k].text, t->odd[k].place);
}
