/* cbw.c: the write path. Start reading here.
 *
 * A guest write (or zero, or discard: all of them change data) goes through in pieces:
 *
 *   1. pass the disk's gate                                                             cbw_change
 *   2. for each live snapshot claim the clusters that nobody has saved, and take room   protect > claim
 *      no room: give all claims back, leave the gate, wait, start again at 1            wait_for_room
 *      read the old data from the source into the stage, publish it, set `saved`        protect > save
 *      wait for the clusters that other writers are saving                              protect > wait_for_others
 *   3. mark the dirty bitmaps                                                           mark_dirty
 *   4. full fence, change the source, leave the gate                                    apply
 *
 * What may be relied on, and where it is made true:
 *   I1  `saved` is set only after all of the old data is in the store (publish_data), or the cluster was released.
 *   I2  The source changes in a cluster only if for each live snapshot it is saved, released or lost, or the snapshot is marked
 *       broken, and that mark is visible before (protect returns 0 only then; the fence in cbw_change).
 *   I3  A reader looks at the bits after its read (snapshot.c, look_again).
 *   I4  `saved` and `released` never go back: nothing clears them.
 *   I5  A place in the store is used again only when nobody has it pinned and nothing points at it (store.c, slot_free; store_spill.c).
 *   I6  A dirty bit is set before the write that it stands for (mark_dirty), and cleared by nothing but a cut or fl_disk_bitmap_clear, with the gate closed
 *       (disk.c, dirty.c).
 *   I7  Nobody waits for a reader. A writer waits for the gate (a cut, which waits only for writers inside), for a writer that saves the same
 *       cluster (which waits for nothing but the source), and for room, outside the gate and without claims, until cbw_timeout.
 *
 * No copy outlives its claim: the thread that claimed a cluster copies it itself, and is done with it before it lets go.
 */
#define _GNU_SOURCE
#include "cbw.h"

#define PIECE_CLUSTERS 256u             /* of one snapshot, at most; one preadv each */
#define PIECE_WORDS (PIECE_CLUSTERS / 64 + 1)
#define PIECE_WRITE (8u << 20)          /* bytes, at most */
#define PIECE_ZERO (64u << 20)          /* for zeros and discards: some images can only write zeros */
#define NO_ROOM 1                       /* beside 0 and the negative codes, which can be anything that an image fails with */
#define LOOK_FOR_HOLES (64u << 10)      /* a run at least as long is worth asking the source for holes */

/* What one piece of a write must save for one snapshot. */
struct saving {
    fl_snapshot *snapshot;
    uint64_t first, end;                /* clusters that the piece touches */
    uint64_t word;                      /* mine[0] is word `word` of the bitmaps */
    uint64_t mine[PIECE_WORDS];         /* claimed by this writer, and not saved yet */
    bool others;                        /* some are claimed by other writers */
    uint32_t count;                     /* bits in mine when it was claimed, and slots */
    uint32_t slots[PIECE_CLUSTERS];     /* taken; slots[n] is for the nth bit of mine */
    unsigned char found[PIECE_CLUSTERS];        /* enum found: what was read for it */
    fl_error cause;                     /* of the first cluster for which nothing was found; code 0: none */
};

enum found { FOUND_DATA, FOUND_ZEROS, FOUND_NOTHING };

/* One guest write's way through all its pieces and tries. */
struct attempt {
    bool discard;                       /* no reason to wait, or for a policy to act */
    struct store *store;                /* where room was missing, or NULL; a reference */
    uint32_t need, credit;              /* slots wanted there, and reserved there for us */
    uint64_t waited, patience;          /* ns waited for room so far in all; and how long the coming wait may be */
    bool inside_life;                   /* it keeps close waiting while it is outside the gate `writes` */
    uint64_t began;                     /* when copy-before-write began to cost in this piece; 0: it did not */
    uint64_t added;                     /* ns that it cost in the pieces before */
};

static void forget_room(struct attempt *attempt)
{
    if (attempt->store) {
        store_return_credit(attempt->store, &attempt->credit);
        store_unref(attempt->store);
        attempt->store = NULL;
    }
}

/* ---- claims ---- */

static bool is_mine(const struct saving *saving, uint64_t cluster)
{
    uint64_t bit = cluster - saving->word * 64;
    return cluster >= saving->first && cluster < saving->end && (saving->mine[bit / 64] >> (bit % 64) & 1);
}

/* The next run of claimed clusters at or after *cluster: sets it to the first, returns how many; 0: none. */
static uint64_t next_run(const struct saving *saving, uint64_t *cluster)
{
    while (*cluster < saving->end && !is_mine(saving, *cluster))
        ++*cluster;
    uint64_t count = 0;
    while (is_mine(saving, *cluster + count))
        count++;
    return count;
}

static void drop_mine(struct saving *saving)
{
    memset(saving->mine, 0, sizeof saving->mine);
    saving->count = 0;
}

/* Claim what nobody has saved or claimed. The look at `saved` may be older than the claim: a claim of what was saved is never given back, so it is not won
   then. The fetch-or acquires: the old data is read after it. */
static void claim(struct saving *saving)
{
    fl_snapshot *snapshot = saving->snapshot;
    saving->word = saving->first / 64;
    saving->others = false;
    saving->cause.code = 0;
    drop_mine(saving);
    for (uint64_t word = saving->word; word * 64 < saving->end; word++) {
        uint64_t pending = word_mask(word, saving->first, saving->end) & ~snapshot_done_word(snapshot, word);
        if (!pending)
            continue;
        uint64_t before = bitmap_word(&snapshot->claimed, word);
        if (pending & ~before)
            before = bitmap_fetch_or(&snapshot->claimed, word, pending);
        saving->mine[word - saving->word] = pending & ~before;
        saving->count += (uint32_t)__builtin_popcountll(pending & ~before);
        saving->others |= (pending & before) != 0;
    }
}

/* Give up what was claimed and not saved, so that others can claim it. */
static void unclaim(struct saving *saving)
{
    uint64_t cluster = saving->first, run;
    if (!saving->count)
        return;
    for (; (run = next_run(saving, &cluster)) != 0; cluster += run)
        bitmap_clear(&saving->snapshot->claimed, cluster, run);
    drop_mine(saving);
    snapshot_claims_changed(saving->snapshot);          /* those that were saved, too */
}

static void unclaim_all(struct saving *savings, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        store_give_back(savings[i].snapshot->store, savings[i].slots, savings[i].count);
        unclaim(&savings[i]);
    }
}

/* ---- when a save fails ---- */

/* The claimed run [first, first + count) can't be saved. 0: the guest's write may go on all the same; else it fails with this. Either way the run is dealt
   with: its bits, not its slots. */
static int give_up(struct saving *saving, uint64_t first, uint64_t count, const fl_error *cause, fl_error *error)
{
    switch (saving->snapshot->on_cbw_error) {
    case FL_BREAK_SNAPSHOT:
        snapshot_break(saving->snapshot, cause);
        return 0;
    case FL_LOSE_RANGE:
        bitmap_set(&saving->snapshot->lost, first, count);
        atomic_fetch_add_explicit(&saving->snapshot->clusters_lost, count, memory_order_relaxed);
        return 0;
    default:
        if (error)
            *error = *cause;
        return cause->code;
    }
}

/* No room, and no more waiting: the whole of what was claimed. It has no slots. */
static int no_room(struct saving *saving, uint64_t waited, fl_error *error)
{
    fl_error cause = { 0 };
    uint64_t cluster = saving->first, run;
    int rc = 0;
    store_explain(saving->snapshot->store, waited, &cause);
    if (!cause.length) {
        cause.offset = saving->first << saving->snapshot->shift;
        cause.length = (saving->end - saving->first) << saving->snapshot->shift;
    }
    for (; (run = next_run(saving, &cluster)) != 0 && rc == 0; cluster += run)
        rc = give_up(saving, cluster, run, &cause, error);
    if (rc || saving->snapshot->on_cbw_error != FL_LOSE_RANGE) {
        unclaim(saving);
    } else {
        drop_mine(saving);      /* lost for good: the claims stay, so that nobody tries again */
        snapshot_claims_changed(saving->snapshot);
    }
    return rc;
}

/* ---- saving ---- */

/* The number of cluster's slot: how many claimed clusters come before it. */
static uint32_t slot_number(const struct saving *saving, uint64_t cluster)
{
    uint64_t bit = cluster - saving->word * 64;
    uint32_t number = 0;
    for (uint64_t n = 0; n < bit / 64; n++)
        number += (uint32_t)__builtin_popcountll(saving->mine[n]);
    return number + (uint32_t)__builtin_popcountll(saving->mine[bit / 64] & ((UINT64_C(1) << (bit % 64)) - 1));
}

/* Take cluster's old data from what the same write just read for other snapshots, so that the source is read once. false: they have not got all of it. */
static bool copy_from_earlier(const struct saving *earlier, const struct saving *saving, uint64_t cluster, char *to)
{
    for (; earlier < saving; earlier++) {
        const fl_snapshot *other = earlier->snapshot;
        uint64_t at = cluster << saving->snapshot->shift, end = at + snapshot_cluster_bytes(saving->snapshot, cluster);
        char *into = to;
        while (at < end && is_mine(earlier, at >> other->shift)) {
            uint64_t skip = at & (other->cluster_size - 1), part = MIN(end - at, other->cluster_size - skip);
            uint32_t number = slot_number(earlier, at >> other->shift);
            if (earlier->found[number] == FOUND_DATA)
                memcpy(into, store_memory(other->store, earlier->slots[number]) + skip, part);
            else if (earlier->found[number] == FOUND_ZEROS)
                memset(into, 0, part);
            else
                break;
            into += part;
            at += part;
        }
        if (at == end)
            return true;
    }
    return false;
}

/* Read `count` clusters from `first` on from the source into the slots from number `number` on. */
static int read_source(const struct saving *saving, uint64_t first, uint64_t count, uint32_t number, fl_error *error)
{
    fl_snapshot *snapshot = saving->snapshot;
    struct iovec iov[PIECE_CLUSTERS];
    int entries = 0;
    for (uint64_t n = 0; n < count; n++) {
        char *memory = store_memory(snapshot->store, saving->slots[number + n]);
        uint32_t bytes = snapshot_cluster_bytes(snapshot, first + n);
        if (entries && (char *)iov[entries - 1].iov_base + iov[entries - 1].iov_len == memory)
            iov[entries - 1].iov_len += bytes;
        else
            iov[entries++] = (struct iovec){ memory, bytes };
    }
    uint64_t offset = first << snapshot->shift;
    int rc = image_readv(snapshot->source, iov, entries, offset, error);
    if (rc) {
        error->side = FL_SIDE_SOURCE;
        return rc;
    }
    return snapshot_source_kept(snapshot, offset, MIN(count << snapshot->shift, snapshot->size - offset), error);
}

/* Are clusters [first, first + count) of the source a hole? */
static bool is_hole(fl_snapshot *snapshot, uint64_t first, uint64_t count)
{
    uint64_t offset = first << snapshot->shift, bytes = MIN(count << snapshot->shift, snapshot->size - offset), end = offset + bytes;
    return bytes >= LOOK_FOR_HOLES && image_next_data(snapshot->source, offset, end) == end && end <= image_ends_at(snapshot->source);
}

/* Find the old data of a run of claimed clusters, and note in saving->found how that went. */
static void read_run(const struct saving *savings, struct saving *saving, uint64_t first, uint64_t count, uint32_t number)
{
    fl_snapshot *snapshot = saving->snapshot;
    fl_error cause;
    bool have = savings < saving;
    for (uint64_t n = 0; n < count && have; n++)
        have = copy_from_earlier(savings, saving, first + n, store_memory(snapshot->store, saving->slots[number + n]));
    if (!have && is_hole(snapshot, first, count)) {
        memset(saving->found + number, FOUND_ZEROS, count);
        return;
    }
    if (!have && read_source(saving, first, count, number, &cause) != 0) {
        if (count > 1) {        /* find out which clusters it is: only those are given up */
            for (uint64_t n = 0; n < count; n++)
                read_run(savings, saving, first + n, 1, number + (uint32_t)n);
        } else {
            saving->found[number] = FOUND_NOTHING;
            if (!saving->cause.code)
                saving->cause = cause;
        }
        return;
    }
    for (uint64_t n = 0; n < count; n++)
        saving->found[number + n] = is_zero(store_memory(snapshot->store, saving->slots[number + n]), snapshot_cluster_bytes(snapshot, first + n))
            ? FOUND_ZEROS : FOUND_DATA;
}

/* Their old data is zeros: nothing is stored. */
static void publish_zeros(struct saving *saving, uint64_t first, uint64_t count, const uint32_t *slots)
{
    fl_snapshot *snapshot = saving->snapshot;
    /* `zero` before `saved`: who sees that one (acquire) sees this one. */
    bitmap_set(&snapshot->zero, first, count);
    bitmap_set(&snapshot->saved, first, count);
    store_give_back(snapshot->store, slots, (uint32_t)count);
    atomic_fetch_add_explicit(&snapshot->zero_clusters, count, memory_order_relaxed);
}

/* I1: the slots hold the old data; the map points at them; then the bits. */
static int publish_data(struct saving *saving, uint64_t first, uint64_t count, const uint32_t *slots)
{
    fl_snapshot *snapshot = saving->snapshot;
    int rc = store_publish(snapshot->store, first, slots, (uint32_t)count);
    if (rc == 0) {
        bitmap_set(&snapshot->saved, first, count);     /* releases our read of the source: who sees it and writes can't change what we read */
        atomic_fetch_add_explicit(&snapshot->clusters_saved, count, memory_order_relaxed);
        atomic_fetch_add_explicit(&snapshot->bytes_copied, count << snapshot->shift, memory_order_relaxed);
        return 0;
    }
    store_give_back(snapshot->store, slots, (uint32_t)count);
    if (rc == -FL_ECLOSED)
        return 0;               /* the snapshot is broken already, and that mark is visible */
    return fail(&saving->cause, -rc, FL_SIDE_FLEECING, first << snapshot->shift, count << snapshot->shift, "no memory to note where old data is");
}

/* Were all of them discarded while they were being saved? Then nobody wants them. */
static bool is_released(const fl_snapshot *snapshot, uint64_t first, uint64_t count)
{
    return bitmap_next_clear(&snapshot->released, first, first + count) == first + count;
}

/* Publish a run of claimed clusters, whose slots are from number `number` on: all of these are dealt with. */
static int publish_run(struct saving *saving, uint64_t first, uint64_t count, uint32_t number, fl_error *error)
{
    int rc = 0;
    for (uint64_t n = 0, run; n < count; n += run) {
        const uint32_t *slots = &saving->slots[number + n];
        unsigned char found = saving->found[number + n];
        int failed = 0;
        for (run = 1; n + run < count && saving->found[number + n + run] == found; run++)
            ;
        if (found == FOUND_ZEROS) {
            publish_zeros(saving, first + n, run, slots);
        } else if (found == FOUND_DATA) {
            failed = publish_data(saving, first + n, run, slots);
        } else {
            store_give_back(saving->snapshot->store, slots, (uint32_t)run);
            failed = saving->cause.code;
        }
        if (failed && !is_released(saving->snapshot, first + n, run))
            failed = give_up(saving, first + n, run, &saving->cause, rc ? NULL : error);
        else
            failed = 0;
        rc = rc ? rc : failed;
    }
    return rc;
}

/* A cluster that was released while it was being saved is freed by its writer. Either we see the bit now, or its releaser sees `saved`. */
static void free_released(const struct saving *saving)
{
    fl_snapshot *snapshot = saving->snapshot;
    uint64_t at = saving->first;
    full_fence();               /* `saved`, then the look at `released`: pairs with the one in fl_snapshot_discard */
    while ((at = bitmap_next_set(&snapshot->released, at, saving->end)) < saving->end) {
        if (bitmap_test(&snapshot->saved, at) && is_mine(saving, at))
            store_free(snapshot->store, at, 1);
        at++;
    }
}

/* All that was claimed is published or given up: what was not saved (its snapshot is broken, or the guest's write fails) is nobody's now. */
static void end_claims(struct saving *saving)
{
    free_released(saving);
    for (uint64_t word = saving->word, n = 0; word * 64 < saving->end; word++, n++)
        saving->mine[n] &= ~snapshot_done_word(saving->snapshot, word);
    unclaim(saving);
}

/* Save all that was claimed for all snapshots: first read for all, then publish, since what is published may be spilled and its slot used again. On
   failure the guest's write must not go through. */
static int save(struct saving *savings, unsigned count, fl_error *error)
{
    int rc = 0;
    for (unsigned i = 0; i < count; i++) {
        uint64_t cluster = savings[i].first, run;
        uint32_t number = 0;
        for (; (run = next_run(&savings[i], &cluster)) != 0; cluster += run, number += (uint32_t)run)
            read_run(savings, &savings[i], cluster, run, number);
    }
    for (unsigned i = 0; i < count; i++) {
        struct saving *saving = &savings[i];
        uint64_t cluster = saving->first, run;
        uint32_t number = 0;
        for (; (run = next_run(saving, &cluster)) != 0; cluster += run, number += (uint32_t)run) {
            int one = publish_run(saving, cluster, run, number, rc ? NULL : error);
            rc = rc ? rc : one;
        }
        if (number)
            end_claims(saving);
    }
    return rc;
}

/* Wait until no other writer is saving a cluster of the piece. true: all of them are dealt with; false: somebody gave up, claim again. */
static bool wait_for_others(struct saving *saving)
{
    fl_snapshot *snapshot = saving->snapshot;
    uint64_t pending = 0, claimed = 0;
    atomic_fetch_add_explicit(&snapshot->claim_waits, 1, memory_order_relaxed);
    atomic_fetch_add(&snapshot->claim_waiters, 1);
    full_fence();               /* count, then look at the bits; whoever ends a claim changes the bits, then looks for waiters (snapshot_claims_changed) */
    pthread_mutex_lock(&snapshot->lock);
    for (;;) {
        pending = claimed = 0;
        for (uint64_t word = saving->word; word * 64 < saving->end; word++) {
            uint64_t here = word_mask(word, saving->first, saving->end) & ~snapshot_done_word(snapshot, word);
            pending |= here;
            claimed |= here & bitmap_word(&snapshot->claimed, word);
        }
        if (!snapshot_live(snapshot))
            pending = 0;
        if (!pending || !claimed)
            break;
        pthread_cond_wait(&snapshot->claims_changed, &snapshot->lock);
    }
    pthread_mutex_unlock(&snapshot->lock);
    atomic_fetch_sub(&snapshot->claim_waiters, 1);
    return !pending;
}

/* ---- one piece ---- */

/* Room for what was claimed. 0, NO_ROOM: wait for it (the attempt says where), else the guest's write fails. */
static int take_room(struct saving *saving, struct attempt *attempt, fl_error *error)
{
    fl_snapshot *snapshot = saving->snapshot;
    uint32_t none = 0, *credit = attempt->store == snapshot->store ? &attempt->credit : &none;
    if (!saving->count || store_take(snapshot->store, saving->first, saving->count, credit, saving->slots) == 0)
        return 0;
    if (!attempt->discard && (attempt->waited >= snapshot->cbw_timeout || store_stalled(snapshot->store)))
        return no_room(saving, attempt->waited, error);
    attempt->patience = snapshot->cbw_timeout - attempt->waited;
    forget_room(attempt);
    attempt->store = store_ref(snapshot->store);
    attempt->need = saving->count;
    return NO_ROOM;
}

/* Make sure that [offset, end) may change: I2. Inside the gate. 0, NO_ROOM: leave the gate and wait for it; else the guest's write fails. */
static int protect(fl_disk *disk, uint64_t offset, uint64_t end, struct attempt *attempt, fl_error *error)
{
    struct saving savings[disk->snapshot_count];
    unsigned count = 0;
    bool dealt_with;
    do {
        bool busy = false;
        count = 0;
        for (unsigned i = 0; i < disk->snapshot_count; i++) {
            struct saving *saving = &savings[count];
            saving->snapshot = disk->snapshots[i];
            saving->first = offset >> saving->snapshot->shift;
            saving->end = ((end - 1) >> saving->snapshot->shift) + 1;
            if (!snapshot_live(saving->snapshot))
                continue;
            claim(saving);
            if (!saving->count && !saving->others)
                continue;
            busy = true;
            if (!attempt->began)
                attempt->began = now_ns();
            int rc = take_room(saving, attempt, error);
            if (rc) {
                unclaim(saving);
                unclaim_all(savings, count);
                return rc;
            }
            count++;
        }
        if (!busy)
            return 0;
        int rc = save(savings, count, error);
        if (rc)
            return rc;
        dealt_with = true;
        for (unsigned i = 0; i < count; i++)
            if (savings[i].others && !wait_for_others(&savings[i]))
                dealt_with = false;
    } while (!dealt_with);
    return 0;
}

/* I6; a persistent bitmap in its file first: what is set in memory is set there (S1 in sidecar.h), so whoever finds it set here may write. */
static void mark_dirty(fl_disk *disk, uint64_t offset, uint64_t end)
{
    if (disk->sidecar)
        sidecar_alive(disk->sidecar);
    for (struct dirty *dirty = disk->dirty; dirty; dirty = dirty->next) {
        uint64_t first = offset >> dirty->shift, last = (end - 1) >> dirty->shift;
        if (!dirty->recording || dirty_marked(dirty, first, last))
            continue;
        if (dirty->kept)
            dirty_keep(dirty, first, last - first + 1);
        bitmap_set(&dirty->bits, first, last - first + 1);
    }
}

static int apply(fl_disk *disk, enum change change, const void *data, uint64_t offset, uint64_t end, fl_error *error)
{
    int rc;
    if (change == CHANGE_WRITE)
        rc = image_write(disk->source, data, end - offset, offset, error);
    else if (change == CHANGE_ZERO)
        rc = image_zero(disk->source, end - offset, offset, error);
    else
        rc = image_discard(disk->source, end - offset, offset, error);
    if (rc && error)
        error->side = FL_SIDE_SOURCE;
    return rc;
}

/* Where the piece that begins at `offset` ends: a cut waits for one piece at most, and no snapshot's part may exceed half its stage. */
static uint64_t piece_end(const fl_disk *disk, enum change change, uint64_t offset, uint64_t end, bool needs_saving)
{
    end = MIN(end, offset + (change == CHANGE_WRITE ? PIECE_WRITE : PIECE_ZERO));
    for (unsigned i = 0; i < disk->snapshot_count && needs_saving; i++) {
        const fl_snapshot *snapshot = disk->snapshots[i];
        uint64_t clusters = MIN(PIECE_CLUSTERS, MAX(1u, store_slots(snapshot->store) / 2));
        end = MIN(end, ((offset >> snapshot->shift) + clusters) << snapshot->shift);
    }
    return end;
}

/* Zeroing or discarding a hole needs no saving, since it changes nothing, whatever others do meanwhile: whoever changes it first saves it. Is there a hole at
   `offset`? `*end` is moved to where it ends. */
static bool in_hole(fl_disk *disk, uint64_t offset, uint64_t *end)
{
    uint64_t data = image_next_data(disk->source, offset, *end);
    if (data == offset)
        return false;
    *end = data;
    return true;
}

static void count_latency(fl_disk *disk, struct attempt *attempt, bool last_piece)
{
    if (attempt->began) {
        attempt->added += now_ns() - attempt->began;
        attempt->began = 0;
    }
    if (last_piece && attempt->added)
        for (unsigned i = 0; i < disk->snapshot_count; i++)
            latency_add(&disk->snapshots[i]->latency, attempt->added);
}

/* The gate `writes` is left, so that no cut waits for us; close does. 0: try again, and let the policy decide if there still is no room. */
static int wait_for_room(struct attempt *attempt, fl_error *error)
{
    uint64_t began = now_ns();
    int rc = store_wait(attempt->store, attempt->need, add_sat(began, attempt->patience), &attempt->credit);
    attempt->waited += now_ns() - began;
    if (rc == -FL_EINTERRUPTED)
        return fail(error, FL_EINTERRUPTED, FL_SIDE_FLEECING, 0, 0, "interrupted while waiting for room for old data");
    return 0;
}

/* One piece from `*offset` on, at most to `end`; moves *offset on. NO_ROOM: wait for it. Inside the gate. */
static int change_piece(fl_disk *disk, enum change change, const char *data, uint64_t *offset, uint64_t end, struct attempt *attempt, fl_error *error)
{
    uint64_t piece = end;
    bool needs_saving = disk->snapshot_count != 0;
    if (needs_saving && change != CHANGE_WRITE)
        needs_saving = !in_hole(disk, *offset, &piece);
    piece = piece_end(disk, change, *offset, piece, needs_saving);
    int rc = needs_saving ? protect(disk, *offset, piece, attempt, error) : 0;
    if (rc == NO_ROOM && change == CHANGE_DISCARD) {
        forget_room(attempt);   /* a discard is a hint: not worth waiting for, and no reason to break a snapshot */
        *offset = piece;
        return 0;
    }
    if (rc)
        return rc;
    forget_room(attempt);       /* what was reserved and not used: others may wait for it, and the source may hang */
    count_latency(disk, attempt, piece == end);
    mark_dirty(disk, *offset, piece);
    full_fence();               /* the bits and marks of protect, then the change: pairs with the one in look_again */
    rc = apply(disk, change, data, *offset, piece, error);
    *offset = piece;
    return rc;
}

int cbw_change(fl_disk *disk, enum change change, const void *data, uint64_t count, uint64_t offset, fl_error *error)
{
    struct attempt attempt = { .discard = change == CHANGE_DISCARD };
    const uint64_t start = offset, end = offset + count;
    int rc = 0;
    while (offset < end && rc == 0) {
        rc = gate_pass(&disk->writes, "disk", error);
        if (rc)
            break;
        rc = change_piece(disk, change, data ? (const char *)data + (offset - start) : NULL, &offset, end, &attempt, error);
        bool wait = rc == NO_ROOM;
        if (wait && !attempt.inside_life) {
            rc = gate_pass(&disk->life, "disk", error);
            attempt.inside_life = rc == 0;
        }
        gate_leave(&disk->writes);
        if (wait && attempt.inside_life)
            rc = wait_for_room(&attempt, error);
    }
    forget_room(&attempt);
    if (attempt.inside_life)
        gate_leave(&disk->life);
    return rc;
}
