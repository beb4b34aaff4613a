/* header.c: the header of a qcow2 file and its extensions: read, validate, write. (Sections "Header", "Feature name table" and "Header
 * extensions" of the format.)
 *
 * Everything in the file may come from somebody who means harm. So nothing that is read here is used as a size, an offset or a count before
 * it is known to be within its limit, and whoever gets a struct header may rely on that. The order of the checks: what the image is; which
 * features it needs; then what is wrong with it; so that the message tells the most important thing.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "qcow2.h"

#define V2_LENGTH 72u
#define V3_LENGTH 104u
#define COMPRESSION_BYTE 104u

enum extension { EXT_END = 0, EXT_BACKING_FORMAT = 0xe2792aca, EXT_FEATURE_NAMES = 0x6803f857, EXT_BITMAPS = 0x23852875 };

struct feature_name { uint8_t kind, bit; char name[46]; };      /* kind: 0 incompatible, 1 compatible, 2 autoclear */

/* ---- the parser's view: the first cluster of the file ---- */

struct parser {
    struct io *io;
    const unsigned char *bytes;         /* the first cluster; zeros beyond the end of the file */
    uint64_t file_length;
    struct header header;               /* as far as it is known */
    uint32_t extensions_end;            /* they end here at the latest: at the name of the backing file, or with the cluster */
    fl_error *error;
};

static uint32_t u32_at(const struct parser *p, uint32_t offset)
{
    uint32_t value;
    memcpy(&value, p->bytes + offset, sizeof value);
    return be32toh(value);
}

static uint64_t u64_at(const struct parser *p, uint32_t offset)
{
    uint64_t value;
    memcpy(&value, p->bytes + offset, sizeof value);
    return be64toh(value);
}

#define REFUSE(p, format, ...) \
    fail((p)->error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%s' " format, (p)->io->name, ##__VA_ARGS__)

/* ---- the fields, in the order in which they are checked ---- */

/* What the rest depends on: magic, version, cluster size, length of the header. `fixed` bytes are there. */
static int read_shape(struct parser *p, uint64_t fixed)
{
    struct header *h = &p->header;
    if (fixed < V2_LENGTH)
        return REFUSE(p, "is not a qcow2 image: it has %" PRIu64 " bytes, fewer than a header", fixed);
    if (u32_at(p, 0) != QCOW2_MAGIC)
        return REFUSE(p, "is not a qcow2 image: it begins with %02x%02x%02x%02x, not with 514649fb ('QFI' and 0xfb)",
                      p->bytes[0], p->bytes[1], p->bytes[2], p->bytes[3]);
    h->version = u32_at(p, 4);
    if (h->version != 2 && h->version != 3)
        return REFUSE(p, "has version %" PRIu32 " of the qcow2 format; versions 2 and 3 are supported", h->version);
    h->cluster_bits = u32_at(p, 20);
    if (h->cluster_bits < MIN_CLUSTER_BITS || h->cluster_bits > MAX_CLUSTER_BITS)
        return REFUSE(p, "is damaged or not supported: cluster_bits is %" PRIu32 "; %d (512 bytes) to %d (2 MiB) are possible",
                      h->cluster_bits, MIN_CLUSTER_BITS, MAX_CLUSTER_BITS);
    h->header_length = V2_LENGTH;
    if (h->version == 2)
        return 0;
    if (fixed < V3_LENGTH)
        return REFUSE(p, "is damaged: it has %" PRIu64 " bytes, fewer than the header of version 3", fixed);
    h->header_length = u32_at(p, 100);
    if (h->header_length < V3_LENGTH || h->header_length > header_cluster_size(h))
        return REFUSE(p, "is damaged: header_length is %" PRIu32 "; 104 to the cluster size, %" PRIu64 ", are possible",
                      h->header_length, header_cluster_size(h));
    return 0;
}

/* The next extension at *at: its type, and where its data is. EXT_END at the end. Moves on. 0 or -FL_EFORMAT. */
static int next_extension(struct parser *p, uint32_t *at, uint32_t *type, uint32_t *data, uint32_t *length)
{
    *type = EXT_END;
    if (p->extensions_end - *at < 8)
        return 0;
    *type = u32_at(p, *at);
    *length = u32_at(p, *at + 4);
    *data = *at + 8;
    if (*type == EXT_END)
        return 0;
    if (*length > p->extensions_end - *data)
        return REFUSE(p, "is damaged: header extension 0x%08" PRIx32 " at %" PRIu32 " claims %" PRIu32 " bytes, %" PRIu32 " are left in "
                      "the header's cluster", *type, *at, *length, p->extensions_end - *data);
    *at = *data + MIN((*length + 7) & ~7u, p->extensions_end - *data);
    return 0;
}

/* The name that the file gives to a feature, or "". Best effort: the extensions are validated later. */
static void feature_name(struct parser *p, uint8_t kind, unsigned bit, char name[47])
{
    struct parser quiet = *p;
    uint32_t at = p->header.header_length, type, data, length;
    quiet.error = NULL;
    *name = '\0';
    while (next_extension(&quiet, &at, &type, &data, &length) == 0 && type != EXT_END) {
        if (type != EXT_FEATURE_NAMES)
            continue;
        for (uint32_t i = 0; i + sizeof(struct feature_name) <= length; i += sizeof(struct feature_name)) {
            const struct feature_name *f = (const void *)(p->bytes + data + i);
            if (f->kind != kind || f->bit != bit)
                continue;
            memcpy(name, f->name, sizeof f->name);
            name[sizeof f->name] = '\0';
            for (char *c = name; *c; c++)
                if (*c < ' ' || *c > '~' || *c == '\'')
                    *c = '?';
        }
    }
}

static int refuse_unknown_features(struct parser *p, uint64_t unknown)
{
    char list[200] = "";
    size_t used = 0;
    for (unsigned bit = 0; bit < 64; bit++) {
        char name[47];
        if (!(unknown >> bit & 1))
            continue;
        feature_name(p, 0, bit, name);
        int n = snprintf(list + used, sizeof list - used, "%sbit %u%s%s%s", used ? ", " : "", bit, *name ? " ('" : "", name,
                         *name ? "')" : "");
        if (n < 0 || (size_t)n >= sizeof list - used) {         /* enough of them */
            strcpy(list + MIN(used, sizeof list - 5), " ...");
            break;
        }
        used += (size_t)n;
    }
    return REFUSE(p, "needs incompatible features that are not known here: %s", list);
}

static int read_features(struct parser *p)
{
    const uint64_t known = INCOMPAT_DIRTY | INCOMPAT_CORRUPT | INCOMPAT_DATA_FILE | INCOMPAT_COMPRESSION | INCOMPAT_EXTENDED_L2;
    struct header *h = &p->header;
    uint32_t crypt = u32_at(p, 32);
    if (h->version >= 3) {
        h->incompatible = u64_at(p, 72);
        h->compatible = u64_at(p, 80);
        h->autoclear = u64_at(p, 88);
    }
    if (h->incompatible & ~known)
        return refuse_unknown_features(p, h->incompatible & ~known);
    if (h->incompatible & INCOMPAT_DATA_FILE)
        return REFUSE(p, "keeps its data in an external file (incompatible feature bit 2), which is not supported: convert it with "
                      "qemu-img");
    if (h->incompatible & INCOMPAT_EXTENDED_L2)
        return REFUSE(p, "has extended L2 entries, for subclusters (incompatible feature bit 4), which are not supported: convert it with "
                      "qemu-img convert -O qcow2 -o extended_l2=off");
    if (crypt != 0)
        return REFUSE(p, "is encrypted (crypt_method %" PRIu32 "%s), which is not supported: convert it with qemu-img", crypt,
                      crypt == 1 ? ", AES" : crypt == 2 ? ", LUKS" : "");

    uint8_t type = h->version >= 3 && h->header_length > COMPRESSION_BYTE ? p->bytes[COMPRESSION_BYTE] : 0;
    bool flagged = h->incompatible & INCOMPAT_COMPRESSION;
    if (flagged && type == 0)
        return REFUSE(p, "is damaged: it has the compression type feature (incompatible feature bit 3) and no compression type but zlib");
    if (!flagged && type != 0)
        return REFUSE(p, "is damaged: it has compression type %u without the feature for it (incompatible feature bit 3)", type);
    if (type > COMPRESSION_ZSTD)
        return REFUSE(p, "has compression type %u, which is not known; 0 (zlib) and 1 (zstd) are", type);
    h->compression = type;
    return 0;
}

/* A table of `entries` times `size` bytes at `offset`: within `max` bytes, inside 63 bits, aligned to clusters, and not the header. */
static int check_table(struct parser *p, const char *what, uint64_t offset, uint64_t entries, uint64_t size, uint64_t max)
{
    if (entries > max / size)
        return REFUSE(p, "is damaged or not supported: its %s has %" PRIu64 " entries; %" PRIu64 " are possible", what, entries,
                      max / size);
    if ((uint64_t)INT64_MAX - entries * size < offset)
        return REFUSE(p, "is damaged: its %s ends beyond 2^63 bytes", what);
    if (offset & (header_cluster_size(&p->header) - 1))
        return REFUSE(p, "is damaged: its %s is at %" PRIu64 ", which is not the start of a cluster", what, offset);
    if (offset == 0)
        return REFUSE(p, "is damaged: its %s is at 0, where the header is", what);
    return 0;
}

/* The tables without which nothing can be read are in the file: what is beyond its end would read as zeros, and the disk as empty. */
static int check_inside(struct parser *p, const char *what, uint64_t offset, uint64_t length)
{
    if (in_range(length, offset, p->file_length))
        return 0;
    return REFUSE(p, "is damaged: its %s, %" PRIu64 " bytes at %" PRIu64 ", ends beyond the file, %" PRIu64 ": was that truncated?",
                  what, length, offset, p->file_length);
}

static int read_tables(struct parser *p)
{
    struct header *h = &p->header;
    const uint64_t cluster = header_cluster_size(h);
    int rc;
    h->refcount_order = h->version >= 3 ? u32_at(p, 96) : 4;
    h->size = u64_at(p, 24);
    h->l1_size = u32_at(p, 36);
    h->l1_offset = u64_at(p, 40);
    h->reftable_offset = u64_at(p, 48);
    h->reftable_clusters = u32_at(p, 56);
    h->snapshot_count = u32_at(p, 60);
    h->snapshots_offset = u64_at(p, 64);
    if (h->refcount_order > 6)
        return REFUSE(p, "is damaged or not supported: refcount_order is %" PRIu32 "; 0 to 6 (refcounts of 1 to 64 bits) are possible",
                      h->refcount_order);
    if (h->size > (uint64_t)INT64_MAX)
        return REFUSE(p, "is damaged or not supported: its disk has %" PRIu64 " bytes; 2^63 - 1 is the most", h->size);

    const uint64_t needed = div_up(h->size, cluster << l2_bits(h));
    if (needed > MAX_L1_BYTES / 8)
        return REFUSE(p, "is damaged or not supported: its disk has %" PRIu64 " bytes, more than an L1 table of 32 MiB can map in "
                      "clusters of %" PRIu64, h->size, cluster);
    if (h->l1_size > 0 && (rc = check_table(p, "L1 table", h->l1_offset, h->l1_size, 8, MAX_L1_BYTES)) < 0)
        return rc;
    if (h->l1_size > 0 && (rc = check_inside(p, "L1 table", h->l1_offset, h->l1_size * UINT64_C(8))) < 0)
        return rc;
    if (h->l1_size < needed)
        return REFUSE(p, "is damaged: its L1 table has %" PRIu32 " entries, and a disk of %" PRIu64 " bytes needs %" PRIu64, h->l1_size,
                      h->size, needed);

    if (h->reftable_clusters == 0)
        return REFUSE(p, "is damaged: it has no refcount table (refcount_table_clusters is 0)");
    if ((rc = check_table(p, "refcount table", h->reftable_offset, (uint64_t)h->reftable_clusters << (h->cluster_bits - 3), 8,
                          MAX_REFTABLE_BYTES)) < 0)
        return rc;
    if ((rc = check_inside(p, "refcount table", h->reftable_offset, (uint64_t)h->reftable_clusters << h->cluster_bits)) < 0)
        return rc;

    if (h->snapshot_count > MAX_SNAPSHOTS_IN_FILE)
        return REFUSE(p, "is damaged or not supported: it has %" PRIu32 " internal snapshots; %u is the most", h->snapshot_count,
                      MAX_SNAPSHOTS_IN_FILE);
    if (h->snapshot_count > 0)
        return check_table(p, "snapshot table", h->snapshots_offset, h->snapshot_count, 40, MAX_SNAPSHOT_TABLE_BYTES);
    return 0;
}

/* Where the name of the backing file is: between the header and the end of its cluster (which is in the file, as are the tables). */
static int read_backing(struct parser *p)
{
    struct header *h = &p->header;
    uint64_t offset = u64_at(p, 8);
    uint32_t length = u32_at(p, 16), cluster = (uint32_t)header_cluster_size(h);
    p->extensions_end = cluster;
    if (offset == 0)
        return 0;
    if (offset < h->header_length || offset >= cluster)
        return REFUSE(p, "is damaged: backing_file_offset is %" PRIu64 ", which is not between the header and the end of its cluster",
                      offset);
    if (length > MAX_BACKING_NAME || length > cluster - offset)
        return REFUSE(p, "is damaged: backing_file_size is %" PRIu32 "; up to %u, inside of the first cluster, are possible", length,
                      MAX_BACKING_NAME);
    if (memchr(p->bytes + offset, '\0', length))
        return REFUSE(p, "is damaged: the name of its backing file, of %" PRIu32 " bytes, contains a null character", length);
    memcpy(h->backing, p->bytes + offset, length);
    h->backing_offset = offset;
    h->backing_length = length;
    p->extensions_end = (uint32_t)offset;
    return 0;
}

/* ---- extensions ---- */

static int read_backing_format(struct parser *p, uint32_t data, uint32_t length)
{
    struct header *h = &p->header;
    if (length >= sizeof h->backing_format)
        return REFUSE(p, "is damaged: the format of its backing file has a name of %" PRIu32 " bytes; %zu is the most", length,
                      sizeof h->backing_format - 1);
    memset(h->backing_format, 0, sizeof h->backing_format);
    memcpy(h->backing_format, p->bytes + data, length);
    return 0;
}

/* Without its autoclear bit it is void: somebody who does not know bitmaps wrote the image. */
static int read_bitmaps(struct parser *p, uint32_t data, uint32_t length)
{
    struct header *h = &p->header;
    h->bitmap_extension_offset = data;
    if (!(h->autoclear & AUTOCLEAR_BITMAPS))
        return 0;
    if (length != 24)
        return REFUSE(p, "is damaged: its bitmaps extension has %" PRIu32 " bytes, not 24", length);
    uint32_t count = u32_at(p, data), reserved = u32_at(p, data + 4);
    uint64_t size = u64_at(p, data + 8), offset = u64_at(p, data + 16);
    if (reserved != 0)
        return REFUSE(p, "is damaged: a reserved field of its bitmaps extension is %" PRIu32 ", not 0", reserved);
    if (count == 0 || count > MAX_BITMAPS)
        return REFUSE(p, "is damaged or not supported: its bitmaps extension claims %" PRIu32 " bitmaps; 1 to %u are possible", count,
                      MAX_BITMAPS);
    if (size == 0)
        return REFUSE(p, "is damaged: its directory of %" PRIu32 " bitmaps has no bytes", count);
    int rc = check_table(p, "directory of bitmaps", offset, size, 1, MAX_BITMAP_DIRECTORY_BYTES);
    if (rc < 0)
        return rc;
    h->bitmap_count = count;
    h->bitmap_directory_offset = offset;
    h->bitmap_directory_size = size;
    return 0;
}

static int read_extensions(struct parser *p)
{
    uint32_t at = p->header.header_length, type, data = 0, length = 0;
    int rc;
    while ((rc = next_extension(p, &at, &type, &data, &length)) == 0 && type != EXT_END) {
        if (type == EXT_BACKING_FORMAT)
            rc = read_backing_format(p, data, length);
        else if (type == EXT_BITMAPS)
            rc = read_bitmaps(p, data, length);
        if (rc < 0)
            return rc;
    }
    return rc;
}

/* ---- no table is inside of another one ---- */

static int check_overlaps(struct parser *p)
{
    const struct header *h = &p->header;
    const uint64_t cluster = header_cluster_size(h);
    const struct area { const char *what; uint64_t offset, length; } areas[] = {
        { "header", 0, cluster },
        { "L1 table", h->l1_offset, h->l1_size * UINT64_C(8) },
        { "refcount table", h->reftable_offset, h->reftable_clusters * cluster },
        { "snapshot table", h->snapshots_offset, h->snapshot_count * UINT64_C(40) },
        { "directory of bitmaps", h->bitmap_directory_offset, h->bitmap_directory_size },
    };
    const size_t count = sizeof areas / sizeof *areas;
    for (size_t i = 0; i < count; i++) {
        for (size_t j = i + 1; j < count; j++) {
            const struct area *a = &areas[i], *b = &areas[j];
            if (a->length && b->length && a->offset < b->offset + b->length && b->offset < a->offset + a->length)
                return REFUSE(p, "is damaged: its %s and its %s overlap, at %" PRIu64, a->what, b->what, MAX(a->offset, b->offset));
        }
    }
    return 0;
}

/* ---- the calls ---- */

int header_read(struct io *io, struct header *header, fl_error *error)
{
    unsigned char first[V3_LENGTH];
    struct parser p = { .io = io, .bytes = first, .file_length = io_length(io), .error = error };
    unsigned char *cluster = NULL;
    int rc = io_read_metadata(io, first, sizeof first, 0, error);
    if (rc == 0)
        rc = read_shape(&p, MIN(p.file_length, sizeof first));
    if (rc < 0)
        return rc;
    const size_t length = (size_t)header_cluster_size(&p.header);
    cluster = malloc(length);
    if (!cluster)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for the header of image '%s'", io->name);
    p.bytes = cluster;
    p.extensions_end = (uint32_t)length;        /* until read_backing knows better */
    rc = io_read_metadata(io, cluster, length, 0, error);
    if (rc == 0)
        rc = read_features(&p);
    if (rc == 0)
        rc = read_tables(&p);
    if (rc == 0)
        rc = read_backing(&p);
    if (rc == 0)
        rc = read_extensions(&p);
    if (rc == 0)
        rc = check_overlaps(&p);
    if (rc == 0)
        *header = p.header;
    free(cluster);
    return rc;
}

int header_write(struct io *io, const struct header *h, fl_error *error)
{
    unsigned char bytes[V3_LENGTH] = { 0 };
    size_t at = 0;
#define PUT32(value) do { uint32_t v_ = htobe32(value); memcpy(bytes + at, &v_, 4); at += 4; } while (0)
#define PUT64(value) do { uint64_t v_ = htobe64(value); memcpy(bytes + at, &v_, 8); at += 8; } while (0)
    PUT32(QCOW2_MAGIC);
    PUT32(h->version);
    PUT64(h->backing_offset);
    PUT32(h->backing_length);
    PUT32(h->cluster_bits);
    PUT64(h->size);
    PUT32(0);                                   /* crypt_method */
    PUT32(h->l1_size);
    PUT64(h->l1_offset);
    PUT64(h->reftable_offset);
    PUT32(h->reftable_clusters);
    PUT32(h->snapshot_count);
    PUT64(h->snapshots_offset);
    if (h->version >= 3) {
        PUT64(h->incompatible);
        PUT64(h->compatible);
        PUT64(h->autoclear);
        PUT32(h->refcount_order);
        PUT32(h->header_length);
    }
    return io_write_metadata(io, bytes, at, 0, error);
}

void header_info(const struct header *h, fl_image_info *info)
{
    info->version = h->version;
    info->refcount_bits = 1u << h->refcount_order;
    info->dirty = !!(h->incompatible & INCOMPAT_DIRTY);
    info->corrupt = !!(h->incompatible & INCOMPAT_CORRUPT);
    info->lazy_refcounts = !!(h->compatible & COMPAT_LAZY_REFCOUNTS);
    info->snapshots = h->snapshot_count;
    info->bitmaps = h->bitmap_count;
    snprintf(info->compression, sizeof info->compression, "%s", codec_name(h->compression));
    snprintf(info->backing, sizeof info->backing, "%s", h->backing);
    snprintf(info->backing_format, sizeof info->backing_format, "%s", h->backing_format);
}
