// tests/programs.h - the programs as a user meets them: messages, exit codes, resuming, damage, and
// the machine

#define TINY " --layers 1 --dim 8 --ffn 8 --heads 1 --kernels 2 "

// Runs a command with its output in build/test.out; returns the exit code.
static int run_command(const char *command) {
    char *line = xprintf("%s%s%s > build/test.out 2>&1", MB_POSIX ? "(" : "", command,
                         MB_POSIX ? "\n)" : "");
    fflush(stdout);
#ifdef __wasi__  // a program cannot start another
    int status = -1;
#else
    int status = system(line);
#endif
    free(line);
#if MB_POSIX
    return status == -1 || status & 0x7f ? 1000 + status : status >> 8;
#else
    return status;
#endif
}

static void write_bytes(const char *path, const void *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0, "%s: cannot write", path);
}

// The first bytes of a file, as text, in fresh memory; empty if it cannot be read. size: how many,
// NULL: not asked.
static char *file_text(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    char *text = xmalloc(1 << 22, 1);
    size_t n = f ? fread(text, 1, (1 << 22) - 1, f) : 0;
    if (size) *size = n;
    if (f) fclose(f);
    return text;
}

static int same_files(const char *a, const char *b) {
    size_t n, m;
    char *x = file_text(a, &n), *y = file_text(b, &m);
    int same = n > 0 && n == m && memcmp(x, y, n) == 0;
    FREE_ALL(x, y);
    return same;
}

// The command must end with this code, and its output contain this text. Not run where there is no
// Unix shell and it needs one.
static void test_command(const char *command, int code, const char *expected) {
    if (!MB_POSIX && (strpbrk(command, "|&;'") || strncmp(command, "./", 2) != 0)) return;
    int got = run_command(command);
    char *text = file_text("build/test.out", NULL), *to = text;
    for (const char *c = text; !MB_POSIX && (*to = *c); c++) to += *c != '\r';
    test_check(got == code && strstr(text, expected),
               "%s\n  exit code %d (expected %d), expected \"%s\" in:\n%s", command, got, code,
               expected, text);
    free(text);
}

// The same of a printf text, which comes last.
MB_PRINTF(3, 4) static void test_format(int code, const char *expected, const char *fmt, ...) {
    Text command = {0};
    va_list args;
    va_start(args, fmt);
    text_add_list(&command, fmt, args);
    va_end(args);
    test_command(command.text, code, expected);
    free(command.text);
}

// Writes a file, then test_command().
static void test_table(const char *path, const char *content, const char *command, int code,
                       const char *expected) {
    write_bytes(path, content, strlen(content));
    test_command(command, code, expected);
}

typedef struct { const char *command; int code; const char *expected; } CommandRow;

// The same of a table.
static void test_rows(const CommandRow *rows, size_t n) {
    for (size_t k = 0; k < n; k++) test_command(rows[k].command, rows[k].code, rows[k].expected);
}

// A wrong command line that goes unnoticed, dies without a reason, or writes something.
static void test_messages(void) {
    static const CommandRow table[] = {
        {"./moleblend --help", 0, "--batch-size N"},
        {"./moleblend", 1, "moleblend: expected ./moleblend train.bin"},
        {"./moleblend --stps 3 x.bin", 1, "unknown option --stps; did you mean --steps?"},
        {"./moleblend build/test_train.bin --steps x", 1,
         "--steps: expected a whole number from 1"},
        {"./moleblend build/test_train.bin --steps", 1, "--steps: expected a value (N) after it"},
        {"./moleblend build/test_train.bin --steps 0", 1, "expected a whole number from 1 to"},
        {"./moleblend build/test_train.bin --steps 99999999999999999999", 1, "from 1 to"},
        {"./moleblend build/test_train.bin --lr 1x", 1, "expected a number from 0 to 10"},
        {"./moleblend build/test_train.bin --lr -1", 1, "expected a number from 0 to 10"},
        {"./moleblend --zzzzzzzzzzzzzzzzz 1", 1, "unknown option --zzzzzzzzzzzzzzzzz; see --help"},
        {"./moleblend finetune --help", 0, "--epochs N"},
        {"./moleblend build/test_train.bin --lr nan", 1,
         "--lr: expected a number from 0 to 10, found \"nan\""},
        {"./moleblend build/test_train.bin --size huge", 1, "--size: expected tiny, small or base"},
        {"./moleblend build/test_train.bin --heads 7", 1,
         "--heads: expected a divisor of the dimension 256"},
        {"./moleblend no_such.bin", 1, "moleblend: no_such.bin: cannot read:"},
        {"./moleblend Makefile", 1, "Makefile: not a dataset file"},
        {"./moleblend build", 1, "build: cannot read"},
        {"./moleblend build/test_train.bin extra", 1, "expected ./moleblend train.bin"},
        {"rm -f build/test_fresh.*; ./moleblend build/test_train.bin --resume --size tiny --steps "
         "1 -o build/test_fresh.safetensors", 0, "nothing is saved in build/test_fresh"},
        {"./moleblend build/test_train.bin --batch-size 41", 1,
         "--batch-size: 41 is more than the 40 molecules"},
        {"./moleblend build/test_train.bin --init build/test_model.safetensors --dim 32", 1,
         "build/test_model.safetensors: has --layers 2 --dim 24"},
        {"./moleblend build/test_train.bin --init build/test_model.safetensors --steps 1 -o "
         "build/test_fresh.safetensors", 0, "model   2 layers, 24 wide"},
        // an output that cannot be written is found before the inputs that are not there, so before
        // the first step
        {"./moleblend build/test_train.bin --init none -o no_dir/x.safetensors", 1,
         "no_dir/x.run.tmp: cannot write"},
        {"./moleblend build/test_train.bin --init none -o build", 1,
         "build: cannot write: expected a regular file"},
        {"./moleblend finetune build/test_train.bin --valid none -o no_dir/x.safetensors", 1,
         "no_dir/x.run.tmp: cannot write"},
        {"./moleblend info build/test_train.bin", 0, "dataset, 40 molecules"},
        {"./moleblend info data/mini.safetensors", 0, "tensor file"},
        {"./moleblend info README.md", 1, "README.md: not a .safetensors file"},
        // a length read from fewer than eight bytes once reached beyond the file
        {"printf 1234567 > build/x; ./moleblend info build/x", 1, "build/x: not a .safetensors"},
        {"./moleblend show build/test_train.bin 2", 0, "one blend"},
        {"./moleblend show build/test_train.bin 40", 1,
         "expected the index of one of its 40 molecules"},
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --task "
         "classification --size tiny",
         1, "expected labels 0 and 1 for --task classification"},
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --epochs 2 --size "
         "tiny "
         "--modality both --readout mean -o build/test_ft.safetensors",
         0, "by chance (the training mean for all): valid  R2"},
        // 3D asked of molecules without positions, classes, and a checkpoint's own settings
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --epochs 1 --size "
         "tiny --modality 3d -o build/test_ft2.safetensors", 1,
         "--modality 3d: 6 of 40 molecules have no positions"},
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --epochs 1 --size "
         "tiny --modality both -o build/test_ft2.safetensors", 0,
         "6 of 40 molecules have no positions and take part with 2D only"},
        {"./moleblend embed build/test_train.bin --model build/test_ft.safetensors -o "
         "build/test.npy", 0, "6 of 40 molecules have no positions"},
        {"printf 'smiles,a,b\\nC,0,1\\nCC,1,1\\nCCC,0,1\\n' | ./data_prep --format csv --labels "
         "a,b -o build/test_class.bin - && ./moleblend finetune build/test_class.bin --valid "
         "build/test_class.bin --size tiny", 1, "task b: all labels are 1; expected both classes"},
        {"printf 'smiles,a\\nC,0\\nCC,1\\nCCC,0\\n' | ./data_prep --format csv --labels a -o "
         "build/test_class.bin - && ./moleblend finetune build/test_class.bin --valid "
         "build/test_class.bin --size tiny --epochs 1 -o build/test_ft2.safetensors", 0,
         "classification: the labels are all 0 and"},
        {"./moleblend predict build/test_train.bin --model build/test_ft.safetensors --interval 0",
         0, "record,name,logP,logP label,\"with,comma\",\"with,comma label\",skipped\n1,mol ,"},
        // a task's name with what CSV and JSON must escape, and another set's tasks
        {"./moleblend finetune build/test_train.bin --valid build/test_q.bin", 1,
         "build/test_q.bin: expected the tasks of build/test_train.bin"},
        {"./moleblend finetune build/test_q.bin --valid build/test_q.bin --size tiny --epochs 1 -o "
         "build/test_q.safetensors", 0, "by chance"},
        {"./moleblend predict build/test_q.bin --model build/test_q.safetensors --interval 0", 0,
         "record,name,\"a\"\"\\b\",\"a\"\"\\b label\",skipped\n1,C,"},
        {"./data_prep --labels none -o build/test_bare.bin data/sample.sdf", 1, "--labels"},
        {"./data_prep -o build/test_bare.bin data/sample.sdf", 0, "2000 molecules"},
        {"./moleblend predict build/test_bare.bin --model build/test_ft.safetensors", 0,
         "record,name,logP,logP low,logP high,\"with,comma\",\"with,comma low\","},
        {"./moleblend embed build/test_bare.bin --model build/test_ft.safetensors -o "
         "build/test.npy",
         0, "embedded"},
        {"./moleblend predict build/test_train.bin --model build/test_model.safetensors", 1,
         "not a fine-tuned model"},
        {"./moleblend predict build/test_train.bin", 1, "--model: expected a checkpoint"},
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --epochs 1 "
         "--init build/test_model.safetensors -o build/test_ft2.safetensors --seeds 2",
         0, " deviations; valid  R2 "},  // errors in different units are not averaged
        {"./moleblend embed build/test_train.bin --model build/test_model.safetensors -o "
         "build/test.npy",
         0, "embedded"},
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --readout max", 1,
         "--readout: expected cls, mean or sum, found \"max\""},
        {"./moleblend build/test_train.bin --init data/mini.safetensors --steps 1", 1,
         "not a MoleBLEND model: expected a tensor"},
        {"./moleblend build/test_train.bin --init build/test_ft.safetensors --steps 1", 1,
         "is missing"},
        {"./data_prep", 1, "data_prep: no input; see --help"},
        {"./data_prep data/ethanol.sdf", 1, "-o: expected the dataset to write"},
        {"./data_prep --help", 0, "--split"},
        {"./data_prep no_such.sdf -o build/x.bin", 1, "data_prep: no_such.sdf"},
    };
    test_table("build/test_q.csv", "smiles,\"a\"\"\\b\"\nC,0\nCC,1\nCCC,3\n",
               "./data_prep --labels all -o build/test_q.bin build/test_q.csv", 0, "3 molecules");
    test_rows(table, sizeof table / sizeof *table);
#if MB_POSIX  // catches a 32-bit program that cannot open files over 2 GiB
    test_command("dd if=/dev/zero of=build/big.bin bs=1 count=1 seek=2300000000 2> build/dd.out; "
                 "./moleblend show build/big.bin 0; c=$?; rm build/big.bin; exit $c", 1,
                 "build/big.bin: not a dataset file");
#endif
}

// The files people have, as they are distributed: labels beside the SD file (QM9's gdb9.sdf.csv by
// title, PCQM4Mv2's by position), lists of records to leave out, splits that are given. A label or
// part of another record.
static void test_files_people_have(void) {
    if (!MB_POSIX) return;  // a shell makes its files
    static const CommandRow table[] = {
        {"for i in 1 2 3 4; do printf 'gdb_%d\n x\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\n    "
         "0.0000    0.0000    0.0000 C   0  0\nM  END\n$$$$\n' $i; done > build/g.sdf; printf "
         "'mol_id,smiles,mu,gap\ngdb_1,C,0,1\ngdb_4,C,3,\n\"gdb_2\",C,1,2\n' > build/g.csv", 0, ""},
        {"./data_prep -o - --labels gap,mu --labels-from build/g.csv build/g.sdf 2> build/g.err | "
         "./data_prep --dump - | sed 's/.*labels..//'", 0,
         "[1,0]}\n[2,1]}\n[null,null]}\n[null,3]}\n"},
        {"cat build/g.err", 0, "of which --labels-from says nothing: 1"},
        {"./data_prep -o - --labels all --labels-from build/g.csv --labels-by number build/g.sdf "
         "2> build/g.err | ./data_prep --dump - | sed 's/.*labels..//'", 0,
         "[0,1]}\n[3,null]}\n[1,2]}\n[null,null]}\n"},
        {"cat build/g.err", 0, "--labels all leaves out \"smiles\": 3 of 3 cells are no numbers, "
         "the first is \"C\" (build/g.csv:2)"},
        {"./data_prep -o build/g.bin --labels gapp --labels-from build/g.csv build/g.sdf", 1,
         "build/g.csv:1: expected a column \"gapp\""},
        {"./data_prep -o build/g.bin --labels-from build/g.csv build/g.sdf", 1,
         "expected --labels too"},
        {"printf 'These failed:\n Index  SMILES\n-----\n  2 CC\ngdb_4 CO\n' > build/g.txt; "
         "./data_prep -o build/g.bin --skip-list build/g.txt --rejects build/r.csv build/g.sdf && "
         "cat build/r.csv", 0,
         "record,name,line,reason\n2,gdb_2,8,build/g.txt names it\n"
         "4,gdb_4,22,build/g.txt names it\n"},
        {"printf '3,054 molecules:\n 2 CC\n' > build/l.txt; ./data_prep -o build/g.bin --skip-list "
         "build/l.txt build/g.sdf", 0, "1  in --skip-list\n          build/g.sdf:8: build/l.txt"},
        {"echo none > build/l.txt; ./data_prep -o build/g.bin --skip-list build/l.txt build/g.sdf",
         0, "build/l.txt: 1 rows belong to no record"},
        {"./data_prep -o build/g.bin --skip-list build/g.txt --max-reject 20 build/g.sdf", 1,
         "50.00 % of the records are refused, more than 20 %; nothing is written"},
        {"./data_prep -o 'build/g.{}.bin' --split 2,1,rest --split-by order build/g.sdf", 0,
         "test            1 molecules"},
        {"./data_prep -o 'build/g.{}.bin' --split 4,1,rest build/g.sdf", 1,
         "asks for 5 molecules, there are 4"},
        {"./data_prep -o 'build/g.{}.bin' --split 2,1 build/g.sdf", 1,
         "asks for 3 molecules, there are 4"},
        {"./data_prep -o 'build/g.{}.bin' --split 0.5,0.6 build/g.sdf", 1, "that add up to 1"},
        {"printf '1 test\n2 train\ngdb_3 train\n4 val\n' > build/p.txt; ./data_prep -o "
         "'build/g.{}.bin' --split-by file:build/p.txt build/g.sdf && ./data_prep --dump "
         "build/g.test.bin", 0, "{\"name\":\"gdb_1\""},
        {"printf 'smiles,set,y\nCC,train,1\nCCO,test,2\nC,foo,2\n' | ./data_prep --format csv -o "
         "'build/g.{}.bin' --labels y --split-by column:set -", 0,
         "-:4: expected train, valid or test, found \"foo\""},
        {"./data_prep -o 'build/g.{}.bin' --split-by chance build/g.sdf", 1,
         "column:NAME or file:PATH"},
        {"printf 'CC(=O)[O-].[Na+]\nO.c1ccccc1.C\n' | ./data_prep --format smi "
         "--largest-fragment -o - - 2> /dev/null | ./data_prep --dump - | tr -cd '\n[' | "
         "awk '{print length}'", 0,
         "12\n15\n"},
        {"./data_prep -o build/g.bin 'CC(=O)O'", 1,
         "type: echo 'CC(=O)O' | ./data_prep --format smi"},
        {"./data_prep -o build/g.bin --labels logPP data/sample.sdf", 1,
         "records has an SD tag \"logPP\" (--labels); the first has: logP, TPSA"},
    };
    test_rows(table, sizeof table / sizeof *table);
}

#define EMBED_U "./moleblend embed build/test_u.bin --model build/test_model.safetensors "

// Molecules to predictions, vectors and pictures: a row that is missing, or of another record.
static void test_using(void) {
    if (!MB_POSIX) return;  // a shell makes its datasets
    static const CommandRow table[] = {
        // a pipe; a row for each record, also for those that are skipped; no name: the number
        {"printf 'CCO ethanol\nC(C junk\nc1ccccc1 benzene\n' | ./data_prep --format smi -o - - | "
         "./moleblend predict - --model build/test_ft.safetensors 2> /dev/null | "
         "sed 's/,-*[0-9.e-]*[0-9]\\b/,#/g'", 0,
         "record,name,logP,logP low,logP high,\"with,comma\",\"with,comma low\","
         "\"with,comma high\",skipped\n1,ethanol,#,#,#,#,#,#,\n"
         "2,junk,,,,,,,\"expected ), found the end\"\n3,benzene,#,#,#,#,#,#,\n"},
        {"printf '\n x\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\n    0.0000    0.0000    "
         "0.0000 C   0  0\nM  END\n$$$$\n' | ./data_prep --format sdf -o - - | ./data_prep "
         "--dump -", 0, "{\"name\":\"1\","},
        {"./moleblend predict build/test_train.bin -o build/p.csv --model "
         "build/test_ft.safetensors && wc -l < build/p.csv", 0, "RMSE"},
        {"printf 'smiles,a\\nC,0\\nCC,1\\nCCC,0\\n' | ./data_prep --format csv --labels a -o "
         "build/test_u.bin -", 0, "3"},
        // a classifier that has learnt nothing says the share of ones, 1/3
        {"./moleblend finetune build/test_u.bin --valid build/test_u.bin --size tiny --epochs 1 "
         "--lr 1e-9 -o build/test_br.safetensors && ./moleblend predict build/test_u.bin --model "
         "build/test_br.safetensors | awk -F, 'NR > 1 { s += $3 } END { print s / 3 }'", 0,
         "\n0.33"},
        // an ensemble: mean and deviation of its members
        {"./moleblend finetune build/test_u.bin --valid build/test_u.bin --size tiny "
         "--epochs 1 --seeds 2 -o build/test_en.safetensors", 0, "Brier score"},
        {"./moleblend predict build/test_u.bin --model build/test_en.seed1.safetensors "
         "build/test_en.seed2.safetensors", 0, "record,name,a,a deviation,a label,skipped\n1,C,0."},
        {"./moleblend predict build/test_u.bin --model build/test_en.seed1.safetensors "
         "build/test_ft.safetensors", 1, "expected the tasks of the first model"},
        {"./moleblend predict build/test_u.bin", 1, "--model: expected a checkpoint"},
        {"./moleblend embed build/test_u.bin", 1, "--model: expected a checkpoint"},
        // the model of the default size, as float16
        {"./moleblend finetune build/test_u.bin --valid build/test_u.bin --epochs 1 --init "
         "data/small.safetensors -o build/test_sm.safetensors 2>&1", 0,
         "116 encoder tensors loaded, 0 missing, 48 left behind"},
        // vectors of atoms, of a layer; whose they are
        {"./moleblend embed build/test_u.bin --level atom --layer 1 --model "
         "build/test_model.safetensors -o build/test_v.npy && cat build/test_v.csv", 0,
         "row,rows,record,name\n0,1,1,C\n1,2,2,CC\n3,3,3,CCC\n"},
        {"tail -c +11 build/test_v.npy | head -c 80", 0, "'shape': (6, 24)"},
        {"tail -c +11 build/test_v.index.npy | head -c 80", 0,
         "'<u4', 'fortran_order': False, 'shape': (6,)"},
        {EMBED_U "--layer 3", 1, "--layer: expected numbers from 0 to 2 with commas between them "
         "(-1: the last), or all, found \"3\""},
        {EMBED_U "--layer 0,-2", 1, "from 0 to 2"},
        {EMBED_U "--layer 0,", 1, "found \"0,\""},
        {EMBED_U "--layer ''", 1, "found \"\""},
        {EMBED_U "--layer 1.5", 1, "found \"1.5\""},
        {EMBED_U "--layer all,0", 1, "found \"all,0\""},
        {EMBED_U "--layer 99999999999999999999", 1, "from 0 to 2"},
        {EMBED_U "--layer 0,2,-1", 1, "--layer: 2 stands twice in \"0,2,-1\""},
        {EMBED_U "--layer 2,1,0,1", 1, "--layer: 1 stands twice"},
        // several layers, each with its place in a row; the last is the default
        {EMBED_U "--layer 0,2 -o build/test_v.npy && cat build/test_v.csv", 0,
         "row,rows,record,name,layer 0,layer 2\n0,1,1,C,0,24\n1,1,2,CC,0,24\n2,1,3,CCC,0,24\n"},
        {"tail -c +11 build/test_v.npy | head -c 80", 0, "'shape': (3, 48)"},
        {"./moleblend embed build/test_u.bin --model data/small.safetensors -o build/test_v.npy; "
         "./moleblend embed build/test_u.bin --model data/small.safetensors --layer 6 -o - | cmp "
         "- build/test_v.npy", 0, ""},
        {"cat build/test_v.csv", 0, "row,rows,record,name\n0,1,1,C\n1,1,2,CC\n2,1,3,CCC\n"},
        // the same bytes by any number of threads, however the molecules are batched
        {EMBED_U "--layer all --threads 1 -o build/test_v.npy; for n in '0,1,2 --threads 1' 'all "
         "--threads 2 --batch-size 1' 'all --threads 4 --batch-size 2'; do " EMBED_U "--layer $n "
         "-o - | cmp - build/test_v.npy || exit; done", 0, ""},
        {EMBED_U "--layer all --precision bf16 --threads 1 -o build/test_v.npy; for n in 2 4; do "
         EMBED_U "--layer all --precision bf16 --threads $n -o - | cmp - build/test_v.npy || exit; "
         "done", 0, "bf16"},
        {"./moleblend embed - -o - --model build/test_model.safetensors < build/test_u.bin 2> "
         "/dev/null | wc -c", 0, "416"},
        // what the model says of a pair; a picture
        {"./moleblend show build/test_e.bin 0 --model build/test_model.safetensors", 0,
         "path length (truth)  probability"},
        {"./moleblend show build/test_e.bin 0 --model build/test_model.safetensors | awk '/^pair  "
         ".*truth/ { on = 1 } on && /^0 [012]/ { printf \"%s;\", $4 } END { print \"\" }'", 0,
         "-;1;2;\n"},
        {"./moleblend show build/test_e.bin 0 --model build/test_ft.safetensors", 1,
         "expected a pretrained one"},
        {"./moleblend show build/test_e.bin 0 --svg build/e.svg && grep -c rect build/e.svg", 0,
         "\n49\n"},
        // the command line as hands expect it
        {"./moleblend -h", 0, "--batch-size N"},
        {"./moleblend help", 0, "--batch-size N"},
        {"./moleblend finetune --help", 0, "--beta2 X                AdamW (default 0.999)"},
        {"./moleblend finetune --help", 0, "(default finetuned.safetensors)"},
        {"./moleblend --version", 0, "moleblend 1."},
        {"./data_prep --version", 0, "data_prep 1."},
        {"./moleblend finetnue build/test_train.bin", 1, "did you mean finetune?"},
        {"./moleblend build/test_train.bin --steps=x", 1, "found \"x\""},
        {"./moleblend build/test_train.bin --resume=1", 1, "--resume: expected no value"},
        {"./moleblend build/test_train.bin --epochs 2", 1, "unknown option --epochs"},
        {"./moleblend build/test_train.bin --no-blend --pair-3d 0.5", 1,
         "--no-blend shows everything"},
        {"./moleblend show build/test_e.bin 0 --pair-3d 0.8", 0,
         "sum to 1.2 and are taken as parts"},
        {"./data_prep -o - --split 0.5,0.5 data/sample.sdf", 1, "room for one dataset"},
    };
    test_rows(table, sizeof table / sizeof *table);
    const float logits[] = {4, -4, 4, -4, 4, -4, 4, -4}, labels[] = {1, 0, 1, 0, 1, 0, 0, 1};
    // three of four are right: sigmoid(4 s) = 3/4
    test_check(fabsf(calibration(logits, labels, 8) - 0.27465f) < 1e-4f, "calibration: %g",
               (double)calibration(logits, labels, 8));
}

// The worked example: what `show` prints of ethanol is what the comments in moleblend.c say.
static void test_example(void) {
    static const char *const printed[] = {
        "0.0   1.5    --", "1.5     0   1.4", "2.4     1     .", "2D 3D 3D",
        "0 2     (path_bias[0][0] + path_bias[1][0]) / 2       1   0  0 -1 -1 -1  1.99  0.95"};
    static const char *const written[] = {
        "0.0  1.5  --", "1.5  0    1.4", "2.4  1    .", "(path_bias[0][0] + path_bias[1][0]) / 2",
        "(two bonds), edge classes 0 and 0 (single bonds)", "0.0 1.5 2.4", "1.5 0.0 1.4",
        "2.4 1.4 0.0"};
    char *source = file_text("moleblend.c", NULL);
    test_command("./data_prep -o build/test_e.bin data/ethanol.sdf", 0, "1 molecules");
    for (size_t k = 0; k < sizeof printed / sizeof printed[0]; k++)
        test_command("./moleblend show build/test_e.bin 0", 0, printed[k]);
    for (size_t k = 0; k < sizeof written / sizeof written[0]; k++)
        test_check(strstr(source, written[k]) != NULL, "moleblend.c does not say \"%s\"",
                   written[k]);
    free(source);
}

#if MB_POSIX
// Exit code of a process of its own that does run(argument); its stderr is build/test.out.
static int run_apart(void (*run)(void *argument), void *argument) {
    int status = -1;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        FILE *out = freopen("build/test.out", "w", stderr);
        if (out) run(argument);
        _exit(0);
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + status;
}

// run(argument) must end its process with code 1 and say this.
static void test_apart(void (*run)(void *argument), void *argument, const char *expected) {
    int code = run_apart(run, argument);
    char *text = file_text("build/test.out", NULL);
    test_check(code == 1 && strstr(text, expected), "exit code %d, expected 1 and \"%s\" in: %s",
               code, expected, text);
    free(text);
}

// The model of a file, which must be that of `argument` if it is taken at all.
static void load_damaged(void *argument) {
    const Model *model = argument;
    Model again;
    TensorFile f;
    tensor_file_open(&f, "build/test_flip.bin");
    model_create(&again, model->config, 1);
    model_load(&again, again.params, &f, "");
    model_load(&again, again.m, &f, "exp_avg.");
    if (again.count != model->count ||
        memcmp(again.params, model->params, sizeof(float) * model->count) != 0 ||
        memcmp(again.m, model->m, sizeof(float) * model->count) != 0 ||
        tensor_value(tensor_find(&f, "log"), 1) != 1)
        _exit(2);
    _exit(0);
}

// A flipped bit of a state that goes unnoticed and changes what is read: every bit of the start of
// the header, some of the rest.
static void test_flips(void) {
    const float log[] = {0, 1, 2, 3};
    Model model;
    size_t n;
    int wrong = 0, refused = 0, tried = 0;
    model_create(&model, (Config){1, 8, 8, 2, 2, 0}, 1);
    model_init(&model, 3);
    for (idx k = 0; k < model.count; k++) model.m[k] = 0.5f;
    float *const arenas[ARENAS] = {model.params, model.m, model.v};
    remove("build/test_flip.bin");  // damaged by an earlier test
    model_write("build/test_flip.bin", &model, arenas, &(TensorOut){"log", 2, 2, log}, 1,
                "\"step\":\"2\"");
    test_check(run_apart(load_damaged, &model) == 0, "the state without damage is read");
    char *bytes = file_text("build/test_flip.bin", &n);
    for (size_t k = 0; k < 560; k++, tried++) {
        size_t bit = k < 416 ? k : rng_bits(1, 71, 0, 0, (uint32_t)k) % (8 * n);
        bytes[bit / 8] = (char)(bytes[bit / 8] ^ 1 << bit % 8);
        write_bytes("build/test_flip.bin", bytes, n);
        bytes[bit / 8] = (char)(bytes[bit / 8] ^ 1 << bit % 8);
        int code = run_apart(load_damaged, &model);
        refused += code == 1;
        wrong += code != 0 && code != 1;
    }
    test_check(wrong == 0 && refused > tried - 130,
               "flipped bits of a state: %d of %d refused, %d change what is read", refused, tried,
               wrong);
    free(bytes);
    model_free(&model);
}

static void read_last(void *dataset) {
    Dataset *d = dataset;
    Molecule m = {0};
    dataset_read(d, d->count - 1, &m);
}

static void ask_for_memory(void *count) {
    memory_check(*(uint64_t *)count, "this", "less");
}

// A machine that gives less than was asked for: a crash, a hang, silence, or something left behind.
static void test_machine(void) {
    static const CommandRow table[] = {
        // a full disk behind stdout
        {"./moleblend --help > /dev/full", 1, "moleblend: standard output: write failed: No space"},
        {"./moleblend info build/test_train.bin > /dev/full", 1, "standard output: write failed"},
        {"./moleblend show build/test_train.bin 2 > /dev/full", 1, "standard output: write failed"},
        {"./moleblend predict build/test_train.bin --model build/test_ft.safetensors > /dev/full",
         1, "standard output: write failed"},
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --epochs 1 "
         "--size tiny -o build/test_ft2.safetensors > /dev/full", 1,
         "standard output: write failed"},
        {"./data_prep --dump build/test_train.bin > /dev/full", 1,
         "data_prep: standard output: write failed"},
        {"./data_prep --help > /dev/full", 1, "data_prep: standard output: write failed"},
        {"./data_prep -o build/test_c.bin data/sample.sdf <&- 2>&- && ./moleblend info "
         "build/test_c.bin", 0, "dataset, 2000 molecules"},
        // files that are none
        {"rm -f build/test_fifo*; mkfifo build/test_fifo; timeout 9 ./moleblend build/test_fifo", 1,
         "build/test_fifo: cannot read: expected a regular file"},
        {"timeout 9 ./moleblend info build/test_fifo", 1, "expected a regular file"},
        {"timeout 9 ./moleblend show /dev/zero 0", 1, "/dev/zero: cannot read: expected a regular"},
        {"mkfifo build/test_fifo_valid.bin; cp build/test_train.bin build/test_fifo_train.bin; "
         "timeout 9 ./moleblend build/test_fifo_train.bin --size tiny -o build/test_x.safetensors",
         1, "build/test_fifo_valid.bin: cannot read: expected a regular file"},
        // ulimit -f, -v: the checkpoint of before stays, nothing else does
        {"rm -f build/test_u.*; ./moleblend build/test_train.bin --size tiny --steps 1 -o "
         "build/test_u.safetensors && cp build/test_u.safetensors build/test_u.copy && "
         "(ulimit -f 2000; ./moleblend build/test_train.bin --size tiny --steps 2 -o "
         "build/test_u.safetensors); c=$?; cmp build/test_u.safetensors build/test_u.copy && "
         "! ls build/test_u.*.tmp && exit $c", 1, "write failed: File too large"},
        {"(ulimit -f 20; ./data_prep -o build/test_u.bin data/sample.sdf); c=$?; "
         "! ls build/test_u.*.tmp build/test_u.bin && exit $c", 1, "write failed: File too large"},
#if !defined(__SANITIZE_ADDRESS__)
        {"(ulimit -v 400000; ./moleblend build/test_train.bin --size base --threads 1 -o "
         "build/test_u.safetensors); c=$?; cmp build/test_u.safetensors build/test_u.copy && "
         "! ls build/test_u.*.tmp && exit $c", 1, "this model needs 811 MiB of memory, and 3"},
#endif
        // numbers that are none
        {"./moleblend embed build/test_train.bin --model build/test_nan.safetensors -o "
         "build/test.npy", 1, "layers.1.fc1.weight: number 3 is not finite"},
        {"./moleblend predict build/test_train.bin --model build/test_meta.safetensors", 1,
         "build/test_meta.safetensors: metadata label_std: expected 2 numbers"},
    };
    const char *meta = "\"task\":\"regression\",\"task_names\":\"a\\nb\",\"label_mean\":"
                       "\"0 0\",\"label_std\":\"1 2x\"";
    Model model;
    Dataset d;
    model_create(&model, (Config){2, 24, 20, 3, 12, 2}, 1);
    model_init(&model, 9);
    folders_flushed = 0;
    float *const arenas[ARENAS] = {model.params};
    model_write("build/test_meta.safetensors", &model, arenas, NULL, 0, meta);
    test_check(folders_flushed == 1, "the folder of an output is flushed %d times",
               folders_flushed);
    model.p.layer[1].ffn1_w[3] = NAN;
    model_write("build/test_nan.safetensors", &model, arenas, NULL, 0, meta);
    model_free(&model);
    test_rows(table, sizeof table / sizeof *table);
    write_test_dataset("build/test_bad.bin", 400, 0);
    dataset_open(&d, "build/test_bad.bin");
    CHECK(truncate("build/test_bad.bin", 4096) == 0, "cannot cut build/test_bad.bin");
    test_apart(read_last, &d, "build/test_bad.bin: was cut short while it was read");
    dataset_close(&d);
    uint64_t count = (uint64_t)1 << 50;
    test_apart(ask_for_memory, &count, "MiB of memory, and ");
}
#endif

// Damaged files: every byte position class gives one line and exit code 1, or is not used.
static void test_damage(void) {
    size_t n;
    char *bytes = file_text("build/test_train.bin", &n);
    int bad = 0, tried = 0, quiet = 0;
    for (size_t k = 0; k < 40; k++) {
        size_t at = k < 16 ? 4 * k : rng_bits(1, 70, 0, 0, (uint32_t)k) % n;
        int cut = k % 4 == 3;
        bytes[at] ^= 0x41;
        write_bytes("build/test_bad.bin", bytes, cut ? at : n);
        bytes[at] ^= 0x41;
        int code = run_command("./moleblend info build/test_bad.bin");
        quiet += code == 0;
        bad += code != 1;
        tried++;
    }
    test_check(bad == 0, "%d of %d damaged datasets did not give exit code 1 (%d were not noticed)",
               bad, tried, quiet);
    free(bytes);
}

// A field of a dataset that is believed because the checksums are right.
static void test_dataset_fields(void) {
    enum { HEAD, INDEX, RECORD };  // of the second of two molecules, C and CO; one is skipped
    static const struct { int where, at, size; uint64_t value; const char *message; } table[] = {
        {HEAD, 8, 4, 1, "expected format version 2, found 1"},
        {HEAD, 12, 4, 70000, "damaged header (counts"},
        {HEAD, 12, 4, 60000, "damaged task names"},
        {HEAD, 16, 8, 3, "damaged header (counts"},
        {HEAD, 16, 8, UINT64_MAX, "damaged header (counts"},
        {HEAD, 24, 8, 1 << 20, "damaged header (counts"},
        {HEAD, 32, 8, 1, "has bytes behind its end: expected 1 bytes"},
        {HEAD, 40, 4, 70000, "damaged header (counts"},
        {HEAD, 44, 4, 70000, "damaged header (counts"},
        {HEAD, 64, 2, 60000, "damaged task names"},
        {HEAD, 48, 8, 0, "damaged list of skipped records"},
        {HEAD, 56, 4, 6, "flags 6: made by a newer data_prep"},
        {HEAD, 48, 8, 2, "damaged list of skipped records"},
        {INDEX, 24, 8, 0, "damaged index (skipped records)"},
        {INDEX, 24, 8, (uint64_t)1 << 40, "damaged index (skipped records)"},
        {HEAD, 40, 4, 1, "molecule 1: more atoms or bonds than the header allows"},
        {HEAD, 44, 4, 0, "molecule 1: more atoms or bonds than the header allows"},
        {INDEX, 8, 8, 0, "damaged index (molecule 0 does not fit"},
        {INDEX, 0, 8, 0, "damaged index (molecule 0 does not fit"},
        {INDEX, 8, 8, (uint64_t)1 << 40, "damaged index (molecule 0 does not fit"},
        {INDEX, 8, 2, 50, "damaged index (molecule 1 does not fit"},
        {INDEX, 8, 2, 1, "molecule 1: atom count differs from the index"},
        {RECORD, 4, 2, 0, "molecule 1: molecule without atoms"},
        {RECORD, 6, 2, 9, "molecule 1: record size does not fit its counts"},
        {RECORD, 8, 2, 2, "molecule 1: unknown record flags"},
        {RECORD, 12, 1, 119, "molecule 1: atom feature out of range"},
        {RECORD, 30, 2, 7, "molecule 1: bond to an atom that is not there"},
        {RECORD, 32, 2, 7, "molecule 1: bond to an atom that is not there"},
        {RECORD, 32, 2, 0, "molecule 1: bond to an atom that is not there"},
        {RECORD, 34, 1, 60, "molecule 1: bond feature out of range"},
        {RECORD, 35, 4, 0x7f800000, "molecule 1: label is infinite"}};
    test_table("build/test_h.csv", "smiles,a\nC,1\nC(,1\nCO,2\n",
               "./data_prep -o build/test_h.bin --labels a build/test_h.csv", 0, "2 molecules");
    size_t n, head = DATASET_HEADER + 3;
    uint8_t *bytes = (uint8_t *)file_text("build/test_h.bin", &n), copy[1024];
    size_t index = get_u64(bytes + 24), record = get_u64(bytes + index + 8) >> 16;
    size_t skips = get_u64(bytes + index + 24);
    CHECK(n < sizeof copy, "build/test_h.bin: too large");
    for (size_t k = 0; k < sizeof table / sizeof *table; k++) {
        size_t at = (const size_t[]){0, index, record}[table[k].where];
        memcpy(copy, bytes, n);
        for (int i = 0; i < table[k].size; i++)
            copy[at + (size_t)(table[k].at + i)] = (uint8_t)(table[k].value >> 8 * i);
        put_u32(copy + record, crc32_add(0, copy + record + 4, skips - record - 4));
        uint32_t crc = crc32_add(0, copy + index, 32);
        put_u32(copy + n - 4, crc32_add(crc, copy + skips, index - skips));
        put_u32(copy + 60, 0);
        put_u32(copy + 60, crc32_add(0, copy, head));
        write_bytes("build/test_bad.bin", copy, n);
        test_command("./moleblend info build/test_bad.bin", 1, table[k].message);
    }
    bytes[n - 1] ^= 1;
    write_bytes("build/test_bad.bin", bytes, n);
    test_command("./moleblend info build/test_bad.bin", 1, "damaged index (checksum)");
    free(bytes);
}

#define F32 "{\"a\":{\"dtype\":\"F32\",\"shape\":"
// A header of a tensor file that is misread, or believed though it cannot be.
static void test_tensor_headers(void) {
    static const struct { const char *header; int code; const char *expected; } table[] = {
        {"{\"a\" :\t{\"dtype\":\"F32\" ,\r\n \"shape\":[ 1 , 2 ],\"data_offsets\":[0,8]} }", 0,
         "F32 (1, 2)"},
        {F32 "[],\"data_offsets\":[4,8]}}", 0, "F32 ()"},
        {"{\"\\u0041\\u00e9\\u0000\\\"\\q\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":"
         "[0,0]}}", 0, "  A??\"q "},
        {"{\"__metadata__\":{},\"a\":{\"dtype\":\"I16\",\"shape\":[4],\"data_offsets\":[0,8]}}", 0,
         "I16 (4)"},
        {"{\"__metadata__\":{\"k\":\"v\\n\"},\"a\":{\"dtype\":\"I8\",\"shape\":[8],"
         "\"data_offsets\":[0,8]}}", 0, "k: v"},
        {"{\"\\u00\":", 1, "expected \\uXXXX at byte"},
        {"{\"\\u00zz\":", 1, "expected \\uXXXX at byte"},
        {"{\"abc", 1, "expected the end of a string"},
        {"{\"abc\\", 1, "expected the end of a string"},
        {"", 1, "expected '{' at byte 0"}, {"[", 1, "expected '{' at byte 0"},
        {"{\"a\"", 1, "expected ':' at byte"}, {"{\"a\":{\"dtype\":\"F32\"", 1, "at byte 19"},
        {"{\"a\":{\"type\":\"F32\"}}", 1, "expected dtype, shape or data_offsets"},
        {"{\"a\":{\"dtype\":\"F31\",\"shape\":[1],\"data_offsets\":[0,4]}}", 1, "unknown type"},
        {F32 "[1,1,1,1,1,1,1,1,1]", 1, "a shorter list"}, {F32 "[x]", 1, "expected a number"},
        {F32 "[1,2,1,1,1],\"data_offsets\":[0,8]}}", 0, "F32 (1, 2, 1, 1, 1)"},
        {"{\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[8],\"data_offsets\":[0,8]}}", 0, "F8_E4M3 (8)"},
        {F32 "[65536,65536,65536,65536],\"data_offsets\":[0,8]}}", 1,
         "test_h.safetensors: damaged tensor file: tensor a: its shape is beyond any memory"},
        {F32 "[1", 1, "expected ']'"},
        {F32 "[99999999999999999999]", 1, "expected a smaller number"},
        {F32 "[1],\"data_offsets\":[0]}}", 1, "expected two offsets"},
        {F32 "[1],\"data_offsets\":[4,0]}}", 1, "the data of a does not fit its shape"},
        {F32 "[1],\"data_offsets\":[0,8]}}", 1, "the data of a does not fit its shape"},
        {F32 "[3],\"data_offsets\":[0,12]}}", 1, "the data of a does not fit its shape"}};
    for (size_t k = 0; k < sizeof table / sizeof *table; k++) {
        uint8_t bytes[512] = {0};
        size_t length = strlen(table[k].header);
        put_u64(bytes, length);
        memcpy(bytes + 8, table[k].header, length);
        write_bytes("build/test_h.safetensors", bytes, length + 16);
        test_command("./moleblend info build/test_h.safetensors", table[k].code, table[k].expected);
    }
    // tables that another program has made smaller
    const char half[] = "{\"a\":{\"dtype\":\"F16\",\"shape\":[1,2],\"data_offsets\":[0,4]}}";
    uint8_t bytes[128] = {0}, data[4] = {0, 0x3C, 0, 0xC0};
    float rows[2] = {0};
    put_u64(bytes, strlen(half));
    memcpy(bytes + 8, half, strlen(half));
    memcpy(bytes + 8 + strlen(half), data, 4);
    write_bytes("build/test_h.safetensors", bytes, strlen(half) + 12);
    TensorFile f;
    tensor_file_open(&f, "build/test_h.safetensors");
    test_check(tensor_rows(rows, 1, 2, &f, "a") == 1 && rows[0] == 1 && rows[1] == -2,
               "a table of float16: (%g, %g)", (double)rows[0], (double)rows[1]);
    tensor_file_close(&f);
}

// Records damaged side by side, read by several threads: one message, about the first of them.
static void test_damage_together(void) {
    size_t n;
    char *bytes = file_text("build/test_train.bin", &n);
    Dataset d;
    int good = 0;
    dataset_open(&d, "build/test_train.bin");
    for (size_t i = 3; i < 40; i++) bytes[(get_u64(d.index + 8 * i) >> 16) + 20] ^= 1;
    dataset_close(&d);
    write_bytes("build/test_bad.bin", bytes, n);
    for (int k = 0; k < 20; k++) {
        size_t length;
        int code = run_command("./moleblend embed build/test_bad.bin --threads 4 -o build/bad.npy "
                               "--model build/test_model.safetensors");
        char *text = file_text("build/test.out", &length);
        good += code == 1 && strstr(text, "molecule 3: record is damaged") &&
                strchr(text, '\n') == text + length - 1;
        free(text);
    }
    test_check(good == 20, "damage met by several threads: the first, once, in %d of 20", good);
    free(bytes);
}

// Same bytes with 1, 2 and 3 threads, and after kill -9 and --resume.
static void test_reproducible(void) {
    const char *base =
        "./moleblend build/test_train.bin --valid build/test_train.bin --size tiny --dim 32 "
        "--ffn 32 --batch-size 8 --steps 60 --save-every 7 ";
    static const char *const threads[] = {"1", "2", "3"};
    for (int k = 0; k < 3; k++) {
        test_format(0, "by chance", "%s --threads %s -o build/test_t%d.safetensors", base,
                    threads[k], k);
    }
    test_check(same_files("build/test_t0.safetensors", "build/test_t1.safetensors") &&
               same_files("build/test_t0.safetensors", "build/test_t2.safetensors"),
               "1, 2 and 3 threads write the same bytes");
#if MB_POSIX
    remove("build/test_k.safetensors");
    test_format(0, "", "sh -c '%s -o build/test_k.safetensors & p=$!; i=0; "
                "while [ ! -s build/test_k.safetensors ] && [ $i -lt 6000 ]; do sleep 0.01; "
                "i=$((i+1)); done; kill -9 $p 2> /dev/null; wait $p; true'", base);
    test_format(0, "resumed after step", "%s --resume -o build/test_k.safetensors", base);
    test_check(same_files("build/test_t0.safetensors", "build/test_k.safetensors"),
               "killed and resumed: the bytes of the uninterrupted run");
    // killed between the renames of the last save: only the state is there, or an old checkpoint
    remove("build/test_k.safetensors");
    remove("build/test_k.log.csv");
    test_format(0, "wrote build/test_k.safetensors", "%s --resume -o build/test_k.safetensors",
                base);
    test_check(same_files("build/test_t0.safetensors", "build/test_k.safetensors") &&
               fopen("build/test_k.log.csv", "r"), "a resumed run ends with every output there");
    static const struct { const char *name; int code; } signals[] = {{"INT", 130}, {"TERM", 143},
                                                                     {"HUP", 129}};
    for (int k = 0; k < 3; k++) {
        test_format(signals[k].code, "give the same command with --resume",
                    "timeout --preserve-status -s %s 1 %s --steps 90000 -o "
                    "build/test_s.safetensors", signals[k].name, base);
    }
    test_command("(while cat data/sample.sdf; do :; done) | timeout --preserve-status -s INT 1 "
                 "./data_prep --format sdf -o build/test_i.bin -", 130, "");
    test_command("ls build/test_i.bin*", 2, "No such file");
    // two programs with one output
    test_format(1, "is writing it",
                "timeout -s KILL 2 %s --steps 90000 -o build/test_s.safetensors > /dev/null & "
                "sleep 0.5; %s -o build/test_s.safetensors", base, base);
    for (int k = 0; k < 5; k++)
        test_command("./data_prep -o build/test_s.bin data/sample.sdf & "
                     "./data_prep -o build/test_s.bin data/sample.sdf; wait; "
                     "./moleblend info build/test_s.bin", 0, "dataset, 2000 molecules");
    test_command("LC_ALL=C sed -e 's/moleblend.crc32/moleblend_crc32/' "
                 "-e 's/\"step\":\"60/\"step\":\"6x/' build/test_k.safetensors.state > "
                 "build/test_m.safetensors.state", 0, "");
    test_format(1, "metadata step: expected a whole number, found \"6x\"",
                "%s --resume -o build/test_m.safetensors", base);
    // --resume takes the options from the state, names each that differs, and allows more steps
    test_format(1, "--lr: the run began with \"0.0003\", now it is \"0.5\"\n"
                "--clip: the run began with \"5\", now it is \"9\"\nmoleblend: build/test_k",
                "%s --lr 0.5 --clip 9 --resume -o build/test_k.safetensors", base);
    test_command("./moleblend build/test_train.bin --resume -o build/test_k.safetensors", 0,
                 "2 layers, 32 wide");
    test_check(same_files("build/test_t0.safetensors", "build/test_k.safetensors"),
               "resumed without options: the bytes of the uninterrupted run");
    test_command("./moleblend build/test_train.bin --resume --size base -o "
                 "build/test_k.safetensors", 1, "--layers: the run began with \"2\", now it is "
                 "\"12\"");
    test_command("cp build/test_k.safetensors.state build/test_m.safetensors.state; ./moleblend "
                 "build/test_train.bin --resume --steps 70 -o build/test_m.safetensors && "
                 "wc -l build/test_m.log.csv", 0, "71 build/test_m.log.csv");
    test_command("./moleblend finetune build/test_train.bin --valid build/test_train.bin --epochs "
                 "1 --init build/test_k.safetensors.state -o build/test_ft2.safetensors",
                 1, "is the state of a run; expected its checkpoint");
    write_test_dataset("build/test_train.bin", 40, 1);  // the same sizes, other positions
    test_format(1, "--resume needs the same data", "%s --resume -o build/test_k.safetensors", base);
    write_test_dataset("build/test_train.bin", 40, 0);
#endif
}

// Fine-tuning that is killed at any moment loses nothing: what it writes when it is resumed, with
// another number of threads, are the bytes of an uninterrupted run. Its log grows while it runs.
static void test_finetune_resume(void) {
#if MB_POSIX
    const char *base = "./moleblend finetune build/test_train.bin --valid build/test_train.bin "
                       "--size tiny --dim 32 --batch-size 8 --epochs 12 --seeds 2 --save-every 3";
    test_format(0, "over 2 seeds", "%s -o build/test_f0.safetensors", base);
    remove("build/test_f1.safetensors");
    test_format(0, "over 2 seeds",
                "rm -f build/test_f1.safetensors.state; for i in 1 2 3 4 5 6 7 8; do "
                "%s --threads $((1+i%%3)) --resume -o build/test_f1.safetensors & p=$!; "
                "sleep 0.0$((3+i*9%%7)); kill -9 $p; wait $p; done; "
                "%s --resume -o build/test_f1.safetensors", base, base);
    test_check(same_files("build/test_f0.safetensors", "build/test_f1.safetensors"),
               "fine-tuning killed and resumed: the bytes of the uninterrupted run");
    test_check(same_files("build/test_f0.log.csv", "build/test_f1.log.csv"), "and the same log");
    test_command("./moleblend finetune build/test_train.bin --resume --seeds 3 -o "
                 "build/test_f1.safetensors", 0, "over 3 seeds");
    // stopped between two seeds, while the first is measured: nothing of it is lost
    write_test_dataset("build/test_big.bin", 3000, 0);
    test_format(143, "saved after step ",
                "rm -f build/test_f3*; %s --epochs 1 --test build/test_big.bin -o "
                "build/test_f3.safetensors & p=$!; i=0; while [ $i -lt 2000 ] && ! grep -qs "
                "'^1,1,' build/test_f3.log.csv; do sleep 0.01; i=$((i+1)); done; "
                "kill -TERM $p; wait $p", base);
    test_format(0, "over 2 seeds",
                "%s --epochs 1 --test build/test_big.bin -o build/test_f4.safetensors", base);
    test_command("./moleblend finetune build/test_train.bin --resume -o build/test_f3.safetensors",
                 0, "seed 1: best epoch 1");
    test_check(same_files("build/test_f3.safetensors", "build/test_f4.safetensors") &&
               same_files("build/test_f3.log.csv", "build/test_f4.log.csv"),
               "stopped between two seeds: the bytes of the uninterrupted run");
    // states without a checksum that do not add up
    static const char *const damage[][2] = {{"s/\"history\"/\"histery\"/", "do not fit"},
        {"s/\"seeds_done\":\"0/\"seeds_done\":\"7/", "do not fit"}};
    for (int k = 0; k < 2; k++) {
        test_format(1, damage[k][1], "LC_ALL=C sed -e 's/moleblend.crc32/moleblend_crc32/' -e '%s' "
                    "build/test_f3.safetensors.state > build/test_f5.safetensors.state; "
                    "./moleblend finetune build/test_train.bin --resume -o "
                    "build/test_f5.safetensors", damage[k][0]);
    }
    test_format(0, "give the same command with --resume\nseed,epoch,loss,valid RMSE in ",
                "rm -f build/test_f2*; timeout -s INT --preserve-status 1 %s --epochs 9999 -o "
                "build/test_f2.safetensors; cat build/test_f2.log.csv", base);
#endif
}

// A number that is none stops the run with its cause, and leaves what was saved as it is.
static void test_not_finite(void) {
    test_command("./moleblend build/test_train.bin --size tiny --dim 32 --steps 40 --save-every 1 "
                 "--lr 10 --beta1 0.999 --beta2 0 --eps 1e-30 --clip 0 --hold 1 --warmup 0 -o "
                 "build/test_n.safetensors", 1, "the first to be none: ");
    test_command("./moleblend embed build/test_train.bin --model build/test_n.safetensors -o "
                 "build/test.npy", 0, "vectors hold what is no number");
    test_command("printf 'smiles,a\nC,0\nCC,1e20\nCCC,0\n' | ./data_prep --format csv "
                 "--labels a -o build/test_class.bin -", 0,
                 "no numbers up to 1e+15, taken as missing: 1");
}

// A quota that goes unnoticed: of control groups, both versions, as the kernel shows them.
static void test_quota(void) {
    if (!MB_POSIX) return;
    run_command("rm -rf build/v2; mkdir -p build/v2/proc/self build/v2/sys/fs/cgroup/a/b; "
                "printf '4:cpu:/job\\n0::/a/b\\n' > build/v2/proc/self/cgroup; "
                "echo max 100000 > build/v2/sys/fs/cgroup/a/b/cpu.max; "
                "echo 300000 100000 > build/v2/sys/fs/cgroup/a/cpu.max");
    run_command("rm -rf build/v1; mkdir -p build/v1/proc/self build/v1/sys/fs/cgroup/cpu/job; "
                "printf '5:cpuset:/\n4:cpu,cpuacct:/job\n0::/\n' > build/v1/proc/self/cgroup; "
                "echo 150000 > build/v1/sys/fs/cgroup/cpu/job/cpu.cfs_quota_us; "
                "echo 100000 > build/v1/sys/fs/cgroup/cpu/job/cpu.cfs_period_us; "
                "echo -1 > build/v1/sys/fs/cgroup/cpu/cpu.cfs_quota_us; "
                "echo 100000 > build/v1/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    const char *const names[] = {"v1", "v2", "none"};
    const double cpus[] = {1.5, 3, 0};  // version 1; the group above; no control groups
    for (int k = 0; k < 3; k++) {
        char *root = xprintf("build/%s", names[k]);
        double limit = group_limit(root, "cpu");
        test_check(fabs(limit - cpus[k]) < 1e-9, "quota of %s: %g", root, limit);
        free(root);
    }
    for (int own = 2; own < 5; own += 2) {  // the least of its own limit and the group's above
        test_format(0, "", "echo %d00000 100000 > build/v2/sys/fs/cgroup/a/b/cpu.max", own);
        double least = group_limit("build/v2", "cpu");
        test_check(fabs(least - min_int(own, 3)) < 1e-9, "the least of %d and 3: %g", own, least);
    }
    run_command("printf 'MemTotal: 9 kB\nMemAvailable: 3000 kB\n' > build/v2/proc/meminfo");
    test_check(memory_limit("build/v2") == 3072000, "memory: %g", memory_limit("build/v2"));
    run_command("echo 2000000 > build/v2/sys/fs/cgroup/a/b/memory.max");
    test_check(memory_limit("build/v2") == 2000000, "of a group: %g", memory_limit("build/v2"));
#if MB_POSIX && !defined(__SANITIZE_ADDRESS__)
    test_command("ulimit -v 3000000; ./moleblend build/test_train.bin --size base --batch-size 40 "
                 "--dim 2048 --ffn 8192 --layers 20 --heads 32", 1, "this model needs ");
    test_command("ulimit -v 1500000; ./moleblend build/test_train.bin --size base --dim 32 --ffn "
                 "8192 --batch-size 40 --layers 64", 1, "this batch needs ");
#endif
}

// Beside two busy processes a run must not all but stop: with the runtime's own spinning it took
// thirty times as long as with passive waiting.
static void test_busy(void) {
#if MB_POSIX && defined(_OPENMP)
    double seconds[2];
    for (int k = 0; k < 2; k++) {
        double start = now_seconds();
        test_format(0, "wrote", "(while :; do :; done) & h=$!; (while :; do :; done) & i=$!; "
                    "timeout 60 env -u OMP_WAIT_POLICY %s ./moleblend train.bin --size tiny --dim "
                    "16 --steps 40 -o build/test_busy.safetensors; c=$?; kill $h $i; exit $c",
                    k ? "OMP_WAIT_POLICY=passive" : "");
        seconds[k] = now_seconds() - start;
    }
    test_check(seconds[0] < 2 * seconds[1] + 1, "beside busy processes: %.1f s, %.1f s passive",
               seconds[0], seconds[1]);
#endif
}
