// commands/options.h - the command line of all commands
//
//   opt, OPTIONS        what it sets, and the one table of what may be set
//   start_config()      the sizes of a model to train
//   options_from_state()  a resumed run has its own options
//   command_line()      parses and checks it; program_end()

// What the command line sets; the initial values are the defaults. Those of size, batch, task,
// readout and modality depend on files.
typedef struct {
    const char *size, *output, *valid, *test, *init, *model, *task, *readout, *modality;
    const char *loss_units, *level, *layer, *svg, *near, *precision;
    int64_t part;                              // --micro-batch; 0: the whole batch
    int64_t layers, dim, ffn, heads, kernels;  // 0: from `size`
    int64_t steps, batch, warmup, seed, threads, save_every, epochs, patience, seeds;
    int resume, help, version;
    Blend blend;
    LossWeights weights;
    Dropout drop;
    Adam adam;
    double hold, interval;
} Options;

static Options opt = {
    .steps = 2400,
    .warmup = -1,
    .seed = 1,
    .save_every = 500,
    .epochs = 40,
    .seeds = 1,
    .patience = 15,
    .layer = "-1",
    .loss_units = "deviations",
    .precision = "float32",
    .blend = {0.2, 0.2, 0.6, 0.4, 0.6, 0.2, 0},
    .weights = {{0, 6, 0.1, 0.1, 0.5}},
    .drop = {0.1, 0.1, 0.1, 0},
    .adam = {3e-4, 0.9, 0.98, 1e-8, 0, 5},
    .hold = 0.9,
    .interval = 80,
};

enum { SHOW = 16, INFO = 32, READ = PREDICT | EMBED };

static const Option OPTIONS[] = {
    HEADING("Files", TRAIN | READ | SHOW),
    TEXT("-o", output, "FILE", "output; predict, embed: - is stdout", TRAIN | READ),
    TEXT("--valid", valid, "FILE", "validation set (valid.bin beside train.bin)", TRAIN | FILES),
    TEXT("--test", test, "FILE", "test set (test.bin beside train.bin)", FINETUNE | FILES),
    TEXT("--init", init, "FILE", "start from this checkpoint", TRAIN | FILES),
    TEXT("--model", model, "FILE",
         "checkpoint to use; predict: or several, an ensemble; show: what it says of the pairs",
         READ | SHOW),
    TEXT("--near", near, "FILE", "training set: the nearest of its molecules, and how far it is",
         PREDICT),
    TEXT("--svg", svg, "FILE", "the matrices as a picture", SHOW),
    FLAG("--resume", resume, "continue the run that writes -o, with its options; more --steps, "
         "--epochs or --seeds may be given", TRAIN),
    WHOLE("--save-every", save_every, 1, 1e9, "steps between checkpoints", TRAIN),
    HEADING("Model", TRAIN),
    TEXT("--size", size, "NAME",
         "tiny, small, or base, the paper's (default small, or that of --init)", TRAIN),
    WHOLE("--layers", layers, 1, MAX_LAYERS, "instead of --size's; so the next four",
          TRAIN | SHAPES),
    WHOLE("--dim", dim, 1, MAX_DIM, "width of a token", TRAIN | SHAPES),
    WHOLE("--ffn", ffn, 1, MAX_DIM, "width of the feed-forward layer", TRAIN | SHAPES),
    WHOLE("--heads", heads, 1, MAX_HEADS, "attention heads, a divisor of --dim", TRAIN | SHAPES),
    WHOLE("--kernels", kernels, 1, MAX_KERNELS, "Gaussian kernels", TRAIN | SHAPES),
    HEADING("Training", TRAIN | READ | SHOW),
    WHOLE("--steps", steps, 1, 1e9, "updates", PRETRAIN | SHAPES | GROWS),
    WHOLE("--epochs", epochs, 1, 1e6, "passes over the training set", FINETUNE | SHAPES | GROWS),
    WHOLE("--patience", patience, 0, 1e6, "stop after N epochs without gain; 0: never",
          FINETUNE | SHAPES | GROWS),
    WHOLE("--seeds", seeds, 1, 1000,
          "repeat with N seeds: mean, deviation; each keeps FILE.seedN.safetensors, an ensemble",
          FINETUNE | SHAPES | GROWS),
    WHOLE("--batch-size", batch, 1, 1e6,
          "molecules at a time (default: pretraining 12, else 64; at most all)",
          TRAIN | READ | SHAPES),
    WHOLE("--micro-batch", part, 0, 1e6,
          "molecules at once: less memory; with MPI each rank takes some; 0: the whole batch",
          TRAIN | SHAPES),
    NUMBER("--lr", adam.lr, 0, 10, "peak learning rate", TRAIN | SHAPES),
    WHOLE("--warmup", warmup, -1, 1e9, "steps; -1: 1/12 (finetune: 1/10) of all", TRAIN | SHAPES),
    NUMBER("--hold", hold, 0, 1, "part of the steps at the peak, before the cosine to 0",
           TRAIN | SHAPES),
    WHOLE("--seed", seed, 0, 9e15, "names every random draw", TRAIN | SHOW | SHAPES),
    WHOLE("--threads", threads, 0, MAX_THREADS, "0: all we may use; results are the same",
          TRAIN | READ),
    TEXT("--precision", precision, "NAME", "of matrix products, also of a model trained otherwise: "
         "float32, or bf16 (operands of 8 bits, sums are float32)", TRAIN | READ | SHAPES),
    NUMBER("--beta1", adam.beta1, 0, 0.999999, "AdamW", TRAIN | SHAPES),
    NUMBER("--beta2", adam.beta2, 0, 0.999999, "AdamW", TRAIN | SHAPES),
    NUMBER("--eps", adam.eps, 1e-30, 1, "AdamW", TRAIN | SHAPES),
    NUMBER("--weight-decay", adam.weight_decay, 0, 10, "AdamW, decoupled", TRAIN | SHAPES),
    NUMBER("--clip", adam.clip, 0, 1e9, "largest gradient norm; 0: any", TRAIN | SHAPES),
    NUMBER("--attention-dropout", drop.attention, 0, 0.99, "of probabilities", TRAIN | SHAPES),
    NUMBER("--activation-dropout", drop.activation, 0, 0.99, "after gelu", TRAIN | SHAPES),
    NUMBER("--path-dropout", drop.path, 0, 0.99, "of the last layer's branches", TRAIN | SHAPES),
    NUMBER("--embedding-dropout", drop.embedding, 0, 0.99, "of the tokens", TRAIN | SHAPES),
    HEADING("Task", FINETUNE | READ),
    TEXT("--task", task, "NAME", "classification or regression (default: by the labels)",
         FINETUNE | SHAPES),
    TEXT("--loss-units", loss_units, "NAME",
         "of regression: deviations (every task counts alike) or labels (as the release)",
         FINETUNE | SHAPES),
    TEXT("--readout", readout, "NAME", "mean, sum or cls (default mean; embed: as fine-tuned)",
         FINETUNE | EMBED | SHAPES),
    TEXT("--level", level, "NAME", "a vector a molecule, or an atom (whose: FILE.index.npy)",
         EMBED),
    TEXT("--layer", layer, "N[,N...]|all", "output of these layers, side by side, each behind its "
         "LayerNorm; 0: what goes into the first, -1: the last", EMBED),
    TEXT("--modality", modality, "NAME", "2d, 3d or both (default 2d; embed: as fine-tuned)",
         FINETUNE | EMBED | SHAPES),
    NUMBER("--interval", interval, 0, 100, "% of labels between the columns low and high, of "
           "regression; below 1: a fraction; 0: none", PREDICT),
    HEADING("Method", PRETRAIN | SHOW),
    NUMBER("--pair-spd", blend.pair_spd, 0, 1, "how often a pair shows its path length",
           PRETRAIN | SHOW | SHAPES),
    NUMBER("--pair-edge", blend.pair_edge, 0, 1, "the bonds of its path", PRETRAIN | SHOW | SHAPES),
    NUMBER("--pair-3d", blend.pair_3d, 0, 1, "its distance", PRETRAIN | SHOW | SHAPES),
    NUMBER("--atom-2d", blend.atom_2d, 0, 1, "how often an atom shows its degree",
           PRETRAIN | SHOW | SHAPES),
    NUMBER("--atom-3d", blend.atom_3d, 0, 1, "its distances", PRETRAIN | SHOW | SHAPES),
    FLAG("--no-blend", blend.all, "show everything of every pair", PRETRAIN | SHOW | SHAPES),
    NUMBER("--noise", blend.noise, 0, 10, "on each coordinate, Angstrom", PRETRAIN | SHAPES),
    NUMBER("--weight-denoise", weights.weight[LOSS_NOISE], 0, 1e6, "of a loss", PRETRAIN | SHAPES),
    NUMBER("--weight-spd", weights.weight[LOSS_SPD], 0, 1e6, "of a loss", PRETRAIN | SHAPES),
    NUMBER("--weight-edge", weights.weight[LOSS_EDGE], 0, 1e6, "of a loss", PRETRAIN | SHAPES),
    NUMBER("--weight-3d", weights.weight[LOSS_3D], 0, 1e6, "of a loss", PRETRAIN | SHAPES),
    FLAG("--help", help, "this text; after a command, its own, with its defaults", 0),
    FLAG("--version", version, "which program this is", 0),
};
enum { N_OPTIONS = sizeof OPTIONS / sizeof OPTIONS[0] };

static char option_given[N_OPTIONS];

static const char *const READOUT_NAMES[] = {"cls", "mean", "sum"};
static const char *const MODALITY_NAMES[] = {"2d", "3d", "both"};
static const int MODALITY_USE[] = {USE_SPD | USE_EDGE, USE_3D, USE_SPD | USE_EDGE | USE_3D};
static const char *const UNIT_NAMES[] = {"deviations", "labels"};
// Pretraining gives the graph token, cls, which the release reads, no loss: hence the mean.
static const char *const DEFAULT_READOUT = "mean", *const DEFAULT_MODALITY = "2d";

// The USE_ bits of a modality's name.
static int modality_use(const char *name) {
    return MODALITY_USE[choice("--modality", name, MODALITY_NAMES, 3)];
}

// The sizes of a model to train: a named one (base: the paper's) and what the options replace in
// it; with --init those of the checkpoint `init`, which the options may only repeat.
static Config start_config(const char *init) {
    static const char *const names[] = {"tiny", "small", "base"};
    static const Config configs[] = {{2, 64, 64, 4, 16, 0}, {6, 256, 256, 8, 64, 0},
                                     {12, 768, 768, 32, 128, 0}};
    Config c = configs[opt.size ? choice("--size", opt.size, names, 3) : 1], file = c;
    if (init) {
        TensorFile f;
        tensor_file_open(&f, init);
        file = tensor_file_config(&f);
        tensor_file_close(&f);
        if (!opt.size) c = file;
    }
    int *const number[5] = {&c.layers, &c.dim, &c.ffn, &c.heads, &c.kernels};
    int64_t *const asked[5] = {&opt.layers, &opt.dim, &opt.ffn, &opt.heads, &opt.kernels};
    for (int n = 0; n < 5; n++) {
        if (*asked[n]) *number[n] = (int)*asked[n];
        *asked[n] = *number[n];  // for options_describe()
    }
    c.tasks = file.tasks = 0;
    CHECK(!init || memcmp(&c, &file, sizeof c) == 0,
          "%s: has --layers %d --dim %d --ffn %d --heads %d --kernels %d; leave out the size "
          "options that say otherwise", init, file.layers, file.dim, file.ffn, file.heads,
          file.kernels);
    return c;
}

// Does the value of an option stand from `first` to `last`?
static int is_between(const Option *o, const void *first, const void *last) {
    const char *value = o->value;
    return value >= (const char *)first && value <= (const char *)last;
}

// Takes a saved run's options where the command line is silent; --size speaks for five of them.
static void options_from_state(const char *text, const char *path) {
    if (opt.size) start_config(NULL);
    for (int k = 0; k < N_OPTIONS && opt.size; k++)
        option_given[k] |= is_between(&OPTIONS[k], &opt.layers, &opt.kernels);
    opt.size = NULL;
    options_resume(OPTIONS, N_OPTIONS, GROWS, FILES, option_given, text, path);
}

// ---- commands

static const Command COMMANDS[] = {
    {"pretrain", PRETRAIN, 1, "moleblend.safetensors", "train.bin", "the same, spelt out"},
    {"finetune", FINETUNE, 1, "finetuned.safetensors", "train.bin --init FILE",
     "train on labels, from a checkpoint or from scratch"},
    {"predict", PREDICT, 1, "-", "data.bin --model FILE", "predictions as CSV on stdout"},
    {"embed", EMBED, 1, "embeddings.npy", "data.bin --model FILE",
     "a vector per molecule, NumPy format"},
    {"show", SHOW, 2, NULL, "data.bin INDEX|NAME", "a molecule's relations, and one blend of them"},
    {"info", INFO, 1, NULL, "FILE", "what is in a dataset or checkpoint"},
};
enum { N_COMMANDS = sizeof COMMANDS / sizeof COMMANDS[0] };

#include "shared.h"  // help_print(), command_files(), run_open(), text_add_run()

static const char TITLE[] =
    "MoleBLEND: pretrain a Transformer on molecules by blending 2D and 3D (ICLR 2024)\n\n"
    "  ./moleblend train.bin                        pretrain; writes moleblend.safetensors";

// Says so if parts that should sum to 1 do not; they count as parts of their sum.
static void note_parts(const char *names, double sum) {
    if (fabs(sum - 1) > 1e-6)
        fprintf(stderr, "note    %s sum to %g and are taken as parts of that\n", names, sum);
}

// What the ranges of single options cannot say.
static void check_options(void) {
    CHECK(opt.blend.pair_spd + opt.blend.pair_edge > 0,
          "--pair-spd, --pair-edge: expected one of them above 0 (molecules without 3D need it)");
    CHECK(opt.blend.atom_2d + opt.blend.atom_3d > 0, "--atom-2d, --atom-3d: expected one above 0");
    for (int k = 0; k < N_OPTIONS && opt.blend.all; k++)
        CHECK(!option_given[k] || !is_between(&OPTIONS[k], &opt.blend.pair_spd, &opt.blend.atom_3d),
              "--no-blend shows everything of every pair; expected no --pair-* or --atom-* beside "
              "it");
    if (opt.resume) return;  // what counts are the options of the state
    note_parts("--pair-spd, --pair-edge and --pair-3d",
               opt.blend.pair_spd + opt.blend.pair_edge + opt.blend.pair_3d);
    note_parts("--atom-2d and --atom-3d", opt.blend.atom_2d + opt.blend.atom_3d);
}

// Sorts the words of the command line: checkpoints go behind models[0..n), others to the front.
// Returns how many checkpoints there are then; *n_words: of the others.
static int words_models(const char **models, const char **words, int *n_words) {
    int n = 0, others = 0;
    if (opt.model) models[n++] = opt.model;
    for (int k = 0; k < *n_words; k++) {
        size_t length = strlen(words[k]);
        if (length > 12 && strcmp(words[k] + length - 12, ".safetensors") == 0)
            models[n++] = words[k];
        else words[others++] = words[k];
    }
    *n_words = others;
    return n;
}

typedef struct {
    const Command *command;
    const char **words, **models;  // its files; of predict: its checkpoints
    int n_models;
} CommandLine;

// Parses the command line into opt and notes the files that it names. --help ends the program.
static CommandLine command_line(int argc, char **argv) {
    int named;
    const Command *command = command_find(&named, COMMANDS, N_COMMANDS, argc, argv);
    if (command->bit == FINETUNE) {  // the paper's
        opt.adam.lr = 2e-4;
        opt.adam.beta2 = 0.999;
        opt.hold = 0;
    }
    opt.output = command->output;
    const char **words = xmalloc(2 * (size_t)argc + 2, sizeof *words), **models = words + argc + 1;
    int n_words = options_parse(OPTIONS, N_OPTIONS, command->bit, argc - named, argv + named, words,
                                argc, option_given), n_models = opt.model != NULL;
    if (opt.version || opt.help) free(words);
    if (opt.version) printf("moleblend %s, vectors of %d floats\n", MB_VERSION, VEC);
    if (opt.help) help_print(TITLE, "./moleblend", 23, 0, named ? command->bit : 0);
    if (opt.version) mb_exit(EXIT_SUCCESS);
    if (command->bit == PREDICT) n_models = words_models(models, words, &n_words);
    CHECK(n_words == command->words, "expected ./moleblend %s%s; see --help",
          named ? xprintf("%s ", command->name) : "", command->usage);
    check_options();
    command_files(command, words[0]);
    files_input(opt.near);
    for (int k = 0; k < n_models; k++) files_input(command->bit == PREDICT ? models[k] : NULL);
    return (CommandLine){command, words, models, n_models};
}

// All is done and written.
static void program_end(const CommandLine *line) {
    free(line->words);
    ranks_finish();
    mb_exit(EXIT_SUCCESS);
}
