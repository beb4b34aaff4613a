/* backup_kit.h: what the tests of the backup job share: targets, starting and ending jobs, random snapshots, and main.
 *
 *   test_backup... DIR [TEST]   DIR: for nameless target images; TEST: only tests whose name contains it
 */
#ifndef BACKUP_KIT_H
#define BACKUP_KIT_H

#include "fake_snapshot.h"

#define KIB 1024ull
#define MIB (1024 * KIB)
#define GIB (1024 * MIB)
#define TIB (1024 * GIB)
#define OLD 0xee                /* what a target holds that is not known to be zero */

static const char *directory;

static inline uint64_t ms_since(uint64_t begin) { return (clock_ns() - begin) / MILLISECOND; }

/* ---- targets ---- */

static inline fl_image *new_target(uint64_t size, bool is_zero)
{
    fl_image *image;
    MUST(fl_image_create_nameless(directory, size, &image, &why));
    if (!is_zero) {
        uint8_t *old = malloc(size);
        CHECK(old, "no memory");
        memset(old, OLD, size);
        MUST(fl_image_pwrite(image, old, size, 0, &why));
        free(old);
    }
    return image;
}

/* A target without storage: it keeps a log, so it can be as large as a test likes. */
struct sink {
    fl_image image;
    pthread_mutex_t lock;       /* protects the log */
    struct range *writes;
    size_t count, room;
    uint64_t written, reserved, zeroed, zero_calls, flushes, hold_ns;
};

static inline int sink_writev(fl_image *image, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error)
{
    struct sink *sink = (struct sink *)(void *)image;
    (void)iov, (void)count, (void)error;
    pthread_mutex_lock(&sink->lock);
    log_range(&sink->writes, &sink->count, &sink->room, offset, length);
    sink->written += length;
    pthread_mutex_unlock(&sink->lock);
    if (sink->hold_ns)
        sleep_ns(sink->hold_ns);
    return 0;
}

static inline int sink_zero(fl_image *image, uint64_t count, uint64_t offset, fl_error *error)
{
    struct sink *sink = (struct sink *)(void *)image;
    (void)offset, (void)error;
    pthread_mutex_lock(&sink->lock);
    sink->zeroed += count;
    sink->zero_calls++;
    pthread_mutex_unlock(&sink->lock);
    return 0;
}

static inline bool sink_reserve(fl_image *image, uint64_t count, uint64_t offset)
{
    struct sink *sink = (struct sink *)(void *)image;
    (void)offset;
    pthread_mutex_lock(&sink->lock);
    sink->reserved += count;
    pthread_mutex_unlock(&sink->lock);
    return true;
}

static inline int sink_flush(fl_image *image, fl_error *error)
{
    struct sink *sink = (struct sink *)(void *)image;
    (void)error;
    pthread_mutex_lock(&sink->lock);
    sink->flushes++;
    pthread_mutex_unlock(&sink->lock);
    return 0;
}

static inline void sink_destroy(fl_image *image)
{
    struct sink *sink = (struct sink *)(void *)image;
    pthread_mutex_destroy(&sink->lock);
    free(sink->writes);
}

static const struct image_ops sink_ops = {
    .format = "sink", .writev = sink_writev, .zero = sink_zero, .reserve = sink_reserve, .flush = sink_flush,
    .destroy = sink_destroy,
};

static inline struct sink *new_sink(uint64_t size)
{
    struct sink *sink = image_alloc(sizeof *sink);
    CHECK(sink, "no memory");
    CHECK(image_init(&sink->image, &sink_ops, "sink") == 0, "image_init");
    pthread_mutex_init(&sink->lock, NULL);
    sink->image.size = size;
    sink->image.cluster_size = 4096;
    sink->image.alignment = 1;
    sink->image.writable = true;
    return sink;
}

/* ---- jobs ---- */

static inline fl_backup *start(struct fake *fake, fl_image *target, fl_backup_options options)
{
    if (!options.granularity)       /* not the default, which follows measurements */
        options.granularity = fake->cluster > MIB ? fake->cluster : MIB;
    fl_backup *job;
    MUST(fl_backup_start(as_snapshot(fake), target, &options, &job, &why));
    return job;
}

static inline fl_progress progress_of(fl_backup *job)
{
    fl_progress progress;
    MUST(fl_backup_progress(job, &progress, &why));
    return progress;
}

/* Close and free it, and see that it took at most `limit`. */
static inline void end_within(fl_backup *job, uint64_t limit)
{
    uint64_t begin = clock_ns();
    MUST(fl_backup_close(job, &why));
    uint64_t took = clock_ns() - begin;
    CHECK(took < limit, "close took %" PRIu64 " ms", ms_since(begin));
    begin = clock_ns();
    MUST(fl_backup_close(job, &why));           /* a worker that hangs is waited for once */
    CHECK(ms_since(begin) < 500, "the second close took %" PRIu64 " ms", ms_since(begin));
    EXPECT(FL_ECLOSED, fl_backup_wait(job, 0, &why));
    EXPECT(FL_ECLOSED, fl_backup_set_speed(job, 1, &why));
    CHECK(fl_backup_cancel(job) == -FL_ECLOSED, "cancel of a closed job");
    fl_backup_free(job);
}

static inline void end(fl_backup *job) { end_within(job, 500 * MILLISECOND); }

static inline bool fault_hangs(void *image) { return fl_fault_hanging(image) > 0; }
static inline bool fake_hangs(void *fake) { return fake_hanging(fake) > 0; }

/* `got` is what a range of this kind must come to; `other` is what is there if it is neither data nor zeros. */
static inline void check_bytes(const struct fake *fake, int kind, const uint8_t *got, uint64_t length, uint64_t offset, uint8_t other)
{
    if (kind == FL_DATA) {
        CHECK(!memcmp(got, fake->bytes + offset, length), "wrong data in %" PRIu64 " at %" PRIu64, length, offset);
        return;
    }
    uint8_t want = kind == FL_ZERO ? 0 : other;
    CHECK(length == 0 || (got[0] == want && !memcmp(got, got + 1, length - 1)),
          "not %02x in %" PRIu64 " at %" PRIu64, want, length, offset);
}

/* What `target` must hold after a job over a fake whose map was `map` at the start. */
static inline void check_target(fl_image *target, const struct fake *fake, const fl_extent *map, size_t count, bool is_zero)
{
    uint8_t *got = malloc(fake->size);
    CHECK(got, "no memory");
    MUST(fl_image_pread(target, got, fake->size, 0, &why));
    for (size_t i = 0; i < count; i++)
        check_bytes(fake, map[i].kind, got + map[i].offset, map[i].length, map[i].offset, is_zero ? 0 : OLD);
    free(got);
}

static inline uint64_t sum_of(const fl_extent *map, size_t count, int kind)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += map[i].kind == kind ? map[i].length : 0;
    return sum;
}

static inline uint64_t sum_of_lost(const fl_extent *map, size_t count)
{
    return sum_of(map, count, FL_LOST) + sum_of(map, count, FL_DISCARDED);
}

/* Random extents, most of them data and zeros, some of the other kinds; and zeros of all lengths in the data. */
static inline void scramble(struct fake *fake, uint64_t *random, bool other_kinds)
{
    static const int kinds[] = { FL_DATA, FL_ZERO, FL_DATA, FL_ZERO, FL_DATA, FL_ZERO, FL_OUTSIDE, FL_LOST, FL_DISCARDED };
    for (int i = 0; i < 200; i++) {
        int kind = kinds[below(random, other_kinds ? 9 : 6)];
        /* A source's holes need not be aligned to the snapshot's clusters; but all other kinds are of whole clusters. */
        uint64_t unit = kind == FL_ZERO && chance(random, 30) && !other_kinds ? 512 : fake->cluster;
        uint64_t offset = below(random, div_up(fake->size, unit)) * unit;
        uint64_t length = (1 + below(random, chance(random, 20) ? 64 : 5)) * unit;
        fake_set(fake, offset, MIN(length, fake->size - offset), kind);
    }
    for (int i = 0; i < 60; i++) {
        uint64_t offset = below(random, fake->size);
        uint64_t length = MIN(below(random, chance(random, 20) ? 300 * KIB : 20 * KIB), fake->size - offset);
        if (chance(random, 60))
            offset = align_down(offset, 4096);
        memset(fake->bytes + offset, 0, MIN(length, fake->size - offset));
    }
}

static inline fl_extent *copy_of_map(const struct fake *fake)
{
    fl_extent *map = malloc(fake->map_count * sizeof *map);
    CHECK(map, "no memory");
    return memcpy(map, fake->map, fake->map_count * sizeof *map);
}

/* The ranges that the job tells it skipped are those of the map: merged, in order. */
static inline void check_lost(fl_backup *job, const fl_extent *map, size_t count)
{
    fl_extent lost[3];
    size_t found, index = 0;
    for (size_t i = 0; i < count; i++) {
        if (map[i].kind != FL_LOST && map[i].kind != FL_DISCARDED)
            continue;
        MUST(fl_backup_lost(job, index, lost, 1 + index % 3, &found, &why));
        CHECK(found > 0, "lost range %zu is missing", index);
        CHECK(lost[0].offset == map[i].offset && lost[0].length == map[i].length && lost[0].kind == map[i].kind,
              "lost range %zu is %" PRIu64 " at %" PRIu64, index, lost[0].length, lost[0].offset);
        index++;
    }
    MUST(fl_backup_lost(job, index, lost, 3, &found, &why));
    CHECK(found == 0, "more than %zu lost ranges", index);
}

/* ---- main ---- */

struct test { const char *name; void (*run)(void); };
#define TEST(name) { #name, test_##name }

/* Run the tests, each of which must leave no thread and no file behind. */
static int run_tests(const struct test *tests, size_t count, int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: %s DIR [TEST]\n", argv[0]);
        return 2;
    }
    directory = argv[1];
    int threads = tasks_at_start(), files = count_entries("/proc/self/fd");
    for (size_t i = 0; i < count; i++) {
        if (argc > 2 && !strstr(tests[i].name, argv[2]))
            continue;
        uint64_t begin = clock_ns();
        tests[i].run();
        check_comes_down("/proc/self/task", threads, 2 * SECOND);
        check_comes_down("/proc/self/fd", files, 2 * SECOND);
        printf("%-45s %6.3f s\n", tests[i].name, (double)(clock_ns() - begin) / 1e9);
        fflush(stdout);
    }
    return 0;
}

#endif
