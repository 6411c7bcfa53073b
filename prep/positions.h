// prep/positions.h - positions: whether they are a geometry, and the frame they are stated in
//
//   is_no_geometry()     two atoms are in one place that cannot be
//   orient_principal()   centres a molecule and turns it to its axes

// Turns the point (x, y) by the angle whose cosine and sine are c and s.
static inline void rotate(double *x, double *y, double c, double s) {
    double x_then = *x;
    *x = c * x_then - s * *y;
    *y = s * x_then + c * *y;
}

// Eigenvectors of the symmetric 3x3 matrix a (destroyed) as the columns of v, by Jacobi rotations.
static void eigenvectors(double a[3][3], double v[3][3]) {
    for (int p = 0; p < 3; p++)
        for (int q = 0; q < 3; q++) v[p][q] = p == q;
    for (int sweep = 0; sweep < 50; sweep++) {
        double off = a[0][1] * a[0][1] + a[0][2] * a[0][2] + a[1][2] * a[1][2];
        if (off < 1e-300) return;
        for (int p = 0; p < 2; p++)
            for (int q = p + 1; q < 3; q++) {
                if (a[p][q] == 0) continue;
                double theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
                double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
                double c = 1 / sqrt(t * t + 1), s = t * c;
                for (int k = 0; k < 3; k++) rotate(&a[k][p], &a[k][q], c, s);
                for (int k = 0; k < 3; k++) rotate(&a[p][k], &a[q][k], c, s);
                for (int k = 0; k < 3; k++) rotate(&v[k][p], &v[k][q], c, s);
            }
    }
}

// States the positions in the molecule's own frame: centred, axes of the gyration tensor in order
// of falling extent, the third moment along the first two positive, right-handed.
static void orient_principal(ChemMol *m) {
    double centre[3] = {0}, tensor[3][3] = {{0}}, v[3][3], moment[3] = {0};
    int n = m->n_atoms;
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 3; k++) centre[k] += m->xyz[i][k] / n;
    for (int i = 0; i < n; i++)
        for (int p = 0; p < 3; p++) {
            m->xyz[i][p] -= centre[p];
            for (int q = 0; q <= p; q++) tensor[p][q] += m->xyz[i][p] * m->xyz[i][q];
        }
    for (int p = 0; p < 3; p++)
        for (int q = p + 1; q < 3; q++) tensor[p][q] = tensor[q][p];
    eigenvectors(tensor, v);
    double axis[3][3];
    for (int a = 0, best = 0; a < 2; a++, best = 0) {
        for (int k = 1; k < 3; k++)
            if (tensor[k][k] > tensor[best][best]) best = k;
        tensor[best][best] = -DBL_MAX;  // taken
        for (int k = 0; k < 3; k++) axis[a][k] = v[k][best];
        for (int i = 0; i < n; i++) {
            double x = 0;
            for (int k = 0; k < 3; k++) x += axis[a][k] * m->xyz[i][k];
            moment[a] += x * x * x;
        }
        for (int k = 0; k < 3 && moment[a] < 0; k++) axis[a][k] = -axis[a][k];
    }
    for (int k = 0; k < 3; k++)
        axis[2][k] = axis[0][(k + 1) % 3] * axis[1][(k + 2) % 3] -
                     axis[0][(k + 2) % 3] * axis[1][(k + 1) % 3];
    for (int i = 0; i < n; i++) {
        double x[3] = {m->xyz[i][0], m->xyz[i][1], m->xyz[i][2]};
        for (int a = 0; a < 3; a++)
            m->xyz[i][a] = axis[a][0] * x[0] + axis[a][1] * x[1] + axis[a][2] * x[2];
    }
}

typedef struct { double along; int atom; } Along;  // where an atom is in a slanted direction

static int compare_along(const void *a, const void *b) {
    double x = ((const Along *)a)->along, y = ((const Along *)b)->along;
    return (x > y) - (x < y);
}

// Whether two atoms are in one place, to 0.001 Angstrom in each coordinate.
static int same_place(const ChemMol *m, int i, int j) {
    Point d = arm(m, i, j);
    return fabs(d.x) < 1e-3 && fabs(d.y) < 1e-3 && fabs(d.z) < 1e-3;
}

// Whether the positions are no geometry: all atoms are in one place, or two heavy ones of one
// fragment, *i and *j, are.
static int is_no_geometry(ChemMol *m, int *i, int *j) {
    int n = m->n_atoms, together = 0, *mark = arena_ints(&m->arena, n);
    int *stack = arena_ints(&m->arena, n);
    Along *line = arena_take(&m->arena, (size_t)n, sizeof *line);
    for (int k = 0; k < n; k++) {
        line[k] = (Along){m->xyz[k][0] + 0.618 * m->xyz[k][1] + 0.414 * m->xyz[k][2], k};
        together += same_place(m, 0, k);
    }
    *i = 0, *j = 1;
    if (n > 1 && together == n) return 1;
    qsort(line, (size_t)n, sizeof *line, compare_along);
    for (int k = 0; k < n; k++)
        for (int q = k + 1; q < n && line[q].along - line[k].along < 3e-3; q++) {
            if (!spend(&m->arena, 1)) return 0;
            *i = min_int(line[k].atom, line[q].atom), *j = max_int(line[k].atom, line[q].atom);
            if (m->atoms[*i].z < 2 || m->atoms[*j].z < 2 || !same_place(m, *i, *j)) continue;
            if (!mark[*i]) flood(m, NULL, *i, 1 + *i, mark, stack);
            if (mark[*j] == mark[*i]) return 1;
        }
    return 0;
}
