/* map.c: from an offset of the disk to what is there, and changes of that. Also the claims of those who change it (Q5).
 *
 * Looks are made inside the epoch: a table that was copied elsewhere, and its slices, stay what they were until everybody who may have found them is
 * out. A table whose L1 entry says COPIED is never moved, so who changes entries needs no epoch for it.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <stdlib.h>

#include "driver.h"

typedef unsigned long long ull;

/* ---- claims ---- */

static bool claimed(const struct claims *claims, uint64_t first, uint64_t count)
{
    for (const struct claim *c = claims->list; c; c = c->next)
        if (first < c->first + c->count && c->first < first + count)
            return true;
    return false;
}

/* Waits for others who change the same clusters, and for nobody else: nobody who holds a claim waits for another one. */
void claim_take(struct qcow2 *q, struct claim *claim, uint64_t first, uint64_t count)
{
    struct claims *claims = &q->claims;
    pthread_mutex_lock(&claims->lock);
    while (claimed(claims, first, count)) {
        claims->waiters++;
        pthread_cond_wait(&claims->released, &claims->lock);
        claims->waiters--;
    }
    *claim = (struct claim){ first, count, claims->list };
    claims->list = claim;
    pthread_mutex_unlock(&claims->lock);
}

void claim_release(struct qcow2 *q, struct claim *claim)
{
    struct claims *claims = &q->claims;
    pthread_mutex_lock(&claims->lock);
    struct claim **p = &claims->list;
    while (*p != claim)
        p = &(*p)->next;
    *p = claim->next;
    if (claims->waiters)
        pthread_cond_broadcast(&claims->released);
    pthread_mutex_unlock(&claims->lock);
}

/* ---- entries ---- */

static uint64_t load_entry(const struct slice *slice, uint64_t i)
{
    return be64toh(atomic_load_explicit(&slice->words[i], memory_order_acquire));       /* its data was written before it was stored */
}

/* ---- tables that the header leads to ---- */

/* A place in one word, so that it is read as a whole: the first cluster, below 2^47, and how many follow it, below 2^17 (64 MiB of 512 bytes). */
#define FOLLOW_BITS 17

static uint64_t pack(const struct qcow2 *q, uint64_t offset, uint64_t bytes)
{
    uint64_t clusters = MIN(clusters_for(q, bytes), UINT64_C(1) << FOLLOW_BITS);
    return bytes == 0 || offset > OFFSET_MASK ? 0 : offset >> q->cluster_bits << FOLLOW_BITS | (clusters - 1);
}

void tables_moved(struct qcow2 *q)
{
    const struct header *h = &q->header;
    atomic_store(&q->fixed_tables[0], pack(q, h->l1_offset, h->l1_size * UINT64_C(8)));
    atomic_store(&q->fixed_tables[1], pack(q, h->reftable_offset, (uint64_t)h->reftable_clusters << q->cluster_bits));
    atomic_store(&q->fixed_tables[2], pack(q, h->snapshots_offset, h->snapshot_count * UINT64_C(40)));
}

/* How many of `count` clusters from `first` on come before one of these tables; 0: `first` is in one. */
static uint64_t before_tables(struct qcow2 *q, uint64_t first, uint64_t count)
{
    for (unsigned i = 0; i < 3; i++) {
        uint64_t packed = atomic_load_explicit(&q->fixed_tables[i], memory_order_relaxed);
        uint64_t begin = packed >> FOLLOW_BITS, end = begin + (packed & ((UINT64_C(1) << FOLLOW_BITS) - 1)) + 1;
        if (packed && first < end && begin < first + count)
            count = begin > first ? begin - first : 0;
    }
    return count;
}

/* ---- entries ---- */

int map_place(struct qcow2 *q, uint64_t guest, uint64_t entry, bool table_ours, struct place *place, fl_error *error)
{
    if (entry == 0) {
        place->state = UNALLOCATED;
        return 0;
    }
    uint64_t offset = entry & OFFSET_MASK, tail = atomic_load_explicit(&q->tail, memory_order_relaxed);
    if (entry & ENTRY_COMPRESSED) {
        struct run run = compressed_clusters(q, entry);
        if (run.first == 0 || run.first >= tail)
            return qcow2_corrupt(q, guest, error, "its compressed data is said to be at %llu of the file, %s", (ull)(run.first << q->cluster_bits),
                                 run.first ? "behind its end" : "on the header");
        place->state = COMPRESSED;
        place->host = entry;
        return 0;
    }
    if (entry & L2_RESERVED || (entry & ENTRY_ZERO && !q->has_zero_flag))
        return qcow2_corrupt(q, guest, error, "its entry 0x%llx has reserved bits set", (ull)entry);
    if (offset & q->cluster_mask)
        return qcow2_corrupt(q, guest, error, "its entry 0x%llx does not point at the beginning of a cluster", (ull)entry);
    if (offset && offset >> q->cluster_bits >= tail)
        return qcow2_corrupt(q, guest, error, "its data is said to be at %llu, behind the end of the file", (ull)offset);
    if (entry & ENTRY_ZERO) {
        place->state = ZERO;
    } else if (offset == 0) {
        return qcow2_corrupt(q, guest, error, "its entry 0x%llx points at the header", (ull)entry);
    } else {
        place->state = MAPPED;
        place->ours = table_ours && (entry & ENTRY_COPIED);
        place->host = offset;
        if (UNLIKELY(place->ours && q->image.writable && before_tables(q, offset >> q->cluster_bits, 1) == 0))
            return qcow2_corrupt(q, guest, error, "its data is said to be at %llu of the file, where there is a table", (ull)offset);
    }
    return 0;
}

/* The offset of the L2 table for L1 entry `index`; 0: none. */
static int table_of(struct qcow2 *q, uint64_t index, uint64_t *table, bool *ours, fl_error *error)
{
    uint64_t entry = atomic_load_explicit(&q->l1[index], memory_order_acquire);
    uint64_t offset = entry & OFFSET_MASK;
    if (UNLIKELY(entry & L1_RESERVED || offset & q->cluster_mask || (offset == 0) != (entry == 0) ||
                 (offset && offset >> q->cluster_bits >= atomic_load_explicit(&q->tail, memory_order_relaxed)) ||
                 before_tables(q, offset >> q->cluster_bits, 1) == 0))
        return qcow2_corrupt(q, index << (q->l2_bits + q->cluster_bits), error, "entry %llu of the L1 table is 0x%llx, which is no place for an L2 table",
                             (ull)index, (ull)entry);
    *table = offset;
    *ours = entry & ENTRY_COPIED;
    return 0;
}

static uint64_t slice_offset(const struct qcow2 *q, uint64_t table, uint64_t cluster)
{
    uint64_t in_table = cluster & ((UINT64_C(1) << q->l2_bits) - 1);
    return table + (in_table >> q->slice_bits) * q->cache.slice_size;
}

/* ---- looking ---- */

/* How many of at most `max` entries from `i` on go on like the first one, which is `entry` and was found to be `place`. */
static uint64_t run_length(struct qcow2 *q, const struct slice *slice, uint64_t i, uint64_t max, uint64_t entry, const struct place *place)
{
    uint64_t n = 1, tail = atomic_load_explicit(&q->tail, memory_order_relaxed);
    if (place->state == MAPPED) {
        max = MIN(max, tail - (place->host >> q->cluster_bits));
        while (n < max && load_entry(slice, i + n) == entry + (n << q->cluster_bits))
            n++;
    } else if (place->state != COMPRESSED) {
        uint64_t flag = entry & ENTRY_ZERO;
        while (n < max && (load_entry(slice, i + n) & (ENTRY_ZERO | ENTRY_COMPRESSED)) == flag && (flag || load_entry(slice, i + n) == 0))
            n++;
    }
    return n;
}

int map_look(struct qcow2 *q, uint64_t offset, uint64_t length, struct place *place, fl_error *error)
{
    uint64_t cluster = offset >> q->cluster_bits, within = offset & q->cluster_mask;
    uint64_t wanted = clusters_for(q, within + length), n;
    uint64_t table;
    bool ours;
    place->ours = false;
    int rc = table_of(q, cluster >> q->l2_bits, &table, &ours, error);
    if (rc < 0)
        return rc;
    if (table == 0) {
        uint64_t per_table = UINT64_C(1) << q->l2_bits;
        n = per_table - (cluster & (per_table - 1));
        while (n < wanted && atomic_load_explicit(&q->l1[(cluster + n) >> q->l2_bits], memory_order_relaxed) == 0)
            n += per_table;
        place->state = UNALLOCATED;
    } else {
        uint64_t at = slice_offset(q, table, cluster), i = cluster & ((UINT64_C(1) << q->slice_bits) - 1);
        struct slice *slice = cache_peek(q, SLICE_L2, at);
        bool peeked = slice != NULL;
        if (UNLIKELY(!peeked) && (rc = cache_get(q, SLICE_L2, at, &slice, error)) < 0)
            return rc;
        /* the check may have something to say about it, for which no lock may be held: so the run is counted first, by what the entry seems to be */
        uint64_t entry = load_entry(slice, i);
        struct place seems = { .state = entry & ENTRY_COMPRESSED ? COMPRESSED : entry & ENTRY_ZERO ? ZERO : entry ? MAPPED : UNALLOCATED,
                               .host = entry & OFFSET_MASK };
        bool inside = seems.state != MAPPED || seems.host >> q->cluster_bits < atomic_load_explicit(&q->tail, memory_order_relaxed);
        n = inside ? run_length(q, slice, i, MIN(wanted, map_left_in_slice(q, cluster)), entry, &seems) : 1;
        if (LIKELY(peeked))
            cache_unpeek(q, slice);
        else
            cache_put(q, slice);
        if ((rc = map_place(q, offset - within, entry, ours, place, error)) < 0)
            return rc;
        if (place->state == MAPPED) {
            if (place->ours && q->image.writable) {
                n = MAX(before_tables(q, place->host >> q->cluster_bits, n), 1);        /* map_place has looked at the first one */
                if (UNLIKELY(table >= place->host && table - place->host < n << q->cluster_bits &&
                             (n = (table - place->host) >> q->cluster_bits) == 0))
                    return qcow2_corrupt(q, offset - within, error, "its data is said to be at %llu of the file, where its own L2 table is", (ull)table);
            }
            place->host += within;
        }
    }
    place->length = MIN(n > UINT64_MAX >> q->cluster_bits ? length : (n << q->cluster_bits) - within, length);
    return 0;
}

int map_entries(struct qcow2 *q, uint64_t first, uint64_t count, uint64_t *entries, bool *table_ours, fl_error *error)
{
    uint64_t table, i = first & ((UINT64_C(1) << q->slice_bits) - 1);
    unsigned pass = epoch_enter(&q->epoch);
    struct slice *slice;
    int rc = table_of(q, first >> q->l2_bits, &table, table_ours, error);
    if (rc == 0 && table == 0) {
        memset(entries, 0, count * sizeof *entries);
    } else if (rc == 0 && (rc = cache_get(q, SLICE_L2, slice_offset(q, table, first), &slice, error)) == 0) {
        for (uint64_t n = 0; n < count; n++)
            entries[n] = load_entry(slice, i + n);
        cache_put(q, slice);
    }
    epoch_leave(&q->epoch, pass);
    return rc;
}

/* ---- changing ---- */

void l1_set_dirty(struct qcow2 *q, uint64_t index)
{
    uint64_t bit = UINT64_C(1) << (index & 63);
    if (!(bitmap_fetch_or(&q->l1_dirty, index >> 6, bit) & bit))
        q->l1_dirty_count++;
}

/* A copy of the table at `old`, which others have too and which so nobody changes. */
static int copy_table(struct qcow2 *q, uint64_t offset, uint64_t old, fl_error *error)
{
    int rc = cache_forget(q, offset, error);
    void *buffer = rc == 0 ? malloc(q->cluster_size) : NULL;
    if (rc < 0)
        return rc;
    if (!buffer)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a table of image '%s'", q->image.name);
    rc = io_read_metadata(&q->io, buffer, q->cluster_size, old, error);
    if (rc == 0)
        rc = io_write_metadata(&q->io, buffer, q->cluster_size, offset, error);
    free(buffer);
    return rc;
}

/* The table for L1 entry `index`, which nobody shares: there, or made, or copied. Under `tables`. */
static int make_table(struct qcow2 *q, uint64_t index, uint64_t *table, fl_error *error)
{
    struct run run;
    uint64_t old;
    bool fresh, ours;
    int rc = table_of(q, index, &old, &ours, error);
    if (rc < 0)
        return rc;
    if (ours) {
        *table = old;
        return 0;
    }
    if ((rc = alloc_clusters(q, 1, &run, &fresh, error)) < 0)
        return rc;
    rc = old ? copy_table(q, run.first << q->cluster_bits, old, error) : alloc_clean(q, run.first, fresh, error);
    if (rc == 0) {
        pthread_mutex_lock(&q->lock);
        if (old && freed_reserve(q, 1) < 0) {
            rc = fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a table of image '%s'", q->image.name);
        } else {
            if (old)
                freed_add(q, old >> q->cluster_bits, 1);
            *table = run.first << q->cluster_bits;
            atomic_store(&q->l1[index], *table | ENTRY_COPIED);
            l1_set_dirty(q, index);
            q->must_commit = true;
        }
        pthread_mutex_unlock(&q->lock);
    }
    if (rc < 0)
        alloc_undo(q, run);
    return rc;
}

static int table_to_change(struct qcow2 *q, uint64_t index, uint64_t *table, fl_error *error)
{
    bool ours;
    int rc = table_of(q, index, table, &ours, error);
    if (rc < 0 || LIKELY(ours))
        return rc;
    pthread_mutex_lock(&q->tables);
    rc = make_table(q, index, table, error);
    pthread_mutex_unlock(&q->tables);
    return rc;
}

/* The clusters of the file that an entry has. */
static struct run owned(const struct qcow2 *q, uint64_t entry)
{
    if (entry & ENTRY_COMPRESSED)
        return compressed_clusters(q, entry);
    return (struct run){ (entry & OFFSET_MASK) >> q->cluster_bits, entry & OFFSET_MASK ? 1 : 0 };
}

int map_change(struct qcow2 *q, uint64_t first, uint64_t count, const uint64_t *old, const uint64_t *new, fl_error *error)
{
    uint64_t table, i = first & ((UINT64_C(1) << q->slice_bits) - 1), n = 0;
    struct slice *slice;
    int rc = table_to_change(q, first >> q->l2_bits, &table, error);
    if (rc == 0)
        rc = cache_get(q, SLICE_L2, slice_offset(q, table, first), &slice, error);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&q->lock);
    /* Nobody else changes these: they are claimed. So they are not what they were only if the file has a table in two places. */
    while (n < count && load_entry(slice, i + n) == old[n])
        n++;
    if (n == count && freed_reserve(q, count) < 0)
        rc = -ENOMEM;
    if (n == count && rc == 0) {
        for (n = 0; n < count; n++) {
            struct run run = owned(q, old[n]);
            if (run.count && old[n] != new[n])
                freed_add(q, run.first, run.count);
            /* the data, then the entry: for who looks without a lock */
            atomic_store_explicit(&slice->words[i + n], htobe64(new[n]), memory_order_release);
        }
        cache_dirty(q, slice);
        q->must_commit = true;
    }
    pthread_mutex_unlock(&q->lock);
    cache_put(q, slice);
    if (rc < 0)
        return fail(error, -rc, FL_SIDE_NONE, 0, 0, "no memory for a change of image '%s'", q->image.name);
    if (n < count)
        return qcow2_corrupt(q, (first + n) << q->cluster_bits, error, "its entry changed by itself: an L2 table is used twice");
    return 0;
}
