// moleblend.c - MoleBLEND in plain C: pretrain, fine-tune and use a Transformer on molecules.
//
//   "Multimodal Molecular Pretraining via Modality Blending" (Yu et al., ICLR 2024,
//   arXiv 2307.06235). For every ordered pair of atoms one of three relations is drawn - shortest
//   path distance, bond path (the paper also says edge), 3D distance -, the blended matrix is the
//   encoder's attention bias, and four heads must recover what was blended: the path's length and
//   bonds, the direction in space, the noise. "(paper 3.1)" refers to that text, names such as
//   `molecule_attn_bias` to modules of its official PyTorch release, whose numbers this file
//   reproduces (see test.c). dev/torch_moleblend.py is the same in PyTorch, to read beside it.
//
//   build:  cc -std=c11 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math
//              -fopenmp moleblend.c -o moleblend -lm
//   use:    ./moleblend train.bin          (train.bin comes from data_prep)
//
// HOW TO READ IT. Sections 1 to 8 are the method, from a molecule to one training step; read them
// in order, each backward pass stands under its forward pass and quotes the line that it undoes.
// What is only declared there, with its contract, is kept below: kernels in section 10, memory in
// 11. All that follows the border, behind section 8, may be skipped. moleblend.h knows nothing of
// the model: molecules, datasets, random numbers (rng_uniform(), rng_normal()), files, options.
//
//   1 a molecule and its relations     5 from relation to attention bias     9 fine-tuning head
//   2 the blend and the batch          6 the encoder                        10 fast arithmetic
//   3 parameters                       7 heads and losses                   11 memory
//   4 layers                           8 one training step                  12 checkpoints
//                                                              13 runs      14 commands, main
//
//   molecule: atoms, bonds, positions
//      | 1                    shortest paths, bond paths; noise on positions -> distances
//      v
//   spd (N, N)   path (N, N, 5)   distance (N, N)               the three relations of a pair
//      | 2 one drawn for each pair          | 2 all three: targets
//      v                                    |
//   bias (H, S, S) 5    tokens (T, C) 5     |
//      |                   |                |
//      +---> L layers <----+  6             |
//                 |                         |
//            x (T, C)                       |
//                 v                         v
//   7  path length (P, 11), path bonds (P, 5, 24), direction (P, 3), noise (A, 3) -> 4 losses
//
// Dimension letters (lower case: an index; Gaussians and Adam have the letters of their textbooks)
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
// Matrices are row-major, shapes are given as (rows, columns), i and j are the two atoms of a pair.
// The gradient of a tensor is named d + its name. s is the Step, p its parameters, g their
// gradients, a its activations. Everything is deterministic: threads share out results, never sums,
// and every random number has a name instead of a turn.

#include "moleblend.h"

// =================================================================================================
// 1 A molecule and its relations (paper 3.1). Ethanol, atoms C0-C1-O2, is the example throughout:
//   `./data_prep -o e.bin data/ethanol.sdf && ./moleblend show e.bin 0` prints these numbers.
//
//     spd  0 1 2     path (0, 2): bonds 0-1, 1-2, both single, code 0     distance  0.0 1.5 2.4
//          1 0 1     path (0, 1): bond 0-1                                          1.5 0.0 1.4
//          2 1 0     path (0, 0): none                                              2.4 1.4 0.0
// =================================================================================================

enum {
    PATH_BONDS = 5,              // E, multi_hop_max_dist
    PATH_NONE = BOND_CODES,      // code of an empty slot of a path; bonds have 0..59
    PATH_CODES = BOND_CODES + 1,
    SPD_UNREACHABLE = 510,       // and every path of 510 bonds or more
    SPD_ROWS = 512,              // rows of spatial_pos_encoder and of the degree tables
};

// What a thread needs to read a molecule.
typedef struct {
    Molecule molecule;
    uint16_t *next;              // (N, N) first atom on the way from i to j
    uint8_t *bond;               // (N, N) code of the bond between two neighbours
} Reader;

// Shortest paths of a molecule: spd (N, N) bonds, and path (N, N, E), the codes of the first E
// bonds; degree (N). Floyd-Warshall with the intermediate atom k in the outermost loop and a strict
// test decides which of several shortest paths is taken (algos.pyx of the release).
static void relations(uint16_t *spd, uint8_t *path, uint16_t *degree, const Molecule *m,
                      const Reader *r) {
    size_t N = (size_t)m->n_atoms;
    for (size_t ij = 0; ij < N * N; ij++) spd[ij] = ij % (N + 1) ? SPD_UNREACHABLE : 0;
    memset(degree, 0, N * sizeof *degree);
    for (int k = 0; k < 2 * m->n_bonds; k++) {  // bond k / 2, in both directions
        size_t i = m->bonds[k], j = m->bonds[k ^ 1];
        spd[i * N + j] = 1;
        r->next[i * N + j] = (uint16_t)j;
        r->bond[i * N + j] = m->bond_code[k / 2];
        degree[i] += degree[i] < SPD_ROWS - 2;
    }
    for (size_t k = 0; k < N; k++) {
        const uint16_t *spd_k = spd + k * N;
        for (size_t i = 0; i < N; i++) {
            uint16_t *spd_i = spd + i * N, *next_i = r->next + i * N, spd_ik = spd_i[k];
            uint16_t next_ik = next_i[k];
            if (i == k || spd_ik == SPD_UNREACHABLE) continue;
#pragma omp simd
            for (size_t j = 0; j < N; j++) {
                uint16_t through = (uint16_t)(spd_ik + spd_k[j]);
                int shorter = through < spd_i[j];
                spd_i[j] = shorter ? through : spd_i[j];
                next_i[j] = shorter ? next_ik : next_i[j];
            }
        }
    }
    for (size_t i = 0; i < N; i++) {
        for (size_t j = 0; j < N; j++) {
            uint8_t *path_ij = path + (i * N + j) * PATH_BONDS;
            int length = spd[i * N + j] == SPD_UNREACHABLE ? 0 : spd[i * N + j];
            memset(path_ij, PATH_NONE, PATH_BONDS);
            for (size_t e = 0, at = i; e < PATH_BONDS && (int)e < length; e++) {
                size_t next = r->next[at * N + j];
                path_ij[e] = r->bond[at * N + next];
                at = next;
            }
        }
    }
}

// =================================================================================================
// 2 The blend and the batch (paper 3.2, 3.3). Every ordered pair (i, j) shows the encoder one of
//   its relations, drawn with probabilities 0.2, 0.2, 0.6; every atom its degree or its distances;
//   positions are shaken. The heads must recover everything, from the positions before shaking.
//
//   Ethanol, one blend:  0.0  1.5  --       pair (0, 2) shows the bonds of its path, pair (2, 0)
//                        1.5  0    1.4      its distance, pair (1, 1) its length; what a pair does
//                        2.4  1    .        not show is not in its bias. - single bond, . no bonds
//
//   A batch is packed: no padding, no mask. Two molecules of 2 and 3 atoms (g: graph token):
//
//     tokens  g 0 1 | g 0 1 2          T = 7     token of atom a of molecule b: a + b + 1
//     atoms     0 1 |   2 3 4          A = 5     atom_start 0, 2, 5
//     pairs   0 1   | 4  5  6          P = 13    pair_start 0, 4, 13
//             2 3   | 7  8  9                    pair (i, j) of a molecule: + i * N + j
//                   | 10 11 12
//     bias    (H, 3, W) | (H, 4, W)              H * bias_start; rows of S numbers and padding
// =================================================================================================

enum { USE_SPD = 1, USE_EDGE = 2, USE_3D = 4 };  // of a pair; an atom uses USE_SPD (2D) or USE_3D
enum { SPD_CLASSES = 11, EDGE_CLASSES = 24 };
enum { LOSS_TOTAL, LOSS_NOISE, LOSS_SPD, LOSS_EDGE, LOSS_3D, LOSSES };
static const char *const LOSS_NAMES[LOSSES] = {"total", "denoise", "spd", "edge", "3d"};

#define DIRECTION_EPS 1e-5f  // direction = (pos_j - pos_i) / (distance + eps)

// Largest batch a set of buffers can hold; every member separately.
typedef struct {
    size_t B, T, A, P;
    size_t bias_size;  // sum over molecules of S rows of length W
    size_t N;          // atoms of the largest molecule
} Sizes;

// X(type, field, count): the arrays of a batch. "+ 1" makes room for the end of the last one.
#define BATCH_ARRAYS(X)                                                                            \
    X(int, n_atoms, B)                                                                             \
    X(size_t, atom_start, B + 1)                                                                   \
    X(size_t, pair_start, B + 1)                                                                   \
    X(size_t, bias_start, B + 1)                                                                   \
    X(size_t, dir_pairs, B)            /* ordered pairs that count in the 3D loss */               \
    X(uint8_t, has_pos, B)                                                                         \
    X(int, molecule, A + B)            /* of a token */                                            \
    X(uint8_t, atom_feat, A *ATOM_FEATURES)                                                        \
    X(uint16_t, degree, A)                                                                         \
    X(uint8_t, atom_use, A)            /* USE_ bits */                                             \
    X(float, pos, 3 * A)               /* clean */                                                 \
    X(float, noise, 3 * A)                                                                         \
    X(uint16_t, spd, P)                                                                            \
    X(uint8_t, path, P *PATH_BONDS)    /* bond codes, PATH_NONE */                                 \
    X(uint8_t, pair_use, P)            /* USE_ bits */                                             \
    X(int, pair_row, P)                /* its row in (Q, *) matrices, -1: uses no 3D */            \
    X(float, distance, P)              /* of the noised positions */                               \
    X(float, direction, 3 * P)         /* per molecule (3, N, N): from i to j, of length < 1 */    \
    X(int8_t, spd_target, P)           /* classes, -1: not counted */                              \
    X(int8_t, edge_target, P *PATH_BONDS)                                                          \
    X(float, labels, B *Y)

typedef struct {
    size_t B, T, A, P, Q, bias_size;
    int N, Y;                          // atoms of the largest molecule, labels of each
    double count[LOSSES];              // what counts in a loss: atoms, pairs, slots, molecules
    Sizes room;
    void *memory;
#define X(type, field, count) type *field;
    BATCH_ARRAYS(X)
#undef X
    Reader *reader;                    // (threads)
} Batch;

// Where molecule b stands in a batch.
typedef struct {
    int N, S, W;                       // atoms, tokens, row length of its bias matrices
    size_t b, atom, token, pair;       // its number; its first atom, token and pair
} View;

static int padded(int n);              // n rounded up to whole vectors; section 10

static View batch_view(const Batch *batch, size_t b) {
    int N = batch->n_atoms[b];
    size_t atom = batch->atom_start[b];
    return (View){N, N + 1, padded(N + 1), b, atom, atom + b, batch->pair_start[b]};
}

// The bias matrix (S, W) of head h of a molecule begins here in an array of (H, S, W) matrices.
static size_t bias_at(const Batch *batch, int H, const View *v, int h) {
    return (size_t)H * batch->bias_start[v->b] + (size_t)h * (size_t)v->S * (size_t)v->W;
}

static void batch_layout(Batch *batch, size_t B);  // the drawing above, from n_atoms; section 11

// Copies a molecule into place b of a batch that has been laid out, and finds its relations.
static void batch_set(Batch *batch, size_t b, const Molecule *m, const Reader *r) {
    View v = batch_view(batch, b);
    size_t N = (size_t)v.N;
    memcpy(batch->atom_feat + v.atom * ATOM_FEATURES, m->atom_feat, N * ATOM_FEATURES);
    batch->has_pos[b] = (uint8_t)m->has_pos;
    memset(batch->pos + 3 * v.atom, 0, 3 * N * sizeof(float));
    memset(batch->noise + 3 * v.atom, 0, 3 * N * sizeof(float));
    if (m->has_pos) memcpy(batch->pos + 3 * v.atom, m->pos, 3 * N * sizeof(float));
    for (int y = 0; y < batch->Y; y++) batch->labels[b * (size_t)batch->Y + y] = m->labels[y];
    relations(batch->spd + v.pair, batch->path + v.pair * PATH_BONDS, batch->degree + v.atom, m, r);
}

// How relations are blended in pretraining (paper 3.2), and the noise on the positions (3.3).
typedef struct {
    double pair_spd, pair_edge, pair_3d;  // probabilities of a pair's relation
    double atom_2d, atom_3d;              // of an atom's structural embedding
    double noise;                         // standard deviation per coordinate, Angstrom
    int all;                              // no blending: every relation of every pair
} Blend;

// Who draws: every random number of a step is named by these, a purpose and its place, so that it
// does not depend on threads, on the order of evaluation or on where a run was resumed.
typedef struct {
    uint64_t seed;
    uint32_t step, first_slot;            // molecule b of the batch is named first_slot + b
    int active;                           // 0: no dropout (evaluation)
} Draws;

// Uses the same relations for every pair and atom of molecule b (fine-tuning, --no-blend): `use` is
// a set of USE_ bits; 3D only where there are positions.
static void batch_use(Batch *batch, size_t b, int use) {
    View v = batch_view(batch, b);
    if (!batch->has_pos[b]) use &= ~USE_3D;
    memset(batch->pair_use + v.pair, use, (size_t)v.N * (size_t)v.N);
    memset(batch->atom_use + v.atom, use, (size_t)v.N);
}

// Draws the relation of every pair, the structure of every atom, and the noise of molecule b. A
// molecule without positions has 2D only, with the probabilities renormalised.
static void batch_draw(Batch *batch, size_t b, const Blend *blend, const Draws *draws) {
    View v = batch_view(batch, b);
    size_t N = (size_t)v.N;
    int has_pos = batch->has_pos[b];
    uint32_t slot = draws->first_slot + (uint32_t)b, step = draws->step;
    double spd = blend->pair_spd, edge = spd + blend->pair_edge;
    double total = edge + (has_pos ? blend->pair_3d : 0);
    double atom_2d = blend->atom_2d / (blend->atom_2d + blend->atom_3d);
    for (uint32_t k = 0; k < N * N; k++) {
        double u = (double)rng_uniform(draws->seed, RNG_BLEND, step, slot, k) * total;
        batch->pair_use[v.pair + k] = u < spd ? USE_SPD : u < edge || !has_pos ? USE_EDGE : USE_3D;
    }
    for (uint32_t i = 0; i < N; i++) {
        double u = (double)rng_uniform(draws->seed, RNG_FEATURE, step, slot, i);
        batch->atom_use[v.atom + i] = u < atom_2d || !has_pos ? USE_SPD : USE_3D;
    }
    if (blend->all) batch_use(batch, b, USE_SPD | USE_EDGE | USE_3D);
    for (uint32_t k = 0; has_pos && k < 3 * N; k++)
        batch->noise[3 * v.atom + k] =
            (float)blend->noise * rng_normal(draws->seed, RNG_NOISE, step, slot, k);
}

// Is the ordered pair counted in the 3D loss? Not if the atoms coincide, as i = j does.
static int dir_counts(const float *pos, size_t i, size_t j) {
    const float *p = pos + 3 * i, *q = pos + 3 * j;
    return p[0] != q[0] || p[1] != q[1] || p[2] != q[2];
}

// Class of a pair in the SPD head, or -1: not counted.
static int spd_class(int spd) {
    if (spd < 1 || spd >= SPD_UNREACHABLE) return -1;
    return spd <= 10 ? spd - 1 : 10;
}

// Class of a path slot in the edge head, or -1: not counted. Code = 12 type + 2 stereo + conj;
// that of an empty slot, PATH_NONE, has type 5.
static int edge_class(int code) {
    int type = code / 12, stereo = code / 2 % 6, conjugated = code % 2;
    if (type >= 4 || stereo >= 3) return -1;
    return 6 * type + 2 * stereo + conjugated;
}

// What follows for every pair of molecule b: distance and direction, from the noised positions; and
// what the heads must say of it, whichever relation it shows. Ethanol, pair (0, 2): SPD class 1
// (two bonds), edge classes 0 and 0 (single bonds), three empty slots, direction pos_2 - pos_0.
static void batch_pairs(Batch *batch, size_t b) {
    View v = batch_view(batch, b);
    size_t N = (size_t)v.N, plane = N * N;
    const float *pos = batch->pos + 3 * v.atom, *noise = batch->noise + 3 * v.atom;
    batch->dir_pairs[b] = 0;
    for (size_t ij = 0; ij < plane; ij++) {
        size_t i = ij / N, j = ij % N, pair = v.pair + ij;
        float d[3], square = 0;
        for (size_t k = 0; k < 3; k++) {
            d[k] = (pos[3 * j + k] + noise[3 * j + k]) - (pos[3 * i + k] + noise[3 * i + k]);
            square += d[k] * d[k];
        }
        batch->distance[pair] = sqrtf(square);
        for (size_t k = 0; k < 3; k++)
            batch->direction[3 * v.pair + k * plane + ij] = d[k] / (sqrtf(square) + DIRECTION_EPS);
        batch->spd_target[pair] = (int8_t)spd_class(batch->spd[pair]);
        for (size_t k = pair * PATH_BONDS; k < (pair + 1) * PATH_BONDS; k++)
            batch->edge_target[k] = (int8_t)edge_class(batch->path[k]);
        batch->dir_pairs[b] += batch->has_pos[b] && dir_counts(pos, i, j);
    }
}

// Does the atom count in the denoising loss?
static int noise_counts(const Batch *batch, const View *v, int i) {
    return batch->has_pos[v->b] && (batch->atom_use[v->atom + (size_t)i] & USE_3D);
}

// What is known once all molecules are set: the rows of 3D pairs, and what the losses are means of.
static void batch_count(Batch *batch) {
    double *count = batch->count;
    batch->Q = 0;
    for (int k = 0; k < LOSSES; k++) count[k] = 0;
    for (size_t p = 0; p < batch->P; p++) {
        batch->pair_row[p] = batch->pair_use[p] & USE_3D ? (int)batch->Q++ : -1;
        count[LOSS_SPD] += batch->spd_target[p] >= 0;
        for (size_t e = 0; e < PATH_BONDS; e++)
            count[LOSS_EDGE] += batch->edge_target[p * PATH_BONDS + e] >= 0;
    }
    for (size_t k = 0; k < batch->B * (size_t)batch->Y; k++)  // fine-tuning has but this one
        count[LOSS_TOTAL] += !isnan(batch->labels[k]);
    for (size_t b = 0; b < batch->B; b++) {
        View v = batch_view(batch, b);
        count[LOSS_3D] += batch->dir_pairs[b] > 0;
        for (int i = 0; i < v.N; i++) count[LOSS_NOISE] += noise_counts(batch, &v, i) != 0;
    }
}

// Reads molecules ids[0..B) of a dataset into a batch: relations drawn according to `blend`, or if
// that is NULL the fixed set `use`. Dies if a record is damaged, naming the first one.
static void batch_load(Batch *batch, const Dataset *data, const uint32_t *ids, size_t B,
                       const Blend *blend, int use, const Draws *draws) {
    size_t bad = B;  // first molecule that cannot be read
    for (size_t b = 0; b < B; b++) batch->n_atoms[b] = dataset_atoms(data, ids[b]);
    batch_layout(batch, B);
#pragma omp parallel for schedule(dynamic) reduction(min : bad)
    for (size_t b = 0; b < B; b++) {
        Reader *r = &batch->reader[thread_id()];
        if (dataset_try(data, ids[b], &r->molecule)) {
            bad = b < bad ? b : bad;
            continue;
        }
        batch_set(batch, b, &r->molecule, r);
        if (blend) batch_draw(batch, b, blend, draws);
        else batch_use(batch, b, use);
        batch_pairs(batch, b);
    }
    if (bad < B) dataset_read(data, ids[bad], &batch->reader[0].molecule);  // dies
    batch_count(batch);
}

// =================================================================================================
// 3 Parameters. One table names every tensor: it makes the structs, the arena, the initialisation,
//   the optimiser's reach, the checkpoint and the tests. Gradients and the two Adam moments are
//   arenas of the same layout. Official names and shapes, quirks included, are those of the
//   release's state dict, so that PyTorch loads our checkpoints.
//
//   The code relies on the order in two ways, which test.c checks:
//   - the tables, of which a batch uses few rows, come first, up to gauss_bias: their gradients are
//     zeroed in every step, as rows are added to; those of all other tensors are stored whole;
//   - rows that one product computes stand together: q, k, v of a layer and of the denoising head,
//     the six pair maps, the three axes (axis1..3) of the 3D head and of the denoising head.
// =================================================================================================

enum {
    PAIR_WIDTH = 32,         // R, transform_n2_head
    PAIR_MAPS = 6,           // row and column map of three heads
    FEATURE_ROWS = 512,      // rows per feature in the atom and bond tables; row 0 is padding
    ATOM_ROWS = 1 + 9 * 512, // feature value v of feature k is row 2 + 512 k + v
    ATOM_ROW_OFFSET = 2,
    BOND_ROWS = 1 + 3 * 512, // feature value v of feature k is row 3 + 512 k + v
    BOND_ROW_OFFSET = 3,
    GAUSS_ROWS = 1536,       // gbf.mul and gbf.bias
    GAUSS_ROW_OFFSET = 3,    // atom i: row 3 + atomic number index; atom j: 512 more
    EDGE_DIS_BLOCKS = 128,   // edge_dis_encoder has 128 blocks of (H, H), 5 are used
    EDGE_OUTPUTS = PATH_BONDS * EDGE_CLASSES,
    DIR_INNER = 256,         // blend_3d_pred_head.linear
    MAX_LAYERS = 96, MAX_DIM = 8192, MAX_HEADS = 256, MAX_KERNELS = 4096,
};

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

#define INIT_STD 0.02f

// X(field, official name, rows, columns, rule); rows = 0: a vector of `columns` numbers.
#define LINEAR(X, field, name, rows, columns)                                                      \
    X(field##_w, name ".weight", rows, columns, INIT_NORMAL)                                       \
    X(field##_b, name ".bias", 0, rows, INIT_ZERO)

#define AXES(X, field, name, columns)                                                              \
    X(field##1_w, name "1.weight", 1, columns, INIT_NORMAL)                                        \
    X(field##2_w, name "2.weight", 1, columns, INIT_NORMAL)                                        \
    X(field##3_w, name "3.weight", 1, columns, INIT_NORMAL)                                        \
    X(field##1_b, name "1.bias", 0, 1, INIT_ZERO)                                                  \
    X(field##2_b, name "2.bias", 0, 1, INIT_ZERO)                                                  \
    X(field##3_b, name "3.bias", 0, 1, INIT_ZERO)

#define NORM(X, field, name)                                                                       \
    X(field##_w, name ".weight", 0, C, INIT_ONE)                                                   \
    X(field##_b, name ".bias", 0, C, INIT_ZERO)

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
    LINEAR(X, bias3d1, "molecule_3d_bias.gbf_proj.layer1", G, G)                                   \
    LINEAR(X, bias3d2, "molecule_3d_bias.gbf_proj.layer2", H, G)                                   \
    LINEAR(X, structure3d, "molecule_3d_bias.edge_proj", C, G)                                     \
    NORM(X, embed_norm, "emb_layer_norm")

#define LAYER_TENSORS(X)                                                                           \
    X(q_w, "layers.%d.self_attn.q_proj.weight", C, C, INIT_NORMAL)                                 \
    X(k_w, "layers.%d.self_attn.k_proj.weight", C, C, INIT_NORMAL)                                 \
    X(v_w, "layers.%d.self_attn.v_proj.weight", C, C, INIT_NORMAL)                                 \
    X(q_b, "layers.%d.self_attn.q_proj.bias", 0, C, INIT_ZERO)                                     \
    X(k_b, "layers.%d.self_attn.k_proj.bias", 0, C, INIT_ZERO)                                     \
    X(v_b, "layers.%d.self_attn.v_proj.bias", 0, C, INIT_ZERO)                                     \
    LINEAR(X, out, "layers.%d.self_attn.out_proj", C, C)                                           \
    NORM(X, norm1, "layers.%d.self_attn_layer_norm")                                               \
    LINEAR(X, ffn1, "layers.%d.fc1", F, C)                                                         \
    LINEAR(X, ffn2, "layers.%d.fc2", C, F)                                                         \
    NORM(X, norm2, "layers.%d.final_layer_norm")

#define PAIR_MAP_TENSORS(X, kind, last, rows, columns, rule)                                       \
    X(spd_row_##kind, "blend_spd_pred_head.transform_n2_head.row_" last, rows, columns, rule)      \
    X(spd_col_##kind, "blend_spd_pred_head.transform_n2_head.column_" last, rows, columns, rule)   \
    X(edge_row_##kind, "blend_edge_pred_head.transform_n2_head.row_" last, rows, columns, rule)    \
    X(edge_col_##kind, "blend_edge_pred_head.transform_n2_head.column_" last, rows, columns, rule) \
    X(dir_row_##kind, "blend_3d_pred_head.transform_n2_head.row_" last, rows, columns, rule)       \
    X(dir_col_##kind, "blend_3d_pred_head.transform_n2_head.column_" last, rows, columns, rule)

#define PRETRAIN_TENSORS(X)                                                                        \
    PAIR_MAP_TENSORS(X, w, "head.weight", R, C, INIT_NORMAL)                                       \
    PAIR_MAP_TENSORS(X, b, "head.bias", 0, R, INIT_ZERO)                                           \
    PAIR_MAP_TENSORS(X, norm_w, "LayerNorm.weight", 0, R, INIT_ONE)                                \
    PAIR_MAP_TENSORS(X, norm_b, "LayerNorm.bias", 0, R, INIT_ZERO)                                 \
    LINEAR(X, spd, "blend_spd_pred_head.linear", SPD_CLASSES, R *R)                                \
    LINEAR(X, edge, "blend_edge_pred_head.linear_map_feature", EDGE_OUTPUTS, R *R)                 \
    LINEAR(X, dir, "blend_3d_pred_head.linear", DIR_INNER, R *R)                                   \
    AXES(X, dir_axis, "blend_3d_pred_head.force_proj", DIR_INNER)                                  \
    X(denoise_q_w, "atom_proc.q_proj.weight", C, C, INIT_NORMAL)                                   \
    X(denoise_k_w, "atom_proc.k_proj.weight", C, C, INIT_NORMAL)                                   \
    X(denoise_v_w, "atom_proc.v_proj.weight", C, C, INIT_NORMAL)                                   \
    X(denoise_q_b, "atom_proc.q_proj.bias", 0, C, INIT_ZERO)                                       \
    X(denoise_k_b, "atom_proc.k_proj.bias", 0, C, INIT_ZERO)                                       \
    X(denoise_v_b, "atom_proc.v_proj.bias", 0, C, INIT_ZERO)                                       \
    AXES(X, denoise_axis, "atom_proc.force_proj", C)

#define FINETUNE_TENSORS(X)                                                                        \
    LINEAR(X, head1, "proj_out.dense", C, C)                                                       \
    LINEAR(X, head2, "proj_out.out_proj", Y, C)

#define X(field, name, rows, columns, rule) float *field;
typedef struct { LAYER_TENSORS(X) } LayerTensors;
typedef struct {
    ENCODER_TENSORS(X)
    LayerTensors layer[MAX_LAYERS];
    PRETRAIN_TENSORS(X)  // NULL in a fine-tuning model
    FINETUNE_TENSORS(X)  // NULL in a pretraining model
} Tensors;
#undef X

typedef struct TensorInfo TensorInfo;  // a row of the table; section 11

typedef struct {
    Config config;
    TensorInfo *info;     // (n_tensors)
    int n_tensors;
    size_t count;         // parameters in all
    size_t table_count;   // those of the tables, at the front
    float *params, *grads, *m, *v;  // arenas; the last three are NULL without training
    double *squares;      // (chunks) of gradients, see gradient_norm()
    uint8_t *live;        // (chunks) has a chunk of parameters ever had a gradient?
    Tensors p, g;         // pointers into params and grads
} Model;

// =================================================================================================
// 4 Layers, forward and backward. Kernels that are promised here and kept in section 10:
// =================================================================================================

ALWAYS_INLINE float exp_fast(float x);        // e^x to 2e-7; no call, no branch: vectorised
ALWAYS_INLINE float gelu(float x);            // x Phi(x), Phi the normal distribution function
ALWAYS_INLINE float gelu_slope(float x);      // its derivative, Phi(x) + x phi(x)

// x (n) = softmax of x (n), in place. Returns the largest x, and the sum of exp(x - largest).
typedef struct { float top, sum; } LogSum;
static LogSum softmax_row(float *x, int n);

// mask (n): 0 with probability p, else 1 / (1 - p). Named (purpose, slot, row).
static void dropout_row(float *mask, int n, double p, const Draws *draws, uint32_t purpose,
                        uint32_t slot, uint32_t row);

// Memory that is made once and serves every step.
typedef struct {
    int threads;
    float *packed_a, *packed_b;  // of gemm()
    float *thread;               // (threads, thread_size) scratch of a task
    size_t thread_size;
} Work;

static float *work_thread(const Work *w) {
    return w->thread + (size_t)thread_id() * w->thread_size;
}

// C (M, N) = A (M, K) @ B (K, N), + C if `add`, else + bias (N) on every row if that is not NULL.
// trans_a: A is stored as (K, M); trans_b: B is stored as (N, K). lda, ldb, ldc: row strides.
static void gemm(const Work *w, int trans_a, int trans_b, int M, int N, int K, const float *A,
                 int lda, const float *B, int ldb, const float *bias, int add, float *C, int ldc);

// out (m, n) = a (m, K) @ b (K, n) for the small matrices of one molecule, by one thread. Element
// (r, k) of a stands at r * a_row + k * a_col. n: whole vectors, so rows of b and out are padded.
static void small_product(float *out, int ldo, const float *a, int a_row, int a_col, const float *b,
                          int ldb, int m, int n, int K);

// out (rows, width) = x (rows, n), or its transpose: out (n, width) = x (rows, n)^T; zero beyond.
static void copy_padded(float *out, int width, const float *x, int ldx, int rows, int n);
static void copy_transposed(float *out, int width, const float *x, int ldx, int rows, int n);

// out (n) = sum over the rows of x (rows, n), in order; threads share out the columns.
static void column_sums(float *out, const float *x, int ldx, int rows, int n);

// ---- linear: out (rows, OC) = x (rows, IC) @ weight (OC, IC)^T + bias (OC)

static void linear_forward(const Work *w, float *out, const float *x, const float *weight,
                           const float *bias, int rows, int IC, int OC) {
    gemm(w, 0, 1, rows, OC, IC, x, IC, weight, IC, bias, 0, out, OC);
}

// dweight = dout^T x, dbias = column sums of dout; dx (may be NULL) = dout weight, + dx if add_dx.
// dx may be x, which is read before. A weight is used once in a step: its gradient is stored.
static void linear_backward(const Work *w, float *dx, int add_dx, float *dweight, float *dbias,
                            const float *dout, const float *x, const float *weight, int rows,
                            int IC, int OC) {
    gemm(w, 1, 0, OC, IC, rows, dout, OC, x, IC, NULL, 0, dweight, IC);
    column_sums(dbias, dout, OC, rows, OC);
    if (dx) gemm(w, 0, 0, rows, IC, OC, dout, OC, weight, IC, NULL, add_dx, dx, IC);
}

// ---- gelu and dropout, element by element

static void gelu_forward(float *out, const float *pre, size_t n);  // out (n) = gelu(pre (n))
static void gelu_backward(float *d, const float *pre, size_t n);   // d (n) *= gelu_slope(pre (n))

// Rows of x (T, n): x = mask * x, the same in both passes.
static void dropout_rows(float *x, const Work *w, const Batch *batch, int n, double p,
                         const Draws *draws, uint32_t purpose);

// ---- DropPath of a residual branch of layer l, the second one of a layer if `second`: a molecule
//      loses its branch with probability p, which rises linearly from 0 in the first layer

typedef struct { double p; const Draws *draws; int layer, second; } DropPath;

// Scale of molecule b's branch: 0 with probability p, else 1 / (1 - p).
static float droppath_scale(const DropPath *drop, size_t b) {
    const Draws *draws = drop->draws;
    if (!draws->active || drop->p <= 0) return 1.0f;
    float u = rng_uniform(draws->seed, RNG_PATH_DROP + (uint32_t)drop->layer, draws->step,
                          draws->first_slot + (uint32_t)b, (uint32_t)drop->second);
    return (double)u < drop->p ? 0.0f : (float)(1.0 / (1.0 - drop->p));
}

// ---- residual connection and LayerNorm: hat = (in - mean) / sqrt(variance + eps),
//      out = hat * weight + bias, in = residual + droppath_scale() * branch

#define NORM_EPS 1e-5f        // trunk
#define PAIR_NORM_EPS 1e-12f  // pair maps
// One row, n numbers; in and hat may be the same, as may din and dout.
ALWAYS_INLINE void norm_row_forward(float *out, float *hat, float *rstd, const float *in,
                                    const float *weight, const float *bias, int n, float eps);

// din = rstd * (dhat - mean(dhat) - hat * mean(dhat * hat)), dhat = dout * weight;
// dweight += dout * hat, dbias += dout.
ALWAYS_INLINE void norm_row_backward(float *din, float *dweight, float *dbias, const float *dout,
                                     const float *hat, float rstd, const float *weight, int n);

// Rows (T, groups * n), each group of n numbers normalised by itself (the pair maps have six, the
// trunk one). hat is saved, and rstd (T, groups). branch, and with it drop, may be NULL.
static void norm_forward(float *out, float *hat, float *rstd, const float *residual,
                         const float *branch, const DropPath *drop, const float *weight,
                         const float *bias, const Batch *batch, int groups, int n, float eps) {
    size_t width = (size_t)groups * (size_t)n;
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < batch->T; t++) {
        const float *in = residual + t * width;
        if (branch) {
            const float *branch_t = branch + t * width;
            float scale = droppath_scale(drop, (size_t)batch->molecule[t]);
            for (size_t c = 0; c < width; c++) hat[t * width + c] = in[c] + scale * branch_t[c];
            in = hat + t * width;
        }
        for (int g = 0; g < groups; g++) {
            size_t at = t * width + (size_t)g * (size_t)n;
            norm_row_forward(out + at, hat + at, &rstd[t * (size_t)groups + (size_t)g], in + g * n,
                             weight + g * n, bias + g * n, n, eps);
        }
    }
}

enum { NORM_ROWS = 32 };  // rows that share a partial sum of the weights' gradients

// dresidual (may be dout) and dbranch (may be NULL) are stored, and so are dweight and dbias, sums
// over the rows by way of parts (ceil(T / NORM_ROWS), 2, groups * n).
static void norm_backward(float *dresidual, float *dbranch, const DropPath *drop, float *dweight,
                          float *dbias, float *parts, const float *dout, const float *hat,
                          const float *rstd, const float *weight, const Batch *batch, int groups,
                          int n) {
    int chunks = ((int)batch->T + NORM_ROWS - 1) / NORM_ROWS, width = groups * n;
#pragma omp parallel for schedule(static)
    for (int chunk = 0; chunk < chunks; chunk++) {
        float *dw = parts + (size_t)chunk * 2 * width, *db = dw + width;
        memset(dw, 0, sizeof(float) * 2 * (size_t)width);
        int end = min_int((chunk + 1) * NORM_ROWS, (int)batch->T);
        for (int t = chunk * NORM_ROWS; t < end; t++) {
            for (int g = 0; g < groups; g++) {
                size_t at = (size_t)t * width + (size_t)g * n;
                norm_row_backward(dresidual + at, dw + g * n, db + g * n, dout + at, hat + at,
                                  rstd[(size_t)t * groups + g], weight + g * n, n);
            }
            float scale = dbranch ? droppath_scale(drop, (size_t)batch->molecule[t]) : 0;
            for (size_t c = (size_t)t * width; dbranch && c < (size_t)(t + 1) * width; c++)
                dbranch[c] = scale * dresidual[c];  // forward: in = residual + scale * branch
        }
    }
    column_sums(dweight, parts, 2 * width, chunks, width);
    column_sums(dbias, parts + width, 2 * width, chunks, width);
}

// =================================================================================================
// 5 From relation to attention bias, and the tokens (paper 3.1, 3.2). All three relations of a pair
//   become H numbers, one a head: b_spd a row of a table, b_edge a product along the path, b_3d a
//   small network on Gaussians of the distance. bias[h][1 + i][1 + j] is that of the relation the
//   pair drew (the sum of all that it uses), and is added to the attention scores of every layer
//   and of the denoising head.
//
//   Ethanol, pair (0, 2), head h. It drew the path: (path_bias[0][0] + path_bias[1][0]) / 2; had it
//   drawn its length: spd_table[2 + 1]; its distance: bias3d_out[its row] (of each, number h).
//   Back: dattn_bias[h][1][3], halved, is added to these two of dpath_bias; or it would be added to
//   the row of dspd_table; or become that of dbias3d_out. The others were not added to this bias
//   and get no gradient from it. (Two other ways are open to all pairs: an atom that shows its 3D
//   structure sums Gaussians over all of its pairs, the denoising head weighs all directions.)
// =================================================================================================

// The arrays of all sections, to come back to. X(field, count in floats); Widest, PairWidth and
// PairRows: see acts_place(). Saved by the forward pass for the backward pass:
#define SAVED_ARRAYS(X)                                                                            \
    X(path_bias, PATH_BONDS *PATH_CODES *H)  /* (E, 61, H) b_edge share of a slot's bond */        \
    X(bond_vector, PATH_CODES *H)            /* of every bond code */                              \
    X(gauss_const, 3 * G)                    /* mean, 1 / s, 1 / (sqrt(2 pi) s) */                 \
    X(gauss_sum, A *G)                       /* sum over j of g(i, j) */                           \
    X(gauss, P *G)                           /* (Q, G) g of the pairs that use 3D */               \
    X(bias3d_pre, P *G)                      /* (Q, G) */                                          \
    X(bias3d_hidden, P *G)                   /* (Q, G) */                                          \
    X(bias3d_out, P *H)                      /* (Q, H) */                                          \
    X(attn_bias, BiasSize *H)                /* per molecule (H, S, W) */                          \
    X(x, (L + 1) * T *C)                     /* input of every layer, and the encoder's output */  \
    X(embed_hat, T *C)                       /* normalised, before weight and bias */              \
    X(embed_rstd, T)                                                                               \
    X(qkv, L *T * 3 * C)                                                                           \
    X(prob, L *BiasSize *H)                  /* attention probabilities before dropout */          \
    X(context, L *T *C)                                                                            \
    X(norm1_hat, L *T *C)                                                                          \
    X(norm1_rstd, L *T)                                                                            \
    X(mid, L *T *C)                          /* between attention and feed-forward */              \
    X(ffn_pre, L *T *F)                                                                            \
    X(ffn_hidden, L *T *F)                                                                         \
    X(norm2_hat, L *T *C)                                                                          \
    X(norm2_rstd, L *T)

// Used by the encoder and the heads: gradients, and what is used up at once.
#define SCRATCH_ARRAYS(X)                                                                          \
    X(dx, T *C)                                                                                    \
    X(branch, T *C)                          /* output of a residual branch, and its gradient */   \
    X(dattn_bias, BiasSize *H)                                                                     \
    X(norm_parts, (T / NORM_ROWS + 1) * 2 * Widest)

// Of the encoder alone, before the heads and again after them; they stand where HEAD_ARRAYS do.
#define ENCODER_ARRAYS(X)                                                                          \
    X(dmid, T *C)                                                                                  \
    X(structure3d, A *C)                                                                           \
    X(dgauss_sum, A *G)                                                                            \
    X(dbias3d_out, P *H)                                                                           \
    X(dgauss_const, A * 2 * G)               /* per atom: d mean, d s */                           \
    X(dgauss_x, P)                           /* of a pair's Gaussian argument */                   \
    X(dpath_bias, PATH_BONDS *PATH_CODES *H)

// Of the heads, which run forward and backward in one go.
#define HEAD_ARRAYS(X)                                                                             \
    X(pair_pre, T *PAIR_MAPS *R)                                                                   \
    X(pair_hat, T *PAIR_MAPS *R)                                                                   \
    X(pair_rstd, T *PAIR_MAPS)                                                                     \
    X(pair_map, T *PAIR_MAPS *R)             /* r and c of the three relation heads */             \
    X(dpair_map, T *PAIR_MAPS *R)                                                                  \
    X(pair_weight, R *R *PairWidth)          /* (R, R * width) a head's map, see pair_head() */    \
    X(dpair_weight, R *R *PairWidth)                                                               \
    X(pair_u, PairRows *R *PairWidth)        /* (tokens of a group, R, width) */                   \
    X(dpair_u, PairRows *R *PairWidth)                                                             \
    X(pair_dbias, A *PairWidth)                                                                    \
    X(dir_weight, 3 * R *R)                  /* the 3D head's four maps as one */                  \
    X(ddir_weight, 3 * R *R)                                                                       \
    X(denoise_qkv, T * 3 * C)                                                                      \
    X(denoise_prob, BiasSize *H)                                                                   \
    X(denoise_dforce, T * 3 * H)                                                                   \
    X(denoise_out, A * 3)                                                                          \
    X(denoise_dout, A * 3)                                                                         \
    X(head_pre, Y > 0 ? T *C : 0)            /* fine-tuning head */                                \
    X(head_hidden, Y > 0 ? T *C : 0)                                                               \
    X(head_out, T *Y)                                                                              \
    X(dhead_out, T *Y)

typedef struct {
#define X(field, count) float *field;
    SAVED_ARRAYS(X)
    SCRATCH_ARRAYS(X)
    ENCODER_ARRAYS(X)
    HEAD_ARRAYS(X)
#undef X
    float *out;           // (T, C) the encoder's output: the last of x
    double *row_loss;     // (A) losses of an atom's row of pairs
    float *memory;
    size_t memory_bytes;
    Work work;
} Acts;

// Rates of the model's random regularisers; no rate holds in evaluation (draws.active = 0).
typedef struct {
    double attention, activation, path, embedding;  // path: of the last layer, rising from 0
} Dropout;

typedef struct { double weight[LOSSES]; } LossWeights;  // weight[LOSS_TOTAL] is not used

// All that one training step touches.
typedef struct {
    Model model;
    Acts acts;
    Batch batch;
    Draws draws;
    Dropout drop;
    LossWeights weights;
    const struct Task *task;  // of fine-tuning, section 9; NULL: pretraining
    size_t part;            // molecules at a time, see batch_gradients(); 0: all
    float *part_sum;        // of the gradients of parts
    float *logits[LOSSES];  // a relation head's outputs go there too, if not NULL; fine-tuning: the
                            // first has (2, B, Y), the logits and their gradients
} Step;

// ---- edge paths (paper 3.1): b_edge(i, j) = sum over slots e of path_bias[e][code_e], divided by
//      the number of bonds, at most 5. path_bias[e][code] = bond_vector[code] @ map_e, and
//      bond_vector[code] = mean over the bond features f of bond_table[3 + 512 f + value_f]: a
//      table of the few vectors that a slot can contribute (edge_encoder, edge_dis_encoder).

// Rows of bond_table of a bond code.
static void bond_rows(size_t row[BOND_FEATURES], int code) {
    const int value[BOND_FEATURES] = {code / 12, code / 2 % 6, code % 2};
    for (int f = 0; f < BOND_FEATURES; f++)
        row[f] = (size_t)(BOND_ROW_OFFSET + FEATURE_ROWS * f + value[f]);
}

static void path_bias_forward(Step *s) {
    const Tensors *p = &s->model.p;
    Acts *a = &s->acts;
    int H = s->model.config.heads;
    memset(a->bond_vector, 0, sizeof(float) * PATH_CODES * (size_t)H);  // PATH_NONE stays 0
    for (int code = 0; code < PATH_NONE; code++) {
        size_t row[BOND_FEATURES];
        bond_rows(row, code);
        for (int f = 0; f < BOND_FEATURES; f++)
            for (int h = 0; h < H; h++)
                a->bond_vector[code * H + h] +=
                    p->bond_table[row[f] * (size_t)H + (size_t)h] / BOND_FEATURES;
    }
    for (int e = 0; e < PATH_BONDS; e++)  // (61, H) = (61, H) @ map_e (H, H)
        gemm(&a->work, 0, 0, PATH_CODES, H, H, a->bond_vector, H, p->path_maps + e * H * H, H, NULL,
             0, a->path_bias + e * PATH_CODES * H, H);
}

// From dpath_bias (E, 61, H) to the gradients of bond_table and path_maps.
static void path_bias_backward(Step *s) {
    Acts *a = &s->acts;
    int H = s->model.config.heads;
    float *dbond_vector = a->path_bias;  // (61, H), in the place of what is no longer needed
    for (int e = 0; e < PATH_BONDS; e++) {  // forward: path_bias[e] = bond_vector @ map_e
        const float *dout = a->dpath_bias + e * PATH_CODES * H;
        gemm(&a->work, 1, 0, H, H, PATH_NONE, a->bond_vector, H, dout, H, NULL, 0,
             s->model.g.path_maps + e * H * H, H);
        gemm(&a->work, 0, 1, PATH_NONE, H, H, dout, H, s->model.p.path_maps + e * H * H, H, NULL,
             e > 0, dbond_vector, H);
    }
    for (int code = 0; code < PATH_NONE; code++) {
        size_t row[BOND_FEATURES];
        bond_rows(row, code);
        for (int f = 0; f < BOND_FEATURES; f++)  // forward: bond_vector = mean of three rows
            for (int h = 0; h < H; h++)
                s->model.g.bond_table[row[f] * (size_t)H + (size_t)h] +=
                    dbond_vector[code * H + h] / BOND_FEATURES;
    }
}

// ---- Gaussians (molecule_3d_bias.gbf): g_k(i, j) = exp(-0.5 z^2) / (sqrt(2 pi) s_k),
//      z = (x - mean_k) / s_k, s = |std| + 0.01,
//      x = (mul[u] + mul[v]) * distance + bias[u] + bias[v], rows u and v by the elements of i, j

#define GAUSS_PI 3.14159f      // the release's truncated pi
#define GAUSS_STD_MIN 1e-2f
#define GAUSS_FAR 174.0f       // z^2 beyond which exp(-0.5 z^2) is no normal float: taken as 0

static void gauss_rows(size_t row[2], const Batch *batch, size_t i, size_t j) {
    row[0] = (size_t)batch->atom_feat[i * ATOM_FEATURES] + GAUSS_ROW_OFFSET;
    row[1] = (size_t)batch->atom_feat[j * ATOM_FEATURES] + GAUSS_ROW_OFFSET + FEATURE_ROWS;
}

// x of a pair of atoms.
static float gauss_argument(const Tensors *p, const Batch *batch, size_t i, size_t j, size_t pair) {
    size_t row[2];
    gauss_rows(row, batch, i, j);
    return (p->gauss_mul[row[0]] + p->gauss_mul[row[1]]) * batch->distance[pair] +
           (p->gauss_bias[row[0]] + p->gauss_bias[row[1]]);
}

// g (G) of x; constants (3, G).
ALWAYS_INLINE void gauss_row_forward(float *restrict g, float x, const float *restrict constants,
                                     int G) {
    const float *mean = constants, *inverse = mean + G, *height = inverse + G;
#pragma omp simd
    for (int k = 0; k < G; k++) {
        float z = (x - mean[k]) * inverse[k];
        g[k] = exp_fast(-0.5f * z * z) * height[k];
    }
}

// From dg (G), adds to dmean and ds (G); returns dx. dg/dx = -z g / s, dg/ds = (z^2 - 1) g / s.
ALWAYS_INLINE float gauss_row_backward(float *restrict dmean, float *restrict ds,
                                       const float *restrict dg, float x,
                                       const float *restrict constants, int G) {
    const float *mean = constants, *inverse = mean + G, *height = inverse + G;
    float dx = 0;
#pragma omp simd reduction(+ : dx)
    for (int k = 0; k < G; k++) {
        float z = (x - mean[k]) * inverse[k];
        int far = z * z > GAUSS_FAR;  // z^2 may be infinite
        z = far ? 0.0f : z;
        float g = exp_fast(-0.5f * z * z) * height[k];  // forward, again
        float slope = far ? 0.0f : dg[k] * g * inverse[k];
        dx -= slope * z;
        dmean[k] += slope * z;
        ds[k] += slope * (z * z - 1.0f);  // height too is proportional to 1 / s
    }
    return dx;
}

// gauss (Q, G) of the pairs that use 3D, gauss_sum (A, G) over all pairs of the atoms that do.
static void gauss_forward(Step *s) {
    Acts *a = &s->acts;
    const Batch *batch = &s->batch;
    int G = s->model.config.kernels;
    for (int k = 0; k < G; k++) {
        float width = fabsf(s->model.p.gauss_std[k]) + GAUSS_STD_MIN;
        a->gauss_const[k] = s->model.p.gauss_mean[k];
        a->gauss_const[G + k] = 1.0f / width;
        a->gauss_const[2 * G + k] = 1.0f / (sqrtf(2.0f * GAUSS_PI) * width);
    }
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < batch->B; b++) {
        View v = batch_view(batch, b);
        size_t pair = v.pair, end = v.atom + (size_t)v.N;
        float *scratch = work_thread(&a->work);
        for (size_t i = v.atom; i < end; i++) {
            float *sum = a->gauss_sum + i * (size_t)G;
            int summed = batch->atom_use[i] & USE_3D;
            memset(sum, 0, sizeof(float) * (size_t)G);
            for (size_t j = v.atom; j < end; j++, pair++) {
                int row = batch->pair_row[pair];
                if (row < 0 && !summed) continue;
                float *g = row < 0 ? scratch : a->gauss + (size_t)row * (size_t)G;
                gauss_row_forward(g, gauss_argument(&s->model.p, batch, i, j, pair), a->gauss_const,
                                  G);
                for (int k = 0; summed && k < G; k++) sum[k] += g[k];
            }
        }
    }
}

// From dgauss_sum (A, G) and dgauss (Q, G) to the gradients of gauss_mean, _std, _mul, _bias.
static void gauss_backward(Step *s, const float *dgauss) {
    Acts *a = &s->acts;
    const Batch *batch = &s->batch;
    Tensors *p = &s->model.p, *g = &s->model.g;
    int G = s->model.config.kernels;
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < batch->B; b++) {
        View v = batch_view(batch, b);
        size_t pair = v.pair, end = v.atom + (size_t)v.N;
        float *dg = work_thread(&a->work);
        for (size_t i = v.atom; i < end; i++) {
            float *dmean = a->dgauss_const + i * 2 * (size_t)G, *ds = dmean + G;
            const float *dsum = a->dgauss_sum + i * (size_t)G;
            int summed = batch->atom_use[i] & USE_3D;
            memset(dmean, 0, sizeof(float) * 2 * (size_t)G);
            for (size_t j = v.atom; j < end; j++, pair++) {
                int row = batch->pair_row[pair];
                a->dgauss_x[pair] = 0;
                if (row < 0 && !summed) continue;
                const float *drow = dgauss + (size_t)max_int(row, 0) * (size_t)G;
                for (int k = 0; k < G; k++)  // forward: g is the pair's row, and part of the sum
                    dg[k] = (summed ? dsum[k] : 0.0f) + (row >= 0 ? drow[k] : 0.0f);
                a->dgauss_x[pair] = gauss_row_backward(
                    dmean, ds, dg, gauss_argument(p, batch, i, j, pair), a->gauss_const, G);
            }
        }
    }
    for (size_t b = 0; b < batch->B; b++) {  // few additions, so in order by one thread
        View v = batch_view(batch, b);
        size_t pair = v.pair, end = v.atom + (size_t)v.N, row[2];
        for (size_t i = v.atom; i < end; i++)
            for (size_t j = v.atom; j < end; j++, pair++) {
                gauss_rows(row, batch, i, j);
                for (int k = 0; k < 2; k++) {  // forward: x = (mul[u] + mul[v]) * distance + ...
                    g->gauss_mul[row[k]] += a->dgauss_x[pair] * batch->distance[pair];
                    g->gauss_bias[row[k]] += a->dgauss_x[pair];
                }
            }
    }
    column_sums(g->gauss_mean, a->dgauss_const, 2 * G, (int)batch->A, G);
    column_sums(g->gauss_std, a->dgauss_const + G, 2 * G, (int)batch->A, G);
    for (int k = 0; k < G; k++)  // forward: s = |std| + 0.01; the slope at 0 is 0, as in PyTorch
        g->gauss_std[k] *= (float)((p->gauss_std[k] > 0) - (p->gauss_std[k] < 0));
}

// ---- b_3d = W2 gelu(W1 g + c1) + c2 of the pairs that use 3D: bias3d_out (Q, H), and the 3D
//      structure of every atom: structure3d (A, C) = W gauss_sum + c

static void bias3d_forward(Step *s) {
    Acts *a = &s->acts;
    const Tensors *p = &s->model.p;
    int G = s->model.config.kernels, Q = (int)s->batch.Q;
    gauss_forward(s);
    linear_forward(&a->work, a->bias3d_pre, a->gauss, p->bias3d1_w, p->bias3d1_b, Q, G, G);
    gelu_forward(a->bias3d_hidden, a->bias3d_pre, s->batch.Q * (size_t)G);
    linear_forward(&a->work, a->bias3d_out, a->bias3d_hidden, p->bias3d2_w, p->bias3d2_b, Q, G,
                   s->model.config.heads);
    linear_forward(&a->work, a->structure3d, a->gauss_sum, p->structure3d_w, p->structure3d_b,
                   (int)s->batch.A, G, s->model.config.dim);
}

// From dbias3d_out (Q, H) and dstructure3d (A, C).
static void bias3d_backward(Step *s, const float *dstructure3d) {
    Acts *a = &s->acts;
    Tensors *p = &s->model.p, *g = &s->model.g;
    int G = s->model.config.kernels, Q = (int)s->batch.Q;
    float *dhidden = a->bias3d_hidden, *dgauss = a->bias3d_pre;  // in the places of their inputs
    linear_backward(&a->work, a->dgauss_sum, 0, g->structure3d_w, g->structure3d_b, dstructure3d,
                    a->gauss_sum, p->structure3d_w, (int)s->batch.A, G, s->model.config.dim);
    linear_backward(&a->work, dhidden, 0, g->bias3d2_w, g->bias3d2_b, a->dbias3d_out,
                    a->bias3d_hidden, p->bias3d2_w, Q, G, s->model.config.heads);
    gelu_backward(dhidden, a->bias3d_pre, s->batch.Q * (size_t)G);
    linear_backward(&a->work, dgauss, 0, g->bias3d1_w, g->bias3d1_b, dhidden, a->gauss,
                    p->bias3d1_w, Q, G, G);
    gauss_backward(s, dgauss);
}

// ---- the blended bias: bias[h][1 + i][1 + j] = the relations that the pair uses;
//      bias[h][0][*] = bias[h][*][0] = graph_bias[h]

// What a path's slots are weighted with.
static float path_weight(int spd) { return 1.0f / (float)max_int(1, min_int(spd, PATH_BONDS)); }

// out (H) = the blended bias of one pair.
ALWAYS_INLINE void pair_bias(float *restrict out, const Tensors *p, const Acts *a,
                             const Batch *batch, size_t pair, int H) {
    int use = batch->pair_use[pair], spd = batch->spd[pair], row = batch->pair_row[pair];
    const uint8_t *path = batch->path + pair * PATH_BONDS;
    const float *row3d = a->bias3d_out + (size_t)max_int(row, 0) * (size_t)H;
    for (int h = 0; h < H; h++) out[h] = row >= 0 ? row3d[h] : 0.0f;
    if (use & USE_SPD)
        for (int h = 0; h < H; h++) out[h] += p->spd_table[(spd + 1) * H + h];
    float weight = path_weight(spd);
    for (int e = 0; use & USE_EDGE && e < PATH_BONDS && path[e] != PATH_NONE; e++)
        for (int h = 0; h < H; h++)
            out[h] += weight * a->path_bias[(e * PATH_CODES + path[e]) * H + h];
}

static void bias_forward(Step *s) {
    const Tensors *p = &s->model.p;
    const Batch *batch = &s->batch;
    int H = s->model.config.heads;
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < batch->B; b++) {
        View v = batch_view(batch, b);
        size_t pair = v.pair, plane = (size_t)v.S * (size_t)v.W;
        float *bias = s->acts.attn_bias + bias_at(batch, H, &v, 0), out[MAX_HEADS];
        for (int h = 0; h < H; h++)
            for (int t = 0; t < v.S; t++) {
                float *row = bias + (size_t)h * plane + (size_t)t * (size_t)v.W;
                for (int j = 0; j < v.W; j++)
                    row[j] = j < v.S && (t == 0 || j == 0) ? p->graph_bias[h] : 0.0f;
            }
        for (int i = 1; i < v.S; i++)
            for (int j = 1; j < v.S; j++, pair++) {
                float *at = bias + (size_t)i * (size_t)v.W + (size_t)j;
                pair_bias(out, p, &s->acts, batch, pair, H);
                for (int h = 0; h < H; h++) at[(size_t)h * plane] = out[h];
            }
    }
}

// Stores head h's columns of the gradients of spd_table, path_bias and graph_bias: its part of
// dattn_bias, sorted by what the pairs used. Sums are made beside those tables, in which heads, and
// so threads, share cache lines.
static void bias_backward_head(Step *s, int h) {
    float dspd[SPD_ROWS] = {0}, dpath[PATH_BONDS * PATH_CODES] = {0}, dgraph = 0;
    const Batch *batch = &s->batch;
    int H = s->model.config.heads;
    for (size_t b = 0; b < batch->B; b++) {
        View v = batch_view(batch, b);
        size_t pair = v.pair, W = (size_t)v.W;
        const float *dbias = s->acts.dattn_bias + bias_at(batch, H, &v, h);
        for (int j = 0; j < v.S; j++) dgraph += dbias[j];
        for (size_t i = 1; i < (size_t)v.S; i++) dgraph += dbias[i * W];
        for (size_t i = 1; i < (size_t)v.S; i++)
            for (size_t j = 1; j < (size_t)v.S; j++, pair++) {  // forward: see pair_bias()
                float d = dbias[i * W + j];
                int use = batch->pair_use[pair], spd = batch->spd[pair];
                const uint8_t *path = batch->path + pair * PATH_BONDS;
                if (use & USE_SPD) dspd[spd + 1] += d;
                if (use & USE_EDGE) d *= path_weight(spd);
                for (int e = 0; use & USE_EDGE && e < PATH_BONDS && path[e] != PATH_NONE; e++)
                    dpath[e * PATH_CODES + path[e]] += d;
            }
    }
    s->model.g.graph_bias[h] = dgraph;
    for (int k = 0; k < SPD_ROWS; k++) s->model.g.spd_table[k * H + h] = dspd[k];
    for (int k = 0; k < PATH_BONDS * PATH_CODES; k++) s->acts.dpath_bias[k * H + h] = dpath[k];
}

// From dattn_bias to dbias3d_out (Q, H), molecule by molecule, and to all others, head by head.
static void bias_backward(Step *s) {
    size_t H = (size_t)s->model.config.heads;
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < s->batch.B; b++) {
        View v = batch_view(&s->batch, b);
        size_t pair = v.pair, plane = (size_t)v.S * (size_t)v.W;
        const float *dbias = s->acts.dattn_bias + bias_at(&s->batch, (int)H, &v, 0);
        for (int i = 1; i < v.S; i++)
            for (int j = 1; j < v.S; j++, pair++) {
                int row = s->batch.pair_row[pair];
                const float *d = dbias + (size_t)i * (size_t)v.W + (size_t)j;
                for (size_t h = 0; row >= 0 && h < H; h++)  // forward: out[h] = row3d[h] + ...
                    s->acts.dbias3d_out[(size_t)row * H + h] = d[h * plane];
            }
    }
#pragma omp parallel for schedule(dynamic)
    for (int h = 0; h < (int)H; h++) bias_backward_head(s, h);
}

// ---- tokens (paper 3.1): x = LayerNorm(sum of embedding rows). An atom's rows are those of its
//      nine features and, if it shows its 2D structure, of its degree (twice); an atom that shows
//      its 3D structure adds 0.01 * structure3d; the graph token has one row of its own

#define STRUCTURE_SCALE 0.01f
enum { TOKEN_ROWS = ATOM_FEATURES + 2 };

// Offsets in an arena, of parameters or gradients, of the rows that token t sums, and how many.
// scale: of its atom's structure3d (that of atom t - b - 1), 0 if it adds none.
static int token_rows(size_t at[TOKEN_ROWS], float *scale, const Model *m, const Batch *batch,
                      size_t t) {
    View v = batch_view(batch, (size_t)batch->molecule[t]);
    size_t C = (size_t)m->config.dim, i = t > v.token ? t - v.b - 1 : 0;
    const uint8_t *feature = batch->atom_feat + i * ATOM_FEATURES;
    int n = 0, use = t > v.token ? batch->atom_use[i] : 0;
    *scale = use & USE_3D ? STRUCTURE_SCALE : 0.0f;
    if (t == v.token) at[n++] = (size_t)(m->p.graph_token - m->params);
    for (size_t k = 0; t > v.token && k < ATOM_FEATURES; k++)
        at[n++] = (size_t)(m->p.atom_table - m->params) +
                  (ATOM_ROW_OFFSET + FEATURE_ROWS * k + feature[k]) * C;
    if (use & USE_SPD) {
        at[n++] = (size_t)(m->p.in_degree - m->params) + (batch->degree[i] + 1u) * C;
        at[n++] = (size_t)(m->p.out_degree - m->params) + (batch->degree[i] + 1u) * C;
    }
    return n;
}

static void embedding_forward(Step *s) {
    const Model *m = &s->model;
    Acts *a = &s->acts;
    size_t C = (size_t)m->config.dim;
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < s->batch.T; t++) {
        size_t at[TOKEN_ROWS], b = (size_t)s->batch.molecule[t];
        float *token = a->branch + t * C, scale;
        int rows = token_rows(at, &scale, m, &s->batch, t);
        memset(token, 0, sizeof(float) * C);
        for (int r = 0; r < rows; r++)
            for (size_t c = 0; c < C; c++) token[c] += m->params[at[r] + c];
        for (size_t c = 0; scale > 0 && c < C; c++)
            token[c] += scale * a->structure3d[(t - b - 1) * C + c];
    }
    norm_forward(a->x, a->embed_hat, a->embed_rstd, a->branch, NULL, NULL, m->p.embed_norm_w,
                 m->p.embed_norm_b, &s->batch, 1, (int)C, NORM_EPS);
}

// From dx (T, C) to the embedding tables and dstructure3d (A, C). Threads share out the channels,
// so each table row is summed in the order of the atoms.
static void embedding_backward(Step *s, float *dstructure3d) {
    enum { STRIP = 64 };
    Model *m = &s->model;
    Acts *a = &s->acts;
    int C = m->config.dim;
    norm_backward(a->dx, NULL, NULL, m->g.embed_norm_w, m->g.embed_norm_b, a->norm_parts, a->dx,
                  a->embed_hat, a->embed_rstd, m->p.embed_norm_w, &s->batch, 1, C);
#pragma omp parallel for schedule(static)
    for (int c0 = 0; c0 < C; c0 += STRIP) {
        int width = min_int(STRIP, C - c0);
        for (size_t t = 0; t < s->batch.T; t++) {
            size_t at[TOKEN_ROWS], b = (size_t)s->batch.molecule[t];
            float scale;
            int rows = token_rows(at, &scale, m, &s->batch, t);
            const float *d = a->dx + t * (size_t)C + c0;
            for (int r = 0; r < rows; r++)  // forward: token += row
                for (int c = 0; c < width; c++) m->grads[at[r] + (size_t)(c0 + c)] += d[c];
            if (t == s->batch.atom_start[b] + b) continue;  // the graph token has no structure
            float *dstructure = dstructure3d + (t - b - 1) * (size_t)C + c0;
            for (int c = 0; c < width; c++) dstructure[c] = scale * d[c];
        }
    }
}

// =================================================================================================
// 6 The encoder: layers with the norm behind the sum,
//     mid = LN1(x + droppath(Wo attention(x))),  x' = LN2(mid + droppath(W2 gelu(W1 mid)))
//   What the backward pass needs is kept, but for dropout's masks, which are drawn again.
// =================================================================================================

// ---- attention of one molecule and head: prob = softmax(q k^T / sqrt(D) + bias),
//      out = dropped v, dropped = mask * prob. A task reads (n, D) slices of a (T, 3 C) matrix and
//      works in its thread's scratch on copies whose rows are padded to whole vectors.

#define SCORE_MASK (-1e30f)  // score of a lane past the end of a row: its exp is 0

typedef struct {
    int n, W, D, width;      // tokens, row length of (n, n) matrices, channels, their padded number
    int stride;              // of the rows of q, k, v
    float *q, *k, *v;
    size_t prob, bias;       // where its matrices begin in prob; in attn_bias and dattn_bias
    uint32_t purpose, slot, head;  // name of the mask
} HeadTask;

// Head h of molecule b; the denoising head sees the atoms only (`atoms` = 1): its matrices begin
// behind the row and the column of the graph token.
static HeadTask head_task(const Step *s, float *qkv, size_t b, int h, int atoms, uint32_t purpose) {
    View v = batch_view(&s->batch, b);
    int C = s->model.config.dim, D = C / s->model.config.heads;
    size_t at = bias_at(&s->batch, s->model.config.heads, &v, h);
    float *q = qkv + (v.token + (size_t)atoms) * 3 * (size_t)C + (size_t)h * (size_t)D;
    return (HeadTask){v.S - atoms, v.W, D, padded(D), 3 * C, q, q + C, q + 2 * C, at,
                      at + (size_t)(atoms * (v.W + 1)), purpose,
                      s->draws.first_slot + (uint32_t)b, (uint32_t)h};
}

// mask (n, W) of the task; all ones without dropout. The (n, n) numbers are drawn without the
// padding, so that W, and with it the processor, does not change them; then rows move into place.
static void attention_mask(float *mask, const Step *s, const HeadTask *task) {
    int n = task->n, W = task->W;
    for (int k = 0; k < n * W; k++) mask[k] = 1.0f;
    if (!s->draws.active || s->drop.attention <= 0) return;
    dropout_row(mask, n * n, s->drop.attention, &s->draws, task->purpose, task->slot, task->head);
    for (int i = n - 1; i > 0; i--)
        memmove(mask + (size_t)i * W, mask + (size_t)i * n, sizeof(float) * (size_t)n);
}

// prob (n, W) and dropped (n, W). scratch: W * (n + D).
static void attention_prob_forward(float *prob, float *dropped, const Step *s, const HeadTask *task,
                                   float *scratch) {
    int n = task->n, W = task->W;
    float *mask = scratch, *kt = mask + (size_t)n * W, scale = 1.0f / sqrtf((float)task->D);
    copy_transposed(kt, W, task->k, task->stride, n, task->D);
    small_product(dropped, W, task->q, task->stride, 1, kt, W, n, W, task->D);  // q k^T
    attention_mask(mask, s, task);
    for (int i = 0; i < n; i++) {
        float *prob_i = prob + (size_t)i * W, *dropped_i = dropped + (size_t)i * W;
        const float *bias_i = s->acts.attn_bias + task->bias + (size_t)i * W;
        const float *mask_i = mask + (size_t)i * W;
        for (int j = 0; j < W; j++) prob_i[j] = dropped_i[j] * scale + bias_i[j];
        for (int j = n; j < W; j++) prob_i[j] = SCORE_MASK;
        softmax_row(prob_i, W);
        for (int j = 0; j < W; j++) dropped_i[j] = prob_i[j] * mask_i[j];
    }
}

// dscore (n, W), holding the gradient of dropped, becomes that of the scores, and is added to
// dattn_bias; dropped (n, W) is made again. scratch: n * W.
static void attention_prob_backward(float *dscore, float *dropped, Step *s, const float *prob,
                                    const HeadTask *task, float *scratch) {
    int n = task->n, W = task->W;
    attention_mask(scratch, s, task);
    for (int i = 0; i < n; i++) {
        const float *prob_i = prob + (size_t)i * W, *mask_i = scratch + (size_t)i * W;
        float *d = dscore + (size_t)i * W, *dropped_i = dropped + (size_t)i * W;
        float *dbias_i = s->acts.dattn_bias + task->bias + (size_t)i * W, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < W; j++) {
            dropped_i[j] = prob_i[j] * mask_i[j];
            d[j] *= mask_i[j];                     // forward: dropped = mask * prob
            sum += d[j] * prob_i[j];
        }
        for (int j = 0; j < W; j++) d[j] = prob_i[j] * (d[j] - sum);  // forward: prob = softmax
        for (int j = 0; j < n; j++) dbias_i[j] += d[j];               // forward: score + bias
    }
}

// Scaled gradients in the places of q and k. scratch: 3 n * width.
static void attention_qk_backward(const HeadTask *task, const float *dscore, float *scratch) {
    int n = task->n, W = task->W, width = task->width;
    float *q = scratch, *k = q + (size_t)n * width, *out = k + (size_t)n * width;
    float scale = 1.0f / sqrtf((float)task->D);
    copy_padded(q, width, task->q, task->stride, n, task->D);
    copy_padded(k, width, task->k, task->stride, n, task->D);
    for (int side = 0; side < 2; side++) {  // forward: score = q k^T; dscore k and dscore^T q
        if (side == 0) small_product(out, width, dscore, W, 1, k, width, n, width, n);
        else small_product(out, width, dscore, 1, W, q, width, n, width, n);
        for (int i = 0; i < n; i++)
            for (int d = 0; d < task->D; d++)
                (side ? task->k : task->q)[(size_t)i * task->stride + d] =
                    scale * out[(size_t)i * width + d];
    }
}

// context (T, C) and prob of layer l from its qkv (T, 3 C).
static void attention_forward(Step *s, int l) {
    Acts *a = &s->acts;
    int C = s->model.config.dim, H = s->model.config.heads;
    size_t tc = (size_t)l * s->batch.T * (size_t)C;
    float *probs = a->prob + (size_t)l * s->batch.bias_size * (size_t)H;
#pragma omp parallel for schedule(dynamic, 4)
    for (size_t bh = 0; bh < s->batch.B * (size_t)H; bh++) {
        size_t b = bh / (size_t)H;
        HeadTask task = head_task(s, a->qkv + 3 * tc, b, (int)(bh % (size_t)H), 0,
                                  RNG_ATTENTION_DROP + (uint32_t)l);
        int n = task.n, W = task.W, D = task.D, width = task.width;
        float *dropped = work_thread(&a->work), *v = dropped + (size_t)n * W;
        float *out = v + (size_t)n * width, *scratch = out + (size_t)n * width;
        float *context = a->context + tc + (s->batch.atom_start[b] + b) * (size_t)C + task.head * D;
        attention_prob_forward(probs + task.prob, dropped, s, &task, scratch);
        copy_padded(v, width, task.v, task.stride, n, D);
        small_product(out, width, dropped, W, 1, v, width, n, width, n);
        for (int i = 0; i < n; i++)
            memcpy(context + (size_t)i * C, out + (size_t)i * width, sizeof(float) * (size_t)D);
    }
}

// From dcontext, in the place of context, to dqkv, in the place of qkv: a task is the only reader
// of the slices that it writes. dattn_bias is added to.
static void attention_backward(Step *s, int l) {
    Acts *a = &s->acts;
    int C = s->model.config.dim, H = s->model.config.heads;
    size_t tc = (size_t)l * s->batch.T * (size_t)C;
    const float *probs = a->prob + (size_t)l * s->batch.bias_size * (size_t)H;
#pragma omp parallel for schedule(dynamic, 4)
    for (size_t bh = 0; bh < s->batch.B * (size_t)H; bh++) {
        size_t b = bh / (size_t)H;
        HeadTask task = head_task(s, a->qkv + 3 * tc, b, (int)(bh % (size_t)H), 0,
                                  RNG_ATTENTION_DROP + (uint32_t)l);
        int n = task.n, W = task.W, D = task.D, width = task.width;
        const float *dcontext = a->context + tc + (s->batch.atom_start[b] + b) * (size_t)C +
                                task.head * D;
        float *dscore = work_thread(&a->work), *dropped = dscore + (size_t)n * W;
        float *dout = dropped + (size_t)n * W, *dv = dout + (size_t)n * width;
        float *scratch = dv + (size_t)n * width, *vt = scratch;
        copy_transposed(vt, W, task.v, task.stride, n, D);
        small_product(dscore, W, dcontext, C, 1, vt, W, n, W, D);  // ddropped = dout v^T
        attention_prob_backward(dscore, dropped, s, probs + task.prob, &task, scratch);
        copy_padded(dout, width, dcontext, C, n, D);
        small_product(dv, width, dropped, 1, W, dout, width, n, width, n);  // dv = dropped^T dout
        for (int i = 0; i < n; i++)
            memcpy(task.v + (size_t)i * task.stride, dv + (size_t)i * width,
                   sizeof(float) * (size_t)D);
        attention_qk_backward(&task, dscore, scratch);
    }
}

// ---- one layer

// What layer l drops of its branches: p rises from 0 in the first layer to drop.path in the last.
static DropPath layer_droppath(const Step *s, int l, int second) {
    int L = s->model.config.layers;
    return (DropPath){L > 1 ? s->drop.path * l / (L - 1) : 0.0, &s->draws, l, second};
}

// From x[l] (T, C) to x[l + 1].
static void layer_forward(Step *s, int l) {
    const LayerTensors *p = &s->model.p.layer[l];
    const Batch *batch = &s->batch;
    Acts *a = &s->acts;
    const Work *w = &a->work;
    int C = s->model.config.dim, F = s->model.config.ffn, T = (int)batch->T;
    size_t tc = (size_t)l * T * C, tf = (size_t)l * T * F, lt = (size_t)l * T;
    const float *x = a->x + tc, *mid = a->mid + tc;
    DropPath drop1 = layer_droppath(s, l, 0), drop2 = layer_droppath(s, l, 1);
    linear_forward(w, a->qkv + 3 * tc, x, p->q_w, p->q_b, T, C, 3 * C);  // q, k, v in one
    attention_forward(s, l);
    linear_forward(w, a->branch, a->context + tc, p->out_w, p->out_b, T, C, C);
    norm_forward(a->mid + tc, a->norm1_hat + tc, a->norm1_rstd + lt, x, a->branch, &drop1,
                 p->norm1_w, p->norm1_b, batch, 1, C, NORM_EPS);
    linear_forward(w, a->ffn_pre + tf, mid, p->ffn1_w, p->ffn1_b, T, C, F);
    gelu_forward(a->ffn_hidden + tf, a->ffn_pre + tf, (size_t)T * F);
    dropout_rows(a->ffn_hidden + tf, w, batch, F, s->drop.activation, &s->draws,
                 RNG_ACTIVATION_DROP + (uint32_t)l);
    linear_forward(w, a->branch, a->ffn_hidden + tf, p->ffn2_w, p->ffn2_b, T, F, C);
    norm_forward(a->x + tc + (size_t)T * C, a->norm2_hat + tc, a->norm2_rstd + lt, mid, a->branch,
                 &drop2, p->norm2_w, p->norm2_b, batch, 1, C, NORM_EPS);
}

// dx, the gradient of x[l + 1], becomes that of x[l]; what the layer saved is used up.
static void layer_backward(Step *s, int l) {
    const LayerTensors *p = &s->model.p.layer[l];
    LayerTensors *g = &s->model.g.layer[l];
    const Batch *batch = &s->batch;
    Acts *a = &s->acts;
    const Work *w = &a->work;
    int C = s->model.config.dim, F = s->model.config.ffn, T = (int)batch->T;
    size_t tc = (size_t)l * T * C, tf = (size_t)l * T * F, lt = (size_t)l * T;
    const float *x = a->x + tc, *mid = a->mid + tc, *hidden = a->ffn_hidden + tf;
    const float *context = a->context + tc;
    float *dbranch = a->branch, *dhidden = a->ffn_hidden + tf, *dcontext = a->context + tc;
    float *dqkv = a->qkv + 3 * tc;  // these in the places of their inputs
    DropPath drop1 = layer_droppath(s, l, 0), drop2 = layer_droppath(s, l, 1);
    // forward: x' = LN2(mid + droppath(ffn2(hidden))), hidden = dropout(gelu(ffn1(mid)))
    norm_backward(a->dmid, dbranch, &drop2, g->norm2_w, g->norm2_b, a->norm_parts, a->dx,
                  a->norm2_hat + tc, a->norm2_rstd + lt, p->norm2_w, batch, 1, C);
    linear_backward(w, dhidden, 0, g->ffn2_w, g->ffn2_b, dbranch, hidden, p->ffn2_w, T, F, C);
    dropout_rows(dhidden, w, batch, F, s->drop.activation, &s->draws,
                 RNG_ACTIVATION_DROP + (uint32_t)l);
    gelu_backward(dhidden, a->ffn_pre + tf, (size_t)T * F);
    linear_backward(w, a->dmid, 1, g->ffn1_w, g->ffn1_b, dhidden, mid, p->ffn1_w, T, C, F);
    // forward: mid = LN1(x + droppath(out(attention(qkv(x)))))
    norm_backward(a->dx, dbranch, &drop1, g->norm1_w, g->norm1_b, a->norm_parts, a->dmid,
                  a->norm1_hat + tc, a->norm1_rstd + lt, p->norm1_w, batch, 1, C);
    linear_backward(w, dcontext, 0, g->out_w, g->out_b, dbranch, context, p->out_w, T, C, C);
    attention_backward(s, l);
    linear_backward(w, a->dx, 1, g->q_w, g->q_b, dqkv, x, p->q_w, T, C, 3 * C);
}

// ---- the whole encoder

static void acts_layout(Step *s);  // arrays for the batch at hand, see section 11

// From the batch to the output x (T, C).
static void encoder_forward(Step *s) {
    acts_layout(s);
    path_bias_forward(s);
    bias3d_forward(s);
    bias_forward(s);
    embedding_forward(s);
    dropout_rows(s->acts.x, &s->acts.work, &s->batch, s->model.config.dim, s->drop.embedding,
                 &s->draws, RNG_EMBED_DROP);
    for (int l = 0; l < s->model.config.layers; l++) layer_forward(s, l);
}

// From dx, the gradient of x, to those of the encoder's parameters. dattn_bias holds what the
// heads have added to it. The gradients of the tables must have been zeroed.
static void encoder_backward(Step *s) {
    float *dstructure3d = s->acts.structure3d;  // in its place
    for (int l = s->model.config.layers - 1; l >= 0; l--) layer_backward(s, l);
    dropout_rows(s->acts.dx, &s->acts.work, &s->batch, s->model.config.dim, s->drop.embedding,
                 &s->draws, RNG_EMBED_DROP);
    embedding_backward(s, dstructure3d);
    bias_backward(s);
    path_bias_backward(s);
    bias3d_backward(s, dstructure3d);
}

// =================================================================================================
// 7 Heads and losses (paper 3.3). Three relation heads see every ordered pair of atoms through the
//   outer product of two 32-vectors, r of atom i and c of atom j; the denoising head is an
//   attention over the atoms. A head's loss and gradient are computed while its outputs are still
//   in cache. Linear maps run over all tokens; the graph tokens have no loss and no gradient.
// =================================================================================================

#define COSINE_EPS 1e-8

// Gradient of the total loss by a sum of single losses: the weight over what counts.
static double loss_scale(const Step *s, int loss) {
    return s->weights.weight[loss] / fmax(s->batch.count[loss], 1);
}

// Cross-entropy of one softmax over n classes, log(sum(exp(x))) - x[target]: x (n) becomes its
// gradient times scale. target < 0: not counted.
static double cross_entropy(float *x, int n, int target, double scale) {
    if (target < 0) {
        for (int k = 0; k < n; k++) x[k] = 0;
        return 0;
    }
    double logit = (double)x[target];
    LogSum all = softmax_row(x, n);
    x[target] -= 1.0f;
    for (int k = 0; k < n; k++) x[k] *= (float)scale;
    return (double)all.top + log((double)all.sum) - logit;
}

// 1 - cos(p, d) of 3-vectors; p becomes the gradient times scale. Not counted: 0 and 0.
static double cosine_loss(float *p, const float *d, int counts, double scale) {
    double pp = 0, dd = 0, pd = 0;
    for (int k = 0; k < 3; k++) {
        pp += (double)p[k] * (double)p[k];
        dd += (double)d[k] * (double)d[k];
        pd += (double)p[k] * (double)d[k];
    }
    double norm = sqrt(pp * dd), inverse = 1.0 / (fmax(norm, COSINE_EPS));
    double cosine = pd * inverse, shrink = norm > COSINE_EPS ? cosine / pp : 0.0;
    for (int k = 0; k < 3; k++)
        p[k] = counts ? (float)(-scale * ((double)d[k] * inverse - shrink * (double)p[k])) : 0.0f;
    return counts ? 1.0 - cosine : 0.0;
}

// ---- pair maps (T, 6, R), side by side: spd r, c, edge r, c, 3d r, c; map = LN(gelu(W h + b))

static void pair_maps_forward(Step *s) {
    const Tensors *p = &s->model.p;
    Acts *a = &s->acts;
    int width = PAIR_MAPS * PAIR_WIDTH, T = (int)s->batch.T;
    linear_forward(&a->work, a->pair_pre, a->out, p->spd_row_w, p->spd_row_b, T,
                   s->model.config.dim, width);
    gelu_forward(a->pair_hat, a->pair_pre, (size_t)T * width);
    norm_forward(a->pair_map, a->pair_hat, a->pair_rstd, a->pair_hat, NULL, NULL, p->spd_row_norm_w,
                 p->spd_row_norm_b, &s->batch, PAIR_MAPS, PAIR_WIDTH, PAIR_NORM_EPS);
}

// From dpair_map (T, 192); stores dx.
static void pair_maps_backward(Step *s) {
    const Tensors *p = &s->model.p;
    Tensors *g = &s->model.g;
    Acts *a = &s->acts;
    int width = PAIR_MAPS * PAIR_WIDTH, T = (int)s->batch.T;
    float *dpre = a->dpair_map;  // in its place
    norm_backward(dpre, NULL, NULL, g->spd_row_norm_w, g->spd_row_norm_b, a->norm_parts,
                  a->dpair_map, a->pair_hat, a->pair_rstd, p->spd_row_norm_w, &s->batch, PAIR_MAPS,
                  PAIR_WIDTH);
    gelu_backward(dpre, a->pair_pre, (size_t)T * width);
    linear_backward(&a->work, a->dx, 0, g->spd_row_w, g->spd_row_b, dpre, a->out, p->spd_row_w, T,
                    s->model.config.dim, width);
}

// ---- a relation head: logits(i, j)[k] = weight[k] . vec(r_i c_j^T) + bias[k]. A linear map of an
//      outer product is bilinear, so the 1024-vectors are never formed, which saves 31/32 of the
//      arithmetic. With W[a][b][k] = weight[k][32 a + b], six equations, forward and back:
//
//        U_i[b][k]        = sum over a of r_i[a] W[a][b][k]              once for an atom i
//        logits(i, j)[k]  = sum over b of c_j[b] U_i[b][k] + bias[k]     once for a pair
//        dU_i[b][k]       = sum over j of c_j[b] dlogits(i, j)[k]
//        dc_j[b]         += sum over k of U_i[b][k] dlogits(i, j)[k]
//        dr_i[a]          = sum over b, k of dU_i[b][k] W[a][b][k]
//        dW[a][b][k]      = sum over i of r_i[a] dU_i[b][k]

#ifndef PAIR_GROUP
#define PAIR_GROUP 256  // tokens whose rows of pairs a relation head works on at a time
#endif

typedef struct {
    int loss;                // LOSS_SPD, LOSS_EDGE or LOSS_3D
    int outputs, slots;      // of a pair; a softmax a slot, 0: the output is a direction
    int map;                 // r is pair map `map`, c the next one
    const int8_t *target;    // (P, slots) classes
    const float *weight;     // (outputs, R * R)
    const float *bias;       // (outputs)
    float *dweight, *dbias;  // stored; NULL: forward only
} PairHead;

// Losses of the pairs (i, 0..N-1) of a molecule; 3D losses are divided by the molecule's number of
// pairs that count. logits (N, width) become their gradients.
static double pair_losses(const Step *s, const PairHead *head, float *logits, int width,
                          const View *v, int i) {
    const float *pos = s->batch.pos + 3 * v->atom;
    int classes = head->slots ? head->outputs / head->slots : 0;
    double loss = 0, scale = loss_scale(s, head->loss);
    double pairs = fmax((double)s->batch.dir_pairs[v->b], 1);
    for (int j = 0; j < v->N; j++) {
        float *x = logits + (size_t)j * width, d[3];
        size_t pair = v->pair + (size_t)i * (size_t)v->N + (size_t)j;
        for (int e = 0; e < head->slots; e++)
            loss += cross_entropy(x + e * classes, classes,
                                  head->target[pair * (size_t)head->slots + (size_t)e], scale);
        if (head->slots) continue;
        int counts = s->batch.has_pos[v->b] && dir_counts(pos, (size_t)i, (size_t)j);
        for (int k = 0; k < 3; k++) d[k] = pos[3 * j + k] - pos[3 * i + k];
        loss += cosine_loss(x, d, counts, scale / pairs) / pairs;
    }
    return loss;
}

// One atom's row of pairs: its loss, and dU_i (R, width); dc (N, R) is added to.
static double pair_head_row(Step *s, const PairHead *head, const View *v, int i, const float *U,
                            float *dU, float *dc, float *scratch) {
    enum { R = PAIR_WIDTH, STRIDE = PAIR_MAPS * R };
    int N = v->N, width = padded(head->outputs);
    const float *c = s->acts.pair_map + (v->token + 1) * STRIDE + (head->map + 1) * R;
    float *logits = scratch, *ut = logits + (size_t)N * width, *part = ut + (size_t)width * R;
    small_product(logits, width, c, STRIDE, 1, U, width, N, width, R);
    for (int j = 0; j < N; j++)
        for (int k = 0; k < head->outputs; k++) logits[(size_t)j * width + k] += head->bias[k];
    for (int j = 0; j < N && s->logits[head->loss]; j++)
        memcpy(s->logits[head->loss] + (v->pair + (size_t)(i * N + j)) * (size_t)head->outputs,
               logits + (size_t)j * width, sizeof(float) * (size_t)head->outputs);
    double loss = pair_losses(s, head, logits, width, v, i);
    if (!head->dweight) return loss;
    const float *dlogits = logits;  // forward: logits (N, width) = c (N, R) @ U (R, width) + bias
    small_product(dU, width, c, 1, STRIDE, dlogits, width, R, width, N);
    copy_transposed(ut, R, U, width, R, head->outputs);
    small_product(part, R, dlogits, width, 1, ut, R, N, R, head->outputs);
    for (int k = 0; k < N * R; k++) dc[k] += part[k];
    float *dbias = s->acts.pair_dbias + (v->atom + (size_t)i) * (size_t)width;
    memset(dbias, 0, sizeof(float) * (size_t)width);
    for (int j = 0; j < N; j++)
        for (int k = 0; k < width; k++) dbias[k] += dlogits[(size_t)j * width + k];
    return loss;
}

// The molecules b0..b1-1: row_loss of their atoms, and if head->dweight the gradients of their
// pair maps and dpair_weight, which is added to from the second group on.
static void pair_head_group(Step *s, const PairHead *head, size_t b0, size_t b1) {
    enum { R = PAIR_WIDTH, STRIDE = PAIR_MAPS * R };
    Acts *a = &s->acts;
    int columns = R * padded(head->outputs);
    size_t first = s->batch.atom_start[b0] + b0;
    int rows = (int)(s->batch.atom_start[b1] + b1 - first);
    const float *r = a->pair_map + first * STRIDE + head->map * R;
    gemm(&a->work, 0, 0, rows, columns, R, r, STRIDE, a->pair_weight, columns, NULL, 0, a->pair_u,
         columns);
#pragma omp parallel for schedule(dynamic)
    for (size_t b = b0; b < b1; b++) {
        View v = batch_view(&s->batch, b);
        float *dc = work_thread(&a->work), *scratch = dc + (size_t)v.N * R;
        size_t graph_row = (v.token - first) * (size_t)columns;
        memset(dc, 0, sizeof(float) * (size_t)v.N * R);
        memset(a->dpair_u + graph_row, 0, sizeof(float) * (size_t)columns);
        for (int i = 0; i < v.N; i++) {
            size_t at = graph_row + (size_t)(i + 1) * (size_t)columns;
            a->row_loss[v.atom + (size_t)i] =
                pair_head_row(s, head, &v, i, a->pair_u + at, a->dpair_u + at, dc, scratch);
        }
        for (int j = 0; j < v.N && head->dweight; j++)
            memcpy(a->dpair_map + (v.token + 1 + (size_t)j) * STRIDE + (head->map + 1) * R,
                   dc + (size_t)j * R, sizeof(float) * R);
    }
    if (!head->dweight) return;
    float *dr = a->dpair_map + first * STRIDE + head->map * R;  // forward: U = r @ pair_weight
    gemm(&a->work, 0, 1, rows, R, columns, a->dpair_u, columns, a->pair_weight, columns, NULL, 0,
         dr, STRIDE);
    gemm(&a->work, 1, 0, R, columns, rows, r, STRIDE, a->dpair_u, columns, NULL, b0 > 0,
         a->dpair_weight, columns);
}

// Sum of a relation head's losses; its gradients, and those of its pair maps, if head->dweight.
static double pair_head(Step *s, const PairHead *head) {
    enum { RR = PAIR_WIDTH * PAIR_WIDTH };
    Acts *a = &s->acts;
    int width = padded(head->outputs);
#pragma omp parallel for schedule(static)
    for (int ab = 0; ab < RR; ab++)  // W[a][b][k] = weight[k][32 a + b]
        for (int k = 0; k < width; k++)
            a->pair_weight[ab * width + k] = k < head->outputs ? head->weight[k * RR + ab] : 0.0f;
    for (size_t b = 0, end; b < s->batch.B; b = end) {
        size_t limit = s->batch.atom_start[b] + b + PAIR_GROUP;
        end = b + 1;
        while (end < s->batch.B && s->batch.atom_start[end + 1] + end < limit) end++;
        pair_head_group(s, head, b, end);
    }
    double loss = 0;
    for (size_t i = 0; i < s->batch.A; i++) loss += a->row_loss[i];
    if (!head->dweight) return loss;
#pragma omp parallel for schedule(static)
    for (int k = 0; k < head->outputs; k++)
        for (int ab = 0; ab < RR; ab++)
            head->dweight[k * RR + ab] = a->dpair_weight[ab * width + k];
    float sums[EDGE_OUTPUTS + 64];  // the largest width
    column_sums(sums, a->pair_dbias, width, (int)s->batch.A, width);
    memcpy(head->dbias, sums, sizeof(float) * (size_t)head->outputs);
    return loss;
}

// ---- the 3D head's four maps as one: no non-linearity stands between linear (1024 -> 256) and the
//      three axes (256 -> 1), so weight (3, 1024) = axes (3, 256) @ dir_w, and
//      bias (3) = axes @ dir_b + axis_b

static void dir_compose(Step *s, float bias[3]);

// From ddir_weight (3, 1024) and dbias to the gradients of the factors.
static void dir_split(Step *s, const float dbias[3]);

// ---- the denoising head (atom_proc): out_a(i) = w_a . y_a(i) + b_a, y_a(i) = sum over heads and j
//      of P(i, j) direction(i, j)[a] v_j. With force_a(j) = w_a . v_j (a head's channels), no y is
//      needed: out_a(i) = b_a + sum over h, j of P(i, j) direction(i, j)[a] force_a(j).

// force (3, N) of a task.
static void denoise_force(float *force, const Step *s, const HeadTask *task) {
    int C = s->model.config.dim, D = task->D;
    for (int axis = 0; axis < 3; axis++) {
        const float *w = s->model.p.denoise_axis1_w + axis * C + (int)task->head * D;
        for (int j = 0; j < task->n; j++) {
            const float *v = task->v + (size_t)j * task->stride;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int d = 0; d < D; d++) sum += w[d] * v[d];
            force[axis * task->n + j] = sum;
        }
    }
}

// denoise_out (A, 3): a task a molecule, its heads in order.
static void denoise_forward(Step *s) {
    const Tensors *p = &s->model.p;
    const Batch *batch = &s->batch;
    Acts *a = &s->acts;
    int C = s->model.config.dim, H = s->model.config.heads;
    linear_forward(&a->work, a->denoise_qkv, a->out, p->denoise_q_w, p->denoise_q_b,
                   (int)batch->T, C, 3 * C);
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < batch->B; b++) {
        View v = batch_view(batch, b);
        int N = v.N, W = v.W;
        float *dropped = work_thread(&a->work), *force = dropped + (size_t)N * W;
        float *scratch = force + 3 * N, *out = a->denoise_out + 3 * v.atom;
        for (int k = 0; k < 3 * N; k++) out[k] = p->denoise_axis1_b[k % 3];
        for (int h = 0; h < H; h++) {
            HeadTask task = head_task(s, a->denoise_qkv, b, h, 1, RNG_DENOISE_DROP);
            attention_prob_forward(a->denoise_prob + task.prob, dropped, s, &task, scratch);
            denoise_force(force, s, &task);
            const float *direction = batch->direction + 3 * v.pair;
            for (int axis = 0; axis < 3; axis++)
                for (int i = 0; i < N; i++, direction += N) {
                    float sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int j = 0; j < N; j++)
                        sum += dropped[(size_t)i * W + j] * direction[j] * force[axis * N + j];
                    out[3 * i + axis] += sum;
                }
        }
    }
}

// Sum of 1 - cos(out, noise) over the atoms that count; denoise_dout (A, 3) is its gradient.
static double denoise_loss(Step *s) {
    Acts *a = &s->acts;
    double loss = 0;
    memcpy(a->denoise_dout, a->denoise_out, 3 * s->batch.A * sizeof(float));
    for (size_t b = 0; b < s->batch.B; b++) {
        View v = batch_view(&s->batch, b);
        for (int i = 0; i < v.N; i++) {
            size_t at = 3 * (v.atom + (size_t)i);
            loss += cosine_loss(a->denoise_dout + at, s->batch.noise + at,
                                noise_counts(&s->batch, &v, i), loss_scale(s, LOSS_NOISE));
        }
    }
    return loss;
}

// One molecule: from denoise_dout to dattn_bias, denoise_dforce (T, 3, H), dq and dk (in q and k).
static void denoise_backward_molecule(Step *s, size_t b) {
    Acts *a = &s->acts;
    View v = batch_view(&s->batch, b);
    int N = v.N, W = v.W, C = s->model.config.dim, H = s->model.config.heads;
    const float *dout = a->denoise_dout + 3 * v.atom;
    float *dscore = work_thread(&a->work), *dropped = dscore + (size_t)N * W;
    float *force = dropped + (size_t)N * W, *dforce = force + 3 * N, *scratch = dforce + 3 * N;
    memset(a->denoise_qkv + v.token * 3 * (size_t)C, 0, sizeof(float) * 3 * (size_t)C);
    for (int h = 0; h < H; h++) {
        HeadTask task = head_task(s, a->denoise_qkv, b, h, 1, RNG_DENOISE_DROP);
        const float *direction = s->batch.direction + 3 * v.pair;
        denoise_force(force, s, &task);
        memset(dscore, 0, sizeof(float) * (size_t)N * W);
        memset(dforce, 0, sizeof(float) * 3 * (size_t)N);
        for (int axis = 0; axis < 3; axis++)  // forward: out = sum of dropped * direction * force
            for (int i = 0; i < N; i++, direction += N)
                for (int j = 0; j < N; j++)
                    dscore[(size_t)i * W + j] +=
                        dout[3 * i + axis] * force[axis * N + j] * direction[j];
        attention_prob_backward(dscore, dropped, s, a->denoise_prob + task.prob, &task, scratch);
        direction = s->batch.direction + 3 * v.pair;
        for (int axis = 0; axis < 3; axis++)
            for (int i = 0; i < N; i++, direction += N)
                for (int j = 0; j < N; j++)
                    dforce[axis * N + j] +=
                        dout[3 * i + axis] * dropped[(size_t)i * W + j] * direction[j];
        for (int axis = 0; axis < 3; axis++)
            for (int j = 0; j < N; j++) {
                size_t row = (v.token + 1 + (size_t)j) * 3 + (size_t)axis;
                a->denoise_dforce[row * (size_t)H + (size_t)h] = dforce[axis * N + j];
            }
        attention_qk_backward(&task, dscore, scratch);
    }
}

// Head h's part of force_a(j) = w_a . v_j: dw_a = sum over atoms of dforce_a(j) v_j, and
// dv_j = sum over a of dforce_a(j) w_a in the place of v_j.
static void denoise_force_backward(Step *s, int h) {
    int C = s->model.config.dim, H = s->model.config.heads, D = C / H;
    const float *w = s->model.p.denoise_axis1_w + h * D;
    float *dw = s->model.g.denoise_axis1_w + h * D;
    for (int axis = 0; axis < 3; axis++) memset(dw + axis * C, 0, sizeof(float) * (size_t)D);
    for (size_t t = 0; t < s->batch.T; t++) {
        size_t b = (size_t)s->batch.molecule[t];
        if (t == s->batch.atom_start[b] + b) continue;  // a graph token
        const float *dforce = s->acts.denoise_dforce + t * 3 * (size_t)H + h;
        float *v = s->acts.denoise_qkv + (3 * t + 2) * (size_t)C + (size_t)(h * D);
        for (int d = 0; d < D; d++) {
            float dv = 0;
            for (int axis = 0; axis < 3; axis++) {
                dw[axis * C + d] += dforce[axis * H] * v[d];
                dv += dforce[axis * H] * w[axis * C + d];
            }
            v[d] = dv;
        }
    }
}

// From denoise_dout (A, 3): adds to dx and dattn_bias, stores the head's parameter gradients.
static void denoise_backward(Step *s) {
    const Tensors *p = &s->model.p;
    Tensors *g = &s->model.g;
    Acts *a = &s->acts;
    int C = s->model.config.dim;
#pragma omp parallel for schedule(dynamic)
    for (size_t b = 0; b < s->batch.B; b++) denoise_backward_molecule(s, b);
#pragma omp parallel for schedule(static)
    for (int h = 0; h < s->model.config.heads; h++) denoise_force_backward(s, h);
    column_sums(g->denoise_axis1_b, a->denoise_dout, 3, (int)s->batch.A, 3);
    const float *dqkv = a->denoise_qkv;  // in its place
    linear_backward(&a->work, a->dx, 1, g->denoise_q_w, g->denoise_q_b, dqkv, a->out,
                    p->denoise_q_w, (int)s->batch.T, C, 3 * C);
}

// ---- all four heads

// Sums of losses over what counts in the batch; with `backward`, also the gradients of the heads,
// dx (of x) and dattn_bias.
static void pretrain_heads(double sum[LOSSES], Step *s, int backward) {
    const Tensors *p = &s->model.p;
    Tensors *g = &s->model.g;
    Acts *a = &s->acts;
    float dir_bias[3], ddir_bias[3];
    pair_maps_forward(s);
    dir_compose(s, dir_bias);
    PairHead heads[] = {
        {LOSS_SPD, SPD_CLASSES, 1, 0, s->batch.spd_target, p->spd_w, p->spd_b, g->spd_w, g->spd_b},
        {LOSS_EDGE, EDGE_OUTPUTS, PATH_BONDS, 2, s->batch.edge_target, p->edge_w, p->edge_b,
         g->edge_w, g->edge_b},
        {LOSS_3D, 3, 0, 4, NULL, a->dir_weight, dir_bias, a->ddir_weight, ddir_bias}};
    memset(a->dpair_map, 0, sizeof(float) * s->batch.T * PAIR_MAPS * PAIR_WIDTH);
    for (int k = 0; k < 3; k++) {
        if (!backward) heads[k].dweight = NULL;
        sum[heads[k].loss] = pair_head(s, &heads[k]);
    }
    denoise_forward(s);
    sum[LOSS_NOISE] = denoise_loss(s);
    if (!backward) return;
    dir_split(s, ddir_bias);
    pair_maps_backward(s);
    memset(a->dattn_bias, 0, sizeof(float) * s->batch.bias_size * (size_t)s->model.config.heads);
    denoise_backward(s);
}

// Mean losses, and their weighted sum, from sums and counts; a loss with nothing to count is 0.
static void loss_means(double loss[LOSSES], const double sum[LOSSES], const double count[LOSSES],
                       const LossWeights *weights) {
    loss[LOSS_TOTAL] = 0;
    for (int k = 1; k < LOSSES; k++) {
        loss[k] = sum[k] / fmax(count[k], 1);
        loss[LOSS_TOTAL] += weights->weight[k] * loss[k];
    }
}

// =================================================================================================
// 8 One training step: everything above, in order, and the update of the parameters
// =================================================================================================

#define CLIP_EPS 1e-6  // clip_grad_norm: factor = clip / (norm + eps)
enum { ADAM_CHUNK = 1 << 14 };  // parameters a thread takes at a time; sums are per chunk, in order

static double gradient_norm(const Model *model);  // Euclidean, of all gradients; section 10
typedef struct { double lr, beta1, beta2, eps, weight_decay, clip; } Adam;

// One AdamW update (Loshchilov & Hutter 2019), t = 1, 2, ...; returns the gradient norm before
// clipping. Rows that never had a gradient stay as they are; chunks of them are skipped:
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
        if (!model->live[first / ADAM_CHUNK] && adam->weight_decay <= 0) continue;
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

// Learning rate of update `step` = 0, 1, ...: linear warm-up to the peak, the peak until a part
// `hold` of what then remains is done (the paper: 0), cosine to 0.
static double learning_rate(double peak, int64_t step, int64_t warmup, int64_t steps, double hold) {
    if (step < warmup) return peak * (double)(step + 1) / (double)warmup;
    double done = (double)(step - warmup) / (double)(steps > warmup ? steps - warmup : 1);
    double x = done > hold ? (done - hold) / (1 - hold) : 0;
    return 0.5 * peak * (1 + cos(3.141592653589793 * x));
}

// Forward and backward pass of the batch in s: mean losses and all gradients.
static void gradients(double loss[LOSSES], Step *s) {
    double sum[LOSSES];
    memset(s->model.grads, 0, sizeof(float) * s->model.table_count);  // the rest is stored
    encoder_forward(s);
    pretrain_heads(sum, s, 1);  // forward and backward
    loss_means(loss, sum, s->batch.count, &s->weights);
    encoder_backward(s);
}

// Molecules ids[...] of a dataset, blended, or, if that is NULL, with the fixed relations `use`.
typedef struct {
    const Dataset *data;
    const uint32_t *ids;
    const Blend *blend;
    int use;
    Draws draws;
} Given;

// Puts B of them, from `first` on, into s->batch.
static void load_given(Step *s, size_t first, size_t B, const void *given) {
    const Given *g = given;
    s->draws = g->draws;
    s->draws.first_slot += (uint32_t)first;
    batch_load(&s->batch, g->data, g->ids + first, B, g->blend, g->use, &s->draws);
}

// gradients() (of fine-tuning: section 9) of B molecules that load() puts into s->batch: of all at
// once, or in parts of s->part, one after another or each on another machine. Section 11.
typedef void Load(Step *s, size_t first, size_t B, const void *given);
static void batch_gradients(double loss[LOSSES], Step *s, size_t B, Load *load, const void *given);

// The training step: B molecules, their losses, gradients, and update t = 1, 2, ...; adam has the
// learning_rate() of this update. Returns the gradient norm.
static double training_step(double loss[LOSSES], Step *s, size_t B, const Given *given,
                            const Adam *adam, int64_t t) {
    batch_gradients(loss, s, B, load_given, given);
    return adamw_step(&s->model, adam, t);
}

// ==== The method ends here. What follows may be skipped by whoever came for it. ==================

// DEVIATIONS from the official release, all of them where it departs from the paper or fails:
//   - the blend is drawn for each molecule (release: one mask for the whole batch);
//   - DropPath drops a molecule's branch (release: its shape makes it drop token positions);
//   - a path of 11 bonds or more is class 10 (release: 20 and more crash); bonds outside the edge
//     head's classes are ignored (release: they wrap into other classes);
//   - the mean read-out divides by the atoms (release: by the padded length);
//   - chiral tags refer to ranks, so that enantiomers differ and the order of atoms does not matter
//     (release: RDKit's, which it decides: data_prep --stereo rdkit). Where neighbours tie, as in
//     cis and trans on a ring, see section 15 of data_prep.c;
//   - an atom at (0, 0, 0) is an atom (release: padding); molecules without positions use 2D only;
//   - means and widths of the Gaussians start spread over 0 to 3 (release: an initialisation meant
//     for other tensors makes all of them alike).
//
// PORTING. Replace section 10 (the kernels), nothing above it. What must agree: the golden files
// (./test --golden FILE), datasets and checkpoints byte for byte. What may differ: rounding, so
// losses drift apart after some ten steps; not the random draws, which are integer arithmetic.

// =================================================================================================
// 9 The fine-tuning head (paper 4): out = W2 gelu(W1 x + b1) + b2 on a token, read out as that of
//   the graph token, or as the mean or sum over the atoms. For classes, but for a sum, it begins at
//   their base rates, b2 = log(p / (1 - p)) with p the share of ones: or else the first steps do
//   nothing but shift all molecules alike, which a pretrained encoder may not recover from
// =================================================================================================

typedef enum { READ_CLS, READ_MEAN, READ_SUM } Readout;

// What a fine-tuned model needs besides its parameters.
typedef struct Task {
    TaskKind kind;
    Readout readout;
    int use;              // USE_ bits of the relations it is given
    const float *mean, *std;  // (Y) of the training labels; regression: prediction = out std + mean
    int label_units;      // regression: the loss is in the labels' units, not in deviations
} Task;

// Tokens of a molecule that are read out: from the first of them on, how many, and their weight.
static float readout_tokens(size_t *first, size_t *count, const View *v, Readout readout) {
    *first = v->token + (readout != READ_CLS);
    *count = readout == READ_CLS ? 1 : (size_t)v->N;
    return readout == READ_MEAN ? 1.0f / (float)v->N : 1.0f;
}

// logits (B, Y) from the encoder's output.
static void task_head_forward(float *logits, Step *s, Readout readout) {
    const Tensors *p = &s->model.p;
    Acts *a = &s->acts;
    int C = s->model.config.dim, Y = s->model.config.tasks, T = (int)s->batch.T;
    linear_forward(&a->work, a->head_pre, a->out, p->head1_w, p->head1_b, T, C, C);
    gelu_forward(a->head_hidden, a->head_pre, (size_t)T * C);
    linear_forward(&a->work, a->head_out, a->head_hidden, p->head2_w, p->head2_b, T, C, Y);
    for (size_t b = 0; b < s->batch.B; b++) {
        View v = batch_view(&s->batch, b);
        size_t first, count;
        float weight = readout_tokens(&first, &count, &v, readout);
        for (size_t y = 0; y < (size_t)Y; y++) {
            float sum = 0;
            for (size_t t = first; t < first + count; t++) sum += a->head_out[t * (size_t)Y + y];
            logits[b * (size_t)Y + y] = weight * sum;
        }
    }
}

// From dlogits (B, Y): the head's gradients and dx of the encoder's output.
static void task_head_backward(Step *s, const float *dlogits, Readout readout) {
    const Tensors *p = &s->model.p;
    Tensors *g = &s->model.g;
    Acts *a = &s->acts;
    int C = s->model.config.dim, Y = s->model.config.tasks, T = (int)s->batch.T;
    float *dhidden = a->head_hidden;  // in its place
    memset(a->dhead_out, 0, sizeof(float) * (size_t)T * (size_t)Y);
    for (size_t b = 0; b < s->batch.B; b++) {
        View v = batch_view(&s->batch, b);
        size_t first, count;
        float weight = readout_tokens(&first, &count, &v, readout);
        for (size_t t = first; t < first + count; t++)  // forward: logits = weight * sum
            for (size_t y = 0; y < (size_t)Y; y++)
                a->dhead_out[t * (size_t)Y + y] = weight * dlogits[b * (size_t)Y + y];
    }
    linear_backward(&a->work, dhidden, 0, g->head2_w, g->head2_b, a->dhead_out, a->head_hidden,
                    p->head2_w, T, C, Y);
    gelu_backward(dhidden, a->head_pre, (size_t)T * C);
    linear_backward(&a->work, a->dx, 0, g->head1_w, g->head1_b, dhidden, a->out, p->head1_w, T, C,
                    C);
    memset(a->dattn_bias, 0, sizeof(float) * s->batch.bias_size * (size_t)s->model.config.heads);
}

// Mean loss over the labels present in the whole batch: cross-entropy with logits, or the square of
// out std + mean, over std^2 unless label_units (the release), so that every task counts alike.
// dlogits (B, Y) is its gradient, 0 where a label is missing.
static double task_loss(float *dlogits, const float *logits, const Batch *batch, const Task *task) {
    size_t Y = (size_t)batch->Y;
    double loss = 0, count = batch->count[LOSS_TOTAL];
    for (size_t k = 0; k < batch->B * Y; k++) {
        double x = (double)logits[k], label = (double)batch->labels[k];
        dlogits[k] = 0;
        if (isnan(label)) continue;
        if (task->kind == TASK_CLASSIFICATION) {
            double exp_minus = exp(-fabs(x));  // log(1 + e^-|x|) does not overflow
            loss += fmax(x, 0) - x * label + log1p(exp_minus);
            double sigmoid = x >= 0 ? 1 / (1 + exp_minus) : exp_minus / (1 + exp_minus);
            dlogits[k] = (float)((sigmoid - label) / count);
        } else {
            double std = (double)task->std[k % Y], unit = task->label_units ? std : 1;
            double error = unit * (x - (label - (double)task->mean[k % Y]) / std);
            loss += error * error;
            dlogits[k] = (float)(2 * error * unit / count);
        }
    }
    return count > 0 ? loss / count : 0;
}

// Forward and backward pass of fine-tuning: gradients() with one head in the place of the four.
static void task_gradients(double loss[LOSSES], Step *s) {
    float *logits = s->logits[LOSS_TOTAL], *dlogits = logits + s->batch.B * (size_t)s->batch.Y;
    memset(s->model.grads, 0, sizeof(float) * s->model.table_count);
    encoder_forward(s);
    task_head_forward(logits, s, s->task->readout);
    loss[LOSS_TOTAL] = task_loss(dlogits, logits, &s->batch, s->task);
    task_head_backward(s, dlogits, s->task->readout);
    encoder_backward(s);
}

static float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// The number by which n logits must be multiplied so that the cross-entropy with the labels becomes
// least (Guo et al. 2017: one over the temperature), from 0.1 to 10: Newton's method.
static float calibration(const float *logits, const float *labels, size_t n) {
    double scale = 1;
    for (int round = 0; round < 30; round++) {
        double slope = 0, curve = 1e-9;
        for (size_t k = 0; k < n; k++) {
            if (isnan(labels[k])) continue;
            double x = (double)logits[k], q = 1 / (1 + exp(-scale * x));
            slope += (q - (double)labels[k]) * x;
            curve += q * (1 - q) * x * x;
        }
        double next = scale - slope / curve;
        scale = fmin(fmax(fmin(fmax(next, scale / 2), scale * 2), 0.1), 10);
    }
    return (float)scale;
}

// =================================================================================================
// 10 Fast arithmetic. What a porter replaces; each function is tested against its plain definition.
// =================================================================================================

// ---- vectors: elementary functions that compilers vectorise (no table, no branch, no call)

// Not where a float times a float is a double (s390x and x87 with -std=c11): gcc then refuses a
// float times a vector. Method 16 is 0 with _Float16.
#if defined(__GNUC__) && !defined(PLAIN_C) && (FLT_EVAL_METHOD == 0 || FLT_EVAL_METHOD == 16)
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
#else
typedef int quad_mask __attribute__((vector_size(4 * sizeof(int))));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (quad_mask){i, j, k, l})
#endif
#else  // any C11 compiler (or -DPLAIN_C): the same code on vectors of one float
enum { VEC = 1, MR = 4, NV = 4 };
typedef float vec;
#endif

static int padded(int n) { return round_up(n, VEC); }

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

static LogSum softmax_row(float *x, int n) {
    float top = x[0], sum = 0;
#ifndef __clang__  // clang 14 cannot vectorise a maximum, and warns when asked to
#pragma omp simd reduction(max : top)
#endif
    for (int j = 0; j < n; j++) top = x[j] > top ? x[j] : top;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; j++) {
        x[j] = exp_fast(x[j] - top);
        sum += x[j];
    }
    float inverse = 1.0f / sum;
#pragma omp simd
    for (int j = 0; j < n; j++) x[j] *= inverse;
    return (LogSum){top, sum};
}

// ---- element by element, and rows

static void gelu_forward(float *out, const float *pre, size_t n) {
#pragma omp parallel for simd schedule(static)
    for (size_t k = 0; k < n; k++) out[k] = gelu(pre[k]);
}

static void gelu_backward(float *d, const float *pre, size_t n) {
#pragma omp parallel for simd schedule(static)
    for (size_t k = 0; k < n; k++) d[k] *= gelu_slope(pre[k]);
}

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

// Number k of a row is word k / blocks of its Philox block k mod blocks.
static void dropout_row(float *mask, int n, double p, const Draws *draws, uint32_t purpose,
                        uint32_t slot, uint32_t row) {
    int blocks = (n + 3) / 4;
    uint32_t limit = (uint32_t)(p * 4294967296.0), words[4][BLOCKS];
    float keep = (float)(1.0 / (1.0 - p));
    for (int first = 0; first < blocks; first += BLOCKS) {
        int count = min_int(BLOCKS, blocks - first);
        uint32_t index = row * (uint32_t)blocks + (uint32_t)first;
        philox_blocks(words, count, (Philox){{index, slot, draws->step, purpose}}, draws->seed);
        for (int w = 0; w < 4; w++) {
            int at = w * blocks + first, end = min_int(count, n - at);
#pragma omp simd
            for (int k = 0; k < end; k++) mask[at + k] = words[w][k] < limit ? 0.0f : keep;
        }
    }
}

static void dropout_rows(float *x, const Work *w, const Batch *batch, int n, double p,
                         const Draws *draws, uint32_t purpose) {
    if (!draws->active || p <= 0) return;
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < batch->T; t++) {
        View v = batch_view(batch, (size_t)batch->molecule[t]);
        float *mask = work_thread(w), *x_t = x + t * (size_t)n;
        dropout_row(mask, n, p, draws, purpose, draws->first_slot + (uint32_t)v.b,
                    (uint32_t)(t - v.token));
        for (int c = 0; c < n; c++) x_t[c] *= mask[c];
    }
}

// Float sums of 256 squares, side by side, the rest in double.
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
    for (size_t k = 0; k < chunks; k++) {
        sum += model->squares[k];
        model->live[k] |= model->squares[k] != 0;  // also if it is no number
    }
    return sqrt(sum);
}

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

// Threads that a parallel region will have now: see threads_adapt().
static int team_size(const Work *w) {
#ifdef _OPENMP
    return min_int(w->threads, omp_get_max_threads());
#else
    return w->threads;
#endif
}

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

// The sum over k runs in blocks of KC, in order, whatever the
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

static void copy_padded(float *out, int width, const float *x, int ldx, int rows, int n) {
    for (int r = 0; r < rows; r++) {
        memcpy(out + (size_t)r * width, x + (size_t)r * ldx, sizeof(float) * (size_t)n);
        memset(out + (size_t)r * width + n, 0, sizeof(float) * (size_t)(width - n));
    }
}

static void copy_transposed(float *out, int width, const float *x, int ldx, int rows, int n) {
    for (int c = 0; c < n; c++) {
        for (int r = 0; r < rows; r++) out[(size_t)c * width + r] = x[(size_t)r * ldx + c];
        memset(out + (size_t)c * width + rows, 0, sizeof(float) * (size_t)(width - rows));
    }
}

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

// ---- the direction head as one map, see section 7

static void dir_compose(Step *s, float bias[3]) {
    enum { RR = PAIR_WIDTH * PAIR_WIDTH };
    const Tensors *p = &s->model.p;
    gemm(&s->acts.work, 0, 0, 3, RR, DIR_INNER, p->dir_axis1_w, DIR_INNER, p->dir_w, RR, NULL, 0,
         s->acts.dir_weight, RR);
    for (int k = 0; k < 3; k++) {
        bias[k] = p->dir_axis1_b[k];
        for (int u = 0; u < DIR_INNER; u++)
            bias[k] += p->dir_axis1_w[k * DIR_INNER + u] * p->dir_b[u];
    }
}

static void dir_split(Step *s, const float dbias[3]) {
    enum { RR = PAIR_WIDTH * PAIR_WIDTH };
    const Tensors *p = &s->model.p;
    Tensors *g = &s->model.g;
    const float *dweight = s->acts.ddir_weight;  // forward: weight = axes @ dir_w
    gemm(&s->acts.work, 1, 0, DIR_INNER, RR, 3, p->dir_axis1_w, DIR_INNER, dweight, RR, NULL, 0,
         g->dir_w, RR);
    gemm(&s->acts.work, 0, 1, 3, DIR_INNER, RR, dweight, RR, p->dir_w, RR, NULL, 0, g->dir_axis1_w,
         DIR_INNER);
    for (int u = 0; u < DIR_INNER; u++) {
        g->dir_b[u] = 0;
        for (int k = 0; k < 3; k++) {  // forward: bias = axes @ dir_b + axis_b
            g->dir_b[u] += dbias[k] * p->dir_axis1_w[k * DIR_INNER + u];
            g->dir_axis1_w[k * DIR_INNER + u] += dbias[k] * p->dir_b[u];
        }
    }
    for (int k = 0; k < 3; k++) g->dir_axis1_b[k] = dbias[k];
}

// =================================================================================================
// 11 Memory: arrays of a batch, activations, parameters, made before the first step; and a batch
//   that is cut into parts, whose activations need not fit at once
// =================================================================================================

static void sizes_add(Sizes *s, int n_atoms) {
    size_t n = (size_t)n_atoms;
    s->B += 1;
    s->A += n;
    s->T += n + 1;
    s->P += mul_size(n, n);
    s->bias_size += (n + 1) * (size_t)padded(n_atoms + 1);
    s->N = max_size(s->N, n);
}

// Lays out a batch of B molecules whose atom counts are in n_atoms.
static void batch_layout(Batch *batch, size_t B) {
    Sizes s = {0};
    for (size_t b = 0; b <= B; b++) {
        batch->atom_start[b] = s.A;
        batch->pair_start[b] = s.P;
        batch->bias_start[b] = s.bias_size;
        if (b == B) break;
        for (int t = 0; t <= batch->n_atoms[b]; t++) batch->molecule[s.T + (size_t)t] = (int)b;
        sizes_add(&s, batch->n_atoms[b]);
    }
    batch->B = s.B;
    batch->T = s.T;
    batch->A = s.A;
    batch->P = s.P;
    batch->bias_size = s.bias_size;
    batch->N = (int)s.N;
}

static Sizes sizes_max(Sizes a, Sizes b) {
    return (Sizes){max_size(a.B, b.B), max_size(a.T, b.T), max_size(a.A, b.A),
                   max_size(a.P, b.P), max_size(a.bias_size, b.bias_size), max_size(a.N, b.N)};
}

static void batch_free(Batch *batch) {
    for (int t = 0; batch->reader && t < thread_count(); t++) {
        molecule_free(&batch->reader[t].molecule);
        free(batch->reader[t].next);
        free(batch->reader[t].bond);
    }
    FREE_ALL(batch->reader, batch->memory);
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
    batch->reader = xmalloc((size_t)thread_count(), sizeof *batch->reader);
    for (int t = 0; t < thread_count(); t++) {
        batch->reader[t].next = xmalloc(mul_size(room.N, room.N), sizeof *batch->reader->next);
        batch->reader[t].bond = xmalloc(mul_size(room.N, room.N), 1);
    }
}

// `count` zeroed floats that begin at a cache line, so that no vector straddles two: 3 % of a
// training step. hint: what to try if memory is refused. The caller frees.
static float *floats_alloc(size_t count, const char *hint) {
#ifdef _WIN32  // has no aligned_alloc()
    (void)hint;
    return xmalloc(count, sizeof(float));
#else
    enum { LINE = 64 };
    size_t bytes = mul_size(count / (LINE / sizeof(float)) + 1, LINE);
    float *x = aligned_alloc(LINE, bytes);
    CHECK(x, "out of memory: %.1f MiB were refused; try %s", (double)bytes / (1 << 20), hint);
    return memset(x, 0, bytes);
#endif
}

// Index of the first of n numbers that is not finite; n if there is none.
static size_t first_bad(const float *x, size_t n) {
    size_t k = 0;
    while (k < n && isfinite(x[k])) k++;
    return k;
}

// What first went wrong in a forward pass.
typedef struct {
    char name[64];
    size_t layer;  // counted from 1; 0: before the layers
} Bad;

// Notes an array that holds a number which is not finite, unless an earlier layer has one. x has
// the inputs of the L layers and the output; other arrays of layers have counts that begin with L.
static void bad_note(Bad *bad, const char *name, const char *count_text, const float *x,
                     size_t count, size_t L) {
    size_t k = first_bad(x, count), parts = strcmp(name, "x") == 0 ? L + 1 : L, layer = 0;
    if (parts > L || strncmp(count_text, "L *", 3) == 0) layer = 1 + k / (count / parts);
    if (k == count || (bad->name[0] && layer >= bad->layer)) return;
    bad->layer = layer;
    snprintf(bad->name, sizeof bad->name, layer ? "%s of layer %zu" : "%s", name, layer - 1);
}

// Points the arrays of acts into memory from `at` on (NULL: only counts); returns the floats used.
// If bad is given, it gets the first array in the order of computation that is not finite.
static uint64_t acts_place(Acts *acts, float *at, Config c, Sizes s, Bad *bad) {
    const uint64_t L = (size_t)c.layers, C = (size_t)c.dim, F = (size_t)c.ffn, H = (size_t)c.heads;
    const uint64_t G = (size_t)c.kernels, Y = (size_t)c.tasks, R = PAIR_WIDTH;
    const uint64_t T = s.T, A = s.A, P = s.P, BiasSize = s.bias_size;
    const uint64_t Widest = max_size(C, PAIR_MAPS * R), PairWidth = (size_t)padded(EDGE_OUTPUTS);
    const uint64_t PairRows = max_size(s.N + 1, PAIR_GROUP);
    uint64_t used = 0;
#define X(field, count)                                                                            \
    {                                                                                              \
        if (at) acts->field = at + used;                                                           \
        used += ((count) + 15 + VEC) / 16 * 16;  /* whole vectors can be read at the end */        \
    }
    SAVED_ARRAYS(X)
#define NOTE(field, count) bad_note(bad, #field, #count, acts->field, count, L);
    if (bad) { SAVED_ARRAYS(NOTE) }
    if (at) acts->out = acts->x + L * T * C;
    SCRATCH_ARRAYS(X)
    const uint64_t shared = used;
    ENCODER_ARRAYS(X)
    const uint64_t encoder_end = used;
    used = shared;
    HEAD_ARRAYS(X)
#undef X
#undef NOTE
    return used > encoder_end ? used : encoder_end;
}

static Sizes batch_sizes(const Batch *b) {
    return (Sizes){b->B, b->T, b->A, b->P, b->bias_size, (size_t)b->N};
}

static void acts_layout(Step *s) {
    acts_place(&s->acts, s->acts.memory, s->model.config, batch_sizes(&s->batch), NULL);
}

// Widest packed operand of any gemm() of this model.
static int widest_product(Config c) {
    int widest = max_int(3 * c.dim, max_int(c.ffn, c.kernels));
    widest = max_int(widest, PAIR_WIDTH * padded(EDGE_OUTPUTS));
    return round_up(max_int(widest, c.tasks), NR);
}

// Memory for a model's activations on batches up to `room`. The caller calls acts_free().
static void acts_alloc(Acts *acts, Config c, Sizes room) {
    const char *hint = "a lower --batch-size, or data_prep --max-atoms";
    *acts = (Acts){0};
    CHECK(room.P <= INT_MAX && (double)room.bias_size * c.heads * c.layers < 1e12,
          "a batch of %zu molecules with %zu atoms is too large; try a lower --batch-size", room.B,
          room.A);
    uint64_t count = acts_place(acts, NULL, c, room, NULL);
    char *what = xprintf("a batch of %zu molecules with %zu atoms", room.B, room.A);
    memory_check(sizeof(float) * count, what, hint);
    free(what);
    size_t width = (size_t)padded((int)room.N + 1), D = (size_t)padded(c.dim / c.heads);
    size_t attention = 4 * width * width + 6 * width * D;
    size_t pair_rows = width * 256 + (size_t)PAIR_WIDTH * 512;
    Work *w = &acts->work;
    w->threads = thread_count();
    w->thread_size = max_size(attention, pair_rows) + (size_t)c.ffn + (size_t)c.kernels + 64;
    w->thread_size = (w->thread_size + 15) / 16 * 16;
    size_t threads = mul_size((size_t)w->threads, w->thread_size + MC * KC);
    size_t all = (size_t)count + threads + (size_t)widest_product(c) * KC;
    acts->memory = floats_alloc(all, hint);
    acts->memory_bytes = sizeof(float) * all;
    acts->row_loss = xmalloc(room.A, sizeof *acts->row_loss);
    w->packed_a = acts->memory + count;
    w->thread = w->packed_a + (size_t)w->threads * MC * KC;
    w->packed_b = w->packed_a + threads;
}

static void acts_free(Acts *acts) {
    FREE_ALL(acts->memory, acts->row_loss);
    *acts = (Acts){0};
}

// ---- parameters

struct TensorInfo {
    char name[128];       // official
    size_t rows, columns; // rows = 0: a vector
    InitRule rule;
    size_t offset, count; // floats, in the arena
    size_t field;         // byte offset in Tensors
};

// Row n of the table, of a tensor behind `offset` other numbers: info[n], unless info is NULL. The
// %d of the pattern, if it has one, stands for the layer. Returns the tensor's count; dies if there
// are no addresses for it.
static size_t tensor_row(TensorInfo *info, int n, const char *pattern, size_t layer, size_t rows,
                         size_t columns, InitRule rule, size_t offset, size_t field) {
    size_t count = max_size(rows, 1) * columns;
    CHECK((double)max_size(rows, 1) * (double)columns <= SIZE_MAX / 16 - offset,
          "this model needs more memory than has addresses; try a smaller one (--size)");
    if (info) info[n] = (TensorInfo){"", rows, columns, rule, offset, count, field};
    if (info) snprintf(info[n].name, sizeof info->name, pattern, (int)layer);
    return count;
}

// Fills info (NULL: only counts) with the tensors of a model; returns how many there are.
static int tensor_table(Config c, TensorInfo *info) {
    const size_t L = (size_t)c.layers, C = (size_t)c.dim, F = (size_t)c.ffn, H = (size_t)c.heads;
    const size_t G = (size_t)c.kernels, Y = (size_t)c.tasks, R = PAIR_WIDTH;
    size_t offset = 0, layer = offsetof(Tensors, layer), l = 0;
    int n = 0;
#define X(field, name, rows, columns, rule)                                                        \
    offset += tensor_row(info, n++, name, l, rows, columns, rule, offset, offsetof(Tensors, field));
#define OF_LAYER(field, name, rows, columns, rule)                                                 \
    offset += tensor_row(info, n++, name, l, rows, columns, rule, offset,                          \
                         layer + offsetof(LayerTensors, field));
    ENCODER_TENSORS(X)
    for (l = 0; l < L; l++, layer += sizeof(LayerTensors)) { LAYER_TENSORS(OF_LAYER) }
    if (Y == 0) { PRETRAIN_TENSORS(X) } else { FINETUNE_TENSORS(X) }
#undef X
#undef OF_LAYER
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
    CHECK(c.heads <= MAX_HEADS, "--heads: expected at most %d, found %d", MAX_HEADS, c.heads);
    CHECK(c.kernels >= 1 && c.kernels <= MAX_KERNELS, "--kernels: expected 1 to %d, found %d",
          MAX_KERNELS, c.kernels);
}

// An arena of `count` zeroed floats, and pointers to its tensors.
static float *tensors_alloc(const Model *model, Tensors *tensors) {
    float *arena = floats_alloc(model->count, "a smaller model (--size)");
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
    memory_check(mul_size(model->count, sizeof(float) * (training ? 4 : 1)), "this model",
                 "a smaller one (--size)");
    model->params = tensors_alloc(model, &model->p);
    model->table_count = (size_t)(model->p.bias3d1_w - model->params);
    if (!training) return;
    model->grads = tensors_alloc(model, &model->g);
    model->m = tensors_alloc(model, NULL);
    model->v = tensors_alloc(model, NULL);
    model->squares = xmalloc(model->count / ADAM_CHUNK + 1, sizeof *model->squares);
    model->live = xmalloc(model->count / ADAM_CHUNK + 1, 1);
}

static void model_free(Model *model) {
    FREE_ALL(model->info, model->params, model->grads, model->m, model->v, model->squares,
             model->live);
    *model = (Model){0};
}

// Random initial values of tensor i. Its draws are named by its place in the table.
static void tensor_init(const Model *model, int i, uint64_t seed) {
    const TensorInfo *t = &model->info[i];
    float *x = model->params + t->offset;
    size_t padding = t->rule == INIT_TABLE || t->rule == INIT_HALF ? t->columns : 0;
    memset(x, 0, padding * sizeof *x);
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

// ---- a batch in parts. Part k is made by rank k mod ranks. Its gradients are added to the sum of
//   the parts before it, and the sum goes on to the rank of part k + 1: ((g0 + g1) + g2) + ..., the
//   same bits for any number of ranks. It travels in pieces, so that all ranks add at once.

#ifdef MB_MPI  // all that knows of MPI; without it there is one rank
#include <mpi.h>

enum { PIECE = 1 << 18, MOST_PIECES = 1 << 12 };  // floats
static int my_rank, all_ranks = 1, ranks_done, rank_stderr;
static MPI_Request piece_request[MOST_PIECES];
static int pieces_sent;

// At exit. A rank that fails ends the job, with one message: that of rank 0 if it fails too.
static void ranks_end(void) {
    char text[4096] = "", *line = text;
    if (ranks_done) {
        MPI_Finalize();
        return;
    }
    if (my_rank > 0) {
        sleep(1);
        fflush(stderr);
        lseek(2, -(off_t)sizeof text + 1, SEEK_END);
        ssize_t n = read(2, text, sizeof text - 1);
        for (ssize_t k = 0; k + 1 < n; k++) line = text[k] == '\n' ? text + k + 1 : line;
        dprintf(rank_stderr, "rank %d: %s", my_rank, line);
    }
    MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
}

// Only rank 0 speaks; what the others would say goes to a file without name.
static void ranks_begin(void) {
    MPI_Init(NULL, NULL);
    MPI_Comm_rank(MPI_COMM_WORLD, &my_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &all_ranks);
    atexit(ranks_end);
    if (my_rank == 0) return;
    FILE *nowhere = tmpfile();
    rank_stderr = dup(2);
    CHECK(nowhere && dup2(fileno(nowhere), 1) >= 0 && dup2(fileno(nowhere), 2) >= 0,
          "cannot open a temporary file: %s", strerror(errno));
}

// The program ends well.
static void ranks_finish(void) { ranks_done = 1; }

// x = its sum over the ranks, of n float or double: of whole numbers, or of numbers that all ranks
// but one leave 0, which is exact in any order.
static void ranks_sum(void *x, size_t n, size_t size) {
    for (size_t k = 0; k < n; k += PIECE)
        MPI_Allreduce(MPI_IN_PLACE, (char *)x + k * size, (int)min_size(n - k, PIECE),
                      size == sizeof(float) ? MPI_FLOAT : MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
}

// Receives a piece of the sum up to part k - 1.
static void piece_receive(float *sum, size_t n, size_t k) {
    MPI_Recv(sum, (int)n, MPI_FLOAT, (int)((k - 1) % (size_t)all_ranks), 0, MPI_COMM_WORLD,
             MPI_STATUS_IGNORE);
}

// Begins to send a piece of the sum up to part k.
static void piece_send(const float *sum, size_t n, size_t k) {
    CHECK(pieces_sent < MOST_PIECES, "a model too large for MOST_PIECES");
    MPI_Isend(sum, (int)n, MPI_FLOAT, (int)((k + 1) % (size_t)all_ranks), 0, MPI_COMM_WORLD,
              &piece_request[pieces_sent++]);
}

// Waits until all of them have left.
static void pieces_wait(void) {
    MPI_Waitall(pieces_sent, piece_request, MPI_STATUSES_IGNORE);
    pieces_sent = 0;
}

// All ranks get what the one of the last part has.
static void ranks_share(float *x, size_t n, size_t last) {
    for (size_t k = 0; k < n && all_ranks > 1; k += PIECE)
        MPI_Bcast(x + k, (int)min_size(n - k, PIECE), MPI_FLOAT, (int)(last % (size_t)all_ranks),
                  MPI_COMM_WORLD);
}
#else
enum { PIECE = 1 << 18, my_rank = 0, all_ranks = 1 };
static void ranks_sum(void *x, size_t n, size_t size) { (void)x, (void)n, (void)size; }
static void piece_receive(float *sum, size_t n, size_t k) { (void)sum, (void)n, (void)k; }
static void piece_send(const float *sum, size_t n, size_t k) { (void)sum, (void)n, (void)k; }
static void pieces_wait(void) {}
static inline void ranks_begin(void) {}
static inline void ranks_finish(void) {}
static void ranks_share(float *x, size_t n, size_t last) { (void)x, (void)n, (void)last; }
#endif

// Adds the gradients of part k to the sum; after the last part they are the sum.
static void part_add(Step *s, size_t k, size_t parts) {
    float *sum = s->part_sum, *grads = s->model.grads;
    pieces_wait();
    for (size_t first = 0; first < s->model.count; first += PIECE) {
        size_t n = min_size(s->model.count - first, PIECE);
        if (k > 0 && all_ranks > 1) piece_receive(sum + first, n, k);
#pragma omp parallel for simd schedule(static)
        for (size_t i = first; i < first + n; i++) sum[i] = k > 0 ? sum[i] + grads[i] : grads[i];
        if (k + 1 == parts) memcpy(grads + first, sum + first, sizeof(float) * n);
        else if (all_ranks > 1) piece_send(sum + first, n, k);
    }
}

static void batch_gradients(double loss[LOSSES], Step *s, size_t B, Load *load, const void *given) {
    size_t M = s->part && s->part < B ? s->part : B, parts = (B + M - 1) / M, loaded = parts;
    double count[LOSSES] = {0}, *part_loss = xmalloc(parts, LOSSES * sizeof *part_loss);
    if (parts > 1 && !s->part_sum) s->part_sum = floats_alloc(s->model.count, "a smaller model");
    for (size_t k = (size_t)my_rank; k < parts; k += (size_t)all_ranks) {  // the counts
        load(s, k * M, min_size(B - k * M, M), given);
        for (int l = 0; l < LOSSES; l++) count[l] += s->batch.count[l];
        loaded = k;
    }
    ranks_sum(count, LOSSES, sizeof *count);
    for (size_t k = (size_t)my_rank; k < parts; k += (size_t)all_ranks) {
        if (k != loaded) load(s, k * M, min_size(B - k * M, M), given);
        loaded = k;
        memcpy(s->batch.count, count, sizeof count);
        if (s->task) task_gradients(part_loss + k * LOSSES, s);
        else gradients(part_loss + k * LOSSES, s);
        if (parts > 1) part_add(s, k, parts);
    }
    pieces_wait();
    ranks_share(s->model.grads, s->model.count, parts - 1);
    ranks_sum(part_loss, parts * LOSSES, sizeof *part_loss);
    for (int l = 0; l < LOSSES; l++) loss[l] = 0;
    for (size_t k = 0; k < parts * LOSSES; k++) loss[k % LOSSES] += part_loss[k];
    free(part_loss);
}

// =================================================================================================
// 12 Checkpoints: a model's tensors under the official names, as a tensor file (moleblend.h, 10).
//   The state for --resume holds also Adam's moments, under a prefix, and the log.
// =================================================================================================

// What a state holds under the names of the model's tensors, each behind its prefix: parameters,
// Adam's moments and, of fine-tuning, the best parameters so far. A checkpoint has the first alone.
enum { ARENAS = 4 };
static const char *const ARENA_PREFIXES[ARENAS] = {"", "exp_avg.", "exp_avg_sq.", "best."};

// Writes the arenas that are not NULL to a file, then other tensors of static names.
static void model_write(const char *path, const Model *model, float *const arenas[ARENAS],
                        const TensorOut *other, size_t others, const char *meta) {
    size_t n = 0, last;
    TensorOut *out = xmalloc(ARENAS * (size_t)model->n_tensors + others, sizeof *out);
    for (int a = 0; a < ARENAS; a++)
        for (int k = 0; k < model->n_tensors && arenas[a]; k++) {
            const TensorInfo *t = &model->info[k];
            const char *module = strstr(t->name, "proj_out.") ? "" : "molecule_encoder.";
            out[n++] = (TensorOut){xprintf("%sencoder.%s%s", ARENA_PREFIXES[a], module, t->name),
                                   t->rows, t->columns, arenas[a] + t->offset};
        }
    last = n;
    for (size_t k = 0; k < others; k++) out[n++] = other[k];
    tensor_file_write(path, out, n, meta);
    for (size_t k = 0; k < last; k++) free(out[k].name);
    free(out);
}

// The tensor with this official name, behind `prefix` and with or without what stands in front of
// it in a state dict: a training framework's wrapper, modules. NULL if there is none.
static const TensorEntry *tensor_find_official(const TensorFile *f, const char *prefix,
                                               const char *official) {
    static const char *const wrappers[] = {"", "model.", "module."};
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

// One dimension of a tensor that a model must have.
static int tensor_dimension(const TensorFile *f, const char *official, int axis) {
    const TensorEntry *t = tensor_find_official(f, "", official);
    CHECK(t, "%s: not a MoleBLEND model: expected a tensor %s", f->path, official);
    CHECK(t->rank == 2 && t->shape[axis] >= 1 && t->shape[axis] <= 1 << 20,
          "%s: tensor %s: expected a matrix of sensible size", f->path, official);
    return (int)t->shape[axis];
}

// The sizes of the model in a file, from the shapes of its tensors.
static Config tensor_file_config(const TensorFile *f) {
    Config c = {.kernels = 1};
    char name[64];
    c.dim = tensor_dimension(f, "atom_feature.atom_encoder.weight", 1);
    c.heads = tensor_dimension(f, "molecule_attn_bias.spatial_pos_encoder.weight", 1);
    c.ffn = tensor_dimension(f, "layers.0.fc1.weight", 0);
    if (tensor_find_official(f, "", "molecule_3d_bias.gbf.means.weight"))
        c.kernels = tensor_dimension(f, "molecule_3d_bias.gbf.means.weight", 1);
    do {
        snprintf(name, sizeof name, "layers.%d.fc1.weight", ++c.layers);
    } while (c.layers < MAX_LAYERS && tensor_find_official(f, "", name));
    if (tensor_find_official(f, "", "proj_out.out_proj.weight"))
        c.tasks = tensor_dimension(f, "proj_out.out_proj.weight", 0);
    config_check(c);
    return c;
}

// Copies one tensor of a file into an arena of the model's layout and returns it; NULL if the file
// has none of that name. Dies if it has another shape or no floating-point numbers.
static const TensorEntry *tensor_load(float *arena, const TensorInfo *info, const TensorFile *f,
                                      const char *prefix) {
    const char *name = info->name;
    const TensorEntry *t = tensor_find_official(f, prefix, name);
    if (!t) return NULL;
    CHECK(strchr(t->dtype, 'F'), "%s: tensor %s: expected type F32, F16, BF16 or F64, found %s",
          f->path, name, t->dtype);
    size_t rows = t->rank == 2 ? t->shape[0] : 0, columns = t->rank ? t->shape[t->rank - 1] : 1;
    CHECK(t->rank == (info->rows ? 2 : 1) && rows == info->rows && columns == info->columns,
          "%s: tensor %s: expected shape (%zu, %zu), found rank %d (%zu, %zu)", f->path, name,
          info->rows, info->columns, t->rank, rows, columns);
    for (size_t k = 0; k < t->count; k++) {
        arena[info->offset + k] = tensor_value(t, k);
        CHECK(isfinite(arena[info->offset + k]), "%s: tensor %s: number %zu is not finite", f->path,
              name, k);
    }
    return t;
}

// Copies all tensors of a model from a file; dies if one is missing.
static void model_load(const Model *model, float *arena, const TensorFile *f, const char *prefix) {
    for (int i = 0; i < model->n_tensors; i++)
        CHECK(tensor_load(arena, &model->info[i], f, prefix), "%s: tensor %s%s is missing", f->path,
              prefix, model->info[i].name);
}

// Metadata of a file that must be `kind`, or the end of the program.
static const char *required_meta(const TensorFile *f, const char *key, const char *kind) {
    const char *text = tensor_meta(f, key);
    CHECK(text, "%s: not %s (metadata %s is missing)", f->path, kind, key);
    return text;
}

// Y numbers of the metadata of a fine-tuned model.
static void meta_numbers(float *out, size_t Y, const TensorFile *f, const char *key) {
    const char *text = required_meta(f, key, "a fine-tuned model");
    for (size_t y = 0; y < Y; y++) {
        char *end;
        out[y] = strtof(text, &end);
        CHECK(end != text && isfinite(out[y]) && *end == (y + 1 < Y ? ' ' : 0),
              "%s: metadata %s: expected %zu numbers", f->path, key, Y);
        text = end;
    }
}

// A whole number, not negative, of the metadata of a run's state.
static int64_t meta_whole(const TensorFile *f, const char *key) {
    const char *text = required_meta(f, key, "the state of a run");
    char *end;
    long long number = strtoll(text, &end, 10);
    CHECK(end != text && *end == 0 && number >= 0,
          "%s: metadata %s: expected a whole number, found \"%s\"", f->path, key, text);
    return number;
}

// Is this tensor of a checkpoint part of a head, or its errors, which fine-tuning leaves behind?
static int is_head(const char *name) {
    return strstr(name, "atom_proc.") || strstr(name, "blend_") || strstr(name, "proj_out.") ||
           strcmp(name, "valid_residuals") == 0;
}

// Copies what a checkpoint shares with the model: the encoder. Heads are left behind, the new head
// keeps its initial values, as in the release. Names every other tensor that is missing or extra;
// one of another shape ends the program. data: what the model will be trained on.
static void transfer_load(const Model *model, const char *path, const Dataset *data, int quiet) {
    TensorFile f;
    int loaded = 0, missing = 0;
    tensor_file_open(&f, path);
    char *used = xmalloc((size_t)f.count, 1);
    for (int i = 0; i < model->n_tensors; i++) {
        if (is_head(model->info[i].name)) continue;
        const TensorEntry *entry = tensor_load(model->params, &model->info[i], &f, "");
        if (entry) used[entry - f.entries] = 1;
        loaded += entry != NULL;
        missing += entry == NULL;
        if (!entry && !quiet)
            fprintf(stderr, "%s: tensor %s is missing; it keeps its initial values\n", path,
                    model->info[i].name);
    }
    CHECK(loaded > 0, "%s: no tensor of the encoder is there", path);
    for (int k = 0; k < f.count && !quiet; k++)
        if (!used[k] && !is_head(f.entries[k].name))
            fprintf(stderr, "%s: tensor %s is not of this model; left behind\n", path,
                    f.entries[k].name);
    if (!quiet) note_stereo(data, path, tensor_meta(&f, "stereo"));
    if (!quiet)
        fprintf(stderr, "init    %s: %d encoder tensors loaded, %d missing, %d left behind\n", path,
                loaded, missing, f.count - loaded);
    free(used);
    tensor_file_close(&f);
}

// =================================================================================================
// 13 Options, and runs: one loop trains, for pretraining and fine-tuning; one loop goes through a
//   dataset, for evaluation, predictions and embeddings
// =================================================================================================

#ifndef MOLEBLEND_TEST

enum { DEFAULT_BATCH = 64, PRETRAIN_BATCH = 12 };

// What the command line sets; the initial values are the defaults. Those of size, batch, task,
// readout and modality depend on files.
typedef struct {
    const char *size, *output, *valid, *test, *init, *model, *task, *readout, *modality;
    const char *loss_units, *level, *svg, *near;
    int64_t part;                              // --micro-batch; 0: the whole batch
    int64_t layers, dim, ffn, heads, kernels;  // 0: from `size`
    int64_t steps, batch, warmup, seed, threads, save_every, epochs, patience, seeds, layer;
    int resume, help, version;
    Blend blend;
    LossWeights weights;
    Dropout drop;
    Adam adam;
    double hold, interval;
} Options;

static Options opt = {
    .steps = 2400,
    .warmup = -1,
    .seed = 1,
    .save_every = 500,
    .epochs = 40,
    .seeds = 1,
    .patience = 15,
    .layer = -1,
    .loss_units = "deviations",
    .blend = {0.2, 0.2, 0.6, 0.4, 0.6, 0.2, 0},
    .weights = {{0, 6, 0.1, 0.1, 0.5}},
    .drop = {0.1, 0.1, 0.1, 0},
    .adam = {3e-4, 0.9, 0.98, 1e-8, 0, 5},
    .hold = 0.9,
    .interval = 80,
};

enum { PRETRAIN = 1, FINETUNE = 2, PREDICT = 4, EMBED = 8, SHOW = 16, INFO = 32,
       TRAIN = PRETRAIN | FINETUNE, READ = PREDICT | EMBED,
       SHAPES = 64,     // an option that shapes a run's trajectory: --resume needs the same
       GROWS = 128,     // or a larger number
       FILES = 256 };   // an option that is kept for --resume, but not in a checkpoint

#define HEADING(text, commands) {NULL, OPT_FLAG, NULL, 0, 0, NULL, text, commands}
#define TEXT(name, field, argument, help, commands) \
    {name, OPT_TEXT, &opt.field, 0, 0, argument, help, commands}
#define WHOLE(name, field, min, max, help, commands) \
    {name, OPT_INT, &opt.field, min, max, "N", help, commands}
#define NUMBER(name, field, min, max, help, commands) \
    {name, OPT_NUMBER, &opt.field, min, max, "X", help, commands}
#define FLAG(name, field, help, commands) {name, OPT_FLAG, &opt.field, 0, 0, NULL, help, commands}

static const Option OPTIONS[] = {
    HEADING("Files", TRAIN | READ | SHOW),
    TEXT("-o", output, "FILE", "output; predict, embed: - is stdout", TRAIN | READ),
    TEXT("--valid", valid, "FILE", "validation set (valid.bin beside train.bin)", TRAIN | FILES),
    TEXT("--test", test, "FILE", "test set (test.bin beside train.bin)", FINETUNE | FILES),
    TEXT("--init", init, "FILE", "start from this checkpoint", TRAIN | FILES),
    TEXT("--model", model, "FILE",
         "checkpoint to use; predict: or several, an ensemble; show: what it says of the pairs",
         READ | SHOW),
    TEXT("--near", near, "FILE", "training set: the nearest of its molecules, and how far it is",
         PREDICT),
    TEXT("--svg", svg, "FILE", "the matrices as a picture", SHOW),
    FLAG("--resume", resume, "continue the run that writes -o, with its options; more --steps, "
         "--epochs or --seeds may be given", TRAIN),
    WHOLE("--save-every", save_every, 1, 1e9, "steps between checkpoints", TRAIN),
    HEADING("Model", TRAIN),
    TEXT("--size", size, "NAME",
         "tiny, small, or base, the paper's (default small, or that of --init)", TRAIN),
    WHOLE("--layers", layers, 1, MAX_LAYERS, "instead of --size's; so the next four",
          TRAIN | SHAPES),
    WHOLE("--dim", dim, 1, MAX_DIM, "width of a token", TRAIN | SHAPES),
    WHOLE("--ffn", ffn, 1, MAX_DIM, "width of the feed-forward layer", TRAIN | SHAPES),
    WHOLE("--heads", heads, 1, MAX_HEADS, "attention heads, a divisor of --dim", TRAIN | SHAPES),
    WHOLE("--kernels", kernels, 1, MAX_KERNELS, "Gaussian kernels", TRAIN | SHAPES),
    HEADING("Training", TRAIN | READ | SHOW),
    WHOLE("--steps", steps, 1, 1e9, "updates", PRETRAIN | SHAPES | GROWS),
    WHOLE("--epochs", epochs, 1, 1e6, "passes over the training set", FINETUNE | SHAPES | GROWS),
    WHOLE("--patience", patience, 0, 1e6, "stop after N epochs without gain; 0: never",
          FINETUNE | SHAPES),
    WHOLE("--seeds", seeds, 1, 1000,
          "repeat with N seeds: mean, deviation; each keeps FILE.seedN.safetensors, an ensemble",
          FINETUNE | SHAPES | GROWS),
    WHOLE("--batch-size", batch, 1, 1e6,
          "molecules at a time (default: pretraining 12, else 64; at most all)",
          TRAIN | READ | SHAPES),
    WHOLE("--micro-batch", part, 0, 1e6,
          "molecules at once: less memory; with MPI each rank takes some; 0: the whole batch",
          TRAIN | SHAPES),
    NUMBER("--lr", adam.lr, 0, 10, "peak learning rate", TRAIN | SHAPES),
    WHOLE("--warmup", warmup, -1, 1e9, "steps; -1: 1/12 (finetune: 1/10) of all", TRAIN | SHAPES),
    NUMBER("--hold", hold, 0, 1, "part of the steps at the peak, before the cosine to 0",
           TRAIN | SHAPES),
    WHOLE("--seed", seed, 0, 9e15, "names every random draw", TRAIN | SHOW | SHAPES),
    WHOLE("--threads", threads, 0, 1024, "0: all we may use; results are the same", TRAIN | READ),
    NUMBER("--beta1", adam.beta1, 0, 0.999999, "AdamW", TRAIN | SHAPES),
    NUMBER("--beta2", adam.beta2, 0, 0.999999, "AdamW", TRAIN | SHAPES),
    NUMBER("--eps", adam.eps, 1e-30, 1, "AdamW", TRAIN | SHAPES),
    NUMBER("--weight-decay", adam.weight_decay, 0, 10, "AdamW, decoupled", TRAIN | SHAPES),
    NUMBER("--clip", adam.clip, 0, 1e9, "largest gradient norm; 0: any", TRAIN | SHAPES),
    NUMBER("--attention-dropout", drop.attention, 0, 0.99, "of probabilities", TRAIN | SHAPES),
    NUMBER("--activation-dropout", drop.activation, 0, 0.99, "after gelu", TRAIN | SHAPES),
    NUMBER("--path-dropout", drop.path, 0, 0.99, "of the last layer's branches", TRAIN | SHAPES),
    NUMBER("--embedding-dropout", drop.embedding, 0, 0.99, "of the tokens", TRAIN | SHAPES),
    HEADING("Task", FINETUNE | READ),
    TEXT("--task", task, "NAME", "classification or regression (default: by the labels)",
         FINETUNE | SHAPES),
    TEXT("--loss-units", loss_units, "NAME",
         "of regression: deviations (every task counts alike) or labels (as the release)",
         FINETUNE | SHAPES),
    TEXT("--readout", readout, "NAME", "mean, sum or cls (default mean; embed: as fine-tuned)",
         FINETUNE | EMBED | SHAPES),
    TEXT("--level", level, "NAME", "a vector a molecule, or an atom", EMBED),
    WHOLE("--layer", layer, -1, MAX_LAYERS, "output of this layer; 0: its input, -1: the last",
          EMBED),
    TEXT("--modality", modality, "NAME", "2d, 3d or both (default 2d; embed: as fine-tuned)",
         FINETUNE | EMBED | SHAPES),
    NUMBER("--interval", interval, 0, 100, "of regression: a range that holds so many % of the "
           "labels (below 1: a fraction; 0: none)", PREDICT),
    HEADING("Method", PRETRAIN | SHOW),
    NUMBER("--pair-spd", blend.pair_spd, 0, 1, "how often a pair shows its path length",
           PRETRAIN | SHOW | SHAPES),
    NUMBER("--pair-edge", blend.pair_edge, 0, 1, "the bonds of its path", PRETRAIN | SHOW | SHAPES),
    NUMBER("--pair-3d", blend.pair_3d, 0, 1, "its distance", PRETRAIN | SHOW | SHAPES),
    NUMBER("--atom-2d", blend.atom_2d, 0, 1, "how often an atom shows its degree",
           PRETRAIN | SHOW | SHAPES),
    NUMBER("--atom-3d", blend.atom_3d, 0, 1, "its distances", PRETRAIN | SHOW | SHAPES),
    FLAG("--no-blend", blend.all, "show everything of every pair", PRETRAIN | SHOW | SHAPES),
    NUMBER("--noise", blend.noise, 0, 10, "on each coordinate, Angstrom", PRETRAIN | SHAPES),
    NUMBER("--weight-denoise", weights.weight[LOSS_NOISE], 0, 1e6, "of a loss", PRETRAIN | SHAPES),
    NUMBER("--weight-spd", weights.weight[LOSS_SPD], 0, 1e6, "of a loss", PRETRAIN | SHAPES),
    NUMBER("--weight-edge", weights.weight[LOSS_EDGE], 0, 1e6, "of a loss", PRETRAIN | SHAPES),
    NUMBER("--weight-3d", weights.weight[LOSS_3D], 0, 1e6, "of a loss", PRETRAIN | SHAPES),
    FLAG("--help", help, "this text; after a command, its own, with its defaults", 0),
    FLAG("--version", version, "which program this is", 0),
};
enum { N_OPTIONS = sizeof OPTIONS / sizeof OPTIONS[0] };

static char option_given[N_OPTIONS];

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

// The USE_ bits of a modality's name.
static int modality_use(const char *name) {
    return MODALITY_USE[name_index("--modality", name, MODALITY_NAMES, 3)];
}

// The sizes of a model to train: a named one (base: the paper's) and what the options replace in
// it; with --init those of the checkpoint `init`, which the options may only repeat.
static Config start_config(const char *init) {
    static const char *const names[] = {"tiny", "small", "base"};
    static const Config configs[] = {{2, 64, 64, 4, 16, 0}, {6, 256, 256, 8, 64, 0},
                                     {12, 768, 768, 32, 128, 0}};
    Config c = configs[opt.size ? name_index("--size", opt.size, names, 3) : 1], file = c;
    if (init) {
        TensorFile f;
        tensor_file_open(&f, init);
        file = tensor_file_config(&f);
        tensor_file_close(&f);
        if (!opt.size) c = file;
    }
    int *const number[5] = {&c.layers, &c.dim, &c.ffn, &c.heads, &c.kernels};
    int64_t *const asked[5] = {&opt.layers, &opt.dim, &opt.ffn, &opt.heads, &opt.kernels};
    for (int n = 0; n < 5; n++) {
        if (*asked[n]) *number[n] = (int)*asked[n];
        *asked[n] = *number[n];  // for options_describe()
    }
    c.tasks = file.tasks = 0;
    CHECK(!init || memcmp(&c, &file, sizeof c) == 0,
          "%s: has --layers %d --dim %d --ffn %d --heads %d --kernels %d; leave out the size "
          "options that say otherwise", init, file.layers, file.dim, file.ffn, file.heads,
          file.kernels);
    return c;
}

// Does the value of an option stand from `first` to `last`?
static int is_between(const Option *o, const void *first, const void *last) {
    const char *value = o->value;
    return value >= (const char *)first && value <= (const char *)last;
}

// Takes a saved run's options where the command line is silent; --size speaks for five of them.
static void options_from_state(const char *text, const char *path) {
    if (opt.size) start_config(NULL);
    for (int k = 0; k < N_OPTIONS && opt.size; k++)
        option_given[k] |= is_between(&OPTIONS[k], &opt.layers, &opt.kernels);
    opt.size = NULL;
    options_resume(OPTIONS, N_OPTIONS, GROWS, option_given, text, path);
}

// Columns of the log, a row a step.
enum { LOG_LR = LOSSES, LOG_NORM, LOG_RATE, LOG_COLUMNS };
// Fine-tuning's history has a row an epoch: which seed, counted from the first; the epoch, its mean
// loss, selection_metric(), the best epoch so far, and what calibration() says of the validation
// set. A seed's last row has its metrics.
typedef struct { float seed, number, loss, valid, best, scale, test[METRICS]; } Epoch;
enum { EPOCH_COLUMNS = sizeof(Epoch) / sizeof(float) };

typedef struct {
    Step s;
    Dataset train, valid, test;  // opened if their path is set
    Task task;                   // of fine-tuning
    float *statistics;           // (3, Y) of training labels: mean, deviation, first bias (tuning)
    float scale;                 // of logits, by calibration(); 1 while training
    int judged;                  // can the validation set judge? Else the training loss does
    uint32_t *order, *ids;       // permutation of the training set in `epoch`; molecules of a batch
    int64_t epoch, done, steps, warmup;  // updates done, and in all
    int64_t nth;                 // fine-tuning: how many seeds are complete
    float *log;                  // (done, LOG_COLUMNS) of this seed
    Epoch *history;              // (epochs) of all seeds
    float *best;                 // fine-tuning: parameters of this seed's best epoch
    float *residuals;            // of regression, at a seed's end: see residuals_keep()
    size_t n_residuals;
    int64_t epochs, shown;       // rows of history; rows that are in the CSV
    char *state_path, *log_path;
    FILE *csv;                   // grows while the run does
    OutFile lock;                // held from start to end: two runs may not write the same files
    TensorFile file;             // the state of a resumed run; of --model; its dataset is `test`
} Run;

// Names the draws of a run.
static uint64_t run_seed(const Run *run) { return (uint64_t)(opt.seed + run->nth); }

// Molecules that are computed with at once, of B.
static size_t part_size(size_t B) {
    return opt.part && (size_t)opt.part < B ? (size_t)opt.part : B;
}

// Makes `need` large enough for every part of B molecules of a dataset.
static void sizes_need(Sizes *need, const Dataset *data, const uint32_t *ids, size_t B) {
    Sizes batch = {0};
    for (size_t b = 0; b < B; b++) {
        if (b % part_size(B) == 0) batch = (Sizes){0};
        sizes_add(&batch, dataset_atoms(data, ids[b]));
        *need = sizes_max(*need, batch);
    }
}

// Makes activations and batch that large; memory only grows.
static void run_reserve(Run *run, const Dataset *data, Sizes need) {
    Sizes room = run->s.batch.room;
    need = sizes_max(room, need);
    if (memcmp(&need, &room, sizeof need) == 0) return;
    acts_free(&run->s.acts);
    batch_free(&run->s.batch);
    acts_alloc(&run->s.acts, run->s.model.config, need);
    batch_alloc(&run->s.batch, need, run->s.model.config.tasks > 0 ? data->n_tasks : 0);
}

// The molecules of update `step`: sample step * batch + k is entry (sample mod n) of the
// permutation of its epoch, so batches run across the ends of epochs and any step can be entered.
static void run_ids(Run *run, int64_t step) {
    int64_t n = (int64_t)run->train.count;
    for (int64_t k = 0; k < opt.batch; k++) {
        int64_t sample = step * opt.batch + k, epoch = sample / n;
        if (epoch != run->epoch)
            rng_permutation(run->order, run->train.count, run_seed(run), RNG_SHUFFLE,
                            (uint32_t)epoch);
        run->epoch = epoch;
        run->ids[k] = run->order[sample % n];
    }
}

// Called for B molecules of a dataset, from `first` on, that stand in run->s.batch.
typedef void Visit(Run *run, size_t first, size_t B, void *result);

// Goes through at most `most` molecules of a dataset, batch by batch, in order and without dropout.
// Blend and noise of molecule i depend only on the seed and i, so that results can be compared. The
// ranks share the batches; what they find is for the caller to add.
static void visit_batches(Run *run, const Dataset *data, size_t most, const Blend *blend, int use,
                          int encode, Visit *visit, void *result) {
    size_t n = data->count < most ? data->count : most, room = part_size((size_t)opt.batch);
    for (size_t i = 0, B; i < n; i += B) {
        B = n - i < room ? n - i : room;
        if (i / room % (size_t)all_ranks != (size_t)my_rank) continue;
        for (size_t b = 0; b < B; b++) run->ids[b] = (uint32_t)(i + b);
        threads_adapt();
        Sizes need = {0};
        sizes_need(&need, data, run->ids, B);
        run_reserve(run, data, need);
        run->s.draws = (Draws){(uint64_t)opt.seed, UINT32_MAX, (uint32_t)i, 0};
        batch_load(&run->s.batch, data, run->ids, B, blend, use, &run->s.draws);
        if (encode) encoder_forward(&run->s);
        visit(run, i, B, result);
    }
}

// result: (batches, 2, LOSSES) sums and counts.
static void visit_losses(Run *run, size_t first, size_t B, void *result) {
    double *sum = (double *)result + first / part_size((size_t)opt.batch) * 2 * LOSSES;
    (void)B;
    pretrain_heads(sum, &run->s, 0);
    sum[LOSS_TOTAL] = 0;  // is not set
    memcpy(sum + LOSSES, run->s.batch.count, LOSSES * sizeof *sum);
}

// Mean losses on a dataset.
static void mean_losses(double loss[LOSSES], Run *run, const Dataset *data) {
    size_t batches = data->count / part_size((size_t)opt.batch) + 1;
    double *sums = xmalloc(batches, 2 * LOSSES * sizeof *sums), all[2 * LOSSES] = {0};
    visit_batches(run, data, SIZE_MAX, &opt.blend, 0, 1, visit_losses, sums);
    ranks_sum(sums, batches * 2 * LOSSES, sizeof *sums);
    for (size_t k = 0; k < batches * 2 * LOSSES; k++) all[k % (2 * LOSSES)] += sums[k];
    loss_means(loss, all, all + LOSSES, &opt.weights);
    free(sums);
}

// How often each class occurs: those of path lengths, then those of the path slots, slot by slot.
static void visit_classes(Run *run, size_t first, size_t B, void *result) {
    double *counts = result;
    const Batch *batch = &run->s.batch;
    (void)first;
    (void)B;
    for (size_t k = 0; k < batch->P * PATH_BONDS; k++) {
        int class = batch->edge_target[k], slot = (int)(k % PATH_BONDS);
        if (class >= 0) counts[SPD_CLASSES + slot * EDGE_CLASSES + class] += 1;
        class = batch->spd_target[k / PATH_BONDS];
        if (class >= 0 && slot == 0) counts[class] += 1;
    }
}

// What a predictor without knowledge scores on `data`: for SPD and edges one that knows the class
// frequencies of (4096 molecules of) the training set, 1 for the cosine losses.
static void chance_losses(double chance[LOSSES], Run *run, const Dataset *data) {
    double known[SPD_CLASSES + EDGE_OUTPUTS] = {0}, seen[SPD_CLASSES + EDGE_OUTPUTS] = {0};
    double sum[LOSSES] = {0, 1, 0, 0, 1}, count[LOSSES] = {0, 1, 0, 0, 1};
    visit_batches(run, &run->train, 4096, NULL, USE_SPD, 0, visit_classes, known);
    visit_batches(run, data, 4096, NULL, USE_SPD, 0, visit_classes, seen);
    ranks_sum(known, SPD_CLASSES + EDGE_OUTPUTS, sizeof *known);
    ranks_sum(seen, SPD_CLASSES + EDGE_OUTPUTS, sizeof *seen);
    for (int group = 0; group <= PATH_BONDS; group++) {  // 0: SPD, then a slot each
        int first = group ? SPD_CLASSES + (group - 1) * EDGE_CLASSES : 0;
        int end = SPD_CLASSES + group * EDGE_CLASSES, loss = group ? LOSS_EDGE : LOSS_SPD;
        double total = 0;
        for (int k = first; k < end; k++) total += known[k] + 1;  // + 1: unseen is not impossible
        for (int k = first; k < end; k++) {
            sum[loss] -= seen[k] * log((known[k] + 1) / total);
            count[loss] += seen[k];
        }
    }
    loss_means(chance, sum, count, &opt.weights);
}

// Calibrated logits, or predictions in the labels' units, (n, Y).
static void visit_predictions(Run *run, size_t first, size_t B, void *result) {
    size_t Y = (size_t)run->s.model.config.tasks;
    float *out = (float *)result + first * Y;
    task_head_forward(out, &run->s, run->task.readout);
    for (size_t k = 0; k < B * Y; k++)
        out[k] = run->task.kind == TASK_REGRESSION
                     ? out[k] * run->task.std[k % Y] + run->task.mean[k % Y] : run->scale * out[k];
}

// Predictions (n, Y) of a whole dataset and its labels (n, its tasks), in fresh memory.
static float *predict_all(float **labels, Run *run, const Dataset *data) {
    size_t Y = (size_t)run->s.model.config.tasks;
    float *out = xmalloc(mul_size(data->count, Y), sizeof *out);
    visit_batches(run, data, SIZE_MAX, NULL, run->task.use, 1, visit_predictions, out);
    ranks_sum(out, data->count * Y, sizeof *out);
    *labels = dataset_labels(data);
    return out;
}

// Says so if the predictions (n, Y) of a task hardly differ: a hundredth of what labels do.
static void note_constant(const Run *run, const float *out, size_t n, char *const *names) {
    size_t Y = (size_t)run->s.model.config.tasks;
    for (size_t y = 0; y < Y && n > 9; y++) {
        double sum = 0, square = 0, unit = (double)run->task.std[y];
        for (size_t i = 0; i < n; i++) {
            double x = (double)(out[i * Y + y] - out[y]) / unit;
            sum += x;
            square += x * x;
        }
        if (square / (double)n - sum / (double)n * (sum / (double)n) < 1e-4)
            fprintf(stderr, "note    task %s: the predictions are all but the same; try more "
                    "--epochs or another --lr\n", names[y]);
    }
}

// Dies if a number is not finite, naming what was first to be none in the order of computation: an
// array of the forward pass (x of a layer is its input), else a gradient; those are made from the
// end of the table to its start.
static void check_finite(Run *run, double value) {
    const Model *model = &run->s.model;
    char gradient[256] = "the loss itself";
    Bad bad = {0};
    if (isfinite(value)) return;
    acts_place(&run->s.acts, run->s.acts.memory, model->config, batch_sizes(&run->s.batch), &bad);
    for (int i = 0; i < model->n_tensors && !bad.name[0]; i++) {
        const TensorInfo *t = &model->info[i];
        if (first_bad(model->grads + t->offset, t->count) < t->count)
            snprintf(gradient, sizeof gradient, "the gradient of %s", t->name);
    }
    DIE("step %lld: the loss is no longer a number. In the order of computation the first to be "
        "none: %s. What was saved before is kept. Try a lower --lr", (long long)run->done + 1,
        bad.name[0] ? bad.name : gradient);
}

// ---- fine-tuning's choice of an epoch

// The number by which epochs are chosen, better when larger: the mean ROC-AUC, or minus the mean
// RMSE in deviations of the training labels, so that no task's unit outweighs another's, over the
// tasks that the dataset can judge; minus the training loss if there is none. Of classes also the
// calibration().
static float selection_metric(float *scale, Run *run, const Dataset *data, double loss) {
    const Task *task = &run->task;
    size_t Y = (size_t)data->n_tasks, defined = 0;
    float *labels, *out = predict_all(&labels, run, data);
    double sum = 0, metric[METRICS];
    labels_judge(labels, data, NULL, NULL);
    *scale = task->kind == TASK_REGRESSION ? 1 : calibration(out, labels, data->count * Y);
    for (size_t y = 0; y < Y; y++) {
        task_metrics(metric, task->kind, out, labels, data->count, Y, y);
        double now = metric[METRIC_AUC];
        if (task->kind == TASK_REGRESSION) now = -metric[METRIC_RMSE] / (double)task->std[y];
        defined += !isnan(now);
        sum += isnan(now) ? 0 : now;
    }
    FREE_ALL(out, labels);
    return (float)(run->judged ? sum / (double)defined : -loss);
}

// A selection_metric() for people: of a single task in its units; NaN if no label judged.
static double shown_metric(const Run *run, float metric) {
    if (!run->judged) return (double)NAN;
    return fabs((double)metric) * (run->train.n_tasks == 1 ? (double)run->task.std[0] : 1);
}

static const char *selection_name(const Run *run) {
    if (run->task.kind == TASK_CLASSIFICATION) return "ROC-AUC";
    return run->train.n_tasks == 1 ? "RMSE" : "RMSE in deviations of the labels";
}

// Is a better than b, by selection_metric()? Anything is better than none.
static int is_better(float a, float b) { return a > b || isnan(b); }

// The row of the best epoch of the seed at hand; NULL before its first.
static const Epoch *best_epoch(const Run *run) {
    const Epoch *last = run->epochs ? run->history + run->epochs - 1 : NULL;
    if (!last || (int64_t)last->seed != run->nth) return NULL;
    return last - (int64_t)(last->number - last->best);
}

// ---- saving and resuming

// Metadata of a checkpoint: a model's sizes, and where its run is; or a fine-tuned model's task.
static char *run_meta(const Run *run, int of_state) {
    Text t = {0}, names = {0}, mean = {0}, std = {0};
    Config c = run->s.model.config;
    const char *const keys[] = {"layers", "dim", "ffn", "heads", "kernels", "step", "molecules",
                                "fingerprint", "valid_fingerprint", "seeds_done"};
    const long long values[] = {c.layers, c.dim, c.ffn, c.heads, c.kernels, run->done,
                                (long long)run->train.count, dataset_fingerprint(&run->train),
                                run->s.task ? dataset_fingerprint(&run->valid) : 0, run->nth};
    char *options = options_describe(OPTIONS, N_OPTIONS, of_state ? SHAPES | FILES : SHAPES);
    text_add(&t, "{");
    text_add_meta(&t, "format", "pt");
    for (int k = 0; k < 10; k++) text_add_meta(&t, keys[k], "%lld", values[k]);
    text_add_meta(&t, "run", "%s", options);
    text_add_meta(&t, "stereo", "%s", run->train.stereo);
    text_add_meta(&t, "largest_fragment", "%u",
                  (unsigned)(run->train.flags & PREP_LARGEST_FRAGMENT));
    for (int y = 0; run->s.task && y < c.tasks; y++) {
        text_add(&names, "%s%s", y ? "\n" : "", run->train.task_names[y]);
        text_add(&mean, "%s%.9g", y ? " " : "", (double)run->task.mean[y]);
        text_add(&std, "%s%.9g", y ? " " : "", (double)run->task.std[y]);
    }
    if (run->s.task) {
        text_add_meta(&t, "task", "%s", KIND_NAMES[run->task.kind]);
        text_add_meta(&t, "readout", "%s", READOUT_NAMES[run->task.readout]);
        text_add_meta(&t, "modality", "%s", opt.modality);
        text_add_meta(&t, "task_names", "%s", names.text);
        text_add_meta(&t, "label_mean", "%s", mean.text);
        text_add_meta(&t, "label_std", "%s", std.text);
        if (best_epoch(run))
            text_add_meta(&t, "logit_scale", "%.9g", (double)best_epoch(run)->scale);
    }
    text_add(&t, "}");
    FREE_ALL(options, names.text, mean.text, std.text);
    return t.text;
}

#define LOG_BEGINS "step,total,denoise,|seed,epoch,loss,valid "

// Adds the rows to the CSV that it has not yet: of fine-tuning an epoch each, else a step each.
static void log_write(Run *run) {
    int64_t end = run->s.task ? run->epochs : run->done;
    if (my_rank > 0) return;
    if (!run->csv) {
        run->csv = fopen(run->log_path, "w");
        CHECK(run->csv, "%s: cannot write: %s", run->log_path, strerror(errno));
        if (run->s.task)
            fprintf(run->csv, "seed,epoch,loss,valid %s,best_epoch\n", selection_name(run));
        else
            fprintf(run->csv,
                    "step,total,denoise,spd,edge,3d,lr,gradient_norm,molecules_per_second\n");
    }
    for (; run->shown < end; run->shown++) {
        if (run->s.task) {
            const Epoch *row = run->history + run->shown;
            char valid[32] = "";
            if (run->judged) snprintf(valid, sizeof valid, "%.6g", shown_metric(run, row->valid));
            fprintf(run->csv, "%lld,%.0f,%.6g,%s,%.0f\n",
                    (long long)opt.seed + (long long)row->seed, (double)row->number,
                    (double)row->loss, valid, (double)row->best);
            continue;
        }
        fprintf(run->csv, "%lld", (long long)run->shown + 1);
        for (int k = 0; k < LOG_COLUMNS; k++)
            fprintf(run->csv, ",%.6g", (double)run->log[run->shown * LOG_COLUMNS + k]);
        fprintf(run->csv, "\n");
    }
    CHECK(fflush(run->csv) == 0 && !ferror(run->csv), "%s: write failed: %s", run->log_path,
          strerror(errno));
}

// Where the best parameters of the seed at hand go if there are several: with the others they make
// an ensemble for `predict`.
static char *seed_path(const Run *run) {
    char ending[64];
    snprintf(ending, sizeof ending, ".seed%llu.safetensors", (unsigned long long)run_seed(run));
    return path_with(opt.output, ".safetensors", ending);
}

// The arenas of a run's state.
static void run_arenas(float *arenas[ARENAS], const Run *run) {
    const Model *m = &run->s.model;
    float *const all[ARENAS] = {m->params, m->m, m->v, run->best};
    memcpy(arenas, all, sizeof all);
}

// Writes the checkpoint: of fine-tuning this seed's best parameters, if no earlier seed had better
// ones. Of several seeds each has its own file too.
static void checkpoint_write(const Run *run) {
    float *const output[ARENAS] = {run->best ? run->best : run->s.model.params};
    char *meta = run_meta(run, 0), *own = seed_path(run);
    TensorOut other = {"valid_residuals", run->n_residuals, (size_t)run->train.n_tasks,
                       run->residuals};
    const Epoch *best = best_epoch(run);
    int better = best != NULL;
    for (const Epoch *row = run->history; better && row->seed < best->seed; row++)
        better = is_better(best->valid, row->valid);
    if (my_rank == 0 && (!run->s.task || better))
        model_write(opt.output, &run->s.model, output, &other, run->n_residuals > 0, meta);
    if (my_rank == 0 && best && opt.seeds > 1)
        model_write(own, &run->s.model, output, &other, run->n_residuals > 0, meta);
    FREE_ALL(meta, own);
}

// Writes first the state for --resume, which is complete in itself, so that a run killed between
// two renames resumes from it; then the checkpoint.
static void run_save(Run *run) {
    const float *history = (const float *)run->history;
    TensorOut tables[2];  // without the empty ones
    size_t n_tables = 0;
    if (run->done)
        tables[n_tables++] = (TensorOut){"log", (size_t)run->done, LOG_COLUMNS, run->log};
    if (run->epochs)
        tables[n_tables++] = (TensorOut){"history", (size_t)run->epochs, EPOCH_COLUMNS, history};
    float *arenas[ARENAS];
    char *meta = run_meta(run, 1);
    run_arenas(arenas, run);
    if (my_rank == 0) model_write(run->state_path, &run->s.model, arenas, tables, n_tables, meta);
    free(meta);
    checkpoint_write(run);
    log_write(run);
}

// Continues the run whose state was opened by run_open().
static void run_load(Run *run) {
    TensorFile *f = &run->file;
    float *arenas[ARENAS];
    run->nth = meta_whole(f, "seeds_done");
    run->done = tensor_rows(run->log, run->steps, LOG_COLUMNS, f, "log");
    if (run->s.task)
        run->epochs = tensor_rows((float *)run->history, opt.epochs * opt.seeds, EPOCH_COLUMNS, f,
                                 "history");
    CHECK(run->done == meta_whole(f, "step") && run->nth < opt.seeds,
          "%s: damaged state: the log does not fit the step or the seed", f->path);
    for (int64_t i = 0; i < run->epochs; i++) {  // see best_epoch()
        const Epoch *row = run->history + i;
        CHECK(row->best >= 1 && row->best <= row->number && row->number <= (float)(i + 1),
              "%s: damaged state: row %lld of the history", f->path, (long long)i);
    }
    run_arenas(arenas, run);
    for (int a = 0; a < ARENAS; a++)
        if (arenas[a]) model_load(&run->s.model, arenas[a], f, ARENA_PREFIXES[a]);
    memset(run->s.model.live, 1, run->s.model.count / ADAM_CHUNK + 1);  // some have moments
    tensor_file_close(f);
}

// ---- opening and closing

// 3D asked of molecules that have no positions: refused, or if 2D is asked too, said.
static void check_positions(const Dataset *data, int use) {
    size_t without = 0;
    for (size_t i = 0; i < data->count && use & USE_3D; i++) without += !dataset_has_pos(data, i);
    CHECK(without == 0 || use & USE_SPD,
          "%s: --modality 3d: %zu of %zu molecules have no positions", data->path, without,
          data->count);
    if (without)
        fprintf(stderr, "note    %s: %zu of %zu molecules have no positions and take part with 2D "
                "only\n", data->path, without, data->count);
}

// Says so if the dataset was prepared otherwise than what the model has learnt from.
static void check_preparation(const Dataset *data, const TensorFile *model) {
    const char *then = tensor_meta(model, "largest_fragment");
    int now = (data->flags & PREP_LARGEST_FRAGMENT) != 0;
    if (then && data->count && now != (*then == '1'))
        fprintf(stderr, "note    %s: made with%s --largest-fragment, what the model learnt from %s "
                "it\n", data->path, now ? "" : "out", now ? "without" : "with");
    note_stereo(data, model->path, tensor_meta(model, "stereo"));
}

// Opens the state of the run to be resumed, if there is one, and takes its options.
static void run_open_state(Run *run) {
    if (access(run->state_path, F_OK) != 0) {
        fprintf(stderr, "resume  nothing is saved in %s: this run starts afresh\n",
                run->state_path);
        return;
    }
    tensor_file_open(&run->file, run->state_path);
    options_from_state(required_meta(&run->file, "run", "the state of a run"), run->state_path);
    int64_t print = meta_whole(&run->file, "fingerprint");
    CHECK(print == dataset_fingerprint(&run->train), "%s: --resume needs the same data; expected "
          "%lld molecules with fingerprint %lld, found %zu with %u in %s", run->state_path,
          (long long)meta_whole(&run->file, "molecules"), (long long)print, run->train.count,
          (unsigned)dataset_fingerprint(&run->train), run->train.path);
}

// Opens the training set and those beside it, and claims the output: now, not after hours of work,
// it is found out whether it can be written.
static void run_open(Run *run, const char *train_path) {
    dataset_open(&run->train, train_path);
    int64_t n = (int64_t)run->train.count, batch = run->s.task ? DEFAULT_BATCH : PRETRAIN_BATCH;
    CHECK(n > 0, "%s: the dataset is empty", train_path);
    run->state_path = xprintf("%s.state", opt.output);
    run->log_path = path_with(opt.output, ".safetensors", ".log.csv");
    if (my_rank == 0) {
        char *lock = xprintf("%s.run", opt.output);
        out_probe(opt.output, TENSORS_BEGIN);
        out_probe(run->state_path, TENSORS_BEGIN);
        out_probe(run->log_path, LOG_BEGINS);
        out_open(&run->lock, lock, NULL);
        free(lock);
    }
    if (opt.resume) run_open_state(run);
    CHECK(opt.batch <= n, "--batch-size: %lld is more than the %lld molecules of %s",
          (long long)opt.batch, (long long)n, train_path);
    if (!opt.batch) opt.batch = n < batch ? n : batch;
    dataset_open_part(&run->valid, opt.valid);
    dataset_open_part(&run->test, opt.test);
    note_stereo(&run->valid, train_path, run->train.stereo);
    note_stereo(&run->test, train_path, run->train.stereo);
    run->epoch = -1;
    run->scale = 1;
    run->order = xmalloc(run->train.count, sizeof *run->order);
    run->ids = xmalloc((size_t)opt.batch, sizeof *run->ids);
    run->s.drop = opt.drop;
    run->s.part = (size_t)opt.part;
    run->s.weights = opt.weights;
    run->steps = run->s.task ? (opt.epochs * n + opt.batch - 1) / opt.batch : opt.steps;
    run->warmup = opt.warmup >= 0 ? opt.warmup : run->steps / (run->s.task ? 10 : 12) + 1;
    run->log = xmalloc((size_t)run->steps, LOG_COLUMNS * sizeof *run->log);
}

// Model, buffers and settings of a checkpoint, whose file may be open already.
static void run_open_model(Run *run, const char *model) {
    TensorFile *f = &run->file;
    CHECK(model, "--model: expected a checkpoint");
    if (!f->path) tensor_file_open(f, model);
    model_create(&run->s.model, tensor_file_config(f), 0);
    model_load(&run->s.model, run->s.model.params, f, "");
    if (!opt.batch) opt.batch = DEFAULT_BATCH;
    run->ids = xmalloc((size_t)opt.batch, sizeof *run->ids);
    const char *readout = tensor_meta(f, "readout"), *modality = tensor_meta(f, "modality");
    if (opt.readout || !readout) readout = opt.readout ? opt.readout : DEFAULT_READOUT;
    if (opt.modality || !modality) modality = opt.modality ? opt.modality : DEFAULT_MODALITY;
    run->task.use = modality_use(modality);  // as it was fine-tuned, unless told otherwise
    run->task.readout = (Readout)name_index("--readout", readout, READOUT_NAMES, 3);
}

// Memory for the largest batch of the first epoch.
static void run_prepare(Run *run) {
    int64_t epoch_steps = (int64_t)run->train.count / opt.batch + 1;
    Sizes need = {0};
    for (int64_t i = run->done; i < run->steps && i < run->done + epoch_steps; i++) {
        run_ids(run, i);
        sizes_need(&need, &run->train, run->ids, (size_t)opt.batch);
    }
    run->epoch = -1;  // a state may be of another seed
    run_reserve(run, &run->train, need);
}

// Frees whatever of a run has been opened.
static void run_close(Run *run) {
    if (run->lock.file) out_discard(&run->lock);
    dataset_close(&run->train);
    dataset_close(&run->valid);
    dataset_close(&run->test);
    tensor_file_close(&run->file);
    model_free(&run->s.model);
    acts_free(&run->s.acts);
    batch_free(&run->s.batch);
    if (run->csv) fclose(run->csv);
    FREE_ALL(run->order, run->ids, run->log, run->history, run->best, run->s.part_sum,
             run->s.logits[LOSS_TOTAL], run->statistics, run->residuals, run->state_path,
             run->log_path);
}

// ---- the loop

// One update; fills the step's row of the log.
static void run_step(Run *run) {
    double start = now_seconds(), loss[LOSSES] = {0};
    Step *s = &run->s;
    Adam adam = opt.adam;
    threads_adapt();
    adam.lr = learning_rate(opt.adam.lr, run->done, run->warmup, run->steps, opt.hold);
    run_ids(run, run->done);
    Sizes need = {0};
    sizes_need(&need, &run->train, run->ids, (size_t)opt.batch);
    run_reserve(run, &run->train, need);
    Given given = {&run->train, run->ids, run->s.task ? NULL : &opt.blend,
                   run->s.task ? run->task.use : 0, {run_seed(run), (uint32_t)run->done, 0, 1}};
    double norm = training_step(loss, s, (size_t)opt.batch, &given, &adam, run->done + 1);
    check_finite(run, loss[LOSS_TOTAL] + norm);
    float *row = run->log + run->done * LOG_COLUMNS;
    for (int k = 0; k < LOSSES; k++) row[k] = (float)loss[k];
    row[LOG_LR] = (float)adam.lr;
    row[LOG_NORM] = (float)norm;
    row[LOG_RATE] = (float)((double)opt.batch / fmax(now_seconds() - start, 1e-6));
    run->done++;
}

// Of pretraining: a line on stdout a twentieth of the way.
static void pretrain_after_step(const Run *run, int terminal) {
    int64_t every = run->steps / 20 > 0 ? run->steps / 20 : 1, n = run->done;
    if (n != 1 && n % every && n != run->steps) return;
    double mean[LOG_COLUMNS];
    rows_mean(mean, run->log, LOG_COLUMNS, n == 1 ? 0 : n - (n % every ? n % every : every), n);
    if (terminal) fprintf(stderr, "\r\033[K");
    printf("%7lld  %7.4f  %7.4f %7.4f %7.4f %7.4f  %8.2e %8.3f %7.0f\n", (long long)n,
           mean[LOSS_TOTAL], mean[LOSS_NOISE], mean[LOSS_SPD], mean[LOSS_EDGE], mean[LOSS_3D],
           mean[LOG_LR], mean[LOG_NORM], mean[LOG_RATE]);
    fflush(stdout);
}

// Of fine-tuning, at the end of an epoch: a row of the history and a line on stdout; parameters are
// kept if they are the best on the validation set.
static void finetune_after_step(Run *run, int terminal) {
    int64_t n = (int64_t)run->train.count, epoch = run->done * opt.batch / n;
    if (epoch == (run->done - 1) * opt.batch / n) return;
    double mean[LOG_COLUMNS];
    const Epoch *best = best_epoch(run);
    rows_mean(mean, run->log, LOG_COLUMNS, (epoch - 1) * n / opt.batch, run->done);
    float scale, valid = selection_metric(&scale, run, &run->valid, mean[LOSS_TOTAL]);
    int better = !best || is_better(valid, best->valid);
    run->history[run->epochs++] =
        (Epoch){(float)run->nth, (float)epoch, (float)mean[LOSS_TOTAL], valid,
                better ? (float)epoch : best->best, scale, {0}};
    if (better) memcpy(run->best, run->s.model.params, sizeof(float) * run->s.model.count);
    if (terminal) fprintf(stderr, "\r\033[K");
    printf("%6llu %6lld %9s %10s%s\n", (unsigned long long)run_seed(run), (long long)epoch,
           number_text(mean[LOSS_TOTAL], 4), number_text(shown_metric(run, valid), 4),
           better ? "  best so far" : "");
    fflush(stdout);
}

// Have enough epochs passed without gain?
static int is_enough(const Run *run) {
    const Epoch *best = best_epoch(run);
    return best && opt.patience && run->history + run->epochs - 1 - best >= opt.patience;
}

// Has a signal asked a rank to stop?
static int is_stopped(void) {
    double signals = mb_signal != 0;
    ranks_sum(&signals, 1, sizeof signals);
    return signals > 0;
}

// Updates run->done..run->steps-1, or as far as a signal lets it come; ends the program, saved, if
// there was one.
static void run_train(Run *run) {
    Progress progress = progress_begin((double)run->done);
    int64_t first = run->done;
    int stopped = 0;
    char text[96];
    signals_catch();
    while (run->done < run->steps && !is_enough(run) && !(stopped = is_stopped())) {
        run_step(run);
        if (run->s.task) finetune_after_step(run, progress.terminal);
        else pretrain_after_step(run, progress.terminal);
        log_write(run);
        if (run->done < run->steps && run->done % opt.save_every == 0) run_save(run);
        snprintf(text, sizeof text, "step %lld of %lld%s", (long long)run->done,
                 (long long)run->steps, run->s.task ? " of this seed" : "");
        progress_show(&progress, (double)run->done, (double)run->steps,
                      (double)(run->done - first) * (double)opt.batch, "molecules", text,
                      run->s.task && run->done == run->steps);
    }
    if (progress.terminal) fprintf(stderr, "\r\033[K");
    run_save(run);  // also when all steps were done: the run may have been killed while saving
    if (!stopped) return;
    fprintf(stderr, "stopped by a signal and saved after step %lld; to go on, give the same "
            "command with --resume\n", (long long)run->done);
    ranks_finish();
    mb_exit(128 + (mb_signal ? mb_signal : SIGTERM));
}

// =================================================================================================
// 14 Commands and main
// =================================================================================================

// ---- pretrain: ./moleblend train.bin

// Opens what a pretraining run needs, and says what will be done.
static void pretrain_open(Run *run, const char *train_path) {
    run_open(run, train_path);
    int resumed = run->file.path != NULL;
    model_create(&run->s.model, start_config(resumed ? NULL : opt.init), 1);
    if (resumed) run_load(run);
    else model_init(&run->s.model, run_seed(run));
    if (opt.init && !resumed) {
        TensorFile f;
        tensor_file_open(&f, opt.init);
        model_load(&run->s.model, run->s.model.params, &f, "");
        note_stereo(&run->train, opt.init, tensor_meta(&f, "stereo"));
        tensor_file_close(&f);
    }
    run_prepare(run);
    Config c = run->s.model.config;
    fprintf(
        stderr,
        "model   %d layers, %d wide, ffn %d, %d heads, %d kernels: %.2f M parameters, seed %lld\n"
        "data    %s: %zu molecules; %s: %zu\n"
        "memory  %.0f MiB parameters, gradients and moments, %.0f MiB activations\n"
        "run     %lld steps of %lld molecules (%.1f epochs) on %d thread%s%s\n",
        c.layers, c.dim, c.ffn, c.heads, c.kernels, (double)run->s.model.count / 1e6,
        (long long)opt.seed, train_path, run->train.count,
        opt.valid ? opt.valid : "no validation", run->valid.count,
        16.0 * (double)run->s.model.count / (1 << 20),
        (double)run->s.acts.memory_bytes / (1 << 20), (long long)run->steps, (long long)opt.batch,
        (double)run->steps * (double)opt.batch / (double)run->train.count, thread_count(),
        thread_count() > 1 ? "s" : "", MB_OPENMP ? "" : " (built without OpenMP)");
    if (resumed) fprintf(stderr, "resumed after step %lld\n", (long long)run->done);
}

// The result: each loss at the start and the end, on the validation set, and by chance.
static void pretrain_report(Run *run) {
    double start[LOG_COLUMNS], end[LOG_COLUMNS], valid[LOSSES], chance[LOSSES];
    int64_t window = run->steps / 50 + 1;
    rows_mean(start, run->log, LOG_COLUMNS, 0, 1);
    rows_mean(end, run->log, LOG_COLUMNS, run->done > window ? run->done - window : 0, run->done);
    mean_losses(valid, run, &run->valid);
    chance_losses(chance, run, run->valid.count ? &run->valid : &run->train);
    printf("\nloss        start     end   valid  by chance\n");
    for (int k = 1; k <= LOSSES; k++) {
        int loss = k % LOSSES;  // the total last
        char shown[16] = "-";
        if (run->valid.count) snprintf(shown, sizeof shown, "%.4f", valid[loss]);
        printf("%-8s %8.4f%8.4f%8s%11.4f\n", LOSS_NAMES[loss], start[loss], end[loss], shown,
               chance[loss]);
    }
    if (end[LOSS_TOTAL] > 1.2 * chance[LOSS_TOTAL])
        fprintf(stderr, "note    the losses are far above those of chance: try a lower --lr\n");
    printf("wrote %s, %s\n", opt.output, run->log_path);
}

static void command_pretrain(const char *train_path) {
    Run run = {0};
    pretrain_open(&run, train_path);
    printf("   step    total  denoise     spd    edge      3d        lr gradient    mol/s\n");
    run_train(&run);
    pretrain_report(&run);
    run_close(&run);
}

// ---- the other commands, a file each

#include "commands/finetune.h"  // command_finetune()
#include "commands/embed.h"     // command_embed()
#include "commands/predict.h"   // command_predict()
#include "commands/show.h"      // command_show()

// ---- the command line

typedef struct {
    const char *name;
    unsigned bit;
    int words;            // files it takes
    const char *output;   // default of -o
    const char *usage, *help;
} Command;

static const Command COMMANDS[] = {
    {"pretrain", PRETRAIN, 1, "moleblend.safetensors", "train.bin", "the same, spelt out"},
    {"finetune", FINETUNE, 1, "finetuned.safetensors", "train.bin --init FILE",
     "train on labels, from a checkpoint or from scratch"},
    {"predict", PREDICT, 1, "-", "data.bin --model FILE", "predictions as CSV on stdout"},
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
    for (const Command *c = COMMANDS; c < COMMANDS + N_COMMANDS; c++)
        printf("  ./moleblend %-8s %-23s %s\n", c->name, c->usage, c->help);
    printf("\nDatasets (.bin) are made by ./data_prep from SDF, SMILES or CSV files.\n");
    options_print(OPTIONS, N_OPTIONS, command ? command->bit : 0);
}

// Says so if parts that should sum to 1 do not; they count as parts of their sum.
static void note_parts(const char *names, const double *part, int n) {
    double sum = 0;
    for (int k = 0; k < n; k++) sum += part[k];
    if (fabs(sum - 1) > 1e-6)
        fprintf(stderr, "note    %s sum to %g and are taken as parts of that\n", names, sum);
}

// What the ranges of single options cannot say.
static void check_options(void) {
    CHECK(opt.blend.pair_spd + opt.blend.pair_edge > 0 && opt.blend.pair_3d >= 0,
          "--pair-spd, --pair-edge: expected one of them above 0 (molecules without 3D need it)");
    CHECK(opt.blend.atom_2d + opt.blend.atom_3d > 0, "--atom-2d, --atom-3d: expected one above 0");
    CHECK(opt.steps <= UINT32_MAX - 1, "--steps: too many");
    for (int k = 0; k < N_OPTIONS && opt.blend.all; k++)
        CHECK(!option_given[k] || !is_between(&OPTIONS[k], &opt.blend.pair_spd, &opt.blend.atom_3d),
              "--no-blend shows everything of every pair; expected no --pair-* or --atom-* beside "
              "it");
    note_parts("--pair-spd, --pair-edge and --pair-3d", &opt.blend.pair_spd, 3);
    note_parts("--atom-2d and --atom-3d", &opt.blend.atom_2d, 2);
}

// The command that argv[1] names; NULL if it is a file or an option. Dies at one that is misspelt.
static const Command *command_find(const char *word) {
    const Command *nearest = NULL;
    for (const Command *c = COMMANDS; c < COMMANDS + N_COMMANDS; c++) {
        if (strcmp(word, c->name) == 0) return c;
        if (edit_distance(word, c->name) <= 2) nearest = c;
    }
    CHECK(!nearest || access(word, F_OK) == 0, "unknown command %s; did you mean %s?", word,
          nearest->name);
    return NULL;
}

// Sorts the words of the command line: checkpoints go behind models[0..n), others to the front.
// Returns how many checkpoints there are then; *n_words: of the others.
static int words_models(const char **models, const char **words, int *n_words) {
    int n = 0, others = 0;
    if (opt.model) models[n++] = opt.model;
    for (int k = 0; k < *n_words; k++) {
        size_t length = strlen(words[k]);
        if (length > 12 && strcmp(words[k] + length - 12, ".safetensors") == 0)
            models[n++] = words[k];
        else words[others++] = words[k];
    }
    *n_words = others;
    return n;
}

int main(int argc, char **argv) {
    program_begin(argv);
    if (argc > 1 && strcmp(argv[1], "help") == 0) argv[1] = xprintf("--help");
    const Command *command = argc > 1 ? command_find(argv[1]) : NULL;
    int named = command != NULL;
    if (!command) command = &COMMANDS[0];
    if (command->bit == FINETUNE) {  // the paper's
        opt.adam.lr = 2e-4;
        opt.adam.beta2 = 0.999;
        opt.hold = 0;
    }
    opt.output = command->output;
    const char **words = xmalloc(2 * (size_t)argc + 2, sizeof *words), **models = words + argc + 1;
    int n_words = options_parse(OPTIONS, N_OPTIONS, command->bit, argc - named, argv + named, words,
                                argc, option_given), n_models = opt.model != NULL;
    if (opt.version) printf("moleblend %s, vectors of %d floats\n", MB_VERSION, VEC);
    if (opt.help) print_help(named ? command : NULL);
    if (opt.version || opt.help) mb_exit(EXIT_SUCCESS);
    if (command->bit == PREDICT) n_models = words_models(models, words, &n_words);
    CHECK(n_words == command->words, "expected ./moleblend %s%s; see --help",
          named ? xprintf("%s ", command->name) : "", command->usage);
    check_options();
    if (!opt.valid && command->bit & TRAIN) opt.valid = sibling(words[0], "valid");
    if (!opt.test && command->bit & FINETUNE) opt.test = sibling(words[0], "test");
    CHECK(!(command->bit & TRAIN) || strcmp(opt.output, "-") != 0, "-o: expected a file");
    const char *const files[] = {words[0], opt.valid, opt.test, opt.init, opt.model, opt.near};
    for (size_t k = 0; k < sizeof files / sizeof files[0]; k++) files_input(files[k]);
    for (int k = 0; k < n_models; k++) files_input(command->bit == PREDICT ? models[k] : NULL);
    if (command->bit & TRAIN) ranks_begin();
    threads_set(opt.threads);
    switch (command->bit) {
        case PRETRAIN: command_pretrain(words[0]); break;
        case FINETUNE: command_finetune(words[0]); break;
        case PREDICT: command_predict(words[0], models, n_models); break;
        case EMBED: command_embed(words[0]); break;
        case SHOW: command_show(words[0], words[1]); break;
        default: file_info(words[0]); break;
    }
    free(words);
    ranks_finish();
    mb_exit(EXIT_SUCCESS);
}

#endif  // MOLEBLEND_TEST
