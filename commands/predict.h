// commands/predict.h - ./moleblend predict data.bin --model FILE...; a CSV row for each molecule

// What an ensemble says of a dataset's n molecules, and which of a training set is nearest to each.
typedef struct {
    Dataset data, near;   // near: if --near is given
    int tasks, models;    // how many are open
    TaskKind kind;
    char **names;         // (Y)
    int *column;          // (Y) where a task's labels stand in the dataset; -1: it has none
    double *sum, *square; // (n, Y) over the models; of classes probabilities
    double *rest;         // (n, Y) of classes the sum of 1 - p, which near 1 tells more than p
    float *out, *labels;  // (n, Y) what metrics see: the mean, or its log odds; NaN: no label
    float *residuals;     // (n_residuals, Y) sums over the models of residuals_keep()
    int64_t n_residuals;
    const char *other;    // a model without residuals, or with those of other molecules; or NULL
    double *half;         // (Y) half the width of an interval; NULL: there are none
    float *vectors, *query;  // (molecules of near, C) and (batch, C)
    double spread;        // root mean square distance of the vectors from their mean
    size_t *nearest;      // (n)
    float *square_distance;  // (n)
} Predictions;

// --interval as a share.
static double interval_part(void) { return opt.interval / (opt.interval < 1 ? 1 : 100); }

// The intervals' widths, or why there are none.
static void intervals_make(Predictions *all) {
    size_t Y = (size_t)all->tasks;
    if (all->kind == TASK_CLASSIFICATION && was_given(&opt.interval))
        fprintf(stderr, "note    --interval has no effect on classes\n");
    if (all->kind == TASK_CLASSIFICATION || opt.interval == 0) return;
    if (!all->other) all->half = xmalloc(Y, sizeof *all->half);
    else
        fprintf(stderr, "note    no intervals: %s has no residuals of the %svalidation set; "
                "fine-tune again\n", all->other, all->models > 1 ? "first model's " : "");
    for (size_t y = 0; y < Y && all->half; y++) {
        all->half[y] = interval_half(all->residuals, (size_t)all->n_residuals, Y, y, all->models,
                                     interval_part());
        if (isinf(all->half[y]))
            fprintf(stderr, "note    task %s: no interval of %g %%: the validation set has too few "
                    "labels\n", all->names[y], 100 * interval_part());
    }
}

// Opens a model of an ensemble and reads what its metadata say; its parameters are not loaded yet.
// Dies if the model has other tasks or training data than the first, or is among them already.
static void predict_open(Predictions *all, Trained *models, const char *path) {
    const char *names;
    Trained *m = models + all->models;
    TensorFile *f = &m->file;
    tensor_file_open(f, path);
    check_preparation(&all->data, f);
    if (all->near.data && all->models == 0) {  // all were trained on the same
        const char *print = tensor_meta(f, DATA_KEYS[0]);
        check_preparation(&all->near, f);
        if (print && strtoull(print, NULL, 10) != data_print(&all->near))
            fprintf(stderr, "note    %s: is not, by its fingerprint, what %s was trained on\n",
                    all->near.path, path);
    }
    size_t Y = (size_t)tensor_file_config(f).tasks, n = mul_size(all->data.count, Y);
    m->statistics = xmalloc(2 * Y, sizeof *m->statistics);
    m->task.kind = tasks_load(m->statistics, &names, Y, f);
    m->task.scale = 1;
    if (tensor_meta(f, "logit_scale")) meta_numbers(&m->task.scale, 1, f, "logit_scale");
    m->task.mean = m->statistics;
    m->task.std = m->statistics + Y;
    if (all->models == 0) {
        all->tasks = (int)Y;
        all->kind = m->task.kind;
        all->names = xmalloc(Y, sizeof *all->names);
        all->column = xmalloc(Y, sizeof *all->column);
        all->sum = xmalloc(mul_size(3, n), sizeof *all->sum);
        all->square = all->sum + n;
        all->rest = all->square + n;
        all->out = xmalloc(mul_size(2, n), sizeof *all->out);
        all->labels = all->out + n;
        all->residuals = xmalloc(mul_size(RESIDUALS, Y), sizeof *all->residuals);
    }
    CHECK((int)Y == all->tasks && m->task.kind == all->kind,
          "%s: expected the tasks of the first model", path);
    for (size_t y = 0; y < Y; y++) {
        char *name = xprintf("%.*s", (int)strcspn(names, "\n"), names);
        names += strlen(name) + (names[strlen(name)] == '\n');
        CHECK(all->models == 0 || strcmp(name, all->names[y]) == 0,
              "%s: expected the tasks of the first model; it has %s where that has %s", path, name,
              all->names[y]);
        free(all->names[y]);
        all->names[y] = name;
        all->column[y] = -1;
        for (int k = 0; k < all->data.n_tasks; k++)
            if (strcmp(all->data.task_names[k], name) == 0) all->column[y] = k;
    }
    for (const Trained *other = models; other < m; other++) {
        const TensorFile *g = &other->file;
        size_t size = f->size - 8 - (size_t)get_u64(f->bytes);  // of its tensors
        CHECK(size > g->size || memcmp(f->bytes + f->size - size, g->bytes + g->size - size, size),
              "%s: the same model as %s; an ensemble has each once", path, g->path);
        for (int k = 0; k < 2; k++) {
            const char *key = k ? "valid_fingerprint" : "fingerprint", *mine = tensor_meta(f, key);
            const char *theirs = tensor_meta(g, key);
            int same = mine && theirs && strcmp(mine, theirs) == 0;
            CHECK(k || same || !mine || !theirs, "%s: was trained on other data than %s "
                  "(fingerprints %s, %s); no ensemble", path, g->path, mine, theirs);
            if (!same) all->other = path;
        }
    }
    float *residuals = xmalloc(mul_size(RESIDUALS, Y), sizeof *residuals);
    int64_t rows = tensor_rows(residuals, RESIDUALS, Y, f, "valid_residuals");
    if (all->models++ == 0) all->n_residuals = rows;
    if (rows == 0 || rows != all->n_residuals) all->other = path;
    for (size_t k = 0; k < (size_t)rows * Y; k++) all->residuals[k] += residuals[k];
    free(residuals);
}

// The vectors of the training set, as `embed` gives them, and their spread.
static void near_open(Predictions *all, Trained *m) {
    size_t C = (size_t)m->s.model.config.dim, N = all->near.count, n = all->data.count;
    double variance = 0;
    CHECK(N > 0, "%s: the dataset is empty", all->near.path);
    check_positions(&all->near, m->task.use);
    memory_check((uint64_t)N * C * sizeof(float), "--near", "a part of the training set");
    all->vectors = xmalloc(mul_size(N, C), sizeof *all->vectors);
    all->query = xmalloc(mul_size((size_t)opt.batch, C), sizeof *all->query);
    all->nearest = xmalloc(n, sizeof *all->nearest);
    all->square_distance = xmalloc(n, sizeof *all->square_distance);
    for (Pass pass = pass_over(&all->near, SIZE_MAX, NULL, m->task.use); pass_next(&pass, &m->s);) {
        encoder_forward(&m->s);
        if (mb_signal) mb_exit(128 + mb_signal);
        readout_rows(all->vectors + (size_t)pass.first * C, encoder_output(&m->s), (idx)C,
                     &m->s.batch, m->task.readout);
    }
    for (size_t c = 0; c < C; c++) {
        double sum = 0, square = 0;
        for (size_t k = c; k < N * C; k += C) {
            sum += (double)all->vectors[k] / (double)N;
            square += (double)all->vectors[k] * (double)all->vectors[k] / (double)N;
        }
        variance += square - sum * sum;
    }
    all->spread = variance > 1e-9 ? sqrt(variance) : 1;
}

// Finds the nearest of the B molecules, from `first` on, that stand in the query.
static void near_find(Predictions *all, size_t first, size_t B, size_t C) {
    enum { BLOCK = 256 };  // training molecules that stay in the cache
    for (size_t start = 0; start < all->near.count; start += BLOCK) {
        size_t end = min_size(start + BLOCK, all->near.count);
#pragma omp parallel for schedule(static)
        for (size_t b = 0; b < B; b++) {
            const float *q = all->query + b * C;
            for (size_t i = start; i < end; i++) {
                const float *v = all->vectors + i * C;
                float square = 0;
#pragma omp simd reduction(+ : square)
                for (size_t c = 0; c < C; c++) square += (q[c] - v[c]) * (q[c] - v[c]);
                if (i > 0 && square >= all->square_distance[first + b]) continue;
                all->square_distance[first + b] = square;
                all->nearest[first + b] = i;
            }
        }
    }
}

// Adds the predictions of the nth model, by the first also the nearest training molecules; closes
// it.
static void predict_add(Predictions *all, Trained *m, int nth) {
    size_t Y = (size_t)all->tasks, n = all->data.count;
    Step *s = &m->s;
    model_open(m, m->file.path);
    idx C = s->model.config.dim;
    check_positions(&all->data, m->task.use);
    if (all->near.data && nth == 0) near_open(all, m);
    for (Pass pass = pass_over(&all->data, SIZE_MAX, NULL, m->task.use); pass_next(&pass, s);) {
        encoder_forward(s);
        predict_batch(all->out + (size_t)pass.first * Y, s, &m->task);
        if (mb_signal) mb_exit(128 + mb_signal);
        if (!all->near.data || nth > 0) continue;
        readout_rows(all->query, encoder_output(s), C, &s->batch, m->task.readout);
        near_find(all, (size_t)pass.first, (size_t)pass.count, (size_t)C);
    }
    note_constant(&m->task, all->out, n, Y, all->names);
    for (size_t k = 0; k < n * Y; k++) {
        double x = (double)all->out[k], p = 1 / (1 + exp(-x));
        CHECK(isfinite(x), "%s: molecule %zu of %s: the prediction is no number", m->file.path,
              k / Y, all->data.path);
        if (all->kind == TASK_REGRESSION) p = x;
        all->sum[k] += p;
        all->square[k] += p * p;
        all->rest[k] += 1 / (1 + exp(x));
        if (all->kind == TASK_REGRESSION) all->out[k] = (float)(all->sum[k] / (nth + 1));
        else if (all->models > 1) all->out[k] = (float)log(all->sum[k] / all->rest[k]);
    }
    model_close(m);
}

// The row of a record: number, name; of each task the prediction, its interval, its deviation over
// the models, the label; its nearest training molecule; why it was skipped. i: its place in the
// dataset; NULL if it was skipped. record = NULL: the heading.
static void predict_row(FILE *out, const Predictions *all, const Skipped *record, const size_t *i) {
    static const char *const what[] = {"", " low", " high", " deviation", " label"};
    Molecule m = {0};
    if (record) fprintf(out, "%lu,", (unsigned long)record->number);
    else fprintf(out, "record,name");
    if (record) print_csv(out, record->name, record->name_length);
    for (int y = 0; y < all->tasks; y++) {
        size_t k = i ? *i * (size_t)all->tasks + (size_t)y : 0;
        double n = all->models, mean = i ? all->sum[k] / n : 0, half = all->half ? all->half[y] : 0;
        double variance = i && n > 1 ? (all->square[k] - n * mean * mean) / (n - 1) : 0;
        double number[] = {mean, mean - half, mean + half, sqrt(fmax(variance, 0)),
                           i ? (double)all->labels[k] : 0};
        int shown[] = {1, all->half != NULL, all->half != NULL, n > 1, all->column[y] >= 0};
        for (int c = 0; c < 5; c++) {
            if (!shown[c]) continue;
            char *name = record ? NULL : xprintf("%s%s", all->names[y], what[c]);
            fputc(',', out);
            if (name) print_csv(out, name, strlen(name));
            else if (i && c == 3) fprintf(out, "%.3g", number[c]);
            else if (i && (c == 0 || isfinite(number[c])))
                print_digits(out, number[c], c == 0 && all->kind == TASK_CLASSIFICATION
                             ? fmin(mean, all->rest[k] / n) : fabs(number[c]));
            free(name);
        }
    }
    if (all->near.data) fprintf(out, record ? "," : ",nearest,distance");
    if (all->near.data && i) {
        dataset_read(&all->near, all->nearest[*i], &m);
        print_csv(out, m.name, (size_t)m.name_length);
        fprintf(out, ",%.4f", sqrt((double)all->square_distance[*i]) / all->spread);
    }
    if (all->near.data && record && !i) fputc(',', out);
    fprintf(out, record ? "," : ",skipped");
    if (record) print_csv(out, record->reason, record->reason_length);
    fputc('\n', out);
    molecule_free(&m);
}

// Of every task that has labels, on stderr: the metrics, and how many labels the intervals hold.
static void predict_metrics(const Predictions *all, size_t n) {
    size_t Y = (size_t)all->tasks;
    double metric[METRICS];
    for (size_t y = 0; y < Y; y++) {
        double held = 0, present = 0;
        if (all->column[y] < 0) continue;
        if (all->kind == TASK_CLASSIFICATION && label_no_class(all->labels, n, Y, y) < n * Y) {
            fprintf(stderr, "note    %s: task %s: labels are more than 0 and 1: they cannot judge "
                    "classes\n", all->data.path, all->names[y]);
            for (size_t k = y; k < n * Y; k += Y) all->labels[k] = NAN;
        }
        task_metrics(metric, all->kind, all->out, all->labels, n, Y, y);
        fprintf(stderr, "%-24s", all->names[y]);
        print_metrics(stderr, metric);
        for (size_t k = y; k < n * Y && all->half; k += Y) {
            present += !isnan(all->labels[k]);
            double error = fabs((double)all->labels[k] - all->sum[k] / all->models);
            held += error <= all->half[y] * (1 + 1e-6);  // for errors that the width is made of
        }
        if (present > 0 && isfinite(all->half[y]))
            fprintf(stderr, "%24s  interval of %g %%: holds %.0f %% of %.0f labels, width %.4g\n",
                    "", 100 * interval_part(), 100 * held / present, present, 2 * all->half[y]);
    }
    if (all->kind != TASK_CLASSIFICATION) return;
    for (size_t k = 0; k < n * Y; k++) all->out[k] = (float)(all->sum[k] / all->models);
    print_reliability(stderr, all->out, all->labels, n * Y);
}

static void command_predict(const char *path, const char *const *paths, int n_models) {
    Predictions all = {0};
    OutFile file;
    Molecule m = {0};
    Skipped skipped = {0};
    CHECK(n_models > 0, "--model: expected a checkpoint, or several");
    Trained *models = xmalloc((size_t)n_models, sizeof *models);
    dataset_open(&all.data, path);  // once: another file may get its name meanwhile
    if (opt.near) dataset_open(&all.near, opt.near);
    out_open(&file, opt.output, "record,name,");  // now, not after all models
    signals_catch();
    for (int k = 0; k < n_models; k++) predict_open(&all, models, paths[k]);
    intervals_make(&all);
    for (int k = 0; k < n_models; k++) predict_add(&all, &models[k], k);
    predict_row(file.file, &all, NULL, NULL);
    const uint8_t *next = dataset_skipped(&skipped, &all.data, all.data.skips);
    for (size_t i = 0; i < all.data.count || next;) {  // in the order of the input
        if (i < all.data.count) dataset_read(&all.data, i, &m);
        if (i < all.data.count && (!next || m.number < skipped.number)) {
            for (int y = 0; y < all.tasks; y++)
                all.labels[i * (size_t)all.tasks + (size_t)y] =
                    all.column[y] < 0 ? NAN : m.labels[all.column[y]];
            predict_row(file.file, &all, &(Skipped){m.number, (size_t)m.name_length, 0, m.name, ""},
                        &i);
            i++;
        } else {
            predict_row(file.file, &all, &skipped, NULL);
            next = dataset_skipped(&skipped, &all.data, next);
        }
    }
    out_commit(&file);
    predict_metrics(&all, all.data.count);
    for (int y = 0; y < all.tasks; y++) free(all.names[y]);
    FREE_ALL(all.names, all.column, all.sum, all.out, all.residuals, all.half, all.vectors,
             all.query, all.nearest, all.square_distance, models);
    molecule_free(&m);
    dataset_close(&all.data);
    dataset_close(&all.near);
}
