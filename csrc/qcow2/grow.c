/* grow.c: a larger disk. Nobody else uses the image meanwhile; a crash leaves the old size or the new one.
 *
 * A larger L1 table is a copy in another place. Its refcounts are made durable, then the table, then the header that points at it; the old one is
 * freed as everything is, by a later commit.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <stdlib.h>

#include "driver.h"

static int no_memory(struct qcow2 *q, fl_error *error)
{
    return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a larger L1 table of image '%s'", q->image.name);
}

static int write_header(struct qcow2 *q, const struct header *header, fl_error *error)
{
    int rc = header_write(&q->io, header, error);
    return rc == 0 ? io_flush(&q->io, error) : rc;
}

static int must_commit(struct qcow2 *q, fl_error *error)
{
    pthread_mutex_lock(&q->lock);
    q->must_commit = true;
    pthread_mutex_unlock(&q->lock);
    return commit(q, error);
}

/* Move the table, and take the larger one into use. Everything is committed. */
static int move_l1(struct qcow2 *q, uint64_t entries, fl_error *error)
{
    uint64_t clusters = clusters_for(q, entries * 8), bytes = clusters << q->cluster_bits;
    uint64_t *table = calloc(1, bytes);
    _Atomic uint64_t *l1 = calloc(entries, sizeof *l1);
    struct header header = q->header;
    struct bitmap dirty = { 0 };
    struct run run = { 0, 0 };
    int rc = table && l1 && bitmap_init(&dirty, entries) == 0 ? 0 : no_memory(q, error);
    if (rc == 0)
        rc = alloc_in_a_row(q, clusters, &run, error);
    if (rc == 0)
        rc = must_commit(q, error);
    if (rc < 0)
        goto out;
    for (uint32_t i = 0; i < q->header.l1_size; i++) {
        atomic_init(&l1[i], atomic_load(&q->l1[i]));
        table[i] = htobe64(atomic_load(&q->l1[i]));
    }
    header.l1_offset = run.first << q->cluster_bits;
    header.l1_size = (uint32_t)entries;
    header.reftable_offset = q->header.reftable_offset;         /* the allocation may have moved it */
    header.reftable_clusters = q->header.reftable_clusters;
    rc = io_write_metadata(&q->io, table, bytes, header.l1_offset, error);
    if (rc == 0)
        rc = io_flush(&q->io, error);
    if (rc == 0)
        rc = write_header(q, &header, error);
    if (rc < 0) {
        qcow2_break(q, error);                  /* the header may or may not point at it */
        run.count = 0;
        goto out;
    }
    pthread_mutex_lock(&q->lock);
    if (q->header.l1_size && freed_reserve(q, 1) == 0) {        /* no memory: the old one leaks */
        freed_add(q, q->header.l1_offset >> q->cluster_bits, clusters_for(q, (uint64_t)q->header.l1_size * 8));
        q->must_commit = true;
    }
    q->header = header;
    _Atomic uint64_t *old = q->l1;
    struct bitmap old_dirty = q->l1_dirty;
    q->l1 = l1;
    q->l1_dirty = dirty;
    tables_moved(q);
    pthread_mutex_unlock(&q->lock);
    l1 = old;
    dirty = old_dirty;
    run.count = 0;
out:
    if (run.count)
        alloc_undo(q, run);
    bitmap_destroy(&dirty);
    free((void *)l1);
    free(table);
    return rc;
}

/* What the file, or the backing file, has behind the old end must not come to light. */
static int zero_new(struct qcow2 *q, uint64_t from, uint64_t size, fl_error *error)
{
    uint64_t end = MIN(size, align_up(from, q->cluster_size));
    if (q->backing)
        end = MAX(end, MIN(size, q->backing->size));
    return from < end ? qcow2_zero(&q->image, end - from, from, error) : 0;
}

int qcow2_grow(fl_image *image, uint64_t size, fl_error *error)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t entries, old_size = image->size;
    fl_error why;
    if (!error)
        error = &why;
    if (size > (uint64_t)INT64_MAX - 512)
        return fail(error, EFBIG, FL_SIDE_NONE, 0, 0, "image '%s' cannot grow to %llu bytes", image->name, (unsigned long long)size);
    if (size & 511)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "image '%s' cannot grow to %llu bytes: a qcow2 image has whole sectors of 512", image->name,
                    (unsigned long long)size);
    if (size == old_size)
        return 0;
    entries = div_up(size, q->cluster_size << q->l2_bits);
    if (entries > MAX_L1_BYTES / 8)
        return fail(error, EFBIG, FL_SIDE_NONE, 0, 0, "image '%s' cannot grow to %llu bytes: with its clusters of %llu, %llu are the most", image->name,
                    (unsigned long long)size, (unsigned long long)q->cluster_size,
                    (unsigned long long)((MAX_L1_BYTES / 8 * q->cluster_size) << q->l2_bits));
    if (q->header.snapshot_count && q->header.version < 3)
        return fail(error, EOPNOTSUPP, FL_SIDE_NONE, 0, 0, "image '%s' cannot grow: its snapshots do not say how large the disk was (version 2)",
                    image->name);
    int rc = qcow2_prepare(q, error);
    if (rc == 0)
        rc = commit(q, error);
    if (rc == 0 && entries > q->header.l1_size)
        rc = move_l1(q, entries, error);
    if (rc < 0)
        return rc;
    image->size = size;
    rc = zero_new(q, old_size, size, error);
    if (rc == 0)
        rc = must_commit(q, error);
    if (rc == 0) {
        pthread_mutex_lock(&q->lock);
        q->header.size = size;
        struct header header = q->header;
        pthread_mutex_unlock(&q->lock);
        rc = write_header(q, &header, error);
        if (rc < 0)
            q->header.size = old_size;
    }
    if (rc < 0)
        image->size = old_size;
    return rc;
}
