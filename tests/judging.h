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
    test_check(fabs(metric[METRIC_R2] - 0.5) < 1e-5 &&
                   fabs(metric[METRIC_RMSE] - 7.0711e-10) < 1e-13,
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
    static const CommandRow table[] = {
        {JUDGED("kd", "kd", "$((i%5+10))e-9"), 0, ""},
        {JUDGED("cls", "a,b", "$((i%2)),$((i/2%2))"), 0, ""},
        {JUDGED("one", "a,b", "1,$((i/2%2))"), 0, ""},
        {JUDGED("ones", "a,b", "1,0"), 0, ""},
        {JUDGED("same", "kd", "11e-9"), 0, ""},
        {"printf 'smiles,a,set\nC,0,train\nCC,1,train\nCCC,,valid\nCCO,,valid\n' > build/j.csv; "
         "./data_prep --labels a --split-by column:set -o 'build/j_bare.{}.bin' "
         "build/j.csv", 0, ""},
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
        {TUNE("cls", "ones", "--epochs 9 --lr 1e-3"), 0, "build/j_ones.bin: 2 of 2 tasks have no "
         "labels or all the same, first a: the training loss chooses the epoch and when to stop\n"},
        {"grep -c 'j_ones.bin' build/j.out; ! grep -i nan build/j.out build/j.log.csv", 0, "1\n"},
        {"./moleblend info build/j.safetensors | grep -c 'logit_scale: 1$'", 0, "1\n"},
        {"awk -F, 'NR > 1 { best = NR == 2 || $3 < loss ? NR - 1 : best; loss = best == NR - 1 ? "
         "$3 : loss; bad += $4 != \"\" || $5 != best } END { print bad + 0 }' build/j.log.csv", 0,
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
        {TUNE("cls", "cut.valid", "--epochs 1"), 1, "j_cut.valid.bin: expected molecules, to "
         "choose"},
        {TUNE("cut.valid", "cls", "--epochs 1"), 1, "build/j_cut.valid.bin: the dataset is empty"},
        {"./moleblend build/j_cut.valid.bin --size tiny", 1, "the dataset is empty"},
        {"./moleblend build/j_cls.bin --valid build/j_cut.valid.bin --size tiny --steps 1 -o "
         "build/j.safetensors", 0, "build/j_cut.valid.bin: the dataset is empty and is left out"},
    };
    test_rows(table, sizeof table / sizeof *table);
    test_apart(test_labels_judge, NULL, "note    d: 2 of 3 tasks have no labels or all the same, "
               "first a: some\n");
}

// Where a parameter is spoiled, or the weight of a loss, and what is the first to be no number
// then.
typedef struct { const char *golden, *tensor; float value; const char *expected; } Poison;

static void poisoned_step(void *argument) {
    const Poison *p = argument;
    Golden g;
    double loss[LOSSES] = {0};
    threads_set(1);  // those of the parent are not here
    golden_open(&g, p->golden);
    Step *s = &g.s;
    s->draws = (Draws){7, 41, 0, 1};
    for (int i = 0; i < s->model.n_tensors; i++)
        if (p->tensor && strcmp(s->model.info[i].name, p->tensor) == 0)
            s->model.params[s->model.info[i].offset + 3] = p->value;
    if (!p->tensor) s->weights.weight[LOSS_SPD] = (double)p->value * (double)p->value;
    if (g.finetune) task_gradients(loss, s, &g.task);
    else gradients(loss, s);
    finite_check(s, loss, 0);
    finite_check(s, NULL, gradient_norm(&s->model));
    _exit(0);
}

// A number that is none, blamed on what has it from something else.
static void test_poison(void) {
#define PLAIN_MINI "data/mini.safetensors"
#define TUNED_MINI "data/mini_finetune_reg.safetensors"
    static Poison table[] = {
        {PLAIN_MINI, "layers.1.fc1.weight", NAN, "none: ffn_pre of layer 1, by "
         "layers.1.fc1.weight."},
        {PLAIN_MINI, "layers.0.self_attn.q_proj.weight", NAN,
         "none: qkv of layer 0, by layers.0.self"},
        {PLAIN_MINI, "layers.1.self_attn.v_proj.bias", INFINITY,
         "none: qkv of layer 1, by layers.1.se"},
        {PLAIN_MINI, "layers.0.self_attn.out_proj.weight", NAN, "none: norm1_hat of layer 0, by "},
        {PLAIN_MINI, "layers.0.self_attn_layer_norm.bias", NAN,
         "none: mid of layer 0, by layers.0."},
        {PLAIN_MINI, "layers.0.fc2.weight", NAN, "none: norm2_hat of layer 0, by "
         "layers.0.fc2.weight"},
        {PLAIN_MINI, "layers.0.final_layer_norm.weight", NAN,
         "none: x of layer 1, by layers.0.final"},
        {PLAIN_MINI, "layers.1.final_layer_norm.weight", NAN,
         "none: x of layer 2, by layers.1.final"},
        {PLAIN_MINI, "emb_layer_norm.weight", NAN, "none: x of layer 0, by emb_layer_norm.weight"},
        {PLAIN_MINI, "atom_feature.graph_token.weight", NAN,
         "none: tokens, by atom_feature.graph_"},
        {PLAIN_MINI, "molecule_3d_bias.gbf.means.weight", NAN,
         "none: gauss_const, by molecule_3d_bias"},
        {PLAIN_MINI, "molecule_3d_bias.gbf_proj.layer1.bias", NAN,
         "none: bias3d_pre, by molecule_3d"},
        {PLAIN_MINI, "molecule_3d_bias.gbf_proj.layer2.weight", NAN,
         "none: bias3d_out, by molecule_3d"},
        {PLAIN_MINI, "blend_spd_pred_head.linear.bias", NAN,
         "none: the loss spd, by blend_spd_pred"},
        {PLAIN_MINI, "blend_3d_pred_head.transform_n2_head.row_head.weight", NAN,
         "none: pair_pre, by "},
        {PLAIN_MINI, "atom_proc.q_proj.weight", NAN,
         "none: denoise_qkv, by atom_proc.q_proj.weight"},
        {PLAIN_MINI, "layers.1.fc1.weight", 3e38f, "none: ffn_"},  // too large a number, no other
        {TUNED_MINI, "layers.1.fc1.weight", NAN, "none: ffn_pre of layer 1, by "
         "layers.1.fc1.weight."},
        {TUNED_MINI, "proj_out.dense.weight", NAN, "none: head_pre, by proj_out.dense.weight"},
        {TUNED_MINI, "proj_out.out_proj.weight", NAN,
         "none: head_out, by proj_out.out_proj.weight"},
        // the loss is a number, what goes back is not
        {PLAIN_MINI, NULL, 1e25f, "step 42: the gradients are no longer numbers. In the order of "
         "computation the first to be none: the gradient of blend_spd_pred_head.linear.bias"}};
    for (size_t k = 0; k < sizeof table / sizeof *table; k++)
        test_apart(poisoned_step, &table[k], table[k].expected);
}

// What is left out without a word, or shown as what it is not.
static void test_notes(void) {
    static const CommandRow table[] = {
        // losses that nothing reaches
        {"printf 'C 2\nCC a\nCCC a\nCCCC 0\nc1ccc2cc3ccccc3cc2c1 tar\n' > build/n.smi; ./data_prep "
         "-o build/n.bin build/n.smi", 0, "5 molecules"},
        {"./moleblend build/n.bin --size tiny --steps 1 -o build/n.safetensors > build/n.txt "
         "2>&1; cat build/n.txt", 0,
         "note    build/n.bin: 5 of 5 molecules have no positions: 2D losses only\n"},
        {"tr -s ' ' < build/n.txt > build/n.out; grep -c -e '^denoise - - - -$' -e '^3d - - - -$' "
         "-e '^ 1 [0-9.]* - [0-9.]* [0-9.]* - ' build/n.out", 0, "3\n"},
        {"! grep ' 0.0000' build/n.out", 0, ""},
        {"./moleblend build/test_train.bin --size tiny --steps 1 -o build/n.safetensors", 0,
         "6 of 40 molecules have no positions: 2D losses only"},
        {"./moleblend build/test_train.bin --size tiny --steps 1 --atom-3d 0 -o "
         "build/n.safetensors | tr -s ' '", 0, "\ndenoise - - - -\n"},
        // models of other seeds beside those of this run
        {JUDGED("cls", "a,b", "$((i%2)),$((i/2%2))") "; rm -f build/j.seed*", 0, ""},
        {TUNE("cls", "cls", "--epochs 1 --seeds 3"), 0, "over 3 seeds"},
        {"! grep 'of another run' build/j.out", 0, ""},
        {TUNE("cls", "cls", "--epochs 1 --seeds 2"), 0,
         "note    build/j.seed3.safetensors is there, of another run"},
        {TUNE("cls", "cls", "--epochs 1 --seed 9"), 0, "note    and 2 more of other seeds"},
        {"rm build/j.seed*; rm -f build/n.npy; cd build && ../moleblend embed n.bin --level atom "
         "--model n.safetensors -o -", 1, "--level atom: expected -o FILE.npy"},
        {"ls build/-* build/./-.index.npy; ! ls -- '-.index.npy'", 0, "No such file"},
        // a molecule by its name
        {"./moleblend show build/n.bin tar", 0, "molecule 4 of build/n.bin: tar, 14 atoms"},
        {"./moleblend show build/n.bin 1", 0, "molecule 1 of build/n.bin: a"},
        {"./moleblend show build/n.bin a", 0, "\"a\" is taken as molecule 1; 1 more of that name, "
         "the first 2\n"},
        {"./moleblend show build/n.bin 2", 0, "\"2\" is taken as molecule 2; 1 more of that name, "
         "the first 0\n"},
        {"./moleblend show build/n.bin b", 1, "from 0 on, or a name, found \"b\""},
        {"./moleblend show build/n.bin -1", 1, "unknown option -1"},
        // everything of every pair, and the bonds of a long path
        {"./data_prep -o build/n3.bin data/ethanol.sdf && ./moleblend show build/n3.bin 0 "
         "--no-blend",
         0, "  2 O         2/--/2.4         1/-/1.4         0/./0.0\n"},
        {"./moleblend show build/n3.bin ethanol --no-blend", 0, "structure: 2D+3D 2D+3D 2D+3D"},
        {"./moleblend show build/n3.bin ethanol --no-blend", 0,
         "0 2     spd_table[3] + (path_bias[0][0] + path_bias[1][0]) / 2 + bias3d_out[2] "},
        {"./moleblend show build/n.bin 2 --no-blend", 0, "            2/--             1/-  "},
        {"./moleblend show build/n.bin tar --pair-spd 0 --pair-3d 0 --pair-edge 1", 0,
         "path_bias[4][37]) / 5 "},
        // directions have length 1, those of the model and the true ones
        {"./moleblend show build/n3.bin 0 --model data/pretrained.safetensors | sed -n '/path "
         "length/,$s/[()]//gp' | awk '/^0 [12]/ { for (k = NF - 5; k <= NF - 2; k += 3) n += "
         "sqrt(($k)^2 + $(k+1)^2 + $(k+2)^2) > 0.99 } END { print n \" of 4\" }'", 0, "4 of 4"},
        {"./moleblend show build/n3.bin 0 --model data/pretrained.safetensors", 0,
         "( 0.83  0.40  0.40)\n"},
        // records that are skipped belong to no part, and are listed in the first
        {"printf 'smiles,a\nC,1\nC(,2\nCC,3\nCCC,1\n' > build/n.csv; ./data_prep -o "
         "'build/n.{}.bin' "
         "--split 2,rest --split-by order --labels a build/n.csv && ./moleblend info "
         "build/n.train.bin", 0, "skipped    1 records of the input"},
        {"./moleblend info build/n.valid.bin", 0, "skipped    0 records of the input"},
        {"make -s -n OMP=0 all | tail -n 1", 0, "one thread (OMP=0)"},
    };
    test_rows(table, sizeof table / sizeof *table);
}
#endif
