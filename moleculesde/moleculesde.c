// moleculesde.c - MoleculeSDE in plain C: pretrain two encoders of molecules, one for the 2D graph
// and one for the 3D structure, against each other; fine-tune them; make conformers from graphs.
//
//   "A Group Symmetric Stochastic Differential Equation Model for Molecule Multi-modal
//   Pretraining" (Liu et al., ICML 2023, arXiv 2305.18407). A GIN reads the graph, a SchNet the
//   positions. Three losses tie them together: a contrast of the two vectors of each atom; a score
//   network that generates positions from the graph's vectors, equivariant under rotations; one
//   that generates the graph from the vectors of the structure. Names in quotes are tensors of the
//   official PyTorch release, whose numbers this file reproduces (see test_moleculesde.c).
//
//   build:  make moleculesde
//   use:    ./moleculesde/moleculesde train.bin          (train.bin comes from data_prep)
//
// HOW TO READ IT. Sections 1 to 9 are the method, from a molecule to one training step; each
// backward pass stands under its forward pass and quotes the line that it undoes. What follows the
// border behind section 9 may be skipped. All else comes from ../moleblend.c (gemm(),
// column_sums(), exp_fast(), dropout_row(), Adam), ../moleblend.h and ../lib/.
//
//   1 molecules of a batch    6 noise                  in model.h:              in run.c:
//   2 layers                  7 2D -> 3D              11 fine-tuning head      14 options
//   3 2D encoder: GIN         8 3D -> 2D              12 parameters            15 models on data
//   4 3D encoder: SchNet      9 one training step     13 checkpoints           16 commands
//   5 contrast               10 sampling conformers
//
//      graph                                     positions
//        | 3 GIN                                   | 4 SchNet
//        v                                         v
//      X (A, D) <------- 5 contrast ----------> Y (A, D)
//        |                                         |
//        | 7 + noised positions                    | 8 + noised graph
//        v                                         v
//      the noise on positions (A, 3)             the noise on bonds (P) and elements (A, V)
//
// Dimension letters (lower case: an index)
//   B  molecules in the batch                D  channels of both encoders [dim]
//   N  atoms of one molecule                 L  layers of the GIN
//   A  atoms of the batch                    T  blocks of the SchNet
//   P  pairs (i, j) of atoms of a            F  its filters, K its Gaussians
//      molecule, i <= j                      H  channels of the 2D -> 3D network [hidden]
//   E  edges of the extended graph:          W  channels of the 3D -> 2D network [width]
//      ordered pairs of atoms that are       C  channels of a layer's adjacency matrices there
//      1 to 4 bonds apart                    R  hidden width of a layer there
//   V  elements, 119
//
// Matrices are row-major, shapes are given as (rows, columns). The gradient of a tensor is named d
// + its name. s is the Sde, p its parameters, g their gradients, a its activations. Everything is
// deterministic: threads share out results, never sums, and every random number has a name.

#if defined(__GNUC__) || defined(__clang__)
#pragma GCC diagnostic ignored "-Wunused-function"  // much of moleblend.c is not needed here
#endif
#ifndef MB_PROGRAM
#define MB_PROGRAM "moleculesde"
#endif
#define MOLEBLEND_TEST  // moleblend.c without its runs and commands
#include "../moleblend.c"
#include "../lib/functions.h"  // log_fast(), tanh_fast(), turn_fast(), normal_row()

// =================================================================================================
// 1 Molecules of a batch, packed: no padding, no mask. Ethanol, atoms C0-C1-O2:
//
//     bonds of an atom   0: 1   1: 0 2   2: 1        in bond_start[i]..bond_start[i + 1] - 1
//     pairs i <= j       (0,0) (0,1) (1,1) (0,2) (1,2) (2,2): row j (j + 1) / 2 + i. All that is
//                        symmetric (distances, filters, adjacency matrices) has a row a pair
//     edges into an atom 0: 1 2   1: 0 2   2: 0 1    as bonds; edge_back: the same the other way
// =================================================================================================

enum { V = 119, MAX_HOPS = 4, ATOM_TABLE_ROWS = 174, BOND_TABLE_ROWS = 13 };

// X(type, field, count): what is known of a batch before its edges are counted; the edges.
#define MOLS_ARRAYS(X)                                                                             \
    X(int, n_atoms, B)                                                                             \
    X(size_t, atom_start, B + 1)                                                                   \
    X(size_t, pair_start, B + 1)                                                                   \
    X(uint32_t, molecule_of, A)                                                                    \
    X(uint8_t, atom_feat, A *ATOM_FEATURES)                                                        \
    X(uint8_t, bonded, A)            /* has the atom a bond? */                                    \
    X(size_t, bond_start, A + 1)                                                                   \
    X(uint32_t, bond_to, bonds)      /* the neighbour, an atom of the batch */                     \
    X(uint8_t, bond_code, bonds)                                                                   \
    X(uint8_t, bond_type, P)         /* 1..5, 0: no bond */                                        \
    X(float, pos, 3 * A)             /* without the molecule's mean */                             \
    X(float, distance, P)                                                                          \
    X(uint8_t, hops, squares)        /* (N, N) bonds apart, MAX_HOPS + 1: more */                  \
    X(size_t, edge_start, A + 1)                                                                   \
    X(float, labels, B *Y)                                                                         \
    /* drawn: noise of 2D -> 3D, of 3D -> 2D; whose vector is contrasted with that of an atom */   \
    X(uint32_t, perm, 2 * A)         /* pi, pi' */                                                 \
    X(uint32_t, inverse, 2 * A)                                                                    \
    X(int, time, 2 * B)              /* k in 0..999 of 2D -> 3D, then of 3D -> 2D */               \
    X(float, noise, 3 * A)                                                                         \
    X(float, noise_adj, P)                                                                         \
    X(float, noise_x, A *V)                                                                        \
    /* made of them, section 6 */                                                                  \
    X(float, t, 2 * B)                                                                             \
    X(float, mu, 2 * B)                                                                            \
    X(float, sigma, 2 * B)                                                                         \
    X(float, q, 3 * A)               /* noised positions */                                        \
    X(float, adj, P)                 /* noised bond types */                                       \
    X(float, elements, A *V)         /* noised one-hot elements */

#define EDGE_ARRAYS(X)                                                                             \
    X(uint32_t, edge_from, E + 1)                                                                  \
    X(uint32_t, edge_to, E + 1)                                                                    \
    X(uint32_t, edge_back, E + 1)

typedef struct {
    size_t B, A, P, E;
    int N, Y;                        // atoms of the largest molecule, labels of each
    Molecule *molecule;              // (molecule_room) as read
    size_t molecule_room;
#define X(type, field, count) type *field;
    MOLS_ARRAYS(X)
    EDGE_ARRAYS(X)
#undef X
    Store store, edge_store;
} Mols;

// Where molecule b stands in a batch.
typedef struct { int N; size_t b, atom, pair; } Place;

static Place place_of(const Mols *m, size_t b) {
    return (Place){m->n_atoms[b], b, m->atom_start[b], m->pair_start[b]};
}

// All pairs of a molecule's atoms; the row of a pair, in any order.
#define FOR_PAIRS(v, i, j)                                                                         \
    for (int j = 0; j < (v).N; j++)                                                                \
        for (int i = 0; i <= j; i++)

static size_t pair_row(const Place *v, int i, int j) {
    size_t low = (size_t)min_int(i, j), high = (size_t)max_int(i, j);
    return v->pair + high * (high + 1) / 2 + low;
}

// Copies molecule b into the batch: features, the bonds of each atom, centred positions, distances.
static void mols_set(Mols *m, size_t b, size_t first_bond) {
    const Molecule *in = &m->molecule[b];
    Place v = place_of(m, b);
    double mean[3] = {0};
    memcpy(m->atom_feat + v.atom * ATOM_FEATURES, in->atom_feat, (size_t)v.N * ATOM_FEATURES);
    memset(m->bond_type + v.pair, 0, pair_row(&v, 0, v.N) - v.pair);
    for (int y = 0; y < m->Y; y++) m->labels[b * (size_t)m->Y + (size_t)y] = in->labels[y];
    for (int i = 0; i < v.N; i++) {
        size_t atom = v.atom + (size_t)i;
        m->molecule_of[atom] = (uint32_t)b;
        m->bond_start[atom] = first_bond;
        for (int k = 0; k < 2 * in->n_bonds; k++) {  // bond k / 2, in both directions
            if (in->bonds[k] != i) continue;
            int j = in->bonds[k ^ 1], code = in->bond_code[k / 2];
            m->bond_to[first_bond] = (uint32_t)v.atom + (uint32_t)j;
            m->bond_code[first_bond++] = (uint8_t)code;
            m->bond_type[pair_row(&v, i, j)] = (uint8_t)(code / (2 * BOND_STEREOS) + 1);
        }
        m->bonded[atom] = first_bond > m->bond_start[atom];
        for (int k = 0; k < 3 && in->has_pos; k++) mean[k] += (double)in->pos[3 * i + k] / v.N;
    }
    for (int i = 0; i < v.N; i++)
        for (int k = 0; k < 3; k++)
            m->pos[3 * (v.atom + (size_t)i) + (size_t)k] =
                in->has_pos ? (float)((double)in->pos[3 * i + k] - mean[k]) : 0.0f;
    FOR_PAIRS(v, i, j) {
        const float *x = m->pos + 3 * (v.atom + (size_t)i), *y = m->pos + 3 * (v.atom + (size_t)j);
        float d[3] = {x[0] - y[0], x[1] - y[1], x[2] - y[2]};
        m->distance[pair_row(&v, i, j)] = sqrtf(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]);
    }
}

// hops (N, N) of a molecule, and the number of edges into each of its atoms i at edge_start[i].
static void mols_hops(Mols *m, size_t b, uint8_t *hops) {
    Place v = place_of(m, b);
    size_t N = (size_t)v.N;
    memset(hops, MAX_HOPS + 1, N * N);
    for (size_t i = 0; i < N; i++) {
        uint8_t *row = hops + i * N;
        row[i] = 0;
        for (int hop = 1; hop <= MAX_HOPS; hop++)  // what is next to atoms hop - 1 bonds away
            for (size_t j = 0; j < N; j++) {
                if (row[j] != hop - 1) continue;
                for (size_t k = m->bond_start[v.atom + j]; k < m->bond_start[v.atom + j + 1]; k++) {
                    uint8_t *other = &row[m->bond_to[k] - v.atom];
                    if (*other > hop) *other = (uint8_t)hop;
                }
            }
        size_t edges = 0;
        for (size_t j = 0; j < N; j++) edges += j != i && row[j] <= MAX_HOPS;
        m->edge_start[v.atom + i] = edges;
    }
}

// The edges of a molecule, by receiver, then by sender.
static void mols_edges(Mols *m, size_t b, const uint8_t *hops) {
    Place v = place_of(m, b);
    size_t N = (size_t)v.N, e = m->edge_start[v.atom];
    for (size_t i = 0; i < N; i++)
        for (size_t j = 0; j < N; j++) {
            if (j == i || hops[i * N + j] > MAX_HOPS) continue;
            m->edge_from[e] = (uint32_t)(v.atom + j);
            m->edge_to[e] = (uint32_t)(v.atom + i);
            size_t before = 0;  // edges into j from atoms before i
            for (size_t k = 0; k < i; k++) before += k != j && hops[j * N + k] <= MAX_HOPS;
            m->edge_back[e++] = (uint32_t)(m->edge_start[v.atom + j] + before);
        }
}

// Builds the batch from molecule[0..B), with the first Y labels of each.
static void mols_build(Mols *m, size_t B, int n_labels) {
    size_t A = 0, P = 0, bonds = 0, squares = 0, E = 0, Y = (size_t)n_labels;
    for (size_t b = 0; b < B; b++) {
        size_t N = (size_t)m->molecule[b].n_atoms;
        A += N;
        P += N * (N + 1) / 2;
        squares += N * N;
        bonds += 2 * (size_t)m->molecule[b].n_bonds;
    }
    CHECK(A < INT_MAX / 1024 && squares < INT_MAX / 4, "a batch of %zu molecules with %zu atoms is "
          "too large; try a lower --batch-size", B, A);
    Store *store = &m->store;
#define X(type, field, count) m->field = store_take(store, sizeof(type), SHAPE(count));
    LAYOUT(MOLS_ARRAYS, X)
    m->N = 0;
    m->Y = n_labels;
    m->B = B;
    m->A = A;
    m->P = P;
    A = P = bonds = squares = 0;
    for (size_t b = 0; b <= B; b++) {
        m->atom_start[b] = A;
        m->pair_start[b] = P;
        if (b == B) break;
        size_t N = (size_t)(m->n_atoms[b] = m->molecule[b].n_atoms);
        m->N = max_int(m->N, (int)N);
        mols_set(m, b, bonds);
        A += N;
        P += N * (N + 1) / 2;
        bonds += 2 * (size_t)m->molecule[b].n_bonds;
        m->bond_start[A] = bonds;
        mols_hops(m, b, m->hops + squares);
        squares += N * N;
    }
    for (size_t i = 0; i <= A; i++) {  // from counts to places
        size_t count = i < A ? m->edge_start[i] : 0;
        m->edge_start[i] = E;
        E += count;
    }
    m->E = E;
    store = &m->edge_store;
    LAYOUT(EDGE_ARRAYS, X)
#undef X
    squares = 0;
    for (size_t b = 0; b < B; b++) {
        mols_edges(m, b, m->hops + squares);
        squares += (size_t)m->n_atoms[b] * (size_t)m->n_atoms[b];
    }
}

// Room for B molecules as read.
static void mols_reserve(Mols *m, size_t B) {
    if (B <= m->molecule_room) return;
    m->molecule = xrealloc(m->molecule, B, sizeof *m->molecule);
    memset(m->molecule + m->molecule_room, 0, (B - m->molecule_room) * sizeof *m->molecule);
    m->molecule_room = B;
}

// Reads molecules ids[0..B) of a dataset into a batch. Dies if a record is damaged.
static void mols_load(Mols *m, const Dataset *data, const uint32_t *ids, size_t B, int n_labels) {
    size_t bad = B;  // first molecule that cannot be read
    mols_reserve(m, B);
#pragma omp parallel for schedule(dynamic) reduction(min : bad)
    for (size_t b = 0; b < B; b++)
        if (dataset_try(data, ids[b], &m->molecule[b])) bad = b < bad ? b : bad;
    if (bad < B) dataset_read(data, ids[bad], &m->molecule[bad]);  // dies
    mols_build(m, B, n_labels);
}

// =================================================================================================
// 2 Layers, and the parameters made of them. Parameters, gradients and Adam's moments are arenas of
//   one layout. The tables of all tensors, official names and initial values are in section 12.
// =================================================================================================

typedef struct { int in, out; float *w, *b; } Linear;              // w (out, in), b (out) or NULL
typedef struct { int n; float *w, *b, *mean, *var; } BatchNorm;    // mean, var: running statistics
typedef struct { int n; float *w, *b; } LayerNorm;

// Tensors that are updated at the rate lr, at lr * scale3d, and not at all (no gradient).
typedef enum { GROUP_2D, GROUP_3D, GROUP_FIXED, GROUPS } Group;

// ---- linear maps of a whole batch: out (rows, l->out) = x (rows, l->in) w^T + b

static void apply(float *out, const float *x, const Linear *l, size_t rows) {
    gemm(0, 1, (int)rows, l->out, l->in, x, l->in, l->w, l->in, l->b, 0, out, l->out);
}

// Gradients of weight and bias; dx (may be NULL) = dout w, + dx if add. dx may be x.
static void apply_backward(float *dx, int add, Linear *g, const float *dout,
                           const float *x, const Linear *l, size_t rows) {
    int n = (int)rows;
    gemm(1, 0, l->out, l->in, n, dout, l->out, x, l->in, NULL, 0, g->w, l->in);
    if (l->b) column_sums(g->b, dout, l->out, n, l->out);
    if (dx) gemm(0, 0, n, l->in, l->out, dout, l->out, l->w, l->in, NULL, add, dx, l->in);
}

// ---- element by element: silu(x) = x / (1 + e^-x), ssp(x) = log(1 + e^x) - log 2,
//      elu(x) = x if x > 0 else e^x - 1

typedef enum { SILU, SSP, ELU, TANH } Kind;

// act(x), and its slope there.
ALWAYS_INLINE float act(Kind kind, float x) {
    float e = exp_fast(kind == ELU ? x : -fabsf(x));
    switch (kind) {
        case SILU: return x * sigmoid_fast(x);
        case SSP: return (x > 0 ? x : 0.0f) + log_fast(1.0f + e) - 0.693147181f;
        case ELU: return x > 0 ? x : e - 1.0f;
        default: return tanh_fast(x);
    }
}

ALWAYS_INLINE float act_slope(Kind kind, float x) {
    float y = kind == TANH ? tanh_fast(x) : sigmoid_fast(x);
    switch (kind) {
        case SILU: return y * (1.0f + x * (1.0f - y));
        case SSP: return y;
        case ELU: return x > 0 ? 1.0f : exp_fast(x);
        default: return 1.0f - y * y;
    }
}

enum { ACT_CHUNK = 4096 };

#ifdef __TINYC__
#define _Pragma(text)  // tcc 0.9.27 does not know it
#endif

// A loop of its own for each kind, which compilers vectorise.
#define ACT_LOOPS(statement)                                                                       \
    _Pragma("omp parallel for schedule(static)")                                                   \
    for (size_t first = 0; first < n; first += ACT_CHUNK) {                                        \
        size_t end = n - first < ACT_CHUNK ? n : first + ACT_CHUNK, k;                             \
        switch (kind) {                                                                            \
            case SILU: _Pragma("omp simd") for (k = first; k < end; k++) statement(SILU); break;   \
            case SSP: _Pragma("omp simd") for (k = first; k < end; k++) statement(SSP); break;     \
            case ELU: _Pragma("omp simd") for (k = first; k < end; k++) statement(ELU); break;     \
            case TANH: _Pragma("omp simd") for (k = first; k < end; k++) statement(TANH); break;   \
        }                                                                                          \
    }

// out = act(pre); d *= act'(pre).
static void act_forward(Kind kind, float *out, const float *pre, size_t n) {
#define FORWARD(kind) out[k] = act(kind, pre[k])
    ACT_LOOPS(FORWARD)
}

static void act_backward(Kind kind, float *d, const float *pre, size_t n) {
#define BACKWARD(kind) d[k] *= act_slope(kind, pre[k])
    ACT_LOOPS(BACKWARD)
}

// ---- MLP: linear maps l[0..layers) with an activation between them. hidden[k] keeps what map k
//      gives, before and after the activation, (rows, l[k].out)

enum { MLP_LAYERS = 3 };
typedef struct { float *pre, *act; } Hidden;

static void mlp_forward(float *out, Hidden *hidden, const float *x, const Linear *l,
                        int layers, Kind kind, size_t rows) {
    for (int k = 0; k + 1 < layers; k++) {
        apply(hidden[k].pre, x, &l[k], rows);
        act_forward(kind, hidden[k].act, hidden[k].pre, rows * (size_t)l[k].out);
        x = hidden[k].act;
    }
    apply(out, x, &l[layers - 1], rows);
}

// From dout to the gradients of all maps and dx (may be NULL), as apply_backward(). hidden[k].act
// is used up.
static void mlp_backward(float *dx, int add, Linear *g, const float *dout, const float *x,
                         Hidden *hidden, const Linear *l, int layers, Kind kind, size_t rows) {
    for (int k = layers - 1; k > 0; k--) {
        float *act = hidden[k - 1].act;  // forward: out = map(act), act = act(pre)
        apply_backward(act, 0, &g[k], dout, act, &l[k], rows);
        act_backward(kind, act, hidden[k - 1].pre, rows * (size_t)l[k].in);
        dout = act;
    }
    apply_backward(dx, add, &g[0], dout, x, &l[0], rows);
}

// ---- batch normalisation, per column over all rows: hat = (in - mean) / sqrt(variance + eps),
//      out = hat w + b, max(0, out) if relu

enum { STRIP = 32 };          // columns that a thread takes at a time
#define STATISTICS_RATE 0.1   // of the running statistics

// Mean and variance of a strip's columns: of the rows, which move the running ones, or in
// evaluation the running ones.
static void batch_norm_statistics(double mean[STRIP], double var[STRIP], const float *in,
                                  const BatchNorm *bn, int c0, int width, size_t rows,
                                  int training) {
    for (int c = 0; c < width; c++) {
        mean[c] = training ? 0 : (double)bn->mean[c0 + c];
        var[c] = training ? 0 : (double)bn->var[c0 + c];
    }
    if (!training) return;
    for (size_t r = 0; r < rows; r++)
        for (int c = 0; c < width; c++) mean[c] += (double)in[r * (size_t)bn->n + (size_t)(c0 + c)];
    for (int c = 0; c < width; c++) mean[c] /= (double)rows;
    for (size_t r = 0; r < rows; r++)
        for (int c = 0; c < width; c++) {
            double d = (double)in[r * (size_t)bn->n + (size_t)(c0 + c)] - mean[c];
            var[c] += d * d;
        }
    for (int c = 0; c < width; c++) {
        double unbiased = var[c] / (double)max_size(rows - 1, 1);
        var[c] /= (double)rows;
        bn->mean[c0 + c] += (float)(STATISTICS_RATE * (mean[c] - (double)bn->mean[c0 + c]));
        bn->var[c0 + c] += (float)(STATISTICS_RATE * (unbiased - (double)bn->var[c0 + c]));
    }
}

// hat may be in. rstd (n) is saved. Without rows nothing happens.
static void batch_norm_forward(float *out, float *hat, float *rstd, const float *in,
                               const BatchNorm *bn, size_t rows, int training, int relu) {
    size_t n = (size_t)bn->n;
    if (rows == 0) return;
#pragma omp parallel for schedule(static)
    for (int c0 = 0; c0 < bn->n; c0 += STRIP) {
        double mean[STRIP], var[STRIP];
        float centre[STRIP], low = relu ? 0.0f : -FLT_MAX;
        int width = min_int(STRIP, bn->n - c0);
        batch_norm_statistics(mean, var, in, bn, c0, width, rows, training);
        for (int c = 0; c < width; c++) {
            centre[c] = (float)mean[c];
            rstd[c0 + c] = (float)(1 / sqrt(var[c] + (double)NORM_EPS));
        }
        for (size_t r = 0; r < rows; r++)
            for (size_t c = 0, k = r * n + (size_t)c0; c < (size_t)width; c++, k++) {
                hat[k] = (in[k] - centre[c]) * rstd[(size_t)c0 + c];
                float x = hat[k] * bn->w[(size_t)c0 + c] + bn->b[(size_t)c0 + c];
                out[k] = x > low ? x : low;
            }
    }
}

// dw (n) = sum over the rows of dout * hat, db (n) = sum of dout: the gradients of both norms.
static void norm_sums(float *dw, float *db, const float *dout, const float *hat, size_t rows,
                      int n) {
#pragma omp parallel for schedule(static)
    for (int c0 = 0; c0 < n; c0 += STRIP) {
        double product[STRIP] = {0}, sum[STRIP] = {0};
        int width = min_int(STRIP, n - c0);
        for (size_t r = 0; r < rows; r++)
            for (int c = 0; c < width; c++) {
                size_t k = r * (size_t)n + (size_t)(c0 + c);
                product[c] += (double)dout[k] * (double)hat[k];
                sum[c] += (double)dout[k];
            }
        for (int c = 0; c < width; c++) {
            dw[c0 + c] = (float)product[c];
            db[c0 + c] = (float)sum[c];
        }
    }
}

// d (rows, n), the gradient of out, becomes that of in. out: of the forward pass if it had a relu,
// else NULL.
static void batch_norm_backward(float *d, BatchNorm *g, const float *out, const float *hat,
                                const float *rstd, const BatchNorm *bn, size_t rows) {
    size_t n = (size_t)bn->n;
#pragma omp parallel for schedule(static)
    for (size_t r = 0; r < (out ? rows : 0); r++)  // forward: out = max(0, out)
        for (size_t k = r * n; k < (r + 1) * n; k++) d[k] = out[k] > 0 ? d[k] : 0.0f;
    norm_sums(g->w, g->b, d, hat, rows, bn->n);
    float share = 1.0f / (float)max_size(rows, 1);
#pragma omp parallel for schedule(static)
    for (size_t r = 0; r < rows; r++)  // forward: out = hat w + b, hat = (in - mean) rstd
        for (size_t c = 0, k = r * n; c < n; c++, k++)
            d[k] = rstd[c] * bn->w[c] * (d[k] - share * (g->b[c] + hat[k] * g->w[c]));
}

// ---- layer normalisation of a branch: out = residual + hat w + b, hat of the row. hat may be in

static void layer_norm_forward(float *out, float *hat, float *rstd, const float *residual,
                               const float *in, const LayerNorm *ln, size_t rows) {
    size_t n = rows * (size_t)ln->n;
    norm_forward(out, hat, rstd, in, ln->n, ln->w, ln->b, (idx)rows, ln->n, NORM_EPS);
#pragma omp parallel for simd schedule(static)
    for (size_t k = 0; k < n; k++) out[k] += residual[k];
}

// din (rows, n) from dout, which also is the gradient of the residual.
static void layer_norm_backward(float *din, LayerNorm *g, const float *dout, const float *hat,
                                const float *rstd, const LayerNorm *ln, size_t rows) {
    size_t n = (size_t)ln->n;
    norm_sums(g->w, g->b, dout, hat, rows, ln->n);
#pragma omp parallel for schedule(static)
    for (size_t r = 0; r < rows; r++) {
        const float *dout_r = dout + r * n, *hat_r = hat + r * n;
        float sum = 0, product = 0;
        for (size_t c = 0; c < n; c++) {
            sum += dout_r[c] * ln->w[c];
            product += dout_r[c] * ln->w[c] * hat_r[c];
        }
        for (size_t c = 0; c < n; c++)  // forward: hat = (in - mean) rstd
            din[r * n + c] = rstd[r] * (dout_r[c] * ln->w[c] -
                                        (sum + hat_r[c] * product) / (float)n);
    }
}

// ---- the sizes of the networks

typedef struct {
    int dim, layers, filters, gaussians, blocks;      // D, L, F, K, T
    int hidden, width, channels, last_channels;       // H, W, and C of the layers of 3D -> 2D
    int gate;               // 1: the edges of 2D -> 3D are gated by their length (_02); 0: _01
    int tasks;              // of a fine-tuned model, which has one encoder and a head; 0: none
    int use_3d;             // its encoder: 0 GIN, 1 SchNet
} Shape;

enum { MAX_DEPTH = 32, HEADS = 8, MODULES = 2, COEFFICIENTS = 128, EDGE_LAYERS = 4,
       MAX_CHANNELS = 32, NODE_LAYERS = 4, ATTENTIONS = 2 * MODULES };

typedef struct {
    float *bond;                                      // (13, D) rows of three features
    float *eps;                                       // (1)
    Linear in, out;                                   // W1 (2D, D), W2 (D, 2D)
    BatchNorm norm_in, norm_out;
} GinLayer;

typedef struct { float *atom; GinLayer layer[MAX_DEPTH]; } Gin;  // atom (174, D): nine features

typedef struct {
    Linear filter[2], lift;                           // Wa, Wb; Wl without bias
    Linear out[2];                                    // Wm, Wo
} SchnetBlock;

typedef struct { float *atom; SchnetBlock block[MAX_DEPTH]; Linear out[2]; } Schnet;

typedef struct {
    Linear maps;                                      // (4H, H): query, key, value, skip
    Linear edge;                                      // We, without bias
    Linear ffn[2];
    LayerNorm norm1, norm2;
} Attention;

typedef struct {
    Linear node, edge_in, edge_out;                   // Wn; Wi (D, 2D), Wo
    BatchNorm edge_norm;
    float *gate_wave, *frame_wave;                    // (H) fixed frequencies
    Linear gate, frame;                               // Wd, Wc
    Linear project[2];                                // first (H, 2H + 2)
    Attention layer[ATTENTIONS];
    Linear basis[MODULES][2];                         // first (128, 2H)
} To3d;

typedef struct {
    Linear first;                                     // (C * 4W, in): of each channel query and key
    Linear second[2 * MAX_CHANNELS];                  // (2W, 2W)
    float *value_w, *value_b;                         // (C, in, W), (C, W): maps x @ w
    Linear nodes[2], pairs[3];                        // multi_channel, mlp
} EdgeLayer;

typedef struct {
    Linear embed_x, embed_y;
    EdgeLayer edge[EDGE_LAYERS];
    Linear pairs[3];                                  // edge_score_network.final
    float *node_w[NODE_LAYERS], *node_b[NODE_LAYERS]; // (in, W), (W): maps x @ w
    Linear nodes[3];                                  // node_score_network.final
} To2d;

// Parameters, or their gradients.
typedef struct { Gin gin; Schnet schnet; To3d to3d; To2d to2d; Linear head; } Nets;

// Channels of the adjacency matrices S_0..S_4 of 3D -> 2D, and where they begin in a row of all.
static int to2d_channels(const Shape *c, int l) {
    return l == 0 ? 2 : l == EDGE_LAYERS ? c->last_channels : c->channels;
}
static int to2d_offset(const Shape *c, int l) { return l == 0 ? 0 : 2 + (l - 1) * c->channels; }
static int to2d_all_channels(const Shape *c) {  // of S_0..S_4
    return to2d_offset(c, EDGE_LAYERS) + c->last_channels;
}
static int to2d_all_nodes(const Shape *c) { return c->dim + NODE_LAYERS * c->width; }

// ---- all that one training step touches

// How noise grows with time t, section 6.
typedef struct { double low, high; } Range;

typedef struct {
    int vp;                   // variance preserving (else exploding)
    Range ve3d, ve2d, beta;   // standard deviations of 2D -> 3D and of 3D -> 2D; of VP, both
    double anneal;            // losses are weighted with sigma^anneal
    double attention_dropout; // of 2D -> 3D
    double dropout;           // of the GIN, in fine-tuning
    double contrast, to3d, to2d;  // weights of the losses
} Method;

enum { TERM_TOTAL, TERM_CONTRAST, TERM_3D, TERM_ELEMENTS, TERM_BONDS, TERM_ACCURACY, TERMS };
static const char *const TERM_NAMES[TERMS] = {"total", "contrast", "2d->3d", "elements", "bonds",
                                              "accuracy"};

enum {  // purposes of random draws, beside those of moleblend.h
    RNG_PERM = 1 << 12, RNG_PERM_BACK, RNG_TIME_3D, RNG_TIME_2D, RNG_POSITION, RNG_ADJACENCY,
    RNG_ELEMENT, RNG_SAMPLE, RNG_CORRECTOR, RNG_PREDICTOR,
    RNG_GIN_DROP = 17 << 8,   // + layer
    RNG_ALPHA_DROP = 18 << 8, RNG_FEED_DROP = 19 << 8,
};

// Arrays of all sections, to come back to. X(field, count in floats). An array that begins with a
// number of layers holds one after the other. hidden: of an MLP, with room before and after the
// activation. Ct: channels of S_0..S_4; Cn: D + 4 W; Cmax: most channels of a layer; R = 2 Cmax.
#define BUFFER_ARRAYS(X, HIDDEN)                                                                   \
    X(dx, A *D)                              /* of the GIN's output */                             \
    X(dy, A *D)                              /* of the SchNet's */                                 \
    /* 3: what GIN saves, and gradients */                                                         \
    X(bond_vector, L *BOND_CODES *D)         /* of every bond code */                              \
    X(gin_h, (L + 1) * A *D)                 /* input of every layer, and X */                     \
    X(gin_u, L *A *D)                                                                              \
    X(gin_hat1, L *A * 2 * D)                                                                      \
    X(gin_rstd1, L * 2 * D)                                                                        \
    X(gin_act, L *A * 2 * D)                                                                       \
    X(gin_hat2, L *A *D)                                                                           \
    X(gin_rstd2, L *D)                                                                             \
    X(dgin_act, A * 2 * D)                                                                         \
    X(dgin_u, A *D)                                                                                \
    X(dbond_vector, BOND_CODES *D)                                                                 \
    X(atom_dot, A)                                                                                 \
    /* 4: SchNet */                                                                                \
    X(gauss, P *K)                                                                                 \
    X(cutoff, P)                                                                                   \
    HIDDEN(filter_hidden, T, P *F)                                                                 \
    X(filter, T *P *F)                                                                             \
    X(schnet_h, (T + 1) * A *D)              /* input of every block, and of the last map */       \
    X(lifted, T *A *F)                       /* Wl h */                                            \
    X(message, T *A *F)                                                                            \
    HIDDEN(schnet_hidden, T, A *D)                                                                 \
    HIDDEN(y_hidden, 1, A *D)                                                                      \
    X(y, A *D)                                                                                     \
    X(dmessage, A *F)                                                                              \
    X(dlifted, A *F)                                                                               \
    X(dfilter, P *F)                                                                               \
    /* 5: contrast, (3, A) each: X_i Y_i / T, X_i Y_pi(i) / T, Y_i X_pi'(i) / T */                 \
    X(dot, 3 * A)                                                                                  \
    /* 7: 2D -> 3D */                                                                              \
    X(axes, E * 9)                           /* a, b, c */                                         \
    X(angle, E * 2)                          /* sin, cos */                                        \
    X(wave, E * 8 * H)                       /* (2E, 4H) of the sender, of the receiver */         \
    X(phi, E * 2 * H)                                                                              \
    HIDDEN(frame_hidden, 1, E *H)                                                                  \
    X(frame, E *H)                           /* f */                                               \
    X(length_wave, E * 2 * H)                                                                      \
    X(gate, E *H)                                                                                  \
    X(x_from, A *D)                          /* Wi' X_s, Wi'' X_d + bi */                          \
    X(x_to, A *D)                                                                                  \
    X(edge_hat, E *D)                                                                              \
    X(edge_rstd, D)                                                                                \
    X(edge_act, E *D)                                                                              \
    X(dedge_act, E *D)                                                                             \
    X(graph, E *H)                           /* g */                                               \
    X(edge, E *H)                            /* e */                                               \
    X(node, (ATTENTIONS + 1) * A *H)  /* u_0..u_4 */                                        \
    X(maps, ATTENTIONS *A * 4 * H)    /* query, key, value, skip */                         \
    X(edge_map, ATTENTIONS *E *H)     /* e' */                                              \
    X(alpha, ATTENTIONS *E *HEADS)                                                          \
    X(dropped, E *HEADS)                                                                           \
    X(norm1_hat, ATTENTIONS *A *H)                                                          \
    X(norm1_rstd, ATTENTIONS *A)                                                            \
    X(mid, ATTENTIONS *A *H)                                                                \
    HIDDEN(feed_hidden, ATTENTIONS, A *H)                                                   \
    X(norm2_hat, ATTENTIONS *A *H)                                                          \
    X(norm2_rstd, ATTENTIONS *A)                                                            \
    X(node_sum, ATTENTIONS *A *H)     /* before the silu */                                 \
    X(basis_node, A *COEFFICIENTS)                                                                 \
    HIDDEN(basis_hidden, MODULES, E *COEFFICIENTS)                                                 \
    X(coefficient, MODULES *E * 3)                                                                 \
    X(eps_hat, A * 3)                                                                              \
    X(deps_hat, A * 3)                                                                             \
    X(dcoefficient, E * 3)                                                                         \
    X(dnode, A *H)                                                                                 \
    X(dbranch, A *H)                                                                               \
    X(dmaps, A * 4 * H)                                                                            \
    X(dedge_map, E *H)                                                                             \
    X(dedge, E *H)                                                                                 \
    X(dgate, E *H)                                                                                 \
    X(dphi, E * 2 * H)                                                                             \
    /* 8: 3D -> 2D; nodes (A, D + 4 W): G_0 = H^0, G_1..G_4 side by side */                        \
    X(nodes, A *Cn)                                                                                \
    X(node_map, NODE_LAYERS *A *W)                                                                 \
    HIDDEN(nodes_hidden, 2, A * 2 * Cn)                                                            \
    X(m_x, A *V)                                                                                   \
    X(adjacency, P *Ct)                      /* S_0..S_4 of a pair, side by side */                \
    X(edge_h, (EDGE_LAYERS - 1) * A *W)      /* H^1..H^3 */                                        \
    HIDDEN(qk_hidden, EDGE_LAYERS, A *Cmax * 4 * W)                                                \
    X(qk, EDGE_LAYERS *A *Cmax * 4 * W)                                                            \
    X(value_map, EDGE_LAYERS *A *Cmax *W)    /* H W of each channel */                             \
    X(value, EDGE_LAYERS *A *Cmax *W)                                                              \
    HIDDEN(value_hidden, EDGE_LAYERS, A *R)                                                        \
    X(pair_in, EDGE_LAYERS *P * 2 * Cmax)    /* T_1..T_C, S_1..S_C */                              \
    HIDDEN(pair_hidden, EDGE_LAYERS * 2, P *R)                                                     \
    X(pair_out, P *Cmax)                     /* M */                                               \
    HIDDEN(pairs_hidden, 2, P * 2 * Ct)                                                            \
    X(m_adj, P)                                                                                    \
    X(dm_x, A *V)                                                                                  \
    X(dm_adj, P)                                                                                   \
    X(dnodes, A *Cn)                                                                               \
    X(dadjacency, P *Ct)                                                                           \
    X(dpair_in, P * 2 * Cmax)                                                                      \
    X(dqk, A *Cmax * 4 * W)                                                                        \
    X(dvalue, A *Cmax *W)                                                                          \
    X(dvalue_map, A *Cmax *W)                                                                      \
    X(dedge_h, A *W)                                                                               \
    /* 11: fine-tuning */                                                                          \
    X(pooled, B *D)                                                                                \
    X(dpooled, B *D)                                                                               \
    X(logits, B *Y)                                                                                \
    X(dlogits, B *Y)

typedef struct {
#define X(field, count) float *field;
#define HIDDEN(field, layers, count) Hidden field[MAX_DEPTH];
    BUFFER_ARRAYS(X, HIDDEN)
#undef X
#undef HIDDEN
    float *x;              // (A, D) the GIN's output: the last of gin_h
    size_t scratch;        // floats that a task takes
    Store store;
} Buffers;

typedef struct {
    Shape shape;
    Model model;           // the arenas; of moleblend.c, as what Adam knows of a model
    size_t group_end[GROUPS];
    Nets p, g;
    Buffers a;
    Mols mols;
    Method method;
    Draws draws;           // active: dropout
    int training;          // batch statistics in BN, else running ones
    int no_pairs, no_edges;  // no memory for what runs on pairs (SchNet, 3D -> 2D), on edges
} Sde;

// What most functions that follow are about: the batch and its arrays.
#define PARTS(s)                                                                                   \
    const Mols *m = &(s)->mols;                                                                    \
    Buffers *a = &(s)->a

// Room for the activations of the batch at hand, with a vector behind the end of each array.
static void buffers_layout(Sde *s) {
    const Shape *c = &s->shape;
    Buffers *a = &s->a;
    Store *store = &a->store;
    const idx B = (idx)s->mols.B, A = (idx)s->mols.A, N = s->mols.N, D = c->dim, L = c->layers;
    const idx P = s->no_pairs ? 0 : (idx)s->mols.P, E = s->no_edges ? 0 : (idx)s->mols.E;
    const idx F = c->filters, K = c->gaussians, T = c->blocks, H = c->hidden, Y = c->tasks;
    const idx W = c->width, Ct = to2d_all_channels(c), Cn = to2d_all_nodes(c);
    const idx Cmax = max_int(2, c->channels), R = 2 * max_int((int)Cmax, c->last_channels);
#define X(field, count) a->field = store_take(store, sizeof(float), SHAPE((count) + VEC));
#define HIDDEN(field, layers, count)                                                               \
    for (idx k = 0; k < (layers); k++) {                                                           \
        X(field[k].pre, count)                                                                     \
        X(field[k].act, count)                                                                     \
    }
    for (int pass = 0; pass < 2; pass++) {
        store_begin(store, pass);
        BUFFER_ARRAYS(X, HIDDEN)
    }
#undef X
#undef HIDDEN
    a->x = a->gin_h + L * A * D;
    a->scratch = (size_t)(N * (3 * N + 3) + 2 * (2 * W + 1) * padded(N));
}

// x (A, n), or if edges x (E, n): numbers become 0 with probability p, else are scaled by
// 1 / (1 - p); the same in both passes.
static void drop_rows(float *x, int n, const Sde *s, int edges, double p, uint32_t purpose) {
    enum { MASKS = 256 };
    const Mols *m = &s->mols;
    if (!s->draws.active || p <= 0) return;
#pragma omp parallel for schedule(static)
    for (size_t b = 0; b < m->B; b++) {
        size_t first = m->atom_start[b], end = m->atom_start[b + 1];
        if (edges) first = m->edge_start[first], end = m->edge_start[end];
        float mask[MASKS], *x_b = x + first * (size_t)n;
        size_t all = (end - first) * (size_t)n;
        for (size_t k = 0; k < all; k += MASKS) {
            dropout_row(mask, MASKS, p, &s->draws, purpose, s->draws.first_slot + (uint32_t)b,
                        (uint32_t)(k / MASKS));
            size_t count = min_size(all - k, MASKS);
            for (size_t i = 0; i < count; i++) x_b[k + i] *= mask[i];
        }
    }
}

// =================================================================================================
// 3 The 2D encoder, a GIN. h_i = sum of an atom's nine table rows, then in each layer l
//     u_i = (1 + eps) h_i + sum over bonds j - i of max(0, h_j + bond_vector[code])
//     h'  = BN(W2 max(0, BN(W1 u + b1)) + b2), max(0, .) but in the last layer, dropout
// =================================================================================================

// Rows of the atom table of an atom's features.
static void atom_rows(size_t row[ATOM_FEATURES], const uint8_t *feature) {
    for (size_t f = 0, first = 0; f < ATOM_FEATURES; first += ATOM_FEATURE_SIZES[f++])
        row[f] = first + feature[f];
}

// Rows of a layer's bond table of a bond code.
static void table_rows_of_bond(size_t row[BOND_FEATURES], int code) {
    row[0] = (size_t)(code / 12);
    row[1] = (size_t)(BOND_TYPES + code / 2 % 6);
    row[2] = (size_t)(BOND_TYPES + BOND_STEREOS + code % 2);
}

// u (A, D) of a layer from its input h (A, D); vector (60, D) of the bond codes.
static void gin_messages_forward(float *u, float *vector, const Sde *s, const float *h,
                                 const GinLayer *p) {
    const Mols *m = &s->mols;
    size_t D = (size_t)s->shape.dim;
    for (int code = 0; code < BOND_CODES; code++) {
        size_t row[BOND_FEATURES];
        table_rows_of_bond(row, code);
        for (size_t c = 0; c < D; c++)
            vector[(size_t)code * D + c] =
                p->bond[row[0] * D + c] + p->bond[row[1] * D + c] + p->bond[row[2] * D + c];
    }
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < m->A; i++) {
        float *u_i = u + i * D;
        for (size_t c = 0; c < D; c++) u_i[c] = (1.0f + p->eps[0]) * h[i * D + c];
        for (size_t k = m->bond_start[i]; k < m->bond_start[i + 1]; k++) {
            const float *h_j = h + m->bond_to[k] * D, *bond = vector + m->bond_code[k] * D;
            for (size_t c = 0; c < D; c++) u_i[c] += h_j[c] + bond[c] > 0 ? h_j[c] + bond[c] : 0.0f;
        }
    }
}

// From du (A, D) to dh (A, D), eps and the bond table. The bonds of an atom are the same in both
// directions: what j heard from i stands among the bonds of i.
static void gin_messages_backward(float *dh, Sde *s, const float *du, const float *h,
                                  const float *vector, const GinLayer *p, GinLayer *g) {
    PARTS(s);
    size_t D = (size_t)s->shape.dim;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < m->A; i++) {
        const float *h_i = h + i * D, *du_i = du + i * D;
        float *dh_i = dh + i * D;
        double dot = 0;
        for (size_t c = 0; c < D; c++) dot += (double)du_i[c] * (double)h_i[c];
        a->atom_dot[i] = (float)dot;  // forward: u_i = (1 + eps) h_i + ...
        for (size_t c = 0; c < D; c++) dh_i[c] = (1.0f + p->eps[0]) * du_i[c];
        for (size_t k = m->bond_start[i]; k < m->bond_start[i + 1]; k++) {
            const float *du_j = du + m->bond_to[k] * D, *bond = vector + m->bond_code[k] * D;
            for (size_t c = 0; c < D; c++)  // forward: u_j += max(0, h_i + bond)
                dh_i[c] += h_i[c] + bond[c] > 0 ? du_j[c] : 0.0f;
        }
    }
    double deps = 0;
    for (size_t i = 0; i < m->A; i++) deps += (double)a->atom_dot[i];
    g->eps[0] = (float)deps;
    memset(a->dbond_vector, 0, sizeof(float) * BOND_CODES * D);
    memset(g->bond, 0, sizeof(float) * BOND_TABLE_ROWS * D);
#pragma omp parallel for schedule(static)
    for (size_t c0 = 0; c0 < D; c0 += STRIP) {
        size_t c1 = D - c0 < STRIP ? D : c0 + STRIP;
        for (size_t i = 0; i < m->A; i++)
            for (size_t k = m->bond_start[i]; k < m->bond_start[i + 1]; k++) {
                const float *h_j = h + m->bond_to[k] * D, *bond = vector + m->bond_code[k] * D;
                float *dbond = a->dbond_vector + m->bond_code[k] * D;
                for (size_t c = c0; c < c1; c++)
                    dbond[c] += h_j[c] + bond[c] > 0 ? du[i * D + c] : 0.0f;
            }
        for (int code = 0; code < BOND_CODES; code++) {
            size_t row[BOND_FEATURES];
            table_rows_of_bond(row, code);
            for (int f = 0; f < BOND_FEATURES; f++)  // forward: vector = sum of three rows
                for (size_t c = c0; c < c1; c++)
                    g->bond[row[f] * D + c] += a->dbond_vector[(size_t)code * D + c];
        }
    }
}

// X (A, D), the last of gin_h.
static void gin_forward(Sde *s) {
    PARTS(s);
    size_t D = (size_t)s->shape.dim, AD = m->A * D;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < m->A; i++) {
        size_t row[ATOM_FEATURES];
        atom_rows(row, m->atom_feat + i * ATOM_FEATURES);
        for (size_t c = 0; c < D; c++) {
            float sum = 0;
            for (int f = 0; f < ATOM_FEATURES; f++) sum += s->p.gin.atom[row[f] * D + c];
            a->gin_h[i * D + c] = sum;
        }
    }
    for (int l = 0; l < s->shape.layers; l++) {
        const GinLayer *p = &s->p.gin.layer[l];
        size_t at = (size_t)l * AD, codes = (size_t)l * BOND_CODES * D;
        float *hat1 = a->gin_hat1 + 2 * at, *hat2 = a->gin_hat2 + at, *next = a->gin_h + at + AD;
        gin_messages_forward(a->gin_u + at, a->bond_vector + codes, s, a->gin_h + at, p);
        apply(hat1, a->gin_u + at, &p->in, m->A);
        batch_norm_forward(a->gin_act + 2 * at, hat1, a->gin_rstd1 + 2 * (size_t)l * D, hat1,
                           &p->norm_in, m->A, s->training, 1);
        apply(hat2, a->gin_act + 2 * at, &p->out, m->A);
        batch_norm_forward(next, hat2, a->gin_rstd2 + (size_t)l * D, hat2, &p->norm_out, m->A,
                           s->training, l + 1 < s->shape.layers);
        drop_rows(next, (int)D, s, 0, s->method.dropout, RNG_GIN_DROP + (uint32_t)l);
    }
}

// From dx (A, D), which is used up, to all gradients of the GIN.
static void gin_backward(Sde *s) {
    PARTS(s);
    size_t D = (size_t)s->shape.dim, AD = m->A * D;
    float *d = a->dx;
    for (int l = s->shape.layers - 1; l >= 0; l--) {
        const GinLayer *p = &s->p.gin.layer[l];
        GinLayer *g = &s->g.gin.layer[l];
        size_t at = (size_t)l * AD;
        const float *next = l + 1 < s->shape.layers ? a->gin_h + at + AD : NULL;
        // forward: h' = dropout(BN(out(act))), act = relu(BN(in(u)))
        drop_rows(d, (int)D, s, 0, s->method.dropout, RNG_GIN_DROP + (uint32_t)l);
        batch_norm_backward(d, &g->norm_out, next, a->gin_hat2 + at, a->gin_rstd2 + (size_t)l * D,
                            &p->norm_out, m->A);
        apply_backward(a->dgin_act, 0, &g->out, d, a->gin_act + 2 * at, &p->out, m->A);
        batch_norm_backward(a->dgin_act, &g->norm_in, a->gin_act + 2 * at, a->gin_hat1 + 2 * at,
                            a->gin_rstd1 + 2 * (size_t)l * D, &p->norm_in, m->A);
        apply_backward(a->dgin_u, 0, &g->in, a->dgin_act, a->gin_u + at, &p->in, m->A);
        gin_messages_backward(d, s, a->dgin_u, a->gin_h + at,
                              a->bond_vector + (size_t)l * BOND_CODES * D, p, g);
    }
    memset(s->g.gin.atom, 0, sizeof(float) * ATOM_TABLE_ROWS * D);
#pragma omp parallel for schedule(static)
    for (size_t c0 = 0; c0 < D; c0 += STRIP)
        for (size_t i = 0; i < m->A; i++) {
            size_t row[ATOM_FEATURES], c1 = D - c0 < STRIP ? D : c0 + STRIP;
            atom_rows(row, m->atom_feat + i * ATOM_FEATURES);
            for (int f = 0; f < ATOM_FEATURES; f++)  // forward: h = sum of nine rows
                for (size_t c = c0; c < c1; c++) s->g.gin.atom[row[f] * D + c] += d[i * D + c];
        }
}

// =================================================================================================
// 4 The 3D encoder, a SchNet. h_i = row of its element, then in each block
//     f_ij = (Wb ssp(Wa g(d_ij) + ba) + bb) C(d_ij), C(d) = (cos(pi d / 10) + 1) / 2 below 10 A
//     m_i  = sum over j of (Wl h_j) * f_ij,   h_i += Wo ssp(Wm m_i + bm) + bo
//   and Y = L2 ssp(L1 h + c1) + c2. Filters are the same for (i, j) and (j, i): one a pair.
// =================================================================================================

#define CUTOFF 10.0f  // Angstrom

// gauss (P, K) and cutoff (P), 0 for an atom with itself and beyond 10 A.
static void schnet_distances(Sde *s) {
    int K = s->shape.gaussians;
    float width = CUTOFF / (float)(K - 1), scale = -0.5f / (width * width);
#pragma omp parallel for schedule(static)
    for (size_t b = 0; b < s->mols.B; b++) {
        Place v = place_of(&s->mols, b);
        FOR_PAIRS(v, i, j) {
            size_t p = pair_row(&v, i, j);
            float d = s->mols.distance[p], *g = s->a.gauss + p * (size_t)K;
            for (int k = 0; k < K; k++)
                g[k] = exp_fast(scale * (d - (float)k * width) * (d - (float)k * width));
            s->a.cutoff[p] = i == j || d >= CUTOFF ? 0.0f : 0.5f * (cosf(d * 0.314159265f) + 1);
        }
    }
}

// out (A, F): out_i = sum over j of x_j * filter_ij. Its own transpose, so dx_j is made of dout so.
static void schnet_convolve(float *out, const float *x, const float *filter, const Sde *s) {
    size_t F = (size_t)s->shape.filters;
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < s->mols.B; b++) {
        Place v = place_of(&s->mols, b);
        for (int i = 0; i < v.N; i++) {
            float *out_i = out + (v.atom + (size_t)i) * F;
            memset(out_i, 0, sizeof(float) * F);
            for (int j = 0; j < v.N; j++) {
                const float *x_j = x + (v.atom + (size_t)j) * F;
                const float *f = filter + pair_row(&v, i, j) * F;
                for (size_t c = 0; j != i && c < F; c++) out_i[c] += x_j[c] * f[c];
            }
        }
    }
}

// dfilter (P, F) from dmessage: of the map before the cutoff.
static void schnet_filter_backward(float *dfilter, const float *dmessage, const float *x,
                                   const Sde *s) {
    size_t F = (size_t)s->shape.filters;
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < s->mols.B; b++) {
        Place v = place_of(&s->mols, b);
        FOR_PAIRS(v, i, j) {
            size_t p = pair_row(&v, i, j);
            const float *x_i = x + (v.atom + (size_t)i) * F, *x_j = x + (v.atom + (size_t)j) * F;
            const float *dm_i = dmessage + (x_i - x), *dm_j = dmessage + (x_j - x);
            for (size_t c = 0; c < F; c++)  // forward: m_i += x_j f_ij, m_j += x_i f_ij
                dfilter[p * F + c] = s->a.cutoff[p] * (dm_i[c] * x_j[c] + dm_j[c] * x_i[c]);
        }
    }
}

// Y (A, D).
static void schnet_forward(Sde *s) {
    PARTS(s);
    const Schnet *p = &s->p.schnet;
    size_t D = (size_t)s->shape.dim, F = (size_t)s->shape.filters, AD = m->A * D, AF = m->A * F;
    schnet_distances(s);
    for (size_t i = 0; i < m->A; i++)
        memcpy(a->schnet_h + i * D, p->atom + m->atom_feat[i * ATOM_FEATURES] * D,
               sizeof(float) * D);
    for (size_t k = 0; k < (size_t)s->shape.blocks; k++) {
        const SchnetBlock *block = &p->block[k];
        float *h = a->schnet_h + k * AD, *next = h + AD, *filter = a->filter + k * m->P * F;
        mlp_forward(filter, &a->filter_hidden[k], a->gauss, block->filter, 2, SSP, m->P);
#pragma omp parallel for schedule(static)
        for (size_t q = 0; q < m->P; q++)
            for (size_t c = 0; c < F; c++) filter[q * F + c] *= a->cutoff[q];
        apply(a->lifted + k * AF, h, &block->lift, m->A);
        schnet_convolve(a->message + k * AF, a->lifted + k * AF, filter, s);
        mlp_forward(next, &a->schnet_hidden[k], a->message + k * AF, block->out, 2, SSP, m->A);
        for (size_t c = 0; c < AD; c++) next[c] += h[c];
    }
    mlp_forward(a->y, a->y_hidden, a->schnet_h + (size_t)s->shape.blocks * AD, p->out, 2,
                SSP, m->A);
}

// From dy (A, D), which is used up, to all gradients of the SchNet.
static void schnet_backward(Sde *s) {
    PARTS(s);
    const Schnet *p = &s->p.schnet;
    Schnet *g = &s->g.schnet;
    size_t D = (size_t)s->shape.dim, F = (size_t)s->shape.filters, AD = m->A * D, AF = m->A * F;
    float *dh = a->dy;  // in its place
    mlp_backward(dh, 0, g->out, a->dy, a->schnet_h + (size_t)s->shape.blocks * AD,
                 a->y_hidden, p->out, 2, SSP, m->A);
    for (size_t k = (size_t)s->shape.blocks; k-- > 0;) {
        const SchnetBlock *block = &p->block[k];
        // forward: h' = h + out(message), message = lift(h) convolved with filter(gauss) cutoff
        mlp_backward(a->dmessage, 0, g->block[k].out, dh, a->message + k * AF,
                     &a->schnet_hidden[k], block->out, 2, SSP, m->A);
        schnet_convolve(a->dlifted, a->dmessage, a->filter + k * m->P * F, s);
        schnet_filter_backward(a->dfilter, a->dmessage, a->lifted + k * AF, s);
        apply_backward(dh, 1, &g->block[k].lift, a->dlifted, a->schnet_h + k * AD,
                       &block->lift, m->A);
        mlp_backward(NULL, 0, g->block[k].filter, a->dfilter, a->gauss,
                     &a->filter_hidden[k], block->filter, 2, SSP, m->P);
    }
    memset(g->atom, 0, sizeof(float) * V * D);
    for (size_t i = 0; i < m->A; i++)  // forward: h = row of the element
        for (size_t c = 0; c < D; c++)
            g->atom[m->atom_feat[i * ATOM_FEATURES] * D + c] += dh[i * D + c];
}

// =================================================================================================
// 5 Contrast (EBM-NCE): the vectors of an atom should agree, with those of another atom they should
//   not. pi and pi' are random permutations of the atoms of the batch, sp(x) = log(1 + e^x),
//     L = mean sp(-X_i Y_i / T) + mean sp(X_i Y_pi(i) / T) / 2 + mean sp(Y_i X_pi'(i) / T) / 2
// =================================================================================================

#define TEMPERATURE 0.1  // T

static double softplus(double x) { return fmax(x, 0) + log1p(exp(-fabs(x))); }
static double sigmoid_of(double x) { return 1 / (1 + exp(-x)); }

// Loss and accuracy; stores dx and dy (A, D).
static void contrast(double loss[TERMS], Sde *s) {
    PARTS(s);
    size_t D = (size_t)s->shape.dim, A = m->A;
    const uint32_t *other[3] = {NULL, m->perm, m->perm + A};
#pragma omp parallel for schedule(static)
    for (size_t k = 0; k < 3 * A; k++) {
        size_t i = k % A, j = k < A ? i : other[k / A][i];
        const float *one = (k < 2 * A ? a->x : a->y) + i * D;
        const float *two = (k < 2 * A ? a->y : a->x) + j * D;
        double sum = 0;
        for (size_t c = 0; c < D; c++) sum += (double)one[c] * (double)two[c];
        a->dot[k] = (float)(sum / TEMPERATURE);
    }
    double right = 0, total = 0, n = (double)A;
    for (size_t k = 0; k < 3 * A; k++) {
        double x = (double)a->dot[k];
        total += k < A ? softplus(-x) : softplus(x) / 2;
        right += k < A ? x > 0 : (x < 0) / 2.0;
    }
    loss[TERM_CONTRAST] = total / n;
    loss[TERM_ACCURACY] = right / (2 * n);
    double scale = s->method.contrast / (n * TEMPERATURE);
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < A; i++) {
        // the dot products that X_i is in, and with which Y; those of Y_i
        size_t back1 = m->inverse[i], back2 = m->inverse[A + i];
        const size_t dots[2][3] = {{i, A + i, 2 * A + back2}, {i, A + back1, 2 * A + i}};
        const size_t with[2][3] = {{i, m->perm[i], back2}, {i, back1, m->perm[A + i]}};
        for (int side = 0; side < 2; side++) {
            const float *theirs = side ? a->x : a->y;
            float *d = (side ? a->dy : a->dx) + i * D;
            memset(d, 0, sizeof(float) * D);
            for (int k = 0; k < 3; k++) {  // forward: sp(-dot), sp(dot) / 2, sp(dot) / 2
                double x = (double)a->dot[dots[side][k]];
                float slope = (float)(scale * (k ? sigmoid_of(x) / 2 : -sigmoid_of(-x)));
                for (size_t c = 0; c < D; c++) d[c] += slope * theirs[with[side][k] * D + c];
            }
        }
    }
}

// =================================================================================================
// 6 Noise: z_t = mu(t) z_0 + sigma(t) eps. Variance exploding (VE): mu = 1, sigma = s0 (s1/s0)^t;
//   preserving (VP): l = -t^2 (b1 - b0) / 4 - t b0 / 2, mu = e^l, sigma = sqrt(1 - e^(2l)).
//   A molecule has one time t for each direction; the networks are not told.
// =================================================================================================

enum { TIMES = 1000 };

static double vp_exponent(const Method *m, double t) {  // l
    return -t * t * (m->beta.high - m->beta.low) / 4 - t * m->beta.low / 2;
}

static double noise_mean(const Method *m, double t) { return m->vp ? exp(vp_exponent(m, t)) : 1; }

static double noise_sigma(const Method *m, const Range *ve, double t) {
    if (m->vp) return sqrt(-expm1(2 * vp_exponent(m, t)));
    return ve->low * pow(ve->high / ve->low, t);
}

// Draws permutations, times and noise. Half of the times are drawn, the rest is 999 minus these.
static void mols_draw(Sde *s) {
    static const uint32_t perm[2] = {RNG_PERM, RNG_PERM_BACK}, time[2] = {RNG_TIME_3D, RNG_TIME_2D};
    Mols *m = &s->mols;
    const Draws *draws = &s->draws;
    size_t half = m->B / 2 + 1;
    for (size_t k = 0; k < 2; k++) {
        rng_permutation(m->perm + k * m->A, m->A, draws->seed, perm[k], draws->step);
        for (size_t b = 0; b < m->B; b++) {
            float u = rng_uniform(draws->seed, time[k], draws->step, draws->first_slot,
                                  (uint32_t)(b % half));
            int drawn = min_int((int)(u * TIMES), TIMES - 1);
            m->time[k * m->B + b] = b < half ? drawn : TIMES - 1 - drawn;
        }
    }
#pragma omp parallel for schedule(static)
    for (size_t b = 0; b < m->B; b++) {
        Place v = place_of(m, b);
        size_t N = (size_t)v.N;
        uint32_t slot = draws->first_slot + (uint32_t)b;
        normal_row(m->noise + 3 * v.atom, 3 * N, draws, RNG_POSITION, slot);
        normal_row(m->noise_adj + v.pair, N * (N + 1) / 2, draws, RNG_ADJACENCY, slot);
        normal_row(m->noise_x + V * v.atom, V * N, draws, RNG_ELEMENT, slot);
    }
}

// Adds the noise: q (A, 3), adj (P), elements (A, V). An atom without bonds has neither of the
// last two, and their noise becomes 0; as that of an atom with itself.
static void mols_noised(Sde *s) {
    Mols *m = &s->mols;
    for (size_t k = 0; k < 2 * m->A; k++)
        m->inverse[k / m->A * m->A + m->perm[k]] = (uint32_t)(k % m->A);
#pragma omp parallel for schedule(static)
    for (size_t b = 0; b < m->B; b++) {
        Place v = place_of(m, b);
        for (size_t k = b; k < 2 * m->B; k += m->B) {
            double t = (double)m->time[k] / TIMES * (1 - 1e-6) + 1e-6;
            m->t[k] = (float)t;
            m->mu[k] = (float)noise_mean(&s->method, t);
            m->sigma[k] =
                (float)noise_sigma(&s->method, k < m->B ? &s->method.ve3d : &s->method.ve2d, t);
        }
        for (size_t k = 3 * v.atom; k < 3 * (v.atom + (size_t)v.N); k++)
            m->q[k] = m->mu[b] * m->pos[k] + m->sigma[b] * m->noise[k];
        float mu = m->mu[m->B + b], sigma = m->sigma[m->B + b];
        for (int j = 0; j < v.N; j++) {
            size_t atom = v.atom + (size_t)j;
            for (int i = 0; i <= j; i++) {
                size_t p = pair_row(&v, i, j);
                if (i == j || !m->bonded[atom] || !m->bonded[v.atom + (size_t)i])
                    m->noise_adj[p] = 0;
                m->adj[p] = mu * (float)m->bond_type[p] + sigma * m->noise_adj[p];
            }
            float *noise = m->noise_x + atom * V, *out = m->elements + atom * V;
            for (size_t c = 0; c < V; c++) {
                float one = c == m->atom_feat[atom * ATOM_FEATURES] ? mu : 0.0f;
                noise[c] = m->bonded[atom] ? noise[c] : 0.0f;
                out[c] = m->bonded[atom] ? one + sigma * noise[c] : 0.0f;
            }
        }
    }
}

// =================================================================================================
// 7 2D -> 3D: an SE(3)-equivariant score network says what noise is on the positions. Along every
//   edge s -> d of the extended graph stand three axes that turn with the molecule,
//     a = (q_s - q_d) / |.|,  b = (q_s x q_d) / |.|,  c = a x b;
//   numbers p that do not turn say how the positions lie in them; an attention over the edges, fed
//   with these and with X, gives three coefficients an edge: the noise is their sum along the axes.
//
//     p_s = (a q_s, |b q_s|, c q_s), p_d alike    G(y) = sin and cos of 2 pi y w, w fixed
//     f = MLP([sin, cos of the angle of p_s and p_d; phi(p_s); phi(p_d)]), phi = frame([G; G])
//     g = edge_out(max(0, BN(edge_in [X_s; X_d])))
//     e = gate(G(|q_s - q_d|)) * g + f   (_01: e = g + f)
// =================================================================================================

#define AXIS_EPS 1e-6

// ---- what is made of the positions. Data: no gradient goes there

// wave (2H) = G(y).
ALWAYS_INLINE void fourier(float *wave, float y, const float *frequency, int H) {
#pragma omp simd
    for (int h = 0; h < H; h++) turn_fast(&wave[h], &wave[H + h], y * frequency[h]);
}

static double dot3(const double x[3], const double y[3]) {
    return x[0] * y[0] + x[1] * y[1] + x[2] * y[2];
}

static void cross3(double out[3], const double x[3], const double y[3]) {
    for (int k = 0; k < 3; k++)
        out[k] = x[(k + 1) % 3] * y[(k + 2) % 3] - x[(k + 2) % 3] * y[(k + 1) % 3];
}

static void shorten3(double x[3]) {  // to length 1, almost
    double length = sqrt(dot3(x, x)) + AXIS_EPS;
    for (int k = 0; k < 3; k++) x[k] /= length;
}

// axes (9), angle (2) and wave (2, 4H) of an edge between positions qs and qd; returns its length.
static double to3d_frame(float *axes, float *angle, float *wave, const float *qs, const float *qd,
                         const float *frequency, int H) {
    double q[2][3], axis[3][3], p[2][3], length;
    for (int k = 0; k < 3; k++) {
        q[0][k] = (double)qs[k];
        q[1][k] = (double)qd[k];
        axis[0][k] = q[0][k] - q[1][k];
    }
    length = sqrt(dot3(axis[0], axis[0]));
    shorten3(axis[0]);
    cross3(axis[1], q[0], q[1]);
    shorten3(axis[1]);
    cross3(axis[2], axis[0], axis[1]);
    for (int k = 0; k < 9; k++) axes[k] = (float)axis[k / 3][k % 3];
    for (int side = 0; side < 2; side++) {  // sender, receiver
        for (int k = 0; k < 3; k++) p[side][k] = dot3(axis[k], q[side]);
        p[side][1] = fabs(p[side][1]);
        fourier(wave + side * 4 * H, (float)p[side][0], frequency, H);
        fourier(wave + side * 4 * H + 2 * H, (float)p[side][2], frequency, H);
    }
    double cosine = dot3(p[0], p[1]) / (sqrt(dot3(p[0], p[0])) + AXIS_EPS) /
                    (sqrt(dot3(p[1], p[1])) + AXIS_EPS);
    angle[0] = (float)sqrt(fmax(0, 1 - cosine * cosine));
    angle[1] = (float)cosine;
    return length;
}

// f (E, H), and the gate.
static void to3d_frames_forward(Sde *s) {
    PARTS(s);
    const To3d *p = &s->p.to3d;
    int H = s->shape.hidden, E = (int)m->E, wide = 2 * H + 2;
#pragma omp parallel for schedule(static)
    for (size_t e = 0; e < m->E; e++) {
        double length = to3d_frame(a->axes + 9 * e, a->angle + 2 * e, a->wave + e * 8 * (size_t)H,
                                   m->q + 3 * m->edge_from[e], m->q + 3 * m->edge_to[e],
                                   p->frame_wave, H);
        if (s->shape.gate)
            fourier(a->length_wave + e * 2 * (size_t)H, (float)length, p->gate_wave, H);
    }
    if (s->shape.gate) apply(a->gate, a->length_wave, &p->gate, m->E);
    apply(a->phi, a->wave, &p->frame, 2 * m->E);
    // project [angle; phi] without putting them side by side
    Hidden *hidden = &a->frame_hidden[0];
    gemm(0, 1, E, H, 2 * H, a->phi, 2 * H, p->project[0].w + 2, wide, p->project[0].b, 0,
         hidden->pre, H);
    gemm(0, 1, E, H, 2, a->angle, 2, p->project[0].w, wide, NULL, 1, hidden->pre, H);
    act_forward(SILU, hidden->act, hidden->pre, m->E * (size_t)H);
    apply(a->frame, hidden->act, &p->project[1], m->E);
}

// From dframe (E, H) and dgate (E, H).
static void to3d_frames_backward(Sde *s, const float *dframe) {
    PARTS(s);
    const To3d *p = &s->p.to3d;
    To3d *g = &s->g.to3d;
    int H = s->shape.hidden, E = (int)m->E, wide = 2 * H + 2;
    float *d = a->frame_hidden[0].act;  // in its place
    apply_backward(d, 0, &g->project[1], dframe, d, &p->project[1], m->E);
    act_backward(SILU, d, a->frame_hidden[0].pre, m->E * (size_t)H);
    // forward: pre = project [angle; phi]
    gemm(1, 0, H, 2, E, d, H, a->angle, 2, NULL, 0, g->project[0].w, wide);
    gemm(1, 0, H, 2 * H, E, d, H, a->phi, 2 * H, NULL, 0, g->project[0].w + 2, wide);
    column_sums(g->project[0].b, d, H, E, H);
    gemm(0, 0, E, 2 * H, H, d, H, p->project[0].w + 2, wide, NULL, 0, a->dphi, 2 * H);
    apply_backward(NULL, 0, &g->frame, a->dphi, a->wave, &p->frame, 2 * m->E);
    if (s->shape.gate)
        apply_backward(NULL, 0, &g->gate, a->dgate, a->length_wave, &p->gate, m->E);
}

// ---- what is made of X: u_0 (A, H) of the atoms, g (E, H) of the edges. The first map of an edge
//      is a sum, edge_in [X_s; X_d] = from X_s + to X_d: two products an atom, one sum an edge

static void to3d_graph_forward(Sde *s) {
    PARTS(s);
    const To3d *p = &s->p.to3d;
    int D = s->shape.dim, A = (int)m->A;
    size_t d = (size_t)D;
    apply(a->node, a->x, &p->node, m->A);
    gemm(0, 1, A, D, D, a->x, D, p->edge_in.w, 2 * D, NULL, 0, a->x_from, D);
    gemm(0, 1, A, D, D, a->x, D, p->edge_in.w + D, 2 * D, p->edge_in.b, 0, a->x_to, D);
#pragma omp parallel for schedule(static)
    for (size_t e = 0; e < m->E; e++) {
        const float *from = a->x_from + m->edge_from[e] * d, *to = a->x_to + m->edge_to[e] * d;
        for (size_t c = 0; c < d; c++) a->edge_hat[e * d + c] = from[c] + to[c];
    }
    batch_norm_forward(a->edge_act, a->edge_hat, a->edge_rstd, a->edge_hat, &p->edge_norm, m->E,
                       s->training, 1);
    apply(a->graph, a->edge_act, &p->edge_out, m->E);
}

// to (A, n): sums of x (E, n) over the edges into an atom; from (A, n): over those out of it, which
// are the ways back. They may be the same: then both are added up.
static void edge_sums(float *to, float *from, const float *x, size_t n, const Mols *m) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < m->A; i++) {
        memset(to + i * n, 0, sizeof(float) * n);
        memset(from + i * n, 0, sizeof(float) * n);
        for (size_t e = m->edge_start[i]; e < m->edge_start[i + 1]; e++) {
            const float *in = x + e * n, *out = x + m->edge_back[e] * n;
            for (size_t c = 0; c < n; c++) to[i * n + c] += in[c];
            for (size_t c = 0; c < n; c++) from[i * n + c] += out[c];
        }
    }
}

// From dgraph (E, H) and dnode (A, H): adds to dx (A, D).
static void to3d_graph_backward(Sde *s, const float *dgraph) {
    PARTS(s);
    const To3d *p = &s->p.to3d;
    To3d *g = &s->g.to3d;
    int D = s->shape.dim, A = (int)m->A;
    apply_backward(a->dedge_act, 0, &g->edge_out, dgraph, a->edge_act, &p->edge_out, m->E);
    batch_norm_backward(a->dedge_act, &g->edge_norm, a->edge_act, a->edge_hat, a->edge_rstd,
                        &p->edge_norm, m->E);
    float *dfrom = a->x_from, *dto = a->x_to;  // in their places
    edge_sums(dto, dfrom, a->dedge_act, (size_t)D, m);  // forward: edge = x_from[s] + x_to[d]
    gemm(1, 0, D, D, A, dfrom, D, a->x, D, NULL, 0, g->edge_in.w, 2 * D);
    gemm(1, 0, D, D, A, dto, D, a->x, D, NULL, 0, g->edge_in.w + D, 2 * D);
    column_sums(g->edge_in.b, dto, D, A, D);
    gemm(0, 0, A, D, D, dfrom, D, p->edge_in.w, 2 * D, NULL, 1, a->dx, D);
    gemm(0, 0, A, D, D, dto, D, p->edge_in.w + D, 2 * D, NULL, 1, a->dx, D);
    apply_backward(a->dx, 1, &g->node, a->dnode, a->x, &p->node, m->A);
}

// ---- attention over the edges into an atom d, 8 heads of width H / 8:
//      alpha = softmax of Q_d (K_s + e') / sqrt(H / 8), m_d = sum of alpha (V_s + e') + skip_d

// alpha (E, 8) of a layer from maps (A, 4H) and e' (E, H).
static void attention_alpha(float *alpha, const Sde *s, const float *maps, const float *edge_map) {
    const Mols *m = &s->mols;
    size_t H = (size_t)s->shape.hidden, wide = H / HEADS;
    float scale = 1.0f / sqrtf((float)wide);
#pragma omp parallel for schedule(static)
    for (size_t d = 0; d < m->A; d++) {
        size_t first = m->edge_start[d], end = m->edge_start[d + 1];
        float top[HEADS], sum[HEADS] = {0};
        const float *q = maps + d * 4 * H;
        for (int h = 0; h < HEADS; h++) top[h] = -FLT_MAX;
        for (size_t e = first; e < end; e++)
            for (size_t h = 0; h < HEADS; h++) {
                const float *k = maps + m->edge_from[e] * 4 * H + H, *map = edge_map + e * H;
                float score = 0;
                for (size_t c = h * wide; c < (h + 1) * wide; c++) score += q[c] * (k[c] + map[c]);
                alpha[e * HEADS + h] = score * scale;
                top[h] = score * scale > top[h] ? score * scale : top[h];
            }
        for (size_t e = first; e < end; e++)
            for (size_t h = 0; h < HEADS; h++) {
                alpha[e * HEADS + h] = exp_fast(alpha[e * HEADS + h] - top[h]);
                sum[h] += alpha[e * HEADS + h];
            }
        for (size_t e = first; e < end; e++)
            for (size_t h = 0; h < HEADS; h++) alpha[e * HEADS + h] /= sum[h];
    }
}

// dropped (E, 8) = alpha with dropout.
static void attention_drop(Sde *s, int l, const float *alpha) {
    memcpy(s->a.dropped, alpha, sizeof(float) * s->mols.E * HEADS);
    drop_rows(s->a.dropped, HEADS, s, 1, s->method.attention_dropout, RNG_ALPHA_DROP + (uint32_t)l);
}

// out (A, H) = m.
static void edge_attention_forward(float *out, Sde *s, int l, float *alpha, const float *maps,
                                   const float *edge_map) {
    const Mols *m = &s->mols;
    size_t H = (size_t)s->shape.hidden, wide = H / HEADS;
    attention_alpha(alpha, s, maps, edge_map);
    attention_drop(s, l, alpha);
#pragma omp parallel for schedule(static)
    for (size_t d = 0; d < m->A; d++) {
        float *out_d = out + d * H;
        memcpy(out_d, maps + d * 4 * H + 3 * H, sizeof(float) * H);
        for (size_t e = m->edge_start[d]; e < m->edge_start[d + 1]; e++) {
            const float *v = maps + m->edge_from[e] * 4 * H + 2 * H, *map = edge_map + e * H;
            for (size_t c = 0; c < H; c++)
                out_d[c] += s->a.dropped[e * HEADS + c / wide] * (v[c] + map[c]);
        }
    }
}

// From dout (A, H) to dmaps (A, 4H) and dedge_map (E, H). What belongs to senders is added up by
// the one task of their molecule.
static void edge_attention_backward(Sde *s, int l, const float *dout, const float *alpha,
                                    const float *maps, const float *edge_map) {
    PARTS(s);
    size_t H = (size_t)s->shape.hidden, wide = H / HEADS;
    float scale = 1.0f / sqrtf((float)wide);
    attention_drop(s, l, alpha);
    memset(a->dmaps, 0, sizeof(float) * m->A * 4 * H);
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < m->B; b++)
        for (size_t d = m->atom_start[b]; d < m->atom_start[b + 1]; d++) {
            const float *dout_d = dout + d * H;
            memcpy(a->dmaps + d * 4 * H + 3 * H, dout_d, sizeof(float) * H);
            for (size_t e = m->edge_start[d]; e < m->edge_start[d + 1]; e++) {
                size_t v = m->edge_from[e] * 4 * H + 2 * H;
                float *dropped = a->dropped + e * HEADS, sum[HEADS] = {0};
                for (size_t c = 0; c < H; c++) {  // forward: out_d += dropped (V_s + e')
                    float dvalue = dropped[c / wide] * dout_d[c];
                    sum[c / wide] += dout_d[c] * (maps[v + c] + edge_map[e * H + c]);
                    a->dmaps[v + c] += dvalue;
                    a->dedge_map[e * H + c] = dvalue;
                }
                memcpy(dropped, sum, sizeof sum);  // from here on its gradient
            }
        }
    drop_rows(a->dropped, HEADS, s, 1, s->method.attention_dropout, RNG_ALPHA_DROP + (uint32_t)l);
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < m->B; b++)
        for (size_t d = m->atom_start[b]; d < m->atom_start[b + 1]; d++) {
            size_t first = m->edge_start[d], end = m->edge_start[d + 1], q = d * 4 * H;
            float mean[HEADS] = {0};
            for (size_t k = first * HEADS; k < end * HEADS; k++)
                mean[k % HEADS] += alpha[k] * a->dropped[k];
            for (size_t e = first; e < end; e++) {
                size_t k = m->edge_from[e] * 4 * H + H;
                for (size_t c = 0; c < H; c++) {  // forward: alpha = softmax(Q_d (K_s + e') scale)
                    size_t h = e * HEADS + c / wide;
                    float dscore = scale * alpha[h] * (a->dropped[h] - mean[c / wide]);
                    a->dmaps[q + c] += dscore * (maps[k + c] + edge_map[e * H + c]);
                    a->dmaps[k + c] += dscore * maps[q + c];
                    a->dedge_map[e * H + c] += dscore * maps[q + c];
                }
            }
        }
}

// ---- a layer: mid = u + LN1(m), sum = mid + LN2(W4 drop(silu(W3 mid + b3)) + b4); u' = silu(sum)
//      after the first layer of a module, sum after the second

static void to3d_layer_forward(Sde *s, int l) {
    const Attention *p = &s->p.to3d.layer[l];
    Buffers *a = &s->a;
    size_t A = s->mols.A, H = (size_t)s->shape.hidden, at = (size_t)l * A * H;
    size_t at_edge = (size_t)l * s->mols.E * H;
    float *u = a->node + at, *sum = a->node_sum + at, *hat1 = a->norm1_hat + at;
    float *hat2 = a->norm2_hat + at;
    Hidden *hidden = &a->feed_hidden[l];
    apply(a->maps + 4 * at, u, &p->maps, A);
    apply(a->edge_map + at_edge, a->edge, &p->edge, s->mols.E);
    edge_attention_forward(hat1, s, l, a->alpha + (size_t)l * s->mols.E * HEADS, a->maps + 4 * at,
                           a->edge_map + at_edge);
    layer_norm_forward(a->mid + at, hat1, a->norm1_rstd + (size_t)l * A, u, hat1, &p->norm1, A);
    apply(hidden->pre, a->mid + at, &p->ffn[0], A);
    act_forward(SILU, hidden->act, hidden->pre, A * H);
    drop_rows(hidden->act, (int)H, s, 0, s->method.attention_dropout, RNG_FEED_DROP + (uint32_t)l);
    apply(hat2, hidden->act, &p->ffn[1], A);
    layer_norm_forward(sum, hat2, a->norm2_rstd + (size_t)l * A, a->mid + at, hat2, &p->norm2, A);
    if (l % 2 == 0) act_forward(SILU, u + A * H, sum, A * H);
    else memcpy(u + A * H, sum, sizeof(float) * A * H);
}

// dnode (A, H), the gradient of u', becomes that of u; adds to dedge (E, H).
static void to3d_layer_backward(Sde *s, int l) {
    const Attention *p = &s->p.to3d.layer[l];
    Attention *g = &s->g.to3d.layer[l];
    Buffers *a = &s->a;
    size_t A = s->mols.A, H = (size_t)s->shape.hidden, at = (size_t)l * A * H;
    size_t at_edge = (size_t)l * s->mols.E * H;
    float *d = a->dnode, *dbranch = a->dbranch, *dact = a->feed_hidden[l].act;  // in its place
    if (l % 2 == 0) act_backward(SILU, d, a->node_sum + at, A * H);
    // forward: sum = mid + LN2(ffn1(act)), act = drop(silu(ffn0(mid)))
    layer_norm_backward(dbranch, &g->norm2, d, a->norm2_hat + at, a->norm2_rstd + (size_t)l * A,
                        &p->norm2, A);
    apply_backward(dact, 0, &g->ffn[1], dbranch, dact, &p->ffn[1], A);
    drop_rows(dact, (int)H, s, 0, s->method.attention_dropout, RNG_FEED_DROP + (uint32_t)l);
    act_backward(SILU, dact, a->feed_hidden[l].pre, A * H);
    apply_backward(d, 1, &g->ffn[0], dact, a->mid + at, &p->ffn[0], A);
    // forward: mid = u + LN1(attention(maps(u), edge(e)))
    layer_norm_backward(dbranch, &g->norm1, d, a->norm1_hat + at, a->norm1_rstd + (size_t)l * A,
                        &p->norm1, A);
    edge_attention_backward(s, l, dbranch, a->alpha + (size_t)l * s->mols.E * HEADS,
                            a->maps + 4 * at, a->edge_map + at_edge);
    apply_backward(d, 1, &g->maps, a->dmaps, a->node + at, &p->maps, A);
    apply_backward(a->dedge, 1, &g->edge, a->dedge_map, a->edge, &p->edge, s->mols.E);
}

// ---- after a module: (c1, c2, c3) of an edge = MLP([u_s + u_d; e]), and the noise of an atom is
//      the mean over the edges into it of c1 a + c2 b + c3 c, added up over the modules

static void to3d_basis_forward(Sde *s, int k) {
    PARTS(s);
    const Linear *p = s->p.to3d.basis[k];
    int H = s->shape.hidden;
    const float *u = a->node + (size_t)(2 * k + 2) * m->A * (size_t)H;
    Hidden *hidden = &a->basis_hidden[k];
    float *coefficient = a->coefficient + (size_t)k * m->E * 3;
    gemm(0, 1, (int)m->A, COEFFICIENTS, H, u, H, p[0].w, 2 * H, NULL, 0, a->basis_node,
         COEFFICIENTS);  // of an atom, as edge_in above
    gemm(0, 1, (int)m->E, COEFFICIENTS, H, a->edge, H, p[0].w + H, 2 * H, p[0].b, 0,
         hidden->pre, COEFFICIENTS);
#pragma omp parallel for schedule(static)
    for (size_t e = 0; e < m->E; e++) {
        const float *from = a->basis_node + m->edge_from[e] * COEFFICIENTS;
        const float *to = a->basis_node + m->edge_to[e] * COEFFICIENTS;
        for (size_t c = 0; c < COEFFICIENTS; c++)
            hidden->pre[e * COEFFICIENTS + c] += from[c] + to[c];
    }
    act_forward(SILU, hidden->act, hidden->pre, m->E * COEFFICIENTS);
    apply(coefficient, hidden->act, &p[1], m->E);
#pragma omp parallel for schedule(static)
    for (size_t d = 0; d < m->A; d++) {
        size_t first = m->edge_start[d], end = m->edge_start[d + 1];
        for (size_t e = first; e < end; e++)
            for (size_t x = 0; x < 3; x++)
                for (size_t c = 0; c < 3; c++)
                    a->eps_hat[3 * d + x] +=
                        coefficient[3 * e + c] * a->axes[9 * e + 3 * c + x] / (float)(end - first);
    }
}

// From deps_hat (A, 3): adds to dnode (A, H) and dedge (E, H).
static void to3d_basis_backward(Sde *s, int k) {
    PARTS(s);
    const Linear *p = s->p.to3d.basis[k];
    Linear *g = s->g.to3d.basis[k];
    int H = s->shape.hidden, A = (int)m->A, E = (int)m->E;
    const float *u = a->node + (size_t)(2 * k + 2) * m->A * (size_t)H;
    float *d = a->basis_hidden[k].act, *dbasis_node = a->basis_node;  // in their places
#pragma omp parallel for schedule(static)
    for (size_t e = 0; e < m->E; e++) {
        size_t to = m->edge_to[e];
        float share = 1.0f / (float)(m->edge_start[to + 1] - m->edge_start[to]);
        for (size_t c = 0; c < 3; c++) {  // forward: eps_hat += coefficient axis share
            const float *axis = a->axes + 9 * e + 3 * c, *deps = a->deps_hat + 3 * to;
            a->dcoefficient[3 * e + c] =
                share * (axis[0] * deps[0] + axis[1] * deps[1] + axis[2] * deps[2]);
        }
    }
    apply_backward(d, 0, &g[1], a->dcoefficient, d, &p[1], m->E);
    act_backward(SILU, d, a->basis_hidden[k].pre, m->E * COEFFICIENTS);
    // forward: pre = node part of s + node part of d + edge part + b
    gemm(1, 0, COEFFICIENTS, H, E, d, COEFFICIENTS, a->edge, H, NULL, 0, g[0].w + H, 2 * H);
    column_sums(g[0].b, d, COEFFICIENTS, E, COEFFICIENTS);
    gemm(0, 0, E, H, COEFFICIENTS, d, COEFFICIENTS, p[0].w + H, 2 * H, NULL, 1, a->dedge, H);
    edge_sums(dbasis_node, dbasis_node, d, COEFFICIENTS, m);
    gemm(1, 0, COEFFICIENTS, H, A, dbasis_node, COEFFICIENTS, u, H, NULL, 0, g[0].w, 2 * H);
    gemm(0, 0, A, H, COEFFICIENTS, dbasis_node, COEFFICIENTS, p[0].w, 2 * H, NULL, 1, a->dnode, H);
}

// ---- the whole network

// eps_hat (A, 3) from the noised positions q and what to3d_graph_forward() left.
static void to3d_score_forward(Sde *s) {
    Buffers *a = &s->a;
    size_t EH = s->mols.E * (size_t)s->shape.hidden;
    to3d_frames_forward(s);
    for (size_t k = 0; k < EH; k++)
        a->edge[k] = (s->shape.gate ? a->gate[k] : 1.0f) * a->graph[k] + a->frame[k];
    memset(a->eps_hat, 0, sizeof(float) * 3 * s->mols.A);
    for (int l = 0; l < ATTENTIONS; l++) {
        to3d_layer_forward(s, l);
        if (l % 2) to3d_basis_forward(s, l / 2);
    }
}

// From deps_hat (A, 3) to all gradients of the network, and added to dx (A, D).
static void to3d_backward(Sde *s) {
    Buffers *a = &s->a;
    size_t EH = s->mols.E * (size_t)s->shape.hidden, AH = s->mols.A * (size_t)s->shape.hidden;
    memset(a->dedge, 0, sizeof(float) * EH);
    memset(a->dnode, 0, sizeof(float) * AH);
    for (int l = ATTENTIONS - 1; l >= 0; l--) {
        if (l % 2) to3d_basis_backward(s, l / 2);
        to3d_layer_backward(s, l);
    }
    float *dgraph = a->graph;  // in its place
    for (size_t k = 0; k < EH; k++) {  // forward: edge = gate graph + frame
        a->dgate[k] = a->dedge[k] * a->graph[k];
        dgraph[k] = (s->shape.gate ? a->gate[k] : 1.0f) * a->dedge[k];
    }
    to3d_frames_backward(s, a->dedge);
    to3d_graph_backward(s, dgraph);
}

// Mean over the molecules of the mean over the atoms of sigma^p |eps_hat - eps|^2; stores deps_hat.
static void to3d_loss(double loss[TERMS], Sde *s) {
    const Mols *m = &s->mols;
    double sum = 0;
    for (size_t b = 0; b < m->B; b++) {
        Place v = place_of(m, b);
        double scale = pow((double)m->sigma[b], s->method.anneal) / v.N / (double)m->B;
        for (size_t k = 3 * v.atom; k < 3 * (v.atom + (size_t)v.N); k++) {
            double error = (double)s->a.eps_hat[k] - (double)m->noise[k];
            sum += scale * error * error;
            s->a.deps_hat[k] = (float)(2 * s->method.to3d * scale * error);
        }
    }
    loss[TERM_3D] = sum;
}

// =================================================================================================
// 8 3D -> 2D: an invariant score network says what noise is on the bonds and on the elements of a
//   molecule. Its nodes start as H^0 = map of Y + map of the noised elements. adj is the noised
//   matrix of bond types; S_0 = [adj, adj adj] has two channels, and each of four edge layers makes
//   from the channels of S_l those of S_l+1:
//
//     T_c   = what channel c's queries and keys say of a pair, made symmetric
//     S_l+1 = MLP([T; S_l]) of a pair, 0 where an atom has no bond
//     V_c   = GCN(H^l, S_c),  H^l+1 = tanh(MLP([V_1; ..])): the nodes of the next layer
//     GCN(H, S) = (D S' D) H W + b, S' = S with ones on the diagonal, D = max(1, row sum)^(-1/2)
//
//   The noise on the bonds is an MLP of [S_0; ..; S_4] of a pair. That on the elements: a chain of
//   GCNs, G_l+1 = tanh(GCN(G_l, adj)), G_0 = H^0, and an MLP of [G_0; ..; G_4] of an atom.
//   All matrices over pairs are symmetric: one row a pair i <= j.
// =================================================================================================

// The width of an edge layer's nodes.
static int edge_layer_in(const Shape *c, int l) { return l ? c->width : c->dim; }

// Do both atoms of a pair have a bond?
static int both_bonded(const Mols *m, const Place *v, int i, int j) {
    return m->bonded[v->atom + (size_t)i] && m->bonded[v->atom + (size_t)j];
}

// S_ij = M_ij + M_ji of every pair, 0 unless both atoms have a bond: n numbers of `in` at row
// stride ldi. The same in both passes.
static void pairs_doubled(float *out, size_t ldo, const float *in, size_t ldi, int n,
                          const Mols *m) {
#pragma omp parallel for schedule(static)
    for (size_t b = 0; b < m->B; b++) {
        Place v = place_of(m, b);
        FOR_PAIRS(v, i, j) {
            size_t p = pair_row(&v, i, j);
            float scale = both_bonded(m, &v, i, j) ? 2.0f : 0.0f;
            for (int c = 0; c < n; c++) out[p * ldo + (size_t)c] = scale * in[p * ldi + (size_t)c];
        }
    }
}

// ---- GCN of one molecule: out_i = sum over j of d_i S'_ij d_j z_j + b, z = H W (N, W).
//      S is a channel of a matrix over pairs, element p at adj[p * stride]

// full (N, N) = S', root (N) = d, sums (N) of the rows.
static void gcn_matrix(float *full, float *root, float *sums, const Place *v, const float *adj,
                       size_t stride) {
    for (int i = 0; i < v->N; i++) {
        sums[i] = 0;
        for (int j = 0; j < v->N; j++) {
            full[i * v->N + j] = i == j ? 1.0f : adj[pair_row(v, i, j) * stride];
            sums[i] += full[i * v->N + j];
        }
        root[i] = 1.0f / sqrtf(sums[i] > 1 ? sums[i] : 1.0f);
    }
}

// out, z: W numbers a row, at row strides ldo and ldz. scratch: N (N + 2).
static void gcn_forward(float *out, size_t ldo, const float *z, size_t ldz, const float *bias,
                        int W, const Place *v, const float *adj, size_t stride, float *scratch) {
    int N = v->N;
    float *root = scratch, *sums = root + N, *full = sums + N;
    gcn_matrix(full, root, sums, v, adj, stride);
    for (int i = 0; i < N; i++) {
        float *out_i = out + (size_t)i * ldo;
        for (int c = 0; c < W; c++) out_i[c] = bias[c];
        for (int j = 0; j < N; j++) {
            const float *z_j = z + (size_t)j * ldz;
            float weight = root[i] * full[i * N + j] * root[j];
            for (int c = 0; c < W; c++) out_i[c] += weight * z_j[c];
        }
    }
}

// From dout to dz; if dadj is not NULL, adds to the gradient of S. scratch: N (2 N + 3).
static void gcn_backward(float *dz, size_t ldz, float *dadj, const float *dout, size_t ldo,
                         const float *z, int W, const Place *v, const float *adj, size_t stride,
                         float *scratch) {
    int N = v->N;
    float *root = scratch, *sums = root + N, *full = sums + N, *dweight = full + N * N;
    gcn_matrix(full, root, sums, v, adj, stride);
    for (int j = 0; j < N; j++) {
        float *dz_j = dz + (size_t)j * ldz;
        for (int c = 0; c < W; c++) dz_j[c] = 0;
        for (int i = 0; i < N; i++) {  // forward: out_i += weight_ij z_j
            float weight = root[i] * full[i * N + j] * root[j];
            for (int c = 0; c < W; c++) dz_j[c] += weight * dout[(size_t)i * ldo + (size_t)c];
        }
    }
    if (!dadj) return;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            float dot = 0;
            for (int c = 0; c < W; c++)
                dot += dout[(size_t)i * ldo + (size_t)c] * z[(size_t)j * ldz + (size_t)c];
            dweight[i * N + j] = dot;
        }
    for (int i = 0; i < N; i++) {  // forward: weight_ij = root_i S'_ij root_j
        float droot = 0;
        for (int j = 0; j < N; j++)
            droot += (dweight[i * N + j] + dweight[j * N + i]) * full[i * N + j] * root[j];
        float dsum = sums[i] >= 1 ? -0.5f * root[i] * root[i] * root[i] * droot : 0.0f;
        for (int j = 0; j < N; j++)  // forward: root_i = sum_i^(-1/2); S'_ii is a constant
            if (j != i)
                dadj[pair_row(v, i, j) * stride] += root[i] * root[j] * dweight[i * N + j] + dsum;
    }
}

// ---- what queries and keys say of a pair: the mean over 8 chunks of W / 4 channels of
//      tanh(Q_i K_j / sqrt(W / 4)), and the mean of that of (i, j) and of (j, i)

enum { CHUNKS = 8 };

// kt (2W, N rounded up) = K^T of channel c of a molecule, from qk (N, C * 4W).
static void pair_keys(float *kt, const float *qk, int C, int W, int c, int N) {
    int width = padded(N);
    copy_transposed(kt, width, qk + c * 4 * W + 2 * W, C * 4 * W, N, 2 * W);
}

// The tanh of chunk k of atom i with all atoms: out (padded N).
static void pair_chunk(float *out, const float *q, const float *kt, int k, int W, int width) {
    int n = W / 4;
    float scale = 1.0f / sqrtf((float)n);
    for (int j = 0; j < width; j++) out[j] = 0;
    for (int c = k * n; c < (k + 1) * n; c++)
        for (int j = 0; j < width; j++) out[j] += q[c] * kt[(size_t)c * (size_t)width + (size_t)j];
#pragma omp simd
    for (int j = 0; j < width; j++) out[j] = tanh_fast(scale * out[j]);
}

// Column c of rows (P, 2C) of a molecule's pairs = T_c. scratch: (2W + 1) * padded N + N * N.
static void pair_scores_forward(float *rows, const float *qk, int C, int W, int c, const Place *v,
                                float *scratch) {
    int N = v->N, width = padded(N);
    float *kt = scratch, *part = kt + 2 * W * width, *score = part + width;
    pair_keys(kt, qk, C, W, c, N);
    memset(score, 0, sizeof(float) * (size_t)N * (size_t)N);
    for (int i = 0; i < N; i++)
        for (int k = 0; k < CHUNKS; k++) {
            pair_chunk(part, qk + (size_t)i * (size_t)(C * 4 * W) + c * 4 * W, kt, k, W, width);
            for (int j = 0; j < N; j++) score[i * N + j] += part[j] / CHUNKS;
        }
    FOR_PAIRS(*v, i, j)
        rows[pair_row(v, i, j) * (size_t)(2 * C) + (size_t)c] =
            (score[i * N + j] + score[j * N + i]) / 2;
}

// From drows, of a pair as a whole, to dqk of channel c. scratch: 2 (2W + 1) * padded N.
static void pair_scores_backward(float *dqk, const float *drows, const float *qk, int C, int W,
                                 int c, const Place *v, float *scratch) {
    int N = v->N, width = padded(N), n = W / 4;
    size_t row = (size_t)(C * 4 * W);
    float *kt = scratch, *part = kt + 2 * W * width, *dkt = part + width, *d = dkt + 2 * W * width;
    float scale = 1.0f / sqrtf((float)n);
    pair_keys(kt, qk, C, W, c, N);
    memset(dkt, 0, sizeof(float) * 2 * (size_t)W * (size_t)width);
    for (int i = 0; i < N; i++)
        for (int k = 0; k < CHUNKS; k++) {
            const float *q = qk + (size_t)i * row + c * 4 * W;
            float *dq = dqk + (size_t)i * row + c * 4 * W;
            pair_chunk(part, q, kt, k, W, width);
            for (int j = 0; j < width; j++) d[j] = 0;
            for (int j = 0; j < N; j++) {  // forward: T of a pair = mean of (i, j) and (j, i)
                float dt = drows[pair_row(v, i, j) * (size_t)(2 * C) + (size_t)c];
                d[j] = (i == j ? dt : dt / 2) / CHUNKS * (1 - part[j] * part[j]) * scale;
            }
            for (int x = k * n; x < (k + 1) * n; x++) {  // forward: q_i k_j
                float sum = 0, *kt_x = kt + x * width, *dkt_x = dkt + x * width;
#pragma omp simd reduction(+ : sum)
                for (int j = 0; j < width; j++) {
                    sum += d[j] * kt_x[j];
                    dkt_x[j] += d[j] * q[x];
                }
                dq[x] = sum;
            }
        }
    for (int j = 0; j < N; j++)
        for (int x = 0; x < 2 * W; x++)
            dqk[(size_t)j * row + (size_t)(c * 4 * W + 2 * W + x)] = dkt[x * width + j];
}

// ---- one edge layer

typedef struct {
    int C, out, in, W, ld;     // channels, of the next layer; width of nodes, of all; row of nodes
    const float *h;            // (A, in) at row stride ld
    float *qk, *z, *value, *rows;
    Hidden *qk_hidden, *value_hidden, *pair_hidden;
    size_t from, to;           // columns of its S and of the next one's in a row of adjacency
} EdgeActs;

static EdgeActs edge_acts(Sde *s, int l) {
    const Shape *c = &s->shape;
    Buffers *a = &s->a;
    size_t A = s->mols.A, W = (size_t)c->width, most = (size_t)max_int(2, c->channels);
    size_t L = (size_t)l;
    return (EdgeActs){to2d_channels(c, l), to2d_channels(c, l + 1), edge_layer_in(c, l), c->width,
                      l ? c->width : to2d_all_nodes(c), l ? a->edge_h + (L - 1) * A * W : a->nodes,
                      a->qk + L * A * most * 4 * W, a->value_map + L * A * most * W,
                      a->value + L * A * most * W, a->pair_in + L * s->mols.P * 2 * most,
                      &a->qk_hidden[l], &a->value_hidden[l], &a->pair_hidden[2 * l],
                      (size_t)to2d_offset(c, l), (size_t)to2d_offset(c, l + 1)};
}

// The first half of a molecule's layer: T and S side by side in rows, and the values V.
static void edge_layer_molecule(Sde *s, const EdgeActs *e, const EdgeLayer *p, size_t b, int last) {
    Place v = place_of(&s->mols, b);
    size_t Ct = (size_t)to2d_all_channels(&s->shape), C = (size_t)e->C, W = (size_t)e->W;
    float *scratch = take(scratch_begin(), (idx)s->a.scratch);
    for (int c = 0; c < e->C; c++) {
        pair_scores_forward(e->rows, e->qk + v.atom * C * 4 * W, e->C, e->W, c, &v, scratch);
        if (last) continue;
        gcn_forward(e->value + v.atom * C * W + (size_t)c * W, C * W,
                    e->z + v.atom * C * W + (size_t)c * W, C * W, p->value_b + (size_t)c * W, e->W,
                    &v, s->a.adjacency + e->from + c, Ct, scratch);
    }
    for (size_t q = v.pair; q < s->mols.pair_start[b + 1]; q++)
        memcpy(e->rows + q * 2 * C + C, s->a.adjacency + q * Ct + e->from, sizeof(float) * C);
}

// S_l+1 from S_l and H^l; H^l+1 but in the last layer, whose values nobody reads.
static void edge_layer_forward(Sde *s, int l) {
    const Mols *m = &s->mols;
    const EdgeLayer *p = &s->p.to2d.edge[l];
    EdgeActs e = edge_acts(s, l);
    int A = (int)m->A, wide = e.C * 4 * e.W, last = l + 1 == EDGE_LAYERS;
    size_t Ct = (size_t)to2d_all_channels(&s->shape), W = (size_t)e.W;
    gemm(0, 1, A, wide, e.in, e.h, e.ld, p->first.w, e.in, p->first.b, 0, e.qk_hidden->pre, wide);
    act_forward(TANH, e.qk_hidden->act, e.qk_hidden->pre, m->A * (size_t)wide);
    for (int k = 0; k < 2 * e.C; k++)
        gemm(0, 1, A, 2 * e.W, 2 * e.W, e.qk_hidden->act + 2 * k * e.W, wide, p->second[k].w,
             2 * e.W, p->second[k].b, 0, e.qk + 2 * k * e.W, wide);
    for (int c = 0; c < e.C && !last; c++)
        gemm(0, 0, A, e.W, e.in, e.h, e.ld, p->value_w + c * e.in * e.W, e.W, NULL, 0,
             e.z + c * e.W, e.C * e.W);
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < m->B; b++) edge_layer_molecule(s, &e, p, b, last);
    mlp_forward(s->a.pair_out, e.pair_hidden, e.rows, p->pairs, 3, ELU, m->P);
    pairs_doubled(s->a.adjacency + e.to, Ct, s->a.pair_out, (size_t)e.out, e.out, m);
    if (last) return;
    float *next = s->a.edge_h + (size_t)l * m->A * W;
    mlp_forward(next, e.value_hidden, e.value, p->nodes, 2, ELU, m->A);
    for (size_t i = 0; i < m->A; i++)
        for (size_t c = 0; c < W; c++)
            next[i * W + c] = m->bonded[i] ? tanh_fast(next[i * W + c]) : 0.0f;
}

// The same backwards: from drows (P, 2C) and dvalue (A, C W) to dqk and dvalue_map, and added to
// dadjacency.
static void edge_layer_molecule_backward(Sde *s, const EdgeActs *e, size_t b, int last) {
    Place v = place_of(&s->mols, b);
    Buffers *a = &s->a;
    size_t Ct = (size_t)to2d_all_channels(&s->shape), C = (size_t)e->C, W = (size_t)e->W;
    float *scratch = take(scratch_begin(), (idx)a->scratch);
    for (size_t q = v.pair; q < s->mols.pair_start[b + 1]; q++)
        for (size_t c = 0; c < C; c++)  // forward: S stands behind T in a row
            a->dadjacency[q * Ct + e->from + c] += a->dpair_in[q * 2 * C + C + c];
    for (int c = 0; c < e->C; c++) {
        size_t at = v.atom * C * W + (size_t)c * W;
        pair_scores_backward(a->dqk + v.atom * C * 4 * W, a->dpair_in, e->qk + v.atom * C * 4 * W,
                             e->C, e->W, c, &v, scratch);
        if (last) continue;
        gcn_backward(a->dvalue_map + at, C * W, e->from ? a->dadjacency + e->from + c : NULL,
                     a->dvalue + at, C * W, e->z + at, e->W, &v, a->adjacency + e->from + c, Ct,
                     scratch);
    }
}

// From dadjacency of S_l+1 and dedge_h of H^l+1 (A, W; not read in the last layer) to those of S_l
// and H^l (A, in); of the first layer the latter is added to dnodes.
static void edge_layer_backward(Sde *s, int l) {
    PARTS(s);
    const EdgeLayer *p = &s->p.to2d.edge[l];
    EdgeLayer *g = &s->g.to2d.edge[l];
    EdgeActs e = edge_acts(s, l);
    int A = (int)m->A, wide = e.C * 4 * e.W, last = l + 1 == EDGE_LAYERS;
    size_t Ct = (size_t)to2d_all_channels(&s->shape), W = (size_t)e.W;
    pairs_doubled(a->pair_out, (size_t)e.out, a->dadjacency + e.to, Ct, e.out, m);
    mlp_backward(a->dpair_in, 0, g->pairs, a->pair_out, e.rows, e.pair_hidden, p->pairs, 3, ELU,
                 m->P);
    if (!last) {
        const float *next = a->edge_h + (size_t)l * m->A * W;
        for (size_t k = 0; k < m->A * W; k++)  // forward: next = tanh, of bonded atoms
            a->dedge_h[k] *= m->bonded[k / W] ? 1 - next[k] * next[k] : 0.0f;
        mlp_backward(a->dvalue, 0, g->nodes, a->dedge_h, e.value, e.value_hidden, p->nodes, 2,
                     ELU, m->A);
        column_sums(g->value_b, a->dvalue, e.C * e.W, A, e.C * e.W);
    }
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < m->B; b++) edge_layer_molecule_backward(s, &e, b, last);
    float *dact = e.qk_hidden->act, *dh = l ? a->dedge_h : a->dnodes;  // in place; see above
    for (int k = 0; k < 2 * e.C; k++) {  // forward: qk = second(tanh(first(h))), channel by channel
        float *act = e.qk_hidden->act + 2 * k * e.W, *d = a->dqk + 2 * k * e.W;
        gemm(1, 0, 2 * e.W, 2 * e.W, A, d, wide, act, wide, NULL, 0, g->second[k].w, 2 * e.W);
        column_sums(g->second[k].b, d, wide, A, 2 * e.W);
        gemm(0, 0, A, 2 * e.W, 2 * e.W, d, wide, p->second[k].w, 2 * e.W, NULL, 0, act, wide);
    }
    act_backward(TANH, dact, e.qk_hidden->pre, m->A * (size_t)wide);
    gemm(1, 0, wide, e.in, A, dact, wide, e.h, e.ld, NULL, 0, g->first.w, e.in);
    column_sums(g->first.b, dact, wide, A, wide);
    gemm(0, 0, A, e.in, wide, dact, wide, p->first.w, e.in, NULL, l == 0, dh, e.ld);
    for (int c = 0; c < e.C && !last; c++) {  // forward: z = h value_w, channel by channel
        const float *d = a->dvalue_map + c * e.W;
        gemm(1, 0, e.in, e.W, A, e.h, e.ld, d, e.C * e.W, NULL, 0, g->value_w + c * e.in * e.W,
             e.W);
        gemm(0, 1, A, e.in, e.W, d, e.C * e.W, p->value_w + c * e.in * e.W, e.W, NULL, 1, dh, e.ld);
    }
}

// ---- the node network: columns D + (l - 1) W of nodes are G_l = tanh(GCN(G_l-1, adj))

static void node_layer_forward(Sde *s, int l) {
    PARTS(s);
    int D = s->shape.dim, W = s->shape.width, Cn = to2d_all_nodes(&s->shape);
    const float *in = a->nodes + (l ? D + (l - 1) * W : 0);
    float *out = a->nodes + D + l * W;
    gemm(0, 0, (int)m->A, W, l ? W : D, in, Cn, s->p.to2d.node_w[l], W, NULL, 0,
         a->node_map + (size_t)l * m->A * (size_t)W, W);
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < m->B; b++) {
        Place v = place_of(m, b);
        float *out_b = out + v.atom * (size_t)Cn;
        gcn_forward(out_b, (size_t)Cn, a->node_map + ((size_t)l * m->A + v.atom) * (size_t)W,
                    (size_t)W, s->p.to2d.node_b[l], W, &v, m->adj, 1,
                    take(scratch_begin(), (idx)a->scratch));
        for (int i = 0; i < v.N; i++)
            for (int c = 0; c < W; c++) out_b[i * Cn + c] = tanh_fast(out_b[i * Cn + c]);
    }
}

// From dnodes of G_l+1, added to that of G_l.
static void node_layer_backward(Sde *s, int l) {
    PARTS(s);
    int D = s->shape.dim, W = s->shape.width, Cn = to2d_all_nodes(&s->shape), A = (int)m->A;
    int in_width = l ? W : D, at = l ? D + (l - 1) * W : 0;
    const float *out = a->nodes + D + l * W;
    float *dout = a->dnodes + D + l * W, *dmap = a->node_map + (size_t)l * m->A * (size_t)W;
    for (size_t i = 0; i < m->A; i++)  // forward: out = tanh(.)
        for (size_t k = i * (size_t)Cn; k < i * (size_t)Cn + (size_t)W; k++)
            dout[k] *= 1 - out[k] * out[k];
    column_sums(s->g.to2d.node_b[l], dout, Cn, A, W);
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < m->B; b++) {
        Place v = place_of(m, b);
        gcn_backward(dmap + v.atom * (size_t)W, (size_t)W, NULL, dout + v.atom * (size_t)Cn,
                     (size_t)Cn, NULL, W, &v, m->adj, 1, take(scratch_begin(), (idx)a->scratch));
    }
    gemm(1, 0, in_width, W, A, a->nodes + at, Cn, dmap, W, NULL, 0, s->g.to2d.node_w[l], W);
    gemm(0, 1, A, in_width, W, dmap, W, s->p.to2d.node_w[l], W, NULL, 1, a->dnodes + at, Cn);
}

// ---- the whole network

// S_0 = [adj, adj adj] of every pair.
static void to2d_start(Sde *s) {
    const Mols *m = &s->mols;
    size_t Ct = (size_t)to2d_all_channels(&s->shape);
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < m->B; b++) {
        Place v = place_of(m, b);
        FOR_PAIRS(v, i, j) {
            float sum = 0, *row = s->a.adjacency + pair_row(&v, i, j) * Ct;
            for (int k = 0; k < v.N; k++)
                sum += m->adj[pair_row(&v, i, k)] * m->adj[pair_row(&v, k, j)];
            row[0] = m->adj[pair_row(&v, i, j)];
            row[1] = sum;
        }
    }
}

// m_x (A, V) and m_adj (P), of all atoms and pairs: to2d_loss() drops what does not count.
static void to2d_forward(Sde *s) {
    PARTS(s);
    const To2d *p = &s->p.to2d;
    int D = s->shape.dim, A = (int)m->A, Cn = to2d_all_nodes(&s->shape);
    gemm(0, 1, A, D, D, a->y, D, p->embed_y.w, D, p->embed_y.b, 0, a->nodes, Cn);
    for (size_t i = 0; i < m->A; i++)
        for (int c = 0; c < D; c++) a->nodes[i * (size_t)Cn + (size_t)c] += p->embed_x.b[c];
    gemm(0, 1, A, D, V, m->elements, V, p->embed_x.w, V, NULL, 1, a->nodes, Cn);
    to2d_start(s);
    for (int l = 0; l < EDGE_LAYERS; l++) edge_layer_forward(s, l);
    mlp_forward(a->m_adj, a->pairs_hidden, a->adjacency, p->pairs, 3, SILU, m->P);
    for (int l = 0; l < NODE_LAYERS; l++) node_layer_forward(s, l);
    mlp_forward(a->m_x, a->nodes_hidden, a->nodes, p->nodes, 3, SILU, m->A);
}

// From dm_x and dm_adj to all gradients of the network, and added to dy (A, D).
static void to2d_backward(Sde *s) {
    PARTS(s);
    const To2d *p = &s->p.to2d;
    To2d *g = &s->g.to2d;
    int D = s->shape.dim, A = (int)m->A, Cn = to2d_all_nodes(&s->shape);
    mlp_backward(a->dnodes, 0, g->nodes, a->dm_x, a->nodes, a->nodes_hidden, p->nodes, 3,
                 SILU, m->A);
    for (int l = NODE_LAYERS - 1; l >= 0; l--) node_layer_backward(s, l);
    mlp_backward(a->dadjacency, 0, g->pairs, a->dm_adj, a->adjacency, a->pairs_hidden,
                 p->pairs, 3, SILU, m->P);
    for (int l = EDGE_LAYERS - 1; l >= 0; l--) edge_layer_backward(s, l);
    // forward: nodes = embed_y(y) + embed_x(elements)
    gemm(1, 0, D, D, A, a->dnodes, Cn, a->y, D, NULL, 0, g->embed_y.w, D);
    gemm(1, 0, D, V, A, a->dnodes, Cn, m->elements, V, NULL, 0, g->embed_x.w, V);
    column_sums(g->embed_y.b, a->dnodes, Cn, A, D);
    memcpy(g->embed_x.b, g->embed_y.b, sizeof(float) * (size_t)D);
    gemm(0, 0, A, D, D, a->dnodes, Cn, p->embed_y.w, D, NULL, 1, a->dy, D);
}

// L_elements = sum of sigma^p (noise - m / sigma)^2 / (V B N), N of the largest molecule; L_bonds
// the same over the ordered pairs of atoms, / (B N^2). Atoms without bonds and pairs of an atom
// with itself have neither m nor noise. Stores dm_x and dm_adj.
static void to2d_loss(double loss[TERMS], Sde *s) {
    const Mols *m = &s->mols;
    double sum_x = 0, sum_adj = 0, n = (double)m->B * m->N, half = s->method.to2d / 2;
    for (size_t b = 0; b < m->B; b++) {
        Place v = place_of(m, b);
        double sigma = (double)m->sigma[m->B + b], weight = pow(sigma, s->method.anneal);
        double scale_x = weight / (V * n), scale_adj = 2 * weight / (n * m->N);  // (i, j), (j, i)
        for (size_t k = V * v.atom; k < V * (v.atom + (size_t)v.N); k++) {
            if (!m->bonded[k / V]) s->a.m_x[k] = 0;
            double error = (double)m->noise_x[k] - (double)s->a.m_x[k] / sigma;
            sum_x += scale_x * error * error;
            s->a.dm_x[k] = m->bonded[k / V] ? (float)(-2 * half * scale_x * error / sigma) : 0;
        }
        FOR_PAIRS(v, i, j) {
            size_t q = pair_row(&v, i, j);
            int counts = i != j && both_bonded(m, &v, i, j);
            if (!counts) s->a.m_adj[q] = 0;
            double error = (double)m->noise_adj[q] - (double)s->a.m_adj[q] / sigma;
            sum_adj += scale_adj * error * error;
            s->a.dm_adj[q] = counts ? (float)(-2 * half * scale_adj * error / sigma) : 0;
        }
    }
    loss[TERM_ELEMENTS] = sum_x;
    loss[TERM_BONDS] = sum_adj;
}

// =================================================================================================
// 9 One training step
// =================================================================================================

static void loss_total(double loss[TERMS], const Method *m) {
    loss[TERM_TOTAL] = m->contrast * loss[TERM_CONTRAST] + m->to3d * loss[TERM_3D] +
                       m->to2d * (loss[TERM_ELEMENTS] + loss[TERM_BONDS]) / 2;
}

// Losses of the batch in s, and the gradients of what the networks say.
static void losses(double loss[TERMS], Sde *s) {
    mols_noised(s);
    buffers_layout(s);
    gin_forward(s);
    schnet_forward(s);
    contrast(loss, s);
    to3d_graph_forward(s);
    to3d_score_forward(s);
    to3d_loss(loss, s);
    to2d_forward(s);
    to2d_loss(loss, s);
    loss_total(loss, &s->method);
}

// The same if the networks said 0, and no vector told anything.
static void losses_by_chance(double loss[TERMS], Sde *s) {
    mols_noised(s);
    buffers_layout(s);
    memset(s->a.eps_hat, 0, sizeof(float) * 3 * s->mols.A);
    memset(s->a.m_x, 0, sizeof(float) * V * s->mols.A);
    memset(s->a.m_adj, 0, sizeof(float) * s->mols.P);
    to3d_loss(loss, s);
    to2d_loss(loss, s);
    loss[TERM_CONTRAST] = 2 * log(2);
    loss[TERM_ACCURACY] = 0.5;
    loss_total(loss, &s->method);
}

static void gradients_of_losses(Sde *s) {
    to3d_backward(s);   // contrast() stored dx and dy, these two add to them
    to2d_backward(s);
    gin_backward(s);
    schnet_backward(s);
}

// Adam of moleblend.c, on the two groups of parameters with their rates. Returns the norm of all
// gradients.
static double update(Sde *s, const Adam *adam, double scale_3d, int64_t t) {
    double square = 0;
    for (int group = 0; group < GROUP_FIXED; group++) {
        size_t first = group ? s->group_end[group - 1] : 0;
        Model part = s->model;
        Adam rate = *adam;
        part.count = s->group_end[group] - first;
        part.params += first;
        part.grads += first;
        part.m += first;
        part.v += first;
        if (group == GROUP_3D) rate.lr *= scale_3d;
        double norm = adamw_step(&part, &rate, t);
        square += norm * norm;
    }
    return sqrt(square);
}

// Molecules ids[0..B) of a dataset: losses, gradients, update t = 1, 2, ...; returns the norm.
static double sde_step(double loss[TERMS], Sde *s, const Dataset *data, const uint32_t *ids,
                       size_t B, const Adam *adam, double scale_3d, const Draws *draws, int64_t t) {
    s->draws = *draws;
    s->training = 1;
    mols_load(&s->mols, data, ids, B, 0);
    mols_draw(s);
    losses(loss, s);
    gradients_of_losses(s);
    return update(s, adam, scale_3d, t);
}

// ==== The method ends here. What follows may be skipped by whoever came for it. ==================

// DEVIATIONS from the official release, all of them where it fails or is arbitrary:
//   - SchNet sees all neighbours within 10 A (release: 32 of them, which ones is not said);
//   - sigma of VP by expm1 (release: 1 - exp(2l), noise for small t);
//   - the sine of an angle is 0 if its cosine is above 1 by rounding (release: not a number);
//   - the sampler goes through all steps, each with one corrector step (release: it stops after 11
//     of 1000; of its 100 corrector steps all but the last are lost);
//   - a batch without any bond is trained on (release: its BN fails);
//   - fine-tuning regression takes any number of tasks.

// =================================================================================================
// 10 Sampling conformers: from noise to positions in M steps, t from 1 to 0.0001. score = -eps_hat
//   / sigma(t). In each step the corrector walks along the score with fresh noise (Langevin), then
//   the predictor undoes a step of the noising. All copies of the molecule are one batch.
// =================================================================================================

#define T_END 1e-4
#define SIGNAL_TO_NOISE 0.2
#define NOISE_SCALE 0.9

// score (A, 3), in eps_hat, of the positions in s->mols.q.
static float *sample_score(Sde *s, double t) {
    float scale = (float)(-1 / noise_sigma(&s->method, &s->method.ve3d, t));
    to3d_score_forward(s);
    for (size_t k = 0; k < 3 * s->mols.A; k++) s->a.eps_hat[k] *= scale;
    return s->a.eps_hat;
}

// Mean length of the rows of x (A, 3).
static double mean_length(const float *x, size_t A) {
    double sum = 0;
    for (size_t i = 0; i < A; i++) {
        double row[3] = {(double)x[3 * i], (double)x[3 * i + 1], (double)x[3 * i + 2]};
        sum += sqrt(dot3(row, row));
    }
    return sum / (double)A;
}

// Step i = 0..M-1 of q; corrector and predictor: noise (A, 3) of each. mean (A, 3), or NULL: q
// before the predictor's noise, which is the result of the last step.
static void sample_step(Sde *s, int i, int M, const float *corrector, const float *predictor,
                        float *mean) {
    const Method *m = &s->method;
    size_t n = 3 * s->mols.A;
    int k = M - 1 - i;
    double t = M > 1 ? 1 + i * (T_END - 1) / (M - 1) : 1, share = M > 1 ? (double)k / (M - 1) : 0;
    double beta = (m->beta.low + (m->beta.high - m->beta.low) * share) / M;
    float *q = s->mols.q, *g = sample_score(s, t);
    double length = mean_length(g, s->mols.A), ratio = 0, diffusion = beta;
    if (length > 0) ratio = SIGNAL_TO_NOISE * mean_length(corrector, s->mols.A) / length;
    double step = 2 * (m->vp ? 1 - beta : 1) * ratio * ratio;
    for (size_t x = 0; x < n; x++)
        q[x] += (float)step * g[x] + (float)(NOISE_SCALE * sqrt(2 * step)) * corrector[x];
    g = sample_score(s, t);
    double keep = 2 - sqrt(1 - beta), sigma[2];  // VP
    for (int x = 0; x < 2 && !m->vp; x++) {      // sigma_k, sigma_k-1
        double power = M > 1 ? (double)(k - x) / (M - 1) : 0;
        sigma[x] = k >= x ? m->ve3d.low * pow(m->ve3d.high / m->ve3d.low, power) : 0;
        keep = 1;
        diffusion = sigma[0] * sigma[0] - (x ? sigma[1] * sigma[1] : 0);
    }
    for (size_t x = 0; x < n; x++) {
        float middle = (float)keep * q[x] + (float)diffusion * g[x];
        if (mean) mean[x] = middle;
        q[x] = middle + (float)sqrt(diffusion) * predictor[x];
    }
}

#include "model.h"  // sections 11 to 13: what is promised above, and checkpoints
#include "run.c"    // sections 14 to 16: the program
