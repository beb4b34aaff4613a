/* test_backup_control.c: the backup job's speed, cancel, close, failures, hangs, writeback, interrupts and forks. */
#define _GNU_SOURCE
#include "backup_kit.h"
#include "throttle.h"

#include <fcntl.h>
#include <sys/wait.h>

/* ---- speed ---- */

static void test_speed(void)
{
    static const struct { uint64_t speed, bytes; uint32_t workers; } runs[] = {
        { 20 * MIB, 30 * MIB, 4 }, { 3 * MIB, 4 * MIB, 16 }, { 64 * MIB, 80 * MIB, 1 },
    };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        struct fake *fake = fake_new(GIB, 4096, FL_ZERO, false);       /* zeros that are read as data take their time, too */
        fake_set(fake, 16 * MIB, runs[i].bytes, FL_DATA);
        struct sink *sink = new_sink(GIB);
        uint64_t begin = clock_ns();
        fl_backup *job = start(fake, &sink->image, (fl_backup_options){ .speed = runs[i].speed, .workers = runs[i].workers,
                               .target_is_zero = 1 });
        MUST(fl_backup_wait(job, 20 * SECOND, &why));
        double took = (double)(clock_ns() - begin) / 1e9, want = (double)runs[i].bytes / (double)runs[i].speed;
        CHECK(took > want * 0.95 - 0.06 && took < want * 1.15 + 0.3, "took %.3f s, not %.3f", took, want);
        end(job);
        image_unref(&sink->image);
        fake_free(fake);
    }
}

static void test_speed_is_kept_evenly(void)
{
    struct fake *fake = fake_new(64 * MIB, 4096, FL_DATA, false);
    struct sink *sink = new_sink(fake->size);
    uint64_t begin = clock_ns(), speed = 4 * MIB;
    fl_backup *job = start(fake, &sink->image, (fl_backup_options){ .granularity = 4 * MIB, .workers = 8, .speed = speed });
    for (int i = 0; i < 12; i++) {
        sleep_ns(100 * MILLISECOND);
        uint64_t read = 0, now;
        pthread_mutex_lock(&fake->lock);
        for (size_t k = 0; k < fake->read_count; k++)
            read += fake->reads[k].length;
        now = clock_ns() - begin;
        pthread_mutex_unlock(&fake->lock);
        double want = (double)speed * (double)now / 1e9, ahead = (double)speed * 0.12, behind = (double)speed * 0.3;
        CHECK((double)read < want + ahead && (double)read > want * 0.9 - behind,
              "%" PRIu64 " bytes after %" PRIu64 " ms", read, ms_since(begin));
    }
    end(job);
    image_unref(&sink->image);
    fake_free(fake);
}

/* Time that nobody used is not made up for later, but for an instant. */
static void test_speed_is_not_saved_up(void)
{
    struct throttle throttle;
    CHECK(throttle_init(&throttle, 10 * MIB) == 0, "throttle_init");
    sleep_ns(400 * MILLISECOND);
    uint64_t begin = clock_ns();
    for (uint64_t taken = 0; taken < 3 * MIB; )
        taken += throttle_take(&throttle, 64 * KIB, 4096);
    CHECK(ms_since(begin) >= 230 && ms_since(begin) < 700, "%" PRIu64 " ms", ms_since(begin));
    CHECK(throttle_take(&throttle, 1000, 4096) == 1000 && throttle_take(&throttle, GIB, 4096) <= 512 * KIB, "pieces");
    throttle_end(&throttle);
    throttle_set(&throttle, 1);
    CHECK(throttle_take(&throttle, GIB, 4096) == GIB, "a limit after its end");
    throttle_destroy(&throttle);
}

static void test_speed_changes_while_it_runs(void)
{
    struct fake *fake = fake_new(64 * MIB, 4096, FL_DATA, false);
    struct sink *sink = new_sink(fake->size);
    uint64_t begin = clock_ns();
    fl_backup *job = start(fake, &sink->image, (fl_backup_options){ .speed = 1, .workers = 8 });
    EXPECT(FL_ERUNNING, fl_backup_wait(job, 200 * MILLISECOND, &why));
    MUST(fl_backup_set_speed(job, 64 * MIB, &why));             /* wakes those that would have slept for hours */
    EXPECT(FL_ERUNNING, fl_backup_wait(job, 500 * MILLISECOND, &why));
    uint64_t done = progress_of(job).done;
    CHECK(done > 16 * MIB && done < 40 * MIB, "%" PRIu64 " done", done);
    MUST(fl_backup_set_speed(job, 0, &why));
    MUST(fl_backup_wait(job, 5 * SECOND, &why));
    CHECK(clock_ns() - begin < 3 * SECOND, "%" PRIu64 " ms", ms_since(begin));
    end(job);

    job = start(fake, &sink->image, (fl_backup_options){ .speed = 1, .workers = 8 });
    EXPECT(FL_ERUNNING, fl_backup_wait(job, 50 * MILLISECOND, &why));
    CHECK(fl_backup_cancel(job) == 0, "cancel");
    EXPECT(FL_ECANCELLED, fl_backup_wait(job, 500 * MILLISECOND, &why));
    end(job);
    image_unref(&sink->image);
    fake_free(fake);
}

/* ---- cancel, close, hang ---- */

static void test_cancel(void)
{
    struct fake *fake = fake_new(64 * MIB, 4096, FL_DATA, false);
    struct sink *sink = new_sink(fake->size);
    sink->hold_ns = 5 * MILLISECOND;
    fl_backup *job = start(fake, &sink->image, (fl_backup_options){ .workers = 2, .granularity = 4096 });
    EXPECT(FL_ERUNNING, fl_backup_wait(job, 20 * MILLISECOND, &why));
    CHECK(!progress_of(job).finished, "finished already");
    CHECK(fl_backup_cancel(job) == 0 && fl_backup_cancel(job) == 0, "cancel");
    EXPECT(FL_ECANCELLED, fl_backup_wait(job, SECOND, &why));
    EXPECT(FL_ECANCELLED, fl_backup_wait(job, 0, &why));
    CHECK(progress_of(job).finished && sink->flushes == 0, "flushed after a cancel");
    end(job);

    job = start(fake, &sink->image, (fl_backup_options){ .workers = 2, .granularity = 4096 });
    end(job);                   /* close of a running job */

    sink->hold_ns = 0;
    job = start(fake, &sink->image, (fl_backup_options){ 0 });
    MUST(fl_backup_wait(job, 5 * SECOND, &why));
    CHECK(fl_backup_cancel(job) == 0, "cancel");
    MUST(fl_backup_wait(job, 0, &why));         /* it had succeeded before */
    end(job);
    image_unref(&sink->image);
    fake_free(fake);
}

static void test_target_that_hangs(void)
{
    static const int ops[] = { FL_OP_WRITE, FL_OP_ZERO, FL_OP_FLUSH };
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
        struct fake *fake = fake_new(8 * MIB, 4096, FL_DATA, true);
        fake_set(fake, 4 * MIB, 2 * MIB, FL_ZERO);
        fl_image *inner = new_target(fake->size, true), *target;
        MUST(fl_image_faulty(inner, &target, &why));
        fl_image_free(inner);
        MUST(fl_fault_add(target, &(fl_fault){ .ops = ops[i], .action = FL_FAULT_HANG, .nth = 1 }, &why));
        fl_backup *job = start(fake, target, (fl_backup_options){ .workers = 4, .discard = 1 });
        eventually(fault_hangs, target, "hanging");
        uint64_t begin = clock_ns();
        CHECK(fl_backup_cancel(job) == 0, "cancel");
        EXPECT(FL_ERUNNING, fl_backup_wait(job, 50 * MILLISECOND, &why));
        CHECK(!progress_of(job).finished, "a worker still runs");
        CHECK(clock_ns() - begin < 200 * MILLISECOND, "%" PRIu64 " ms", ms_since(begin));
        end_within(job, 1200 * MILLISECOND);
        CHECK(fake->references == 2, "%u references while a worker hangs", fake->references);
        EXPECT(EBUSY, fl_backup_start(as_snapshot(fake), target, &(fl_backup_options){ 0 }, &job, &why));   /* it may still write */
        CHECK(why.side == FL_SIDE_TARGET, "side %d", why.side);
        CHECK(fl_fault_clear(target) == 0, "clear");
        eventually(fake_is_let_go, fake, "let go");
        job = start(fake, target, (fl_backup_options){ .workers = 4, .skip_lost = 1 });        /* the first job discarded some */
        MUST(fl_backup_wait(job, 5 * SECOND, &why));
        end(job);
        fake_free(fake);
        fl_image_free(target);
    }
}

static void test_source_that_hangs(void)
{
    for (int extents = 0; extents < 2; extents++)
        for (int chunks = 0; chunks < 2; chunks++) {
            struct fake *fake = fake_new(8 * MIB, 4096, FL_DATA, true);
            struct sink *sink = new_sink(fake->size);
            if (extents)
                fake->hang_extents = true;
            else
                fake_fault(fake, (struct fake_fault){ .offset = MIB, .length = 1, .hangs = true });
            fl_backup *job = start(fake, chunks ? NULL : &sink->image, (fl_backup_options){ .workers = 4 });
            eventually(fake_hangs, fake, "hanging");
            EXPECT(FL_ERUNNING, fl_backup_wait(job, 50 * MILLISECOND, &why));
            end_within(job, 1200 * MILLISECOND);
            fake_resume(fake);
            fake_free(fake);
            image_unref(&sink->image);
        }
}

/* ---- writeback ---- */

static atomic_uint writebacks, drops, hanging_writebacks;
static atomic_bool writeback_hangs;
static atomic_int written_back;         /* the descriptor */

static int writeback(int fd, atomic_uint *calls)
{
    atomic_store(&written_back, fd);
    atomic_fetch_add(calls, 1);
    atomic_fetch_add(&hanging_writebacks, 1);
    while (atomic_load(&writeback_hangs))
        sleep_ns(MILLISECOND);
    atomic_fetch_sub(&hanging_writebacks, 1);
    return 0;
}

/* What the library calls in place of the C library's. */
int sync_file_range(int fd, off_t offset, off_t length, unsigned flags)
{
    CHECK(offset == 0 && length == 0 && flags == SYNC_FILE_RANGE_WRITE, "it takes note of errors, or is about a part: %x", flags);
    return writeback(fd, &writebacks);
}

int posix_fadvise(int fd, off_t offset, off_t length, int advice)
{
    CHECK(offset == 0 && length == 0 && advice == POSIX_FADV_DONTNEED, "it is about a part, or does something else: %d", advice);
    return writeback(fd, &drops);
}

static bool writeback_is_hanging(void *nothing) { return (void)nothing, atomic_load(&hanging_writebacks) == 1; }

static void test_writeback_begins_before_the_end(void)
{
    struct fake *fake = fake_new(128 * MIB, 4096, FL_DATA, true);
    fl_image *target = new_target(fake->size, true);
    fl_backup *job = start(fake, target, (fl_backup_options){ .workers = 2, .speed = 512 * MIB });
    MUST(fl_backup_wait(job, 5 * SECOND, &why));
    CHECK(progress_of(job).data_bytes == fake->size && progress_of(job).finished, "not all data");
    unsigned seen = atomic_load(&writebacks), dropped = atomic_load(&drops);
    CHECK(seen >= 2 && seen + dropped <= 8, "%u and %u for 128 MiB", seen, dropped);
    CHECK(dropped >= 1, "the pages of the target stay");
    CHECK(atomic_load(&written_back) == image_descriptor(target), "of another file");
    end(job);
    job = start(fake, target, (fl_backup_options){ .speed = 512 * MIB, .target_is_zero = 1 });
    atomic_store(&writeback_hangs, true);       /* nobody waits for it but the end */
    eventually(writeback_is_hanging, NULL, "writeback hangs");
    for (uint64_t begin = clock_ns(); progress_of(job).done < fake->size; sleep_ns(MILLISECOND))
        CHECK(ms_since(begin) < 5000, "the workers wait for the writeback");
    EXPECT(FL_ERUNNING, fl_backup_wait(job, 50 * MILLISECOND, &why));
    end_within(job, 1200 * MILLISECOND);
    CHECK(fake->references == 2, "%u references while the writeback hangs", fake->references);
    atomic_store(&writeback_hangs, false);
    fake_free(fake);
    fl_image_free(target);
}

/* What is written directly is on the device, and in no page cache. */
static void test_direct_target_needs_no_writeback(void)
{
    struct fake *fake = fake_new(48 * MIB, 4096, FL_DATA, true);
    fl_image *target;
    char path[4096];
    snprintf(path, sizeof path, "%s/direct", directory);
    if (fl_image_create(path, fake->size, &(fl_image_options){ .format = "raw", .writable = 1, .direct = 1 }, &target, &why)) {
        CHECK(why.cause == EINVAL || why.code == EINVAL, "%s", why.text);
        printf("%s has no O_DIRECT\n", directory);
        fake_free(fake);
        return;
    }
    unsigned before = atomic_load(&writebacks) + atomic_load(&drops);
    fl_backup *job = start(fake, target, (fl_backup_options){ .workers = 2, .speed = 256 * MIB });
    MUST(fl_backup_wait(job, 5 * SECOND, &why));
    CHECK(atomic_load(&writebacks) + atomic_load(&drops) == before, "it is asked for all the same");
    end(job);
    fake_free(fake);
    fl_image_free(target);
}

static atomic_int interrupts;
static int interrupt(void) { return atomic_fetch_sub(&interrupts, 1) > 0; }

static void test_interrupt(void)
{
    struct fake *fake = fake_new(8 * MIB, 4096, FL_DATA, true);
    fl_chunk chunk;
    fake_fault(fake, (struct fake_fault){ .offset = 0, .length = 1, .hangs = true });
    fl_backup *job = start(fake, NULL, (fl_backup_options){ .workers = 1 });
    fl_set_interrupt(interrupt, (unsigned long)pthread_self());
    for (int i = 0; i < 2; i++) {
        atomic_store(&interrupts, 1);
        uint64_t begin = clock_ns();
        EXPECT(FL_EINTERRUPTED, i ? fl_backup_wait(job, UINT64_MAX, &why) : fl_backup_next(job, UINT64_MAX, &chunk, &why));
        CHECK(clock_ns() - begin < 200 * MILLISECOND, "%" PRIu64 " ms", ms_since(begin));
    }
    fl_set_interrupt(NULL, 0);
    fake_resume(fake);
    MUST(fl_backup_next(job, 5 * SECOND, &chunk, &why));       /* nothing was changed by it */
    CHECK(chunk.offset == 0, "offset %" PRIu64, chunk.offset);
    end(job);
    fake_free(fake);
}

static void *wait_for_end(void *job)
{
    EXPECT(FL_ECLOSED, fl_backup_wait(job, UINT64_MAX, &why));
    return NULL;
}

static void *next_until_closed(void *argument)
{
    fl_chunk chunk;
    int rc = fl_backup_next(argument, UINT64_MAX, &chunk, &why);
    CHECK(rc == -FL_ECLOSED || rc == -FL_ECANCELLED, "%d", rc);
    return NULL;
}

/* Whoever waits inside gets a clear error from a close. */
static void test_close_while_others_wait(void)
{
    struct fake *fake = fake_new(8 * MIB, 4096, FL_DATA, true);
    fake_fault(fake, (struct fake_fault){ .offset = 0, .length = fake->size, .hangs = true });
    fl_backup *job = start(fake, NULL, (fl_backup_options){ .workers = 2 });
    eventually(fake_hangs, fake, "hanging");
    pthread_t threads[2];
    pthread_create(&threads[0], NULL, wait_for_end, job);
    pthread_create(&threads[1], NULL, next_until_closed, job);
    sleep_ns(20 * MILLISECOND);
    MUST(fl_backup_close(job, &why));
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    fake_resume(fake);
    fl_backup_free(job);
    fake_free(fake);
}

static void test_fork(void)
{
    struct fake *fake = fake_new(8 * MIB, 4096, FL_DATA, true);
    struct sink *sink = new_sink(fake->size);
    sink->hold_ns = 50 * MILLISECOND;
    fl_backup *job = start(fake, &sink->image, (fl_backup_options){ 0 });
    pid_t child = fork();
    if (child == 0) {
        fl_chunk chunk;
        fl_progress progress;
        bool right = fl_backup_wait(job, UINT64_MAX, NULL) == -FL_EFORKED && fl_backup_next(job, 0, &chunk, NULL) == -FL_EFORKED &&
            fl_backup_progress(job, &progress, NULL) == -FL_EFORKED && fl_backup_cancel(job) == -FL_EFORKED &&
            fl_backup_close(job, NULL) == -FL_EFORKED;
        fl_backup_free(job);
        _exit(right ? 0 : 1);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0, "the child ended with %d", status);
    MUST(fl_backup_wait(job, 5 * SECOND, &why));
    end(job);
    image_unref(&sink->image);
    fake_free(fake);
}

/* ---- failures ---- */

/* The target's first, second, … operation fails, until a job passes untouched. */
static void test_every_target_operation_fails_once(void)
{
    for (int workers = 1; workers <= 4; workers += 3)
        for (uint64_t nth = 1, passed = 0; !passed; nth++) {
            CHECK(nth < 100, "no end");
            struct fake *fake = fake_new(MIB + 513, 4096, FL_DATA, true);
            fake_set(fake, 512 * KIB, 256 * KIB, FL_ZERO);
            fl_image *inner = new_target(fake->size, false), *target;
            MUST(fl_image_faulty(inner, &target, &why));
            uint64_t before = fl_fault_seen(target, FL_OP_ANY);
            MUST(fl_fault_add(target, &(fl_fault){ .ops = FL_OP_ANY, .action = FL_FAULT_ERROR, .err = ENOSPC, .nth = nth, .times = 1 },
                              &why));
            fl_backup *job = start(fake, target, (fl_backup_options){ .workers = (uint32_t)workers, .granularity = 64 * KIB });
            if (fl_backup_wait(job, 5 * SECOND, NULL) == 0) {
                CHECK(nth > fl_fault_seen(target, FL_OP_ANY) - before && nth > 12, "a failed operation was overlooked");
                check_target(inner, fake, fake->map, fake->map_count, false);
                passed = 1;
            } else {
                EXPECT(ENOSPC, fl_backup_wait(job, 0, &why));
                CHECK(why.side == FL_SIDE_TARGET && why.cause == ENOSPC, "side %d, cause %d", why.side, why.cause);
            }
            end(job);
            fl_image_free(target);
            fl_image_free(inner);
            fake_free(fake);
        }
}

static void test_first_failure_wins(void)
{
    struct fake *fake = fake_new(8 * MIB, 4096, FL_DATA, true);
    struct sink *sink = new_sink(fake->size);
    fake_fault(fake, (struct fake_fault){ .offset = 0, .length = 4096, .delay_ns = 200 * MILLISECOND, .code = ENXIO,
               .side = FL_SIDE_SOURCE });
    fake_fault(fake, (struct fake_fault){ .offset = 2 * MIB + 4096, .length = 512, .code = EBADMSG, .side = FL_SIDE_FLEECING });
    for (int chunks = 0; chunks < 2; chunks++) {
        fl_backup *job = start(fake, chunks ? NULL : &sink->image, (fl_backup_options){ .workers = 4 });
        EXPECT(EBADMSG, fl_backup_wait(job, 5 * SECOND, &why));
        CHECK(why.side == FL_SIDE_FLEECING && why.offset == 2 * MIB + 4096 && why.length == 512 && why.cause == EBADMSG,
              "\"%s\"", why.text);
        CHECK(strstr(why.text, "injected"), "\"%s\"", why.text);
        fl_chunk chunk;
        CHECK(fl_backup_cancel(job) == 0, "cancel");
        EXPECT(EBADMSG, fl_backup_wait(job, 0, &why));
        if (chunks)             /* nothing comes before what failed at offset 0, later; the failure told is the first */
            EXPECT(EBADMSG, fl_backup_next(job, 0, &chunk, &why));
        end(job);
    }
    CHECK(sink->flushes == 0, "flushed after a failure");
    image_unref(&sink->image);
    fake_free(fake);
}

static void test_snapshot_that_is_closed_or_breaks(void)
{
    for (int breaks = 0; breaks < 2; breaks++) {
        struct fake *fake = fake_new(64 * MIB, 4096, FL_DATA, false);
        struct sink *sink = new_sink(fake->size);
        fl_backup *job = start(fake, &sink->image, (fl_backup_options){ .speed = MIB, .discard = 1 });
        sleep_ns(20 * MILLISECOND);
        pthread_mutex_lock(&fake->lock);
        fake->closed = !breaks;
        fake->broken = breaks;
        pthread_mutex_unlock(&fake->lock);
        EXPECT(breaks ? FL_EBROKEN : FL_ECLOSED, fl_backup_wait(job, 2 * SECOND, &why));
        CHECK(sink->flushes == 0, "flushed");
        end(job);
        image_unref(&sink->image);
        fake_free(fake);
    }
}

/* ---- */

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(speed), TEST(speed_is_kept_evenly), TEST(speed_is_not_saved_up), TEST(speed_changes_while_it_runs), TEST(cancel),
        TEST(target_that_hangs), TEST(source_that_hangs), TEST(writeback_begins_before_the_end), TEST(direct_target_needs_no_writeback),
        TEST(interrupt), TEST(close_while_others_wait), TEST(fork),
        TEST(every_target_operation_fails_once), TEST(first_failure_wins), TEST(snapshot_that_is_closed_or_breaks),
    };
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
