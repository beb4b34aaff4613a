/* refcount.c: which clusters of the file are in use, by the refcounts in the caches.
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
#include <endian.h>
#include <stdlib.h>

#include "driver.h"

#define LOOK_AT 8u                      /* regions that one allocation looks through */
#define SKIP_AT_TAIL 64u                /* regions behind the end of the file that may be in use all the same */

typedef unsigned long long ull;

/* ---- runs ---- */

int runs_reserve(struct runs *runs, size_t more)
{
    if (runs->room - runs->count >= more)
        return 0;
    size_t room = MAX(runs->room * 2, runs->count + more);
    struct run *run = realloc(runs->run, room * sizeof *run);
    if (!run)
        return -ENOMEM;
    runs->run = run;
    runs->room = room;
    return 0;
}

void runs_add(struct runs *runs, uint64_t first, uint64_t count)
{
    struct run *last = runs->count ? &runs->run[runs->count - 1] : NULL;
    if (last && last->first + last->count == first)
        last->count += count;
    else
        runs->run[runs->count++] = (struct run){ first, count };
}

int freed_reserve(struct qcow2 *q, size_t more)
{
    if (!q->freed && !(q->freed = calloc(1, sizeof *q->freed)))
        return -ENOMEM;
    return runs_reserve(&q->freed->runs, more);
}

void freed_add(struct qcow2 *q, uint64_t first, uint64_t count)
{
    runs_add(&q->freed->runs, first, count);
    atomic_fetch_add(&q->freed_bytes, count << q->cluster_bits);
}

void freed_destroy(struct freed *list)
{
    for (struct freed *next; list; list = next) {
        next = list->next;
        free(list->runs.run);
        free(list);
    }
}

/* ---- one refcount ---- */

static uint64_t load_count(const struct slice *slice, unsigned order, uint64_t i)
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

static void store_count(struct slice *slice, unsigned order, uint64_t i, uint64_t n)
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

static uint64_t region_of(const struct qcow2 *q, uint64_t cluster) { return cluster >> q->region_bits; }
static uint64_t in_region(const struct qcow2 *q, uint64_t cluster) { return cluster & ((UINT64_C(1) << q->region_bits) - 1); }

/* The slice that has the refcount of a cluster, pinned; NULL: no block describes it, so it is free. Under `alloc`. */
static int slice_for(struct qcow2 *q, uint64_t cluster, struct slice **slice, fl_error *error)
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

/* `count` clusters of one slice. Under `alloc`. */
static void set_counts(struct qcow2 *q, struct slice *slice, uint64_t cluster, uint64_t count, uint64_t n)
{
    pthread_mutex_lock(&q->lock);
    for (uint64_t i = 0; i < count; i++)
        store_count(slice, q->refcount_order, in_region(q, cluster) + i, n);
    cache_dirty(q, slice);
    pthread_mutex_unlock(&q->lock);
}

static void note_free(struct qcow2 *q, uint64_t cluster)
{
    uint64_t region = region_of(q, cluster);
    if (region < q->maybe_free.bits)
        bitmap_fetch_or(&q->maybe_free, region >> 6, UINT64_C(1) << (region & 63));
}

/* Would a cluster at `first` be on the header or a table? Then the refcounts are wrong, whatever else is. */
static int check_not_a_table(struct qcow2 *q, uint64_t first, uint64_t count, fl_error *error)
{
    uint64_t l1 = q->header.l1_offset >> q->cluster_bits, l1_clusters = clusters_for(q, (uint64_t)q->header.l1_size * 8);
    uint64_t table = q->header.reftable_offset >> q->cluster_bits;
    if (first != 0 && (first >= l1 + l1_clusters || first + count <= l1) &&
        (first >= table + q->header.reftable_clusters || first + count <= table))
        return 0;
    return qcow2_corrupt(q, UINT64_MAX, error, "the refcounts say that cluster %llu of the file is free, but the header or a table of it is there", (ull)first);
}

/* ---- free clusters in a region ---- */

/* A run of up to `want` free clusters in the region, and take it. got->count is 0: it has none. Under `alloc`. */
static int take_in_region(struct qcow2 *q, uint64_t region, uint64_t want, struct run *got, fl_error *error)
{
    uint64_t size = UINT64_C(1) << q->region_bits, base = region << q->region_bits, i = 0, n = 0;
    uint64_t limit = MIN(size, atomic_load(&q->tail) > base ? atomic_load(&q->tail) - base : 0);
    struct slice *slice;
    int rc = slice_for(q, base, &slice, error);
    got->count = 0;
    if (rc < 0 || !slice)
        return rc;
    while (i < limit && load_count(slice, q->refcount_order, i))
        i++;
    while (i + n < limit && n < want && load_count(slice, q->refcount_order, i + n) == 0)
        n++;
    if (n > 0 && (rc = check_not_a_table(q, base + i, n, error)) == 0) {
        set_counts(q, slice, base + i, n, 1);
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

/* A cluster that will hold a table, or a block of refcounts: zeros in the file, and unknown to the cache. */
static int clean_cluster(struct qcow2 *q, uint64_t cluster, bool fresh, fl_error *error)
{
    int rc = cache_forget(q, cluster << q->cluster_bits, error);
    if (rc < 0 || fresh)
        return rc;
    void *zeros = calloc(1, q->cluster_size);
    if (!zeros)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a table of image '%s'", q->image.name);
    rc = io_write_metadata(&q->io, zeros, q->cluster_size, cluster << q->cluster_bits, error);
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
        rc = clean_cluster(q, at, at >= q->sparse_from, error);
    if (rc < 0)
        return rc;
    atomic_store(&q->tail, at + 1);             /* whatever happens now: what is there is not fresh any more */
    if (at >> q->block_bits == block)
        rc = cache_get(q, SLICE_REFCOUNTS,
                       offset + (region_of(q, at) & ((UINT64_C(1) << (q->block_bits - q->region_bits)) - 1)) * q->cache.slice_size, &slice, error);
    else
        rc = slice_for(q, at, &slice, error);
    if (rc < 0)
        return rc;
    if (load_count(slice, q->refcount_order, in_region(q, at)) == 0) {
        pthread_mutex_lock(&q->lock);
        store_count(slice, q->refcount_order, in_region(q, at), 1);
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

/* Take up to `want` clusters at the tail, in a row, all with their blocks. At least one. */
static int take_at_tail(struct qcow2 *q, uint64_t want, struct run *got, fl_error *error)
{
    for (unsigned skipped = 0; ; skipped++) {
        int rc = ensure_block(q, atomic_load(&q->tail) >> q->block_bits, error);
        uint64_t at = atomic_load(&q->tail), n = 0;
        struct slice *slice;
        if (rc == 0)
            rc = check_room(q, 1, error);
        if (rc == 0)
            rc = slice_for(q, at, &slice, error);
        if (rc < 0)
            return rc;
        uint64_t limit = MIN(want, (UINT64_C(1) << q->region_bits) - in_region(q, at));
        if (q->io.device)
            limit = MIN(limit, (q->io.size >> q->cluster_bits) - at);
        while (n < limit && load_count(slice, q->refcount_order, in_region(q, at) + n) == 0)
            n++;
        if (n > 0 && (rc = check_not_a_table(q, at, n, error)) == 0) {
            set_counts(q, slice, at, n, 1);
            *got = (struct run){ at, n };
            atomic_store(&q->tail, at + n);
        }
        uint64_t used = 0;
        while (n == 0 && in_region(q, at) + used < UINT64_C(1) << q->region_bits && load_count(slice, q->refcount_order, in_region(q, at) + used))
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

static int undo_run(struct qcow2 *q, struct run run, fl_error *error)
{
    while (run.count > 0) {
        uint64_t n = MIN(run.count, (UINT64_C(1) << q->region_bits) - in_region(q, run.first));
        struct slice *slice;
        int rc = slice_for(q, run.first, &slice, error);
        if (rc < 0)
            return rc;                          /* they leak */
        if (slice) {
            set_counts(q, slice, run.first, n, 0);
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
    undo_run(q, run, NULL);
    pthread_mutex_unlock(&q->alloc);
}

static int take(struct qcow2 *q, uint64_t want, struct run *got, bool *fresh, fl_error *error)
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
    int rc = take(q, want, got, fresh, error);
    pthread_mutex_unlock(&q->alloc);
    return rc;
}

/* Under `alloc`. The blocks are made first, as they come to lie at the tail too; then the row begins where the tail is then. */
static int take_in_a_row(struct qcow2 *q, uint64_t want, struct run *got, fl_error *error)
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
                undo_run(q, more, NULL);        /* something behind the end was in use: begin anew behind it */
                break;
            }
            if (rc == 0)
                got->count += more.count;
        }
        if (rc == 0 && got->count == want)
            return 0;
        undo_run(q, *got, NULL);
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

/* Room in the table for `blocks` blocks and then some. While the new table has no place yet, commit writes only what the old one has room for. If no place
   is found, blocks that the old one has no room for would be in the caches and not in the table: so nothing may be changed any more. That does not
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

/* ---- freeing ---- */

/* One reference less. Those that nobody has any more are added to `dead` and keep their last one for now. Under `alloc`. */
static int drop_one(struct qcow2 *q, uint64_t cluster, struct runs *dead, fl_error *error)
{
    struct slice *slice;
    if (runs_reserve(dead, 1) < 0)
        return -ENOMEM;
    int rc = slice_for(q, cluster, &slice, error);
    if (rc < 0)
        return rc;
    uint64_t n = slice ? load_count(slice, q->refcount_order, in_region(q, cluster)) : 0;
    if (n > 1)
        set_counts(q, slice, cluster, 1, n - 1);
    else if (n == 1)
        runs_add(dead, cluster, 1);
    if (slice)
        cache_put(q, slice);
    if (n == 0)
        qcow2_corrupt(q, UINT64_MAX, error, "cluster %llu of the file was in use, but its refcount is 0", (ull)cluster);
    return 0;
}

/* Compressed clusters may still be added to a cluster of the area, which would then have an owner again. So there is no area any more. */
static void keep_out_of_area(struct qcow2 *q, uint64_t cluster)
{
    if (q->area.position < q->area.end && cluster >= q->area.position >> q->cluster_bits && cluster < q->area.end >> q->cluster_bits)
        alloc_close_area(q);
}

static int by_first(const void *a, const void *b)
{
    const struct run *x = a, *y = b;
    return (x->first > y->first) - (x->first < y->first);
}

/* Work off `freed`; what is left in it could not be done now. In two steps, as punching is not for a lock that others wait for: first those that lose their
   last reference are found, and keep it, so that nobody can have them; when they are punched, they are free. */
static void settle_one(struct qcow2 *q, struct freed *freed)
{
    struct runs dead = { 0 };
    size_t done = 0;
    int rc = 0;
    qsort(freed->runs.run, freed->runs.count, sizeof *freed->runs.run, by_first);
    pthread_mutex_lock(&q->alloc);
    for (; done < freed->runs.count; done++) {
        struct run *run = &freed->runs.run[done];
        for (; run->count > 0; run->first++, run->count--) {
            keep_out_of_area(q, run->first);
            if ((rc = drop_one(q, run->first, &dead, NULL)) < 0)
                break;
        }
        if (rc < 0)
            break;
    }
    pthread_mutex_unlock(&q->alloc);
    memmove(freed->runs.run, freed->runs.run + done, (freed->runs.count - done) * sizeof *freed->runs.run);
    freed->runs.count -= done;
    for (size_t i = 0; i < dead.count; i++)
        io_punch(&q->io, dead.run[i].count << q->cluster_bits, dead.run[i].first << q->cluster_bits);
    pthread_mutex_lock(&q->alloc);
    for (size_t i = 0; i < dead.count; i++)
        undo_run(q, dead.run[i], NULL);
    pthread_mutex_unlock(&q->alloc);
    free(dead.run);
}

void settle(struct qcow2 *q)
{
    if (!atomic_load_explicit(&q->any_waiting, memory_order_relaxed) || pthread_mutex_trylock(&q->settling))
        return;
    for (;;) {
        pthread_mutex_lock(&q->lock);
        struct freed *freed = q->waiting;
        pthread_mutex_unlock(&q->lock);
        if (!freed || !epoch_passed(&q->epoch, freed->ticket))
            break;
        settle_one(q, freed);
        if (freed->runs.count)
            break;                              /* a table could not be read: later, perhaps */
        pthread_mutex_lock(&q->lock);
        q->waiting = freed->next;
        atomic_store(&q->any_waiting, q->waiting != NULL);
        pthread_mutex_unlock(&q->lock);
        freed->next = NULL;
        freed_destroy(freed);
    }
    pthread_mutex_unlock(&q->settling);
}

/* ---- room for compressed clusters ---- */

#define AREA_BYTES (UINT64_C(1) << 20)

/* Give back what no compressed cluster was put in. Under `alloc`. */
void alloc_close_area(struct qcow2 *q)
{
    struct area *a = &q->area;
    uint64_t end = a->end >> q->cluster_bits;
    if (a->touched < end)
        undo_run(q, (struct run){ a->touched, end - a->touched }, NULL);
    a->position = a->end = a->touched = 0;
}

static int open_area(struct qcow2 *q, uint64_t count, fl_error *error)
{
    struct run run;
    bool fresh;
    uint64_t want = clusters_for(q, MAX(count, AREA_BYTES));
    alloc_close_area(q);
    int rc = take(q, want, &run, &fresh, error);
    if (rc == 0 && run.count << q->cluster_bits < count) {      /* too few in a row: compressed clusters span two of these at most, if they are not tiny */
        undo_run(q, run, NULL);
        rc = take_in_a_row(q, want, &run, error);
    }
    if (rc == 0)
        q->area = (struct area){ run.first << q->cluster_bits, (run.first + run.count) << q->cluster_bits, run.first };
    return rc;
}

/* Where the area ends at the tail, it goes on there: compressed clusters then lie without gaps. */
static void extend_area(struct qcow2 *q, uint64_t count)
{
    struct area *a = &q->area;
    struct run more;
    if (a->position == a->end || a->end >> q->cluster_bits != atomic_load(&q->tail) ||
        take_at_tail(q, clusters_for(q, MAX(count, AREA_BYTES)), &more, NULL) < 0)
        return;
    if (more.first == a->end >> q->cluster_bits)
        a->end += more.count << q->cluster_bits;
    else
        undo_run(q, more, NULL);
}

/* One more reference to each cluster from `first` to `last` that is not the area's own; `sign`: or one less. -ERANGE: one has as many as there can be. */
static int count_touched(struct qcow2 *q, uint64_t first, uint64_t last, int sign, fl_error *error)
{
    for (uint64_t cluster = first; cluster <= last; cluster++) {
        struct slice *slice = NULL;
        int rc = slice_for(q, cluster, &slice, error);
        uint64_t n = rc == 0 && slice ? load_count(slice, q->refcount_order, in_region(q, cluster)) : 0;
        if (rc == 0 && (!slice || (sign > 0 ? n >= q->refcount_max : n == 0)))
            rc = -ERANGE;
        if (rc == 0)
            set_counts(q, slice, cluster, 1, n + (uint64_t)(int64_t)sign);
        if (rc == 0 && sign < 0 && n == 1)
            note_free(q, cluster);
        if (slice)
            cache_put(q, slice);
        if (rc < 0) {
            if (cluster > first && sign > 0)
                count_touched(q, first, cluster - 1, -sign, NULL);
            return rc;
        }
    }
    return 0;
}

int alloc_bytes(struct qcow2 *q, uint64_t count, uint64_t *offset, fl_error *error)
{
    struct area *a = &q->area;
    int rc = -ERANGE;
    pthread_mutex_lock(&q->alloc);
    for (int tries = 0; tries < 3 && rc == -ERANGE; tries++) {
        uint64_t end = align_up(a->position + count, 512);
        if (end > a->end)
            extend_area(q, count);
        if (a->position == a->end || end > a->end) {
            if ((rc = open_area(q, count, error)) < 0)
                break;
            end = align_up(a->position + count, 512);
        }
        uint64_t first = a->position >> q->cluster_bits, last = (end - 1) >> q->cluster_bits;
        rc = first < a->touched ? count_touched(q, first, MIN(last, a->touched - 1), 1, error) : 0;
        if (rc == 0) {
            a->touched = MAX(a->touched, last + 1);
            *offset = a->position;
            a->position += count;
        } else if (rc == -ERANGE) {             /* this cluster has as many as it can: the next one */
            a->position = MIN(align_up(a->position + 1, q->cluster_size), a->end);
        }
    }
    pthread_mutex_unlock(&q->alloc);
    return rc == -ERANGE ? fail(error, EIO, FL_SIDE_NONE, 0, 0, "image '%s' has no room for a compressed cluster", q->image.name) : rc;
}

void alloc_undo_bytes(struct qcow2 *q, uint64_t offset, uint64_t count)
{
    uint64_t first = offset >> q->cluster_bits, last = (align_up(offset + count, 512) - 1) >> q->cluster_bits;
    pthread_mutex_lock(&q->alloc);
    for (uint64_t cluster = first; cluster <= last; cluster++)
        keep_out_of_area(q, cluster);
    count_touched(q, first, last, -1, NULL);
    pthread_mutex_unlock(&q->alloc);
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
            int rc = slice_for(q, base, &slice, error);
            if (rc < 0)
                return rc;
            uint64_t i = UINT64_C(1) << q->region_bits;
            while (i > 0 && load_count(slice, q->refcount_order, i - 1) == 0)
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
