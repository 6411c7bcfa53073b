// commands/embed.h - ./moleblend embed data.bin --model FILE -o out.npy; a vector a molecule (the
// graph token, or the mean or sum over the atoms) or an atom, of one layer or of several side by
// side; beside it FILE.csv, the names, and with --level atom FILE.index.npy, which has for each row
// the molecule, from 0 on, of its atom

#define NAMES_BEGIN "row,rows,record,name"  // and of several layers the column where each begins

// What --layer names of a model of L layers, in its order; returns how many. The encoder keeps
// every layer's output: layer 0 is the tokens that go into the first layer. Layers end in their
// LayerNorm, and so do the tokens: there is no norm behind the last one but its own.
static idx embed_layers(idx layer[MAX_LAYERS + 1], const char *text, int L) {
    idx n = 0;
    if (strcmp(text, "all") == 0) {
        for (; n <= L; n++) layer[n] = n;
        return n;
    }
    for (const char *p = text; n == 0 || *p++ == ',';) {
        char *end;
        long number = strtol(p, &end, 10);
        CHECK(end != p && (*end == ',' || *end == 0) && number >= -1 && number <= L,
              "--layer: expected numbers from 0 to %d with commas between them (-1: the last), or "
              "all, found \"%s\"", L, text);
        if (number < 0) number = L;
        for (idx k = 0; k < n; k++)
            CHECK(layer[k] != number, "--layer: %ld stands twice in \"%s\"", number, text);
        layer[n++] = number;
        p = end;
    }
    return n;
}

// Writes the row of molecule b of the batch, or those of its atoms: what readout_tokens() names of
// the tokens (T, C) of each of n layers, summed or one by one. index: of --level atom, else NULL;
// place: of the molecule in the dataset. Counts in *bad vectors that hold what is no number.
// Returns how many rows.
static idx embed_molecule(OutFile *out, OutFile *index, const Trained *m, const idx *layer, idx n,
                          idx b, uint32_t place, size_t *bad) {
    idx T = m->s.batch.T, C = m->s.model.config.dim, token, count;
    View v = batch_view(&m->s.batch, b);
    idx rows = index ? v.N : 1;
    float weight = readout_tokens(&token, &count, &v, index ? READ_SUM : m->task.readout);
    float *row = xmalloc(C, sizeof *row);
    uint8_t number[4];
    put_u32(number, place);
    for (idx end = token + count; token < end; token += count / rows) {
        for (idx k = 0; k < n; k++) {
            readout_row(row, m->s.enc->x + layer[k] * T * C, C, token, count / rows, weight);
            *bad += !all_finite(row, C);
            out_floats(out, row, C, 0);
        }
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
    CHECK(!atoms || !opt.readout, "--level atom: atoms are not read out; leave out --readout");
    dataset_open(&data, path);
    model_open(&model, opt.model);
    check_positions(&data, model.task.use);
    check_preparation(&data, &model.file);
    Config c = model.s.model.config;
    idx layer[MAX_LAYERS + 1], n_layers = embed_layers(layer, opt.layer, c.layers);
    size_t rows = data.count, written = 0, bad = 0;
    for (size_t i = 0; i < data.count && atoms; i++) rows += (size_t)dataset_atoms(&data, i) - 1;
    char *names_path = path_with(opt.output, ".npy", ".csv");
    char *index_path = path_with(opt.output, ".npy", ".index.npy");
    npy_begin(&out, opt.output, "<f4", rows, (size_t)(n_layers * c.dim));
    if (files) {
        out_open(&names, names_path, NAMES_BEGIN);
        fputs(NAMES_BEGIN, names.file);
        for (idx k = 0; k < n_layers && n_layers > 1; k++)
            fprintf(names.file, ",layer %td", layer[k]);
        fputc('\n', names.file);
    }
    if (atoms) npy_begin(&index, index_path, "<u4", rows, 0);
    signals_catch();
    Pass pass = pass_over(&data, SIZE_MAX, NULL, model.task.use);
    while (pass_next(&pass, &model.s)) {
        encoder_forward(&model.s);
        if (mb_signal) mb_exit(128 + mb_signal);
        for (idx b = 0; b < pass.count; b++) {
            size_t i = (size_t)(pass.first + b);
            idx n = embed_molecule(&out, atoms ? &index : NULL, &model, layer, n_layers, b,
                                   (uint32_t)i, &bad);
            if (files) {
                dataset_read(&data, i, &m);
                fprintf(names.file, "%zu,%td,%lu,", written, n, (unsigned long)m.number);
                print_csv(names.file, m.name, (size_t)m.name_length);
                for (idx k = 0; k < n_layers && n_layers > 1; k++)
                    fprintf(names.file, ",%td", k * c.dim);
                fputc('\n', names.file);
            }
            written += (size_t)n;
        }
        double done = (double)(pass.first + pass.count);
        progress_show(&progress, done, (double)data.count, done, "molecules", "embedded",
                      done == (double)data.count);
    }
    if (bad) fprintf(stderr, "note    %s: %zu vectors hold what is no number: the model's are too "
                     "large\n", opt.model, bad);
    out_commit(&out);  // the largest first: if the disk is full, none is there
    if (files) out_commit(&names);
    if (atoms) out_commit(&index);
    FREE_ALL(names_path, index_path);
    molecule_free(&m);
    dataset_close(&data);
    model_close(&model);
}
