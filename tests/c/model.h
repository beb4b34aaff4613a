/* model.h: what the disk of the stress program must hold, and what a snapshot of it must read as.
 *
 * Every byte has one owner among the writers, so that the order of its writes is known without any lock around them; owners alternate at
 * distances from 100 bytes to some hundred KiB, so that they meet in clusters, blocks and sectors all the time. Two kinds of areas:
 *
 *   - zones: `model` holds their bytes. The owner changes it after each operation; what an operation under way leaves there is not known.
 *   - granules: runs of sectors that say of themselves which write of theirs they are (a magic, the sector, a sequence number, a
 *     pattern that follows from these). What was acknowledged before a cut began and what was issued when it ended are bounds for what
 *     the snapshot holds. Every eighth write of most granules is a zeroing.
 *
 * A picture is taken around a cut: picture_begin before it, picture_end after it. Bytes of zones that were touched in between are unknown:
 * whatever is read there first is what every later read must return. When no operation runs during the cut, nothing is unknown.
 */
#ifndef MODEL_H
#define MODEL_H

#include <stdatomic.h>
#include <stdbool.h>

#include "check.h"

#define KIB 1024ull
#define SECTOR 512u
#define MAX_WRITERS 16
#define MAX_OPERATION (256 * KIB)

#define DISK_SIZE (3072 * KIB + 513)
#define ZONE_END (2048 * KIB)           /* zones, then granules, then the chains, then the odd tail: a zone again */
#define CHAIN_X (2944 * KIB)            /* a sector for each writer */
#define CHAIN_Y (3008 * KIB)
#define BODY_END (3072 * KIB)

static inline uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

struct zone { uint64_t start, end, stripe; };   /* stripe i belongs to writer i % writers */

struct granule {
    uint64_t block, blocks;             /* in sectors */
    unsigned owner;
    bool zeroed;                        /* every eighth write is a zeroing */
    atomic_uint_fast64_t acked, issued; /* write number `acked` has returned, none after `issued` has begun */
};

#define TOUCHED 4096

struct writer {
    unsigned id;                        /* fixed */
    uint64_t random;                    /* the writer's own, as are the two below */
    uint64_t chain;                     /* write of its chain that comes next, times 3, plus 0 for X, 1 for Y, 2 for Z on the twin disk */
    uint8_t *buffer, *check;            /* MAX_OPERATION each */

    pthread_mutex_t lock;               /* protects what follows, and the bytes of `model` that the writer owns */
    bool recording, overflow;           /* a picture is being taken; it touched more than fits */
    uint64_t active_offset, active_length;      /* the operation that runs; length 0: none */
    struct { uint64_t offset, length; } touched[TOUCHED];
    size_t touched_count;
};

static unsigned writer_count;
static struct writer writer[MAX_WRITERS];
static struct zone zones[5];
static uint8_t *model;
static struct granule *granules;
static size_t granule_count;
static uint32_t granule_of[BODY_END / SECTOR];          /* index + 1; 0: none */
static size_t chain_granule[2][MAX_WRITERS];

static inline void add_granule(uint64_t block, uint64_t blocks, unsigned owner, bool zeroed)
{
    struct granule *g = &granules[granule_count++];
    g->block = block;
    g->blocks = blocks;
    g->owner = owner;
    g->zeroed = zeroed;
    for (uint64_t i = 0; i < blocks; i++)
        granule_of[block + i] = (uint32_t)granule_count;
}

/* Lay out the disk. The model starts as zeros. */
static inline void model_init(unsigned count, uint64_t seed)
{
    static const uint64_t sizes[] = { 1, 3, 8, 40 };
    writer_count = count;
    zones[0] = (struct zone){ 0, 192 * KIB, 100 };
    zones[1] = (struct zone){ 192 * KIB, 448 * KIB, 3 * SECTOR };
    zones[2] = (struct zone){ 448 * KIB, 768 * KIB, 5000 };
    zones[3] = (struct zone){ 768 * KIB, ZONE_END, (ZONE_END - 768 * KIB) / count + 1 };
    zones[4] = (struct zone){ BODY_END, DISK_SIZE, 100 };
    model = calloc(1, DISK_SIZE);
    granules = calloc(BODY_END / SECTOR, sizeof *granules);
    CHECK(model && granules);
    uint64_t block = ZONE_END / SECTOR;
    for (unsigned i = 0; block + 40 <= CHAIN_X / SECTOR; block += sizes[i++ % 4])
        add_granule(block, sizes[i % 4], i % count, true);
    for (unsigned w = 0; w < count; w++) {
        chain_granule[0][w] = granule_count;
        add_granule(CHAIN_X / SECTOR + w, 1, w, false);
        chain_granule[1][w] = granule_count;
        add_granule(CHAIN_Y / SECTOR + w, 1, w, false);
        writer[w].id = w;
        writer[w].chain = 3;
        writer[w].random = seed * 1000003 + w;
        writer[w].buffer = malloc(MAX_OPERATION);
        writer[w].check = malloc(MAX_OPERATION);
        CHECK(writer[w].buffer && writer[w].check && !pthread_mutex_init(&writer[w].lock, NULL));
    }
}

/* The operation on [offset, offset + length), all of it the writer's own, begins. */
static inline void operation_begin(struct writer *w, uint64_t offset, uint64_t length)
{
    pthread_mutex_lock(&w->lock);
    w->active_offset = offset;
    w->active_length = length;
    if (w->recording && w->touched_count < TOUCHED) {
        w->touched[w->touched_count].offset = offset;
        w->touched[w->touched_count++].length = length;
    } else if (w->recording) {
        w->overflow = true;
    }
    pthread_mutex_unlock(&w->lock);
}

/* It has ended, and the disk holds `data` there (NULL: zeros). */
static inline void operation_end(struct writer *w, const uint8_t *data)
{
    pthread_mutex_lock(&w->lock);
    if (data)
        memcpy(model + w->active_offset, data, w->active_length);
    else
        memset(model + w->active_offset, 0, w->active_length);
    w->active_length = 0;
    pthread_mutex_unlock(&w->lock);
}

/* ---- sectors that describe themselves ---- */

static inline bool is_zeroing(const struct granule *g, uint64_t number) { return number == 0 || (g->zeroed && number % 8 == 0); }

#define SECTOR_MAGIC 0x7265737372657473u

static inline void make_sector(uint64_t *words, uint64_t block, uint64_t number)
{
    uint64_t state = block << 40 ^ number;
    words[0] = SECTOR_MAGIC;
    words[1] = block;
    words[2] = number;
    for (unsigned i = 3; i < SECTOR / 8; i++)
        words[i] = next_random(&state);
}

static inline bool all_zero(const uint8_t *p, uint64_t n)
{
    return n == 0 || (p[0] == 0 && !memcmp(p, p + 1, n - 1));
}

/* The number of the write that the sector holds, 0 for zeros. Fails when it is not whole. */
static inline uint64_t sector_number(const uint8_t *data, uint64_t block, const char *name)
{
    uint64_t words[SECTOR / 8], want[SECTOR / 8];
    if (all_zero(data, SECTOR))
        return 0;
    memcpy(words, data, SECTOR);
    make_sector(want, block, words[2]);
    CHECK(!memcmp(words, want, SECTOR), "%s: sector %" PRIu64 " (offset %" PRIu64 ") is torn or foreign: it says magic %" PRIx64
          ", sector %" PRIu64 ", write %" PRIu64, name, block, block * SECTOR, words[0], words[1], words[2]);
    return words[2];
}

static inline void check_sector(const uint8_t *data, uint64_t block, uint64_t low, uint64_t high, const char *name)
{
    const struct granule *g = &granules[granule_of[block] - 1];
    uint64_t number = sector_number(data, block, name);
    if (number) {
        CHECK(number >= low && number <= high && !is_zeroing(g, number), "%s: sector %" PRIu64 " holds write %" PRIu64
              ", the cut is between %" PRIu64 " and %" PRIu64, name, block, number, low, high);
        return;
    }
    for (uint64_t n = low; n <= high && n < low + 8; n++)
        if (is_zeroing(g, n))
            return;
    CHECK(false, "%s: sector %" PRIu64 " is zeros, the cut is between writes %" PRIu64 " and %" PRIu64, name, block, low, high);
}

/* ---- pictures ---- */

struct picture {
    const char *name;
    char zero_name[100];                /* the same, for extents */
    uint8_t *want, *known;              /* protected by `lock` in sectors with unknown bytes; else never changed any more */
    uint64_t *low, *high;               /* by granule */
    uint64_t unknown_bytes;             /* in zones, when the picture was taken */
    pthread_mutex_t lock;
    atomic_ushort unknown[DISK_SIZE / SECTOR + 1];      /* bytes of the sector that are unknown; comes down only */
};

static inline void forget(struct picture *p, uint64_t offset, uint64_t length)
{
    for (uint64_t at = offset; at < offset + length; at++) {
        if (p->known[at]) {
            p->known[at] = 0;
            p->unknown[at / SECTOR]++;
            p->unknown_bytes++;
        }
    }
}

static inline struct picture *picture_begin(const char *name)
{
    struct picture *p = calloc(1, sizeof *p);
    CHECK(p);
    p->name = name;
    snprintf(p->zero_name, sizeof p->zero_name, "a zero extent of %s", name);
    p->want = malloc(DISK_SIZE);
    p->known = malloc(DISK_SIZE);
    p->low = calloc(granule_count, sizeof *p->low);
    p->high = calloc(granule_count, sizeof *p->high);
    CHECK(p->want && p->known && p->low && p->high && !pthread_mutex_init(&p->lock, NULL));
    memset(p->known, 1, DISK_SIZE);
    for (unsigned w = 0; w < writer_count; w++)
        pthread_mutex_lock(&writer[w].lock);
    for (unsigned w = 0; w < writer_count; w++) {
        struct writer *it = &writer[w];
        it->recording = true;
        it->overflow = false;
        it->touched_count = 0;
        if (it->active_length) {
            it->touched[0].offset = it->active_offset;
            it->touched[0].length = it->active_length;
            it->touched_count = 1;
        }
    }
    for (unsigned w = 0; w < writer_count; w++)
        pthread_mutex_unlock(&writer[w].lock);
    for (size_t g = 0; g < granule_count; g++)
        p->low[g] = atomic_load(&granules[g].acked);
    return p;
}

static inline void picture_end(struct picture *p)
{
    for (size_t g = 0; g < granule_count; g++)
        p->high[g] = atomic_load(&granules[g].issued);
    for (unsigned w = 0; w < writer_count; w++)
        pthread_mutex_lock(&writer[w].lock);
    memcpy(p->want, model, DISK_SIZE);
    for (unsigned w = 0; w < writer_count; w++) {
        for (size_t i = 0; i < writer[w].touched_count; i++)
            forget(p, writer[w].touched[i].offset, writer[w].touched[i].length);
        if (writer[w].overflow)
            forget(p, 0, DISK_SIZE);
        writer[w].recording = false;
    }
    for (unsigned w = 0; w < writer_count; w++)
        pthread_mutex_unlock(&writer[w].lock);
    uint64_t in_zones = p->unknown_bytes;
    for (size_t g = 0; g < granule_count; g++)
        forget(p, granules[g].block * SECTOR, granules[g].blocks * SECTOR);
    p->unknown_bytes = in_zones;
}

static inline void picture_free(struct picture *p)
{
    pthread_mutex_destroy(&p->lock);
    free(p->want);
    free(p->known);
    free(p->low);
    free(p->high);
    free(p);
}

/* [offset, offset + count) was read as `data` (NULL: said to be zeros): is that what it must be? */
static inline void picture_check(struct picture *p, const uint8_t *data, uint64_t count, uint64_t offset)
{
    static const uint8_t zeros[SECTOR];
    for (uint64_t at = offset, next; at < offset + count; at = next) {
        uint64_t block = at / SECTOR;
        next = least(offset + count, (block + 1) * SECTOR);
        const uint8_t *got = data ? data + (at - offset) : zeros;
        bool all_known = atomic_load_explicit(&p->unknown[block], memory_order_acquire) == 0;
        bool granule = at < BODY_END && granule_of[block];
        bool learn = !granule || next - at == SECTOR;   /* a part of a sector can't be checked on its own */
        if (!all_known)
            pthread_mutex_lock(&p->lock);
        if (!all_known && granule && learn)
            check_sector(got, block, p->low[granule_of[block] - 1], p->high[granule_of[block] - 1], data ? p->name : p->zero_name);
        for (uint64_t i = all_known && !memcmp(got, p->want + at, next - at) ? next : at; i < next; i++) {
            if (all_known || p->known[i]) {
                CHECK(got[i - at] == p->want[i], "%s: read of %" PRIu64 " at %" PRIu64 "%s: byte %" PRIu64 " is %02x, not %02x", p->name,
                      count, offset, data ? "" : " (a zero extent)", i, got[i - at], p->want[i]);
            } else if (learn) {
                p->want[i] = got[i - at];
                p->known[i] = 1;
                atomic_fetch_sub_explicit(&p->unknown[block], 1, memory_order_release);
            }
        }
        if (!all_known)
            pthread_mutex_unlock(&p->lock);
    }
}

#endif
