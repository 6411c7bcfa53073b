// commands/model.h - a model that has been trained: what it says of molecules
//
//   model_open(), model_close()   a checkpoint
//   predict_batch(), predict_all()  predictions of a fine-tuned model; note_constant()
//   check_positions()            are these molecules what it expects?

typedef struct {
    Step s;
    Task task;           // if it was fine-tuned; its read-out and relations in any case
    float *statistics;   // (2, Y) mean and deviation of the labels
    TensorFile file;
} Trained;

// 3D asked of molecules that have no positions: refused, or if 2D is asked too, said.
static void check_positions(const Dataset *data, int use) {
    size_t without = 0;
    for (size_t i = 0; i < data->count && use & USE_3D; i++) without += !dataset_has_pos(data, i);
    CHECK(without == 0 || use & USE_SPD,
          "%s: --modality 3d: %zu of %zu molecules have no positions", data->path, without,
          data->count);
    if (without)
        fprintf(stderr, "note    %s: %zu of %zu molecules have no positions and take part with 2D "
                "only\n", data->path, without, data->count);
}

// Model and settings of a checkpoint, whose file may be open already.
static void model_open(Trained *m, const char *path) {
    TensorFile *f = &m->file;
    CHECK(path, "--model: expected a checkpoint");
    if (!f->path) tensor_file_open(f, path);
    model_create(&m->s.model, tensor_file_config(f), 0);
    model_load(&m->s.model, m->s.model.params, f, "");
    if (!opt.batch) opt.batch = DEFAULT_BATCH;
    const char *readout = tensor_meta(f, "readout"), *modality = tensor_meta(f, "modality");
    if (readout) meta_choice(f, "readout", readout, READOUT_NAMES, 3);
    if (modality) meta_choice(f, "modality", modality, MODALITY_NAMES, 3);
    if (opt.readout || !readout) readout = opt.readout ? opt.readout : DEFAULT_READOUT;
    if (opt.modality || !modality) modality = opt.modality ? opt.modality : DEFAULT_MODALITY;
    m->task.use = modality_use(modality);  // as it was fine-tuned, unless told otherwise
    m->task.readout = (Readout)choice("--readout", readout, READOUT_NAMES, 3);
}

static void model_close(Trained *m) {
    tensor_file_close(&m->file);
    step_close(&m->s);
    free(m->statistics);
}

// Calibrated logits of the batch in s, or predictions in the labels' units, out (B, Y).
static void predict_batch(float *out, Step *s, const Task *task) {
    idx Y = s->model.config.tasks, n = s->batch.B * Y;
    task_head_forward(s, task->readout);
    memcpy(out, s->task_arrays->logits, n * sizeof *out);
    for (idx k = 0; k < n; k++)
        out[k] = task->kind == TASK_REGRESSION ? out[k] * task->std[k % Y] + task->mean[k % Y]
                                               : task->scale * out[k];
}

// Predictions (n, Y) of a whole dataset and its labels (n, its tasks), in fresh memory.
static float *predict_all(float **labels, Step *s, const Task *task, const Dataset *data) {
    size_t Y = (size_t)s->model.config.tasks;
    float *out = xmalloc(mul_size(data->count, Y), sizeof *out);
    for (Pass pass = pass_over(data, SIZE_MAX, NULL, task->use); pass_next(&pass, s);) {
        encoder_forward(s);
        predict_batch(out + pass.first * (idx)Y, s, task);
    }
    ranks_sum(out, data->count * Y, sizeof *out);
    *labels = dataset_labels(data);
    return out;
}

// Says so if the predictions (n, Y) of a task hardly differ: a hundredth of what labels do.
static void note_constant(const Task *task, const float *out, size_t n, size_t Y,
                          char *const *names) {
    for (size_t y = 0; y < Y && n > 9; y++)
        if (label_summary(out, n, Y, y).deviation < 0.01 * (double)task->std[y])
            fprintf(stderr, "note    task %s: the predictions are all but the same; try more "
                    "--epochs or another --lr\n", names[y]);
}
