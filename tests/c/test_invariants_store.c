/* test_invariants_store.c: I5: places in the stage and the fleecing image, and who may use them.
 *
 * Scenarios as rig.h describes them. tests/mutants.py breaks the engine line by line and names the scenario that notices.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>

#include "rig.h"
#include "store.h"

/* ---- I5: a place in the store is used again only when nobody has it pinned and nothing points at it ---- */

/* A spill hangs (before it writes, or after), and part of what it writes is released: its slots stay out of use until it ends. */
TEST(i5_hung_spill_keeps_its_slots)
{
    for (int action = FL_FAULT_HANG; action <= FL_FAULT_HANG_AFTER; action++) {
        for (uint64_t released = 1; released <= 4; released++) {
            struct rig r = rig_new(64 * CLUSTER, 64 * CLUSTER);
            r.options.stage_size = 8 * CLUSTER;
            fl_snapshot *s = cut(&r);
            fault_next(r.fleecing, action, FL_OP_WRITE, 0, 0, 0);
            write_bytes(&r, NEW, 8 * CLUSTER, 0);
            wait_hanging(r.fleecing, 1);                        /* some of the oldest, 0 among them */
            MUST(fl_snapshot_discard(s, released * CLUSTER, 0, &why));
            fl_stats stats = stats_of(s);
            CHECK(stats.staged_bytes >= (8 - released) * CLUSTER, "%" PRIu64 " bytes staged", stats.staged_bytes);
            /* Of the eight slots at least one is the spill's: so these seven or less fit, and the eighth waits. */
            struct call *w[8];
            for (uint64_t i = 0; i < released; i++)
                w[i] = start(WRITE, &r, CLUSTER, (20 + i) * CLUSTER);
            sleep_ns(60 * MILLISECOND);
            unsigned waiting = 0;
            for (uint64_t i = 0; i < released; i++)
                waiting += !atomic_load(&w[i]->done);
            CHECK(waiting >= 1, "a slot that a spill still uses was given away");
            for (uint64_t c = 0; c < released; c++)
                check_raises(s, FL_EDISCARDED, CLUSTER, c * CLUSTER);
            check_old(s, (64 - released) * CLUSTER, released * CLUSTER);
            fl_fault_resume(r.fleecing);
            for (uint64_t i = 0; i < released; i++)
                finish(w[i], 0);
            write_bytes(&r, NEW, 32 * CLUSTER, 30 * CLUSTER);   /* everything is used again, several times */
            check_old(s, (64 - released) * CLUSTER, released * CLUSTER);
            /* What was released in the middle of it all left nothing behind: 8 clusters, of which as many as came anew went, and 32. */
            WAIT_FOR_STATS(s, now.staged_bytes + now.fleecing_bytes == 40 * CLUSTER);
            MUST(fl_snapshot_discard(s, 64 * CLUSTER, 0, &why));
            WAIT_FOR_STATS(s, now.staged_bytes == 0 && now.fleecing_bytes == 0);
            end(s);
            rig_free(&r);
        }
    }
}

/* What is being spilled can be read, before, meanwhile and after, also when the spill fails in the end. */
TEST(i5_spilling_clusters_are_readable)
{
    for (int fails = 0; fails < 2; fails++) {
        struct rig r = rig_that_spills(16 * CLUSTER, 16 * CLUSTER);
        fl_snapshot *s = cut(&r);
        if (fails)
            fail_next(r.fleecing_middle, FL_OP_WRITE, EIO, 0, 0);
        hang_next(r.fleecing, FL_OP_WRITE, 0, 0);
        write_bytes(&r, NEW, CLUSTER, 3 * CLUSTER);
        wait_hanging(r.fleecing, 1);
        check_old(s, 16 * CLUSTER, 0);
        fl_fault_resume(r.fleecing);
        WAIT_FOR_STATS(s, now.fleecing_bytes == CLUSTER && now.staged_bytes == 0);
        check_old(s, 16 * CLUSTER, 0);
        CHECK(stats_of(s).spill_errors == (uint64_t)fails);
        end(s);
        rig_free(&r);
    }
}

/* close() does not wait for a spill that hangs; when it ends, thread, memory and files go. */
TEST(i5_close_returns_while_a_spill_hangs)
{
    int tasks = count_entries("/proc/self/task"), files = count_entries("/proc/self/fd");
    struct rig r = rig_that_spills(16 * CLUSTER, 16 * CLUSTER);
    fl_snapshot *s = cut(&r);
    hang_next(r.fleecing, FL_OP_WRITE, 0, 0);
    write_bytes(&r, NEW, CLUSTER, 3 * CLUSTER);
    wait_hanging(r.fleecing, 1);
    finish(start(CLOSE, s, 0, 0), 0);
    EXPECT(FL_ECLOSED, fl_snapshot_check(s, &why));
    fl_snapshot_free(s);
    finish(start(WRITE, &r, 16 * CLUSTER, 0), 0);               /* the guest goes on */
    r.options.fleecing = NULL;
    s = cut(&r);                                                /* and so do later snapshots */
    write_bytes(&r, NEWER, CLUSTER, 0);
    end(s);
    CHECK(fl_fault_hanging(r.fleecing) == 1);
    fl_fault_resume(r.fleecing);
    rig_free(&r);
    check_comes_down("/proc/self/task", tasks, 5 * SECOND);
    check_comes_down("/proc/self/fd", files, 5 * SECOND);
}

/* A spill that fails loses nothing, and is made again. */
TEST(i5_failed_spill_loses_nothing)
{
    struct rig r = rig_new(64 * CLUSTER, 64 * CLUSTER);
    r.options.stage_size = 16 * CLUSTER;
    fl_snapshot *s = cut(&r);
    fault_all(r.fleecing, FL_FAULT_SHORT, FL_OP_WRITE, ENOSPC, 0, 0);
    write_bytes(&r, NEW, 16 * CLUSTER, 0);
    WAIT_FOR_STATS(s, now.spill_errors >= 2);
    check_old(s, 64 * CLUSTER, 0);
    CHECK(stats_of(s).staged_bytes == 16 * CLUSTER && stats_of(s).fleecing_bytes == 0);
    MUST(fl_snapshot_discard(s, CLUSTER, 2 * CLUSTER, &why));
    fl_fault_clear(r.fleecing);
    write_bytes(&r, NEW, 40 * CLUSTER, 20 * CLUSTER);
    check_old(s, 2 * CLUSTER, 0);
    check_raises(s, FL_EDISCARDED, CLUSTER, 2 * CLUSTER);
    check_old(s, 61 * CLUSTER, 3 * CLUSTER);
    CHECK(stats_of(s).bytes_spilled > 0);
    end(s);
    rig_free(&r);
}

/* Room that was freed is used again: all of the disk goes through a store a fraction of its size, and what is kept stays right. */
TEST(i5_places_are_used_again)
{
    struct rig r = rig_new(256 * CLUSTER, 6 * CLUSTER + 100);
    r.options.stage_size = 2 * CLUSTER;
    fl_snapshot *s = cut(&r);
    for (uint64_t c = 0; c < 256; c += 2) {
        write_bytes(&r, NEW, 2 * CLUSTER, c * CLUSTER);
        if (c >= 4) {                                           /* keeps the last four */
            check_old(s, 4 * CLUSTER, (c - 2) * CLUSTER);
            MUST(fl_snapshot_discard(s, 2 * CLUSTER, (c - 4) * CLUSTER, &why));
        }
    }
    fl_stats stats = stats_of(s);
    CHECK(stats.clusters_saved == 256 && stats.fleecing_peak <= 6 * CLUSTER && stats.staged_peak <= 2 * CLUSTER && stats.bytes_spilled > 0);
    check_old(s, 4 * CLUSTER, 252 * CLUSTER);
    end(s);
    rig_free(&r);
}

/* Freed places are punched out of the fleecing image: while that hangs, and after it, it does not take away what was saved since. */
TEST(i5_hung_punch_takes_nothing_else)
{
    struct rig r = rig_new(64 * CLUSTER, 64 * CLUSTER);
    r.options.stage_size = 4 * CLUSTER;
    fl_snapshot *s = cut(&r);
    write_bytes(&r, NEW, 16 * CLUSTER, 0);
    WAIT_FOR_STATS(s, now.fleecing_bytes > 0);
    hang_next(r.fleecing, FL_OP_DISCARD, 0, 0);
    struct call *release = start(RELEASE, s, 16 * CLUSTER, 0);
    wait_hanging(r.fleecing, 1);                                /* whoever punches */
    write_bytes(&r, NEW, 2 * CLUSTER, 20 * CLUSTER);
    check_old(s, 2 * CLUSTER, 20 * CLUSTER);
    fl_fault_resume(r.fleecing);
    finish(release, 0);
    write_bytes(&r, NEW, 20 * CLUSTER, 30 * CLUSTER);
    check_old(s, 48 * CLUSTER, 16 * CLUSTER);
    MUST(fl_snapshot_discard(s, 64 * CLUSTER, 0, &why));
    WAIT_FOR_STATS(s, now.staged_bytes == 0 && now.fleecing_bytes == 0);
    end(s);
    fl_image_info info;
    MUST(fl_image_info_get(r.fleecing_raw, &info, &why));
    CHECK(info.allocated == 0, "%" PRIu64 " bytes are left in the fleecing image", info.allocated);
    rig_free(&r);
}

/* As on ext4. */
static bool reserve_anywhere(fl_image *image, uint64_t count, uint64_t offset)
{
    return fallocate(image_descriptor(image), FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)count) == 0;
}

static uint64_t allocated(fl_image *image)
{
    fl_image_info info;
    MUST(fl_image_info_get(image, &info, &why));
    return info.allocated;
}

/* The place of the fleecing image's next MiB is found at once, but not beyond the limit; and it is given back as soon as nothing is in it. */
TEST(reserved_space_is_limited_and_given_back)
{
    for (int limited = 0; limited < 2; limited++) {
        struct rig r = rig_that_spills(64 * CLUSTER, 1024 * CLUSTER);
        struct image_ops ops = *r.fleecing_raw->ops;
        ops.reserve = reserve_anywhere;
        r.fleecing_raw->ops = &ops;
        r.options.fleecing_limit = limited ? 32 * CLUSTER : 0;
        fl_snapshot *s = cut(&r);
        spill(&r, s, 0, 3);
        uint64_t now = allocated(r.fleecing_raw);
        CHECK(limited ? now <= 32 * CLUSTER : now >= 256 * CLUSTER, "%" PRIu64 " bytes are reserved", now);
        MUST(fl_snapshot_discard(s, 3 * CLUSTER, 0, &why));
        for (uint64_t deadline = clock_ns() + 5 * SECOND; allocated(r.fleecing_raw); sleep_ns(MILLISECOND))
            CHECK(clock_ns() < deadline, "%" PRIu64 " bytes stay in an image that is empty", allocated(r.fleecing_raw));
        spill(&r, s, 10, 3);
        end(s);
        CHECK(allocated(r.fleecing_raw) == 0, "%" PRIu64 " bytes are left in the fleecing image", allocated(r.fleecing_raw));
        rig_free(&r);
    }
}

TEST(space_is_reserved_on_ext4_only)
{
    struct statfs fs;
    struct rig r = rig_new(64 * CLUSTER, 1024 * CLUSTER);
    bool ext4 = statfs(directory, &fs) == 0 && fs.f_type == EXT4_SUPER_MAGIC, done = image_reserve(r.fleecing, 64 * CLUSTER, 8 * CLUSTER);
    CHECK(done == ext4 && allocated(r.fleecing_raw) == (ext4 ? 64 * CLUSTER : 0), "%d, %" PRIu64 " bytes", done, allocated(r.fleecing_raw));
    rig_free(&r);
}

/* Punching beside what is in use: only what is free goes, also where places that were free were used again before. */
TEST(i5_punch_spares_what_is_in_use)
{
    enum { FIRST = 4096, AGAIN = 1400 };        /* megabytes, since less is not worth punching */
    struct rig r = rig_new((FIRST + AGAIN) * CLUSTER, 2 * FIRST * CLUSTER);
    fl_snapshot *s = cut(&r);
    write_bytes(&r, NEW, FIRST * CLUSTER, 0);
    WAIT_FOR_STATS(s, now.staged_bytes < 64 * CLUSTER);
    MUST(fl_snapshot_discard(s, 1500 * CLUSTER, 1000 * CLUSTER, &why));
    write_bytes(&r, NEW, AGAIN * CLUSTER, FIRST * CLUSTER);     /* in these places */
    WAIT_FOR_STATS(s, now.staged_bytes < 64 * CLUSTER);
    CHECK(fl_fault_seen(r.fleecing, FL_OP_DISCARD) == 0, "punched too early for this test");
    hang_next(r.fleecing, FL_OP_DISCARD, 0, 0);                 /* so that it does not finish before all is freed */
    for (uint64_t c = 2500; c < FIRST; c += 200)                /* keeps every tenth of the others */
        MUST(fl_snapshot_discard(s, (c + 180 < FIRST ? 180 : FIRST - c) * CLUSTER, c * CLUSTER, &why));
    wait_hanging(r.fleecing, 1);
    fl_fault_resume(r.fleecing);
    uint64_t deadline = clock_ns() + 10 * SECOND;
    while (fl_fault_seen(r.fleecing, FL_OP_DISCARD) < 5 && clock_ns() < deadline)
        sleep_ns(MILLISECOND);
    sleep_ns(20 * MILLISECOND);
    CHECK(fl_fault_seen(r.fleecing, FL_OP_DISCARD) >= 5, "nothing was punched");
    check_old(s, AGAIN * CLUSTER, FIRST * CLUSTER);
    check_old(s, 1000 * CLUSTER, 0);
    for (uint64_t c = 2680; c + 20 <= FIRST; c += 200)
        check_old(s, 20 * CLUSTER, c * CLUSTER);
    end(s);
    rig_free(&r);
}

/* ---- memory ---- */

/* How many pages of these slots have memory behind them. */
static size_t pages_there(const struct store *store, uint32_t first, uint32_t count)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = count * CLUSTER / page, there = 0;
    unsigned char *seen = malloc(pages);
    CHECK(seen && mincore(store_memory(store, first), count * CLUSTER, seen) == 0, "mincore");
    for (size_t i = 0; i < pages; i++)
        there += seen[i] & 1;
    free(seen);
    return there * page / CLUSTER;
}

/* A stage costs nothing before the first save. From then on the next MiB is there before writers get to it, and little more. */
TEST(stage_is_touched_ahead_of_writers)
{
    enum { MIB = 256 };                 /* slots */
    struct rig r = rig_new(64 * CLUSTER, 64 * CLUSTER);
    struct store_options options = { .cluster_size = CLUSTER, .stage_size = 16 * MIB * CLUSTER, .fleecing = r.fleecing };
    struct store *store;
    uint32_t none = 0, slots[MIB];
    MUST(store_create(&options, &store, &why));
    sleep_ns(20 * MILLISECOND);
    CHECK(pages_there(store, 0, 16 * MIB) == 0, "an idle stage has memory");
    void *page = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bool populates = madvise(page, 65536, MADV_POPULATE_WRITE) == 0;    /* Linux 5.14 */
    munmap(page, 65536);
    for (uint32_t next = MIB; populates && next < 16 * MIB; next += MIB) {
        CHECK(store_take(store, next - MIB, MIB, &none, slots) == 0, "no room");
        for (uint64_t deadline = clock_ns() + 5 * SECOND; pages_there(store, next, MIB) < MIB; sleep_ns(MILLISECOND))
            CHECK(clock_ns() < deadline, "of the slots from %u on only %zu are there", next, pages_there(store, next, MIB));
        if (next + MIB < 16 * MIB)
            CHECK(pages_there(store, next + MIB, 15 * MIB - next) == 0, "more than is needed");
    }
    store_close(store);
    store_unref(store);
    rig_free(&r);
}

/* Memory that a spill or a backup has read is used again last, memory that only its writer has used first; and before half of the stage is in use, none that
   was never used is taken while other is free. */
TEST(slots_are_used_again_in_order)
{
    enum { SLOTS = 16 };
    struct store_options options = { .cluster_size = CLUSTER, .stage_size = SLOTS * CLUSTER };
    struct store *store;
    uint32_t slots[SLOTS], given[2], credit = 0, one;
    MUST(store_create(&options, &store, &why));
    CHECK(store_take(store, 0, 6, &credit, slots) == 0);
    CHECK(store_publish(store, 0, slots, 6) == 0);
    store_free(store, 4, 1);
    store_free(store, 1, 2);
    const uint32_t freed[3] = { slots[4], slots[1], slots[2] };
    CHECK(store_take(store, 100, 1, &credit, given) == 0 && given[0] == freed[0], "not what was freed first");
    store_give_back(store, given, 1);
    CHECK(store_take(store, 100, 2, &credit, given) == 0 && given[0] == freed[0] && given[1] == freed[1], "not what was given back, then in order");
    store_give_back(store, given, 2);
    CHECK(store_take(store, 100, 2, &credit, given) == 0 && given[0] == freed[0] && given[1] == freed[1], "given back, the order is lost");
    CHECK(store_publish(store, 100, given, 2) == 0);
    CHECK(store_take(store, 200, 1, &credit, &one) == 0 && one == freed[2], "not the last one of the list");
    CHECK(store_take(store, 201, 4, &credit, slots + 6) == 0 && store_publish(store, 201, slots + 6, 4) == 0);
    /* Ten are in use. One that is freed waits now until all of the memory was used once. */
    store_free(store, 203, 1);
    for (uint32_t used = 10; used < SLOTS; used++)
        CHECK(store_take(store, 300 + used, 1, &credit, &one) == 0 && one == used, "%u, and not the %uth of those never used", one, used);
    CHECK(store_take(store, 400, 1, &credit, &one) == 0 && one == slots[8], "not the one that was freed");
    CHECK(store_take(store, 401, 1, &credit, &one) == -EAGAIN, "more slots than there are");
    store_close(store);
    store_unref(store);
}
