// lib/bf16.h - bfloat16 for the operands of matrix products (--precision bf16): the upper half of a
// float, 8 bits of precision. Sums are floats, and so is everything else.
//
//   gemm_bf16   does gemm() round its operands?
//   rounded()   a number rounded to nearest, ties to even

static int gemm_bf16;

// An operand as gemm() takes it. Of what is rounded the lower half is zero, and NaN stays NaN.
ALWAYS_INLINE float rounded(float x) {
    uint32_t bits, even;
    memcpy(&bits, &x, 4);
    even = bits + 0x7FFFu + (bits >> 16 & 1);
    bits = ((bits & 0x7FFFFFFFu) > 0x7F800000u ? bits | 0x400000u : even) & 0xFFFF0000u;
    if (gemm_bf16) memcpy(&x, &bits, 4);
    return x;
}
