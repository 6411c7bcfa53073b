// commands/head.h - the fine-tuning head (paper 4): out = W2 gelu(W1 x + b1) + b2 on a token, read
// out as that of the graph token, or as the mean or sum over the atoms. For classes, but for a sum,
// it begins at their base rates, b2 = log(p / (1 - p)) with p the share of ones: or else the first
// steps do nothing but shift all molecules alike, which a pretrained encoder may not recover from

typedef enum { READ_CLS, READ_MEAN, READ_SUM } Readout;

// What a fine-tuned model needs besides its parameters.
typedef struct Task {
    TaskKind kind;
    Readout readout;
    int use;              // USE_ bits of the relations it is given
    const float *mean, *std;  // (Y) of the training labels; regression: prediction = out std + mean
    int label_units;      // regression: the loss is in the labels' units, not in deviations
    float scale;          // of logits, by calibration(); 1 while training
} Task;

#define TASK_ARRAYS(X)                                                                             \
    X(head_pre, T, C)                                                                              \
    X(head_hidden, T, C)                                                                           \
    X(head_out, T, Y)                                                                              \
    X(logits, B, Y)                                                                                \
    X(dhead_hidden, T, C)                                                                          \
    X(dhead_out, T, Y)                                                                             \
    X(dlogits, B, Y)

ARRAYS(task_arrays, TASK_ARRAYS)

// Tokens of a molecule that are read out: from the first of them on, how many, and their weight.
static float readout_tokens(idx *first, idx *count, const View *v, Readout readout) {
    *first = v->token + (readout != READ_CLS);
    *count = readout == READ_CLS ? 1 : v->N;
    return readout == READ_MEAN ? 1.0f / (float)v->N : 1.0f;
}

// row (n) = weight * the sum of tokens first..first + count - 1 of x (T, n).
static void readout_row(float *row, const float *x, idx n, idx first, idx count, float weight) {
    for (idx k = 0; k < n; k++) {
        float sum = 0;
        for (idx t = first; t < first + count; t++) sum += x[t * n + k];
        row[k] = weight * sum;
    }
}

// rows (B, n): what is read out of x (T, n), a row a molecule.
static void readout_rows(float *rows, const float *x, idx n, const Batch *batch, Readout readout) {
    for (idx b = 0; b < batch->B; b++) {
        View v = batch_view(batch, b);
        idx first, count;
        float weight = readout_tokens(&first, &count, &v, readout);
        readout_row(rows + b * n, x, n, first, count, weight);
    }
}

// logits (B, Y) from the encoder's output.
static void task_head_forward(Step *s, Readout readout) {
    task_arrays_layout(s);
    DIMENSIONS(s);
    const Tensors *p = &s->model.p;
    struct task_arrays *a = s->task_arrays;
    linear_forward(a->head_pre, encoder_output(s), p->head1_w, p->head1_b, T, C, C);
    gelu_forward(a->head_hidden, a->head_pre, T * C);
    linear_forward(a->head_out, a->head_hidden, p->head2_w, p->head2_b, T, C, Y);
    readout_rows(a->logits, a->head_out, Y, &s->batch, readout);
}

// From dlogits (B, Y): the head's gradients and dx of the encoder's output.
static void task_head_backward(Step *s, Readout readout) {
    DIMENSIONS(s);
    const Tensors *p = &s->model.p;
    Tensors *g = &s->model.g;
    struct task_arrays *a = s->task_arrays;
    memset(a->dhead_out, 0, T * Y * sizeof(float));
    for (idx b = 0; b < B; b++) {
        View v = batch_view(&s->batch, b);
        idx first, count;
        float weight = readout_tokens(&first, &count, &v, readout);
        for (idx t = first; t < first + count; t++)  // forward: logits = weight * sum
            for (idx y = 0; y < Y; y++) a->dhead_out[t * Y + y] = weight * a->dlogits[b * Y + y];
    }
    linear_backward(a->dhead_hidden, 0, g->head2_w, g->head2_b, a->dhead_out, a->head_hidden,
                    p->head2_w, T, C, Y);
    gelu_backward(a->dhead_hidden, a->head_pre, T * C);
    linear_backward(s->enc->dx, 0, g->head1_w, g->head1_b, a->dhead_hidden, encoder_output(s),
                    p->head1_w, T, C, C);
    memset(s->bias->dattn_bias, 0, SS * H * sizeof(float));
}

// Mean loss over the labels present in the whole batch: cross-entropy with logits, or the square of
// out std + mean, over std^2 unless label_units (the release), so that every task counts alike.
// dlogits (B, Y) is its gradient, 0 where a label is missing.
static double task_loss(float *dlogits, const float *logits, const Batch *batch, const Task *task) {
    idx Y = batch->Y;
    double loss = 0, count = batch->count[LOSS_TOTAL];
    for (idx k = 0; k < batch->B * Y; k++) {
        double x = (double)logits[k], label = (double)batch->labels[k];
        dlogits[k] = 0;
        if (isnan(label)) continue;
        if (task->kind == TASK_CLASSIFICATION) {
            double exp_minus = exp(-fabs(x));  // log(1 + e^-|x|) does not overflow
            loss += fmax(x, 0) - x * label + log1p(exp_minus);
            double sigmoid = x >= 0 ? 1 / (1 + exp_minus) : exp_minus / (1 + exp_minus);
            dlogits[k] = (float)((sigmoid - label) / count);
        } else {
            double std = (double)task->std[k % Y], unit = task->label_units ? std : 1;
            double error = unit * (x - (label - (double)task->mean[k % Y]) / std);
            loss += error * error;
            dlogits[k] = (float)(2 * error * unit / count);
        }
    }
    return count > 0 ? loss / count : 0;
}

// Forward and backward pass of fine-tuning: gradients() with one head in the place of the four.
static void task_gradients(double loss[LOSSES], Step *s, const Task *task) {
    memset(s->model.grads, 0, s->model.table_count * sizeof(float));
    encoder_forward(s);
    task_head_forward(s, task->readout);
    struct task_arrays *a = s->task_arrays;
    loss[LOSS_TOTAL] = task_loss(a->dlogits, a->logits, &s->batch, task);
    task_head_backward(s, task->readout);
    encoder_backward(s);
}

static float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// The number by which n logits must be multiplied so that the cross-entropy with the labels becomes
// least (Guo et al. 2017: one over the temperature), from 0.1 to 10: Newton's method.
static float calibration(const float *logits, const float *labels, size_t n) {
    double scale = 1;
    for (int round = 0; round < 30; round++) {
        double slope = 0, curve = 1e-9;
        for (size_t k = 0; k < n; k++) {
            if (isnan(labels[k])) continue;
            double x = (double)logits[k], q = 1 / (1 + exp(-scale * x));
            slope += (q - (double)labels[k]) * x;
            curve += q * (1 - q) * x * x;
        }
        double next = scale - slope / curve;
        scale = fmin(fmax(fmin(fmax(next, scale / 2), scale * 2), 0.1), 10);
    }
    return (float)scale;
}
