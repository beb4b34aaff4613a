/* loops.c: many calls of one kind with nothing of Python in between, for bench/test_part_*.py to time.
 *
 * Built as a shared library together with the bitmap's source. The disk is one of the Python extension, and so is the function that
 * writes to it: these loops only call it. What can fail returns the first failure.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "../csrc/bitmap.h"
#include "../csrc/fleece.h"

typedef int pwrite_call(fl_disk *disk, const void *buffer, size_t count, uint64_t offset, fl_error *error);

int loop_pwrite(int fd, const char *data, size_t size, const uint64_t *offsets, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (pwrite(fd, data, size, (off_t)offsets[i]) != (ssize_t)size)
            return -errno;
    return 0;
}

int loop_disk_pwrite(pwrite_call *write_to, fl_disk *disk, const char *data, size_t size, const uint64_t *offsets, size_t count)
{
    fl_error error;
    for (size_t i = 0; i < count; i++) {
        int rc = write_to(disk, data, size, offsets[i], &error);
        if (rc)
            return rc;
    }
    return 0;
}

struct bitmap *loop_bitmap_new(uint64_t bits)
{
    struct bitmap *bitmap = calloc(1, sizeof *bitmap);
    if (bitmap && bitmap_init(bitmap, bits)) {
        free(bitmap);
        return NULL;
    }
    return bitmap;
}

void loop_bitmap_free(struct bitmap *bitmap)
{
    bitmap_destroy(bitmap);
    free(bitmap);
}

void loop_bitmap_set(struct bitmap *bitmap, const uint64_t *bits, size_t count)
{
    for (size_t i = 0; i < count; i++)
        bitmap_fetch_or(bitmap, bits[i] >> 6, UINT64_C(1) << (bits[i] & 63));
}

void loop_bitmap_set_range(struct bitmap *bitmap, uint64_t first, uint64_t length)
{
    bitmap_set(bitmap, first, length);
}

void loop_bitmap_clear(struct bitmap *bitmap, const uint64_t *bits, size_t count)
{
    for (size_t i = 0; i < count; i++)
        bitmap_clear(bitmap, bits[i], 1);
}

uint64_t loop_bitmap_test(struct bitmap *bitmap, const uint64_t *bits, size_t count)
{
    uint64_t set = 0;
    for (size_t i = 0; i < count; i++)
        set += bitmap_test(bitmap, bits[i]);
    return set;
}

/* How many runs of set bits there are, each found by its beginning and its end. */
uint64_t loop_bitmap_runs(struct bitmap *bitmap)
{
    uint64_t runs = 0;
    for (uint64_t at = 0; (at = bitmap_next_set(bitmap, at, bitmap->bits)) < bitmap->bits; runs++)
        at = bitmap_next_clear(bitmap, at, bitmap->bits);
    return runs;
}

uint64_t loop_bitmap_count(struct bitmap *bitmap) { return bitmap_count(bitmap); }
void loop_bitmap_merge(struct bitmap *to, struct bitmap *from) { bitmap_merge(to, from); }
