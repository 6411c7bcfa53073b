// prep/writer.h - writes dataset files, whose format stands in moleblend.h
//
//   record_encode()                      a molecule as a record
//   utf8_text()                          a task's name, whatever its encoding was
//   dataset_create(), dataset_append(), dataset_skip(), dataset_finish()   a file of them

// Writes the record of m to buf, which has room for record_size() bytes; returns the size.
static inline size_t record_encode(uint8_t *buf, const Molecule *m) {
    uint8_t *p = buf + 4;
    p = put_u16(p, (uint32_t)m->n_atoms);
    p = put_u16(p, (uint32_t)m->n_bonds);
    p = put_u16(p, m->has_pos ? 1 : 0);
    p = put_u16(p, (uint32_t)m->name_length);
    memcpy(p, m->atom_feat, (size_t)m->n_atoms * ATOM_FEATURES);
    p += (size_t)m->n_atoms * ATOM_FEATURES;
    for (int k = 0; k < 2 * m->n_bonds; k++) p = put_u16(p, m->bonds[k]);
    memcpy(p, m->bond_code, (size_t)m->n_bonds);
    p += m->n_bonds;
    for (int k = 0; m->has_pos && k < 3 * m->n_atoms; k++) p = put_f32(p, m->pos[k]);
    for (int k = 0; k < m->n_tasks; k++) p = put_f32(p, m->labels[k]);
    memcpy(p, m->name, (size_t)m->name_length);
    p += m->name_length;
    put_u32(buf, crc32_add(0, buf + 4, (size_t)(p - buf) - 4));
    return (size_t)(p - buf);
}

typedef struct {
    OutFile out;
    uint8_t *head;          // header and task names
    Text index, numbers, skips;  // the rest, as it will be in the file: see moleblend.h
    size_t head_size, count, skipped;
    uint64_t offset;
    uint32_t max_atoms, max_bonds, flags, split;  // the last two: 0, or set before dataset_finish()
    int n_tasks;
} DatasetWriter;

// Text as UTF-8, in fresh memory: bytes that are not are taken for Latin-1.
static inline char *utf8_text(const char *text) {
    const unsigned char *p = (const unsigned char *)text;
    Text out = {0};
    text_add(&out, "%s", "");
    for (int n = (int)strlen(text), length; n > 0; n -= length, p += length) {
        length = utf8_length(p, n);
        const uint8_t two[2] = {(uint8_t)(0xC0 | *p >> 6), (uint8_t)(0x80 | (*p & 63))};
        text_bytes(&out, length ? p : two, length ? (size_t)length : 2);
        if (!length) length = 1;
    }
    return out.text;
}

// Starts a dataset file with these tasks (task_names may be NULL if n_tasks is 0).
static inline void dataset_create(DatasetWriter *w, const char *path, int n_tasks,
                                  char *const *task_names) {
    *w = (DatasetWriter){.n_tasks = n_tasks, .head_size = DATASET_HEADER};
    w->head = xmalloc(DATASET_HEADER, 1);
    for (int t = 0; t < n_tasks; t++) {
        char *name = utf8_text(task_names[t]);
        size_t length = strlen(name), at = w->head_size;
        CHECK(length <= MAX_NAME, "%s: a task name is too long", path);
        w->head = xrealloc(w->head, w->head_size += 2 + length, 1);
        memcpy(put_u16(w->head + at, (uint32_t)length), name, length);
        free(name);
    }
    out_open(&w->out, path, DATASET_BEGINS);
    memcpy(w->head, DATASET_BEGINS, 8);
    out_write(&w->out, w->head, w->head_size);  // of version 0, until dataset_finish()
    w->offset = w->head_size;
}

// Notes a record that is skipped: its number in the input, name (of at most MAX_NAME) and why.
static inline void dataset_skip(DatasetWriter *w, uint32_t number, const char *name,
                                size_t name_length, const char *reason) {
    size_t length = strlen(reason);
    uint8_t *head = (uint8_t *)text_room(&w->skips, 8);
    put_u16(put_u16(put_u32(head, number), (uint32_t)name_length), (uint32_t)length);
    text_bytes(&w->skips, name, name_length);
    text_bytes(&w->skips, reason, length);
    w->skipped++;
}

// Appends a record made by record_encode(), which has this number in the input.
static inline void dataset_append(DatasetWriter *w, const uint8_t *record, size_t size,
                                  uint32_t number) {
    uint32_t n_atoms = get_u16(record + 4), n_bonds = get_u16(record + 6);
    CHECK(w->offset < (uint64_t)1 << 47 && w->count < UINT32_MAX, "%s: dataset is too large",
          w->out.path);
    put_u64((uint8_t *)text_room(&w->index, 8), w->offset << 16 | n_atoms);
    put_u32((uint8_t *)text_room(&w->numbers, 4), number);
    w->count++;
    w->offset += size;
    if (n_atoms > w->max_atoms) w->max_atoms = n_atoms;
    if (n_bonds > w->max_bonds) w->max_bonds = n_bonds;
    out_write(&w->out, record, size);
}

// Writes index and header, and gives the file its name. Frees everything w owns.
static inline void dataset_finish(DatasetWriter *w) {
    const Text *const checked[] = {&w->index, &w->numbers, &w->skips};
    uint64_t index = w->offset + w->skips.length;
    uint32_t crc = 0;
    put_u64((uint8_t *)text_room(&w->numbers, 8), w->offset);
    for (int k = 0; k < 3; k++)
        crc = crc32_add(crc, (const uint8_t *)checked[k]->text, checked[k]->length);
    put_u32((uint8_t *)text_room(&w->numbers, 4), crc);
    out_write(&w->out, w->skips.text, w->skips.length);
    out_write(&w->out, w->index.text, w->index.length);
    out_write(&w->out, w->numbers.text, w->numbers.length);
    put_u32(w->head + 8, DATASET_VERSION);
    put_u32(w->head + 12, (uint32_t)w->n_tasks);
    put_u64(w->head + 16, w->count);
    put_u64(w->head + 24, index);
    put_u64(w->head + 32, index + 12 * (uint64_t)w->count + 12);
    put_u32(w->head + 40, w->max_atoms);
    put_u32(w->head + 44, w->max_bonds);
    put_u32(w->head + 48, (uint32_t)w->skipped);
    put_u32(w->head + 52, w->split);
    put_u32(w->head + 56, w->flags);
    put_u32(w->head + 60, crc32_add(0, w->head, w->head_size));
    out_rewrite(&w->out, 0, w->head, w->head_size);
    out_commit(&w->out);
    FREE_ALL(w->head, w->index.text, w->numbers.text, w->skips.text);
}
