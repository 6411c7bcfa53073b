// tests/outputs.h - outputs: nothing of the user's is overwritten, nothing is lost without a word

#if MB_POSIX
#define O_IN "build/o/in.csv"

// What test_outputs() makes first: a table, datasets of it, a pretrained and a fine-tuned model.
static const char *const OUTPUTS_INPUTS =
    "rm -rf build/o; mkdir build/o; cd build/o && printf 'smiles,y\\nCCO,1\\nCCN,0\\nCCC,1\\nC=O,"
    "0\\n' > in.csv && cd ../.. && ./data_prep -o build/o/c.bin --labels y " O_IN " && "
    "cp build/o/c.bin build/o/v.bin && ./moleblend build/o/c.bin" TINY "--steps 1 -o "
    "build/o/p.safetensors "
    "&& ./moleblend finetune build/o/c.bin --valid build/o/v.bin" TINY "--epochs 1 -o "
    "build/o/m.safetensors && (cd build/o && cksum in.csv *.bin *.safetensors > ../o.sums)";

// An output that is an input, another output, or a file of somebody else: refused, by whatever name
// it goes, and everything is as it was. dev/sweep.sh tries all inputs with all outputs.
static void test_outputs_inputs(void) {
    static const char *const refused[][2] = {
        {"./data_prep -o " O_IN " " O_IN, "in.csv: is the same file as the input build/o/in.csv; "
         "give the output another name"},
        {"./data_prep -o build/o/x.bin --rejects " O_IN " " O_IN, "is the same file as the input"},
        {"./data_prep -o build/o/x.bin --rejects build/o/x.bin " O_IN, "same file as the output"},
        {"./data_prep -o build/o/x.bin --rejects build/o/../o/x.bin " O_IN, "as the output build"},
        {"./data_prep -o - --rejects - " O_IN, "-: is the same file as the output -"},
        {"./data_prep -o build/o/x.bin --skip-list build/o/x.bin " O_IN, "x.bin: cannot read"},
        {"cp " O_IN " build/o/x.bin.tmp; ./data_prep --format csv -o build/o/x.bin "
         "build/o/x.bin.tmp", "x.bin.tmp: is the same file as the input"},
        {"ln -s in.csv build/o/link; ./data_prep -o build/o/link " O_IN, "same file as the input"},
        {"ln " O_IN " build/o/hard; ./data_prep -o build/o/hard " O_IN, "same file as the input"},
        {"./data_prep -o 'build/o/{}.bin' --split 0.5,0.5 --rejects build/o/valid.bin " O_IN,
         "same file as the output build/o/valid.bin"},
        {"./moleblend build/o/c.bin" TINY "-o build/o/c.bin", "same file as the input"},
        {"./moleblend build/o/c.bin --valid build/o/v.bin" TINY "-o build/o/v.bin", "as the input"},
        {"./moleblend build/o/c.bin --init build/o/p.safetensors -o build/o/./p.safetensors",
         "same file as the input build/o/p.safetensors"},
        {"./moleblend predict build/o/c.bin --model build/o/m.safetensors -o build/o/c.bin",
         "same file as the input"},
        {"./moleblend predict build/o/c.bin --model build/o/m.safetensors build/o/m.safetensors -o "
         "build/o/m.safetensors", "same file as the input"},
        {"./moleblend embed build/o/c.bin --model build/o/m.safetensors -o build/o/m.safetensors",
         "same file as the input"},
        {"./moleblend show build/o/c.bin 0 --svg build/o/c.bin", "same file as the input"},
        {"./moleblend show build/o/c.bin 0 --svg -", "same file as the output -"},
        // what exists and is not ours: a source table beside the embeddings, by its name
        {"./moleblend embed build/o/c.bin --model build/o/m.safetensors -o build/o/in.npy",
         "build/o/in.csv: exists, and does not begin as the output that would replace it"},
        {"./data_prep -o build/o/m.safetensors " O_IN, "m.safetensors: exists, and does not"},
        {"./moleblend predict build/o/c.bin --model build/o/m.safetensors -o " O_IN, "exists, and"},
        {"cp " O_IN " build/o/y.log.csv; ./moleblend build/o/c.bin" TINY "-o "
         "build/o/y.safetensors", "y.log.csv: exists, and"},
        {"cp " O_IN " build/o/z.bin.tmp; ./data_prep -o build/o/z.bin " O_IN, "z.bin.tmp: exists"},
        // temporary names that lead elsewhere
        {"ln -s c.bin build/o/w.bin.tmp; ./data_prep -o build/o/w.bin " O_IN, "is a symbolic link"},
        {"ln build/o/c.bin build/o/h.bin.tmp; ./data_prep -o build/o/h.bin " O_IN, "with one name"},
        {"mkfifo build/o/f.bin.tmp; timeout 9 ./data_prep -o build/o/f.bin " O_IN, "cannot write"},
        {"ln -s round build/o/round; ./data_prep -o build/o/round " O_IN, "too many symbolic"},
        // an output without a name, or of a kind that standard output cannot be
        {"./data_prep -o '' " O_IN, "-o: expected a file, found \"\""},
        {"./moleblend build/o/c.bin -o ''", "-o: expected a file, found \"\""},
        {"./moleblend finetune build/o/c.bin -o ''", "-o: expected a file, found \"\""},
        {"./moleblend build/o/c.bin -o -", "-o: expected a file"}};
    for (size_t k = 0; k < sizeof refused / sizeof *refused; k++) {
        test_command(refused[k][0], 1, refused[k][1]);
        test_command("cd build/o && cksum -- in.csv *.bin *.safetensors > ../o.now; "
                     " cmp ../o.sums ../o.now && rm -f *.tmp", 0, "");
    }
}

// What this program wrote under a name is replaced, and a symbolic link stays one.
static void test_outputs_replaced(void) {
    static const char *const again[] = {
        "./moleblend embed build/o/c.bin --level atom --model build/o/m.safetensors -o "
        "build/o/e.npy",
        "./moleblend predict build/o/c.bin --model build/o/m.safetensors -o build/o/p.csv",
        "./moleblend show build/o/c.bin 0 --svg build/o/s.svg",
        "./data_prep -o 'build/o/s.{}.bin' --split 0.5,0.5 --split-by order --rejects "
        "build/o/r.csv " O_IN,
        "./moleblend build/o/c.bin" TINY "--steps 1 -o build/o/t.safetensors",
        "./moleblend finetune build/o/c.bin --valid build/o/v.bin" TINY "--epochs 1 --seeds 2 -o "
        "build/o/t.safetensors"};
    for (size_t k = 0; k < sizeof again / sizeof *again; k++) {
        test_command(again[k], 0, "");
        test_command(again[k], 0, "");
    }
    test_command("mkdir build/o/far; ln -s far/d.bin build/o/link.bin; : > build/o/empty.bin; "
                 "./data_prep -o build/o/link.bin " O_IN " && ./data_prep -o build/o/link.bin " O_IN
                 " && ./data_prep -o build/o/empty.bin " O_IN " && cmp build/o/empty.bin "
                 "build/o/far/d.bin && test -L build/o/link.bin && ls build/o/far", 0, "d.bin\n");
    // killed before it is finished: an unfinished dataset is ours, and no dataset
    test_command("(while cat data/sample.sdf; do :; done) | timeout -s KILL 1 ./data_prep --format "
                 "sdf -o build/o/k.bin -; ls build/o/k.bin*; head -c 8 build/o/k.bin.tmp", 0,
                 "build/o/k.bin.tmp\nMOLBLEND");
    test_command("./data_prep -o build/o/k.bin " O_IN " && ! ls build/o/k.bin.tmp", 0, "4 mol");
}

// Parts that come of different splits, as after a kill between two renames: training says so.
static void test_split_identity(void) {
    static const char *const trains[] = {
        "./moleblend build/o/s.train.bin" TINY "--steps 1 --batch-size 1 -o build/o/t.safetensors",
        "./moleblend finetune build/o/s.train.bin" TINY "--epochs 1 --task regression --batch-size "
        "1 -o build/o/t.safetensors"};
    const char *parts = "./data_prep -o 'build/o/s.{}.bin' --split %s --split-by order --labels y "
                        O_IN " && ./moleblend info build/o/s.valid.bin";
    for (int k = 0; k < 2; k++) {
        char *silent = xprintf("%s 2>&1 | grep -c 'another split'; true", trains[k]);
        test_format(0, "split      ", parts, "0.5,0.5");
        test_command(silent, 0, "0\n");
        test_command("mv build/o/s.valid.bin build/o/old", 0, "");
        test_format(0, "split      ", parts, "0.75,0.25");
        test_command("mv build/o/old build/o/s.valid.bin", 0, "");
        test_command(trains[k], 0, "note    build/o/s.valid.bin: comes of another split than "
                     "build/o/s.train.bin");
        test_command("cp build/o/c.bin build/o/s.valid.bin", 0, "");  // of no split
        test_command(silent, 0, "0\n");
        free(silent);
    }
    Dataset d;
    dataset_open(&d, "build/o/c.bin");
    test_check(d.split == 0 && get_u32(d.data + 52) == 0, "a dataset that is no part");
    dataset_close(&d);
}

// A result on standard output that does not get through: a full disk, or nothing there.
static void test_stdout(void) {
    static const char *const commands[] = {
        ("./data_prep -o - " O_IN), "./data_prep --version", "./data_prep --dump build/o/c.bin",
        "./moleblend --version", "./moleblend embed --help",
        "./moleblend predict build/o/c.bin --model build/o/m.safetensors -o -",
        "./moleblend embed build/o/c.bin --model build/o/m.safetensors -o -",
        "./moleblend show build/o/c.bin 0 --svg build/o/s.svg", "./moleblend info build/o/c.bin"};
    for (size_t k = 0; k < sizeof commands / sizeof *commands; k++) {
        test_format(1, "standard output: write failed", "%s > /dev/full", commands[k]);
        test_format(1, "standard output: write failed", "%s >&-", commands[k]);
    }
}

// Memory that is in use counted as free.
static void test_memory_used(void) {
    test_command("rm -rf build/m1 build/m2; for v in build/m1/sys/fs/cgroup/memory/j "
                 "build/m2/sys/fs/cgroup/j; do mkdir -p $v; done; mkdir -p build/m1/proc/self "
                 "build/m2/proc/self; echo '4:memory:/j' > build/m1/proc/self/cgroup; "
                 "echo '0::/j' > build/m2/proc/self/cgroup; cd build/m2/sys/fs/cgroup/j; "
                 "echo 2000000 > memory.max; echo 1500000 > memory.current; "
                 "printf 'anon 9\\ninactive_file 300000\\nactive_file 100000\\n' > memory.stat; "
                 "cd ../../../../../m1/sys/fs/cgroup/memory/j; "
                 "echo 2000000 > memory.limit_in_bytes; echo 2500000 > memory.usage_in_bytes; "
                 "printf 'inactive_file 1\\ntotal_inactive_file 600000\\n' > memory.stat", 0, "");
    test_check(memory_limit("build/m2") == 900000, "left of a group: %g", memory_limit("build/m2"));
    test_check(memory_limit("build/m1") == 100000, "of version 1: %g", memory_limit("build/m1"));
    test_command("rm build/m1/sys/fs/cgroup/memory/j/memory.stat", 0, "");
    test_check(memory_limit("build/m1") == 1, "nothing left: %g", memory_limit("build/m1"));
#if !defined(__SANITIZE_ADDRESS__)
    // under every limit a run comes to its end, or the check says what it needs
    for (int kib = 100000; kib < 280000; kib += 35000) {
        char *line = xprintf("ulimit -v %d; ./moleblend train.bin --size small --batch-size 64 "
                             "--steps 1 --threads 2 -o build/o/t.safetensors", kib);
        int code = run_command(line);
        char *text = file_text("build/test.out", NULL);
        test_check(code == 0 || strstr(text, "are free; try"), "%s:\n%s", line, text);
        FREE_ALL(line, text);
    }
#endif
}
#endif

static void test_outputs(void) {
#if MB_POSIX
    test_command(OUTPUTS_INPUTS, 0, "wrote build/o/m.safetensors");
    test_outputs_inputs();
    test_outputs_replaced();
    test_split_identity();
    test_stdout();
    test_memory_used();
#endif
}
