// lib/sdfile.h - a molecule as text for other programs
//
//   sd_write()   a record of an SD file

// One record of a V2000 SD file: molecule m, of at most 999 atoms and bonds, at positions (N, 3),
// centred. Its first line is the name, in which signs that end a line or a record become spaces;
// the second has the conformer's number.
static inline void sd_write(FILE *out, const Molecule *m, const float *pos, int number) {
    double mean[3] = {0};
    for (int k = 0; k < 3 * m->n_atoms; k++) mean[k % 3] += (double)pos[k] / m->n_atoms;
    for (int k = 0; k < m->name_length; k++) {
        char c = m->name[k];
        fputc(iscntrl((unsigned char)c) || (k == 0 && c == '$') ? ' ' : c, out);
    }
    fprintf(out, "\n  " MB_PROGRAM " conformer %d, heavy atoms\n\n%3d%3d  0  0  0  0  0  0  0  "
            "0999 V2000\n", number, m->n_atoms, m->n_bonds);
    for (int i = 0; i < m->n_atoms; i++)
        fprintf(out, "%10.4f%10.4f%10.4f %.3s 0  0  0  0  0  0  0  0  0  0  0  0\n",
                (double)pos[3 * i] - mean[0], (double)pos[3 * i + 1] - mean[1],
                (double)pos[3 * i + 2] - mean[2], SYMBOLS + 3 * m->atom_feat[i * ATOM_FEATURES]);
    for (int k = 0; k < m->n_bonds; k++)
        fprintf(out, "%3d%3d%3d  0\n", m->bonds[2 * k] + 1, m->bonds[2 * k + 1] + 1,
                min_int(m->bond_code[k] / (2 * BOND_STEREOS) + 1, 4));
    for (int i = 0; i < m->n_atoms; i++) {
        int charge = m->atom_feat[i * ATOM_FEATURES + 3] - 5;
        if (charge) fprintf(out, "M  CHG  1 %3d %3d\n", i + 1, charge);
    }
    fprintf(out, "M  END\n$$$$\n");
}
