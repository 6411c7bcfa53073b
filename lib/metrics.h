// lib/metrics.h - labels, and metrics of one task; labels that are NaN are left out
//
//   dataset_labels(), label_summary(), labels_judge()   labels, and whether they can judge
//   tasks_check(), can_judge(), task_statistics()       what fine-tuning needs of its datasets
//   task_metrics(), task_means(), print_metrics()       ROC-AUC, AP, or RMSE, MAE, R2
//   interval_half(), print_reliability()                how sure predictions are
//   number_text(), print_digits(), rows_mean()          numbers as text; means of log rows

typedef enum { TASK_CLASSIFICATION, TASK_REGRESSION } TaskKind;

typedef struct { float score, label; } Scored;

static inline int scored_compare(const void *a, const void *b) {
    float x = ((const Scored *)a)->score, y = ((const Scored *)b)->score;
    return (x > y) - (x < y);
}

// ROC-AUC by the rank sum, tied scores sharing their mean rank, NaN if only one class is there; and
// average precision: the sum over thresholds of precision * step in recall, NaN without positives.
// Labels above 0.5 are positive.
static inline void ranking_metrics(double *auc, double *ap, const Scored *sorted, size_t n) {
    double positives = 0, below = 0, rank_sum = 0, precision_sum = 0;
    for (size_t i = 0; i < n; i++) positives += sorted[i].label > 0.5f;
    for (size_t i = 0, end; i < n; i = end) {  // a run of equal scores
        double here = 0;
        end = i;
        do here += sorted[end++].label > 0.5f;
        while (end < n && sorted[end].score == sorted[i].score);
        rank_sum += here * 0.5 * (double)(i + 1 + end);
        precision_sum += here * (positives - below) / (double)(n - i);
        below += here;
    }
    double pairs = positives * ((double)n - positives);
    *auc = pairs > 0 ? (rank_sum - positives * (positives + 1) / 2) / pairs : (double)NAN;
    *ap = positives > 0 ? precision_sum / positives : (double)NAN;
}

// x for people: with that many decimals where they show decimals - 1 significant digits, else with
// a power of ten; "-" if it is none. Valid until the eighth call after.
static inline const char *number_text(double x, int decimals) {
    static char text[8][32];
    static int turn;
    char *out = text[turn++ % 8];
    double size = fabs(x);
    if (isnan(x)) snprintf(out, sizeof *text, "-");
    else if (size > 0 && (size < pow(10, 2 - decimals) || size >= 1e6))
        snprintf(out, sizeof *text, "%#.*g", size < 1 ? decimals - 1 : decimals + 2, x);
    else snprintf(out, sizeof *text, "%.*f", decimals, x);
    return out;
}

// x in the fewest digits, from six on, that are off by at most half of float32's last place of
// `size`: of x itself, or of what it is short of 1.
static inline void print_digits(FILE *out, double x, double size) {
    char text[40];
    int digits = 6;
    do snprintf(text, sizeof text, "%.*g", digits, x);
    while (fabs(strtod(text, NULL) - x) > 3e-8 * size && digits++ < 17);
    fputs(text, out);
}

// The labels (n, tasks) of a dataset, in fresh memory.
static inline float *dataset_labels(const Dataset *d) {
    size_t Y = (size_t)d->n_tasks;
    float *labels = xmalloc(mul_size(d->count, Y), sizeof *labels);
    Molecule m = {0};
    for (size_t i = 0; i < d->count; i++) {
        dataset_read(d, i, &m);
        memcpy(labels + i * Y, m.labels, sizeof *labels * Y);
    }
    molecule_free(&m);
    return labels;
}

// The labels of one task that are there; deviation 0: they are constant, but for their rounding.
typedef struct { double count, mean, deviation, first; } LabelSummary;

static inline LabelSummary label_summary(const float *labels, size_t n, size_t Y, size_t y) {
    LabelSummary s = {0};
    double sum = 0, square = 0;
    for (size_t k = y; k < n * Y; k += Y) {
        if (isnan(labels[k])) continue;
        if (s.count++ == 0) s.first = (double)labels[k];
        sum += (double)labels[k] - s.first;
    }
    if (s.count > 0) s.mean = s.first + sum / s.count;
    for (size_t k = y; k < n * Y; k += Y) {
        double d = isnan(labels[k]) ? 0 : (double)labels[k] - s.mean;
        square += d * d;
    }
    s.deviation = s.count > 0 ? sqrt(square / s.count) : 0;
    if (s.deviation <= 1e-6 * fabs(s.mean) || s.deviation < (double)FLT_MIN) s.deviation = 0;
    return s;
}

// Which tasks' labels (n, tasks) can judge predictions: not those that are missing or all the same,
// which become NaN. Returns how many can, and says once which cannot and what follows: if they are
// `some` of the tasks, or if `none` can; NULL: in silence.
static inline size_t labels_judge(float *labels, const Dataset *d, const char *some,
                                  const char *none) {
    size_t Y = (size_t)d->n_tasks, mute = 0, first = 0;
    double label = (double)NAN;  // of all molecules
    for (size_t y = Y; y-- > 0;) {
        LabelSummary s = label_summary(labels, d->count, Y, y);
        if (s.deviation > 0) continue;
        for (size_t k = y; k < d->count * Y; k += Y) labels[k] = NAN;
        mute++;
        first = y;
        label = s.count > 0 ? s.first : (double)NAN;
    }
    if (!mute || !some) return Y - mute;
    fprintf(stderr, "note    %s: ", d->path);
    if (mute > 1) fprintf(stderr, "%zu of %zu tasks have no labels or all the same, first %s", mute,
                          Y, d->task_names[first]);
    else fprintf(stderr, isnan(label) ? "task %s has no labels" : "all labels of task %s are %g",
                 d->task_names[first], label);
    fprintf(stderr, ": %s\n", mute < Y ? some : none);
    return Y - mute;
}

// Can the labels of a validation set choose an epoch? Says which tasks cannot, and what follows if
// `none` can.
static inline int can_judge(const Dataset *valid, const char *none) {
    float *labels = dataset_labels(valid);
    size_t tasks = labels_judge(labels, valid, "no say in the choice of an epoch", none);
    free(labels);
    return tasks > 0;
}

// Dies unless a training set has labels, and the sets beside it the same tasks; valid_path: of the
// validation set, which there must be.
static inline void tasks_check(const Dataset *train, const Dataset *valid, const Dataset *test,
                               const char *valid_path) {
    CHECK(valid_path, "--valid: expected a validation set, to choose the best epoch by");
    CHECK(train->n_tasks > 0, "%s: expected molecules with labels (data_prep --labels)",
          train->path);
    CHECK(valid->count > 0, "%s: expected molecules, to choose the best epoch by", valid_path);
    dataset_same_tasks(train, valid);
    if (test->data) dataset_same_tasks(train, test);
}

static const char *const TASK_KINDS[] = {"classification", "regression"};

// The place of the first label that is neither 0 nor 1 nor missing among those of task y, or of all
// tasks (y = Y); n Y if there is none.
static inline size_t label_no_class(const float *labels, size_t n, size_t Y, size_t y) {
    size_t k = 0;
    while (k < n * Y && ((y < Y && k % Y != y) || isnan(labels[k]) || labels[k] == 0 ||
                         labels[k] == 1)) k++;
    return k;
}

// Dies if a label of a dataset, which may not be open, is no class.
static inline void classes_check(const Dataset *d) {
    size_t Y = (size_t)d->n_tasks, n = d->data ? d->count : 0;
    float *labels = n ? dataset_labels(d) : NULL;
    size_t k = label_no_class(labels, n, Y, Y);
    CHECK(k == n * Y, "%s: molecule %zu: expected labels 0 and 1 for --task classification, found "
          "%g; give --task regression, or leave out %s", d->path, k / Y, (double)labels[k],
          d->task_names[k % Y]);
    free(labels);
}

// The kind of the labels of a training set, sets[0], *task, or if that is NULL by their values; the
// sets beside it are open, or not. Of task y = 0 to Y - 1, statistics (3, Y): mean and deviation (1
// where all are equal; classes: 0 and 1), and the bias that a head begins with, log(p / (1 - p)) of
// classes with p the share of ones; there must be both classes unless `one_class` will do. Dies
// where there is nothing to learn, or one of the sets has labels that are no classes.
static inline TaskKind task_statistics(float *statistics, const Dataset *const sets[3],
                                       const char **task, int one_class) {
    const Dataset *d = sets[0];
    size_t Y = (size_t)d->n_tasks, n = d->count * Y;
    float *labels = dataset_labels(d);
    for (size_t k = 0; k < n; k++)
        CHECK(!(fabsf(labels[k]) > (float)LABEL_MAX), "%s: molecule %zu: task %s: label %g is "
              "beyond range; expected at most %g", d->path, k / Y, d->task_names[k % Y],
              (double)labels[k], LABEL_MAX);
    size_t other = label_no_class(labels, d->count, Y, Y);
    if (!*task) {
        *task = TASK_KINDS[other < n ? TASK_REGRESSION : TASK_CLASSIFICATION];
        fprintf(stderr, "task    %s: the labels are %s 0 and 1 (--task overrules)\n", *task,
                other < n ? "more than" : "all");
    }
    TaskKind kind = (TaskKind)choice("--task", *task, TASK_KINDS, 2);
    int classes = kind == TASK_CLASSIFICATION;
    for (int k = 0; k < 3 && classes; k++) classes_check(sets[k]);
    for (size_t y = 0; y < Y; y++) {
        LabelSummary s = label_summary(labels, d->count, Y, y);
        const char *name = d->task_names[y];
        CHECK(s.count > 0, "%s: task %s has no labels", d->path, name);
        CHECK(!classes || s.deviation > 0 || one_class, "%s: task %s: all labels are %g; expected "
              "both classes (data_prep --labels leaves a task out)", d->path, name, s.mean);
        if (s.deviation <= 0)
            fprintf(stderr, "note    %s: task %s: all labels are %g, there is nothing to learn\n",
                    d->path, name, s.mean);
        double ones = fmin(fmax(s.mean, 0.5 / s.count), 1 - 0.5 / s.count);  // also of one class
        statistics[y] = classes ? 0 : (float)s.mean;
        statistics[Y + y] = classes || s.deviation <= 0 ? 1 : (float)s.deviation;
        statistics[2 * Y + y] = classes ? (float)log(ones / (1 - ones)) : 0;
    }
    free(labels);
    return kind;
}

enum { METRIC_AUC, METRIC_AP, METRIC_RMSE, METRIC_MAE, METRIC_R2, METRICS };
static const char *const METRIC_NAMES[METRICS] = {"ROC-AUC", "AP", "RMSE", "MAE", "R2"};

// All metrics of task y that make sense for its kind, NaN for the others and where undefined.
// scores (n, Y): logits (in float32 large probabilities are all 1), or predicted values.
static inline void task_metrics(double metric[METRICS], TaskKind kind, const float *scores,
                                const float *labels, size_t n, size_t Y, size_t y) {
    size_t count = 0;
    Scored *list = xmalloc(n, sizeof *list);
    for (size_t i = 0; i < n; i++)
        if (!isnan(labels[i * Y + y]))
            list[count++] = (Scored){scores[i * Y + y], labels[i * Y + y]};
    qsort(list, count, sizeof *list, scored_compare);
    double square = 0, absolute = 0;
    for (int k = 0; k < METRICS; k++) metric[k] = (double)NAN;
    for (size_t i = 0; i < count; i++) {
        double error = (double)list[i].score - (double)list[i].label;
        square += error * error;
        absolute += fabs(error);
    }
    if (kind == TASK_CLASSIFICATION) {
        ranking_metrics(&metric[METRIC_AUC], &metric[METRIC_AP], list, count);
    } else if (count > 0) {
        metric[METRIC_RMSE] = sqrt(square / (double)count);
        metric[METRIC_MAE] = absolute / (double)count;
        double deviation = label_summary(labels, n, Y, y).deviation;
        if (deviation > 0)
            metric[METRIC_R2] = 1 - square / ((double)count * deviation * deviation);
    }
    free(list);
}

// The metrics that are defined; "-" if none is. Errors have the labels' scale, others have none.
static inline void print_metrics(FILE *out, const double metric[METRICS]) {
    int n = 0;
    for (int k = 0; k < METRICS; k++) {
        double x = metric[k];
        if (isnan(x)) continue;
        if (fabs(x) < 1 && k != METRIC_RMSE && k != METRIC_MAE) x = round(1e6 * x) / 1e6 + 0.0;
        fprintf(out, "  %s %s", METRIC_NAMES[k], number_text(x, 6));
        n++;
    }
    fputs(n ? "\n" : "  -\n", out);
}

// Half the width of the interval around a prediction that holds the label of a share `part` of
// molecules, from `models` times the residuals (n, Y) of others like them: of their m without sign
// the ceil((m + 1) part)-th smallest, infinite if there are too few. This is split conformal
// prediction (Papadopoulos et al. 2002): a new molecule's residual has any of m + 1 ranks alike, so
// the share is at least `part`. Two restrictions: the validation set has chosen the epoch too, so
// its residuals are slightly too small, and molecules unlike it err more. The residuals of an
// ensemble's mean are the means of its models'.
static inline double interval_half(const float *residuals, size_t n, size_t Y, size_t y, int models,
                                   double part) {
    Scored *list = xmalloc(n, sizeof *list);
    size_t m = 0;
    for (size_t k = y; k < n * Y; k += Y)
        if (!isnan(residuals[k])) list[m++].score = fabsf(residuals[k]) / (float)models;
    qsort(list, m, sizeof *list, scored_compare);
    double rank = fmax(ceil(part * (double)(m + 1) - 1e-9), 1);
    double half = rank <= (double)m ? (double)list[(size_t)rank - 1].score : (double)INFINITY;
    free(list);
    return half;
}

// Means over the tasks in which a metric is defined; NaN if there is none.
static inline void task_means(double mean[METRICS], TaskKind kind, const float *scores,
                              const float *labels, size_t n, size_t Y) {
    double sum[METRICS] = {0}, count[METRICS] = {0}, metric[METRICS];
    for (size_t y = 0; y < Y; y++) {
        task_metrics(metric, kind, scores, labels, n, Y, y);
        for (int k = 0; k < METRICS; k++) {
            if (isnan(metric[k])) continue;
            sum[k] += metric[k];
            count[k] += 1;
        }
    }
    for (int k = 0; k < METRICS; k++) mean[k] = count[k] > 0 ? sum[k] / count[k] : (double)NAN;
}

// mean (columns) of what is there in the rows first..last-1 of a table; NaN where nothing is.
static inline void rows_mean(double *mean, const float *rows, int columns, int64_t first,
                             int64_t last) {
    for (int k = 0; k < columns; k++) {
        double sum = 0, n = 0;
        for (int64_t i = first; i < last; i++) {
            float x = rows[i * columns + k];
            sum += isnan(x) ? 0 : (double)x;
            n += !isnan(x);
        }
        mean[k] = n > 0 ? sum / n : (double)NAN;
    }
}

// How far probabilities p of class 1 can be believed: the mean squared distance to the labels that
// are there (Brier 1950), and how often class 1 was found where p was in each fifth of 0..1.
static inline void print_reliability(FILE *out, const float *p, const float *labels, size_t n) {
    double count[5] = {0}, said[5] = {0}, found[5] = {0}, brier = 0, all = 0;
    for (size_t k = 0; k < n; k++) {
        if (isnan(labels[k])) continue;
        int bin = min_int((int)(p[k] * 5), 4);
        double error = (double)p[k] - (double)labels[k];
        count[bin] += 1;
        said[bin] += (double)p[k];
        found[bin] += (double)labels[k];
        brier += error * error;
        all += 1;
    }
    if (all == 0) return;
    fprintf(out, "Brier score %.4f; where the probability is\n", brier / all);
    for (int k = 0; k < 5; k++)
        if (count[k] > 0)
            fprintf(out, "  %.1f to %.1f, of %.0f: said %.2f, found %.2f\n", k / 5.0, (k + 1) / 5.0,
                    count[k], said[k] / count[k], found[k] / count[k]);
}
