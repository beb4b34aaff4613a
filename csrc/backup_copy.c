/* backup_copy.c: copy mode: workers that read a piece of work, write it to the target, and discard it from the snapshot.
 *
 * A piece is discarded when it was written, not when it is on stable storage: the target is flushed once, at the end, before success is
 * reported. That is by design: a job is all or nothing, a target whose job failed is no backup, and to flush after every piece would
 * cost more than all the rest.
 *
 * Zeros are looked for in blocks of 4 KiB. A target that reads as zeros is not written there, so that it ends sparse; on others long
 * runs are zeroed, which may free space, and short ones are written along with the data around them. Ranges that are not copied (lost,
 * discarded by others, outside the bitmap) are left alone: the target keeps there what it has.
 *
 * A target that compresses does so in whole clusters of its own. So the parts of a piece of work are put together in the worker's buffer first,
 * zeros included, into runs without gaps; the whole clusters of a run are written compressed, by as many workers at once as there are, and
 * what sticks out at its ends is written as it is.
 */
#define _GNU_SOURCE
#include "backup.h"

#define BLOCK 4096u
#define WORTH_RESERVING (64u << 10)      /* a write as long is faster where its place was found before */
#define QUICK_NS 20000000u      /* a zeroing that took less may be twice as long next time; */
#define SLOW_NS 200000000u      /* one that took more shall be shorter, so that a cancel need not wait for it */
#define MIN_ZERO_STEP (UINT64_C(1) << 20)
#define MAX_ZERO_STEP (UINT64_C(1) << 40)

/* Make a range of the target read as zeros. Some targets take any length at once and others write it all, so the steps follow the time that
   they take. */
static int zero_target(struct worker *worker, uint64_t offset, uint64_t length, fl_error *error)
{
    fl_backup *job = worker->job;
    if (job->target_is_zero)
        return 0;
    while (length) {
        if (must_stop(job))
            return fail(error, FL_ECANCELLED, FL_SIDE_NONE, offset, length, "the backup job ends");
        uint64_t step = MIN(length, worker->zero_step), begin = now_ns();
        int rc = image_zero(job->target, step, offset, error);
        if (rc) {
            error->side = FL_SIDE_TARGET;
            return rc;
        }
        uint64_t took = now_ns() - begin;
        if (took > SLOW_NS)
            worker->zero_step = MAX(worker->zero_step / 2, MIN_ZERO_STEP);
        else if (took < QUICK_NS && step == worker->zero_step)
            worker->zero_step = MIN(worker->zero_step * 2, MAX_ZERO_STEP);
        offset += step;
        length -= step;
    }
    return 0;
}

static int write_target(struct worker *worker, const unsigned char *data, uint64_t offset, uint64_t length, fl_error *error)
{
    fl_backup *job = worker->job;
    /* Not beside a guest that writes: pages of reserved space are clean, and can be given up (backup_writeback.c), later than others; that costs more there. */
    if (length >= WORTH_RESERVING && job->target_is_zero && !worker->pressing)
        image_reserve(job->target, length, offset);
    int rc = length ? image_write(job->target, data, length, offset, error) : 0;
    if (rc)
        error->side = FL_SIDE_TARGET;
    return rc;
}

static void count_part(fl_backup *job, _Atomic uint64_t *kind, uint64_t length)
{
    count_up(kind, length);
    count_up(&job->done, length);
}

/* The length of the run of blocks from `at` on that are all zero or all not, up to `end`. Blocks are aligned on the disk. */
static uint64_t run_length(const unsigned char *data, uint64_t offset, uint64_t at, uint64_t end, bool *zero)
{
    uint64_t from = at;
    *zero = true;
    while (at < end) {
        uint64_t next = MIN(align_down(offset + at, BLOCK) + BLOCK - offset, end);
        bool this_zero = is_zero(data + at, next - at);
        if (at == from)
            *zero = this_zero;
        else if (this_zero != *zero)
            break;
        at = next;
    }
    return at - from;
}

static int copy_data(struct worker *worker, const unsigned char *data, uint64_t offset, uint64_t length, fl_error *error)
{
    fl_backup *job = worker->job;
    const uint64_t worth = job->target_is_zero ? 1 : LONG_ZEROS;        /* zeros that are not written as data */
    uint64_t at = 0, written = 0, run, zeros = 0;
    int rc;
    while (at < length) {
        bool zero;
        run = run_length(data, offset, at, length, &zero);
        if (zero && run >= worth) {
            if ((rc = write_target(worker, data + written, offset + written, at - written, error)) != 0 ||
                (rc = zero_target(worker, offset + at, run, error)) != 0)
                return rc;
            written = at + run;
            zeros += run;
        }
        at += run;
    }
    rc = write_target(worker, data + written, offset + written, length - written, error);
    if (rc)
        return rc;
    count_part(job, &job->zero_bytes, zeros);
    count_part(job, &job->data_bytes, length - zeros);
    return 0;
}

/* One whole cluster of the target, or its short last one. */
static int write_compressed(struct worker *worker, const unsigned char *data, uint64_t offset, uint64_t length, fl_error *error)
{
    fl_backup *job = worker->job;
    bool zero = is_zero(data, length);
    int rc;
    if (must_stop(job))
        return fail(error, FL_ECANCELLED, FL_SIDE_NONE, offset, length, "the backup job ends");
    if (zero)
        rc = zero_target(worker, offset, length, error);
    else if ((rc = image_write_compressed(job->target, data, length, offset, error)) != 0)
        error->side = FL_SIDE_TARGET;
    if (rc == 0)
        count_part(job, zero ? &job->zero_bytes : &job->data_bytes, MIN(length, job->size - offset));
    return rc;
}

/* Write the run that is in the buffer. The granularity is a multiple of the target's clusters, so none of them goes beyond the buffer. */
static int write_run(struct worker *worker, fl_error *error)
{
    fl_backup *job = worker->job;
    const uint64_t cluster = job->target->cluster_size, start = worker->run_start, end = worker->run_end;
    unsigned char *const base = worker->buffer - align_down(start, job->granularity);
    uint64_t first = MIN(align_up(start, cluster), end), last = MAX(align_down(end, cluster), first);
    int rc = 0;
    worker->run_start = worker->run_end = 0;
    if (end == job->size && last < end && end <= job->target->size && align_up(end, cluster) >= job->target->size) {
        memset(base + end, 0, job->target->size - end);         /* the image's last cluster; it is rounded up to sectors */
        last = end;
    }
    if (first > start)
        rc = copy_data(worker, base + start, start, first - start, error);
    for (uint64_t at = first; at < last && rc == 0; at += cluster)
        rc = write_compressed(worker, base + at, at, MIN(cluster, job->target->size - at), error);
    if (rc == 0 && end > last)
        rc = copy_data(worker, base + last, last, end - last, error);
    return rc;
}

int part_copy_end(struct worker *worker, fl_error *error)
{
    return worker->run_start < worker->run_end ? write_run(worker, error) : 0;
}

int part_copy(struct worker *worker, int kind, uint64_t offset, uint64_t length, unsigned char *data, fl_error *error)
{
    fl_backup *job = worker->job;
    int rc;
    if (job->on_piece && (must_stop(job) || job->on_piece(job->piece_context, offset, length, kind == FL_DATA ? data : NULL)))
        return fail(error, FL_ECANCELLED, FL_SIDE_NONE, offset, length, "the backup job ends");
    if (job->compress && data) {
        if (worker->run_end != offset) {
            if ((rc = part_copy_end(worker, error)) != 0)
                return rc;
            worker->run_start = offset;
        }
        if (kind == FL_ZERO)
            memset(data, 0, length);
        worker->run_end = offset + length;
        return 0;
    }
    if (kind == FL_DATA)
        return copy_data(worker, data, offset, length, error);
    rc = zero_target(worker, offset, length, error);
    if (rc == 0)
        count_part(job, &job->zero_bytes, length);
    return rc;
}

void copy_loop(struct worker *worker)
{
    fl_backup *job = worker->job;
    int rc = 0;
    while (rc == 0) {
        struct work work;
        fl_error error = { 0 };
        uint64_t hot;
        /* First what fills the stage: copied now, it is read from memory and released before it must be spilled. */
        worker->pressing = job->discard && snapshot_hot(job->snapshot, &hot);

        pthread_mutex_lock(&job->lock);
        writeback_if_due(job);
        bool any = !job->failed && worker->pressing && cursor_take_hot(job, hot, &work);
        if (!any && (any = cursor_look(job, &work)))
            cursor_take(job, &work);
        pthread_mutex_unlock(&job->lock);
        if (!any)
            return;

        rc = work_needs_buffer(&work) && work.length > job->granularity ? work_clone(worker, &work, &error) : work_read(worker, &work, &error);
        if (rc == 0 && job->discard && (work_needs_buffer(&work) || work.kind == FL_ZERO))
            rc = job_discard(job, work.offset, work.length, &error);
        if (rc) {
            pthread_mutex_lock(&job->lock);
            job_fail(job, rc, &error);
            pthread_mutex_unlock(&job->lock);
        }
    }
}
