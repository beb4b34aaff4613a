/* compressed.c: compressed clusters. They are read by anybody, and written by backups whole: packed one behind the other into clusters of the file, which
 * then have one reference for each that touches them. Through the page cache even where the rest is direct: they are aligned to nothing.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "driver.h"

/* "Compressed Clusters Descriptor": the offset in the low bits, then how many sectors of 512 follow the one where it begins. */
static unsigned offset_bits(const struct qcow2 *q) { return 62 - (q->cluster_bits - 8); }
static uint64_t data_offset(const struct qcow2 *q, uint64_t entry) { return entry & ((UINT64_C(1) << offset_bits(q)) - 1); }

static uint64_t data_end(const struct qcow2 *q, uint64_t entry)
{
    uint64_t more = (entry & ~(ENTRY_COMPRESSED | ENTRY_COPIED)) >> offset_bits(q);
    return align_down(data_offset(q, entry), 512) + (more + 1) * 512;
}

struct run compressed_clusters(const struct qcow2 *q, uint64_t entry)
{
    uint64_t first = data_offset(q, entry) >> q->cluster_bits;
    return (struct run){ first, ((data_end(q, entry) - 1) >> q->cluster_bits) + 1 - first };
}

int compressed_read(struct qcow2 *q, uint64_t guest, uint64_t entry, void *buffer, fl_error *error)
{
    uint64_t offset = data_offset(q, entry);
    size_t length = (size_t)(data_end(q, entry) - offset);
    if (!in_range(1, offset, io_length(&q->io)))
        return qcow2_corrupt(q, guest, error, "its compressed data is said to be at %llu, behind the end of the file", (unsigned long long)offset);
    char *in = malloc(length);
    if (!in)
        return fail(error, ENOMEM, FL_SIDE_NONE, guest, q->cluster_size, "no memory to read a compressed cluster of image '%s'", q->image.name);
    int rc = io_read_metadata(&q->io, in, length, offset, error);
    if (rc == 0 && (rc = codec_inflate(q->header.compression, in, length, buffer, q->cluster_size)) < 0) {
        if (rc == -FL_EFORMAT)
            rc = codec_require(q->header.compression, q->image.name, error);
        else
            rc = fail(error, -rc, FL_SIDE_NONE, guest, q->cluster_size, "cannot decompress the cluster at %llu of image '%s': its data is damaged",
                      (unsigned long long)guest, q->image.name);
    }
    free(in);
    return rc;
}

/* One cluster, which does get smaller. */
static int write_one(struct qcow2 *q, uint64_t cluster, const void *data, size_t length, fl_error *error)
{
    struct claim claim;
    uint64_t old, new, at;
    bool ours;
    int rc = commit_if_due(q, error);
    if (rc < 0)
        return rc;
    claim_take(q, &claim, cluster, 1);
    rc = map_entries(q, cluster, 1, &old, &ours, error);
    if (rc == 0)
        rc = alloc_bytes(q, length, &at, error);
    if (rc < 0)
        goto out;
    if (at >> offset_bits(q))
        rc = fail(error, EFBIG, FL_SIDE_NONE, cluster << q->cluster_bits, q->cluster_size, "image '%s' is too large for compressed clusters",
                  q->image.name);
    if (rc == 0)
        rc = io_write_metadata(&q->io, data, length, at, error);
    if (rc == 0) {
        uint64_t more = (align_up(at + length, 512) - align_down(at, 512)) / 512 - 1;
        new = ENTRY_COMPRESSED | more << offset_bits(q) | at;
        io_reaches(&q->io, at + length);
        rc = map_change(q, cluster, 1, &old, &new, error);
    }
    if (rc < 0)
        alloc_undo_bytes(q, at, length);
out:
    claim_release(q, &claim);
    return rc;
}

int qcow2_write_compressed(fl_image *image, const void *buffer, size_t length, uint64_t offset, fl_error *error)
{
    struct qcow2 *q = qcow2_of(image);
    int rc = qcow2_prepare(q, error);
    if (rc == 0)
        rc = codec_require(q->header.compression, image->name, error);
    if (rc < 0)
        return rc;
    char *out = malloc(2 * q->cluster_size), *whole = out ? out + q->cluster_size : NULL;
    if (!out)
        return fail(error, ENOMEM, FL_SIDE_NONE, offset, length, "no memory to compress a cluster of image '%s'", image->name);
    for (const char *in = buffer; length > 0 && rc == 0; ) {
        size_t n = (size_t)MIN(length, q->cluster_size);
        const char *cluster = in;
        if (n < q->cluster_size) {              /* the end of the disk */
            memcpy(whole, in, n);
            memset(whole + n, 0, q->cluster_size - n);
            cluster = whole;
        }
        ssize_t smaller = codec_deflate(q->header.compression, cluster, q->cluster_size, out, q->cluster_size - 1);
        if (smaller >= 0)
            rc = write_one(q, offset >> q->cluster_bits, out, (size_t)smaller, error);
        else if (smaller == -ENOSPC)
            rc = qcow2_writev(image, &(struct iovec){ (void *)(uintptr_t)in, n }, 1, offset, n, error);
        else
            rc = fail(error, (int)-smaller, FL_SIDE_NONE, offset, n, "cannot compress a cluster of image '%s'", image->name);
        in += n;
        offset += n;
        length -= n;
    }
    free(out);
    return rc;
}
