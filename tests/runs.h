// tests/runs.h - seeds as runs of their own, resumed runs and their data, what two runs may share

#define TUNE_R "./moleblend finetune build/test_r.bin --valid build/test_r.bin " TINY

// Labels whose gradients are numbers though their squares are none: a run that ends at its first
// step, or learns nothing.
static void test_large_labels(void) {
    test_table("build/test_r.csv", "smiles,a\nC,6e11\nCC,-6e11\nCCC,3e11\nCCCC,-2e11\n",
               "./data_prep --labels a -o build/test_r.bin build/test_r.csv", 0, "4 molecules");
    test_command(TUNE_R "--epochs 2 --loss-units labels -o build/test_r.safetensors", 0,
                 "best epoch 2");
    test_command(TUNE_R "--epochs 2 --loss-units labels --clip 0 -o build/test_r.safetensors", 1,
                 "overflow; give --clip");
}

// Some molecules with two tasks, as build/test_r.bin; of classes.
static void write_runs_data(void) {
    test_table("build/test_r.csv", "smiles,a,b\nC,0,1\nCC,1,0\nCCC,0,0\nCCCC,1,1\nCO,1,0\nCN,0,1\n"
               "CCO,1,1\nCCN,0,0\nc1ccccc1,1,0\n",
               "./data_prep --labels a,b -o build/test_r.bin build/test_r.csv", 0, "9 molecules");
}

// Seeds that a resumed run forgets, reports wrongly or does not extend; states of an older run.
static void test_seeds(void) {
    static const CommandRow rows[] = {
        // what is printed of each seed, task by task, and of all: again when all are finished
        {"rm -f build/test_r*.s*; " TUNE_R "--epochs 2 --seeds 3 -o build/test_r1.safetensors > "
         "build/test_r1.out 2>&1 && grep 'over 3 seeds' build/test_r1.out", 0, "over 3 seeds"},
        {"./moleblend finetune build/test_r.bin --resume -o build/test_r1.safetensors > "
         "build/test_r2.out 2>&1; for k in 1 2; do grep -e '^[ab] ' -e ^Brier -e '^seed ' -e ' ov"
         "er ' build/test_r$k.out > build/test_r$k.txt; done; diff -s build/test_r1.txt "
         "build/test_r2.txt && wc -l < build/test_r1.txt", 0, "are identical\n14\n"},
        // more epochs are for all seeds, in the same places as in a run that was stopped
        {"./moleblend finetune build/test_r.bin --resume --epochs 5 --seeds 4 -o "
         "build/test_r1.safetensors && cut -d, -f1,2 build/test_r1.log.csv | tr '\n' ' '", 0,
         "seed,epoch 1,1 1,2 1,3 1,4 1,5 2,1 2,2 2,3 2,4 2,5 3,1 3,2 3,3 3,4 3,5 4,1 4,2 4,3 4,4 "
         "4,5"},
        {"./moleblend finetune build/test_r.bin --resume -o build/test_r1.safetensors", 0,
         "over 4 seeds"},
        {"./moleblend finetune build/test_r.bin --resume --seeds 3 -o build/test_r1.safetensors", 1,
         "--seeds: the run began with \"4\", now it is \"3\""},
        // from one seed to two: the first is kept; -o has the better one
        {TUNE_R "--epochs 2 -o build/test_r2.safetensors && cp build/test_r2.safetensors "
         "build/test_r2.one && ./moleblend finetune build/test_r.bin --resume --seeds 2 -o "
         "build/test_r2.safetensors", 0, "over 2 seeds"},
        {TUNE_R "--epochs 2 --seeds 2 -o build/test_r3.safetensors; for k in '' .seed1 .seed2; do "
         "cmp build/test_r2$k.safetensors build/test_r3$k.safetensors || exit 2; done", 0, ""},
        // an older run's output, and a new run that is killed before it saves: the new one goes on,
        // with both of its seeds, and the older checkpoint stands as long as there is no other
        {TUNE_R "--epochs 300 --patience 0 --lr 0.01 --seeds 2 -o build/test_r4.safetensors", 0,
         "over 2 seeds"},
        {"cp build/test_r3.safetensors build/test_r3.old; (" TUNE_R "--epochs 300 --patience 0 "
         "--lr 0.01 --seeds 2 --save-every 999999 -o build/test_r3.safetensors & p=$!; i=0; while "
         "! grep -q '^1,9' build/test_r3.log.csv && [ $i -lt 3000 ]; do sleep 0.01; i=$((i+1)); "
         "done; kill -9 $p; wait $p); cmp build/test_r3.safetensors build/test_r3.old && "
         "./moleblend finetune build/test_r.bin --resume -o build/test_r3.safetensors", 0,
         "resumed after step 0 of seed 1"},
        {"for k in '' .seed1 .seed2; do cmp build/test_r3$k.safetensors "
         "build/test_r4$k.safetensors || exit 2; done; cmp build/test_r3.log.csv "
         "build/test_r4.log.csv", 0, ""},
    };
    write_runs_data();
    if (MB_POSIX) test_rows(rows, sizeof rows / sizeof *rows);
}

// Another dataset taken for that of the run; the same one refused because its path is another.
static void test_resumed_data(void) {
    static const CommandRow rows[] = {
        {"rm -rf build/test_r*.s* build/test_r[mn]; mkdir build/test_rm; head -n 5 "
         "build/test_r.csv "
         "| ./data_prep --format csv --labels a,b -o build/test_rv.bin - && cp build/test_r.bin "
         "build/test_rm/train.bin && cp build/test_rv.bin build/test_rm/valid.bin", 0, ""},
        {"./moleblend build/test_rm/train.bin " TINY "--steps 2 -o build/test_rp.safetensors && "
         "./moleblend finetune build/test_rm/train.bin --test build/test_rv.bin --epochs 1 --init "
         "build/test_rp.safetensors -o build/test_r1.safetensors", 0, "test  ROC-AUC"},
        // the same bytes
        {"./moleblend finetune build/../build/test_rm/train.bin --valid ./build/test_rm/valid.bin "
         "--test ./build/test_rv.bin --resume -o build/test_r1.safetensors", 0, "wrote"},
        {"./moleblend build/test_rm/train.bin --valid build/test_rv.bin --resume -o "
         "build/test_rp.safetensors", 0, "wrote"},
        // moved, with the validation set found beside the training set
        {"mv build/test_rm build/test_rn; ./moleblend finetune build/test_rn/train.bin --resume -o "
         "build/test_r1.safetensors", 0, "wrote"},
        {"./moleblend build/test_rn/train.bin --resume -o build/test_rp.safetensors", 0, "wrote"},
        // others
        {"./moleblend finetune build/test_rn/train.bin --test build/test_r.bin --resume -o "
         "build/test_r1.safetensors", 1, "expected the test set that the run began with, found "
         "build/test_r.bin"},
        {"./moleblend finetune build/test_rn/train.bin --valid build/test_r.bin --resume -o "
         "build/test_r1.safetensors", 1, "expected the validation set that the run began with"},
        {"./moleblend build/test_rn/train.bin --valid build/test_r.bin --resume -o "
         "build/test_rp.safetensors", 1, "expected the validation set that the run began with"},
        {"./moleblend build/test_rv.bin --valid build/test_rv.bin --resume -o "
         "build/test_rp.safetensors", 1, "expected the training set that the run began with"},
        // --init is for seeds that begin; what it was is known
        {"cp build/test_rp.safetensors build/test_rq.safetensors; ./moleblend finetune "
         "build/test_rn/train.bin --init build/test_rq.safetensors --resume -o "
         "build/test_r1.safetensors", 0, "wrote"},
        {"rm build/test_rq.safetensors; ./moleblend finetune build/test_rn/train.bin --resume -o "
         "build/test_r1.safetensors", 0, "wrote"},
        {"./moleblend finetune build/test_rn/train.bin --resume --seeds 2 -o "
         "build/test_r1.safetensors", 1, "build/test_rq.safetensors: cannot read"},
        {"cp build/test_r1.safetensors build/test_rq.safetensors; ./moleblend finetune "
         "build/test_rn/train.bin --resume --seeds 2 -o build/test_r1.safetensors", 1,
         "expected the checkpoint (--init) that the run began with"},
        {"cp build/test_rp.safetensors build/test_rq.safetensors; ./moleblend finetune "
         "build/test_rn/train.bin --resume --seeds 2 -o build/test_r1.safetensors", 0,
         "over 2 seeds"},
        // the fingerprint left out every second record of more than 4,096
        {"for k in 1 2; do awk -v k=$k 'BEGIN { print \"smiles,y\"; for (i = 0; i < 4200; i++) "
         "print \"C,\" i % 9 - (k == 2 && i == 4001) }' > build/test_rd.csv; ./data_prep --labels "
         "y -o build/test_rd$k.bin build/test_rd.csv; done", 0, "4200 molecules"},
        {"./moleblend finetune build/test_rd1.bin --valid build/test_rd1.bin " TINY "--epochs 1 -o "
         "build/test_rd.safetensors && ./moleblend finetune build/test_rd2.bin --epochs 2 "
         "--resume -o build/test_rd.safetensors", 1,
         "expected the training set that the run began with, found build/test_rd2.bin"},
        // another folder's sets of the same names; the run of another command; without its state
        {"rm -rf build/test_rf; mkdir -p build/test_rf/a build/test_rf/b; cd build/test_rf/a; cp "
         "../../test_r.bin train.bin; cp ../../test_rv.bin valid.bin; cp ../../test_r.bin "
         "../b/valid.bin; ../../../moleblend train.bin " TINY "--steps 2 -o m.safetensors && cd "
         "../b && ../../../moleblend ../a/train.bin --resume -o ../a/m.safetensors", 0, "wrote"},
        {"./moleblend finetune build/test_rf/a/train.bin --resume -o "
         "build/test_rf/a/m.safetensors", 1,
         "m.safetensors.state: is the state of pretraining; give the command that began it"},
        {"rm build/test_rf/a/m.safetensors.state; ./moleblend build/test_rf/a/train.bin --resume "
         "-o build/test_rf/a/m.safetensors", 1, "m.safetensors: is there, but not its state"},
        {"./moleblend build/test_r.bin " TINY "--steps 1 --steps 2 -o build/test_rg.safetensors",
         0, "note    --steps is given twice: the last counts"},
        // a path that a line of the state cannot hold
        {"cp build/test_rv.bin 'build/test_r\nv.bin'; ./moleblend build/test_rn/train.bin --valid "
         "'build/test_r\nv.bin' " TINY "--steps 1 -o build/test_ry.safetensors", 1,
         "--valid: expected no line break in"},
    };
    write_runs_data();
    if (MB_POSIX) test_rows(rows, sizeof rows / sizeof *rows);
}

// Runs that write one file, whatever its name is derived from; a run that a second start disturbs.
static void test_two_runs(void) {
#define LONG "timeout -s KILL 2 ./moleblend finetune build/test_r.bin --valid build/test_r.bin " \
             TINY "--epochs 900000 --patience 0 --save-every 1 "
#define SHORT "> build/test_r.out 2>&1 & sleep 0.5; " TUNE_R "--epochs 1 "
    static const CommandRow rows[] = {
        {LONG "-o build/test_ra " SHORT "-o build/test_ra.safetensors", 1, "is writing it"},
        {LONG "-o build/test_re.safetensors " SHORT "-o build/../build/test_re.log.csv", 1,
         "is writing it"},
        {LONG "-o build/test_rb.seed2.safetensors " SHORT "--seeds 2 -o build/test_rb.safetensors",
         1, "is writing it"},
        {LONG "--seeds 2 -o build/test_rx.safetensors " SHORT "-o build/test_rx.seed1.safetensors",
         1, "is writing it"},
        {LONG "-o build/test_rd.seed2.safetensors " SHORT "-o build/test_rd.seed1.safetensors", 0,
         "wrote build/test_rd.seed1.safetensors"},
    };
    write_runs_data();
    if (MB_POSIX) test_rows(rows, sizeof rows / sizeof *rows);
#if MB_POSIX
    // the lock comes first: what the first run is writing at the moment is not touched
    OutFile lock[2];
    out_open(&lock[0], "build/test_rz.run", NULL);
    out_open(&lock[1], "build/test_rz.safetensors.run", NULL);
    write_bytes("build/test_rz.safetensors.tmp", "half", 4);
    test_command(TUNE_R "--epochs 1 -o build/test_rz.safetensors", 1, "is writing it");
    char *text = file_text("build/test_rz.safetensors.tmp", NULL);
    test_check(strcmp(text, "half") == 0, "a second start has written \"%s\"", text);
    free(text);
    for (int k = 0; k < 2; k++) out_discard(&lock[k]);
    remove("build/test_rz.safetensors.tmp");
#endif
}
