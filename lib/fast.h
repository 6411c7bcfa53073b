// lib/fast.h - the functions in which a training step spends its time, for vector units. The one
// file that a porter replaces. It must define these (plain definitions: section 4 of moleblend.c;
// test.c holds each against its definition):
//
//   VEC              floats of a vector
//   exp_fast(x)      e^x to 2e-7 relative; of -1e30 0 or tiny, beyond 88 huge or infinite
//   normal_cdf(x, &d)   the normal distribution function to 3e-7, and its density d; both stand in
//                    loops that the compiler vectorises: without table or call for speed
//   philox_blocks(words, count, first, key)   words[w][k] = word w of philox() of first + k,
//                    added to word 0 without carry; count <= BLOCKS; exact
//   gemm(trans_a, trans_b, M, N, K, A, lda, B, ldb, bias, add, C, ldc)   called by one thread,
//                    takes all: C (M, N) = A (M, K) @ B (K, N), + C if add, else + bias (N);
//                    trans_a: A is stored as (K, M), trans_b: B as (N, K); lda ...: row strides;
//                    if gemm_bf16 of the operands as rounded() makes them, summed as floats
//   small_product(out, ldo, a, a_row, a_col, b, ldb, m, n, K)   by one thread, many at once:
//                    out (m, n) = a (m, K) @ b (K, n); element (r, k) of a: r * a_row + k * a_col.
//                    n is a multiple of VEC: callers pad rows of b and out; none is aligned
//
// Without vector types there is nothing to write: this file then works on vectors of one float, and
// -DPLAIN_C builds without it. Results may differ by rounding where no "exact" stands, never by the
// number of threads. Not with -ffast-math, which breaks exp_fast(). Of moleblend.h it uses idx,
// min_idx(), ALWAYS_INLINE, floats_alloc(), thread_count(), thread_id(), Philox. The rest is how.

// Not where a float times a float is a double (s390x and x87 with -std=c11): gcc then refuses a
// float times a vector. Method 16 is 0 with _Float16.
#if defined(__GNUC__) && (FLT_EVAL_METHOD == 0 || FLT_EVAL_METHOD == 16)
#if defined(__AVX512F__)
enum { VEC = 16, MR = 8, NV = 3 };  // floats in a vector; register tile of gemm, see gemm()
#elif defined(__AVX__)
enum { VEC = 8, MR = 6, NV = 2 };
#elif defined(__ARM_NEON)
enum { VEC = 4, MR = 8, NV = 3 };
#else
enum { VEC = 4, MR = 4, NV = 2 };
#endif
typedef float vec __attribute__((vector_size(VEC * sizeof(float)), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(4 * sizeof(float)), aligned(4), may_alias));
#ifdef __clang__
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
typedef int quad_mask __attribute__((vector_size(4 * sizeof(int))));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (quad_mask){i, j, k, l})
#define UNROLL _Pragma("GCC unroll 8")
#endif
#else  // any C11 compiler: the same code on vectors of one float
enum { VEC = 1, MR = 4, NV = 4 };
typedef float vec;
#define UNROLL
#endif

// e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln 2 / 2; e^r by a polynomial fitted to 3e-9. x is
// clamped to the range of normal floats, so e^-1e30 is 1e-38, harmless in every sum here.
ALWAYS_INLINE float exp_fast(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    float shifted = x * 1.44269504f + magic, n = shifted - magic;
    float r = x - n * 0.693145752f;   // ln 2 in two parts: the first product is exact
    r = r - n * 1.42860677e-6f;
    float p = 0.00139464554f;
    p = p * r + 0.00836915709f;
    p = p * r + 0.0416662619f;
    p = p * r + 0.166665167f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + 0x3F800000u;  // the low bits of `shifted` hold n: make 2^n of them
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

// Distribution function of the standard normal, and its density:
//   Phi(-|x|) = e^(-x^2/2) * poly(t), t = 1 / (1 + 0.3 |x|); the form of Abramowitz & Stegun
//   7.1.26 with a polynomial fitted to 1.5e-7 relative on |x| <= 14.
ALWAYS_INLINE float normal_cdf(float x, float *density) {
    float a = fabsf(x), e = exp_fast(-0.5f * a * a), t = 1.0f / (1.0f + 0.3f * a);
    float p = 0.0356748180f;
    p = p * t - 0.157203255f;
    p = p * t + 0.206353785f;
    p = p * t - 0.0536838819f;
    p = p * t + 0.128561742f;
    p = p * t + 0.0999134605f;
    p = p * t + 0.120753961f;
    p = p * t + 0.119629299f;
    float tail = e * p * t;
    *density = 0.398942280f * e;
    return x < 0 ? tail : 1.0f - tail;
}

// words (4, BLOCKS): philox() of the counters `first`, `first` + 1, ... A round of all blocks is
// one loop, which compilers vectorise; that makes a draw ten times faster than calling philox().
static void philox_blocks(uint32_t words[4][BLOCKS], int count, Philox first, uint64_t key) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int k = 0; k < count; k++) {
        words[0][k] = first.word[0] + (uint32_t)k;
        for (int w = 1; w < 4; w++) words[w][k] = first.word[w];
    }
    for (int round = 0; round < 10; round++, k0 += PHILOX_WEYL0, k1 += PHILOX_WEYL1) {
#pragma omp simd
        for (int k = 0; k < count; k++) {
            uint64_t p = (uint64_t)PHILOX_MUL0 * words[0][k],
                     q = (uint64_t)PHILOX_MUL1 * words[2][k];
            words[0][k] = (uint32_t)(q >> 32) ^ words[1][k] ^ k0;
            words[2][k] = (uint32_t)(p >> 32) ^ words[3][k] ^ k1;
            words[1][k] = (uint32_t)q;
            words[3][k] = (uint32_t)p;
        }
    }
}

// What multiplies operands rounded to bfloat16: the kernel for floats, or units that take pairs of
// k; 0: gemm_bf16 is not set.
enum { NOT_ROUNDED, ROUNDED, PAIRED, TILES };
static const char *const BF16_UNITS[] = {
    "", "bf16 by rounding, float32 arithmetic", "bf16 by AVX512-BF16", "bf16 by AMX"};
#define BF16_UNIT BF16_UNITS[bf16_best()]
#if defined(SHUFFLE) && defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>
enum { WITHOUT_TILES = PAIRED };
#define HAVE_PAIRS

// acc + a0 * b0 + a1 * b1, where a and the lanes of b are pairs of bfloat16.
ALWAYS_INLINE vec multiply_pair(vec acc, float a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
}

// out (width, 8 divides it) = pairs of x (2, width), rounded: the first row in the lower halves.
ALWAYS_INLINE void round_pairs(float *out, const float *x, idx width) {
    const __m256i zip = _mm256_setr_epi16(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    for (idx c = 0; c < width; c += 8) {
        __m256i both = (__m256i)_mm256_cvtne2ps_pbh(_mm256_loadu_ps(x + width + c),
                                                    _mm256_loadu_ps(x + c));
        _mm256_storeu_si256((__m256i *)(void *)(out + c), _mm256_permutexvar_epi16(zip, both));
    }
}
#else
enum { WITHOUT_TILES = ROUNDED };
#define multiply_pair(acc, a, b) (acc)  // of PAIRED alone
#define round_pairs(out, x, width) (void)0
#endif

// ---- the matrix product. gemm() is nearly all of the arithmetic of a training step; it follows
//   Goto and van de Geijn (2008). Both operands are copied ("packed") into the order in which the
//   kernel reads them, which also absorbs transposition and pads the edges, so there is one kernel:
//
//              NR                    tile (MR, NR) of C stays in registers while the kernel
//            +----+                  walks down k: one row of the B panel (NV vectors) times
//         k  | B  |                  MR numbers of the A panel, MR * NV fused multiply-adds
//            |    |
//      +----++----+                  loops, outermost first:
//   MR | A  || C  |                    k blocks of KC     B panel: KC * NR floats, in L2/L1
//      +----++----+                    row blocks of <= MC, column panels of NR, row panels of MR
//        k                             the packed row block, MC * KC floats, stays in L2

enum { NR = NV * VEC, KC = 384, MC = 16 * MR };

// What gemm() packs its operands into: a panel of A a thread, all of B's. It only grows.
static struct { float *a, *b; int threads; idx columns; } pack_room;

// Room for B's panels of N columns, and A's of as many threads as a parallel region may have.
static void packed_reserve(idx N) {
    const char *hint = "a smaller model (--size)";
    if (pack_room.threads < thread_count()) {
        free(pack_room.a);
        pack_room.threads = thread_count();
        pack_room.a = floats_alloc((size_t)pack_room.threads * MC * KC, hint);
    }
    if (pack_room.columns < N) {
        free(pack_room.b);
        pack_room.columns = (N + NR - 1) / NR * NR;
        pack_room.b = floats_alloc((size_t)pack_room.columns * KC, hint);
    }
}

// out (4, 4) = transpose of x (4, 4), row strides ldo and ldx.
ALWAYS_INLINE void transpose4(float *out, idx ldo, const float *x, idx ldx) {
#ifdef SHUFFLE
    quad a = *(const quad *)x, b = *(const quad *)(x + ldx);
    quad c = *(const quad *)(x + 2 * ldx), d = *(const quad *)(x + 3 * ldx);
    quad ab01 = SHUFFLE(a, b, 0, 4, 1, 5), ab23 = SHUFFLE(a, b, 2, 6, 3, 7);
    quad cd01 = SHUFFLE(c, d, 0, 4, 1, 5), cd23 = SHUFFLE(c, d, 2, 6, 3, 7);
    *(quad *)out = SHUFFLE(ab01, cd01, 0, 1, 4, 5);
    *(quad *)(out + ldo) = SHUFFLE(ab01, cd01, 2, 3, 6, 7);
    *(quad *)(out + 2 * ldo) = SHUFFLE(ab23, cd23, 0, 1, 4, 5);
    *(quad *)(out + 3 * ldo) = SHUFFLE(ab23, cd23, 2, 3, 6, 7);
#else
    for (int r = 0; r < 4; r++)
        for (idx c = 0; c < 4; c++) out[r * ldo + c] = x[c * ldx + r];
#endif
}

// out (K, width)'s first n columns = X (K, n); trans: X is stored as (n, K).
ALWAYS_INLINE void pack_panel(float *out, idx width, idx n, const float *X, idx ldx, int trans,
                              idx K) {
    enum { LINE = 16 };
    idx done = 0, quads = n / 4 * 4;
    for (idx k = 0; k < K && !trans; k++)
        for (idx c = 0; c < n; c++) out[k * width + c] = X[k * ldx + c];
    if (!trans) return;
    for (; done + LINE <= K; done += LINE)  // a cache line of four rows of X at a time
        for (idx c = 0; c < quads; c += 4)
            for (idx k = done; k < done + LINE; k += 4)
                transpose4(out + k * width + c, width, X + c * ldx + k, ldx);
    for (idx k = quads < n ? 0 : done; k < K; k++)  // the rest
        for (idx c = k < done ? quads : 0; c < n; c++)
            out[k * width + c] = X[c * ldx + k];
}

// Rows of a panel for K of the inner dimension.
static idx panel_rows(int way, idx K) {
    return way == TILES ? (K + 31) / 32 * 16 : way == PAIRED ? (K + 1) / 2 : K;
}

// pack_panel() of numbers rounded to bfloat16, zero in columns n..width - 1. Pairs: a number of the
// panel's row k is a pair, of rows 2 k (its lower half) and 2 k + 1, zero beyond K.
ALWAYS_INLINE void pack_rounded(float *out, idx width, idx n, const float *X, idx ldx, int trans,
                                idx K, int way) {
    enum { CHUNK = 32 };  // rows at a time
    float chunk[CHUNK * NR];
    memset(chunk, 0, sizeof chunk);
    for (idx k0 = 0; k0 < K; k0 += CHUNK, X += CHUNK * (trans ? 1 : ldx)) {
        idx rows = min_idx(CHUNK, K - k0), end = way == TILES ? CHUNK : (rows + 1) / 2 * 2;
        memset(chunk + rows * width, 0, (end - rows) * width * sizeof *chunk);
        pack_panel(chunk, width, n, X, ldx, trans, rows);
        for (idx k = 0; k < rows && way == ROUNDED; k++, out += width)
            for (idx c = 0; c < width; c++) out[c] = rounded(chunk[k * width + c]);
        for (idx k = 0; k < end && way != ROUNDED; k += 2, out += width)
            round_pairs(out, chunk + k * width, width);
    }
}

// out (count / width panels of (K, width)) = `count` columns of X (K, count), each panel's row of
// `width` numbers contiguous, zero past the edge. trans: X is stored as (count, K).
ALWAYS_INLINE void pack(float *out, idx width, const float *X, idx ldx, int trans, idx count,
                        idx K, int way) {
    for (idx first = 0; first < count; first += width, out += width * panel_rows(way, K)) {
        const float *x = X + first * (trans ? ldx : 1);
        if (way != NOT_ROUNDED) {
            pack_rounded(out, width, min_idx(width, count - first), x, ldx, trans, K, way);
        } else if (first + width <= count) {
            pack_panel(out, width, width, x, ldx, trans, K);
        } else {
            memset(out, 0, width * K * sizeof(float));
            pack_panel(out, width, count - first, x, ldx, trans, K);
        }
    }
}

// out (MR, n) = start (MR, n) + a (K, MR)^T @ b (K, NR)'s first n columns, n = `vectors` (literal)
// whole vectors; a and b packed, row strides ldo and lds (0: every row starts as the same numbers).
// paired (literal): of pairs of k.
ALWAYS_INLINE void gemm_kernel(int paired, int vectors, float *out, idx ldo, const float *start,
                               idx lds, const float *a, const float *b, idx K) {
    vec acc[MR][NV];
    for (int r = 0; r < MR; r++)
        for (int v = 0; v < vectors; v++)
            acc[r][v] = *(const vec *)(start + r * lds + v * VEC);
    for (idx k = 0; k < K; k++, a += MR, b += NR) {
        vec row[NV];
        UNROLL for (int v = 0; v < vectors; v++) row[v] = *(const vec *)(b + v * VEC);
        UNROLL for (int r = 0; r < MR; r++)
            UNROLL for (int v = 0; v < vectors; v++)
                if (paired) acc[r][v] = multiply_pair(acc[r][v], a[r], row[v]);
                else acc[r][v] += a[r] * row[v];
    }
    for (int r = 0; r < MR; r++)
        for (int v = 0; v < vectors; v++)
            *(vec *)(out + r * ldo + v * VEC) = acc[r][v];
}

// A tile of C at c, of rows x cols numbers: C = a^T b, + C if add, else + bias if given. A narrow
// tile is made of one or two vectors. A whole one is made in place, one at the edge beside it.
ALWAYS_INLINE void gemm_tile(int paired, float *c, idx ldc, idx rows, idx cols, int add,
                             const float *bias, const float *a, const float *b, idx K) {
    static const float zeros[NR];
    float tile[MR * NR];
    int vectors = cols <= VEC ? 1 : cols <= 2 * VEC ? 2 : NV;
    int whole = rows == MR && cols == vectors * VEC;
    float *out = whole ? c : tile;
    const float *start = !whole ? zeros : add ? c : bias ? bias : zeros;
    idx ldo = whole ? ldc : NR, lds = whole && add ? ldc : 0;
    if (vectors == NV) gemm_kernel(paired, NV, out, ldo, start, lds, a, b, K);
    else if (vectors == 1) gemm_kernel(paired, 1, out, ldo, start, lds, a, b, K);
    else gemm_kernel(paired, 2, out, ldo, start, lds, a, b, K);
    for (idx r = 0; r < rows && !whole; r++)
        for (idx j = 0; j < cols; j++) {
            float *at = c + r * ldc + j;
            *at = tile[r * NR + j] + (add ? *at : bias ? bias[j] : 0.0f);
        }
}

#include "amx.h"  // tiles_permitted(), tiles_begin(); pack_tiles(), gemm_tiles()

// The fastest way that there is; found out once.
static int bf16_way;
static int bf16_best(void) {
    if (!bf16_way) bf16_way = tiles_permitted() ? TILES : WITHOUT_TILES;
    return bf16_way;
}

// The sum over k runs in blocks of KC, in order, whatever the
// number of threads: they share out the tiles of C. If all rows are one block, a thread takes a
// group of column panels and packs them as it goes; else the panels are packed for all first.
static void gemm(int trans_a, int trans_b, idx M, idx N, idx K, const float *A, idx lda,
                 const float *B, idx ldb, const float *bias, int add, float *C, idx ldc) {
    if (M == 0 || N == 0) return;
    packed_reserve(N);
    idx panels = (N + NR - 1) / NR, row_panels = (M + MR - 1) / MR;
    int threads = min_int(pack_room.threads, omp_get_max_threads());  // see threads_adapt()
    if ((double)M * (double)N * (double)K <= 1e5) threads = 1;  // waking them costs microseconds
    int one_block = M <= MC && panels >= threads;
    idx row_blocks = one_block ? 1 : ((M + MC - 1) / MC + threads - 1) / threads * threads;
    row_blocks = min_idx(row_blocks, row_panels);
    idx column_groups = min_idx((threads + row_blocks - 1) / row_blocks, panels);
    int way = gemm_bf16 ? bf16_best() : NOT_ROUNDED;
    idx block_k = way >= PAIRED ? 2 * KC : KC;
#pragma omp parallel num_threads(threads)
    for (idx k0 = 0; k0 == 0 || k0 < K; k0 += block_k) {
        idx kc = min_idx(block_k, K - k0), panel_k = panel_rows(way, kc), add_now = add || k0 > 0;
        const float *A0 = A + (trans_a ? k0 * lda : k0), *B0 = B + (trans_b ? k0 : k0 * ldb);
        idx panel_size = NR * panel_k, panel_step = NR * (trans_b ? ldb : 1);
        if (!one_block) {
#pragma omp for schedule(static)
            for (idx p = 0; p < panels; p++)
                pack(pack_room.b + p * panel_size, NR, B0 + p * panel_step, ldb, trans_b,
                     min_idx(NR, N - p * NR), kc, way);
        }
#pragma omp for schedule(dynamic)
        for (idx task = 0; task < row_blocks * column_groups; task++) {
            idx block = task % row_blocks, group = task / row_blocks;  // of nearly equal size
            idx i0 = block * row_panels / row_blocks * MR;
            idx m = min_idx((block + 1) * row_panels / row_blocks * MR, M) - i0;
            idx p0 = group * panels / column_groups, p1 = (group + 1) * panels / column_groups;
            float *a = pack_room.a + (idx)thread_id() * MC * KC;
            const float *A1 = A0 + i0 * (trans_a ? 1 : lda);
            if (way == TILES) {
                tiles_begin();
                pack_tiles(a, A1, lda, trans_a, m, kc, panel_k);
            } else {
                pack(a, MR, A1, lda, !trans_a, m, kc, way);
            }
            for (idx p = p0; p < p1; p++) {
                idx n = min_idx(NR, N - p * NR);
                float *b = pack_room.b + p * panel_size;
                if (one_block) pack(b, NR, B0 + p * panel_step, ldb, trans_b, n, kc, way);
                for (idx i = 0; i < m; i += way == TILES ? 32 : MR) {
                    float *c = C + (i0 + i) * ldc + p * NR;
                    const float *bias_p = bias ? bias + p * NR : NULL, *a_i = a + i * panel_k;
                    idx rows = min_idx(MR, m - i);
                    if (way == TILES)
                        gemm_tiles(c, ldc, min_idx(32, m - i), n, add_now, bias_p, a_i, b, panel_k);
                    else if (way == PAIRED)
                        gemm_tile(1, c, ldc, rows, n, add_now, bias_p, a_i, b, panel_k);
                    else gemm_tile(0, c, ldc, rows, n, add_now, bias_p, a_i, b, panel_k);
                }
            }
        }
    }
}

// rows (literal, <= 8) rows of small_product().
ALWAYS_INLINE void small_rows(int rows, float *out, idx ldo, const float *a, idx a_row, idx a_col,
                              const float *b, idx ldb, idx n, idx K) {
    for (idx j = 0; j < n; j += VEC) {
        const vec zero = {0};
        vec acc[8];
        UNROLL for (int r = 0; r < rows; r++) acc[r] = zero;
        for (idx k = 0; k < K; k++) {
            vec row = *(const vec *)(b + k * ldb + j);
            UNROLL for (int r = 0; r < rows; r++)
                acc[r] += a[r * a_row + k * a_col] * row;
        }
        UNROLL for (int r = 0; r < rows; r++) *(vec *)(out + r * ldo + j) = acc[r];
    }
}

static void small_product(float *out, idx ldo, const float *a, idx a_row, idx a_col, const float *b,
                          idx ldb, idx m, idx n, idx K) {
    idx i = 0;
    for (; i + 8 <= m; i += 8)
        small_rows(8, out + i * ldo, ldo, a + i * a_row, a_row, a_col, b, ldb, n, K);
    for (; i + 4 <= m; i += 4)
        small_rows(4, out + i * ldo, ldo, a + i * a_row, a_row, a_col, b, ldb, n, K);
    for (; i < m; i++)
        small_rows(1, out + i * ldo, ldo, a + i * a_row, a_row, a_col, b, ldb, n, K);
}
