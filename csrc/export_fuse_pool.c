/* export_fuse_pool.c: the threads that serve a mount.
 *
 * Each reads requests from the device itself, into memory of its own that is laid out so that the data of a write starts at a page: a source with
 * O_DIRECT takes it from there without a copy. Splicing was left out: what is written has to be in memory anyway, and a direct write's pages the kernel
 * copies into the pipe; for 4 KiB the extra system calls of a pipe cost more than the copy; and reads of a raw file out of the page cache, where it saves
 * one of two copies, took as long, since a pipe of the size that anybody may have does not hold 1 MiB and an answer's header. A thread that waits for a request is cancelled there, and nowhere else.
 *
 * How many. From a page cache, one thread answers faster than several, which wake each other up and share the processors with the guest;
 * where requests wait for storage, there can't be enough. And where requests are large, copying is what they wait for, and one that is copied by
 * each processor is best. So there are helpers, one for each processor that has no worker: whoever takes a large request and leaves nobody at the
 * device calls one, and a helper that took a small one goes back to rest.
 * To wake a thread that sleeps takes longer than to serve a small request. So whoever had to wait for less than SOON_NS the last time does not go to sleep for as
 * long, and looks: a guest that writes 4 KiB at a time, one after the other, was served twice as often a second; with 16 at a time, it makes no difference.
 * The pool keeps as many threads able to run as half of the processors: its own
 * thread looks every 2 ms while there is something to do, and when requests wait, nobody is there to take them, and threads are blocked, it adds
 * as many. When some were not needed for a second, half of those end.
 */
#define _GNU_SOURCE
#ifdef FLEECE_FUSE
#include "export_fuse.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TICK_NS 2000000u
#define SHORT_TICKS 2u                  /* that many looks in a row found too few threads able to run: more are added */
#define IDLE_TICKS 500u                 /* that many looks in a row found two threads or more without work: half of them end */
#define AT_ONCE_NS 3000u                /* a request that came sooner had waited for the thread */
#define SOON_NS 100000u                 /* longer than a guest that does one request after the other takes between two of them, being woken for each */
#define REQUEST_HEADER 80               /* bytes before the data of a write: struct fuse_in_header and struct fuse_write_in */
#define REQUEST_SIZE (LARGEST_IO + 4096)        /* libfuse's own figure: its header space and the largest write */
#define MEMORY_SIZE (REQUEST_SIZE + 8192)

_Thread_local struct worker *fuse_worker;

/* ---- a worker ---- */

static bool is_over(fl_mount *mount)
{
    pthread_mutex_lock(&mount->lock);
    bool over = mount->closing || mount->ended;
    pthread_mutex_unlock(&mount->lock);
    return over;
}

/* Take one of the surplus: true for the thread that is to end. */
static bool is_surplus(fl_mount *mount)
{
    unsigned surplus = atomic_load_explicit(&mount->surplus, memory_order_relaxed);
    while (UNLIKELY(surplus))
        if (atomic_compare_exchange_weak(&mount->surplus, &surplus, surplus - 1))
            return true;
    return false;
}

static void wake_pool(fl_mount *mount)
{
    pthread_mutex_lock(&mount->lock);
    pthread_cond_signal(&mount->wake);
    pthread_mutex_unlock(&mount->lock);
}

/* Is it one that takes long because of its bytes? */
static bool is_large(const struct worker *worker, size_t length)
{
    const struct fuse_in_header *header = (const void *)worker->request;
    const struct fuse_read_in *read_in = (const void *)(header + 1);
    return length >= LARGE_IO || (length >= sizeof *header + sizeof *read_in && header->opcode == FUSE_READ && read_in->size >= LARGE_IO);
}

/* Of a helper: until there is something for it, or the end. */
static void rest(fl_mount *mount)
{
    pthread_mutex_lock(&mount->lock);
    atomic_fetch_add(&mount->resting, 1);
    while (!mount->called && !mount->closing && !mount->ended)
        pthread_cond_wait(&mount->helpers, &mount->lock);
    if (mount->called)
        mount->called--;
    else
        atomic_fetch_sub(&mount->resting, 1);
    pthread_mutex_unlock(&mount->lock);
}

static void call_helper(fl_mount *mount)
{
    pthread_mutex_lock(&mount->lock);
    if (atomic_load(&mount->resting)) {
        atomic_fetch_sub(&mount->resting, 1);
        mount->called++;
        pthread_cond_signal(&mount->helpers);
    }
    pthread_mutex_unlock(&mount->lock);
}

static bool requests_wait(const fl_mount *mount)
{
    struct pollfd device = { .fd = mount->fd, .events = POLLIN };
    return poll(&device, 1, 0) == 1 && (device.revents & POLLIN);
}

/* While requests come soon, look for the next one before sleeping; one thread at a time. */
static void look_out(struct worker *worker, uint64_t began)
{
    fl_mount *mount = worker->mount;
    if (!worker->soon || atomic_exchange(&mount->looked_out, true))
        return;
    while (!requests_wait(mount) && now_ns() - began < SOON_NS)
        ;
    atomic_store(&mount->looked_out, false);
}

/* Until the mount ends, or this thread is not needed: then true. */
static bool serve(struct worker *worker)
{
    fl_mount *mount = worker->mount;
    int old;
    if (worker->helper)
        rest(mount);
    while (worker->helper ? !is_over(mount) : !is_surplus(mount)) {
        atomic_fetch_add(&mount->reading, 1);
        uint64_t began = now_ns();
        look_out(worker, began);
        pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, &old);
        ssize_t length = read(mount->fd, worker->request, REQUEST_SIZE);
        int failure = errno;
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &old);
        atomic_fetch_sub(&mount->reading, 1);
        uint64_t took = now_ns() - began;
        worker->soon = took > AT_ONCE_NS && took < SOON_NS;
        if (length < 0 && (failure == EINTR || failure == EAGAIN || failure == ENOENT))      /* ENOENT: the request was taken back */
            continue;
        if (length <= 0)
            return false;       /* ENODEV: unmounted */
        atomic_fetch_add(&mount->served, 1);            /* then the look: pairs with the pool's thread, which says that it sleeps and then looks */
        if (UNLIKELY(atomic_load(&mount->pool_sleeps)))
            wake_pool(mount);
        bool large = is_large(worker, (size_t)length);
        if (large && !atomic_load(&mount->reading) && atomic_load(&mount->resting))
            call_helper(mount);
        struct fuse_buf buffer = { .size = (size_t)length, .mem = worker->request };
        fuse_session_process_buf(mount->session, &buffer);
        if (fuse_session_exited(mount->session))        /* the kernel's version does not suit libfuse */
            return false;
        if (worker->helper && !large)
            rest(mount);
    }
    return true;
}

static void end_thread(fl_mount *mount)
{
    pthread_mutex_lock(&mount->lock);
    mount->threads--;
    pthread_cond_broadcast(&mount->changed);
    pthread_mutex_unlock(&mount->lock);
    mount_unref(mount);
}

static void worker_end(void *argument)
{
    struct worker *worker = argument;
    fl_mount *mount = worker->mount;
    munmap(worker->memory, MEMORY_SIZE);
    pthread_mutex_lock(&mount->lock);
    worker->running = worker->used = false;
    mount->active--;
    pthread_mutex_unlock(&mount->lock);
    end_thread(mount);
}

static void *worker_body(void *argument)
{
    struct worker *worker = argument;
    fl_mount *mount = worker->mount;
    int old;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &old);
    fuse_worker = worker;
    pthread_mutex_lock(&mount->lock);
    worker->thread = pthread_self();
    worker->id = (pid_t)syscall(SYS_gettid);
    worker->running = true;
    pthread_mutex_unlock(&mount->lock);
#ifdef PR_SET_IO_FLUSHER
    /* Memory that we ask for must not wait until dirty pages of a loop device on this mount are written, by us. Needs CAP_SYS_RESOURCE. */
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
#endif
    pthread_cleanup_push(worker_end, worker);
    if (!is_over(mount) && !serve(worker)) {
        pthread_mutex_lock(&mount->lock);
        mount->ended = true;    /* one thread's end is everybody's: the others read the same */
        pthread_cond_broadcast(&mount->changed);
        pthread_cond_broadcast(&mount->wake);
        pthread_cond_broadcast(&mount->helpers);
        pthread_mutex_unlock(&mount->lock);
    }
    pthread_cleanup_pop(1);
    return NULL;
}

/* Count it first: whoever stops the pool waits for it. Under the lock. */
static bool begin_thread(fl_mount *mount, void *(*body)(void *), void *argument)
{
    atomic_fetch_add(&mount->references, 1);
    mount->threads++;
    if (thread_start(body, argument, "fl-fuse") == 0)
        return true;
    mount->threads--;
    atomic_fetch_sub(&mount->references, 1);
    return false;
}

/* Under the lock. false: there are enough, or it does not work now. */
static bool add_worker(fl_mount *mount, bool helper)
{
    unsigned i = 0;
    while (i < mount->most_workers && mount->workers[i].used)
        i++;
    if (i == mount->most_workers)
        return false;
    struct worker *worker = &mount->workers[i];
    char *memory = mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return false;
    *worker = (struct worker){ .mount = mount, .memory = memory, .payload = memory + 4096, .request = memory + 4096 - REQUEST_HEADER,
                                .helper = helper, .used = true };
    if (!begin_thread(mount, worker_body, worker)) {
        munmap(memory, MEMORY_SIZE);
        worker->used = false;
        return false;
    }
    mount->active++;
    return true;
}

/* ---- the pool's own thread ---- */

/* Does the thread wait for something other than a processor? Yes, if nobody tells. */
static bool is_blocked(pid_t thread)
{
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", (int)thread);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    text[MAX(length, 0)] = 0;
    const char *name_end = strrchr(text, ')');
    return !name_end || name_end[2] == 'S' || name_end[2] == 'D';
}

/* Under the lock. */
static unsigned count_blocked(const fl_mount *mount)
{
    unsigned blocked = 0;
    for (unsigned i = 0; i < mount->most_workers; i++)
        blocked += mount->workers[i].running && is_blocked(mount->workers[i].id);
    return blocked;
}

static unsigned processors(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? (unsigned)CPU_COUNT(&set) : 2;
}

/* Threads that serve small requests. */
static unsigned enough_for_small(void) { return MAX(processors() / 2, 1u); }

/* Wait until requests come in. Under the lock. */
static void sleep_until_served(fl_mount *mount, uint64_t served)
{
    atomic_store(&mount->pool_sleeps, true);
    while (!mount->closing && !mount->ended && atomic_load(&mount->served) == served)
        pthread_cond_wait(&mount->wake, &mount->lock);
    atomic_store(&mount->pool_sleeps, false);
}

static void *pool_body(void *argument)
{
    fl_mount *mount = argument;
    unsigned enough = enough_for_small(), idle = 0, short_of = 0;
    pthread_mutex_lock(&mount->lock);
    uint64_t served = atomic_load(&mount->served);
    while (!mount->closing && !mount->ended) {
        cond_wait_until(&mount->wake, &mount->lock, now_ns() + TICK_NS);
        uint64_t requests = atomic_load(&mount->served);
        unsigned reading = atomic_load(&mount->reading), blocked = 0;
        if (reading == 0 && !mount->closing && requests_wait(mount))
            blocked = count_blocked(mount);
        short_of = reading == 0 && blocked && mount->active - blocked < enough ? short_of + 1 : 0;
        blocked -= MIN(blocked, atomic_load(&mount->resting));
        if (short_of >= SHORT_TICKS)
            while (blocked-- && add_worker(mount, false))      /* as many again: so that the first of many requests do not wait long */
                ;
        idle = reading >= 2 ? idle + 1 : 0;
        if (idle == IDLE_TICKS) {
            idle = 0;
            unsigned others = mount->active - mount->helper_count;
            atomic_store(&mount->surplus, others > enough ? MIN(reading / 2, others - enough) : 0);
        }
        if (requests == served && reading)
            sleep_until_served(mount, served);
        served = requests;
    }
    pthread_mutex_unlock(&mount->lock);
    end_thread(mount);
    return NULL;
}

/* ---- start and stop ---- */

int pool_start(fl_mount *mount, unsigned most, fl_error *error)
{
    mount->most_workers = most;
    mount->workers = calloc(most, sizeof *mount->workers);
    bool good = mount->workers != NULL;
    pthread_mutex_lock(&mount->lock);
    unsigned enough = enough_for_small();
    for (unsigned i = 0; i < MIN(most, processors()) && good; i++) {
        good = add_worker(mount, i >= enough);
        mount->helper_count += i >= enough;
    }
    good = good && begin_thread(mount, pool_body, mount);
    pthread_mutex_unlock(&mount->lock);
    return good ? 0 : fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "cannot start the threads of a mount");
}

void pool_stop(fl_mount *mount, uint64_t deadline)
{
    pthread_mutex_lock(&mount->lock);
    for (unsigned i = 0; mount->workers && i < mount->most_workers; i++)
        if (mount->workers[i].running)
            pthread_cancel(mount->workers[i].thread);
    while (mount->threads && cond_wait_until(&mount->changed, &mount->lock, deadline))
        ;
    pthread_mutex_unlock(&mount->lock);
}

void pool_destroy(fl_mount *mount)
{
    free(mount->workers);
}

#endif
