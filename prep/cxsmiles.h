// prep/cxsmiles.h - what of a CXSMILES extension, |...| behind a SMILES, the features show
//
//   read_extension()   reads one
//   CX_PARTS           what is passed over, by the letters it begins with

// What of an extension is not read, by the letters it begins with.
static const struct { const char *begin, *what; } CX_PARTS[] = {
    {"$", "atom labels"}, {"atomProp:", "atom properties"}, {"a", "stereo groups"},
    {"o", "stereo groups"}, {"&", "stereo groups"}, {"rb", "conditions"}, {"u", "conditions"},
    {"s", "conditions"}, {"LN", "link nodes"}, {"m", "bonds of no one place"}, {"Sg", "S groups"}};

enum { N_CX_PARTS = sizeof CX_PARTS / sizeof CX_PARTS[0] };

// The fault of an extension, whose text the reader is at.
static int cx_fault(SmilesReader *s) {
    return fault_at(s->fault, 1, 0, "malformed CXSMILES extension",
                    "malformed CXSMILES extension at \"%.*s\"",
                    min_int(max_int(s->n - s->pos, 0), 40), s->text + min_int(s->pos, s->n));
}

// The bonds in the order of the text, a ring's where it is closed. Sorts the marks anew.
static int *bonds_as_written(SmilesReader *s) {
    int n = 0, chain = 0, *order = arena_ints(&s->m->arena, s->m->n_bonds);
    uint8_t *open = arena_flags(&s->m->arena, s->m->n_bonds);
    for (int k = 0; k < s->n_marks; k++) s->marks[k].number = 0;
    if (s->n_marks) qsort(s->marks, (size_t)s->n_marks, sizeof *s->marks, compare_marks);
    for (int k = 0; k < s->n_marks; k++) {
        while (chain < s->marks[k].chain) order[n++] = chain++;
        open[s->marks[k].bond] ^= 1;
        if (!open[s->marks[k].bond]) order[n++] = s->marks[k].bond;
    }
    while (n < s->m->n_bonds) order[n++] = chain++;
    return order;
}

// Passes over text up to one of these characters. Returns it, 0 at the end.
static int cx_pass(SmilesReader *s, const char *stops) {
    while (s->pos < s->n && !strchr(stops, s->text[s->pos])) s->pos++;
    return smiles_peek(s, 0);
}

// An index at the cursor into *v; 0 if there is none.
static int cx_index(SmilesReader *s, int *v) {
    int start = s->pos;
    *v = leading_int((Span){s->text + s->pos, s->n - s->pos}, 0);
    while (isdigit(smiles_peek(s, 0))) s->pos++;
    return s->pos > start;
}

// Coordinates behind their parenthesis: x,y,z;x,y,z). Any may lack; the first set counts.
// RDKit: parse_coords
static int cx_coordinates(SmilesReader *s) {
    ChemMol *m = s->m;
    int i = 0, axis = 0, stop;
    if (!m->has_xyz) memset(m->xyz, 0, (size_t)m->n_atoms * sizeof *m->xyz);
    do {
        Span number = {s->text + s->pos, s->pos};
        stop = cx_pass(s, ",;)");
        number.n = s->pos++ - number.n;
        for (int k = 0, dots = 0; k < number.n && i < m->n_atoms && axis < 3; k++)
            if (!strchr("0123456789+-.eE", number.p[k]) || (number.p[k] == '.' && dots++) ||
                (number.p[k] < '.' && k && number.p[k - 1] < 'E'))
                return cx_fault(s);
        if (i < m->n_atoms && axis < 3 && number.n && !m->has_xyz) {
            m->xyz[i][axis] = parse_decimal(number);
            m->is_3d |= axis == 2 && m->xyz[i][2] != 0;
        }
        axis = stop == ',' ? axis + 1 : 0;
        i += stop == ';';
    } while (stop == ',' || stop == ';');
    m->has_xyz = 1;
    return stop ? 0 : cx_fault(s);
}

// Lists of atoms and bonds, each led by a letter and a colon: radicals ^n:, which `kind` is; dative
// and hydrogen bonds C: and H: (atom.bond, from the atom); wavy ones w: and wedges wU: wD:; double
// bonds c: t: and (a) ctu:. `bonds` is their order. Indices that are too large are passed over.
// RDKit: parse_coordinate_bonds, parse_radicals, parse_wedged_bonds, parse_doublebond_stereo
static int cx_list(SmilesReader *s, int kind, const int *bonds, uint8_t *wedged) {
    ChemMol *m = s->m;
    int i = 0, b = 0, marks_bond = strchr("CHwUD", kind) != NULL;
    int of_bond = kind == 'c' || kind == 't' || kind == 'a';
    if (of_bond) cx_pass(s, ":");
    if (!smiles_take(s, ":")) return cx_fault(s);
    if (kind < '9' && (kind < '1' || kind > '7' || !isdigit(smiles_peek(s, 0)))) return cx_fault(s);
    while (isdigit(smiles_peek(s, 0))) {
        cx_index(s, of_bond ? &b : &i);
        if (marks_bond && (!smiles_take(s, ".") || !cx_index(s, &b))) return cx_fault(s);
        smiles_take(s, ",");
        if (i >= m->n_atoms || ((marks_bond || of_bond) && b >= m->n_bonds)) continue;
        if (kind < '9' && m->atoms[i].z)
            m->atoms[i].radicals = (uint8_t)(kind == '1' ? 1 : kind < '5' ? 2 : 3);
        if (kind < '9') continue;
        ChemBond *bond = &m->bonds[bonds[b]];
        int single = bond->order == ORDER_SINGLE;
        if (of_bond) {
            if (mol_degree(m, bond->begin) < 2 || mol_degree(m, bond->end) < 2) continue;
            bond->stereo = kind == 'c' ? STEREO_CIS : kind == 't' ? STEREO_TRANS : STEREO_ANY;
            m->redrawn = 1;
            continue;
        }
        if ((bond->begin != i && bond->end != i) || (strchr("wUD", kind) && wedged[bonds[b]]++))
            return cx_fault(s);
        bond->end = bond_other(bond, i);
        bond->begin = i;
        if (kind == 'C') bond->order = ORDER_DATIVE;
        else if (kind == 'H') bond->order = ORDER_HYDROGEN;
        else bond->direction = kind == 'w' ? DIR_UNKNOWN : kind == 'U' ? DIR_WEDGE : DIR_DASH;
        if (kind == 'w' && single) m->atoms[i].chirality = CHI_NONE, m->redrawn = 1;
        if (kind == 'U' || kind == 'D') m->wedged |= single;
    }
    return 0;
}

// A part that is not read: passes over what could be taken for another one.
// RDKit: parse_atom_labels, parse_atom_props, parse_data_sgroup, parse_polymer_sgroup
static int cx_skip(SmilesReader *s, int part) {
    s->m->unread |= 1u << part;
    if (part == 0) return cx_pass(s, "$") ? s->pos++, 0 : cx_fault(s);
    if (part == 1) return cx_pass(s, "|,"), 0;
    if (part == N_CX_PARTS - 1) {
        int data = smiles_take(s, "D");
        if (smiles_take(s, "H")) return 0;
        for (int k = data ? 7 : 2; k > 0 && cx_pass(s, ":"); k--) s->pos++;
        while (!data && (isdigit(smiles_peek(s, 0)) || smiles_peek(s, 0) == ',')) s->pos++;
        for (int k = data ? 2 : 0; k < 2 && smiles_take(s, ":"); k++) cx_pass(s, k ? ":|," : ":|");
        if (data && smiles_take(s, "(")) cx_pass(s, ")");
        return 0;
    }
    while (part > 2 && part < 5 && isdigit(smiles_peek(s, 0))) s->pos++;
    return smiles_take(s, ":") ? 0 : cx_fault(s);
}

// Reads an extension, |...|, and returns its length, or -1.
// RDKit: parse_it
static int read_extension(SmilesReader *s, Span text) {
    const int *bonds = bonds_as_written(s);
    uint8_t *wedged = arena_flags(&s->m->arena, s->m->n_bonds);
    s->text = text.p;
    s->n = text.n;
    for (s->pos = 1; !smiles_take(s, "|");) {
        int part = 0, failed = 0;
        while (part < N_CX_PARTS && !smiles_take(s, CX_PARTS[part].begin)) part++;
        int c = smiles_peek(s, 0);
        if (s->pos >= s->n) return cx_fault(s);
        else if (part < N_CX_PARTS) failed = cx_skip(s, part);
        else if (smiles_take(s, "(")) failed = cx_coordinates(s);
        else if (smiles_take(s, "ctu")) failed = cx_list(s, 'a', bonds, wedged);
        else if (smiles_take(s, "wU") || smiles_take(s, "wD"))
            failed = cx_list(s, s->text[s->pos - 1], bonds, wedged);
        else if (smiles_take(s, "^"))
            s->pos++, failed = cx_list(s, isdigit(smiles_peek(s, -1)) ? smiles_peek(s, -1) : '0',
                                       bonds, wedged);
        else if (strchr("CHwct", c)) s->pos++, failed = cx_list(s, c, bonds, wedged);
        else s->pos++;
        if (failed) return -1;
    }
    return s->pos;
}
