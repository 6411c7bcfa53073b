// run.c - options, losses and metrics on data, training loops, commands; part of moleculesde.c

#ifndef MOLECULESDE_TEST
#include "../lib/commands.h"  // TEXT(), WHOLE() ...: rows of OPTIONS; command_find()
#include "../lib/sdfile.h"    // sd_write(): a molecule as a record of an SD file

// =================================================================================================
// 14 Options
// =================================================================================================

// What the command line sets; the initial values are the defaults.
typedef struct {
    const char *output, *valid, *test, *init, *model, *task, *encoder, *sde, *edges, *precision;
    int64_t dim, layers, filters, gaussians, blocks, hidden, width, channels, last_channels;
    int64_t steps, epochs, batch, seed, threads, save_every, copies, sample_steps;
    double scale_3d;
    int resume, help;
    Method method;
    Adam adam;
} Options;

static Options opt = {
    .encoder = "2d", .sde = "ve", .edges = "gated", .precision = "float32",
    .dim = 300, .layers = 5, .filters = 128, .gaussians = 51, .blocks = 6, .hidden = 32,
    .width = 16, .channels = 8, .last_channels = 4,
    .steps = 600, .epochs = 100, .seed = 1, .save_every = 100, .copies = 10, .sample_steps = 1000,
    .scale_3d = 1, .method = {0, {0.2, 1}, {0.1, 1}, {0.2, 1}, 0, 0.1, 0.5, 1, 1, 1},
    .adam = {5e-4, 0.9, 0.999, 1e-8, 0, 0},
};

enum { GENERATE = 16, READ = PREDICT | EMBED | GENERATE, PRETRAINING = PRETRAIN | SHAPES,
       TUNING = FINETUNE | SHAPES, TRAINING = TRAIN | SHAPES,
       METHOD = 512,    // an option that is kept for --model
       NOISE = PRETRAINING | METHOD };

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
    TEXT("--edges", edges, "NAME", "of 2D -> 3D: gated by length (02) or plain (01)", PRETRAINING),
    HEADING("Training", TRAIN | READ),
    WHOLE("--steps", steps, 1, 1e9, "updates", PRETRAINING | GROWS),
    WHOLE("--epochs", epochs, 1, 1e6, "passes over the training set", TUNING),
    WHOLE("--batch-size", batch, 0, 1e6, "molecules at a time (pretraining 64, fine-tuning 128)",
          TRAINING | PREDICT | EMBED),
    NUMBER("--lr", adam.lr, 0, 10, "learning rate", TRAINING),
    NUMBER("--scale-3d", scale_3d, 0, 100, "times that: rate of SchNet and 3D -> 2D", PRETRAINING),
    WHOLE("--seed", seed, 0, 9e15, "names every random draw", TRAINING | GENERATE),
    WHOLE("--threads", threads, 0, MAX_THREADS, "0: all; results are the same", TRAIN | READ),
    TEXT("--precision", precision, "NAME", "of matrix products, also of a model trained otherwise: "
         "float32, or bf16 (operands of 8 bits, sums are float32)", TRAINING | READ),
    HEADING("Method", PRETRAIN),
    TEXT("--sde", sde, "NAME", "ve or vp: variance exploding or preserving", NOISE),
    NUMBER("--sigma-3d-low", method.ve3d.low, 1e-4, 100, "VE: least noise on positions", NOISE),
    NUMBER("--sigma-3d-high", method.ve3d.high, 1e-4, 100, "most", NOISE),
    NUMBER("--sigma-2d-low", method.ve2d.low, 1e-4, 100, "VE: least noise on the graph", NOISE),
    NUMBER("--sigma-2d-high", method.ve2d.high, 1e-4, 100, "most", NOISE),
    NUMBER("--beta-low", method.beta.low, 1e-4, 100, "VP: rate of noising at t = 0", NOISE),
    NUMBER("--beta-high", method.beta.high, 1e-4, 100, "at t = 1", NOISE),
    NUMBER("--anneal", method.anneal, 0, 10, "power of sigma in generation's losses", PRETRAINING),
    NUMBER("--weight-contrast", method.contrast, 0, 1e6, "of a loss", PRETRAINING),
    NUMBER("--weight-3d", method.to3d, 0, 1e6, "of a loss", PRETRAINING),
    NUMBER("--weight-2d", method.to2d, 0, 1e6, "of a loss", PRETRAINING),
    NUMBER("--attention-dropout", method.attention_dropout, 0, 0.99, "in 2D -> 3D", PRETRAINING),
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

static char option_given[N_OPTIONS];
static const char *const SDE_NAMES[] = {"ve", "vp"};
static const char *const EDGE_NAMES[] = {"plain", "gated"};
static const char *const ENCODER_NAMES[] = {"2d", "3d"};

// Takes the options of a state or checkpoint where the command line is silent.
static void options_from_state(const char *text, const char *path) {
    options_resume(OPTIONS, N_OPTIONS, GROWS, FILES, option_given, text, path);
}

#include "../commands/shared.h"  // help_print(), command_files(), run_open(), text_add_run()

static Method option_method(int dropout) {
    Method m = opt.method;
    m.vp = choice("--sde", opt.sde, SDE_NAMES, 2);
    CHECK(m.ve3d.low <= m.ve3d.high && m.ve2d.low <= m.ve2d.high && m.beta.low <= m.beta.high,
          "expected --sigma-3d %g to %g, --sigma-2d %g to %g, --beta %g to %g (low, high) to rise",
          m.ve3d.low, m.ve3d.high, m.ve2d.low, m.ve2d.high, m.beta.low, m.beta.high);
    if (!dropout) m.dropout = 0;
    return m;
}

static Shape option_shape(void) {
    return (Shape){(int)opt.dim, (int)opt.layers, (int)opt.filters, (int)opt.gaussians,
                   (int)opt.blocks, (int)opt.hidden, (int)opt.width, (int)opt.channels,
                   (int)opt.last_channels, choice("--edges", opt.edges, EDGE_NAMES, 2), 0, 0};
}

// =================================================================================================
// 15 A job: losses, predictions and metrics of a model on data; what is a run's beside lib/run.h
// =================================================================================================

enum { LOG_LR = TERMS, LOG_NORM, LOG_RATE, LOG_COLUMNS,  // of the log; the losses come first
       HISTORY_COLUMNS = HISTORY_BEST + 1 };
#define LOG_HEADING                                                                                \
    "step,total,contrast,2d->3d,elements,bonds,accuracy,lr,gradient_norm,molecules_per_second"
#define HISTORY_HEADING "epoch,loss,valid,best_epoch"
#define LOG_BEGINS "step,total,contrast,|" HISTORY_HEADING "\n"

typedef struct {
    Sde s;
    struct Run run;              // of training
    Dataset data;                // of what uses a model
    TensorFile file;             // --model, or --init of fine-tuning
    Task task;                   // of a fine-tuned model
    float *statistics;           // and its labels', see task_statistics()
    int judged;                  // can the validation set judge? Else the training loss does
    float *best;                 // parameters of the best epoch
} Job;

// Dies if a dataset lacks the positions that are needed.
static void check_positions(const Dataset *data) {
    size_t without = 0, first = 0;
    for (size_t i = data->count; i-- > 0;)
        if (!dataset_has_pos(data, i)) without++, first = i;
    Molecule m = {0};
    if (without) dataset_read(data, first, &m);
    CHECK(!without, "%s: %zu of %zu molecules have no positions, the first is %s: leave them out "
          "with data_prep --skip-list, or if they are flat, mark their SD records as 3D",
          data->path, without, data->count, m.name);
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
    if (B) mols_load(&s->mols, data, ids, B, 0);  // labels are for training alone
    free(ids);
    return B;
}

// Mean losses of a dataset's first `most` molecules, of the model or by chance; NaN if it has none.
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

// Predictions (n, Y) of a dataset in the labels' units, or logits, in fresh memory. Of classes mean
// and std are 0 and 1.
static float *predict_all(Job *t, const Dataset *data) {
    const Task *task = &t->task;
    Sde *s = &t->s;
    size_t Y = (size_t)s->shape.tasks;
    float *out = xmalloc(mul_size(data->count, Y), sizeof *out);
    for (size_t i = 0, B; (B = load_next(s, data, i, SIZE_MAX)) > 0; i += B) {
        task_forward(s);
        for (size_t k = 0; k < B * Y; k++)
            out[i * Y + k] = s->a.logits[k] * task->std[k % Y] + task->mean[k % Y];
    }
    return out;
}

// Mean metrics over the tasks of a dataset in which they are defined; of several tasks errors are
// in deviations of the training labels. chance: the same of constant predictions; NULL: an epoch
// is chosen, and tasks that cannot judge are left out.
static void data_metrics(double mean[METRICS], double *chance, Job *t, const Dataset *data) {
    const Task *task = &t->task;
    size_t Y = (size_t)t->s.shape.tasks, n = data->count;
    float *labels = dataset_labels(data), *out = predict_all(t, data);
    float *constant = xmalloc(n * Y, sizeof *constant);
    if (!chance) labels_judge(labels, data, NULL, NULL);
    for (size_t k = 0; k < n * Y; k++) {
        float unit = Y > 1 && task->kind == TASK_REGRESSION ? task->std[k % Y] : 1;
        CHECK(isfinite(out[k]), "%s: molecule %zu: the prediction is no number; try a lower --lr",
              data->path, k / Y);
        out[k] /= unit;
        labels[k] /= unit;
        constant[k] = task->mean[k % Y] / unit;
    }
    task_means(mean, task->kind, out, labels, n, Y);
    if (chance) task_means(chance, task->kind, constant, labels, n, Y);
    FREE_ALL(constant, out, labels);
}

// Metadata of a checkpoint or state: where the run is, its options, the task.
static char *training_meta(const Job *t, int of_state) {
    Text text = {0};
    const struct Run *run = &t->run;
    const char *const keys[] = {"step", "molecules", DATA_KEYS[0], DATA_KEYS[1], DATA_KEYS[2],
                                "init_fingerprint"};
    const long long values[] = {run->done, (long long)run->train.count, run->prints[0],
                                run->prints[1], run->prints[2], run->init_print};
    char *method = options_describe(OPTIONS, N_OPTIONS, METHOD);
    text_add_run(&text, keys, values, of_state ? 6 : 3, of_state ? SHAPES | FILES : SHAPES,
                 &run->train);
    text_add_meta(&text, "method", "%s", method);
    if (t->s.shape.tasks) {
        text_add_meta(&text, "task", "%s", TASK_KINDS[t->task.kind]);
        text_add_tasks(&text, t->s.shape.tasks, run->train.task_names, t->task.mean, t->task.std);
    }
    free(method);
    return text.text;
}

// The log, or of fine-tuning the history, as CSV.
static void training_csv(Job *t) {
    const char *heading = t->run.history.x ? HISTORY_HEADING : LOG_HEADING;
    csv_write(&t->run, heading, 0, t->judged ? 1 : (double)NAN);
}

// First the state, so that a run killed between two renames resumes from it; then the checkpoint.
static void training_save(Job *t) {
    float *const one[ARENAS] = {t->run.history.n ? t->best : t->s.model.params};
    char *meta = training_meta(t, 0);
    model_state_write(&t->run, &t->s.model, t->best, training_meta(t, 1));
    model_write(opt.output, &t->s.model, one, NULL, 0, meta);
    training_csv(t);
    free(meta);
}

// From here on a signal ends the loop, and --resume means this run.
static void training_begin(Job *t) {
    run_start(&t->run);
    if (t->run.done) fprintf(stderr, "resumed after step %lld\n", (long long)t->run.done);
    else model_state_write(&t->run, &t->s.model, t->best, training_meta(t, 1));
}

static void job_close(Job *t) {
    run_free(&t->run);
    dataset_close(&t->data);
    tensor_file_close(&t->file);
    sde_free(&t->s);
    FREE_ALL(t->statistics, t->best);
}

// The row of an update in the log, see log_add(). Dies if training has left the numbers.
static void log_update(struct Run *run, const double loss[TERMS], double lr, double norm,
                       double start) {
    CHECK(isfinite(loss[TERM_TOTAL]) && norm < 1e18, "step %lld: the loss is no longer a number. "
          "What was saved before is kept. Try a lower --lr", (long long)run->done + 1);
    log_add(run, loss, TERMS, lr, norm, start);
}

// =================================================================================================
// 16 Commands and main
// =================================================================================================

// Opens what pretraining needs, and says what will be done.
static void pretrain_open(Job *t, const char *train_path) {
    struct Run *run = &t->run;
    Shape c;
    run_open(run, train_path, LOG_BEGINS, 64, NULL, 0);
    check_positions(&run->train);
    check_positions(&run->valid);
    run->steps = opt.steps;
    run->log = rows_make(run->steps, LOG_COLUMNS);
    t->s.method = option_method(0);
    sde_create(&t->s, c = option_shape(), 1);
    if (run->resumed) model_state_load(run, &t->s.model, NULL, -1, 0);
    else model_init(&t->s.model, run->seed);
    if (opt.init && !run->resumed) init_load(&t->s.model, opt.init, &run->train);
    fprintf(stderr, "model   %d wide, GIN of %d layers, SchNet of %d blocks, %s, %s edges: %.2f M "
            "parameters\ndata    %s: %zu molecules; %s: %zu\nrun     %lld steps of %lld molecules "
            "(%.1f epochs) on %d thread%s\n", c.dim, c.layers, c.blocks, opt.sde, opt.edges,
            (double)t->s.group_end[GROUP_3D] / 1e6, train_path, run->train.count,
            opt.valid ? opt.valid : "no validation", run->valid.count, (long long)run->steps,
            (long long)run->batch, (double)(run->steps * run->batch) / (double)run->train.count,
            thread_count(), thread_count() > 1 ? "s" : "");
}

// The result: each loss at the start and the end, on the validation set, and by chance.
static void pretrain_report(Job *t) {
    const Dataset *valid = &t->run.valid;
    double start[LOG_COLUMNS], end[LOG_COLUMNS], held[TERMS], chance[TERMS];
    log_ends(start, end, &t->run);
    mean_losses(held, &t->s, valid, SIZE_MAX, 0);
    mean_losses(chance, &t->s, valid->count ? valid : &t->run.train, 4096, 1);
    printf("\nloss        start     end   valid  by chance\n");
    for (int k = 1; k <= TERMS; k++) {
        int term = k % TERMS;  // the total last
        printf("%-8s %8s%8s%8s%11.4f\n", TERM_NAMES[term], number_text(start[term], 4),
               number_text(end[term], 4), number_text(held[term], 4), chance[term]);
    }
    printf("wrote %s, %s\n", opt.output, t->run.log_path);
}

static void command_pretrain(Job *t, const char *train_path) {
    struct Run *run = &t->run;
    pretrain_open(t, train_path);
    printf("   step     total  contrast   2d->3d elements    bonds  accuracy gradient   mol/s\n");
    training_begin(t);
    while (run->done < run->steps && !run_stopped(run)) {
        double start = now_seconds(), loss[TERMS] = {0}, mean[LOG_COLUMNS];
        Draws draws = {run->seed, (uint32_t)run->done, 0, 1};
        threads_adapt();
        update_ids(run, run->done);
        double norm = sde_step(loss, &t->s, &run->train, run->ids, (size_t)run->batch, &opt.adam,
                               opt.scale_3d, &draws, run->done + 1);
        log_update(run, loss, opt.adam.lr, norm, start);
        if (line_due(mean, run)) {
            progress_clear(&run->progress);
            printf("%7lld  %8s ", (long long)run->done, number_text(mean[TERM_TOTAL], 4));
            for (int k = 1; k < TERM_ACCURACY; k++) printf(" %8s", number_text(mean[k], 4));
            printf("  %8.3f %8.3f %7.0f\n", mean[TERM_ACCURACY], mean[LOG_NORM], mean[LOG_RATE]);
            fflush(stdout);
        }
        training_csv(t);
        if (save_due(run, opt.save_every)) training_save(t);
        run_progress(run, "", 0);
    }
    progress_clear(&run->progress);
    training_save(t);
    run_end(run);
    pretrain_report(t);
}

// Opens what fine-tuning needs, and says what will be done. The sizes of the model are those of the
// state to go on from, or of --init, or if there is neither of the options.
static void finetune_open(Job *t, const char *train_path) {
    struct Run *run = &t->run;
    const Dataset *const sets[] = {&run->train, &run->valid, &run->test};
    run_open(run, train_path, LOG_BEGINS, 128, NULL, 1);
    size_t Y = (size_t)run->train.n_tasks;
    tasks_check(&run->train, &run->valid, &run->test, opt.valid);
    t->statistics = xmalloc(3 * Y, sizeof *t->statistics);
    t->task = (Task){.mean = t->statistics, .std = t->statistics + Y};
    t->task.kind = task_statistics(t->statistics, sets, &opt.task, 1);
    t->judged = can_judge(&run->valid, "the training loss chooses the epoch");
    const TensorFile *from = run->resumed ? &run->state : &t->file;
    Shape c = option_shape();
    if (opt.init && !run->resumed) tensor_file_open(&t->file, opt.init);
    c.use_3d = choice("--encoder", opt.encoder, ENCODER_NAMES, 2);
    if (from->path) c = file_shape(from, c, c.use_3d);
    const int there[] = {c.dim, c.layers, c.blocks, c.filters, c.gaussians};
    sizes_take(opt.init, 5, there, (int64_t *const[]){&opt.dim, &opt.layers, &opt.blocks,
                                                      &opt.filters, &opt.gaussians});
    if (t->file.path) note_stereo(&run->train, opt.init, tensor_meta(from, "stereo"));
    c.tasks = run->train.n_tasks;
    for (int k = 0; k < 3 && c.use_3d; k++) check_positions(sets[k]);
    t->s.method = option_method(1);
    sde_create(&t->s, c, 1);
    run->steps = epochs_steps(run, opt.epochs);
    run->log = rows_make(run->steps, LOG_COLUMNS);
    run->history = rows_make(opt.epochs, HISTORY_COLUMNS);
    t->best = xmalloc(t->s.model.count, sizeof *t->best);
    if (run->resumed) {
        model_state_load(run, &t->s.model, t->best, -1, opt.epochs);
    } else {
        model_init(&t->s.model, run->seed);
        if (opt.init) sde_transfer(&t->s, &t->file);
        memcpy(t->s.p.head.b, t->statistics + 2 * Y, sizeof(float) * Y);
    }
    fprintf(stderr, "model   %s, %d wide: %.2f M parameters; %s, %zu task%s\ndata    %zu training, "
            "%zu validation, %zu test molecules\n", c.use_3d ? "SchNet" : "GIN", c.dim,
            (double)t->s.group_end[GROUP_3D] / 1e6, opt.task, Y, Y > 1 ? "s" : "",
            run->train.count, run->valid.count, run->test.count);
}

// The end of an epoch: a row of the history, a line on stdout; the best parameters are kept.
static void finetune_epoch(Job *t, double loss) {
    struct Run *run = &t->run;
    double metric[METRICS];
    int auc = t->task.kind == TASK_CLASSIFICATION;
    data_metrics(metric, NULL, t, &run->valid);
    float valid = (float)(t->judged ? metric[auc ? METRIC_AUC : METRIC_MAE] : loss);
    const float *row = history_add(run, (float)loss, valid, auc && t->judged);
    int better = (int64_t)row[HISTORY_BEST] == run->history.n;
    if (better) memcpy(t->best, t->s.model.params, sizeof(float) * t->s.model.count);
    progress_clear(&run->progress);
    printf("%6lld %9s %10s%s\n", (long long)run->history.n, number_text(loss, 4),
           t->judged ? number_text((double)valid, 4) : "-", better ? "  best so far" : "");
    fflush(stdout);
}

// What the best parameters are worth on the test set, or without one on the validation set.
static void finetune_report(Job *t) {
    const Dataset *last = t->run.test.count ? &t->run.test : &t->run.valid;
    double metric[METRICS], chance[METRICS];
    memcpy(t->s.model.params, t->best, sizeof(float) * t->s.model.count);
    data_metrics(metric, chance, t, last);
    printf("%s:", t->run.test.count ? "test" : "valid");
    print_metrics(stdout, metric);
    printf("by chance (the training mean for all):");
    print_metrics(stdout, chance);
    printf("wrote %s, %s\n", opt.output, t->run.log_path);
}

static void command_finetune(Job *t, const char *train_path) {
    Sde *s = &t->s;
    struct Run *run = &t->run;
    finetune_open(t, train_path);
    printf(" epoch      loss      valid (%s)\n", t->task.kind == TASK_CLASSIFICATION ? "ROC-AUC"
           : run->train.n_tasks > 1 ? "MAE in deviations" : "MAE");
    training_begin(t);
    while (run->done < run->steps && !run_stopped(run)) {
        double start = now_seconds(), loss[TERMS] = {0}, mean[LOG_COLUMNS];
        double epoch = floor((double)(run->done * run->batch) / (double)run->train.count);
        Adam adam = opt.adam;
        adam.lr *= (1 + cos(3.141592653589793 * epoch / (double)opt.epochs)) / 2;
        threads_adapt();
        update_ids(run, run->done);
        s->draws = (Draws){run->seed, (uint32_t)run->done, 0, 1};
        s->training = 1;
        mols_load(&s->mols, &run->train, run->ids, (size_t)run->batch, s->shape.tasks);
        task_forward(s);
        loss[TERM_TOTAL] = head_loss(s, &t->task);
        task_backward(s);
        double norm = update(s, &adam, 1, run->done + 1);
        log_update(run, loss, adam.lr, norm, start);
        if (epoch_ended(mean, run)) finetune_epoch(t, mean[TERM_TOTAL]);
        training_csv(t);
        if (save_due(run, opt.save_every)) training_save(t);
        run_progress(run, "", run->done == run->steps);
    }
    progress_clear(&run->progress);
    training_save(t);
    run_end(run);
    finetune_report(t);
}

// Opens a dataset and the model and method of --model.
static void model_open(Job *t, const char *path) {
    TensorFile *f = &t->file;
    CHECK(opt.model, "--model: expected a checkpoint");
    dataset_open(&t->data, path);
    tensor_file_open(f, opt.model);
    no_state(f);
    const char *method = tensor_meta(f, "method");
    if (method) options_from_state(method, opt.model);
    Shape c = file_shape(f, option_shape(), -1);
    t->s.method = option_method(1);
    sde_create(&t->s, c, 0);
    model_load(&t->s.model, t->s.model.params, f, "");
    check_preparation(&t->data, f);
    if (!opt.batch) opt.batch = 64;
}

// Predictions as CSV on stdout.
static void command_predict(Job *t, const char *path) {
    Molecule m = {0};
    model_open(t, path);
    const char *names;
    size_t Y = (size_t)t->s.shape.tasks;
    t->statistics = xmalloc(2 * Y, sizeof *t->statistics);
    t->task = (Task){.mean = t->statistics, .std = t->statistics + Y};
    t->task.kind = tasks_load(t->statistics, &names, Y, &t->file);
    if (t->s.shape.use_3d) check_positions(&t->data);
    float *out = predict_all(t, &t->data);
    printf("name");
    for (size_t y = 0; y < Y; y++) {
        size_t length = strcspn(names, "\n");
        putchar(',');
        print_csv(stdout, names, length);
        names += length + (names[length] == '\n');
    }
    for (size_t k = 0; k < t->data.count * Y; k++) {
        double x = (double)out[k];
        if (k % Y == 0) {
            dataset_read(&t->data, k / Y, &m);
            printf("\n");
            print_csv(stdout, m.name, (size_t)m.name_length);
        }
        int classes = t->task.kind == TASK_CLASSIFICATION;
        putchar(',');
        print_digits(stdout, classes ? sigmoid_of(x) : x, classes ? sigmoid_of(-fabs(x)) : fabs(x));
    }
    printf("\n");
    note_skipped(&t->data);
    free(out);
    molecule_free(&m);
}

// Vectors (molecules, D), float32 in NumPy format.
static void command_embed(Job *t, const char *path) {
    Sde *s = &t->s;
    OutFile out;
    model_open(t, path);
    int use_3d = choice("--encoder", opt.encoder, ENCODER_NAMES, 2);
    CHECK(!s->shape.tasks || !was_given(&opt.encoder) || use_3d == s->shape.use_3d,
          "%s: was fine-tuned with --encoder %s", opt.model, ENCODER_NAMES[!use_3d]);
    if (!s->shape.tasks) s->shape.use_3d = use_3d;
    if (s->shape.use_3d) check_positions(&t->data);
    s->no_pairs = !s->shape.use_3d;
    s->no_edges = 1;
    npy_begin(&out, opt.output, "<f4", t->data.count, (size_t)s->shape.dim);
    signals_catch();
    for (size_t i = 0, B; (B = load_next(s, &t->data, i, SIZE_MAX)) > 0; i += B) {
        if (mb_signal) mb_exit(128 + mb_signal);
        task_forward(s);
        out_floats(&out, s->a.pooled, B * (size_t)s->shape.dim, 0);
    }
    out_commit(&out);
}

// Conformers of one molecule, of which only the graph is looked at, as an SD file.
static void command_generate(Job *t, const char *path, const char *index_text) {
    Sde *s = &t->s;
    OutFile out;
    model_open(t, path);
    size_t index = dataset_find(&t->data, index_text);
    CHECK(!s->shape.tasks, "%s: has no network that generates: expected a pretrained model",
          opt.model);
    CHECK(!s->method.vp || s->method.beta.high < (double)opt.sample_steps, "--sample-steps: "
          "expected more than %g, the model's --beta-high", s->method.beta.high);
    uint32_t *ids = xmalloc((size_t)opt.copies, sizeof *ids);
    for (int64_t k = 0; k < opt.copies; k++) ids[k] = (uint32_t)index;
    mols_load(&s->mols, &t->data, ids, (size_t)opt.copies, 0);
    free(ids);
    const Molecule *m = s->mols.molecule;
    CHECK(m->n_atoms <= 999 && m->n_bonds <= 999, "molecule %zu: too large for an SD file", index);
    size_t n = 3 * s->mols.A, row = 3 * (size_t)m->n_atoms;
    float *z = xmalloc(3 * n, sizeof *z), *mean = z + 2 * n;
    out_open(&out, opt.output, "*\n  moleculesde ");
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
    for (size_t b = 0; b < s->mols.B; b++) sd_write(out.file, m, mean + b * row, (int)b + 1);
    out_commit(&out);
    free(z);
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
    if (opt.help)
        help_print("MoleculeSDE: pretrain encoders of molecules by generating 3D from 2D and 2D "
                   "from 3D (ICML 2023)\n", "./moleculesde/moleculesde", 27, 1, named ? bit : 0);
    CHECK(n_words == command->words, "expected ./moleculesde/moleculesde %s%s; see --help",
          named ? xprintf("%s ", command->name) : "", command->usage);
    if (!opt.output) opt.output = command->output;
    command_files(command, words[0]);
    threads_set(opt.threads);
    if (bit & READ) precision_begin(opt.precision);
    Job job = {0};
    switch (bit) {
        case PRETRAIN: command_pretrain(&job, words[0]); break;
        case FINETUNE: command_finetune(&job, words[0]); break;
        case PREDICT: command_predict(&job, words[0]); break;
        case EMBED: command_embed(&job, words[0]); break;
        default: command_generate(&job, words[0], words[1]); break;
    }
    job_close(&job);
    mb_exit(EXIT_SUCCESS);
}
#endif  // MOLECULESDE_TEST
