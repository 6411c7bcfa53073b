// commands/embed.h - ./moleblend embed data.bin --model FILE -o out.npy; a vector a molecule (the
// graph token, or the mean or sum over the atoms) or an atom; beside it FILE.csv, the names, and
// with --level atom FILE.index.npy, which has for each row the molecule, from 0 on, of its atom

#define NAMES_BEGIN "row,rows,record,name\n"

// Writes the row of molecule b of the batch, or those of its atoms: what readout_tokens() names of
// the tokens x (T, C), summed or one by one. index: of --level atom, else NULL; place: of the
// molecule in the dataset. Returns how many rows.
static idx embed_molecule(OutFile *out, OutFile *index, const Trained *m, const float *x, idx b,
                          uint32_t place) {
    idx C = m->s.model.config.dim, token, count;
    View v = batch_view(&m->s.batch, b);
    idx rows = index ? v.N : 1;
    float weight = readout_tokens(&token, &count, &v, index ? READ_SUM : m->task.readout);
    float *row = xmalloc(C, sizeof *row);
    uint8_t number[4];
    put_u32(number, place);
    for (idx end = token + count; token < end; token += count / rows) {
        readout_row(row, x, C, token, count / rows, weight);
        out_floats(out, row, C, 0);
        if (index) out_write(index, number, 4);
    }
    free(row);
    return rows;
}

static void command_embed(const char *path) {
    static const char *const levels[] = {"molecule", "atom"};
    Trained model = {0};
    Dataset data;
    OutFile out, names, index;
    Molecule m = {0};
    Progress progress = progress_begin(0);
    int atoms = opt.level && choice("--level", opt.level, levels, 2);
    int files = strcmp(opt.output, "-") != 0;
    CHECK(files || !atoms, "--level atom: expected -o FILE.npy, beside which FILE.index.npy says "
          "whose an atom is");
    dataset_open(&data, path);
    model_open(&model, opt.model);
    check_positions(&data, model.task.use);
    check_preparation(&data, &model.file);
    Config c = model.s.model.config;
    CHECK(opt.layer <= c.layers, "--layer: expected at most %d, found %lld", c.layers,
          (long long)opt.layer);
    if (opt.layer < 0) opt.layer = c.layers;
    size_t rows = data.count, written = 0;
    for (size_t i = 0; i < data.count && atoms; i++) rows += (size_t)dataset_atoms(&data, i) - 1;
    char *names_path = path_with(opt.output, ".npy", ".csv");
    char *index_path = path_with(opt.output, ".npy", ".index.npy");
    npy_begin(&out, opt.output, "<f4", rows, (size_t)c.dim);
    if (files) out_open(&names, names_path, NAMES_BEGIN);
    if (files) fputs(NAMES_BEGIN, names.file);
    if (atoms) npy_begin(&index, index_path, "<u4", rows, 0);
    signals_catch();
    Pass pass = pass_over(&data, SIZE_MAX, NULL, model.task.use);
    while (pass_next(&pass, &model.s)) {
        encoder_forward(&model.s);
        if (mb_signal) mb_exit(128 + mb_signal);
        const float *x = model.s.enc->x + opt.layer * model.s.batch.T * c.dim;
        for (idx b = 0; b < pass.count; b++) {
            size_t i = (size_t)(pass.first + b);
            idx n = embed_molecule(&out, atoms ? &index : NULL, &model, x, b, (uint32_t)i);
            if (files) {
                dataset_read(&data, i, &m);
                fprintf(names.file, "%zu,%td,%lu,", written, n, (unsigned long)m.number);
                print_csv(names.file, m.name, (size_t)m.name_length);
                fputc('\n', names.file);
            }
            written += (size_t)n;
        }
        double done = (double)(pass.first + pass.count);
        progress_show(&progress, done, (double)data.count, done, "molecules", "embedded",
                      done == (double)data.count);
    }
    if (atoms) out_commit(&index);
    if (files) out_commit(&names);
    out_commit(&out);
    FREE_ALL(names_path, index_path);
    molecule_free(&m);
    dataset_close(&data);
    model_close(&model);
}
