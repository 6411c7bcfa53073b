// tests/harness.h - what both test programs share
//
//   test_check()         counts a test; says which one failed
//   Report, report_add(), report_finish()   the largest errors of families of tensors
//   tensor_number()      an element of a golden file
//   csv_number()         a cell of a log
//   plain_ids()          the molecules of an update

static int tests_passed, tests_failed, stop_at_failure;

// Counts a test; says which one failed.
MB_PRINTF(2, 3) static void test_check(int ok, const char *fmt, ...) {
    va_list args;
    if (ok) {
        tests_passed++;
        return;
    }
    tests_failed++;
    printf("FAILED: ");
    va_start(args, fmt);
    vprintf(fmt, args);
    va_end(args);
    printf("\n");
    if (stop_at_failure) mb_exit(EXIT_FAILURE);
}

// Largest errors of a family of tensors, e.g. all of "out/*/attn_bias".
typedef struct { char name[64]; double error, tolerance; int count; } Family;
typedef struct { Family family[128]; int count; } Report;

static void report_add(Report *r, const char *name, double error, double tolerance) {
    int k = 0;
    while (k < r->count && strcmp(r->family[k].name, name)) k++;
    CHECK(k < 128, "too many families");
    Family *f = &r->family[k];
    if (k == r->count) {
        r->count++;
        snprintf(f->name, sizeof f->name, "%s", name);
        f->tolerance = tolerance;
    }
    f->count++;
    if (!(error <= f->error)) f->error = error;  // NaN counts as larger
}

// One test a family: is the largest error within its tolerance?
static void report_finish(const Report *r, const char *path, int print) {
    for (int k = 0; k < r->count; k++) {
        const Family *f = &r->family[k];
        int ok = f->error <= f->tolerance;
        if (print)
            printf("  %-28s %4d tensors   error %.1e   %3.0f %% of tolerance %.1e%s\n", f->name,
                   f->count, f->error, 100 * f->error / f->tolerance, f->tolerance,
                   ok ? "" : "   FAILED");
        test_check(ok, "%s: %s: relative error %.2e, tolerance %.1e", path, f->name, f->error,
                   f->tolerance);
    }
}

// Element k of a tensor of any of the types that golden files are made of.
static double tensor_number(const TensorEntry *t, size_t k) {
    const uint8_t *at = t->data + k * dtype_size(t->dtype);
    if (strcmp(t->dtype, "F32") == 0) return (double)get_f32(at);
    if (strcmp(t->dtype, "I64") == 0) return (double)(int64_t)get_u64(at);
    if (strcmp(t->dtype, "I32") == 0) return (double)(int32_t)get_u32(at);
    CHECK(strcmp(t->dtype, "U8") == 0 || strcmp(t->dtype, "BOOL") == 0,
          "tensor %s: expected F32, I64, I32, U8 or BOOL, found %s", t->name, t->dtype);
    return at[0];
}

// The number in a column of a line of a CSV, both counted from 0; NaN if nothing stands there.
static double csv_number(const char *text, int line, int column) {
    for (; line > 0 && text; line--) text = strchr(text, '\n') ? strchr(text, '\n') + 1 : NULL;
    for (; column > 0 && text; column--) text = strchr(text, ',') ? strchr(text, ',') + 1 : NULL;
    return text && !strchr(",\n", *text) ? strtod(text, NULL) : (double)NAN;
}

// Molecules of step `step`, of n, as the permutations of their epochs say.
static void plain_ids(uint32_t *ids, int64_t step, int64_t batch, uint64_t seed, size_t n) {
    uint32_t *order = xmalloc(n, sizeof *order);
    for (int64_t k = 0; k < batch; k++) {
        int64_t sample = step * batch + k;
        rng_permutation(order, n, seed, RNG_SHUFFLE, (uint32_t)(sample / (int64_t)n));
        ids[k] = order[sample % (int64_t)n];
    }
    free(order);
}
