/* test_backup.c: copy mode of the backup job: what is copied, left out, discarded and told, in which order, and by how many. */
#define _GNU_SOURCE
#include "backup_kit.h"

#include <dlfcn.h>

/* ---- copying ---- */

static void test_copy_of_random_extents(void)
{
    static const uint32_t clusters[] = { 4096, 65536 };
    static const unsigned granules[] = { 1, 3, 16, 0 };
    uint64_t random = 7;
    for (int round = 0; round < 32; round++) {
        uint32_t cluster = clusters[round % 2];
        uint64_t size = 3 * MIB + below(&random, 2 * MIB);
        bool is_zero = round & 4, discard = round & 8;
        struct fake *fake = fake_new(size, cluster, FL_DATA, true);
        scramble(fake, &random, round % 3 == 0);
        size_t count = fake->map_count;
        fl_extent *map = copy_of_map(fake);
        fl_image *target = new_target(size + below(&random, 2) * 4096, is_zero);
        fl_backup *job = start(fake, target, (fl_backup_options){
            .granularity = granules[round / 2 % 4] * (uint64_t)cluster, .workers = (uint32_t)below(&random, 6),
            .discard = discard, .target_is_zero = is_zero, .skip_lost = 1 });
        MUST(fl_backup_wait(job, 20 * SECOND, &why));
        MUST(fl_backup_wait(job, 0, &why));

        check_target(target, fake, map, count, is_zero);
        fl_progress p = progress_of(job);
        CHECK(p.finished && p.total == size - sum_of(map, count, FL_OUTSIDE) && p.done == p.total,
              "%" PRIu64 " of %" PRIu64, p.done, p.total);
        CHECK(p.lost_bytes == sum_of_lost(map, count), "lost %" PRIu64, p.lost_bytes);
        CHECK(p.data_bytes + p.zero_bytes == sum_of(map, count, FL_DATA) + sum_of(map, count, FL_ZERO), "data and zeros");
        CHECK(p.zero_bytes >= sum_of(map, count, FL_ZERO), "zeros");
        CHECK(p.retries == 0, "%" PRIu64 " retries", p.retries);
        check_lost(job, map, count);
        for (size_t i = 0; i < fake->map_count; i++)
            CHECK(!discard || (fake->map[i].kind != FL_DATA && fake->map[i].kind != FL_ZERO),
                  "not discarded at %" PRIu64, fake->map[i].offset);
        CHECK(discard || fake->discard_count == 0, "discarded %zu times", fake->discard_count);

        uint64_t elapsed = p.elapsed_ns;
        sleep_ns(2 * MILLISECOND);
        CHECK(progress_of(job).elapsed_ns == elapsed, "the clock goes on after the end");
        end(job);
        fl_image_free(target);
        fake_free(fake);
        free(map);
    }
}

/* A target that is known to be zero is written only where there is data, at 4 KiB. */
static void test_copy_ends_sparse(void)
{
    struct fake *fake = fake_new(64 * MIB + 513, 4096, FL_ZERO, true);
    memset(fake->bytes, 0, fake->size);
    fake_set(fake, 8 * MIB, 16 * MIB, FL_DATA);         /* of which some blocks are not zero */
    for (uint64_t at = 8 * MIB; at < 24 * MIB; at += 256 * KIB)
        fake->bytes[at + at / 64 % 4096] = 1;
    fl_image *target = new_target(fake->size, true);
    fl_backup *job = start(fake, target, (fl_backup_options){ .target_is_zero = 1 });
    MUST(fl_backup_wait(job, 20 * SECOND, &why));
    fl_progress p = progress_of(job);
    fl_image_info info;
    MUST(fl_image_info_get(target, &info, &why));
    CHECK(p.data_bytes == 64 * 4096 && info.allocated <= 64 * 2 * 4096,
          "%" PRIu64 " written, %" PRIu64 " allocated", p.data_bytes, info.allocated);
    check_target(target, fake, fake->map, fake->map_count, true);
    end(job);
    fl_image_free(target);
    fake_free(fake);
}

/* Where a target must be overwritten, short zeros are written along with the data around them, long ones are zeroed. */
static void test_copy_of_short_and_long_zeros(void)
{
    for (int is_long = 0; is_long < 2; is_long++) {
        struct fake *fake = fake_new(MIB, 4096, FL_DATA, true);
        struct sink *sink = new_sink(MIB);
        memset(fake->bytes + 256 * KIB, 0, is_long ? 64 * KIB : 60 * KIB);
        fl_backup *job = start(fake, &sink->image, (fl_backup_options){ 0 });
        MUST(fl_backup_wait(job, 5 * SECOND, &why));
        CHECK(sink->count == (is_long ? 2 : 1) && sink->zero_calls == (is_long ? 1 : 0),
              "%zu writes, %" PRIu64 " zeros", sink->count, sink->zero_calls);
        CHECK(progress_of(job).zero_bytes == (is_long ? 64 * KIB : 0), "zero bytes");
        end(job);
        image_unref(&sink->image);
        fake_free(fake);
    }
}

/* Space is reserved for long runs of data, and no more than these, where the target has none yet. */
static void test_space_is_reserved_for_new_data(void)
{
    for (int is_zero = 0; is_zero < 2; is_zero++) {
        struct fake *fake = fake_new(MIB, 4096, FL_DATA, true);
        struct sink *sink = new_sink(MIB);
        memset(fake->bytes + 256 * KIB, 0, 128 * KIB);          /* data: 256 KiB, 60 KiB, 128 KiB */
        memset(fake->bytes + 444 * KIB, 0, 452 * KIB);
        fl_backup *job = start(fake, &sink->image, (fl_backup_options){ .target_is_zero = is_zero });
        MUST(fl_backup_wait(job, 5 * SECOND, &why));
        CHECK(sink->written == 444 * KIB && sink->reserved == (is_zero ? 384 * KIB : 0), "%" PRIu64 " bytes reserved", sink->reserved);
        end(job);
        image_unref(&sink->image);
        fake_free(fake);
    }
}

/* Runs of any length are one step: an empty disk of 16 TiB is done at once, zeroed or not, as a copy or in chunks. */
static void test_empty_16_tib(void)
{
    for (int is_zero = 0; is_zero < 2; is_zero++) {
        struct fake *fake = fake_new(16 * TIB + 513, 65536, FL_ZERO, false);
        fake_set(fake, 5 * TIB, TIB, FL_OUTSIDE);
        fake_set(fake, 256 * MIB, 64 * KIB, FL_OUTSIDE);        /* a granule of two kinds, between runs that are one step each */
        struct sink *sink = new_sink(16 * TIB + 513);
        uint64_t begin = clock_ns();
        fl_backup *job = start(fake, &sink->image, (fl_backup_options){ .target_is_zero = is_zero, .discard = 1 });
        MUST(fl_backup_wait(job, 20 * SECOND, &why));
        CHECK(clock_ns() - begin < 500 * MILLISECOND, "%" PRIu64 " ms", ms_since(begin));
        CHECK(sink->zeroed == (is_zero ? 0 : 15 * TIB + 513 - 64 * KIB) && sink->count == 0 && sink->flushes == 1,
              "zeroed %" PRIu64, sink->zeroed);
        CHECK(fake->discard_count == 4 && sink->zero_calls < 1000,
              "%zu discards, %" PRIu64 " zero calls", fake->discard_count, sink->zero_calls);
        CHECK(progress_of(job).zero_bytes == 15 * TIB + 513 - 64 * KIB, "zero bytes");
        end(job);
        image_unref(&sink->image);
        fake_free(fake);
    }
    struct fake *fake = fake_new(16 * TIB, 65536, FL_ZERO, false);
    fl_chunk chunk;
    for (int round = 0; round < 2; round++) {
        fl_backup *job = start(fake, NULL, (fl_backup_options){ .workers = 1 });
        uint64_t at = 0;
        int count = 0;
        for (; fl_backup_next(job, SECOND, &chunk, &why) == 0; count++) {
            CHECK(chunk.kind == FL_ZERO && !chunk.buffer, "kind %d", chunk.kind);
            if (chunk.offset != at)
                at += 64 * KIB; /* what is outside */
            CHECK(chunk.offset == at, "%" PRIu64 " at %" PRIu64, chunk.offset, at);
            at += chunk.length;
            MUST(fl_backup_ack(job, chunk.id, 1, &why));
        }
        CHECK(at == 16 * TIB && count >= 1 + round && count <= 1 + 2 * round, "%d chunks", count);
        end(job);
        fake_set(fake, 256 * MIB, 64 * KIB, FL_OUTSIDE);
    }
    CHECK(fake->discard_count == 0, "the job does not discard");
    fake_free(fake);
}

static void test_empty_disk(void)
{
    struct fake *fake = fake_new(0, 4096, FL_ZERO, false);
    struct sink *sink = new_sink(0);
    fl_chunk chunk;
    fl_backup *job = start(fake, &sink->image, (fl_backup_options){ .discard = 1 });
    MUST(fl_backup_wait(job, SECOND, &why));
    CHECK(sink->flushes == 1, "flushed %" PRIu64 " times", sink->flushes);
    end(job);
    job = start(fake, NULL, (fl_backup_options){ .discard = 1 });
    EXPECT(FL_EEND, fl_backup_next(job, SECOND, &chunk, &why));
    MUST(fl_backup_wait(job, SECOND, &why));
    end(job);
    image_unref(&sink->image);
    fake_free(fake);
}

/* ---- options ---- */

static void refused(struct fake *fake, fl_image *target, fl_backup_options options, int code, int side, const char *text)
{
    fl_backup *job;
    EXPECT(code, fl_backup_start(as_snapshot(fake), target, &options, &job, &why));
    CHECK(why.side == side && strstr(why.text, text), "side %d, \"%s\" does not say \"%s\"", why.side, why.text, text);
    CHECK(fake->references == 1, "the snapshot is kept");
}

static void test_options(void)
{
    struct fake *fake = fake_new(4 * MIB + 1, 65536, FL_ZERO, true);
    struct sink *sink = new_sink(4 * MIB + 1), *small = new_sink(4 * MIB), *read_only = new_sink(8 * MIB);
    read_only->image.writable = false;
    refused(fake, &sink->image, (fl_backup_options){ .granularity = 4096 }, EINVAL, FL_SIDE_NONE, "multiple of the cluster size");
    refused(fake, &sink->image, (fl_backup_options){ .granularity = 65537 }, EINVAL, FL_SIDE_NONE, "multiple of the cluster size");
    refused(fake, &sink->image, (fl_backup_options){ .granularity = 2 * GIB }, EINVAL, FL_SIDE_NONE, "up to 1 GiB");
    refused(fake, &sink->image, (fl_backup_options){ .workers = 65 }, EINVAL, FL_SIDE_NONE, "65 workers");
    refused(fake, NULL, (fl_backup_options){ .buffers = 1 }, EINVAL, FL_SIDE_NONE, "buffers");
    refused(fake, NULL, (fl_backup_options){ .buffers = 5000 }, EINVAL, FL_SIDE_NONE, "buffers");
    refused(fake, &small->image, (fl_backup_options){ 0 }, ENOSPC, FL_SIDE_TARGET, "sink");
    refused(fake, &read_only->image, (fl_backup_options){ 0 }, EROFS, FL_SIDE_TARGET, "writing");
    fl_image *closed = new_target(8 * MIB, true);
    MUST(fl_image_close(closed, &why));
    refused(fake, closed, (fl_backup_options){ 0 }, FL_ECLOSED, FL_SIDE_TARGET, "closed");

    MUST(image_take(&sink->image, "a source", &why));          /* the disk's own source, say */
    refused(fake, &sink->image, (fl_backup_options){ 0 }, EBUSY, FL_SIDE_TARGET, "sink");
    image_untake(&sink->image);
    image_unref(&sink->image);

    /* 64 workers, an odd granularity and the largest one are fine. */
    static const fl_backup_options fine[] = {
        { .workers = 64 }, { .granularity = 3 * 65536 }, { .granularity = GIB, .workers = 64 }, { .granularity = 65536, .buffers = 7 },
    };
    for (size_t i = 0; i < sizeof fine / sizeof *fine; i++) {
        fl_backup *job = start(fake, &sink->image, fine[i]);
        MUST(fl_backup_wait(job, SECOND, &why));
        fl_chunk chunk;
        EXPECT(EINVAL, fl_backup_next(job, 0, &chunk, &why));
        EXPECT(EINVAL, fl_backup_ack(job, 1, 1, &why));
        end(job);
    }
    fake->closed = true;
    refused(fake, &sink->image, (fl_backup_options){ 0 }, FL_ECLOSED, FL_SIDE_NONE, "closed");
    fl_image_free(closed);
    image_unref(&small->image);
    image_unref(&read_only->image);
    image_unref(&sink->image);
    fake_free(fake);
}

/* ---- workers ---- */

static void test_no_more_threads_than_work(void)
{
    struct fake *fake = fake_new(3 * MIB, 65536, FL_DATA, true);
    struct sink *sink = new_sink(3 * MIB);
    int before = count_entries("/proc/self/task");
    fake_fault(fake, (struct fake_fault){ .length = fake->size, .hangs = true });
    fl_backup *job = start(fake, &sink->image, (fl_backup_options){ .workers = 40 });
    sleep_ns(100 * MILLISECOND);
    CHECK(count_entries("/proc/self/task") == before + 3, "%d threads", count_entries("/proc/self/task") - before);
    fake_resume(fake);
    MUST(fl_backup_wait(job, 5 * SECOND, &why));
    CHECK(fake->most_reading == 3, "%u read at once", fake->most_reading);
    end(job);
    fake->most_reading = 0;
    fake_fault(fake, (struct fake_fault){ .length = fake->size, .delay_ns = 5 * MILLISECOND });
    job = start(fake, &sink->image, (fl_backup_options){ .workers = 2, .granularity = 64 * KIB });
    MUST(fl_backup_wait(job, 5 * SECOND, &why));
    CHECK(fake->most_reading == 2, "%u read at once", fake->most_reading);
    end(job);
    image_unref(&sink->image);
    fake_free(fake);
}

/* Sanitizers replace pthread_create themselves. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
#define SANITIZED 1
#endif
#endif

#ifndef SANITIZED
static atomic_int threads_allowed = 1000000;
int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*body)(void *), void *argument)
{
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
    return atomic_fetch_sub(&threads_allowed, 1) <= 0 ? EAGAIN : real(thread, attr, body, argument);
}

static void test_threads_that_cannot_start_are_not_missed(void)
{
    for (int allowed = 0; allowed < 4; allowed++) {
        struct fake *fake = fake_new(64 * MIB, 65536, FL_DATA, true);
        struct sink *sink = new_sink(fake->size);
        fl_backup *job;
        atomic_store(&threads_allowed, allowed);
        if (allowed == 0) {
            EXPECT(EAGAIN, fl_backup_start(as_snapshot(fake), &sink->image, &(fl_backup_options){ 0 }, &job, &why));
        } else {
            job = start(fake, &sink->image, (fl_backup_options){ .workers = 8 });
            MUST(fl_backup_wait(job, 5 * SECOND, &why));
            CHECK(sink->written == fake->size && fake->most_reading <= (unsigned)allowed, "%u threads", fake->most_reading);
            end(job);
        }
        atomic_store(&threads_allowed, 1000000);
        image_unref(&sink->image);
        fake_free(fake);
    }
}
#endif

/* ---- lost and discarded ranges ---- */

static void test_lost(void)
{
    struct fake *fake = fake_new(8 * MIB + 100, 4096, FL_DATA, true);
    fake_set(fake, MIB - 8192, 3 * MIB, FL_LOST);              /* over several granules: merged again */
    fake_set(fake, 6 * MIB + 4096, 4096, FL_LOST);
    fake_set(fake, 8 * MIB, 100, FL_LOST);
    size_t count = fake->map_count;
    fl_extent *map = copy_of_map(fake);
    fl_image *target = new_target(fake->size, true);
    fl_backup *job = start(fake, target, (fl_backup_options){ .workers = 4, .granularity = 64 * KIB });
    EXPECT(FL_ELOST, fl_backup_wait(job, 5 * SECOND, &why));
    CHECK(why.side == FL_SIDE_SOURCE && why.cause == EIO, "side %d, cause %d: the snapshot's own error", why.side, why.cause);
    end(job);

    job = start(fake, target, (fl_backup_options){ .workers = 8, .granularity = 64 * KIB, .skip_lost = 1, .discard = 1 });
    MUST(fl_backup_wait(job, 5 * SECOND, &why));
    check_lost(job, map, count);
    check_target(target, fake, map, count, true);
    fl_progress p = progress_of(job);
    CHECK(p.lost_bytes == 3 * MIB + 4096 + 100 && p.done == p.total, "lost %" PRIu64, p.lost_bytes);
    end(job);
    fl_image_free(target);
    fake_free(fake);
    free(map);
}

/* Lost ranges that are met in any order end up merged and in order. */
static void test_lost_out_of_order(void)
{
    struct fake *fake = fake_new(64 * MIB, 4096, FL_DATA, false);
    for (uint64_t at = 0; at < fake->size; at += 64 * KIB)
        if (at % (320 * KIB))
            fake_set(fake, at, 64 * KIB, FL_LOST);
    fake_set(fake, 32 * MIB, 4 * MIB, FL_LOST);
    size_t count = fake->map_count;
    fl_extent *map = copy_of_map(fake);
    fake->hot = malloc(40 * sizeof *fake->hot);
    for (uint64_t random = 3; fake->hot_count < 40; )          /* out of order, and with data and lost clusters in one granule */
        fake->hot[fake->hot_count++] = below(&random, 64) * MIB;
    struct sink *sink = new_sink(fake->size);
    fl_backup *job = start(fake, &sink->image, (fl_backup_options){ .workers = 8, .skip_lost = 1, .discard = 1,
                           .granularity = 192 * KIB });
    MUST(fl_backup_wait(job, 5 * SECOND, &why));
    check_lost(job, map, count);
    CHECK(progress_of(job).done == fake->size, "done");
    end(job);
    image_unref(&sink->image);
    fake_free(fake);
    free(map);
}

/* What is lost, or discarded by its owner, between the look at the extents and the read. */
static void test_overtaken_while_it_reads(void)
{
    for (int round = 0; round < 4; round++) {
        bool chunks = round & 1, skip_lost = round & 2;
        struct fake *fake = fake_new(4 * MIB, 4096, FL_DATA, true);
        static const uint64_t offsets[] = { 0, MIB + 64 * KIB, MIB + 128 * KIB, 2 * MIB - 4096, 4 * MIB - 4096 };
        for (size_t i = 0; i < 5; i++)
            fake->turns[fake->turn_count++] = (struct fake_turn){ offsets[i], i % 2 ? FL_LOST : FL_DISCARDED };
        fake_set(fake, MIB + 512 * KIB, 64 * KIB, FL_OUTSIDE);         /* so that this granule's extents are known some steps ahead */
        fl_image *target = chunks ? NULL : new_target(fake->size, true);
        fl_backup *job = start(fake, target, (fl_backup_options){ .workers = 2, .skip_lost = skip_lost, .target_is_zero = 1 });
        fl_chunk chunk;
        int rc = 0;
        uint64_t at = 0;
        while (chunks && (rc = fl_backup_next(job, 5 * SECOND, &chunk, &why)) == 0) {
            for (; at < chunk.offset; at += 4096)
                CHECK(fake_kind(fake, at) != FL_DATA, "data at %" PRIu64 " did not come", at);
            CHECK(chunk.offset == at && chunk.kind == FL_DATA && !memcmp(chunk.buffer, fake->bytes + at, chunk.length),
                  "chunk at %" PRIu64, at);
            at += chunk.length;
            MUST(fl_backup_ack(job, chunk.id, 0, &why));
        }
        if (skip_lost) {
            CHECK(!chunks || (rc == -FL_EEND && at == fake->size - 4096), "%d at %" PRIu64, rc, at);
            MUST(fl_backup_wait(job, 5 * SECOND, &why));
            fl_progress p = progress_of(job);
            CHECK(p.lost_bytes == 5 * 4096 && p.done == p.total && p.data_bytes == p.total - 5 * 4096, "lost %" PRIu64, p.lost_bytes);
            CHECK(p.retries == 5, "%" PRIu64 " retries", p.retries);
            if (!chunks)
                check_target(target, fake, fake->map, fake->map_count, true);
        } else {
            CHECK(!chunks || (rc == -FL_EDISCARDED && at == 0), "%d at %" PRIu64, rc, at);
            rc = fl_backup_wait(job, 5 * SECOND, &why);         /* of two workers, either may fail first */
            CHECK(rc == -FL_EDISCARDED || rc == -FL_ELOST, "%d", rc);
        }
        end(job);
        fl_image_free(target);
        fake_free(fake);
    }
}

/* ---- hot first ---- */

static void check_read_once(struct fake *fake)
{
    uint8_t *seen = calloc(1, fake->size);
    CHECK(seen, "no memory");
    for (size_t i = 0; i < fake->read_count; i++)
        for (uint64_t at = fake->reads[i].offset; at < fake->reads[i].offset + fake->reads[i].length; at += 512)
            CHECK(!seen[at]++, "%" PRIu64 " was read twice", at);
    free(seen);
}

static void test_hot_first(void)
{
    static const uint64_t hot[] = { 9, 30, 10, 3, 31, 20, 9 };         /* granules; some next to each other, one twice */
    const uint64_t granule = 64 * KIB;
    struct fake *fake = fake_new(32 * granule - 700, 4096, FL_DATA, true);
    fake_set(fake, 18 * granule, 8 * granule, FL_ZERO);
    fake_set(fake, 20 * granule + 4096, 4096, FL_DATA);                /* a hot cluster in the middle of a run of zeros */
    fake->hot = malloc(sizeof hot);
    for (size_t i = 0; i < 7; i++)
        fake->hot[fake->hot_count++] = hot[i] * granule + (i == 5 ? 4096 : i * 4096);
    struct sink *sink = new_sink(fake->size);
    fl_backup *job = start(fake, &sink->image, (fl_backup_options){ .workers = 1, .granularity = granule, .discard = 1,
                           .target_is_zero = 1 });
    MUST(fl_backup_wait(job, 5 * SECOND, &why));
    uint64_t next = 0;
    for (size_t i = 0; i < fake->discard_count; i++) {
        uint64_t offset = fake->discards[i].offset, first = offset / granule;
        if (i < 6) {
            CHECK(first == hot[i] && fake->discards[i].length == MIN(granule, fake->size - offset),
                  "discard %zu is of %" PRIu64, i, first);
            continue;
        }
        while (next == 3 || next == 9 || next == 10 || next == 20 || next == 30 || next == 31)
            next++;
        CHECK(first == next, "discard %zu is of %" PRIu64 ", not %" PRIu64, i, first, next);
        next += div_up(fake->discards[i].length, granule);
    }
    CHECK(next == 30, "ended at %" PRIu64, next);
    CHECK(sink->writes[0].offset == 9 * granule && sink->writes[1].offset == 30 * granule,
          "written first: %" PRIu64, sink->writes[0].offset);
    CHECK(sink->reserved == 19 * granule, "%" PRIu64 " bytes reserved, those while the stage fills among them", sink->reserved);
    CHECK(fake->map_count == 1 && fake->map[0].kind == FL_DISCARDED, "not all was discarded");
    check_read_once(fake);
    fl_progress p = progress_of(job);
    CHECK(p.done == fake->size && p.data_bytes == 24 * granule - 700 + 4096, "%" PRIu64 " of data", p.data_bytes);
    end(job);
    image_unref(&sink->image);
    fake_free(fake);
}

/* Many workers, many hot clusters that come and go, fragmented extents: each byte is still copied once, and none is taken for lost. */
static void test_hot_with_many_workers(void)
{
    uint64_t random = 11;
    for (int round = 0; round < 12; round++) {
        struct fake *fake = fake_new(6 * MIB + 3 * 512, 4096, FL_DATA, true);
        scramble(fake, &random, round % 2);
        size_t count = fake->map_count;
        fl_extent *map = copy_of_map(fake);
        fake->hot = malloc(100 * sizeof *fake->hot);
        while (fake->hot_count < 100)
            fake->hot[fake->hot_count++] = below(&random, fake->size / 4096) * 4096;
        for (size_t i = fake->hot_count; i-- > 0; ) {           /* what the store holds is data */
            int kind = fake_kind(fake, fake->hot[i]);
            if (kind != FL_DATA)
                fake->hot[i] = fake->hot[--fake->hot_count];
        }
        bool is_zero = round & 2;
        fl_image *target = new_target(fake->size, is_zero);
        fl_backup *job = start(fake, target, (fl_backup_options){
            .workers = 8, .granularity = 4096u << below(&random, 6), .discard = 1, .target_is_zero = is_zero, .skip_lost = 1 });
        MUST(fl_backup_wait(job, 5 * SECOND, &why));
        check_target(target, fake, map, count, is_zero);
        check_read_once(fake);
        fl_progress p = progress_of(job);
        CHECK(p.done == p.total && p.lost_bytes == sum_of_lost(map, count), "%" PRIu64 " of %" PRIu64, p.done, p.total);
        check_lost(job, map, count);
        end(job);
        fl_image_free(target);
        fake_free(fake);
        free(map);
    }
}

/* ---- */

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(copy_of_random_extents), TEST(copy_ends_sparse), TEST(copy_of_short_and_long_zeros), TEST(space_is_reserved_for_new_data), TEST(empty_16_tib),
        TEST(empty_disk), TEST(options), TEST(no_more_threads_than_work),
#ifndef SANITIZED
        TEST(threads_that_cannot_start_are_not_missed),
#endif
        TEST(lost), TEST(lost_out_of_order), TEST(overtaken_while_it_reads), TEST(hot_first), TEST(hot_with_many_workers),
    };
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
