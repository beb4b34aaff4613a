/* qcow2.h: what the files of the qcow2 driver share. The format is that of QEMU's docs/interop/qcow2 (in Debian's qemu source package); sections
 * are named where they matter.
 *
 *   header.c      parse, validate, write the header and its extensions        codec.c      zlib and zstd
 *   create.c      a new image                                                  snapshots.c  the table of internal snapshots
 *   backing.c     open the backing file, if that is allowed                    bitmaps.c    the directory of dirty bitmaps
 *   check.c       count all references; repair                                 (all of these know the header and the file, nothing of the caches)
 *
 *   cache.c       slices of L2 tables and refcount blocks, bounded             compressed.c compressed clusters, read and written
 *   refcount.c, allocate.c, free.c, area.c: who has which cluster of the file  map.c, extents.c  guest offset -> what is there; set entries
 *   commit.c      the one way by which metadata gets into the file             write.c      allocating writes and copy-on-write
 *   qcow2.c       opening, closing, image_ops   <- start reading here          discard.c    zero and discard
 *   bitmap_store.c  the bits of dirty bitmaps, between opening and closing
 *
 * The order of writes, and what makes it right at a crash:
 *   Q1 L2 entries and refcounts change in the caches only. commit() is the only writer of metadata; it takes copies of all that is dirty at one
 *      instant, and writes: refcount blocks; sync; refcount table; sync (if it changed); L2 slices; sync; L1 entries; sync (if any changed).
 *   Q2 An L2 entry points at a cluster only after the cluster's data (copy-on-write included) was handed to the kernel; so the sync before the L2
 *      slices makes it durable first, with the refcounts.
 *   Q3 A cluster that was freed keeps its refcount until a commit has made the entries durable that do not point at it any more, and is used
 *      again only after that, and after every transfer that had looked it up before has ended (see `epoch`). Its space is punched then too.
 *   Q4 A cluster whose entry has no COPIED bit, or that is compressed, or zero, is never overwritten in place by the guest's data.
 *   Q5 Whoever changes the mapping of a guest cluster (allocation, discard, zero) holds its claim (see `struct claim`) from before it looks at
 *      the entry until the new entry is in the cache. Transfers to clusters that are mapped already hold nothing but their epoch.
 */
#ifndef FL_QCOW2_H
#define FL_QCOW2_H

#include "../image.h"
#include "../io.h"

#define QCOW2_MAGIC UINT32_C(0x514649fb)
#define L1_RESERVED UINT64_C(0x7f000000000001ff)
#define L2_RESERVED UINT64_C(0x3f000000000001fe)
#define REFTABLE_RESERVED UINT64_C(0x1ff)
#define OFFSET_MASK UINT64_C(0x00fffffffffffe00)    /* bits 9 to 55 */
#define ENTRY_COPIED (UINT64_C(1) << 63)
#define ENTRY_COMPRESSED (UINT64_C(1) << 62)
#define ENTRY_ZERO UINT64_C(1)                      /* version 3 */

#define MIN_CLUSTER_BITS 9
#define MAX_CLUSTER_BITS 21
#define MAX_L1_BYTES (UINT64_C(32) << 20)
#define MAX_REFTABLE_BYTES (UINT64_C(8) << 20)
#define MAX_SNAPSHOTS_IN_FILE 65536u
#define MAX_SNAPSHOT_TABLE_BYTES (UINT64_C(64) << 20)
#define MAX_BITMAPS 65535u
#define MAX_BITMAP_DIRECTORY_BYTES (UINT64_C(64) << 20)
#define MAX_BACKING_NAME 1023u
#define MAX_CHAIN 64u                               /* images in a backing chain */

enum { INCOMPAT_DIRTY = 1, INCOMPAT_CORRUPT = 2, INCOMPAT_DATA_FILE = 4, INCOMPAT_COMPRESSION = 8, INCOMPAT_EXTENDED_L2 = 16 };
enum { COMPAT_LAZY_REFCOUNTS = 1 };
enum { AUTOCLEAR_BITMAPS = 1 };
enum compression { COMPRESSION_ZLIB, COMPRESSION_ZSTD };

/* The header as parsed and validated: every table is inside 63 bits, aligned, within its limit. */
struct header {
    uint32_t version, cluster_bits, refcount_order, header_length;
    uint64_t size;                                  /* of the disk */
    uint64_t l1_offset; uint32_t l1_size;           /* entries */
    uint64_t reftable_offset; uint32_t reftable_clusters;
    uint32_t snapshot_count; uint64_t snapshots_offset;
    uint64_t incompatible, compatible, autoclear;   /* of version 2: 0 */
    enum compression compression;
    uint64_t backing_offset; uint32_t backing_length;   /* where the name is, in cluster 0; 0: none */
    char backing[MAX_BACKING_NAME + 1];             /* "": none */
    char backing_format[16];                        /* from its extension; "": not given */
    uint32_t bitmap_count; uint64_t bitmap_directory_offset, bitmap_directory_size;     /* from the extension; 0 without it, or when autoclear says it is void */
    uint32_t bitmap_extension_offset;               /* of its data, in cluster 0; 0: there is no such extension, void or not */
};

static inline uint64_t header_cluster_size(const struct header *h) { return UINT64_C(1) << h->cluster_bits; }
static inline unsigned l2_bits(const struct header *h) { return h->cluster_bits - 3; }      /* log2 of the entries of an L2 table */

/* ---- header.c ---- */

/* Read and validate; writes nothing. -FL_EFORMAT names the field, feature or limit; a damaged or unsupported image leaves `header` alone. */
int header_read(struct io *io, struct header *header, fl_error *error);
/* The fixed fields, in place, in one write; not synced. The extensions, the compression type and the name of the backing file stay as they are. */
int header_write(struct io *io, const struct header *header, fl_error *error);
/* What fl_image_info_get says beyond what every image has. */
void header_info(const struct header *header, fl_image_info *info);

/* ---- create.c ---- */

/* An empty new file becomes an empty image of `size` bytes (rounded up to 512, as QEMU counts in such sectors), synced. `name`: for messages. */
int qcow2_format(struct io *io, const char *name, uint64_t size, const fl_image_options *options, fl_error *error);

/* ---- backing.c ---- */

/* The backing file that the header of the image at `path` names, read-only, if the options allow that; NULL when it names none. */
int backing_open(const struct header *header, const char *path, const fl_image_options *options, fl_image **backing, fl_error *error);

/* ---- codec.c ---- */

const char *codec_name(enum compression compression);           /* "zlib" or "zstd" */
bool codec_present(enum compression compression);               /* is it in this build? */
/* -FL_EFORMAT with a text that says what to do, when it is not. `name`: of the image. */
int codec_require(enum compression compression, const char *name, fl_error *error);
/* Exactly `out_length` bytes must come; what follows in the input is ignored. -EIO: they do not; -ENOMEM; -FL_EFORMAT: not in this build. */
int codec_inflate(enum compression compression, const void *in, size_t in_length, void *out, size_t out_length);
/* How many bytes it took, at most `max`; -ENOSPC: it needs more, or nearly as much; -ENOMEM; -FL_EFORMAT. */
ssize_t codec_deflate(enum compression compression, const void *in, size_t length, void *out, size_t max);

/* ---- snapshots.c ---- */

/* The table of internal snapshots, parsed and validated. */
struct snapshot_entry {
    uint64_t l1_offset; uint32_t l1_size;           /* entries; aligned, within the limits, inside 63 bits */
    fl_internal_snapshot about;
};
struct snapshot_table { struct snapshot_entry *entries; size_t count; uint64_t bytes; };       /* bytes: of the table in the file */

int snapshots_load(struct io *io, const struct header *header, struct snapshot_table *table, fl_error *error);
void snapshots_free(struct snapshot_table *table);
/* fl_image_snapshots */
int snapshots_list(struct io *io, const struct header *header, size_t first, fl_internal_snapshot *out, size_t max, size_t *found, fl_error *error);

/* ---- bitmaps.c ---- */

/* The directory of dirty bitmaps, parsed and validated. */
struct bitmap_entry {
    uint64_t table_offset; uint32_t table_size;     /* entries; aligned, within the limits, inside 63 bits */
    uint32_t flags;                                 /* as in the file */
    uint8_t granularity_bits;
    fl_persistent_bitmap about;
};
struct bitmap_directory { struct bitmap_entry *entries; size_t count; };

enum { BITMAP_IN_USE = 1, BITMAP_AUTO = 2, BITMAP_EXTRA_COMPATIBLE = 4 };

int bitmaps_load(struct io *io, const struct header *header, struct bitmap_directory *directory, fl_error *error);
void bitmaps_free(struct bitmap_directory *directory);
/* fl_image_bitmaps */
int bitmaps_list(struct io *io, const struct header *header, size_t first, fl_persistent_bitmap *out, size_t max, size_t *found, fl_error *error);

/* ---- check.c ---- */

/* The file's structure is checked and, by enum fl_repair, repaired; nobody else has it open. 0: it was looked at as a whole, or result->check_errors
   says that it could not be; the verdict is in `result` (NULL: of no interest). `header` follows what the repair writes; the dirty and corrupt bits
   are cleared when no corruption is left. */
int check_file(struct io *io, struct header *header, int repair, fl_check *result, fl_error *error);

#endif
