// tests/tiles.h - the instructions of lib/amx.h in plain C, to test it on machines without AMX:
// cc -DEMULATE_TILES -march=... test.c, where there is AVX512-BF16

static _Thread_local float tile[8][16][16];
static _Thread_local int tiles_configured;

// The configuration must be that of eight whole tiles.
static void emulated_loadconfig(const void *memory) {
    const unsigned char *at = memory;
    tiles_configured = at[0] == 1;
    for (int k = 0; k < 8; k++)
        tiles_configured &= at[16 + 2 * k] == 64 && at[17 + 2 * k] == 0 && at[48 + k] == 16;
}
static void emulated_zero(int t) {
    CHECK(tiles_configured, "a tile without configuration");
    memset(tile[t], 0, sizeof tile[t]);
}
static void emulated_loadd(int t, const void *from, size_t stride) {
    for (size_t r = 0; r < 16; r++) memcpy(tile[t][r], (const char *)from + r * stride, 64);
}
static void emulated_stored(int t, void *to, size_t stride) {
    for (size_t r = 0; r < 16; r++) memcpy((char *)to + r * stride, tile[t][r], 64);
}
static void emulated_dpbf16ps(int c, int a, int b) {
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++)
                for (int half = 0; half < 2; half++) {
                    uint32_t x, y;
                    float u, v;
                    memcpy(&x, &tile[a][m][k], 4);
                    memcpy(&y, &tile[b][k][n], 4);
                    x = half ? x & 0xFFFF0000u : x << 16;
                    y = half ? y & 0xFFFF0000u : y << 16;
                    memcpy(&u, &x, 4);
                    memcpy(&v, &y, 4);
                    tile[c][m][n] += u * v;
                }
}
#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_loadconfig
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps
