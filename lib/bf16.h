// lib/bf16.h - bfloat16 for the operands of matrix products (--precision bf16): the upper half of a
// float, 8 bits of precision. Sums are floats, and so is everything else.
//
//   gemm_bf16            does gemm() round its operands?
//   bf16_bits(), rounded()   a number rounded to nearest, ties to even

static int gemm_bf16;

// The bits of a float rounded to bfloat16; the lower half is zero. NaN stays NaN.
ALWAYS_INLINE uint32_t bf16_bits(float x) {
    uint32_t bits, even;
    memcpy(&bits, &x, 4);
    even = bits + 0x7FFFu + (bits >> 16 & 1);
    return ((bits & 0x7FFFFFFFu) > 0x7F800000u ? bits | 0x400000u : even) & 0xFFFF0000u;
}

// An operand as gemm() takes it.
ALWAYS_INLINE float rounded(float x) {
    uint32_t bits = bf16_bits(x);
    if (gemm_bf16) memcpy(&x, &bits, 4);
    return x;
}
