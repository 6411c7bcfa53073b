// lib/run.h - Runs: what training has in common, whatever is trained.
//   run_claim()       the outputs of a run are its own from start to end
//   epoch_ids()       the molecules of an update
//   text_add_tasks()  metadata of a fine-tuned model
//   required_meta()   what a state or checkpoint says of itself; meta_whole(): a whole number
//   data_print()      fingerprints, by which a resumed run knows its files; file_print()
//   same_print()      dies if a file is another one

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

// The molecules of update `step`: sample step * batch + k is entry (sample mod n) of the
// permutation of its epoch, so batches run across the ends of epochs and any step can be entered.
// order (n): the permutation of *epoch, -1 if it has none.
static inline void epoch_ids(int64_t *epoch, uint32_t *order, uint32_t *ids, int64_t step,
                             int64_t batch, size_t n, uint64_t seed) {
    for (int64_t k = 0; k < batch; k++) {
        int64_t sample = step * batch + k, now = sample / (int64_t)n;
        if (now != *epoch) rng_permutation(order, n, seed, RNG_SHUFFLE, (uint32_t)now);
        *epoch = now;
        ids[k] = order[sample % (int64_t)n];
    }
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

// The fingerprint of a dataset; 0 if none is open.
static inline uint32_t data_print(const Dataset *d) { return d->data ? dataset_fingerprint(d) : 0; }

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

// The same of training, validation and test set. A state has their fingerprints under DATA_KEYS.
static const char *const DATA_KEYS[] = {"fingerprint", "valid_fingerprint", "test_fingerprint"};
static inline void same_data(const TensorFile *state, const Dataset *train, const Dataset *valid,
                             const Dataset *test) {
    static const char *const names[] = {"training set", "validation set", "test set"};
    const Dataset *const data[] = {train, valid, test};
    for (int k = 0; k < 3; k++)
        same_print(state->path, meta_whole(state, DATA_KEYS[k]), data_print(data[k]), names[k],
                   data[k]->path);
}
