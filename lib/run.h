// lib/run.h - Runs: what training has in common, whatever is trained. A program's loop calls these
// functions, which call nothing back and know no model
//
//   run_begin(), run_free()      training set, names of the outputs, the claim on them, the state
//   same_init()                  is --init what the run began with?
//   run_data()                   validation and test set; a resumed run's are the same as before
//   run_plan()                   molecules and number of the updates, room for their log
//   run_start(), run_stopped(), run_end()   signals: the loop ends, and saved, so does the program
//   update_ids()                 the molecules of an update
//   log_add(), line_due(), epoch_ended()   rows of the log, and when they are summed up
//   log_ends()                   the losses of the start and the end
//   history_add(), best_row(), enough()     fine-tuning's choice of an epoch
//   csv_write()                  the one or the other as CSV
//   save_due(), run_progress()
//   required_meta(), meta_whole(), file_print()

// Rows of `columns` numbers.
typedef struct { float *x; int64_t n; int columns; } Rows;

// A row of fine-tuning's history, one an epoch: mean loss, what the validation set says, the best
// epoch so far, counted from 1; a program may have more columns.
enum { HISTORY_LOSS, HISTORY_VALID, HISTORY_BEST, HISTORY_SCALE };

struct Run {
    Dataset train, valid, test;   // opened if they have a path
    char *state_path, *log_path;  // beside the checkpoint: the state, and the log as CSV
    OutFile lock;                 // held from start to end: two runs may not write the same files
    TensorFile state;             // to go on from; closed when it has been loaded
    int resumed;                  // is there one?
    int64_t begun;                // when, in microseconds
    uint32_t prints[3];           // data_print() of training, validation and test set
    uint32_t init_print;          // file_print() of --init then
    uint64_t seed;                // names the draws
    int64_t batch, steps, done;   // molecules of an update; updates in all, and so far
    uint32_t *order, *ids;        // permutation of the training set in `epoch`; of a batch
    int64_t epoch;                // -1: none yet
    Rows log, history;           // a row an update; of fine-tuning a row an epoch
    FILE *csv;                    // one of them; grows while the run does
    int64_t shown;                // rows that it has
    Progress progress;
    int stopped;                  // by a signal
};

// ---- outputs, state, data

// Claims what a run writes: `path`, its state path.state and its log, which begins as log_begins
// says, see check_ours(). While `lock` is open no other run can claim one of these names, however
// they are derived: the lock has the name of `path` without such endings. After that, not before,
// dies if one of them cannot be written.
static inline void run_claim(OutFile *lock, const char *path, const char *log_begins) {
    static const char *const endings[] = {".safetensors", ".state", ".log.csv", ".run", ".tmp"};
    char *stem = link_target(path), *state = xprintf("%s.state", path);
    char *log = path_with(path, ".safetensors", ".log.csv");
    for (int k = 0; k < 5; k++) {
        char *shorter = path_with(stem, endings[k], "");
        if (strlen(shorter) < strlen(stem)) k = -1;  // once more
        free(stem);
        stem = shorter;
    }
    char *name = xprintf("%s.run", stem);
    out_open(lock, name, NULL);
    out_probe(path, TENSORS_BEGIN);
    out_probe(state, TENSORS_BEGIN);
    out_probe(log, log_begins);
    FREE_ALL(stem, state, log, name);
}

// Metadata of a file that must be `kind`, or the end of the program.
static inline const char *required_meta(const TensorFile *f, const char *key, const char *kind) {
    const char *text = tensor_meta(f, key);
    CHECK(text, "%s: not %s (metadata %s is missing)", f->path, kind, key);
    return text;
}

// A whole number, not negative, of the metadata of a run's state.
static inline int64_t meta_whole(const TensorFile *f, const char *key) {
    const char *text = required_meta(f, key, "the state of a run of this version");
    char *end;
    long long number = strtoll(text, &end, 10);
    CHECK(end != text && *end == 0 && number >= 0,
          "%s: metadata %s: expected a whole number, found \"%s\"", f->path, key, text);
    return number;
}

// The checksum of a file; 0 without one.
static inline uint32_t file_print(const char *path) {
    size_t size;
    const uint8_t *bytes = path ? file_bytes(path, &size) : NULL;
    uint32_t crc = path ? crc32_add(0, bytes, size) : 0;
    if (path) file_release(bytes, size);
    return crc;
}

// Dies unless a file is the one that a run began with: paths may change, fingerprints may not.
static inline void same_print(const char *state_path, int64_t then, uint32_t now, const char *what,
                              const char *path) {
    CHECK(then == now, "%s: --resume needs the same data; expected the %s that the run began with, "
          "found %s", state_path, what, path ? path : "none");
}

// Under these a state has the fingerprints of training, validation and test set.
static const char *const DATA_KEYS[] = {"fingerprint", "valid_fingerprint", "test_fingerprint"};

// Opens the training set and claims the outputs: now, not after hours of work, it is found out
// whether they can be written. A run that is to be resumed has its state opened, or it is said that
// there is none. Its options, metadata "run", are for the caller to take over before run_data().
static inline void run_begin(struct Run *run, const char *train_path, const char *output,
                             const char *log_begins, int resume) {
    dataset_open(&run->train, train_path);
    CHECK(run->train.count > 0, "%s: the dataset is empty", train_path);
    run->state_path = xprintf("%s.state", output);
    run->log_path = path_with(output, ".safetensors", ".log.csv");
    if (my_rank == 0) run_claim(&run->lock, output, log_begins);
    run->begun = (int64_t)time(NULL) * 1000000 + (int64_t)(1e6 * now_seconds()) % 1000000;
    if (!resume) return;
    double there = my_rank == 0 && access(run->state_path, F_OK) == 0;
    ranks_sum(&there, 1, sizeof there);  // one answer for all
    run->resumed = there > 0;
    if (run->resumed) tensor_file_open(&run->state, run->state_path);
    CHECK(run->resumed || my_rank > 0 || access(output, F_OK) != 0, "%s: is there, but not its "
          "state %s: there is nothing to resume; leave out --resume, or give another -o", output,
          run->state_path);
    if (!run->resumed)
        fprintf(stderr, "resume  nothing is saved in %s: this run starts afresh\n",
                run->state_path);
}

// Dies unless this is the checkpoint that the run began with.
static inline void same_init(const struct Run *run, const char *init) {
    same_print(run->state_path, run->init_print, file_print(init), "checkpoint (--init)", init);
}

// Opens validation and test set, NULL: none. asked: --init of the command line, init: also that of
// the state. A resumed run must have the same data as before.
static inline void run_data(struct Run *run, const char *valid, const char *test, const char *init,
                            const char *asked) {
    static const char *const names[] = {"training set", "validation set", "test set"};
    const Dataset *const data[] = {&run->train, &run->valid, &run->test};
    const TensorFile *state = &run->state;
    if (run->resumed) run->init_print = (uint32_t)meta_whole(state, "init_fingerprint");
    else run->init_print = file_print(init);
    if (run->resumed && asked) same_init(run, asked);
    dataset_open_part(&run->valid, valid, &run->train);
    dataset_open_part(&run->test, test, &run->train);
    for (int k = 0; k < 3; k++) {
        run->prints[k] = data_print(data[k]);
        if (run->resumed)
            same_print(state->path, meta_whole(state, DATA_KEYS[k]), run->prints[k], names[k],
                       data[k]->path);
    }
}

// Molecules of an update: *batch, or if that is 0 as many as are usual and there are; they are
// computed in parts of `part` (0: all). What there is to say of the run before it begins.
static inline void run_plan(struct Run *run, int64_t *batch, int64_t usual, int64_t part) {
    int64_t n = (int64_t)run->train.count;
    CHECK(*batch <= n, "--batch-size: %lld is more than the %lld molecules of %s",
          (long long)*batch, (long long)n, run->train.path);
    if (!*batch) *batch = n < usual ? n : usual;
    int64_t parts = part ? (*batch + part - 1) / part : 1;
    if (parts < all_ranks)
        fprintf(stderr, "note    a batch of %lld molecules is %lld part%s: %lld of %d ranks have "
                "nothing to train with (--micro-batch N)\n", (long long)*batch, (long long)parts,
                parts > 1 ? "s" : "", (long long)(all_ranks - parts), all_ranks);
    if (!MB_OPTIMIZED)
        fprintf(stderr, "note    built without optimisation, many times slower: use make, or "
                "-O3\n");
    note_stereo(&run->valid, run->train.path, run->train.stereo);
    note_stereo(&run->test, run->train.path, run->train.stereo);
    run->batch = *batch;
    run->epoch = -1;
    run->order = xmalloc(run->train.count, sizeof *run->order);
    run->ids = xmalloc((size_t)run->batch, sizeof *run->ids);
}

// The updates of so many epochs.
static inline int64_t epochs_steps(const struct Run *run, int64_t epochs) {
    return (epochs * (int64_t)run->train.count + run->batch - 1) / run->batch;
}

// An empty table with room for `most` rows.
static inline Rows rows_make(int64_t most, int columns) {
    memory_check(sizeof(float) * (uint64_t)most * (uint64_t)columns, "the log of all updates",
                 "fewer --steps or --epochs");
    return (Rows){xmalloc(mul_size((size_t)most, (size_t)columns), sizeof(float)), 0, columns};
}

// A new row.
static inline float *rows_add(Rows *t) { return t->x + t->n++ * t->columns; }

// An update is done: adds a row to the log, n losses, learning rate, norm of the gradients,
// molecules a second since `start`. A loss (the first five are) of exactly 0 had nothing to count
// and is not there: a mean would take it for learnt.
static inline void log_add(struct Run *run, const double *loss, int n, double lr, double norm,
                           double start) {
    float *row = rows_add(&run->log);
    for (int k = 0; k < n; k++) row[k] = loss[k] == 0 && k < 5 ? NAN : (float)loss[k];
    row[n] = (float)lr;
    row[n + 1] = (float)norm;
    row[n + 2] = (float)((double)run->batch / fmax(now_seconds() - start, 1e-6));
    run->done++;
}

static inline void run_free(struct Run *run) {
    if (run->lock.file) out_discard(&run->lock);
    dataset_close(&run->train);
    dataset_close(&run->valid);
    dataset_close(&run->test);
    tensor_file_close(&run->state);
    if (run->csv) fclose(run->csv);
    FREE_ALL(run->order, run->ids, run->log.x, run->history.x, run->state_path, run->log_path);
}

// ---- the loop

// From here on a signal ends the loop, not the program.
static inline void run_start(struct Run *run) {
    signals_catch();
    run->progress = progress_begin((double)run->done);
}

// Has a signal asked a rank to stop?
static inline int run_stopped(struct Run *run) {
    double signals = mb_signal != 0;
    ranks_sum(&signals, 1, sizeof signals);
    return run->stopped = signals > 0;
}

// The molecules of update `step` = 0, 1, ..., in run->ids: sample step * batch + k is entry (sample
// mod n) of the permutation of its epoch, so batches run across the ends of epochs and any step can
// be entered.
static inline void update_ids(struct Run *run, int64_t step) {
    int64_t n = (int64_t)run->train.count;
    for (int64_t k = 0; k < run->batch; k++) {
        int64_t sample = step * run->batch + k, now = sample / n;
        if (now != run->epoch)
            rng_permutation(run->order, (size_t)n, run->seed, RNG_SHUFFLE, (uint32_t)now);
        run->epoch = now;
        run->ids[k] = run->order[sample % n];
    }
}

// Is it time to save? After the last update the caller does it anyway.
static inline int save_due(const struct Run *run, int64_t every) {
    return run->done < run->steps && run->done % every == 0;
}

// Is it time for a line on stdout, a twentieth of the way? mean: of the log since the one before.
static inline int line_due(double *mean, const struct Run *run) {
    int64_t every = run->steps / 20 > 0 ? run->steps / 20 : 1, n = run->done;
    if (n != 1 && n % every && n != run->steps) return 0;
    rows_mean(mean, run->log.x, run->log.columns,
              n == 1 ? 0 : n - (n % every ? n % every : every), n);
    return 1;
}

// The log's first row, and the mean of the last fiftieth of the way.
static inline void log_ends(double *start, double *end, const struct Run *run) {
    int64_t n = run->done, window = run->steps / 50 + 1;
    rows_mean(start, run->log.x, run->log.columns, 0, 1);
    rows_mean(end, run->log.x, run->log.columns, n > window ? n - window : 0, n);
}

// The number, counted from 1, of the epoch that has ended with the last update, and the mean of its
// log; else 0.
static inline int64_t epoch_ended(double *mean, const struct Run *run) {
    int64_t n = (int64_t)run->train.count, epoch = run->done * run->batch / n;
    if (epoch == (run->done - 1) * run->batch / n) return 0;
    rows_mean(mean, run->log.x, run->log.columns, (epoch - 1) * n / run->batch, run->done);
    return epoch;
}

// The history's row of the best epoch; NULL before the first.
static inline const float *best_row(const struct Run *run) {
    const Rows *t = &run->history;
    if (!t->n) return NULL;
    return t->x + ((int64_t)t->x[(t->n - 1) * t->columns + HISTORY_BEST] - 1) * t->columns;
}

// Adds an epoch; larger: is `valid` the better the larger? Anything is better than no number.
// Returns the row: the epoch is the best so far if HISTORY_BEST names it.
static inline float *history_add(struct Run *run, float loss, float valid, int larger) {
    const float *best = best_row(run);
    float then = best ? best[HISTORY_VALID] : (float)NAN, *row = rows_add(&run->history);
    int better = isnan(then) || (larger ? valid > then : valid < then);
    row[HISTORY_LOSS] = loss;
    row[HISTORY_VALID] = valid;
    row[HISTORY_BEST] = better ? (float)run->history.n : best[HISTORY_BEST];
    return row;
}

// Have so many epochs (0: any number) passed without gain?
static inline int enough(const struct Run *run, int64_t patience) {
    const float *best = best_row(run);
    return best && patience && run->history.n - (int64_t)best[HISTORY_BEST] >= patience;
}

// Adds the rows that it has not yet to the CSV, begun with its heading: of the log, each behind the
// number of its update; of the history, if there is one, behind the seed, if that is asked for, and
// the number of the epoch, with the size of what the validation set says in such units (NaN: it
// says nothing). A number that is not there is an empty field. Rank 0 does it alone.
static inline void csv_write(struct Run *run, const char *heading, int seed, double unit) {
    const Rows *rows = run->history.x ? &run->history : &run->log;
    if (my_rank > 0) return;
    if (!run->csv) {
        run->csv = fopen(run->log_path, "w");
        CHECK(run->csv, "%s: cannot write: %s", run->log_path, strerror(errno));
        fprintf(run->csv, "%s\n", heading);
    }
    for (; run->shown < rows->n; run->shown++) {
        const float *row = rows->x + run->shown * rows->columns;
        if (seed) fprintf(run->csv, "%lld,", (long long)run->seed);
        fprintf(run->csv, "%lld", (long long)run->shown + 1);
        for (int k = 0; k < rows->columns && (rows == &run->log || k <= HISTORY_BEST); k++) {
            double x = (double)row[k];
            if (rows == &run->history && k == HISTORY_VALID) x = fabs(x) * unit;
            fputc(',', run->csv);
            if (!isnan(x)) fprintf(run->csv, "%.6g", x);
        }
        fprintf(run->csv, "\n");
    }
    CHECK(fflush(run->csv) == 0 && !ferror(run->csv), "%s: write failed: %s", run->log_path,
          strerror(errno));
}

// The line on stderr; of: what the steps are of; last: it stays.
static inline void run_progress(struct Run *run, const char *of, int last) {
    char text[96];
    double done = (double)run->done;
    snprintf(text, sizeof text, "step %lld of %lld%s", (long long)run->done, (long long)run->steps,
             of);
    progress_show(&run->progress, done, (double)run->steps,
                  (done - run->progress.first) * (double)run->batch, "molecules", text, last);
}

// Behind the loop, when all is saved: ends the program if a signal asked for it.
static inline void run_end(const struct Run *run) {
    if (!run->stopped) return;
    fprintf(stderr, "stopped by a signal and saved after step %lld; to go on, give the same "
            "command with --resume\n", (long long)run->done);
    ranks_finish();
    mb_exit(128 + (mb_signal ? mb_signal : SIGTERM));
}
