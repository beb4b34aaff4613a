/* dirty.c: the dirty bitmaps of a disk: adding, clearing, merging, looking at them, and what becomes of one that a cut froze.
 *
 * All of it is done under the disk's lock. What the write path looks at is changed with the gate closed as well: then no write is running, so a write is wholly
 * before a clear, or marks its bits after it. The file of the persistent ones (sidecar.h) is written before that, or after it, never with the gate closed.
 */
#define _GNU_SOURCE
#include "cbw.h"

#include <stdio.h>
#include <stdlib.h>

struct dirty **dirty_find(fl_disk *disk, const char *name)
{
    struct dirty **link = &disk->dirty;
    while (*link && strcmp((*link)->name, name) != 0)
        link = &(*link)->next;
    return link;
}

int dirty_missing(const char *name, fl_error *error)
{
    return fail(error, ENOENT, FL_SIDE_NONE, 0, 0, "the disk has no dirty bitmap '%.200s'", name);
}

int dirty_untrusted(const struct dirty *dirty, fl_error *error)
{
    return fail(error, FL_EINCONSISTENT, FL_SIDE_NONE, 0, 0, "the dirty bitmap '%.150s' is inconsistent: %s; a full backup is needed, and the bitmap to be "
                "cleared or removed", dirty->name, sidecar_reason(dirty->kept ? dirty->kept->record.reason : REASON_NONE));
}

/* The bitmap, for a call that changes or reads it. NULL: rc tells. Under the lock. */
enum { MAY_BE_BUSY = 1, MAY_BE_INCONSISTENT = 2 };

static struct dirty *find(fl_disk *disk, const char *name, int allow, int *rc, fl_error *error)
{
    struct dirty *dirty = *dirty_find(disk, name);
    if (!dirty)
        *rc = dirty_missing(name, error);
    else if (dirty->frozen_by && !(allow & MAY_BE_BUSY))
        *rc = fail(error, EBUSY, FL_SIDE_NONE, 0, 0, "a snapshot uses the dirty bitmap '%.200s'", name);
    else if (dirty->inconsistent && !(allow & MAY_BE_INCONSISTENT))
        *rc = dirty_untrusted(dirty, error);
    else
        return dirty;
    return NULL;
}

/* Pass the disk's gate and take its lock. */
static int enter(fl_disk *disk, fl_error *error)
{
    int rc = gate_pass(&disk->life, "disk", error);
    if (rc == 0)
        pthread_mutex_lock(&disk->lock);
    return rc;
}

static int leave(fl_disk *disk, int rc)
{
    pthread_mutex_unlock(&disk->lock);
    gate_leave(&disk->life);
    return rc;
}

void dirty_destroy(struct dirty *dirty)
{
    bitmap_destroy(&dirty->bits);
    free(dirty);
}

void dirty_free_all(fl_disk *disk)
{
    while (disk->dirty) {
        struct dirty *dirty = disk->dirty;
        disk->dirty = dirty->next;
        dirty_destroy(dirty);
    }
}

/* In write-intent mode a bitmap is good after a crash of the machine. Then what it calls clean must be on stable storage: what was written before it began to
   record, or before the cut of a backup that is committed, would come back as it was before, and differ from the backup without being dirty. */
static int flush_source(fl_disk *disk, const struct dirty *dirty, fl_error *error)
{
    if (!dirty->kept || !(dirty->kept->record.flags & RECORD_WRITE_INTENT) || !disk->writable)
        return 0;
    int rc = image_flush(disk->source, error);
    if (rc && error)
        error->side = FL_SIDE_SOURCE;
    return rc;
}

/* ---- adding and removing ---- */

static int check_new(fl_disk *disk, const char *name, uint64_t granularity, fl_error *error)
{
    if (!is_power_of_two(granularity) || granularity < SIDECAR_MIN_GRANULARITY || granularity > SIDECAR_MAX_GRANULARITY)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "the granularity of a dirty bitmap is %llu: it must be a power of two from 4096 to 2147483648",
                    (unsigned long long)granularity);
    if (!*name || strlen(name) >= sizeof ((struct dirty *)NULL)->name)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "the name of a dirty bitmap has 1 to 255 bytes");
    if (*dirty_find(disk, name))
        return fail(error, EEXIST, FL_SIDE_NONE, 0, 0, "the disk has a dirty bitmap '%.200s' already", name);
    return 0;
}

struct dirty *dirty_new(const char *name, uint64_t granularity)
{
    struct dirty *dirty = calloc(1, sizeof *dirty);
    if (dirty) {
        strcpy(dirty->name, name);
        dirty->granularity = granularity;
        dirty->shift = (unsigned)__builtin_ctzll(granularity);
        dirty->enabled = dirty->recording = true;
    }
    return dirty;
}

/* It could not be made persistent. Returns rc. */
static int undo_add(fl_disk *disk, struct dirty *dirty, int rc)
{
    if (disk_close_writes(disk, NULL))
        return rc;              /* the disk is being closed, or busy beyond measure: the file calls it inconsistent */
    *dirty_find(disk, dirty->name) = dirty->next;
    gate_open(&disk->writes);
    kept_remove(dirty->kept, NULL);
    dirty_destroy(dirty);
    return rc;
}

static int add(fl_disk *disk, const char *name, uint64_t granularity, bool persistent, bool write_intent, fl_error *error)
{
    int rc = check_new(disk, name, granularity, error);
    if (rc)
        return rc;
    if (persistent && !disk->sidecar)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "no file was opened for the dirty bitmaps of this disk");
    struct dirty *dirty = dirty_new(name, granularity);
    if (!dirty || bitmap_init(&dirty->bits, div_up(disk->size, granularity))) {
        free(dirty);
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a dirty bitmap");
    }
    if (persistent)
        rc = kept_add(disk->sidecar, name, granularity, write_intent, &dirty->kept, error);
    if (rc == 0)
        rc = disk_close_writes(disk, error);
    if (rc) {
        if (dirty->kept)
            kept_remove(dirty->kept, NULL);
        dirty_destroy(dirty);
        return rc;
    }
    dirty->next = disk->dirty;
    disk->dirty = dirty;
    gate_open(&disk->writes);
    rc = flush_source(disk, dirty, error);
    if (rc == 0 && dirty->kept)
        rc = kept_confirm(dirty->kept, error);
    return rc ? undo_add(disk, dirty, rc) : 0;
}

int fl_disk_bitmap_add(fl_disk *disk, const char *name, uint64_t granularity, fl_error *error)
{
    int rc = enter(disk, error);
    return rc ? rc : leave(disk, add(disk, name, granularity, false, false, error));
}

int fl_disk_bitmap_add_persistent(fl_disk *disk, const char *name, uint64_t granularity, int write_intent, fl_error *error)
{
    int rc = enter(disk, error);
    return rc ? rc : leave(disk, add(disk, name, granularity, true, write_intent, error));
}

/* Marks stop while the file calls it inconsistent: at no moment does it hold one that looks good and is not marked. */
static int remove_one(fl_disk *disk, const char *name, fl_error *error)
{
    int rc = 0;
    struct dirty *dirty = find(disk, name, MAY_BE_INCONSISTENT, &rc, error);
    if (!dirty)
        return rc;
    bool doubted = dirty->kept && !dirty->inconsistent;
    if (doubted && (rc = kept_doubt(dirty->kept, error)) != 0)
        return rc;
    rc = disk_close_writes(disk, error);
    if (rc) {
        if (doubted)
            kept_confirm(dirty->kept, NULL);
        return rc;
    }
    *dirty_find(disk, name) = dirty->next;
    gate_open(&disk->writes);
    rc = dirty->kept ? kept_remove(dirty->kept, error) : 0;
    dirty_destroy(dirty);
    return rc;
}

int fl_disk_bitmap_remove(fl_disk *disk, const char *name, fl_error *error)
{
    int rc = enter(disk, error);
    return rc ? rc : leave(disk, remove_one(disk, name, error));
}

/* ---- changing ---- */

bool dirty_ready(const struct dirty *dirty)
{
    return !dirty->kept || dirty->kept->ready || atomic_load(&dirty->kept->failed);
}

void dirty_exchange(struct dirty *dirty, struct bitmap *bits)
{
    struct bitmap old = dirty->bits;
    dirty->bits = *bits;
    *bits = old;
    if (dirty->kept)
        kept_switch(dirty->kept);
}

/* Make dirty what is set in `bits`. Writers may mark meanwhile: bits are only added, in the file first. */
static void add_bits(struct dirty *dirty, const struct bitmap *bits)
{
    if (dirty->kept)
        kept_mark_all(dirty->kept, bits);
    bitmap_merge(&dirty->bits, bits);
}

static int clear(fl_disk *disk, struct dirty *dirty, fl_error *error)
{
    struct bitmap bits;
    const bool revive = dirty->inconsistent;
    if (bitmap_init(&bits, div_up(disk->size, dirty->granularity)))
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a dirty bitmap");
    int rc = 0;
    if (dirty->kept)
        rc = revive ? kept_revive(dirty->kept, error) : kept_prepare(dirty->kept, error);
    if (rc == 0)
        rc = disk_close_writes(disk, error);
    if (rc == 0) {
        if (revive) {
            dirty->bits = bits;
            memset(&bits, 0, sizeof bits);
            dirty->inconsistent = false;
            dirty->recording = dirty->enabled;
        } else {
            dirty_exchange(dirty, &bits);
        }
        gate_open(&disk->writes);
        rc = flush_source(disk, dirty, error);
        if (rc == 0 && dirty->kept)
            rc = revive ? kept_confirm(dirty->kept, error) : kept_drop_old(dirty->kept, error);
        if (rc && revive)
            atomic_store(&dirty->kept->failed, true);   /* good in memory; the file still calls it inconsistent */
        else if (rc)
            add_bits(dirty, &bits);                     /* not cleared, then: whoever asked was told so */
    }
    bitmap_destroy(&bits);
    return rc;
}

int fl_disk_bitmap_clear(fl_disk *disk, const char *name, fl_error *error)
{
    int rc = enter(disk, error);
    if (rc)
        return rc;
    struct dirty *dirty = find(disk, name, MAY_BE_INCONSISTENT, &rc, error);
    return leave(disk, dirty ? clear(disk, dirty, error) : rc);
}

/* The file says so before marks stop, and after they began: what it says is enabled has all marks. */
static int enable(fl_disk *disk, struct dirty *dirty, bool enabled, fl_error *error)
{
    int rc = 0;
    if (dirty->enabled == enabled)
        return 0;
    if (dirty->kept && !enabled)
        rc = kept_enable(dirty->kept, false, error);
    if (rc == 0)
        rc = disk_close_writes(disk, error);
    if (rc)
        return rc;
    dirty->enabled = dirty->recording = enabled;
    gate_open(&disk->writes);
    if (dirty->kept && enabled && (rc = flush_source(disk, dirty, error)) == 0)
        rc = kept_enable(dirty->kept, true, error);
    return rc;
}

int fl_disk_bitmap_enable(fl_disk *disk, const char *name, int enabled, fl_error *error)
{
    int rc = enter(disk, error);
    if (rc)
        return rc;
    struct dirty *dirty = find(disk, name, 0, &rc, error);
    return leave(disk, dirty ? enable(disk, dirty, enabled, error) : rc);
}

static void collect(struct bitmap *sum, unsigned shift, const struct dirty *from)
{
    uint64_t end;
    for (uint64_t bit = 0; (bit = bitmap_next_set(&from->bits, bit, from->bits.bits)) < from->bits.bits; bit = end) {
        end = bitmap_next_clear(&from->bits, bit, from->bits.bits);
        uint64_t first = bit << from->shift >> shift, last = MIN(((end << from->shift) - 1) >> shift, sum->bits - 1);
        bitmap_set(sum, first, last - first + 1);
    }
}

int fl_disk_bitmap_merge(fl_disk *disk, const char *into, const char *const *from, size_t count, fl_error *error)
{
    struct bitmap sum = { 0 };
    int rc = enter(disk, error);
    if (rc)
        return rc;
    struct dirty *to = find(disk, into, 0, &rc, error), *one = to;
    for (size_t i = 0; i < count && one; i++)
        one = find(disk, from[i], 0, &rc, error);
    if (!to || !one)
        return leave(disk, rc);
    if (bitmap_init(&sum, to->bits.bits))
        return leave(disk, fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a dirty bitmap"));
    for (size_t i = 0; i < count; i++)
        collect(&sum, to->shift, *dirty_find(disk, from[i]));
    add_bits(to, &sum);
    bitmap_destroy(&sum);
    return leave(disk, 0);
}

/* ---- looking ---- */

/* Bytes of the disk that bits [first, end) stand for. */
static uint64_t dirty_bytes(const fl_disk *disk, const struct dirty *dirty, uint64_t first, uint64_t end)
{
    return MIN(end << dirty->shift, disk->size) - (first << dirty->shift);
}

int fl_disk_bitmap_info(fl_disk *disk, const char *name, uint64_t *granularity, uint64_t *bytes, fl_error *error)
{
    int rc = enter(disk, error);
    if (rc)
        return rc;
    const struct dirty *dirty = find(disk, name, MAY_BE_BUSY, &rc, error);
    if (dirty) {
        uint64_t last = dirty->bits.bits - 1, full = bitmap_count(&dirty->bits) << dirty->shift;
        if (dirty->bits.bits && bitmap_test(&dirty->bits, last))
            full -= dirty->granularity - dirty_bytes(disk, dirty, last, last + 1);
        *granularity = dirty->granularity;
        *bytes = full;
    }
    return leave(disk, rc);
}

int fl_disk_bitmap_name(fl_disk *disk, size_t index, char *name, fl_error *error)
{
    int rc = enter(disk, error);
    if (rc)
        return rc;
    const struct dirty *dirty = disk->dirty;
    while (dirty && index--)
        dirty = dirty->next;
    if (dirty)
        strcpy(name, dirty->name);
    else
        rc = fail(error, ENOENT, FL_SIDE_NONE, 0, 0, "there are no more dirty bitmaps");
    return leave(disk, rc);
}

int fl_disk_bitmap_state(fl_disk *disk, const char *name, fl_bitmap_state *state, fl_error *error)
{
    int rc = enter(disk, error);
    if (rc)
        return rc;
    const struct dirty *dirty = find(disk, name, MAY_BE_BUSY | MAY_BE_INCONSISTENT, &rc, error);
    if (dirty) {
        memset(state, 0, sizeof *state);
        state->granularity = dirty->granularity;
        state->enabled = dirty->enabled;
        state->busy = dirty->frozen_by != NULL;
        state->inconsistent = dirty->inconsistent;
        if (dirty->kept) {
            const struct sidecar_record *record = &dirty->kept->record;
            char *text = state->uuid;
            state->persistent = true;
            state->write_intent = (record->flags & RECORD_WRITE_INTENT) != 0;
            for (int i = 0; i < 16; i++)
                text += sprintf(text, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", record->uuid[i]);
            if (dirty->inconsistent || atomic_load(&dirty->kept->failed))
                snprintf(state->problem, sizeof state->problem, "%s", sidecar_reason(record->reason));
        }
    }
    return leave(disk, rc);
}

int fl_disk_bitmap_extents(fl_disk *disk, const char *name, uint64_t offset, uint64_t length,
                           fl_extent *extents, size_t max, size_t *found, fl_error *error)
{
    int rc = enter(disk, error);
    if (rc)
        return rc;
    const struct dirty *dirty = find(disk, name, MAY_BE_BUSY, &rc, error);
    size_t count = 0;
    if (!dirty)
        return leave(disk, rc);
    if (!in_range(length, offset, disk->size))
        return leave(disk, fail(error, FL_ERANGE, FL_SIDE_NONE, offset, length, "%llu bytes at %llu are beyond the end of a disk of %llu bytes",
                                (unsigned long long)length, (unsigned long long)offset, (unsigned long long)disk->size));
    for (uint64_t end = offset + length; offset < end && count < max; count++) {
        uint64_t bit = offset >> dirty->shift, last = ((end - 1) >> dirty->shift) + 1;
        bool set;
        uint64_t until = MIN(end, bitmap_run(&dirty->bits, bit, last, &set) << dirty->shift);
        extents[count] = (fl_extent){ offset, until - offset, set ? FL_DATA : FL_OUTSIDE };
        offset = until;
    }
    *found = count;
    return leave(disk, 0);
}

/* ---- what becomes of a frozen one ---- */

/* What has to come back all the same: of a commit what was lost, of an abort (mode "always") what nobody discarded: that was not copied. */
static void choose(const fl_snapshot *snapshot, bool commit, struct bitmap *back)
{
    const struct bitmap *frozen = &snapshot->frozen;
    if (commit && !atomic_load(&snapshot->clusters_lost))
        return;
    for (uint64_t bit = 0; (bit = bitmap_next_set(frozen, bit, frozen->bits)) < frozen->bits; bit++) {
        uint64_t first = bit << snapshot->frozen_shift, end = MIN((bit + 1) << snapshot->frozen_shift, snapshot->clusters);
        if (commit ? bitmap_next_set(&snapshot->lost, first, end) < end : bitmap_next_clear(&snapshot->released, first, end) < end)
            bitmap_set(back, bit, 1);
    }
}

int dirty_settle(fl_snapshot *snapshot, bool commit, fl_error *error)
{
    struct dirty *dirty = snapshot->dirty;
    struct bitmap some = { 0 };
    bool all = snapshot->bitmap_mode == FL_BITMAP_NEVER || (!commit && snapshot->bitmap_mode == FL_BITMAP_ON_SUCCESS);
    if (!all && bitmap_init(&some, snapshot->frozen.bits))
        all = true;             /* no memory to choose: too much is dirty then, and nothing is forgotten */
    if (!all)
        choose(snapshot, commit, &some);
    /* Bits are only added: writers may mark meanwhile. */
    add_bits(dirty, all ? &snapshot->frozen : &some);
    bitmap_destroy(&some);
    snapshot->settled = commit ? COMMITTED : ABORTED;
    int rc = commit ? flush_source(snapshot->disk, dirty, error) : 0;
    if (rc == 0 && dirty->kept)
        rc = kept_drop_old(dirty->kept, error); /* S2: what had to come back is there */
    return rc;
}
