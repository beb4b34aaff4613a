/* dirty.h: the dirty bitmaps of a disk: what was written since. Some of them are kept in a file (sidecar.h). */
#ifndef FL_DIRTY_H
#define FL_DIRTY_H

#include "sidecar.h"

/* Unless said otherwise: changed under the disk's lock with its gate closed as well; either is enough to read it. */
struct dirty {
    struct dirty *next;
    char name[256];             /* these three: fixed */
    uint64_t granularity;
    unsigned shift;
    bool recording;             /* writes are marked: it is enabled and consistent */
    bool enabled;
    bool inconsistent;          /* it may miss writes: `bits` is not there */
    struct bitmap bits;
    struct kept *kept;          /* its place in the file; NULL: it is in memory only. Until the disk is closed */
    fl_snapshot *frozen_by;     /* under the disk's lock: at most one snapshot holds a frozen one */
};

/* For the write path: are bits [first, last] set, as they mostly are? Short ranges only; false: they may be. What another thread set and we see counts as set
   by us, for whoever we pass it on to. */
static inline bool dirty_marked(const struct dirty *dirty, uint64_t first, uint64_t last)
{
    uint64_t word = first >> 6, mask = word_mask(word, first, last + 1);
    return last >> 6 == word && (bitmap_word(&dirty->bits, word) & mask) == mask;
}

/* For the write path, before it sets the bits in memory: those that are not set yet go to the file. Of a bitmap that is kept. */
static inline void dirty_keep(struct dirty *dirty, uint64_t first, uint64_t count)
{
    if (bitmap_next_clear(&dirty->bits, first, first + count) == first + count)
        return;
    kept_mark(dirty->kept, first, count);
    kept_sync(dirty->kept);
}

/* ---- between dirty.c and dirty_file.c ---- */

struct dirty *dirty_new(const char *name, uint64_t granularity);        /* in no list, and without bits; NULL: no memory */
void dirty_destroy(struct dirty *dirty);

/* ---- for disk.c, under the disk's lock ---- */

struct dirty **dirty_find(fl_disk *disk, const char *name);
int dirty_missing(const char *name, fl_error *error);   /* -ENOENT */
int dirty_untrusted(const struct dirty *dirty, fl_error *error);        /* -FL_EINCONSISTENT, and why */
/* Is all prepared for fresh bits to take the place of those in memory? */
bool dirty_ready(const struct dirty *dirty);
/* With the gate closed: fresh bits take over; `*bits` becomes what was there. */
void dirty_exchange(struct dirty *dirty, struct bitmap *bits);
/* The snapshot's frozen bitmap: merge back what has to be, drop the rest. Once. */
int dirty_settle(fl_snapshot *snapshot, bool commit, fl_error *error);
/* The disk is being closed: nobody writes any more, and no snapshot is left. */
int dirty_close_file(fl_disk *disk, fl_error *error);
void dirty_free_all(fl_disk *disk);

#endif
