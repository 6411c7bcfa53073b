// commands/finetune.h - ./moleblend finetune train.bin --valid v.bin --test t.bin --init FILE

// The kind of the labels, recognised by their values if --task does not say; task by task, their
// mean and standard deviation (1 where all are equal), and the bias that the head begins with. Dies
// where there is nothing to learn.
static void label_statistics(Run *run) {
    const Dataset *data = &run->train;
    size_t Y = (size_t)data->n_tasks, n = data->count * Y, other = n;
    float *labels = dataset_labels(data);
    for (size_t k = 0; k < n; k++) {
        CHECK(!(fabsf(labels[k]) > (float)LABEL_MAX), "%s: molecule %zu: task %s: label %g is "
              "beyond range; expected at most %g", data->path, k / Y, data->task_names[k % Y],
              (double)labels[k], LABEL_MAX);
        if (!isnan(labels[k]) && labels[k] != 0 && labels[k] != 1 && other == n) other = k;
    }
    if (!opt.task) {
        opt.task = KIND_NAMES[other < n ? TASK_REGRESSION : TASK_CLASSIFICATION];
        fprintf(stderr, "task    %s: the labels are %s 0 and 1 (--task overrules)\n", opt.task,
                other < n ? "more than" : "all");
    }
    run->task.kind = (TaskKind)choice("--task", opt.task, KIND_NAMES, 2);
    int classes = run->task.kind == TASK_CLASSIFICATION;
    CHECK(!classes || other == n,
          "%s: molecule %zu: expected labels 0 and 1 for --task classification, found %g",
          data->path, other / Y, (double)labels[other]);
    for (size_t y = 0; y < Y; y++) {
        LabelSummary s = label_summary(labels, data->count, Y, y);
        const char *name = data->task_names[y];
        CHECK(s.count > 0, "%s: task %s has no labels", data->path, name);
        CHECK(!classes || s.deviation > 0, "%s: task %s: all labels are %g; expected both classes "
              "(data_prep --labels leaves a task out)", data->path, name, s.mean);
        if (s.deviation <= 0)
            fprintf(stderr, "note    %s: task %s: all labels are %g, there is nothing to learn\n",
                    data->path, name, s.mean);
        run->statistics[y] = classes ? 0 : (float)s.mean;
        run->statistics[Y + y] = classes || s.deviation <= 0 ? 1 : (float)s.deviation;
        run->statistics[2 * Y + y] = classes ? (float)log(s.mean / (1 - s.mean)) : 0;
    }
    free(labels);
}

// Looks at the seeds before hours of work: claims their files if they are several, and takes from
// their states what each has reached; for those that have none, --init must be as it was.
static void seeds_open(Run *run) {
    tensor_file_close(&run->file);  // the first seed's, opened for the options
    run->seed_best = xmalloc((size_t)opt.seeds, sizeof *run->seed_best);
    run->seed_locks = xmalloc((size_t)opt.seeds, sizeof *run->seed_locks);
    for (run->nth = opt.seeds - 1; run->nth >= 0; run->nth--) {
        char *own = seed_path(run);
        if (my_rank == 0 && opt.seeds > 1)
            run_claim(&run->seed_locks[run->nth], own, LOG_BEGINS);
        run->epochs = 0;
        if (state_open(run)) run_load(run);
        else if (run->resumed) init_check(run);
        run->seed_best[run->nth] = best_epoch(run) ? best_epoch(run)->valid : -INFINITY;
        free(own);
    }
}

// Opens what fine-tuning needs, and says what will be done.
static void finetune_open(Run *run, const char *train_path) {
    run->s.task = &run->task;
    run_open(run, train_path);
    CHECK(opt.valid, "--valid: expected a validation set, to choose the best epoch by");
    size_t Y = (size_t)run->train.n_tasks;
    CHECK(Y > 0, "%s: expected molecules with labels (data_prep --labels)", train_path);
    CHECK(run->valid.count > 0, "%s: expected molecules, to choose the best epoch by", opt.valid);
    dataset_same_tasks(&run->train, &run->valid);
    if (run->test.data) dataset_same_tasks(&run->train, &run->test);
    if (!opt.readout) opt.readout = DEFAULT_READOUT;
    if (!opt.modality) opt.modality = DEFAULT_MODALITY;
    run->statistics = xmalloc(3 * Y, sizeof *run->statistics);
    run->task = (Task){
        .readout = (Readout)choice("--readout", opt.readout, READOUT_NAMES, 3),
        .use = modality_use(opt.modality), .mean = run->statistics, .std = run->statistics + Y,
        .label_units = choice("--loss-units", opt.loss_units, UNIT_NAMES, 2)};
    label_statistics(run);
    float *labels = dataset_labels(&run->valid);
    run->judged = labels_judge(labels, &run->valid, "no say in the choice of an epoch",
                               "the training loss chooses the epoch and when to stop") > 0;
    free(labels);
    check_positions(&run->train, run->task.use);
    check_positions(&run->valid, run->task.use);
    check_positions(&run->test, run->task.use);
    Config c = start_config(run->resumed ? NULL : opt.init);
    c.tasks = run->train.n_tasks;
    model_create(&run->s.model, c, 1);
    run->history = xmalloc((size_t)opt.epochs, sizeof *run->history);
    run->best = xmalloc(run->s.model.count, sizeof *run->best);
    run_prepare(run);
    fprintf(stderr, "model   %d layers, %d wide: %.2f M parameters; %s, %s read-out, modality %s\n",
            c.layers, c.dim, (double)run->s.model.count / 1e6, opt.task, opt.readout, opt.modality);
    fprintf(stderr, "data    %zu training, %zu validation, %zu test molecules, %d task%s\n",
            run->train.count, run->valid.count, run->test.count, c.tasks, c.tasks > 1 ? "s" : "");
    seeds_open(run);
}

// Metrics of the test set (validation set without one): of several tasks, one by one on stdout;
// `mean` over the tasks; `chance`: the mean if every prediction were the training mean.
static void finetune_report(double mean[METRICS], double chance[METRICS], Run *run) {
    const Dataset *data = run->test.data ? &run->test : &run->valid;
    TaskKind kind = run->task.kind;
    float *labels, *out = predict_all(&labels, run, data);
    size_t Y = (size_t)data->n_tasks, n = data->count;
    float *constant = xmalloc(mul_size(n, Y), sizeof *constant);
    for (size_t k = 0; k < n * Y; k++) constant[k] = run->task.mean[k % Y];
    mean_metrics(mean, kind, out, labels, n, Y);
    mean_metrics(chance, kind, constant, labels, n, Y);
    for (size_t y = 0; y < Y && Y > 1; y++) {
        double metric[METRICS];
        task_metrics(metric, kind, out, labels, n, Y, y);
        printf("%-24s", data->task_names[y]);
        print_metrics(stdout, metric);
        if (kind == TASK_CLASSIFICATION) continue;
        task_metrics(metric, kind, constant, labels, n, Y, y);
        printf("%24s", "by chance");
        print_metrics(stdout, metric);
    }
    note_constant(run, out, n, data->task_names);
    for (size_t k = 0; k < n * Y && kind == TASK_CLASSIFICATION; k++) out[k] = sigmoid(out[k]);
    if (kind == TASK_CLASSIFICATION) print_reliability(stdout, out, labels, n * Y);
    FREE_ALL(constant, out, labels);
}

// Keeps what `predict` makes intervals of, in the model's file: prediction - label in the labels'
// units, (molecules, Y), of at most RESIDUALS molecules of the validation set, evenly spaced; NaN
// where there is no label. Models of one validation set have the same molecules, in order.
enum { RESIDUALS = 1000 };
static void residuals_keep(Run *run) {
    float *labels, *out = predict_all(&labels, run, &run->valid);
    size_t Y = (size_t)run->valid.n_tasks, n = run->valid.count;
    size_t step = max_size((n + RESIDUALS - 1) / RESIDUALS, 1);
    run->n_residuals = (n + step - 1) / step;
    free(run->residuals);
    run->residuals = xmalloc(run->n_residuals * Y, sizeof *run->residuals);
    for (size_t k = 0; k < run->n_residuals * Y; k++) {
        size_t from = k / Y * step * Y + k % Y;
        run->residuals[k] = out[from] - labels[from];
    }
    FREE_ALL(out, labels);
}

// Begins the seed at hand, or goes on from its state.
static void seed_begin(Run *run) {
    Model *model = &run->s.model;
    size_t Y = (size_t)run->train.n_tasks;
    run->done = run->epochs = run->shown = 0;
    run->epoch = -1;
    run->n_residuals = 0;
    if (state_open(run)) {
        run_load(run);
        fprintf(stderr, "resumed after step %lld of seed %llu\n", (long long)run->done,
                (unsigned long long)run_seed(run));
        return;
    }
    model_init(model, run_seed(run));
    init_check(run);
    if (opt.init) transfer_load(model, opt.init, &run->train, run->nth > 0);
    if (run->task.readout != READ_SUM)  // of a sum the bias counts once an atom
        memcpy(model->p.head2_b, run->statistics + 2 * Y, sizeof(float) * Y);
    memset(model->m, 0, sizeof(float) * model->count);
    memset(model->v, 0, sizeof(float) * model->count);
}

// The end of a seed: what its best parameters are worth. Adds its metrics and their squares to the
// sums; chance: see finetune_report().
static void seed_end(Run *run, double chance[METRICS], double sum[METRICS],
                     double square[METRICS]) {
    const Epoch *best = best_epoch(run);
    double metric[METRICS];
    memcpy(run->s.model.params, run->best, sizeof(float) * run->s.model.count);
    run->scale = best->scale;
    finetune_report(metric, chance, run);
    if (run->task.kind == TASK_REGRESSION) {
        residuals_keep(run);
        checkpoint_write(run);
    }
    run->scale = 1;
    for (int k = 0; k < METRICS; k++) {
        sum[k] += metric[k];
        square[k] += metric[k] * metric[k];
    }
    printf("seed %llu: best epoch %.0f, valid %s%s; %s", (unsigned long long)run_seed(run),
           (double)best->best, number_text(shown_metric(run, best->valid), 4),
           run->task.kind == TASK_REGRESSION && run->train.n_tasks > 1 ? " deviations" : "",
           run->test.data ? "test" : "valid");
    print_metrics(stdout, metric);
    fflush(stdout);
}

// Says so if models of other seeds lie where those of this run will: the pattern that names an
// ensemble would take them in.
static void note_other_seeds(void) {
    int n = 0;
    for (int64_t seed = 0; seed < 1000; seed++) {
        char ending[64];
        snprintf(ending, sizeof ending, ".seed%lld.safetensors", (long long)seed);
        char *path = path_with(opt.output, ".safetensors", ending);
        int own = opt.seeds > 1 && seed >= opt.seed && seed < opt.seed + opt.seeds;
        if (!own && access(path, F_OK) == 0 && n++ == 0)
            fprintf(stderr, "note    %s is there, of another run: leave it out of an ensemble, or "
                    "remove it\n", path);
        free(path);
    }
    if (n > 1) fprintf(stderr, "note    and %d more of other seeds\n", n - 1);
}

// A seed is a run of its own; the summary is of all.
static void command_finetune(const char *train_path) {
    Run run = {0};
    double chance[METRICS], sum[METRICS] = {0}, square[METRICS] = {0};
    finetune_open(&run, train_path);
    note_other_seeds();
    const char *part = run.test.data ? "test" : "valid";
    printf("  seed  epoch      loss      valid (%s)\n", selection_name(&run));
    for (run.nth = 0; run.nth < opt.seeds; run.nth++) {
        seed_begin(&run);
        run_train(&run);
        seed_end(&run, chance, sum, square);
    }
    for (int k = 0; k < METRICS && opt.seeds > 1; k++) {
        double n = (double)opt.seeds, m = sum[k] / n, variance = (square[k] - n * m * m) / (n - 1);
        if (!isnan(m)) printf("%s %s: %s +- %s over %lld seeds\n", part, METRIC_NAMES[k],
                              number_text(m, 4), number_text(sqrt(fmax(variance, 0)), 4),
                              (long long)opt.seeds);
    }
    printf("by chance (the training mean for all): %s", part);
    print_metrics(stdout, chance);
    printf("wrote %s, %s\n", opt.output, run.log_path);
    run_close(&run);
}
