/* check.h: what the files of the check share.
 *
 *   check_refs.c     counts of references by cluster, and the set of L2 tables, in memory that follows what there is
 *   check_count.c    visit every table once, count every reference
 *   check_compare.c  the refcounts of the file against the counts; COPIED bits
 *   check_repair.c   refcounts and entries put right in place
 *   check_rebuild.c  new refcount structures in new space
 *   check.c          the order of these, findings, the public call   <- start reading here
 *
 * Bounds, whatever the file claims to be. Holes are not read: tables cost what they occupy. Every L2 table is read once a pass, however
 * many L1 entries lead to it: it counts as often as they are. Counts are kept in pages of 64 clusters where at least one reference
 * is. An honest image, however sparse, has 8 bytes of L2 entry for each of its clusters, and a count takes 4.5; so memory may reach what the file
 * occupies, and SLACK; a file whose references are scattered so that this does not do can't be checked (check_errors).
 */
#ifndef FL_QCOW2_CHECK_H
#define FL_QCOW2_CHECK_H

#include "qcow2.h"

#define CHECK_SLACK (UINT64_C(256) << 20)           /* bytes */
#define PAGE_CLUSTERS 64u

/* 64 clusters in a row. Masks: bit i is cluster i of them. */
struct page {
    uint32_t count[PAGE_CLUSTERS];                  /* references; stays at UINT32_MAX */
    uint64_t stored, one, over, under;              /* the file's refcount is not 0; is 1; is too high; is too low */
};

/* An L2 table. */
struct table {
    uint32_t total, active;                         /* L1 entries that lead to it: all, those of the active table */
    uint32_t l1_index;                              /* of the first of them */
    uint64_t moved;                                 /* where a repair put it; 0: it is where it was */
};

/* From a number to a value of fixed size; values are numbered in the order in which they came, and move when one is added. */
struct map {
    uint64_t *keys;
    char *values;
    uint32_t *slots;                                /* open addressing: number + 1; 0 is free */
    size_t value_size, count, capacity, slot_count;
};

struct snapshot_l1 { uint64_t offset; uint32_t entries; };

#define BLOCK_UNKNOWN UINT64_C(1)                   /* in `blocks`: there is an entry, but what it leads to is not to be used */

struct checker {
    struct io *io;
    struct header *header;
    fl_check *result;
    fl_error *error;

    uint64_t length;                                /* of the file, when the pass began */
    uint64_t clusters;                              /* of the file; a last one that is cut short counts */
    uint64_t highest;                               /* the last cluster that is referenced or has a refcount, and 1; 0: none */
    uint64_t dangling_first, dangling_end;          /* where entries beyond the end of the file lead; first == NOWHERE: there are none */
    uint64_t memory, memory_limit;
    uint64_t table_bytes, table_limit;              /* read of L1 tables and tables of bitmaps: see spend() */
    fl_extent extent;                               /* of the file, where it was looked at last */
    uint64_t asked_ns;                              /* when it was last asked whether to go on */
    unsigned char *buffer;                          /* BUFFER_SIZE */
    struct map pages, tables;
    uint32_t last_page;                             /* the page used last, and 1 */
    struct snapshot_l1 *snapshots;
    uint32_t snapshot_count;
    uint64_t snapshots_length;                      /* bytes of the table */
    uint64_t *blocks;                               /* by index in the refcount table: offset (0: not counted), and BLOCK_UNKNOWN */
    uint64_t block_count;

    bool incomplete;                                /* there are entries that could not be followed: what they led to looks leaked */
    bool rebuild;                                   /* the refcount structures can't be put right in place */
    bool no_place;                                  /* there was no space for new ones */
    bool move_l1;                                   /* something else refers to the active L1 table's clusters */
    bool move_l2;                                   /* and those of L2 tables */
    bool bitmaps_damaged;
    bool entries_damaged;                           /* an entry of an L1 or L2 table can be put right */
};

/* ---- check_refs.c ---- */

#define NOT_THERE UINT32_MAX

/* The number of the key; NOT_THERE. */
uint32_t map_find(const struct map *map, uint64_t key);
/* The same, of a new, zeroed value where it was not there. -ELOOP and a check error: over the bound. */
int map_add(struct checker *c, struct map *map, uint64_t key, uint32_t *number);
static inline struct page *page_at(struct checker *c, uint32_t number) { return (struct page *)(void *)c->pages.values + number; }
static inline struct table *table_at(struct checker *c, uint32_t number) { return (struct table *)(void *)c->tables.values + number; }
struct page *find_page(struct checker *c, uint64_t cluster);        /* NULL: no references in it */
uint32_t references(struct checker *c, uint64_t cluster);
/* Count `n` references to each cluster of a range inside the file. */
int refs_add(struct checker *c, uint64_t offset, uint64_t length, uint32_t n);
void refs_remove(struct checker *c, uint64_t offset, uint64_t length);      /* one reference each */
/* The numbers of all pages, in the order of clusters; the caller's. */
int pages_sorted(struct checker *c, uint32_t **numbers);
void refs_free(struct checker *c);

/* ---- check_count.c ---- */

#define BUFFER_SIZE (64u << 10)

/* What an L2 entry is. */
enum entry_type { ENTRY_NONE, ENTRY_DATA, ENTRY_ZERO_PLAIN, ENTRY_ZERO_ALLOCATED, ENTRY_IS_COMPRESSED };
enum entry_type entry_type(uint64_t entry);
/* Of a compressed cluster: the bytes that it may occupy. */
void compressed_range(const struct header *h, uint64_t entry, uint64_t *offset, uint64_t *length);
/* Does a range end within the file, or less than a cluster behind its end? */
bool within_file(const struct checker *c, uint64_t offset, uint64_t length);

/* A piece of a table, `at` bytes from its beginning; `length` is a multiple of 512. Returns -code, 0, or 1: write it back. */
typedef int visit_fn(struct checker *c, void *context, unsigned char *bytes, size_t length, uint64_t at);
/* The pieces of [offset, offset + length) that are not holes. */
int visit_table(struct checker *c, uint64_t offset, uint64_t length, visit_fn *visit, void *context);
int count_all(struct checker *c);

/* ---- check_compare.c ---- */

/* log2 of the refcounts of a block */
static inline unsigned block_bits(const struct header *h) { return h->cluster_bits + 3 - h->refcount_order; }
/* What the refcounts of a page take. */
static inline size_t group_bytes(const struct header *h) { return (size_t)8 << h->refcount_order; }
static inline uint64_t refcount_max(const struct header *h)
{
    return h->refcount_order == 6 ? UINT64_MAX : (UINT64_C(1) << (1u << h->refcount_order)) - 1;
}
void refcounts_load(const struct header *h, const unsigned char *bytes, uint64_t counts[PAGE_CLUSTERS]);
void refcount_store(const struct header *h, unsigned char *bytes, unsigned index, uint64_t count);
int compare_refcounts(struct checker *c);
int check_copied(struct checker *c);

/* ---- check.c ---- */

#define NOWHERE UINT64_MAX

/* Count and describe one finding (a leak: of one cluster). guest, host: NOWHERE where there is none. */
void found(struct checker *c, int kind, uint64_t guest, uint64_t host, const char *format, ...) __attribute__((format(printf, 5, 6)));
int check_interrupted(struct checker *c);           /* 0 or -FL_EINTERRUPTED */
int no_memory(struct checker *c);

static inline uint64_t cluster_size(const struct checker *c) { return UINT64_C(1) << c->header->cluster_bits; }
static inline uint64_t reftable_bytes(const struct checker *c)
{
    return (uint64_t)c->header->reftable_clusters << c->header->cluster_bits;
}
/* Of a refcount block that can be used; 0: there is none. */
static inline uint64_t block_at(const struct checker *c, uint64_t index)
{
    return index < c->block_count && !(c->blocks[index] & BLOCK_UNKNOWN) ? c->blocks[index] : 0;
}
static inline bool block_unknown(const struct checker *c, uint64_t index)
{
    return index < c->block_count && (c->blocks[index] & BLOCK_UNKNOWN);
}
static inline uint64_t cluster_of(const struct checker *c, uint64_t offset) { return offset >> c->header->cluster_bits; }
static inline uint64_t load64(const unsigned char *bytes)
{
    uint64_t value;
    memcpy(&value, bytes, sizeof value);
    return __builtin_bswap64(value);
}
static inline void store64(unsigned char *bytes, uint64_t value)
{
    value = __builtin_bswap64(value);
    memcpy(bytes, &value, sizeof value);
}
static inline uint32_t load32(const unsigned char *bytes)
{
    uint32_t value;
    memcpy(&value, bytes, sizeof value);
    return __builtin_bswap32(value);
}

/* ---- check_repair.c, check_rebuild.c ---- */

/* After a pass. All writes are durable when they return. */
int repair_refcounts(struct checker *c, bool leaks_only);
int repair_entries(struct checker *c, bool leaks_only);
/* 1: no space. */
int rebuild_refcounts(struct checker *c);
/* Is an L1 table where it may be written? */
bool l1_is_alone(struct checker *c, uint64_t offset, uint32_t entries);
static inline bool l2_is_alone(struct checker *c, uint32_t number)
{
    return references(c, cluster_of(c, c->tables.keys[number])) == table_at(c, number)->total;
}

#endif
