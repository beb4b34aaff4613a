/* test_invariants_read.c: I3 and I4: what a reader of a snapshot may return, and that what it was told once stays true.
 *
 * Scenarios as rig.h describes them. tests/mutants.py breaks the engine line by line and names the scenario that notices.
 */
#define _GNU_SOURCE
#include "rig.h"

/* ---- I3: a reader looks again after its read, whichever side it read ---- */

enum meanwhile { SAVED, RELEASED, BROKEN, BROKEN_ELSEWHERE, LOST };

/* A reader's read of the source hangs; meanwhile the guest overwrites what it is about to read. */
static void reader_of_the_source(enum meanwhile meanwhile, int code)
{
    struct rig r = rig_new(16 * CLUSTER, 0);
    r.options.on_cbw_error = meanwhile == LOST ? FL_LOSE_RANGE : FL_BREAK_SNAPSHOT;
    fl_snapshot *s = cut(&r);
    hang_next(r.source, FL_OP_READ, CLUSTER, 3 * CLUSTER);
    struct call *reader = start(READ, s, CLUSTER, 3 * CLUSTER);
    wait_hanging(r.source, 1);
    if (meanwhile == RELEASED)
        MUST(fl_snapshot_discard(s, CLUSTER, 3 * CLUSTER, &why));
    if (meanwhile == BROKEN || meanwhile == LOST)
        fail_next(r.source, FL_OP_READ, EIO, CLUSTER, 3 * CLUSTER);
    if (meanwhile == BROKEN_ELSEWHERE)
        fail_next(r.source, FL_OP_READ, EIO, CLUSTER, 9 * CLUSTER);
    if (meanwhile == BROKEN_ELSEWHERE)
        finish(start(WRITE, &r, CLUSTER, 9 * CLUSTER), 0);
    finish(start(WRITE, &r, CLUSTER, 3 * CLUSTER), 0);
    check_source(&r, NEW, CLUSTER, 3 * CLUSTER);
    fl_fault_resume(r.source);
    finish(reader, code);               /* 0: it checks that the bytes are the old ones */
    CHECK(stats_of(s).reads_repeated == (meanwhile == SAVED), "%" PRIu64 " repeated", stats_of(s).reads_repeated);
    end(s);
    rig_free(&r);
}

TEST(i3_saved_meanwhile) { reader_of_the_source(SAVED, 0); }
TEST(i3_released_meanwhile) { reader_of_the_source(RELEASED, FL_EDISCARDED); }
TEST(i3_broken_meanwhile) { reader_of_the_source(BROKEN, FL_EBROKEN); }
TEST(i3_broken_elsewhere_meanwhile) { reader_of_the_source(BROKEN_ELSEWHERE, FL_EBROKEN); }
TEST(i3_lost_meanwhile) { reader_of_the_source(LOST, FL_ELOST); }

/* Some clusters in the middle of a long read change under it. */
TEST(i3_long_read_of_which_a_part_is_saved_meanwhile)
{
    struct rig r = rig_new(64 * CLUSTER + 100, 0);
    fl_snapshot *s = cut(&r);
    write_bytes(&r, NEW, CLUSTER, 2 * CLUSTER);
    hang_next(r.source, FL_OP_READ, CLUSTER, 20 * CLUSTER);
    struct call *reader = start(READ, s, 64 * CLUSTER + 90, 5);
    wait_hanging(r.source, 1);
    write_bytes(&r, NEW, CLUSTER + 7, 30 * CLUSTER);
    write_bytes(&r, NEW, 1, 63 * CLUSTER);
    write_bytes(&r, NEW, 100, 64 * CLUSTER);
    MUST(fl_disk_zero(r.disk, CLUSTER, 40 * CLUSTER, &why));
    MUST(fl_disk_discard(r.disk, CLUSTER, 20 * CLUSTER, &why));
    fl_fault_resume(r.source);
    finish(reader, 0);
    end(s);
    rig_free(&r);
}

/* A reader's read of the fleecing image hangs; meanwhile its cluster is released and its place wanted by others, or all is broken. */
static void reader_of_the_store(enum meanwhile meanwhile, int code)
{
    struct rig r = rig_that_spills(64 * CLUSTER, 4 * CLUSTER);
    fl_snapshot *s = cut(&r);
    spill(&r, s, 0, 4);
    uint8_t p[CLUSTER];
    hang_next(r.fleecing, FL_OP_READ, 0, 0);
    struct call *reader = start(READ, s, CLUSTER, 2 * CLUSTER);
    wait_hanging(r.fleecing, 1);
    if (meanwhile == RELEASED) {
        MUST(fl_snapshot_discard(s, 4 * CLUSTER, 0, &why));
        spill(&r, s, 10, 4);                            /* takes all the places */
    } else {
        fail_next(r.source, FL_OP_READ, EIO, CLUSTER, 9 * CLUSTER);
        finish(start(WRITE, &r, CLUSTER, 9 * CLUSTER), 0);
        EXPECT(FL_EBROKEN, fl_snapshot_pread(s, p, CLUSTER, CLUSTER, &why));
    }
    fl_fault_resume(r.fleecing);
    finish(reader, code);
    if (meanwhile == RELEASED) {
        check_old(s, 4 * CLUSTER, 10 * CLUSTER);
        check_raises(s, FL_EDISCARDED, CLUSTER, 2 * CLUSTER);
    }
    end(s);
    rig_free(&r);
}

TEST(i3_store_released_meanwhile) { reader_of_the_store(RELEASED, FL_EDISCARDED); }
TEST(i3_store_broken_meanwhile) { reader_of_the_store(BROKEN, FL_EBROKEN); }

/* The source's extents are looked at; meanwhile the guest makes a hole of data. */
TEST(i3_extents_look_again)
{
    struct rig r = rig_new(16 * CLUSTER, 0);
    fl_snapshot *s = cut(&r);
    hang_next(r.source, FL_OP_EXTENTS, 0, 0);
    struct call *e = start(EXTENTS, s, 16 * CLUSTER, 0);
    wait_hanging(r.source, 1);
    MUST(fl_disk_zero(r.disk, 8 * CLUSTER, 4 * CLUSTER, &why));
    fl_fault_resume(r.source);
    while (!atomic_load(&e->done))
        sleep_ns(MILLISECOND);
    uint64_t at = 0;
    for (size_t i = 0; e->rc == 0 && i < e->found; at += e->extents[i++].length)
        CHECK(e->extents[i].kind == FL_DATA && e->extents[i].offset == at, "data at the cut is said to be of kind %d", e->extents[i].kind);
    CHECK(at > 0);
    finish(e, 0);
    end(s);
    rig_free(&r);
}

/* Extents of what is released, broken or lost meanwhile: never what the source says of it now. */
TEST(i3_extents_of_what_is_gone_meanwhile)
{
    const enum meanwhile all[] = { RELEASED, BROKEN, LOST };
    for (unsigned which = 0; which < 3; which++) {
        struct rig r = rig_new(16 * CLUSTER, 0);
        r.options.on_cbw_error = all[which] == LOST ? FL_LOSE_RANGE : FL_BREAK_SNAPSHOT;
        fl_snapshot *s = cut(&r);
        hang_next(r.source, FL_OP_EXTENTS, 0, 0);
        struct call *e = start(EXTENTS, s, 16 * CLUSTER, 0);
        wait_hanging(r.source, 1);
        if (all[which] == RELEASED)
            MUST(fl_snapshot_discard(s, 8 * CLUSTER, 4 * CLUSTER, &why));
        else
            fault_all(r.source, FL_FAULT_ERROR, FL_OP_READ, EIO, CLUSTER, 4 * CLUSTER);
        MUST(fl_disk_zero(r.disk, 8 * CLUSTER, 4 * CLUSTER, &why));
        fl_fault_resume(r.source);
        while (!atomic_load(&e->done))
            sleep_ns(MILLISECOND);
        for (size_t i = 0; e->rc == 0 && i < e->found; i++)
            CHECK(e->extents[i].kind != FL_ZERO, "data at the cut is said to be zeros");
        finish(e, all[which] == BROKEN ? FL_EBROKEN : 0);
        end(s);
        rig_free(&r);
    }
}

/* ---- I4: saved and released never go back ---- */

TEST(i4_second_write_saves_nothing)
{
    struct rig r = rig_that_spills(16 * CLUSTER, 16 * CLUSTER);
    fl_snapshot *s = cut(&r);
    write_bytes(&r, NEW, 2 * CLUSTER, 3 * CLUSTER);
    uint64_t reads = fl_fault_seen(r.source, FL_OP_READ);
    write_bytes(&r, NEWER, 2 * CLUSTER, 3 * CLUSTER);
    MUST(fl_disk_zero(r.disk, CLUSTER, 3 * CLUSTER, &why));
    MUST(fl_disk_discard(r.disk, CLUSTER, 4 * CLUSTER, &why));
    CHECK(stats_of(s).clusters_saved == 2 && fl_fault_seen(r.source, FL_OP_READ) == reads);
    check_old(s, 16 * CLUSTER, 0);
    WAIT_FOR_STATS(s, now.staged_bytes == 0);                 /* they are in the fleecing image now */
    reads = fl_fault_seen(r.source, FL_OP_READ);
    write_bytes(&r, NEWER, 2 * CLUSTER, 3 * CLUSTER);
    CHECK(stats_of(s).clusters_saved == 2 && fl_fault_seen(r.source, FL_OP_READ) == reads);
    check_old(s, 16 * CLUSTER, 0);
    end(s);
    rig_free(&r);
}

TEST(i4_released_is_final)
{
    struct rig r = rig_that_spills(32 * CLUSTER, 32 * CLUSTER);
    fl_snapshot *s = cut(&r);
    spill(&r, s, 0, 4);
    hang_next(r.fleecing, FL_OP_WRITE, 0, 0);
    write_bytes(&r, NEW, CLUSTER, 5 * CLUSTER);
    wait_hanging(r.fleecing, 1);
    MUST(fl_snapshot_discard(s, 8 * CLUSTER, 0, &why));         /* spilled, being spilled, and never written */
    fl_fault_resume(r.fleecing);
    WAIT_FOR_STATS(s, now.staged_bytes == 0 && now.fleecing_bytes == 0);
    uint64_t reads = fl_fault_seen(r.source, FL_OP_READ), saved = stats_of(s).clusters_saved;
    write_bytes(&r, NEWER, 8 * CLUSTER, 0);
    CHECK(stats_of(s).clusters_saved == saved && stats_of(s).clusters_discarded == 8 && fl_fault_seen(r.source, FL_OP_READ) == reads);
    spill(&r, s, 16, 4);                                        /* takes their places */
    for (uint64_t c = 0; c < 8; c++)
        check_raises(s, FL_EDISCARDED, CLUSTER, c * CLUSTER);
    MUST(fl_snapshot_discard(s, 8 * CLUSTER, 0, &why));         /* twice does no harm */
    check_old(s, 24 * CLUSTER, 8 * CLUSTER);
    fl_extent e[4];
    size_t found;
    MUST(fl_snapshot_extents(s, 0, 32 * CLUSTER, e, 4, &found, &why));
    CHECK(e[0].kind == FL_DISCARDED && e[0].length == 8 * CLUSTER);
    end(s);
    rig_free(&r);
}

/* A release covers the whole clusters in its range, and the tail counts as whole; of others nothing is let go. */
TEST(i4_only_whole_clusters_are_released)
{
    uint64_t size = 16 * CLUSTER + 513;
    struct rig r = rig_new(size, 0);
    fl_snapshot *s = cut(&r);
    MUST(fl_snapshot_discard(s, CLUSTER, 2 * CLUSTER + 1, &why));
    MUST(fl_snapshot_discard(s, 0, 2 * CLUSTER, &why));
    MUST(fl_snapshot_discard(s, 512, 16 * CLUSTER, &why));
    CHECK(stats_of(s).clusters_discarded == 0);
    MUST(fl_snapshot_discard(s, 3 * CLUSTER - 2, 5 * CLUSTER + 1, &why));
    MUST(fl_snapshot_discard(s, 514, 16 * CLUSTER - 1, &why));
    CHECK(stats_of(s).clusters_discarded == 2, "%" PRIu64, stats_of(s).clusters_discarded);
    EXPECT(FL_ERANGE, fl_snapshot_discard(s, 2, size - 1, &why));
    write_bytes(&r, NEW, size, 0);
    check_old(s, 6 * CLUSTER, 0);
    check_raises(s, FL_EDISCARDED, 1, 6 * CLUSTER);
    check_raises(s, FL_EDISCARDED, 2 * CLUSTER, 5 * CLUSTER + 1);
    check_old(s, 9 * CLUSTER, 7 * CLUSTER);
    check_raises(s, FL_EDISCARDED, 1, size - 1);
    end(s);
    rig_free(&r);
}

/* What is saved is not lost by a later failure beside it. */
TEST(i4_saved_is_not_lost_by_a_failure_beside_it)
{
    struct rig r = rig_new(16 * CLUSTER, 0);
    r.options.on_cbw_error = FL_LOSE_RANGE;
    fl_snapshot *s = cut(&r);
    write_bytes(&r, NEW, CLUSTER, 3 * CLUSTER);
    write_bytes(&r, NEW, CLUSTER, 5 * CLUSTER);
    fault_all(r.source, FL_FAULT_ERROR, FL_OP_READ, EIO, CLUSTER, 4 * CLUSTER);
    write_bytes(&r, NEWER, 3 * CLUSTER, 3 * CLUSTER);
    fl_fault_clear(r.source);
    check_raises(s, FL_ELOST, CLUSTER, 4 * CLUSTER);
    check_old(s, 4 * CLUSTER, 0);
    check_old(s, 11 * CLUSTER, 5 * CLUSTER);
    write_bytes(&r, NEW, CLUSTER, 4 * CLUSTER);                 /* lost stays lost */
    check_raises(s, FL_ELOST, CLUSTER, 4 * CLUSTER);
    CHECK(stats_of(s).clusters_lost == 1 && stats_of(s).clusters_saved == 2);
    end(s);
    rig_free(&r);
}

/* ---- clusters looked at in the very moment in which they are saved ---- */

struct one_by_one {
    struct rig *rig;
    uint64_t clusters;
    _Atomic uint64_t written;           /* clusters */
};

static void *write_one_by_one(void *argument)
{
    struct one_by_one *w = argument;
    for (uint64_t i = 0; i < w->clusters; i++) {
        MUST(fl_disk_pwrite(w->rig->disk, &(char){ (char)NEW }, 1, i * CLUSTER, &why));
        atomic_store(&w->written, i + 1);
    }
    return NULL;
}

/* Whatever is being saved, a look at a cluster tells of it: a read ends and has the old data, and extents are never empty. */
TEST(i3_looked_at_while_it_is_saved)
{
    struct rig r = rig_new(4096 * CLUSTER, 0);
    struct one_by_one writer = { &r, 4096, 0 };
    MUST(fl_disk_bitmap_add(r.disk, "b", CLUSTER, &why));
    r.options.stage_size = r.size;
    fl_snapshot *s = cut(&r);
    pthread_t thread;
    CHECK(!pthread_create(&thread, NULL, write_one_by_one, &writer));
    uint64_t turn = 0;
    for (uint64_t at; (at = atomic_load(&writer.written)) < writer.clusters; turn++)
        while (atomic_load(&writer.written) == at) {
            uint64_t offset = at * CLUSTER;
            fl_extent extents[4];
            size_t found = 0;
            switch (turn % 3) {
            case 0:
                MUST(fl_snapshot_extents(s, offset, CLUSTER, extents, 4, &found, &why));
                CHECK(found == 1 && extents[0].offset == offset && extents[0].length == CLUSTER, "%zu extents, of %" PRIu64 " bytes", found,
                      extents[0].length);
                break;
            case 1:
                MUST(fl_disk_bitmap_extents(r.disk, "b", offset, CLUSTER, extents, 4, &found, &why));
                CHECK(found == 1 && extents[0].length == CLUSTER, "%zu extents, of %" PRIu64 " bytes", found, extents[0].length);
                break;
            default:
                check_old(s, 1, offset);
            }
        }
    CHECK(!pthread_join(thread, NULL));
    check_old(s, r.size, 0);
    end(s);
    rig_free(&r);
}
