/* store.c: the stage: slots of memory, the map, and waiting for room. The fleecing image behind it is store_spill.c's.
 *
 * I5: a slot goes back to the free list only in slot_free, which is reached when nothing in the map points at it and `pins` is 0. Readers pin under
 * the lock that they looked the place up with; the spiller pins what it writes. A spill that hangs so keeps its slots, in memory and in the
 * file, until it ends, and nobody waits for it: it holds a reference to the store.
 */
#define _GNU_SOURCE
#include "store_internal.h"

#include <stdlib.h>
#include <sys/mman.h>

#define CLOSE_GRACE_NS 200000000u       /* how long close waits for a spill that makes progress */
/* What one spill writes at most. The page cache takes pages as large as the write; large ones are what a virtual machine gives back to its host when
   they are free, and each costs a fault there: a spill of 4 MiB took twice the processor time, and first writes of 1 MiB went half as fast. */
#define BATCH_BYTES (256u << 10)
#define DIRECT_BATCH_BYTES (4u << 20)
#define LOT_BYTES (4u << 20)            /* see spill_end */
#define RESERVE_BYTES (1u << 20)

/* ---- slots, under the lock ---- */

/* First come, first served: whoever asks for much is not overtaken for ever by those that ask for little. */
void grant_room(struct store *store)
{
    struct waiter *waiter;
    while ((waiter = store->first_waiter) != NULL && room(store) >= waiter->need) {
        store->reserved += waiter->need;
        waiter->granted = true;
        store->first_waiter = waiter->next;
        if (!store->first_waiter)
            store->last_waiter = &store->first_waiter;
        pthread_cond_signal(&waiter->wake);
    }
}

/* One that is free again, to whoever waits for room. */
static void slot_is_free(struct store *store, uint32_t i)
{
    store->slots[i].state = SLOT_FREE;
    store->in_use--;
    store->stalled = false;
    if (!store->gathering)
        grant_room(store);
}

/* To the end of the list, to be used again as late as can be: its memory is in the cache of the processor that spilled it or copied it to the backup, and where
   the writer's has another one, a write to what is there waits for it line by line. That is six times slower than to memory that is in neither. */
void slot_free(struct store *store, uint32_t i)
{
    store->slots[i].next = NO_SLOT;
    *(store->free_head == NO_SLOT ? &store->free_head : &store->slots[store->free_tail].next) = i;
    store->free_tail = i;
    slot_is_free(store, i);
}

/* One that nobody but the writer has used: to the front. */
static void slot_give_back(struct store *store, uint32_t i)
{
    store->slots[i].next = store->free_head;
    if (store->free_head == NO_SLOT)
        store->free_tail = i;
    store->free_head = i;
    slot_is_free(store, i);
}

void slot_unpin(struct store *store, uint32_t i)
{
    struct slot *slot = &store->slots[i];
    if (--slot->pins == 0 && slot->state == SLOT_ORPHAN)
        slot_free(store, i);
}

void slot_drop(struct store *store, uint32_t i)
{
    store->slots[i].state = SLOT_ORPHAN;
    if (store->slots[i].pins == 0)
        slot_free(store, i);
}

void stage_unlink(struct store *store, uint32_t i)
{
    struct slot *slot = &store->slots[i];
    *(slot->prev == NO_SLOT ? &store->oldest : &store->slots[slot->prev].next) = slot->next;
    *(slot->next == NO_SLOT ? &store->newest : &store->slots[slot->next].prev) = slot->prev;
    store->staged--;
}

static void stage_append(struct store *store, uint32_t i)
{
    struct slot *slot = &store->slots[i];
    slot->state = SLOT_STAGED;
    slot->prev = store->newest;
    slot->next = NO_SLOT;
    *(slot->prev == NO_SLOT ? &store->oldest : &store->slots[slot->prev].next) = i;
    store->newest = i;
    store->staged++;
}

/* ---- taking room ---- */

uint32_t store_slots(const struct store *store) { return store->slots_count; }

char *store_memory(const struct store *store, uint32_t slot) { return store->memory + ((size_t)slot << store->shift); }

int store_take(struct store *store, uint64_t first, uint32_t count, uint32_t *credit, uint32_t *slots)
{
    int rc = -EAGAIN;
    pthread_mutex_lock(&store->lock);
    if ((store->first_waiter && *credit < count) || room(store) + *credit < count)
        goto out;
    uint32_t used = MIN(*credit, count);
    store->reserved -= used;
    *credit -= used;
    store->in_use += count;
    for (uint32_t n = 0; n < count; n++) {
        /* Once half of the stage is in use, all of it may be: what is in the list then lies there for as long as possible. */
        bool fresh_first = store->in_use > store->slots_count / 2 && store->fresh < store->slots_count;
        uint32_t i = store->free_head;
        if (i == NO_SLOT || fresh_first)
            i = store->fresh++;
        else
            store->free_head = store->slots[i].next;
        store->slots[i].state = SLOT_TAKEN;
        slots[n] = i;
    }
    map_expect(&store->map, first);
    if (touch_due(store))
        wake_spiller(store);
    rc = 0;
out:
    pthread_mutex_unlock(&store->lock);
    return rc;
}

void store_give_back(struct store *store, const uint32_t *slots, uint32_t count)
{
    if (!count)
        return;
    pthread_mutex_lock(&store->lock);
    while (count--)
        slot_give_back(store, slots[count]);
    pthread_mutex_unlock(&store->lock);
}

void store_return_credit(struct store *store, uint32_t *credit)
{
    if (!*credit)
        return;
    pthread_mutex_lock(&store->lock);
    store->reserved -= *credit;
    *credit = 0;
    grant_room(store);
    pthread_mutex_unlock(&store->lock);
}

static void waiter_leave(struct store *store, struct waiter *waiter)
{
    struct waiter **link = &store->first_waiter;
    while (*link != waiter)
        link = &(*link)->next;
    *link = waiter->next;
    if (!*link)
        store->last_waiter = link;
    grant_room(store);          /* the next one may ask for less */
}

int store_wait(struct store *store, uint32_t count, uint64_t deadline, uint32_t *credit)
{
    struct waiter waiter = { .need = count };
    int rc = cond_init(&waiter.wake);
    if (rc)
        return rc;
    pthread_mutex_lock(&store->lock);
    store->stats.room_waits++;
    *store->last_waiter = &waiter;
    store->last_waiter = &waiter.next;
    grant_room(store);
    wake_spiller(store);
    while (!waiter.granted) {
        if (store->aborted)
            rc = -FL_ECLOSED;
        else if (store->stalled || now_ns() >= deadline)
            rc = -ETIMEDOUT;
        if (rc)
            break;
        cond_wait_until(&waiter.wake, &store->lock, slice_end(deadline));
        grant_room(store);      /* of the lot that a spill gathers; it may hang */
        if (waiter.granted)
            break;
        pthread_mutex_unlock(&store->lock);     /* the hook runs foreign code */
        bool stop = interrupted();
        pthread_mutex_lock(&store->lock);
        if (stop && !waiter.granted) {
            rc = -FL_EINTERRUPTED;
            break;
        }
    }
    if (waiter.granted) {
        *credit += count;
        rc = 0;
    } else {
        waiter_leave(store, &waiter);
        if (rc == -ETIMEDOUT) {
            store->stats.room_timeouts++;
            store->stalled = true;
        }
    }
    pthread_mutex_unlock(&store->lock);
    pthread_cond_destroy(&waiter.wake);
    return rc;
}

bool store_stalled(struct store *store)
{
    pthread_mutex_lock(&store->lock);
    bool stalled = store->stalled;
    pthread_mutex_unlock(&store->lock);
    return stalled;
}

void store_explain(struct store *store, uint64_t waited, fl_error *error)
{
    double seconds = (double)waited / 1e9;
    uint64_t stage = (uint64_t)store->slots_count << store->shift;
    pthread_mutex_lock(&store->lock);
    if (!store->fleecing)
        fail(error, ENOSPC, FL_SIDE_FLEECING, 0, 0, "no room for old data: the stage of %llu bytes is full, and there is no fleecing image "
             "(waited %.3f s)", (unsigned long long)stage, seconds);
    else if (store->spill_error.code)
        fail(error, store->spill_error.cause, FL_SIDE_FLEECING, store->spill_error.offset, store->spill_error.length,
             "no room for old data: the stage of %llu bytes is full, and spilling it failed (waited %.3f s): %.200s",
             (unsigned long long)stage, seconds, store->spill_error.text);
    else if (store->file_full)
        fail(error, ENOSPC, FL_SIDE_FLEECING, 0, 0, "no room for old data: the stage of %llu bytes and the %llu bytes of the fleecing image %.150s "
             "that may be used are full (waited %.3f s)", (unsigned long long)stage,
             (unsigned long long)(store->file_slots << store->shift), store->fleecing->name, seconds);
    else
        fail(error, ETIMEDOUT, FL_SIDE_FLEECING, 0, 0, "no room for old data: the stage of %llu bytes is full, and the fleecing image %.150s "
             "takes it too slowly (waited %.3f s; a write to it has been running for %.3f s)", (unsigned long long)stage, store->fleecing->name,
             seconds, store->spill_began ? (double)(now_ns() - store->spill_began) / 1e9 : 0.0);
    pthread_mutex_unlock(&store->lock);
}

/* ---- putting, reading, freeing ---- */

/* Under the lock. */
static void forget(struct store *store, uint64_t place)
{
    if (place == PLACE_NONE)
        return;
    uint32_t i = place_slot(place);
    if (place_is_file(place)) {
        file_free(store, place_slot(place));
    } else {
        if (store->slots[i].state == SLOT_STAGED)
            stage_unlink(store, i);
        slot_drop(store, i);
    }
}

int store_publish(struct store *store, uint64_t first, const uint32_t *slots, uint32_t count)
{
    int rc = 0;
    pthread_mutex_lock(&store->lock);
    if (store->aborted)
        rc = -FL_ECLOSED;
    for (uint32_t n = 0; n < count && rc == 0; n++) {
        rc = map_put(&store->map, first + n, place_memory(slots[n]));
        if (rc)
            while (n--)
                map_remove(&store->map, first + n);
    }
    if (rc)
        goto out;
    for (uint32_t n = 0; n < count; n++) {
        store->slots[slots[n]].cluster = first + n;
        stage_append(store, slots[n]);
    }
    store->stats.staged_peak = MAX(store->stats.staged_peak, (uint64_t)(store->staged + store->spilling) << store->shift);
    if (store->staged > store->spill_above || store->first_waiter)      /* who waited before there was anything to spill waits for this */
        wake_spiller(store);
out:
    pthread_mutex_unlock(&store->lock);
    return rc;
}

/* Longest run that one look at the map serves. */
#define READ_RUN 64u

struct piece { uint64_t place; char *buffer; size_t skip, length; };

/* Copy out what is in memory, and unpin it: before any read of the file, which may hang while a writer wants the room. */
static void copy_pieces(struct store *store, const struct piece *pieces, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        if (!place_is_file(pieces[i].place))
            memcpy(pieces[i].buffer, store_memory(store, place_slot(pieces[i].place)) + pieces[i].skip, pieces[i].length);
    pthread_mutex_lock(&store->lock);
    for (unsigned i = 0; i < count; i++)
        if (!place_is_file(pieces[i].place))
            slot_unpin(store, place_slot(pieces[i].place));
    pthread_mutex_unlock(&store->lock);
}

/* Read what is in the file: whole clusters that are neighbours there at once. */
static int read_pieces(struct store *store, const struct piece *pieces, unsigned count, fl_error *error)
{
    int rc = 0;
    for (unsigned i = 0, run; i < count && rc == 0; i += run) {
        uint32_t sums[READ_RUN], first = place_slot(pieces[i].place);
        run = 1;
        if (!place_is_file(pieces[i].place))
            continue;
        if (pieces[i].length < store->cluster_size) {
            rc = file_read_part(store, first, place_sum(pieces[i].place), pieces[i].buffer, pieces[i].skip, pieces[i].length, error);
            continue;
        }
        sums[0] = place_sum(pieces[i].place);
        for (; i + run < count; run++) {
            const struct piece *next = &pieces[i + run];
            if (!place_is_file(next->place) || place_slot(next->place) != first + run || next->length < store->cluster_size)
                break;
            sums[run] = place_sum(next->place);
        }
        rc = file_read(store, first, sums, run, pieces[i].buffer, error);
    }
    return rc;
}

int store_read(struct store *store, void *buffer, size_t length, uint64_t offset, fl_error *error)
{
    char *to = buffer;
    int rc = 0;
    while (length && rc == 0) {
        struct piece pieces[READ_RUN];
        unsigned count = 0;
        pthread_mutex_lock(&store->lock);
        if (store->aborted) {
            pthread_mutex_unlock(&store->lock);
            return STORE_HAS_NOT;
        }
        while (length && count < READ_RUN) {
            uint64_t place = map_get(&store->map, offset >> store->shift);
            if (place == PLACE_NONE) {
                rc = STORE_HAS_NOT;
                break;
            }
            if (!place_is_file(place))
                store->slots[place_slot(place)].pins++;
            size_t skip = offset & (store->cluster_size - 1), part = MIN(length, store->cluster_size - skip);
            pieces[count++] = (struct piece){ place, to, skip, part };
            to += part;
            offset += part;
            length -= part;
        }
        store->file_readers++;
        pthread_mutex_unlock(&store->lock);
        copy_pieces(store, pieces, count);
        int read_rc = read_pieces(store, pieces, count, error);
        rc = read_rc ? read_rc : rc;
        pthread_mutex_lock(&store->lock);
        store->file_readers--;
        pthread_mutex_unlock(&store->lock);
    }
    return rc;
}

#define FREE_RUN 1024u          /* clusters forgotten in one hold of the lock */

void store_free(struct store *store, uint64_t first, uint64_t count)
{
    while (count) {
        uint64_t run = MIN(count, FREE_RUN);
        pthread_mutex_lock(&store->lock);
        for (uint64_t n = 0; n < run; n++)
            forget(store, map_remove(&store->map, first + n));
        pthread_mutex_unlock(&store->lock);
        first += run;
        count -= run;
    }
}

bool store_oldest(struct store *store, uint64_t *cluster)
{
    pthread_mutex_lock(&store->lock);
    bool near = store->staged && store->staged + store->spilling >= store->hot_from;
    if (near)
        *cluster = store->slots[store->oldest].cluster;
    pthread_mutex_unlock(&store->lock);
    return near;
}

/* ---- life ---- */

int store_create(const struct store_options *options, struct store **out, fl_error *error)
{
    int rc = 0;
    struct store *store = calloc(1, sizeof *store);
    if (!store)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for the store of a snapshot");
    store->cluster_size = options->cluster_size;
    store->shift = (uint32_t)__builtin_ctz(options->cluster_size);
    store->slots_count = (uint32_t)MIN(options->stage_size >> store->shift, PLACE_MOST_SLOTS);
    uint32_t batch = options->fleecing && options->fleecing->direct ? DIRECT_BATCH_BYTES : BATCH_BYTES;
    store->touch_step = MAX(1u, TOUCH_BYTES >> store->shift);
    store->batch = MAX(1u, MIN(MIN(BATCH_SLOTS, batch >> store->shift), store->slots_count / 4));
    store->spill_above = store->slots_count / 2 + store->slots_count / 4;
    store->spill_down_to = store->slots_count / 2;
    store->lot = MIN(store->slots_count / 16, LOT_BYTES >> store->shift);
    store->hot_from = store->slots_count / 8;
    store->reserve_step = MAX(1u, RESERVE_BYTES >> store->shift);
    store->reserves = true;
    atomic_init(&store->references, 1);
    store->free_head = store->free_tail = store->oldest = store->newest = NO_SLOT;
    store->last_waiter = &store->first_waiter;
    map_init(&store->map);
    if ((rc = mutex_init_spinning(&store->lock)) || (rc = cond_init(&store->work)) || (rc = cond_init(&store->ended))) {
        free(store);
        return fail(error, -rc, FL_SIDE_NONE, 0, 0, "cannot make the locks of a snapshot");
    }
    store->mapped = (size_t)store->slots_count << store->shift;
    store->memory = mmap(NULL, store->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    store->slots = calloc(store->slots_count, sizeof *store->slots);
    if (store->memory == MAP_FAILED || !store->slots) {
        store->memory = store->memory == MAP_FAILED ? NULL : store->memory;
        rc = fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a stage of %zu bytes", store->mapped);
        goto out;
    }
    if (options->fleecing) {
        uint64_t bytes = options->fleecing->size;
        rc = image_take(options->fleecing, "a fleecing image", error);
        if (rc) {
            if (error)
                error->side = FL_SIDE_FLEECING;
            goto out;
        }
        store->fleecing = options->fleecing;
        if (options->fleecing_limit)
            bytes = MIN(bytes, options->fleecing_limit);
        store->file_slots = MIN(bytes >> store->shift, PLACE_MOST_SLOTS);
        if (!store->file_slots) {
            rc = fail(error, EINVAL, FL_SIDE_FLEECING, 0, 0, "%.200s: %llu bytes of a fleecing image can't hold one cluster of %u bytes",
                      store->fleecing->name, (unsigned long long)bytes, store->cluster_size);
            goto out;
        }
        if ((rc = bitmap_init(&store->file_used, store->file_slots)) || (rc = bitmap_init(&store->file_stale, store->file_slots))) {
            fail(error, -rc, FL_SIDE_NONE, 0, 0, "no memory for the map of a fleecing image");
            goto out;
        }
        rc = spill_start(store, error);
    }
out:
    if (rc)
        store_unref(store);
    else
        *out = store;
    return rc;
}

struct store *store_ref(struct store *store)
{
    atomic_fetch_add(&store->references, 1);
    return store;
}

void store_unref(struct store *store)
{
    if (store && atomic_fetch_sub(&store->references, 1) == 1)
        store_destroy(store);
}

void store_destroy(struct store *store)
{
    map_destroy(&store->map);
    bitmap_destroy(&store->file_used);
    bitmap_destroy(&store->file_stale);
    free(store->slots);
    if (store->memory)
        munmap(store->memory, store->mapped);
    if (store->fleecing)
        image_untake(store->fleecing);
    image_unref(store->fleecing);
    pthread_cond_destroy(&store->work);
    pthread_cond_destroy(&store->ended);
    pthread_mutex_destroy(&store->lock);
    free(store);
}

/* Under the lock. */
static void wake_waiters(struct store *store)
{
    for (struct waiter *waiter = store->first_waiter; waiter; waiter = waiter->next)
        pthread_cond_signal(&waiter->wake);
}

void store_abort(struct store *store)
{
    pthread_mutex_lock(&store->lock);
    store->aborted = true;
    wake_waiters(store);
    wake_spiller(store);
    pthread_mutex_unlock(&store->lock);
}

void store_close(struct store *store)
{
    store_abort(store);
    pthread_mutex_lock(&store->lock);
    store->closed = true;
    wake_spiller(store);
    uint64_t deadline = now_ns() + CLOSE_GRACE_NS;
    while (store->spiller_runs && cond_wait_until(&store->ended, &store->lock, deadline))
        ;
    pthread_mutex_unlock(&store->lock);
}

void store_stats(struct store *store, fl_stats *stats)
{
    pthread_mutex_lock(&store->lock);
    stats->staged_bytes = (uint64_t)(store->staged + store->spilling) << store->shift;
    stats->staged_peak = store->stats.staged_peak;
    stats->fleecing_bytes = store->file_in_use << store->shift;
    stats->fleecing_peak = store->stats.fleecing_peak;
    stats->bytes_spilled = store->stats.bytes_spilled;
    stats->spill_errors = store->stats.spill_errors;
    stats->room_waits = store->stats.room_waits;
    stats->room_timeouts = store->stats.room_timeouts;
    pthread_mutex_unlock(&store->lock);
}
