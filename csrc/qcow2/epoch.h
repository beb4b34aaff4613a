/* epoch.h: who may still be using what was taken away. Transfers enter and leave without touching a shared cache line, nobody waits for them, and
 * whoever took something away asks later whether all transfers that may know of it have left.
 *
 * A transfer counts itself in its thread's slot, under the parity of the epoch that it found. The epoch goes from e to e + 1 only when nobody
 * of e - 1 is inside any more. What was taken away in epoch e can be known to transfers of e and before only: it is free in epoch e + 2.
 *
 *   transfer:  epoch_enter; look up; use; epoch_leave
 *   taker:     take away (unlink); ticket = epoch_ticket(); ... epoch_passed(ticket)
 *
 * A transfer that enters in e + 1 or later finds the thing gone: the epoch was read by the taker after the taking away, was changed to e + 1
 * after that, and was read by the transfer before its look. All of these are sequentially consistent.
 */
#ifndef FL_QCOW2_EPOCH_H
#define FL_QCOW2_EPOCH_H

#include "../util/util.h"

#define EPOCH_SLOTS 32u         /* a power of two */

struct epoch {
    struct { _Alignas(CACHE_LINE) atomic_long inside[2]; } slot[EPOCH_SLOTS];
    _Alignas(CACHE_LINE) _Atomic uint64_t now;
};

unsigned epoch_slot(void);      /* of the thread that calls */

/* Returns what epoch_leave wants, from the same thread. Passes may nest. */
static inline unsigned epoch_enter(struct epoch *epoch)
{
    unsigned slot = epoch_slot();
    for (;;) {
        uint64_t now = atomic_load(&epoch->now);
        atomic_fetch_add(&epoch->slot[slot].inside[now & 1], 1);
        full_fence();
        /* Counted under `now` while it was still that: so it can go on by one, but not by two, until we leave. Else step back. */
        if (LIKELY(atomic_load(&epoch->now) == now))
            return slot * 2 + (unsigned)(now & 1);
        atomic_fetch_sub(&epoch->slot[slot].inside[now & 1], 1);
    }
}

static inline void epoch_leave(struct epoch *epoch, unsigned pass)
{
    atomic_fetch_sub(&epoch->slot[pass / 2].inside[pass & 1], 1);
}

uint64_t epoch_ticket(struct epoch *epoch);
bool epoch_passed(struct epoch *epoch, uint64_t ticket);

#endif
