// lib/progress.h - one line on stderr, redrawn in place on a terminal and repeated now and then
// elsewhere; stdout carries results only
//
//   progress_begin(), progress_show()

typedef struct {
    double start, shown;  // seconds; when the work began, when a line was last shown
    double first;         // what had been done before this run (a resumed one)
    int terminal;
} Progress;

static inline Progress progress_begin(double already_done) {
    return (Progress){now_seconds(), 0, already_done, isatty(fileno(stderr))};
}

// Shows "text  12.3 %  1234 UNIT/s  1:23 left" if the last line is old enough (0.2 s on a
// terminal, 10 s elsewhere) or `last` is set. total = 0: unknown. work = units done in this run.
static inline void progress_show(Progress *p, double done, double total, double work,
                                 const char *unit, const char *text, int last) {
    double now = now_seconds(), elapsed = now - p->start;
    if (!last && now - p->shown < (p->terminal ? 0.2 : 10.0)) return;
    if (!last && !p->terminal && p->shown == 0) {  // the first plain line waits its turn too
        p->shown = now;
        return;
    }
    p->shown = now;
    fprintf(stderr, "%s%s", p->terminal ? "\r" : "", text);
    if (total > 0) fprintf(stderr, "  %5.1f %%", 100 * done / total);
    if (elapsed > 0) fprintf(stderr, "  %.0f %s/s", work / elapsed, unit);
    if (total > 0 && done > p->first && !last) {
        double left = elapsed / (done - p->first) * (total - done);
        fprintf(stderr, "  %d:%02d left", (int)(left / 60), (int)left % 60);
    }
    fprintf(stderr, "%s", p->terminal ? (last ? "\033[K\n" : "\033[K") : "\n");
    fflush(stderr);
}

// Removes it from a terminal: something else is to be shown.
static inline void progress_clear(const Progress *p) {
    if (p->terminal) fprintf(stderr, "\r\033[K");
}
