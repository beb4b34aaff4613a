/* disk.c: the guest's view of an image, and the cut that makes snapshots of disks. Its dirty bitmaps are dirty.c's.
 *
 * Lock order: disk->lock (of several disks: by id), then the gate `writes`, then nothing. The list of snapshots and the dirty bitmaps are changed with the lock
 * held and the gate closed; so either is enough to read them.
 */
#define _GNU_SOURCE
#include "cbw.h"

#include <stdlib.h>

/* ---- opening and closing ---- */

static atomic_uint_least64_t last_id;

int disk_use(fl_disk *disk, fl_error *error)
{
    int rc = gate_pass(&disk->life, "disk", error);
    if (rc)
        return rc;
    atomic_fetch_add(&disk->references, 1);
    gate_leave(&disk->life);
    return 0;
}

void disk_unref(fl_disk *disk)
{
    if (atomic_fetch_sub(&disk->references, 1) != 1)
        return;
    dirty_free_all(disk);
    pthread_mutex_destroy(&disk->lock);
    gate_destroy(&disk->writes);
    gate_destroy(&disk->life);
    free(disk);
}

int fl_disk_open(fl_image *source, fl_disk **out, fl_error *error)
{
    fl_disk *disk = aligned_alloc(CACHE_LINE, align_up(sizeof *disk, CACHE_LINE));
    if (!disk)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a disk");
    memset(disk, 0, sizeof *disk);
    if (gate_init(&disk->life) || gate_init(&disk->writes) || pthread_mutex_init(&disk->lock, NULL)) {
        free(disk);
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "cannot make the locks of a disk");
    }
    atomic_init(&disk->references, 1);
    disk->id = atomic_fetch_add(&last_id, 1) + 1;
    int rc = image_take(source, "the source of a disk", error);
    if (rc) {
        disk_unref(disk);
    } else {
        disk->source = source;
        disk->size = source->size;
        disk->writable = source->writable;
        *out = disk;
    }
    return rc;
}

static void end_snapshots(fl_disk *disk)
{
    for (;;) {
        pthread_mutex_lock(&disk->lock);
        fl_snapshot *snapshot = disk->snapshot_count ? snapshot_ref(disk->snapshots[0]) : NULL;
        pthread_mutex_unlock(&disk->lock);
        if (!snapshot)
            return;
        fl_snapshot_close(snapshot, NULL);
        snapshot_unref(snapshot);
    }
}

int fl_disk_close(fl_disk *disk, fl_error *error)
{
    if (disk->life.generation != fl_generation)
        return gate_pass(&disk->life, "disk", error);
    bool first = gate_shut_until(&disk->life, 0);
    end_snapshots(disk);        /* writers that wait for room go on without */
    gate_shut(&disk->life);
    end_snapshots(disk);        /* a cut that was under way */
    gate_shut(&disk->writes);
    int rc = 0;
    if (first) {                /* not later, when it is freed: the image may have to be closed now, and unlocked */
        pthread_mutex_lock(&disk->lock);
        rc = dirty_close_file(disk, error);
        pthread_mutex_unlock(&disk->lock);
        image_untake(disk->source);
        image_unref(disk->source);
        disk->source = NULL;
    }
    return rc;
}

void fl_disk_free(fl_disk *disk)
{
    if (!disk || disk->life.generation != fl_generation)
        return;
    fl_disk_close(disk, NULL);
    disk_unref(disk);
}

uint64_t fl_disk_size(fl_disk *disk) { return disk->size; }

/* ---- the guest's reads and writes ---- */

int fl_disk_pread(fl_disk *disk, void *buffer, size_t count, uint64_t offset, fl_error *error)
{
    int rc = gate_pass(&disk->life, "disk", error);
    if (rc)
        return rc;
    rc = image_read(disk->source, buffer, count, offset, error);
    if (rc && error)
        error->side = FL_SIDE_SOURCE;
    gate_leave(&disk->life);
    return rc;
}

int fl_disk_extents(fl_disk *disk, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error)
{
    int rc = gate_pass(&disk->life, "disk", error);
    if (rc)
        return rc;
    rc = image_extents(disk->source, offset, length, extents, max, found, error);
    if (rc && error)
        error->side = FL_SIDE_SOURCE;
    gate_leave(&disk->life);
    return rc;
}

uint64_t disk_allocated(fl_disk *disk)
{
    if (gate_enter(&disk->life))
        return 0;
    uint64_t allocated = disk->source->ops->allocated(disk->source);
    gate_leave(&disk->life);
    return allocated;
}

int fl_disk_flush(fl_disk *disk, fl_error *error)
{
    int rc = gate_pass(&disk->life, "disk", error);
    if (rc)
        return rc;
    rc = image_flush(disk->source, error);
    if (rc && error)
        error->side = FL_SIDE_SOURCE;
    gate_leave(&disk->life);
    return rc;
}

/* Refused before anything is saved for it. */
static int change(fl_disk *disk, enum change change, const void *data, uint64_t count, uint64_t offset, fl_error *error)
{
    if (LIKELY(count && in_range(count, offset, disk->size) && disk->writable))
        return cbw_change(disk, change, data, count, offset, error);
    int rc = gate_pass(&disk->life, "disk", error);     /* closed, or the parent's: that comes first */
    if (rc)
        return rc;
    if (!in_range(count, offset, disk->size))
        rc = fail(error, FL_ERANGE, FL_SIDE_SOURCE, offset, count, "%llu bytes at %llu are beyond the end of a disk of %llu bytes",
                  (unsigned long long)count, (unsigned long long)offset, (unsigned long long)disk->size);
    else if (!disk->writable)
        rc = fail(error, EROFS, FL_SIDE_SOURCE, offset, count, "%.300s: the source is not open for writing", disk->source->name);
    gate_leave(&disk->life);
    return rc;
}

int fl_disk_pwrite(fl_disk *disk, const void *buffer, size_t count, uint64_t offset, fl_error *error)
{
    return change(disk, CHANGE_WRITE, buffer, count, offset, error);
}

int fl_disk_zero(fl_disk *disk, uint64_t count, uint64_t offset, fl_error *error)
{
    return change(disk, CHANGE_ZERO, NULL, count, offset, error);
}

int fl_disk_discard(fl_disk *disk, uint64_t count, uint64_t offset, fl_error *error)
{
    return change(disk, CHANGE_DISCARD, NULL, count, offset, error);
}

/* ---- closing the gate for a moment ---- */

/* A write that hangs in the source must not hold up others, of other disks perhaps, behind a closed gate: it is closed for short moments, and for longer
   ones only when all of the short ones were too short for what is running. */
#define SHORT_NS 100000000u
#define SHORT_TRIES 20u
#define LONG_TRIES 3u           /* 1, 2 and 4 s */

static uint64_t try_until(unsigned try)
{
    return now_ns() + (try < SHORT_TRIES ? SHORT_NS : UINT64_C(1000000000) << (try - SHORT_TRIES));
}

static int too_slow(const fl_disk *disk, fl_error *error)
{
    return fail(error, ETIMEDOUT, FL_SIDE_SOURCE, 0, 0, "a write to %.250s has been running for seconds: no instant between writes was found",
                disk->source->name);
}

int disk_close_writes(fl_disk *disk, fl_error *error)
{
    int rc = -ETIMEDOUT;
    for (unsigned try = 0; rc == -ETIMEDOUT && try < SHORT_TRIES; try++)
        rc = gate_close(&disk->writes, try_until(try));
    if (rc == -ETIMEDOUT)
        return too_slow(disk, error);
    if (rc)
        fail(error, -rc, FL_SIDE_NONE, 0, 0, "the disk is closed");
    return rc;
}

/* ---- the cut ---- */

/* One disk's part of a cut. */
struct part {
    fl_disk *disk;
    fl_snapshot *snapshot;
    struct dirty *dirty;        /* to be frozen, or NULL; under the disk's lock */
    struct bitmap fresh;        /* takes its place */
    bool passed, locked, closed;
    const fl_snapshot_options *options;
    size_t index;               /* in the caller's arrays */
};

static int by_id(const void *a, const void *b)
{
    const struct part *x = a, *y = b;
    return (x->disk->id > y->disk->id) - (x->disk->id < y->disk->id);
}

/* May it be cut now? Finds the bitmap. Under the lock. */
static int check_part(struct part *part, fl_error *error)
{
    fl_disk *disk = part->disk;
    if (disk->snapshot_count == MAX_SNAPSHOTS)
        return fail(error, EMFILE, FL_SIDE_NONE, 0, 0, "%.300s has %d snapshots alive: no more at once", disk->source->name, MAX_SNAPSHOTS);
    if (!part->options->bitmap)
        return 0;
    part->dirty = *dirty_find(disk, part->options->bitmap);
    if (!part->dirty)
        return dirty_missing(part->options->bitmap, error);
    if (part->dirty->inconsistent)
        return dirty_untrusted(part->dirty, error);
    if (part->dirty->frozen_by)
        return fail(error, EBUSY, FL_SIDE_NONE, 0, 0, "another snapshot uses the dirty bitmap '%.200s'", part->options->bitmap);
    if (part->fresh.mapped && (part->fresh.bits != part->dirty->bits.bits || !dirty_ready(part->dirty)))
        return fail(error, EBUSY, FL_SIDE_NONE, 0, 0, "the dirty bitmap '%.200s' was replaced meanwhile", part->options->bitmap);
    return 0;
}

/* All that takes time or can fail, before any gate is closed. */
static int prepare(struct part *part, fl_error *error)
{
    uint64_t granularity = 0, bits = 0;
    int rc = gate_pass(&part->disk->life, "disk", error);
    if (rc)
        return rc;
    part->passed = true;
    pthread_mutex_lock(&part->disk->lock);
    rc = check_part(part, error);
    if (rc == 0 && part->dirty) {
        granularity = part->dirty->granularity;
        bits = part->dirty->bits.bits;
        if (part->dirty->kept)
            rc = kept_prepare(part->dirty->kept, error);
    }
    pthread_mutex_unlock(&part->disk->lock);
    if (rc)
        return rc;
    if (granularity && bitmap_init(&part->fresh, bits))
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a dirty bitmap");
    return snapshot_create(part->disk->source, part->options, granularity, &part->snapshot, error);
}

/* With the gates of all parts closed: cannot fail. */
static void install(struct part *part)
{
    fl_disk *disk = part->disk;
    fl_snapshot *snapshot = part->snapshot;
    atomic_fetch_add(&disk->references, 1);
    snapshot->disk = disk;
    disk->snapshots[disk->snapshot_count++] = snapshot;
    if (part->dirty) {
        snapshot->dirty = part->dirty;
        dirty_exchange(part->dirty, &part->fresh);
        snapshot->frozen = part->fresh;
        part->dirty->frozen_by = snapshot;
        memset(&part->fresh, 0, sizeof part->fresh);
    }
}

/* One try: close all gates, by `deadline`, and install. -ETIMEDOUT: a write was running all the time. */
static int cut(struct part *parts, size_t count, uint64_t deadline, fl_error *error)
{
    int rc = 0;
    for (size_t i = 0; i < count && rc == 0; i++) {
        pthread_mutex_lock(&parts[i].disk->lock);
        parts[i].locked = true;
        rc = check_part(&parts[i], error);
    }
    for (size_t i = 0; i < count && rc == 0; i++) {
        rc = gate_bar(&parts[i].disk->writes);
        parts[i].closed = rc == 0;
        if (rc)
            fail(error, -rc, FL_SIDE_NONE, 0, 0, "the disk is closed");
    }
    /* All writers are kept out before any is waited for: those of one disk would take the processors from the last write of another. */
    for (size_t i = 0; i < count && rc == 0; i++) {
        rc = gate_drain(&parts[i].disk->writes, deadline);
        if (rc) {
            parts[i].closed = false;
            too_slow(parts[i].disk, error);
        }
    }
    for (size_t i = 0; i < count && rc == 0; i++)       /* the instant: no write is running on any of the disks */
        install(&parts[i]);
    for (size_t i = 0; i < count; i++) {
        if (parts[i].closed)
            gate_open(&parts[i].disk->writes);
        if (parts[i].locked)
            pthread_mutex_unlock(&parts[i].disk->lock);
        parts[i].closed = parts[i].locked = false;
    }
    return rc;
}

int fl_snapshot_cut(fl_disk *const *disks, const fl_snapshot_options *options, size_t count, fl_snapshot **snapshots, fl_error *error)
{
    fl_error story;             /* of the last try */
    int rc = 0;
    struct part *parts = calloc(count ? count : 1, sizeof *parts);
    if (!parts)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a cut of %zu disks", count);
    for (size_t i = 0; i < count; i++)
        parts[i] = (struct part){ .disk = disks[i], .options = &options[i], .index = i };
    qsort(parts, count, sizeof *parts, by_id);
    for (size_t i = 0; i + 1 < count && rc == 0; i++)
        if (parts[i].disk == parts[i + 1].disk)
            rc = fail(&story, EINVAL, FL_SIDE_NONE, 0, 0, "a disk is in the group twice");
    for (size_t i = 0; i < count && rc == 0; i++)
        rc = prepare(&parts[i], &story);
    bool again = rc == 0;
    for (unsigned try = 0; again; try++) {
        rc = cut(parts, count, try_until(try), &story);
        again = rc == -ETIMEDOUT && try + 1 < SHORT_TRIES + LONG_TRIES;
        if (again && interrupted()) {   /* with all gates open, and no lock held */
            rc = fail(&story, FL_EINTERRUPTED, FL_SIDE_NONE, 0, 0, "interrupted while waiting for an instant without a running write");
            again = false;
        }
    }
    for (size_t i = 0; i < count; i++) {
        struct part *part = &parts[i];
        if (part->passed)
            gate_leave(&part->disk->life);
        if (rc == 0)
            snapshots[part->index] = part->snapshot;
        else if (part->snapshot) {
            store_close(part->snapshot->store);
            snapshot_unref(part->snapshot);
        }
        bitmap_destroy(&part->fresh);
    }
    if (rc && error)
        *error = story;
    free(parts);
    return rc;
}

/* ---- the end of a snapshot ---- */

/* No writer knows the snapshot any more when this returns. */
static void detach(fl_snapshot *snapshot)
{
    fl_disk *disk = snapshot->disk;
    pthread_mutex_lock(&disk->lock);
    int rc;
    while ((rc = gate_close(&disk->writes, try_until(0))) == -ETIMEDOUT)
        ;                       /* any instant without a writer will do: those that come in meanwhile see that it ended */
    if (rc)
        gate_shut(&disk->writes);       /* the disk is being closed: just wait for the writers inside */
    for (unsigned i = 0; i < disk->snapshot_count; i++)
        if (disk->snapshots[i] == snapshot) {
            disk->snapshot_count--;
            memmove(&disk->snapshots[i], &disk->snapshots[i + 1], (disk->snapshot_count - i) * sizeof *disk->snapshots);
            break;
        }
    if (rc == 0)
        gate_open(&disk->writes);
    if (snapshot->dirty) {
        /* Nothing dirty is ever forgotten unless the backup says that it has it. */
        if (snapshot->settled == UNSETTLED)
            dirty_settle(snapshot, false, NULL);
        snapshot->dirty->frozen_by = NULL;
        snapshot->dirty = NULL;
    }
    pthread_mutex_unlock(&disk->lock);
    pthread_mutex_lock(&snapshot->lock);
    snapshot->disk = NULL;
    pthread_mutex_unlock(&snapshot->lock);
    disk_unref(disk);
}

/* Commit or abort. */
static int settle(fl_snapshot *snapshot, bool commit, fl_error *error)
{
    int rc = gate_pass(&snapshot->gate, "snapshot", error);
    if (rc)
        return rc;
    pthread_mutex_lock(&snapshot->lock);
    fl_disk *disk = snapshot->disk;
    if (disk)
        atomic_fetch_add(&disk->references, 1);         /* close waits for us only so long */
    pthread_mutex_unlock(&snapshot->lock);
    if (disk) {
        pthread_mutex_lock(&disk->lock);
        if (!snapshot->dirty || snapshot->settled == (commit ? COMMITTED : ABORTED))
            rc = 0;             /* a full snapshot; or it was done */
        else if (snapshot->settled != UNSETTLED)
            rc = fail(error, EINVAL, FL_SIDE_NONE, 0, 0, commit ? "the snapshot was aborted: its dirty bitmap was merged back" : "the snapshot was committed");
        else
            rc = dirty_settle(snapshot, commit, error);
        pthread_mutex_unlock(&disk->lock);
        disk_unref(disk);
    } else {
        rc = fail(error, FL_ECLOSED, FL_SIDE_NONE, 0, 0, "the snapshot was closed");
    }
    gate_leave(&snapshot->gate);
    return rc;
}

int fl_snapshot_commit(fl_snapshot *snapshot, fl_error *error) { return settle(snapshot, true, error); }

int fl_snapshot_abort(fl_snapshot *snapshot, fl_error *error) { return settle(snapshot, false, error); }

#define READERS_GRACE_NS 200000000u     /* a read that hangs in the kernel is not waited for: it keeps its own reference and raises when it ends */

int fl_snapshot_close(fl_snapshot *snapshot, fl_error *error)
{
    if (snapshot->gate.generation != fl_generation)
        return gate_pass(&snapshot->gate, "snapshot", error);
    if (!gate_shut_until(&snapshot->gate, now_ns() + READERS_GRACE_NS))
        return 0;
    pthread_mutex_lock(&snapshot->lock);
    atomic_store(&snapshot->state, SNAPSHOT_ENDED);     /* before detach: a reader that is still inside looks again after its read */
    pthread_mutex_unlock(&snapshot->lock);
    detach(snapshot);
    store_close(snapshot->store);
    if (gate_is_empty(&snapshot->gate))
        snapshot_let_go(snapshot);      /* else the last reference does it */
    return 0;
}

void fl_snapshot_free(fl_snapshot *snapshot)
{
    if (!snapshot || snapshot->gate.generation != fl_generation)
        return;
    fl_snapshot_close(snapshot, NULL);
    snapshot_unref(snapshot);
}
