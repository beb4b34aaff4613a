/* fuzz_mutate.c: mutations that know the format: they change fields of the header, entries of tables, and what entries lead to. Blind ones
 * (libFuzzer's own) take turns with them.
 */
#include <stdbool.h>
#include <string.h>

#include "fuzz.h"

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);

struct image { uint8_t *bytes; size_t size; uint64_t random; };

static uint64_t get(const struct image *m, uint64_t at, unsigned width)
{
    return get_number(m->bytes, m->size, at, width);
}

static void put(struct image *m, uint64_t at, unsigned width, uint64_t value)
{
    if (at > m->size || m->size - at < width)
        return;
    for (unsigned i = width; i-- > 0; value >>= 8)
        m->bytes[at + i] = (uint8_t)value;
}

static uint64_t below(struct image *m, uint64_t n)
{
    return n ? next_random(&m->random) % n : 0;
}

static uint64_t cluster_size(const struct image *m)
{
    uint64_t bits = get(m, 20, 4);
    return UINT64_C(1) << (bits >= 9 && bits <= 21 ? bits : 9);
}

/* The start of some cluster: of what is there, of a table, just behind the end, or far away. */
static uint64_t some_cluster(struct image *m)
{
    const uint64_t cs = cluster_size(m), clusters = m->size / cs + 1;
    switch (below(m, 8)) {
    case 0: return get(m, 40, 8);                           /* the L1 table */
    case 1: return get(m, 48, 8);                           /* the refcount table */
    case 2: return get(m, get(m, 48, 8), 8);                /* the first refcount block */
    case 3: return get(m, get(m, 40, 8), 8) & UINT64_C(0xfffffffffffe00);     /* the first L2 table */
    case 4: return (clusters + below(m, 3)) * cs;
    case 5: return (UINT64_C(1) << (10 + below(m, 54))) & ~(cs - 1);
    default: return below(m, clusters) * cs;
    }
}

static uint64_t odd_number(struct image *m, uint64_t old)
{
    switch (below(m, 12)) {
    case 0: return 0;
    case 1: return 1;
    case 2: return UINT64_MAX;
    case 3: return UINT64_C(1) << 63;
    case 4: return INT64_MAX;
    case 5: return UINT64_C(1) << below(m, 64);
    case 6: return (UINT64_C(1) << below(m, 64)) - 1;
    case 7: return old + 1;
    case 8: return old - 1;
    case 9: return old ^ UINT64_C(1) << below(m, 64);
    case 10: return some_cluster(m);
    default: return some_cluster(m) + below(m, 1024);
    }
}

/* An entry of an L1 or L2 table: a place, with flags. */
static uint64_t some_entry(struct image *m, uint64_t old)
{
    uint64_t entry = below(m, 4) ? some_cluster(m) : old;
    switch (below(m, 8)) {
    case 0: return entry | 1;
    case 1: return entry | UINT64_C(1) << 62 | below(m, 8) << 60;
    case 2: return entry ^ UINT64_C(1) << 63;
    case 3: return entry + 512;
    case 4: return odd_number(m, old);
    case 5: return old;
    default: return entry | UINT64_C(1) << 63;
    }
}

/* Offset and width of the header's fields. */
static const struct { uint8_t at, width; } fields[] = {
    { 4, 4 }, { 8, 8 }, { 16, 4 }, { 20, 4 }, { 24, 8 }, { 32, 4 }, { 36, 4 }, { 40, 8 }, { 48, 8 }, { 56, 4 }, { 60, 4 }, { 64, 8 },
    { 72, 8 }, { 80, 8 }, { 88, 8 }, { 96, 4 }, { 100, 4 }, { 104, 1 },
};

static void mutate_header(struct image *m)
{
    uint64_t i = below(m, sizeof fields / sizeof *fields), at = fields[i].at;
    unsigned width = fields[i].width;
    put(m, at, width, odd_number(m, get(m, at, width)));
}

static uint64_t first_extension(const struct image *m)
{
    return get(m, 4, 4) == 2 ? 72 : get(m, 100, 4);
}

static void mutate_extension(struct image *m)
{
    uint64_t at = first_extension(m), skip = below(m, 4);
    static const uint32_t types[] = { 0, 0xe2792aca, 0x6803f857, 0x23852875, 0x44415441, 0x0537be77 };
    while (skip-- > 0 && get(m, at, 4))
        at += 8 + ((get(m, at + 4, 4) + 7) & ~UINT64_C(7));
    switch (below(m, 4)) {
    case 0: put(m, at, 4, types[below(m, 6)]); break;
    case 1: put(m, at + 4, 4, odd_number(m, get(m, at + 4, 4))); break;
    default: put(m, at + 8 + 4 * below(m, 6), 4, odd_number(m, 24)); break;
    }
}

/* The bitmaps extension's data; 0: there is none. */
static uint64_t bitmaps(const struct image *m)
{
    uint64_t at = first_extension(m);
    for (int i = 0; i < 8 && get(m, at, 4); i++) {
        if (get(m, at, 4) == 0x23852875)
            return at + 8;
        at += 8 + ((get(m, at + 4, 4) + 7) & ~UINT64_C(7));
    }
    return 0;
}

static void mutate_bitmaps(struct image *m)
{
    static const struct { uint8_t at, width; } entry[] = { { 0, 8 }, { 8, 4 }, { 12, 4 }, { 16, 1 }, { 17, 1 }, { 18, 2 }, { 20, 4 } };
    uint64_t extension = bitmaps(m), directory = get(m, extension + 16, 8);
    if (!extension)
        return;
    uint64_t i = below(m, sizeof entry / sizeof *entry + 2);
    if (i < sizeof entry / sizeof *entry)
        put(m, directory + entry[i].at, entry[i].width, odd_number(m, get(m, directory + entry[i].at, entry[i].width)));
    else
        put(m, get(m, directory, 8) + 8 * below(m, 8), 8, some_entry(m, 0));
}

static void mutate_snapshots(struct image *m)
{
    static const struct { uint8_t at, width; } entry[] = {
        { 0, 8 }, { 8, 4 }, { 12, 2 }, { 14, 2 }, { 32, 4 }, { 36, 4 }, { 40, 8 }, { 48, 8 },
    };
    uint64_t at = get(m, 64, 8), i = below(m, sizeof entry / sizeof *entry + 1);
    if (get(m, 60, 4) == 0)
        return;
    if (i < sizeof entry / sizeof *entry)
        put(m, at + entry[i].at, entry[i].width, odd_number(m, get(m, at + entry[i].at, entry[i].width)));
    else
        put(m, get(m, at, 8) + 8 * below(m, 4), 8, some_entry(m, 0));
}

static void mutate_tables(struct image *m)
{
    const uint64_t cs = cluster_size(m), l1 = get(m, 40, 8), reftable = get(m, 48, 8);
    uint64_t table, at;
    switch (below(m, 5)) {
    case 0:
        at = l1 + 8 * below(m, get(m, 36, 4) + 1);
        put(m, at, 8, some_entry(m, get(m, at, 8)));
        break;
    case 1:
        at = reftable + 8 * below(m, 4);
        put(m, at, 8, below(m, 2) ? some_cluster(m) : odd_number(m, get(m, at, 8)));
        break;
    case 2:                                     /* a refcount */
        at = get(m, reftable, 8) + below(m, m->size / cs * 2 + 2);
        put(m, at, 1, odd_number(m, get(m, at, 1)));
        break;
    default:
        table = get(m, l1 + 8 * below(m, get(m, 36, 4)), 8) & UINT64_C(0xfffffffffffe00);
        at = table + 8 * below(m, cs / 8);
        if (table)
            put(m, at, 8, some_entry(m, get(m, at, 8)));
    }
}

static void mutate_backing_name(struct image *m)
{
    static const char *names[] = {
        "base.raw", "base.qcow2", "../outside.raw", "/etc/passwd", "t.qcow2", "./t.qcow2", "json:{}", "nbd:x", "link.raw",
        "sub/../base.raw", ".",
    };
    const char *name = names[below(m, sizeof names / sizeof *names)];
    uint64_t at = get(m, 8, 8);
    if (at == 0 || at > m->size) {
        at = 400;
        put(m, 8, 8, at);
    }
    put(m, 16, 4, strlen(name));
    for (size_t i = 0; name[i]; i++)
        put(m, at + i, 1, (uint8_t)name[i]);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
    struct image m = { data + SCRIPT, size - SCRIPT, seed };
    if (size < SCRIPT + 512 || below(&m, 8) == 0)
        return LLVMFuzzerMutate(data, size, max_size);
    for (uint64_t n = 1 + below(&m, 3); n > 0; n--) {
        switch (below(&m, 16)) {
        case 0: mutate_header(&m); break;
        case 1: mutate_extension(&m); break;
        case 2: mutate_bitmaps(&m); break;
        case 3: mutate_snapshots(&m); break;
        case 4: mutate_backing_name(&m); break;
        case 5: data[below(&m, SCRIPT)] = (uint8_t)below(&m, 256); break;
        case 6: for (unsigned i = 2; i < 8; i++) data[i] = (uint8_t)below(&m, 256); break;
        default: mutate_tables(&m); break;
        }
    }
    return size;
}
