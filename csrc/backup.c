/* backup.c: the backup job: start, workers, the first failure, waiting, closing. backup.h has the map of the other files.
 *
 * Life of a job, and who makes each step:
 *
 *   running     fl_backup_start. The first worker starts the second, and so on, while there is work to take
 *   failing     job_fail: the first failure is kept, the workers leave. A cancel is one kind of it
 *   over        job_settle: no worker runs, and it failed, or all is done. The last worker out flushes the target before
 *   closed      fl_backup_close: the public calls are shut out, and once no worker runs the snapshot and the target are let go
 *   gone        the last reference: the caller's, or that of a worker that had hung
 *
 * All workers are detached threads with a reference of their own: close never joins one, so one that hangs in the kernel, on either side,
 * costs a second at most. What its system call works on, buffer, target and snapshot, lives until it comes back.
 */
#define _GNU_SOURCE
#include "backup.h"

#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define DEFAULT_GRANULARITY (UINT64_C(256) << 10)     /* measured: docs/defaults.md */
#define DIRECT_GRANULARITY (UINT64_C(1) << 20)         /* without the page cache each transfer costs its own way through the kernel: half the processor time */
#define HUGE_PAGE (UINT64_C(2) << 20)                  /* arm64 has them as well, with pages of 4 KiB; others fall back to what they have */
#define MAX_GRANULARITY (UINT64_C(1) << 30)
#define DEFAULT_MOST_WORKERS 16
#define MAX_BUFFERS 4096
#define FIRST_ZERO_STEP (UINT64_C(64) << 20)
#define MAX_BLOCK 65536u        /* of a local file system */
#define CLOSE_WAIT_NS 500000000u

/* ---- the object ---- */

static void destroy(fl_backup *job)
{
    if (job->snapshot)
        snapshot_unref(job->snapshot);
    image_unref(job->target);
    chunks_destroy(job);
    bitmap_destroy(&job->hot);
    free(job->lost);
    if (job->mapping)
        munmap(job->mapping, job->memory_size);
    throttle_destroy(&job->throttle);
    pthread_cond_destroy(&job->ended);
    pthread_cond_destroy(&job->news);
    pthread_cond_destroy(&job->room);
    pthread_cond_destroy(&job->fetched);
    pthread_mutex_destroy(&job->lock);
    gate_destroy(&job->gate);
    free(job);
}

static void job_unref(fl_backup *job)
{
    if (atomic_fetch_sub(&job->references, 1) == 1)
        destroy(job);
}

/* Its locks, with one reference. 0 or -errno; on failure nothing is left. */
static int job_new(fl_backup **out)
{
    fl_backup *job = aligned_alloc(CACHE_LINE, align_up(sizeof *job, CACHE_LINE));
    if (!job)
        return -ENOMEM;
    memset(job, 0, sizeof *job);
    atomic_init(&job->references, 1);
    pthread_cond_t *conds[] = { &job->fetched, &job->room, &job->news, &job->ended };
    size_t made = 0;
    int rc = gate_init(&job->gate);
    if (rc)
        goto no_gate;
    rc = -pthread_mutex_init(&job->lock, NULL);
    if (rc)
        goto no_lock;
    rc = throttle_init(&job->throttle, 0);
    if (rc)
        goto no_throttle;
    while (made < sizeof conds / sizeof *conds && (rc = cond_init(conds[made])) == 0)
        made++;
    if (rc)
        goto no_conds;
    *out = job;
    return 0;

no_conds:
    while (made-- > 0)
        pthread_cond_destroy(conds[made]);
    throttle_destroy(&job->throttle);
no_throttle:
    pthread_mutex_destroy(&job->lock);
no_lock:
    gate_destroy(&job->gate);
no_gate:
    free(job);
    return rc;
}

/* ---- ending ---- */

void job_fail(fl_backup *job, int rc, const fl_error *error)
{
    if (!job->failed) {
        job->failed = rc;
        job->failed_ns = now_ns();
        job->failure = *error;
        job->failure.code = rc;
    }
    if (job->copies || job->cancelled)
        atomic_store(&job->stop, true);
    throttle_end(&job->throttle);       /* what is still finished is finished at once */
    pthread_cond_broadcast(&job->fetched);
    pthread_cond_broadcast(&job->room);
    pthread_cond_broadcast(&job->news);
}

void job_settle(fl_backup *job)
{
    if (job->over || job->running)
        return;
    if (!job->copies && !job->failed) {
        chunks_drop_empty(job);
        if (job->chunks.count || job->chunks.pending)
            return;
    }
    job->over = true;
    job->ended_ns = now_ns();
    pthread_cond_broadcast(&job->ended);
}

/* The job ends if it has not ended yet. What failed or succeeded before stays as it is. */
static void cancel(fl_backup *job)
{
    fl_error error = { 0 };
    int rc = fail(&error, FL_ECANCELLED, FL_SIDE_NONE, 0, 0, "the backup was cancelled");
    pthread_mutex_lock(&job->lock);
    if (!job->over) {
        job->cancelled = true;
        job_fail(job, rc, &error);
        job_settle(job);
    }
    pthread_mutex_unlock(&job->lock);
}

int job_discard(fl_backup *job, uint64_t offset, uint64_t length, fl_error *error)
{
    fl_error why = { 0 };
    int rc = snapshot_discard_copied(job->snapshot, length, offset, &why);
    if (rc == -FL_EBROKEN)
        return 0;
    if (rc && error)
        *error = why;
    return rc;
}

/* ---- workers ---- */

#define WORKER_NICE 10

/* Behind the guest, this thread only; its I/O priority follows. Beside a guest of one thread that writes as fast as it can on two processors, the slowest
   thousandth of its writes takes less than half as long. SCHED_IDLE does more there (an eighth), but on a machine that is busy for good it would never
   end, and hold locks and fleecing space meanwhile. */
void job_step_back(void)
{
    struct sched_param none = { 0 };
    sched_setscheduler(0, SCHED_BATCH, &none);
    if (getpriority(PRIO_PROCESS, 0) < WORKER_NICE)     /* Linux: of the calling thread */
        setpriority(PRIO_PROCESS, 0, WORKER_NICE);
}

static void *worker_main(void *argument);

int job_thread(fl_backup *job, void *(*body)(void *), void *argument)
{
    atomic_fetch_add(&job->references, 1);
    job->running++;
    int rc = thread_start(body, argument, "fl-backup");
    if (rc) {
        job->running--;                         /* not the last one, nor is the reference: who asks has its own */
        atomic_fetch_sub(&job->references, 1);
    }
    return rc;
}

/* Start one more, if there may be work for it. One that cannot be started is not missed: those that run do its share. */
static void start_next(fl_backup *job)
{
    pthread_mutex_lock(&job->lock);
    if (!job->failed && job->started < job->planned && job->cursor.position < job->size &&
        job_thread(job, worker_main, &job->workers[job->started]) == 0)
        job->started++;
    pthread_mutex_unlock(&job->lock);
}

/* Give up snapshot and target, which may have to be closed now, if no worker uses them. */
static void let_go(fl_backup *job)
{
    fl_snapshot *snapshot = NULL;
    fl_image *target = NULL;
    pthread_mutex_lock(&job->lock);
    if (!job->running) {
        snapshot = job->snapshot;
        target = job->target;
        job->snapshot = NULL;
        job->target = NULL;
    }
    pthread_mutex_unlock(&job->lock);
    if (snapshot)
        snapshot_unref(snapshot);
    image_unref(target);
}

/* The last one out flushes the target, so that success is reported only for what is on stable storage. */
void job_leave(fl_backup *job)
{
    pthread_mutex_lock(&job->lock);
    if (job->running == 1 && job->copies && !job->failed) {     /* nobody is left who could start another one */
        fl_error error = { 0 };
        pthread_mutex_unlock(&job->lock);
        int rc = image_flush(job->target, &error);
        error.side = FL_SIDE_TARGET;
        pthread_mutex_lock(&job->lock);
        if (rc)
            job_fail(job, rc, &error);
    }
    if (--job->running == 0 && job->copies)
        image_untake(job->target);      /* not before: a worker that had hung must not write into somebody else's work */
    job_settle(job);
    pthread_cond_broadcast(&job->ended);
    pthread_cond_broadcast(&job->news);
    bool closed = job->closed;
    pthread_mutex_unlock(&job->lock);
    if (closed)
        let_go(job);            /* close did not wait for us: nobody else does it before the job is freed */
    job_unref(job);
}

static void *worker_main(void *argument)
{
    struct worker *worker = argument;
    fl_backup *job = worker->job;
    job_step_back();
    start_next(job);
    if (job->copies)
        copy_loop(worker);
    else
        chunk_loop(worker);
    job_leave(job);
    return NULL;
}

/* ---- starting ---- */

/* More than one a processor wait for each other: for the lock of the target's file, and where that is direct, in the device's queue. */
static uint32_t default_workers(void)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    return (uint32_t)MIN(MAX(cpus, 2), DEFAULT_MOST_WORKERS);
}

/* Does any of it go around the page cache? */
static bool is_direct(const fl_backup *job)
{
    return snapshot_is_direct(job->snapshot) || (job->copies && job->target->direct);
}

/* Fill in the job's fixed part from the options. */
static int configure(fl_backup *job, const fl_backup_options *options, uint32_t *buffers, fl_error *error)
{
    job->size = fl_snapshot_size(job->snapshot);
    job->cluster_size = fl_snapshot_cluster_size(job->snapshot);
    job->total = snapshot_total(job->snapshot);
    job->granularity = options->granularity ? options->granularity : MAX(DEFAULT_GRANULARITY, job->cluster_size);
    if (!options->granularity && job->copies && is_direct(job))
        job->granularity = MAX(job->granularity, DIRECT_GRANULARITY);
    if (!options->granularity && job->copies && job->target->ops->write_compressed)
        job->granularity = MAX(job->granularity, job->target->cluster_size);    /* qcow2: whole clusters need no copy-on-write; powers of two */
    job->discard = options->discard;
    job->target_is_zero = options->target_is_zero;
    job->skip_lost = options->skip_lost;
    job->compress = options->compress;
    job->reflink = options->reflink;
    atomic_init(&job->clones, job->reflink);
    job->on_piece = options->on_piece;
    job->piece_context = options->piece_context;
    if (job->granularity % job->cluster_size || job->granularity > MAX_GRANULARITY)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "a granularity of %llu bytes is not a multiple of the cluster size, %u, up to 1 GiB",
                    (unsigned long long)job->granularity, job->cluster_size);
    if (job->reflink && !job->copies)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "only a target that is an image can share blocks with the source");
    if (job->reflink && (job->compress || job->on_piece))
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "blocks that are shared with the source are not read: nobody can compress them or look at them");
    if (job->reflink)
        job->clone_unit = MIN(job->target->cluster_size, MAX_BLOCK);    /* a network's file system tells what it likes to transfer */
    if (job->compress && !job->copies)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "only a target that is an image can be compressed");
    if (job->compress && job->granularity % job->target->cluster_size)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "a granularity of %llu bytes is not a multiple of the target's cluster size, %u, as compression needs",
                    (unsigned long long)job->granularity, job->target->cluster_size);
    if (options->workers > MAX_WORKERS)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "%u workers are too many; the most is %d", options->workers, MAX_WORKERS);

    uint64_t granules = MAX(div_up(job->size, job->granularity), 1);
    uint32_t workers = options->workers ? options->workers : default_workers();
    *buffers = 0;
    if (!job->copies) {
        if (options->buffers == 1 || options->buffers > MAX_BUFFERS)
            return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "%u buffers: there must be 2 to %d", options->buffers, MAX_BUFFERS);
        *buffers = options->buffers ? options->buffers : MAX(2 * workers, 2);
        workers = MIN(workers, *buffers);
    }
    job->planned = (uint32_t)MIN(workers, granules);
    return 0;
}

static int check_target(const fl_backup *job, const fl_image *target, fl_error *error)
{
    if (job->compress && !target->ops->write_compressed)
        return fail(error, EOPNOTSUPP, FL_SIDE_TARGET, 0, 0, "the target %s cannot be compressed: its format, %s, has no compression",
                    target->name, target->ops->format);
    if (!target->writable)
        return fail(error, EROFS, FL_SIDE_TARGET, 0, 0, "the target %s is not open for writing", target->name);
    if (target->size < job->size)
        return fail(error, ENOSPC, FL_SIDE_TARGET, target->size, job->size - target->size,
                    "the target %s has %llu bytes, fewer than the snapshot's %llu",
                    target->name, (unsigned long long)target->size, (unsigned long long)job->size);
    return 0;
}

/* All buffers are one mapping of address space, which becomes memory where it is used. For direct transfers it starts at a huge page, and asks for such: the
   kernel then hands the device a few long pieces of memory and not one for each page, which takes half the processor time and a quarter less time in all. */
static int make_buffers(fl_backup *job, uint32_t buffers)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), size = (job->copies ? job->planned : buffers) * job->granularity;
    bool huge = is_direct(job);
    job->memory_size = huge ? align_up(size, HUGE_PAGE) + HUGE_PAGE : align_up(size, page);
    void *memory = mmap(NULL, job->memory_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return -ENOMEM;
    job->mapping = job->memory = memory;
    if (huge) {
        job->memory += align_up((uintptr_t)memory, HUGE_PAGE) - (uintptr_t)memory;
        madvise(job->memory, align_up(size, HUGE_PAGE), MADV_HUGEPAGE);
    }
    for (uint32_t i = 0; i < MAX_WORKERS; i++) {
        job->workers[i].job = job;
        job->workers[i].zero_step = FIRST_ZERO_STEP;
        if (job->copies && i < job->planned)
            job->workers[i].buffer = job->memory + i * job->granularity;
    }
    return job->copies ? 0 : chunks_init(job, buffers);
}

int fl_backup_start(fl_snapshot *snapshot, fl_image *target, const fl_backup_options *options, fl_backup **out, fl_error *error)
{
    fl_backup *job = NULL;
    uint32_t buffers;
    int rc = fl_snapshot_check(snapshot, error);
    if (rc)
        return rc;
    if (target && (rc = image_take(target, "the target of a backup", error)) != 0) {
        if (error)
            error->side = FL_SIDE_TARGET;
        return rc;
    }
    rc = job_new(&job);
    if (rc) {
        if (target) {
            image_untake(target);
            image_unref(target);
        }
        return fail(error, -rc, FL_SIDE_NONE, 0, 0, "no memory for a backup job");
    }
    job->snapshot = snapshot_ref(snapshot);
    job->target = target;       /* with the reference */
    job->copies = target != NULL;
    rc = configure(job, options, &buffers, error);
    if (rc == 0 && target)
        rc = check_target(job, target, error);
    if (rc)
        goto unref;
    rc = make_buffers(job, buffers);
    if (rc == 0 && job->copies && job->discard)
        rc = bitmap_init(&job->hot, div_up(job->size, job->granularity));
    if (rc) {
        rc = fail(error, -rc, FL_SIDE_NONE, 0, 0, "no memory for the buffers of a backup job");
        goto unref;
    }
    throttle_set(&job->throttle, options->speed);
    job->started_ns = now_ns();

    pthread_mutex_lock(&job->lock);
    job->started = 1;
    rc = job_thread(job, worker_main, &job->workers[0]);
    pthread_mutex_unlock(&job->lock);
    if (rc) {
        rc = fail(error, -rc, FL_SIDE_NONE, 0, 0, "cannot start a thread for the backup");
        goto unref;
    }
    *out = job;
    return 0;
unref:
    if (target)
        image_untake(target);
    job_unref(job);
    return rc;
}

/* ---- looking at it ---- */

#define FAILED_GRACE_NS 500000000u      /* a failure is told when all workers are out, or as much later, if one hangs */

/* Lock held. */
static bool nothing_to_wait_for(const fl_backup *job)
{
    return job->over || (job->failed && now_ns() - job->failed_ns >= FAILED_GRACE_NS);
}

int fl_backup_wait(fl_backup *job, uint64_t timeout, fl_error *error)
{
    int rc = gate_pass(&job->gate, JOB_NAME, error);
    if (rc)
        return rc;
    uint64_t deadline = add_sat(now_ns(), timeout);
    pthread_mutex_lock(&job->lock);
    while (!nothing_to_wait_for(job) && rc == 0) {
        if (job->closing) {
            rc = fail(error, FL_ECLOSED, FL_SIDE_NONE, 0, 0, "the backup job was closed");
        } else if (now_ns() >= deadline) {
            rc = fail(error, FL_ERUNNING, FL_SIDE_NONE, 0, 0, "the backup still runs");
        } else {
            cond_wait_until(&job->ended, &job->lock, slice_end(deadline));
            pthread_mutex_unlock(&job->lock);
            if (interrupted())
                rc = fail(error, FL_EINTERRUPTED, FL_SIDE_NONE, 0, 0, "interrupted while waiting for the backup");
            pthread_mutex_lock(&job->lock);
        }
    }
    if (rc == 0 && job->failed) {
        rc = job->failed;
        if (error)
            *error = job->failure;
    }
    pthread_mutex_unlock(&job->lock);
    gate_leave(&job->gate);
    return rc;
}

int fl_backup_progress(fl_backup *job, fl_progress *progress, fl_error *error)
{
    int rc = gate_pass(&job->gate, JOB_NAME, error);
    if (rc)
        return rc;
    uint64_t fleecing_bytes = 0;
    pthread_mutex_lock(&job->lock);
    fl_snapshot *snapshot = job->snapshot ? snapshot_ref(job->snapshot) : NULL;
    pthread_mutex_unlock(&job->lock);
    if (snapshot) {
        fleecing_bytes = snapshot_fleecing_bytes(snapshot);
        snapshot_unref(snapshot);
    }
    pthread_mutex_lock(&job->lock);
    *progress = (fl_progress){
        .total = job->total, .done = job->done, .data_bytes = job->data_bytes, .zero_bytes = job->zero_bytes,
        .lost_bytes = job->lost_bytes, .reflinked_bytes = job->reflinked_bytes, .retries = job->retries, .finished = job->running == 0,
        .fleecing_bytes = fleecing_bytes,
        .elapsed_ns = (job->over ? job->ended_ns : now_ns()) - job->started_ns,
    };
    pthread_mutex_unlock(&job->lock);
    gate_leave(&job->gate);
    return 0;
}

int fl_backup_lost(fl_backup *job, size_t index, fl_extent *extents, size_t max, size_t *found, fl_error *error)
{
    int rc = gate_pass(&job->gate, JOB_NAME, error);
    if (rc)
        return rc;
    pthread_mutex_lock(&job->lock);
    size_t n = index < job->lost_count ? MIN(max, job->lost_count - index) : 0;
    if (n)
        memcpy(extents, job->lost + index, n * sizeof *extents);
    pthread_mutex_unlock(&job->lock);
    *found = n;
    gate_leave(&job->gate);
    return 0;
}

int fl_backup_set_speed(fl_backup *job, uint64_t speed, fl_error *error)
{
    int rc = gate_pass(&job->gate, JOB_NAME, error);
    if (rc)
        return rc;
    throttle_set(&job->throttle, speed);
    gate_leave(&job->gate);
    return 0;
}

/* ---- the end ---- */

int fl_backup_cancel(fl_backup *job)
{
    int rc = gate_enter(&job->gate);
    if (rc)
        return rc;
    cancel(job);
    gate_leave(&job->gate);
    return 0;
}

int fl_backup_close(fl_backup *job, fl_error *error)
{
    if (job->gate.generation != fl_generation)
        return gate_pass(&job->gate, JOB_NAME, error);      /* says so */
    uint64_t deadline = add_sat(now_ns(), CLOSE_WAIT_NS);
    cancel(job);
    pthread_mutex_lock(&job->lock);
    job->closing = true;        /* before the gate, so that the calls that wait inside leave it */
    pthread_cond_broadcast(&job->ended);
    pthread_cond_broadcast(&job->news);
    pthread_mutex_unlock(&job->lock);
    bool first = gate_shut(&job->gate);         /* only who closes it first waits: a worker that hangs costs a second once */

    pthread_mutex_lock(&job->lock);
    job->closed = true;
    while (first && job->running && now_ns() < deadline)
        cond_wait_until(&job->ended, &job->lock, deadline);
    pthread_mutex_unlock(&job->lock);
    let_go(job);
    return 0;
}

void fl_backup_free(fl_backup *job)
{
    if (!job || fl_backup_close(job, NULL) == -FL_EFORKED)
        return;                 /* in a child: its locks may be held by threads that it does not have */
    job_unref(job);
}
