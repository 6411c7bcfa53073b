// lib/amx.h - products of pairs of bfloat16 by AMX, the tiles of Xeons since 2023; of lib/fast.h.
// tests/tiles.h stands in for the instructions where there are none.
//
//   tiles_permitted()   does Linux let this process have them?
//   pack_tiles()        A's rows, in tiles
//   gemm_tiles()        32 rows and a panel of columns of C
//
// A tile is 16 rows of 64 bytes: of A 16 rows of 16 pairs of k, of B 16 pairs of k of 16 columns,
// as they stand in a panel, of C 16 rows of 16 floats.

#if defined(__linux__) && (defined(__AMX_BF16__) || defined(__AMXBF16__))  // gcc, clang
#define HAVE_AMX
#endif
#if !defined(HAVE_PAIRS) || !(defined(HAVE_AMX) || defined(EMULATE_TILES))
#define tiles_permitted() 0
#define tiles_begin() (void)0
#define pack_tiles(...) (void)0
#define gemm_tiles(...) (void)0
#else

#ifdef EMULATE_TILES
#include "../tests/tiles.h"
static int tiles_permitted(void) { return 1; }
#else
#include <sys/syscall.h>
long syscall(long number, ...);  // unistd.h hides it from -std=c11
static int tiles_permitted(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

// Of each thread that computes with tiles, before it does: eight whole ones. gcc 12 believes that
// _tile_loadconfig() reads 8 bytes of it; so nothing of it is stored at run time.
static void tiles_begin(void) {
    static const volatile struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } eight = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig((const void *)(uintptr_t)&eight);
}

// out (32-row groups, 2, panel_k / 16 tiles of (16, 16) pairs) = m rows of X (m, K), rounded, zero
// beyond. trans: X is stored as (K, m).
static void pack_tiles(float *out, const float *X, idx ldx, int trans, idx m, idx K, idx panel_k) {
    float chunk[16 * 32];
    for (idx i = 0; i < (m + 31) / 32 * 32; i += 16)
        for (idx k = 0; k < 2 * panel_k; k += 32, out += 256) {
            idx rows = min_idx(16, m - i), n = min_idx(32, K - k);
            if (rows < 16 || n < 32) memset(chunk, 0, sizeof chunk);
            if (rows > 0 && n > 0)
                pack_panel(chunk, 32, n, X + (trans ? k * ldx + i : i * ldx + k), ldx, trans, rows);
            for (idx r = 0; r < 16; r++)
                _mm512_storeu_si512(out + 16 * r, (__m512i)_mm512_cvtne2ps_pbh(
                    _mm512_loadu_ps(chunk + 32 * r + 16), _mm512_loadu_ps(chunk + 32 * r)));
        }
}

// Tiles are numbers in the source: gcc makes instructions of the text.
#define TILES_ZERO(top, low) _tile_zero(top); _tile_zero(low);
#define TILES_STORE(top, low, column)                                                              \
    _tile_stored(top, sum + column, NR * sizeof(float));                                           \
    _tile_stored(low, sum + 16 * NR + column, NR * sizeof(float));

// As gemm_tile(), for up to 32 rows.
static void gemm_tiles(float *c, idx ldc, idx rows, idx cols, int add, const float *bias,
                       const float *a, const float *b, idx panel_k) {
    float sum[32 * NR];
    __asm__ volatile("" : : : "memory");  // what a tile loads has been stored: gcc does not know
    TILES_ZERO(0, 1) TILES_ZERO(2, 3) TILES_ZERO(4, 5)
    for (idx k = 0; k < panel_k; k += 16, a += 256, b += 16 * NR) {
        const float *low = a + 16 * panel_k;  // a tile that is there serves two products
        _tile_loadd(6, a, 64);
        _tile_loadd(7, b, NR * sizeof(float));
        _tile_dpbf16ps(0, 6, 7);
        _tile_loadd(6, low, 64);
        _tile_dpbf16ps(1, 6, 7);
        if (cols <= 16) continue;
        _tile_loadd(7, b + 16, NR * sizeof(float));
        _tile_dpbf16ps(3, 6, 7);
        _tile_loadd(6, a, 64);
        _tile_dpbf16ps(2, 6, 7);
        if (cols <= 32) continue;
        _tile_loadd(7, b + 32, NR * sizeof(float));
        _tile_dpbf16ps(4, 6, 7);
        _tile_loadd(6, low, 64);
        _tile_dpbf16ps(5, 6, 7);
    }
    TILES_STORE(0, 1, 0)
    TILES_STORE(2, 3, 16)
    TILES_STORE(4, 5, 32)
    for (idx r = 0; r < rows; r++)
        for (idx j = 0; j < cols; j++)
            c[r * ldc + j] = sum[r * NR + j] + (add ? c[r * ldc + j] : bias ? bias[j] : 0.0f);
}
#endif
