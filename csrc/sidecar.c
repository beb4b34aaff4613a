/* sidecar.c: the open file of dirty bitmaps: marks, areas that take turns, and the header that says what counts. See sidecar.h; sidecar_open.c opens and closes. */
#define _GNU_SOURCE
#include "sidecar_internal.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int sidecar_error(const struct sidecar *sidecar, int rc, const char *what, fl_error *error)
{
    return fail(error, -rc, FL_SIDE_NONE, 0, 0, "%s the file of dirty bitmaps '%.250s'", what, sidecar->path);
}

/* ---- the header ---- */

/* S4: one copy after the other, so that one of them is whole at any moment; both when it returns. Under the lock. */
static int write_both(struct sidecar *sidecar, const unsigned char *buffer, size_t length, bool sync)
{
    for (unsigned slot = 0; slot < 2; slot++) {
        int rc = write_whole(sidecar->fd, buffer, length, slot * SIDECAR_SLOT_BYTES);
        if (rc == 0 && sync && fdatasync(sidecar->fd))
            rc = -errno;
        if (rc)
            return rc;
    }
    return 0;
}

int sidecar_write_header(struct sidecar *sidecar, bool sync)
{
    uint32_t count = 0;
    if (sidecar->lost)
        return -EIO;
    for (const struct kept *kept = sidecar->bitmaps; kept; kept = kept->next)
        count++;
    const struct sidecar_record **records = calloc(count + 1, sizeof *records);
    unsigned char *buffer = malloc(sidecar_header_bytes(count));
    int rc = records && buffer ? 0 : -ENOMEM;
    if (rc == 0) {
        const struct kept *kept = sidecar->bitmaps;
        for (uint32_t i = 0; i < count; i++, kept = kept->next)
            records[i] = &kept->record;
        sidecar->header.count = count;
        sidecar->header.generation++;
        sidecar_encode(&sidecar->header, records, buffer);
        rc = write_both(sidecar, buffer, sidecar_header_bytes(count), sync);
    }
    free(records);
    free(buffer);
    return rc;
}

static bool wants_sync(const struct kept *kept) { return kept->record.flags & RECORD_WRITE_INTENT; }

/* Change the record under the lock, and write it; when that fails it is as before in memory. */
static int update(struct kept *kept, uint32_t flags, uint32_t counts, bool sync)
{
    struct sidecar *sidecar = kept->sidecar;
    pthread_mutex_lock(&sidecar->lock);
    uint32_t old_flags = kept->record.flags, old_counts = kept->record.counts;
    int rc = 0;
    flags |= old_flags & RECORD_INCONSISTENT;           /* a mark may have failed meanwhile */
    if (flags != old_flags || counts != old_counts) {
        kept->record.flags = flags;
        kept->record.counts = counts;
        rc = sidecar_write_header(sidecar, sync);
        if (rc) {
            kept->record.flags = old_flags;
            kept->record.counts = old_counts;
        }
    }
    pthread_mutex_unlock(&sidecar->lock);
    return rc;
}

/* ---- marks ---- */

/* The file can't follow. It has to say so before the guest's write goes on; in memory the bitmap is as good as ever. */
static void give_up(struct kept *kept)
{
    struct sidecar *sidecar = kept->sidecar;
    pthread_mutex_lock(&sidecar->lock);
    if (!atomic_load(&kept->failed)) {
        kept->record.flags |= RECORD_INCONSISTENT;
        kept->record.reason = REASON_STORAGE;
        if (!sidecar->lost && sidecar_write_header(sidecar, true)) {
            sidecar->lost = true;               /* not even that: nobody shall find a file that looks good */
            int left = ftruncate(sidecar->fd, 0) | unlink(sidecar->path);
            (void)left;
        }
        atomic_store(&kept->failed, true);      /* last: who sees it goes on */
    }
    pthread_mutex_unlock(&sidecar->lock);
}

/* The first bit of a page: room for it is taken by a system call, which can fail without a signal. */
static int touch(struct kept *kept, struct bitmap *mirror, uint64_t page)
{
    struct sidecar *sidecar = kept->sidecar;
    int rc = 0;
    pthread_mutex_lock(&sidecar->touch_lock);
    if (atomic_load(&mirror->pages[page]) == PAGE_UNTOUCHED) {
        rc = area_touch(sidecar->fd, kept->record.area[kept->current], mirror->bits, page);
        if (rc == 0)
            atomic_store(&mirror->pages[page], PAGE_MIXED);     /* after the zeros: what was there before does not count */
    }
    pthread_mutex_unlock(&sidecar->touch_lock);
    return rc;
}

void kept_mark(struct kept *kept, uint64_t first, uint64_t count)
{
    struct bitmap *mirror = &kept->mirror[kept->current];
    int rc = 0;
    if (!count || atomic_load_explicit(&kept->failed, memory_order_acquire))
        return;
    for (uint64_t page = first >> BITMAP_PAGE_SHIFT; page <= (first + count - 1) >> BITMAP_PAGE_SHIFT && rc == 0; page++)
        if (UNLIKELY(atomic_load_explicit(&mirror->pages[page], memory_order_acquire) == PAGE_UNTOUCHED))
            rc = touch(kept, mirror, page);
    if (rc == 0)
        bitmap_set(mirror, first, count);
    if (UNLIKELY(rc || guard_failed(kept->guard[kept->current])))
        give_up(kept);
}

/* All that was stored in the file before the call is on stable storage. Writers that come at the same time share one sync. */
static int sync_marks(struct sidecar *sidecar)
{
    pthread_mutex_lock(&sidecar->sync_lock);
    uint64_t mine = ++sidecar->sync_wanted;
    while (sidecar->sync_done < mine) {
        if (sidecar->syncing) {
            pthread_cond_wait(&sidecar->synced, &sidecar->sync_lock);
            continue;
        }
        uint64_t all = sidecar->sync_wanted;
        sidecar->syncing = true;
        pthread_mutex_unlock(&sidecar->sync_lock);
        int rc = fdatasync(sidecar->fd) ? -errno : 0;
        pthread_mutex_lock(&sidecar->sync_lock);
        sidecar->syncing = false;
        sidecar->sync_done = all;
        if (rc && !sidecar->sync_error)
            sidecar->sync_error = rc;
        pthread_cond_broadcast(&sidecar->synced);
    }
    int rc = sidecar->sync_error;
    pthread_mutex_unlock(&sidecar->sync_lock);
    return rc;
}

void kept_sync(struct kept *kept)
{
    if (wants_sync(kept) && !atomic_load_explicit(&kept->failed, memory_order_acquire) && sync_marks(kept->sidecar))
        give_up(kept);
}

void kept_mark_all(struct kept *kept, const struct bitmap *bitmap)
{
    uint64_t end;
    for (uint64_t bit = 0; (bit = bitmap_next_set(bitmap, bit, bitmap->bits)) < bitmap->bits; bit = end) {
        end = bitmap_next_clear(bitmap, bit, bitmap->bits);
        kept_mark(kept, bit, end - bit);
    }
    kept_sync(kept);
}

/* ---- areas ---- */

/* The file ends behind the areas, at least. */
static int extend_file(const struct kept *kept)
{
    struct stat st;
    uint64_t end = MAX(kept->record.area[0], kept->record.area[1]) + sidecar_area_bytes(kept->record.bits);
    if (fstat(kept->sidecar->fd, &st))
        return -errno;
    return (uint64_t)st.st_size < end && ftruncate(kept->sidecar->fd, (off_t)end) ? -errno : 0;
}

int kept_map(struct kept *kept)
{
    struct sidecar *sidecar = kept->sidecar;
    size_t bytes = sidecar_area_bytes(kept->record.bits);
    int extended = extend_file(kept);
    if (extended)
        return extended;
    for (int i = 0; i < 2; i++) {
        void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, sidecar->fd, (off_t)kept->record.area[i]);
        if (memory == MAP_FAILED)
            return -errno;
        kept->memory[i] = memory;
        madvise(memory, bytes, MADV_DONTFORK);
        bitmap_over(&kept->mirror[i], kept->record.bits, memory);
        int rc = guard_add(memory, bytes, &kept->guard[i]);
        if (rc)
            return rc;
    }
    return 0;
}

void kept_unmap(struct kept *kept)
{
    for (int i = 0; i < 2; i++) {
        guard_remove(kept->guard[i]);
        if (kept->memory[i])
            munmap(kept->memory[i], sidecar_area_bytes(kept->record.bits));
        kept->memory[i] = NULL;
        kept->guard[i] = NULL;
    }
}

/* The first place for an area where none is. Two bitmaps never share one, also not in an older header: a removal is on stable storage before it returns. */
uint64_t sidecar_find_room(const struct sidecar *sidecar, uint64_t bytes, uint64_t taken_at, uint64_t taken_bytes)
{
    uint64_t at = SIDECAR_AREAS_AT;
    for (bool moved = true; moved; ) {
        moved = false;
        if (taken_bytes && at < taken_at + taken_bytes && taken_at < at + bytes) {
            at = taken_at + taken_bytes;
            moved = true;
        }
        for (const struct kept *kept = sidecar->bitmaps; kept; kept = kept->next)
            for (int i = 0; i < 2; i++) {
                uint64_t begin = kept->record.area[i], end = begin + sidecar_area_bytes(kept->record.bits);
                if (begin && at < end && begin < at + bytes) {
                    at = end;
                    moved = true;
                }
            }
    }
    return at;
}

void kept_place(struct kept *kept)
{
    uint64_t bytes = sidecar_area_bytes(kept->record.bits);
    kept->record.area[0] = kept->record.area[1] = 0;
    kept->record.area[0] = sidecar_find_room(kept->sidecar, bytes, 0, 0);
    kept->record.area[1] = sidecar_find_room(kept->sidecar, bytes, kept->record.area[0], bytes);
}

static void give_back(const struct kept *kept, unsigned area)
{
    uint64_t skip = bitmap_words_at(kept->record.bits);
    /* Where it can't be punched it just stays. The pages' bytes stay in any case: they must not need room again. */
    if (fallocate(kept->sidecar->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(kept->record.area[area] + skip),
                  (off_t)(sidecar_area_bytes(kept->record.bits) - skip)))
        return;
}

int kept_add(struct sidecar *sidecar, const char *name, uint64_t granularity, bool write_intent, struct kept **out, fl_error *error)
{
    uint32_t count = 0;
    for (const struct kept *kept = sidecar->bitmaps; kept; kept = kept->next)
        count++;
    if (count >= SIDECAR_MAX_BITMAPS)
        return fail(error, ENOSPC, FL_SIDE_NONE, 0, 0, "the file of dirty bitmaps '%.250s' holds %u, and no more", sidecar->path, count);
    struct kept *kept = calloc(1, sizeof *kept);
    if (!kept)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a dirty bitmap");
    kept->sidecar = sidecar;
    strcpy(kept->record.name, name);
    kept->record.granularity = granularity;
    kept->record.bits = div_up(sidecar->header.disk.size, granularity);
    kept->record.flags = RECORD_ENABLED | RECORD_INCONSISTENT | (write_intent ? RECORD_WRITE_INTENT : 0);
    kept->record.reason = REASON_UNFINISHED;
    kept->record.counts = 1;
    kept_place(kept);
    int rc = sidecar_random(kept->record.uuid) ? 0 : -EIO;
    if (rc == 0)
        rc = kept_map(kept);
    if (rc == 0)
        rc = area_clear(sidecar->fd, kept->record.area[0], kept->record.bits);
    if (rc == 0) {
        pthread_mutex_lock(&sidecar->lock);
        kept->next = sidecar->bitmaps;
        sidecar->bitmaps = kept;
        rc = sidecar_write_header(sidecar, true);
        if (rc)
            sidecar->bitmaps = kept->next;
        pthread_mutex_unlock(&sidecar->lock);
    }
    if (rc) {
        kept_unmap(kept);
        free(kept);
        return sidecar_error(sidecar, rc, "cannot add a bitmap to", error);
    }
    *out = kept;
    return 0;
}

int kept_remove(struct kept *kept, fl_error *error)
{
    struct sidecar *sidecar = kept->sidecar;
    struct kept **link = &sidecar->bitmaps;
    pthread_mutex_lock(&sidecar->lock);
    while (*link != kept)
        link = &(*link)->next;
    *link = kept->next;
    int rc = sidecar->lost ? 0 : sidecar_write_header(sidecar, true);   /* before its place is used again */
    if (rc)
        *link = kept;
    pthread_mutex_unlock(&sidecar->lock);
    if (rc)
        return sidecar_error(sidecar, rc, "cannot remove a bitmap from", error);
    give_back(kept, 0);
    give_back(kept, 1);
    kept_unmap(kept);
    bitmap_destroy(&kept->loaded);
    free(kept);
    return 0;
}

int kept_doubt(struct kept *kept, fl_error *error)
{
    struct sidecar *sidecar = kept->sidecar;
    pthread_mutex_lock(&sidecar->lock);
    int rc = 0;
    if (!(kept->record.flags & RECORD_INCONSISTENT)) {
        kept->record.flags |= RECORD_INCONSISTENT;
        kept->record.reason = REASON_UNFINISHED;
        rc = sidecar_write_header(sidecar, wants_sync(kept));
        if (rc)
            kept->record.flags &= ~(uint32_t)RECORD_INCONSISTENT;
    }
    pthread_mutex_unlock(&sidecar->lock);
    return rc ? sidecar_error(sidecar, rc, "cannot remove a bitmap from", error) : 0;
}

int kept_enable(struct kept *kept, bool enabled, fl_error *error)
{
    uint32_t flags = enabled ? kept->record.flags | RECORD_ENABLED : kept->record.flags & ~(uint32_t)RECORD_ENABLED;
    int rc = update(kept, flags, kept->record.counts, true);
    return rc ? sidecar_error(kept->sidecar, rc, "cannot change a bitmap in", error) : 0;
}

/* ---- the areas take turns ---- */

int kept_prepare(struct kept *kept, fl_error *error)
{
    unsigned other = kept->current ^ 1;
    if (kept->ready || atomic_load(&kept->failed))
        return 0;
    int rc = update(kept, kept->record.flags, 1u << kept->current, wants_sync(kept));
    if (rc == 0)
        rc = area_clear(kept->sidecar->fd, kept->record.area[other], kept->record.bits);
    if (rc == 0)
        rc = update(kept, kept->record.flags, 3, wants_sync(kept));     /* S2: before anything is marked in it */
    if (rc)
        return sidecar_error(kept->sidecar, rc, "cannot prepare a bitmap in", error);
    kept->ready = true;
    return 0;
}

void kept_switch(struct kept *kept)
{
    kept->current ^= 1;
    kept->ready = false;
}

int kept_drop_old(struct kept *kept, fl_error *error)
{
    if (atomic_load(&kept->failed))
        return 0;
    int rc = update(kept, kept->record.flags, 1u << kept->current, wants_sync(kept));
    if (rc)
        return sidecar_error(kept->sidecar, rc, "cannot update a bitmap in", error);
    kept->ready = false;
    give_back(kept, kept->current ^ 1);
    return 0;
}

int kept_revive(struct kept *kept, fl_error *error)
{
    int rc = kept_map(kept);
    if (rc == 0)
        rc = area_clear(kept->sidecar->fd, kept->record.area[0], kept->record.bits);
    if (rc) {
        kept_unmap(kept);
        return sidecar_error(kept->sidecar, rc, "cannot clear a bitmap in", error);
    }
    pthread_mutex_lock(&kept->sidecar->lock);
    kept->record.reason = REASON_UNFINISHED;
    kept->record.counts = 1;
    pthread_mutex_unlock(&kept->sidecar->lock);
    kept->current = 0;
    kept->ready = false;
    return 0;
}

int kept_confirm(struct kept *kept, fl_error *error)
{
    struct sidecar *sidecar = kept->sidecar;
    int rc = 0;
    pthread_mutex_lock(&sidecar->lock);
    if (!atomic_load(&kept->failed)) {
        kept->record.flags &= ~(uint32_t)RECORD_INCONSISTENT;
        kept->record.reason = REASON_NONE;
        rc = sidecar_write_header(sidecar, true);
        if (rc) {
            kept->record.flags |= RECORD_INCONSISTENT;
            kept->record.reason = REASON_STORAGE;
            atomic_store(&kept->failed, true);
        }
    }
    pthread_mutex_unlock(&sidecar->lock);
    return rc ? sidecar_error(sidecar, rc, "cannot update a bitmap in", error) : 0;
}

void kept_repair(struct kept *kept, const struct bitmap *bits)
{
    struct sidecar *sidecar = kept->sidecar;
    unsigned area = kept->current ^ 1;
    if (!atomic_load(&kept->failed) || sidecar->lost)
        return;
    int rc = extend_file(kept);
    if (rc == 0)
        rc = area_write(sidecar->fd, kept->record.area[area], bits);
    if (rc == 0 && fdatasync(sidecar->fd) == 0) {
        kept->record.flags &= ~(uint32_t)RECORD_INCONSISTENT;
        kept->record.reason = REASON_NONE;
        kept->record.counts = 1u << area;
        kept->current = area;
        atomic_store(&kept->failed, false);
    }
}
