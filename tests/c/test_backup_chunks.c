/* test_backup_chunks.c: chunks mode of the backup job: reading ahead, handing out in order, acknowledging in any order. */
#define _GNU_SOURCE
#include "backup_kit.h"

struct consumer {
    fl_backup *job;
    struct fake *fake;
    const fl_extent *map;
    size_t map_count;
    uint64_t seed, granularity;
    unsigned keeps;             /* chunks with buffers at once, at most */
    uint8_t *seen;              /* by byte; shared, each byte by one thread */
};

/* The kinds of the map allow this chunk, and its bytes are right. */
static void check_chunk(struct consumer *c, const fl_chunk *chunk)
{
    struct fake *fake = c->fake;
    CHECK(chunk->length > 0 && in_range(chunk->length, chunk->offset, fake->size),
          "chunk of %" PRIu64 " at %" PRIu64, chunk->length, chunk->offset);
    CHECK(chunk->offset % fake->cluster == 0, "chunk at %" PRIu64, chunk->offset);
    CHECK((chunk->offset + chunk->length) % fake->cluster == 0 || chunk->offset + chunk->length == fake->size,
          "length %" PRIu64, chunk->length);
    CHECK((chunk->kind == FL_DATA) == (chunk->buffer != NULL), "kind %d", chunk->kind);
    if (chunk->kind == FL_DATA) {
        CHECK(chunk->offset / c->granularity == (chunk->offset + chunk->length - 1) / c->granularity, "data over a granule's end");
        CHECK(!is_zero(chunk->buffer, chunk->length), "zeros at %" PRIu64 " as data", chunk->offset);
    }
    for (size_t i = 0; i < c->map_count; i++) {
        uint64_t from = MAX(c->map[i].offset, chunk->offset), to = MIN(c->map[i].offset + c->map[i].length,
            chunk->offset + chunk->length);
        if (from >= to)
            continue;
        CHECK(c->map[i].kind == FL_DATA || c->map[i].kind == FL_ZERO, "kind %d at %" PRIu64, c->map[i].kind, from);
        if (chunk->kind == FL_DATA)
            check_bytes(fake, c->map[i].kind, (uint8_t *)chunk->buffer + (from - chunk->offset), to - from, from, 0);
        else
            CHECK(c->map[i].kind == FL_ZERO || is_zero(fake->bytes + from, to - from), "data at %" PRIu64 " as zeros", from);
    }
}

static void *consume(void *argument)
{
    struct consumer *c = argument;
    fl_chunk *kept = malloc(100000 * sizeof *kept), chunk;
    CHECK(kept, "no memory");
    size_t count = 0, with_buffer = 0;
    uint64_t last = 0;
    int rc;
    for (;;) {
        bool full = with_buffer >= c->keeps;
        if (count && (full || chance(&c->seed, 30))) {          /* any one of those that I have */
            size_t i;
            do
                i = below(&c->seed, count);
            while (full && kept[i].kind != FL_DATA);
            chunk = kept[i];
            kept[i] = kept[--count];
            with_buffer -= chunk.kind == FL_DATA;
            check_chunk(c, &chunk);
            MUST(fl_backup_ack(c->job, chunk.id, 1, &why));
            EXPECT(EINVAL, fl_backup_ack(c->job, chunk.id, 1, &why));
            continue;
        }
        rc = fl_backup_next(c->job, 20 * MILLISECOND, &chunk, &why);
        if (rc == -FL_ERUNNING) {                                 /* other consumers may hold what is needed; give back something */
            for (size_t i = 0; i < count; i++) {
                check_chunk(c, &kept[i]);
                MUST(fl_backup_ack(c->job, kept[i].id, 1, &why));
            }
            count = with_buffer = 0;
            continue;
        }
        if (rc == -FL_EEND)
            break;
        CHECK(rc == 0, "%d: %s", rc, why.text);
        CHECK(chunk.offset >= last, "%" PRIu64 " comes after %" PRIu64, chunk.offset, last);
        CHECK(is_zero(c->seen + chunk.offset, chunk.length), "%" PRIu64 " at %" PRIu64 " comes twice", chunk.length, chunk.offset);
        memset(c->seen + chunk.offset, 1, chunk.length);
        last = chunk.offset + chunk.length;
        kept[count++] = chunk;
        with_buffer += chunk.kind == FL_DATA;
    }
    while (count-- > 0) {
        check_chunk(c, &kept[count]);
        MUST(fl_backup_ack(c->job, kept[count].id, 1, &why));
    }
    free(kept);
    return NULL;
}

static void test_chunks(void)
{
    uint64_t random = 5;
    for (int round = 0; round < 24; round++) {
        uint32_t cluster = round % 2 ? 4096 : 65536;
        unsigned consumers = round % 3 == 0 ? 1 : (unsigned)(1 + below(&random, 4));
        struct fake *fake = fake_new(3 * MIB + below(&random, 2 * MIB), cluster, FL_DATA, true);
        scramble(fake, &random, round % 4 == 0);
        size_t count = fake->map_count;
        fl_extent *map = copy_of_map(fake);
        uint8_t *seen = calloc(1, fake->size);
        fl_backup_options options = { .granularity = cluster * (1 + below(&random, 20)), .workers = (uint32_t)below(&random, 6),
                                      .skip_lost = 1,
                                      .buffers = consumers == 1 ? 3 : 2 + (uint32_t)below(&random, 8), .discard = 1 };
        fl_backup *job = start(fake, NULL, options);
        EXPECT(EINVAL, fl_backup_ack(job, 0, 1, &why));
        EXPECT(EINVAL, fl_backup_ack(job, UINT64_MAX, 1, &why));
        struct consumer c[4];
        pthread_t threads[4];
        for (unsigned i = 0; i < consumers; i++) {
            c[i] = (struct consumer){ .job = job, .fake = fake, .map = map, .map_count = count, .seed = next_random(&random),
                                      .granularity = options.granularity, .keeps = consumers == 1 ? 2 : 4, .seen = seen };
            pthread_create(&threads[i], NULL, consume, &c[i]);
        }
        for (unsigned i = 0; i < consumers; i++)
            pthread_join(threads[i], NULL);
        MUST(fl_backup_wait(job, SECOND, &why));
        for (size_t i = 0; i < count; i++)
            for (uint64_t at = map[i].offset; at < map[i].offset + map[i].length; at += 512)
                CHECK(seen[at] == (map[i].kind == FL_DATA || map[i].kind == FL_ZERO), "byte %" PRIu64 " of kind %d", at, map[i].kind);
        for (size_t i = 0; i < fake->map_count; i++)
            CHECK(fake->map[i].kind != FL_DATA && fake->map[i].kind != FL_ZERO, "%" PRIu64 " was not discarded", fake->map[i].offset);
        fl_progress p = progress_of(job);
        CHECK(p.finished && p.done == p.total && p.lost_bytes == sum_of_lost(map, count), "%" PRIu64 " of %" PRIu64, p.done, p.total);
        end(job);
        fake_free(fake);
        free(map);
        free(seen);
    }
}

/* A consumer that keeps all buffers but one gets on, and gets no more than there are. */
static void test_chunks_with_one_buffer_left(void)
{
    struct fake *fake = fake_new(32 * MIB, 4096, FL_DATA, true);
    fl_backup *job = start(fake, NULL, (fl_backup_options){ .buffers = 4 });
    fl_chunk kept[4], chunk;
    for (int i = 0; i < 3; i++)
        MUST(fl_backup_next(job, SECOND, &kept[i], &why));
    for (uint64_t at = 3 * MIB; at < 31 * MIB; at += MIB) {
        MUST(fl_backup_next(job, SECOND, &chunk, &why));
        CHECK(chunk.offset == at, "offset %" PRIu64, chunk.offset);
        MUST(fl_backup_ack(job, chunk.id, 0, &why));
    }
    MUST(fl_backup_next(job, SECOND, &chunk, &why));
    EXPECT(FL_EEND, fl_backup_next(job, 0, &kept[3], &why));
    EXPECT(FL_ERUNNING, fl_backup_wait(job, 10 * MILLISECOND, &why));     /* not acknowledged */
    CHECK(progress_of(job).done == 28 * MIB && progress_of(job).finished, "done");
    for (int i = 0; i < 3; i++) {
        CHECK(!memcmp(kept[i].buffer, fake->bytes + kept[i].offset, MIB), "a buffer that was kept has changed");
        MUST(fl_backup_ack(job, kept[i].id, 0, &why));
    }
    EXPECT(FL_ERUNNING, fl_backup_wait(job, 0, &why));
    MUST(fl_backup_ack(job, chunk.id, 0, &why));
    MUST(fl_backup_wait(job, SECOND, &why));
    end(job);

    job = start(fake, NULL, (fl_backup_options){ .buffers = 2 });
    MUST(fl_backup_next(job, SECOND, &kept[0], &why));
    MUST(fl_backup_next(job, SECOND, &kept[1], &why));
    EXPECT(FL_ERUNNING, fl_backup_next(job, 30 * MILLISECOND, &chunk, &why));
    end(job);                   /* with chunks out */
    fake_free(fake);
}

/* Zeros are one chunk as far as they go, be they a hole, or data that turned out to be zeros. */
static void test_chunks_of_zeros(void)
{
    struct fake *fake = fake_new(64 * MIB, 4096, FL_DATA, true);
    memset(fake->bytes + 8 * MIB, 0, 8 * MIB);
    fake_set(fake, 10 * MIB, 6 * MIB, FL_ZERO);
    fl_backup *job = start(fake, NULL, (fl_backup_options){ .buffers = 64, .workers = 1 });
    sleep_ns(100 * MILLISECOND);        /* all of it is ready */
    fl_chunk chunk;
    uint64_t at = 0, zero_chunks = 0;
    while (fl_backup_next(job, 5 * SECOND, &chunk, NULL) == 0) {
        CHECK(chunk.offset == at, "%" PRIu64 " at %" PRIu64, chunk.offset, at);
        at += chunk.length;
        if (chunk.kind == FL_ZERO) {
            zero_chunks++;
            CHECK(chunk.offset >= 8 * MIB && at <= 16 * MIB, "zeros at %" PRIu64, chunk.offset);
        }
        MUST(fl_backup_ack(job, chunk.id, 0, &why));
    }
    MUST(fl_backup_wait(job, SECOND, &why));
    CHECK(at == fake->size && zero_chunks >= 1 && zero_chunks <= 7, "%" PRIu64 " chunks of zeros", zero_chunks);
    CHECK(progress_of(job).zero_bytes == 8 * MIB, "zeros");
    end(job);
    fake_free(fake);
}

/* A consumer may keep any number of zero chunks: they have no buffers. */
static void test_many_zero_chunks_kept(void)
{
    struct fake *fake = fake_new(64 * MIB, 4096, FL_DATA, false);
    for (uint64_t at = 0; at < fake->size; at += 128 * KIB)
        fake_set(fake, at, 64 * KIB, FL_OUTSIDE);
    for (int round = 0; round < 2; round++) {
        fl_backup *job = start(fake, NULL, (fl_backup_options){ .granularity = 64 * KIB, .workers = 4, .buffers = 2 });
        uint64_t ids[512], count = 0;
        fl_chunk chunk;
        while (fl_backup_next(job, 5 * SECOND, &chunk, &why) == 0) {
            CHECK(chunk.kind == FL_ZERO && chunk.length == 64 * KIB && count < 512, "length %" PRIu64, chunk.length);
            ids[count++] = chunk.id;
        }
        CHECK(count == 512 && why.code == -FL_EEND, "%" PRIu64 " chunks, %s", count, why.text);
        while (count-- > 0)
            MUST(fl_backup_ack(job, ids[count], 0, &why));
        MUST(fl_backup_wait(job, SECOND, &why));
        end(job);
    }
    fake_free(fake);
}

/* The read at chunk k fails: all chunks before it come, in order, then the failure, and nothing more. */
static void test_chunks_until_a_failure(void)
{
    for (uint64_t k = 0; k < 12; k++) {
        struct fake *fake = fake_new(12 * 64 * KIB, 4096, FL_DATA, true);
        uint64_t offset = k * 64 * KIB + (k % 3) * 4096;
        if (k % 3)              /* the granule's front is an extent of its own, which is read before */
            fake_set(fake, offset - 4096, 4096, FL_OUTSIDE);
        if (k) {                /* the granule before takes its time, and more than one read; those behind are ready long before */
            fake_set(fake, (k - 1) * 64 * KIB + 8192, 4096, FL_OUTSIDE);
            fake_fault(fake, (struct fake_fault){ .offset = (k - 1) * 64 * KIB, .length = 1, .delay_ns = 20 * MILLISECOND });
        }
        fake_fault(fake, (struct fake_fault){ .offset = offset, .length = 4096, .delay_ns = 10 * MILLISECOND, .code = EIO,
                   .side = FL_SIDE_SOURCE });
        fl_backup *job = start(fake, NULL, (fl_backup_options){ .granularity = 64 * KIB, .workers = 6 });
        fl_chunk chunk;
        int rc;
        uint64_t at = 0;
        while ((rc = fl_backup_next(job, 5 * SECOND, &chunk, &why)) == 0) {
            CHECK(chunk.offset >= at && chunk.offset + chunk.length <= offset, "%" PRIu64 " at %" PRIu64, chunk.offset, at);
            at = chunk.offset + chunk.length;
            CHECK(!memcmp(chunk.buffer, fake->bytes + chunk.offset, chunk.length), "bytes at %" PRIu64, chunk.offset);
            if (k % 2)
                MUST(fl_backup_ack(job, chunk.id, 1, &why));
        }
        uint64_t want = k % 3 == 1 ? k * 64 * KIB : k % 3 == 2 ? k * 64 * KIB + 4096 : offset;
        CHECK(rc == -EIO && why.side == FL_SIDE_SOURCE && why.offset == offset && at == want,
              "%d after %" PRIu64 " for %" PRIu64, rc, at, offset);
        EXPECT(EIO, fl_backup_next(job, 0, &chunk, &why));
        EXPECT(EIO, fl_backup_wait(job, SECOND, &why));
        end(job);
        fake_free(fake);
    }
}

/* What was read before the snapshot broke is right: it is handed out and acknowledged, and if it was all, the job has succeeded. */
static void test_chunks_of_a_snapshot_that_breaks(void)
{
    for (int all = 0; all < 2; all++) {
        struct fake *fake = fake_new(8 * MIB, 4096, FL_DATA, true);
        fl_backup *job = start(fake, NULL, (fl_backup_options){ .buffers = all ? 16 : 3, .discard = 1 });
        fl_chunk chunk;
        uint64_t at = 0;
        int rc;
        sleep_ns(100 * MILLISECOND);    /* what there are buffers for is ready */
        fake_break(fake);
        while ((rc = fl_backup_next(job, SECOND, &chunk, &why)) == 0) {
            CHECK(chunk.offset == at && !memcmp(chunk.buffer, fake->bytes + at, chunk.length), "chunk at %" PRIu64, chunk.offset);
            at += chunk.length;
            MUST(fl_backup_ack(job, chunk.id, 1, &why));
        }
        CHECK(rc == (all ? -FL_EEND : -FL_EBROKEN) && at == (all ? 8 : 3) * MIB, "%d at %" PRIu64, rc, at);
        EXPECT(all ? 0 : FL_EBROKEN, fl_backup_wait(job, SECOND, &why));
        CHECK(all || why.side == FL_SIDE_FLEECING, "side %d", why.side);
        end(job);
        fake_free(fake);
    }
}

static void test_chunks_cancelled(void)
{
    struct fake *fake = fake_new(12 * MIB, 4096, FL_DATA, true);
    fl_backup *job = start(fake, NULL, (fl_backup_options){ .discard = 1 });
    fl_chunk chunk;
    MUST(fl_backup_next(job, SECOND, &chunk, &why));
    sleep_ns(50 * MILLISECOND);         /* more is ready */
    CHECK(fl_backup_cancel(job) == 0, "cancel");
    fl_chunk other;
    EXPECT(FL_ECANCELLED, fl_backup_next(job, SECOND, &other, &why));
    EXPECT(FL_ECANCELLED, fl_backup_wait(job, SECOND, &why));
    MUST(fl_backup_ack(job, chunk.id, 1, &why));               /* what the consumer has, it has */
    CHECK(fake_kind(fake, 0) == FL_DISCARDED && fake_kind(fake, MIB) == FL_DATA, "discarded");
    end(job);

    job = start(fake, NULL, (fl_backup_options){ .speed = 4096, .skip_lost = 1 });      /* workers that sleep */
    EXPECT(FL_ERUNNING, fl_backup_next(job, 20 * MILLISECOND, &chunk, &why));
    end(job);
    fake_free(fake);
}

/* ---- */

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(chunks), TEST(chunks_with_one_buffer_left), TEST(chunks_of_zeros), TEST(many_zero_chunks_kept),
        TEST(chunks_until_a_failure), TEST(chunks_of_a_snapshot_that_breaks), TEST(chunks_cancelled),
    };
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
