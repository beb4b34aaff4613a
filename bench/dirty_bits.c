/* dirty_bits.c: what a dirty bitmap adds to a 4 KiB write. The kinds of bitmaps take turns every few writes, so that whatever else the machine
 * does hits all of them alike.
 *
 *   dirty_bits FILE MIB SLICES SYNCED
 *
 * FILE is made, and removed, and so are files beside it. It is opened once for each kind, so that all write to the same pages: "none" (a disk without
 * bitmaps), "in memory", "persistent", "write-intent". A slice is 64 writes of one kind, one in each of 64 units of 64 KiB in an order that looks
 * random; then the next kind has its turn, elsewhere. Prints lines of "WHAT KIND NANOSECONDS_OF_A_WRITE", one for each slice. WHAT is:
 *   repeated    the unit is dirty already; SLICES of each kind
 *   first       it is not; as many, of the first three kinds
 *   synced      the same, of the first and the last kind, which waits for the storage; SYNCED slices, of 4 writes
 * Nobody syncs but write-intent.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../csrc/fleece.h"

#define UNIT 65536u
#define BLOCK 4096u
#define SLICE 64u

enum { NONE, MEMORY, PERSISTENT, INTENT, KINDS };
static const char *const names[KINDS] = { "none", "in-memory", "persistent", "write-intent" };
static const char *const bitmap = "daily";

struct side { fl_image *image; fl_disk *disk; char file[4096]; uint64_t next; };

static struct side sides[KINDS];
static uint32_t *order;                 /* of the units */
static uint64_t units;
static char data[1 << 20];

static void check(int rc, const char *what, const fl_error *error)
{
    if (rc) {
        fprintf(stderr, "%s: %s\n", what, error->text);
        exit(1);
    }
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void make(const char *path, uint64_t size)
{
    fl_error error;
    fl_image *image;
    fl_image_options options = { .format = "raw", .writable = 1 };
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (char)rand();
    check(fl_image_create(path, size, &options, &image, &error), "create", &error);
    for (uint64_t at = 0; at < size; at += sizeof data)         /* no write of the measurement allocates */
        check(fl_image_pwrite(image, data, sizeof data, at, &error), "fill", &error);
    check(fl_image_flush(image, &error), "flush", &error);
    fl_image_free(image);
}

static void open_side(const char *path, int kind)
{
    fl_error error;
    fl_image_options options = { .format = "raw", .writable = 1, .share = 1 };
    struct side *side = &sides[kind];
    check(fl_image_open(path, &options, &side->image, &error), "open", &error);
    check(fl_disk_open(side->image, &side->disk, &error), "disk", &error);
    if (kind == NONE)
        return;
    if (kind == MEMORY) {
        check(fl_disk_bitmap_add(side->disk, bitmap, UNIT, &error), "bitmap", &error);
        return;
    }
    snprintf(side->file, sizeof side->file, "%s.%s", path, names[kind]);
    check(fl_disk_bitmap_file(side->disk, side->file, 1, &error), "bitmap file", &error);
    check(fl_disk_bitmap_add_persistent(side->disk, bitmap, UNIT, kind == INTENT, &error), "bitmap", &error);
}

static void shuffle(void)
{
    for (uint64_t i = 0; i < units; i++)
        order[i] = (uint32_t)i;
    for (uint64_t i = units - 1; i > 0; i--) {
        uint64_t j = ((uint64_t)rand() << 16 ^ (uint64_t)rand()) % (i + 1);
        uint32_t swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
}

static void clear(int kind)
{
    fl_error error;
    if (kind != NONE)
        check(fl_disk_bitmap_clear(sides[kind].disk, bitmap, &error), "clear", &error);
}

static void write_units(int kind, uint64_t count)
{
    struct side *side = &sides[kind];
    fl_error error;
    for (uint64_t i = 0; i < count; i++)
        check(fl_disk_pwrite(side->disk, data, BLOCK, (uint64_t)order[side->next++ % units] * UNIT, &error), "write", &error);
}

static void run(const char *what, uint64_t slices, uint64_t writes, const int *kinds, uint64_t count)
{
    for (uint64_t k = 0; k < count; k++)
        sides[kinds[k]].next = k * units / count;               /* nobody finds in the processor's caches what another one just wrote */
    for (uint64_t slice = 0; slice < slices; slice++)
        for (uint64_t k = 0; k < count; k++) {
            int kind = kinds[(slice + k) % count];
            uint64_t start = now();
            write_units(kind, writes);
            printf("%s %s %.1f\n", what, names[kind], (double)(now() - start) / (double)writes);
        }
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: dirty_bits FILE MIB SLICES SYNCED\n");
        return 2;
    }
    const char *path = argv[1];
    uint64_t size = strtoull(argv[2], NULL, 10) << 20, slices = strtoull(argv[3], NULL, 10), synced = strtoull(argv[4], NULL, 10);
    units = size / UNIT;
    order = malloc(units * sizeof *order);
    make(path, size);
    for (int kind = 0; kind < KINDS; kind++)
        open_side(path, kind);
    shuffle();

    static const int all[] = { NONE, MEMORY, PERSISTENT, INTENT }, first[] = { NONE, MEMORY, PERSISTENT }, waiting[] = { NONE, INTENT };
    /* write-intent would sync for each unit: it is made dirty with one large write */
    fl_error error;
    for (uint64_t at = 0; at < size; at += sizeof data)
        for (int kind = 0; kind < KINDS; kind++)
            check(fl_disk_pwrite(sides[kind].disk, data, sizeof data, at, &error), "write", &error);
    run("repeated", slices, SLICE, all, KINDS);
    while (slices > 0) {
        uint64_t some = units / SLICE < slices ? units / SLICE : slices;       /* then all units are dirty */
        for (int kind = 0; kind < KINDS; kind++)
            clear(kind);
        run("first", some, SLICE, first, 3);
        slices -= some;
    }
    clear(INTENT);
    run("synced", synced < units / 4 ? synced : units / 4, 4, waiting, 2);

    for (int kind = 0; kind < KINDS; kind++) {
        fl_disk_free(sides[kind].disk);
        fl_image_free(sides[kind].image);
        if (sides[kind].file[0])
            unlink(sides[kind].file);
    }
    unlink(path);
    free(order);
    return 0;
}
