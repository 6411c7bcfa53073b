// commands/finetune.h - ./moleblend finetune train.bin --valid v.bin --test t.bin --init FILE
//
// Each of --seeds is a run of its own, with its own state; what several of them share is opened
// once. The loop is in tune(), at the end.

typedef struct {
    Run run;                  // of the seed at hand
    Step s;
    Task task;
    float *statistics;        // (3, Y) see task_statistics()
    int judged;               // can the validation set judge? Else the training loss does
    int64_t nth;              // the seed at hand, from 0 on
    float *best, *seed_best;  // parameters of the best epoch; (seeds) what each has reached
    OutFile *locks;           // (seeds) of several: see run_claim()
    float *residuals;         // (n_residuals, Y) of regression, at a seed's end
    size_t n_residuals;
} Tuning;

// ---- the choice of an epoch. The history's fourth column has calibration() of the validation set

enum { HISTORY_COLUMNS = HISTORY_SCALE + 1 };

// The number by which epochs are chosen, better when larger: the mean ROC-AUC, or minus the mean
// RMSE in deviations of the training labels, so that no task's unit outweighs another's, over the
// tasks that the dataset can judge; minus the training loss if there is none. Of classes also the
// calibration().
static float selection_metric(float *scale, Tuning *t, const Dataset *data, double loss) {
    const Task *task = &t->task;
    size_t Y = (size_t)data->n_tasks, defined = 0;
    float *labels, *out = predict_all(&labels, &t->s, task, data);
    double sum = 0, metric[METRICS];
    labels_judge(labels, data, NULL, NULL);
    for (size_t k = 0; k < data->count * Y; k++)
        CHECK(isfinite(out[k]), "%s: molecule %zu: the prediction is no longer a number. What was "
              "saved before is kept. Try a lower --lr", data->path, k / Y);
    *scale = task->kind == TASK_REGRESSION ? 1 : calibration(out, labels, data->count * Y);
    for (size_t y = 0; y < Y; y++) {
        task_metrics(metric, task->kind, out, labels, data->count, Y, y);
        double now = metric[METRIC_AUC];
        if (task->kind == TASK_REGRESSION) now = -metric[METRIC_RMSE] / (double)task->std[y];
        defined += !isnan(now);
        sum += isnan(now) ? 0 : now;
    }
    FREE_ALL(out, labels);
    return (float)(t->judged ? sum / (double)defined : -loss);
}

// A selection_metric() for people: of a single task in its units; NaN if no label judged.
static double shown_metric(const Tuning *t, float metric) {
    if (!t->judged) return (double)NAN;
    return fabs((double)metric) * (t->run.train.n_tasks == 1 ? (double)t->task.std[0] : 1);
}

static const char *selection_name(const Tuning *t) {
    if (t->task.kind == TASK_CLASSIFICATION) return "ROC-AUC";
    return t->run.train.n_tasks == 1 ? "RMSE" : "RMSE in deviations of the labels";
}

// The end of an epoch, mean: of its log: a row of the history and a line on stdout; the parameters
// are kept if they are the best on the validation set.
static void epoch_end(Tuning *t, int64_t epoch, const double mean[LOG_COLUMNS]) {
    const Model *model = &t->s.model;
    float scale, valid = selection_metric(&scale, t, &t->run.valid, mean[LOSS_TOTAL]);
    float *row = history_add(&t->run, (float)mean[LOSS_TOTAL], valid, 1);
    int better = row[HISTORY_BEST] == (float)epoch;
    row[HISTORY_SCALE] = scale;
    if (better) memcpy(t->best, model->params, sizeof(float) * model->count);
    progress_clear(&t->run.progress);
    printf("%6llu %6lld %9s %10s%s\n", (unsigned long long)t->run.seed, (long long)epoch,
           number_text(mean[LOSS_TOTAL], 4), number_text(shown_metric(t, valid), 4),
           better ? "  best so far" : "");
    fflush(stdout);
}

// Adds the epochs to the CSV that it has not yet.
static void csv_epochs(Tuning *t) {
    char *heading = xprintf("seed,epoch,loss,valid %s,best_epoch", selection_name(t));
    csv_write(&t->run, heading, 1, shown_metric(t, 1));
    free(heading);
}

// ---- saving

// Metadata of a checkpoint or state: where the run is, and the task.
static char *tuning_meta(const Tuning *t, int of_state) {
    Text text = {0};
    const float *best = best_row(&t->run);
    run_meta(&text, &t->run, t->s.model.config, t->nth, of_state);
    text_add_meta(&text, "seed", "%llu", (unsigned long long)t->run.seed);
    text_add_meta(&text, "task", "%s", TASK_KINDS[t->task.kind]);
    text_add_meta(&text, "readout", "%s", READOUT_NAMES[t->task.readout]);
    text_add_meta(&text, "modality", "%s", opt.modality);
    text_add_tasks(&text, t->run.train.n_tasks, t->run.train.task_names, t->task.mean, t->task.std);
    if (best) text_add_meta(&text, "logit_scale", "%.9g", (double)best[HISTORY_SCALE]);
    return text.text;
}

// Where the best parameters of a seed go if there are several: with the others they make an
// ensemble for `predict`.
static char *seed_path(int64_t seed) {
    char ending[64];
    snprintf(ending, sizeof ending, ".seed%lld.safetensors", (long long)seed);
    return path_with(opt.output, ".safetensors", ending);
}

// Writes the checkpoint: this seed's best parameters, if no seed has better ones. Of several seeds
// each has its own file too.
static void tuning_checkpoint(const Tuning *t) {
    const float *best = best_row(&t->run);
    float *const output[ARENAS] = {t->best};
    TensorOut other = {"valid_residuals", t->n_residuals, (size_t)t->run.train.n_tasks,
                       t->residuals};
    int64_t leader = 0;
    if (!best) return;
    char *meta = tuning_meta(t, 0), *own = seed_path(opt.seed + t->nth);
    t->seed_best[t->nth] = best[HISTORY_VALID];
    for (int64_t k = 0; k < opt.seeds; k++)
        if (t->seed_best[k] > t->seed_best[leader]) leader = k;
    if (my_rank == 0 && leader == t->nth)
        model_write(opt.output, &t->s.model, output, &other, 1, meta);
    if (my_rank == 0 && opt.seeds > 1) model_write(own, &t->s.model, output, &other, 1, meta);
    FREE_ALL(meta, own);
}

// First the state, so that a run killed between two renames resumes from it; then the checkpoint.
static void tuning_save(Tuning *t) {
    model_state_write(&t->run, &t->s.model, t->best, tuning_meta(t, 1));
    tuning_checkpoint(t);
    csv_epochs(t);
}

// ---- opening

// Begins with a seed, the nth from 0 on: nothing is done. Opens its state and returns 1 if the run
// is resumed and has one. The first seed's is that of the output.
static int seed_open(Tuning *t, int64_t nth) {
    Run *run = &t->run;
    t->nth = nth;
    run->seed = (uint64_t)(opt.seed + nth);
    run->done = run->log.n = run->history.n = run->shown = 0;
    run->epoch = -1;
    char *own = seed_path(opt.seed + nth);
    free(run->state_path);
    run->state_path = xprintf("%s.state", nth ? own : opt.output);
    free(own);
    if (!run->resumed || access(run->state_path, F_OK) != 0) return 0;
    tensor_file_open(&run->state, run->state_path);
    if (meta_whole(&run->state, "begun") == run->begun) return 1;
    tensor_file_close(&run->state);  // it is of an older run
    return 0;
}

// Looks at the seeds before hours of work: claims their files if they are several, and takes from
// their states what each has reached; for those that have none, --init must be as it was.
static void seeds_open(Tuning *t) {
    tensor_file_close(&t->run.state);  // the first seed's, opened for the options
    t->seed_best = xmalloc((size_t)opt.seeds, sizeof *t->seed_best);
    t->locks = xmalloc((size_t)opt.seeds, sizeof *t->locks);
    for (int64_t nth = opt.seeds - 1; nth >= 0; nth--) {
        char *own = seed_path(opt.seed + nth);
        if (my_rank == 0 && opt.seeds > 1) run_claim(&t->locks[nth], own, LOG_BEGINS);
        if (seed_open(t, nth)) model_state_load(&t->run, &t->s.model, t->best, nth, opt.epochs);
        else if (t->run.resumed) same_init(&t->run, opt.init);
        t->seed_best[nth] = best_row(&t->run) ? best_row(&t->run)[HISTORY_VALID] : -INFINITY;
        free(own);
    }
}

// Says so if models of other seeds lie where those of this run will: the pattern that names an
// ensemble would take them in.
static void note_other_seeds(void) {
    int n = 0;
    for (int64_t seed = 0; seed < 1000; seed++) {
        char *path = seed_path(seed);
        int own = opt.seeds > 1 && seed >= opt.seed && seed < opt.seed + opt.seeds;
        if (!own && access(path, F_OK) == 0 && n++ == 0)
            fprintf(stderr, "note    %s is there, of another run: leave it out of an ensemble, or "
                    "remove it\n", path);
        free(path);
    }
    if (n > 1) fprintf(stderr, "note    and %d more of other seeds\n", n - 1);
}

// Opens what fine-tuning needs, and says what will be done.
static void tuning_open(Tuning *t, const char *train_path) {
    Run *run = &t->run;
    train_open(run, &t->s, train_path, DEFAULT_BATCH, 1);
    run->steps = epochs_steps(run, opt.epochs);
    run->log = rows_make(run->steps, LOG_COLUMNS);
    run->history = rows_make(opt.epochs, HISTORY_COLUMNS);
    const Dataset *const sets[] = {&run->train, &run->valid, &run->test};
    size_t Y = (size_t)run->train.n_tasks;
    tasks_check(&run->train, &run->valid, &run->test, opt.valid);
    if (!opt.readout) opt.readout = DEFAULT_READOUT;
    if (!opt.modality) opt.modality = DEFAULT_MODALITY;
    t->statistics = xmalloc(3 * Y, sizeof *t->statistics);
    t->task = (Task){.readout = (Readout)choice("--readout", opt.readout, READOUT_NAMES, 3),
                     .use = modality_use(opt.modality),
                     .mean = t->statistics, .std = t->statistics + Y, .scale = 1,
                     .label_units = choice("--loss-units", opt.loss_units, UNIT_NAMES, 2)};
    t->task.kind = task_statistics(t->statistics, sets, &opt.task, 0);
    if (t->task.kind == TASK_CLASSIFICATION && was_given(&opt.loss_units))
        fprintf(stderr, "note    --loss-units has no effect on classes\n");
    t->judged = can_judge(&run->valid, "the training loss chooses the epoch and when to stop");
    for (int k = 0; k < 3; k++) check_positions(sets[k], t->task.use);
    Config c = start_config(run->resumed ? NULL : opt.init);
    c.tasks = run->train.n_tasks;
    model_create(&t->s.model, c, 1);
    t->best = xmalloc(t->s.model.count, sizeof *t->best);
    rooms_reserve(&t->s, run, part_size());
    fprintf(stderr, "model   %d layers, %d wide: %.2f M parameters; %s, %s read-out, modality %s\n",
            c.layers, c.dim, (double)t->s.model.count / 1e6, opt.task, opt.readout, opt.modality);
    fprintf(stderr, "data    %zu training, %zu validation, %zu test molecules, %d task%s\n",
            run->train.count, run->valid.count, run->test.count, c.tasks, c.tasks > 1 ? "s" : "");
    seeds_open(t);
    note_other_seeds();
}

// ---- a seed

// Metrics of the test set (validation set without one): of several tasks, one by one on stdout;
// `mean` over the tasks; `chance`: the mean if every prediction were the training mean.
static void finetune_report(double mean[METRICS], double chance[METRICS], Tuning *t) {
    const Dataset *data = t->run.test.data ? &t->run.test : &t->run.valid;
    TaskKind kind = t->task.kind;
    float *labels, *out = predict_all(&labels, &t->s, &t->task, data);
    size_t Y = (size_t)data->n_tasks, n = data->count;
    float *constant = xmalloc(mul_size(n, Y), sizeof *constant);
    for (size_t k = 0; k < n * Y; k++) constant[k] = t->task.mean[k % Y];
    task_means(mean, kind, out, labels, n, Y);
    task_means(chance, kind, constant, labels, n, Y);
    for (int k = METRIC_RMSE; k <= METRIC_MAE && Y > 1; k++)  // units that tasks need not share
        mean[k] = chance[k] = (double)NAN;
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
    note_constant(&t->task, out, n, Y, data->task_names);
    for (size_t k = 0; k < n * Y && kind == TASK_CLASSIFICATION; k++) out[k] = sigmoid(out[k]);
    if (kind == TASK_CLASSIFICATION) print_reliability(stdout, out, labels, n * Y);
    FREE_ALL(constant, out, labels);
}

// Keeps what `predict` makes intervals of, in the model's file: prediction - label in the labels'
// units, (molecules, Y), of at most RESIDUALS molecules of the validation set, evenly spaced; NaN
// where there is no label. Models of one validation set have the same molecules, in order.
enum { RESIDUALS = 1000 };
static void residuals_keep(Tuning *t) {
    float *labels, *out = predict_all(&labels, &t->s, &t->task, &t->run.valid);
    size_t Y = (size_t)t->run.valid.n_tasks, n = t->run.valid.count;
    size_t step = max_size((n + RESIDUALS - 1) / RESIDUALS, 1);
    t->n_residuals = (n + step - 1) / step;
    free(t->residuals);
    t->residuals = xmalloc(t->n_residuals * Y, sizeof *t->residuals);
    for (size_t k = 0; k < t->n_residuals * Y; k++) {
        size_t from = k / Y * step * Y + k % Y;
        t->residuals[k] = out[from] - labels[from];
    }
    FREE_ALL(out, labels);
}

// Initial values of the seed at hand: those of --init, a new head that begins at its bias.
static void tuning_init(Tuning *t) {
    Model *model = &t->s.model;
    size_t Y = (size_t)t->run.train.n_tasks;
    model_init(model, t->run.seed);
    same_init(&t->run, opt.init);
    if (opt.init) transfer_load(model, opt.init, &t->run.train, t->nth > 0);
    if (t->task.readout != READ_SUM)  // of a sum the bias counts once an atom
        memcpy(model->p.head2_b, t->statistics + 2 * Y, sizeof(float) * Y);
    memset(model->m, 0, sizeof(float) * model->count);
    memset(model->v, 0, sizeof(float) * model->count);
}

// Trains the seed at hand until its steps are done or nothing is gained; a signal ends the program.
static void tune(Tuning *t, Parts *parts) {
    Run *run = &t->run;
    Step *s = &t->s;
    Adam adam = opt.adam;
    int64_t warmup = opt.warmup >= 0 ? opt.warmup : run->steps / 10 + 1, epoch;
    double loss[LOSSES], mean[LOG_COLUMNS];
    run_start(run);
    if (run->done == 0)  // from here on --resume means this run
        model_state_write(run, &s->model, t->best, tuning_meta(t, 1));
    for (int64_t k = run->done;
         k < run->steps && !enough(run, opt.patience) && !run_stopped(run); k++) {
        double start = now_seconds();
        update_ids(run, k);
        parts->pass.draws = (Draws){run->seed, (uint32_t)k, 0, 1};
        for (parts_begin(parts, s); parts_next(parts, s); parts_add(parts, s))
            task_gradients(parts->loss, s, &t->task);
        parts_end(loss, parts, s);
        adam.lr = learning_rate(opt.adam.lr, k, warmup, run->steps, opt.hold);
        double norm = adamw_step(&s->model, &adam, k + 1);
        log_update(run, s, loss, &adam, norm, start);  // run->done is k + 1 then
        if ((epoch = epoch_ended(mean, run))) epoch_end(t, epoch, mean);
        csv_epochs(t);
        if (save_due(run, opt.save_every)) tuning_save(t);
        run_progress(run, " of this seed", run->done == run->steps);
    }
    progress_clear(&run->progress);
    if (!run->stopped && run->done < run->steps)
        fprintf(stderr, "seed %llu: no gain for %lld epochs (--patience), ended after %lld of %lld "
                "steps\n", (unsigned long long)run->seed, (long long)opt.patience,
                (long long)run->done, (long long)run->steps);
    tuning_save(t);
    run_end(run);
}

// The end of a seed: what its best parameters are worth. Adds its metrics and their squares to the
// sums; chance: see finetune_report().
static void seed_end(Tuning *t, double chance[METRICS], double sum[METRICS],
                     double square[METRICS]) {
    const float *best = best_row(&t->run);
    double metric[METRICS];
    memcpy(t->s.model.params, t->best, sizeof(float) * t->s.model.count);
    t->task.scale = best[HISTORY_SCALE];
    finetune_report(metric, chance, t);
    if (t->task.kind == TASK_REGRESSION) {
        residuals_keep(t);
        tuning_checkpoint(t);
    }
    t->task.scale = 1;
    t->n_residuals = 0;
    for (int k = 0; k < METRICS; k++) {
        sum[k] += metric[k];
        square[k] += metric[k] * metric[k];
    }
    printf("seed %llu: best epoch %.0f, valid %s%s; %s", (unsigned long long)t->run.seed,
           (double)best[HISTORY_BEST], number_text(shown_metric(t, best[HISTORY_VALID]), 4),
           t->task.kind == TASK_REGRESSION && t->run.train.n_tasks > 1 ? " deviations" : "",
           t->run.test.data ? "test" : "valid");
    print_metrics(stdout, metric);
    fflush(stdout);
}

static void command_finetune(const char *train_path) {
    Tuning t = {0};
    double chance[METRICS], sum[METRICS] = {0}, square[METRICS] = {0};
    tuning_open(&t, train_path);
    Parts parts = {.pass = {.data = &t.run.train, .ids = t.run.ids, .n = (idx)opt.batch,
                            .part = (idx)opt.part, .use = t.task.use}};
    const char *part = t.run.test.data ? "test" : "valid";
    printf("  seed  epoch      loss      valid (%s)\n", selection_name(&t));
    for (int64_t nth = 0; nth < opt.seeds; nth++) {
        if (seed_open(&t, nth)) {
            model_state_load(&t.run, &t.s.model, t.best, nth, opt.epochs);
            fprintf(stderr, "resumed after step %lld of seed %llu\n", (long long)t.run.done,
                    (unsigned long long)t.run.seed);
        } else {
            tuning_init(&t);
        }
        tune(&t, &parts);
        seed_end(&t, chance, sum, square);
    }
    for (int k = 0; k < METRICS && opt.seeds > 1; k++) {  // a summary of all
        double n = (double)opt.seeds, m = sum[k] / n, variance = (square[k] - n * m * m) / (n - 1);
        if (!isnan(m)) printf("%s %s: %s +- %s over %lld seeds\n", part, METRIC_NAMES[k],
                              number_text(m, 4), number_text(sqrt(fmax(variance, 0)), 4),
                              (long long)opt.seeds);
    }
    printf("by chance (the training mean for all): %s", part);
    print_metrics(stdout, chance);
    printf("wrote %s, %s\n", opt.output, t.run.log_path);
    for (int64_t k = 0; k < opt.seeds; k++)
        if (t.locks[k].file) out_discard(&t.locks[k]);
    FREE_ALL(parts.sum, t.statistics, t.best, t.seed_best, t.locks, t.residuals);
    step_close(&t.s);
    run_free(&t.run);
}
