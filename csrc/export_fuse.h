/* export_fuse.h: the inside of a mount, shared by export_fuse*.c. fleece.h has the calls.
 *
 *   export_fuse.c         the mount: its start and its end
 *   export_fuse_pool.c    the threads that serve it: how many, and what each does
 *   export_fuse_tree.c    names: lookup, attributes, listing; what .snap shows; requests to cut and to end
 *   export_fuse_file.c    files: open, read, write, fallocate, lseek, fsync
 *   export_fuse_story.c   what failed: errnos, extended attributes, the queue of failures, statistics
 *   export_fuse_none.c    all of fleece.h's calls where there is no libfuse3: they say so
 *
 * Each thread reads a request from the device, does it, and answers. None of them ever waits for a cut, for a freeze hook, or for the interpreter:
 * mkdir and rmdir are put aside and answered by whoever makes cuts. So the process, its hooks, and a guest in it may use the mount freely.
 *
 * The mount's one lock is for names, requests and failures; what reads and writes do does not need it. It is never held while an image is used.
 */
#ifndef FL_EXPORT_FUSE_H
#define FL_EXPORT_FUSE_H

#define FUSE_USE_VERSION 35
#include <fuse_lowlevel.h>
#include <sys/stat.h>

#include "cbw.h"

#define LARGE_IO (64u << 10)            /* of at least so many bytes copying them is what takes the time */
#define LARGEST_IO (1u << 20)           /* bytes of one read or write: what the kernel sends at most */
#define MAX_THREADS 256
#define DEFAULT_THREADS 64
#define SNAP_NAME ".snap"
#define CHANGED_SUFFIX ".changed"
#define FAILURES_KEPT 64

/* Node numbers: the kernel's names for files and directories. They are never used again, so a stale one finds nothing. */
#define SNAP_NODE (FUSE_ROOT_ID + 1)
#define FIRST_NODE 16

enum file_kind { DISK_FILE, SNAPSHOT_FILE, CHANGED_FILE };

struct shot;

/* A file: of a disk, or of a shot (then the shot's reference keeps it). */
struct file {
    /* fixed */
    enum file_kind kind;
    const char *name;
    fuse_ino_t node;
    struct shot *shot;          /* NULL: a disk's */
    fl_disk *disk;
    fl_snapshot *snapshot;      /* NULL: a disk's */
    uint64_t size;
    uint64_t allocated;         /* of a shot's, at the cut: so that programs know whether to look for holes */

    atomic_int_least64_t changed;               /* ns since 1970: the last write, or the cut */

    struct attributes { mode_t mode; uid_t uid; gid_t gid; } attributes;        /* under `lock` */

    /* under `lock`, too */
    fl_error story;             /* the last failure; code 0: none */
    int told_code;              /* and the last one that went to the queue: what it returned, when, how many like it did not go there since */
    uint64_t told_at, left_out;
};

/* A directory in .snap: the snapshots of one cut. */
struct shot {
    /* fixed */
    char name[256];
    fuse_ino_t node;            /* the files have the numbers after it */
    struct timespec time;
    struct attributes attributes;
    size_t count;
    atomic_uint references;     /* one while it is shown, one for each open file in it */

    struct shot *next;          /* under `lock`; in the order of their numbers */
    struct file files[];        /* `count` */
};

/* A mkdir or rmdir that waits for an answer. */
struct request {
    struct request *next;       /* in the order of arrival */
    fuse_req_t fuse;
    fl_mount_request what;
    bool taken;
};

/* One of the threads that serve. */
struct worker {
    struct fl_mount *mount;
    char *memory;               /* one mapping */
    char *request;              /* where a request is read to: so that the data of a write is aligned to pages */
    char *payload;              /* LARGEST_IO bytes, aligned to pages: the data of a write, or the answer to a read (the same memory) */
    bool helper;                /* for large requests only, see export_fuse_pool.c */
    bool soon;                  /* its last request came soon; nobody else's business */
    pthread_t thread;           /* under `lock`, as is what follows */
    bool used;                  /* it has a thread, or will in a moment */
    bool running;               /* `thread` and `id` are valid */
    pid_t id;
};

struct fl_mount {
    /* fixed after start */
    struct fuse_session *session;
    int fd;                     /* the session's */
    char *mountpoint;
    dev_t device;               /* of the mount; 0: unknown */
    size_t disk_count;
    struct file *disks;
    const char **changed_names; /* for each disk */
    char *names;                /* the memory of all names */
    struct timespec started;
    unsigned most_workers;
    struct gate gate;           /* of the public calls */
    atomic_uint references;     /* the handle's, and one for each thread */

    _Alignas(CACHE_LINE) atomic_uint reading;   /* workers that wait for a request */
    atomic_uint surplus;        /* workers that are to end after their next request */
    atomic_uint_least64_t served;       /* requests */
    atomic_bool looked_out;     /* a worker looks for a request without sleeping */
    atomic_bool pool_sleeps;    /* its thread wants to be woken by the next request */
    atomic_uint resting;        /* helpers that wait to be called; changed under `lock` */

    pthread_mutex_t lock;       /* protects what follows */
    pthread_cond_t changed;     /* any of it */
    struct worker *workers;     /* `most_workers` of them */
    unsigned threads;           /* that run, the pool's own included */
    unsigned active;            /* workers among them */
    unsigned helper_count;      /* of them, for large requests; fixed after start */
    unsigned called;            /* helpers that are to go to work */
    pthread_cond_t helpers;     /* `called`, or the end */
    pthread_cond_t wake;        /* the pool's thread: there is something to do, or the end */
    bool closing;               /* nothing new is taken on */
    bool ended;                 /* unmounted: the kernel says so, or close() does */
    bool closed;                /* close() is through */
    uint64_t open_files;
    struct attributes root, snap;
    struct shot *shots, **last_shot;
    fuse_ino_t next_node;
    struct request *requests, **last_request;
    uint64_t next_id;
    struct handle *handles;     /* of open files: nobody releases those that are open at the end */
    fl_error snap_story;        /* why the last mkdir or rmdir failed */
    fl_mount_failure failures[FAILURES_KEPT];   /* a ring */
    unsigned first_failure, failure_count;
    uint64_t failures_dropped;
};

/* What a handle of an open file points at. */
struct handle {
    struct file *file;          /* and a reference to its shot */
    struct handle *next, **link;        /* of the mount's list; under the mount's `lock` */
    pthread_mutex_t lock;       /* protects what follows */
    size_t extent_count;        /* lseek, in files of shots: what the last look found. What is a hole at a cut stays one */
    fl_extent extents[256];
};

/* The thread's own. */
extern _Thread_local struct worker *fuse_worker;

static inline fl_mount *mount_of(fuse_req_t req) { return fuse_req_userdata(req); }
static inline struct handle *handle_of(struct fuse_file_info *info) { return (struct handle *)(uintptr_t)info->fh; }

/* ---- export_fuse.c ---- */
void mount_unref(fl_mount *mount);

/* ---- export_fuse_pool.c ---- */
int pool_start(fl_mount *mount, unsigned most, fl_error *error);
/* No request is begun any more; wait until those that run have ended, until `deadline` at most. */
void pool_stop(fl_mount *mount, uint64_t deadline);
void pool_destroy(fl_mount *mount);

/* ---- export_fuse_tree.c ---- */

/* The operations on names, into the table. */
void tree_operations(struct fuse_lowlevel_ops *operations);
/* Names and files of the disks. -EINVAL, -ENOMEM. */
int tree_init(fl_mount *mount, fl_disk *const *disks, const char *const *names, size_t count, fl_error *error);
void tree_destroy(fl_mount *mount);
/* The file with this number, with a reference on its shot; NULL: none. */
struct file *tree_file(fl_mount *mount, fuse_ino_t node);
struct shot *tree_shot(fl_mount *mount, fuse_ino_t node);      /* likewise */
void shot_unref(struct shot *shot);                             /* NULL: nothing */
/* Of the end: no mkdir or rmdir waits any longer, and the snapshots that are shown end. */
void tree_end(fl_mount *mount);

/* ---- export_fuse_file.c ---- */
void file_destroy_handles(fl_mount *mount);
void file_operations(struct fuse_lowlevel_ops *operations);

/* ---- export_fuse_story.c ---- */
void story_operations(struct fuse_lowlevel_ops *operations);
/* The positive errno for what a call returned. Never ENOSYS, which would make the kernel believe that the operation does not exist: it would call an
   fsync that failed a success. */
int story_errno(int rc);
/* Remember why a request on the file failed, tell it, and answer the request. */
void story_fail(fuse_req_t req, struct file *file, int rc, const fl_error *error);
/* The story of .snap. code: positive; 0: it went well. */
void story_of_snap(fl_mount *mount, int code, const char *text);

#endif
