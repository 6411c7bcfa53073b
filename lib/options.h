// lib/options.h - options: `--name value`, or `--name` alone for a flag. A table row holds the
// name, where the value goes (its content at the start is the default), its bounds, its help
//
//   options_parse()                         a command line
//   options_print()                         the table as help
//   options_describe(), options_resume()    what a run was given, and whether that is still so
//   edit_distance()                         for "did you mean"
//   sibling(), path_with(), print_csv()     names of outputs; a CSV field

typedef enum { OPT_FLAG, OPT_INT, OPT_NUMBER, OPT_TEXT } OptionKind;

typedef struct {
    const char *name;      // with its dashes; NULL marks a heading, printed from `help`
    OptionKind kind;
    void *value;           // int *, int64_t *, double * or const char **
    double min, max;       // bounds of OPT_INT and OPT_NUMBER, both allowed
    const char *argument;  // what help calls the value, e.g. "N" or "FILE"
    const char *help;
    unsigned commands;     // bit set of the commands that take it (0: all)
} Option;

// Edit distance of two short strings (Levenshtein), at most 99.
static inline int edit_distance(const char *a, const char *b) {
    int row[64], n = (int)strlen(b);
    if (n > 63) return 99;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int above = row[j];
            row[j] = min_int(min_int(above, row[j - 1]) + 1, diagonal + (a[i - 1] != b[j - 1]));
            diagonal = above;
        }
    }
    return row[n] < 99 ? row[n] : 99;
}

// Stores the value of one option, or dies with what was expected and what was found.
static inline void option_store(const Option *o, const char *text) {
    char *end = NULL;
    errno = 0;
    if (o->kind == OPT_TEXT) {
        CHECK(*text || strncmp(o->argument, "FILE", 4) != 0, "%s: expected a file, found \"\"",
              o->name);
        *(const char **)o->value = text;
    } else if (o->kind == OPT_INT) {
        long long v = strtoll(text, &end, 10);
        CHECK(end != text && *end == 0 && !errno && (double)v >= o->min && (double)v <= o->max,
              "%s: expected a whole number from %.0f to %.0f, found \"%s\"", o->name, o->min,
              o->max, text);
        *(int64_t *)o->value = v;
    } else {
        double v = strtod(text, &end);
        CHECK(end != text && *end == 0 && v >= o->min && v <= o->max,
              "%s: expected a number from %g to %g, found \"%s\"", o->name, o->min, o->max, text);
        *(double *)o->value = v;
    }
}

// Parses argv[1..argc) against table[0..n) for one command (a bit, or 0) and marks the rows that it
// met in given[0..n). Other words go to words[0..max_words); returns how many there are. Dies on
// anything it does not know.
static inline int options_parse(const Option *table, int n, unsigned command, int argc, char **argv,
                                const char **words, int max_words, char *given) {
    int n_words = 0;
    for (int i = 1; i < argc; i++) {
        const char *arg = strcmp(argv[i], "-h") == 0 ? "--help" : argv[i];
        const char *value = arg[0] == '-' && arg[1] == '-' ? strchr(arg, '=') : NULL;
        if (value) arg = xprintf("%.*s", (int)(value++ - arg), arg);
        if (arg[0] != '-' || arg[1] == 0) {
            CHECK(n_words < max_words, "unexpected argument \"%s\"; see --help", arg);
            words[n_words++] = arg;
            continue;
        }
        const Option *nearest = NULL;
        int least = 99;
        for (const Option *o = table; o < table + n; o++) {
            if (!o->name || (o->commands && command && !(o->commands & command))) continue;
            int distance = edit_distance(arg, o->name);
            if (distance < least) {
                least = distance;
                nearest = o;
            }
        }
        CHECK(least > 4 || least == 0, "unknown option %s; did you mean %s?", arg, nearest->name);
        CHECK(least == 0, "unknown option %s; see --help", arg);
        if (given[nearest - table] && nearest->kind != OPT_FLAG)
            fprintf(stderr, "note    %s is given twice: the last counts\n", arg);
        given[nearest - table] = 1;
        if (nearest->kind == OPT_FLAG) {
            CHECK(!value, "%s: expected no value", arg);
            *(int *)nearest->value = 1;
        } else {
            CHECK(value || i + 1 < argc, "%s: expected a value (%s) after it", arg,
                  nearest->argument);
            option_store(nearest, value ? value : argv[++i]);
        }
    }
    return n_words;
}

// Index of `text` (NULL: none) among n names, or the end of the program.
static inline int choice(const char *option, const char *text, const char *const *names, int n) {
    for (int k = 0; k < n && text; k++)
        if (strcmp(text, names[k]) == 0) return k;
    DIE("%s: expected %s%s%s%s%s, found \"%s\"", option, names[0], n > 2 ? ", " : " or ", names[1],
        n > 2 ? " or " : "", n > 2 ? names[2] : "", text ? text : "");
}

// The value of an option as text, in fresh memory.
static inline char *option_value(const Option *o) {
    if (o->kind == OPT_FLAG) return xprintf("%d", *(int *)o->value);
    if (o->kind == OPT_INT) return xprintf("%lld", (long long)*(int64_t *)o->value);
    if (o->kind == OPT_TEXT)
        return xprintf("%s", *(const char **)o->value ? *(const char **)o->value : "");
    double number = *(double *)o->value;
    char *text = xprintf("%g", number);
    if (strtod(text, NULL) == number) return text;
    free(text);
    return xprintf("%.17g", number);
}

// A path that means the same file in any folder, in the place of `path`, which is freed.
static inline char *path_anywhere(char *path) {
#if MB_POSIX
    char folder[4096];
    if (*path && *path != '/' && getcwd(folder, sizeof folder)) {
        char *whole = xprintf("%s/%s", folder, path);
        free(path);
        return whole;
    }
#endif
    return path;
}

// "--name value", a line each, of all rows that belong to `commands`, in fresh memory. Files are
// named as from any folder.
static inline char *options_describe(const Option *table, int n, unsigned commands) {
    Text all = {0};
    for (const Option *o = table; o < table + n; o++) {
        if (!o->name || !(o->commands & commands)) continue;
        char *value = option_value(o);
        if (o->kind == OPT_TEXT && strcmp(o->argument, "FILE") == 0) value = path_anywhere(value);
        CHECK(!strchr(value, '\n'), "%s: expected no line break in \"%s\"", o->name, value);
        text_add(&all, "%s %s\n", o->name, value);
        free(value);
    }
    return all.text;
}

// Takes the values of an options_describe() text, as read from `path`, for all rows that are not
// given. One that is given and differs is named on stderr; if it is not a larger number of a row of
// `grows`, the program dies after the last of them. Of `files` any may be given, it is for the
// caller to compare what is in them; and one that is not there any more leaves what was found.
static inline void options_resume(const Option *table, int n, unsigned grows, unsigned files,
                                  const char *given, const char *text, const char *path) {
    int refused = 0;
    for (const char *line = text, *end; (end = strchr(line, '\n')); line = end + 1) {
        size_t name = strcspn(line, " \n");
        const Option *o = table;
        while (o < table + n && !(o->name && strlen(o->name) == name && line[name] == ' ' &&
                                  memcmp(o->name, line, name) == 0)) o++;
        CHECK(o < table + n, "%s: unknown option %.*s; it is of another program or version", path,
              (int)(end - line), line);
        char *then = xprintf("%.*s", (int)(end - line - name - 1), line + name + 1);
        char *now = option_value(o);
        int larger = o->commands & grows && strtod(now, NULL) > strtod(then, NULL);
        int file = (o->commands & files) != 0;
        if (given[o - table] && !file && strcmp(now, then) != 0) {
            fprintf(stderr, "%s: the run began with \"%s\", now it is \"%s\"\n", o->name, then,
                    now);
            refused += !larger;
        } else if (o->kind == OPT_FLAG) {
            *(int *)o->value = then[0] == '1';
        } else if (o->kind != OPT_TEXT) {
            option_store(o, then);
        } else if (!given[o - table] && !(file && *then && *now && access(then, F_OK) != 0)) {
            if (file) free(*(char **)o->value);  // of sibling()
            *(const char **)o->value = *then ? then : NULL;
            if (*then) then = NULL;  // the option has it now
        }
        FREE_ALL(then, now);
    }
    CHECK(!refused, "%s: --resume needs the run's own options; leave out those that differ", path);
}

// Prints the rows of the table that belong to a command (0: all), with their defaults.
static inline void options_print(const Option *table, int n, unsigned command) {
    for (const Option *o = table; o < table + n; o++) {
        if (o->commands && command && !(o->commands & command)) continue;
        if (!o->name) {
            printf("\n%s\n", o->help);
            continue;
        }
        char left[80], *value = option_value(o);
        snprintf(left, sizeof left, "%s %s", o->name, o->argument ? o->argument : "");
        int shown = o->kind != OPT_FLAG && *value && (o->kind != OPT_INT || strcmp(value, "0"));
        printf("  %-24s %s%s%s%s\n", left, o->help, shown ? " (default " : "", shown ? value : "",
               shown ? ")" : "");
        free(value);
    }
}

// valid.bin (or test.bin) beside train.bin: the same path with the last "train" replaced, if there
// is such a file; else NULL. Lives as long as the program.
static inline const char *sibling(const char *train_path, const char *part) {
    const char *at = NULL;
    for (const char *s = train_path; (s = strstr(s, "train")); s++) at = s;
    if (!at) return NULL;
    char *path = xprintf("%.*s%s%s", (int)(at - train_path), train_path, part, at + 5);
    if (access(path, F_OK) == 0) return path;  // not fopen(), which waits for a FIFO
    free(path);
    return NULL;
}

// A field of a CSV row, quoted if it must be.
static inline void print_csv(FILE *out, const char *text, size_t length) {
    int quote = 0;
    for (size_t k = 0; k < length; k++) quote |= strchr(",\"\r\n", text[k]) != NULL;
    if (quote) fputc('"', out);
    for (size_t k = 0; k < length; k++) {
        if (text[k] == '"') fputc('"', out);
        fputc(text[k], out);
    }
    if (quote) fputc('"', out);
}

// path with another ending in the place of `ending`, or behind it, in fresh memory.
static inline char *path_with(const char *path, const char *ending, const char *other) {
    size_t n = strlen(path), m = strlen(ending);
    if (n > m && strcmp(path + n - m, ending) == 0) n -= m;
    return xprintf("%.*s%s", (int)n, path, other);
}
