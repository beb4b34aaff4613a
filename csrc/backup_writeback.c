/* backup_writeback.c: the target's writeback, begun while the rest is still copied, and its pages, given back to the page cache.
 *
 * Left alone, the kernel keeps what was written in its page cache for seconds, and most of it is there when the job syncs its target at the end: the disk
 * idles while workers copy, and they are gone while it writes. And as nobody reads a target again soon, its pages take the place of others that somebody
 * does read, and each of its writes has to find new memory. So every WRITEBACK_STEP a thread asks for the writeback of what there is, and every
 * DROP_STEP for the pages that are written already to be given up as well: the next writes get the same memory again. A thread, as that may wait for room
 * in the device's queue, and one at a time, for the job as a whole. It promises nothing: what could not be written is told by the flush at the end, as
 * neither call takes note of errors, and POSIX_FADV_DONTNEED keeps what is dirty.
 */
#define _GNU_SOURCE
#include "backup.h"

#include <fcntl.h>

#define WRITEBACK_STEP (UINT64_C(16) << 20)
#define DROP_STEP (UINT64_C(64) << 20)

static bool due(const fl_backup *job)
{
    return !job->failed && atomic_load_explicit(&job->data_bytes, memory_order_relaxed) - job->writeback_begun >= WRITEBACK_STEP;
}

static void *writeback(void *argument)
{
    fl_backup *job = argument;
    job_step_back();
    pthread_mutex_lock(&job->lock);
    while (due(job) && job->running > 1) {      /* the last one flushes, and needs no writeback */
        uint64_t before = job->writeback_begun, now = atomic_load_explicit(&job->data_bytes, memory_order_relaxed);
        job->writeback_begun = now;
        pthread_mutex_unlock(&job->lock);
        if (now / DROP_STEP > before / DROP_STEP)
            posix_fadvise(image_descriptor(job->target), 0, 0, POSIX_FADV_DONTNEED);    /* begins the writeback, too */
        else
            sync_file_range(image_descriptor(job->target), 0, 0, SYNC_FILE_RANGE_WRITE);
        pthread_mutex_lock(&job->lock);
    }
    job->writeback_runs = false;
    pthread_mutex_unlock(&job->lock);
    job_leave(job);
    return NULL;
}

void writeback_if_due(fl_backup *job)
{
    if (job->writeback_runs || !due(job) || job->target->direct || image_descriptor(job->target) < 0)
        return;
    job->writeback_runs = job_thread(job, writeback, job) == 0;
}
