/* store.h: where saved clusters live: a stage in memory, spilled in the background to a fleecing image.
 *
 * A writer takes slots of memory (never waiting), fills them, and publishes them under the numbers of their clusters. Readers copy a published
 * cluster out, from wherever it is. Freeing forgets it. The spiller, a thread of the store's own, moves the oldest staged clusters to the fleecing
 * image once three quarters of the stage are in use.
 */
#ifndef FL_STORE_H
#define FL_STORE_H

#include "image.h"

struct store;

struct store_options {
    uint32_t cluster_size;
    uint64_t stage_size;        /* at least one cluster */
    fl_image *fleecing;         /* NULL: memory is all there is. The store takes its own reference */
    uint64_t fleecing_limit;    /* bytes; 0: the image's size */
};

int store_create(const struct store_options *options, struct store **store, fl_error *error);
struct store *store_ref(struct store *store);
void store_unref(struct store *store);
/* Nothing will be saved or wanted any more: writers that wait for room return, the fleecing image is emptied. Waits a moment for a spill that
   runs, never for one that hangs; that one keeps the store until it ends. */
void store_close(struct store *store);
/* Nothing that is here will be read any more: waits for room end, publishing fails, and the space is given back in the background. Does not wait. */
void store_abort(struct store *store);

uint32_t store_slots(const struct store *store);        /* clusters that fit into the stage */
char *store_memory(const struct store *store, uint32_t slot);

/* Take `count` slots of the stage for clusters from `first` on, or none: -EAGAIN when there is no room. `credit` counts slots that store_wait reserved for this caller; what is
   used of it is subtracted. */
int store_take(struct store *store, uint64_t first, uint32_t count, uint32_t *credit, uint32_t *slots);
void store_give_back(struct store *store, const uint32_t *slots, uint32_t count);       /* unpublished ones */
void store_return_credit(struct store *store, uint32_t *credit);
/* Wait, first come first served, until `count` slots are reserved for the caller: adds them to `credit`. -ETIMEDOUT at `deadline`, or at once when
   an earlier wait timed out and nothing was freed since; -FL_ECLOSED after close or abort; -FL_EINTERRUPTED. Call it without any lock or claim. */
int store_wait(struct store *store, uint32_t count, uint64_t deadline, uint32_t *credit);
/* Did the last wait time out, and was nothing freed since? */
bool store_stalled(struct store *store);
/* Why there is no room: the fleecing side's last failure, or that it is full or slow. */
void store_explain(struct store *store, uint64_t waited, fl_error *error);

/* The slots hold the old data of clusters first, first + 1, …: from now on they are found there. 0 or -ENOMEM (nothing published). */
int store_publish(struct store *store, uint64_t first, const uint32_t *slots, uint32_t count);
#define STORE_HAS_NOT 1         /* beside 0 and the negative codes, which can be anything that the fleecing image fails with */
/* Read `length` bytes from `offset` (bytes of the disk; may span clusters). STORE_HAS_NOT: a cluster is not here (any more). Bytes that come from the
   fleecing image may be another cluster's by then if the cluster was freed meanwhile: the caller looks at its bitmaps again afterwards. */
int store_read(struct store *store, void *buffer, size_t length, uint64_t offset, fl_error *error);
/* Forget the clusters in [first, first + count) that are here. */
void store_free(struct store *store, uint64_t first, uint64_t count);
/* The cluster that would spill next, while the stage holds so much that spilling is near. */
bool store_oldest(struct store *store, uint64_t *cluster);

/* Fills the fields of staged_..., fleecing_..., bytes_spilled, spill_errors, room_waits and room_timeouts. */
void store_stats(struct store *store, fl_stats *stats);

#endif
