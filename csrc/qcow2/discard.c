/* discard.c: zero and discard. Both take clusters out of the map; they differ in what they do with parts of clusters, which a zeroing writes and a
 * discard leaves alone.
 *
 * A transfer that looked a cluster up before it was taken out of the map may still write to it: that is as if it had been written before. The
 * cluster is used for something else only when all such transfers have ended (Q3), so nobody else is hurt; and since the map says "zeros" by then
 * already, what extents call FL_ZERO goes on reading as zeros.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "driver.h"

/* The part of an unallocated run that reads as zeros without a zero flag: from `offset` on up to `length` bytes. *zeros says which of the two the
   part is that is returned. */
static int backing_zeros(struct qcow2 *q, uint64_t offset, uint64_t *length, bool *zeros, fl_error *error)
{
    fl_extent extent;
    size_t found;
    *zeros = true;
    if (!q->backing || offset >= q->backing->size)
        return 0;
    *length = MIN(*length, q->backing->size - offset);
    int rc = image_extents(q->backing, offset, *length, &extent, 1, &found, error);
    if (rc == 0) {
        *zeros = extent.kind == FL_ZERO;
        *length = extent.length;
    }
    return rc;
}

/* Does a whole cluster that has no entry read as zeros? */
static int cluster_reads_zero(struct qcow2 *q, uint64_t cluster, bool *zeros, fl_error *error)
{
    uint64_t offset = cluster << q->cluster_bits, length = MIN(q->cluster_size, q->image.size - offset), wanted = length;
    int rc = backing_zeros(q, offset, &length, zeros, error);
    if (rc == 0 && *zeros && length < wanted && q->backing && offset + length < q->backing->size)
        *zeros = false;
    return rc;
}

/* What becomes of a cluster's entry; `entry` itself when it reads as zeros and has nothing to give back. */
static int emptied(struct qcow2 *q, uint64_t cluster, uint64_t entry, uint64_t *new, fl_error *error)
{
    struct place place;
    bool zeros = false;
    int rc = map_place(q, cluster << q->cluster_bits, entry, true, &place, error);
    if (rc == 0 && place.state == UNALLOCATED)
        rc = cluster_reads_zero(q, cluster, &zeros, error);
    if (rc < 0)
        return rc;
    *new = zeros ? entry : q->has_zero_flag ? ENTRY_ZERO : 0;
    return 0;
}

/* Empty up to `count` whole clusters, all in one slice. */
static int empty_clusters(struct qcow2 *q, uint64_t first, uint64_t count, fl_error *error)
{
    uint64_t *old = malloc(2 * count * sizeof *old), *new = old + count;
    struct claim claim;
    bool ours, changes = false;
    if (!old)
        return fail(error, ENOMEM, FL_SIDE_NONE, first << q->cluster_bits, count << q->cluster_bits, "no memory for a change of image '%s'",
                    q->image.name);
    claim_take(q, &claim, first, count);
    int rc = map_entries(q, first, count, old, &ours, error);
    for (uint64_t i = 0; i < count && rc == 0; i++) {
        rc = emptied(q, first + i, old[i], &new[i], error);
        changes |= rc == 0 && new[i] != old[i];
    }
    if (rc == 0 && changes)
        rc = map_change(q, first, count, old, new, error);
    claim_release(q, &claim);
    free(old);
    return rc;
}

/* Empty the whole clusters of a range, in steps; what is not allocated anywhere is passed over. */
static int empty_range(struct qcow2 *q, uint64_t offset, uint64_t end, fl_error *error)
{
    int rc = 0;
    while (rc == 0 && offset < end) {
        struct place place;
        bool zeros = false;
        unsigned pass = epoch_enter(&q->epoch);
        rc = map_look(q, offset, end - offset, &place, error);
        epoch_leave(&q->epoch, pass);
        if (rc == 0 && place.state == UNALLOCATED)
            rc = backing_zeros(q, offset, &place.length, &zeros, error);
        if (rc < 0)
            break;
        uint64_t cluster = offset >> q->cluster_bits, whole = align_down(place.length, q->cluster_size);
        if (offset + place.length == end)
            whole = place.length;
        if (zeros && whole > 0) {
            offset += whole;
            continue;
        }
        if ((rc = commit_if_due(q, error)) < 0)
            break;
        uint64_t count = MIN(clusters_for(q, end - offset), MIN(map_left_in_slice(q, cluster), BATCH));
        rc = empty_clusters(q, cluster, count, error);
        offset += count << q->cluster_bits;
    }
    return rc;
}

/* The whole clusters of a range; the last one of the disk counts as whole. false: there are none. */
static bool whole_clusters(const struct qcow2 *q, uint64_t count, uint64_t offset, uint64_t *first, uint64_t *end)
{
    *first = align_up(offset, q->cluster_size);
    *end = offset + count == q->image.size ? offset + count : align_down(offset + count, q->cluster_size);
    return *first < *end;
}

/* In version 2 an entry can't say "zeros" over a backing file. */
static bool can_empty(const struct qcow2 *q) { return q->has_zero_flag || !q->backing; }

int qcow2_zero(fl_image *image, uint64_t count, uint64_t offset, fl_error *error)
{
    struct qcow2 *q = qcow2_of(image);
    const uint64_t limit = offset + count;
    uint64_t first, end;
    int rc = qcow2_prepare(q, error);
    if (rc < 0)
        return rc;
    if (!can_empty(q) || !whole_clusters(q, count, offset, &first, &end))
        return write_zeros(q, count, offset, error);
    if (offset < first)
        rc = write_zeros(q, first - offset, offset, error);
    if (rc == 0)
        rc = empty_range(q, first, end, error);
    if (rc == 0 && end < limit)
        rc = write_zeros(q, limit - end, end, error);
    settle(q);
    return rc;
}

int qcow2_discard(fl_image *image, uint64_t count, uint64_t offset, fl_error *error)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t first, end;
    int rc = qcow2_prepare(q, error);
    if (rc < 0 || !whole_clusters(q, count, offset, &first, &end))
        return rc;
    if (!can_empty(q))
        return fail(error, EOPNOTSUPP, FL_SIDE_NONE, offset, count, "cannot discard %llu bytes at %llu of image '%s': version 2 of qcow2 has nothing "
                    "that would hide what its backing file has there", (unsigned long long)count, (unsigned long long)offset, image->name);
    rc = empty_range(q, first, end, error);
    settle(q);
    return rc;
}
