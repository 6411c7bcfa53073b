// test.c - every test of moleblend.c and data_prep.c. Build and run with `make test`.
//
//   ./test                        all tests; the last line is "N passed, N failed"
//   ./test NAME...                these groups of tests only: see the names at the end of this file
//   ./test --without NAME...      all but these
//   ./test --golden FILE...       compares with golden files (numbers of the official modules) and
//                                 prints the largest relative error of every family of tensors
//
// The programs are compiled into this file, so that every function can be called; what concerns
// their command lines (messages, exit codes, resuming) runs ./moleblend and ./data_prep.
// A comparison is |a - b| <= tolerance * |b| in the Euclidean norm, and fails on NaN.

#if defined(__GNUC__) || defined(__clang__)
#pragma GCC diagnostic ignored "-Wunused-function"  // not every function has a test of its own
#endif
#define _POSIX_C_SOURCE 200809L  // these three as in moleblend.h, for the headers here
#define _ISOC11_SOURCE 1
#define _FILE_OFFSET_BITS 64
#if defined(__unix__) || defined(__APPLE__)
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
static int folders_flushed;

// fsync() that counts the folders it is asked for.
static int counting_fsync(int fd) {
    struct stat info;
    folders_flushed += fstat(fd, &info) == 0 && S_ISDIR(info.st_mode);
    return fsync(fd);
}
#define fsync counting_fsync
#endif
#define MB_PROGRAM "test"
#define MOLEBLEND_TEST
#define DATA_PREP_TEST
#define PAIR_GROUP 128  // so that the tests' molecules make more than one group
#include "moleblend.c"
#include "data_prep.c"

// =================================================================================================
// Counting and comparing
// =================================================================================================

static int tests_passed, tests_failed;

// Counts a test; says which one failed.
MB_PRINTF(2, 3) static void test_check(int ok, const char *fmt, ...) {
    va_list args;
    if (ok) {
        tests_passed++;
        return;
    }
    tests_failed++;
    printf("FAILED: ");
    va_start(args, fmt);
    vprintf(fmt, args);
    va_end(args);
    printf("\n");
}

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

// Largest errors of a family of tensors, e.g. all of "out/*/attn_bias".
typedef struct { char name[64]; double error, tolerance; int count; } Family;
typedef struct { Family family[64]; int count; } Report;

static void report_add(Report *r, const char *name, double error, double tolerance) {
    int k = 0;
    while (k < r->count && strcmp(r->family[k].name, name)) k++;
    CHECK(k < 64, "too many families");
    Family *f = &r->family[k];
    if (k == r->count) {
        r->count++;
        snprintf(f->name, sizeof f->name, "%s", name);
        f->tolerance = tolerance;
    }
    f->count++;
    if (!(error <= f->error)) f->error = error;  // NaN counts as larger
}

// One test a family: is the largest error within its tolerance?
static void report_finish(const Report *r, const char *path, int print) {
    for (int k = 0; k < r->count; k++) {
        const Family *f = &r->family[k];
        int ok = f->error <= f->tolerance;
        if (print)
            printf("  %-24s %4d tensors   error %.1e   %3.0f %% of tolerance %.0e%s\n", f->name,
                   f->count, f->error, 100 * f->error / f->tolerance, f->tolerance,
                   ok ? "" : "   FAILED");
        test_check(ok, "%s: %s: relative error %.2e, tolerance %.0e", path, f->name, f->error,
                   f->tolerance);
    }
}

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

// Element k of a tensor of any of the types that golden files are made of.
static double tensor_number(const TensorEntry *t, size_t k) {
    const uint8_t *at = t->data + k * dtype_size(t->dtype);
    if (strcmp(t->dtype, "F32") == 0) return (double)get_f32(at);
    if (strcmp(t->dtype, "I64") == 0) return (double)(int64_t)get_u64(at);
    if (strcmp(t->dtype, "I32") == 0) return (double)(int32_t)get_u32(at);
    CHECK(strcmp(t->dtype, "U8") == 0 || strcmp(t->dtype, "BOOL") == 0,
          "tensor %s: expected F32, I64, I32, U8 or BOOL, found %s", t->name, t->dtype);
    return at[0];
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
} Golden;

// Puts molecules first..first+B-1 of a golden file into its batch, with their blend and noise.
static void golden_load(Step *s, size_t first, size_t B, const void *given) {
    Golden *g = (Golden *)(uintptr_t)given;
    int Y = g->s.model.config.tasks;
    for (size_t b = 0; b < B; b++)
        s->batch.n_atoms[b] =
            (int)golden_tensor(&g->file, "mol", first + b, "atom_feat")->shape[0];
    batch_layout(&s->batch, B);
    float *labels = Y ? tensor_floats(&g->file, "labels", NULL) : NULL;
    Molecule m = {0};
    for (size_t b = 0; b < B; b++) {
        golden_molecule(&m, &g->file, first + b);
        molecule_resize(&m, m.n_atoms, m.n_bonds, Y, 0);
        if (Y) memcpy(m.labels, labels + (first + b) * (size_t)Y, sizeof(float) * (size_t)Y);
        batch_set(&g->s.batch, b, &m, &g->s.batch.reader[0]);
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

// Memory for a golden file's molecules, and its whole batch.
static void golden_batch(Golden *g) {
    size_t B = (size_t)meta_number(&g->file, "n_mols");
    Sizes room = {0};
    for (size_t b = 0; b < B; b++) {
        const TensorEntry *t = golden_tensor(&g->file, "mol", b, "atom_feat");
        CHECK(t, "%s: molecule %zu is missing", g->file.path, b);
        sizes_add(&room, (int)t->shape[0]);
    }
    batch_alloc(&g->s.batch, room, g->s.model.config.tasks);
    acts_alloc(&g->s.acts, g->s.model.config, room);
    golden_load(&g->s, 0, B, g);
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
    golden_batch(g);
}

static void golden_close(Golden *g) {
    tensor_file_close(&g->file);
    model_free(&g->s.model);
    batch_free(&g->s.batch);
    acts_free(&g->s.acts);
    free(g->s.part_sum);
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
    for (size_t b = 0; b < batch->B; b++) {
        View v = batch_view(batch, b);
        int S = v.S, W = v.W;
        const TensorEntry *spd = golden_tensor(&g->file, "out", b, "spd");
        int wrong = 0;
        for (size_t k = 0; spd && k < spd->count; k++)
            wrong += tensor_number(spd, k) != batch->spd[batch->pair_start[b] + k];
        if (spd) report_add(r, "spd", wrong, 1e-30);
        float *bias = xmalloc((size_t)H * S * S, sizeof *bias);
        const float *ours = g->s.acts.attn_bias + bias_at(batch, H, &v, 0);
        for (int row = 0; row < H * S; row++)
            memcpy(bias + (size_t)row * S, ours + (size_t)row * W, sizeof(float) * (size_t)S);
        golden_output(r, g, b, "attn_bias", bias, 1e-5);
        free(bias);
        for (int l = 0; l <= g->s.model.config.layers; l++) {
            char name[32] = "embed";
            if (l) snprintf(name, sizeof name, "layer%d", l);
            const float *x = g->s.acts.x + (size_t)l * batch->T * (size_t)C;
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
        if (g->finetune) task_gradients(now, &g->s);
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
    free(loss);
    free(trace);
    free(norms);
}

// Everything a golden file holds.
static void test_golden(const char *path, int print) {
    Golden g;
    Report report = {0};
    golden_open(&g, path);
    if (print) printf("%s\n", path);
    size_t B = g.s.batch.B, Y = (size_t)g.s.model.config.tasks;
    double loss[LOSSES] = {0};
    float *logits = g.s.logits[LOSS_TOTAL] = xmalloc(2 * B * Y, sizeof *logits);
    if (g.finetune) {
        g.s.task = &g.task;
        size_t count = 0;
        float *expected = tensor_floats(&g.file, "out/logits", &count);
        task_gradients(loss, &g.s);
        report_add(&report, "logits", relative_error(logits, expected, count), 1e-5);
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
                          g.s.acts.denoise_out + 3 * g.s.batch.atom_start[b], 1e-5);
        }
        free(spd);
        free(edge);
        free(d3);
        g.s.logits[LOSS_SPD] = g.s.logits[LOSS_EDGE] = g.s.logits[LOSS_3D] = NULL;
        gradients(loss, &g.s);
    }
    golden_encoder(&report, &g);
    golden_gradients(&report, &g, 1);
    double part_loss[LOSSES];
    for (g.s.part = 1; g.s.part < B; g.s.part++) {  // the batch in parts: the same sums
        batch_gradients(part_loss, &g.s, B, golden_load, &g);
        report_add(&report, "loss in parts", fabs(part_loss[LOSS_TOTAL] / loss[LOSS_TOTAL] - 1),
                   1e-5);
        golden_gradients(&report, &g, 1);
    }
    golden_load(&g.s, 0, B, &g);
    golden_steps(&report, &g, loss);
    report_finish(&report, path, print);
    free(logits);
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

// A Work for products up to N columns.
static Work test_work(int N, size_t scratch) {
    Work w = {thread_count(), NULL, NULL, NULL, scratch};
    w.packed_a = xmalloc((size_t)w.threads * MC * KC, sizeof(float));
    w.packed_b = xmalloc((size_t)round_up(N, NR) * KC, sizeof(float));
    w.thread = xmalloc((size_t)w.threads * scratch, sizeof(float));
    return w;
}

static void test_work_free(Work *w) {
    free(w->packed_a);
    free(w->packed_b);
    free(w->thread);
}

// gemm() and small_product() against the reference, over sizes around the edges of its blocks.
// Bound: the rounding of K products and sums, of |a| |b| <= 1.
static void test_gemm(void) {
    static const int sizes[] = {1,      2,  MR - 1, MR, MR + 1, VEC, 2 * VEC,
                                NR - 1, NR, NR + 1, 61, KC + 1};
    enum { MOST = KC + 1, COUNT = sizeof sizes / sizeof sizes[0] };
    size_t n = (size_t)MOST * MOST;
    Work w = test_work(MOST, 16);
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
            gemm(&w, ta, tb, M, N, K, A, lda, B, ldb, add ? NULL : bias, add, C, ldc);
            gemm_reference(ta, tb, M, N, K, A, lda, B, ldb, add ? NULL : bias, add, D, ldc);
            double bound = 2 * ((double)K + 2) * (double)FLT_EPSILON;
            for (size_t k = 0; k < (size_t)M * ldc; k++)
                wrong += !(fabs((double)C[k] - (double)D[k]) <= bound);
            tried++;
        }
    }
    test_check(wrong == 0, "gemm: %d wrong numbers in %d products", wrong, tried);
    for (int m = 1; m < 40; m += 3) {
        int cols = round_up(m + 5, VEC);
        small_product(C, cols, A, 50, 1, B, cols, m, cols, 37);
        gemm_reference(0, 0, m, cols, 37, A, 50, B, cols, NULL, 0, D, cols);
        test_close(C, D, (size_t)m * cols, 1e-6, "small_product");
        small_product(C, cols, A, 1, 50, B, cols, m, cols, 37);
        gemm_reference(1, 0, m, cols, 37, A, 50, B, cols, NULL, 0, D, cols);
        test_close(C, D, (size_t)m * cols, 1e-6, "small_product, transposed");
    }
    test_work_free(&w);
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
        Batch batch;
        Sizes room = {0};
        random_molecule(&m, N, 1 + (int)trial % 3, 1, trial);
        sizes_add(&room, N);
        batch_alloc(&batch, room, 0);
        batch.n_atoms[0] = N;
        batch_layout(&batch, 1);
        batch_set(&batch, 0, &m, &batch.reader[0]);
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
        batch_free(&batch);
    }
    molecule_free(&m);
    test_check(wrong_spd == 0 && pairs > 20000, "shortest paths: %d of %d wrong", wrong_spd, pairs);
    test_check(wrong_path == 0, "bond paths: %d slots wrong", wrong_path);
}

// A model, and a batch of random molecules: one atom, two pieces, no bonds, 2D only, one of 20
// atoms, two atoms at the same place, two larger ones (in all more than PAIR_GROUP atoms).
typedef Step Rig;

static const Blend TEST_BLEND = {0.2, 0.2, 0.6, 0.4, 0.6, 0.2, 0};
#define TEST_WEIGHTS {{0, 6, 0.1, 0.1, 0.5}}

static void rig_molecule(Molecule *m, size_t b) {
    static const int atoms[] = {1, 7, 3, 9, 20, 5, 49, 46}, parts[] = {1, 2, 3, 1, 1, 1, 1, 1};
    random_molecule(m, atoms[b], parts[b], b != 3, 100 + (uint32_t)b);
    if (b == 5) memcpy(m->pos, m->pos + 3, 3 * sizeof(float));
}

static void rig_open(Rig *rig, int tasks, int dropout) {
    enum { B = 8 };
    Config c = {2, 24, 20, 3, 12, tasks};
    Molecule m = {0};
    Sizes room = {0};
    *rig = (Rig){.draws = {11, 4, 0, dropout}, .drop = {0.2, 0.15, 0.3, 0.1},
                 .weights = TEST_WEIGHTS};
    model_create(&rig->model, c, 1);
    formula_params(&rig->model);
    for (size_t b = 0; b < B; b++) {
        rig_molecule(&m, b);
        sizes_add(&room, m.n_atoms);
    }
    batch_alloc(&rig->batch, room, tasks);
    acts_alloc(&rig->acts, c, room);
    for (size_t b = 0; b < B; b++) {
        rig_molecule(&m, b);
        rig->batch.n_atoms[b] = m.n_atoms;
    }
    batch_layout(&rig->batch, B);
    for (size_t b = 0; b < B; b++) {
        rig_molecule(&m, b);
        batch_set(&rig->batch, b, &m, &rig->batch.reader[0]);
        batch_draw(&rig->batch, b, &TEST_BLEND, &rig->draws);
        batch_pairs(&rig->batch, b);
    }
    batch_count(&rig->batch);
    molecule_free(&m);
    encoder_forward(rig);
}

static void rig_close(Rig *rig) {
    model_free(&rig->model);
    batch_free(&rig->batch);
    acts_free(&rig->acts);
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
    linear_forward(&rig->acts.work, rig->acts.ffn_pre, rig->acts.x, p->layer[0].ffn1_w,
                   p->layer[0].ffn1_b, T, rig->model.config.dim, rig->model.config.ffn);
    return weighted_sum(rig->acts.ffn_pre, (size_t)T * rig->model.config.ffn);
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
    linear_backward(&rig.acts.work, rig.acts.dx, 0, rig.model.g.layer[0].ffn1_w,
                    rig.model.g.layer[0].ffn1_b, dout, rig.acts.x, p->ffn1_w, T, C, F);
    test_parameter(&rig, run_linear, p->ffn1_w, "linear: weight");
    test_parameter(&rig, run_linear, p->ffn1_b, "linear: bias");
    test_gradient(&rig, run_linear, rig.acts.x, rig.acts.dx, (size_t)T * C, STEP, "linear: input");
    free(dout);
    rig_close(&rig);
}

static double run_norm(Rig *rig) {
    Acts *a = &rig->acts;
    DropPath drop = {rig->drop.path, &rig->draws, 1, 0};
    norm_forward(a->mid, a->norm1_hat, a->norm1_rstd, a->x, a->context, &drop,
                 rig->model.p.layer[1].norm1_w, rig->model.p.layer[1].norm1_b, &rig->batch, 1,
                 rig->model.config.dim, NORM_EPS);
    return weighted_sum(a->mid, rig->batch.T * (size_t)rig->model.config.dim);
}

// A wrong variance, a branch scaled by another DropPath than in the forward pass, sums over rows.
static void test_norm(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    Acts *a = &rig.acts;
    DropPath drop = {rig.drop.path, &rig.draws, 1, 0};
    int C = rig.model.config.dim, dropped = 0;
    size_t n = rig.batch.T * (size_t)C;
    const float *weight = rig.model.p.layer[1].norm1_w, *bias = rig.model.p.layer[1].norm1_b;
    run_norm(&rig);
    float *plain = xmalloc(n, sizeof *plain);
    for (size_t t = 0; t < rig.batch.T; t++) {  // in double, step by step
        double mean = 0, variance = 0, in[64];
        float scale = droppath_scale(&drop, (size_t)rig.batch.molecule[t]);
        dropped += scale == 0;
        for (int c = 0; c < C; c++) {
            in[c] = (double)a->x[t * (size_t)C + c] +
                    (double)scale * (double)a->context[t * (size_t)C + c];
            mean += in[c] / C;
        }
        for (int c = 0; c < C; c++) variance += (in[c] - mean) * (in[c] - mean) / C;
        for (int c = 0; c < C; c++)
            plain[t * (size_t)C + c] =
                (float)((in[c] - mean) / sqrt(variance + 1e-5) * (double)weight[c] +
                        (double)bias[c]);
    }
    test_close(a->mid, plain, n, 1e-6, "LayerNorm with DropPath: forward");
    test_check(dropped > 0, "DropPath dropped a branch");
    free(plain);
    weights_into(a->dmid, n);
    norm_backward(a->dx, a->branch, &drop, rig.model.g.layer[1].norm1_w,
                  rig.model.g.layer[1].norm1_b, a->norm_parts, a->dmid, a->norm1_hat,
                  a->norm1_rstd, weight, &rig.batch, 1, C);
    test_gradient(&rig, run_norm, a->x, a->dx, n, STEP, "LayerNorm: residual");
    test_gradient(&rig, run_norm, a->context, a->branch, n, STEP, "LayerNorm: branch");
    test_parameter(&rig, run_norm, rig.model.p.layer[1].norm1_w, "LayerNorm: weight");
    test_parameter(&rig, run_norm, rig.model.p.layer[1].norm1_b, "LayerNorm: bias");
    rig_close(&rig);
}

static double run_gelu(Rig *rig) {
    size_t n = rig->batch.T * (size_t)rig->model.config.ffn;
    gelu_forward(rig->acts.ffn_hidden, rig->acts.ffn_pre, n);
    dropout_rows(rig->acts.ffn_hidden, &rig->acts.work, &rig->batch, rig->model.config.ffn,
                 rig->drop.activation, &rig->draws, RNG_ACTIVATION_DROP);
    return weighted_sum(rig->acts.ffn_hidden, n);
}

// The tanh form instead of the exact one, a mask drawn anew in the backward pass.
static void test_gelu(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    int F = rig.model.config.ffn;
    size_t n = rig.batch.T * (size_t)F;
    float *d = xmalloc(n, sizeof *d);
    weights_into(d, n);
    dropout_rows(d, &rig.acts.work, &rig.batch, F, rig.drop.activation, &rig.draws,
                 RNG_ACTIVATION_DROP);
    gelu_backward(d, rig.acts.ffn_pre, n);
    test_gradient(&rig, run_gelu, rig.acts.ffn_pre, d, n, STEP, "gelu and dropout");
    free(d);
    rig.draws.active = 0;
    run_gelu(&rig);
    double worst = 0;
    for (size_t k = 0; k < n; k++) {
        double x = (double)rig.acts.ffn_pre[k], exact = 0.5 * x * (1 + erf(x / sqrt(2.0)));
        worst = fmax(worst, fabs((double)rig.acts.ffn_hidden[k] - exact));
    }
    test_check(worst < 1e-6, "gelu: forward, error %.1e", worst);
    rig_close(&rig);
}

static double run_attention(Rig *rig) {
    attention_forward(rig, 0);
    return weighted_sum(rig->acts.context, rig->batch.T * (size_t)rig->model.config.dim);
}

// softmax(q k^T / sqrt(D) + bias) v, in double, without dropout.
static void plain_attention(float *context, const Rig *rig) {
    int C = rig->model.config.dim, H = rig->model.config.heads, D = C / H;
    for (size_t b = 0; b < rig->batch.B; b++) {
        View v = batch_view(&rig->batch, b);
        int S = v.S, W = v.W;
        size_t first = v.token;
        const float *qkv = rig->acts.qkv + first * 3 * (size_t)C;
        for (int h = 0; h < H; h++)
            for (int s = 0; s < S; s++) {
                const float *bias =
                    rig->acts.attn_bias + bias_at(&rig->batch, H, &v, h) + (size_t)s * W;
                double e[64], sum = 0;
                for (int t = 0; t < S; t++) {
                    double score = 0;
                    for (int d = h * D; d < (h + 1) * D; d++)
                        score += (double)qkv[s * 3 * C + d] * (double)qkv[t * 3 * C + C + d];
                    sum += e[t] = exp(score / sqrt(D) + (double)bias[t]);
                }
                for (int d = h * D; d < (h + 1) * D; d++) {
                    double out = 0;
                    for (int t = 0; t < S; t++)
                        out += e[t] / sum * (double)qkv[t * 3 * C + 2 * C + d];
                    context[(first + (size_t)s) * C + d] = (float)out;
                }
            }
    }
}

// A head that reads its neighbour, a score without scale or bias, softmax undone wrongly.
static void test_attention(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    Acts *a = &rig.acts;
    int C = rig.model.config.dim, H = rig.model.config.heads;
    size_t n = rig.batch.T * (size_t)C;
    memset(a->dattn_bias, 0, rig.batch.bias_size * (size_t)H * sizeof *a->dattn_bias);
    run_attention(&rig);
    float *dqkv = xmalloc(3 * n, sizeof *dqkv), *qkv = xmalloc(3 * n, sizeof *qkv);
    memcpy(qkv, a->qkv, 3 * n * sizeof *qkv);
    weights_into(a->context, n);
    attention_backward(&rig, 0);
    memcpy(dqkv, a->qkv, 3 * n * sizeof *qkv);
    memcpy(a->qkv, qkv, 3 * n * sizeof *qkv);
    test_gradient(&rig, run_attention, a->qkv, dqkv, 3 * n, STEP, "attention: q, k, v");
    test_gradient(&rig, run_attention, a->attn_bias, a->dattn_bias,
                  rig.batch.bias_size * (size_t)H, STEP, "attention: bias");
    free(dqkv);
    free(qkv);
    rig.draws.active = 0;
    run_attention(&rig);
    plain_attention(a->mid, &rig);
    test_close(a->context, a->mid, n, 1e-6, "attention: forward");
    rig_close(&rig);
}

static double run_geometry(Rig *rig) {
    bias3d_forward(rig);
    return weighted_sum(rig->acts.structure3d, rig->batch.A * (size_t)rig->model.config.dim) +
           weighted_sum(rig->acts.bias3d_out, rig->batch.Q * (size_t)rig->model.config.heads);
}

// A width of the wrong kernel, pairs that use no 3D, the row of another element.
static void test_geometry(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    Acts *a = &rig.acts;
    const Tensors *p = &rig.model.p;
    int G = rig.model.config.kernels;
    run_geometry(&rig);
    float *plain = xmalloc(rig.batch.Q * (size_t)G, sizeof *plain);
    size_t q = 0, pair = 0;
    for (size_t b = 0; b < rig.batch.B; b++)  // the definition, with libm
        for (size_t i = rig.batch.atom_start[b]; i < rig.batch.atom_start[b + 1]; i++)
            for (size_t j = rig.batch.atom_start[b]; j < rig.batch.atom_start[b + 1]; j++, pair++) {
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
    test_check(q == rig.batch.Q && q > 100, "%zu pairs use 3D", q);
    test_close(a->gauss, plain, q * (size_t)G, 1e-5, "Gaussians: forward");
    free(plain);
    weights_into(a->structure3d, rig.batch.A * (size_t)rig.model.config.dim);
    weights_into(a->dbias3d_out, rig.batch.Q * (size_t)rig.model.config.heads);
    memset(rig.model.grads, 0, rig.model.table_count * sizeof(float));
    bias3d_backward(&rig, a->structure3d);
    test_parameter(&rig, run_geometry, p->gauss_mean, "Gaussians: means");
    test_parameter(&rig, run_geometry, p->gauss_std, "Gaussians: stds");
    test_parameter(&rig, run_geometry, p->gauss_mul, "Gaussians: mul");
    test_parameter(&rig, run_geometry, p->gauss_bias, "Gaussians: bias");
    test_parameter(&rig, run_geometry, p->bias3d1_w, "3D bias: layer 1");
    test_parameter(&rig, run_geometry, p->bias3d1_b, "3D bias: layer 1 bias");
    test_parameter(&rig, run_geometry, p->bias3d2_w, "3D bias: layer 2");
    test_parameter(&rig, run_geometry, p->structure3d_w, "3D structure");
    rig_close(&rig);
}

static double run_bias(Rig *rig) {
    path_bias_forward(rig);
    bias_forward(rig);
    size_t H = (size_t)rig->model.config.heads;
    return weighted_sum(rig->acts.attn_bias, rig->batch.bias_size * H);
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
    Acts *a = &rig.acts;
    int H = rig.model.config.heads, drawn[8] = {0};
    size_t n = rig.batch.bias_size * (size_t)H, q = 0, pair = 0;
    run_bias(&rig);
    double worst = 0;
    for (size_t b = 0; b < rig.batch.B; b++) {
        View v = batch_view(&rig.batch, b);
        for (int i = 0; i < v.N; i++)
            for (int j = 0; j < v.N; j++, pair++) {
                int use = rig.batch.pair_use[pair];
                drawn[use]++;
                for (int h = 0; h < H; h++) {
                    double expected = use == USE_EDGE ? plain_edge_bias(&rig, pair, h)
                        : (double)(use == USE_3D ? a->bias3d_out[q * (size_t)H + (size_t)h]
                                      : rig.model.p.spd_table[(rig.batch.spd[pair] + 1) * H + h]);
                    const float *ours = a->attn_bias + bias_at(&rig.batch, H, &v, h);
                    worst = fmax(worst, fabs((double)ours[(i + 1) * v.W + j + 1] - expected));
                }
                q += use == USE_3D;
            }
    }
    test_check(worst < 1e-6 && drawn[1] > 20 && drawn[2] > 20 && drawn[4] > 20,
               "blended bias: error %.1e (%d, %d, %d pairs)", worst, drawn[1], drawn[2], drawn[4]);
    memset(a->dattn_bias, 0, n * sizeof *a->dattn_bias);
    weights_into(a->dattn_bias, n);
    memset(rig.model.grads, 0, rig.model.table_count * sizeof(float));
    bias_backward(&rig);
    path_bias_backward(&rig);
    // weights of padding lanes reach nothing: they are no outputs of the pairs
    test_parameter(&rig, run_bias, rig.model.p.spd_table, "bias: SPD table");
    test_parameter(&rig, run_bias, rig.model.p.bond_table, "bias: bond table");
    test_parameter(&rig, run_bias, rig.model.p.path_maps, "bias: path maps");
    test_parameter(&rig, run_bias, rig.model.p.graph_bias, "bias: graph token");
    test_check(rig.model.g.spd_table[0] == 0 && rig.model.g.bond_table[0] == 0, "padding rows");
    rig_close(&rig);
}

static double run_embedding(Rig *rig) {
    embedding_forward(rig);
    return weighted_sum(rig->acts.x, rig->batch.T * (size_t)rig->model.config.dim);
}

// A feature from the row of another one, a table gradient that threads add twice.
static void test_embedding(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    Acts *a = &rig.acts;
    size_t C = (size_t)rig.model.config.dim, n = rig.batch.T * C;
    run_embedding(&rig);
    weights_into(a->dx, n);
    memset(rig.model.grads, 0, rig.model.table_count * sizeof(float));
    float *dstructure = xmalloc(rig.batch.A * C, sizeof *dstructure);
    embedding_backward(&rig, dstructure);
    test_gradient(&rig, run_embedding, a->structure3d, dstructure, rig.batch.A * C, 100 * STEP,
                  "embedding: 3D structure");
    test_parameter(&rig, run_embedding, rig.model.p.atom_table, "embedding: atom table");
    test_parameter(&rig, run_embedding, rig.model.p.in_degree, "embedding: in degree");
    test_parameter(&rig, run_embedding, rig.model.p.out_degree, "embedding: out degree");
    test_parameter(&rig, run_embedding, rig.model.p.graph_token, "embedding: graph token");
    test_parameter(&rig, run_embedding, rig.model.p.embed_norm_w, "embedding: LayerNorm");
    test_check(rig.model.g.atom_table[0] == 0 && rig.model.g.in_degree[0] == 0, "padding rows");
    free(dstructure);
    rig_close(&rig);
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
    const float *maps = rig->acts.pair_map;
    size_t pair = 0;
    float *plain = xmalloc(rig->batch.P * (size_t)K, sizeof *plain);
    for (size_t b = 0; b < rig->batch.B; b++)
        for (size_t i = rig->batch.atom_start[b]; i < rig->batch.atom_start[b + 1]; i++)
            for (size_t j = rig->batch.atom_start[b]; j < rig->batch.atom_start[b + 1]; j++, pair++)
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
    const Acts *a = &rig->acts;
    double worst = 0;
    for (size_t b = 0; b < rig->batch.B; b++) {
        View v = batch_view(&rig->batch, b);
        int N = v.N, W = v.W, a0 = (int)v.token + 1;
        for (int i = 0; i < N; i++)
            for (int axis = 0; axis < 3; axis++) {
                double out = (double)rig->model.p.denoise_axis1_b[axis];
                for (int c = 0; c < C; c++) {
                    const float *prob =
                        a->denoise_prob + bias_at(&rig->batch, H, &v, c / D) + (size_t)i * W;
                    double y = 0;
                    for (int j = 0; j < N; j++)
                        y += (double)prob[j] * (double)a->denoise_qkv[((a0 + j) * 3 + 2) * C + c] *
                             (double)rig->batch.direction[3 * rig->batch.pair_start[b] +
                                                          (size_t)((axis * N + i) * N + j)];
                    out += y * (double)rig->model.p.denoise_axis1_w[axis * C + c];
                }
                const float *ours = a->denoise_out + 3 * (v.atom + (size_t)i);
                worst = fmax(worst, fabs(out - (double)ours[axis]));
            }
    }
    test_check(worst < 1e-5, "denoising head: forward, error %.1e", worst);
}

// Row and column of a pair swapped, logits of another class, a head that feeds back too much.
static void test_heads(void) {
    Rig rig;
    rig_open(&rig, 0, 0);
    Acts *a = &rig.acts;
    const Tensors *p = &rig.model.p;
    size_t P = rig.batch.P, n = rig.batch.T * (size_t)rig.model.config.dim;
    test_check(rig.batch.A > PAIR_GROUP, "more than one group of atoms");
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
    float *x = a->out;
    size_t biases = rig.batch.bias_size * (size_t)rig.model.config.heads;
    float *dbias = xmalloc(biases, sizeof *dbias);
    memcpy(dbias, a->dattn_bias, biases * sizeof *dbias);
    test_gradient(&rig, run_heads, x, a->dx, n, STEP, "heads: input");
    test_gradient(&rig, run_heads, a->attn_bias, dbias, biases, STEP, "denoising head: bias");
    free(dbias);
    float *const tensors[] = {p->spd_row_w,      p->edge_col_w,   p->dir_row_b,  p->dir_col_norm_w,
                              p->spd_row_norm_b, p->spd_w,        p->spd_b,     p->edge_w,
                              p->edge_b,         p->dir_w,         p->dir_b,      p->dir_axis2_w,
                              p->dir_axis3_b,     p->denoise_q_w,    p->denoise_v_w, p->denoise_v_b,
                              p->denoise_axis1_w,  p->denoise_axis2_b};
    for (size_t k = 0; k < sizeof tensors / sizeof tensors[0]; k++) {
        char what[32];
        snprintf(what, sizeof what, "heads: tensor %zu", k);
        test_parameter(&rig, run_heads, tensors[k], what);
    }
    rig_close(&rig);
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
    rig_close(&rig);
}

// A molecule's result does not depend on what else is in the batch.
static void test_packing(void) {
    Rig rig;
    rig_open(&rig, 0, 0);
    size_t C = (size_t)rig.model.config.dim, b = 4, N = (size_t)rig.batch.n_atoms[b];
    size_t first = (size_t)rig.batch.atom_start[b] + b;
    float *together = xmalloc((N + 1) * C, sizeof *together);
    memcpy(together, rig.acts.out + first * C, (N + 1) * C * sizeof *together);
    Molecule m = {0};
    rig_molecule(&m, b);
    rig.batch.n_atoms[0] = m.n_atoms;
    batch_layout(&rig.batch, 1);
    batch_set(&rig.batch, 0, &m, &rig.batch.reader[0]);
    rig.draws.first_slot = (uint32_t)b;
    batch_draw(&rig.batch, 0, &TEST_BLEND, &rig.draws);
    batch_pairs(&rig.batch, 0);
    batch_count(&rig.batch);
    encoder_forward(&rig);
    test_close(rig.acts.out, together, (N + 1) * C, 1e-6,
               "alone and in a batch");
    free(together);
    molecule_free(&m);
    rig_close(&rig);
}

// 500 atoms, all together with one atom and without positions: finite losses and gradients.
static void test_large(void) {
    Config c = {1, 16, 16, 2, 4, 0};
    Molecule m = {0};
    Sizes room = {0};
    Step s = {.draws = {3, 0, 0, 1}, .drop = {0.1, 0.1, 0.1, 0}, .weights = TEST_WEIGHTS};
    static const int atoms[] = {500, 1, 12}, parts[] = {1, 1, 2};
    for (int b = 0; b < 3; b++) sizes_add(&room, atoms[b]);
    model_create(&s.model, c, 1);
    model_init(&s.model, 5);
    batch_alloc(&s.batch, room, 0);
    acts_alloc(&s.acts, c, room);
    for (int b = 0; b < 3; b++) s.batch.n_atoms[b] = atoms[b];
    batch_layout(&s.batch, 3);
    for (size_t b = 0; b < 3; b++) {
        random_molecule(&m, atoms[b], parts[b], b != 2, (uint32_t)b);
        batch_set(&s.batch, b, &m, &s.batch.reader[0]);
        batch_draw(&s.batch, b, &TEST_BLEND, &s.draws);
        batch_pairs(&s.batch, b);
    }
    batch_count(&s.batch);
    double loss[LOSSES];
    gradients(loss, &s);
    double norm = gradient_norm(&s.model);
    test_check(isfinite(loss[LOSS_TOTAL]) && isfinite(norm) && norm > 0,
               "500 atoms: loss %g, gradient %g", loss[LOSS_TOTAL], norm);
    molecule_free(&m);
    rig_close(&s);
}

static double run_task(Rig *rig) {
    float logits[32];
    task_head_forward(logits, rig, READ_MEAN);
    return weighted_sum(logits, rig->batch.B * 2);
}

// A read-out over the wrong tokens, its weight left out in the backward pass.
static void test_task_head(void) {
    Rig rig;
    rig_open(&rig, 2, 0);
    float dlogits[32];
    size_t n = rig.batch.T * (size_t)rig.model.config.dim;
    run_task(&rig);
    weights_into(dlogits, rig.batch.B * 2);
    task_head_backward(&rig, dlogits, READ_MEAN);
    test_gradient(&rig, run_task, rig.acts.out, rig.acts.dx, n,
                  STEP, "fine-tuning head: input");
    test_parameter(&rig, run_task, rig.model.p.head1_w, "fine-tuning head: dense");
    test_parameter(&rig, run_task, rig.model.p.head2_b, "fine-tuning head: bias");
    rig_close(&rig);
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
    weights_into(rig.acts.structure3d, rig.batch.A * (size_t)rig.model.config.dim);
    weights_into(rig.acts.dbias3d_out, rig.batch.Q * (size_t)rig.model.config.heads);
    bias3d_backward(&rig, rig.acts.structure3d);
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
    rig_close(&rig);
}

// Masks are drawn for (n, n) numbers: rows padded to whole vectors do not change them.
static void test_mask(void) {
    Step step = {.draws = {7, 3, 0, 1}, .drop = {.attention = 0.5}};
    HeadTask task = {.n = 5, .W = 16, .purpose = RNG_ATTENTION_DROP, .slot = 2, .head = 1};
    float mask[5 * 16], plain[25];
    int same = 0;
    attention_mask(mask, &step, &task);
    dropout_row(plain, 25, 0.5, &step.draws, RNG_ATTENTION_DROP, 2, 1);
    for (int k = 0; k < 25; k++) same += mask[k / 5 * 16 + k % 5] == plain[k];
    test_check(same == 25, "%d of 25 numbers of a mask are those of the row without padding", same);
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
    mean_metrics(metric, TASK_REGRESSION, scores, values, 5, 2);
    test_check(isnan(metric[METRIC_RMSE]) && !isnan(metric[METRIC_R2]),
               "errors in different units are not averaged");
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

// Writes a dataset of n random molecules with two tasks; moved: one atom of each elsewhere.
static void write_test_dataset(const char *path, int n, int moved) {
    static char logp[] = "logP", name[] = "with,comma";
    char *const tasks[] = {logp, name};
    DatasetWriter w;
    Molecule m = {0};
    uint8_t *record = NULL;
    dataset_create(&w, path, 2, tasks);
    for (int i = 0; i < n; i++) {
        random_molecule(&m, 1 + i * 5 % 23, 1 + i % 2, i % 7 != 3, (uint32_t)i);
        if (moved) m.pos[0] += 1;
        size_t size = record_size(m.n_atoms, m.n_bonds, 2, m.name_length, m.has_pos);
        record = xrealloc(record, size, 1);
        dataset_append(&w, record, record_encode(record, &m), (uint32_t)i + 1);
    }
    dataset_finish(&w);
    free(record);
    molecule_free(&m);
}

// A field read in another order than written, bytes from outside that crash the reader.
static void test_dataset(void) {
    const char *path = "build/test_data.bin";
    write_test_dataset(path, 40, 0);
    Dataset d;
    Molecule m = {0}, expected = {0};
    dataset_open(&d, path);
    test_check(d.count == 40 && d.n_tasks == 2 && strcmp(d.task_names[1], "with,comma") == 0,
               "dataset header");
    int same = 0;
    for (int i = 39; i >= 0; i--) {
        random_molecule(&expected, 1 + i * 5 % 23, 1 + i % 2, i % 7 != 3, (uint32_t)i);
        dataset_read(&d, (size_t)i, &m);
        size_t n = (size_t)m.n_atoms, bonds = (size_t)m.n_bonds;
        same += m.n_atoms == expected.n_atoms && m.n_bonds == expected.n_bonds &&
                m.has_pos == expected.has_pos && !memcmp(m.atom_feat, expected.atom_feat, 9 * n) &&
                !memcmp(m.bonds, expected.bonds, 4 * bonds) &&
                !memcmp(m.bond_code, expected.bond_code, bonds) &&
                (!m.has_pos || !memcmp(m.pos, expected.pos, 12 * n)) &&
                !memcmp(m.labels, expected.labels, 4) &&
                isnan(m.labels[1]) == isnan(expected.labels[1]);
    }
    test_check(same == 40, "dataset round trip: %d of 40 molecules the same", same);
    // any bytes, as if behind a right checksum: an error or a molecule, never a crash
    uint8_t record[4096];
    uint64_t begin = get_u64(d.index + 8 * 20) >> 16, end = get_u64(d.index + 8 * 21) >> 16;
    size_t size = (size_t)(end - begin);
    int refused = 0;
    for (uint32_t k = 0; k < 20000; k++) {
        memcpy(record, d.data + begin, size);
        for (uint32_t change = 0; change < 1 + k % 3; change++)
            record[4 + rng_bits(k, 60, change, 0, 0) % (size - 4)] =
                (uint8_t)rng_bits(k, 61, change, 0, 0);
        refused += record_content(&m, record, size, 2) != NULL;
    }
    test_check(refused > 3000 && refused < 20000, "mutated records: %d of 20000 refused", refused);
    dataset_close(&d);
    molecule_free(&m);
    molecule_free(&expected);
}

// A tensor under another name or type, metadata that do not survive quotes and backslashes.
static void test_checkpoint(void) {
    const char *path = "build/test_model.safetensors";
    Config c = {2, 24, 20, 3, 12, 0};
    Model model, again;
    TensorFile f;
    model_create(&model, c, 1);
    model_init(&model, 9);
    float *const arenas[ARENAS] = {model.params};
    model_write(path, &model, arenas, NULL, 0, "{\"format\":\"pt\",\"quote\\\"d\":\"a\\\\b\"}");
    tensor_file_open(&f, path);
    Config read = tensor_file_config(&f);
    test_check(memcmp(&c, &read, sizeof c) == 0, "sizes from a checkpoint's shapes");
    test_check(f.meta_count == 3 && tensor_meta(&f, "quote\"d") &&
                   !strcmp(tensor_meta(&f, "quote\"d"), "a\\b"),
               "metadata with escapes");
    model_create(&again, c, 0);
    model_load(&again, again.params, &f, "");
    test_check(memcmp(model.params, again.params, model.count * sizeof(float)) == 0,
               "checkpoint round trip");
    // names as training frameworks wrap them
    TensorOut *out = xmalloc((size_t)model.n_tensors, sizeof *out);
    for (int i = 0; i < model.n_tensors; i++) {
        const TensorInfo *t = &model.info[i];
        out[i] = (TensorOut){xprintf("module.%s", t->name), t->rows, t->columns,
                             model.params + t->offset};
    }
    tensor_file_close(&f);
    tensor_file_write(path, out, (size_t)model.n_tensors, "{\"format\":\"pt\"}");
    for (int i = 0; i < model.n_tensors; i++) free(out[i].name);
    free(out);
    tensor_file_open(&f, path);
    memset(again.params, 0, again.count * sizeof(float));
    model_load(&again, again.params, &f, "");
    test_check(memcmp(model.params, again.params, model.count * sizeof(float)) == 0,
               "names behind module.");
    // -2.5, 2^-24, infinity, -2^-24
    static const uint8_t half[16] = {0x00, 0xC1, 0x01, 0x00, 0x00, 0x7C, 0x01, 0x80};
    static const uint8_t brain[16] = {0x20, 0xC0}, wide[16] = {0, 0, 0, 0, 0, 0, 4, 0xC0};  // -2.5
    const TensorEntry f16 = {.dtype = "F16", .data = half}, f64 = {.dtype = "F64", .data = wide};
    const TensorEntry bf16 = {.dtype = "BF16", .data = brain};
    test_check(tensor_value(&f16, 0) == -2.5f && tensor_value(&f16, 1) == 0x1p-24f &&
                   isinf(tensor_value(&f16, 2)) && tensor_value(&f16, 3) == -0x1p-24f &&
                   tensor_value(&bf16, 0) == -2.5f && tensor_value(&f64, 0) == -2.5f,
               "F16, BF16 and F64 are converted");
    tensor_file_close(&f);
    model_write(path, &model, arenas, NULL, 0, "{\"format\":\"pt\"}");
    tensor_file_open(&f, path);
    test_check(tensor_find(&f, "encoder.molecule_encoder.layers.1.self_attn.q_proj.weight") != NULL,
               "official names");
    tensor_file_close(&f);
    model_free(&model);
    model_free(&again);
}

// Parameters of the named sizes, and the initial values.
static void test_parameter_table(void) {
    static const struct { Config c; double millions;
    } sizes[] = {{{2, 64, 64, 4, 16, 0}, 0.85},
                 {{6, 256, 256, 8, 64, 0}, 4.5},
                 {{12, 768, 768, 32, 128, 0}, 49.5}};
    for (int k = 0; k < 3; k++) {
        Model m = {.config = sizes[k].c, .n_tensors = tensor_table(sizes[k].c, NULL)};
        m.info = xmalloc((size_t)m.n_tensors, sizeof *m.info);
        tensor_table(sizes[k].c, m.info);
        const TensorInfo *last = &m.info[m.n_tensors - 1];
        double millions = (double)(last->offset + last->count) / 1e6;
        test_check(fabs(millions / sizes[k].millions - 1) < 0.01, "size %d: %.2f M parameters", k,
                   millions);
        free(m.info);
    }
    Model m;
    model_create(&m, sizes[0].c, 1);
    model_init(&m, 1);
    const LayerTensors *l = &m.p.layer[1];
    test_check(l->k_w == l->q_w + 64 * 64 && l->v_w == l->k_w + 64 * 64 && l->v_b == l->q_b + 128 &&
                   m.p.dir_col_w == m.p.spd_row_w + 5 * 32 * 64 &&
                   m.p.denoise_v_b == m.p.denoise_q_b + 128 &&
                   m.p.dir_axis3_w == m.p.dir_axis1_w + 2 * DIR_INNER,
               "matrices used as one stand next to each other");
    test_check(m.p.atom_table[0] == 0 && m.p.gauss_mul[0] == 0 && m.p.gauss_mul[1] == 0.5f &&
                   m.p.atom_table[64] != 0 && l->norm1_w[3] == 1 && l->q_b[0] == 0 &&
                   m.p.gauss_mean[0] >= 0 && m.p.gauss_mean[0] < 3, "initial values");
    model_free(&m);
}

// ---- the programs, by their command lines

// Runs a command with its output in build/test.out; returns the exit code.
static int run_command(const char *command) {
    char *line = xprintf("%s%s%s > build/test.out 2>&1", MB_POSIX ? "(" : "", command,
                         MB_POSIX ? "\n)" : "");
    fflush(stdout);
#ifdef __wasi__  // a program cannot start another
    int status = -1;
#else
    int status = system(line);
#endif
    free(line);
#if MB_POSIX
    return status == -1 || status & 0x7f ? 1000 + status : status >> 8;
#else
    return status;
#endif
}

static void write_bytes(const char *path, const void *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0, "%s: cannot write", path);
}

// The first bytes of a file, as text, in fresh memory; empty if it cannot be read.
static char *file_text(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    char *text = xmalloc(1 << 22, 1);
    *size = f ? fread(text, 1, (1 << 22) - 1, f) : 0;
    if (f) fclose(f);
    return text;
}

static int same_files(const char *a, const char *b) {
    size_t n, m;
    char *x = file_text(a, &n), *y = file_text(b, &m);
    int same = n > 0 && n == m && memcmp(x, y, n) == 0;
    free(x);
    free(y);
    return same;
}

// The command must end with this code, and its output contain this text. Not run where there is no
// Unix shell and it needs one.
static void test_command(const char *command, int code, const char *expected) {
    size_t n;
    if (!MB_POSIX && strpbrk(command, "|&;'")) return;
    int got = run_command(command);
    char *text = file_text("build/test.out", &n);
    test_check(got == code && strstr(text, expected),
               "%s\n  exit code %d (expected %d), expected \"%s\" in:\n%s", command, got, code,
               expected, text);
    free(text);
}

// A wrong command line that goes unnoticed, dies without a reason, or writes something.
static void test_messages(void) {
    static const struct { const char *command; int code; const char *expected;
    } table[] = {
        {"./moleblend --help", 0, "--batch-size N"},
        {"./moleblend", 1, "moleblend: expected ./moleblend train.bin"},
        {"./moleblend --stps 3 x.bin", 1, "unknown option --stps; did you mean --steps?"},
        {"./moleblend build/test_train.bin --steps x", 1,
         "--steps: expected a whole number from 1"},
        {"./moleblend build/test_train.bin --steps", 1, "--steps: expected a value (N) after it"},
        {"./moleblend build/test_train.bin --steps 0", 1, "expected a whole number from 1 to"},
        {"./moleblend build/test_train.bin --steps 99999999999999999999", 1, "from 1 to"},
        {"./moleblend build/test_train.bin --lr 1x", 1, "expected a number from 0 to 10"},
        {"./moleblend build/test_train.bin --lr -1", 1, "expected a number from 0 to 10"},
        {"./moleblend --zzzzzzzzzzzzzzzzz 1", 1, "unknown option --zzzzzzzzzzzzzzzzz; see --help"},
        {"./moleblend finetune --help", 0, "--epochs N"},
        {"./moleblend build/test_train.bin --lr nan", 1,
         "--lr: expected a number from 0 to 10, found \"nan\""},
        {"./moleblend build/test_train.bin --size huge", 1, "--size: expected tiny, small or base"},
        {"./moleblend build/test_train.bin --heads 7", 1,
         "--heads: expected a divisor of the dimension 256"},
        {"./moleblend no_such.bin", 1, "moleblend: no_such.bin: cannot read:"},
        {"./moleblend Makefile", 1, "Makefile: not a dataset file"},
        {"./moleblend build", 1, "build: cannot read"},
        {"./moleblend build/test_train.bin extra", 1, "expected ./moleblend train.bin"},
        {"rm -f build/test_fresh.*; ./moleblend build/test_train.bin --resume --size tiny --steps "
         "1 -o build/test_fresh.safetensors", 0, "nothing is saved in build/test_fresh"},
        {"./moleblend build/test_train.bin --batch-size 41", 1,
         "--batch-size: 41 is more than the 40 molecules"},
        {"./moleblend build/test_train.bin --init build/test_model.safetensors --dim 32", 1,
         "build/test_model.safetensors: has --layers 2 --dim 24"},
        {"./moleblend build/test_train.bin --init build/test_model.safetensors --steps 1 -o "
         "build/test_fresh.safetensors", 0, "model   2 layers, 24 wide"},
        // an output that cannot be written is found before the inputs that are not there, so before
        // the first step
        {"./moleblend build/test_train.bin --init none -o no_dir/x.safetensors", 1,
         "no_dir/x.safetensors.tmp: cannot write"},
        {"./moleblend build/test_train.bin --init none -o build", 1,
         "build: cannot write: expected a regular file"},
        {"./moleblend finetune build/test_train.bin --valid none -o no_dir/x.safetensors", 1,
         "no_dir/x.safetensors.tmp: cannot write"},
        {"./moleblend info build/test_train.bin", 0, "dataset, 40 molecules"},
        {"./moleblend info data/mini.safetensors", 0, "tensor file"},
        {"./moleblend info README.md", 1, "README.md: not a .safetensors file"},
        // a length read from fewer than eight bytes once reached beyond the file
        {"printf 1234567 > build/x; ./moleblend info build/x", 1, "build/x: not a .safetensors"},
        {"./moleblend show build/test_train.bin 2", 0, "one blend"},
        {"./moleblend show build/test_train.bin 40", 1,
         "expected the index of one of its 40 molecules"},
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --task "
         "classification --size tiny",
         1, "expected labels 0 and 1 for --task classification"},
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --epochs 2 --size "
         "tiny "
         "--modality both --readout mean -o build/test_ft.safetensors",
         0, "by chance (the training mean for all): valid  R2"},
        // 3D asked of molecules without positions, classes, and a checkpoint's own settings
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --epochs 1 --size "
         "tiny --modality 3d -o build/test_ft2.safetensors", 1,
         "--modality 3d: 6 of 40 molecules have no positions"},
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --epochs 1 --size "
         "tiny --modality both -o build/test_ft2.safetensors", 0,
         "6 of 40 molecules have no positions and take part with 2D only"},
        {"./moleblend embed build/test_train.bin --model build/test_ft.safetensors -o "
         "build/test.npy", 0, "6 of 40 molecules have no positions"},
        {"printf 'smiles,a,b\\nC,0,1\\nCC,1,1\\nCCC,0,1\\n' | ./data_prep --format csv --labels "
         "a,b -o build/test_class.bin - && ./moleblend finetune build/test_class.bin --valid "
         "build/test_class.bin --size tiny", 1, "task b: all labels are 1; expected both classes"},
        {"printf 'smiles,a\\nC,0\\nCC,1\\nCCC,0\\n' | ./data_prep --format csv --labels a -o "
         "build/test_class.bin - && ./moleblend finetune build/test_class.bin --valid "
         "build/test_class.bin --size tiny --epochs 1 -o build/test_ft2.safetensors", 0,
         "classification: the labels are all 0 and"},
        {"./moleblend predict build/test_train.bin --model build/test_ft.safetensors", 0,
         "record,name,logP,logP label,\"with,comma\",\"with,comma label\",skipped\n1,mol ,"},
        // a task's name with what CSV and JSON must escape, and another set's tasks
        {"./data_prep --labels all -o build/test_q.bin build/test_q.csv", 0, "3 molecules"},
        {"./moleblend finetune build/test_train.bin --valid build/test_q.bin", 1,
         "build/test_q.bin: expected the tasks of build/test_train.bin"},
        {"./moleblend finetune build/test_q.bin --valid build/test_q.bin --size tiny --epochs 1 -o "
         "build/test_q.safetensors", 0, "by chance"},
        {"./moleblend predict build/test_q.bin --model build/test_q.safetensors", 0,
         "record,name,\"a\"\"\\b\",\"a\"\"\\b label\",skipped\n1,C,"},
        {"./data_prep --labels none -o build/test_bare.bin data/sample.sdf", 1, "--labels"},
        {"./data_prep -o build/test_bare.bin data/sample.sdf", 0, "2000 molecules"},
        {"./moleblend predict build/test_bare.bin --model build/test_ft.safetensors", 0,
         "record,name,logP,\"with,comma\",skipped\n1,"},
        {"./moleblend embed build/test_bare.bin --model build/test_ft.safetensors -o "
         "build/test.npy",
         0, "embedded"},
        {"./moleblend predict build/test_train.bin --model build/test_model.safetensors", 1,
         "not a fine-tuned model"},
        {"./moleblend predict build/test_train.bin", 1, "--model: expected a checkpoint"},
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --epochs 1 "
         "--init build/test_model.safetensors -o build/test_ft2.safetensors --seeds 2",
         0, "over 2 seeds"},
        {"./moleblend embed build/test_train.bin --model build/test_model.safetensors -o "
         "build/test.npy",
         0, "embedded"},
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --readout max", 1,
         "--readout: expected cls, mean or sum, found \"max\""},
        {"./moleblend build/test_train.bin --init data/mini.safetensors --steps 1", 1,
         "not a MoleBLEND model: expected a tensor"},
        {"./moleblend build/test_train.bin --init build/test_ft.safetensors --steps 1", 1,
         "is missing"},
        {"./data_prep", 1, "data_prep: no input; see --help"},
        {"./data_prep data/ethanol.sdf", 1, "-o: expected the dataset to write"},
        {"./data_prep --help", 0, "--split"},
        {"./data_prep no_such.sdf -o build/x.bin", 1, "data_prep: no_such.sdf"},
    };
    const char *rows = "smiles,\"a\"\"\\b\"\nC,0\nCC,1\nCCC,3\n";
    write_bytes("build/test_q.csv", rows, strlen(rows));
    for (size_t k = 0; k < sizeof table / sizeof table[0]; k++)
        test_command(table[k].command, table[k].code, table[k].expected);
#if MB_POSIX  // catches a 32-bit program that cannot open files over 2 GiB
    test_command("dd if=/dev/zero of=build/big.bin bs=1 count=1 seek=2300000000 2> build/dd.out; "
                 "./moleblend show build/big.bin 0; c=$?; rm build/big.bin; exit $c", 1,
                 "build/big.bin: not a dataset file");
#endif
}

// The files people have, as they are distributed: labels beside the SD file (QM9's gdb9.sdf.csv by
// title, PCQM4Mv2's by position), lists of records to leave out, splits that are given. A label or
// part of another record.
static void test_files_people_have(void) {
    if (!MB_POSIX) return;  // a shell makes its files
    static const struct { const char *command; int code; const char *expected;
    } table[] = {
        {"for i in 1 2 3 4; do printf 'gdb_%d\n x\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\n    "
         "0.0000    0.0000    0.0000 C   0  0\nM  END\n$$$$\n' $i; done > build/g.sdf; printf "
         "'mol_id,smiles,mu,gap\ngdb_1,C,0,1\ngdb_4,C,3,\n\"gdb_2\",C,1,2\n' > build/g.csv", 0, ""},
        {"./data_prep -o - --labels gap,mu --labels-from build/g.csv build/g.sdf 2> build/g.err | "
         "./data_prep --dump - | sed 's/.*labels..//'", 0,
         "[1,0]}\n[2,1]}\n[null,null]}\n[null,3]}\n"},
        {"cat build/g.err", 0, "of which --labels-from says nothing: 1"},
        {"./data_prep -o - --labels all --labels-from build/g.csv --labels-by number build/g.sdf "
         "2> build/g.err | ./data_prep --dump - | sed 's/.*labels..//'", 0,
         "[0,1]}\n[3,null]}\n[1,2]}\n[null,null]}\n"},
        {"cat build/g.err", 0, "--labels all leaves out \"smiles\": no usable number in record 1"},
        {"./data_prep -o build/g.bin --labels gapp --labels-from build/g.csv build/g.sdf", 1,
         "build/g.csv:1: expected a column \"gapp\""},
        {"./data_prep -o build/g.bin --labels-from build/g.csv build/g.sdf", 1,
         "expected --labels too"},
        {"printf 'These failed:\n Index  SMILES\n-----\n  2 CC\ngdb_4 CO\n' > build/g.txt; "
         "./data_prep -o build/g.bin --skip-list build/g.txt --rejects build/r.csv build/g.sdf && "
         "cat build/r.csv", 0,
         "record,name,line,reason\n2,gdb_2,8,build/g.txt names it\n"
         "4,gdb_4,22,build/g.txt names it\n"},
        {"printf '3,054 molecules:\n 2 CC\n' > build/l.txt; ./data_prep -o build/g.bin --skip-list "
         "build/l.txt build/g.sdf", 0, "1  in --skip-list\n          build/g.sdf:8: build/l.txt"},
        {"echo none > build/l.txt; ./data_prep -o build/g.bin --skip-list build/l.txt build/g.sdf",
         0, "build/l.txt: names no record"},
        {"./data_prep -o build/g.bin --skip-list build/g.txt --max-reject 20 build/g.sdf", 1,
         "50.00 % of the records are refused, more than 20 %; nothing is written"},
        {"./data_prep -o 'build/g.{}.bin' --split 2,1,rest --split-by order build/g.sdf", 0,
         "test            1 molecules"},
        {"./data_prep -o 'build/g.{}.bin' --split 4,1,rest build/g.sdf", 1,
         "asks for 5 molecules, there are 4"},
        {"./data_prep -o 'build/g.{}.bin' --split 2,1 build/g.sdf", 1,
         "asks for 3 molecules, there are 4"},
        {"./data_prep -o 'build/g.{}.bin' --split 0.5,0.6 build/g.sdf", 1, "that add up to 1"},
        {"printf '1 test\n2 train\ngdb_3 train\n4 val\n' > build/p.txt; ./data_prep -o "
         "'build/g.{}.bin' --split-by file:build/p.txt build/g.sdf && ./data_prep --dump "
         "build/g.test.bin", 0, "{\"name\":\"gdb_1\""},
        {"printf 'smiles,set,y\nCC,train,1\nCCO,test,2\nC,foo,2\n' | ./data_prep --format csv -o "
         "'build/g.{}.bin' --labels y --split-by column:set -", 0,
         "-:4: expected train, valid or test, found \"foo\""},
        {"./data_prep -o 'build/g.{}.bin' --split-by chance build/g.sdf", 1,
         "column:NAME or file:PATH"},
        {"printf 'CC(=O)[O-].[Na+]\nO.c1ccccc1.C\n' | ./data_prep --format smi "
         "--largest-fragment -o - - 2> /dev/null | ./data_prep --dump - | tr -cd '\n[' | "
         "awk '{print length}'", 0,
         "12\n15\n"},
        {"./data_prep -o build/g.bin 'CC(=O)O'", 1,
         "type: echo 'CC(=O)O' | ./data_prep --format smi"},
        {"./data_prep -o build/g.bin --labels logPP data/sample.sdf", 1,
         "records has an SD tag \"logPP\" (--labels); the first has: logP, TPSA"},
    };
    for (size_t k = 0; k < sizeof table / sizeof table[0]; k++)
        test_command(table[k].command, table[k].code, table[k].expected);
}

// Molecules to predictions, vectors and pictures: a row that is missing, or of another record.
static void test_using(void) {
    if (!MB_POSIX) return;  // a shell makes its datasets
    static const struct { const char *command; int code; const char *expected;
    } table[] = {
        // a pipe; a row for each record, also for those that are skipped; no name: the number
        {"printf 'CCO ethanol\nC(C junk\nc1ccccc1 benzene\n' | ./data_prep --format smi -o - - | "
         "./moleblend predict - --model build/test_ft.safetensors 2> /dev/null | "
         "sed 's/,-*[0-9.e-]*[0-9]\\b/,#/g'", 0,
         "record,name,logP,\"with,comma\",skipped\n1,ethanol,#,#,\n"
         "2,junk,,,\"expected ), found the end\"\n3,benzene,#,#,\n"},
        {"printf '\n x\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\n    0.0000    0.0000    "
         "0.0000 C   0  0\nM  END\n$$$$\n' | ./data_prep --format sdf -o - - | ./data_prep "
         "--dump -", 0, "{\"name\":\"1\","},
        {"./moleblend predict build/test_train.bin -o build/p.csv --model "
         "build/test_ft.safetensors && wc -l < build/p.csv", 0, "RMSE"},
        {"printf 'smiles,a\\nC,0\\nCC,1\\nCCC,0\\n' | ./data_prep --format csv --labels a -o "
         "build/test_u.bin -", 0, "3"},
        // a classifier that has learnt nothing says the share of ones, 1/3
        {"./moleblend finetune build/test_u.bin --valid build/test_u.bin --size tiny --epochs 1 "
         "--lr 1e-9 -o build/test_br.safetensors && ./moleblend predict build/test_u.bin --model "
         "build/test_br.safetensors | awk -F, 'NR > 1 { s += $3 } END { print s / 3 }'", 0,
         "\n0.33"},
        // an ensemble: mean and deviation of its members
        {"./moleblend finetune build/test_u.bin --valid build/test_u.bin --size tiny "
         "--epochs 1 --seeds 2 -o build/test_en.safetensors", 0, "Brier score"},
        {"./moleblend predict build/test_u.bin --model build/test_en.seed1.safetensors "
         "build/test_en.seed2.safetensors", 0, "record,name,a,a deviation,a label,skipped\n1,C,0."},
        {"./moleblend predict build/test_u.bin --model build/test_en.seed1.safetensors "
         "build/test_ft.safetensors", 1, "expected the tasks of the first model"},
        {"./moleblend predict build/test_u.bin", 1, "--model: expected a checkpoint"},
        {"./moleblend embed build/test_u.bin", 1, "--model: expected a checkpoint"},
        // the model of the default size, as float16
        {"./moleblend finetune build/test_u.bin --valid build/test_u.bin --epochs 1 --init "
         "data/small.safetensors -o build/test_sm.safetensors 2>&1", 0,
         "116 encoder tensors loaded, 0 missing, 48 left behind"},
        // vectors of atoms, of a layer; whose they are
        {"./moleblend embed build/test_u.bin --level atom --layer 1 --model "
         "build/test_model.safetensors -o build/test_v.npy && cat build/test_v.csv", 0,
         "row,rows,record,name\n0,1,1,C\n1,2,2,CC\n3,3,3,CCC\n"},
        {"tail -c +11 build/test_v.npy | head -c 80", 0, "'shape': (6, 24)"},
        {"tail -c +11 build/test_v.index.npy | head -c 80", 0,
         "'<u4', 'fortran_order': False, 'shape': (6,)"},
        {"./moleblend embed build/test_u.bin --layer 3 --model build/test_model.safetensors", 1,
         "--layer: expected at most 2, found 3"},
        {"./moleblend embed - -o - --model build/test_model.safetensors < build/test_u.bin 2> "
         "/dev/null | wc -c", 0, "416"},
        // what the model says of a pair; a picture
        {"./moleblend show build/test_e.bin 0 --model build/test_model.safetensors", 0,
         "path length (truth)  probability"},
        {"./moleblend show build/test_e.bin 0 --model build/test_ft.safetensors", 1,
         "expected a pretrained one"},
        {"./moleblend show build/test_e.bin 0 --svg build/e.svg && grep -c rect build/e.svg", 0,
         "\n49\n"},
        // the command line as hands expect it
        {"./moleblend -h", 0, "--batch-size N"},
        {"./moleblend help", 0, "--batch-size N"},
        {"./moleblend finetune --help", 0, "--beta2 X                AdamW (default 0.999)"},
        {"./moleblend finetune --help", 0, "(default finetuned.safetensors)"},
        {"./moleblend --version", 0, "moleblend 1."},
        {"./data_prep --version", 0, "data_prep 1."},
        {"./moleblend finetnue build/test_train.bin", 1, "did you mean finetune?"},
        {"./moleblend build/test_train.bin --steps=x", 1, "found \"x\""},
        {"./moleblend build/test_train.bin --resume=1", 1, "--resume: expected no value"},
        {"./moleblend build/test_train.bin --epochs 2", 1, "unknown option --epochs"},
        {"./moleblend build/test_train.bin --no-blend --pair-3d 0.5", 1,
         "--no-blend shows everything"},
        {"./moleblend show build/test_e.bin 0 --pair-3d 0.8", 0,
         "sum to 1.2 and are taken as parts"},
        {"./data_prep -o - --split 0.5,0.5 data/sample.sdf", 1, "room for one dataset"},
    };
    for (size_t k = 0; k < sizeof table / sizeof table[0]; k++)
        test_command(table[k].command, table[k].code, table[k].expected);
    const float logits[] = {4, -4, 4, -4, 4, -4, 4, -4}, labels[] = {1, 0, 1, 0, 1, 0, 0, 1};
    // three of four are right: sigmoid(4 s) = 3/4
    test_check(fabsf(calibration(logits, labels, 8) - 0.27465f) < 1e-4f, "calibration: %g",
               (double)calibration(logits, labels, 8));
}

// The worked example: what `show` prints of ethanol is what the comments in moleblend.c say.
static void test_example(void) {
    static const char *const printed[] = {
        "0.0   1.5    --", "1.5     0   1.4", "2.4     1     .", "2D 3D 3D",
        "0 2     (path_bias[0][0] + path_bias[1][0]) / 2       1   0  0 -1 -1 -1  1.99  0.95"};
    static const char *const written[] = {
        "0.0  1.5  --", "1.5  0    1.4", "2.4  1    .", "(path_bias[0][0] + path_bias[1][0]) / 2",
        "(two bonds), edge classes 0 and 0 (single bonds)", "0.0 1.5 2.4", "1.5 0.0 1.4",
        "2.4 1.4 0.0"};
    size_t n;
    char *source = file_text("moleblend.c", &n);
    test_command("./data_prep -o build/test_e.bin data/ethanol.sdf", 0, "1 molecules");
    for (size_t k = 0; k < sizeof printed / sizeof printed[0]; k++)
        test_command("./moleblend show build/test_e.bin 0", 0, printed[k]);
    for (size_t k = 0; k < sizeof written / sizeof written[0]; k++)
        test_check(strstr(source, written[k]) != NULL, "moleblend.c does not say \"%s\"",
                   written[k]);
    free(source);
}

#if MB_POSIX
// Exit code of a process of its own that does run(argument); its stderr is build/test.out.
static int run_apart(void (*run)(void *argument), void *argument) {
    int status = -1;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        FILE *out = freopen("build/test.out", "w", stderr);
        if (out) run(argument);
        _exit(0);
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + status;
}

// run(argument) must end its process with code 1 and say this.
static void test_apart(void (*run)(void *argument), void *argument, const char *expected) {
    size_t n;
    int code = run_apart(run, argument);
    char *text = file_text("build/test.out", &n);
    test_check(code == 1 && strstr(text, expected), "exit code %d, expected 1 and \"%s\" in: %s",
               code, expected, text);
    free(text);
}

// The model of a file, which must be that of `argument` if it is taken at all.
static void load_damaged(void *argument) {
    const Model *model = argument;
    Model again;
    TensorFile f;
    tensor_file_open(&f, "build/test_bad.bin");
    model_create(&again, tensor_file_config(&f), 1);
    model_load(&again, again.params, &f, "");
    model_load(&again, again.m, &f, "exp_avg.");
    if (again.count != model->count ||
        memcmp(again.params, model->params, sizeof(float) * model->count) != 0 ||
        memcmp(again.m, model->m, sizeof(float) * model->count) != 0 ||
        tensor_value(tensor_find(&f, "log"), 1) != 1)
        _exit(2);
    _exit(0);
}

// A flipped bit of a state that goes unnoticed and changes what is read: every bit of the start of
// the header, some of the rest.
static void test_flips(void) {
    const float log[] = {0, 1, 2, 3};
    Model model;
    size_t n;
    int wrong = 0, refused = 0, tried = 0;
    model_create(&model, (Config){1, 8, 8, 2, 2, 0}, 1);
    model_init(&model, 3);
    for (size_t k = 0; k < model.count; k++) model.m[k] = 0.5f;
    float *const arenas[ARENAS] = {model.params, model.m, model.v};
    model_write("build/test_bad.bin", &model, arenas, &(TensorOut){"log", 2, 2, log}, 1,
                "{\"step\":\"2\"}");
    test_check(run_apart(load_damaged, &model) == 0, "the state without damage is read");
    char *bytes = file_text("build/test_bad.bin", &n);
    for (size_t k = 0; k < 560; k++, tried++) {
        size_t bit = k < 416 ? k : rng_bits(1, 71, 0, 0, (uint32_t)k) % (8 * n);
        bytes[bit / 8] = (char)(bytes[bit / 8] ^ 1 << bit % 8);
        write_bytes("build/test_bad.bin", bytes, n);
        bytes[bit / 8] = (char)(bytes[bit / 8] ^ 1 << bit % 8);
        int code = run_apart(load_damaged, &model);
        refused += code == 1;
        wrong += code != 0 && code != 1;
    }
    test_check(wrong == 0 && refused > tried - 130,
               "flipped bits of a state: %d of %d refused, %d change what is read", refused, tried,
               wrong);
    free(bytes);
    model_free(&model);
}

static void read_last(void *dataset) {
    Dataset *d = dataset;
    Molecule m = {0};
    dataset_read(d, d->count - 1, &m);
}

static void ask_for_memory(void *count) {
    memory_check(*(uint64_t *)count, "this", "less");
}

// A machine that gives less than was asked for: a crash, a hang, silence, or something left behind.
static void test_machine(void) {
    static const struct { const char *command; int code; const char *expected;
    } table[] = {
        // a full disk behind stdout
        {"./moleblend --help > /dev/full", 1, "moleblend: standard output: write failed: No space"},
        {"./moleblend info build/test_train.bin > /dev/full", 1, "standard output: write failed"},
        {"./moleblend show build/test_train.bin 2 > /dev/full", 1, "standard output: write failed"},
        {"./moleblend predict build/test_train.bin --model build/test_ft.safetensors > /dev/full",
         1, "standard output: write failed"},
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --epochs 1 "
         "--size tiny -o build/test_ft2.safetensors > /dev/full", 1,
         "standard output: write failed"},
        {"./data_prep --dump build/test_train.bin > /dev/full", 1,
         "data_prep: standard output: write failed"},
        {"./data_prep --help > /dev/full", 1, "data_prep: standard output: write failed"},
        // and behind an output
        {"ln -sf /dev/full build/test_full.bin.tmp; timeout 9 ./data_prep -o build/test_full.bin "
         "data/ethanol.sdf; c=$?; rm build/test_full.bin.tmp; exit $c", 1,
         "build/test_full.bin.tmp: cannot write"},
        {"./data_prep -o build/test_c.bin data/sample.sdf <&- 2>&- && ./moleblend info "
         "build/test_c.bin", 0, "dataset, 2000 molecules"},
        // files that are none
        {"rm -f build/test_fifo*; mkfifo build/test_fifo; timeout 9 ./moleblend build/test_fifo", 1,
         "build/test_fifo: cannot read: expected a regular file"},
        {"timeout 9 ./moleblend info build/test_fifo", 1, "expected a regular file"},
        {"timeout 9 ./moleblend show /dev/zero 0", 1, "/dev/zero: cannot read: expected a regular"},
        {"mkfifo build/test_fifo_valid.bin; cp build/test_train.bin build/test_fifo_train.bin; "
         "timeout 9 ./moleblend build/test_fifo_train.bin --size tiny -o build/test_x.safetensors",
         1, "build/test_fifo_valid.bin: cannot read: expected a regular file"},
        // ulimit -f, -v: the checkpoint of before stays, nothing else does
        {"rm -f build/test_u.*; ./moleblend build/test_train.bin --size tiny --steps 1 -o "
         "build/test_u.safetensors && cp build/test_u.safetensors build/test_u.copy && "
         "(ulimit -f 2000; ./moleblend build/test_train.bin --size tiny --steps 2 -o "
         "build/test_u.safetensors); c=$?; cmp build/test_u.safetensors build/test_u.copy && "
         "! ls build/test_u.*.tmp && exit $c", 1, "write failed: File too large"},
        {"(ulimit -f 20; ./data_prep -o build/test_u.bin data/sample.sdf); c=$?; "
         "! ls build/test_u.*.tmp build/test_u.bin && exit $c", 1, "write failed: File too large"},
#if !defined(__SANITIZE_ADDRESS__)
        {"(ulimit -v 400000; ./moleblend build/test_train.bin --size base --threads 1 -o "
         "build/test_u.safetensors); c=$?; cmp build/test_u.safetensors build/test_u.copy && "
         "! ls build/test_u.*.tmp && exit $c", 1, "this model needs 0.7 GiB of memory, and 0.4"},
#endif
        // numbers that are none
        {"./moleblend embed build/test_train.bin --model build/test_nan.safetensors -o "
         "build/test.npy", 1, "layers.1.fc1.weight: number 3 is not finite"},
        {"./moleblend predict build/test_train.bin --model build/test_meta.safetensors", 1,
         "build/test_meta.safetensors: metadata label_std: expected 2 numbers"},
    };
    const char *meta = "{\"task\":\"regression\",\"task_names\":\"a\\nb\",\"label_mean\":"
                       "\"0 0\",\"label_std\":\"1 2x\"}";
    Model model;
    Dataset d;
    model_create(&model, (Config){2, 24, 20, 3, 12, 2}, 1);
    model_init(&model, 9);
    folders_flushed = 0;
    float *const arenas[ARENAS] = {model.params};
    model_write("build/test_meta.safetensors", &model, arenas, NULL, 0, meta);
    test_check(folders_flushed == 1, "the folder of an output is flushed %d times",
               folders_flushed);
    model.p.layer[1].ffn1_w[3] = NAN;
    model_write("build/test_nan.safetensors", &model, arenas, NULL, 0, meta);
    model_free(&model);
    for (size_t k = 0; k < sizeof table / sizeof table[0]; k++)
        test_command(table[k].command, table[k].code, table[k].expected);
    write_test_dataset("build/test_bad.bin", 400, 0);
    dataset_open(&d, "build/test_bad.bin");
    CHECK(truncate("build/test_bad.bin", 4096) == 0, "cannot cut build/test_bad.bin");
    test_apart(read_last, &d, "build/test_bad.bin: was cut short while it was read");
    dataset_close(&d);
    uint64_t count = (uint64_t)1 << 50;
    test_apart(ask_for_memory, &count, "GiB of memory, and ");
}
#endif

// Damaged files: every byte position class gives one line and exit code 1, or is not used.
static void test_damage(void) {
    size_t n;
    char *bytes = file_text("build/test_train.bin", &n);
    int bad = 0, tried = 0, quiet = 0;
    for (size_t k = 0; k < 40; k++) {
        size_t at = k < 16 ? 4 * k : rng_bits(1, 70, 0, 0, (uint32_t)k) % n;
        int cut = k % 4 == 3;
        bytes[at] ^= 0x41;
        write_bytes("build/test_bad.bin", bytes, cut ? at : n);
        bytes[at] ^= 0x41;
        int code = run_command("./moleblend info build/test_bad.bin");
        quiet += code == 0;
        bad += code != 1;
        tried++;
    }
    test_check(bad == 0, "%d of %d damaged datasets did not give exit code 1 (%d were not noticed)",
               bad, tried, quiet);
    free(bytes);
}

// A field of a dataset that is believed because the checksums are right.
static void test_dataset_fields(void) {
    enum { HEAD, INDEX, RECORD };  // of the second of two molecules, C and CO; one is skipped
    static const struct { int where, at, size; uint64_t value; const char *message; } table[] = {
        {HEAD, 8, 4, 1, "expected format version 2, found 1"},
        {HEAD, 12, 4, 70000, "damaged header (counts"},
        {HEAD, 12, 4, 60000, "damaged task names"},
        {HEAD, 16, 8, 3, "damaged header (counts"},
        {HEAD, 16, 8, UINT64_MAX, "damaged header (counts"},
        {HEAD, 24, 8, 1 << 20, "damaged header (counts"},
        {HEAD, 32, 8, 1, "truncated: expected 1 bytes"},
        {HEAD, 40, 4, 70000, "damaged header (counts"},
        {HEAD, 44, 4, 70000, "damaged header (counts"},
        {HEAD, 64, 2, 60000, "damaged task names"},
        {HEAD, 48, 8, 0, "damaged list of skipped records"},
        {HEAD, 48, 8, 2, "damaged list of skipped records"},
        {INDEX, 24, 8, 0, "damaged index (skipped records)"},
        {INDEX, 24, 8, (uint64_t)1 << 40, "damaged index (skipped records)"},
        {HEAD, 40, 4, 1, "molecule 1: more atoms or bonds than the header allows"},
        {HEAD, 44, 4, 0, "molecule 1: more atoms or bonds than the header allows"},
        {INDEX, 8, 8, 0, "damaged index (molecule 0 does not fit"},
        {INDEX, 0, 8, 0, "damaged index (molecule 0 does not fit"},
        {INDEX, 8, 8, (uint64_t)1 << 40, "damaged index (molecule 0 does not fit"},
        {INDEX, 8, 2, 50, "damaged index (molecule 1 does not fit"},
        {INDEX, 8, 2, 1, "molecule 1: atom count differs from the index"},
        {RECORD, 4, 2, 0, "molecule 1: molecule without atoms"},
        {RECORD, 6, 2, 9, "molecule 1: record size does not fit its counts"},
        {RECORD, 8, 2, 2, "molecule 1: unknown record flags"},
        {RECORD, 12, 1, 119, "molecule 1: atom feature out of range"},
        {RECORD, 30, 2, 7, "molecule 1: bond to an atom that is not there"},
        {RECORD, 32, 2, 7, "molecule 1: bond to an atom that is not there"},
        {RECORD, 32, 2, 0, "molecule 1: bond to an atom that is not there"},
        {RECORD, 34, 1, 60, "molecule 1: bond feature out of range"},
        {RECORD, 35, 4, 0x7f800000, "molecule 1: label is infinite"}};
    const char *rows = "smiles,a\nC,1\nC(,1\nCO,2\n";
    write_bytes("build/test_h.csv", rows, strlen(rows));
    test_command("./data_prep -o build/test_h.bin --labels a build/test_h.csv", 0, "2 molecules");
    size_t n, head = DATASET_HEADER + 3;
    uint8_t *bytes = (uint8_t *)file_text("build/test_h.bin", &n), copy[1024];
    size_t index = get_u64(bytes + 24), record = get_u64(bytes + index + 8) >> 16;
    size_t skips = get_u64(bytes + index + 24);
    CHECK(n < sizeof copy, "build/test_h.bin: too large");
    for (size_t k = 0; k < sizeof table / sizeof *table; k++) {
        size_t at = (const size_t[]){0, index, record}[table[k].where];
        memcpy(copy, bytes, n);
        for (int i = 0; i < table[k].size; i++)
            copy[at + (size_t)(table[k].at + i)] = (uint8_t)(table[k].value >> 8 * i);
        put_u32(copy + record, crc32_add(0, copy + record + 4, skips - record - 4));
        uint32_t crc = crc32_add(0, copy + index, 32);
        put_u32(copy + n - 4, crc32_add(crc, copy + skips, index - skips));
        put_u32(copy + 60, 0);
        put_u32(copy + 60, crc32_add(0, copy, head));
        write_bytes("build/test_bad.bin", copy, n);
        test_command("./moleblend info build/test_bad.bin", 1, table[k].message);
    }
    bytes[n - 1] ^= 1;
    write_bytes("build/test_bad.bin", bytes, n);
    test_command("./moleblend info build/test_bad.bin", 1, "damaged index (checksum)");
    free(bytes);
}

#define F32 "{\"a\":{\"dtype\":\"F32\",\"shape\":"
// A header of a tensor file that is misread, or believed though it cannot be.
static void test_tensor_headers(void) {
    static const struct { const char *header; int code; const char *expected; } table[] = {
        {"{\"a\" :\t{\"dtype\":\"F32\" ,\r\n \"shape\":[ 1 , 2 ],\"data_offsets\":[0,8]} }", 0,
         "F32 (1, 2)"},
        {F32 "[],\"data_offsets\":[4,8]}}", 0, "F32 ()"},
        {"{\"\\u0041\\u00e9\\u0000\\\"\\q\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":"
         "[0,0]}}", 0, "  A??\"q "},
        {"{\"__metadata__\":{},\"a\":{\"dtype\":\"I16\",\"shape\":[4],\"data_offsets\":[0,8]}}", 0,
         "I16 (4)"},
        {"{\"__metadata__\":{\"k\":\"v\\n\"},\"a\":{\"dtype\":\"I8\",\"shape\":[8],"
         "\"data_offsets\":[0,8]}}", 0, "k: v"},
        {"{\"\\u00\":", 1, "expected \\uXXXX at byte"},
        {"{\"\\u00zz\":", 1, "expected \\uXXXX at byte"},
        {"{\"abc", 1, "expected the end of a string"},
        {"{\"abc\\", 1, "expected the end of a string"},
        {"", 1, "expected '{' at byte 0"}, {"[", 1, "expected '{' at byte 0"},
        {"{\"a\"", 1, "expected ':' at byte"}, {"{\"a\":{\"dtype\":\"F32\"", 1, "at byte 19"},
        {"{\"a\":{\"type\":\"F32\"}}", 1, "expected dtype, shape or data_offsets"},
        {"{\"a\":{\"dtype\":\"F31\",\"shape\":[1],\"data_offsets\":[0,4]}}", 1, "unknown type"},
        {F32 "[1,1,1,1,1]", 1, "expected a shorter list"}, {F32 "[x]", 1, "expected a number"},
        {F32 "[1", 1, "expected ']'"},
        {F32 "[99999999999999999999]", 1, "expected a smaller number"},
        {F32 "[1],\"data_offsets\":[0]}}", 1, "expected two offsets"},
        {F32 "[1],\"data_offsets\":[4,0]}}", 1, "the data of a does not fit its shape"},
        {F32 "[1],\"data_offsets\":[0,8]}}", 1, "the data of a does not fit its shape"},
        {F32 "[3],\"data_offsets\":[0,12]}}", 1, "the data of a does not fit its shape"}};
    for (size_t k = 0; k < sizeof table / sizeof *table; k++) {
        uint8_t bytes[512] = {0};
        size_t length = strlen(table[k].header);
        put_u64(bytes, length);
        memcpy(bytes + 8, table[k].header, length);
        write_bytes("build/test_h.safetensors", bytes, length + 16);
        test_command("./moleblend info build/test_h.safetensors", table[k].code, table[k].expected);
    }
}

// Records damaged side by side, read by several threads: one message, about the first of them.
static void test_damage_together(void) {
    size_t n;
    char *bytes = file_text("build/test_train.bin", &n);
    Dataset d;
    int good = 0;
    dataset_open(&d, "build/test_train.bin");
    for (size_t i = 3; i < 40; i++) bytes[(get_u64(d.index + 8 * i) >> 16) + 20] ^= 1;
    dataset_close(&d);
    write_bytes("build/test_bad.bin", bytes, n);
    for (int k = 0; k < 20; k++) {
        size_t length;
        int code = run_command("./moleblend embed build/test_bad.bin --threads 4 -o build/bad.npy "
                               "--model build/test_model.safetensors");
        char *text = file_text("build/test.out", &length);
        good += code == 1 && strstr(text, "molecule 3: record is damaged") &&
                strchr(text, '\n') == text + length - 1;
        free(text);
    }
    test_check(good == 20, "damage met by several threads: the first, once, in %d of 20", good);
    free(bytes);
}

// Same bytes with 1, 2 and 3 threads, and after kill -9 and --resume.
static void test_reproducible(void) {
    const char *base =
        "./moleblend build/test_train.bin --valid build/test_train.bin --size tiny --dim 32 "
        "--ffn 32 --batch-size 8 --steps 60 --save-every 7 ";
    static const char *const threads[] = {"1", "2", "3"};
    for (int k = 0; k < 3; k++) {
        char *line = xprintf("%s --threads %s -o build/test_t%d.safetensors", base, threads[k], k);
        test_command(line, 0, "by chance");
        free(line);
    }
    test_check(same_files("build/test_t0.safetensors", "build/test_t1.safetensors") &&
               same_files("build/test_t0.safetensors", "build/test_t2.safetensors"),
               "1, 2 and 3 threads write the same bytes");
#if MB_POSIX
    remove("build/test_k.safetensors.state");
    char *line = xprintf(
        "sh -c '%s -o build/test_k.safetensors & p=$!; i=0; "
        "while [ ! -s build/test_k.safetensors.state ] && [ $i -lt 6000 ]; do sleep 0.01; "
        "i=$((i+1)); done; kill -9 $p 2> /dev/null; wait $p; true'",
        base);
    run_command(line);
    free(line);
    line = xprintf("%s --resume -o build/test_k.safetensors", base);
    test_command(line, 0, "resumed after step");
    free(line);
    test_check(same_files("build/test_t0.safetensors", "build/test_k.safetensors"),
               "killed and resumed: the bytes of the uninterrupted run");
    // killed between the renames of the last save: only the state is there, or an old checkpoint
    remove("build/test_k.safetensors");
    remove("build/test_k.log.csv");
    line = xprintf("%s --resume -o build/test_k.safetensors", base);
    test_command(line, 0, "wrote build/test_k.safetensors");
    free(line);
    test_check(same_files("build/test_t0.safetensors", "build/test_k.safetensors") &&
               fopen("build/test_k.log.csv", "r"), "a resumed run ends with every output there");
    static const struct { const char *name; int code; } signals[] = {{"INT", 130}, {"TERM", 143},
                                                                     {"HUP", 129}};
    for (int k = 0; k < 3; k++) {
        line = xprintf("timeout --preserve-status -s %s 1 %s --steps 90000 -o "
                       "build/test_s.safetensors", signals[k].name, base);
        test_command(line, signals[k].code, "give the same command with --resume");
        free(line);
    }
    test_command("(while cat data/sample.sdf; do :; done) | timeout --preserve-status -s INT 1 "
                 "./data_prep --format sdf -o build/test_i.bin -", 130, "");
    test_command("ls build/test_i.bin*", 2, "No such file");
    // two programs with one output
    line = xprintf("timeout -s KILL 2 %s --steps 90000 -o build/test_s.safetensors > /dev/null & "
                   "sleep 0.5; %s -o build/test_s.safetensors", base, base);
    test_command(line, 1, "is writing it");
    free(line);
    for (int k = 0; k < 5; k++)
        test_command("./data_prep -o build/test_s.bin data/sample.sdf & "
                     "./data_prep -o build/test_s.bin data/sample.sdf; wait; "
                     "./moleblend info build/test_s.bin", 0, "dataset, 2000 molecules");
    test_command("LC_ALL=C sed -e 's/moleblend.crc32/moleblend_crc32/' "
                 "-e 's/\"step\":\"60/\"step\":\"6x/' build/test_k.safetensors.state > "
                 "build/test_m.safetensors.state", 0, "");
    line = xprintf("%s --resume -o build/test_m.safetensors", base);
    test_command(line, 1, "metadata step: expected a whole number, found \"6x\"");
    free(line);
    // --resume takes the options from the state, names each that differs, and allows more steps
    line = xprintf("%s --lr 0.5 --clip 3 --resume -o build/test_k.safetensors", base);
    test_command(line, 1, "--lr: the run began with \"0.0003\", now it is \"0.5\"\n"
                 "--clip: the run began with \"5\", now it is \"3\"\nmoleblend: build/test_k");
    free(line);
    test_command("./moleblend build/test_train.bin --resume -o build/test_k.safetensors", 0,
                 "2 layers, 32 wide");
    test_check(same_files("build/test_t0.safetensors", "build/test_k.safetensors"),
               "resumed without options: the bytes of the uninterrupted run");
    test_command("./moleblend build/test_train.bin --resume --size base -o "
                 "build/test_k.safetensors", 1, "--layers: the run began with \"2\", now it is "
                 "\"12\"");
    test_command("cp build/test_k.safetensors.state build/test_m.safetensors.state; ./moleblend "
                 "build/test_train.bin --resume --steps 70 -o build/test_m.safetensors && "
                 "wc -l build/test_m.log.csv", 0, "71 build/test_m.log.csv");
    test_command("./moleblend finetune build/test_train.bin --valid build/test_train.bin --epochs "
                 "1 --init build/test_k.safetensors.state -o build/test_ft2.safetensors",
                 0, "exp_avg.encoder.molecule_encoder.atom_feature.graph_token.weight is not of");
    write_test_dataset("build/test_train.bin", 40, 1);  // the same sizes, other positions
    line = xprintf("%s --resume -o build/test_k.safetensors", base);
    test_command(line, 1, "--resume needs the same data");
    free(line);
    write_test_dataset("build/test_train.bin", 40, 0);
#endif
}

// Fine-tuning that is killed at any moment loses nothing: what it writes when it is resumed, with
// another number of threads, are the bytes of an uninterrupted run. Its log grows while it runs.
static void test_finetune_resume(void) {
#if MB_POSIX
    const char *base = "./moleblend finetune build/test_train.bin --valid build/test_train.bin "
                       "--size tiny --dim 32 --batch-size 8 --epochs 12 --seeds 2 --save-every 3";
    char *line = xprintf("%s -o build/test_f0.safetensors", base);
    test_command(line, 0, "over 2 seeds");
    free(line);
    remove("build/test_f1.safetensors");
    line = xprintf("rm -f build/test_f1.safetensors.state; for i in 1 2 3 4 5 6 7 8; do "
                   "%s --threads $((1+i%%3)) --resume -o build/test_f1.safetensors & p=$!; "
                   "sleep 0.0$((3+i*9%%7)); kill -9 $p; wait $p; done; "
                   "%s --resume -o build/test_f1.safetensors", base, base);
    test_command(line, 0, "over 2 seeds");
    free(line);
    test_check(same_files("build/test_f0.safetensors", "build/test_f1.safetensors"),
               "fine-tuning killed and resumed: the bytes of the uninterrupted run");
    test_check(same_files("build/test_f0.log.csv", "build/test_f1.log.csv"), "and the same log");
    test_command("./moleblend finetune build/test_train.bin --resume --seeds 3 -o "
                 "build/test_f1.safetensors", 0, "over 3 seeds");
    // stopped between two seeds, while the first is measured: nothing of it is lost
    write_test_dataset("build/test_big.bin", 3000, 0);
    line = xprintf("rm -f build/test_f3*; %s --epochs 1 --test build/test_big.bin -o "
                   "build/test_f3.safetensors & p=$!; i=0; while [ $i -lt 2000 ] && ! grep -qs "
                   "'^1,1,' build/test_f3.log.csv; do sleep 0.01; i=$((i+1)); done; "
                   "kill -TERM $p; wait $p", base);
    test_command(line, 143, "saved after step ");
    free(line);
    line = xprintf("%s --epochs 1 --test build/test_big.bin -o build/test_f4.safetensors", base);
    test_command(line, 0, "over 2 seeds");
    free(line);
    test_command("./moleblend finetune build/test_train.bin --resume -o build/test_f3.safetensors",
                 0, "seed 1: best epoch 1");
    test_check(same_files("build/test_f3.safetensors", "build/test_f4.safetensors") &&
               same_files("build/test_f3.log.csv", "build/test_f4.log.csv"),
               "stopped between two seeds: the bytes of the uninterrupted run");
    // states without a checksum that do not add up
    static const char *const damage[][2] = {{"s/\"history\"/\"histery\"/", "no epoch of this seed"},
        {"s/\"seeds_done\":\"1/\"seeds_done\":\"7/", "does not fit"}};
    for (int k = 0; k < 2; k++) {
        line = xprintf("LC_ALL=C sed -e 's/moleblend.crc32/moleblend_crc32/' -e '%s' "
                       "build/test_f3.safetensors.state > build/test_f5.safetensors.state; "
                       "./moleblend finetune build/test_train.bin --resume -o "
                       "build/test_f5.safetensors", damage[k][0]);
        test_command(line, 1, damage[k][1]);
        free(line);
    }
    line = xprintf("rm -f build/test_f2*; timeout -s INT --preserve-status 1 %s --epochs 9999 -o "
                   "build/test_f2.safetensors; cat build/test_f2.log.csv", base);
    test_command(line, 0,
                 "give the same command with --resume\nseed,epoch,loss,valid RMSE in ");
    free(line);
#endif
}

// A number that is none stops the run with its cause, and leaves what was saved as it is.
static void test_not_finite(void) {
    test_command("./moleblend build/test_train.bin --size tiny --dim 32 --steps 40 --save-every 1 "
                 "--lr 10 --beta1 0.999 --beta2 0 --eps 1e-30 --clip 0 --hold 1 --warmup 0 -o "
                 "build/test_n.safetensors", 1, "the first to be none: ");
    test_command("./moleblend embed build/test_train.bin --model build/test_n.safetensors -o "
                 "build/test.npy", 0, "embedded");
    test_command("printf 'smiles,a\nC,0\nCC,1e20\nCCC,0\n' | ./data_prep --format csv "
                 "--labels a -o build/test_class.bin - && ./moleblend finetune "
                 "build/test_class.bin --valid build/test_class.bin --size tiny", 1,
                 "molecule 1: task a: label 1e+20 is beyond range");
}

// A quota that goes unnoticed: of control groups, both versions, as the kernel shows them.
static void test_quota(void) {
    if (!MB_POSIX) return;
    run_command("rm -rf build/v2; mkdir -p build/v2/proc/self build/v2/sys/fs/cgroup/a/b; "
                "printf '4:cpu:/job\\n0::/a/b\\n' > build/v2/proc/self/cgroup; "
                "echo max 100000 > build/v2/sys/fs/cgroup/a/b/cpu.max; "
                "echo 300000 100000 > build/v2/sys/fs/cgroup/a/cpu.max");
    run_command("rm -rf build/v1; mkdir -p build/v1/proc/self build/v1/sys/fs/cgroup/cpu/job; "
                "printf '5:cpuset:/\n4:cpu,cpuacct:/job\n0::/\n' > build/v1/proc/self/cgroup; "
                "echo 150000 > build/v1/sys/fs/cgroup/cpu/job/cpu.cfs_quota_us; "
                "echo 100000 > build/v1/sys/fs/cgroup/cpu/job/cpu.cfs_period_us; "
                "echo -1 > build/v1/sys/fs/cgroup/cpu/cpu.cfs_quota_us; "
                "echo 100000 > build/v1/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    const char *const names[] = {"v1", "v2", "none"};
    const double cpus[] = {1.5, 3, 0};  // version 1; the group above; no control groups
    for (int k = 0; k < 3; k++) {
        char *root = xprintf("build/%s", names[k]);
        double limit = group_limit(root, "cpu.max", "cpu", "cpu.cfs_quota_us");
        test_check(fabs(limit - cpus[k]) < 1e-9, "quota of %s: %g", root, limit);
        free(root);
    }
    run_command("printf 'MemTotal: 9 kB\nMemAvailable: 3000 kB\n' > build/v2/proc/meminfo");
    test_check(memory_limit("build/v2") == 3072000, "memory: %g", memory_limit("build/v2"));
    run_command("echo 2000000 > build/v2/sys/fs/cgroup/a/b/memory.max");
    test_check(memory_limit("build/v2") == 2000000, "of a group: %g", memory_limit("build/v2"));
#if MB_POSIX && !defined(__SANITIZE_ADDRESS__)
    test_command("ulimit -v 3000000; ./moleblend build/test_train.bin --size base --batch-size 40 "
                 "--dim 2048 --ffn 8192 --layers 20 --heads 32", 1, "this model needs ");
    test_command("ulimit -v 1500000; ./moleblend build/test_train.bin --size base --dim 32 --ffn "
                 "8192 --batch-size 40 --layers 64", 1, "a batch of 40 molecules with ");
#endif
}

// Beside two busy processes a run must not all but stop: with the runtime's own spinning it took
// thirty times as long as with passive waiting.
static void test_busy(void) {
#if MB_POSIX && defined(_OPENMP)
    double seconds[2];
    for (int k = 0; k < 2; k++) {
        char *line = xprintf(
            "(while :; do :; done) & h=$!; (while :; do :; done) & i=$!; timeout 60 "
            "env -u OMP_WAIT_POLICY %s ./moleblend train.bin --size tiny --dim 16 --steps 40 "
            "-o build/test_busy.safetensors; c=$?; kill $h $i; exit $c",
            k ? "OMP_WAIT_POLICY=passive" : "");
        double start = now_seconds();
        test_command(line, 0, "wrote");
        seconds[k] = now_seconds() - start;
        free(line);
    }
    test_check(seconds[0] < 2 * seconds[1] + 1, "beside busy processes: %.1f s, %.1f s passive",
               seconds[0], seconds[1]);
#endif
}

// ==== data_prep ==================================================================================
// Perception against RDKit 2022.09 (the tables below are what it gives with OGB's lists), readers,
// bad input, splits, threads.

// Converts one record of text. Returns 1 if it was kept: then w->molecule holds it.
static int prep_convert(Worker *w, Format format, const char *text, size_t size, Outcome *o) {
    static int columns[4] = {-1, -1, 0, -1};
    static PrepOptions opt = {.max_atoms = MAX_ATOMS};
    static Conversion c = {.opt = &opt};
    Source s = {.path = "test", .format = format, .n_columns = 4, .smiles_column = 0,
                .name_column = format == FORMAT_CSV ? 1 : -1, .task_of_column = columns};
    Record r = {text, size, 0, NULL, 1};
    Lines in = {text, text + size, 0};
    *o = (Outcome){0};
    w->used = 0;
    add_task(&c, (Span){"y", 1});
    return convert_record(&c, &s, &r, w, &in, o) == 0;
}

// The molecule as in the tables: an atom is its symbol and eight hexadecimal digits (chirality,
// degree, charge + 5, hydrogens, radicals, hybridization, aromatic, in a ring), a bond i-j: and
// three digits (type, stereo, conjugated).
static void prep_describe(const Molecule *m, char *text, size_t room) {
    size_t n = 0;
    text[0] = 0;
    for (int i = 0; i < m->n_atoms && n < room; i++) {
        const uint8_t *f = m->atom_feat + ATOM_FEATURES * i;
        n += (size_t)snprintf(text + n, room - n, "%s%s%x%x%x%x%x%x%x%x", i ? " " : "",
                              ELEMENTS[f[0] == 118 ? 0 : f[0] + 1].symbol, f[1], f[2], f[3], f[4],
                              f[5], f[6], f[7], f[8]);
    }
    for (int b = 0; b < m->n_bonds && n < room; b++)
        n += (size_t)snprintf(text + n, room - n, " %d-%d:%d%d%d", m->bonds[2 * b],
                              m->bonds[2 * b + 1], m->bond_code[b] / 12, m->bond_code[b] / 2 % 6,
                              m->bond_code[b] % 2);
}

// Converts `text` and compares the description with what is expected ("refused": none).
static void prep_expect(Worker *w, Format format, const char *rule, const char *text,
                        const char *expected) {
    char got[4096];
    Outcome o;
    int kept = prep_convert(w, format, text, strlen(text), &o);
    if (kept) prep_describe(&w->molecule, got, sizeof got);
    else snprintf(got, sizeof got, "refused");
    test_check(strcmp(got, expected) == 0, "%s: got %s%s%s, expected %s", rule, got,
               kept ? "" : ": ", kept ? "" : o.fault.text, expected);
}

static const struct { const char *rule, *smiles, *expected; } PREP_SMILES[] = {
    {"implicit hydrogens", "CCO",
     "C04530200 C04520200 O02510200 0-1:000 1-2:000"},
    {"charges", "[NH4+].[O-]C",
     "N04640200 O01400200 C04530200 1-2:000"},
    {"isotopes and map numbers", "[13CH3:1]C",
     "C04530200 C04530200 0-1:000"},
    {"boron and cations left of carbon", "B.[BH4-].[Na+]",
     "B03530100 B04440200 Na00600500"},
    {"hypervalent sulfur", "CS(=O)(=O)C",
     "C04530200 S04500200 O01500100 O01500100 C04530200 0-1:000 1-2:100 1-3:100 1-4:000"},
    {"hypervalent phosphorus", "CP(=O)(O)O",
     "C04530200 P04500200 O01500100 O02510200 O02510200 0-1:000 1-2:100 1-3:000 1-4:000"},
    {"valence too high", "C(C)(C)(C)(C)C",
     "refused"},
    {"charged carbon", "C[CH2+].[CH2-]C",
     "C04530200 C03620100 C03420200 C04530200 0-1:000 2-3:000"},
    {"metal without valences", "[Fe+2].[Fe+3]",
     "Fe00700100 Fe00801100"},
    {"dummy atom", "*C",
     "*01500500 C04530200 0-1:000"},
    {"nitro clean-up", "CN(=O)=O",
     "C04530200 N03600100 O01400100 O01500100 0-1:000 1-2:001 1-3:101"},
    {"azide clean-up", "CN=N#N",
     "C04530200 N02500100 N02600000 N01400100 0-1:000 1-2:101 2-3:101"},
    {"aromatic N-oxide clean-up", "O=n1ccccc1",
     "O01400100 N03600111 C03510111 C03510111 C03510111 C03510111 C03510111 0-1:001 1-2:301 "
     "2-3:301 3-4:301 4-5:301 5-6:301 6-1:301"},
    {"perchlorate clean-up", "OCl(=O)(=O)=O",
     "O02510200 Cl04800200 O01400200 O01400200 O01400200 0-1:000 1-2:000 1-3:000 1-4:000"},
    {"phosphorus clean-up", "C=P(=O)C",
     "C03520100 P03500100 O01500100 C04530200 0-1:100 1-2:100 1-3:000"},
    {"hydrogen atoms removed", "[H]C([H])([H])O[H]",
     "C04530200 O02510200 0-1:000"},
    {"deuterium stays", "[2H]C",
     "H01500500 C04530200 0-1:000"},
    {"hydrogen molecule stays", "[H][H]",
     "H01500500 H01500500 0-1:000"},
    {"proton and hydride", "[H+].[H-]",
     "H00600500 H00400500"},
    {"hydrogen on a dummy stays", "[H]*",
     "H01500500 *01500500 0-1:000"},
    {"hydrogen that defines a double bond stays", "[H]/C=C/F",
     "H01500500 C03510100 C03510100 F01500200 0-1:000 1-2:120 2-3:000"},
    {"hydrogen hands on its direction", "[H]/C(C)=C/F",
     "C03510100 C04530200 C03510100 F01500200 0-1:000 0-2:110 2-3:000"},
    {"bridging hydrogen stays", "[H]1BB1",
     "refused"},
    {"stereo with explicit hydrogen", "[H][C@](F)(Cl)Br",
     "C14510200 F01500200 Cl01500200 Br01500200 0-1:000 0-2:000 0-3:000"},
    {"benzene", "c1ccccc1",
     "C03510111 C03510111 C03510111 C03510111 C03510111 C03510111 0-1:301 1-2:301 2-3:301 "
     "3-4:301 4-5:301 5-0:301"},
    {"Kekule form", "C1=CC=CC=C1",
     "C03510111 C03510111 C03510111 C03510111 C03510111 C03510111 0-1:301 1-2:301 2-3:301 "
     "3-4:301 4-5:301 5-0:301"},
    {"pyrrole needs its hydrogen", "c1cc[nH]c1",
     "C03510111 C03510111 C03510111 N03510111 C03510111 0-1:301 1-2:301 2-3:301 3-4:301 "
     "4-0:301"},
    {"pyrrole without it", "c1ccnc1",
     "refused"},
    {"pyridine", "c1ccncc1",
     "C03510111 C03510111 C03510111 N02500111 C03510111 C03510111 0-1:301 1-2:301 2-3:301 "
     "3-4:301 4-5:301 5-0:301"},
    {"furan, thiophene", "c1ccoc1.c1ccsc1",
     "C03510111 C03510111 C03510111 O02500111 C03510111 C03510111 C03510111 C03510111 "
     "S02500111 C03510111 0-1:301 1-2:301 2-3:301 3-4:301 5-6:301 6-7:301 7-8:301 8-9:301 "
     "4-0:301 9-5:301"},
    {"azulene: outer ring only", "c1ccc2cccc2cc1",
     "C03510111 C03510111 C03510111 C03500111 C03510111 C03510111 C03510111 C03500111 "
     "C03510111 C03510111 0-1:301 1-2:301 2-3:301 3-4:301 4-5:301 5-6:301 6-7:301 7-8:301 "
     "8-9:301 9-0:301 7-3:001"},
    {"naphthalene", "c1ccc2ccccc2c1",
     "C03510111 C03510111 C03510111 C03500111 C03510111 C03510111 C03510111 C03510111 "
     "C03500111 C03510111 0-1:301 1-2:301 2-3:301 3-4:301 4-5:301 5-6:301 6-7:301 7-8:301 "
     "8-9:301 9-0:301 8-3:301"},
    {"cyclobutadiene is not", "C1=CC=C1",
     "C03510101 C03510101 C03510101 C03510101 0-1:101 1-2:001 2-3:101 3-0:001"},
    {"cyclooctatetraene is not", "C1=CC=CC=CC=C1",
     "C03510101 C03510101 C03510101 C03510101 C03510101 C03510101 C03510101 C03510101 0-1:101 "
     "1-2:001 2-3:101 3-4:001 4-5:101 5-6:001 6-7:101 7-0:001"},
    {"tropylium, cyclopentadienide", "[CH+]1C=CC=CC=C1.[CH-]1C=CC=C1",
     "C03610111 C03510111 C03510111 C03510111 C03510111 C03510111 C03510111 C03410111 "
     "C03510111 C03510111 C03510111 C03510111 0-1:301 1-2:301 2-3:301 3-4:301 4-5:301 5-6:301 "
     "7-8:301 8-9:301 9-10:301 10-11:301 6-0:301 11-7:301"},
    {"pyridone: the oxygen takes its electron", "O=c1cccc[nH]1",
     "O01500100 C03500111 C03510111 C03510111 C03510111 C03510111 N03510111 0-1:101 1-2:301 "
     "2-3:301 3-4:301 4-5:301 5-6:301 6-1:301"},
    {"fulvene: a carbon shares it", "C=C1C=CC=C1",
     "C03520100 C03500101 C03510101 C03510101 C03510101 C03510101 0-1:101 1-2:001 2-3:101 "
     "3-4:001 4-5:101 5-1:001"},
    {"thiophene S-oxide", "O=S1C=CC=C1",
     "O01500100 S03500201 C03510101 C03510101 C03510101 C03510101 0-1:100 1-2:000 2-3:101 "
     "3-4:001 4-5:101 5-1:000"},
    {"borole ring", "B1C=CC=CC=C1",
     "B03510101 C03510101 C03510101 C03510101 C03510101 C03510101 C03510101 0-1:000 1-2:101 "
     "2-3:001 3-4:101 4-5:001 5-6:101 6-0:000"},
    {"aromatic chain", "cc",
     "refused"},
    {"no Kekule structure", "c1cccc1",
     "refused"},
    {"dummy in a ring beside one", "*1Cc2ccccc21",
     "*02500501 C04520201 C03500111 C03510111 C03510111 C03510111 C03510111 C03500111 0-1:000 "
     "1-2:000 2-3:301 3-4:301 4-5:301 5-6:301 6-7:301 7-0:000 7-2:301"},
    {"conjugated diene", "C=CC=C",
     "C03520100 C03510100 C03510100 C03520100 0-1:101 1-2:001 2-3:101"},
    {"amide and ester", "NC(=O)C.CC(=O)OC",
     "N03520100 C03500100 O01500100 C04530200 C04530200 C03500100 O01500100 O02500100 "
     "C04530200 0-1:001 1-2:101 1-3:000 4-5:000 5-6:101 5-7:001 7-8:000"},
    {"enol ether oxygen is SP2", "C=CO",
     "C03520100 C03510100 O02510100 0-1:101 1-2:001"},
    {"allene", "C=C=C",
     "C03520100 C02500000 C03520100 0-1:101 1-2:101"},
    {"alkyne and nitrile", "C#CC#N",
     "C02510000 C02500000 C02500000 N01500000 0-1:201 1-2:001 2-3:201"},
    {"radicals", "[CH3].[CH2].[O]",
     "C03531200 C02522200 O00502200"},
    {"nitric oxide", "[N]=O",
     "N01501100 O01500100 0-1:100"},
    {"sulfur hexafluoride", "FS(F)(F)(F)(F)F",
     "F01500200 S06500400 F01500200 F01500200 F01500200 F01500200 F01500200 0-1:000 1-2:000 "
     "1-3:000 1-4:000 1-5:000 1-6:000"},
    {"phosphorus pentachloride", "ClP(Cl)(Cl)(Cl)Cl",
     "Cl01500200 P05500300 Cl01500200 Cl01500200 Cl01500200 Cl01500200 0-1:000 1-2:000 "
     "1-3:000 1-4:000 1-5:000"},
    {"noble gases", "[He].[Xe]",
     "He00500500 Xe00500200"},
    {"spiro and fused rings", "C1CC12CC2",
     "C04520201 C04520201 C04500201 C04520201 C04520201 0-1:000 1-2:000 2-3:000 3-4:000 "
     "2-0:000 4-2:000"},
    {"norbornane: two rings", "C1CC2CCC1C2",
     "C04520201 C04520201 C04510201 C04520201 C04520201 C04510201 C04520201 0-1:000 1-2:000 "
     "2-3:000 3-4:000 4-5:000 5-6:000 5-0:000 6-2:000"},
    {"cubane: symmetrised", "C12C3C4C1C5C2C3C45",
     "C04510201 C04510201 C04510201 C04510201 C04510201 C04510201 C04510201 C04510201 0-1:000 "
     "1-2:000 2-3:000 3-4:000 4-5:000 5-6:000 6-7:000 3-0:000 5-0:000 6-1:000 7-2:000 7-4:000"},
    {"linked rings", "C1CC1CC1CC1",
     "C04520201 C04520201 C04510201 C04520200 C04510201 C04520201 C04520201 0-1:000 1-2:000 "
     "2-3:000 3-4:000 4-5:000 5-6:000 2-0:000 6-4:000"},
    {"centre CCW", "N[C@](F)(Cl)Br",
     "N03520200 C24500200 F01500200 Cl01500200 Br01500200 0-1:000 1-2:000 1-3:000 1-4:000"},
    {"centre CW", "N[C@@](F)(Cl)Br",
     "N03520200 C14500200 F01500200 Cl01500200 Br01500200 0-1:000 1-2:000 1-3:000 1-4:000"},
    {"hydrogen counts last", "N[C@@H](C)C(=O)O",
     "N03520200 C14510200 C04530200 C03500100 O01500100 O02510100 0-1:000 1-2:000 1-3:000 "
     "3-4:101 3-5:001"},
    {"centre first in the text", "[C@H](F)(Cl)Br",
     "C14510200 F01500200 Cl01500200 Br01500200 0-1:000 0-2:000 0-3:000"},
    {"ring number order", "C[C@]1(F)CCO1",
     "C04530200 C24500201 F01500200 C04520201 C04520201 O02500201 0-1:000 1-2:000 1-3:000 "
     "3-4:000 4-5:000 5-1:000"},
    {"ring number after a branch", "C[C@](F)1CCO1",
     "C04530200 C14500201 F01500200 C04520201 C04520201 O02500201 0-1:000 1-2:000 1-3:000 "
     "3-4:000 4-5:000 5-1:000"},
    {"equal neighbours", "C[C@H](C)F",
     "C04530200 C04510200 C04530200 F01500200 0-1:000 1-2:000 1-3:000"},
    {"sulfoxide", "C[S@](=O)CC",
     "C04530200 S23500200 O01500100 C04520200 C04530200 0-1:000 1-2:100 1-3:000 3-4:000"},
    {"sulfonium", "C[S@+](CC)CCC",
     "C04530200 S23600200 C04520200 C04530200 C04520200 C04520200 C04530200 0-1:000 1-2:000 "
     "2-3:000 1-4:000 4-5:000 5-6:000"},
    {"phosphine", "C[P@](CC)CCC",
     "C04530200 P23500200 C04520200 C04530200 C04520200 C04520200 C04530200 0-1:000 1-2:000 "
     "2-3:000 1-4:000 4-5:000 5-6:000"},
    {"amine inverts", "C[N@](CC)CCC",
     "C04530200 N03500200 C04520200 C04530200 C04520200 C04520200 C04530200 0-1:000 1-2:000 "
     "2-3:000 1-4:000 4-5:000 5-6:000"},
    {"aziridine and bridgehead nitrogen", "C[N@]1CC1F",
     "C04530200 N23500201 C04520201 C04510201 F01500200 0-1:000 1-2:000 2-3:000 3-4:000 "
     "3-1:000"},
    {"centre that depends on others", "C[C@H](F)[C@H](Cl)[C@@H](C)F",
     "C04530200 C24510200 F01500200 C24510200 Cl01500200 C14510200 C04530200 F01500200 "
     "0-1:000 1-2:000 1-3:000 3-4:000 3-5:000 5-6:000 5-7:000"},
    {"ring cis and trans", "C[C@H]1CC[C@@H](C)CC1",
     "C04530200 C14510201 C04520201 C04520201 C14510201 C04530200 C04520201 C04520201 0-1:000 "
     "1-2:000 2-3:000 3-4:000 4-5:000 4-6:000 6-7:000 7-1:000"},
    {"ring without partner", "C[C@H]1CCCCC1",
     "C04530200 C04510201 C04520201 C04520201 C04520201 C04520201 C04520201 0-1:000 1-2:000 "
     "2-3:000 3-4:000 4-5:000 5-6:000 6-1:000"},
    {"isotope makes a centre", "[2H][C@](C)(F)O",
     "H01500500 C24500200 C04530200 F01500200 O02510200 0-1:000 1-2:000 1-3:000 1-4:000"},
    {"chirality class", "C[C@TH2](F)(Cl)Br",
     "C04530200 C14500200 F01500200 Cl01500200 Br01500200 0-1:000 1-2:000 1-3:000 1-4:000"},
    {"E double bond", "C/C=C/C",
     "C04530200 C03510100 C03510100 C04530200 0-1:000 1-2:120 2-3:000"},
    {"Z double bond", "C/C=C\\C",
     "C04530200 C03510100 C03510100 C04530200 0-1:000 1-2:110 2-3:000"},
    {"by CIP rank", "C/C(F)=C(/C)Cl",
     "C04530200 C03500100 F01500200 C03500100 C04530200 Cl01500200 0-1:000 1-2:000 1-3:120 "
     "3-4:000 3-5:000"},
    {"one direction is enough", "F/C=C(F)/Cl",
     "F01500200 C03510100 C03500100 F01500200 Cl01500200 0-1:000 1-2:120 2-3:000 2-4:000"},
    {"same neighbours", "F/C=C(Cl)/Cl",
     "F01500200 C03510100 C03500100 Cl01500200 Cl01500200 0-1:000 1-2:100 2-3:000 2-4:000"},
    {"conjugated E,Z", "C/C=C/C=C\\C",
     "C04530200 C03510100 C03510100 C03510100 C03510100 C04530200 0-1:000 1-2:121 2-3:001 "
     "3-4:111 4-5:000"},
    {"direction at a ring closure", "C1CCCCCCC/C=C/1",
     "C04520201 C04520201 C04520201 C04520201 C04520201 C04520201 C04520201 C04520201 "
     "C03510101 C03510101 0-1:000 1-2:000 2-3:000 3-4:000 4-5:000 5-6:000 6-7:000 7-8:000 "
     "8-9:120 9-0:000"},
    {"small ring has none", "C1CC/C=C\\CC1",
     "C04520201 C04520201 C04520201 C03510101 C03510101 C04520201 C04520201 0-1:000 1-2:000 "
     "2-3:000 3-4:100 4-5:000 5-6:000 6-0:000"},
    {"imine and oxime", "C/C=N/O",
     "C04530200 C03510100 N02500100 O02510100 0-1:000 1-2:121 2-3:001"},
    {"conflicting directions", "C/C(/F)=C/F",
     "C04530200 C03500100 F01500200 C03510100 F01500200 0-1:000 1-2:000 1-3:110 3-4:000"},
    {"cumulene", "F/C=C=C/F",
     "F01500200 C03510100 C02500000 C03510100 F01500200 0-1:000 1-2:101 2-3:101 3-4:000"},
    {"stereo from Z and E", "C/C=C/[C@H](F)/C=C\\C",
     "C04530200 C03510100 C03510100 C24510200 F01500200 C03510100 C03510100 C04530200 0-1:000 "
     "1-2:120 2-3:000 3-4:000 3-5:000 5-6:110 6-7:000"},
    {"dative bond", "[NH3]->[Fe]",
     "N04530300 Fe01500200 0-1:400"},
    {"quadruple and any bond", "[Cr]$[Cr].C~C",
     "Cr01500000 Cr01500000 C05540300 C05540300 0-1:400 2-3:400"},
    {"ring number of three digits", "C%(123)CC%(123)",
     "C04520201 C04520201 C04520201 0-1:000 1-2:000 2-0:000"},
    {"two digits", "C%12CC%12",
     "C04520201 C04520201 C04520201 0-1:000 1-2:000 2-0:000"},
    {"atomic number", "[#6H4]",
     "C04540200"},
    {"charge in words", "[Fe++].[O--]",
     "Fe00700100 O00300200"},
    {"CIP rank of phosphorus", "C[C@H](P(=O)(O)O)S",
     "C04530200 C24510200 P04500200 O01500100 O02510200 O02510200 S02510200 0-1:000 1-2:000 "
     "2-3:100 2-4:000 2-5:000 1-6:000"},
    {"adamantane", "C1C2CC3CC1CC(C2)C3",
     "C04520201 C04510201 C04520201 C04510201 C04520201 C04510201 C04520201 C04510201 "
     "C04520201 C04520201 0-1:000 1-2:000 2-3:000 3-4:000 4-5:000 5-6:000 6-7:000 7-8:000 "
     "7-9:000 5-0:000 8-1:000 9-3:000"},
    {"porphyrin core", "c1cc2cc3ccc([nH]3)cc3ccc(cc4ccc(cc1n2)[nH]4)n3",
     "C03510101 C03510101 C03500111 C03510111 C03500111 C03510111 C03510111 C03500111 "
     "N03510111 C03510111 C03500111 C03510101 C03510101 C03500111 C03510111 C03500111 "
     "C03510111 C03510111 C03500111 C03510111 C03500111 N02500111 N03510111 N02500111 0-1:101 "
     "1-2:001 2-3:301 3-4:301 4-5:301 5-6:301 6-7:301 7-8:301 7-9:301 9-10:301 10-11:001 "
     "11-12:101 12-13:001 13-14:301 14-15:301 15-16:301 16-17:301 17-18:301 18-19:301 "
     "19-20:301 20-21:301 18-22:301 13-23:301 20-0:001 21-2:301 8-4:301 23-10:301 22-15:301"},
    {"triphenylene and buried atom", "C1=CC2=CC=CC3=CC=CC1=C23",
     "C03510101 C03510101 C03500111 C03510111 C03510111 C03510111 C03500111 C03510111 "
     "C03510111 C03510111 C03500111 C03500111 0-1:101 1-2:001 2-3:301 3-4:301 4-5:301 5-6:301 "
     "6-7:301 7-8:301 8-9:301 9-10:301 10-11:301 10-0:001 11-2:301 11-6:301"},
    {"hydride of charge -2", "[H-2]",
     "H00300500"},
    {"chlorite", "OCl=O",
     "O02510200 Cl02600200 O01400200 0-1:000 1-2:000"},
    {"iodyl", "CI(=O)=O",
     "C04530200 I03500200 O01500100 O01500100 0-1:000 1-2:100 1-3:100"},
    {"half a direction", "C/C=C",
     "C04530200 C03510100 C03520100 0-1:000 1-2:100"},
    {"heavy element in quotes", "['Db']",
     "Db00500500"},
    {"only a heavy element in quotes", "['Fe']",
     "refused"},
    {"bond order at one ring mark", "C=1CC1",
     "C03510101 C04520201 C03510101 0-1:000 1-2:000 0-2:100"},
    {"dative bond at a ring mark", "N<-1.[Fe]1",
     "N03520200 Fe01500300 1-0:400"},
    {"dative ring", "C1->[Fe]<-N1",
     "C05530301 Fe02500301 N04520301 0-1:400 2-1:400 2-0:000"},
    {"phosphole", "Cp1cccc1",
     "C04530200 P03500111 C03510111 C03510111 C03510111 C03510111 0-1:000 1-2:301 2-3:301 "
     "3-4:301 4-5:301 5-1:301"},
    {"pentavalent phosphinine", "Cp1(C)ccccc1",
     "C04530200 P04500201 C04530200 C03510101 C03510101 C03510101 C03510101 C03510101 0-1:000 "
     "1-2:000 1-3:101 3-4:001 4-5:101 5-6:001 6-7:101 7-1:000"},
    {"phosphine keeps its hydrogen's place", "C[P@H]CC",
     "C04530200 P23510200 C04520200 C04530200 0-1:000 1-2:000 2-3:000"},
    {"no chirality at a thiol", "C[S@H]CC",
     "C04530200 S03511200 C04520200 C04530200 0-1:000 1-2:000 2-3:000"},
    {"arsine", "C[As@](CC)CCC",
     "C04530200 As23500200 C04520200 C04530200 C04520200 C04520200 C04530200 0-1:000 1-2:000 "
     "2-3:000 1-4:000 4-5:000 5-6:000"},
    {"selenoxide", "C[Se@](=O)CC",
     "C04530200 Se23500200 O01500100 C04520200 C04530200 0-1:000 1-2:100 1-3:000 3-4:000"},
    {"phosphorus clean-up needs a carbon chain", "CC=P(=O)C",
     "C04530200 C03510100 P03600100 O01400200 C04530200 0-1:000 1-2:100 2-3:000 2-4:000"},
    {"phosphorus clean-up, nitrogen", "N=P(=O)C",
     "N02510100 P03500100 O01500100 C04530200 0-1:100 1-2:100 1-3:000"},
    {"no clean-up with a charge", "C=[P+](=O)C",
     "C03520100 P03601100 O01500100 C04530200 0-1:100 1-2:100 1-3:000"},
    {"nitrogen clean-up with a charged neighbour", "CN(=[N-])=O",
     "C04530200 N03600100 N01400100 O01400100 0-1:000 1-2:101 1-3:001"},
    {"thiophene S-oxide, aromatic in the text", "O=s1cccc1",
     "O01500100 S03500201 C03510101 C03510101 C03510101 C03510101 0-1:100 1-2:000 2-3:101 "
     "3-4:001 4-5:101 5-1:000"},
    {"selenophene oxide", "O=[se]1cccc1",
     "O01500100 Se03500201 C03510101 C03510101 C03510101 C03510101 0-1:100 1-2:000 2-3:101 "
     "3-4:001 4-5:101 5-1:000"},
    {"tellurophene", "c1cc[te]c1",
     "C03510111 C03510111 C03510111 Te02500111 C03510111 0-1:301 1-2:301 2-3:301 3-4:301 "
     "4-0:301"},
    {"aromatic radical", "[c]1ccccc1",
     "C02501111 C03510111 C03510111 C03510111 C03510111 C03510111 0-1:301 1-2:301 2-3:301 "
     "3-4:301 4-5:301 5-0:301"},
    {"pyrrolyl radical", "[N]1C=CC=C1",
     "N02501101 C03510101 C03510101 C03510101 C03510101 0-1:001 1-2:101 2-3:001 3-4:101 "
     "4-0:001"},
    {"cyclopropenyl cation", "C1=C[CH+]1",
     "C03510111 C03510111 C03610111 0-1:301 1-2:301 2-0:301"},
    {"ring of dummies", "*1:*:*:*:*:*:1",
     "*02500501 *02500501 *02500501 *02500501 *02500501 *02500501 0-1:300 1-2:300 2-3:300 "
     "3-4:300 4-5:300 5-0:300"},
    {"alkyne in a ring", "C1=CCC#CC1",
     "C03510101 C03510101 C04520201 C02500001 C02500001 C04520201 0-1:100 1-2:000 2-3:000 "
     "3-4:200 4-5:000 5-0:000"},
    {"cumulene in a ring", "C1=CCC=C=C1",
     "C03510101 C03510101 C04520201 C03510101 C02500001 C03510101 0-1:101 1-2:000 2-3:000 "
     "3-4:101 4-5:101 5-0:001"},
    {"bridged alkyne", "C1#CC2CC1C2",
     "C02500001 C02500001 C04510201 C04520201 C04510201 C04520201 0-1:200 1-2:000 2-3:000 "
     "3-4:000 4-5:000 4-0:000 5-2:000"},
    {"uranyl", "O=[U+2]=O",
     "O01500100 U02700000 O01500100 0-1:100 1-2:100"},
    {"isothiocyanate", "CN=C=S",
     "C04530200 N02500100 C02500000 S01500100 0-1:000 1-2:101 2-3:101"},
    {"oxide and hydrogens on phosphorus", "[O-][PH3+]",
     "O01400200 P04630200 0-1:000"},
    {"hydrogens at both ends", "[H]/C=C/[H]",
     "H01500500 C03510100 C03510100 H01500500 0-1:000 1-2:120 2-3:000"},
    {"hydrogen hands on a backward direction", "F/C=C(\\[H])C",
     "F01500200 C03510100 C03510100 C04530200 0-1:000 1-2:120 2-3:000"},
    {"hydrogen inside the branch", "C(/[H])(/F)=C/F",
     "C03510100 F01500200 C03510100 F01500200 0-1:000 0-2:110 2-3:000"},
    {"directions that contradict", "C/C(\\F)=C/F",
     "C04530200 C03500100 F01500200 C03510100 F01500200 0-1:000 1-2:000 1-3:100 3-4:000"},
    {"long cumulene", "C/C=C=C=C/C=C/C",
     "C04530200 C03510100 C02500000 C02500000 C03510100 C03510100 C03510100 C04530200 0-1:000 "
     "1-2:101 2-3:101 3-4:101 4-5:001 5-6:121 6-7:000"},
    {"direction at a ring", "CN1CC(=CCC1)\\C=N\\OC",
     "C04530200 N03500201 C04520201 C03500101 C03510101 C04520201 C04520201 C03510100 "
     "N02500100 O02500100 C04530200 0-1:000 1-2:000 2-3:000 3-4:101 4-5:000 5-6:000 3-7:001 "
     "7-8:121 8-9:001 9-10:000 6-1:000"},
    {"allene mark is no centre", "ClC=[C@]=CCl",
     "Cl01500200 C03510100 C02500000 C03510100 Cl01500200 0-1:000 1-2:101 2-3:101 3-4:000"},
    {"cage of three-membered rings", "C12C3C1C4C2C34",
     "C04510201 C04510201 C04510201 C04510201 C04510201 C04510201 0-1:000 1-2:000 2-3:000 "
     "3-4:000 4-5:000 2-0:000 4-0:000 5-1:000 5-3:000"},
    {"the same, other order", "C13C2C4C1C2C34",
     "C04510201 C04510201 C04510201 C04510201 C04510201 C04510201 0-1:000 1-2:000 2-3:000 "
     "3-4:000 4-5:000 3-0:000 4-1:000 5-0:000 5-2:000"},
    {"propellane cage", "CC14(C3C2C1C234)",
     "C04530200 C04500201 C04510201 C04510201 C04510201 C04500201 0-1:000 1-2:000 2-3:000 "
     "3-4:000 4-5:000 4-1:000 5-3:000 5-2:000 5-1:000"},
    {"tricyclic alkene", "C2C1C3CC1=C23",
     "C04520201 C04510201 C04510201 C04520201 C03500101 C03500101 0-1:000 1-2:000 2-3:000 "
     "3-4:000 4-5:100 4-1:000 5-0:000 5-2:000"},
    {"isotope and halogen", "O[C@@H](C[125I])CI",
     "O02510200 C14510200 C04520200 I01500200 C04520200 I01500200 0-1:000 1-2:000 2-3:000 "
     "1-4:000 4-5:000"},
    {"spiro acetal", "C1[C@@]2(OCC1)OCCC2",
     "C04520201 C04500201 O02500201 C04520201 C04520201 O02500201 C04520201 C04520201 "
     "C04520201 0-1:000 1-2:000 2-3:000 3-4:000 1-5:000 5-6:000 6-7:000 7-8:000 4-0:000 "
     "8-1:000"},
    {"nitrogen opposite a centre", "C[N@]1CC[C@H](C)CC1",
     "C04530200 N03500201 C04520201 C04520201 C04510201 C04530200 C04520201 C04520201 0-1:000 "
     "1-2:000 2-3:000 3-4:000 4-5:000 4-6:000 6-7:000 7-1:000"},
    {"bridgehead nitrogen", "C1C[N@]2CC[C@H]1C(F)C2",
     "C04520201 C04520201 N23500201 C04520201 C04520201 C14510201 C04510201 F01500200 "
     "C04520201 0-1:000 1-2:000 2-3:000 3-4:000 4-5:000 5-6:000 6-7:000 6-8:000 5-0:000 "
     "8-2:000"},
    {"four different at two ring atoms", "C[C@]1(F)CC[C@](C)(F)CC1",
     "C04530200 C24500201 F01500200 C04520201 C04520201 C24500201 C04530200 F01500200 "
     "C04520201 C04520201 0-1:000 1-2:000 1-3:000 3-4:000 4-5:000 5-6:000 5-7:000 5-8:000 "
     "8-9:000 9-1:000"},
    {"sulfur centre in a ring", "C1C(=C(S[S@@]1=O)Cl)Cl",
     "C04520201 C03500101 C03500101 S02500201 S23500201 O01500100 Cl01500200 Cl01500200 "
     "0-1:000 1-2:100 2-3:000 3-4:000 4-5:100 2-6:000 1-7:000 4-0:000"},
    {"aziridines on sulfur", "CC1CN1SSN1CC1C",
     "C04530200 C04510201 C04520201 N03500201 S02500200 S02500200 N03500201 C04520201 "
     "C04510201 C04530200 0-1:000 1-2:000 2-3:000 3-4:000 4-5:000 5-6:000 6-7:000 7-8:000 "
     "8-9:000 3-1:000 8-6:000"},
    {"bicyclic triazine", "CSc1nn(C)cc2ncnc1-2",
     "C04530200 S02500200 C03500111 N02500111 N03500111 C04530200 C03510111 C03500111 "
     "N02500111 C03510111 N02500111 C03500111 0-1:000 1-2:000 2-3:301 3-4:301 4-5:000 4-6:301 "
     "6-7:301 7-8:301 8-9:301 9-10:301 10-11:301 11-2:301 11-7:001"},
    {"H on phosphorothioate", "CO[PH](=S)OC",
     "C04530200 O02500200 P04510200 S01500100 O02500200 C04530200 0-1:000 1-2:000 2-3:100 "
     "2-4:000 4-5:000"},
    {"quinine", "COC1=CC2=C(C=C1)N=CC=C2[C@H](O)[C@H]1C[C@@H]2CC[N@]1C[C@@H]2C=C",
     "C04530200 O02500100 C03500111 C03510111 C03500111 C03500111 C03510111 C03510111 "
     "N02500111 C03510111 C03510111 C03500111 C24510200 O02510200 C14510201 C04520201 "
     "C24510201 C04520201 C04520201 N23500201 C04520201 C24510201 C03510100 C03520100 0-1:000 "
     "1-2:001 2-3:301 3-4:301 4-5:301 5-6:301 6-7:301 5-8:301 8-9:301 9-10:301 10-11:301 "
     "11-12:000 12-13:000 12-14:000 14-15:000 15-16:000 16-17:000 17-18:000 18-19:000 "
     "19-20:000 20-21:000 21-22:000 22-23:100 7-2:301 19-14:000 11-4:301 21-16:000"},
    {"fluoride of chlorine", "FCl(F)F",
     "refused"},
};

// Atoms "symbol,x,y,z[,mass difference,charge,valence]", bonds "i-j:type[/stereo]", properties
// separated by |; made into V2000 and V3000 mol blocks.
static const struct {
    const char *rule;
    int is_3d;
    const char *atoms, *bonds, *properties, *expected;
} PREP_MOLS[] = {
    {"chirality from 3D, hydrogen removed", 1,
     "C,0,0,0 F,0.9,0.9,0.5 Cl,-1,0.9,-0.6 Br,0.6,-1.2,-1 H,-0.5,-0.5,1",
     "1-2:1 1-3:1 1-4:1 1-5:1", "",
     "C14510200 F01500200 Cl01500200 Br01500200 0-1:000 0-2:000 0-3:000"},
    {"hydrogen in the middle of the bonds", 1,
     "C,0,0,0 F,0.9,0.9,0.5 Cl,-1,0.9,-0.6 Br,0.6,-1.2,-1 H,-0.5,-0.5,1",
     "1-2:1 1-5:1 1-3:1 1-4:1", "",
     "C14510200 F01500200 Cl01500200 Br01500200 0-1:000 0-2:000 0-3:000"},
    {"flat centre in 3D has none", 1,
     "C,0,0,0 F,1,0,0.001 Cl,-0.5,0.9,0.002 Br,-0.5,-0.9,0.003 I,0.8,0.8,0.002",
     "1-2:1 1-3:1 1-4:1 1-5:1", "",
     "C04500200 F01500200 Cl01500200 Br01500200 I01500200 0-1:000 0-2:000 0-3:000 0-4:000"},
    {"wedge", 0,
     "C,0,0,0 F,1,0,0 Cl,-0.5,0.9,0 Br,-0.5,-0.9,0",
     "1-2:1/1 1-3:1 1-4:1", "",
     "C24510200 F01500200 Cl01500200 Br01500200 0-1:000 0-2:000 0-3:000"},
    {"dash", 0,
     "C,0,0,0 F,1,0,0 Cl,-0.5,0.9,0 Br,-0.5,-0.9,0",
     "1-2:1/6 1-3:1 1-4:1", "",
     "C14510200 F01500200 Cl01500200 Br01500200 0-1:000 0-2:000 0-3:000"},
    {"wedge at its wide end means nothing", 0,
     "C,0,0,0 F,1,0,0 Cl,-0.5,0.9,0 Br,-0.5,-0.9,0",
     "2-1:1/1 1-3:1 1-4:1", "",
     "C04510200 F01500200 Cl01500200 Br01500200 1-0:000 0-2:000 0-3:000"},
    {"wedge with four neighbours", 0,
     "C,0,0,0 F,1,0,0 Cl,-0.5,0.9,0 Br,-0.5,-0.9,0 I,0,1,0",
     "1-2:1/1 1-3:1 1-4:1 1-5:1", "",
     "C24500200 F01500200 Cl01500200 Br01500200 I01500200 0-1:000 0-2:000 0-3:000 0-4:000"},
    {"contradicting wedges", 0,
     "C,0,0,0 F,1,0,0 Cl,-0.5,0.9,0 Br,-0.5,-0.9,0",
     "1-2:1/1 1-3:1/6 1-4:1", "",
     "C04510200 F01500200 Cl01500200 Br01500200 0-1:000 0-2:000 0-3:000"},
    {"wavy bond takes it back", 0,
     "C,0,0,0 F,1,0,0 Cl,-0.5,0.9,0 Br,-0.5,-0.9,0",
     "1-2:1/1 1-3:1/4 1-4:1", "",
     "C04510200 F01500200 Cl01500200 Br01500200 0-1:000 0-2:000 0-3:000"},
    {"Z from a drawing", 0,
     "C,-0.67,0,0 C,0.67,0,0 C,-1.5,1.2,0 C,1.5,1.2,0",
     "1-2:2 1-3:1 2-4:1", "",
     "C03510100 C03510100 C04530200 C04530200 0-1:110 0-2:000 1-3:000"},
    {"E from a drawing", 0,
     "C,-0.67,0,0 C,0.67,0,0 C,-1.5,1.2,0 C,1.5,-1.2,0",
     "1-2:2 1-3:1 2-4:1", "",
     "C03510100 C03510100 C04530200 C04530200 0-1:120 0-2:000 1-3:000"},
    {"crossed double bond", 0,
     "C,-0.67,0,0 C,0.67,0,0 C,-1.5,1.2,0 C,1.5,1.2,0",
     "1-2:2/3 1-3:1 2-4:1", "",
     "C03510100 C03510100 C04530200 C04530200 0-1:150 0-2:000 1-3:000"},
    {"wavy bond at a double bond", 0,
     "C,-0.67,0,0 C,0.67,0,0 C,-1.5,1.2,0 C,1.5,1.2,0",
     "1-2:2 3-1:1/4 2-4:1", "",
     "C03510100 C03510100 C04530200 C04530200 0-1:150 2-0:000 1-3:000"},
    {"linear double bond", 0,
     "C,-0.67,0,0 C,0.67,0,0 C,-1.5,1.2,0 C,2.2,0,0",
     "1-2:2 1-3:1 2-4:1", "",
     "C03510100 C03510100 C04530200 C04530200 0-1:150 0-2:000 1-3:000"},
    {"no coordinates", 0,
     "C,0,0,0 C,0,0,0 C,0,0,0 C,0,0,0",
     "1-2:2 1-3:1 2-4:1", "",
     "C03510100 C03510100 C04530200 C04530200 0-1:150 0-2:000 1-3:000"},
    {"charge column and M  CHG", 0,
     "N,0,0,0,0,3,0 O,1,0,0,0,5,0",
     "1-2:1", "",
     "N04630200 O01400200 0-1:000"},
    {"M  CHG replaces all charges", 0,
     "N,0,0,0,0,3,0 O,1,0,0",
     "1-2:1", "M  CHG  1   2  -1",
     "N03520200 O01400200 0-1:000"},
    {"M  RAD and M  ISO", 0,
     "C,0,0,0 H,1,0,0 C,-1,0,0",
     "1-2:1 1-3:1", "M  RAD  1   1   2|M  ISO  1   2   2",
     "C03511200 H01500500 C04530200 0-1:000 0-2:000"},
    {"valence field", 0,
     "C,0,0,0,0,0,3 N,1,0,0,0,0,15 Fe,5,0,0,0,0,2",
     "1-2:1", "",
     "C03521200 N01502200 Fe02520300 0-1:000"},
    {"D, T and mass difference", 0,
     "D,0,0,0 C,1,0,0,1,0,0 T,2,0,0",
     "1-2:1 2-3:1", "",
     "H01500500 C04520200 H01500500 0-1:000 1-2:000"},
    {"dummies", 0,
     "*,0,0,0 C,1,0,0 *,2,0,0",
     "1-2:1 2-3:1", "",
     "*01500500 C04520200 *01500500 0-1:000 1-2:000"},
    {"aromatic bonds", 0,
     "C,1,0,0 C,0.5,0.87,0 C,-0.5,0.87,0 C,-1,0,0 C,-0.5,-0.87,0 N,0.5,-0.87,0",
     "1-2:4 2-3:4 3-4:4 4-5:4 5-6:4 6-1:4", "",
     "C03510111 C03510111 C03510111 C03510111 C03510111 N02500111 0-1:301 1-2:301 2-3:301 "
     "3-4:301 4-5:301 5-0:301"},
    {"two-letter symbol in capitals", 0,
     "CL,0,0,0 C,1,0,0",
     "1-2:1", "",
     "Cl01500200 C04530200 0-1:000"},
    {"square planar from 3D", 1,
     "Pt,0,0,0 Cl,2,0,0.01 Cl,-2,0,0 N,0,2,0 N,0,-2,0",
     "1-2:1 1-3:1 1-4:1 1-5:1", "",
     "Pt44500500 Cl01500200 Cl01500200 N03520200 N03520200 0-1:000 0-2:000 0-3:000 0-4:000"},
    {"wedges at an atom of two bonds", 0,
     "C,0,0,0 D,1,0,0 S,0,1,0",
     "1-2:1/1 1-3:1/1", "",
     "C04520200 H01500500 S02510200 0-1:000 0-2:000"},
    {"arsenic of two bonds, one wavy", 0,
     "As,0,0,0 C,-0.96,0.29,0 N,-0.26,-0.96,0",
     "1-2:1/1 1-3:1/4", "",
     "As03510200 C04530200 N03520200 0-1:000 0-2:000"},
    {"dashed hydrogens", 0,
     "C,0,0,0 D,0.87,-0.5,0 H,0,-1,0",
     "1-2:1/6 3-1:1/6", "",
     "C04530200 H01500500 0-1:000"},
    {"wrong bond stereo, linear", 0,
     "B,0,0,0 O,0.5,0.87,0 Br,-1.3,-0.75,0",
     "1-2:2/3 1-3:1/6", "",
     "B02500000 O01500100 Br01500200 0-1:150 0-2:000"},
    {"hydrogen first", 0,
     "N,0,0,0 H,-0.5,0.87,0 O,0.05,-0.09,0",
     "1-2:1 1-3:1", "",
     "N03520200 O02510200 0-1:000"},
    {"wedge and dash at deuterium", 0,
     "C,0,0,0 D,-1,0,0 Cl,1.3,0.75,0 N,-1.3,0.75,0",
     "1-2:1 1-3:1/6 1-4:1/1", "",
     "C14510200 H01500500 Cl01500200 N03520200 0-1:000 0-2:000 0-3:000"},
    {"three wedges in a half plane", 0,
     "Se,0,0,0 C,-0.28,-0.96,0 N,0.29,-0.96,0 I,-0.72,0.69,0",
     "1-2:1/6 1-3:1/6 1-4:1/1", "",
     "Se24510200 C04530200 N03520200 I01500200 0-1:000 0-2:000 0-3:000"},
    {"wedge and dash side by side", 0,
     "C,0,0,0 F,1.3,-0.75,0 Cl,0,-1,0 O,0.75,-1.3,0",
     "1-2:1/1 1-3:1 1-4:1/6", "",
     "C24510200 F01500200 Cl01500200 O02510200 0-1:000 0-2:000 0-3:000"},
    {"sulfur with three wedges", 0,
     "S,0,0,0 I,-1.3,-0.75,0 D,-0.5,0.87,0 C,0,-1.5,0",
     "1-2:1/6 1-3:1/1 1-4:1/1", "",
     "S14510200 I01500200 H01500500 C04530200 0-1:000 0-2:000 0-3:000"},
    {"arsenic with wedges", 0,
     "As,0,0,0 Br,0.77,-0.64,0 D,0.09,0.03,0 N,-0.88,0.48,0",
     "2-1:1 1-3:1/1 1-4:1/1", "",
     "As23500200 Br01500200 H01500500 N03520200 1-0:000 0-2:000 0-3:000"},
    {"hydrogens on cobalt", 1,
     "Co,0,0,0 H,2,2,2 H,-2,2,-2 Br,-2,-2,2",
     "1-2:1 3-1:1 1-4:1", "",
     "Co01500300 Br01500200 0-1:000"},
    {"T-shaped arsenic keeps its hydrogen", 1,
     "As,0,0,0 H,-0.94,1.77,0.04 Br,-0.03,0,-1.97 Br,-0.02,-0.01,1.91",
     "1-2:1/6 1-3:1/1 1-4:1", "",
     "As43500500 H01500500 Br01500200 Br01500200 0-1:000 0-2:000 0-3:000"},
    {"silane", 1,
     "Si,0,0,0 H,1.92,2.07,2 H,-1.93,2.03,-2.06 H,-1.98,-2.07,2.07",
     "2-1:1 1-3:1 1-4:1", "",
     "Si04540200"},
    {"square from three of iron", 1,
     "Fe,0,0,0,0,1,0 Cl,2,0,0 O,0,0,-2 Br,0,0,2",
     "1-2:1 1-3:2 1-4:1/1", "",
     "Fe43800500 Cl01500200 O01500100 Br01500200 0-1:000 0-2:100 0-3:000"},
    {"selenium in a plane", 1,
     "Se,0,0,0 O,-0.9,1.69,-0.07 H,2.08,-0.09,0.03 N,-0.94,-1.73,-0.01",
     "1-2:1 1-3:1 4-1:1", "",
     "Se02500200 O02510200 N03520200 0-1:000 2-0:000"},
    {"charged selenium", 1,
     "Se,0,0,0,0,3,0 H,1.9,2.16,2.05 H,2.05,-2.02,-1.86 O,-2.14,-2.28,2.19",
     "1-2:1 1-3:1 1-4:1", "",
     "Se03620200 O02510200 0-1:000"},
    {"selenium in T shape", 1,
     "Se,0,0,0,0,1,0 Br,-0.25,-0.1,2.18 N,0.23,-0.25,-1.9 O,0.21,2.08,0",
     "1-2:1 1-3:1 1-4:1", "",
     "Se05820200 Br01500200 N03520200 O02510200 0-1:000 0-2:000 0-3:000"},
    {"see-saw sulfur", 1,
     "S,0,0,0,0,1,0 F,0.29,0.26,2.25 C,-1.94,0.06,-0.17 I,0.29,2.19,-0.15 C,-0.18,-0.05,-2.23",
     "1-2:1 1-3:2 1-4:1 1-5:1", "",
     "S44800400 F01500200 C03520100 I01500200 C04530200 0-1:000 0-2:100 0-3:000 0-4:000"},
    {"bipyramid of four around iron", 1,
     "Fe,0,0,0,0,5,0 F,-1,1.73,0 F,0,0,-2 F,-1,-1.73,0 Br,0,0,2",
     "1-2:1 1-3:1/1 1-4:1 1-5:1", "",
     "Fe44400300 F01500200 F01500200 F01500200 Br01500200 0-1:000 0-2:000 0-3:000 0-4:000"},
    {"double bond with a linear arm", 1,
     "C,-0.67,0,0 C,0.67,0,0 F,-2.2,0,0.5 C,2.2,-1.2,0 N,2.2,0,0",
     "1-3:1 4-2:1 2-5:1 1-2:2", "",
     "C03510100 C03500100 F01500200 C04530200 N03520100 0-2:000 3-1:000 1-4:001 0-1:111"},
    {"square pyramid of phosphorus", 1,
     "P,0,0,0 H,0.05,2.03,-0.06 N,-1.92,0.09,-0.09 N,0.01,-0.05,-2.07 S,-0.01,0.01,2.08 "
     "Br,1.91,-0.02,-0.02",
     "2-1:1 1-3:1 1-4:1 5-1:1 1-6:1", "",
     "P45500400 H01500500 N03520200 N03520200 S02510200 Br01500200 1-0:000 0-2:000 0-3:000 "
     "4-0:000 0-5:000"},
    {"diene with a linear arm", 0,
     "C,-0.67,0,0 C,0.67,0,0 C,-1.5,0,0 F,2.2,-1.2,0 C,3,0,0 C,-4,1.2,0",
     "5-6:1 1-2:2 1-3:1 2-4:1 3-5:2", "",
     "C03510100 C03510100 C03510100 F01500200 C03510100 C04530200 4-5:000 0-1:151 0-2:001 "
     "1-3:000 2-4:111"},
    {"wedge on an imine, crossed bond behind", 1,
     "C,-0.67,0,0 N,0.67,0,0 H,-0.9,1.2,0 P,1.5,-1.2,0.5 C,-3,1.2,0 C,4,0,0",
     "1-2:2 4-2:1/1 1-3:1/6 5-6:1/3 4-5:2", "A    1|alias",
     "C03510100 N02500100 H01500500 P02500100 C03510100 C04530200 0-1:120 3-1:000 0-2:000 "
     "4-5:050 3-4:110"},
    {"crossed bonds in a row, linear", 0,
     "C,-0.67,0,0 N,0.67,0,0 C,-2.2,0,0 N,1.5,1.2,0 C,2.5,-1.2,0 C,-4,0,0",
     "5-6:2/3 1-3:1/6 2-4:1 3-5:2 1-2:2/3", "",
     "C03510100 N02500100 C03510100 N03520100 C02500000 C03520100 4-5:151 0-2:001 1-3:001 "
     "2-4:101 0-1:151"},
    {"heteroatoms at a diene", 1,
     "C,-0.67,0,0 N,0.67,0,0 P,-2.2,0,0.5 P,0.9,0.01,0 C,-3,1.2,0 C,3,0,0",
     "5-6:2/3 4-5:2 1-3:1 1-2:2 2-4:1/1", "",
     "C03510100 N02500100 P03520200 P02500100 C02500000 C03520100 4-5:151 3-4:101 0-2:000 "
     "0-1:120 1-3:000"},
    {"dashes at an imine", 0,
     "C,-0.67,0,0 N,0.67,0,0 C,-1.5,1.2,0 P,2.2,-1.2,0 C,-3,1.2,0 C,4,2.4,0",
     "2-4:1/6 1-3:1 3-5:2 5-6:1 1-2:2", "",
     "C03510100 N02500100 C03510100 P03520200 C03510100 C04530200 1-3:000 0-2:001 2-4:121 "
     "4-5:000 0-1:121"},
    {"alias, value and skipped lines", 0,
     "C,0,0,0 O,1,0,0",
     "1-2:1", "A    1|alias|V    2 text|S  SKP  1|anything|M  STY  1   1 DAT",
     "C04530200 O02510200 0-1:000"},
    {"group abbreviation", 0,
     "C,0,0,0 O,1,0,0",
     "1-2:1", "G    1  2|text",
     "C04530200 O02510200 0-1:000"},
    {"later charges count", 0,
     "N,0,0,0 C,1,0,0",
     "1-2:1", "M  CHG  1   1   1|M  CHG  2   1  -1   2  -1",
     "N02410200 C03420200 0-1:000"},
    {"radicals", 0,
     "C,0,0,0 C,1,0,0 C,2,0,0",
     "1-2:1", "M  RAD  3   1   1   2   2   3   3",
     "C02512200 C03521200 C02522200 0-1:000"},
    {"isotopes without number", 0,
     "C,0,0,0 C,1,0,0",
     "1-2:1", "M  ISO  1   1|M  ISO  1   1    |M  ISO  1   2  -4|M  ISO  1   2  13",
     "C04530200 C04530200 0-1:000"},
    {"property that nobody knows", 0,
     "C,0,0,0 O,1,0,0",
     "1-2:1", "M  XYZ  1   1  13",
     "C04530200 O02510200 0-1:000"},
    {"mass differences", 0,
     "C,0,0,0,1,0,0 H,1,0,0,1,0,0 C,2,0,0,-3,0,0",
     "1-2:1 1-3:1", "",
     "C04520200 H01500500 C04530200 0-1:000 0-2:000"},
    {"all charges of the column", 0,
     "N,0,0,0,0,1,0 N,1,0,0,0,2,0 N,2,0,0,0,3,0 N,3,0,0,0,4,0 N,4,0,0,0,5,0 N,5,0,0,0,6,0 "
     "N,6,0,0,0,7,0",
     "", "",
     "N06860200 N05750200 N04640200 N03530200 N02420200 N01310200 N00200200"},
    {"bond of order 0", 0,
     "C,0,0,0 C,1,0,0",
     "1-2:0", "",
     "C05540300 C05540300 0-1:400"},
    {"hydrogens of sulfur and phosphorus", 0,
     "S,0,0,0 H,1,0,0 H,-1,0,0 H,0,1,0 H,0,-1,0 P,5,0,0 H,6,0,0 H,4,0,0 H,5,1,0 H,5,-1,0 "
     "H,5.5,.5,0",
     "1-2:1 1-3:1 1-4:1 1-5:1 6-7:1 6-8:1 6-9:1 6-10:1 6-11:1", "",
     "S04540300 P05550300"},
};

// What only V3000 says, right or wrong: a block from its counts on, | between lines.
static const struct { const char *rule, *text, *expected; } PREP_V3000[] = {
    {"radicals",
     "3 2 0 0 0|BEGIN ATOM|1 C 0 0 0 0 RAD=1|2 C 1 0 0 0 RAD=2|3 C 2 0 0 0 RAD=3|END ATOM|"
     "BEGIN BOND|1 1 1 2|2 1 2 3|END BOND",
     "C02512200 C03511200 C02512200 0-1:000 1-2:000"},
    {"no radical",
     "1 0 0 0 0|BEGIN ATOM|1 C 0 0 0 0 RAD=0 CHG=-1|END ATOM",
     "C03430200"},
    {"radical of 4",
     "1 0 0 0 0|BEGIN ATOM|1 C 0 0 0 0 RAD=4|END ATOM",
     "refused"},
    {"masses, also of a dummy",
     "4 0 0 0 0|BEGIN ATOM|1 C 0 0 0 0 MASS=13|2 H 1 0 0 0 MASS=2.7|3 * 2 0 0 0 MASS=5|"
     "4 H 5 0 0 0|END ATOM",
     "C04540200 H01510500 *00500500 H01510500"},
    {"negative mass",
     "1 0 0 0 0|BEGIN ATOM|1 C 0 0 0 0 MASS=-1|END ATOM",
     "refused"},
    {"configuration is passed over",
     "1 0 0 0 0|BEGIN ATOM|1 C 0 0 0 0 CFG=1|END ATOM",
     "C04540200"},
    {"configuration 4",
     "1 0 0 0 0|BEGIN ATOM|1 C 0 0 0 0 CFG=4|END ATOM",
     "refused"},
    {"configuration x",
     "1 0 0 0 0|BEGIN ATOM|1 C 0 0 0 0 CFG=x|END ATOM",
     "refused"},
    {"valences",
     "2 0 0 0 0|BEGIN ATOM|1 C 0 0 0 0 VAL=3|2 N 1 0 0 0 VAL=-1|END ATOM",
     "C03531200 N00503200"},
    {"valence x",
     "1 0 0 0 0|BEGIN ATOM|1 C 0 0 0 0 VAL=x|END ATOM",
     "refused"},
    {"charge x",
     "1 0 0 0 0|BEGIN ATOM|1 C 0 0 0 0 CHG=x|END ATOM",
     "refused"},
    {"property without =",
     "1 0 0 0 0|BEGIN ATOM|1 N 0 0 0 0 CHG|END ATOM",
     "refused"},
    {"query fields of 0",
     "1 0 0 0 0|BEGIN ATOM|1 C 0 0 0 0 HCOUNT=0 SUBST=0 RBCNT=0 UNSAT=0|END ATOM",
     "C04540200"},
    {"quotes, blanks and brackets",
     "2 1 0 0 0|BEGIN ATOM|1 C 0  0 0 0  CLASS=\"a \"\"b\"\" c\" |2 O 1 0 0 0 |END ATOM|"
     "BEGIN BOND|1 1 1 2 ENDPTS=(1 2)  ATTACH=ANY|END BOND",
     "C04530200 O02510200 0-1:000"},
    {"quoted value",
     "1 0 0 0 0|BEGIN ATOM|1 \"C\" 0 0 0 0|END ATOM",
     "C04540200"},
    {"map numbers",
     "1 0 0 0 0|BEGIN ATOM|1 C 0 0 0 7|END ATOM",
     "C04540200"},
    {"labels out of order",
     "3 2 0 0 0|BEGIN ATOM|70 C 0 0 0 0|6 O 1 0 0 0|134 N 2 0 0 0|END ATOM|BEGIN BOND|1 1 6 70|"
     "2 1 70 134|END BOND",
     "C04520200 O02510200 N03520200 1-0:000 0-2:000"},
    {"same label twice",
     "2 1 0 0 0|BEGIN ATOM|1 C 0 0 0 0|1 O 1 0 0 0|END ATOM|BEGIN BOND|1 1 1 2|END BOND",
     "refused"},
    {"line continued in a word",
     "1 0 0 0 0|BEGIN ATOM|1 C 0 0 -|0 0 CH-|G=-1|END ATOM",
     "C03430200"},
    {"nothing but the sign that a line is continued",
     "1 0 0 0 0|BEGIN ATOM|-|-|1 C 0 -|0 0 0|END ATOM",
     "C04540200"},
    {"excluded elements",
     "1 0 0 0 0|BEGIN ATOM|1 NOT [N,O] 0 0 0 0|END ATOM",
     "refused"},
    {"wedge, dash, wavy",
     "5 4 0 0 0|BEGIN ATOM|1 C 0 0 0 0|2 F 1 0 0 0|3 Cl -.5 .9 0 0|4 Br -.5 -.9 0 0|5 I 0 1 0 0|"
     "END ATOM|BEGIN BOND|1 1 1 2 CFG=1|2 1 1 3 CFG=0|3 1 1 4 CFG=3|4 1 1 5|END BOND",
     "C24500200 F01500200 Cl01500200 Br01500200 I01500200 0-1:000 0-2:000 0-3:000 0-4:000"},
    {"bond configuration 4",
     "2 1 0 0 0|BEGIN ATOM|1 C 0 0 0 0|2 F 1 0 0 0|END ATOM|BEGIN BOND|1 1 1 2 CFG=4|END BOND",
     "refused"},
    {"bond topology of 0",
     "2 1 0 0 0|BEGIN ATOM|1 C 0 0 0 0|2 F 1 0 0 0|END ATOM|BEGIN BOND|1 1 1 2 TOPO=0 RXCTR=0|"
     "END BOND",
     "C04530200 F01500200 0-1:000"},
    {"bond without =",
     "2 1 0 0 0|BEGIN ATOM|1 C 0 0 0 0|2 F 1 0 0 0|END ATOM|BEGIN BOND|1 1 1 2 CFG|END BOND",
     "refused"},
    {"bond type 9 and 10",
     "3 2 0 0 0|BEGIN ATOM|1 N 0 0 0 0|2 Fe 1 0 0 0|3 O 2 0 0 0|END ATOM|BEGIN BOND|1 9 1 2|"
     "2 10 2 3|END BOND",
     "N04530300 Fe02500300 O03520300 0-1:400 1-2:400"},
    {"bond type x",
     "2 1 0 0 0|BEGIN ATOM|1 C 0 0 0 0|2 F 1 0 0 0|END ATOM|BEGIN BOND|1 x 1 2|END BOND",
     "C05540300 F02510300 0-1:400"},
    {"short bond",
     "2 1 0 0 0|BEGIN ATOM|1 C 0 0 0 0|2 F 1 0 0 0|END ATOM|BEGIN BOND|1 1 1|END BOND",
     "refused"},
    {"other sections",
     "1 0 1 0 0|BEGIN ATOM|1 C 0 0 0 0|END ATOM|BEGIN SGROUP|"
     "1 DAT 1 ATOMS=(1 1) FIELDNAME=\"x\"|END SGROUP|BEGIN COLLECTION|MDLV30/STEABS ATOMS=(1 1)|"
     "END COLLECTION",
     "C04540200"},
    {"link node",
     "1 0 0 0 0|BEGIN ATOM|1 C 0 0 0 0|END ATOM|LINKNODE 1 2 2 1 2 1 3",
     "C04540200"},
    {"sgroups first",
     "1 0 1 0 0|BEGIN SGROUP|1 DAT 1 ATOMS=(1 1) FIELDNAME=\"x\"|END SGROUP|BEGIN ATOM|"
     "1 C 0 0 0 0|END ATOM",
     "refused"},
    {"no bond block",
     "2 1 0 0 0|BEGIN ATOM|1 C 0 0 0 0|2 F 1 0 0 0|END ATOM",
     "refused"},
    {"short atom block",
     "2 1 0 0 0|BEGIN ATOM|1 C 0 0 0 0|END ATOM",
     "refused"},
    {"long atom block",
     "1 0 0 0 0|BEGIN ATOM|1 C 0 0 0 0|2 C 0 0 0 0|END ATOM",
     "refused"},
    {"empty line",
     "1 0 0 0 0|BEGIN ATOM||1 C 0 0 0 0|END ATOM",
     "refused"},
    {"D",
     "2 1 0 0 0|BEGIN ATOM|1 D 0 0 0 0|2 O 1 0 0 0|END ATOM|BEGIN BOND|1 1 1 2|END BOND",
     "H01500500 O02510200 0-1:000"},
};

// Atoms of row k of PREP_MOLS as lines of a mol block. Returns how many; *plain: V3000 can say it.
static int prep_atom_lines(char *out, size_t room, int k, int v3000, int *plain) {
    int n_atoms = 0, used, more, v[3];
    char symbol[4];
    double x, y, z;
    size_t n = 0;
    *plain = PREP_MOLS[k].properties[0] == 0;
    for (const char *p = PREP_MOLS[k].atoms;
         sscanf(p, "%3[^,],%lf,%lf,%lf%n", symbol, &x, &y, &z, &used) == 4;) {
        v[0] = v[1] = v[2] = 0;
        p += used;
        if (*p == ',' && sscanf(p, ",%d,%d,%d%n", &v[0], &v[1], &v[2], &more) == 3) p += more;
        p += *p == ' ';
        if (v[0]) *plain = 0;
        n_atoms++;
        if (v3000)
            n += (size_t)snprintf(out + n, room - n,
                                  "M  V30 %d %s %g %g %g 0 CHG=%d -\nM  V30 VAL=%d\n", n_atoms,
                                  symbol, x, y, z, v[1] ? 4 - v[1] : 0, v[2] == 15 ? -1 : v[2]);
        else
            n += (size_t)snprintf(out + n, room - n, "%10.4f%10.4f%10.4f %-3s%2d%3d  0  0  0%3d\n",
                                  x, y, z, symbol, v[0], v[1], v[2]);
    }
    return n_atoms;
}

// Its bonds. Returns how many.
static int prep_bond_lines(char *out, size_t room, int k, int v3000) {
    static const int cfg[] = {0, 1, 0, 2, 2, 0, 3};  // of V3000, for each bond stereo of V2000
    int n_bonds = 0, used, i, j, type, stereo;
    size_t n = 0;
    out[0] = 0;
    for (const char *p = PREP_MOLS[k].bonds; sscanf(p, "%d-%d:%d%n", &i, &j, &type, &used) == 3;) {
        p += used;
        stereo = *p == '/' ? p[1] - '0' : 0;
        p += *p == '/' ? 2 : 0;
        p += *p == ' ';
        n_bonds++;
        if (v3000)
            n += (size_t)snprintf(out + n, room - n, "M  V30 %d %d %d %d CFG=%d\n", n_bonds, type,
                                  i, j, cfg[stereo]);
        else
            n += (size_t)snprintf(out + n, room - n, "%3d%3d%3d%3d\n", i, j, type, stereo);
    }
    return n_bonds;
}

// Row k of PREP_MOLS as a mol block with a data item; returns whether V3000 can say the same.
static int prep_mol_block(char *out, size_t room, int k, int v3000) {
    char atoms[2048], bonds[1024], properties[200];
    int plain, n_atoms = prep_atom_lines(atoms, sizeof atoms, k, v3000, &plain);
    int n_bonds = prep_bond_lines(bonds, sizeof bonds, k, v3000);
    const char *dimension = PREP_MOLS[k].is_3d ? "3D" : "2D";
    snprintf(properties, sizeof properties, "%s%s", PREP_MOLS[k].properties,
             *PREP_MOLS[k].properties ? "\n" : "");
    for (char *c = properties; *c; c++)
        if (*c == '|') *c = '\n';
    if (v3000)
        snprintf(out, room, "name\n  test              %s\n\n"
                 "  0  0  0     0  0            999 V3000\nM  V30 BEGIN CTAB\n"
                 "M  V30 COUNTS %d %d 0 0 0\nM  V30 BEGIN ATOM\n%s"
                 "M  V30 END ATOM\nM  V30 BEGIN BOND\n%sM  V30 END BOND\nM  V30 END CTAB\n"
                 "M  END\n> <y>\n2.5\n\n", dimension, n_atoms, n_bonds, atoms, bonds);
    else
        snprintf(out, room, "name\n  test              %s\n\n"
                 "%3d%3d  0  0  0  0  0  0  0  0999 V2000\n"
                 "%s%s%sM  END\n> <y>\n2.5\n\n", dimension, n_atoms, n_bonds, atoms, bonds,
                 properties);
    return plain;
}

// Row k of PREP_V3000 as a mol block.
static void prep_v3000_block(char *out, size_t room, size_t k) {
    size_t n = (size_t)snprintf(out, room, "\n  test              2D\n\n  0  0  0     0  0"
                                "            999 V3000\nM  V30 BEGIN CTAB\nM  V30 COUNTS ");
    for (const char *p = PREP_V3000[k].text; *p; p++)
        n += (size_t)snprintf(out + n, room - n, *p == '|' ? "\nM  V30 " : "%c", *p);
    snprintf(out + n, room - n, "\nM  V30 END CTAB\nM  END\n");
}

// Catches a rule of perception that no longer gives RDKit's features, in any format or line end.
static void test_perception(Worker *w) {
    char block[8192], crlf[8192], v2[2048], v3[2048];
    Outcome o;
    for (size_t k = 0; k < sizeof PREP_SMILES / sizeof *PREP_SMILES; k++)
        prep_expect(w, FORMAT_SMI, PREP_SMILES[k].rule, PREP_SMILES[k].smiles,
                    PREP_SMILES[k].expected);
    for (size_t k = 0; k < sizeof PREP_V3000 / sizeof *PREP_V3000; k++) {
        prep_v3000_block(block, sizeof block, k);
        prep_expect(w, FORMAT_SDF, PREP_V3000[k].rule, block, PREP_V3000[k].expected);
    }
    for (int k = 0; k < (int)(sizeof PREP_MOLS / sizeof *PREP_MOLS); k++) {
        prep_mol_block(block, sizeof block, k, 0);
        prep_expect(w, FORMAT_SDF, PREP_MOLS[k].rule, block, PREP_MOLS[k].expected);
        Molecule *m = &w->molecule;
        test_check(m->labels[0] == 2.5f && strcmp(m->name, "name") == 0, "%s: label and name",
                   PREP_MOLS[k].rule);
        test_check(m->has_pos == PREP_MOLS[k].is_3d || strstr(PREP_MOLS[k].rule, "linear"),
                   "%s: positions", PREP_MOLS[k].rule);
        size_t n = 0;
        for (char *c = block; *c; c++) {
            if (*c == '\n') crlf[n++] = '\r';
            crlf[n++] = *c;
        }
        crlf[n] = 0;
        prep_expect(w, FORMAT_SDF, "CRLF", crlf, PREP_MOLS[k].expected);
        if (!prep_mol_block(block, sizeof block, k, 1)) continue;
        prep_describe(&w->molecule, v2, sizeof v2);
        int kept = prep_convert(w, FORMAT_SDF, block, strlen(block), &o);
        prep_describe(&w->molecule, v3, sizeof v3);
        test_check(kept && strcmp(v2, v3) == 0, "%s as V3000: got %s, expected %s",
                   PREP_MOLS[k].rule, kept ? v3 : o.fault.text, v2);
    }
}

#define HEAD "x\n\n\n"
#define ATOM "    0.0000    0.0000    0.0000 C   0  0\n"
#define COUNTS1 "  1  0  0     0  0            999 V2000\n"
#define COUNTS2 "  2  1  0     0  0            999 V2000\n"
#define V3HEAD HEAD "  0  0  0     0  0            999 V3000\nM  V30 BEGIN CTAB\n"
#define V3ATOM "M  V30 BEGIN ATOM\nM  V30 1 C 0 0 0 0\nM  V30 END ATOM\n"

// Bad records: where the fault is, and what the message says.
static const struct {
    Format format;
    const char *text;
    int line, column;
    const char *message;
} PREP_FAULTS[] = {
    {FORMAT_SMI, "C(", 1, 3, "expected an atom, found the end"},
    {FORMAT_SMI, "C(C", 1, 4, "expected ), found the end"},
    {FORMAT_SMI, "CC)", 1, 3, "expected an atom, a bond or a branch, found \")\""},
    {FORMAT_SMI, "C1CC", 1, 2, "ring 1 is not closed"},
    {FORMAT_SMI, "C11", 1, 3, "ring 1 bonds an atom to itself"},
    {FORMAT_SMI, "C1CC1C12CC12", 1, 8, "ring 2 bonds two atoms a second time"},
    {FORMAT_SMI, "CxC", 1, 2, "expected an atom, found \"x\""},
    {FORMAT_SMI, "C=", 1, 3, "expected an atom, found the end"},
    {FORMAT_SMI, "=C", 1, 1, "expected an atom, found \"=\""},
    {FORMAT_SMI, "C.", 1, 3, "expected an atom, found the end"},
    {FORMAT_SMI, "[C", 1, 3, "expected ], found the end"},
    {FORMAT_SMI, "[Xx]", 1, 2, "expected an element symbol, found \"X\""},
    {FORMAT_SMI, "[#119]", 1, 6, "expected an atomic number up to 118, found \"]\""},
    {FORMAT_SMI, "[C+++]", 1, 5, "expected ], found \"+\""},
    {FORMAT_SMI, "[C@TH3]", 1, 4, "expected TH1 or TH2, found \"T\""},
    {FORMAT_SMI, "[Pt@SP1]", 1, 5, "@SP is not supported, only @, @@, @TH1 and @TH2"},
    {FORMAT_SMI, "[99999999999C]", 1, 2, "expected a number below 2147483648, found \"9\""},
    {FORMAT_SMI, "C%1", 1, 2, "expected % and two digits, found \"%\""},
    {FORMAT_SMI, "C%(", 1, 2, "expected %( up to five digits ), found \"%\""},
    {FORMAT_SMI, "C(C)(C)(C)(C)C", 0, 0, "atom 1 (C): valence 5 is greater than permitted"},
    {FORMAT_SMI, "[CH260]", 0, 0, "atom 1 (C): valence 260 is greater than permitted"},  // was CH4
    {FORMAT_SMI, "c1cccc1", 0, 0, "the aromatic ring system of atom 1 has no Kekule structure"},
    {FORMAT_SMI, "cC", 0, 0, "atom 1 (C) is marked aromatic but in no ring"},
    {FORMAT_SMI, "*1cccc1", 0, 0, "the aromatic ring of atom 1 has a dummy atom"},
    {FORMAT_CSV, ",a,1", 1, 1, "the SMILES is empty"},
    {FORMAT_CSV, "\"C,a,1", 1, 2, "expected an atom, found \",\""},
    {FORMAT_SDF, "x\n", 1, 1, "expected a counts line, found \"\""},
    {FORMAT_SDF, HEAD "  x  0\n", 4, 1, "expected a number in columns 1-3, found \"  x\""},
    {FORMAT_SDF, HEAD "  1  0  0     0  0            999 V4000\n", 4, 35,
     "expected V2000 or V3000, found \"V4000\""},
    {FORMAT_SDF, HEAD COUNTS1, 4, 0, "expected 1 atom lines, found 0"},
    {FORMAT_SDF, HEAD COUNTS1 "    0.0\n", 5, 8,
     "expected an atom line of at least 34 columns, found 7"},
    {FORMAT_SDF, HEAD COUNTS1 "    0.0000    nan       0.0000 C   0\n", 5, 15,
     "expected a coordinate, found \"    nan   \""},
    {FORMAT_SDF, HEAD COUNTS1 "    0.0000    0.0000    0.0000 Qq  0\n", 5, 32,
     "expected an element symbol, found \"Qq\""},
    {FORMAT_SDF, HEAD COUNTS1 "    0.0000    0.0000    0.0000 C   0 +x\n", 5, 37,
     "expected a charge in columns 37-39, found \" +x\""},
    {FORMAT_SDF, HEAD COUNTS2 ATOM ATOM "  1  3  1\n", 7, 4,
     "expected an atom from 1 to 2, found 3"},
    {FORMAT_SDF, HEAD COUNTS2 ATOM ATOM "  1  1  1\nM  END\n", 0, 0,
     "atoms 1 and 1: a second bond, or one to itself"},
    {FORMAT_SDF, HEAD COUNTS2 ATOM ATOM "  1  2\n", 7, 7,
     "expected a bond line of at least 9 columns, found 6"},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "\nM  END\n", 6, 1,
     "expected a property line or M  END, found a blank line"},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "M  CHG  1   2   1\nM  END\n", 6, 0,
     "M  CHG names atom 2, expected 1 to 1"},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "M  RAD  1   1   9\n", 6, 0,
     "expected a radical of 1, 2 or 3 on atom 1, found 9"},
    {FORMAT_SDF, HEAD COUNTS2 ATOM ATOM "  1  2  1\nM  ZBO  1   1  -1\nM  END\n", 8, 0,
     "M  ZBO is not supported"},  // looked outside a table once
    {FORMAT_SDF, HEAD COUNTS2 ATOM ATOM "  1  2  8\n", 7, 0, "a query bond is not supported"},
    {FORMAT_SDF, HEAD COUNTS1 "    0.0000    0.0000    0.0000 R1  0\n", 5, 0,
     "R1 is not supported"},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 0\nM  V30 BEGIN ATOM\nM  V30 1 [N,O] 0 0 0 0\n", 8, 0,
     "[N,O] is not supported"},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "M  CHG  1   1   1\n", 6, 0,
     "expected M  END, found the end of the record"},
    {FORMAT_SDF, HEAD "  0  0  0     0  0            999 V2000\nM  END\n", 0, 0,
     "the molecule has no atoms"},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1\n", 6, 0,
     "expected COUNTS atoms bonds, found \"COUNTS 1\""},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 99999 0\n", 6, 0,
     "99999 atoms, 0 bonds (at most 65535 and 262140 can be read)"},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 0\nM  V30 BEGIN ATOM\nM  V30 1 C 0 0\n", 8, 0,
     "expected index, symbol, x, y, z and map number, found 4 fields"},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 0\nM  V30 BEGIN ATOM\nM  V30 1 Zz 0 0 0 0\n", 8, 10,
     "expected an element symbol, found \"Zz\""},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 0\nM  V30 BEGIN ATOM\nM  V30 1 C 0 0 0 0 MASS=1e300\n", 8,
     0, "expected a mass, found \"MASS=1e300\""},  // a cast that nothing defines
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 1\n" V3ATOM "M  V30 BEGIN BOND\nM  V30 1 1 1 2\n", 11, 14,
     "expected the index of an atom, found \"2\""},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 0\n" V3ATOM "M  END\n", 10, 1,
     "expected \"M  V30 \", found \"M  END\""},
    {FORMAT_SMI, "C\x01", 1, 2, "expected an atom, found byte 1"},
    {FORMAT_SMI, "[99999999999]", 1, 2, "expected a number below 2147483648, found \"9\""},
    {FORMAT_SMI, "[#]", 1, 3, "expected an atomic number up to 118, found \"]\""},
    {FORMAT_SMI, "[#99999999999]", 1, 3, "expected a number below 2147483648, found \"9\""},
    {FORMAT_SMI, "['Db]", 1, 5, "expected ', found \"]\""},
    {FORMAT_SMI, "[CH99999999999]", 1, 4, "expected a number below 2147483648, found \"9\""},
    {FORMAT_SMI, "[C+99999999999]", 1, 4, "expected a number below 2147483648, found \"9\""},
    {FORMAT_SMI, "[C:]", 1, 4, "expected a map number, found \"]\""},
    {FORMAT_SMI, "[C:99999999999]", 1, 4, "expected a number below 2147483648, found \"9\""},
    {FORMAT_SMI, "[C@TH99999999999]", 1, 6, "expected a number below 2147483648, found \"9\""},
    {FORMAT_SMI, "C[C@AL1]C", 1, 5, "@AL is not supported, only @, @@, @TH1 and @TH2"},
    {FORMAT_SMI, "C[As@TB1]C", 1, 6, "@TB is not supported, only @, @@, @TH1 and @TH2"},
    {FORMAT_SMI, "C[Co@OH1]C", 1, 6, "@OH is not supported, only @, @@, @TH1 and @TH2"},
    {FORMAT_SMI, "C%01CC%01", 1, 2, "expected % and two digits, found \"%\""},
    {FORMAT_SMI, "C%(12CC", 1, 2, "expected %( up to five digits ), found \"%\""},
    {FORMAT_SMI, "Xe", 1, 1, "expected an atom, found \"X\""},
    {FORMAT_SDF, HEAD " 1  0\n", 4, 1, "expected a counts line, found \" 1  0\""},
    {FORMAT_SDF, HEAD " -1  0  0     0  0            999 V2000\nM  END\n", 4, 1, "negative counts"},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "A    2\nx\n", 6, 1,
     "expected an alias or value of an atom from 1 to 1"},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "V    0\n", 6, 1,
     "expected an alias or value of an atom from 1 to 1"},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "V    1\n", 6, 1,
     "expected an alias or value of an atom from 1 to 1"},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "Axxx1\n", 6, 4,
     "expected a number in columns 4-6, found \"x1\""},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "A  1x\n", 6, 4,
     "expected a number in columns 4-6, found \"1x\""},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "S  SKP  x\n", 6, 7,
     "expected a number in columns 7-9, found \"  x\""},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "S  SKP  9\n", 6, 0,
     "expected M  END, found the end of the record"},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "X  SKP  9\n", 6, 0, "X  SKP  9 is not supported"},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "M  CHG  x   1   1\n", 6, 7,
     "expected a number in columns 7-9, found \"  x\""},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "M  CHG  1   x   1\n", 6, 10,
     "expected a number in columns 10-13, found \"   x\""},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "M  CHG  1   1   x\n", 6, 14,
     "expected a number in columns 14-17, found \"   x\""},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "M  CHG  1   0   1\n", 6, 0,
     "M  CHG names atom 0, expected 1 to 1"},
    {FORMAT_SDF, HEAD COUNTS1 ATOM "M  RAD  1   1   0\n", 6, 0,
     "expected a radical of 1, 2 or 3 on atom 1, found 0"},
    {FORMAT_SDF, HEAD COUNTS1 "    0.0a00    0.0000    0.0000 C   0  0\n", 5, 8,
     "expected a coordinate, found \"    0.0a00\""},
    {FORMAT_SDF, HEAD COUNTS1 "    0.0000    0.0000    0.0000 C   0  0  0  0  x\n", 5, 46,
     "expected a stereo care flag in columns 46-48, found \"  x\""},
    {FORMAT_SDF, HEAD COUNTS1 "    0.0000    0.0000    0.0000 C   0  0  0  2\n", 5, 0,
     "a hydrogen count is not supported"},
    {FORMAT_SDF, HEAD COUNTS1 "    0.0000    0.0000    0.0000 Pol 0  0\n", 5, 0,
     "Pol is not supported"},
    {FORMAT_SDF, HEAD COUNTS1 "   2e6        0.0000    0.0000 C   0  0\nM  END\n", 5, 5,
     "expected a coordinate, found \"   2e6    \""},
    {FORMAT_SDF, HEAD COUNTS1 "9000000.00    0.0000    1.0000 C   0  0\nM  END\n", 0, 0,
     "atom 1: coordinates must be below 1e6 Angstrom"},
    {FORMAT_SDF, HEAD COUNTS2 ATOM ATOM "  1  2 -1\n", 7, 7,
     "expected a number in columns 7-9, found \" -1\""},
    {FORMAT_SDF, HEAD COUNTS2 ATOM ATOM "  1  2  5\n", 7, 0, "a query bond is not supported"},
    {FORMAT_SDF, HEAD COUNTS2 ATOM ATOM "  1  2  1  0  0  1\n", 7, 0,
     "a bond topology is not supported"},
    {FORMAT_SDF, HEAD COUNTS2 ATOM ATOM "  0  2  1\n", 7, 1,
     "expected an atom from 1 to 2, found 0"},
    {FORMAT_SDF, HEAD COUNTS2 ATOM ATOM, 6, 0, "expected 1 bond lines, found 0"},
    {FORMAT_SDF, HEAD "  1  0  0     0  0            999 V3000\nM  END\n", 4, 1,
     "expected counts of 0 in the header of a V3000 block"},
    {FORMAT_SDF, HEAD "  0  0  0     0  0            999 V3000\nM  V30 BEGIN ATOM\n", 5, 0,
     "expected BEGIN CTAB, found \"BEGIN ATOM\""},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS -1 0\n", 6, 0,
     "expected COUNTS atoms bonds, found \"COUNTS -1 0\""},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 x\n", 6, 0,
     "expected COUNTS atoms bonds, found \"COUNTS 1 x\""},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 -1\n", 6, 0,
     "expected COUNTS atoms bonds, found \"COUNTS 1 -1\""},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 999999\n", 6, 0,
     "1 atoms, 999999 bonds (at most 65535 and 262140 can be read)"},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 99999999999 0\n", 6, 0,
     "expected COUNTS atoms bonds, found \"COUNTS 99999999999 0\""},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 0\n" V3ATOM "M  V30 END CTAB\n", 10, 0,
     "expected M  END, found \"\""},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 0\n" V3ATOM "M  V30 END CTAB\nx\n", 11, 0,
     "expected M  END, found \"x\""},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 0\nM  V30 BEGIN ATOM\nM  V30 1 NOT[N] 0 0 0 0\n", 8, 10,
     "expected an element symbol, found \"NOT[N]\""},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 0\nM  V30 BEGIN ATOM\nM  V30 1 NOT [N] 0 0 0 0\n", 8, 0,
     "NOT is not supported"},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 0\nM  V30 BEGIN ATOM\nM  V30 1 C 0 0 0 0 HCOUNT=2\n", 8, 0,
     "HCOUNT=2 is not supported"},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 1\n" V3ATOM "M  V30 BEGIN BOND\nM  V30 1 1 1\n", 11, 0,
     "expected index, type and two atoms, found 3 fields"},
    {FORMAT_SDF, V3HEAD "M  V30 COUNTS 1 1\n" V3ATOM "M  V30 END CTAB\n", 10, 0,
     "expected BEGIN BOND, found \"END CTAB\""},
};

// Catches a bad record being accepted, or blamed on the wrong line, column or reason.
static void test_faults(Worker *w) {
    Outcome o;
    for (size_t k = 0; k < sizeof PREP_FAULTS / sizeof *PREP_FAULTS; k++) {
        const char *text = PREP_FAULTS[k].text;
        int kept = prep_convert(w, PREP_FAULTS[k].format, text, strlen(text), &o);
        test_check(!kept && o.fault.line == PREP_FAULTS[k].line &&
                   o.fault.column == PREP_FAULTS[k].column &&
                   strcmp(o.fault.text, PREP_FAULTS[k].message) == 0,
                   "\"%s\": got %s at %d:%d, expected %s at %d:%d", text,
                   kept ? "a molecule" : o.fault.text, o.fault.line, o.fault.column,
                   PREP_FAULTS[k].message, PREP_FAULTS[k].line, PREP_FAULTS[k].column);
    }
    // Catches a record that the reader refuses being written: it would cost the whole dataset.
    prep_convert(w, FORMAT_SMI, "CC", 2, &o);
    size_t used = w->used;
    w->molecule.bond_code[0] = BOND_CODES;
    store_molecule(w, &o);
    test_check(w->used == used && strcmp(o.fault.text, "bond feature out of range") == 0,
               "an unreadable record was kept: \"%s\"", o.fault.text);
}

// Writes a pattern to *out up to its end or an unpaired }, and returns that place. {N|text} is text
// N times, # in it (but not outside) the number of the time; such groups may be nested.
static const char *prep_expand(const char *p, int number, char **out) {
    for (; *p && *p != '}'; p++) {
        if (*p == '#' && number) {
            *out += sprintf(*out, "%d", number);
        } else if (*p == '{') {
            char *end;
            int count = (int)strtol(p + 1, &end, 10);
            for (int k = 1; k <= count; k++) p = prep_expand(end + 1, k, out);
        } else {
            *(*out)++ = *p;
        }
    }
    **out = 0;
    return p;
}

enum { PREP_TEXT_MAX = 40 << 20 };

// SMILES that took too long or too much memory once, or passed for something else, and what becomes
// of them ("": kept) with so many MiB of memory.
static const struct { const char *catches, *pattern, *kind; int most; } PREP_HOSTILE[] = {
    {"hours for two atoms with 509 common neighbours", "[Fe]{509|(C%(#))}.[U]{509|%(#)}",
     "too intricate", 10},
    {"a minute for the CIP ranks of a long peptide", "N{13000|[C@@H](C)C(=O)N}",
     "too intricate", 30},
    {"memory that grows with the square of a ladder", "C1C{4000|C2C1C1C2}CC1", "", 10},
    {"as much memory as there are ring numbers", "C{4000000|1}", "too intricate", 200},
    {"ring numbers times neighbours of a centre", "[C@](F){50000|%(#)}{50000|.C%(#)}",
     "too intricate", 20},
    {"the square of the hydrogens of a centre", "[Fe@]{30000|([H])}C", "too intricate", 20},
    {"the square of the double bonds of an atom", "[U]{30000|(=CC)}C", "too intricate", 30},
    {"a ring sorted by insertion", "C1{65000|C}1", "too intricate", 30},
    {"260 hydrogen atoms counted as 4", "C{260|([H])}", "valence too high", 10},
    {"too many bonds called too many atoms", "[Fe]{40000|(C%(#))}.[U]{40000|%(#)}",
     "too many bonds", 30},
};

// Catches records that hang the run, and a verdict that depends on what was converted before.
static void test_hostile_records(void) {
    char *text = xmalloc(PREP_TEXT_MAX, 1);
    Outcome o;
    for (size_t k = 0; k < sizeof PREP_HOSTILE / sizeof *PREP_HOSTILE; k++) {
        Worker w = {0};
        char *end = text;
        prep_expand(PREP_HOSTILE[k].pattern, 0, &end);
#if MB_POSIX
        alarm(120);  // ends the test if this one hangs
#endif
        int kept = prep_convert(&w, FORMAT_SMI, text, (size_t)(end - text), &o);
        int64_t left = w.mol.arena.left;
        test_check(strcmp(kept ? "" : o.fault.kind, PREP_HOSTILE[k].kind) == 0, "%s: got \"%s\"",
                   PREP_HOSTILE[k].catches, kept ? "" : o.fault.kind);
        mol_clear(&w.mol);  // the base grows to what was needed
        test_check(w.mol.arena.room >> 20 < (size_t)PREP_HOSTILE[k].most, "%s: %zu bytes",
                   PREP_HOSTILE[k].catches, w.mol.arena.room);
        if (kept) prep_convert(&w, FORMAT_SMI, text, (size_t)(end - text), &o);
        test_check(!kept || left == w.mol.arena.left, "%s: the steps depend on the arena",
                   PREP_HOSTILE[k].catches);
        worker_free(&w);
    }
#if MB_POSIX
    alarm(0);
#endif
    free(text);
}

#define NAMED "build/test_hostile."
#define SD_HEAD "x\n\n\n  1  0  0     0  0            999 V2000\n" \
                "    0.0000    0.0000    0.0000 C   0  0\nM  END\n"

#define DUMP " && ./data_prep --dump build/test_hostile.bin"
#define MOL_3D "\n  test              3D\n\n  2  1  0     0  0            999 V2000\n" \
    "    0.0000    0.0000    1.0000 C   0  0\n    1.0000    0.0000    0.5000 O   0  0\n" \
    "  1  2  1\nM  END\n"
// Files that ended or misled a run: their ending, pattern, options for data_prep, its exit code and
// what it says.
static const struct { const char *ending, *pattern, *options; int code; const char *expected;
} PREP_FILES[] = {
    // 57 GiB for a row: every quoted field took room for all that follow it
    {"csv", "smiles{4001|,c#}\nC{4000|,\"1\"},\"{15000000|x}\"\n", "--labels c1", 0, "1 molecules"},
    // an open quote swallowed all rows behind it and was called a malformed SMILES
    {"csv", "smiles,y,z\nC,1,a\nCC,2,\"oops\n{50|C},3,b\nCCC,4,c\n", "--labels y", 0,
     NAMED "csv:3: column 6: the quote that opens here is never closed"},
    {"csv", "smiles,z,y\nC,\"a\nb\",1\n\"CC,2\nCCC,4,c\n", "", 0, "csv:4: column 1: the quote"},
    {"csv", "smiles,z,y\nC,\"a\nb\",1\n\"CC,2\nCCC,4,c\n", "", 0, "kept 2 (4 atoms)"},
    {"csv", "smiles,\"y\nC,2\n", "", 1, "csv:1: the header has a quote that is never closed"},
    // the rest of a line that is too long was a record of its own
    {"smi", "C {30000000|x}\nCC\nC(\n", "", 0, "read 3 records from 1 file, kept 1"},
    {"smi", "C {30000000|x}\nCC\nC(\n", "", 0, "smi:3: column 3: expected an atom, found the end"},
    {"sdf", SD_HEAD "{3000000|> <y>\n1\n\n}$$$$\n" SD_HEAD "$$$$\n", "", 0, "read 2 records"},
    // the last of two columns was taken
    {"csv", "smiles,y,y\nC,1,2\n", "--labels y", 1, "columns 2 and 3 are both named \"y\"; rename"},
    {"csv", "smiles,SMILES\nC,C\n", "", 1, "columns 1 and 2 are both named \"SMILES\"; rename"},
    // a line break in a task's name shifted the columns of `predict`
    {"csv", "smiles,\"a\nb\"\nC,1\n", "--labels 'a b'", 0, "1 molecules"},
    // columns and labels went without a word
    {"csv", "smiles,n,y,e\nC,7,1,\nCC,x,2,\n", "--labels all", 0,
     "leaves out \"n\": no usable number in record 2\n--labels all leaves out \"e\": no values\n"},
    {"sdf", SD_HEAD "> <n>\nx\n\n> <y>\n1\n\n$$$$\n", "--labels all", 0,
     "leaves out \"n\": no usable number in record 1\n"},
    {"csv", "smiles,y\nC,1e31\nCC,2\n", "--labels y", 0,
     "labels that are no numbers up to 1e30, taken as missing: 1"},
    // looked up every tag among all labels
    {"sdf", "{300|" SD_HEAD "{4000|> <t#>\n1\n\n}$$$$\n}", "--labels all", 0, "300 molecules"},
    // no text
    {"sdf.gz", "\x1F\x8B\x08", "", 1, NAMED "sdf.gz: is compressed by gzip; type: gzip -dc " NAMED
     "sdf.gz | ./data_prep --format sdf ... -"},
    {"xz", "\xFD" "7zXZ", "", 1, "type: xz -dc " NAMED "xz | ./data_prep --format FORMAT ... -"},
    {"csv", "PK\3\4", "", 1, "a zip archive; type: unzip -p " NAMED "csv"},
    {"csv", "\xFF\xFEs", "", 1, "UTF-16 text; type: iconv -f UTF-16 -t UTF-8 " NAMED "csv"},
    // a byte order mark was part of the SMILES
    {"smi", "\xEF\xBB\xBF" "C\n", "", 0, "1 molecules"},
    // names that make bad JSON; rows and tags misread; wrong counts; options that are not checked
    {"smi", "C a\"b\\\x01\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80", DUMP, 0,
     "{\"name\":\"a\\\"b\\\\\\u0001\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\",\"atom_feat\":[["},
    // not UTF-8: a lone byte, too long forms, a surrogate, beyond the last one, cut short
    {"smi", "C \xFF\x80\xC1\xBF", DUMP, 0, "\"\\u00ff\\u0080\\u00c1\\u00bf\""},
    {"smi", "C \xE0\x9F\xBF\xED\xA0\x80", DUMP, 0,
     "\"\\u00e0\\u009f\\u00bf\\u00ed\\u00a0\\u0080\""},
    {"smi", "C \xF0\x8F\x80\x80\xF4\x90\x80\x80", DUMP, 0,
     "\"\\u00f0\\u008f\\u0080\\u0080\\u00f4\\u0090\\u0080\\u0080\""},
    {"smi", "C \xE2\x82 \xC3", DUMP, 0, "\"\\u00e2\\u0082 \\u00c3\""},
    {"smi", "C a\nCC b\nCCC c\n", DUMP " --range 1:2", 0, "{\"name\":\"b\""},
    {"smi", "C a\nCC b\nCCC c\n", DUMP " --range 2:", 0, "{\"name\":\"c\""},
    {"smi", "C\n", DUMP " --range 2", 1, "expected A:B with A <= B, found \"2\""},
    {"smi", "C\n", DUMP " --range 2:1", 1, "--range: expected A:B with A <= B"},
    {"smi", "C\n", DUMP " --range=-1:2", 1, "expected A:B with A <= B, found \"-1:2\""},
    {"smi", "SMILES name\n\n# C\nC |x:0| a\nCC |y\n \nCCC\n", DUMP, 0,
     "read 3 records from 1 file, kept 3"},
    {"smi", "SMILES name\n\n# C\nC |x:0| a\nCC |y\n \nCCC\n", DUMP, 0, "{\"name\":\"CC\""},
    {"smi", "C(\nC[\nxyz\nC=\nCC\n[CH9]\n", "", 0, "skipped 5:\n       4  malformed SMILES\n"},
    {"smi", "C(\nC[\nxyz\nC=\nCC\n[CH9]\n", "", 0, NAMED "smi:6: atom 1 (C)"},
    {"smi", "C\nC(\n", "--strict", 1, "data_prep: " NAMED "smi:2: column 3: expected an atom"},
    {"smi", "CCC\n", "--max-atoms 2", 1, "3 atoms, --max-atoms is 2"},
    {"csv", "\xEF\xBB\xBFid,SMILES,a,b,c,d\nx,C,1,w,,?\ny,CC,,2,,2e3\n",
     "--labels all --name id" DUMP, 0, "\"pos\":null,\"labels\":[1,null]}\n{\"name\":\"y\""},
    {"csv", "smiles,a\nC,1234567890123456789012345678901234567890123456789012345678901234567\n"
     "CC,1\nC\n", "--labels a", 0, "taken as missing: 1"},
    {"csv", "a,smiles,b\n1,C\n2\n3,CC,4,5\n", "--labels b" DUMP, 0,
     "expected a SMILES in field 2, found 1 fields"},
    {"csv", "smiles,a\nC,1\n", "--labels a,b", 1, NAMED "csv:1: expected a column \"b\""},
    {"csv", "smiles,a\nC,1\n", "--name id", 1, "expected a column \"id\" (--name)"},
    {"csv", "x,a\nC,1\n", "", 1, "expected a column \"smiles\"; name the SMILES column"},
    {"csv", "x,a\nC,1\n", "--smiles x --labels ,", 1, "expected names separated by commas"},
    {"csv", "x,a\nC,\n", "--smiles x --labels a", 1, "no record has a value for \"a\""},
    {"tsv", "\"smi\"\"les\"\ta\n\"C\"x\t1\n", "--smiles 'smi\"les' --labels all", 1,
     "no molecule"},
    {"sdf", MOL_3D "> <id>\nm1\n\n> <a>\n1\n\n> <w>\nx\n\n$$$$\n" MOL_3D "><>\n> <a>\n$$$$\n",
     "--labels all --name id --orient principal" DUMP, 0, "{\"name\":\"m1\""},
    {"sdf", MOL_3D "> <id>\nm1\n\n> <a>\n1\n\n> <w>\nx\n\n$$$$\n" MOL_3D "><>\n> <a>\n$$$$\n",
     "--labels all --name id" DUMP, 0, "0,0,1],[1,0,0.5]],\"labels\":[null]}"},
    {"smi", "C\nCC\nc1ccccc1\n", "--split 0.5,0.5", 0, "valid           2 molecules"},
    {"smi", "C\nCC\nc1ccccc1\n", "--split 0.5,0.5 --split-by order", 0, "valid           2"},
    {"smi", "C\n", "--split 0.5", 1, "expected 2 or 3 fractions that add up to 1"},
    {"smi", "C\n", "--split 0.5,0.6", 1, "expected 2 or 3 fractions that add up to 1"},
    {"smi", "C\n", "--split 0.5,x", 1, "expected 2 or 3 fractions that add up to 1"},
    {"smi", "C\n", "--split 2,-1", 1, "expected 2 or 3 fractions that add up to 1"},
    {"smi", "C\n", "--split 0.1,0.1,0.1,0.7", 1, "expected 2 or 3 fractions that add up to 1"},
    {"smi", "C\n", "--split 0.5,0.5 --split-by name", 1, "expected scaffold, random, order"},
    {"smi", "C\n", "--orient up", 1, "--orient: expected keep or principal"},
    {"smi", "C\n", "-o 'build/{}.bin'", 1, "-o: {} stands for a part's name"},
    {"mol2", "C\n", "", 1, "cannot tell the format; give"},
    {"smi", "C\n", "--format mol2", 1, "cannot tell the format from --format mol2"},
};

static void test_hostile_files(void) {
    char *text = xmalloc(PREP_TEXT_MAX, 1), *end;
    for (size_t k = 0; k < sizeof PREP_FILES / sizeof *PREP_FILES; k++) {
        char *path = xprintf(NAMED "%s", PREP_FILES[k].ending);
        prep_expand(PREP_FILES[k].pattern, 0, (end = text, &end));
        write_bytes(path, text, (size_t)(end - text));
        char *command = xprintf("ulimit -t 10; ./data_prep -o build/test_hostile.bin %s %s",
                                path, PREP_FILES[k].options);
        test_command(command, PREP_FILES[k].code, PREP_FILES[k].expected);
        remove(path);
        free(command);
        free(path);
    }
    free(text);
}

// Catches a number reader that rounds other than strtod.
static void test_decimals(void) {
    int wrong = 0, wrong_fixed = 0;
    char text[64];
    double x;
    for (uint32_t k = 0; k < 20000; k++) {
        double v = ((double)rng_bits(1, RNG_SHUFFLE, 0, 0, k) - 2e9) * pow(10, -(double)(k % 12));
        snprintf(text, sizeof text, "%*.*f", (int)(k % 20), (int)(k % 18), v);
        wrong += parse_decimal((Span){text, (int)strlen(text)}) != strtod(text, NULL);
        snprintf(text, sizeof text, "%10.4f ", fmod(v, 999));
        if (fixed_decimal(text, &x))
            wrong_fixed += x != strtod(text, NULL) || !signbit(x) != !strchr(text, '-');
    }
    test_check(wrong == 0 && wrong_fixed == 0, "%d and %d numbers differ from strtod", wrong,
               wrong_fixed);
    static const char *const odd[] = {"1e3", " +2.5x", "-.5", "5.", "", "abc",
                                      "1.7976931348623157e308", "123456789012345678901234567890",
                                      "0.1234567890123456789"};
    for (int k = 0; k < 9; k++)
        test_check(parse_decimal((Span){odd[k], (int)strlen(odd[k])}) == strtod(odd[k], NULL),
                   "parse_decimal(\"%s\")", odd[k]);
}

// Writes text to a file, reads it back as records, and returns how many there are; sizes into n.
static int prep_cut(const char *name, const char *text, size_t length, size_t *sizes) {
    static Record records[CHUNK_RECORDS];
    Source s;
    int n = 0, got;
    write_bytes(name, text, length);
    source_open(&s, name, NULL);
    while ((got = next_records(&s, records)) > 0)
        for (int k = 0; k < got; k++) sizes[n++] = records[k].size;
    source_close(&s);
    remove(name);
    return n;
}

// Catches records cut at the wrong place, by line ends, quotes or the borders of the buffer.
static void test_records(void) {
    static const struct { const char *file, *text; int n; size_t last; } cases[] = {
        {"test.tmp.sdf", "a\n$$$$\nb\n$$$$\n", 2, 7}, {"test.tmp.sdf", "a\n$$$$\nb", 2, 1},
        {"test.tmp.sdf", "a\r\n$$$$\r\nb\r\n$$$$", 2, 7}, {"test.tmp.sdf", "a\n$$$$\n\n \n", 1, 7},
        {"test.tmp.sdf", "a$$$$\n$$$\n$$$$x\nb\n", 2, 2}, {"test.tmp.sdf", "", 0, 0},
        {"test.tmp.csv", "a,b\nc,\"d\ne\"\nf", 3, 1},
        {"test.tmp.csv", "a,\"\"\"\n\",b\r\nc\n", 2, 2},
        {"test.tmp.csv", "a,b\"c\nd\"\n", 2, 3}, {"test.tmp.tsv", "a\t\"b\nc\"\nd\n", 2, 2},
        {"test.tmp.smi", "C\nCC", 2, 2}, {"test.tmp.smi", "C\r\n\r\nCC\r\n", 3, 4}};
    static size_t sizes[1 << 16];
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        int n = prep_cut(cases[k].file, cases[k].text, strlen(cases[k].text), sizes);
        test_check(n == cases[k].n && (n == 0 || sizes[n - 1] == cases[k].last),
                   "\"%s\": %d records, the last of %zu bytes", cases[k].text, n,
                   n ? sizes[n - 1] : 0);
    }
    size_t length = 0, sum = 0, room = 3 * (size_t)CHUNK_BYTES;  // records across buffer borders
    char *text = xmalloc(room, 1);
    int n = 0;
    for (; length + 70000 < room; n++) {
        size_t size = 5 + rng_bits(2, RNG_SHUFFLE, 0, 0, (uint32_t)n) % 3000;
        memset(text + length, n % 100 == 7 ? '$' : 'x', size);
        memcpy(text + length + size, "\n$$$$\n", 6);
        text[length] = 'a';
        length += size + 6;
    }
    int got = prep_cut("test.tmp.sdf", text, length, sizes);
    for (int k = 0; k < got; k++) sum += sizes[k];
    test_check(got == n && sum == length, "%d records of %d, %zu bytes of %zu", got, n, sum,
               length);
    free(text);
}

// Catches misread CSV cells, labels, tags and names, and parts that overwrite each other.
static void test_fields(Worker *w) {
    static const struct { const char *text; float label; int ok; } labels[] = {
        {"1.5", 1.5f, 1}, {" -2e3 ", -2000, 1}, {"", NAN, 1}, {"NaN", NAN, 1}, {"n/a", NAN, 1},
        {"active", NAN, 0}, {"1e99", NAN, 0}, {"inf", NAN, 0}, {"0x10", NAN, 0}, {"1 2", NAN, 0}};
    for (int k = 0; k < 10; k++) {
        float label;
        int ok = parse_label((Span){labels[k].text, (int)strlen(labels[k].text)}, &label);
        test_check(ok == labels[k].ok && (isnan(labels[k].label) ? isnan(label)
                                                                 : label == labels[k].label),
                   "label \"%s\"", labels[k].text);
    }
    Outcome o;
    const char *row = "CCO,\"the \"\"name\"\"\",3.5,x\r\n";
    test_check(prep_convert(w, FORMAT_CSV, row, strlen(row), &o) && w->molecule.n_atoms == 3 &&
               w->molecule.labels[0] == 3.5f && strcmp(w->molecule.name, "the \"name\"") == 0,
               "a CSV row with quotes: %s", w->molecule.name);
    const char *line = "CC |c:0| ethane\n";
    test_check(prep_convert(w, FORMAT_SMI, line, strlen(line), &o) &&
               strcmp(w->molecule.name, "ethane") == 0, "name behind a CXSMILES extension");
    Span name, value;
    const char *tags = "> <A>\n1\n2\n\n>  25 <B> (x)\n\n> <C>\n$$$$\n";
    Lines in = {tags, tags + strlen(tags), 0};
    int n = 0;
    for (; next_tag(&in, &name, &value); n++)
        test_check(span_is(name, n == 0 ? "A" : n == 1 ? "B" : "C") &&
                   span_is(value, n == 0 ? "1" : ""), "tag %d", n);
    test_check(n == 3, "%d tags of 3", n);
    static const char *const paths[][3] = {
        {"x.{}.bin", "valid", "x.valid.bin"}, {"{}.bin", "test", "test.bin"},
        {"train.bin", "valid", "valid.bin"}, {"a.d/data.bin", "train", "a.d/data.train.bin"},
        {"train/x", "test", "train/x.test"}};
    for (int k = 0; k < 5; k++) {
        char *path = part_path(paths[k][0], paths[k][1]);
        test_check(strcmp(path, paths[k][2]) == 0, "part path %s, expected %s", path, paths[k][2]);
        free(path);
    }
}

// Catches a principal frame that depends on how the molecule lay, or that mirrors it.
static void test_orientation(Worker *w) {
    ChemMol *m = &w->mol;
    double pos[2][6][3], error = 0, moment[2] = {0};
    for (int turn = 0; turn < 2; turn++) {
        mol_clear(m);
        for (int i = 0; i < 6; i++) {
            mol_add_atom(m, 6);
            double p[3];
            for (int k = 0; k < 3; k++)
                p[k] = (3.0 - k) * (double)rng_uniform(3, RNG_NOISE, 0, 0, (uint32_t)(3 * i + k));
            double c = cos(1.0), s = sin(1.0);
            double q[3] = {c * p[0] - s * p[1] + 5, s * p[0] + c * p[1] - 2, p[2] + 1};
            double r[3] = {q[0], c * q[1] - s * q[2], s * q[1] + c * q[2]};
            memcpy(m->xyz[i], turn ? r : p, sizeof r);
        }
        orient_principal(m);
        memcpy(pos[turn], m->xyz, sizeof pos[turn]);
    }
    for (int i = 0; i < 6; i++)
        for (int k = 0; k < 3; k++) {
            error = fmax(error, fabs(pos[0][i][k] - pos[1][i][k]));
            if (k < 2) moment[k] += pos[0][i][k] * pos[0][i][k] * pos[0][i][k];
        }
    test_check(error < 1e-9, "principal frame: a turned molecule differs by %.1e", error);
    test_check(moment[0] > 0 && moment[1] > 0, "principal frame: third moments");
}

// Catches equal scaffolds told apart, different ones confused, and groups in the wrong part.
static void test_scaffolds(Worker *w) {
    static const char *const groups[][4] = {
        {"CCO", "C=CC", "[Na+]", NULL},
        {"c1ccccc1", "Cc1ccccc1", "OC(=O)c1ccc(N)cc1", "C[C@H](N)c1ccccc1"},
        {"C1CCCCC1", "CC1CCCCC1", "C[C@H]1CC[C@@H](C)CC1", NULL},
        {"O=C1CCCCC1", "CC1CCCCC1=O", NULL, NULL},
        {"c1ccccc1Cc1ccccc1", "Cc1ccccc1C(C)c1ccccc1O", NULL, NULL},
        {"c1ccc2ccccc2c1", "Cc1ccc2ccccc2c1", NULL, NULL},
        {"C1CCC2CCCCC2C1", NULL, NULL, NULL}, {"C1CCCC1C1CCCC1", NULL, NULL, NULL},
        {"c1cc[nH]c1", "Cn1cccc1", NULL, NULL}, {"n1ccccc1", NULL, NULL, NULL},
        {"C1CCCC[CH2:2147483647]1", NULL, NULL, NULL}};  // an overflow once
    ScaffoldKey key[11][4], all[10];
    Outcome o;
    for (int g = 0; g < 11; g++) {
        for (int k = 0; k < 4 && groups[g][k]; k++) {
            prep_convert(w, FORMAT_SMI, groups[g][k], strlen(groups[g][k]), &o);
            key[g][k] = scaffold_key(&w->mol);
            test_check(key[g][k].a == key[g][0].a && key[g][k].b == key[g][0].b,
                       "scaffolds of %s and %s", groups[g][0], groups[g][k]);
        }
        for (int h = 0; h < g; h++)
            test_check(key[g][0].a != key[h][0].a || key[g][0].b != key[h][0].b,
                       "scaffolds of %s and %s are equal", groups[g][0], groups[h][0]);
    }
    const int group_of[10] = {0, 1, 0, 2, 1, 0, 3, 1, 0, 4};
    const uint8_t expected[10] = {0, 0, 0, 2, 0, 0, 1, 0, 0, 0};  // 4 + 3 + the last single one
    const double fraction[3] = {0.8, 0.1, 0.1};
    uint8_t part[10];
    for (int i = 0; i < 10; i++) all[i] = key[group_of[i]][0];
    split_by_scaffold(part, all, 10, fraction, 3);
    test_check(memcmp(part, expected, 10) == 0, "scaffold split %d%d%d%d%d%d%d%d%d%d", part[0],
               part[1], part[2], part[3], part[4], part[5], part[6], part[7], part[8], part[9]);
}

// Catches wrong fractions, and a random split that a seed does not fix.
static void test_split_fractions(void) {
    enum { N = 1001 };
    const double fraction[3] = {0.8, 0.1, 0.1};
    uint8_t part[N], again[N];
    uint32_t order[N];
    int count[3] = {0}, changes = 0;
    split_by_order(part, N, NULL, fraction, 3);
    for (int i = 0; i < N; i++) {
        count[part[i]]++;
        changes += i > 0 && part[i] != part[i - 1];
    }
    test_check(count[0] == 800 && count[1] == 100 && count[2] == 101 && changes == 2,
               "split by order: %d, %d, %d", count[0], count[1], count[2]);
    rng_permutation(order, N, 7, RNG_SPLIT, 0);
    split_by_order(part, N, order, fraction, 3);
    rng_permutation(order, N, 7, RNG_SPLIT, 0);
    split_by_order(again, N, order, fraction, 3);
    test_check(memcmp(part, again, N) == 0, "the same seed gives the same split");
    rng_permutation(order, N, 8, RNG_SPLIT, 0);
    split_by_order(again, N, order, fraction, 3);
    test_check(memcmp(part, again, N) != 0, "another seed gives another split");
}

// Catches a pointer kept across an array's growth: long chains in fresh memory.
static void test_growth(void) {
    enum { N = 500 };
    char *text = xmalloc(N * 100, 1), smiles[N + 1];
    size_t n = (size_t)sprintf(text, "\n\n\n%3d%3d  0  0  0  0  0  0  0  0999 V2000\n", N, N - 1);
    for (int i = 0; i < N; i++)
        n += (size_t)sprintf(text + n, "%10.4f    0.0000    0.0000 C   0  0\n", 1.5 * i);
    for (int i = 1; i < N; i++) n += (size_t)sprintf(text + n, "%3d%3d  1  0\n", i, i + 1);
    sprintf(text + n, "M  END\n");
    memset(smiles, 'C', N);
    smiles[N] = 0;
    for (int k = 0; k < 2; k++) {
        Worker w = {0};
        Outcome o;
        const char *record = k ? smiles : text;
        int kept = prep_convert(&w, k ? FORMAT_SMI : FORMAT_SDF, record, strlen(record), &o);
        test_check(kept && w.molecule.n_atoms == N && w.molecule.n_bonds == N - 1,
                   "a chain of %d atoms from a %s", N, k ? "SMILES" : "mol block");
        worker_free(&w);
    }
    free(text);
}

// Catches records that depend on the number of threads.
static void test_threads(void) {
    enum { N = (int)(sizeof PREP_SMILES / sizeof *PREP_SMILES) };
    static Record records[20 * N];
    static Outcome outcomes[20 * N];
    uint32_t crc[3];
    PrepOptions opt = {.max_atoms = 512};
    Conversion c = {.opt = &opt};
    Source s = {.path = "test", .format = FORMAT_SMI, .name_column = -1};
    for (int k = 0; k < 20 * N; k++)
        records[k] = (Record){PREP_SMILES[k % N].smiles, strlen(PREP_SMILES[k % N].smiles), 0,
                              NULL, 1};
    for (int t = 0; t < 3; t++) {
#ifdef _OPENMP
        int before = omp_get_max_threads();
        omp_set_num_threads(1 << t);
#endif
        Worker *workers = xmalloc(8, sizeof *workers);
        convert_records(&c, &s, records, 20 * N, workers, outcomes);
        crc[t] = 0;
        for (int k = 0; k < 20 * N; k++)
            if (outcomes[k].ok)
                crc[t] = crc32_add(crc[t], workers[outcomes[k].worker].bytes + outcomes[k].offset,
                                   outcomes[k].size);
        for (int k = 0; k < 8; k++) worker_free(&workers[k]);
        free(workers);
#ifdef _OPENMP
        omp_set_num_threads(before);
#endif
    }
    test_check(crc[0] == crc[1] && crc[1] == crc[2], "1, 2 and 4 threads: %08x %08x %08x",
               (unsigned)crc[0], (unsigned)crc[1], (unsigned)crc[2]);
}

// All tests of data_prep.
static void test_data_prep(void) {
    Worker w = {0};
    test_perception(&w);
    test_faults(&w);
    test_hostile_records();
    test_hostile_files();
    test_decimals();
    test_records();
    test_fields(&w);
    test_orientation(&w);
    test_scaffolds(&w);
    test_split_fractions();
    test_growth();
    test_threads();
    worker_free(&w);
}

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
                     {"data_prep", test_data_prep},
                     {"messages", test_messages},
#if MB_POSIX
                     {"machine", test_machine},
                     {"flipped bits", test_flips},
#endif
                     {"worked example", test_example},
                     {"damaged files", test_damage},
                     {"damage together", test_damage_together},
                     {"dataset fields", test_dataset_fields},
                     {"tensor headers", test_tensor_headers},
                     {"reproducible", test_reproducible},
                     {"files people have", test_files_people_have},
                     {"using", test_using},
                     {"resumed tuning", test_finetune_resume},
                     {"not finite", test_not_finite},
                     {"quotas", test_quota},
                     {"busy machine", test_busy},
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
