/* bitmaps.c: the directory of persistent dirty bitmaps (section "Bitmaps extension"): parsed, validated, listed.
 *
 * The bitmaps themselves are neither loaded nor kept up to date here. Whoever writes the image without doing so makes the extension void
 * before the first write, by its autoclear bit; header_read then finds none.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2.h"

#define FIXED 24u                       /* bytes of an entry before its extra data */
#define MAX_NAME 1023u
#define MIN_GRANULARITY_BITS 9
#define MAX_GRANULARITY_BITS 31
#define TYPE_DIRTY_TRACKING 1

static uint16_t u16_at(const unsigned char *p) { uint16_t v; memcpy(&v, p, 2); return be16toh(v); }
static uint32_t u32_at(const unsigned char *p) { uint32_t v; memcpy(&v, p, 4); return be32toh(v); }
static uint64_t u64_at(const unsigned char *p) { uint64_t v; memcpy(&v, p, 8); return be64toh(v); }

#define REFUSE(format, ...) \
    fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%s' is damaged: dirty bitmap %zu " format, io->name, index, __VA_ARGS__)

/* Where the bits of a bitmap are: one entry for each cluster of them. */
static int check_bits(struct io *io, const struct header *h, size_t index, const struct bitmap_entry *entry, fl_error *error)
{
    const uint64_t cluster = header_cluster_size(h), bits = div_up(h->size, UINT64_C(1) << entry->granularity_bits);
    const uint64_t needed = div_up(div_up(bits, 8), cluster);
    if (entry->table_size == 0 && needed == 0)
        return 0;
    if (entry->table_offset == 0 || entry->table_offset & (cluster - 1))
        return REFUSE("has its table at %" PRIu64 ", where none can be", entry->table_offset);
    /* An image that grew may have one that is too short, if it was not in use then: whoever reads the bits must know. */
    if (entry->table_size > MAX_L1_BYTES / 8)
        return REFUSE("has a table of %" PRIu32 " entries; %" PRIu64 " are the most", entry->table_size, MAX_L1_BYTES / 8);
    if (!in_range(entry->table_size * UINT64_C(8), entry->table_offset, io_length(io)))
        return REFUSE("has its table, of %" PRIu32 " entries at %" PRIu64 ", beyond the end of the file", entry->table_size,
                      entry->table_offset);
    if (entry->table_size != needed && !(entry->flags & BITMAP_IN_USE))
        return REFUSE("has a table of %" PRIu32 " entries; a disk of %" PRIu64 " bytes needs %" PRIu64, entry->table_size, h->size, needed);
    return 0;
}

/* The entry at the front of `left` bytes. *used: how many it takes. */
static int parse_entry(struct io *io, const struct header *h, size_t index, const unsigned char *bytes, uint64_t left,
                       struct bitmap_entry *entry, uint64_t *used, fl_error *error)
{
    if (left < FIXED)
        return REFUSE("is beyond the end of the directory, %" PRIu64 " bytes", h->bitmap_directory_size);
    const uint32_t name = u16_at(bytes + 18), extra = u32_at(bytes + 20);
    const uint8_t type = bytes[16];
    *entry = (struct bitmap_entry){
        .table_offset = u64_at(bytes), .table_size = u32_at(bytes + 8), .flags = u32_at(bytes + 12), .granularity_bits = bytes[17],
    };
    *used = align_up(UINT64_C(0) + FIXED + extra + name, 8);
    if (*used > left)
        return REFUSE("has %" PRIu32 " bytes of extra data and a name of %" PRIu32 ", more than the directory", extra, name);
    if (name == 0 || name > MAX_NAME)
        return REFUSE("has a name of %" PRIu32 " bytes; 1 to %u are possible", name, MAX_NAME);
    if (memchr(bytes + FIXED + extra, '\0', name))
        return REFUSE("has a null character in its name, of %" PRIu32 " bytes", name);
    if (entry->flags & ~(uint32_t)(BITMAP_IN_USE | BITMAP_AUTO | BITMAP_EXTRA_COMPATIBLE))
        return REFUSE("has flags that are not known: %#" PRIx32, entry->flags);
    if (type != TYPE_DIRTY_TRACKING)
        return REFUSE("has type %u, which is not known; 1 (dirty tracking) is", type);
    if (entry->granularity_bits < MIN_GRANULARITY_BITS || entry->granularity_bits > MAX_GRANULARITY_BITS)
        return REFUSE("has a granularity of 2^%u bytes; 2^%d to 2^%d are possible", entry->granularity_bits, MIN_GRANULARITY_BITS,
                      MAX_GRANULARITY_BITS);
    memcpy(entry->about.name, bytes + FIXED + extra, name);
    entry->about.granularity = UINT64_C(1) << entry->granularity_bits;
    entry->about.in_use = !!(entry->flags & BITMAP_IN_USE);
    entry->about.enabled = !!(entry->flags & BITMAP_AUTO);
    entry->about.extra = extra != 0;
    return check_bits(io, h, index, entry, error);
}

static int parse(struct io *io, const struct header *h, const unsigned char *bytes, struct bitmap_directory *directory, fl_error *error)
{
    uint64_t at = 0, used = 0;
    size_t room = 0;
    int rc = 0;
    for (size_t index = 0; index < h->bitmap_count && rc == 0; index++) {
        if (index == room) {            /* grows with what is really there, whatever the header claims */
            room = MAX(16, room * 2);
            struct bitmap_entry *entries = realloc(directory->entries, room * sizeof *entries);
            if (!entries)
                return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for the dirty bitmaps of image '%s'", io->name);
            directory->entries = entries;
        }
        rc = parse_entry(io, h, index, bytes + at, h->bitmap_directory_size - at, &directory->entries[index], &used, error);
        at += used;
        directory->count = index + 1;
    }
    if (rc == 0 && at != h->bitmap_directory_size)
        rc = fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%s' is damaged: its directory of bitmaps has %" PRIu64 " bytes, and "
                  "its %" PRIu32 " bitmaps take %" PRIu64,
                  io->name, h->bitmap_directory_size, h->bitmap_count, at);
    return rc;
}

int bitmaps_load(struct io *io, const struct header *h, struct bitmap_directory *directory, fl_error *error)
{
    struct bitmap_directory made = { 0 };
    unsigned char *bytes = NULL;
    int rc = 0;
    if (h->bitmap_count == 0)
        goto out;
    if (!in_range(h->bitmap_directory_size, h->bitmap_directory_offset, io_length(io))) {
        rc = fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%s' is damaged: its directory of bitmaps, %" PRIu64 " bytes at %" PRIu64
                  ", is beyond the end of the file",
                  io->name, h->bitmap_directory_size, h->bitmap_directory_offset);
        goto out;
    }
    bytes = malloc(h->bitmap_directory_size);
    if (!bytes) {
        rc = fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for the dirty bitmaps of image '%s'", io->name);
        goto out;
    }
    rc = io_read_metadata(io, bytes, h->bitmap_directory_size, h->bitmap_directory_offset, error);
    if (rc == 0)
        rc = parse(io, h, bytes, &made, error);
out:
    free(bytes);
    if (rc == 0)
        *directory = made;
    else
        bitmaps_free(&made);
    return rc;
}

void bitmaps_free(struct bitmap_directory *directory)
{
    free(directory->entries);
    *directory = (struct bitmap_directory){ 0 };
}

int bitmaps_list(struct io *io, const struct header *h, size_t first, fl_persistent_bitmap *out, size_t max, size_t *found, fl_error *error)
{
    struct bitmap_directory directory;
    int rc = bitmaps_load(io, h, &directory, error);
    if (rc < 0)
        return rc;
    size_t n = first < directory.count ? MIN(max, directory.count - first) : 0;
    for (size_t i = 0; i < n; i++)
        out[i] = directory.entries[first + i].about;
    *found = n;
    bitmaps_free(&directory);
    return 0;
}
