/* backup_read.c: reads one piece of work, and says of each part of it what it is.
 *
 * What extents say may be overtaken: a cluster that was data can be lost, or discarded by the snapshot's owner, before it is read. The read
 * then fails with that code, and the extents from there on are asked for again. As a cluster never goes back to being data, this happens
 * at most once a cluster.
 */
#define _GNU_SOURCE
#include "backup.h"

#include <stdlib.h>

#define PARTS 32                /* extents asked for at once, of one granule */

/* Read up to `length` bytes of data at the pace that the speed allows. `got` bytes at the front were read, whatever it returns. */
static int read_data(struct worker *worker, unsigned char *data, uint64_t length, uint64_t offset, uint64_t *got, fl_error *error)
{
    fl_backup *job = worker->job;
    int rc = 0;
    *got = 0;
    while (*got < length) {
        uint64_t piece = throttle_take(&job->throttle, length - *got, job->cluster_size);
        if (must_stop(job))
            return fail(error, FL_ECANCELLED, FL_SIDE_NONE, offset, length, "the backup job ends");
        rc = fl_snapshot_pread(job->snapshot, data + *got, piece, offset + *got, error);
        if (rc)
            return rc;
        *got += piece;
    }
    return 0;
}

/* Count a range that is lost, or was discarded by others, and put it into the list of them: merged with its neighbours, in order. They come
   nearly in order, so it looks from the end. */
static int keep_lost(fl_backup *job, int kind, uint64_t offset, uint64_t length, fl_error *error)
{
    int rc = 0;
    pthread_mutex_lock(&job->lock);
    size_t at = job->lost_count;
    while (at > 0 && job->lost[at - 1].offset > offset)
        at--;
    fl_extent *before = at > 0 ? &job->lost[at - 1] : NULL, *after = at < job->lost_count ? &job->lost[at] : NULL;
    bool joins_before = before && before->kind == kind && before->offset + before->length == offset;
    bool joins_after = after && after->kind == kind && offset + length == after->offset;
    if (joins_before && joins_after) {
        before->length += length + after->length;
        memmove(after, after + 1, (job->lost_count - at - 1) * sizeof *after);
        job->lost_count--;
    } else if (joins_before) {
        before->length += length;
    } else if (joins_after) {
        after->offset = offset;
        after->length += length;
    } else {
        if (job->lost_count == job->lost_room) {
            size_t room = MAX(64, job->lost_room * 2);
            fl_extent *lost = realloc(job->lost, room * sizeof *lost);
            if (!lost) {
                rc = fail(error, ENOMEM, FL_SIDE_NONE, offset, length, "no memory for the list of lost ranges");
                goto out;
            }
            job->lost = lost;
            job->lost_room = room;
        }
        memmove(&job->lost[at + 1], &job->lost[at], (job->lost_count - at) * sizeof *job->lost);
        job->lost[at] = (fl_extent){ .offset = offset, .length = length, .kind = kind };
        job->lost_count++;
    }
    count_up(&job->lost_bytes, length);
    count_up(&job->done, length);
out:
    pthread_mutex_unlock(&job->lock);
    return rc;
}

/* The failure that it is. Reading it fills in the snapshot's own error, which knows more. */
static int fail_lost(fl_backup *job, int kind, uint64_t offset, uint64_t length, fl_error *error)
{
    unsigned char probe[512];
    int rc = fl_snapshot_pread(job->snapshot, probe, MIN(length, sizeof probe), offset, error);
    if (rc != -FL_ELOST && rc != -FL_EDISCARDED)
        return fail(error, kind == FL_LOST ? FL_ELOST : FL_EDISCARDED, FL_SIDE_NONE, offset, length, "a range of the snapshot can't be read any more");
    error->offset = offset;
    error->length = length;
    return rc;
}

/* A range that cannot be read, and what that means. */
static int part_unreadable(fl_backup *job, int kind, uint64_t offset, uint64_t length, fl_error *error)
{
    switch (kind) {
    case FL_OUTSIDE:            /* not part of the backup, nor of `total` */
        return 0;
    case FL_DISCARDED:          /* by others: this job's own discards are never met again. A backup without it must not pass for a whole one */
    case FL_LOST:
        return job->skip_lost ? keep_lost(job, kind, offset, length, error) : fail_lost(job, kind, offset, length, error);
    default:
        return fail(error, EIO, FL_SIDE_NONE, offset, length, "the snapshot gave an extent of unknown kind %d", kind);
    }
}

static int part(struct worker *worker, int kind, uint64_t offset, uint64_t length, unsigned char *data, fl_error *error)
{
    if (kind != FL_DATA && kind != FL_ZERO)
        return part_unreadable(worker->job, kind, offset, length, error);
    if (worker->job->copies)
        return part_copy(worker, kind, offset, length, data, error);
    return part_chunk(worker, kind, offset, length, error);
}

int work_read(struct worker *worker, const struct work *work, fl_error *error)
{
    fl_backup *job = worker->job;
    if (!work_needs_buffer(work))
        return part(worker, work->kind, work->offset, work->length, NULL, error);

    fl_extent extents[PARTS];
    size_t index = 0, found = 0;
    uint64_t at = work->offset, end = work->offset + work->length;
    uint64_t overtaken = 0, clusters = div_up(work->length, job->cluster_size);
    int rc = 0;
    if (work->kind == FL_DATA) {
        extents[0] = (fl_extent){ .offset = work->offset, .length = work->length, .kind = FL_DATA };
        found = 1;
    }
    while (at < end) {
        if (must_stop(job))
            return fail(error, FL_ECANCELLED, FL_SIDE_NONE, at, end - at, "the backup job ends");
        if (index == found) {
            rc = fl_snapshot_extents(job->snapshot, at, end - at, extents, PARTS, &found, error);
            if (rc == 0 && found == 0)
                rc = fail(error, EIO, FL_SIDE_NONE, at, end - at, "the snapshot gave no extents");
            if (rc)
                return rc;
            index = 0;
        }
        const fl_extent *extent = &extents[index++];
        unsigned char *data = worker->buffer + (at - work->offset);
        uint64_t length = MIN(extent->offset + extent->length, end) - at;
        int kind = extent->kind;
        if (kind == FL_DATA && job->reflink) {
            uint64_t cloned;
            if ((rc = part_clone(worker, at, length, &cloned, error)) != 0)
                return rc;
            at += cloned;
            if (cloned && cloned < length)
                index--;        /* goes on in this extent */
            if (cloned)
                continue;
        }
        if (kind == FL_DATA) {
            rc = read_data(worker, data, length, at, &length, error);
            if ((rc == -FL_ELOST || rc == -FL_EDISCARDED) && overtaken++ < clusters) {
                count_up(&job->retries, 1);
                index = found = 0;
            } else if (rc) {
                return rc;
            }
        }
        if (length && (rc = part(worker, kind, at, length, data, error)) != 0)
            return rc;
        at += length;
    }
    return job->copies ? part_copy_end(worker, error) : 0;
}
