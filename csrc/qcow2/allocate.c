/* allocate.c: which clusters of the file are free, and taking them.
 *
 * Where free clusters are found, in this order:
 *   1. Regions (what one slice of refcounts describes) in which something was freed since opening: a bit each.
 *   2. Regions that were there at opening and were not looked at yet, a few for each allocation: the refcounts of a large image are never read at
 *      one go.
 *   3. Behind everything that was ever used: the tail. In a file, that reads as zeros, and need not be written to be empty.
 *
 * Refcount blocks are made at the tail when the tail comes to where there is none; such a block describes itself if it is in its own range. The
 * refcount table grows by moving: its new place is at the tail too, and the header points there from the next commit on.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "allocate.h"

#define LOOK_AT 8u                      /* regions that one allocation looks through */
#define SKIP_AT_TAIL 64u                /* regions behind the end of the file that may be in use all the same */

typedef unsigned long long ull;

/* ---- free clusters in a region ---- */

/* A run of up to `want` free clusters in the region, and take it. got->count is 0: it has none. Under `alloc`. */
static int take_in_region(struct qcow2 *q, uint64_t region, uint64_t want, struct run *got, fl_error *error)
{
    uint64_t size = UINT64_C(1) << q->region_bits, base = region << q->region_bits, i = 0, n = 0;
    uint64_t limit = MIN(size, atomic_load(&q->tail) > base ? atomic_load(&q->tail) - base : 0);
    struct slice *slice;
    int rc = count_slice(q, base, &slice, error);
    got->count = 0;
    if (rc < 0 || !slice)
        return rc;
    while (i < limit && count_load(slice, q->refcount_order, i))
        i++;
    while (i + n < limit && n < want && count_load(slice, q->refcount_order, i + n) == 0)
        n++;
    if (n > 0 && (rc = check_not_a_table(q, base + i, n, error)) == 0) {
        count_set(q, slice, base + i, n, 1);
        *got = (struct run){ base + i, n };
    }
    cache_put(q, slice);
    return rc;
}

static int take_freed(struct qcow2 *q, uint64_t want, struct run *got, fl_error *error)
{
    for (unsigned looked = 0; looked < LOOK_AT; looked++) {
        uint64_t region = bitmap_next_set(&q->maybe_free, 0, q->maybe_free.bits);
        if (region == q->maybe_free.bits)
            break;
        int rc = take_in_region(q, region, want, got, error);
        if (rc < 0 || got->count)
            return rc;
        bitmap_clear(&q->maybe_free, region, 1);
    }
    return 0;
}

static int take_not_looked_at(struct qcow2 *q, uint64_t want, uint64_t most, struct run *got, fl_error *error)
{
    for (; most > 0 && q->scan < q->scan_end; most--, q->scan++) {
        int rc = take_in_region(q, q->scan, want, got, error);
        if (rc < 0 || got->count)
            return rc;
    }
    return 0;
}

/* ---- the tail ---- */

static int check_room(struct qcow2 *q, uint64_t clusters, fl_error *error)
{
    uint64_t tail = atomic_load(&q->tail), most = OFFSET_MASK >> q->cluster_bits;
    if (q->io.device)
        most = q->io.size >> q->cluster_bits;
    if (tail < most && clusters <= most - tail)
        return 0;
    return fail(error, ENOSPC, FL_SIDE_NONE, 0, 0, "image '%s' is full: %s", q->image.name,
                q->io.device ? "its block device has no more room" : "its file cannot be larger");
}

int alloc_clean(struct qcow2 *q, uint64_t cluster, bool fresh, fl_error *error)
{
    /* A fresh one is zeros already, but maybe behind the end of the file, which reaches to the end of the cluster when its last part is written. */
    uint64_t offset = cluster << q->cluster_bits, length = fresh ? q->cache.slice_size : q->cluster_size;
    int rc = cache_forget(q, offset, error);
    if (rc < 0)
        return rc;
    void *zeros = calloc(1, length);
    if (!zeros)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a table of image '%s'", q->image.name);
    rc = io_write_metadata(&q->io, zeros, length, offset + q->cluster_size - length, error);
    free(zeros);
    return rc;
}

static int grow_table(struct qcow2 *q, uint64_t blocks, fl_error *error);

/* Make block `block` at the tail, whose own refcount is in that block, or in one that is there. */
static int make_block(struct qcow2 *q, uint64_t block, fl_error *error)
{
    uint64_t at = atomic_load(&q->tail), offset = at << q->cluster_bits;
    struct slice *slice = NULL;
    int rc = check_room(q, 1, error);
    if (rc == 0)
        rc = check_not_a_table(q, at, 1, error);
    if (rc == 0)
        rc = alloc_clean(q, at, at >= q->sparse_from, error);
    if (rc < 0)
        return rc;
    atomic_store(&q->tail, at + 1);             /* whatever happens now: what is there is not fresh any more */
    if (at >> q->block_bits == block)
        rc = cache_get(q, SLICE_REFCOUNTS,
                       offset + (region_of(q, at) & ((UINT64_C(1) << (q->block_bits - q->region_bits)) - 1)) * q->cache.slice_size, &slice, error);
    else
        rc = count_slice(q, at, &slice, error);
    if (rc < 0)
        return rc;
    if (count_load(slice, q->refcount_order, in_region(q, at)) == 0) {
        pthread_mutex_lock(&q->lock);
        count_store(slice, q->refcount_order, in_region(q, at), 1);
        cache_dirty(q, slice);
        q->reftable[block] = offset;
        bitmap_fetch_or(&q->reftable_dirty, block >> 6, UINT64_C(1) << (block & 63));
        pthread_mutex_unlock(&q->lock);
    }                                           /* else it is in use, though behind the end: the next one, then */
    cache_put(q, slice);
    return 0;
}

/* See to it that `block` is there. The tail may move on. Under `alloc`. */
static int ensure_block(struct qcow2 *q, uint64_t block, fl_error *error)
{
    int rc = 0;
    for (uint64_t tries = 0; rc == 0; tries++) {
        uint64_t here = atomic_load(&q->tail) >> q->block_bits, missing = MAX(block, here);
        if (missing >= q->reftable_size)
            rc = grow_table(q, missing + 1, error);
        else if (!q->reftable[here])
            rc = make_block(q, here, error);
        else if (!q->reftable[block])
            rc = make_block(q, block, error);
        else
            return 0;
        if (rc == 0 && tries > SKIP_AT_TAIL << q->region_bits)
            rc = qcow2_corrupt(q, UINT64_MAX, error, "the refcounts say that much is in use behind the end of the file");
    }
    return rc;
}

int take_at_tail(struct qcow2 *q, uint64_t want, struct run *got, fl_error *error)
{
    for (unsigned skipped = 0; ; skipped++) {
        int rc = ensure_block(q, atomic_load(&q->tail) >> q->block_bits, error);
        uint64_t at = atomic_load(&q->tail), n = 0;
        struct slice *slice;
        if (rc == 0)
            rc = check_room(q, 1, error);
        if (rc == 0)
            rc = count_slice(q, at, &slice, error);
        if (rc < 0)
            return rc;
        uint64_t limit = MIN(want, (UINT64_C(1) << q->region_bits) - in_region(q, at));
        if (q->io.device)
            limit = MIN(limit, (q->io.size >> q->cluster_bits) - at);
        while (n < limit && count_load(slice, q->refcount_order, in_region(q, at) + n) == 0)
            n++;
        if (n > 0 && (rc = check_not_a_table(q, at, n, error)) == 0) {
            count_set(q, slice, at, n, 1);
            *got = (struct run){ at, n };
            atomic_store(&q->tail, at + n);
        }
        uint64_t used = 0;
        while (n == 0 && in_region(q, at) + used < UINT64_C(1) << q->region_bits && count_load(slice, q->refcount_order, in_region(q, at) + used))
            used++;
        if (n == 0)
            atomic_store(&q->tail, at + used);
        cache_put(q, slice);
        if (rc < 0 || n > 0)
            return rc;
        if (skipped > SKIP_AT_TAIL)
            return qcow2_corrupt(q, UINT64_MAX, error, "the refcounts say that much is in use behind the end of the file");
    }
}

/* ---- allocation ---- */

int take_back(struct qcow2 *q, struct run run, fl_error *error)
{
    while (run.count > 0) {
        uint64_t n = MIN(run.count, (UINT64_C(1) << q->region_bits) - in_region(q, run.first));
        struct slice *slice;
        int rc = count_slice(q, run.first, &slice, error);
        if (rc < 0)
            return rc;                          /* they leak */
        if (slice) {
            count_set(q, slice, run.first, n, 0);
            note_free(q, run.first);
            cache_put(q, slice);
        }
        run.first += n;
        run.count -= n;
    }
    return 0;
}

void alloc_undo(struct qcow2 *q, struct run run)
{
    pthread_mutex_lock(&q->alloc);
    take_back(q, run, NULL);
    pthread_mutex_unlock(&q->alloc);
}

int take_clusters(struct qcow2 *q, uint64_t want, struct run *got, bool *fresh, fl_error *error)
{
    got->count = 0;
    int rc = take_freed(q, want, got, error);
    if (rc == 0 && !got->count)
        rc = take_not_looked_at(q, want, q->io.device && check_room(q, 1, NULL) < 0 ? UINT64_MAX : LOOK_AT, got, error);
    *fresh = rc == 0 && !got->count;
    if (*fresh)
        rc = take_at_tail(q, want, got, error);
    *fresh = *fresh && got->first >= q->sparse_from;
    return rc;
}

int alloc_clusters(struct qcow2 *q, uint64_t want, struct run *got, bool *fresh, fl_error *error)
{
    pthread_mutex_lock(&q->alloc);
    int rc = take_clusters(q, want, got, fresh, error);
    pthread_mutex_unlock(&q->alloc);
    return rc;
}

/* The blocks are made first, as they come to lie at the tail too; then the row begins where the tail is then. */
int take_in_a_row(struct qcow2 *q, uint64_t want, struct run *got, fl_error *error)
{
    int rc = 0;
    for (unsigned tries = 0; rc == 0; tries++) {
        uint64_t first = atomic_load(&q->tail);
        for (uint64_t block = first >> q->block_bits; rc == 0 && block <= (first + want - 1) >> q->block_bits; block++)
            rc = ensure_block(q, block, error);
        if (rc == 0)
            rc = check_room(q, want, error);
        if (rc < 0 || first != atomic_load(&q->tail))
            continue;
        *got = (struct run){ first, 0 };
        while (rc == 0 && got->count < want) {
            struct run more;
            rc = take_at_tail(q, want - got->count, &more, error);
            if (rc == 0 && more.first != first + got->count) {
                take_back(q, more, NULL);        /* something behind the end was in use: begin anew behind it */
                break;
            }
            if (rc == 0)
                got->count += more.count;
        }
        if (rc == 0 && got->count == want)
            return 0;
        take_back(q, *got, NULL);
        if (rc == 0 && tries > SKIP_AT_TAIL)
            rc = qcow2_corrupt(q, UINT64_MAX, error, "the refcounts say that much is in use behind the end of the file");
    }
    return rc;
}

int alloc_in_a_row(struct qcow2 *q, uint64_t want, struct run *got, fl_error *error)
{
    pthread_mutex_lock(&q->alloc);
    int rc = take_in_a_row(q, want, got, error);
    pthread_mutex_unlock(&q->alloc);
    return rc;
}

/* ---- a larger table ---- */

/* Room in the table for `blocks` blocks and then some. While the new table has no place yet, commit writes only what the old one has room for. If no
   place is found, blocks that the old one has no room for would be in the caches and not in the table: so nothing may be changed any more. That does not
   happen for want of room in a file or on a device, which is looked at before. */
static int grow_table(struct qcow2 *q, uint64_t blocks, fl_error *error)
{
    uint64_t per_cluster = q->cluster_size / 8, clusters = div_up(MAX(blocks, q->reftable_size), per_cluster);
    fl_error why = { 0 };
    clusters = MIN(clusters + MAX(clusters / 2, 1), MAX_REFTABLE_BYTES >> q->cluster_bits);
    uint64_t more = (clusters >> (q->block_bits - 1)) + 8;     /* blocks that the table itself may need */
    if (clusters * per_cluster < blocks + more)
        clusters = div_up(blocks + more, per_cluster);
    if (clusters > MAX_REFTABLE_BYTES >> q->cluster_bits || q->growing)
        return fail(error, EFBIG, FL_SIDE_NONE, 0, 0, "image '%s' cannot grow: its refcount table would be larger than %llu bytes",
                    q->image.name, (ull)MAX_REFTABLE_BYTES);
    int rc = check_room(q, clusters + more, error);
    uint64_t *table = rc == 0 ? calloc(clusters, q->cluster_size) : NULL, *old = q->reftable;
    if (rc == 0 && !table)
        rc = fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for the refcount table of image '%s'", q->image.name);
    if (rc < 0)
        return rc;
    memcpy(table, old, q->reftable_size * 8);
    pthread_mutex_lock(&q->lock);
    q->reftable = table;
    q->reftable_size = clusters * per_cluster;
    pthread_mutex_unlock(&q->lock);
    free(old);

    struct run place = { 0, 0 };
    q->growing = true;
    rc = take_in_a_row(q, clusters, &place, &why);
    q->growing = false;
    pthread_mutex_lock(&q->lock);
    if (rc == 0 && freed_reserve(q, 1) < 0)
        rc = fail(&why, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for the refcount table of image '%s'", q->image.name);
    if (rc == 0) {
        freed_add(q, q->header.reftable_offset >> q->cluster_bits, q->header.reftable_clusters);
        q->header.reftable_offset = place.first << q->cluster_bits;
        q->header.reftable_clusters = (uint32_t)clusters;
        tables_moved(q);
        q->header_dirty = q->must_commit = true;
    }
    pthread_mutex_unlock(&q->lock);
    if (rc < 0) {
        qcow2_break(q, &why);
        if (error)
            *error = why;
    }
    return rc;
}
