// lib/commands.h - a program of several commands, the first of which needs no name
//   HEADING(), TEXT() ...   rows of its table of options, whose values stand in a struct `opt`
//   PRETRAIN ..., SHAPES ...  bits of both
//   Command, command_find() its table of commands, and the one that is named
//   precision_begin(), precision_text()   --precision

#define HEADING(text, commands) {NULL, OPT_FLAG, NULL, 0, 0, NULL, text, commands}
#define TEXT(name, field, argument, help, commands) \
    {name, OPT_TEXT, &opt.field, 0, 0, argument, help, commands}
#define WHOLE(name, field, min, max, help, commands) \
    {name, OPT_INT, &opt.field, min, max, "N", help, commands}
#define NUMBER(name, field, min, max, help, commands) \
    {name, OPT_NUMBER, &opt.field, min, max, "X", help, commands}
#define FLAG(name, field, help, commands) {name, OPT_FLAG, &opt.field, 0, 0, NULL, help, commands}

// Bits of commands and of options that each program has; a program has others beside them.
enum { PRETRAIN = 1, FINETUNE = 2, PREDICT = 4, EMBED = 8, TRAIN = PRETRAIN | FINETUNE,
       SHAPES = 64,     // an option that shapes a run's trajectory: --resume needs the same
       GROWS = 128,     // or a larger number
       FILES = 256 };   // an option that is kept for --resume, but not in a checkpoint

typedef struct {
    const char *name;
    unsigned bit;
    int words;            // files it takes
    const char *output;   // default of -o
    const char *usage, *help;
} Command;

// The command that the first word names, *named, or if that is a file or an option the first of the
// table. Dies at one that is misspelt. The word "help" becomes --help.
static const Command *command_find(int *named, const Command *table, int n, int argc, char **argv) {
    const Command *nearest = NULL;
    if (argc > 1 && strcmp(argv[1], "help") == 0) argv[1] = xprintf("--help");
    *named = 0;
    for (const Command *c = table; c < table + n && argc > 1; c++) {
        *named = strcmp(argv[1], c->name) == 0;
        if (*named) return c;
        if (edit_distance(argv[1], c->name) <= 2) nearest = c;
    }
    CHECK(!nearest || access(argv[1], F_OK) == 0, "unknown command %s; did you mean %s?", argv[1],
          nearest->name);
    return table;
}

#ifndef BF16_UNIT  // lib/fast.h has none
#define BF16_UNIT "bf16 by rounding, float32 arithmetic"
#endif

// The precision of matrix products, and what computes them.
static const char *precision_text(void) { return gemm_bf16 ? BF16_UNIT : "float32"; }

// Takes the value of --precision; says so if it is not the default.
static void precision_begin(const char *name) {
    static const char *const names[] = {"float32", "bf16"};
    gemm_bf16 = choice("--precision", name, names, 2);
    if (gemm_bf16) fprintf(stderr, "product %s\n", precision_text());
}
