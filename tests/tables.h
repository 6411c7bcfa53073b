// tests/tables.h - tables and labels as people have them: read whole, or what is left out is named

#define T_DUMP " && ./data_prep --dump build/t.bin | sed 's/.*labels...//' | tr -d '\\n'"

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
    "grep -c 'made with' build/t.err; echo", 0, "0\n");
    test_command("./data_prep -o build/t.bin --labels y --largest-fragment --keep-hydrogens "
                 "build/t.csv && ./moleblend predict build/t.bin --model build/l.safetensors", 0,
                 "made with --keep-hydrogens, what the model learnt from without it");
    test_command("./moleblend finetune build/t.bin --valid build/t.bin --size tiny --epochs 1 -o "
                 "build/h.safetensors && ./moleblend predict build/l.bin --model "
                 "build/h.safetensors", 0,
                 "made without --keep-hydrogens, what the model learnt from with it");
}

// Catches labels that are no classes beside a training part that has only such: they were judged.
static void test_odd_classes(void) {
    static const char *const prep = "./data_prep -o 'build/k.{}.bin' --labels y --split-by "
                                    "column:part build/k.csv && ";
    char *csv = xprintf("%s", "smiles,part,y\nC,train,0\nCC,train,1\nCO,valid,0\nCN,valid,2\n");
    write_bytes("build/k.csv", csv, strlen(csv));
    test_format(1, "k.valid.bin: molecule 1: expected labels 0 and 1 for --task classification, "
                "found 2; give --task regression", "%s./moleblend finetune build/k.train.bin "
                "--size tiny --epochs 1 -o build/k.safetensors", prep);
    test_command("./moleblend finetune build/k.train.bin --task regression --size tiny --epochs 1 "
                 "-o build/k.safetensors", 0, "RMSE");
    test_command("./moleblend finetune build/k.train.bin --valid build/k.train.bin --size tiny "
                 "--epochs 1 -o build/k.safetensors && ./moleblend predict build/k.valid.bin "
                 "--model build/k.safetensors 2> build/k.txt; grep -c Brier build/k.txt; cat "
                 "build/k.txt", 0, "0\n");
    test_command("cat build/k.txt", 0, "k.valid.bin: task y: labels are more than 0 and 1: they "
                 "cannot judge classes\n");
    free(csv);
}

// Catches lists that name records by their numbers though the names are numbers; names with blanks
// that are cut; marks of UTF-8 that become part of a name; rows that belong to nobody, unsaid.
static void test_lists(void) {
    static const char numbers[] = "CCO 12\nCCN 1\nCCC 7\nCCCl 3\n";
    static const char blanks[] = "C aspirin\nCC sodium acetate\nCCC sodium\nCCCC\n";
    write_bytes("build/t.smi", numbers, sizeof numbers - 1);
    test_table("build/t.txt", "3\n", "./data_prep -o build/t.bin --skip-list build/t.txt "
               "build/t.smi && ./data_prep --dump build/t.bin", 0, "{\"name\":\"7\"");
    test_table("build/t.txt", "12 train\n1 valid\n3 test\n4 test\n", "./data_prep -o "
               "'build/t.{}.bin' --split-by file:build/t.txt build/t.smi", 0,
               "t.smi:3: build/t.txt does not name it");
    write_bytes("build/t.smi", blanks, sizeof blanks - 1);
    test_table("build/t.txt", "\xEF\xBB\xBF" "aspirin\nsodium acetate\nnot there\n", "./data_prep "
               "-o build/t.bin --skip-list build/t.txt build/t.smi", 0, "3  in --skip-list");
    test_command("./data_prep -o build/t.bin --skip-list build/t.txt build/t.smi", 0, "note    "
                 "build/t.txt: 1 rows belong to no record, the first is row 3, \"not\"\nnote    "
                 "build/t.txt: 1 rows name one record as a whole and another by their first word, "
                 "the first is row 2, \"sodium\"; put names in quotes");
    test_table("build/t.txt", "aspirin\ttrain\nsodium acetate\tvalid\nsodium\ttest\n4\ttrain\n",
               "./data_prep -o 'build/t.{}.bin' --split-by file:build/t.txt build/t.smi && "
               "./data_prep --dump build/t.valid.bin", 0, "{\"name\":\"sodium acetate\"");
    test_table("build/t.txt", "\x1F\x8B\x08\n", "./data_prep -o build/t.bin --skip-list "
               "build/t.txt build/t.smi", 1, "is compressed by gzip; type: gzip -dc build/t.txt > "
               "FILE");
    static const char head[] = SD_HEAD;
    char *sdf = xprintf("%s$$$$\n%s$$$$\n", head + 1, head + 1);  // they have no titles
    write_bytes("build/t.sdf", sdf, strlen(sdf));
    free(sdf);
    test_table("build/t.txt", "name,y\na,1.5\n,9.5\n", "./data_prep -o build/t.bin --labels y "
               "--labels-from build/t.txt build/t.sdf", 1, "--labels-from says nothing: 2\n");
    test_table("build/t.txt", "y,z\n1.5,2\n2.5,3\n", "./data_prep -o build/t.bin --labels all "
               "--labels-by number --labels-from build/t.txt build/t.sdf" T_DUMP, 0,
               "1.5,2]}2.5,3]}");
    test_table("build/t.txt", "y\n\n3.5\n\n", "./data_prep -o build/t.bin --labels y --labels-by "
               "number --labels-from build/t.txt build/t.sdf" T_DUMP, 0, "null]}3.5]}");
    test_table("build/t.txt", "y\tz\n\n\t\n3.5\t1\n", "./data_prep -o build/t.bin --labels y "
               "--labels-by number --labels-from build/t.txt build/t.sdf" T_DUMP, 0,
               "null]}3.5]}");
    test_table("build/t.txt", "id\tIC50, nM\nx\t5\n", "./data_prep -o build/t.bin --labels all "
               "--labels-by number --labels-from build/t.txt build/t.sdf", 0,
               "label   IC50, nM: numbers, 1 present");
    test_table("build/t.txt", "id,y,comment (a; b)\nx,1,foo; bar,\nz,2,baz; q,\n", "./data_prep "
               "-o build/t.bin --labels y --labels-by number --labels-from build/t.txt build/t.sdf"
               T_DUMP, 0, "1]}2]}");
    test_table("build/t.txt", "y,z\n1,5,2\n2.5,3\n", "./data_prep -o build/t.bin --labels y "
               "--labels-by number --labels-from build/t.txt build/t.sdf", 0,
               "row 2 of --labels-from: expected 2 fields as in the header, found another, \"2\"");
}

// Tables, what data_prep is given with them, its exit code, and what it says or makes of them.
static const struct { const char *ending, *text, *options; int code; const char *expected;
} TABLES[] = {
    // a column without a name was learnt, and another lost for one cell
    {"csv", ",smiles,y\n0,CCO,0.5\n1,CCN,0.7\n2,CCC,\n3,CO,1e-3\n4,CS,-inf\n5,CF,NaN\n"
     "6,CBr,1.8e308\n"
     "7,CCl,1e400\n", "--labels all" T_DUMP, 0,
     "0.5]}0.699999988]}null]}0.00100000005]}null]}null"},
    {"csv", ",smiles,y\n0,CCO,0.5\n1,CCN,1\n2,C,-inf\n", "--labels all", 0,
     "label   y: numbers, 2 present, 1 missing\n          1 unusable: \"-inf\" (build/t.csv:4)\n"},
    {"csv", ",smiles,y\n0,CCO,0.5\n", "--labels all", 0, "leaves out column 1: it has no name"},
    {"csv", "Unnamed: 0,smiles,y\n0,CCO,0.5\n", "--labels all", 0, "column 1: it has no name"},
    // the first 1000 rows decided
    {"csv", "smiles,a\n{1100|C,\n}C,7\n", "--labels all", 0, "a: numbers, 1 present, 1100 missing"},
    {"sdf", "{1100|" SD_HEAD "$$$$\n}" SD_HEAD "> <a>\n7\n\n$$$$\n", "--labels all", 0,
     "label   a: numbers, 1 present, 1100 missing"},
    // labels went one by one, and the run ended well without any
    {"csv", "smiles,a\nC,x\nCC,z\nCCC,1\n", "--labels all", 1,
     "leaves out \"a\": 2 of 3 cells are no numbers, the first is \"x\" (build/t.csv:2)\n"
     "data_prep: --labels all: no column or tag holds labels"},
    {"smi", "C\n", "--labels all", 1, "--labels all: no column or tag holds labels"},
    {"csv", "smiles,a\nC,x\nCC,x\nCCC,1\n", "--labels a", 1,
     "most values of \"a\" are unusable: \"x\" (2 times, first build/t.csv:2)"},
    {"csv", "smiles,a\nC,x\nCC,2\nCCC,1\n", "--labels a --rejects build/tr.csv && cat build/tr.csv",
     0, "1,C,2,\"kept without its label \"\"a\"\": \"\"x\"\" is no number\"\n"},
    {"sdf", SD_HEAD "> <a>\n1\n2\n\n$$$$\n" SD_HEAD "> <a>\n3\n$$$$\n", "--labels a", 0,
     "1 unusable: \"1 2\" (build/t.sdf:8)"},
    {"sdf", SD_HEAD "> <a>\n1\n> <b>\n2\n$$$$\n", "--labels all" T_DUMP, 0, "1,2]}"},
    // words and bounds were no labels
    {"csv", "smiles,a,b,c\nC,True,ACTIVE,no\nCC,false,inactive,Yes\n", "--labels all" T_DUMP, 0,
     "1,1,0]}0,0,1]}"},
    {"csv", "smiles,a\nC,True\nCC,0\n", "--labels a", 0, "words (true, yes, active, ...) are read"},
    {"csv", "smiles,a\nC,>3\nCC,<= 2\nCCC,~1e-3\nCN,\xE2\x89\xA5" "2\nCO,5\nCS,>3\n", "--labels "
     "all", 0,
     "a: numbers, 1 present, 5 missing\n          5 censored: \">3\" (2 times, first "
     "build/t.csv:2), \"<= 2\" (build/t.csv:3), \"~1e-3\" (build/t.csv:4) and 1 more\n"},
    {"csv", "smiles,a\nC,#N/A\nCC,<NA>\nC,-nan\nC,-\nC,n.d.\nC,.\nC,N/A\nC,1.#IND\nC,3\n",
     "--labels a", 0, "a: numbers, 1 present, 8 missing\nnote"},
    // other writings of numbers
    {"csv", "smiles;a\nC;0,5\nCC;1,250\nCC;\xE2\x88\x92" "2\n", "--labels a" T_DUMP, 0,
     "0.5]}1.25]}-2]}"},
    {"csv", "smiles,a\nC,\"0,5\"\nCC,\"1,23\"\n", "--labels a" T_DUMP, 0, "0.5]}1.23000002]}"},
    {"csv", "smiles,a\nC,\"0,5\"\nCC,\"1,234.5\"\n", "--labels a" T_DUMP, 0, "0.5]}1234.5]}"},
    {"tsv", "smiles\ta\nC\t950\nC\t1,234\nC\t1,234,567\n", "--labels a" T_DUMP, 0,
     "950]}null]}1234567]}"},
    {"csv", "smiles;a\nC;2,5\nC;\"1,234\"\n", "--labels a" T_DUMP, 0, "2.5]}1.23399997]}"},
    {"csv", "smiles,a\nC,\"0,123\"\nC,\"1234,567\"\nC,\"1.234,5\"\n", "--labels a" T_DUMP, 0,
     "0.123000003]}1234.56702]}1234.5]}"},
    {"csv", "smiles,a\nC,\"1,234\"\nC,2\n", "--labels a", 0, "\"1,234\" may be 1.234 or 1234"},
    {"csv", "smiles,a\nC,1e-9\nC,3.9e-30\nC,1e-42\n", "--labels a" T_DUMP, 0,
     "9.99999972e-10]}3.89999986e-30]}0]}"},
    {"csv", "smiles,a\nC,1e15\nC,-2e15\n", "--labels a", 0, "1 unusable: \"-2e15\" "
     "(build/t.csv:3)"},
    {"csv", "smiles,a\nC,{50|x}\nC,2\n", "--labels a", 0, "xxxxxx...\" (build/t.csv:2)"},
    // a name with a comma could not be given
    {"csv", "smiles,\"IC50, human\",y\nC,5,1\n", "--labels '\"IC50, human\",y'" T_DUMP, 0, "5,1]}"},
    {"csv", "smiles,\"IC50, human\",y\nC,5,1\n", "--labels 'y,IC50\\, human'" T_DUMP, 0, "1,5]}"},
    // the shape of the file
    {"csv", "smiles;a\nC;1\n", "--labels a", 0, "note    build/t.csv: fields end at \";\"\n"},
    {"csv", "a\tsmiles\n5\tC\n", "--labels a" T_DUMP, 0, "5]}"},
    {"tsv", "a,smiles\n5,C\n", "--labels a" T_DUMP, 0, "5]}"},
    {"csv", "sep=;\r\n\"x,y\";smiles\r\n5;C\r\n", "--labels 'x\\,y'" T_DUMP, 0, "5]}"},
    {"csv", "\n\r\nsmiles,a\nC,5\n", "--labels a" T_DUMP, 0, "5]}"},
    {"csv", "\n\r\nsmiles,a\nC,x\nC,5\n", "--labels a", 0, "1 unusable: \"x\" (build/t.csv:4)"},
    {"smi", "CCO a\rCCN b\rc1ccccc1 c\r", "", 0, "kept 3 (12 atoms)"},
    {"smi", "C a\nCC b\rCCC c\nC d\r\r\nC e", "", 0, "kept 5 (8 atoms)"},
    {"csv", "smiles,a\rCCO,1\rCCN,2", "--labels a" T_DUMP, 0, "1]}2]}"},
    {"sdf", "x\r\r\r  1  0  0     0  0            999 V2000\r    0.0000    0.0000    0.0000 C   0 "
     " 0\r"
     "M  END\r> <a>\r5\r\r$$$$\r", "--labels a" T_DUMP, 0, "5]}"},
    {"csv", "CCO,1\nCCN,2\n", "", 1, "found the SMILES \"CCO\"; put one in front: (echo "
     "'smiles,y2'; cat build/t.csv) | ./data_prep --format csv"},
    {"csv", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "", 1,
     "is a pointer of git-lfs, not the file itself; type: git lfs pull --include build/t.csv"},
    {"csv", "CN,a\n0,2\n", "", 1, "name the SMILES column with --smiles; it has \"CN\", \"a\""},
    {"csv", "id,mol,a\n1,CCO,2\n", "", 1, "it has \"id\", \"mol\", \"a\"; did you mean \"mol\"?"},
    {"csv", "id,canonical_smiles\n", "", 1, "did you mean \"canonical_smiles\"?"},
    {"csv", "smiles y\nC 1\n", "", 1, "if its fields end at blanks, type: tr -s ' ' , < "
     "build/t.csv"},
    {"csv", "# made today\nC,1\n", "", 1, "found a comment; type: grep -v '^#' build/t.csv |"},
    {"csv", "smiles,pIC50\nC,1\n", "--labels pic50", 1, "did you mean \"pIC50\"?"},
    {"csv", "smiles,logp\nC,1\n", "--labels lopg,x", 1, "it has \"smiles\", \"logp\"; did you "
     "mean \"logp\"?"},
    {"smi", "smiles\ta\nC\t1\nCC\t2\n", "--labels a", 1, "if its first line names columns, give "
     "--format"},
    // a comma that is not in quotes shifted the labels of its row
    {"csv", "smiles,a\nC,1,x\nC,2,\n", "--labels a", 0, "1  more fields than the header\n"
     "          build/t.csv:2: expected 2 fields as in the header, found another, \"x\""},
    {"csv", "smiles,a\nC,1,x\nC,2,\n", "--labels a" T_DUMP, 0, "2]}"},
    // the name of a record without a structure became one
    {"smi", "CCO\tethanol\n\tCNS\nCCC\tprop\n", "", 0, "t.smi:2: column 1: the SMILES is empty"},
    // a row of nothing but separators was no row
    {"tsv", "smiles\ty\nCCO\t1\n\t\nCCC\t0\n", "--labels y", 0,
     "read 3 records from 1 file, kept 2"},
    // a quote that opens before a name took the rows up to the next one
    {"tsv", "smiles\tn\ty\nCCO\t\"5-prime\t1.5\nCCN\tb\t2.5\nCCC\t\"c\"\t3\nCO\td\"\t4\n",
     "--labels y", 0, "t.tsv:2: column 5: the quote that opens here is never closed"},
    {"tsv", "smiles\tn\ty\nCCO\t\"5-prime\t1.5\nCCN\tb\t2.5\nCCC\t\"c\"\t3\nCO\td\"\t4\n",
     "--labels y" T_DUMP, 0, "2.5]}3]}4]}"},
    {"csv", "smiles,n,y\nC,\"a\nb\" ,5\nCC,\"c\"d,6\n", "--labels y" T_DUMP, 0, "5]}6]}"},
    {"csv", "smiles,a\nC,12.5\nCC,inactive\n", "--labels a", 0,
     "beside other numbers, the first \"inactive\" (build/t.csv:3)\n"},
    // a checkpoint that no other program could read
    {"csv", "smiles,temp\xE9r\nC,1\n", "--labels all && ./moleblend info build/t.bin", 0,
     "task       temp\xC3\xA9r: 1 labels"},
    // parts and their molecules
    {"csv", "smiles,a\nOCC,0\nCCO,1\nC[C@H](F)O,2\nC[C@@H](F)O,2\nCCO.Cl,4\n", "--labels a", 0,
     "note    2 records repeat the molecule of another, stereo aside; of 1 molecules the labels "
     "differ"},
    {"csv", "smiles,a\nOCC,0\nCCO,1\nC1CCC2CCCCC2C1,2\nC1CCCC1C1CCCC1,2\nCCO.Cl,4\n", "--labels "
     "a", 0,
     "records of several fragments, such as salts: 1 (--largest"},
    {"csv", "smiles,a\nOCC,0\nCCO,1\nC1CCC2CCCCC2C1,2\nC1CCCC1C1CCCC1,2\n", "--labels a "
     "--split-by order --split 0.25,0.75", 0, "note    1 molecules stand in more than one part"},
    {"smi", "C1CCC2CCCCC2C1\nC1CCCC1C1CCCC1\n", "2> build/t.txt; grep -c repeat build/t.txt; echo",
     0, "0\n"},
    {"smi", "{90|C\n}{10|c1ccccc1\n}", "--split 0.8,0.1,0.1", 0, "note    the training part is "
     "not the largest: 90 of 100 molecules have the same scaffold (or all no ring) and"},
    {"smi", "{90|C\n}{10|c1ccccc1\n}", "--split 0.8,0.1,0.1", 0, "note    the test part is empty"},
    {"smi", "C\n", "--split 0.5,0.5", 1, "the training part is empty: 0, 1 and 0 molecules"},
    {"smi", "C\nCC\nC\n", "--split 1,0 --seed 2", 0, "--seed has no effect without --split-by "
     "random"},
    {"smi", "C\nCC\nC\n", "--split 0.7,0.3 --split-by random --seed 3 2> build/t.txt; grep -c "
     "seed build/t.txt; echo", 0, "0\n"},
};

static void test_table_shapes(void) {
    char *text = xmalloc(1 << 20, 1), *end;
    for (size_t k = 0; k < sizeof TABLES / sizeof *TABLES; k++) {
        char *path = xprintf("build/t.%s", TABLES[k].ending);
        prep_expand(TABLES[k].text, 0, (end = text, &end));
        write_bytes(path, text, strlen(text));
        test_format(TABLES[k].code, TABLES[k].expected, "./data_prep -o build/t.bin %s %s", path,
                    TABLES[k].options);
        free(path);
    }
    free(text);
}

// Catches labels that are found in a file, but not in a pipe; rows of --labels-from that go
// nowhere; a pipe without molecules that loses its rows.
static void test_table_pipes(void) {
    char *text = xmalloc(1 << 20, 1), *end;
    prep_expand("{1100|" SD_HEAD "$$$$\n}" SD_HEAD "> <a>\n7\n\n$$$$\n", 0, (end = text, &end));
    test_table("build/t.sdf", text, "cat build/t.sdf | ./data_prep --format sdf --labels all -o "
    "build/t.bin -", 0, "label   a: numbers, 1 present, 1100 missing");
    free(text);
    test_table("build/t.csv", "title;a;\"b, c\"\nx;0,5;no\ny;2;yes\nx;3;no\n", "printf '" SD_HEAD
               "$$$$\n' | ./data_prep --format sdf --labels all --labels-from build/t.csv -o "
               "build/t.bin - 2> build/t.txt && ./data_prep --dump build/t.bin", 0, "[0.5,0]");
    test_command("cat build/t.txt", 0, "build/t.csv: 2 rows belong to no record, the first is row "
    "3, \"y\"\nnote    build/t.csv: 1 rows begin as an earlier one does");
    test_table("build/t.csv", "title,a\rx,1\r", "./data_prep --labels all --labels-from "
               "build/t.csv -o build/t.bin data/ethanol.sdf", 1, "end in CR alone; type: tr "
               "'\\r' ");
    test_table("build/t.smi", "C1CC x\n", "./data_prep -o - build/t.smi | ./moleblend predict - "
    "--model build/l.safetensors", 0, "record,name,y,skipped\n1,x,,ring 1 is not closed\n");
    test_command("./data_prep -o build/t.bin build/t.smi", 1, "no molecule could be read");
    test_command("./data_prep -o - build/t.smi | ./moleblend embed - --model build/l.safetensors "
    "-o build/te.npy", 0, "0 molecules");
}

// Catches names in quotes that are cut at a comma, a blank or a quote in them: their labels went to
// a record without a title, their records were kept, or in no part.
static void test_quoted_names(void) {
    static const char head[] = SD_HEAD;
    char *sdf = xprintf("1,2-%s$$$$\n%s$$$$\nx \"y\"%s$$$$\n", head, head + 1, head + 1);
    write_bytes("build/t.sdf", sdf, strlen(sdf));
    free(sdf);
    test_table("build/t.csv", "title,a\n\"1,2-x\",5\n\"x \"\"y\"\"\",6\n", "./data_prep -o "
               "build/t.bin --labels a --labels-from build/t.csv build/t.sdf" T_DUMP, 0,
               "5]}null]}6]}");
    test_table("build/t.txt", "\"1,2-x\"\n\"x \"\"y\"\"\"\n", "./data_prep -o build/t.bin "
               "--skip-list build/t.txt build/t.sdf", 0, "2  in --skip-list");
    test_table("build/t.txt", "\"1,2-x\", train\n2,valid\n\"x \"\"y\"\"\",test\n",
               "./data_prep -o 'build/t.{}.bin' --split-by file:build/t.txt build/t.sdf", 0,
               "test            1 molecules");
    test_table("build/t.txt", "\"1,2-x\"\ttrain\n2 valid\n\"x \"\"y\"\"\" test\n",
               "./data_prep -o 'build/t.{}.bin' --split-by file:build/t.txt build/t.sdf", 0,
               "test            1 molecules");
    test_table("build/t.txt", "\"1,2-x\" train\n\"2,0\" test\n\"x \"\"y\"\"\"\n", "./data_prep "
               "-o 'build/t.{}.bin' --split-by file:build/t.txt build/t.sdf", 0,
               "15: expected train, valid or test, found \"\"");
    test_table("build/t.txt", "\"1,2-x\" train\n\"2,0\" test\n", "./data_prep -o "
               "'build/t.{}.bin' --split-by file:build/t.txt build/t.sdf", 0,
               "train           1 molecules");
}

static void test_tables(void) {
    test_preparation();
    test_table_shapes();
    test_table_pipes();
    test_quoted_names();
    test_odd_classes();
    test_lists();
}
