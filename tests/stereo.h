// tests/stereo.h - data_prep --stereo: one molecule has one set of features in whatever order its
// atoms and bonds come, and mirror images have two

// Tags of atoms 0, 1, ... with --stereo invariant (R: CW, S: CCW, as chemists name settled centres;
// '.': unspecified), whether the mirror image is another molecule, and the same one as RDKit wrote
// it in another order. The last row: RDKit reads both as if they were one.
static const struct {
    const char *smiles, *tags;
    int chiral;
    const char *other;
} STEREO_SMILES[] = {
    {"N[C@@H](C)C(=O)O", ".S....", 1, "N[C@H](C(=O)O)C"},
    {"OC[C@H]1O[C@@H](O)[C@H](O)[C@@H](O)[C@@H]1O", "..R.R.R.S.S.", 1,
     "C(O)[C@@H]1[C@H]([C@@H]([C@@H](O)[C@H](O)O1)O)O"},
    {"C[C@@H](N)[C@@H](O)c1ccccc1", ".R.S.......", 1, "O[C@H]([C@H](N)C)c1ccccc1"},
    {"C[C@]12CC[C@H]3[C@@H](CCc4cc(O)ccc43)[C@@H]1CC[C@@H]2O", ".S..SR.........S..S.", 1,
     "C1C[C@@H]2[C@H](CC[C@@]3(C)[C@H]2CC[C@@H]3O)c2ccc(O)cc12"},
    {"CC1(C)S[C@@H]2[C@H](NC(=O)Cc3ccccc3)C(=O)N2[C@H]1C(=O)O", "....RR.............S...", 1,
     "N(C(=O)Cc1ccccc1)[C@@H]1C(=O)N2[C@@H]1SC(C)([C@@H]2C(O)=O)C"},
    {"CN1CC[C@]23c4c5ccc(O)c4O[C@H]2[C@@H](O)C=C[C@H]3[C@H]1C5", "....S........RS...RR.", 1,
     "CN1CC[C@]23[C@H]4C=C[C@H](O)[C@@H]3Oc3c(O)ccc(C[C@@H]14)c23"},
    {"C=C[C@H]1CN2CC[C@H]1C[C@H]2[C@H](O)c1ccnc2ccc(OC)cc12", "..R....S.SR.............", 1,
     "[C@H]12C[C@H](N(CC2)C[C@@H]1C=C)[C@@H](c1c2cc(OC)ccc2ncc1)O"},
    {"COc1ccc2[nH]c(nc2c1)[S@@](=O)Cc1ncc(C)c(OC)c1C", "...........S............", 1,
     "Cc1cnc(C[S@](=O)c2nc3cc(OC)ccc3[nH]2)c(C)c1OC"},
    {"C[S@](=O)c1ccccc1", ".S.......", 1, "c1ccccc1[S@@](=O)C"},
    {"C[S@+](CC)CCC", ".R.....", 1, "[S@@+](CCC)(CC)C"},
    {"C[P@](CC)CCC", ".R.....", 1, "C([P@@](C)CCC)C"},
    {"CC[P@@](C)(=O)O", "..S...", 1, "C([P@](=O)(C)O)C"},
    {"C[N@]1CC1C", ".R...", 1, "[N@@]1(C)CC1C"},
    {"C[N@+](CC)(CCC)Cc1ccccc1", ".S............", 1, "C(c1ccccc1)[N@+](C)(CCC)CC"},
    {"C[As@](CC)CCC", ".R.....", 1, "C[As@@](CCC)CC"},
    {"C[Si@H](F)Cl", ".R..", 1, "F[Si@@H](C)Cl"},
    {"[2H][C@H](C)O", ".R..", 1, "C[C@@H]([2H])O"},
    {"[13CH3][C@H](C)O", ".S..", 1, "O[C@@H](C)[13CH3]"},
    {"[H][C@](F)(Cl)Br", "S...", 1, "Br[C@H](Cl)F"},
    {"C/C=C/[C@H](F)/C=C\\C", "...S....", 1, "C(\\[C@H](/C=C/C)F)=C\\C"},
    {"OC(=O)[C@H](O)[C@@H](O)C(=O)O", "...R.R....", 1, "OC(=O)[C@@H]([C@@H](O)C(=O)O)O"},
    {"OC(=O)[C@H](O)[C@H](O)C(=O)O", "...R.S....", 0, "OC(=O)[C@@H]([C@@H](C(=O)O)O)O"},
    {"C[C@H](F)[C@H](Cl)[C@@H](C)F", ".S.S.R..", 0, "Cl[C@@H]([C@@H](F)C)[C@H](F)C"},
    {"C[C@@H](O)c1ccc(cc1)[C@H](C)O", ".R.......S..", 0, "c1cc([C@H](O)C)ccc1[C@H](C)O"},
    {"O=C1NC(=O)[C@@H]2CCCC[C@H]12", ".....R....S", 0, "C1(NC([C@H]2[C@@H]1CCCC2)=O)=O"},
    {"C[C@@]1(F)[C@H]2CCC[C@@H]1CC2", ".R.S...R..", 0, "C1CC[C@@H]2[C@]([C@H]1CC2)(F)C"},
    {"C[C@H]1CC[C@@H](C)CC1", ".S..S...", 0, "C1C[C@H](C)CC[C@@H]1C"},
    {"C[C@H]1CC[C@H](C)CC1", ".R..R...", 0, "C1[C@H](C)CC[C@@H](C)C1"},
    {"O[C@H]1CC[C@@H](C)CC1", ".S..S...", 0, "C1[C@H](CC[C@@H](C)C1)O"},
    {"O[C@H]1C[C@@H](C)C1", ".S.S..", 0, "O[C@H]1C[C@H](C1)C"},
    {"C[C@H]1C[C@@H](C)C[C@H](C)C1", ".S.R..R..", 0, "C1[C@H](C)C[C@H](C[C@@H]1C)C"},
    {"C[C@H]1C[C@@H](C)C[C@@H](C)C1", ".S.S..S..", 0, "[C@H]1(C)C[C@H](C[C@H](C1)C)C"},
    {"C1CC[C@H]2CCCC[C@@H]2C1", "...R....R.", 0, "C1C[C@H]2[C@H](CC1)CCCC2"},
    {"C1CC[C@H]2CCCC[C@H]2C1", "...S....S.", 0, "C1CCC[C@H]2CCCC[C@@H]12"},
    {"C1C[C@H]2CC[C@@H]1N2", "..S..S.", 0, "[C@H]12CC[C@@H](CC2)N1"},
    {"C[S@]1(=O)CC[C@H](C)CC1", ".R...R...", 0, "C1C[S@](=O)(C)CC[C@@H]1C"},
    {"F[C@H]1[C@H](F)[C@@H]1F", ".RR.S.", 0, "F[C@H]1[C@@H]([C@@H]1F)F"},
    {"F[C@H]1[C@@H](F)[C@H](F)[C@@H]1F", ".SR.R.S.", 0, "[C@H]1(F)[C@H]([C@H](F)[C@@H]1F)F"},
    {"O[C@H]1[C@H](O)[C@@H](O)[C@H](O)[C@H](O)[C@@H]1O", ".SR.R.R.S.S.", 0,
     "[C@H]1([C@@H](O)[C@@H]([C@H](O)[C@@H]([C@H]1O)O)O)O"},
    {"O[C@H]1[C@H](O)[C@@H](O)[C@@H](O)[C@H](O)[C@@H]1O", ".SS.S.R.R.S.", 1,
     "O[C@H]1[C@@H](O)[C@H](O)[C@H](O)[C@H]([C@@H]1O)O"},
    {"Cl[C@H]1[C@H](Cl)[C@@H](Cl)[C@H](Cl)[C@H](Cl)[C@H]1Cl", ".RR.R.R.S.S.", 1,
     "Cl[C@H]1[C@@H]([C@@H](Cl)[C@H](Cl)[C@@H]([C@H]1Cl)Cl)Cl"},
    {"N[C@]1(F)CC[C@@](Cl)(Br)CC1", ".S...S....", 0, "C1C[C@](N)(CC[C@@]1(Cl)Br)F"},
    {"C[C@H]1CC[C@@H](CC1)N1CCC(CC1)[C@@H]1CC[C@H](C)CC1", ".R..R........S..S...", 0,
     "C1C[C@H](CC[C@H]1C)C1CCN([C@H]2CC[C@@H](CC2)C)CC1"},
    {"C[C@]12CC[C@](C)(CC1)CC2", "..........", 0, "[C@]12(C)CC[C@@](C)(CC2)CC1"},
    {"C[C@H]1C[C@]2(C1)C[C@H](C)C2", ".........", 0, "C1C2(C[C@H](C2)C)C[C@H]1C"},
    {"C[C@H]1CC[C@@]2(CC1)OCCO2", "...........", 0, "O1C2(OCC1)CCC(C)CC2"},
    {"C[P@H]CC", "....", 0, "[P@H](C)CC"},
};

// Molecules as mol blocks, in the notation of PREP_MOLS. The first is strained: all neighbours are
// on one side of the centre.
static const struct { const char *smiles; int is_3d; const char *atoms, *bonds; } STEREO_MOLS[] = {
    {"C[C@](F)(Cl)Br", 1, "C,0.1,0,1.5 C,0,0,0 F,1,0,0.3 Cl,-0.5,0.9,0.3 Br,-0.5,-0.9,0.3",
     "1-2:1 2-3:1 2-4:1 2-5:1"},
    {"N[C@@H](C)C(=O)O", 1, "N,-0.66,1.10,-0.80 C,-0.33,0.32,0.36 C,-1.10,-1.00,0.26 "
     "C,1.12,-0.01,0.44 O,1.59,-0.68,1.37 O,1.95,0.46,-0.57",
     "1-2:1 2-3:1/6 2-4:1 4-5:2 4-6:1"},
    {"C[S@](=O)c1ccccc1", 1, "C,2.77,0.30,0.59 S,1.90,-0.43,-0.84 O,2.08,0.64,-1.95 "
     "C,0.16,-0.27,-0.44 C,-0.50,-1.30,0.24 C,-1.84,-1.20,0.57 C,-2.56,-0.07,0.23 "
     "C,-1.92,0.95,-0.44 C,-0.59,0.83,-0.75",
     "2-1:1/1 2-3:2 2-4:1 4-5:2 5-6:1 6-7:2 7-8:1 8-9:2 9-4:1"},
    {"O[C@H]1CC[C@@H](C)CC1", 1, "O,-2.99,0.05,0.22 C,-1.70,0.37,-0.19 C,-0.81,0.60,1.02 "
     "C,0.44,1.26,0.45 C,1.17,0.25,-0.34 C,2.28,-0.32,0.56 C,0.37,-0.89,-0.85 C,-1.07,-0.67,-1.04",
     "2-1:1/1 2-3:1 3-4:1 4-5:1 5-6:1/1 5-7:1 7-8:1 8-2:1"},
    {"C[C@H]1CC[C@@H](C)CC1", 1, "C,-2.84,-0.12,-0.15 C,-1.40,-0.12,0.28 C,-0.62,-1.20,-0.46 "
     "C,0.79,-1.22,-0.02 C,1.31,0.02,0.60 C,2.80,0.13,0.22 C,0.65,1.28,0.20 C,-0.78,1.19,-0.17",
     "2-1:1/6 2-3:1 3-4:1 4-5:1 5-6:1/6 5-7:1 7-8:1 8-2:1"},
    {"F[C@H]1[C@H](F)[C@@H]1F", 1, "F,-0.30,1.68,-1.05 C,-0.26,0.82,0.02 C,-0.56,-0.61,-0.19 "
     "F,-1.25,-1.27,0.80 C,0.85,-0.21,0.08 F,1.36,-0.52,1.32",
     "2-1:1/6 2-3:1 3-4:1/1 3-5:1 5-6:1/1 5-2:1"},
    {"N[C@@H](C)C(=O)O", 0, "N,1.50,-1.30,0.00 C,0.75,0.00,0.00 C,1.50,1.30,0.00 "
     "C,-0.75,-0.00,0.00 O,-1.50,1.30,0.00 O,-1.50,-1.30,0.00",
     "1-2:1 2-3:1/6 2-4:1 4-5:2 4-6:1"},
    {"O[C@H]1CC[C@@H](C)CC1", 0, "O,3.00,0.00,0.00 C,1.50,-0.00,0.00 C,0.75,-1.30,0.00 "
     "C,-0.75,-1.30,0.00 C,-1.50,0.00,0.00 C,-3.00,0.00,0.00 C,-0.75,1.30,0.00 C,0.75,1.30,0.00",
     "2-1:1/1 2-3:1 3-4:1 4-5:1 5-6:1/1 5-7:1 7-8:1 8-2:1"},
    {"C[C@H]1CC[C@H](C)CC1", 0, "C,3.00,0.00,0.00 C,1.50,-0.00,0.00 C,0.75,-1.30,0.00 "
     "C,-0.75,-1.30,0.00 C,-1.50,0.00,0.00 C,-3.00,0.00,0.00 C,-0.75,1.30,0.00 C,0.75,1.30,0.00",
     "2-1:1/1 2-3:1 3-4:1 4-5:1 5-6:1/6 5-7:1 7-8:1 8-2:1"},
    {"OC(=O)[C@H](O)[C@@H](O)C(=O)O", 0, "O,-3.16,0.84,0.00 C,-1.98,-0.09,0.00 "
     "O,-2.20,-1.58,0.00 C,-0.59,0.46,0.00 O,-0.37,1.95,0.00 C,0.59,-0.46,0.00 O,0.37,-1.95,0.00 "
     "C,1.98,0.09,0.00 O,2.20,1.58,0.00 O,3.16,-0.84,0.00",
     "1-2:1 2-3:2 2-4:1 4-5:1/6 4-6:1 6-7:1/6 6-8:1 8-9:2 8-10:1"},
};

// A number that two molecules share if their features do, whatever the order of their atoms.
static uint64_t stereo_key(const Molecule *m) {
    uint64_t colour[2][64] = {{0}}, sum = 0;
    CHECK(m->n_atoms <= 64, "%d atoms are too many", m->n_atoms);
    for (int i = 0; i < m->n_atoms; i++)
        for (int k = 0; k < ATOM_FEATURES; k++)
            colour[0][i] = mix(31 * colour[0][i] + m->atom_feat[ATOM_FEATURES * i + k]);
    for (int round = 0; round < m->n_atoms; round++) {
        uint64_t *now = colour[round % 2], *next = colour[1 - round % 2];
        for (int i = 0; i < m->n_atoms; i++) next[i] = mix(now[i]);
        for (int b = 0; b < m->n_bonds; b++)
            for (int e = 0; e < 2; e++)
                next[m->bonds[2 * b + e]] += mix(now[m->bonds[2 * b + 1 - e]] + m->bond_code[b]);
    }
    for (int i = 0; i < m->n_atoms; i++) sum += mix(colour[m->n_atoms % 2][i]);
    return sum;
}

// Puts atoms and bonds of a molecule as read in another order; seed 0 leaves them.
static void stereo_shuffle(ChemMol *m, uint64_t seed) {
    enum { MOST = 64 };
    uint32_t atom[MOST], bond[MOST];
    ChemAtom atoms[MOST];
    ChemBond bonds[MOST];
    int to[MOST], old[MOST];  // to[i]: where atom i goes; old[b]: which bond stands at b
    double xyz[MOST][3];
    int n = m->n_atoms, n_bonds = m->n_bonds;
    CHECK(n <= MOST && n_bonds <= MOST, "%d atoms and %d bonds are too many", n, n_bonds);
    rng_permutation(atom, (size_t)n, seed, RNG_SHUFFLE, 0);
    rng_permutation(bond, (size_t)n_bonds, seed, RNG_SHUFFLE, 1);
    for (int i = 0; i < n; i++) to[i] = seed ? (int)atom[i] : i;
    for (int b = 0; b < n_bonds; b++) old[b] = seed ? (int)bond[b] : b;
    mol_connect(m);
    for (int i = 0; i < n; i++) {  // tags refer to the order of an atom's bonds
        int swaps = 0;
        for (Link *p = m->first[i]; p < m->first[i + 1]; p++)
            for (Link *q = p + 1; q < m->first[i + 1]; q++) {
                int at_p = 0, at_q = 0;
                while (old[at_p] != p->index) at_p++;
                while (old[at_q] != q->index) at_q++;
                swaps += at_p > at_q;
            }
        atoms[to[i]] = m->atoms[i];
        if (swaps % 2)
            atoms[to[i]].chirality = (uint8_t)invert_chirality(m->atoms[i].chirality);
        memcpy(xyz[to[i]], m->xyz[i], sizeof xyz[0]);
    }
    for (int b = 0; b < n_bonds; b++) {
        bonds[b] = m->bonds[old[b]];
        bonds[b].begin = to[bonds[b].begin];
        bonds[b].end = to[bonds[b].end];
    }
    memcpy(m->atoms, atoms, (size_t)n * sizeof *atoms);
    memcpy(m->bonds, bonds, (size_t)n_bonds * sizeof *bonds);
    memcpy(m->xyz, xyz, (size_t)n * sizeof *xyz);
}

// Turns a molecule as read into its mirror image.
static void stereo_mirror(ChemMol *m) {
    for (int i = 0; i < m->n_atoms; i++) {
        m->atoms[i].chirality = (uint8_t)invert_chirality(m->atoms[i].chirality);
        m->xyz[i][2] = -m->xyz[i][2];
    }
    for (int b = 0; b < m->n_bonds; b++) {
        int d = m->bonds[b].direction;
        m->bonds[b].direction =
            (uint8_t)(d == DIR_WEDGE ? DIR_DASH : d == DIR_DASH ? DIR_WEDGE : d);
    }
}

// The molecule of a text, in another order (seed) and mirrored if asked for; its key.
static uint64_t stereo_read(Worker *w, const char *text, int is_block, int stereo, uint64_t seed,
                            int mirrored) {
    ChemMol *m = &w->mol;
    Fault fault = {0};
    Lines in = {text, text + strlen(text), 0};
    Span title = {"", 0};
    mol_clear(m);
    m->stereo = stereo;
    int failed = is_block ? read_mol_block(m, &in, &title, &fault)
                          : read_smiles(m, (Span){text, (int)strlen(text)}, NULL, &fault);
    if (!failed) stereo_shuffle(m, seed);
    if (!failed && mirrored) stereo_mirror(m);
    failed = failed || perceive(m, 0, 0, MAX_ATOMS, &fault) ||
             fill_molecule(m, &w->molecule, 0, title, 0, &fault, &fault);
    if (failed) test_check(0, "%s: %s", text, fault.text);
    return failed ? 0 : stereo_key(&w->molecule);
}

// Catches tags that the order of atoms or bonds decides, centres that are lost, a mirror image that
// cannot be told from the molecule, and one that can where both are the same molecule.
static void test_stereo_features(Worker *w) {
    enum { ORDERS = 12, N = sizeof STEREO_SMILES / sizeof *STEREO_SMILES };
    char tags[65], block[4096];
    int release = 0;
    for (size_t k = 0; k < N; k++) {
        const char *text = STEREO_SMILES[k].smiles;
        uint64_t key = stereo_read(w, text, 0, TAGS_INVARIANT, 0, 0);
        int n = w->molecule.n_atoms;
        for (int i = 0; i < n; i++) tags[i] = ".RS3X"[w->molecule.atom_feat[ATOM_FEATURES * i + 1]];
        tags[n] = 0;
        test_check(strcmp(tags, STEREO_SMILES[k].tags) == 0, "%s: got %s, expected %s", text, tags,
                   STEREO_SMILES[k].tags);
        test_check(stereo_read(w, STEREO_SMILES[k].other, 0, TAGS_INVARIANT, 0, 0) == key,
                   "%s and %s differ", text, STEREO_SMILES[k].other);
        uint64_t plain = stereo_read(w, text, 0, TAGS_RDKIT, 0, 0);
        int differ = 0;
        for (uint64_t seed = 1; seed <= ORDERS; seed++) {
            differ += stereo_read(w, text, 0, TAGS_INVARIANT, seed, 0) != key;
            release += stereo_read(w, text, 0, TAGS_RDKIT, seed, 0) != plain;
        }
        test_check(differ == 0, "%s: %d of %d orders differ", text, differ, ORDERS);
        uint64_t image = stereo_read(w, text, 0, TAGS_INVARIANT, 0, 1);
        test_check((image != key) == STEREO_SMILES[k].chiral, "%s: its mirror image is %s", text,
                   image == key ? "the same" : "another");
        test_check(stereo_read(w, text, 0, TAGS_NONE, 0, 0) ==
                   stereo_read(w, text, 0, TAGS_NONE, 5, 1), "%s: tags with --stereo none", text);
    }
    test_check(release > N * ORDERS / 2, "with RDKit's tags %d orders of %d differ", release,
               N * ORDERS);
    for (size_t k = 0; k < sizeof STEREO_MOLS / sizeof *STEREO_MOLS; k++) {
        int differ = 0;
        uint64_t key = stereo_read(w, STEREO_MOLS[k].smiles, 0, TAGS_INVARIANT, 0, 0);
        uint64_t image = stereo_read(w, STEREO_MOLS[k].smiles, 0, TAGS_INVARIANT, 0, 1);
        prep_mol_block(block, sizeof block, &(PrepMol){.is_3d = STEREO_MOLS[k].is_3d,
                       .atoms = STEREO_MOLS[k].atoms, .bonds = STEREO_MOLS[k].bonds,
                       .properties = ""}, 0);
        for (uint64_t seed = 0; seed <= ORDERS; seed++) {
            differ += stereo_read(w, block, 1, TAGS_INVARIANT, seed, 0) != key;
            differ += stereo_read(w, block, 1, TAGS_INVARIANT, seed, 1) != image;
        }
        test_check(differ == 0, "%s as a mol block, %s: %d orders of it and its image differ",
                   STEREO_MOLS[k].smiles, STEREO_MOLS[k].is_3d ? "3D" : "wedges", differ);
    }
    // what the other tests of chemistry read
    for (size_t k = 0; k < sizeof PREP_SMILES / sizeof *PREP_SMILES; k++) {
        const char *text = PREP_SMILES[k].smiles;
        if (strcmp(PREP_SMILES[k].expected, "refused") == 0) continue;
        uint64_t key = stereo_read(w, text, 0, TAGS_INVARIANT, 0, 0);
        for (uint64_t seed = 1; seed <= 3; seed++)
            test_check(stereo_read(w, text, 0, TAGS_INVARIANT, seed, 0) == key, "%s: another order",
                       text);
    }
}

// Catches a dataset or model that does not know what its tags are, and a difference not said.
static void test_stereo_commands(void) {
    static const CommandRow table[] = {
        {"./data_prep -o build/st_i.bin --labels y build/st.csv && ./moleblend info build/st_i.bin",
         0, "stereo     invariant"},
        {"./data_prep -o build/st_r.bin --labels y --stereo rdkit build/st.csv && ./moleblend info "
         "build/st_r.bin", 0, "stereo     rdkit"},
        {"./data_prep -o 'build/st_n.{}.bin' --split 0.5,0.5 --split-by order --stereo none "
         "build/st.csv && ./moleblend info build/st_n.valid.bin", 0, "stereo     none"},
        {"./moleblend info build/test_train.bin", 0, "stereo     rdkit"},  // as old files have it
        {"./data_prep --stereo cip -o build/st_x.bin build/st.csv", 1,
         "--stereo: expected invariant, rdkit or none, found \"cip\""},
        {"./moleblend finetune build/st_i.bin --valid build/st_r.bin --size tiny --epochs 3 "
         "--lr 3e-3 -o build/st.safetensors", 0,
         "note    build/st_r.bin: made with --stereo rdkit, build/st_i.bin with invariant"},
        {"./moleblend info build/st.safetensors", 0, "stereo: invariant"},
        {"./moleblend predict build/st_r.bin --model build/st.safetensors -o build/st_r.csv", 0,
         "note    build/st_r.bin: made with --stereo rdkit, build/st.safetensors with invariant"},
        {"./moleblend embed build/st_i.bin --model data/pretrained.safetensors -o "
         "build/st_e.npy", 0,
         "note    build/st_i.bin: made with --stereo invariant, data/pretrained.safetensors with "
         "rdkit"},
        {"./moleblend finetune build/st_i.bin --valid build/st_i.bin --init "
         "data/pretrained.safetensors --epochs 1 -o build/st_x.safetensors", 0,
         "note    build/st_i.bin: made with --stereo invariant, data/pretrained.safetensors with "
         "rdkit"},
        {"./moleblend predict build/st_i.bin --model build/st.safetensors -o build/st_i.csv "
         "2> build/st.err; grep -c 'made with' build/st.err; echo", 0, "0\n"}};
    FILE *out = fopen("build/st.csv", "w");
    CHECK(out, "build/st.csv: cannot write");
    fprintf(out, "smiles,y\n");
    for (size_t k = 0; k < sizeof STEREO_SMILES / sizeof *STEREO_SMILES; k++)
        fprintf(out, "%s,%d\n%s,%d\n", STEREO_SMILES[k].smiles, (int)k % 2, STEREO_SMILES[k].other,
                (int)k % 2);
    fclose(out);
    test_rows(table, sizeof table / sizeof *table);
}

// Largest difference between the predictions of rows 2k and 2k + 1 of a file.
static double stereo_difference(const char *path) {
    char *text = file_text(path, NULL), *line = strchr(text, '\n');
    double worst = 0, last = 0;
    for (int row = 0; line && line[1]; row++, line = strchr(line + 1, '\n')) {
        char *at = strchr(strchr(line + 1, ',') + 1, ',');  // record,name,y,...: no name has commas
        double y = strtod(at + 1, NULL);
        if (row % 2) worst = fmax(worst, fabs(y - last));
        last = y;
    }
    free(text);
    return worst;
}

// Catches a molecule whose prediction depends on how it was written. What is left is not the tags:
// of several shortest paths the one that is taken depends on the order of atoms.
static void test_stereo(void) {
    Worker w = {0};
    test_stereo_features(&w);
    worker_free(&w);
    test_stereo_commands();
    double now = stereo_difference("build/st_i.csv"), release = stereo_difference("build/st_r.csv");
    test_check(now < 0.01 && release > 5 * now, "predictions of one molecule in two orders differ "
               "by %g, with RDKit's tags by %g", now, release);
}
