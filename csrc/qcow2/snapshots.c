/* snapshots.c: the table of internal snapshots (section "Snapshots"). They are listed, and counted by the check; their clusters are safe
 * from writes by their refcounts alone, so nothing else needs the table.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2.h"

#define FIXED 40u                       /* bytes of an entry before its extra data */
#define MAX_EXTRA 1024u                 /* what is known takes 24; QEMU refuses more than this too */

static uint16_t u16_at(const unsigned char *p) { uint16_t v; memcpy(&v, p, 2); return be16toh(v); }
static uint32_t u32_at(const unsigned char *p) { uint32_t v; memcpy(&v, p, 4); return be32toh(v); }
static uint64_t u64_at(const unsigned char *p) { uint64_t v; memcpy(&v, p, 8); return be64toh(v); }

#define REFUSE(format, ...) \
    fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%s' is damaged: internal snapshot %zu " format, io->name, index, __VA_ARGS__)

static void copy_text(char *to, size_t room, const unsigned char *from, size_t length)
{
    size_t n = MIN(length, room - 1);
    memcpy(to, from, n);
    to[n] = '\0';
}

/* The entry at *offset; moves on. `memory` is room for one. */
static int read_entry(struct io *io, const struct header *h, size_t index, uint64_t *offset, unsigned char *memory,
                      struct snapshot_entry *entry, fl_error *error)
{
    int rc = io_read_metadata(io, memory, FIXED, *offset, error);
    if (rc < 0)
        return rc;
    const uint32_t extra = u32_at(memory + 36), id = u16_at(memory + 12), name = u16_at(memory + 14);
    *entry = (struct snapshot_entry){ .l1_offset = u64_at(memory), .l1_size = u32_at(memory + 8) };
    if (extra > MAX_EXTRA)
        return REFUSE("has %" PRIu32 " bytes of extra data; %u are the most", extra, MAX_EXTRA);
    if (entry->l1_size > MAX_L1_BYTES / 8)
        return REFUSE("has an L1 table of %" PRIu32 " entries; %" PRIu64 " are the most", entry->l1_size, MAX_L1_BYTES / 8);
    if (entry->l1_size > 0 && (entry->l1_offset == 0 || entry->l1_offset & (header_cluster_size(h) - 1) ||
                               entry->l1_offset > INT64_MAX - MAX_L1_BYTES))
        return REFUSE("has its L1 table at %" PRIu64 ", where none can be", entry->l1_offset);

    const unsigned char *data = memory + FIXED;
    const uint64_t length = FIXED + extra + id + name, padded = align_up(length, 8);
    fl_internal_snapshot *about = &entry->about;
    rc = io_read_metadata(io, memory + FIXED, length - FIXED, *offset + FIXED, error);
    if (rc < 0)
        return rc;
    about->date_ns = u32_at(memory + 16) * UINT64_C(1000000000) + u32_at(memory + 20);
    about->vm_clock_ns = u64_at(memory + 24);
    about->vm_state_size = extra >= 8 ? u64_at(data) : u32_at(memory + 32);
    about->size = extra >= 16 ? u64_at(data + 8) : 0;
    about->icount = extra >= 24 ? u64_at(data + 16) : UINT64_MAX;
    copy_text(about->id, sizeof about->id, data + extra, id);
    copy_text(about->name, sizeof about->name, data + extra + id, name);
    *offset += padded;
    return 0;
}

int snapshots_load(struct io *io, const struct header *h, struct snapshot_table *table, fl_error *error)
{
    const uint64_t end = io_length(io);
    unsigned char *memory = malloc(FIXED + MAX_EXTRA + 2 * UINT16_MAX);
    struct snapshot_table made = { 0 };
    uint64_t offset = h->snapshots_offset;
    size_t room = 0;
    int rc = 0;
    if (!memory)
        goto no_memory;
    for (size_t index = 0; index < h->snapshot_count && rc == 0; index++) {
        if (offset >= end || end - offset < FIXED) {
            rc = REFUSE("is at %" PRIu64 ", beyond the end of the file", offset);
            break;
        }
        if (index == room) {            /* grows with what is really there, whatever the header claims */
            room = MAX(16, room * 2);
            struct snapshot_entry *entries = realloc(made.entries, room * sizeof *entries);
            if (!entries)
                goto no_memory;
            made.entries = entries;
        }
        rc = read_entry(io, h, index, &offset, memory, &made.entries[index], error);
        made.bytes = offset - h->snapshots_offset;
        if (rc == 0 && made.bytes > MAX_SNAPSHOT_TABLE_BYTES)
            rc = REFUSE("ends beyond %" PRIu64 " bytes of the table, the most that is supported", MAX_SNAPSHOT_TABLE_BYTES);
        made.count = index + 1;
    }
    free(memory);
    if (rc == 0)
        *table = made;
    else
        snapshots_free(&made);
    return rc;
no_memory:
    free(memory);
    snapshots_free(&made);
    return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for the internal snapshots of image '%s'", io->name);
}

void snapshots_free(struct snapshot_table *table)
{
    free(table->entries);
    *table = (struct snapshot_table){ 0 };
}

int snapshots_list(struct io *io, const struct header *h, size_t first, fl_internal_snapshot *out, size_t max, size_t *found,
                   fl_error *error)
{
    struct snapshot_table table;
    int rc = snapshots_load(io, h, &table, error);
    if (rc < 0)
        return rc;
    size_t n = first < table.count ? MIN(max, table.count - first) : 0;
    for (size_t i = 0; i < n; i++)
        out[i] = table.entries[first + i].about;
    *found = n;
    snapshots_free(&table);
    return 0;
}
