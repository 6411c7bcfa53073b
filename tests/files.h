// tests/files.h - datasets and checkpoints as files; the parameter table

// Writes n molecules as a dataset and frees them.
static void write_molecules(const char *path, Molecule *m, int n, int n_tasks, char *const *tasks) {
    DatasetWriter w;
    dataset_create(&w, path, n_tasks, tasks);
    for (int i = 0; i < n; i++) {
        uint8_t *record = xmalloc(record_size(m[i].n_atoms, m[i].n_bonds, n_tasks,
                                              m[i].name_length, m[i].has_pos), 1);
        dataset_append(&w, record, record_encode(record, &m[i]), (uint32_t)i + 1);
        molecule_free(&m[i]);
        free(record);
    }
    dataset_finish(&w);
    free(m);
}

// Writes a dataset of n random molecules with two tasks; moved: one atom of each elsewhere.
static void write_test_dataset(const char *path, int n, int moved) {
    static char logp[] = "logP", name[] = "with,comma";
    Molecule *m = xmalloc((size_t)n, sizeof *m);
    remove(path);  // a test may have damaged it
    for (int i = 0; i < n; i++) {
        random_molecule(&m[i], 1 + i * 5 % 23, 1 + i % 2, i % 7 != 3, (uint32_t)i);
        if (moved) m[i].pos[0] += 1;
    }
    write_molecules(path, m, n, 2, (char *[]){logp, name});
}

// A field read in another order than written, bytes from outside that crash the reader.
static void test_dataset(void) {
    const char *path = "build/test_data.bin";
    write_test_dataset(path, 40, 0);
    Dataset d;
    Molecule m = {0}, expected = {0};
    dataset_open(&d, path);
    test_check(d.count == 40 && d.n_tasks == 2 && strcmp(d.task_names[1], "with,comma") == 0,
               "dataset header");
    int same = 0;
    for (int i = 39; i >= 0; i--) {
        random_molecule(&expected, 1 + i * 5 % 23, 1 + i % 2, i % 7 != 3, (uint32_t)i);
        dataset_read(&d, (size_t)i, &m);
        size_t n = (size_t)m.n_atoms, bonds = (size_t)m.n_bonds;
        same += m.n_atoms == expected.n_atoms && m.n_bonds == expected.n_bonds &&
                m.has_pos == expected.has_pos && !memcmp(m.atom_feat, expected.atom_feat, 9 * n) &&
                !memcmp(m.bonds, expected.bonds, 4 * bonds) &&
                !memcmp(m.bond_code, expected.bond_code, bonds) &&
                (!m.has_pos || !memcmp(m.pos, expected.pos, 12 * n)) &&
                !memcmp(m.labels, expected.labels, 4) &&
                isnan(m.labels[1]) == isnan(expected.labels[1]);
    }
    test_check(same == 40, "dataset round trip: %d of 40 molecules the same", same);
    // any bytes, as if behind a right checksum: an error or a molecule, never a crash
    uint8_t record[4096];
    uint64_t begin = get_u64(d.index + 8 * 20) >> 16, end = get_u64(d.index + 8 * 21) >> 16;
    size_t size = (size_t)(end - begin);
    int refused = 0;
    for (uint32_t k = 0; k < 20000; k++) {
        memcpy(record, d.data + begin, size);
        for (uint32_t change = 0; change < 1 + k % 3; change++)
            record[4 + rng_bits(k, 60, change, 0, 0) % (size - 4)] =
                (uint8_t)rng_bits(k, 61, change, 0, 0);
        refused += record_content(&m, record, size, 2) != NULL;
    }
    test_check(refused > 3000 && refused < 20000, "mutated records: %d of 20000 refused", refused);
    dataset_close(&d);
    molecule_free(&m);
    molecule_free(&expected);
}

// A tensor under another name or type, metadata that do not survive quotes and backslashes.
static void test_checkpoint(void) {
    const char *path = "build/test_model.safetensors";
    Config c = {2, 24, 20, 3, 12, 0};
    Model model, again;
    TensorFile f;
    model_create(&model, c, 1);
    model_init(&model, 9);
    float *const arenas[ARENAS] = {model.params};
    model_write(path, &model, arenas, NULL, 0, "\"format\":\"pt\",\"quote\\\"d\":\"a\\\\b\"");
    tensor_file_open(&f, path);
    Config read = tensor_file_config(&f);
    test_check(memcmp(&c, &read, sizeof c) == 0, "sizes from a checkpoint's shapes");
    test_check(f.meta_count == 3 && tensor_meta(&f, "quote\"d") &&
                   !strcmp(tensor_meta(&f, "quote\"d"), "a\\b"),
               "metadata with escapes");
    model_create(&again, c, 0);
    model_load(&again, again.params, &f, "");
    test_check(memcmp(model.params, again.params, model.count * sizeof(float)) == 0,
               "checkpoint round trip");
    // names as training frameworks wrap them
    TensorOut *out = xmalloc((size_t)model.n_tensors, sizeof *out);
    for (int i = 0; i < model.n_tensors; i++) {
        const TensorInfo *t = &model.info[i];
        out[i] = (TensorOut){xprintf("module.%s", t->name), t->rows, t->columns,
                             model.params + t->offset};
    }
    tensor_file_close(&f);
    tensor_file_write(path, out, (size_t)model.n_tensors, "\"format\":\"pt\"");
    for (int i = 0; i < model.n_tensors; i++) free(out[i].name);
    free(out);
    tensor_file_open(&f, path);
    memset(again.params, 0, again.count * sizeof(float));
    model_load(&again, again.params, &f, "");
    test_check(memcmp(model.params, again.params, model.count * sizeof(float)) == 0,
               "names behind module.");
    // -2.5, 2^-24, infinity, -2^-24
    static const uint8_t half[16] = {0x00, 0xC1, 0x01, 0x00, 0x00, 0x7C, 0x01, 0x80};
    static const uint8_t brain[16] = {0x20, 0xC0}, wide[16] = {0, 0, 0, 0, 0, 0, 4, 0xC0};  // -2.5
    const TensorEntry f16 = {.dtype = "F16", .data = half}, f64 = {.dtype = "F64", .data = wide};
    const TensorEntry bf16 = {.dtype = "BF16", .data = brain};
    test_check(tensor_value(&f16, 0) == -2.5f && tensor_value(&f16, 1) == 0x1p-24f &&
                   isinf(tensor_value(&f16, 2)) && tensor_value(&f16, 3) == -0x1p-24f &&
                   tensor_value(&bf16, 0) == -2.5f && tensor_value(&f64, 0) == -2.5f,
               "F16, BF16 and F64 are converted");
    tensor_file_close(&f);
    model_write(path, &model, arenas, NULL, 0, "\"format\":\"pt\"");
    tensor_file_open(&f, path);
    test_check(tensor_find(&f, "encoder.molecule_encoder.layers.1.self_attn.q_proj.weight") != NULL,
               "official names");
    tensor_file_close(&f);
    model_free(&model);
    model_free(&again);
}

// Parameters of the named sizes, and the initial values.
static void test_parameter_table(void) {
    static const struct { Config c; double millions;
    } sizes[] = {{{2, 64, 64, 4, 16, 0}, 0.85},
                 {{6, 256, 256, 8, 64, 0}, 4.5},
                 {{12, 768, 768, 32, 128, 0}, 49.5}};
    for (int k = 0; k < 3; k++) {
        Model m = {.config = sizes[k].c, .n_tensors = tensor_table(sizes[k].c, NULL)};
        m.info = xmalloc((size_t)m.n_tensors, sizeof *m.info);
        tensor_table(sizes[k].c, m.info);
        const TensorInfo *last = &m.info[m.n_tensors - 1];
        double millions = (double)(last->offset + last->count) / 1e6;
        test_check(fabs(millions / sizes[k].millions - 1) < 0.01, "size %d: %.2f M parameters", k,
                   millions);
        free(m.info);
    }
    Model m;
    model_create(&m, sizes[0].c, 1);
    model_init(&m, 1);
    const LayerTensors *l = &m.p.layer[1];
    // where one product computes several of the release's tensors, and their names in its order
    static const struct { const char *name; ptrdiff_t behind; } joint[] = {
        {"layers.1.self_attn.q_proj.weight", 0},
        {"layers.1.self_attn.v_proj.weight", 2 * 64 * 64},
        {"layers.1.self_attn.k_proj.bias", 3 * 64 * 64 + 64},
        {"layers.1.self_attn.out_proj.weight", 3 * 64 * 64 + 3 * 64}};
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < m.n_tensors; i++)
            if (strcmp(m.info[i].name, joint[k].name) == 0)
                test_check(m.params + m.info[i].offset == l->qkv_w + joint[k].behind, "%s",
                           joint[k].name);
    static const char *const maps[] = {"spd_pred_head.transform_n2_head.row",
                                       "spd_pred_head.transform_n2_head.column",
                                       "edge_pred_head.transform_n2_head.row",
                                       "edge_pred_head.transform_n2_head.column",
                                       "3d_pred_head.transform_n2_head.row",
                                       "3d_pred_head.transform_n2_head.column"};
    for (int k = 0, seen = 0; k < 6; k++, seen = 0) {
        char name[128];
        snprintf(name, sizeof name, "blend_%s_head.weight", maps[k]);
        for (int i = 0; i < m.n_tensors; i++)
            if (strcmp(m.info[i].name, name) == 0)
                seen += m.params + m.info[i].offset == m.p.pair_maps_w + k * 32 * 64 &&
                        m.info[i].rows == 32 && m.info[i].columns == 64;
        test_check(seen == 1, "%s stands at its place", name);
    }
    test_check(m.p.atom_table[0] == 0 && m.p.gauss_mul[0] == 0 && m.p.gauss_mul[1] == 0.5f &&
                   m.p.atom_table[64] != 0 && l->norm1_w[3] == 1 && l->qkv_b[0] == 0 &&
                   m.p.gauss_mean[0] >= 0 && m.p.gauss_mean[0] < 3, "initial values");
    model_free(&m);
}

// ---- the programs, by their command lines
