/* dirty_file.c: where the persistent dirty bitmaps of a disk come from when it is opened, and where they go when it is closed: the file (sidecar.h), and the
 * image itself, where its format has bitmaps of its own. All of it under the disk's lock; while it is opened or closed nobody writes.
 */
#define _GNU_SOURCE
#include "cbw.h"

#include <stdlib.h>

/* Make a bitmap of the disk of one of the file. */
static struct dirty *adopt(struct kept *kept)
{
    struct dirty *dirty = dirty_new(kept->record.name, kept->record.granularity);
    if (dirty) {
        dirty->kept = kept;
        dirty->enabled = kept->record.flags & RECORD_ENABLED;
        dirty->inconsistent = kept->record.flags & RECORD_INCONSISTENT;
        dirty->recording = dirty->enabled && !dirty->inconsistent;
        dirty->bits = kept->loaded;
        memset(&kept->loaded, 0, sizeof kept->loaded);
    }
    return dirty;
}

/* In a format that has bitmaps of its own, they get what ours have, for other programs. */
static int store_in_image(fl_disk *disk, const struct dirty *list, fl_error *error)
{
    size_t count = 0;
    for (const struct dirty *dirty = list; dirty; dirty = dirty->next)
        count += dirty->kept != NULL;
    struct image_bitmap *bitmaps = calloc(count + 1, sizeof *bitmaps);
    if (!bitmaps)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for the dirty bitmaps of a disk");
    count = 0;
    for (const struct dirty *dirty = list; dirty; dirty = dirty->next) {
        if (!dirty->kept || dirty->inconsistent)
            continue;
        struct image_bitmap *bitmap = &bitmaps[count++];
        strcpy(bitmap->name, dirty->name);
        bitmap->granularity = dirty->granularity;
        bitmap->enabled = dirty->enabled;
        bitmap->good = true;
        bitmap->bits = dirty->bits;     /* borrowed */
    }
    int rc = image_bitmap_store(disk->source, bitmaps, count, error);
    free(bitmaps);
    return rc;
}

/* `list`: the bitmaps of the disk, those of the file among them. Nobody writes any more, or yet. */
static int close_file(fl_disk *disk, struct sidecar *sidecar, struct dirty *list, fl_error *error)
{
    int rc = image_settle(disk->source, error);         /* S3: without it the file stays "in use", which is the truth */
    bool settled = rc == 0;
    if (settled)
        rc = store_in_image(disk, list, error);
    for (struct dirty *dirty = list; dirty; dirty = dirty->next) {
        if (dirty->kept && !dirty->inconsistent)
            kept_repair(dirty->kept, &dirty->bits);
        dirty->kept = NULL;
    }
    int closing = sidecar_close(sidecar, settled, image_descriptor(disk->source), rc ? NULL : error);
    return rc ? rc : closing;
}

/* Bits of one granularity as those of a coarser one. */
static int coarsen(const struct bitmap *from, unsigned by, struct bitmap *to, uint64_t bits)
{
    uint64_t end;
    if (bitmap_init(to, bits))
        return -ENOMEM;
    for (uint64_t bit = 0; (bit = bitmap_next_set(from, bit, from->bits)) < from->bits; bit = end) {
        end = bitmap_next_clear(from, bit, from->bits);
        bitmap_set(to, bit >> by, ((end - 1) >> by) - (bit >> by) + 1);
    }
    return 0;
}

/* Take over a bitmap that is in the image itself. It is a new one: what others did to it since it was ours, nobody knows. */
static int import(fl_disk *disk, struct sidecar *sidecar, struct dirty **list, const struct image_bitmap *found, fl_error *error)
{
    struct dirty **link = list;
    while (*link && strcmp((*link)->name, found->name))
        link = &(*link)->next;
    if (*link && !(*link)->inconsistent)
        return 0;               /* ours is as good, or better */
    uint64_t granularity = MAX(found->granularity, SIDECAR_MIN_GRANULARITY);
    struct dirty *dirty = dirty_new(found->name, granularity);
    int rc = dirty ? coarsen(&found->bits, (unsigned)__builtin_ctzll(granularity / found->granularity), &dirty->bits, div_up(disk->size, granularity)) : -ENOMEM;
    if (rc) {
        free(dirty);
        return fail(error, -rc, FL_SIDE_NONE, 0, 0, "no memory for a dirty bitmap");
    }
    if (*link) {
        struct dirty *old = *link;
        rc = kept_remove(old->kept, error);
        if (rc == 0) {
            *link = old->next;
            dirty_destroy(old);
        }
    }
    if (rc == 0)
        rc = kept_add(sidecar, found->name, granularity, false, &dirty->kept, error);
    if (rc) {
        dirty_destroy(dirty);
        return rc;
    }
    dirty->next = *list;
    *list = dirty;
    dirty->enabled = dirty->recording = found->enabled;
    kept_mark_all(dirty->kept, &dirty->bits);
    rc = kept_enable(dirty->kept, found->enabled, error);
    return rc ? rc : kept_confirm(dirty->kept, error);
}

static int import_all(fl_disk *disk, struct sidecar *sidecar, struct dirty **list, fl_error *error)
{
    int rc = 0;
    for (size_t index = 0; rc == 0 && disk->writable; index++) {
        struct image_bitmap found;
        rc = image_bitmap_load(disk->source, index, &found, error);
        if (rc == -ENOENT)
            return 0;
        if (rc == 0 && found.good && !*dirty_find(disk, found.name))
            rc = import(disk, sidecar, list, &found, error);
        if (rc == 0)
            bitmap_destroy(&found.bits);
    }
    return rc;
}

/* Has the image bitmaps of its own that would be lost when it is written? */
static bool has_own(fl_disk *disk)
{
    bool good = false;
    for (size_t index = 0; disk->writable && !good; index++) {
        struct image_bitmap found;
        if (image_bitmap_load(disk->source, index, &found, NULL))
            break;
        good = found.good;
        bitmap_destroy(&found.bits);
    }
    return good;
}

static int open_file(fl_disk *disk, const char *path, bool create, fl_error *error)
{
    struct dirty *list = NULL;
    struct sidecar *sidecar;
    if (disk->sidecar)
        return fail(error, EEXIST, FL_SIDE_NONE, 0, 0, "the disk has a file for its dirty bitmaps already: '%.250s'", disk->sidecar->path);
    int rc = sidecar_open(path, create || has_own(disk), image_descriptor(disk->source), disk->size, &sidecar, error);
    if (rc)
        return rc;
    for (struct kept *kept = sidecar->bitmaps; kept && rc == 0; kept = kept->next) {
        struct dirty *dirty = *dirty_find(disk, kept->record.name) ? NULL : adopt(kept);
        if (dirty) {
            dirty->next = list;
            list = dirty;
        } else if (*dirty_find(disk, kept->record.name)) {
            rc = fail(error, EEXIST, FL_SIDE_NONE, 0, 0, "the disk has a dirty bitmap '%.100s' already, and so has the file '%.200s'", kept->record.name, path);
        } else {
            rc = fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a dirty bitmap");
        }
    }
    if (rc == 0)
        rc = import_all(disk, sidecar, &list, error);
    if (rc == 0)
        rc = disk_close_writes(disk, error);
    if (rc == 0) {
        struct dirty **end = &disk->dirty;
        while (*end)
            end = &(*end)->next;
        *end = list;
        disk->sidecar = sidecar;
        gate_open(&disk->writes);
        return 0;
    }
    close_file(disk, sidecar, list, NULL);
    while (list) {
        struct dirty *dirty = list;
        list = dirty->next;
        dirty_destroy(dirty);
    }
    return rc;
}

int fl_disk_bitmap_file(fl_disk *disk, const char *path, int create, fl_error *error)
{
    int rc = gate_pass(&disk->life, "disk", error);
    if (rc)
        return rc;
    pthread_mutex_lock(&disk->lock);
    rc = open_file(disk, path, create, error);
    pthread_mutex_unlock(&disk->lock);
    gate_leave(&disk->life);
    return rc;
}

int dirty_close_file(fl_disk *disk, fl_error *error)
{
    struct sidecar *sidecar = disk->sidecar;
    disk->sidecar = NULL;
    return sidecar ? close_file(disk, sidecar, disk->dirty, error) : 0;
}
