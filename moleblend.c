// moleblend.c - MoleBLEND in plain C: pretrain, fine-tune and use a Transformer on molecules.
//
//   "Multimodal Molecular Pretraining via Modality Blending" (Yu et al., ICLR 2024,
//   arXiv 2307.06235). For every ordered pair of atoms one of three relations is drawn - shortest
//   path distance, bond path, 3D distance -, the blended matrix is the encoder's attention bias,
//   and four heads must recover all of them. Section numbers "(paper 3.1)" refer to that text,
//   module names such as `molecule_attn_bias` to its official PyTorch release, whose numbers this
//   file reproduces (see test.c).
//
//   build:  cc -O3 -march=native -ffp-contract=fast -fno-math-errno -fopenmp moleblend.c -lm
//   use:    ./moleblend train.bin          (train.bin comes from data_prep)
//
// Dimension letters, the same everywhere (lower case: an index over that dimension)
//   B  molecules in the batch          C  channels of a token [dim]
//   N  atoms of one molecule           F  width of the feed-forward layer [ffn]
//   S  its tokens, N + 1: token 0 is   H  attention heads
//      the graph token                 D  channels of a head, C / H
//   T  tokens of the batch             L  encoder layers
//   A  atoms of the batch, T - B       G  Gaussian kernels [kernels]
//   P  ordered atom pairs, sum N * N   R  width of a pair map, 32
//   Q  those of them that use 3D       E  bonds of a path that count, 5
//   W  row length of a bias matrix:    Y  tasks of a fine-tuning head
//      S rounded up to whole vectors   M, N, K  inside gemm() only: rows, columns, inner
//
// A batch is packed: the tokens of all molecules stand one after the other in (T, C) matrices, with
// no padding and no mask. Matrices are row-major, shapes are given as (rows, columns), i and j are
// the two atoms of a pair. Gradients are named d + name; a backward function stands under its
// forward function. Everything is deterministic: threads share out results, never a sum.
//
// Sections
//   1 constants           5 relations and batches       9 optimiser, metrics
//   2 vector arithmetic   6 embeddings and biases      10 checkpoints
//   3 matrix product      7 encoder layers             11 training, evaluation
//   4 parameters          8 heads and losses           12 commands and main

#ifndef MB_PROGRAM
#define MB_PROGRAM "moleblend"
#endif
#include "moleblend.h"

#if !defined(_OPENMP) && (defined(__GNUC__) || defined(__clang__))
#pragma GCC diagnostic ignored "-Wunknown-pragmas"  // without OpenMP its pragmas mean nothing
#endif

// =================================================================================================
// 1 Constants. Values that the official release writes into its code carry the module's name.
// =================================================================================================

enum {
    PAIR_WIDTH = 32,           // R, transform_n2_head
    PATH_BONDS = 5,            // E, multi_hop_max_dist
    PATH_NONE = BOND_CODES,    // code of an empty path slot
    PATH_CODES = BOND_CODES + 1,
    SPD_UNREACHABLE = 510,     // and every path of 510 bonds or more
    SPD_ROWS = 512,            // rows of spatial_pos_encoder and of the degree tables
    FEATURE_ROWS = 512,        // rows per feature in the atom and bond tables
    ATOM_ROWS = 1 + 9 * 512,   // row 0 is padding
    ATOM_ROW_OFFSET = 2,       // feature value v of feature k is row 2 + 512 k + v
    BOND_ROWS = 1 + 3 * 512,
    BOND_ROW_OFFSET = 3,       // feature value v of feature k is row 3 + 512 k + v
    GAUSS_ROWS = 1536,         // gbf.mul and gbf.bias
    GAUSS_ROW_OFFSET = 3,      // atom i: row 3 + atomic number index; atom j: 512 more
    EDGE_DIS_BLOCKS = 128,     // edge_dis_encoder has 128 blocks of (H, H), 5 are used
    SPD_CLASSES = 11,
    EDGE_CLASSES = 24,
    EDGE_OUTPUTS = PATH_BONDS * EDGE_CLASSES,
    D3_INNER = 256,            // blend_3d_pred_head.linear
};

#define GAUSS_PI 3.14159f         // gbf: the release's truncated pi
#define GAUSS_STD_MIN 1e-2f       // gbf
#define DIRECTION_EPS 1e-5f       // delta = (pos_j - pos_i) / (distance + eps)
#define GEOMETRY_SCALE 0.01f      // of the 3D part of an atom's embedding
#define NORM_EPS 1e-5f            // LayerNorm of the trunk
#define PAIR_NORM_EPS 1e-12f      // LayerNorm of the pair maps
#define GAUSS_FAR 174.0f          // z^2 beyond which exp(-0.5 z^2) is no normal float: taken as 0
#define COSINE_EPS 1e-8
#define CLIP_EPS 1e-6             // clip_grad_norm: factor = clip / (norm + eps)
#define INIT_STD 0.02f
#define SCORE_MASK (-1e30f)       // score of a lane past the end of a row: its exp is 0

// =================================================================================================
// 2 Vector arithmetic: elementary functions that compilers vectorise (no table, no branch, no
//   call), accurate to a few units in the last place; test.c compares them with libm.
// =================================================================================================

#if (defined(__GNUC__) || defined(__clang__)) && !defined(PLAIN_C)
#if defined(__AVX512F__)
enum { VEC = 16, MR = 8, NV = 3 };  // floats in a vector; register tile of gemm, see section 3
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
#else
typedef int quad_mask __attribute__((vector_size(4 * sizeof(int))));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (quad_mask){i, j, k, l})
#endif
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#else  // any C11 compiler (or -DPLAIN_C): the same code on vectors of one float
enum { VEC = 1, MR = 4, NV = 4 };
typedef float vec;
#define ALWAYS_INLINE static inline
#endif

#ifdef __clang__  // clang 14 cannot vectorise a maximum, and warns when asked to
#define SIMD_MAX_TOP
#else
#define SIMD_MAX_TOP _Pragma("omp simd reduction(max : top)")
#endif

static int min_int(int a, int b) { return a < b ? a : b; }
static int max_int(int a, int b) { return a > b ? a : b; }
static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

// n rounded up to a multiple of m.
static int round_up(int n, int m) { return (n + m - 1) / m * m; }

// `count` zeroed floats that begin at a cache line, so that no vector straddles two: 3 % of a
// training step. The caller frees.
static float *floats_alloc(size_t count) {
#ifdef _WIN32  // has no aligned_alloc()
    return xmalloc(count, sizeof(float));
#else
    enum { LINE = 64 };
    size_t bytes = mul_size(count / (LINE / sizeof(float)) + 1, LINE);
    float *x = aligned_alloc(LINE, bytes);
    CHECK(x, "out of memory: %.1f MiB were refused; try a lower --batch-size",
          (double)bytes / (1 << 20));
    return memset(x, 0, bytes);
#endif
}

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
//   7.1.26 with coefficients fitted to 1.5e-7 relative on |x| <= 14.
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

// gelu(x) = x Phi(x), the exact form.
ALWAYS_INLINE float gelu(float x) {
    float density;
    return x * normal_cdf(x, &density);
}

// d gelu / dx = Phi(x) + x phi(x)
ALWAYS_INLINE float gelu_slope(float x) {
    float density, cdf = normal_cdf(x, &density);
    return cdf + x * density;
}

// x (n) = softmax of x (n), in place.
static void softmax_row(float *x, int n) {
    float top = x[0], sum = 0;
    SIMD_MAX_TOP
    for (int j = 0; j < n; j++) top = x[j] > top ? x[j] : top;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; j++) {
        x[j] = exp_fast(x[j] - top);
        sum += x[j];
    }
    float inverse = 1.0f / sum;
#pragma omp simd
    for (int j = 0; j < n; j++) x[j] *= inverse;
}

ALWAYS_INLINE float dot_product(const float *a, const float *b, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; j++) sum += a[j] * b[j];
    return sum;
}

// Who draws: every random number of a step is named by these, a purpose and its place.
typedef struct {
    uint64_t seed;
    uint32_t step, first_place;  // molecule b of the batch has place first_place + b
    int active;                  // 0: no dropout (evaluation)
} Draws;

// words (4, BLOCKS): philox() of the counters `first`, `first` + 1, ... A round of all blocks is
// one loop, which compilers vectorise; that makes a draw ten times faster than calling philox().
enum { BLOCKS = 64 };
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

// mask (n): 0 with probability p, else 1 / (1 - p). Named (purpose, place, row): number k is word
// k / blocks of Philox block k mod blocks of the row.
static void dropout_row(float *mask, int n, double p, const Draws *draws, uint32_t purpose,
                        uint32_t place, uint32_t row) {
    int blocks = (n + 3) / 4;
    uint32_t limit = (uint32_t)(p * 4294967296.0), words[4][BLOCKS];
    float keep = (float)(1.0 / (1.0 - p));
    for (int first = 0; first < blocks; first += BLOCKS) {
        int count = min_int(BLOCKS, blocks - first);
        uint32_t index = row * (uint32_t)blocks + (uint32_t)first;
        philox_blocks(words, count, (Philox){{index, place, draws->step, purpose}}, draws->seed);
        for (int w = 0; w < 4; w++) {
            int at = w * blocks + first, end = min_int(count, n - at);
#pragma omp simd
            for (int k = 0; k < end; k++) mask[at + k] = words[w][k] < limit ? 0.0f : keep;
        }
    }
}

// =================================================================================================
// 3 Matrix product. gemm() is nearly all of the arithmetic of a training step; it follows Goto and
//   van de Geijn (2008). Both operands are copied ("packed") into the order in which the kernel
//   reads them, which also absorbs transposition and pads the edges, so there is one kernel:
//
//              NR                    tile (MR, NR) of C stays in registers while the kernel
//            +----+                  walks down k: one row of the B panel (NV vectors) times
//         k  | B  |                  MR numbers of the A panel, MR * NV fused multiply-adds
//            |    |
//      +----++----+                  loops, outermost first:
//   MR | A  || C  |                    k blocks of KC     B panel: KC * NR floats, in L2/L1
//      +----++----+                    row blocks of <= MC, column panels of NR, row panels of MR
//        k                             the packed row block, MC * KC floats, stays in L2
// =================================================================================================

enum { NR = NV * VEC, KC = 384, MC = 16 * MR };

// Memory that is made once and serves every step.
typedef struct {
    int threads;
    float *packed_a;     // (threads, MC * KC)
    float *packed_b;     // (KC, widest product)
    float *thread;       // (threads, thread_size) scratch of a task
    size_t thread_size;
} Work;

static float *work_thread(const Work *w) {
    return w->thread + (size_t)thread_id() * w->thread_size;
}

// Threads that a parallel region will have now: see threads_adapt().
static int team_size(const Work *w) {
#ifdef _OPENMP
    return min_int(w->threads, omp_get_max_threads());
#else
    return w->threads;
#endif
}

#ifdef MOLEBLEND_TEST
// The specification: C (M, N) = A (M, K) @ B (K, N), + C if add, else + bias (N) per row if given.
// trans_a: A is stored as (K, M); trans_b: B is stored as (N, K). lda, ldb, ldc: row strides.
static void gemm_reference(int trans_a, int trans_b, int M, int N, int K, const float *A, int lda,
                           const float *B, int ldb, const float *bias, int add, float *C, int ldc) {
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) {
            double sum = add ? (double)C[(size_t)i * ldc + j] : bias ? (double)bias[j] : 0.0;
            for (int k = 0; k < K; k++)
                sum += (double)(trans_a ? A[(size_t)k * lda + i] : A[(size_t)i * lda + k]) *
                       (double)(trans_b ? B[(size_t)j * ldb + k] : B[(size_t)k * ldb + j]);
            C[(size_t)i * ldc + j] = (float)sum;
        }
    }
}
#endif

// out (4, 4) = transpose of x (4, 4), row strides ldo and ldx.
ALWAYS_INLINE void transpose4(float *out, int ldo, const float *x, int ldx) {
#ifdef SHUFFLE
    quad a = *(const quad *)x, b = *(const quad *)(x + ldx);
    quad c = *(const quad *)(x + 2 * (size_t)ldx), d = *(const quad *)(x + 3 * (size_t)ldx);
    quad ab01 = SHUFFLE(a, b, 0, 4, 1, 5), ab23 = SHUFFLE(a, b, 2, 6, 3, 7);
    quad cd01 = SHUFFLE(c, d, 0, 4, 1, 5), cd23 = SHUFFLE(c, d, 2, 6, 3, 7);
    *(quad *)out = SHUFFLE(ab01, cd01, 0, 1, 4, 5);
    *(quad *)(out + ldo) = SHUFFLE(ab01, cd01, 2, 3, 6, 7);
    *(quad *)(out + 2 * (size_t)ldo) = SHUFFLE(ab23, cd23, 0, 1, 4, 5);
    *(quad *)(out + 3 * (size_t)ldo) = SHUFFLE(ab23, cd23, 2, 3, 6, 7);
#else
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 4; c++) out[(size_t)r * ldo + c] = x[(size_t)c * ldx + r];
#endif
}

// out (K, width)'s first n columns = X (K, n); trans: X is stored as (n, K).
ALWAYS_INLINE void pack_panel(float *out, int width, int n, const float *X, int ldx, int trans,
                              int K) {
    enum { LINE = 16 };
    int done = 0, quads = n / 4 * 4;
    for (int k = 0; k < K && !trans; k++)
        for (int c = 0; c < n; c++) out[(size_t)k * width + c] = X[(size_t)k * ldx + c];
    if (!trans) return;
    for (; done + LINE <= K; done += LINE)  // a cache line of four rows of X at a time
        for (int c = 0; c < quads; c += 4)
            for (int k = done; k < done + LINE; k += 4)
                transpose4(out + (size_t)k * width + c, width, X + (size_t)c * ldx + k, ldx);
    for (int k = quads < n ? 0 : done; k < K; k++)  // the rest
        for (int c = k < done ? quads : 0; c < n; c++)
            out[(size_t)k * width + c] = X[(size_t)c * ldx + k];
}

// out (count / width panels of (K, width)) = `count` columns of X (K, count), each panel's row of
// `width` numbers contiguous, zero past the edge. trans: X is stored as (count, K).
ALWAYS_INLINE void pack(float *out, int width, const float *X, int ldx, int trans, int count,
                        int K) {
    for (int first = 0; first < count; first += width, out += (size_t)width * K) {
        const float *x = X + (size_t)first * (trans ? (size_t)ldx : 1);
        if (first + width <= count) {
            pack_panel(out, width, width, x, ldx, trans, K);
        } else {
            memset(out, 0, sizeof(float) * (size_t)width * K);
            pack_panel(out, width, count - first, x, ldx, trans, K);
        }
    }
}

// out (MR, n) = start (MR, n) + a (K, MR)^T @ b (K, NR)'s first n columns, n = `vectors` (literal)
// whole vectors; a and b packed, row strides ldo and lds (0: every row starts as the same numbers).
ALWAYS_INLINE void gemm_kernel(int vectors, float *out, int ldo, const float *start, int lds,
                               const float *a, const float *b, int K) {
    vec acc[MR][NV];
    for (int r = 0; r < MR; r++)
        for (int v = 0; v < vectors; v++)
            acc[r][v] = *(const vec *)(start + (size_t)r * lds + v * VEC);
    for (int k = 0; k < K; k++, a += MR, b += NR) {
        vec row[NV];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) row[v] = *(const vec *)(b + v * VEC);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) acc[r][v] += a[r] * row[v];
    }
    for (int r = 0; r < MR; r++)
        for (int v = 0; v < vectors; v++)
            *(vec *)(out + (size_t)r * ldo + v * VEC) = acc[r][v];
}

// A tile of C at c, of rows x cols numbers: C = a^T b, + C if add, else + bias if given. A narrow
// tile is made of one or two vectors. A whole one is made in place, one at the edge beside it.
ALWAYS_INLINE void gemm_tile(float *c, int ldc, int rows, int cols, int add, const float *bias,
                             const float *a, const float *b, int K) {
    static const float zeros[NR];
    float tile[MR * NR];
    int vectors = cols <= VEC ? 1 : cols <= 2 * VEC ? 2 : NV;
    int whole = rows == MR && cols == vectors * VEC;
    float *out = whole ? c : tile;
    const float *start = !whole ? zeros : add ? c : bias ? bias : zeros;
    int ldo = whole ? ldc : NR, lds = whole && add ? ldc : 0;
    if (vectors == NV) gemm_kernel(NV, out, ldo, start, lds, a, b, K);
    else if (vectors == 1) gemm_kernel(1, out, ldo, start, lds, a, b, K);
    else gemm_kernel(2, out, ldo, start, lds, a, b, K);
    for (int r = 0; r < rows && !whole; r++)
        for (int j = 0; j < cols; j++) {
            float *at = c + (size_t)r * ldc + j;
            *at = tile[r * NR + j] + (add ? *at : bias ? bias[j] : 0.0f);
        }
}

// Same contract as gemm_reference(). The sum over k runs in blocks of KC, in order, whatever the
// number of threads: they share out the tiles of C. If all rows are one block, a thread takes a
// group of column panels and packs them as it goes; else the panels are packed for all first.
static void gemm(const Work *w, int trans_a, int trans_b, int M, int N, int K, const float *A,
                 int lda, const float *B, int ldb, const float *bias, int add, float *C, int ldc) {
    if (M == 0 || N == 0) return;
    int panels = (N + NR - 1) / NR, row_panels = (M + MR - 1) / MR;
    int threads = (double)M * N * K > 1e5 ? team_size(w) : 1;  // waking threads costs microseconds
    int one_block = M <= MC && panels >= threads;
    int row_blocks = one_block ? 1 : min_int(round_up((M + MC - 1) / MC, threads), row_panels);
    int column_groups = min_int((threads + row_blocks - 1) / row_blocks, panels);
#pragma omp parallel num_threads(threads)
    for (int k0 = 0; k0 == 0 || k0 < K; k0 += KC) {
        int kc = min_int(KC, K - k0), add_now = add || k0 > 0;
        const float *A0 = A + (trans_a ? (size_t)k0 * lda : (size_t)k0);
        const float *B0 = B + (trans_b ? (size_t)k0 : (size_t)k0 * ldb);
        size_t panel_size = (size_t)NR * kc, panel_step = NR * (trans_b ? (size_t)ldb : 1);
        if (!one_block) {
#pragma omp for schedule(static)
            for (int p = 0; p < panels; p++)
                pack(w->packed_b + p * panel_size, NR, B0 + p * panel_step, ldb, trans_b,
                     min_int(NR, N - p * NR), kc);
        }
#pragma omp for schedule(dynamic)
        for (int task = 0; task < row_blocks * column_groups; task++) {
            int block = task % row_blocks, group = task / row_blocks;  // of nearly equal size
            int i0 = (int)((size_t)block * row_panels / row_blocks) * MR;
            int m = min_int((int)((size_t)(block + 1) * row_panels / row_blocks) * MR, M) - i0;
            int p0 = (int)((size_t)group * panels / column_groups);
            int p1 = (int)((size_t)(group + 1) * panels / column_groups);
            float *a = w->packed_a + (size_t)thread_id() * MC * KC;
            pack(a, MR, A0 + (size_t)i0 * (trans_a ? 1 : (size_t)lda), lda, !trans_a, m, kc);
            for (int p = p0; p < p1; p++) {
                int n = min_int(NR, N - p * NR);
                float *b = w->packed_b + p * panel_size;
                if (one_block) pack(b, NR, B0 + p * panel_step, ldb, trans_b, n, kc);
                for (int i = 0; i < m; i += MR)
                    gemm_tile(C + (size_t)(i0 + i) * ldc + p * NR, ldc, min_int(MR, m - i), n,
                              add_now, bias ? bias + p * NR : NULL, a + (size_t)i * kc, b, kc);
            }
        }
    }
}

// rows (literal, <= 8) rows of small_product().
ALWAYS_INLINE void small_rows(int rows, float *out, int ldo, const float *a, int a_row, int a_col,
                              const float *b, int ldb, int n, int K) {
    for (int j = 0; j < n; j += VEC) {
        const vec zero = {0};
        vec acc[8];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) acc[r] = zero;
        for (int k = 0; k < K; k++) {
            vec row = *(const vec *)(b + (size_t)k * ldb + j);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
                acc[r] += a[(size_t)r * a_row + (size_t)k * a_col] * row;
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) *(vec *)(out + (size_t)r * ldo + j) = acc[r];
    }
}

// out (m, n) = a (m, K) @ b (K, n) for the small matrices of one molecule, by one thread, without
// packing. Element (r, k) of a stands at r * a_row + k * a_col. n must be a multiple of VEC: rows
// of b and out are padded.
static void small_product(float *out, int ldo, const float *a, int a_row, int a_col, const float *b,
                          int ldb, int m, int n, int K) {
    int i = 0;
    for (; i + 8 <= m; i += 8)
        small_rows(8, out + (size_t)i * ldo, ldo, a + (size_t)i * a_row, a_row, a_col, b, ldb, n,
                   K);
    for (; i + 4 <= m; i += 4)
        small_rows(4, out + (size_t)i * ldo, ldo, a + (size_t)i * a_row, a_row, a_col, b, ldb, n,
                   K);
    for (; i < m; i++)
        small_rows(1, out + (size_t)i * ldo, ldo, a + (size_t)i * a_row, a_row, a_col, b, ldb, n,
                   K);
}

// out (rows, width) = x (rows, n), zero in the columns n..width-1.
static void copy_padded(float *out, int width, const float *x, int ldx, int rows, int n) {
    for (int r = 0; r < rows; r++) {
        memcpy(out + (size_t)r * width, x + (size_t)r * ldx, sizeof(float) * (size_t)n);
        memset(out + (size_t)r * width + n, 0, sizeof(float) * (size_t)(width - n));
    }
}

// out (n, width) = transpose of x (rows, n), zero in the columns rows..width-1.
static void copy_transposed(float *out, int width, const float *x, int ldx, int rows, int n) {
    for (int c = 0; c < n; c++) {
        for (int r = 0; r < rows; r++) out[(size_t)c * width + r] = x[(size_t)r * ldx + c];
        memset(out + (size_t)c * width + rows, 0, sizeof(float) * (size_t)(width - rows));
    }
}

// out (n) = sum over the rows of x (rows, n), in order; threads share out the columns.
static void column_sums(float *out, const float *x, int ldx, int rows, int n) {
    enum { STRIP = 64 };
#pragma omp parallel for schedule(static)
    for (int c0 = 0; c0 < n; c0 += STRIP) {
        float sum[STRIP] = {0};
        int width = min_int(STRIP, n - c0);
        for (int r = 0; r < rows; r++) {
            const float *x_r = x + (size_t)r * ldx + c0;
            for (int c = 0; c < width; c++) sum[c] += x_r[c];
        }
        memcpy(out + c0, sum, sizeof(float) * (size_t)width);
    }
}

// out (rows, OC) = x (rows, IC) @ weight (OC, IC)^T + bias (OC)
static void linear_forward(const Work *w, float *out, const float *x, const float *weight,
                           const float *bias, int rows, int IC, int OC) {
    gemm(w, 0, 1, rows, OC, IC, x, IC, weight, IC, bias, 0, out, OC);
}

// dweight = dout^T x, dbias = column sums of dout; dx (may be NULL) = dout weight, + dx if add_dx.
// dx may be x. A weight is used once in a step, so its gradient is stored, not added.
static void linear_backward(const Work *w, float *dx, int add_dx, float *dweight, float *dbias,
                            const float *dout, const float *x, const float *weight, int rows,
                            int IC, int OC) {
    gemm(w, 1, 0, OC, IC, rows, dout, OC, x, IC, NULL, 0, dweight, IC);
    column_sums(dbias, dout, OC, rows, OC);
    if (dx) gemm(w, 0, 0, rows, IC, OC, dout, OC, weight, IC, NULL, add_dx, dx, IC);
}

// =================================================================================================
// 4 Parameters. One table names every tensor: it makes the structs, the arena, the initialisation,
//   the optimiser's reach, the checkpoint and the tests. Gradients and the two Adam moments are
//   arenas of the same layout.
// =================================================================================================

typedef struct {
    int layers, dim, ffn, heads, kernels;  // L, C, F, H, G
    int tasks;                             // Y; 0: a pretraining model with its four heads
} Config;

typedef enum {
    INIT_NORMAL,  // N(0, 0.02^2)
    INIT_TABLE,   // the same, row 0 (padding) zero
    INIT_ZERO, INIT_ONE,
    INIT_WIDE,    // U(0, 3): means and widths of the Gaussians, Angstrom
    INIT_HALF,    // 0.5, row 0 zero
} InitRule;

// X(field, official name, rows, columns, rule); rows = 0: a vector of `columns` numbers.
// The tables, whose gradients are sums over atoms or pairs, come first: up to gauss_bias.
// q, k, v (and the six pair maps) stand next to each other and are used as one matrix.
#define ENCODER_TENSORS(X)                                                                         \
    X(atom_table, "atom_feature.atom_encoder.weight", ATOM_ROWS, C, INIT_TABLE)                    \
    X(in_degree, "atom_feature.in_degree_encoder.weight", SPD_ROWS, C, INIT_TABLE)                 \
    X(out_degree, "atom_feature.out_degree_encoder.weight", SPD_ROWS, C, INIT_TABLE)               \
    X(graph_token, "atom_feature.graph_token.weight", 1, C, INIT_NORMAL)                           \
    X(bond_table, "molecule_attn_bias.edge_encoder.weight", BOND_ROWS, H, INIT_TABLE)              \
    X(path_maps, "molecule_attn_bias.edge_dis_encoder.weight", EDGE_DIS_BLOCKS *H *H, 1,           \
      INIT_NORMAL)                                                                                 \
    X(spd_table, "molecule_attn_bias.spatial_pos_encoder.weight", SPD_ROWS, H, INIT_TABLE)         \
    X(graph_bias, "molecule_attn_bias.graph_token_virtual_distance.weight", 1, H, INIT_NORMAL)     \
    X(gauss_mean, "molecule_3d_bias.gbf.means.weight", 1, G, INIT_WIDE)                            \
    X(gauss_std, "molecule_3d_bias.gbf.stds.weight", 1, G, INIT_WIDE)                              \
    X(gauss_mul, "molecule_3d_bias.gbf.mul.weight", GAUSS_ROWS, 1, INIT_HALF)                      \
    X(gauss_bias, "molecule_3d_bias.gbf.bias.weight", GAUSS_ROWS, 1, INIT_ZERO)                    \
    X(mlp1_w, "molecule_3d_bias.gbf_proj.layer1.weight", G, G, INIT_NORMAL)                        \
    X(mlp1_b, "molecule_3d_bias.gbf_proj.layer1.bias", 0, G, INIT_ZERO)                            \
    X(mlp2_w, "molecule_3d_bias.gbf_proj.layer2.weight", H, G, INIT_NORMAL)                        \
    X(mlp2_b, "molecule_3d_bias.gbf_proj.layer2.bias", 0, H, INIT_ZERO)                            \
    X(geo_w, "molecule_3d_bias.edge_proj.weight", C, G, INIT_NORMAL)                               \
    X(geo_b, "molecule_3d_bias.edge_proj.bias", 0, C, INIT_ZERO)                                   \
    X(embed_norm_w, "emb_layer_norm.weight", 0, C, INIT_ONE)                                       \
    X(embed_norm_b, "emb_layer_norm.bias", 0, C, INIT_ZERO)

#define LAYER_TENSORS(X)                                                                           \
    X(q_w, "layers.%d.self_attn.q_proj.weight", C, C, INIT_NORMAL)                                 \
    X(k_w, "layers.%d.self_attn.k_proj.weight", C, C, INIT_NORMAL)                                 \
    X(v_w, "layers.%d.self_attn.v_proj.weight", C, C, INIT_NORMAL)                                 \
    X(q_b, "layers.%d.self_attn.q_proj.bias", 0, C, INIT_ZERO)                                     \
    X(k_b, "layers.%d.self_attn.k_proj.bias", 0, C, INIT_ZERO)                                     \
    X(v_b, "layers.%d.self_attn.v_proj.bias", 0, C, INIT_ZERO)                                     \
    X(out_w, "layers.%d.self_attn.out_proj.weight", C, C, INIT_NORMAL)                             \
    X(out_b, "layers.%d.self_attn.out_proj.bias", 0, C, INIT_ZERO)                                 \
    X(norm1_w, "layers.%d.self_attn_layer_norm.weight", 0, C, INIT_ONE)                            \
    X(norm1_b, "layers.%d.self_attn_layer_norm.bias", 0, C, INIT_ZERO)                             \
    X(ffn1_w, "layers.%d.fc1.weight", F, C, INIT_NORMAL)                                           \
    X(ffn1_b, "layers.%d.fc1.bias", 0, F, INIT_ZERO)                                               \
    X(ffn2_w, "layers.%d.fc2.weight", C, F, INIT_NORMAL)                                           \
    X(ffn2_b, "layers.%d.fc2.bias", 0, C, INIT_ZERO)                                               \
    X(norm2_w, "layers.%d.final_layer_norm.weight", 0, C, INIT_ONE)                                \
    X(norm2_b, "layers.%d.final_layer_norm.bias", 0, C, INIT_ZERO)

#define PAIR_MAP_TENSORS(X, kind, last, rows, columns, rule)                                       \
    X(spd_row_##kind, "blend_spd_pred_head.transform_n2_head.row_" last, rows, columns, rule)      \
    X(spd_col_##kind, "blend_spd_pred_head.transform_n2_head.column_" last, rows, columns, rule)   \
    X(edge_row_##kind, "blend_edge_pred_head.transform_n2_head.row_" last, rows, columns, rule)    \
    X(edge_col_##kind, "blend_edge_pred_head.transform_n2_head.column_" last, rows, columns, rule) \
    X(d3_row_##kind, "blend_3d_pred_head.transform_n2_head.row_" last, rows, columns, rule)        \
    X(d3_col_##kind, "blend_3d_pred_head.transform_n2_head.column_" last, rows, columns, rule)

#define PRETRAIN_TENSORS(X)                                                                        \
    PAIR_MAP_TENSORS(X, w, "head.weight", R, C, INIT_NORMAL)                                       \
    PAIR_MAP_TENSORS(X, b, "head.bias", 0, R, INIT_ZERO)                                           \
    PAIR_MAP_TENSORS(X, norm_w, "LayerNorm.weight", 0, R, INIT_ONE)                                \
    PAIR_MAP_TENSORS(X, norm_b, "LayerNorm.bias", 0, R, INIT_ZERO)                                 \
    X(spd_w, "blend_spd_pred_head.linear.weight", SPD_CLASSES, R *R, INIT_NORMAL)                  \
    X(spd_b, "blend_spd_pred_head.linear.bias", 0, SPD_CLASSES, INIT_ZERO)                         \
    X(edge_w, "blend_edge_pred_head.linear_map_feature.weight", EDGE_OUTPUTS, R *R, INIT_NORMAL)   \
    X(edge_b, "blend_edge_pred_head.linear_map_feature.bias", 0, EDGE_OUTPUTS, INIT_ZERO)          \
    X(d3_w, "blend_3d_pred_head.linear.weight", D3_INNER, R *R, INIT_NORMAL)                       \
    X(d3_b, "blend_3d_pred_head.linear.bias", 0, D3_INNER, INIT_ZERO)                              \
    X(d3_axis1_w, "blend_3d_pred_head.force_proj1.weight", 1, D3_INNER, INIT_NORMAL)               \
    X(d3_axis2_w, "blend_3d_pred_head.force_proj2.weight", 1, D3_INNER, INIT_NORMAL)               \
    X(d3_axis3_w, "blend_3d_pred_head.force_proj3.weight", 1, D3_INNER, INIT_NORMAL)               \
    X(d3_axis1_b, "blend_3d_pred_head.force_proj1.bias", 0, 1, INIT_ZERO)                          \
    X(d3_axis2_b, "blend_3d_pred_head.force_proj2.bias", 0, 1, INIT_ZERO)                          \
    X(d3_axis3_b, "blend_3d_pred_head.force_proj3.bias", 0, 1, INIT_ZERO)                          \
    X(noise_q_w, "atom_proc.q_proj.weight", C, C, INIT_NORMAL)                                     \
    X(noise_k_w, "atom_proc.k_proj.weight", C, C, INIT_NORMAL)                                     \
    X(noise_v_w, "atom_proc.v_proj.weight", C, C, INIT_NORMAL)                                     \
    X(noise_q_b, "atom_proc.q_proj.bias", 0, C, INIT_ZERO)                                         \
    X(noise_k_b, "atom_proc.k_proj.bias", 0, C, INIT_ZERO)                                         \
    X(noise_v_b, "atom_proc.v_proj.bias", 0, C, INIT_ZERO)                                         \
    X(noise_axis1_w, "atom_proc.force_proj1.weight", 1, C, INIT_NORMAL)                            \
    X(noise_axis2_w, "atom_proc.force_proj2.weight", 1, C, INIT_NORMAL)                            \
    X(noise_axis3_w, "atom_proc.force_proj3.weight", 1, C, INIT_NORMAL)                            \
    X(noise_axis1_b, "atom_proc.force_proj1.bias", 0, 1, INIT_ZERO)                                \
    X(noise_axis2_b, "atom_proc.force_proj2.bias", 0, 1, INIT_ZERO)                                \
    X(noise_axis3_b, "atom_proc.force_proj3.bias", 0, 1, INIT_ZERO)

#define FINETUNE_TENSORS(X)                                                                        \
    X(head1_w, "proj_out.dense.weight", C, C, INIT_NORMAL)                                         \
    X(head1_b, "proj_out.dense.bias", 0, C, INIT_ZERO)                                             \
    X(head2_w, "proj_out.out_proj.weight", Y, C, INIT_NORMAL)                                      \
    X(head2_b, "proj_out.out_proj.bias", 0, Y, INIT_ZERO)

enum { MAX_LAYERS = 96, MAX_DIM = 8192, MAX_KERNELS = 4096 };

#define X(field, name, rows, columns, rule) float *field;
typedef struct { LAYER_TENSORS(X) } LayerTensors;
typedef struct {
    ENCODER_TENSORS(X)
    LayerTensors layer[MAX_LAYERS];
    PRETRAIN_TENSORS(X)  // NULL in a fine-tuning model
    FINETUNE_TENSORS(X)  // NULL in a pretraining model
} Tensors;
#undef X

enum { ADAM_CHUNK = 1 << 14 };  // parameters a thread takes at a time; sums are per chunk, in order

typedef struct {
    const char *pattern;  // official name, %d standing for the layer
    int layer;
    size_t rows, columns; // rows = 0: a vector
    InitRule rule;
    size_t offset, count; // floats, in the arena
    size_t field;         // byte offset in Tensors
} TensorInfo;

typedef struct {
    Config config;
    TensorInfo *info;     // (n_tensors)
    int n_tensors;
    size_t count;         // parameters in all
    size_t table_count;   // those of the tables, at the front
    float *params, *grads, *m, *v;  // arenas; the last three are NULL without training
    double *squares;      // sums of gradient_norm(), one a chunk
    Tensors p, g;         // pointers into params and grads
} Model;

// The official name of a tensor in a checkpoint, in static-size `name`.
static const char *tensor_name(const TensorInfo *t, char name[128]) {
    const char *mark = strchr(t->pattern, '%');
    if (mark)
        snprintf(name, 128, "%.*s%d%s", (int)(mark - t->pattern), t->pattern, t->layer, mark + 2);
    else
        snprintf(name, 128, "%s", t->pattern);
    return name;
}

// Fills info (NULL: only counts) with the tensors of a model; returns how many there are.
static int tensor_table(Config c, TensorInfo *info) {
    const size_t L = (size_t)c.layers, C = (size_t)c.dim, F = (size_t)c.ffn, H = (size_t)c.heads;
    const size_t G = (size_t)c.kernels, Y = (size_t)c.tasks, R = PAIR_WIDTH;
    int n = 0;
    size_t offset = 0;
#define ADD(field, name, rows, columns, rule, l, place)                                            \
    {                                                                                              \
        size_t count = mul_size(max_size((size_t)(rows), 1), (size_t)(columns));                   \
        if (info)                                                                                  \
            info[n] = (TensorInfo){name, l, rows, columns, rule, offset, count, place};            \
        offset += count;                                                                           \
        n++;                                                                                       \
    }
#define X(field, name, rows, columns, rule)                                                        \
    ADD(field, name, rows, columns, rule, 0, offsetof(Tensors, field))
    ENCODER_TENSORS(X)
#undef X
#define X(field, name, rows, columns, rule)                                                        \
    ADD(field, name, rows, columns, rule, (int)l,                                                  \
        offsetof(Tensors, layer) + l * sizeof(LayerTensors) + offsetof(LayerTensors, field))
    for (size_t l = 0; l < L; l++) {
        LAYER_TENSORS(X)
    }
#undef X
#define X(field, name, rows, columns, rule)                                                        \
    ADD(field, name, rows, columns, rule, 0, offsetof(Tensors, field))
    if (Y == 0) {
        PRETRAIN_TENSORS(X)
    } else {
        FINETUNE_TENSORS(X)
    }
#undef X
#undef ADD
    return n;
}

// Dies unless the sizes make a model.
static void config_check(Config c) {
    CHECK(c.layers >= 1 && c.layers <= MAX_LAYERS, "--layers: expected 1 to %d, found %d",
          MAX_LAYERS, c.layers);
    CHECK(c.dim >= 1 && c.dim <= MAX_DIM, "--dim: expected 1 to %d, found %d", MAX_DIM, c.dim);
    CHECK(c.ffn >= 1 && c.ffn <= MAX_DIM, "--ffn: expected 1 to %d, found %d", MAX_DIM, c.ffn);
    CHECK(c.heads >= 1 && c.dim % c.heads == 0,
          "--heads: expected a divisor of the dimension %d, found %d", c.dim, c.heads);
    CHECK(c.heads <= 256, "--heads: expected at most 256, found %d", c.heads);
    CHECK(c.kernels >= 1 && c.kernels <= MAX_KERNELS, "--kernels: expected 1 to %d, found %d",
          MAX_KERNELS, c.kernels);
}

// An arena of `count` zeroed floats, and pointers to its tensors.
static float *tensors_alloc(const Model *model, Tensors *tensors) {
    float *arena = floats_alloc(model->count);
    for (int i = 0; tensors && i < model->n_tensors; i++) {
        float *at = arena + model->info[i].offset;
        memcpy((char *)tensors + model->info[i].field, &at, sizeof at);
    }
    return arena;
}

// A model with zero parameters; with gradients and moments if it is to be trained. The caller
// calls model_free().
static void model_create(Model *model, Config config, int training) {
    config_check(config);
    *model = (Model){.config = config, .n_tensors = tensor_table(config, NULL)};
    model->info = xmalloc((size_t)model->n_tensors, sizeof *model->info);
    tensor_table(config, model->info);
    const TensorInfo *last = &model->info[model->n_tensors - 1];
    model->count = last->offset + last->count;
    model->params = tensors_alloc(model, &model->p);
    model->table_count = (size_t)(model->p.mlp1_w - model->params);
    if (!training) return;
    model->grads = tensors_alloc(model, &model->g);
    model->m = tensors_alloc(model, NULL);
    model->v = tensors_alloc(model, NULL);
    model->squares = xmalloc(model->count / ADAM_CHUNK + 1, sizeof *model->squares);
}

static void model_free(Model *model) {
    free(model->info);
    free(model->params);
    free(model->grads);
    free(model->m);
    free(model->v);
    free(model->squares);
    *model = (Model){0};
}

// Random initial parameters (N(0, 0.02^2), biases 0, LayerNorms 1 and 0, Gaussians spread
// over 0..3 Angstrom). A tensor's draws are named by its place in the table.
static void tensor_init(const Model *model, int i, uint64_t seed) {
    const TensorInfo *t = &model->info[i];
    float *x = model->params + t->offset;
    size_t padding = t->rule == INIT_TABLE || t->rule == INIT_HALF ? t->columns : 0;
#pragma omp parallel for schedule(static)
    for (size_t k = padding; k < t->count; k++) {
        uint32_t place = (uint32_t)i, index = (uint32_t)k;
        switch (t->rule) {
            case INIT_NORMAL:
            case INIT_TABLE: x[k] = INIT_STD * rng_normal(seed, RNG_INIT, 0, place, index); break;
            case INIT_WIDE: x[k] = 3.0f * rng_uniform(seed, RNG_INIT, 0, place, index); break;
            case INIT_ONE: x[k] = 1.0f; break;
            case INIT_HALF: x[k] = 0.5f; break;
            case INIT_ZERO: x[k] = 0.0f; break;
        }
    }
}

static void model_init(Model *model, uint64_t seed) {
    for (int i = 0; i < model->n_tensors; i++) tensor_init(model, i, seed);
}

// =================================================================================================
// 5 Relations and batches. A batch holds what the encoder sees of B molecules (features, the three
//   relations, which of them is used) and what the heads must recover. Relations take microseconds
//   and are computed anew for every batch; nothing derived is stored on disk.
// =================================================================================================

enum { USE_SPD = 1, USE_EDGE = 2, USE_3D = 4 };  // of a pair; an atom uses USE_SPD (2D) or USE_3D

// Largest batch a set of buffers can hold; every member separately.
typedef struct {
    size_t B, T, A, P;
    size_t W;  // sum over molecules of S rows of length W
    size_t N;  // atoms of the largest molecule
} Sizes;

// X(type, field, count): the arrays of a batch. "+ 1" makes room for the end of the last one.
#define BATCH_ARRAYS(X)                                                                            \
    X(int, atom_start, B + 1)          /* first atom of a molecule; its first token is + b */      \
    X(size_t, pair_start, B + 1)       /* first pair; pair (i, j) is + i * N + j */                \
    X(size_t, used_start, B + 1)       /* rows of its 3D pairs in (Q, *) matrices */               \
    X(size_t, bias_start, B + 1)       /* in rows of length W: H * bias_start floats come before */\
    X(size_t, d3_pairs, B)             /* ordered pairs that count in the 3D loss */               \
    X(int, n_atoms, B)                                                                             \
    X(uint8_t, has_pos, B)                                                                         \
    X(int, molecule, A + B)            /* of a token */                                            \
    X(uint8_t, atom_feat, A *ATOM_FEATURES)                                                        \
    X(uint16_t, degree, A)                                                                         \
    X(uint8_t, atom_use, A)            /* USE_ bits */                                             \
    X(uint8_t, noise_counts, A)        /* does the atom count in the denoising loss? */            \
    X(float, pos, 3 * A)               /* clean */                                                 \
    X(float, noise, 3 * A)                                                                         \
    X(uint16_t, spd, P)                                                                            \
    X(uint8_t, path, P *PATH_BONDS)    /* bond codes, PATH_NONE */                                 \
    X(uint8_t, pair_use, P)            /* USE_ bits */                                             \
    X(float, distance, P)              /* of the noised positions */                               \
    X(float, direction, 3 * P)         /* per molecule (3, N, N): from i to j, of length < 1 */    \
    X(float, labels, B *Y)

// Scratch of relations(), one per thread.
typedef struct {
    Molecule molecule;                 // the one being read
    int *start;                        // (N + 1) first entry of an atom in the lists
    int *neighbour;                    // (2 * bonds)
    uint8_t *code;                     // (2 * bonds) of the bond to that neighbour
    int bond_room;
    int *queue, *via;                  // (N)
    uint16_t *next;                    // (N, N) first atom on the way from i to j
    uint8_t *first;                    // (N, N) code of the bond to it
} PathFinder;

typedef struct {
    size_t B, T, A, P, Q, W;
    int N;                             // atoms of the largest molecule
    int Y;
    size_t spd_count, edge_count;      // pairs and path slots that count in the losses
    size_t d3_count, noise_count;      // molecules, atoms that count in the losses
    Sizes room;
    void *memory;
#define X(type, field, count) type *field;
    BATCH_ARRAYS(X)
#undef X
    PathFinder *finder;                // (threads)
} Batch;

// Row length of a molecule's bias matrix.
static int bias_width(int n_atoms) { return round_up(n_atoms + 1, VEC); }

static void sizes_add(Sizes *s, int n_atoms) {
    size_t n = (size_t)n_atoms;
    s->B += 1;
    s->A += n;
    s->T += n + 1;
    s->P += mul_size(n, n);
    s->W += (n + 1) * (size_t)bias_width(n_atoms);
    s->N = max_size(s->N, n);
}

static Sizes sizes_max(Sizes a, Sizes b) {
    return (Sizes){max_size(a.B, b.B), max_size(a.T, b.T), max_size(a.A, b.A),
                   max_size(a.P, b.P), max_size(a.W, b.W), max_size(a.N, b.N)};
}

static void batch_free(Batch *batch) {
    for (int t = 0; batch->finder && t < thread_count(); t++) {
        PathFinder *f = &batch->finder[t];
        molecule_free(&f->molecule);
        free(f->start);
        free(f->neighbour);
        free(f->code);
        free(f->queue);
        free(f->via);
        free(f->next);
        free(f->first);
    }
    free(batch->finder);
    free(batch->memory);
    *batch = (Batch){0};
}

// Memory for batches up to `room`, with Y labels a molecule. The caller calls batch_free().
static void batch_alloc(Batch *batch, Sizes room, int n_tasks) {
    const size_t B = room.B, A = room.A, P = room.P, Y = (size_t)n_tasks;
    size_t bytes = 0;
    *batch = (Batch){.room = room, .Y = n_tasks};
#define X(type, field, count) bytes += (mul_size(count, sizeof(type)) + 63) / 64 * 64;
    BATCH_ARRAYS(X)
#undef X
    char *at = batch->memory = xmalloc(bytes, 1);
#define X(type, field, count)                                                                      \
    batch->field = (type *)(void *)at;                                                             \
    at += ((count) * sizeof(type) + 63) / 64 * 64;
    BATCH_ARRAYS(X)
#undef X
    batch->finder = xmalloc((size_t)thread_count(), sizeof *batch->finder);
    for (int t = 0; t < thread_count(); t++) {
        PathFinder *f = &batch->finder[t];
        f->start = xmalloc(room.N + 2, sizeof *f->start);
        f->queue = xmalloc(room.N, sizeof *f->queue);
        f->via = xmalloc(room.N, sizeof *f->via);
        f->next = xmalloc(mul_size(room.N, room.N), sizeof *f->next);
        f->first = xmalloc(mul_size(room.N, room.N), sizeof *f->first);
    }
}

// Lays out a batch of B molecules whose atom counts are in n_atoms.
static void batch_layout(Batch *batch, size_t B) {
    Sizes s = {0};
    for (size_t b = 0; b < B; b++) {
        batch->atom_start[b] = (int)s.A;
        batch->pair_start[b] = s.P;
        batch->bias_start[b] = s.W;
        for (int t = 0; t <= batch->n_atoms[b]; t++) batch->molecule[s.T + (size_t)t] = (int)b;
        sizes_add(&s, batch->n_atoms[b]);
    }
    batch->atom_start[B] = (int)s.A;
    batch->pair_start[B] = s.P;
    batch->bias_start[B] = s.W;
    batch->B = s.B;
    batch->T = s.T;
    batch->A = s.A;
    batch->P = s.P;
    batch->W = s.W;
    batch->N = (int)s.N;
}

// Neighbour lists of a molecule, and the degree of every atom.
static void neighbour_lists(PathFinder *f, uint16_t *degree, const Molecule *m) {
    if (m->n_bonds > f->bond_room || !f->neighbour) {
        f->bond_room = m->n_bonds;
        f->neighbour = xrealloc(f->neighbour, 2 * (size_t)m->n_bonds, sizeof *f->neighbour);
        f->code = xrealloc(f->code, 2 * (size_t)m->n_bonds, 1);
    }
    memset(f->start, 0, sizeof *f->start * ((size_t)m->n_atoms + 2));
    for (int k = 0; k < 2 * m->n_bonds; k++) f->start[m->bonds[k] + 2]++;
    for (int i = 0; i < m->n_atoms; i++) {
        degree[i] = (uint16_t)min_int(f->start[i + 2], SPD_ROWS - 2);
        f->start[i + 2] += f->start[i + 1];
    }
    for (int k = 0; k < 2 * m->n_bonds; k++) {  // start[i + 1] moves from begin to end of atom i
        int entry = f->start[m->bonds[k] + 1]++;
        f->neighbour[entry] = m->bonds[k ^ 1];
        f->code[entry] = m->bond_code[k / 2];
    }
}

// Shortest paths from atom i: row i of spd, f->next and f->first; see relations().
static void paths_from(PathFinder *f, uint16_t *spd_i, int i, int N) {
    uint16_t *next_i = f->next + (size_t)i * N;
    uint8_t *first_i = f->first + (size_t)i * N;
    int head = 0, tail = 0;
    for (int j = 0; j < N; j++) {
        spd_i[j] = SPD_UNREACHABLE;
        f->via[j] = INT_MAX;
    }
    spd_i[i] = 0;
    f->queue[tail++] = i;
    while (head < tail) {
        int p = f->queue[head++], length = spd_i[p] + 1;
        for (int e = f->start[p]; length < SPD_UNREACHABLE && e < f->start[p + 1]; e++) {
            int j = f->neighbour[e];
            if (spd_i[j] == SPD_UNREACHABLE) {
                spd_i[j] = (uint16_t)length;
                f->queue[tail++] = j;
            }
            if (spd_i[j] == length)
                f->via[j] = min_int(f->via[j], p == i ? -1 : max_int(f->via[p], p));
            if (p == i) first_i[j] = f->code[e];
        }
    }
    for (int k = 1; k < tail; k++) {  // nearest first, so that of via[j] is known
        int j = f->queue[k], via = f->via[j];
        next_i[j] = via < 0 ? (uint16_t)j : next_i[via];
        if (via >= 0) first_i[j] = first_i[via];
    }
}

// Shortest paths of a molecule: spd (N, N) and path (N, N, E), the codes of the first E bonds.
//
// Which of several shortest paths is taken is that of Floyd-Warshall with the intermediate atom k
// in the outermost loop and a strict test (algos.pyx of the release): path(i, j) = path(i, via),
// path(via, j), until the ends are bonded. There, via(i, j) ends as the smallest k such that a
// shortest path exists whose intermediate atoms are all <= k. A breadth-first search from each i
// finds it too, in O(N^2) for the molecule instead of O(N^3):
//     via(i, j) = min over the neighbours p of j that are one bond nearer to i of
//                 max(via(i, p), p);   bonded: none, as small as can be
// The first step of path(i, j) is that of path(i, via), and what follows it is the path from there
// to j: first steps are all that is needed. (test.c compares with Floyd-Warshall itself.)
static void relations(uint16_t *spd, uint8_t *path, uint16_t *degree, const Molecule *m,
                      PathFinder *f) {
    int N = m->n_atoms;
    neighbour_lists(f, degree, m);
    for (int i = 0; i < N; i++) paths_from(f, spd + (size_t)i * N, i, N);
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < N; j++) {
            uint8_t *path_ij = path + ((size_t)i * N + j) * PATH_BONDS;
            int length = spd[(size_t)i * N + j] == SPD_UNREACHABLE ? 0 : spd[(size_t)i * N + j];
            for (int h = 0, at = i; h < PATH_BONDS; h++) {
                path_ij[h] = h < length ? f->first[(size_t)at * N + j] : PATH_NONE;
                if (h < length) at = f->next[(size_t)at * N + j];
            }
        }
    }
}

// Copies a molecule into place b of a batch that has been laid out, and finds its relations.
static void batch_set(Batch *batch, size_t b, const Molecule *m, PathFinder *f) {
    size_t a0 = (size_t)batch->atom_start[b], p0 = batch->pair_start[b];
    memcpy(batch->atom_feat + a0 * ATOM_FEATURES, m->atom_feat, (size_t)m->n_atoms * ATOM_FEATURES);
    batch->has_pos[b] = (uint8_t)m->has_pos;
    for (int k = 0; k < 3 * m->n_atoms; k++) batch->pos[3 * a0 + k] = m->has_pos ? m->pos[k] : 0.0f;
    memset(batch->noise + 3 * a0, 0, 3 * (size_t)m->n_atoms * sizeof *batch->noise);
    for (int y = 0; y < batch->Y; y++) batch->labels[b * (size_t)batch->Y + y] = m->labels[y];
    relations(batch->spd + p0, batch->path + p0 * PATH_BONDS, batch->degree + a0, m, f);
}

// How relations are blended in pretraining (paper 3.2), and the noise on the positions (3.3).
typedef struct {
    double pair_spd, pair_edge, pair_3d;  // probabilities of a pair's relation
    double atom_2d, atom_3d;              // of an atom's structural embedding
    double noise;                         // standard deviation per coordinate, Angstrom
    int all;                              // no blending: every relation of every pair
} Blend;

// Draws the relation of every pair, the structure of every atom, and the noise of molecule b. A
// molecule without positions has 2D only, with the probabilities renormalised.
static void batch_draw(Batch *batch, size_t b, const Blend *blend, const Draws *draws) {
    size_t a0 = (size_t)batch->atom_start[b], p0 = batch->pair_start[b];
    size_t N = (size_t)batch->n_atoms[b];
    int has_pos = batch->has_pos[b];
    uint32_t place = draws->first_place + (uint32_t)b;
    double spd = blend->pair_spd, edge = spd + blend->pair_edge;
    double total = edge + (has_pos ? blend->pair_3d : 0);
    double atom_2d = blend->atom_2d / (blend->atom_2d + blend->atom_3d);
    for (size_t k = 0; k < N * N; k++) {
        double u =
            (double)rng_uniform(draws->seed, RNG_BLEND, draws->step, place, (uint32_t)k) * total;
        batch->pair_use[p0 + k] = u < spd ? USE_SPD : u < edge || !has_pos ? USE_EDGE : USE_3D;
        if (blend->all) batch->pair_use[p0 + k] = USE_SPD | USE_EDGE | (has_pos ? USE_3D : 0);
    }
    for (size_t i = 0; i < N; i++) {
        double u = (double)rng_uniform(draws->seed, RNG_FEATURE, draws->step, place, (uint32_t)i);
        batch->atom_use[a0 + i] = u < atom_2d || !has_pos ? USE_SPD : USE_3D;
        if (blend->all) batch->atom_use[a0 + i] = USE_SPD | (has_pos ? USE_3D : 0);
    }
    for (size_t k = 0; has_pos && k < 3 * N; k++)
        batch->noise[3 * a0 + k] =
            (float)blend->noise *
            rng_normal(draws->seed, RNG_NOISE, draws->step, place, (uint32_t)k);
}

// Uses the same relations for every pair and atom of molecule b (fine-tuning): `use` is a set of
// USE_ bits; 3D only where there are positions.
static void batch_use(Batch *batch, size_t b, int use) {
    size_t a0 = (size_t)batch->atom_start[b], a1 = (size_t)batch->atom_start[b + 1];
    size_t p0 = batch->pair_start[b], p1 = batch->pair_start[b + 1];
    if (!batch->has_pos[b]) use &= ~USE_3D;
    memset(batch->pair_use + p0, use, p1 - p0);
    memset(batch->atom_use + a0, use, a1 - a0);
}

// distance and direction of every pair of molecule b, from the noised positions.
static void batch_geometry(Batch *batch, size_t b) {
    size_t a0 = (size_t)batch->atom_start[b];
    int N = batch->n_atoms[b];
    const float *pos = batch->pos + 3 * a0, *noise = batch->noise + 3 * a0;
    float *direction = batch->direction + 3 * batch->pair_start[b];
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < N; j++) {
            size_t pair = batch->pair_start[b] + (size_t)i * N + j;
            float d[3], square = 0;
            for (int k = 0; k < 3; k++) {
                d[k] = (pos[3 * j + k] + noise[3 * j + k]) - (pos[3 * i + k] + noise[3 * i + k]);
                square += d[k] * d[k];
            }
            float distance = sqrtf(square);
            batch->distance[pair] = distance;
            for (int k = 0; k < 3; k++)
                direction[((size_t)k * N + i) * N + j] = d[k] / (distance + DIRECTION_EPS);
        }
    }
}

// Class of a pair in the SPD head, or -1: not counted.
static int spd_class(int spd) {
    if (spd < 1 || spd >= SPD_UNREACHABLE) return -1;
    return spd <= 10 ? spd - 1 : 10;
}

// Class of a path slot in the edge head, or -1: not counted. Code = 12 type + 2 stereo + conj.
static int edge_class(int code) {
    int type = code / 12, stereo = code / 2 % 6, conjugated = code % 2;
    if (type >= 4 || stereo >= 3) return -1;
    return 6 * type + 2 * stereo + conjugated;
}

// Is the ordered pair counted in the 3D loss?
static int d3_counts(const float *pos, int i, int j) {
    return pos[3 * i] != pos[3 * j] || pos[3 * i + 1] != pos[3 * j + 1] ||
           pos[3 * i + 2] != pos[3 * j + 2];
}

// What is known of the batch once its molecules are set: the rows of 3D pairs, and the counts by
// which the losses are divided.
static void batch_count(Batch *batch) {
    batch->Q = batch->spd_count = batch->edge_count = batch->d3_count = batch->noise_count = 0;
    for (size_t b = 0; b < batch->B; b++) {
        const float *pos = batch->pos + 3 * (size_t)batch->atom_start[b];
        size_t pair = batch->pair_start[b];
        int N = batch->n_atoms[b], has_pos = batch->has_pos[b];
        batch->used_start[b] = batch->Q;
        batch->d3_pairs[b] = 0;
        for (int i = 0; i < N; i++) {
            size_t atom = (size_t)batch->atom_start[b] + (size_t)i;
            batch->noise_counts[atom] = has_pos && (batch->atom_use[atom] & USE_3D);
            batch->noise_count += batch->noise_counts[atom];
            for (int j = 0; j < N; j++, pair++) {
                batch->Q += (batch->pair_use[pair] & USE_3D) != 0;
                batch->d3_pairs[b] += (size_t)(has_pos && d3_counts(pos, i, j));
                batch->spd_count += spd_class(batch->spd[pair]) >= 0;
                for (int h = 0; h < PATH_BONDS; h++)
                    batch->edge_count += edge_class(batch->path[pair * PATH_BONDS + h]) >= 0;
            }
        }
        batch->d3_count += batch->d3_pairs[b] > 0;
    }
    batch->used_start[batch->B] = batch->Q;
}

// Reads molecules ids[0..B) of a dataset into a batch: relations drawn according to `blend`, or if
// that is NULL the fixed set `use`.
static void batch_load(Batch *batch, const Dataset *data, const uint32_t *ids, size_t B,
                       const Blend *blend, int use, const Draws *draws) {
    for (size_t b = 0; b < B; b++) batch->n_atoms[b] = dataset_atoms(data, ids[b]);
    batch_layout(batch, B);
    size_t bad = B;  // first molecule that cannot be read
#pragma omp parallel for schedule(dynamic) reduction(min : bad)
    for (size_t b = 0; b < B; b++) {
        PathFinder *f = &batch->finder[thread_id()];
        if (dataset_try(data, ids[b], &f->molecule)) {
            bad = b < bad ? b : bad;
            continue;
        }
        batch_set(batch, b, &f->molecule, f);
        if (blend)
            batch_draw(batch, b, blend, draws);
        else
            batch_use(batch, b, use);
        batch_geometry(batch, b);
    }
    if (bad < B) dataset_read(data, ids[bad], &batch->finder[0].molecule);  // dies
    batch_count(batch);
}

// =================================================================================================
// 6 Activations, embeddings and attention biases (paper 3.1, 3.2)
// =================================================================================================

// X(field, count in floats). Saved by the forward pass for the backward pass:
#define SAVED_ARRAYS(X)                                                                            \
    X(path_bias, PATH_BONDS *PATH_CODES *H)  /* (E, 61, H) b_edge share of a slot's bond */        \
    X(bond_vector, PATH_CODES *H)            /* e of every bond code */                            \
    X(gauss_const, 3 * G)                    /* mean, 1 / s, 1 / (sqrt(2 pi) s) */                 \
    X(gauss_sum, A *G)                       /* sum over j of g(i, j) */                           \
    X(gauss, P *G)                           /* (Q, G) g of the pairs that use 3D */               \
    X(mlp_pre, P *G)                         /* (Q, G) */                                          \
    X(mlp_hidden, P *G)                      /* (Q, G), and its gradient, and that of gauss */     \
    X(mlp_out, P *H)                         /* (Q, H) */                                          \
    X(bias, W *H)                            /* per molecule (H, S, W) */                          \
    X(embed_hat, T *C)                       /* normalised, before weight and bias */              \
    X(embed_rstd, T)                                                                               \
    X(qkv, L *T * 3 * C)                                                                           \
    X(prob, L *W *H)                         /* attention probabilities before dropout */          \
    X(context, L *T *C)                      /* and its gradient */                                \
    X(norm1_hat, L *T *C)                                                                          \
    X(norm1_rstd, L *T)                                                                            \
    X(ffn_pre, L *T *F)                                                                            \
    X(norm2_hat, L *T *C)                                                                          \
    X(norm2_rstd, L *T)

// Used by the encoder and the heads: gradients, and what is used up at once.
#define SCRATCH_ARRAYS(X)                                                                          \
    X(x, T *C)                               /* input of a layer; in the end the output */         \
    X(dx, T *C)                                                                                    \
    X(branch, T *C)                          /* output of a residual branch, and its gradient */   \
    X(dbias, W *H)                                                                                 \
    X(norm_parts, (T / NORM_ROWS + 1) * 2 * Widest)

// Of the encoder alone, before the heads and again after them; they stand where HEAD_ARRAYS do.
#define ENCODER_ARRAYS(X)                                                                          \
    X(mid, T *C)                             /* between attention and feed-forward */              \
    X(dmid, T *C)                                                                                  \
    X(ffn_hidden, T *F)                      /* and its gradient */                                \
    X(geo, A *C)                             /* (A, C) 3D structure, and its gradient */           \
    X(dgauss_sum, A *G)                                                                            \
    X(dmlp_out, P *H)                                                                              \
    X(dgauss_const, A * 2 * G)               /* per atom: d mean, d s */                           \
    X(ddistance, P)                          /* gradient of a pair's Gaussian argument x */        \
    X(dpath_bias, PATH_BONDS *PATH_CODES *H)

// Of the heads, which run forward and backward in one go.
#define HEAD_ARRAYS(X)                                                                             \
    X(hidden, A *C)                          /* final states of the atoms */                       \
    X(dhidden, A *C)                                                                               \
    X(pair_pre, A * 6 * R)                                                                         \
    X(pair_hat, A * 6 * R)                                                                         \
    X(pair_rstd, A * 6)                                                                            \
    X(pair_map, A * 6 * R)                   /* r and c of the three relation heads */             \
    X(dpair_map, A * 6 * R)                                                                        \
    X(pair_weight, R *R *PairWidth)          /* (R, R * width) a head's map, see pair_head() */    \
    X(dpair_weight, R *R *PairWidth)                                                               \
    X(pair_row, PairRows *R *PairWidth)      /* (atoms of a group, R, width) */                    \
    X(dpair_row, PairRows *R *PairWidth)                                                           \
    X(pair_dbias, A *PairWidth)                                                                    \
    X(d3_weight, 3 * R *R)                   /* the 3D head's four maps as one */                  \
    X(dd3_weight, 3 * R *R)                                                                        \
    X(noise_qkv, A * 3 * C)                  /* and its gradient */                                \
    X(noise_prob, W *H)                                                                            \
    X(noise_force, A *H * 3)                 /* (A, H, 3) w_a . v of a head's channels */          \
    X(noise_dforce, A *H * 3)                                                                      \
    X(noise_part, A *H * 3)                  /* (A, H, 3) a head's share of the output */          \
    X(noise_out, A * 3)                                                                            \
    X(noise_dout, A * 3)                                                                           \
    X(head_pre, Y > 0 ? T *C : 0)            /* fine-tuning head */                                \
    X(head_hidden, Y > 0 ? T *C : 0)                                                               \
    X(head_out, T *Y)                                                                              \
    X(dhead_out, T *Y)

enum {
    NORM_ROWS = 32,   // rows that share a partial sum of LayerNorm's weight gradients
    PAIR_GROUP = 128, // atoms whose rows of pairs a relation head works on at a time
};

typedef struct {
#define X(field, count) float *field;
    SAVED_ARRAYS(X)
    SCRATCH_ARRAYS(X)
    ENCODER_ARRAYS(X)
    HEAD_ARRAYS(X)
#undef X
    double *row_loss;     // (A) losses of an atom's row of pairs
    float *memory;
    size_t memory_bytes;
    Work work;
} Acts;

// Points the arrays of acts into memory from `at` on (NULL: only counts); returns the floats used.
static size_t acts_place(Acts *acts, float *at, Config c, Sizes s) {
    const size_t L = (size_t)c.layers, C = (size_t)c.dim, F = (size_t)c.ffn, H = (size_t)c.heads;
    const size_t G = (size_t)c.kernels, Y = (size_t)c.tasks, R = PAIR_WIDTH;
    const size_t T = s.T, A = s.A, P = s.P, W = s.W;
    const size_t Widest = max_size(C, 6 * R), PairWidth = (size_t)round_up(EDGE_OUTPUTS, VEC);
    const size_t PairRows = max_size(s.N, PAIR_GROUP);
    size_t used = 0;
#define X(field, count)                                                                            \
    {                                                                                              \
        if (at) acts->field = at + used;                                                           \
        used += ((count) + 15 + VEC) / 16 * 16;  /* whole vectors can be read at the end */        \
    }
    SAVED_ARRAYS(X)
    SCRATCH_ARRAYS(X)
    const size_t shared = used;
    ENCODER_ARRAYS(X)
    const size_t encoder_end = used;
    used = shared;
    HEAD_ARRAYS(X)
#undef X
    return max_size(used, encoder_end);
}

// Widest packed operand of any gemm() of this model.
static int widest_product(Config c) {
    int widest = max_int(3 * c.dim, max_int(c.ffn, c.kernels));
    widest = max_int(widest, PAIR_WIDTH * round_up(EDGE_OUTPUTS, VEC));
    return round_up(max_int(widest, c.tasks), NR);
}

// Memory for a model's activations on batches up to `room`. The caller calls acts_free().
static void acts_alloc(Acts *acts, Config c, Sizes room) {
    *acts = (Acts){0};
    CHECK(room.P <= INT_MAX && (double)room.W * c.heads * c.layers < 1e12,
          "a batch of %zu molecules with %zu atoms is too large; try a lower --batch-size", room.B,
          room.A);
    size_t count = acts_place(acts, NULL, c, room);
    acts->memory = floats_alloc(count);
    acts->row_loss = xmalloc(room.A, sizeof *acts->row_loss);
    size_t width = (size_t)bias_width((int)room.N), D = (size_t)round_up(c.dim / c.heads, VEC);
    size_t attention = 4 * width * width + 6 * width * D;
    size_t pair_rows = width * 256 + (size_t)PAIR_WIDTH * 512;
    Work *w = &acts->work;
    w->threads = thread_count();
    w->thread_size = max_size(attention, pair_rows) + (size_t)c.ffn + (size_t)c.kernels + 64;
    w->thread_size = (w->thread_size + 15) / 16 * 16;
    w->thread = floats_alloc(mul_size((size_t)w->threads, w->thread_size));
    w->packed_a = floats_alloc((size_t)w->threads * MC * KC);
    w->packed_b = floats_alloc((size_t)widest_product(c) * KC);
    acts->memory_bytes = sizeof(float) * (count + (size_t)w->threads * (w->thread_size + MC * KC) +
                                          (size_t)widest_product(c) * KC);
}

static void acts_free(Acts *acts) {
    free(acts->memory);
    free(acts->row_loss);
    free(acts->work.thread);
    free(acts->work.packed_a);
    free(acts->work.packed_b);
    *acts = (Acts){0};
}

// ---- LayerNorm

// hat = (in - mean) / sqrt(variance + eps), out = hat * weight + bias. in and hat may be the same.
ALWAYS_INLINE void norm_row_forward(float *out, float *hat, float *rstd, const float *in,
                                    const float *weight, const float *bias, int n, float eps) {
    float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < n; c++) sum += in[c];
    float mean = sum / (float)n;
#pragma omp simd reduction(+ : square)
    for (int c = 0; c < n; c++) square += (in[c] - mean) * (in[c] - mean);
    float scale = 1.0f / sqrtf(square / (float)n + eps);
    *rstd = scale;
#pragma omp simd
    for (int c = 0; c < n; c++) {
        hat[c] = (in[c] - mean) * scale;
        out[c] = hat[c] * weight[c] + bias[c];
    }
}

// din = rstd * (dhat - mean(dhat) - hat * mean(dhat * hat)), dhat = dout * weight;
// dweight += dout * hat, dbias += dout. din and dout may be the same.
ALWAYS_INLINE void norm_row_backward(float *din, float *dweight, float *dbias, const float *dout,
                                     const float *hat, float rstd, const float *weight, int n) {
    float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (int c = 0; c < n; c++) {
        float dhat = dout[c] * weight[c];
        sum += dhat;
        product += dhat * hat[c];
        dweight[c] += dout[c] * hat[c];  // forward: out = hat * weight + bias
        dbias[c] += dout[c];
    }
    float mean = sum / (float)n, slope = product / (float)n;
#pragma omp simd
    for (int c = 0; c < n; c++) din[c] = rstd * (dout[c] * weight[c] - mean - hat[c] * slope);
}

// DropPath of one residual branch of a layer, dropped with probability p. which = 0: attention, 1:
// feed-forward.
typedef struct { double p; const Draws *draws; int layer, which; } PathDrop;

// Scale of molecule b's branch: 0 with probability p, else 1 / (1 - p).
static float path_scale(const PathDrop *drop, size_t b) {
    const Draws *draws = drop->draws;
    if (!draws->active || drop->p <= 0) return 1.0f;
    float u = rng_uniform(draws->seed, RNG_PATH_DROP + (uint32_t)drop->layer, draws->step,
                          draws->first_place + (uint32_t)b, (uint32_t)drop->which);
    return (double)u < drop->p ? 0.0f : (float)(1.0 / (1.0 - drop->p));
}

// out = LayerNorm(residual + path_scale() * branch), rows (T, C). branch (and drop) may be NULL.
static void residual_norm_forward(float *out, float *hat, float *rstd, const float *residual,
                                  const float *branch, const float *weight, const float *bias,
                                  const Batch *batch, int C, const PathDrop *drop) {
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < batch->T; t++) {
        const float *residual_t = residual + t * (size_t)C;
        float *hat_t = hat + t * (size_t)C;
        if (branch) {
            const float *branch_t = branch + t * (size_t)C;
            float scale = path_scale(drop, (size_t)batch->molecule[t]);
            for (int c = 0; c < C; c++) hat_t[c] = residual_t[c] + scale * branch_t[c];
        } else {
            memcpy(hat_t, residual_t, sizeof(float) * (size_t)C);
        }
        norm_row_forward(out + t * (size_t)C, hat_t, &rstd[t], hat_t, weight, bias, C, NORM_EPS);
    }
}

// out (T, C) of a LayerNorm again, from what it saved, instead of keeping it: that saves a seventh
// of the activations' memory at base size.
static void norm_restore(float *out, const float *hat, const float *weight, const float *bias,
                         const Batch *batch, int C) {
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < batch->T; t++) {
        size_t at = t * (size_t)C;
#pragma omp simd
        for (int c = 0; c < C; c++) out[at + c] = hat[at + c] * weight[c] + bias[c];
    }
}

// dresidual (T, C) and dbranch (T, C; may be NULL) are stored; so are dweight and dbias (C).
// parts: (ceil(T / NORM_ROWS), 2 C) partial sums. dresidual may be dout.
static void residual_norm_backward(float *dresidual, float *dbranch, float *dweight, float *dbias,
                                   float *parts, const float *dout, const float *hat,
                                   const float *rstd, const float *weight, const Batch *batch,
                                   int C, const PathDrop *drop) {
    int chunks = ((int)batch->T + NORM_ROWS - 1) / NORM_ROWS;
#pragma omp parallel for schedule(static)
    for (int chunk = 0; chunk < chunks; chunk++) {
        float *dweight_part = parts + (size_t)chunk * 2 * C, *dbias_part = dweight_part + C;
        memset(dweight_part, 0, sizeof(float) * 2 * (size_t)C);
        int end = min_int((chunk + 1) * NORM_ROWS, (int)batch->T);
        for (int t = chunk * NORM_ROWS; t < end; t++) {
            size_t at = (size_t)t * C;
            norm_row_backward(dresidual + at, dweight_part, dbias_part, dout + at, hat + at,
                              rstd[t], weight, C);
            if (!dbranch) continue;
            float scale = path_scale(drop, (size_t)batch->molecule[t]);
            for (int c = 0; c < C; c++) dbranch[at + c] = scale * dresidual[at + c];
        }
    }
    column_sums(dweight, parts, 2 * C, chunks, C);
    column_sums(dbias, parts + C, 2 * C, chunks, C);
}

// ---- edge paths: b_edge(i, j) = sum over slots t of path_bias[t][code_t] / clamp(spd, 1, 5)

// path_bias[t][code] = e_code^T W_t, e_code = mean over the bond features f of
// bond_table[3 + 512 f + value_f]: the few different vectors a path slot can contribute, instead of
// a product for every pair (molecule_attn_bias: edge_encoder, edge_dis_encoder). Row PATH_NONE = 0.
static void path_bias_forward(Acts *acts, const Model *model) {
    int H = model->config.heads;
    for (int code = 0; code < PATH_CODES; code++) {
        int value[BOND_FEATURES] = {code / 12, code / 2 % 6, code % 2};
        float *e = acts->bond_vector + (size_t)code * H;
        for (int h = 0; h < H; h++) {
            e[h] = 0;
            for (int f = 0; f < BOND_FEATURES && code != PATH_NONE; f++) {
                int row = BOND_ROW_OFFSET + FEATURE_ROWS * f + value[f];
                e[h] += model->p.bond_table[(size_t)row * H + h] / BOND_FEATURES;
            }
        }
    }
    for (int t = 0; t < PATH_BONDS; t++)  // (61, H) = (61, H) @ W_t (H, H)
        gemm(&acts->work, 0, 0, PATH_CODES, H, H, acts->bond_vector, H,
             model->p.path_maps + (size_t)t * H * H, H, NULL, 0,
             acts->path_bias + (size_t)t * PATH_CODES * H, H);
}

// From dpath_bias (E, 61, H) to the gradients of bond_table and path_maps.
static void path_bias_backward(Acts *acts, Model *model) {
    int H = model->config.heads;
    float *de = acts->path_bias;  // (61, H), no longer needed
    for (int t = 0; t < PATH_BONDS; t++) {  // forward: path_bias[t] = e @ W_t
        const float *dout = acts->dpath_bias + (size_t)t * PATH_CODES * H;
        size_t map = (size_t)t * H * H;
        gemm(&acts->work, 1, 0, H, H, PATH_NONE, acts->bond_vector, H, dout, H, NULL, 0,
             model->g.path_maps + map, H);
        gemm(&acts->work, 0, 1, PATH_NONE, H, H, dout, H, model->p.path_maps + map, H, NULL, t > 0,
             de, H);
    }
    for (int code = 0; code < PATH_NONE; code++) {
        int value[BOND_FEATURES] = {code / 12, code / 2 % 6, code % 2};
        for (int f = 0; f < BOND_FEATURES; f++) {
            int row = BOND_ROW_OFFSET + FEATURE_ROWS * f + value[f];
            for (int h = 0; h < H; h++)
                model->g.bond_table[(size_t)row * H + h] +=
                    de[(size_t)code * H + h] / BOND_FEATURES;
        }
    }
}

// ---- Gaussians: g_k(i, j) = exp(-0.5 z^2) / (sqrt(2 pi) s_k), z = (x - mu_k) / s_k,
//      x = (mul[u] + mul[v]) * distance + bias[u] + bias[v], s = |std| + 0.01

// Rows u and v of gauss_mul and gauss_bias for a pair (i, j).
static void gauss_rows(const Batch *batch, size_t i, size_t j, int *u, int *v) {
    *u = batch->atom_feat[i * ATOM_FEATURES] + GAUSS_ROW_OFFSET;
    *v = batch->atom_feat[j * ATOM_FEATURES] + GAUSS_ROW_OFFSET + FEATURE_ROWS;
}

static float gauss_argument(const Model *model, const Batch *batch, size_t i, size_t j,
                            size_t pair) {
    int u, v;
    gauss_rows(batch, i, j, &u, &v);
    const Tensors *p = &model->p;
    return (p->gauss_mul[u] + p->gauss_mul[v]) * batch->distance[pair] +
           (p->gauss_bias[u] + p->gauss_bias[v]);
}

// out (G) = g(x); constants (3, G) from gauss_forward().
ALWAYS_INLINE void gauss_row(float *restrict out, float x, const float *restrict constants, int G) {
    const float *mean = constants, *inverse = mean + G, *height = inverse + G;
#pragma omp simd
    for (int k = 0; k < G; k++) {
        float z = (x - mean[k]) * inverse[k];
        out[k] = exp_fast(-0.5f * z * z) * height[k];
    }
}

// gauss (Q, G) of the pairs that use 3D, gauss_sum (A, G) of the atoms that do.
static void gauss_forward(Acts *acts, const Model *model, const Batch *batch) {
    int G = model->config.kernels;
    float *mean = acts->gauss_const, *inverse = mean + G, *height = inverse + G;
    for (int k = 0; k < G; k++) {
        float s = fabsf(model->p.gauss_std[k]) + GAUSS_STD_MIN;
        mean[k] = model->p.gauss_mean[k];
        inverse[k] = 1.0f / s;
        height[k] = 1.0f / (sqrtf(2.0f * GAUSS_PI) * s);
    }
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < batch->B; b++) {
        size_t a0 = (size_t)batch->atom_start[b], pair = batch->pair_start[b];
        size_t N = (size_t)batch->n_atoms[b], used = batch->used_start[b];
        float *row = work_thread(&acts->work);
        for (size_t i = a0; i < a0 + N; i++) {
            float *sum = acts->gauss_sum + i * (size_t)G;
            int summed = batch->atom_use[i] & USE_3D;
            memset(sum, 0, sizeof(float) * (size_t)G);
            for (size_t j = a0; j < a0 + N; j++, pair++) {
                int drawn = batch->pair_use[pair] & USE_3D;
                if (!drawn && !summed) continue;
                float *g = drawn ? acts->gauss + used++ * (size_t)G : row;
                gauss_row(g, gauss_argument(model, batch, i, j, pair), acts->gauss_const, G);
                for (int k = 0; summed && k < G; k++) sum[k] += g[k];
            }
        }
    }
}

// Gradient of one pair's Gaussians: from dg (G), adds to dmean, ds (G); returns dx.
ALWAYS_INLINE float gauss_row_backward(float *restrict dmean, float *restrict ds,
                                       const float *restrict dg, float x,
                                       const float *restrict constants, int G) {
    const float *mean = constants, *inverse = mean + G, *height = inverse + G;
    float dx = 0;
#pragma omp simd reduction(+ : dx)
    for (int k = 0; k < G; k++) {
        float z = (x - mean[k]) * inverse[k];
        float g = exp_fast(-0.5f * z * z) * height[k];
        float slope = dg[k] * g * inverse[k];  // forward: g = exp(-0.5 z^2) height, height ~ 1 / s
        int far = z * z > GAUSS_FAR;           // g is 0, but z^2 may be infinite
        slope = far ? 0.0f : slope;
        z = far ? 0.0f : z;
        dx -= slope * z;
        dmean[k] += slope * z;
        ds[k] += slope * (z * z - 1.0f);
    }
    return dx;
}

// From dgauss_sum (A, G) and mlp_hidden (Q, G; holding the gradient of gauss) to those of
// gauss_mean, gauss_std, gauss_mul, gauss_bias.
static void gauss_backward(Acts *acts, Model *model, const Batch *batch) {
    int G = model->config.kernels;
    size_t GG = (size_t)G;
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < batch->B; b++) {
        size_t a0 = (size_t)batch->atom_start[b], pair = batch->pair_start[b];
        size_t N = (size_t)batch->n_atoms[b], used = batch->used_start[b];
        float *dg = work_thread(&acts->work);
        for (size_t i = a0; i < a0 + N; i++) {
            float *dmean = acts->dgauss_const + i * 2 * GG, *ds = dmean + G;
            const float *dsum = acts->dgauss_sum + i * GG;
            int summed = batch->atom_use[i] & USE_3D;
            memset(dmean, 0, sizeof(float) * 2 * GG);
            for (size_t j = a0; j < a0 + N; j++, pair++) {
                int drawn = batch->pair_use[pair] & USE_3D;
                acts->ddistance[pair] = 0;
                if (!drawn && !summed) continue;
                for (int k = 0; k < G; k++) dg[k] = summed ? dsum[k] : 0.0f;
                for (int k = 0; drawn && k < G; k++) dg[k] += acts->mlp_hidden[used * GG + k];
                used += drawn != 0;
                acts->ddistance[pair] =
                    gauss_row_backward(dmean, ds, dg, gauss_argument(model, batch, i, j, pair),
                                       acts->gauss_const, G);
            }
        }
    }
    for (size_t b = 0, pair = 0; b < batch->B; b++) {  // few additions, so in order by one thread
        for (int i = batch->atom_start[b]; i < batch->atom_start[b + 1]; i++) {
            for (int j = batch->atom_start[b]; j < batch->atom_start[b + 1]; j++, pair++) {
                int u, v;
                gauss_rows(batch, (size_t)i, (size_t)j, &u, &v);
                float dx = acts->ddistance[pair], dmul = dx * batch->distance[pair];
                model->g.gauss_mul[u] += dmul;  // forward: x = (mul[u] + mul[v]) * distance + ...
                model->g.gauss_mul[v] += dmul;
                model->g.gauss_bias[u] += dx;
                model->g.gauss_bias[v] += dx;
            }
        }
    }
    float *dmean = model->g.gauss_mean, *dstd = model->g.gauss_std;
    column_sums(dmean, acts->dgauss_const, 2 * G, (int)batch->A, G);
    column_sums(dstd, acts->dgauss_const + G, 2 * G, (int)batch->A, G);
    for (int k = 0; k < G; k++)
        dstd[k] *= (float)((model->p.gauss_std[k] > 0) - (model->p.gauss_std[k] < 0));
    // forward: s = |std| + 0.01, with slope 0 at 0 as in PyTorch
}

// ---- b_3d = W2 gelu(W1 g + c1) + c2 of the pairs that use 3D, and geo = W_p gauss_sum + c_p

static void geometry_forward(Acts *acts, const Model *model, const Batch *batch) {
    int G = model->config.kernels, H = model->config.heads, C = model->config.dim,
        Q = (int)batch->Q;
    const Tensors *p = &model->p;
    gauss_forward(acts, model, batch);
    linear_forward(&acts->work, acts->mlp_pre, acts->gauss, p->mlp1_w, p->mlp1_b, Q, G, G);
#pragma omp parallel for schedule(static)
    for (int q = 0; q < Q; q++) {
        size_t at = (size_t)q * G;
#pragma omp simd
        for (int k = 0; k < G; k++) acts->mlp_hidden[at + k] = gelu(acts->mlp_pre[at + k]);
    }
    linear_forward(&acts->work, acts->mlp_out, acts->mlp_hidden, p->mlp2_w, p->mlp2_b, Q, G, H);
    linear_forward(&acts->work, acts->geo, acts->gauss_sum, p->geo_w, p->geo_b, (int)batch->A, G,
                   C);
}

// From dmlp_out (Q, H) and geo (A, C; holding its own gradient).
static void geometry_backward(Acts *acts, Model *model, const Batch *batch) {
    int G = model->config.kernels, H = model->config.heads, C = model->config.dim,
        Q = (int)batch->Q;
    Tensors *p = &model->p, *g = &model->g;
    linear_backward(&acts->work, acts->dgauss_sum, 0, g->geo_w, g->geo_b, acts->geo,
                    acts->gauss_sum, p->geo_w, (int)batch->A, G, C);
    linear_backward(&acts->work, acts->mlp_hidden, 0, g->mlp2_w, g->mlp2_b, acts->dmlp_out,
                    acts->mlp_hidden, p->mlp2_w, Q, G, H);
#pragma omp parallel for schedule(static)
    for (int q = 0; q < Q; q++) {
        size_t at = (size_t)q * G;
#pragma omp simd
        for (int k = 0; k < G; k++) {  // forward: mlp_hidden = gelu(mlp_pre)
            acts->mlp_pre[at + k] = acts->mlp_hidden[at + k] * gelu_slope(acts->mlp_pre[at + k]);
        }
    }
    linear_backward(&acts->work, acts->mlp_hidden, 0, g->mlp1_w, g->mlp1_b, acts->mlp_pre,
                    acts->gauss, p->mlp1_w, Q, G, G);
    gauss_backward(acts, model, batch);
}

// ---- the blended bias (paper 3.2): bias[h][1 + i][1 + j] = sum of the relations the pair uses;
//      bias[h][0][*] = bias[h][*][0] = graph_bias[h]

// The bias matrix (S, W) of molecule b and head h.
static size_t bias_at(const Batch *batch, int H, size_t b, int h) {
    int N = batch->n_atoms[b];
    return (size_t)H * batch->bias_start[b] + (size_t)h * (size_t)(N + 1) * (size_t)bias_width(N);
}

static float path_weight(int spd) { return 1.0f / (float)max_int(1, min_int(spd, PATH_BONDS)); }

// row (H) = the blended bias of one pair; row3d (H) = its b_3d, if it uses 3D.
ALWAYS_INLINE void pair_bias(float *restrict row, const Model *model, const float *path_bias,
                             const float *row3d, int use, int spd, const uint8_t *path, int H) {
    for (int h = 0; h < H; h++) row[h] = use & USE_3D ? row3d[h] : 0.0f;
    if (use & USE_SPD) {
        const float *table = model->p.spd_table + (size_t)(spd + 1) * H;
        for (int h = 0; h < H; h++) row[h] += table[h];
    }
    if (use & USE_EDGE) {
        float weight = path_weight(spd);
        for (int t = 0; t < PATH_BONDS && path[t] != PATH_NONE; t++) {
            const float *share = path_bias + (size_t)(t * PATH_CODES + path[t]) * H;
            for (int h = 0; h < H; h++) row[h] += weight * share[h];
        }
    }
}

static void bias_forward(Acts *acts, const Model *model, const Batch *batch) {
    int H = model->config.heads;
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < batch->B; b++) {
        int N = batch->n_atoms[b], S = N + 1, W = bias_width(N);
        size_t used = batch->used_start[b], pair = batch->pair_start[b], plane = (size_t)S * W;
        float *bias = acts->bias + bias_at(batch, H, b, 0);
        float row[256];
        for (int h = 0; h < H; h++)
            for (int s = 0; s < S; s++) {
                float *bias_hs = bias + h * plane + (size_t)s * W;
                bias_hs[0] = model->p.graph_bias[h];
                for (int j = 1; s == 0 && j < S; j++) bias_hs[j] = model->p.graph_bias[h];
                for (int j = S; j < W; j++) bias_hs[j] = 0;
            }
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++, pair++) {
                int use = batch->pair_use[pair];
                pair_bias(row, model, acts->path_bias, acts->mlp_out + used * (size_t)H, use,
                          batch->spd[pair], batch->path + pair * PATH_BONDS, H);
                used += (use & USE_3D) != 0;
                float *out = bias + (size_t)(i + 1) * W + j + 1;
                for (int h = 0; h < H; h++) out[h * plane] = row[h];
            }
    }
}

// dmlp_out (Q, H): the gradient of b_3d, gathered from dbias (H, S, W) of molecule b.
static void bias_backward_3d(Acts *acts, const Batch *batch, int H, size_t b) {
    int N = batch->n_atoms[b], W = bias_width(N);
    size_t used = batch->used_start[b], pair = batch->pair_start[b], plane = (size_t)(N + 1) * W;
    const float *dbias = acts->dbias + bias_at(batch, H, b, 0);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++, pair++) {
            if (!(batch->pair_use[pair] & USE_3D)) continue;
            const float *d = dbias + (size_t)(i + 1) * W + j + 1;  // forward: see bias_forward()
            for (int h = 0; h < H; h++) acts->dmlp_out[used * (size_t)H + h] = d[h * plane];
            used++;
        }
}

// Stores head h's columns of the gradients of spd_table, path_bias and graph_bias: sums of its part
// of dbias. They are summed beside those, in which heads, and so threads, share cache lines.
static void bias_backward_head(Acts *acts, Model *model, const Batch *batch, int h) {
    float dspd[SPD_ROWS] = {0}, dpath[PATH_BONDS * PATH_CODES] = {0}, dgraph = 0;
    int H = model->config.heads;
    for (size_t b = 0; b < batch->B; b++) {
        int N = batch->n_atoms[b], W = bias_width(N);
        size_t pair = batch->pair_start[b];
        const float *dbias = acts->dbias + bias_at(batch, H, b, h);
        for (int j = 0; j <= N; j++) dgraph += dbias[j];
        for (int i = 1; i <= N; i++) dgraph += dbias[(size_t)i * W];
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++, pair++) {
                float d = dbias[(size_t)(i + 1) * W + j + 1];  // forward: see pair_bias()
                int use = batch->pair_use[pair], spd = batch->spd[pair];
                const uint8_t *path = batch->path + pair * PATH_BONDS;
                if (use & USE_SPD) dspd[spd + 1] += d;
                if (!(use & USE_EDGE)) continue;
                d *= path_weight(spd);
                for (int t = 0; t < PATH_BONDS && path[t] != PATH_NONE; t++)
                    dpath[t * PATH_CODES + path[t]] += d;
            }
    }
    model->g.graph_bias[h] = dgraph;
    for (int k = 0; k < SPD_ROWS; k++) model->g.spd_table[(size_t)k * H + h] = dspd[k];
    for (int k = 0; k < PATH_BONDS * PATH_CODES; k++)
        acts->dpath_bias[(size_t)k * H + h] = dpath[k];
}

static void bias_backward(Acts *acts, Model *model, const Batch *batch) {
    int H = model->config.heads;
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < batch->B; b++) bias_backward_3d(acts, batch, H, b);
#pragma omp parallel for schedule(dynamic)
    for (int h = 0; h < H; h++) bias_backward_head(acts, model, batch, h);
}

// ---- atom embeddings (paper 3.1): x = LayerNorm(tokens)

// token (C) of atom a: its nine features, and its 2D structure (degrees) or 3D structure (geo).
static void atom_embedding(float *restrict token, const Model *model, const Batch *batch,
                           const float *geo, size_t a, int C) {
    const uint8_t *feature = batch->atom_feat + a * ATOM_FEATURES;
    for (int c = 0; c < C; c++) token[c] = 0;
    for (int k = 0; k < ATOM_FEATURES; k++) {
        size_t table_row = (size_t)(ATOM_ROW_OFFSET + FEATURE_ROWS * k + feature[k]);
        const float *row = model->p.atom_table + table_row * (size_t)C;
        for (int c = 0; c < C; c++) token[c] += row[c];
    }
    if (batch->atom_use[a] & USE_SPD) {
        size_t row = (size_t)(batch->degree[a] + 1) * (size_t)C;
        for (int c = 0; c < C; c++)
            token[c] += model->p.in_degree[row + (size_t)c] + model->p.out_degree[row + (size_t)c];
    }
    if (batch->atom_use[a] & USE_3D)
        for (int c = 0; c < C; c++) token[c] += GEOMETRY_SCALE * geo[a * (size_t)C + (size_t)c];
}

static void embedding_forward(Acts *acts, const Model *model, const Batch *batch) {
    int C = model->config.dim;
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < batch->T; t++) {
        size_t b = (size_t)batch->molecule[t], first = (size_t)batch->atom_start[b] + b;
        float *token = acts->branch + t * (size_t)C;
        if (t == first)
            memcpy(token, model->p.graph_token, sizeof(float) * (size_t)C);
        else
            atom_embedding(token, model, batch, acts->geo, t - b - 1, C);
    }
    residual_norm_forward(acts->x, acts->embed_hat, acts->embed_rstd, acts->branch, NULL,
                          model->p.embed_norm_w, model->p.embed_norm_b, batch, C, NULL);
}

// From dx (T, C) to the embedding tables; leaves the gradient of geo in geo. Threads share out the
// channels, so each table row is summed in the order of the atoms.
static void embedding_backward(Acts *acts, Model *model, const Batch *batch) {
    enum { STRIP = 64 };
    int C = model->config.dim;
    residual_norm_backward(acts->dx, NULL, model->g.embed_norm_w, model->g.embed_norm_b,
                           acts->norm_parts, acts->dx, acts->embed_hat, acts->embed_rstd,
                           model->p.embed_norm_w, batch, C, NULL);
#pragma omp parallel for schedule(static)
    for (int c0 = 0; c0 < C; c0 += STRIP) {
        size_t width = (size_t)min_int(STRIP, C - c0), stride = (size_t)C;
        for (size_t t = 0; t < batch->T; t++) {
            size_t b = (size_t)batch->molecule[t], first = (size_t)batch->atom_start[b] + b;
            size_t a = t - b - 1;  // of an atom; not used for the graph token
            const float *d = acts->dx + t * stride + c0;
            float *row[ATOM_FEATURES + 2];
            int rows = 0;
            if (t == first) {
                row[rows++] = model->g.graph_token + c0;
            } else {
                for (int k = 0; k < ATOM_FEATURES; k++) {
                    int value = batch->atom_feat[a * ATOM_FEATURES + (size_t)k];
                    size_t table_row = (size_t)(ATOM_ROW_OFFSET + FEATURE_ROWS * k + value);
                    row[rows++] = model->g.atom_table + table_row * stride + c0;
                }
                float scale = batch->atom_use[a] & USE_3D ? GEOMETRY_SCALE : 0.0f;
                for (size_t c = 0; c < width; c++) acts->geo[a * stride + c0 + c] = scale * d[c];
                if (batch->atom_use[a] & USE_SPD) {
                    size_t degree_row = (size_t)(batch->degree[a] + 1) * stride;
                    row[rows++] = model->g.in_degree + degree_row + c0;
                    row[rows++] = model->g.out_degree + degree_row + c0;
                }
            }
            for (int r = 0; r < rows; r++)
                for (size_t c = 0; c < width; c++) row[r][c] += d[c];
        }
    }
}

// =================================================================================================
// 7 Encoder layers, post-norm:
//     mid = LN1(x + path(Wo attention(x))),  x' = LN2(mid + path(W2 gelu(W1 mid)))
//   path() is DropPath. Only what the backward pass cannot make again cheaply is kept.
// =================================================================================================

// Rates of the model's random regularisers; all 0 in evaluation (draws->active = 0).
typedef struct {
    double attention, activation, path, embedding;  // path: of the last layer, rising from 0
} Dropout;

// DropPath of a branch of layer l: p is linear from 0 in the first layer to `path` in the last.
static PathDrop path_drop(const Dropout *drop, const Draws *draws, int layers, int l, int which) {
    return (PathDrop){layers > 1 ? drop->path * l / (layers - 1) : 0.0, draws, l, which};
}

// ---- dropout on rows of a (T, n) matrix: x = mask * x, the same in both passes
static void dropout_rows(float *x, const Work *w, const Batch *batch, int n, double p,
                         const Draws *draws, uint32_t purpose) {
    if (!draws->active || p <= 0) return;
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < batch->T; t++) {
        size_t b = (size_t)batch->molecule[t], first = (size_t)batch->atom_start[b] + b;
        float *mask = work_thread(w), *x_t = x + t * (size_t)n;
        dropout_row(mask, n, p, draws, purpose, draws->first_place + (uint32_t)b,
                    (uint32_t)(t - first));
        for (int c = 0; c < n; c++) x_t[c] *= mask[c];
    }
}

// ---- gelu and dropout: out = mask * gelu(pre), rows (T, n)
static void gelu_forward(float *out, const float *pre, const Work *w, const Batch *batch, int n,
                         double p, const Draws *draws, uint32_t purpose) {
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < batch->T; t++) {
#pragma omp simd
        for (int c = 0; c < n; c++) out[t * (size_t)n + c] = gelu(pre[t * (size_t)n + c]);
    }
    dropout_rows(out, w, batch, n, p, draws, purpose);
}

// d, the gradient of out, becomes that of pre: mask * d * gelu'(pre).
static void gelu_backward(float *d, const float *pre, const Work *w, const Batch *batch, int n,
                          double p, const Draws *draws, uint32_t purpose) {
    dropout_rows(d, w, batch, n, p, draws, purpose);
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < batch->T; t++) {
        size_t at = t * (size_t)n;
#pragma omp simd
        for (int c = 0; c < n; c++) d[at + c] *= gelu_slope(pre[at + c]);
    }
}

// ---- attention of one molecule and head:
//      prob = softmax(q k^T / sqrt(D) + bias), out = drop(prob) v
//      A task reads (n, D) slices of (T, 3 C) matrices, of row stride `stride`, and works in its
//      thread's scratch on copies whose rows are padded to whole vectors.

typedef struct {
    int n, W, D;        // tokens, row length of the (n, n) matrices, channels
    int stride;         // of the rows of q, k, v
    double p;           // dropout of the probabilities
    const Draws *draws;
    uint32_t purpose, place, row;  // name of the mask
} HeadTask;

// mask (n, W) of the task; all ones without dropout. The (n, n) numbers are drawn without the
// padding, so that W, and with it the processor, does not change them; then rows move into place.
static void attention_mask(float *mask, const HeadTask *task) {
    int n = task->n, W = task->W, drop = task->draws->active && task->p > 0;
    for (int k = drop ? n * n : 0; k < n * W; k++) mask[k] = 1.0f;
    if (!drop) return;
    dropout_row(mask, n * n, task->p, task->draws, task->purpose, task->place, task->row);
    for (int s = n - 1; s > 0; s--)
        memmove(mask + (size_t)s * W, mask + (size_t)s * n, sizeof(float) * (size_t)n);
}

// prob (n, W) and dropped (n, W) = mask * prob. bias rows are bias_W apart. scratch: W * (n + D).
static void attention_prob_forward(float *prob, float *dropped, const float *q, const float *k,
                                   const float *bias, int bias_W, const HeadTask *task,
                                   float *scratch) {
    int n = task->n, W = task->W, D = task->D;
    float *mask = scratch, *kt = mask + (size_t)n * W, scale = 1.0f / sqrtf((float)D);
    copy_transposed(kt, W, k, task->stride, n, D);
    small_product(dropped, W, q, task->stride, 1, kt, W, n, W, D);
    attention_mask(mask, task);
    for (int s = 0; s < n; s++) {
        float *prob_s = prob + (size_t)s * W, *dropped_s = dropped + (size_t)s * W;
        const float *bias_s = bias + (size_t)s * bias_W, *mask_s = mask + (size_t)s * W;
        for (int j = 0; j < W; j++) prob_s[j] = dropped_s[j] * scale + bias_s[j];
        for (int j = n; j < W; j++) prob_s[j] = SCORE_MASK;
        softmax_row(prob_s, W);
        for (int j = 0; j < W; j++) dropped_s[j] = prob_s[j] * mask_s[j];
    }
}

// dscore (n, W), holding the gradient of the dropped probabilities, becomes that of the scores,
// and is added to dbias; dropped (n, W) is made again. scratch: n * W.
static void attention_prob_backward(float *dscore, float *dropped, float *dbias, int bias_W,
                                    const float *prob, const HeadTask *task, float *scratch) {
    int n = task->n, W = task->W;
    attention_mask(scratch, task);
    for (int s = 0; s < n; s++) {
        const float *prob_s = prob + (size_t)s * W, *mask_s = scratch + (size_t)s * W;
        float *d = dscore + (size_t)s * W, *dropped_s = dropped + (size_t)s * W;
        float *dbias_s = dbias + (size_t)s * bias_W, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < W; j++) {
            dropped_s[j] = prob_s[j] * mask_s[j];  // forward: dropped = mask * prob
            d[j] *= mask_s[j];
            sum += d[j] * prob_s[j];
        }
        for (int j = 0; j < W; j++) d[j] = prob_s[j] * (d[j] - sum);  // forward: prob = softmax
        for (int j = 0; j < n; j++) dbias_s[j] += d[j];
    }
}

// dq (n, D) = dscore k / sqrt(D), dk = dscore^T q / sqrt(D); dq, dk may be q, k. scratch: 3 n * D
// padded.
static void attention_qk_backward(float *dq, float *dk, const float *dscore, const float *q,
                                  const float *k, const HeadTask *task, float *scratch) {
    int n = task->n, W = task->W, D = task->D, width = round_up(D, VEC);
    size_t size = (size_t)n * width;
    float *copies[2] = {scratch, scratch + size}, *out = scratch + 2 * size;
    float *target[2] = {dq, dk}, scale = 1.0f / sqrtf((float)D);
    copy_padded(copies[0], width, k, task->stride, n, D);
    copy_padded(copies[1], width, q, task->stride, n, D);
    for (int side = 0; side < 2; side++) {
        small_product(out, width, dscore, side ? 1 : W, side ? W : 1, copies[side], width, n, width,
                      n);
        for (int s = 0; s < n; s++)
            for (int d = 0; d < D; d++)
                target[side][(size_t)s * task->stride + d] = scale * out[(size_t)s * width + d];
    }
}

// context (T, C) and prob (per molecule (H, S, W)) of layer l from qkv (T, 3 C).
static void attention_forward(float *context, float *prob, const float *qkv, const float *bias,
                              const Work *w, const Batch *batch, int C, int H, double p,
                              const Draws *draws, int l) {
    int D = C / H, width = round_up(D, VEC);
#pragma omp parallel for schedule(dynamic, 4)
    for (size_t task_id = 0; task_id < batch->B * (size_t)H; task_id++) {
        size_t b = task_id / (size_t)H, first = (size_t)batch->atom_start[b] + b;
        int h = (int)(task_id % (size_t)H), N = batch->n_atoms[b], S = N + 1, W = bias_width(N);
        HeadTask task = {S, W, D, 3 * C, p, draws, RNG_ATTENTION_DROP + (uint32_t)l,
                         draws->first_place + (uint32_t)b, (uint32_t)h};
        const float *q = qkv + first * 3 * (size_t)C + (size_t)h * D, *k = q + C, *v = k + C;
        float *dropped = work_thread(w), *copy = dropped + (size_t)S * W;
        float *out = copy + (size_t)S * width, *scratch = out + (size_t)S * width;
        size_t at = bias_at(batch, H, b, h);
        attention_prob_forward(prob + at, dropped, q, k, bias + at, W, &task, scratch);
        copy_padded(copy, width, v, 3 * C, S, D);
        small_product(out, width, dropped, W, 1, copy, width, S, width, S);
        for (int s = 0; s < S; s++)
            memcpy(context + (first + (size_t)s) * (size_t)C + (size_t)h * D,
                   out + (size_t)s * width, sizeof(float) * (size_t)D);
    }
}

// dqkv (T, 3 C) is stored, dbias is added to. dqkv may be qkv: a task is the only reader of the
// slices that it writes, and writes dv after v, dq and dk after q and k were read.
static void attention_backward(float *dqkv, float *dbias, const float *dcontext, const float *prob,
                               const float *qkv, const Work *w, const Batch *batch, int C, int H,
                               double p, const Draws *draws, int l) {
    int D = C / H, width = round_up(D, VEC);
#pragma omp parallel for schedule(dynamic, 4)
    for (size_t task_id = 0; task_id < batch->B * (size_t)H; task_id++) {
        size_t b = task_id / (size_t)H, first = (size_t)batch->atom_start[b] + b;
        int h = (int)(task_id % (size_t)H), N = batch->n_atoms[b], S = N + 1, W = bias_width(N);
        HeadTask task = {S, W, D, 3 * C, p, draws, RNG_ATTENTION_DROP + (uint32_t)l,
                         draws->first_place + (uint32_t)b, (uint32_t)h};
        size_t slice = first * 3 * (size_t)C + (size_t)h * D, at = bias_at(batch, H, b, h);
        const float *q = qkv + slice, *k = q + C, *v = k + C;
        const float *dout = dcontext + first * (size_t)C + (size_t)h * D;
        float *dscore = work_thread(w), *dropped = dscore + (size_t)S * W;
        float *copy = dropped + (size_t)S * W, *out = copy + (size_t)S * width;
        float *scratch = out + (size_t)S * width;
        copy_transposed(scratch, W, v, 3 * C, S, D);  // forward: out = dropped v
        small_product(dscore, W, dout, C, 1, scratch, W, S, W, D);
        attention_prob_backward(dscore, dropped, dbias + at, W, prob + at, &task, scratch);
        copy_padded(copy, width, dout, C, S, D);
        small_product(out, width, dropped, 1, W, copy, width, S, width, S);
        for (int s = 0; s < S; s++)
            memcpy(dqkv + slice + 2 * (size_t)C + (size_t)s * 3 * (size_t)C,
                   out + (size_t)s * width, sizeof(float) * (size_t)D);
        attention_qk_backward(dqkv + slice, dqkv + slice + C, dscore, q, k, &task, scratch);
    }
}

// x (T, C), the input of layer l, becomes its output.
static void layer_forward(Acts *a, const Model *model, const Batch *batch, const Dropout *drop,
                          const Draws *draws, int l) {
    const LayerTensors *p = &model->p.layer[l];
    const Config *c = &model->config;
    const Work *w = &a->work;
    int C = c->dim, F = c->ffn, T = (int)batch->T;
    size_t tc = (size_t)l * T * C, tf = (size_t)l * T * F, lt = (size_t)l * T;
    float *qkv = a->qkv + 3 * tc, *prob = a->prob + (size_t)l * batch->W * c->heads;
    PathDrop drop1 = path_drop(drop, draws, c->layers, l, 0);
    PathDrop drop2 = path_drop(drop, draws, c->layers, l, 1);
    linear_forward(w, qkv, a->x, p->q_w, p->q_b, T, C, 3 * C);
    attention_forward(a->context + tc, prob, qkv, a->bias, w, batch, C, c->heads, drop->attention,
                      draws, l);
    linear_forward(w, a->branch, a->context + tc, p->out_w, p->out_b, T, C, C);
    residual_norm_forward(a->mid, a->norm1_hat + tc, a->norm1_rstd + lt, a->x, a->branch,
                          p->norm1_w, p->norm1_b, batch, C, &drop1);
    linear_forward(w, a->ffn_pre + tf, a->mid, p->ffn1_w, p->ffn1_b, T, C, F);
    gelu_forward(a->ffn_hidden, a->ffn_pre + tf, w, batch, F, drop->activation, draws,
                 RNG_ACTIVATION_DROP + (uint32_t)l);
    linear_forward(w, a->branch, a->ffn_hidden, p->ffn2_w, p->ffn2_b, T, F, C);
    residual_norm_forward(a->x, a->norm2_hat + tc, a->norm2_rstd + lt, a->mid, a->branch,
                          p->norm2_w, p->norm2_b, batch, C, &drop2);
}

// x (T, C) = the input of layer l again: the output of the LayerNorm before it.
static void layer_input(Acts *a, const Model *model, const Batch *batch, const Dropout *drop,
                        const Draws *draws, int l) {
    int C = model->config.dim;
    if (l > 0) {
        const LayerTensors *before = &model->p.layer[l - 1];
        norm_restore(a->x, a->norm2_hat + (size_t)(l - 1) * batch->T * (size_t)C, before->norm2_w,
                     before->norm2_b, batch, C);
    } else {
        norm_restore(a->x, a->embed_hat, model->p.embed_norm_w, model->p.embed_norm_b, batch, C);
        dropout_rows(a->x, &a->work, batch, C, drop->embedding, draws, RNG_EMBED_DROP);
    }
}

// dx, the gradient of the layer's output, becomes that of its input; qkv[l] is used up.
static void layer_backward(Acts *a, Model *model, const Batch *batch, const Dropout *drop,
                           const Draws *draws, int l) {
    const LayerTensors *p = &model->p.layer[l];
    LayerTensors *g = &model->g.layer[l];
    const Config *c = &model->config;
    const Work *w = &a->work;
    int C = c->dim, F = c->ffn, T = (int)batch->T;
    size_t tc = (size_t)l * T * C, tf = (size_t)l * T * F, lt = (size_t)l * T;
    float *qkv = a->qkv + 3 * tc;
    const float *prob = a->prob + (size_t)l * batch->W * c->heads;
    PathDrop drop1 = path_drop(drop, draws, c->layers, l, 0);
    PathDrop drop2 = path_drop(drop, draws, c->layers, l, 1);
    uint32_t purpose = RNG_ACTIVATION_DROP + (uint32_t)l;
    // forward: x' = LN2(mid + ffn2(hidden)), hidden = drop(gelu(ffn1(mid)))
    residual_norm_backward(a->dmid, a->branch, g->norm2_w, g->norm2_b, a->norm_parts, a->dx,
                           a->norm2_hat + tc, a->norm2_rstd + lt, p->norm2_w, batch, C, &drop2);
    gelu_forward(a->ffn_hidden, a->ffn_pre + tf, w, batch, F, drop->activation, draws, purpose);
    linear_backward(w, a->ffn_hidden, 0, g->ffn2_w, g->ffn2_b, a->branch, a->ffn_hidden, p->ffn2_w,
                    T, F, C);
    gelu_backward(a->ffn_hidden, a->ffn_pre + tf, w, batch, F, drop->activation, draws, purpose);
    norm_restore(a->mid, a->norm1_hat + tc, p->norm1_w, p->norm1_b, batch, C);
    linear_backward(w, a->dmid, 1, g->ffn1_w, g->ffn1_b, a->ffn_hidden, a->mid, p->ffn1_w, T, C, F);
    // forward: mid = LN1(x + out(attention(qkv(x))))
    residual_norm_backward(a->dx, a->branch, g->norm1_w, g->norm1_b, a->norm_parts, a->dmid,
                           a->norm1_hat + tc, a->norm1_rstd + lt, p->norm1_w, batch, C, &drop1);
    linear_backward(w, a->context + tc, 0, g->out_w, g->out_b, a->branch, a->context + tc, p->out_w,
                    T, C, C);
    attention_backward(qkv, a->dbias, a->context + tc, prob, qkv, w, batch, C, c->heads,
                       drop->attention, draws, l);
    layer_input(a, model, batch, drop, draws, l);
    linear_backward(w, a->dx, 1, g->q_w, g->q_b, qkv, a->x, p->q_w, T, C, 3 * C);
}

// The whole encoder: from a batch to its output x (T, C).
static void encoder_forward(Acts *a, const Model *model, const Batch *batch, const Dropout *drop,
                            const Draws *draws) {
    Sizes s = {batch->B, batch->T, batch->A, batch->P, batch->W, (size_t)batch->N};
    acts_place(a, a->memory, model->config, s);
    path_bias_forward(a, model);
    geometry_forward(a, model, batch);
    bias_forward(a, model, batch);
    embedding_forward(a, model, batch);
    dropout_rows(a->x, &a->work, batch, model->config.dim, drop->embedding, draws, RNG_EMBED_DROP);
    for (int l = 0; l < model->config.layers; l++) layer_forward(a, model, batch, drop, draws, l);
}

// From dx, the gradient of x, to that of every encoder parameter. dbias holds what the heads
// have added to the gradient of the attention bias. Tables must have been zeroed.
static void encoder_backward(Acts *a, Model *model, const Batch *batch, const Dropout *drop,
                             const Draws *draws) {
    for (int l = model->config.layers - 1; l >= 0; l--)
        layer_backward(a, model, batch, drop, draws, l);
    dropout_rows(a->dx, &a->work, batch, model->config.dim, drop->embedding, draws, RNG_EMBED_DROP);
    embedding_backward(a, model, batch);
    bias_backward(a, model, batch);
    path_bias_backward(a, model);
    geometry_backward(a, model, batch);
}

// =================================================================================================
// 8 Heads and losses (paper 3.3). Three relation heads see every ordered pair of atoms through the
//   outer product of two 32-vectors, r of atom i and c of atom j; the denoising head is an
//   attention over the atoms. A head's loss and gradient are computed while its outputs are still
//   in cache.
// =================================================================================================

enum { LOSS_TOTAL, LOSS_NOISE, LOSS_SPD, LOSS_EDGE, LOSS_3D, LOSSES };
static const char *const LOSS_NAMES[LOSSES] = {"total", "denoise", "spd", "edge", "3d"};

typedef struct { double weight[LOSSES]; } LossWeights;  // weight[LOSS_TOTAL] is not used

// ---- pair maps: map = LN(gelu(W h + b)), six of them side by side: spd r, c, edge r, c, 3d r, c

static void pair_maps_forward(Acts *a, const Model *model, int A) {
    int width = 6 * PAIR_WIDTH;
    linear_forward(&a->work, a->pair_pre, a->hidden, model->p.spd_row_w, model->p.spd_row_b, A,
                   model->config.dim, width);
#pragma omp parallel for schedule(static)
    for (int i = 0; i < A; i++) {
        for (int k = 0; k < 6; k++) {
            size_t at = (size_t)i * width + (size_t)k * PAIR_WIDTH;
            for (int c = 0; c < PAIR_WIDTH; c++) a->pair_hat[at + c] = gelu(a->pair_pre[at + c]);
            norm_row_forward(a->pair_map + at, a->pair_hat + at, &a->pair_rstd[(size_t)i * 6 + k],
                             a->pair_hat + at, model->p.spd_row_norm_w + k * PAIR_WIDTH,
                             model->p.spd_row_norm_b + k * PAIR_WIDTH, PAIR_WIDTH, PAIR_NORM_EPS);
        }
    }
}

// From dpair_map (A, 192); stores dhidden.
static void pair_maps_backward(Acts *a, Model *model, int A) {
    int width = 6 * PAIR_WIDTH, chunks = (A + NORM_ROWS - 1) / NORM_ROWS;
#pragma omp parallel for schedule(static)
    for (int chunk = 0; chunk < chunks; chunk++) {
        float *dweight = a->norm_parts + (size_t)chunk * 2 * width, *dbias = dweight + width;
        memset(dweight, 0, sizeof(float) * 2 * (size_t)width);
        for (int i = chunk * NORM_ROWS; i < min_int((chunk + 1) * NORM_ROWS, A); i++) {
            for (int k = 0; k < 6; k++) {
                size_t at = (size_t)i * width + (size_t)k * PAIR_WIDTH;
                float *d = a->dpair_map + at;
                norm_row_backward(d, dweight + k * PAIR_WIDTH, dbias + k * PAIR_WIDTH, d,
                                  a->pair_hat + at, a->pair_rstd[(size_t)i * 6 + k],
                                  model->p.spd_row_norm_w + k * PAIR_WIDTH, PAIR_WIDTH);
                for (int c = 0; c < PAIR_WIDTH; c++) d[c] *= gelu_slope(a->pair_pre[at + c]);
            }
        }
    }
    column_sums(model->g.spd_row_norm_w, a->norm_parts, 2 * width, chunks, width);
    column_sums(model->g.spd_row_norm_b, a->norm_parts + width, 2 * width, chunks, width);
    linear_backward(&a->work, a->dhidden, 0, model->g.spd_row_w, model->g.spd_row_b, a->dpair_map,
                    a->hidden, model->p.spd_row_w, A, model->config.dim, width);
}

// ---- losses of the pairs (i, 0..N-1) of molecule b. logits (N, width) become their own gradients,
//      times `scale`; the sum of the losses is returned, for the 3D loss divided by the molecule's
//      number of pairs.
typedef double PairLoss(float *logits, int width, const Batch *batch, size_t b, int i,
                        double scale);

// Cross-entropy of one softmax over n classes, log(sum(exp(x))) - x[target]: x (n) becomes its
// gradient times scale. target < 0: not counted.
static double cross_entropy(float *x, int n, int target, double scale) {
    if (target < 0) {
        for (int k = 0; k < n; k++) x[k] = 0;
        return 0;
    }
    int top = 0;
    for (int k = 1; k < n; k++) top = x[k] > x[top] ? k : top;
    double loss = (double)x[top] - (double)x[target];
    softmax_row(x, n);
    loss -= log((double)x[top]);  // the sum is exp(x[top]) / softmax(x)[top]
    x[target] -= 1.0f;
    for (int k = 0; k < n; k++) x[k] *= (float)scale;
    return loss;
}

static double spd_loss(float *logits, int width, const Batch *batch, size_t b, int i,
                       double scale) {
    int N = batch->n_atoms[b];
    const uint16_t *spd = batch->spd + batch->pair_start[b] + (size_t)i * N;
    double loss = 0;
    for (int j = 0; j < N; j++)
        loss += cross_entropy(logits + (size_t)j * width, SPD_CLASSES, spd_class(spd[j]), scale);
    return loss;
}

static double edge_loss(float *logits, int width, const Batch *batch, size_t b, int i,
                        double scale) {
    int N = batch->n_atoms[b];
    const uint8_t *path = batch->path + (batch->pair_start[b] + (size_t)i * N) * PATH_BONDS;
    double loss = 0;
    for (int j = 0; j < N; j++)
        for (int t = 0; t < PATH_BONDS; t++)
            loss += cross_entropy(logits + (size_t)j * width + t * EDGE_CLASSES, EDGE_CLASSES,
                                  edge_class(path[j * PATH_BONDS + t]), scale);
    return loss;
}

// 1 - cos(p, d) of 3-vectors; p becomes the gradient times scale.
static double cosine_loss(float *p, const float *d, double scale) {
    double pp = 0, dd = 0, pd = 0;
    for (int k = 0; k < 3; k++) {
        pp += (double)p[k] * (double)p[k];
        dd += (double)d[k] * (double)d[k];
        pd += (double)p[k] * (double)d[k];
    }
    double norm = sqrt(pp * dd), inverse = 1.0 / (fmax(norm, COSINE_EPS));
    double cosine = pd * inverse, shrink = norm > COSINE_EPS ? cosine / pp : 0.0;
    for (int k = 0; k < 3; k++)
        p[k] = (float)(-scale * ((double)d[k] * inverse - shrink * (double)p[k]));
    return 1.0 - cosine;
}

static double d3_loss(float *logits, int width, const Batch *batch, size_t b, int i, double scale) {
    int N = batch->n_atoms[b];
    const float *pos = batch->pos + 3 * (size_t)batch->atom_start[b];
    double loss = 0, pairs = (double)batch->d3_pairs[b];
    for (int j = 0; j < N; j++) {
        float *p = logits + (size_t)j * width, d[3];
        for (int k = 0; k < 3; k++) d[k] = pos[3 * j + k] - pos[3 * i + k];
        if (batch->has_pos[b] && d3_counts(pos, i, j))
            loss += cosine_loss(p, d, scale / pairs) / pairs;
        else
            p[0] = p[1] = p[2] = 0;
    }
    return loss;
}

// ---- a relation head: logits(i, j) = weight vec(r_i c_j^T) + bias

typedef struct {
    int outputs;          // of a pair
    int map;              // r is pair map `map`, c the next one
    const float *weight;  // (outputs, R * R)
    const float *bias;    // (outputs)
    float *dweight, *dbias;  // stored; NULL: forward only
    PairLoss *loss;
    double scale;         // weight of the loss / what it is averaged over
    float *logits;        // (P, outputs) copied there if not NULL
} PairHead;

// One atom's row of pairs. U (R, width) of atom i and its gradient dU; c (N, R) of row stride 6 R;
// dc (N, R) is added to.
static double pair_head_row(Acts *a, const PairHead *head, const Batch *batch, size_t b, int i,
                            const float *U, float *dU, float *dc, float *scratch) {
    int N = batch->n_atoms[b], width = round_up(head->outputs, VEC), stride = 6 * PAIR_WIDTH;
    size_t atom = (size_t)batch->atom_start[b] + (size_t)i;
    const float *c =
        a->pair_map + (atom - (size_t)i) * (size_t)stride + (head->map + 1) * PAIR_WIDTH;
    float *logits = scratch, *ut = logits + (size_t)N * width, *part = ut + width * PAIR_WIDTH;
    small_product(logits, width, c, stride, 1, U, width, N, width, PAIR_WIDTH);
    for (int j = 0; j < N; j++)
        for (int k = 0; k < head->outputs; k++) logits[(size_t)j * width + k] += head->bias[k];
    if (head->logits)
        for (int j = 0; j < N; j++)
            memcpy(
                head->logits + (batch->pair_start[b] + (size_t)i * N + (size_t)j) * head->outputs,
                logits + (size_t)j * width, sizeof(float) * (size_t)head->outputs);
    double loss = head->loss(logits, width, batch, b, i, head->scale);
    if (!head->dweight) return loss;
    // forward: logits (N, width) = c (N, R) @ U (R, width) + bias
    small_product(dU, width, c, 1, stride, logits, width, PAIR_WIDTH, width, N);
    copy_transposed(ut, PAIR_WIDTH, U, width, PAIR_WIDTH, head->outputs);
    small_product(part, PAIR_WIDTH, logits, width, 1, ut, PAIR_WIDTH, N, PAIR_WIDTH, head->outputs);
    for (int k = 0; k < N * PAIR_WIDTH; k++) dc[k] += part[k];
    float *dbias = a->pair_dbias + atom * (size_t)width;
    memset(dbias, 0, sizeof(float) * (size_t)width);
    for (int j = 0; j < N; j++)
        for (int k = 0; k < width; k++) dbias[k] += logits[(size_t)j * width + k];
    return loss;
}

// The molecules b0..b1-1: row_loss of their atoms, and if head->dweight the gradients of their
// pair maps and dpair_weight, which is added to from the second group on.
static void pair_head_group(Acts *a, const PairHead *head, const Batch *batch, size_t b0,
                            size_t b1) {
    enum { R = PAIR_WIDTH };
    int width = round_up(head->outputs, VEC), columns = R * width;
    size_t first = (size_t)batch->atom_start[b0];
    int atoms = batch->atom_start[b1] - batch->atom_start[b0];
    const float *r = a->pair_map + first * 6 * R + head->map * R;
    float *dr = a->dpair_map + first * 6 * R + head->map * R;
    gemm(&a->work, 0, 0, atoms, columns, R, r, 6 * R, a->pair_weight, columns, NULL, 0, a->pair_row,
         columns);
#pragma omp parallel for schedule(dynamic)
    for (size_t b = b0; b < b1; b++) {
        int N = batch->n_atoms[b];
        size_t a0 = (size_t)batch->atom_start[b];
        float *dc = work_thread(&a->work), *scratch = dc + (size_t)N * R;
        memset(dc, 0, sizeof(float) * (size_t)N * R);
        for (int i = 0; i < N; i++) {
            size_t at = (a0 - first + (size_t)i) * (size_t)columns;
            a->row_loss[a0 + (size_t)i] = pair_head_row(a, head, batch, b, i, a->pair_row + at,
                                                        a->dpair_row + at, dc, scratch);
        }
        for (int j = 0; j < N && head->dweight; j++)
            memcpy(a->dpair_map + (a0 + (size_t)j) * 6 * R + (head->map + 1) * R,
                   dc + (size_t)j * R, sizeof(float) * R);
    }
    if (!head->dweight) return;
    gemm(&a->work, 0, 1, atoms, R, columns, a->dpair_row, columns, a->pair_weight, columns, NULL, 0,
         dr, 6 * R);  // forward: U = r @ pair_weight
    gemm(&a->work, 1, 0, R, columns, atoms, r, 6 * R, a->dpair_row, columns, NULL, b0 > 0,
         a->dpair_weight, columns);
}

// Sum of a relation head's losses; its gradients, and those of its pair maps, if head->dweight.
// A linear map of an outer product is bilinear: U_i = r_i W (R, width) once per atom, then U_i c_j
// per pair - 1/32 of the arithmetic of forming the 1024-vectors.
static double pair_head(Acts *a, const PairHead *head, const Batch *batch) {
    enum { R = PAIR_WIDTH };
    int width = round_up(head->outputs, VEC), A = (int)batch->A;
#pragma omp parallel for schedule(static)
    for (int ab = 0; ab < R * R; ab++)  // pair_weight[a][b][k] = weight[k][32 a + b]
        for (int k = 0; k < width; k++)
            a->pair_weight[(size_t)ab * width + k] =
                k < head->outputs ? head->weight[(size_t)k * R * R + ab] : 0.0f;
    for (size_t b = 0, end; b < batch->B; b = end) {
        int limit = batch->atom_start[b] + PAIR_GROUP;
        for (end = b + 1; end < batch->B && batch->atom_start[end + 1] <= limit; end++) {
        }
        pair_head_group(a, head, batch, b, end);
    }
    double loss = 0;
    for (int i = 0; i < A; i++) loss += a->row_loss[i];
    if (!head->dweight) return loss;
#pragma omp parallel for schedule(static)
    for (int k = 0; k < head->outputs; k++)
        for (int ab = 0; ab < R * R; ab++)
            head->dweight[(size_t)k * R * R + ab] = a->dpair_weight[(size_t)ab * width + k];
    float sums[512];
    column_sums(sums, a->pair_dbias, width, A, width);
    memcpy(head->dbias, sums, sizeof(float) * (size_t)head->outputs);
    return loss;
}

// ---- the 3D head's four maps as one: no non-linearity stands between linear (1024 -> 256) and the
//      three axes (256 -> 1), so weight (3, 1024) = axes (3, 256) @ d3_w, and
//      bias = axes @ d3_b + axis_b

static void d3_compose(Acts *a, float bias[3], const Model *model) {
    const Tensors *p = &model->p;
    const float *axis_b[3] = {p->d3_axis1_b, p->d3_axis2_b, p->d3_axis3_b};
    gemm(&a->work, 0, 0, 3, PAIR_WIDTH * PAIR_WIDTH, D3_INNER, p->d3_axis1_w, D3_INNER, p->d3_w,
         PAIR_WIDTH * PAIR_WIDTH, NULL, 0, a->d3_weight, PAIR_WIDTH * PAIR_WIDTH);
    for (int k = 0; k < 3; k++)
        bias[k] = dot_product(p->d3_axis1_w + k * D3_INNER, p->d3_b, D3_INNER) + axis_b[k][0];
}

// From the gradients of the composed map, dd3_weight (3, 1024) and dbias, to those of its factors.
static void d3_split(Acts *a, const float dbias[3], Model *model) {
    enum { RR = PAIR_WIDTH * PAIR_WIDTH };
    const Tensors *p = &model->p;
    Tensors *g = &model->g;
    float *axis_b[3] = {g->d3_axis1_b, g->d3_axis2_b, g->d3_axis3_b};
    gemm(&a->work, 1, 0, D3_INNER, RR, 3, p->d3_axis1_w, D3_INNER, a->dd3_weight, RR, NULL, 0,
         g->d3_w, RR);  // forward: weight = axes @ d3_w
    gemm(&a->work, 0, 1, 3, D3_INNER, RR, a->dd3_weight, RR, p->d3_w, RR, NULL, 0, g->d3_axis1_w,
         D3_INNER);
    for (int u = 0; u < D3_INNER; u++) {
        g->d3_b[u] = 0;
        for (int k = 0; k < 3; k++) {  // forward: bias = axes @ d3_b + axis_b
            g->d3_b[u] += dbias[k] * p->d3_axis1_w[k * D3_INNER + u];
            g->d3_axis1_w[k * D3_INNER + u] += dbias[k] * p->d3_b[u];
        }
    }
    for (int k = 0; k < 3; k++) axis_b[k][0] = dbias[k];
}

// ---- the denoising head (atom_proc): out_a(i) = w_a . y_a(i) + b_a, y_a(i) = sum over heads and j
//      of P(i, j) direction(i, j)[a] v_j. With force_a(j) = w_a . v_j (a head's channels), no y is
//      needed: out_a(i) = b_a + sum over h, j of P(i, j) direction(i, j)[a] force_a(j).

// Task of molecule b and head h on the atoms only: no graph token.
static HeadTask noise_task(const Batch *batch, int C, int H, size_t b, int h, double p,
                           const Draws *draws) {
    int N = batch->n_atoms[b];
    return (HeadTask){N, bias_width(N), C / H, 3 * C, p, draws, RNG_DENOISE_DROP,
                      draws->first_place + (uint32_t)b, (uint32_t)h};
}

// noise_out (A, 3).
static void noise_head_forward(Acts *a, const Model *model, const Batch *batch, double p,
                               const Draws *draws) {
    int C = model->config.dim, H = model->config.heads, D = C / H;
    linear_forward(&a->work, a->noise_qkv, a->hidden, model->p.noise_q_w, model->p.noise_q_b,
                   (int)batch->A, C, 3 * C);
#pragma omp parallel for schedule(dynamic, 4)
    for (size_t task_id = 0; task_id < batch->B * (size_t)H; task_id++) {
        size_t b = task_id / (size_t)H, a0 = (size_t)batch->atom_start[b];
        int h = (int)(task_id % (size_t)H), N = batch->n_atoms[b], W = bias_width(N);
        HeadTask task = noise_task(batch, C, H, b, h, p, draws);
        size_t at = bias_at(batch, H, b, h), plane = (size_t)N * N;
        const float *q = a->noise_qkv + a0 * 3 * (size_t)C + (size_t)h * D, *k = q + C, *v = k + C;
        const float *direction = batch->direction + 3 * batch->pair_start[b];
        float *dropped = work_thread(&a->work), *scratch = dropped + (size_t)N * W;
        float *force = a->noise_force + 3 * (a0 * (size_t)H + (size_t)h * N);
        float *part = a->noise_part + 3 * (a0 * (size_t)H + (size_t)h * N);
        attention_prob_forward(a->noise_prob + at, dropped, q, k, a->bias + at + W + 1, W, &task,
                               scratch);
        for (int axis = 0; axis < 3; axis++, force += N, part += N, direction += plane) {
            for (int j = 0; j < N; j++)
                force[j] = dot_product(model->p.noise_axis1_w + (size_t)axis * C + (size_t)h * D,
                               v + (size_t)j * 3 * C, D);
            for (int i = 0; i < N; i++) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int j = 0; j < N; j++)
                    sum += dropped[(size_t)i * W + j] * direction[(size_t)i * N + j] * force[j];
                part[i] = sum;
            }
        }
    }
    const float *axis_b[3] = {model->p.noise_axis1_b, model->p.noise_axis2_b,
                              model->p.noise_axis3_b};
#pragma omp parallel for schedule(static)
    for (size_t b = 0; b < batch->B; b++) {
        size_t a0 = (size_t)batch->atom_start[b], N = (size_t)batch->n_atoms[b];
        for (size_t i = 0; i < N; i++)
            for (size_t axis = 0; axis < 3; axis++) {
                float sum = axis_b[axis][0];
                for (size_t h = 0; h < (size_t)H; h++)
                    sum += a->noise_part[3 * (a0 * (size_t)H + h * N) + axis * N + i];
                a->noise_out[3 * (a0 + i) + axis] = sum;
            }
    }
}

// Sum of 1 - cos(out, noise) over the atoms that count; noise_dout (A, 3) = gradient times scale.
static double noise_loss(Acts *a, const Batch *batch, double scale) {
    double loss = 0;
    for (size_t i = 0; i < batch->A; i++) {
        float *d = a->noise_dout + 3 * i;
        memcpy(d, a->noise_out + 3 * i, 3 * sizeof(float));
        if (batch->noise_counts[i])
            loss += cosine_loss(d, batch->noise + 3 * i, scale);
        else
            d[0] = d[1] = d[2] = 0;
    }
    return loss;
}

// One head's backward task: from noise_dout to dbias, noise_dforce, and dq and dk in place of q, k.
static void noise_task_backward(Acts *a, const Model *model, const Batch *batch, size_t b, int h,
                                double p, const Draws *draws) {
    int C = model->config.dim, H = model->config.heads, D = C / H;
    int N = batch->n_atoms[b], W = bias_width(N);
    size_t a0 = (size_t)batch->atom_start[b], at = bias_at(batch, H, b, h), plane = (size_t)N * N;
    size_t slice = a0 * 3 * (size_t)C + (size_t)h * D, share = 3 * (a0 * (size_t)H + (size_t)h * N);
    HeadTask task = noise_task(batch, C, H, b, h, p, draws);
    const float *direction = batch->direction + 3 * batch->pair_start[b];
    const float *dout = a->noise_dout + 3 * a0, *force = a->noise_force + share;
    float *dforce = a->noise_dforce + share, *q = a->noise_qkv + slice, *k = q + C;
    float *dscore = work_thread(&a->work), *dropped = dscore + (size_t)N * W;
    float *scratch = dropped + (size_t)N * W;
    memset(dscore, 0, sizeof(float) * (size_t)N * W);
    for (int axis = 0; axis < 3; axis++)  // forward: out = sum of dropped * direction * force
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++)
                dscore[(size_t)i * W + j] += dout[3 * i + axis] * force[(size_t)axis * N + j] *
                                             direction[axis * plane + (size_t)i * N + j];
    attention_prob_backward(dscore, dropped, a->dbias + at + W + 1, W, a->noise_prob + at, &task,
                            scratch);
    memset(dforce, 0, sizeof(float) * 3 * (size_t)N);
    for (int axis = 0; axis < 3; axis++)
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++)
                dforce[(size_t)axis * N + j] += dout[3 * i + axis] * dropped[(size_t)i * W + j] *
                                                direction[axis * plane + (size_t)i * N + j];
    attention_qk_backward(q, k, dscore, q, k, &task, scratch);
}

// Head h's part of force_a(j) = w_a . v_j: dw_a = sum over atoms of dforce_a(j) v_j, and
// dv_j = sum over a of dforce_a(j) w_a in place of v_j.
static void noise_force_backward(Acts *a, Model *model, const Batch *batch, int h) {
    int C = model->config.dim, H = model->config.heads, D = C / H;
    const float *w = model->p.noise_axis1_w + (size_t)h * D;
    float *dw = model->g.noise_axis1_w + (size_t)h * D;
    for (int axis = 0; axis < 3; axis++) memset(dw + axis * C, 0, sizeof(float) * (size_t)D);
    for (size_t b = 0; b < batch->B; b++) {
        size_t a0 = (size_t)batch->atom_start[b], N = (size_t)batch->n_atoms[b];
        const float *dforce = a->noise_dforce + 3 * (a0 * (size_t)H + (size_t)h * N);
        for (size_t j = 0; j < N; j++) {
            float *v = a->noise_qkv + (3 * (a0 + j) + 2) * (size_t)C + (size_t)h * D;
            for (int d = 0; d < D; d++) {
                float dv = 0;
                for (int axis = 0; axis < 3; axis++) {
                    dw[axis * C + d] += dforce[axis * N + j] * v[d];
                    dv += dforce[axis * N + j] * w[axis * C + d];
                }
                v[d] = dv;
            }
        }
    }
}

// From noise_dout (A, 3): adds to dhidden and dbias, stores the head's parameter gradients.
static void noise_head_backward(Acts *a, Model *model, const Batch *batch, double p,
                                const Draws *draws) {
    int C = model->config.dim, H = model->config.heads;
#pragma omp parallel for schedule(dynamic, 4)
    for (size_t task_id = 0; task_id < batch->B * (size_t)H; task_id++)
        noise_task_backward(a, model, batch, task_id / (size_t)H, (int)(task_id % (size_t)H), p,
                            draws);
#pragma omp parallel for schedule(static)
    for (int h = 0; h < H; h++) noise_force_backward(a, model, batch, h);
    float *axis_b[3] = {model->g.noise_axis1_b, model->g.noise_axis2_b, model->g.noise_axis3_b};
    float sums[3];
    column_sums(sums, a->noise_dout, 3, (int)batch->A, 3);
    for (int axis = 0; axis < 3; axis++) axis_b[axis][0] = sums[axis];
    linear_backward(&a->work, a->dhidden, 1, model->g.noise_q_w, model->g.noise_q_b, a->noise_qkv,
                    a->hidden, model->p.noise_q_w, (int)batch->A, C, 3 * C);
}

// ---- all four heads

// out = the rows of x (T, C) that a head reads: of the atoms (A, C), or if `graph` is set, of the
// graph tokens (B, C).
static void gather_tokens(float *out, const float *x, const Batch *batch, int C, int graph) {
#pragma omp parallel for schedule(static)
    for (size_t b = 0; b < batch->B; b++) {
        size_t a0 = (size_t)batch->atom_start[b], N = (size_t)batch->n_atoms[b];
        memcpy(out + (graph ? b : a0) * (size_t)C, x + (a0 + b + !graph) * (size_t)C,
               sizeof(float) * (graph ? 1 : N) * (size_t)C);
    }
}

// dx (T, C) = dout in the rows that were gathered, zero in the others.
static void scatter_tokens(float *dx, const float *dout, const Batch *batch, int C, int graph) {
#pragma omp parallel for schedule(static)
    for (size_t b = 0; b < batch->B; b++) {
        size_t a0 = (size_t)batch->atom_start[b], N = (size_t)batch->n_atoms[b];
        memset(dx + (a0 + b) * (size_t)C, 0, sizeof(float) * (N + 1) * (size_t)C);
        memcpy(dx + (a0 + b + !graph) * (size_t)C, dout + (graph ? b : a0) * (size_t)C,
               sizeof(float) * (graph ? 1 : N) * (size_t)C);
    }
}

// Copies of the heads' outputs for the tests, each may be NULL: (P, 11), (P, 120), (P, 3).
typedef struct { float *spd, *edge, *d3; } HeadOutputs;

// Losses of the encoder's output x; with `backward`, also the gradients of the heads, dx (of x)
// and dbias. The losses are means over what the batch counts; a loss with nothing to count
// is 0.
static void pretrain_heads(double loss[LOSSES], Acts *a, Model *model, const Batch *batch,
                           const LossWeights *weights, const Dropout *drop, const Draws *draws,
                           int backward, const HeadOutputs *outputs) {
    const Tensors *p = &model->p;
    Tensors *g = &model->g;
    int C = model->config.dim, A = (int)batch->A;
    double count[LOSSES] = {1, (double)batch->noise_count, (double)batch->spd_count,
                            (double)batch->edge_count, (double)batch->d3_count};
    double scale[LOSSES];
    for (int k = 1; k < LOSSES; k++) {
        if (count[k] < 1) count[k] = 1;
        scale[k] = weights->weight[k] / count[k];
    }
    float d3_bias[3], dd3_bias[3];
    gather_tokens(a->hidden, a->x, batch, C, 0);
    pair_maps_forward(a, model, A);
    d3_compose(a, d3_bias, model);
    PairHead spd = {SPD_CLASSES, 0, p->spd_w, p->spd_b, g->spd_w, g->spd_b, spd_loss,
                    scale[LOSS_SPD], outputs ? outputs->spd : NULL};
    PairHead edge = {EDGE_OUTPUTS, 2, p->edge_w, p->edge_b, g->edge_w, g->edge_b, edge_loss,
                     scale[LOSS_EDGE], outputs ? outputs->edge : NULL};
    PairHead d3 = {3, 4, a->d3_weight, d3_bias, a->dd3_weight, dd3_bias, d3_loss,
                   scale[LOSS_3D], outputs ? outputs->d3 : NULL};
    if (!backward) spd.dweight = edge.dweight = d3.dweight = NULL;
    loss[LOSS_SPD] = pair_head(a, &spd, batch) / count[LOSS_SPD];
    loss[LOSS_EDGE] = pair_head(a, &edge, batch) / count[LOSS_EDGE];
    loss[LOSS_3D] = pair_head(a, &d3, batch) / count[LOSS_3D];
    noise_head_forward(a, model, batch, drop->attention, draws);
    loss[LOSS_NOISE] = noise_loss(a, batch, scale[LOSS_NOISE]) / count[LOSS_NOISE];
    loss[LOSS_TOTAL] = 0;
    for (int k = 1; k < LOSSES; k++) loss[LOSS_TOTAL] += weights->weight[k] * loss[k];
    if (!backward) return;
    d3_split(a, dd3_bias, model);
    pair_maps_backward(a, model, A);
    memset(a->dbias, 0, sizeof(float) * batch->W * (size_t)model->config.heads);
    noise_head_backward(a, model, batch, drop->attention, draws);
    scatter_tokens(a->dx, a->dhidden, batch, C, 0);
}

// ---- the fine-tuning head: out = W2 gelu(W1 x + b1) + b2 on a token, read out as that of the
//      graph token, or as the mean or sum over the atoms

typedef enum { READ_CLS, READ_MEAN, READ_SUM } Readout;
typedef enum { TASK_CLASSIFICATION, TASK_REGRESSION } TaskKind;

// What a fine-tuned model needs besides its parameters.
typedef struct {
    TaskKind kind;
    Readout readout;
    int use;              // USE_ bits of the relations it is given
    const float *mean, *std;  // (Y) of the training labels; regression: prediction = out std + mean
    int label_units;      // regression: the loss is in the labels' units, not in deviations
} Task;

// Tokens that the head reads: the graph tokens (B) or the atoms (A).
static int head_rows(const Batch *batch, Readout readout) {
    return readout == READ_CLS ? (int)batch->B : (int)batch->A;
}

// logits (B, Y) from the encoder's output.
static void task_head_forward(float *logits, Acts *a, const Model *model, const Batch *batch,
                              Readout readout) {
    int C = model->config.dim, Y = model->config.tasks, rows = head_rows(batch, readout);
    gather_tokens(a->hidden, a->x, batch, C, readout == READ_CLS);
    linear_forward(&a->work, a->head_pre, a->hidden, model->p.head1_w, model->p.head1_b, rows, C,
                   C);
#pragma omp parallel for simd schedule(static)
    for (size_t k = 0; k < (size_t)rows * (size_t)C; k++) a->head_hidden[k] = gelu(a->head_pre[k]);
    linear_forward(&a->work, a->head_out, a->head_hidden, model->p.head2_w, model->p.head2_b, rows,
                   C, Y);
    for (size_t b = 0; b < batch->B; b++) {
        size_t first = readout == READ_CLS ? b : (size_t)batch->atom_start[b];
        size_t count = readout == READ_CLS ? 1 : (size_t)batch->n_atoms[b];
        for (int y = 0; y < Y; y++) {
            float sum = 0;
            for (size_t r = first; r < first + count; r++) sum += a->head_out[r * (size_t)Y + y];
            logits[b * (size_t)Y + y] = readout == READ_MEAN ? sum / (float)count : sum;
        }
    }
}

// From dlogits (B, Y): the head's gradients and dx of the encoder's output.
static void task_head_backward(Acts *a, Model *model, const Batch *batch, const float *dlogits,
                               Readout readout) {
    int C = model->config.dim, Y = model->config.tasks, rows = head_rows(batch, readout);
    for (size_t b = 0; b < batch->B; b++) {  // forward: the mean or sum over a molecule's rows
        size_t first = readout == READ_CLS ? b : (size_t)batch->atom_start[b];
        size_t count = readout == READ_CLS ? 1 : (size_t)batch->n_atoms[b];
        float scale = readout == READ_MEAN ? 1.0f / (float)count : 1.0f;
        for (size_t r = first; r < first + count; r++)
            for (int y = 0; y < Y; y++)
                a->dhead_out[r * (size_t)Y + y] = scale * dlogits[b * (size_t)Y + y];
    }
    float *dhidden = a->branch;  // (rows, C), free here
    linear_backward(&a->work, dhidden, 0, model->g.head2_w, model->g.head2_b, a->dhead_out,
                    a->head_hidden, model->p.head2_w, rows, C, Y);
#pragma omp parallel for simd schedule(static)
    for (size_t k = 0; k < (size_t)rows * (size_t)C; k++) dhidden[k] *= gelu_slope(a->head_pre[k]);
    linear_backward(&a->work, a->dhidden, 0, model->g.head1_w, model->g.head1_b, dhidden, a->hidden,
                    model->p.head1_w, rows, C, C);
    scatter_tokens(a->dx, a->dhidden, batch, C, readout == READ_CLS);
    memset(a->dbias, 0, sizeof(float) * batch->W * (size_t)model->config.heads);
}

// Mean loss over the labels present: binary cross-entropy with logits, or the squared error of
// out std + mean, over std^2 unless label_units (the release), so that every task counts alike.
// dlogits (B, Y) is its gradient, 0 where a label is missing.
static double task_loss(float *dlogits, const float *logits, const Batch *batch, const Task *task) {
    size_t count = 0, Y = (size_t)batch->Y;
    double loss = 0;
    for (size_t k = 0; k < batch->B * Y; k++) count += !isnan(batch->labels[k]);
    for (size_t k = 0; k < batch->B * Y; k++) {
        double x = (double)logits[k], label = (double)batch->labels[k];
        dlogits[k] = 0;
        if (isnan(label)) continue;
        if (task->kind == TASK_CLASSIFICATION) {
            double exp_minus = exp(-fabs(x));  // log(1 + e^-|x|) does not overflow
            loss += fmax(x, 0) - x * label + log1p(exp_minus);
            double sigmoid = x >= 0 ? 1 / (1 + exp_minus) : exp_minus / (1 + exp_minus);
            dlogits[k] = (float)((sigmoid - label) / (double)count);
        } else {
            double std = (double)task->std[k % Y], unit = task->label_units ? std : 1;
            double error = unit * (x - (label - (double)task->mean[k % Y]) / std);
            loss += error * error;
            dlogits[k] = (float)(2 * error * unit / (double)count);
        }
    }
    return count ? loss / (double)count : 0;
}

// =================================================================================================
// 9 Optimiser, schedule and metrics
// =================================================================================================

typedef struct { double lr, beta1, beta2, eps, weight_decay, clip; } Adam;

// Euclidean norm of all gradients: float sums of 256 squares, side by side, the rest in double.
static double gradient_norm(const Model *model) {
    enum { LANES = ADAM_CHUNK / 256 };
    size_t chunks = (model->count + ADAM_CHUNK - 1) / ADAM_CHUNK;
    double sum = 0;
#pragma omp parallel for schedule(static)
    for (size_t k = 0; k < chunks; k++) {
        size_t i = k * ADAM_CHUNK, end = k + 1 < chunks ? i + ADAM_CHUNK : model->count;
        float lane[LANES] = {0};
        for (; i + LANES <= end; i += LANES)
            for (int l = 0; l < LANES; l++) lane[l] += model->grads[i + l] * model->grads[i + l];
        double square = 0;
        for (; i < end; i++) square += (double)model->grads[i] * (double)model->grads[i];
        for (int l = 0; l < LANES; l++) square += (double)lane[l];
        model->squares[k] = square;
    }
    for (size_t k = 0; k < chunks; k++) sum += model->squares[k];
    return sqrt(sum);
}

// One AdamW update (Loshchilov & Hutter 2019), t = 1, 2, ...; returns the gradient norm before
// clipping. Padding rows have no gradient and stay zero:
//   m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2
//   p -= lr wd p + lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)
static double adamw_step(Model *model, const Adam *adam, int64_t t) {
    double norm = gradient_norm(model), clip = adam->clip / (norm + CLIP_EPS);
    float scale = adam->clip > 0 && clip < 1 ? (float)clip : 1.0f;
    float b1 = (float)adam->beta1, b2 = (float)adam->beta2, eps = (float)adam->eps;
    float rate = (float)(adam->lr / (1 - pow(adam->beta1, (double)t)));
    float correction = (float)(1 / sqrt(1 - pow(adam->beta2, (double)t)));
    float keep = (float)(1 - adam->lr * adam->weight_decay);
    float new1 = (float)(1 - adam->beta1), new2 = (float)(1 - adam->beta2);
#pragma omp parallel for schedule(static)
    for (size_t first = 0; first < model->count; first += ADAM_CHUNK) {
        size_t n = model->count - first < ADAM_CHUNK ? model->count - first : ADAM_CHUNK;
        float *restrict p = model->params + first, *restrict m = model->m + first;
        float *restrict v = model->v + first;
        const float *restrict g = model->grads + first;
#pragma omp simd
        for (size_t i = 0; i < n; i++) {
            float gi = g[i] * scale;
            m[i] = b1 * m[i] + new1 * gi;
            v[i] = b2 * v[i] + new2 * gi * gi;
            p[i] = keep * p[i] - rate * m[i] / (sqrtf(v[i]) * correction + eps);
        }
    }
    return norm;
}

// Learning rate of update `step` = 0, 1, ...: linear warm-up to the peak, then cosine to 0.
static double learning_rate(double peak, int64_t step, int64_t warmup, int64_t steps) {
    if (step < warmup) return peak * (double)(step + 1) / (double)warmup;
    double done = (double)(step - warmup) / (double)(steps > warmup ? steps - warmup : 1);
    return 0.5 * peak * (1 + cos(3.141592653589793 * done));
}

// ---- metrics of one task; labels that are NaN are left out

typedef struct { float score, label; } Scored;

static int scored_compare(const void *a, const void *b) {
    float x = ((const Scored *)a)->score, y = ((const Scored *)b)->score;
    return (x > y) - (x < y);
}

// The labelled predictions of task y, sorted by score, in fresh memory.
static Scored *scored_sorted(size_t *count, const float *scores, const float *labels, size_t n,
                             size_t Y, size_t y) {
    Scored *list = xmalloc(n, sizeof *list);
    *count = 0;
    for (size_t i = 0; i < n; i++)
        if (!isnan(labels[i * Y + y]))
            list[(*count)++] = (Scored){scores[i * Y + y], labels[i * Y + y]};
    qsort(list, *count, sizeof *list, scored_compare);
    return list;
}

// End of the run of equal scores that begins at i.
static size_t tie_end(const Scored *list, size_t n, size_t i) {
    size_t end = i + 1;
    while (end < n && list[end].score == list[i].score) end++;
    return end;
}

// Area under the ROC curve by the rank sum, tied scores sharing their mean rank; NaN if only one
// class is there. Labels above 0.5 are positive.
static double roc_auc(const Scored *sorted, size_t n) {
    double positives = 0, rank_sum = 0;
    for (size_t i = 0; i < n;) {
        size_t end = tie_end(sorted, n, i);
        double rank = 0.5 * (double)(i + 1 + end);
        for (; i < end; i++) {
            positives += sorted[i].label > 0.5f;
            rank_sum += sorted[i].label > 0.5f ? rank : 0;
        }
    }
    double negatives = (double)n - positives;
    if (positives == 0 || negatives == 0) return (double)NAN;
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives);
}

// Average precision: sum over thresholds of precision * step in recall; NaN without positives.
static double average_precision(const Scored *sorted, size_t n) {
    double total = 0, found = 0, sum = 0;
    for (size_t i = 0; i < n; i++) total += sorted[i].label > 0.5f;
    for (size_t end = n; end > 0;) {  // from the highest score down, ties together
        size_t begin = end - 1;
        while (begin > 0 && sorted[begin - 1].score == sorted[end - 1].score) begin--;
        double before = found;
        for (size_t i = begin; i < end; i++) found += sorted[i].label > 0.5f;
        sum += (found - before) * found / (double)(n - begin);
        end = begin;
    }
    return total > 0 ? sum / total : (double)NAN;
}

enum { METRIC_AUC, METRIC_AP, METRIC_RMSE, METRIC_MAE, METRIC_R2, METRICS };
static const char *const METRIC_NAMES[METRICS] = {"ROC-AUC", "AP", "RMSE", "MAE", "R2"};

// All metrics of task y that make sense for its kind, NaN for the others and where undefined.
// scores (n, Y): logits (in float32 large probabilities are all 1), or predicted values.
static void task_metrics(double metric[METRICS], TaskKind kind, const float *scores,
                         const float *labels, size_t n, size_t Y, size_t y) {
    size_t count;
    Scored *list = scored_sorted(&count, scores, labels, n, Y, y);
    double square = 0, absolute = 0, mean = 0, variance = 0;
    int varied = 0;  // constant labels have a variance too, of rounding
    for (int k = 0; k < METRICS; k++) metric[k] = (double)NAN;
    for (size_t i = 0; i < count; i++) mean += (double)list[i].label / (double)count;
    for (size_t i = 0; i < count; i++) {
        double error = (double)list[i].score - (double)list[i].label;
        varied |= list[i].label != list[0].label;
        square += error * error;
        absolute += fabs(error);
        variance += ((double)list[i].label - mean) * ((double)list[i].label - mean);
    }
    if (kind == TASK_CLASSIFICATION) {
        metric[METRIC_AUC] = roc_auc(list, count);
        metric[METRIC_AP] = average_precision(list, count);
    } else if (count > 0) {
        metric[METRIC_RMSE] = sqrt(square / (double)count);
        metric[METRIC_MAE] = absolute / (double)count;
        metric[METRIC_R2] = varied ? 1 - square / variance : (double)NAN;
    }
    free(list);
}

// Means over the tasks in which a metric is defined; NaN if there is none, and of errors in the
// labels' units, which several tasks need not share.
static void mean_metrics(double mean[METRICS], TaskKind kind, const float *scores,
                         const float *labels, size_t n, size_t Y) {
    double sum[METRICS] = {0}, count[METRICS] = {0}, metric[METRICS];
    for (size_t y = 0; y < Y; y++) {
        task_metrics(metric, kind, scores, labels, n, Y, y);
        for (int k = 0; k < METRICS; k++) {
            if (isnan(metric[k])) continue;
            sum[k] += metric[k];
            count[k] += 1;
        }
    }
    for (int k = 0; k < METRICS; k++) {
        int units = Y > 1 && (k == METRIC_RMSE || k == METRIC_MAE);
        mean[k] = count[k] > 0 && !units ? sum[k] / count[k] : (double)NAN;
    }
}

// Forward and backward pass of one pretraining batch: losses and gradients.
static void pretrain_gradients(double loss[LOSSES], Acts *acts, Model *model, const Batch *batch,
                               const LossWeights *weights, const Dropout *drop,
                               const Draws *draws) {
    memset(model->grads, 0, sizeof(float) * model->table_count);  // the rest is stored, not added
    encoder_forward(acts, model, batch, drop, draws);
    pretrain_heads(loss, acts, model, batch, weights, drop, draws, 1, NULL);
    encoder_backward(acts, model, batch, drop, draws);
}

// The same for a fine-tuning batch; logits (B, Y) are left in `logits`, dlogits is scratch.
static double finetune_gradients(float *logits, float *dlogits, Acts *acts, Model *model,
                                 const Batch *batch, const Task *task, const Dropout *drop,
                                 const Draws *draws) {
    memset(model->grads, 0, sizeof(float) * model->table_count);
    encoder_forward(acts, model, batch, drop, draws);
    task_head_forward(logits, acts, model, batch, task->readout);
    double loss = task_loss(dlogits, logits, batch, task);
    task_head_backward(acts, model, batch, dlogits, task->readout);
    encoder_backward(acts, model, batch, drop, draws);
    return loss;
}

// =================================================================================================
// 10 Tensor files and checkpoints. A checkpoint is a .safetensors file: u64 length of the header, a
//   JSON header {"name": {"dtype", "shape", "data_offsets"}, ..., "__metadata__": {...}}, raw
//   little-endian data. Names and shapes are those of the official model's state dict.
// =================================================================================================

typedef struct {
    char *name;
    char dtype[8];
    int rank;
    size_t shape[4], count;
    const uint8_t *data;  // in the file; count elements
} TensorEntry;

typedef struct {
    const char *path;     // as given
    const uint8_t *bytes;
    size_t size;
    int mapped;
    TensorEntry *entries;
    int count;
    char **meta;          // 2 * meta_count: key, value
    int meta_count;
} TensorFile;

// Reads the JSON header: text between at and end.
typedef struct {
    const char *path, *begin, *at, *end;
} JsonReader;

MB_NORETURN static void json_fail(const JsonReader *r, const char *expected) {
    DIE("%s: damaged tensor file: expected %s at byte %zu of the header", r->path, expected,
        (size_t)(r->at - r->begin));
}

// Is c the next character after white space? Takes it if so.
static int json_take(JsonReader *r, char c) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\n' || *r->at == '\r' || *r->at == '\t'))
        r->at++;
    if (r->at == r->end || *r->at != c) return 0;
    r->at++;
    return 1;
}

static void json_expect(JsonReader *r, char c) {
    char text[4] = {'\'', c, '\'', 0};
    if (!json_take(r, c)) json_fail(r, text);
}

// A string, in fresh memory; \u escapes beyond ASCII become '?'.
static char *json_string(JsonReader *r) {
    json_expect(r, '"');
    size_t n = 0, room = 64;
    char *text = xmalloc(room, 1);
    while (r->at < r->end && *r->at != '"') {
        char c = *r->at++;
        if (c == '\\' && r->at < r->end) {
            static const char from[] = "bfnrt", to[] = "\b\f\n\r\t";
            c = *r->at++;
            const char *known = strchr(from, c);
            if (c == 'u') {
                unsigned code = 0;
                for (int digit = 0; digit < 4; digit++, r->at++) {
                    if (r->at == r->end || !isxdigit((unsigned char)*r->at))
                        json_fail(r, "\\uXXXX");
                    int value = isdigit((unsigned char)*r->at) ? *r->at - '0'
                                                               : tolower(*r->at) - 'a' + 10;
                    code = code * 16 + (unsigned)value;
                }
                c = code > 0 && code < 128 ? (char)code : '?';
            } else if (known && c) {
                c = to[known - from];
            }
        }
        if (n + 1 == room) text = xrealloc(text, room *= 2, 1);
        text[n++] = c;
    }
    text[n] = 0;
    if (r->at == r->end) json_fail(r, "the end of a string");
    r->at++;
    return text;
}

static size_t json_size(JsonReader *r) {
    json_take(r, ' ');
    size_t value = 0;
    const char *first = r->at;
    for (; r->at < r->end && *r->at >= '0' && *r->at <= '9'; r->at++) {
        if (value > SIZE_MAX / 10 - 1) json_fail(r, "a smaller number");
        value = value * 10 + (size_t)(*r->at - '0');
    }
    if (r->at == first) json_fail(r, "a number");
    return value;
}

// [a, b, ...] into values; returns how many, at most max.
static int json_sizes(JsonReader *r, size_t *values, int max) {
    int n = 0;
    json_expect(r, '[');
    if (json_take(r, ']')) return 0;
    do {
        if (n == max) json_fail(r, "a shorter list");
        values[n++] = json_size(r);
    } while (json_take(r, ','));
    json_expect(r, ']');
    return n;
}

// Bytes of an element, 0 if the type is unknown.
static size_t dtype_size(const char *dtype) {
    static const struct { const char *name; size_t size; } types[] = {
        {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8}, {"I32", 4},
        {"I16", 2}, {"I8", 1}, {"U8", 1}, {"BOOL", 1}};
    for (size_t k = 0; k < sizeof types / sizeof types[0]; k++)
        if (strcmp(dtype, types[k].name) == 0) return types[k].size;
    return 0;
}

// {"dtype": ..., "shape": [...], "data_offsets": [begin, end]} of the tensor t.
static void json_tensor(JsonReader *r, TensorEntry *t, const uint8_t *data, size_t data_size) {
    size_t range[2] = {1, 0};
    json_expect(r, '{');
    do {
        char *key = json_string(r);
        json_expect(r, ':');
        if (strcmp(key, "dtype") == 0) {
            char *dtype = json_string(r);
            snprintf(t->dtype, sizeof t->dtype, "%.7s", dtype);
            free(dtype);
        } else if (strcmp(key, "shape") == 0) {
            t->rank = json_sizes(r, t->shape, 4);
        } else if (strcmp(key, "data_offsets") == 0) {
            if (json_sizes(r, range, 2) != 2) json_fail(r, "two offsets");
        } else {
            json_fail(r, "dtype, shape or data_offsets");
        }
        free(key);
    } while (json_take(r, ','));
    json_expect(r, '}');
    t->count = 1;
    for (int k = 0; k < t->rank; k++) t->count = mul_size(t->count, t->shape[k]);
    size_t size = dtype_size(t->dtype);
    CHECK(size, "%s: tensor %s: unknown type \"%s\"", r->path, t->name, t->dtype);
    CHECK(range[0] <= range[1] && range[1] <= data_size &&
              range[1] - range[0] == mul_size(t->count, size),
          "%s: damaged tensor file: the data of %s does not fit its shape or the file", r->path,
          t->name);
    t->data = data + range[0];
}

// {"key": "value", ...}
static void json_metadata(JsonReader *r, TensorFile *f) {
    json_expect(r, '{');
    if (json_take(r, '}')) return;
    do {
        if ((f->meta_count & (f->meta_count - 1)) == 0)
            f->meta = xrealloc(f->meta, 2 * (2 * (size_t)f->meta_count + 1), sizeof *f->meta);
        f->meta[2 * f->meta_count] = json_string(r);
        json_expect(r, ':');
        f->meta[2 * f->meta_count + 1] = json_string(r);
        f->meta_count++;
    } while (json_take(r, ','));
    json_expect(r, '}');
}

// Opens a .safetensors file; dies with the reason if it is not one. Call tensor_file_close().
static void tensor_file_open(TensorFile *f, const char *path) {
    *f = (TensorFile){.path = path};
    f->bytes = file_bytes(path, &f->size, &f->mapped);
    uint64_t length = f->size >= 8 ? get_u64(f->bytes) : UINT64_MAX;
    CHECK(length <= f->size - 8, "%s: not a .safetensors file (the header does not fit)", path);
    const char *text = (const char *)f->bytes + 8;
    JsonReader r = {path, text, text, text + length};
    const uint8_t *data = f->bytes + 8 + length;
    json_expect(&r, '{');
    do {
        char *name = json_string(&r);
        json_expect(&r, ':');
        if (strcmp(name, "__metadata__") == 0) {
            free(name);
            json_metadata(&r, f);
            continue;
        }
        if ((f->count & (f->count - 1)) == 0)  // full at every power of two
            f->entries = xrealloc(f->entries, 2 * (size_t)f->count + 1, sizeof *f->entries);
        f->entries[f->count] = (TensorEntry){.name = name};
        json_tensor(&r, &f->entries[f->count++], data, f->size - 8 - (size_t)length);
    } while (json_take(&r, ','));
    json_expect(&r, '}');
}

static void tensor_file_close(TensorFile *f) {
    for (int k = 0; k < f->count; k++) free(f->entries[k].name);
    for (int k = 0; k < 2 * f->meta_count; k++) free(f->meta[k]);
    free(f->entries);
    free(f->meta);
    file_release(f->bytes, f->size, f->mapped);
    *f = (TensorFile){0};
}

// The tensor of this name, or NULL.
static const TensorEntry *tensor_find(const TensorFile *f, const char *name) {
    for (int k = 0; k < f->count; k++)
        if (strcmp(f->entries[k].name, name) == 0) return &f->entries[k];
    return NULL;
}

// Element k of a tensor of floating-point numbers, as float32.
static float tensor_value(const TensorEntry *t, size_t k) {
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
static const char *tensor_meta(const TensorFile *f, const char *key) {
    for (int k = 0; k < f->meta_count; k++)
        if (strcmp(f->meta[2 * k], key) == 0) return f->meta[2 * k + 1];
    return NULL;
}

// The tensor with this official name, behind `prefix` and with or without the module names that
// stand in front of it in a state dict; NULL if there is none.
static const TensorEntry *tensor_find_official(const TensorFile *f, const char *prefix,
                                               const char *official) {
    static const char *const wrappers[] = {"", "model.", "module."};  // of training frameworks
    static const char *const modules[] = {"encoder.molecule_encoder.", "encoder.",
                                          "molecule_encoder.", ""};
    for (int k = 0; k < 12; k++) {
        char name[256];
        snprintf(name, sizeof name, "%s%s%s%s", prefix, wrappers[k / 4], modules[k % 4], official);
        const TensorEntry *t = tensor_find(f, name);
        if (t) return t;
    }
    return NULL;
}

// ---- writing

typedef struct { char *text; size_t length, room; } Text;

MB_PRINTF(2, 3) static void text_add(Text *t, const char *fmt, ...) {
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    size_t n = (size_t)vsnprintf(NULL, 0, fmt, args);
    va_end(args);
    if (t->length + n + 1 > t->room)
        t->text = xrealloc(t->text, t->room = 2 * (t->length + n + 1), 1);
    vsnprintf(t->text + t->length, n + 1, fmt, again);
    va_end(again);
    t->length += n;
}

// "key": "value", with what JSON needs escaped.
static void text_add_meta(Text *t, const char *key, const char *value) {
    text_add(t, "%s\"%s\":\"", t->text[t->length - 1] == '{' ? "" : ",", key);
    for (; *value; value++) {
        if (*value == '"' || *value == '\\')
            text_add(t, "\\%c", *value);
        else if ((unsigned char)*value < 32)
            text_add(t, "\\u%04x", (unsigned)*value);
        else
            text_add(t, "%c", *value);
    }
    text_add(t, "\"");
}

// Arenas to be written, each under its prefix: parameters, and Adam's moments.
typedef struct { const char *prefix; const float *arena; } ArenaName;

// A matrix to be written beside them.
typedef struct { const char *name; size_t rows, columns; const float *data; } ExtraTensor;

static void write_floats(OutFile *out, const float *x, size_t count) {
    uint8_t chunk[4096];
    for (size_t i = 0; i < count; i += 1024) {
        size_t n = count - i < 1024 ? count - i : 1024;
        for (size_t k = 0; k < n; k++) put_f32(chunk + 4 * k, x[i + k]);
        out_write(out, chunk, 4 * n);
    }
}

// Writes arenas of a model's layout as one tensor file, and one more matrix (or NULL). meta: JSON
// text of the metadata.
static void tensor_file_write(const char *path, const Model *model, const ArenaName *arenas,
                              int n_arenas, const ExtraTensor *extra, const char *meta) {
    Text head = {0};
    text_add(&head, "{\"__metadata__\":%s", meta);
    size_t offset = 0;
    for (int s = 0; s < n_arenas; s++) {
        for (int i = 0; i < model->n_tensors; i++) {
            const TensorInfo *t = &model->info[i];
            char name[128];
            const char *module =
                strstr(t->pattern, "proj_out.") ? "encoder." : "encoder.molecule_encoder.";
            text_add(&head, ",\"%s%s%s\":{\"dtype\":\"F32\",\"shape\":[", arenas[s].prefix, module,
                     tensor_name(t, name));
            if (t->rows) text_add(&head, "%zu,", t->rows);
            text_add(&head, "%zu],\"data_offsets\":[%zu,%zu]}", t->columns, offset,
                     offset + 4 * t->count);
            offset += 4 * t->count;
        }
    }
    if (extra)
        text_add(&head,
                 ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%zu,%zu],\"data_offsets\":[%zu,%zu]}",
                 extra->name, extra->rows, extra->columns, offset,
                 offset + 4 * extra->rows * extra->columns);
    text_add(&head, "}");
    while (head.length % 8) text_add(&head, " ");
    OutFile out;
    uint8_t length[8];
    out_open(&out, path);
    put_u64(length, head.length);
    out_write(&out, length, 8);
    out_write(&out, head.text, head.length);
    for (int s = 0; s < n_arenas; s++) write_floats(&out, arenas[s].arena, model->count);
    if (extra) write_floats(&out, extra->data, extra->rows * extra->columns);
    out_commit(&out);
    free(head.text);
}

// ---- reading a model

// One dimension of a tensor that a model must have.
static int tensor_dimension(const TensorFile *f, const char *prefix, const char *official,
                            int axis) {
    const TensorEntry *t = tensor_find_official(f, prefix, official);
    CHECK(t, "%s: not a MoleBLEND model: expected a tensor %s", f->path, official);
    CHECK(t->rank == 2 && t->shape[axis] >= 1 && t->shape[axis] <= 1 << 20,
          "%s: tensor %s: expected a matrix of sensible size", f->path, official);
    return (int)t->shape[axis];
}

// The sizes of the model in a file, from the shapes of its tensors.
static Config tensor_file_config(const TensorFile *f, const char *prefix) {
    Config c = {0};
    char name[64];
    c.dim = tensor_dimension(f, prefix, "atom_feature.atom_encoder.weight", 1);
    c.heads = tensor_dimension(f, prefix, "molecule_attn_bias.spatial_pos_encoder.weight", 1);
    c.ffn = tensor_dimension(f, prefix, "layers.0.fc1.weight", 0);
    c.kernels = 1;
    if (tensor_find_official(f, prefix, "molecule_3d_bias.gbf.means.weight"))
        c.kernels = tensor_dimension(f, prefix, "molecule_3d_bias.gbf.means.weight", 1);
    do {
        snprintf(name, sizeof name, "layers.%d.fc1.weight", ++c.layers);
    } while (c.layers < MAX_LAYERS && tensor_find_official(f, prefix, name));
    if (tensor_find_official(f, prefix, "proj_out.out_proj.weight"))
        c.tasks = tensor_dimension(f, prefix, "proj_out.out_proj.weight", 0);
    config_check(c);
    return c;
}

// Copies one tensor of a file into an arena of the model's layout. Returns 0 if the file has none
// of that name; dies if it has another shape or type.
static int tensor_load(float *arena, const TensorInfo *info, const TensorFile *f,
                       const char *prefix) {
    char name[128];
    const TensorEntry *t = tensor_find_official(f, prefix, tensor_name(info, name));
    if (!t) return 0;
    CHECK(strchr(t->dtype, 'F'), "%s: tensor %s: expected type F32, F16, BF16 or F64, found %s",
          f->path, name, t->dtype);
    size_t rows = t->rank == 2 ? t->shape[0] : 0, columns = t->rank ? t->shape[t->rank - 1] : 1;
    CHECK(t->rank == (info->rows ? 2 : 1) && rows == info->rows && columns == info->columns,
          "%s: tensor %s: expected shape (%zu, %zu), found rank %d (%zu, %zu)", f->path, name,
          info->rows, info->columns, t->rank, rows, columns);
    for (size_t k = 0; k < t->count; k++) arena[info->offset + k] = tensor_value(t, k);
    return 1;
}

// Copies all tensors of a model from a file; dies if one is missing.
static void model_load(const Model *model, float *arena, const TensorFile *f, const char *prefix) {
    char name[128];
    for (int i = 0; i < model->n_tensors; i++)
        CHECK(tensor_load(arena, &model->info[i], f, prefix), "%s: tensor %s%s is missing", f->path,
              prefix, tensor_name(&model->info[i], name));
}

#ifndef MOLEBLEND_TEST

// =================================================================================================
// 11 Training and evaluation
// =================================================================================================

enum { DEFAULT_BATCH = 64 };

// What the command line sets; the initial values are the defaults. The only global state.
typedef struct {
    const char *size, *output, *valid, *test, *init, *model, *task, *readout, *modality;
    int64_t layers, dim, ffn, heads, kernels;  // 0: from `size`
    int64_t steps, batch, warmup, seed, threads, save_every, epochs, patience, seeds;
    const char *loss_units;
    int resume, help;
    Blend blend;
    LossWeights weights;
    Dropout drop;
    Adam adam;
} Options;

static Options opt = {  // the defaults of size, batch, task, readout and modality depend on files
    .steps = 900,
    .loss_units = "deviations",
    .warmup = -1,
    .seed = 1,
    .save_every = 500,
    .epochs = 40,
    .seeds = 1,
    .blend = {0.2, 0.2, 0.6, 0.4, 0.6, 0.2, 0},
    .weights = {{0, 6, 0.1, 0.1, 0.5}},
    .drop = {0.1, 0.1, 0.1, 0},
    .adam = {1e-3, 0.9, 0.999, 1e-8, 0, 5},  // a fine-tuning run begins with lr 2e-4
};

// The sizes that the options ask for, a named one (base: the paper's) and its replacements; with
// `file` those of a checkpoint at this path, which the options may only repeat.
static Config options_config(const Config *file, const char *path) {
    static const struct { const char *name; Config config; } sizes[] = {
        {"tiny", {2, 64, 64, 4, 16, 0}},
        {"small", {6, 256, 256, 8, 64, 0}},
        {"base", {12, 768, 768, 32, 128, 0}}};
    const char *size = opt.size ? opt.size : "small";
    for (size_t k = 0; k < 3; k++) {
        if (strcmp(size, sizes[k].name)) continue;
        Config c = file && !opt.size ? *file : sizes[k].config;
        int *const number[5] = {&c.layers, &c.dim, &c.ffn, &c.heads, &c.kernels};
        const int64_t asked[5] = {opt.layers, opt.dim, opt.ffn, opt.heads, opt.kernels};
        for (int n = 0; n < 5; n++)
            if (asked[n]) *number[n] = (int)asked[n];
        CHECK(!file || (c.layers == file->layers && c.dim == file->dim && c.ffn == file->ffn &&
                        c.heads == file->heads && c.kernels == file->kernels),
              "%s: has --layers %d --dim %d --ffn %d --heads %d --kernels %d; leave out the size "
              "options that say otherwise", path, file->layers, file->dim, file->ffn, file->heads,
              file->kernels);
        return c;
    }
    DIE("--size: expected tiny, small or base, found \"%s\"", size);
}

// The sizes of a model to train: see above, from --init if it is given.
static Config start_config(void) {
    if (!opt.init) return options_config(NULL, NULL);
    TensorFile f;
    tensor_file_open(&f, opt.init);
    Config c = tensor_file_config(&f, "");
    tensor_file_close(&f);
    c.tasks = 0;  // its head is not taken over
    return options_config(&c, opt.init);
}

// The batch size to train with: 64, or all molecules of a smaller set.
static void batch_size_set(const Dataset *train) {
    int64_t n = (int64_t)train->count;
    CHECK(opt.batch <= n, "--batch-size: %lld is more than the %lld molecules of %s",
          (long long)opt.batch, (long long)n, train->path);
    if (!opt.batch) opt.batch = n < DEFAULT_BATCH ? n : DEFAULT_BATCH;
}

// Columns of the training log, one row a step.
enum { LOG_LR = LOSSES, LOG_NORM, LOG_RATE, LOG_COLUMNS };

// A pretraining run.
typedef struct {
    Dataset train, valid;
    int has_valid;
    Model model;
    Acts acts;
    Batch batch;
    Sizes room;
    uint32_t *order;       // permutation of the training set in the epoch `epoch`
    int64_t epoch;
    uint32_t *ids;         // molecules of the current batch
    int64_t step, warmup;  // updates done
    float *log;            // (steps, LOG_COLUMNS)
    char *state_path, *log_path;
    OutFile lock;          // held from start to end: two runs may not write the same files
} Run;

// Makes activations and batch large enough for `need`; memory only grows.
static void run_reserve(Run *run, Sizes need, int n_tasks) {
    if (need.B <= run->room.B && need.T <= run->room.T && need.A <= run->room.A &&
        need.P <= run->room.P && need.W <= run->room.W && need.N <= run->room.N && run->acts.memory)
        return;
    acts_free(&run->acts);
    batch_free(&run->batch);
    run->room = sizes_max(run->room, need);
    acts_alloc(&run->acts, run->model.config, run->room);
    batch_alloc(&run->batch, run->room, n_tasks);
}

static Sizes ids_sizes(const Dataset *data, const uint32_t *ids, size_t B) {
    Sizes s = {0};
    for (size_t b = 0; b < B; b++) sizes_add(&s, dataset_atoms(data, ids[b]));
    return s;
}

// Loads molecules ids[0..B) of a dataset into the run's batch; see batch_load().
static void run_batch(Run *run, const Dataset *data, const uint32_t *ids, size_t B,
                      const Blend *blend, int use, const Draws *draws) {
    threads_adapt();
    run_reserve(run, ids_sizes(data, ids, B), run->model.config.tasks > 0 ? data->n_tasks : 0);
    batch_load(&run->batch, data, ids, B, blend, use, draws);
}

// Loads the next molecules from `first` on, at most a batch, as they are for an encoder without
// dropout; returns how many.
static size_t run_next(Run *run, const Dataset *data, size_t first, const Blend *blend, int use,
                       const Draws *draws) {
    size_t B = data->count - first < (size_t)opt.batch ? data->count - first : (size_t)opt.batch;
    for (size_t b = 0; b < B; b++) run->ids[b] = (uint32_t)(first + b);
    run_batch(run, data, run->ids, B, blend, use, draws);
    return B;
}

// The molecules of update `step`: sample step * batch + k is entry (sample mod n) of the
// permutation of its epoch, so batches run across the ends of epochs and any step can be entered at
// once.
static void run_ids(Run *run, int64_t step) {
    int64_t n = (int64_t)run->train.count;
    for (int64_t k = 0; k < opt.batch; k++) {
        int64_t sample = step * opt.batch + k, epoch = sample / n;
        if (epoch != run->epoch) {
            rng_permutation(run->order, run->train.count, (uint64_t)opt.seed, RNG_SHUFFLE,
                            (uint32_t)epoch);
            run->epoch = epoch;
        }
        run->ids[k] = run->order[sample % n];
    }
}

// Memory for the largest batch of the first epoch, before the first step.
static void run_plan(Run *run) {
    Sizes need = {0};
    int64_t epoch_steps = (int64_t)run->train.count / opt.batch + 1;
    for (int64_t step = run->step; step < opt.steps && step < run->step + epoch_steps; step++) {
        run_ids(run, step);
        need = sizes_max(need, ids_sizes(&run->train, run->ids, (size_t)opt.batch));
    }
    run_reserve(run, need, 0);
}

// Mean losses over a dataset, without dropout. Blend and noise of molecule i depend only on the
// seed and i, so values can be compared over time and between runs.
static void evaluate_pretraining(double mean[LOSSES], Run *run, const Dataset *data) {
    double sum[LOSSES] = {0}, count[LOSSES] = {0}, loss[LOSSES];
    for (size_t i = 0; i < data->count; i += (size_t)opt.batch) {
        Draws draws = {(uint64_t)opt.seed, UINT32_MAX, (uint32_t)i, 0};
        run_next(run, data, i, &opt.blend, 0, &draws);
        encoder_forward(&run->acts, &run->model, &run->batch, &opt.drop, &draws);
        pretrain_heads(loss, &run->acts, &run->model, &run->batch, &opt.weights, &opt.drop, &draws,
                       0, NULL);
        const double n[LOSSES] = {0, (double)run->batch.noise_count, (double)run->batch.spd_count,
                                  (double)run->batch.edge_count, (double)run->batch.d3_count};
        for (int k = 1; k < LOSSES; k++) {
            sum[k] += n[k] * loss[k];
            count[k] += n[k];
        }
    }
    mean[LOSS_TOTAL] = 0;
    for (int k = 1; k < LOSSES; k++) {
        mean[k] = count[k] > 0 ? sum[k] / count[k] : 0;
        mean[LOSS_TOTAL] += opt.weights.weight[k] * mean[k];
    }
}

// How often each class occurs in (at most 4096 molecules of) a dataset: SPD classes, then those of
// the path slots, slot by slot.
static void class_counts(double counts[SPD_CLASSES + EDGE_OUTPUTS], Run *run, const Dataset *data) {
    Draws draws = {0};
    for (int k = 0; k < SPD_CLASSES + EDGE_OUTPUTS; k++) counts[k] = 0;
    for (uint32_t i = 0; i < data->count && i < 4096; i++) {
        run_batch(run, data, &i, 1, NULL, USE_SPD, &draws);
        for (size_t p = 0; p < run->batch.P; p++) {
            int class = spd_class(run->batch.spd[p]);
            if (class >= 0) counts[class] += 1;
            for (int t = 0; t < PATH_BONDS; t++) {
                class = edge_class(run->batch.path[p * PATH_BONDS + (size_t)t]);
                if (class >= 0) counts[SPD_CLASSES + t * EDGE_CLASSES + class] += 1;
            }
        }
    }
}

// What a predictor without knowledge scores on `data`: for SPD and edges one that knows the class
// frequencies of the training set (and the slot), 1 for the cosine losses (a random direction).
static void chance_losses(double chance[LOSSES], Run *run, const Dataset *data) {
    double known[SPD_CLASSES + EDGE_OUTPUTS], seen[SPD_CLASSES + EDGE_OUTPUTS];
    double sum[2] = {0}, count[2] = {0};
    class_counts(known, run, &run->train);
    class_counts(seen, run, data);
    for (int g = 0; g <= PATH_BONDS; g++) {  // group 0: SPD, then a slot each
        int first = g ? SPD_CLASSES + (g - 1) * EDGE_CLASSES : 0,
            n = g ? EDGE_CLASSES : SPD_CLASSES;
        double total = 0;
        for (int k = first; k < first + n; k++)
            total += known[k] + 1;  // + 1: unseen is not impossible
        for (int k = first; k < first + n; k++) {
            sum[g > 0] -= seen[k] * log((known[k] + 1) / total);
            count[g > 0] += seen[k];
        }
    }
    chance[LOSS_NOISE] = chance[LOSS_3D] = 1;
    chance[LOSS_SPD] = count[0] > 0 ? sum[0] / count[0] : 0;
    chance[LOSS_EDGE] = count[1] > 0 ? sum[1] / count[1] : 0;
    chance[LOSS_TOTAL] = 0;
    for (int k = 1; k < LOSSES; k++) chance[LOSS_TOTAL] += opt.weights.weight[k] * chance[k];
}

// Dies if a number is not finite, naming the first tensor that holds one.
static void check_finite(const Model *model, double value, int64_t step) {
    if (isfinite(value)) return;
    char name[128] = "none";
    for (int i = 0; i < model->n_tensors; i++) {
        const TensorInfo *t = &model->info[i];
        for (size_t k = t->offset; k < t->offset + t->count; k++) {
            if (isfinite(model->grads[k]) && isfinite(model->params[k])) continue;
            DIE("step %lld: the loss is no longer a number; first bad tensor: %s. Try a lower --lr",
                (long long)step, tensor_name(t, name));
        }
    }
    DIE("step %lld: the loss is no longer a number. Try a lower --lr", (long long)step);
}

// ---- saving and resuming

// Everything that shapes the trajectory of a run, as text: a run can only be resumed with the same.
static char *run_description(const Run *run) {
    Text t = {0};
    Config c = run->model.config;
    text_add(&t, "layers %d dim %d ffn %d heads %d kernels %d", c.layers, c.dim, c.ffn, c.heads,
             c.kernels);
    text_add(&t, " molecules %zu data %08x steps %lld batch %lld warmup %lld seed %lld",
             run->train.count, (unsigned)dataset_fingerprint(&run->train), (long long)opt.steps,
             (long long)opt.batch, (long long)run->warmup, (long long)opt.seed);
    text_add(&t, " lr %g betas %g %g eps %g decay %g clip %g", opt.adam.lr, opt.adam.beta1,
             opt.adam.beta2, opt.adam.eps, opt.adam.weight_decay, opt.adam.clip);
    text_add(&t, " dropout %g %g %g %g", opt.drop.attention, opt.drop.activation, opt.drop.path,
             opt.drop.embedding);
    text_add(&t, " blend %g %g %g %g %g %d noise %g", opt.blend.pair_spd, opt.blend.pair_edge,
             opt.blend.pair_3d, opt.blend.atom_2d, opt.blend.atom_3d, opt.blend.all,
             opt.blend.noise);
    text_add(&t, " weights %g %g %g %g", opt.weights.weight[1], opt.weights.weight[2],
             opt.weights.weight[3], opt.weights.weight[4]);
    return t.text;
}

// Metadata of a checkpoint.
static char *run_meta(const Run *run) {
    Text t = {0};
    char number[32], *run_text = run_description(run);
    Config c = run->model.config;
    const struct { const char *key; long long value; } numbers[] = {
        {"layers", c.layers}, {"dim", c.dim}, {"ffn", c.ffn}, {"heads", c.heads},
        {"kernels", c.kernels}, {"step", run->step}};
    text_add(&t, "{");
    text_add_meta(&t, "format", "pt");
    for (size_t k = 0; k < sizeof numbers / sizeof numbers[0]; k++) {
        snprintf(number, sizeof number, "%lld", numbers[k].value);
        text_add_meta(&t, numbers[k].key, number);
    }
    text_add_meta(&t, "run", run_text);
    text_add(&t, "}");
    free(run_text);
    return t.text;
}

// The training log as CSV.
static void log_write(const Run *run) {
    OutFile out;
    out_open(&out, run->log_path);
    Text t = {0};
    text_add(&t, "step");
    for (int k = 0; k < LOSSES; k++) text_add(&t, ",%s", LOSS_NAMES[k]);
    text_add(&t, ",lr,gradient_norm,molecules_per_second\n");
    for (int64_t s = 0; s < run->step; s++) {
        const float *row = run->log + s * LOG_COLUMNS;
        text_add(&t, "%lld", (long long)s + 1);
        for (int k = 0; k < LOG_COLUMNS; k++) text_add(&t, ",%.6g", (double)row[k]);
        text_add(&t, "\n");
    }
    out_write(&out, t.text, t.length);
    out_commit(&out);
    free(t.text);
}

// Writes the checkpoint, the state for --resume (parameters again, both moments, the log), and the
// log. The state is complete in itself: a run killed between two renames resumes from it.
static void run_save(const Run *run) {
    char *meta = run_meta(run);
    const ArenaName model = {"", run->model.params};
    const ArenaName state[] = {{"", run->model.params}, {"exp_avg.", run->model.m},
                               {"exp_avg_sq.", run->model.v}};
    const ExtraTensor log = {"log", (size_t)run->step, LOG_COLUMNS, run->log};
    tensor_file_write(run->state_path, &run->model, state, 3, &log, meta);
    tensor_file_write(opt.output, &run->model, &model, 1, NULL, meta);
    log_write(run);
    free(meta);
}

// Continues the run whose state file is there.
static void run_load(Run *run) {
    TensorFile f;
    tensor_file_open(&f, run->state_path);
    char *now = run_description(run);
    const char *then = tensor_meta(&f, "run"), *step = tensor_meta(&f, "step");
    CHECK(then && step, "%s: not the state of a run (no metadata)", run->state_path);
    CHECK(strcmp(now, then) == 0,
          "%s: --resume needs the same data and options; expected \"%s\", found \"%s\"",
          run->state_path, then, now);
    free(now);
    run->step = strtoll(step, NULL, 10);
    const TensorEntry *log = tensor_find(&f, "log");
    CHECK(run->step >= 0 && run->step <= opt.steps && log && strcmp(log->dtype, "F32") == 0 &&
              log->count == (size_t)run->step * LOG_COLUMNS,
          "%s: damaged state (the log does not fit step %s)", run->state_path, step);
    model_load(&run->model, run->model.params, &f, "");
    model_load(&run->model, run->model.m, &f, "exp_avg.");
    model_load(&run->model, run->model.v, &f, "exp_avg_sq.");
    for (size_t k = 0; k < log->count; k++) run->log[k] = get_f32(log->data + 4 * k);
    tensor_file_close(&f);
}

// ---- pretraining

// One update; fills the step's row of the log.
static void run_step(Run *run) {
    double start = now_seconds(), loss[LOSSES];
    Draws draws = {(uint64_t)opt.seed, (uint32_t)run->step, 0, 1};
    Adam adam = opt.adam;
    adam.lr = learning_rate(opt.adam.lr, run->step, run->warmup, opt.steps);
    run_ids(run, run->step);
    run_batch(run, &run->train, run->ids, (size_t)opt.batch, &opt.blend, 0, &draws);
    pretrain_gradients(loss, &run->acts, &run->model, &run->batch, &opt.weights, &opt.drop, &draws);
    check_finite(&run->model, loss[LOSS_TOTAL], run->step + 1);
    double norm = adamw_step(&run->model, &adam, run->step + 1);
    check_finite(&run->model, norm, run->step + 1);
    float *row = run->log + run->step * LOG_COLUMNS;
    for (int k = 0; k < LOSSES; k++) row[k] = (float)loss[k];
    row[LOG_LR] = (float)adam.lr;
    row[LOG_NORM] = (float)norm;
    row[LOG_RATE] = (float)((double)opt.batch / (now_seconds() - start));
    run->step++;
}

// Mean of the log's rows first..last-1.
static void log_mean(double mean[LOG_COLUMNS], const Run *run, int64_t first, int64_t last) {
    for (int k = 0; k < LOG_COLUMNS; k++) {
        mean[k] = 0;
        for (int64_t s = first; s < last; s++)
            mean[k] += (double)run->log[s * LOG_COLUMNS + k] / (double)(last - first);
    }
}

// Finds out now, not after hours of work, whether the output can be written, and claims it.
static void run_lock(Run *run) {
    out_probe(opt.output);
    char *path = xprintf("%s.run", opt.output);
    out_open(&run->lock, path);
    free(path);
}

// Opens the data, makes or loads the model, plans the memory, and says what will be done.
static void run_open(Run *run, const char *train_path) {
    dataset_open(&run->train, train_path);
    CHECK(run->train.count > 0, "%s: the dataset is empty", train_path);
    batch_size_set(&run->train);
    if (opt.valid) dataset_open(&run->valid, opt.valid);
    run->has_valid = opt.valid && run->valid.count > 0;
    run->warmup = opt.warmup >= 0 ? opt.warmup : opt.steps / 20 + 1;
    run->epoch = -1;
    run->order = xmalloc(run->train.count, sizeof *run->order);
    run->ids = xmalloc((size_t)opt.batch, sizeof *run->ids);
    run->log = xmalloc((size_t)opt.steps, LOG_COLUMNS * sizeof *run->log);
    run->state_path = xprintf("%s.state", opt.output);
    size_t stem = strlen(opt.output);
    if (stem > 12 && strcmp(opt.output + stem - 12, ".safetensors") == 0) stem -= 12;
    run->log_path = xprintf("%.*s.log.csv", (int)stem, opt.output);
    run_lock(run);
    out_probe(run->state_path);
    out_probe(run->log_path);
    model_create(&run->model, start_config(), 1);
    model_init(&run->model, (uint64_t)opt.seed);
    FILE *state = opt.resume ? fopen(run->state_path, "rb") : NULL;
    if (state) {
        fclose(state);
        run_load(run);
    } else if (opt.init) {
        TensorFile f;
        tensor_file_open(&f, opt.init);
        model_load(&run->model, run->model.params, &f, "");
        tensor_file_close(&f);
    }
    run_plan(run);
    Config c = run->model.config;
    fprintf(
        stderr,
        "model   %d layers, %d wide, ffn %d, %d heads, %d kernels: %.2f M parameters, seed %lld\n"
        "data    %s: %zu molecules; %s: %zu\n"
        "memory  %.0f MiB parameters, gradients and moments, %.0f MiB activations\n"
        "run     %lld steps of %lld molecules (%.1f epochs) on %d thread%s%s\n",
        c.layers, c.dim, c.ffn, c.heads, c.kernels, (double)run->model.count / 1e6,
        (long long)opt.seed, train_path, run->train.count, opt.valid ? opt.valid : "no validation",
        run->valid.count, 16.0 * (double)run->model.count / (1 << 20),
        (double)run->acts.memory_bytes / (1 << 20), (long long)opt.steps, (long long)opt.batch,
        (double)opt.steps * (double)opt.batch / (double)run->train.count, thread_count(),
        thread_count() > 1 ? "s" : "",
#ifdef _OPENMP
        ""
#else
        " (built without OpenMP)"
#endif
    );
    if (state) fprintf(stderr, "resumed after step %lld\n", (long long)run->step);
    if (opt.resume && !state)
        fprintf(stderr, "resume  nothing is saved in %s: this run starts afresh\n",
                run->state_path);
}

// Frees whatever of a run has been opened.
static void run_close(Run *run) {
    if (run->lock.file) out_discard(&run->lock);
    dataset_close(&run->train);
    dataset_close(&run->valid);
    model_free(&run->model);
    acts_free(&run->acts);
    batch_free(&run->batch);
    free(run->order);
    free(run->ids);
    free(run->log);
    free(run->state_path);
    free(run->log_path);
}

// The result: each loss at the start and the end, on the validation set, and by chance.
static void run_report(Run *run) {
    double start[LOG_COLUMNS], end[LOG_COLUMNS], valid[LOSSES] = {0}, chance[LOSSES];
    int64_t window = opt.steps / 50 + 1;
    log_mean(start, run, 0, min_int(1, (int)run->step));
    log_mean(end, run, run->step > window ? run->step - window : 0, run->step);
    if (run->has_valid) evaluate_pretraining(valid, run, &run->valid);
    chance_losses(chance, run, run->has_valid ? &run->valid : &run->train);
    printf("\nloss        start     end   valid  by chance\n");
    for (int k = 1; k <= LOSSES; k++) {
        int loss = k % LOSSES;  // the total last
        char shown[16] = "-";
        if (run->has_valid) snprintf(shown, sizeof shown, "%.4f", valid[loss]);
        printf("%-8s %8.4f%8.4f%8s%11.4f\n", LOSS_NAMES[loss], start[loss], end[loss], shown,
               chance[loss]);
    }
    printf("wrote %s, %s\n", opt.output, run->log_path);
}

// One line a twentieth of the way, on stdout.
static void run_print(const Run *run, Progress *progress) {
    int64_t every = opt.steps / 20 > 0 ? opt.steps / 20 : 1, s = run->step;
    if (s != 1 && s % every && s != opt.steps) return;
    double mean[LOG_COLUMNS];
    log_mean(mean, run, s == 1 ? 0 : s - (s % every ? s % every : every), s);
    if (progress->terminal) fprintf(stderr, "\r\033[K");
    printf("%7lld  %7.4f  %7.4f %7.4f %7.4f %7.4f  %8.2e %8.3f %7.0f\n", (long long)s,
           mean[LOSS_TOTAL], mean[LOSS_NOISE], mean[LOSS_SPD], mean[LOSS_EDGE], mean[LOSS_3D],
           mean[LOG_LR], mean[LOG_NORM], mean[LOG_RATE]);
    fflush(stdout);
}

// ---- fine-tuning (paper 4): no noise, no blend; the epoch best on the validation set is kept

static const char *const READOUT_NAMES[] = {"cls", "mean", "sum"};
static const char *const KIND_NAMES[] = {"classification", "regression"};
static const char *const MODALITY_NAMES[] = {"2d", "3d", "both"};
static const int MODALITY_USE[] = {USE_SPD | USE_EDGE, USE_3D, USE_SPD | USE_EDGE | USE_3D};

static const char *const UNIT_NAMES[] = {"deviations", "labels"};
// Pretraining gives the graph token, cls, which the release reads, no loss: hence the mean.
static const char *const DEFAULT_READOUT = "mean", *const DEFAULT_MODALITY = "2d";

// Index of `text` among n names, or the end of the program.
static int name_index(const char *option, const char *text, const char *const *names, int n) {
    for (int k = 0; k < n; k++)
        if (strcmp(text, names[k]) == 0) return k;
    DIE("%s: expected %s, %s%s%s, found \"%s\"", option, names[0], names[1], n > 2 ? " or " : "",
        n > 2 ? names[2] : "", text);
}

typedef struct {
    Run run;              // model, buffers, training and validation set
    Dataset test;
    int has_test;
    Task task;
    float *mean, *std;    // (Y)
    float *best;          // parameters of the best epoch
    int64_t best_epoch;
    double best_metric;
} Finetune;

// The kind of the labels, recognised by their values if --task does not say; and their mean and
// standard deviation, task by task (1 where all are equal). Dies where there is nothing to learn.
static void label_statistics(Finetune *ft) {
    const Dataset *data = &ft->run.train;
    size_t Y = (size_t)data->n_tasks, other = data->count;
    double *sum = xmalloc(3 * Y, sizeof *sum), *square = sum + Y, *count = square + Y, odd = 0;
    Molecule m = {0};
    for (size_t i = 0; i < data->count; i++) {
        dataset_read(data, i, &m);
        for (size_t y = 0; y < Y; y++) {
            double label = (double)m.labels[y];
            if (isnan(label)) continue;
            if (label != 0 && label != 1 && other == data->count) {
                other = i;
                odd = label;
            }
            sum[y] += label;
            square[y] += label * label;
            count[y] += 1;
        }
    }
    if (!opt.task) {
        opt.task = KIND_NAMES[other < data->count ? TASK_REGRESSION : TASK_CLASSIFICATION];
        fprintf(stderr, "task    %s: the labels are %s 0 and 1 (--task overrules)\n", opt.task,
                other < data->count ? "more than" : "all");
    }
    ft->task.kind = (TaskKind)name_index("--task", opt.task, KIND_NAMES, 2);
    int classes = ft->task.kind == TASK_CLASSIFICATION;
    CHECK(!classes || other == data->count,
          "%s: molecule %zu: expected labels 0 and 1 for --task classification, found %g",
          data->path, other, odd);
    for (size_t y = 0; y < Y; y++) {
        CHECK(count[y] > 0, "%s: task %s has no labels", data->path, data->task_names[y]);
        CHECK(!classes || (sum[y] > 0 && sum[y] < count[y]),
              "%s: task %s: all labels are %d; expected both classes (data_prep --labels leaves a "
              "task out)", data->path, data->task_names[y], sum[y] > 0);
        double mean = sum[y] / count[y], variance = square[y] / count[y] - mean * mean;
        ft->mean[y] = classes ? 0 : (float)mean;
        ft->std[y] = !classes && variance > 1e-12 * (1 + mean * mean) ? (float)sqrt(variance) : 1;
    }
    molecule_free(&m);
    free(sum);
}

// 3D asked of molecules that have no positions: refused, or if 2D is asked too, said.
static void check_positions(const Dataset *data, int use) {
    size_t without = 0;
    for (size_t i = 0; i < data->count && use & USE_3D; i++) without += !dataset_has_pos(data, i);
    if (without == 0) return;
    CHECK(use & USE_SPD, "%s: --modality 3d: %zu of %zu molecules have no positions", data->path,
          without, data->count);
    fprintf(stderr, "note    %s: %zu of %zu molecules have no positions and take part with 2D only\n",
            data->path, without, data->count);
}

// Predictions for the next batch of molecules from `first` on: logits, or values in the labels'
// units, out (B, Y). Returns B.
static size_t predict_batch(float *out, Run *run, const Task *task, const Dataset *data,
                            size_t first) {
    static const Dropout none = {0};
    Draws still = {0};
    size_t Y = (size_t)run->model.config.tasks;
    size_t B = run_next(run, data, first, NULL, task->use, &still);
    encoder_forward(&run->acts, &run->model, &run->batch, &none, &still);
    task_head_forward(out, &run->acts, &run->model, &run->batch, task->readout);
    for (size_t k = 0; k < B * Y && task->kind == TASK_REGRESSION; k++)
        out[k] = out[k] * task->std[k % Y] + task->mean[k % Y];
    return B;
}

// Predictions (n, Y) and labels (n, Y) of a whole dataset, in fresh memory.
static float *predict_all(float **labels, Run *run, const Task *task, const Dataset *data) {
    size_t Y = (size_t)data->n_tasks;
    float *out = xmalloc(mul_size(data->count, Y), sizeof *out);
    *labels = xmalloc(mul_size(data->count, Y), sizeof **labels);
    for (size_t i = 0; i < data->count; i += (size_t)opt.batch) {
        size_t B = predict_batch(out + i * Y, run, task, data, i);
        memcpy(*labels + i * Y, run->batch.labels, sizeof(float) * B * Y);
    }
    return out;
}

// The number by which epochs are chosen, better when larger: the mean ROC-AUC, or minus the mean
// RMSE in deviations of the training labels, so that no task's unit outweighs another's.
static double evaluate_task(Run *run, const Task *task, const Dataset *data) {
    size_t Y = (size_t)data->n_tasks, defined = 0;
    float *labels, *out = predict_all(&labels, run, task, data);
    double sum = 0, metric[METRICS];
    for (size_t y = 0; y < Y; y++) {
        task_metrics(metric, task->kind, out, labels, data->count, Y, y);
        double now = task->kind == TASK_CLASSIFICATION
                         ? metric[METRIC_AUC] : -metric[METRIC_RMSE] / (double)task->std[y];
        defined += !isnan(now);
        sum += isnan(now) ? 0 : now;
    }
    free(out);
    free(labels);
    return defined ? sum / (double)defined : (double)NAN;
}

// Is this tensor of a checkpoint part of a head, which fine-tuning leaves behind?
static int is_head(const char *name) {
    return strstr(name, "atom_proc.") || strstr(name, "blend_") || strstr(name, "proj_out.");
}

// Copies what a checkpoint shares with the model: the encoder. Heads are left behind, the new head
// keeps its initial values, as in the release. Names every other tensor that is missing or extra;
// one of another shape ends the program.
static void transfer_load(const Model *model, const char *path, int quiet) {
    TensorFile f;
    char name[128];
    int loaded = 0, missing = 0;
    tensor_file_open(&f, path);
    char *used = xmalloc((size_t)f.count, 1);
    for (int i = 0; i < model->n_tensors; i++) {
        const TensorInfo *info = &model->info[i];
        if (is_head(info->pattern)) continue;
        const TensorEntry *entry = tensor_find_official(&f, "", tensor_name(info, name));
        if (entry) {
            used[entry - f.entries] = (char)tensor_load(model->params, info, &f, "");
            loaded++;
        } else {
            missing++;
            if (!quiet)
                fprintf(stderr, "%s: tensor %s is missing; it keeps its initial values\n", path,
                        name);
        }
    }
    CHECK(loaded > 0, "%s: no tensor of the encoder is there", path);
    for (int k = 0; k < f.count && !quiet; k++)
        if (!used[k] && !is_head(f.entries[k].name))
            fprintf(stderr, "%s: tensor %s is not of this model; left behind\n", path,
                    f.entries[k].name);
    if (!quiet)
        fprintf(stderr, "init    %s: %d encoder tensors loaded, %d missing, %d left behind\n", path,
                loaded, missing, f.count - loaded);
    free(used);
    tensor_file_close(&f);
}

// One epoch of updates; returns the mean training loss.
static double finetune_epoch(Finetune *ft, int64_t epoch, uint64_t seed) {
    Run *run = &ft->run;
    int64_t n = (int64_t)run->train.count, per_epoch = (n + opt.batch - 1) / opt.batch;
    int64_t steps = per_epoch * opt.epochs;
    int64_t warmup = opt.warmup >= 0 ? opt.warmup : steps / 10 + 1;
    float *logits =
        xmalloc(2 * mul_size((size_t)opt.batch, (size_t)run->train.n_tasks), sizeof *logits);
    float *dlogits = logits + (size_t)opt.batch * (size_t)run->train.n_tasks;
    double sum = 0;
    rng_permutation(run->order, run->train.count, seed, RNG_SHUFFLE, (uint32_t)epoch);
    for (int64_t k = 0; k < per_epoch && !mb_signal; k++) {
        int64_t first = k * opt.batch, B = n - first < opt.batch ? n - first : opt.batch;
        int64_t step = epoch * per_epoch + k;
        const uint32_t *ids = run->order + first;
        Draws draws = {seed, (uint32_t)step, 0, 1};
        Adam adam = opt.adam;
        adam.lr = learning_rate(opt.adam.lr, step, warmup, steps);
        run_batch(run, &run->train, ids, (size_t)B, NULL, ft->task.use, &draws);
        double loss = finetune_gradients(logits, dlogits, &run->acts, &run->model, &run->batch,
                                         &ft->task, &opt.drop, &draws);
        check_finite(&run->model, loss, step + 1);
        check_finite(&run->model, adamw_step(&run->model, &adam, step + 1), step + 1);
        sum += loss * (double)B / (double)n;
    }
    free(logits);
    return sum;
}

// A number of evaluate_task() for people: of a single task in its units.
static double shown_metric(const Finetune *ft, double metric) {
    return fabs(metric) * (ft->run.train.n_tasks == 1 ? (double)ft->std[0] : 1);
}

// Trains one model from the given seed; leaves the best epoch's parameters in the model.
static void finetune_run(Finetune *ft, uint64_t seed, int quiet) {
    Run *run = &ft->run;
    Model *model = &run->model;
    int64_t since_best = 0;
    model_init(model, seed);
    if (opt.init) transfer_load(model, opt.init, quiet);
    memset(model->m, 0, sizeof(float) * model->count);
    memset(model->v, 0, sizeof(float) * model->count);
    ft->best_epoch = -1;
    Progress progress = progress_begin(0);
    for (int64_t epoch = 0; epoch < opt.epochs; epoch++) {
        double loss = finetune_epoch(ft, epoch, seed);
        if (mb_signal) break;
        double now = evaluate_task(run, &ft->task, &run->valid);
        if (ft->best_epoch < 0 || now > ft->best_metric || isnan(ft->best_metric)) {
            ft->best_metric = now;
            ft->best_epoch = epoch;
            since_best = -1;
            memcpy(ft->best, model->params, sizeof(float) * model->count);
        }
        char text[96];
        snprintf(text, sizeof text, "seed %llu epoch %lld: loss %.4f, valid %.4f",
                 (unsigned long long)seed, (long long)epoch + 1, loss, shown_metric(ft, now));
        progress_show(&progress, (double)epoch + 1, (double)opt.epochs,
                      (double)(epoch + 1) * (double)run->train.count, "molecules", text,
                      epoch + 1 == opt.epochs);
        if (opt.patience > 0 && ++since_best >= opt.patience) break;
    }
    if (ft->best_epoch >= 0) memcpy(model->params, ft->best, sizeof(float) * model->count);
}

// The USE_ bits of a modality's name.
static int modality_use(const char *name) {
    return MODALITY_USE[name_index("--modality", name, MODALITY_NAMES, 3)];
}

// The checkpoint of a fine-tuned model; its metadata carries what predict needs.
static void finetune_save(const Finetune *ft) {
    const Dataset *data = &ft->run.train;
    Text t = {0}, names = {0}, mean = {0}, std = {0};
    text_add(&t, "{");
    text_add_meta(&t, "format", "pt");
    text_add_meta(&t, "task", KIND_NAMES[ft->task.kind]);
    text_add_meta(&t, "readout", READOUT_NAMES[ft->task.readout]);
    text_add_meta(&t, "modality", opt.modality);
    for (int y = 0; y < data->n_tasks; y++) {
        text_add(&names, "%s%s", y ? "\n" : "", data->task_names[y]);
        text_add(&mean, "%s%.9g", y ? " " : "", (double)ft->mean[y]);
        text_add(&std, "%s%.9g", y ? " " : "", (double)ft->std[y]);
    }
    text_add_meta(&t, "task_names", names.text);
    text_add_meta(&t, "label_mean", mean.text);
    text_add_meta(&t, "label_std", std.text);
    text_add(&t, "}");
    const ArenaName arena = {"", ft->run.model.params};
    tensor_file_write(opt.output, &ft->run.model, &arena, 1, NULL, t.text);
    free(t.text);
    free(names.text);
    free(mean.text);
    free(std.text);
}

static void print_metrics(const double metric[METRICS]) {
    for (int k = 0; k < METRICS; k++)
        if (!isnan(metric[k])) printf("  %s %.6f", METRIC_NAMES[k], metric[k]);
    printf("\n");
}

// Metrics of the test set (validation set without one): of several tasks, one by one on stdout;
// `mean` over the tasks; `chance`: the mean if every prediction were the training mean.
static void finetune_report(double mean[METRICS], double chance[METRICS], Finetune *ft) {
    const Dataset *data = ft->has_test ? &ft->test : &ft->run.valid;
    TaskKind kind = ft->task.kind;
    float *labels, *out = predict_all(&labels, &ft->run, &ft->task, data);
    size_t Y = (size_t)data->n_tasks, n = data->count;
    float *constant = xmalloc(mul_size(n, Y), sizeof *constant);
    for (size_t k = 0; k < n * Y; k++) constant[k] = ft->mean[k % Y];
    mean_metrics(mean, kind, out, labels, n, Y);
    mean_metrics(chance, kind, constant, labels, n, Y);
    for (size_t y = 0; y < Y && Y > 1; y++) {
        double metric[METRICS];
        task_metrics(metric, kind, out, labels, n, Y, y);
        printf("%-24s", data->task_names[y]);
        print_metrics(metric);
        if (kind == TASK_CLASSIFICATION) continue;
        task_metrics(metric, kind, constant, labels, n, Y, y);
        printf("%24s", "by chance");
        print_metrics(metric);
    }
    free(constant);
    free(out);
    free(labels);
}

static void same_tasks(const Dataset *a, const Dataset *b) {
    int same = a->n_tasks == b->n_tasks;
    for (int t = 0; same && t < a->n_tasks; t++)
        same = strcmp(a->task_names[t], b->task_names[t]) == 0;
    CHECK(same, "%s: expected the tasks of %s", b->path, a->path);
}

static void finetune_open(Finetune *ft, const char *train_path) {
    Run *run = &ft->run;
    dataset_open(&run->train, train_path);
    CHECK(run->train.count > 0 && run->train.n_tasks > 0,
          "%s: expected molecules with labels (data_prep --labels)", train_path);
    CHECK(opt.valid, "--valid: expected a validation set, to choose the best epoch by");
    batch_size_set(&run->train);
    run_lock(run);
    dataset_open(&run->valid, opt.valid);
    CHECK(run->valid.count > 0, "%s: the dataset is empty", opt.valid);
    same_tasks(&run->train, &run->valid);
    ft->has_test = opt.test != NULL;
    if (ft->has_test) {
        dataset_open(&ft->test, opt.test);
        same_tasks(&run->train, &ft->test);
    }
    size_t Y = (size_t)run->train.n_tasks;
    ft->mean = xmalloc(Y, sizeof *ft->mean);
    ft->std = xmalloc(Y, sizeof *ft->std);
    if (!opt.readout) opt.readout = DEFAULT_READOUT;
    if (!opt.modality) opt.modality = DEFAULT_MODALITY;
    ft->task = (Task){.readout = (Readout)name_index("--readout", opt.readout, READOUT_NAMES, 3),
                      .use = modality_use(opt.modality),
                      .mean = ft->mean, .std = ft->std,
                      .label_units = name_index("--loss-units", opt.loss_units, UNIT_NAMES, 2)};
    label_statistics(ft);
    check_positions(&run->train, ft->task.use);
    check_positions(&run->valid, ft->task.use);
    if (ft->has_test) check_positions(&ft->test, ft->task.use);
    Config c = start_config();
    c.tasks = run->train.n_tasks;
    model_create(&run->model, c, 1);
    run->order = xmalloc(run->train.count, sizeof *run->order);
    run->ids = xmalloc((size_t)opt.batch, sizeof *run->ids);
    ft->best = xmalloc(run->model.count, sizeof *ft->best);
    fprintf(stderr, "model   %d layers, %d wide: %.2f M parameters; %s, %s read-out, modality %s\n",
            c.layers, c.dim, (double)run->model.count / 1e6, opt.task, opt.readout, opt.modality);
    fprintf(stderr, "data    %zu training, %zu validation, %zu test molecules, %d task%s\n",
            run->train.count, run->valid.count, ft->test.count, c.tasks, c.tasks > 1 ? "s" : "");
}

// =================================================================================================
// 12 Commands and main
// =================================================================================================

// ---- pretrain

// ./moleblend train.bin
static void command_pretrain(const char *train_path) {
    Run run = {0};
    run_open(&run, train_path);
    printf("   step    total  denoise     spd    edge      3d        lr gradient    mol/s\n");
    Progress progress = progress_begin((double)run.step);
    int64_t first = run.step;
    signals_catch();
    while (run.step < opt.steps && !mb_signal) {
        run_step(&run);
        run_print(&run, &progress);
        char text[64];
        snprintf(text, sizeof text, "step %lld of %lld", (long long)run.step, (long long)opt.steps);
        progress_show(&progress, (double)run.step, (double)opt.steps,
                      (double)(run.step - first) * (double)opt.batch, "molecules", text, 0);
        if (run.step < opt.steps && run.step % opt.save_every == 0) run_save(&run);
    }
    run_save(&run);  // also when all steps were done: the run may have been killed while saving
    if (progress.terminal) fprintf(stderr, "\r\033[K");
    if (run.step < opt.steps) {
        fprintf(stderr, "stopped by a signal and saved after step %lld; to go on, give the same "
                "command with --resume\n", (long long)run.step);
        mb_exit(128 + mb_signal);
    }
    run_report(&run);
    run_close(&run);
}

// ---- finetune

// ./moleblend finetune train.bin --valid v.bin --test t.bin --init FILE
static void command_finetune(const char *train_path) {
    Finetune ft = {0};
    double sum[METRICS] = {0}, square[METRICS] = {0}, mean[METRICS], chance[METRICS], best = 0;
    finetune_open(&ft, train_path);
    signals_catch();
    const char *part = ft.has_test ? "test" : "valid";
    for (int64_t s = 0; s < opt.seeds; s++) {
        finetune_run(&ft, (uint64_t)(opt.seed + s), s > 0);
        if (ft.best_epoch >= 0 && (s == 0 || ft.best_metric > best)) {
            best = ft.best_metric;
            finetune_save(&ft);
        }
        if (mb_signal) {
            fprintf(stderr, "stopped by a signal in seed %lld; %s\n", (long long)(opt.seed + s),
                    s || ft.best_epoch >= 0 ? "the best epoch so far is saved" : "nothing is saved");
            mb_exit(128 + mb_signal);
        }
        finetune_report(mean, chance, &ft);
        printf("seed %lld: best epoch %lld, valid %.4f%s; %s", (long long)(opt.seed + s),
               (long long)ft.best_epoch + 1, shown_metric(&ft, ft.best_metric),
               ft.task.kind == TASK_REGRESSION && ft.run.train.n_tasks > 1 ? " deviations" : "",
               part);
        print_metrics(mean);
        for (int k = 0; k < METRICS; k++) {
            sum[k] += mean[k];
            square[k] += mean[k] * mean[k];
        }
        fflush(stdout);
    }
    double n = (double)opt.seeds;
    for (int k = 0; k < METRICS && opt.seeds > 1; k++) {
        double m = sum[k] / n, variance = (square[k] - n * m * m) / (n - 1);
        if (!isnan(m)) printf("%s %s: %.4f +- %.4f over %lld seeds\n", part, METRIC_NAMES[k], m,
                              sqrt(fmax(variance, 0)), (long long)opt.seeds);
    }
    printf("by chance (the training mean for all): %s", part);
    print_metrics(chance);
    printf("wrote %s\n", opt.output);
    run_close(&ft.run);
    dataset_close(&ft.test);
    free(ft.mean);
    free(ft.std);
    free(ft.best);
}

// ---- predict and embed

// Model and buffers for --model FILE.
static void model_open(Run *run, TensorFile *f) {
    CHECK(opt.model, "--model: expected a checkpoint");
    tensor_file_open(f, opt.model);
    model_create(&run->model, tensor_file_config(f, ""), 0);
    model_load(&run->model, run->model.params, f, "");
    if (!opt.batch) opt.batch = DEFAULT_BATCH;
    run->ids = xmalloc((size_t)opt.batch, sizeof *run->ids);
}

// Metadata that finetune wrote, or the end of the program.
static const char *required_meta(const TensorFile *f, const char *key) {
    const char *text = tensor_meta(f, key);
    CHECK(text, "%s: not a fine-tuned model (metadata %s is missing); see ./moleblend finetune",
          f->path, key);
    return text;
}

// A field of a CSV row, quoted if it must be.
static void print_csv(const char *text, size_t length) {
    int quote = 0;
    for (size_t k = 0; k < length; k++) quote |= strchr(",\"\r\n", text[k]) != NULL;
    if (quote) putchar('"');
    for (size_t k = 0; k < length; k++) {
        if (text[k] == '"') putchar('"');
        putchar(text[k]);
    }
    if (quote) putchar('"');
}

// ./moleblend predict data.bin --model FILE: CSV on stdout
static void command_predict(const char *path) {
    Run run = {0};
    Dataset data;
    TensorFile f;
    Molecule m = {0};
    dataset_open(&data, path);
    model_open(&run, &f);
    size_t Y = (size_t)run.model.config.tasks, B = (size_t)opt.batch;
    const char *names = required_meta(&f, "task_names"), *mean = required_meta(&f, "label_mean");
    const char *std = required_meta(&f, "label_std");
    float *stats = xmalloc(2 * Y, sizeof *stats), *out = xmalloc(mul_size(B, Y), sizeof *out);
    char *end;
    for (size_t y = 0; y < Y; y++, mean = end) stats[y] = strtof(mean, &end);
    for (size_t y = 0; y < Y; y++, std = end) stats[Y + y] = strtof(std, &end);
    Task task = {
        (TaskKind)name_index("task", required_meta(&f, "task"), KIND_NAMES, 2),
        (Readout)name_index("readout", required_meta(&f, "readout"), READOUT_NAMES, 3),
        modality_use(required_meta(&f, "modality")), stats, stats + Y, 0};
    check_positions(&data, task.use);
    printf("name");
    for (size_t y = 0; y < Y; y++) {
        size_t length = strcspn(names, "\n");
        putchar(',');
        print_csv(names, length);
        names += length + (names[length] == '\n');
    }
    printf("\n");
    for (size_t i = 0; i < data.count; i += B) {
        size_t n = predict_batch(out, &run, &task, &data, i);
        for (size_t b = 0; b < n; b++) {
            dataset_read(&data, i + b, &m);
            print_csv(m.name, (size_t)m.name_length);
            for (size_t y = 0; y < Y; y++) {
                double x = (double)out[b * Y + y];
                printf(",%.6g", task.kind == TASK_CLASSIFICATION ? 1 / (1 + exp(-x)) : x);
            }
            printf("\n");
        }
    }
    CHECK(fflush(stdout) == 0 && !ferror(stdout), "cannot write to standard output: %s",
          strerror(errno));
    molecule_free(&m);
    free(stats);
    free(out);
    dataset_close(&data);
    tensor_file_close(&f);
    run_close(&run);
}

// ./moleblend embed data.bin --model FILE -o out.npy: (molecules, C) float32, the graph token or
// the mean over the atoms
static void command_embed(const char *path) {
    static const Dropout none = {0};
    Run run = {0};
    Dataset data;
    TensorFile f;
    OutFile out;
    Draws still = {0};
    dataset_open(&data, path);
    model_open(&run, &f);
    if (!opt.readout) opt.readout = tensor_meta(&f, "readout");  // as it was fine-tuned
    if (!opt.modality) opt.modality = tensor_meta(&f, "modality");
    int use = modality_use(opt.modality ? opt.modality : DEFAULT_MODALITY);
    int readout = name_index("--readout", opt.readout ? opt.readout : DEFAULT_READOUT,
                             READOUT_NAMES, 3);
    check_positions(&data, use);
    size_t C = (size_t)run.model.config.dim, B = (size_t)opt.batch;
    float *row = xmalloc(C, sizeof *row);
    char shape[96], header[128];
    snprintf(shape, sizeof shape, "{'descr': '<f4', 'fortran_order': False, 'shape': (%zu, %zu), }",
             data.count, C);
    int length = snprintf(header, sizeof header, "%-117s\n", shape);  // 10 + 118 = 128 bytes
    const uint8_t magic[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (uint8_t)length, 0};
    out_open(&out, opt.output);
    out_write(&out, magic, 10);
    out_write(&out, header, (size_t)length);
    Progress progress = progress_begin(0);
    signals_catch();
    for (size_t i = 0; i < data.count; i += B) {
        if (mb_signal) mb_exit(128 + mb_signal);
        size_t n = run_next(&run, &data, i, NULL, use, &still);
        encoder_forward(&run.acts, &run.model, &run.batch, &none, &still);
        for (size_t b = 0; b < n; b++) {
            size_t N = (size_t)run.batch.n_atoms[b], token = (size_t)run.batch.atom_start[b] + b;
            const float *x = run.acts.x + token * C;
            for (size_t c = 0; c < C; c++) {
                float sum = 0;
                for (size_t t = 1; t <= N; t++) sum += x[t * C + c];
                row[c] = readout == READ_CLS ? x[c] : readout == READ_MEAN ? sum / (float)N : sum;
            }
            write_floats(&out, row, C);
        }
        progress_show(&progress, (double)(i + n), (double)data.count, (double)(i + n), "molecules",
                      "embedded", i + n == data.count);
    }
    out_commit(&out);
    free(row);
    dataset_close(&data);
    tensor_file_close(&f);
    run_close(&run);
}

// ---- show: what the model is given of one molecule

static const char *const ELEMENTS =  // three characters each
    "H  He Li Be B  C  N  O  F  Ne Na Mg Al Si P  S  Cl Ar K  Ca Sc Ti V  Cr Mn Fe Co Ni Cu Zn "
    "Ga Ge As Se Br Kr Rb Sr Y  Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I  Xe Cs Ba La Ce Pr Nd "
    "Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W  Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th "
    "Pa U  Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og *  ";

// One matrix of a molecule: title, then a row an atom, cells of `width` characters.
static void show_matrix(const Batch *batch, const char *title, int kind) {
    static const char bond_signs[] = "-=#~?";  // single, double, triple, aromatic, other
    int N = batch->n_atoms[0];
    printf("\n%s\n      ", title);
    for (int j = 0; j < N; j++) printf(" %5d", j);
    printf("\n");
    for (int i = 0; i < N; i++) {
        printf("%3d %.2s", i, ELEMENTS + 3 * batch->atom_feat[i * ATOM_FEATURES]);
        for (int j = 0; j < N; j++) {
            size_t p = (size_t)i * (size_t)N + (size_t)j;
            char cell[16] = ".";
            int use = kind ? kind : batch->pair_use[p], spd = batch->spd[p];
            if (use == USE_SPD && spd != SPD_UNREACHABLE) snprintf(cell, sizeof cell, "%d", spd);
            if (use == USE_3D) snprintf(cell, sizeof cell, "%.1f", (double)batch->distance[p]);
            if (use == USE_EDGE && batch->path[p * PATH_BONDS] != PATH_NONE)
                for (int t = 0;
                     t < PATH_BONDS && batch->path[p * PATH_BONDS + (size_t)t] < PATH_NONE; t++)
                    snprintf(cell + t, sizeof cell - (size_t)t, "%c",
                             bond_signs[batch->path[p * PATH_BONDS + (size_t)t] / 12]);
            printf(" %5s", cell);
        }
        printf("\n");
    }
}

// ./moleblend show data.bin INDEX
static void command_show(const char *path, const char *index_text) {
    Dataset data;
    Batch batch;
    Sizes room = {0};
    dataset_open(&data, path);
    char *end = NULL;
    unsigned long long index = strtoull(index_text, &end, 10);
    CHECK(end != index_text && *end == 0 && index < data.count,
          "%s: expected the index of one of its %zu molecules, from 0 on, found \"%s\"", path,
          data.count, index_text);
    uint32_t id = (uint32_t)index;
    Draws draws = {(uint64_t)opt.seed, 0, id, 1};
    sizes_add(&room, dataset_atoms(&data, id));
    batch_alloc(&batch, room, 0);
    Blend still = opt.blend;
    still.noise = 0;
    batch_load(&batch, &data, &id, 1, &still, 0, &draws);
    const Molecule *m = &batch.finder[0].molecule;
    for (int t = 0; t < thread_count(); t++)
        if (batch.finder[t].molecule.n_atoms) m = &batch.finder[t].molecule;
    printf("molecule %llu of %s: %s, %d atoms, %d bonds, %s\n", index, path, m->name, m->n_atoms,
           m->n_bonds, m->has_pos ? "3D" : "2D only");
    show_matrix(&batch, "shortest path (bonds; . = not connected)", USE_SPD);
    show_matrix(&batch,
                "bonds of the path, the first five (- = # single, double, triple, ~ aromatic)",
                USE_EDGE);
    if (batch.has_pos[0]) show_matrix(&batch, "distance (Angstrom)", USE_3D);
    show_matrix(&batch, "one blend: what the encoder would see of each pair", 0);
    printf("\natoms' own structure: ");
    for (int i = 0; i < batch.n_atoms[0]; i++)
        printf("%s ", batch.atom_use[i] == USE_3D ? "3D" : "2D");
    printf("\n");
    batch_free(&batch);
    dataset_close(&data);
}

// ---- info: what is in a file

static void info_dataset(const char *path) {
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
    for (int t = 0; t < data.n_tasks; t++)
        printf("  task       %s: %.0f labels\n", data.task_names[t], present[t]);
    free(present);
    molecule_free(&m);
    dataset_close(&data);
}

static void info_tensors(const char *path) {
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

// ./moleblend info FILE
static void command_info(const char *path) {
    size_t size;
    int mapped;
    const uint8_t *bytes = file_bytes(path, &size, &mapped);
    int dataset = size >= 8 && memcmp(bytes, DATASET_MAGIC, 8) == 0;
    file_release(bytes, size, mapped);
    if (dataset)
        info_dataset(path);
    else
        info_tensors(path);
}

// ---- the command line

enum { PRETRAIN = 1, FINETUNE = 2, PREDICT = 4, EMBED = 8, SHOW = 16, INFO = 32,
       TRAIN = PRETRAIN | FINETUNE, READ = PREDICT | EMBED };

#define HEADING(text, commands) {NULL, OPT_FLAG, NULL, 0, 0, NULL, text, commands}

static const Option OPTIONS[] = {
    HEADING("Files", TRAIN | READ),
    {"-o", OPT_TEXT, &opt.output, 0, 0, "FILE",
     "output (moleblend.safetensors, finetuned.safetensors or embeddings.npy)", TRAIN | EMBED},
    {"--valid", OPT_TEXT, &opt.valid, 0, 0, "FILE", "validation set (valid.bin beside train.bin)",
     TRAIN},
    {"--test", OPT_TEXT, &opt.test, 0, 0, "FILE", "test set (test.bin beside train.bin)", FINETUNE},
    {"--init", OPT_TEXT, &opt.init, 0, 0, "FILE", "start from this checkpoint", TRAIN},
    {"--model", OPT_TEXT, &opt.model, 0, 0, "FILE", "checkpoint to use", READ},
    {"--resume", OPT_FLAG, &opt.resume, 0, 0, NULL, "continue the run that writes -o", PRETRAIN},
    {"--save-every", OPT_INT, &opt.save_every, 1, 1e9, "N", "steps between checkpoints", PRETRAIN},
    HEADING("Model", TRAIN),
    {"--size", OPT_TEXT, &opt.size, 0, 0, "NAME",
     "tiny, small, or base, the paper's (default small, or that of --init)", TRAIN},
    {"--layers", OPT_INT, &opt.layers, 1, MAX_LAYERS, "N", "instead of --size's; so the next four",
     TRAIN},
    {"--dim", OPT_INT, &opt.dim, 1, MAX_DIM, "N", "width of a token", TRAIN},
    {"--ffn", OPT_INT, &opt.ffn, 1, MAX_DIM, "N", "width of the feed-forward layer", TRAIN},
    {"--heads", OPT_INT, &opt.heads, 1, 256, "N", "attention heads, a divisor of --dim", TRAIN},
    {"--kernels", OPT_INT, &opt.kernels, 1, MAX_KERNELS, "N", "Gaussian kernels", TRAIN},
    HEADING("Training", TRAIN | READ | SHOW),
    {"--steps", OPT_INT, &opt.steps, 1, 1e9, "N", "updates", PRETRAIN},
    {"--epochs", OPT_INT, &opt.epochs, 1, 1e6, "N", "passes over the training set", FINETUNE},
    {"--patience", OPT_INT, &opt.patience, 0, 1e6, "N",
     "stop after N epochs without gain; 0: never", FINETUNE},
    {"--seeds", OPT_INT, &opt.seeds, 1, 1000, "N", "repeat with N seeds, mean and deviation",
     FINETUNE},
    {"--batch-size", OPT_INT, &opt.batch, 1, 1e6, "N",
     "molecules at a time (default 64, or all of a smaller training set)", TRAIN | READ},
    {"--lr", OPT_NUMBER, &opt.adam.lr, 0, 10, "X", "peak learning rate", TRAIN},
    {"--warmup", OPT_INT, &opt.warmup, -1, 1e9, "N", "steps; -1: 1/20 (finetune: 1/10) of all",
     TRAIN},
    {"--seed", OPT_INT, &opt.seed, 0, 9e15, "N", "names every random draw", TRAIN | SHOW},
    {"--threads", OPT_INT, &opt.threads, 0, 1024, "N", "0: all we may use; results are the same",
     TRAIN | READ},
    {"--beta1", OPT_NUMBER, &opt.adam.beta1, 0, 0.999999, "X", "AdamW", TRAIN},
    {"--beta2", OPT_NUMBER, &opt.adam.beta2, 0, 0.999999, "X", "AdamW", TRAIN},
    {"--eps", OPT_NUMBER, &opt.adam.eps, 1e-30, 1, "X", "AdamW", TRAIN},
    {"--weight-decay", OPT_NUMBER, &opt.adam.weight_decay, 0, 10, "X", "AdamW, decoupled", TRAIN},
    {"--clip", OPT_NUMBER, &opt.adam.clip, 0, 1e9, "X", "largest gradient norm; 0: any", TRAIN},
    {"--attention-dropout", OPT_NUMBER, &opt.drop.attention, 0, 0.99, "P", "of probabilities",
     TRAIN},
    {"--activation-dropout", OPT_NUMBER, &opt.drop.activation, 0, 0.99, "P", "after gelu", TRAIN},
    {"--path-dropout", OPT_NUMBER, &opt.drop.path, 0, 0.99, "P", "of the last layer's branches",
     TRAIN},
    {"--embedding-dropout", OPT_NUMBER, &opt.drop.embedding, 0, 0.99, "P", "of the tokens", TRAIN},
    HEADING("Task", FINETUNE | EMBED),
    {"--task", OPT_TEXT, &opt.task, 0, 0, "NAME",
     "classification or regression (default: by the labels)", FINETUNE},
    {"--loss-units", OPT_TEXT, &opt.loss_units, 0, 0, "NAME",
     "of regression: deviations (every task counts alike) or labels (as the release)", FINETUNE},
    {"--readout", OPT_TEXT, &opt.readout, 0, 0, "NAME",
     "mean, sum or cls (default mean; embed: as fine-tuned)", FINETUNE | EMBED},
    {"--modality", OPT_TEXT, &opt.modality, 0, 0, "NAME",
     "2d, 3d or both (default 2d; embed: as fine-tuned)", FINETUNE | EMBED},
    HEADING("Method", PRETRAIN | SHOW),
    {"--pair-spd", OPT_NUMBER, &opt.blend.pair_spd, 0, 1, "P",
     "how often a pair shows its path length", PRETRAIN | SHOW},
    {"--pair-edge", OPT_NUMBER, &opt.blend.pair_edge, 0, 1, "P", "the bonds of its path",
     PRETRAIN | SHOW},
    {"--pair-3d", OPT_NUMBER, &opt.blend.pair_3d, 0, 1, "P", "its distance", PRETRAIN | SHOW},
    {"--atom-2d", OPT_NUMBER, &opt.blend.atom_2d, 0, 1, "P", "how often an atom shows its degree",
     PRETRAIN | SHOW},
    {"--atom-3d", OPT_NUMBER, &opt.blend.atom_3d, 0, 1, "P", "its distances", PRETRAIN | SHOW},
    {"--no-blend", OPT_FLAG, &opt.blend.all, 0, 0, NULL, "show everything of every pair",
     PRETRAIN | SHOW},
    {"--noise", OPT_NUMBER, &opt.blend.noise, 0, 10, "X", "on each coordinate, Angstrom", PRETRAIN},
    {"--weight-denoise", OPT_NUMBER, &opt.weights.weight[LOSS_NOISE], 0, 1e6, "X", "of a loss",
     PRETRAIN},
    {"--weight-spd", OPT_NUMBER, &opt.weights.weight[LOSS_SPD], 0, 1e6, "X", "of a loss", PRETRAIN},
    {"--weight-edge", OPT_NUMBER, &opt.weights.weight[LOSS_EDGE], 0, 1e6, "X", "of a loss",
     PRETRAIN},
    {"--weight-3d", OPT_NUMBER, &opt.weights.weight[LOSS_3D], 0, 1e6, "X", "of a loss", PRETRAIN},
    {"--help", OPT_FLAG, &opt.help, 0, 0, NULL, "this text; after a command, its own", 0},
};
enum { N_OPTIONS = sizeof OPTIONS / sizeof OPTIONS[0] };

typedef struct {
    const char *name;
    unsigned bit;
    int words;            // files it takes
    const char *output;   // default of -o
    const char *usage, *help;
} Command;

static const Command COMMANDS[] = {
    {"pretrain", PRETRAIN, 1, "moleblend.safetensors", "train.bin",
     "pretrain (the default command)"},
    {"finetune", FINETUNE, 1, "finetuned.safetensors", "train.bin --init FILE",
     "train on labels, from a checkpoint or from scratch"},
    {"predict", PREDICT, 1, NULL, "data.bin --model FILE", "predictions as CSV on stdout"},
    {"embed", EMBED, 1, "embeddings.npy", "data.bin --model FILE",
     "a vector per molecule, NumPy format"},
    {"show", SHOW, 2, NULL, "data.bin INDEX", "a molecule's relations, and one blend of them"},
    {"info", INFO, 1, NULL, "FILE", "what is in a dataset or checkpoint"},
};
enum { N_COMMANDS = sizeof COMMANDS / sizeof COMMANDS[0] };

static void print_help(const Command *command) {
    printf(
        "MoleBLEND: pretrain a Transformer on molecules by blending 2D and 3D (ICLR 2024)\n\n"
        "  ./moleblend train.bin                        pretrain; writes moleblend.safetensors\n");
    for (const Command *c = COMMANDS + 1; c < COMMANDS + N_COMMANDS; c++)
        printf("  ./moleblend %-8s %-23s %s\n", c->name, c->usage, c->help);
    printf("\nDatasets (.bin) are made by ./data_prep from SDF, SMILES or CSV files.\n");
    options_print(OPTIONS, N_OPTIONS, command ? command->bit : 0);
}

// valid.bin (or test.bin) beside train.bin: the same path with the last "train" replaced, if there
// is such a file; else NULL. Lives as long as the program.
static const char *sibling(const char *train_path, const char *part) {
    static char paths[2][4096];
    const char *at = NULL;
    for (const char *s = train_path; (s = strstr(s, "train")); s++) at = s;
    char *path = paths[part[0] == 't'];
    if (!at || strlen(train_path) + 8 > sizeof paths[0]) return NULL;
    snprintf(path, sizeof paths[0], "%.*s%s%s", (int)(at - train_path), train_path, part, at + 5);
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    fclose(f);
    return path;
}

// What the ranges of single options cannot say.
static void check_options(void) {
    CHECK(opt.blend.pair_spd + opt.blend.pair_edge > 0 && opt.blend.pair_3d >= 0,
          "--pair-spd, --pair-edge: expected one of them above 0 (molecules without 3D need it)");
    CHECK(opt.blend.atom_2d + opt.blend.atom_3d > 0, "--atom-2d, --atom-3d: expected one above 0");
    CHECK(!(opt.resume && opt.init), "--resume and --init: expected only one of them");
    CHECK(opt.steps <= UINT32_MAX - 1, "--steps: too many");
}

int main(int argc, char **argv) {
    threads_calm(argv);
    const Command *command = NULL;
    for (int k = 0; k < N_COMMANDS && argc > 1; k++)
        if (strcmp(argv[1], COMMANDS[k].name) == 0) command = &COMMANDS[k];
    int named = command != NULL;
    if (!command) command = &COMMANDS[0];
    if (command->bit == FINETUNE) opt.adam.lr = 2e-4;
    const char *words[2] = {NULL, NULL};
    int n_words =
        options_parse(OPTIONS, N_OPTIONS, command->bit, argc - named, argv + named, words, 2);
    if (opt.help) {
        print_help(named ? command : NULL);
        return 0;
    }
    CHECK(n_words == command->words, "expected ./moleblend %s%s; see --help",
          named ? xprintf("%s ", command->name) : "", command->usage);
    check_options();
    if (!opt.output) opt.output = command->output;
    if (!opt.valid && command->bit & TRAIN) opt.valid = sibling(words[0], "valid");
    if (!opt.test && command->bit & FINETUNE) opt.test = sibling(words[0], "test");
    threads_set(opt.threads);
    switch (command->bit) {
        case PRETRAIN: command_pretrain(words[0]); break;
        case FINETUNE: command_finetune(words[0]); break;
        case PREDICT: command_predict(words[0]); break;
        case EMBED: command_embed(words[0]); break;
        case SHOW: command_show(words[0], words[1]); break;
        default: command_info(words[0]); break;
    }
    return 0;
}

#endif  // MOLEBLEND_TEST
