// prep/scaffold.h - scaffolds (Bemis and Murcko 1996): the rings and what links them, plus atoms
// double-bonded to these. Two molecules belong together if their scaffolds have the same SMILES
// without stereo; here: the same key, a 128-bit hash of the scaffold's graph that does not depend
// on numbering
//
//   scaffold_key()   of a molecule, which is reduced to its scaffold
//   graph_key()      of the whole molecule: finds twins

typedef struct { uint64_t a, b; } ScaffoldKey;

static uint64_t mix(uint64_t x) {  // the finalizer of SplitMix64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

// Marks the atoms of rings and linkers: what is left when end atoms are cut off again and again.
// RDKit: MurckoDecompose
static void mark_framework(ChemMol *m, uint8_t *keep) {
    int n = m->n_atoms, top = 0;
    int *degree = arena_ints(&m->arena, n), *stack = arena_ints(&m->arena, n);
    for (int i = 0; i < n; i++) {
        keep[i] = 1;
        degree[i] = mol_degree(m, i);
        if (degree[i] <= 1) stack[top++] = i;
    }
    while (top) {
        int i = stack[--top];
        keep[i] = 0;
        for (Link *l = m->first[i]; l < m->first[i + 1]; l++)
            if (keep[l->atom] && --degree[l->atom] == 1) stack[top++] = l->atom;
    }
}

// Cuts atom i off the framework, unless a double bond holds it there (returns 0). Its neighbours
// in the framework get hydrogens instead.
// RDKit: MurckoDecompose
static int cut_side_atom(ChemMol *m, int i, const uint8_t *framework) {
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
        ChemAtom *a = &m->atoms[l->atom];
        if (!framework[l->atom]) continue;
        if (l->bond->order == ORDER_DOUBLE) return 0;
        if (a->aromatic && (a->z != 6 || a->charge == 1)) {
            a->explicit_h = 1;
        } else if (a->no_implicit || a->chirality != CHI_NONE) {
            a->no_implicit = a->explicit_h = 0;
            a->chirality = CHI_NONE;
        }
    }
    return 1;
}

// One round of refinement: every atom's colour takes up those of its neighbours and the bonds, of
// which the smallest ring tells decalin from bicyclopentyl.
static void refine_colours(const ChemMol *m, const uint64_t *colour, uint64_t *next) {
    for (int i = 0; i < m->n_atoms; i++) {
        uint64_t sum = 0;
        for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
            unsigned donor = l->bond->order == ORDER_DATIVE && l->bond->begin == i;
            unsigned bond = l->bond->order + 16u * donor + 32u * (unsigned)l->bond->smallest_ring;
            sum += mix(colour[l->atom] + 977u * bond);
        }
        next[i] = mix(colour[i] * 0x9E3779B97F4A7C15u + mix(sum));
    }
}

// Refines n_rounds times, with atom `special` (-1: none) set apart; returns the sum over atoms.
static uint64_t graph_hash(const ChemMol *m, const uint64_t *start, int special, int n_rounds,
                           uint64_t *colour, uint64_t *next) {
    uint64_t sum = 0;
    memcpy(colour, start, (size_t)m->n_atoms * sizeof *colour);
    if (special >= 0) colour[special] = mix(colour[special] + 1);
    for (int round = 0; round < n_rounds; round++) {
        refine_colours(m, colour, next);
        uint64_t *swap = colour;
        colour = next;
        next = swap;
    }
    for (int i = 0; i < m->n_atoms; i++) sum += mix(colour[i]);
    return mix(sum);
}

// Key of the whole graph, stereo and isotopes aside. Refinement takes only few different molecules
// for one; `thorough` sets every atom apart in turn and takes n times as long.
static ScaffoldKey graph_key(ChemMol *m, int thorough) {
    Arena *arena = &m->arena;
    int n = m->n_atoms;
    uint64_t *start = arena_take(arena, (size_t)n, sizeof *start);
    uint64_t *colour = arena_take(arena, (size_t)n, sizeof *colour);
    uint64_t *next = arena_take(arena, (size_t)n, sizeof *next);
    for (int i = 0; i < n; i++) {
        const ChemAtom *a = &m->atoms[i];
        uint64_t label = a->z | (uint64_t)(uint8_t)a->charge << 8 | (uint64_t)a->aromatic << 16;
        label |= (uint64_t)atom_hydrogens(a) << 17 | (uint64_t)((uint32_t)a->map + 1) << 32;
        start[i] = mix(label + 0x9E3779B97F4A7C15u);
    }
    int n_rounds = min_int(n, 16);
    ScaffoldKey key = {graph_hash(m, start, -1, n_rounds, colour, next), 0};
    for (int i = 0; thorough && i < n && spend(arena, n_rounds * (n + 2ll * m->n_bonds)); i++)
        key.b += graph_hash(m, start, i, n_rounds, colour, next);
    return key;
}

// Key of the scaffold of m, which is reduced to it.
// RDKit: MurckoDecompose; the key has none
static ScaffoldKey scaffold_key(ChemMol *m) {
    Arena *arena = &m->arena;
    int n = m->n_atoms, kept = 0, *to = arena_ints(arena, n);
    uint8_t *framework = arena_flags(arena, n);
    mark_framework(m, framework);
    for (int i = 0; i < n; i++)
        to[i] = framework[i] || !cut_side_atom(m, i, framework) ? kept++ : -1;
    for (int k = 0; k < m->n_bonds; k++)
        if (to[m->bonds[k].begin] < 0 || to[m->bonds[k].end] < 0) m->bonds[k].dead = 1;
    compact(m, to);
    if (kept == 0) return (ScaffoldKey){0, 0};
    update_valences(m);
    return graph_key(m, 1);
}
