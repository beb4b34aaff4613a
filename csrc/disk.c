/* disk.c: the guest's view of an image, its dirty bitmaps, and the cut that makes snapshots of disks.
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
    while (disk->dirty) {
        struct dirty *dirty = disk->dirty;
        disk->dirty = dirty->next;
        bitmap_destroy(&dirty->bits);
        free(dirty);
    }
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
    if (first) {                /* not later, when it is freed: the image may have to be closed now, and unlocked */
        image_untake(disk->source);
        image_unref(disk->source);
        disk->source = NULL;
    }
    return 0;
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

/* Under the lock. */
static int close_writes(fl_disk *disk, fl_error *error)
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

/* ---- dirty bitmaps ---- */

/* Under the lock. */
static struct dirty **find_dirty(fl_disk *disk, const char *name)
{
    struct dirty **link = &disk->dirty;
    while (*link && strcmp((*link)->name, name) != 0)
        link = &(*link)->next;
    return link;
}

static int no_bitmap(const char *name, fl_error *error)
{
    return fail(error, ENOENT, FL_SIDE_NONE, 0, 0, "the disk has no dirty bitmap '%.200s'", name);
}

int fl_disk_bitmap_add(fl_disk *disk, const char *name, uint64_t granularity, fl_error *error)
{
    struct dirty *dirty = NULL;
    int rc = gate_pass(&disk->life, "disk", error);
    if (rc)
        return rc;
    pthread_mutex_lock(&disk->lock);
    if (!is_power_of_two(granularity) || granularity < 4096 || granularity > UINT64_C(2) << 30) {
        rc = fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "the granularity of a dirty bitmap is %llu: it must be a power of two from 4096 to 2147483648",
                  (unsigned long long)granularity);
        goto out;
    }
    if (!*name || strlen(name) >= sizeof dirty->name) {
        rc = fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "the name of a dirty bitmap has 1 to %zu bytes", sizeof dirty->name - 1);
        goto out;
    }
    if (*find_dirty(disk, name)) {
        rc = fail(error, EEXIST, FL_SIDE_NONE, 0, 0, "the disk has a dirty bitmap '%.200s' already", name);
        goto out;
    }
    dirty = calloc(1, sizeof *dirty);
    if (!dirty || bitmap_init(&dirty->bits, div_up(disk->size, granularity))) {
        rc = fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a dirty bitmap");
        goto out;
    }
    strcpy(dirty->name, name);
    dirty->granularity = granularity;
    dirty->shift = (unsigned)__builtin_ctzll(granularity);
    rc = close_writes(disk, error);
    if (rc)
        goto out;
    dirty->next = disk->dirty;
    disk->dirty = dirty;
    gate_open(&disk->writes);
out:
    if (rc && dirty) {
        bitmap_destroy(&dirty->bits);
        free(dirty);
    }
    pthread_mutex_unlock(&disk->lock);
    gate_leave(&disk->life);
    return rc;
}

int fl_disk_bitmap_remove(fl_disk *disk, const char *name, fl_error *error)
{
    int rc = gate_pass(&disk->life, "disk", error);
    if (rc)
        return rc;
    pthread_mutex_lock(&disk->lock);
    struct dirty **link = find_dirty(disk, name), *dirty = *link;
    if (!dirty) {
        rc = no_bitmap(name, error);
    } else if (dirty->frozen_by) {
        rc = fail(error, EBUSY, FL_SIDE_NONE, 0, 0, "a snapshot uses the dirty bitmap '%.200s'", name);
    } else if ((rc = close_writes(disk, error)) == 0) {
        *link = dirty->next;
        gate_open(&disk->writes);
        bitmap_destroy(&dirty->bits);
        free(dirty);
    }
    pthread_mutex_unlock(&disk->lock);
    gate_leave(&disk->life);
    return rc;
}

/* Bytes of the disk that bits [first, end) stand for. */
static uint64_t dirty_bytes(const fl_disk *disk, const struct dirty *dirty, uint64_t first, uint64_t end)
{
    return MIN(end << dirty->shift, disk->size) - (first << dirty->shift);
}

int fl_disk_bitmap_info(fl_disk *disk, const char *name, uint64_t *granularity, uint64_t *bytes, fl_error *error)
{
    int rc = gate_pass(&disk->life, "disk", error);
    if (rc)
        return rc;
    pthread_mutex_lock(&disk->lock);
    const struct dirty *dirty = *find_dirty(disk, name);
    if (dirty) {
        uint64_t last = dirty->bits.bits - 1, full = bitmap_count(&dirty->bits) << dirty->shift;
        if (dirty->bits.bits && bitmap_test(&dirty->bits, last))
            full -= dirty->granularity - dirty_bytes(disk, dirty, last, last + 1);
        *granularity = dirty->granularity;
        *bytes = full;
    } else {
        rc = no_bitmap(name, error);
    }
    pthread_mutex_unlock(&disk->lock);
    gate_leave(&disk->life);
    return rc;
}

int fl_disk_bitmap_name(fl_disk *disk, size_t index, char *name, fl_error *error)
{
    int rc = gate_pass(&disk->life, "disk", error);
    if (rc)
        return rc;
    pthread_mutex_lock(&disk->lock);
    const struct dirty *dirty = disk->dirty;
    while (dirty && index--)
        dirty = dirty->next;
    if (dirty)
        strcpy(name, dirty->name);
    else
        rc = fail(error, ENOENT, FL_SIDE_NONE, 0, 0, "there are no more dirty bitmaps");
    pthread_mutex_unlock(&disk->lock);
    gate_leave(&disk->life);
    return rc;
}

int fl_disk_bitmap_extents(fl_disk *disk, const char *name, uint64_t offset, uint64_t length,
                           fl_extent *extents, size_t max, size_t *found, fl_error *error)
{
    int rc = gate_pass(&disk->life, "disk", error);
    if (rc)
        return rc;
    pthread_mutex_lock(&disk->lock);
    const struct dirty *dirty = *find_dirty(disk, name);
    size_t count = 0;
    if (!dirty) {
        rc = no_bitmap(name, error);
        goto out;
    }
    if (!in_range(length, offset, disk->size)) {
        rc = fail(error, FL_ERANGE, FL_SIDE_NONE, offset, length, "%llu bytes at %llu are beyond the end of a disk of %llu bytes",
                  (unsigned long long)length, (unsigned long long)offset, (unsigned long long)disk->size);
        goto out;
    }
    for (uint64_t end = offset + length; offset < end && count < max; count++) {
        uint64_t bit = offset >> dirty->shift, last = ((end - 1) >> dirty->shift) + 1;
        bool set = bitmap_test(&dirty->bits, bit);
        uint64_t next = set ? bitmap_next_clear(&dirty->bits, bit, last) : bitmap_next_set(&dirty->bits, bit, last);
        uint64_t until = MIN(end, next << dirty->shift);
        extents[count] = (fl_extent){ offset, until - offset, set ? FL_DATA : FL_OUTSIDE };
        offset = until;
    }
    *found = count;
out:
    pthread_mutex_unlock(&disk->lock);
    gate_leave(&disk->life);
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
    part->dirty = *find_dirty(disk, part->options->bitmap);
    if (!part->dirty)
        return no_bitmap(part->options->bitmap, error);
    if (part->dirty->frozen_by)
        return fail(error, EBUSY, FL_SIDE_NONE, 0, 0, "another snapshot uses the dirty bitmap '%.200s'", part->options->bitmap);
    if (part->fresh.mapped && part->fresh.bits != part->dirty->bits.bits)
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
        snapshot->frozen = part->dirty->bits;
        part->dirty->bits = part->fresh;
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
        rc = gate_close(&parts[i].disk->writes, deadline);
        parts[i].closed = rc == 0;
        if (rc == -ETIMEDOUT)
            too_slow(parts[i].disk, error);
        else if (rc)
            fail(error, -rc, FL_SIDE_NONE, 0, 0, "the disk is closed");
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
        /* Bits are only added: writers may mark meanwhile. Nothing dirty is ever forgotten unless the backup says that it has it. */
        if (!atomic_load(&snapshot->committed))
            bitmap_merge(&snapshot->dirty->bits, &snapshot->frozen);
        snapshot->dirty->frozen_by = NULL;
        snapshot->dirty = NULL;
    }
    pthread_mutex_unlock(&disk->lock);
    snapshot->disk = NULL;
    disk_unref(disk);
}

int fl_snapshot_commit(fl_snapshot *snapshot, fl_error *error)
{
    int rc = gate_pass(&snapshot->gate, "snapshot", error);
    if (rc)
        return rc;
    atomic_store(&snapshot->committed, true);
    gate_leave(&snapshot->gate);
    return 0;
}

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
