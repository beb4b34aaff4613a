/* write.c: reading and writing the disk. Clusters that are mapped and nobody's but ours are read and written in place, with nothing held but the epoch.
 * Everything else that is written gets new clusters, with copy-on-write of what the write leaves of them.
 *
 * An allocating write: claim the clusters of the disk; look again; allocate clusters of the file; read what is around the data (from the backing
 * file, compressed clusters, or clusters that others share: none of that changes, and what is ours of it is not freed before our claim is
 * gone); write all with one call; change the entries; release the claim. An overlapping write that came later waited for the claim, looks
 * again, and finds the clusters mapped. One that overlaps and looked earlier wrote to the old cluster only if that was ours to be overwritten, and
 * then it would not have been replaced by a write. A discard may replace it: see discard.c.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "driver.h"

#define PART_ENTRIES 64
#define ZERO_BLOCK (64u << 10)

static char zeros[ZERO_BLOCK] __attribute__((aligned(4096)));  /* never written to */

/* ---- parts of vectors ---- */

typedef int part_fn(struct qcow2 *q, const struct iovec *iov, int count, uint64_t at, size_t length, fl_error *error);

/* Call `fn` for the next `length` bytes from the cursor on, which moves on. `at` goes with it. */
static int for_part(struct qcow2 *q, struct iov_cursor *cursor, uint64_t at, size_t length, part_fn *fn, fl_error *error)
{
    int rc = 0;
    while (length > 0 && rc == 0) {
        struct iovec part[PART_ENTRIES];
        size_t n;
        int count = iov_next(cursor, length, part, PART_ENTRIES, &n);
        rc = fn(q, part, count, at, n, error);
        iov_advance(cursor, n);
        at += n;
        length -= n;
    }
    return rc;
}

static int zero_part(struct qcow2 *q, const struct iovec *iov, int count, uint64_t at, size_t length, fl_error *error)
{
    (void)q, (void)at, (void)length, (void)error;
    for (int i = 0; i < count; i++)
        memset(iov[i].iov_base, 0, iov[i].iov_len);
    return 0;
}

static int read_host(struct qcow2 *q, const struct iovec *iov, int count, uint64_t host, size_t length, fl_error *error)
{
    return io_read_padded(&q->io, iov, count, host, length, error);
}

static int write_host(struct qcow2 *q, const struct iovec *iov, int count, uint64_t host, size_t length, fl_error *error)
{
    int rc = io_writev(&q->io, iov, count, host, length, error);
    if (rc == 0)
        io_reaches(&q->io, host + length);
    return rc;
}

static int read_backing(struct qcow2 *q, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error)
{
    (void)length;
    return image_readv(q->backing, iov, count, offset, error);
}

/* ---- reading ---- */

/* What an unallocated range reads as. */
static int read_unallocated(struct qcow2 *q, struct iov_cursor *cursor, uint64_t offset, size_t length, fl_error *error)
{
    size_t below = 0;
    int rc = 0;
    if (q->backing && offset < q->backing->size) {
        below = (size_t)MIN(length, q->backing->size - offset);
        rc = for_part(q, cursor, offset, below, read_backing, error);
    }
    return rc < 0 ? rc : for_part(q, cursor, offset, length - below, zero_part, error);
}

static int read_compressed(struct qcow2 *q, struct iov_cursor *cursor, uint64_t offset, uint64_t entry, size_t length, fl_error *error)
{
    size_t within = (size_t)(offset & q->cluster_mask);
    char *buffer = malloc(q->cluster_size);
    if (!buffer)
        return fail(error, ENOMEM, FL_SIDE_NONE, offset, length, "no memory to read a compressed cluster of image '%s'", q->image.name);
    int rc = compressed_read(q, offset - within, entry, buffer, error);
    if (rc == 0) {
        struct iovec v;
        size_t n;
        for (size_t done = 0; done < length; done += n) {
            iov_next(cursor, length - done, &v, 1, &n);
            memcpy(v.iov_base, buffer + within + done, n);
            iov_advance(cursor, n);
        }
    }
    free(buffer);
    return rc;
}

/* The bytes at `place`, of which `place->length` are wanted. */
static int read_place(struct qcow2 *q, struct iov_cursor *cursor, uint64_t offset, const struct place *place, fl_error *error)
{
    size_t length = (size_t)place->length;
    switch (place->state) {
    case UNALLOCATED:
        return read_unallocated(q, cursor, offset, length, error);
    case ZERO:
        return for_part(q, cursor, offset, length, zero_part, error);
    case MAPPED:
        return for_part(q, cursor, place->host, length, read_host, error);
    default:
        return read_compressed(q, cursor, offset, place->host, length, error);
    }
}

int qcow2_readv(fl_image *image, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error)
{
    struct qcow2 *q = qcow2_of(image);
    struct iov_cursor cursor = { iov, count, 0 };
    int rc = 0;
    for (size_t done = 0; done < length && rc == 0; ) {
        struct place place = { .length = 0 };
        unsigned pass = epoch_enter(&q->epoch);
        rc = map_look(q, offset + done, length - done, &place, error);
        if (rc == 0 && place.state == MAPPED && place.length == length)
            rc = read_host(q, iov, count, place.host, length, error);
        else if (rc == 0)
            rc = read_place(q, &cursor, offset + done, &place, error);
        epoch_leave(&q->epoch, pass);
        done += (size_t)place.length;
    }
    return rc;
}

/* ---- allocating writes ---- */

/* What is in a part of one cluster now: its entry is `entry`, which is claimed. Behind the end of the disk there are zeros. */
static int read_old(struct qcow2 *q, uint64_t entry, uint64_t offset, size_t length, char *buffer, fl_error *error)
{
    struct place place = { .ours = false };
    int rc = map_place(q, align_down(offset, q->cluster_size), entry, false, &place, error);
    if (rc < 0)
        return rc;
    size_t inside = offset < q->image.size ? (size_t)MIN(length, q->image.size - offset) : 0;
    struct iovec v = { buffer, inside };
    struct iov_cursor cursor = { &v, 1, 0 };
    memset(buffer + inside, 0, length - inside);
    place.length = inside;
    if (place.state == MAPPED)
        place.host += offset & q->cluster_mask;
    return inside ? read_place(q, &cursor, offset, &place, error) : 0;
}

/* What is written around the data: before and behind it, in one buffer. */
struct around { size_t head, tail; char *buffer; };

/* Does a part of a cluster read as zeros, and so does a fresh one? Asked of the entry alone. */
static bool is_blank(const struct qcow2 *q, uint64_t entry, uint64_t offset)
{
    if (entry == 0)
        return !q->backing || offset >= q->backing->size;
    return (entry & (ENTRY_ZERO | ENTRY_COMPRESSED)) == ENTRY_ZERO;
}

static int prepare_around(struct qcow2 *q, const uint64_t *entries, uint64_t clusters, uint64_t offset, size_t length, bool fresh,
                          struct around *around, fl_error *error)
{
    uint64_t start = align_down(offset, q->cluster_size), end = offset + length;
    *around = (struct around){ (size_t)(offset - start), (size_t)(start + (clusters << q->cluster_bits) - end), NULL };
    if (fresh && is_blank(q, entries[0], start))
        around->head = 0;
    if (fresh && is_blank(q, entries[clusters - 1], align_down(end - 1, q->cluster_size)))
        around->tail = 0;
    if (around->head + around->tail == 0)
        return 0;
    if (posix_memalign((void **)&around->buffer, 4096, around->head + around->tail))
        return fail(error, ENOMEM, FL_SIDE_NONE, offset, length, "no memory to copy clusters of image '%s'", q->image.name);
    int rc = around->head ? read_old(q, entries[0], start, around->head, around->buffer, error) : 0;
    if (rc == 0 && around->tail)
        rc = read_old(q, entries[clusters - 1], end, around->tail, around->buffer + around->head, error);
    if (rc < 0)
        free(around->buffer);
    return rc;
}

/* Head, data and tail with one call. The cursor stays. */
static int write_merged(struct qcow2 *q, const struct iov_cursor *cursor, const struct around *around, uint64_t host, size_t length, fl_error *error)
{
    struct iovec stack[PART_ENTRIES], *iov = stack;
    struct iov_cursor data = *cursor;
    size_t n;
    int used = 0, room = cursor->count + 2;
    if (room > PART_ENTRIES && !(iov = malloc((size_t)room * sizeof *iov)))
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, length, "no memory to write to image '%s'", q->image.name);
    if (around->head)
        iov[used++] = (struct iovec){ around->buffer, around->head };
    used += iov_next(&data, length, iov + used, cursor->count, &n);
    if (around->tail)
        iov[used++] = (struct iovec){ around->buffer + around->head, around->tail };
    int rc = write_host(q, iov, used, host - around->head, around->head + length + around->tail, error);
    if (iov != stack)
        free(iov);
    return rc;
}

/* May be overwritten where it is: then it is no business of an allocating write. */
static bool in_place(uint64_t entry, bool table_ours)
{
    return table_ours && (entry & ENTRY_COPIED) && !(entry & (ENTRY_COMPRESSED | ENTRY_ZERO)) && (entry & OFFSET_MASK);
}

/* The data for up to `clusters` claimed clusters, whose entries are `old`. *length comes down to what was written. */
static int write_new(struct qcow2 *q, const struct iov_cursor *cursor, uint64_t offset, size_t *length, uint64_t first, uint64_t clusters,
                     const uint64_t *old, uint64_t *new, fl_error *error)
{
    struct run run;
    struct around around;
    bool fresh;
    int rc = alloc_clusters(q, clusters, &run, &fresh, error);
    if (rc < 0)
        return rc;
    size_t n = (size_t)MIN(*length, ((first + run.count) << q->cluster_bits) - offset);
    uint64_t host = run.first << q->cluster_bits;
    rc = prepare_around(q, old, run.count, offset, n, fresh, &around, error);
    if (rc == 0) {
        rc = write_merged(q, cursor, &around, host + (offset & q->cluster_mask), n, error);
        free(around.buffer);
    }
    for (uint64_t i = 0; i < run.count; i++)
        new[i] = ENTRY_COPIED | (host + (i << q->cluster_bits));
    if (rc == 0)
        rc = map_change(q, first, run.count, old, new, error);
    if (rc < 0)
        alloc_undo(q, run);
    else
        *length = n;
    return rc;
}

/* Write up to `*length` bytes where the clusters are not there to be overwritten. *length comes down to what was done; 0: by now they are. */
static int write_allocating(struct qcow2 *q, const struct iov_cursor *cursor, uint64_t offset, size_t *length, fl_error *error)
{
    uint64_t first = offset >> q->cluster_bits, most = MAX(ALLOCATE_MAX >> q->cluster_bits, 1);
    uint64_t clusters = clusters_for(q, (offset & q->cluster_mask) + *length), n = 0;
    struct claim claim;
    bool ours;
    int rc = commit_if_due(q, error);
    if (rc < 0)
        return rc;
    clusters = MIN(clusters, MIN(map_left_in_slice(q, first), MIN(most, BATCH)));
    uint64_t few[2 * 16], *old = few, *new;
    if (clusters > 16 && !(old = malloc(2 * clusters * sizeof *old)))
        return fail(error, ENOMEM, FL_SIDE_NONE, offset, *length, "no memory to write to image '%s'", q->image.name);
    new = old + clusters;
    claim_take(q, &claim, first, clusters);
    rc = map_entries(q, first, clusters, old, &ours, error);
    while (rc == 0 && n < clusters && !in_place(old[n], ours))
        n++;
    *length = (size_t)MIN(*length, ((first + n) << q->cluster_bits) - MIN(offset, (first + n) << q->cluster_bits));
    if (rc == 0 && n > 0)
        rc = write_new(q, cursor, offset, length, first, n, old, new, error);
    claim_release(q, &claim);
    if (old != few)
        free(old);
    return rc;
}

/* ---- writing ---- */

int qcow2_writev(fl_image *image, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error)
{
    struct qcow2 *q = qcow2_of(image);
    struct iov_cursor cursor = { iov, count, 0 };
    int rc = qcow2_prepare(q, error);
    size_t n;
    for (size_t done = 0; done < length && rc == 0; done += n) {
        struct place place;
        unsigned pass = epoch_enter(&q->epoch);
        rc = map_look(q, offset + done, length - done, &place, error);
        n = rc < 0 ? 0 : (size_t)place.length;
        bool mapped = rc == 0 && place.state == MAPPED && place.ours;
        if (mapped && n == length)
            rc = write_host(q, iov, count, place.host, length, error);
        else if (mapped)
            rc = for_part(q, &cursor, place.host, n, write_host, error);
        epoch_leave(&q->epoch, pass);
        if (rc == 0 && !mapped) {
            /* the run may be of one kind only, and the next one of another that needs allocation too: so not just as long as the run */
            n = length - done;
            rc = write_allocating(q, &cursor, offset + done, &n, error);
            iov_advance(&cursor, n);
        }
    }
    return rc;
}

/* Zeros as data, in pieces. */
static int write_zero_data(struct qcow2 *q, uint64_t count, uint64_t offset, fl_error *error)
{
    struct iovec iov[32];
    int rc = 0;
    while (count > 0 && rc == 0) {
        uint64_t piece = MIN(count, sizeof zeros * 32);
        int used = 0;
        for (uint64_t left = piece; left > 0; left -= iov[used++].iov_len)
            iov[used] = (struct iovec){ zeros, (size_t)MIN(left, sizeof zeros) };
        rc = qcow2_writev(&q->image, iov, used, offset, (size_t)piece, error);
        offset += piece;
        count -= piece;
    }
    return rc;
}

int write_zeros(struct qcow2 *q, uint64_t count, uint64_t offset, fl_error *error)
{
    int rc = 0;
    while (count > 0 && rc == 0) {
        fl_extent extent;
        size_t found;
        rc = map_extents(&q->image, offset, count, &extent, 1, &found, error);
        if (rc == 0 && extent.kind != FL_ZERO)
            rc = write_zero_data(q, extent.length, offset, error);
        if (rc == 0) {
            offset += extent.length;
            count -= extent.length;
        }
    }
    return rc;
}
