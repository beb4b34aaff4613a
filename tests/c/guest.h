/* guest.h: the writers of the stress program: what a guest does to its disks, and that it gets what it was promised. */
#ifndef GUEST_H
#define GUEST_H

#include "shot.h"

#define TWIN_SIZE (256 * KIB)

static fl_disk *disk, *twin;            /* fixed while threads run */
static fl_image *beneath;               /* what the disk's faulty source is around */
static atomic_bool stop;
static pthread_rwlock_t exact;          /* shared: an operation of a writer runs; exclusive: an exact cut */

static void random_bytes(uint8_t *p, uint64_t n, uint64_t *random)
{
    uint64_t word = 0;
    for (uint64_t i = 0; i < n; i += 8) {
        word = next_random(random);
        memcpy(p + i, &word, least(8, n - i));
    }
}

/* A length of 1 to `limit`, small ones as likely as large ones. */
static uint64_t random_length(uint64_t *random, uint64_t limit)
{
    uint64_t top = 2ull << below(random, 18);
    return 1 + below(random, least(top, limit));
}

/* A range inside a stripe of the writer, unaligned or aligned to sectors or blocks. false: it has none in the chosen zone. */
static bool choose_range(struct writer *w, uint64_t *offset, uint64_t *length)
{
    static const uint8_t odds[20] = { 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4 };
    const struct zone *z = &zones[odds[below(&w->random, 20)]];
    uint64_t stripes = (z->end - z->start + z->stripe - 1) / z->stripe;
    if (w->id >= stripes)
        return false;
    uint64_t mine = w->id + writer_count * below(&w->random, (stripes - w->id + writer_count - 1) / writer_count);
    uint64_t start = z->start + mine * z->stripe, end = least(start + z->stripe, z->end);
    uint64_t align = below(&w->random, 10) < 6 ? 1 : chance(&w->random, 50) ? SECTOR : 4096;
    if (chance(&w->random, 20)) {
        *offset = start;
        *length = least(end - start, MAX_OPERATION);
        return true;
    }
    *offset = start + below(&w->random, end - start);
    *length = random_length(&w->random, least(end - *offset, MAX_OPERATION));
    uint64_t aligned = (*offset + align - 1) / align * align, aligned_end = (*offset + *length) / align * align;
    if (aligned < aligned_end) {
        *offset = aligned;
        *length = aligned_end - aligned;
    }
    return true;
}

/* A guest's operation failed: a snapshot under break-guest-write may do that, for want of room or when old data can't be read. */
static void check_guest_failure(int rc)
{
    CHECK(tight, "a guest's operation failed: %s", why.text);
    CHECK(why.code == rc && (why.side == FL_SIDE_FLEECING || (why.side == FL_SIDE_SOURCE && rc == -EIO)),
          "a guest's operation failed with %d, side %d: %s", rc, why.side, why.text);
    COUNT(failed_writes, 1);
}

/* Write, zero, discard or read in a zone. What a discard or a failed operation leaves is read back: it can't be anything but old or new. */
static void zone_operation(struct writer *w)
{
    uint64_t offset, length;
    if (!choose_range(w, &offset, &length))
        return;
    unsigned what = (unsigned)below(&w->random, 100);
    if (what < 8) {
        if (fl_disk_pread(disk, w->buffer, length, offset, &why)) {
            CHECK(tight && why.code == -EIO && why.side == FL_SIDE_SOURCE, "the guest can't read: %s", why.text);
            return;
        }
        CHECK(!memcmp(w->buffer, model + offset, length), "the guest does not read what it wrote: %" PRIu64 " at %" PRIu64, length, offset);
        COUNT(guest_reads, 1);
        return;
    }
    bool zeros = what < 30 || chance(&w->random, 10);           /* a zero, a discard, and some writes of zeros */
    if (zeros)
        memset(w->buffer, 0, length);
    else
        random_bytes(w->buffer, length, &w->random);
    operation_begin(w, offset, length);
    int rc;
    if (what < 20) {
        rc = fl_disk_zero(disk, length, offset, &why);
        COUNT(zeroes, 1);
    } else if (what < 30) {
        rc = fl_disk_discard(disk, length, offset, &why);
        COUNT(discards, 1);
    } else {
        rc = fl_disk_pwrite(disk, w->buffer, length, offset, &why);
        COUNT(writes, 1);
    }
    if (rc || (what >= 20 && what < 30)) {
        if (rc)
            check_guest_failure(rc);
        MUST(fl_image_pread(beneath, w->check, length, offset, &why));
        for (uint64_t i = 0; i < length; i++)
            CHECK(w->check[i] == w->buffer[i] || w->check[i] == model[offset + i],
                  "byte %" PRIu64 " is neither old nor new after %s of %" PRIu64 " at %" PRIu64, offset + i,
                  what < 20 ? "a zeroing" : what < 30 ? "a discard" : "a write", length, offset);
        operation_end(w, w->check);
    } else {
        operation_end(w, w->buffer);
    }
}

/* Write `number` to all sectors of the granule, on `to`. */
static int write_granule(struct writer *w, fl_disk *to, struct granule *g, uint64_t offset, uint64_t number)
{
    uint64_t words[SECTOR / 8], length = g->blocks * SECTOR;
    int rc;
    if (is_zeroing(g, number)) {
        COUNT(granule_zeroes, 1);
        rc = fl_disk_zero(to, length, offset, &why);
    } else {
        for (uint64_t i = 0; i < g->blocks; i++) {
            make_sector(words, offset / SECTOR + i, number);
            memcpy(w->buffer + i * SECTOR, words, SECTOR);
        }
        COUNT(granule_writes, 1);
        rc = fl_disk_pwrite(to, w->buffer, length, offset, &why);
    }
    if (rc)
        check_guest_failure(rc);
    return rc;
}

static void granule_operation(struct writer *w)
{
    struct granule *g = &granules[below(&w->random, granule_count)];
    if (g->owner != w->id || !g->zeroed)
        return;
    uint64_t number = atomic_fetch_add(&g->issued, 1) + 1;
    if (write_granule(w, disk, g, g->block * SECTOR, number) == 0)
        atomic_store(&g->acked, number);
}

/* The next link of the writer's chain; a write that fails is made again the next time. */
static void chain_operation(struct writer *w)
{
    struct granule one = { .blocks = 1 };
    uint64_t number = w->chain / 3;
    unsigned link = (unsigned)(w->chain % 3);
    struct granule *g = link < 2 ? &granules[chain_granule[link][w->id]] : &one;
    uint64_t offset = link < 2 ? g->block * SECTOR : TWIN_SIZE - (w->id + 1) * SECTOR;
    atomic_store(&g->issued, number);
    if (write_granule(w, link < 2 ? disk : twin, g, offset, number))
        return;
    atomic_store(&g->acked, number);
    w->chain++;
    COUNT(chain_writes, 1);
}

static void *writer_body(void *argument)
{
    struct writer *w = argument;
    while (!atomic_load(&stop)) {
        unsigned what = (unsigned)below(&w->random, 1000);
        pthread_rwlock_rdlock(&exact);
        if (what < 600)
            zone_operation(w);
        else if (what < 900)
            granule_operation(w);
        else
            chain_operation(w);
        pthread_rwlock_unlock(&exact);
        if (what == 999) {
            MUST(fl_disk_flush(disk, &why));
            COUNT(flushes, 1);
        }
    }
    return NULL;
}

#endif
