/* export_fuse_file.c: what is done with an open file.
 *
 * Reads are all or nothing: a short read would be the end of the file to whoever reads through a mapping, which fills the rest with zeros, and
 * a snapshot never lies. For the same reason only what reads as zeros is a hole to lseek: what was discarded or lost, or is outside of the bitmap
 * and was not saved, is data, and reading it fails. A .changed file says the opposite of the last of these, which is what it is for.
 */
#define _GNU_SOURCE
#ifdef FLEECE_FUSE
#include "export_fuse.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <unistd.h>

/* ---- opening ---- */

/* What the kernel expects as the answer to an open (linux/fuse.h): libfuse 3.14 does not know all of the flags. A kernel that does not know one
   ignores it. */
struct open_reply { uint64_t handle; uint32_t flags; uint32_t unused; };
#define OPEN_DIRECT_IO (1u << 0)                /* past the page cache: it would hold stale data, and everything twice */
#define OPEN_NO_FLUSH (1u << 5)                 /* closing needs no request */
#define OPEN_PARALLEL_DIRECT_WRITES (1u << 6)   /* writes to one file need not wait for each other */

static void destroy(struct handle *handle)
{
    pthread_mutex_destroy(&handle->lock);
    shot_unref(handle->file->shot);
    free(handle);
}

static void forget(fl_mount *mount, struct handle *handle)
{
    pthread_mutex_lock(&mount->lock);
    *handle->link = handle->next;
    if (handle->next)
        handle->next->link = handle->link;
    mount->open_files--;
    pthread_mutex_unlock(&mount->lock);
    destroy(handle);
}

void file_destroy_handles(fl_mount *mount)
{
    while (mount->handles) {
        struct handle *handle = mount->handles;
        mount->handles = handle->next;
        destroy(handle);
    }
}

static void on_open(fuse_req_t req, fuse_ino_t node, struct fuse_file_info *info)
{
    fl_mount *mount = mount_of(req);
    struct file *file = tree_file(mount, node);
    if (!file) {
        fuse_reply_err(req, ESTALE);
        return;
    }
    struct handle *handle = malloc(sizeof *handle);
    if (!handle || pthread_mutex_init(&handle->lock, NULL)) {
        free(handle);
        shot_unref(file->shot);
        fuse_reply_err(req, ENOMEM);
        return;
    }
    (void)info;
    handle->file = file;
    handle->extent_count = 0;
    pthread_mutex_lock(&mount->lock);
    handle->next = mount->handles;
    handle->link = &mount->handles;
    if (handle->next)
        handle->next->link = &handle->next;
    mount->handles = handle;
    mount->open_files++;
    pthread_mutex_unlock(&mount->lock);
    struct open_reply reply = { (uint64_t)(uintptr_t)handle, OPEN_DIRECT_IO | OPEN_NO_FLUSH | OPEN_PARALLEL_DIRECT_WRITES, 0 };
    if (fuse_reply_buf(req, (const char *)&reply, sizeof reply) == -ENOENT)     /* whoever opened it was interrupted */
        forget(mount, handle);
}

static void on_release(fuse_req_t req, fuse_ino_t node, struct fuse_file_info *info)
{
    (void)node;
    forget(mount_of(req), handle_of(info));
    fuse_reply_err(req, 0);
}

/* ---- reading ---- */

/* [offset, offset + count) of a .changed file. */
static int read_changed(struct file *file, char *buffer, uint64_t count, uint64_t offset, fl_error *error)
{
    fl_extent extents[32];
    size_t found;
    int rc = 0;
    while (count && rc == 0) {
        rc = fl_snapshot_extents(file->snapshot, offset, count, extents, 32, &found, error);
        for (size_t i = 0; i < found && rc == 0; i++) {
            uint64_t length = extents[i].length;
            if (extents[i].kind == FL_OUTSIDE)          /* never changes */
                memset(buffer, 0, length);
            else
                rc = fl_snapshot_pread(file->snapshot, buffer, length, offset, error);
            buffer += length;
            offset += length;
            count -= length;
        }
    }
    return rc;
}

static void on_read(fuse_req_t req, fuse_ino_t node, size_t size, off_t where, struct fuse_file_info *info)
{
    struct file *file = handle_of(info)->file;
    char *buffer = fuse_worker->payload;
    uint64_t offset = (uint64_t)where, count = offset < file->size ? MIN(MIN(size, LARGEST_IO), file->size - offset) : 0;
    fl_error error;
    int rc = 0;
    (void)node;
    if (count && file->kind == DISK_FILE)
        rc = fl_disk_pread(file->disk, buffer, count, offset, &error);
    else if (count && file->kind == SNAPSHOT_FILE)
        rc = fl_snapshot_pread(file->snapshot, buffer, count, offset, &error);
    else if (count)
        rc = read_changed(file, buffer, count, offset, &error);
    if (rc)
        story_fail(req, file, rc, &error);
    else
        fuse_reply_buf(req, buffer, count);
}

/* ---- changing ---- */

/* The clock of the kernel's own file times, here and wherever a time is taken: one that is finer would be ahead of it, and files would seem to go back. */
static void touch(struct file *file)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    atomic_store_explicit(&file->changed, now.tv_sec * INT64_C(1000000000) + now.tv_nsec, memory_order_relaxed);
}

/* A disk ends where it ends, as a block device does: what fits is written, and beyond the end there is no space. */
static void on_write(fuse_req_t req, fuse_ino_t node, const char *data, size_t size, off_t where, struct fuse_file_info *info)
{
    struct file *file = handle_of(info)->file;
    uint64_t offset = (uint64_t)where;
    fl_error error;
    (void)node;
    if (file->kind != DISK_FILE) {
        fuse_reply_err(req, EROFS);
        return;
    }
    if (offset >= file->size && size) {
        fuse_reply_err(req, ENOSPC);
        return;
    }
    uint64_t count = size ? MIN(size, file->size - offset) : 0;
    int rc = fl_disk_pwrite(file->disk, data, count, offset, &error);
    touch(file);
    if (rc == 0 && (info->flags & (O_DSYNC | O_SYNC)))
        rc = fl_disk_flush(file->disk, &error);
    if (rc)
        story_fail(req, file, rc, &error);
    else
        fuse_reply_write(req, count);
}

static void on_fallocate(fuse_req_t req, fuse_ino_t node, int mode, off_t where, off_t length, struct fuse_file_info *info)
{
    struct file *file = handle_of(info)->file;
    uint64_t offset = (uint64_t)where, count = offset < file->size ? MIN((uint64_t)length, file->size - offset) : 0;
    bool punch = mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
    bool zero = mode == FALLOC_FL_ZERO_RANGE || mode == (FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE);
    fl_error error;
    int rc;
    (void)node;
    if (!punch && !zero) {
        fuse_reply_err(req, EOPNOTSUPP);
        return;
    }
    if (mode == FALLOC_FL_ZERO_RANGE && count < (uint64_t)length) {
        fuse_reply_err(req, ENOSPC);
        return;
    }
    if (file->kind == DISK_FILE) {
        rc = fl_disk_zero(file->disk, count, offset, &error);   /* and not a discard, after which it might read as anything */
        touch(file);
    } else if (punch) {
        rc = (file->kind == CHANGED_FILE ? snapshot_discard_copied : fl_snapshot_discard)(file->snapshot, count, offset, &error);
    } else {
        fuse_reply_err(req, EROFS);
        return;
    }
    if (rc)
        story_fail(req, file, rc, &error);
    else
        fuse_reply_err(req, 0);
}

static void on_fsync(fuse_req_t req, fuse_ino_t node, int data_only, struct fuse_file_info *info)
{
    struct file *file = handle_of(info)->file;
    fl_error error;
    (void)node, (void)data_only;
    int rc = file->kind == DISK_FILE ? fl_disk_flush(file->disk, &error) : 0;
    if (rc)
        story_fail(req, file, rc, &error);
    else
        fuse_reply_err(req, 0);
}

/* ---- holes ---- */

static bool is_hole(const struct file *file, int kind)
{
    return kind == FL_ZERO || (kind == FL_OUTSIDE && file->kind == CHANGED_FILE);
}

/* Extents from `offset` on. A disk's change at any time, and are asked for two at a time; a snapshot's are kept by the handle (under its lock). */
static int look(struct handle *handle, uint64_t offset, const fl_extent **extents, size_t *count, fl_error *error)
{
    struct file *file = handle->file;
    fl_extent *all = handle->extents;
    if (file->kind == DISK_FILE) {
        *extents = all;
        return fl_disk_extents(file->disk, offset, file->size - offset, all, 2, count, error);
    }
    int rc = fl_snapshot_check(file->snapshot, error);
    if (rc)
        return rc;
    size_t last = handle->extent_count;
    if (!last || offset < all[0].offset || offset >= all[last - 1].offset + all[last - 1].length) {
        size_t found;
        handle->extent_count = 0;
        rc = (file->kind == CHANGED_FILE ? fl_snapshot_extents : fl_snapshot_extents_readable)(
            file->snapshot, offset, file->size - offset, all, sizeof handle->extents / sizeof *all, &found, error);
        if (rc)
            return rc;
        handle->extent_count = found;
    }
    size_t first = 0, end = handle->extent_count;
    while (end - first > 1) {           /* the extent that has `offset` */
        size_t middle = (first + end) / 2;
        if (all[middle].offset <= offset)
            first = middle;
        else
            end = middle;
    }
    *extents = all + first;
    *count = handle->extent_count - first;
    return 0;
}

/* The first place at or behind `offset` that is a hole, or is not. -ENXIO: there is no more data. */
static int seek(struct handle *handle, bool hole, uint64_t offset, uint64_t *out, fl_error *error)
{
    const struct file *file = handle->file;
    while (offset < file->size) {
        const fl_extent *extents;
        size_t count;
        int rc = look(handle, offset, &extents, &count, error);
        if (rc)
            return rc;
        for (size_t i = 0; i < count; i++) {
            if (is_hole(file, extents[i].kind) == hole) {
                *out = MAX(offset, extents[i].offset);
                return 0;
            }
            offset = extents[i].offset + extents[i].length;
        }
    }
    if (!hole)
        return -ENXIO;
    *out = file->size;
    return 0;
}

static void on_lseek(fuse_req_t req, fuse_ino_t node, off_t offset, int whence, struct fuse_file_info *info)
{
    struct handle *handle = handle_of(info);
    uint64_t found = 0;
    fl_error error = { .code = 0 };
    (void)node;
    if (whence != SEEK_DATA && whence != SEEK_HOLE) {
        fuse_reply_err(req, EINVAL);
        return;
    }
    if ((uint64_t)offset >= handle->file->size) {
        fuse_reply_err(req, ENXIO);
        return;
    }
    pthread_mutex_lock(&handle->lock);
    int rc = seek(handle, whence == SEEK_HOLE, (uint64_t)offset, &found, &error);
    pthread_mutex_unlock(&handle->lock);
    if (rc == -ENXIO && error.code == 0)
        fuse_reply_err(req, ENXIO);
    else if (rc)
        story_fail(req, handle->file, rc, &error);
    else
        fuse_reply_lseek(req, (off_t)found);
}

void file_operations(struct fuse_lowlevel_ops *operations)
{
    operations->open = on_open;
    operations->release = on_release;
    operations->read = on_read;
    operations->write = on_write;
    operations->fallocate = on_fallocate;
    operations->fsync = on_fsync;
    operations->lseek = on_lseek;
}

#endif
