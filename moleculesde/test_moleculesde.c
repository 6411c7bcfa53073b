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
#include "../tests/harness.h"  // test_check(), Report: counting; tensor_number(), csv_number()

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

static double meta_number(const TensorFile *f, const char *key, int k) {  // k: of a list "a,b,c"
    const char *text = required_meta(f, key, "a golden file");
    for (; k > 0; k--) text = strchr(text, ',') + 1;
    return strtod(text, NULL);
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
        const char *name = t->name;
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
        for (size_t k = 0; k < x->count; k++)
            m->noise_x[V * v.atom + k] = (float)tensor_number(x, k);
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
    Shape c = {.dim = (int)meta_number(f, "emb_dim", 0),
               .layers = (int)meta_number(f, "gin_layers", 0),
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
        if (strstr(s->model.info[i].name, "running_"))
            for (size_t k = 0; k < s->model.info[i].count; k++)
                s->model.params[s->model.info[i].offset + k] =
                    strstr(s->model.info[i].name, "running_var") ? 1.0f : 0.0f;
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

// What 3D -> 2D makes of every molecule.
static void golden_to2d(Report *r, const TensorFile *f, Sde *s) {
    const Shape *c = &s->shape;
    const Mols *m = &s->mols;
    const Buffers *a = &s->a;
    char name[64];
    size_t A = m->A, D = (size_t)c->dim, W = (size_t)c->width;
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
            golden_molecule(r, f, (int)b, name, a->nodes + v.atom * Cn + D + (size_t)l * W, N, W,
                            Cn);
            snprintf(name, sizeof name, "T%d", l + 1);
            golden_pairs(r, f, &v, name, e.rows, (size_t)e.C, 2 * (size_t)e.C);
            snprintf(name, sizeof name, "S%d", l + 1);
            golden_pairs(r, f, &v, name, a->adjacency + e.to, (size_t)e.out, Ct);
            snprintf(name, sizeof name, "H%d", l + 1);
            if (l + 1 < EDGE_LAYERS)
                golden_molecule(r, f, (int)b, name, a->edge_h + ((size_t)l * A + v.atom) * W, N, W,
                                W);
        }
    }
}

// Every stage of the forward pass.
static void golden_stages(Report *r, const TensorFile *f, Sde *s) {
    const Shape *c = &s->shape;
    const Mols *m = &s->mols;
    Buffers *a = &s->a;
    size_t A = m->A, E = m->E, D = (size_t)c->dim, H = (size_t)c->hidden;
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
    for (int l = 0; l <= ATTENTIONS; l++) {
        snprintf(name, sizeof name, "out/d23/u%d", l);
        golden_rows(r, f, name, a->node + (size_t)l * A * H, A, H, H, NULL);
    }
    golden_rows(r, f, "out/d23/coef1", a->coefficient, E, 3, 3, row);
    golden_rows(r, f, "out/d23/coef2", a->coefficient + 3 * E, E, 3, 3, row);
    golden_rows(r, f, "out/d23/eps_hat", a->eps_hat, A, 3, 3, NULL);
    golden_to2d(r, f, s);
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
        if (model->info[i].offset < s->group_end[GROUP_3D])
            names[n_names++] = model->info[i].name;
    qsort(names, (size_t)n_names, sizeof *names, compare_names);
    for (int i = 0; i < model->n_tensors; i++) {
        const TensorInfo *t = &model->info[i];
        const float *ours = model->grads + t->offset;
        if (t->offset >= s->group_end[GROUP_3D]) continue;
        const TensorEntry *full = packed ? NULL : golden(f, "grad/%s", t->name, 0);
        const TensorEntry *sums = packed ? packed : golden(f, "gradsum/%s", t->name, 0);
        size_t row = 0, count = full ? t->count : 5;
        int place = list_place(order, t->name);
        if (packed) {
            if (packed->shape[0] == (size_t)n_names) {
                while (strcmp(names[row], t->name)) row++;
            } else {
                row = (size_t)place;
            }
        }
        CHECK(full || sums, "%s: no gradient of %s", f->path, t->name);
        double part[5] = {0}, square = 0, gap = 0;
        for (size_t e = 0; e < t->count && !full; e++) {
            uint64_t h = formula_hash(t->name, e);
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
            printf("  gradient of %s: error %.2e\n", t->name, error);
    }
    qsort(errors, (size_t)n, sizeof *errors, compare_doubles);
    snprintf(label, sizeof label, "%s, median", family);
    report_add(r, label, errors[n / 2], 2.5 * noise_median);  // an x87 has 2.1 of one file
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
        const TensorEntry *e = golden(f, "bn/%s", t->name, 0);
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
    size_t D = (size_t)s->shape.dim;
    golden_rows(r, f, "eval/x", s->a.x, s->mols.A, D, D, NULL);
}

// The sampler, with the noise of the file; BN has the file's statistics.
static void golden_sample(Report *r, const TensorFile *f, Sde *s) {
    int copies = (int)meta_number(f, "sample_repeats", 0);
    int M = (int)meta_number(f, "sample_steps", 0);
    int mol = (int)meta_number(f, "sample_mol", 0);
    const TensorEntry *init = tensor_find(f, "sample/init");
    const TensorEntry *noise = tensor_find(f, "sample/noise");
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
    Task aim = {.kind = strcmp(task, "cls") ? TASK_REGRESSION : TASK_CLASSIFICATION, .mean = mean,
                .std = std};
    for (int y = 0; y < 16; y++) {
        mean[y] = (float)meta_number(f, "label_mean", 0);
        std[y] = (float)meta_number(f, "label_std", 0);
    }
    task_forward(&s);
    loss = head_loss(&s, &aim);
    task_backward(&s);
    snprintf(name, sizeof name, "ft/%s/logits", task);
    size_t Y = (size_t)s.shape.tasks;
    golden_rows(r, f, name, s.a.logits, s.mols.B, Y, Y, NULL);
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
        // later on a relu may flip by rounding, which costs up to 1e-3
        golden_losses(&report, &f, "train/losses", t, loss, t < 3 ? "losses of three steps"
                      : "losses of ten steps", t < 3 ? 2 * noise : fmax(4 * noise, 1e-3));
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
    if (print) printf("%s\n", path);
    report_finish(&report, path, print);
    tensor_file_close(&f);
}
// =================================================================================================
// A small model and a batch with everything in it: one atom, no bonds, two pieces, two atoms at one
// place, more than 10 A across
// =================================================================================================

static double test_number(size_t k) {  // in [-1, 1)
    return (double)(formula_hash("test", k) >> 40) / 8388608.0 - 1.0;
}

static void rig_molecule(Molecule *m, int N, int bonds, size_t seed) {
    molecule_resize(m, N, bonds, 2, 0);
    m->has_pos = 1;
    for (size_t k = 0; k < (size_t)N * ATOM_FEATURES; k++) {
        size_t f = k % ATOM_FEATURES, values = f ? ATOM_FEATURE_SIZES[f] : 9;
        m->atom_feat[k] = (uint8_t)(formula_hash("feature", seed + k) % values);
    }
    for (int k = 0; k < bonds; k++) {  // a tree with the first atoms, then rings
        m->bonds[2 * k] = (uint16_t)(k + 1 < N ? k + 1 : k - N + 3);
        m->bonds[2 * k + 1] =
            (uint16_t)(k + 1 < N ? formula_hash("bond", seed + (size_t)k) % (size_t)(k + 1) : 0);
        m->bond_code[k] = (uint8_t)(formula_hash("code", seed + (size_t)k) % BOND_CODES);
    }
    for (size_t k = 0; k < 3 * (size_t)N; k++)
        m->pos[k] = (float)(2.5 * test_number(seed + k) + (k % 3 ? 0.0 : 0.7 * (double)k / 3));
    m->labels[0] = seed % 3 ? 1.0f : 0.0f;
    m->labels[1] = seed % 2 ? 0.5f : NAN;
}

static void rig_open(Sde *s, int tasks, int use_3d, int gate) {
    static const int atoms[] = {1, 9, 3, 7, 16, 5}, bonds[] = {0, 9, 0, 4, 17, 4};
    *s = (Sde){.training = 1, .draws = {7, 3, 0, 1}};
    s->method = (Method){0, {0.2, 1}, {0.1, 1}, {0.2, 1}, 1, 0.1, 0.3, 1, 0.7, 1.3};
    sde_create(s, (Shape){12, 3, 6, 7, 2, 16, 8, 3, 2, gate, tasks, use_3d}, 1);
    model_init(&s->model, 5);
    for (size_t k = 0; k < s->group_end[GROUP_3D]; k++)  // no gradient that happens to be 0
        s->model.params[k] += (float)(0.1 * test_number(k));
    mols_reserve(&s->mols, 6);
    for (size_t b = 0; b < 6; b++) {
        rig_molecule(&s->mols.molecule[b], atoms[b], bonds[b], 100 * b + 1);
        if (b == 3) memcpy(s->mols.molecule[b].pos + 3, s->mols.molecule[b].pos, 12);
    }
    mols_build(&s->mols, 6, tasks);
    mols_draw(s);
    mols_noised(s);
    buffers_layout(s);
}

// =================================================================================================
// Pairs of forward and backward: central differences along a direction made of the gradient and of
// test numbers. Steps are small, for there are many max(0, .) to cross.
// =================================================================================================

typedef double Scalar(Sde *s);

static double weighted_sum(const float *x, size_t n) {
    double sum = 0;
    for (size_t k = 0; k < n; k++) sum += (double)x[k] * test_number(k);
    return sum;
}

static void weights_into(float *dx, size_t n) {
    for (size_t k = 0; k < n; k++) dx[k] = (float)test_number(k);
}

// Compares dx (n), the gradient of f with respect to x (n); total: the norm of all gradients.
static void test_gradient(Sde *s, Scalar *f, float *x, const float *dx, size_t n, double total,
                          const char *what) {
    static const double steps[] = {3e-3, 1e-3, 3e-4, 1e-4};
    double norm = 0, expected = 0, least = 1e300, unit = 0;
    float *keep = xmalloc(n, sizeof *keep);
    double *u = xmalloc(n, sizeof *u);
    memcpy(keep, x, n * sizeof *keep);
    for (size_t k = 0; k < n; k++) norm += (double)dx[k] * (double)dx[k];
    norm = sqrt(norm);
    for (size_t k = 0; k < n; k++) {
        u[k] = (norm > 0 ? (double)dx[k] / norm : 0) + test_number(k + 11) / sqrt((double)n);
        unit += u[k] * u[k];
    }
    for (size_t k = 0; k < n; k++) expected += u[k] / sqrt(unit) * (double)dx[k];
    for (int h = 0; h < 4; h++) {  // the best of four: kinks want short steps, rounding long ones
        double value[2];
        for (int side = 0; side < 2; side++) {
            for (size_t k = 0; k < n; k++)
                x[k] = keep[k] + (float)((side ? -1 : 1) * steps[h] * u[k] / sqrt(unit));
            value[side] = f(s);
        }
        double found = (value[0] - value[1]) / (2 * steps[h]);
        least = fmin(least, fabs(found - expected) / fmax(norm, 1e-3 * total));
    }
    memcpy(x, keep, n * sizeof *keep);
    test_check(least < 1.5e-2, "%s: gradient off by %.1e of its norm %.1e", what, least, norm);
    free(keep);
    free(u);
}

// The gradients of parameters whose official names begin so, of one in `every` of them.
static void test_parameters(Sde *s, Scalar *f, const char *prefix, int every) {
    double total = 0;
    int tested = 0;
    float *grads = xmalloc(s->model.count, sizeof *grads);
    memcpy(grads, s->model.grads, s->model.count * sizeof *grads);
    for (idx k = 0; k < s->model.count; k++) total += (double)grads[k] * (double)grads[k];
    for (int i = 0; i < s->model.n_tensors; i++) {
        const TensorInfo *t = &s->model.info[i];
        if (strncmp(t->name, prefix, strlen(prefix)) || t->offset >= s->group_end[GROUP_3D])
            continue;
        if (tested++ % every) continue;
        test_gradient(s, f, s->model.params + t->offset, grads + t->offset, t->count, sqrt(total),
                      t->name);
    }
    test_check(tested > 0, "no parameter begins with %s", prefix);
    free(grads);
}

static double run_gin(Sde *s) {
    gin_forward(s);
    return weighted_sum(s->a.x, s->mols.A * (size_t)s->shape.dim);
}

static double run_schnet(Sde *s) {
    schnet_forward(s);
    return weighted_sum(s->a.y, s->mols.A * (size_t)s->shape.dim);
}

static double run_contrast(Sde *s) {
    double loss[TERMS];
    contrast(loss, s);
    return loss[TERM_CONTRAST];
}

static double run_to3d(Sde *s) {
    to3d_graph_forward(s);
    to3d_score_forward(s);
    return weighted_sum(s->a.eps_hat, 3 * s->mols.A);
}

static double run_to2d(Sde *s) {
    to2d_forward(s);
    return weighted_sum(s->a.m_x, V * s->mols.A) + weighted_sum(s->a.m_adj, s->mols.P);
}

static double run_all(Sde *s) {
    double loss[TERMS];
    losses(loss, s);
    return loss[TERM_TOTAL];
}

// A message the wrong way round, a relu of the wrong tensor, a table row of another feature.
static void test_gin(void) {
    Sde s;
    rig_open(&s, 0, 0, 1);
    run_gin(&s);
    weights_into(s.a.dx, s.mols.A * (size_t)s.shape.dim);
    gin_backward(&s);
    test_parameters(&s, run_gin, "model_2D.", 1);
    sde_free(&s);
}

// A filter of the other pair, a cutoff left out in one pass.
static void test_schnet(void) {
    Sde s;
    rig_open(&s, 0, 0, 1);
    run_schnet(&s);
    weights_into(s.a.dy, s.mols.A * (size_t)s.shape.dim);
    schnet_backward(&s);
    test_parameters(&s, run_schnet, "model_3D.", 1);
    sde_free(&s);
}

// A permutation instead of its inverse.
static void test_contrast(void) {
    Sde s;
    rig_open(&s, 0, 0, 1);
    size_t AD = s.mols.A * (size_t)s.shape.dim;
    for (size_t k = 0; k < AD; k++) {
        s.a.x[k] = (float)test_number(k);
        s.a.y[k] = (float)test_number(k + 1);
    }
    run_contrast(&s);
    float *d = xmalloc(2 * AD, sizeof *d);
    memcpy(d, s.a.dx, AD * sizeof *d);
    memcpy(d + AD, s.a.dy, AD * sizeof *d);
    test_gradient(&s, run_contrast, s.a.x, d, AD, 0, "contrast, X");
    test_gradient(&s, run_contrast, s.a.y, d + AD, AD, 0, "contrast, Y");
    free(d);
    sde_free(&s);
}

// An edge taken for its way back, a softmax over the wrong edges, dropout drawn anew.
static void test_to3d(void) {
    for (int gate = 0; gate < 2; gate++) {
        Sde s;
        rig_open(&s, 0, 0, gate);
        gin_forward(&s);
        size_t AD = s.mols.A * (size_t)s.shape.dim;
        run_to3d(&s);
        memset(s.a.dx, 0, sizeof(float) * AD);
        weights_into(s.a.deps_hat, 3 * s.mols.A);
        to3d_backward(&s);
        float *d = xmalloc(AD, sizeof *d);
        memcpy(d, s.a.dx, AD * sizeof *d);
        test_parameters(&s, run_to3d, "SDE_2Dto3D_model.", 1);
        test_gradient(&s, run_to3d, s.a.x, d, AD, 0, "2D -> 3D, X");
        free(d);
        sde_free(&s);
    }
}

// A matrix taken for its transpose, a pair counted once instead of twice, a channel's neighbour.
static void test_to2d(void) {
    Sde s;
    rig_open(&s, 0, 0, 1);
    schnet_forward(&s);
    size_t AD = s.mols.A * (size_t)s.shape.dim;
    run_to2d(&s);
    memset(s.a.dy, 0, sizeof(float) * AD);
    weights_into(s.a.dm_x, V * s.mols.A);
    weights_into(s.a.dm_adj, s.mols.P);
    to2d_backward(&s);
    float *d = xmalloc(AD, sizeof *d);
    memcpy(d, s.a.dy, AD * sizeof *d);
    test_parameters(&s, run_to2d, "SDE_3Dto2D_model.", 1);
    test_gradient(&s, run_to2d, s.a.y, d, AD, 0, "3D -> 2D, Y");
    free(d);
    sde_free(&s);
}

// A network that forgets what another has added; weights and powers of sigma in the losses.
static void test_model(void) {
    for (int vp = 0; vp < 2; vp++) {
        Sde s;
        rig_open(&s, 0, 0, 1);
        s.method.vp = vp;
        s.method.dropout = 0;
        run_all(&s);
        gradients_of_losses(&s);
        test_parameters(&s, run_all, "", 7);
        sde_free(&s);
    }
}

static float rig_mean[2] = {0.1f, 0.2f}, rig_std[2] = {2, 3};

static double run_class(Sde *s) {
    Task aim = {.kind = TASK_CLASSIFICATION, .mean = rig_mean, .std = rig_std};
    task_forward(s);
    return head_loss(s, &aim);
}

static double run_regression(Sde *s) {
    Task aim = {.kind = TASK_REGRESSION, .mean = rig_mean, .std = rig_std};
    task_forward(s);
    return head_loss(s, &aim);
}

// A mean over the wrong number of atoms, labels that are missing, dropout behind the last layer.
static void test_head(void) {
    for (int use_3d = 0; use_3d < 2; use_3d++) {
        Sde s;
        rig_open(&s, 2, use_3d, 1);
        for (int kind = 0; kind < 2; kind++) {
            Scalar *run = kind ? run_regression : run_class;
            for (size_t b = 0; b < s.mols.B; b++)
                if (!kind && s.mols.labels[2 * b + 1] > 0) s.mols.labels[2 * b + 1] = 1;
            run(&s);
            task_backward(&s);
            test_parameters(&s, run, "", 1);
        }
        sde_free(&s);
    }
}

// =================================================================================================
// What must hold whatever the numbers
// =================================================================================================

static double exact_act(int kind, double x) {
    switch (kind) {
        case SILU: return x / (1 + exp(-x));
        case SSP: return softplus(x) - log(2);
        case ELU: return x > 0 ? x : expm1(x);
        default: return tanh(x);
    }
}

// Elementary functions against libm, and their slopes against differences.
static void test_functions(void) {
    double worst[4] = {0}, acts[4] = {0}, slopes[4] = {0};
    for (int k = -4000; k <= 4000; k++) {
        float f = (float)k / 200, s, c;
        worst[0] = fmax(worst[0], fabs((double)log_fast(expf(f)) - log((double)expf(f))));
        worst[1] = fmax(worst[1], fabs((double)tanh_fast(f) - tanh((double)f)) /
                                      fmax(fabs(tanh((double)f)), 1e-30));
        turn_fast(&s, &c, f);
        worst[2] = fmax(worst[2], fabs((double)s - sin(6.283185307179586 * (double)f)));
        worst[3] = fmax(worst[3], fabs((double)c - cos(6.283185307179586 * (double)f)));
        for (int kind = 0; kind < 4 && k; kind++) {
            double up = exact_act(kind, (double)f + 1e-5), low = exact_act(kind, (double)f - 1e-5);
            double exact = exact_act(kind, (double)f), slope = (double)act_slope((Kind)kind, f);
            slopes[kind] = fmax(slopes[kind], fabs((up - low) / 2e-5 - slope));
            acts[kind] = fmax(acts[kind], fabs((double)act((Kind)kind, f) - exact) /
                                              fmax(1, fabs(exact)));
        }
    }
    for (int k = 0; k < 4; k++) {
        test_check(worst[k] < (k ? 4e-7 : 2e-6), "elementary function %d: error %.1e", k, worst[k]);
        test_check(acts[k] < 4e-7, "activation %d: error %.1e", k, acts[k]);
        test_check(slopes[k] < 1e-5, "slope %d: error %.1e", k, slopes[k]);
    }
}

// Mean, deviation and independence of the normal numbers; the same numbers whatever the block.
static void test_normal(void) {
    enum { N = 40000 };
    static float x[N];
    Draws draws = {3, 1, 0, 1};
    double sum[4] = {0}, pairs = 0;
    normal_row(x, N, &draws, RNG_POSITION, 2);
    for (int k = 0; k < N; k++) {
        for (int p = 0; p < 4; p++) sum[p] += pow((double)x[k], p + 1) / N;
        pairs += (double)x[k] * (double)x[(k + N / 4) % N] / N;
    }
    test_check(fabs(sum[0]) < 0.02 && fabs(sum[1] - 1) < 0.02 && fabs(sum[2]) < 0.05 &&
               fabs(sum[3] - 3) < 0.15 && fabs(pairs) < 0.02,
               "moments of the normal numbers: %.3f %.3f %.3f %.3f, %.3f", sum[0], sum[1], sum[2],
               sum[3], pairs);
}

static void rotate(float *x, size_t rows) {  // about an axis that is none of the frame
    const double r[9] = {0.36, 0.48, -0.8, -0.8, 0.6, 0, 0.48, 0.64, 0.6};
    for (size_t i = 0; i < rows; i++) {
        double in[3] = {(double)x[3 * i], (double)x[3 * i + 1], (double)x[3 * i + 2]};
        for (size_t k = 0; k < 3; k++)
            x[3 * i + k] = (float)(r[3 * k] * in[0] + r[3 * k + 1] * in[1] + r[3 * k + 2] * in[2]);
    }
}

// A frame that does not turn with the molecule; an encoder that sees the frame.
static void test_rotation(void) {
    Sde s;
    rig_open(&s, 0, 0, 1);
    s.draws.active = 0;
    size_t n = 3 * s.mols.A, AD = s.mols.A * (size_t)s.shape.dim;
    float *before = xmalloc(n, sizeof *before), *y = xmalloc(AD, sizeof *y);
    gin_forward(&s);
    run_to3d(&s);
    memcpy(before, s.a.eps_hat, n * sizeof *before);
    rotate(before, s.mols.A);
    rotate(s.mols.q, s.mols.A);
    run_to3d(&s);
    test_check(largest_error(s.a.eps_hat, before, n) < 1e-4, "eps_hat does not turn with q: %.1e",
               largest_error(s.a.eps_hat, before, n));
    schnet_forward(&s);
    memcpy(y, s.a.y, AD * sizeof *y);
    for (size_t b = 0; b < s.mols.B; b++)
        rotate(s.mols.molecule[b].pos, (size_t)s.mols.n_atoms[b]);
    mols_build(&s.mols, 6, 0);
    schnet_forward(&s);
    test_check(largest_error(s.a.y, y, AD) < 1e-5, "Y turns: %.1e", largest_error(s.a.y, y, AD));
    free(before);
    free(y);
    sde_free(&s);
}

// Outputs of all networks for atom i of the batch: D of X and of Y, 3 of eps_hat, V of m_x.
static void outputs_of(float *out, const Sde *s, size_t i) {
    size_t D = (size_t)s->shape.dim;
    memcpy(out, s->a.x + i * D, D * sizeof *out);
    memcpy(out + D, s->a.y + i * D, D * sizeof *out);
    memcpy(out + 2 * D, s->a.eps_hat + 3 * i, 3 * sizeof *out);
    memcpy(out + 2 * D + 3, s->a.m_x + V * i, V * sizeof *out);
}

// The atoms of one molecule in another order: everything follows.
static void test_permutation(void) {
    Sde s;
    rig_open(&s, 0, 0, 1);
    s.draws.active = 0;
    double loss[TERMS];
    size_t b = 4, wide = 2 * (size_t)s.shape.dim + 3 + V;
    Place v = place_of(&s.mols, b);
    size_t N = (size_t)v.N, turn = 5;  // atom i becomes atom (i + 5) mod N
    float *before = xmalloc(N * wide, sizeof *before), *after = xmalloc(N * wide, sizeof *after);
    float *adj = xmalloc(N * N, sizeof *adj), *again = xmalloc(N * N, sizeof *again);
    float *noise = xmalloc(3 * N + V * N + N * N, sizeof *noise);
    losses(loss, &s);
    for (size_t i = 0; i < N; i++) {
        size_t to = (i + turn) % N;
        outputs_of(before + to * wide, &s, v.atom + i);
        memcpy(noise + 3 * to, s.mols.noise + 3 * (v.atom + i), 3 * sizeof *noise);
        memcpy(noise + 3 * N + V * to, s.mols.noise_x + V * (v.atom + i), V * sizeof *noise);
        for (size_t j = 0; j < N; j++) {
            size_t row = pair_row(&v, (int)i, (int)j), at = to * N + (j + turn) % N;
            adj[at] = s.a.m_adj[row];
            noise[3 * N + V * N + at] = s.mols.noise_adj[row];
        }
    }
    Molecule *m = &s.mols.molecule[b], old = {0};
    molecule_resize(&old, m->n_atoms, m->n_bonds, 0, 0);
    memcpy(old.atom_feat, m->atom_feat, N * ATOM_FEATURES);
    memcpy(old.pos, m->pos, 3 * N * sizeof(float));
    for (size_t i = 0; i < N; i++) {
        size_t to = (i + turn) % N;
        memcpy(m->atom_feat + to * ATOM_FEATURES, old.atom_feat + i * ATOM_FEATURES, ATOM_FEATURES);
        memcpy(m->pos + 3 * to, old.pos + 3 * i, 3 * sizeof(float));
    }
    for (int k = 0; k < 2 * m->n_bonds; k++) m->bonds[k] = (uint16_t)((m->bonds[k] + turn) % N);
    mols_build(&s.mols, 6, 0);
    mols_draw(&s);
    memcpy(s.mols.noise + 3 * v.atom, noise, 3 * N * sizeof *noise);
    memcpy(s.mols.noise_x + V * v.atom, noise + 3 * N, V * N * sizeof *noise);
    for (size_t k = 0; k < N * N; k++)
        s.mols.noise_adj[pair_row(&v, (int)(k / N), (int)(k % N))] = noise[3 * N + V * N + k];
    losses(loss, &s);
    for (size_t i = 0; i < N; i++) {
        outputs_of(after + i * wide, &s, v.atom + i);
        for (size_t j = 0; j < N; j++) again[i * N + j] = s.a.m_adj[pair_row(&v, (int)i, (int)j)];
    }
    test_check(largest_error(after, before, N * wide) < 2e-5, "atoms in another order: %.1e",
               largest_error(after, before, N * wide));
    test_check(largest_error(again, adj, N * N) < 2e-5, "pairs in another order: %.1e",
               largest_error(again, adj, N * N));
    molecule_free(&old);
    float *const memory[] = {before, after, adj, again, noise};
    for (int k = 0; k < 5; k++) free(memory[k]);
    sde_free(&s);
}

// Numbers of parameters of the release, and the names of some; what a batch without bonds does.
static void test_shapes(void) {
    Sde s = {0};
    size_t count[4] = {0};
    sde_create(&s, (Shape){300, 5, 128, 51, 6, 32, 16, 8, 4, 1, 0, 0}, 0);
    static const char *const prefixes[] = {"model_2D", "model_3D", "SDE_2D", "SDE_3D"};
    for (int i = 0; i < s.model.n_tensors; i++)
        for (int k = 0; k < 4; k++)
            if (strncmp(s.model.info[i].name, prefixes[k], strlen(prefixes[k])) == 0 &&
                s.model.info[i].offset < s.group_end[GROUP_3D])
                count[k] += s.model.info[i].count;
    test_check(count[0] == 1885205 && count[1] == 1359708 && count[2] == 256938 &&
               count[3] == 1166676, "parameters: %zu %zu %zu %zu", count[0], count[1], count[2],
               count[3]);
    sde_free(&s);
    rig_open(&s, 0, 0, 1);
    mols_reserve(&s.mols, 2);
    for (size_t b = 0; b < 2; b++) rig_molecule(&s.mols.molecule[b], 1 + (int)b, 0, b);
    mols_build(&s.mols, 2, 0);
    mols_draw(&s);
    double loss[TERMS], gradient = 0;
    losses(loss, &s);
    gradients_of_losses(&s);
    for (idx k = 0; k < s.model.count; k++) gradient += fabs((double)s.model.grads[k]);
    test_check(s.mols.E == 0 && isfinite(loss[TERM_TOTAL]) && isfinite(gradient) &&
               loss[TERM_ELEMENTS] <= 0, "a batch without bonds: loss %g, gradient %g",
               loss[TERM_TOTAL], gradient);
    sde_free(&s);
}

// =================================================================================================
// The program: the same bytes whatever the threads, and across kill and resume; messages
// =================================================================================================

#define SDE "moleculesde/moleculesde"
#define SMALL " --dim 16 --layers 2 --blocks 2 --filters 8 --gaussians 9 --hidden 8 --width 4 " \
              "--channels 2 --last-channels 2 --batch-size 16 "

MB_PRINTF(1, 2) static int run_command(const char *fmt, ...) {
    char text[2048];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
#ifdef __wasi__  // a program cannot start another
    int status = -1;
#else
    int status = system(text);
#endif
    return status == -1 ? -1 : status > 255 ? status >> 8 : status;
}

static int same_files(const char *a, const char *b) {
    return run_command("cmp -s %s %s", a, b) == 0;
}

static void test_program(void) {
    const char *quiet = "> build/sde.out 2> build/sde.err";
    for (int threads = 1; threads <= 4; threads *= 2)
        test_check(run_command(SDE " train.bin" SMALL "--steps 12 --threads %d -o build/sde%d"
                               ".safetensors %s", threads, threads, quiet) == 0, "%d threads",
                   threads);
    test_check(same_files("build/sde1.safetensors", "build/sde2.safetensors") &&
               same_files("build/sde1.safetensors", "build/sde4.safetensors"),
               "1, 2 and 4 threads give different bytes");
    run_command("rm -f build/sdek.*");
    for (int k = 0; k < 3; k++)
        run_command("{ " SDE " train.bin" SMALL "--steps 12 --save-every 1 --resume -o build/sdek"
                    ".safetensors %s & p=$!; sleep 0.%d; kill -9 $p; wait $p; } 2> /dev/null",
                    quiet, 2 + k);
    test_check(run_command(SDE " train.bin" SMALL "--steps 12 --save-every 1 --resume -o build/sdek"
                           ".safetensors %s", quiet) == 0, "resumed after being killed");
    test_check(same_files("build/sde1.safetensors", "build/sdek.safetensors"),
               "a run that was killed and resumed gives other bytes");
    for (int k = 0; k < 5; k++) {  // fine-tuning: in one go, and in two, stopped at any moment
        const char *name = k ? "sdef2" : "sdef1";
        if (k > 1 && !same_files("build/sdef1.safetensors", "build/sdef2.safetensors")) break;
        run_command("rm -f build/%s.*", name);
        if (k) run_command("timeout -s TERM 0.%d " SDE " finetune train.bin --init build/sde1"
                           ".safetensors --epochs 2 --save-every 3 -o build/%s.safetensors %s",
                           1 + 2 * k, name, quiet);
        test_check(run_command(SDE " finetune train.bin --init build/sde1.safetensors --epochs 2 "
                               "%s -o build/%s.safetensors %s", k ? "--resume" : "", name,
                               quiet) == 0, "fine-tuning %d", k);
    }
    test_check(same_files("build/sdef1.safetensors", "build/sdef2.safetensors"),
               "fine-tuning that was stopped and resumed gives other bytes");
    test_check(run_command("mv build/sde1.safetensors build/sde1.gone; " SDE " finetune train.bin "
                           "--epochs 2 --resume -o build/sdef2.safetensors %s; code=$?; mv build/"
                           "sde1.gone build/sde1.safetensors; exit $code", quiet) == 0,
               "a run resumed without the file that it began with");
    test_check(run_command("printf 'smiles,a\\nC,0\\nCC,1\\nCCC,0\\n' | ./data_prep --format csv "
                           "--labels a -o build/sdec.bin - %s && " SDE " finetune build/sdec.bin "
                           "--valid build/sdec.bin --init build/sde1.safetensors --epochs 1 --lr "
                           "1e-9 -o build/sdec.safetensors %s && " SDE " predict build/sdec.bin "
                           "--model build/sdec.safetensors | awk -F, 'NR > 1 { s += $2 } END { "
                           "exit !(s > 0.9 && s < 1.1) }'", quiet, quiet) == 0,
               "a classifier that has learnt nothing says the share of ones, 1/3");
    test_check(run_command(SDE " predict valid.bin --model build/sdef1.safetensors | wc -l | "
                           "grep -qx 201") == 0, "predictions");
    test_check(run_command(SDE " embed valid.bin --model build/sde1.safetensors --encoder 3d -o "
                           "build/sde.npy %s", quiet) == 0, "embeddings");
    for (int k = 0; k < 2; k++)
        test_check(run_command(SDE " generate valid.bin 3 --model build/sde1.safetensors --copies "
                               "2 --sample-steps 20 --threads %d -o build/sde%d.sdf %s", k + 1, k,
                               quiet) == 0, "conformers");
    test_check(same_files("build/sde0.sdf", "build/sde1.sdf"), "conformers of one seed differ");
    run_command("printf 'CCO ethanol\\n' > build/sde.smi");
    for (int k = 0; k < 2; k++)  // with and without positions: only the graph is looked at
        run_command("./data_prep -o build/sdeg%d.bin %s %s && " SDE " generate build/sdeg%d.bin 0 "
                    "--model build/sde1.safetensors --copies 2 --sample-steps 20 -o build/sdeg.sdf "
                    "%s && sed -n '2,$p' build/sdeg.sdf | grep -v -i ethanol > build/sdeg%d.txt", k,
                    k ? "build/sde.smi" : "data/ethanol.sdf", quiet, k, quiet, k);
    test_check(run_command("test -s build/sdeg0.txt") == 0 &&
               same_files("build/sdeg0.txt", "build/sdeg1.txt"), "conformers follow positions");
    test_check(run_command("./data_prep -o build/sde0.bin build/sde0.sdf %s", quiet) == 0,
               "conformers are no SD file");
    // read again they are the same molecules: Kekule structures, hydrogens, radicals, dative bonds
    static const char graph[] = "./data_prep --dump build/sdek.%s.bin | sed 's/.*.atom_feat.//; "
                                "s/.pos.*//' > build/sdek.%s.txt";
    char *before = xprintf(graph, "a", "a"), *after = xprintf(graph, "b", "b");
    test_check(run_command("printf 'c1cc[nH]c1\nC[CH2]\nC#N->[Fe]\nN->B\nC[SnH3]\nC[N+](=O)[O-]\n"
                           "c1ccc2cccc2cc1\nO=c1cc[nH]cc1\n[cH-]1cccc1.[Na+]\nC[S+](C)[O-]\nO\n"
                           "c1ccn(->[Pt])cc1\nCS(=O)(=O)C\nc1ccc2c(c1)ccc1ccc3ccc4ccccc4c3c12\n' "
                           "> build/sdek.smi; ./data_prep -o build/sdek.a.bin build/sdek.smi %s && "
                           "%s", quiet, before) == 0, "graphs to make conformers of");
    for (int k = 0; k < 14; k++)
        test_check(run_command(SDE " generate build/sdek.a.bin %d --model build/sde1.safetensors "
                               "--copies 1 --sample-steps 2 -o build/sdek.%c.sdf %s", k, 'a' + k,
                               quiet) == 0, "a conformer of graph %d", k);
    test_check(run_command("./data_prep -o build/sdek.b.bin build/sdek.?.sdf %s && %s && cmp "
                           "build/sdek.a.txt build/sdek.b.txt", quiet, after) == 0,
               "conformers are other molecules than those that they were made of");
    FREE_ALL(before, after);
}

// Labels of any scale, validation sets that cannot judge, parts that are empty.
static void test_judging(void) {
    static const struct { const char *command, *expected; } rows[] = {
        {SDE " train.bin --sde vp --steps 1 --batch-size 2 --dim 16 -o build/sdevp.safetensors",
         "wrote build/sdevp.safetensors"},
        {"{ echo smiles,a,b,kd,set; i=0; for s in C CC CCC CCO CCN CCCC CCCO CCCN; do i=$((i+1)); "
         "echo $s,$((i%2)),$((i/2%2)),$((i%3+9))e-9,train; echo $s,1,,9e-9,valid; done; } > "
         "build/sdej.csv; ./data_prep --labels a,b --split-by column:set -o 'build/sdej.{}.bin' "
         "build/sdej.csv && ./data_prep --labels kd --split-by column:set -o 'build/sdek.{}.bin' "
         "build/sdej.csv", "test            0 molecules"},
        {SDE " finetune build/sdej.train.bin --epochs 3 -o build/sdej.safetensors --dim 16",
         "build/sdej.valid.bin: 2 of 2 tasks have no labels or all the same, first a: the "
         "training"},
        {"awk -F, 'NR > 1 { bad += $3 != \"\" } END { print NR bad }' build/sdej.log.csv", "40"},
        {SDE " finetune build/sdek.train.bin --valid build/sdek.train.bin --epochs 30 --lr 1e-2 "
         "--dim 16 -o build/sdej.safetensors", "e-10  R2"},
        {SDE " predict build/sdek.train.bin --model build/sdej.safetensors | awk -F, 'NR > 1 { s "
         "+= $2 > 8e-9 && $2 < 12e-9 } END { print s \" within\" }'", "8 within"},
        {SDE " finetune build/sdek.train.bin --test build/sdej.test.bin --epochs 1 --dim 16 -o "
         "build/sdej.safetensors", "build/sdej.test.bin: the dataset is empty and is left out"},
        // from a fine-tuned model of other tasks: its head stays behind; its sizes are said
        {SDE " finetune build/sdej.train.bin --init build/sdej.safetensors --epochs 1 -o "
         "build/sdei.safetensors && ./moleblend info build/sdei.safetensors", "--dim 16"},
        {"! " SDE " finetune build/sdej.train.bin --init build/sdej.safetensors --dim 300 "
         "--epochs 1 -o build/sdei.safetensors", "has 16 where an option says 300; leave out"},
        {"! " SDE " finetune build/sdej.train.bin --init build/sdej.safetensors --encoder 3d -o "
         "build/sdei.safetensors", "build/sdej.safetensors: has no encoder of --encoder 3d"},
        {"! " SDE " embed build/sdek.train.bin --model build/sdej.safetensors --encoder 3d -o "
         "build/sdei.npy", "build/sdej.safetensors: was fine-tuned with --encoder 2d"},
        {"! " SDE " build/sdek.train.bin --resume -o build/sdej.safetensors", "is the state of "
         "fine-tuning; give the command"},
        {"! " SDE " predict build/sdek.train.bin --model build/sdej.safetensors.state",
         "build/sdej.safetensors.state: is the state of a run; expected its checkpoint"},
        {"! " SDE " train.bin --sigma-3d-low 5 -o build/sdei.safetensors",
         "expected --sigma-3d 5 to 1,"},
        {"! " SDE " generate valid.bin 0 --model build/sdevp.safetensors --sample-steps 1",
         "--sample-steps: expected more than 1, the model"},
        // a fifth of the labels, one molecule at a time: updates without a label do not count
        {"{ echo smiles,a,set; i=0; for s in C CC CCC CCO CCN CCCC CCCO CCCN CF CCF; do "
         "i=$((i+1)); l=; [ $i = 2 ] && l=0; [ $i = 7 ] && l=1; echo $s,$l,train; echo "
         "$s,$((i%2)),valid; done; } > build/sdel.csv; ./data_prep --labels a --largest-fragment "
         "--split-by column:set -o "
         "'build/sdel.{}.bin' build/sdel.csv && " SDE " finetune build/sdel.train.bin --lr 0 "
         "--dropout 0 --batch-size 1 --epochs 1 --dim 16 -o build/sdel.safetensors | awk '$1 == "
         "1 { print \"loss\", ($2 > 0.5) }'", "loss 1"},
        // records that were skipped, and data that were prepared otherwise, are said
        {"printf 'C\\nC(\\nCC.O\\n' | ./data_prep --format smi -o build/sdem.bin - && " SDE
         " predict build/sdem.bin --model build/sdel.safetensors", "note    build/sdem.bin: 1 "
         "records were skipped when it was made, and have no row"},
        {SDE " predict build/sdem.bin --model build/sdel.safetensors", "made without "
         "--largest-fragment, what the model learnt from with it"},
    };
    for (size_t k = 0; k < sizeof rows / sizeof rows[0]; k++) {
        int code = run_command("{ %s; } > build/sde.out 2>&1", rows[k].command);
        int said = run_command("grep -q -e '%s' build/sde.out", rows[k].expected) == 0;
        int nan = run_command("grep -qi '[^a-z]nan[^a-z]' build/sde.out") == 0;
        test_check(code == 0 && said && !nan, "%s: exit code %d, expected \"%s\" and no NaN",
                   rows[k].command, code, rows[k].expected);
    }
}

// What mols_draw() and mols_noised() make, by the names of the draws and the formulas of section 6.
static void test_drawn(void) {
    Sde s;
    int times = 0, wrong = 0;
    double worst = 0;
    rig_open(&s, 0, 0, 1);
    s.method.ve3d = (Range){0.3, 2};
    s.method.ve2d = (Range){0.05, 1.5};
    s.draws.first_slot = 9;
    mols_draw(&s);
    Mols *m = &s.mols;
    for (uint32_t k = 0; k < 2; k++)
        // the first four of six, then 999 minus the first two
        for (uint32_t b = 0; b < m->B; b++) {
            float u = rng_uniform(s.draws.seed, k ? RNG_TIME_2D : RNG_TIME_3D, s.draws.step, 9,
                                  b % 4);
            int drawn = (int)(u * 1000);
            times += m->time[k * m->B + b] == (b < 4 ? drawn : 999 - drawn);
        }
    test_check(times == 12, "%d of 12 times are right", times);
    for (uint32_t k = 0; k < 2; k++) {
        uint32_t *order = xmalloc(m->A, sizeof *order);
        rng_permutation(order, m->A, s.draws.seed, k ? RNG_PERM_BACK : RNG_PERM, s.draws.step);
        wrong += memcmp(order, m->perm + k * m->A, m->A * sizeof *order) != 0;
        free(order);
    }
    test_check(wrong == 0, "permutations by other names");
    for (int vp = 0; vp < 2; vp++) {
        s.method.vp = vp;
        s.method.beta = (Range){0.4, 3};
        mols_noised(&s);
        for (size_t b = 0; b < m->B; b++) {
            Place v = place_of(m, b);
            double mu[2], sigma[2];
            for (size_t k = 0; k < 2; k++) {  // 2D -> 3D, 3D -> 2D
                double t = m->time[k * m->B + b] / 1000.0 * (1 - 1e-6) + 1e-6;
                double l = -t * t * (3 - 0.4) / 4 - t * 0.4 / 2;
                mu[k] = vp ? exp(l) : 1;
                sigma[k] = vp ? sqrt(1 - exp(2 * l)) : k ? 0.05 * pow(30, t)
                              : 0.3 * pow(2 / 0.3, t);
            }
            for (size_t x = 3 * v.atom; x < 3 * (v.atom + (size_t)v.N); x++)
                worst = fmax(worst, fabs(mu[0] * (double)m->pos[x] + 
                                         sigma[0] * (double)m->noise[x] -
                                         (double)m->q[x]));
            FOR_PAIRS(v, i, j) {
                size_t p = pair_row(&v, i, j);
                int both = i != j && m->bonded[v.atom + (size_t)i] && m->bonded[v.atom + (size_t)j];
                double adj = mu[1] * m->bond_type[p] + sigma[1] * (double)m->noise_adj[p];
                worst = fmax(worst, fabs(adj - (double)m->adj[p]));
                wrong += !both && (m->noise_adj[p] < 0 || m->noise_adj[p] > 0);
            }
            for (size_t x = V * v.atom; x < V * (v.atom + (size_t)v.N); x++) {
                int one = m->atom_feat[x / V * ATOM_FEATURES] == x % V;
                double element = m->bonded[x / V] ? one * mu[1] + sigma[1] * (double)m->noise_x[x]
                                                      : 0;
                worst = fmax(worst, fabs(element - (double)m->elements[x]));
            }
        }
    }
    test_check(worst < 1e-5 && wrong == 0, "noised: differs by %.1e, %d wrong", worst, wrong);
    sde_free(&s);
}

// The text of a file, in fresh memory.
static char *text_of(const char *path) {
    char *text = xmalloc(1 << 16, 1);
    FILE *f = fopen(path, "r");
    if (f && !fread(text, 1, (1 << 16) - 1, f)) *text = 0;
    if (f) fclose(f);
    return text;
}

typedef struct {
    Method method;
    Adam adam;
    double scale_3d, seed, batch, epochs, vp, use_3d;
} Settings;
static const Settings DEFAULTS = {
    {0, {0.2, 1}, {0.1, 1}, {0.2, 1}, 0, 0.1, 0.5, 1, 1, 1}, {5e-4, 0.9, 0.999, 1e-8, 0, 0},
    1, 1, 16, 3, 0, 0};

static const Shape options_shape = {16, 2, 8, 9, 2, 8, 4, 2, 2, 1, 0, 0};

// build/sdeo.safetensors has s's weights: `embed` gives means over the atoms.
static void check_embeddings(Sde *s, Dataset *data, uint32_t *ids) {
    double loss[TERMS];
    for (int use_3d = 0; use_3d < 2; use_3d++) {
        int unlike = 0;
        run_command(SDE " embed valid.bin --model build/sdeo.safetensors --encoder %s -o "
                    "build/sdeo.npy > build/sde.out 2> build/sde.err", use_3d ? "3d" : "2d");
        for (uint32_t i = 0; i < data->count; i++) ids[i] = i;
        s->training = 0;
        mols_load(&s->mols, data, ids, data->count, 0);
        mols_draw(s);
        losses(loss, s);
        FILE *npy = fopen("build/sdeo.npy", "rb");
        uint8_t number[4];
        int there = npy && fseek(npy, 128, SEEK_SET) == 0;
        for (size_t b = 0; b < data->count; b++)
            for (size_t c = 0; c < 16; c++) {
                double mean = 0;
                for (size_t i = s->mols.atom_start[b]; i < s->mols.atom_start[b + 1]; i++)
                    mean += (double)(use_3d ? s->a.y : s->a.x)[i * 16 + c] / s->mols.n_atoms[b];
                there = there && fread(number, 4, 1, npy) == 1;
                unlike += !there || !(fabs((double)get_f32(number) - mean) <
                                      1e-4 * fmax(1, fabs(mean)));
            }
        if (npy) fclose(npy);
        test_check(unlike == 0, "%d numbers of embeddings differ", unlike);
    }
}

// A step of pretraining by other settings than were asked for.
static void test_options(void) {
    static const struct { const char *args; size_t field; double value; } rows[] = {
        {"", offsetof(Settings, seed), 1}, {"--sde vp", offsetof(Settings, vp), 1},
        {"--sigma-3d-low 0.6", offsetof(Settings, method.ve3d.low), 0.6},
        {"--sigma-3d-high 3", offsetof(Settings, method.ve3d.high), 3},
        {"--sigma-2d-low 0.5", offsetof(Settings, method.ve2d.low), 0.5},
        {"--sigma-2d-high 3", offsetof(Settings, method.ve2d.high), 3},
        {"--anneal 1", offsetof(Settings, method.anneal), 1},
        {"--weight-contrast 3", offsetof(Settings, method.contrast), 3},
        {"--weight-3d 3", offsetof(Settings, method.to3d), 3},
        {"--weight-2d 3", offsetof(Settings, method.to2d), 3},
        {"--attention-dropout 0.7", offsetof(Settings, method.attention_dropout), 0.7},
        {"--lr 0.02", offsetof(Settings, adam.lr), 0.02},
        {"--scale-3d 9", offsetof(Settings, scale_3d), 9},
        {"--seed 7", offsetof(Settings, seed), 7}, {"--batch-size 11", offsetof(Settings, batch),
         11}};
    Dataset data;
    double base[2 * TERMS + 2] = {0};
    dataset_open(&data, "valid.bin");
    uint32_t *ids = xmalloc(data.count, sizeof *ids);
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
        Settings o = DEFAULTS;
        Sde s = {0};
        double loss[TERMS], all[2 * TERMS + 2], differs = 0;
        int wrong = 0;
        memcpy((char *)&o + rows[r].field, &rows[r].value, sizeof(double));
        o.method.vp = o.vp > 0;
        o.method.dropout = 0;
        sde_create(&s, options_shape, 1);
        model_init(&s.model, (uint64_t)o.seed);
        s.method = o.method;
        run_command(SDE " valid.bin --valid valid.bin" SMALL "--steps 2 %s -o "
                    "build/sdeo.safetensors > build/sde.out 2> build/sde.err", rows[r].args);
        char *csv = text_of("build/sdeo.log.csv");
        for (int step = 0; step < 2; step++) {
            Draws draws = {(uint64_t)o.seed, (uint32_t)step, 0, 1};
            plain_ids(ids, step, (int64_t)o.batch, (uint64_t)o.seed, data.count);
            double norm = sde_step(loss, &s, &data, ids, (size_t)o.batch, &o.adam, o.scale_3d,
                                   &draws,
                                   step + 1);
            for (int k = 0; k < TERMS; k++)
                wrong += !(fabs(csv_number(csv, 1 + step, 1 + k) / loss[k] - 1) < 1e-4);
            wrong += !(fabs(csv_number(csv, 1 + step, 1 + TERMS) / o.adam.lr - 1) < 1e-5);
            wrong += !(fabs(csv_number(csv, 1 + step, 2 + TERMS) / norm - 1) < 1e-3);
            memcpy(all + step * TERMS, loss, sizeof loss);
            all[2 * TERMS + step] = norm;
        }
        if (r == 0) memcpy(base, all, sizeof base);
        for (int k = 0; k < 2 * TERMS + 2; k++) differs = fmax(differs, fabs(all[k] / base[k] - 1));
        test_check(wrong == 0, "%s: %d numbers of the log are wrong:\n%s", rows[r].args, wrong,
                   csv);
        if (r == 0) check_embeddings(&s, &data, ids);
        test_check(r == 0 || differs > 1e-3, "%s: this test would not notice (%.1e)",
                   rows[r].args, differs);
        free(csv);
        sde_free(&s);
    }
    free(ids);
    dataset_close(&data);
}

// Mean and deviation of the two tasks' labels.
static void plain_statistics(float mean[2], float std[2], const Dataset *data) {
    Molecule m = {0};
    double sum[2][3] = {{0}};
    for (size_t i = 0; i < data->count; i++) {
        dataset_read(data, i, &m);
        for (int k = 0; k < 6; k++) sum[k / 3][k % 3] += pow((double)m.labels[k / 3], k % 3);
    }
    for (int y = 0; y < 2; y++) {
        mean[y] = (float)(sum[y][1] / sum[y][0]);
        std[y] = (float)sqrt(sum[y][2] / sum[y][0] - pow(sum[y][1] / sum[y][0], 2));
    }
    molecule_free(&m);
}

// `predict` says of valid.bin what the best epoch said, (n, 2).
static void check_predictions(const float *said, int n, const float std[2], const char *args) {
    int wrong = 0;
    run_command(SDE " predict valid.bin --model build/sdeo.safetensors > build/sde.out 2> "
                "build/sde.err");
    char *out = text_of("build/sde.out");
    for (int k = 0; k < 2 * n; k++)
        wrong += !(fabs(csv_number(out, 1 + k / 2, 1 + k % 2) - (double)said[k]) <
                   1e-3 * (double)std[k % 2]);
    test_check(wrong == 0, "%s: %d predictions are wrong:\n%.200s", args, wrong, out);
    free(out);
}

// Epochs of fine-tuning by other settings than were asked for.
static void test_tuning_options(void) {
    static const struct { const char *args; size_t field; double value; } tuned[] = {
        {"", offsetof(Settings, seed), 1}, {"--dropout 0.05", offsetof(Settings, method.dropout),
         0.05},
        {"--lr 0.05", offsetof(Settings, adam.lr), 0.05},
        {"--epochs 4", offsetof(Settings, epochs), 4},
        {"--encoder 3d", offsetof(Settings, use_3d), 1}};
    Dataset data;
    int earlier = 0;
    dataset_open(&data, "valid.bin");
    uint32_t *ids = xmalloc(data.count, sizeof *ids);
    for (size_t r = 0; r < sizeof tuned / sizeof *tuned; r++) {
        Settings o = DEFAULTS;
        float mean[2], std[2];
        double valid[8] = {0}, step_loss[64];
        float *said = xmalloc(2 * data.count, sizeof *said);
        int wrong = 0, best = 1;
        o.batch = 50;
        o.adam.lr = 1e-4;  // its own default
        memcpy((char *)&o + tuned[r].field, &tuned[r].value, sizeof(double));
        plain_statistics(mean, std, &data);
        Task aim = {.kind = TASK_REGRESSION, .mean = mean, .std = std};
        Shape c = options_shape;
        c.tasks = 2;
        c.use_3d = o.use_3d > 0;
        Sde s = {0};
        sde_create(&s, c, 1);
        model_init(&s.model, (uint64_t)o.seed);
        s.p.head.b[0] = s.p.head.b[1] = 0;
        s.method = o.method;
        run_command(SDE " finetune valid.bin --valid valid.bin --dim 16 --layers 2 --blocks 2 "
                    "--filters 8 --gaussians 9 --batch-size 50 --epochs 3 %s -o "
                    "build/sdeo.safetensors > build/sde.out 2> build/sde.err", tuned[r].args);
        char *csv = text_of("build/sdeo.log.csv"), *out = text_of("build/sde.out");
        for (int step = 0; step < 4 * (int)o.epochs; step++) {
            Adam adam = o.adam;
            int epoch = step / 4;
            adam.lr *= (1 + cos(acos(-1.0) * epoch / o.epochs)) / 2;
            plain_ids(ids, step, (int64_t)o.batch, (uint64_t)o.seed, data.count);
            s.draws = (Draws){(uint64_t)o.seed, (uint32_t)step, 0, 1};
            s.training = 1;
            mols_load(&s.mols, &data, ids, 50, 2);
            task_forward(&s);
            step_loss[step] = head_loss(&s, &aim);
            task_backward(&s);
            update(&s, &adam, 1, step + 1);
            if (step % 4 < 3) continue;
            epoch++;
            for (uint32_t i = 0; i < data.count; i++) ids[i] = i;
            s.draws.active = s.training = 0;
            mols_load(&s.mols, &data, ids, data.count, 2);
            task_forward(&s);
            for (size_t k = 0; k < 2 * data.count; k++)  // in deviations
                valid[epoch] += fabs((double)s.a.logits[k] - ((double)s.mols.labels[k] -
                                     (double)mean[k % 2]) / (double)std[k % 2]) / 2 /
                                (double)data.count;
            best = valid[epoch] < valid[best] ? epoch : best;
            for (size_t k = 0; k < 2 * data.count && best == epoch; k++)
                said[k] = s.a.logits[k] * std[k % 2] + mean[k % 2];
            double loss = 0;
            for (int k = 0; k < 4; k++) loss += step_loss[step - k] / 4;
            wrong += !(fabs(csv_number(csv, epoch, 1) / loss - 1) < 1e-4) ||
                     !(fabs(csv_number(csv, epoch, 2) / valid[epoch] - 1) < 1e-4) ||
                     (int)csv_number(csv, epoch, 3) != best;
        }
        const char *report = strstr(out, "valid:"), *mae = report ? strstr(report, "MAE ") : NULL;
        test_check(wrong == 0, "%s: %d epochs are wrong:\n%s", tuned[r].args, wrong, csv);
        test_check(mae && fabs(strtod(mae + 4, NULL) / valid[best] - 1) < 1e-4,
                   "%s: the best has %.6f, reported is %s", tuned[r].args, valid[best],
                   mae ? mae : "nothing");
        earlier += best < (int)o.epochs;
        check_predictions(said, (int)data.count, std, tuned[r].args);
        free(csv), free(out), free(said);
        sde_free(&s);
    }
    test_check(earlier > 0, "the best epoch is always the last");
    free(ids);
    dataset_close(&data);
}

// What is refused, and how.
static void test_messages(void) {
    static const struct { const char *args, *message; } rows[] = {
        {"nothing.bin", "nothing.bin"},
        {"train.bin --hidden 12", "--hidden: expected a multiple of 8"},
        {"train.bin --sde both", "--sde: expected ve or vp, found"},
        {"train.bin --dimension 3", "--dimension"},
        {"predict valid.bin --model build/sde1.safetensors", "task_names"},
        {"predict valid.bin", "--model: expected a checkpoint"},
        {"embed valid.bin --model data/mini.safetensors -o build/x.npy", "not a MoleculeSDE model"},
        {"generate valid.bin 200 --model build/sde1.safetensors -o build/x.sdf", "from 0 on"},
        {"generate valid.bin 0 --model build/sdef1.safetensors -o build/x.sdf", "pretrained"},
        {"build/sdeg1.bin -o build/x.safetensors", "have no positions"},
        {"finetune train.bin --task guess -o build/x.safetensors", "--task: expected"},
        {"finetune train.bin --epochs 2 --resume -o build/sded.safetensors", "do not fit"},
        {"embed valid.bin --model build/sdew.safetensors -o build/x.npy", "shapes make a model of"},
    };
    run_command("LC_ALL=C sed 's/moleblend.crc32/moleblend.crc--/; s/step\":\"29\"/step\":\"00\"/; "
                "s/\"log\":/\"lag\":/' build/sdef1.safetensors.state > "
                "build/sded.safetensors.state");
    float *wide = xmalloc(1 << 16, sizeof *wide);  // the GIN of such a width would have 170 GB
    TensorOut tensors[2] = {{"model_2D.gnns.0.mlp.0.weight", 1, 1, wide},
                            {"model_2D.atom_encoder.atom_embedding_list.0.weight", 1, 1 << 16,
                             wide}};
    tensor_file_write("build/sdew.safetensors", tensors, 2, "\"format\":\"pt\"");
    free(wide);
    for (size_t k = 0; k < sizeof rows / sizeof rows[0]; k++) {
        int code = run_command(SDE " %s > build/sde.out 2> build/sde.err", rows[k].args);
        int said = run_command("grep -q -e '%s' build/sde.err", rows[k].message) == 0;
        test_check(code == 1 && said, "%s: exit code %d, expected a message with \"%s\"",
                   rows[k].args, code, rows[k].message);
    }
}

// Outputs that are inputs, another's file, or not where they should be; parts of two splits.
static void test_outputs(void) {
    static const struct { const char *command; int code; const char *expected; } rows[] = {
        {"rm -rf build/so; mkdir build/so; printf 'smiles,name\nCCO,\"two\nlines\t.\"\nCC,$$$$\n' "
         "> "
         "build/so/n.csv; ./data_prep -o build/so/n.bin --name name build/so/n.csv; ./data_prep -o "
         "'build/so/{}.bin' --split 0.9,0.1 --split-by order --labels logP data/sample.sdf; "
         SDE " build/so/train.bin --dim 16 --layers 1 --blocks 1 --batch-size 8 --steps 2 -o "
         "build/so/m.safetensors && cksum build/so/* > build/so.sums", 0,
         "wrote build/so/m.safetensors"},
        {SDE " build/so/train.bin -o build/so/./train.bin", 1, "same file as the input"},
        {SDE " build/so/train.bin -o build/so/valid.bin", 1, "same file as the input"},
        {SDE " finetune build/so/train.bin --init build/so/m.safetensors -o build/so/m.safetensors",
         1, "same file as the input"},
        {"ln -sf so/m.safetensors build/so.link; " SDE " embed "
         "build/so/valid.bin --model build/so/m.safetensors -o build/so.link", 1, "same file as"},
        {SDE " embed build/so/valid.bin --model build/so/m.safetensors -o build/so/n.csv", 1,
         "build/so/n.csv: exists, and does not begin as the output"},
        {SDE " generate build/so/n.bin 0 --model build/so/m.safetensors -o build/so/n.bin", 1,
         "same file as the input"},
        {"cp data/ethanol.sdf build/so.sdf; " SDE " generate build/so/n.bin 0 --model "
         "build/so/m.safetensors -o build/so.sdf", 1, "build/so.sdf: exists, and does not begin"},
        {SDE " build/so/train.bin -o ''", 1, "-o: expected a file"},
        {SDE " build/so/train.bin -o -", 1, "-o: expected a file"},
        {SDE " --help > /dev/full", 1, "standard output: write failed"},
        {SDE " embed build/so/valid.bin --model build/so/m.safetensors -o - > /dev/full", 1,
         "standard output: write failed"},
        {"cksum build/so/* | cmp - build/so.sums", 0, ""},
        // a name of two lines, and one that ends a record: data_prep reads what is written
        {"rm build/so.sdf; for i in 0 1; do " SDE " generate build/so/n.bin $i --model "
         "build/so/m.safetensors --copies 2 --sample-steps 3 -o build/so.$i.sdf && ./data_prep "
         "--strict -o build/so/g.bin build/so.$i.sdf && ./data_prep --dump build/so/g.bin; done", 0,
         "{\"name\":\"two lines .\",\"atom_feat\""},
        {"./data_prep -o 'build/so/{}.bin' --split 0.8,0.2 --split-by order --labels logP "
         "data/sample.sdf; cp valid.bin build/so/valid.bin; " SDE " build/so/train.bin --dim 8 "
         "--layers 1 --blocks 1 --batch-size 4 --steps 1 -o build/so/x.safetensors", 0,
         "build/so/valid.bin: comes of another split than build/so/train.bin"},
    };
    for (size_t k = 0; k < sizeof rows / sizeof rows[0]; k++) {
        int code = run_command("{ %s\n} > build/sde.out 2>&1", rows[k].command);
        int said = !*rows[k].expected ||
                   run_command("grep -q -F -e '%s' build/sde.out", rows[k].expected) == 0;
        test_check(code == rows[k].code && said, "%s: exit code %d, expected %d and \"%s\"",
                   rows[k].command, code, rows[k].code, rows[k].expected);
    }
}

// A resumed run that goes on with other files or another run's state; two runs that write one file.
static void test_runs(void) {
#define RESUME SDE " build/sdem/train.bin --resume -o build/sdev.safetensors "
    static const struct { const char *command; int code; const char *said; } rows[] = {
        {"rm -rf build/sdev.* build/sdem build/sden; mkdir build/sdem; cp train.bin valid.bin "
         "build/sdem; " SDE " build/sdem/train.bin" SMALL "--steps 3 -o build/sdev.safetensors", 0,
         "run "},
        {RESUME "--valid ./valid.bin", 0, "resumed"},
        {RESUME "--valid train.bin", 1, "expected the validation set that the run began with"},
        {RESUME "--init data/moleculesde_mini.safetensors", 1, "expected the checkpoint"},
        {"mv build/sdem build/sden; " SDE " build/sden/train.bin --valid build/sden/valid.bin "
         "--resume -o build/sdev.safetensors", 0, "resumed"},
        {"mv build/sden build/sdem; " RESUME, 0, "resumed"},
        {SDE " valid.bin --resume --valid valid.bin -o build/sdev.safetensors", 1,
         "expected the training set that the run began with"},
        {"cp valid.bin 'build/a\nb'; " SDE " train.bin --valid 'build/a\nb'" SMALL "--steps 1 -o "
         "build/x.safetensors", 1, "--valid: expected no line break"},
        // an older run's output, and a new run that is killed before it saves
        {"cp build/sdev.safetensors build/sdeo.safetensors; cp build/sdev.safetensors.state build/"
         "sdeo.safetensors.state; rm -f build/sdeo.log.csv; { " SDE " train.bin" SMALL "--steps "
         "900000 --seed 7 --save-every 900000 -o build/sdeo.safetensors > build/sde.out & p=$!; "
         "i=0; while ! grep -qs ^2, build/sdeo.log.csv && [ $i -lt 3000 ]; do sleep 0.01; "
         "i=$((i+1)); done; kill -9 $p; wait $p; } 2> /dev/null; cmp build/sdeo.safetensors "
         "build/sdev.safetensors && LC_ALL=C grep -a -o '.seed 7' build/sdeo.safetensors.state >&2",
         0, "seed 7"},
        // two runs
        {"{ timeout -s KILL 2 " SDE " train.bin" SMALL "--steps 900000 -o build/sdel & } > build/"
         "sde.out 2>&1; sleep 0.5; " SDE " train.bin" SMALL "--steps 1 -o build/sdel.safetensors",
         1, "is writing it"},
    };
    for (size_t k = 0; k < sizeof rows / sizeof rows[0]; k++) {
        int code = run_command("{ %s; } > build/sde.out 2> build/sde.err", rows[k].command);
        int said = run_command("grep -q -e '%s' build/sde.err", rows[k].said) == 0;
        test_check(code == rows[k].code && said, "%s: exit code %d, expected %d and \"%s\"",
                   rows[k].command, code, rows[k].code, rows[k].said);
    }
    OutFile lock[2];  // it comes first: what the first run is writing is not touched
    out_open(&lock[0], "build/sdez.run", NULL);
    out_open(&lock[1], "build/sdez.safetensors.run", NULL);
    test_check(run_command("echo half > build/sdez.safetensors.tmp; ! " SDE " train.bin" SMALL
                           "-o build/sdez.safetensors 2> build/sde.err && grep -qx half "
                           "build/sdez.safetensors.tmp") == 0, "a second start has written");
    for (int k = 0; k < 2; k++) out_discard(&lock[k]);
}

// A golden file that would not notice a gradient 1 % too large, or a stage.
static void test_bundled(void) {
    static const char *const path = "data/moleculesde_mini.safetensors";
    TensorFile f;
    Report report = {0};
    Sde s;
    test_golden(path, 0);
    tensor_file_open(&f, path);
    golden_open(&s, &f, 1, NULL);
    run_all(&s);
    s.a.eps_hat[0] += 1e-2f;
    golden_stages(&report, &f, &s);
    gradients_of_losses(&s);
    for (int k = 0; k < s.p.to2d.pairs[0].in; k++) s.g.to2d.pairs[0].w[k] *= 1.05f;
    golden_gradients(&report, &f, &s, NULL, "spoiled", 0);
    int noticed = 0;
    for (int k = 0; k < report.count; k++)
        noticed += report.family[k].error > report.family[k].tolerance;
    test_check(noticed == 2, "of two spoiled numbers the golden file noticed %d", noticed);
    sde_free(&s);
    tensor_file_close(&f);
}

// Does the command line ask for this group?
static int test_wanted(const char *name, int argc, char **argv) {
    int without = argc > 1 && strcmp(argv[1], "--without") == 0, named = 0;
    for (int i = 1 + without; i < argc; i++) named |= strcmp(argv[i], name) == 0;
    return argc == 1 || named != without;
}

int main(int argc, char **argv) {
    static const struct { const char *name; void (*run)(void); } tests[] = {
        {"functions", test_functions}, {"normal numbers", test_normal}, {"GIN", test_gin},
        {"SchNet", test_schnet}, {"contrast", test_contrast}, {"2D -> 3D", test_to3d},
        {"3D -> 2D", test_to2d}, {"model", test_model}, {"fine-tuning head", test_head},
        {"rotation", test_rotation}, {"permutation", test_permutation}, {"shapes", test_shapes},
        {"program", test_program}, {"judging", test_judging}, {"messages", test_messages},
        {"outputs", test_outputs}, {"runs", test_runs}, {"drawn", test_drawn},
        {"options", test_options}, {"tuning options", test_tuning_options},
        {"golden file", test_bundled}};
    stop_at_failure = argc > 1 && strcmp(argv[1], "--stop") == 0;  // at the first
    argc -= stop_at_failure, argv += stop_at_failure;
    int only = argc > 2 && strcmp(argv[1], "--golden") == 0;
    for (int i = 2; i < argc && only; i++) test_golden(argv[i], 1);
    for (size_t k = 0; k < sizeof tests / sizeof tests[0] && !only; k++) {
        int passed = tests_passed, failed = tests_failed;
        double start = now_seconds();
        if (!test_wanted(tests[k].name, argc, argv)) continue;
        tests[k].run();
        printf("%-18s %3d passed, %d failed  %5.1f s\n", tests[k].name, tests_passed - passed,
               tests_failed - failed, now_seconds() - start);
        fflush(stdout);
    }
    printf("%d passed, %d failed\n", tests_passed, tests_failed);
    return tests_passed == 0 || tests_failed != 0;
}
