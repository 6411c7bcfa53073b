// tests/bites.h - small faults that no other test notices (see dev/mutants.txt): numbers are
// computed here once more, by plain loops in double, and every draw by its name

// ---- draws by their names: (purpose, step, place, index) under a seed, as moleblend.h says

static double plain_uniform(uint64_t seed, uint32_t purpose, uint32_t step, uint32_t place,
                            uint32_t index) {
    Philox block = philox((Philox){{index / 4, place, step, purpose}}, seed);
    return (double)(block.word[index % 4] >> 8) / 16777216.0;
}

static double plain_normal(uint64_t seed, uint32_t purpose, uint32_t step, uint32_t place,
                           uint32_t index) {
    double u = 1 - plain_uniform(seed, purpose, step, place, 2 * index);
    double v = plain_uniform(seed, purpose, step, place, 2 * index + 1);
    return sqrt(-2 * log(u)) * cos(2 * acos(-1.0) * v);
}

// A draw under the name of another, a probability that is not a part of the sum.
static void test_draws(void) {
    static const uint8_t shuffled[8] = {1, 2, 0, 3, 4, 7, 6, 5};
    uint32_t order[8], plain[8];
    for (uint32_t i = 0; i < 8; i++) plain[i] = i;
    for (uint32_t i = 8; i > 1; i--) {  // Fisher and Yates: with one of 0..i-1
        uint32_t bits = philox((Philox){{i / 4, 0, 3, 1}}, 7).word[i % 4];
        uint32_t j = (uint32_t)((uint64_t)bits * i >> 32), swap = plain[i - 1];
        plain[i - 1] = plain[j];
        plain[j] = swap;
    }
    rng_permutation(order, 8, 7, RNG_SHUFFLE, 3);
    int same = 0;
    for (int i = 0; i < 8; i++) same += order[i] == plain[i] && order[i] == shuffled[i];
    test_check(same == 8, "a permutation of eight: %u %u %u %u %u %u %u %u", order[0], order[1],
               order[2], order[3], order[4], order[5], order[6], order[7]);
    test_check(RNG_INIT == 0 && RNG_SPLIT == 2 && RNG_BLEND == 3 && RNG_FEATURE == 4 &&
               RNG_NOISE == 5 && RNG_DENOISE_DROP == 6 && RNG_EMBED_DROP == 7 &&
               RNG_ATTENTION_DROP == 256 && RNG_ACTIVATION_DROP == 512 && RNG_PATH_DROP == 768,
               "purposes of draws");
    enum { N = 37 };
    Step s = {0};
    Batch *const batch = &s.batch;
    Molecule m = {0};
    const Blend blend = {0.3, 0.5, 0.7, 0.9, 0.3, 0.25, 0};  // sums of 1.5 and 1.2
    const Draws draws = {21, 6, 40, 1};
    batch_layout(batch, 2, (const int[]){N, N});
    int wrong_pairs = 0, wrong_atoms = 0, shown[8] = {0};
    double worst = 0;
    for (int b = 0; b < 2; b++) {
        View v = batch_view(batch, b);
        random_molecule(&m, N, 1, b == 0, 5);
        batch_set(batch, b, &m);
        batch_draw(batch, b, &blend, &draws);
        for (uint32_t k = 0; k < N * N; k++) {
            double u = plain_uniform(21, 3, 6, 40 + (uint32_t)b, k) * (b ? 0.8 : 1.5);
            int expected = u < 0.3 ? USE_SPD : u < 0.8 ? USE_EDGE : USE_3D;
            wrong_pairs += batch->pair_use[v.pair + k] != expected;
            shown[expected]++;
        }
        for (uint32_t i = 0; i < N; i++) {
            double u = plain_uniform(21, 4, 6, 40 + (uint32_t)b, i);
            wrong_atoms += batch->atom_use[v.atom + i] != (b || u < 0.75 ? USE_SPD : USE_3D);
            for (uint32_t k = 3 * i; k < 3 * i + 3; k++) {
                double noise = b ? 0 : 0.25 * plain_normal(21, 5, 6, 40, k);
                worst = fmax(worst, fabs((double)batch->noise[3 * v.atom + k] - noise));
            }
        }
        batch_use(batch, b, USE_EDGE | USE_3D);
        test_check(batch->pair_use[v.pair + 5] == (b ? USE_EDGE : USE_EDGE | USE_3D) &&
                   batch->atom_use[v.atom + N - 1] == batch->pair_use[v.pair + N * N - 1],
                   "3D is used where there are positions");
    }
    test_check(wrong_pairs == 0 && shown[USE_SPD] > 20 && shown[USE_EDGE] > 20 &&
               shown[USE_3D] > 20, "%d pairs show what they did not draw", wrong_pairs);
    test_check(wrong_atoms == 0, "%d atoms show what they did not draw", wrong_atoms);
    test_check(worst < 1e-6, "noise differs by %.1e", worst);
    molecule_free(&m);
    step_close(&s);
    static const struct { int spd, class; } lengths[] = {
        {0, -1}, {1, 0}, {9, 8}, {10, 9}, {11, 10}, {400, 10}, {509, 10}, {510, -1}};
    for (int k = 0; k < 8; k++)
        test_check(spd_class(lengths[k].spd) == lengths[k].class, "class of a path of %d bonds: %d",
                   lengths[k].spd, spd_class(lengths[k].spd));
    for (int code = 0; code <= PATH_NONE; code++) {
        int type = code / 12, stereo = code % 12 / 2, expected = 6 * type + code % 12;
        test_check(edge_class(code) == (type > 3 || stereo > 2 ? -1 : expected),
                   "class of bond code %d: %d", code, edge_class(code));
    }
}

// ---- losses by their definitions, from what the heads say

static double plain_entropy(const float *x, int n, int target) {
    double sum = 0;
    for (int k = 0; k < n; k++) sum += exp((double)x[k] - (double)x[target]);
    return log(sum);
}

static double plain_cosine(const float *p, const float *q) {
    double pp = 0, qq = 0, pq = 0;
    for (int k = 0; k < 3; k++) {
        pp += (double)p[k] * (double)p[k];
        qq += (double)q[k] * (double)q[k];
        pq += (double)p[k] * (double)q[k];
    }
    return 1 - pq / sqrt(pp * qq);
}

// Molecules of the next test: in a line along x, y or z; atoms at one place; without positions;
// one atom; two atoms at one place; and others.
enum { LOSS_MOLECULES = 9 };
static void losses_molecule(Molecule *m, int b) {
    static const int atoms[LOSS_MOLECULES] = {4, 3, 5, 3, 14, 1, 6, 25, 9};
    random_molecule(m, atoms[b], b == 8 ? 2 : 1, b != 4, 300 + (uint32_t)b);
    for (int i = 0; i < m->n_atoms; i++)
        for (int k = 0; k < 3; k++) {
            float *x = &m->pos[3 * i + k];
            if (b < 3) *x = k == b ? 1.3f * (float)i : 0.5f;
            if (b == 3) *x = 2;
            if (b == 6 && i == 4) *x = m->pos[k];
        }
}

// A pair, slot, atom or molecule that counts where it should not, a mean over something else.
static void test_plain_losses(void) {
    Step s = {.draws = {4, 2, 0, 0}, .weights = {{0, 5, 0.3, 0.2, 0.7}}};
    Molecule m = {0}, all[LOSS_MOLECULES] = {{0}};
    for (int b = 0; b < LOSS_MOLECULES; b++) losses_molecule(&all[b], b);
    model_create(&s.model, (Config){1, 12, 8, 2, 4, 0}, 1);
    formula_params(&s.model);
    batch_molecules(&s, all, LOSS_MOLECULES);
    idx P = s.batch.P, pair = 0;
    float *spd = s.logits[LOSS_SPD] = xmalloc(P * SPD_CLASSES, sizeof *spd);
    float *edge = s.logits[LOSS_EDGE] = xmalloc(P * EDGE_OUTPUTS, sizeof *edge);
    float *d3 = s.logits[LOSS_3D] = xmalloc(P * 3, sizeof *d3);
    double sum[LOSSES], loss[LOSSES], plain[LOSSES] = {0}, count[LOSSES] = {0};
    encoder_forward(&s);
    pretrain_heads(sum, &s, 0);
    loss_means(loss, sum, s.batch.count, &s.weights);
    for (int b = 0; b < LOSS_MOLECULES; b++) {
        losses_molecule(&m, b);
        View v = batch_view(&s.batch, b);
        double directions = 0, directions_count = 0;
        for (int i = 0; i < m.n_atoms; i++) {
            for (int j = 0; j < m.n_atoms; j++, pair++) {
                const uint8_t *path = s.batch.path + 5 * pair;
                int length = s.batch.spd[pair], apart = 0;
                float d[3];
                if (i != j && length < 510) {
                    plain[LOSS_SPD] +=
                        plain_entropy(spd + 11 * pair, 11, length > 10 ? 10 : length - 1);
                    count[LOSS_SPD]++;
                }
                for (int t = 0; t < 5; t++) {  // of types and stereo that have a class
                    if (path[t] >= 48 || path[t] % 12 >= 6) continue;
                    plain[LOSS_EDGE] += plain_entropy(edge + 120 * pair + 24 * t, 24,
                                                      6 * (path[t] / 12) + path[t] % 12);
                    count[LOSS_EDGE]++;
                }
                for (int k = 0; k < 3; k++) {
                    d[k] = m.pos[3 * j + k] - m.pos[3 * i + k];
                    apart |= d[k] < 0 || d[k] > 0;
                }
                if (!m.has_pos || !apart) continue;
                directions += plain_cosine(d3 + 3 * pair, d);
                directions_count++;
            }
            idx atom = v.atom + i;
            if (!m.has_pos || s.batch.atom_use[atom] != USE_3D) continue;
            plain[LOSS_NOISE] +=
                plain_cosine(s.heads->denoise_out + 3 * atom, s.batch.noise + 3 * atom);
            count[LOSS_NOISE]++;
        }
        if (directions_count > 0) plain[LOSS_3D] += directions / directions_count;
        count[LOSS_3D] += directions_count > 0;
    }
    for (int k = 1; k < LOSSES; k++) {
        plain[k] /= count[k];
        plain[LOSS_TOTAL] += s.weights.weight[k] * plain[k];
        test_check(s.batch.count[k] == count[k], "%s: %.0f count, expected %.0f", LOSS_NAMES[k],
                   s.batch.count[k], count[k]);
    }
    for (int k = 0; k < LOSSES; k++)
        test_check(fabs(loss[k] / plain[k] - 1) < 1e-5, "loss %s: %.7f, expected %.7f",
                   LOSS_NAMES[k], loss[k], plain[k]);
    View v = batch_view(&s.batch, 4);  // of a molecule without positions no atom ever counts
    memset(s.batch.atom_use + v.atom, USE_3D, (size_t)v.N);
    batch_count(&s.batch);
    test_check(s.batch.count[LOSS_NOISE] == count[LOSS_NOISE], "noise counts without positions");
    float p[3] = {0, 0, 0}, q[3] = {1, 2, 3}, r[3] = {0.3f, -2, 1}, zero[3] = {0, 0, 0};
    test_check(cosine_loss(p, q, 1, 1) == 1 && p[0] < 0 && cosine_loss(r, zero, 1, 1) == 1 &&
               r[0] == 0, "a direction of no length costs 1");
    free(spd), free(edge), free(d3);
    molecule_free(&m);
    step_close(&s);
}

// The loss of fine-tuning and its gradient: a term left out, a label that is missing and counts.
static void test_task_loss(void) {
    static const float logits[6] = {0.5f, -2, 30, -40, 1.5f, 0.25f};
    static const float mean[2] = {1, -3}, std[2] = {2, 0.5f};
    float classes[6] = {1, 0, 0, 1, NAN, 1}, values[6] = {2, -3, NAN, -2.5f, 0, 4}, d[6];
    for (int kind = 0; kind < 3; kind++) {  // classes; deviations; the labels' units
        Task task = {.kind = kind ? TASK_REGRESSION : TASK_CLASSIFICATION, .mean = mean, .std = std,
                     .label_units = kind == 2};
        Batch batch = {.B = 3, .Y = 2, .labels = kind ? values : classes, .count = {5}};
        double loss = task_loss(d, logits, &batch, &task), sum = 0, worst = 0;
        for (int k = 0; k < 6; k++) {
            double x = (double)logits[k], y = (double)batch.labels[k], slope = 0;
            double unit = kind == 2 ? (double)std[k % 2] : 1;
            if (!isnan(y) && kind == 0) {
                sum += log(1 + exp(-fabs(x))) + fmax(x, 0) - x * y;
                slope = 1 / (1 + exp(-x)) - y;
            } else if (!isnan(y)) {
                double error = x - (y - (double)mean[k % 2]) / (double)std[k % 2];
                sum += unit * unit * error * error;
                slope = 2 * unit * unit * error;
            }
            worst = fmax(worst, fabs(slope / 5 - (double)d[k]));
        }
        test_check(fabs(loss / (sum / 5) - 1) < 1e-6 && worst < 1e-5, "loss of kind %d: %.7f, "
                   "expected %.7f; gradients differ by %.1e", kind, loss, sum / 5, worst);
    }
}

// ---- layers with every dropout, in double, from the same input

// A rate of another layer, a mask or branch of another name, a mask that is not applied.
static void test_dropped_layers(void) {
    Rig rig;
    rig_open(&rig, 0, 1);
    const uint64_t seed = rig.draws.seed;
    const uint32_t step = rig.draws.step;
    enum { L = 4 };
    const double rates[4] = {0.2, 0.15, 0.3, 0.1};  // as in rig_open()
    Config c = rig.model.config;
    int C = c.dim, F = c.ffn, dropped = 0, kept = 0;
    model_free(&rig.model);
    c.layers = L;
    rig.draws.first_slot = 50;
    model_create(&rig.model, c, 1);
    formula_params(&rig.model);
    encoder_forward(&rig);
    idx T = rig.batch.T, n = T * C;
    float *undropped = xmalloc(n, sizeof *undropped), *plain = xmalloc(n, sizeof *plain);
    float *x0 = xmalloc((L + 1) * n, sizeof *x0);
    memcpy(x0, rig.enc->x, (L + 1) * n * sizeof *x0);
    rig.draws.active = 0;
    encoder_forward(&rig);
    memcpy(undropped, rig.enc->x, n * sizeof *undropped);
    for (idx t = 0; t < T; t++) {  // the embedding's dropout: a row a token of a molecule
        View v = batch_view(&rig.batch, rig.batch.molecule[t]);
        for (int k = 0; k < C; k++)
            plain[t * C + k] =
                (float)(plain_mask(&rig.draws, 7, 50 + (uint32_t)v.b, (uint32_t)(t - v.token), C, k,
                                   rates[3]) * (double)undropped[t * C + k]);
    }
    test_close(x0, plain, n, 1e-6, "embedding dropout");
    double *mid = xmalloc((size_t)C, sizeof *mid), *hidden = xmalloc((size_t)F, sizeof *hidden);
    double *qkv = xmalloc(3 * n, sizeof *qkv), *context = xmalloc((size_t)C, sizeof *context);
    for (int l = 0; l < L; l++) {
        const LayerTensors *p = &rig.model.p.layer[l];
        const float *x = x0 + l * n;
        double rate = rates[2] * l / (L - 1);
        for (idx t = 0; t < T; t++)
            for (int o = 0; o < 3 * C; o++) {
                const float *w = p->qkv_w + o * C;
                double out = (double)p->qkv_b[o];
                for (int k = 0; k < C; k++) out += (double)w[k] * (double)x[t * C + k];
                qkv[t * 3 * C + o] = out;
            }
        for (idx t = 0; t < T; t++) {
            View v = batch_view(&rig.batch, rig.batch.molecule[t]);
            int i = (int)(t - v.token);
            uint32_t slot = 50 + (uint32_t)v.b;
            double keep[2], mean, square;
            for (uint32_t second = 0; second < 2; second++) {
                double u = plain_uniform(seed, 768 + (uint32_t)l, step, slot, second);
                keep[second] = rate <= 0 ? 1 : u < rate ? 0 : 1 / (1 - rate);
                dropped += i == 0 && keep[second] < 0.5;
                kept += i == 0 && keep[second] > 1;
            }
            plain_attention(context, &rig, qkv, t, l, rates[0]);
            for (int half = 0; half < 2; half++) {  // attention, then the feed-forward layer
                const float *w = half ? p->ffn2_w : p->out_w, *b = half ? p->ffn2_b : p->out_b;
                const double *in = half ? hidden : context;
                int width = half ? F : C;
                double sums[64];
                mean = square = 0;
                for (int o = 0; o < C; o++) {
                    double out = (double)b[o];
                    for (int k = 0; k < width; k++) out += (double)w[o * width + k] * in[k];
                    sums[o] = (half ? mid[o] : (double)x[t * C + o]) + keep[half] * out;
                    mean += sums[o] / C;
                }
                for (int o = 0; o < C; o++) square += (sums[o] - mean) * (sums[o] - mean) / C;
                const float *nw = half ? p->norm2_w : p->norm1_w;
                const float *nb = half ? p->norm2_b : p->norm1_b;
                for (int o = 0; o < C; o++)
                    mid[o] = (sums[o] - mean) / sqrt(square + 1e-5) * (double)nw[o] + (double)nb[o];
                for (int o = 0; o < F && !half; o++) {
                    double pre = (double)p->ffn1_b[o];
                    for (int k = 0; k < C; k++) pre += (double)p->ffn1_w[o * C + k] * mid[k];
                    hidden[o] = 0.5 * pre * (1 + erf(pre / sqrt(2.0))) *
                                plain_mask(&rig.draws, 512 + (uint32_t)l, slot, (uint32_t)i, F, o,
                                           rates[1]);
                }
            }
            for (int o = 0; o < C; o++) plain[t * C + o] = (float)mid[o];
        }
        char *what = xprintf("layer %d with its dropouts", l);
        test_close(x0 + (l + 1) * n, plain, n, 1e-5, what);
        free(what);
    }
    test_check(dropped > 2 && kept > 10, "%d branches dropped, %d scaled", dropped, kept);
    FREE_ALL(undropped, plain, x0, mid, hidden, qkv, context);
    step_close(&rig);
}

// ---- the optimiser

// Weight decay, clipping or a correction left out; a rate one step late; parts of the arena
// forgotten.
static void test_optimiser(void) {
    static const struct { int64_t step, warmup, steps; double hold, expected; } rates[] = {
        {0, 10, 100, 0, 0.2}, {8, 10, 100, 0, 1.8}, {9, 10, 100, 0, 2}, {10, 10, 100, 0, 2},
        {55, 10, 100, 0, 1}, {40, 10, 100, 0, 1.5}, {70, 10, 100, 0, 0.5}, {100, 10, 100, 0, 0},
        {55, 10, 100, 0.5, 2}, {77, 10, 99, 0.5, 0.9823515}, {0, 0, 4, 0, 2}, {2, 0, 4, 0, 1},
        {5, 9, 9, 0, 2.0 * 6 / 9}, {90, 10, 100, 1, 2}, {19, 10, 110, 0.9, 2}};
    for (size_t k = 0; k < sizeof rates / sizeof *rates; k++) {
        double rate = learning_rate(2, rates[k].step, rates[k].warmup, rates[k].steps,
                                    rates[k].hold);
        test_check(fabs(rate - rates[k].expected) < 1e-6, "learning rate %zu: %.7f, expected %.7f",
                   k, rate, rates[k].expected);
    }
    static const Adam all[] = {{0.01, 0.9, 0.99, 1e-3, 0, 0}, {0.02, 0.5, 0.8, 1e-2, 0.3, 0},
                               {0.02, 0.5, 0.8, 1e-2, 0.1, 3}, {0.02, 0.9, 0.8, 1e-2, 0, 1e6}};
    for (int a = 0; a < 4; a++) {
        Model model;
        model_create(&model, (Config){1, 8, 8, 2, 2, 0}, 1);
        model_init(&model, 2);
        idx n = model.count, idle = 1 << 14, end = 2 << 14;
        CHECK(n > end + 100 && n % 64, "a model too small for this test");
        double *p = xmalloc(3 * n, sizeof *p), *m = p + n, *v = m + n, square, worst = 0;
        float *g0 = xmalloc(n, sizeof *g0);
        const Adam *o = &all[a];
        fill(g0, (size_t)n, 0, 1);
        for (idx k = 0; k < n; k++) p[k] = (double)model.params[k];
        for (int t = 1; t <= 3; t++) {
            square = 0;
            for (idx k = 0; k < n; k++) {  // the second chunk never has a gradient
                model.grads[k] = k >= idle && k < end ? 0 : (float)t * g0[k];
                square += (double)model.grads[k] * (double)model.grads[k];
            }
            double factor = o->clip > 0 && o->clip < sqrt(square) ? o->clip / sqrt(square) : 1;
            double norm = adamw_step(&model, o, t);
            test_check(fabs(norm / sqrt(square) - 1) < 1e-6, "norm %.7f of gradients, not %.7f",
                       norm, sqrt(square));
            for (idx k = 0; k < n; k++) {
                double g = factor * (double)model.grads[k];
                m[k] = o->beta1 * m[k] + (1 - o->beta1) * g;
                v[k] = o->beta2 * v[k] + (1 - o->beta2) * g * g;
                double m_hat = m[k] / (1 - pow(o->beta1, t)), v_hat = v[k] / (1 - pow(o->beta2, t));
                p[k] = p[k] - o->lr * o->weight_decay * p[k] -
                       o->lr * m_hat / (sqrt(v_hat) + o->eps);
                worst = fmax(worst, fabs(p[k] - (double)model.params[k]));
            }
        }
        test_check(worst < 2e-6, "AdamW %d differs by %.1e from its definition", a, worst);
        memset(model.grads, 0, (size_t)n * sizeof *model.grads);
        model.grads[n - 1] = 3;  // what fills no lane
        model.grads[0] = 4;
        test_check(fabs(gradient_norm(&model) - 5) < 1e-9, "the norm of first and last");
        FREE_ALL(p, g0);
        model_free(&model);
    }
}

// ---- training commands, step by step: what ./moleblend must do with these options

typedef struct {
    double pair_spd, pair_edge, pair_3d, atom_2d, atom_3d, noise, all;
    double denoise, spd, edge, d3;                     // weights of losses
    double attention, activation, path, embedding;     // dropout
    double lr, beta1, beta2, eps, decay, clip, warmup, hold;
    double seed, batch, steps, readout, use, units, init;
} Settings;

#define BITES_SHAPE "--layers 2 --dim 24 --ffn 20 --heads 3 --kernels 12 "
static const Config BITES_CONFIG = {2, 24, 20, 3, 12, 0};
// The defaults, but for batch, steps and eps: with a small eps Adam enlarges rounding.
static const Settings PRETRAINING = {0.2, 0.2, 0.6, 0.4, 0.6, 0.2, 0, 6, 0.1, 0.1, 0.5,
                                     0.1, 0.1, 0.1, 0, 3e-4, 0.9, 0.98, 1e-3, 0, 5, -1, 0.9,
                                     1, 25, 3, 0, 0, 0, 0};
static const Settings TUNING = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                0.1, 0.1, 0.1, 0, 2e-4, 0.9, 0.999, 1e-3, 0, 5, -1, 0,
                                1, 16, 3, READ_MEAN, USE_SPD | USE_EDGE, 0, 0};

// The number that follows the k-th `word` of a text; NaN if there is none.
static double number_after(const char *text, const char *word, int k) {
    for (; text && k >= 0; k--) {
        text = strstr(text, word);
        if (text) text += strlen(word);
    }
    return text ? strtod(text, NULL) : (double)NAN;
}

// The line of `text` that begins with this, or "".
static const char *line_with(const char *text, const char *begin) {
    for (const char *at = text; (at = strstr(at, begin)); at++)
        if (at == text || at[-1] == '\n') return at;
    return "";
}

static int is_near(double a, double b, double tolerance) {
    return fabs(a - b) <= tolerance * fmax(fabs(b), 1e-6) || (isnan(a) && isnan(b));
}

// Writes n molecules, from number `first` on, with two tasks: of unlike units, with labels that are
// missing; or of classes.
static void write_bites(const char *path, int first, int n, int classes) {
    static char big[] = "big", small[] = "small";
    Molecule *all = xmalloc((size_t)n, sizeof *all), *m = all;
    for (int i = first; i < first + n; i++, m++) {
        random_molecule(m, 1 + i * 5 % 17, 1, i % 7 != 3, 900 + (uint32_t)i);
        float x = test_number(5000 + (size_t)i), y = test_number(7000 + (size_t)i);
        m->labels[0] = classes ? x > 0.3f : 300 + 1000 * x + 20 * (float)m->n_atoms;
        m->labels[1] = i % 5 == 1 ? NAN : classes ? y > 0 : 0.01f * y;
    }
    write_molecules(path, all, n, 2, (char *[]){big, small});
}

// One update with these settings, number `step` of `steps`; task: of fine-tuning, else NULL.
static void plain_update(double log[LOSSES + 2], Step *s, const Task *task, const Dataset *data,
                         const Settings *o, int64_t step, int64_t steps) {
    uint32_t *ids = xmalloc((size_t)o->batch, sizeof *ids);
    Blend blend = {o->pair_spd, o->pair_edge, o->pair_3d, o->atom_2d, o->atom_3d, o->noise,
                   o->all > 0};
    Adam adam = {0, o->beta1, o->beta2, o->eps, o->decay, o->clip};
    int64_t warmup = o->warmup < 0 ? steps / (task ? 10 : 12) + 1 : (int64_t)o->warmup;
    Parts parts = {.pass = {.data = data, .ids = ids, .n = (idx)o->batch,
                            .blend = task ? NULL : &blend, .use = (int)o->use,
                            .draws = {(uint64_t)o->seed, (uint32_t)step, 0, 1}}};
    plain_ids(ids, step, (int64_t)o->batch, (uint64_t)o->seed, data->count);
    adam.lr = log[LOSSES] = learning_rate(o->lr, step, warmup, steps, o->hold);
    s->drop = (Dropout){o->attention, o->activation, o->path, o->embedding};
    s->weights = (LossWeights){{0, o->denoise, o->spd, o->edge, o->d3}};
    for (parts_begin(&parts, s); parts_next(&parts, s); parts_add(&parts, s))
        if (task) task_gradients(parts.loss, s, task);
        else gradients(parts.loss, s);
    parts_end(log, &parts, s);
    log[LOSSES + 1] = adamw_step(&s->model, &adam, step + 1);
    free(ids);
}

// How far the parameters of a checkpoint are from those of s, in parts of what training has moved
// them from `start`; NaN if there is none. Biases of keys have no gradient but rounding.
static double moved_apart(const Step *s, const float *start, const char *path) {
    TensorFile f;
    double apart = 0, moved = 0;
    if (access(path, F_OK) != 0) return (double)NAN;
    tensor_file_open(&f, path);
    float *arena = xmalloc(s->model.count, sizeof *arena);
    model_load(&s->model, arena, &f, "");
    for (int i = 0; i < s->model.n_tensors; i++) {
        const TensorInfo *t = &s->model.info[i];
        for (size_t k = t->offset; k < t->offset + t->count; k++) {
            if (strstr(t->name, "k_proj.bias")) break;
            double x = (double)s->model.params[k];
            apart += pow(x - (double)arena[k], 2);
            moved += pow(x - (double)start[k], 2);
        }
    }
    free(arena);
    tensor_file_close(&f);
    return sqrt(apart / moved);
}

// Whether two checkpoints have the same tensors to the last bit.
static int same_tensors(const char *one, const char *other) {
    TensorFile a, b;
    tensor_file_open(&a, one);
    tensor_file_open(&b, other);
    int same = a.count == b.count;
    for (int k = 0; k < a.count && same; k++)
        same = a.entries[k].count == b.entries[k].count &&
               memcmp(a.entries[k].data, b.entries[k].data, 4 * a.entries[k].count) == 0;
    tensor_file_close(&a);
    tensor_file_close(&b);
    return same;
}

// An option of pretraining that has no effect, or another one's; a default that has changed.
static void test_options(void) {
#define OPTION(text, field, value) {text, offsetof(Settings, field), value}
    static const struct { const char *args; size_t field; double value; } rows[] = {
        OPTION("", lr, 3e-4), OPTION("--pair-spd 0.9", pair_spd, 0.9),
        OPTION("--pair-edge 0.9", pair_edge, 0.9), OPTION("--pair-3d 0.1", pair_3d, 0.1),
        OPTION("--atom-2d 0.9", atom_2d, 0.9), OPTION("--atom-3d 0.1", atom_3d, 0.1),
        OPTION("--no-blend", all, 1), OPTION("--noise 0.7", noise, 0.7),
        OPTION("--weight-denoise 1", denoise, 1), OPTION("--weight-spd 3", spd, 3),
        OPTION("--weight-edge 3", edge, 3), OPTION("--weight-3d 3", d3, 3),
        OPTION("--attention-dropout 0.5", attention, 0.5),
        OPTION("--activation-dropout 0.5", activation, 0.5),
        OPTION("--path-dropout 0.6", path, 0.6),
        OPTION("--embedding-dropout 0.3", embedding, 0.3), OPTION("--lr 0.01", lr, 0.01),
        OPTION("--beta1 0.5", beta1, 0.5), OPTION("--beta2 0.5", beta2, 0.5),
        OPTION("--eps 0.1", eps, 0.1), OPTION("--weight-decay 5", decay, 5),
        OPTION("--clip 0.1", clip, 0.1), OPTION("--warmup 3", warmup, 3),
        OPTION("--hold 0", hold, 0),
        OPTION("--batch-size 9", batch, 9), OPTION("--micro-batch 7", lr, 3e-4),
        OPTION("--seed 5", seed, 5)};
    enum { ROWS = sizeof rows / sizeof *rows, OUT = LOSSES + 2 };
    Dataset data;
    double base[3 * OUT];
    float *base_params = NULL, *start = NULL;
    write_bites("build/bites.bin", 0, 40, 0);
    dataset_open(&data, "build/bites.bin");
    for (int r = 0; r < ROWS; r++) {
        Settings o = PRETRAINING;
        memcpy((char *)&o + rows[r].field, &rows[r].value, sizeof(double));
        Step s = {0};
        double log[3 * OUT], differs = 0, worst = 0;
        model_create(&s.model, BITES_CONFIG, 1);
        if (r == 0 || o.seed > 1) {
            model_init(&s.model, (uint64_t)o.seed);
            start = xrealloc(start, s.model.count, sizeof *start);
            memcpy(start, s.model.params, sizeof *start * s.model.count);
        }
        memcpy(s.model.params, start, sizeof *start * s.model.count);
        if (r == 0) {
            float *const arenas[ARENAS] = {start};
            model_write("build/bites_start.safetensors", &s.model, arenas, NULL, 0,
                        "\"a\":\"b\"");
        }
        for (int step = 0; step < 3; step++)
            plain_update(log + step * OUT, &s, NULL, &data, &o, step, 3);
        if (r == 0) {
            memcpy(base, log, sizeof base);
            base_params = xmalloc(s.model.count, sizeof *base_params);
            memcpy(base_params, s.model.params, sizeof *base_params * s.model.count);
        }
        double apart = 0, moved = 0;
        for (idx k = 0; k < s.model.count; k++) {
            apart += pow((double)(s.model.params[k] - base_params[k]), 2);
            moved += pow((double)(s.model.params[k] - start[k]), 2);
        }
        differs = sqrt(apart / moved);
        char *line = xprintf("./moleblend build/bites.bin " BITES_SHAPE "--steps 3 --batch-size 25 "
                             "--eps 1e-3 %s %s -o build/bites.safetensors", rows[r].args,
                             r == 0 || o.seed > 1 ? "" : "--init build/bites_start.safetensors");
        remove("build/bites.safetensors");
        test_command(line, 0, "by chance");
        char *csv = file_text("build/bites.log.csv", NULL);
        for (int k = 0; k < 3 * OUT; k++) {
            double found = csv_number(csv, 1 + k / OUT, 1 + k % OUT);
            if (!is_near(found, log[k], 2e-5))
                worst = isnan(found) ? 1e9 : fmax(worst, fabs(found / log[k] - 1));
            differs = fmax(differs, fabs(log[k] / base[k] - 1));
        }
        double params = moved_apart(&s, start, "build/bites.safetensors");
        test_check(worst <= 0 && params < 2e-3, "%s: the log differs by %.1e, the parameters by "
                   "%.1e",
                   line, worst, params);
        test_check(differs > 1e-2 || r == 0 || r == ROWS - 2,
                   "%s: this test would not notice (%.1e)",
                   line, differs);
        if (r == 0) test_command("cp build/bites.safetensors build/bites_whole.safetensors", 0, "");
        // sums of parts round otherwise
        int traceless = same_tensors("build/bites.safetensors", "build/bites_whole.safetensors");
        test_check(r == 0 || !traceless, "%s: changes no bit of a parameter", line);
        FREE_ALL(line, csv);
        step_close(&s);
    }
    FREE_ALL(base_params, start);
    dataset_close(&data);
    // memory is that of a part; the rate rises, stays and falls
    char *line = xprintf("./moleblend build/bites.bin " BITES_SHAPE "--dim 96 --batch-size 40 "
                         "--steps 1 -o build/bites.safetensors ");
    char *part = xprintf("%s --micro-batch 2", line);
    double memory[2];
    for (int k = 0; k < 2; k++) {
        test_command(k ? part : line, 0, "MiB activations");
        char *text = file_text("build/test.out", NULL);
        memory[k] = number_after(text, "moments, ", 0);
        free(text);
    }
    test_check(memory[1] < 0.2 * memory[0], "%.0f MiB of activations in parts, %.0f without",
               memory[1], memory[0]);
    FREE_ALL(line, part);
    test_command("./moleblend build/bites.bin" TINY "--batch-size 4 --steps 60 -o "
                 "build/bites.safetensors", 0, "by chance");
    char *csv = file_text("build/bites.log.csv", NULL);
    int wrong = 0;
    for (int step = 0; step < 60; step++) {  // six steps up, 90 % of the rest at the peak
        double done = (step - 6) / 54.0, rate = csv_number(csv, 1 + step, 6);
        double expected = step < 6 ? (step + 1) / 6.0 : done < 0.9 ? 1
                          : (1 + cos(acos(-1.0) * (done - 0.9) / 0.1)) / 2;
        wrong += !is_near(rate, 3e-4 * expected, 1e-4);
    }
    test_check(wrong == 0, "%d of 60 learning rates by default", wrong);
    free(csv);
}

static double log_odds(double p) { return log(p) - log(1 - p); }

// Predictions (n, 2) of the model in s for a dataset, as logits or in the labels' units; labels
// too.
static void plain_predict(float *out, float *labels, Step *s, const Dataset *data,
                          const Task *task) {
    uint32_t *ids = xmalloc(data->count, sizeof *ids);
    Draws still = {1, UINT32_MAX, 0, 0};
    Molecule m = {0};
    for (size_t i = 0; i < data->count; i++) {
        ids[i] = (uint32_t)i;
        dataset_read(data, i, &m);
        memcpy(labels + 2 * i, m.labels, 2 * sizeof *labels);
    }
    s->draws = still;
    batch_load(&s->batch, data, ids, (idx)data->count, NULL, task->use, &still);
    encoder_forward(s);
    task_head_forward(s, task->readout);
    memcpy(out, s->task_arrays->logits, 2 * data->count * sizeof *out);
    for (size_t k = 0; k < 2 * data->count && task->kind == TASK_REGRESSION; k++)
        out[k] = out[k] * task->std[k % 2] + task->mean[k % 2];
    molecule_free(&m);
    free(ids);
}

// RMSE and R2, or ROC-AUC, of task y by their definitions.
static void plain_metrics(double *rmse, double *r2, double *auc, const float *out,
                          const float *labels, size_t n, size_t y) {
    double count = 0, mean = 0, square = 0, spread = 0, pairs = 0, right = 0;
    for (size_t i = 0; i < n; i++) {
        double label = (double)labels[2 * i + y];
        if (isnan(label)) continue;
        count++;
        mean += label;
    }
    mean /= count;
    for (size_t i = 0; i < n; i++) {
        double label = (double)labels[2 * i + y], x = (double)out[2 * i + y];
        if (isnan(label)) continue;
        square += (x - label) * (x - label);
        spread += (label - mean) * (label - mean);
        for (size_t j = 0; j < n; j++) {
            if (!(labels[2 * j + y] < labels[2 * i + y])) continue;
            pairs++;
            right += (double)out[2 * j + y] < x ? 1 : (double)out[2 * j + y] > x ? 0 : 0.5;
        }
    }
    *rmse = sqrt(square / count);
    *r2 = 1 - square / spread;
    *auc = right / pairs;
}

// A fine-tuned model, what became of it, and what chance would be.
typedef struct {
    double loss[8], valid[8], r2, auc, chance_r2, brier;
    int epochs, best;
    float mean[2], std[2], out[128], labels[128];  // of the test set by the best epoch
    float *params, *start;                         // the best; before training
    float scale;                                   // see calibration()
    Step s;
} Tuned;

// ./moleblend finetune build/bites_TRAIN --valid build/bites_VALID --test build/bites_TEST.
static void plain_tuning(Tuned *t, const Settings *o, int classes, Dataset data[3]) {
    double known[2][3] = {{0}}, log[64][LOSSES + 2];
    size_t n = data[0].count;
    int64_t steps = ((int64_t)(o->steps * (double)n) + (int64_t)o->batch - 1) / (int64_t)o->batch;
    Config c = BITES_CONFIG;
    Molecule m = {0};
    Task task = {.kind = classes ? TASK_CLASSIFICATION : TASK_REGRESSION,
                 .readout = (Readout)o->readout, .use = (int)o->use, .mean = t->mean, .std = t->std,
                 .label_units = o->units > 0};
    *t = (Tuned){.best = 1};
    for (size_t i = 0; i < n; i++) {
        dataset_read(&data[0], i, &m);
        for (int y = 0; y < 2; y++)
            for (int power = 0; power < 3 && !isnan(m.labels[y]); power++)
                known[y][power] += pow((double)m.labels[y], power);
    }
    for (int y = 0; y < 2; y++) {
        double mean = known[y][1] / known[y][0];
        t->mean[y] = classes ? 0 : (float)mean;
        t->std[y] = classes ? 1 : (float)sqrt(known[y][2] / known[y][0] - mean * mean);
        known[y][1] = log_odds(mean);
    }
    c.tasks = 2;
    model_create(&t->s.model, c, 1);
    t->s.batch.Y = 2;
    model_init(&t->s.model, (uint64_t)o->seed);
    Model init;
    model_create(&init, c, 0);
    formula_params(&init);
    for (int k = 0; k < init.n_tensors && o->init > 0; k++)
        if (!strstr(init.info[k].name, "proj_out"))
            memcpy(t->s.model.params + init.info[k].offset, init.params + init.info[k].offset,
                   sizeof(float) * init.info[k].count);
    model_free(&init);
    for (int y = 0; y < 2 && classes && o->readout != READ_SUM; y++)
        t->s.model.p.head2_b[y] = (float)known[y][1];
    size_t bytes = sizeof(float) * t->s.model.count;
    t->params = xmalloc(bytes, 1);
    t->start = xmalloc(bytes, 1);
    memcpy(t->start, t->s.model.params, bytes);
    for (int64_t step = 0; step < steps; step++) {
        plain_update(log[step], &t->s, &task, &data[0], o, step, steps);
        int64_t seen = (step + 1) * (int64_t)o->batch, epoch = seen / (int64_t)n, first;
        if (epoch == step * (int64_t)o->batch / (int64_t)n) continue;
        first = (epoch - 1) * (int64_t)n / (int64_t)o->batch;
        double *loss = &t->loss[epoch], *valid = &t->valid[epoch], rmse, r2, auc;
        for (int64_t k = first; k <= step; k++)
            *loss += log[k][LOSS_TOTAL] / (double)(step + 1 - first);
        plain_predict(t->out, t->labels, &t->s, &data[1], &task);
        for (size_t y = 0; y < 2; y++) {
            plain_metrics(&rmse, &r2, &auc, t->out, t->labels, data[1].count, y);
            *valid += classes ? auc / 2 : rmse / (double)t->std[y] / 2;
        }
        t->epochs = (int)epoch;
        if (classes ? *valid > t->valid[t->best] : *valid < t->valid[t->best]) t->best = (int)epoch;
        if (t->best != epoch) continue;
        memcpy(t->params, t->s.model.params, bytes);
        t->scale = classes ? calibration(t->out, t->labels, 2 * data[1].count) : 1;
    }
    memcpy(t->s.model.params, t->params, bytes);
    plain_predict(t->out, t->labels, &t->s, &data[2], &task);
    float constant[128];
    for (size_t k = 0; k < 128; k++) constant[k] = t->mean[k % 2];
    for (size_t y = 0; y < 2; y++) {
        double rmse, r2, auc;
        plain_metrics(&rmse, &r2, &auc, t->out, t->labels, data[2].count, y);
        t->r2 += r2 / 2;
        t->auc += auc / 2;
        plain_metrics(&rmse, &r2, &auc, constant, t->labels, data[2].count, y);
        t->chance_r2 += r2 / 2;
    }
    molecule_free(&m);
}

#define BITES_TUNE "./moleblend finetune build/bites_%s0.bin --valid build/bites_%s1.bin --test " \
    "build/bites_%s2.bin "

// Writes and opens training, validation and test set.
static void bites_open(Dataset data[3], int classes) {
    static const char *const paths[2][3] = {
        {"build/bites_r0.bin", "build/bites_r1.bin", "build/bites_r2.bin"},
        {"build/bites_c0.bin", "build/bites_c1.bin", "build/bites_c2.bin"}};
    for (int k = 0; k < 3; k++) {
        write_bites(paths[classes][k], 40 * k, k ? 30 : 40, classes);
        dataset_open(&data[k], paths[classes][k]);
    }
}

// Fine-tuning by other labels, options, epochs or parameters than it says.
static void test_tuning_options(void) {
    static const struct { const char *args; int classes; size_t field; double value; } rows[] = {
        {"", 0, 0, 0}, {"", 1, 0, 0},
        {"--readout cls", 0, offsetof(Settings, readout), READ_CLS},
        {"--readout sum", 1, offsetof(Settings, readout), READ_SUM},
        {"--modality both", 0, offsetof(Settings, use), USE_SPD | USE_EDGE | USE_3D},
        {"--loss-units labels", 0, offsetof(Settings, units), 1},
        {"--lr 0.05", 0, offsetof(Settings, lr), 0.05},
        {"--lr 0.05", 1, offsetof(Settings, lr), 0.05},
        {"--beta1 0.5", 0, offsetof(Settings, beta1), 0.5},
        {"--beta2 0.5", 1, offsetof(Settings, beta2), 0.5},
        {"--weight-decay 9", 0, offsetof(Settings, decay), 9},
        {"--clip 0.01", 1, offsetof(Settings, clip), 0.01},
        {"--warmup 6", 0, offsetof(Settings, warmup), 6},
        {"--hold 1", 1, offsetof(Settings, hold), 1},
        {"--attention-dropout 0.6", 0, offsetof(Settings, attention), 0.6},
        {"--activation-dropout 0.6", 1, offsetof(Settings, activation), 0.6},
        {"--path-dropout 0.6", 0, offsetof(Settings, path), 0.6},
        {"--embedding-dropout 0.4", 1, offsetof(Settings, embedding), 0.4},
        {"--batch-size 40", 0, offsetof(Settings, batch), 40},
        {"--epochs 5", 1, offsetof(Settings, steps), 5},
        {"--micro-batch 3", 0, offsetof(Settings, lr), 2e-4},
        {"--init build/bites_init.safetensors", 1, offsetof(Settings, init), 1},
        {"--seed 4", 0, offsetof(Settings, seed), 4}};
    enum { ROWS = sizeof rows / sizeof *rows };
    Dataset data[2][3];
    Model init;
    int earlier = 0;
    for (int c = 0; c < 2; c++) bites_open(data[c], c);
    Config shape = BITES_CONFIG;
    shape.tasks = 2;
    model_create(&init, shape, 0);
    formula_params(&init);
    float *const arenas[ARENAS] = {init.params};
    model_write("build/bites_init.safetensors", &init, arenas, NULL, 0, "\"format\":\"pt\"");
    model_free(&init);
    for (int r = 0; r < ROWS; r++) {
        Settings o = TUNING;
        int classes = rows[r].classes, wrong = 0;
        const char *kind = classes ? "c" : "r";
        if (rows[r].args[0]) memcpy((char *)&o + rows[r].field, &rows[r].value, sizeof(double));
        Tuned t;
        plain_tuning(&t, &o, classes, data[classes]);
        char *line = xprintf(BITES_TUNE BITES_SHAPE "--batch-size 16 --epochs 3 --eps 1e-3 "
                             "--patience 0 "
                             "%s -o build/bites_t.safetensors", kind, kind, kind, rows[r].args);
        remove("build/bites_t.safetensors");
        test_command(line, 0, "by chance");
        char *text = file_text("build/test.out", NULL);
        char *csv = file_text("build/bites_t.log.csv", NULL);
        for (int e = 1; e <= t.epochs; e++)
            wrong += csv_number(csv, e, 1) != e ||
                     !is_near(csv_number(csv, e, 2), t.loss[e], 2e-5) ||
                     !is_near(csv_number(csv, e, 3), t.valid[e], 2e-5);
        double apart = moved_apart(&t.s, t.start, "build/bites_t.safetensors");
        test_check(wrong == 0 && isnan(csv_number(csv, t.epochs + 1, 1)),
                   "%s: %d of %d epochs are wrong:\n%s", line, wrong, t.epochs, csv);
        test_check(csv_number(csv, t.epochs, 4) == t.best && apart < 1e-2,
                   "%s: the best is epoch %d; its parameters differ by %.1e", line, t.best, apart);
        const char *best = strstr(text, ": best epoch"), *chance = strstr(text, "by chance (");
        best = best ? strstr(best, "test") : NULL;
        if (classes)
            test_check(is_near(number_after(best, "ROC-AUC ", 0), t.auc, 1e-5) &&
                       is_near(number_after(chance, "ROC-AUC ", 0), 0.5, 1e-6),
                       "%s: ROC-AUC is not %.6f in %s", line, t.auc, best ? best : text);
        else
            test_check(is_near(number_after(best, "R2 ", 0), t.r2, 2e-4) &&
                       is_near(number_after(chance, "R2 ", 0), t.chance_r2, 2e-4),
                       "%s: R2 is not %.6f, by chance %.6f in %s", line, t.r2, t.chance_r2,
                       best ? best : text);
        earlier += t.best < t.epochs;
        // what `predict` makes of the file: calibrated, in the labels' units
        if (r < 5 && MB_POSIX) {
            char *predict = xprintf("./moleblend predict build/bites_%s2.bin --interval 0 --model "
                                    "build/bites_t.safetensors | cut -d, -f 3,5", kind);
            test_command(predict, 0, "big,small");
            char *rows_text = file_text("build/test.out", NULL);
            const char *table = line_with(rows_text, "big,small");
            for (int k = wrong = 0; k < 60; k++) {
                double x = (double)t.out[k];
                if (classes) x = 1 / (1 + exp(-(double)t.scale * x));
                wrong += !is_near(csv_number(table, 1 + k / 2, k % 2), x, 1e-3);
            }
            test_check(wrong == 0, "%s: %d of 60 predictions differ:\n%s", line, wrong, table);
            FREE_ALL(predict, rows_text);
        }
        step_close(&t.s);
        FREE_ALL(t.params, t.start, line, text, csv);
    }
    test_check(earlier > 2, "the best epoch is not the last in %d rows", earlier);
    for (int k = 0; k < 6; k++) dataset_close(&data[k / 3][k % 3]);
}

// Seeds that are not runs of their own: shuffled, begun or moved as another; the wrong one kept.
static void test_seeds_alone(void) {
    if (!MB_POSIX) return;
    Dataset data[3];
    bites_open(data, 0);
    for (int k = 0; k < 3; k++) dataset_close(&data[k]);
    const char *tune = "./moleblend finetune build/bites_r0.bin --valid build/bites_r1.bin --test "
                       "build/bites_r2.bin " BITES_SHAPE "--batch-size 16 --epochs 2 --lr 0.003 ";
    const char *predict =
        "./moleblend predict build/bites_r2.bin --model build/bites_%s.safetensors "
                          "-o build/bites_%s.csv";
    test_format(0, "over 3 seeds",
                "rm -f build/bites_s*; %s --seed 3 --seeds 3 -o build/bites_s.safetensors", tune);
    char *text = file_text("build/test.out", NULL);
    char *csv = file_text("build/bites_s.log.csv", NULL);
    double r2[3], best[3] = {1e9, 1e9, 1e9}, mean = 0, square = 0;
    for (int k = 0; k < 3; k++) {
        char *begin = xprintf("seed %d: ", 3 + k);
        r2[k] = number_after(line_with(text, begin), "R2 ", 0);
        mean += r2[k] / 3;
        free(begin);
        for (int row = 1; row <= 6; row++)
            if (csv_number(csv, row, 0) == 3 + k) best[k] = fmin(best[k], csv_number(csv, row, 3));
    }
    for (int k = 0; k < 3; k++) square += (r2[k] - mean) * (r2[k] - mean);
    const char *all = line_with(text, "test R2: ");
    test_check(fabs(number_after(all, "R2: ", 0) - mean) < 1e-4 &&
               fabs(number_after(all, "+- ", 0) - sqrt(square / 2)) < 1e-4,
               "mean and deviation of a sample are %.4f, %.4f: %.60s", mean, sqrt(square / 2), all);
    int chosen = best[1] < best[0] ? 1 : 0;
    chosen = best[2] < best[chosen] ? 2 : chosen;
    test_check(chosen < 2, "the best seed must not be the last here: %g %g %g", best[0], best[1],
               best[2]);
    free(text), free(csv);
    static const char *const models[] = {"s", "s.seed3", "s.seed4", "s.seed5", "a4", "a5"};
    for (int k = 0; k < 2; k++) {  // the second and third seed by themselves
        test_format(0, "wrote", "%s --seed %d -o build/bites_a%d.safetensors", tune, 4 + k, 4 + k);
    }
    for (int k = 0; k < 6; k++) {
        test_format(0, "R2", predict, models[k], models[k]);
    }
    test_check(same_files("build/bites_s.seed4.csv", "build/bites_a4.csv") &&
               same_files("build/bites_s.seed5.csv", "build/bites_a5.csv"),
               "a seed after others is that seed alone");
    for (int k = 0; k < 3; k++) {
        char *line = xprintf("build/bites_%s.csv", models[1 + k]);
        test_check(same_files("build/bites_s.csv", line) == (k == chosen),
                   "-o holds the best seed, %d: %s", 3 + chosen, line);
        free(line);
    }
    // epochs that end with a batch: the second seed has a permutation of its own
    test_command("./moleblend finetune build/bites_r0.bin --valid build/bites_r1.bin " BITES_SHAPE
                 "--batch-size 8 --epochs 1 --seed 3 --seeds 2 -o build/bites_s1.safetensors && "
                 "./moleblend finetune build/bites_r0.bin --valid build/bites_r1.bin " BITES_SHAPE
                 "--batch-size 8 --epochs 1 --seed 4 -o build/bites_s2.safetensors", 0, "wrote");
    for (int k = 0; k < 2; k++) {
        test_format(0, "R2", predict, k ? "s1.seed4" : "s2", k ? "s1.seed4" : "s2");
    }
    test_check(same_files("build/bites_s1.seed4.csv", "build/bites_s2.csv"),
               "a seed after another of whole batches is that seed alone");
    // resumed with another validation set: refused
    test_format(1, "valid", "%s --epochs 3 --resume -o build/bites_a4.safetensors --valid "
                "build/bites_r2.bin", tune);
}

// Early stopping that never or always stops, or that takes an equal epoch for a better one.
static void test_stopping(void) {
    static const struct { const char *args; int rows; } runs[] = {
        {"", 16}, {"--patience 3", 4}, {"--patience 0 --epochs 22", 22}, {"--patience 1", 2}};
    if (MB_POSIX) {  // of two tasks the validation set judges one: its metric is not halved
        test_command("printf 'smiles,a,b\nC,0,1\nCC,1,0\nCCC,0,1\n' | ./data_prep --format csv "
                     "--labels a,b -o build/bites_j0.bin - && "
                     "printf 'smiles,a,b\nC,0,1\nCC,1,1\nCCC,1,1\n' | "
                     "./data_prep --format csv --labels a,b -o build/bites_j1.bin - && ./moleblend "
                     "finetune build/bites_j0.bin --valid build/bites_j1.bin" TINY
                     "--epochs 1 -o build/bites_j.safetensors", 0, "best epoch 1");
        char *text = file_text("build/test.out", NULL);
        const char *end = line_with(text, "seed 1: ");
        test_check(is_near(number_after(end, "valid ", 0), number_after(end, "ROC-AUC ", 0), 1e-3),
                   "a task without a metric counts: %.90s", end);
        free(text);
    }
    write_bites("build/bites_r0.bin", 0, 40, 0);
    for (int k = 0; k < 4; k++) {  // at a rate of 0 no epoch is better than the first
        char *line = xprintf("./moleblend finetune build/bites_r0.bin --valid build/bites_r0.bin"
                             TINY "--lr 0 %s -o build/bites_e.safetensors", runs[k].args);
        test_command(line, 0, "best epoch 1");
        char *csv = file_text("build/bites_e.log.csv", NULL);
        test_check(csv_number(csv, runs[k].rows, 1) == runs[k].rows &&
                   isnan(csv_number(csv, runs[k].rows + 1, 1)) &&
                   csv_number(csv, runs[k].rows, 4) == 1, "%s: expected %d epochs:\n%s", line,
                   runs[k].rows, csv);
        FREE_ALL(line, csv);
    }
}

// ---- what a model says of molecules

// The array of a .npy file of 4-byte elements, `rows` by `columns`, behind its header of 128 bytes;
// NULL if it has another size.
static const uint8_t *npy_array(char *bytes, size_t size, size_t rows, size_t columns) {
    return size == 128 + 4 * rows * columns ? (uint8_t *)bytes + 128 : NULL;
}

// Vectors of another layer, token, molecule or relation than was asked for; layers out of order.
static void test_embedding_rows(void) {
    static const struct { const char *args; int n, layers[3], readout, use; } runs[] = {
        {"", 1, {2}, READ_MEAN, USE_SPD | USE_EDGE},
        {"--layer 0 --readout mean --modality both", 1, {0}, READ_MEAN,
         USE_SPD | USE_EDGE | USE_3D},
        {"--layer 1 --readout sum", 1, {1}, READ_SUM, USE_SPD | USE_EDGE},
        {"--layer -1 --readout cls --modality both", 1, {2}, READ_CLS, USE_SPD | USE_EDGE | USE_3D},
        {"--layer 1 --level atom", 1, {1}, -1, USE_SPD | USE_EDGE},
        {"--level atom --modality both", 1, {2}, -1, USE_SPD | USE_EDGE | USE_3D},
        {"--level molecule", 1, {2}, READ_MEAN, USE_SPD | USE_EDGE},
        {"--layer all", 3, {0, 1, 2}, READ_MEAN, USE_SPD | USE_EDGE},
        {"--layer -1,0 --readout sum --modality both", 2, {2, 0}, READ_SUM,
         USE_SPD | USE_EDGE | USE_3D},
        {"--layer 1,2 --readout cls", 2, {1, 2}, READ_CLS, USE_SPD | USE_EDGE},
        {"--layer 2,0,1 --level atom", 3, {2, 0, 1}, -1, USE_SPD | USE_EDGE}};
    Dataset data;
    Step s = {0};
    size_t C = 24, size;
    write_bites("build/bites.bin", 0, 40, 0);
    dataset_open(&data, "build/bites.bin");
    model_create(&s.model, BITES_CONFIG, 1);
    formula_params(&s.model);
    float *const arenas[ARENAS] = {s.model.params};
    model_write("build/bites_m.safetensors", &s.model, arenas, NULL, 0, "\"format\":\"pt\"");
    uint32_t ids[40];
    for (uint32_t i = 0; i < 40; i++) ids[i] = i;
    for (size_t r = 0; r < sizeof runs / sizeof *runs; r++) {
        batch_load(&s.batch, &data, ids, 40, NULL, runs[r].use, &s.draws);
        encoder_forward(&s);
        size_t n = (size_t)runs[r].n, W = n * C;
        size_t rows = runs[r].readout < 0 ? (size_t)s.batch.A : 40, row = 0;
        float *plain = xmalloc(rows * W, sizeof *plain), *found = xmalloc(rows * W, sizeof *found);
        int index_wrong = 0, names_wrong = 0;
        char *line = xprintf("./moleblend embed build/bites.bin --model build/bites_m.safetensors "
                             "--batch-size 7 %s -o build/bites_e.npy", runs[r].args);
        test_command(line, 0, "");
        char *bytes = file_text("build/bites_e.npy", &size);
        const uint8_t *array = npy_array(bytes, size, rows, W);
        for (size_t k = 0; array && k < rows * W; k++) found[k] = get_f32(array + 4 * k);
        char *index = file_text("build/bites_e.index.npy", &size), *names;
        const uint8_t *owner = npy_array(index, size, rows, 1);
        names = file_text("build/bites_e.csv", &size);
        Text heading = {0};
        text_add(&heading, "row,rows,record,name");
        for (size_t k = 0; k < n && n > 1; k++) text_add(&heading, ",layer %d", runs[r].layers[k]);
        text_add(&heading, "\n");
        names_wrong += strncmp(names, heading.text, strlen(heading.text)) != 0;
        for (size_t b = 0; b < 40; b++) {
            View v = batch_view(&s.batch, (idx)b);
            size_t first = (size_t)v.token, N = (size_t)v.N, count = runs[r].readout < 0 ? N : 1;
            names_wrong += csv_number(names, (int)b + 1, 0) != (double)row ||
                           csv_number(names, (int)b + 1, 1) != (double)count ||
                           csv_number(names, (int)b + 1, 2) != (double)(b + 1);
            for (size_t k = 0; k < n && n > 1; k++)
                names_wrong += csv_number(names, (int)b + 1, 4 + (int)k) != (double)(k * C);
            for (size_t i = 0; i < count; i++, row++) {
                index_wrong += runs[r].readout < 0 && (!owner || get_u32(owner + 4 * row) != b);
                for (size_t c = 0; c < W; c++) {
                    const float *x = s.enc->x + (idx)runs[r].layers[c / C] * s.batch.T * (idx)C;
                    double sum = 0;
                    for (size_t j = 0; j < N; j++) sum += (double)x[(first + 1 + j) * C + c % C];
                    if (runs[r].readout == READ_CLS) sum = (double)x[first * C + c % C];
                    if (runs[r].readout == READ_MEAN) sum /= (double)N;
                    if (runs[r].readout < 0) sum = (double)x[(first + 1 + i) * C + c % C];
                    plain[row * W + c] = (float)sum;
                }
            }
        }
        test_close(found, plain, rows * W, 1e-5, line);
        test_check(index_wrong == 0 && names_wrong == 0,
                   "%s: %d atoms of another molecule, %d molecules begin elsewhere", line,
                   index_wrong, names_wrong);
        FREE_ALL(plain, found, line, bytes, index, names, heading.text);
    }
    step_close(&s);
    dataset_close(&data);
}

// An ensemble's mean, deviation or label of another task, molecule or model; probabilities that
// are not calibrated.
static void test_ensembles(void) {
    static char names[4][8] = {"other", "small", "extra", "big"};
    static const float scales[3] = {1.7f, 0.4f, 1};
    Dataset data;
    Molecule *all = xmalloc(30, sizeof *all), *m = all;
    for (int i = 0; i < 30; i++, m++) {
        random_molecule(m, 1 + i * 5 % 17, 1, 1, 700 + (uint32_t)i);
        molecule_resize(m, m->n_atoms, m->n_bonds, 4, m->name_length);
        for (int y = 0; y < 4; y++)
            m->labels[y] = i % 9 == 2 * y ? NAN : test_number((size_t)(10 * i + y)) > 0;
    }
    write_molecules("build/bites_p.bin", all, 30, 4,  // in another order, with others between
                    (char *[]){names[0], names[1], names[2], names[3]});
    dataset_open(&data, "build/bites_p.bin");
    for (int classes = 0; classes < 2; classes++) {
        double p[3][60], labels[60];
        float out[60], truth[120];
        Config c = BITES_CONFIG;
        c.tasks = 2;  // "big", "small"
        for (int k = 0; k < 3; k++) {
            Step s = {0};
            static const float mean[2] = {3, -1}, std[2] = {20, 0.5f};
            Task task = {.kind = classes ? TASK_CLASSIFICATION : TASK_REGRESSION,
                         .readout = READ_SUM, .use = USE_SPD | USE_EDGE, .mean = mean, .std = std};
            model_create(&s.model, c, 1);
            s.batch.Y = 4;
            formula_params(&s.model);
            for (idx i = 0; i < s.model.count; i++)
                s.model.params[i] += 0.05f * test_number((size_t)(i + 17 * k));
            char *meta = xprintf("\"task\":\"%s\",\"readout\":\"sum\",\"modality\":\"2d\","
                                 "\"task_names\":\"big\\nsmall\",\"label_mean\":\"3 -1\","
                                 "\"label_std\":\"20 0.5\",\"logit_scale\":\"%g\"",
                                 classes ? "classification" : "regression", (double)scales[k]);
            char *path = xprintf("build/bites_p%d.safetensors", k);
            float *const arenas[ARENAS] = {s.model.params};
            model_write(path, &s.model, arenas, NULL, 0, meta);
            uint32_t ids[30];
            for (uint32_t i = 0; i < 30; i++) ids[i] = i;
            batch_load(&s.batch, &data, ids, 30, NULL, task.use, &s.draws);
            encoder_forward(&s);
            task_head_forward(&s, READ_SUM);
            memcpy(out, s.task_arrays->logits, sizeof out);
            memcpy(truth, s.batch.labels, sizeof truth);
            for (int i = 0; i < 60; i++) {
                double x = (double)out[i];
                p[k][i] = classes ? 1 / (1 + exp(-(double)scales[k] * x))
                                  : x * (double)std[i % 2] + (double)mean[i % 2];
            }
            step_close(&s);
            free(meta), free(path);
        }
        for (int i = 0; i < 60; i++)
            labels[i] = (double)truth[4 * (i / 2) + (i % 2 ? 1 : 3)];
        for (int models = 1; models <= 3; models += 2) {
            char *line = xprintf("./moleblend predict build/bites_p.bin --batch-size 7 --model "
                                 "build/bites_p0.safetensors %s -o build/bites_p.csv", models == 1
                                 ? "" : "build/bites_p1.safetensors build/bites_p2.safetensors");
            test_command(line, 0, classes ? "ROC-AUC" : "RMSE");
            char *csv = file_text("build/bites_p.csv", NULL);
            const char *header = models == 1
                               ? "record,name,big,big label,small,small label,skipped\n"
                                 : "record,name,big,big deviation,big label,small,small deviation,"
                                   "small label,skipped\n";
            int wrong = strncmp(csv, header, strlen(header)) != 0;
            for (int i = 0; i < 60; i++) {
                double mean = 0, square = 0;
                int at = 2 + (i % 2) * (models == 1 ? 2 : 3), row = 1 + i / 2;
                for (int k = 0; k < models; k++) mean += p[k][i] / models;
                for (int k = 0; k < models; k++) square += (p[k][i] - mean) * (p[k][i] - mean);
                wrong += !is_near(csv_number(csv, row, at), mean, 1e-4);
                if (models > 1)
                    wrong += !is_near(csv_number(csv, row, ++at), sqrt(square / 2), 2e-2);
                double label = csv_number(csv, row, at + 1);
                wrong += isnan(labels[i]) ? !isnan(label) : label != labels[i];
            }
            test_check(wrong == 0, "%s: %d wrong numbers:\n%s", line, wrong, csv);
            FREE_ALL(line, csv);
        }
    }
    dataset_close(&data);
}

// ---- what pretraining reports

// Losses of other molecules or steps than the table says; chance that knows too much.
static void test_pretraining_report(void) {
    Dataset data[2];
    Molecule m = {0};
    Step s = {0};
    double sum[LOSSES], plain[LOSSES], classes[2][6][24] = {{{0}}};
    double chance[LOSSES] = {0, 1, 0, 0, 1};
    write_bites("build/bites.bin", 0, 40, 0);
    write_bites("build/bites_v.bin", 50, 23, 0);
    dataset_open(&data[0], "build/bites.bin");
    dataset_open(&data[1], "build/bites_v.bin");
    test_command("./moleblend build/bites.bin --valid build/bites_v.bin " BITES_SHAPE
                 "--batch-size 9 --steps 60 -o build/bites.safetensors", 0, "by chance");
    char *text = file_text("build/test.out", NULL);
    char *csv = file_text("build/bites.log.csv", NULL);
    model_create(&s.model, BITES_CONFIG, 1);
    TensorFile f;
    tensor_file_open(&f, "build/bites.safetensors");
    model_load(&s.model, s.model.params, &f, "");
    tensor_file_close(&f);
    s.weights = (LossWeights){{0, 6, 0.1, 0.1, 0.5}};
    s.draws = (Draws){1, UINT32_MAX, 0, 0};  // as if all were one batch, without dropout
    uint32_t ids[40];
    for (uint32_t i = 0; i < 40; i++) ids[i] = i;
    for (int d = 0; d < 2; d++) {
        batch_load(&s.batch, &data[d], ids, (idx)data[d].count, &TEST_BLEND, 0, &s.draws);
        for (idx p = 0; p < s.batch.P; p++) {
            if (s.batch.spd_target[p] >= 0) classes[d][0][s.batch.spd_target[p]]++;
            for (idx e = 0; e < 5; e++)
                if (s.batch.edge_target[5 * p + e] >= 0)
                    classes[d][1 + e][s.batch.edge_target[5 * p + e]]++;
        }
    }
    encoder_forward(&s);
    pretrain_heads(sum, &s, 0);
    loss_means(plain, sum, s.batch.count, &s.weights);
    double seen[LOSSES] = {0};
    for (int group = 0; group < 6; group++) {
        int n = group ? 24 : 11, loss = group ? LOSS_EDGE : LOSS_SPD;
        double known = n;  // each class once more than it was seen
        for (int k = 0; k < n; k++) known += classes[0][group][k];
        for (int k = 0; k < n; k++) {
            chance[loss] -= classes[1][group][k] * log((classes[0][group][k] + 1) / known);
            seen[loss] += classes[1][group][k];
        }
    }
    for (int k = 1; k < LOSSES; k++) {
        if (seen[k] > 0) chance[k] /= seen[k];
        chance[LOSS_TOTAL] += s.weights.weight[k] * chance[k];
    }
    const char *table = line_with(text, "loss        start     end   valid  by chance");
    for (int k = 0; k < LOSSES; k++) {
        double number[4], start = csv_number(csv, 1, 1 + k);
        double end = (csv_number(csv, 59, 1 + k) + csv_number(csv, 60, 1 + k)) / 2;
        const char *row = line_with(table, LOSS_NAMES[k]);
        int n = sscanf(row, "%*s %lf %lf %lf %lf", &number[0], &number[1], &number[2], &number[3]);
        test_check(n == 4 && fabs(number[0] - start) < 1e-4 && fabs(number[1] - end) < 1e-4 &&
                   fabs(number[2] - plain[k]) < 1.5e-4 && fabs(number[3] - chance[k]) < 1e-4,
                   "%s: expected %.4f %.4f %.4f %.4f: %.60s", LOSS_NAMES[k], start, end, plain[k],
                   chance[k], row);
    }
    molecule_free(&m);
    FREE_ALL(text, csv);
    step_close(&s);
    for (int d = 0; d < 2; d++) dataset_close(&data[d]);
}

// ---- machinery

#if MB_POSIX  // where the clocks can be faked
static double fake_rate;  // CPUs that a faked process gets

// 25 steps that fake the clock, a second each; returns the threads after the last of them.
static int fake_steps(int n) {
    for (int k = 0; k < n; k++) {
        fake_wall += 1;
        fake_cpu += fake_rate;
        threads_adapt();
    }
    return omp_get_max_threads();
}

// Threads that are given up too early, too many of them, or never tried again.
static void adapt_apart(void *argument) {
    (void)argument;
    mb_threads = 4;
    mb_adapting = 1;
    omp_set_num_threads(4);
    fake_wall = 1000;
    fake_cpu = 10;
    fake_rate = 2.5;  // 0.6 CPUs a thread and more is enough
    int fine = fake_steps(5);
    fake_rate = 2.3;
    int once = fake_steps(1), twice = fake_steps(1);
    fake_rate = 2;
    int resting = fake_steps(24), again = fake_steps(1), down = fake_steps(1);
    fake_rate = 0.3;
    fake_steps(25);  // all are tried, and one such step is enough now
    int least = fake_steps(1);
    fake_wall += 0.001;  // too short to tell
    threads_adapt();
    CHECK(fine == 4 && once == 4 && twice == 2 && resting == 2 && again == 4 && down == 2 &&
          least == 1, "threads: %d %d %d %d %d %d %d", fine, once, twice, resting, again, down,
          least);
    mb_adapting = 0;
    fake_steps(60);
    CHECK(omp_get_max_threads() == 1, "threads change though they may not");
    DIE("all is well");
}
#endif

static void test_adapting(void) {
#if MB_POSIX && defined(_OPENMP)
    test_apart(adapt_apart, NULL, "all is well");
#endif
}

// What print_reliability() says.
static void reliability_apart(void *argument) {
    (void)argument;
    const float p[] = {0, 0.18f, 0.2f, 0.5f, 0.61f, 0.79f, 0.8f, 1, 0.9f, 0.3f};
    const float y[] = {0, 1, 0, 1, 1, 0, 1, 1, NAN, NAN};
    print_reliability(stderr, p, y, 10);
    DIE("the end");
}

// What print_csv() makes of a field.
static void csv_apart(void *argument) {
    (void)argument;
    static const char *const fields[] = {"plain", "a,b", "say \"no\"", "two\nlines", ""};
    for (int k = 0; k < 5; k++) {
        print_csv(stderr, fields[k], strlen(fields[k]));
        fputc(';', stderr);
    }
    DIE("the end");
}

// What progress_show() says of a resumed run.
static void progress_apart(void *argument) {
    (void)argument;
    Progress p = {now_seconds() - 100, now_seconds() - 100, 50, 0};
    progress_show(&p, 75, 100, 200, "molecules", "step", 0);
    progress_show(&p, 75, 100, 200, "molecules", "soon", 0);  // ten seconds have not passed
    progress_show(&p, 100, 100, 200, "molecules", "done", 1);
    DIE("the end");
}

#if MB_POSIX
// A second signal soon after the first is of the same sender; a later one ends the program.
static void signals_apart(void *argument) {
    (void)argument;
    fake_wall = 100;
    mb_on_signal(SIGTERM);
    fake_wall += 1.4;
    mb_on_signal(SIGTERM);
    CHECK(mb_signal == SIGTERM, "no signal was noticed");
    fputs("still here\n", stderr);
    fflush(stderr);
    fake_wall += 0.2;
    mb_on_signal(SIGTERM);
    fputs("too long\n", stderr);
}
#endif

// Names, rows, files and numbers around the method.
static void test_machinery(void) {
#if MB_POSIX
    int ended = run_apart(signals_apart, NULL);
    char *said = file_text("build/test.out", NULL);
    test_check(ended == 1000 + SIGTERM && strcmp(said, "still here\n") == 0,
               "two signals within 1.5 seconds are one: %d, %s", ended, said);
    free(said);
    // what is in a dataset
    Dataset counted;
    Molecule molecule = {0};
    double atoms = 0, bonds = 0, present[2] = {0};
    int positions = 0, most[2] = {0};
    write_bites("build/bites.bin", 0, 40, 0);
    dataset_open(&counted, "build/bites.bin");
    for (size_t i = 0; i < 40; i++) {
        dataset_read(&counted, i, &molecule);
        atoms += molecule.n_atoms / 40.0;
        bonds += molecule.n_bonds / 40.0;
        positions += molecule.has_pos;
        most[0] = max_int(most[0], molecule.n_atoms);
        most[1] = max_int(most[1], molecule.n_bonds);
        for (int y = 0; y < 2; y++) present[y] += !isnan(molecule.labels[y]);
    }
    char *info = xprintf("atoms      mean %.1f, most %d\n  bonds      mean %.1f, most %d\n  "
                         "positions  %d molecules\n", atoms, most[0], bonds, most[1], positions);
    char *labels_there = xprintf("  task       big: %.0f labels\n  task       small: %.0f labels\n",
                                 present[0], present[1]);
    test_command("./moleblend info build/bites.bin", 0, info);
    test_command("./moleblend info build/bites.bin", 0, labels_there);
    FREE_ALL(info, labels_there);
    molecule_free(&molecule);
    dataset_close(&counted);
    test_apart(reliability_apart, NULL, "Brier score 0.2223; where the probability is\n"
               "  0.0 to 0.2, of 2: said 0.09, found 0.50\n  0.2 to 0.4, of 1: said 0.20, found "
               "0.00\n"
               "  0.4 to 0.6, of 1: said 0.50, found 1.00\n  0.6 to 0.8, of 2: said 0.70, found "
               "0.50\n  0.8 to 1.0, of 2: said 0.90, found 1.00\n");
    test_apart(csv_apart, NULL, "plain;\"a,b\";\"say \"\"no\"\"\";\"two\nlines\";;");
    test_apart(progress_apart, NULL, "step   75.0 %  2 molecules/s  1:40 left\ndone  100.0 %  2 "
               "molecules/s\n");
    // the bytes of an output are on the disk before it gets its name
    OutFile out;
    remove("build/bites_out");
    files_flushed = flushed_late = folders_flushed = 0;
    flush_name = "build/bites_out";
    out_open(&out, "build/bites_out", "x");
    out_write(&out, "x", 1);
    out_commit(&out);
    flush_name = NULL;
    test_check(files_flushed == 1 && flushed_late == 0 && folders_flushed == 1,
               "an output is flushed %d times, %d too late; its folder %d times", files_flushed,
               flushed_late, folders_flushed);
#endif
    // a number, once read, that stands on the right side of the best
    const float logits[] = {1, 2, -1, -3, 0.5f, 0.7f, -0.2f, 4}, ones[] = {1, 1, 0, 0, 1, 0, 1, 0};
    double scale = (double)calibration(logits, ones, 8), slope = 0;
    for (int k = 0; k < 8; k++)
        slope += (1 / (1 + exp(-scale * (double)logits[k])) - (double)ones[k]) * (double)logits[k];
    test_check(fabs(slope) < 1e-5 && scale > 0.1, "calibration %.4f leaves a slope of %.1e", scale,
               slope);
    const float sure[] = {3, -3, NAN, 2}, right[] = {1, 0, NAN, 1}, wrong[] = {0, 1, NAN, 0};
    const float least = 0.1f;  // x87 keeps more of a constant
    test_check(calibration(sure, right, 4) == 10 && calibration(sure, wrong, 4) == least,
               "calibration ends at 10 and 0.1: %g, %g", (double)calibration(sure, right, 4),
               (double)calibration(sure, wrong, 4));
    static const struct { const char *a, *b; int distance; } words[] = {
        {"--lr", "--lr", 0}, {"--stps", "--steps", 1}, {"kitten", "sitting", 3}, {"", "abc", 3},
        {"abc", "", 3}, {"--labels-from", "--labels-by", 4}};
    for (int k = 0; k < 6; k++)
        test_check(edit_distance(words[k].a, words[k].b) == words[k].distance,
                   "distance of %s, %s: "
                   "%d", words[k].a, words[k].b, edit_distance(words[k].a, words[k].b));
    test_command("./moleblend build/test_train.bin --layerszzzz 2", 1, "did you mean --layers?");
    test_command("./moleblend build/test_train.bin --layerszzzzz 2", 1,
                 "unknown option --layerszzzzz; see --help");
    // valid.bin beside train.bin: of the last "train" of the path
    if (MB_POSIX) {
        test_command("mkdir -p build/train_v && cp build/test_train.bin build/train_v/a.train.bin "
                     "&& cp build/test_train.bin build/train_v/a.valid.bin && ./moleblend "
                     "build/train_v/a.train.bin" TINY "--steps 1 -o build/bites.safetensors", 0,
                     "build/train_v/a.valid.bin: 40");
        test_command("printf 'C(\\nC\\nCC\\n' > build/bites.smi; ./data_prep --format smi -o "
                     "build/bites_n.bin build/bites.smi && sed 's/ /  /' build/bites.smi > "
                     "/dev/null; ./data_prep --dump build/bites_n.bin", 0, "{\"name\":\"CC\",");
        test_command("printf '\\n x\\n\\n  1  0  0  0  0  0  0  0  0  0999 V2000\\n    0.0000    "
                     "0.0000    0.0000 C   0  0\\nM  END\\n$$$$\\n' > build/bites.sdf; cat "
                     "build/bites.sdf build/bites.sdf build/bites.sdf | ./data_prep --format sdf "
                     "-o - - | ./data_prep --range 2: --dump -", 0, "{\"name\":\"3\",");
        test_command("sed 's/C   0  0/H   0  3/' build/bites.sdf | ./data_prep --format sdf -o - - "
                     "| ./data_prep --dump -", 0, "[[0,0,0,6,0,0,5,0,0]]");  // a proton, no H
        test_command("printf 'C a\\nCC b\\nCCC c\\n' | ./data_prep --format smi -o - - | "
                     "./data_prep --range 1:2 --dump - | grep -c name", 0, "1\n");
        test_command("printf 'C(\\nC(\\nC(\\nC(\\nC\\n' | ./data_prep --format smi --max-reject 1 "
                     "-o build/bites_n.bin - 2>&1 | grep -c 'column 3'", 0, "3\n");
    }
    struct { const char *path, *ending, *other, *expected; } paths[] = {
        {"a/b.safetensors", ".safetensors", ".log.csv", "a/b.log.csv"},
        {"a/b", ".safetensors", ".log.csv", "a/b.log.csv"}, {".npy", ".npy", ".csv", ".npy.csv"},
        {"b.npy.npy", ".npy", ".csv", "b.npy.csv"}};
    for (int k = 0; k < 4; k++) {
        char *path = path_with(paths[k].path, paths[k].ending, paths[k].other);
        test_check(strcmp(path, paths[k].expected) == 0, "%s is not %s", path, paths[k].expected);
        free(path);
    }
    // a flipped bit behind the checksum of a tensor file
    size_t size;
    const float numbers[] = {1, 2, 3, 4, 5, 6};
    tensor_file_write("build/bites.safetensors", &(TensorOut){"x", 2, 3, numbers}, 1,
                      "\"format\":\"pt\"");
    char *bytes = file_text("build/bites.safetensors", &size);
    bytes[size - 2] = (char)(bytes[size - 2] ^ 1);
    write_bytes("build/bites_bad.safetensors", bytes, size);
    test_command("./moleblend info build/bites.safetensors", 0, "F32 (2, 3)");
    test_command("./moleblend info build/bites_bad.safetensors", 1, "damaged tensor file");
    free(bytes);
    double mean[2];
    const float rows[] = {1, 10, 2, 20, 4, 60};
    rows_mean(mean, rows, 2, 1, 3);
    test_check(mean[0] == 3 && mean[1] == 40, "means of rows: %g, %g", mean[0], mean[1]);
    const float gaps[] = {NAN, NAN, 2, NAN, 4, NAN};
    rows_mean(mean, gaps, 2, 0, 3);
    test_check(mean[0] == 3 && isnan(mean[1]), "means of what is there: %g, %g", mean[0], mean[1]);
    double metric[METRICS];  // of two tasks one has both classes
    const float scores[] = {1, 0, 2, 0, 3, 0, 0, 0}, classes[] = {0, 1, 1, 1, 1, 1, 0, 1};
    task_means(metric, TASK_CLASSIFICATION, scores, classes, 4, 2);
    test_check(metric[METRIC_AUC] == 1 && metric[METRIC_AP] == 1, "a mean over the tasks that have "
               "a metric: %g, %g", metric[METRIC_AUC], metric[METRIC_AP]);
}

// ---- data_prep

// Frames that mirror; shares and limits off by one; scaffolds and fragments told apart wrongly.
static void test_small_chemistry(void) {
    Worker w = {0};
    ChemMol *m = &w.mol;
    Outcome o;
    double before = 0, after = 0, extent[3] = {0};
    mol_clear(m);
    for (int i = 0; i < 7; i++) {
        mol_add_atom(m, 6);
        for (int k = 0; k < 3; k++) m->xyz[i][k] = (k + 1.0) * (double)test_number(40 + 3 * i + k);
    }
    for (int turn = 0; turn < 2; turn++) {  // the volume that four atoms span keeps its sign
        Point a = arm(m, 0, 1), b = arm(m, 0, 2), c = arm(m, 0, 3);
        *(turn ? &after : &before) = dot(a, cross(b, c));
        if (turn == 0) orient_principal(m);
    }
    for (int i = 0; i < 7; i++)
        for (int k = 0; k < 3; k++) extent[k] += m->xyz[i][k] * m->xyz[i][k];
    test_check(fabs(before) > 0.1 && fabs(after - before) < 1e-9, "principal frame: a volume of "
               "%.4f becomes %.4f", before, after);
    test_check(extent[0] > extent[1] && extent[1] > extent[2], "principal frame: extents %.3f %.3f "
               "%.3f", extent[0], extent[1], extent[2]);
    static const struct { const char *a, *b; int same; } scaffolds[] = {
        {"C[c+]1cccccc1", "[cH+]1cccccc1", 1}, {"[O-][n+]1ccccc1", "c1cc[nH+]cc1", 1},
        {"Cn1cccc1", "c1cc[nH]c1", 1}, {"C[n+]1ccccc1", "c1ccncc1", 0},
        {"O=C1CCCCC1", "C1CCCCC1", 0}, {"OC1CCCCC1", "C1CCCCC1", 1},
        {"C1CC[NH2+]CC1", "C1CCNCC1", 0}, {"C1CCNCC1", "C1CCCCC1", 0}};
    for (size_t k = 0; k < sizeof scaffolds / sizeof *scaffolds; k++) {
        ScaffoldKey key[2];
        for (int x = 0; x < 2; x++) {
            const char *smiles = x ? scaffolds[k].b : scaffolds[k].a;
            test_check(prep_convert(&w, FORMAT_SMI, smiles, &o), "%s", smiles);
            key[x] = scaffold_key(m);
        }
        test_check((key[0].a == key[1].a && key[0].b == key[1].b) == scaffolds[k].same,
                   "scaffolds of %s and %s", scaffolds[k].a, scaffolds[k].b);
    }
    // M  RAD takes back the charges of atom lines as M  CHG does; of equal labels the first counts
    static const char *const blocks[] = {
        HEAD COUNTS2 "    0.0000    0.0000    0.0000 N   0  3\n" ATOM "  1  2  1\nM  END\n",
        HEAD COUNTS2 "    0.0000    0.0000    0.0000 N   0  3\n" ATOM
        "  1  2  1\nM  RAD  1   2   2\n"
            "M  END\n",
        V3HEAD "M  V30 COUNTS 3 1 0 0 0\nM  V30 BEGIN ATOM\nM  V30 1 C 0 0 0 0\n"
        "M  V30 2 N 1 0 0 0\n"
            "M  V30 2 O 2 0 0 0\nM  V30 END ATOM\nM  V30 BEGIN BOND\nM  V30 1 1 1 2\n"
            "M  V30 END BOND\nM  V30 END CTAB\nM  END\n"};
    int charge[3] = {0};
    for (int k = 0; k < 3; k++) {
        test_check(prep_convert(&w, FORMAT_SDF, blocks[k], &o), "block %d", k);
        charge[k] = w.molecule.atom_feat[3] - 5;
    }
    test_check(charge[0] == 1 && charge[1] == 0, "charges %d, %d", charge[0], charge[1]);
    test_check(w.molecule.n_bonds == 1 && w.molecule.bonds[1] == 1, "a bond to the first of equal "
               "labels");
    // tags (1: CW, 2: CCW) of a centre whose hydrogen goes; aromatic atoms and bonds where an atom
    // is in three rings, as RDKit has them
    static const struct { const char *smiles; int tag, atoms, bonds; } known[] = {
        {"F[C@](Cl)([H])Br", 1, 0, 0}, {"F[C@]([H])(Cl)Br", 2, 0, 0}, {"F[C@](Cl)(Br)[H]", 2, 0, 0},
        {"C1=CC2=CC=CC3=CC=CC(=C1)N23", 0, 0, 0}, {"C1=CC2=CC=C3C=CC4=C1C2=C34", 0, 12, 13},
        {"C1=CC2=C3C(=CC=C2)C=CC=C3C=C1", 0, 10, 11}, {"C1=CC2=CC=CC3=CC=CC1=C23", 0, 10, 11}};
    for (size_t k = 0; k < sizeof known / sizeof *known; k++) {
        int kept = prep_convert(&w, FORMAT_SMI, known[k].smiles, &o);
        int atoms = 0, bonds = 0, tag = w.molecule.atom_feat[ATOM_FEATURES + 1];
        for (int i = 0; i < w.molecule.n_atoms; i++)
            atoms += w.molecule.atom_feat[ATOM_FEATURES * i + 7];
        for (int b = 0; b < w.molecule.n_bonds; b++) bonds += w.molecule.bond_code[b] / 12 == 3;
        test_check(kept && tag == known[k].tag && atoms == known[k].atoms &&
                   bonds == known[k].bonds,
                   "%s: tag %d, %d aromatic atoms, %d bonds", known[k].smiles, tag, atoms, bonds);
    }
    // nitrogen is a centre at bridgeheads: two rings through it share two bonds or more
    static const struct { const char *smiles; int centre; } nitrogen[] = {
        {"C1CC[N@]2CCC[C@H]2C1", 0}, {"C1CC[N@@]2CCC[C@H]2C1", 0},
        {"C[C@H]1C[N@]2CC[C@@H]1CC2", 1}};
    for (size_t k = 0; k < sizeof nitrogen / sizeof *nitrogen; k++) {
        prep_convert(&w, FORMAT_SMI, nitrogen[k].smiles, &o);
        test_check((w.molecule.atom_feat[3 * ATOM_FEATURES + 1] > 0) == nitrogen[k].centre, "%s",
                   nitrogen[k].smiles);
    }
    static const struct { const char *smiles; int charge; } irons[] = {
        {"[Fe+5]", 10}, {"[Fe+6]", 11}, {"[Fe-5]", 0}, {"[Fe-6]", 11}};
    for (size_t k = 0; k < sizeof irons / sizeof *irons; k++) {
        prep_convert(&w, FORMAT_SMI, irons[k].smiles, &o);
        test_check(w.molecule.atom_feat[3] == irons[k].charge, "%s: %d", irons[k].smiles,
                   w.molecule.atom_feat[3]);
    }
    // a wavy bond hides the chirality of the atom at which it begins only
    static const char *const bond[3] = {"  1  2  1", "  2  1  1  4", "  1  2  1  4"};
    for (int k = 0; k < 3; k++) {
        char *block = xprintf("x\n  t                 3D\n\n  5  4  0     0  0            999 "
                              "V2000\n    0.0000    0.0000    0.0000 C   0  0\n"
                              "    0.6000    0.6000    0.6000 F   0  0\n"
                              "   -0.8000   -0.8000    0.8000 Cl  0  0\n"
                              "   -0.9000    0.9000   -0.9000 Br  0  0\n"
                              "    1.0000   -1.0000   -1.0000 I   0  0\n"
                              "%s\n  1  3  1\n  1  4  1\n  1  5  1\nM  END\n", bond[k]);
        int kept = prep_convert(&w, FORMAT_SDF, block, &o);
        test_check(kept && w.molecule.atom_feat[1] == (k < 2), "%s: tag %d", bond[k],
                   w.molecule.atom_feat[1]);
        free(block);
    }
    // hydrogens of lone charged atoms, as RDKit has them; field of the charge in the atom line
    static const struct { const char *symbol; int field, hydrogens; } ions[] = {
        {"B", 5, 4}, {"B", 0, 3}, {"C", 3, 3}, {"C", 0, 4}, {"C", 5, 3}, {"N", 3, 4}, {"N", 5, 2},
        {"O", 3, 3}, {"O", 5, 1}, {"S", 3, 3}, {"Al", 5, 4}};
    for (size_t k = 0; k < sizeof ions / sizeof *ions; k++) {
        char *block = xprintf(HEAD COUNTS1 "    0.0000    0.0000    0.0000 %-3s 0  %d\nM  END\n",
                              ions[k].symbol, ions[k].field);
        int kept = prep_convert(&w, FORMAT_SDF, block, &o);
        test_check(kept && w.molecule.atom_feat[4] == ions[k].hydrogens, "%s of field %d: %d "
                   "hydrogens", ions[k].symbol, ions[k].field, w.molecule.atom_feat[4]);
        free(block);
    }
    worker_free(&w);
    // shares that are just reached: 0.29 * 100 is 28.999999999999996
    uint8_t part[100];
    ScaffoldKey key[100];
    const double share[2] = {0.29, 0.71};
    int count = 0, first = 0;
    split_by_order(part, 100, NULL, share, 2);
    for (int i = 0; i < 100; i++) {
        count += part[i] == 0;
        key[i] = (ScaffoldKey){i < 71 ? 1 : 2, 0};
    }
    test_check(count == 29 && part[28] == 0 && part[29] == 1, "29 %% of 100 are %d", count);
    split_by_scaffold(part, key, 100, share, 2);
    for (int i = 0; i < 100; i++) first += part[i] == 0 && i >= 71;
    test_check(first == 29, "a scaffold of 29 of 100 fits a share of 0.29: %d", first);
    if (!MB_POSIX) return;
    static const CommandRow table[] = {
        // the fragment of most atoms, with hydrogens; of equals the heaviest, of these the first
        {"echo 'CCO.CCN a' | ./data_prep --format smi --largest-fragment -o - - | ./data_prep "
         "--dump -", 0, "[6,0,3,5,2,0,2,0,0]]"},
        {"echo '[Cl-].[K+]' | ./data_prep --format smi --largest-fragment -o - - | ./data_prep "
         "--dump -", 0, "[[18,0,"},
        {"echo 'OCC.CCO a' | ./data_prep --format smi --largest-fragment -o - - | ./data_prep "
         "--dump -", 0, "\"atom_feat\":[[7,0,"},
        {"echo 'O.CC.[Na+].CCC.C' | ./data_prep --format smi --largest-fragment -o - - | "
         "./data_prep --dump -", 0, "\"bonds\":[[0,1,0,0,0],[1,2,0,0,0]]"},
        // limits that are just kept
        {"printf 'C\\nC(\\n' | ./data_prep --format smi --max-reject 50 -o build/bites_x.bin -", 0,
         "1 molecules"},
        {"printf 'C\\nC(\\n' | ./data_prep --format smi --max-reject 49.9 -o build/bites_x.bin -",
         1,
         "nothing is written"},
        {"echo CCC | ./data_prep --format smi --max-atoms 3 -o build/bites_x.bin -", 0,
         "1 molecules"},
        {"echo '[H]C([H])C' | ./data_prep --format smi --keep-hydrogens -o - - | ./data_prep "
         "--dump - | tr -cd '[' | wc -c", 0, "12"},
        {"echo 'C[C@H]1CC[C@@H](C)CC1' | ./data_prep --format smi -o - - | ./data_prep --dump - | "
         "cut -c 1-60", 0, "\"atom_feat\":[[5,0,"}};
    test_rows(table, sizeof table / sizeof *table);
    // a random split: the permutation of its seed
    uint32_t order[10];
    for (int seed = 1; seed <= 6; seed += 5) {
        char *line = xprintf("printf 'C 0\\nC 1\\nC 2\\nC 3\\nC 4\\nC 5\\nC 6\\nC 7\\nC 8\\nC "
                             "9\\n' "
                             "| ./data_prep --format smi --split 0.7,0.3 --split-by random %s -o "
                             "'build/bites_{}.bin' - 2> /dev/null; ./data_prep --dump "
                             "build/bites_valid.bin | cut -c 1-11", seed > 1 ? "--seed 6" : "");
        test_command(line, 0, "name");
        char *text = file_text("build/test.out", NULL), expected[64] = "";
        rng_permutation(order, 10, (uint64_t)seed, RNG_SPLIT, 0);
        for (uint32_t i = 0, n = 0; i < 10; i++)  // in the order of the input
            if (order[7] == i || order[8] == i || order[9] == i)
                n += (uint32_t)sprintf(expected + n, "{\"name\":\"%u\"\n", i);
        test_check(strcmp(text, expected) == 0, "%s:\n%sexpected\n%s", line, text, expected);
        FREE_ALL(line, text);
    }
}
