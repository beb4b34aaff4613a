/* test_qcow2_threads.c DIR [SECONDS]: many threads on one qcow2 image, with storage that takes its time wherever it hurts.
 *
 * Every sector says of itself which it is and the how many-th write to it. A sector has one writer; a cluster has many. Others discard and zero
 * whole clusters under them, and flush, so that clusters of the file are freed, punched and used again all the time. What may be read:
 *   - the number of the last acknowledged write or of a later one, never of an earlier one, and never another sector;
 *   - zeros, if a discard or a zeroing of the cluster was begun after the last moment when it is known that the number was there.
 * Number 0 is what the backing file holds.
 */
#define _GNU_SOURCE
#include "qcow2_kit.h"
#include "storage.h"

#define SECTOR 512u
#define WRITERS 4
#define READERS 2
#define EMPTIERS 2

static fl_image *image;
static uint64_t sectors, per_cluster, clusters;
static atomic_bool stop;
static atomic_ullong *issued, *acked;   /* by sector */
static atomic_ullong *emptied_begun, *emptied_ended;    /* by cluster */
static atomic_ullong writes, reads, emptied, zeros_seen, flushes;

static void make_sector(void *out, uint64_t sector, uint64_t number)
{
    uint64_t words[SECTOR / 8], state = sector << 32 ^ number;
    words[0] = 0x7173656374727573u;
    words[1] = sector;
    words[2] = number;
    for (unsigned i = 3; i < SECTOR / 8; i++)
        words[i] = next_random(&state);
    memcpy(out, words, SECTOR);
}

/* The number of the write, or UINT64_MAX for zeros. A sector that is being written may be half of each: TORN. */
#define TORN (UINT64_MAX - 1)

static uint64_t number_of(const unsigned char *data, uint64_t sector, bool being_written)
{
    unsigned char want[SECTOR];
    uint64_t words[3];
    if (data[0] == 0 && !memcmp(data, data + 1, SECTOR - 1))
        return UINT64_MAX;
    memcpy(words, data, sizeof words);
    make_sector(want, sector, words[2]);
    if (being_written && (words[1] == sector || words[1] == 0) && memcmp(want, data, SECTOR))
        return TORN;                    /* words[1] is 0: where there were zeros */
    CHECK(!memcmp(want, data, SECTOR), "sector %" PRIu64 " is torn or foreign: it says it is sector %" PRIu64 ", write %" PRIu64, sector, words[1], words[2]);
    return words[2];
}

/* The writer of a sector: in runs, so that a write is of several sectors, and clusters have several writers. */
static unsigned owner(uint64_t sector) { return (unsigned)((sector / 3) % WRITERS); }

static void *writer_body(void *argument)
{
    unsigned me = (unsigned)(uintptr_t)argument;
    uint64_t random = me + 1, begun[3];
    unsigned char buffer[3 * SECTOR];
    while (!atomic_load(&stop)) {
        uint64_t run = below(&random, sectors / 3 / WRITERS) * WRITERS + me, first = run * 3, n = 1 + below(&random, 3);
        CHECK(owner(first) == me && first + n <= sectors);
        for (uint64_t i = 0; i < n; i++) {
            begun[i] = atomic_load(&emptied_ended[(first + i) / per_cluster]);
            make_sector(buffer + i * SECTOR, first + i, atomic_fetch_add(&issued[first + i], 1) + 1);
        }
        MUST(fl_image_pwrite(image, buffer, n * SECTOR, first * SECTOR, &why));
        for (uint64_t i = 0; i < n; i++)
            atomic_store(&acked[first + i], atomic_load(&issued[first + i]));
        atomic_fetch_add(&writes, 1);
        if (chance(&random, 50))
            continue;
        MUST(fl_image_pread(image, buffer, n * SECTOR, first * SECTOR, &why));
        for (uint64_t i = 0; i < n; i++) {
            uint64_t number = number_of(buffer + i * SECTOR, first + i, false);
            bool may_be_zero = atomic_load(&emptied_begun[(first + i) / per_cluster]) != begun[i];
            CHECK(number == atomic_load(&issued[first + i]) || (number == UINT64_MAX && may_be_zero),
                  "sector %" PRIu64 ": its writer reads write %" PRId64 " after write %" PRIu64 "%s", first + i, (int64_t)number,
                  (uint64_t)atomic_load(&issued[first + i]), may_be_zero ? ", with a discard beside it" : "");
        }
    }
    return NULL;
}

static void *reader_body(void *argument)
{
    uint64_t random = (uintptr_t)argument + 1000, low[256], begun[256];
    unsigned char *buffer = malloc(256 * SECTOR);
    CHECK(buffer);
    while (!atomic_load(&stop)) {
        uint64_t first = below(&random, sectors), n = 1 + below(&random, least_of(256, sectors - first));
        for (uint64_t i = 0; i < n; i++) {
            begun[i] = atomic_load(&emptied_begun[(first + i) / per_cluster]);
            low[i] = atomic_load(&acked[first + i]);
        }
        MUST(fl_image_pread(image, buffer, n * SECTOR, first * SECTOR, &why));
        for (uint64_t i = 0; i < n; i++) {
            uint64_t high = atomic_load(&issued[first + i]), number = number_of(buffer + i * SECTOR, first + i, high != low[i]);
            if (number == UINT64_MAX) {
                CHECK(begun[i] || atomic_load(&emptied_begun[(first + i) / per_cluster]), "sector %" PRIu64 " reads as zeros, and nobody emptied it", first + i);
                atomic_fetch_add(&zeros_seen, 1);
            } else if (number != TORN) {
                CHECK(number >= low[i] && number <= high, "sector %" PRIu64 ": write %" PRIu64 ", not from %" PRIu64 " to %" PRIu64, first + i, number, low[i], high);
            }
        }
        atomic_fetch_add(&reads, 1);
    }
    free(buffer);
    return NULL;
}

/* Whole clusters, some at a time; one emptier's clusters are no other's, so that begun and ended mean what they say. */
static void *emptier_body(void *argument)
{
    unsigned me = (unsigned)(uintptr_t)argument;
    uint64_t random = me + 2000;
    while (!atomic_load(&stop)) {
        uint64_t half = clusters / EMPTIERS, n = 1 + below(&random, least_of(4, half)), first = me * half + below(&random, half - n + 1);
        for (uint64_t i = 0; i < n; i++)
            atomic_fetch_add(&emptied_begun[first + i], 1);
        uint64_t offset = first * per_cluster * SECTOR, count = n * per_cluster * SECTOR;
        if (chance(&random, 60))
            MUST(fl_image_discard(image, count, offset, &why));
        else
            MUST(fl_image_zero(image, count, offset, &why));
        for (uint64_t i = 0; i < n; i++)
            atomic_fetch_add(&emptied_ended[first + i], 1);
        atomic_fetch_add(&emptied, n);
        sleep_ns(below(&random, 2 * MILLISECOND));
    }
    return NULL;
}

static void *flusher_body(void *argument)
{
    uint64_t random = (uintptr_t)argument;
    fl_extent e[64];
    size_t found;
    while (!atomic_load(&stop)) {
        MUST(fl_image_flush(image, &why));
        MUST(fl_image_extents(image, 0, sectors * SECTOR, e, 64, &found, &why));
        atomic_fetch_add(&flushes, 1);
        sleep_ns(below(&random, MILLISECOND));
    }
    return NULL;
}

static void write_backing(const char *path)
{
    unsigned char buffer[SECTOR];
    FILE *f = fopen(path, "w");
    CHECK(f);
    for (uint64_t i = 0; i < sectors; i++) {
        make_sector(buffer, i, 0);
        CHECK(fwrite(buffer, SECTOR, 1, f) == 1);
    }
    fclose(f);
}

static void run(const struct shape *base, uint64_t ns, int flags)
{
    const char *path = in_directory("threads.qcow2");
    struct shape shape = *base;
    pthread_t threads[WRITERS + READERS + EMPTIERS + 1];
    unsigned n = 0;
    per_cluster = (1u << shape.cluster_bits) / SECTOR;
    sectors = shape.size / SECTOR;
    clusters = sectors / per_cluster;
    issued = calloc(sectors, sizeof *issued);
    acked = calloc(sectors, sizeof *acked);
    emptied_begun = calloc(clusters + 1, sizeof *emptied_begun);
    emptied_ended = calloc(clusters + 1, sizeof *emptied_ended);
    CHECK(issued && acked && emptied_begun && emptied_ended);
    if (shape.backing)
        write_backing(in_directory(shape.backing));
    make_image(path, &shape);
    image = open_qcow2(path, WRITABLE | flags, 1);
    if (!shape.backing)                 /* every sector has a number then */
        for (uint64_t i = 0; i < sectors; i++) {
            unsigned char buffer[SECTOR];
            make_sector(buffer, i, 0);
            MUST(fl_image_pwrite(image, buffer, SECTOR, i * SECTOR, &why));
        }
    atomic_store(&storage_delays, 100);
    atomic_store(&stop, false);
    for (uintptr_t i = 0; i < WRITERS; i++)
        CHECK(!pthread_create(&threads[n++], NULL, writer_body, (void *)i));
    for (uintptr_t i = 0; i < READERS; i++)
        CHECK(!pthread_create(&threads[n++], NULL, reader_body, (void *)i));
    for (uintptr_t i = 0; i < EMPTIERS; i++)
        CHECK(!pthread_create(&threads[n++], NULL, emptier_body, (void *)i));
    CHECK(!pthread_create(&threads[n++], NULL, flusher_body, (void *)1));
    sleep_ns(ns);
    atomic_store(&stop, true);
    while (n > 0)
        CHECK(!pthread_join(threads[--n], NULL));
    atomic_store(&storage_delays, 0);
    MUST(fl_image_close(image, &why));
    fl_image_free(image);
    check_image(path, 0);
    struct stat st;
    CHECK(stat(path, &st) == 0);
    printf("%u-byte clusters: file of %llu KiB for a disk of %llu KiB\n", 1u << shape.cluster_bits, (unsigned long long)st.st_size / 1024,
           (unsigned long long)shape.size / 1024);
    free(issued);
    free(acked);
    free(emptied_begun);
    free(emptied_ended);
}

int main(int argc, char **argv)
{
    static const struct shape shapes[] = {
        { 3, 16, 4, 24 * 65536, "threads.raw" }, { 3, 12, 4, 64 * 4096, NULL }, { 3, 9, 4, 192 * 512, "threads.raw" }, { 3, 12, 0, 96 * 4096, "threads.raw" },
        { 2, 12, 4, 64 * 4096, NULL }, { 3, 9, 6, 24 * 512, NULL },
    };
    CHECK(argc == 2 || argc == 3, "usage: test_qcow2_threads DIR [SECONDS]");
    directory = argv[1];
    double seconds = argc == 3 ? atof(argv[2]) : 3;
    alarm((unsigned)(seconds * 20 + 100));
    int fds = count_entries("/proc/self/fd");
    size_t count = sizeof shapes / sizeof *shapes;
    for (size_t i = 0; i < count; i++) {
        atomic_store(&storage_cannot_punch, i % 2);     /* then what is used again holds old data */
        run(&shapes[i], (uint64_t)(seconds * (double)SECOND) / count, i == 1 ? DIRECT : 0);
    }
    CHECK(count_entries("/proc/self/fd") == fds, "files were left open");
    printf("%llu writes, %llu reads, %llu clusters emptied, %llu sectors read as zeros, %llu flushes, %u punches\nok\n", (unsigned long long)writes,
           (unsigned long long)reads, (unsigned long long)emptied, (unsigned long long)zeros_seen, (unsigned long long)flushes, storage_punches);
    return 0;
}
