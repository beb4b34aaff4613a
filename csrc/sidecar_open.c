/* sidecar_open.c: opening a file of dirty bitmaps, and what can be believed of it; closing it clean.
 *
 *   found                                                   a bitmap in it is
 *   clean, and the disk is as it was                        good; its checksum is checked
 *   in use, same boot, nobody holds its lock: killed        good: all marks are in the page cache, before what they stand for
 *   in use, another boot: the machine went down             good in write-intent mode, else inconsistent
 *   another disk or size, or written by others              inconsistent
 */
#define _GNU_SOURCE
#include "sidecar_internal.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* What the file said when it was opened. */
struct found {
    struct sidecar_header header;
    struct sidecar_record *records;     /* header.count */
    uint64_t file_size;
    int64_t alive;
    bool same_boot;
    enum sidecar_reason reason;         /* that holds for all */
};

/* ---- the file ---- */

static int lock_file(struct sidecar *sidecar, fl_error *error)
{
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1 };
    if (fcntl(sidecar->fd, F_OFD_SETLK, &lock) == 0 || (errno != EAGAIN && errno != EACCES))
        return 0;               /* also where the file system has no locks: the image's own is what counts there */
    return fail(error, FL_ELOCKED, FL_SIDE_NONE, 0, 0, "the file of dirty bitmaps '%.250s' is in use by another program, or by another disk of this one",
                sidecar->path);
}

static int open_file(struct sidecar *sidecar, bool create, bool *created, fl_error *error)
{
    struct stat st;
    *created = false;
    sidecar->fd = open(sidecar->path, O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (sidecar->fd < 0 && errno == ENOENT && create) {
        sidecar->fd = open(sidecar->path, O_RDWR | O_CLOEXEC | O_CREAT | O_EXCL, 0666);
        *created = sidecar->fd >= 0;
    }
    if (sidecar->fd < 0)
        return sidecar_error(sidecar, -errno, *created ? "cannot create" : "cannot open", error);
    if (fstat(sidecar->fd, &st))
        return sidecar_error(sidecar, -errno, "cannot look at", error);
    if (!S_ISREG(st.st_mode))
        return fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "'%.250s' is not a regular file: it can't hold dirty bitmaps", sidecar->path);
    return lock_file(sidecar, error);
}

/* One slot: true: a good header; `*version`: what it says that it is, 0: nothing. */
static bool read_slot(int fd, unsigned slot, struct sidecar_header *header, struct sidecar_record **records, uint32_t *version)
{
    unsigned char first[SIDECAR_HEADER_BYTES];
    uint64_t at = slot * SIDECAR_SLOT_BYTES;
    *version = 0;
    if (read_whole(fd, first, sizeof first, at))
        return false;
    size_t length = sidecar_decode_length(first, version);
    unsigned char *buffer = length ? malloc(length) : NULL;
    bool good = buffer && read_whole(fd, buffer, length, at) == 0 && sidecar_decode(buffer, length, header, NULL);
    if (good) {
        *records = calloc((size_t)header->count + 1, sizeof **records);
        good = *records && sidecar_decode(buffer, length, header, *records);
        if (!good)
            free(*records);
    }
    free(buffer);
    return good;
}

static int read_header(struct sidecar *sidecar, struct found *found, fl_error *error)
{
    struct sidecar_header headers[2];
    struct sidecar_record *records[2] = { NULL, NULL };
    uint32_t versions[2];
    bool good[2];
    for (unsigned slot = 0; slot < 2; slot++)
        good[slot] = read_slot(sidecar->fd, slot, &headers[slot], &records[slot], &versions[slot]);
    if (!good[0] && !good[1]) {
        uint32_t version = MAX(versions[0], versions[1]);
        if (version > 1)
            return fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "the file of dirty bitmaps '%.200s' is of version %u, which this program does not know",
                        sidecar->path, version);
        return fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, version ? "the file of dirty bitmaps '%.200s' is damaged: both copies of its header are; move it away, "
                    "and make a full backup" : "'%.200s' is not a file of dirty bitmaps", sidecar->path);
    }
    unsigned best = good[0] && (!good[1] || headers[0].generation >= headers[1].generation) ? 0 : 1;
    if (good[best ^ 1])
        free(records[best ^ 1]);
    found->header = headers[best];
    found->records = records[best];
    return 0;
}

/* ---- what to believe ---- */

static enum sidecar_reason judge(const struct found *found, const struct sidecar_identity *now, uint64_t own_inode, bool storage_failed)
{
    bool clean = found->header.state == SIDECAR_CLEAN;
    if (!clean && found->header.own_inode != own_inode)
        return REASON_COPIED;
    if (storage_failed)
        return REASON_STORAGE;
    return sidecar_compare(&found->header.disk, now, found->same_boot, clean, found->alive);
}

/* Take over one record: load its bits, and let marks go to one area that has them all. */
static int take_over(struct sidecar *sidecar, const struct found *found, struct kept *kept)
{
    struct sidecar_record *record = &kept->record;
    const bool clean = found->header.state == SIDECAR_CLEAN;
    enum sidecar_reason reason = record->flags & RECORD_INCONSISTENT ? record->reason : found->reason;
    uint64_t end = MAX(record->area[0], record->area[1]) + sidecar_area_bytes(record->bits);
    uint32_t crc = 0;
    if (!(record->flags & RECORD_INCONSISTENT) && reason == REASON_NONE) {
        if (!clean && !found->same_boot && !(record->flags & RECORD_WRITE_INTENT))
            reason = REASON_CRASH;
        else if (end > found->file_size)
            reason = REASON_DAMAGED;
    }
    kept->current = record->counts == 2;
    if (!(record->flags & RECORD_INCONSISTENT) && reason == REASON_NONE) {
        int rc = bitmap_init(&kept->loaded, record->bits);
        for (unsigned i = 0; i < 2 && rc == 0; i++)
            if (record->counts >> i & 1)
                rc = area_read(sidecar->fd, record->area[i], record->bits, &kept->loaded, &crc);
        if (rc == -ENOMEM)
            return rc;
        if (rc || (clean && record->counts != 3 && crc != record->checksum))
            reason = rc == -EIO ? REASON_STORAGE : REASON_DAMAGED;
        if (reason == REASON_NONE && (rc = kept_map(kept)) != 0)
            return rc;
    }
    if (reason == REASON_NONE && record->counts == 3) {
        kept_mark_all(kept, &kept->loaded);
        record->counts = 1u << kept->current;
        if (atomic_exchange(&kept->failed, false))
            reason = REASON_STORAGE;
    }
    if (record->flags & RECORD_INCONSISTENT || reason != REASON_NONE) {
        bitmap_destroy(&kept->loaded);
        kept_unmap(kept);
        record->flags |= RECORD_INCONSISTENT;
        record->reason = reason;
        record->bits = div_up(sidecar->header.disk.size, record->granularity);
        record->counts = 1;
        kept->current = 0;
        kept_place(kept);       /* the disk may be larger now; nothing of its old place is used */
    }
    return 0;
}

static void free_bitmaps(struct sidecar *sidecar)
{
    struct kept *next;
    for (struct kept *kept = sidecar->bitmaps; kept; kept = next) {
        next = kept->next;
        kept_unmap(kept);
        bitmap_destroy(&kept->loaded);
        free(kept);
    }
    sidecar->bitmaps = NULL;
}

/* In the order of the file; the areas of those that are good stay where they are, so they come first. */
static int take_over_all(struct sidecar *sidecar, const struct found *found)
{
    struct kept **link = &sidecar->bitmaps;
    for (uint32_t i = 0; i < found->header.count; i++) {
        struct kept *kept = calloc(1, sizeof *kept);
        if (!kept)
            return -ENOMEM;
        kept->sidecar = sidecar;
        kept->record = found->records[i];
        *link = kept;
        link = &kept->next;
    }
    for (struct kept *kept = sidecar->bitmaps; kept; kept = kept->next) {
        int rc = take_over(sidecar, found, kept);
        if (rc)
            return rc;
    }
    return 0;
}

/* ---- opening ---- */

static int map_alive(struct sidecar *sidecar)
{
    static const unsigned char zeros[4096];
    struct stat st;
    int rc = 0;
    if (fstat(sidecar->fd, &st))
        return -errno;
    if ((uint64_t)st.st_size < SIDECAR_AREAS_AT)
        rc = write_whole(sidecar->fd, zeros, sizeof zeros, SIDECAR_ALIVE_AT);
    if (rc == 0 && (uint64_t)st.st_size < SIDECAR_AREAS_AT && ftruncate(sidecar->fd, (off_t)SIDECAR_AREAS_AT))
        rc = -errno;
    if (rc)
        return rc;
    void *memory = mmap(NULL, SIDECAR_ALIGNMENT, PROT_READ | PROT_WRITE, MAP_SHARED, sidecar->fd, (off_t)SIDECAR_ALIVE_AT);
    if (memory == MAP_FAILED)
        return -errno;
    sidecar->alive = memory;
    madvise(memory, SIDECAR_ALIGNMENT, MADV_DONTFORK);
    return guard_add(memory, SIDECAR_ALIGNMENT, &sidecar->alive_guard);
}

static void sync_directory(const char *path)
{
    char *copy = strdup(path), *slash = copy ? strrchr(copy, '/') : NULL;
    if (slash)
        slash[slash == copy] = 0;
    int fd = open(slash ? copy : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    free(copy);
}

static void destroy(struct sidecar *sidecar)
{
    struct flock lock = { .l_type = F_UNLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1 };
    free_bitmaps(sidecar);
    guard_remove(sidecar->alive_guard);
    if (sidecar->alive)
        munmap((void *)sidecar->alive, SIDECAR_ALIGNMENT);
    if (sidecar->fd >= 0) {
        fcntl(sidecar->fd, F_OFD_SETLK, &lock);         /* by hand: a forked child may have a copy */
        close(sidecar->fd);
    }
    pthread_cond_destroy(&sidecar->synced);
    pthread_mutex_destroy(&sidecar->sync_lock);
    pthread_mutex_destroy(&sidecar->touch_lock);
    pthread_mutex_destroy(&sidecar->lock);
    free(sidecar->path);
    free(sidecar);
}

/* Read what an existing file says, and take it over. */
static int load(struct sidecar *sidecar, const struct sidecar_identity *now, const unsigned char boot[16], bool boot_known, fl_error *error)
{
    struct found found = { 0 };
    struct stat st;
    unsigned char alive[8] = { 0 };
    bool storage_failed = fdatasync(sidecar->fd) != 0;          /* marks that the kernel could not write are told of here, once */
    int rc = read_header(sidecar, &found, error);
    if (rc)
        return rc;
    if (fstat(sidecar->fd, &st)) {
        rc = sidecar_error(sidecar, -errno, "cannot look at", error);
    } else {
        found.file_size = (uint64_t)st.st_size;
        read_whole(sidecar->fd, alive, sizeof alive, SIDECAR_ALIVE_AT);
        memcpy(&found.alive, alive, sizeof alive);
        found.same_boot = boot_known && !memcmp(found.header.boot, boot, 16);
        found.reason = judge(&found, now, st.st_ino, storage_failed);
        memcpy(sidecar->header.uuid, found.header.uuid, 16);
        sidecar->header.generation = found.header.generation;
        rc = take_over_all(sidecar, &found);
        if (rc)
            sidecar_error(sidecar, rc, "cannot load the bitmaps of", error);
    }
    free(found.records);
    return rc;
}

int sidecar_open(const char *path, bool create, int disk_fd, uint64_t size, struct sidecar **out, fl_error *error)
{
    struct sidecar *sidecar = calloc(1, sizeof *sidecar);
    struct sidecar_identity now;
    struct stat st;
    unsigned char boot[16];
    bool created = false, boot_known = sidecar_boot_id(boot);
    if (!sidecar || !(sidecar->path = strdup(path)) || cond_init(&sidecar->synced)) {
        if (sidecar)
            free(sidecar->path);
        free(sidecar);
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a file of dirty bitmaps");
    }
    sidecar->fd = -1;
    sidecar->generation = fl_generation;
    pthread_mutex_init(&sidecar->lock, NULL);
    pthread_mutex_init(&sidecar->touch_lock, NULL);
    pthread_mutex_init(&sidecar->sync_lock, NULL);
    int rc = open_file(sidecar, create && disk_fd >= 0, &created, error);       /* no file: that comes first */
    if (rc == 0 && (rc = sidecar_identify(disk_fd, size, &now)) != 0)
        fail(error, -rc, FL_SIDE_NONE, 0, 0, "nothing tells which disk this is: its dirty bitmaps can't be kept in a file");
    if (rc)
        goto out;
    sidecar->header.disk = now;
    memcpy(sidecar->header.boot, boot, 16);
    sidecar->header.state = SIDECAR_IN_USE;
    if (!sidecar_random(sidecar->header.session) || fstat(sidecar->fd, &st)) {
        rc = sidecar_error(sidecar, -EIO, "cannot open", error);
        goto out;
    }
    sidecar->header.own_inode = st.st_ino;
    if (created && !sidecar_random(sidecar->header.uuid))
        rc = sidecar_error(sidecar, -EIO, "cannot find a name for", error);
    else if (!created)
        rc = load(sidecar, &now, boot, boot_known, error);
    if (rc)
        goto out;
    rc = map_alive(sidecar);
    if (rc == 0) {
        sidecar_alive(sidecar);
        rc = sidecar_write_header(sidecar, true);       /* S3: before the first write */
    }
    if (rc)
        sidecar_error(sidecar, rc, "cannot write", error);
    else if (created)
        sync_directory(path);
out:
    if (rc) {
        if (created)
            unlink(path);
        destroy(sidecar);
    } else {
        *out = sidecar;
    }
    return rc;
}

/* ---- closing ---- */

/* Give a bitmap the one area that has all of it, and the checksum of that. */
static int finish(struct sidecar *sidecar, struct kept *kept)
{
    if (kept->record.flags & RECORD_INCONSISTENT)
        return 0;
    kept->record.counts = 1u << kept->current;
    return area_read(sidecar->fd, kept->record.area[kept->current], kept->record.bits, NULL, &kept->record.checksum);
}

static int close_clean(struct sidecar *sidecar, int disk_fd)
{
    struct sidecar_identity now;
    int rc = fdatasync(sidecar->fd) ? -errno : 0;       /* S3: the bits, then the header that says that they are there */
    for (struct kept *kept = sidecar->bitmaps; kept && rc == 0; kept = kept->next)
        rc = finish(sidecar, kept);
    if (rc == 0)
        rc = sidecar_identify(disk_fd, sidecar->header.disk.size, &now);
    if (rc)
        return rc;
    sidecar_let_time_pass(&now);
    sidecar->header.disk = now;
    sidecar->header.state = SIDECAR_CLEAN;
    return sidecar_write_header(sidecar, true);
}

/* Without bitmaps it is of no use. */
static bool remove_file(const struct sidecar *sidecar)
{
    struct stat here, there;
    return !sidecar->bitmaps && fstat(sidecar->fd, &here) == 0 && stat(sidecar->path, &there) == 0 && here.st_dev == there.st_dev
           && here.st_ino == there.st_ino && unlink(sidecar->path) == 0;
}

int sidecar_close(struct sidecar *sidecar, bool clean, int disk_fd, fl_error *error)
{
    int rc = 0;
    if (!remove_file(sidecar) && clean && !sidecar->lost) {
        pthread_mutex_lock(&sidecar->lock);
        rc = close_clean(sidecar, disk_fd);
        pthread_mutex_unlock(&sidecar->lock);
        if (rc)
            sidecar_error(sidecar, rc, "cannot close", error);
    }
    destroy(sidecar);
    return rc;
}
