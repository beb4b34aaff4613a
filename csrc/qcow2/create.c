/* create.c: a new, empty image: always version 3 with refcounts of 16 bits.
 *
 *   cluster 0        the header, its extensions, the name of the backing file
 *   then             refcount table, refcount blocks, L1 table: each in whole clusters, one after the other; the file ends with them
 *
 * The refcount blocks cover these clusters and no more than fits; the tables grow when they must. The L1 table has its final size, for
 * growth of the disk is rare. What is zeros is not written.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2.h"

#define DEFAULT_CLUSTER_SIZE 65536u
#define REFCOUNT_ORDER 4
#define HEADER_LENGTH 112u              /* with the compression type */
#define SECTOR 512u

enum { EXT_BACKING_FORMAT = 0xe2792aca, EXT_FEATURE_NAMES = 0x6803f857 };

/* What this library may set, for readers that do not know it. */
static const struct { uint8_t kind, bit; char name[46]; } feature_names[] = {
    { 0, 0, "dirty bit" }, { 0, 1, "corrupt bit" }, { 0, 3, "compression type" }, { 1, 0, "lazy refcounts" }, { 2, 0, "bitmaps" },
};

struct plan {
    struct header header;
    uint64_t l1_clusters, blocks, clusters;         /* all clusters of the file */
};

#define INVALID(format, ...) fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "cannot make image '%s': " format, name, __VA_ARGS__)

static int plan_options(struct plan *plan, const char *name, uint64_t size, const fl_image_options *options, fl_error *error)
{
    struct header *h = &plan->header;
    const uint32_t cluster = options->cluster_size ? options->cluster_size : DEFAULT_CLUSTER_SIZE;
    if (!is_power_of_two(cluster) || cluster < 1u << MIN_CLUSTER_BITS || cluster > 1u << MAX_CLUSTER_BITS)
        return INVALID("its cluster size is %" PRIu32 ", not a power of two from 512 bytes to 2 MiB", cluster);
    if (size > (uint64_t)INT64_MAX - SECTOR)
        return fail(error, EFBIG, FL_SIDE_NONE, 0, 0, "cannot make image '%s' of %" PRIu64 " bytes: 2^63 - 513 is the most", name, size);
    h->version = 3;
    h->header_length = HEADER_LENGTH;
    h->cluster_bits = (uint32_t)__builtin_ctz(cluster);
    h->refcount_order = REFCOUNT_ORDER;
    h->size = align_up(size, SECTOR);
    const uint64_t entries = div_up(h->size, (uint64_t)cluster << l2_bits(h));
    if (entries > MAX_L1_BYTES / 8)
        return fail(error, EFBIG, FL_SIDE_NONE, 0, 0, "cannot make image '%s' of %" PRIu64 " bytes in clusters of %" PRIu32 ": %" PRIu64
                    " bytes are the most; larger clusters allow more", name, size, cluster, (MAX_L1_BYTES / 8 * cluster) << l2_bits(h));
    h->l1_size = (uint32_t)entries;

    const char *compression = options->compression ? options->compression : codec_name(COMPRESSION_ZLIB);
    if (!strcmp(compression, codec_name(COMPRESSION_ZSTD))) {
        h->compression = COMPRESSION_ZSTD;
        h->incompatible |= INCOMPAT_COMPRESSION;
    } else if (strcmp(compression, codec_name(COMPRESSION_ZLIB))) {
        return INVALID("its compression is '%.40s', neither zlib nor zstd", compression);
    }
    return options->compression ? codec_require(h->compression, name, error) : 0;
}

static int plan_backing(struct plan *plan, const char *name, const fl_image_options *options, fl_error *error)
{
    struct header *h = &plan->header;
    if (!options->backing || !*options->backing) {
        if (options->backing_format && *options->backing_format)
            return INVALID("it has a format of a backing file, '%.40s', and no backing file", options->backing_format);
        return 0;
    }
    const size_t length = strlen(options->backing);
    if (!options->backing_format || !*options->backing_format)
        return INVALID("the format of its backing file '%.100s' was not given; nothing is guessed: pass 'raw' or 'qcow2'",
                       options->backing);
    if (strcmp(options->backing_format, "raw") && strcmp(options->backing_format, "qcow2"))
        return INVALID("the format of its backing file is '%.40s', neither raw nor qcow2", options->backing_format);
    if (length > MAX_BACKING_NAME)
        return INVALID("the path of its backing file has %zu bytes; %u are the most", length, MAX_BACKING_NAME);
    memcpy(h->backing, options->backing, length + 1);
    strcpy(h->backing_format, options->backing_format);
    h->backing_length = (uint32_t)length;
    return 0;
}

/* Where everything goes. How many refcount blocks there are depends on how many clusters, and the other way round: it grows until it fits. */
static void plan_layout(struct plan *plan)
{
    struct header *h = &plan->header;
    const uint64_t cluster = header_cluster_size(h), per_block = cluster * 8 >> REFCOUNT_ORDER;
    uint64_t table = 1;
    plan->l1_clusters = div_up(h->l1_size * UINT64_C(8), cluster);
    plan->blocks = 1;
    for (;;) {
        plan->clusters = 1 + table + plan->blocks + plan->l1_clusters;
        uint64_t blocks = div_up(plan->clusters, per_block), wanted = div_up(blocks * 8, cluster);
        if (blocks <= plan->blocks && wanted <= table)
            break;
        plan->blocks = MAX(blocks, plan->blocks);
        table = MAX(wanted, table);
    }
    h->reftable_offset = cluster;
    h->reftable_clusters = (uint32_t)table;
    h->l1_offset = plan->l1_clusters ? (1 + table + plan->blocks) * cluster : 0;
}

static void put_extension(unsigned char *cluster, size_t *at, uint32_t type, const void *data, size_t length)
{
    uint32_t words[2] = { htobe32(type), htobe32((uint32_t)length) };
    memcpy(cluster + *at, words, sizeof words);
    memcpy(cluster + *at + sizeof words, data, length);
    *at += sizeof words + align_up(length, 8);
}

/* What stands behind the fixed fields, in a cluster of zeros; sets backing_offset. The features' names are left out where they don't fit. */
static int fill_first_cluster(unsigned char *cluster, struct header *h, const char *name, fl_error *error)
{
    const size_t size = header_cluster_size(h), end_mark = 8;
    const size_t format = h->backing_length ? 8 + align_up(strlen(h->backing_format), 8) : 0;
    size_t at = HEADER_LENGTH;
    cluster[104] = (unsigned char)h->compression;
    if (at + format + end_mark + h->backing_length > size)
        return INVALID("the path of its backing file has %" PRIu32 " bytes, and there is room for %zu in clusters of %zu: make them larger",
                       h->backing_length, size - at - format - end_mark, size);
    if (h->backing_length)
        put_extension(cluster, &at, EXT_BACKING_FORMAT, h->backing_format, strlen(h->backing_format));
    if (at + 8 + sizeof feature_names + end_mark + h->backing_length <= size)
        put_extension(cluster, &at, EXT_FEATURE_NAMES, feature_names, sizeof feature_names);
    at += end_mark;
    if (h->backing_length) {
        h->backing_offset = at;
        memcpy(cluster + at, h->backing, h->backing_length);
    }
    return 0;
}

/* The table and its blocks: every cluster of the file is used once. */
static int write_refcounts(struct io *io, const struct plan *plan, unsigned char *cluster, fl_error *error)
{
    const struct header *h = &plan->header;
    const uint64_t size = header_cluster_size(h), per_block = size * 8 >> REFCOUNT_ORDER;
    const uint64_t first_block = h->reftable_offset + h->reftable_clusters * size;
    for (uint64_t i = 0; i < plan->blocks; i++) {
        const uint64_t used = MIN(plan->clusters - i * per_block, per_block), offset = first_block + i * size;
        const uint16_t one = htobe16(1);
        memset(cluster, 0, size);
        for (uint64_t j = 0; j < used; j++)
            memcpy(cluster + j * 2, &one, 2);
        int rc = io_write_metadata(io, cluster, size, offset, error);
        const uint64_t entry = htobe64(offset);
        if (rc == 0)
            rc = io_write_metadata(io, &entry, sizeof entry, h->reftable_offset + i * sizeof entry, error);
        if (rc < 0)
            return rc;
    }
    return 0;
}

int qcow2_format(struct io *io, const char *name, uint64_t size, const fl_image_options *options, fl_error *error)
{
    struct plan plan = { 0 };
    struct header *h = &plan.header;
    unsigned char *cluster = NULL;
    int rc = plan_options(&plan, name, size, options, error);
    if (rc == 0)
        rc = plan_backing(&plan, name, options, error);
    if (rc < 0)
        return rc;
    plan_layout(&plan);
    cluster = malloc(header_cluster_size(h));
    if (!cluster)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for the tables of image '%s'", name);

    rc = io_set_length(io, plan.clusters << h->cluster_bits, error);
    if (rc == 0)
        rc = write_refcounts(io, &plan, cluster, error);
    if (rc == 0) {
        memset(cluster, 0, header_cluster_size(h));
        rc = fill_first_cluster(cluster, h, name, error);
    }
    if (rc == 0)
        rc = io_write_metadata(io, cluster, header_cluster_size(h), 0, error);
    if (rc == 0)
        rc = header_write(io, h, error);        /* last: before, it is no qcow2 image */
    if (rc == 0)
        rc = io_flush(io, error);
    free(cluster);
    return rc;
}
