// commands/show.h - ./moleblend show data.bin INDEX|NAME; what the model is given of one molecule

// Colours of what a pair shows, in a picture and on a terminal; the first: nothing or several.
static const struct { const char *fill, *terminal; } COLOURS[] = {
    {"#eeeeee", ""}, [USE_SPD] = {"#9ecae1", "\033[34m"}, [USE_EDGE] = {"#a1d99b", "\033[32m"},
    [USE_3D] = {"#fdae6b", "\033[33m"}};

enum { CELL = 32 };  // bytes of a cell's text

// What a pair shows: its SPD, path or distance, "." if it has none; of several, one by the other.
static void show_cell(char cell[CELL], const Batch *batch, size_t p, int use) {
    static const char bond_signs[] = "-=#~?";  // single, double, triple, aromatic, other
    const uint8_t *path = batch->path + p * PATH_BONDS;
    int n = 0;
    for (int one = USE_SPD; one <= USE_3D; one *= 2) {
        char text[16] = ".";
        if (!(use & one)) continue;
        if (one == USE_SPD && batch->spd[p] != SPD_UNREACHABLE)
            snprintf(text, sizeof text, "%d", batch->spd[p]);
        if (one == USE_3D) snprintf(text, sizeof text, "%.1f", (double)batch->distance[p]);
        for (int t = 0; one == USE_EDGE && t < PATH_BONDS && path[t] < PATH_NONE; t++)
            snprintf(text + t, sizeof text - (size_t)t, "%c", bond_signs[path[t] / 12]);
        n += snprintf(cell + n, CELL - (size_t)n, "%s%s", n ? "/" : "", text);
    }
}

// Where matrices are shown: the terminal, or a picture (svg) in which each has its place.
typedef struct {
    FILE *svg;
    int colour, across, down;  // of the terminal; of the next matrix of the picture
} Canvas;

enum { CELL_WIDTH = 44, CELL_HEIGHT = 20 };  // of a picture, in its units

// Of N atoms, with room for a title.
static int matrix_width(int N) { return max_int((N + 2) * CELL_WIDTH, 320); }

static void svg_cell(const Canvas *c, int i, int j, const char *fill, const char *text) {
    int x = c->across + (j + 1) * CELL_WIDTH, y = c->down + (i + 2) * CELL_HEIGHT;
    fprintf(c->svg, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"%s\"/>"
            "<text x=\"%d\" y=\"%d\"%s>%s</text>\n", x, y, CELL_WIDTH - 1, CELL_HEIGHT - 1, fill,
            x + CELL_WIDTH / 2, y + 15, strlen(text) > 6 ? " font-size=\"5\"" : "", text);
}

// One matrix of a molecule: a row an atom. use = 0: what each pair drew.
static void show_matrix(Canvas *c, const Batch *batch, const char *title, int use) {
    int N = batch->n_atoms[0], drawn = use ? use : batch->pair_use[0];
    int width = drawn & (drawn - 1) ? 15 : 5;  // several relations of every pair: --no-blend
    printf("\n%s\n      ", title);
    for (int j = 0; j < N; j++) printf(" %*d", width, j);
    printf("\n");
    for (int i = 0; i < N; i++) {
        const char *element = SYMBOLS + 3 * batch->atom_feat[i * ATOM_FEATURES];
        char label[16];
        snprintf(label, sizeof label, "%d %.2s", i, element);
        if (c->svg) svg_cell(c, i, -1, "none", label);
        printf("%3d %.2s", i, element);
        for (int j = 0; j < N; j++) {
            char cell[CELL];
            size_t p = (size_t)i * (size_t)N + (size_t)j;
            drawn = use ? use : batch->pair_use[p];
            int colour = drawn & (drawn - 1) ? 0 : drawn;  // several relations: none of them
            show_cell(cell, batch, p, drawn);
            printf(" %s%*s%s", c->colour ? COLOURS[colour].terminal : "", width, cell,
                   c->colour ? "\033[0m" : "");
            if (c->svg) svg_cell(c, i, j, COLOURS[colour].fill, cell);
        }
        printf("\n");
    }
    if (!c->svg) return;
    fprintf(c->svg, "<text x=\"%d\" y=\"%d\" class=\"title\">%.*s</text>\n", c->across + CELL_WIDTH,
            c->down + 25, (int)strcspn(title, "("), title);
    int right = c->across == 0;  // two beside each other
    c->across = right ? matrix_width(N) : 0;
    c->down += right ? 0 : (N + 3) * CELL_HEIGHT;
}

// The pairs (0, j): how the bias of each is made, and what the heads must say of it.
static void show_pairs(const Batch *batch) {
    printf("\npair    %-44sSPD  edge classes     direction\n", "bias of head h");
    for (int j = 0; j < batch->n_atoms[0]; j++) {
        const uint8_t *path = batch->path + j * PATH_BONDS;
        Text how = {0};
        int use = batch->pair_use[j], bonds = max_int(1, min_int(batch->spd[j], PATH_BONDS));
        if (use & USE_SPD) text_add(&how, "spd_table[%d]", batch->spd[j] + 1);
        for (int t = 0; use & USE_EDGE && t < PATH_BONDS && path[t] != PATH_NONE; t++)
            text_add(&how, "%spath_bias[%d][%d]", t ? " + " : how.length ? " + (" : "(", t,
                     path[t]);
        if (use & USE_EDGE && path[0] != PATH_NONE) text_add(&how, ") / %d", bonds);
        if (use & USE_3D)
            text_add(&how, "%sbias3d_out[%td]", how.length ? " + " : "", batch->pair_row[j]);
        printf("0 %-5d %-44s%3d ", j, how.length ? how.text : "0", batch->spd_target[j]);
        free(how.text);
        for (int t = 0; t < PATH_BONDS; t++) printf(" %2d", batch->edge_target[j * PATH_BONDS + t]);
        for (int k = 0; k < 3 && batch->has_pos[0]; k++)
            printf(" %5.2f", (double)(batch->pos[3 * j + k] - batch->pos[k]));
        printf("\n");
    }
}

static int argmax(const float *x, int n) {
    int best = 0;
    for (int k = 1; k < n; k++) best = x[k] > x[best] ? k : best;
    return best;
}

// A direction as a vector of length 1, between what stands in `around`.
static void print_direction(const float d[3], const char *around) {
    double x = (double)d[0], y = (double)d[1], z = (double)d[2];
    double length = fmax(sqrt(x * x + y * y + z * z), 1e-30);
    printf(" %.1s%5.2f %5.2f %5.2f%s", around, x / length, y / length, z / length,
           around[0] ? around + 1 : "");
}

// What the model of --model says of the pairs (0, j) of the molecule in its batch, beside the
// truth: the length of the path (11: or more) that it holds most likely and its probability, the
// bonds' classes, the direction, a vector of length 1.
static void show_model(Trained *model) {
    Step *s = &model->s;
    const Batch *batch = &s->batch;
    double sum[LOSSES];
    model_open(model, opt.model);
    CHECK(s->model.config.tasks == 0, "%s: a fine-tuned model has no heads that recover the "
          "relations; expected a pretrained one", opt.model);
    float *spd = xmalloc(batch->P, (SPD_CLASSES + EDGE_OUTPUTS + 3) * sizeof *spd);
    float *edge = spd + batch->P * SPD_CLASSES, *d3 = edge + batch->P * EDGE_OUTPUTS;
    s->logits[LOSS_SPD] = spd;
    s->logits[LOSS_EDGE] = edge;
    s->logits[LOSS_3D] = d3;
    encoder_forward(s);
    pretrain_heads(sum, s, 0);
    printf("\npair    path length (truth)  probability   edge classes (truth)%21sdirection, "
           "of length 1 (truth)\n", "");
    for (int j = 0; j < batch->n_atoms[0]; j++) {
        float *p = spd + j * SPD_CLASSES;
        softmax_row(p, SPD_CLASSES);
        int best = argmax(p, SPD_CLASSES);
        int length = batch->spd_target[j] + 1;  // the first class is a path of one bond
        char beside[16] = "-";
        if (length > 0) snprintf(beside, sizeof beside, "%d", length);
        printf("0 %-5d %7d %9s %15.2f   ", j, best + 1, beside, (double)p[best]);
        for (int t = 0; t < PATH_BONDS; t++) {
            int class = argmax(edge + j * EDGE_OUTPUTS + t * EDGE_CLASSES, EDGE_CLASSES);
            int truth = batch->edge_target[j * PATH_BONDS + t];
            char text[32] = "-";
            if (truth >= 0) snprintf(text, sizeof text, "%d (%d)", class, truth);
            printf(" %-7s", text);
        }
        print_direction(d3 + 3 * j, "");
        float truth[3];
        for (int k = 0; k < 3; k++) truth[k] = batch->pos[3 * j + k] - batch->pos[k];
        if (batch->has_pos[0] && dir_counts(batch->pos, 0, (size_t)j)) print_direction(truth, "()");
        printf("\n");
    }
    free(spd);
}

static void command_show(const char *path, const char *index_text) {
    Trained model = {0};
    Dataset data;
    Batch *batch = &model.s.batch;
    Molecule m = {0};
    OutFile svg = {0};
    dataset_open(&data, path);
    uint32_t id = (uint32_t)dataset_find(&data, index_text);
    model.s.draws = (Draws){(uint64_t)opt.seed, 0, id, 1};
    Blend still = opt.blend;
    still.noise = 0;
    batch_load(batch, &data, &id, 1, &still, 0, &model.s.draws);
    dataset_read(&data, id, &m);
    Canvas canvas = {.colour = isatty(1) && !getenv("NO_COLOR")};
    if (opt.svg) {
        files_output("-");  // the text
        files_output(opt.svg);
        out_open(&svg, opt.svg, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 ");
        canvas.svg = svg.file;
        fprintf(svg.file, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" "
                "font-family=\"monospace\" font-size=\"12\" text-anchor=\"middle\">\n<style>.title "
                "{text-anchor: start; font-weight: bold}</style>\n<rect width=\"100%%\" "
                "height=\"100%%\" fill=\"white\"/>\n", 2 * matrix_width(m.n_atoms),
                2 * (m.n_atoms + 3) * CELL_HEIGHT);
    }
    printf("molecule %lu of %s: %s, %d atoms, %d bonds, %s\n", (unsigned long)id, path, m.name,
           m.n_atoms, m.n_bonds, m.has_pos ? "3D" : "2D only");
    show_matrix(&canvas, batch, "shortest path (bonds; . = not connected)", USE_SPD);
    show_matrix(&canvas, batch,
                "bonds of the path, the first five (- = # single, double, triple, ~ aromatic)",
                USE_EDGE);
    if (batch->has_pos[0]) show_matrix(&canvas, batch, "distance (Angstrom)", USE_3D);
    show_matrix(&canvas, batch, "one blend: what the encoder would see of each pair", 0);
    if (opt.svg) {
        fprintf(svg.file, "</svg>\n");
        out_commit(&svg);
    }
    printf("\natoms' own structure: ");
    for (int i = 0; i < batch->n_atoms[0]; i++)
        printf("%s%s ", batch->atom_use[i] & USE_SPD ? "2D" : "",
               batch->atom_use[i] & USE_3D ? batch->atom_use[i] & USE_SPD ? "+3D" : "3D" : "");
    printf("\n");
    show_pairs(batch);
    if (opt.model) show_model(&model);
    molecule_free(&m);
    dataset_close(&data);
    model_close(&model);
}
