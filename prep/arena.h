// prep/arena.h - everything a record needs while it is read and perceived comes from one arena
// which is emptied before the next record: no malloc in the common case, nothing to free
//
//   arena_take(), arena_ints(), arena_flags()   zeroed memory until arena_reset()
//   arena_grow()     a larger block with the same beginning
//   spend()          counts steps of work; 0 when the record's budget is used up
//   arena_reset(), arena_free()
//
// A record has one budget for work and memory, so that none can hang a run or end it. Loops that
// could take long count their steps with spend() and end when nothing is left; what they leave is
// incomplete but safe, and convert_record() refuses the record. Steps, not time: every machine
// refuses the same records.

enum { BUDGET = 600000000, BYTE_STEPS = 6 };  // steps; of a byte of memory: at most 100 MB

typedef struct ArenaOverflow {
    struct ArenaOverflow *next;
    size_t bytes;
} ArenaOverflow;

typedef struct {
    char *base;
    size_t used, room;
    ArenaOverflow *overflow;  // blocks that did not fit; the base grows by them at the next reset
    int64_t left;             // of the record's budget
} Arena;

// Counts n steps of work. Returns whether there is something left of the budget.
static inline int spend(Arena *arena, int64_t n) { return (arena->left -= n) > 0; }

// A block of the heap for what the base has no room for.
static void *arena_overflow(Arena *arena, size_t bytes) {
    size_t head = (sizeof(ArenaOverflow) + 15) / 16 * 16;
    ArenaOverflow *block = xmalloc(1, head + bytes);
    block->bytes = bytes;
    block->next = arena->overflow;
    arena->overflow = block;
    return (char *)block + head;
}

// `count` zeroed elements of `size` bytes that live until arena_reset(). Inline, so that the check
// of the product needs no division: a record takes some sixty small blocks.
static inline void *arena_take(Arena *arena, size_t count, size_t size) {
    size_t bytes = mul_size(count, size);
    CHECK(bytes <= SIZE_MAX / 4, "out of memory: %zu bytes cannot be addressed", bytes);
    bytes = (bytes + 15) / 16 * 16;
    spend(arena, BYTE_STEPS * (int64_t)bytes);
    if (bytes > arena->room - arena->used) return arena_overflow(arena, bytes);
    void *p = arena->base + arena->used;
    arena->used += bytes;
    return p;
}

// Zeroed ints and flags from the arena.
static int *arena_ints(Arena *arena, int count) {
    return arena_take(arena, (size_t)count, sizeof(int));
}

static uint8_t *arena_flags(Arena *arena, int count) {
    return arena_take(arena, (size_t)count, 1);
}

// A block twice as large as p's `room` elements with the same beginning; *room is updated.
static void *arena_grow(Arena *arena, const void *p, int *room, size_t size) {
    int more = *room < 16 ? 32 : 2 * *room;
    void *grown = arena_take(arena, (size_t)more, size);
    if (p) memcpy(grown, p, (size_t)*room * size);
    *room = more;
    return grown;
}

// Empties the arena; what did not fit this time will fit the next time. What was used is zeroed in
// one go.
static void arena_reset(Arena *arena) {
    size_t missing = 0;
    while (arena->overflow) {
        ArenaOverflow *block = arena->overflow;
        missing += block->bytes;
        arena->overflow = block->next;
        free(block);
    }
    if (missing || !arena->base) {
        free(arena->base);
        arena->room = arena->used + missing + (1 << 16);
        arena->base = xmalloc(arena->room, 1);
    } else {
        memset(arena->base, 0, arena->used);
    }
    arena->used = 0;
    arena->left = BUDGET;
}

// Gives the arena's memory back.
static void arena_free(Arena *arena) {
    arena_reset(arena);
    free(arena->base);
    *arena = (Arena){0};
}
