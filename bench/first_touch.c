/* first_touch.c: what the first write to each cluster costs, beside a plain write and beside the bare minimum, in one run.
 *
 *   first_touch FILE FLEECING_DIR MIB WRITE_SIZE CLUSTER_SIZE STAGE_MIB random|sequential ROUNDS
 *
 * FILE is made, and removed. Each round runs, on the same file and over the same offsets:
 *   idle    fl_disk_pwrite with no snapshot alive, and plain_idle, a pwrite, beside it: SLICE writes of one, then of the other, in turn
 *   read    pread the cluster into the same memory each time, pwrite: the least that any copy-before-write can do in the writer's thread
 *   bare    pread the cluster, pwrite it to a scratch file, pwrite: copy-before-write in the writer's thread, with no bookkeeping at all
 *   bare_two  the same by two threads, each with half of the offsets and a scratch file of its own
 *   first   fl_disk_pwrite right after a cut: every cluster is touched for the first time
 *   again   the same writes once more: every cluster was saved before; and plain_again, a pwrite, beside it, as above
 * and prints a line of JSON with the writes per second of each. `plain` is that of all plain writes, before `first` and after. Nobody syncs; all are
 * buffered.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "../csrc/fleece.h"

#define MAX_DATA ((size_t)1 << 20)       /* the largest write */
#define SLICE 64u
#define WARM ((size_t)2 << 30)

static void check(int rc, const char *what, const fl_error *error)
{
    if (rc) {
        fprintf(stderr, "%s: %s\n", what, error->text);
        exit(1);
    }
}

static void check_io(ssize_t done, size_t wanted, const char *what)
{
    if (done != (ssize_t)wanted) {
        perror(what);
        exit(1);
    }
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

struct run { uint64_t *offsets; size_t count, size; const char *data; };

/* A virtual machine may hand memory that was free for seconds back to its host, and its next use then costs a fault there: many times the copy. So both
   that need new memory begin with memory that was used a moment ago. */
static void warm_memory(void)
{
    void *memory = mmap(NULL, WARM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory != MAP_FAILED)
        munmap(memory, WARM);
}

struct beside { double plain, ours; };          /* seconds */

/* Seconds for SLICE writes, fewer at the end: of the disk, or where that is NULL, of the file. They begin `from` after the `at`th, and go around. */
static double slice(const struct run *run, size_t at, size_t from, int fd, fl_disk *disk)
{
    size_t end = at + SLICE < run->count ? at + SLICE : run->count;
    fl_error error;
    double start = seconds();
    for (size_t n = at; n < end; n++) {
        uint64_t offset = run->offsets[(n + from) % run->count];
        if (disk)
            check(fl_disk_pwrite(disk, run->data, run->size, offset, &error), "write", &error);
        else
            check_io(pwrite(fd, run->data, run->size, (off_t)offset), run->size, "pwrite");
    }
    return seconds() - start;
}

/* All writes by both, in small turns, so that what else the machine does hits both alike. Each is half the file away from the other, and each is the first
   of the two as often. */
static struct beside beside(const struct run *run, int fd, fl_disk *disk)
{
    struct beside took = { 0, 0 };
    for (size_t at = 0, half = run->count / 2; at < run->count; at += SLICE) {
        bool first = at / SLICE % 2;
        if (first)
            took.ours += slice(run, at, half, fd, disk);
        took.plain += slice(run, at, 0, fd, NULL);
        if (!first)
            took.ours += slice(run, at, half, fd, disk);
    }
    return took;
}

/* A thread's share of the bare loops. */
struct bare { const struct run *run; size_t first, end; int fd, scratch; size_t cluster; };

static void *bare_loop(void *argument)
{
    const struct bare *bare = argument;
    const struct run *run = bare->run;
    size_t whole = run->size > bare->cluster ? run->size : bare->cluster;
    char *old = malloc(whole);
    uint64_t end = 0;
    for (size_t i = bare->first; i < bare->end; i++, end += whole) {
        uint64_t first = run->offsets[i] / bare->cluster * bare->cluster;
        check_io(pread(bare->fd, old, whole, (off_t)first), whole, "pread");
        if (bare->scratch >= 0)
            check_io(pwrite(bare->scratch, old, whole, (off_t)end), whole, "pwrite");
        check_io(pwrite(bare->fd, run->data, run->size, (off_t)run->offsets[i]), run->size, "pwrite");
    }
    free(old);
    return NULL;
}

/* Writes per second of as many threads as there are scratch files, which are left empty; -1: nothing is saved. */
static double bare(const struct run *run, int fd, const int *scratch, size_t threads, size_t cluster)
{
    struct bare share[2];
    pthread_t thread[2];
    for (size_t i = 0; i < threads; i++)
        share[i] = (struct bare){ run, run->count * i / threads, run->count * (i + 1) / threads, fd, scratch[i], cluster };
    warm_memory();
    double start = seconds();
    for (size_t i = 0; i < threads; i++)
        if (pthread_create(&thread[i], NULL, bare_loop, &share[i]) != 0) {
            fprintf(stderr, "no thread\n");
            exit(1);
        }
    for (size_t i = 0; i < threads; i++)
        pthread_join(thread[i], NULL);
    double rate = (double)run->count / (seconds() - start);
    for (size_t i = 0; i < threads; i++)
        if (scratch[i] >= 0 && ftruncate(scratch[i], 0) != 0)
            perror("ftruncate");
    return rate;
}

static double ours(const struct run *run, fl_disk *disk)
{
    fl_error error;
    double start = seconds();
    for (size_t i = 0; i < run->count; i++)
        check(fl_disk_pwrite(disk, run->data, run->size, run->offsets[i], &error), "write", &error);
    return (double)run->count / (seconds() - start);
}

int main(int argc, char **argv)
{
    if (argc != 9) {
        fprintf(stderr, "usage: first_touch FILE FLEECING_DIR MIB WRITE_SIZE CLUSTER_SIZE STAGE_MIB random|sequential ROUNDS\n");
        return 2;
    }
    const char *path = argv[1], *dir = argv[2];
    uint64_t size = strtoull(argv[3], NULL, 10) << 20, stage = strtoull(argv[6], NULL, 10) << 20;
    size_t write_size = strtoul(argv[4], NULL, 10), cluster = strtoul(argv[5], NULL, 10);
    size_t step = write_size > cluster ? write_size : cluster;          /* so that each write is the first to its clusters */
    char *data = malloc(MAX_DATA);
    fl_error error;
    fl_image *image;
    fl_disk *disk;

    for (size_t i = 0; i < MAX_DATA; i++)
        data[i] = (char)rand();
    fl_image_options options = { "raw", 1, 0, 1 };
    check(fl_image_create(path, size, &options, &image, &error), "create", &error);
    for (uint64_t at = 0; at < size; at += MAX_DATA)
        check(fl_image_pwrite(image, data, MAX_DATA, at, &error), "fill", &error);
    check(fl_disk_open(image, &disk, &error), "disk", &error);
    int fd = open(path, O_RDWR | O_CLOEXEC), scratch[2];
    for (int i = 0; i < 2; i++)
        scratch[i] = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0 || scratch[0] < 0 || scratch[1] < 0) {
        perror("open");
        return 1;
    }
    struct run run = { malloc(size / step * sizeof(uint64_t)), size / step, write_size, data };
    for (size_t i = 0; i < run.count; i++)
        run.offsets[i] = i * step;
    if (!strcmp(argv[7], "random"))
        for (size_t i = run.count - 1; i > 0; i--) {
            size_t j = ((size_t)rand() << 16 ^ (size_t)rand()) % (i + 1);
            uint64_t swap = run.offsets[i];
            run.offsets[i] = run.offsets[j];
            run.offsets[j] = swap;
        }

    for (int round = 0, rounds = atoi(argv[8]); round < rounds; round++) {
        struct beside idle = beside(&run, fd, disk);
        double rate_read = bare(&run, fd, (int[]){ -1 }, 1, cluster), rate_bare = bare(&run, fd, scratch, 1, cluster);
        double rate_two = bare(&run, fd, scratch, 2, cluster);
        fl_image *fleecing;
        fl_snapshot *snapshot;
        fl_stats stats;
        check(fl_image_create_nameless(dir, UINT64_C(1) << 40, &fleecing, &error), "fleecing", &error);
        fl_snapshot_options cut = { .cluster_size = (uint32_t)cluster, .cbw_timeout = UINT64_C(45000000000), .stage_size = stage, .fleecing = fleecing };
        check(fl_snapshot_cut(&disk, &cut, 1, &snapshot, &error), "cut", &error);
        warm_memory();
        double rate_first = ours(&run, disk);
        struct beside again = beside(&run, fd, disk);
        double count = (double)run.count;
        check(fl_snapshot_stats(snapshot, &stats, &error), "stats", &error);
        printf("{\"plain\": %.0f, \"plain_idle\": %.0f, \"idle\": %.0f, \"read\": %.0f, \"bare\": %.0f, \"bare_two\": %.0f, \"first\": %.0f, \"plain_again\": %.0f, \"again\": %.0f, "
               "\"spilled\": %llu, \"waits\": %llu}\n", 2 * count / (idle.plain + again.plain), count / idle.plain, count / idle.ours, rate_read, rate_bare, rate_two,
               rate_first, count / again.plain, count / again.ours, (unsigned long long)stats.bytes_spilled, (unsigned long long)stats.room_waits);
        fflush(stdout);
        fl_snapshot_free(snapshot);
        fl_image_free(fleecing);
    }
    fl_disk_free(disk);
    fl_image_free(image);
    unlink(path);
    return 0;
}
