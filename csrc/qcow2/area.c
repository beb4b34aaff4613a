/* area.c: room for compressed clusters, which are packed one behind the other into clusters of the file. Each of those has one reference for every
 * compressed cluster that touches it. The area is a row of clusters that were allocated for that; each has one reference by that, which passes
 * to the first compressed cluster in it.
 */
#define _GNU_SOURCE
#include "allocate.h"

#define AREA_BYTES (UINT64_C(1) << 20)

/* Compressed clusters may still be added to a cluster of the area, which would then have an owner again. So there is no area any more. */
void area_keep_out(struct qcow2 *q, uint64_t cluster)
{
    if (q->area.position < q->area.end && cluster >= q->area.position >> q->cluster_bits && cluster < q->area.end >> q->cluster_bits)
        area_close(q);
}

/* Give back what no compressed cluster was put in. Under `alloc`. */
void area_close(struct qcow2 *q)
{
    struct area *a = &q->area;
    uint64_t end = a->end >> q->cluster_bits;
    if (a->touched < end)
        take_back(q, (struct run){ a->touched, end - a->touched }, NULL);
    a->position = a->end = a->touched = 0;
}

static int open_area(struct qcow2 *q, uint64_t count, fl_error *error)
{
    struct run run;
    bool fresh;
    uint64_t want = clusters_for(q, MAX(count, AREA_BYTES));
    area_close(q);
    int rc = take_clusters(q, want, &run, &fresh, error);
    if (rc == 0 && run.count << q->cluster_bits < count) {      /* too few in a row for this one */
        take_back(q, run, NULL);
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
        take_back(q, more, NULL);
}

/* One more reference to each cluster from `first` to `last` that is not the area's own; `sign`: or one less. -ERANGE: one has as many as there can be. */
static int count_touched(struct qcow2 *q, uint64_t first, uint64_t last, int sign, fl_error *error)
{
    for (uint64_t cluster = first; cluster <= last; cluster++) {
        struct slice *slice = NULL;
        int rc = count_slice(q, cluster, &slice, error);
        uint64_t n = rc == 0 && slice ? count_load(slice, q->refcount_order, in_region(q, cluster)) : 0;
        if (rc == 0 && (!slice || (sign > 0 ? n >= q->refcount_max : n == 0)))
            rc = -ERANGE;
        if (rc == 0)
            count_set(q, slice, cluster, 1, n + (uint64_t)(int64_t)sign);
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
        area_keep_out(q, cluster);
    count_touched(q, first, last, -1, NULL);
    pthread_mutex_unlock(&q->alloc);
}

void alloc_close_area(struct qcow2 *q)
{
    pthread_mutex_lock(&q->alloc);
    area_close(q);
    pthread_mutex_unlock(&q->alloc);
}
