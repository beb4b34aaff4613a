/* store_internal.h: the store's insides, shared by store.c (the stage) and store_spill.c (the fleecing image and its thread). */
#ifndef FL_STORE_INTERNAL_H
#define FL_STORE_INTERNAL_H

#include "bitmap.h"
#include "store.h"
#include "store_map.h"

/*
 *  slot of the stage:
 *                 store_take            store_publish           spill_begin             spill_end, nobody reads it
 *      FREE  ------------------> TAKEN ---------------> STAGED -------------> SPILLING ---------------------------> FREE
 *        ^   <------------------                          |                      |
 *        |      store_give_back                           | freed                | freed, or spilled while pinned
 *        |                                                v                      v
 *        +----------------- last pin is gone ---------- ORPHAN (only while pinned; else FREE at once)
 */
enum slot_state { SLOT_FREE, SLOT_TAKEN, SLOT_STAGED, SLOT_SPILLING, SLOT_ORPHAN };

#define NO_SLOT UINT32_MAX
#define BATCH_SLOTS 1024u

struct slot {
    uint64_t cluster;           /* of STAGED and SPILLING */
    uint32_t next, prev;        /* FREE: next free one; STAGED: neighbours in age */
    uint32_t pins;              /* readers and the spiller that use the memory right now */
    enum slot_state state;
};

struct waiter {
    struct waiter *next;
    pthread_cond_t wake;
    uint32_t need;
    bool granted;
};

struct store {
    /* fixed after creation */
    uint32_t cluster_size, shift;
    uint32_t slots_count;
    uint32_t batch;             /* slots that one spill writes at most */
    uint32_t touch_step;        /* slots whose memory is touched at once */
    uint32_t spill_above, spill_down_to;        /* slots in use */
    uint32_t lot;               /* slots that spilling makes free before it lets those in who wait for room */
    uint32_t hot_from;          /* from so many on a backup had better copy the oldest ones next */
    char *memory;
    size_t mapped;
    uint32_t reserve_step;      /* slots of the file whose place is found at once */
    fl_image *fleecing;         /* NULL: none. Until the spiller ends; used by it, by file_readers, and under the lock */
    uint64_t file_slots;        /* clusters that fit into the fleecing image, or below the limit */

    atomic_uint references;

    pthread_mutex_t lock;       /* protects all that follows; never held during I/O */
    pthread_cond_t work;        /* the spiller sleeps here */
    pthread_cond_t ended;       /* the spiller is gone */
    bool closed, spiller_runs, spiller_sleeps;
    bool aborted;               /* set before `closed` */
    bool dismantled;
    uint32_t file_readers;      /* readers that use `fleecing`, perhaps for ever */

    struct slot *slots;
    uint32_t free_head, free_tail;      /* the free list: taken from the head; see slot_free */
    uint32_t fresh;             /* the slots from here on were never used, and are not in the list */
    uint32_t touched;           /* the memory of the slots below is there; a multiple of touch_step, or all */
    uint32_t in_use, reserved;  /* reserved: promised to writers that waited */
    uint32_t oldest, newest, staged;    /* the STAGED ones, by age */
    uint32_t spilling;
    struct map map;

    struct waiter *first_waiter, **last_waiter;
    bool gathering;             /* what is freed now is not given to those who wait one by one */
    bool stalled;               /* a wait timed out and nothing was freed since */

    struct bitmap file_used, file_stale;        /* by file slot; stale: written, free, and not punched yet */
    uint64_t file_high;         /* no slot from here on was ever used */
    uint64_t file_reserved;     /* the slots below have, or had, a place on the disk; the spiller's own, needs no lock */
    bool reserves;              /* so is this: it is of use */
    uint64_t file_cursor, file_in_use;
    uint64_t freed_since_punch, punch_cursor;   /* the cursor is not 0 in the middle of a round through the file */
    bool file_full, spilling_down;
    uint64_t retry_at, retry_delay;     /* after a failed spill; 0: none failed */
    uint64_t spill_began;       /* when the running spill write began, for store_explain */
    fl_error spill_error;       /* the last failed spill; code 0: none since the last good one */

    fl_stats stats;
};

/* store.c, under the lock */
void grant_room(struct store *store);   /* to those who wait for it, as far as there is any */
void slot_free(struct store *store, uint32_t slot);     /* to the end of the free list, and to whoever waits for room */
void slot_unpin(struct store *store, uint32_t slot);
void stage_unlink(struct store *store, uint32_t slot);
void slot_drop(struct store *store, uint32_t slot);     /* nothing points at it any more: free it, now or with its last pin */
void store_destroy(struct store *store);        /* the last reference is gone; not under the lock */
static inline uint32_t room(const struct store *store) { return store->slots_count - store->in_use - store->reserved; }

static inline void wake_spiller(struct store *store)
{
    if (store->spiller_sleeps)
        pthread_cond_signal(&store->work);
}

/* The first use of a page is a fault, which costs several times the copy of a cluster. So the spiller has the next ones touched before a writer gets to
   them, from the first save on, and not much further than is needed. */
#define TOUCH_BYTES (1u << 20)
static inline bool touch_due(const struct store *store)
{
    return store->fresh && store->touched < store->slots_count && store->touched < (uint64_t)store->fresh + store->touch_step;
}

/* store_spill.c */
int spill_start(struct store *store, fl_error *error);  /* starts the thread, which holds a reference */
void file_free(struct store *store, uint64_t slot);     /* under the lock */
/* Not under the lock. Slots first, first + 1, … of the file, whose checksums are `sums`, into `buffer`; or a part of one. -EIO: not what was written there. */
int file_read(struct store *store, uint32_t first, const uint32_t *sums, uint32_t count, char *buffer, fl_error *error);
int file_read_part(struct store *store, uint32_t slot, uint32_t sum, char *buffer, size_t skip, size_t length, fl_error *error);

#endif
