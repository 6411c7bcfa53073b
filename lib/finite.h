// lib/finite.h - a loss or a gradient that is no number: what was first to be none, in the order of
// computation. The arrays of the forward pass stand as they were until the next one.

typedef struct {
    const char *name;
    idx layer;  // counted from 1; 0: before the layers
} Bad;

// Are all n numbers finite?
static int all_finite(const float *x, idx n) {
    idx k = 0;
    while (k < n && isfinite(x[k])) k++;
    return k == n;
}

// Notes an array of this shape, which ends in -1, that holds a number which is not finite, unless
// an earlier layer has one. Arrays of layers have a shape that begins with L; x, the layers' inputs
// and the output, with L + 1. Not asked: gradients, and arrays that all layers use.
static void bad_note(Bad *bad, const char *name, const char *shape_text, const float *x,
                     const idx *shape) {
    int forward = name[0] != 'd' || strncmp(name, "dir_", 4) == 0 || strncmp(name, "den", 3) == 0;
    idx n = 1, layers = shape_text[0] == 'L' ? *shape++ : 1, layer = 0;
    if (!forward || strcmp(name, "branch") == 0 || strcmp(name, "sum") == 0) return;
    for (; *shape >= 0; shape++) n *= *shape;
    while (layer < layers && all_finite(x + layer * n, n)) layer++;
    if (layer == layers) return;
    if (shape_text[0] == 'L') layer++;
    if (!bad->name || layer < bad->layer) *bad = (Bad){name, layer};
}

// The first array of the forward pass that holds such a number.
static Bad bad_array(const Step *s) {
    Bad bad = {0};
    DIMENSIONS(s);
#define NOTE(field, ...) bad_note(&bad, #field, #__VA_ARGS__, all->field, SHAPE(__VA_ARGS__));
#define NOTE_ALL(name, LIST) { const struct name *all = s->name; LIST(NOTE) }
    NOTE_ALL(bias, BIAS_ARRAYS)
    NOTE_ALL(enc, ENCODER_ARRAYS)
    if (!bad.name && Y > 0) NOTE_ALL(task_arrays, TASK_ARRAYS)
    else if (!bad.name) NOTE_ALL(heads, HEADS_ARRAYS)
#undef NOTE
#undef NOTE_ALL
    return bad;
}

// Ends the program if a loss of the batch in s (NULL: not asked) or the norm of the gradients is
// not finite. Parameters come in the table in the order of use; gradients are made from its end.
static void finite_check(const Step *s, const double loss[LOSSES], double norm) {
    const Model *model = &s->model;
    const float *arena = loss ? model->params : model->grads;
    const char *tensor = NULL;
    int l = LOSSES - 1;
    if (isfinite(norm) && (!loss || isfinite(loss[LOSS_TOTAL]))) return;
    for (const TensorInfo *t = model->info; t < model->info + model->n_tensors; t++)
        if ((!loss || !tensor) && !all_finite(arena + t->offset, (idx)t->count)) tensor = t->name;
    CHECK(loss, "step %llu: the gradients are no longer numbers. In the order of computation the "
          "first to be none: the gradient of %s. What was saved before is kept. Try a lower --lr",
          (unsigned long long)s->draws.step + 1, tensor ? tensor : "all together");
    Bad bad = bad_array(s);
    while (l > 0 && isfinite(loss[l])) l--;
    char *layer = bad.name && bad.layer ? xprintf(" of layer %td", bad.layer - 1) : NULL;
    DIE("step %llu: the loss is no longer a number. In the order of computation the first to be "
        "none: %s%s%s%s. What was saved before is kept. Try a lower --lr",
        (unsigned long long)s->draws.step + 1, bad.name ? bad.name : "the loss ",
        layer ? layer : bad.name ? "" : LOSS_NAMES[l], tensor ? ", by " : "", tensor ? tensor : "");
}
