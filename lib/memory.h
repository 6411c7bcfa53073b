// lib/memory.h - memory of a batch and of a task, and copies with padded rows. Knows no model.
//
//   Store, LAYOUT()      arrays of one batch after the other, given as a list of shapes
//   ARRAYS()             the struct of such a list of floats, and the function that lays it out
//   scratch_begin(), take()   a thread's scratch: arrays that grow on demand
//   copy_padded(), copy_transposed()   rows as small_product() wants them

// Memory whose arrays are laid out anew for every batch; it only grows. A list of arrays, LIST(X),
// has an X(field, shape...) or X(type, field, shape...) each: LAYOUT() takes them all twice, first
// to count what they need, then to place them.
typedef struct {
    char *memory;   // starts at a cache line
    idx room, used; // bytes
    int placing;    // the second time
} Store;

// A place for an array of this shape, which ends in -1.
static void *store_take(Store *store, idx size, const idx *shape) {
    idx at = store->used, line = 64;
    for (; *shape >= 0; shape++) size = (idx)mul_size(size, *shape);
    store->used += (size + line - 1) / line * line;
    return store->placing ? store->memory + at : NULL;
}

// Begins pass 0, which counts, or 1, for which there must be memory.
static void store_begin(Store *store, int pass) {
    if (pass && store->used > store->room) {
        free(store->memory);
        store->room = store->used;
        memory_check(store->room, "this batch", "a lower --batch-size (generate: --copies), or "
                     "data_prep --max-atoms");
        store->memory = (char *)floats_alloc(store->room / sizeof(float), "a lower --batch-size");
    }
    store->used = 0;
    store->placing = pass;
}

#define SHAPE(...) (const idx[]){__VA_ARGS__, -1}
#define FIELD(field, ...) float *field;
#define PLACE(field, ...) all->field = store_take(store, sizeof(float), SHAPE(__VA_ARGS__));
#define LAYOUT(LIST, X)                                                                            \
    for (int pass = 0; pass < 2; pass++) {                                                         \
        store_begin(store, pass);                                                                  \
        LIST(X)                                                                                    \
    }

// struct NAME of the arrays in LIST, and NAME_layout(), which gives them the shapes that the batch
// in s->batch needs. s->NAME points to it; DIMENSIONS(s) makes the letters of the shapes.
#define ARRAYS(name, LIST)                                                                         \
    struct name { LIST(FIELD) Store store; };                                                      \
    static void name##_layout(Step *s) {                                                           \
        DIMENSIONS(s);                                                                             \
        if (!s->name) s->name = xmalloc(1, sizeof *s->name);                                       \
        struct name *all = s->name;                                                                \
        Store *store = &all->store;                                                                \
        LAYOUT(LIST, PLACE)                                                                        \
    }

// Scratch memory of a thread: as many arrays as its task takes, from the first one on again in the
// next task. They grow on demand; their content is left over from the task before.
typedef struct { int taken; struct { float *x; idx room; } array[16]; } Scratch;
static Scratch thread_scratch[MAX_THREADS];

// This thread's, nothing taken.
static Scratch *scratch_begin(void) {
    CHECK(thread_id() < MAX_THREADS, "expected at most %d threads", MAX_THREADS);
    Scratch *scratch = &thread_scratch[thread_id()];
    scratch->taken = 0;
    return scratch;
}

// n floats, from a cache line on.
static float *take(Scratch *scratch, idx n) {
    CHECK(scratch->taken < 16, "a task takes too many arrays");
    int k = scratch->taken++;
    if (scratch->array[k].room < n) {
        free(scratch->array[k].x);
        scratch->array[k].x = floats_alloc(n, "a lower --batch-size, or data_prep --max-atoms");
        scratch->array[k].room = n;
    }
    return scratch->array[k].x;
}

// out (rows, width) = x (rows, n), or its transpose: out (n, width) = x (rows, n)^T; zero beyond.
static void copy_padded(float *out, idx width, const float *x, idx ldx, idx rows, idx n) {
    for (idx r = 0; r < rows; r++) {
        memcpy(out + r * width, x + r * ldx, n * sizeof *out);
        memset(out + r * width + n, 0, (width - n) * sizeof *out);
    }
}

static void copy_transposed(float *out, idx width, const float *x, idx ldx, idx rows, idx n) {
    for (idx c = 0; c < n; c++) {
        for (idx r = 0; r < rows; r++) out[c * width + r] = x[r * ldx + c];
        memset(out + c * width + rows, 0, (width - rows) * sizeof *out);
    }
}
