// test.c - every test of moleblend.c and data_prep.c. Build and run with `make test`.
//
//   ./test                        all tests; the last line is "N passed, N failed"
//   ./test NAME...                these groups of tests only: see the names at the end of this file
//   ./test --without NAME...      all but these
//   ./test --stop ...             ends at the first failure
//   ./test --golden FILE...       compares with golden files (numbers of the official modules) and
//                                 prints the largest relative error of every family of tensors
//
// The programs are compiled into this file, so that every function can be called; what concerns
// their command lines (messages, exit codes, resuming) runs ./moleblend and ./data_prep.
// A comparison is |a - b| <= tolerance * |b| in the Euclidean norm, and fails on NaN.

#if defined(__GNUC__) || defined(__clang__)
#pragma GCC diagnostic ignored "-Wunused-function"  // not every function has a test of its own
#endif
#define _POSIX_C_SOURCE 200809L  // these four as in moleblend.h, for the headers here
#define _ISOC11_SOURCE 1
#define _DARWIN_C_SOURCE 1
#define _FILE_OFFSET_BITS 64
#if defined(__unix__) || defined(__APPLE__)
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <time.h>
static int folders_flushed, files_flushed, flushed_late;  // late: flush_name was there by then
static const char *flush_name;

// fsync() that counts what it is asked for.
static int counting_fsync(int fd) {
    struct stat info;
    int folder = fstat(fd, &info) == 0 && S_ISDIR(info.st_mode);
    folders_flushed += folder;
    files_flushed += !folder;
    flushed_late += !folder && flush_name && access(flush_name, F_OK) == 0;
    return fsync(fd);
}
#define fsync counting_fsync

static double fake_wall, fake_cpu;  // seconds; fake_wall = 0: the clocks are true

// Clocks that a test can set.
static int faked_clock_gettime(clockid_t id, struct timespec *t) {
    int result = clock_gettime(id, t);
    if (fake_wall <= 0) return result;
    t->tv_sec = (time_t)fake_wall;
    t->tv_nsec = (long)(1e9 * (fake_wall - (double)t->tv_sec));
    return result;
}
static clock_t faked_clock(void) {
    return fake_wall > 0 ? (clock_t)(fake_cpu * CLOCKS_PER_SEC) : clock();
}
#define clock_gettime faked_clock_gettime
#define clock faked_clock
#endif
#define MB_PROGRAM "test"
#define MOLEBLEND_TEST
#define DATA_PREP_TEST
#include "moleblend.c"
#include "data_prep.c"

#include "tests/harness.h"  // test_check(), Report: counting; tensor_number(), csv_number()

// =================================================================================================
// Comparing
// =================================================================================================

// |a - b| / |b| in the Euclidean norm; infinite if b is 0 and a is not; NaN stays NaN.
static double relative_error(const float *a, const float *b, size_t n) {
    double difference = 0, norm = 0;
    for (size_t k = 0; k < n; k++) {
        double d = (double)a[k] - (double)b[k];
        difference += d * d;
        norm += (double)b[k] * (double)b[k];
    }
    if (difference == 0) return 0;
    return norm > 0 || isnan(norm) ? sqrt(difference / norm) : (double)INFINITY;
}

static void test_close(const float *a, const float *b, size_t n, double tolerance,
                       const char *what) {
    double error = relative_error(a, b, n);
    test_check(error <= tolerance, "%s: relative error %.2e, tolerance %.0e", what, error,
               tolerance);
}

// =================================================================================================
// Golden files: layout and formulas are described in data/README.md
// =================================================================================================

static double meta_number(const TensorFile *f, const char *key) {
    const char *text = tensor_meta(f, key);
    CHECK(text, "%s: metadata %s is missing", f->path, key);
    return strtod(text, NULL);
}

// Number k of a metadata list "a,b,c" (or "[a, b, c]"); the only one if it is a single number.
static double meta_number_at(const TensorFile *f, const char *key, int k) {
    const char *text = tensor_meta(f, key);
    CHECK(text, "%s: metadata %s is missing", f->path, key);
    for (; k > 0 && strpbrk(text, ", "); k--) {
        text = strpbrk(text, ", ");
        text += strspn(text, ", ");
    }
    return strtod(text + strspn(text, "[ "), NULL);
}

// Weight of loss k in a metadata list such as "denoise 6, spd 0.1, edge 0.1, d3 0.5".
static double meta_weight(const TensorFile *f, const char *name) {
    const char *text = tensor_meta(f, "weights"), *at = text ? strstr(text, name) : NULL;
    CHECK(at, "%s: metadata weights is missing", f->path);
    return strtod(at + strlen(name), NULL);
}

// The floats of a tensor, in fresh memory.
static float *tensor_floats(const TensorFile *f, const char *name, size_t *count) {
    const TensorEntry *t = tensor_find(f, name);
    CHECK(t, "%s: tensor %s is missing", f->path, name);
    float *x = xmalloc(t->count, sizeof *x);
    for (size_t k = 0; k < t->count; k++) x[k] = (float)tensor_number(t, k);
    if (count) *count = t->count;
    return x;
}

// Tensor "GROUP/INDEX/NAME" of a golden file, or NULL.
static const TensorEntry *golden_tensor(const TensorFile *f, const char *group, size_t index,
                                        const char *name) {
    char full[128];
    snprintf(full, sizeof full, "%s/%zu/%s", group, index, name);
    return tensor_find(f, full);
}

static uint64_t splitmix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

// The hash from which element e of tensor `name` is made in files that hold no parameters.
static uint64_t formula_hash(const char *name, size_t e) {
    uint64_t h = 0xcbf29ce484222325u;  // FNV-1a
    for (; *name; name++) h = (h ^ (unsigned char)*name) * 0x100000001b3u;
    return splitmix64(h + e);
}

// Parameters by formula (data/README.md).
static void formula_params(const Model *model) {
    for (int i = 0; i < model->n_tensors; i++) {
        const TensorInfo *t = &model->info[i];
        const char *name = t->name;
        int norm = strstr(name, "layer_norm") || strstr(name, "LayerNorm");
        int bias = strstr(name, ".bias") && !strstr(name, "gbf.bias.weight");
        int table = (strstr(name, "atom_feature.") || strstr(name, "molecule_attn_bias.")) &&
                    !strstr(name, "edge_dis_encoder");
        for (size_t e = 0; e < t->count; e++) {
            double v = (double)(formula_hash(name, e) >> 40) / 8388608.0 - 1.0, x;
            if (norm) x = bias ? 0.1 * v : 1 + 0.2 * v;
            else if (strstr(name, "gbf.means") || strstr(name, "gbf.stds")) x = 1.5 + 1.5 * v;
            else if (strstr(name, "gbf.mul")) x = 0.5 + 0.2 * v;
            else if (strstr(name, "gbf.bias")) x = 0.2 * v;
            else if (table) x = 0.5 * v;
            else x = bias ? 0.1 * v : 0.25 * v;
            int padded =
                t->rule == INIT_TABLE || strstr(name, "gbf.mul") || strstr(name, "gbf.bias");
            model->params[t->offset + e] = padded && e < t->columns ? 0.0f : (float)x;
        }
    }
}

// Molecule i of a golden file.
static void golden_molecule(Molecule *m, const TensorFile *f, size_t i) {
    const TensorEntry *feat = golden_tensor(f, "mol", i, "atom_feat"), *bonds, *bond_feat, *pos;
    bonds = golden_tensor(f, "mol", i, "bonds");
    bond_feat = golden_tensor(f, "mol", i, "bond_feat");
    pos = golden_tensor(f, "mol", i, "pos");
    CHECK(feat && bonds && bond_feat, "%s: molecule %zu is incomplete", f->path, i);
    molecule_resize(m, (int)feat->shape[0], (int)bonds->shape[0], 0, 0);
    for (size_t k = 0; k < feat->count; k++) m->atom_feat[k] = (uint8_t)tensor_number(feat, k);
    for (size_t k = 0; k < bonds->count; k++) m->bonds[k] = (uint16_t)tensor_number(bonds, k);
    for (size_t k = 0; k < bonds->shape[0]; k++)
        m->bond_code[k] = (uint8_t)(12 * tensor_number(bond_feat, 3 * k) +
                                    2 * tensor_number(bond_feat, 3 * k + 1) +
                                    tensor_number(bond_feat, 3 * k + 2));
    m->has_pos = pos != NULL;
    for (size_t k = 0; pos && k < pos->count; k++) m->pos[k] = (float)tensor_number(pos, k);
}

// A golden file, and our model and batch made from it.
typedef struct {
    TensorFile file;
    Step s;  // without dropout
    int finetune;
    Task task;
    float mean[16], std[16];
    Adam adam;
    size_t part;             // molecules of a part
    float *part_sum;
} Golden;

// Puts molecules first..first+B-1 of a golden file into its batch, with their blend and noise.
static void golden_load(Golden *g, size_t first, size_t B) {
    int Y = g->s.model.config.tasks, *n_atoms = xmalloc(B, sizeof *n_atoms);
    for (size_t b = 0; b < B; b++) {
        const TensorEntry *feat = golden_tensor(&g->file, "mol", first + b, "atom_feat");
        CHECK(feat, "%s: molecule %zu is missing", g->file.path, first + b);
        n_atoms[b] = (int)feat->shape[0];
    }
    g->s.batch.Y = Y;
    batch_layout(&g->s.batch, (idx)B, n_atoms);
    free(n_atoms);
    float *labels = Y ? tensor_floats(&g->file, "labels", NULL) : NULL;
    Molecule m = {0};
    for (size_t b = 0; b < B; b++) {
        golden_molecule(&m, &g->file, first + b);
        molecule_resize(&m, m.n_atoms, m.n_bonds, Y, 0);
        if (Y) memcpy(m.labels, labels + (first + b) * (size_t)Y, sizeof(float) * (size_t)Y);
        batch_set(&g->s.batch, b, &m);
        const TensorEntry *noise = golden_tensor(&g->file, "mol", first + b, "noise");
        const TensorEntry *blend = golden_tensor(&g->file, "mol", first + b, "blend");
        const TensorEntry *feat_blend = golden_tensor(&g->file, "mol", first + b, "feat_blend");
        size_t a0 = g->s.batch.atom_start[b], p0 = g->s.batch.pair_start[b];
        if (g->finetune) batch_use(&g->s.batch, b, g->task.use);
        for (size_t k = 0; blend && k < blend->count; k++)
            g->s.batch.pair_use[p0 + k] = (uint8_t)(1 << (int)tensor_number(blend, k));
        for (size_t k = 0; feat_blend && k < feat_blend->count; k++)
            g->s.batch.atom_use[a0 + k] = tensor_number(feat_blend, k) ? USE_3D : USE_SPD;
        for (size_t k = 0; noise && k < noise->count; k++)
            g->s.batch.noise[3 * a0 + k] = (float)tensor_number(noise, k);
        batch_pairs(&g->s.batch, b);
    }
    batch_count(&g->s.batch);
    molecule_free(&m);
    free(labels);
}

static int meta_is(const TensorFile *f, const char *key, const char *value) {
    const char *text = tensor_meta(f, key);
    return text && strcmp(text, value) == 0;
}

static void golden_open(Golden *g, const char *path) {
    *g = (Golden){0};
    TensorFile *f = &g->file;
    tensor_file_open(f, path);
    Config c = {(int)meta_number(f, "layers"),  (int)meta_number(f, "dim"),
                (int)meta_number(f, "ffn"),     (int)meta_number(f, "heads"),
                (int)meta_number(f, "kernels"), 0};
    g->finetune = tensor_meta(f, "task") != NULL;
    if (g->finetune) {
        c.tasks = (int)meta_number(f, "n_tasks");
        CHECK(c.tasks <= 16, "%s: expected at most 16 tasks, found %d", path, c.tasks);
        g->task.kind = meta_is(f, "task", "classification") ? TASK_CLASSIFICATION : TASK_REGRESSION;
        g->task.readout = meta_is(f, "readout", "cls") ? READ_CLS
                          : meta_is(f, "readout", "mean") ? READ_MEAN : READ_SUM;
        if (meta_is(f, "use_2d", "True")) g->task.use |= USE_SPD | USE_EDGE;
        if (meta_is(f, "use_3d", "True")) g->task.use |= USE_3D;
        for (int y = 0; y < c.tasks; y++) {
            g->mean[y] = (float)meta_number_at(f, "label_mean", y);
            g->std[y] = (float)meta_number_at(f, "label_std", y);
        }
        g->task.mean = g->mean;
        g->task.std = g->std;
        g->task.label_units = 1;  // the release's loss
    } else {
        g->s.weights = (LossWeights){{0, meta_weight(f, "denoise "), meta_weight(f, "spd "),
                                    meta_weight(f, "edge "), meta_weight(f, "d3 ")}};
    }
    g->adam =
        (Adam){meta_number(f, "lr"),  meta_number(f, "beta1"),        meta_number(f, "beta2"),
               meta_number(f, "eps"), meta_number(f, "weight_decay"), meta_number(f, "clip_norm")};
    model_create(&g->s.model, c, 1);
    formula_params(&g->s.model);  // also for tensors that the file lacks because none are used
    for (int i = 0; i < g->s.model.n_tensors && !tensor_meta(f, "params"); i++)
        tensor_load(g->s.model.params, &g->s.model.info[i], f, "param/");
    golden_load(g, 0, (size_t)meta_number(f, "n_mols"));
}

static void golden_close(Golden *g) {
    tensor_file_close(&g->file);
    step_close(&g->s);
    free(g->part_sum);
}

// Compares ours with tensor out/b/name, if the file has it.
static void golden_output(Report *r, const Golden *g, size_t b, const char *name, const float *ours,
                          double tolerance) {
    const TensorEntry *t = golden_tensor(&g->file, "out", b, name);
    if (!t) return;
    float *expected = xmalloc(t->count, sizeof *expected);
    for (size_t k = 0; k < t->count; k++) expected[k] = (float)tensor_number(t, k);
    report_add(r, name, relative_error(ours, expected, t->count), tolerance);
    free(expected);
}

// Relations and encoder: spd, embed, attn_bias, layerN of every molecule.
static void golden_encoder(Report *r, Golden *g) {
    const Batch *batch = &g->s.batch;
    int C = g->s.model.config.dim, H = g->s.model.config.heads;
    for (idx b = 0; b < batch->B; b++) {
        View v = batch_view(batch, b);
        const TensorEntry *spd = golden_tensor(&g->file, "out", b, "spd");
        int wrong = 0;
        for (size_t k = 0; spd && k < spd->count; k++)
            wrong += tensor_number(spd, k) != batch->spd[batch->pair_start[b] + k];
        if (spd) report_add(r, "spd", wrong, 1e-30);
        golden_output(r, g, b, "attn_bias", g->s.bias->attn_bias + H * v.square, 1e-5);
        for (int l = 0; l <= g->s.model.config.layers; l++) {
            char name[32] = "embed";
            if (l) snprintf(name, sizeof name, "layer%d", l);
            const float *x = g->s.enc->x + (size_t)l * batch->T * (size_t)C;
            golden_output(r, g, b, name, x + v.token * (size_t)C, 1e-5);
        }
    }
}

// Gradients (print: name the bad ones), as whole tensors (grad/NAME) or as five sums
// (gradsum/NAME). A gradient that is zero in exact arithmetic (that of a key bias, or below 1e-7 of
// the norm of all gradients) holds only rounding: compared with that norm, not with its own.
static void golden_gradients(Report *r, const Golden *g, int print) {
    double norm = gradient_norm(&g->s.model);
    int compared = 0;
    for (int i = 0; i < g->s.model.n_tensors; i++) {
        const TensorInfo *t = &g->s.model.info[i];
        const float *ours = g->s.model.grads + t->offset;
        const char *name = t->name;
        const TensorEntry *full = tensor_find_official(&g->file, "grad/", name);
        const TensorEntry *entry =
            full ? full : tensor_find_official(&g->file, "gradsum/", name);
        if (!entry) continue;
        CHECK(entry->count == (full ? t->count : 5), "%s: tensor %s: expected %zu numbers",
              g->file.path, entry->name, full ? t->count : 5);
        compared++;
        double part[5] = {0}, square = 0, gap = 0;
        for (size_t e = 0; e < t->count && !full; e++) {
            uint64_t h = formula_hash(name, e);
            part[0] += (double)ours[e] * (double)ours[e];
            for (int k = 0; k < 4; k++) part[k + 1] += (double)ours[e] * (h >> k & 1 ? -1 : 1);
        }
        part[0] = sqrt(part[0]);
        for (size_t k = 0; k < entry->count; k++) {
            double expected = tensor_number(entry, k), found = full ? (double)ours[k] : part[k];
            square += expected * expected;
            gap += (found - expected) * (found - expected);
        }
        if (strstr(name, "k_proj.bias") || sqrt(square) < 1e-7 * norm) {
            report_add(r, "gradients that are zero", sqrt(gap) / norm, 1e-6);
            continue;
        }
        double error = sqrt(gap / square);
        report_add(r, "gradients", error, 1e-4);
        if (print && !(error <= 1e-4)) printf("  gradient of %s: error %.2e\n", name, error);
    }
    test_check(compared > 20, "%s: only %d gradients compared", g->file.path, compared);
}

// The first losses and ten steps of AdamW on the same batch.
static void golden_steps(Report *r, Golden *g, double first[LOSSES]) {
    size_t steps = 0, columns = g->finetune ? 1 : LOSSES;
    float *loss = tensor_floats(&g->file, "loss", NULL);
    float *trace = tensor_floats(&g->file, "train/losses", &steps);
    float *norms = g->finetune ? NULL : tensor_floats(&g->file, "train/grad_norms", NULL);
    static const int order[LOSSES] = {LOSS_TOTAL, LOSS_NOISE, LOSS_SPD, LOSS_EDGE, LOSS_3D};
    for (size_t k = 0; k < columns; k++) {
        float ours = (float)first[order[k]];
        report_add(r, "loss", relative_error(&ours, loss + k, 1), 1e-5);
    }
    for (size_t s = 0; s < steps / columns; s++) {
        double now[LOSSES];
        if (g->finetune) task_gradients(now, &g->s, &g->task);
        else gradients(now, &g->s);
        for (size_t k = 0; k < columns; k++) {
            float ours = (float)now[order[k]];
            report_add(r, "losses of ten steps", relative_error(&ours, trace + s * columns + k, 1),
                       1e-4);
        }
        // ten steps enlarge rounding: builds differ from the official norm by 6e-6 (x87) to 1.3e-4
        // (every one that adds up in the order of the source)
        float norm = (float)adamw_step(&g->s.model, &g->adam, (int64_t)s + 1);
        if (norms) report_add(r, "gradient norms", relative_error(&norm, norms + s, 1), 3e-4);
    }
    FREE_ALL(loss, trace, norms);
}

// Losses and gradients of the whole batch, made in parts of g->part molecules.
static void golden_parts(double loss[LOSSES], Golden *g, size_t B) {
    double count[LOSSES], now[LOSSES];
    size_t M = g->part, parts = (B + M - 1) / M;
    golden_load(g, 0, B);
    memcpy(count, g->s.batch.count, sizeof count);
    free(g->part_sum);
    g->part_sum = floats_alloc((size_t)g->s.model.count, "");
    loss[LOSS_TOTAL] = 0;
    for (size_t k = 0; k < parts; k++) {
        golden_load(g, k * M, min_size(M, B - k * M));
        memcpy(g->s.batch.count, count, sizeof count);
        if (g->finetune) task_gradients(now, &g->s, &g->task);
        else gradients(now, &g->s);
        loss[LOSS_TOTAL] += now[LOSS_TOTAL];
        ranks_add(g->part_sum, g->s.model.grads, g->s.model.count, (idx)k, (idx)parts);
    }
}

// Everything a golden file holds.
static void test_golden(const char *path, int print) {
    Golden g;
    Report report = {0};
    golden_open(&g, path);
    if (print) printf("%s\n", path);
    size_t B = (size_t)g.s.batch.B;
    double loss[LOSSES] = {0};
    if (g.finetune) {
        size_t count = 0;
        float *expected = tensor_floats(&g.file, "out/logits", &count);
        task_gradients(loss, &g.s, &g.task);
        report_add(&report, "logits", relative_error(g.s.task_arrays->logits, expected, count),
                   1e-5);
        free(expected);
    } else {
        float *spd = g.s.logits[LOSS_SPD] = xmalloc(g.s.batch.P * SPD_CLASSES, sizeof *spd);
        float *edge = g.s.logits[LOSS_EDGE] = xmalloc(g.s.batch.P * EDGE_OUTPUTS, sizeof *edge);
        float *d3 = g.s.logits[LOSS_3D] = xmalloc(g.s.batch.P * 3, sizeof *d3);
        encoder_forward(&g.s);
        pretrain_heads(loss, &g.s, 0);
        for (size_t b = 0; b < B; b++) {
            size_t p0 = g.s.batch.pair_start[b], N = (size_t)g.s.batch.n_atoms[b];
            for (size_t i = 0; i < N; i++)
                memset(d3 + 3 * (p0 + i * N + i), 0,
                       3 * sizeof(float));  // defined as zero there
            golden_output(&report, &g, b, "spd_logits", spd + p0 * SPD_CLASSES, 1e-5);
            golden_output(&report, &g, b, "edge_logits", edge + p0 * EDGE_OUTPUTS, 1e-5);
            golden_output(&report, &g, b, "d3_pred", d3 + 3 * p0, 1e-5);
            golden_output(&report, &g, b, "denoise_pred",
                          g.s.heads->denoise_out + 3 * g.s.batch.atom_start[b], 1e-5);
        }
        FREE_ALL(spd, edge, d3);
        g.s.logits[LOSS_SPD] = g.s.logits[LOSS_EDGE] = g.s.logits[LOSS_3D] = NULL;
        gradients(loss, &g.s);
    }
    golden_encoder(&report, &g);
    golden_gradients(&report, &g, 1);
    double part_loss[LOSSES];
    for (g.part = 1; g.part < B; g.part++) {  // the batch in parts: the same sums
        golden_parts(part_loss, &g, B);
        report_add(&report, "loss in parts", fabs(part_loss[LOSS_TOTAL] / loss[LOSS_TOTAL] - 1),
                   1e-5);
        golden_gradients(&report, &g, 1);
    }
    golden_load(&g, 0, B);
    golden_steps(&report, &g, loss);
    report_finish(&report, path, print);
    golden_close(&g);
}

// =================================================================================================
// Arithmetic: elementary functions, random numbers, matrix products
// =================================================================================================

// Deterministic test data in [-1, 1).
static float test_number(size_t k) {
    return 2.0f * rng_uniform(7, 99, 0, (uint32_t)(k >> 20), (uint32_t)k) - 1.0f;
}

static void fill(float *x, size_t n, size_t first, float scale) {
    for (size_t k = 0; k < n; k++) x[k] = scale * test_number(first + k);
}

// Elementary functions against libm, in units of the last place of a float.
static void test_functions(void) {
    double worst_exp = 0, worst_cdf = 0, worst_slope = 0;
    for (int k = -8000; k <= 8000; k++) {
        float x = (float)k * 0.01f, density, y = (float)k * 0.00125f;
        double e = exp((double)x), phi = 0.5 * erfc(-(double)y / sqrt(2.0));
        double slope =
            phi + (double)y * exp(-0.5 * (double)y * (double)y) / sqrt(6.283185307179586);
        worst_exp = fmax(worst_exp, fabs((double)exp_fast(x) / e - 1));
        worst_cdf = fmax(worst_cdf, fabs((double)normal_cdf(y, &density) / phi - 1));
        worst_slope = fmax(worst_slope, fabs((double)gelu_slope(y) - slope));
    }
    double ulp = (double)FLT_EPSILON;
    test_check(worst_exp < 2 * ulp, "exp_fast: %.1f ulp", worst_exp / ulp);
    test_check(worst_cdf < 50 * ulp, "normal_cdf: %.1f ulp",
               worst_cdf / ulp);  // e^(-x^2/2) at x = -10
    test_check(worst_slope < 4 * ulp, "gelu_slope: %.1f ulp of 1", worst_slope / ulp);
    test_check(gelu(0.0f) == 0.0f && exp_fast(0.0f) == 1.0f, "gelu(0), exp(0)");
    test_check(exp_fast(SCORE_MASK) < 1e-37f, "masked score");
}

// Philox against the known answers published with Random123, CRC-32 against its check value.
static void test_random(void) {
    static const struct { Philox counter; uint64_t key; Philox expected; } known[] = {
        {{{0, 0, 0, 0}}, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
        {{{~0u, ~0u, ~0u, ~0u}}, ~(uint64_t)0, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
        {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0x299f31d0a4093822,
         {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}}};
    for (int k = 0; k < 3; k++) {
        Philox got = philox(known[k].counter, known[k].key);
        test_check(memcmp(&got, &known[k].expected, sizeof got) == 0,
                   "Philox4x32-10, known answer %d", k);
    }
    test_check(crc32_add(0, (const uint8_t *)"123456789", 9) == 0xcbf43926u, "CRC-32 check value");
    uint32_t words[4][BLOCKS];
    Philox counter = {{5, 6, 7, 8}};
    philox_blocks(words, BLOCKS, counter, 99);
    int equal = 1;
    for (uint32_t k = 0; k < BLOCKS; k++, counter.word[0]++)
        for (int i = 0; i < 4; i++) equal = equal && words[i][k] == philox(counter, 99).word[i];
    test_check(equal, "philox_blocks() is philox()");
    double sum = 0, square = 0;
    for (uint32_t k = 0; k < 20000; k++) {
        double x = (double)rng_normal(1, RNG_NOISE, 0, 0, k);
        sum += x;
        square += x * x;
    }
    test_check(fabs(sum / 20000) < 0.03 && fabs(square / 20000 - 1) < 0.04, "normal draws");
    uint32_t order[1000], seen[1000] = {0}, fixed = 0;
    rng_permutation(order, 1000, 3, RNG_SHUFFLE, 0);
    for (uint32_t k = 0; k < 1000; k++) {
        seen[order[k]]++;
        fixed += order[k] == k;
    }
    int once = 1;
    for (int k = 0; k < 1000; k++) once = once && seen[k] == 1;
    test_check(once && fixed < 10, "permutation");
    Draws draws = {5, 2, 0, 1};
    float mask[4001], again[4001];
    double kept = 0;
    dropout_row(mask, 4001, 0.1, &draws, RNG_ACTIVATION_DROP, 3, 8);
    dropout_row(again, 4001, 0.1, &draws, RNG_ACTIVATION_DROP, 3, 9);
    int values = 1, same = 0;
    for (int k = 0; k < 4001; k++) {
        values = values && (mask[k] == 0 || mask[k] == (float)(1 / 0.9));
        kept += mask[k] > 0;
        same += mask[k] == again[k];
    }
    test_check(values && fabs(kept / 4001 - 0.9) < 0.02, "dropout keeps %.3f of 0.9", kept / 4001);
    test_check(same < 3500, "rows have masks of their own");
}

// The contract of gemm(), in double.
static void gemm_reference(int trans_a, int trans_b, int M, int N, int K, const float *A, int lda,
                           const float *B, int ldb, const float *bias, int add, float *C, int ldc) {
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) {
            double sum = add ? (double)C[(size_t)i * ldc + j] : bias ? (double)bias[j] : 0.0;
            for (int k = 0; k < K; k++)
                sum += (double)(trans_a ? A[(size_t)k * lda + i] : A[(size_t)i * lda + k]) *
                       (double)(trans_b ? B[(size_t)j * ldb + k] : B[(size_t)k * ldb + j]);
            C[(size_t)i * ldc + j] = (float)sum;
        }
    }
}

// gemm() and small_product() against the reference, over sizes around the edges of its blocks.
// Bound: the rounding of K products and sums, of |a| |b| <= 1.
static void test_gemm(void) {
#ifdef PLAIN_C
    enum { MR = 4, NR = 4, KC = 256 };  // has no blocks
#endif
    static const int sizes[] = {1,      2,  MR - 1, MR, MR + 1, VEC, 2 * VEC,
                                NR - 1, NR, NR + 1, 61, KC + 1};
    enum { MOST = KC + 1, COUNT = sizeof sizes / sizeof sizes[0] };
    size_t n = (size_t)MOST * MOST;
    float *A = xmalloc(n, 4), *B = xmalloc(n, 4), *C = xmalloc(n, 4), *D = xmalloc(n, 4);
    float *bias = xmalloc(MOST, 4);
    fill(A, n, 0, 1);
    fill(B, n, n, 1);
    fill(bias, MOST, 5, 1);
    int wrong = 0, tried = 0;
    for (int s = 0; s < COUNT * COUNT * COUNT; s++) {
        int M = sizes[s % COUNT], N = sizes[s / COUNT % COUNT], K = sizes[s / COUNT / COUNT];
        if ((M > 100) + (N > 100) + (K > 100) > 1) continue;
        for (int mode = 0; mode < 4; mode++) {
            int ta = mode & 1, tb = mode >> 1, add = (s + mode) % 3 == 0;
            int lda = (ta ? M : K) + mode, ldb = (tb ? K : N) + 1, ldc = N + 2;
            if (lda > MOST || ldb > MOST || ldc > MOST) lda = ta ? M : K, ldb = tb ? K : N, ldc = N;
            fill(C, (size_t)M * ldc, 3 * n, 1);
            memcpy(D, C, (size_t)M * ldc * sizeof *C);
            gemm(ta, tb, M, N, K, A, lda, B, ldb, add ? NULL : bias, add, C, ldc);
            gemm_reference(ta, tb, M, N, K, A, lda, B, ldb, add ? NULL : bias, add, D, ldc);
            double bound = 2 * ((double)K + 2) * (double)FLT_EPSILON;
            for (size_t k = 0; k < (size_t)M * ldc; k++)
                wrong += !(fabs((double)C[k] - (double)D[k]) <= bound);
            tried++;
        }
    }
    test_check(wrong == 0, "gemm: %d wrong numbers in %d products", wrong, tried);
    for (int m = 1; m < 40; m += 3) {
        int cols = (m + 5 + VEC - 1) / VEC * VEC;
        small_product(C, cols, A, 50, 1, B, cols, m, cols, 37);
        gemm_reference(0, 0, m, cols, 37, A, 50, B, cols, NULL, 0, D, cols);
        test_close(C, D, (size_t)m * cols, 1e-6, "small_product");
        small_product(C, cols, A, 1, 50, B, cols, m, cols, 37);
        gemm_reference(1, 0, m, cols, 37, A, 50, B, cols, NULL, 0, D, cols);
        test_close(C, D, (size_t)m * cols, 1e-6, "small_product, transposed");
    }
    free(A), free(B), free(C), free(D), free(bias);
}

// =================================================================================================
// Molecules and batches for the tests
// =================================================================================================

// A random connected-or-not molecule: a tree with some extra bonds, `parts` pieces.
static void random_molecule(Molecule *m, int N, int parts, int has_pos, uint32_t seed) {
    int n_bonds = 0;
    molecule_resize(m, N, 2 * N, 2, 4);
    for (int i = 0; i < N * ATOM_FEATURES; i++)
        m->atom_feat[i] = (uint8_t)(rng_bits(seed, 50, 0, 0, (uint32_t)i) %
                                    ATOM_FEATURE_SIZES[i % ATOM_FEATURES]);
    for (int i = 0; i < N; i++) {
        uint32_t bits = rng_bits(seed, 51, 0, 0, (uint32_t)i);
        if (i >= parts && i > 0) {  // to an earlier atom of the same piece
            int earlier =
                i - parts * (int)(1 + bits % (uint32_t)max_int(1, i / parts > 3 ? 3 : i / parts));
            m->bonds[2 * n_bonds] = (uint16_t)i;
            m->bonds[2 * n_bonds + 1] = (uint16_t)max_int(earlier, i % parts);
            m->bond_code[n_bonds++] = (uint8_t)(bits / 7 % BOND_CODES);
        }
        if (i >= 6 * parts && bits % 4 == 0) {  // a ring
            m->bonds[2 * n_bonds] = (uint16_t)(i - 5 * parts);
            m->bonds[2 * n_bonds + 1] = (uint16_t)i;
            m->bond_code[n_bonds++] = (uint8_t)(bits / 11 % BOND_CODES);
        }
        for (int k = 0; k < 3; k++)
            m->pos[3 * i + k] = 3.0f * rng_normal(seed, 52, 0, 0, (uint32_t)(3 * i + k));
    }
    m->n_bonds = n_bonds;
    m->has_pos = has_pos;
    m->labels[0] = test_number(seed);
    m->labels[1] = seed % 3 ? (float)(seed % 2) : NAN;
    memcpy(m->name, "mol ", 4);
}

// Shortest paths as the release finds them: Floyd-Warshall, k outermost, strict test, and the path
// rebuilt by recursion.
static int floyd_path(const int *via, int N, int i, int j, int *atoms) {
    int k = via[i * N + j];
    if (k < 0) return 0;
    int n = floyd_path(via, N, i, k, atoms);
    atoms[n++] = k;
    return n + floyd_path(via, N, k, j, atoms + n);
}

// Another path among several shortest ones, a wrong length, an empty slot that is not empty.
static void test_relations(void) {
    enum { MOST = 40 };
    Molecule m = {0};
    int wrong_spd = 0, wrong_path = 0, pairs = 0;
    for (uint32_t trial = 0; trial < 60; trial++) {
        int N = 1 + (int)(trial * 7 % MOST), d[MOST * MOST], via[MOST * MOST], code[MOST * MOST];
        Step step = {0};
        random_molecule(&m, N, 1 + (int)trial % 3, 1, trial);
        batch_layout(&step.batch, 1, &N);
        Batch batch = step.batch;
        batch_set(&batch, 0, &m);
        for (int k = 0; k < N * N; k++) d[k] = SPD_UNREACHABLE, via[k] = -1;
        for (int i = 0; i < N; i++) d[i * N + i] = 0;
        for (int k = 0; k < m.n_bonds; k++) {
            int a = m.bonds[2 * k], b = m.bonds[2 * k + 1];
            d[a * N + b] = d[b * N + a] = 1;
            code[a * N + b] = code[b * N + a] = m.bond_code[k];
        }
        for (int k = 0; k < N; k++)
            for (int i = 0; i < N; i++)
                for (int j = 0; j < N; j++)
                    if (d[i * N + j] > d[i * N + k] + d[k * N + j])
                        d[i * N + j] = d[i * N + k] + d[k * N + j], via[i * N + j] = k;
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++, pairs++) {
                int atoms[MOST + 2] = {i}, length = d[i * N + j];
                wrong_spd += length != batch.spd[i * N + j];
                if (length > 0 && length < SPD_UNREACHABLE)
                    atoms[1 + floyd_path(via, N, i, j, atoms + 1)] = j;
                for (int h = 0; h < PATH_BONDS; h++) {
                    int expected = h < length && length < SPD_UNREACHABLE
                                       ? code[atoms[h] * N + atoms[h + 1]] : PATH_NONE;
                    wrong_path += batch.path[(i * N + j) * PATH_BONDS + h] != expected;
                }
            }
        step_close(&step);
    }
    molecule_free(&m);
    test_check(wrong_spd == 0 && pairs > 20000, "shortest paths: %d of %d wrong", wrong_spd, pairs);
    test_check(wrong_path == 0, "bond paths: %d slots wrong", wrong_path);
}

// A model, and a batch of random molecules: one atom, two pieces, no bonds, 2D only, one of 20
// atoms, two atoms at the same place, two larger ones.
typedef Step Rig;

static const Blend TEST_BLEND = {0.2, 0.2, 0.6, 0.4, 0.6, 0.2, 0};
#define TEST_WEIGHTS {{0, 6, 0.1, 0.1, 0.5}}

// Puts B molecules into the batch of s, where they show what they draw, and frees them.
static void batch_molecules(Step *s, Molecule *m, idx B) {
    int n_atoms[16] = {0};
    for (idx b = 0; b < B; b++) n_atoms[b] = m[b].n_atoms;
    batch_layout(&s->batch, B, n_atoms);
    for (idx b = 0; b < B; b++) {
        batch_set(&s->batch, b, &m[b]);
        batch_draw(&s->batch, b, &TEST_BLEND, &s->draws);
        batch_pairs(&s->batch, b);
        molecule_free(&m[b]);
    }
    batch_count(&s->batch);
}

static void rig_molecule(Molecule *m, size_t b) {
    static const int atoms[] = {1, 7, 3, 9, 20, 5, 49, 46}, parts[] = {1, 2, 3, 1, 1, 1, 1, 1};
    random_molecule(m, atoms[b], parts[b], b != 3, 100 + (uint32_t)b);
    if (b == 5) memcpy(m->pos, m->pos + 3, 3 * sizeof(float));
}

static void rig_open(Rig *rig, int tasks, int dropout) {
    enum { B = 8 };
    Config c = {2, 24, 20, 3, 12, tasks};
    Molecule m[B] = {{0}};
    *rig = (Rig){.draws = {11, 4, 0, dropout}, .drop = {0.2, 0.15, 0.3, 0.1},
                 .weights = TEST_WEIGHTS};
    model_create(&rig->model, c, 1);
    formula_params(&rig->model);
    for (size_t b = 0; b < B; b++) rig_molecule(&m[b], b);
    rig->batch.Y = tasks;
    batch_molecules(rig, m, B);
    encoder_forward(rig);
    if (tasks) task_arrays_layout(rig);
    else heads_layout(rig);
}

// =================================================================================================
// Layer pairs: forward against a plain version, backward against central differences
// =================================================================================================

#define STEP 4e-3f  // of central differences, in float arithmetic

// A scalar function of everything in the rig: the sum of some outputs, weighted by test numbers.
typedef double Scalar(Rig *rig);

static double weighted_sum(const float *x, size_t n) {
    double sum = 0;
    for (size_t k = 0; k < n; k++) sum += (double)x[k] * (double)test_number(k);
    return sum;
}

// The gradient of weighted_sum().
static void weights_into(float *dx, size_t n) { fill(dx, n, 0, 1); }

// Compares dx (n), the gradient of f with respect to x (n), with central differences at up to 48
// of its elements (those with the largest gradients and some others); x moves by step * max(1,
// |x|).
static void test_gradient(Rig *rig, Scalar *f, float *x, const float *dx, size_t n, float step,
                          const char *what) {
    enum { MOST = 48 };
    float analytic[MOST], numeric[MOST];
    size_t count = 0;
    double largest = 0;
    float *saved = xmalloc(n, sizeof *saved);
    memcpy(saved, dx, n * sizeof *saved);
    for (size_t k = 0; k < n; k++) largest = fmax(largest, fabs((double)saved[k]));
    for (size_t k = 0; k < n && count < MOST; k++) {
        int large = fabs((double)saved[k]) > 0.3 * largest && largest > 0;
        if (!large && k % (n / 16 + 1)) continue;
        float keep = x[k], h = step * fmaxf(1.0f, fabsf(keep));
        x[k] = keep + h;
        float up = x[k];
        double plus = f(rig);
        x[k] = keep - h;
        double minus = f(rig), width = (double)up - (double)x[k];
        x[k] = keep;
        analytic[count] = saved[k];
        numeric[count++] = (float)((plus - minus) / width);
    }
    f(rig);
    free(saved);
    test_close(analytic, numeric, count, 5e-3, what);
}

// The same for a parameter by its field in Tensors; its gradient must have been computed.
static void test_parameter(Rig *rig, Scalar *f, float *p, const char *what) {
    size_t offset = (size_t)(p - rig->model.params);
    for (int i = 0; i < rig->model.n_tensors; i++)
        if (rig->model.info[i].offset == offset)
            test_gradient(rig, f, p, rig->model.grads + offset, rig->model.info[i].count, STEP,
                          what);
}

static double run_linear(Rig *rig) {
    const Tensors *p = &rig->model.p;
    int T = (int)rig->batch.T;
    linear_forward(rig->enc->ffn_pre, rig->enc->x, p->layer[0].ffn1_w,
                   p->layer[0].ffn1_b, T, rig->model.config.dim, rig->model.config.ffn);
    return weighted_sum(rig->enc->ffn_pre, (size_t)T * rig->model.config.ffn);
}

// A transposed weight, a bias left out, a gradient of the wrong operand.
static void test_linear(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    const LayerTensors *p = &rig.model.p.layer[0];
    int T = (int)rig.batch.T, C = rig.model.config.dim, F = rig.model.config.ffn;
    float *dout = xmalloc((size_t)T * F, sizeof *dout);
    weights_into(dout, (size_t)T * F);
    run_linear(&rig);
    linear_backward(rig.enc->dx, 0, rig.model.g.layer[0].ffn1_w,
                    rig.model.g.layer[0].ffn1_b, dout, rig.enc->x, p->ffn1_w, T, C, F);
    test_parameter(&rig, run_linear, p->ffn1_w, "linear: weight");
    test_parameter(&rig, run_linear, p->ffn1_b, "linear: bias");
    test_gradient(&rig, run_linear, rig.enc->x, rig.enc->dx, (size_t)T * C, STEP, "linear: input");
    free(dout);
    step_close(&rig);
}

static double run_norm(Rig *rig) {
    const LayerTensors *p = &rig->model.p.layer[1];
    struct enc *a = rig->enc;
    idx C = rig->model.config.dim;
    residual_forward(a->sum, a->x, a->context, rig, 1, 0);
    norm_forward(a->mid, a->norm1_hat, a->norm1_rstd, a->sum, C, p->norm1_w, p->norm1_b,
                 rig->batch.T, C, NORM_EPS);
    return weighted_sum(rig->enc->mid, rig->batch.T * (size_t)rig->model.config.dim);
}

// A wrong variance, a branch scaled by another DropPath than in the forward pass, sums over rows.
static void test_norm(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    int C = rig.model.config.dim, dropped = 0;
    size_t n = rig.batch.T * (size_t)C;
    const float *weight = rig.model.p.layer[1].norm1_w, *bias = rig.model.p.layer[1].norm1_b;
    run_norm(&rig);
    float *plain = xmalloc(n, sizeof *plain);
    for (idx t = 0; t < rig.batch.T; t++) {  // in double, step by step
        double mean = 0, variance = 0, in[64];
        float scale = droppath_scale(&rig, 1, 0, rig.batch.molecule[t]);
        dropped += scale == 0;
        for (int c = 0; c < C; c++) {
            in[c] = (double)rig.enc->x[t * (size_t)C + c] +
                    (double)scale * (double)rig.enc->context[t * (size_t)C + c];
            mean += in[c] / C;
        }
        for (int c = 0; c < C; c++) variance += (in[c] - mean) * (in[c] - mean) / C;
        for (int c = 0; c < C; c++)
            plain[t * (size_t)C + c] =
                (float)((in[c] - mean) / sqrt(variance + 1e-5) * (double)weight[c] +
                        (double)bias[c]);
    }
    test_close(rig.enc->mid, plain, n, 1e-6, "LayerNorm with DropPath: forward");
    test_check(dropped > 0, "DropPath dropped a branch");
    free(plain);
    float *dmid = rig.enc->dtokens;
    weights_into(dmid, n);
    norm_backward(rig.enc->dsum, rig.model.g.layer[1].norm1_w, rig.model.g.layer[1].norm1_b, dmid,
                  rig.enc->norm1_hat, rig.enc->norm1_rstd, C, weight, rig.batch.T, C);
    residual_backward(rig.enc->dbranch, rig.enc->dsum, &rig, 1, 0);
    test_gradient(&rig, run_norm, rig.enc->x, rig.enc->dsum, n, STEP, "LayerNorm: residual");
    test_gradient(&rig, run_norm, rig.enc->context, rig.enc->dbranch, n, STEP, "LayerNorm: branch");
    test_parameter(&rig, run_norm, rig.model.p.layer[1].norm1_w, "LayerNorm: weight");
    test_parameter(&rig, run_norm, rig.model.p.layer[1].norm1_b, "LayerNorm: bias");
    step_close(&rig);
}

static double run_gelu(Rig *rig) {
    size_t n = rig->batch.T * (size_t)rig->model.config.ffn;
    gelu_forward(rig->enc->ffn_hidden, rig->enc->ffn_pre, n);
    dropout_rows(rig->enc->ffn_hidden, rig, rig->model.config.ffn, rig->drop.activation,
                 RNG_ACTIVATION_DROP);
    return weighted_sum(rig->enc->ffn_hidden, n);
}

// The tanh form instead of the exact one, a mask drawn anew in the backward pass.
static void test_gelu(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    int F = rig.model.config.ffn;
    size_t n = rig.batch.T * (size_t)F;
    float *d = xmalloc(n, sizeof *d);
    weights_into(d, n);
    dropout_rows(d, &rig, F, rig.drop.activation, RNG_ACTIVATION_DROP);
    gelu_backward(d, rig.enc->ffn_pre, n);
    test_gradient(&rig, run_gelu, rig.enc->ffn_pre, d, n, STEP, "gelu and dropout");
    free(d);
    rig.draws.active = 0;
    run_gelu(&rig);
    double worst = 0;
    for (size_t k = 0; k < n; k++) {
        double x = (double)rig.enc->ffn_pre[k], exact = 0.5 * x * (1 + erf(x / sqrt(2.0)));
        worst = fmax(worst, fabs((double)rig.enc->ffn_hidden[k] - exact));
    }
    test_check(worst < 1e-6, "gelu: forward, error %.1e", worst);
    step_close(&rig);
}

static double run_attention(Rig *rig) {
    attention_forward(rig, 0);
    return weighted_sum(rig->enc->context, rig->batch.T * (size_t)rig->model.config.dim);
}

// Number k of row `row` of n numbers of a dropout mask: word k / blocks of block k mod blocks.
static double plain_mask(const Draws *draws, uint32_t purpose, uint32_t slot, uint32_t row, int n,
                         int k, double p) {
    int blocks = (n + 3) / 4;
    uint32_t index = row * (uint32_t)blocks + (uint32_t)(k % blocks);
    Philox block = philox((Philox){{index, slot, draws->step, purpose}}, draws->seed);
    return (double)block.word[k / blocks] < p * 4294967296.0 ? 0 : 1 / (1 - p);
}

// row (C) of token t = softmax(q k^T / sqrt(D) + bias) v in double, from qkv (T, 3 C), with the
// dropout of layer l at this rate.
static void plain_attention(double *row, const Rig *rig, const double *qkv, idx t, int l,
                            double rate) {
    int C = rig->model.config.dim, H = rig->model.config.heads, D = C / H;
    View v = batch_view(&rig->batch, rig->batch.molecule[t]);
    int S = (int)v.S, i = (int)(t - v.token);
    for (int h = 0; h < H; h++) {
        const float *bias = rig->bias->attn_bias + H * v.square + (h * S + i) * S;
        double e[64], sum = 0;
        for (int j = 0; j < S; j++) {
            double score = 0;
            for (int d = h * D; d < (h + 1) * D; d++)
                score += qkv[t * 3 * C + d] * qkv[(v.token + j) * 3 * C + C + d];
            sum += e[j] = exp(score / sqrt(D) + (double)bias[j]);
        }
        for (int d = h * D; d < (h + 1) * D; d++) {
            row[d] = 0;
            for (int j = 0; j < S; j++)
                row[d] += e[j] / sum * qkv[(v.token + j) * 3 * C + 2 * C + d] *
                          plain_mask(&rig->draws, 256 + (uint32_t)l,
                                     rig->draws.first_slot + (uint32_t)v.b, (uint32_t)h, S * S,
                                     i * S + j, rate);
        }
    }
}

// A head that reads its neighbour, a score without scale or bias, softmax undone wrongly.
static void test_attention(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    int C = rig.model.config.dim, H = rig.model.config.heads;
    size_t n = rig.batch.T * (size_t)C;
    memset(rig.bias->dattn_bias, 0, rig.batch.SS * (size_t)H * sizeof *rig.bias->dattn_bias);
    run_attention(&rig);
    weights_into(rig.enc->dcontext, n);
    attention_backward(&rig, 0);
    test_gradient(&rig, run_attention, rig.enc->qkv, rig.enc->dqkv, 3 * n, STEP,
                  "attention: q, k, v");
    test_gradient(&rig, run_attention, rig.bias->attn_bias, rig.bias->dattn_bias,
                  (size_t)rig.batch.SS * (size_t)H, STEP, "attention: bias");
    rig.draws.active = 0;
    run_attention(&rig);
    double *qkv = xmalloc(3 * n, sizeof *qkv), *row = xmalloc((size_t)C, sizeof *row);
    for (size_t k = 0; k < 3 * n; k++) qkv[k] = (double)rig.enc->qkv[k];
    for (idx t = 0; t < rig.batch.T; t++) {
        plain_attention(row, &rig, qkv, t, 0, 0);
        for (int c = 0; c < C; c++) rig.enc->mid[t * C + c] = (float)row[c];
    }
    test_close(rig.enc->context, rig.enc->mid, n, 1e-6, "attention: forward");
    FREE_ALL(qkv, row);
    step_close(&rig);
}

static double run_geometry(Rig *rig) {
    bias3d_forward(rig);
    return weighted_sum(rig->bias->structure3d, rig->batch.A * (size_t)rig->model.config.dim) +
           weighted_sum(rig->bias->bias3d_out, rig->batch.Q * (size_t)rig->model.config.heads);
}

// A width of the wrong kernel, pairs that use no 3D, the row of another element.
static void test_geometry(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    const Tensors *p = &rig.model.p;
    int G = rig.model.config.kernels;
    run_geometry(&rig);
    float *plain = xmalloc(rig.batch.Q * (size_t)G, sizeof *plain);
    size_t q = 0, pair = 0;
    for (idx b = 0; b < rig.batch.B; b++)  // the definition, with libm
        for (idx i = rig.batch.atom_start[b]; i < rig.batch.atom_start[b + 1]; i++)
            for (idx j = rig.batch.atom_start[b]; j < rig.batch.atom_start[b + 1]; j++, pair++) {
                if (!(rig.batch.pair_use[pair] & USE_3D)) continue;
                int u = rig.batch.atom_feat[9 * i] + 3, v = rig.batch.atom_feat[9 * j] + 3 + 512;
                double d = 0;
                for (size_t k = 0; k < 3; k++)
                    d += pow((double)(rig.batch.pos[3 * i + k] + rig.batch.noise[3 * i + k]) -
                                 (double)(rig.batch.pos[3 * j + k] + rig.batch.noise[3 * j + k]),
                             2);
                double x = (double)(p->gauss_mul[u] + p->gauss_mul[v]) * sqrt(d) +
                           (double)(p->gauss_bias[u] + p->gauss_bias[v]);
                for (int k = 0; k < G; k++) {
                    double s = fabs((double)p->gauss_std[k]) + 0.01,
                           z = (x - (double)p->gauss_mean[k]) / s;
                    plain[q * (size_t)G + k] = (float)(exp(-0.5 * z * z) / (sqrt(2 * 3.14159) * s));
                }
                q++;
            }
    test_check((idx)q == rig.batch.Q && q > 100, "%zu pairs use 3D", q);
    test_close(rig.bias->gauss, plain, q * (size_t)G, 1e-5, "Gaussians: forward");
    free(plain);
    weights_into(rig.bias->dstructure3d, rig.batch.A * (size_t)rig.model.config.dim);
    weights_into(rig.bias->dbias3d_out, rig.batch.Q * (size_t)rig.model.config.heads);
    memset(rig.model.grads, 0, rig.model.table_count * sizeof(float));
    bias3d_backward(&rig);
    test_parameter(&rig, run_geometry, p->gauss_mean, "Gaussians: means");
    test_parameter(&rig, run_geometry, p->gauss_std, "Gaussians: stds");
    test_parameter(&rig, run_geometry, p->gauss_mul, "Gaussians: mul");
    test_parameter(&rig, run_geometry, p->gauss_bias, "Gaussians: bias");
    test_parameter(&rig, run_geometry, p->bias3d1_w, "3D bias: layer 1");
    test_parameter(&rig, run_geometry, p->bias3d1_b, "3D bias: layer 1 bias");
    test_parameter(&rig, run_geometry, p->bias3d2_w, "3D bias: layer 2");
    test_parameter(&rig, run_geometry, p->structure3d_w, "3D structure");
    step_close(&rig);
}

static double run_bias(Rig *rig) {
    path_bias_forward(rig);
    bias_forward(rig);
    size_t H = (size_t)rig->model.config.heads;
    return weighted_sum(rig->bias->attn_bias, rig->batch.SS * H);
}

// The definition of b_edge of a pair, from the tables, slot by slot.
static double plain_edge_bias(const Rig *rig, size_t pair, int h) {
    int H = rig->model.config.heads, spd = rig->batch.spd[pair];
    double sum = 0;
    for (int t = 0; t < PATH_BONDS; t++) {
        int code = rig->batch.path[pair * PATH_BONDS + (size_t)t];
        int value[3] = {code / 12, code / 2 % 6, code % 2};
        for (int from = 0; from < H && code != PATH_NONE; from++)
            for (int f = 0; f < 3; f++)
                sum += (double)rig->model.p.bond_table[(3 + 512 * f + value[f]) * H + from] / 3 *
                       (double)rig->model.p.path_maps[(t * H + from) * H + h];
    }
    return sum / (spd < 1 ? 1 : spd > 5 ? 5 : spd);
}

// A relation that was not drawn and is added, or hears a gradient; a path in the wrong slot.
static void test_bias(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    int H = rig.model.config.heads, drawn[8] = {0};
    size_t n = rig.batch.SS * (size_t)H, q = 0, pair = 0;
    run_bias(&rig);
    double worst = 0;
    for (idx b = 0; b < rig.batch.B; b++) {
        View v = batch_view(&rig.batch, b);
        for (int i = 0; i < v.N; i++)
            for (int j = 0; j < v.N; j++, pair++) {
                int use = rig.batch.pair_use[pair];
                drawn[use]++;
                for (int h = 0; h < H; h++) {
                    double expected = use == USE_EDGE ? plain_edge_bias(&rig, pair, h)
                        : (double)(use == USE_3D ? rig.bias->bias3d_out[q * (size_t)H + (size_t)h]
                                      : rig.model.p.spd_table[(rig.batch.spd[pair] + 1) * H + h]);
                    const float *ours = rig.bias->attn_bias + H * v.square + h * v.S * v.S;
                    worst = fmax(worst, fabs((double)ours[(i + 1) * v.S + j + 1] - expected));
                }
                q += use == USE_3D;
            }
    }
    test_check(worst < 1e-6 && drawn[1] > 20 && drawn[2] > 20 && drawn[4] > 20,
               "blended bias: error %.1e (%d, %d, %d pairs)", worst, drawn[1], drawn[2], drawn[4]);
    memset(rig.bias->dattn_bias, 0, n * sizeof *rig.bias->dattn_bias);
    weights_into(rig.bias->dattn_bias, n);
    memset(rig.model.grads, 0, rig.model.table_count * sizeof(float));
    bias_backward(&rig);
    path_bias_backward(&rig);
    test_parameter(&rig, run_bias, rig.model.p.spd_table, "bias: SPD table");
    test_parameter(&rig, run_bias, rig.model.p.bond_table, "bias: bond table");
    test_parameter(&rig, run_bias, rig.model.p.path_maps, "bias: path maps");
    test_parameter(&rig, run_bias, rig.model.p.graph_bias, "bias: graph token");
    test_check(rig.model.g.spd_table[0] == 0 && rig.model.g.bond_table[0] == 0, "padding rows");
    step_close(&rig);
}

static double run_embedding(Rig *rig) {
    embedding_forward(rig);
    return weighted_sum(rig->enc->x, rig->batch.T * (size_t)rig->model.config.dim);
}

// A feature from the row of another one, a table gradient that threads add twice.
static void test_embedding(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    size_t C = (size_t)rig.model.config.dim, n = rig.batch.T * C;
    run_embedding(&rig);
    weights_into(rig.enc->dx, n);
    memset(rig.model.grads, 0, rig.model.table_count * sizeof(float));
    embedding_backward(&rig);
    test_gradient(&rig, run_embedding, rig.bias->structure3d, rig.bias->dstructure3d,
                  rig.batch.A * C, 100 * STEP, "embedding: 3D structure");
    test_parameter(&rig, run_embedding, rig.model.p.atom_table, "embedding: atom table");
    test_parameter(&rig, run_embedding, rig.model.p.in_degree, "embedding: in degree");
    test_parameter(&rig, run_embedding, rig.model.p.out_degree, "embedding: out degree");
    test_parameter(&rig, run_embedding, rig.model.p.graph_token, "embedding: graph token");
    test_parameter(&rig, run_embedding, rig.model.p.embed_norm_w, "embedding: LayerNorm");
    test_check(rig.model.g.atom_table[0] == 0 && rig.model.g.in_degree[0] == 0, "padding rows");
    step_close(&rig);
}

// All heads: the total loss as a function of the encoder's output and the head parameters.
static double run_heads(Rig *rig) {
    double sum[LOSSES], loss[LOSSES];
    pretrain_heads(sum, rig, 0);
    loss_means(loss, sum, rig->batch.count, &rig->weights);
    return loss[LOSS_TOTAL];
}

// Logits of a relation head as the release computes them: from the outer product of 1024 numbers.
static void test_pair_logits(const Rig *rig, const float *logits, int map, int K,
                             const float *weight, const float *bias, const char *what) {
    const float *maps = rig->heads->pair_map;
    size_t pair = 0;
    float *plain = xmalloc(rig->batch.P * (size_t)K, sizeof *plain);
    for (idx b = 0; b < rig->batch.B; b++)
        for (idx i = rig->batch.atom_start[b]; i < rig->batch.atom_start[b + 1]; i++)
            for (idx j = rig->batch.atom_start[b]; j < rig->batch.atom_start[b + 1]; j++, pair++)
                for (int k = 0; k < K; k++) {
                    double sum = (double)bias[k];
                    for (int o = 0; o < 1024; o++)
                        sum += (double)maps[(i + b + 1) * 192 + (size_t)(map * 32 + o / 32)] *
                               (double)maps[(j + b + 1) * 192 + (size_t)(map * 32 + 32 + o % 32)] *
                               (double)weight[k * 1024 + o];
                    plain[pair * (size_t)K + (size_t)k] = (float)sum;
                }
    test_close(logits, plain, rig->batch.P * (size_t)K, 1e-5, what);
    free(plain);
}

// The denoising head's output as the paper states it, with y_a formed; without dropout.
static void test_noise_output(const Rig *rig) {
    int C = rig->model.config.dim, H = rig->model.config.heads, D = C / H;
    double worst = 0;
    for (idx b = 0; b < rig->batch.B; b++) {
        View v = batch_view(&rig->batch, b);
        int N = (int)v.N, a0 = (int)v.token + 1;
        for (int i = 0; i < N; i++)
            for (int axis = 0; axis < 3; axis++) {
                double out = (double)rig->model.p.denoise_axes_b[axis];
                for (int c = 0; c < C; c++) {
                    const float *prob =
                        rig->heads->denoise_prob + H * v.square + (c / D * N + i) * N;
                    double y = 0;
                    for (int j = 0; j < N; j++)
                        y += (double)prob[j] *
                             (double)rig->heads->denoise_qkv[((a0 + j) * 3 + 2) * C + c] *
                             (double)rig->batch.direction[3 * rig->batch.pair_start[b] +
                                                          (size_t)((axis * N + i) * N + j)];
                    out += y * (double)rig->model.p.denoise_axes_w[axis * C + c];
                }
                const float *ours = rig->heads->denoise_out + 3 * (v.atom + (size_t)i);
                worst = fmax(worst, fabs(out - (double)ours[axis]));
            }
    }
    test_check(worst < 1e-5, "denoising head: forward, error %.1e", worst);
}

// Row and column of a pair swapped, logits of another class, a head that feeds back too much.
static void test_heads(void) {
    Rig rig;
    rig_open(&rig, 0, 0);
    const Tensors *p = &rig.model.p;
    size_t P = rig.batch.P, n = rig.batch.T * (size_t)rig.model.config.dim;
    float *spd = rig.logits[LOSS_SPD] = xmalloc(P * SPD_CLASSES, sizeof *spd);
    float *edge = rig.logits[LOSS_EDGE] = xmalloc(P * EDGE_OUTPUTS, sizeof *edge);
    double loss[LOSSES];
    pretrain_heads(loss, &rig, 0);
    test_pair_logits(&rig, spd, 0, SPD_CLASSES, p->spd_w, p->spd_b, "SPD head: forward");
    test_pair_logits(&rig, edge, 2, EDGE_OUTPUTS, p->edge_w, p->edge_b, "edge head: forward");
    rig.logits[LOSS_SPD] = rig.logits[LOSS_EDGE] = NULL;
    test_noise_output(&rig);
    free(spd), free(edge);
    rig.draws.active = 1;
    rig.draws.step = 5;  // a draw in which no gradient cancels to nothing
    pretrain_heads(loss, &rig, 1);
    float *x = encoder_output(&rig);
    size_t biases = rig.batch.SS * (size_t)rig.model.config.heads;
    float *dbias = xmalloc(biases, sizeof *dbias);
    memcpy(dbias, rig.bias->dattn_bias, biases * sizeof *dbias);
    test_gradient(&rig, run_heads, x, rig.enc->dx, n, STEP, "heads: input");
    test_gradient(&rig, run_heads, rig.bias->attn_bias, dbias, biases, STEP,
                  "denoising head: bias");
    free(dbias);
    const idx C = rig.model.config.dim, R = PAIR_WIDTH;
    float *const tensors[] = {  // of the pair maps: spd r, c, edge r, c, 3d r, c; of q, k, v
        p->pair_maps_w, p->pair_maps_w + 3 * R * C, p->pair_maps_b + 4 * R, p->pair_norm_w + 5 * R,
        p->pair_norm_b, p->spd_w, p->spd_b, p->edge_w, p->edge_b, p->dir_w, p->dir_b,
        p->dir_axes_w + DIR_INNER, p->dir_axes_b + 2, p->denoise_qkv_w,
        p->denoise_qkv_w + 2 * C * C, p->denoise_qkv_b + 2 * C, p->denoise_axes_w,
        p->denoise_axes_b + 1};
    for (size_t k = 0; k < sizeof tensors / sizeof tensors[0]; k++) {
        char what[32];
        snprintf(what, sizeof what, "heads: tensor %zu", k);
        test_parameter(&rig, run_heads, tensors[k], what);
    }
    step_close(&rig);
}

// The whole model: total loss against every tensor of the table, dropout and DropPath on.
static double run_model(Rig *rig) {
    encoder_forward(rig);
    return run_heads(rig);
}

// A pass left out between layers, heads and tables, which no layer by itself can notice.
static void test_model(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    double loss[LOSSES];
    gradients(loss, &rig);
    double norm = gradient_norm(&rig.model);
    float numeric[512], analytic[512];
    int count = 0;
    for (int i = 0; i < rig.model.n_tensors; i++) {  // along the direction of the tensor's gradient
        const TensorInfo *t = &rig.model.info[i];
        float *p = rig.model.params + t->offset, *g = rig.model.grads + t->offset;
        double length = 0;
        for (size_t k = 0; k < t->count; k++) length += (double)g[k] * (double)g[k];
        length = sqrt(length);
        if (length < 1e-3 * norm) continue;  // below the rounding of the loss
        float *keep = xmalloc(t->count, sizeof *keep), h = (float)(2e-3 / length);
        memcpy(keep, p, t->count * sizeof *keep);
        for (size_t k = 0; k < t->count; k++) p[k] = keep[k] + h * g[k];
        double plus = run_model(&rig);
        for (size_t k = 0; k < t->count; k++) p[k] = keep[k] - h * g[k];
        double minus = run_model(&rig);
        memcpy(p, keep, t->count * sizeof *keep);
        free(keep);
        analytic[count] = (float)length;
        numeric[count++] = (float)((plus - minus) / 4e-3);
    }
    test_check(count > 40, "only %d tensors compared", count);
    test_close(analytic, numeric, (size_t)count, 1e-2, "whole model against central differences");
    step_close(&rig);
}

// A molecule's result does not depend on what else is in the batch.
static void test_packing(void) {
    Rig rig;
    rig_open(&rig, 0, 0);
    size_t C = (size_t)rig.model.config.dim, b = 4, N = (size_t)rig.batch.n_atoms[b];
    size_t first = (size_t)rig.batch.atom_start[b] + b;
    float *together = xmalloc((N + 1) * C, sizeof *together);
    memcpy(together, encoder_output(&rig) + first * C, (N + 1) * C * sizeof *together);
    Molecule m = {0};
    rig_molecule(&m, b);
    rig.draws.first_slot = (uint32_t)b;
    batch_molecules(&rig, &m, 1);
    encoder_forward(&rig);
    test_close(encoder_output(&rig), together, (N + 1) * C, 1e-6,
               "alone and in a batch");
    free(together);
    step_close(&rig);
}

// 500 atoms, all together with one atom and without positions: finite losses and gradients.
static void test_large(void) {
    Config c = {1, 16, 16, 2, 4, 0};
    Molecule m[3] = {{0}};
    Step s = {.draws = {3, 0, 0, 1}, .drop = {0.1, 0.1, 0.1, 0}, .weights = TEST_WEIGHTS};
    static const int atoms[] = {500, 1, 12}, parts[] = {1, 1, 2};
    model_create(&s.model, c, 1);
    model_init(&s.model, 5);
    for (size_t b = 0; b < 3; b++)
        random_molecule(&m[b], atoms[b], parts[b], b != 2, (uint32_t)b);
    batch_molecules(&s, m, 3);
    double loss[LOSSES];
    gradients(loss, &s);
    double norm = gradient_norm(&s.model);
    test_check(isfinite(loss[LOSS_TOTAL]) && isfinite(norm) && norm > 0,
               "500 atoms: loss %g, gradient %g", loss[LOSS_TOTAL], norm);
    step_close(&s);
}

static double run_task(Rig *rig) {
    task_head_forward(rig, READ_MEAN);
    return weighted_sum(rig->task_arrays->logits, (size_t)rig->batch.B * 2);
}

// A read-out over the wrong tokens, its weight left out in the backward pass.
static void test_task_head(void) {
    Rig rig;
    rig_open(&rig, 2, 0);
    size_t n = rig.batch.T * (size_t)rig.model.config.dim;
    run_task(&rig);
    weights_into(rig.task_arrays->dlogits, (size_t)rig.batch.B * 2);
    task_head_backward(&rig, READ_MEAN);
    test_gradient(&rig, run_task, encoder_output(&rig), rig.enc->dx, n,
                  STEP, "fine-tuning head: input");
    test_parameter(&rig, run_task, rig.model.p.head1_w, "fine-tuning head: dense");
    test_parameter(&rig, run_task, rig.model.p.head2_b, "fine-tuning head: bias");
    step_close(&rig);
}

// Losses and gradients where float32 ends: nothing saturates, nothing becomes NaN.
static void test_edges(void) {
    float x[3] = {200, 0, -50}, g[3];
    test_check(fabs(cross_entropy(x, 3, 1, 1.0) - 200) < 1e-3 && x[0] == 1 && x[1] == -1,
               "cross-entropy of a gap of 200 is 200, with its gradient");
    static const float constants[3] = {0, 1, 0.4f};  // mean, 1 / s, height
    g[0] = g[1] = 0;
    g[2] = 1;
    float dx = gauss_row_backward(g, g + 1, g + 2, 1e25f, constants, 1);
    test_check(dx == 0 && g[0] == 0 && g[1] == 0, "a Gaussian whose square overflows: gradient 0");
    Rig rig;
    rig_open(&rig, 0, 0);
    memset(rig.model.grads, 0, rig.model.table_count * sizeof(float));
    rig.model.p.gauss_std[1] = 0;
    run_geometry(&rig);
    weights_into(rig.bias->dstructure3d, rig.batch.A * (size_t)rig.model.config.dim);
    weights_into(rig.bias->dbias3d_out, rig.batch.Q * (size_t)rig.model.config.heads);
    bias3d_backward(&rig);
    test_check(rig.model.g.gauss_std[1] == 0 && rig.model.g.gauss_std[0] != 0,
               "the slope of |std| at 0 is 0");
    // two tasks, the second a thousand times the first: the same share in loss and gradient
    static const float mean[2] = {1, 1000}, std[2] = {2, 2000}, logits[2] = {0.3f, 0.3f};
    float labels[2] = {3, 3000}, d[2], unscaled[2];
    Batch one = {.B = 1, .Y = 2, .labels = labels, .count = {2}};
    Task task = {.kind = TASK_REGRESSION, .mean = mean, .std = std};
    double loss = task_loss(d, logits, &one, &task);
    task.label_units = 1;
    double in_units = task_loss(unscaled, logits, &one, &task);
    test_check(fabs(loss - 0.49) < 1e-6 && d[0] == d[1], "tasks of any scale count alike");
    test_check(fabs(in_units / (0.49 * 2000002) - 1) < 1e-5 && unscaled[1] / unscaled[0] > 9e5f,
               "--loss-units labels: the release's loss");
    step_close(&rig);
}

// Without dropout, or in evaluation, a mask is one everywhere.
static void test_mask(void) {
    Draws draws = {7, 3, 0, 1};
    float mask[25], sum = 0;
    dropout_row(mask, 25, 0, &draws, RNG_ATTENTION_DROP, 2, 1);
    for (int k = 0; k < 25; k++) sum += mask[k];
    draws.active = 0;
    dropout_row(mask, 25, 0.5, &draws, RNG_ATTENTION_DROP, 2, 1);
    for (int k = 0; k < 25; k++) sum += mask[k];
    test_check(sum == 50, "masks without dropout sum to %g", (double)sum);
}

// Metrics against values computed by scikit-learn (roc_auc_score, average_precision_score).
static void test_metrics(void) {
    static const float scores[] = {0.1f, 0.4f, 0.35f, 0.8f, 0.4f, 0.4f, 0.9f, 0.1f, 0.5f, 0.7f};
    static const float labels[] = {0, 0, 1, 1, 1, 0, NAN, 0, 0, 1};
    static const float values[] = {1.5f, -0.5f, 2, 7.25f, 0, 3, 1, 4, 4.5f, -1};
    double metric[METRICS];
    task_metrics(metric, TASK_CLASSIFICATION, scores, labels, 10, 1, 0);
    test_check(fabs(metric[METRIC_AUC] - 0.75) < 1e-9, "ROC-AUC %.9f", metric[METRIC_AUC]);
    test_check(fabs(metric[METRIC_AP] - 0.7678571428571428) < 1e-9, "average precision %.9f",
               metric[METRIC_AP]);
    task_metrics(metric, TASK_REGRESSION, scores, values, 10, 1, 0);
    test_check(fabs(metric[METRIC_RMSE] - 2.9685855183712375) < 1e-6, "RMSE %.9f",
               metric[METRIC_RMSE]);
    test_check(fabs(metric[METRIC_MAE] - 2.31) < 1e-6, "MAE %.9f", metric[METRIC_MAE]);
    test_check(fabs(metric[METRIC_R2] + 0.49348585613954987) < 1e-6, "R2 %.9f", metric[METRIC_R2]);
    static const float one_class[] = {0, 0, NAN, 0, 0, 0, 0, 0, 0, 0};
    task_metrics(metric, TASK_CLASSIFICATION, scores, one_class, 10, 1, 0);
    test_check(isnan(metric[METRIC_AUC]) && isnan(metric[METRIC_AP]), "one class: undefined");
    static const float constant[] = {0.1f, 0.1f, 0.1f, 0.1f, 0.1f, 0.1f, 0.1f};
    task_metrics(metric, TASK_REGRESSION, scores, constant, 7, 1, 0);
    test_check(isnan(metric[METRIC_R2]), "R2 of constant labels is undefined, not %g",
               metric[METRIC_R2]);
    static const float two[] = {0, 0, 1, 0, 0, 0, 1, 0, 1, 0};  // tasks, of which one has one class
    task_means(metric, TASK_CLASSIFICATION, scores, two, 5, 2);
    test_check(fabs(metric[METRIC_AUC] - 5 / 6.0) < 1e-9, "mean ROC-AUC of one task of two %.9f",
               metric[METRIC_AUC]);
}

// =================================================================================================
// The tests can fail: a gradient off by 1 %, one wrong feature, a NaN
// =================================================================================================

// Tests that cannot fail: each gradient is spoilt by 1 %, a feature and a NaN are planted.
static void test_sensitivity(const char *golden_path) {
    Golden g;
    double loss[LOSSES];
    golden_open(&g, golden_path);
    gradients(loss, &g.s);
    int quiet = tests_failed, noticed = 0, tensors = 0;
    for (int i = 0; i < g.s.model.n_tensors; i++) {
        const TensorInfo *t = &g.s.model.info[i];
        Report r = {0};
        if (strstr(t->name, "k_proj.bias")) continue;
        for (size_t k = 0; k < t->count; k++) g.s.model.grads[t->offset + k] *= 1.01f;
            golden_gradients(&r, &g, 0);
        for (size_t k = 0; k < t->count; k++) g.s.model.grads[t->offset + k] /= 1.01f;
        int seen = 0;
        for (int k = 0; k < r.count; k++)
            seen = seen || !(r.family[k].error <= r.family[k].tolerance);
        noticed += seen;
        tensors++;
    }
    test_check(noticed == tensors && tensors > 90,
               "a gradient off by 1 %% is noticed in %d of %d tensors", noticed, tensors);
    g.s.batch.atom_feat[3] ^= 1;
    Report r = {0};
    encoder_forward(&g.s);
    golden_encoder(&r, &g);
    int seen = 0;
    for (int k = 0; k < r.count; k++) seen += !(r.family[k].error <= r.family[k].tolerance);
    test_check(seen > 0, "one wrong atom feature is noticed");
    g.s.batch.atom_feat[3] ^= 1;
    float a[2] = {1, NAN}, b[2] = {1, 1};
    Report nan_report = {0};
    report_add(&nan_report, "nan", relative_error(a, b, 2), 1e-5);
    test_check(!(nan_report.family[0].error <= 1e-5), "NaN is noticed");
    test_check(tests_failed == quiet, "these tests failed on purpose only");
    golden_close(&g);
}

// =================================================================================================
// Files and programs
// =================================================================================================
#include "tests/files.h"      // datasets and checkpoints as files; the parameter table
#include "tests/programs.h"   // the programs as a user meets them
#include "tests/runs.h"       // seeds, resumed runs, what two runs may share
#include "tests/chemistry.h"  // molecules and what RDKit says of them
#include "tests/judging.h"    // labels of any scale, sets that cannot judge, numbers that are none
#include "tests/sgroups.h"    // S groups, hydrogen counts, CXSMILES, positions that are none
#include "tests/prep.h"       // faults, hostile records and files, fields, splits, threads
#include "tests/stereo.h"     // features and predictions do not depend on the order of atoms
#include "tests/tables.h"     // tables and labels as people have them
#include "tests/outputs.h"    // inputs and files of others stay, results on stdout, memory in use
#include "tests/predict.h"    // intervals, ensembles, nearest training molecules
#include "tests/precision.h"  // products of operands rounded to bfloat16
#include "tests/bites.h"      // small faults that no other test notices

// =================================================================================================
// Main
// =================================================================================================

// The golden files that come with the source.
static void test_bundled_golden(void) {
    static const char *const golden[] = {"data/mini.safetensors",
                                         "data/mini_finetune_cls.safetensors",
                                         "data/mini_finetune_reg.safetensors"};
    for (int k = 0; k < 3; k++) test_golden(golden[k], 0);
    test_sensitivity(golden[0]);
}

// Does the command line ask for this group?
static int test_wanted(const char *name, int argc, char **argv) {
    int without = argc > 1 && strcmp(argv[1], "--without") == 0, named = 0;
    for (int i = 1 + without; i < argc; i++) named |= strcmp(argv[i], name) == 0;
    return argc == 1 || named != without;
}

int main(int argc, char **argv) {
    stop_at_failure = argc > 1 && strcmp(argv[1], "--stop") == 0;
    argc -= stop_at_failure, argv += stop_at_failure;
    if (argc > 2 && strcmp(argv[1], "--golden") == 0) {
        for (int i = 2; i < argc; i++) test_golden(argv[i], 1);
    } else {
        static const struct { const char *name; void (*run)(void);
        } tests[] = {{"functions", test_functions},
                     {"random numbers", test_random},
                     {"matrix products", test_gemm},
                     {"relations", test_relations},
                     {"parameter table", test_parameter_table},
                     {"linear", test_linear},
                     {"LayerNorm", test_norm},
                     {"gelu", test_gelu},
                     {"attention", test_attention},
                     {"geometry", test_geometry},
                     {"bias", test_bias},
                     {"embedding", test_embedding},
                     {"heads", test_heads},
                     {"fine-tuning head", test_task_head},
                     {"model", test_model},
                     {"packing", test_packing},
                     {"500 atoms", test_large},
                     {"numbers at edges", test_edges},
                     {"masks", test_mask},
                     {"metrics", test_metrics},
                     {"dataset", test_dataset},
                     {"checkpoint", test_checkpoint},
                     {"molecules", test_molecules},
                     {"data_prep", test_data_prep},
                     {"stereo", test_stereo},
                     {"S groups", test_sgroups},
                     {"tables", test_tables},
                     {"messages", test_messages},
#if MB_POSIX
                     {"machine", test_machine},
                     {"flipped bits", test_flips},
                     {"judging", test_judging},
                     {"poison", test_poison},
                     {"notes", test_notes},
#endif
                     {"worked example", test_example},
                     {"damaged files", test_damage},
                     {"damage together", test_damage_together},
                     {"dataset fields", test_dataset_fields},
                     {"tensor headers", test_tensor_headers},
                     {"reproducible", test_reproducible},
                     {"large labels", test_large_labels},
                     {"seeds", test_seeds},
                     {"resumed data", test_resumed_data},
                     {"two runs", test_two_runs},
                     {"files people have", test_files_people_have},
                     {"using", test_using},
                     {"scales", test_scales},
                     {"intervals", test_intervals},
                     {"predictions", test_predict},
                     {"resumed tuning", test_finetune_resume},
                     {"not finite", test_not_finite},
                     {"outputs", test_outputs},
                     {"quotas", test_quota},
                     {"busy machine", test_busy},
                     {"draws", test_draws},
                     {"plain losses", test_plain_losses},
                     {"task loss", test_task_loss},
                     {"dropped layers", test_dropped_layers},
                     {"optimiser", test_optimiser},
                     {"options", test_options},
                     {"tuning options", test_tuning_options},
                     {"seeds alone", test_seeds_alone},
                     {"stopping early", test_stopping},
                     {"embedding rows", test_embedding_rows},
                     {"ensembles", test_ensembles},
                     {"pretraining report", test_pretraining_report},
                     {"threads adapt", test_adapting},
                     {"machinery", test_machinery},
                     {"rounding", test_rounding},
                     {"bf16 products", test_bf16},
                     {"precision", test_precision},
                     {"small chemistry", test_small_chemistry},
                     {"golden files", test_bundled_golden}};
        write_test_dataset("build/test_train.bin", 40, 0);  // several groups use it
        for (size_t k = 0; k < sizeof tests / sizeof tests[0]; k++) {
            if (!test_wanted(tests[k].name, argc, argv)) continue;
            int passed = tests_passed, failed = tests_failed;
            double start = now_seconds();
            tests[k].run();
            printf("%-18s %3d passed, %d failed  %5.1f s\n", tests[k].name, tests_passed - passed,
                   tests_failed - failed, now_seconds() - start);
            fflush(stdout);
        }
    }
    if (tests_passed + tests_failed == 0)
        printf("usage: ./test [[--without] NAME...] or ./test --golden FILE.safetensors...\n");
    printf("%d passed, %d failed\n", tests_passed, tests_failed);
    return tests_passed == 0 || tests_failed != 0;
}
