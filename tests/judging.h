// tests/judging.h - labels of any scale, validation sets that cannot judge, parts that are empty;
// numbers that are none; notes

// Writes a table of 12 molecules with these columns, and the dataset of it.
#define JUDGED(file, columns, values)                                                              \
    "{ echo smiles," columns "; i=0; for s in C CC CCC CCO CCN CCCC CCCO CCCN c1ccccc1 CCCl CCBr " \
    "CCOC; do i=$((i+1)); echo $s," values "; done; } > build/j_" file ".csv && ./data_prep "      \
    "--labels " columns " -o build/j_" file ".bin build/j_" file ".csv"
#define TUNE(train, valid, options)                                                                \
    "./moleblend finetune build/j_" train ".bin --valid build/j_" valid ".bin --size tiny "        \
    options " -o build/j.safetensors > build/j.out 2>&1; c=$?; cat build/j.out; exit $c"

// Numbers for people, and what the labels of a task are. Too few digits, or too many.
static void test_scales(void) {
    static const struct { double x; int decimals; const char *text; } numbers[] = {
        {0.834, 4, "0.8340"}, {0, 4, "0.0000"}, {7.4516, 4, "7.4516"}, {-0.25, 6, "-0.250000"},
        {0.0123, 4, "0.0123"}, {0.00123, 4, "0.00123"}, {1.4216e-9, 6, "1.4216e-09"},
        {123456.789, 6, "123456.789000"}, {1234567.89, 4, "1.23457e+06"}, {(double)NAN, 4, "-"},
        {0.000123, 6, "0.000123"}, {99.99999, 4, "100.0000"}};
    for (size_t k = 0; k < sizeof numbers / sizeof *numbers; k++)
        test_check(strcmp(number_text(numbers[k].x, numbers[k].decimals), numbers[k].text) == 0,
                   "%g is shown as %s, expected %s", numbers[k].x,
                   number_text(numbers[k].x, numbers[k].decimals), numbers[k].text);
    static const struct { float label[4]; double count, mean, deviation; } tasks[] = {
        {{1e-9f, 3e-9f, 1e-9f, 3e-9f}, 4, 2e-9, 1e-9},  // KD in M
        {{1e12f, 3e12f, NAN, 2e12f}, 3, 2e12, 8.16496580927726e11},
        {{1e-30f, 3e-30f, 1e-30f, 3e-30f}, 4, 2e-30, 1e-30},
        {{-1, 1, -1, 1}, 4, 0, 1},
        {{1000, 1001, 1000, 1001}, 4, 1000.5, 0.5},
        {{0.1f, 0.1f, 0.1f, NAN}, 3, 0.1, 0},
        {{1e-9f, 1e-9f, 1e-9f, 1e-9f}, 4, 1e-9, 0},
        {{1000, 1000.00006f, 1000, 1000}, 4, 1000, 0},  // the last bit of a float
        {{NAN, NAN, NAN, NAN}, 0, 0, 0},
        {{0, 0, NAN, 0}, 3, 0, 0}};
    for (size_t k = 0; k < sizeof tasks / sizeof *tasks; k++) {
        LabelSummary s = label_summary(tasks[k].label, 4, 1, 0);
        test_check(s.count == tasks[k].count &&
                   fabs(s.mean - tasks[k].mean) <= 1e-6 * fabs(tasks[k].mean) &&
                   fabs(s.deviation - tasks[k].deviation) <= 1e-6 * tasks[k].deviation,
                   "labels %zu: %g of mean %g, deviation %g", k, s.count, s.mean, s.deviation);
    }
    static const float scores[] = {2e-9f, 2e-9f, 1e-9f, 3e-9f};
    double metric[METRICS];
    task_metrics(metric, TASK_REGRESSION, scores, tasks[0].label, 4, 1, 0);
    test_check(fabs(metric[METRIC_R2] - 0.5) < 1e-5 && fabs(metric[METRIC_RMSE] - 7.0711e-10) < 1e-13,
               "labels of 1e-9: R2 %g, RMSE %g", metric[METRIC_R2], metric[METRIC_RMSE]);
}

#if MB_POSIX  // a shell makes the tables
// A task that cannot judge keeps its labels, another loses them, or it is not said.
static void test_labels_judge(void *unused) {
    float labels[] = {1, 0, 5, 1, 1, NAN, 1, 0, NAN};
    char *names[] = {"a", "b", "c"};
    Dataset d = {.path = "d", .count = 3, .n_tasks = 3, .task_names = names};
    (void)unused;
    CHECK(labels_judge(labels, &d, "some", "none") == 1, "not one task");
    for (int k = 0; k < 9; k++)
        CHECK(isnan(labels[k]) == (k % 3 != 1), "label %d is %g", k, (double)labels[k]);
    DIE("right");
}

// Labels of any scale are learnt; a validation set that cannot judge chooses nothing.
static void test_judging(void) {
    static const struct { const char *command; int code; const char *expected; } table[] = {
        {JUDGED("kd", "kd", "$((i%5+10))e-9"), 0, ""},
        {JUDGED("cls", "a,b", "$((i%2)),$((i/2%2))"), 0, ""},
        {JUDGED("one", "a,b", "1,$((i/2%2))"), 0, ""},
        {JUDGED("ones", "a,b", "1,0"), 0, ""},
        {JUDGED("same", "kd", "11e-9"), 0, ""},
        {"printf 'smiles,a,set\nC,0,train\nCC,1,train\nCCC,,valid\nCCO,,valid\n' > build/j.csv; "
         "./data_prep --labels a --split-by column:set -o 'build/j_bare.{}.bin' build/j.csv", 0, ""},
        {"./data_prep -o 'build/j_cut.{}.bin' --split 12,0,rest --split-by order --labels a,b "
         "build/j_cls.csv", 0, "test            0 molecules"},
        // nanomolar affinities: better than chance, and the digits to see it
        {TUNE("kd", "kd", "--epochs 60 --lr 2e-3"), 0, "e-10  MAE"},
        {"./moleblend info build/j.safetensors", 0, "label_std: 1.32024836e-09"},
        {"awk -F, 'NR == 61 { print ($4 > 0 && $4 < 1.2e-9) }' build/j.log.csv", 0, "1\n"},
        // one of two tasks cannot judge: it alone has no say, nor in calibration
        {TUNE("cls", "one", "--epochs 3"), 0,
         "build/j_one.bin: all labels of task a are 1: no say in the choice of an epoch\n"},
        // none can: the training loss chooses, and stops
        {TUNE("cls", "ones", "--epochs 9 --lr 1e-3"), 0, "build/j_ones.bin: 2 of 2 tasks have no labels "
         "or all the same, first a: the training loss chooses the epoch and when to stop\n"},
        {"grep -c 'j_ones.bin' build/j.out; ! grep -i nan build/j.out build/j.log.csv", 0, "1\n"},
        {"./moleblend info build/j.safetensors | grep -c 'logit_scale: 1$'", 0, "1\n"},
        {"awk -F, 'NR > 1 { best = NR == 2 || $3 < loss ? NR - 1 : best; loss = best == NR - 1 ? $3 "
         ": loss; bad += $4 != \"\" || $5 != best } END { print bad + 0 }' build/j.log.csv", 0,
         "0\n"},
        {TUNE("bare.train", "bare.valid", "--epochs 300 --lr 0 --patience 2 "
              "--attention-dropout 0 --activation-dropout 0 --path-dropout 0"), 0,
         "task a has no labels: the training loss"},
        {"grep -c , build/j.log.csv", 0, "4\n"},
        {TUNE("kd", "same", "--epochs 2 --seeds 2"), 0, "valid -; valid  RMSE "},
        // parts that are empty
        {TUNE("cls", "cls", "--epochs 1 --test build/j_cut.test.bin"), 0,
         "build/j_cut.test.bin: the dataset is empty and is left out"},
        {"grep '; valid  ROC-AUC' build/j.out && ! grep -i nan build/j.out", 0, "seed 1"},
        {TUNE("cls", "cut.valid", "--epochs 1"), 1, "j_cut.valid.bin: expected molecules, to choose"},
        {TUNE("cut.valid", "cls", "--epochs 1"), 1, "build/j_cut.valid.bin: the dataset is empty"},
        {"./moleblend build/j_cut.valid.bin --size tiny", 1, "the dataset is empty"},
        {"./moleblend build/j_cls.bin --valid build/j_cut.valid.bin --size tiny --steps 1 -o "
         "build/j.safetensors", 0, "build/j_cut.valid.bin: the dataset is empty and is left out"},
    };
    for (size_t k = 0; k < sizeof table / sizeof *table; k++)
        test_command(table[k].command, table[k].code, table[k].expected);
    test_apart(test_labels_judge, NULL, "note    d: 2 of 3 tasks have no labels or all the same, "
               "first a: some\n");
}
#endif
