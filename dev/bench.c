// bench.c - speed of the kernels and of whole training steps, next to the machine's FMA peak.
//
//   make bench                        all tables below
//   build/bench peak|gemm|step|small|base|growth
//   make build/bench_openblas && build/bench_openblas gemm     the products, and OpenBLAS' next to
//                                                              them (needs libopenblas-dev)
//
// Each figure is the best of several repetitions; shares are of the peak measured in the same run.
// Useful arithmetic of a step: 3 passes (forward, input gradient, weight gradient) of 2 operations
// per multiply-add of the encoder's and heads' matrices; see pass_flops(). bf16: --precision bf16,
// its shares too are of the float32 peak. The molecules are drawn at random with 4 to 24 heavy
// atoms, mean 14, as in PCQM4Mv2.

#if defined(__GNUC__) || defined(__clang__)
#pragma GCC diagnostic ignored "-Wunused-function"  // most of moleblend.c is not used here
#endif
#define MB_PROGRAM "bench"
#define MOLEBLEND_TEST
#include "../moleblend.c"
#include "../lib/commands.h"  // precision_text()

#ifdef OPENBLAS
#include <cblas.h>
#endif

static void use_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
#ifdef OPENBLAS
    openblas_set_num_threads(n);
#endif
}

// `rounds` of twelve independent chains of fused multiply-adds, in registers (the loop compiles to
// twelve vfmadd and a branch). Returns something that depends on all of them.
static float fma_chains(long rounds, float scale) {
    enum { CHAINS = 12 };
    vec acc[CHAINS], x, y;
    float lanes[VEC], sum = 0;
    for (int v = 0; v < VEC; v++) lanes[v] = scale;
    memcpy(&x, lanes, sizeof x);
    memcpy(&y, lanes, sizeof y);
    for (int k = 0; k < CHAINS; k++) acc[k] = x * (float)k;
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 12
        for (int k = 0; k < CHAINS; k++) acc[k] = acc[k] * x + y;
    }
    for (int k = 0; k < CHAINS; k++) {
        memcpy(lanes, &acc[k], sizeof acc[k]);
        for (int v = 0; v < VEC; v++) sum += lanes[v];
    }
    return sum;
}

// The machine's peak of fused multiply-adds on this many threads, GFLOP/s.
static double fma_peak(int threads) {
    volatile long rounds = 3000000;  // volatile: not known to the compiler
    volatile float scale = 0.7f, sink = 0;
    double best = 0;
    use_threads(threads);
    for (int repeat = 0; repeat < 8; repeat++) {
        float sum = 0;
        double start = now_seconds();
#pragma omp parallel reduction(+ : sum)
        sum += fma_chains(rounds, scale);
        sink = sink + sum;
        double rate = 12.0 * VEC * 2 * (double)rounds * threads / (now_seconds() - start) / 1e9;
        best = fmax(best, rate);
    }
    return best;
}

// Sizes (M, N, K) of products: encoder layers of `base` and `small`, the edge head's.
static const int SIZES[][3] = {{1024, 768, 768}, {1024, 2304, 768}, {256, 768, 768},
                                {64, 768, 768},   {16, 768, 768},    {960, 256, 256},
                                {64, 256, 256},   {128, 4096, 32},   {128, 32, 4096}};
enum { N_SIZES = sizeof SIZES / sizeof SIZES[0], MODES = 3 };
static const char *const MODE_NAMES[MODES] = {"X W^T", "dY W", "dY^T X"};

// One product, by gemm() or (ours = 0) by OpenBLAS.
static void one_product(int ours, int mode, const int shape[3], const float *A, const float *B,
                        float *C) {
    int M = shape[0], N = shape[1], K = shape[2], ta = mode == 2, tb = mode == 0;
    if (ours) gemm(ta, tb, M, N, K, A, ta ? M : K, B, tb ? K : N, NULL, 0, C, N);
#ifdef OPENBLAS
    if (!ours)
        cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans,
                    M, N, K, 1, A, ta ? M : K, B, tb ? K : N, 0, C, N);
#endif
}

// GFLOP/s of the fastest of many repetitions.
static double product_rate(int ours, int mode, const int shape[3], const float *A, const float *B,
                           float *C) {
    double flops = 2.0 * shape[0] * shape[1] * shape[2], best = 1e9;
    for (int r = 0; r < (int)(3e9 / flops) + 3; r++) {
        double start = now_seconds();
        one_product(ours, mode, shape, A, B, C);
        best = fmin(best, now_seconds() - start);
    }
    return flops / best / 1e9;
}

static void bench_gemm(double peak) {
    float *A = xmalloc(1 << 22, 4), *B = xmalloc(1 << 22, 4), *C = xmalloc(1 << 22, 4);
    for (int k = 0; k < 1 << 22; k++) A[k] = (float)(k % 7) - 3, B[k] = (float)(k % 5) - 2;
    printf("  gemm  M    N    K    %-7s ", gemm_bf16 ? "bf16" : "float32");
    for (int mode = 0; mode < MODES; mode++) printf("  %8s GFLOP/s", MODE_NAMES[mode]);
    printf("\n");
    for (int s = 0; s < N_SIZES; s++) {
        printf("    %5d %4d %4d            ", SIZES[s][0], SIZES[s][1], SIZES[s][2]);
        for (int mode = 0; mode < MODES; mode++) {
            double rate = product_rate(1, mode, SIZES[s], A, B, C);
            printf("     %5.0f (%3.0f %%)", rate, 100 * rate / peak);
        }
#ifdef OPENBLAS
        printf("   OpenBLAS");
        for (int mode = 0; mode < MODES; mode++) {
            double theirs = product_rate(0, mode, SIZES[s], A, B, C);
            double rate = product_rate(1, mode, SIZES[s], A, B, C);  // once more, beside it
            printf("  %5.0f (ours %.2f x)", theirs, rate / theirs);
        }
#endif
        printf("\n");
    }
    FREE_ALL(A, B, C);
}

// A random molecule of N atoms: a chain with branches, rings and positions.
static void bench_molecule(Molecule *m, int N, uint32_t seed) {
    int n_bonds = 0;
    molecule_resize(m, N, 2 * N, 0, 0);
    for (int i = 0; i < N; i++) {
        for (int k = 0; k < ATOM_FEATURES; k++)
            m->atom_feat[i * ATOM_FEATURES + k] =
                (uint8_t)(rng_bits(seed, 50, (uint32_t)k, 0, (uint32_t)i) %
                          (uint32_t)min_int(9, ATOM_FEATURE_SIZES[k]));
        for (int back = 1; back <= 5; back += 4) {  // a bond to the atom before; rings of six
            if (i < back || (back == 5 && i % 8 != 7)) continue;
            m->bonds[2 * n_bonds] = (uint16_t)(i - back);
            m->bonds[2 * n_bonds + 1] = (uint16_t)i;
            m->bond_code[n_bonds++] = (uint8_t)(rng_bits(seed, 51, 0, 0, (uint32_t)i) % 48);
        }
        for (int k = 0; k < 3; k++)
            m->pos[3 * i + k] = 2.0f * rng_normal(seed, 52, 0, 0, (uint32_t)(3 * i + k));
    }
    m->n_bonds = n_bonds;
    m->has_pos = 1;
}

// B molecules of `atoms` atoms, or if 0 of 4 to 24.
static void bench_open(Step *bench, Config c, size_t B, int atoms) {
    static const Blend blend = {0.2, 0.2, 0.6, 0.4, 0.6, 0.2, 0};
    Draws draws = {1, 0, 0, 1};
    Molecule m = {0};
    int *sizes = xmalloc(B, sizeof *sizes);
    for (size_t b = 0; b < B; b++)
        sizes[b] = atoms ? atoms : 4 + (int)(rng_bits(3, 53, 0, 0, (uint32_t)b) % 21);
    model_create(&bench->model, c, 1);
    model_init(&bench->model, 1);
    batch_layout(&bench->batch, (idx)B, sizes);
    for (size_t b = 0; b < B; b++) {
        bench_molecule(&m, sizes[b], (uint32_t)b);
        batch_set(&bench->batch, b, &m);
        batch_draw(&bench->batch, b, &blend, &draws);
        batch_pairs(&bench->batch, b);
    }
    batch_count(&bench->batch);
    molecule_free(&m);
    free(sizes);
}

// Useful operations of one pass over the batch. Counted: the matrices of the encoder (T rows), of
// the denoising head and the pair maps (A rows), the bilinear heads, the 3D bias (Q rows), and
// attention; multiply and add are two. A training step is three passes.
static double pass_flops(const Step *bench) {
    Config c = bench->model.config;
    double T = (double)bench->batch.T, A = (double)bench->batch.A, P = (double)bench->batch.P;
    double Q = (double)bench->batch.Q, C = c.dim, F = c.ffn, G = c.kernels, squares = 0;
    for (idx b = 0; b < bench->batch.B; b++) squares += pow(bench->batch.n_atoms[b] + 1, 2);
    double encoder = c.layers * (2 * T * (4 * C * C + 2 * C * F) + 4 * squares * C);
    double heads = 2 * A * 3 * C * C + 2 * A * 192 * C + 2 * (A * 32 + P) * 32 * 134;
    return encoder + heads + 2 * Q * G * (G + c.heads) + 2 * A * G * C;
}

static void bench_step(Config c, size_t B, int atoms, double peak, const char *name) {
    static const Adam adam = {1e-5, 0.9, 0.999, 1e-8, 0, 5};
    Step bench = {.drop = {0.1, 0.1, 0.1, 0}, .weights = {{0, 6, 0.1, 0.1, 0.5}}};
    double best = 1e9, forward = 1e9, loss[LOSSES];
    bench_open(&bench, c, B, atoms);
    double flops = pass_flops(&bench);
    int repeats = min_int(60, (int)(4e11 / flops) + 3);
    for (int r = 0; r < repeats; r++) {
        bench.draws = (Draws){1, (uint32_t)r, 0, 1};
        double start = now_seconds();
        gradients(loss, &bench);
        adamw_step(&bench.model, &adam, r + 1);
        best = fmin(best, now_seconds() - start);
        start = now_seconds();
        bench.draws.active = 0;
        encoder_forward(&bench);
        forward = fmin(forward, now_seconds() - start);
    }
    double rate = 3 * flops / best / 1e9;
    printf(
        "    %-5s %-7s batch %4zu, %5.1f atoms: %8.1f ms  %7.1f molecules/s  %5.2f GFLOP each  "
        "%4.0f GFLOP/s"
        " (%2.0f %%)   forward only %7.1f molecules/s   memory %4.0f MB\n",
        name, gemm_bf16 ? "bf16" : "float32", B, (double)bench.batch.A / (double)B, 1e3 * best,
        (double)B / best,
        3 * flops / 1e9 / (double)B, rate, 100 * rate / peak, (double)B / forward,
        ((double)bench.model.count * 16 + (double)(bench.batch.store.room +
         bench.bias->store.room + bench.enc->store.room + bench.heads->store.room)) / 1e6);
    step_close(&bench);
}

int main(int argc, char **argv) {
    static const Config small = {6, 256, 256, 8, 64, 0}, base = {12, 768, 768, 32, 128, 0};
    const char *part = argc > 1 ? argv[1] : "all";
    int all = strcmp(part, "all") == 0, most = thread_count();
    gemm_bf16 = 1;
    printf("vectors of %d floats, register tile %d x %d, %s, %d thread%s\n", VEC, MR, NR,
           precision_text(), most, most > 1 ? "s" : "");
    for (int threads = 1; threads <= most; threads += most > 1 ? most - 1 : 1) {
        double peak = fma_peak(threads);
        printf("%d thread%s: FMA peak %.0f GFLOP/s\n", threads, threads > 1 ? "s" : "", peak);
        int step = all || !strcmp(part, "step");
        for (gemm_bf16 = 0; gemm_bf16 < 2; gemm_bf16++) {
            if (all || !strcmp(part, "gemm")) bench_gemm(peak);
            if (step || !strcmp(part, "small")) bench_step(small, 64, 0, peak, "small");
            if (step || !strcmp(part, "base")) bench_step(base, 64, 0, peak, "base");
            if (step && threads == most) bench_step(base, 256, 0, peak, "base");
        }
        gemm_bf16 = 0;
    }
    if (!strcmp(part, "growth")) {
        static const int atoms[] = {10, 50, 100, 250, 500};
        static const size_t batch[] = {1, 4, 16, 64, 256, 1024};
        double peak = fma_peak(most);
        printf("  time as molecules grow (small, batch 8)\n");
        for (int k = 0; k < 5; k++) bench_step(small, 8, atoms[k], peak, "small");
        printf("  time as the batch grows (small)\n");
        for (int k = 0; k < 6; k++) bench_step(small, batch[k], 0, peak, "small");
    }
    return 0;
}
