// lib/functions.h - functions of one number for loops that compilers vectorise: no table, no
// branch, no call; and a row of normal numbers made by them
//
//   log_fast(x)               natural logarithm of a normal number above 0
//   tanh_fast(x), sigmoid_fast(x)
//   turn_fast(&s, &c, turns)  sine and cosine of 2 pi turns
//   normal_row()              N(0, 1), n of them, named by purpose and slot

// x = 2^e m, m from sqrt(1/2) to sqrt(2); log m by a polynomial (coefficients of Cephes' logf).
ALWAYS_INLINE float log_fast(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t shifted = bits + (0x3F800000u - 0x3F3504F3u);  // carries if m is above sqrt(2)
    float e = (float)((int32_t)(shifted >> 23) - 127), m;
    bits = (shifted & 0x007FFFFFu) + 0x3F3504F3u;
    memcpy(&m, &bits, 4);
    m -= 1.0f;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    return m + (p * m * m * m - 0.5f * m * m) + e * 0.693147181f;
}

// (e^2x - 1) / (e^2x + 1); a polynomial where that would lose digits.
ALWAYS_INLINE float tanh_fast(float x) {
    float e = exp_fast(2.0f * x), z = x * x, large = 1.0f - 2.0f / (e + 1.0f);
    float p = -0.0539682540f;
    p = p * z + 0.133333333f;
    p = p * z - 0.333333333f;
    return z < 0.04f ? x + x * z * p : large;
}

// sin(2 pi r), |r| <= 1/4: a Taylor polynomial.
ALWAYS_INLINE float quarter_sin(float r) {
    float x = 6.28318531f * r, z = x * x, p = -2.50521084e-8f;
    p = p * z + 2.75573192e-6f;
    p = p * z - 1.98412698e-4f;
    p = p * z + 8.33333333e-3f;
    p = p * z - 1.66666667e-1f;
    return x + x * z * p;
}

// s, c = sine and cosine of 2 pi turns.
ALWAYS_INLINE void turn_fast(float *s, float *c, float turns) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    float shifted = turns + magic, r = turns - (shifted - magic), up = fabsf(r);
    float folded = up > 0.25f ? 0.5f - up : up;  // sin(pi - x) = sin x
    *s = r < 0 ? -quarter_sin(folded) : quarter_sin(folded);
    *c = quarter_sin(0.25f - up);                // cos x = sin(pi / 2 - x)
}

ALWAYS_INLINE float sigmoid_fast(float x) { return 1.0f / (1.0f + exp_fast(-x)); }

// out (n) standard normal, by Box and Muller, four from a Philox block: number k is that of block
// k mod blocks, named (purpose, slot).
static void normal_row(float *out, size_t n, const Draws *draws, uint32_t purpose, uint32_t slot) {
    size_t blocks = (n + 3) / 4;
    uint32_t words[4][BLOCKS];
    for (size_t first = 0; first < blocks; first += BLOCKS) {
        int count = blocks - first < BLOCKS ? (int)(blocks - first) : BLOCKS;
        float normal[4][BLOCKS];
        philox_blocks(words, count, (Philox){{(uint32_t)first, slot, draws->step, purpose}},
                      draws->seed);
        for (int w = 0; w < 4; w += 2)
#pragma omp simd
            for (int k = 0; k < count; k++) {
                float u = (float)((words[w][k] >> 8) + 1) * 0x1p-24f, s, c;
                float radius = sqrtf(-2.0f * log_fast(u));
                turn_fast(&s, &c, (float)(words[w + 1][k] >> 8) * 0x1p-24f);
                normal[w][k] = radius * c;
                normal[w + 1][k] = radius * s;
            }
        for (size_t w = 0; w < 4; w++)
            for (size_t k = 0; k < (size_t)count && w * blocks + first + k < n; k++)
                out[w * blocks + first + k] = normal[w][k];
    }
}
