/* epoch.c: see epoch.h. */
#define _GNU_SOURCE
#include "epoch.h"

static atomic_uint next_slot;
static _Thread_local unsigned my_slot = UINT32_MAX;

unsigned epoch_slot(void)
{
    if (UNLIKELY(my_slot == UINT32_MAX))
        my_slot = atomic_fetch_add_explicit(&next_slot, 1, memory_order_relaxed) & (EPOCH_SLOTS - 1);
    return my_slot;
}

uint64_t epoch_ticket(struct epoch *epoch)
{
    full_fence();               /* the taking away, then the look */
    return atomic_load(&epoch->now);
}

/* One step on, if nobody of the epoch before this one is inside. Counts of that parity only come down, but for those that step back at once: one
   look at each slot, in any order, is enough. */
static bool advance(struct epoch *epoch)
{
    uint64_t now = atomic_load(&epoch->now);
    full_fence();
    for (unsigned i = 0; i < EPOCH_SLOTS; i++)
        if (atomic_load(&epoch->slot[i].inside[(now + 1) & 1]))
            return false;
    return atomic_compare_exchange_strong(&epoch->now, &now, now + 1);
}

bool epoch_passed(struct epoch *epoch, uint64_t ticket)
{
    while (atomic_load(&epoch->now) < ticket + 2)
        if (!advance(epoch) && atomic_load(&epoch->now) < ticket + 2)
            return false;
    return true;
}
