/* sidecar.h: a file in which the dirty bitmaps of a disk outlive the process, whatever ends it.
 *
 * The bitmaps that are looked at live in memory. The file mirrors them: a bit is set in the file first, then in memory, then the guest's write is done. So
 *   S1  a bit that is set in memory is set in the file (in write-intent mode: on stable storage), unless the file says that the bitmap can't be trusted.
 * The mirror is a shared mapping, which survives the process in the page cache; nobody reads it, so storage that fails costs the bitmap its persistence and
 * nothing else (guard.h). Each bitmap has two areas: the one that marks go to, and the one that a cut froze or that is empty:
 *   S2  the header says that an area counts before anything is marked in it, and that the old one does not only when its bits are not needed any more.
 *   S3  the header says "clean" only when the disk was flushed and its times taken after the last write, and after all bits are on stable storage;
 *       and "in use" on stable storage before the first write.
 *   S4  the header is there twice, both of the newest generation whenever a call returns: one that is damaged takes nothing back.
 */
#ifndef FL_SIDECAR_H
#define FL_SIDECAR_H

#include "guard.h"
#include "sidecar_format.h"

/* One bitmap in the file. Unless said otherwise: under the lock of its disk, in calls that are not made from the write path. */
struct kept {
    struct sidecar *sidecar;            /* fixed */
    struct kept *next;
    struct sidecar_record record;       /* name, granularity, uuid: fixed; the rest: to be changed under the sidecar's lock */
    struct bitmap mirror[2];            /* over `memory` */
    void *memory[2];                    /* the areas, mapped; NULL: the bitmap is inconsistent */
    struct guard *guard[2];
    struct bitmap loaded;               /* after opening: what the bitmap holds; for who takes it */
    unsigned current;                   /* the area that marks go to; changed with the disk's gate closed as well */
    bool ready;                         /* the other one is empty, and counts */
    atomic_bool failed;                 /* the file says that it can't be trusted, because it could not follow; not in memory, where it is good */
};

struct sidecar {
    int fd;                             /* fixed */
    char *path;
    unsigned generation;                /* of the process: see fl_generation */
    _Atomic int64_t *alive;             /* mapped: when the disk was last written, seconds */
    struct guard *alive_guard;
    struct kept *bitmaps;               /* under the disk's lock */

    pthread_mutex_t lock;               /* protects header, records, and the writing of them. The last of all locks */
    struct sidecar_header header;
    bool lost;                          /* even that it can't be trusted could not be written */

    pthread_mutex_t touch_lock;         /* protects the first touch of a page of bits */

    pthread_mutex_t sync_lock;          /* protects the following */
    pthread_cond_t synced;
    uint64_t sync_wanted, sync_done;
    bool syncing;
    int sync_error;                     /* -errno of the first that failed */
};

/* Open the file, or make one (`create`: there may be none), for the disk of `size` bytes on the open file or device `disk_fd`. Says in it that it is in use.
   -ENOENT, -FL_ELOCKED, -FL_EFORMAT, -ENOTSUP (nothing tells which disk that is), -errno. */
int sidecar_open(const char *path, bool create, int disk_fd, uint64_t size, struct sidecar **sidecar, fl_error *error);
/* `clean`: the disk was flushed after its last write, and everything that is in memory is marked. The memory goes either way. */
int sidecar_close(struct sidecar *sidecar, bool clean, int disk_fd, fl_error *error);

/* From the write path, before the change of the disk. */
static inline void sidecar_alive(struct sidecar *sidecar)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    if (UNLIKELY(atomic_load_explicit(sidecar->alive, memory_order_relaxed) < now.tv_sec))
        atomic_store_explicit(sidecar->alive, now.tv_sec, memory_order_relaxed);
}

/* From the write path, and under the disk's lock: the bits are in the file when this returns, if there is any way; else the file says that they are not.
   kept_mark, and then kept_sync once: in write-intent mode they are on stable storage. */
void kept_mark(struct kept *kept, uint64_t first, uint64_t count);
void kept_sync(struct kept *kept);
/* Both, of all that is set in `bitmap`. */
void kept_mark_all(struct kept *kept, const struct bitmap *bitmap);

int kept_add(struct sidecar *sidecar, const char *name, uint64_t granularity, bool write_intent, struct kept **kept, fl_error *error);
int kept_remove(struct kept *kept, fl_error *error);            /* and frees it; when it fails, it stays in the file as it was */
/* Before it is removed: the file calls it inconsistent, until kept_confirm. */
int kept_doubt(struct kept *kept, fl_error *error);
int kept_enable(struct kept *kept, bool enabled, fl_error *error);

/* A cut, or a clear: kept_prepare makes the other area empty and lets it count. Then kept_switch, in the instant in which memory changes. Then, when the bits
   of the old area are not needed any more: kept_drop_old. */
int kept_prepare(struct kept *kept, fl_error *error);
void kept_switch(struct kept *kept);
int kept_drop_old(struct kept *kept, fl_error *error);
/* Of one that is inconsistent: it can be marked again, and is empty. */
int kept_revive(struct kept *kept, fl_error *error);
/* What was added or revived is marked by every write from now on: the file may say that it is good. Until then a kill leaves an inconsistent one. */
int kept_confirm(struct kept *kept, fl_error *error);
/* Of one that failed, before a clean close: try to write it anew. Nobody writes to the disk any more. */
void kept_repair(struct kept *kept, const struct bitmap *bits);

#endif
