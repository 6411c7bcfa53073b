// test_moleculesde.c - the tests of moleculesde.c; part of `make test`.
//
//   build/test_moleculesde                      all tests; the last line is "N passed, N failed"
//   build/test_moleculesde --golden FILE...     compares with golden files (numbers of the official
//                                               modules) and prints the largest errors
//
// Stages are compared by their largest difference over their largest value, gradients by the
// Euclidean norm. NaN fails.

#define MB_PROGRAM "test_moleculesde"
#define MOLECULESDE_TEST
#include "moleculesde.c"

static int tests_passed, tests_failed;

// Counts a test; says which one failed.
MB_PRINTF(2, 3) static void test_check(int ok, const char *fmt, ...) {
    va_list args;
    tests_passed += ok;
    tests_failed += !ok;
    if (ok) return;
    printf("FAILED: ");
    va_start(args, fmt);
    vprintf(fmt, args);
    va_end(args);
    printf("\n");
}

// Largest |a - b| / largest |b|; infinite if b is 0 and a is not.
static double largest_error(const float *a, const float *b, size_t n) {
    double gap = 0, most = 0;
    for (size_t k = 0; k < n; k++) {
        double d = fabs((double)a[k] - (double)b[k]);
        if (!(d <= gap)) gap = d;  // NaN too
        most = fmax(most, fabs((double)b[k]));
    }
    return gap <= 0 ? 0 : gap / most;
}

static double euclidean_error(const double *a, const double *b, size_t n) {
    double gap = 0, norm = 0;
    for (size_t k = 0; k < n; k++) {
        gap += (a[k] - b[k]) * (a[k] - b[k]);
        norm += b[k] * b[k];
    }
    return gap <= 0 ? 0 : sqrt(gap / norm);
}

// =================================================================================================
// Golden files: numbers of the official modules, see data/README.md
// =================================================================================================

// Largest errors of a family of tensors.
typedef struct { char name[48]; double error, tolerance; int count; } Family;
typedef struct { Family family[128]; int count; } Report;

static void report_add(Report *r, const char *name, double error, double tolerance) {
    int k = 0;
    while (k < r->count && strcmp(r->family[k].name, name)) k++;
    CHECK(k < 128, "too many families");
    Family *f = &r->family[k];
    if (k == r->count) {
        r->count++;
        snprintf(f->name, sizeof f->name, "%s", name);
        f->tolerance = tolerance;
    }
    f->count++;
    if (!(error <= f->error)) f->error = error;
}

static void report_finish(const Report *r, const char *path, int print) {
    if (print) printf("%s\n", path);
    for (int k = 0; k < r->count; k++) {
        const Family *f = &r->family[k];
        int ok = f->error <= f->tolerance;
        if (print)
            printf("  %-28s %4d tensors   error %.1e   %3.0f %% of tolerance %.1e%s\n", f->name,
                   f->count, f->error, 100 * f->error / f->tolerance, f->tolerance,
                   ok ? "" : "   FAILED");
        test_check(ok, "%s: %s: error %.2e, tolerance %.1e", path, f->name, f->error, f->tolerance);
    }
}

static double meta_number(const TensorFile *f, const char *key, int k) {  // k: of a list "a,b,c"
    const char *text = required_meta(f, key, "a golden file");
    for (; k > 0; k--) text = strchr(text, ',') + 1;
    return strtod(text, NULL);
}

// Element k of a tensor of any of the types that golden files are made of.
static double tensor_number(const TensorEntry *t, size_t k) {
    if (t->dtype[0] == 'U') return t->data[k];
    if (t->dtype[0] == 'I') return (double)(int32_t)get_u32(t->data + 4 * k);
    return (double)tensor_value(t, k);
}

static const TensorEntry *golden(const TensorFile *f, const char *fmt, const char *one, int k) {
    char name[160];
    snprintf(name, sizeof name, fmt, one, k);
    return tensor_find(f, name);
}

// The hash from which element e of tensor `name` is made in files that hold no parameters.
static uint64_t formula_hash(const char *name, size_t e) {
    uint64_t x = 0xcbf29ce484222325u;  // FNV-1a, then splitmix64
    for (; *name; name++) x = (x ^ (unsigned char)*name) * 0x100000001b3u;
    x += e + 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

// Parameters by formula (data/README.md).
static void formula_params(const Model *model) {
    for (int i = 0; i < model->n_tensors; i++) {
        const TensorInfo *t = &model->info[i];
        const char *name = t->pattern;
        int norm = strstr(name, "norm") || strstr(name, "mlp.1.weight") ||
                   strstr(name, "edge_2D_emb.1.");
        norm = norm || (strstr(name, "mlp.1.") && strstr(name, "gnns"));
        int bias = strstr(name, ".bias") != NULL;
        int table = strstr(name, "embedding_list") || strstr(name, "model_3D.embedding");
        size_t fan = strstr(name, "func_v.weight") || strstr(name, "node_score_network.layers")
                         ? t->rows : t->columns;
        for (size_t e = 0; e < t->count && !strstr(name, "running_"); e++) {
            double v = (double)(formula_hash(name, e) >> 40) / 8388608.0 - 1.0, x;
            if (strstr(name, "gaussian_fourier")) x = v;
            else if (strstr(name, ".eps")) x = 0.2 * v;
            else if (norm) x = bias ? 0.1 * v : 1 + 0.2 * v;
            else if (table) x = 0.5 * v;
            else if (bias) x = 0.1 * v;
            else x = v * sqrt(3 / (double)fan);
            model->params[t->offset + e] = (float)x;
        }
    }
}

// The molecules and draws of a golden file.
static void golden_batch(Sde *s, const TensorFile *f, int n_labels, const char *labels) {
    Mols *m = &s->mols;
    size_t B = (size_t)meta_number(f, "n_mols", 0);
    const TensorEntry *label = labels ? golden(f, "ft/%s/labels", labels, 0) : NULL;
    mols_reserve(m, B);
    for (size_t b = 0; b < B; b++) {
        const TensorEntry *feat = golden(f, "mol%s/%d/atom_feat", "", (int)b);
        const TensorEntry *bonds = golden(f, "mol%s/%d/bonds", "", (int)b);
        const TensorEntry *bond_feat = golden(f, "mol%s/%d/bond_feat", "", (int)b);
        const TensorEntry *pos = golden(f, "mol%s/%d/pos", "", (int)b);
        Molecule *x = &m->molecule[b];
        molecule_resize(x, (int)feat->shape[0], (int)bonds->shape[0], n_labels, 0);
        x->has_pos = 1;
        for (size_t k = 0; k < feat->count; k++) x->atom_feat[k] = (uint8_t)tensor_number(feat, k);
        for (size_t k = 0; k < bonds->count; k++) x->bonds[k] = (uint16_t)tensor_number(bonds, k);
        for (size_t k = 0; k < bonds->shape[0]; k++)
            x->bond_code[k] = (uint8_t)(12 * tensor_number(bond_feat, 3 * k) +
                                        2 * tensor_number(bond_feat, 3 * k + 1) +
                                        tensor_number(bond_feat, 3 * k + 2));
        for (size_t k = 0; k < pos->count; k++) x->pos[k] = (float)tensor_number(pos, k);
        for (int y = 0; y < n_labels; y++)
            x->labels[y] = (float)tensor_number(label, b * (size_t)n_labels + (size_t)y);
    }
    mols_build(m, B, n_labels);
    for (size_t k = 0; k < 2; k++) {
        const TensorEntry *perm = golden(f, "draw/%s%d", "perm", (int)k + 1);
        const TensorEntry *time = golden(f, "draw/k%s", k ? "32" : "23", 0);
        for (size_t i = 0; i < m->A; i++) m->perm[k * m->A + i] = (uint32_t)tensor_number(perm, i);
        for (size_t b = 0; b < B; b++) m->time[k * B + b] = (int)tensor_number(time, b);
    }
    for (size_t b = 0; b < B; b++) {
        Place v = place_of(m, b);
        const TensorEntry *noise = golden(f, "mol%s/%d/noise", "", (int)b);
        const TensorEntry *adj = golden(f, "mol%s/%d/z_adj", "", (int)b);
        const TensorEntry *x = golden(f, "mol%s/%d/z_x", "", (int)b);
        for (size_t k = 0; k < noise->count; k++)
            m->noise[3 * v.atom + k] = (float)tensor_number(noise, k);
        for (size_t k = 0; k < x->count; k++) m->noise_x[V * v.atom + k] = (float)tensor_number(x, k);
        for (int j = 0; j < v.N; j++)
            for (int i = 0; i <= j; i++)
                m->noise_adj[pair_row(&v, i, j)] = (float)tensor_number(adj, (size_t)(i * v.N + j));
    }
}

static int meta_is(const TensorFile *f, const char *key, const char *value) {
    const char *text = tensor_meta(f, key);
    return text && strcmp(text, value) == 0;
}

// A model and batch as the file says. task: NULL, "cls" or "reg".
static void golden_open(Sde *s, const TensorFile *f, int gate, const char *task) {
    *s = (Sde){.training = 1};
    Shape c = {.dim = (int)meta_number(f, "emb_dim", 0), .layers = (int)meta_number(f, "gin_layers", 0),
               .filters = (int)meta_number(f, "schnet_filters", 0),
               .gaussians = (int)meta_number(f, "schnet_gaussians", 0),
               .blocks = (int)meta_number(f, "schnet_interactions", 0),
               .hidden = (int)meta_number(f, "hidden_2dto3d", 0),
               .width = (int)meta_number(f, "adim", 0), .channels = (int)meta_number(f, "c_hid", 0),
               .last_channels = (int)meta_number(f, "c_final", 0), .gate = gate};
    if (task) {
        c.tasks = (int)golden(f, "ft/%s/labels", task, 0)->shape[1];
        c.use_3d = strcmp(task, "reg") == 0;
    }
    s->method = (Method){
        .vp = meta_is(f, "sde", "VP"),
        .ve3d = {meta_number(f, "ve_2dto3d", 0), meta_number(f, "ve_2dto3d", 1)},
        .ve2d = {meta_number(f, "ve_3dto2d", 0), meta_number(f, "ve_3dto2d", 1)},
        .beta = {meta_number(f, "vp_2dto3d", 0), meta_number(f, "vp_2dto3d", 1)},
        .anneal = meta_number(f, "anneal_power", 0), .contrast = 1, .to3d = 1, .to2d = 1};
    sde_create(s, c, 1);
    formula_params(&s->model);  // also of the variant's and the head's, which no file holds
    for (int i = 0; i < s->model.n_tensors; i++)  // running statistics start afresh
        if (strstr(s->model.info[i].pattern, "running_"))
            for (size_t k = 0; k < s->model.info[i].count; k++)
                s->model.params[s->model.info[i].offset + k] =
                    strstr(s->model.info[i].pattern, "running_var") ? 1.0f : 0.0f;
    for (int i = 0; i < s->model.n_tensors && !tensor_meta(f, "params"); i++)
        tensor_load(s->model.params, &s->model.info[i], f, "param/");
    golden_batch(s, f, c.tasks, task);
}

// Compares `rows` rows of ours, n numbers each at row stride ld, with a tensor; row[r]: which of
// its rows is our r-th one (NULL: the r-th).
static void golden_rows(Report *r, const TensorFile *f, const char *name, const float *ours,
                        size_t rows, size_t n, size_t ld, const size_t *row) {
    const TensorEntry *t = tensor_find(f, name);
    if (!t) return;
    CHECK(t->count == rows * n, "%s: tensor %s: expected %zu numbers", f->path, name, rows * n);
    float *a = xmalloc(t->count, sizeof *a), *b = xmalloc(t->count, sizeof *b);
    for (size_t k = 0; k < t->count; k++) {
        a[k] = ours[k / n * ld + k % n];
        b[k] = (float)tensor_number(t, row ? row[k / n] * n + k % n : k);
    }
    report_add(r, name, largest_error(a, b, t->count), 5e-5);
    free(a);
    free(b);
}

// Tensors of single molecules, as one family each.
static void golden_molecule(Report *r, const TensorFile *f, int b, const char *name,
                            const float *ours, size_t rows, size_t n, size_t ld) {
    char full[64];
    Report one = {0};
    snprintf(full, sizeof full, "out/%d/%s", b, name);
    golden_rows(&one, f, full, ours, rows, n, ld, NULL);
    if (one.count) report_add(r, name, one.family[0].error, 5e-5);
}

// A channel of a matrix over pairs, in full.
static void golden_pairs(Report *r, const TensorFile *f, const Place *v, const char *name,
                         const float *ours, size_t channels, size_t ld) {
    size_t N = (size_t)v->N;
    float *full = xmalloc(channels * N * N, sizeof *full);
    for (size_t k = 0; k < channels * N * N; k++)
        full[k] = ours[pair_row(v, (int)(k / N % N), (int)(k % N)) * ld + k / N / N];
    golden_molecule(r, f, (int)v->b, name, full, channels * N, N, N);
    free(full);
}

// Every stage of the forward pass.
static void golden_stages(Report *r, const TensorFile *f, Sde *s) {
    const Shape *c = &s->shape;
    const Mols *m = &s->mols;
    Buffers *a = &s->a;
    size_t A = m->A, E = m->E, D = (size_t)c->dim, H = (size_t)c->hidden, W = (size_t)c->width;
    size_t *row = xmalloc(E, sizeof *row), *atom = xmalloc(A, sizeof *atom);
    const TensorEntry *edges = tensor_find(f, "out/ext_edges");
    size_t same = edges->shape[0] == E;
    for (size_t e = 0; e < E && same; e++) {
        row[e] = m->edge_back[e];  // sorted by sender there
        same &= (size_t)tensor_number(edges, 2 * row[e]) == m->edge_from[e] &&
                (size_t)tensor_number(edges, 2 * row[e] + 1) == m->edge_to[e];
    }
    test_check((int)same, "%s: another extended graph", f->path);
    char name[64];
    for (int l = 0; l <= c->layers; l++) {
        snprintf(name, sizeof name, "out/gin/h%d", l);
        golden_rows(r, f, name, a->gin_h + (size_t)l * A * D, A, D, D, NULL);
    }
    for (int k = 0; k <= c->blocks; k++) {
        snprintf(name, sizeof name, "out/schnet/h%d", k);
        golden_rows(r, f, name, a->schnet_h + (size_t)k * A * D, A, D, D, NULL);
    }
    golden_rows(r, f, "out/schnet/y", a->y, A, D, D, NULL);
    golden_rows(r, f, "out/cl/pos", a->dot, A, 1, 1, NULL);
    golden_rows(r, f, "out/cl/neg1", a->dot + A, A, 1, 1, NULL);
    golden_rows(r, f, "out/cl/neg2", a->dot + 2 * A, A, 1, 1, NULL);
    float *f_in = xmalloc(E * (2 * H + 2), sizeof *f_in);
    float *at = xmalloc(4 * A, sizeof *at);
    for (size_t e = 0; e < E; e++) {
        memcpy(f_in + e * (2 * H + 2), a->angle + 2 * e, 2 * sizeof(float));
        memcpy(f_in + e * (2 * H + 2) + 2, a->phi + e * 2 * H, 2 * H * sizeof(float));
    }
    for (size_t i = 0; i < A; i++) {
        at[i] = m->t[m->molecule_of[i]];
        at[A + i] = m->sigma[m->molecule_of[i]];
    }
    golden_rows(r, f, "out/d23/t", at, A, 1, 1, NULL);
    golden_rows(r, f, "out/d23/sigma", at + A, A, 1, 1, NULL);
    golden_rows(r, f, "out/d32/t", m->t + m->B, m->B, 1, 1, NULL);
    golden_rows(r, f, "out/d32/sigma", m->sigma + m->B, m->B, 1, 1, NULL);
    golden_rows(r, f, "out/d23/q", m->q, A, 3, 3, NULL);
    golden_rows(r, f, "out/d23/frame", a->axes, E, 9, 9, row);
    golden_rows(r, f, "out/d23/f_in", f_in, E, 2 * H + 2, 2 * H + 2, row);
    golden_rows(r, f, "out/d23/f", a->frame, E, H, H, row);
    golden_rows(r, f, "out/d23/g2", a->graph, E, H, H, row);
    golden_rows(r, f, "out/d23/gate", a->gate, E, H, H, row);
    golden_rows(r, f, "out/d23/e", a->edge, E, H, H, row);
    for (int l = 0; l <= HOPS_OF_ATTENTION; l++) {
        snprintf(name, sizeof name, "out/d23/u%d", l);
        golden_rows(r, f, name, a->node + (size_t)l * A * H, A, H, H, NULL);
    }
    golden_rows(r, f, "out/d23/coef1", a->coefficient, E, 3, 3, row);
    golden_rows(r, f, "out/d23/coef2", a->coefficient + 3 * E, E, 3, 3, row);
    golden_rows(r, f, "out/d23/eps_hat", a->eps_hat, A, 3, 3, NULL);
    size_t Ct = (size_t)to2d_all_channels(c), Cn = (size_t)to2d_all_nodes(c);
    for (size_t b = 0; b < m->B; b++) {
        Place v = place_of(m, b);
        size_t N = (size_t)v.N;
        golden_pairs(r, f, &v, "At", m->adj, 1, 1);
        golden_pairs(r, f, &v, "mA", a->m_adj, 1, 1);
        golden_molecule(r, f, (int)b, "mX", a->m_x + v.atom * V, N, V, V);
        golden_molecule(r, f, (int)b, "H0", a->nodes + v.atom * Cn, N, D, Cn);
        for (int l = 0; l < EDGE_LAYERS; l++) {
            EdgeActs e = edge_acts(s, l);
            snprintf(name, sizeof name, "G%d", l + 1);
            golden_molecule(r, f, (int)b, name, a->nodes + v.atom * Cn + D + (size_t)l * W, N, W, Cn);
            snprintf(name, sizeof name, "T%d", l + 1);
            golden_pairs(r, f, &v, name, e.rows, (size_t)e.C, 2 * (size_t)e.C);
            snprintf(name, sizeof name, "S%d", l + 1);
            golden_pairs(r, f, &v, name, a->adjacency + e.to, (size_t)e.out, Ct);
            snprintf(name, sizeof name, "H%d", l + 1);
            if (l + 1 < EDGE_LAYERS)
                golden_molecule(r, f, (int)b, name, a->edge_h + ((size_t)l * A + v.atom) * W, N, W, W);
        }
    }
    free(row);
    free(atom);
    free(f_in);
    free(at);
}

// Which place has a name among the names of a comma-separated list, -1: none.
static int list_place(const char *list, const char *name) {
    size_t n = strlen(name);
    for (int k = 0; list; k++, list = strchr(list, ',') ? strchr(list, ',') + 1 : NULL)
        if (strncmp(list, name, n) == 0 && (list[n] == ',' || list[n] == 0)) return k;
    return -1;
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int compare_names(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

// Gradients, as whole tensors (grad/NAME), five sums (gradsum/NAME) or, if table is given, rows of
// that. Those that are zero in exact arithmetic are compared with the norm of all.
static void golden_gradients(Report *r, const TensorFile *f, const Sde *s, const char *table,
                             const char *family, int print) {
    const Model *model = &s->model;
    const char *order = tensor_meta(f, "param_order");
    const TensorEntry *packed = table ? tensor_find(f, table) : NULL;
    const TensorEntry *mask = tensor_find(f, "zero_mask");
    double all = 0, worst = 0, errors[1024], noise_median, noise_worst;
    const char *noise = required_meta(f, "grad_noise", "a golden file");
    char label[64];
    int n = 0;
    sscanf(noise, "median %lf, worst %lf", &noise_median, &noise_worst);
    for (size_t k = 0; k < s->group_end[GROUP_3D]; k++)
        all += (double)model->grads[k] * (double)model->grads[k];
    const char *names[1024];
    int n_names = 0;
    for (int i = 0; i < model->n_tensors; i++)
        if (model->info[i].offset < s->group_end[GROUP_3D]) names[n_names++] = model->info[i].pattern;
    qsort(names, (size_t)n_names, sizeof *names, compare_names);
    for (int i = 0; i < model->n_tensors; i++) {
        const TensorInfo *t = &model->info[i];
        const float *ours = model->grads + t->offset;
        if (t->offset >= s->group_end[GROUP_3D]) continue;
        const TensorEntry *full = packed ? NULL : golden(f, "grad/%s", t->pattern, 0);
        const TensorEntry *sums = packed ? packed : golden(f, "gradsum/%s", t->pattern, 0);
        size_t row = 0, count = full ? t->count : 5;
        int place = list_place(order, t->pattern);
        if (packed) {
            if (packed->shape[0] == (size_t)n_names) {
                while (strcmp(names[row], t->pattern)) row++;
            } else {
                row = (size_t)place;
            }
        }
        CHECK(full || sums, "%s: no gradient of %s", f->path, t->pattern);
        double part[5] = {0}, square = 0, gap = 0;
        for (size_t e = 0; e < t->count && !full; e++) {
            uint64_t h = formula_hash(t->pattern, e);
            part[0] += (double)ours[e] * (double)ours[e];
            for (int k = 0; k < 4; k++) part[k + 1] += (double)ours[e] * (h >> k & 1 ? -1 : 1);
        }
        part[0] = sqrt(part[0]);
        for (size_t k = 0; k < count; k++) {
            double expected = tensor_number(full ? full : sums, row * 5 + k);
            double found = full ? (double)ours[k] : part[k];
            square += expected * expected;
            gap += (found - expected) * (found - expected);
        }
        if ((place >= 0 && mask && tensor_number(mask, (size_t)place) > 0) ||
            sqrt(square) < 1e-7 * sqrt(all)) {
            report_add(r, "gradients that are zero", sqrt(gap / all), 1e-6);
            continue;
        }
        if (t->count == 1) {  // a sum of many terms that cancel
            report_add(r, "gradients of eps", sqrt(gap / all), 1e-6);
            continue;
        }
        double error = sqrt(gap / square);
        errors[n++] = error;
        if (error > worst) worst = error;
        if (print && !(error <= 2 * noise_worst))
            printf("  gradient of %s: error %.2e\n", t->pattern, error);
    }
    qsort(errors, (size_t)n, sizeof *errors, compare_doubles);
    snprintf(label, sizeof label, "%s, median", family);
    report_add(r, label, errors[n / 2], 2 * noise_median);
    snprintf(label, sizeof label, "%s, worst", family);
    report_add(r, label, worst, 2 * noise_worst);
    if (print) printf("  %s: %d tensors compared\n", family, n);
}

static void golden_losses(Report *r, const TensorFile *f, const char *name, size_t row,
                          const double loss[TERMS], const char *family, double tolerance) {
    const TensorEntry *t = tensor_find(f, name);
    if (!t) return;
    for (size_t k = 0; k < TERMS; k++) {
        double expected = tensor_number(t, row * TERMS + k);
        if (k == TERM_ACCURACY)  // a product that is almost 0 may be counted on either side
            report_add(r, "accuracy", fabs(loss[k] - expected), 2.0 / meta_number(f, "n_atoms", 0));
        else
            report_add(r, family, fabs(loss[k] / expected - 1), tolerance);
    }
}

// Running statistics after one forward pass, and X with them.
static void golden_running(Report *r, const TensorFile *f, Sde *s) {
    for (int i = 0; i < s->model.n_tensors; i++) {
        const TensorInfo *t = &s->model.info[i];
        const TensorEntry *e = golden(f, "bn/%s", t->pattern, 0);
        if (!e) continue;
        float *expected = xmalloc(t->count, sizeof *expected);
        for (size_t k = 0; k < t->count; k++) expected[k] = (float)tensor_number(e, k);
        report_add(r, "running statistics",
                   largest_error(s->model.params + t->offset, expected, t->count), 1e-5);
        memcpy(s->model.params + t->offset, expected, t->count * sizeof *expected);
        free(expected);
    }
    s->training = 0;
    gin_forward(s);
    golden_rows(r, f, "eval/x", s->a.x, s->mols.A, (size_t)s->shape.dim, (size_t)s->shape.dim, NULL);
}

// The sampler, with the noise of the file; BN has the file's statistics.
static void golden_sample(Report *r, const TensorFile *f, Sde *s) {
    int copies = (int)meta_number(f, "sample_repeats", 0), mol = (int)meta_number(f, "sample_mol", 0);
    int M = (int)meta_number(f, "sample_steps", 0);
    const TensorEntry *init = tensor_find(f, "sample/init"), *noise = tensor_find(f, "sample/noise");
    Molecule *m = s->mols.molecule, keep = m[0];
    m[0] = m[mol];
    m[mol] = keep;
    for (int b = 1; b < copies; b++) {
        molecule_resize(&m[b], m->n_atoms, m->n_bonds, 0, 0);
        memcpy(m[b].atom_feat, m->atom_feat, (size_t)m->n_atoms * ATOM_FEATURES);
        memcpy(m[b].bonds, m->bonds, (size_t)m->n_bonds * 4);
        memcpy(m[b].bond_code, m->bond_code, (size_t)m->n_bonds);
        m[b].has_pos = 0;
    }
    mols_build(&s->mols, (size_t)copies, 0);
    size_t n = 3 * s->mols.A;
    float *z = xmalloc(2 * n, sizeof *z), *mean = xmalloc(n, sizeof *mean);
    for (s->method.vp = 0; s->method.vp < 2; s->method.vp++) {
        buffers_layout(s);
        gin_forward(s);
        to3d_graph_forward(s);
        for (size_t k = 0; k < n; k++) s->mols.q[k] = (float)tensor_number(init, k);
        float *score = sample_score(s, 1);
        golden_rows(r, f, s->method.vp ? "sample/vp/first_score" : "sample/ve/first_score", score,
                    n / 3, 3, 3, NULL);
        for (int i = 0; i < M; i++) {
            for (size_t k = 0; k < 2 * n; k++)
                z[k] = (float)tensor_number(noise, (size_t)i * 2 * n + k);
            sample_step(s, i, M, z, z + n, mean);
        }
        const TensorEntry *last =
            tensor_find(f, s->method.vp ? "sample/vp/final" : "sample/ve/final");
        float *expected = xmalloc(n, sizeof *expected);
        for (size_t k = 0; k < n; k++) expected[k] = (float)tensor_number(last, k);
        report_add(r, s->method.vp ? "sample/vp/final" : "sample/ve/final",
                   largest_error(mean, expected, n), s->method.vp ? 1e-3 : 5e-5);
        free(expected);
    }
    free(z);
    free(mean);
}

static void golden_tuning(Report *r, const TensorFile *f, const char *task, int print) {
    Sde s;
    double loss;
    char name[64], family[64];
    float mean[16], std[16];
    golden_open(&s, f, 1, task);
    Aim aim = {strcmp(task, "cls") ? TASK_REGRESSION : TASK_CLASSIFICATION, mean, std};
    for (int y = 0; y < 16; y++) {
        mean[y] = (float)meta_number(f, "label_mean", 0);
        std[y] = (float)meta_number(f, "label_std", 0);
    }
    task_forward(&s);
    loss = head_loss(&s, &aim);
    task_backward(&s);
    snprintf(name, sizeof name, "ft/%s/logits", task);
    golden_rows(r, f, name, s.a.logits, s.mols.B, (size_t)s.shape.tasks, (size_t)s.shape.tasks, NULL);
    snprintf(name, sizeof name, "ft/%s/loss", task);
    report_add(r, name, fabs(loss / tensor_number(tensor_find(f, name), 0) - 1), 1e-5);
    snprintf(name, sizeof name, "ft/%s/gradsum", task);
    snprintf(family, sizeof family, "ft/%s gradients", task);
    golden_gradients(r, f, &s, name, family, print);
    sde_free(&s);
}

static void golden_variant(Report *r, const TensorFile *f, const char *variant, int print) {
    Sde s;
    double loss[TERMS];
    char name[64], family[64];
    golden_open(&s, f, strstr(variant, "01") == NULL, NULL);
    s.method.vp = strstr(variant, "vp") != NULL;
    s.method.anneal = strcmp(variant, "anneal2") == 0 || strcmp(variant, "vp01") == 0 ? 2 : 0;
    losses(loss, &s);
    snprintf(name, sizeof name, "var/%s/eps_hat", variant);
    golden_rows(r, f, name, s.a.eps_hat, s.mols.A, 3, 3, NULL);
    gradients_of_losses(&s);
    snprintf(name, sizeof name, "var/%s/loss", variant);
    golden_losses(r, f, name, 0, loss, name, 1e-5);
    snprintf(name, sizeof name, "var/%s/gradsum", variant);
    snprintf(family, sizeof family, "var/%s gradients", variant);
    golden_gradients(r, f, &s, name, family, print);
    sde_free(&s);
}

// Everything a golden file holds.
static void test_golden(const char *path, int print) {
    TensorFile f;
    Report report = {0};
    Sde s;
    double loss[TERMS];
    tensor_file_open(&f, path);
    golden_open(&s, &f, meta_is(&f, "model_2dto3d", "02"), NULL);
    losses(loss, &s);
    golden_losses(&report, &f, "loss", 0, loss, "loss", 1e-5);
    golden_stages(&report, &f, &s);
    gradients_of_losses(&s);
    golden_gradients(&report, &f, &s, NULL, "gradients", print);
    golden_running(&report, &f, &s);
    golden_sample(&report, &f, &s);
    sde_free(&s);
    golden_open(&s, &f, meta_is(&f, "model_2dto3d", "02"), NULL);
    Adam adam = {meta_number(&f, "lr", 0), meta_number(&f, "beta1", 0), meta_number(&f, "beta2", 0),
                 meta_number(&f, "eps", 0), 0, 0};
    for (size_t t = 0; t < 10; t++) {
        double noise = 0;
        for (int k = 0; k < 5; k++) noise = fmax(noise, meta_number(&f, "train_noise", k));
        losses(loss, &s);
        golden_losses(&report, &f, "train/losses", t, loss, "losses of ten steps", 2 * noise);
        gradients_of_losses(&s);
        update(&s, &adam, meta_number(&f, "lr_scale_3d", 0), (int64_t)t + 1);
    }
    sde_free(&s);
    golden_variant(&report, &f, "model01", print);
    golden_variant(&report, &f, "anneal2", print);
    golden_variant(&report, &f, "vp", print);
    golden_variant(&report, &f, "vp01", print);
    golden_tuning(&report, &f, "cls", print);
    golden_tuning(&report, &f, "reg", print);
    report_finish(&report, path, print);
    tensor_file_close(&f);
}
int main(int argc, char **argv) {
    for (int i = 2; i < argc; i++) test_golden(argv[i], 1);
    printf("%d passed, %d failed\n", tests_passed, tests_failed);
    return tests_failed != 0;
}
