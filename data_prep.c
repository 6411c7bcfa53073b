// data_prep.c - molecule files in, one dataset file out
//
// Reads SDF / MOL (V2000 and V3000), SMILES and CSV / TSV files and writes the dataset of
// moleblend.h: for every molecule the nine atom and three bond features of OGB, 3D positions if the
// file has them, labels and a name. The features equal those RDKit 2022.09 computes when it reads
// and sanitizes the same record, because the same perception is done in the same order:
//
//    1 elements             valences, outer electrons: the facts the rules below rest on
//    2 the molecule         atoms, bonds, adjacency, rings
//    3 mol blocks           V2000, V3000
//    4 SMILES
//    5 valence              explicit valence, implicit hydrogens, what is too much
//    6 clean-up             nitro groups and their kin become charge-separated
//    7 hydrogens            explicit H atoms become counts on their heavy atom
//    8 rings                smallest set of smallest rings, symmetrised
//    9 Kekule structure     aromatic bonds become single and double ones
//   10 radicals, aromaticity, conjugation, hybridization
//   11 stereo centres       from 3D coordinates or wedges; non-tetrahedral ones
//   12 double bonds         bond directions from coordinates
//   13 CIP ranks            and with them: which centres and double bonds are real
//   14 perception           the steps above in order
//   15 features             OGB's lists
//   16 main
//
// What is not chemistry stands in prep/: memory and text, CXSMILES, positions, scaffold keys; and
// between molecules and files records, labels, tables, splits, options. See each #include.
//
// Where RDKit's behaviour is an accident of its code, it is followed and a comment says so: equal
// numbers are worth more here than better chemistry. A line "RDKit: f" over a function names what
// it mirrors there (release 2022.09; MolOps, FindRings, ... are namespaces); helpers of our own
// have none. Records that RDKit reads and this program refuses, with a reason:
//
//    query features, R-groups, rare properties  of mol blocks: they describe no single molecule
//    DEFAULT lines of V3000 S groups
//    rare chirality classes                     @AL, @SP, @TB, @OH in SMILES
//    rings too intricate                        cages whose rings need RDKit's fallback searches
//    too intricate                              more work or memory than one record may take
//    dummy atoms in aromatic rings              *1cccc1 has no Kekule structure to be sure of
#ifndef MB_PROGRAM
#define MB_PROGRAM "data_prep"
#endif
#include "moleblend.h"   // CHECK(), xmalloc(); Molecule, the dataset's record; options, outputs
#include "prep/arena.h"  // arena_take(): a record's working memory; spend(): its budget of work
#include "prep/text.h"   // Span, Lines, numbers; fault_at(): how a parser says what is wrong

// =================================================================================================
// 1 Elements. `early` marks those left of carbon, where a positive charge costs a bond instead of
//   giving one. The valences are the allowed ones in rising order; -1 means anything goes.
// =================================================================================================

typedef struct {
    int8_t outer;       // electrons in the outer shell
    int8_t early;
    int16_t isotope;    // the most common one
    int8_t n_valences;
    int8_t valence[4];
} Element;

enum { Z_MAX = 118 };

// By atomic number, from the dummy atom on.
static const Element ELEMENTS[Z_MAX + 1] = {
    {0, 0, 0, 1, {-1}}, {1, 0, 1, 1, {1}}, {2, 0, 4, 1, {0}}, {1, 1, 7, 1, {1}}, {2, 1, 9, 1, {2}},
    {3, 1, 11, 1, {3}}, {4, 0, 12, 1, {4}}, {5, 0, 14, 1, {3}}, {6, 0, 16, 1, {2}},
    {7, 0, 19, 1, {1}}, {8, 0, 20, 1, {0}}, {1, 1, 23, 1, {1}}, {2, 1, 24, 2, {2, -1}},
    {3, 1, 27, 2, {3, 6}}, {4, 0, 28, 2, {4, 6}}, {5, 0, 31, 3, {3, 5, 7}},
    {6, 0, 32, 3, {2, 4, 6}}, {7, 0, 35, 1, {1}}, {8, 0, 40, 1, {0}}, {1, 1, 39, 1, {1}},
    {2, 1, 40, 2, {2, -1}}, {3, 1, 45, 1, {-1}}, {4, 1, 48, 1, {-1}}, {5, 0, 50, 1, {-1}},
    {6, 0, 52, 1, {-1}}, {7, 0, 55, 1, {-1}}, {8, 0, 56, 1, {-1}}, {9, 0, 59, 1, {-1}},
    {10, 0, 58, 1, {-1}}, {11, 0, 63, 1, {-1}}, {2, 1, 64, 1, {-1}}, {3, 1, 69, 1, {3}},
    {4, 1, 74, 1, {4}}, {5, 0, 75, 3, {3, 5, 7}}, {6, 0, 80, 3, {2, 4, 6}}, {7, 0, 79, 1, {1}},
    {8, 0, 84, 1, {0}}, {1, 1, 85, 1, {1}}, {2, 1, 88, 2, {2, -1}}, {3, 1, 89, 1, {-1}},
    {4, 1, 90, 1, {-1}}, {5, 1, 93, 1, {-1}}, {6, 0, 98, 1, {-1}}, {7, 0, 97, 1, {-1}},
    {8, 0, 102, 1, {-1}}, {9, 0, 103, 1, {-1}}, {10, 0, 106, 1, {-1}}, {11, 0, 107, 1, {-1}},
    {2, 1, 114, 1, {-1}}, {3, 1, 115, 1, {3}}, {4, 1, 120, 2, {2, 4}}, {5, 1, 121, 3, {3, 5, 7}},
    {6, 0, 130, 3, {2, 4, 6}}, {7, 0, 127, 3, {1, 3, 5}}, {8, 0, 132, 4, {0, 2, 4, 6}},
    {1, 1, 133, 1, {1}}, {2, 1, 138, 2, {2, -1}}, {3, 1, 139, 1, {-1}}, {4, 1, 140, 1, {-1}},
    {3, 1, 141, 1, {-1}}, {4, 1, 142, 1, {-1}}, {5, 1, 145, 1, {-1}}, {6, 0, 152, 1, {-1}},
    {7, 0, 153, 1, {-1}}, {8, 0, 158, 1, {-1}}, {9, 0, 159, 1, {-1}}, {10, 0, 164, 1, {-1}},
    {11, 0, 165, 1, {-1}}, {12, 0, 166, 1, {-1}}, {13, 0, 169, 1, {-1}}, {14, 0, 174, 1, {-1}},
    {15, 0, 175, 1, {-1}}, {4, 1, 180, 1, {-1}}, {5, 1, 181, 1, {-1}}, {6, 0, 184, 1, {-1}},
    {7, 0, 187, 1, {-1}}, {8, 0, 192, 1, {-1}}, {9, 0, 193, 1, {-1}}, {10, 0, 195, 1, {-1}},
    {11, 0, 197, 1, {-1}}, {2, 1, 202, 1, {-1}}, {3, 1, 205, 1, {3}}, {4, 1, 208, 2, {2, 4}},
    {5, 1, 209, 3, {3, 5, 7}}, {6, 0, 209, 3, {2, 4, 6}}, {7, 0, 210, 3, {1, 3, 5}},
    {8, 0, 211, 1, {0}}, {1, 1, 223, 1, {1}}, {2, 1, 223, 2, {2, -1}}, {3, 1, 227, 1, {-1}},
    {4, 1, 232, 1, {-1}}, {3, 1, 231, 1, {-1}}, {4, 1, 238, 1, {-1}}, {5, 1, 236, 1, {-1}},
    {6, 0, 238, 1, {-1}}, {7, 0, 241, 1, {-1}}, {8, 0, 243, 1, {-1}}, {9, 0, 247, 1, {-1}},
    {10, 0, 249, 1, {-1}}, {11, 0, 252, 1, {-1}}, {12, 0, 257, 1, {-1}}, {13, 0, 258, 1, {-1}},
    {14, 0, 259, 1, {-1}}, {15, 0, 262, 1, {-1}}, {2, 1, 267, 1, {-1}}, {2, 1, 268, 1, {-1}},
    {2, 1, 271, 1, {-1}}, {2, 1, 270, 1, {-1}}, {2, 1, 269, 1, {-1}}, {2, 1, 278, 1, {-1}},
    {2, 1, 281, 1, {-1}}, {2, 1, 281, 1, {-1}}, {2, 1, 285, 1, {-1}}, {2, 1, 284, 1, {-1}},
    {2, 1, 289, 1, {-1}}, {2, 1, 288, 1, {-1}}, {2, 1, 293, 1, {-1}}, {2, 1, 292, 1, {-1}},
    {2, 1, 294, 1, {-1}},
};

// The symbol of an element, for "%.*s".
#define SYMBOL(z) symbol_length(z), symbol(z)
static const char *symbol(int z) { return SYMBOLS + 3 * (z ? z - 1 : Z_MAX); }
static int symbol_length(int z) { return symbol(z)[1] == ' ' ? 1 : 2; }

// Atomic number of an element symbol of n letters, or -1.
static int element_number(const char *text, int n) {
    for (int z = 1; z <= Z_MAX; z++)
        if (symbol_length(z) == n && memcmp(symbol(z), text, (size_t)n) == 0) return z;
    return -1;
}

// Whether the first element attracts electrons more than the second, by RDKit's rough measure.
// RDKit: PeriodicTable::moreElectroNegative
static int more_electronegative(int z1, int z2) {
    int outer1 = ELEMENTS[z1].outer, outer2 = ELEMENTS[z2].outer;
    return outer1 != outer2 ? outer1 > outer2 : z1 < z2;
}

// =================================================================================================
// 2 The molecule
// =================================================================================================

enum { ORDER_NONE, ORDER_SINGLE, ORDER_DOUBLE, ORDER_TRIPLE, ORDER_QUADRUPLE, ORDER_AROMATIC,
       ORDER_DATIVE, ORDER_HYDROGEN };

// A wedge starts at the narrow end, the bond's first atom. DOWN and UP belong to the single bonds
// beside a double bond and are read from first to second atom, like \ and / in SMILES.
enum { DIR_NONE, DIR_WEDGE, DIR_DASH, DIR_DOWN, DIR_UP, DIR_EITHER, DIR_UNKNOWN };

enum { STEREO_NONE, STEREO_Z, STEREO_E, STEREO_CIS, STEREO_TRANS, STEREO_ANY };  // OGB's order

// The first three are OGB's, the others its "misc", which is 4.
enum { CHI_NONE, CHI_CW, CHI_CCW, CHI_SQUARE = 4, CHI_BIPYRAMID, CHI_OCTAHEDRON };

enum { HYBRID_SP, HYBRID_SP2, HYBRID_SP3, HYBRID_SP3D, HYBRID_SP3D2, HYBRID_MISC };

typedef struct {
    uint8_t z;              // atomic number, 0 = dummy
    int8_t charge;
    uint8_t radicals;
    uint8_t no_implicit;    // takes no hydrogens beyond the explicit ones
    uint8_t aromatic, chirality, hybrid;
    uint8_t unknown_stereo; // a wavy bond began here
    uint8_t query;          // states a condition: a hydrogen that does stays an atom
    uint8_t first_of_fragment;  // opens a SMILES or follows a dot
    uint8_t ring_stereo;    // its stereo depends on another centre of the same ring system
    uint8_t tag;            // its chirality for --stereo invariant
    char cip;               // 'R', 'S' or 0: not a centre with four different neighbours
    uint16_t isotope;
    uint16_t explicit_h;    // hydrogens that belong to the atom as written ([nH], valence fields)
    int16_t implicit_h;     // -1: not computed yet
    int valence;            // sum of bond orders and explicit hydrogens, rounded as RDKit does
    int map;                // atom map number, -1 = none
    int field_valence;      // the mol block's valence field, 0 = not given
} ChemAtom;

typedef struct {
    int begin, end;
    uint8_t order, aromatic, conjugated, direction, stereo;
    uint8_t unknown;        // was drawn wavy
    uint8_t dead;           // goes away with its hydrogen
    uint8_t unspecified;    // SMILES / or \ or nothing: single or aromatic, as its atoms turn out
    int rings, smallest_ring;
    int query_line;         // where the mol block gives it the type of a query; 0: it does not
} ChemBond;

// A bond as one of its atoms sees it.
typedef struct { ChemBond *bond; int index, atom; } Link;  // its number, the atom at its other end

// Rings as lists of atoms: ring r is atoms[start[r]..start[r+1]); bonds[k] joins atoms[k] to the
// next atom of the ring.
typedef struct {
    int n, room, used, atom_room;
    int *start, *atoms, *bonds;
} RingList;

// An S group (substance group) of a mol block: an abbreviation, a polymer, data on atoms. What it
// says of each atom and bond, in bits: that it is in it; in its paragon (of a bond: drawn as
// crossing its boundary); an attachment atom.
enum { SG_IN = 1, SG_PARENT = 2, SG_CSTATE = 2, SG_ATTACH = 4 };

typedef struct {
    int id;
    Span type, field, query;     // such as DAT, MRV_IMPLICIT_H; of a query
    Span data, hydrogens;        // the first data; the last that begin with IMPL_H
    uint8_t *atoms, *bonds;
} SGroup;

typedef struct {
    int n_atoms, n_bonds, atom_room, bond_room;
    ChemAtom *atoms;
    ChemBond *bonds;
    SGroup *sgroups;        // by rising id
    int n_sgroups, sgroup_room;
    double (*xyz)[3];       // of every atom; used if has_xyz
    Link **first;           // bonds of atom i: first[i] to first[i + 1], in the order of creation
    int *atom_rings;        // number of rings an atom is in
    RingList rings;
    int has_xyz, is_3d, wedged;
    int is_smiles, redrawn; // bond directions are those of coordinates (or none), not of the text
    unsigned unread;        // parts of a CXSMILES extension, see CX_PARTS
    int stereo;             // one of TAG_KINDS
    int any_aromatic;       // 0: no atom or bond is, no need to look
    int had_aromatic;       // the input had some
    Arena arena;
} ChemMol;

// Empties m for the next record. Start from a zeroed struct; the owner calls mol_free().
static void mol_clear(ChemMol *m) {
    arena_reset(&m->arena);
    m->n_atoms = m->n_bonds = m->n_sgroups = m->sgroup_room = 0;
    m->sgroups = NULL;
    m->has_xyz = m->is_3d = m->wedged = m->had_aromatic = m->is_smiles = m->redrawn = 0;
    m->unread = 0;
    m->any_aromatic = 1;
    m->rings = (RingList){0};
}

// Frees everything m owns.
static void mol_free(ChemMol *m) {
    arena_free(&m->arena);
    FREE_ALL(m->atoms, m->bonds, m->xyz);
    *m = (ChemMol){0};
}

// Appends an atom of element z and returns its index.
static int mol_add_atom(ChemMol *m, int z) {
    if (m->n_atoms == m->atom_room) {
        m->atom_room = m->atom_room ? 2 * m->atom_room : 256;
        m->atoms = xrealloc(m->atoms, (size_t)m->atom_room, sizeof *m->atoms);
        m->xyz = xrealloc(m->xyz, (size_t)m->atom_room, sizeof *m->xyz);
    }
    ChemAtom *a = &m->atoms[m->n_atoms];
    *a = (ChemAtom){.z = (uint8_t)z, .map = -1, .implicit_h = -1};
    return m->n_atoms++;
}

// Appends a bond. The pointer holds until the next one is added.
static ChemBond *mol_add_bond(ChemMol *m, int begin, int end, int order) {
    if (m->n_bonds == m->bond_room) {
        m->bond_room = m->bond_room ? 2 * m->bond_room : 256;
        m->bonds = xrealloc(m->bonds, (size_t)m->bond_room, sizeof *m->bonds);
    }
    ChemBond *b = &m->bonds[m->n_bonds];
    *b = (ChemBond){.begin = begin, .end = end, .order = (uint8_t)order,
                    .aromatic = order == ORDER_AROMATIC};
    m->n_bonds++;
    return b;
}

// The number of bonds of an atom; the atom at the other end of a bond.
static inline int mol_degree(const ChemMol *m, int i) {
    return (int)(m->first[i + 1] - m->first[i]);
}

static inline int bond_other(const ChemBond *b, int i) { return b->begin == i ? b->end : b->begin; }

// The bond between two atoms, or -1.
// RDKit: ROMol::getBondBetweenAtoms
static int bond_between(const ChemMol *m, int i, int j) {
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++)
        if (l->atom == j) return l->index;
    return -1;
}

// Builds the adjacency lists. The bonds must join different atoms, see find_bad_bond().
static void mol_connect(ChemMol *m) {
    int *degree = arena_ints(&m->arena, m->n_atoms);
    Link *list = arena_take(&m->arena, 2 * (size_t)m->n_bonds, sizeof *list);
    m->first = arena_take(&m->arena, (size_t)m->n_atoms + 1, sizeof *m->first);
    for (int b = 0; b < m->n_bonds; b++) {
        degree[m->bonds[b].begin]++;
        degree[m->bonds[b].end]++;
    }
    m->first[m->n_atoms] = list + 2 * m->n_bonds;
    for (int i = 0; i < m->n_atoms; i++) m->first[i] = list += degree[i];  // where it ends
    for (int b = m->n_bonds - 1; b >= 0; b--) {
        ChemBond *bond = &m->bonds[b];
        *--m->first[bond->begin] = (Link){bond, b, bond->end};
        *--m->first[bond->end] = (Link){bond, b, bond->begin};
    }
}

// Connects a molecule as read. Returns a bond that joins an already bonded pair or an atom to
// itself (then there are no adjacency lists), or -1 if all is well.
static int find_bad_bond(ChemMol *m) {
    int bad = -1, *seen = arena_ints(&m->arena, m->n_atoms);
    for (int b = 0; b < m->n_bonds; b++)
        if (m->bonds[b].begin == m->bonds[b].end) return b;
    mol_connect(m);
    for (int i = 0; i < m->n_atoms; i++)
        for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
            if (seen[l->atom] == i + 1) bad = l->index;
            seen[l->atom] = i + 1;
        }
    return bad;
}

// How many ends of a bond are in an S group.
// RDKit: SubstanceGroup::getBondType
static int sgroup_ends(const ChemMol *m, const SGroup *g, int bond) {
    return (g->atoms[m->bonds[bond].begin] & SG_IN) + (g->atoms[m->bonds[bond].end] & SG_IN);
}

// Hydrogens on an atom that are not atoms themselves.
// RDKit: Atom::getTotalNumHs
static inline int atom_hydrogens(const ChemAtom *a) {
    return a->explicit_h + (a->no_implicit ? 0 : a->implicit_h);
}

// Neighbours and hydrogens; bonds and hydrogens, in units of single bonds.
// RDKit: Atom::getTotalDegree
static inline int total_degree(const ChemMol *m, int i) {
    return mol_degree(m, i) + atom_hydrogens(&m->atoms[i]);
}

static inline int total_valence(const ChemAtom *a) {
    return a->valence + (a->no_implicit ? 0 : a->implicit_h);
}

// Twice a bond's order, so that an aromatic bond counts 3 and no fractions appear.
// RDKit: getTwiceBondType
static inline int twice_order(const ChemBond *b) {
    static const int8_t twice[] = {0, 2, 4, 6, 8, 3, 2, 0};
    return twice[b->order];
}

// Twice what a bond adds to an atom's valence: a dative bond costs its donor (begin) nothing.
// RDKit: Bond::getValenceContrib
static inline int twice_contribution(const ChemBond *b, int i) {
    return b->order == ORDER_DATIVE && b->begin == i ? 0 : twice_order(b);
}

// The sum over all bonds of an atom; how many of them add nothing.
static inline int twice_bonds(const ChemMol *m, int i) {
    int twice = 0;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++) twice += twice_contribution(l->bond, i);
    return twice;
}

static int zero_bonds(const ChemMol *m, int i) {
    int n = 0;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++) n += !twice_contribution(l->bond, i);
    return n;
}

// The mirror image of a tetrahedral centre.
// RDKit: Atom::invertChirality
static int invert_chirality(int chirality) {
    return chirality == CHI_CW ? CHI_CCW : chirality == CHI_CCW ? CHI_CW : chirality;
}

// Whether a direction is / or \\; the other one of the two (any other direction stays).
static int is_sloped(int direction) { return direction == DIR_DOWN || direction == DIR_UP; }

static uint8_t opposite_direction(int direction) {
    return (uint8_t)(is_sloped(direction) ? DIR_DOWN + DIR_UP - direction : direction);
}

// Whether an atom is aromatic itself or has an aromatic bond (mol blocks mark only bonds).
// RDKit: isAromaticAtom
static int is_aromatic_atom(const ChemMol *m, int i) {
    if (!m->any_aromatic) return 0;
    if (m->atoms[i].aromatic) return 1;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++)
        if (l->bond->aromatic || l->bond->order == ORDER_AROMATIC) return 1;
    return 0;
}

// =================================================================================================
// 3 Mol blocks: three header lines, a counts line, then atoms and bonds in fixed columns (V2000) or
//   in free format (V3000). What follows `M  END` in an SD file is for prep/records.h. Water:
//
//     water                                                    title
//       program           3D                                   columns 21-22: 2D or 3D
//                                                              comment
//       3  2  0  0  0  0  0  0  0  0999 V2000                  atoms, bonds
//        -0.0344    0.9775    0.0076 O   0  0  0  0  0  0      x, y, z, symbol, mass, charge, ...
//         0.0648    0.0206    0.0015 H   0  0  0  0  0  0
//         0.8718    1.3008    0.0007 H   0  0  0  0  0  0
//       1  2  1  0                                             atom, atom, type, stereo
//       1  3  1  0
//     M  END                                                   after property lines, such as M  CHG
//
//   Many programs write such blocks and few write them by the book, so what is accepted here is
//   what RDKit accepts in its strict mode, down to columns that are blank or run into each other.
//   Refused is what RDKit reads as a query: atom lists, R-groups, "any" atoms and bonds, conditions
//   on rings or neighbours. They stand for many molecules, a dataset holds single ones. Hydrogen
//   counts of V2000 are queries, too, but common ones: a count takes an atom's implicit hydrogens
//   away, and a hydrogen that has one stays an atom.
// =================================================================================================

enum { RAW_ATOMS_MAX = 65535, RAW_BONDS_MAX = 4 * RAW_ATOMS_MAX };  // before hydrogens are removed

// A hash table from V3000 labels to atoms or bonds, see v3_labelled(). Size 0: it is V2000.
typedef struct { int *item, *label, size; } LabelTable;

// A block being read; atoms and bonds go to m.
typedef struct {
    Lines in;
    ChemMol *m;
    Fault *fault;
    int n_atoms, n_bonds;
    LabelTable labels[2];  // V3000: of atoms, of bonds
    int data_group, data_lines;  // whose S group data are not complete, and how many there are
    Span *tokens;        // of a V3000 line
    int token_room;
} MolBlock;

// The fault of the line last read; returns -1.
#define MOL_FAULT(b, column, ...) \
    fault_at((b)->fault, (b)->in.line, column, "malformed mol block", __VA_ARGS__)

#define QUERY "query, R-group or rare property"

// The fault of something that makes the block a query, or that is too rare to be implemented.
static int not_supported(MolBlock *b, Span what) {
    return fault_at(b->fault, b->in.line, 0, QUERY,
                    "%.*s is not supported", min_int(what.n, 60), what.p);
}

// Integer in columns [at, at + width) of an atom or bond line: only digits, signs and blanks are
// allowed there; if there are nothing but blanks, and one more, it reads on into the next field.
// *value stays if the line ends before. Returns 0 if there is anything else.
// RDKit: FileParserUtils::toInt
static inline int column_int(Span line, int at, int width, int *value) {
    int stop = at + width, from = at;
    if (line.n < stop) return 1;
    for (int k = at; k < stop; k++) {
        char c = line.p[k];
        if ((c < '0' || c > '9') && c != ' ' && c != '-' && c != '+') return 0;
    }
    while (from < line.n && line.p[from] == ' ') from++;
    *value = leading_int((Span){line.p + at, from > stop ? line.n - at : width}, 1);
    return 1;
}

// Whether a symbol is one of a search, not of an atom: "any atom", halogens, metals, R-groups.
static int is_query_symbol(Span s) {
    static const char *const names[] = {"A", "AH", "Q", "QH", "X", "XH", "M", "MH", "L", "LP",
                                        "R", "R#", "Pol", "Mod"};
    for (int k = 0; k < 14; k++)
        if (span_is(s, names[k])) return 1;
    return s.n > 1 && (s.p[0] == '[' || starts_with_word(s, "NOT") ||
                       (s.p[0] == 'R' && isdigit((unsigned char)s.p[1])));
}

// Adds the atom of an element symbol and returns its index, or -1 with the fault at a column.
// RDKit: ParseMolFileAtomLine, ParseV3000AtomSymbol
static int add_symbol(MolBlock *b, Span s, int column) {
    char symbol[2] = {s.n > 0 ? s.p[0] : 0, s.n > 1 ? s.p[1] : 0};
    if (symbol[1] >= 'A' && symbol[1] <= 'Z') symbol[1] = (char)(symbol[1] - 'A' + 'a');
    int z = element_number(symbol, s.n), isotope = 0;
    if (z < 0 && span_is(s, "*")) z = 0;
    if (z < 0 && (span_is(s, "D") || span_is(s, "T"))) z = 1, isotope = s.p[0] == 'D' ? 2 : 3;
    if (z < 0 && is_query_symbol(s)) return not_supported(b, s);
    if (z < 0)
        return fault_at(b->fault, b->in.line, column, "unknown element",
                        "expected an element symbol, found \"%.*s\"", min_int(s.n, 20), s.p);
    int i = mol_add_atom(b->m, z);
    b->m->atoms[i].isotope = (uint16_t)isotope;
    b->m->atoms[i].no_implicit = z == 0;
    return i;
}

// Fields of an atom line after the symbol.
// RDKit: ParseMolFileAtomLine
static int v2_atom_fields(MolBlock *b, Span line, ChemAtom *a) {
    enum { MASS, CHARGE, H_COUNT, VALENCE, MAP, UNUSED };
    static const struct { int at, width, slot; const char *name; } fields[] = {
        {34, 2, MASS, "mass difference"}, {36, 3, CHARGE, "charge"},
        {42, 3, H_COUNT, "hydrogen count"}, {48, 3, VALENCE, "valence"},
        {60, 3, MAP, "atom map number"}, {39, 3, UNUSED, "parity"},
        {45, 3, UNUSED, "stereo care flag"}, {54, 3, UNUSED, "reaction role"},
        {57, 3, UNUSED, "reaction component"}, {63, 3, UNUSED, "inversion flag"},
        {66, 3, UNUSED, "exact change flag"}};
    static const char zeros[] = " 0  0  0  0  0  0  0  0  0  0  0  0";  // as in most files
    int value[UNUSED + 1] = {0}, n = line.n - 34;
    if (n < (int)sizeof zeros && memcmp(line.p + 34, zeros, (size_t)n) == 0) return 0;
    for (int k = 0; k < 11; k++)
        if (!column_int(line, fields[k].at, fields[k].width, &value[fields[k].slot]))
            return MOL_FAULT(b, fields[k].at + 1, "expected a %s in columns %d-%d, found \"%.*s\"",
                             fields[k].name, fields[k].at + 1, fields[k].at + fields[k].width,
                             fields[k].width, line.p + fields[k].at);
    if (value[H_COUNT] > 0) a->no_implicit = a->query = 1;
    if (value[MASS]) a->isotope = (uint16_t)(ELEMENTS[a->z].isotope + value[MASS]);
    if (value[CHARGE]) a->charge = (int8_t)(4 - value[CHARGE]);
    a->field_valence = value[VALENCE];
    if (value[MAP] > 0) a->map = value[MAP];
    return 0;
}

// The usual form of a coordinate, "-1234.5678" in ten columns, blanks and one sign in front. The
// number is an exact integer over 10^4, so one division rounds it as strtod would. Returns 0 for
// any other form.
static int fixed_decimal(const char *p, double *value) {
    uint32_t digit[4], v = 0, largest = 0;
    int k = 0;
    while (k < 4 && p[k] == ' ') k++;
    int negative = p[k] == '-';
    for (k += negative; k < 5; k++) {
        digit[0] = (uint32_t)p[k] - '0';
        largest = digit[0] > largest ? digit[0] : largest;
        v = 10 * v + digit[0];
    }
    for (k = 0; k < 4; k++) {
        digit[k] = (uint32_t)p[6 + k] - '0';
        largest = digit[k] > largest ? digit[k] : largest;
    }
    v = 10000 * v + 1000 * digit[0] + 100 * digit[1] + 10 * digit[2] + digit[3];
    if (p[5] != '.' || largest > 9 || (uint32_t)p[10] - '0' <= 9) return 0;
    *value = (negative ? -(double)v : v) / 1e4;
    return 1;
}

// An atom line: x, y, z in ten columns each, the symbol in 32-34, then small integers.
// RDKit: ParseMolFileAtomLine
static int v2_atom_line(MolBlock *b, Span line) {
    double xyz[3];
    if (line.n < 34)
        return MOL_FAULT(b, line.n + 1, "expected an atom line of at least 34 columns, found %d",
                         line.n);
    for (int axis = 0; axis < 3; axis++) {
        const char *p = line.p + 10 * axis;
        if (fixed_decimal(p, &xyz[axis])) continue;
        for (int k = 0; k < 10; k++)
            if (p[k] == 0 || !strchr("0123456789 -+.,", p[k]))
                return MOL_FAULT(b, 10 * axis + k + 1, "expected a coordinate, found \"%.10s\"", p);
        xyz[axis] = parse_decimal((Span){p, line.n - 10 * axis});  // not cut off at ten columns
    }
    int i = add_symbol(b, trim((Span){line.p + 31, 3}), 32);
    if (i < 0) return -1;
    memcpy(b->m->xyz[i], xyz, sizeof xyz);
    return v2_atom_fields(b, line, &b->m->atoms[i]);
}

// Adds a bond of a mol block's type between two atoms. Types of queries stand for no bond until an
// S group says better, see apply_sgroups().
// RDKit: ParseMolFileBondLine, ParseV3000BondBlock
static ChemBond *add_typed_bond(MolBlock *b, int i, int j, int type) {
    static const uint8_t orders[] = {ORDER_NONE, ORDER_SINGLE, ORDER_DOUBLE, ORDER_TRIPLE,
                                     ORDER_AROMATIC, 0, 0, 0, 0, ORDER_DATIVE, ORDER_HYDROGEN};
    int known = type >= 0 && type <= 10 && (type < 5 || orders[type]);
    ChemBond *bond = mol_add_bond(b->m, i, j, known ? orders[type] : ORDER_NONE);
    if (!known) bond->query_line = b->in.line;
    return bond;
}

// A bond line: two atoms, type, stereo mark, (unused), topology, in three columns each.
// RDKit: ParseMolFileBondLine
static int v2_bond_line(MolBlock *b, Span line) {
    static const uint8_t directions[] = {DIR_NONE, DIR_WEDGE, DIR_NONE, DIR_EITHER, DIR_UNKNOWN,
                                         DIR_NONE, DIR_DASH};
    int v[3], stereo = 0, topology = 0;
    if (line.n < 9)
        return MOL_FAULT(b, line.n + 1, "expected a bond line of at least 9 columns, found %d",
                         line.n);
    for (int k = 0; k < 3; k++)
        if (!column_int(line, 3 * k, 3, &v[k]) || memchr(line.p + 3 * k, '-', 3))
            return MOL_FAULT(b, 3 * k + 1, "expected a number in columns %d-%d, found \"%.3s\"",
                             3 * k + 1, 3 * k + 3, line.p + 3 * k);
    for (int k = 0; k < 2; k++)
        if (v[k] < 1 || v[k] > b->m->n_atoms)
            return fault_at(b->fault, b->in.line, 3 * k + 1, "bond to a missing atom",
                            "expected an atom from 1 to %d, found %d", b->m->n_atoms, v[k]);
    ChemBond *bond = add_typed_bond(b, v[0] - 1, v[1] - 1, v[2] > 4 ? -1 : v[2]);
    if (!column_int(line, 9, 3, &stereo) || stereo < 0 || stereo > 6) stereo = 0;
    bond->direction = directions[stereo];
    if (stereo == 3) bond->stereo = STEREO_ANY;
    if (stereo && stereo != 4) b->m->wedged |= bond->direction != DIR_NONE;
    if (column_int(line, 15, 3, &topology) && (topology < 0 || topology > 2))
        return MOL_FAULT(b, 16, "expected a bond topology of 0 to 2, found %d", topology);
    return 0;  // in a ring or not is for searches, and what exporters say of every bond
}

// Integer of a property or counts line in [at, at + width); blanks give 0 and signs are taken
// lightly.
// RDKit: FileParserUtils::toInt, stripSpacesAndCast
static int property_int(MolBlock *b, Span line, int at, int width, int *value) {
    Span field = {line.p + at, min_int(line.n - at, width)};
    *value = 0;
    if (at <= line.n && (parse_whole(field, value) || loose_int(field, value))) return 0;
    return MOL_FAULT(b, at + 1, "expected a number in columns %d-%d, found \"%.*s\"", at + 1,
                     at + width, at <= line.n ? field.n : 0, line.p + (at <= line.n ? at : 0));
}

// The atom (or bond) with a label, through a hash table: label k is usually atom k, but need not
// be. With `add` >= 0 it is entered first; the first of equal labels counts. -1: none.
static int v3_labelled(MolBlock *b, int bond, int label, int add) {
    LabelTable *t = &b->labels[bond];
    unsigned mask = (unsigned)t->size - 1, slot = (unsigned)label * 2654435761u & mask;
    while (t->item[slot] && t->label[slot] != label && spend(&b->m->arena, 1))
        slot = (slot + 1) & mask;
    if (add >= 0 && !t->item[slot]) {
        t->item[slot] = add + 1;
        t->label[slot] = label;
    }
    return t->item[slot] - 1;
}

// ---- S groups. Few of them change a molecule, see apply_sgroups() and remove_hydrogens(), but a
//      malformed one costs the record, as in RDKit's strict mode.

static const char *const SGROUP_WORDS[] = {  // types, subtypes, connections
    "SRU MON COP CRO GRA MOD MER ANY COM MIX FOR SUP MUL DAT GEN", "ALT RAN BLO", "HH HT EU"};

// Whether a word stands in a list of words of one length.
static int is_listed(Span word, const char *list) {
    size_t n = strcspn(list, " ");
    if ((size_t)word.n != n) return 0;
    while (memcmp(list, word.p, n) != 0 && list[n]) list += n + 1;
    return memcmp(list, word.p, n) == 0;
}

// The fault of an S group; returns -1.
static int sgroup_bad(MolBlock *b, Span what) {
    return fault_at(b->fault, b->in.line, 0, "malformed S group", "malformed S group: \"%.*s\"",
                    min_int(what.n, 60), what.p);
}

// The atom (or bond) that a block calls by a number or label, -1: none.
// RDKit: ROMol::getAtomWithBookmark, getBondWithBookmark
static int marked(MolBlock *b, int bond, int mark) {
    if (b->labels[0].size) return v3_labelled(b, bond, mark, -1);
    return mark > 0 && mark <= (bond ? b->m->n_bonds : b->m->n_atoms) ? mark - 1 : -1;
}

// The S group of an id, NULL: none. With `add` a new one, NULL: there is one already.
static SGroup *sgroup_at(ChemMol *m, int id, int add) {
    int k = m->n_sgroups;
    while (k > 0 && m->sgroups[k - 1].id > id && spend(&m->arena, 1)) k--;
    int known = k > 0 && m->sgroups[k - 1].id == id;
    if (known || !add) return known && !add ? &m->sgroups[k - 1] : NULL;
    if (m->n_sgroups == m->sgroup_room)
        m->sgroups = arena_grow(&m->arena, m->sgroups, &m->sgroup_room, sizeof *m->sgroups);
    memmove(m->sgroups + k + 1, m->sgroups + k, (size_t)(m->n_sgroups++ - k) * sizeof(SGroup));
    m->sgroups[k] = (SGroup){.id = id, .atoms = arena_flags(&m->arena, m->n_atoms),
                             .bonds = arena_flags(&m->arena, m->n_bonds)};
    return &m->sgroups[k];
}

// Says something of an atom or bond. A paragon's atom must be in the group, a crossing bond cross.
// RDKit: SubstanceGroup::addAtomWithBookmark, addParentAtomWithBookmark, addCState
static int sgroup_add(MolBlock *b, SGroup *g, int bond, int mark, int bit, Span text) {
    int i = marked(b, bond, mark);
    uint8_t *said = bond ? g->bonds : g->atoms;
    if (i < 0 || (bit == SG_PARENT && !(said[i] & SG_IN)) ||
        (bit == SG_CSTATE && bond && sgroup_ends(b->m, g, i) != 1))
        return sgroup_bad(b, text);
    said[i] |= (uint8_t)bit;
    return 0;
}

static void sgroup_data(SGroup *g, Span data) {
    if (!g->data.p) g->data = data;
    if (starts_with(data, "IMPL_H")) g->hydrogens = (Span){data.p + 6, data.n - 6};
}

// One `M  S..` line. Lines of a group that no STY line announced are passed over, and those that
// say how a group is drawn; of data in several lines the last one counts.
// RDKit: ParseMolBlockProperties, MolSGroupParsing.cpp
static int v2_sgroup(MolBlock *b, Span line) {
    enum { SAL, SBL, SPA, SAP, SBV, STY, SST, SCN, SNC, SBT, SPL, SLB, SDT, SCD, SED, SMT,
           SCL, SDI, TAGS };
    static const char tags[] =
        "SAL SBL SPA SAP SBV STY SST SCN SNC SBT SPL SLB SDT SCD SED SMT SCL SDI";
    static const uint8_t bits[] = {SG_IN, SG_IN, SG_PARENT, SG_ATTACH, SG_CSTATE};
    int k = 0, n = 1, id, v = 0, at;
    SGroup *g;
    while (k < TAGS && (line.n < 6 || memcmp(tags + 4 * k, line.p + 3, 3) != 0)) k++;
    if (k == TAGS) return 0;
    if (k >= STY && k <= SLB) {  // pairs of a group and what it is
        if (property_int(b, line, 7, 2, &n)) return -1;
        for (at = 9; n; n--, at += 8) {
            Span word = {line.p + at + 5, k == SCN ? 2 : 3};
            if (line.n < at + 5 + word.n) return sgroup_bad(b, line);
            if (property_int(b, line, at + 1, 3, &id)) return -1;
            if (!(g = sgroup_at(b->m, id, k == STY)) && k != STY) return 0;
            if (k > SCN && property_int(b, line, at + 5, 3, &v)) return -1;
            if ((k <= SCN && !is_listed(word, SGROUP_WORDS[k - STY])) || (k == SBT && v >> 1) ||
                (k == SNC && (v < 0 || v > 256)))
                return sgroup_bad(b, line);
            if (k == STY && g) g->type = word;
        }
        return 0;
    }
    if (property_int(b, line, 7, 3, &id)) return -1;
    if (!(g = sgroup_at(b->m, id, 0))) return 0;
    if ((k < SBV || k == SDI) && property_int(b, line, 11, 2, &n)) return -1;
    for (at = 13; k == SDI && at < min_int(line.n, 53); at++)
        if (!strchr("0123456789 +-.,", line.p[at])) return sgroup_bad(b, line);
    if (k == SDI) return n == 4 && line.n >= 43 ? 0 : sgroup_bad(b, line);
    for (at = k == SBV ? 10 : 13; k < STY && n; n--, at += k == SAP ? 11 : 4) {
        if (line.n < at + (k == SAP ? 11 : 4)) return sgroup_bad(b, line);
        if (property_int(b, line, at + 1, 3, &v) ||
            sgroup_add(b, g, k == SBL || k == SBV, v, bits[k], line)) return -1;
        if (k == SAP && property_int(b, line, at + 5, 3, &v)) return -1;
        if (k == SAP && v && marked(b, 0, v) < 0) return sgroup_bad(b, line);  // the leaving atom
    }
    Span field = trim_right((Span){line.p + 11, min_int(line.n - 11, k == SDT ? 30 : 69)});
    Span query = trim_right((Span){line.p + 63, min_int(line.n - 63, 2)});
    if (k == SDT && field.n > 0) g->field = field;
    if (k == SDT && query.n > 0) g->query = query;
    if (k < SCD) return 0;
    if (k >= SMT) return line.n > 11 ? 0 : sgroup_bad(b, line);
    if (b->data_group && b->data_group != id) return sgroup_bad(b, line);
    b->data_group = k == SED ? 0 : id;
    b->data_lines = k == SED ? 0 : b->data_lines + 1;
    if (b->data_lines > 3) return sgroup_bad(b, line);
    if (k == SED && line.n > 11) sgroup_data(g, field);
    return 0;
}

// A property line of index-value pairs, four columns each, after a three-column count.
// RDKit: ParseChargeLine, ParseRadicalLine, ParseIsotopeLine
static int v2_pairs(MolBlock *b, Span line, const char *tag) {
    int count, index, value;
    if (property_int(b, line, 6, 3, &count)) return -1;
    for (int k = 0, at = 9; k < count; k++, at += 8) {
        if (property_int(b, line, at, 4, &index)) return -1;
        if (*tag == 'I' && trim((Span){line.p + at + 4, line.n - at - 4}).n <= 0) break;
        if (property_int(b, line, at + 4, 4, &value)) return -1;
        if (index < 1 || index > b->m->n_atoms)
            return MOL_FAULT(b, 0, "M  %s names atom %d, expected 1 to %d", tag, index,
                             b->m->n_atoms);
        ChemAtom *a = &b->m->atoms[index - 1];
        if (*tag == 'R' && (value < 1 || value > 3))
            return MOL_FAULT(b, 0, "expected a radical of 1, 2 or 3 on atom %d, found %d", index,
                             value);
        if (*tag == 'C') a->charge = (int8_t)value;
        if (*tag == 'R') a->radicals = value == 2 ? 1 : 2;
        if (*tag == 'I' && value >= 0) a->isotope = (uint16_t)value;
    }
    return 0;
}

// One line of the property block. *charged: whether a CHG or RAD line was seen, the first of which
// replaces the charges of the atom lines.
// RDKit: ParseMolBlockProperties
static int v2_property(MolBlock *b, Span line, int *charged) {
    static const char *const tags[] = {"CHG", "RAD", "ISO", "ALS", "RGP", "SUB", "UNS", "RBC",
                                       "ZBO", "ZCH", "HYD", "CRS"};
    Span skipped, tag = {line.p + 3, line.n - 3};
    int count, k = 0;
    if (starts_with(line, "G")) {
        next_line(&b->in, &skipped);  // the abbreviation itself
    } else if (starts_with(line, "A") || starts_with(line, "V")) {
        if (property_int(b, line, 3, 3, &count)) return -1;
        if (line.n < 7 - 2 * (line.p[0] == 'A') || line.p[1] != ' ' || count < 1 ||
            count > b->m->n_atoms)
            return MOL_FAULT(b, 1, "expected an alias or value of an atom from 1 to %d",
                             b->m->n_atoms);
        if (line.p[0] == 'A') next_line(&b->in, &skipped);  // the alias itself
    } else if (starts_with(line, "S  SKP")) {
        if (property_int(b, line, 6, 3, &count)) return -1;
        while (count-- > 0 && next_line(&b->in, &skipped)) {}
    } else if (starts_with(line, "M  ")) {
        while (k < 12 && !starts_with(tag, tags[k])) k++;
        if (k < 2 && !*charged)
            for (int i = 0; i < b->m->n_atoms; i++) b->m->atoms[i].charge = 0;
        *charged |= k < 2;
        if (k < 3) return v2_pairs(b, line, tags[k]);
        if (k < 12) return not_supported(b, (Span){line.p, 6});
        if (starts_with(tag, "S")) return v2_sgroup(b, line);
        count = -1;
        if (line.n > 9) parse_whole((Span){line.p + 7, 3}, &count);
        if (starts_with(tag, "PXA") && (count < 1 || count > b->m->n_atoms))
            return MOL_FAULT(b, 8, "expected an atom from 1 to %d", b->m->n_atoms);
    }
    return 0;
}

// The property block, up to and including `M  END`. It begins at once: the old form of an atom
// list, "  1 F    2   6   7", would stand before it.
// RDKit: ParseMolBlockProperties
static int v2_properties(MolBlock *b) {
    Span line;
    int charged = 0, any = next_line(&b->in, &line);
    if (any && line.n == 0)
        return MOL_FAULT(b, 1, "expected a property line or M  END, found a blank line");
    if (any && !strchr("MAVGS$", line.p[0])) return not_supported(b, line);
    for (; any; any = next_line(&b->in, &line)) {
        if (starts_with(line, "M  END")) return 0;
        if (v2_property(b, line, &charged)) return -1;
    }
    return fault_at(b->fault, b->in.line, 0, "M  END is missing",
                    "expected M  END, found the end of the record");
}

// Atoms, bonds and properties of a V2000 block, as many as the counts line says.
// RDKit: ParseV2000CTAB
static int v2_body(MolBlock *b) {
    Span line;
    for (int k = 0; k < b->n_atoms; k++) {
        if (!next_line(&b->in, &line))
            return MOL_FAULT(b, 0, "expected %d atom lines, found %d", b->n_atoms, k);
        if (v2_atom_line(b, line)) return -1;
    }
    for (int k = 0; k < b->n_bonds; k++) {
        if (!next_line(&b->in, &line))
            return MOL_FAULT(b, 0, "expected %d bond lines, found %d", b->n_bonds, k);
        if (v2_bond_line(b, line)) return -1;
    }
    return v2_properties(b);
}

// ---- V3000

// Next V3000 line without its "M  V30 "; lines that end in '-' go on in the next one, and are
// joined in the molecule's arena.
// RDKit: getV3000Line
static int v3_line(MolBlock *b, Span *out) {
    Span line;
    char *joined = NULL;
    int room = 0, used = 0;
    for (;;) {
        if (!next_line(&b->in, &line) || !starts_with(line, "M  V30 "))
            return MOL_FAULT(b, 1, "expected \"M  V30 \", found \"%.*s\"",
                             min_int(line.n, 20), line.p);
        int more = line.p[line.n - 1] == '-' && line.n > 7;
        *out = (Span){line.p + 7, line.n - 7 - more};
        if (!more && !joined) return 0;
        while (!joined || used + out->n > room) joined = arena_grow(&b->m->arena, joined, &room, 1);
        memcpy(joined + used, out->p, (size_t)out->n);
        used += out->n;
        *out = (Span){joined, used};
        if (!more) return 0;
    }
}

// Splits a line at blanks, except inside "..." and (...), into b->tokens. Returns their number.
// RDKit: tokenizeV3000Line
static int v3_tokens(MolBlock *b, Span line) {
    int n = 0, start = 0, quoted = 0, inside = 0;
    line = trim(line);
    for (int pos = 0; pos <= line.n && spend(&b->m->arena, 1); pos++) {
        char c = pos < line.n ? line.p[pos] : 0;
        int cut_from = -1, cut_to = pos;
        if (pos == line.n) {
            if (start < pos) cut_from = start;
        } else if (c == ' ' || c == '\t') {
            if (start == pos) start++;
            else if (!quoted && !inside) cut_from = start;
        } else if (c == ')' && inside) {
            cut_from = start;
            cut_to = pos + 1;
            inside = 0;
        } else if (c == '(' && !quoted) {
            inside = 1;
        } else if (c == '"' && !inside) {
            if (pos + 1 < line.n && line.p[pos + 1] == '"') pos++;
            else if (quoted) cut_from = start + 1, quoted = 0;
            else quoted = 1;
        }
        if (cut_from >= 0) {
            if (n == b->token_room)
                b->tokens = arena_grow(&b->m->arena, b->tokens, &b->token_room, sizeof *b->tokens);
            b->tokens[n++] = (Span){line.p + cut_from, cut_to - cut_from};
            start = pos + 1;
        }
    }
    return n;
}

// Splits NAME=value. Returns 0 if the token is anything else.
// RDKit: splitAssignToken
static int v3_assignment(Span token, Span *name, Span *value) {
    const char *eq = memchr(token.p, '=', (size_t)token.n);
    if (!eq) return 0;
    *name = (Span){token.p, (int)(eq - token.p)};
    *value = (Span){eq + 1, token.n - name->n - 1};
    return memchr(value->p, '=', (size_t)value->n) == NULL;
}

// The fault of a V3000 token that is not what was expected.
static int v3_bad(MolBlock *b, Span token, const char *expected) {
    return MOL_FAULT(b, 0, "expected %s, found \"%.*s\"", expected, min_int(token.n, 60), token.p);
}

// One NAME=value of an atom line. Values RDKit ignores or keeps as notes are passed over.
// RDKit: ParseV3000AtomProps
static int v3_atom_property(MolBlock *b, ChemAtom *a, Span token) {
    static const char *const queries[] = {"UNSAT", "HCOUNT", "RBCNT", "SUBST", "RGROUPS"};
    Span name, value;
    int v = 0;
    if (!v3_assignment(token, &name, &value)) return v3_bad(b, token, "NAME=value");
    int whole = loose_int(value, &v);
    if (word_is(name, "CHG")) {
        if (!whole) return v3_bad(b, token, "a charge");
        if (a->z) a->charge = (int8_t)v;
    } else if (word_is(name, "RAD")) {
        if (!whole || v < 0 || v > 3) return v3_bad(b, token, "a radical of 0 to 3");
        if (v) a->radicals = v == 2 ? 1 : 2;
    } else if (word_is(name, "MASS")) {
        double mass = whole ? v : floor(parse_decimal(value));
        if (!(mass >= 0 && mass <= INT_MAX)) return v3_bad(b, token, "a mass");
        if (a->z) a->isotope = (uint16_t)(int)mass;
    } else if (word_is(name, "CFG")) {
        if (!whole || v < 0 || v > 3) return v3_bad(b, token, "a configuration of 0 to 3");
    } else if (word_is(name, "VAL")) {
        if (!whole) return v3_bad(b, token, "a valence");
        a->field_valence = v;
    }
    for (int k = 0; k < 5; k++)
        if (word_is(name, queries[k]) && !span_is(value, "0")) return not_supported(b, token);
    return 0;
}

// "index symbol x y z map NAME=value ...".
// RDKit: ParseV3000AtomBlock
static int v3_atom_line(MolBlock *b, Span line) {
    int n = v3_tokens(b, line);
    const Span *token = b->tokens;
    if (n < 6)
        return MOL_FAULT(b, 0, "expected index, symbol, x, y, z and map number, found %d fields",
                         n);
    int i = add_symbol(b, trim(token[1]), (int)(token[1].p - line.p) + 8);
    if (i < 0) return -1;
    v3_labelled(b, 0, leading_int(token[0], 0), i);
    for (int axis = 0; axis < 3; axis++) b->m->xyz[i][axis] = parse_decimal(token[2 + axis]);
    int map = leading_int(token[5], 1);
    if (map > 0) b->m->atoms[i].map = map;
    for (int k = 6; k < n; k++)
        if (v3_atom_property(b, &b->m->atoms[i], token[k])) return -1;
    return 0;
}

// "index type atom1 atom2 NAME=value ...".
// RDKit: ParseV3000BondBlock
static int v3_bond_line(MolBlock *b, Span line) {
    Span name, value;
    int n = v3_tokens(b, line), end[2];
    const Span *token = b->tokens;
    if (n < 4) return MOL_FAULT(b, 0, "expected index, type and two atoms, found %d fields", n);
    int type = leading_int(token[1], 0);
    for (int k = 0; k < 2; k++) {
        end[k] = v3_labelled(b, 0, leading_int(token[2 + k], 0), -1);
        if (end[k] < 0)
            return fault_at(b->fault, b->in.line, (int)(token[2 + k].p - line.p) + 8,
                            "bond to a missing atom",
                            "expected the index of an atom, found \"%.*s\"",
                            min_int(token[2 + k].n, 20), token[2 + k].p);
    }
    ChemBond *bond = add_typed_bond(b, end[0], end[1], type);
    v3_labelled(b, 1, leading_int(token[0], 0), b->m->n_bonds - 1);
    for (int k = 4; k < n; k++) {
        if (!v3_assignment(token[k], &name, &value)) return v3_bad(b, token[k], "NAME=value");
        if (word_is(name, "TOPO") && (value.n != 1 || value.p[0] < '0' || value.p[0] > '2'))
            return v3_bad(b, token[k], "a topology of 0 to 2");
        if (!word_is(name, "CFG")) continue;
        int cfg = leading_int(value, 0);
        if (cfg > 3) return v3_bad(b, token[k], "a configuration of 0 to 3");
        if (cfg == 1) bond->direction = DIR_WEDGE;
        if (cfg == 3) bond->direction = DIR_DASH;
        if (cfg == 1 || cfg == 3) b->m->wedged = 1;
        if (cfg == 2 && type == 1) bond->direction = DIR_UNKNOWN;
        if (cfg == 2 && type == 2) bond->direction = DIR_EITHER, bond->stereo = STEREO_ANY;
    }
    return 0;
}

// The next line, which must start with a word.
static int v3_expect(MolBlock *b, const char *word, Span *line) {
    if (v3_line(b, line)) return -1;
    return starts_with_word(*line, word) ? 0 : v3_bad(b, *line, word);
}

// A block of `count` lines between two others, each read by read_line.
static int v3_block(MolBlock *b, const char *begin, const char *end, int count,
                    int (*read_line)(MolBlock *, Span)) {
    Span line;
    if (count == 0) return 0;
    if (v3_expect(b, begin, &line)) return -1;
    for (int k = 0; k < count; k++)
        if (v3_line(b, &line) || read_line(b, line)) return -1;
    return v3_expect(b, end, &line);
}

// The next value, which is passed: a word, (a list) or "a string", in which "" is a quote.
// RDKit: ParseV3000StringPropLabel
static Span next_value(Span *s) {
    while (s->n > 0 && is_blank(*s->p)) s->p++, s->n--;
    char open = s->n > 0 ? *s->p : 0, close = open == '(' ? ')' : open == '"' ? '"' : 0;
    int n = close != 0;
    for (; n < s->n && (close ? s->p[n] != close : !is_blank(s->p[n]));) n++;
    while (close == '"' && n + 1 < s->n && s->p[n + 1] == '"')  // "" within
        for (n += 2; n < s->n && s->p[n] != '"';) n++;
    Span value = {s->p + (close != 0), n - (close != 0)};
    n = min_int(n + (close != 0), s->n);
    *s = (Span){s->p + n, s->n - n};
    return trim_right(value);
}

// One LABEL=value of an S group. Lists begin with their length, but that of a crossing bond goes on
// with coordinates, that of an attachment atom with the atom that leaves and a name.
// RDKit: ParseV3000ParseLabel, ParseV3000Array, ParseV3000CStateLabel, ParseV3000SAPLabel
static int v3_sgroup_label(MolBlock *b, SGroup *g, Span label, Span value) {
    enum { CSTATE = 4, SAP, LISTS };
    static const struct { const char *label; int bond, bit; } lists[LISTS] = {
        {"ATOMS", 0, SG_IN}, {"PATOMS", 0, SG_PARENT}, {"XBONDS", 1, SG_IN}, {"CBONDS", 1, SG_IN},
        {"CSTATE", 1, SG_CSTATE}, {"SAP", 0, SG_ATTACH}};
    int k = 0, v, n = 0, fine = 1;
    while (k < LISTS && !span_is(label, lists[k].label)) k++;
    if (k < LISTS) {
        Span rest = value, item = next_value(&rest);
        fine = parse_whole(item, &n) && n >= 0;
        if (k == CSTATE) fine = fine && n == (span_is(g->type, "SUP") ? 4 : 1);
        for (int i = 0; fine && i < (k < CSTATE ? n : 1); i++) {
            fine = parse_whole(next_value(&rest), &v);
            if (fine && sgroup_add(b, g, lists[k].bond, v, lists[k].bit, value)) return -1;
        }
        item = next_value(&rest);
        if (k < CSTATE) fine = fine && !item.n;
        if (k == SAP) fine = fine && rest.n && (word_is(item, "aidx") ||
                             (loose_int(item, &v) && (!v || marked(b, 0, v) >= 0)));
    }
    if (span_is(label, "FIELDNAME")) g->field = value;
    if (span_is(label, "QUERYTYPE")) g->query = value;
    if (span_is(label, "FIELDDATA")) sgroup_data(g, value);
    if (span_is(label, "SUBTYPE")) fine = is_listed(value, SGROUP_WORDS[1]);
    if (span_is(label, "CONNECT")) fine = is_listed(value, SGROUP_WORDS[2]);
    return fine ? 0 : sgroup_bad(b, value);
}

// The block of n V3000 S groups, "id type id2 LABEL=value ...". *line: what follows END SGROUP.
// RDKit: ParseV3000SGroupsBlock
static int v3_sgroups(MolBlock *b, int n, Span *line) {
    if (!starts_with_word(*line, "BEGIN SGROUP")) return v3_bad(b, *line, "BEGIN SGROUP");
    if (v3_line(b, line)) return -1;
    if (starts_with(*line, "DEFAULT")) return not_supported(b, *line);
    for (int id; n && spend(&b->m->arena, 1); n--) {
        Span s = trim(*line), word = next_value(&s), type = next_value(&s);
        int fine = parse_whole(word, &id) && is_listed(type, SGROUP_WORDS[0]);
        SGroup *g = fine ? sgroup_at(b->m, id, 1) : NULL;
        if (!g) return sgroup_bad(b, *line);
        g->type = type;
        fine = parse_whole(next_value(&s), &id);  // another id
        while (fine && s.n > 0) {
            const char *equals = memchr(s.p, '=', (size_t)s.n);
            Span label = {s.p + 1, (int)((equals ? equals : s.p + s.n) - s.p) - 1};
            Span rest = {label.p + label.n + 1, s.n - label.n - 2};
            if (*s.p != ' ') return sgroup_bad(b, s);
            Span value = next_value(&rest);
            if (v3_sgroup_label(b, g, label, value)) return -1;
            s = rest;
        }
        if (v3_line(b, line)) return -1;
    }
    return starts_with_word(*line, "END SGROUP") ? v3_line(b, line)
                                                 : v3_bad(b, *line, "END SGROUP");
}

// Everything between the counts line of the header and `M  END`.
// RDKit: ParseV3000CTAB
static int v3_body(MolBlock *b) {
    Span line;
    if (b->n_atoms || b->n_bonds)
        return MOL_FAULT(b, 1, "expected counts of 0 in the header of a V3000 block");
    if (v3_expect(b, "BEGIN CTAB", &line) || v3_expect(b, "COUNTS ", &line)) return -1;
    int n = v3_tokens(b, line), n_groups = 0, n_3d = 0;
    const Span *token = b->tokens;
    if (n < 3 || !parse_whole(token[1], &b->n_atoms) || !parse_whole(token[2], &b->n_bonds) ||
        b->n_atoms < 0 || b->n_bonds < 0 || (n > 3 && !loose_int(token[3], &n_groups)) ||
        (n > 4 && !loose_int(token[4], &n_3d)))
        return v3_bad(b, line, "COUNTS atoms bonds");
    if (b->n_atoms > RAW_ATOMS_MAX || b->n_bonds > RAW_BONDS_MAX)
        return fault_at(b->fault, b->in.line, 0,
                        b->n_atoms > RAW_ATOMS_MAX ? "too many atoms" : "too many bonds",
                        "%d atoms, %d bonds (at most %d and %d can be read)", b->n_atoms,
                        b->n_bonds, RAW_ATOMS_MAX, RAW_BONDS_MAX);
    for (int k = 0, size = 64; k < 2; k++) {
        while (size < 2 * (k ? b->n_bonds : b->n_atoms)) size *= 2;
        b->labels[k] = (LabelTable){arena_ints(&b->m->arena, size),
                                    arena_ints(&b->m->arena, size), size};
    }
    if (v3_block(b, "BEGIN ATOM", "END ATOM", b->n_atoms, v3_atom_line) ||
        v3_block(b, "BEGIN BOND", "END BOND", b->n_bonds, v3_bond_line))
        return -1;
    do if (v3_line(b, &line)) return -1;
    while (starts_with_word(line, "LINKNODE"));
    if (n_groups && v3_sgroups(b, n_groups, &line)) return -1;
    while (starts_with_word(line, "BEGIN ")) {  // collections and the like change no feature
        do if (v3_line(b, &line)) return -1;
        while (!starts_with_word(line, "END"));
        if (v3_line(b, &line)) return -1;
    }
    if (n_3d || !starts_with_word(line, "END CTAB")) return v3_bad(b, line, "END CTAB");
    if (!next_line(&b->in, &line) || !starts_with(line, "M  END"))
        return fault_at(b->fault, b->in.line, 0, "M  END is missing",
                        "expected M  END, found \"%.*s\"", min_int(line.n, 40), line.p);
    return 0;
}

// The counts line: atoms and bonds in three columns each, version in columns 35-39.
// RDKit: MolDataStreamToMol
static int counts_line(MolBlock *b, int *v3000) {
    Span line;
    if (!next_line(&b->in, &line) || line.n < 6)
        return MOL_FAULT(b, 1, "expected a counts line, found \"%.*s\"",
                         min_int(line.n, 40), line.p);
    if (property_int(b, line, 0, 3, &b->n_atoms) || property_int(b, line, 3, 3, &b->n_bonds))
        return -1;
    if (b->n_atoms < 0 || b->n_bonds < 0) return MOL_FAULT(b, 1, "negative counts");
    Span version = {line.p + 34, line.n > 35 ? line.n - 34 : 0};
    *v3000 = starts_with(version, "V3000");
    if (version.n && !*v3000 && !starts_with(version, "V2000"))
        return MOL_FAULT(b, 35, "expected V2000 or V3000, found \"%.*s\"",
                         min_int(version.n, 5), version.p);
    return 0;
}

// Reads the mol block at the beginning of a record into m; `rest` is what follows M  END.
// RDKit: MolDataStreamToMol
static int read_mol_block(ChemMol *m, Lines *rest, Span *title, Fault *fault) {
    MolBlock b = {.in = *rest, .m = m, .fault = fault};
    Span line;
    int v3000 = 0;
    next_line(&b.in, title);
    next_line(&b.in, &line);
    int tagged_3d = line.n >= 22 && line.p[20] == '3' && (line.p[21] == 'D' || line.p[21] == 'd');
    next_line(&b.in, &line);
    if (counts_line(&b, &v3000) || (v3000 ? v3_body(&b) : v2_body(&b))) return -1;
    m->has_xyz = m->redrawn = 1;
    m->is_3d = tagged_3d && m->n_atoms > 0;
    for (int i = 0; i < m->n_atoms && !m->is_3d; i++) m->is_3d = m->xyz[i][2] != 0.0;
    *rest = b.in;
    return 0;
}

// =================================================================================================
// 4 SMILES: OpenSMILES with what RDKit adds to it: dative bonds -> and <-, ring numbers %(123),
//   atoms [#6], any-bond ~, and of a CXSMILES extension, |...| behind a blank, what features show:
//
//     ^1:0,2  radicals     C:0.1 H:0.1  dative and hydrogen bonds     (x,y,z;x,y,z)  coordinates
//     w:0.1  wavy bonds, wU: and wD: wedges     c:2 t:2 ctu:2  double bonds
// =================================================================================================

// A bond symbol as read; no symbol is an unspecified bond without direction.
typedef struct { uint8_t order, direction, unspecified, reversed; } BondSymbol;

// A ring number at an atom. Bonds are made of pairs of them when all atoms are there.
typedef struct { int atom, number, column, bond, chain; BondSymbol symbol; } RingMark;

typedef struct {
    ChemMol *m;
    Fault *fault;
    const char *text;
    int n, pos;
    int active;             // the atom the next bond starts at
    int n_branches, branch_room, *branches;
    int n_marks, mark_room;
    RingMark *marks;        // as written, later by number
    int *columns;           // of a ring bond at its two atoms: begin, end; plus 1
} SmilesReader;

// The fault of a character that is not what was expected.
static int smiles_fault(SmilesReader *s, int at, const char *expected) {
    char found[16] = "the end";
    int c = at < s->n ? (unsigned char)s->text[at] : ' ';
    if (at < s->n) snprintf(found, sizeof found, c > 32 && c < 127 ? "\"%c\"" : "byte %d", c);
    return fault_at(s->fault, 1, at + 1, "malformed SMILES", "expected %s, found %s", expected,
                    found);
}

// The character so far ahead of the cursor, 0 at the end.
static int smiles_peek(const SmilesReader *s, int ahead) {
    return s->pos + ahead < s->n ? (unsigned char)s->text[s->pos + ahead] : 0;
}

// Whether `text` comes next; if so it is passed.
static inline int smiles_take(SmilesReader *s, const char *text) {
    int n = 0;
    for (; text[n]; n++)
        if (smiles_peek(s, n) != text[n]) return 0;
    s->pos += n;
    return 1;
}

// A number without leading zeros into *value, if a digit comes next; 1 if there was one, -1 if it
// is too large.
static int smiles_number(SmilesReader *s, int *value) {
    int64_t v = 0;
    int start = s->pos;
    while (isdigit(smiles_peek(s, 0)) && v <= INT_MAX) {
        v = 10 * v + (smiles_peek(s, 0) - '0');
        s->pos++;
        if (v == 0) break;
    }
    if (v > INT_MAX) return smiles_fault(s, start, "a number below 2147483648");
    if (s->pos == start) return 0;
    *value = (int)v;
    return 1;
}

// Adds the element symbol at the cursor as an atom and returns its index, or -1. In brackets all
// elements are allowed, outside only B C N O P S F Cl Br I, b c n o p s and *.
// RDKit: smiles.yy, simple_atom
static int smiles_element(SmilesReader *s, int bracket) {
    static const char *const aromatic[] = {"si", "as", "se", "te", "b", "c", "n", "o", "p", "s"};
    char c = (char)smiles_peek(s, 0), d = (char)smiles_peek(s, 1), pair[2] = {c, d};
    if (smiles_take(s, "*")) return mol_add_atom(s->m, 0);
    for (int k = bracket ? 0 : 4; k < 10; k++) {
        if (!smiles_take(s, aromatic[k])) continue;
        char upper[2] = {(char)toupper((unsigned char)c), aromatic[k][1]};
        int i = mol_add_atom(s->m, element_number(upper, aromatic[k][1] ? 2 : 1));
        s->m->atoms[i].aromatic = 1;
        return i;
    }
    int z = c >= 'A' && c <= 'Z' && d >= 'a' && d <= 'z' ? element_number(pair, 2) : -1;
    if (z > 0 && (bracket || z == 17 || z == 35)) {
        s->pos += 2;
        return mol_add_atom(s->m, z);
    }
    z = c ? element_number(&c, 1) : -1;
    if (z < 0 || (!bracket && !strchr("BCNOPSFI", c))) return -1;
    s->pos++;
    return mol_add_atom(s->m, z);
}

// Chirality: @, @@, @TH1, @TH2. The classes of other geometries (@AL, @SP, @TB, @OH) are refused.
// RDKit: smiles.yy, chiral_element
static int smiles_chirality(SmilesReader *s, ChemAtom *a) {
    int start = s->pos + 1, permutation = 1;
    if (!smiles_take(s, "@")) return 0;
    a->chirality = CHI_CCW;
    if (smiles_take(s, "@")) {
        a->chirality = CHI_CW;
    } else if (smiles_take(s, "TH")) {
        if (smiles_number(s, &permutation) < 0) return -1;
        if (permutation > 2) return smiles_fault(s, start, "TH1 or TH2");
        if (permutation == 2) a->chirality = CHI_CW;
    } else if (smiles_take(s, "AL") || smiles_take(s, "SP") || smiles_take(s, "TB") ||
               smiles_take(s, "OH")) {
        return fault_at(s->fault, 1, start + 1, "rare chirality class",
                        "@%.2s is not supported, only @, @@, @TH1 and @TH2", s->text + start);
    }
    return 0;
}

// A charge: +, ++, +2, -, --, -2.
// RDKit: smiles.yy, charge_element
static int smiles_charge(SmilesReader *s, ChemAtom *a) {
    int sign = smiles_peek(s, 0) == '+' ? 1 : smiles_peek(s, 0) == '-' ? -1 : 0, value = 1;
    if (!sign) return 0;
    s->pos++;
    if (smiles_take(s, sign > 0 ? "+" : "-")) value = 2;
    else if (smiles_number(s, &value) < 0) return -1;
    a->charge = (int8_t)(sign * value);
    return 0;
}

// What stands in brackets: isotope, element, chirality (not on H), hydrogens, charge, map number.
// RDKit: smiles.yy, atomd
static int smiles_bracket(SmilesReader *s) {
    int isotope = 0, i, z = 0, count = 0, map, got;
    if (smiles_number(s, &isotope) < 0) return -1;
    if (smiles_take(s, "#")) {
        got = smiles_number(s, &z);
        if (got < 0) return -1;
        if (!got || z > Z_MAX) return smiles_fault(s, s->pos, "an atomic number up to 118");
        i = mol_add_atom(s->m, z);
    } else {
        int at = s->pos, quoted = smiles_take(s, "'");  // some programs write ['Db']
        i = smiles_element(s, 1);
        if (i < 0 || (quoted && s->m->atoms[i].z < 104))
            return smiles_fault(s, quoted ? at : s->pos, "an element symbol");
        if (quoted && !smiles_take(s, "'")) return smiles_fault(s, s->pos, "'");
    }
    ChemAtom *a = &s->m->atoms[i];
    a->isotope = (uint16_t)isotope;
    a->no_implicit = 1;
    if (a->z != 1 && smiles_chirality(s, a)) return -1;
    if (smiles_take(s, "H")) {
        count = 1;
        if (smiles_number(s, &count) < 0) return -1;
    }
    a->explicit_h = (uint16_t)min_int(count, UINT16_MAX);
    if (smiles_charge(s, a)) return -1;
    if (smiles_take(s, ":")) {
        got = smiles_number(s, &map);
        if (got < 0) return -1;
        if (!got) return smiles_fault(s, s->pos, "a map number");
        a->map = map;
    }
    return smiles_take(s, "]") ? i : smiles_fault(s, s->pos, "]");
}

// An atom at the cursor; returns its index or -1.
static int smiles_atom(SmilesReader *s) {
    if (s->m->n_atoms >= RAW_ATOMS_MAX)
        return fault_at(s->fault, 1, s->pos + 1, "too many atoms", "more than %d atoms",
                        RAW_ATOMS_MAX);
    if (smiles_take(s, "[")) return smiles_bracket(s);
    int i = smiles_element(s, 0);
    return i < 0 ? smiles_fault(s, s->pos, "an atom") : i;
}

// A bond symbol at the cursor, if there is one.
// RDKit: smiles.yy, bondd
static BondSymbol smiles_bond(SmilesReader *s) {
    static const struct { const char *text; BondSymbol symbol; } known[] = {
        {"->", {ORDER_DATIVE, 0, 0, 0}}, {"<-", {ORDER_DATIVE, 0, 0, 1}},
        {"-", {ORDER_SINGLE, 0, 0, 0}}, {"=", {ORDER_DOUBLE, 0, 0, 0}},
        {"#", {ORDER_TRIPLE, 0, 0, 0}}, {"$", {ORDER_QUADRUPLE, 0, 0, 0}},
        {":", {ORDER_AROMATIC, 0, 0, 0}}, {"~", {ORDER_NONE, 0, 0, 0}},
        {"/", {0, DIR_UP, 1, 0}}, {"\\\\", {0, DIR_DOWN, 1, 0}}, {"\\", {0, DIR_DOWN, 1, 0}}};
    for (int k = 0; k < 11; k++)
        if (smiles_take(s, known[k].text)) return known[k].symbol;
    return (BondSymbol){.unspecified = 1};
}

// Adds a bond from atom i to atom j. The order of an unspecified one is found at the end.
// RDKit: SmilesParseOps::AddFragToMol
static ChemBond *smiles_add_bond(SmilesReader *s, int i, int j, BondSymbol symbol) {
    ChemBond *b = mol_add_bond(s->m, symbol.reversed ? j : i, symbol.reversed ? i : j,
                               symbol.order);
    b->direction = symbol.direction;
    b->unspecified = symbol.unspecified;
    return b;
}

// A ring number: a digit, %12 or %(12345). Returns -1 if there is none.
// RDKit: smiles.yy, ring_number
static int smiles_ring_number(SmilesReader *s) {
    int at = s->pos, value = 0, digits = 0;
    int most = smiles_take(s, "%(") ? 5 : smiles_take(s, "%") ? 2 : 1;
    for (; isdigit(smiles_peek(s, 0)) && digits < most; digits++, s->pos++)
        value = 10 * value + (smiles_peek(s, 0) - '0');
    if (most == 5 && (!digits || !smiles_take(s, ")")))
        return smiles_fault(s, at, "%( up to five digits )");
    if (most == 2 && (digits < 2 || value < 10)) return smiles_fault(s, at, "% and two digits");
    return value;
}

// Notes a ring number at the active atom. If it comes after branches, the order in which RDKit sees
// the neighbours of a stereo centre differs from the written one.
// RDKit: SmilesParseOps::CheckRingClosureBranchStatus
static int smiles_ring_mark(SmilesReader *s, BondSymbol symbol) {
    int column = s->pos, number = smiles_ring_number(s), degree = 0, i = s->active;
    if (number < 0 || !spend(&s->m->arena, 1)) return -1;
    if (s->n_marks == s->mark_room)
        s->marks = arena_grow(&s->m->arena, s->marks, &s->mark_room, sizeof *s->marks);
    s->marks[s->n_marks++] = (RingMark){i, number, column, -1, s->m->n_bonds, symbol};
    ChemAtom *a = &s->m->atoms[i];
    if (i == s->m->n_atoms - 1 || a->chirality == CHI_NONE) return 0;
    for (int b = s->m->n_bonds - 1; b >= 0 && spend(&s->m->arena, 1); b--)
        degree += s->m->bonds[b].begin == i || s->m->bonds[b].end == i;
    if (degree == 1 || (degree == 2 && i != 0) || (degree == 3 && i == 0))
        a->chirality = (uint8_t)invert_chirality(a->chirality);
    return 0;
}

// By ring number, then as written.
static int compare_marks(const void *a, const void *b) {
    const RingMark *x = a, *y = b;
    return x->number != y->number ? x->number - y->number : x->column - y->column;
}

// Makes the bond of two ring marks: what the first says counts, unless it says nothing. A ~ means
// nothing here, and a direction that only the other one has is read from there.
// RDKit: SmilesParseOps::CloseMolRings
static void smiles_ring_bond(SmilesReader *s, RingMark *first, RingMark *second) {
    RingMark *says = first->symbol.unspecified ? second : first;
    RingMark *other = says == first ? second : first;
    ChemBond *b = smiles_add_bond(s, says->atom, other->atom, says->symbol);
    b->unspecified |= b->order == ORDER_NONE;
    if (b->direction == DIR_NONE) b->direction = opposite_direction(other->symbol.direction);
    first->bond = second->bond = s->m->n_bonds - 1;
}

// Closes all rings, by rising number.
// RDKit: SmilesParseOps::CloseMolRings
static int smiles_close_rings(SmilesReader *s) {
    if (s->n_marks) qsort(s->marks, (size_t)s->n_marks, sizeof *s->marks, compare_marks);
    for (int k = 0; k < s->n_marks; k += 2) {
        RingMark *a = &s->marks[k], *b = k + 1 < s->n_marks ? a + 1 : a;
        if (b == a || b->number != a->number)
            return fault_at(s->fault, 1, a->column + 1, "malformed SMILES", "ring %d is not closed",
                            a->number);
        if (a->atom == b->atom)
            return fault_at(s->fault, 1, b->column + 1, "malformed SMILES",
                            "ring %d bonds an atom to itself", a->number);
        smiles_ring_bond(s, a, b);
    }
    int bad = find_bad_bond(s->m);
    if (bad < 0) return 0;
    for (int k = 0; k < s->n_marks; k++)
        if (s->marks[k].bond == bad)
            return fault_at(s->fault, 1, s->marks[k].column + 1, "malformed SMILES",
                            "ring %d bonds two atoms a second time", s->marks[k].number);
    return fault_at(s->fault, 1, 0, "malformed SMILES", "a second bond between two atoms");
}

// Chirality as written refers to the neighbours in the order of the text, ring numbers counting
// where they stand; here it refers to the order of the bonds.
// RDKit: SmilesParseOps::AdjustAtomChiralityFlags
static void smiles_fix_chirality(SmilesReader *s, int i) {
    ChemMol *m = s->m;
    ChemAtom *a = &m->atoms[i];
    int degree = mol_degree(m, i), n_closures = 0, swaps = 0, unsaturated = 0;
    if (!spend(&m->arena, (int64_t)degree * degree)) return;
    int *where = arena_ints(&m->arena, degree);  // each bond stands in the text
    for (int q = 0; q < degree; q++) {  // atom before, ring numbers, atoms after
        const Link *l = &m->first[i][q];
        int column = s->columns[2 * l->index + (l->bond->begin != i)];
        where[q] = column ? column - 1 : l->atom < i ? -1 : s->n + q;
        n_closures += column > 0;
        for (int p = 0; p < q; p++) swaps += where[p] > where[q];
        unsaturated |= twice_order(l->bond) > 2;
    }
    if (degree == 3 && ((a->first_of_fragment && a->explicit_h == 1) ||
                        (a->explicit_h != 1 && n_closures == 1 && !unsaturated)))
        swaps++;  // the hydrogen or lone pair comes first in the text but last here
    if (swaps % 2) a->chirality = (uint8_t)invert_chirality(a->chirality);
}

// One step of the chain: a bonded atom, a branch, a ring number or a dot.
// RDKit: smiles.yy, mol
static int smiles_step(SmilesReader *s) {
    int c = smiles_peek(s, 0), i;
    if (c == ')') {
        if (!s->n_branches) return smiles_fault(s, s->pos, "an atom, a bond or a branch");
        s->pos++;
        s->active = s->branches[--s->n_branches];
        return 0;
    }
    if (c == '.') {
        s->pos++;
        if ((i = smiles_atom(s)) < 0) return -1;
        s->m->atoms[i].first_of_fragment = 1;
        s->active = i;
        return 0;
    }
    if (c == '(') {
        s->pos++;
        if (s->n_branches == s->branch_room)
            s->branches = arena_grow(&s->m->arena, s->branches, &s->branch_room, sizeof(int));
        s->branches[s->n_branches++] = s->active;
    }
    BondSymbol symbol = smiles_bond(s);
    int next = smiles_peek(s, 0);
    if (c != '(' && (isdigit(next) || next == '%')) return smiles_ring_mark(s, symbol);
    if ((i = smiles_atom(s)) < 0) return -1;
    smiles_add_bond(s, s->active, i, symbol);
    s->active = i;
    return 0;
}

#include "prep/cxsmiles.h"  // read_extension(): |...| behind a SMILES; CX_PARTS: what is not read

// Reads a SMILES into m, and its extension if there is one, which becomes what follows it.
// RDKit: SmilesToMol, SmilesParseOps::SetUnspecifiedBondTypes
static int read_smiles(ChemMol *m, Span text, Span *extension, Fault *fault) {
    SmilesReader s = {.m = m, .fault = fault, .text = text.p, .n = text.n};
    if (text.n == 0) return fault_at(fault, 1, 1, "no atoms", "the SMILES is empty");
    if ((s.active = smiles_atom(&s)) < 0) return -1;
    m->atoms[s.active].first_of_fragment = 1;
    while (s.pos < s.n)
        if (smiles_step(&s)) return -1;
    if (s.n_branches) return smiles_fault(&s, s.pos, ")");
    if (smiles_close_rings(&s)) return -1;
    for (int k = 0; k < m->n_bonds; k++) {
        ChemBond *b = &m->bonds[k];
        if (!b->unspecified) continue;
        b->aromatic = m->atoms[b->begin].aromatic && m->atoms[b->end].aromatic;
        b->order = b->aromatic ? ORDER_AROMATIC : ORDER_SINGLE;
    }
    s.columns = arena_ints(&m->arena, 2 * m->n_bonds);
    for (const RingMark *r = s.marks; s.n_marks && r < s.marks + s.n_marks; r++)
        s.columns[2 * r->bond + (m->bonds[r->bond].begin != r->atom)] = r->column + 1;
    for (int i = 0; i < m->n_atoms; i++)
        if (m->atoms[i].chirality != CHI_NONE) smiles_fix_chirality(&s, i);
    m->is_smiles = 1;
    if (!extension || !extension->n) return 0;
    int n = read_extension(&s, *extension);
    *extension = (Span){extension->p + max_int(n, 0), extension->n - max_int(n, 0)};
    return min_int(n, 0);
}

// =================================================================================================
// 5 Valence. The explicit valence of an atom is what its bonds and explicit hydrogens use; implicit
//   hydrogens fill it up to the next allowed valence, shifted by the charge:
//
//     C in C-O     uses 1, allowed 4                     3 hydrogens
//     N in [N+]    a charge of +1 right of carbon adds   N+ is allowed 4
//     B in [B-]    left of carbon a - adds               B- is allowed 4
//     S in S(=O)   uses 2, allowed 2, 4, 6               none: 2 is allowed
//     P in P(O)(O)(O)O  uses 4, allowed 3, 5, 7          1 hydrogen
// =================================================================================================

// How a charge shifts the allowed valences: left of carbon, and for carbon cations, a positive
// charge takes a bond away; everywhere else it adds one.
// RDKit: isEarlyAtom, in Atom::calcExplicitValence
static int valence_shift(const ChemAtom *a) {
    int charge = ELEMENTS[a->z].early ? -a->charge : a->charge;
    return a->z == 6 && charge > 0 ? -charge : charge;
}

// The first allowed valence of an element, -1 for any or for no element.
// RDKit: PeriodicTable::getDefaultValence
static inline int default_valence(int z) {
    return z >= 0 && z <= Z_MAX ? ELEMENTS[z].valence[0] : -1;
}

// Sets the explicit valence. An aromatic atom may count half a bond or a whole one too many
// before its Kekule structure is known: it is taken down to the next allowed valence if that is at
// most 1.5 away. Half orders round up.
// RDKit: Atom::calcExplicitValence
static void set_valence(ChemMol *m, int i) {
    ChemAtom *a = &m->atoms[i];
    const Element *e = &ELEMENTS[a->z];
    int twice = 2 * a->explicit_h + twice_bonds(m, i), shift = valence_shift(a);
    // unsigned, so that "any valence" (-1) and negative limits are never exceeded
    uint32_t limit = (uint32_t)e->valence[0] + (uint32_t)shift;
    if (twice > 0 && (uint64_t)twice > 2 * (uint64_t)limit && is_aromatic_atom(m, i)) {
        int allowed = e->valence[0] + shift;
        for (int k = 0; k < e->n_valences && e->valence[k] != -1; k++) {
            if (2 * (e->valence[k] + shift) > twice) break;
            allowed = e->valence[k] + shift;
        }
        if (twice - 2 * allowed <= 3) twice = 2 * allowed;
    }
    a->valence = twice > 0 ? (twice + 1) / 2 : twice / 2;
}

// Whether the explicit valence exceeds the largest allowed one.
// RDKit: Atom::calcExplicitValence(strict)
static int valence_too_high(const ChemAtom *a) {
    const Element *e = &ELEMENTS[a->z];
    int effective = e->outer >= 4 ? a->valence - a->charge : a->valence + a->charge;
    int largest = e->valence[e->n_valences - 1];
    return largest > 0 && effective > largest;
}

// Sets the implicit hydrogens from the explicit valence: up to the next allowed valence, but those
// of an aromatic atom only up to the first. Returns 0 if no number of them makes an allowed valence
// (they are 0 then).
// RDKit: Atom::calcImplicitValence
static int set_implicit_hydrogens(ChemMol *m, int i) {
    ChemAtom *a = &m->atoms[i];
    const Element *e = &ELEMENTS[a->z];
    if (a->no_implicit) return 1;
    a->implicit_h = 0;
    if (a->z == 0) return 1;
    if (a->valence == 0 && a->z == 1 && a->radicals == 0) {  // a lone hydrogen
        a->implicit_h = a->charge == 0;
        return a->charge >= -1 && a->charge <= 1;
    }
    if (e->valence[0] == -1) return 1;
    int used = a->valence + a->radicals, shift = valence_shift(a), h = -1;
    int aromatic = is_aromatic_atom(m, i);
    for (int k = 0; k < e->n_valences && e->valence[k] >= 0 && h < 0; k++) {
        int allowed = e->valence[k] + shift;
        if (used == allowed || (used < allowed && (k == 0 || !aromatic))) h = allowed - used;
    }
    if (h < 0) return !aromatic && e->valence[e->n_valences - 1] == -1;
    a->implicit_h = (int16_t)h;
    return 1;
}

// Sets both. Returns 0 if no number of implicit hydrogens makes an allowed valence.
// RDKit: Atom::updatePropertyCache
static int update_valence(ChemMol *m, int i) {
    set_valence(m, i);
    return set_implicit_hydrogens(m, i);
}

// Valence and hydrogens of every atom, whatever they are.
// RDKit: ROMol::updatePropertyCache(false)
static void update_valences(ChemMol *m) {
    for (int i = 0; i < m->n_atoms; i++) update_valence(m, i);
}

// The same, but an impossible valence is a fault.
// RDKit: ROMol::updatePropertyCache(true)
static int check_valences(ChemMol *m, Fault *fault) {
    for (int i = 0; i < m->n_atoms; i++) {
        ChemAtom *a = &m->atoms[i];
        set_valence(m, i);
        if (valence_too_high(a))
            return fault_at(fault, 0, 0, "valence too high",
                            "atom %d (%.*s): valence %d is greater than permitted", i + 1,
                            SYMBOL(a->z), a->valence);
        if (!set_implicit_hydrogens(m, i))
            return fault_at(fault, 0, 0, "valence too high",
                            "atom %d (%.*s, charge %d): valence %d is not an allowed one", i + 1,
                            SYMBOL(a->z), a->charge, a->valence);
    }
    return 0;
}

// =================================================================================================
// 6 Clean-up: groups commonly drawn with too many bonds become charge-separated.
// =================================================================================================

// A neutral nitrogen with five bonds gives one of them away:
//   C-N(=O)=O  ->  C-[N+]([O-])=O        C-N=N#N  ->  C-N=[N+]=[N-]
// RDKit: nitrogenCleanup
static void clean_nitrogen(ChemMol *m, int i) {
    ChemAtom *a = &m->atoms[i];
    if (a->charge) return;
    uint8_t aromatic = a->aromatic;
    a->aromatic = 0;
    set_valence(m, i);
    for (Link *l = m->first[i]; l < m->first[i + 1] && a->valence == 5; l++) {
        ChemBond *b = l->bond;
        ChemAtom *other = &m->atoms[l->atom];
        int oxide = other->z == 8 && b->order == ORDER_DOUBLE;
        int azide = other->z == 7 && b->order == ORDER_TRIPLE;
        if (other->charge || !(oxide || azide)) continue;
        b->order = oxide ? ORDER_SINGLE : ORDER_DOUBLE;
        a->charge = 1;
        other->charge = -1;
        break;
    }
    a->aromatic = aromatic;
}

// A neutral phosphorus with three neighbours and five bonds, doubly bonded to O and to C or N:
//   C=P(=O)X  ->  C=[P+]([O-])X
// RDKit: phosphorusCleanup
static void clean_phosphorus(ChemMol *m, int i) {
    ChemAtom *a = &m->atoms[i];
    ChemBond *to_oxygen = NULL;
    int to_carbon = 0;
    if (a->charge || mol_degree(m, i) != 3) return;
    set_valence(m, i);
    if (a->valence != 5) return;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
        int z = m->atoms[l->atom].z;
        if (l->bond->order != ORDER_DOUBLE) continue;
        if (z == 8 && m->atoms[l->atom].charge == 0) to_oxygen = l->bond;
        else if ((z == 6 || z == 7) && mol_degree(m, l->atom) >= 2) to_carbon = 1;
    }
    if (!to_oxygen || !to_carbon) return;
    m->atoms[bond_other(to_oxygen, i)].charge = -1;
    to_oxygen->order = ORDER_SINGLE;
    a->charge = 1;
}

// A neutral Cl, Br or I with 3, 5 or 7 bonds, all to oxygen:
//   O-Cl(=O)(=O)=O  ->  O-[Cl+3]([O-])([O-])[O-]
// RDKit: halogenCleanup
static void clean_halogen(ChemMol *m, int i) {
    ChemAtom *a = &m->atoms[i];
    int charge = 0;
    set_valence(m, i);
    if (a->charge || (a->valence != 3 && a->valence != 5 && a->valence != 7)) return;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++)
        if (m->atoms[l->atom].z != 8) return;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
        if (l->bond->order != ORDER_DOUBLE) continue;
        l->bond->order = ORDER_SINGLE;
        m->atoms[l->atom].charge = -1;
        charge++;
    }
    a->charge = (int8_t)charge;
}

// Applies the rules above to every atom, in order.
// RDKit: MolOps::cleanUp
static void clean_up(ChemMol *m) {
    for (int i = 0; i < m->n_atoms; i++) {
        int z = m->atoms[i].z;
        if (z == 7) clean_nitrogen(m, i);
        if (z == 15) clean_phosphorus(m, i);
        if (z == 17 || z == 35 || z == 53) clean_halogen(m, i);
    }
}

// =================================================================================================
// 7 Hydrogens. Most explicit hydrogen atoms become a count on their neighbour. Those stay that are
//   more than that: isotopes, H2, bridging or lone ones, on dummies, on metal centres with their
//   own geometry, the only thing that says which side of a double bond is which, what states a
//   count of hydrogens, or what an S group rests on: an end of a bond across its boundary, an
//   attachment atom, all that is left of it.
// =================================================================================================

// Square planar, trigonal bipyramidal or octahedral.
// RDKit: Chirality::hasNonTetrahedralStereo
static int is_nontetrahedral(const ChemAtom *a) { return a->chirality >= CHI_SQUARE; }

// Whether atom i is a hydrogen with one neighbour and nothing else about it.
static int is_plain_hydrogen(const ChemMol *m, int i) {
    const ChemAtom *a = &m->atoms[i];
    return a->z == 1 && !a->isotope && !a->query && mol_degree(m, i) == 1;
}

// Whether hydrogen i is nothing but a hydrogen, as far as its neighbour goes.
// RDKit: shouldRemoveH
static int is_removable_hydrogen(const ChemMol *m, int i) {
    int j = m->first[i]->atom;
    const ChemAtom *heavy = &m->atoms[j];
    if (heavy->z <= 1 || is_nontetrahedral(heavy)) return 0;
    if (mol_degree(m, j) != 2) return 1;
    for (Link *l = m->first[j]; l < m->first[j + 1]; l++)
        if (l->bond->order == ORDER_DOUBLE && (m->first[i]->bond->direction != DIR_NONE ||
                (l->bond->stereo > STEREO_NONE && l->bond->stereo < STEREO_ANY)))
            return 0;
    return 1;
}

// Marks in keep the atoms with a role in an S group: at a bond across its boundary, for attachment.
// Returns 1 at a bond of a group that has none of its atoms: there RDKit gives up, if it has to ask
// for a hydrogen without a role so far.
// RDKit: shouldRemoveH
static int mark_sgroup_roles(ChemMol *m, uint8_t *keep) {
    for (int k = 0; k < m->n_sgroups; k++) {
        const SGroup *g = &m->sgroups[k];
        if (!spend(&m->arena, m->n_atoms + m->n_bonds)) return 0;
        for (int b = 0; b < m->n_bonds; b++) {
            int ends = g->bonds[b] ? sgroup_ends(m, g, b) : 2;
            if (ends == 0) return 1;
            if (ends == 1) keep[m->bonds[b].begin] = keep[m->bonds[b].end] = 1;
        }
        for (int i = 0; i < m->n_atoms; i++) keep[i] |= g->atoms[i] & SG_ATTACH;
    }
    return 0;
}

// Hydrogens that would leave an S group without atoms stay: their to[] becomes 0.
// RDKit: filter_sgroup_emptying_hydrogens
static void keep_sgroups_filled(ChemMol *m, int *to) {
    for (int k = 0; k < m->n_sgroups; k++) {
        const SGroup *g = &m->sgroups[k];
        int stay = !spend(&m->arena, m->n_atoms);
        for (int i = 0; i < m->n_atoms; i++) stay |= (g->atoms[i] & SG_IN) && to[i] >= 0;
        for (int i = 0; i < m->n_atoms && !stay; i++)
            if (g->atoms[i] & SG_IN) to[i] = 0;
    }
}

// The neighbour's hydrogen must be counted as explicit where it would not come back by itself: if
// all are (`count_all`, for SMILES), on stereo centres, and at unusual valences.
// RDKit: molRemoveH
static int must_count_hydrogen(const ChemMol *m, int heavy, int count_all) {
    const ChemAtom *a = &m->atoms[heavy];
    const Element *e = &ELEMENTS[a->z];
    if (count_all || a->no_implicit || a->chirality != CHI_NONE) return 1;
    if ((a->z == 7 || a->z == 15) && a->aromatic) return 1;
    for (int k = 1; k < e->n_valences; k++)
        if (e->valence[k] == total_valence(a)) return 1;
    return 0;
}

// A / or \ on a bond to a vanishing hydrogen moves to another single bond of its neighbour.
// RDKit: molRemoveH
static void hand_over_direction(ChemMol *m, const ChemBond *gone, int heavy) {
    ChemBond *heir = NULL;
    for (Link *l = m->first[heavy]; l < m->first[heavy + 1]; l++) {
        ChemBond *b = l->bond;
        if (b == gone || b->dead || b->order != ORDER_SINGLE) continue;
        if (b->direction != DIR_NONE) return;  // it has one of its own
        heir = b;
    }
    if (!heir) return;
    int flip = heir->begin == heavy && gone->begin == heavy;
    heir->direction = flip ? opposite_direction(gone->direction) : gone->direction;
}

// Takes hydrogen i off its neighbour. Chirality is relative to the order of the bonds, in which
// a hydrogen that is a mere count comes last.
// RDKit: molRemoveH
static void remove_hydrogen(ChemMol *m, int i, int count_all) {
    ChemBond *gone = m->first[i]->bond;
    int heavy = m->first[i]->atom, behind = 0;
    ChemAtom *a = &m->atoms[heavy];
    gone->dead = 1;
    if (!spend(&m->arena, mol_degree(m, heavy))) return;
    if (must_count_hydrogen(m, heavy, count_all)) a->explicit_h++;
    for (Link *l = m->first[heavy + 1] - 1; l->bond != gone; l--) behind += !l->bond->dead;
    if (behind % 2) a->chirality = (uint8_t)invert_chirality(a->chirality);
    if (gone->direction == DIR_UNKNOWN && gone->begin == heavy) a->unknown_stereo = 1;
    if (is_sloped(gone->direction)) hand_over_direction(m, gone, heavy);
}

// Squeezes removed atoms and dead bonds out of the arrays; to[i] is an atom's new index or -1.
// RDKit: RWMol::commitBatchEdit
static void compact(ChemMol *m, const int *to) {
    int n_atoms = 0, n_bonds = 0;
    for (int i = 0; i < m->n_atoms; i++) {
        if (to[i] < 0) continue;
        m->atoms[n_atoms] = m->atoms[i];
        memcpy(m->xyz[n_atoms++], m->xyz[i], sizeof m->xyz[i]);
    }
    for (int k = 0; k < m->n_bonds; k++) {
        ChemBond b = m->bonds[k];
        if (b.dead) continue;
        b.begin = to[b.begin];
        b.end = to[b.end];
        m->bonds[n_bonds++] = b;
    }
    m->n_atoms = n_atoms;
    m->n_bonds = n_bonds;
    mol_connect(m);
}

// Removes every hydrogen that is nothing but one, the last first, as the order decides what the
// chirality of a centre with several of them becomes. count_all: see must_count_hydrogen().
// RDKit: MolOps::removeHs
static int remove_hydrogens(ChemMol *m, int count_all, Fault *fault) {
    int n = m->n_atoms, kept = 0, *to = arena_ints(&m->arena, n);
    uint8_t *keep = arena_flags(&m->arena, n);
    int outside = mark_sgroup_roles(m, keep);
    for (int i = 0; i < n; i++) {
        int plain = is_plain_hydrogen(m, i) && !keep[i];
        if (plain && outside)
            return fault_at(fault, 0, 0, "malformed S group",
                            "an S group has a bond of which neither atom is in it");
        to[i] = plain && is_removable_hydrogen(m, i) ? -1 : 0;
    }
    keep_sgroups_filled(m, to);
    for (int i = 0; i < n; i++)
        if (to[i] >= 0) to[i] = kept++;
    if (kept == n) return 0;
    for (int i = n - 1; i >= 0; i--)
        if (to[i] < 0) remove_hydrogen(m, i, count_all);
    compact(m, to);
    return 0;
}

// =================================================================================================
// 8 Rings. The smallest set of smallest rings after Figueras (J. Chem. Inf. Comput. Sci. 1996, 36,
//   986), in RDKit's variant. Chains are trimmed away; then, fragment by fragment, breadth-first
//   searches from atoms of degree two (one a chain) or, if there is none, of degree three find the
//   smallest rings through them, and these atoms are trimmed too. Surplus rings are weeded out, and
//   those that could take the place of an equally large member come back at the end, so that
//   the result does not depend on the numbering ("symmetrised"). Cubane has 12 - 8 + 1 = 5 rings
//   in a smallest set, but six equal faces: the sixth comes back.
//
//   Which Kekule structure and which fused systems are tried first depends on the order of rings,
//   and the order of atoms in them: hence the care about order below. Graphs in which the searches
//   find too few rings (RDKit then tries two more ways) are refused.
// =================================================================================================

// Ring search in progress. All arrays live in the molecule's arena.
typedef struct {
    ChemMol *m;
    RingList found;          // rings of the current fragment
    RingList some;           // of the last smallest_rings()
    RingList all;            // every distinct ring seen, its atoms in falling order
    int *degree;             // active bonds of each atom
    int *covered;            // see pick_chain_atoms()
    uint8_t *done;           // atoms that are trimmed or searched from
    uint8_t *active;         // per bond: not trimmed yet
    uint8_t *changed;        // atoms to look at again while trimming
    int *parent, *depth, *queue, *ring;  // of a breadth-first search
    uint8_t *colour;
    int *degree_then;        // see search_behind_duplicates(): before the cuts
    uint8_t *active_then;
    int *stamp, stamp_room, n_stamps;  // per ring of `all`: last time it was one of those in hand
} RingSearch;

// Size, atoms and bonds of ring r.
static int ring_size(const RingList *rings, int r) { return rings->start[r + 1] - rings->start[r]; }
static int *ring_atoms(const RingList *rings, int r) { return rings->atoms + rings->start[r]; }
static int *ring_bonds(const RingList *rings, int r) { return rings->bonds + rings->start[r]; }

// Makes room for a ring of n atoms, which the caller fills in, and returns its index.
static int ring_add(Arena *arena, RingList *rings, int n) {
    if (rings->n + 2 > rings->room)
        rings->start = arena_grow(arena, rings->start, &rings->room, sizeof(int));
    while (rings->used + n > rings->atom_room) {
        int room = rings->atom_room;
        rings->atoms = arena_grow(arena, rings->atoms, &room, sizeof(int));
        rings->bonds = arena_grow(arena, rings->bonds, &rings->atom_room, sizeof(int));
    }
    rings->used += n;
    rings->start[++rings->n] = rings->used;
    return rings->n - 1;
}

// Appends ring r of another list.
static void ring_copy(Arena *arena, RingList *to, const RingList *from, int r) {
    int n = ring_size(from, r), at = ring_add(arena, to, n);
    memcpy(ring_atoms(to, at), ring_atoms(from, r), (size_t)n * sizeof(int));
    memcpy(ring_bonds(to, at), ring_bonds(from, r), (size_t)n * sizeof(int));
}

// Whether ring r of a list was not seen before; then it is entered in s->all. *index: its place
// there.
// RDKit: RingUtils::computeRingInvariant
static int ring_is_new(RingSearch *s, const RingList *rings, int r, int *index) {
    const int *atoms = ring_atoms(rings, r), n = ring_size(rings, r);
    int *sorted = s->queue;  // free between searches
    for (int i = 0, k = 0; i < n && spend(&s->m->arena, i - k); i++) {
        for (k = i; k > 0 && sorted[k - 1] < atoms[i]; k--) sorted[k] = sorted[k - 1];
        sorted[k] = atoms[i];
    }
    for (*index = 0; *index < s->all.n && spend(&s->m->arena, 1); ++*index)
        if (ring_size(&s->all, *index) == n &&
            memcmp(ring_atoms(&s->all, *index), sorted, (size_t)n * sizeof(int)) == 0)
            return 0;
    memcpy(ring_atoms(&s->all, ring_add(&s->m->arena, &s->all, n)), sorted,
           (size_t)n * sizeof(int));
    return 1;
}

// Deactivates the bonds of an atom; neighbours left with at most one bond are marked in changed.
// RDKit: FindRings::trimBonds
static void trim_atom(RingSearch *s, int i) {
    ChemMol *m = s->m;
    spend(&m->arena, mol_degree(m, i));
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
        if (!s->active[l->index]) continue;
        if (s->degree[l->atom] <= 2) s->changed[l->atom] = 1;
        s->active[l->index] = 0;
        s->degree[i]--;
        s->degree[l->atom]--;
    }
}

// Lowest atom marked in changed, unmarked; -1 if none is.
static int pop_changed(RingSearch *s) {
    uint8_t *p = memchr(s->changed, 1, (size_t)s->m->n_atoms);
    if (!p || !spend(&s->m->arena, s->m->n_atoms / 64)) return -1;
    *p = 0;
    return (int)(p - s->changed);
}

// Joins the two paths from the root that meet at the bond curr-next into s->ring, root first.
// Returns the size, or 0 if the paths meet before the root.
// RDKit: FindRings::BFSWorkspace::smallestRingsBfs
static int close_ring(RingSearch *s, int root, int curr, int next) {
    int n = s->depth[curr] + 1, i = next, j = curr;  // the way from the root to curr comes first
    if (s->depth[i] >= n) i = s->parent[i];
    while (i != j && spend(&s->m->arena, 1)) i = s->parent[i], j = s->parent[j];
    if (i != root || !spend(&s->m->arena, n)) return 0;
    for (int k = n; k > 0; curr = s->parent[curr]) s->ring[--k] = curr;
    for (; next != root; next = s->parent[next]) s->ring[n++] = next;
    return n;
}

// Appends the ring s->ring of n atoms with its bonds to s->some.
// RDKit: RingUtils::convertToBonds
static void keep_closed_ring(RingSearch *s, int n) {
    int r = ring_add(&s->m->arena, &s->some, n);
    int *atoms = ring_atoms(&s->some, r), *bonds = ring_bonds(&s->some, r);
    for (int k = 0; k < n; k++) {
        atoms[k] = s->ring[k];
        spend(&s->m->arena, mol_degree(s->m, atoms[k]));
        bonds[k] = bond_between(s->m, s->ring[k], s->ring[k + 1 < n ? k + 1 : 0]);
    }
}

// All smallest rings through the root that avoid the `avoid` atom (-1: none), into s->some. A
// breadth-first search: where two of its paths meet, a ring closes.
// RDKit: FindRings::BFSWorkspace::smallestRingsBfs
static void smallest_rings(RingSearch *s, int root, int avoid) {
    enum { WHITE, GREY, BLACK };
    ChemMol *m = s->m;
    int head = 0, tail = 0, best = INT_MAX, n;
    s->some.n = s->some.used = 0;
    spend(&m->arena, m->n_atoms / 16);
    memset(s->colour, WHITE, (size_t)m->n_atoms);
    if (avoid >= 0) s->colour[avoid] = BLACK;
    s->parent[root] = -1;
    s->depth[root] = 0;
    s->queue[tail++] = root;
    while (head < tail) {
        int curr = s->queue[head++];
        s->colour[curr] = BLACK;
        if (s->depth[curr] + 1 > best) return;
        for (Link *l = m->first[curr]; l < m->first[curr + 1] && spend(&m->arena, 1); l++) {
            int next = l->atom, seen = s->colour[next];
            if (!s->active[l->index] || seen == BLACK || s->parent[curr] == next) continue;
            if (seen == WHITE) {
                s->parent[next] = curr;
                s->depth[next] = s->depth[curr] + 1;
                s->colour[next] = GREY;
                s->queue[tail++] = next;
            } else if ((n = close_ring(s, root, curr, next)) > 1) {
                if (n > best) return;
                best = n;
                keep_closed_ring(s, n);
            }
        }
    }
}

// Adds those rings to the fragment's that are new and not larger than max_size.
// RDKit: the RINGINVAR_SET of FindRings
static void keep_new_rings(RingSearch *s, const RingList *rings, int max_size) {
    for (int r = 0, index; r < rings->n; r++)
        if (ring_size(rings, r) <= max_size && ring_is_new(s, rings, r, &index))
            ring_copy(&s->m->arena, &s->found, rings, r);
}

// Gives `mark` to the root and to all atoms without mark (0) that are connected with it; if there
// is a search, by active bonds and through atoms of degree two only.
// RDKit: markUselessD2s
static void flood(const ChemMol *m, const RingSearch *s, int root, int mark, int *marks,
                  int *stack) {
    int top = 0;
    marks[root] = mark;
    stack[top++] = root;
    while (top) {
        int i = stack[--top];
        for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
            if (marks[l->atom] || (s && (!s->active[l->index] || s->degree[l->atom] != 2)))
                continue;
            marks[l->atom] = mark;
            stack[top++] = l->atom;
        }
    }
}

// Picks one atom of degree two from every chain of such atoms. Returns how many.
// RDKit: FindRings::pickD2Nodes
static int pick_chain_atoms(RingSearch *s, const int *fragment, int n, int *picked) {
    int n_picked = 0;
    for (int f = 0; f < n; f++) s->covered[fragment[f]] = 0;
    for (int f = 0; f < n; f++) {
        if (s->degree[fragment[f]] != 2 || s->covered[fragment[f]]) continue;
        picked[n_picked++] = fragment[f];
        flood(s->m, s, fragment[f], 1, s->covered, s->queue);
    }
    return n_picked;
}

// That the search from a chain atom led to a ring (its place in RingSearch.all).
typedef struct { int atom, ring; } Find;

// Order of two rings as bit sets read as binary numbers; their atoms are in falling order.
// RDKit: boost::dynamic_bitset operator<, of a RINGINVAR
static int compare_atom_sets(const RingList *all, int r1, int r2) {
    const int *a = ring_atoms(all, r1), *b = ring_atoms(all, r2);
    int na = ring_size(all, r1), nb = ring_size(all, r2);
    for (int k = 0; k < na && k < nb; k++)
        if (a[k] != b[k]) return a[k] < b[k] ? -1 : 1;
    return (na > nb) - (na < nb);
}

// The distinct rings of the finds in rising order into rings; returns how many.
static int distinct_rings(const RingSearch *s, const Find *finds, int n, int *rings) {
    int n_rings = 0;
    for (int k = 0, at = 0; k < n && spend(&s->m->arena, n_rings + at); k++) {
        at = 0;
        while (at < n_rings && compare_atom_sets(&s->all, rings[at], finds[k].ring) < 0) at++;
        if (at < n_rings && rings[at] == finds[k].ring) continue;
        memmove(rings + at + 1, rings + at, (size_t)(n_rings - at) * sizeof(int));
        rings[at] = finds[k].ring;
        n_rings++;
    }
    return n_rings;
}

// A ring found from several chain atoms may hide a second ring of one of them, which the chain of
// another cuts short: looks again from each of them, with the bonds of the atoms that found the
// same rings cut, and keeps the smallest of what turns up.
// RDKit: FindRings::findSSSRforDupCands
static void search_behind_duplicates(RingSearch *s, const Find *finds, int n) {
    ChemMol *m = s->m;
    int *rings = arena_ints(&m->arena, n), n_rings = distinct_rings(s, finds, n, rings);
    while (s->stamp_room < s->all.n)
        s->stamp = arena_grow(&m->arena, s->stamp, &s->stamp_room, sizeof(int));
    memcpy(s->active_then, s->active, (size_t)m->n_bonds);
    memcpy(s->degree_then, s->degree, (size_t)m->n_atoms * sizeof(int));
    for (int r = 0; r < n_rings && spend(&m->arena, n); r++) {
        RingList candidates = {0};
        int owners = 0, least = INT_MAX;
        for (int k = 0; k < n; k++) owners += finds[k].ring == rings[r];
        for (int k = 0; k < n && owners > 1; k++) {
            if (finds[k].ring != rings[r] || !spend(&m->arena, 2 * n + m->n_atoms / 4)) continue;
            s->n_stamps++;
            for (int a = 0; a < n; a++)
                if (finds[a].atom == finds[k].atom) s->stamp[finds[a].ring] = s->n_stamps;
            for (int b = 0; b < n; b++)
                if (s->stamp[finds[b].ring] == s->n_stamps && finds[b].atom != finds[k].atom)
                    trim_atom(s, finds[b].atom);
            smallest_rings(s, finds[k].atom, -1);
            for (int c = 0; c < s->some.n; c++) {
                if (ring_size(&s->some, c) < least) least = ring_size(&s->some, c);
                ring_copy(&m->arena, &candidates, &s->some, c);
            }
            memcpy(s->active, s->active_then, (size_t)m->n_bonds);
            memcpy(s->degree, s->degree_then, (size_t)m->n_atoms * sizeof(int));
        }
        keep_new_rings(s, &candidates, least);
    }
    memset(s->changed, 0, (size_t)m->n_atoms);
}

// Rings through the picked atoms of degree two.
// RDKit: FindRings::findRingsD2nodes
static void search_chain_atoms(RingSearch *s, const int *picked, int n_picked) {
    ChemMol *m = s->m;
    Find *finds = NULL;
    int n = 0, room = 0;
    for (int p = 0; p < n_picked && spend(&m->arena, 1); p++) {
        smallest_rings(s, picked[p], -1);
        for (int r = 0; r < s->some.n; r++) {
            if (n == room) finds = arena_grow(&m->arena, finds, &room, sizeof *finds);
            finds[n].atom = picked[p];
            if (ring_is_new(s, &s->some, r, &finds[n++].ring))
                ring_copy(&m->arena, &s->found, &s->some, r);
        }
        if (s->some.n) continue;
        s->changed[picked[p]] = 1;  // a chain between rings: cut it out
        for (int i; (i = pop_changed(s)) >= 0;) trim_atom(s, i);
    }
    if (n_picked > 1) search_behind_duplicates(s, finds, n);
}

// Whether an atom is in ring r.
static int ring_has(const RingList *rings, int r, int atom) {
    for (int k = rings->start[r]; k < rings->start[r + 1]; k++)
        if (rings->atoms[k] == atom) return 1;
    return 0;
}

// Rings through an atom with three active bonds: the smallest, and, if these are fewer than three,
// those that avoid a neighbour which has had its share. Returns 0 if the graph defies this.
// RDKit: FindRings::findRingsD3Node
static int search_branch_atom(RingSearch *s, int i) {
    ChemMol *m = s->m;
    int next[3], n = 0, only;
    smallest_rings(s, i, -1);
    keep_new_rings(s, &s->some, INT_MAX);
    int n_rings = s->some.n;
    if (n_rings >= 3) return 1;
    for (Link *l = m->first[i]; l < m->first[i + 1] && n < 3; l++)
        if (s->active[l->index]) next[n++] = l->atom;
    if (n < 3 || n_rings == 0) return n == 3;
    for (only = 0; only < 3; only++) {  // two rings: the neighbour in both; one: the one not in it
        int in_all = ring_has(&s->some, 0, next[only]);
        in_all = in_all && ring_has(&s->some, n_rings - 1, next[only]);
        if (in_all == (n_rings == 2)) break;
    }
    if (only == 3) return 0;
    for (int k = 2; k >= 0; k--) {  // the rings missing avoid that one, or one of the others each
        if ((k == only) != (n_rings == 2)) continue;
        smallest_rings(s, i, next[k]);
        keep_new_rings(s, &s->some, INT_MAX);
    }
    return 1;
}

// Keeps a basis of the fragment's rings: smallest first, among equals always the one that shares
// most bonds with what is there, unless it adds no bond. The others go to `extra`.
// RDKit: FindRings::removeExtraRings
static void drop_surplus_rings(RingSearch *s, RingList *extra) {
    ChemMol *m = s->m;
    RingList all = s->found;
    int n = all.n, *sorted = arena_ints(&m->arena, n), *overlap = arena_ints(&m->arena, n);
    uint8_t *keep = arena_flags(&m->arena, n), *covered = arena_flags(&m->arena, m->n_bonds);
    for (int r = 0; r < n && spend(&m->arena, r); r++) {  // by size, equal ones as found
        int k = r;
        for (; k > 0 && ring_size(&all, sorted[k - 1]) > ring_size(&all, r); k--)
            sorted[k] = sorted[k - 1];
        sorted[k] = r;
    }
    for (int i = 0, end; i < n; i = end) {
        int size = ring_size(&all, sorted[i]);
        for (end = i; end < n && ring_size(&all, sorted[end]) == size;) end++;
        for (int left = end - i, first = 1; left && spend(&m->arena, (end - i) * size); left--) {
            int best = -1;
            for (int j = i; j < end; j++) {
                if (overlap[j] < 0) continue;  // decided
                overlap[j] = 0;
                for (int k = 0; k < size; k++)
                    overlap[j] += covered[ring_bonds(&all, sorted[j])[k]];
                if (best < 0 || (!first && overlap[j] > overlap[best])) best = j;
            }
            keep[best] = overlap[best] < size;
            first = first && !keep[best];
            overlap[best] = -1;
            for (int k = 0; k < size; k++) covered[ring_bonds(&all, sorted[best])[k]] = 1;
        }
    }
    s->found = *extra = (RingList){0};
    for (int r = 0; r < n; r++)
        ring_copy(&m->arena, keep[r] ? &s->found : extra, &all, sorted[r]);
}

// Searches the rings of one fragment of n atoms and n_bonds bonds. Returns 0 if it finds fewer than
// there must be.
// RDKit: MolOps::findSSSR
static int search_fragment(RingSearch *s, const int *fragment, int n, int n_bonds,
                           RingList *extra) {
    ChemMol *m = s->m;
    int *picked = arena_ints(&m->arena, n), n_done = 0;
    memset(s->changed, 0, (size_t)m->n_atoms);
    s->found = (RingList){0};
    for (int f = 0; f < n; f++) s->changed[fragment[f]] = s->degree[fragment[f]] < 2;
    while (n_done < n && spend(&m->arena, 2 * n)) {
        for (int i; (i = pop_changed(s)) >= 0;) {
            n_done += !s->done[i];
            s->done[i] = 1;
            trim_atom(s, i);
        }
        int n_picked = pick_chain_atoms(s, fragment, n, picked);
        if (n_picked) search_chain_atoms(s, picked, n_picked);
        for (int f = 0; f < n && !n_picked && n_done < n; f++) {
            if (s->degree[fragment[f]] != 3) continue;
            if (!search_branch_atom(s, fragment[f])) return 0;
            picked[n_picked++] = fragment[f];
        }
        if (!n_picked) break;
        for (int p = 0; p < n_picked; p++) {
            n_done += !s->done[picked[p]];
            s->done[picked[p]] = 1;
            trim_atom(s, picked[p]);
        }
    }
    int expected = n_bonds - n + 1;
    if (s->found.n < expected) return 0;
    if (s->found.n > expected) drop_surplus_rings(s, extra);
    return 1;
}

// Brings back surplus rings that could replace an equally large ring of the set: they share a bond
// with it and have all the bonds that only it provides.
// RDKit: MolOps::symmetrizeSSSR
static void symmetrize_rings(ChemMol *m, const RingList *extra) {
    RingList *rings = &m->rings;
    if (!extra->n) return;
    int n_basis = rings->n, *uses = arena_ints(&m->arena, m->n_bonds);
    int *in_extra = arena_ints(&m->arena, m->n_bonds);
    for (int k = 0; k < rings->used; k++) uses[rings->bonds[k]]++;
    for (int e = 0; e < extra->n; e++) {
        int n = ring_size(extra, e), fits = 0;
        for (int k = 0; k < n; k++) in_extra[ring_bonds(extra, e)[k]] = e + 1;
        for (int r = 0; r < n_basis && !fits && spend(&m->arena, ring_size(rings, r)); r++) {
            int shared = 0, replaces = ring_size(rings, r) == n;
            for (int k = rings->start[r]; k < rings->start[r + 1]; k++) {
                int common = in_extra[rings->bonds[k]] == e + 1;
                shared |= common;
                if (!common && uses[rings->bonds[k]] == 1) replaces = 0;
            }
            fits = shared && replaces;
        }
        if (fits) ring_copy(&m->arena, rings, extra, e);
    }
}

// Fills the ring counts of atoms and bonds from the list of rings.
// RDKit: RingInfo::addRing, numAtomRings, numBondRings, minBondRingSize
static void count_rings(ChemMol *m) {
    m->atom_rings = arena_ints(&m->arena, m->n_atoms);
    for (int b = 0; b < m->n_bonds; b++) m->bonds[b].rings = m->bonds[b].smallest_ring = 0;
    for (int r = 0; r < m->rings.n; r++) {
        int n = ring_size(&m->rings, r);
        for (int k = m->rings.start[r]; k < m->rings.start[r + 1]; k++) {
            ChemBond *bond = &m->bonds[m->rings.bonds[k]];
            m->atom_rings[m->rings.atoms[k]]++;
            if (!bond->rings++ || n < bond->smallest_ring) bond->smallest_ring = n;
        }
    }
}

// Prepares the working arrays of a search.
static RingSearch ring_search_begin(ChemMol *m) {
    Arena *arena = &m->arena;
    int n = m->n_atoms;
    RingSearch s = {.m = m, .degree = arena_ints(arena, n), .covered = arena_ints(arena, n),
                    .done = arena_flags(arena, n), .changed = arena_flags(arena, n),
                    .active = arena_flags(arena, m->n_bonds), .parent = arena_ints(arena, n),
                    .depth = arena_ints(arena, n), .queue = arena_ints(arena, n + 1),
                    .ring = arena_ints(arena, n + 1), .colour = arena_flags(arena, n),
                    .degree_then = arena_ints(arena, n),
                    .active_then = arena_flags(arena, m->n_bonds)};
    memset(s.active, 1, (size_t)m->n_bonds);
    for (int i = 0; i < n; i++) s.degree[i] = mol_degree(m, i);
    return s;
}

// Finds all rings into m->rings, fragment by fragment, and the ring counts of atoms and bonds.
// RDKit: MolOps::symmetrizeSSSR, MolOps::getMolFrags
static int find_rings(ChemMol *m, Fault *fault) {
    RingList extra = {0};
    int n_fragments = 0, *fragment_of = arena_ints(&m->arena, m->n_atoms);
    int *first = arena_ints(&m->arena, m->n_atoms + 1), *next = arena_ints(&m->arena, m->n_atoms);
    for (int i = 0; i < m->n_atoms; i++)
        if (!fragment_of[i]) flood(m, NULL, i, ++n_fragments, fragment_of, next);
    for (int i = m->n_atoms - 1; i >= 0; i--) {  // chains of the atoms of a fragment, plus 1
        next[i] = first[fragment_of[i]];
        first[fragment_of[i]] = i + 1;
    }
    m->rings = (RingList){0};
    if (m->n_bonds - m->n_atoms + n_fragments > 0) {
        RingSearch s = ring_search_begin(m);
        int *fragment = arena_ints(&m->arena, m->n_atoms);
        for (int f = 1; f <= n_fragments && spend(&m->arena, m->n_atoms / 16); f++) {
            int n = 0, degrees = 0;
            for (int i = first[f]; i; i = next[i - 1]) {
                fragment[n++] = i - 1;
                degrees += mol_degree(m, i - 1);
            }
            if (degrees / 2 < n) continue;
            if (!search_fragment(&s, fragment, n, degrees / 2, &extra))
                return fault_at(fault, 0, 0, "rings too intricate",
                                "the ring search finds too few rings at atom %d", fragment[0] + 1);
            for (int r = 0; r < s.found.n; r++) ring_copy(&m->arena, &m->rings, &s.found, r);
        }
        symmetrize_rings(m, &extra);
    }
    count_rings(m);
    return 0;
}

// =================================================================================================
// 9 Kekule structure. Aromatic bonds become alternating single and double ones: every atom that
//   must have a double bond gets exactly one. The search walks through a fused system, takes the
//   first partner it can and returns to the last choice when an atom is left alone.
//
//   Which atoms must? Counting aromatic bonds as single, an atom is short of its valence by one if
//   it takes part in a double bond: the carbons of pyrrole do, its N-H does not, and without the
//   explicit hydrogen (c1ccnc1) its nitrogen would too: then five atoms cannot pair, and the
//   molecule is refused. Later steps start from the Kekule structure, never from the input's idea
//   of what is aromatic. A dummy atom in an aromatic ring could be anything; it is refused.
// =================================================================================================

enum { BACKTRACKS_MAX = 100 };  // RDKit: the default of maxBackTracks

// Bonds of ring r that are stamped with this number.
static int stamped_bonds(const RingList *rings, int r, const int *stamp, int number) {
    int n = 0;
    for (int k = rings->start[r]; k < rings->start[r + 1]; k++)
        n += stamp[rings->bonds[k]] == number;
    return n;
}

// Neighbouring rings of each ring, in rising order: next[first[r]..first[r + 1]). The others are
// working arrays of fused_system().
typedef struct { int *first, *next, *path, *at; uint8_t *done; } RingNeighbours;

// Rings that share a bond (max_shared = 0: any number of bonds; else at most so many), those larger
// than max_size (0: no limit) left out. The result lives in the molecule's arena.
// RDKit: RingUtils::makeRingNeighborMap
static RingNeighbours ring_neighbours(ChemMol *m, const RingList *rings, int max_size,
                                      int max_shared) {
    Arena *arena = &m->arena;
    RingNeighbours nb = {arena_ints(arena, rings->n + 1), NULL, arena_ints(arena, rings->n),
                         arena_ints(arena, rings->n), arena_flags(arena, rings->n)};
    int room = 0, used = 0, *stamp = arena_ints(arena, m->n_bonds);
    for (int r = 0; r < rings->n && spend(arena, rings->used); r++) {
        nb.first[r] = used;
        for (int k = rings->start[r]; k < rings->start[r + 1]; k++) stamp[rings->bonds[k]] = r + 1;
        for (int q = 0; q < rings->n; q++) {
            int size = max_int(ring_size(rings, r), ring_size(rings, q));
            if (q == r || (max_size && size > max_size)) continue;
            int shared = stamped_bonds(rings, q, stamp, r + 1);
            if (!shared || (max_shared && shared > max_shared)) continue;
            if (used == room) nb.next = arena_grow(arena, nb.next, &room, sizeof(int));
            nb.next[used++] = q;
        }
    }
    nb.first[rings->n] = used;
    return nb;
}

// The fused system of ring r in depth-first order into system, which has room for all rings; marks
// its rings done. Returns how many there are, 0 if r was done before.
// RDKit: RingUtils::pickFusedRings
static int fused_system(const RingNeighbours *nb, int r, int *system) {
    int n = 0, depth = 0;
    if (nb->done[r]) return 0;
    nb->path[0] = r;
    nb->at[0] = nb->first[r];
    nb->done[r] = 1;
    system[n++] = r;
    while (depth >= 0) {
        if (nb->at[depth] >= nb->first[nb->path[depth] + 1]) {
            depth--;
            continue;
        }
        int next = nb->next[nb->at[depth]++];
        if (nb->done[next]) continue;
        nb->done[next] = 1;
        system[n++] = next;
        nb->path[++depth] = next;
        nb->at[depth] = nb->first[next];
    }
    return n;
}

// State of the search for one fused system. The arrays live in the molecule's arena.
typedef struct {
    ChemMol *m;
    int n, *atoms;            // of the system
    uint8_t *inside;          // per atom: in the system
    uint8_t *wants;           // per atom: must get a double bond
    int n_done, *done;
    uint8_t *is_done;
    int head, tail, *queue;   // atoms to visit; a deque growing in both directions
    uint8_t *queued;
    uint8_t *doubled;         // per bond: made double here
    int n_choices, *choice;   // atoms at which other partners were left untried
    int *partners;            // room for every atom's partners, laid out like its bonds
    int **untried, *n_untried;  // per atom
} KekuleSearch;

// Whether an aromatic atom must take a double bond: its single-bond count plus one more makes the
// valence it should have. `order_sum` counts aromatic bonds as single.
// RDKit: markDbondCands
static int wants_double_bond(const ChemMol *m, int i, int order_sum, int n_zero) {
    const ChemAtom *a = &m->atoms[i];
    const Element *e = &ELEMENTS[a->z];
    int shift = valence_shift(a), wanted = e->valence[0] + shift;
    int total = total_valence(a), k = 1;
    int degree = mol_degree(m, i) + (a->no_implicit ? 0 : a->implicit_h) - n_zero;
    order_sum += atom_hydrogens(a);
    while (total > wanted && k < e->n_valences && e->valence[k] > 0)
        wanted = e->valence[k++] + shift;
    if (total == 5 && order_sum == 4 && wanted == 3 && degree == 3 && a->radicals == 0 &&
        shift == 0 && atom_hydrogens(a) == 0 && (a->z == 7 || a->z == 15 || a->z == 33))
        wanted = 5;
    if (degree + a->radicals >= wanted) return 0;
    if (wanted == order_sum + 1 + a->radicals) return 1;
    return !a->radicals && a->no_implicit && wanted == order_sum + 2;  // it will be a radical
}

// Finds out which atoms of the system want a double bond, and makes all its aromatic bonds single.
// Atoms that are not aromatic are done with.
// RDKit: markDbondCands
static void mark_wanting_atoms(KekuleSearch *s) {
    ChemMol *m = s->m;
    for (int k = 0; k < s->n; k++) {
        int i = s->atoms[k], order_sum = 0, n_zero = 0;
        if (!is_aromatic_atom(m, i)) {
            s->done[s->n_done++] = i;
            s->is_done[i] = 1;
            continue;
        }
        for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
            if (l->bond->aromatic) l->bond->order = ORDER_SINGLE;
            int order = (twice_contribution(l->bond, i) + 1) / 2;
            order_sum += order;
            n_zero += order == 0;
        }
        s->wants[i] = (uint8_t)wants_double_bond(m, i, order_sum, n_zero);
    }
}

// Undoes everything since the last choice: visited atoms go back to the front of the queue, double
// bonds between them become single.
// RDKit: backTrack
static void return_to_choice(KekuleSearch *s, int last) {
    ChemMol *m = s->m;
    for (int i = -1; s->n_done && i != last;) {
        i = s->done[--s->n_done];
        s->is_done[i] = 0;
        s->queue[--s->head] = i;
        s->queued[i] = 1;
    }
    for (int b = 0; b < m->n_bonds; b++) {
        int i = m->bonds[b].begin, j = m->bonds[b].end;
        if (!s->doubled[b] || s->is_done[i] || s->is_done[j]) continue;
        s->doubled[b] = 0;
        m->bonds[b].order = ORDER_SINGLE;
        s->wants[i] = s->wants[j] = 1;
    }
}

// Partners atom i could share a double bond with, into partners; returns how many. Unvisited
// neighbours join the queue.
// RDKit: kekulizeWorker
static int find_partners(KekuleSearch *s, int i, int *partners) {
    ChemMol *m = s->m;
    int n = 0;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
        int j = l->atom;
        if (s->is_done[j] || !s->inside[j]) continue;
        if (!s->queued[j]) {
            s->queue[s->tail++] = j;
            s->queued[j] = 1;
        }
        if (s->wants[i] && s->wants[j] && l->bond->aromatic) partners[n++] = j;
    }
    return n;
}

// Makes the bond from i to the first of its partners double and remembers the others.
// RDKit: kekulizeWorker
static void take_partner(KekuleSearch *s, int i, int *partners, int n) {
    int b = bond_between(s->m, i, partners[0]), seen_before = s->untried[i] != NULL;
    s->m->bonds[b].order = ORDER_DOUBLE;
    s->wants[i] = s->wants[partners[0]] = 0;
    s->doubled[b] = 1;
    s->n_untried[i] = n - 1;
    s->untried[i] = n > 1 ? partners + 1 : NULL;
    if (n > 1 && !seen_before) s->choice[s->n_choices++] = i;
    if (n == 1 && seen_before) s->n_choices--;
}

// The search itself. Returns 0 if there is no Kekule structure, or none is found within
// BACKTRACKS_MAX returns to earlier choices.
// RDKit: kekulizeWorker
static int kekulize_system(KekuleSearch *s) {
    ChemMol *m = s->m;
    int backtracks = 0, unvisited = 0;
    s->n_choices = 0;
    s->head = s->tail = (BACKTRACKS_MAX + 1) * s->n;
    while ((s->n_done < s->n || s->head < s->tail) && spend(&m->arena, unvisited)) {
        int i, n;
        if (s->head < s->tail) {
            i = s->queue[s->head++];
            s->queued[i] = 0;
        } else {
            for (unvisited = 0; s->is_done[s->atoms[unvisited]];) unvisited++;
            i = s->atoms[unvisited];
        }
        s->done[s->n_done++] = i;
        s->is_done[i] = 1;
        int *partners = s->untried[i], wanting = s->wants[i];
        if (partners) {
            n = s->n_untried[i];
        } else {
            partners = s->partners + (m->first[i] - m->first[0]);
            n = find_partners(s, i, partners);
        }
        if (!wanting) continue;
        if (n) {
            take_partner(s, i, partners, n);
        } else {
            if (!s->n_choices || backtracks == BACKTRACKS_MAX || !spend(&m->arena, m->n_bonds))
                return 0;
            return_to_choice(s, s->choice[s->n_choices - 1]);
            backtracks++;
        }
    }
    return 1;
}

// Working arrays of a search; the deque has room for every return to a choice.
static KekuleSearch kekule_begin(ChemMol *m) {
    Arena *arena = &m->arena;
    int n = m->n_atoms;
    return (KekuleSearch){
        .m = m, .atoms = arena_ints(arena, n), .inside = arena_flags(arena, n),
        .wants = arena_flags(arena, n), .done = arena_ints(arena, n),
        .is_done = arena_flags(arena, n), .queued = arena_flags(arena, n),
        .queue = arena_take(arena, (size_t)n, (BACKTRACKS_MAX + 2) * sizeof(int)),
        .doubled = arena_flags(arena, m->n_bonds), .choice = arena_ints(arena, n),
        .partners = arena_ints(arena, 2 * m->n_bonds), .n_untried = arena_ints(arena, n),
        .untried = arena_take(arena, (size_t)n, sizeof(int *))};
}

// Whether a ring with a dummy atom is aromatic: all its real atoms are, one of them not because of
// another ring. *dummies: it is made of dummy atoms only.
static int is_dubious_ring(ChemMol *m, int r, int *dummies) {
    int n_real = 0, n_aromatic = 0, own = 0, n = ring_size(&m->rings, r);
    for (int k = 0; k < n; k++) {
        int i = ring_atoms(&m->rings, r)[k];
        if (!spend(&m->arena, mol_degree(m, i))) break;
        n_real += m->atoms[i].z != 0;
        if (m->atoms[i].z == 0 || !is_aromatic_atom(m, i)) continue;
        n_aromatic++;
        own |= m->atom_rings[i] == 1;
    }
    *dummies = n_real == 0;
    return own && n_real < n && n_aromatic == n_real;
}

// Kekulizes every fused system of rings; rings of nothing but dummy atoms stay as they are.
// RDKit: kekulizeFused
static int kekulize_rings(ChemMol *m, Fault *fault) {
    RingList rings = {0};
    for (int r = 0, dummies; r < m->rings.n; r++) {
        if (is_dubious_ring(m, r, &dummies))
            return fault_at(fault, 0, 0, "dummy atom in an aromatic ring",
                            "the aromatic ring of atom %d has a dummy atom",
                            ring_atoms(&m->rings, r)[0] + 1);
        if (!dummies) ring_copy(&m->arena, &rings, &m->rings, r);
    }
    RingNeighbours nb = ring_neighbours(m, &rings, 0, 0);
    KekuleSearch s = kekule_begin(m);
    int *system = arena_ints(&m->arena, rings.n);
    for (int r = 0; r < rings.n && spend(&m->arena, 1); r++) {
        int n_rings = fused_system(&nb, r, system), culprit = INT_MAX;
        if (!n_rings || !spend(&m->arena, (m->n_atoms + m->n_bonds) / 16)) continue;
        s.n = s.n_done = 0;
        memset(s.inside, 0, (size_t)m->n_atoms);
        memset(s.is_done, 0, (size_t)m->n_atoms);
        memset(s.doubled, 0, (size_t)m->n_bonds);
        for (int q = 0; q < n_rings; q++)
            for (int k = rings.start[system[q]]; k < rings.start[system[q] + 1]; k++) {
                if (s.inside[rings.atoms[k]]) continue;
                s.inside[rings.atoms[k]] = 1;
                s.untried[rings.atoms[k]] = NULL;
                s.atoms[s.n++] = rings.atoms[k];
            }
        mark_wanting_atoms(&s);
        for (int k = 0; k < s.n; k++)
            if (s.wants[s.atoms[k]]) culprit = min_int(culprit, s.atoms[k]);
        if (!kekulize_system(&s))
            return fault_at(fault, 0, 0, "no Kekule structure",
                            "the aromatic ring system of atom %d has no Kekule structure",
                            culprit + 1);
    }
    return 0;
}

// Replaces aromatic bonds by a Kekule structure and takes all aromatic flags off. The hydrogen of a
// pyrrole nitrogen, which had to be explicit, becomes an implicit one.
// RDKit: MolOps::Kekulize
static int kekulize(ChemMol *m, Fault *fault) {
    if (!m->any_aromatic) return 0;
    int *before = arena_ints(&m->arena, m->n_atoms);
    for (int i = 0; i < m->n_atoms; i++) before[i] = total_valence(&m->atoms[i]);
    m->had_aromatic = 1;
    if (kekulize_rings(m, fault)) return -1;
    for (int b = 0; b < m->n_bonds; b++) m->bonds[b].aromatic = 0;
    for (int i = 0; i < m->n_atoms; i++) {
        ChemAtom *a = &m->atoms[i];
        if (!a->aromatic) continue;
        if (!m->atom_rings[i])
            return fault_at(fault, 0, 0, "aromatic atom outside a ring",
                            "atom %d (%.*s) is marked aromatic but in no ring", i + 1,
                            SYMBOL(a->z));
        a->aromatic = 0;
        if ((a->z == 7 || a->z == 15) && a->charge == 0 && a->explicit_h == 1) {
            a->no_implicit = a->explicit_h = 0;
            update_valence(m, i);
        }
    }
    for (int i = 0; i < m->n_atoms; i++)
        if (total_valence(&m->atoms[i]) != before[i])
            return fault_at(fault, 0, 0, "no Kekule structure",
                            "the Kekule structure changes the valence of atom %d", i + 1);
    return 0;
}

// =================================================================================================
// 10 Radicals, aromaticity, conjugation, hybridization
// =================================================================================================

// Electrons an atom with explicit hydrogens is short of: up to the octet (or the next allowed
// valence of a heavy atom), but no more than it has; for metals, parity decides.
// RDKit: MolOps::assignRadicals
static int count_radicals(const ChemMol *m, int i) {
    const ChemAtom *a = &m->atoms[i];
    const Element *e = &ELEMENTS[a->z];
    int twice = 2 * a->explicit_h + twice_bonds(m, i), octet = a->z <= 2 ? 2 : 8;
    if (e->n_valences == 1 && e->valence[0] == -1)
        return e->outer - a->charge > 0 ? (e->outer - a->charge) % 2 : 0;
    int valence = twice / 2, missing = octet - e->outer - valence + a->charge;
    if (missing < 0) {
        int k = 0;
        while (k < e->n_valences && e->valence[k] - valence + a->charge < 0) k++;
        missing = e->n_valences > 1 && k < e->n_valences ? e->valence[k] - valence + a->charge : 0;
    }
    int available = e->outer - valence - a->charge;
    return available >= 0 ? min_int(available, missing) : missing;
}

// Radicals of all atoms that take no implicit hydrogens and had no radical given.
// RDKit: MolOps::assignRadicals
static void assign_radicals(ChemMol *m) {
    for (int i = 0; i < m->n_atoms; i++) {
        ChemAtom *a = &m->atoms[i];
        if (a->no_implicit && !a->radicals && a->z) a->radicals = (uint8_t)count_radicals(m, i);
    }
}

// ---- aromaticity (RDKit's own model): a ring is aromatic if every atom of it can take part and
//   they offer 4n+2 electrons between them (Hueckel). An atom offers
//
//     one    C=C in the ring, pyridine N          two    pyrrole N-H, furan O, thiophene S
//     none   C=O (oxygen keeps the electron), tropylium C+      one or two    a dummy atom
//
//   Rings are tried one by one, then fused pairs, triples, up to six rings at once. A fused set is
//   counted along its outside: in azulene neither ring obeys the rule alone, but the ten atoms
//   together do, and the bond between the rings stays as it is. Bonds that become aromatic are
//   those on the outside of some aromatic set.

// Electrons an atom can give to a pi system; -1 if it cannot be part of one.
// RDKit: MolOps::countAtomElec
static int pi_electrons(const ChemMol *m, int i) {
    const ChemAtom *a = &m->atoms[i];
    int valence = default_valence(a->z), degree = total_degree(m, i) - zero_bonds(m, i);
    if (valence <= 1 || degree > 3) return -1;
    int lone = ELEMENTS[a->z].outer - valence - a->charge;
    int n = valence - degree + max_int(lone, 0) - a->radicals;
    return n > 1 && a->valence - mol_degree(m, i) > 1 ? 1 : n;  // part of a triple bond: one of two
}

// What an atom offers: the least and most electrons, or nothing.
typedef enum { DONOR_NONE, DONOR_VACANT, DONOR_ONE, DONOR_TWO, DONOR_ANY } Donor;

// A multiple bond of atom i in a ring (ring = 1) or outside (0); returns its other atom or -1.
// RDKit: incidentCyclicMultipleBond, incidentNonCyclicMultipleBond
static int multiple_bond_to(const ChemMol *m, int i, int ring) {
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++)
        if ((l->bond->rings > 0) == ring && twice_contribution(l->bond, i) >= 4) return l->atom;
    return -1;
}

// What atom i offers a ring. A multiple bond to outside the ring takes an electron along if its
// other atom is the more electronegative one (C=O), and shares it otherwise (C=C).
// RDKit: getAtomDonorTypeArom, incidentMultipleBond
static Donor donor_type(const ChemMol *m, int i) {
    const ChemAtom *a = &m->atoms[i];
    int n = pi_electrons(m, i), outside = multiple_bond_to(m, i, 0);
    if (a->z == 0) return multiple_bond_to(m, i, 1) >= 0 ? DONOR_ONE : DONOR_ANY;
    int stolen = outside >= 0 && more_electronegative(m->atoms[outside].z, a->z);
    if (n < 0) return DONOR_NONE;
    if (n == 0) {
        if (outside >= 0) return DONOR_VACANT;
        return multiple_bond_to(m, i, 1) >= 0 ? DONOR_ONE : DONOR_NONE;
    }
    if (n == 1) {
        if (outside >= 0) return stolen ? DONOR_VACANT : DONOR_ONE;
        if (a->valence != mol_degree(m, i) + a->explicit_h - zero_bonds(m, i)) return DONOR_ONE;
        return a->charge == 1 ? DONOR_VACANT : DONOR_NONE;  // tropylium, cyclopropenylium
    }
    return (n - stolen) % 2 == 1 ? DONOR_ONE : DONOR_TWO;
}

// Whether an atom may be aromatic at all.
// RDKit: isAtomCandForArom
static int may_be_aromatic(const ChemMol *m, int i, Donor donor) {
    const ChemAtom *a = &m->atoms[i];
    int n_multiple = 0;
    if (a->z > 18 && a->z != 34 && a->z != 52) return 0;
    if (donor == DONOR_NONE) return 0;
    if (default_valence(a->z) > 0 && total_valence(a) > default_valence(a->z - a->charge)) return 0;
    if (a->radicals && (a->z != 6 || a->charge)) return 0;
    if (a->valence - mol_degree(m, i) <= 1) return 1;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++)
        n_multiple += l->bond->order == ORDER_DOUBLE || l->bond->order == ORDER_TRIPLE;
    return n_multiple <= 1;
}

enum { FUSED_MAX = 6, FUSED_RING_MAX = 24, MANY_RINGS = 300 };

typedef struct {
    ChemMol *m;
    RingList rings;          // all of whose atoms may be aromatic
    RingNeighbours nb;
    Donor *donor;            // DONOR_NONE for atoms that may not be aromatic
    int *atom_count;         // rings of the current subset an atom is in
    int *bond_count;
    int *counted;            // per bond: 1 + first ring of the last system that has it
    int n_done;              // bonds of the system that became aromatic
    int subset[FUSED_MAX];   // of its rings
    int *frontiers;          // see grow_subsets(), one after another
    uint8_t *seen;           // per ring: in the subset or a frontier
} AromaticSearch;

// Hueckel's rule for the atoms of a subset of rings that are in one or two of them (an atom in
// three is buried). An electron count that is not fixed may be either number.
// RDKit: applyHuckel, getMinMaxAtomElecs
static int obeys_hueckel(const AromaticSearch *s, int n) {
    int low = 0, high = 0, n_any = 0;
    for (int q = 0; q < n; q++)
        for (int k = s->rings.start[s->subset[q]]; k < s->rings.start[s->subset[q] + 1]; k++) {
            int i = s->rings.atoms[k], count = s->atom_count[i];
            Donor d = s->donor[i];
            s->atom_count[i] = 0;  // each atom once
            if (count == 0 || count > 2) continue;
            n_any += d == DONOR_ANY;
            low += d == DONOR_TWO ? 2 : d == DONOR_ONE || d == DONOR_ANY;
            high += d == DONOR_TWO || d == DONOR_ANY ? 2 : d == DONOR_ONE;
        }
    if (n_any > 1) return 0;
    if (high == 2) return 1;
    for (int e = low; e <= high && high >= 6; e++)
        if ((e - 2) % 4 == 0) return 1;
    return 0;
}

// Tests the subset of n fused rings; if aromatic, marks its atoms, and the bonds on its outside.
// RDKit: applyHuckelToFused, markAtomsBondsArom
static void test_subset(AromaticSearch *s, int n) {
    ChemMol *m = s->m;
    for (int q = 0; q < n; q++) spend(&m->arena, 3 * ring_size(&s->rings, s->subset[q]));
    for (int q = 0; q < n; q++)
        for (int k = s->rings.start[s->subset[q]]; k < s->rings.start[s->subset[q] + 1]; k++) {
            s->atom_count[s->rings.atoms[k]]++;
            s->bond_count[s->rings.bonds[k]]++;
        }
    int aromatic = obeys_hueckel(s, n);
    m->any_aromatic |= aromatic;
    for (int q = 0; q < n; q++)
        for (int k = s->rings.start[s->subset[q]]; k < s->rings.start[s->subset[q] + 1]; k++) {
            int count = s->bond_count[s->rings.bonds[k]];
            ChemBond *bond = &m->bonds[s->rings.bonds[k]];
            s->bond_count[s->rings.bonds[k]] = 0;  // each bond once
            if (!aromatic) continue;
            m->atoms[s->rings.atoms[k]].aromatic = 1;
            if (count != 1) continue;
            s->n_done += !bond->aromatic;
            bond->aromatic = 1;
            if (bond->order == ORDER_SINGLE || bond->order == ORDER_DOUBLE)
                bond->order = ORDER_AROMATIC;
        }
}

// Tests the connected subsets of `size` rings, each once (Wernicke's ESU). They hold n by now, at
// first none; one more is taken from the frontier, which then grows by those of its neighbours that
// no earlier ring touches. The first ring, taken from the whole system, is the lowest.
// RDKit: checkFused; it tries all subsets and drops the unconnected ones
static void grow_subsets(AromaticSearch *s, int n, int size, const int *frontier, int n_frontier) {
    int *next = s->frontiers + n * s->rings.n;
    for (int f = 0; f < n_frontier && spend(&s->m->arena, n > 0 ? n_frontier - f : 1); f++) {
        int ring = frontier[f], n_next = 0, n_old;
        s->subset[n] = ring;
        if (n + 1 == size) {
            test_subset(s, size);
            continue;
        }
        for (int k = f + 1; n > 0 && k < n_frontier; k++) next[n_next++] = frontier[k];
        n_old = n_next;
        for (int k = s->nb.first[ring]; k < s->nb.first[ring + 1]; k++) {
            int r = s->nb.next[k];
            if (r <= s->subset[0] || s->seen[r]) continue;
            s->seen[r] = 1;
            next[n_next++] = r;
        }
        grow_subsets(s, n + 1, size, next, n_next);
        while (n_next > n_old) s->seen[next[--n_next]] = 0;
    }
}

// Tests one fused system: single rings, then pairs, triples, ... until all its bonds are aromatic.
// RDKit: applyHuckelToFused
static void test_system(AromaticSearch *s, const int *system, int n) {
    int n_bonds = 0;
    for (int q = 0; q < n; q++)
        for (int k = s->rings.start[system[q]]; k < s->rings.start[system[q] + 1]; k++) {
            n_bonds += s->counted[s->rings.bonds[k]] != system[0] + 1;
            s->counted[s->rings.bonds[k]] = system[0] + 1;
        }
    s->n_done = 0;
    for (int size = 1; size <= FUSED_MAX && size <= n && s->n_done < n_bonds; size++) {
        if (size == 3 && n > MANY_RINGS) break;  // as RDKit does
        grow_subsets(s, 0, size, system, n);
    }
}

// Marks aromatic atoms and bonds. Returns whether there are rings all of whose atoms, at least one
// of them not a dummy, may be aromatic.
// RDKit: MolOps::setAromaticity, aromaticityHelper
static int assign_aromaticity(ChemMol *m) {
    AromaticSearch s = {.m = m};
    if (m->rings.n == 0) return 0;
    s.donor = arena_take(&m->arena, (size_t)m->n_atoms, sizeof *s.donor);
    for (int i = 0; i < m->n_atoms; i++) {
        Donor donor = m->atom_rings[i] ? donor_type(m, i) : DONOR_NONE;
        s.donor[i] = may_be_aromatic(m, i, donor) ? donor : DONOR_NONE;
    }
    for (int r = 0; r < m->rings.n; r++) {
        int all = 1, real = 0;
        for (int k = m->rings.start[r]; k < m->rings.start[r + 1]; k++) {
            all &= s.donor[m->rings.atoms[k]] != DONOR_NONE;
            real |= m->atoms[m->rings.atoms[k]].z != 0;
        }
        if (all && real) ring_copy(&m->arena, &s.rings, &m->rings, r);
    }
    if (s.rings.n == 0) return 0;
    s.nb = ring_neighbours(m, &s.rings, FUSED_RING_MAX, 1);
    s.atom_count = arena_ints(&m->arena, m->n_atoms);
    s.bond_count = arena_ints(&m->arena, m->n_bonds);
    s.frontiers = arena_ints(&m->arena, FUSED_MAX * s.rings.n);
    s.seen = arena_flags(&m->arena, s.rings.n);
    s.counted = arena_ints(&m->arena, m->n_bonds);
    int *system = arena_ints(&m->arena, s.rings.n);
    for (int r = 0; r < s.rings.n; r++) test_system(&s, system, fused_system(&s.nb, r, system));
    return 1;
}

// ---- conjugation and hybridization

// Whether an atom can hand on conjugation: it has pi electrons and is not a heavy P or S.
// RDKit: isAtomConjugCand
static int is_conjugation_candidate(const ChemMol *m, int i) {
    int z = m->atoms[i].z, outer = ELEMENTS[z].outer;
    return (z <= 10 || (outer != 5 && outer != 6) || (outer == 6 && total_degree(m, i) < 2)) &&
           pi_electrons(m, i) > 0;
}

// Aromatic bonds are conjugated; so is a multiple bond and its single-bonded neighbour if the atom
// beyond can take part.
// RDKit: MolOps::setConjugation, markConjAtomBonds
static void assign_conjugation(ChemMol *m) {
    for (int b = 0; b < m->n_bonds; b++) m->bonds[b].conjugated = m->bonds[b].aromatic;
    for (int i = 0; i < m->n_atoms; i++) {
        int degree = total_degree(m, i), multiple_bonds = 0;
        for (Link *l = m->first[i]; l < m->first[i + 1]; l++)
            multiple_bonds |= twice_contribution(l->bond, i) >= 3;
        if (!multiple_bonds || degree < 2 || degree > 3) continue;
        if (!is_conjugation_candidate(m, i)) continue;
        for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
            ChemBond *multiple = l->bond;
            if (twice_contribution(multiple, i) < 3) continue;
            for (Link *o = m->first[i]; o < m->first[i + 1]; o++) {
                if (o == l || (multiple->conjugated && o->bond->conjugated)) continue;
                if (total_degree(m, o->atom) > 3 || !is_conjugation_candidate(m, o->atom)) continue;
                multiple->conjugated = o->bond->conjugated = 1;
            }
        }
    }
}

// Number of orbitals an atom needs: its bonds, lone pairs and, below an octet, radicals.
// RDKit: numBondsPlusLonePairs
static int bonds_and_lone_pairs(const ChemMol *m, int i) {
    const ChemAtom *a = &m->atoms[i];
    int degree = total_degree(m, i), outer = ELEMENTS[a->z].outer, valence = total_valence(a);
    if (a->z <= 1) return degree;
    int unbound = outer - (valence + a->charge);
    if (valence + outer - a->charge >= 8) return degree + unbound / 2;
    return degree + (unbound - a->radicals) / 2 + a->radicals;  // less than an octet
}

// A stereo centre's geometry settles its hybridization; otherwise the number of bonds and lone
// pairs does, except that a lone pair next to a double bond delocalises (the O of an ester is SP2).
// RDKit: MolOps::setHybridization
static int hybridization(const ChemMol *m, int i) {
    const ChemAtom *a = &m->atoms[i];
    static const uint8_t by_number[] = {HYBRID_MISC, HYBRID_MISC, HYBRID_SP, HYBRID_SP2, HYBRID_SP3,
                                        HYBRID_SP3D, HYBRID_SP3D2};
    int degree = total_degree(m, i), c = a->chirality;
    if (a->z == 0) return HYBRID_MISC;
    if ((c == CHI_CW || c == CHI_CCW) && degree == 4) return HYBRID_SP3;
    if (c == CHI_SQUARE && degree >= 2 && degree <= 4) return HYBRID_MISC;  // SP2D
    if (c == CHI_BIPYRAMID && degree >= 2 && degree <= 5) return HYBRID_SP3D;
    if (c == CHI_OCTAHEDRON && degree >= 2 && degree <= 6) return HYBRID_SP3D2;
    int n = a->z < 89 ? bonds_and_lone_pairs(m, i) : degree;
    if (n != 4) return n >= 0 && n <= 6 ? by_number[n] : HYBRID_MISC;  // S, or too many
    for (Link *l = m->first[i]; l < m->first[i + 1] && degree <= 3; l++)
        if (l->bond->conjugated) return HYBRID_SP2;
    return HYBRID_SP3;
}

// An aromatic atom may have lost implicit hydrogens to its new bond orders: they become explicit.
// RDKit: MolOps::adjustHs
static void restore_hydrogens(ChemMol *m) {
    for (int i = 0; i < m->n_atoms; i++) {
        ChemAtom *a = &m->atoms[i];
        int before = a->no_implicit ? 0 : a->implicit_h;
        update_valence(m, i);
        int now = a->no_implicit ? 0 : a->implicit_h;
        if (now >= before) continue;
        a->explicit_h = (uint16_t)(a->explicit_h + before - now);
        set_valence(m, i);
    }
}

// =================================================================================================
// 11 Stereo centres. Chirality is relative to the order of an atom's bonds: seen from the first,
//   the others run clockwise (CW, SMILES @@) or counterclockwise (CCW, @). A hydrogen that is only
//   a count comes last.
//
//              b
//              |          looking from a: b, c, d counterclockwise: CCW;
//        a --- X          swapping any two neighbours in the list makes it CW
//             / |
//            c  d
//
//   So whatever reorders the bonds of a centre must count the swaps: an odd number inverts it.
//   In this section every atom with a suitable shape is marked; section 13 keeps the real centres.
// =================================================================================================

#define PI 3.14159265358979323846

typedef struct { double x, y, z; } Point;

// From one atom to another.
static Point arm(const ChemMol *m, int from, int to) {
    const double *a = m->xyz[from], *b = m->xyz[to];
    return (Point){b[0] - a[0], b[1] - a[1], b[2] - a[2]};
}

static double dot(Point a, Point b) { return a.x * b.x + a.y * b.y + a.z * b.z; }

static Point cross(Point a, Point b) {
    return (Point){a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}

static Point unit(Point a) {
    double length = sqrt(dot(a, a));
    return (Point){a.x / length, a.y / length, a.z / length};
}

// Angle in 0 to pi; NaN if a vector has no length.
// RDKit: RDGeom::Point3D::angleTo
static double angle_between(Point a, Point b) {
    double c = dot(a, b) / sqrt(dot(a, a) * dot(b, b));
    return c <= -1 ? PI : c >= 1 ? 0 : acos(c);
}

// Whether a bond counts as a neighbour direction of atom i in tetrahedral stereo.
// RDKit: bondAffectsAtomChirality
static int bond_has_direction(const ChemBond *b, int i) {
    return b->order != ORDER_NONE && !(b->order == ORDER_DATIVE && b->begin == i);
}

// Number of such bonds.
// RDKit: getAtomNonzeroDegree
static int stereo_degree(const ChemMol *m, int i) {
    int n = 0;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++)
        n += bond_has_direction(l->bond, i);
    return n;
}

// A wavy bond at i says: the geometry here means nothing.
// RDKit: isWigglyBond
static int is_wavy(const ChemBond *b, int i) {
    return b->begin == i && b->order == ORDER_SINGLE && (b->direction == DIR_UNKNOWN || b->unknown);
}

// Square planar, trigonal bipyramidal or octahedral geometry of an atom from phosphorus on, by the
// number of neighbours and of pairs of them opposite each other; CHI_NONE if it is none of them.
// RDKit: assignNontetrahedralChiralTypeFrom3D
static int nontetrahedral_class(const ChemMol *m, int i) {
    Point v[6];
    int n = mol_degree(m, i), pairs = 0, opposite[6] = {0}, loose[6], n_loose = 0;
    if (m->atoms[i].z < 15 || n < 3 || n > 6) return CHI_NONE;
    for (int k = 0; k < n; k++) {
        const Link *l = &m->first[i][k];
        if (is_wavy(l->bond, i)) return CHI_NONE;
        v[k] = unit(arm(m, i, l->atom));
    }
    for (int k = 0; k < n; k++)
        for (int q = k + 1; q < n; q++) {
            if (!(dot(v[k], v[q]) < -0.9)) continue;
            if (opposite[k] || opposite[q]) return CHI_NONE;
            opposite[k] = opposite[q] = 1;
            pairs++;
        }
    for (int k = 0; k < n; k++)
        if (!opposite[k]) loose[n_loose++] = k;
    if (pairs == 1 && n == 3) return CHI_SQUARE;  // T-shaped
    if (pairs == 1 && n == 4) {                   // see-saw: part of which polyhedron?
        double degrees = angle_between(v[loose[0]], v[loose[1]]) * (180 / PI);
        return degrees < 100 ? CHI_OCTAHEDRON : CHI_BIPYRAMID;
    }
    if (pairs == 1 && n == 5) return CHI_BIPYRAMID;
    if (pairs == 2 && n == 4) return CHI_SQUARE;
    if ((pairs == 2 && n == 5) || (pairs == 3 && n == 6)) return CHI_OCTAHEDRON;
    return CHI_NONE;
}

// Chirality from the sign of the volume its first three bonds span; a flat centre has none. For
// --stereo invariant of the volume that four neighbours span: whether three bonds of a strained
// centre agree with that depends on which come first.
// RDKit: MolOps::assignChiralTypesFrom3D
static int tetrahedral_class(const ChemMol *m, int i, int total) {
    int z = m->atoms[i].z, n = 0, end[4], from = i, most = m->stereo == TAGS_INVARIANT ? 4 : 3;
    if (total > 4 || (total != 4 && z != 16 && z != 34)) return CHI_NONE;
    for (Link *l = m->first[i]; l < m->first[i + 1] && n < most; l++) {
        if (is_wavy(l->bond, i)) return CHI_NONE;
        if (bond_has_direction(l->bond, i)) end[n++] = l->atom;
    }
    if (n < 3) return CHI_NONE;
    if (n == 4) from = end[3];
    double volume = dot(arm(m, from, end[0]), cross(arm(m, from, end[1]), arm(m, from, end[2])));
    if (n == 4) volume /= 4;  // of a regular tetrahedron: that of three bonds
    return volume < -0.1 ? CHI_CW : volume > 0.1 ? CHI_CCW : CHI_NONE;
}

// Chirality of every atom with three neighbours or more from its geometry. Whether it is a stereo
// centre is found out later.
// RDKit: MolOps::assignChiralTypesFrom3D
static void chirality_from_3d(ChemMol *m) {
    for (int i = 0; i < m->n_atoms; i++) {
        int found = CHI_NONE, degree = mol_degree(m, i) < 3 ? 0 : stereo_degree(m, i);
        int total = degree + atom_hydrogens(&m->atoms[i]);
        if (degree >= 3 && total <= 6) {
            found = nontetrahedral_class(m, i);
            if (found == CHI_NONE) found = tetrahedral_class(m, i, total);
        }
        m->atoms[i].chirality = (uint8_t)found;
    }
}

// ---- wedges in a drawing

// Angle from a to b counterclockwise in the plane, 0 to 2 pi.
// RDKit: RDGeom::Point3D::signedAngleTo
static double turn(Point a, Point b) {
    double angle = angle_between(a, b);
    return a.x * b.y - a.y * b.x < -1e-6 ? 2 * PI - angle : angle;
}

// Direction of a bond away from atom i, if it is drawn with its narrow end there.
static int wedge_at(const ChemBond *b, int i) { return b->begin == i ? b->direction : DIR_NONE; }

// Whether the wedges of a three-coordinate centre contradict each other (InChI technical manual,
// table 10). a01, a12, a20: angles between the bonds, a02 from the first to the last; d: wedges.
// RDKit: atomChiralTypeFromBondDir
static int wedges_conflict(double a01, double a12, double a20, double a02, const int d[3]) {
    if (a01 < PI - 1e-3 && a12 < PI - 1e-3 && a20 < PI - 1e-3)
        return (d[1] != DIR_NONE && d[1] != d[0]) || (d[2] != DIR_NONE && d[2] != d[0]);
    if (d[1] == d[0] && d[1] == d[2]) return 1;
    if (d[1] != DIR_NONE && d[1] != d[0])
        return a01 >= PI || (a02 > PI && d[2] != DIR_NONE && d[1] != d[2]) ||
               (a02 <= PI && d[2] != DIR_NONE && d[0] != d[2]);
    return d[0] == d[2];
}

// Chirality that wedge `w` gives to its first atom: the sense in which the other bonds turn, seen
// from above the paper.
// RDKit: atomChiralTypeFromBondDir
static int chirality_from_wedge(const ChemMol *m, const ChemBond *w) {
    int i = w->begin, n = 1, hydrogen = 0, single = 1;
    const Link *link[4];  // the wedge, then the others
    Point v[4];
    if (mol_degree(m, i) > 4) return CHI_NONE;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
        const ChemAtom *other = &m->atoms[l->atom];
        single &= l->bond->order == ORDER_SINGLE;
        hydrogen |= other->z == 1 && !other->isotope;
        link[l->bond == w ? 0 : n++] = l;
    }
    if (n < 3 || (hydrogen && n < 4)) return CHI_NONE;
    if (!single && m->atoms[i].z != 15 && m->atoms[i].z != 16) return CHI_NONE;
    for (int k = 0; k < n; k++) {
        v[k] = arm(m, i, link[k]->atom);
        v[k].z = 0;
        v[k] = unit(v[k]);
    }
    int ccw = 1, one = turn(v[0], v[1]) > turn(v[0], v[2]) ? 2 : 1, two = 3 - one;
    double a01 = turn(v[0], v[one]), a02 = turn(v[0], v[two]);
    if (n == 4) {  // does the third bond come between the two?
        double a03 = turn(v[0], v[3]);
        if (a01 < a02 ? a01 < a03 && !(a02 < a03) : (a01 < a03 || !(a02 < a03))) ccw = !ccw;
    } else {
        const int d[3] = {w->direction, wedge_at(link[one]->bond, i), wedge_at(link[two]->bond, i)};
        double a12 = turn(v[one], v[two]), a20 = turn(v[two], v[0]);
        int narrow = a01 < PI - 1e-3 && a12 < PI - 1e-3 && a20 < PI - 1e-3;
        if (wedges_conflict(a01, a12, a20, a02, d)) return CHI_NONE;
        if (!narrow) {
            ccw = a01 < a02;
            if (fabs(a02 - a01) >= PI - 1e-4) ccw = !ccw;  // the hydrogen is between these two
        }
    }
    if (w->direction == DIR_DASH) ccw = !ccw;
    if (one == 2) ccw = !ccw;
    for (int p = 0; p < n; p++)  // parity of the permutation from drawing order to bond order
        for (int q = p + 1; q < n; q++)
            if (link[p] > link[q]) ccw = !ccw;
    return ccw ? CHI_CCW : CHI_CW;
}

// Chirality from the wedges of a flat drawing. A wavy bond takes back what another bond said.
// RDKit: MolOps::assignChiralTypesFromBondDirs
static int chirality_from_wedges(ChemMol *m, Fault *fault) {
    uint8_t *set = arena_flags(&m->arena, m->n_atoms);
    for (int k = 0; k < m->n_bonds; k++) {
        const ChemBond *b = &m->bonds[k];
        ChemAtom *a = &m->atoms[b->begin];
        if (b->direction == DIR_UNKNOWN) {
            a->chirality = CHI_NONE;
            set[b->begin] = 1;
        }
        if ((b->direction != DIR_WEDGE && b->direction != DIR_DASH) || set[b->begin]) continue;
        if (a->no_implicit == 0 && a->implicit_h < 0) update_valence(m, b->begin);
        a->chirality = (uint8_t)chirality_from_wedge(m, b);
        if (a->chirality != CHI_NONE) set[b->begin] = 1;
        if (mol_degree(m, b->begin) == 3 && !a->explicit_h && atom_hydrogens(a) == 1) {
            a->explicit_h = 1;  // it has a place in the order of the bonds now
            int possible = update_valence(m, b->begin);
            if (valence_too_high(a) || !possible)
                return fault_at(fault, 0, 0, "valence too high", "atom %d (%.*s): valence %d",
                                b->begin + 1, SYMBOL(a->z), a->valence);
        }
    }
    return 0;
}

// =================================================================================================
// 12 Double bonds. The geometry around one is first written down as directions of its neighbouring
//   single bonds, which adjacent double bonds share; section 13 reads them. As in SMILES, seen
//   from the double bond two directions that are alike mean the same side:
//
//               F       F/C=C/F: both single bonds lead up to the right. Seen from the double
//              /        bond the first goes down (to F), the second up: opposite sides, E.
//       C === C         In F/C=C\F both go down: the same side, Z.
//      /
//     F
//
//   Directions are needed on one single bond at either end; where two double bonds share a single
//   bond (as in a diene), the one direction serves both. Hence an order in which double bonds are
//   worked on, and a walk from each one to its neighbours.
// =================================================================================================

enum { STEREO_RING_MIN = 8 };  // double bonds in smaller rings have no choice

// Whether a double bond is free to be either Z or E.
// RDKit: shouldDetectDoubleBondStereo
static int may_have_bond_stereo(const ChemBond *b) {
    return !b->rings || b->smallest_ring >= STEREO_RING_MIN;
}

// State while directions are assigned.
typedef struct {
    ChemMol *m;
    uint8_t *open;   // per bond: direction (single) or neighbours' directions (double) not set yet
    int *uses;       // per single bond: candidate double bonds beside it
    uint8_t *candidate;
} Directions;

// Bonds that can carry a direction.
static int is_single_like(const ChemBond *b) {
    return b->order == ORDER_SINGLE || b->order == ORDER_AROMATIC;
}

// The single bond at atom i that shall carry the direction, and the other one (or -1). Prefers one
// that has a direction already, then one with more double bonds beside it. Returns 1 if all is
// well, 0 if there is none or a wavy one, -1 if there is another double bond (an allene).
// RDKit: controllingBondFromAtom
static int controlling_bonds(const Directions *d, int double_bond, int i, int *main_bond,
                             int *other) {
    const ChemMol *m = d->m;
    *main_bond = *other = -1;
    int allene = 0;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
        int b = l->index;
        if (b == double_bond) continue;
        if (is_single_like(l->bond)) {
            if (*main_bond < 0) {
                *main_bond = b;
            } else if (d->open[b] && d->uses[b] <= d->uses[*main_bond]) {
                *other = b;
            } else {
                *other = *main_bond;
                *main_bond = b;
            }
            if (l->bond->direction == DIR_UNKNOWN || l->bond->unknown) return allene ? -1 : 0;
        } else if (l->bond->order == ORDER_DOUBLE) {
            allene = 1;
        }
    }
    return allene ? -1 : *main_bond >= 0;
}

// Whether two bonds from one atom lie in a line (within two degrees), or one has no length.
// RDKit: isLinearArrangement
static int is_linear(Point a, Point b) {
    double lengths = dot(a, a) * dot(b, b);
    return lengths < 1e-6 || dot(a, b) < -0.999388 * sqrt(lengths);
}

// If the main bond at an end of the double bond lies in its line, the other one takes over. The
// second end's other bond is measured from the wrong atom, as RDKit does. Returns 0 if both do.
// RDKit: updateDoubleBondNeighbors
static int avoid_linear(const ChemMol *m, int near, int far, int measure, int *main_bond,
                        int *other) {
    Point axis = arm(m, near, far);
    if (!is_linear(arm(m, near, bond_other(&m->bonds[*main_bond], near)), axis)) return 1;
    if (*other < 0) return 0;
    int swap = *main_bond;
    *main_bond = *other;
    *other = swap;
    return !is_linear(arm(m, measure, bond_other(&m->bonds[*main_bond], near)), axis);
}

// Gives a single bond a direction as seen from atom i, or its opposite.
// RDKit: setBondDirRelativeToAtom
static void set_direction(ChemBond *b, int i, int direction, int reverse) {
    if (b->begin != i) reverse = !reverse;
    b->direction = reverse ? opposite_direction(direction) : (uint8_t)direction;
}

// Sets the directions of the single bonds beside one double bond. `next` receives the other double
// bonds beside them, which shall follow at once; returns how many.
// RDKit: updateDoubleBondNeighbors
static int set_directions(Directions *d, int double_bond, int *next) {
    ChemMol *m = d->m;
    ChemBond *db = &m->bonds[double_bond];
    int end[2] = {db->begin, db->end}, bond[2], other[2], n_next = 0;
    if (!d->open[double_bond]) return 0;
    d->open[double_bond] = 0;
    if (!spend(&m->arena, mol_degree(m, end[0]) + mol_degree(m, end[1]))) return 0;
    for (int e = 0; e < 2; e++) {
        int state = controlling_bonds(d, double_bond, end[e], &bond[e], &other[e]);
        if (state == 0) db->direction = DIR_EITHER;
        if (state <= 0) return 0;
    }
    if (!avoid_linear(m, end[0], end[1], end[0], &bond[0], &other[0]) ||
        !avoid_linear(m, end[1], end[0], end[0], &bond[1], &other[1])) {
        db->direction = DIR_EITHER;
        return 0;
    }
    Point axis = arm(m, end[0], end[1]), normal[2];
    for (int e = 0; e < 2; e++)
        normal[e] = cross(arm(m, end[e], bond_other(&m->bonds[bond[e]], end[e])), axis);
    int trans = angle_between(normal[0], normal[1]) >= PI / 2;
    for (int e = 0; e < 2; e++) {
        const ChemBond *b = &m->bonds[bond[e]];
        for (int x = 0; x < 2 && d->open[bond[e]]; x++) {
            int i = x ? b->end : b->begin;
            for (Link *l = m->first[i]; l < m->first[i + 1] && spend(&m->arena, 1); l++)
                if (d->candidate[l->index] && d->open[l->index]) next[n_next++] = l->index;
        }
    }
    ChemBond *b0 = &m->bonds[bond[0]], *b1 = &m->bonds[bond[1]];
    if (d->open[bond[0]] && d->open[bond[1]]) {
        set_direction(b0, end[0], DIR_DOWN, 0);
        set_direction(b1, end[1], DIR_DOWN, trans);
    } else if (d->open[bond[1]]) {
        set_direction(b1, end[1], b0->direction, trans != (b0->begin != end[0]));
    } else if (d->open[bond[0]]) {
        set_direction(b0, end[0], b1->direction, trans != (b1->begin != end[1]));
    }
    d->open[bond[0]] = d->open[bond[1]] = 0;
    for (int e = 0; e < 2; e++) {
        if (other[e] < 0 || !d->open[other[e]]) continue;
        const ChemBond *b = &m->bonds[bond[e]];
        set_direction(&m->bonds[other[e]], end[e], b->direction, b->begin == end[e]);
        d->open[other[e]] = 0;
    }
    return n_next;
}

typedef struct { int64_t weight; int bond; } WeightedBond;

// Finds the candidate double bonds and their weights: the sum of the numbers of the single bonds
// beside them, ten times as much outside rings (RDKit adds it up in this way). `order` has room for
// all bonds. Returns how many there are.
// RDKit: MolOps::setDoubleBondNeighborDirections, isBondCandidateForStereo
static int direction_candidates(Directions *d, WeightedBond *order) {
    ChemMol *m = d->m;
    int n = 0;
    for (int b = 0; b < m->n_bonds; b++) {
        const ChemBond *bond = &m->bonds[b];
        int64_t weight = 0;
        if (bond->order != ORDER_DOUBLE || bond->stereo == STEREO_ANY ||
            bond->direction == DIR_EITHER || mol_degree(m, bond->begin) < 2 ||
            mol_degree(m, bond->end) < 2 || !may_have_bond_stereo(bond))
            continue;
        for (int e = 0; e < 2; e++) {
            int i = e ? bond->end : bond->begin;
            for (Link *l = m->first[i]; l < m->first[i + 1] && spend(&m->arena, 1); l++) {
                if (!is_single_like(l->bond)) continue;
                weight += l->index;
                d->uses[l->index]++;
                if (l->bond->direction == DIR_NONE || is_sloped(l->bond->direction))
                    d->open[l->index] = 1;
                d->open[b] = 1;
            }
        }
        d->candidate[b] = 1;
        order[n++] = (WeightedBond){bond->rings ? weight : 10 * weight, b};
    }
    return n;
}

// Larger weights first, then later bonds.
static int compare_weighted(const void *a, const void *b) {
    const WeightedBond *x = a, *y = b;
    if (x->weight != y->weight) return x->weight < y->weight ? 1 : -1;
    return (x->bond < y->bond) - (x->bond > y->bond);
}

// Bond directions from coordinates, double bond by double bond: by falling weight, and after each
// one those that share a single bond with it.
// RDKit: MolOps::detectBondStereochemistry, setDoubleBondNeighborDirections
static void directions_from_coordinates(ChemMol *m) {
    Arena *arena = &m->arena;
    Directions d = {m, arena_flags(arena, m->n_bonds), arena_ints(arena, m->n_bonds),
                    arena_flags(arena, m->n_bonds)};
    WeightedBond *order = arena_take(arena, (size_t)m->n_bonds, sizeof *order);
    int n = direction_candidates(&d, order);
    if (!n) return;
    int *stack = arena_ints(arena, 16 * m->n_bonds + 64), *next = arena_ints(arena, 4 * m->n_bonds);
    qsort(order, (size_t)n, sizeof *order, compare_weighted);
    for (int k = 0, top = 0; k < n; k++) {
        stack[top++] = order[k].bond;
        while (top) {
            int n_next = set_directions(&d, stack[--top], next);
            if (top + n_next > 16 * m->n_bonds) break;
            while (n_next) stack[top++] = next[--n_next];
        }
    }
}

// Wedges have said what they had to say; wavy bonds are remembered as such.
// RDKit: MolOps::clearSingleBondDirFlags
static void clear_wedges(ChemMol *m) {
    for (int k = 0; k < m->n_bonds; k++) {
        ChemBond *b = &m->bonds[k];
        if (b->order != ORDER_SINGLE) continue;
        if (b->direction == DIR_UNKNOWN) b->unknown = 1;
        b->direction = DIR_NONE;
    }
}

// =================================================================================================
// 13 CIP ranks (Labute's approximation): atoms are ranked by element and isotope, then again and
//   again by the ranks of their neighbours, each counted twice its bond order. A centre is real
//   if its neighbours' ranks differ, a double bond if they differ at both ends. Centres and double
//   bonds found this way refine the ranks, and may show others to be real: in
//   C[C@H](F)[C@H](Cl)[C@@H](C)F the middle carbon has two neighbours that differ only in being
//   R and S, which is known after the first round.
//
//   This is not the full Cahn-Ingold-Prelog rule (no trees, no duplicate atoms), and it need not
//   be: what matters is which neighbours are equal, and that Z and E come out as RDKit's do.
//   What is mirrored is the stereo perception RDKit calls legacy, its default in 2022.09.
// =================================================================================================

enum { SORT_STEPS = 4 };  // of the budget for sorting an entry, and for each member of its list

// An atom with what it is compared by: an invariant, or its neighbours' ranks, highest first.
typedef struct { int64_t value; int atom, n; const int *list; } CipEntry;

// By value, then by list; a list that ends comes before one that goes on. For qsort(), too.
static int compare_entries(const void *left, const void *right) {
    const CipEntry *a = left, *b = right;
    if (a->value != b->value) return a->value < b->value ? -1 : 1;
    for (int k = 0; k < a->n && k < b->n; k++)
        if (a->list[k] != b->list[k]) return a->list[k] < b->list[k] ? -1 : 1;
    return (a->n > b->n) - (a->n < b->n);
}

// Sorts entries; most groups of equals are small.
static void sort_entries(CipEntry *entries, int n) {
    if (n > 40) {
        qsort(entries, (size_t)n, sizeof *entries, compare_entries);
        return;
    }
    for (int i = 1; i < n; i++) {
        CipEntry moved = entries[i];
        int k = i;
        for (; k > 0 && compare_entries(&moved, &entries[k - 1]) < 0; k--)
            entries[k] = entries[k - 1];
        entries[k] = moved;
    }
}

// Writes the neighbour list of atom i: each neighbour's rank + 1, as often as twice the bond order
// (once for the double bond of a phosphoryl group), highest first, then 0 for each hydrogen.
// Returns its length.
// RDKit: iterateCIPRanks
static int neighbour_list(ChemMol *m, int i, const int *rank, int *list) {
    int n = 0, at = 0, hydrogens = m->atoms[i].query ? 0 : atom_hydrogens(&m->atoms[i]);
    for (Link *l = m->first[i]; l < m->first[i + 1] && spend(&m->arena, n - at); l++) {
        int j = l->atom, count = twice_order(l->bond), degree = mol_degree(m, j);
        if (l->bond->order == ORDER_DOUBLE && m->atoms[j].z == 15 && (degree == 3 || degree == 4))
            count = 1;
        for (at = n; at > 0 && list[at - 1] < rank[j] + 1; at--)
            list[at - 1 + count] = list[at - 1];
        for (int q = 0; q < count; q++) list[at + q] = rank[j] + 1;
        n += count;
    }
    for (; hydrogens > 0; hydrogens--) list[n++] = 0;
    return n;
}

// Ranks of sorted entries. Returns how many different ones there are.
// RDKit: iterateCIPRanks
static int assign_ranks(const CipEntry *entries, int n, int *rank) {
    int n_ranks = 0;
    for (int k = 0; k < n; k++) {
        if (k == 0 || compare_entries(&entries[k - 1], &entries[k]) != 0) n_ranks++;
        rank[entries[k].atom] = n_ranks - 1;
    }
    return n_ranks;
}

// Ranks by invariants, entries[i].value, then refines within equal ranks until they stop changing,
// all differ, or information has crossed half the molecule.
// RDKit: iterateCIPRanks
static void refine_cip_ranks(ChemMol *m, CipEntry *entries, int *rank) {
    int n = m->n_atoms, room = 0, n_ranks, last = -1, *lists;
    for (int i = 0; i < n; i++) {
        entries[i].atom = i;
        room += atom_hydrogens(&m->atoms[i]);
    }
    if (!spend(&m->arena, SORT_STEPS * n)) return;
    sort_entries(entries, n);
    n_ranks = assign_ranks(entries, n, rank);
    if (n_ranks == n) return;
    for (int b = 0; b < m->n_bonds; b++) room += 2 * twice_order(&m->bonds[b]);
    lists = arena_ints(&m->arena, room);
    for (int round = 0; round <= n / 2 && n_ranks < n && last < n_ranks; round++) {
        if (!spend(&m->arena, n)) return;
        for (int k = 0, used = 0, end; k < n; k = end) {
            int before = used;
            for (end = k; end < n && rank[entries[end].atom] == rank[entries[k].atom];) end++;
            for (int e = k; e < end; e++) {
                CipEntry *entry = &entries[e];
                entry->value = rank[entry->atom];
                entry->list = lists + used;
                entry->n = end - k > 1 ? neighbour_list(m, entry->atom, rank, lists + used) : 0;
                used += entry->n;
            }
            if (end - k > 1 && spend(&m->arena, SORT_STEPS * (int64_t)(end - k + used - before)))
                sort_entries(entries + k, end - k);
        }
        last = n_ranks;
        n_ranks = assign_ranks(entries, n, rank);
    }
}

// Ranks from scratch: element, isotope (as distance from the most common one), atom map number.
// RDKit: buildCIPInvariants, assignAtomCIPRanks
static void first_cip_ranks(ChemMol *m, int *rank) {
    CipEntry *entries = arena_take(&m->arena, (size_t)m->n_atoms, sizeof *entries);
    for (int i = 0; i < m->n_atoms; i++) {
        const ChemAtom *a = &m->atoms[i];
        int mass = a->isotope ? a->isotope - ELEMENTS[a->z].isotope : 0;
        if (a->isotope && mass >= 0) mass++;
        mass += 512;
        mass = mass < 0 ? 0 : mass % 1024;
        entries[i].value = ((int64_t)a->z % 128 << 10 | mass) << 10 | (a->map + 1ll) % 1024;
    }
    refine_cip_ranks(m, entries, rank);
}

// Ranks again, with the centres and double bonds known by now.
// RDKit: rerankAtoms
static void next_cip_ranks(ChemMol *m, int *rank) {
    CipEntry *entries = arena_take(&m->arena, (size_t)m->n_atoms, sizeof *entries);
    int64_t factor = 100;
    while (factor < m->n_atoms) factor *= 10;
    for (int i = 0; i < m->n_atoms; i++) {
        const ChemAtom *a = &m->atoms[i];
        int64_t value = rank[i] * factor + (a->cip == 'S' ? 10 : a->cip == 'R' ? 20 : 0);
        for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
            if (l->bond->order != ORDER_DOUBLE) continue;
            value += l->bond->stereo == STEREO_E ? 1 : l->bond->stereo == STEREO_Z ? 2 : 0;
        }
        entries[i].value = value;
    }
    refine_cip_ranks(m, entries, rank);
}

// ---- stereo centres

// Whether an atom is in a ring of this size.
// RDKit: RingInfo::isAtomInRingOfSize
static int is_in_ring_of_size(ChemMol *m, int i, int size) {
    for (int r = 0; r < m->rings.n && spend(&m->arena, 1); r++)
        if (ring_size(&m->rings, r) == size && ring_has(&m->rings, r, i)) return 1;
    return 0;
}

// Bridgehead: three ring bonds, and two rings through the atom that share two bonds or more.
// RDKit: queryIsAtomBridgehead
static int is_bridgehead(ChemMol *m, int i) {
    const RingList *rings = &m->rings;
    int n = 0;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++) n += l->bond->rings > 0;
    if (n < 3) return 0;
    int *stamp = arena_ints(&m->arena, m->n_bonds);
    for (int r = 0; r < rings->n && spend(&m->arena, ring_size(rings, r)); r++) {
        if (!ring_has(rings, r, i)) continue;
        for (int k = rings->start[r]; k < rings->start[r + 1]; k++) stamp[rings->bonds[k]] = r + 1;
        for (int q = r + 1; q < rings->n && spend(&m->arena, ring_size(rings, q)); q++)
            if (ring_has(rings, q, i) && stamped_bonds(rings, q, stamp, r + 1) >= 2) return 1;
    }
    return 0;
}

// Whether an atom has the neighbours of a stereo centre: four, or three and a hydrogen or a lone
// pair that does not invert.
// RDKit: isAtomPotentialChiralCenter
static int is_possible_centre(ChemMol *m, int i) {
    const ChemAtom *a = &m->atoms[i];
    int degree = stereo_degree(m, i), total = degree + atom_hydrogens(a);
    if (total > 4 || total < 3) return 0;
    if (degree < 3) return a->z == 15 || a->z == 33;
    if (degree > 3 || atom_hydrogens(a) == 1) return 1;
    if (a->z == 7) return is_in_ring_of_size(m, i, 3) || is_bridgehead(m, i);
    if (a->z == 15 || a->z == 33) return 1;
    return (a->z == 16 || a->z == 34) && (a->valence == 4 || (a->valence == 3 && a->charge == 1));
}

// R or S of a centre from its chirality and the ranks of its neighbours, or 0 if two are equal.
// RDKit: assignAtomChiralCodes, Atom::getPerturbationOrder
static char cip_label(const ChemMol *m, int i, const int *rank) {
    const ChemAtom *a = &m->atoms[i];
    int odd = mol_degree(m, i) == 3 && atom_hydrogens(a) == 1;
    for (Link *p = m->first[i]; p < m->first[i + 1]; p++)
        for (Link *q = p + 1; q < m->first[i + 1]; q++) {
            if (rank[p->atom] == rank[q->atom] && bond_has_direction(p->bond, i) &&
                bond_has_direction(q->bond, i))
                return 0;
            odd ^= rank[p->atom] > rank[q->atom];
        }
    return (a->chirality == CHI_CCW) != odd ? 'S' : 'R';
}

// Labels the centres whose neighbours differ. *open: some that may be centres are without a label.
// Returns whether any label is new.
// RDKit: assignAtomChiralCodes
static int label_centres(ChemMol *m, const int *rank, int *open) {
    int changed = 0;
    *open = 0;
    for (int i = 0; i < m->n_atoms; i++) {
        ChemAtom *a = &m->atoms[i];
        if (a->cip || a->chirality == CHI_NONE) continue;  // what is not marked never gets a label
        if (is_possible_centre(m, i)) a->cip = cip_label(m, i, rank);
        if (a->cip) changed = 1;
        else if (mol_degree(m, i) >= 3 || a->z >= 15) *open = 1;
    }
    return changed;
}

// ---- double bonds

enum { DIR_CONFLICT = -1 };

// The direction of the higher neighbour of atom i, an end of a double bond with one or two others,
// as seen from there. A neighbour without direction has the opposite of the other one's; if both
// have the same, that is a conflict. DIR_NONE if none is known or the neighbours are equal. *wavy:
// a wavy bond was seen.
// RDKit: findAtomNeighborDirHelper
static int end_direction(const ChemMol *m, int i, int double_bond, const int *rank, int *wavy) {
    int n = 0, atom[2], direction[2], known = 0;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
        const ChemBond *b = l->bond;
        if (b->direction == DIR_UNKNOWN || b->unknown) *wavy = 1;
        if (l->index == double_bond) continue;
        known |= is_sloped(b->direction);
        direction[n] = b->begin == i ? b->direction : opposite_direction(b->direction);
        atom[n++] = l->atom;
    }
    if (!known || (n == 2 && rank[atom[0]] == rank[atom[1]])) return DIR_NONE;
    if (n == 1) return direction[0];
    if (!is_sloped(direction[0])) direction[0] = opposite_direction(direction[1]);
    if (!is_sloped(direction[1])) direction[1] = opposite_direction(direction[0]);
    return direction[0] == direction[1] ? DIR_CONFLICT : direction[rank[atom[0]] < rank[atom[1]]];
}

// Labels double bonds Z, E or "any" if their ends say so. *open: some possible ones stay without a
// label for now. Returns whether any was dealt with.
// RDKit: assignBondStereoCodes
static int label_double_bonds(ChemMol *m, const int *rank, int *open) {
    uint8_t *forget = arena_flags(&m->arena, m->n_bonds);
    int changed = 0;
    *open = 0;
    for (int b = 0; b < m->n_bonds; b++) {
        ChemBond *bond = &m->bonds[b];
        int end[2] = {bond->begin, bond->end}, way[2], wavy = 0;
        int d1 = mol_degree(m, bond->begin), d2 = mol_degree(m, bond->end);
        if (bond->order != ORDER_DOUBLE || bond->stereo != STEREO_NONE) continue;
        if (!may_have_bond_stereo(bond) || d1 < 2 || d1 > 3 || d2 < 2 || d2 > 3) continue;
        for (int e = 0; e < 2; e++) {
            wavy |= m->atoms[end[e]].unknown_stereo;
            way[e] = end_direction(m, end[e], b, rank, &wavy);
        }
        if (way[0] == DIR_NONE || way[1] == DIR_NONE) {
            *open = 1;
            continue;
        }
        changed = 1;
        for (int e = 0; e < 2; e++)
            for (Link *l = m->first[end[e]]; l < m->first[end[e] + 1]; l++)
                if (way[e] == DIR_CONFLICT && l->index != b) forget[l->index] = 1;
        if (way[0] != DIR_CONFLICT && way[1] != DIR_CONFLICT)
            bond->stereo = wavy ? STEREO_ANY : way[0] == way[1] ? STEREO_Z : STEREO_E;
    }
    for (int b = 0; b < m->n_bonds; b++)
        if (forget[b]) m->bonds[b].direction = DIR_NONE;
    return changed;
}

// ---- centres without label that still matter: cis and trans on a ring

// Whether an atom is a chiral one of a ring, without label, that may be cis or trans to another.
// RDKit: atomIsCandidateForRingStereochem
static int may_have_ring_stereo(ChemMol *m, int i, const int *rank) {
    const ChemAtom *a = &m->atoms[i];
    int outside[2], n_outside = 0, n_inside = 0, inside[8], n_ranks = 0;
    if (a->chirality == CHI_NONE || a->cip || !m->atom_rings[i]) return 0;
    if (a->z == 7 && mol_degree(m, i) == 3 && !is_in_ring_of_size(m, i, 3) && !is_bridgehead(m, i))
        return 0;
    for (Link *l = m->first[i]; l < m->first[i + 1]; l++) {
        int j = l->atom, known = 0;
        if (!l->bond->rings) {
            if (n_outside < 2) outside[n_outside] = j;
            n_outside++;
            continue;
        }
        n_inside++;
        for (int q = 0; q < n_ranks; q++) known |= inside[q] == rank[j];
        if (!known && n_ranks < 8) inside[n_ranks++] = rank[j];
    }
    if (n_outside == 2) return rank[outside[0]] != rank[outside[1]];
    if (n_outside == 1) return n_inside >= 2;
    return !n_outside && ((n_inside == 4 && n_ranks == 3) || (n_inside == 3 && n_ranks == 2));
}

// Marks (in the result, and in ring_stereo) the unlabelled chiral ring atoms that have a partner in
// their ring system: 1,4-dimethylcyclohexane has no R or S, but cis and trans. From each such atom
// ring bonds are walked breadth first, each bond once in all; only the first atom of a walk takes
// up atoms that an earlier walk had queued.
// RDKit: findChiralAtomSpecialCases
static uint8_t *find_ring_stereo(ChemMol *m, const int *rank) {
    Arena *arena = &m->arena;
    uint8_t *seen = arena_flags(arena, m->n_atoms), *used = arena_flags(arena, m->n_atoms);
    uint8_t *bond_seen = arena_flags(arena, m->n_bonds), *special = arena_flags(arena, m->n_atoms);
    int *queue = arena_ints(arena, 2 * m->n_bonds + m->n_atoms + 1);
    for (int i = 0; i < m->n_atoms; i++) m->atoms[i].ring_stereo = 0;
    for (int i = 0; i < m->n_atoms; i++) {
        int tail = 0, partners = 0;
        if (seen[i] || !may_have_ring_stereo(m, i, rank)) continue;
        for (int head = -1; head < tail; head++) {
            int j = head < 0 ? i : queue[head];
            if (head >= 0) seen[j] = 1;
            if (head >= 0 && may_have_ring_stereo(m, j, rank))
                m->atoms[j].ring_stereo = special[i] = special[j] = 1;
            for (Link *l = m->first[j]; l < m->first[j + 1]; l++) {
                if (bond_seen[l->index]) continue;
                bond_seen[l->index] = 1;
                if (!l->bond->rings || seen[l->atom] || (used[l->atom] && head >= 0)) continue;
                used[l->atom] = 1;
                queue[tail++] = l->atom;
            }
            if (head < 0) partners = tail > 0 && m->atoms[i].ring_stereo;
        }
        partners |= special[i];
        if (partners) m->atoms[i].ring_stereo = 1;
        else special[i] = 0;
        seen[i] = 1;
    }
    return special;
}

// ---- tags that no order of atoms decides (--stereo invariant): CW and CCW as if neighbours were
//   listed from the highest to the lowest rank, a hydrogen or lone pair behind them: CW is R, as
//   far as these ranks are those of CIP. If two tie (cis and trans on a ring), each in turn is put
//   above the other. That settles other tied centres too, which are then like this one (both CW, or
//   both CCW) or not. If the two ways differ in what is like, that with more likes counts, from the
//   highest rank down: mirror images come out mirrored. If not, this centre lies in a mirror plane,
//   and CW says that the highest of the others is like it. Unspecified remain ties that no other
//   tied centre breaks, of three neighbours (cages) or of two pairs (spiro atoms), which would take
//   a search through all symmetries; and PH with two neighbours, of which RDKit loses the tag.

// The chirality of atom i relative to ranks; if some neighbours tie, minus how many pairs of them
// do, one of which is *pair.
static int chirality_by_rank(const ChemMol *m, int i, const int *rank, int pair[2]) {
    int tag = m->atoms[i].chirality, ties = 0;
    for (Link *p = m->first[i]; p < m->first[i + 1]; p++)
        for (Link *q = p + 1; q < m->first[i + 1]; q++) {
            if (rank[p->atom] < rank[q->atom]) tag = invert_chirality(tag);
            if (rank[p->atom] == rank[q->atom]) pair[0] = p->atom, pair[1] = q->atom, ties++;
        }
    return ties ? -ties : tag;
}

// Puts neighbour j of the tied centre i above its equal; *own: the chirality of i then. Returns for
// each rank how many more of the other tied centres are like i than unlike.
static int *break_tie(ChemMol *m, int i, int j, const int *tied, int n_tied, const int *rank,
                      int *own) {
    CipEntry *entries = arena_take(&m->arena, (size_t)m->n_atoms, sizeof *entries);
    int *like = arena_ints(&m->arena, m->n_atoms), *refined = arena_ints(&m->arena, m->n_atoms);
    for (int k = 0; k < m->n_atoms; k++) entries[k].value = 4ll * rank[k] + 2 * (k == j) + (k == i);
    refine_cip_ranks(m, entries, refined);
    *own = chirality_by_rank(m, i, refined, (int[2]){0});
    for (int k = 0; k < n_tied; k++) {
        int tag = tied[k] == i ? -1 : chirality_by_rank(m, tied[k], refined, (int[2]){0});
        if (tag > 0) like[refined[tied[k]]] += tag == *own ? 1 : -1;
    }
    return like;
}

// Sets the atoms' tags, before RDKit's false centres are dropped: which of those on rings are, the
// order of atoms decides.
static void state_chirality(ChemMol *m, const int *rank) {
    int n = m->n_atoms, n_tied = 0, *tied = arena_ints(&m->arena, n), pair[2], own[2];
    for (int i = 0; i < n; i++) {
        ChemAtom *a = &m->atoms[i];
        int degree = mol_degree(m, i), tag = is_nontetrahedral(a) ? a->chirality : CHI_NONE;
        if (a->chirality && !tag && (degree == 3 || degree == 4) && is_possible_centre(m, i))
            tag = chirality_by_rank(m, i, rank, pair);
        if (tag == -1 && m->atom_rings[i] && mol_degree(m, pair[0]) > 1) tied[n_tied++] = i;
        a->tag = (uint8_t)max_int(tag, CHI_NONE);
    }
    if (n_tied == 1 || (int64_t)n_tied * n > 50000) return;  // of more it would take too long
    for (int k = 0; k < n_tied; k++) {
        uint8_t *tag = &m->atoms[tied[k]].tag;
        int r = n - 1, *like[2];
        chirality_by_rank(m, tied[k], rank, pair);
        for (int w = 0; w < 2; w++)
            like[w] = break_tie(m, tied[k], pair[w], tied, n_tied, rank, &own[w]);
        while (r > 0 && like[0][r] == like[1][r]) r--;
        if (like[0][r] != like[1][r]) *tag = (uint8_t)own[like[0][r] < like[1][r]];
        else for (r = n - 1; r >= 0 && !*tag; r--)
            if (like[0][r]) *tag = like[0][r] > 0 ? CHI_CW : CHI_CCW;
    }
}

// ---- the whole

// Clears what cannot be stereo; returns whether there is a double bond with directions beside it.
// RDKit: legacyStereoPerception
static int prepare_bond_stereo(ChemMol *m) {
    int any = 0;
    for (int k = 0; k < m->n_bonds; k++) {
        ChemBond *b = &m->bonds[k];
        if (b->order != ORDER_DOUBLE && b->order != ORDER_AROMATIC) continue;
        if (!may_have_bond_stereo(b)) {
            if (b->direction == DIR_EITHER) b->direction = DIR_NONE;
            b->stereo = STEREO_NONE;
            continue;
        }
        if (b->order != ORDER_DOUBLE) continue;
        if (b->direction == DIR_EITHER) b->stereo = STEREO_ANY;
        else if (b->stereo != STEREO_ANY) b->stereo = STEREO_NONE;
        for (int e = 0; e < 2; e++) {
            int i = e ? b->end : b->begin;
            for (Link *l = m->first[i]; l < m->first[i + 1] && spend(&m->arena, 1); l++)
                any |= is_sloped(l->bond->direction);
        }
    }
    return any;
}

// Takes the chirality off an atom that turned out to be no centre, and the hydrogen that was
// explicit only for its sake.
// RDKit: legacyStereoPerception
static void drop_false_centre(ChemMol *m, int i) {
    ChemAtom *a = &m->atoms[i];
    if (a->chirality == CHI_NONE || is_nontetrahedral(a) || a->cip) return;
    a->chirality = CHI_NONE;
    if (a->explicit_h != 1 || a->charge || a->aromatic) return;
    a->explicit_h = a->no_implicit = 0;
    update_valence(m, i);
}

// Decides which marked centres and double bonds are real, and labels the double bonds.
// RDKit: MolOps::assignStereochemistry, legacyStereoPerception
static void assign_stereo(ChemMol *m) {
    int bonds = prepare_bond_stereo(m), atoms = 1, tags = 0, changed;  // what is left to label
    for (int i = 0; i < m->n_atoms; i++) {
        ChemAtom *a = &m->atoms[i];
        a->cip = 0;
        tags |= a->chirality != CHI_NONE && (mol_degree(m, i) >= 3 || a->z >= 15);
    }
    if (!tags && !bonds) {  // nothing to label; ranks alone change nothing
        for (int i = 0; i < m->n_atoms; i++) drop_false_centre(m, i);
        return;
    }
    int *rank = arena_ints(&m->arena, m->n_atoms);
    first_cip_ranks(m, rank);
    do {
        changed = 0;
        if (atoms) changed |= label_centres(m, rank, &atoms);
        if (bonds) changed |= label_double_bonds(m, rank, &bonds);
        changed = changed && (atoms || bonds) && spend(&m->arena, m->n_atoms);
        if (changed) next_cip_ranks(m, rank);
    } while (changed);
    if (m->stereo == TAGS_INVARIANT) state_chirality(m, rank);
    const uint8_t *special = find_ring_stereo(m, rank);
    for (int i = 0; i < m->n_atoms; i++)
        if (!special[i] || !m->atoms[i].ring_stereo) drop_false_centre(m, i);
}

// Chirality needs a tetrahedral centre (SP3), or as many neighbours as its polyhedron has corners.
// RDKit: MolOps::cleanupChirality
static void clean_chirality(ChemMol *m) {
    for (int i = 0; i < m->n_atoms; i++) {
        ChemAtom *a = &m->atoms[i];
        int c = a->chirality, degree = c ? total_degree(m, i) : 0;
        int most = c == CHI_SQUARE ? 4 : c == CHI_BIPYRAMID ? 5 : c == CHI_OCTAHEDRON ? 6 : 0;
        if ((c == CHI_CW || c == CHI_CCW) && a->hybrid != HYBRID_SP3) a->chirality = CHI_NONE;
        if (most && (degree < 2 || degree > most)) a->chirality = CHI_NONE;
    }
}

// =================================================================================================
// 14 Perception, in RDKit's order, which matters: hydrogens go before the valence check, so that
//   what it sees are heavy atoms; radicals are counted on the Kekule structure, before aromaticity
//   needs them; chirality that hybridization contradicts is dropped after aromaticity has settled
//   hybridization; and stereo comes last, because it needs rings, hydrogens and bond orders.
// =================================================================================================

// Everything that makes a molecule out of atoms and bonds, except stereo.
// RDKit: MolOps::sanitizeMol
static int sanitize(ChemMol *m, Fault *fault) {
    clean_up(m);
    if (check_valences(m, fault) || find_rings(m, fault) || kekulize(m, fault)) return -1;
    assign_radicals(m);
    int aromatic = assign_aromaticity(m);
    assign_conjugation(m);
    for (int i = 0; i < m->n_atoms; i++) m->atoms[i].hybrid = (uint8_t)hybridization(m, i);
    clean_chirality(m);
    if (m->had_aromatic || aromatic) restore_hydrogens(m);
    return 0;
}

// Turns the valence field of a mol block (15 or -1: none) into explicit hydrogens.
// RDKit: ProcessMolProps
static void apply_valence_fields(ChemMol *m) {
    for (int i = 0; i < m->n_atoms; i++) {
        ChemAtom *a = &m->atoms[i];
        if (!a->field_valence) continue;
        set_valence(m, i);
        int wanted = a->field_valence == 15 || a->field_valence == -1 ? 0 : a->field_valence;
        a->no_implicit = 1;
        a->explicit_h = (uint16_t)min_int(max_int(wanted - a->valence, 0), UINT16_MAX);
    }
}

// Applies the S groups of Marvin's data and takes them off the list, by their place among the
// others, which is wrong if some of these stand before: MRV_COORDINATE_BOND_TYPE makes a bond
// without order dative, MRV_IMPLICIT_H states hydrogens of atoms with aromatic bonds. Bonds that
// are queries yet are refused.
// RDKit: processSGroups, processMrvCoordinateBond, processMrvImplicitH
static int apply_sgroups(ChemMol *m, Fault *fault) {
    int v, n_gone = 0, *gone = arena_ints(&m->arena, m->n_sgroups);
    for (int k = 0; k < m->n_sgroups; k++) {
        const SGroup *g = &m->sgroups[k];
        int dative = span_is(g->field, "MRV_COORDINATE_BOND_TYPE");
        Span data = dative ? g->data : g->hydrogens;
        if (!span_is(g->type, "DAT")) continue;
        if (!dative && !span_is(g->field, "MRV_IMPLICIT_H")) {
            if (g->data.n && (span_is(g->query, "SQ") || span_is(g->query, "SMARTSQ")))
                return fault_at(fault, 0, 0, QUERY, "the query of an S group is not supported");
            continue;
        }
        gone[n_gone] = k - n_gone;
        n_gone++;
        if (!loose_int(data, &v) || (dative && data.p && memchr(data.p, '-', (size_t)data.n)))
            return fault_at(fault, 0, 0, "malformed S group", "expected a number, found \"%.*s\"",
                            min_int(data.n, 60), data.p);
        for (int i = 0; i < m->n_atoms && !dative && data.p && spend(&m->arena, 1); i++)
            if ((g->atoms[i] & SG_IN) && is_aromatic_atom(m, i))
                m->atoms[i].explicit_h = (uint8_t)v;
        ChemBond *b = dative && v > 0 && v <= m->n_bonds ? &m->bonds[v - 1] : NULL;
        if (b && b->order == ORDER_NONE)
            *b = (ChemBond){.begin = b->begin, .end = b->end, .order = ORDER_DATIVE};
    }
    while (n_gone) {
        SGroup *at = m->sgroups + gone[--n_gone];
        memmove(at, at + 1, (size_t)(m->sgroups + m->n_sgroups-- - at - 1) * sizeof *at);
    }
    for (int b = 0; b < m->n_bonds; b++)
        if (m->bonds[b].query_line)
            return fault_at(fault, m->bonds[b].query_line, 0, QUERY,
                            "a query bond is not supported");
    return 0;
}

// Common first steps: adjacency, and whether anything is aromatic.
static int first_steps(ChemMol *m, Fault *fault) {
    int bad;
    if (m->n_atoms == 0) return fault_at(fault, 0, 0, "no atoms", "the molecule has no atoms");
    m->any_aromatic = 0;
    for (int i = 0; i < m->n_atoms; i++) m->any_aromatic |= m->atoms[i].aromatic;
    for (int b = 0; b < m->n_bonds; b++)
        m->any_aromatic |= m->bonds[b].aromatic || m->bonds[b].order == ORDER_AROMATIC;
    if ((bad = find_bad_bond(m)) >= 0)
        return fault_at(fault, 0, 0, "impossible bond",
                        "atoms %d and %d: a second bond, or one to itself",
                        m->bonds[bad].begin + 1, m->bonds[bad].end + 1);
    return 0;
}

// The parts that no bond joins: (n_atoms) of each atom its part, from 1 on, into mark.
static int mark_fragments(ChemMol *m, int *mark) {
    int fragments = 0, *stack = arena_ints(&m->arena, m->n_atoms);
    for (int i = 0; i < m->n_atoms; i++)
        if (!mark[i]) flood(m, NULL, i, ++fragments, mark, stack);
    return fragments;
}

// Of these parts, keeps the one with most atoms, hydrogens too; of equals the heaviest, by mass
// numbers; of these the first.
// RDKit: rdMolStandardize::LargestFragmentChooser, which has masses and breaks ties by SMILES
static void keep_largest_fragment(ChemMol *m) {
    int n = m->n_atoms, best = 0, kept = 0, *mark = arena_ints(&m->arena, n);
    int *to = arena_ints(&m->arena, n), *atoms = arena_ints(&m->arena, n + 1);
    int *mass = arena_ints(&m->arena, n + 1), fragments = mark_fragments(m, mark);
    for (int i = 0; i < n; i++) {
        const ChemAtom *a = &m->atoms[i];
        atoms[mark[i]] += 1 + atom_hydrogens(a);
        mass[mark[i]] += (a->isotope ? a->isotope : ELEMENTS[a->z].isotope) + atom_hydrogens(a);
    }
    for (int f = 1; f <= fragments; f++)
        if (atoms[f] > atoms[best] || (atoms[f] == atoms[best] && mass[f] > mass[best])) best = f;
    for (int i = 0; i < n; i++) to[i] = mark[i] == best ? kept++ : -1;
    for (int b = 0; b < m->n_bonds; b++) m->bonds[b].dead = mark[m->bonds[b].begin] != best;
    compact(m, to);
}

// Perceives a molecule as read. One without coordinates is from SMILES: directions are given there.
// RDKit: finishMolProcessing, SmilesToMol
static int perceive(ChemMol *m, int keep_hydrogens, int largest_fragment, int max_atoms,
                    Fault *fault) {
    if (first_steps(m, fault)) return -1;
    if (m->has_xyz) apply_valence_fields(m);
    if (apply_sgroups(m, fault)) return -1;
    if (m->has_xyz && !m->is_3d && m->wedged && chirality_from_wedges(m, fault)) return -1;
    update_valences(m);
    if (m->is_3d) chirality_from_3d(m);
    if (!keep_hydrogens && remove_hydrogens(m, m->is_smiles, fault)) return -1;
    if (largest_fragment) keep_largest_fragment(m);
    if (m->n_atoms > max_atoms)
        return fault_at(fault, 0, 0, "too many atoms", "%d atoms, --max-atoms is %d", m->n_atoms,
                        max_atoms);
    if (m->n_bonds > MAX_BONDS)
        return fault_at(fault, 0, 0, "too many bonds", "%d bonds, a dataset takes at most %d",
                        m->n_bonds, MAX_BONDS);
    if (sanitize(m, fault)) return -1;
    if (m->redrawn) clear_wedges(m);
    if (m->redrawn && m->has_xyz) directions_from_coordinates(m);
    assign_stereo(m);
    return 0;
}

// =================================================================================================
// 15 Features: OGB's lists (ogb.utils.features)
// =================================================================================================

// Index into a list whose last entry stands for everything else.
static uint8_t index_or_misc(int value, int last) {
    return (uint8_t)(value >= 0 && value < last ? value : last);
}

// The nine features of atom i, in the order of ATOM_FEATURE_SIZES.
// OGB: atom_to_feature_vector
static void atom_features(const ChemMol *m, int i, uint8_t *f) {
    const ChemAtom *a = &m->atoms[i];
    f[0] = index_or_misc(a->z - 1, 118);
    f[1] = index_or_misc(m->stereo == TAGS_RDKIT ? a->chirality : a->tag, 4);
    f[2] = index_or_misc(total_degree(m, i), 11);
    f[3] = index_or_misc(a->charge + 5, 11);
    f[4] = index_or_misc(atom_hydrogens(a), 9);
    f[5] = index_or_misc(a->radicals, 5);
    f[6] = a->hybrid;
    f[7] = a->aromatic;
    f[8] = m->atom_rings[i] > 0;
}

// The three features of a bond as one code, see BOND_CODES.
// OGB: bond_to_feature_vector
static uint8_t bond_code(const ChemBond *b) {
    static const uint8_t type[] = {4, 0, 1, 2, 4, 3, 4, 4};
    return (uint8_t)(12 * type[b->order] + 2 * b->stereo + b->conjugated);
}

#include "prep/positions.h"  // is_no_geometry(), orient_principal(): the frame of the positions

// Turns a perceived molecule into a record's atoms, bonds and positions. Labels stay to be filled.
// `note` receives what was left out, if anything was.
static int fill_molecule(ChemMol *m, Molecule *out, int n_tasks, Span name, int principal,
                         Fault *note, Fault *fault) {
    char unread[120] = "";
    for (int k = 0, n = 0; k < N_CX_PARTS; k++)
        if (m->unread >> k & 1 && !strstr(unread, CX_PARTS[k].what))
            n += snprintf(unread + n, sizeof unread - (size_t)n, "%s%s", n ? ", " : "",
                          CX_PARTS[k].what);
    if (*unread)
        fault_at(note, 1, 0, "CXSMILES extensions not read as a whole", "not read: %s", unread);
    int name_length = min_int(name.n, MAX_NAME);
    molecule_resize(out, m->n_atoms, m->n_bonds, n_tasks, name_length);
    if (name_length) memcpy(out->name, name.p, (size_t)name_length);
    for (int i = 0; i < m->n_atoms; i++) atom_features(m, i, out->atom_feat + ATOM_FEATURES * i);
    for (int b = 0; b < m->n_bonds; b++) {
        out->bonds[2 * b] = (uint16_t)m->bonds[b].begin;
        out->bonds[2 * b + 1] = (uint16_t)m->bonds[b].end;
        out->bond_code[b] = bond_code(&m->bonds[b]);
    }
    out->has_pos = m->has_xyz && m->is_3d;
    if (!out->has_pos) return 0;
    int i, j;
    if (is_no_geometry(m, &i, &j)) {
        fault_at(note, 0, 0, "positions left out: no geometry", "atoms %d and %d are in one place",
                 i + 1, j + 1);
        return out->has_pos = 0;
    }
    if (principal) orient_principal(m);
    for (i = 0; i < m->n_atoms; i++)
        for (int k = 0; k < 3; k++) {
            float x = (float)m->xyz[i][k];
            if (!(fabsf(x) <= 1e6f))
                return fault_at(fault, 0, 0, "unusable position",
                                "atom %d: coordinates must be below 1e6 Angstrom", i + 1);
            out->pos[3 * i + k] = x;
        }
    return 0;
}

#include "prep/scaffold.h"  // scaffold_key(): equal for equal scaffolds; graph_key()
#include "prep/records.h"   // next_records(): files cut into records; SD tags, CSV fields
#include "prep/labels.h"    // parse_label(): what cells say, and what is unusual about them
#include "prep/writer.h"    // dataset_create(), record_encode(): the dataset file
#include "prep/rows.h"      // table_find(): rows of files beside the records, by their keys
#include "prep/convert.h"   // convert_records(): chunks of records in parallel, written in order
#include "prep/columns.h"   // read_header(), survey_source(): columns, tags and tasks
#include "prep/summary.h"   // print_summary(): what was read, refused, and is odd about it
#include "prep/splits.h"    // output_open(), output_finish(): one dataset, or its parts
#include "prep/outcomes.h"  // convert_source(): a source's outcomes counted and written
#include "prep/dump.h"      // dump_dataset(): a dataset as JSON lines

// =================================================================================================
// 16 Main
// =================================================================================================

#ifndef DATA_PREP_TEST

#include "prep/options.h"  // prep_opt and its table; check_options(), conversion_begin()

// Converts the inputs one after another into one output, or dumps a dataset.
int main(int argc, char **argv) {
    program_begin(argv);
    threads_set(0);
    const char **inputs = xmalloc((size_t)argc, sizeof *inputs);
    char given[N_PREP_OPTIONS] = {0};
    int n_inputs =
        options_parse(PREP_OPTION_TABLE, N_PREP_OPTIONS, 0, argc, argv, inputs, argc, given);
    if (prep_opt.help || prep_opt.version || prep_opt.dump) {
        if (prep_opt.help) print_help();
        else if (prep_opt.version) printf("data_prep %s\n", MB_VERSION);
        else dump_dataset(prep_opt.dump, prep_opt.range);
        free(inputs);
        mb_exit(EXIT_SUCCESS);
    }
    check_options(n_inputs);
    Conversion c = {.opt = &prep_opt};
    Output out = {0};
    conversion_begin(&c, &out);
    claim_files(inputs, n_inputs, out.n_parts);
    Worker *workers = xmalloc((size_t)thread_count(), sizeof *workers);
    static Record records[CHUNK_RECORDS];
    static Outcome outcomes[CHUNK_RECORDS];
    Summary sum = {0};
    FILE **copies = xmalloc((size_t)n_inputs, sizeof *copies);  // of pipes that are read twice
    int twice = wants_all(&prep_opt) && !c.labels.n_rows;
    Source source;
    signals_catch();
    name_tasks(&c);
    if (c.labels.n_rows) read_side_header(&c);
    if (twice) {
        Survey survey = {0};
        for (int k = 0; k < n_inputs; k++) {
            input_open(&source, inputs[k], &copies[k]);
            survey_source(&c, &survey, &source, records);
            source_close(&source, copies[k] != NULL);
        }
        survey_finish(&c, &survey);
    }
    sum.tally = xmalloc((size_t)c.n_tasks, sizeof *sum.tally);
    output_open(&out, &c);
    if (prep_opt.rejects) {
        out_open(&sum.rejects, prep_opt.rejects, REJECTS_BEGIN);
        fputs(REJECTS_BEGIN, sum.rejects.file);
    }
    for (int k = 0; k < n_inputs; k++) {
        input_open(&source, inputs[k], twice ? &copies[k] : NULL);
        char usual = source.format == FORMAT_TSV ? '\t' : ',';
        if (is_table(&source) && source.separator != usual)
            fprintf(stderr, source.separator == '\t' ? "note    %s: fields end at tabs\n"
                    : "note    %s: fields end at \"%c\"\n", inputs[k], source.separator);
        convert_source(&source, &c, &out, workers, records, outcomes, &sum);
        source_close(&source, copies[k] != NULL);
    }
    print_summary(&sum, n_inputs);
    if (sum.n_kept) print_labels(&c, &sum);
    note_unused(&c, out.n_parts, given);
    if (sum.rejects.file) out_commit(&sum.rejects);
    check_result(&c, &sum, inputs[0]);
    output_finish(&out, &c, &sum);
    for (int t = 0; t < thread_count(); t++) worker_free(&workers[t]);
    for (int t = 0; t < c.n_tasks; t++) tally_free(&sum.tally[t]);
    free_tasks(&c);
    table_close(&c.labels);
    table_close(&c.skips);
    table_close(&c.parts);
    FREE_ALL(sum.tally, sum.twins, c.left_out.text, copies, workers, inputs);
    mb_exit(EXIT_SUCCESS);
}
#endif
