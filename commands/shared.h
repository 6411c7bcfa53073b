// commands/shared.h - what both programs do alike with `opt`, OPTIONS and COMMANDS
//
//   help_print()        the text of --help
//   command_files()     the files of a command line
//   was_given()         is an option on the command line?
//   sizes_take()        those of --init
//   run_open()          opens what training needs
//   text_add_run()      how the metadata of what it writes begin
//   check_preparation() are these molecules made as those that a model learnt from?
//   note_skipped()      records that a dataset does not have

// What the program is, its commands, with usages of such width (anonymous: the first goes without
// its name), and the options of one of them, or of all (0). Ends the program.
static void help_print(const char *title, const char *program, int width, int anonymous,
                       unsigned command) {
    printf("%s\n", title);
    for (int k = 0; k < N_COMMANDS; k++)
        printf("  %s %-8s %-*s %s\n", program, k || !anonymous ? COMMANDS[k].name : "", width,
               COMMANDS[k].usage, COMMANDS[k].help);
    printf("\nDatasets (.bin) are made by ./data_prep from SDF, SMILES or CSV files.\n");
    options_print(OPTIONS, N_OPTIONS, command);
    mb_exit(EXIT_SUCCESS);
}

// Notes the files that a command reads: `path`, those of options, and of training by default what
// stands beside it.
static void command_files(const Command *command, const char *path) {
    if (!opt.valid && command->bit & TRAIN) opt.valid = sibling(path, "valid");
    if (!opt.test && command->bit & FINETUNE) opt.test = sibling(path, "test");
    CHECK(!(command->bit & TRAIN) || strcmp(opt.output, "-") != 0, "-o: expected a file");
    const char *const files[] = {path, opt.valid, opt.test, opt.init, opt.model};
    for (size_t k = 0; k < sizeof files / sizeof files[0]; k++) files_input(files[k]);
}

// Was the option with this value given?
static int was_given(const void *value) {
    int k = 0;
    while (OPTIONS[k].value != value) k++;
    return option_given[k];
}

// The n sizes of the model of --init become those of the options, of which none may say otherwise.
static inline void sizes_take(const char *init, int n, const int *there, int64_t *const *option) {
    for (int k = 0; k < n; k++) {
        CHECK(!was_given(option[k]) || *option[k] == there[k], "%s: has %d where an option says "
              "%lld; leave out the sizes", init, there[k], (long long)*option[k]);
        *option[k] = there[k];
    }
}

// Opens what a run needs, its model apart. If it is resumed, its options are those of its state.
// The molecules of a batch are `usual` if nobody says, in parts of *part (NULL: all at once); how
// its logs begin: see run_claim(). tuning: it is no pretraining.
static void run_open(struct Run *run, const char *train_path, const char *log_begins,
                     int64_t usual, const int64_t *part, int tuning) {
    const char *asked = opt.init;
    run_begin(run, train_path, opt.output, log_begins, opt.resume);
    if (run->resumed) {
        const char *options = required_meta(&run->state, "run", "the state of a run");
        CHECK(tuning == (tensor_meta(&run->state, "task") != NULL), "%s: is the state of %s; give "
              "the command that began it", run->state_path, tuning ? "pretraining" : "fine-tuning");
        options_from_state(options, run->state_path);
    }
    run_data(run, opt.valid, opt.test, opt.init, asked);
    run_plan(run, &opt.batch, usual, part ? *part : 0);
    precision_begin(opt.precision);
    run->seed = (uint64_t)opt.seed;
}

// What the metadata of a model say of how its training set was prepared, and the datasets' flags.
static const char *const PREP_KEYS[] = {"largest_fragment", "keep_hydrogens"};
static const unsigned PREP_BITS[] = {PREP_LARGEST_FRAGMENT, PREP_HYDROGENS};

// Metadata of a checkpoint or state begin with n numbers, the options of such bits, what computes
// the products, and how the training set was prepared.
static void text_add_run(Text *t, const char *const *keys, const long long *values, int n,
                         unsigned options, const Dataset *train) {
    char *run = options_describe(OPTIONS, N_OPTIONS, options);
    text_add_meta(t, "format", "pt");
    for (int k = 0; k < n; k++) text_add_meta(t, keys[k], "%lld", values[k]);
    text_add_meta(t, "run", "%s", run);
    text_add_meta(t, "products", "%s", precision_text());
    text_add_meta(t, "stereo", "%s", train->stereo);
    for (int k = 0; k < 2; k++)
        text_add_meta(t, PREP_KEYS[k], "%d", (train->flags & PREP_BITS[k]) != 0);
    free(run);
}

// Says so if the dataset was prepared otherwise than what the model has learnt from.
static void check_preparation(const Dataset *data, const TensorFile *model) {
    static const char *const options[] = {"--largest-fragment", "--keep-hydrogens"};
    int told = tensor_meta(model, PREP_KEYS[0]) != NULL;  // else it is from elsewhere
    for (int k = 0; k < 2 && told && data->count; k++) {
        const char *then = tensor_meta(model, PREP_KEYS[k]);
        int now = (data->flags & PREP_BITS[k]) != 0;
        if (now != (then && *then == '1'))
            fprintf(stderr, "note    %s: made with%s %s, what the model learnt from %s it\n",
                    data->path, now ? "" : "out", options[k], now ? "without" : "with");
    }
    note_stereo(data, model->path, tensor_meta(model, "stereo"));
}

// Says how many records have no row in what is made of a dataset.
static inline void note_skipped(const Dataset *data) {
    Skipped record;
    size_t n = 0;
    for (const uint8_t *next = data->skips; (next = dataset_skipped(&record, data, next));) n++;
    if (n) fprintf(stderr, "note    %s: %zu records were skipped when it was made, and have no "
                   "row\n", data->path, n);
}
