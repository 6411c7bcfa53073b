// model.h - the rest of MoleculeSDE's model, which moleculesde.c includes: the fine-tuning head,
// the table of parameters, checkpoints

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
    memset(a->pooled, 0, sizeof(float) * m->B * D);
    for (size_t i = 0; i < m->A; i++)
        for (size_t c = 0; c < D; c++) a->pooled[m->molecule_of[i] * D + c] += x[i * D + c];
    for (size_t k = 0; k < m->B * D; k++) a->pooled[k] /= (float)m->n_atoms[k / D];
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
// 12 Parameters. A walk through the tensors of all networks, with their official names, makes the
//   arenas, the initial values and the checkpoints
// =================================================================================================

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
static void place(Table *t, float **at, int rows, int columns, InitRule rule, const char *name,
                  const char *part, int k) {
    char pattern[128];
    int first = t->n;
    if (rows) t->fan_in = (size_t)columns;
    if (t->own != t->group) return;
    if (at) *at = t->arena ? t->arena + t->offset : NULL;
    snprintf(pattern, sizeof pattern, "%s%s%s", t->module, name, part);
    t->offset += tensor_row(t->info, &t->n, pattern, k, (size_t)rows, (size_t)columns, rule,
                            t->offset, 0);
    for (; t->info && first < t->n; first++) {
        t->info[first].module = "";  // that of MoleBLEND
        t->info[first].fan_in = t->fan_in;
    }
}

// The same of a vector without gradient.
static void place_fixed(Table *t, float **at, int n, InitRule rule, const char *name,
                        const char *part, int k) {
    Group own = t->own;
    t->own = GROUP_FIXED;
    place(t, at, 0, n, rule, name, part, k);
    t->own = own;
}

// A linear map without bias.
static void place_weight(Table *t, Linear *l, int in, int out, InitRule rule, const char *name,
                         int k) {
    l->in = in;
    l->out = out;
    place(t, &l->w, out, in, rule, name, ".weight", k);
}

static void place_linear(Table *t, Linear *l, int in, int out, InitRule rule, const char *name,
                         int k) {
    place_weight(t, l, in, out, rule, name, k);
    place(t, &l->b, 0, out, rule == INIT_XAVIER ? INIT_ZERO : rule, name, ".bias", k);
}

static void place_batch_norm(Table *t, BatchNorm *bn, int n, const char *name, int k) {
    bn->n = n;
    place(t, &bn->w, 0, n, INIT_ONE, name, ".weight", k);
    place(t, &bn->b, 0, n, INIT_ZERO, name, ".bias", k);
    place_fixed(t, &bn->mean, n, INIT_ZERO, name, ".running_mean", k);
    place_fixed(t, &bn->var, n, INIT_ONE, name, ".running_var", k);
}

// Linear maps named by k = 0, 1, ...; sizes: what goes into each, and out of the last.
static void place_mlp(Table *t, Linear *l, const int *sizes, int layers, const char *name) {
    for (int k = 0; k < layers; k++)
        place_linear(t, &l[k], sizes[k], sizes[k + 1], INIT_XAVIER, name, k);
}

static void gin_place(Table *t, Gin *n, const Shape *c) {
    static const int bond_values[BOND_FEATURES] = {BOND_TYPES, BOND_STEREOS, 2};
    int D = c->dim;
    module(t, GROUP_2D, "model_2D.");
    for (int f = 0; f < ATOM_FEATURES; f++)
        place(t, f ? NULL : &n->atom, ATOM_FEATURE_SIZES[f], D, INIT_XAVIER,
              "atom_encoder.atom_embedding_list.%d", ".weight", f);
    for (int l = 0; l < c->layers; l++) {
        GinLayer *y = &n->layer[l];
        module(t, GROUP_2D, "model_2D.gnns.%d.", l);
        for (int f = 0; f < BOND_FEATURES; f++)
            place(t, f ? NULL : &y->bond, bond_values[f], D, INIT_XAVIER,
                  "bond_encoder.bond_embedding_list.%d", ".weight", f);
        place(t, &y->eps, 0, 1, INIT_ZERO, "eps", "", 0);
        place_linear(t, &y->in, D, 2 * D, INIT_FAN_IN, "mlp.0", 0);
        place_batch_norm(t, &y->norm_in, 2 * D, "mlp.1", 0);
        place_linear(t, &y->out, 2 * D, D, INIT_FAN_IN, "mlp.3", 0);
        module(t, GROUP_2D, "model_2D.");
        place_batch_norm(t, &y->norm_out, D, "batch_norms.%d", l);
    }
}

static void schnet_place(Table *t, Schnet *n, const Shape *c) {
    int D = c->dim, F = c->filters;
    module(t, GROUP_3D, "model_3D.");
    place(t, &n->atom, V, D, INIT_UNIT, "embedding", ".weight", 0);
    for (int k = 0; k < c->blocks; k++) {
        SchnetBlock *b = &n->block[k];
        module(t, GROUP_3D, "model_3D.interactions.%d.", k);
        place_linear(t, &b->filter[0], c->gaussians, F, INIT_XAVIER, "mlp.0", 0);
        place_weight(t, &b->filter[1], F, F, INIT_XAVIER, "mlp.2", 0);
        place(t, &b->filter[1].b, 0, F, INIT_FAN_IN, "mlp.2", ".bias", 0);
        place_weight(t, &b->lift, D, F, INIT_XAVIER, "conv.lin1", 0);
        place_linear(t, &b->out[0], F, D, INIT_XAVIER, "conv.lin2", 0);
        place_linear(t, &b->out[1], D, D, INIT_XAVIER, "lin", 0);
    }
    module(t, GROUP_3D, "model_3D.");
    for (int k = 0; k < 2; k++) place_linear(t, &n->out[k], D, D, INIT_XAVIER, "lin%d", k + 1);
}

static void to3d_place(Table *t, To3d *n, const Shape *c) {
    int D = c->dim, H = c->hidden;
    module(t, GROUP_2D, "SDE_2Dto3D_model.");
    place_linear(t, &n->node, D, H, INIT_XAVIER, "node_emb.layers.0", 0);
    place_linear(t, &n->edge_in, 2 * D, D, INIT_FAN_IN, "edge_2D_emb.0", 0);
    place_batch_norm(t, &n->edge_norm, D, "edge_2D_emb.1", 0);
    place_linear(t, &n->edge_out, D, H, INIT_FAN_IN, "edge_2D_emb.3", 0);
    if (c->gate) {
        place_fixed(t, &n->gate_wave, H, INIT_UNIT, "dist_gaussian_fourier", ".W", 0);
        place_linear(t, &n->gate, 2 * H, H, INIT_XAVIER, "input_mlp.layers.0", 0);
    }
    place_fixed(t, &n->frame_wave, H, INIT_UNIT, "coff_gaussian_fourier", ".W", 0);
    place_linear(t, &n->frame, 4 * H, H, INIT_FAN_IN, "coff_mlp", 0);
    place_mlp(t, n->project, (int[]){2 * H + 2, H, H}, 2, "project.layers.%d");
    for (int l = 0; l < ATTENTIONS; l++) {
        Attention *y = &n->layer[l];
        module(t, GROUP_2D, "SDE_2Dto3D_model.score_network.gnn_layers.%d.%d.", l / 2, l % 2);
        place_linear(t, &y->maps, H, 4 * H, INIT_FAN_IN, "MHA.lin_{query,key,value,skip}", 0);
        place_weight(t, &y->edge, H, H, INIT_FAN_IN, "MHA.lin_edge", 0);
        for (int k = 0; k < 2; k++) {
            LayerNorm *norm = k ? &y->norm2 : &y->norm1;
            norm->n = H;
            place_linear(t, &y->ffn[k], H, H, INIT_FAN_IN, "FFN.%d", 3 * k);
            place(t, &norm->w, 0, H, INIT_ONE, "norm%d", ".weight", k + 1);
            place(t, &norm->b, 0, H, INIT_ZERO, "norm%d", ".bias", k + 1);
        }
    }
    for (int k = 0; k < MODULES; k++) {
        module(t, GROUP_2D, "SDE_2Dto3D_model.score_network.basis_mlp_modules.%d.", k);
        place_linear(t, &n->basis[k][0], 2 * H, COEFFICIENTS, INIT_FAN_IN, "0", 0);
        place_linear(t, &n->basis[k][1], COEFFICIENTS, 3, INIT_FAN_IN, "2", 0);
    }
}

// A channel's tensors follow those of the channel before; so do query and key.
static void edge_layer_place(Table *t, EdgeLayer *n, const Shape *c, int l) {
    int C = to2d_channels(c, l), W = c->width, in = edge_layer_in(c, l);
    int out = to2d_channels(c, l + 1), R = 2 * max_int(C, out);
    module(t, GROUP_3D, "SDE_3Dto2D_model.edge_score_network.layers.%d.", l);
    n->first.in = in;
    n->first.out = C * 4 * W;
    for (int k = 0; k < C; k++)
        place(t, k ? NULL : &n->first.w, 4 * W, in, INIT_XAVIER,
              "attn.%d.func_{q,k}.layers.0", ".weight", k);
    for (int k = 0; k < C; k++)
        place(t, k ? NULL : &n->first.b, 0, 4 * W, INIT_ZERO,
              "attn.%d.func_{q,k}.layers.0", ".bias", k);
    for (int k = 0; k < 2 * C; k++)
        place_linear(t, &n->second[k], 2 * W, 2 * W, INIT_XAVIER,
                     k % 2 ? "attn.%d.func_k.layers.1" : "attn.%d.func_q.layers.1", k / 2);
    for (int k = 0; k < C; k++)
        place(t, k ? NULL : &n->value_w, in, W, INIT_XAVIER, "attn.%d.func_v", ".weight", k);
    for (int k = 0; k < C; k++)
        place(t, k ? NULL : &n->value_b, 0, W, INIT_ZERO, "attn.%d.func_v", ".bias", k);
    place_mlp(t, n->nodes, (int[]){W * C, R, W}, 2, "multi_channel.layers.%d");
    place_mlp(t, n->pairs, (int[]){2 * C, R, R, out}, 3, "mlp.layers.%d");
}

static void to2d_place(Table *t, To2d *n, const Shape *c) {
    int D = c->dim, W = c->width, Ct = to2d_all_channels(c), Cn = to2d_all_nodes(c);
    module(t, GROUP_3D, "SDE_3Dto2D_model.");
    place_linear(t, &n->embed_x, V, D, INIT_FAN_IN, "embedding_X", 0);
    place_linear(t, &n->embed_y, D, D, INIT_FAN_IN, "embedding_3D", 0);
    for (int l = 0; l < EDGE_LAYERS; l++) edge_layer_place(t, &n->edge[l], c, l);
    module(t, GROUP_3D, "SDE_3Dto2D_model.edge_score_network.final.");
    place_mlp(t, n->pairs, (int[]){Ct, 2 * Ct, 2 * Ct, 1}, 3, "layers.%d");
    module(t, GROUP_3D, "SDE_3Dto2D_model.node_score_network.");
    for (int l = 0; l < NODE_LAYERS; l++) {
        place(t, &n->node_w[l], l ? W : D, W, INIT_XAVIER, "layers.%d", ".weight", l);
        place(t, &n->node_b[l], 0, W, INIT_ZERO, "layers.%d", ".bias", l);
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
            place_linear(&t, &n->head, c->dim, c->tasks, INIT_FAN_IN, "linear", 0);
        }
        group_end[group] = t.offset;
    }
    return t.n;
}

// A model with zero parameters; with gradients and moments if it is to be trained. The caller calls
// sde_free().
static void sde_create(Sde *s, Shape shape, int training) {
    Model *m = &s->model;
    shape_check(&shape);
    s->shape = shape;
    s->no_pairs = shape.tasks && !shape.use_3d;
    s->no_edges = shape.tasks > 0;
    m->n_tensors = nets_place(&s->p, NULL, NULL, &shape, s->group_end);
    m->count = s->group_end[GROUPS - 1];
    m->info = xmalloc((size_t)m->n_tensors, sizeof *m->info);
    float **const arenas[] = {&m->params, &m->grads, &m->m, &m->v};
    for (int k = 0; k < (training ? 4 : 1); k++)
        *arenas[k] = floats_alloc(m->count, "a smaller model");
    nets_place(&s->p, m->params, m->info, &shape, s->group_end);
    if (training) nets_place(&s->g, m->grads, NULL, &shape, s->group_end);
}

static void sde_free(Sde *s) {
    for (size_t b = 0; b < s->mols.molecule_room; b++) molecule_free(&s->mols.molecule[b]);
    FREE_ALL(s->mols.molecule, s->mols.store.memory, s->mols.edge_store.memory, s->a.store.memory);
    model_free(&s->model);
    *s = (Sde){0};
}

// =================================================================================================
// 13 Checkpoints: parameters and running statistics under the official names
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
    for (int l = 0;; l++) {
        pattern_name(name, pattern, 0, l);
        if (l == MAX_DEPTH || !tensor_find(f, name)) return l;
    }
}

// The sizes of the model in a file; those of networks that it lacks are as in c. encoder: the one
// that is fine-tuned from it, else -1. Dies, before memory is taken, if it has too few bytes.
static Shape file_shape(const TensorFile *f, Shape c, int encoder) {
    size_t group_end[GROUPS];
    Nets nets = {0};
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
    CHECK(encoder < 0 || (encoder ? blocks : layers), "%s: has no encoder of --encoder %s", f->path,
          encoder ? "3d" : "2d");
    if (layers) c.layers = layers;
    if (blocks) c.blocks = blocks;
    if (file_size(f, "SDE_2Dto3D_model.node_emb.layers.0.weight", 0))
        c.gate = file_size(f, "SDE_2Dto3D_model.input_mlp.layers.0.weight", 0) > 0;
    c.tasks = file_size(f, "graph_pred_linear.weight", 0);
    c.use_3d = c.tasks && layers == 0;
    shape_check(&c);
    if (encoder >= 0) c.tasks = 1;  // the new head may be larger
    if (encoder >= 0) c.use_3d = encoder;
    nets_place(&nets, NULL, NULL, &c, group_end);
    CHECK(group_end[GROUPS - 1] <= f->size / 2,  // two bytes of F16 or more each
          "%s: damaged: its tensors' shapes make a model of %zu numbers, which it cannot hold",
          f->path, group_end[GROUPS - 1]);
    return c;
}

// Copies the encoder that a checkpoint shares with a fine-tuning model.
static void sde_transfer(const Sde *s, const TensorFile *f) {
    no_state(f);
    for (int i = 0; i < s->model.n_tensors; i++) {
        const TensorInfo *t = &s->model.info[i];
        CHECK(strstr(t->name, "graph_pred") || tensor_load(s->model.params, t, f, ""),
              "%s: tensor %s is missing", f->path, t->name);
    }
}
