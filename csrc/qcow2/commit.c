/* commit.c: the one way by which metadata gets into the file (Q1).
 *
 * Changes are made in the caches, under `lock`. A commit takes copies of all that is dirty in one hold of `lock`, and writes the copies with no lock
 * held; meanwhile changes go on, and are for the next one. So what is written is the state at one instant, in which
 *   - each cluster that an entry points at has its refcount, since that was raised before, and its data was handed to the kernel before (Q2);
 *   - no cluster is counted lower than the durable entries need, since what is taken out of the map keeps its count until after the commit that
 *     made that durable (Q3).
 * The steps, of which a crash may leave any beginning, and in a step (before its sync) any part:
 *   1 refcount blocks; sync.         More may be counted than is used: leaks. The sync is also that of the data, for step 4, and so is never left out.
 *   2 refcount table; sync.          New blocks become known, complete as of 1.
 *   3 the header, if the table moved; sync.   The new table is complete as of 2; the old one keeps its count till a later commit.
 *   4 L2 tables; sync.
 *   5 L1 table; sync.                New L2 tables become known, complete as of 4.
 *   6 what was taken out of the map waits for its last readers: see settle().
 * A step that fails leaves everything dirty, to be written again by the next commit. A sync that fails loses what nobody can write again: the
 * image is broken then.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <limits.h>
#include <stdlib.h>

#include "driver.h"

#define FREED_BYTES (UINT64_C(16) << 20)        /* what may wait to be freed for want of a commit: this, */
#define FREED_SHARE 16u                         /* or this part of the file, if it is more */

struct piece { uint64_t offset; struct slice *slice; char *copy; };
struct number { uint64_t index, value; };       /* of an L1 table or refcount table; the value as in the file */

struct changes {
    struct piece *pieces[2];            /* by kind, in the buffer */
    size_t piece_count[2];
    struct number *l1, *reftable;       /* allocated */
    size_t l1_count, reftable_count;
    uint64_t *table;                    /* all of the refcount table, when it moved */
    size_t table_bytes;
    struct header header;
    struct freed *freed;
};

static int flush(struct qcow2 *q, fl_error *error)
{
    fl_error why = { 0 };
    int rc = io_flush(&q->io, &why);
    if (rc < 0) {
        q->flush_failed = true;
        qcow2_break(q, &why);
        if (error)
            *error = why;
    }
    return rc;
}

/* ---- copies ---- */

static int no_memory(struct qcow2 *q, fl_error *error)
{
    return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory to write the tables of image '%s'", q->image.name);
}

/* Room for `slices` copies: of the commit that runs. */
static int buffer_reserve(struct qcow2 *q, size_t slices)
{
    size_t bytes = slices * (q->cache.slice_size + sizeof(struct piece));
    if (bytes <= q->commit_room)
        return 0;
    void *buffer = malloc(bytes);
    if (!buffer)
        return -ENOMEM;
    free(q->commit_buffer);
    q->commit_buffer = buffer;
    q->commit_room = bytes;
    return 0;
}

static void copy_slices(struct qcow2 *q, struct changes *c)
{
    struct piece *piece = q->commit_buffer;
    char *copy = (char *)(piece + atomic_load(&q->dirty_count));
    for (int kind = 0; kind < 2; kind++) {
        c->pieces[kind] = piece;
        for (struct slice *slice = q->dirty[kind]; slice; slice = slice->next_dirty) {
            *piece++ = (struct piece){ slice->offset, slice, copy };
            memcpy(copy, (const void *)(uintptr_t)slice->words, q->cache.slice_size);
            copy += q->cache.slice_size;
            atomic_store(&slice->flags, SLICE_WRITING); /* in one step: it must not be evicted */
        }
        c->piece_count[kind] = (size_t)(piece - c->pieces[kind]);
        q->dirty[kind] = NULL;
    }
    atomic_store(&q->dirty_count, 0);
}

/* How many entries of the refcount table its place in the file has room for. More may be in memory while it looks for a new one. */
static uint64_t table_room(const struct qcow2 *q) { return (uint64_t)q->header.reftable_clusters << (q->cluster_bits - 3); }

static int copy_tables(struct qcow2 *q, struct changes *c)
{
    uint64_t room = MIN(table_room(q), q->reftable_size), i, n = 0;
    if (q->l1_dirty_count && !(c->l1 = malloc(q->l1_dirty_count * sizeof *c->l1)))
        return -ENOMEM;
    if (q->header_dirty) {
        c->table_bytes = room * 8;
        if (!(c->table = malloc(c->table_bytes)))
            return -ENOMEM;
        for (i = 0; i < room; i++)
            c->table[i] = htobe64(q->reftable[i]);
        bitmap_clear(&q->reftable_dirty, 0, room);
    } else {
        for (i = bitmap_next_set(&q->reftable_dirty, 0, room); i < room; i = bitmap_next_set(&q->reftable_dirty, i + 1, room))
            n++;
        if (n && !(c->reftable = malloc(n * sizeof *c->reftable)))
            return -ENOMEM;
        for (i = bitmap_next_set(&q->reftable_dirty, 0, room); i < room; i = bitmap_next_set(&q->reftable_dirty, i + 1, room)) {
            c->reftable[c->reftable_count++] = (struct number){ i, htobe64(q->reftable[i]) };
            bitmap_clear(&q->reftable_dirty, i, 1);
        }
    }
    for (i = 0; c->l1_count < q->l1_dirty_count; i++) {
        i = bitmap_next_set(&q->l1_dirty, i, q->l1_dirty.bits);
        c->l1[c->l1_count++] = (struct number){ i, htobe64(atomic_load_explicit(&q->l1[i], memory_order_relaxed)) };
        bitmap_clear(&q->l1_dirty, i, 1);
    }
    q->l1_dirty_count = 0;
    c->header = q->header;
    return 0;
}

/* Take what is dirty. 1: there is nothing that a flush is about. */
static int collect(struct qcow2 *q, struct changes *c, bool all, fl_error *error)
{
    int rc = 0;
    for (;;) {
        if (buffer_reserve(q, atomic_load(&q->dirty_count) + 16) < 0)
            return no_memory(q, error);
        pthread_mutex_lock(&q->lock);
        if (atomic_load(&q->dirty_count) * (q->cache.slice_size + sizeof(struct piece)) <= q->commit_room)
            break;
        pthread_mutex_unlock(&q->lock);
    }
    if (!q->must_commit && !(all && atomic_load(&q->dirty_count)))
        rc = 1;
    else if (copy_tables(q, c) < 0)
        rc = no_memory(q, error);
    if (rc == 0) {
        copy_slices(q, c);
        c->freed = q->freed;
        q->freed = NULL;
        atomic_store(&q->freed_bytes, 0);
        q->header_dirty = q->must_commit = false;
    }
    pthread_mutex_unlock(&q->lock);
    return rc;
}

/* It failed: it is dirty as before. */
static void put_back(struct qcow2 *q, struct changes *c)
{
    pthread_mutex_lock(&q->lock);
    for (int kind = 0; kind < 2; kind++)
        for (size_t i = 0; i < c->piece_count[kind]; i++) {
            cache_dirty(q, c->pieces[kind][i].slice);
            atomic_fetch_and(&c->pieces[kind][i].slice->flags, ~(unsigned)SLICE_WRITING);
        }
    for (size_t i = 0; i < c->reftable_count; i++)
        bitmap_fetch_or(&q->reftable_dirty, c->reftable[i].index >> 6, UINT64_C(1) << (c->reftable[i].index & 63));
    for (size_t i = 0; i < c->l1_count; i++)
        l1_set_dirty(q, c->l1[i].index);
    if (c->freed) {
        struct freed **end = &c->freed;
        uint64_t clusters = 0;
        for (; *end; end = &(*end)->next)
            for (size_t i = 0; i < (*end)->runs.count; i++)
                clusters += (*end)->runs.run[i].count;
        *end = q->freed;
        q->freed = c->freed;
        atomic_fetch_add(&q->freed_bytes, clusters << q->cluster_bits);
    }
    q->header_dirty |= c->table != NULL;
    q->must_commit = true;
    pthread_mutex_unlock(&q->lock);
}

/* It is all durable. */
static void done_with(struct qcow2 *q, struct changes *c)
{
    for (int kind = 0; kind < 2; kind++)
        for (size_t i = 0; i < c->piece_count[kind]; i++)
            atomic_fetch_and(&c->pieces[kind][i].slice->flags, ~(unsigned)SLICE_WRITING);      /* the last that we know of the slice */
    if (!c->freed)
        return;
    uint64_t ticket = epoch_ticket(&q->epoch);
    for (struct freed *freed = c->freed; freed; freed = freed->next)
        freed->ticket = ticket;
    pthread_mutex_lock(&q->lock);
    struct freed **end = &q->waiting;
    while (*end)
        end = &(*end)->next;
    *end = c->freed;
    atomic_store(&q->any_waiting, true);
    pthread_mutex_unlock(&q->lock);
}

/* ---- writing ---- */

static int by_offset(const void *a, const void *b)
{
    const struct piece *x = a, *y = b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* Neighbours in one go. */
static int write_pieces(struct qcow2 *q, struct piece *pieces, size_t count, fl_error *error)
{
    struct iovec iov[64];
    int rc = 0;
    qsort(pieces, count, sizeof *pieces, by_offset);
    for (size_t i = 0, n; i < count && rc == 0; i += n) {
        for (n = 0; i + n < count && n < 64 && pieces[i + n].offset == pieces[i].offset + n * q->cache.slice_size; n++)
            iov[n] = (struct iovec){ pieces[i + n].copy, q->cache.slice_size };
        rc = io_writev_metadata(&q->io, iov, (int)n, pieces[i].offset, n * q->cache.slice_size, error);
    }
    return rc;
}

static int write_numbers(struct qcow2 *q, const struct number *numbers, size_t count, uint64_t table, fl_error *error)
{
    uint64_t run[512];
    int rc = 0;
    for (size_t i = 0, n; i < count && rc == 0; i += n) {
        for (n = 0; i + n < count && n < 512 && numbers[i + n].index == numbers[i].index + n; n++)
            run[n] = numbers[i + n].value;
        rc = io_write_metadata(&q->io, run, n * 8, table + numbers[i].index * 8, error);
    }
    return rc;
}

static int write_changes(struct qcow2 *q, struct changes *c, fl_error *error)
{
    int rc = write_pieces(q, c->pieces[SLICE_REFCOUNTS], c->piece_count[SLICE_REFCOUNTS], error);
    if (rc == 0)
        rc = flush(q, error);
    if (rc == 0 && c->table) {
        rc = io_write_metadata(&q->io, c->table, c->table_bytes, c->header.reftable_offset, error);
        if (rc == 0)
            rc = flush(q, error);
        if (rc == 0)
            rc = header_write(&q->io, &c->header, error);
    } else if (rc == 0) {
        rc = write_numbers(q, c->reftable, c->reftable_count, c->header.reftable_offset, error);
    }
    if (rc == 0 && (c->table || c->reftable_count))
        rc = flush(q, error);
    if (rc == 0 && c->piece_count[SLICE_L2]) {
        rc = write_pieces(q, c->pieces[SLICE_L2], c->piece_count[SLICE_L2], error);
        if (rc == 0)
            rc = flush(q, error);
    }
    if (rc == 0 && c->l1_count) {
        rc = write_numbers(q, c->l1, c->l1_count, c->header.l1_offset, error);
        if (rc == 0)
            rc = flush(q, error);
    }
    return rc;
}

/* By one thread at a time. `all`: what no flush is about too. */
static int commit_once(struct qcow2 *q, bool all, fl_error *error)
{
    struct changes c = { 0 };
    if (q->flush_failed)
        return fail(error, EIO, FL_SIDE_NONE, 0, 0, "an earlier flush of image '%s' failed: writes may be lost", q->image.name);
    settle(q);
    int rc = collect(q, &c, all, error);
    if (rc == 1)
        rc = flush(q, error);
    else if (rc == 0) {
        rc = write_changes(q, &c, error);
        if (rc == 0)
            done_with(q, &c);
        else
            put_back(q, &c);
    }
    free(c.l1);
    free(c.reftable);
    free(c.table);
    if (rc == 0)
        settle(q);
    return rc;
}

/* ---- one for all who ask ---- */

/* A commit that begins now has all that the caller did; one that runs already may not. Those who come while one runs share the next. */
static int commit_shared(struct qcow2 *q, bool all, fl_error *error)
{
    pthread_mutex_lock(&q->committing);
    uint64_t wanted = q->commits_begun + 1;
    while (q->commits_ended < wanted) {
        if (q->commit_runs) {
            pthread_cond_wait(&q->committed, &q->committing);
            continue;
        }
        uint64_t number = ++q->commits_begun;
        fl_error why = { 0 };
        q->commit_runs = true;
        pthread_mutex_unlock(&q->committing);
        int rc = commit_once(q, all, &why);
        pthread_mutex_lock(&q->committing);
        q->commit_runs = false;
        q->commits_ended = number;
        q->commit_rc = rc;              /* what a failed one left is in the one after it: the last result counts for all before */
        q->commit_error = why;
        pthread_cond_broadcast(&q->committed);
    }
    int rc = q->commit_rc;
    if (rc < 0 && error)
        *error = q->commit_error;
    pthread_mutex_unlock(&q->committing);
    return rc;
}

int commit(struct qcow2 *q, fl_error *error) { return commit_shared(q, false, error); }

/* Is more than so many quarters of the cache dirty, or more than so many times freed as may wait? */
static bool exceeds(const struct qcow2 *q, unsigned quarters, unsigned times)
{
    uint64_t tail = atomic_load_explicit(&q->tail, memory_order_relaxed) << q->cluster_bits;
    uint64_t freed = atomic_load_explicit(&q->freed_bytes, memory_order_relaxed), may_wait = MAX(FREED_BYTES, tail / FREED_SHARE);
    return atomic_load_explicit(&q->dirty_count, memory_order_relaxed) > q->cache.limit / 4 * quarters || freed > times * may_wait;
}

static bool due(const struct qcow2 *q) { return exceeds(q, 1, 1); }
static bool overdue(const struct qcow2 *q) { return exceeds(q, 2, 4); }

static void *background(void *argument)
{
    struct qcow2 *q = argument;
    int rc;
    do
        rc = commit_shared(q, true, NULL);      /* what fails is dirty as before, and the next flush tells */
    while (rc == 0 && due(q));               /* there may be no other change that would begin another one */
    pthread_mutex_lock(&q->committing);
    q->background = false;
    pthread_cond_broadcast(&q->committed);
    pthread_mutex_unlock(&q->committing);
    return NULL;
}

/* Begin a commit that nobody waits for, if none was begun so. */
static bool begin_in_background(struct qcow2 *q)
{
    pthread_mutex_lock(&q->committing);
    bool begun = q->background;
    if (!begun)
        begun = q->background = thread_start(background, q, "fl-qcow2") == 0;
    pthread_mutex_unlock(&q->committing);
    return begun;
}

/* A guest's write waits for a sync only when the one in the background can't keep up. */
int commit_if_due(struct qcow2 *q, fl_error *error)
{
    if (LIKELY(!due(q)) || (!overdue(q) && begin_in_background(q)))
        return 0;
    return commit_shared(q, true, error);
}

int commit_all(struct qcow2 *q, fl_error *error)
{
    int rc = 0;
    pthread_mutex_lock(&q->committing);
    while (q->background)
        pthread_cond_wait(&q->committed, &q->committing);
    pthread_mutex_unlock(&q->committing);
    alloc_close_area(q);
    for (int i = 0; i < 4 && rc == 0; i++) {
        pthread_mutex_lock(&q->lock);
        bool done = !q->must_commit && !atomic_load(&q->dirty_count) && !q->freed && !q->waiting;
        pthread_mutex_unlock(&q->lock);
        if (done)
            break;
        rc = commit_shared(q, true, error);
    }
    return rc;
}
