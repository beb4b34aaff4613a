/* gate.c: see gate.h.
 *
 * A user adds one to the counter of its thread's slot and then looks at `state`; the closer changes `state` and then looks at the counters.
 * Both in sequentially consistent order, so at least one of them sees the other: a user that the closer does not see sees the closed
 * gate and steps back. The closer has a full fence in between all the same: emulators of arm64 let its `ldar` pass its `stlr`.
 */
#define _GNU_SOURCE
#include "gate.h"

enum { GATE_OPEN, GATE_CLOSED, GATE_SHUT };

static atomic_uint next_slot;
static _Thread_local unsigned my_slot = UINT32_MAX;

static inline atomic_long *my_counter(struct gate *gate)
{
    if (UNLIKELY(my_slot == UINT32_MAX))
        my_slot = atomic_fetch_add_explicit(&next_slot, 1, memory_order_relaxed) & (GATE_SLOTS - 1);
    return &gate->slot[my_slot].inside;
}

int gate_init(struct gate *gate)
{
    memset(gate, 0, sizeof *gate);
    gate->generation = fl_generation;
    int rc = -pthread_mutex_init(&gate->lock, NULL);
    if (rc == 0 && (rc = cond_init(&gate->changed)) != 0)
        pthread_mutex_destroy(&gate->lock);
    return rc;
}

void gate_destroy(struct gate *gate)
{
    pthread_cond_destroy(&gate->changed);
    pthread_mutex_destroy(&gate->lock);
}

void gate_leave(struct gate *gate)
{
    atomic_fetch_sub(my_counter(gate), 1);      /* releases all that was done inside to the closer that sees 0. Then the look: as in gate_enter */
    if (UNLIKELY(atomic_load(&gate->state) != GATE_OPEN)) {
        pthread_mutex_lock(&gate->lock);        /* pairs with the closer's look at the counters under the lock */
        pthread_cond_broadcast(&gate->changed);
        pthread_mutex_unlock(&gate->lock);
    }
}

int gate_enter(struct gate *gate)
{
    if (UNLIKELY(gate->generation != fl_generation))
        return -FL_EFORKED;
    for (;;) {
        /* Count, then look; the closer changes `state`, then looks at the counters. All four are sequentially consistent, so one of us sees the other.
           The look acquires what was done while it was closed (disk->snapshots). */
        atomic_fetch_add(my_counter(gate), 1);
        if (LIKELY(atomic_load(&gate->state) == GATE_OPEN))
            return 0;
        gate_leave(gate);
        pthread_mutex_lock(&gate->lock);
        while (atomic_load(&gate->state) == GATE_CLOSED)
            pthread_cond_wait(&gate->changed, &gate->lock);
        bool shut = atomic_load(&gate->state) == GATE_SHUT;
        pthread_mutex_unlock(&gate->lock);
        if (shut)
            return -FL_ECLOSED;
    }
}

int gate_pass(struct gate *gate, const char *what, fl_error *error)
{
    int rc = gate_enter(gate);
    if (rc == -FL_ECLOSED)
        fail(error, FL_ECLOSED, FL_SIDE_NONE, 0, 0, "the %s is closed", what);
    else if (rc)
        fail(error, -rc, FL_SIDE_NONE, 0, 0, "the %s belongs to the parent process: it can't be used after fork()", what);
    return rc;
}

bool gate_is_empty(struct gate *gate)
{
    for (int i = 0; i < GATE_SLOTS; i++)
        if (atomic_load(&gate->slot[i].inside))     /* pairs with gate_enter and gate_leave */
            return false;
    return true;
}

int gate_bar(struct gate *gate)
{
    if (gate->generation != fl_generation)
        return -FL_EFORKED;
    int rc = 0;
    pthread_mutex_lock(&gate->lock);
    while (atomic_load(&gate->state) == GATE_CLOSED)        /* another cut */
        pthread_cond_wait(&gate->changed, &gate->lock);
    if (atomic_load(&gate->state) == GATE_SHUT)
        rc = -FL_ECLOSED;
    else
        atomic_store(&gate->state, GATE_CLOSED);
    full_fence();               /* then the looks of gate_drain */
    pthread_mutex_unlock(&gate->lock);
    return rc;
}

int gate_drain(struct gate *gate, uint64_t deadline)
{
    int rc = 0;
    pthread_mutex_lock(&gate->lock);
    while (!gate_is_empty(gate))
        if (!cond_wait_until(&gate->changed, &gate->lock, deadline) && !gate_is_empty(gate)) {
            atomic_store(&gate->state, GATE_OPEN);
            pthread_cond_broadcast(&gate->changed);
            rc = -ETIMEDOUT;
            break;
        }
    pthread_mutex_unlock(&gate->lock);
    return rc;
}

int gate_close(struct gate *gate, uint64_t deadline)
{
    int rc = gate_bar(gate);
    return rc ? rc : gate_drain(gate, deadline);
}

void gate_open(struct gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    atomic_store(&gate->state, GATE_OPEN);
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->lock);
}

bool gate_shut(struct gate *gate) { return gate_shut_until(gate, UINT64_MAX / 2); }

bool gate_shut_until(struct gate *gate, uint64_t deadline)
{
    if (gate->generation != fl_generation)
        return false;
    pthread_mutex_lock(&gate->lock);
    while (atomic_load(&gate->state) == GATE_CLOSED)
        pthread_cond_wait(&gate->changed, &gate->lock);
    bool first = atomic_load(&gate->state) != GATE_SHUT;
    atomic_store(&gate->state, GATE_SHUT);
    full_fence();
    pthread_cond_broadcast(&gate->changed);
    while (!gate_is_empty(gate) && cond_wait_until(&gate->changed, &gate->lock, deadline))
        ;
    pthread_mutex_unlock(&gate->lock);
    return first;
}
