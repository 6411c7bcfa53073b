// prep/options.h - the command line of data_prep
//
//   prep_opt, PREP_OPTION_TABLE   its values and their table
//   check_options()               what makes no sense together
//   claim_files()                 inputs noted, outputs tried, before anything is read
//   conversion_begin()            what to do with every record, and how many parts there are
//   input_open()                  an input, and what separates its fields
//   note_unused(), check_result() what was given in vain; too much refused, nothing to learn

static PrepOptions prep_opt = {.split_by = "scaffold", .labels_by = "title", .max_reject = 100,
                               .orient = "keep", .stereo = "invariant", .seed = 1,
                               .max_atoms = 512};

#define HEADING(text) {NULL, OPT_FLAG, NULL, 0, 0, NULL, text, 0}
#define TEXT(name, field, argument, help) {name, OPT_TEXT, &prep_opt.field, 0, 0, argument, help, 0}
#define FLAG(name, field, help) {name, OPT_FLAG, &prep_opt.field, 0, 0, NULL, help, 0}

static const Option PREP_OPTION_TABLE[] = {
    HEADING("Input and output"),
    TEXT("-o", output, "FILE", "the dataset to write; {} becomes the part's name"),
    TEXT("--format", format, "FORMAT", "sdf, smi, csv or tsv, if the file name does not say it"),
    FLAG("--strict", strict, "stop at the first record that cannot be used"),
    TEXT("--skip-list", skip_list, "FILE",
         "leave out records whose name begins a line, or their number"),
    TEXT("--rejects", rejects, "FILE", "a CSV of the records and labels that are refused, and why"),
    {"--max-reject", OPT_NUMBER, &prep_opt.max_reject, 0, 100, "P",
     "fail if more than P percent are refused", 0},
    HEADING("What a record holds"),
    TEXT("--smiles", smiles, "COLUMN", "CSV column of the SMILES (default smiles)"),
    TEXT("--labels", labels, "A,B,C", "CSV columns or SD tags to learn; all: whatever can be"),
    TEXT("--labels-from", labels_from, "FILE", "labels of SD records: a CSV, titles first"),
    TEXT("--labels-by", labels_by, "HOW", "its rows belong by title, or by number: in order"),
    TEXT("--name", name, "COLUMN", "CSV column or SD tag of the name (default SD title, SMILES)"),
    HEADING("What becomes of a molecule"),
    {"--max-atoms", OPT_INT, &prep_opt.max_atoms, 1, MAX_ATOMS, "N", "skip larger molecules", 0},
    FLAG("--largest-fragment", largest_fragment, "keep only the part of most atoms: no salts"),
    FLAG("--keep-hydrogens", keep_hydrogens, "keep explicit hydrogen atoms as atoms"),
    TEXT("--orient", orient, "HOW", "keep the frame of the file, or principal: turn to its axes"),
    TEXT("--stereo", stereo, "HOW", "of chiral tags: invariant, rdkit (the release's), none"),
    HEADING("Splitting"),
    TEXT("--split", split, "0.8,0.1,0.1", "write train, valid, test parts (two numbers: no test); "
         "or counts, 1000,100,rest"),
    TEXT("--split-by", split_by, "HOW", "scaffold, random or order; column:NAME: a CSV column or "
         "SD tag says train, valid or test; file:PATH: lines of a name or number and the part"),
    {"--seed", OPT_INT, &prep_opt.seed, 0, 9e15, "N", "of the random split", 0},
    HEADING("Looking into a dataset"),
    TEXT("--dump", dump, "FILE.bin", "print its molecules as JSON, one a line"),
    TEXT("--range", range, "A:B", "only molecules A to B-1, counted from 0"),
    FLAG("--help", help, "this text"),
    FLAG("--version", version, "which program this is"),
};

enum { N_PREP_OPTIONS = sizeof PREP_OPTION_TABLE / sizeof PREP_OPTION_TABLE[0] };

// Prints what the program is for, examples and options.
static void print_help(void) {
    printf(
        "data_prep - molecule files in, one dataset file for moleblend out\n\n"
        "  ./data_prep -o train.bin molecules.sdf\n"
        "  ./data_prep -o tox.{}.bin --split 0.8,0.1,0.1 --labels all tox21.csv\n"
        "  gzip -dc big.sdf.gz | ./data_prep -o big.bin --format sdf -\n"
        "  ./data_prep --dump train.bin --range 0:2\n\n"
        "Reads .sdf and .mol (V2000, V3000), .smi, and .csv or .tsv with a SMILES column.\n"
        "Computes the atom and bond features that OGB takes from RDKit 2022.09; keeps the 3D\n"
        "positions of SD files. Records that cannot be used are skipped, counted, and named at\n"
        "the end.\n");
    options_print(PREP_OPTION_TABLE, N_PREP_OPTIONS, 0);
}

// Dies if the options make no sense together.
static void check_options(int n_inputs) {
    static const char *const frames[] = {"keep", "principal"}, *const keys[] = {"title", "number"};
    PrepOptions *o = &prep_opt;
    CHECK(n_inputs > 0, "no input; see --help");
    CHECK(o->output, "-o: expected the dataset to write; see --help");
    o->principal = choice("--orient", o->orient, frames, 2);
    CHECK(tag_kind(o) < N_TAG_KINDS,
          "--stereo: expected invariant, rdkit or none, found \"%s\"", o->stereo);
    int given = strncmp(o->split_by, "column:", 7) == 0 || strncmp(o->split_by, "file:", 5) == 0;
    CHECK(given || strcmp(o->split_by, "scaffold") == 0 || strcmp(o->split_by, "random") == 0 ||
          strcmp(o->split_by, "order") == 0, "--split-by: expected scaffold, random, order, "
          "column:NAME or file:PATH, found \"%s\"", o->split_by);
    CHECK(!given || !o->split, "--split: the parts are given by --split-by; leave it out");
    o->by_number = choice("--labels-by", o->labels_by, keys, 2);
    CHECK(!o->labels_from || o->labels, "--labels-from: expected --labels too, columns or all");
    CHECK((!o->split && !given) || strcmp(o->output, "-") != 0,
          "-o: standard output has room for one dataset; leave out --split");
    CHECK(o->split || given || !strstr(o->output, "{}"),
          "-o: {} stands for a part's name; give --split too");
}

// Notes all inputs, then finds out whether the outputs can be written, before anything is.
static void claim_files(const char *const *inputs, int n_inputs, int n_parts) {
    const PrepOptions *o = &prep_opt;
    for (int k = 0; k < n_inputs; k++) files_input(inputs[k]);
    files_input(o->labels_from);
    files_input(o->skip_list);
    if (strncmp(o->split_by, "file:", 5) == 0) files_input(o->split_by + 5);
    for (int p = 0; p < n_parts; p++) {
        char *path = n_parts > 1 ? part_path(o->output, PART_NAMES[p]) : xprintf("%s", o->output);
        out_probe(path, DATASET_BEGINS);
        free(path);
    }
    if (o->rejects) files_output(o->rejects);
}

// Opens an input; of a table, finds what separates its fields.
static void input_open(Source *s, const char *path, FILE **copy) {
    source_open(s, path, prep_opt.format, copy);
    if (is_table(s)) begin_table(s, prep_opt.smiles ? prep_opt.smiles : "smiles");
}

// What to do with every record, and how many parts there are; reads the tables that are given.
static void conversion_begin(Conversion *c, Output *out) {
    out->n_parts = prep_opt.split ? 0 : 1;
    if (prep_opt.split) out->n_parts = parse_fractions(prep_opt.split, out->fraction);
    if (strncmp(prep_opt.split_by, "column:", 7) == 0) c->part_column = prep_opt.split_by + 7;
    if (strncmp(prep_opt.split_by, "file:", 5) == 0)
        table_open(&c->parts, prep_opt.split_by + 5, 1);
    if (c->part_column || c->parts.n_rows) out->n_parts = PARTS_MAX;
    if (prep_opt.labels_from) table_open(&c->labels, prep_opt.labels_from, 0);
    if (prep_opt.skip_list) table_open(&c->skips, prep_opt.skip_list, 1);
    c->want_keys = out->n_parts > 1 && (c->part_column || c->parts.n_rows ||
                                        strcmp(prep_opt.split_by, "scaffold") == 0);
}

// Notes what was given and has no effect.
static void note_unused(const Conversion *c, int n_parts, const char *given) {
    table_notes(&c->labels);
    table_notes(&c->skips);
    table_notes(&c->parts);
    int seeded = n_parts > 1 && strcmp(prep_opt.split_by, "random") == 0;
    for (int k = 0; k < N_PREP_OPTIONS && !seeded; k++)
        if (given[k] && PREP_OPTION_TABLE[k].value == &prep_opt.seed)
            fprintf(stderr, "note    --seed has no effect without --split-by random\n");
}

// Dies if too many records are refused, or a task has nothing to learn; `input` is the first file.
static void check_result(const Conversion *c, const Summary *sum, const char *input) {
    double refused = 100.0 * (double)(sum->n_read - sum->n_kept) / fmax((double)sum->n_read, 1);
    CHECK(refused <= prep_opt.max_reject, "--max-reject: %.2f %% of the records are refused, more "
          "than %g %%; nothing is written", refused, prep_opt.max_reject);
    int rows_only = sum->n_read > 0 && strcmp(prep_opt.output, "-") == 0;  // for predict's reasons
    CHECK(sum->n_kept > 0 || rows_only, "%s: no molecule could be read", input);
    for (int t = 0; t < c->n_tasks && sum->n_kept; t++) {
        const Tally *tally = &sum->tally[t];
        CHECK(tally->present, "--labels: no record has a value for \"%s\"", c->task_names[t]);
        CHECK(wants_all(&prep_opt) || tally->bad <= tally->present, "--labels: most values of "
              "\"%s\" are unusable: %s", c->task_names[t], tally_examples(tally, 1));
    }
}
