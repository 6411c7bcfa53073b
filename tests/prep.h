// tests/prep.h - data_prep: faults, hostile records and files, fields, splits, threads

// Catches a bad record being accepted, or blamed on the wrong line, column or reason.
static void test_faults(Worker *w) {
    Outcome o;
    for (size_t k = 0; k < sizeof PREP_FAULTS / sizeof *PREP_FAULTS; k++) {
        const char *text = PREP_FAULTS[k].text;
        int kept = prep_convert(w, PREP_FAULTS[k].format, text, &o);
        test_check(!kept && o.fault.line == PREP_FAULTS[k].line &&
                   o.fault.column == PREP_FAULTS[k].column &&
                   strcmp(o.fault.text, PREP_FAULTS[k].message) == 0,
                   "\"%s\": got %s at %d:%d, expected %s at %d:%d", text,
                   kept ? "a molecule" : o.fault.text, o.fault.line, o.fault.column,
                   PREP_FAULTS[k].message, PREP_FAULTS[k].line, PREP_FAULTS[k].column);
    }
    // Catches a record that the reader refuses being written: it would cost the whole dataset.
    prep_convert(w, FORMAT_SMI, "CC", &o);
    size_t used = w->bytes.length;
    w->molecule.bond_code[0] = BOND_CODES;
    store_molecule(w, &o);
    test_check(w->bytes.length == used && strcmp(o.fault.text, "bond feature out of range") == 0,
               "an unreadable record was kept: \"%s\"", o.fault.text);
}

// Writes a pattern to *out up to its end or an unpaired }, and returns that place. {N|text} is text
// N times, # in it (but not outside) the number of the time; such groups may be nested.
static const char *prep_expand(const char *p, int number, char **out) {
    for (; *p && *p != '}'; p++) {
        if (*p == '#' && number) {
            *out += sprintf(*out, "%d", number);
        } else if (*p == '{') {
            char *end;
            int count = (int)strtol(p + 1, &end, 10);
            for (int k = 1; k <= count; k++) p = prep_expand(end + 1, k, out);
        } else {
            *(*out)++ = *p;
        }
    }
    **out = 0;
    return p;
}

enum { PREP_TEXT_MAX = 40 << 20 };

// SMILES that took too long or too much memory once, or passed for something else, and what becomes
// of them ("": kept) with so many MiB of memory.
static const struct { const char *catches, *pattern, *kind; int most; } PREP_HOSTILE[] = {
    {"hours for two atoms with 509 common neighbours", "[Fe]{509|(C%(#))}.[U]{509|%(#)}",
     "too intricate", 10},
    {"a minute for the CIP ranks of a long peptide", "N{13000|[C@@H](C)C(=O)N}",
     "too intricate", 30},
    {"memory that grows with the square of a ladder", "C1C{4000|C2C1C1C2}CC1", "", 10},
    {"as much memory as there are ring numbers", "C{4000000|1}", "too intricate", 200},
    {"ring numbers times neighbours of a centre", "[C@](F){50000|%(#)}{50000|.C%(#)}",
     "too intricate", 20},
    {"the square of the hydrogens of a centre", "[Fe@]{30000|([H])}C", "too intricate", 20},
    {"the square of the double bonds of an atom", "[U]{30000|(=CC)}C", "too intricate", 30},
    {"a ring sorted by insertion", "C1{65000|C}1", "too intricate", 30},
    {"260 hydrogen atoms counted as 4", "C{260|([H])}", "valence too high", 10},
    {"too many bonds called too many atoms", "[Fe]{40000|(C%(#))}.[U]{40000|%(#)}",
     "too many bonds", 30},
};

// Catches records that hang the run, and a verdict that depends on what was converted before.
static void test_hostile_records(void) {
    char *text = xmalloc(PREP_TEXT_MAX, 1);
    Outcome o;
    for (size_t k = 0; k < sizeof PREP_HOSTILE / sizeof *PREP_HOSTILE; k++) {
        Worker w = {0};
        char *end = text;
        prep_expand(PREP_HOSTILE[k].pattern, 0, &end);
#if MB_POSIX
        alarm(900);  // ends the test if this one hangs, under an emulator on a busy machine too
#endif
        int kept = prep_convert(&w, FORMAT_SMI, text, &o);
        int64_t left = w.mol.arena.left;
        test_check(strcmp(kept ? "" : o.fault.kind, PREP_HOSTILE[k].kind) == 0, "%s: got \"%s\"",
                   PREP_HOSTILE[k].catches, kept ? "" : o.fault.kind);
        mol_clear(&w.mol);  // the base grows to what was needed
        test_check(w.mol.arena.room >> 20 < (size_t)PREP_HOSTILE[k].most, "%s: %zu bytes",
                   PREP_HOSTILE[k].catches, w.mol.arena.room);
        if (kept) prep_convert(&w, FORMAT_SMI, text, &o);
        test_check(!kept || left == w.mol.arena.left, "%s: the steps depend on the arena",
                   PREP_HOSTILE[k].catches);
        worker_free(&w);
    }
#if MB_POSIX
    alarm(0);
#endif
    free(text);
}

#define NAMED "build/test_hostile."
#define SD_HEAD "x\n\n\n  1  0  0     0  0            999 V2000\n" \
                "    0.0000    0.0000    0.0000 C   0  0\nM  END\n"

#define DUMP " && ./data_prep --dump build/test_hostile.bin"
#define MOL_3D "\n  test              3D\n\n  2  1  0     0  0            999 V2000\n" \
    "    0.0000    0.0000    1.0000 C   0  0\n    1.0000    0.0000    0.5000 O   0  0\n" \
    "  1  2  1\nM  END\n"
// Files that ended or misled a run: their ending, pattern, options for data_prep, its exit code and
// what it says.
static const struct { const char *ending, *pattern, *options; int code; const char *expected;
} PREP_FILES[] = {
    // 57 GiB for a row: every quoted field took room for all that follow it
    {"csv", "smiles{4001|,c#}\nC{4000|,\"1\"},\"{15000000|x}\"\n", "--labels c1", 0, "1 molecules"},
    // an open quote swallowed all rows behind it and was called a malformed SMILES
    {"csv", "smiles,y,z\nC,1,a\nCC,2,\"oops\n{50|C},3,b\nCCC,4,c\n", "--labels y", 0,
     NAMED "csv:3: column 6: the quote that opens here is never closed"},
    {"csv", "smiles,z,y\nC,\"a\nb\",1\n\"CC,2\nCCC,4,c\n", "", 0, "csv:4: column 1: the quote"},
    {"csv", "smiles,z,y\nC,\"a\nb\",1\n\"CC,2\nCCC,4,c\n", "", 0, "kept 2 (4 atoms)"},
    {"csv", "smiles,\"y\nC,2\n", "", 1, "csv:1: the header has a quote that is never closed"},
    // the rest of a line that is too long was a record of its own
    {"smi", "C {30000000|x}\nCC\nC(\n", "", 0, "read 3 records from 1 file, kept 1"},
    {"smi", "C {30000000|x}\nCC\nC(\n", "", 0, "smi:3: column 3: expected an atom, found the end"},
    {"sdf", SD_HEAD "{3000000|> <y>\n1\n\n}$$$$\n" SD_HEAD "$$$$\n", "", 0, "read 2 records"},
    // the last of two columns was taken
    {"csv", "smiles,y,y\nC,1,2\n", "--labels y", 1, "columns 2 and 3 are both named \"y\"; rename"},
    {"csv", "smiles,SMILES\nC,C\n", "", 1, "columns 1 and 2 are both named \"SMILES\"; rename"},
    {"csv", "smiles,SMILES\nC,CCC\n", "--smiles SMILES", 0, "kept 1 (3 atoms)"},
    {"csv", "smiles,y,y\nC,1,2\n", "--labels all", 0, "leaves out column 3: another has its name"},
    {"csv", "smiles,n,n\nC,a,b\n", "--name n", 0, "2 columns are named \"n\": the first is taken"},
    {"csv", "My table\nsmiles,y\nC,1\n", "", 1, "which the row below names; type: tail -n +2 "
     NAMED "csv |"},
    // a header with other separators in its names
    {"csv", "\"Name\",\"Structure\",\"a;b;c;d\"\n\"x\",\"CCO\",\"19.4\"\n", "--labels all --smiles "
     "Structure", 0, "label   a;b;c;d: numbers, 1 present"},
    {"csv", "\"Name\",\"Structure\",\"a;b;c;d\"\n\"x\",\"CCO\",\"19.4\"\n", "", 1,
     "it has \"Name\", \"Structure\", \"a;b;c;d\""},
    {"csv", "smiles,\"sol\" (mg/L),y\nCC,1,2\n", "--labels y", 0, "label   y: numbers, 1 present"},
    {"csv", "smiles{5000|,c#},x,x\nC{5000|,1},,2\nC{5000|,1},,3\n", "--labels all", 0,
     "leaves out column 5003: another has its name"},
    {"csv", "smiles{30|,}\nC\n", "--labels all", 1, "leaves out 10 more such"},
    // signs at the ends of a SMILES that nobody sees
    {"csv", "smiles\n\"CCO\nCCO\"\nCCO\xC2\xA0\n\xE2\x80\x8B" "CCO\nCCO\x1A\n", "", 0,
     "kept 4 (12 atoms)"},
    {"sdf", SD_HEAD "> < y >\n1.5\n\n$$$$\n", "--labels y --name z", 0,
     "has an SD tag \"z\" (--name); the first has: y\n"},
    {"sdf", SD_HEAD "> < y >\n1.5\n\n$$$$\n", "--labels y", 0, "label   y: numbers, 1 present"},
    {"xlsx", "PK\3\4", "", 1, NAMED "xlsx: is a workbook; save it as CSV"},
    // a line break in a task's name shifted the columns of `predict`
    {"csv", "smiles,\"a\nb\"\nC,1\n", "--labels 'a b'", 0, "1 molecules"},
    // columns and labels went without a word
    {"csv", "smiles,n,y,e\nC,7,1,\nCC,x,2,\n", "--labels all", 0,
     "label   n: numbers, 1 present, 1 missing\n          1 unusable: \"x\" (" NAMED "csv:3)\n"},
    {"csv", "smiles,n,y,e\nC,7,1,\nCC,x,2,\n", "--labels all", 0, "leaves out \"e\": no values\n"},
    {"sdf", SD_HEAD "> <n>\nx\n\n> <y>\n1\n\n$$$$\n", "--labels all", 0,
     "leaves out \"n\": 1 of 1 cells are no numbers, the first is \"x\" (" NAMED "sdf:8)\n"},
    {"csv", "smiles,y\nC,1e31\nCC,2\n", "--labels y", 0,
     "labels that are no numbers up to 1e+15, taken as missing: 1"},
    // looked up every tag among all labels
    {"sdf", "{300|" SD_HEAD "{4000|> <t#>\n1\n\n}$$$$\n}", "--labels all", 0, "300 molecules"},
    // no text
    {"sdf.gz", "\x1F\x8B\x08", "", 1, NAMED "sdf.gz: is compressed by gzip; type: gzip -dc " NAMED
     "sdf.gz | ./data_prep --format sdf ... -"},
    {"xz", "\xFD" "7zXZ", "", 1, "type: xz -dc " NAMED "xz | ./data_prep --format FORMAT ... -"},
    {"csv", "PK\3\4", "", 1, "a zip archive; type: unzip -p " NAMED "csv"},
    {"csv", "\xFF\xFEs", "", 1, "UTF-16 text; type: iconv -f UTF-16 -t UTF-8 " NAMED "csv"},
    // a byte order mark was part of the SMILES
    {"smi", "\xEF\xBB\xBF" "C\n", "", 0, "1 molecules"},
    // names that make bad JSON; rows and tags misread; wrong counts; options that are not checked
    {"smi", "C a\"b\\\x01\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80", DUMP, 0,
     "{\"name\":\"a\\\"b\\\\\\u0001\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\",\"atom_feat\":[["},
    // not UTF-8: a lone byte, too long forms, a surrogate, beyond the last one, cut short
    {"smi", "C \xFF\x80\xC1\xBF", DUMP, 0, "\"\\u00ff\\u0080\\u00c1\\u00bf\""},
    {"smi", "C \xE0\x9F\xBF\xED\xA0\x80", DUMP, 0,
     "\"\\u00e0\\u009f\\u00bf\\u00ed\\u00a0\\u0080\""},
    {"smi", "C \xF0\x8F\x80\x80\xF4\x90\x80\x80", DUMP, 0,
     "\"\\u00f0\\u008f\\u0080\\u0080\\u00f4\\u0090\\u0080\\u0080\""},
    {"smi", "C \xE2\x82 \xC3", DUMP, 0, "\"\\u00e2\\u0082 \\u00c3\""},
    {"smi", "C a\nCC b\nCCC c\n", DUMP " --range 1:2", 0, "{\"name\":\"b\""},
    {"smi", "C a\nCC b\nCCC c\n", DUMP " --range 2:", 0, "{\"name\":\"c\""},
    {"smi", "C\n", DUMP " --range 2", 1, "expected A:B with A <= B, found \"2\""},
    {"smi", "C\n", DUMP " --range 2:1", 1, "--range: expected A:B with A <= B"},
    {"smi", "C\n", DUMP " --range=-1:2", 1, "expected A:B with A <= B, found \"-1:2\""},
    {"smi", "SMILES name\n\n# C\nC |x:0| a\nCC |y\n \nCCC\n", DUMP, 0,
     "read 3 records from 1 file, kept 2"},  // RDKit, too, refuses an extension that does not end
    {"smi", "SMILES name\n\n# C\nC |x:0| a\nCC |y\n \nCCC\n", DUMP, 0, "{\"name\":\"CCC\""},
    {"smi", "C(\nC[\nxyz\nC=\nCC\n[CH9]\n", "", 0, "skipped 5:\n       4  malformed SMILES\n"},
    {"smi", "C(\nC[\nxyz\nC=\nCC\n[CH9]\n", "", 0, NAMED "smi:6: atom 1 (C)"},
    {"smi", "C\nC(\n", "--strict", 1, "data_prep: " NAMED "smi:2: column 3: expected an atom"},
    {"smi", "CCC\n", "--max-atoms 2", 1, "3 atoms, --max-atoms is 2"},
    {"csv", "\xEF\xBB\xBFid,SMILES,a,b,c,d\nx,C,1,w,,?\ny,CC,,2,,2e3\n",
     "--labels all --name id" DUMP, 0, "\"pos\":null,\"labels\":[1,null,null]}\n{\"name\":\"y\""},
    {"csv", "smiles,a\nC,1234567890123456789012345678901234567890123456789012345678901234567\n"
     "CC,1\nC\n", "--labels a", 0, "taken as missing: 1"},
    {"csv", "a,smiles,b\n1,C\n2\n3,CC,4\n", "--labels b" DUMP, 0,
     "expected a SMILES in field 2, found 1 fields"},
    {"csv", "smiles,a\nC,1\n", "--labels a,b", 1, NAMED "csv:1: expected a column \"b\""},
    {"csv", "smiles,a\nC,1\n", "--name id", 1, "expected a column \"id\" (--name)"},
    {"csv", "x,a\nC,1\n", "", 1, "expected a column \"smiles\"; name the SMILES column"},
    {"csv", "x,a\nC,1\n", "--smiles x --labels ,", 1, "expected names separated by commas"},
    {"csv", "x,a\nC,\n", "--smiles x --labels a", 1, "no record has a value for \"a\""},
    {"tsv", "\"smi\"\"les\"\ta\n\"C\"x\t1\n", "--smiles 'smi\"les' --labels all", 1,
     "no molecule"},
    {"sdf", MOL_3D "> <id>\nm1\n\n> <a>\n1\n\n> <w>\nx\n\n$$$$\n" MOL_3D "><>\n> <a>\n$$$$\n",
     "--labels all --name id --orient principal" DUMP, 0, "{\"name\":\"m1\""},
    {"sdf", MOL_3D "> <id>\nm1\n\n> <a>\n1\n\n> <w>\nx\n\n$$$$\n" MOL_3D "><>\n> <a>\n$$$$\n",
     "--labels all --name id" DUMP, 0, "0,0,1],[1,0,0.5]],\"labels\":[null]}"},
    {"smi", "C\nCC\nc1ccccc1\n", "--split 0.5,0.5", 0, "valid           2 molecules"},
    {"smi", "C\nCC\nc1ccccc1\n", "--split 0.5,0.5 --split-by order", 0, "valid           2"},
    {"smi", "C\n", "--split 0.5", 1, "expected 2 or 3 fractions that add up to 1"},
    {"smi", "C\n", "--split 0.5,0.6", 1, "expected 2 or 3 fractions that add up to 1"},
    {"smi", "C\n", "--split 0.5,x", 1, "expected 2 or 3 fractions that add up to 1"},
    {"smi", "C\n", "--split 2,-1", 1, "expected 2 or 3 fractions that add up to 1"},
    {"smi", "C\n", "--split 0.1,0.1,0.1,0.7", 1, "expected 2 or 3 fractions that add up to 1"},
    {"smi", "C\n", "--split 0.5,0.5 --split-by name", 1, "expected scaffold, random, order"},
    {"smi", "C\n", "--orient up", 1, "--orient: expected keep or principal"},
    {"smi", "C\n", "-o 'build/{}.bin'", 1, "-o: {} stands for a part's name"},
    {"mol2", "C\n", "", 1, "cannot tell the format; give"},
    {"smi", "C\n", "--format mol2", 1, "cannot tell the format from --format mol2"},
};

static void test_hostile_files(void) {
    char *text = xmalloc(PREP_TEXT_MAX, 1), *end;
    for (size_t k = 0; k < sizeof PREP_FILES / sizeof *PREP_FILES; k++) {
        char *path = xprintf(NAMED "%s", PREP_FILES[k].ending);
        prep_expand(PREP_FILES[k].pattern, 0, (end = text, &end));
        write_bytes(path, text, (size_t)(end - text));
        test_format(PREP_FILES[k].code, PREP_FILES[k].expected, "ulimit -t 90; ./data_prep -o "
                    "build/test_hostile.bin %s %s", path, PREP_FILES[k].options);
        remove(path);
        free(path);
    }
    free(text);
}

// Catches a number reader that rounds other than strtod.
static void test_decimals(void) {
    int wrong = 0, wrong_fixed = 0;
    char text[64];
    double x;
    for (uint32_t k = 0; k < 20000; k++) {
        double v = ((double)rng_bits(1, RNG_SHUFFLE, 0, 0, k) - 2e9) * pow(10, -(double)(k % 12));
        snprintf(text, sizeof text, "%*.*f", (int)(k % 20), (int)(k % 18), v);
        wrong += parse_decimal((Span){text, (int)strlen(text)}) != strtod(text, NULL);
        snprintf(text, sizeof text, "%10.4f ", fmod(v, 999));
        if (fixed_decimal(text, &x))
            wrong_fixed += x != strtod(text, NULL) || !signbit(x) != !strchr(text, '-');
    }
    test_check(wrong == 0 && wrong_fixed == 0, "%d and %d numbers differ from strtod", wrong,
               wrong_fixed);
    static const char *const odd[] = {"1e3", " +2.5x", "-.5", "5.", "", "abc",
                                      "1.7976931348623157e308", "123456789012345678901234567890",
                                      "0.1234567890123456789"};
    for (int k = 0; k < 9; k++)
        test_check(parse_decimal((Span){odd[k], (int)strlen(odd[k])}) == strtod(odd[k], NULL),
                   "parse_decimal(\"%s\")", odd[k]);
}

// Writes text to a file, reads it back as records, and returns how many there are; sizes into n.
static int prep_cut(const char *name, const char *text, size_t length, size_t *sizes) {
    static Record records[CHUNK_RECORDS];
    Source s;
    int n = 0, got;
    write_bytes(name, text, length);
    source_open(&s, name, NULL, NULL);
    while ((got = next_records(&s, records)) > 0)
        for (int k = 0; k < got; k++) sizes[n++] = records[k].size;
    source_close(&s, 0);
    remove(name);
    return n;
}

// Catches records cut at the wrong place, by line ends, quotes or the borders of the buffer.
static void test_records(void) {
    static const struct { const char *file, *text; int n; size_t last; } cases[] = {
        {"test.tmp.sdf", "a\n$$$$\nb\n$$$$\n", 2, 7}, {"test.tmp.sdf", "a\n$$$$\nb", 2, 1},
        {"test.tmp.sdf", "a\r\n$$$$\r\nb\r\n$$$$", 2, 7}, {"test.tmp.sdf", "a\n$$$$\n\n \n", 1, 7},
        {"test.tmp.sdf", "a$$$$\n$$$\n$$$$x\nb\n", 2, 2}, {"test.tmp.sdf", "", 0, 0},
        {"test.tmp.csv", "a,b\nc,\"d\ne\"\nf", 3, 1},
        {"test.tmp.csv", "a,\"\"\"\n\",b\r\nc\n", 2, 2},
        {"test.tmp.csv", "a,b\"c\nd\"\n", 2, 3}, {"test.tmp.tsv", "a\t\"b\nc\"\nd\n", 2, 2},
        {"test.tmp.smi", "C\nCC", 2, 2}, {"test.tmp.smi", "C\r\n\r\nCC\r\n", 3, 4}};
    static size_t sizes[1 << 16];
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        int n = prep_cut(cases[k].file, cases[k].text, strlen(cases[k].text), sizes);
        test_check(n == cases[k].n && (n == 0 || sizes[n - 1] == cases[k].last),
                   "\"%s\": %d records, the last of %zu bytes", cases[k].text, n,
                   n ? sizes[n - 1] : 0);
    }
    size_t length = 0, sum = 0, room = 3 * (size_t)CHUNK_BYTES;  // records across buffer borders
    char *text = xmalloc(room, 1);
    int n = 0;
    for (; length + 70000 < room; n++) {
        size_t size = 5 + rng_bits(2, RNG_SHUFFLE, 0, 0, (uint32_t)n) % 3000;
        memset(text + length, n % 100 == 7 ? '$' : 'x', size);
        memcpy(text + length + size, "\n$$$$\n", 6);
        text[length] = 'a';
        length += size + 6;
    }
    int got = prep_cut("test.tmp.sdf", text, length, sizes);
    for (int k = 0; k < got; k++) sum += sizes[k];
    test_check(got == n && sum == length, "%d records of %d, %zu bytes of %zu", got, n, sum,
               length);
    free(text);
}

// Catches misread CSV cells, labels, tags and names, and parts that overwrite each other.
static void test_fields(Worker *w) {
    static const struct { const char *text; float label; int ok; } labels[] = {
        {"1.5", 1.5f, 1}, {" -2e3 ", -2000, 1}, {"", NAN, 1}, {"NaN", NAN, 1}, {"n/a", NAN, 1},
        {"acting", NAN, 0}, {"1e99", NAN, 0}, {"inf", NAN, 0}, {"0x10", NAN, 0}, {"1 2", NAN, 0}};
    for (int k = 0; k < 10; k++) {
        float label;
        int form, n = (int)strlen(labels[k].text);
        int ok = parse_label((Span){labels[k].text, n}, 0, &label, &form) != CELL_BAD;
        test_check(ok == labels[k].ok && (isnan(labels[k].label) ? isnan(label)
                                                                 : label == labels[k].label),
                   "label \"%s\"", labels[k].text);
    }
    Outcome o;
    const char *row = "CCO,\"the \"\"name\"\"\",3.5,x\r\n";
    test_check(prep_convert(w, FORMAT_CSV, row, &o) && w->molecule.n_atoms == 3 &&
               w->molecule.labels[0] == 3.5f && strcmp(w->molecule.name, "the \"name\"") == 0,
               "a CSV row with quotes: %s", w->molecule.name);
    const char *line = "CC |c:0| ethane\n";
    test_check(prep_convert(w, FORMAT_SMI, line, &o) &&
               strcmp(w->molecule.name, "ethane") == 0, "name behind a CXSMILES extension");
    Span name, value;
    const char *tags = "> <A>\n1\n2\n\n>  25 <B> (x)\n\n> <C>\n$$$$\n";
    Lines in = {tags, tags + strlen(tags), 0};
    int n = 0;
    for (; next_tag(&in, &name, &value); n++)
        test_check(span_is(name, n == 0 ? "A" : n == 1 ? "B" : "C") &&
                   span_is(value, n == 0 ? "1\n2" : ""), "tag %d", n);
    test_check(n == 3, "%d tags of 3", n);
    static const char *const paths[][3] = {
        {"x.{}.bin", "valid", "x.valid.bin"}, {"{}.bin", "test", "test.bin"},
        {"train.bin", "valid", "valid.bin"}, {"a.d/data.bin", "train", "a.d/data.train.bin"},
        {"train/x", "test", "train/x.test"}};
    for (int k = 0; k < 5; k++) {
        char *path = part_path(paths[k][0], paths[k][1]);
        test_check(strcmp(path, paths[k][2]) == 0, "part path %s, expected %s", path, paths[k][2]);
        free(path);
    }
}

// Catches a principal frame that depends on how the molecule lay, or that mirrors it.
static void test_orientation(Worker *w) {
    ChemMol *m = &w->mol;
    double pos[2][6][3], error = 0, moment[2] = {0};
    for (int turn = 0; turn < 2; turn++) {
        mol_clear(m);
        for (int i = 0; i < 6; i++) {
            mol_add_atom(m, 6);
            double p[3];
            for (int k = 0; k < 3; k++)
                p[k] = (3.0 - k) * (double)rng_uniform(3, RNG_NOISE, 0, 0, (uint32_t)(3 * i + k));
            double c = cos(1.0), s = sin(1.0);
            double q[3] = {c * p[0] - s * p[1] + 5, s * p[0] + c * p[1] - 2, p[2] + 1};
            double r[3] = {q[0], c * q[1] - s * q[2], s * q[1] + c * q[2]};
            memcpy(m->xyz[i], turn ? r : p, sizeof r);
        }
        orient_principal(m);
        memcpy(pos[turn], m->xyz, sizeof pos[turn]);
    }
    for (int i = 0; i < 6; i++)
        for (int k = 0; k < 3; k++) {
            error = fmax(error, fabs(pos[0][i][k] - pos[1][i][k]));
            if (k < 2) moment[k] += pos[0][i][k] * pos[0][i][k] * pos[0][i][k];
        }
    test_check(error < 1e-9, "principal frame: a turned molecule differs by %.1e", error);
    test_check(moment[0] > 0 && moment[1] > 0, "principal frame: third moments");
}

// Catches equal scaffolds told apart, different ones confused, and groups in the wrong part.
static void test_scaffolds(Worker *w) {
    static const char *const groups[][4] = {
        {"CCO", "C=CC", "[Na+]", NULL},
        {"c1ccccc1", "Cc1ccccc1", "OC(=O)c1ccc(N)cc1", "C[C@H](N)c1ccccc1"},
        {"C1CCCCC1", "CC1CCCCC1", "C[C@H]1CC[C@@H](C)CC1", NULL},
        {"O=C1CCCCC1", "CC1CCCCC1=O", NULL, NULL},
        {"c1ccccc1Cc1ccccc1", "Cc1ccccc1C(C)c1ccccc1O", NULL, NULL},
        {"c1ccc2ccccc2c1", "Cc1ccc2ccccc2c1", NULL, NULL},
        {"C1CCC2CCCCC2C1", NULL, NULL, NULL}, {"C1CCCC1C1CCCC1", NULL, NULL, NULL},
        {"c1cc[nH]c1", "Cn1cccc1", NULL, NULL}, {"n1ccccc1", NULL, NULL, NULL},
        {"C1CCCC[CH2:2147483647]1", NULL, NULL, NULL}};  // an overflow once
    ScaffoldKey key[11][4], all[10];
    Outcome o;
    for (int g = 0; g < 11; g++) {
        for (int k = 0; k < 4 && groups[g][k]; k++) {
            prep_convert(w, FORMAT_SMI, groups[g][k], &o);
            key[g][k] = scaffold_key(&w->mol);
            test_check(key[g][k].a == key[g][0].a && key[g][k].b == key[g][0].b,
                       "scaffolds of %s and %s", groups[g][0], groups[g][k]);
        }
        for (int h = 0; h < g; h++)
            test_check(key[g][0].a != key[h][0].a || key[g][0].b != key[h][0].b,
                       "scaffolds of %s and %s are equal", groups[g][0], groups[h][0]);
    }
    const int group_of[10] = {0, 1, 0, 2, 1, 0, 3, 1, 0, 4};
    const uint8_t expected[10] = {0, 0, 0, 2, 0, 0, 1, 0, 0, 0};  // 4 + 3 + the last single one
    const double fraction[3] = {0.8, 0.1, 0.1};
    uint8_t part[10];
    for (int i = 0; i < 10; i++) all[i] = key[group_of[i]][0];
    split_by_scaffold(part, all, 10, fraction, 3);
    test_check(memcmp(part, expected, 10) == 0, "scaffold split %d%d%d%d%d%d%d%d%d%d", part[0],
               part[1], part[2], part[3], part[4], part[5], part[6], part[7], part[8], part[9]);
}

// Catches wrong fractions, and a random split that a seed does not fix.
static void test_split_fractions(void) {
    enum { N = 1001 };
    const double fraction[3] = {0.8, 0.1, 0.1};
    uint8_t part[N], again[N];
    uint32_t order[N];
    int count[3] = {0}, changes = 0;
    split_by_order(part, N, NULL, fraction, 3);
    for (int i = 0; i < N; i++) {
        count[part[i]]++;
        changes += i > 0 && part[i] != part[i - 1];
    }
    test_check(count[0] == 800 && count[1] == 100 && count[2] == 101 && changes == 2,
               "split by order: %d, %d, %d", count[0], count[1], count[2]);
    rng_permutation(order, N, 7, RNG_SPLIT, 0);
    split_by_order(part, N, order, fraction, 3);
    rng_permutation(order, N, 7, RNG_SPLIT, 0);
    split_by_order(again, N, order, fraction, 3);
    test_check(memcmp(part, again, N) == 0, "the same seed gives the same split");
    rng_permutation(order, N, 8, RNG_SPLIT, 0);
    split_by_order(again, N, order, fraction, 3);
    test_check(memcmp(part, again, N) != 0, "another seed gives another split");
}

// Catches a pointer kept across an array's growth: long chains in fresh memory.
static void test_growth(void) {
    enum { N = 500 };
    char *text = xmalloc(N * 100, 1), smiles[N + 1];
    size_t n = (size_t)sprintf(text, "\n\n\n%3d%3d  0  0  0  0  0  0  0  0999 V2000\n", N, N - 1);
    for (int i = 0; i < N; i++)
        n += (size_t)sprintf(text + n, "%10.4f    0.0000    0.0000 C   0  0\n", 1.5 * i);
    for (int i = 1; i < N; i++) n += (size_t)sprintf(text + n, "%3d%3d  1  0\n", i, i + 1);
    sprintf(text + n, "M  END\n");
    memset(smiles, 'C', N);
    smiles[N] = 0;
    for (int k = 0; k < 2; k++) {
        Worker w = {0};
        Outcome o;
        const char *record = k ? smiles : text;
        int kept = prep_convert(&w, k ? FORMAT_SMI : FORMAT_SDF, record, &o);
        test_check(kept && w.molecule.n_atoms == N && w.molecule.n_bonds == N - 1,
                   "a chain of %d atoms from a %s", N, k ? "SMILES" : "mol block");
        worker_free(&w);
    }
    free(text);
}

// Catches records that depend on the number of threads.
static void test_threads(void) {
    enum { N = (int)(sizeof PREP_SMILES / sizeof *PREP_SMILES) };
    static Record records[20 * N];
    static Outcome outcomes[20 * N];
    uint32_t crc[3];
    PrepOptions opt = {.max_atoms = 512};
    Conversion c = {.opt = &opt};
    Source s = {.path = "test", .format = FORMAT_SMI, .name_column = -1};
    for (int k = 0; k < 20 * N; k++)
        records[k] = (Record){PREP_SMILES[k % N].smiles, strlen(PREP_SMILES[k % N].smiles), 0,
                              NULL, 1};
    for (int t = 0; t < 3; t++) {
#ifdef _OPENMP
        int before = omp_get_max_threads();
        omp_set_num_threads(1 << t);
#endif
        Worker *workers = xmalloc(8, sizeof *workers);
        convert_records(&c, &s, records, 20 * N, workers, outcomes);
        crc[t] = 0;
        for (int k = 0; k < 20 * N; k++)
            if (outcomes[k].ok)
                crc[t] = crc32_add(crc[t], (uint8_t *)workers[outcomes[k].worker].bytes.text +
                                               outcomes[k].offset, outcomes[k].size);
        for (int k = 0; k < 8; k++) worker_free(&workers[k]);
        free(workers);
#ifdef _OPENMP
        omp_set_num_threads(before);
#endif
    }
    test_check(crc[0] == crc[1] && crc[1] == crc[2], "1, 2 and 4 threads: %08x %08x %08x",
               (unsigned)crc[0], (unsigned)crc[1], (unsigned)crc[2]);
}

// The quick ones of data_prep's tests.
static void test_molecules(void) {
    Worker w = {0};
    test_perception(&w);
    test_faults(&w);
    test_decimals();
    test_records();
    test_fields(&w);
    test_orientation(&w);
    test_scaffolds(&w);
    test_split_fractions();
    test_growth();
    worker_free(&w);
}

// What takes its time: hostile records and files, threads.
static void test_data_prep(void) {
    test_hostile_records();
    test_hostile_files();
    test_threads();
}
