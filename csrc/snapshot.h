/* snapshot.h: the state at the cut: which clusters were saved, and how to read them.
 *
 * A cluster's bits only ever go forward; (w) writer, (b) whoever discards:
 *
 *              (w) claim                  (w) publish in the store, then set
 *     nothing -----------> claimed ------------------------------------------> saved (+ zero: nothing is stored)
 *                  ^          |  \
 *                  +----------+   \------ (w) the save failed, lose-range ----> lost
 *                   (w) gave up
 *     any of these ---- (b) ----> released: never saved, never read again
 */
#ifndef FL_SNAPSHOT_H
#define FL_SNAPSHOT_H

#include "bitmap.h"
#include "store.h"
#include "util/latency.h"

enum snapshot_state { SNAPSHOT_LIVE, SNAPSHOT_BROKEN, SNAPSHOT_ENDED };

struct fl_snapshot {
    /* fixed after creation */
    uint64_t size, clusters;
    uint32_t cluster_size, shift;
    int on_cbw_error;
    uint64_t cbw_timeout;
    bool incremental;
    bool bounded;               /* an incremental for which what is outside of `frozen` counts as released */
    int bitmap_mode;            /* enum fl_bitmap_mode */
    struct bitmap frozen;       /* of an incremental: what belongs to it, one bit per 2^frozen_shift clusters; set at the cut */
    unsigned frozen_shift;

    /* disk.c's */
    fl_disk *disk;              /* that it was cut from: a reference, until close, which takes it away under `lock` */
    struct dirty *dirty;        /* where `frozen` came from; under the disk's lock, as is the next */
    enum { UNSETTLED, COMMITTED, ABORTED } settled;     /* what becomes of `frozen` was decided */

    struct bitmap claimed, saved, zero, released, lost;

    atomic_uint references;
    struct gate gate;           /* of the public calls */

    fl_image *source;           /* these two until close; used inside the gates only (this one or the disk's) */
    struct store *store;

    atomic_int state;           /* enum snapshot_state; only goes up */
    pthread_mutex_t lock;       /* protects `first`, and the waits for claims */
    fl_error first;             /* why it broke */
    atomic_int bell;            /* socket + 1, for whoever wants to know that it broke; 0: nobody */
    atomic_uint claim_waiters;
    pthread_cond_t claims_changed;      /* a claim ended: saved, lost, given up, or broken */

    /* atomic counters of fl_stats */
    atomic_uint_least64_t clusters_saved, bytes_copied, zero_clusters, clusters_lost, claim_waits, reads_repeated;
    struct latency latency;     /* that copy-before-write added to guest writes */
};

/* ---- for cbw.c ---- */

static inline bool snapshot_live(fl_snapshot *snapshot) { return atomic_load(&snapshot->state) == SNAPSHOT_LIVE; }

/* Clusters of word `word` that need no saving: saved, released, lost, or outside of what a bounded one keeps. */
uint64_t snapshot_done_word(const fl_snapshot *snapshot, uint64_t word);
/* Bytes of cluster's old data: the last one may be short. */
static inline uint32_t snapshot_cluster_bytes(const fl_snapshot *snapshot, uint64_t cluster)
{
    uint64_t rest = snapshot->size - (cluster << snapshot->shift);
    return (uint32_t)MIN(rest, snapshot->cluster_size);
}
/* Was none of it cut off since, as far as is known? To be asked after the source was read: what a guest write makes of a file that was
   truncated reads as zeros. 0 or -FL_ETRUNCATED. */
int snapshot_source_kept(const fl_snapshot *snapshot, uint64_t offset, uint64_t length, fl_error *error);
/* From now on nothing can be read; the first cause is kept. Visible to every reader when this returns (after a full fence). */
void snapshot_break(fl_snapshot *snapshot, const fl_error *cause);
/* Claims ended: wake whoever waits for them. Call it after the bits were changed. */
void snapshot_claims_changed(fl_snapshot *snapshot);

/* ---- for disk.c ---- */

/* Everything but the cut itself: with one reference, and with one of its own on the source. `bitmap_granularity`: bytes; 0: not an incremental. */
int snapshot_create(fl_image *source, const fl_snapshot_options *options, uint64_t bitmap_granularity, fl_snapshot **snapshot, fl_error *error);

/* Give up store and source. Once nobody is inside the gate any more. */
void snapshot_let_go(fl_snapshot *snapshot);

/* ---- for backup.c ---- */

fl_snapshot *snapshot_ref(fl_snapshot *snapshot);
void snapshot_unref(fl_snapshot *snapshot);
/* The offset of a cluster that should be copied and discarded first, because the stage fills up; false: nothing presses. */
bool snapshot_hot(fl_snapshot *snapshot, uint64_t *offset);
/* Bytes from `offset` on, `length` at most, that nothing has happened to: they are in the source as they were at the cut. A look at a moment. */
uint64_t snapshot_unsaved(fl_snapshot *snapshot, uint64_t length, uint64_t offset);
/* Clone [offset, offset + length) of the source to the same place of `target`. 0: the first `*good` bytes of it are the ones of the cut; the rest may be
   anything, and is read as ever, which also tells why where it can't be. As the clone of image_ops otherwise. */
int snapshot_clone(fl_snapshot *snapshot, fl_image *target, uint64_t length, uint64_t offset, uint64_t *good);
/* Bytes that belong to it: the disk, or what its dirty bitmap holds. */
uint64_t snapshot_total(fl_snapshot *snapshot);
bool snapshot_is_direct(fl_snapshot *snapshot);         /* what was not saved is read without the page cache */
uint64_t snapshot_fleecing_bytes(fl_snapshot *snapshot);       /* in use now; 0: it was closed. Quick, unlike fl_snapshot_stats, which counts bits */
/* fl_snapshot_discard of a range that was copied by extents: what is outside of the bitmap was not, and stays. */
int snapshot_discard_copied(fl_snapshot *snapshot, uint64_t count, uint64_t offset, fl_error *error);

#define DEFAULT_CLUSTER_SIZE 4096u

#endif
