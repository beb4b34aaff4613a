/* backup_cursor.c: what to do next.
 *
 * The cursor goes through the snapshot once, by the extents that it fetches in batches. A batch may be old when it is used, which does no
 * harm: the bytes at the cut never change, so what was zero stays zero; what was data may be lost or discarded by now, which whoever reads
 * it is told. Runs of any length without data are one piece of work, data is cut at granules, and so is what a granule has of both.
 *
 * Hot granules are taken out of order, so the cursor meets them again, later, as data (in an old batch) or as discarded (by this job). They
 * are marked in the bitmap `hot` when they are taken and passed over here, so nothing is copied twice or taken for somebody else's
 * discard. What is taken is marked or behind the cursor, both under the job's lock: two workers never have the same granule.
 */
#define _GNU_SOURCE
#include "backup.h"

#define FIRST_WINDOW (UINT64_C(1) << 30)

static uint64_t granule_start(const fl_backup *job, uint64_t offset) { return offset - offset % job->granularity; }

static uint64_t granule_end(const fl_backup *job, uint64_t offset)
{
    uint64_t start = granule_start(job, offset);
    return job->size - start > job->granularity ? start + job->granularity : job->size;
}

/* Ask for extents from `position` on: all that matters is near it, but for long runs it pays to look far. So it asks for a window, and for
   a larger one while all of it is one run; asking for the rest of a huge disk at once would cost a scan of its bitmaps each time. */
static int ask(fl_backup *job, uint64_t position, size_t *found, fl_error *error)
{
    fl_extent *batch = job->cursor.batch;
    uint64_t rest = job->size - position;
    for (uint64_t window = MIN(rest, MAX(FIRST_WINDOW, job->granularity)); ; window = rest / 16 < window ? rest : window * 16) {
        int rc = fl_snapshot_extents(job->snapshot, position, window, batch, CURSOR_BATCH, found, error);
        if (rc)
            return rc;
        if (*found == 0)
            return fail(error, EIO, FL_SIDE_NONE, position, window, "the snapshot gave no extents");
        bool cut = window < rest && batch[*found - 1].offset + batch[*found - 1].length == position + window;
        if (!cut)
            return 0;
        if (*found > 1) {
            (*found)--;         /* it may go on beyond the window: the next batch begins with it */
            return 0;
        }
    }
}

/* Fetch the extents from the cursor's position on. 0, or a failure that is recorded. Lock held, but not meanwhile. */
static int fetch(fl_backup *job)
{
    struct cursor *cursor = &job->cursor;
    fl_error error = { 0 };
    size_t found = 0;
    cursor->fetching = true;
    uint64_t position = cursor->position;       /* stays: nobody takes anything without extents, except hot granules */
    pthread_mutex_unlock(&job->lock);
    int rc = ask(job, position, &found, &error);
    pthread_mutex_lock(&job->lock);
    cursor->fetching = false;
    cursor->index = 0;
    cursor->found = rc == 0 ? found : 0;
    if (rc)
        job_fail(job, rc, &error);
    pthread_cond_broadcast(&job->fetched);
    return rc;
}

/* Pass over granules at the cursor that were taken out of order. Lock held. */
static void pass_over_hot(fl_backup *job)
{
    while (job->hot_count && job->cursor.position < job->size &&
           bitmap_test(&job->hot, job->cursor.position / job->granularity)) {
        job->cursor.position = granule_end(job, job->cursor.position);
        job->hot_count--;
    }
}

bool cursor_look(fl_backup *job, struct work *work)
{
    struct cursor *cursor = &job->cursor;
    for (;;) {
        if (job->failed)
            return false;
        if (cursor->fetching) {
            pthread_cond_wait(&job->fetched, &job->lock);
            continue;
        }
        pass_over_hot(job);
        if (cursor->position == job->size)
            return false;
        const fl_extent *extent = &cursor->batch[cursor->index];
        if (cursor->index == cursor->found) {
            if (fetch(job))
                return false;
            continue;
        }
        if (extent->offset + extent->length <= cursor->position) {
            cursor->index++;
            continue;
        }
        uint64_t end = granule_end(job, cursor->position), extent_end = MIN(extent->offset + extent->length, job->size);
        if (extent_end < end) {
            work->kind = WORK_MIXED;
        } else {
            work->kind = extent->kind;
            if (extent->kind != FL_DATA || job_clones(job)) {
                end = extent_end == job->size ? extent_end : granule_start(job, extent_end);
                if (extent->kind == FL_DATA)
                    end = MIN(end, cursor->position + MAX(granule_start(job, LARGEST_CLONE), job->granularity));
                if (job->hot_count) {           /* up to the next granule that was taken out of order */
                    uint64_t hot = bitmap_next_set(&job->hot, cursor->position / job->granularity, div_up(end, job->granularity));
                    end = MIN(end, hot * job->granularity);
                }
            }
        }
        work->offset = cursor->position;
        work->length = end - cursor->position;
        return true;
    }
}

void cursor_take(fl_backup *job, const struct work *work)
{
    job->cursor.position = work->offset + work->length;
}

bool cursor_take_hot(fl_backup *job, uint64_t offset, struct work *work)
{
    if (offset >= job->size || offset < job->cursor.position)
        return false;
    uint64_t granule = offset / job->granularity;
    if (bitmap_test(&job->hot, granule))
        return false;
    bitmap_set(&job->hot, granule, 1);
    job->hot_count++;
    work->offset = granule_start(job, offset);
    work->length = granule_end(job, offset) - work->offset;
    work->kind = WORK_MIXED;
    return true;
}
