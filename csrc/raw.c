/* raw.c: the raw format: the image is the file. All the work is io.c's. */
#define _GNU_SOURCE
#include "image.h"

#include <stdio.h>
#include <stdlib.h>

#include "io.h"

struct raw {
    fl_image image;
    struct io io;
    pthread_mutex_t cloning;    /* held while it is cloned: a guest's write then waits for one clone, not for a queue of them */
};

static struct io *io_of(fl_image *image)
{
    return &((struct raw *)image)->io;
}

static int raw_readv(fl_image *image, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error)
{
    return io_readv(io_of(image), iov, count, offset, length, error);
}

static int raw_writev(fl_image *image, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error)
{
    return io_writev(io_of(image), iov, count, offset, length, error);
}

/* What a zero or a discard taught io.c about the file. */
static void learn(fl_image *image)
{
    if (!io_punches(io_of(image)))
        atomic_store_explicit(&image->punches, false, memory_order_relaxed);
}

static int raw_zero(fl_image *image, uint64_t count, uint64_t offset, fl_error *error)
{
    int rc = io_zero(io_of(image), count, offset, error);
    learn(image);
    return rc;
}

static int raw_discard(fl_image *image, uint64_t count, uint64_t offset, fl_error *error)
{
    int rc = io_discard(io_of(image), count, offset, error);
    learn(image);
    return rc;
}

static int raw_flush(fl_image *image, fl_error *error)
{
    return io_flush(io_of(image), error);
}

static int raw_extents(fl_image *image, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error)
{
    return io_extents(io_of(image), offset, length, extents, max, found, error);
}

static uint64_t raw_next_data(fl_image *image, uint64_t offset, uint64_t end)
{
    return io_next_data(io_of(image), offset, end);
}

static uint64_t raw_allocated(fl_image *image)
{
    return io_allocated(io_of(image));
}

static bool raw_reserve(fl_image *image, uint64_t count, uint64_t offset)
{
    return io_reserve(io_of(image), count, offset);
}

static uint64_t raw_ends_at(fl_image *image)
{
    return atomic_load(&io_of(image)->ends_at);
}

static int raw_descriptor(fl_image *image)
{
    return io_of(image)->fd;
}

static int raw_clone(fl_image *image, uint64_t offset, uint64_t length, fl_image *target)
{
    struct raw *raw = (struct raw *)image;
    io_write_back(&raw->io, offset, length);
    pthread_mutex_lock(&raw->cloning);
    int rc = io_clone(&raw->io, offset, length, io_of(target));
    pthread_mutex_unlock(&raw->cloning);
    return rc;
}

static void raw_destroy(fl_image *image)
{
    io_close(io_of(image));
    if (image->gate.generation == fl_generation)        /* in a child, one of the parent's threads may have had it */
        pthread_mutex_destroy(&((struct raw *)image)->cloning);
}

static const struct image_ops raw_ops = {
    .format = "raw",
    .readv = raw_readv, .writev = raw_writev, .zero = raw_zero, .discard = raw_discard, .flush = raw_flush,
    .extents = raw_extents, .next_data = raw_next_data, .clone = raw_clone, .allocated = raw_allocated, .reserve = raw_reserve, .ends_at = raw_ends_at,
    .descriptor = raw_descriptor, .destroy = raw_destroy,
};

/* An image whose file is not open yet, so that messages about the opening have a name that outlives it. */
static int raw_new(const char *name, struct raw **raw, fl_error *error)
{
    struct raw *r = image_alloc(sizeof *r);
    int rc = r ? image_init(&r->image, &raw_ops, name) : -ENOMEM;
    if (rc < 0) {
        free(r);
        return fail(error, -rc, FL_SIDE_NONE, 0, 0, "cannot set up image '%.200s'", name);
    }
    pthread_mutex_init(&r->cloning, NULL);      /* of the plain sort: cannot fail */
    r->io.fd = r->io.direct_fd = -1;
    *raw = r;
    return 0;
}

/* `rc` is what opening the file returned. */
static int raw_finish(struct raw *raw, int rc, fl_image **image)
{
    if (rc < 0) {
        image_unref(&raw->image);
        return rc;
    }
    raw->image.size = raw->io.size;
    raw->image.cluster_size = raw->io.block;
    raw->image.alignment = raw->io.alignment;
    raw->image.writable = raw->io.writable;
    raw->image.block_device = raw->io.device;
    raw->image.direct = raw->io.direct_fd >= 0;
    atomic_store(&raw->image.punches, io_punches(&raw->io));
    *image = &raw->image;
    return 0;
}

int raw_open(const char *path, const fl_image_options *options, fl_image **image, fl_error *error)
{
    struct raw *raw;
    int rc = raw_new(path, &raw, error);
    if (rc < 0)
        return rc;
    rc = io_open(&raw->io, path, raw->image.name, options->writable, options->direct, options->share, error);
    return raw_finish(raw, rc, image);
}

int raw_create(const char *path, uint64_t size, const fl_image_options *options, fl_image **image, fl_error *error)
{
    struct raw *raw;
    if (options->cluster_size || options->backing || options->backing_format || options->compression)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "cannot make image '%.200s': a raw image has no cluster size, backing file or compression to choose",
                    path);
    int rc = raw_new(path, &raw, error);
    if (rc < 0)
        return rc;
    rc = io_create(&raw->io, path, raw->image.name, size, options->direct, options->share, error);
    return raw_finish(raw, rc, image);
}

int raw_create_nameless(const char *directory, uint64_t size, fl_image **image, fl_error *error)
{
    struct raw *raw;
    char name[300];
    snprintf(name, sizeof name, "(nameless, in %s)", directory);
    int rc = raw_new(name, &raw, error);
    if (rc < 0)
        return rc;
    rc = io_create_nameless(&raw->io, directory, raw->image.name, size, error);
    return raw_finish(raw, rc, image);
}
