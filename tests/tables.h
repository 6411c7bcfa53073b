// tests/tables.h - tables and labels as people have them: read whole, or what is left out is named

// Writes a file ($'...' of printf: \n, \t, \r), runs a command, and looks for text in its output.
static void test_table(const char *path, const char *content, const char *command, int code,
                       const char *expected) {
    write_bytes(path, content, strlen(content));
    test_command(command, code, expected);
}

// Catches a dataset and a model that do not know how molecules were prepared.
static void test_preparation(void) {
    test_table("build/t.csv", "smiles,y\nCCO.Cl,1\nCCN,0\nCCC,1\nCCCl,0\n",
               "./data_prep -o build/t.bin --labels y build/t.csv && ./data_prep -o build/l.bin "
               "--labels y --largest-fragment build/t.csv && ./moleblend finetune build/l.bin "
               "--valid build/l.bin --size tiny --epochs 1 -o build/l.safetensors", 0, "ROC-AUC");
    test_command("./moleblend predict build/t.bin --model build/l.safetensors", 0,
                 "made without --largest-fragment, what the model learnt from with it");
    test_command("./moleblend embed build/t.bin --model build/l.safetensors -o build/tv.npy", 0,
                 "made without --largest-fragment, what the model learnt from with it");
    test_command("./moleblend predict build/l.bin --model build/l.safetensors 2> build/t.err; "
                 "grep -c largest build/t.err; echo", 0, "0\n");
}

static void test_tables(void) {
    test_preparation();
}
