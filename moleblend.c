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
// HOW TO READ IT. Sections 1 to 8 are the method, from a molecule to one training step, with every
// line of every forward and backward pass; each backward pass stands under its forward pass and
// quotes the line that it undoes. Behind the border: memory for parameters, and pretraining, whose
// loop is main()'s, at the very end. What is included knows nothing of the method: moleblend.h has
// molecules, datasets, random numbers.
//   1 a molecule and its relations   4 layers                            7 heads and losses
//   2 the blend and the batch        5 from relation to attention bias   8 gradients and update
//   3 parameters, a step             6 tokens and the encoder            9 ... behind the border
//
//   molecule: atoms, bonds, positions
//      | 1                    shortest paths, bond paths; noise on positions -> distances
//      v
//   spd (N, N)   path (N, N, 5)   distance (N, N)               the three relations of a pair
//      | 2 one drawn for each pair          | 2 all: targets (of 3D, the clean direction)
//      v                                    |
//   bias (H, S, S) 5    tokens (T, C) 6     |
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
//   SS ordered token pairs, sum S * S  Y  tasks of a fine-tuning head
//   M, N, K  of a product: rows, columns, inner dimension; K also: a head's padded outputs
//
// Matrices are row-major, shapes are given as (rows, columns), i and j are the two atoms of a pair.
// The gradient of an array is named d + its name. s is the Step, p its parameters, g their
// gradients. Everything is deterministic: threads share out results, never sums, and every random
// number has a name instead of a turn.

#include "moleblend.h"
#include "lib/memory.h"  // Store, ARRAYS(): arrays of a batch; take(): scratch of a task

// =================================================================================================
// 1 A molecule and its relations (paper 3.1). Ethanol, atoms C0-C1-O2, is the example throughout:
//   `./data_prep -o e.bin data/ethanol.sdf && ./moleblend show e.bin 0` prints these numbers.
//
//     spd = 0 1 2     path (0, 2): bonds 0-1, 1-2, both single, code 0    distance = 0.0 1.5 2.4
//           1 0 1     path (0, 1): bond 0-1                                          1.5 0.0 1.4
//           2 1 0     path (0, 0): none                                              2.4 1.4 0.0
// =================================================================================================

enum {
    PATH_BONDS = 5,              // E, multi_hop_max_dist
    PATH_NONE = BOND_CODES,      // code of an empty slot of a path; bonds have 0..59
    SPD_UNREACHABLE = 510,       // and every path of 510 bonds or more
    SPD_ROWS = 512,              // of spatial_pos_encoder and degree tables: value v is row v + 1
};

// Shortest paths of a molecule: spd (N, N) bonds, and path (N, N, E), the codes of the first E
// bonds; degree (N). Floyd-Warshall with the intermediate atom k in the outermost loop and a strict
// test decides which of several shortest paths is taken (algos.pyx of the release).
static void relations(uint16_t *spd, uint8_t *path, uint16_t *degree, const Molecule *m) {
    idx N = m->n_atoms;
    Scratch *scratch = scratch_begin();
    uint16_t *next = (uint16_t *)(void *)take(scratch, N * N / 2 + 1);  // first atom from i to j
    uint8_t *bond = (uint8_t *)take(scratch, N * N / 4 + 1);  // of two neighbours
    for (idx ij = 0; ij < N * N; ij++) spd[ij] = ij % (N + 1) ? SPD_UNREACHABLE : 0;
    memset(degree, 0, N * sizeof *degree);
    for (int k = 0; k < 2 * m->n_bonds; k++) {  // bond k / 2, in both directions
        idx i = m->bonds[k], j = m->bonds[k ^ 1];
        spd[i * N + j] = 1;
        next[i * N + j] = j;
        bond[i * N + j] = m->bond_code[k / 2];
        degree[i] += degree[i] < SPD_ROWS - 2;
    }
    for (idx k = 0; k < N; k++) {
        const uint16_t *spd_k = spd + k * N;
        for (idx i = 0; i < N; i++) {
            uint16_t *spd_i = spd + i * N, *next_i = next + i * N, spd_ik = spd_i[k];
            uint16_t next_ik = next_i[k];
            if (i == k || spd_ik == SPD_UNREACHABLE) continue;
#pragma omp simd
            for (idx j = 0; j < N; j++) {
                uint16_t through = (uint16_t)(spd_ik + spd_k[j]);
                int shorter = through < spd_i[j];
                spd_i[j] = shorter ? through : spd_i[j];
                next_i[j] = shorter ? next_ik : next_i[j];
            }
        }
    }
    for (idx i = 0; i < N; i++) {
        for (idx j = 0; j < N; j++) {
            uint8_t *path_ij = path + (i * N + j) * PATH_BONDS;
            int length = spd[i * N + j] == SPD_UNREACHABLE ? 0 : spd[i * N + j];
            memset(path_ij, PATH_NONE, PATH_BONDS);
            for (idx e = 0, at = i; e < PATH_BONDS && e < length; e++) {
                idx to = next[at * N + j];
                path_ij[e] = bond[at * N + to];
                at = to;
            }
        }
    }
}

// =================================================================================================
// 2 The blend and the batch (paper 3.2, 3.3). Every ordered pair (i, j) shows the encoder one of
//   its relations, drawn with probabilities 0.2, 0.2, 0.6; every atom its degree or its distances;
//   positions are shaken. The heads must recover everything as it was before the shaking.
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
//     bias    (H, 3, 3) | (H, 4, 4)    SS = 25   square_start 0, 9, 25, times H
// =================================================================================================

enum { USE_SPD = 1, USE_EDGE = 2, USE_3D = 4 };  // of a pair; an atom uses USE_SPD (2D) or USE_3D
enum { SPD_CLASSES = 11, EDGE_CLASSES = 24 };
enum { LOSS_TOTAL, LOSS_NOISE, LOSS_SPD, LOSS_EDGE, LOSS_3D, LOSSES };

#define DIRECTION_EPS 1e-5f  // direction = (noised_j - noised_i) / (distance + eps)

// "+ 1" makes room for the end of the last molecule.
#define BATCH_ARRAYS(X)                                                                            \
    X(int, n_atoms, B)                                                                             \
    X(idx, atom_start, B + 1)                                                                      \
    X(idx, pair_start, B + 1)                                                                      \
    X(idx, square_start, B + 1)                                                                    \
    X(idx, dir_pairs, B)            /* ordered pairs that count in the 3D loss */                  \
    X(uint8_t, has_pos, B)                                                                         \
    X(int, molecule, T)             /* of a token */                                               \
    X(uint8_t, atom_feat, A, ATOM_FEATURES)                                                        \
    X(uint16_t, degree, A)                                                                         \
    X(uint8_t, atom_use, A)         /* USE_ bits */                                                \
    X(float, pos, A, 3)             /* clean */                                                    \
    X(float, noise, A, 3)                                                                          \
    X(uint16_t, spd, P)                                                                            \
    X(uint8_t, path, P, PATH_BONDS) /* bond codes, PATH_NONE */                                    \
    X(uint8_t, pair_use, P)         /* USE_ bits */                                                \
    X(idx, pair_row, P)             /* its row in (Q, *) matrices, -1: uses no 3D */               \
    X(float, distance, P)           /* of the noised positions */                                  \
    X(float, direction, 3, P)       /* the same, for the denoising head: (3, N, N) of a molecule */\
    X(int8_t, spd_target, P)        /* classes, -1: not counted */                                 \
    X(int8_t, edge_target, P, PATH_BONDS)                                                          \
    X(double, row_loss, A)          /* of the pairs of an atom, by the head at work */             \
    X(float, labels, B, Y)

typedef struct {
    idx B, T, A, P, Q, SS, Y;       // Y: labels of a molecule
    double count[LOSSES];           // what counts in a loss: atoms, pairs, slots, molecules
#define X(type, field, ...) type *field;
    BATCH_ARRAYS(X)
#undef X
    Store store;
    int readers;
    Molecule *reader;               // (readers) what a thread reads into
} Batch;

// Where molecule b stands in a batch.
typedef struct {
    idx b, N, S;                    // its number, atoms, tokens
    idx atom, token, pair, square;  // its first of each
} View;

static View batch_view(const Batch *batch, idx b) {
    idx N = batch->n_atoms[b], atom = batch->atom_start[b];
    return (View){b, N, N + 1, atom, atom + b, batch->pair_start[b], batch->square_start[b]};
}

// Is token t the graph token of its molecule?
static int is_graph_token(const Batch *batch, idx t) {
    return t == 0 || batch->molecule[t] != batch->molecule[t - 1];
}

// Lays out a batch of B molecules with these atom counts, as drawn above.
static void batch_layout(Batch *batch, idx B, const int *n_atoms) {
    Store *store = &batch->store;
    idx A = 0, P = 0, SS = 0, Y = batch->Y;
    for (idx b = 0; b < B; b++) {
        idx n = n_atoms[b];
        A += n;
        P += n * n;
        SS += (n + 1) * (n + 1);
        CHECK(n < 30000 && SS < PTRDIFF_MAX / 64, "a batch too large; try a lower --batch-size");
    }
    idx T = A + B;
    batch->B = B, batch->T = T, batch->A = A, batch->P = P, batch->SS = SS;
#define X(type, field, ...) batch->field = store_take(store, sizeof(type), SHAPE(__VA_ARGS__));
    LAYOUT(BATCH_ARRAYS, X)
#undef X
    batch->atom_start[0] = batch->pair_start[0] = batch->square_start[0] = 0;
    for (idx b = 0; b < B; b++) {
        idx n = batch->n_atoms[b] = n_atoms[b], token = batch->atom_start[b] + b;
        batch->atom_start[b + 1] = batch->atom_start[b] + n;
        batch->pair_start[b + 1] = batch->pair_start[b] + n * n;
        batch->square_start[b + 1] = batch->square_start[b] + (n + 1) * (n + 1);
        for (idx t = token; t <= token + n; t++) batch->molecule[t] = b;
    }
    if (!batch->reader) batch->readers = thread_count();
    if (!batch->reader) batch->reader = xmalloc(batch->readers, sizeof *batch->reader);
}

// Copies a molecule into place b of a batch that has been laid out, and finds its relations.
static void batch_set(Batch *batch, idx b, const Molecule *m) {
    View v = batch_view(batch, b);
    memcpy(batch->atom_feat + v.atom * ATOM_FEATURES, m->atom_feat, v.N * ATOM_FEATURES);
    batch->has_pos[b] = m->has_pos != 0;
    memset(batch->pos + 3 * v.atom, 0, 3 * v.N * sizeof(float));
    memset(batch->noise + 3 * v.atom, 0, 3 * v.N * sizeof(float));
    if (m->has_pos) memcpy(batch->pos + 3 * v.atom, m->pos, 3 * v.N * sizeof(float));
    for (idx y = 0; y < batch->Y; y++) batch->labels[b * batch->Y + y] = m->labels[y];
    relations(batch->spd + v.pair, batch->path + v.pair * PATH_BONDS, batch->degree + v.atom, m);
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

// The name of molecule b in a draw.
static uint32_t draws_slot(const Draws *draws, idx b) { return draws->first_slot + b; }

// Uses the same relations for every pair and atom of molecule b (fine-tuning, --no-blend): `use` is
// a set of USE_ bits; 3D only where there are positions.
static void batch_use(Batch *batch, idx b, int use) {
    View v = batch_view(batch, b);
    if (!batch->has_pos[b]) use &= ~USE_3D;
    memset(batch->pair_use + v.pair, use, v.N * v.N);
    memset(batch->atom_use + v.atom, use, v.N);
}

// Draws the relation of every pair, the structure of every atom, and the noise of molecule b. A
// molecule without positions has 2D only, with the probabilities renormalised.
static void batch_draw(Batch *batch, idx b, const Blend *blend, const Draws *draws) {
    View v = batch_view(batch, b);
    int has_pos = batch->has_pos[b];
    uint32_t slot = draws_slot(draws, b), step = draws->step;
    double spd = blend->pair_spd, edge = spd + blend->pair_edge;
    double total = edge + (has_pos ? blend->pair_3d : 0);
    double atom_2d = blend->atom_2d / (blend->atom_2d + blend->atom_3d);
    for (idx k = 0; k < v.N * v.N; k++) {
        double u = (double)rng_uniform(draws->seed, RNG_BLEND, step, slot, k) * total;
        batch->pair_use[v.pair + k] = u < spd ? USE_SPD : u < edge || !has_pos ? USE_EDGE : USE_3D;
    }
    for (idx i = 0; i < v.N; i++) {
        double u = (double)rng_uniform(draws->seed, RNG_FEATURE, step, slot, i);
        batch->atom_use[v.atom + i] = u < atom_2d || !has_pos ? USE_SPD : USE_3D;
    }
    if (blend->all) batch_use(batch, b, USE_SPD | USE_EDGE | USE_3D);
    for (idx k = 0; has_pos && k < 3 * v.N; k++)
        batch->noise[3 * v.atom + k] =
            (float)blend->noise * rng_normal(draws->seed, RNG_NOISE, step, slot, k);
}

// Is the ordered pair counted in the 3D loss? Not if the atoms coincide, as i = j does.
static int dir_counts(const float *pos, idx i, idx j) {
    const float *p = pos + 3 * i, *q = pos + 3 * j;
    return p[0] != q[0] || p[1] != q[1] || p[2] != q[2];
}

// Class of a pair in the SPD head, or -1: not counted.
static int8_t spd_class(int spd) {
    if (spd < 1 || spd >= SPD_UNREACHABLE) return -1;
    return spd <= 10 ? spd - 1 : 10;
}

// Class of a path slot in the edge head, or -1: not counted. Code = 12 type + 2 stereo + conj;
// that of an empty slot, PATH_NONE, has type 5.
static int8_t edge_class(int code) {
    int type = code / 12, stereo = code / 2 % 6, conjugated = code % 2;
    if (type >= 4 || stereo >= 3) return -1;
    return 6 * type + 2 * stereo + conjugated;
}

// What follows for every pair of molecule b: distance and direction, of the noised positions; and
// classes that the heads must say, whichever relation it shows. Ethanol, pair (0, 2): SPD class 1
// (two bonds), edge classes 0 and 0 (single bonds), three empty slots. (The 3D head's target, the
// clean direction pos_2 - pos_0, is not stored: direction_losses().)
static void batch_pairs(Batch *batch, idx b) {
    View v = batch_view(batch, b);
    idx plane = v.N * v.N;
    const float *pos = batch->pos + 3 * v.atom, *noise = batch->noise + 3 * v.atom;
    batch->dir_pairs[b] = 0;
    for (idx ij = 0; ij < plane; ij++) {
        idx i = ij / v.N, j = ij % v.N, pair = v.pair + ij;
        float d[3], square = 0;
        for (int k = 0; k < 3; k++) {
            d[k] = (pos[3 * j + k] + noise[3 * j + k]) - (pos[3 * i + k] + noise[3 * i + k]);
            square += d[k] * d[k];
        }
        batch->distance[pair] = sqrtf(square);
        for (int k = 0; k < 3; k++)
            batch->direction[3 * v.pair + k * plane + ij] = d[k] / (sqrtf(square) + DIRECTION_EPS);
        batch->spd_target[pair] = spd_class(batch->spd[pair]);
        for (idx k = pair * PATH_BONDS; k < (pair + 1) * PATH_BONDS; k++)
            batch->edge_target[k] = edge_class(batch->path[k]);
        batch->dir_pairs[b] += batch->has_pos[b] && dir_counts(pos, i, j);
    }
}

// Does the atom count in the denoising loss?
static int noise_counts(const Batch *batch, const View *v, idx i) {
    return batch->has_pos[v->b] && (batch->atom_use[v->atom + i] & USE_3D);
}

// What is known once all molecules are set: the rows of 3D pairs, and what the losses are means of.
static void batch_count(Batch *batch) {
    double *count = batch->count;
    batch->Q = 0;
    for (int k = 0; k < LOSSES; k++) count[k] = 0;
    for (idx p = 0; p < batch->P; p++) {
        batch->pair_row[p] = batch->pair_use[p] & USE_3D ? batch->Q++ : -1;
        count[LOSS_SPD] += batch->spd_target[p] >= 0;
        for (idx e = 0; e < PATH_BONDS; e++)
            count[LOSS_EDGE] += batch->edge_target[p * PATH_BONDS + e] >= 0;
    }
    for (idx k = 0; k < batch->B * batch->Y; k++)  // fine-tuning has but this one
        count[LOSS_TOTAL] += !isnan(batch->labels[k]);
    for (idx b = 0; b < batch->B; b++) {
        View v = batch_view(batch, b);
        count[LOSS_3D] += batch->dir_pairs[b] > 0;
        for (idx i = 0; i < v.N; i++) count[LOSS_NOISE] += noise_counts(batch, &v, i) != 0;
    }
}

// Reads molecules ids[0..B) of a dataset into a batch: relations drawn according to `blend`, or if
// that is NULL the fixed set `use`. Dies if a record is damaged, naming the first one.
static void batch_load(Batch *batch, const Dataset *data, const uint32_t *ids, idx B,
                       const Blend *blend, int use, const Draws *draws) {
    idx bad = B;  // first molecule that cannot be read
    int *n_atoms = xmalloc(B, sizeof *n_atoms);
    for (idx b = 0; b < B; b++) n_atoms[b] = dataset_atoms(data, ids[b]);
    batch_layout(batch, B, n_atoms);
    free(n_atoms);
#pragma omp parallel for schedule(dynamic) reduction(min : bad)
    for (idx b = 0; b < B; b++) {
        Molecule *m = &batch->reader[thread_id()];
        if (dataset_try(data, ids[b], m)) {
            bad = min_idx(bad, b);
            continue;
        }
        batch_set(batch, b, m);
        if (blend) batch_draw(batch, b, blend, draws);
        else batch_use(batch, b, use);
        batch_pairs(batch, b);
    }
    if (bad < B) dataset_read(data, ids[bad], &batch->reader[0]);  // dies
    batch_count(batch);
}

// =================================================================================================
// 3 Parameters. One table names every tensor: it makes the structs, the arena, the initialisation,
//   the optimiser's reach, the checkpoint and the tests. Gradients and the two Adam moments are
//   arenas of the same layout. Official names and shapes, quirks included, are those of the
//   release's state dict, so that PyTorch loads our checkpoints: where one product computes what
//   the release has in several tensors, our tensor is theirs, row after row, and {q,k,v} in its
//   name stands for theirs (of two such lists the last one runs fastest).
//
//   The tables, of which a batch uses few rows, come first, up to gauss_bias: their gradients are
//   zeroed in every step, as most are added to row by row; those of other tensors are stored whole.
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

// X(field, official name, rows, columns, initial values: section 9); rows = 0: a vector of
// `columns` numbers.
#define LINEAR(X, field, name, rows, columns)                                                      \
    X(field##_w, name ".weight", rows, columns, INIT_NORMAL)                                       \
    X(field##_b, name ".bias", 0, rows, INIT_ZERO)

#define NORM(X, field, name, columns)                                                              \
    X(field##_w, name ".weight", 0, columns, INIT_ONE)                                             \
    X(field##_b, name ".bias", 0, columns, INIT_ZERO)

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
    NORM(X, embed_norm, "emb_layer_norm", C)

#define LAYER_TENSORS(X)                                                                           \
    LINEAR(X, qkv, "layers.%d.self_attn.{q,k,v}_proj", 3 * C, C)                                   \
    LINEAR(X, out, "layers.%d.self_attn.out_proj", C, C)                                           \
    NORM(X, norm1, "layers.%d.self_attn_layer_norm", C)                                            \
    LINEAR(X, ffn1, "layers.%d.fc1", F, C)                                                         \
    LINEAR(X, ffn2, "layers.%d.fc2", C, F)                                                         \
    NORM(X, norm2, "layers.%d.final_layer_norm", C)

#define PRETRAIN_TENSORS(X)                                                                        \
    LINEAR(X, pair_maps, "blend_{spd,edge,3d}_pred_head.transform_n2_head.{row,column}_head",      \
           PAIR_MAPS * R, C)                                                                       \
    NORM(X, pair_norm, "blend_{spd,edge,3d}_pred_head.transform_n2_head.{row,column}_LayerNorm",   \
         PAIR_MAPS * R)                                                                            \
    LINEAR(X, spd, "blend_spd_pred_head.linear", SPD_CLASSES, R *R)                                \
    LINEAR(X, edge, "blend_edge_pred_head.linear_map_feature", EDGE_OUTPUTS, R *R)                 \
    LINEAR(X, dir, "blend_3d_pred_head.linear", DIR_INNER, R *R)                                   \
    LINEAR(X, dir_axes, "blend_3d_pred_head.force_proj{1,2,3}", 3, DIR_INNER)                      \
    LINEAR(X, denoise_qkv, "atom_proc.{q,k,v}_proj", 3 * C, C)                                     \
    LINEAR(X, denoise_axes, "atom_proc.force_proj{1,2,3}", 3, C)

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

typedef struct {
    Config config;
    struct TensorInfo *info;  // (n_tensors) those of the release, see section 9
    int n_tensors;
    idx count;            // parameters in all
    idx table_count;      // those of the tables, at the front
    float *params, *grads, *m, *v;  // arenas; the last three are NULL without training
    Tensors p, g;         // pointers into params and grads
} Model;

// Rates of the model's random regularisers; no rate holds in evaluation (draws.active = 0).
typedef struct {
    double attention, activation, path, embedding;  // path: of the last layer, rising from 0
} Dropout;

typedef struct { double weight[LOSSES]; } LossWeights;  // weight[LOSS_TOTAL] is not used

// All that one training step touches. What a section computes stands in arrays of its own, which
// it lists.
typedef struct {
    Model model;
    Batch batch;
    Draws draws;
    Dropout drop;
    LossWeights weights;
    struct bias *bias;           // section 5
    struct enc *enc;             // section 6
    struct heads *heads;         // section 7
    struct task_arrays *task_arrays;  // of fine-tuning (commands/head.h)
    float *logits[LOSSES];       // a relation head's outputs go there too, if not NULL
} Step;

// The letters, for the functions that follow: dimensions; and what they are about.
#define DIMENSIONS(s)                                                                              \
    const idx B = (s)->batch.B, T = (s)->batch.T, A = (s)->batch.A, P = (s)->batch.P;              \
    const idx Q = (s)->batch.Q, SS = (s)->batch.SS, L = (s)->model.config.layers;                  \
    const idx C = (s)->model.config.dim, F = (s)->model.config.ffn, H = (s)->model.config.heads;   \
    const idx G = (s)->model.config.kernels, Y = (s)->model.config.tasks, D = C / H;               \
    enum { R = PAIR_WIDTH, E = PATH_BONDS };                                                       \
    (void)B, (void)T, (void)A, (void)P, (void)Q, (void)SS, (void)L, (void)C, (void)F, (void)H;     \
    (void)G, (void)Y, (void)D
#define LETTERS(s)                                                                                 \
    DIMENSIONS(s);                                                                                 \
    const Batch *batch = &(s)->batch;                                                              \
    const Tensors *p = &(s)->model.p, *g = &(s)->model.g;                                          \
    (void)batch, (void)p, (void)g

// =================================================================================================
// 4 Layers, forward and backward, on top of five functions in which a training step spends its
//   time. lib/fast.h has them for vector units; these are their definitions, what a port starts
//   from (-DPLAIN_C builds with them).
// =================================================================================================

enum { BLOCKS = 64 };  // Philox blocks made at once

#ifndef PLAIN_C
#include "lib/fast.h"  // the five, faster; VEC, floats in a vector
#else
enum { VEC = 1 };

static inline float exp_fast(float x) { return expf(x); }

// Distribution function of the standard normal, and its density.
static inline float normal_cdf(float x, float *density) {
    *density = 0.398942280f * expf(-0.5f * x * x);
    return 0.5f * erfcf(-0.707106781f * x);
}

// C (M, N) = A (M, K) @ B (K, N), + C if `add`, else + bias (N) on every row if that is not NULL.
// trans_a: A is stored as (K, M); trans_b: B as (N, K). lda ...: row strides. rounded(): lib/bf16.h
static void gemm(int trans_a, int trans_b, idx M, idx N, idx K, const float *A, idx lda,
                 const float *B, idx ldb, const float *bias, int add, float *C, idx ldc) {
#pragma omp parallel for schedule(static)
    for (idx i = 0; i < M; i++) {
        for (idx j = 0; j < N && !add; j++) C[i * ldc + j] = bias ? bias[j] : 0;
        for (idx k = 0; k < K; k++)
            for (idx j = 0; j < N; j++)
                C[i * ldc + j] += rounded(trans_a ? A[k * lda + i] : A[i * lda + k]) *
                                  rounded(trans_b ? B[j * ldb + k] : B[k * ldb + j]);
    }
}

// out (m, n) = a (m, K) @ b (K, n) for the small matrices of one molecule, by one thread. Element
// (r, k) of a stands at r * a_row + k * a_col. n is padded(), so rows of b and out are whole
// vectors.
static void small_product(float *out, idx ldo, const float *a, idx a_row, idx a_col, const float *b,
                          idx ldb, idx m, idx n, idx K) {
    for (idx r = 0; r < m; r++) {
        memset(out + r * ldo, 0, n * sizeof *out);
        for (idx k = 0; k < K; k++)
            for (idx j = 0; j < n; j++)
                out[r * ldo + j] += a[r * a_row + k * a_col] * b[k * ldb + j];
    }
}

// words (4, BLOCKS): philox() of `count` counters, `first`, `first` + 1, ...
static void philox_blocks(uint32_t words[4][BLOCKS], int count, Philox first, uint64_t key) {
    for (int k = 0; k < count; k++, first.word[0]++) {
        Philox block = philox(first, key);
        for (int w = 0; w < 4; w++) words[w][k] = block.word[w];
    }
}
#endif

static idx padded(idx n) { return (n + VEC - 1) / VEC * VEC; }  // to whole vectors

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

// x (n) = softmax of x (n), in place. Returns the largest x, and the sum of exp(x - largest).
typedef struct { float top, sum; } LogSum;
static LogSum softmax_row(float *x, idx n) {
    float top = x[0], sum = 0;
#ifndef __clang__  // clang 14 cannot vectorise a maximum, and warns when asked to
#pragma omp simd reduction(max : top)
#endif
    for (idx j = 0; j < n; j++) top = x[j] > top ? x[j] : top;
#pragma omp simd reduction(+ : sum)
    for (idx j = 0; j < n; j++) {
        x[j] = exp_fast(x[j] - top);
        sum += x[j];
    }
    float inverse = 1.0f / sum;
#pragma omp simd
    for (idx j = 0; j < n; j++) x[j] *= inverse;
    return (LogSum){top, sum};
}

// out (n) = sum over the rows of x (rows, n), in order; threads share out the columns.
static void column_sums(float *out, const float *x, idx ldx, idx rows, idx n) {
    enum { STRIP = 64 };
#pragma omp parallel for schedule(static)
    for (idx c0 = 0; c0 < n; c0 += STRIP) {
        float sum[STRIP] = {0};
        idx width = min_idx(STRIP, n - c0);
        for (idx r = 0; r < rows; r++) {
            const float *x_r = x + r * ldx + c0;
            for (idx c = 0; c < width; c++) sum[c] += x_r[c];
        }
        memcpy(out + c0, sum, width * sizeof *sum);
    }
}

// ---- linear: out (rows, OC) = x (rows, IC) @ weight (OC, IC)^T + bias (OC)

static void linear_forward(float *out, const float *x, const float *weight, const float *bias,
                           idx rows, idx IC, idx OC) {
    gemm(0, 1, rows, OC, IC, x, IC, weight, IC, bias, 0, out, OC);
}

// dweight = dout^T x, dbias = column sums of dout; dx (may be NULL) = dout weight, + dx if add_dx.
// A weight is used once in a step: its gradient is stored.
static void linear_backward(float *dx, int add_dx, float *dweight, float *dbias, const float *dout,
                            const float *x, const float *weight, idx rows, idx IC, idx OC) {
    gemm(1, 0, OC, IC, rows, dout, OC, x, IC, NULL, 0, dweight, IC);
    column_sums(dbias, dout, OC, rows, OC);
    if (dx) gemm(0, 0, rows, IC, OC, dout, OC, weight, IC, NULL, add_dx, dx, IC);
}

// ---- gelu, element by element

static void gelu_forward(float *out, const float *x, idx n) {
#pragma omp parallel for simd schedule(static)
    for (idx k = 0; k < n; k++) out[k] = gelu(x[k]);
}

// d (n), the gradient of out, becomes that of x.
static void gelu_backward(float *d, const float *x, idx n) {
#pragma omp parallel for simd schedule(static)
    for (idx k = 0; k < n; k++) d[k] *= gelu_slope(x[k]);  // forward: out = gelu(x)
}

// ---- dropout: out = mask * x, the same in both passes; masks are drawn again, not kept

// mask (n): 0 with probability p, else 1 / (1 - p), named (purpose, slot, row); all ones without
// dropout. Number k is word k / blocks of Philox block k mod blocks.
static void dropout_row(float *mask, idx n, double p, const Draws *draws, uint32_t purpose,
                        uint32_t slot, uint32_t row) {
    int blocks = (int)(n + 3) / 4;
    uint32_t limit = (uint32_t)(p * 4294967296.0), words[4][BLOCKS];
    float keep = 1.0 / (1.0 - p);
    if (!draws->active || p <= 0) blocks = 0;
    for (idx k = 0; k < n && !blocks; k++) mask[k] = 1.0f;
    for (int first = 0; first < blocks; first += BLOCKS) {
        int count = min_int(BLOCKS, blocks - first);
        uint32_t index = row * (uint32_t)blocks + (uint32_t)first;
        philox_blocks(words, count, (Philox){{index, slot, draws->step, purpose}}, draws->seed);
        for (int w = 0; w < 4; w++) {
            idx at = w * blocks + first, end = min_idx(count, n - at);
#pragma omp simd
            for (idx k = 0; k < end; k++) mask[at + k] = words[w][k] < limit ? 0.0f : keep;
        }
    }
}

// Rows of x (T, n), or of its gradient: x = mask * x.
static void dropout_rows(float *x, const Step *s, idx n, double p, uint32_t purpose) {
    if (!s->draws.active || p <= 0) return;
#pragma omp parallel for schedule(static)
    for (idx t = 0; t < s->batch.T; t++) {
        View v = batch_view(&s->batch, s->batch.molecule[t]);
        float *mask = take(scratch_begin(), n), *x_t = x + t * n;
        dropout_row(mask, n, p, &s->draws, purpose, draws_slot(&s->draws, v.b),
                    t - v.token);
        for (idx c = 0; c < n; c++) x_t[c] *= mask[c];
    }
}

// ---- residual connection: sum (T, C) = x + scale * branch, with DropPath: a molecule loses its
//      branch with probability p, which rises linearly from 0 in the first layer to drop.path

// Scale of molecule b's branch, the `second` one of layer l or the first: 0 with probability p,
// else 1 / (1 - p).
static float droppath_scale(const Step *s, idx l, int second, idx b) {
    idx L = s->model.config.layers;
    double p = L > 1 ? s->drop.path * l / (L - 1) : 0.0;
    if (!s->draws.active || p <= 0) return 1.0f;
    float u = rng_uniform(s->draws.seed, RNG_PATH_DROP + l, s->draws.step,
                          draws_slot(&s->draws, b), second);
    return (double)u < p ? 0.0f : (float)(1.0 / (1.0 - p));
}

static void residual_forward(float *sum, const float *x, const float *branch, const Step *s, idx l,
                             int second) {
    idx C = s->model.config.dim;
#pragma omp parallel for schedule(static)
    for (idx t = 0; t < s->batch.T; t++) {
        float scale = droppath_scale(s, l, second, s->batch.molecule[t]);
        for (idx c = t * C; c < (t + 1) * C; c++) sum[c] = x[c] + scale * branch[c];
    }
}

// dbranch from dsum, which is also dx.
static void residual_backward(float *dbranch, const float *dsum, const Step *s, idx l, int second) {
    idx C = s->model.config.dim;
#pragma omp parallel for schedule(static)
    for (idx t = 0; t < s->batch.T; t++) {
        float scale = droppath_scale(s, l, second, s->batch.molecule[t]);
        for (idx c = t * C; c < (t + 1) * C; c++)
            dbranch[c] = scale * dsum[c];  // forward: sum = x + scale * branch
    }
}

// ---- LayerNorm: hat = (x - mean(x)) / sqrt(variance(x) + eps), out = hat * weight + bias, for
//      rows of n numbers that stand ld apart

#define NORM_EPS 1e-5f        // of the encoder
#define PAIR_NORM_EPS 1e-12f  // of the pair maps

// hat and rstd (rows), 1 / sqrt(variance + eps), are kept for the backward pass.
static void norm_forward(float *out, float *hat, float *rstd, const float *x, idx ld,
                         const float *weight, const float *bias, idx rows, idx n, float eps) {
#pragma omp parallel for schedule(static)
    for (idx r = 0; r < rows; r++) {
        const float *x_r = x + r * ld;
        float *out_r = out + r * ld, *hat_r = hat + r * ld, sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
        for (idx c = 0; c < n; c++) sum += x_r[c];
        float mean = sum / n;
#pragma omp simd reduction(+ : square)
        for (idx c = 0; c < n; c++) square += (x_r[c] - mean) * (x_r[c] - mean);
        float scale = rstd[r] = 1.0f / sqrtf(square / n + eps);
#pragma omp simd
        for (idx c = 0; c < n; c++) {
            hat_r[c] = (x_r[c] - mean) * scale;
            out_r[c] = hat_r[c] * weight[c] + bias[c];
        }
    }
}

// dx = rstd * (dhat - mean(dhat) - hat * mean(dhat * hat)), dhat = dout * weight; dweight and dbias
// are stored: sums over the rows, by way of sums over NORM_ROWS rows each.
static void norm_backward(float *dx, float *dweight, float *dbias, const float *dout,
                          const float *hat, const float *rstd, idx ld, const float *weight,
                          idx rows, idx n) {
    enum { NORM_ROWS = 32 };
    idx chunks = (rows + NORM_ROWS - 1) / NORM_ROWS;
    float *parts = take(scratch_begin(), chunks * 2 * n);
#pragma omp parallel for schedule(static)
    for (idx chunk = 0; chunk < chunks; chunk++) {
        float *dw = parts + chunk * 2 * n, *db = dw + n;
        memset(dw, 0, 2 * n * sizeof *dw);
        for (idx r = chunk * NORM_ROWS; r < min_idx((chunk + 1) * NORM_ROWS, rows); r++) {
            const float *dout_r = dout + r * ld, *hat_r = hat + r * ld;
            float *dx_r = dx + r * ld, sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
            for (idx c = 0; c < n; c++) {
                float dhat = dout_r[c] * weight[c];
                sum += dhat;
                product += dhat * hat_r[c];
                dw[c] += dout_r[c] * hat_r[c];  // forward: out = hat * weight + bias
                db[c] += dout_r[c];
            }
            float mean = sum / n, slope = product / n, scale = rstd[r];
#pragma omp simd
            for (idx c = 0; c < n; c++)  // forward: hat = (x - mean) * rstd
                dx_r[c] = scale * (dout_r[c] * weight[c] - mean - hat_r[c] * slope);
        }
    }
    column_sums(dweight, parts, 2 * n, chunks, n);
    column_sums(dbias, parts + n, 2 * n, chunks, n);
}

// =================================================================================================
// 5 From relation to attention bias (paper 3.1, 3.2). All three relations of a pair become H
//   numbers, one a head: b_spd a row of a table, b_edge a mean over the bonds of the path, b_3d a
//   small network on Gaussians of the distance. bias[h][1 + i][1 + j] is that of the relation the
//   pair drew (the sum of all that it uses), and is added to the attention scores of every layer
//   and of the denoising head.
//
//   Ethanol, pair (0, 2), head h. It drew the path: (path_bias[0][0] + path_bias[1][0]) / 2, of
//   [slot][bond code]; had it drawn its length: spd_table[2 + 1]; its distance: bias3d_out[its row]
//   (of each, number h). Back: dattn_bias[h][1][3], halved, is added to these two of dpath_bias; or
//   to row 3 of g->spd_table; or becomes that of dbias3d_out. The others were not in this bias
//   and get no gradient from it. (Two other ways are open to all pairs: an atom that shows its 3D
//   structure sums Gaussians over all of its pairs, the denoising head weighs all directions.)
// =================================================================================================

#define BIAS_ARRAYS(X)                                                                             \
    X(path_bias, E, BOND_CODES, H)   /* b_edge share of a slot's bond */                           \
    X(bond_vector, BOND_CODES, H)    /* of every bond code */                                      \
    X(gauss_const, 3, G)             /* mean, 1 / s, 1 / (sqrt(2 pi) s) */                         \
    X(gauss_sum, A, G)               /* sum over j of g(i, j) */                                   \
    X(gauss, Q, G)                   /* g of the pairs that use 3D */                              \
    X(bias3d_pre, Q, G)                                                                            \
    X(bias3d_hidden, Q, G)                                                                         \
    X(bias3d_out, Q, H)                                                                            \
    X(structure3d, A, C)                                                                           \
    X(attn_bias, SS, H)              /* (H, S, S) of a molecule after the other */                 \
    X(dattn_bias, SS, H)             /* of all layers and the denoising head, which zeroes it */   \
    X(dpath_bias, E, BOND_CODES, H)                                                                \
    X(dbond_vector, BOND_CODES, H)                                                                 \
    X(dgauss_const, A, 2, G)         /* an atom's share of d mean, d s */                          \
    X(dgauss_x, P)                   /* of a pair's Gaussian argument */                           \
    X(dgauss_sum, A, G)                                                                            \
    X(dgauss, Q, G)                                                                                \
    X(dbias3d_hidden, Q, G)                                                                        \
    X(dbias3d_out, Q, H)                                                                           \
    X(dstructure3d, A, C)

ARRAYS(bias, BIAS_ARRAYS)

// ---- edge paths (paper 3.1): b_edge(i, j) = sum over slots e of path_bias[e][code_e], divided by
//      the number of bonds, at most 5. path_bias[e][code] = bond_vector[code] @ map_e, and
//      bond_vector[code] = mean over the bond features f of bond_table[3 + 512 f + value_f]: a
//      table of the few vectors that a slot can contribute (edge_encoder, edge_dis_encoder).

// Rows of bond_table of a bond code.
static void bond_rows(idx row[BOND_FEATURES], int code) {
    const int value[BOND_FEATURES] = {code / 12, code / 2 % 6, code % 2};
    for (int f = 0; f < BOND_FEATURES; f++)
        row[f] = BOND_ROW_OFFSET + FEATURE_ROWS * f + value[f];
}

static void path_bias_forward(Step *s) {
    LETTERS(s);
    struct bias *a = s->bias;
    memset(a->bond_vector, 0, BOND_CODES * H * sizeof(float));
    for (int code = 0; code < PATH_NONE; code++) {
        idx row[BOND_FEATURES];
        bond_rows(row, code);
        for (int f = 0; f < BOND_FEATURES; f++)
            for (idx h = 0; h < H; h++)
                a->bond_vector[code * H + h] += p->bond_table[row[f] * H + h] / BOND_FEATURES;
    }
    for (idx e = 0; e < E; e++)  // (60, H) = (60, H) @ map_e (H, H)
        gemm(0, 0, BOND_CODES, H, H, a->bond_vector, H, p->path_maps + e * H * H, H, NULL, 0,
             a->path_bias + e * BOND_CODES * H, H);
}

// From dpath_bias (E, 60, H) to the gradients of bond_table and path_maps.
static void path_bias_backward(Step *s) {
    LETTERS(s);
    struct bias *a = s->bias;
    for (idx e = 0; e < E; e++) {  // forward: path_bias[e] = bond_vector @ map_e
        const float *dout = a->dpath_bias + e * BOND_CODES * H;
        gemm(1, 0, H, H, PATH_NONE, a->bond_vector, H, dout, H, NULL, 0,
             g->path_maps + e * H * H, H);
        gemm(0, 1, PATH_NONE, H, H, dout, H, p->path_maps + e * H * H, H, NULL, e > 0,
             a->dbond_vector, H);
    }
    for (int code = 0; code < PATH_NONE; code++) {
        idx row[BOND_FEATURES];
        bond_rows(row, code);
        for (int f = 0; f < BOND_FEATURES; f++)  // forward: bond_vector = mean of three rows
            for (idx h = 0; h < H; h++)
                g->bond_table[row[f] * H + h] += a->dbond_vector[code * H + h] /
                                                         BOND_FEATURES;
    }
}

// ---- Gaussians (molecule_3d_bias.gbf): g_k(i, j) = exp(-0.5 z^2) / (sqrt(2 pi) s_k),
//      z = (x - mean_k) / s_k, s = |std| + 0.01,
//      x = (mul[u] + mul[v]) * distance + bias[u] + bias[v], rows u and v by the elements of i, j

#define GAUSS_PI 3.14159f      // the release's truncated pi
#define GAUSS_STD_MIN 1e-2f
#define GAUSS_FAR 174.0f       // z^2 beyond which exp(-0.5 z^2) is no normal float: taken as 0

// x of a pair of atoms, and the rows u and v.
static float gauss_argument(idx row[2], const Step *s, idx i, idx j, idx pair) {
    const Tensors *p = &s->model.p;
    row[0] = s->batch.atom_feat[i * ATOM_FEATURES] + GAUSS_ROW_OFFSET;
    row[1] = s->batch.atom_feat[j * ATOM_FEATURES] + GAUSS_ROW_OFFSET + FEATURE_ROWS;
    return (p->gauss_mul[row[0]] + p->gauss_mul[row[1]]) * s->batch.distance[pair] +
           (p->gauss_bias[row[0]] + p->gauss_bias[row[1]]);
}

// g (G) of x; constants (3, G).
ALWAYS_INLINE void gauss_row_forward(float *restrict g, float x, const float *restrict constants,
                                     idx G) {
    const float *mean = constants, *inverse = mean + G, *height = inverse + G;
#pragma omp simd
    for (idx k = 0; k < G; k++) {
        float z = (x - mean[k]) * inverse[k];
        g[k] = exp_fast(-0.5f * z * z) * height[k];
    }
}

// From dg (G), adds to dmean and ds (G); returns dx. dg/dx = -z g / s, dg/ds = (z^2 - 1) g / s.
ALWAYS_INLINE float gauss_row_backward(float *restrict dmean, float *restrict ds,
                                       const float *restrict dg, float x,
                                       const float *restrict constants, idx G) {
    const float *mean = constants, *inverse = mean + G, *height = inverse + G;
    float dx = 0;
#pragma omp simd reduction(+ : dx)
    for (idx k = 0; k < G; k++) {
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
    LETTERS(s);
    struct bias *a = s->bias;
    for (idx k = 0; k < G; k++) {
        float width = fabsf(p->gauss_std[k]) + GAUSS_STD_MIN;
        a->gauss_const[k] = p->gauss_mean[k];
        a->gauss_const[G + k] = 1.0f / width;
        a->gauss_const[2 * G + k] = 1.0f / (sqrtf(2.0f * GAUSS_PI) * width);
    }
#pragma omp parallel for schedule(dynamic)
    for (idx b = 0; b < B; b++) {
        View v = batch_view(batch, b);
        idx pair = v.pair, end = v.atom + v.N, rows[2];
        float *unused = take(scratch_begin(), G);  // g of a pair that is part of the sum only
        for (idx i = v.atom; i < end; i++) {
            float *sum = a->gauss_sum + i * G;
            int summed = batch->atom_use[i] & USE_3D;
            memset(sum, 0, G * sizeof *sum);
            for (idx j = v.atom; j < end; j++, pair++) {
                idx row = batch->pair_row[pair];
                if (row < 0 && !summed) continue;
                float *out = row < 0 ? unused : a->gauss + row * G;
                gauss_row_forward(out, gauss_argument(rows, s, i, j, pair), a->gauss_const, G);
                for (idx k = 0; summed && k < G; k++) sum[k] += out[k];
            }
        }
    }
}

// From dgauss_sum (A, G) and dgauss (Q, G) to the gradients of gauss_mean, _std, _mul, _bias.
static void gauss_backward(Step *s) {
    LETTERS(s);
    struct bias *a = s->bias;
#pragma omp parallel for schedule(dynamic)
    for (idx b = 0; b < B; b++) {
        View v = batch_view(batch, b);
        idx pair = v.pair, end = v.atom + v.N, rows[2];
        float *dg = take(scratch_begin(), G);
        for (idx i = v.atom; i < end; i++) {
            float *dmean = a->dgauss_const + i * 2 * G, *ds = dmean + G;
            const float *dsum = a->dgauss_sum + i * G;
            int summed = batch->atom_use[i] & USE_3D;
            memset(dmean, 0, 2 * G * sizeof *dmean);
            for (idx j = v.atom; j < end; j++, pair++) {
                idx row = batch->pair_row[pair];
                a->dgauss_x[pair] = 0;
                if (row < 0 && !summed) continue;
                const float *drow = a->dgauss + max_idx(row, 0) * G;
                for (idx k = 0; k < G; k++)  // forward: g is the pair's row, and part of the sum
                    dg[k] = (summed ? dsum[k] : 0.0f) + (row >= 0 ? drow[k] : 0.0f);
                float x = gauss_argument(rows, s, i, j, pair);
                a->dgauss_x[pair] = gauss_row_backward(dmean, ds, dg, x, a->gauss_const, G);
            }
        }
    }
    for (idx b = 0; b < B; b++) {  // few additions, so in order by one thread
        View v = batch_view(batch, b);
        idx pair = v.pair, end = v.atom + v.N, row[2];
        for (idx i = v.atom; i < end; i++)
            for (idx j = v.atom; j < end; j++, pair++) {
                gauss_argument(row, s, i, j, pair);
                for (int k = 0; k < 2; k++) {  // forward: x = (mul[u] + mul[v]) * distance + ...
                    g->gauss_mul[row[k]] += a->dgauss_x[pair] * batch->distance[pair];
                    g->gauss_bias[row[k]] += a->dgauss_x[pair];
                }
            }
    }
    column_sums(g->gauss_mean, a->dgauss_const, 2 * G, A, G);
    column_sums(g->gauss_std, a->dgauss_const + G, 2 * G, A, G);
    for (idx k = 0; k < G; k++)  // forward: s = |std| + 0.01; the slope at 0 is 0, as in PyTorch
        g->gauss_std[k] *= (p->gauss_std[k] > 0) - (p->gauss_std[k] < 0);
}

// ---- b_3d = W2 gelu(W1 g + c1) + c2 of the pairs that use 3D: bias3d_out (Q, H), and the 3D
//      structure of every atom: structure3d (A, C) = W gauss_sum + c

static void bias3d_forward(Step *s) {
    LETTERS(s);
    struct bias *a = s->bias;
    gauss_forward(s);
    linear_forward(a->bias3d_pre, a->gauss, p->bias3d1_w, p->bias3d1_b, Q, G, G);
    gelu_forward(a->bias3d_hidden, a->bias3d_pre, Q * G);
    linear_forward(a->bias3d_out, a->bias3d_hidden, p->bias3d2_w, p->bias3d2_b, Q, G, H);
    linear_forward(a->structure3d, a->gauss_sum, p->structure3d_w, p->structure3d_b, A, G, C);
}

// From dbias3d_out (Q, H) and dstructure3d (A, C).
static void bias3d_backward(Step *s) {
    LETTERS(s);
    struct bias *a = s->bias;
    linear_backward(a->dgauss_sum, 0, g->structure3d_w, g->structure3d_b, a->dstructure3d,
                    a->gauss_sum, p->structure3d_w, A, G, C);
    linear_backward(a->dbias3d_hidden, 0, g->bias3d2_w, g->bias3d2_b, a->dbias3d_out,
                    a->bias3d_hidden, p->bias3d2_w, Q, G, H);
    gelu_backward(a->dbias3d_hidden, a->bias3d_pre, Q * G);
    linear_backward(a->dgauss, 0, g->bias3d1_w, g->bias3d1_b, a->dbias3d_hidden, a->gauss,
                    p->bias3d1_w, Q, G, G);
    gauss_backward(s);
}

// ---- the blended bias: bias[h][1 + i][1 + j] = the relations that the pair uses;
//      bias[h][0][*] = bias[h][*][0] = graph_bias[h]

// What a path's slots are weighted with.
static float path_weight(int spd) { return 1.0f / max_int(1, min_int(spd, PATH_BONDS)); }

static void bias_forward(Step *s) {
    LETTERS(s);
    const struct bias *a = s->bias;
#pragma omp parallel for schedule(dynamic)
    for (idx b = 0; b < B; b++) {
        View v = batch_view(batch, b);
        idx pair = v.pair, plane = v.S * v.S;
        float *bias = a->attn_bias + H * v.square, out[MAX_HEADS];
        for (idx h = 0; h < H; h++)
            for (idx t = 0; t < v.S; t++)
                bias[h * plane + t] = bias[h * plane + t * v.S] = p->graph_bias[h];
        for (idx ij = 0; ij < v.N * v.N; ij++, pair++) {
            int use = batch->pair_use[pair], spd = batch->spd[pair];
            const uint8_t *path = batch->path + pair * E;
            const float *row3d = a->bias3d_out + max_idx(batch->pair_row[pair], 0) * H;
            for (idx h = 0; h < H; h++) out[h] = use & USE_3D ? row3d[h] : 0.0f;
            for (idx h = 0; use & USE_SPD && h < H; h++) out[h] += p->spd_table[(spd + 1) * H + h];
            for (idx e = 0; use & USE_EDGE && e < E && path[e] != PATH_NONE; e++)
                for (idx h = 0; h < H; h++)
                    out[h] += path_weight(spd) * a->path_bias[(e * BOND_CODES + path[e]) * H + h];
            float *at = bias + (1 + ij / v.N) * v.S + 1 + ij % v.N;
            for (idx h = 0; h < H; h++) at[h * plane] = out[h];
        }
    }
}

// From dattn_bias to dbias3d_out (Q, H), dpath_bias and gradients of spd_table and graph_bias. A
// thread takes a head and sums into arrays of its own, since neighbouring heads share cache lines
// of the tables. Each line undoes the one of bias_forward() that adds the same relation.
static void bias_backward(Step *s) {
    LETTERS(s);
#pragma omp parallel for schedule(dynamic)
    for (idx h = 0; h < H; h++) {
        float dspd[SPD_ROWS] = {0}, dpath[PATH_BONDS * BOND_CODES] = {0}, dgraph = 0;
        for (idx b = 0; b < B; b++) {
            View v = batch_view(batch, b);
            idx pair = v.pair;
            const float *dbias = s->bias->dattn_bias + H * v.square + h * v.S * v.S;
            for (idx j = 0; j < v.S; j++) dgraph += dbias[j];
            for (idx i = 1; i < v.S; i++) dgraph += dbias[i * v.S];
            for (idx ij = 0; ij < v.N * v.N; ij++, pair++) {  // forward: see bias_forward()
                float d = dbias[(1 + ij / v.N) * v.S + 1 + ij % v.N];
                int use = batch->pair_use[pair], spd = batch->spd[pair];
                const uint8_t *path = batch->path + pair * E;
                if (use & USE_3D) s->bias->dbias3d_out[batch->pair_row[pair] * H + h] = d;
                if (use & USE_SPD) dspd[spd + 1] += d;
                for (idx e = 0; use & USE_EDGE && e < E && path[e] != PATH_NONE; e++)
                    dpath[e * BOND_CODES + path[e]] += path_weight(spd) * d;
            }
        }
        g->graph_bias[h] = dgraph;
        for (idx k = 0; k < SPD_ROWS; k++) g->spd_table[k * H + h] = dspd[k];
        for (idx k = 0; k < E * BOND_CODES; k++) s->bias->dpath_bias[k * H + h] = dpath[k];
    }
}

// =================================================================================================
// 6 Tokens (paper 3.1) and the encoder: layers with the norm behind the sum,
//     mid = LN1(x + droppath(Wo attention(x))),  x' = LN2(mid + droppath(W2 gelu(W1 mid)))
//   What the backward pass needs is kept, but for dropout's masks, which are drawn again.
// =================================================================================================

#define ENCODER_ARRAYS(X)                                                                          \
    X(tokens, T, C)                  /* sums of embedding rows */                                  \
    X(embed_hat, T, C)                                                                             \
    X(embed_rstd, T)                                                                               \
    X(x, L + 1, T, C)                /* input of every layer, and the encoder's output */          \
    X(qkv, L, T, 3, C)                                                                             \
    X(prob, L, SS, H)                /* attention probabilities before dropout, (H, S, S) each */  \
    X(context, L, T, C)              /* heads side by side */                                      \
    X(branch, T, C)                                                                                \
    X(sum, T, C)                                                                                   \
    X(norm1_hat, L, T, C)                                                                          \
    X(norm1_rstd, L, T)                                                                            \
    X(mid, L, T, C)                  /* between attention and feed-forward */                      \
    X(ffn_pre, L, T, F)                                                                            \
    X(ffn_hidden, L, T, F)                                                                         \
    X(norm2_hat, L, T, C)                                                                          \
    X(norm2_rstd, L, T)                                                                            \
    X(dx, T, C)                                                                                    \
    X(dsum, T, C)                                                                                  \
    X(dbranch, T, C)                                                                               \
    X(dhidden, T, F)                                                                               \
    X(dcontext, T, C)                                                                              \
    X(dqkv, T, 3, C)                                                                               \
    X(dtokens, T, C)

ARRAYS(enc, ENCODER_ARRAYS)

// (T, C) what comes out of the encoder, the last of x.
static float *encoder_output(const Step *s) {
    return s->enc->x + s->model.config.layers * s->batch.T * s->model.config.dim;
}

// ---- tokens: x = LayerNorm(sum of embedding rows). An atom's rows are those of its nine features
//      and, if it shows its 2D structure, of its degree (twice); one that shows its 3D structure
//      adds 0.01 * structure3d; the graph token has one row of its own

#define STRUCTURE_SCALE 0.01f
enum { TOKEN_ROWS = ATOM_FEATURES + 2 };

// Offsets in an arena, of parameters or gradients, of the rows that token t sums, and how many.
// scale: of its atom's structure3d, 0 if it adds none; *atom: which one that is.
static int token_rows(idx at[TOKEN_ROWS], float *scale, idx *atom, const Step *s, idx t) {
    const Model *m = &s->model;
    const Batch *batch = &s->batch;
    int n = 0;
    idx C = m->config.dim, i = *atom = t - batch->molecule[t] - 1;
    *scale = 0;
    if (is_graph_token(batch, t)) {
        at[n++] = m->p.graph_token - m->params;
        return n;
    }
    const uint8_t *feature = batch->atom_feat + i * ATOM_FEATURES;
    for (idx k = 0; k < ATOM_FEATURES; k++)
        at[n++] = m->p.atom_table - m->params +
                  (ATOM_ROW_OFFSET + FEATURE_ROWS * k + feature[k]) * C;
    if (batch->atom_use[i] & USE_3D) *scale = STRUCTURE_SCALE;
    if (batch->atom_use[i] & USE_SPD) {
        at[n++] = m->p.in_degree - m->params + (batch->degree[i] + 1) * C;
        at[n++] = m->p.out_degree - m->params + (batch->degree[i] + 1) * C;
    }
    return n;
}

static void embedding_forward(Step *s) {
    LETTERS(s);
    struct enc *a = s->enc;
    const Model *m = &s->model;
#pragma omp parallel for schedule(static)
    for (idx t = 0; t < T; t++) {
        idx at[TOKEN_ROWS], atom;
        float *token = a->tokens + t * C, scale;
        int rows = token_rows(at, &scale, &atom, s, t);
        memset(token, 0, C * sizeof *token);
        for (int r = 0; r < rows; r++)
            for (idx c = 0; c < C; c++) token[c] += m->params[at[r] + c];
        for (idx c = 0; scale > 0 && c < C; c++)
            token[c] += scale * s->bias->structure3d[atom * C + c];
    }
    norm_forward(a->x, a->embed_hat, a->embed_rstd, a->tokens, C, m->p.embed_norm_w,
                 m->p.embed_norm_b, T, C, NORM_EPS);
}

// From dx (T, C) to the embedding tables and dstructure3d (A, C). Threads share out the channels,
// so each table row is summed in the order of the atoms.
static void embedding_backward(Step *s) {
    enum { STRIP = 64 };
    LETTERS(s);
    struct enc *a = s->enc;
    Model *m = &s->model;
    norm_backward(a->dtokens, m->g.embed_norm_w, m->g.embed_norm_b, a->dx, a->embed_hat,
                  a->embed_rstd, C, m->p.embed_norm_w, T, C);
#pragma omp parallel for schedule(static)
    for (idx c0 = 0; c0 < C; c0 += STRIP) {
        idx width = min_idx(STRIP, C - c0);
        for (idx t = 0; t < T; t++) {
            idx at[TOKEN_ROWS], atom;
            float scale;
            int rows = token_rows(at, &scale, &atom, s, t);
            const float *d = a->dtokens + t * C + c0;
            for (int r = 0; r < rows; r++)  // forward: token += row
                for (idx c = 0; c < width; c++) m->grads[at[r] + c0 + c] += d[c];
            if (is_graph_token(batch, t)) continue;
            float *dstructure = s->bias->dstructure3d + atom * C + c0;
            for (idx c = 0; c < width; c++)  // forward: token += scale * structure3d
                dstructure[c] = scale * d[c];
        }
    }
}

// ---- attention of one molecule and head: prob = softmax(q k^T / sqrt(D) + bias),
//      out = dropped v, dropped = mask * prob. A task reads (n, D) slices of a (T, 3 C) matrix and
//      works in its thread's scratch on copies whose rows are padded to whole vectors.

#define SCORE_MASK (-1e30f)  // score of a lane past the end of a row: its exp is 0

typedef struct {
    idx b, n, D, C;          // molecule, tokens, channels of the head and of a token
    idx qkv, context;        // where its slices begin in (T, 3, C) and (T, C) matrices
    idx prob;                // where its matrix (n, n) begins in prob
    idx bias, bias_row;      // and in attn_bias and dattn_bias; row length there
    uint32_t purpose, head;  // name of the mask
} HeadTask;

// Head h of molecule b; the denoising head sees the atoms only (`atoms` = 1): its part of the bias
// is what stands behind the row and the column of the graph token.
static HeadTask head_task(const Step *s, idx b, idx h, int atoms, uint32_t purpose) {
    LETTERS(s);
    View v = batch_view(batch, b);
    idx n = v.S - atoms, first = v.token + atoms, bias = H * v.square + h * v.S * v.S;
    return (HeadTask){.b = b, .n = n, .D = D, .C = C, .qkv = first * 3 * C + h * D,
                      .context = first * C + h * D, .prob = H * v.square + h * n * n,
                      .bias = bias + atoms * (v.S + 1), .bias_row = v.S, .purpose = purpose,
                      .head = h};
}

// prob and dropped (n, n), from qkv, the slices that begin with the task's q.
static void attention_prob_forward(float *prob, float *dropped, const Step *s, const float *qkv,
                                   const HeadTask *task, Scratch *scratch) {
    idx n = task->n, W = padded(n);
    const float *q = qkv, *k = qkv + task->C;
    float *kt = take(scratch, task->D * W), *score = take(scratch, n * W);
    float *mask = take(scratch, n * n), scale = 1.0f / sqrtf(task->D);
    copy_transposed(kt, W, k, 3 * task->C, n, task->D);
    small_product(score, W, q, 3 * task->C, 1, kt, W, n, W, task->D);  // q k^T
    dropout_row(mask, n * n, s->drop.attention, &s->draws, task->purpose,
                draws_slot(&s->draws, task->b), task->head);
    for (idx i = 0; i < n; i++) {
        float *score_i = score + i * W;
        const float *bias_i = s->bias->attn_bias + task->bias + i * task->bias_row;
        for (idx j = 0; j < n; j++) score_i[j] = score_i[j] * scale + bias_i[j];
        for (idx j = n; j < W; j++) score_i[j] = SCORE_MASK;
        softmax_row(score_i, W);
        for (idx j = 0; j < n; j++) {
            prob[i * n + j] = score_i[j];
            dropped[i * n + j] = score_i[j] * mask[i * n + j];
        }
    }
}

// dscore (n, W), holding the gradient of dropped, W = padded(n), becomes that of the scores, and is
// added to dattn_bias; dropped (n, n) is made again.
static void attention_prob_backward(float *dscore, float *dropped, Step *s, const float *prob,
                                    const HeadTask *task, Scratch *scratch) {
    idx n = task->n, W = padded(n);
    float *mask = take(scratch, n * n), *prob_i = take(scratch, W);
    dropout_row(mask, n * n, s->drop.attention, &s->draws, task->purpose,
                draws_slot(&s->draws, task->b), task->head);
    memset(prob_i, 0, W * sizeof *prob_i);
    for (idx i = 0; i < n; i++) {
        float *d = dscore + i * W, sum = 0;
        float *dbias_i = s->bias->dattn_bias + task->bias + i * task->bias_row;
        for (idx j = 0; j < n; j++) {
            prob_i[j] = prob[i * n + j];
            dropped[i * n + j] = prob_i[j] * mask[i * n + j];
            d[j] *= mask[i * n + j];               // forward: dropped = mask * prob
        }
#pragma omp simd reduction(+ : sum)
        for (idx j = 0; j < W; j++) sum += d[j] * prob_i[j];
        for (idx j = 0; j < n; j++) {
            d[j] = prob_i[j] * (d[j] - sum);       // forward: prob = softmax(score + bias)
            dbias_i[j] += d[j];
        }
    }
}

// dq and dk, slices of dqkv like q and k, from dscore (n, W).
static void attention_qk_backward(float *dqkv, const float *dscore, const float *qkv,
                                  const HeadTask *task, Scratch *scratch) {
    idx n = task->n, W = padded(n), D = task->D, width = padded(D), stride = 3 * task->C;
    float *in = take(scratch, n * width), *out = take(scratch, n * width);
    float scale = 1.0f / sqrtf(D);
    for (int side = 0; side < 2; side++) {  // forward: score = q k^T / sqrt(D)
        copy_padded(in, width, qkv + (side ? 0 : task->C), stride, n, D);
        if (side == 0) small_product(out, width, dscore, W, 1, in, width, n, width, n);  // dscore k
        else small_product(out, width, dscore, 1, W, in, width, n, width, n);  // dscore^T q
        for (idx i = 0; i < n; i++)
            for (idx d = 0; d < D; d++)
                dqkv[i * stride + side * task->C + d] = scale * out[i * width + d];
    }
}

// context (T, C) and prob of layer l from its qkv (T, 3, C).
static void attention_forward(Step *s, idx l) {
    LETTERS(s);
    struct enc *a = s->enc;
#pragma omp parallel for schedule(dynamic, 4)
    for (idx bh = 0; bh < B * H; bh++) {
        HeadTask task = head_task(s, bh / H, bh % H, 0, RNG_ATTENTION_DROP + l);
        idx n = task.n, width = padded(D);
        Scratch *scratch = scratch_begin();
        const float *qkv = a->qkv + l * T * 3 * C + task.qkv;
        float *context = a->context + l * T * C + task.context;
        float *dropped = take(scratch, n * n), *v = take(scratch, n * width);
        float *out = take(scratch, n * width);
        attention_prob_forward(a->prob + l * SS * H + task.prob, dropped, s, qkv, &task, scratch);
        copy_padded(v, width, qkv + 2 * C, 3 * C, n, D);
        small_product(out, width, dropped, n, 1, v, width, n, width, n);
        for (idx i = 0; i < n; i++) memcpy(context + i * C, out + i * width, D * sizeof *out);
    }
}

// From dcontext (T, C) to dqkv (T, 3, C); dattn_bias is added to.
static void attention_backward(Step *s, idx l) {
    LETTERS(s);
    struct enc *a = s->enc;
#pragma omp parallel for schedule(dynamic, 4)
    for (idx bh = 0; bh < B * H; bh++) {
        HeadTask task = head_task(s, bh / H, bh % H, 0, RNG_ATTENTION_DROP + l);
        idx n = task.n, W = padded(n), width = padded(D);
        Scratch *scratch = scratch_begin();
        const float *qkv = a->qkv + l * T * 3 * C + task.qkv;
        const float *dcontext = a->dcontext + task.context;
        float *dqkv = a->dqkv + task.qkv, *dscore = take(scratch, n * W);
        float *dropped = take(scratch, n * n), *vt = take(scratch, D * W);
        float *dout = take(scratch, n * width), *dv = take(scratch, n * width);
        copy_transposed(vt, W, qkv + 2 * C, 3 * C, n, D);
        small_product(dscore, W, dcontext, C, 1, vt, W, n, W, D);  // ddropped = dout v^T
        attention_prob_backward(dscore, dropped, s, a->prob + l * SS * H + task.prob, &task,
                                scratch);
        copy_padded(dout, width, dcontext, C, n, D);
        small_product(dv, width, dropped, 1, n, dout, width, n, width, n);  // dv = dropped^T dout
        for (idx i = 0; i < n; i++)
            memcpy(dqkv + i * 3 * C + 2 * C, dv + i * width, D * sizeof *dv);
        attention_qk_backward(dqkv, dscore, qkv, &task, scratch);
    }
}

// From x[l] (T, C) to x[l + 1].
static void layer_forward(Step *s, idx l) {
    LETTERS(s);
    struct enc *a = s->enc;
    const LayerTensors *w = &p->layer[l];
    const float *x = a->x + l * T * C;
    float *context = a->context + l * T * C, *mid = a->mid + l * T * C;
    float *pre = a->ffn_pre + l * T * F, *hidden = a->ffn_hidden + l * T * F;
    linear_forward(a->qkv + l * T * 3 * C, x, w->qkv_w, w->qkv_b, T, C, 3 * C);
    attention_forward(s, l);
    linear_forward(a->branch, context, w->out_w, w->out_b, T, C, C);
    residual_forward(a->sum, x, a->branch, s, l, 0);
    norm_forward(mid, a->norm1_hat + l * T * C, a->norm1_rstd + l * T, a->sum, C, w->norm1_w,
                 w->norm1_b, T, C, NORM_EPS);
    linear_forward(pre, mid, w->ffn1_w, w->ffn1_b, T, C, F);
    gelu_forward(hidden, pre, T * F);
    dropout_rows(hidden, s, F, s->drop.activation, RNG_ACTIVATION_DROP + l);
    linear_forward(a->branch, hidden, w->ffn2_w, w->ffn2_b, T, F, C);
    residual_forward(a->sum, mid, a->branch, s, l, 1);
    norm_forward(a->x + (l + 1) * T * C, a->norm2_hat + l * T * C, a->norm2_rstd + l * T, a->sum, C,
                 w->norm2_w, w->norm2_b, T, C, NORM_EPS);
}

// dx, the gradient of x[l + 1], becomes that of x[l].
static void layer_backward(Step *s, idx l) {
    LETTERS(s);
    struct enc *a = s->enc;
    const LayerTensors *w = &p->layer[l], *dw = &g->layer[l];
    const float *x = a->x + l * T * C, *context = a->context + l * T * C;
    const float *mid = a->mid + l * T * C, *pre = a->ffn_pre + l * T * F;
    const float *hidden = a->ffn_hidden + l * T * F;
    float *dmid = a->dsum;  // a sum's gradient is that of its first term, to which more is added
    // forward: x' = LN2(mid + droppath(ffn2(hidden))), hidden = dropout(gelu(ffn1(mid)))
    norm_backward(a->dsum, dw->norm2_w, dw->norm2_b, a->dx, a->norm2_hat + l * T * C,
                  a->norm2_rstd + l * T, C, w->norm2_w, T, C);
    residual_backward(a->dbranch, a->dsum, s, l, 1);
    linear_backward(a->dhidden, 0, dw->ffn2_w, dw->ffn2_b, a->dbranch, hidden, w->ffn2_w, T, F, C);
    dropout_rows(a->dhidden, s, F, s->drop.activation, RNG_ACTIVATION_DROP + l);
    gelu_backward(a->dhidden, pre, T * F);
    linear_backward(dmid, 1, dw->ffn1_w, dw->ffn1_b, a->dhidden, mid, w->ffn1_w, T, C, F);
    // forward: mid = LN1(x + droppath(out(attention(qkv(x)))))
    norm_backward(a->dx, dw->norm1_w, dw->norm1_b, dmid, a->norm1_hat + l * T * C,
                  a->norm1_rstd + l * T, C, w->norm1_w, T, C);
    residual_backward(a->dbranch, a->dx, s, l, 0);
    linear_backward(a->dcontext, 0, dw->out_w, dw->out_b, a->dbranch, context, w->out_w, T, C, C);
    attention_backward(s, l);
    linear_backward(a->dx, 1, dw->qkv_w, dw->qkv_b, a->dqkv, x, w->qkv_w, T, C, 3 * C);
}

// From the batch to the output x (T, C).
static void encoder_forward(Step *s) {
    bias_layout(s);
    enc_layout(s);
    path_bias_forward(s);
    bias3d_forward(s);
    bias_forward(s);
    embedding_forward(s);
    dropout_rows(s->enc->x, s, s->model.config.dim, s->drop.embedding, RNG_EMBED_DROP);
    for (idx l = 0; l < s->model.config.layers; l++) layer_forward(s, l);
}

// From dx, the gradient of x, to those of the encoder's parameters. dattn_bias holds what the
// heads have added to it. The gradients of the tables must have been zeroed.
static void encoder_backward(Step *s) {
    for (idx l = s->model.config.layers - 1; l >= 0; l--) layer_backward(s, l);
    dropout_rows(s->enc->dx, s, s->model.config.dim, s->drop.embedding, RNG_EMBED_DROP);
    embedding_backward(s);
    bias_backward(s);
    path_bias_backward(s);
    bias3d_backward(s);
}

// =================================================================================================
// 7 Heads and losses (paper 3.3). Three relation heads see every ordered pair of atoms through the
//   outer product of two 32-vectors, r of atom i and c of atom j; the denoising head is an
//   attention over the atoms. A head's loss and gradient are computed while its outputs are still
//   in cache. Linear maps run over all tokens; the graph tokens have no loss and no gradient.
// =================================================================================================

#define WIDEST padded(EDGE_OUTPUTS)  // outputs of the largest relation head
#define HEADS_ARRAYS(X)                                                                            \
    X(pair_pre, T, PAIR_MAPS, R)                                                                   \
    X(pair_gelu, T, PAIR_MAPS, R)                                                                  \
    X(pair_hat, T, PAIR_MAPS, R)                                                                   \
    X(pair_rstd, PAIR_MAPS, T)                                                                     \
    X(pair_map, T, PAIR_MAPS, R)     /* r and c of the three relation heads */                     \
    X(pair_weight, R, R, WIDEST)     /* a head's map: W[a][b][k] */                                \
    X(pair_u, T, R, WIDEST)          /* U of every token; rows of K */                             \
    X(dir_weight, 3, R, R)           /* the 3D head's four maps as one */                          \
    X(denoise_qkv, T, 3, C)                                                                        \
    X(denoise_prob, SS, H)           /* (H, N, N) of a molecule at the place of its (H, S, S) */   \
    X(denoise_out, A, 3)                                                                           \
    X(dpair_pre, T, PAIR_MAPS, R)                                                                  \
    X(dpair_map, T, PAIR_MAPS, R)                                                                  \
    X(dpair_weight, R, R, WIDEST)                                                                  \
    X(dpair_u, T, R, WIDEST)                                                                       \
    X(dpair_bias, A, WIDEST)                                                                       \
    X(ddir_weight, 3, R, R)                                                                        \
    X(ddenoise_qkv, T, 3, C)                                                                       \
    X(ddenoise_force, T, 3, H)                                                                     \
    X(ddenoise_out, A, 3)

ARRAYS(heads, HEADS_ARRAYS)

// Gradient of the total loss by a sum of single losses: the weight over what counts.
static double loss_scale(const Step *s, int loss) {
    return s->weights.weight[loss] / fmax(s->batch.count[loss], 1);
}

// Cross-entropy of one softmax over n classes, log(sum(exp(x))) - x[target]: x (n) becomes its
// gradient times scale. target < 0: not counted.
static double cross_entropy(float *x, idx n, int target, double scale) {
    if (target < 0) {
        for (idx k = 0; k < n; k++) x[k] = 0;
        return 0;
    }
    double logit = (double)x[target];
    LogSum all = softmax_row(x, n);
    x[target] -= 1.0f;
    for (idx k = 0; k < n; k++) x[k] *= (float)scale;
    return (double)all.top + log((double)all.sum) - logit;
}

#define COSINE_EPS 1e-8

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
    LETTERS(s);
    const idx width = PAIR_MAPS * R;
    struct heads *a = s->heads;
    linear_forward(a->pair_pre, encoder_output(s), p->pair_maps_w, p->pair_maps_b, T, C, width);
    gelu_forward(a->pair_gelu, a->pair_pre, T * width);
    for (idx k = 0; k < PAIR_MAPS; k++)
        norm_forward(a->pair_map + k * R, a->pair_hat + k * R, a->pair_rstd + k * T,
                     a->pair_gelu + k * R, width, p->pair_norm_w + k * R,
                     p->pair_norm_b + k * R, T, R, PAIR_NORM_EPS);
}

// From dpair_map (T, 6, R); stores dx.
static void pair_maps_backward(Step *s) {
    LETTERS(s);
    struct heads *a = s->heads;
    for (idx k = 0; k < PAIR_MAPS; k++)
        norm_backward(a->dpair_pre + k * R, g->pair_norm_w + k * R, g->pair_norm_b + k * R,
                      a->dpair_map + k * R, a->pair_hat + k * R, a->pair_rstd + k * T,
                      PAIR_MAPS * R, p->pair_norm_w + k * R, T, R);
    gelu_backward(a->dpair_pre, a->pair_pre, T * PAIR_MAPS * R);
    linear_backward(s->enc->dx, 0, g->pair_maps_w, g->pair_maps_b, a->dpair_pre, encoder_output(s),
                    p->pair_maps_w, T, C, PAIR_MAPS * R);
}

// ---- a relation head: logits(i, j)[k] = weight[k] . vec(r_i c_j^T) + bias[k]. A linear map of an
//      outer product is bilinear, so the 1024-vectors are never formed, which saves 31/32 of the
//      arithmetic. With W[a][b][k] = weight[k][32 a + b], six equations, forward and back:
//
//        (1) U_i[b][k]        = sum over a of r_i[a] W[a][b][k]              once for an atom i
//        (2) logits(i, j)[k]  = sum over b of c_j[b] U_i[b][k] + bias[k]     once for a pair
//        (3) dU_i[b][k]       = sum over j of c_j[b] dlogits(i, j)[k]
//        (4) dc_j[b]         += sum over k of U_i[b][k] dlogits(i, j)[k]
//        (5) dr_i[a]          = sum over b, k of dU_i[b][k] W[a][b][k]
//        (6) dW[a][b][k]      = sum over i of r_i[a] dU_i[b][k]

typedef struct {
    int loss;                // LOSS_SPD, LOSS_EDGE or LOSS_3D
    idx outputs, slots;      // of a pair; a softmax a slot, 0: the output is a direction
    idx map;                 // r is pair map `map`, c the next one
    const int8_t *target;    // (P, slots) classes
    const float *weight;     // (outputs, R * R)
    const float *bias;       // (outputs)
    float *dweight, *dbias;  // stored; NULL: forward only
} PairHead;

// Losses of the pairs (i, 0..N-1) of a molecule by their classes. logits (N, width) become their
// gradients.
static double class_losses(float *logits, idx width, const Step *s, const PairHead *head,
                           const View *v, idx i) {
    double loss = 0, scale = loss_scale(s, head->loss);
    idx classes = head->outputs / head->slots;
    for (idx j = 0; j < v->N; j++)
        for (idx e = 0; e < head->slots; e++)
            loss += cross_entropy(logits + j * width + e * classes, classes,
                                  head->target[(v->pair + i * v->N + j) * head->slots + e], scale);
    return loss;
}

// The same by their directions, divided by the molecule's number of pairs that count.
static double direction_losses(float *logits, idx width, const Step *s, const View *v, idx i) {
    const float *pos = s->batch.pos + 3 * v->atom;
    double loss = 0, pairs = fmax(s->batch.dir_pairs[v->b], 1);
    for (idx j = 0; j < v->N; j++) {
        int counts = s->batch.has_pos[v->b] && dir_counts(pos, i, j);
        float d[3];
        for (int k = 0; k < 3; k++) d[k] = pos[3 * j + k] - pos[3 * i + k];
        loss += cosine_loss(logits + j * width, d, counts, loss_scale(s, LOSS_3D) / pairs) / pairs;
    }
    return loss;
}

// One molecule, equations (2) to (4): row_loss of its atoms; dpair_u, dpair_bias, and dc in
// dpair_map, if head->dweight.
static void pair_head_molecule(Step *s, const PairHead *head, idx b) {
    enum { R = PAIR_WIDTH, STRIDE = PAIR_MAPS * PAIR_WIDTH };
    struct heads *a = s->heads;
    View v = batch_view(&s->batch, b);
    idx N = v.N, K = padded(head->outputs), first = v.token + 1;
    Scratch *scratch = scratch_begin();
    float *logits = take(scratch, N * K), *ut = take(scratch, R * K), *dc = take(scratch, N * R);
    float *part = take(scratch, N * R);
    const float *c = a->pair_map + first * STRIDE + (head->map + 1) * R;
    memset(dc, 0, N * R * sizeof *dc);
    memset(a->dpair_u + v.token * R * K, 0, R * K * sizeof(float));  // of the graph token
    for (idx i = 0; i < N; i++) {
        const float *U = a->pair_u + (first + i) * R * K;
        float *dU = a->dpair_u + (first + i) * R * K, *dbias = a->dpair_bias + (v.atom + i) * K;
        small_product(logits, K, c, STRIDE, 1, U, K, N, K, R);                               // (2)
        for (idx j = 0; j < N; j++)
            for (idx k = 0; k < head->outputs; k++) logits[j * K + k] += head->bias[k];
        for (idx j = 0; j < N && s->logits[head->loss]; j++)
            memcpy(s->logits[head->loss] + (v.pair + i * N + j) * head->outputs, logits + j * K,
                   head->outputs * sizeof *logits);
        s->batch.row_loss[v.atom + i] = head->slots ? class_losses(logits, K, s, head, &v, i)
                                                    : direction_losses(logits, K, s, &v, i);
        if (!head->dweight) continue;
        const float *dlogits = logits;
        small_product(dU, K, c, 1, STRIDE, dlogits, K, R, K, N);                             // (3)
        copy_transposed(ut, R, U, K, R, head->outputs);
        small_product(part, R, dlogits, K, 1, ut, R, N, R, head->outputs);                   // (4)
        for (idx k = 0; k < N * R; k++) dc[k] += part[k];
        memset(dbias, 0, K * sizeof *dbias);
        for (idx j = 0; j < N; j++)  // forward: logits = ... + bias
            for (idx k = 0; k < K; k++) dbias[k] += dlogits[j * K + k];
    }
    for (idx j = 0; j < N && head->dweight; j++)
        memcpy(a->dpair_map + (first + j) * STRIDE + (head->map + 1) * R, dc + j * R,
               R * sizeof *dc);
}

// Sum of a relation head's losses; its gradients, and those of its pair maps, if head->dweight.
static double pair_head(Step *s, const PairHead *head) {
    enum { STRIDE = PAIR_MAPS * PAIR_WIDTH, RR = PAIR_WIDTH * PAIR_WIDTH };
    LETTERS(s);
    struct heads *a = s->heads;
    const float *r = a->pair_map + head->map * R;
    float *dr = a->dpair_map + head->map * R, sums[EDGE_OUTPUTS + 64];  // the largest K
    idx K = padded(head->outputs);
#pragma omp parallel for schedule(static)
    for (idx ab = 0; ab < RR; ab++)  // W[a][b][k] = weight[k][32 a + b]
        for (idx k = 0; k < K; k++)
            a->pair_weight[ab * K + k] = k < head->outputs ? head->weight[k * RR + ab] : 0.0f;
    gemm(0, 0, T, R * K, R, r, STRIDE, a->pair_weight, R * K, NULL, 0, a->pair_u, R * K);    // (1)
#pragma omp parallel for schedule(dynamic)
    for (idx b = 0; b < B; b++) pair_head_molecule(s, head, b);
    double loss = 0;
    for (idx i = 0; i < A; i++) loss += batch->row_loss[i];
    if (!head->dweight) return loss;
    gemm(0, 1, T, R, R * K, a->dpair_u, R * K, a->pair_weight, R * K, NULL, 0, dr, STRIDE);  // (5)
    gemm(1, 0, R, R * K, T, r, STRIDE, a->dpair_u, R * K, NULL, 0, a->dpair_weight, R * K);  // (6)
#pragma omp parallel for schedule(static)
    for (idx k = 0; k < head->outputs; k++)
        for (idx ab = 0; ab < RR; ab++)
            head->dweight[k * RR + ab] = a->dpair_weight[ab * K + k];
    column_sums(sums, a->dpair_bias, K, A, K);
    memcpy(head->dbias, sums, head->outputs * sizeof *sums);
    return loss;
}

// ---- the 3D head's four maps as one: no non-linearity stands between linear (1024 -> 256) and the
//      three axes (256 -> 1), so weight (3, 1024) = axes (3, 256) @ dir_w, and
//      bias (3) = axes @ dir_b + axes_b

static void dir_compose(Step *s, float bias[3]) {
    enum { RR = PAIR_WIDTH * PAIR_WIDTH };
    const Tensors *p = &s->model.p;
    gemm(0, 0, 3, RR, DIR_INNER, p->dir_axes_w, DIR_INNER, p->dir_w, RR, NULL, 0,
         s->heads->dir_weight, RR);
    for (int k = 0; k < 3; k++) {
        bias[k] = p->dir_axes_b[k];
        for (int u = 0; u < DIR_INNER; u++)
            bias[k] += p->dir_axes_w[k * DIR_INNER + u] * p->dir_b[u];
    }
}

// From ddir_weight (3, 1024) and dbias to the gradients of the factors.
static void dir_split(Step *s, const float dbias[3]) {
    enum { RR = PAIR_WIDTH * PAIR_WIDTH };
    const Tensors *p = &s->model.p;
    Tensors *g = &s->model.g;
    const float *dweight = s->heads->ddir_weight;  // forward: weight = axes @ dir_w
    gemm(1, 0, DIR_INNER, RR, 3, p->dir_axes_w, DIR_INNER, dweight, RR, NULL, 0, g->dir_w, RR);
    gemm(0, 1, 3, DIR_INNER, RR, dweight, RR, p->dir_w, RR, NULL, 0, g->dir_axes_w, DIR_INNER);
    for (int u = 0; u < DIR_INNER; u++) {
        g->dir_b[u] = 0;
        for (int k = 0; k < 3; k++) {  // forward: bias = axes @ dir_b + axes_b
            g->dir_b[u] += dbias[k] * p->dir_axes_w[k * DIR_INNER + u];
            g->dir_axes_w[k * DIR_INNER + u] += dbias[k] * p->dir_b[u];
        }
    }
    for (int k = 0; k < 3; k++) g->dir_axes_b[k] = dbias[k];
}

// ---- the denoising head (atom_proc): out_a(i) = w_a . y_a(i) + b_a, y_a(i) = sum over heads and j
//      of P(i, j) direction(i, j)[a] v_j. With force_a(j) = w_a . v_j (a head's channels), no y is
//      needed: out_a(i) = b_a + sum over h, j of P(i, j) direction(i, j)[a] force_a(j).

// force (3, N) of a task.
static void denoise_force(float *force, const Step *s, const HeadTask *task) {
    LETTERS(s);
    const float *value = s->heads->denoise_qkv + task->qkv + 2 * C;
    for (idx axis = 0; axis < 3; axis++) {
        const float *w = p->denoise_axes_w + axis * C + task->head * D;
        for (idx j = 0; j < task->n; j++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (idx d = 0; d < D; d++) sum += w[d] * value[j * 3 * C + d];
            force[axis * task->n + j] = sum;
        }
    }
}

// denoise_out (A, 3): a task a molecule, its heads in order.
static void denoise_forward(Step *s) {
    LETTERS(s);
    struct heads *a = s->heads;
    linear_forward(a->denoise_qkv, encoder_output(s), p->denoise_qkv_w, p->denoise_qkv_b, T, C,
                   3 * C);
#pragma omp parallel for schedule(dynamic)
    for (idx b = 0; b < B; b++) {
        View v = batch_view(batch, b);
        idx N = v.N;
        float *out = a->denoise_out + 3 * v.atom;
        for (idx k = 0; k < 3 * N; k++) out[k] = p->denoise_axes_b[k % 3];
        for (idx h = 0; h < H; h++) {
            HeadTask task = head_task(s, b, h, 1, RNG_DENOISE_DROP);
            Scratch *scratch = scratch_begin();
            float *dropped = take(scratch, N * N), *force = take(scratch, 3 * N);
            attention_prob_forward(a->denoise_prob + task.prob, dropped, s,
                                   a->denoise_qkv + task.qkv, &task, scratch);
            denoise_force(force, s, &task);
            const float *direction = batch->direction + 3 * v.pair;
            for (idx axis = 0; axis < 3; axis++)
                for (idx i = 0; i < N; i++, direction += N) {
                    float sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (idx j = 0; j < N; j++)
                        sum += dropped[i * N + j] * direction[j] * force[axis * N + j];
                    out[3 * i + axis] += sum;
                }
        }
    }
}

// Sum of 1 - cos(out, noise) over the atoms that count; ddenoise_out (A, 3) is its gradient.
static double denoise_loss(Step *s) {
    LETTERS(s);
    float *dout = s->heads->ddenoise_out;
    double loss = 0;
    memcpy(dout, s->heads->denoise_out, 3 * A * sizeof *dout);
    for (idx b = 0; b < B; b++) {
        View v = batch_view(batch, b);
        for (idx i = 0; i < v.N; i++) {
            idx at = 3 * (v.atom + i);
            loss += cosine_loss(dout + at, batch->noise + at, noise_counts(batch, &v, i),
                                loss_scale(s, LOSS_NOISE));
        }
    }
    return loss;
}

// One molecule: from ddenoise_out to dattn_bias, ddenoise_force (T, 3, H), dq and dk.
static void denoise_backward_molecule(Step *s, idx b) {
    LETTERS(s);
    struct heads *a = s->heads;
    View v = batch_view(batch, b);
    idx N = v.N, W = padded(N);
    const float *dout = a->ddenoise_out + 3 * v.atom;
    memset(a->ddenoise_qkv + v.token * 3 * C, 0, 3 * C * sizeof(float));  // of the graph token
    for (idx h = 0; h < H; h++) {
        HeadTask task = head_task(s, b, h, 1, RNG_DENOISE_DROP);
        Scratch *scratch = scratch_begin();
        float *dscore = take(scratch, N * W), *dropped = take(scratch, N * N);
        float *force = take(scratch, 3 * N), *dforce = take(scratch, 3 * N);
        const float *direction = batch->direction + 3 * v.pair;
        denoise_force(force, s, &task);
        memset(dscore, 0, N * W * sizeof *dscore);
        memset(dforce, 0, 3 * N * sizeof *dforce);
        for (idx axis = 0; axis < 3; axis++)  // forward: out = sum of dropped * direction * force
            for (idx i = 0; i < N; i++, direction += N)
                for (idx j = 0; j < N; j++)
                    dscore[i * W + j] += dout[3 * i + axis] * force[axis * N + j] * direction[j];
        attention_prob_backward(dscore, dropped, s, a->denoise_prob + task.prob, &task, scratch);
        direction = batch->direction + 3 * v.pair;
        for (idx axis = 0; axis < 3; axis++)
            for (idx i = 0; i < N; i++, direction += N)
                for (idx j = 0; j < N; j++)
                    dforce[axis * N + j] += dout[3 * i + axis] * dropped[i * N + j] * direction[j];
        for (idx axis = 0; axis < 3; axis++)
            for (idx j = 0; j < N; j++)
                a->ddenoise_force[((v.token + 1 + j) * 3 + axis) * H + h] = dforce[axis * N + j];
        attention_qk_backward(a->ddenoise_qkv + task.qkv, dscore, a->denoise_qkv + task.qkv, &task,
                              scratch);
    }
}

// Head h's part of force_a(j) = w_a . v_j: dw_a = sum over atoms of dforce_a(j) v_j, and
// dv_j = sum over a of dforce_a(j) w_a.
static void denoise_force_backward(Step *s, idx h) {
    LETTERS(s);
    const float *w = p->denoise_axes_w + h * D;
    float *dw = g->denoise_axes_w + h * D;
    for (idx axis = 0; axis < 3; axis++) memset(dw + axis * C, 0, D * sizeof *dw);
    for (idx t = 0; t < T; t++) {
        if (is_graph_token(batch, t)) continue;
        const float *dforce = s->heads->ddenoise_force + t * 3 * H + h;
        const float *value = s->heads->denoise_qkv + (3 * t + 2) * C + h * D;
        float *dvalue = s->heads->ddenoise_qkv + (3 * t + 2) * C + h * D;
        for (idx d = 0; d < D; d++) {
            float sum = 0;
            for (idx axis = 0; axis < 3; axis++) {
                dw[axis * C + d] += dforce[axis * H] * value[d];
                sum += dforce[axis * H] * w[axis * C + d];
            }
            dvalue[d] = sum;
        }
    }
}

// From ddenoise_out (A, 3): adds to dx and dattn_bias, stores the head's parameter gradients.
static void denoise_backward(Step *s) {
    LETTERS(s);
#pragma omp parallel for schedule(dynamic)
    for (idx b = 0; b < B; b++) denoise_backward_molecule(s, b);
#pragma omp parallel for schedule(static)
    for (idx h = 0; h < H; h++) denoise_force_backward(s, h);
    column_sums(g->denoise_axes_b, s->heads->ddenoise_out, 3, A, 3);
    linear_backward(s->enc->dx, 1, g->denoise_qkv_w, g->denoise_qkv_b, s->heads->ddenoise_qkv,
                    encoder_output(s), p->denoise_qkv_w, T, C, 3 * C);
}

// Sums of losses over what counts in the batch; with `backward`, also the gradients of the heads,
// dx (of x) and dattn_bias.
static void pretrain_heads(double sum[LOSSES], Step *s, int backward) {
    heads_layout(s);
    LETTERS(s);
    struct heads *a = s->heads;
    float dir_bias[3], ddir_bias[3];
    pair_maps_forward(s);
    dir_compose(s, dir_bias);
    PairHead heads[] = {
        {.loss = LOSS_SPD, .outputs = SPD_CLASSES, .slots = 1, .map = 0,
         .target = batch->spd_target, .weight = p->spd_w, .bias = p->spd_b, .dweight = g->spd_w,
         .dbias = g->spd_b},
        {.loss = LOSS_EDGE, .outputs = EDGE_OUTPUTS, .slots = PATH_BONDS, .map = 2,
         .target = batch->edge_target, .weight = p->edge_w, .bias = p->edge_b,
         .dweight = g->edge_w, .dbias = g->edge_b},
        {.loss = LOSS_3D, .outputs = 3, .map = 4, .weight = a->dir_weight, .bias = dir_bias,
         .dweight = a->ddir_weight, .dbias = ddir_bias}};
    memset(a->dpair_map, 0, T * PAIR_MAPS * R * sizeof(float));
    for (int k = 0; k < 3; k++) {
        if (!backward) heads[k].dweight = NULL;
        sum[heads[k].loss] = pair_head(s, &heads[k]);
    }
    denoise_forward(s);
    sum[LOSS_NOISE] = denoise_loss(s);
    if (!backward) return;
    dir_split(s, ddir_bias);
    pair_maps_backward(s);
    memset(s->bias->dattn_bias, 0, SS * H * sizeof(float));
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
// 8 Gradients of a batch: everything above, in order; and the update of the parameters
// =================================================================================================

#define CLIP_EPS 1e-6  // clip_grad_norm: factor = clip / (norm + eps)
typedef struct { double lr, beta1, beta2, eps, weight_decay, clip; } Adam;

// Euclidean norm of all gradients, whose squares may be beyond a float.
static double gradient_norm(const Model *model) {
    enum { CHUNK = 1 << 14 };  // of a thread at a time; sums are made per chunk, in order
    idx chunks = (model->count + CHUNK - 1) / CHUNK;
    double sum = 0, *squares = xmalloc(chunks, sizeof *squares);
#pragma omp parallel for schedule(static)
    for (idx k = 0; k < chunks; k++) {
        const float *g = model->grads + k * CHUNK;
        double square = 0;
#pragma omp simd reduction(+ : square)
        for (idx i = 0; i < min_idx(CHUNK, model->count - k * CHUNK); i++)
            square += (double)g[i] * (double)g[i];
        squares[k] = square;
    }
    for (idx k = 0; k < chunks; k++) sum += squares[k];
    free(squares);
    return sqrt(sum);
}

// One AdamW update (Loshchilov & Hutter 2019), t = 1, 2, ...; returns the gradient norm before
// clipping. (A row that never had a gradient only decays.)
//   m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2
//   p -= lr wd p + lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)
static double adamw_step(Model *model, const Adam *adam, int64_t t) {
    double norm = gradient_norm(model), clip = adam->clip / (norm + CLIP_EPS);
    float scale = adam->clip > 0 && clip < 1 ? (float)clip : 1.0f;
    float b1 = adam->beta1, b2 = adam->beta2, eps = adam->eps;
    float rate = adam->lr / (1 - pow(adam->beta1, t));
    float correction = 1 / sqrt(1 - pow(adam->beta2, t));
    float keep = 1 - adam->lr * adam->weight_decay;
    float new1 = 1 - adam->beta1, new2 = 1 - adam->beta2;
    float *restrict p = model->params, *restrict m = model->m, *restrict v = model->v;
    const float *restrict g = model->grads;
#pragma omp parallel for simd schedule(static)
    for (idx i = 0; i < model->count; i++) {
        float gi = g[i] * scale;
        m[i] = b1 * m[i] + new1 * gi;
        v[i] = b2 * v[i] + new2 * gi * gi;
        p[i] = keep * p[i] - rate * m[i] / (sqrtf(v[i]) * correction + eps);
    }
    return norm;
}

// Forward and backward pass of the batch in s: mean losses and all gradients.
static void gradients(double loss[LOSSES], Step *s) {
    double sum[LOSSES];
    memset(s->model.grads, 0, s->model.table_count * sizeof(float));  // the rest is stored
    encoder_forward(s);
    pretrain_heads(sum, s, 1);  // forward and backward
    loss_means(loss, sum, s->batch.count, &s->weights);
    encoder_backward(s);
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
// PORTING. Replace lib/fast.h, nothing else; it says what it must define. Plain definitions stand
// in section 4 (-DPLAIN_C). Must agree byte for byte: random draws, datasets, a checkpoint read and
// written again. To the tolerances of test.c: the golden files (./test --golden FILE). Trained
// weights differ by rounding, and losses drift apart after some ten steps.

#include "commands/head.h"    // task_gradients(): gradients() with the head of fine-tuning
#include "lib/names.h"        // pattern_name(): official names of tensors
#include "lib/ranks.h"        // my_rank, all_ranks: who takes which part of a batch
#include "lib/run.h"          // struct Run: what training has in common, whatever is trained

// =================================================================================================
// 9 Models: the arenas of their parameters, initial values; and memory for a step
// =================================================================================================

typedef enum {
    INIT_NORMAL,  // N(0, 0.02^2)
    INIT_TABLE,   // the same, row 0 (padding) zero
    INIT_ZERO, INIT_ONE,
    INIT_WIDE,    // U(0, 3): means and widths of the Gaussians, Angstrom
    INIT_HALF,    // 0.5, row 0 zero
    // of MoleculeSDE:
    INIT_UNIT,    // N(0, 1)
    INIT_FAN_IN,  // U(+-1 / sqrt(fan_in))
    INIT_XAVIER,  // U(+-sqrt(6 / (rows + columns)))
} InitRule;

#define INIT_STD 0.02f

// A tensor of the release.
typedef struct TensorInfo {
    char name[128];       // official
    size_t rows, columns; // rows = 0: a vector
    InitRule rule;
    size_t offset, count; // floats, in the arena
    size_t field;         // byte offset in Tensors of the field that begins here; else SIZE_MAX
    size_t fan_in;        // of INIT_FAN_IN: columns of the matrix, of a bias those of its own
    const char *module;   // what a checkpoint has in front of the name
} TensorInfo;

// Adds a row of the table to the list of tensors, n so far, behind `offset` numbers: to info,
// unless that is NULL. Returns the row's count; dies if there are no addresses for it.
static size_t tensor_row(TensorInfo *info, int *n, const char *pattern, int layer, size_t rows,
                         size_t columns, InitRule rule, size_t offset, size_t field) {
    const char *module = strstr(pattern, "proj_out.") ? "encoder." : "encoder.molecule_encoder.";
    int names = pattern_names(pattern);
    size_t all = max_size(rows, 1) * columns;
    CHECK((double)max_size(rows, 1) * (double)columns <= SIZE_MAX / 16 - offset,
          "this model needs more memory than has addresses; try a smaller one (--size)");
    for (int k = 0; k < names; k++, ++*n) {
        TensorInfo one = {"", rows / names, rows ? columns : columns / names, rule,
                          offset + k * (all / names), all / names, k ? SIZE_MAX : field, columns,
                          module};
        if (info) info[*n] = one;
        if (info) pattern_name(info[*n].name, pattern, k, layer);
    }
    return all;
}

// Fills info (NULL: only counts) with the tensors of a model; returns how many there are.
static int tensor_table(Config c, TensorInfo *info) {
    const size_t L = c.layers, C = c.dim, F = c.ffn, H = c.heads, G = c.kernels, Y = c.tasks;
    const size_t R = PAIR_WIDTH;
    size_t offset = 0, layer = offsetof(Tensors, layer), l = 0;
    int n = 0;
#define X(field, name, rows, columns, rule)                                                        \
    offset += tensor_row(info, &n, name, 0, rows, columns, rule, offset, offsetof(Tensors, field));
#define OF_LAYER(field, name, rows, columns, rule)                                                 \
    offset += tensor_row(info, &n, name, l, rows, columns, rule, offset,                           \
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
        if (model->info[i].field == SIZE_MAX) continue;
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
    model->table_count = model->p.bias3d1_w - model->params;
    if (!training) return;
    model->grads = tensors_alloc(model, &model->g);
    model->m = tensors_alloc(model, NULL);
    model->v = tensors_alloc(model, NULL);
}

static void model_free(Model *model) {
    FREE_ALL(model->info, model->params, model->grads, model->m, model->v);
    *model = (Model){0};
}

// Random initial values of tensor i. Its draws are named by its place in the table.
static void tensor_init(const Model *model, int i, uint64_t seed) {
    const TensorInfo *t = &model->info[i];
    float *x = model->params + t->offset;
    size_t padding = t->rule == INIT_TABLE || t->rule == INIT_HALF ? t->columns : 0;
    double bound = t->rule == INIT_XAVIER ? sqrt(6 / (double)(t->rows + t->columns))
                                          : 1 / sqrt((double)t->fan_in);
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
            case INIT_UNIT: x[k] = rng_normal(seed, RNG_INIT, 0, place, index); break;
            case INIT_FAN_IN:
            case INIT_XAVIER: {
                double u = (double)rng_uniform(seed, RNG_INIT, 0, place, index);
                x[k] = (float)(bound * (2 * u - 1));
                break;
            }
        }
    }
}

static void model_init(Model *model, uint64_t seed) {
    for (int i = 0; i < model->n_tensors; i++) tensor_init(model, i, seed);
}

// ---- a step's arrays

// Makes room for the largest batch to come before the first step, so that it is found out now
// whether there is enough memory: of these molecules, all of their pairs using 3D. Returns bytes.
static idx step_reserve(Step *s, const Dataset *data, const uint32_t *ids, idx n) {
    int *n_atoms = xmalloc(n, sizeof *n_atoms);
    for (idx b = 0; b < n; b++) n_atoms[b] = dataset_atoms(data, ids[b]);
    batch_layout(&s->batch, n, n_atoms);
    free(n_atoms);
    s->batch.Q = s->batch.P;
    bias_layout(s);
    enc_layout(s);
    if (s->model.config.tasks) task_arrays_layout(s);
    else heads_layout(s);
    return s->batch.store.room + s->bias->store.room + s->enc->store.room +
           (s->heads ? s->heads->store.room : s->task_arrays->store.room);
}

static void step_close(Step *s) {
    for (int k = 0; k < s->batch.readers; k++) molecule_free(&s->batch.reader[k]);
    FREE_ALL(s->batch.reader, s->batch.store.memory);
    if (s->bias) free(s->bias->store.memory);
    if (s->enc) free(s->enc->store.memory);
    if (s->heads) free(s->heads->store.memory);
    if (s->task_arrays) free(s->task_arrays->store.memory);
    FREE_ALL(s->bias, s->enc, s->heads, s->task_arrays);
    model_free(&s->model);
    *s = (Step){0};
}

// Makes room for the largest part of a batch to come, by its pairs, of the run's first epoch and of
// the sets that are measured after it: before the first step, lest a trained model is refused that.
// The parts have `part` molecules. Returns bytes.
static idx rooms_reserve(Step *s, struct Run *run, idx part) {
    const Dataset *const measured[] = {run->valid.count ? &run->valid : &run->train, &run->test};
    int64_t epoch_steps = (int64_t)run->train.count / run->batch + 1, largest = 0;
    idx from = 0, bytes = 0;
    double most = -1;
    for (int64_t t = run->done; t < run->steps && t < run->done + epoch_steps; t++) {
        update_ids(run, t);
        for (idx first = 0; first < run->batch; first += part) {
            double pairs = 0;
            for (idx k = first; k < min_idx(first + part, (idx)run->batch); k++)
                pairs += pow(dataset_atoms(&run->train, run->ids[k]), 2);
            if (pairs > most) largest = t, from = first, most = pairs;
        }
    }
    update_ids(run, largest);
    s->batch.Y = s->model.config.tasks;
    bytes = step_reserve(s, &run->train, run->ids + from, min_idx(part, (idx)run->batch - from));
    for (int k = 0; k < 2; k++)
        for (idx i = 0, n = (idx)measured[k]->count; i < n; i += part) {
            double pairs = 0;
            idx B = min_idx(part, n - i);
            for (idx b = 0; b < B; b++) {
                run->ids[b] = (uint32_t)(i + b);
                pairs += pow(dataset_atoms(measured[k], run->ids[b]), 2);
            }
            if (pairs <= most) continue;
            most = pairs;
            bytes = step_reserve(s, measured[k], run->ids, B);
        }
    run->epoch = -1;  // a state may be of another seed
    return bytes;
}

#include "lib/checkpoints.h"  // model_write(), model_load(), model_state_write(), transfer_load()

static const char *const LOSS_NAMES[LOSSES] = {"total", "denoise", "spd", "edge", "3d"};
#include "lib/finite.h"       // finite_check(): what was first to be no number

// Learning rate of update `step` = 0, 1, ...: linear warm-up to the peak, the peak until a part
// `hold` of what then remains is done (the paper: 0), cosine to 0.
static double learning_rate(double peak, int64_t step, int64_t warmup, int64_t steps, double hold) {
    if (step < warmup) return peak * (double)(step + 1) / (double)warmup;
    double done = (double)(step - warmup) / (double)(steps > warmup ? steps - warmup : 1);
    double x = done > hold ? (done - hold) / (1 - hold) : 0;
    return 0.5 * peak * (1 + cos(3.141592653589793 * x));
}

// =================================================================================================
// 10 A pass over molecules: for (Pass pass = ...; pass_next(&pass, s);) has batch after batch in
//   s->batch. An update is a pass over its molecules in parts, which need less memory; each by
//   another rank, if there are several (lib/ranks.h). Gradients are summed part after part,
//   ((g0 + g1) + g2) + ..., so that any number of ranks gets the same bits
// =================================================================================================

typedef struct {
    const Dataset *data;
    const uint32_t *ids;  // (n) which of its molecules; NULL: the first n
    idx n, part;          // how many; at a time, 0: all
    const Blend *blend;   // NULL: each shows the fixed relations `use`
    int use;
    Draws draws;          // of the first of them
    idx first, count;     // the batch at hand: from which on, how many
    idx turn, loaded;     // how many this rank has had; which of them, from 1 on, s->batch holds
} Pass;

// Loads the next batch that is this rank's; 0: there is none. To add what the ranks find is for the
// caller.
static int pass_next(Pass *pass, Step *s) {
    idx part = pass->part ? pass->part : pass->n;
    pass->first = (my_rank + pass->turn++ * all_ranks) * part;
    pass->count = min_idx(part, pass->n - pass->first);
    if (pass->count <= 0) return 0;
    if (pass->loaded == pass->turn) return 1;  // a rank's only part, by parts_begin()
    uint32_t *ids = xmalloc(pass->count, sizeof *ids);
    for (idx b = 0; b < pass->count; b++)
        ids[b] = pass->ids ? pass->ids[pass->first + b] : (uint32_t)(pass->first + b);
    threads_adapt();
    s->batch.Y = s->model.config.tasks ? pass->data->n_tasks : 0;
    s->draws = pass->draws;
    s->draws.first_slot += (uint32_t)pass->first;
    batch_load(&s->batch, pass->data, ids, pass->count, pass->blend, pass->use, &s->draws);
    pass->loaded = pass->turn;
    free(ids);
    return 1;
}

typedef struct {
    Pass pass;              // over the update's molecules
    idx n;                  // parts
    double count[LOSSES];   // what the losses of all of them are means over
    double *losses, *loss;  // (n, LOSSES), and there those of the part at hand
    float *sum;             // of gradients, if n > 1; its memory stays for the next update
} Parts;

// Begins an update: counts what its losses will be means over. For that each part is loaded once; a
// rank that has several loads them again to compute.
static void parts_begin(Parts *parts, Step *s) {
    Pass *pass = &parts->pass;
    pass->turn = pass->loaded = 0;
    parts->n = pass->part ? (pass->n + pass->part - 1) / pass->part : 1;
    parts->losses = xmalloc(parts->n, LOSSES * sizeof *parts->losses);
    if (parts->n > 1 && !parts->sum) parts->sum = floats_alloc(s->model.count, "a smaller model");
    memset(parts->count, 0, sizeof parts->count);
    while (pass_next(pass, s))
        for (int l = 0; l < LOSSES; l++) parts->count[l] += s->batch.count[l];
    ranks_sum(parts->count, LOSSES, sizeof *parts->count);
    pass->turn = 0;
}

// Number of the part at hand.
static idx part_number(const Parts *parts) {
    return parts->n > 1 ? parts->pass.first / parts->pass.part : 0;
}

// Loads this rank's next part; 0: there is none.
static int parts_next(Parts *parts, Step *s) {
    if (!pass_next(&parts->pass, s)) return 0;
    memcpy(s->batch.count, parts->count, sizeof parts->count);
    parts->loss = parts->losses + part_number(parts) * LOSSES;
    return 1;
}

// Adds the gradients of this part, whose losses are in parts->loss now: part 0 begins the sum,
// which goes from rank to rank; the last part leaves it in its rank's gradients.
static void parts_add(Parts *parts, Step *s) {
    finite_check(s, parts->loss, 0);
    if (parts->n > 1)
        ranks_add(parts->sum, s->model.grads, s->model.count, part_number(parts), parts->n);
}

// The losses of the whole batch; its gradients are the model's now.
static void parts_end(double loss[LOSSES], Parts *parts, Step *s) {
    pieces_wait();  // until what was sent of the sum has left
    ranks_share(s->model.grads, s->model.count, parts->n - 1);  // from the last part's rank to all
    ranks_sum(parts->losses, parts->n * LOSSES, sizeof *parts->losses);
    for (int l = 0; l < LOSSES; l++) loss[l] = 0;
    for (idx k = 0; k < parts->n * LOSSES; k++) loss[k % LOSSES] += parts->losses[k];
    free(parts->losses);
}

#ifndef MOLEBLEND_TEST

typedef struct Run Run;

#include "lib/commands.h"      // TEXT(), WHOLE() ...: rows of OPTIONS; command_find()
#include "commands/options.h"  // opt, what the command line sets: one table for all commands

enum { DEFAULT_BATCH = 64, PRETRAIN_BATCH = 12 };

// Columns of the log, a row an update.
enum { LOG_LR = LOSSES, LOG_NORM, LOG_RATE, LOG_COLUMNS };
#define LOG_HEADING "step,total,denoise,spd,edge,3d,lr,gradient_norm,molecules_per_second"
#define LOG_BEGINS "step,total,denoise,|seed,epoch,loss,valid "

// ---- a run, of pretraining or fine-tuning

// Molecules that are computed with at once.
static idx part_size(void) {
    return (idx)(opt.part && opt.part < opt.batch ? opt.part : opt.batch);
}

// At most `most` molecules of a dataset, in order and without dropout. Blend and noise of molecule
// i depend only on the seed and i, so that results can be compared.
static Pass pass_over(const Dataset *data, size_t most, const Blend *blend, int use) {
    return (Pass){.data = data, .n = (idx)min_size(data->count, most), .part = part_size(),
                  .blend = blend, .use = use, .draws = {(uint64_t)opt.seed, UINT32_MAX, 0, 0}};
}

// run_open(), and what a step needs of the options.
static void train_open(Run *run, Step *s, const char *train_path, int64_t usual, int tuning) {
    run_open(run, train_path, LOG_BEGINS, usual, &opt.part, tuning);
    if (run->resumed) run->begun = meta_whole(&run->state, "begun");
    s->drop = opt.drop;
    s->weights = opt.weights;
}

// Metadata of a checkpoint or state: sizes, where the run is, its options. seeds: those that are
// done.
static void run_meta(Text *t, const Run *run, Config c, int64_t seeds, int of_state) {
    const char *const keys[] = {"layers", "dim", "ffn", "heads", "kernels", "step", "molecules",
                                "fingerprint", "valid_fingerprint", "seeds_done"};
    const long long values[] = {c.layers, c.dim, c.ffn, c.heads, c.kernels, run->done,
                                (long long)run->train.count, run->prints[0],
                                of_state || c.tasks ? run->prints[1] : 0, seeds};
    text_add_run(t, keys, values, 10, of_state ? SHAPES | FILES : SHAPES, &run->train);
    if (of_state) {
        text_add_meta(t, "test_fingerprint", "%lld", (long long)run->prints[2]);
        text_add_meta(t, "init_fingerprint", "%lld", (long long)run->init_print);
        text_add_meta(t, "begun", "%lld", (long long)run->begun);
    }
}

// The row of an update in the log; a gradient that is no number ends the program. start: when it
// began.
static void log_update(Run *run, const Step *s, const double loss[LOSSES], const Adam *adam,
                       double norm, double start) {
    finite_check(s, NULL, norm);
    CHECK(adam->clip > 0 || norm < 1e18, "step %lld: the squares of a gradient of norm %g "
          "overflow; give --clip", (long long)run->done + 1, norm);
    log_add(run, loss, LOSSES, adam->lr, norm, start);
}

// =================================================================================================
// 11 Pretraining: ./moleblend train.bin. The loop is in main(), at the end
// =================================================================================================

// Opens what pretraining needs, and says what will be done.
static void pretrain_open(Run *run, Step *s, const char *train_path) {
    train_open(run, s, train_path, PRETRAIN_BATCH, 0);
    run->steps = opt.steps;
    run->log = rows_make(run->steps, LOG_COLUMNS);
    model_create(&s->model, start_config(run->resumed ? NULL : opt.init), 1);
    if (run->resumed) model_state_load(run, &s->model, NULL, 0, 0);
    else model_init(&s->model, run->seed);
    if (opt.init && !run->resumed) init_load(&s->model, opt.init, &run->train);
    idx bytes = rooms_reserve(s, run, part_size());
    size_t without = 0;
    for (size_t i = 0; i < run->train.count; i++) without += !dataset_has_pos(&run->train, i);
    if (without)
        fprintf(stderr, "note    %s: %zu of %zu molecules have no positions: 2D losses only\n",
                train_path, without, run->train.count);
    Config c = s->model.config;
    fprintf(
        stderr,
        "model   %d layers, %d wide, ffn %d, %d heads, %d kernels: %.2f M parameters, seed %lld\n"
        "data    %s: %zu molecules; %s: %zu\n"
        "memory  %.0f MiB parameters, gradients and moments, %.0f MiB activations\n"
        "run     %lld steps of %lld molecules (%.1f epochs) on %d thread%s%s\n",
        c.layers, c.dim, c.ffn, c.heads, c.kernels, (double)s->model.count / 1e6,
        (long long)opt.seed, train_path, run->train.count,
        opt.valid ? opt.valid : "no validation", run->valid.count,
        16.0 * (double)s->model.count / (1 << 20),
        (double)bytes / (1 << 20), (long long)run->steps, (long long)opt.batch,
        (double)run->steps * (double)opt.batch / (double)run->train.count, thread_count(),
        thread_count() > 1 ? "s" : "", MB_OPENMP ? "" : " (built without OpenMP)");
    if (run->resumed) fprintf(stderr, "resumed after step %lld\n", (long long)run->done);
}

// Saves the state, which is complete in itself.
static void pretrain_state(const Run *run, const Step *s) {
    Text meta = {0};
    run_meta(&meta, run, s->model.config, 0, 1);
    model_state_write(run, &s->model, NULL, meta.text);
}

// First the state, so that a run killed between two renames resumes from it; then the checkpoint.
static void pretrain_save(Run *run, const Step *s) {
    float *const params[ARENAS] = {s->model.params};
    Text meta = {0};
    pretrain_state(run, s);
    run_meta(&meta, run, s->model.config, 0, 0);
    if (my_rank == 0) model_write(opt.output, &s->model, params, NULL, 0, meta.text);
    csv_write(run, LOG_HEADING, 0, 1);  // this and the state: by rank 0 alone, too
    free(meta.text);
}

// A mean loss for people: "-" if nothing reached it.
static const char *loss_text(double x) { return number_text(x == 0 ? (double)NAN : x, 4); }

// The total of mean losses of the log: not every row has each of them.
static void total_mean(double mean[LOG_COLUMNS]) {
    mean[LOSS_TOTAL] = 0;
    for (int k = 1; k < LOSSES; k++)
        mean[LOSS_TOTAL] += isnan(mean[k]) ? 0 : opt.weights.weight[k] * mean[k];
}

// A line on stdout: the mean of the log's rows since the one before.
static void pretrain_line(const Run *run, double mean[LOG_COLUMNS]) {
    total_mean(mean);
    progress_clear(&run->progress);
    printf("%7lld  %7s  %7s %7s %7s %7s  %8.2e %8.3f %7.0f\n", (long long)run->done,
           loss_text(mean[LOSS_TOTAL]), loss_text(mean[LOSS_NOISE]), loss_text(mean[LOSS_SPD]),
           loss_text(mean[LOSS_EDGE]), loss_text(mean[LOSS_3D]), mean[LOG_LR], mean[LOG_NORM],
           mean[LOG_RATE]);
    fflush(stdout);
}

// Mean losses on a dataset.
static void mean_losses(double loss[LOSSES], Step *s, const Dataset *data) {
    idx part = part_size(), n = ((idx)data->count / part + 1) * 2 * LOSSES;
    double *sums = xmalloc(n, sizeof *sums), all[2 * LOSSES] = {0};  // of a batch: sums and counts
    for (Pass pass = pass_over(data, SIZE_MAX, &opt.blend, 0); pass_next(&pass, s);) {
        double *sum = sums + pass.first / part * 2 * LOSSES;
        encoder_forward(s);
        pretrain_heads(sum, s, 0);
        sum[LOSS_TOTAL] = 0;  // is not set
        memcpy(sum + LOSSES, s->batch.count, LOSSES * sizeof *sum);
    }
    ranks_sum(sums, n, sizeof *sums);
    for (idx k = 0; k < n; k++) all[k % (2 * LOSSES)] += sums[k];
    loss_means(loss, all, all + LOSSES, &opt.weights);
    free(sums);
}

// How often each class occurs in at most 4096 molecules: those of path lengths, then those of the
// path slots, slot by slot; then what counts in each loss.
enum { CLASSES = SPD_CLASSES + EDGE_OUTPUTS };
static void count_classes(double counts[CLASSES + LOSSES], Step *s, const Dataset *data,
                          const Blend *blend) {
    const Batch *batch = &s->batch;
    for (Pass pass = pass_over(data, 4096, blend, USE_SPD); pass_next(&pass, s);) {
        for (idx k = 0; k < batch->P * PATH_BONDS; k++) {
            int class = batch->edge_target[k], slot = (int)(k % PATH_BONDS);
            if (class >= 0) counts[SPD_CLASSES + slot * EDGE_CLASSES + class] += 1;
            class = batch->spd_target[k / PATH_BONDS];
            if (class >= 0 && slot == 0) counts[class] += 1;
        }
        for (int k = 0; k < LOSSES; k++) counts[CLASSES + k] += batch->count[k];
    }
    ranks_sum(counts, CLASSES + LOSSES, sizeof *counts);
}

// What a predictor without knowledge scores on `data`: for SPD and edges one that knows the class
// frequencies of the training set, 1 for the cosine losses; 0: nothing counts.
static void chance_losses(double chance[LOSSES], Step *s, const Dataset *train,
                          const Dataset *data) {
    double known[CLASSES + LOSSES] = {0}, seen[CLASSES + LOSSES] = {0};
    double sum[LOSSES] = {0}, *count = seen + CLASSES;
    count_classes(known, s, train, NULL);
    count_classes(seen, s, data, &opt.blend);
    sum[LOSS_NOISE] = count[LOSS_NOISE];
    sum[LOSS_3D] = count[LOSS_3D];
    for (int group = 0; group <= PATH_BONDS; group++) {  // 0: SPD, then a slot each
        int first = group ? SPD_CLASSES + (group - 1) * EDGE_CLASSES : 0;
        int end = SPD_CLASSES + group * EDGE_CLASSES;
        double total = 0;
        for (int k = first; k < end; k++) total += known[k] + 1;  // + 1: unseen is not impossible
        for (int k = first; k < end; k++)
            sum[group ? LOSS_EDGE : LOSS_SPD] -= seen[k] * log((known[k] + 1) / total);
    }
    loss_means(chance, sum, count, &opt.weights);
}

// The result: each loss at the start and the end, on the validation set, and by chance.
static void pretrain_report(const Run *run, Step *s) {
    double start[LOG_COLUMNS], end[LOG_COLUMNS], valid[LOSSES], chance[LOSSES];
    log_ends(start, end, run);
    total_mean(start);
    total_mean(end);
    mean_losses(valid, s, &run->valid);
    chance_losses(chance, s, &run->train, run->valid.count ? &run->valid : &run->train);
    printf("\nloss        start     end   valid  by chance\n");
    for (int k = 1; k <= LOSSES; k++) {
        int loss = k % LOSSES;  // the total last
        printf("%-8s %8s%8s%8s%11s\n", LOSS_NAMES[loss], loss_text(start[loss]),
               loss_text(end[loss]), loss_text(valid[loss]), loss_text(chance[loss]));
    }
    if (chance[LOSS_TOTAL] == 0)
        fprintf(stderr, "note    no loss had anything to count: nothing was learnt; molecules of "
                "one atom have no relations\n");
    if (end[LOSS_TOTAL] > 1.2 * chance[LOSS_TOTAL])
        fprintf(stderr, "note    the losses are far above those of chance: try a lower --lr\n");
    printf("wrote %s, %s\n", opt.output, run->log_path);
}

// ---- the other commands, a file each

#include "commands/model.h"     // model_open(), predict_all(): a model that has been trained
#include "commands/finetune.h"  // command_finetune()
#include "commands/embed.h"     // command_embed()
#include "commands/predict.h"   // command_predict()
#include "commands/show.h"      // command_show()

static void command_other(const CommandLine *line) {
    const char *path = line->words[0];
    switch (line->command->bit) {
        case FINETUNE: command_finetune(path); break;
        case PREDICT: command_predict(path, line->models, line->n_models); break;
        case EMBED: command_embed(path); break;
        case SHOW: command_show(path, line->words[1]); break;
        default: file_info(path); break;
    }
}

int main(int argc, char **argv) {
    program_begin(argv);
    CommandLine line = command_line(argc, argv);
    if (line.command->bit & TRAIN) ranks_begin();
    threads_set(opt.threads);
    if (line.command->bit & READ) precision_begin(opt.precision);
    if (line.command->bit != PRETRAIN) {
        command_other(&line);
        program_end(&line);  // exits
    }

    Run run = {0};  // lib/run.h: datasets, log, state
    Step s = {0};   // section 3: model and batch
    pretrain_open(&run, &s, line.words[0]);
    Adam adam = opt.adam;
    Parts parts = {.pass = {.data = &run.train, .ids = run.ids, .n = (idx)run.batch,
                            .part = (idx)opt.part, .blend = &opt.blend}};
    int64_t warmup = opt.warmup >= 0 ? opt.warmup : run.steps / 12 + 1;
    double loss[LOSSES], mean[LOG_COLUMNS];

    printf("   step    total  denoise     spd    edge      3d        lr gradient    mol/s\n");
    run_start(&run);
    if (run.done == 0) pretrain_state(&run, &s);  // from here on --resume means this run
    for (int64_t t = run.done; t < run.steps && !run_stopped(&run); t++) {
        double start = now_seconds();
        update_ids(&run, t);  // the molecules of the batch
        parts.pass.draws = (Draws){run.seed, (uint32_t)t, 0, 1};
        for (parts_begin(&parts, &s); parts_next(&parts, &s); parts_add(&parts, &s))  // mostly one
            gradients(parts.loss, &s);        // encoder, heads, and back
        parts_end(loss, &parts, &s);
        adam.lr = learning_rate(opt.adam.lr, t, warmup, run.steps, opt.hold);
        double norm = adamw_step(&s.model, &adam, t + 1);  // behind a clip of the gradients
        log_update(&run, &s, loss, &adam, norm, start);  // run.done is t + 1 then
        if (line_due(mean, &run)) pretrain_line(&run, mean);
        csv_write(&run, LOG_HEADING, 0, 1);
        if (save_due(&run, opt.save_every)) pretrain_save(&run, &s);
        run_progress(&run, "", 0);
    }
    progress_clear(&run.progress);
    pretrain_save(&run, &s);  // also when all steps were done: it may have been killed while saving
    run_end(&run);            // if a signal stopped it, so does the program

    pretrain_report(&run, &s);
    free(parts.sum);
    run_free(&run);
    step_close(&s);
    program_end(&line);
}

#endif  // MOLEBLEND_TEST
