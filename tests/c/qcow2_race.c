/* qcow2_race.c: several threads change one cluster of a qcow2 image at once, again and again, while others take what it gives back.
 *
 *     qcow2_race IMAGE [--rounds N] [--seed N] [--snapshots]
 *
 * In each round, at once: some threads write sectors of their own in one cluster, which is mapped, or not, or compressed, or shared with
 * an internal snapshot, as it comes; perhaps one discards or zeroes the whole of it; and one writes other clusters and flushes, so that
 * what was freed is used again. A write may linger between its look at the map and the file, longer than all of that takes. Afterwards each
 * sector has what was written to it, or zeros, or what it had where nobody but a discard touched it; and all others have what they had.
 *
 * --snapshots: through a disk with a snapshot that is cut every few rounds, so that copy-before-write takes part; each snapshot is read
 * at its end.
 *
 * pwritev is defined here, so that the driver's calls come here first.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "check.h"

#define SECTOR 512u
#define WRITERS 3u
#define HOT 6u                  /* clusters that are fought for; the others are written by the one who flushes */
#define ROUNDS_OF_A_SNAPSHOT 8u

enum whole { NOTHING, DISCARD, ZERO };          /* what one thread does with the whole cluster */

static fl_image *image;
static fl_disk *disk;           /* NULL: around it */
static uint64_t disk_size, cluster_size, seed = 1;
static unsigned char *known;    /* what the disk holds; between rounds */
static unsigned rounds = 400;

static struct {                 /* what happens in this round; changed by the main thread, between rounds */
    uint64_t offset;            /* of the cluster */
    enum whole whole;
    bool writes[WRITERS];
    uint64_t first[WRITERS], count[WRITERS];    /* bytes from the start of the disk */
    unsigned number;
} now;

/* Where all threads meet: before a round, and after it. Spinning, so that they leave together. */
static _Atomic unsigned arrived, generation;

static void meet(void)
{
    unsigned before = atomic_load(&generation);
    if (atomic_fetch_add(&arrived, 1) == WRITERS + 1) {        /* the writers, the one for the whole, and the main thread */
        atomic_store(&arrived, 0);
        atomic_fetch_add(&generation, 1);
        return;
    }
    while (atomic_load(&generation) == before)
        sched_yield();
}

static _Thread_local bool lingers;              /* a writer */

ssize_t pwritev(int fd, const struct iovec *iov, int count, off_t offset)
{
    static _Thread_local uint64_t state;
    if (state == 0)
        state = seed * 31 + (uintptr_t)&state;
    if (lingers && next_random(&state) % 3 == 0)
        sleep_ns(next_random(&state) % (2 * MILLISECOND));
    return syscall(SYS_pwritev, fd, iov, count, offset, 0);
}

ssize_t pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    struct iovec iov = { (void *)(uintptr_t)buffer, length };
    return pwritev(fd, &iov, 1, offset);
}

/* ---- the disk, or the image itself ---- */

static void do_write(const void *buffer, uint64_t count, uint64_t offset)
{
    MUST(disk ? fl_disk_pwrite(disk, buffer, count, offset, &why) : fl_image_pwrite(image, buffer, count, offset, &why));
}

static void do_read(void *buffer, uint64_t count, uint64_t offset)
{
    MUST(disk ? fl_disk_pread(disk, buffer, count, offset, &why) : fl_image_pread(image, buffer, count, offset, &why));
}

static void do_flush(void)
{
    MUST(disk ? fl_disk_flush(disk, &why) : fl_image_flush(image, &why));
}

static void do_whole(enum whole whole, uint64_t count, uint64_t offset)
{
    if (whole == ZERO) {
        MUST(disk ? fl_disk_zero(disk, count, offset, &why) : fl_image_zero(image, count, offset, &why));
        return;
    }
    int rc = disk ? fl_disk_discard(disk, count, offset, &why) : fl_image_discard(image, count, offset, &why);
    CHECK(rc == 0 || rc == -EOPNOTSUPP, "discard: %d, %s", rc, why.text);
}

static uint64_t length_of(uint64_t offset) { return disk_size - offset < cluster_size ? disk_size - offset : cluster_size; }

/* ---- the threads ---- */

static void *writer(void *argument)
{
    unsigned me = (unsigned)(uintptr_t)argument;
    unsigned char *buffer = malloc(cluster_size);
    CHECK(buffer);
    lingers = true;
    for (unsigned round = 0; round < rounds; round++) {
        meet();
        if (now.writes[me]) {
            memset(buffer, (int)(1 + (now.number * WRITERS + me) % 255), now.count[me]);
            do_write(buffer, now.count[me], now.first[me]);
        }
        meet();
    }
    free(buffer);
    return NULL;
}

static void *whole_changer(void *argument)
{
    (void)argument;
    for (unsigned round = 0; round < rounds; round++) {
        meet();
        if (now.whole != NOTHING)
            do_whole(now.whole, length_of(now.offset), now.offset);
        meet();
    }
    return NULL;
}

/* Empties and fills other clusters, and flushes, so that freed clusters come back quickly. By the main thread, in the middle of a round. */
static void use_what_was_freed(uint64_t *state, unsigned char *buffer)
{
    uint64_t clusters = disk_size / cluster_size;
    for (unsigned i = 0; i < 4; i++) {
        uint64_t offset = (HOT + next_random(state) % (clusters - HOT)) * cluster_size;
        do_flush();
        do_whole(ZERO, cluster_size, offset);
        memset(buffer, (int)(1 + next_random(state) % 255), cluster_size);
        do_write(buffer, cluster_size, offset);
        memcpy(known + offset, buffer, cluster_size);
    }
}

/* ---- rounds ---- */

static void plan(uint64_t *state, unsigned number)
{
    uint64_t part = cluster_size / WRITERS / SECTOR * SECTOR;
    now.number = number;
    now.offset = next_random(state) % HOT * cluster_size;
    now.whole = (enum whole)(next_random(state) % 3);
    for (unsigned i = 0; i < WRITERS; i++) {
        uint64_t sectors = part / SECTOR, from = next_random(state) % sectors, count = 1 + next_random(state) % (sectors - from);
        now.writes[i] = next_random(state) % 8 != 0;
        now.first[i] = now.offset + i * part + from * SECTOR;
        now.count[i] = count * SECTOR;
    }
}

static void judge(unsigned char *found)
{
    do_read(found, disk_size, 0);
    for (uint64_t at = 0; at < disk_size; at += SECTOR) {
        bool inside = at >= now.offset && at < now.offset + cluster_size, written = false;
        unsigned char value = 0;
        for (unsigned i = 0; i < WRITERS && inside; i++)
            if (now.writes[i] && at >= now.first[i] && at < now.first[i] + now.count[i]) {
                written = true;
                value = (unsigned char)(1 + (now.number * WRITERS + i) % 255);
            }
        uint64_t count = disk_size - at < SECTOR ? disk_size - at : SECTOR;
        bool zeros = true, new = true;
        for (uint64_t i = at; i < at + count; i++) {
            zeros &= found[i] == 0;
            new &= found[i] == value;
        }
        bool same = memcmp(found + at, known + at, count) == 0;
        bool good = written ? new || (now.whole != NOTHING && zeros)
                            : inside && now.whole == ZERO ? zeros : same || (inside && now.whole == DISCARD && zeros);
        CHECK(good, "round %u: the sector at %" PRIu64 " begins with 0x%02x; cluster at %" PRIu64 ", whole %d, %s", now.number, at,
              found[at], now.offset, now.whole, !inside ? "nobody's" : written ? "written" : "not written");
    }
    memcpy(known, found, disk_size);
}

static void make_it_whole(uint64_t *state, unsigned char *buffer)
{
    uint64_t kind = next_random(state) % 4, count = length_of(now.offset);
    if (kind == 0) {                                    /* compressed, where it can be */
        do_whole(DISCARD, count, now.offset);
        do_read(buffer, count, now.offset);
        if (fl_image_write_compressed(image, buffer, count, now.offset, &why) == 0)
            do_read(known + now.offset, count, now.offset);
    } else if (kind == 1) {
        do_whole(DISCARD, count, now.offset);
    }
    do_read(known + now.offset, count, now.offset);
}

static fl_snapshot *cut(unsigned char *state_then)
{
    fl_snapshot_options options = { .cluster_size = 4096, .cbw_timeout = 10 * SECOND, .stage_size = 64 << 20 };
    fl_snapshot *snapshot;
    MUST(fl_snapshot_cut(&disk, &options, 1, &snapshot, &why));
    memcpy(state_then, known, disk_size);
    return snapshot;
}

static void end_snapshot(fl_snapshot *snapshot, unsigned char *found, const unsigned char *state_then)
{
    MUST(fl_snapshot_pread(snapshot, found, disk_size, 0, &why));
    CHECK(memcmp(found, state_then, disk_size) == 0, "the snapshot is not what the disk was at the cut");
    MUST(fl_snapshot_close(snapshot, &why));
    fl_snapshot_free(snapshot);
}

int main(int argc, char **argv)
{
    static const struct option names[] = {
        { "rounds", 1, NULL, 'r' }, { "seed", 1, NULL, 's' }, { "snapshots", 0, NULL, 'd' }, { NULL, 0, NULL, 0 },
    };
    bool with_snapshots = false;
    for (int option; (option = getopt_long(argc, argv, "", names, NULL)) != -1;)
        switch (option) {
        case 'r': rounds = (unsigned)strtoul(optarg, NULL, 0); break;
        case 's': seed = strtoull(optarg, NULL, 0); break;
        case 'd': with_snapshots = true; break;
        default: return 2;
        }
    if (optind != argc - 1)
        return 2;
    fl_image_options options = { .format = "qcow2", .writable = 1 };
    MUST(fl_image_open(argv[optind], &options, &image, &why));
    fl_image_info info;
    MUST(fl_image_info_get(image, &info, &why));
    disk_size = info.size;
    cluster_size = info.cluster_size;
    CHECK(disk_size / cluster_size >= 3 * HOT && cluster_size >= 2048, "the image is too small");
    if (with_snapshots)
        MUST(fl_disk_open(image, &disk, &why));
    known = malloc(disk_size);
    unsigned char *found = malloc(disk_size), *state_then = malloc(disk_size), *buffer = malloc(cluster_size);
    CHECK(known && found && state_then && buffer);
    do_read(known, disk_size, 0);

    pthread_t threads[WRITERS + 1];
    for (unsigned i = 0; i < WRITERS; i++)
        CHECK(!pthread_create(&threads[i], NULL, writer, (void *)(uintptr_t)i));
    CHECK(!pthread_create(&threads[WRITERS], NULL, whole_changer, NULL));
    uint64_t state = seed;
    fl_snapshot *snapshot = NULL;
    for (unsigned round = 0; round < rounds; round++) {
        plan(&state, round);
        if (with_snapshots && round % ROUNDS_OF_A_SNAPSHOT == 0) {
            if (snapshot)
                end_snapshot(snapshot, found, state_then);
            snapshot = cut(state_then);
        } else if (!with_snapshots) {
            make_it_whole(&state, buffer);
        }
        meet();
        use_what_was_freed(&state, buffer);
        meet();
        judge(found);
    }
    for (unsigned i = 0; i < WRITERS + 1; i++)
        CHECK(!pthread_join(threads[i], NULL));
    if (snapshot)
        end_snapshot(snapshot, found, state_then);
    if (disk) {
        MUST(fl_disk_close(disk, &why));
        fl_disk_free(disk);
    }
    MUST(fl_image_close(image, &why));
    fl_image_free(image);
    free(known);
    free(found);
    free(state_then);
    free(buffer);
    return 0;
}
