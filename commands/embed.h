// commands/embed.h - ./moleblend embed data.bin --model FILE -o out.npy; a vector a molecule (the
// graph token, or the mean or sum over the atoms) or an atom; beside it FILE.csv, the names, and with
// --level atom FILE.index.npy, which has for each row the molecule, from 0 on, that the atom is of

typedef struct {
    OutFile out, names, index;
    Progress progress;
    float *row;
    size_t rows;          // written
} Embedding;

#define NAMES_BEGIN "row,rows,record,name\n"

// row (C) = weight * the sum of tokens first..first + count - 1 of x (T, C).
static void embed_row(float *row, const float *x, idx C, idx first, idx count, float weight) {
    for (idx c = 0; c < C; c++) {
        float sum = 0;
        for (idx t = first; t < first + count; t++) sum += x[t * C + c];
        row[c] = weight * sum;
    }
}

// The row of a molecule, or those of its atoms: what readout_tokens() names, summed or one by one.
static void visit_embed(Run *run, size_t first, size_t B, void *result) {
    Embedding *e = result;
    idx C = run->s.model.config.dim;
    const float *x = run->s.enc->x + opt.layer * run->s.batch.T * C;
    Molecule m = {0};
    if (mb_signal) mb_exit(128 + mb_signal);
    for (size_t b = 0; b < B; b++) {
        View v = batch_view(&run->s.batch, b);
        idx token, count, rows = e->index.file ? v.N : 1;
        uint8_t number[4];
        put_u32(number, (uint32_t)(first + b));
        float weight = readout_tokens(&token, &count, &v,
                                      e->index.file ? READ_SUM : run->task.readout);
        for (idx end = token + count; token < end; token += count / rows) {
            embed_row(e->row, x, C, token, count / rows, weight);
            out_floats(&e->out, e->row, C, 0);
            if (e->index.file) out_write(&e->index, number, 4);
        }
        if (e->names.file) {
            dataset_read(&run->test, first + b, &m);
            fprintf(e->names.file, "%zu,%td,%lu,", e->rows, rows, (unsigned long)m.number);
            print_csv(e->names.file, m.name, (size_t)m.name_length);
            fputc('\n', e->names.file);
        }
        e->rows += rows;
    }
    molecule_free(&m);
    progress_show(&e->progress, (double)(first + B), (double)run->test.count, (double)(first + B),
                  "molecules", "embedded", first + B == run->test.count);
}

static void command_embed(const char *path) {
    static const char *const levels[] = {"molecule", "atom"};
    Run run = {0};
    Embedding e = {.progress = progress_begin(0)};
    int atoms = opt.level && choice("--level", opt.level, levels, 2);
    int files = strcmp(opt.output, "-") != 0;
    CHECK(files || !atoms, "--level atom: expected -o FILE.npy, beside which FILE.index.npy says whose "
          "an atom is");
    dataset_open(&run.test, path);
    run_open_model(&run, opt.model);
    check_positions(&run.test, run.task.use);
    check_preparation(&run.test, &run.file);
    Config c = run.s.model.config;
    CHECK(opt.layer <= c.layers, "--layer: expected at most %d, found %lld", c.layers,
          (long long)opt.layer);
    if (opt.layer < 0) opt.layer = c.layers;
    size_t rows = run.test.count;
    for (size_t i = 0; i < run.test.count && atoms; i++)
        rows += (size_t)dataset_atoms(&run.test, i) - 1;
    char *names = path_with(opt.output, ".npy", ".csv");
    char *index = path_with(opt.output, ".npy", ".index.npy");
    npy_begin(&e.out, opt.output, "<f4", rows, (size_t)c.dim);
    if (files) out_open(&e.names, names, NAMES_BEGIN);
    if (files) fputs(NAMES_BEGIN, e.names.file);
    if (atoms) npy_begin(&e.index, index, "<u4", rows, 0);
    e.row = xmalloc((size_t)c.dim, sizeof *e.row);
    signals_catch();
    visit_batches(&run, &run.test, SIZE_MAX, NULL, run.task.use, 1, visit_embed, &e);
    if (atoms) out_commit(&e.index);
    if (files) out_commit(&e.names);
    out_commit(&e.out);
    FREE_ALL(names, index, e.row);
    run_close(&run);
}
