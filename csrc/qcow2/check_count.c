/* check_count.c: visit every table of the file once, and count every reference to its clusters. See check.h.
 *
 * The order: header; active L1 table; those of the snapshots; all L2 tables; snapshot table; refcount table; bitmaps; refcount blocks,
 * which must then have one reference each.
 */
#define _GNU_SOURCE
#include "check.h"

#include <inttypes.h>
#include <stdlib.h>

#define MAX_BITMAP_BYTES (UINT64_C(512) << 20)       /* of one bitmap, as QEMU has it */

/* ---- what the bits mean ---- */

enum entry_type entry_type(uint64_t entry)
{
    if (entry & ENTRY_COMPRESSED)
        return ENTRY_IS_COMPRESSED;
    if (entry & ENTRY_ZERO)
        return entry & OFFSET_MASK ? ENTRY_ZERO_ALLOCATED : ENTRY_ZERO_PLAIN;
    return entry & OFFSET_MASK ? ENTRY_DATA : ENTRY_NONE;
}

void compressed_range(const struct header *h, uint64_t entry, uint64_t *offset, uint64_t *length)
{
    unsigned shift = 62 - (h->cluster_bits - 8);
    uint64_t sectors = (entry >> shift & ((UINT64_C(1) << (h->cluster_bits - 8)) - 1)) + 1;
    *offset = entry & ((UINT64_C(1) << shift) - 1);
    *length = sectors * 512 - (*offset & 511);
}

bool within_file(const struct checker *c, uint64_t offset, uint64_t length)
{
    uint64_t limit = c->length + cluster_size(c);           /* the last cluster may be cut short */
    return offset < limit && length < limit - offset;
}

/* ---- reading tables ---- */

/* Where `at` is: in data, or in a hole; both are long, or there are few of them, so the last answer often does. */
static int look_up_extent(struct checker *c, uint64_t at)
{
    size_t n;
    if (at >= c->extent.offset && at - c->extent.offset < c->extent.length)
        return 0;
    return io_extents(c->io, at, c->length - at, &c->extent, 1, &n, c->error);
}

/* The next stretch of [at, end) that is not a hole, beginning at a multiple of 512 if `at` does. *start == end: none. */
static int next_data(struct checker *c, uint64_t at, uint64_t end, uint64_t *start, uint64_t *stop)
{
    int rc = look_up_extent(c, at);
    while (rc == 0 && c->extent.kind == FL_ZERO) {
        uint64_t hole_end = c->extent.offset + c->extent.length, next = MAX(at, align_down(hole_end, 512));
        if (hole_end >= end)
            next = end;
        if (next == at) {                       /* the rest of a sector that begins in a hole */
            *start = at;
            *stop = MIN(end, at + 512);
            return 0;
        }
        at = next;
        if (at == end)
            break;
        rc = look_up_extent(c, at);
    }
    *start = at;
    *stop = MIN(end, align_up(c->extent.offset + c->extent.length, 512));
    return rc;
}

int visit_table(struct checker *c, uint64_t offset, uint64_t length, visit_fn *visit, void *context)
{
    uint64_t at = offset, end = offset >= c->length ? offset : MIN(offset + length, c->length), start, stop;
    int rc = check_interrupted(c);
    while (rc == 0 && at < end) {
        rc = next_data(c, at, end, &start, &stop);
        for (at = start; rc == 0 && at < stop && at < end;) {
            size_t n = (size_t)MIN(stop - at, (uint64_t)BUFFER_SIZE), padded = (size_t)align_up(n, 512);
            rc = io_read_metadata(c->io, c->buffer, padded, at, c->error);
            if (rc == 0)
                rc = visit(c, context, c->buffer, padded, at - offset);
            if (rc == 1)
                rc = io_write_metadata(c->io, c->buffer, n, at, c->error);
            at += n;                            /* rc is 0 or a failure */
        }
    }
    return rc;
}

/* Count, or find that it is outside of the file: 1, and the entry is not to be followed. */
static int count(struct checker *c, const char *what, uint64_t offset, uint64_t length, uint32_t n, uint64_t guest)
{
    if (length == 0)
        return 0;
    if (!within_file(c, offset, length)) {
        found(c, FL_FOUND_CORRUPTION, guest, offset, "%s: beyond the end of the file", what);
        c->incomplete = true;
        c->dangling_first = MIN(c->dangling_first, offset);
        c->dangling_end = MAX(c->dangling_end, offset + length);
        return 1;
    }
    return refs_add(c, offset, length, n);
}

/* The same for a table. What of it is inside of the file is in use even when its end is not. */
static int count_table(struct checker *c, const char *what, uint64_t offset, uint64_t length)
{
    int rc = count(c, what, offset, length, 1, NOWHERE);
    return rc == 1 && offset < c->length ? refs_add(c, offset, c->length - offset, 1) : MIN(rc, 0);
}

/* L1 tables and tables of bitmaps are read as often as they are named. Together they have what the file occupies, unless they overlap. */
static int spend(struct checker *c, size_t bytes)
{
    c->table_bytes += bytes;
    if (c->table_bytes <= c->table_limit)
        return 0;
    found(c, FL_FOUND_ERROR, NOWHERE, NOWHERE, "the tables of snapshots and bitmaps overlap so much that counting would not end");
    return -ELOOP;
}

static bool unaligned(const struct checker *c, uint64_t offset)
{
    return offset & (cluster_size(c) - 1);
}

/* ---- L2 tables ---- */

struct l2_visit {
    struct table table;
    uint64_t guest;                             /* of its first entry */
    const char *where;                          /* " of a snapshot", or "" */
    uint64_t expected;                          /* where the next cluster is if the disk lies in the file as it reads; 0: not known */
};

static int count_compressed(struct checker *c, struct l2_visit *v, uint64_t entry, uint64_t guest)
{
    uint64_t offset, length;
    compressed_range(c->header, entry, &offset, &length);
    if (entry & ENTRY_COPIED) {
        found(c, FL_FOUND_CORRUPTION, guest, offset, "compressed cluster%s: its COPIED bit is set", v->where);
        c->entries_damaged = true;
    }
    c->result->allocated_clusters += v->table.active;
    c->result->compressed_clusters += v->table.active;
    c->result->fragmented_clusters += v->table.active;      /* they share sectors, so reading them in a row is never sequential */
    return count(c, "compressed cluster", offset, length, v->table.total, guest);
}

static int count_cluster(struct checker *c, struct l2_visit *v, uint64_t entry, uint64_t guest)
{
    uint64_t offset = entry & OFFSET_MASK;
    bool zero = entry & ENTRY_ZERO, odd = unaligned(c, offset);
    const char *what = zero ? "cluster of zeros" : "data cluster";
    if (odd) {
        found(c, FL_FOUND_CORRUPTION, guest, offset, "%s%s: not the start of a cluster", what, v->where);
        c->incomplete = true;
    }
    c->result->allocated_clusters += v->table.active;
    if (v->expected && v->expected != offset)
        c->result->fragmented_clusters += v->table.active;
    v->expected = offset + cluster_size(c);
    int rc = count(c, what, offset, cluster_size(c), v->table.total, guest);
    c->entries_damaged |= zero && (odd || rc == 1);         /* without its cluster it reads the same */
    return rc;
}

static int count_l2(struct checker *c, void *context, unsigned char *bytes, size_t length, uint64_t at)
{
    struct l2_visit *v = context;
    for (size_t i = 0; i < length; i += 8) {
        uint64_t entry = load64(bytes + i), guest = v->guest + ((at + i) / 8 << c->header->cluster_bits);
        int rc = 0;
        if (entry == 0)
            continue;
        enum entry_type type = entry_type(entry);
        if (type != ENTRY_IS_COMPRESSED && (entry & L2_RESERVED)) {
            found(c, FL_FOUND_CORRUPTION, guest, entry & OFFSET_MASK, "L2 entry%s: reserved bits are set: %016" PRIx64, v->where, entry);
            c->entries_damaged = true;
        }
        if (type != ENTRY_IS_COMPRESSED && (entry & ENTRY_ZERO) && c->header->version < 3) {
            found(c, FL_FOUND_CORRUPTION, guest, entry & OFFSET_MASK, "L2 entry%s: a cluster of zeros, which version 2 does not have",
                  v->where);
            c->incomplete = true;
        }
        if (type == ENTRY_IS_COMPRESSED)
            rc = count_compressed(c, v, entry, guest);
        else if (type == ENTRY_DATA || type == ENTRY_ZERO_ALLOCATED)
            rc = count_cluster(c, v, entry, guest);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int count_l2_tables(struct checker *c)
{
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < c->tables.count; i++) {
        struct l2_visit v = { .table = *table_at(c, i) };
        v.guest = (uint64_t)v.table.l1_index << (l2_bits(c->header) + c->header->cluster_bits);
        v.where = v.table.active ? "" : " of a snapshot";
        rc = visit_table(c, c->tables.keys[i], cluster_size(c), count_l2, &v);
    }
    return rc;
}

/* ---- L1 tables ---- */

struct l1_visit { bool active; };

static int count_l1_entry(struct checker *c, bool active, uint64_t entry, uint64_t index)
{
    uint64_t offset = entry & OFFSET_MASK, guest = index << (l2_bits(c->header) + c->header->cluster_bits);
    const char *where = active ? "" : " of a snapshot";
    uint32_t number;
    if (entry & L1_RESERVED) {
        found(c, FL_FOUND_CORRUPTION, guest, offset, "L1 entry%s: reserved bits are set: %016" PRIx64, where, entry);
        c->entries_damaged = true;
    }
    if (offset == 0) {
        if (!(entry & L1_RESERVED))
            found(c, FL_FOUND_CORRUPTION, guest, NOWHERE, "L1 entry%s: bits are set, and there is no L2 table: %016" PRIx64, where, entry);
        c->entries_damaged = true;
        return 0;
    }
    int rc = count(c, "L2 table", offset, cluster_size(c), 1, guest);
    if (rc < 0)
        return rc;
    if (unaligned(c, offset)) {
        found(c, FL_FOUND_CORRUPTION, guest, offset, "L2 table%s: not the start of a cluster", where);
        c->incomplete = true;
        return 0;
    }
    if (rc == 1)
        return 0;
    rc = map_add(c, &c->tables, offset, &number);
    if (rc < 0)
        return rc;
    struct table *table = table_at(c, number);
    if (table->total == 0)
        table->l1_index = (uint32_t)index;
    table->total++;
    table->active += active;
    return 0;
}

static int count_l1(struct checker *c, void *context, unsigned char *bytes, size_t length, uint64_t at)
{
    const struct l1_visit *v = context;
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < length; i += 8) {
        uint64_t entry = load64(bytes + i);
        if (entry)
            rc = count_l1_entry(c, v->active, entry, (at + i) / 8);
    }
    return rc < 0 ? rc : spend(c, length);
}

/* visit_table hands out whole sectors: what is behind the table in its last one is not part of it. */
static int count_l1_table(struct checker *c, uint64_t offset, uint32_t entries, bool active)
{
    struct l1_visit v = { active };
    uint64_t bytes = entries * UINT64_C(8), whole = align_down(bytes, 512);
    unsigned char tail[512] = { 0 };
    int rc = count_table(c, active ? "L1 table" : "L1 table of a snapshot", offset, bytes);
    if (rc == 0)
        rc = visit_table(c, offset, whole, count_l1, &v);
    if (rc == 0 && bytes > whole && offset < c->length && whole < c->length - offset) {
        rc = io_read_metadata(c->io, tail, (size_t)(bytes - whole), offset + whole, c->error);
        if (rc == 0)
            rc = count_l1(c, &v, tail, sizeof tail, whole);
    }
    return rc;
}

/* ---- snapshots ---- */

/* The snapshot table: entries of 40 bytes and what they say. One that makes no sense ends the search. */
static int read_snapshots(struct checker *c)
{
    const struct header *h = c->header;
    unsigned char entry[40];
    uint64_t at = h->snapshots_offset;
    free(c->snapshots);
    c->snapshots = calloc(MAX(h->snapshot_count, 1u), sizeof *c->snapshots);
    c->snapshot_count = 0;
    if (!c->snapshots)
        return no_memory(c);
    for (uint32_t i = 0; i < h->snapshot_count; i++) {
        int rc = io_read_metadata(c->io, entry, sizeof entry, at, c->error);
        if (rc < 0)
            return rc;
        uint32_t extra = load32(entry + 36);
        at = align_up(at, 8) + sizeof entry + extra + (load32(entry + 12) >> 16) + (load32(entry + 12) & 0xffff);
        if (at - h->snapshots_offset > MAX_SNAPSHOT_TABLE_BYTES || at > c->length) {
            found(c, FL_FOUND_CORRUPTION, NOWHERE, at, "snapshot table: entry %" PRIu32 " of %" PRIu32 " ends beyond the %s", i,
                  h->snapshot_count, at > c->length ? "end of the file" : "64 MiB that a snapshot table may have");
            c->incomplete = true;
            break;
        }
        if (h->version >= 3 && extra < 16)
            found(c, FL_FOUND_CORRUPTION, NOWHERE, at, "snapshot table: entry %" PRIu32 " has %" PRIu32 " bytes of extra data, not 16 or more", i,
                  extra);
        c->snapshots[c->snapshot_count++] = (struct snapshot_l1){ load64(entry), load32(entry + 8) };
        at = align_up(at, 8);
    }
    c->snapshots_length = MIN(MAX(at - h->snapshots_offset, h->snapshot_count * UINT64_C(40)), MAX_SNAPSHOT_TABLE_BYTES);
    return 0;
}

static int count_snapshots(struct checker *c)
{
    for (uint32_t i = 0; i < c->snapshot_count; i++) {
        const struct snapshot_l1 *s = &c->snapshots[i];
        int rc = 0;
        if (s->entries == 0)
            continue;
        if (unaligned(c, s->offset) || s->entries > MAX_L1_BYTES / 8) {
            found(c, FL_FOUND_CORRUPTION, NOWHERE, s->offset, "L1 table of snapshot %" PRIu32 ": %s", i,
                  unaligned(c, s->offset) ? "not the start of a cluster" : "larger than 32 MiB");
            c->incomplete = true;
            continue;
        }
        rc = count_l1_table(c, s->offset, s->entries, false);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* ---- bitmaps ---- */

static int damaged_bitmaps(struct checker *c, uint64_t host, const char *what)
{
    found(c, FL_FOUND_CORRUPTION, NOWHERE, host, "%s", what);
    c->bitmaps_damaged = c->incomplete = true;
    return 0;
}

static int count_bitmap_table(struct checker *c, void *context, unsigned char *bytes, size_t length, uint64_t at)
{
    const uint64_t *size = context;
    for (size_t i = 0; i < length && at + i < *size; i += 8) {
        uint64_t entry = load64(bytes + i), offset = entry & OFFSET_MASK;
        if ((entry & ~OFFSET_MASK & ~UINT64_C(1)) || (offset && (entry & 1)) || unaligned(c, offset)) {
            damaged_bitmaps(c, offset, "table of a bitmap: an entry has reserved bits, or is not the start of a cluster");
        } else if (offset) {
            int rc = count(c, "cluster of a bitmap", offset, cluster_size(c), 1, NOWHERE);
            if (rc < 0)
                return rc;
            c->bitmaps_damaged |= rc == 1;
        }
    }
    return spend(c, length);
}

/* Of the clusters of a bitmap of the whole disk. */
static uint64_t bitmap_bytes(const struct header *h, unsigned granularity_bits)
{
    return align_up(div_up(div_up(h->size, UINT64_C(1) << granularity_bits), 8), header_cluster_size(h));
}

/* One entry of the directory, of which `left` bytes remain; *used is its length. */
static int count_bitmap(struct checker *c, const unsigned char *entry, uint64_t left, uint64_t host, uint64_t *used)
{
    const struct header *h = c->header;
    *used = left;
    if (left < 24)
        return damaged_bitmaps(c, host, "directory of bitmaps: it ends within an entry");
    uint64_t offset = load64(entry), size = load32(entry + 8) * UINT64_C(8);
    uint32_t flags = load32(entry + 12), name = load32(entry + 16) & 0xffff;
    uint64_t length = align_up(UINT64_C(24) + name + load32(entry + 20), 8), bytes = size / 8 << h->cluster_bits;
    if (length > left)
        return damaged_bitmaps(c, host, "directory of bitmaps: an entry is longer than what is left");
    *used = length;
    if (offset == 0 || unaligned(c, offset) || size == 0 || bytes > MAX_BITMAP_BYTES || name == 0 || name > 1023 || entry[16] != 1 ||
        entry[17] < 9 || entry[17] > 31 || (flags & ~7u) || (!(flags & BITMAP_IN_USE) && bytes != bitmap_bytes(h, entry[17])))
        return damaged_bitmaps(c, host, "directory of bitmaps: an entry makes no sense");
    int rc = count(c, "table of a bitmap", offset, size, 1, NOWHERE);
    if (rc == 0)
        return visit_table(c, offset, size, count_bitmap_table, &size);
    c->bitmaps_damaged |= rc == 1;
    return MIN(rc, 0);
}

static int count_bitmaps(struct checker *c)
{
    const struct header *h = c->header;
    uint64_t length = h->bitmap_directory_size, at = 0, used = 0;
    if (h->bitmap_count == 0)
        return 0;
    int rc = count(c, "directory of bitmaps", h->bitmap_directory_offset, length, 1, NOWHERE);
    if (rc) {
        c->bitmaps_damaged |= rc == 1;
        return MIN(rc, 0);
    }
    unsigned char *directory = malloc(length);
    if (!directory)
        return no_memory(c);
    rc = io_read_metadata(c->io, directory, length, h->bitmap_directory_offset, c->error);
    for (uint32_t i = 0; rc == 0 && i < h->bitmap_count && !(c->bitmaps_damaged && at == length); i++, at += used)
        rc = count_bitmap(c, directory + at, length - at, h->bitmap_directory_offset + at, &used);
    if (rc == 0 && at != length && !c->bitmaps_damaged)
        damaged_bitmaps(c, h->bitmap_directory_offset + at, "directory of bitmaps: it is longer than its entries");
    free(directory);
    return rc;
}

/* ---- the refcount structures ---- */

static int count_block(struct checker *c, void *context, unsigned char *bytes, size_t length, uint64_t at)
{
    (void)context;
    for (size_t i = 0; i < length; i += 8) {
        uint64_t entry = load64(bytes + i), offset = entry & ~REFTABLE_RESERVED, index = (at + i) / 8;
        const char *wrong = NULL;
        bool counted = false;
        if (entry == 0)
            continue;
        if (entry & REFTABLE_RESERVED)
            wrong = "reserved bits are set";
        else if (unaligned(c, offset))
            wrong = "not the start of a cluster";
        else if (cluster_of(c, offset) >= c->clusters)
            wrong = "beyond the end of the file";
        if (!wrong) {
            int rc = refs_add(c, offset, cluster_size(c), 1);
            if (rc < 0)
                return rc;
            counted = true;
            if (references(c, cluster_of(c, offset)) != 1)
                wrong = "something else is there too";
        }
        c->blocks[index] = (counted ? offset : 0) | (wrong ? BLOCK_UNKNOWN : 0);
        if (wrong) {
            found(c, FL_FOUND_CORRUPTION, NOWHERE, offset, "refcount block %" PRIu64 ": %s", index, wrong);
            c->rebuild = true;
        }
    }
    return 0;
}

static int count_refcount_blocks(struct checker *c)
{
    const struct header *h = c->header;
    const uint64_t length = reftable_bytes(c);
    c->block_count = length / 8;
    free(c->blocks);
    c->blocks = calloc(c->block_count, sizeof *c->blocks);
    return c->blocks ? visit_table(c, h->reftable_offset, length, count_block, NULL) : no_memory(c);
}

/* ---- all of it ---- */

int count_all(struct checker *c)
{
    const struct header *h = c->header;
    int rc = refs_add(c, 0, cluster_size(c), 1);
    if (rc == 0)
        rc = read_snapshots(c);
    if (rc == 0 && h->l1_size)
        rc = count_l1_table(c, h->l1_offset, h->l1_size, true);
    if (rc == 0)
        rc = count_snapshots(c);
    if (rc == 0)
        rc = count_l2_tables(c);
    if (rc == 0 && h->snapshot_count)
        rc = count_table(c, "snapshot table", h->snapshots_offset, c->snapshots_length);
    if (rc == 0)
        rc = count_table(c, "refcount table", h->reftable_offset, reftable_bytes(c));
    c->rebuild |= !within_file(c, h->reftable_offset, reftable_bytes(c));
    if (rc == 0)
        rc = count_bitmaps(c);
    return rc == 0 ? count_refcount_blocks(c) : rc;
}
