/* export_fuse.c: a mount: its start and its end.
 *
 * The end: first nobody can open anything more; then the snapshots end, and the threads. When all of them are gone (or those that hang in storage
 * were given up) the device is replaced by something that answers nothing: with its last reference the kernel fails what is still waiting, and
 * what comes. A thread that was given up keeps the mount's memory until its system call returns, and answers into the void.
 */
#define _GNU_SOURCE
#ifdef FLEECE_FUSE
#include "export_fuse.h"

#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#define CLOSE_GRACE_NS UINT64_C(5000000000)

extern char **environ;

/* ---- what libfuse says ---- */

/* Its messages go to stderr, but for those of a start, which become part of the error. */
static _Thread_local char *said;
static _Thread_local size_t said_room;

static void log_libfuse(enum fuse_log_level level, const char *format, va_list arguments)
{
    (void)level;
    if (!said) {
        vfprintf(stderr, format, arguments);
        return;
    }
    size_t used = strlen(said);
    if (used + 2 < said_room) {
        if (used) {
            strcpy(said + used, "; ");
            used += 2;
        }
        vsnprintf(said + used, said_room - used, format, arguments);
        for (used = strlen(said); used && (said[used - 1] == '\n' || said[used - 1] == '.'); used--)
            said[used - 1] = 0;
    }
}

/* ---- fork ---- */

/* Devices of mounts, so that a forked child gives up its copies: the kernel would wait for them when the parent has died. */
#define MAX_DEVICES 256
static atomic_int devices[MAX_DEVICES]; /* fd + 1; 0: free */

static void close_in_child(void)
{
    for (int i = 0; i < MAX_DEVICES; i++) {
        int fd = atomic_load(&devices[i]) - 1;
        if (fd >= 0)
            close(fd);
    }
}

__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, close_in_child);
}

static void register_device(int fd)
{
    for (int i = 0; i < MAX_DEVICES; i++) {
        int none = 0;
        if (atomic_compare_exchange_strong(&devices[i], &none, fd + 1))
            return;
    }
}

static void forget_device(int fd)
{
    for (int i = 0; i < MAX_DEVICES; i++) {
        int found = fd + 1;
        if (atomic_compare_exchange_strong(&devices[i], &found, 0))
            return;
    }
}

static void on_init(void *data, struct fuse_conn_info *connection)
{
    (void)data;
    /* Truncation comes as a request of its own, and is refused there. */
    connection->want &= ~(unsigned)(FUSE_CAP_ATOMIC_O_TRUNC | FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE);
    connection->want |= connection->capable & (FUSE_CAP_ASYNC_DIO | FUSE_CAP_PARALLEL_DIROPS);
    connection->max_write = LARGEST_IO;
    connection->max_background = 256;           /* asynchronous direct I/O: a guest's queue depth, several guests */
    connection->congestion_threshold = 192;
    connection->max_readahead = 0;
}

/* ---- unmounting ---- */

/* Without asking the server, which may hang. */
static dev_t device_at(const char *path)
{
    struct statx found;
    if (statx(AT_FDCWD, path, AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT, 0, &found))
        return 0;
    return makedev(found.stx_dev_major, found.stx_dev_minor);
}

static void run_fusermount(const char *mountpoint)
{
    char *arguments[] = { "fusermount3", "-u", "-z", "-q", "--", (char *)(uintptr_t)mountpoint, NULL };
    pid_t pid;
    int status;
    if (posix_spawnp(&pid, arguments[0], NULL, NULL, arguments, environ) == 0)
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
            ;
}

/* From the tree of files: nobody can open anything more. Files that are open stay so. */
static void detach(fl_mount *mount)
{
    if (mount->fd < 0 || (mount->device && device_at(mount->mountpoint) != mount->device))
        return;                 /* it never was mounted, or somebody unmounted it, and perhaps mounted something else */
    if (umount2(mount->mountpoint, MNT_DETACH | UMOUNT_NOFOLLOW) && errno == EPERM)
        run_fusermount(mount->mountpoint);
}

/* The kernel fails all requests that wait, and all that come, once nobody has the device any more; no thread reads it now. What takes its place
   polls as broken, which also tells libfuse that there is nothing left to unmount. */
static void abort_connection(fl_mount *mount)
{
    int ends[2];
    if (mount->fd >= 0 && pipe2(ends, O_CLOEXEC) == 0) {
        close(ends[0]);
        dup3(ends[1], mount->fd, O_CLOEXEC);
        close(ends[1]);
    }
}

/* With nobody left who could use it. */
static void end_session(fl_mount *mount)
{
    if (mount->session && mount->fd >= 0) {
        fuse_session_unmount(mount->session);           /* closes the descriptor */
        forget_device(mount->fd);
    }
    if (mount->session)
        fuse_session_destroy(mount->session);
    mount->session = NULL;
}

void mount_unref(fl_mount *mount)
{
    if (mount->gate.generation != fl_generation || atomic_fetch_sub(&mount->references, 1) != 1)
        return;
    end_session(mount);
    file_destroy_handles(mount);
    tree_destroy(mount);
    pool_destroy(mount);
    free(mount->mountpoint);
    pthread_cond_destroy(&mount->wake);
    pthread_cond_destroy(&mount->helpers);
    pthread_cond_destroy(&mount->changed);
    pthread_mutex_destroy(&mount->lock);
    gate_destroy(&mount->gate);
    free(mount);
}

int fl_mount_close(fl_mount *mount, fl_error *error)
{
    if (mount->gate.generation != fl_generation)
        return gate_pass(&mount->gate, "mount", error);
    pthread_mutex_lock(&mount->lock);
    bool first = !mount->closing;
    mount->closing = true;
    pthread_cond_broadcast(&mount->changed);
    pthread_cond_broadcast(&mount->wake);
    pthread_cond_broadcast(&mount->helpers);
    while (!first && !mount->closed)
        pthread_cond_wait(&mount->changed, &mount->lock);
    pthread_mutex_unlock(&mount->lock);
    if (!first)
        return 0;
    detach(mount);
    tree_end(mount);            /* guest writes that wait for room in a stage go on */
    pool_stop(mount, now_ns() + CLOSE_GRACE_NS);
    tree_end(mount);            /* what came in meanwhile */
    if (mount->session)         /* libfuse need not tell that the late answer of a thread that was given up went nowhere */
        fuse_session_exit(mount->session);
    abort_connection(mount);
    gate_shut(&mount->gate);
    pthread_mutex_lock(&mount->lock);
    bool alone = mount->threads == 0;
    pthread_mutex_unlock(&mount->lock);
    if (alone)                  /* else the last thread does it */
        end_session(mount);
    pthread_mutex_lock(&mount->lock);
    mount->ended = mount->closed = true;
    pthread_cond_broadcast(&mount->changed);
    pthread_mutex_unlock(&mount->lock);
    return 0;
}

void fl_mount_free(fl_mount *mount)
{
    if (!mount || mount->gate.generation != fl_generation)
        return;
    fl_mount_close(mount, NULL);
    mount_unref(mount);
}

int fl_mount_wait(fl_mount *mount, uint64_t timeout, fl_error *error)
{
    uint64_t deadline = add_sat(now_ns(), timeout);
    int rc = gate_pass(&mount->gate, "mount", error);
    if (rc)
        return rc == -FL_ECLOSED ? 0 : rc;
    pthread_mutex_lock(&mount->lock);
    while (!mount->ended && !mount->closing && rc == 0 && now_ns() < deadline) {
        cond_wait_until(&mount->changed, &mount->lock, slice_end(deadline));
        pthread_mutex_unlock(&mount->lock);
        if (interrupted())
            rc = fail(error, FL_EINTERRUPTED, FL_SIDE_NONE, 0, 0, "interrupted while waiting for the end of a mount");
        pthread_mutex_lock(&mount->lock);
    }
    if (rc == 0 && !mount->ended && !mount->closing)
        rc = fail(error, FL_ERUNNING, FL_SIDE_NONE, 0, 0, "%s is still mounted", mount->mountpoint);
    pthread_mutex_unlock(&mount->lock);
    gate_leave(&mount->gate);
    return rc;
}

int fl_mount_open_files(fl_mount *mount, uint64_t *count, fl_error *error)
{
    int rc = gate_pass(&mount->gate, "mount", error);
    if (rc)
        return rc;
    pthread_mutex_lock(&mount->lock);
    *count = mount->open_files;
    pthread_mutex_unlock(&mount->lock);
    gate_leave(&mount->gate);
    return 0;
}

/* ---- starting ---- */

static int open_session(fl_mount *mount, const fl_mount_options *options, fl_error *error)
{
    static const struct fuse_lowlevel_ops none;
    struct fuse_lowlevel_ops operations = none;
    struct fuse_args arguments = FUSE_ARGS_INIT(0, NULL);
    char what[256] = "";
    operations.init = on_init;
    tree_operations(&operations);
    file_operations(&operations);
    story_operations(&operations);
    fuse_set_log_func(log_libfuse);
    said = what;
    said_room = sizeof what;
    int failure = ENOMEM;
    /* The kernel checks modes and owners: the server sees only what is allowed. */
    if (fuse_opt_add_arg(&arguments, "pyfleece") == 0 &&
        fuse_opt_add_arg(&arguments, "-ofsname=pyfleece,subtype=pyfleece,default_permissions") == 0 &&
        (!options->allow_other || fuse_opt_add_arg(&arguments, "-oallow_other") == 0))
        mount->session = fuse_session_new(&arguments, &operations, sizeof operations, mount);
    fuse_opt_free_args(&arguments);
    if (mount->session) {
        errno = 0;
        if (fuse_session_mount(mount->session, mount->mountpoint) == 0) {
            mount->fd = fuse_session_fd(mount->session);
            failure = 0;
        } else {
            failure = errno ? errno : EPERM;    /* fusermount3 said why, on stderr; it is hardly anything else */
        }
    }
    said = NULL;
    if (failure)
        return fail(error, failure, FL_SIDE_NONE, 0, 0, "cannot mount on %.100s%s%.240s", mount->mountpoint, *what ? ": " : "", what);
    fcntl(mount->fd, F_SETFD, FD_CLOEXEC);
    register_device(mount->fd);
    mount->device = device_at(mount->mountpoint);
    return 0;
}

int fl_mount_start(const char *mountpoint, fl_disk *const *disks, const char *const *names, size_t count, const fl_mount_options *options,
                   fl_mount **out, fl_error *error)
{
    unsigned threads = options->threads ? options->threads : DEFAULT_THREADS;
    if (threads > MAX_THREADS)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "a mount has 1 to %d threads, not %u", MAX_THREADS, threads);
    fl_mount *mount = aligned_alloc(CACHE_LINE, align_up(sizeof *mount, CACHE_LINE));
    if (!mount)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a mount");
    memset(mount, 0, sizeof *mount);
    mount->fd = -1;
    if (gate_init(&mount->gate) || pthread_mutex_init(&mount->lock, NULL) || cond_init(&mount->changed) ||
        cond_init(&mount->wake) || cond_init(&mount->helpers)) {
        free(mount);
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "cannot make the locks of a mount");
    }
    atomic_init(&mount->references, 1);
    clock_gettime(CLOCK_REALTIME_COARSE, &mount->started);
    mount->mountpoint = strdup(mountpoint);
    int rc = mount->mountpoint ? tree_init(mount, disks, names, count, error)
                               : fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a mount");
    if (rc == 0)
        rc = open_session(mount, options, error);
    if (rc == 0)
        rc = pool_start(mount, threads, error);
    if (rc) {
        fl_mount_free(mount);
        return rc;
    }
    *out = mount;
    return 0;
}

#endif
