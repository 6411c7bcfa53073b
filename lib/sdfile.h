// lib/sdfile.h - a molecule as text for other programs
//
//   sd_write()   a record of an SD file

// Valence of a neutral atom of atomic number z with the least bonds; 0: it has no usual one.
static inline int usual_valence(int z) {
    static const struct { int valence; const int z[8]; } rows[] = {
        {3, {5, 7, 15, 33}}, {4, {6, 14}}, {2, {8, 16, 34, 52}}, {1, {9, 17, 35, 53}}};
    for (int r = 0; r < 4; r++)
        for (const int *known = rows[r].z; *known; known++)
            if (*known == z) return rows[r].valence;
    return 0;
}

// Aromatic bonds as alternating ones: a partner for every atom that has a bond less than its
// valence, found along paths that alternate between bonds and no bonds.
typedef struct {
    const Molecule *m;
    int *partner;          // (N) atom of the double bond; -1: none yet
    char *wants, *passed;  // (N) has it to have one?; is it on the path?
    int budget;            // steps that may still be tried
} Alternation;

// Finds a partner for atom i, whose own may have to find another one. Returns 0 if there is none.
static inline int find_partner(Alternation *a, int i) {
    const Molecule *m = a->m;
    a->passed[i] = 1;
    for (int k = 0; k < m->n_bonds && a->budget-- > 0; k++) {
        int from = m->bonds[2 * k], to = m->bonds[2 * k + 1], j = from == i ? to : from;
        if (from != i && to != i) continue;
        if (m->bond_code[k] / (2 * BOND_STEREOS) != 3 || !a->wants[j] || a->passed[j]) continue;
        a->passed[j] = 1;
        int other = a->partner[j];
        if (other < 0 || (!a->passed[other] && find_partner(a, other))) {
            a->partner[i] = j;
            a->partner[j] = i;
            return 1;
        }
        a->passed[j] = 0;
    }
    a->passed[i] = 0;
    return 0;
}

// Is bond k, of another kind than the usual ones, given by its second atom? Metals and boron take.
static inline int is_turned(const Molecule *m, int k) {
    int z = m->atom_feat[m->bonds[2 * k] * ATOM_FEATURES] + 1;
    return z == 5 || !usual_valence(z);
}

// How a molecule is written: order (bonds), 1 to 3 of a Kekule structure, 4 aromatic if there is
// none, 5 of another kind, which is taken for a dative bond to the metal or boron; valence (N):
// bonds and hydrogens, in units of single bonds.
static inline void bond_orders(int *order, int *valence, const Molecule *m) {
    int N = m->n_atoms, whole = 1;
    Alternation a = {m, xmalloc((size_t)N, sizeof *a.partner), xmalloc((size_t)N, 1),
                     xmalloc((size_t)N, 1), 10000000};
    for (int k = 0; k < m->n_bonds; k++) {
        order[k] = m->bond_code[k] / (2 * BOND_STEREOS) + 1;
        for (int end = 0; end < 2; end++) {
            int share = order[k] < 4 ? order[k] : 1;  // 4: what is sure of it
            if (order[k] == 5 && end == is_turned(m, k)) share = 0;  // the giver's does not count
            valence[m->bonds[2 * k + end]] += share;
        }
    }
    for (int i = 0; i < N; i++) {
        const uint8_t *feat = m->atom_feat + i * ATOM_FEATURES;
        int usual = usual_valence(feat[0] + 1), charge = feat[3] - 5;
        valence[i] += feat[4];
        a.partner[i] = -1;
        int room = usual - (usual == 4 ? abs(charge) : feat[0] + 1 == 5 ? charge : -charge);
        a.wants[i] = feat[7] && usual && valence[i] + feat[5] < room;
    }
    for (int i = 0; i < N; i++) {
        memset(a.passed, 0, (size_t)N);
        if (a.wants[i] && a.partner[i] < 0) whole &= find_partner(&a, i);
    }
    for (int k = 0; k < m->n_bonds && whole; k++)
        if (order[k] == 4) order[k] = 1 + (a.partner[m->bonds[2 * k]] == m->bonds[2 * k + 1]);
    for (int i = 0; i < N; i++) valence[i] += a.partner[i] >= 0;
    FREE_ALL(a.partner, a.wants, a.passed);
}

// One record of a V2000 SD file: molecule m, of at most 999 atoms and bonds, at positions (N, 3) in
// Angstrom, centred. Its first line is the name, in which signs that end a line or a record become
// spaces; the third has the conformer's number. An atom that has not the hydrogens one would expect
// states its valence; a dative bond is said in Marvin's way.
static inline void sd_write(FILE *out, const Molecule *m, const float *pos, int number) {
    int N = m->n_atoms;
    double mean[3] = {0};
    int *order = xmalloc((size_t)m->n_bonds, sizeof *order);
    int *valence = xmalloc((size_t)N, sizeof *valence);
    bond_orders(order, valence, m);
    for (int k = 0; k < 3 * N; k++) mean[k % 3] += (double)pos[k] / N;
    for (int k = 0; k < m->name_length; k++) {
        char c = m->name[k];
        fputc(iscntrl((unsigned char)c) || (k == 0 && c == '$') ? ' ' : c, out);
    }
    fprintf(out, "\n  %-18s3D\nconformer %d, heavy atoms\n%3d%3d  0  0  0  0  0  0  0  0999 V2000"
            "\n", MB_PROGRAM, number, N, m->n_bonds);
    for (int i = 0; i < N; i++) {
        const uint8_t *feat = m->atom_feat + i * ATOM_FEATURES;
        int said = 0;
        if (valence[i] != usual_valence(feat[0] + 1) || feat[3] != 5 || feat[5])
            said = valence[i] ? valence[i] : 15;  // as the format has it
        for (int k = 0; k < 2 * m->n_bonds; k++)
            if (m->bonds[k] == i && order[k / 2] > 3) said = 0;  // it would count otherwise
        fprintf(out, "%10.4f%10.4f%10.4f %.3s 0  0  0  0  0%3d  0  0  0  0  0  0\n",
                (double)pos[3 * i] - mean[0], (double)pos[3 * i + 1] - mean[1],
                (double)pos[3 * i + 2] - mean[2], SYMBOLS + 3 * feat[0], said < 16 ? said : 0);
    }
    for (int k = 0; k < m->n_bonds; k++) {
        int from = m->bonds[2 * k], to = m->bonds[2 * k + 1];
        int turn = order[k] == 5 && is_turned(m, k);
        fprintf(out, "%3d%3d%3d  0\n", (turn ? to : from) + 1, (turn ? from : to) + 1,
                order[k] == 5 ? 8 : order[k]);
    }
    for (int i = 0; i < N; i++) {
        int charge = m->atom_feat[i * ATOM_FEATURES + 3] - 5;
        int electrons = m->atom_feat[i * ATOM_FEATURES + 5];
        if (charge) fprintf(out, "M  CHG  1 %3d %3d\n", i + 1, charge);
        if (electrons == 1 || electrons == 2)
            fprintf(out, "M  RAD  1 %3d %3d\n", i + 1, electrons + 1);
    }
    for (int k = 0, group = 0; k < m->n_bonds; k++) {
        if (order[k] != 5) continue;
        group++;
        fprintf(out, "M  STY  1 %3d DAT\nM  SAL %3d  2 %3d %3d\nM  SDT %3d "
                "MRV_COORDINATE_BOND_TYPE\nM  SDD %3d     0.0000    0.0000    DR    ALL  0       0"
                "\nM  SED %3d %d\n", group, group, m->bonds[2 * k] + 1, m->bonds[2 * k + 1] + 1,
                group, group, group, k + 1);
    }
    fprintf(out, "M  END\n$$$$\n");
    FREE_ALL(order, valence);
}
