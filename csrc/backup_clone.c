/* backup_clone.c: parts that the target shares with the source, in place of a copy.
 *
 * What was not saved is still in the source. So where both are files of one file system that lets files share blocks (XFS, btrfs), the target is given
 * the source's blocks, and no byte is moved. To clone is to read, so the snapshot is looked at again afterwards (I3). What was saved, lost or
 * discarded meanwhile may have reached the target with the guest's new bytes: it is zeroed there at once, and then read and written, or left
 * out, as if it had never been cloned. Nobody then has to know what the target held, least of all who leaves out zeros.
 *
 * Holes of the source stay holes: they are not data. Data is not looked at: zeros in it are shared as data.
 *
 * Any failure of a clone just means a copy, which has its own errors. Before the first success it means that the two files can't share at all.
 */
#define _GNU_SOURCE
#include "backup.h"

#define LEAST_CLONE 65536u      /* what is shorter is cheaper to copy, and would tear the files into small extents; a multiple of any clone_unit */

/* Of `length` bytes at `offset`, those that can be cloned as they lie: whole blocks of both file systems, or up to the end of both files. */
static uint64_t whole_blocks(const fl_backup *job, uint64_t offset, uint64_t length)
{
    uint64_t end = offset + length;
    if (offset & (job->clone_unit - 1))
        return 0;
    return end == job->size && end == job->target->size ? length : align_down(length, job->clone_unit);
}

int part_clone(struct worker *worker, uint64_t offset, uint64_t length, uint64_t *cloned, fl_error *error)
{
    fl_backup *job = worker->job;
    uint64_t good = 0;
    *cloned = 0;
    if (!job_clones(job))
        return 0;
    length = whole_blocks(job, offset, snapshot_unsaved(job->snapshot, MIN(length, LARGEST_CLONE), offset));
    if (length == 0 || (length < LEAST_CLONE && offset + length < job->size))
        return 0;
    length = throttle_take(&job->throttle, length, MAX(job->cluster_size, LEAST_CLONE));
    if (must_stop(job))
        return fail(error, FL_ECANCELLED, FL_SIDE_NONE, offset, length, "the backup job ends");
    int rc = snapshot_clone(job->snapshot, job->target, length, offset, &good);
    if (rc == -EOPNOTSUPP || (rc && atomic_load(&job->reflinked_bytes) == 0))
        atomic_store(&job->clones, false);
    if (rc == -EOPNOTSUPP)
        return 0;
    if (good < length && (rc = image_zero(job->target, length - good, offset + good, error)) != 0) {
        error->side = FL_SIDE_TARGET;
        return rc;
    }
    count_up(&job->reflinked_bytes, good);
    count_up(&job->data_bytes, good);
    count_up(&job->done, good);
    *cloned = good;
    return 0;
}

int work_clone(struct worker *worker, const struct work *work, fl_error *error)
{
    fl_backup *job = worker->job;
    uint64_t at = work->offset, end = work->offset + work->length, cloned;
    int rc = 0;
    while (rc == 0 && at < end) {
        rc = part_clone(worker, at, end - at, &cloned, error);
        at += cloned;
        if (rc == 0 && cloned == 0) {
            struct work rest = { at, MIN(job->granularity - at % job->granularity, end - at), WORK_MIXED };
            rc = work_read(worker, &rest, error);
            at += rest.length;
        }
    }
    return rc;
}
