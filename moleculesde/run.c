// run.c - the rest of moleculesde.c, which includes it: the fine-tuning head, fast arithmetic,
// memory and tables of parameters, checkpoints, the loop that trains, commands.

// =================================================================================================
// 11 The fine-tuning head: logits (B, Y) = map of the mean of X (or Y) over a molecule's atoms. Of
//   classes it begins at their base rates: its bias is log(p / (1 - p)) with p the share of ones
// =================================================================================================

// pooled (B, D), and logits of a fine-tuned model.
static void head_forward(Sde *s) {
    const Mols *m = &s->mols;
    Buffers *a = &s->a;
    size_t D = (size_t)s->shape.dim;
    const float *x = s->shape.use_3d ? a->y : a->x;
#pragma omp parallel for schedule(static)
    for (size_t b = 0; b < m->B; b++) {
        Place v = place_of(m, b);
        for (size_t c = 0; c < D; c++) {
            float sum = 0;
            for (size_t i = v.atom; i < v.atom + (size_t)v.N; i++) sum += x[i * D + c];
            a->pooled[b * D + c] = sum / (float)v.N;
        }
    }
    if (s->shape.tasks) apply(a->logits, a->pooled, &s->p.head, m->B);
}

// From dlogits (B, Y): the head's gradients, and dx or dy of the encoder.
static void head_backward(Sde *s) {
    const Mols *m = &s->mols;
    Buffers *a = &s->a;
    size_t D = (size_t)s->shape.dim;
    float *d = s->shape.use_3d ? a->dy : a->dx;
    apply_backward(a->dpooled, 0, &s->g.head, a->dlogits, a->pooled, &s->p.head, m->B);
    for (size_t i = 0; i < m->A; i++) {  // forward: pooled = mean over the atoms
        size_t b = m->molecule_of[i];
        for (size_t c = 0; c < D; c++) d[i * D + c] = a->dpooled[b * D + c] / (float)m->n_atoms[b];
    }
}

// What a fine-tuned model needs besides its parameters: regression: prediction = out std + mean.
typedef struct { TaskKind kind; const float *mean, *std; } Aim;

// Mean over the labels that are there: cross-entropy, or |out - (label - mean) / std|. Stores
// dlogits.
static double head_loss(Sde *s, const Aim *aim) {
    size_t count = 0, Y = (size_t)s->mols.Y, n = s->mols.B * Y;
    double loss = 0;
    for (size_t k = 0; k < n; k++) count += !isnan(s->mols.labels[k]);
    for (size_t k = 0; k < n; k++) {
        double x = (double)s->a.logits[k], label = (double)s->mols.labels[k], slope = 0;
        if (!isnan(label) && aim->kind == TASK_CLASSIFICATION) {
            loss += softplus(x) - x * label;
            slope = sigmoid_of(x) - label;
        } else if (!isnan(label)) {
            double error = x - (label - (double)aim->mean[k % Y]) / (double)aim->std[k % Y];
            loss += fabs(error);
            slope = (error > 0) - (error < 0);
        }
        s->a.dlogits[k] = (float)(slope / (double)max_size(count, 1));
    }
    return loss / (double)max_size(count, 1);
}

// The encoder and head of a fine-tuned model, on the batch in s.
static void task_forward(Sde *s) {
    buffers_layout(s);
    if (s->shape.use_3d) schnet_forward(s);
    else gin_forward(s);
    head_forward(s);
}

static void task_backward(Sde *s) {
    head_backward(s);
    if (s->shape.use_3d) schnet_backward(s);
    else gin_backward(s);
}

// =================================================================================================
// 12 Fast arithmetic, and memory
// =================================================================================================

// x = 2^e m, m from sqrt(1/2) to sqrt(2); log m by a polynomial (coefficients of Cephes' logf).
ALWAYS_INLINE float log_fast(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t shifted = bits + (0x3F800000u - 0x3F3504F3u);  // carries if m is above sqrt(2)
    float e = (float)((int32_t)(shifted >> 23) - 127), m;
    bits = (shifted & 0x007FFFFFu) + 0x3F3504F3u;
    memcpy(&m, &bits, 4);
    m -= 1.0f;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    return m + (p * m * m * m - 0.5f * m * m) + e * 0.693147181f;
}

// (e^2x - 1) / (e^2x + 1); a polynomial where that would lose digits.
ALWAYS_INLINE float tanh_fast(float x) {
    float e = exp_fast(2.0f * x), z = x * x, large = 1.0f - 2.0f / (e + 1.0f);
    float p = -0.0539682540f;
    p = p * z + 0.133333333f;
    p = p * z - 0.333333333f;
    return z < 0.04f ? x + x * z * p : large;
}

// sin(2 pi r), |r| <= 1/4: a Taylor polynomial.
ALWAYS_INLINE float quarter_sin(float r) {
    float x = 6.28318531f * r, z = x * x, p = -2.50521084e-8f;
    p = p * z + 2.75573192e-6f;
    p = p * z - 1.98412698e-4f;
    p = p * z + 8.33333333e-3f;
    p = p * z - 1.66666667e-1f;
    return x + x * z * p;
}

ALWAYS_INLINE void turn_fast(float *s, float *c, float turns) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    float shifted = turns + magic, r = turns - (shifted - magic), up = fabsf(r);
    float folded = up > 0.25f ? 0.5f - up : up;  // sin(pi - x) = sin x
    *s = r < 0 ? -quarter_sin(folded) : quarter_sin(folded);
    *c = quarter_sin(0.25f - up);                // cos x = sin(pi / 2 - x)
}

ALWAYS_INLINE float sigmoid_fast(float x) { return 1.0f / (1.0f + exp_fast(-x)); }

ALWAYS_INLINE float act(Kind kind, float x) {
    float e = exp_fast(kind == ELU ? x : -fabsf(x));
    switch (kind) {
        case SILU: return x * sigmoid_fast(x);
        case SSP: return (x > 0 ? x : 0.0f) + log_fast(1.0f + e) - 0.693147181f;
        case ELU: return x > 0 ? x : e - 1.0f;
        default: return tanh_fast(x);
    }
}

ALWAYS_INLINE float act_slope(Kind kind, float x) {
    float y = kind == TANH ? tanh_fast(x) : sigmoid_fast(x);
    switch (kind) {
        case SILU: return y * (1.0f + x * (1.0f - y));
        case SSP: return y;
        case ELU: return x > 0 ? 1.0f : exp_fast(x);
        default: return 1.0f - y * y;
    }
}

enum { ACT_CHUNK = 4096 };

#ifdef __TINYC__
#define _Pragma(text)  // tcc 0.9.27 does not know it
#endif

// A loop of its own for each kind, which compilers vectorise.
#define ACT_LOOPS(statement)                                                                       \
    _Pragma("omp parallel for schedule(static)")                                                   \
    for (size_t first = 0; first < n; first += ACT_CHUNK) {                                        \
        size_t end = n - first < ACT_CHUNK ? n : first + ACT_CHUNK, k;                             \
        switch (kind) {                                                                            \
            case SILU: _Pragma("omp simd") for (k = first; k < end; k++) statement(SILU); break;   \
            case SSP: _Pragma("omp simd") for (k = first; k < end; k++) statement(SSP); break;     \
            case ELU: _Pragma("omp simd") for (k = first; k < end; k++) statement(ELU); break;     \
            case TANH: _Pragma("omp simd") for (k = first; k < end; k++) statement(TANH); break;   \
        }                                                                                          \
    }

static void act_forward(Kind kind, float *out, const float *pre, size_t n) {
#define FORWARD(kind) out[k] = act(kind, pre[k])
    ACT_LOOPS(FORWARD)
}

static void act_backward(Kind kind, float *d, const float *pre, size_t n) {
#define BACKWARD(kind) d[k] *= act_slope(kind, pre[k])
    ACT_LOOPS(BACKWARD)
}

// out (n) standard normal, by Box and Muller, four from a Philox block: number k is that of block
// k mod blocks, named (purpose, slot).
static void normal_row(float *out, size_t n, const Draws *draws, uint32_t purpose, uint32_t slot) {
    size_t blocks = (n + 3) / 4;
    uint32_t words[4][BLOCKS];
    for (size_t first = 0; first < blocks; first += BLOCKS) {
        int count = blocks - first < BLOCKS ? (int)(blocks - first) : BLOCKS;
        float normal[4][BLOCKS];
        philox_blocks(words, count, (Philox){{(uint32_t)first, slot, draws->step, purpose}},
                      draws->seed);
        for (int w = 0; w < 4; w += 2)
#pragma omp simd
            for (int k = 0; k < count; k++) {
                float u = (float)((words[w][k] >> 8) + 1) * 0x1p-24f, s, c;
                float radius = sqrtf(-2.0f * log_fast(u));
                turn_fast(&s, &c, (float)(words[w + 1][k] >> 8) * 0x1p-24f);
                normal[w][k] = radius * c;
                normal[w + 1][k] = radius * s;
            }
        for (size_t w = 0; w < 4; w++)
            for (size_t k = 0; k < (size_t)count && w * blocks + first + k < n; k++)
                out[w * blocks + first + k] = normal[w][k];
    }
}

// ---- parameters. A walk through the tensors of all networks, with their official names: it makes
//      the arenas, the initial values and the checkpoints

// What initial values are drawn from.
typedef enum {
    START_DEFAULT,  // U(+-1 / sqrt(columns)), of a bias: of its weight's columns
    START_XAVIER,   // U(+-sqrt(6 / (rows + columns)))
    START_NORMAL,   // N(0, 1)
    START_ZERO, START_ONE,
} Start;

typedef struct {
    float *arena;               // NULL: tensors are only counted
    TensorInfo *info;           // NULL: not wanted
    int n;
    Group group;                // the one that is placed in this walk
    size_t offset;
} Table;

// The next tensor of a group: *at points to it. rows = 0: a vector. fan_in: of START_DEFAULT.
MB_PRINTF(8, 9) static void place(Table *t, Group group, float **at, size_t rows, size_t columns,
                                  Start start, int fan_in, const char *name, ...) {
    if (group != t->group) return;
    size_t count = max_size(rows, 1) * columns;
    *at = t->arena ? t->arena + t->offset : NULL;
    if (t->info) {
        TensorInfo *info = &t->info[t->n];
        *info = (TensorInfo){.rows = rows, .columns = columns, .rule = (InitRule)start,
                             .offset = t->offset, .count = count, .field = (size_t)fan_in};
        va_list args;
        va_start(args, name);
        vsnprintf(info->name, sizeof info->name, name, args);
        va_end(args);
    }
    t->offset += count;
    t->n++;
}

static void place_linear(Table *t, Group group, Linear *l, int in, int out, Start start,
                         const char *name) {
    l->in = in;
    l->out = out;
    place(t, group, &l->w, (size_t)out, (size_t)in, start, in, "%s.weight", name);
    place(t, group, &l->b, 0, (size_t)out, start == START_XAVIER ? START_ZERO : start, in,
          "%s.bias", name);
}

static void place_batch_norm(Table *t, Group group, BatchNorm *bn, int n, const char *name) {
    bn->n = n;
    place(t, group, &bn->w, 0, (size_t)n, START_ONE, 0, "%s.weight", name);
    place(t, group, &bn->b, 0, (size_t)n, START_ZERO, 0, "%s.bias", name);
    place(t, GROUP_FIXED, &bn->mean, 0, (size_t)n, START_ZERO, 0, "%s.running_mean", name);
    place(t, GROUP_FIXED, &bn->var, 0, (size_t)n, START_ONE, 0, "%s.running_var", name);
}

// A name made of a pattern and two numbers, valid until the fourth call after.
static const char *numbered(const char *pattern, int k, int l) {
    static char text[4][128];
    static int turn;
    char *out = text[turn++ % 4];
    snprintf(out, 128, pattern, k, l);
    return out;
}

static void gin_place(Table *t, Gin *n, const Shape *c) {
    int D = c->dim;
    float *rest;  // tensors that follow each other are one matrix, named by the first
    for (int f = 0; f < ATOM_FEATURES; f++)
        place(t, GROUP_2D, f ? &rest : &n->atom, ATOM_FEATURE_SIZES[f], (size_t)D, START_XAVIER, 0,
              "model_2D.atom_encoder.atom_embedding_list.%d.weight", f);
    for (int l = 0; l < c->layers; l++) {
        GinLayer *y = &n->layer[l];
        const int rows[BOND_FEATURES] = {BOND_TYPES, BOND_STEREOS, 2};
        for (int f = 0; f < BOND_FEATURES; f++)
            place(t, GROUP_2D, f ? &rest : &y->bond, (size_t)rows[f], (size_t)D, START_XAVIER, 0,
                  "model_2D.gnns.%d.bond_encoder.bond_embedding_list.%d.weight", l, f);
        place(t, GROUP_2D, &y->eps, 0, 1, START_ZERO, 0, "model_2D.gnns.%d.eps", l);
        place_linear(t, GROUP_2D, &y->in, D, 2 * D, START_DEFAULT,
                     numbered("model_2D.gnns.%d.mlp.0", l, 0));
        place_batch_norm(t, GROUP_2D, &y->norm_in, 2 * D, numbered("model_2D.gnns.%d.mlp.1", l, 0));
        place_linear(t, GROUP_2D, &y->out, 2 * D, D, START_DEFAULT,
                     numbered("model_2D.gnns.%d.mlp.3", l, 0));
        place_batch_norm(t, GROUP_2D, &y->norm_out, D, numbered("model_2D.batch_norms.%d", l, 0));
    }
}

static void schnet_place(Table *t, Schnet *n, const Shape *c) {
    int D = c->dim, F = c->filters;
    place(t, GROUP_3D, &n->atom, V, (size_t)D, START_NORMAL, 0, "model_3D.embedding.weight");
    for (int k = 0; k < c->blocks; k++) {
        SchnetBlock *b = &n->block[k];
        place_linear(t, GROUP_3D, &b->filter[0], c->gaussians, F, START_XAVIER,
                     numbered("model_3D.interactions.%d.mlp.0", k, 0));
        b->filter[1].in = b->filter[1].out = b->lift.out = F;
        b->lift.in = D;
        place(t, GROUP_3D, &b->filter[1].w, (size_t)F, (size_t)F, START_XAVIER, 0,
              "model_3D.interactions.%d.mlp.2.weight", k);
        place(t, GROUP_3D, &b->filter[1].b, 0, (size_t)F, START_DEFAULT, F,
              "model_3D.interactions.%d.mlp.2.bias", k);
        place(t, GROUP_3D, &b->lift.w, (size_t)F, (size_t)D, START_XAVIER, 0,
              "model_3D.interactions.%d.conv.lin1.weight", k);
        place_linear(t, GROUP_3D, &b->out[0], F, D, START_XAVIER,
                     numbered("model_3D.interactions.%d.conv.lin2", k, 0));
        place_linear(t, GROUP_3D, &b->out[1], D, D, START_XAVIER,
                     numbered("model_3D.interactions.%d.lin", k, 0));
    }
    place_linear(t, GROUP_3D, &n->out[0], D, D, START_XAVIER, "model_3D.lin1");
    place_linear(t, GROUP_3D, &n->out[1], D, D, START_XAVIER, "model_3D.lin2");
}

static void to3d_place(Table *t, To3d *n, const Shape *c) {
    static const char *const module = "SDE_2Dto3D_model";
    static const char *const kinds[4] = {"query", "key", "value", "skip"};
    int D = c->dim, H = c->hidden;
    size_t h = (size_t)H;
    float *rest;
    place_linear(t, GROUP_2D, &n->node, D, H, START_XAVIER, "SDE_2Dto3D_model.node_emb.layers.0");
    place_linear(t, GROUP_2D, &n->edge_in, 2 * D, D, START_DEFAULT,
                 "SDE_2Dto3D_model.edge_2D_emb.0");
    place_batch_norm(t, GROUP_2D, &n->edge_norm, D, "SDE_2Dto3D_model.edge_2D_emb.1");
    place_linear(t, GROUP_2D, &n->edge_out, D, H, START_DEFAULT, "SDE_2Dto3D_model.edge_2D_emb.3");
    if (c->gate) {
        place(t, GROUP_FIXED, &n->gate_wave, 0, h, START_NORMAL, 0, "%s.dist_gaussian_fourier.W",
              module);
        place_linear(t, GROUP_2D, &n->gate, 2 * H, H, START_XAVIER,
                     "SDE_2Dto3D_model.input_mlp.layers.0");
    }
    place(t, GROUP_FIXED, &n->frame_wave, 0, h, START_NORMAL, 0, "%s.coff_gaussian_fourier.W",
          module);
    place_linear(t, GROUP_2D, &n->frame, 4 * H, H, START_DEFAULT, "SDE_2Dto3D_model.coff_mlp");
    place_linear(t, GROUP_2D, &n->project[0], 2 * H + 2, H, START_XAVIER,
                 "SDE_2Dto3D_model.project.layers.0");
    place_linear(t, GROUP_2D, &n->project[1], H, H, START_XAVIER,
                 "SDE_2Dto3D_model.project.layers.1");
    for (int l = 0; l < ATTENTIONS; l++) {
        Attention *y = &n->layer[l];
        char name[96];
        snprintf(name, sizeof name, "%s.score_network.gnn_layers.%d.%d", module, l / 2, l % 2);
        y->maps = (Linear){H, 4 * H, y->maps.w, y->maps.b};
        for (int k = 0; k < 4; k++)
            place(t, GROUP_2D, k ? &rest : &y->maps.w, h, h, START_DEFAULT, H,
                  "%s.MHA.lin_%s.weight", name, kinds[k]);
        for (int k = 0; k < 4; k++)
            place(t, GROUP_2D, k ? &rest : &y->maps.b, 0, h, START_DEFAULT, H, "%s.MHA.lin_%s.bias",
                  name, kinds[k]);
        y->edge.in = y->edge.out = H;
        place(t, GROUP_2D, &y->edge.w, h, h, START_DEFAULT, H, "%s.MHA.lin_edge.weight", name);
        for (int k = 0; k < 2; k++) {
            y->ffn[k].in = y->ffn[k].out = H;
            place(t, GROUP_2D, &y->ffn[k].w, h, h, START_DEFAULT, H, "%s.FFN.%d.weight", name,
                  3 * k);
            place(t, GROUP_2D, &y->ffn[k].b, 0, h, START_DEFAULT, H, "%s.FFN.%d.bias", name, 3 * k);
            LayerNorm *norm = k ? &y->norm2 : &y->norm1;
            norm->n = H;
            place(t, GROUP_2D, &norm->w, 0, h, START_ONE, 0, "%s.norm%d.weight", name, k + 1);
            place(t, GROUP_2D, &norm->b, 0, h, START_ZERO, 0, "%s.norm%d.bias", name, k + 1);
        }
    }
    for (int k = 0; k < MODULES; k++) {
        const char *pattern = "SDE_2Dto3D_model.score_network.basis_mlp_modules.%d.%d";
        place_linear(t, GROUP_2D, &n->basis[k][0], 2 * H, COEFFICIENTS, START_DEFAULT,
                     numbered(pattern, k, 0));
        place_linear(t, GROUP_2D, &n->basis[k][1], COEFFICIENTS, 3, START_DEFAULT,
                     numbered(pattern, k, 2));
    }
}

static void place_mlp(Table *t, Group group, Linear *l, const int *sizes, int layers,
                      const char *name) {
    for (int k = 0; k < layers; k++) {
        char text[160];
        snprintf(text, sizeof text, "%s.layers.%d", name, k);
        place_linear(t, group, &l[k], sizes[k], sizes[k + 1], START_XAVIER, text);
    }
}

// A channel's tensors follow those of the channel before; so do query and key.
static void edge_layer_place(Table *t, EdgeLayer *n, const Shape *c, int l) {
    int C = to2d_channels(c, l), W = c->width, in = edge_layer_in(c, l);
    int R = edge_layer_hidden(c, l);
    size_t w2 = 2 * (size_t)W;
    char name[64], text[128];
    float *rest;
    snprintf(name, sizeof name, "SDE_3Dto2D_model.edge_score_network.layers.%d", l);
    n->first = (Linear){in, C * 4 * W, n->first.w, n->first.b};
    for (int k = 0; k < 2 * C; k++)
        place(t, GROUP_3D, k ? &rest : &n->first.w, w2, (size_t)in, START_XAVIER, 0,
              "%s.attn.%d.func_%c.layers.0.weight", name, k / 2, "qk"[k % 2]);
    for (int k = 0; k < 2 * C; k++)
        place(t, GROUP_3D, k ? &rest : &n->first.b, 0, w2, START_ZERO, 0,
              "%s.attn.%d.func_%c.layers.0.bias", name, k / 2, "qk"[k % 2]);
    for (int k = 0; k < 2 * C; k++) {
        snprintf(text, sizeof text, "%s.attn.%d.func_%c.layers.1", name, k / 2, "qk"[k % 2]);
        place_linear(t, GROUP_3D, &n->second[k], 2 * W, 2 * W, START_XAVIER, text);
    }
    for (int k = 0; k < C; k++)
        place(t, GROUP_3D, k ? &rest : &n->value_w, (size_t)in, (size_t)W, START_XAVIER, 0,
              "%s.attn.%d.func_v.weight", name, k);
    for (int k = 0; k < C; k++)
        place(t, GROUP_3D, k ? &rest : &n->value_b, 0, (size_t)W, START_ZERO, 0,
              "%s.attn.%d.func_v.bias", name, k);
    snprintf(text, sizeof text, "%s.multi_channel", name);
    place_mlp(t, GROUP_3D, n->nodes, (int[]){W * C, R, W}, 2, text);
    snprintf(text, sizeof text, "%s.mlp", name);
    place_mlp(t, GROUP_3D, n->pairs, (int[]){2 * C, R, R, to2d_channels(c, l + 1)}, 3, text);
}

static void to2d_place(Table *t, To2d *n, const Shape *c) {
    int D = c->dim, W = c->width, Ct = to2d_all_channels(c), Cn = to2d_all_nodes(c);
    place_linear(t, GROUP_3D, &n->embed_x, V, D, START_DEFAULT, "SDE_3Dto2D_model.embedding_X");
    place_linear(t, GROUP_3D, &n->embed_y, D, D, START_DEFAULT, "SDE_3Dto2D_model.embedding_3D");
    for (int l = 0; l < EDGE_LAYERS; l++) edge_layer_place(t, &n->edge[l], c, l);
    place_mlp(t, GROUP_3D, n->pairs, (int[]){Ct, 2 * Ct, 2 * Ct, 1}, 3,
              "SDE_3Dto2D_model.edge_score_network.final");
    for (int l = 0; l < NODE_LAYERS; l++) {
        const char *name = numbered("SDE_3Dto2D_model.node_score_network.layers.%d", l, 0);
        place(t, GROUP_3D, &n->node_w[l], (size_t)(l ? W : D), (size_t)W, START_XAVIER, 0,
              "%s.weight", name);
        place(t, GROUP_3D, &n->node_b[l], 0, (size_t)W, START_ZERO, 0, "%s.bias", name);
    }
    place_mlp(t, GROUP_3D, n->nodes, (int[]){Cn, 2 * Cn, 2 * Cn, V}, 3,
              "SDE_3Dto2D_model.node_score_network.final");
}

static void head_place(Table *t, Linear *l, const Shape *c) {
    place_linear(t, GROUP_2D, l, c->dim, c->tasks, START_DEFAULT, "graph_pred_linear");
}

// Dies unless the sizes make a model.
static void shape_check(const Shape *c) {
    CHECK(c->layers >= 1 && c->layers <= MAX_DEPTH && c->blocks >= 1 && c->blocks <= MAX_DEPTH,
          "--layers, --blocks: expected 1 to %d", MAX_DEPTH);
    CHECK(c->hidden % HEADS == 0, "--hidden: expected a multiple of %d, found %d", HEADS,
          c->hidden);
    CHECK(c->width % 4 == 0, "--width: expected a multiple of 4, found %d", c->width);
    CHECK(c->channels >= 1 && c->channels <= MAX_CHANNELS && c->last_channels >= 1 &&
          c->last_channels <= MAX_CHANNELS, "--channels: expected 1 to %d", MAX_CHANNELS);
    CHECK(c->gaussians >= 2, "--gaussians: expected 2 or more, found %d", c->gaussians);
}

// Walks through the tensors of a model, group by group. Returns how many there are.
static int nets_place(Nets *n, float *arena, TensorInfo *info, const Shape *c,
                      size_t group_end[GROUPS]) {
    Table t = {.arena = arena, .info = info};
    for (int group = 0; group < GROUPS; group++) {
        t.group = (Group)group;
        if (!c->tasks || !c->use_3d) gin_place(&t, &n->gin, c);
        if (!c->tasks || c->use_3d) schnet_place(&t, &n->schnet, c);
        if (!c->tasks) {
            to3d_place(&t, &n->to3d, c);
            to2d_place(&t, &n->to2d, c);
        } else {
            head_place(&t, &n->head, c);
        }
        group_end[group] = t.offset;
    }
    return t.n;
}

// A model with zero parameters; with gradients and moments if it is to be trained. The caller calls
// sde_free().
static void sde_create(Sde *s, Shape shape, int training) {
    Model *m = &s->model;
    const char *hint = "a smaller model";
    shape_check(&shape);
    s->shape = shape;
    s->no_pairs = shape.tasks && !shape.use_3d;
    s->no_edges = shape.tasks > 0;
    m->n_tensors = nets_place(&s->p, NULL, NULL, &shape, s->group_end);
    m->count = s->group_end[GROUPS - 1];
    m->info = xmalloc((size_t)m->n_tensors, sizeof *m->info);
    m->params = floats_alloc(m->count, hint);
    nets_place(&s->p, m->params, m->info, &shape, s->group_end);
    if (!training) return;
    m->grads = floats_alloc(m->count, hint);
    m->m = floats_alloc(m->count, hint);
    m->v = floats_alloc(m->count, hint);
    nets_place(&s->g, m->grads, NULL, &shape, s->group_end);
}

// Random initial values of all tensors, each named by its place in the table.
static void sde_init(Sde *s, uint64_t seed) {
    for (int i = 0; i < s->model.n_tensors; i++) {
        const TensorInfo *t = &s->model.info[i];
        float *x = s->model.params + t->offset;
        double bound = 1;
        switch ((int)t->rule) {
            case START_DEFAULT: bound = 1 / sqrt((double)t->field); break;  // columns of the weight
            case START_XAVIER: bound = sqrt(6 / (double)(t->rows + t->columns)); break;
            default: break;
        }
        for (size_t k = 0; k < t->count; k++) {
            uint32_t place = (uint32_t)i, index = (uint32_t)k;
            switch ((int)t->rule) {
                case START_NORMAL: x[k] = rng_normal(seed, RNG_INIT, 0, place, index); break;
                case START_ZERO: x[k] = 0; break;
                case START_ONE: x[k] = 1; break;
                default:
                    x[k] = (float)(bound * (2 * (double)rng_uniform(seed, RNG_INIT, 0, place,
                                                                    index) - 1));
            }
        }
    }
}

// ---- batches

// `count` elements in the place of x (whose content is lost), of which *room bytes were allocated.
static void *fresh(void *x, size_t *room, size_t count, size_t size) {
    if (mul_size(count, size) <= *room && x) return x;
    free(x);
    *room = mul_size(count, size);
    return xmalloc(count, size);
}

static void mols_free(Mols *m) {
    for (size_t b = 0; b < m->molecule_room; b++) molecule_free(&m->molecule[b]);
    free(m->molecule);
#define X(type, field, count) free(m->field);
    MOLS_ARRAYS(X)
    EDGE_ARRAYS(X)
#undef X
    *m = (Mols){0};
}

// Room for B molecules as read.
static void mols_reserve(Mols *m, size_t B) {
    if (B <= m->molecule_room) return;
    m->molecule = xrealloc(m->molecule, B, sizeof *m->molecule);
    memset(m->molecule + m->molecule_room, 0, (B - m->molecule_room) * sizeof *m->molecule);
    m->molecule_room = B;
}

// ---- activations

static size_t buffers_place(Sde *s, float *at) {
    const Shape *c = &s->shape;
    const Mols *m = &s->mols;
    Buffers *a = &s->a;
    const size_t D = (size_t)c->dim, L = (size_t)c->layers, F = (size_t)c->filters;
    const size_t K = (size_t)c->gaussians, T = (size_t)c->blocks, H = (size_t)c->hidden;
    const size_t W = (size_t)c->width, Ct = (size_t)to2d_all_channels(c), Y = (size_t)c->tasks;
    const size_t Cn = (size_t)to2d_all_nodes(c), Cmax = (size_t)max_int(2, c->channels);
    const size_t R = 2 * max_size(Cmax, (size_t)c->last_channels), B = m->B, A = m->A;
    const size_t P = s->no_pairs ? 0 : m->P, E = s->no_edges ? 0 : m->E;
    size_t used = 0;
#define ROOM(pointer, count)                                                                       \
    {                                                                                              \
        if (at) pointer = at + used;                                                               \
        used += ((count) + 15 + VEC) / 16 * 16;                                                    \
    }
#define X(field, count) ROOM(a->field, count)
#define HIDDEN(field, layers, count)                                                               \
    for (size_t k = 0; k < (size_t)(layers); k++) {                                                \
        ROOM(a->field[k].pre, count)                                                               \
        ROOM(a->field[k].act, count)                                                               \
    }
    BUFFER_ARRAYS(X, HIDDEN)
#undef X
#undef HIDDEN
#undef ROOM
    if (at) a->x = a->gin_h + L * A * D;
    return used;
}

// Memory for the batch at hand; it only grows.
static void buffers_layout(Sde *s) {
    const char *hint = "a lower --batch-size";
    Buffers *a = &s->a;
    size_t count = buffers_place(s, NULL), N = (size_t)s->mols.N;
    size_t width = (size_t)padded(s->mols.N), keys = 2 * (2 * (size_t)s->shape.width + 1) * width;
    a->scratch = N * (3 * N + 3) + keys;
    if (count > a->room) {
        memory_check(sizeof(float) * count, "this batch", hint);
        free(a->memory);
        a->memory = floats_alloc(count, hint);
        a->room = count;
    }
    a->bytes = sizeof(float) * a->room;
    buffers_place(s, a->memory);
}

static void sde_free(Sde *s) {
    model_free(&s->model);
    mols_free(&s->mols);
    free(s->a.memory);
    *s = (Sde){0};
}

// =================================================================================================
// 13 Checkpoints: parameters and running statistics under the official names. A state for --resume
//   also holds Adam's moments, the best parameters of fine-tuning, and the log.
// =================================================================================================

enum { STATES = 4 };
static const char *const STATE_PREFIXES[STATES] = {"", "exp_avg.", "exp_avg_sq.", "best."};

// Writes the arenas that are not NULL, then the log if it has rows.
static void sde_write(const char *path, const Sde *s, float *const arenas[STATES],
                      const TensorOut *tables, size_t n_tables, const char *meta) {
    const Model *m = &s->model;
    TensorOut *out = xmalloc(STATES * (size_t)m->n_tensors + n_tables, sizeof *out);
    size_t n = 0, named;
    for (int a = 0; a < STATES; a++)
        for (int k = 0; k < m->n_tensors && arenas[a]; k++) {
            const TensorInfo *t = &m->info[k];
            out[n++] = (TensorOut){xprintf("%s%s", STATE_PREFIXES[a], t->name), t->rows,
                                   t->columns, arenas[a] + t->offset};
        }
    named = n;
    for (size_t k = 0; k < n_tables; k++)
        if (tables[k].rows) out[n++] = tables[k];
    tensor_file_write(path, out, n, meta);
    for (size_t k = 0; k < named; k++) free(out[k].name);
    free(out);
}

// Copies all tensors of an arena from a file; dies if one is missing.
static void sde_load(const Sde *s, float *arena, const TensorFile *f, const char *prefix) {
    for (int i = 0; i < s->model.n_tensors; i++)
        CHECK(tensor_load(arena, &s->model.info[i], f, prefix), "%s: tensor %s%s is missing",
              f->path, prefix, s->model.info[i].name);
}

// Dimension `axis` of a tensor that a file may have; 0: it has not.
static int file_size(const TensorFile *f, const char *name, int axis) {
    const TensorEntry *t = tensor_find(f, name);
    if (!t) return 0;
    CHECK(t->rank == 2 && t->shape[axis] >= 1 && t->shape[axis] <= 1 << 16,
          "%s: tensor %s: expected a matrix of sensible size", f->path, name);
    return (int)t->shape[axis];
}

// How many layers there are, by the tensors of this pattern.
static int file_layers(const TensorFile *f, const char *pattern) {
    int l = 0;
    while (l < MAX_DEPTH && tensor_find(f, numbered(pattern, l, 0))) l++;
    return l;
}

// The sizes of the model in a file; those of networks that it lacks keep the release's.
static Shape file_shape(const TensorFile *f, Shape c) {
#define SIZE(field, name, axis) if (file_size(f, name, axis)) c.field = file_size(f, name, axis)
    SIZE(dim, "model_2D.atom_encoder.atom_embedding_list.0.weight", 1);
    SIZE(dim, "model_3D.embedding.weight", 1);
    SIZE(filters, "model_3D.interactions.0.mlp.0.weight", 0);
    SIZE(gaussians, "model_3D.interactions.0.mlp.0.weight", 1);
    SIZE(hidden, "SDE_2Dto3D_model.node_emb.layers.0.weight", 0);
    SIZE(width, "SDE_3Dto2D_model.node_score_network.layers.0.weight", 1);
    SIZE(channels, "SDE_3Dto2D_model.edge_score_network.layers.0.mlp.layers.2.weight", 0);
    SIZE(last_channels, "SDE_3Dto2D_model.edge_score_network.layers.3.mlp.layers.2.weight", 0);
#undef SIZE
    int layers = file_layers(f, "model_2D.gnns.%d.mlp.0.weight");
    int blocks = file_layers(f, "model_3D.interactions.%d.lin.weight");
    CHECK(layers + blocks > 0, "%s: not a MoleculeSDE model: expected tensors model_2D.* or "
          "model_3D.*", f->path);
    if (layers) c.layers = layers;
    if (blocks) c.blocks = blocks;
    if (file_size(f, "SDE_2Dto3D_model.node_emb.layers.0.weight", 0))
        c.gate = file_size(f, "SDE_2Dto3D_model.input_mlp.layers.0.weight", 0) > 0;
    c.tasks = file_size(f, "graph_pred_linear.weight", 0);
    c.use_3d = c.tasks && layers == 0;
    shape_check(&c);
    return c;
}

// Dies, before memory is taken, if a file has too few bytes for a model of its sizes.
static void shape_fits(const Shape *c, const TensorFile *f) {
    size_t group_end[GROUPS];
    Nets n = {0};
    nets_place(&n, NULL, NULL, c, group_end);
    CHECK(group_end[GROUPS - 1] <= f->size / 2,  // two bytes of F16 or more each
          "%s: damaged: its tensors' shapes make a model of %zu numbers, which it cannot hold",
          f->path, group_end[GROUPS - 1]);
}

// Copies the encoder that a checkpoint shares with a fine-tuning model.
static void sde_transfer(const Sde *s, const char *path) {
    TensorFile f;
    tensor_file_open(&f, path);
    for (int i = 0; i < s->model.n_tensors; i++) {
        const TensorInfo *t = &s->model.info[i];
        CHECK(tensor_load(s->model.params, t, &f, "") || strstr(t->name, "graph_pred"),
              "%s: tensor %s is missing", path, t->name);
    }
    tensor_file_close(&f);
}

#ifndef MOLECULESDE_TEST

// =================================================================================================
// 14 Runs: one loop for pretraining and fine-tuning
// =================================================================================================

// What the command line sets; the initial values are the defaults.
typedef struct {
    const char *output, *valid, *test, *init, *model, *task, *encoder, *sde, *edges;
    int64_t dim, layers, filters, gaussians, blocks, hidden, width, channels, last_channels;
    int64_t steps, epochs, batch, seed, threads, save_every, copies, sample_steps;
    double scale_3d;
    int resume, help;
    Method method;
    Adam adam;
} Options;

static Options opt = {
    .sde = "ve", .edges = "gated",
    .dim = 300, .layers = 5, .filters = 128, .gaussians = 51, .blocks = 6, .hidden = 32,
    .width = 16, .channels = 8, .last_channels = 4,
    .steps = 600, .epochs = 100, .batch = 0, .seed = 1, .save_every = 100,
    .copies = 10, .sample_steps = 1000, .scale_3d = 1,
    .method = {0, {0.2, 1}, {0.1, 1}, {0.2, 1}, 0, 0.1, 0.5, 1, 1, 1},
    .adam = {5e-4, 0.9, 0.999, 1e-8, 0, 0},
};

static const char *const SDE_NAMES[] = {"ve", "vp"};
static const char *const EDGE_NAMES[] = {"plain", "gated"};
static const char *const ENCODER_NAMES[] = {"2d", "3d"};
static const char *const KIND_NAMES[] = {"classification", "regression"};

// Index of `text` among two names, or the end of the program.
static int name_index(const char *option, const char *text, const char *const names[2]) {
    for (int k = 0; k < 2; k++)
        if (strcmp(text, names[k]) == 0) return k;
    DIE("%s: expected %s or %s, found \"%s\"", option, names[0], names[1], text);
}

static Shape option_shape(void) {
    return (Shape){(int)opt.dim, (int)opt.layers, (int)opt.filters, (int)opt.gaussians,
                   (int)opt.blocks, (int)opt.hidden, (int)opt.width, (int)opt.channels,
                   (int)opt.last_channels, name_index("--edges", opt.edges, EDGE_NAMES), 0, 0};
}

enum { LOG_LR = TERMS, LOG_NORM, LOG_RATE, LOG_COLUMNS };       // a row a step
enum { EPOCH_LOSS, EPOCH_VALID, EPOCH_BEST, EPOCH_COLUMNS };    // a row an epoch of fine-tuning

typedef struct {
    Sde s;
    Dataset train, valid, test;  // opened if their path is set; of --model: test
    int tuning, judged;          // judged: the validation set can judge; else the loss does
    Aim aim;                     // of fine-tuning
    float *statistics;           // (3, Y) of training labels: mean, deviation, first bias (tuning)
    uint32_t *order, *ids;       // permutation of the training set in `epoch`; molecules of a batch
    int64_t epoch, done, steps, epochs, shown;  // done: updates; shown: rows in the CSV
    float *log, *history, *best;
    char *state_path, *log_path;
    FILE *csv;
    OutFile lock;                // held from start to end: two runs may not write the same files
    TensorFile file;             // the state of a resumed run, or --model
    uint32_t init_print;         // file_print() of --init when the run began
} Run;

// Called for B molecules of a dataset, from `first` on, that stand in run->s.mols.
typedef void Visit(Run *run, size_t first, size_t B, void *result);

// Goes through a dataset, batch by batch, in order, in evaluation mode.
static void visit_batches(Run *run, const Dataset *data, size_t most, Visit *visit, void *result) {
    size_t n = data->count < most ? data->count : most;
    run->s.training = 0;
    for (size_t i = 0, B; i < n; i += B) {
        B = n - i < (size_t)opt.batch ? n - i : (size_t)opt.batch;
        for (size_t b = 0; b < B; b++) run->ids[b] = (uint32_t)(i + b);
        threads_adapt();
        run->s.draws = (Draws){(uint64_t)opt.seed, UINT32_MAX, (uint32_t)i, 0};
        mols_load(&run->s.mols, data, run->ids, B, run->s.shape.tasks);
        visit(run, i, B, result);
    }
    run->s.training = 1;
}

typedef struct { double sum[TERMS], count; int chance; } LossSums;

// Losses of a batch; or by chance: if the networks said 0 and no vector told anything.
static void visit_losses(Run *run, size_t first, size_t B, void *result) {
    LossSums *all = result;
    Sde *s = &run->s;
    double loss[TERMS] = {0};
    (void)first;
    mols_draw(s);
    if (all->chance) {
        mols_noised(s);
        buffers_layout(s);
        memset(s->a.eps_hat, 0, sizeof(float) * 3 * s->mols.A);
        memset(s->a.m_x, 0, sizeof(float) * V * s->mols.A);
        memset(s->a.m_adj, 0, sizeof(float) * s->mols.P);
        to3d_loss(loss, s);
        to2d_loss(loss, s);
        loss[TERM_CONTRAST] = 2 * log(2);
        loss[TERM_ACCURACY] = 0.5;
        loss_total(loss, &s->method);
    } else {
        losses(loss, s);
    }
    for (int k = 0; k < TERMS; k++) all->sum[k] += loss[k] * (double)B;
    all->count += (double)B;
}

// Predictions in the labels' units, or logits, (n, Y).
static void visit_predictions(Run *run, size_t first, size_t B, void *result) {
    size_t Y = (size_t)run->s.shape.tasks;
    float *out = (float *)result + first * Y;
    task_forward(&run->s);
    for (size_t k = 0; k < B * Y; k++) {
        out[k] = run->s.a.logits[k];
        if (run->aim.kind == TASK_REGRESSION)
            out[k] = out[k] * run->aim.std[k % Y] + run->aim.mean[k % Y];
    }
}

// What data_metrics() is asked for: metrics of predictions, those of them by which an epoch is
// chosen (without tasks that cannot judge), or metrics of constant predictions.
typedef enum { OF_MODEL, OF_CHOICE, OF_CHANCE } Asked;

// Mean metrics over the tasks of a dataset in which they are defined.
static void data_metrics(double mean[METRICS], Run *run, const Dataset *data, Asked asked) {
    size_t Y = (size_t)run->s.shape.tasks, n = data->count;
    float *out = xmalloc(n * Y, sizeof *out), *labels = dataset_labels(data);
    int units = Y > 1 && run->aim.kind == TASK_REGRESSION;  // errors are in deviations, not in them
    double one[METRICS], count[METRICS] = {0};
    if (asked != OF_CHANCE) visit_batches(run, data, SIZE_MAX, visit_predictions, out);
    if (asked == OF_CHOICE) labels_judge(labels, data, NULL, NULL);
    for (size_t k = 0; k < n * Y; k++) {
        if (asked == OF_CHANCE) out[k] = run->aim.mean[k % Y];
        CHECK(isfinite(out[k]), "%s: molecule %zu: the prediction is no number; try a lower --lr",
              data->path, k / Y);
        if (units) out[k] /= run->aim.std[k % Y], labels[k] /= run->aim.std[k % Y];
    }
    for (int k = 0; k < METRICS; k++) mean[k] = 0;
    for (size_t y = 0; y < Y; y++) {
        task_metrics(one, run->aim.kind, out, labels, n, Y, y);
        for (int k = 0; k < METRICS; k++)
            if (!isnan(one[k])) mean[k] += one[k], count[k] += 1;
    }
    for (int k = 0; k < METRICS; k++) mean[k] = count[k] > 0 ? mean[k] / count[k] : (double)NAN;
    free(out);
    free(labels);
}

// ---- saving and resuming

static char *options_text(unsigned kind);  // section 15
static void options_from_state(const char *text, const char *path);

enum { PRETRAIN = 1, FINETUNE = 2, PREDICT = 4, EMBED = 8, GENERATE = 16, TRAIN = 3,
       READ = PREDICT | EMBED | GENERATE, SHAPES = 64, GROWS = 128, FILES = 256, METHOD = 512 };

// Metadata of a checkpoint or state: where the run is, its options, the task.
static char *run_meta(const Run *run, int of_state) {
    Text t = {0};
    const char *const keys[] = {"step", "molecules", DATA_KEYS[0], DATA_KEYS[1], DATA_KEYS[2],
                                "init_fingerprint"};
    const long long values[] = {run->done, (long long)run->train.count, data_print(&run->train),
                                data_print(&run->valid), data_print(&run->test), run->init_print};
    char *options = options_text(SHAPES | FILES), *method = options_text(METHOD);
    text_add(&t, "{");
    text_add_meta(&t, "format", "pt");
    for (int k = 0; k < (of_state ? 6 : 3); k++) text_add_meta(&t, keys[k], "%lld", values[k]);
    text_add_meta(&t, "run", "%s", options);
    text_add_meta(&t, "method", "%s", method);
    text_add_meta(&t, "stereo", "%s", run->train.stereo);
    free(options);
    free(method);
    if (run->tuning) {
        text_add_meta(&t, "task", "%s", KIND_NAMES[run->aim.kind]);
        text_add_tasks(&t, run->s.shape.tasks, run->train.task_names, run->aim.mean, run->aim.std);
    }
    text_add(&t, "}");
    return t.text;
}

// Adds the rows to the CSV that it has not yet.
static void log_write(Run *run) {
    int64_t end = run->tuning ? run->epochs : run->done, n = run->tuning ? EPOCH_COLUMNS
                                                                         : LOG_COLUMNS;
    if (!run->csv) {
        run->csv = fopen(run->log_path, "w");
        CHECK(run->csv, "%s: cannot write: %s", run->log_path, strerror(errno));
        fprintf(run->csv, "%s", run->tuning ? "epoch,loss,valid,best_epoch" : "step");
        for (int k = 0; k < TERMS && !run->tuning; k++) fprintf(run->csv, ",%s", TERM_NAMES[k]);
        fprintf(run->csv, "%s\n", run->tuning ? "" : ",lr,gradient_norm,molecules_per_second");
    }
    for (; run->shown < end; run->shown++) {
        const float *row = (run->tuning ? run->history : run->log) + run->shown * n;
        fprintf(run->csv, "%lld", (long long)run->shown + 1);
        for (int64_t k = 0; k < n; k++)
            if (run->tuning && !run->judged && k == EPOCH_VALID) fprintf(run->csv, ",");
            else fprintf(run->csv, ",%.6g", (double)row[k]);
        fprintf(run->csv, "\n");
    }
    CHECK(fflush(run->csv) == 0 && !ferror(run->csv), "%s: write failed: %s", run->log_path,
          strerror(errno));
}

// Writes the state, which is complete in itself.
static void state_write(const Run *run) {
    const Model *m = &run->s.model;
    TensorOut tables[2];  // without the empty ones
    size_t n_tables = 0;
    if (run->done)
        tables[n_tables++] = (TensorOut){"log", (size_t)run->done, LOG_COLUMNS, run->log};
    if (run->epochs)
        tables[n_tables++] =
            (TensorOut){"history", (size_t)run->epochs, EPOCH_COLUMNS, run->history};
    float *const all[STATES] = {m->params, m->m, m->v, run->best};
    char *meta = run_meta(run, 1);
    sde_write(run->state_path, &run->s, all, tables, n_tables, meta);
    free(meta);
}

// Writes the state, then the checkpoint.
static void run_save(Run *run) {
    float *const one[STATES] = {run->epochs ? run->best : run->s.model.params};
    char *meta = run_meta(run, 0);
    state_write(run);
    sde_write(opt.output, &run->s, one, NULL, 0, meta);
    log_write(run);
    free(meta);
}

// Continues the run whose state was opened by run_open().
static void run_load(Run *run) {
    Model *m = &run->s.model;
    float *const all[STATES] = {m->params, m->m, m->v, run->best};
    run->done = tensor_rows(run->log, run->steps, LOG_COLUMNS, &run->file, "log");
    if (run->tuning)
        run->epochs = tensor_rows(run->history, opt.epochs, EPOCH_COLUMNS, &run->file, "history");
    CHECK(run->done == meta_whole(&run->file, "step"), "%s: damaged state: the log does not fit "
          "the step", run->file.path);
    CHECK(!run->tuning || run->epochs == run->done * opt.batch / (int64_t)run->train.count,
          "%s: damaged state: the history does not fit the log", run->file.path);
    for (int64_t i = 0; i < run->epochs; i++) {  // finetune_after_step() looks the best epoch up
        float best = run->history[i * EPOCH_COLUMNS + EPOCH_BEST];
        CHECK(best >= 1 && best <= (float)(i + 1), "%s: damaged state: row %lld of the history",
              run->file.path, (long long)i);
    }
    for (int a = 0; a < STATES; a++)
        if (all[a]) sde_load(&run->s, all[a], &run->file, STATE_PREFIXES[a]);
    tensor_file_close(&run->file);
    fprintf(stderr, "resumed after step %lld\n", (long long)run->done);
}

// Opens the state of the run to be resumed, if there is one, and takes its options.
static void run_open_state(Run *run) {
    const char *asked = opt.init;
    if (access(run->state_path, F_OK) != 0) {
        fprintf(stderr, "resume  nothing is saved in %s: this run starts afresh\n",
                run->state_path);
        return;
    }
    tensor_file_open(&run->file, run->state_path);
    options_from_state(required_meta(&run->file, "run", "the state of a run"), run->state_path);
    run->init_print = (uint32_t)meta_whole(&run->file, "init_fingerprint");
    if (asked)
        same_print(run->state_path, run->init_print, file_print(asked), "checkpoint (--init)",
                   asked);
}

// Dies if a dataset lacks the positions that are needed.
static void check_positions(const Dataset *data) {
    size_t without = 0, first = 0;
    for (size_t i = data->count; i-- > 0;)
        if (!dataset_has_pos(data, i)) without++, first = i;
    if (without == 0) return;
    Molecule m = {0};
    dataset_read(data, first, &m);
    DIE("%s: %zu of %zu molecules have no positions, the first is %s: leave them out with "
        "data_prep --skip-list, or if they are flat, mark their SD records as 3D", data->path,
        without, data->count, m.name);
}

// Opens the datasets of a run and claims its output.
static void run_open(Run *run, const char *train_path, int64_t batch) {
    dataset_open(&run->train, train_path);
    int64_t n = (int64_t)run->train.count;
    CHECK(n > 0, "%s: the dataset is empty", train_path);
    run->state_path = xprintf("%s.state", opt.output);
    run->log_path = path_with(opt.output, ".safetensors", ".log.csv");
    run_claim(&run->lock, opt.output, "step,total,contrast,|epoch,loss,valid,best_epoch\n");
    if (opt.resume) run_open_state(run);
    if (!run->file.path) run->init_print = file_print(opt.init);
    dataset_open_part(&run->valid, opt.valid, &run->train);
    dataset_open_part(&run->test, opt.test, &run->train);
    if (run->file.path) same_data(&run->file, &run->train, &run->valid, &run->test);
    CHECK(opt.batch <= n, "--batch-size: %lld is more than the %lld molecules of %s",
          (long long)opt.batch, (long long)n, train_path);
    if (!opt.batch) opt.batch = n < batch ? n : batch;
    if (!MB_OPTIMIZED)
        fprintf(stderr, "note    built without optimisation, many times slower: use make, or -O3\n");
    note_stereo(&run->valid, train_path, run->train.stereo);
    note_stereo(&run->test, train_path, run->train.stereo);
    opt.method.vp = name_index("--sde", opt.sde, SDE_NAMES);
    run->s.method = opt.method;
    if (!run->tuning) run->s.method.dropout = 0;
    run->epoch = -1;
    run->order = xmalloc(run->train.count, sizeof *run->order);
    run->ids = xmalloc((size_t)opt.batch, sizeof *run->ids);
    run->steps = run->tuning ? (opt.epochs * n + opt.batch - 1) / opt.batch : opt.steps;
    run->log = xmalloc((size_t)run->steps, LOG_COLUMNS * sizeof *run->log);
}

// A dataset, model and method for --model FILE.
static void run_open_model(Run *run, const char *path) {
    CHECK(opt.model, "--model: expected a checkpoint");
    dataset_open(&run->test, path);
    tensor_file_open(&run->file, opt.model);
    const char *method = tensor_meta(&run->file, "method");
    if (method) options_from_state(method, opt.model);
    opt.method.vp = name_index("--sde", opt.sde, SDE_NAMES);
    Shape c = file_shape(&run->file, option_shape());
    shape_fits(&c, &run->file);
    sde_create(&run->s, c, 0);
    sde_load(&run->s, run->s.model.params, &run->file, "");
    note_stereo(&run->test, opt.model, tensor_meta(&run->file, "stereo"));
    run->s.method = opt.method;
    if (!opt.batch) opt.batch = 64;
    run->ids = xmalloc((size_t)opt.batch, sizeof *run->ids);
}

static void run_close(Run *run) {
    if (run->lock.file) out_discard(&run->lock);
    dataset_close(&run->train);
    dataset_close(&run->valid);
    dataset_close(&run->test);
    tensor_file_close(&run->file);
    sde_free(&run->s);
    if (run->csv) fclose(run->csv);
    void *const memory[] = {run->order, run->ids, run->log, run->history, run->best,
                            run->statistics, run->state_path, run->log_path};
    for (size_t k = 0; k < sizeof memory / sizeof memory[0]; k++) free(memory[k]);
}

// ---- the loop

// One update; fills the step's row of the log.
static void run_step(Run *run) {
    double start = now_seconds(), loss[TERMS] = {0}, norm;
    Sde *s = &run->s;
    Adam adam = opt.adam;
    Draws draws = {(uint64_t)opt.seed, (uint32_t)run->done, 0, 1};
    threads_adapt();
    epoch_ids(&run->epoch, run->order, run->ids, run->done, opt.batch, run->train.count,
              (uint64_t)opt.seed);
    if (run->tuning) {
        double epoch = floor((double)(run->done * opt.batch) / (double)run->train.count);
        adam.lr *= (1 + cos(3.141592653589793 * epoch / (double)opt.epochs)) / 2;
        s->draws = draws;
        s->training = 1;
        mols_load(&s->mols, &run->train, run->ids, (size_t)opt.batch, s->shape.tasks);
        task_forward(s);
        loss[TERM_TOTAL] = head_loss(s, &run->aim);
        task_backward(s);
        norm = update(s, &adam, 1, run->done + 1);
    } else {
        norm = sde_step(loss, s, &run->train, run->ids, (size_t)opt.batch, &adam, opt.scale_3d,
                        &draws, run->done + 1);
    }
    CHECK(isfinite(loss[TERM_TOTAL]) && norm < 1e18, "step %lld: the loss is no longer a number. "
          "What was saved before is kept. Try a lower --lr", (long long)run->done + 1);
    float *row = run->log + run->done++ * LOG_COLUMNS;
    for (int k = 0; k < TERMS; k++) row[k] = (float)loss[k];
    row[LOG_LR] = (float)adam.lr;
    row[LOG_NORM] = (float)norm;
    row[LOG_RATE] = (float)((double)opt.batch / fmax(now_seconds() - start, 1e-6));
}

// Of pretraining: a line on stdout a twentieth of the way.
static void pretrain_after_step(const Run *run, int terminal) {
    int64_t every = run->steps / 20 > 0 ? run->steps / 20 : 1, n = run->done;
    if (n != 1 && n % every && n != run->steps) return;
    double mean[LOG_COLUMNS];
    rows_mean(mean, run->log, LOG_COLUMNS, n == 1 ? 0 : n - (n % every ? n % every : every), n);
    if (terminal) fprintf(stderr, "\r\033[K");
    printf("%7lld  %8.4f  %8.4f %8.4f %8.4f %8.4f  %8.3f %8.3f %7.0f\n", (long long)n,
           mean[TERM_TOTAL], mean[TERM_CONTRAST], mean[TERM_3D], mean[TERM_ELEMENTS],
           mean[TERM_BONDS], mean[TERM_ACCURACY], mean[LOG_NORM], mean[LOG_RATE]);
    fflush(stdout);
}

// Of fine-tuning, at the end of an epoch: a row of the history; parameters are kept if they are the
// best on the validation set.
static void finetune_after_step(Run *run, int terminal) {
    int64_t n = (int64_t)run->train.count, epoch = run->done * opt.batch / n;
    if (epoch == (run->done - 1) * opt.batch / n) return;
    double mean[LOG_COLUMNS], metric[METRICS];
    int number = run->aim.kind == TASK_CLASSIFICATION ? METRIC_AUC : METRIC_MAE;
    float *row = run->history + run->epochs * EPOCH_COLUMNS, *last = row - EPOCH_COLUMNS;
    data_metrics(metric, run, &run->valid, OF_CHOICE);
    rows_mean(mean, run->log, LOG_COLUMNS, (epoch - 1) * n / opt.batch, run->done);
    float valid = (float)(run->judged ? metric[number] : mean[TERM_TOTAL]), best = NAN;
    if (run->epochs) best = run->history[(int)(last[EPOCH_BEST] - 1) * EPOCH_COLUMNS + EPOCH_VALID];
    int more = run->judged && number == METRIC_AUC;
    int better = isnan(best) || (more ? valid > best : valid < best);
    row[EPOCH_LOSS] = (float)mean[TERM_TOTAL];
    row[EPOCH_VALID] = valid;
    row[EPOCH_BEST] = better ? (float)epoch : last[EPOCH_BEST];
    run->epochs++;
    if (better) memcpy(run->best, run->s.model.params, sizeof(float) * run->s.model.count);
    if (terminal) fprintf(stderr, "\r\033[K");
    printf("%6lld %9s %10s%s\n", (long long)epoch, number_text(mean[TERM_TOTAL], 4),
           run->judged ? number_text((double)valid, 4) : "-", better ? "  best so far" : "");
    fflush(stdout);
}

// Updates run->done..run->steps-1, or as far as a signal lets it come; ends the program, saved, if
// there was one. Before the first the state is written: from here on --resume means this run.
static void run_train(Run *run) {
    Progress progress = progress_begin((double)run->done);
    int64_t first = run->done;
    char text[96];
    signals_catch();
    if (!run->done) state_write(run);
    while (run->done < run->steps && !mb_signal) {
        run_step(run);
        if (run->tuning) finetune_after_step(run, progress.terminal);
        else pretrain_after_step(run, progress.terminal);
        log_write(run);
        if (run->done < run->steps && run->done % opt.save_every == 0) run_save(run);
        snprintf(text, sizeof text, "step %lld of %lld", (long long)run->done,
                 (long long)run->steps);
        progress_show(&progress, (double)run->done, (double)run->steps,
                      (double)(run->done - first) * (double)opt.batch, "molecules", text,
                      run->tuning && run->done == run->steps);
    }
    if (progress.terminal) fprintf(stderr, "\r\033[K");
    run_save(run);
    if (!mb_signal) return;
    fprintf(stderr, "stopped by a signal and saved after step %lld; to go on, give the same "
            "command with --resume\n", (long long)run->done);
    mb_exit(128 + mb_signal);
}

// =================================================================================================
// 15 Commands, options and main
// =================================================================================================

// ---- pretrain: ./moleculesde train.bin

static void command_pretrain(const char *train_path) {
    Run run = {0};
    run_open(&run, train_path, 64);
    check_positions(&run.train);
    check_positions(&run.valid);
    Shape c = option_shape();
    sde_create(&run.s, c, 1);
    if (run.file.path) {
        run_load(&run);
    } else if (opt.init) {
        tensor_file_open(&run.file, opt.init);
        sde_load(&run.s, run.s.model.params, &run.file, "");
        note_stereo(&run.train, opt.init, tensor_meta(&run.file, "stereo"));
        tensor_file_close(&run.file);
    } else {
        sde_init(&run.s, (uint64_t)opt.seed);
    }
    fprintf(stderr, "model   %d wide, GIN of %d layers, SchNet of %d blocks, %s, %s edges: %.2f M "
            "parameters\ndata    %s: %zu molecules; %s: %zu\nrun     %lld steps of %lld molecules "
            "(%.1f epochs) on %d thread%s\n", c.dim, c.layers, c.blocks, opt.sde, opt.edges,
            (double)run.s.group_end[GROUP_3D] / 1e6, train_path, run.train.count,
            opt.valid ? opt.valid : "no validation", run.valid.count, (long long)run.steps,
            (long long)opt.batch, (double)run.steps * (double)opt.batch / (double)run.train.count,
            thread_count(), thread_count() > 1 ? "s" : "");
    printf("   step     total  contrast   2d->3d elements    bonds  accuracy gradient   mol/s\n");
    run_train(&run);
    double start[LOG_COLUMNS], end[LOG_COLUMNS];
    int64_t window = run.steps / 50 + 1;
    LossSums valid = {{0}, 0, 0}, chance = {{0}, 0, 1};
    rows_mean(start, run.log, LOG_COLUMNS, 0, 1);
    rows_mean(end, run.log, LOG_COLUMNS, run.done > window ? run.done - window : 0, run.done);
    visit_batches(&run, &run.valid, SIZE_MAX, visit_losses, &valid);
    visit_batches(&run, run.valid.count ? &run.valid : &run.train, 4096, visit_losses, &chance);
    printf("\nloss        start     end   valid  by chance\n");
    for (int k = 1; k <= TERMS; k++) {
        int term = k % TERMS;  // the total last
        char shown[16] = "-";
        if (valid.count > 0) snprintf(shown, sizeof shown, "%.4f", valid.sum[term] / valid.count);
        printf("%-8s %8.4f%8.4f%8s%11.4f\n", TERM_NAMES[term], start[term], end[term], shown,
               chance.sum[term] / chance.count);
    }
    printf("wrote %s, %s\n", opt.output, run.log_path);
    run_close(&run);
}

// ---- finetune: ./moleculesde finetune train.bin --init FILE

// The kind of the labels, if --task does not say; their mean and deviation, task by task; and the
// bias that the head begins with, which is finite for a task of one class too.
static void label_statistics(Run *run) {
    const Dataset *data = &run->train;
    size_t Y = (size_t)data->n_tasks, n = data->count * Y, other = 0;
    float *labels = dataset_labels(data);
    for (size_t k = 0; k < n; k++) {
        CHECK(!(fabsf(labels[k]) > (float)LABEL_MAX), "%s: molecule %zu: task %s: label %g is "
              "beyond range; expected at most %g", data->path, k / Y, data->task_names[k % Y],
              (double)labels[k], LABEL_MAX);
        other += !isnan(labels[k]) && labels[k] != 0 && labels[k] != 1;
    }
    if (!opt.task) opt.task = KIND_NAMES[other > 0];
    run->aim.kind = (TaskKind)name_index("--task", opt.task, KIND_NAMES);
    int classes = run->aim.kind == TASK_CLASSIFICATION;
    CHECK(!classes || other == 0, "%s: expected labels 0 and 1 for --task classification",
          data->path);
    for (size_t y = 0; y < Y; y++) {
        LabelSummary s = label_summary(labels, data->count, Y, y);
        CHECK(s.count > 0, "%s: task %s has no labels", data->path, data->task_names[y]);
        if (s.deviation <= 0)
            fprintf(stderr, "note    %s: task %s: all labels are %g, there is nothing to learn\n",
                    data->path, data->task_names[y], s.mean);
        run->statistics[y] = classes ? 0 : (float)s.mean;
        run->statistics[Y + y] = classes || s.deviation <= 0 ? 1 : (float)s.deviation;
        double ones = fmin(fmax(s.mean, 0.5 / s.count), 1 - 0.5 / s.count);
        run->statistics[2 * Y + y] = classes ? (float)log(ones / (1 - ones)) : 0;
    }
    free(labels);
}

static void command_finetune(const char *train_path) {
    Run run = {.tuning = 1};
    run_open(&run, train_path, 128);
    size_t Y = (size_t)run.train.n_tasks;
    CHECK(opt.valid && run.valid.count, "--valid: expected a validation set, to choose the best "
          "epoch by");
    CHECK(Y > 0, "%s: expected molecules with labels (data_prep --labels)", train_path);
    dataset_same_tasks(&run.train, &run.valid);
    if (run.test.data) dataset_same_tasks(&run.train, &run.test);
    run.statistics = xmalloc(3 * Y, sizeof *run.statistics);
    run.aim.mean = run.statistics;
    run.aim.std = run.statistics + Y;
    label_statistics(&run);
    float *labels = dataset_labels(&run.valid);
    run.judged = labels_judge(labels, &run.valid, "no say in the choice of an epoch",
                              "the training loss chooses the epoch") > 0;
    free(labels);
    Shape c = option_shape();
    int use_3d = name_index("--encoder", opt.encoder, ENCODER_NAMES);
    if (run.file.path || opt.init) {  // a resumed run has its sizes in its state
        TensorFile init = {0}, *f = run.file.path ? &run.file : &init;
        if (f == &init) tensor_file_open(f, opt.init);
        c = file_shape(f, c);
        c.tasks = 1;  // the new head may be larger
        c.use_3d = use_3d;
        shape_fits(&c, f);
        if (f == &init) note_stereo(&run.train, opt.init, tensor_meta(f, "stereo"));
        tensor_file_close(&init);
    }
    c.tasks = (int)Y;
    c.use_3d = use_3d;
    for (int k = 0; k < 3 && c.use_3d; k++) {
        const Dataset *all[] = {&run.train, &run.valid, &run.test};
        check_positions(all[k]);
    }
    sde_create(&run.s, c, 1);
    run.best = xmalloc(run.s.model.count, sizeof *run.best);
    run.history = xmalloc((size_t)opt.epochs + 1, EPOCH_COLUMNS * sizeof *run.history);
    if (run.file.path) {
        run_load(&run);
    } else {
        sde_init(&run.s, (uint64_t)opt.seed);
        if (opt.init) sde_transfer(&run.s, opt.init);
        memcpy(run.s.p.head.b, run.statistics + 2 * Y, sizeof(float) * Y);
    }
    fprintf(stderr, "model   %s, %d wide: %.2f M parameters; %s, %zu task%s\ndata    %zu training, "
            "%zu validation, %zu test molecules\n", c.use_3d ? "SchNet" : "GIN", c.dim,
            (double)run.s.group_end[GROUP_3D] / 1e6, opt.task, Y, Y > 1 ? "s" : "",
            run.train.count, run.valid.count, run.test.count);
    int auc = run.aim.kind == TASK_CLASSIFICATION;
    printf(" epoch      loss      valid (%s)\n", auc ? "ROC-AUC"
           : Y > 1 ? "MAE in deviations" : "MAE");
    run_train(&run);
    memcpy(run.s.model.params, run.best, sizeof(float) * run.s.model.count);
    const Dataset *last = run.test.count ? &run.test : &run.valid;
    double metric[METRICS];
    data_metrics(metric, &run, last, OF_MODEL);
    printf("%s:", run.test.count ? "test" : "valid");
    print_metrics(stdout, metric);
    data_metrics(metric, &run, last, OF_CHANCE);
    printf("by chance (the training mean for all):");
    print_metrics(stdout, metric);
    printf("wrote %s, %s\n", opt.output, run.log_path);
    run_close(&run);
}

// ---- predict: CSV on stdout; embed: (molecules, D) float32 in NumPy format

static void visit_rows(Run *run, size_t first, size_t B, void *result) {
    size_t Y = (size_t)run->s.shape.tasks;
    Molecule m = {0};
    visit_predictions(run, 0, B, result);
    for (size_t b = 0; b < B; b++) {
        dataset_read(&run->test, first + b, &m);
        print_csv(stdout, m.name, (size_t)m.name_length);
        for (size_t y = 0; y < Y; y++) {
            double x = (double)((float *)result)[b * Y + y];
            printf(",%.6g", run->aim.kind == TASK_CLASSIFICATION ? sigmoid_of(x) : x);
        }
        printf("\n");
    }
    molecule_free(&m);
}

static void command_predict(const char *path) {
    Run run = {0};
    run_open_model(&run, path);
    const char *kind = "a fine-tuned model, see ./moleculesde finetune";
    const char *names = required_meta(&run.file, "task_names", kind);
    size_t Y = (size_t)run.s.shape.tasks;
    if (run.s.shape.use_3d) check_positions(&run.test);
    float *out = xmalloc((size_t)opt.batch * Y, sizeof *out);
    run.statistics = xmalloc(2 * Y, sizeof *run.statistics);
    meta_numbers(run.statistics, Y, &run.file, "label_mean");
    meta_numbers(run.statistics + Y, Y, &run.file, "label_std");
    run.aim = (Aim){(TaskKind)name_index("task", required_meta(&run.file, "task", kind),
                                         KIND_NAMES), run.statistics, run.statistics + Y};
    printf("name");
    for (size_t y = 0; y < Y; y++) {
        size_t length = strcspn(names, "\n");
        putchar(',');
        print_csv(stdout, names, length);
        names += length + (names[length] == '\n');
    }
    printf("\n");
    visit_batches(&run, &run.test, SIZE_MAX, visit_rows, out);
    CHECK(fflush(stdout) == 0 && !ferror(stdout), "cannot write to standard output: %s",
          strerror(errno));
    free(out);
    run_close(&run);
}

static void visit_embed(Run *run, size_t first, size_t B, void *result) {
    (void)first;
    if (mb_signal) mb_exit(128 + mb_signal);
    task_forward(&run->s);
    out_floats(result, run->s.a.pooled, B * (size_t)run->s.shape.dim, 0);
}

static void command_embed(const char *path) {
    Run run = {0};
    OutFile out;
    char shape[96], header[128];
    run_open_model(&run, path);
    if (!run.s.shape.tasks)
        run.s.shape.use_3d = name_index("--encoder", opt.encoder, ENCODER_NAMES);
    if (run.s.shape.use_3d) check_positions(&run.test);
    run.s.no_pairs = !run.s.shape.use_3d;
    run.s.no_edges = 1;
    snprintf(shape, sizeof shape, "{'descr': '<f4', 'fortran_order': False, 'shape': (%zu, %d), }",
             run.test.count, run.s.shape.dim);
    int length = snprintf(header, sizeof header, "%-117s\n", shape);  // 10 + 118 = 128 bytes
    const uint8_t magic[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (uint8_t)length, 0};
    out_open(&out, opt.output, NPY_BEGINS);
    out_write(&out, magic, 10);
    out_write(&out, header, (size_t)length);
    signals_catch();
    visit_batches(&run, &run.test, SIZE_MAX, visit_embed, &out);
    out_commit(&out);
    run_close(&run);
}

// ---- generate: conformers of one molecule, of which only the graph is looked at; an SD file

static const char *const ELEMENT_NAMES =  // three characters each
    "H  He Li Be B  C  N  O  F  Ne Na Mg Al Si P  S  Cl Ar K  Ca Sc Ti V  Cr Mn Fe Co Ni Cu Zn "
    "Ga Ge As Se Br Kr Rb Sr Y  Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I  Xe Cs Ba La Ce Pr Nd "
    "Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W  Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th "
    "Pa U  Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og *  ";

// One record of a V2000 SD file: molecule m at positions pos (N, 3), centred. Its first line is the
// name: signs that end a line or a record in it become spaces.
static void write_conformer(OutFile *out, const Molecule *m, const float *pos, int number) {
    Text t = {0};
    double mean[3] = {0};
    for (int k = 0; k < 3 * m->n_atoms; k++) mean[k % 3] += (double)pos[k] / m->n_atoms;
    for (int k = 0; k < m->name_length; k++) {
        char c = m->name[k];
        *text_room(&t, 1) = iscntrl((unsigned char)c) || (k == 0 && c == '$') ? ' ' : c;
    }
    text_add(&t, "\n  moleculesde conformer %d, heavy atoms\n\n%3d%3d  0  0  0  0  0  0  0  0999 "
             "V2000\n", number, m->n_atoms, m->n_bonds);
    for (int i = 0; i < m->n_atoms; i++)
        text_add(&t, "%10.4f%10.4f%10.4f %.3s 0  0  0  0  0  0  0  0  0  0  0  0\n",
                 (double)pos[3 * i] - mean[0], (double)pos[3 * i + 1] - mean[1],
                 (double)pos[3 * i + 2] - mean[2],
                 ELEMENT_NAMES + 3 * m->atom_feat[i * ATOM_FEATURES]);
    for (int k = 0; k < m->n_bonds; k++)
        text_add(&t, "%3d%3d%3d  0\n", m->bonds[2 * k] + 1, m->bonds[2 * k + 1] + 1,
                 min_int(m->bond_code[k] / (2 * BOND_STEREOS) + 1, 4));
    for (int i = 0; i < m->n_atoms; i++) {
        int charge = m->atom_feat[i * ATOM_FEATURES + 3] - 5;
        if (charge) text_add(&t, "M  CHG  1 %3d %3d\n", i + 1, charge);
    }
    text_add(&t, "M  END\n$$$$\n");
    out_write(out, t.text, t.length);
    free(t.text);
}

static void command_generate(const char *path, const char *index_text) {
    Run run = {0};
    OutFile out;
    run_open_model(&run, path);
    Sde *s = &run.s;
    size_t index = dataset_find(&run.test, index_text);
    CHECK(!s->shape.tasks, "%s: has no network that generates: expected a pretrained model",
          opt.model);
    uint32_t *ids = xmalloc((size_t)opt.copies, sizeof *ids);
    for (int64_t k = 0; k < opt.copies; k++) ids[k] = (uint32_t)index;
    mols_load(&s->mols, &run.test, ids, (size_t)opt.copies, 0);
    free(ids);
    const Molecule *m = s->mols.molecule;
    CHECK(m->n_atoms <= 999 && m->n_bonds <= 999, "molecule %zu: too large for an SD file", index);
    size_t n = 3 * s->mols.A, row = 3 * (size_t)m->n_atoms;
    float *z = xmalloc(3 * n, sizeof *z), *mean = z + 2 * n;
    out_open(&out, opt.output, "*\n  moleculesde conformer ");
    signals_catch();
    s->no_pairs = 1;
    buffers_layout(s);
    gin_forward(s);
    to3d_graph_forward(s);
    s->draws = (Draws){(uint64_t)opt.seed, 0, 0, 0};
    for (size_t b = 0; b < s->mols.B; b++)
        normal_row(s->mols.q + b * row, row, &s->draws, RNG_SAMPLE, (uint32_t)b);
    Progress progress = progress_begin(0);
    for (int i = 0; i < (int)opt.sample_steps; i++) {
        if (mb_signal) mb_exit(128 + mb_signal);
        s->draws.step = (uint32_t)i;
        for (size_t b = 0; b < s->mols.B; b++) {
            normal_row(z + b * row, row, &s->draws, RNG_CORRECTOR, (uint32_t)b);
            normal_row(z + n + b * row, row, &s->draws, RNG_PREDICTOR, (uint32_t)b);
        }
        sample_step(s, i, (int)opt.sample_steps, z, z + n, mean);
        progress_show(&progress, i + 1, (double)opt.sample_steps, i + 1, "steps", "sampling",
                      i + 1 == opt.sample_steps);
    }
    for (size_t k = 0; k < n; k++)
        CHECK(isfinite(mean[k]), "the sampler left the numbers: is the model trained?");
    for (size_t b = 0; b < s->mols.B; b++)
        write_conformer(&out, m, mean + b * row, (int)b + 1);
    out_commit(&out);
    free(z);
    run_close(&run);
}

// ---- the command line

#define HEADING(text, commands) {NULL, OPT_FLAG, NULL, 0, 0, NULL, text, commands}
#define TEXT(name, field, argument, help, commands) \
    {name, OPT_TEXT, &opt.field, 0, 0, argument, help, commands}
#define WHOLE(name, field, min, max, help, commands) \
    {name, OPT_INT, &opt.field, min, max, "N", help, commands}
#define NUMBER(name, field, min, max, help, commands) \
    {name, OPT_NUMBER, &opt.field, min, max, "X", help, commands}
#define FLAG(name, field, help, commands) {name, OPT_FLAG, &opt.field, 0, 0, NULL, help, commands}

static const Option OPTIONS[] = {
    HEADING("Files", TRAIN | READ),
    TEXT("-o", output, "FILE", "output (moleculesde.safetensors, sde_finetuned.safetensors, "
         "embeddings.npy or conformers.sdf)", TRAIN | EMBED | GENERATE),
    TEXT("--valid", valid, "FILE", "validation set (valid.bin beside train.bin)", TRAIN | FILES),
    TEXT("--test", test, "FILE", "test set (test.bin beside train.bin)", FINETUNE | FILES),
    TEXT("--init", init, "FILE", "start from this checkpoint", TRAIN | FILES),
    TEXT("--model", model, "FILE", "checkpoint to use", READ),
    FLAG("--resume", resume, "continue the run that writes -o, with its options", TRAIN),
    WHOLE("--save-every", save_every, 1, 1e9, "steps between checkpoints", TRAIN),
    HEADING("Model", TRAIN),
    WHOLE("--dim", dim, 1, 4096, "width of both encoders", TRAIN | SHAPES),
    WHOLE("--layers", layers, 1, MAX_DEPTH, "of the GIN", TRAIN | SHAPES),
    WHOLE("--blocks", blocks, 1, MAX_DEPTH, "of the SchNet", TRAIN | SHAPES),
    WHOLE("--filters", filters, 1, 4096, "of the SchNet", TRAIN | SHAPES),
    WHOLE("--gaussians", gaussians, 2, 4096, "of the SchNet", TRAIN | SHAPES),
    WHOLE("--hidden", hidden, 8, 4096, "width of the 2D -> 3D network", PRETRAIN | SHAPES),
    WHOLE("--width", width, 4, 1024, "of the 3D -> 2D network", PRETRAIN | SHAPES),
    WHOLE("--channels", channels, 1, MAX_CHANNELS, "of its edge layers", PRETRAIN | SHAPES),
    WHOLE("--last-channels", last_channels, 1, MAX_CHANNELS, "of the last of them",
          PRETRAIN | SHAPES),
    TEXT("--edges", edges, "NAME", "of 2D -> 3D: gated by their length (_02) or plain (_01)",
         PRETRAIN | SHAPES),
    HEADING("Training", TRAIN | READ),
    WHOLE("--steps", steps, 1, 1e9, "updates", PRETRAIN | SHAPES | GROWS),
    WHOLE("--epochs", epochs, 1, 1e6, "passes over the training set", FINETUNE | SHAPES),
    WHOLE("--batch-size", batch, 0, 1e6, "molecules at a time (pretraining 64, fine-tuning 128)",
          TRAIN | PREDICT | EMBED | SHAPES),
    NUMBER("--lr", adam.lr, 0, 10, "learning rate", TRAIN | SHAPES),
    NUMBER("--scale-3d", scale_3d, 0, 100, "times that: rate of SchNet and 3D -> 2D",
           PRETRAIN | SHAPES),
    WHOLE("--seed", seed, 0, 9e15, "names every random draw", TRAIN | GENERATE | SHAPES),
    WHOLE("--threads", threads, 0, 1024, "0: all we may use; results are the same", TRAIN | READ),
    HEADING("Method", PRETRAIN),
    TEXT("--sde", sde, "NAME", "ve or vp: variance exploding or preserving",
         PRETRAIN | SHAPES | METHOD),
    NUMBER("--sigma-3d-low", method.ve3d.low, 1e-4, 100, "VE: least noise on positions",
           PRETRAIN | SHAPES | METHOD),
    NUMBER("--sigma-3d-high", method.ve3d.high, 1e-4, 100, "most", PRETRAIN | SHAPES | METHOD),
    NUMBER("--sigma-2d-low", method.ve2d.low, 1e-4, 100, "VE: least noise on the graph",
           PRETRAIN | SHAPES | METHOD),
    NUMBER("--sigma-2d-high", method.ve2d.high, 1e-4, 100, "most", PRETRAIN | SHAPES | METHOD),
    NUMBER("--beta-low", method.beta.low, 1e-4, 100, "VP: rate of noising at t = 0",
           PRETRAIN | SHAPES | METHOD),
    NUMBER("--beta-high", method.beta.high, 1e-4, 100, "at t = 1", PRETRAIN | SHAPES | METHOD),
    NUMBER("--anneal", method.anneal, 0, 10, "losses of generation weigh sigma to this power",
           PRETRAIN | SHAPES),
    NUMBER("--weight-contrast", method.contrast, 0, 1e6, "of a loss", PRETRAIN | SHAPES),
    NUMBER("--weight-3d", method.to3d, 0, 1e6, "of a loss", PRETRAIN | SHAPES),
    NUMBER("--weight-2d", method.to2d, 0, 1e6, "of a loss", PRETRAIN | SHAPES),
    NUMBER("--attention-dropout", method.attention_dropout, 0, 0.99, "in the 2D -> 3D network",
           PRETRAIN | SHAPES),
    HEADING("Task", FINETUNE | EMBED),
    TEXT("--task", task, "NAME", "classification or regression (default: by the labels)",
         FINETUNE | SHAPES),
    TEXT("--encoder", encoder, "NAME", "2d or 3d: GIN or SchNet", FINETUNE | EMBED | SHAPES),
    NUMBER("--dropout", method.dropout, 0, 0.99, "of the GIN", FINETUNE | SHAPES),
    HEADING("Conformers", GENERATE),
    WHOLE("--copies", copies, 1, 100000, "how many", GENERATE),
    WHOLE("--sample-steps", sample_steps, 1, 1e6, "from noise to positions", GENERATE),
    FLAG("--help", help, "this text", 0),
};
enum { N_OPTIONS = sizeof OPTIONS / sizeof OPTIONS[0] };

static char option_given[N_OPTIONS];

static char *options_text(unsigned kind) { return options_describe(OPTIONS, N_OPTIONS, kind); }

static void options_from_state(const char *text, const char *path) {
    options_resume(OPTIONS, N_OPTIONS, GROWS, FILES, option_given, text, path);
}

static const struct {
    const char *name;
    unsigned bit;
    int words;  // that it takes
    const char *output, *usage, *help;
} COMMANDS[] = {
    {"pretrain", PRETRAIN, 1, "moleculesde.safetensors", "train.bin",
     "pretrain (the default command)"},
    {"finetune", FINETUNE, 1, "sde_finetuned.safetensors", "train.bin --init FILE",
     "train an encoder on labels"},
    {"predict", PREDICT, 1, NULL, "data.bin --model FILE", "predictions as CSV on stdout"},
    {"embed", EMBED, 1, "embeddings.npy", "data.bin --model FILE", "a vector per molecule"},
    {"generate", GENERATE, 2, "conformers.sdf", "data.bin INDEX|NAME --model FILE",
     "conformers of a molecule"},
};
enum { N_COMMANDS = sizeof COMMANDS / sizeof COMMANDS[0] };

static void print_help(unsigned command) {
    printf("MoleculeSDE: pretrain encoders of molecules by generating 3D from 2D and 2D from 3D "
           "(ICML 2023)\n\n");
    for (int k = 0; k < N_COMMANDS; k++)
        printf("  ./moleculesde/moleculesde %-8s %-27s %s\n", k ? COMMANDS[k].name : "",
               COMMANDS[k].usage, COMMANDS[k].help);
    printf("\nDatasets (.bin) are made by ./data_prep from SDF, SMILES or CSV files.\n");
    options_print(OPTIONS, N_OPTIONS, command);
}

int main(int argc, char **argv) {
    program_begin(argv);
    int command = 0, named = 0;
    for (int k = 0; k < N_COMMANDS && argc > 1; k++)
        if (strcmp(argv[1], COMMANDS[k].name) == 0) command = k, named = 1;
    unsigned bit = COMMANDS[command].bit;
    if (bit == FINETUNE) opt.adam.lr = 1e-4;
    opt.encoder = ENCODER_NAMES[0];
    const char *words[2] = {NULL, NULL};
    int n_words = options_parse(OPTIONS, N_OPTIONS, bit, argc - named, argv + named, words, 2,
                                option_given);
    if (opt.help) {
        print_help(named ? bit : 0);
        mb_exit(EXIT_SUCCESS);
    }
    CHECK(n_words == COMMANDS[command].words, "expected ./moleculesde/moleculesde %s%s; see --help",
          named ? xprintf("%s ", COMMANDS[command].name) : "", COMMANDS[command].usage);
    CHECK(opt.steps < UINT32_MAX, "--steps: too many");
    if (!opt.valid && bit & TRAIN) opt.valid = sibling(words[0], "valid");
    if (!opt.test && bit & FINETUNE) opt.test = sibling(words[0], "test");
    if (!opt.output) opt.output = COMMANDS[command].output;
    CHECK(!(bit & TRAIN) || strcmp(opt.output, "-") != 0, "-o: expected a file");
    const char *const files[] = {words[0], opt.valid, opt.test, opt.init, opt.model};
    for (size_t k = 0; k < sizeof files / sizeof files[0]; k++) files_input(files[k]);
    threads_set(opt.threads);
    switch (bit) {
        case PRETRAIN: command_pretrain(words[0]); break;
        case FINETUNE: command_finetune(words[0]); break;
        case PREDICT: command_predict(words[0]); break;
        case EMBED: command_embed(words[0]); break;
        default: command_generate(words[0], words[1]); break;
    }
    mb_exit(EXIT_SUCCESS);
}

#endif  // MOLECULESDE_TEST
