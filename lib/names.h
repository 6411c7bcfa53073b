// lib/names.h - names of tensors from patterns: "a.{q,k}.w" stands for a.q.w and a.k.w
//
//   pattern_names(), pattern_name()   how many, and one of them

// Alternatives of the list at p, "{a,b,c}".
static inline int list_length(const char *p) {
    int n = 1;
    for (; *p != '}'; p++) n += *p == ',';
    return n;
}

// How many tensors of the release a row of the table stands for.
static inline int pattern_names(const char *pattern) {
    int n = 1;
    for (const char *p = pattern; (p = strchr(p, '{')); p++) n *= list_length(p);
    return n;
}

// Name k of them, where the last list runs fastest; the %d of the pattern, if any, is the layer.
static inline void pattern_name(char name[128], const char *pattern, int k, int layer) {
    char text[128];
    int n = 0, left = pattern_names(pattern);
    for (const char *p = pattern; *p; p++) {
        if (*p != '{') {
            text[n++] = *p;
            continue;
        }
        int length = list_length(p), skip = k / (left /= length) % length;
        while (skip) skip -= *++p == ',';
        while (*++p != ',' && *p != '}') text[n++] = *p;
        p = strchr(p, '}');
    }
    text[n] = 0;
    snprintf(name, 128, text, layer);
}
