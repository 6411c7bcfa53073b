// run.c - the rest of moleculesde.c, which includes it: the fine-tuning head, tables of parameters
// and memory, checkpoints, and what trains and uses a model: options, loops, commands.

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
// 12 Parameters, and memory
// =================================================================================================

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
    Group group, own;           // the one that is placed in this walk; that of the next tensors
    char module[64];            // what their names begin with
    size_t offset, fan_in;      // of the next; columns of the last matrix
} Table;

// The module to which the next tensors belong, and their group.
MB_PRINTF(3, 4) static void module(Table *t, Group group, const char *name, ...) {
    va_list args;
    va_start(args, name);
    vsnprintf(t->module, sizeof t->module, name, args);
    va_end(args);
    t->own = group;
}

// The next tensor: *at points to it. rows = 0: a vector.
MB_PRINTF(6, 7) static void place(Table *t, float **at, int rows, int columns, Start start,
                                  const char *name, ...) {
    size_t count = (size_t)max_int(rows, 1) * (size_t)columns;
    if (rows) t->fan_in = (size_t)columns;
    if (t->own != t->group) return;
    *at = t->arena ? t->arena + t->offset : NULL;
    if (t->info) {
        char own[64];
        TensorInfo *info = &t->info[t->n];
        *info = (TensorInfo){.rows = (size_t)rows, .columns = (size_t)columns, .module = "",
                             .rule = (InitRule)start, .offset = t->offset, .count = count,
                             .field = t->fan_in};
        va_list args;
        va_start(args, name);
        vsnprintf(own, sizeof own, name, args);
        va_end(args);
        snprintf(info->name, sizeof info->name, "%s%s", t->module, own);
    }
    t->offset += count;
    t->n++;
}

// The same of a vector without gradient.
static void place_fixed(Table *t, float **at, int n, Start start, const char *name,
                        const char *part) {
    Group own = t->own;
    t->own = GROUP_FIXED;
    place(t, at, 0, n, start, "%s.%s", name, part);
    t->own = own;
}

static void place_linear(Table *t, Linear *l, int in, int out, Start start, const char *name) {
    l->in = in;
    l->out = out;
    place(t, &l->w, out, in, start, "%s.weight", name);
    place(t, &l->b, 0, out, start == START_XAVIER ? START_ZERO : start, "%s.bias", name);
}

static void place_batch_norm(Table *t, BatchNorm *bn, int n, const char *name) {
    bn->n = n;
    place(t, &bn->w, 0, n, START_ONE, "%s.weight", name);
    place(t, &bn->b, 0, n, START_ZERO, "%s.bias", name);
    place_fixed(t, &bn->mean, n, START_ZERO, name, "running_mean");
    place_fixed(t, &bn->var, n, START_ONE, name, "running_var");
}

// A name made of a pattern and two numbers, valid until the fourth call after.
static const char *numbered(const char *pattern, int k, int l) {
    static char text[4][128];
    static int turn;
    char *out = text[turn++ % 4];
    snprintf(out, 128, pattern, k, l);
    return out;
}

// "layers.0", "layers.1", ... of a module
static void place_mlp(Table *t, Linear *l, const int *sizes, int layers, const char *name) {
    for (int k = 0; k < layers; k++) {
        char text[64];
        snprintf(text, sizeof text, "%slayers.%d", name, k);
        place_linear(t, &l[k], sizes[k], sizes[k + 1], START_XAVIER, text);
    }
}

static void gin_place(Table *t, Gin *n, const Shape *c) {
    static const int bond_values[BOND_FEATURES] = {BOND_TYPES, BOND_STEREOS, 2};
    int D = c->dim;
    float *rest;  // tensors that follow each other are one matrix, named by the first
    module(t, GROUP_2D, "model_2D.");
    for (int f = 0; f < ATOM_FEATURES; f++)
        place(t, f ? &rest : &n->atom, ATOM_FEATURE_SIZES[f], D, START_XAVIER,
              "atom_encoder.atom_embedding_list.%d.weight", f);
    for (int l = 0; l < c->layers; l++) {
        GinLayer *y = &n->layer[l];
        module(t, GROUP_2D, "model_2D.gnns.%d.", l);
        for (int f = 0; f < BOND_FEATURES; f++)
            place(t, f ? &rest : &y->bond, bond_values[f], D, START_XAVIER,
                  "bond_encoder.bond_embedding_list.%d.weight", f);
        place(t, &y->eps, 0, 1, START_ZERO, "eps");
        place_linear(t, &y->in, D, 2 * D, START_DEFAULT, "mlp.0");
        place_batch_norm(t, &y->norm_in, 2 * D, "mlp.1");
        place_linear(t, &y->out, 2 * D, D, START_DEFAULT, "mlp.3");
        module(t, GROUP_2D, "model_2D.");
        place_batch_norm(t, &y->norm_out, D, numbered("batch_norms.%d", l, 0));
    }
}

static void schnet_place(Table *t, Schnet *n, const Shape *c) {
    int D = c->dim, F = c->filters;
    module(t, GROUP_3D, "model_3D.");
    place(t, &n->atom, V, D, START_NORMAL, "embedding.weight");
    for (int k = 0; k < c->blocks; k++) {
        SchnetBlock *b = &n->block[k];
        module(t, GROUP_3D, "model_3D.interactions.%d.", k);
        place_linear(t, &b->filter[0], c->gaussians, F, START_XAVIER, "mlp.0");
        b->filter[1].in = b->filter[1].out = b->lift.out = F;
        b->lift.in = D;
        place(t, &b->filter[1].w, F, F, START_XAVIER, "mlp.2.weight");
        place(t, &b->filter[1].b, 0, F, START_DEFAULT, "mlp.2.bias");
        place(t, &b->lift.w, F, D, START_XAVIER, "conv.lin1.weight");
        place_linear(t, &b->out[0], F, D, START_XAVIER, "conv.lin2");
        place_linear(t, &b->out[1], D, D, START_XAVIER, "lin");
    }
    module(t, GROUP_3D, "model_3D.");
    place_linear(t, &n->out[0], D, D, START_XAVIER, "lin1");
    place_linear(t, &n->out[1], D, D, START_XAVIER, "lin2");
}

static void to3d_place(Table *t, To3d *n, const Shape *c) {
    static const char *const kinds[4] = {"query", "key", "value", "skip"};
    int D = c->dim, H = c->hidden;
    float *rest;
    module(t, GROUP_2D, "SDE_2Dto3D_model.");
    place_linear(t, &n->node, D, H, START_XAVIER, "node_emb.layers.0");
    place_linear(t, &n->edge_in, 2 * D, D, START_DEFAULT, "edge_2D_emb.0");
    place_batch_norm(t, &n->edge_norm, D, "edge_2D_emb.1");
    place_linear(t, &n->edge_out, D, H, START_DEFAULT, "edge_2D_emb.3");
    if (c->gate) {
        place_fixed(t, &n->gate_wave, H, START_NORMAL, "dist_gaussian_fourier", "W");
        place_linear(t, &n->gate, 2 * H, H, START_XAVIER, "input_mlp.layers.0");
    }
    place_fixed(t, &n->frame_wave, H, START_NORMAL, "coff_gaussian_fourier", "W");
    place_linear(t, &n->frame, 4 * H, H, START_DEFAULT, "coff_mlp");
    place_mlp(t, n->project, (int[]){2 * H + 2, H, H}, 2, "project.");
    for (int l = 0; l < ATTENTIONS; l++) {
        Attention *y = &n->layer[l];
        module(t, GROUP_2D, "SDE_2Dto3D_model.score_network.gnn_layers.%d.%d.", l / 2, l % 2);
        y->maps.in = y->edge.in = y->edge.out = H;
        y->maps.out = 4 * H;
        for (int k = 0; k < 4; k++)
            place(t, k ? &rest : &y->maps.w, H, H, START_DEFAULT, "MHA.lin_%s.weight", kinds[k]);
        for (int k = 0; k < 4; k++)
            place(t, k ? &rest : &y->maps.b, 0, H, START_DEFAULT, "MHA.lin_%s.bias", kinds[k]);
        place(t, &y->edge.w, H, H, START_DEFAULT, "MHA.lin_edge.weight");
        for (int k = 0; k < 2; k++) {
            LayerNorm *norm = k ? &y->norm2 : &y->norm1;
            norm->n = H;
            place_linear(t, &y->ffn[k], H, H, START_DEFAULT, k ? "FFN.3" : "FFN.0");
            place(t, &norm->w, 0, H, START_ONE, "norm%d.weight", k + 1);
            place(t, &norm->b, 0, H, START_ZERO, "norm%d.bias", k + 1);
        }
    }
    for (int k = 0; k < MODULES; k++) {
        module(t, GROUP_2D, "SDE_2Dto3D_model.score_network.basis_mlp_modules.%d.", k);
        place_linear(t, &n->basis[k][0], 2 * H, COEFFICIENTS, START_DEFAULT, "0");
        place_linear(t, &n->basis[k][1], COEFFICIENTS, 3, START_DEFAULT, "2");
    }
}

// A channel's tensors follow those of the channel before; so do query and key.
static void edge_layer_place(Table *t, EdgeLayer *n, const Shape *c, int l) {
    int C = to2d_channels(c, l), W = c->width, in = edge_layer_in(c, l);
    int R = edge_layer_hidden(c, l);
    float *rest;
    module(t, GROUP_3D, "SDE_3Dto2D_model.edge_score_network.layers.%d.", l);
    n->first.in = in;
    n->first.out = C * 4 * W;
    for (int k = 0; k < 2 * C; k++)
        place(t, k ? &rest : &n->first.w, 2 * W, in, START_XAVIER,
              "attn.%d.func_%c.layers.0.weight", k / 2, "qk"[k % 2]);
    for (int k = 0; k < 2 * C; k++)
        place(t, k ? &rest : &n->first.b, 0, 2 * W, START_ZERO, "attn.%d.func_%c.layers.0.bias",
              k / 2, "qk"[k % 2]);
    for (int k = 0; k < 2 * C; k++)
        place_linear(t, &n->second[k], 2 * W, 2 * W, START_XAVIER,
                     numbered(k % 2 ? "attn.%d.func_k.layers.%d" : "attn.%d.func_q.layers.%d",
                              k / 2, 1));
    for (int k = 0; k < C; k++)
        place(t, k ? &rest : &n->value_w, in, W, START_XAVIER, "attn.%d.func_v.weight", k);
    for (int k = 0; k < C; k++)
        place(t, k ? &rest : &n->value_b, 0, W, START_ZERO, "attn.%d.func_v.bias", k);
    place_mlp(t, n->nodes, (int[]){W * C, R, W}, 2, "multi_channel.");
    place_mlp(t, n->pairs, (int[]){2 * C, R, R, to2d_channels(c, l + 1)}, 3, "mlp.");
}

static void to2d_place(Table *t, To2d *n, const Shape *c) {
    int D = c->dim, W = c->width, Ct = to2d_all_channels(c), Cn = to2d_all_nodes(c);
    module(t, GROUP_3D, "SDE_3Dto2D_model.");
    place_linear(t, &n->embed_x, V, D, START_DEFAULT, "embedding_X");
    place_linear(t, &n->embed_y, D, D, START_DEFAULT, "embedding_3D");
    for (int l = 0; l < EDGE_LAYERS; l++) edge_layer_place(t, &n->edge[l], c, l);
    module(t, GROUP_3D, "SDE_3Dto2D_model.edge_score_network.final.");
    place_mlp(t, n->pairs, (int[]){Ct, 2 * Ct, 2 * Ct, 1}, 3, "");
    module(t, GROUP_3D, "SDE_3Dto2D_model.node_score_network.");
    for (int l = 0; l < NODE_LAYERS; l++) {
        place(t, &n->node_w[l], l ? W : D, W, START_XAVIER, "layers.%d.weight", l);
        place(t, &n->node_b[l], 0, W, START_ZERO, "layers.%d.bias", l);
    }
    place_mlp(t, n->nodes, (int[]){Cn, 2 * Cn, 2 * Cn, V}, 3, "final.");
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
            module(&t, GROUP_2D, "graph_pred_");
            place_linear(&t, &n->head, c->dim, c->tasks, START_DEFAULT, "linear");
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
    float **const arenas[] = {&m->params, &m->grads, &m->m, &m->v};
    for (int k = 0; k < (training ? 4 : 1); k++) *arenas[k] = floats_alloc(m->count, hint);
    nets_place(&s->p, m->params, m->info, &shape, s->group_end);
    if (training) nets_place(&s->g, m->grads, NULL, &shape, s->group_end);
}

// Random initial values of all tensors, each named by its place in the table.
static void sde_init(Sde *s, uint64_t seed) {
    for (int i = 0; i < s->model.n_tensors; i++) {
        const TensorInfo *t = &s->model.info[i];
        float *x = s->model.params + t->offset;
        int start = (int)t->rule;
        double centre = start == START_ONE, bound = 0;
        if (start == START_DEFAULT) bound = 1 / sqrt((double)t->field);  // columns of the weight
        if (start == START_XAVIER) bound = sqrt(6 / (double)(t->rows + t->columns));
        for (size_t k = 0; k < t->count; k++) {
            uint32_t place = (uint32_t)i, index = (uint32_t)k;
            double u = (double)rng_uniform(seed, RNG_INIT, 0, place, index);
            x[k] = start == START_NORMAL ? rng_normal(seed, RNG_INIT, 0, place, index)
                                         : (float)(centre + bound * (2 * u - 1));
        }
    }
}

// ---- memory of a batch

// The activations of the batch at hand, each with room for a vector behind its end.
static void buffers_layout(Sde *s) {
    const Shape *c = &s->shape;
    const Mols *m = &s->mols;
    Buffers *a = &s->a;
    Store *store = &a->store;
    const size_t D = (size_t)c->dim, L = (size_t)c->layers, F = (size_t)c->filters;
    const size_t K = (size_t)c->gaussians, T = (size_t)c->blocks, H = (size_t)c->hidden;
    const size_t W = (size_t)c->width, Ct = (size_t)to2d_all_channels(c), Y = (size_t)c->tasks;
    const size_t Cn = (size_t)to2d_all_nodes(c), Cmax = (size_t)max_int(2, c->channels);
    const size_t R = 2 * max_size(Cmax, (size_t)c->last_channels), B = m->B, A = m->A;
    const size_t P = s->no_pairs ? 0 : m->P, E = s->no_edges ? 0 : m->E, N = (size_t)m->N;
#define X(field, count) a->field = store_take(store, sizeof(float), SHAPE((idx)(count) + VEC));
#define HIDDEN(field, layers, count)                                                               \
    for (size_t k = 0; k < (size_t)(layers); k++) {                                                \
        X(field[k].pre, count)                                                                     \
        X(field[k].act, count)                                                                     \
    }
    for (int pass = 0; pass < 2; pass++) {
        store_begin(store, pass);
        BUFFER_ARRAYS(X, HIDDEN)
    }
#undef X
#undef HIDDEN
    a->x = a->gin_h + L * A * D;
    a->scratch = N * (3 * N + 3) + 2 * (2 * W + 1) * (size_t)padded(m->N);
}

static void sde_free(Sde *s) {
    for (size_t b = 0; b < s->mols.molecule_room; b++) molecule_free(&s->mols.molecule[b]);
    FREE_ALL(s->mols.molecule, s->mols.store.memory, s->mols.edge_store.memory, s->a.store.memory);
    model_free(&s->model);
    *s = (Sde){0};
}

// =================================================================================================
// 13 Checkpoints: parameters and running statistics under the official names. A state for --resume
//   also holds Adam's moments, the best parameters of fine-tuning, and the log.
// =================================================================================================

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

#include "../lib/commands.h"  // TEXT(), WHOLE() ...: rows of OPTIONS; command_find()

// =================================================================================================
// 14 Options
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
    .encoder = "2d", .sde = "ve", .edges = "gated",
    .dim = 300, .layers = 5, .filters = 128, .gaussians = 51, .blocks = 6, .hidden = 32,
    .width = 16, .channels = 8, .last_channels = 4,
    .steps = 600, .epochs = 100, .batch = 0, .seed = 1, .save_every = 100,
    .copies = 10, .sample_steps = 1000, .scale_3d = 1,
    .method = {0, {0.2, 1}, {0.1, 1}, {0.2, 1}, 0, 0.1, 0.5, 1, 1, 1},
    .adam = {5e-4, 0.9, 0.999, 1e-8, 0, 0},
};

enum { PRETRAIN = 1, FINETUNE = 2, PREDICT = 4, EMBED = 8, GENERATE = 16,
       TRAIN = PRETRAIN | FINETUNE, READ = PREDICT | EMBED | GENERATE,
       SHAPES = 64,     // an option that shapes a run's trajectory: --resume needs the same
       GROWS = 128,     // or a larger number
       FILES = 256,     // kept for --resume, but not in a checkpoint
       METHOD = 512,    // kept for --model
       PRETRAINING = PRETRAIN | SHAPES, TUNING = FINETUNE | SHAPES, TRAINING = TRAIN | SHAPES };

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
    WHOLE("--dim", dim, 1, 4096, "width of both encoders", TRAINING),
    WHOLE("--layers", layers, 1, MAX_DEPTH, "of the GIN", TRAINING),
    WHOLE("--blocks", blocks, 1, MAX_DEPTH, "of the SchNet", TRAINING),
    WHOLE("--filters", filters, 1, 4096, "of the SchNet", TRAINING),
    WHOLE("--gaussians", gaussians, 2, 4096, "of the SchNet", TRAINING),
    WHOLE("--hidden", hidden, 8, 4096, "width of the 2D -> 3D network", PRETRAINING),
    WHOLE("--width", width, 4, 1024, "of the 3D -> 2D network", PRETRAINING),
    WHOLE("--channels", channels, 1, MAX_CHANNELS, "of its edge layers", PRETRAINING),
    WHOLE("--last-channels", last_channels, 1, MAX_CHANNELS, "of the last of them", PRETRAINING),
    TEXT("--edges", edges, "NAME", "of 2D -> 3D: gated by their length (_02) or plain (_01)",
         PRETRAINING),
    HEADING("Training", TRAIN | READ),
    WHOLE("--steps", steps, 1, 1e9, "updates", PRETRAINING | GROWS),
    WHOLE("--epochs", epochs, 1, 1e6, "passes over the training set", TUNING),
    WHOLE("--batch-size", batch, 0, 1e6, "molecules at a time (pretraining 64, fine-tuning 128)",
          TRAINING | PREDICT | EMBED),
    NUMBER("--lr", adam.lr, 0, 10, "learning rate", TRAINING),
    NUMBER("--scale-3d", scale_3d, 0, 100, "times that: rate of SchNet and 3D -> 2D", PRETRAINING),
    WHOLE("--seed", seed, 0, 9e15, "names every random draw", TRAINING | GENERATE),
    WHOLE("--threads", threads, 0, 1024, "0: all we may use; results are the same", TRAIN | READ),
    HEADING("Method", PRETRAIN),
    TEXT("--sde", sde, "NAME", "ve or vp: variance exploding or preserving", PRETRAINING | METHOD),
    NUMBER("--sigma-3d-low", method.ve3d.low, 1e-4, 100, "VE: least noise on positions",
           PRETRAINING | METHOD),
    NUMBER("--sigma-3d-high", method.ve3d.high, 1e-4, 100, "most", PRETRAINING | METHOD),
    NUMBER("--sigma-2d-low", method.ve2d.low, 1e-4, 100, "VE: least noise on the graph",
           PRETRAINING | METHOD),
    NUMBER("--sigma-2d-high", method.ve2d.high, 1e-4, 100, "most", PRETRAINING | METHOD),
    NUMBER("--beta-low", method.beta.low, 1e-4, 100, "VP: rate of noising at t = 0",
           PRETRAINING | METHOD),
    NUMBER("--beta-high", method.beta.high, 1e-4, 100, "at t = 1", PRETRAINING | METHOD),
    NUMBER("--anneal", method.anneal, 0, 10, "losses of generation weigh sigma to this power",
           PRETRAINING),
    NUMBER("--weight-contrast", method.contrast, 0, 1e6, "of a loss", PRETRAINING),
    NUMBER("--weight-3d", method.to3d, 0, 1e6, "of a loss", PRETRAINING),
    NUMBER("--weight-2d", method.to2d, 0, 1e6, "of a loss", PRETRAINING),
    NUMBER("--attention-dropout", method.attention_dropout, 0, 0.99, "in the 2D -> 3D network",
           PRETRAINING),
    HEADING("Task", FINETUNE | EMBED),
    TEXT("--task", task, "NAME", "classification or regression (default: by the labels)", TUNING),
    TEXT("--encoder", encoder, "NAME", "2d or 3d: GIN or SchNet", TUNING | EMBED),
    NUMBER("--dropout", method.dropout, 0, 0.99, "of the GIN", TUNING),
    HEADING("Conformers", GENERATE),
    WHOLE("--copies", copies, 1, 100000, "how many", GENERATE),
    WHOLE("--sample-steps", sample_steps, 1, 1e6, "from noise to positions", GENERATE),
    FLAG("--help", help, "this text", 0),
};
enum { N_OPTIONS = sizeof OPTIONS / sizeof OPTIONS[0] };

static char option_given[N_OPTIONS];
static const char *const SDE_NAMES[] = {"ve", "vp"};
static const char *const EDGE_NAMES[] = {"plain", "gated"};
static const char *const ENCODER_NAMES[] = {"2d", "3d"};

// Takes the options of a state or checkpoint where the command line is silent.
static void options_from(const char *text, const char *path) {
    if (text) options_resume(OPTIONS, N_OPTIONS, GROWS, FILES, option_given, text, path);
}

static int option_encoder(void) { return choice("--encoder", opt.encoder, ENCODER_NAMES, 2); }

static Method option_method(int dropout) {
    Method m = opt.method;
    m.vp = choice("--sde", opt.sde, SDE_NAMES, 2);
    if (!dropout) m.dropout = 0;
    return m;
}

static Shape option_shape(void) {
    return (Shape){(int)opt.dim, (int)opt.layers, (int)opt.filters, (int)opt.gaussians,
                   (int)opt.blocks, (int)opt.hidden, (int)opt.width, (int)opt.channels,
                   (int)opt.last_channels, choice("--edges", opt.edges, EDGE_NAMES, 2), 0, 0};
}

// =================================================================================================
// 15 Models on data: losses, predictions, metrics
// =================================================================================================

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

// Puts up to --batch-size molecules of a dataset, from `first` to at most `end` - 1, into s->mols,
// for evaluation. Returns how many, 0: there are no more.
static size_t load_next(Sde *s, const Dataset *data, size_t first, size_t end) {
    size_t B = min_size(min_size(end, data->count) - first, (size_t)opt.batch);
    uint32_t *ids = xmalloc(B, sizeof *ids);
    for (size_t b = 0; b < B; b++) ids[b] = (uint32_t)(first + b);
    threads_adapt();
    s->training = 0;
    s->draws = (Draws){(uint64_t)opt.seed, UINT32_MAX, (uint32_t)first, 0};
    if (B) mols_load(&s->mols, data, ids, B, s->shape.tasks);
    free(ids);
    return B;
}

// Losses of the batch in s by chance: if the networks said 0, and no vector told anything.
static void losses_by_chance(double loss[TERMS], Sde *s) {
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
}

// Mean losses of a dataset's first `most` molecules, of the model or by chance.
static void mean_losses(double mean[TERMS], Sde *s, const Dataset *data, size_t most, int chance) {
    double sum[TERMS] = {0};
    size_t n = 0;
    for (size_t B; (B = load_next(s, data, n, most)) > 0; n += B) {
        double loss[TERMS] = {0};
        mols_draw(s);
        if (chance) losses_by_chance(loss, s);
        else losses(loss, s);
        for (int k = 0; k < TERMS; k++) sum[k] += loss[k] * (double)B;
    }
    for (int k = 0; k < TERMS; k++) mean[k] = sum[k] / (double)n;
}

// Predictions (n, Y) of a dataset in the labels' units, or logits, in fresh memory.
static float *predict_all(Sde *s, const Aim *aim, const Dataset *data) {
    size_t Y = (size_t)s->shape.tasks;
    float *out = xmalloc(mul_size(data->count, Y), sizeof *out);
    for (size_t i = 0, B; (B = load_next(s, data, i, SIZE_MAX)) > 0; i += B) {
        task_forward(s);
        for (size_t k = 0; k < B * Y; k++)
            out[i * Y + k] = aim->kind == TASK_REGRESSION
                                 ? s->a.logits[k] * aim->std[k % Y] + aim->mean[k % Y]
                                 : s->a.logits[k];
    }
    return out;
}

// What data_metrics() is asked for: metrics of predictions, those of them by which an epoch is
// chosen (without tasks that cannot judge), or metrics of constant predictions.
typedef enum { OF_MODEL, OF_CHOICE, OF_CHANCE } Asked;

// Mean metrics over the tasks of a dataset in which they are defined; of several tasks errors are
// in deviations of the training labels.
static void data_metrics(double mean[METRICS], Sde *s, const Aim *aim, const Dataset *data,
                         Asked asked) {
    size_t Y = (size_t)s->shape.tasks, n = data->count;
    float *labels = dataset_labels(data), *out = NULL;
    if (asked == OF_CHANCE) out = xmalloc(n * Y, sizeof *out);
    else out = predict_all(s, aim, data);
    if (asked == OF_CHOICE) labels_judge(labels, data, NULL, NULL);
    for (size_t k = 0; k < n * Y; k++) {
        float unit = Y > 1 && aim->kind == TASK_REGRESSION ? aim->std[k % Y] : 1;
        if (asked == OF_CHANCE) out[k] = aim->mean[k % Y];
        CHECK(isfinite(out[k]), "%s: molecule %zu: the prediction is no number; try a lower --lr",
              data->path, k / Y);
        out[k] /= unit;
        labels[k] /= unit;
    }
    task_means(mean, aim->kind, out, labels, n, Y);
    FREE_ALL(out, labels);
}

// =================================================================================================
// 16 Training runs: what is theirs beside lib/run.h
// =================================================================================================

enum { LOG_LR = TERMS, LOG_NORM, LOG_RATE, LOG_COLUMNS };  // of the log; the losses come first
enum { HISTORY_COLUMNS = HISTORY_BEST + 1 };
#define LOG_HEADING                                                                                \
    "step,total,contrast,2d->3d,elements,bonds,accuracy,lr,gradient_norm,molecules_per_second"
#define HISTORY_HEADING "epoch,loss,valid,best_epoch"
#define LOG_BEGINS "step,total,contrast,|" HISTORY_HEADING "\n"

typedef struct {
    struct Run run;
    Sde s;
    Aim aim;                     // of fine-tuning, as what follows
    int judged;                  // can the validation set judge? Else the training loss does
    float *statistics, *best;    // see task_statistics(); parameters of the best epoch
} Training;

// Metadata of a checkpoint or state: where the run is, its options, the task.
static char *training_meta(const Training *t, int of_state) {
    Text text = {0};
    const struct Run *run = &t->run;
    const char *const keys[] = {"step", "molecules", DATA_KEYS[0], DATA_KEYS[1], DATA_KEYS[2],
                                "init_fingerprint"};
    const long long values[] = {run->done, (long long)run->train.count, data_print(&run->train),
                                data_print(&run->valid), data_print(&run->test), run->init_print};
    char *options = options_describe(OPTIONS, N_OPTIONS, SHAPES | FILES);
    char *method = options_describe(OPTIONS, N_OPTIONS, METHOD);
    text_add(&text, "{");
    text_add_meta(&text, "format", "pt");
    for (int k = 0; k < (of_state ? 6 : 3); k++) text_add_meta(&text, keys[k], "%lld", values[k]);
    text_add_meta(&text, "run", "%s", options);
    text_add_meta(&text, "method", "%s", method);
    text_add_meta(&text, "stereo", "%s", run->train.stereo);
    if (t->s.shape.tasks) {
        text_add_meta(&text, "task", "%s", TASK_KINDS[t->aim.kind]);
        text_add_tasks(&text, t->s.shape.tasks, run->train.task_names, t->aim.mean, t->aim.std);
    }
    text_add(&text, "}");
    FREE_ALL(options, method);
    return text.text;
}

static void state_write(const Training *t) {
    char *meta = training_meta(t, 1);
    model_state_write(&t->run, &t->s.model, t->best, meta);
    free(meta);
}

// The log, or of fine-tuning the history, as CSV.
static void csv_write(struct Run *run, int judged) {
    if (!run->history.x) {
        csv_log(run, LOG_HEADING);
        return;
    }
    FILE *csv = csv_open(run, HISTORY_HEADING);
    for (; run->shown < run->history.n; run->shown++) {
        const float *row = run->history.x + run->shown * HISTORY_COLUMNS;
        char valid[32] = "";
        if (judged) snprintf(valid, sizeof valid, "%.6g", (double)row[HISTORY_VALID]);
        fprintf(csv, "%lld,%.6g,%s,%.6g\n", (long long)run->shown + 1, (double)row[HISTORY_LOSS],
                valid, (double)row[HISTORY_BEST]);
    }
    csv_flush(run);
}

// First the state, so that a run killed between two renames resumes from it; then the checkpoint.
static void training_save(Training *t) {
    float *const one[ARENAS] = {t->run.history.n ? t->best : t->s.model.params};
    char *meta = training_meta(t, 0);
    state_write(t);
    model_write(opt.output, &t->s.model, one, NULL, 0, meta);
    csv_write(&t->run, t->judged);
    free(meta);
}

// Continues from the state that is open; epochs: room in the history.
static void training_resume(Training *t, int64_t epochs) {
    model_state_load(&t->run, &t->s.model, t->best, -1, epochs);
    fprintf(stderr, "resumed after step %lld\n", (long long)t->run.done);
}

// Opens the datasets of a run and claims its output; batch: molecules of an update as a rule.
static void training_open(Training *t, const char *train_path, int64_t batch) {
    struct Run *run = &t->run;
    const char *asked = opt.init;
    run_begin(run, train_path, opt.output, LOG_BEGINS);
    if (opt.resume && state_find(run))
        options_from(required_meta(&run->state, "run", "the state of a run"), run->state_path);
    run_data(run, opt.valid, opt.test, opt.init, asked);
    run_plan(run, &opt.batch, batch, 0);
    run->seed = (uint64_t)opt.seed;
}

static void training_close(Training *t) {
    run_free(&t->run);
    sde_free(&t->s);
    FREE_ALL(t->statistics, t->best);
}

// Begins update run->done: its molecules, and what names its draws.
static Draws update_begin(struct Run *run) {
    threads_adapt();
    update_ids(run, run->done);
    return (Draws){run->seed, (uint32_t)run->done, 0, 1};
}

// Ends it with a row of the log; start: when it began. Dies if training has left the numbers.
static void update_end(struct Run *run, const double loss[TERMS], double lr, double norm,
                       double start) {
    CHECK(isfinite(loss[TERM_TOTAL]) && norm < 1e18, "step %lld: the loss is no longer a number. "
          "What was saved before is kept. Try a lower --lr", (long long)run->done + 1);
    log_add(run, loss, TERMS, lr, norm, start);
}

// =================================================================================================
// 17 Commands and main
// =================================================================================================

// ---- pretrain: ./moleculesde train.bin

// Opens what pretraining needs, and says what will be done.
static void pretrain_open(Training *t, const char *train_path) {
    struct Run *run = &t->run;
    Shape c;
    training_open(t, train_path, 64);
    check_positions(&run->train);
    check_positions(&run->valid);
    run->steps = opt.steps;
    run->log = rows_make(run->steps, LOG_COLUMNS);
    t->s.method = option_method(0);
    sde_create(&t->s, c = option_shape(), 1);
    if (run->resumed) training_resume(t, 0);
    else sde_init(&t->s, run->seed);
    if (opt.init && !run->resumed) {
        TensorFile f;
        tensor_file_open(&f, opt.init);
        model_load(&t->s.model, t->s.model.params, &f, "");
        note_stereo(&run->train, opt.init, tensor_meta(&f, "stereo"));
        tensor_file_close(&f);
    }
    fprintf(stderr, "model   %d wide, GIN of %d layers, SchNet of %d blocks, %s, %s edges: %.2f M "
            "parameters\ndata    %s: %zu molecules; %s: %zu\nrun     %lld steps of %lld molecules "
            "(%.1f epochs) on %d thread%s\n", c.dim, c.layers, c.blocks, opt.sde, opt.edges,
            (double)t->s.group_end[GROUP_3D] / 1e6, train_path, run->train.count,
            opt.valid ? opt.valid : "no validation", run->valid.count, (long long)run->steps,
            (long long)run->batch,
            (double)run->steps * (double)run->batch / (double)run->train.count, thread_count(),
            thread_count() > 1 ? "s" : "");
}

// The result: each loss at the start and the end, on the validation set, and by chance.
static void pretrain_report(Training *t) {
    const Dataset *valid = t->run.valid.count ? &t->run.valid : NULL;
    double start[LOG_COLUMNS], end[LOG_COLUMNS], held[TERMS], chance[TERMS];
    log_ends(start, end, &t->run);
    if (valid) mean_losses(held, &t->s, valid, SIZE_MAX, 0);
    mean_losses(chance, &t->s, valid ? valid : &t->run.train, 4096, 1);
    printf("\nloss        start     end   valid  by chance\n");
    for (int k = 1; k <= TERMS; k++) {
        int term = k % TERMS;  // the total last
        char shown[16] = "-";
        if (valid) snprintf(shown, sizeof shown, "%.4f", held[term]);
        printf("%-8s %8.4f%8.4f%8s%11.4f\n", TERM_NAMES[term], start[term], end[term], shown,
               chance[term]);
    }
    printf("wrote %s, %s\n", opt.output, t->run.log_path);
}

static void command_pretrain(const char *train_path) {
    Training t = {0};
    struct Run *run = &t.run;
    pretrain_open(&t, train_path);
    printf("   step     total  contrast   2d->3d elements    bonds  accuracy gradient   mol/s\n");
    run_start(run);
    if (!run->done) state_write(&t);  // from here on --resume means this run
    while (run->done < run->steps && !run_stopped(run)) {
        double start = now_seconds(), loss[TERMS] = {0}, mean[LOG_COLUMNS];
        Draws draws = update_begin(run);
        double norm = sde_step(loss, &t.s, &run->train, run->ids, (size_t)run->batch, &opt.adam,
                               opt.scale_3d, &draws, run->done + 1);
        update_end(run, loss, opt.adam.lr, norm, start);
        if (line_due(mean, run)) {
            progress_clear(&run->progress);
            printf("%7lld  %8.4f  %8.4f %8.4f %8.4f %8.4f  %8.3f %8.3f %7.0f\n",
                   (long long)run->done, mean[TERM_TOTAL], mean[TERM_CONTRAST], mean[TERM_3D],
                   mean[TERM_ELEMENTS], mean[TERM_BONDS], mean[TERM_ACCURACY], mean[LOG_NORM],
                   mean[LOG_RATE]);
            fflush(stdout);
        }
        csv_log(run, LOG_HEADING);
        if (save_due(run, opt.save_every)) training_save(&t);
        run_progress(run, "", 0);
    }
    progress_clear(&run->progress);
    training_save(&t);
    run_end(run);
    pretrain_report(&t);
    training_close(&t);
}

// ---- finetune: ./moleculesde finetune train.bin --init FILE

// The sizes of the model: those of --init, or of the state to go on from, if there is one.
static Shape finetune_shape(struct Run *run) {
    TensorFile init = {0}, *f = run->resumed ? &run->state : &init;
    Shape c = option_shape();
    if (run->resumed || opt.init) {
        if (f == &init) tensor_file_open(f, opt.init);
        c = file_shape(f, c);
        c.tasks = 1;  // the new head may be larger
        c.use_3d = option_encoder();
        shape_fits(&c, f);
        if (f == &init) note_stereo(&run->train, opt.init, tensor_meta(f, "stereo"));
        tensor_file_close(&init);
    }
    c.tasks = run->train.n_tasks;
    c.use_3d = option_encoder();
    return c;
}

// Opens what fine-tuning needs, and says what will be done.
static void finetune_open(Training *t, const char *train_path) {
    struct Run *run = &t->run;
    const Dataset *const sets[] = {&run->train, &run->valid, &run->test};
    training_open(t, train_path, 128);
    size_t Y = (size_t)run->train.n_tasks;
    tasks_check(&run->train, &run->valid, &run->test, opt.valid);
    t->statistics = xmalloc(3 * Y, sizeof *t->statistics);
    t->aim = (Aim){task_statistics(t->statistics, &run->train, &opt.task, 1), t->statistics,
                   t->statistics + Y};
    t->judged = can_judge(&run->valid, "the training loss chooses the epoch");
    Shape c = finetune_shape(run);
    for (int k = 0; k < 3 && c.use_3d; k++) check_positions(sets[k]);
    t->s.method = option_method(1);
    sde_create(&t->s, c, 1);
    run->steps = epochs_steps(run, opt.epochs);
    run->log = rows_make(run->steps, LOG_COLUMNS);
    run->history = rows_make(opt.epochs, HISTORY_COLUMNS);
    t->best = xmalloc(t->s.model.count, sizeof *t->best);
    if (run->resumed) {
        training_resume(t, opt.epochs);
    } else {
        sde_init(&t->s, run->seed);
        if (opt.init) sde_transfer(&t->s, opt.init);
        memcpy(t->s.p.head.b, t->statistics + 2 * Y, sizeof(float) * Y);
    }
    fprintf(stderr, "model   %s, %d wide: %.2f M parameters; %s, %zu task%s\ndata    %zu training, "
            "%zu validation, %zu test molecules\n", c.use_3d ? "SchNet" : "GIN", c.dim,
            (double)t->s.group_end[GROUP_3D] / 1e6, opt.task, Y, Y > 1 ? "s" : "",
            run->train.count, run->valid.count, run->test.count);
}

// Update run->done on labels; fills loss[TERM_TOTAL], returns the norm of the gradients.
static double finetune_step(double loss[TERMS], Training *t, const Adam *adam) {
    struct Run *run = &t->run;
    Sde *s = &t->s;
    s->draws = update_begin(run);
    s->training = 1;
    mols_load(&s->mols, &run->train, run->ids, (size_t)run->batch, s->shape.tasks);
    task_forward(s);
    loss[TERM_TOTAL] = head_loss(s, &t->aim);
    task_backward(s);
    return update(s, adam, 1, run->done + 1);
}

// The end of an epoch of mean loss `loss`: a row of the history, a line on stdout; parameters are
// kept if they are the best on the validation set.
static void finetune_epoch(Training *t, double loss) {
    struct Run *run = &t->run;
    double metric[METRICS];
    int auc = t->aim.kind == TASK_CLASSIFICATION;
    data_metrics(metric, &t->s, &t->aim, &run->valid, OF_CHOICE);
    double valid = t->judged ? metric[auc ? METRIC_AUC : METRIC_MAE] : loss;
    const float *row = history_add(run, (float)loss, (float)valid, auc && t->judged);
    int better = (int64_t)row[HISTORY_BEST] == run->history.n;
    if (better) memcpy(t->best, t->s.model.params, sizeof(float) * t->s.model.count);
    progress_clear(&run->progress);
    printf("%6lld %9s %10s%s\n", (long long)run->history.n, number_text(loss, 4),
           t->judged ? number_text((double)row[HISTORY_VALID], 4) : "-",
           better ? "  best so far" : "");
    fflush(stdout);
}

// What the best parameters are worth on the test set, or without one on the validation set.
static void finetune_report(Training *t) {
    const Dataset *last = t->run.test.count ? &t->run.test : &t->run.valid;
    double metric[METRICS];
    memcpy(t->s.model.params, t->best, sizeof(float) * t->s.model.count);
    data_metrics(metric, &t->s, &t->aim, last, OF_MODEL);
    printf("%s:", t->run.test.count ? "test" : "valid");
    print_metrics(stdout, metric);
    data_metrics(metric, &t->s, &t->aim, last, OF_CHANCE);
    printf("by chance (the training mean for all):");
    print_metrics(stdout, metric);
    printf("wrote %s, %s\n", opt.output, t->run.log_path);
}

static void command_finetune(const char *train_path) {
    Training t = {0};
    struct Run *run = &t.run;
    finetune_open(&t, train_path);
    printf(" epoch      loss      valid (%s)\n",
           t.aim.kind == TASK_CLASSIFICATION ? "ROC-AUC"
           : run->train.n_tasks > 1 ? "MAE in deviations" : "MAE");
    run_start(run);
    if (!run->done) state_write(&t);  // from here on --resume means this run
    while (run->done < run->steps && !run_stopped(run)) {
        double start = now_seconds(), loss[TERMS] = {0}, mean[LOG_COLUMNS];
        double epoch = floor((double)(run->done * run->batch) / (double)run->train.count);
        Adam adam = opt.adam;
        adam.lr *= (1 + cos(3.141592653589793 * epoch / (double)opt.epochs)) / 2;
        double norm = finetune_step(loss, &t, &adam);
        update_end(run, loss, adam.lr, norm, start);
        if (epoch_ended(mean, run)) finetune_epoch(&t, mean[TERM_TOTAL]);
        csv_write(run, t.judged);
        if (save_due(run, opt.save_every)) training_save(&t);
        run_progress(run, "", run->done == run->steps);
    }
    progress_clear(&run->progress);
    training_save(&t);
    run_end(run);
    finetune_report(&t);
    training_close(&t);
}

// ---- what uses a model: predict, CSV on stdout; embed, (molecules, D) float32 in NumPy format

// Opens a dataset and the model and method of --model.
static void model_open(Sde *s, Dataset *data, TensorFile *f, const char *path) {
    CHECK(opt.model, "--model: expected a checkpoint");
    dataset_open(data, path);
    tensor_file_open(f, opt.model);
    options_from(tensor_meta(f, "method"), opt.model);
    Shape c = file_shape(f, option_shape());
    shape_fits(&c, f);
    s->method = option_method(1);
    sde_create(s, c, 0);
    model_load(&s->model, s->model.params, f, "");
    note_stereo(data, opt.model, tensor_meta(f, "stereo"));
    if (!opt.batch) opt.batch = 64;
}

static void model_close(Sde *s, Dataset *data, TensorFile *f) {
    sde_free(s);
    dataset_close(data);
    tensor_file_close(f);
}

static void command_predict(const char *path) {
    Sde s = {0};
    Dataset data;
    TensorFile f;
    Molecule m = {0};
    model_open(&s, &data, &f, path);
    const char *kind = "a fine-tuned model, see ./moleculesde finetune";
    const char *names = required_meta(&f, "task_names", kind);
    size_t Y = (size_t)s.shape.tasks;
    if (s.shape.use_3d) check_positions(&data);
    float *statistics = xmalloc(2 * Y, sizeof *statistics);
    meta_numbers(statistics, Y, &f, "label_mean");
    meta_numbers(statistics + Y, Y, &f, "label_std");
    Aim aim = {(TaskKind)choice("task", required_meta(&f, "task", kind), TASK_KINDS, 2),
               statistics, statistics + Y};
    float *out = predict_all(&s, &aim, &data);
    printf("name");
    for (size_t y = 0; y < Y; y++) {
        size_t length = strcspn(names, "\n");
        putchar(',');
        print_csv(stdout, names, length);
        names += length + (names[length] == '\n');
    }
    for (size_t k = 0; k < data.count * Y; k++) {
        double x = (double)out[k];
        if (k % Y == 0) {
            dataset_read(&data, k / Y, &m);
            printf("\n");
            print_csv(stdout, m.name, (size_t)m.name_length);
        }
        printf(",%.6g", aim.kind == TASK_CLASSIFICATION ? sigmoid_of(x) : x);
    }
    printf("\n");
    FREE_ALL(statistics, out);
    molecule_free(&m);
    model_close(&s, &data, &f);
}

static void command_embed(const char *path) {
    Sde s = {0};
    Dataset data;
    TensorFile f;
    OutFile out;
    model_open(&s, &data, &f, path);
    if (!s.shape.tasks) s.shape.use_3d = option_encoder();
    if (s.shape.use_3d) check_positions(&data);
    s.no_pairs = !s.shape.use_3d;
    s.no_edges = 1;
    npy_begin(&out, opt.output, "<f4", data.count, (size_t)s.shape.dim);
    signals_catch();
    for (size_t i = 0, B; (B = load_next(&s, &data, i, SIZE_MAX)) > 0; i += B) {
        if (mb_signal) mb_exit(128 + mb_signal);
        task_forward(&s);
        out_floats(&out, s.a.pooled, B * (size_t)s.shape.dim, 0);
    }
    out_commit(&out);
    model_close(&s, &data, &f);
}

// ---- generate: conformers of one molecule, of which only the graph is looked at; an SD file

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
                 SYMBOLS + 3 * m->atom_feat[i * ATOM_FEATURES]);
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
    Sde own = {0}, *s = &own;
    Dataset data;
    TensorFile f;
    OutFile out;
    model_open(s, &data, &f, path);
    size_t index = dataset_find(&data, index_text);
    CHECK(!s->shape.tasks, "%s: has no network that generates: expected a pretrained model",
          opt.model);
    uint32_t *ids = xmalloc((size_t)opt.copies, sizeof *ids);
    for (int64_t k = 0; k < opt.copies; k++) ids[k] = (uint32_t)index;
    mols_load(&s->mols, &data, ids, (size_t)opt.copies, 0);
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
    model_close(s, &data, &f);
}

// ---- the command line

static const Command COMMANDS[] = {
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
    int named;
    const Command *command = command_find(&named, COMMANDS, N_COMMANDS, argc, argv);
    unsigned bit = command->bit;
    if (bit == FINETUNE) opt.adam.lr = 1e-4;
    const char *words[2] = {NULL, NULL};
    int n_words = options_parse(OPTIONS, N_OPTIONS, bit, argc - named, argv + named, words, 2,
                                option_given);
    if (opt.help) {
        print_help(named ? bit : 0);
        mb_exit(EXIT_SUCCESS);
    }
    CHECK(n_words == command->words, "expected ./moleculesde/moleculesde %s%s; see --help",
          named ? xprintf("%s ", command->name) : "", command->usage);
    CHECK(opt.steps < UINT32_MAX, "--steps: too many");
    if (!opt.valid && bit & TRAIN) opt.valid = sibling(words[0], "valid");
    if (!opt.test && bit & FINETUNE) opt.test = sibling(words[0], "test");
    if (!opt.output) opt.output = command->output;
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
