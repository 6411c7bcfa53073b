// model.h - the rest of MoleculeSDE's model, which moleculesde.c includes: the fine-tuning head,
// the table of parameters, memory, checkpoints

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

// Mean over the labels that are there: cross-entropy, or |out - (label - mean) / std|. Stores
// dlogits.
static double head_loss(Sde *s, const Task *task) {
    size_t count = 0, Y = (size_t)s->mols.Y, n = s->mols.B * Y;
    double loss = 0;
    for (size_t k = 0; k < n; k++) count += !isnan(s->mols.labels[k]);
    for (size_t k = 0; k < n; k++) {
        double x = (double)s->a.logits[k], label = (double)s->mols.labels[k], slope = 0;
        if (!isnan(label) && task->kind == TASK_CLASSIFICATION) {
            loss += softplus(x) - x * label;
            slope = sigmoid_of(x) - label;
        } else if (!isnan(label)) {
            double error = x - (label - (double)task->mean[k % Y]) / (double)task->std[k % Y];
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

// The next tensor: *at points to it; NULL: it follows the one before, in the same matrix. rows = 0:
// a vector. name and part: a pattern of lib/names.h, whose %d is k; several share out the rows.
static void place(Table *t, float **at, int rows, int columns, Start start, const char *name,
                  const char *part, int k) {
    char pattern[128];
    int first = t->n;
    if (rows) t->fan_in = (size_t)columns;
    if (t->own != t->group) return;
    if (at) *at = t->arena ? t->arena + t->offset : NULL;
    snprintf(pattern, sizeof pattern, "%s%s%s", t->module, name, part);
    t->offset += tensor_row(t->info, &t->n, pattern, k, (size_t)rows, (size_t)columns,
                            (InitRule)start, t->offset, 0);
    for (; t->info && first < t->n; first++) {
        t->info[first].module = "";  // that of MoleBLEND
        t->info[first].field = t->fan_in;
    }
}

// The same of a vector without gradient.
static void place_fixed(Table *t, float **at, int n, Start start, const char *name,
                        const char *part, int k) {
    Group own = t->own;
    t->own = GROUP_FIXED;
    place(t, at, 0, n, start, name, part, k);
    t->own = own;
}

// A linear map without bias.
static void place_weight(Table *t, Linear *l, int in, int out, Start start, const char *name,
                         int k) {
    l->in = in;
    l->out = out;
    place(t, &l->w, out, in, start, name, ".weight", k);
}

static void place_linear(Table *t, Linear *l, int in, int out, Start start, const char *name,
                         int k) {
    place_weight(t, l, in, out, start, name, k);
    place(t, &l->b, 0, out, start == START_XAVIER ? START_ZERO : start, name, ".bias", k);
}

static void place_batch_norm(Table *t, BatchNorm *bn, int n, const char *name, int k) {
    bn->n = n;
    place(t, &bn->w, 0, n, START_ONE, name, ".weight", k);
    place(t, &bn->b, 0, n, START_ZERO, name, ".bias", k);
    place_fixed(t, &bn->mean, n, START_ZERO, name, ".running_mean", k);
    place_fixed(t, &bn->var, n, START_ONE, name, ".running_var", k);
}

// Linear maps named by k = 0, 1, ...; sizes: what goes into each, and out of the last.
static void place_mlp(Table *t, Linear *l, const int *sizes, int layers, const char *name) {
    for (int k = 0; k < layers; k++)
        place_linear(t, &l[k], sizes[k], sizes[k + 1], START_XAVIER, name, k);
}

static void gin_place(Table *t, Gin *n, const Shape *c) {
    static const int bond_values[BOND_FEATURES] = {BOND_TYPES, BOND_STEREOS, 2};
    int D = c->dim;
    module(t, GROUP_2D, "model_2D.");
    for (int f = 0; f < ATOM_FEATURES; f++)
        place(t, f ? NULL : &n->atom, ATOM_FEATURE_SIZES[f], D, START_XAVIER,
              "atom_encoder.atom_embedding_list.%d", ".weight", f);
    for (int l = 0; l < c->layers; l++) {
        GinLayer *y = &n->layer[l];
        module(t, GROUP_2D, "model_2D.gnns.%d.", l);
        for (int f = 0; f < BOND_FEATURES; f++)
            place(t, f ? NULL : &y->bond, bond_values[f], D, START_XAVIER,
                  "bond_encoder.bond_embedding_list.%d", ".weight", f);
        place(t, &y->eps, 0, 1, START_ZERO, "eps", "", 0);
        place_linear(t, &y->in, D, 2 * D, START_DEFAULT, "mlp.0", 0);
        place_batch_norm(t, &y->norm_in, 2 * D, "mlp.1", 0);
        place_linear(t, &y->out, 2 * D, D, START_DEFAULT, "mlp.3", 0);
        module(t, GROUP_2D, "model_2D.");
        place_batch_norm(t, &y->norm_out, D, "batch_norms.%d", l);
    }
}

static void schnet_place(Table *t, Schnet *n, const Shape *c) {
    int D = c->dim, F = c->filters;
    module(t, GROUP_3D, "model_3D.");
    place(t, &n->atom, V, D, START_NORMAL, "embedding", ".weight", 0);
    for (int k = 0; k < c->blocks; k++) {
        SchnetBlock *b = &n->block[k];
        module(t, GROUP_3D, "model_3D.interactions.%d.", k);
        place_linear(t, &b->filter[0], c->gaussians, F, START_XAVIER, "mlp.0", 0);
        place_weight(t, &b->filter[1], F, F, START_XAVIER, "mlp.2", 0);
        place(t, &b->filter[1].b, 0, F, START_DEFAULT, "mlp.2", ".bias", 0);
        place_weight(t, &b->lift, D, F, START_XAVIER, "conv.lin1", 0);
        place_linear(t, &b->out[0], F, D, START_XAVIER, "conv.lin2", 0);
        place_linear(t, &b->out[1], D, D, START_XAVIER, "lin", 0);
    }
    module(t, GROUP_3D, "model_3D.");
    for (int k = 0; k < 2; k++) place_linear(t, &n->out[k], D, D, START_XAVIER, "lin%d", k + 1);
}

static void to3d_place(Table *t, To3d *n, const Shape *c) {
    int D = c->dim, H = c->hidden;
    module(t, GROUP_2D, "SDE_2Dto3D_model.");
    place_linear(t, &n->node, D, H, START_XAVIER, "node_emb.layers.0", 0);
    place_linear(t, &n->edge_in, 2 * D, D, START_DEFAULT, "edge_2D_emb.0", 0);
    place_batch_norm(t, &n->edge_norm, D, "edge_2D_emb.1", 0);
    place_linear(t, &n->edge_out, D, H, START_DEFAULT, "edge_2D_emb.3", 0);
    if (c->gate) {
        place_fixed(t, &n->gate_wave, H, START_NORMAL, "dist_gaussian_fourier", ".W", 0);
        place_linear(t, &n->gate, 2 * H, H, START_XAVIER, "input_mlp.layers.0", 0);
    }
    place_fixed(t, &n->frame_wave, H, START_NORMAL, "coff_gaussian_fourier", ".W", 0);
    place_linear(t, &n->frame, 4 * H, H, START_DEFAULT, "coff_mlp", 0);
    place_mlp(t, n->project, (int[]){2 * H + 2, H, H}, 2, "project.layers.%d");
    for (int l = 0; l < ATTENTIONS; l++) {
        Attention *y = &n->layer[l];
        module(t, GROUP_2D, "SDE_2Dto3D_model.score_network.gnn_layers.%d.%d.", l / 2, l % 2);
        place_linear(t, &y->maps, H, 4 * H, START_DEFAULT, "MHA.lin_{query,key,value,skip}", 0);
        place_weight(t, &y->edge, H, H, START_DEFAULT, "MHA.lin_edge", 0);
        for (int k = 0; k < 2; k++) {
            LayerNorm *norm = k ? &y->norm2 : &y->norm1;
            norm->n = H;
            place_linear(t, &y->ffn[k], H, H, START_DEFAULT, "FFN.%d", 3 * k);
            place(t, &norm->w, 0, H, START_ONE, "norm%d", ".weight", k + 1);
            place(t, &norm->b, 0, H, START_ZERO, "norm%d", ".bias", k + 1);
        }
    }
    for (int k = 0; k < MODULES; k++) {
        module(t, GROUP_2D, "SDE_2Dto3D_model.score_network.basis_mlp_modules.%d.", k);
        place_linear(t, &n->basis[k][0], 2 * H, COEFFICIENTS, START_DEFAULT, "0", 0);
        place_linear(t, &n->basis[k][1], COEFFICIENTS, 3, START_DEFAULT, "2", 0);
    }
}

// A channel's tensors follow those of the channel before; so do query and key.
static void edge_layer_place(Table *t, EdgeLayer *n, const Shape *c, int l) {
    int C = to2d_channels(c, l), W = c->width, in = edge_layer_in(c, l);
    int R = edge_layer_hidden(c, l);
    module(t, GROUP_3D, "SDE_3Dto2D_model.edge_score_network.layers.%d.", l);
    n->first.in = in;
    n->first.out = C * 4 * W;
    for (int k = 0; k < C; k++)
        place(t, k ? NULL : &n->first.w, 4 * W, in, START_XAVIER,
              "attn.%d.func_{q,k}.layers.0", ".weight", k);
    for (int k = 0; k < C; k++)
        place(t, k ? NULL : &n->first.b, 0, 4 * W, START_ZERO,
              "attn.%d.func_{q,k}.layers.0", ".bias", k);
    for (int k = 0; k < 2 * C; k++)
        place_linear(t, &n->second[k], 2 * W, 2 * W, START_XAVIER,
                     k % 2 ? "attn.%d.func_k.layers.1" : "attn.%d.func_q.layers.1", k / 2);
    for (int k = 0; k < C; k++)
        place(t, k ? NULL : &n->value_w, in, W, START_XAVIER, "attn.%d.func_v", ".weight", k);
    for (int k = 0; k < C; k++)
        place(t, k ? NULL : &n->value_b, 0, W, START_ZERO, "attn.%d.func_v", ".bias", k);
    place_mlp(t, n->nodes, (int[]){W * C, R, W}, 2, "multi_channel.layers.%d");
    place_mlp(t, n->pairs, (int[]){2 * C, R, R, to2d_channels(c, l + 1)}, 3, "mlp.layers.%d");
}

static void to2d_place(Table *t, To2d *n, const Shape *c) {
    int D = c->dim, W = c->width, Ct = to2d_all_channels(c), Cn = to2d_all_nodes(c);
    module(t, GROUP_3D, "SDE_3Dto2D_model.");
    place_linear(t, &n->embed_x, V, D, START_DEFAULT, "embedding_X", 0);
    place_linear(t, &n->embed_y, D, D, START_DEFAULT, "embedding_3D", 0);
    for (int l = 0; l < EDGE_LAYERS; l++) edge_layer_place(t, &n->edge[l], c, l);
    module(t, GROUP_3D, "SDE_3Dto2D_model.edge_score_network.final.");
    place_mlp(t, n->pairs, (int[]){Ct, 2 * Ct, 2 * Ct, 1}, 3, "layers.%d");
    module(t, GROUP_3D, "SDE_3Dto2D_model.node_score_network.");
    for (int l = 0; l < NODE_LAYERS; l++) {
        place(t, &n->node_w[l], l ? W : D, W, START_XAVIER, "layers.%d", ".weight", l);
        place(t, &n->node_b[l], 0, W, START_ZERO, "layers.%d", ".bias", l);
    }
    place_mlp(t, n->nodes, (int[]){Cn, 2 * Cn, 2 * Cn, V}, 3, "final.layers.%d");
}

// Dies unless the sizes make a model.
static void shape_check(const Shape *c) {
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
            place_linear(&t, &n->head, c->dim, c->tasks, START_DEFAULT, "linear", 0);
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
    char name[128];
    for (int l = 0; l < MAX_DEPTH; l++) {
        pattern_name(name, pattern, 0, l);
        if (!tensor_find(f, name)) return l;
    }
    return MAX_DEPTH;
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
static void sde_transfer(const Sde *s, const TensorFile *f) {
    for (int i = 0; i < s->model.n_tensors; i++) {
        const TensorInfo *t = &s->model.info[i];
        CHECK(tensor_load(s->model.params, t, f, "") || strstr(t->name, "graph_pred"),
              "%s: tensor %s is missing", f->path, t->name);
    }
}
