/* test_invariants_wait.c: I7: who waits for whom, and for how long.
 *
 * Scenarios as rig.h describes them. tests/mutants.py breaks the engine line by line and names the scenario that notices.
 */
#define _GNU_SOURCE
#include "rig.h"

/* ---- I7: nobody waits for a reader; every wait of a writer ends ---- */

/* All that must go on although somebody hangs; clusters 3 and 4 are what that one reads. */
static void check_all_goes_on(struct rig *r, fl_snapshot *s)
{
    uint8_t p[CLUSTER];
    fl_snapshot_options options = r->options;
    finish(start(WRITE, r, CLUSTER, 3 * CLUSTER), 0);
    finish(start(WRITE, r, 4 * CLUSTER, 8 * CLUSTER), 0);
    finish(start(ZERO, r, CLUSTER, 3 * CLUSTER), 0);
    finish(start(DISCARD, r, CLUSTER, 20 * CLUSTER), 0);
    r->options.fleecing = NULL;
    r->options.stage_size = 16 * CLUSTER;
    struct call *c = start(CUT, r, 0, 0);
    while (!atomic_load(&c->done))
        sleep_ns(MILLISECOND / 4);
    CHECK(c->rc == 0 && c->took < SOON, "the cut took %" PRIu64 " ms", (uint64_t)(c->took / MILLISECOND));
    fl_snapshot *second = c->made;
    finish(c, 0);
    finish(start(WRITE, r, CLUSTER, 3 * CLUSTER), 0);
    finish(start(READ, s, 2 * CLUSTER, 9 * CLUSTER), 0);
    finish(start(EXTENTS, s, 32 * CLUSTER, 0), 0);
    finish(start(RELEASE, s, CLUSTER, 9 * CLUSTER), 0);
    finish(start(CLOSE, second, 0, 0), 0);
    fl_snapshot_free(second);
    MUST(fl_disk_pread(r->disk, p, CLUSTER, 3 * CLUSTER, &why));
    r->options = options;
}

TEST(i7_reader_that_hangs_on_the_source)
{
    struct rig r = rig_new(64 * CLUSTER, 0);
    fl_snapshot *s = cut(&r);
    hang_next(r.source, FL_OP_READ, CLUSTER, 3 * CLUSTER);
    struct call *reader = start(READ, s, 2 * CLUSTER, 3 * CLUSTER);
    wait_hanging(r.source, 1);
    check_all_goes_on(&r, s);
    check_waits(reader, 0);
    fl_fault_resume(r.source);
    finish(reader, 0);
    end(s);
    rig_free(&r);
}

TEST(i7_reader_that_hangs_on_the_fleecing_image)
{
    struct rig r = rig_that_spills(64 * CLUSTER, 64 * CLUSTER);
    fl_snapshot *s = cut(&r);
    spill(&r, s, 3, 2);
    hang_next(r.fleecing, FL_OP_READ, 0, 0);
    struct call *reader = start(READ, s, 2 * CLUSTER, 3 * CLUSTER);
    wait_hanging(r.fleecing, 1);
    check_all_goes_on(&r, s);
    check_waits(reader, 0);
    fl_fault_resume(r.fleecing);
    finish(reader, 0);
    end(s);
    rig_free(&r);
}

/* What a reader that hangs on the fleecing image wanted from the stage as well does not take room away from writers. */
TEST(i7_reader_that_hangs_keeps_no_room)
{
    struct rig r = rig_new(64 * CLUSTER, 64 * CLUSTER);
    r.options.stage_size = 8 * CLUSTER;
    fl_snapshot *s = cut(&r);
    write_bytes(&r, NEW, 7 * CLUSTER, 0);
    WAIT_FOR_STATS(s, now.fleecing_bytes > 0 && now.staged_bytes == 7 * CLUSTER - now.fleecing_bytes && now.staged_bytes <= 4 * CLUSTER);
    fault_all(r.fleecing, FL_FAULT_HANG, FL_OP_WRITE | FL_OP_READ, 0, 0, 0);
    for (uint64_t c = 7; c < 11; c++)
        write_bytes(&r, NEW, CLUSTER, c * CLUSTER);             /* these stay in the stage: the spill of older ones hangs */
    wait_hanging(r.fleecing, 1);
    struct call *reader = start(READ, s, 11 * CLUSTER, 0);
    wait_hanging(r.fleecing, 2);
    for (uint64_t c = 12; stats_of(s).staged_bytes < 8 * CLUSTER; c++)
        write_bytes(&r, NEW, CLUSTER, c * CLUSTER);             /* until the stage is full */
    MUST(fl_snapshot_discard(s, 4 * CLUSTER, 7 * CLUSTER, &why));
    finish(start(WRITE, &r, 2 * CLUSTER, 20 * CLUSTER), 0);
    fl_fault_clear(r.fleecing);
    finish(reader, FL_EDISCARDED);
    check_old(s, 7 * CLUSTER, 0);
    check_old(s, 53 * CLUSTER, 11 * CLUSTER);
    end(s);
    rig_free(&r);
}

/* Neither does close wait for ever; the reader is told when it comes back, even where what it read was right. */
TEST(i7_close_while_a_reader_hangs)
{
    int files = count_entries("/proc/self/fd");
    struct rig r = rig_that_spills(64 * CLUSTER, 64 * CLUSTER);
    fl_snapshot *s = cut(&r);
    spill(&r, s, 3, 1);
    hang_next(r.fleecing, FL_OP_READ, 0, 0);
    hang_next(r.source, FL_OP_READ, 0, 0);
    struct call *of_store = start(READ, s, CLUSTER, 3 * CLUSTER), *of_source = start(READ, s, CLUSTER, 30 * CLUSTER);
    wait_hanging(r.fleecing, 1);
    wait_hanging(r.source, 1);
    finish(start(CLOSE, s, 0, 0), 0);
    finish(start(WRITE, &r, 64 * CLUSTER, 0), 0);
    EXPECT(FL_ECLOSED, fl_snapshot_check(s, &why));
    fl_fault_resume(r.fleecing);
    fl_fault_resume(r.source);
    finish(of_store, FL_ECLOSED);
    finish(of_source, FL_ECLOSED);
    fl_snapshot_free(s);
    rig_free(&r);
    check_comes_down("/proc/self/fd", files, 5 * SECOND);
}

#define TIMEOUT (300 * MILLISECOND)

/* A snapshot whose fleecing image hangs on every write and whose stage is full of clusters 0 to 3. */
static fl_snapshot *cut_and_fill(struct rig *r, int policy)
{
    *r = rig_new(64 * CLUSTER, 64 * CLUSTER);
    r->options.stage_size = 4 * CLUSTER;
    r->options.cbw_timeout = TIMEOUT;
    r->options.on_cbw_error = policy;
    fl_snapshot *s = cut(r);
    fault_all(r->fleecing, FL_FAULT_HANG, FL_OP_WRITE, 0, 0, 0);
    uint64_t began = clock_ns();
    for (uint64_t c = 0; c < 4; c++)
        write_bytes(r, NEW, CLUSTER, c * CLUSTER);
    CHECK(clock_ns() - began < TIMEOUT, "writes waited although there was room");
    wait_hanging(r->fleecing, 1);
    CHECK(stats_of(s).room_waits == 0);
    return s;
}

/* A writer that waits while there is nothing to spill yet, as others still read what they save: it has its room when they have. */
TEST(i7_room_from_what_is_published_later)
{
    struct rig r = rig_new(64 * CLUSTER, 64 * CLUSTER);
    r.options.stage_size = 4 * CLUSTER;
    r.options.cbw_timeout = 60 * SECOND;
    fl_snapshot *s = cut(&r);
    struct call *savers[3];
    for (int n = 0; n < 3; n++) {
        hang_next(r.source, FL_OP_READ, 0, 0);
        savers[n] = start(WRITE, &r, CLUSTER, (uint64_t)n * CLUSTER);
        wait_hanging(r.source, n + 1);
    }
    struct call *waiter = start(WRITE, &r, 2 * CLUSTER, 8 * CLUSTER);
    WAIT_FOR_STATS(s, now.room_waits == 1);
    sleep_ns(20 * MILLISECOND);         /* the thread that spills has looked, and sleeps */
    fl_fault_resume(r.source);
    for (int n = 0; n < 3; n++)
        finish(savers[n], 0);
    finish(waiter, 0);
    check_old(s, 64 * CLUSTER, 0);
    end(s);
    rig_free(&r);
}

/* A call that waited until the timeout, or until another one's that began `before` it: its error, and that it took as long as it may. */
static fl_error finish_timed_out(struct call *c, int code, uint64_t before)
{
    while (!atomic_load(&c->done))
        sleep_ns(MILLISECOND / 4);
    uint64_t took = c->took;
    fl_error error = finish(c, code);
    CHECK(took + before >= TIMEOUT && took <= TIMEOUT + SLACK, "%" PRIu64 " ms for a timeout of %" PRIu64, (uint64_t)(took / MILLISECOND),
          (uint64_t)(TIMEOUT / MILLISECOND));
    return error;
}

/* A write that needed room and did not wait for it. */
static void check_does_not_wait(struct rig *r, uint64_t cluster, int code)
{
    struct call *c = start(WRITE, r, CLUSTER, cluster * CLUSTER);
    while (!atomic_load(&c->done))
        sleep_ns(MILLISECOND / 4);
    CHECK(c->took < TIMEOUT / 2, "a later write waited again: %" PRIu64 " ms", (uint64_t)(c->took / MILLISECOND));
    finish(c, code);
}

/* The stage is full and the fleecing image hangs: writes wait for the timeout, all at the same time, later ones not at all; each policy
   does what it says, and when the storage comes back nothing is wrong. */
TEST(i7_full_stage_and_hung_fleecing)
{
    for (int policy = FL_BREAK_SNAPSHOT; policy <= FL_LOSE_RANGE; policy++) {
        struct rig r;
        fl_snapshot *s = cut_and_fill(&r, policy);
        int code = policy == FL_BREAK_GUEST_WRITE ? ETIMEDOUT : 0;
        struct call *w[4];
        for (uint64_t i = 0; i < 4; i++)
            w[i] = start(WRITE, &r, CLUSTER, (8 + i) * CLUSTER);
        check_waits(w[3], TIMEOUT / 2 / MILLISECOND);
        for (uint64_t i = 0; i < 4; i++) {
            fl_error error = finish_timed_out(w[i], code, TIMEOUT / 2);
            CHECK(!code || error.side == FL_SIDE_FLEECING, "side %d: %s", error.side, error.text);
        }
        check_does_not_wait(&r, 12, code);
        check_does_not_wait(&r, 13, code);
        check_does_not_wait(&r, 2, 0);                          /* was saved: needs no room */
        if (policy == FL_BREAK_SNAPSHOT) {
            check_raises(s, FL_EBROKEN, CLUSTER, 0);
            EXPECT(FL_EBROKEN, fl_snapshot_check(s, &why));
            CHECK(why.cause == ETIMEDOUT && why.side == FL_SIDE_FLEECING, "cause %d, side %d", why.cause, why.side);
        } else if (policy == FL_LOSE_RANGE) {
            for (uint64_t c = 8; c < 14; c++)
                check_raises(s, FL_ELOST, CLUSTER, c * CLUSTER);
            CHECK(stats_of(s).clusters_lost == 6);
            check_old(s, 8 * CLUSTER, 0);
            check_old(s, 50 * CLUSTER, 14 * CLUSTER);
        } else {
            check_source(&r, -1, 6 * CLUSTER, 8 * CLUSTER);
            check_old(s, 64 * CLUSTER, 0);
        }
        CHECK(policy == FL_BREAK_GUEST_WRITE || fl_fault_hanging(r.fleecing) == 1);
        fl_fault_clear(r.fleecing);
        if (policy != FL_BREAK_SNAPSHOT)
            WAIT_FOR_STATS(s, now.bytes_spilled > 0);
        finish(start(WRITE, &r, CLUSTER, 20 * CLUSTER), 0);
        if (policy != FL_BREAK_SNAPSHOT) {
            check_old(s, 8 * CLUSTER, 0);
            check_old(s, 50 * CLUSTER, 14 * CLUSTER);
        }
        end(s);
        rig_free(&r);
    }
}

/* Two writers of the same cluster have one timeout each, not one after the other. */
TEST(i7_two_writers_of_one_cluster_without_room)
{
    struct rig r;
    fl_snapshot *s = cut_and_fill(&r, FL_BREAK_GUEST_WRITE);
    struct call *a = start(WRITE, &r, CLUSTER, 8 * CLUSTER), *b = start(WRITE, &r, 100, 8 * CLUSTER + 100);
    check_waits(b, TIMEOUT / 2 / MILLISECOND);
    finish_timed_out(a, ETIMEDOUT, TIMEOUT / 2);
    finish_timed_out(b, ETIMEDOUT, TIMEOUT / 2);
    check_source(&r, -1, CLUSTER, 8 * CLUSTER);
    fl_fault_clear(r.fleecing);
    end(s);
    rig_free(&r);
}

/* A write of many pieces waits for the timeout in all, not for each of them: when no room comes, and when it comes slowly. */
TEST(i7_one_timeout_for_all_pieces)
{
    for (int slowly = 0; slowly < 2; slowly++) {
        struct rig r;
        fl_snapshot *s = cut_and_fill(&r, FL_LOSE_RANGE);
        if (slowly) {
            fl_fault slow = { .ops = FL_OP_WRITE, .action = FL_FAULT_DELAY, .nth = 1, .delay_ns = TIMEOUT / 3 };
            fl_fault_clear(r.fleecing);
            MUST(fl_fault_add(r.fleecing, &slow, &why));
        }
        struct call *w = start(WRITE, &r, 40 * CLUSTER, 8 * CLUSTER);
        sleep_ns(TIMEOUT + SLACK / 2);
        finish_timed_out(w, 0, 0);
        check_raises(s, FL_ELOST, 1, 47 * CLUSTER);
        check_old(s, 8 * CLUSTER, 0);
        fl_fault_clear(r.fleecing);
        end(s);
        rig_free(&r);
    }
}

/* The fleecing image is full: the cause says so. */
TEST(i7_full_fleecing)
{
    for (int by_limit = 0; by_limit < 2; by_limit++) {
        struct rig r = rig_new(64 * CLUSTER, (by_limit ? 64 : 4) * CLUSTER);
        r.options.stage_size = 4 * CLUSTER;
        r.options.cbw_timeout = TIMEOUT;
        r.options.on_cbw_error = FL_BREAK_GUEST_WRITE;
        r.options.fleecing_limit = by_limit ? 4 * CLUSTER : 0;
        fl_snapshot *s = cut(&r);
        for (uint64_t c = 0; c < 8; c++)
            write_bytes(&r, NEW, CLUSTER, c * CLUSTER);
        fl_error error = finish_timed_out(start(WRITE, &r, CLUSTER, 10 * CLUSTER), ENOSPC, 0);
        CHECK(error.side == FL_SIDE_FLEECING, "side %d: %s", error.side, error.text);
        check_does_not_wait(&r, 11, ENOSPC);
        check_old(s, 64 * CLUSTER, 0);
        MUST(fl_snapshot_discard(s, 2 * CLUSTER, 0, &why));     /* makes room, wherever these are */
        finish(start(WRITE, &r, CLUSTER, 11 * CLUSTER), 0);
        check_old(s, 62 * CLUSTER, 2 * CLUSTER);
        CHECK(stats_of(s).fleecing_peak <= 4 * CLUSTER);
        end(s);
        rig_free(&r);
    }
}

/* After a timeout later writes do not wait, until something is freed: from then on there is hope, and they wait again. */
TEST(i7_freed_space_is_worth_waiting_for)
{
    struct rig r = rig_new(64 * CLUSTER, 4 * CLUSTER);
    r.options.stage_size = 4 * CLUSTER;
    r.options.cbw_timeout = TIMEOUT;
    r.options.on_cbw_error = FL_BREAK_GUEST_WRITE;
    fl_snapshot *s = cut(&r);
    for (uint64_t c = 0; c < 8; c++)
        write_bytes(&r, NEW, CLUSTER, c * CLUSTER);
    finish_timed_out(start(WRITE, &r, CLUSTER, 10 * CLUSTER), ENOSPC, 0);
    fl_fault slow = { .ops = FL_OP_WRITE, .action = FL_FAULT_DELAY, .nth = 1, .delay_ns = TIMEOUT / 3 };
    MUST(fl_fault_add(r.fleecing, &slow, &why));
    MUST(fl_snapshot_discard(s, 2 * CLUSTER, 0, &why));         /* the oldest: they are in the fleecing image */
    finish(start(WRITE, &r, CLUSTER, 11 * CLUSTER), 0);
    check_old(s, 62 * CLUSTER, 2 * CLUSTER);
    end(s);
    rig_free(&r);
}

TEST(i7_freed_memory_is_worth_waiting_for)
{
    struct rig r = rig_new(64 * CLUSTER, 0);
    r.options.stage_size = 4 * CLUSTER;
    r.options.cbw_timeout = TIMEOUT;
    r.options.on_cbw_error = FL_BREAK_GUEST_WRITE;
    fl_snapshot *s = cut(&r);
    write_bytes(&r, NEW, 4 * CLUSTER, 0);
    finish_timed_out(start(WRITE, &r, CLUSTER, 10 * CLUSTER), ENOSPC, 0);
    check_does_not_wait(&r, 10, ENOSPC);
    MUST(fl_snapshot_discard(s, CLUSTER, 0, &why));
    write_bytes(&r, NEW, CLUSTER, 10 * CLUSTER);                /* takes the room */
    struct call *w = start(WRITE, &r, CLUSTER, 11 * CLUSTER);
    check_waits(w, 60);
    MUST(fl_snapshot_discard(s, CLUSTER, 10 * CLUSTER, &why));
    finish(w, 0);
    finish_timed_out(start(WRITE, &r, CLUSTER, 12 * CLUSTER), ENOSPC, 0);
    check_old(s, 9 * CLUSTER, CLUSTER);
    end(s);
    rig_free(&r);
}

TEST(i7_storage_comes_back_in_time)
{
    struct rig r;
    fl_snapshot *s = cut_and_fill(&r, FL_BREAK_SNAPSHOT);
    struct call *w = start(WRITE, &r, CLUSTER, 8 * CLUSTER);
    check_waits(w, 100);
    fl_fault_clear(r.fleecing);
    finish(w, 0);
    fl_stats stats = stats_of(s);
    CHECK(stats.room_waits == 1 && stats.room_timeouts == 0);
    check_old(s, 64 * CLUSTER, 0);
    end(s);
    rig_free(&r);
}

#define LARGE 65536ull

/* 512 clusters of 64 KiB in a full stage, which spills four at a time, and lets those who wait in when 32 are free. The first spill hangs. */
static fl_snapshot *cut_and_fill_large(struct rig *r)
{
    enum { SLOTS = 512 };
    *r = rig_new(2 * SLOTS * LARGE, 2 * SLOTS * LARGE);
    r->options.cluster_size = LARGE;
    r->options.stage_size = SLOTS * LARGE;
    fl_snapshot *s = cut(r);
    hang_next(r->fleecing, FL_OP_WRITE, 4 * LARGE, 0);
    for (uint64_t c = 0; c < SLOTS; c++)
        write_bytes(r, NEW, CLUSTER, c * LARGE);
    wait_hanging(r->fleecing, 1);
    return s;
}

/* Who waits is not kept from the room that one spill made because the next one hangs. */
TEST(i7_room_of_one_spill_while_the_next_hangs)
{
    struct rig r;
    fl_snapshot *s = cut_and_fill_large(&r);
    hang_next(r.fleecing, FL_OP_WRITE, 4 * LARGE, 4 * LARGE);
    struct call *w = start(WRITE, &r, CLUSTER, 600 * LARGE);
    check_waits(w, 20);
    fl_fault_resume(r.fleecing);
    wait_hanging(r.fleecing, 1);
    finish(w, 0);
    CHECK(fl_fault_hanging(r.fleecing) == 1);
    fl_fault_resume(r.fleecing);
    check_old(s, 4 * LARGE, 600 * LARGE);
    end(s);
    rig_free(&r);
}

/* Writers are let in by lots: each wait is worth several spills. */
TEST(room_comes_in_lots)
{
    struct rig r;
    fl_snapshot *s = cut_and_fill_large(&r);
    fl_fault slow = { .ops = FL_OP_WRITE, .action = FL_FAULT_DELAY, .nth = 1, .delay_ns = MILLISECOND };
    MUST(fl_fault_add(r.fleecing, &slow, &why));
    fl_fault_resume(r.fleecing);
    for (uint64_t c = 512; c < 1024; c++)
        write_bytes(&r, NEW, CLUSTER, c * LARGE);
    fl_stats stats = stats_of(s);
    CHECK(stats.room_waits > 0 && stats.room_waits <= 512 / 10, "%" PRIu64 " waits for the room of 512 clusters", stats.room_waits);
    end(s);
    rig_free(&r);
}

/* While there is room in the stage nobody notices that the fleecing image hangs. */
TEST(i7_room_left_and_hung_fleecing)
{
    struct rig r = rig_new(64 * CLUSTER, 64 * CLUSTER);
    r.options.cbw_timeout = 20 * SECOND;
    fl_snapshot *s = cut(&r);
    fault_all(r.fleecing, FL_FAULT_HANG, FL_OP_ANY, 0, 0, 0);
    for (uint64_t c = 0; c < 64; c++)
        finish(start(WRITE, &r, CLUSTER, c * CLUSTER), 0);
    CHECK(fl_fault_hanging(r.fleecing) == 1 && stats_of(s).room_waits == 0);
    check_old(s, 64 * CLUSTER, 0);
    fl_fault_clear(r.fleecing);
    end(s);
    rig_free(&r);
}

/* A writer that waits for room holds up neither a cut, nor writers elsewhere, nor a release, which ends its wait. */
TEST(i7_nobody_waits_for_a_writer_that_waits_for_room)
{
    struct rig r;
    fl_snapshot *s = cut_and_fill(&r, FL_BREAK_SNAPSHOT);
    end(s);
    fl_fault_clear(r.fleecing);
    rig_free(&r);
    r = rig_new(64 * CLUSTER, 64 * CLUSTER);
    r.options.stage_size = 4 * CLUSTER;
    s = cut(&r);
    fault_all(r.fleecing, FL_FAULT_HANG, FL_OP_WRITE, 0, 0, 0);
    write_bytes(&r, NEW, 4 * CLUSTER, 12 * CLUSTER);
    wait_hanging(r.fleecing, 1);
    struct call *w = start(WRITE, &r, CLUSTER, 8 * CLUSTER);
    check_waits(w, 60);
    finish(start(WRITE, &r, 4 * CLUSTER, 12 * CLUSTER), 0);     /* saved before */
    fl_snapshot_options options = r.options;
    r.options.fleecing = NULL;
    r.options.stage_size = 16 * CLUSTER;
    fl_snapshot *second;
    uint64_t began = clock_ns();
    MUST(fl_snapshot_cut(&r.disk, &r.options, 1, &second, &why));
    CHECK(clock_ns() - began < SOON);
    r.options = options;
    finish(start(WRITE, &r, CLUSTER, 13 * CLUSTER), 0);
    finish(start(READ, s, 64 * CLUSTER, 0), 0);
    check_waits(w, 0);
    finish(start(RELEASE, s, 4 * CLUSTER, 12 * CLUSTER), 0);
    finish(w, 0);                                               /* only the slots of the hung spill are still in use */
    check_old(s, 12 * CLUSTER, 0);
    uint8_t p[CLUSTER];
    MUST(fl_snapshot_pread(second, p, CLUSTER, 13 * CLUSTER, &why));
    CHECK(p[0] == NEW && p[CLUSTER - 1] == NEW);
    check_old(second, CLUSTER, 8 * CLUSTER);
    fl_fault_clear(r.fleecing);
    end(second);
    end(s);
    rig_free(&r);
}

/* Closing the snapshot, or its disk, ends the wait for room: the write goes on, since nobody wants the old data any more. */
TEST(i7_close_ends_the_wait_for_room)
{
    struct rig r = rig_that_spills(64 * CLUSTER, 64 * CLUSTER);
    fl_snapshot *s = cut(&r);
    fault_all(r.fleecing, FL_FAULT_HANG, FL_OP_WRITE, 0, 0, 0);
    write_bytes(&r, NEW, CLUSTER, 0);                           /* all of the stage, which the hung spill keeps */
    struct call *w = start(WRITE, &r, CLUSTER, 8 * CLUSTER);
    check_waits(w, 60);
    finish(start(CLOSE, s, 0, 0), 0);
    finish(w, 0);
    check_source(&r, NEW, CLUSTER, 8 * CLUSTER);
    fl_snapshot_free(s);
    fl_fault_clear(r.fleecing);
    rig_free(&r);
}

/* 45 s, and all of time, do not overflow into something short. */
TEST(i7_long_timeouts)
{
    const uint64_t timeouts[] = { 45 * SECOND, UINT64_MAX };
    for (unsigned i = 0; i < 2; i++) {
        struct rig r = rig_new(64 * CLUSTER, 64 * CLUSTER);
        r.options.stage_size = 4 * CLUSTER;
        r.options.cbw_timeout = timeouts[i];
        fl_snapshot *s = cut(&r);
        fault_all(r.fleecing, FL_FAULT_HANG, FL_OP_WRITE, 0, 0, 0);
        write_bytes(&r, NEW, 4 * CLUSTER, 0);
        struct call *w = start(WRITE, &r, CLUSTER, 8 * CLUSTER);
        check_waits(w, 2500);           /* 45e9 modulo 2^32 is 2 s */
        fl_fault_clear(r.fleecing);
        finish(w, 0);
        check_old(s, 64 * CLUSTER, 0);
        end(s);
        rig_free(&r);
    }
}

/* Writers that wait for each other's clusters in a row all end when the first does. */
TEST(i7_chain_of_waiting_writers)
{
    struct rig r = rig_new(64 * CLUSTER, 0);
    fl_snapshot *s = cut(&r);
    hang_next(r.source, FL_OP_READ, CLUSTER, 0);
    struct call *w[8];
    w[0] = start(WRITE, &r, 2 * CLUSTER, 0);
    wait_hanging(r.source, 1);
    for (uint64_t i = 1; i < 8; i++)
        w[i] = start(WRITE, &r, 2 * CLUSTER, i * CLUSTER);
    check_waits(w[1], 60);
    fl_fault_resume(r.source);
    for (unsigned i = 0; i < 8; i++)
        finish(w[i], 0);
    check_old(s, 64 * CLUSTER, 0);
    CHECK(stats_of(s).clusters_saved == 9);
    end(s);
    rig_free(&r);
}
