// lib/tensors.h - tensor files (.safetensors): u64 length of the header, a JSON header {"name":
// {"dtype", "shape", "data_offsets"}, ..., "__metadata__": {...}}, raw little-endian data
//
//   tensor_file_open(), tensor_file_close()       a file, its header checked
//   tensor_find(), tensor_value(), tensor_meta(), tensor_rows()   what it holds
//   tensor_file_write(), text_add_meta()          writes one
//   file_info()                                   prints what a dataset or tensor file is
//
// Ours say in the metadata, as eight hex digits, the CRC-32 of the whole file with zeros for these
// digits; it is checked on opening. A file without one is taken.

#define TENSOR_CRC "moleblend.crc32"

typedef struct {
    char *name;
    char dtype[8];
    int rank;
    size_t shape[8], count;
    const uint8_t *data;  // in the file; count elements
} TensorEntry;

typedef struct {
    const char *path;     // as given
    const uint8_t *bytes;
    size_t size;
    TensorEntry *entries;
    int count;
    char **meta;          // 2 * meta_count: key, value
    int meta_count;
    const uint8_t *crc;   // the digits of the checksum; NULL if there is none
} TensorFile;

// Reads the JSON header: text between at and end.
typedef struct {
    const char *path, *begin, *at, *end;
} JsonReader;

MB_NORETURN static inline void json_fail(const JsonReader *r, const char *expected) {
    DIE("%s: damaged tensor file: expected %s at byte %zu of the header", r->path, expected,
        (size_t)(r->at - r->begin));
}

// Is c the next character after white space? Takes it if so.
static inline int json_take(JsonReader *r, char c) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\n' || *r->at == '\r' || *r->at == '\t'))
        r->at++;
    if (r->at == r->end || *r->at != c) return 0;
    r->at++;
    return 1;
}

static inline void json_expect(JsonReader *r, char c) {
    char text[4] = {'\'', c, '\'', 0};
    if (!json_take(r, c)) json_fail(r, text);
}

// A string, in fresh memory; \u escapes beyond ASCII become '?'.
static inline char *json_string(JsonReader *r) {
    static const char escaped[] = "bfnrt", meant[] = "\b\f\n\r\t";
    json_expect(r, '"');
    const char *close = r->at;
    while (close < r->end && *close != '"') close += *close == '\\' ? 2 : 1;
    if (close >= r->end) json_fail(r, "the end of a string");
    char *text = xmalloc((size_t)(close - r->at) + 1, 1), *to = text;
    for (; r->at < close; r->at++) {
        char c = *r->at;
        if (c == '\\') {
            c = *++r->at;
            const char *known = strchr(escaped, c);
            if (c == 'u') {
                char digits[5] = {0}, *stop;
                memcpy(digits, r->at + 1, close - r->at > 4 ? 4 : 0);
                unsigned long code = strtoul(digits, &stop, 16);
                if (stop != digits + 4) json_fail(r, "\\uXXXX");
                c = code > 0 && code < 128 ? (char)code : '?';
                r->at += 4;
            } else if (known && c) {
                c = meant[known - escaped];
            }
        }
        *to++ = c;
    }
    r->at++;
    return text;
}

// The next key of an object, behind its brace or a value, in fresh memory; NULL at the end.
static inline char *json_key(JsonReader *r) {
    int first = r->at[-1] == '{';
    if (json_take(r, '}')) return NULL;
    if (!first) json_expect(r, ',');
    char *key = json_string(r);
    json_expect(r, ':');
    return key;
}

// [a, b, ...] into values; returns how many, at most max.
static inline int json_sizes(JsonReader *r, size_t *values, int max) {
    int n = 0;
    json_expect(r, '[');
    if (json_take(r, ']')) return 0;
    do {
        size_t value = 0, digits = 0;
        json_take(r, ' ');
        for (; r->at < r->end && *r->at >= '0' && *r->at <= '9'; r->at++, digits++) {
            if (value > SIZE_MAX / 10 - 1) json_fail(r, "a smaller number");
            value = value * 10 + (size_t)(*r->at - '0');
        }
        if (!digits || n == max) json_fail(r, digits ? "a shorter list" : "a number");
        values[n++] = value;
    } while (json_take(r, ','));
    json_expect(r, ']');
    return n;
}

// Bytes of an element, 0 if the type is unknown.
static inline size_t dtype_size(const char *dtype) {
    static const struct { const char *name; size_t size; } types[] = {
        {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8}, {"I32", 4},
        {"I16", 2}, {"I8", 1}, {"U64", 8}, {"U32", 4}, {"U16", 2}, {"U8", 1}, {"BOOL", 1},
        {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    for (size_t k = 0; k < sizeof types / sizeof types[0]; k++)
        if (strcmp(dtype, types[k].name) == 0) return types[k].size;
    return 0;
}

// {"dtype": ..., "shape": [...], "data_offsets": [begin, end]} of the tensor t.
static inline void json_tensor(JsonReader *r, TensorEntry *t, const uint8_t *data,
                               size_t data_size) {
    size_t range[2] = {1, 0};
    json_expect(r, '{');
    for (char *key; (key = json_key(r)); free(key)) {
        if (strcmp(key, "dtype") == 0) {
            char *dtype = json_string(r);
            snprintf(t->dtype, sizeof t->dtype, "%.7s", dtype);
            free(dtype);
        } else if (strcmp(key, "shape") == 0) {
            t->rank = json_sizes(r, t->shape, 8);
        } else if (strcmp(key, "data_offsets") == 0) {
            if (json_sizes(r, range, 2) != 2) json_fail(r, "two offsets");
        } else {
            json_fail(r, "dtype, shape or data_offsets");
        }
    }
    t->count = 1;
    for (int k = 0; k < t->rank; k++) {
        CHECK(!t->shape[k] || t->count <= SIZE_MAX / 8 / t->shape[k], "%s: damaged tensor file: "
              "tensor %s: its shape is beyond any memory", r->path, t->name);
        t->count *= t->shape[k];
    }
    size_t size = dtype_size(t->dtype);
    CHECK(size, "%s: tensor %s: unknown type \"%s\"", r->path, t->name, t->dtype);
    CHECK(range[0] <= range[1] && range[1] <= data_size &&
              range[1] - range[0] == mul_size(t->count, size),
          "%s: damaged tensor file: the data of %s does not fit its shape or the file", r->path,
          t->name);
    t->data = data + range[0];
}

// {"key": "value", ...}
static inline void json_metadata(JsonReader *r, TensorFile *f) {
    json_expect(r, '{');
    for (char *key; (key = json_key(r)); f->meta_count++) {
        f->meta = xrealloc(f->meta, 2 * (size_t)f->meta_count + 2, sizeof *f->meta);
        f->meta[2 * f->meta_count] = key;
        f->meta[2 * f->meta_count + 1] = json_string(r);
        if (strcmp(key, TENSOR_CRC) == 0) f->crc = (const uint8_t *)r->at - 9;  // and a quote
    }
}

// Dies if the checksum is not that of the file.
static inline void tensor_file_check(const TensorFile *f) {
    char digits[9];
    uint32_t crc = crc32_add(0, f->bytes, (size_t)(f->crc - f->bytes));
    crc = crc32_add(crc, (const uint8_t *)"00000000", 8);
    crc = crc32_add(crc, f->crc + 8, (size_t)(f->bytes + f->size - f->crc) - 8);
    snprintf(digits, sizeof digits, "%08x", (unsigned)crc);
    CHECK(memcmp(digits, f->crc, 8) == 0, "%s: damaged tensor file (%s does not fit; a program "
          "that rewrites the file must leave it out)", f->path, TENSOR_CRC);
}

// Opens a .safetensors file; dies with the reason if it is not one. Call tensor_file_close().
static inline void tensor_file_open(TensorFile *f, const char *path) {
    *f = (TensorFile){.path = path};
    f->bytes = file_bytes(path, &f->size);
    uint64_t length = f->size >= 8 ? get_u64(f->bytes) : 0;
    CHECK(f->size >= 8 && length <= f->size - 8,
          "%s: not a .safetensors file (the header does not fit)", path);
    const char *text = (const char *)f->bytes + 8;
    JsonReader r = {path, text, text, text + length};
    const uint8_t *data = f->bytes + 8 + length;
    json_expect(&r, '{');
    for (char *name; (name = json_key(&r));) {
        if (strcmp(name, "__metadata__") == 0) {
            free(name);
            json_metadata(&r, f);
            continue;
        }
        if ((f->count & (f->count - 1)) == 0)  // full at every power of two
            f->entries = xrealloc(f->entries, 2 * (size_t)f->count + 1, sizeof *f->entries);
        f->entries[f->count] = (TensorEntry){.name = name};
        json_tensor(&r, &f->entries[f->count++], data, f->size - 8 - (size_t)length);
    }
    if (f->crc) tensor_file_check(f);
}

static inline void tensor_file_close(TensorFile *f) {
    for (int k = 0; k < f->count; k++) free(f->entries[k].name);
    for (int k = 0; k < 2 * f->meta_count; k++) free(f->meta[k]);
    FREE_ALL(f->entries, f->meta);
    file_release(f->bytes, f->size);
    *f = (TensorFile){0};
}

// The tensor of this name, or NULL.
static inline const TensorEntry *tensor_find(const TensorFile *f, const char *name) {
    for (int k = 0; k < f->count; k++)
        if (strcmp(f->entries[k].name, name) == 0) return &f->entries[k];
    return NULL;
}

// Does it hold floating-point numbers that tensor_value() can read?
static inline int tensor_is_float(const TensorEntry *t) {
    return strchr(t->dtype, 'F') && t->dtype[1] != '8';
}

// Element k of a tensor of floating-point numbers, as float32.
static inline float tensor_value(const TensorEntry *t, size_t k) {
    uint32_t bits = t->dtype[0] == 'B' ? get_u16(t->data + 2 * k) << 16 : 0;
    float value;
    if (strcmp(t->dtype, "F32") == 0) return get_f32(t->data + 4 * k);
    if (strcmp(t->dtype, "F64") == 0) {
        uint64_t wide = get_u64(t->data + 8 * k);
        double number;
        memcpy(&number, &wide, 8);
        return (float)number;
    }
    if (strcmp(t->dtype, "F16") == 0) {  // sign, 5 bits of exponent, 10 of fraction
        uint32_t half = get_u16(t->data + 2 * k), exponent = half >> 10 & 31;
        if (exponent == 0) return ldexpf((float)(half & 1023), -24) * (half >> 15 ? -1.0f : 1.0f);
        bits = (half & 0x8000u) << 16 | (exponent == 31 ? 255 : exponent + 112) << 23 |
               (half & 1023) << 13;
    }
    memcpy(&value, &bits, 4);
    return value;
}

// The value of a metadata key, or NULL.
static inline const char *tensor_meta(const TensorFile *f, const char *key) {
    for (int k = 0; k < f->meta_count; k++)
        if (strcmp(f->meta[2 * k], key) == 0) return f->meta[2 * k + 1];
    return NULL;
}

// Reads the tensor of this name, a matrix of numbers, into rows (most, columns); returns how many
// rows it has, 0 if it is not there: an empty one is not written.
static inline int64_t tensor_rows(float *rows, int64_t most, size_t columns, const TensorFile *f,
                                  const char *name) {
    const TensorEntry *t = tensor_find(f, name);
    if (!t) return 0;
    CHECK(tensor_is_float(t) && t->rank == 2 && t->shape[1] == columns &&
          t->shape[0] <= (size_t)most, "%s: damaged state: expected a table %s of at most %lld "
          "rows", f->path, name, (long long)most);
    for (size_t k = 0; k < t->count; k++) rows[k] = tensor_value(t, k);
    return (int64_t)t->shape[0];
}

// ---- writing

// Adds "key": "value", a printf text with what JSON needs escaped, to the members of an object.
MB_PRINTF(3, 4) static inline void text_add_meta(Text *t, const char *key, const char *fmt, ...) {
    Text value = {0};
    va_list args;
    va_start(args, fmt);
    text_add_list(&value, fmt, args);
    va_end(args);
    text_add(t, "%s\"%s\":\"", t->length ? "," : "", key);
    for (const char *c = value.text; *c; c++) {
        if ((unsigned char)*c < 32) text_add(t, "\\u%04x", (unsigned)*c);
        else text_add(t, "%s%c", *c == '"' || *c == '\\' ? "\\" : "", *c);
    }
    text_add(t, "\"");
    free(value.text);
}

// Writes numbers; returns `crc` continued over their bytes.
static inline uint32_t out_floats(OutFile *out, const float *x, size_t count, uint32_t crc) {
    uint8_t chunk[4096];
    for (size_t i = 0; i < count; i += 1024) {
        size_t n = count - i < 1024 ? count - i : 1024;
        for (size_t k = 0; k < n; k++) put_f32(chunk + 4 * k, x[i + k]);
        out_write(out, chunk, 4 * n);
        crc = crc32_add(crc, chunk, 4 * n);
    }
    return crc;
}

// A matrix to be written, or with rows = 0 a vector.
typedef struct {
    char *name;
    size_t rows, columns;
    const float *data;
} TensorOut;

// How files of tensor_file_write() begin, see check_ours().
#define TENSORS_BEGIN "????????{\"__metadata__\":{\"moleblend"

// Writes n float32 tensors. meta: the metadata by text_add_meta(), not empty.
static inline void tensor_file_write(const char *path, const TensorOut *tensors, size_t n,
                                     const char *meta) {
    Text head = {0};
    size_t offset = 0;
    text_add(&head, "{\"__metadata__\":{\"" TENSOR_CRC "\":\"");
    size_t crc_at = 8 + head.length;
    text_add(&head, "00000000\",%s}", meta);
    for (const TensorOut *t = tensors; t < tensors + n; t++) {
        size_t end = offset + 4 * max_size(t->rows, 1) * t->columns;
        text_add(&head, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[", t->name);
        if (t->rows) text_add(&head, "%zu,", t->rows);
        text_add(&head, "%zu],\"data_offsets\":[%zu,%zu]}", t->columns, offset, end);
        offset = end;
    }
    text_add(&head, "}");
    while (head.length % 8) text_add(&head, " ");
    OutFile out;
    uint8_t length[8];
    char digits[9];
    out_open(&out, path, TENSORS_BEGIN);
    put_u64(length, head.length);
    out_write(&out, length, 8);
    out_write(&out, head.text, head.length);
    uint32_t crc = crc32_add(crc32_add(0, length, 8), (const uint8_t *)head.text, head.length);
    for (const TensorOut *t = tensors; t < tensors + n; t++)
        crc = out_floats(&out, t->data, max_size(t->rows, 1) * t->columns, crc);
    snprintf(digits, sizeof digits, "%08x", (unsigned)crc);
    out_rewrite(&out, (long)crc_at, digits, 8);
    out_commit(&out);
    free(head.text);
}

// ---- what is in a file

static inline void info_dataset(const char *path) {
    Dataset data;
    Molecule m = {0};
    dataset_open(&data, path);
    double atoms = 0, bonds = 0, with_pos = 0;
    double *present = xmalloc((size_t)data.n_tasks, sizeof *present);
    for (size_t i = 0; i < data.count; i++) {
        dataset_read(&data, i, &m);
        atoms += m.n_atoms;
        bonds += m.n_bonds;
        with_pos += m.has_pos;
        for (int t = 0; t < data.n_tasks; t++) present[t] += !isnan(m.labels[t]);
    }
    double n = data.count ? (double)data.count : 1;
    printf("%s: dataset, %zu molecules, %zu bytes\n", path, data.count, data.size);
    printf("  atoms      mean %.1f, most %d\n  bonds      mean %.1f, most %d\n", atoms / n,
           data.max_atoms, bonds / n, data.max_bonds);
    printf("  positions  %.0f molecules\n", with_pos);
    printf("  skipped    %zu records of the input\n", data.skipped);
    printf("  stereo     %s (data_prep --stereo)\n", data.stereo);
    if (data.split)
        printf("  split      %08lx, as its other parts\n", (unsigned long)data.split);
    for (int t = 0; t < data.n_tasks; t++)
        printf("  task       %s: %.0f labels\n", data.task_names[t], present[t]);
    free(present);
    molecule_free(&m);
    dataset_close(&data);
}

static inline void info_tensors(const char *path) {
    TensorFile f;
    tensor_file_open(&f, path);
    size_t count = 0;
    for (int k = 0; k < f.count; k++) count += f.entries[k].count;
    printf("%s: tensor file, %d tensors, %zu numbers\n", path, f.count, count);
    for (int k = 0; k < f.meta_count; k++) printf("  %s: %s\n", f.meta[2 * k], f.meta[2 * k + 1]);
    for (int k = 0; k < f.count; k++) {
        printf("  %-70s %s (", f.entries[k].name, f.entries[k].dtype);
        for (int d = 0; d < f.entries[k].rank; d++)
            printf("%s%zu", d ? ", " : "", f.entries[k].shape[d]);
        printf(")\n");
    }
    tensor_file_close(&f);
}

// Prints what is in a dataset or tensor file.
static inline void file_info(const char *path) {
    size_t size;
    const uint8_t *bytes = file_bytes(path, &size);
    int dataset = size >= 8 && memcmp(bytes, DATASET_BEGINS, 8) == 0;
    file_release(bytes, size);
    if (dataset) info_dataset(path);
    else info_tensors(path);
}
