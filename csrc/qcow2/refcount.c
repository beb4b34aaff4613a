/* refcount.c: the refcount of a cluster of the file, in the caches.
 *
 * A refcount block is in slices like an L2 table; what a slice describes is a region. The refcount table is in memory as a whole.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <stdlib.h>

#include "allocate.h"

typedef unsigned long long ull;

uint64_t count_load(const struct slice *slice, unsigned order, uint64_t i)
{
    const unsigned char *p = (const unsigned char *)(uintptr_t)slice->words;
    uint64_t wide = 0;
    if (order < 3)
        return p[i >> (3 - order)] >> ((i << order) & 7) & ((1u << (1u << order)) - 1);
    unsigned bytes = 1u << (order - 3);
    for (unsigned b = 0; b < bytes; b++)
        wide = wide << 8 | p[i * bytes + b];
    return wide;
}

void count_store(struct slice *slice, unsigned order, uint64_t i, uint64_t n)
{
    unsigned char *p = (unsigned char *)(uintptr_t)slice->words;
    if (order < 3) {
        unsigned shift = (i << order) & 7, mask = ((1u << (1u << order)) - 1) << shift;
        unsigned char *byte = &p[i >> (3 - order)];
        *byte = (unsigned char)((*byte & ~mask) | ((unsigned)n << shift & mask));
        return;
    }
    unsigned bytes = 1u << (order - 3);
    for (unsigned b = bytes; b-- > 0; n >>= 8)
        p[i * bytes + b] = (unsigned char)n;
}

int count_slice(struct qcow2 *q, uint64_t cluster, struct slice **slice, fl_error *error)
{
    uint64_t block = cluster >> q->block_bits;
    uint64_t entry = block < q->reftable_size ? q->reftable[block] : 0;
    if (!entry) {
        *slice = NULL;
        return 0;
    }
    if (entry & (REFTABLE_RESERVED | q->cluster_mask) || entry >> q->cluster_bits >= atomic_load(&q->tail))
        return qcow2_corrupt(q, UINT64_MAX, error, "entry %llu of the refcount table is 0x%llx, which is no place for a refcount block",
                             (ull)block, (ull)entry);
    uint64_t slice_number = region_of(q, cluster) & ((UINT64_C(1) << (q->block_bits - q->region_bits)) - 1);
    return cache_get(q, SLICE_REFCOUNTS, entry + slice_number * q->cache.slice_size, slice, error);
}

void count_set(struct qcow2 *q, struct slice *slice, uint64_t cluster, uint64_t count, uint64_t n)
{
    pthread_mutex_lock(&q->lock);
    for (uint64_t i = 0; i < count; i++)
        count_store(slice, q->refcount_order, in_region(q, cluster) + i, n);
    cache_dirty(q, slice);
    pthread_mutex_unlock(&q->lock);
}

void note_free(struct qcow2 *q, uint64_t cluster)
{
    uint64_t region = region_of(q, cluster);
    if (region < q->maybe_free.bits)
        bitmap_fetch_or(&q->maybe_free, region >> 6, UINT64_C(1) << (region & 63));
}

int check_not_a_table(struct qcow2 *q, uint64_t first, uint64_t count, fl_error *error)
{
    uint64_t l1 = q->header.l1_offset >> q->cluster_bits, l1_clusters = clusters_for(q, (uint64_t)q->header.l1_size * 8);
    uint64_t table = q->header.reftable_offset >> q->cluster_bits;
    if (first != 0 && (first >= l1 + l1_clusters || first + count <= l1) &&
        (first >= table + q->header.reftable_clusters || first + count <= table))
        return 0;
    return qcow2_corrupt(q, UINT64_MAX, error, "the refcounts say that cluster %llu of the file is free, but the header or a table is there",
                         (ull)first);
}

/* ---- opening ---- */

/* The first cluster behind all that have a refcount. */
static int find_last_used(struct qcow2 *q, uint64_t *tail, fl_error *error)
{
    uint64_t per_block = UINT64_C(1) << (q->block_bits - q->region_bits);
    *tail = 1;
    for (uint64_t block = q->reftable_size; block-- > 0; )
        for (uint64_t part = q->reftable[block] ? per_block : 0; part-- > 0; ) {
            uint64_t base = (block << q->block_bits) + (part << q->region_bits);
            struct slice *slice;
            int rc = count_slice(q, base, &slice, error);
            if (rc < 0)
                return rc;
            uint64_t i = UINT64_C(1) << q->region_bits;
            while (i > 0 && count_load(slice, q->refcount_order, i - 1) == 0)
                i--;
            cache_put(q, slice);
            if (i > 0) {
                *tail = base + i;
                return 0;
            }
        }
    return 0;
}

int refcount_init(struct qcow2 *q, fl_error *error)
{
    uint64_t bytes = (uint64_t)q->header.reftable_clusters << q->cluster_bits;
    q->reftable_size = bytes / 8;
    if (!(q->reftable = malloc(bytes)) || bitmap_init(&q->reftable_dirty, MAX_REFTABLE_BYTES / 8) < 0 ||
        bitmap_init(&q->maybe_free, (MAX_REFTABLE_BYTES / 8) << (q->block_bits - q->region_bits)) < 0)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for the refcount table of image '%s'", q->image.name);
    int rc = io_read_metadata(&q->io, q->reftable, bytes, q->header.reftable_offset, error);
    if (rc < 0)
        return rc;
    for (uint64_t i = 0; i < q->reftable_size; i++)
        q->reftable[i] = be64toh(q->reftable[i]);
    uint64_t end = atomic_load(&q->tail);
    q->sparse_from = q->io.device ? UINT64_MAX : end;
    if (q->io.device) {
        if ((rc = find_last_used(q, &end, error)) < 0)
            return rc;
        end = MAX(end, 1);
    }
    q->scan_end = MIN(div_up(end, UINT64_C(1) << q->region_bits), q->maybe_free.bits);
    atomic_store(&q->tail, end);
    return 0;
}
