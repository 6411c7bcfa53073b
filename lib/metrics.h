// lib/metrics.h - Metrics of one task; labels that are NaN are left out

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
    double square = 0, absolute = 0, mean = 0, variance = 0;
    int varied = 0;  // constant labels have a variance too, of rounding
    for (int k = 0; k < METRICS; k++) metric[k] = (double)NAN;
    for (size_t i = 0; i < count; i++) mean += (double)list[i].label / (double)count;
    for (size_t i = 0; i < count; i++) {
        double error = (double)list[i].score - (double)list[i].label;
        varied |= list[i].label != list[0].label;
        square += error * error;
        absolute += fabs(error);
        variance += ((double)list[i].label - mean) * ((double)list[i].label - mean);
    }
    if (kind == TASK_CLASSIFICATION) {
        ranking_metrics(&metric[METRIC_AUC], &metric[METRIC_AP], list, count);
    } else if (count > 0) {
        metric[METRIC_RMSE] = sqrt(square / (double)count);
        metric[METRIC_MAE] = absolute / (double)count;
        metric[METRIC_R2] = varied ? 1 - square / variance : (double)NAN;
    }
    free(list);
}

// Means over the tasks in which a metric is defined; NaN if there is none, and of errors in the
// labels' units, which several tasks need not share.
static inline void mean_metrics(double mean[METRICS], TaskKind kind, const float *scores,
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
    for (int k = 0; k < METRICS; k++) {
        int units = Y > 1 && (k == METRIC_RMSE || k == METRIC_MAE);
        mean[k] = count[k] > 0 && !units ? sum[k] / count[k] : (double)NAN;
    }
}

// mean (columns) of the rows first..last-1 of a table.
static inline void rows_mean(double *mean, const float *rows, int columns, int64_t first,
                             int64_t last) {
    for (int k = 0; k < columns; k++) {
        mean[k] = 0;
        for (int64_t i = first; i < last; i++)
            mean[k] += (double)rows[i * columns + k] / (double)(last - first);
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
