// tests/precision.h - products of operands rounded to bfloat16 (--precision bf16)

#ifdef PLAIN_C  // has one way, and no blocks
enum { ROUNDED = 1, MR = 4, NR = 16, KC = 64 };
static int bf16_way = ROUNDED;
#define bf16_best() ROUNDED
#endif

// x rounded to 8 binary digits, ties to even, by arithmetic.
static float eight_digits(float x) {
    int e;
    double m = frexp((double)x, &e);
    return (float)ldexp(rint(ldexp(m, 8)), e - 8);
}

// Numbers are rounded to nearest, ties to even; what is no number stays none.
static void test_rounding(void) {
    // not static: to tcc -INFINITY is no constant
    const struct { float x, expected; } known[] = {
        {1, 1}, {-0.0f, -0.0f}, {1.00390625f, 1}, {1.01171875f, 1.015625f},  // ties: down, up
        {1.00390637f, 1.0078125f}, {-1.01171875f, -1.015625f}, {3.4e38f, INFINITY},
        {-INFINITY, -INFINITY}, {3.3895314e38f, 3.3895314e38f}};
    int equal = 1;
    gemm_bf16 = 1;
    for (size_t k = 0; k < sizeof known / sizeof *known; k++) {
        float got = rounded(known[k].x);
        test_check(memcmp(&got, &known[k].expected, 4) == 0, "%.9g is rounded to %.9g",
                   (double)known[k].x, (double)got);
    }
    for (size_t k = 0; k < 20000; k++) {
        float x = test_number(k) * powf(10, (float)(k % 60) - 30);
        equal = equal && rounded(x) == eight_digits(x);
    }
    test_check(equal, "rounded() is the nearest number of 8 digits");
    for (uint32_t bits = 0x7F800001u; bits < 0x7FFFFFFFu; bits += 0x7FFFu) {
        float x;
        memcpy(&x, &bits, 4);
        equal = equal && isnan(rounded(x));
    }
    test_check(equal, "NaN stays NaN");
    gemm_bf16 = 0;
    const float x = 1.001f;  // x87 keeps more of a constant
    test_check(rounded(x) == x, "float32 rounds nothing");
}

// |a - b| / |b|, Frobenius, of (M, N) numbers with row stride ld.
static double frobenius(const float *a, const float *b, int M, int N, int ld) {
    double error = 0, norm = 1e-300;
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            double x = (double)a[i * ld + j], y = (double)b[i * ld + j];
            error += (x - y) * (x - y);
            norm += y * y;
        }
    return sqrt(error / norm);
}

// Every way that this build has, at all edges and in all transpositions, against products in double
// of operands rounded here; with one thread and with two; nothing beside C is written.
static void test_bf16(void) {
    static const int sizes[] = {1, 2, 3, MR - 1, MR + 1, VEC, VEC + 1, 2 * VEC + 3, NR, NR + 1,
                                67, 2 * KC + 1};
    enum { MOST = 2 * KC + 8, COUNT = sizeof sizes / sizeof sizes[0] };
    size_t n = (size_t)MOST * MOST;
    float *A = xmalloc(n, 4), *B = xmalloc(n, 4), *C = xmalloc(n, 4), *D = xmalloc(n, 4);
    float *C2 = xmalloc(n, 4), *RA = xmalloc(n, 4), *RB = xmalloc(n, 4), *bias = xmalloc(MOST, 4);
    int best = bf16_best(), threads = thread_count();
    fill(A, n, 0, 1);
    fill(B, n, n, 1);
    fill(bias, MOST, 5, 1);
    for (size_t k = 0; k < n; k++) RA[k] = eight_digits(A[k]), RB[k] = eight_digits(B[k]);
    for (bf16_way = ROUNDED; bf16_way <= best; bf16_way++) {
        double worst = 0;
        int same = 1, beside = 1, tried = 0;
        for (int s = 0; s < COUNT * COUNT * COUNT; s++) {
            int M = sizes[s % COUNT], N = sizes[s / COUNT % COUNT], K = sizes[s / COUNT / COUNT];
            if ((M > 67) + (N > 67) + (K > 67) > 1) continue;
            int mode = s % 4, ta = mode & 1, tb = mode >> 1, add = s % 3 == 0;
            int lda = (ta ? M : K) + mode, ldb = (tb ? K : N) + 1, ldc = N + 2;
            const float *start = s % 3 == 1 ? bias : NULL;
            fill(C, (size_t)M * ldc, 3 * n, 1);
            memcpy(C2, C, (size_t)M * ldc * sizeof *C);
            memcpy(D, C, (size_t)M * ldc * sizeof *C);
            gemm_bf16 = 1;
            gemm(ta, tb, M, N, K, A, lda, B, ldb, start, add, C, ldc);
            omp_set_num_threads(threads > 1 ? 1 : 2);
            gemm(ta, tb, M, N, K, A, lda, B, ldb, start, add, C2, ldc);
            omp_set_num_threads(threads);
            gemm_bf16 = 0;
            same = same && memcmp(C, C2, (size_t)M * ldc * sizeof *C) == 0;
            for (int i = 0; i < M; i++)
                beside = beside && memcmp(C + i * ldc + N, D + i * ldc + N, 8) == 0;
            gemm_reference(ta, tb, M, N, K, RA, lda, RB, ldb, start, add, D, ldc);
            worst = fmax(worst, frobenius(C, D, M, N, ldc));
            tried++;
        }
        test_check(worst < 1e-6 && tried > 300, "way %d: error %.1e in %d products", bf16_way,
                   worst, tried);
        test_check(same && beside, "way %d: one thread and several differ, or C's rows are longer",
                   bf16_way);
    }
    bf16_way = best;
    A[5] = NAN;  // in row 0
    gemm_bf16 = 1;
    gemm(0, 1, 3, 3, 40, A, 40, B, 40, NULL, 0, C, 3);
    gemm_bf16 = 0;
    test_check(isnan(C[0]) && isnan(C[2]) && !isnan(C[3]), "NaN comes through");
    FREE_ALL(A, B, C, D, C2, RA, RB, bias);
}

#define BASE_P "./moleblend build/test_train.bin --valid build/test_train.bin --size tiny " \
               "--batch-size 8 --steps 30 --save-every 4 --precision bf16 "

// What runs say of their precision; other numbers than float32's, the same with any number of
// threads, and after kill -9 and --resume, which keeps it.
static void test_precision(void) {
    static const CommandRow rows[] = {
        {BASE_P "--threads 1 -o build/prec1.safetensors", 0, "product bf16 by "},
        {BASE_P "--threads 2 -o build/prec2.safetensors && cmp build/prec1.safetensors "
         "build/prec2.safetensors && cut -d, -f2-6 build/prec1.log.csv > build/prec1.txt", 0, ""},
        {BASE_P "-o build/prec3.safetensors --precision float32; cut -d, -f2-6 "
         "build/prec3.log.csv | cmp build/prec1.txt -", 1, "differ"},
        {"./moleblend info build/prec1.safetensors", 0, "products: bf16 by "},
        {"./moleblend info build/prec1.safetensors.state", 0, "--precision bf16\n"},
        {"./moleblend info build/prec3.safetensors", 0, "products: float32\n"},
        {"rm -f build/prec4.*; " BASE_P "-o build/prec4.safetensors & p=$!; i=0; while ! [ -s "
         "build/prec4.safetensors ] && [ $i -lt 3000 ]; do sleep 0.01; i=$((i+1)); done; kill -9 "
         "$p; wait $p; ./moleblend build/test_train.bin --resume -o build/prec4.safetensors && cmp "
         "build/prec1.safetensors build/prec4.safetensors", 0, "product bf16 by "},
        {"./moleblend build/test_train.bin --resume --precision float32 -o "
         "build/prec4.safetensors", 1, "--precision: the run began with \"bf16\", now it is "
         "\"float32\""},
        {BASE_P "--precision half -o build/prec4.safetensors", 1,
         "--precision: expected float32 or bf16, found \"half\""},
        // fine-tuning; what uses a model does so in float32 unless told otherwise
        {"./moleblend finetune build/test_train.bin --valid build/test_train.bin --init "
         "build/prec1.safetensors --epochs 2 --precision bf16 -o build/prec5.safetensors", 0,
         "product bf16 by "},
        {"./moleblend predict build/test_train.bin --model build/prec5.safetensors -o "
         "build/prec5.csv; ./moleblend predict build/test_train.bin --model "
         "build/prec5.safetensors --precision float32 | cmp build/prec5.csv - && ./moleblend "
         "predict build/test_train.bin --model build/prec5.safetensors --precision bf16 | cmp -s "
         "build/prec5.csv -", 1, "product bf16 by "},
        {"./moleblend embed build/test_train.bin --model build/prec1.safetensors -o "
         "build/prec1.npy && ./moleblend embed build/test_train.bin --model "
         "build/prec1.safetensors --precision bf16 -o build/prec2.npy && cmp -s build/prec1.npy "
         "build/prec2.npy", 1, "product bf16 by "},
    };
    test_rows(rows, sizeof rows / sizeof *rows);
}
