/* store_spill.c: the fleecing image behind the stage, and the thread that fills it.
 *
 * The spiller is the only one that takes slots of the file; frees come from anybody. It takes the oldest staged clusters and writes them as one run of
 * free slots: random guest writes become sequential fleecing writes. New runs go behind all others while little below is free, so they stay
 * long; once a third of the file's slots is free, those are used again. What is free and was written is punched out in long runs now and then, and
 * wholly when nothing is in use.
 *
 * A write that succeeded is only in the page cache; if the disk then fails to take it, the kernel may forget it, and later reads get what was there before.
 * So every cluster has a checksum in the map, and a read of the file returns what was written or fails.
 *
 * A spill that fails loses nothing: its clusters stay staged, as the oldest, and are tried again (after a growing pause, or when something is freed).
 */
#define _GNU_SOURCE
#include "store_internal.h"

#include <stdlib.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23          /* in older headers; Linux 5.14 */
#endif
#define PUNCH_BYTES (8u << 20)          /* punch when as much has been freed, or an eighth of the file, whatever is more */
#define PUNCH_SCAN 262144u              /* slots looked at in one hold of the lock */
#define PUNCH_RUN (64u << 10)           /* shorter stale runs stay for use again */
#define RETRY_FIRST_NS 20000000u
#define RETRY_MOST_NS 1000000000u

/* ---- slots of the file, under the lock ---- */

static void bits_set(struct bitmap *bitmap, uint64_t first, uint64_t count)
{
    for (uint64_t end = first + count, next; first < end; first = next) {
        next = MIN(end, (first | 63) + 1);
        bitmap_fetch_or(bitmap, first >> 6, word_mask(first >> 6, first, next));
    }
}

static bool punch_due(const struct store *store)
{
    if (!store->fleecing->punches || !store->file_high)
        return false;
    return store->file_in_use == 0 || store->punch_cursor ||
           store->freed_since_punch >= MAX(PUNCH_BYTES >> store->shift, store->file_high / 8);
}

void file_free(struct store *store, uint64_t slot)
{
    bitmap_clear(&store->file_used, slot, 1);
    bits_set(&store->file_stale, slot, 1);
    store->file_in_use--;
    store->freed_since_punch++;
    store->stalled = false;
    bool space_at_last = store->file_full || (store->retry_at && store->spill_error.cause == ENOSPC);
    if (space_at_last) {
        store->file_full = false;
        store->retry_at = 0;
    }
    if (space_at_last || punch_due(store))
        wake_spiller(store);
}

/* Take a run of up to `want` free slots: returns its length, 0 when the file is full. */
static uint32_t file_take(struct store *store, uint32_t want, uint64_t *first)
{
    uint64_t free_below = store->file_high - store->file_in_use, run = 0;
    *first = 0;
    bool use_again = store->file_high == store->file_slots ||
                     free_below >= MAX(4 * (uint64_t)store->batch, store->file_in_use / 2);
    if (!use_again) {
        run = MIN(want, store->file_slots - store->file_high);
        *first = store->file_high;
        store->file_high += run;
    } else if (free_below) {
        uint64_t from = bitmap_next_clear(&store->file_used, store->file_cursor, store->file_high);
        if (from == store->file_high)
            from = bitmap_next_clear(&store->file_used, 0, store->file_high);
        run = bitmap_next_set(&store->file_used, from, MIN(from + want, store->file_high)) - from;
        *first = from;
        store->file_cursor = from + run;
        bitmap_clear(&store->file_stale, from, run);
    }
    bits_set(&store->file_used, *first, run);
    store->file_in_use += run;
    store->stats.fleecing_peak = MAX(store->stats.fleecing_peak, store->file_in_use << store->shift);
    return (uint32_t)run;
}

/* ---- reading it ---- */

/* 32 bits over whole 32-byte blocks; clusters are. Four lanes, so that the multiplications overlap: about as fast as memory, if the lanes are in registers,
   for which the compiler must be told to unroll them at -O2. */
static uint32_t checksum(const void *data, size_t length)
{
    const uint64_t factor = UINT64_C(0x9fb21c651e98df25);
    uint64_t lane[4] = { 1, 2, 3, 4 }, word[4], sum = 0;
    for (const char *at = data, *end = at + length; at < end; at += sizeof word) {
        memcpy(word, at, sizeof word);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            lane[i] = (lane[i] ^ word[i]) * factor;
            lane[i] ^= lane[i] >> 29;
        }
    }
    for (int i = 0; i < 4; i++)
        sum = (sum ^ lane[i] ^ lane[i] >> 32) * factor;
    return (uint32_t)(sum >> 32);
}

int file_read(struct store *store, uint32_t first, const uint32_t *sums, uint32_t count, char *buffer, fl_error *error)
{
    uint64_t offset = (uint64_t)first << store->shift;
    int rc = image_read(store->fleecing, buffer, (size_t)count << store->shift, offset, error);
    for (uint32_t n = 0; n < count && rc == 0; n++)
        if (checksum(buffer + ((size_t)n << store->shift), store->cluster_size) != sums[n])
            rc = fail(error, EIO, FL_SIDE_FLEECING, offset + ((uint64_t)n << store->shift), store->cluster_size, "fleecing image %.200s did not keep what was "
                      "written to it at %llu: the checksum differs", store->fleecing->name, (unsigned long long)(offset + ((uint64_t)n << store->shift)));
    if (rc && error)
        error->side = FL_SIDE_FLEECING;
    return rc;
}

int file_read_part(struct store *store, uint32_t slot, uint32_t sum, char *buffer, size_t skip, size_t length, fl_error *error)
{
    char *whole = malloc(store->cluster_size);
    if (!whole)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory to read a cluster of %u bytes", store->cluster_size);
    int rc = file_read(store, slot, &sum, 1, whole, error);
    if (rc == 0)
        memcpy(buffer, whole + skip, length);
    free(whole);
    return rc;
}

/* ---- spilling ---- */

struct batch {
    uint32_t count;
    uint64_t first;             /* slots first, first + 1, … of the file */
    uint32_t slots[BATCH_SLOTS];        /* of the stage, oldest first */
    uint32_t sums[BATCH_SLOTS];
};

/* Under the lock: choose what to write and where. false: nothing to do, or no space. */
static bool spill_begin(struct store *store, struct batch *batch)
{
    batch->count = file_take(store, MIN(store->batch, store->staged), &batch->first);
    if (!batch->count) {
        store->file_full = true;
        grant_room(store);
        return false;
    }
    for (uint32_t n = 0; n < batch->count; n++) {
        uint32_t i = store->oldest;
        stage_unlink(store, i);
        store->slots[i].state = SLOT_SPILLING;
        store->slots[i].pins++;
        batch->slots[n] = i;
    }
    store->spilling += batch->count;
    store->spill_began = now_ns();
    return true;
}

/* Have the places of slots found that will be written next. What is beyond `end` is given back with all that is free (punch, dismantle). */
static void reserve(struct store *store, uint64_t end)
{
    if (!store->reserves || end <= store->file_reserved)
        return;
    uint64_t from = store->file_reserved;
    store->file_reserved = MIN(store->file_slots, MAX(end, from + store->reserve_step));
    store->reserves = image_reserve(store->fleecing, (store->file_reserved - from) << store->shift, from << store->shift);
}

static int spill_write(struct store *store, struct batch *batch, fl_error *error)
{
    struct iovec iov[BATCH_SLOTS];
    int entries = 0;
    for (uint32_t n = 0; n < batch->count; n++) {
        char *memory = store_memory(store, batch->slots[n]);
        batch->sums[n] = checksum(memory, store->cluster_size);
        if (entries && (char *)iov[entries - 1].iov_base + iov[entries - 1].iov_len == memory)
            iov[entries - 1].iov_len += store->cluster_size;
        else
            iov[entries++] = (struct iovec){ memory, store->cluster_size };
    }
    reserve(store, batch->first + batch->count);
    int rc = image_writev(store->fleecing, iov, entries, batch->first << store->shift, error);
    if (rc)
        error->side = FL_SIDE_FLEECING;
    return rc;
}

/* Under the lock: the clusters live in the file now, or are staged again; those freed meanwhile are freed for good. What is staged again is put before the
   oldest from the youngest back, so that it keeps its order.
   Those who wait for room are let in when there is a lot of it, and then as many as it is enough for: were they woken as slots become free, a processor that has
   gone idle would be waked each time for some microseconds of work, and that takes longer than the work. No later than when there is no more to be made; and who
   waits has a look now and then, should the next spill hang (store_wait). */
static void spill_end(struct store *store, const struct batch *batch, int rc)
{
    bool stalled = store->stalled;
    store->spilling -= batch->count;
    store->spill_began = 0;
    store->gathering = true;
    for (uint32_t n = 0; n < batch->count; n++)
        map_expect(&store->map, store->slots[batch->slots[n]].cluster);
    for (uint32_t done = 0; done < batch->count; done++) {
        uint32_t n = rc ? batch->count - 1 - done : done, i = batch->slots[n];
        struct slot *slot = &store->slots[i];
        bool wanted = slot->state == SLOT_SPILLING;
        slot->pins--;
        if (wanted && rc == 0) {
            map_put(&store->map, slot->cluster, place_file((uint32_t)(batch->first + n), batch->sums[n]));      /* replaces: cannot fail */
            store->stats.bytes_spilled += store->cluster_size;
        } else {
            file_free(store, batch->first + n);
        }
        if (wanted && rc) {
            slot->state = SLOT_STAGED;
            slot->prev = NO_SLOT;
            slot->next = store->oldest;
            *(slot->next == NO_SLOT ? &store->newest : &store->slots[slot->next].prev) = i;
            store->oldest = i;
            store->staged++;
        } else {
            slot_drop(store, i);
        }
    }
    store->gathering = false;
    if (rc || !store->staged || room(store) >= store->lot)
        grant_room(store);
    if (rc)
        store->stalled = stalled;       /* what this batch had taken of the file and gave back is no progress */
}

static void spill_failed(struct store *store, const fl_error *error)
{
    store->spill_error = *error;
    store->stats.spill_errors++;
    store->retry_delay = store->retry_delay ? MIN(store->retry_delay * 2, RETRY_MOST_NS) : RETRY_FIRST_NS;
    store->retry_at = now_ns() + store->retry_delay;
}

/* Under the lock, which is let go of during I/O. */
static void spill(struct store *store, struct batch *batch)
{
    fl_error error = { 0 };
    if (!spill_begin(store, batch))
        return;
    pthread_mutex_unlock(&store->lock);
    int rc = spill_write(store, batch, &error);
    pthread_mutex_lock(&store->lock);
    spill_end(store, batch, rc);
    if (rc) {
        spill_failed(store, &error);
    } else {
        store->retry_delay = store->retry_at = 0;
        store->spill_error.code = 0;
    }
}

/* ---- punching ---- */

/* Punch some of what is stale, from the cursor on, a bounded stretch in one hold of the lock. The lock is let go of during I/O. Nobody else takes slots of
   the file, so what is free stays free meanwhile. Failures do not matter: the space is used again instead. */
static void punch(struct store *store)
{
    uint64_t least = MAX(1, PUNCH_RUN >> store->shift), from = store->punch_cursor, first = 0, count = 0;
    if (store->file_in_use == 0) {
        count = MAX(store->file_high, store->file_reserved);
        store->file_high = store->file_reserved = store->file_cursor = 0;
    } else {
        uint64_t end = MIN(store->file_high, from + PUNCH_SCAN);
        while (from < end && count < least) {
            first = bitmap_next_set(&store->file_stale, from, end);
            from = bitmap_next_clear(&store->file_stale, first, store->file_high);
            count = from - first;
        }
        if (count < least)
            count = 0;
    }
    store->punch_cursor = from;
    if (store->file_in_use == 0 || from >= store->file_high) {
        store->punch_cursor = 0;
        store->freed_since_punch = 0;
    }
    bitmap_clear(&store->file_stale, first, count);
    pthread_mutex_unlock(&store->lock);
    if (count)
        image_discard(store->fleecing, count << store->shift, first << store->shift, NULL);
    pthread_mutex_lock(&store->lock);
}

/* Nothing will be read any more: give everything back, at once for as long as the lock is held, and then in peace. */
static void dismantle(struct store *store)
{
    struct map map = store->map;
    uint64_t bytes = MAX(store->file_high, store->file_reserved) << store->shift;
    store->dismantled = true;
    map_init(&store->map);
    while (store->staged) {
        uint32_t i = store->oldest;
        stage_unlink(store, i);
        slot_drop(store, i);
    }
    store->file_in_use = store->file_high = store->freed_since_punch = 0;
    pthread_mutex_unlock(&store->lock);
    map_destroy(&map);
    if (bytes && store->fleecing->punches)
        image_discard(store->fleecing, bytes, 0, NULL);
    pthread_mutex_lock(&store->lock);
}

/* ---- memory ---- */

/* Touch the memory of the next slots. Nothing in it changes, so writers may use it meanwhile. The lock is let go of. */
static void touch(struct store *store)
{
    uint32_t from = MAX(store->touched, store->fresh & ~(store->touch_step - 1)), count = MIN(store->touch_step, store->slots_count - from);
    store->touched = from + count;
    pthread_mutex_unlock(&store->lock);
    bool done = madvise(store_memory(store, from), (size_t)count << store->shift, MADV_POPULATE_WRITE) == 0;
    pthread_mutex_lock(&store->lock);
    if (!done)
        store->touched = store->slots_count;    /* Linux before 5.14, or no memory: each writer has its own faults */
}

/* ---- the thread ---- */

/* Spilling starts when the stage is more than three quarters full, and goes on until half is left; or while a writer waits for room. Long before,
   a backup copies what is staged, so beside one little or nothing is spilled. */
static bool spill_due(struct store *store, uint64_t now)
{
    if (!store->staged || store->file_full)
        return false;
    if (store->staged > store->spill_above)
        store->spilling_down = true;
    else if (store->staged <= store->spill_down_to)
        store->spilling_down = false;
    return (store->spilling_down || store->first_waiter) && store->retry_at <= now;
}

static void *spiller(void *argument)
{
    struct store *store = argument;
    struct batch batch;
    pthread_mutex_lock(&store->lock);
    while (!store->closed) {
        uint64_t now = store->retry_at ? now_ns() : 0;  /* one look at the clock decides both whether to spill and how long to sleep */
        if (store->aborted && !store->dismantled) {
            dismantle(store);
        } else if (!store->aborted && touch_due(store)) {
            touch(store);
        } else if (!store->aborted && spill_due(store, now)) {
            spill(store, &batch);
        } else if (!store->aborted && punch_due(store)) {
            punch(store);
        } else {
            store->spiller_sleeps = true;
            if (store->retry_at > now)
                cond_wait_until(&store->work, &store->lock, store->retry_at);
            else
                pthread_cond_wait(&store->work, &store->lock);
            store->spiller_sleeps = false;
        }
    }
    if (!store->dismantled)
        dismantle(store);       /* an image that outlives us is left empty */
    if (!store->file_readers) {
        /* Given back here: closing a file of hung storage hangs, too, and store_close waits for us only so long. */
        fl_image *fleecing = store->fleecing;
        store->fleecing = NULL;
        pthread_mutex_unlock(&store->lock);
        image_untake(fleecing);
        image_unref(fleecing);
        pthread_mutex_lock(&store->lock);
    }
    store->spiller_runs = false;
    pthread_cond_broadcast(&store->ended);
    bool last = atomic_fetch_sub(&store->references, 1) == 1;
    pthread_mutex_unlock(&store->lock);
    if (last)
        store_destroy(store);
    return NULL;
}

int spill_start(struct store *store, fl_error *error)
{
    store_ref(store);
    store->spiller_runs = true;
    int rc = thread_start(spiller, store, "fl-spill");
    if (rc) {
        store->spiller_runs = false;
        store_unref(store);
        fail(error, -rc, FL_SIDE_NONE, 0, 0, "cannot start the thread that spills to the fleecing image");
    }
    return rc;
}
