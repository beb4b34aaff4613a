/* cbw.h: a disk: its source, what is cut from it, and the write path that keeps the old data. */
#ifndef FL_CBW_H
#define FL_CBW_H

#include "snapshot.h"

#define MAX_SNAPSHOTS 16        /* alive at once on one disk */

/* A dirty bitmap: what was written since it was added, or frozen by a cut. */
struct dirty {
    struct dirty *next;
    char name[256];
    uint64_t granularity;
    unsigned shift;
    struct bitmap bits;         /* replaced only with the disk's gate closed */
    fl_snapshot *frozen_by;     /* under the disk's lock: at most one snapshot holds a frozen one */
};

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

#endif
