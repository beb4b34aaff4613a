/* snapshot.c: reading the state at the cut, discarding what is not wanted any more, and what a snapshot tells about itself.
 *
 * Readers take no lock that a guest write could wait for (I7). A cluster that was not saved is read from the source, although a guest write may change it
 * at that very moment; after the read the reader looks again (I3), and what was saved, released, lost or broken in between was perhaps not the
 * old data: it is read again, or raises. A writer sets the bits before it changes the source, with a full fence in between; the reader's full fence stands
 * between its read and its second look. So whoever read a new byte sees the bit that was set before it.
 */
#define _GNU_SOURCE
#include "snapshot.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---- states ---- */

enum cluster_state { UNSAVED, SAVED, SAVED_ZERO, RELEASED, LOST, OUTSIDE };

/* In an incremental: the first cluster in [from, end) that belongs to the snapshot (wanted), or does not (!wanted); else end. */
static uint64_t next_inside(const fl_snapshot *snapshot, uint64_t from, uint64_t end, bool wanted)
{
    unsigned shift = snapshot->frozen_shift;
    if (from >= end)
        return end;
    uint64_t last = (end - 1) >> shift, bit = from >> shift;
    uint64_t found = wanted ? bitmap_next_set(&snapshot->frozen, bit, last + 1) : bitmap_next_clear(&snapshot->frozen, bit, last + 1);
    return found > last ? end : MAX(from, found << shift);
}

/* The state of `cluster`, and up to where (at most `*end`, but always behind `cluster`) its neighbours are in the same one. A look at a moment: it may have
   moved on. `by_bitmap`: what is outside of the frozen bitmap is OUTSIDE, whatever became of it. */
static enum cluster_state look(const fl_snapshot *snapshot, bool by_bitmap, uint64_t cluster, uint64_t *end)
{
    bool set;
    if (by_bitmap) {
        uint64_t inside = next_inside(snapshot, cluster, *end, true);
        if (inside != cluster) {
            *end = inside;
            return OUTSIDE;
        }
        *end = next_inside(snapshot, cluster, *end, false);
    }
    *end = bitmap_run(&snapshot->released, cluster, *end, &set);
    if (set)
        return RELEASED;
    *end = bitmap_run(&snapshot->lost, cluster, *end, &set);
    if (set)
        return LOST;
    *end = bitmap_run(&snapshot->saved, cluster, *end, &set);   /* acquires `zero`, which is set before it */
    if (!set)
        return UNSAVED;
    *end = bitmap_run(&snapshot->zero, cluster, *end, &set);
    return set ? SAVED_ZERO : SAVED;
}

static uint64_t inside_word(const fl_snapshot *snapshot, uint64_t word)
{
    unsigned shift = snapshot->frozen_shift;
    uint64_t first = word * 64 >> shift;
    if (shift >= 6)
        return bitmap_test(&snapshot->frozen, first) ? UINT64_MAX : 0;
    if (shift == 0)
        return bitmap_word(&snapshot->frozen, word);
    uint64_t inside = 0, group = (UINT64_C(1) << (1u << shift)) - 1;
    for (unsigned i = 0; i < 64u >> shift && first + i < snapshot->frozen.bits; i++)
        if (bitmap_test(&snapshot->frozen, first + i))
            inside |= group << (i << shift);
    return inside;
}

uint64_t snapshot_done_word(const fl_snapshot *snapshot, uint64_t word)
{
    uint64_t done = bitmap_word(&snapshot->saved, word) | bitmap_word(&snapshot->released, word) | bitmap_word(&snapshot->lost, word);
    return snapshot->bounded ? done | ~inside_word(snapshot, word) : done;
}

/* ---- broken, ended ---- */

static void ring(fl_snapshot *snapshot)
{
    int bell = atomic_load(&snapshot->bell);
    if (bell)
        send(bell - 1, "!", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

int fl_snapshot_tell_break(fl_snapshot *snapshot, int bell, fl_error *error)
{
    int none = 0, rc = gate_pass(&snapshot->gate, "snapshot", error);
    if (rc)
        return rc;
    int copy = fcntl(bell, F_DUPFD_CLOEXEC, 0);
    if (copy < 0) {
        rc = fail(error, errno, FL_SIDE_NONE, 0, 0, "cannot keep the socket that is to be told when a snapshot breaks");
    } else if (!atomic_compare_exchange_strong(&snapshot->bell, &none, copy + 1)) {
        close(copy);
        rc = fail(error, EBUSY, FL_SIDE_NONE, 0, 0, "another socket is told when the snapshot breaks");
    } else if (!snapshot_live(snapshot)) {
        ring(snapshot);         /* perhaps for the second time */
    }
    gate_leave(&snapshot->gate);
    return rc;
}

void snapshot_break(fl_snapshot *snapshot, const fl_error *cause)
{
    pthread_mutex_lock(&snapshot->lock);
    bool first = atomic_load(&snapshot->state) == SNAPSHOT_LIVE;
    if (first) {
        snapshot->first = *cause;
        atomic_store(&snapshot->state, SNAPSHOT_BROKEN);
    }
    pthread_mutex_unlock(&snapshot->lock);
    if (first) {
        snapshot_claims_changed(snapshot);
        store_abort(snapshot->store);
        ring(snapshot);
    }
}

static int check(fl_snapshot *snapshot, fl_error *error)
{
    int state = atomic_load(&snapshot->state);
    if (LIKELY(state == SNAPSHOT_LIVE))
        return 0;
    if (state == SNAPSHOT_ENDED)
        return fail(error, FL_ECLOSED, FL_SIDE_NONE, 0, 0, "the snapshot was closed");
    if (error) {
        pthread_mutex_lock(&snapshot->lock);
        fl_error first = snapshot->first;
        pthread_mutex_unlock(&snapshot->lock);
        fail(error, FL_EBROKEN, first.side, first.offset, first.length, "the snapshot is broken: %.360s", first.text);
        error->cause = first.cause;
    }
    return -FL_EBROKEN;
}

void snapshot_claims_changed(fl_snapshot *snapshot)
{
    full_fence();               /* pairs with the one in wait_for_others, which counts itself as waiting and then looks at the bits */
    if (atomic_load(&snapshot->claim_waiters)) {
        pthread_mutex_lock(&snapshot->lock);
        pthread_cond_broadcast(&snapshot->claims_changed);
        pthread_mutex_unlock(&snapshot->lock);
    }
}

/* ---- reading ---- */

static uint64_t cluster_offset(const fl_snapshot *snapshot, uint64_t cluster)
{
    return MIN(cluster << snapshot->shift, snapshot->size);
}

static int check_range(fl_snapshot *snapshot, uint64_t count, uint64_t offset, fl_error *error)
{
    if (!in_range(count, offset, snapshot->size))
        return fail(error, FL_ERANGE, FL_SIDE_NONE, offset, count, "%llu bytes at %llu are beyond the end of a snapshot of %llu bytes",
                    (unsigned long long)count, (unsigned long long)offset, (unsigned long long)snapshot->size);
    return check(snapshot, error);
}

/* What a read of a cluster in `state` raises. */
static int refuse(const fl_snapshot *snapshot, enum cluster_state state, uint64_t first, uint64_t end, fl_error *error)
{
    uint64_t offset = cluster_offset(snapshot, first), length = cluster_offset(snapshot, end) - offset;
    if (state == LOST)
        return fail(error, FL_ELOST, FL_SIDE_NONE, offset, length, "old data at %llu was lost: it could not be saved before the guest overwrote it",
                    (unsigned long long)offset);
    if (state == OUTSIDE)
        return fail(error, FL_EOUTSIDE, FL_SIDE_NONE, offset, length, "the range at %llu is not in the snapshot's dirty bitmap", (unsigned long long)offset);
    return fail(error, FL_EDISCARDED, FL_SIDE_NONE, offset, length, "the range at %llu was discarded from the snapshot", (unsigned long long)offset);
}

int snapshot_source_kept(const fl_snapshot *snapshot, uint64_t offset, uint64_t length, fl_error *error)
{
    full_fence();               /* the read, then the look at where the source ended: pairs with change_piece's, before a write that makes it longer again */
    uint64_t end = image_ends_at(snapshot->source);
    if (LIKELY(offset + length <= end))
        return 0;
    return fail(error, FL_ETRUNCATED, FL_SIDE_SOURCE, offset, length, "image '%.200s' was truncated to %llu after the cut: what was behind that is lost",
                snapshot->source->name, (unsigned long long)end);
}

/* I3, the second look, after [offset, offset + length) was read from the source or the store. 0: the bytes up to `*good` (bytes from offset) are the
   old data; less than all of them only where clusters were saved since. */
static int look_again(fl_snapshot *snapshot, uint64_t offset, uint64_t length, bool from_source, uint64_t *good, fl_error *error)
{
    full_fence();               /* the read, then the look: pairs with the writer's fence between its bits and its write */
    uint64_t first = offset >> snapshot->shift, end = ((offset + length - 1) >> snapshot->shift) + 1, found;
    int rc = check(snapshot, error);
    if (rc)
        return rc;
    if ((found = bitmap_next_set(&snapshot->released, first, end)) < end)
        return refuse(snapshot, RELEASED, found, found + 1, error);
    *good = length;
    if (!from_source)
        return 0;
    if ((found = bitmap_next_set(&snapshot->lost, first, end)) < end)
        return refuse(snapshot, LOST, found, found + 1, error);
    if ((found = bitmap_next_set(&snapshot->saved, first, end)) < end) {
        atomic_fetch_add_explicit(&snapshot->reads_repeated, 1, memory_order_relaxed);
        *good = (found << snapshot->shift) > offset ? (found << snapshot->shift) - offset : 0;
    }
    return *good ? snapshot_source_kept(snapshot, offset, *good, error) : 0;
}

/* Read a run of clusters that were all in `state` a moment ago. */
static int read_run(fl_snapshot *snapshot, enum cluster_state state, char *buffer, uint64_t length, uint64_t offset, uint64_t *good, fl_error *error)
{
    int rc = 0;
    if (state == UNSAVED) {
        rc = image_read(snapshot->source, buffer, length, offset, error);
        if (rc)
            error->side = FL_SIDE_SOURCE;
    } else if (state == SAVED) {
        rc = store_read(snapshot->store, buffer, length, offset, error);
    } else {
        memset(buffer, 0, length);
    }
    uint64_t valid = 0;
    int again = look_again(snapshot, offset, length, state == UNSAVED, &valid, error);
    if (again)
        return again;           /* says more than the failed read does, which may just be its consequence */
    if (rc == STORE_HAS_NOT)
        return fail(error, EIO, FL_SIDE_FLEECING, offset, length, "internal error: saved data at %llu is not in the store", (unsigned long long)offset);
    *good = rc == 0 ? valid : 0;
    return rc && valid < length ? 0 : rc;       /* part of what could not be read is in the store by now: look anew */
}

int fl_snapshot_pread(fl_snapshot *snapshot, void *buffer, size_t count, uint64_t offset, fl_error *error)
{
    char *to = buffer;
    fl_error story;             /* a read that is repeated may leave one, too */
    int rc = gate_pass(&snapshot->gate, "snapshot", error);
    if (rc)
        return rc;
    snapshot_ref(snapshot);     /* close waits for us only so long */
    rc = check_range(snapshot, count, offset, &story);
    while (count && rc == 0) {
        uint64_t cluster = offset >> snapshot->shift, end = ((offset + count - 1) >> snapshot->shift) + 1;
        enum cluster_state state = look(snapshot, snapshot->bounded, cluster, &end);
        if (state == RELEASED || state == LOST || state == OUTSIDE) {
            rc = refuse(snapshot, state, cluster, end, &story);
            break;
        }
        uint64_t good = 0, length = MIN(count, (end << snapshot->shift) - offset);
        rc = read_run(snapshot, state, to, length, offset, &good, &story);
        to += good;
        offset += good;
        count -= good;
    }
    if (rc && error)
        *error = story;
    gate_leave(&snapshot->gate);
    snapshot_unref(snapshot);
    return rc;
}

/* ---- cloning, in place of reading ---- */

uint64_t snapshot_unsaved(fl_snapshot *snapshot, uint64_t length, uint64_t offset)
{
    uint64_t end = ((offset + length - 1) >> snapshot->shift) + 1;
    if (gate_enter(&snapshot->gate))
        return 0;
    bool unsaved = look(snapshot, snapshot->bounded, offset >> snapshot->shift, &end) == UNSAVED;
    gate_leave(&snapshot->gate);
    return unsaved ? MIN(length, (end << snapshot->shift) - offset) : 0;
}

/* I3: to clone the source is to read it, so it is looked at again in the same way. */
int snapshot_clone(fl_snapshot *snapshot, fl_image *target, uint64_t length, uint64_t offset, uint64_t *good)
{
    uint64_t valid = 0;
    int rc = gate_enter(&snapshot->gate);
    if (rc)
        return rc;
    snapshot_ref(snapshot);     /* close waits for us only so long */
    rc = image_clone(snapshot->source, offset, length, target);
    if (rc == 0 && look_again(snapshot, offset, length, true, &valid, NULL))
        valid = 0;
    gate_leave(&snapshot->gate);
    snapshot_unref(snapshot);
    if (rc == 0)
        *good = valid;
    return rc;
}

/* ---- extents ---- */

struct list { fl_extent *extents; size_t max, count; };

/* Append, or join to the last one of the same kind. false: full. */
static bool append(struct list *list, uint64_t offset, uint64_t length, int kind)
{
    fl_extent *last = list->count ? &list->extents[list->count - 1] : NULL;
    if (last && last->kind == kind) {
        last->length += length;
        return true;
    }
    if (list->count == list->max)
        return false;
    list->extents[list->count++] = (fl_extent){ offset, length, kind };
    return true;
}

/* What the source said of a stretch from `offset` to `end`, some time after the cut. It holds for every cluster that is found unsaved later than that: nobody
   changed it. So the source, where asking takes a lock that writers want, is asked once a stretch and not once a run. */
#define SOURCE_EXTENTS 64
struct source_view { uint64_t offset, end; size_t found, index; fl_extent extents[SOURCE_EXTENTS]; };

static int view_source(fl_snapshot *snapshot, uint64_t offset, uint64_t end, struct source_view *view, fl_error *error)
{
    int rc = image_extents(snapshot->source, offset, end - offset, view->extents, SOURCE_EXTENTS, &view->found, error);
    if (rc) {
        error->side = FL_SIDE_SOURCE;
        return rc;
    }
    const fl_extent *last = &view->extents[view->found - 1];
    view->offset = offset;
    view->end = last->offset + last->length;
    view->index = 0;
    /* I3: the states are looked at after the source was: the fence in here pairs with the writer's, as that of look_again does. */
    rc = snapshot_source_kept(snapshot, offset, 1, error);
    view->end = MIN(view->end, image_ends_at(snapshot->source));
    return rc;
}

/* Append what the view says of [offset, offset + length), up to where it, or the list, ends. Returns how much that is. */
static uint64_t append_view(struct list *list, struct source_view *view, uint64_t offset, uint64_t length)
{
    uint64_t at = offset, end = MIN(offset + length, view->end);
    while (at < end) {
        const fl_extent *extent = &view->extents[view->index];
        uint64_t extent_end = extent->offset + extent->length;
        if (extent_end <= at) {
            view->index++;
            continue;
        }
        if (!append(list, at, MIN(end, extent_end) - at, extent->kind))
            break;
        at = MIN(end, extent_end);
    }
    return at - offset;
}

#define LOOK_AHEAD (UINT64_C(1) << 20)  /* clusters: a look scans all bitmaps up to the end of the shortest run, so it should not look far */

static const int kind_of[] = {
    [SAVED] = FL_DATA, [SAVED_ZERO] = FL_ZERO, [RELEASED] = FL_DISCARDED, [LOST] = FL_LOST, [OUTSIDE] = FL_OUTSIDE,
};

static int find_extents(fl_snapshot *snapshot, bool by_bitmap, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error)
{
    struct list list = { extents, max, 0 };
    struct source_view view = { .end = 0 };
    uint64_t end_offset = offset + length;
    fl_error story;
    int rc = gate_pass(&snapshot->gate, "snapshot", error);
    if (rc)
        return rc;
    snapshot_ref(snapshot);
    rc = check_range(snapshot, length, offset, &story);
    while (rc == 0 && offset < end_offset) {
        uint64_t cluster = offset >> snapshot->shift, end = ((end_offset - 1) >> snapshot->shift) + 1;
        end = MIN(end, cluster + LOOK_AHEAD);
        enum cluster_state state = look(snapshot, by_bitmap, cluster, &end);
        uint64_t part = MIN(end_offset, end << snapshot->shift) - offset;
        if (state != UNSAVED) {
            if (!append(&list, offset, part, kind_of[state]))
                break;
        } else if (offset >= view.end) {
            rc = view_source(snapshot, offset, MIN(end_offset, (cluster + LOOK_AHEAD) << snapshot->shift), &view, &story);
            continue;           /* look again, now that the source was asked */
        } else {
            part = append_view(&list, &view, offset, part);
            if (part == 0)
                break;          /* the list is full */
        }
        offset += part;
    }
    if (rc == 0)
        rc = check(snapshot, &story);
    if (rc == 0)
        *found = list.count;
    else if (error)
        *error = story;
    gate_leave(&snapshot->gate);
    snapshot_unref(snapshot);
    return rc;
}

int fl_snapshot_extents(fl_snapshot *snapshot, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error)
{
    return find_extents(snapshot, snapshot->incremental, offset, length, extents, max, found, error);
}

int fl_snapshot_extents_readable(fl_snapshot *snapshot, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error)
{
    return find_extents(snapshot, snapshot->bounded, offset, length, extents, max, found, error);
}

/* ---- discarding ---- */

int fl_snapshot_discard(fl_snapshot *snapshot, uint64_t count, uint64_t offset, fl_error *error)
{
    int rc = gate_pass(&snapshot->gate, "snapshot", error);
    if (rc)
        return rc;
    rc = check_range(snapshot, count, offset, error);
    if (rc)
        goto out;
    uint64_t first = div_up(offset, snapshot->cluster_size), next;
    uint64_t end = offset + count == snapshot->size ? snapshot->clusters : (offset + count) >> snapshot->shift;
    if (first >= end)
        goto out;
    bitmap_set(&snapshot->released, first, end - first);
    /* Either a writer that is saving one of these sees the bit after it set `saved`, and frees it, or we see `saved`. */
    full_fence();
    for (uint64_t at = first; (at = bitmap_next_set(&snapshot->saved, at, end)) < end; at = next) {
        next = bitmap_next_clear(&snapshot->saved, at, end);
        store_free(snapshot->store, at, next - at);
    }
out:
    gate_leave(&snapshot->gate);
    return rc;
}

int snapshot_discard_copied(fl_snapshot *snapshot, uint64_t count, uint64_t offset, fl_error *error)
{
    if (snapshot->bounded || !snapshot->incremental)
        return fl_snapshot_discard(snapshot, count, offset, error);
    int rc = 0;
    uint64_t limit = offset + count, end = div_up(limit, snapshot->cluster_size), next;
    for (uint64_t at = offset >> snapshot->shift; (at = next_inside(snapshot, at, end, true)) < end && rc == 0; at = next) {
        next = next_inside(snapshot, at, end, false);
        uint64_t from = MAX(offset, cluster_offset(snapshot, at));
        rc = fl_snapshot_discard(snapshot, MIN(limit, cluster_offset(snapshot, next)) - from, from, error);
    }
    return rc;
}

/* ---- what it tells ---- */

uint64_t fl_snapshot_size(fl_snapshot *snapshot) { return snapshot->size; }

uint32_t fl_snapshot_cluster_size(fl_snapshot *snapshot) { return snapshot->cluster_size; }

int fl_snapshot_check(fl_snapshot *snapshot, fl_error *error)
{
    int rc = gate_pass(&snapshot->gate, "snapshot", error);
    if (rc)
        return rc;
    rc = check(snapshot, error);
    gate_leave(&snapshot->gate);
    return rc;
}

bool snapshot_hot(fl_snapshot *snapshot, uint64_t *offset)
{
    uint64_t cluster;
    if (gate_enter(&snapshot->gate))
        return false;
    bool hot = store_oldest(snapshot->store, &cluster);
    gate_leave(&snapshot->gate);
    if (hot)
        *offset = cluster << snapshot->shift;
    return hot;
}

bool snapshot_is_direct(fl_snapshot *snapshot) { return snapshot->source->direct; }

uint64_t snapshot_fleecing_bytes(fl_snapshot *snapshot)
{
    fl_stats stats = { 0 };
    if (gate_enter(&snapshot->gate))
        return 0;
    store_stats(snapshot->store, &stats);
    gate_leave(&snapshot->gate);
    return stats.fleecing_bytes;
}

uint64_t snapshot_total(fl_snapshot *snapshot)
{
    if (!snapshot->incremental)
        return snapshot->size;
    uint64_t total = 0, end;
    for (uint64_t at = 0; (at = next_inside(snapshot, at, snapshot->clusters, true)) < snapshot->clusters; at = end) {
        end = next_inside(snapshot, at, snapshot->clusters, false);
        total += cluster_offset(snapshot, end) - cluster_offset(snapshot, at);
    }
    return total;
}

int fl_snapshot_stats(fl_snapshot *snapshot, fl_stats *out, fl_error *error)
{
    fl_stats stats = { 0 };
    int rc = gate_pass(&snapshot->gate, "snapshot", error);
    if (rc)
        return rc;
    store_stats(snapshot->store, &stats);
    stats.clusters_saved = atomic_load(&snapshot->clusters_saved);
    stats.bytes_copied = atomic_load(&snapshot->bytes_copied);
    stats.zero_clusters = atomic_load(&snapshot->zero_clusters);
    stats.clusters_lost = atomic_load(&snapshot->clusters_lost);
    stats.clusters_discarded = bitmap_count(&snapshot->released);
    stats.claim_waits = atomic_load(&snapshot->claim_waits);
    stats.reads_repeated = atomic_load(&snapshot->reads_repeated);
    stats.latency_count = latency_read(&snapshot->latency, stats.latency, &stats.latency_max);
    *out = stats;
    gate_leave(&snapshot->gate);
    return 0;
}

/* ---- life ---- */

static int make_bitmaps(fl_snapshot *snapshot)
{
    struct bitmap *bitmaps[] = { &snapshot->claimed, &snapshot->saved, &snapshot->zero, &snapshot->released, &snapshot->lost };
    int rc = 0;
    for (unsigned i = 0; i < sizeof bitmaps / sizeof *bitmaps && rc == 0; i++)
        rc = bitmap_init(bitmaps[i], snapshot->clusters);
    return rc;
}

void snapshot_let_go(fl_snapshot *snapshot)
{
    store_unref(snapshot->store);
    image_unref(snapshot->source);
    snapshot->store = NULL;
    snapshot->source = NULL;
}

static void destroy(fl_snapshot *snapshot)
{
    snapshot_let_go(snapshot);
    int bell = atomic_load_explicit(&snapshot->bell, memory_order_relaxed);     /* nobody else is left */
    if (bell)
        close(bell - 1);
    bitmap_destroy(&snapshot->claimed);
    bitmap_destroy(&snapshot->saved);
    bitmap_destroy(&snapshot->zero);
    bitmap_destroy(&snapshot->released);
    bitmap_destroy(&snapshot->lost);
    bitmap_destroy(&snapshot->frozen);
    pthread_cond_destroy(&snapshot->claims_changed);
    pthread_mutex_destroy(&snapshot->lock);
    gate_destroy(&snapshot->gate);
    free(snapshot);
}

static int check_options(const fl_snapshot_options *options, uint32_t cluster_size, uint64_t bitmap_granularity, fl_error *error)
{
    if (!is_power_of_two(cluster_size) || cluster_size < 4096 || cluster_size > 64u << 20)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "cluster_size is %u: it must be a power of two from 4096 to 67108864", cluster_size);
    if (options->stage_size < cluster_size)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "stage_size is %llu: it must hold one cluster of %u bytes at least",
                    (unsigned long long)options->stage_size, cluster_size);
    if (options->on_cbw_error < FL_BREAK_SNAPSHOT || options->on_cbw_error > FL_LOSE_RANGE)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "unknown policy %d", options->on_cbw_error);
    if (options->bitmap_mode < FL_BITMAP_ON_SUCCESS || options->bitmap_mode > FL_BITMAP_NEVER)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "unknown bitmap mode %d", options->bitmap_mode);
    if (options->fleecing && !options->fleecing->writable)
        return fail(error, EROFS, FL_SIDE_FLEECING, 0, 0, "%.300s: the fleecing image is not open for writing", options->fleecing->name);
    if (bitmap_granularity && bitmap_granularity < cluster_size)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "cluster_size is %u: it must not be larger than the bitmap's granularity of %llu",
                    cluster_size, (unsigned long long)bitmap_granularity);
    return 0;
}

int snapshot_create(fl_image *source, const fl_snapshot_options *options, uint64_t bitmap_granularity, fl_snapshot **out, fl_error *error)
{
    uint32_t cluster_size = options->cluster_size ? options->cluster_size : DEFAULT_CLUSTER_SIZE;
    int rc = check_options(options, cluster_size, bitmap_granularity, error);
    if (rc)
        return rc;
    fl_snapshot *snapshot = aligned_alloc(CACHE_LINE, align_up(sizeof *snapshot, CACHE_LINE));
    if (!snapshot)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a snapshot");
    memset(snapshot, 0, sizeof *snapshot);
    if (gate_init(&snapshot->gate) || pthread_mutex_init(&snapshot->lock, NULL) || cond_init(&snapshot->claims_changed)) {
        free(snapshot);
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "cannot make the locks of a snapshot");
    }
    atomic_init(&snapshot->references, 1);
    snapshot->source = image_ref(source);
    snapshot->size = source->size;
    snapshot->cluster_size = cluster_size;
    snapshot->shift = (uint32_t)__builtin_ctz(cluster_size);
    snapshot->clusters = div_up(snapshot->size, cluster_size);
    snapshot->on_cbw_error = options->on_cbw_error;
    snapshot->cbw_timeout = options->cbw_timeout;
    snapshot->bitmap_mode = options->bitmap_mode;
    if (bitmap_granularity) {
        snapshot->incremental = true;
        snapshot->bounded = !options->whole;
        snapshot->frozen_shift = (unsigned)__builtin_ctzll(bitmap_granularity) - snapshot->shift;
    }
    rc = make_bitmaps(snapshot);
    if (rc) {
        fail(error, -rc, FL_SIDE_NONE, 0, 0, "no memory for the bitmaps of a snapshot");
    } else {
        struct store_options store = { cluster_size, options->stage_size, options->fleecing, options->fleecing_limit };
        rc = store_create(&store, &snapshot->store, error);
    }
    if (rc)
        destroy(snapshot);
    else
        *out = snapshot;
    return rc;
}

fl_snapshot *snapshot_ref(fl_snapshot *snapshot)
{
    atomic_fetch_add(&snapshot->references, 1);
    return snapshot;
}

void snapshot_unref(fl_snapshot *snapshot)
{
    if (snapshot->gate.generation == fl_generation && atomic_fetch_sub(&snapshot->references, 1) == 1)
        destroy(snapshot);      /* a forked child leaves it all to the parent: locks in its copy may be held for ever */
}
