// commands/predict.h - ./moleblend predict data.bin --model FILE...; a CSV row for each molecule

// Predictions of a fine-tuned model: opens it for a dataset and reads what its metadata say.
static void predict_open(Run *run, const char *path, const char *model) {
    const char *kind = "a fine-tuned model, see ./moleblend finetune";
    dataset_open(&run->test, path);
    run_open_model(run, model);
    check_positions(&run->test, run->task.use);
    check_preparation(&run->test, &run->file);
    const TensorFile *f = &run->file;
    size_t Y = (size_t)run->s.model.config.tasks;
    required_meta(f, "task_names", kind);
    run->statistics = xmalloc(2 * Y, sizeof *run->statistics);
    meta_numbers(run->statistics, Y, f, "label_mean");
    meta_numbers(run->statistics + Y, Y, f, "label_std");
    run->scale = 1;
    if (tensor_meta(f, "logit_scale")) meta_numbers(&run->scale, 1, f, "logit_scale");
    run->task.kind = (TaskKind)name_index("task", required_meta(f, "task", kind), KIND_NAMES, 2);
    run->task.mean = run->statistics;
    run->task.std = run->statistics + Y;
}

// The predictions of all models for a dataset.
typedef struct {
    int tasks, models;
    TaskKind kind;
    char **names;         // (Y)
    int *column;          // (Y) where a task's labels stand in the dataset; -1: it has none
    double *sum, *square; // (n, Y) over the models
    float *mean, *labels; // (n, Y); labels NaN where there is none
} Predictions;

// Adds the predictions of one model.
static void predict_add(Predictions *all, const char *path, const char *model) {
    Run run = {0};
    predict_open(&run, path, model);
    const Dataset *data = &run.test;
    size_t Y = (size_t)run.s.model.config.tasks, n = data->count;
    const char *names = tensor_meta(&run.file, "task_names");
    if (all->models++ == 0) {
        all->tasks = (int)Y;
        all->kind = run.task.kind;
        all->names = xmalloc(Y, sizeof *all->names);
        all->column = xmalloc(Y, sizeof *all->column);
        all->sum = xmalloc(mul_size(2 * n, Y), sizeof *all->sum);
        all->square = all->sum + n * Y;
        all->mean = xmalloc(mul_size(2 * n, Y), sizeof *all->mean);
        all->labels = all->mean + n * Y;
    }
    CHECK((int)Y == all->tasks && run.task.kind == all->kind,
          "%s: expected the tasks of the first model", model);
    for (size_t y = 0; y < Y; y++) {
        char *name = xprintf("%.*s", (int)strcspn(names, "\n"), names);
        names += strlen(name) + (names[strlen(name)] == '\n');
        CHECK(all->models == 1 || strcmp(name, all->names[y]) == 0,
              "%s: expected the tasks of the first model; it has %s where that has %s", model, name,
              all->names[y]);
        free(all->names[y]);
        all->names[y] = name;
        all->column[y] = -1;
        for (int k = 0; k < data->n_tasks; k++)
            if (strcmp(data->task_names[k], name) == 0) all->column[y] = k;
    }
    float *labels, *out = predict_all(&labels, &run, data);
    note_constant(&run, out, n, all->names);
    for (size_t k = 0; k < n * Y; k++) {
        int column = all->column[k % Y];
        if (all->kind == TASK_CLASSIFICATION) out[k] = sigmoid(out[k]);
        all->sum[k] += (double)out[k];
        all->square[k] += (double)out[k] * (double)out[k];
        all->mean[k] = (float)(all->sum[k] / all->models);
        all->labels[k] = column < 0 ? NAN : labels[k / Y * (size_t)data->n_tasks + (size_t)column];
    }
    FREE_ALL(out, labels);
    run_close(&run);
}

// The row of a record: number, name, of each task the prediction, its deviation over the models,
// the label; last, why it was skipped. i: its place in the dataset; NULL if it was skipped.
static void predict_row(FILE *out, const Predictions *all, const Skipped *record, const size_t *i) {
    size_t Y = (size_t)all->tasks;
    fprintf(out, "%lu,", (unsigned long)record->number);
    print_csv(out, record->name, record->name_length);
    for (size_t y = 0, k = i ? *i * Y : 0; y < Y; y++, k++) {
        double mean = i ? all->sum[k] / all->models : 0, n = all->models;
        double variance = i && n > 1 ? (all->square[k] - n * mean * mean) / (n - 1) : 0;
        fprintf(out, i ? ",%.6g" : ",", mean);
        if (n > 1) fprintf(out, i ? ",%.3g" : ",", sqrt(fmax(variance, 0)));
        if (all->column[y] < 0) continue;
        fprintf(out, i && !isnan(all->labels[k]) ? ",%.6g" : ",", i ? (double)all->labels[k] : 0);
    }
    fputc(',', out);
    print_csv(out, record->reason, record->reason_length);
    fputc('\n', out);
}

// The metrics of every task that has labels, on stderr.
static void predict_metrics(const Predictions *all, size_t n) {
    size_t Y = (size_t)all->tasks;
    double metric[METRICS];
    for (size_t y = 0; y < Y; y++) {
        if (all->column[y] < 0) continue;
        task_metrics(metric, all->kind, all->mean, all->labels, n, Y, y);
        fprintf(stderr, "%-24s", all->names[y]);
        print_metrics(stderr, metric);
    }
    if (all->kind == TASK_CLASSIFICATION) print_reliability(stderr, all->mean, all->labels, n * Y);
}

static void command_predict(const char *path, const char *const *models, int n_models) {
    Predictions all = {0};
    OutFile file;
    Dataset data;
    Molecule m = {0};
    CHECK(n_models > 0, "--model: expected a checkpoint, or several");
    for (int k = 0; k < n_models; k++) predict_add(&all, path, models[k]);
    out_open(&file, opt.output, "record,name,");
    fprintf(file.file, "record,name");
    for (int y = 0; y < all.tasks; y++)
        for (int k = 0; k < 3; k++) {
            static const char *const what[] = {"", " deviation", " label"};
            if ((k == 1 && all.models == 1) || (k == 2 && all.column[y] < 0)) continue;
            char *name = xprintf("%s%s", all.names[y], what[k]);
            fputc(',', file.file);
            print_csv(file.file, name, strlen(name));
            free(name);
        }
    fprintf(file.file, ",skipped\n");
    dataset_open(&data, path);
    Skipped skipped = {0};
    const uint8_t *next = dataset_skipped(&skipped, &data, data.skips);
    for (size_t i = 0; i < data.count || next;) {  // in the order of the input
        if (i < data.count) dataset_read(&data, i, &m);
        if (i < data.count && (!next || m.number < skipped.number)) {
            predict_row(file.file, &all, &(Skipped){m.number, (size_t)m.name_length, 0, m.name, ""},
                        &i);
            i++;
        } else {
            predict_row(file.file, &all, &skipped, NULL);
            next = dataset_skipped(&skipped, &data, next);
        }
    }
    out_commit(&file);
    predict_metrics(&all, data.count);
    for (int y = 0; y < all.tasks; y++) free(all.names[y]);
    FREE_ALL(all.names, all.column, all.sum, all.mean);
    molecule_free(&m);
    dataset_close(&data);
}
