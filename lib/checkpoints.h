// lib/checkpoints.h - checkpoints: a model's tensors under the official names, as a tensor file
//
//   model_write()            a checkpoint
//   tensor_file_config()     the size of the model in a file
//   model_state_write(), model_state_load()   a run's state, with Adam's moments and the log
//   model_load(), init_load()  every parameter of a model, from a file of that size; no_state()
//   transfer_load()          those of a pretrained model for another task
//   text_add_tasks(), tasks_load()   what the metadata of a fine-tuned model say of its tasks

// What a state holds under the names of the model's tensors, each behind its prefix: parameters,
// Adam's moments and, of fine-tuning, the best parameters so far. A checkpoint has the first alone.
enum { ARENAS = 4 };
static const char *const ARENA_PREFIXES[ARENAS] = {"", "exp_avg.", "exp_avg_sq.", "best."};

// Writes the arenas that are not NULL to a file, then the tables that have rows, of static names.
static void model_write(const char *path, const Model *model, float *const arenas[ARENAS],
                        const TensorOut *tables, size_t n_tables, const char *meta) {
    size_t n = 0, last;
    TensorOut *out = xmalloc(ARENAS * (size_t)model->n_tensors + n_tables, sizeof *out);
    for (int a = 0; a < ARENAS; a++)
        for (int k = 0; k < model->n_tensors && arenas[a]; k++) {
            const TensorInfo *t = &model->info[k];
            out[n++] = (TensorOut){xprintf("%s%s%s", ARENA_PREFIXES[a], t->module, t->name),
                                   t->rows, t->columns, arenas[a] + t->offset};
        }
    last = n;
    for (size_t k = 0; k < n_tables; k++)
        if (tables[k].rows) out[n++] = tables[k];
    tensor_file_write(path, out, n, meta);
    for (size_t k = 0; k < last; k++) free(out[k].name);
    free(out);
}

// The tensor with this official name, behind `prefix` and with or without what stands in front of
// it in a state dict: a training framework's wrapper, modules. NULL if there is none.
static const TensorEntry *tensor_find_official(const TensorFile *f, const char *prefix,
                                               const char *official) {
    static const char *const wrappers[] = {"", "model.", "module."};
    static const char *const modules[] = {"encoder.molecule_encoder.", "encoder.",
                                          "molecule_encoder.", ""};
    for (int k = 0; k < 12; k++) {
        char name[256];
        snprintf(name, sizeof name, "%s%s%s%s", prefix, wrappers[k / 4], modules[k % 4], official);
        const TensorEntry *t = tensor_find(f, name);
        if (t) return t;
    }
    return NULL;
}

// One dimension of a tensor that a model must have.
static int tensor_dimension(const TensorFile *f, const char *official, int axis) {
    const TensorEntry *t = tensor_find_official(f, "", official);
    CHECK(t, "%s: not a MoleBLEND model: expected a tensor %s", f->path, official);
    CHECK(t->rank == 2 && t->shape[axis] >= 1 && t->shape[axis] <= 1 << 20,
          "%s: tensor %s: expected a matrix of sensible size", f->path, official);
    return (int)t->shape[axis];
}

// Dies if a file that is to be a model is a run's state, whose parameters are the last, not the
// best.
static inline void no_state(const TensorFile *f) {
    for (int k = 0; k < f->count; k++)
        CHECK(strncmp(f->entries[k].name, ARENA_PREFIXES[1], strlen(ARENA_PREFIXES[1])) != 0,
              "%s: is the state of a run; expected its checkpoint, which has the name without "
              ".state", f->path);
}

// The sizes of the model in a file, from the shapes of its tensors.
static Config tensor_file_config(const TensorFile *f) {
    Config c = {.kernels = 1};
    char name[64];
    no_state(f);
    c.dim = tensor_dimension(f, "atom_feature.atom_encoder.weight", 1);
    c.heads = tensor_dimension(f, "molecule_attn_bias.spatial_pos_encoder.weight", 1);
    c.ffn = tensor_dimension(f, "layers.0.fc1.weight", 0);
    if (tensor_find_official(f, "", "molecule_3d_bias.gbf.means.weight"))
        c.kernels = tensor_dimension(f, "molecule_3d_bias.gbf.means.weight", 1);
    do {
        snprintf(name, sizeof name, "layers.%d.fc1.weight", ++c.layers);
    } while (c.layers < MAX_LAYERS && tensor_find_official(f, "", name));
    if (tensor_find_official(f, "", "proj_out.out_proj.weight"))
        c.tasks = tensor_dimension(f, "proj_out.out_proj.weight", 0);
    config_check(c);
    return c;
}

// Copies one tensor of a file into an arena of the model's layout and returns it; NULL if the file
// has none of that name. Dies if it has another shape or no floating-point numbers.
static const TensorEntry *tensor_load(float *arena, const TensorInfo *info, const TensorFile *f,
                                      const char *prefix) {
    const char *name = info->name;
    const TensorEntry *t = tensor_find_official(f, prefix, name);
    if (!t) return NULL;
    CHECK(tensor_is_float(t), "%s: tensor %s: expected type F32, F16, BF16 or F64, found %s",
          f->path, name, t->dtype);
    size_t rows = t->rank == 2 ? t->shape[0] : 0, columns = t->rank ? t->shape[t->rank - 1] : 1;
    CHECK(t->rank == (info->rows ? 2 : 1) && rows == info->rows && columns == info->columns,
          "%s: tensor %s: expected shape (%zu, %zu), found rank %d (%zu, %zu)", f->path, name,
          info->rows, info->columns, t->rank, rows, columns);
    for (size_t k = 0; k < t->count; k++) {
        arena[info->offset + k] = tensor_value(t, k);
        CHECK(isfinite(arena[info->offset + k]), "%s: tensor %s: number %zu is not finite", f->path,
              name, k);
    }
    return t;
}

// Copies all tensors of a model from a file; dies if one is missing.
static void model_load(const Model *model, float *arena, const TensorFile *f, const char *prefix) {
    for (int i = 0; i < model->n_tensors; i++)
        CHECK(tensor_load(arena, &model->info[i], f, prefix), "%s: tensor %s%s is missing", f->path,
              prefix, model->info[i].name);
}

// The same from a checkpoint, as initial values of a model that will be trained on `data`.
static inline void init_load(const Model *model, const char *path, const Dataset *data) {
    TensorFile f;
    tensor_file_open(&f, path);
    no_state(&f);
    model_load(model, model->params, &f, "");
    note_stereo(data, path, tensor_meta(&f, "stereo"));
    tensor_file_close(&f);
}

// Writes a run's state for --resume, which is complete in itself: besides the model Adam's moments,
// the log, of fine-tuning the best parameters so far (else NULL) and the history. Frees meta.
static inline void model_state_write(const struct Run *run, const Model *model, float *best,
                                     char *meta) {
    float *const arenas[ARENAS] = {model->params, model->m, model->v, best};
    const Rows *log = &run->log, *history = &run->history;
    const TensorOut tables[] = {
        {"log", (size_t)log->n, (size_t)log->columns, log->x},
        {"history", (size_t)history->n, (size_t)history->columns, history->x}};
    if (my_rank == 0) model_write(run->state_path, model, arenas, tables, 2, meta);
    free(meta);
}

// Continues from the state that is open, of a run with `seeds` seeds done (-1: it has no seeds) and
// a history with room for so many epochs (0: it has none).
static inline void model_state_load(struct Run *run, Model *model, float *best, int64_t seeds,
                                    int64_t epochs) {
    float *const arenas[ARENAS] = {model->params, model->m, model->v, best};
    const TensorFile *f = &run->state;
    Rows *log = &run->log, *history = &run->history;
    log->n = run->done = tensor_rows(log->x, run->steps, (size_t)log->columns, f, "log");
    if (epochs)
        history->n = tensor_rows(history->x, epochs, (size_t)history->columns, f, "history");
    int64_t passed = epochs ? run->done * run->batch / (int64_t)run->train.count : 0;
    CHECK(history->n == passed && run->done == meta_whole(f, "step") &&
          (seeds < 0 || seeds == meta_whole(f, "seeds_done")),
          "%s: damaged state: its log, step and seed do not fit", f->path);
    if (passed) {
        float last = history->x[(passed - 1) * history->columns + HISTORY_BEST];
        CHECK(last >= 1 && last <= (float)passed, "%s: damaged state: the last row of the history",
              f->path);
    }
    for (int a = 0; a < ARENAS; a++)
        if (arenas[a]) model_load(model, arenas[a], f, ARENA_PREFIXES[a]);
    tensor_file_close(&run->state);
}

// Metadata of a fine-tuned model: its Y tasks, mean and deviation of their training labels.
static inline void text_add_tasks(Text *t, int Y, char *const *task_names, const float *mean,
                                  const float *std) {
    Text names = {0}, means = {0}, stds = {0};
    for (int y = 0; y < Y; y++) {
        text_add(&names, "%s%s", y ? "\n" : "", task_names[y]);
        text_add(&means, "%s%.9g", y ? " " : "", (double)mean[y]);
        text_add(&stds, "%s%.9g", y ? " " : "", (double)std[y]);
    }
    text_add_meta(t, "task_names", "%s", names.text);
    text_add_meta(t, "label_mean", "%s", means.text);
    text_add_meta(t, "label_std", "%s", stds.text);
    FREE_ALL(names.text, means.text, stds.text);
}

// Y numbers of the metadata of a fine-tuned model.
static void meta_numbers(float *out, size_t Y, const TensorFile *f, const char *key) {
    const char *text = required_meta(f, key, "a fine-tuned model");
    for (size_t y = 0; y < Y; y++) {
        char *end;
        out[y] = strtof(text, &end);
        CHECK(end != text && isfinite(out[y]) && *end == (y + 1 < Y ? ' ' : 0),
              "%s: metadata %s: expected %zu numbers", f->path, key, Y);
        text = end;
    }
}

// choice() of what a file's metadata say.
static inline int meta_choice(const TensorFile *f, const char *key, const char *text,
                              const char *const *names, int n) {
    char *where = xprintf("%s: metadata %s", f->path, key);
    int found = choice(where, text, names, n);
    free(where);
    return found;
}

// The kind of a fine-tuned model's Y tasks, their names, a line each, and statistics (2, Y): mean
// and deviation of their training labels.
static inline TaskKind tasks_load(float *statistics, const char **names, size_t Y,
                                  const TensorFile *f) {
    const char *kind = "a fine-tuned model, see ./" MB_PROGRAM " finetune";
    *names = required_meta(f, "task_names", kind);
    meta_numbers(statistics, Y, f, "label_mean");
    meta_numbers(statistics + Y, Y, f, "label_std");
    size_t lines = 1, above = 0;
    for (const char *c = *names; *c; c++) lines += *c == '\n';
    while (above < Y && statistics[Y + above] > 0) above++;
    CHECK(lines == Y && above == Y, "%s: damaged metadata: expected %zu task_names, and label_std "
          "above 0", f->path, Y);
    return (TaskKind)meta_choice(f, "task", required_meta(f, "task", kind), TASK_KINDS, 2);
}

// Is this tensor of a checkpoint part of a head, or its errors, which fine-tuning leaves behind?
static int is_head(const char *name) {
    return strstr(name, "atom_proc.") || strstr(name, "blend_") || strstr(name, "proj_out.") ||
           strcmp(name, "valid_residuals") == 0;
}

// Copies what a checkpoint shares with the model: the encoder. Heads are left behind, the new head
// keeps its initial values, as in the release. Names every other tensor that is missing or extra;
// one of another shape ends the program. data: what the model will be trained on.
static void transfer_load(const Model *model, const char *path, const Dataset *data, int quiet) {
    TensorFile f;
    int loaded = 0, missing = 0;
    tensor_file_open(&f, path);
    char *used = xmalloc((size_t)f.count, 1);
    for (int i = 0; i < model->n_tensors; i++) {
        if (is_head(model->info[i].name)) continue;
        const TensorEntry *entry = tensor_load(model->params, &model->info[i], &f, "");
        if (entry) used[entry - f.entries] = 1;
        loaded += entry != NULL;
        missing += entry == NULL;
        if (!entry && !quiet)
            fprintf(stderr, "%s: tensor %s is missing; it keeps its initial values\n", path,
                    model->info[i].name);
    }
    CHECK(loaded > 0, "%s: no tensor of the encoder is there", path);
    for (int k = 0; k < f.count && !quiet; k++)
        if (!used[k] && !is_head(f.entries[k].name))
            fprintf(stderr, "%s: tensor %s is not of this model; left behind\n", path,
                    f.entries[k].name);
    if (!quiet) note_stereo(data, path, tensor_meta(&f, "stereo"));
    if (!quiet)
        fprintf(stderr, "init    %s: %d encoder tensors loaded, %d missing, %d left behind\n", path,
                loaded, missing, f.count - loaded);
    free(used);
    tensor_file_close(&f);
}
