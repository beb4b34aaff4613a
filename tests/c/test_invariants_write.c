/* test_invariants_write.c: I1, I2 and I6: what must have happened before the source changes.
 *
 * Scenarios as rig.h describes them. tests/mutants.py breaks the engine line by line and names the scenario that notices.
 */
#define _GNU_SOURCE
#include "rig.h"

/* ---- I1: saved is set only after all the bytes of the cluster's old data are in the store ---- */

TEST(i1_not_saved_before_its_bytes_are_stored)
{
    struct rig r = rig_new(16 * CLUSTER, 0);
    fl_snapshot *s = cut(&r);
    hang_next(r.source, FL_OP_READ, CLUSTER, 3 * CLUSTER);
    struct call *w = start(WRITE, &r, 100, 3 * CLUSTER + 50);
    wait_hanging(r.source, 1);                          /* the writer is reading the old data */
    check_old(s, CLUSTER, 3 * CLUSTER);
    check_old(s, 16 * CLUSTER, 0);
    CHECK(stats_of(s).clusters_saved == 0);
    check_source(&r, -1, CLUSTER, 3 * CLUSTER);
    fl_fault_resume(r.source);
    finish(w, 0);
    CHECK(stats_of(s).clusters_saved == 1);
    check_source(&r, NEW, 100, 3 * CLUSTER + 50);
    check_old(s, 16 * CLUSTER, 0);
    end(s);
    rig_free(&r);
}

/* A saving read that fails, or that ends halfway, has saved nothing, under each policy. */
TEST(i1_failed_read_saves_nothing)
{
    for (int policy = FL_BREAK_SNAPSHOT; policy <= FL_LOSE_RANGE; policy++) {
        for (int partly = 0; partly < 2; partly++) {
            struct rig r = rig_new(16 * CLUSTER, 0);
            r.options.on_cbw_error = policy;
            fl_snapshot *s = cut(&r);
            fault_all(r.source, partly ? FL_FAULT_SHORT : FL_FAULT_ERROR, FL_OP_READ, EIO, CLUSTER, 3 * CLUSTER);
            fl_error error = finish(start(WRITE, &r, 2 * CLUSTER, 3 * CLUSTER), policy == FL_BREAK_GUEST_WRITE ? EIO : 0);
            fl_fault_clear(r.source);
            if (policy == FL_BREAK_GUEST_WRITE) {
                CHECK(error.side == FL_SIDE_SOURCE && error.cause == EIO, "side %d, cause %d: %s", error.side, error.cause, error.text);
                check_source(&r, -1, 16 * CLUSTER, 0);
                check_old(s, 16 * CLUSTER, 0);
                write_bytes(&r, NEW, 2 * CLUSTER, 3 * CLUSTER);
                check_old(s, 16 * CLUSTER, 0);
                CHECK(stats_of(s).clusters_saved == 2);
            } else if (policy == FL_BREAK_SNAPSHOT) {
                check_raises(s, FL_EBROKEN, CLUSTER, 0);
                EXPECT(FL_EBROKEN, fl_snapshot_check(s, &why));
                CHECK(why.cause == EIO && why.side == FL_SIDE_SOURCE && why.length && why.offset < 5 * CLUSTER
                      && why.offset + why.length > 3 * CLUSTER, "cause %d, side %d, %" PRIu64 " at %" PRIu64, why.cause, why.side,
                      why.length, why.offset);
            } else {
                check_raises(s, FL_ELOST, CLUSTER, 3 * CLUSTER);
                check_old(s, 3 * CLUSTER, 0);
                check_old(s, 12 * CLUSTER, 4 * CLUSTER);        /* its neighbour could be read, and is not lost */
                CHECK(stats_of(s).clusters_lost == 1);
            }
            check_source(&r, NEW, 2 * CLUSTER, 3 * CLUSTER);
            end(s);
            rig_free(&r);
        }
    }
}

/* A read that the storage does in two goes is whole all the same. */
TEST(i1_short_read_is_completed)
{
    struct rig r = rig_new(16 * CLUSTER, 0);
    fl_snapshot *s = cut(&r);
    fault_next(r.source, FL_FAULT_SHORT, FL_OP_READ, 0, CLUSTER, 3 * CLUSTER);
    write_bytes(&r, NEW, 4 * CLUSTER, 2 * CLUSTER);
    check_old(s, 16 * CLUSTER, 0);
    end(s);
    rig_free(&r);
}

TEST(i1_released_while_saving)
{
    struct rig r = rig_new(16 * CLUSTER, 0);
    fl_snapshot *s = cut(&r);
    hang_next(r.source, FL_OP_READ, CLUSTER, 3 * CLUSTER);
    struct call *w = start(WRITE, &r, CLUSTER, 3 * CLUSTER);
    wait_hanging(r.source, 1);
    MUST(fl_snapshot_discard(s, CLUSTER, 3 * CLUSTER, &why));
    check_raises(s, FL_EDISCARDED, 1, 3 * CLUSTER + 7);
    fl_fault_resume(r.source);
    finish(w, 0);
    check_raises(s, FL_EDISCARDED, 1, 3 * CLUSTER + 7);
    WAIT_FOR_STATS(s, now.staged_bytes == 0);
    check_old(s, 3 * CLUSTER, 0);
    end(s);
    rig_free(&r);
}

/* Several snapshots, of different cluster sizes, need the same old data: it is read once, and each has it. */
TEST(i1_several_snapshots_one_read)
{
    struct rig r = rig_new(64 * CLUSTER, 0);
    fl_snapshot *s[3];
    for (unsigned i = 0; i < 3; i++) {
        r.options.cluster_size = CLUSTER;
        s[i] = cut(&r);
    }
    r.options.cluster_size = 4 * CLUSTER;
    fl_snapshot *coarse = cut(&r);
    uint64_t reads = fl_fault_seen(r.source, FL_OP_READ);
    write_bytes(&r, NEW, 4 * CLUSTER, 8 * CLUSTER);
    CHECK(fl_fault_seen(r.source, FL_OP_READ) == reads + 1, "%" PRIu64 " reads", fl_fault_seen(r.source, FL_OP_READ) - reads);
    write_bytes(&r, NEW, 1, 17 * CLUSTER);
    for (unsigned i = 0; i < 3; i++) {
        CHECK(stats_of(s[i]).clusters_saved == 5);
        check_old(s[i], 64 * CLUSTER, 0);
        end(s[i]);
    }
    CHECK(stats_of(coarse).clusters_saved == 2);
    check_old(coarse, 64 * CLUSTER, 0);
    end(coarse);
    rig_free(&r);
}

/* Zeros and holes are saved as such, and cost nothing. */
TEST(i1_zeros_are_not_stored)
{
    struct rig r = rig_new(16 * CLUSTER, 0);
    uint8_t p[4 * CLUSTER];
    MUST(fl_disk_discard(r.disk, 4 * CLUSTER, 0, &why));
    MUST(fl_disk_zero(r.disk, 4 * CLUSTER, 0, &why));
    memset(p, 0, sizeof p);
    MUST(fl_disk_pwrite(r.disk, p, CLUSTER, 2 * CLUSTER, &why));        /* a hole, and zeros that are data */
    fl_snapshot *s = cut(&r);
    write_bytes(&r, NEW, 4 * CLUSTER, 0);
    fl_stats stats = stats_of(s);
    CHECK(stats.zero_clusters == 4 && stats.clusters_saved == 0 && stats.staged_bytes == 0, "%" PRIu64 " zero, %" PRIu64 " saved, %" PRIu64
          " staged", stats.zero_clusters, stats.clusters_saved, stats.staged_bytes);
    memset(p, 1, sizeof p);
    MUST(fl_snapshot_pread(s, p, 4 * CLUSTER, 0, &why));
    for (uint64_t i = 0; i < 4 * CLUSTER; i++)
        CHECK(p[i] == 0, "%02x at %" PRIu64, p[i], i);
    fl_extent e[8];
    size_t found;
    MUST(fl_snapshot_extents(s, 0, 4 * CLUSTER, e, 8, &found, &why));
    CHECK(found == 1 && e[0].kind == FL_ZERO && e[0].length == 4 * CLUSTER);
    end(s);
    rig_free(&r);
}

/* ---- I2: the source changes only where every live snapshot is served, and broken is visible before ---- */

/* While one writer is saving a cluster, no other may change it, whatever either does. */
TEST(i2_second_writer_waits_for_the_first)
{
    for (int first = WRITE; first <= DISCARD; first++) {
        for (int second = WRITE; second <= DISCARD; second++) {
            struct rig r = rig_new(16 * CLUSTER, 0);
            fl_snapshot *s = cut(&r);
            hang_next(r.source, FL_OP_READ, CLUSTER, 3 * CLUSTER);
            struct call *a = start(first, &r, 100, 3 * CLUSTER + 500);
            wait_hanging(r.source, 1);
            uint64_t seen = fl_fault_seen(r.source, FL_OP_WRITE | FL_OP_ZERO | FL_OP_DISCARD);
            struct call *b = start(second, &r, 100, 3 * CLUSTER + 2000);
            struct call *c = start(second, &r, 2 * CLUSTER, 2 * CLUSTER);
            check_waits(b, 60);
            check_waits(c, 0);
            check_waits(a, 0);
            CHECK(fl_fault_seen(r.source, FL_OP_WRITE | FL_OP_ZERO | FL_OP_DISCARD) == seen, "somebody changed the source");
            check_source(&r, -1, 16 * CLUSTER, 0);
            fl_fault_resume(r.source);
            finish(a, 0);
            finish(b, 0);
            finish(c, 0);
            CHECK(stats_of(s).claim_waits == 2, "%" PRIu64 " waits", stats_of(s).claim_waits);
            check_old(s, 16 * CLUSTER, 0);
            end(s);
            rig_free(&r);
        }
    }
}

/* The first writer's save fails and its write with it: the one that waited saves the cluster itself. */
TEST(i2_second_writer_saves_when_the_first_fails)
{
    struct rig r = rig_new(16 * CLUSTER, 0);
    r.options.on_cbw_error = FL_BREAK_GUEST_WRITE;
    fl_snapshot *s = cut(&r);
    hang_next(r.source, FL_OP_READ, CLUSTER, 3 * CLUSTER);
    fail_next(r.middle, FL_OP_READ, EIO, CLUSTER, 3 * CLUSTER);
    struct call *a = start(WRITE, &r, 100, 3 * CLUSTER);
    wait_hanging(r.source, 1);
    struct call *b = start(WRITE, &r, 100, 3 * CLUSTER + 1000);
    check_waits(b, 60);
    fl_fault_resume(r.source);
    finish(a, EIO);
    finish(b, 0);
    check_source(&r, -1, 1000, 3 * CLUSTER);
    check_source(&r, NEW, 100, 3 * CLUSTER + 1000);
    CHECK(stats_of(s).clusters_saved == 1);
    check_old(s, 16 * CLUSTER, 0);
    end(s);
    rig_free(&r);
}

/* When a write is let through although a save failed, readers know before the source changes. */
TEST(i2_broken_and_lost_are_visible_before_the_write)
{
    for (int policy = FL_BREAK_SNAPSHOT; policy <= FL_LOSE_RANGE; policy += FL_LOSE_RANGE - FL_BREAK_SNAPSHOT) {
        for (int what = WRITE; what <= DISCARD; what++) {
            struct rig r = rig_new(16 * CLUSTER, 0);
            int op = what == WRITE ? FL_OP_WRITE : what == ZERO ? FL_OP_ZERO : FL_OP_DISCARD;
            r.options.on_cbw_error = policy;
            fl_snapshot *s = cut(&r);
            fail_next(r.source, FL_OP_READ, EIO, CLUSTER, 3 * CLUSTER);
            hang_next(r.source, op, CLUSTER, 3 * CLUSTER);
            struct call *w = start(what, &r, CLUSTER, 3 * CLUSTER);
            wait_hanging(r.source, 1);
            check_source(&r, -1, CLUSTER, 3 * CLUSTER);
            check_raises(s, policy == FL_LOSE_RANGE ? FL_ELOST : FL_EBROKEN, CLUSTER, 3 * CLUSTER);
            if (policy == FL_LOSE_RANGE)
                check_old(s, 3 * CLUSTER, 0);
            else
                EXPECT(FL_EBROKEN, fl_snapshot_check(s, &why));
            fl_fault_resume(r.source);
            finish(w, 0);
            check_raises(s, policy == FL_LOSE_RANGE ? FL_ELOST : FL_EBROKEN, CLUSTER, 3 * CLUSTER);
            end(s);
            rig_free(&r);
        }
    }
}

/* A writer that waited for another's save, which failed: the mark is there before the second write as well. */
TEST(i2_broken_is_visible_before_a_waiting_write)
{
    for (int policy = FL_BREAK_SNAPSHOT; policy <= FL_LOSE_RANGE; policy += FL_LOSE_RANGE - FL_BREAK_SNAPSHOT) {
        struct rig r = rig_new(16 * CLUSTER, 0);
        int code = policy == FL_LOSE_RANGE ? FL_ELOST : FL_EBROKEN;
        r.options.on_cbw_error = policy;
        fl_snapshot *s = cut(&r);
        hang_next(r.source, FL_OP_READ, CLUSTER, 3 * CLUSTER);
        fail_next(r.middle, FL_OP_READ, EIO, CLUSTER, 3 * CLUSTER);
        struct call *a = start(WRITE, &r, 100, 3 * CLUSTER);
        wait_hanging(r.source, 1);
        struct call *b = start(WRITE, &r, 100, 3 * CLUSTER + 1000);
        check_waits(b, 60);
        hang_next(r.source, FL_OP_WRITE, 1, 3 * CLUSTER);
        hang_next(r.source, FL_OP_WRITE, 1, 3 * CLUSTER + 1000);
        fl_fault_resume(r.source);
        wait_hanging(r.source, 2);
        check_source(&r, -1, CLUSTER, 3 * CLUSTER);
        check_raises(s, code, CLUSTER, 3 * CLUSTER);
        fl_fault_resume(r.source);
        finish(a, 0);
        finish(b, 0);
        check_raises(s, code, CLUSTER, 3 * CLUSTER);
        end(s);
        rig_free(&r);
    }
}

/* When the source is about to change, every live snapshot has what it needs; also of clusters that are written in part, and of the tail. */
TEST(i2_saved_before_the_write)
{
    for (int what = WRITE; what <= DISCARD; what++) {
        int op = what == WRITE ? FL_OP_WRITE : what == ZERO ? FL_OP_ZERO : FL_OP_DISCARD;
        uint64_t size = 16 * CLUSTER + 513;
        struct rig r = rig_new(size, 0);
        fl_snapshot *s[2] = { cut(&r), NULL };
        r.options.cluster_size = 2 * CLUSTER;
        s[1] = cut(&r);
        uint64_t offset = 14 * CLUSTER - 1, count = size - offset - 1;       /* from the last byte of 13 to the last but one of all */
        hang_next(r.source, op, count, offset);
        struct call *w = start(what, &r, count, offset);
        wait_hanging(r.source, 1);
        uint64_t reads = fl_fault_seen(r.source, FL_OP_READ);
        for (unsigned i = 0; i < 2; i++)
            check_old(s[i], size - 13 * CLUSTER, 13 * CLUSTER);
        CHECK(fl_fault_seen(r.source, FL_OP_READ) == reads, "a saved cluster was read from the source");
        CHECK(stats_of(s[0]).clusters_saved == 4 && stats_of(s[1]).clusters_saved == 3);
        fl_fault_resume(r.source);
        finish(w, 0);
        for (unsigned i = 0; i < 2; i++) {
            check_old(s[i], size, 0);
            end(s[i]);
        }
        rig_free(&r);
    }
}

/* A write larger than the stage is done in pieces, each saved before it goes through. */
TEST(i2_write_larger_than_the_stage)
{
    struct rig r = rig_new(64 * CLUSTER, 64 * CLUSTER);
    r.options.stage_size = 4 * CLUSTER;
    fl_snapshot *s = cut(&r);
    write_bytes(&r, NEW, 62 * CLUSTER, CLUSTER + 5);
    check_source(&r, NEW, 62 * CLUSTER, CLUSTER + 5);
    check_old(s, 64 * CLUSTER, 0);
    CHECK(stats_of(s).staged_peak <= 4 * CLUSTER, "%" PRIu64 " bytes in the stage", stats_of(s).staged_peak);
    end(s);
    rig_free(&r);
}

/* A cut waits for the writes that run, which saved nothing for it: so they are part of what it shows. */
TEST(i2_cut_waits_for_running_writes)
{
    for (int what = WRITE; what <= DISCARD; what++) {
        int op = what == WRITE ? FL_OP_WRITE : what == ZERO ? FL_OP_ZERO : FL_OP_DISCARD;
        struct rig r = rig_new(16 * CLUSTER, 0);
        hang_next(r.source, op, CLUSTER, 3 * CLUSTER);
        struct call *w = start(what, &r, CLUSTER, 3 * CLUSTER);
        wait_hanging(r.source, 1);
        struct call *c = start(CUT, &r, 0, 0);
        check_waits(c, 60);
        struct call *late = start(WRITE, &r, CLUSTER, 5 * CLUSTER);     /* comes after the cut that is waiting */
        sleep_ns(20 * MILLISECOND);
        fl_fault_resume(r.source);
        finish(w, 0);
        uint64_t deadline = clock_ns() + SOON;
        while (!atomic_load(&c->done) && clock_ns() < deadline)
            sleep_ns(MILLISECOND);
        CHECK(atomic_load(&c->done) && c->rc == 0);
        fl_snapshot *s = c->made;
        finish(c, 0);
        finish(late, 0);
        uint8_t before[CLUSTER], after[CLUSTER];
        MUST(fl_snapshot_pread(s, before, CLUSTER, 3 * CLUSTER, &why));
        MUST(fl_image_pread(r.raw, after, CLUSTER, 3 * CLUSTER, &why));
        CHECK(!memcmp(before, after, CLUSTER), "the snapshot does not show a write that was done before it");
        CHECK(what != WRITE || (before[0] == NEW && before[CLUSTER - 1] == NEW), "the write is missing");
        check_old(s, 3 * CLUSTER, 0);
        check_old(s, 12 * CLUSTER, 4 * CLUSTER);
        end(s);
        rig_free(&r);
    }
}

/* The guest's write itself fails: its error, and the snapshot is right whatever the source holds now. */
TEST(i2_failed_write_of_the_guest)
{
    struct rig r = rig_new(16 * CLUSTER, 0);
    fl_snapshot *s = cut(&r);
    fault_next(r.source, FL_FAULT_SHORT, FL_OP_WRITE, EIO, CLUSTER, 3 * CLUSTER);
    fl_error error = finish(start(WRITE, &r, 2 * CLUSTER, 3 * CLUSTER), EIO);
    CHECK(error.side == FL_SIDE_SOURCE && error.cause == EIO, "side %d, cause %d", error.side, error.cause);
    MUST(fl_snapshot_check(s, &why));
    check_old(s, 16 * CLUSTER, 0);
    end(s);
    rig_free(&r);
}

/* Whatever the source's errno is, it reaches the guest as that: also those that the engine uses among its own parts. */
TEST(i2_error_codes_of_the_source)
{
    const int codes[] = { EIO, ENOSPC, EAGAIN, ETIMEDOUT, ENOENT, FL_ECLOSED, FL_EINTERRUPTED };
    for (unsigned i = 0; i < sizeof codes / sizeof *codes; i++) {
        for (int what = WRITE; what <= DISCARD; what++) {
            struct rig r = rig_new(16 * CLUSTER, 0);
            r.options.on_cbw_error = FL_BREAK_GUEST_WRITE;
            fl_snapshot *s = cut(&r);
            fault_all(r.source, FL_FAULT_ERROR, FL_OP_READ, codes[i], 0, 0);
            fl_error error = finish(start(what, &r, CLUSTER, 3 * CLUSTER), codes[i]);
            CHECK(error.side == FL_SIDE_SOURCE && error.cause == codes[i], "side %d, cause %d", error.side, error.cause);
            fl_fault_clear(r.source);
            fault_all(r.source, FL_FAULT_ERROR, FL_OP_WRITE | FL_OP_ZERO | FL_OP_DISCARD, codes[i], 0, 0);
            error = finish(start(what, &r, CLUSTER, 3 * CLUSTER), codes[i]);
            CHECK(error.side == FL_SIDE_SOURCE && error.cause == codes[i], "side %d, cause %d", error.side, error.cause);
            fl_fault_clear(r.source);
            check_source(&r, -1, 16 * CLUSTER, 0);
            write_bytes(&r, NEW, CLUSTER, 3 * CLUSTER);
            check_old(s, 16 * CLUSTER, 0);
            fault_all(r.source, FL_FAULT_ERROR, FL_OP_READ, codes[i], 0, 0);
            uint8_t p[CLUSTER];
            EXPECT(codes[i], fl_snapshot_pread(s, p, CLUSTER, 5 * CLUSTER, &why));
            CHECK(why.side == FL_SIDE_SOURCE, "side %d", why.side);
            end(s);
            rig_free(&r);
        }
    }
}

/* ---- I6: a dirty bit is set before the write that it stands for; only a cut or a commit clears it ---- */

#define GRAIN (16 * CLUSTER)

static uint64_t dirty_bytes(struct rig *r)
{
    uint64_t granularity, dirty;
    MUST(fl_disk_bitmap_info(r->disk, "b", &granularity, &dirty, &why));
    CHECK(granularity == GRAIN);
    return dirty;
}

TEST(i6_dirty_before_the_write)
{
    for (int what = WRITE; what <= DISCARD; what++) {
        int op = what == WRITE ? FL_OP_WRITE : what == ZERO ? FL_OP_ZERO : FL_OP_DISCARD;
        for (int with_snapshot = 0; with_snapshot < 2; with_snapshot++) {
            struct rig r = rig_new(64 * CLUSTER, 0);
            fl_snapshot *s = with_snapshot ? cut(&r) : NULL;
            MUST(fl_disk_bitmap_add(r.disk, "b", GRAIN, &why));
            CHECK(dirty_bytes(&r) == 0);
            hang_next(r.source, op, CLUSTER, 31 * CLUSTER);
            struct call *w = start(what, &r, CLUSTER + 1, 31 * CLUSTER);        /* one byte is in the next granule */
            wait_hanging(r.source, 1);
            CHECK(dirty_bytes(&r) == 2 * GRAIN, "%" PRIu64 " bytes are dirty", dirty_bytes(&r));
            fl_fault_resume(r.source);
            finish(w, 0);
            fl_extent e[4];
            size_t found;
            MUST(fl_disk_bitmap_extents(r.disk, "b", 0, 64 * CLUSTER, e, 4, &found, &why));
            CHECK(found == 3 && e[0].kind == FL_OUTSIDE && e[1].kind == FL_DATA && e[1].offset == GRAIN && e[1].length == 2 * GRAIN
                  && e[2].kind == FL_OUTSIDE);
            if (s)
                end(s);
            rig_free(&r);
        }
    }
}

/* A cut freezes the bitmap and starts a new one; what the frozen one does not contain is outside, and not saved. */
TEST(i6_cut_freezes_and_close_gives_back)
{
    for (int commits = 0; commits < 2; commits++) {
        struct rig r = rig_new(64 * CLUSTER, 0);
        MUST(fl_disk_bitmap_add(r.disk, "b", GRAIN, &why));
        write_bytes(&r, old_byte(0), 1, 0);                     /* granule 0 is dirty, the bytes are the same */
        r.options.bitmap = "b";
        fl_snapshot *s = cut(&r);
        CHECK(dirty_bytes(&r) == 0, "the cut did not start a new bitmap");
        EXPECT(EBUSY, fl_disk_bitmap_remove(r.disk, "b", &why));
        write_bytes(&r, NEW, CLUSTER, 20 * CLUSTER);
        CHECK(stats_of(s).clusters_saved == 0 && dirty_bytes(&r) == GRAIN);
        check_raises(s, FL_EOUTSIDE, CLUSTER, 20 * CLUSTER);
        check_raises(s, FL_EOUTSIDE, 2 * CLUSTER, 15 * CLUSTER);
        fl_extent e[4];
        size_t found;
        MUST(fl_snapshot_extents(s, 0, 64 * CLUSTER, e, 4, &found, &why));
        CHECK(found == 2 && e[0].kind == FL_DATA && e[0].length == GRAIN && e[1].kind == FL_OUTSIDE && e[1].length == 3 * GRAIN);
        check_old(s, GRAIN, 0);
        MUST(fl_snapshot_discard(s, GRAIN, 0, &why));
        MUST(fl_disk_flush(r.disk, &why));
        CHECK(dirty_bytes(&r) == GRAIN, "something but a cut cleared a bit");
        if (commits)
            MUST(fl_snapshot_commit(s, &why));
        CHECK(dirty_bytes(&r) == GRAIN);
        end(s);
        CHECK(dirty_bytes(&r) == (commits ? 1 : 2) * GRAIN, "%" PRIu64 " bytes are dirty after close %s a commit", dirty_bytes(&r),
              commits ? "with" : "without");
        MUST(fl_disk_bitmap_remove(r.disk, "b", &why));
        rig_free(&r);
    }
}

/* An incremental saves what is in its bitmap. */
TEST(i6_incremental_is_right)
{
    struct rig r = rig_new(64 * CLUSTER + 513, 0);
    MUST(fl_disk_bitmap_add(r.disk, "b", GRAIN, &why));
    write_bytes(&r, old_byte(0), 1, 0);
    write_bytes(&r, old_byte(64 * CLUSTER), 1, 64 * CLUSTER);
    r.options.bitmap = "b";
    fl_snapshot *s = cut(&r);
    write_bytes(&r, NEW, 64 * CLUSTER + 513, 0);
    CHECK(stats_of(s).clusters_saved == 17, "%" PRIu64, stats_of(s).clusters_saved);
    check_old(s, GRAIN, 0);
    check_old(s, 513, 64 * CLUSTER);
    check_raises(s, FL_EOUTSIDE, 48 * CLUSTER, GRAIN);
    end(s);
    CHECK(dirty_bytes(&r) == 64 * CLUSTER + 513);
    rig_free(&r);
}

/* A whole one saves everything, and tells all the same what is in its bitmap. What was copied of that is discarded, and no more. */
TEST(i6_whole_incremental_is_right)
{
    for (int commits = 0; commits < 2; commits++) {
        struct rig r = rig_new(3 * GRAIN + 513, 0);
        MUST(fl_disk_bitmap_add(r.disk, "b", GRAIN, &why));
        write_bytes(&r, old_byte(GRAIN), 1, GRAIN);
        r.options.bitmap = "b";
        r.options.whole = 1;
        fl_snapshot *s = cut(&r);
        check_old(s, 3 * GRAIN + 513, 0);                    /* from the source */
        write_bytes(&r, NEW, 3 * GRAIN + 513, 0);
        CHECK(stats_of(s).clusters_saved == 49, "%" PRIu64, stats_of(s).clusters_saved);
        check_old(s, 3 * GRAIN + 513, 0);
        fl_extent e[8];
        size_t found;
        MUST(fl_snapshot_extents(s, 0, 3 * GRAIN + 513, e, 8, &found, &why));
        CHECK(found == 3 && e[0].kind == FL_OUTSIDE && e[1].kind == FL_DATA && e[1].offset == GRAIN && e[1].length == GRAIN
              && e[2].kind == FL_OUTSIDE && e[2].length == GRAIN + 513);
        MUST(fl_snapshot_extents_readable(s, 0, 3 * GRAIN + 513, e, 8, &found, &why));
        CHECK(found == 1 && e[0].kind == FL_DATA && e[0].length == 3 * GRAIN + 513);

        fl_image *target;
        fl_backup *job;
        fl_backup_options options = { .granularity = 2 * GRAIN, .workers = 1, .discard = 1 };   /* one granule has both */
        fl_progress progress;
        MUST(fl_image_create_nameless(directory, 3 * GRAIN + 513, &target, &why));
        MUST(fl_backup_start(s, target, &options, &job, &why));
        MUST(fl_backup_wait(job, 60 * SECOND, &why));
        MUST(fl_backup_progress(job, &progress, &why));
        CHECK(progress.total == GRAIN && progress.done == GRAIN && progress.data_bytes == GRAIN);
        fl_backup_free(job);
        fl_image_free(target);
        CHECK(stats_of(s).clusters_discarded == 16, "%" PRIu64, stats_of(s).clusters_discarded);
        check_raises(s, FL_EDISCARDED, CLUSTER, GRAIN);
        check_old(s, GRAIN, 0);
        check_old(s, GRAIN + 513, 2 * GRAIN);
        MUST(fl_snapshot_discard(s, CLUSTER, 0, &why));         /* by whoever read it without looking at the bitmap */
        check_raises(s, FL_EDISCARDED, CLUSTER, 0);
        MUST(fl_snapshot_extents(s, 0, GRAIN, e, 8, &found, &why));
        CHECK(found == 1 && e[0].kind == FL_OUTSIDE);
        MUST(fl_snapshot_extents_readable(s, 0, 2 * GRAIN, e, 8, &found, &why));
        CHECK(found == 3 && e[0].kind == FL_DISCARDED && e[0].length == CLUSTER && e[1].kind == FL_DATA && e[2].kind == FL_DISCARDED
              && e[2].offset == GRAIN);
        MUST(commits ? fl_snapshot_commit(s, &why) : fl_snapshot_abort(s, &why));
        end(s);
        CHECK(dirty_bytes(&r) == 3 * GRAIN + 513);           /* all of it was written since the cut */
        rig_free(&r);
    }
}

/* What becomes of its bitmap is about the bitmap: neither what was saved nor what was lost outside of it gets in. */
TEST(i6_whole_incremental_gives_back_its_bitmap)
{
    for (int commits = 0; commits < 2; commits++) {
        struct rig r = rig_new(64 * CLUSTER, 0);
        MUST(fl_disk_bitmap_add(r.disk, "b", GRAIN, &why));
        write_bytes(&r, old_byte(GRAIN), 1, GRAIN);
        r.options.bitmap = "b";
        r.options.whole = 1;
        r.options.on_cbw_error = FL_LOSE_RANGE;
        fl_snapshot *s = cut(&r);
        fail_next(r.source, FL_OP_READ, EIO, CLUSTER, 3 * GRAIN);
        write_bytes(&r, NEW, CLUSTER, 3 * GRAIN);
        CHECK(stats_of(s).clusters_lost == 1);
        check_raises(s, FL_ELOST, 3 * GRAIN, CLUSTER);
        check_old(s, GRAIN, GRAIN);
        check_old(s, GRAIN, 0);
        MUST(commits ? fl_snapshot_commit(s, &why) : fl_snapshot_abort(s, &why));
        end(s);
        fl_extent e[4];
        size_t found;
        MUST(fl_disk_bitmap_extents(r.disk, "b", 0, 64 * CLUSTER, e, 4, &found, &why));
        CHECK(e[0].kind == FL_OUTSIDE && e[0].length == (commits ? 3 : 1) * GRAIN);
        CHECK(dirty_bytes(&r) == (commits ? 1 : 2) * GRAIN, "%" PRIu64, dirty_bytes(&r));
        rig_free(&r);
    }
}

/* A cut that fails, alone or for another disk of its group, clears nothing and leaves no snapshot behind. */
TEST(i6_failed_cut_clears_nothing)
{
    struct rig r = rig_new(64 * CLUSTER, 0), other = rig_new(16 * CLUSTER, 0);
    MUST(fl_disk_bitmap_add(r.disk, "b", GRAIN, &why));
    write_bytes(&r, NEW, CLUSTER, 0);
    r.options.bitmap = other.options.bitmap = "b";
    fl_disk *disks[2] = { r.disk, other.disk };
    fl_snapshot_options options[2] = { r.options, other.options };
    fl_snapshot *made[2] = { NULL, NULL };
    EXPECT(ENOENT, fl_snapshot_cut(disks, options, 2, made, &why));
    disks[1] = r.disk;
    EXPECT(EINVAL, fl_snapshot_cut(disks, options, 2, made, &why));
    options[0].cluster_size = 5000;
    EXPECT(EINVAL, fl_snapshot_cut(disks, options, 1, made, &why));
    CHECK(!made[0] && !made[1] && dirty_bytes(&r) == GRAIN);
    uint64_t reads = fl_fault_seen(r.source, FL_OP_READ);
    write_bytes(&r, NEWER, CLUSTER, 0);
    CHECK(fl_fault_seen(r.source, FL_OP_READ) == reads, "somebody saves for a cut that failed");
    MUST(fl_disk_bitmap_remove(r.disk, "b", &why));
    rig_free(&r);
    rig_free(&other);
}
