// lib/commands.h - a program of several commands, the first of which needs no name
//   HEADING(), TEXT() ...   rows of its table of options, whose values stand in a struct `opt`
//   Command, command_find() its table of commands, and the one that a word names

#define HEADING(text, commands) {NULL, OPT_FLAG, NULL, 0, 0, NULL, text, commands}
#define TEXT(name, field, argument, help, commands) \
    {name, OPT_TEXT, &opt.field, 0, 0, argument, help, commands}
#define WHOLE(name, field, min, max, help, commands) \
    {name, OPT_INT, &opt.field, min, max, "N", help, commands}
#define NUMBER(name, field, min, max, help, commands) \
    {name, OPT_NUMBER, &opt.field, min, max, "X", help, commands}
#define FLAG(name, field, help, commands) {name, OPT_FLAG, &opt.field, 0, 0, NULL, help, commands}

typedef struct {
    const char *name;
    unsigned bit;
    int words;            // files it takes
    const char *output;   // default of -o
    const char *usage, *help;
} Command;

// The command that a word names; NULL if it is a file or an option. Dies at one that is misspelt.
static const Command *command_find(const Command *table, int n, const char *word) {
    const Command *nearest = NULL;
    for (const Command *c = table; c < table + n; c++) {
        if (strcmp(word, c->name) == 0) return c;
        if (edit_distance(word, c->name) <= 2) nearest = c;
    }
    CHECK(!nearest || access(word, F_OK) == 0, "unknown command %s; did you mean %s?", word,
          nearest->name);
    return NULL;
}
