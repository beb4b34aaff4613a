/* image.c: images of any format: which driver opens them, who keeps them alive, and the checks that drivers need not repeat. */
#define _GNU_SOURCE
#include "image.h"

#include <stdio.h>
#include <stdlib.h>

/* ---- formats ---- */

static const struct format {
    const char *name;
    int (*open)(const char *path, const fl_image_options *options, fl_image **image, fl_error *error);
    int (*create)(const char *path, uint64_t size, const fl_image_options *options, fl_image **image, fl_error *error);
} formats[] = {
    { "raw", raw_open, raw_create },
    { "qcow2", qcow2_open, qcow2_create },
};

static int find_format(const char *path, const fl_image_options *options, const struct format **format, fl_error *error)
{
    if (!path || !*path)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "no path was given");
    if (!options || !options->format)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "no format was given for image '%.200s': nothing is guessed", path);
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        if (!strcmp(formats[i].name, options->format)) {
            *format = &formats[i];
            return 0;
        }
    }
    return fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%.200s' cannot be opened: format '%.60s' is not known",
                path, options->format);
}

/* ---- life ---- */

void *image_alloc(size_t size)
{
    void *p;
    if (posix_memalign(&p, _Alignof(struct fl_image), size))
        return NULL;
    return memset(p, 0, size);
}

/* Messages are bounded, and what they say besides the name matters more than the beginning of a long path. */
static char *name_for_messages(const char *name)
{
    char text[200];
    size_t length = strlen(name);
    if (length < sizeof text)
        return strdup(name);
    snprintf(text, sizeof text, "...%s", name + length - (sizeof text - 4));
    return strdup(text);
}

int image_init(fl_image *image, const struct image_ops *ops, const char *name)
{
    int rc = gate_init(&image->gate);
    if (rc < 0)
        return rc;
    image->name = name_for_messages(name);
    if (!image->name) {
        gate_destroy(&image->gate);
        return -ENOMEM;
    }
    image->ops = ops;
    image->alignment = 1;
    atomic_init(&image->references, 1);
    atomic_init(&image->memory, 1);
    return 0;
}

static bool forked(const fl_image *image)
{
    return image->gate.generation != fl_generation;
}

static void drop_memory(fl_image *image)
{
    if (atomic_fetch_sub(&image->memory, 1) != 1)
        return;
    if (!forked(image))                         /* in a child, destroying it would wait for the parent's threads */
        gate_destroy(&image->gate);
    free(image->name);
    free(image);
}

static int drop_reference(fl_image *image, fl_error *error)
{
    int rc = 0;
    if (atomic_fetch_sub(&image->references, 1) != 1)
        return 0;
    if (image->ops->sync_close && !forked(image))
        rc = image->ops->sync_close(image, error);
    image->ops->destroy(image);
    drop_memory(image);
    return rc;
}

fl_image *image_ref(fl_image *image)
{
    atomic_fetch_add_explicit(&image->references, 1, memory_order_relaxed);
    return image;
}

void image_unref(fl_image *image)
{
    if (image)
        drop_reference(image, NULL);
}

/* Hand a new image to the user: from now on the struct waits for fl_image_free. */
static void publish(fl_image *new_image, fl_image **image)
{
    atomic_store(&new_image->memory, 2);
    *image = new_image;
}

/* ---- the checked calls ---- */

typedef unsigned long long ull;

static int check_range(fl_image *image, const char *what, uint64_t count, uint64_t offset, fl_error *error)
{
    if (UNLIKELY(image->inspect))
        return fail(error, EBADF, FL_SIDE_NONE, offset, count, "%s of %llu bytes at %llu refused: image '%s' was opened to inspect it only",
                    what, (ull)count, (ull)offset, image->name);
    if (in_range(count, offset, image->size))
        return 0;
    return fail(error, FL_ERANGE, FL_SIDE_NONE, offset, count, "%s of %llu bytes at %llu goes beyond the end of image '%s', %llu bytes",
                what, (ull)count, (ull)offset, image->name, (ull)image->size);
}

static int check_writable(fl_image *image, const char *what, uint64_t count, uint64_t offset, fl_error *error)
{
    if (image->writable)
        return 0;
    return fail(error, EROFS, FL_SIDE_NONE, offset, count, "%s of %llu bytes at %llu refused: image '%s' is open for reading only",
                what, (ull)count, (ull)offset, image->name);
}

/* What a vector adds up to. */
static int check_vector(fl_image *image, const char *what, const struct iovec *iov, int count, uint64_t offset,
                        size_t *length, fl_error *error)
{
    size_t sum = 0;
    if (count < 0 || (count > 0 && !iov))
        goto invalid;
    for (int i = 0; i < count; i++) {
        if (iov[i].iov_len > SIZE_MAX - sum || (iov[i].iov_len && !iov[i].iov_base))
            goto invalid;
        sum += iov[i].iov_len;
    }
    *length = sum;
    return 0;
invalid:
    return fail(error, EINVAL, FL_SIDE_NONE, offset, 0, "%s at %llu of image '%s': the buffers make no sense",
                what, (ull)offset, image->name);
}

int image_readv(fl_image *image, const struct iovec *iov, int count, uint64_t offset, fl_error *error)
{
    size_t length = 0;
    int rc = check_vector(image, "read", iov, count, offset, &length, error);
    if (rc == 0)
        rc = check_range(image, "read", length, offset, error);
    return rc < 0 || length == 0 ? rc : image->ops->readv(image, iov, count, offset, length, error);
}

int image_writev(fl_image *image, const struct iovec *iov, int count, uint64_t offset, fl_error *error)
{
    size_t length = 0;
    int rc = check_vector(image, "write", iov, count, offset, &length, error);
    if (rc == 0)
        rc = check_range(image, "write", length, offset, error);
    if (rc == 0)
        rc = check_writable(image, "write", length, offset, error);
    return rc < 0 || length == 0 ? rc : image->ops->writev(image, iov, count, offset, length, error);
}

int image_read(fl_image *image, void *buffer, size_t length, uint64_t offset, fl_error *error)
{
    struct iovec iov = { buffer, length };
    return image_readv(image, &iov, 1, offset, error);
}

int image_write(fl_image *image, const void *buffer, size_t length, uint64_t offset, fl_error *error)
{
    struct iovec iov = { (void *)(uintptr_t)buffer, length };
    if (LIKELY(buffer && length && image->writable && !image->inspect && in_range(length, offset, image->size)))
        return image->ops->writev(image, &iov, 1, offset, length, error);
    return image_writev(image, &iov, 1, offset, error);         /* says what is wrong */
}

int image_zero(fl_image *image, uint64_t count, uint64_t offset, fl_error *error)
{
    int rc = check_range(image, "zero", count, offset, error);
    if (rc == 0)
        rc = check_writable(image, "zero", count, offset, error);
    return rc < 0 || count == 0 ? rc : image->ops->zero(image, count, offset, error);
}

int image_discard(fl_image *image, uint64_t count, uint64_t offset, fl_error *error)
{
    int rc = check_range(image, "discard", count, offset, error);
    if (rc == 0)
        rc = check_writable(image, "discard", count, offset, error);
    return rc < 0 || count == 0 ? rc : image->ops->discard(image, count, offset, error);
}

/* An image that is open for reading has nothing to flush. */
int image_settle(fl_image *image, fl_error *error)
{
    if (!image->writable)
        return 0;
    return image->ops->settle ? image->ops->settle(image, error) : image_flush(image, error);
}

int image_bitmap_load(fl_image *image, size_t index, struct image_bitmap *bitmap, fl_error *error)
{
    return image->ops->bitmap_load ? image->ops->bitmap_load(image, index, bitmap, error) : -ENOENT;
}

int image_bitmap_store(fl_image *image, const struct image_bitmap *list, size_t count, fl_error *error)
{
    return image->writable && image->ops->bitmap_store ? image->ops->bitmap_store(image, list, count, error) : 0;
}

int image_flush(fl_image *image, fl_error *error)
{
    return image->writable ? image->ops->flush(image, error) : 0;
}

int image_extents(fl_image *image, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error)
{
    int rc = check_range(image, "map", length, offset, error);
    if (rc < 0)
        return rc;
    if (!found || (length > 0 && (max == 0 || !extents)))
        return fail(error, EINVAL, FL_SIDE_NONE, offset, length, "map of image '%s': there is no room for the extents", image->name);
    if (length == 0) {
        *found = 0;
        return 0;
    }
    return image->ops->extents(image, offset, length, extents, max, found, error);
}

uint64_t image_next_data(fl_image *image, uint64_t offset, uint64_t end)
{
    fl_extent extent;
    size_t found;
    if (image->ops->next_data)
        return image->ops->next_data(image, offset, end);
    if (image_extents(image, offset, end - offset, &extent, 1, &found, NULL) != 0)
        return offset;
    return extent.kind == FL_ZERO ? offset + extent.length : offset;
}

/* A format without a map of its own has its bytes where the disk has them. */
static int map_plain(fl_image *image, uint64_t offset, uint64_t length, fl_mapping *mappings, size_t max, size_t *found, fl_error *error)
{
    fl_extent extents[64];
    int rc = image->ops->extents(image, offset, length, extents, MIN(max, 64), found, error);
    for (size_t i = 0; rc == 0 && i < *found; i++)
        mappings[i] = (fl_mapping){
            .offset = extents[i].offset, .length = extents[i].length, .host_offset = extents[i].offset,
            .flags = FL_MAP_ALLOCATED | FL_MAP_OFFSET | (extents[i].kind == FL_DATA ? FL_MAP_DATA : FL_MAP_ZERO),
        };
    return rc;
}

int image_map(fl_image *image, uint64_t offset, uint64_t length, fl_mapping *mappings, size_t max, size_t *found, fl_error *error)
{
    int rc = check_range(image, "map", length, offset, error);
    if (rc < 0)
        return rc;
    if (!found || (length > 0 && (max == 0 || !mappings)))
        return fail(error, EINVAL, FL_SIDE_NONE, offset, length, "map of image '%s': there is no room for it", image->name);
    if (length == 0) {
        *found = 0;
        return 0;
    }
    return (image->ops->map ? image->ops->map : map_plain)(image, offset, length, mappings, max, found, error);
}

int image_write_compressed(fl_image *image, const void *buffer, size_t length, uint64_t offset, fl_error *error)
{
    int rc = check_range(image, "compressed write", length, offset, error);
    if (rc == 0)
        rc = check_writable(image, "compressed write", length, offset, error);
    if (rc == 0 && !image->ops->write_compressed)
        rc = fail(error, EOPNOTSUPP, FL_SIDE_NONE, offset, length, "image '%s' cannot be written compressed: its format, %s, has no compression",
                  image->name, image->ops->format);
    if (rc == 0 && (offset % image->cluster_size || (length % image->cluster_size && offset + length != image->size)))
        rc = fail(error, EINVAL, FL_SIDE_NONE, offset, length, "compressed write of %llu bytes at %llu of image '%s': only whole clusters of %u "
                  "bytes can be compressed", (ull)length, (ull)offset, image->name, image->cluster_size);
    return rc < 0 || length == 0 ? rc : image->ops->write_compressed(image, buffer, length, offset, error);
}

/* ---- the public calls: the same through the gate ---- */

static int enter(fl_image *image, fl_error *error)
{
    if (!image)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "no image was given");
    int rc = gate_enter(&image->gate);
    if (rc == -FL_EFORKED)
        return fail(error, FL_EFORKED, FL_SIDE_NONE, 0, 0, "image '%s' belongs to the parent process: open it anew after fork()",
                    image->name);
    if (rc < 0)
        return fail(error, -rc, FL_SIDE_NONE, 0, 0, "image '%s' was closed", image->name);
    return 0;
}

static int leave(fl_image *image, int rc)
{
    gate_leave(&image->gate);
    return rc;
}

int image_use(fl_image *image, fl_error *error)
{
    int rc = enter(image, error);
    if (rc == 0) {
        image_ref(image);
        gate_leave(&image->gate);
    }
    return rc;
}

int image_take(fl_image *image, const char *what, fl_error *error)
{
    int rc = image_use(image, error);
    if (rc == 0 && atomic_exchange(&image->taken, true)) {
        rc = fail(error, EBUSY, FL_SIDE_NONE, 0, 0, "%.200s can't be %s: it is the source of a disk, the fleecing image of a snapshot, or the target "
                  "of a backup already (of one that was just closed, perhaps, whose last write to it still runs)", image->name, what);
        image_unref(image);
    }
    return rc;
}

void image_untake(fl_image *image) { atomic_store(&image->taken, false); }

int image_open(const char *path, const fl_image_options *options, fl_image **image, fl_error *error)
{
    const struct format *format;
    int rc = find_format(path, options, &format, error);
    if (rc == 0 && options->inspect && options->writable)
        rc = fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "image '%.200s' cannot be opened both to inspect it only and for writing", path);
    if (rc == 0)
        rc = format->open(path, options, image, error);
    if (rc == 0)
        (*image)->inspect = options->inspect;
    return rc;
}

int fl_image_open(const char *path, const fl_image_options *options, fl_image **image, fl_error *error)
{
    fl_image *opened;
    int rc = image_open(path, options, &opened, error);
    if (rc == 0)
        publish(opened, image);
    return rc;
}

int fl_image_create(const char *path, uint64_t size, const fl_image_options *options, fl_image **image, fl_error *error)
{
    const struct format *format;
    fl_image *created;
    int rc = find_format(path, options, &format, error);
    if (rc == 0)
        rc = format->create(path, size, options, &created, error);
    if (rc == 0)
        publish(created, image);
    return rc;
}

int fl_image_create_nameless(const char *directory, uint64_t size, fl_image **image, fl_error *error)
{
    fl_image *created;
    int rc;
    if (!directory || !*directory)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "no directory was given");
    rc = raw_create_nameless(directory, size, &created, error);
    if (rc == 0)
        publish(created, image);
    return rc;
}

int fl_image_faulty(fl_image *inner, fl_image **image, fl_error *error)
{
    fl_image *wrapper;
    int rc = enter(inner, error);
    if (rc < 0)
        return rc;
    rc = leave(inner, faulty_new(inner, &wrapper, error));
    if (rc == 0)
        publish(wrapper, image);
    return rc;
}

int fl_image_pread(fl_image *image, void *buffer, size_t count, uint64_t offset, fl_error *error)
{
    int rc = enter(image, error);
    return rc < 0 ? rc : leave(image, image_read(image, buffer, count, offset, error));
}

int fl_image_pwrite(fl_image *image, const void *buffer, size_t count, uint64_t offset, fl_error *error)
{
    int rc = enter(image, error);
    return rc < 0 ? rc : leave(image, image_write(image, buffer, count, offset, error));
}

int fl_image_zero(fl_image *image, uint64_t count, uint64_t offset, fl_error *error)
{
    int rc = enter(image, error);
    return rc < 0 ? rc : leave(image, image_zero(image, count, offset, error));
}

int fl_image_discard(fl_image *image, uint64_t count, uint64_t offset, fl_error *error)
{
    int rc = enter(image, error);
    return rc < 0 ? rc : leave(image, image_discard(image, count, offset, error));
}

int fl_image_flush(fl_image *image, fl_error *error)
{
    int rc = enter(image, error);
    return rc < 0 ? rc : leave(image, image_flush(image, error));
}

int fl_image_extents(fl_image *image, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error)
{
    int rc = enter(image, error);
    return rc < 0 ? rc : leave(image, image_extents(image, offset, length, extents, max, found, error));
}

int fl_image_map(fl_image *image, uint64_t offset, uint64_t length, fl_mapping *mappings, size_t max, size_t *found, fl_error *error)
{
    int rc = enter(image, error);
    return rc < 0 ? rc : leave(image, image_map(image, offset, length, mappings, max, found, error));
}

int fl_image_write_compressed(fl_image *image, const void *buffer, size_t count, uint64_t offset, fl_error *error)
{
    int rc = enter(image, error);
    return rc < 0 ? rc : leave(image, image_write_compressed(image, buffer, count, offset, error));
}

/* With the gate closed: nobody else is inside. */
static int grow(fl_image *image, uint64_t size, fl_error *error)
{
    int rc = check_writable(image, "growth", size, 0, error);
    if (rc < 0)
        return rc;
    if (!image->ops->grow)
        return fail(error, EOPNOTSUPP, FL_SIDE_NONE, 0, 0, "image '%s' cannot grow: that is not known of its format, %s",
                    image->name, image->ops->format);
    if (size < image->size)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "image '%s' has %llu bytes and cannot shrink to %llu",
                    image->name, (ull)image->size, (ull)size);
    rc = image->ops->grow(image, size, error);
    if (rc == 0)
        image->size = size;
    return rc;
}

#define GROW_WAIT_NS UINT64_C(10000000000)      /* for the calls that run: one that hangs must not hang this one */

int fl_image_grow(fl_image *image, uint64_t size, fl_error *error)
{
    int rc = image_take(image, "made larger", error);
    if (rc < 0)
        return rc;
    rc = gate_close(&image->gate, add_sat(now_ns(), GROW_WAIT_NS));
    if (rc == 0) {
        rc = grow(image, size, error);
        gate_open(&image->gate);
    } else {
        rc = fail(error, rc == -ETIMEDOUT ? EBUSY : -rc, FL_SIDE_NONE, 0, 0, "image '%s' cannot grow: it was closed, or a call on it does not end",
                  image->name);
    }
    image_untake(image);
    image_unref(image);
    return rc;
}

/* The lists that only some formats have. */
int fl_image_snapshots(fl_image *image, size_t first, fl_internal_snapshot *snapshots, size_t max, size_t *found, fl_error *error)
{
    int rc = enter(image, error);
    if (rc < 0)
        return rc;
    if (image->ops->snapshots)
        return leave(image, image->ops->snapshots(image, first, snapshots, max, found, error));
    *found = 0;
    return leave(image, 0);
}

int fl_image_bitmaps(fl_image *image, size_t first, fl_persistent_bitmap *bitmaps, size_t max, size_t *found, fl_error *error)
{
    int rc = enter(image, error);
    if (rc < 0)
        return rc;
    if (image->ops->bitmaps)
        return leave(image, image->ops->bitmaps(image, first, bitmaps, max, found, error));
    *found = 0;
    return leave(image, 0);
}

int fl_image_info_get(fl_image *image, fl_image_info *info, fl_error *error)
{
    int rc = enter(image, error);
    if (rc < 0)
        return rc;
    memset(info, 0, sizeof *info);
    info->size = image->size;
    info->allocated = image->ops->allocated(image);
    info->cluster_size = image->cluster_size;
    info->alignment = image->alignment;
    info->block_device = image->block_device;
    info->writable = image->writable;
    info->direct = image->direct;
    strncpy(info->format, image->ops->format, sizeof info->format - 1);
    if (image->ops->info)
        image->ops->info(image, info);
    return leave(image, 0);
}

int fl_image_close(fl_image *image, fl_error *error)
{
    if (!image)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "no image was given");
    if (forked(image))
        return fail(error, FL_EFORKED, FL_SIDE_NONE, 0, 0, "image '%s' belongs to the parent process", image->name);
    gate_shut(&image->gate);
    return atomic_exchange(&image->closed, true) ? 0 : drop_reference(image, error);
}

void fl_image_free(fl_image *image)
{
    if (!image)
        return;
    if (!forked(image))
        gate_shut(&image->gate);
    if (!atomic_exchange(&image->closed, true))
        drop_reference(image, NULL);
    drop_memory(image);
}
