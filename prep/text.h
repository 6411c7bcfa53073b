// prep/text.h - text. Parsers never exit: they return -1 and describe the fault, with the line and
// column it was found at, so that one bad record costs one record
//
//   fault_at()                what is wrong, and where
//   next_line()               the lines of a record, by a cursor
//   trim(), trim_right(), span_is(), starts_with()   and without capitals word_is(),
//                             starts_with_word(): small things to do with a Span
//   utf8_length()             of a sequence of bytes
//   parse_decimal()           what atof() reads, exactly rounded
//   leading_int(), loose_int(), parse_whole()   whole numbers, from careless to strict

typedef struct { const char *p; int n; } Span;  // n bytes of text

typedef struct {
    const char *kind;  // what the summary counts by, a string constant
    char text[160];    // the whole story
    int line, column;  // line within the record, from 1; column from 1, 0 = the whole line
} Fault;

// Fills a fault and returns -1.
MB_PRINTF(5, 6) static int fault_at(Fault *f, int line, int column, const char *kind,
                                    const char *fmt, ...) {
    va_list args;
    f->kind = kind;
    f->line = line;
    f->column = column;
    va_start(args, fmt);
    vsnprintf(f->text, sizeof f->text, fmt, args);
    va_end(args);
    for (char *c = f->text; *c; c++)
        if ((unsigned char)*c < 32 || *c == 127) *c = '?';
    return -1;
}

// A cursor over the lines of a record.
typedef struct {
    const char *at, *end;
    int line;  // number of the line last read, from 1
} Lines;

// Reads the next line without its LF or CRLF; 0 at the end of the record.
static int next_line(Lines *in, Span *line) {
    if (in->at >= in->end) {
        *line = (Span){in->end, 0};
        return 0;
    }
    const char *stop = memchr(in->at, '\n', (size_t)(in->end - in->at));
    const char *end = stop ? stop : in->end;
    *line = (Span){in->at, (int)(end - in->at)};
    if (line->n && line->p[line->n - 1] == '\r') line->n--;
    in->at = stop ? stop + 1 : in->end;
    in->line++;
    return 1;
}

// Small things to do with spans: blanks, equality, prefixes.
static int is_blank(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

// A path as the word of a command that we propose; lives as long as the program.
static const char *shell_path(const char *path) {
    Text word = {0};
    if (!path[strcspn(path, " \t\"'$&;()<>|*?[#~`\\!{")]) return path;
    for (const char *c = path; *c; c++) text_add(&word, *c == '\'' ? "'\\''" : "%c", *c);
    return xprintf("'%s'", word.text);
}

static Span trim_right(Span s) {
    while (s.n > 0 && is_blank(s.p[s.n - 1])) s.n--;
    return s;
}

static Span trim(Span s) {
    while (s.n > 0 && is_blank(s.p[0])) s.p++, s.n--;
    return trim_right(s);
}

static int span_is(Span s, const char *text) {
    return (size_t)s.n == strlen(text) && memcmp(s.p, text, (size_t)s.n) == 0;
}

static int starts_with(Span s, const char *text) {
    size_t n = strlen(text);
    return s.n >= 0 && (size_t)s.n >= n && memcmp(s.p, text, n) == 0;
}

// The same without regard to capitals: whether s is, or starts with, a word.
static int word_is(Span s, const char *word) {
    int n = (int)strlen(word);
    for (int k = 0; k < n && s.n == n; k++)
        if (tolower((unsigned char)s.p[k]) != tolower((unsigned char)word[k])) return 0;
    return s.n == n;
}

static int starts_with_word(Span s, const char *word) {
    int n = (int)strlen(word);
    return s.n >= n && word_is((Span){s.p, n}, word);
}

// Length of the UTF-8 sequence at p (at most n bytes), 0 if it is not one.
static int utf8_length(const unsigned char *p, int n) {
    int more = p[0] < 0x80 ? 0 : p[0] >= 0xC2 && p[0] < 0xE0 ? 1 : p[0] >= 0xE0 && p[0] < 0xF0 ? 2
             : p[0] >= 0xF0 && p[0] < 0xF5 ? 3 : -1;
    if (more < 0 || more >= n) return 0;
    for (int k = 1; k <= more; k++)
        if ((p[k] & 0xC0) != 0x80) return 0;
    if ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F) ||
        (p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] > 0x8F))
        return 0;
    return more + 1;
}

// Number at the start of s after blanks (what atof reads), exactly rounded. Up to 15 digits are an
// exact integer, and one division by an exact power of ten rounds once; the rest is strtod's.
static double parse_decimal(Span s) {
    static const double tens[] = {1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12,
                                  1e13, 1e14, 1e15};
    const char *p = s.p, *end = s.p + s.n;
    while (p < end && is_blank(*p)) p++;
    const char *start = p;
    int negative = p < end && *p == '-', digits = 0, decimals = 0;
    if (p < end && (*p == '-' || *p == '+')) p++;
    uint64_t value = 0;
    for (; p < end && *p >= '0' && *p <= '9' && digits < 16; p++, digits++)
        value = 10 * value + (uint64_t)(*p - '0');
    if (p < end && *p == '.') {
        for (p++; p < end && *p >= '0' && *p <= '9' && digits < 16; p++, digits++, decimals++)
            value = 10 * value + (uint64_t)(*p - '0');
    }
    int simple = p == end || !(isalnum((unsigned char)*p) || *p == '.');
#if FLT_EVAL_METHOD == 2  // x87 would round twice
    simple = 0;
#endif
    if (digits <= 15 && simple) {
        double v = (double)value / tens[decimals];
        return negative ? -v : v;
    }
    char copy[128];
    size_t n = (size_t)(end - start) < sizeof copy - 1 ? (size_t)(end - start) : sizeof copy - 1;
    memcpy(copy, start, n);
    copy[n] = 0;
    return strtod(copy, NULL);
}

// What a careless reader makes of s: blanks skipped, then digits as far as they go, a minus before
// them if allowed. 0 if there are none.
static int leading_int(Span s, int minus) {
    int k = 0, v = 0, negative;
    while (k < s.n && s.p[k] == ' ') k++;
    negative = minus && k < s.n && s.p[k] == '-';
    for (k += negative; k < s.n && s.p[k] >= '0' && s.p[k] <= '9' && v < 100000000; k++)
        v = 10 * v + (s.p[k] - '0');
    return negative ? -v : v;
}

// The same with a minus, if there are only digits, blanks and signs; a plus makes it 0. Returns 0
// if there is anything else.
// RDKit: FileParserUtils::toInt
static int loose_int(Span s, int *value) {
    for (int k = 0; k < s.n; k++)
        if (!isdigit((unsigned char)s.p[k]) && s.p[k] != ' ' && s.p[k] != '-' && s.p[k] != '+')
            return 0;
    *value = leading_int(s, 1);
    return 1;
}

// Strict whole number of a trimmed span. Returns 0 if s is anything else.
static int parse_whole(Span s, int *value) {
    s = trim(s);
    int negative = s.n && s.p[0] == '-', i = s.n && (s.p[0] == '-' || s.p[0] == '+');
    int64_t v = 0;
    if (i == s.n) return 0;
    for (; i < s.n; i++) {
        if (s.p[i] < '0' || s.p[i] > '9' || v > INT_MAX) return 0;
        v = 10 * v + (s.p[i] - '0');
    }
    if (v > INT_MAX) return 0;
    *value = (int)(negative ? -v : v);
    return 1;
}
