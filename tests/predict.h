// tests/predict.h - predictions: intervals, ensembles, nearest training molecules, replaced files

// A rank off by one, a label that is missing counted, an interval that holds less than it says.
static void test_intervals(void) {
    enum { MOST = 60 };
    float residuals[2 * MOST];
    int wrong = 0;
    for (uint32_t n = 0; n <= MOST; n++) {  // of the second task; every third label is missing
        float sorted[MOST];
        size_t m = 0;
        for (uint32_t k = 0; k < 2 * n; k++) {
            residuals[k] = k % 6 == 5 ? NAN : 3 * rng_normal(n, 70, 0, 0, k);
            if (k % 2 == 0 || isnan(residuals[k])) continue;
            float x = fabsf(residuals[k]);
            size_t at = m++;
            for (; at > 0 && sorted[at - 1] > x; at--) sorted[at] = sorted[at - 1];
            sorted[at] = x;
        }
        for (size_t percent = 1; percent <= 100; percent++) {
            size_t rank = (percent * (m + 1) + 99) / 100;  // rounded up, in whole numbers
            double got = interval_half(residuals, n, 2, 1, 3, (double)percent / 100);
            double right = rank <= m ? (double)sorted[rank - 1] / 3 : (double)INFINITY;
            wrong += !(got == right || fabs(got - right) < 1e-6 * right);
        }
    }
    test_check(wrong == 0, "ranks of intervals: %d wrong", wrong);
    for (int part = 5; part <= 9; part += 2) {  // 19 residuals and one more of their kind
        int held = 0, rounds = 20000;
        for (int round = 0; round < rounds; round++) {
            float x[20];
            for (uint32_t k = 0; k < 20; k++) {
                float normal = rng_normal(71, 70, (uint32_t)round, 0, k);
                x[k] = normal * normal * normal;
            }
            held += (double)fabsf(x[19]) <= interval_half(x, 19, 1, 0, 1, part / 10.0);
        }
        test_check(fabs((double)held / rounds - part / 10.0) < 0.012,
                   "an interval of %d0 %% holds %d of %d", part, held, rounds);
    }
}

// Residuals that are not those of the checkpoint's own parameters, or of another seed.
static void test_residuals(void) {
    for (int seed = 1; seed <= 2; seed++) {
        TensorFile f;
        size_t n, rows = 0, wrong = 0;
        char *path = xprintf("build/pr.seed%d.safetensors", seed);
        char *command = xprintf("./moleblend predict build/test_train.bin --interval 0 --model %s "
                                "2> build/pr.log", path);
        tensor_file_open(&f, path);
        const TensorEntry *t = tensor_find(&f, "valid_residuals");
        run_command(command);
        char *csv = file_text("build/test.out", &n), *row = strchr(csv, '\n');
        for (; t && row && row[1]; row = strchr(row + 1, '\n'), rows++) {
            double x[4];  // predicted and label of both tasks; a third of the second are missing
            int found = sscanf(row + 1, "%*[^,],%*[^,],%lf,%lf,%lf,%lf", x, x + 1, x + 2, x + 3);
            for (size_t y = 0; y < 2; y++) {
                double kept = (double)tensor_value(t, 2 * rows + y);
                if (found < 2 * (int)y + 2) wrong += y == 0 || !isnan(kept);
                else wrong += !(fabs(kept - (x[2 * y] - x[2 * y + 1])) < 1e-4);
            }
        }
        test_check(t && t->count == 80 && rows == 40 && wrong == 0,
                   "residuals of seed %d: %zu of %zu rows wrong", seed, wrong, rows);
        tensor_file_close(&f);
        FREE_ALL(csv, path, command);
    }
}

// The array of an .npy file, as floats, and its columns.
static float *read_npy(const char *path, size_t *rows, size_t *columns) {
    size_t size;
    const uint8_t *bytes = file_bytes(path, &size);
    CHECK(size > 128 && sscanf((const char *)bytes + 10, "{'descr': '<f4', 'fortran_order': False, "
                               "'shape': (%zu, %zu)", rows, columns) == 2, "%s: no array", path);
    float *x = xmalloc(*rows * *columns, sizeof *x);
    for (size_t k = 0; k < *rows * *columns; k++) x[k] = get_f32(bytes + 128 + 4 * k);
    file_release(bytes, size);
    return x;
}

// A neighbour that is not the nearest by the vectors of `embed`, or another one's name.
static void test_near(void) {
    size_t n, N, C, size, row = 0, wrong = 0;
    test_command("head -n 401 data/sample.csv > build/pr.csv && ./data_prep -o 'build/pr.{}.bin' "
                 "--split 350,50 --split-by random --name name build/pr.csv", 0, "50");
    test_command("for p in train valid; do ./moleblend embed build/pr.$p.bin --model "
                 "build/pr.seed1.safetensors -o build/pr.$p.npy || exit 1; done", 0, "molecules/s");
    // one with itself: distance 0; the batches of both are not the same
    test_command("./moleblend predict build/pr.train.bin --model build/pr.seed1.safetensors --near "
                 "build/pr.train.bin --batch-size 7 2> /dev/null | awk -F, 'NR > 1 && "
                 "$2 == $(NF - 2) && $(NF - 1) == 0 { n++ } END { print n }'", 0, "350\n");
    test_command("./moleblend predict build/pr.valid.bin --model build/pr.seed1.safetensors "
                 "build/pr.seed2.safetensors --near build/pr.train.bin --threads 2 -o "
                 "build/pr.near.csv", 0, "");
    float *train = read_npy("build/pr.train.npy", &N, &C);
    float *test = read_npy("build/pr.valid.npy", &n, &C);
    double variance = 0;
    for (size_t c = 0; c < C; c++) {
        double mean = 0;
        for (size_t i = 0; i < N; i++) mean += (double)train[i * C + c] / (double)N;
        for (size_t i = 0; i < N; i++)
            variance += pow((double)train[i * C + c] - mean, 2) / (double)N;
    }
    char *csv = file_text("build/pr.near.csv", &size), *line = strchr(csv, '\n');
    Dataset data;
    Molecule m = {0};
    dataset_open(&data, "build/pr.train.bin");
    for (; line && line[1] && row < n; line = strchr(line + 1, '\n'), row++) {
        double least = (double)INFINITY;
        size_t nearest = 0;
        for (size_t i = 0; i < N; i++) {
            double square = 0;
            for (size_t c = 0; c < C; c++)
                square += pow((double)train[i * C + c] - (double)test[row * C + c], 2);
            if (square < least) nearest = i;
            least = fmin(least, square);
        }
        dataset_read(&data, nearest, &m);
        char *expected = xprintf(",%s,%.3f", m.name, sqrt(least / variance) + 1e-9);
        const char *end = strchr(line + 1, '\n'), *found = strstr(line + 1, expected);
        if (!found || found > end) {  // rounded otherwise
            free(expected);
            expected = xprintf(",%s,", m.name);
            found = strstr(line + 1, expected);
            wrong += !found || found > end ||
                     fabs(atof(found + strlen(expected)) - sqrt(least / variance)) > 2e-4;
        }
        free(expected);
    }
    test_check(row == 50 && wrong == 0, "nearest of %zu molecules: %zu wrong", row, wrong);
    dataset_close(&data);
    molecule_free(&m);
    FREE_ALL(train, test, csv);
}

// Models that belong not together, columns, an output or a dataset that is looked at too late.
static void test_predict(void) {
    if (!MB_POSIX) return;  // a shell copies and renames
    static const CommandRow table[] = {
        {"rm -f build/pr.*; ./moleblend finetune build/test_train.bin --valid build/test_train.bin "
         "--size tiny --epochs 3 --seeds 2 -o build/pr.safetensors", 0, "over 2 seeds"},
        // an ensemble
        {"./data_prep -o build/pr.many.bin --name name data/sample.csv", 0, "2000 molecules"},
        {"cp build/pr.seed1.safetensors build/pr.copy.safetensors && ./moleblend predict "
         "build/test_train.bin --model build/pr.seed1.safetensors build/pr.seed2.safetensors "
         "build/pr.copy.safetensors", 1,
         "build/pr.copy.safetensors: the same model as build/pr.seed1.safetensors"},
        {"./moleblend predict build/test_train.bin --model build/pr.seed1.safetensors "
         "./build/pr.seed1.safetensors", 1, "the same model as"},
        // a state is no model: its parameters are the last, not the best
        {"./moleblend predict build/test_train.bin --model build/pr.safetensors.state", 1,
         "build/pr.safetensors.state: is the state of a run; expected its checkpoint"},
        {"./moleblend info build/pr.seed2.safetensors", 0, "seed: 2"},
        // labels of nine digits, probabilities near 1: finetune and predict say the same
        {"awk -F, 'NR == 1 { print \"smiles,y\" } NR > 1 && NR < 41 { print $1 \",\" 1000000 + NR "
         "}' data/sample.csv > build/pr9.csv; ./data_prep --labels y -o build/pr9.bin "
         "build/pr9.csv && ./moleblend finetune build/pr9.bin --valid build/pr9.bin --size tiny "
         "--epochs 1 -o build/pr9.safetensors && ./moleblend predict build/pr9.bin --model "
         "build/pr9.safetensors | awk -F, 'NR > 1 && $6 > 1000001 && !had[$6]++' | wc -l", 0,
         "\n39\n"},
        {"awk -F, 'NR == 1 { print \"smiles,n\" } NR > 1 && NR < 801 { print $1 \",\" ($1 ~ "
         "/[Nn]/) }' data/sample.csv > build/prn.csv; ./data_prep --labels n --split 0.6,0.2,0.2 "
         "--split-by random -o 'build/prn.{}.bin' build/prn.csv && ./moleblend finetune "
         "build/prn.train.bin --layers 1 --dim 16 --ffn 16 --heads 2 --kernels 4 --lr 3e-2 "
         "--epochs 30 -o build/prn.safetensors | sed -n 's/.*; test *//p' > build/prn.a.txt && "
         "./moleblend predict build/prn.test.bin --model build/prn.safetensors 2>&1 > build/prn.out.csv | sed "
         "-n '1s/^n *//p' > build/prn.b.txt; grep -q AUC build/prn.a.txt && cmp build/prn.a.txt "
         "build/prn.b.txt && echo as one", 0, "as one"},
        // --patience is said, and a greater one goes on
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --size tiny --lr "
         "0 --epochs 9 --patience 2 -o build/prp.safetensors", 0,
         "seed 1: no gain for 2 epochs (--patience), ended after "},
        {"./moleblend finetune build/test_train.bin --resume --patience 4 -o build/prp.safetensors",
         0, "seed 1: no gain for 4 epochs (--patience), ended after "},
        // an update of molecules without positions has no denoising loss, and none counts as 0
        {"(sed '/^\\$\\$\\$\\$/q' data/sample.sdf) > build/prm.sdf; printf "
         "'smiles\\nCCO\\nCCN\\nCCC\\n' > build/prm.csv; ./data_prep -o build/prm.bin "
         "build/prm.sdf build/prm.csv && ./moleblend build/prm.bin --size tiny --batch-size 1 "
         "--steps 8 --lr 0 -o build/prm.safetensors && awk -F, 'NR > 1 { empty += $3 == \"\"; "
         "low += $3 != \"\" && $3 < 0.5 } END { print empty, \"empty\", low + 0, \"low\" }' "
         "build/prm.log.csv", 0, "6 empty 0 low"},
        {"printf 'C\\nN\\n' | ./data_prep --format smi -o build/prm.bin - && ./moleblend "
         "build/prm.bin --size tiny --steps 2 -o build/prm.safetensors", 0,
         "note    no loss had anything to count"},
        // --near another set
        {"./moleblend predict build/pr.many.bin --model build/pr.seed1.safetensors --near "
         "build/pr.many.bin", 0, "note    build/pr.many.bin: is not, by its fingerprint, what "
         "build/pr.seed1.safetensors was trained on"},
        // -o is the best seed
        {"./moleblend predict build/test_train.bin --model build/pr.safetensors "
         "build/pr.seed[12].safetensors", 1, "the same model as build/pr.safetensors"},
        {"printf 'smiles,logP,\"with,comma\"\\nC,1,2\\n"
         "CC,2,1\\nCCC,3,1\\n' | ./data_prep --format csv --labels all -o build/pr.bin - && "
         "./moleblend finetune build/pr.bin --valid build/pr.bin --size tiny --epochs 1 -o "
         "build/pr.other.safetensors && ./moleblend predict build/pr.bin --model "
         "build/pr.seed1.safetensors build/pr.other.safetensors", 1,
         "build/pr.other.safetensors: was trained on other data than build/pr.seed1.safetensors"},
        // intervals
        {"./moleblend predict build/test_train.bin --model build/pr.seed1.safetensors "
         "build/pr.seed2.safetensors 2> /dev/null", 0,
         "record,name,logP,logP low,logP high,logP deviation,logP label,\"with,comma\","},
        // the 33rd of 40 errors, on the molecules that it comes from; the 22nd of 26
        {"./moleblend predict build/test_train.bin --model build/pr.seed1.safetensors -o "
         "build/pr.csv", 0, "interval of 80 %: holds 82 % of 40 labels, width "},
        {"./moleblend predict build/test_train.bin --model build/pr.seed1.safetensors -o "
         "build/pr.csv", 0, "interval of 80 %: holds 85 % of 26 labels, width "},
        {"./moleblend predict build/test_train.bin --model build/pr.seed1.safetensors "
         "build/pr.seed2.safetensors -o build/pr.csv", 0, "interval of 80 %: holds 82 % of 40"},
        {"./moleblend predict build/test_train.bin --model build/pr.seed1.safetensors -o "
         "build/pr.csv --interval 0.5", 0, "interval of 50 %: holds 52 % of 40 labels, width "},
        {"./moleblend predict build/test_train.bin --model build/pr.seed1.safetensors --interval "
         "97 -o build/pr.csv", 0,
         "note    task with,comma: no interval of 97 %: the validation set has too few labels"},
        {"awk -F, 'NR > 1 { n += $4 < $3 && $3 < $5 && $7 != \"\" && $8 $9 == \"\" } END { print n "
         "}' build/pr.csv", 0, "40\n"},
        {"./moleblend predict build/test_train.bin --model build/pr.seed1.safetensors --interval 0 "
         "2> /dev/null", 0, "record,name,logP,logP label,\"with,comma\","},
        {"./moleblend finetune build/test_train.bin --valid build/pr.moved.bin --size tiny "
         "--epochs 1 -o build/pr.third.safetensors && ./moleblend predict build/test_train.bin "
         "--model build/pr.seed1.safetensors build/pr.third.safetensors -o build/pr.csv", 0,
         "no intervals: build/pr.third.safetensors has no residuals of the first model's"},
        // a signal leaves nothing
        {"./moleblend predict build/pr.many.bin --batch-size 1 --model build/pr.seed1.safetensors "
         "-o build/pr.killed.csv & p=$!; while kill -0 $p && ! [ -e build/pr.killed.csv.tmp ]; do "
         "sleep 0.01; done; kill $p; wait $p; echo \"ended by $?\"; ls build/pr.killed.csv*", 2,
         "ended by 143"},
        {"./moleblend predict build/test_train.bin --model build/pr.old.safetensors -o "
         "build/pr.csv", 0,
         "note    no intervals: build/pr.old.safetensors has no residuals of the validation set"},
        {"head -n 1 build/pr.csv", 0, "record,name,logP,logP label,\"with,comma\","},
        // an output that cannot be written is seen first, of what can be wrong
        {"./moleblend predict build/test_train.bin --model build/pr.nan.safetensors", 1,
         "is not finite"},
        {"./moleblend predict build/test_train.bin --model build/pr.nan.safetensors -o "
         "build/no/folder.csv", 1, "build/no/folder.csv.tmp: cannot write"},
        {"ls build/*.csv.tmp", 2, "build/*.csv.tmp"},
        {"./moleblend predict build/test_train.bin --model build/pr.seed1.safetensors --near "
         "build/pr.none.bin", 1, "build/pr.none.bin: cannot read"},
        {"./moleblend predict build/test_train.bin --model build/pr.seed1.safetensors --near "
         "build/pr.bin -o build/pr.bin", 1, "build/pr.bin: "},
        {"./moleblend predict "
         "build/test_train.bin --model build/pr.seed1.safetensors --near build/test_train.bin | "
         "head -n 2", 0, ",nearest,distance,skipped\n1,mol ,"},
        // rows of skipped records; a dataset without labels beside one with two
        {"printf 'CCO a\\nC( b\\n' | ./data_prep --format smi -o - - 2> /dev/null | ./moleblend "
         "predict - --near build/test_train.bin --model build/pr.seed1.safetensors 2> /dev/null | "
         "tail -n 1 | tr -d a-z", 0, "2,,,,,,,,,,\""},
        // another dataset gets the name of the one that is being read
        {"./moleblend predict "
         "build/pr.many.bin --model build/pr.seed1.safetensors build/pr.seed2.safetensors "
         "-o build/pr.right.csv && mv build/pr.many.bin build/pr.now.bin && "
         "{ ./moleblend predict build/pr.now.bin --model build/pr.seed1.safetensors "
         "build/pr.seed2.safetensors -o build/pr.got.csv & "
         "k=0; while [ $k -lt 30 ] && ! [ -e build/pr.got.csv.tmp ]; do k=$((k + 1)); sleep 0.01; "
         "done; cp build/test_train.bin build/pr.new.bin; mv build/pr.new.bin build/pr.now.bin; "
         "wait $!; } && cmp build/pr.right.csv build/pr.got.csv", 0, ""},
    };
    const char *meta = "\"task\":\"regression\",\"task_names\":\"logP\\nwith,comma\","
                       "\"label_mean\":\"0 0\",\"label_std\":\"1 2\"";
    Model model;
    model_create(&model, (Config){2, 24, 20, 3, 12, 2}, 1);
    model_init(&model, 9);
    float *const arenas[ARENAS] = {model.params};
    for (size_t k = 0; k < sizeof table / sizeof table[0]; k++) {
        test_command(table[k].command, table[k].code, table[k].expected);
        if (k > 0) continue;  // it has removed those of an earlier run
        write_test_dataset("build/pr.moved.bin", 40, 1);
        model_write("build/pr.old.safetensors", &model, arenas, NULL, 0, meta);
        model.p.layer[1].ffn1_w[3] = NAN;
        model_write("build/pr.nan.safetensors", &model, arenas, NULL, 0, meta);
    }
    model_free(&model);
    test_residuals();
    test_near();
}
