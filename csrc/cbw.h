/* cbw.h: a disk: its source, what is cut from it, and the write path that keeps the old data. */
#ifndef FL_CBW_H
#define FL_CBW_H

#include "dirty.h"
#include "snapshot.h"

#define MAX_SNAPSHOTS 16        /* alive at once on one disk */

struct fl_disk {
    /* fixed after creation */
    uint64_t size;
    bool writable;
    uint64_t id;                /* the global order in which a group cut closes gates */

    atomic_uint references;
    struct gate life;           /* all public calls but those that change data */
    struct gate writes;         /* those that change data: a cut closes it */

    fl_image *source;           /* until close; used inside the gates only */

    pthread_mutex_t lock;       /* taken to change what follows, and then the gate is closed as well; either is enough to read it */
    fl_snapshot *snapshots[MAX_SNAPSHOTS];
    unsigned snapshot_count;
    struct dirty *dirty;
    struct sidecar *sidecar;    /* the file of the persistent ones, or NULL */
};

/* ---- for the front ends ---- */

/* A reference, which keeps the memory but not the disk open. -FL_ECLOSED, -FL_EFORKED. */
int disk_use(fl_disk *disk, fl_error *error);
void disk_unref(fl_disk *disk);
/* Bytes that the source occupies; 0 when the disk is closed. */
uint64_t disk_allocated(fl_disk *disk);

enum change { CHANGE_WRITE, CHANGE_ZERO, CHANGE_DISCARD };

/* A guest's write (`data`), zero or discard of [offset, offset + count), which is inside the disk. Returns when the source is changed. */
int cbw_change(fl_disk *disk, enum change change, const void *data, uint64_t count, uint64_t offset, fl_error *error);

/* disk.c: close the gate between two writes, under the disk's lock. 0, -ETIMEDOUT, -FL_ECLOSED. */
int disk_close_writes(fl_disk *disk, fl_error *error);

#endif
