/* shot.h: a snapshot in the stress program: what its users know of it, and whether what a call on it did is allowed by that.
 *
 * A caller that changes what others may see (a release, a close) says so before the call in one map and after the call in another. A reader
 * looks at the second sort before its own call, and at the first sort after it: so both what it must see and what it may see are known.
 */
#ifndef SHOT_H
#define SHOT_H

#include "model.h"

#define MAX_SHOTS 4
#define SMALLEST_CLUSTER 4096
#define MOST_CLUSTERS (DISK_SIZE / SMALLEST_CLUSTER + 1)

/* What happened, in the order of the report. In long runs must happen: 'b' in both modes, 'c' in calm, 't' in tight ones. */
#define EVENTS(X) \
    X(writes, 'b') X(zeroes, 'b') X(discards, 'b') X(guest_reads, 'b') X(flushes, 'b') X(granule_writes, 'b') X(granule_zeroes, 'b') \
    X(chain_writes, 'b') X(exact_cuts, 'b') X(hot_cuts, 'b') X(group_cuts, 'b') X(hot_unknown_bytes, 'b') \
    X(reads, 'b') X(bytes_verified, 'b') X(extents, 'b') X(zero_extents, 'b') X(discarded_extents, 'b') X(chains_checked, 'b') \
    X(releases, 'b') X(reads_discarded, 'b') \
    X(reads_closed, 'b') X(drained, 'b') X(backups, 'b') X(chunk_backups, 'c') \
    X(clusters_saved, 'b') X(zero_clusters, 'b') X(bytes_spilled, 'b') X(room_waits, 'b') X(claim_waits, 'b') X(reads_repeated, 'c') \
    X(room_timeouts, 't') X(spill_errors, 't') X(failed_writes, 't') X(reads_broken, 't') X(reads_lost, 't') X(lost_extents, 't') \
    X(reads_failed, 't') X(clusters_lost, 't') X(backups_cancelled, 'c') X(backups_failed, ' ')

#define X(name, mode) EVENT_##name,
enum event { EVENTS(X) EVENT_COUNT };
#undef X
#define X(name, mode) { #name, mode },
static const struct { const char *name; char mode; } event_table[] = { EVENTS(X) };
#undef X
static atomic_uint_fast64_t event_count[EVENT_COUNT];
#define COUNT(name, n) atomic_fetch_add_explicit(&event_count[EVENT_##name], n, memory_order_relaxed)

static bool tight;                      /* the mode; fixed while threads run */

/* ---- snapshots ---- */

struct shot {
    /* fixed after the cut */
    fl_snapshot *snapshot;
    struct picture *picture;
    fl_image *fleecing, *inner;         /* NULL when let go of right after the cut, or none */
    char name[80];
    uint32_t cluster;
    uint64_t clusters;
    int policy;
    bool faulty, for_backup;

    /* What callers know of it. "To" is set before the call, the other after it returned. */
    atomic_bool broken, to_close, closed, backed_up;
    atomic_uchar *to_release, *released, *lost;         /* by cluster */
    unsigned users;                     /* protected by shots_lock */
};

static pthread_mutex_t shots_lock = PTHREAD_MUTEX_INITIALIZER;      /* protects shots, their `users`, and goes with shot_left */
static pthread_cond_t shot_left = PTHREAD_COND_INITIALIZER;
static struct shot *shots[MAX_SHOTS];

static struct shot *shot_get(uint64_t *random)
{
    pthread_mutex_lock(&shots_lock);
    struct shot *s = shots[below(random, MAX_SHOTS)];
    if (s)
        s->users++;
    pthread_mutex_unlock(&shots_lock);
    return s;
}

static void shot_put(struct shot *s)
{
    pthread_mutex_lock(&shots_lock);
    s->users--;
    pthread_cond_broadcast(&shot_left);
    pthread_mutex_unlock(&shots_lock);
}

static bool any_of(const struct shot *s, atomic_uchar *map, uint64_t count, uint64_t offset)
{
    for (uint64_t c = offset / s->cluster; c <= (offset + count - 1) / s->cluster; c++)
        if (atomic_load(&map[c]))
            return true;
    return false;
}

/* Mark the whole clusters of the range (the tail counts as whole). */
static void mark(const struct shot *s, atomic_uchar *map, uint64_t count, uint64_t offset)
{
    for (uint64_t c = (offset + s->cluster - 1) / s->cluster; c < s->clusters; c++) {
        if (least((c + 1) * s->cluster, (uint64_t)DISK_SIZE) > offset + count)
            break;
        atomic_store(&map[c], 1);
    }
}

/* What was true before a call on the range was made, and so must show in its result. */
struct before { bool broken, closed, released, lost; };

static struct before look(const struct shot *s, uint64_t count, uint64_t offset)
{
    return (struct before){ .broken = atomic_load(&s->broken), .closed = atomic_load(&s->closed),
                            .released = any_of(s, s->released, count, offset), .lost = any_of(s, s->lost, count, offset) };
}

/* Was the snapshot allowed to fail with `rc` on this range? */
static void check_failure(struct shot *s, int rc, uint64_t count, uint64_t offset)
{
    CHECK(why.code == rc, "%s: returned %d, error says %d", s->name, rc, why.code);
    switch (-rc) {
    case FL_EDISCARDED:
        CHECK(any_of(s, s->to_release, count, offset), "%s: %" PRIu64 " at %" PRIu64 " was not discarded: %s",
              s->name, count, offset, why.text);
        COUNT(reads_discarded, 1);
        break;
    case FL_EBROKEN:
        CHECK(tight && s->policy == FL_BREAK_SNAPSHOT, "%s: broken: %s", s->name, why.text);
        CHECK(why.cause != 0 && why.text[0], "%s: broken without a cause", s->name);
        atomic_store(&s->broken, true);
        COUNT(reads_broken, 1);
        break;
    case FL_ELOST:
        CHECK(tight && s->policy == FL_LOSE_RANGE, "%s: lost: %s", s->name, why.text);
        if (offset / s->cluster == (offset + count - 1) / s->cluster)
            atomic_store(&s->lost[offset / s->cluster], 1);
        COUNT(reads_lost, 1);
        break;
    case FL_ECLOSED:
        CHECK(atomic_load(&s->to_close), "%s: closed by nobody", s->name);
        COUNT(reads_closed, 1);
        break;
    case EIO:
        CHECK(tight && (why.side == FL_SIDE_SOURCE || (s->faulty && why.side == FL_SIDE_FLEECING)), "%s: %s (side %d)", s->name, why.text,
              why.side);
        COUNT(reads_failed, 1);
        break;
    default:
        CHECK(false, "%s: %" PRIu64 " at %" PRIu64 ": %d (%s): %s", s->name, count, offset, rc, fl_strerror(-rc), why.text);
    }
}

static void read_and_check(struct shot *s, uint8_t *buffer, uint64_t count, uint64_t offset)
{
    struct before before = look(s, count, offset);
    int rc = fl_snapshot_pread(s->snapshot, buffer, count, offset, &why);
    if (rc) {
        check_failure(s, rc, count, offset);
        return;
    }
    CHECK(!before.broken && !before.closed && !before.released && !before.lost,
          "%s: read of %" PRIu64 " at %" PRIu64 " succeeded: broken %d, closed %d, released %d, lost %d before it", s->name, count, offset,
          before.broken, before.closed, before.released, before.lost);
    picture_check(s->picture, buffer, count, offset);
    COUNT(reads, 1);
    COUNT(bytes_verified, count);
}

static void extents_and_check(struct shot *s, uint64_t count, uint64_t offset, size_t max)
{
    fl_extent e[32];
    size_t found = 0;
    uint8_t released[MOST_CLUSTERS];
    struct before before = look(s, count, offset);
    uint64_t last = (offset + count - 1) / s->cluster;
    for (uint64_t c = offset / s->cluster; c <= last; c++)
        released[c] = atomic_load(&s->released[c]);
    int rc = fl_snapshot_extents(s->snapshot, offset, count, e, least(max, 32), &found, &why);
    if (rc) {
        CHECK(rc != -FL_EDISCARDED && rc != -FL_ELOST, "%s: extents say so by kind: %s", s->name, why.text);
        check_failure(s, rc, count, offset);
        return;
    }
    CHECK(!before.closed && found > 0 && found <= max, "%s: %zu of %zu extents", s->name, found, max);
    uint64_t at = offset;
    for (size_t i = 0; i < found; at += e[i++].length) {
        CHECK(e[i].offset == at && e[i].length > 0 && e[i].length <= offset + count - at, "%s: extent %zu is %" PRIu64 " at %" PRIu64
              ", the last one ended at %" PRIu64, s->name, i, e[i].length, e[i].offset, at);
        CHECK(i == 0 || e[i].kind != e[i - 1].kind, "%s: neighbours of the same kind %d", s->name, e[i].kind);
        CHECK(e[i].kind == FL_DATA || e[i].kind == FL_ZERO || e[i].kind == FL_DISCARDED || (e[i].kind == FL_LOST && tight
              && s->policy == FL_LOSE_RANGE), "%s: kind %d", s->name, e[i].kind);
        for (uint64_t c = at / s->cluster; c <= (at + e[i].length - 1) / s->cluster; c++) {
            if (e[i].kind == FL_DISCARDED)
                CHECK(atomic_load(&s->to_release[c]), "%s: cluster %" PRIu64 " was not discarded", s->name, c);
            else
                CHECK(!released[c], "%s: cluster %" PRIu64 " was discarded, extents say %d", s->name, c, e[i].kind);
            if (e[i].kind == FL_LOST)
                atomic_store(&s->lost[c], 1);
        }
        if (e[i].kind == FL_ZERO)
            picture_check(s->picture, NULL, e[i].length, at);
        COUNT(zero_extents, e[i].kind == FL_ZERO);
        COUNT(discarded_extents, e[i].kind == FL_DISCARDED);
        COUNT(lost_extents, e[i].kind == FL_LOST);
    }
    COUNT(extents, 1);
}

/* At one instant Y <= X <= Y + 1 for the chain of any writer. */
static void chain_and_check(struct shot *s, unsigned w)
{
    uint8_t x[SECTOR], y[SECTOR];
    int rc = fl_snapshot_pread(s->snapshot, x, SECTOR, CHAIN_X + w * SECTOR, &why);
    if (rc == 0)
        rc = fl_snapshot_pread(s->snapshot, y, SECTOR, CHAIN_Y + w * SECTOR, &why);
    if (rc)
        return;             /* reads of all sorts are judged elsewhere */
    uint64_t nx = sector_number(x, CHAIN_X / SECTOR + w, s->name), ny = sector_number(y, CHAIN_Y / SECTOR + w, s->name);
    CHECK(ny <= nx && nx <= ny + 1, "%s: not one instant: writer %u wrote X %" PRIu64 " and Y %" PRIu64, s->name, w, nx, ny);
    COUNT(chains_checked, 1);
}

/* Release the range, and say so. */
static void release_and_mark(struct shot *s, uint64_t count, uint64_t offset)
{
    mark(s, s->to_release, count, offset);
    int rc = fl_snapshot_discard(s->snapshot, count, offset, &why);
    if (rc == 0) {
        mark(s, s->released, count, offset);
        COUNT(releases, 1);
    } else {
        CHECK(rc == -FL_EBROKEN || rc == -FL_ECLOSED, "%s: release: %s", s->name, why.text);
        check_failure(s, rc, count, offset);
    }
}

#endif
