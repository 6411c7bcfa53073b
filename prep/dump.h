// prep/dump.h - a dataset as JSON, one object a line
//
//   dump_dataset()   prints it, or a range of it

// A JSON string. Bytes that are not UTF-8 are taken for Latin-1.
static void print_json_string(const char *text, int n) {
    const unsigned char *p = (const unsigned char *)text;
    putchar('"');
    for (int k = 0; k < n;) {
        int length = utf8_length(p + k, n - k);
        if (p[k] == '"' || p[k] == '\\') printf("\\%c", p[k]);
        else if (p[k] < 32 || p[k] == 127 || length == 0) printf("\\u%04x", p[k]);
        else fwrite(p + k, 1, (size_t)length, stdout);
        k += length ? length : 1;
    }
    putchar('"');
}

// One molecule as a line of JSON, numbers with enough digits to be read back exactly.
static void print_json(const Molecule *m) {
    printf("{\"name\":");
    print_json_string(m->name, m->name_length);
    printf(",\"atom_feat\":[");
    for (int i = 0; i < m->n_atoms; i++) {
        printf("%s[", i ? "," : "");
        for (int k = 0; k < ATOM_FEATURES; k++)
            printf("%s%d", k ? "," : "", m->atom_feat[ATOM_FEATURES * i + k]);
        printf("]");
    }
    printf("],\"bonds\":[");
    for (int b = 0; b < m->n_bonds; b++) {
        int code = m->bond_code[b];
        printf("%s[%d,%d,%d,%d,%d]", b ? "," : "", m->bonds[2 * b], m->bonds[2 * b + 1], code / 12,
               code / 2 % 6, code % 2);
    }
    printf("],\"pos\":%s", m->has_pos ? "[" : "null");
    for (int i = 0; i < m->n_atoms && m->has_pos; i++) {
        const float *x = m->pos + 3 * i;
        printf("%s[%.9g,%.9g,%.9g]", i ? "," : "", (double)x[0], (double)x[1], (double)x[2]);
    }
    printf("%s,\"labels\":[", m->has_pos ? "]" : "");
    for (int t = 0; t < m->n_tasks; t++) {
        if (isnan(m->labels[t])) printf("%snull", t ? "," : "");
        else printf("%s%.9g", t ? "," : "", (double)m->labels[t]);
    }
    printf("]}\n");
}

// Prints molecules A to B-1 of a dataset; range is "A:B", either may be missing.
static void dump_dataset(const char *path, const char *range) {
    Dataset d;
    Molecule m = {0};
    long long from = 0, to = LLONG_MAX;
    if (range) {
        char *end;
        from = strtoll(range, &end, 10);
        int fits = *end == ':' && from >= 0;
        if (fits && end[1]) to = strtoll(end + 1, &end, 10), fits = *end == 0 && to >= from;
        CHECK(fits, "--range: expected A:B with A <= B, found \"%s\"", range);
    }
    dataset_open(&d, path);
    for (size_t i = (size_t)from; i < d.count && (long long)i < to; i++) {
        dataset_read(&d, i, &m);
        print_json(&m);
    }
    molecule_free(&m);
    dataset_close(&d);
}
