// tests/runs.h - seeds as runs of their own, resumed runs and their data, what two runs may share

#define TUNE "./moleblend finetune build/test_r.bin --valid build/test_r.bin --layers 1 --dim 8 " \
             "--ffn 8 --heads 1 --kernels 2 "

// Labels whose gradients are numbers though their squares are none: a run that ends at its first
// step, or learns nothing.
static void test_large_labels(void) {
    const char *rows = "smiles,a\nC,6e11\nCC,-6e11\nCCC,3e11\nCCCC,-2e11\n";
    write_bytes("build/test_r.csv", rows, strlen(rows));
    test_command("./data_prep --labels a -o build/test_r.bin build/test_r.csv", 0, "4 molecules");
    test_command(TUNE "--epochs 2 --loss-units labels -o build/test_r.safetensors", 0,
                 "best epoch 2");
    test_command(TUNE "--epochs 2 --loss-units labels --clip 0 -o build/test_r.safetensors", 1,
                 "overflow; give --clip");
}
