/* qcow2.c: opening, closing, and what the driver gives to image.c. The promises are in qcow2.h, the locks in driver.h.
 *
 *   a read or a write  ->  write.c  ->  map.c (what is there?)  ->  cache.c
 *                            |             ^
 *                            '-> refcount.c (new clusters), then map.c (the entries)
 *   a discard, a zero  ->  discard.c  ->  map.c (the entries; what they had waits to be freed)
 *   a flush            ->  commit.c: everything into the file, in the right order; then what waits is freed: refcount.c
 */
#define _GNU_SOURCE
#include <endian.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "driver.h"

/* ---- broken images ---- */

void qcow2_break(struct qcow2 *q, const fl_error *why)
{
    pthread_mutex_lock(&q->breaking);
    if (!atomic_load(&q->broken)) {
        q->broken_by = *why;
        atomic_store(&q->broken, true);
    }
    pthread_mutex_unlock(&q->breaking);
}

int qcow2_corrupt(struct qcow2 *q, uint64_t guest, fl_error *error, const char *format, ...)
{
    char text[250], where[60] = "";
    fl_error why = { 0 };
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (guest != UINT64_MAX)
        snprintf(where, sizeof where, " at %llu of the disk", (unsigned long long)guest);
    fail(&why, FL_EFORMAT, FL_SIDE_NONE, guest == UINT64_MAX ? 0 : guest, 0, "image '%.100s' is damaged%s: %s", q->image.name, where, text);
    qcow2_break(q, &why);
    if (error)
        *error = why;
    return -FL_EFORMAT;
}

/* ---- before the first write ---- */

/* What other programs keep in the image beside the disk, and what we do not keep up to date, is declared void before anything changes. */
static int clear_autoclear(struct qcow2 *q, fl_error *error)
{
    pthread_mutex_lock(&q->lock);
    struct header header = q->header;
    pthread_mutex_unlock(&q->lock);
    struct runs runs = { 0 };
    if (header.autoclear == 0)
        return 0;
    bitmap_store_clusters(q, &header, &runs);
    header.autoclear = 0;
    header.bitmap_count = 0;
    int rc = header_write(&q->io, &header, error);
    if (rc == 0)
        rc = io_flush(&q->io, error);
    if (rc == 0) {
        pthread_mutex_lock(&q->lock);
        q->header.autoclear = 0;
        q->header.bitmap_count = 0;
        if (runs.count && freed_reserve(q, runs.count) == 0) {  /* no memory: they leak */
            for (size_t i = 0; i < runs.count; i++)
                freed_add(q, runs.run[i].first, runs.run[i].count);
            q->must_commit = true;
        }
        pthread_mutex_unlock(&q->lock);
    }
    free(runs.run);
    return rc;
}

static int fail_broken(struct qcow2 *q, fl_error *error)
{
    pthread_mutex_lock(&q->breaking);
    int code = q->broken_by.cause;
    fail(error, code, q->broken_by.side, q->broken_by.offset, q->broken_by.length, "no more writes, since %.300s", q->broken_by.text);
    pthread_mutex_unlock(&q->breaking);
    return -code;
}

int qcow2_prepare(struct qcow2 *q, fl_error *error)
{
    int rc = 0;
    if (UNLIKELY(atomic_load_explicit(&q->broken, memory_order_relaxed)))
        return fail_broken(q, error);
    if (LIKELY(atomic_load_explicit(&q->prepared, memory_order_acquire)))
        return 0;
    pthread_mutex_lock(&q->tables);             /* one does it, and the others wait */
    if (!atomic_load(&q->prepared) && (rc = clear_autoclear(q, error)) == 0)
        atomic_store(&q->prepared, true);
    pthread_mutex_unlock(&q->tables);
    return rc;
}

/* ---- what image.c calls ---- */

/* Where compressed clusters were written, what was set aside for more of them is given back too: a backup that was flushed is complete, and is not
   written any more when it is closed. */
static int qcow2_flush(fl_image *image, fl_error *error)
{
    struct qcow2 *q = qcow2_of(image);
    pthread_mutex_lock(&q->alloc);
    bool compressing = q->area.end != 0;
    pthread_mutex_unlock(&q->alloc);
    int rc = commit(q, error);          /* commit_all does nothing, not even sync, when it finds nothing to do */
    return rc == 0 && compressing ? commit_all(q, error) : rc;
}

static uint64_t qcow2_allocated(fl_image *image) { return io_allocated(&qcow2_of(image)->io); }

/* A file that was cut off has lost clusters of anywhere on the disk. */
static uint64_t qcow2_ends_at(fl_image *image)
{
    return atomic_load(&qcow2_of(image)->io.ends_at) == UINT64_MAX ? UINT64_MAX : 0;
}

static struct header header_now(struct qcow2 *q)
{
    pthread_mutex_lock(&q->lock);
    struct header header = q->header;
    pthread_mutex_unlock(&q->lock);
    return header;
}

static void qcow2_info(fl_image *image, fl_image_info *info)
{
    struct header header = header_now(qcow2_of(image));
    header_info(&header, info);
}

static int qcow2_snapshots(fl_image *image, size_t first, fl_internal_snapshot *snapshots, size_t max, size_t *found, fl_error *error)
{
    struct header header = header_now(qcow2_of(image));
    return snapshots_list(&qcow2_of(image)->io, &header, first, snapshots, max, found, error);
}

static int qcow2_bitmaps(fl_image *image, size_t first, fl_persistent_bitmap *bitmaps, size_t max, size_t *found, fl_error *error)
{
    struct header header = header_now(qcow2_of(image));
    return bitmaps_list(&qcow2_of(image)->io, &header, first, bitmaps, max, found, error);
}

static int qcow2_sync_close(fl_image *image, fl_error *error)
{
    struct qcow2 *q = qcow2_of(image);
    return image->writable && atomic_load(&q->prepared) ? commit_all(q, error) : 0;       /* threads are started by changes only */
}

static void qcow2_destroy(fl_image *image)
{
    struct qcow2 *q = qcow2_of(image);
    bool mine = image->gate.generation == fl_generation;
    cache_destroy(q);
    io_close(&q->io);
    image_unref(q->backing);
    free((void *)q->l1);
    free(q->reftable);
    bitmap_destroy(&q->l1_dirty);
    bitmap_destroy(&q->reftable_dirty);
    bitmap_destroy(&q->maybe_free);
    freed_destroy(q->freed);
    freed_destroy(q->waiting);
    free(q->commit_buffer);
    if (!mine)
        return;
    pthread_cond_destroy(&q->claims.released);
    pthread_cond_destroy(&q->committed);
    pthread_mutex_t *locks[] = { &q->claims.lock, &q->tables, &q->alloc, &q->lock, &q->settling, &q->committing, &q->breaking };
    for (size_t i = 0; i < sizeof locks / sizeof *locks; i++)
        pthread_mutex_destroy(locks[i]);
}

static int qcow2_descriptor(fl_image *image) { return qcow2_of(image)->io.fd; }

/* A flush leaves what closing still does: clusters that wait to be freed, and their refcounts. */
static int qcow2_settle(fl_image *image, fl_error *error)
{
    int rc = commit(qcow2_of(image), error);
    return rc ? rc : qcow2_sync_close(image, error);
}

static const struct image_ops qcow2_ops = {
    .format = "qcow2",
    .readv = qcow2_readv, .writev = qcow2_writev, .zero = qcow2_zero, .discard = qcow2_discard, .flush = qcow2_flush,
    .extents = map_extents, .allocated = qcow2_allocated, .map = map_map, .write_compressed = qcow2_write_compressed, .grow = qcow2_grow,
    .info = qcow2_info, .snapshots = qcow2_snapshots, .bitmaps = qcow2_bitmaps,
    .ends_at = qcow2_ends_at, .descriptor = qcow2_descriptor, .settle = qcow2_settle,
    .bitmap_load = qcow2_bitmap_load, .bitmap_store = qcow2_bitmap_store, .sync_close = qcow2_sync_close, .destroy = qcow2_destroy,
};

/* ---- opening ---- */

static int no_memory(const struct qcow2 *q, fl_error *error)
{
    return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for the tables of image '%s'", q->image.name);
}

static int qcow2_new(const char *path, struct qcow2 **out, fl_error *error)
{
    struct qcow2 *q = image_alloc(sizeof *q);
    int rc = q ? image_init(&q->image, &qcow2_ops, path) : -ENOMEM;
    if (rc < 0) {
        free(q);
        return fail(error, -rc, FL_SIDE_NONE, 0, 0, "cannot set up image '%.200s'", path);
    }
    pthread_mutex_t *locks[] = { &q->claims.lock, &q->tables, &q->alloc, &q->lock, &q->settling, &q->committing, &q->breaking };
    for (size_t i = 0; i < sizeof locks / sizeof *locks; i++)
        pthread_mutex_init(locks[i], NULL);
    cond_init(&q->claims.released);
    cond_init(&q->committed);
    q->io.fd = q->io.direct_fd = -1;
    *out = q;
    return 0;
}

/* An image that was not closed properly, by somebody who does not keep its refcounts up to date: they are rebuilt. */
static int repair_dirty(struct qcow2 *q, fl_error *error)
{
    fl_check *result = calloc(1, sizeof *result);       /* it is large */
    if (!result)
        return no_memory(q, error);
    int rc = check_file(&q->io, &q->header, FL_REPAIR_ALL, result, error);
    if (rc == 0 && (result->corruptions || result->check_errors || q->header.incompatible & INCOMPAT_DIRTY))
        rc = fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%s' was not closed properly, and cannot be repaired: %llu corruptions are left; it "
                  "can be opened for reading", q->image.name, (unsigned long long)result->corruptions);
    free(result);
    return rc;
}

/* What the header says about writing; before anything is written. */
static int check_writable(struct qcow2 *q, fl_error *error)
{
    if (q->header.incompatible & INCOMPAT_CORRUPT)
        return fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%s' is marked as corrupt and cannot be opened for writing: repair it first, or "
                    "open it for reading", q->image.name);
    return q->header.incompatible & INCOMPAT_DIRTY ? repair_dirty(q, error) : 0;
}

static void compute(struct qcow2 *q)
{
    const struct header *h = &q->header;
    q->cluster_bits = h->cluster_bits;
    q->cluster_size = header_cluster_size(h);
    q->cluster_mask = q->cluster_size - 1;
    q->l2_bits = l2_bits(h);
    unsigned log_slice = MIN(q->cluster_bits, (unsigned)__builtin_ctz(SLICE_MAX));
    q->slice_bits = log_slice - 3;
    q->refcount_order = h->refcount_order;
    q->block_bits = q->cluster_bits + 3 - h->refcount_order;
    q->region_bits = log_slice + 3 - h->refcount_order;
    q->refcount_max = h->refcount_order == 6 ? UINT64_MAX : (UINT64_C(1) << (1u << h->refcount_order)) - 1;
    q->has_zero_flag = h->version >= 3;
    uint64_t length = io_length(&q->io);
    io_reaches(&q->io, q->io.device ? 0 : length);
    atomic_store(&q->tail, div_up(length, q->cluster_size));
}

static int read_l1(struct qcow2 *q, fl_error *error)
{
    uint32_t entries = q->header.l1_size;
    uint64_t *table = malloc(MAX(entries, 1u) * sizeof *table);
    q->l1 = calloc(MAX(entries, 1u), sizeof *q->l1);
    int rc = table && q->l1 && bitmap_init(&q->l1_dirty, MAX(entries, 1u)) == 0 ? 0 : no_memory(q, error);
    if (rc == 0 && entries)
        rc = io_read_metadata(&q->io, table, entries * sizeof *table, q->header.l1_offset, error);
    for (uint32_t i = 0; i < entries && rc == 0; i++)
        atomic_init(&q->l1[i], be64toh(table[i]));
    free(table);
    return rc;
}

/* The file is open, and has a header. */
static int set_up(struct qcow2 *q, const char *path, const fl_image_options *options, fl_error *error)
{
    int rc = header_read(&q->io, &q->header, error);
    if (rc == 0)
        rc = backing_open(&q->header, path, options, &q->backing, error);       /* what is refused is refused before anything is repaired */
    if (rc == 0 && q->io.writable)
        rc = check_writable(q, error);
    if (rc < 0)
        return rc;
    compute(q);
    if (q->cluster_size < MAX(q->io.alignment, SLICE_MAX))
        io_direct_end(&q->io);                  /* data and tables would share blocks of the storage */
    q->image.size = q->header.size;
    q->image.cluster_size = (uint32_t)q->cluster_size;
    q->image.alignment = q->io.alignment;
    q->image.writable = q->io.writable;
    q->image.block_device = q->io.device;
    q->image.direct = q->io.direct_fd >= 0;
    if (cache_init(q, options->cache_size) < 0)
        return no_memory(q, error);
    tables_moved(q);
    rc = read_l1(q, error);
    if (rc == 0 && q->io.writable)
        rc = refcount_init(q, error);
    atomic_store(&q->image.punches, q->has_zero_flag || !q->backing);
    return rc;
}

int qcow2_open(const char *path, const fl_image_options *options, fl_image **image, fl_error *error)
{
    struct qcow2 *q;
    int rc = qcow2_new(path, &q, error);
    if (rc < 0)
        return rc;
    rc = io_open(&q->io, path, q->image.name, options->writable, options->direct, options->share, error);
    if (rc == 0)
        rc = set_up(q, path, options, error);
    if (rc == 0)
        *image = &q->image;
    else
        image_unref(&q->image);
    return rc;
}

int qcow2_create(const char *path, uint64_t size, const fl_image_options *options, fl_image **image, fl_error *error)
{
    struct qcow2 *q;
    int rc = qcow2_new(path, &q, error);
    if (rc < 0)
        return rc;
    rc = io_create(&q->io, path, q->image.name, 0, options->direct, options->share, error);
    bool made = rc == 0;
    if (rc == 0)
        rc = qcow2_format(&q->io, q->image.name, size, options, error);
    if (rc == 0)
        rc = set_up(q, path, options, error);
    if (rc == 0) {
        *image = &q->image;
        return 0;
    }
    if (made)
        unlink(path);
    image_unref(&q->image);
    return rc;
}
