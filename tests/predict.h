// tests/predict.h - predictions: intervals, ensembles, nearest training molecules, replaced files

// Residuals that are not those of the checkpoint's own parameters, or of another seed.
static void test_residuals(void) {
    if (!MB_POSIX) return;
    test_command("rm -f build/pr.*; ./moleblend finetune build/test_train.bin --valid "
                 "build/test_train.bin --size tiny --epochs 3 --seeds 2 -o build/pr.safetensors",
                 0, "over 2 seeds");
    for (int seed = 1; seed <= 2; seed++) {
        TensorFile f;
        size_t n, lines = 0, wrong = 0, numbers = 0;
        char *path = xprintf("build/pr.seed%d.safetensors", seed);
        char *command = xprintf("./moleblend predict build/test_train.bin --model %s "
                                "2> build/pr.log", path);
        tensor_file_open(&f, path);
        const char *meta = tensor_meta(&f, "valid_residuals"), *at = meta ? meta : "";
        run_command(command);
        char *csv = file_text("build/test.out", &n), *row = strchr(csv, '\n');
        double predicted, label;
        for (; row && row[1]; row = strchr(row + 1, '\n'), lines++) {
            if (sscanf(row + 1, "%*[^,],%*[^,],%lf,%lf", &predicted, &label) < 2) continue;
            numbers++;
            wrong += fabs(strtod(at, (char **)&at) - (predicted - label)) > 1e-4;
        }
        test_check(lines == 40 && numbers == 40 && wrong == 0 && *at == '\n',
                   "residuals of seed %d: %zu of %zu wrong", seed, wrong, numbers);
        tensor_file_close(&f);
        FREE_ALL(csv, path, command);
    }
}
