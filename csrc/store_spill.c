/* store_spill.c: the fleecing image behind the stage, and the thread that fills it.
 *
 * The spiller is the only one that takes slots of the file; frees come from anybody. It takes the oldest staged clusters and writes them as one run of
 * free slots: random guest writes become sequential fleecing writes. New runs go behind all others while little below is free, so they stay
 * long; once a third of the file's slots is free, those are used again. What is free and was written is punched out in long runs now and then, and
 * wholly when nothing is in use.
 *
 * A spill that fails loses nothing: its clusters stay staged, as the oldest, and are tried again (after a growing pause, or when something is freed).
 */
#define _GNU_SOURCE
#include "store_internal.h"

#define PUNCH_BYTES (8u << 20)          /* punch when as much has become stale */
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

void file_free(struct store *store, uint64_t slot)
{
    bitmap_clear(&store->file_used, slot, 1);
    bits_set(&store->file_stale, slot, 1);
    store->file_in_use--;
    store->stale_since_punch++;
    if (store->file_full || store->retry_at || store->file_in_use == 0) {
        store->file_full = false;
        store->retry_at = 0;
        wake_spiller(store);
    }
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

/* ---- spilling ---- */

struct batch {
    uint32_t count;
    uint64_t first;             /* slots first, first + 1, … of the file */
    uint32_t slots[1024];       /* of the stage, oldest first */
};

/* Under the lock: choose what to write and where. false: nothing to do, or no space. */
static bool spill_begin(struct store *store, struct batch *batch)
{
    batch->count = file_take(store, MIN(store->batch, store->staged), &batch->first);
    if (!batch->count) {
        store->file_full = true;
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

static int spill_write(struct store *store, const struct batch *batch, fl_error *error)
{
    struct iovec iov[1024];
    int entries = 0;
    for (uint32_t n = 0; n < batch->count; n++) {
        char *memory = store_memory(store, batch->slots[n]);
        if (entries && (char *)iov[entries - 1].iov_base + iov[entries - 1].iov_len == memory)
            iov[entries - 1].iov_len += store->cluster_size;
        else
            iov[entries++] = (struct iovec){ memory, store->cluster_size };
    }
    int rc = image_writev(store->fleecing, iov, entries, batch->first << store->shift, error);
    if (rc)
        error->side = FL_SIDE_FLEECING;
    return rc;
}

/* Under the lock: the clusters live in the file now, or are staged again; those freed meanwhile are freed for good. From the youngest back, so that
   slots come off the free list in ascending order, and what is staged again keeps its order. */
static void spill_end(struct store *store, const struct batch *batch, int rc)
{
    store->spilling -= batch->count;
    store->spill_began = 0;
    for (uint32_t n = batch->count; n--;) {
        uint32_t i = batch->slots[n];
        struct slot *slot = &store->slots[i];
        bool wanted = slot->state == SLOT_SPILLING;
        slot->pins--;
        if (wanted && rc == 0) {
            map_put(&store->map, slot->cluster, place_file(batch->first + n));      /* replaces: cannot fail */
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
            slot->state = SLOT_ORPHAN;
            if (slot->pins == 0)
                slot_free(store, i);
        }
    }
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

static bool punch_due(const struct store *store)
{
    if (!store->fleecing->punches || !store->file_high)
        return false;
    return store->file_in_use == 0 || store->stale_since_punch << store->shift >= PUNCH_BYTES;
}

/* Under the lock, which is let go of during I/O. Nobody else takes slots of the file, so what is free stays free meanwhile. Failures do not matter: the
   space is used again instead. */
static void punch(struct store *store)
{
    uint64_t least = MAX(1, PUNCH_RUN >> store->shift), from = 0, high = store->file_high;
    bool all = store->file_in_use == 0;
    store->stale_since_punch = 0;
    while (from < high) {
        uint64_t end = high;
        if (!all) {
            from = bitmap_next_set(&store->file_stale, from, high);
            end = bitmap_next_clear(&store->file_stale, from, high);
        }
        if (end - from >= least || all) {
            pthread_mutex_unlock(&store->lock);
            image_discard(store->fleecing, (end - from) << store->shift, from << store->shift, NULL);
            pthread_mutex_lock(&store->lock);
            bitmap_clear(&store->file_stale, from, end - from);
        }
        from = end;
    }
    if (all)
        store->file_high = store->file_cursor = 0;
}

/* ---- the thread ---- */

/* Spilling starts when the stage is more than half full, and goes on until a quarter is left; or while a writer waits for room. */
static bool spill_due(struct store *store)
{
    if (!store->staged || store->aborted || store->file_full)
        return false;
    if (store->staged > store->spill_above)
        store->spilling_down = true;
    else if (store->staged <= store->spill_down_to)
        store->spilling_down = false;
    return (store->spilling_down || store->first_waiter) && (!store->retry_at || now_ns() >= store->retry_at);
}

static void *spiller(void *argument)
{
    struct store *store = argument;
    struct batch batch;
    pthread_mutex_lock(&store->lock);
    while (!store->closed) {
        if (spill_due(store)) {
            spill(store, &batch);
        } else if (punch_due(store)) {
            punch(store);
        } else {
            store->spiller_sleeps = true;
            if (store->retry_at > now_ns())
                cond_wait_until(&store->work, &store->lock, store->retry_at);
            else
                pthread_cond_wait(&store->work, &store->lock);
            store->spiller_sleeps = false;
        }
    }
    if (store->fleecing->punches && store->file_high) {     /* an image that outlives us is left empty */
        uint64_t bytes = store->file_high << store->shift;
        pthread_mutex_unlock(&store->lock);
        image_discard(store->fleecing, bytes, 0, NULL);
        pthread_mutex_lock(&store->lock);
    }
    store->spiller_runs = false;
    pthread_cond_broadcast(&store->ended);
    pthread_mutex_unlock(&store->lock);
    store_unref(store);
    return NULL;
}

int spill_start(struct store *store, fl_error *error)
{
    store_ref(store);
    store->spiller_runs = true;
    int rc = thread_start(spiller, store, "fleece-spill");
    if (rc) {
        store->spiller_runs = false;
        store_unref(store);
        fail(error, -rc, FL_SIDE_NONE, 0, 0, "cannot start the thread that spills to the fleecing image");
    }
    return rc;
}
