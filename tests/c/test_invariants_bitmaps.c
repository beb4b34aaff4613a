/* test_invariants_bitmaps.c: I6 for all that is done to dirty bitmaps, and S1 to S4: what their file says after the process ended, whatever ended it.
 *
 * Scenarios as rig.h describes them. KILLS in the environment: how often i6_kill_9 kills.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "rig.h"
#include "sidecar.h"

#define GRAIN 65536ull

/* ---- a disk on a file that can be opened again ---- */

struct named {
    char image_path[400], file_path[420];
    fl_image *raw, *source;
    fl_disk *disk;
};

static void reopen(struct named *n, int create)
{
    fl_image_options options = { .format = "raw", .writable = 1 };
    MUST(fl_image_open(n->image_path, &options, &n->raw, &why));
    MUST(fl_image_faulty(n->raw, &n->source, &why));
    MUST(fl_disk_open(n->source, &n->disk, &why));
    MUST(fl_disk_bitmap_file(n->disk, n->file_path, create, &why));
}

static struct named named_new(uint64_t size)
{
    struct named n;
    int fd;
    snprintf(n.image_path, sizeof n.image_path, "%s/disk.raw", directory);
    snprintf(n.file_path, sizeof n.file_path, "%s.fleece-bitmaps", n.image_path);
    unlink(n.image_path);
    unlink(n.file_path);
    CHECK((fd = open(n.image_path, O_RDWR | O_CREAT | O_EXCL, 0600)) >= 0);
    CHECK(!ftruncate(fd, (off_t)size));
    close(fd);
    reopen(&n, 1);
    return n;
}

static void named_close(struct named *n)
{
    fl_disk_free(n->disk);
    fl_image_free(n->source);
    fl_image_free(n->raw);
}

static void put(fl_disk *disk, uint64_t offset)
{
    MUST(fl_disk_pwrite(disk, "x", 1, offset, &why));
}

/* The dirty bytes; -1: it is inconsistent. */
static int64_t dirty(fl_disk *disk, const char *name)
{
    uint64_t granularity, bytes;
    int rc = fl_disk_bitmap_info(disk, name, &granularity, &bytes, &why);
    if (rc == -FL_EINCONSISTENT)
        return -1;
    CHECK(rc == 0, "%s", why.text);
    return (int64_t)bytes;
}

static bool is_dirty(fl_disk *disk, const char *name, uint64_t offset)
{
    fl_extent e;
    size_t found;
    MUST(fl_disk_bitmap_extents(disk, name, offset, 1, &e, 1, &found, &why));
    return e.kind == FL_DATA;
}

static fl_bitmap_state state_of(fl_disk *disk, const char *name)
{
    fl_bitmap_state state;
    MUST(fl_disk_bitmap_state(disk, name, &state, &why));
    return state;
}

static fl_snapshot *cut_with(fl_disk *disk, const char *bitmap, int mode)
{
    fl_snapshot_options options = { .cluster_size = CLUSTER, .cbw_timeout = SECOND, .stage_size = 64 * CLUSTER, .bitmap = bitmap, .bitmap_mode = mode,
                                    .on_cbw_error = FL_LOSE_RANGE };
    fl_snapshot *snapshot;
    MUST(fl_snapshot_cut(&disk, &options, 1, &snapshot, &why));
    return snapshot;
}

/* ---- in memory ---- */

struct clearing { fl_disk *disk; atomic_bool done; pthread_t thread; };

static void *clear_it(void *argument)
{
    struct clearing *c = argument;
    MUST(fl_disk_bitmap_clear(c->disk, "b", &why));
    atomic_store(&c->done, true);
    return NULL;
}

/* A write that ends after a clear is dirty after it: one that is running is waited for. */
TEST(i6_clear_waits_for_running_writes)
{
    struct rig r = rig_new(64 * CLUSTER, 0);
    MUST(fl_disk_bitmap_add(r.disk, "b", GRAIN, &why));
    hang_next(r.source, FL_OP_WRITE, CLUSTER, 0);
    struct call *w = start(WRITE, &r, CLUSTER, 0);
    wait_hanging(r.source, 1);
    struct clearing c = { .disk = r.disk };
    CHECK(!pthread_create(&c.thread, NULL, clear_it, &c));
    sleep_ns(150 * MILLISECOND);
    bool cleared_first = atomic_load(&c.done);
    fl_fault_resume(r.source);
    finish(w, 0);
    pthread_join(c.thread, NULL);
    CHECK(!cleared_first || dirty(r.disk, "b") == GRAIN, "a clear forgot a write that ended after it");
    write_bytes(&r, NEW, 1, 3 * GRAIN);
    CHECK(is_dirty(r.disk, "b", 3 * GRAIN));
    rig_free(&r);
}

TEST(i6_merge_and_enable)
{
    struct rig r = rig_new(64 * CLUSTER + 100, 0);
    MUST(fl_disk_bitmap_add(r.disk, "fine", 4096, &why));
    MUST(fl_disk_bitmap_add(r.disk, "coarse", 4 * GRAIN, &why));
    write_bytes(&r, NEW, 1, GRAIN);
    write_bytes(&r, NEW, 1, 64 * CLUSTER + 99);
    CHECK(dirty(r.disk, "fine") == 4096 + 100 && dirty(r.disk, "coarse") == 4 * GRAIN + 100, "%" PRId64, dirty(r.disk, "coarse"));
    MUST(fl_disk_bitmap_enable(r.disk, "fine", 0, &why));
    write_bytes(&r, NEW, 1, 2 * GRAIN);
    CHECK(!is_dirty(r.disk, "fine", 2 * GRAIN) && !state_of(r.disk, "fine").enabled);
    MUST(fl_disk_bitmap_enable(r.disk, "fine", 1, &why));
    MUST(fl_disk_bitmap_clear(r.disk, "coarse", &why));
    write_bytes(&r, NEW, 1, 3 * GRAIN);
    CHECK(dirty(r.disk, "fine") == 2 * 4096 + 100);
    MUST(fl_disk_bitmap_add(r.disk, "middle", GRAIN, &why));
    const char *from[] = { "fine", "coarse", "none" };
    EXPECT(ENOENT, fl_disk_bitmap_merge(r.disk, "middle", from, 3, &why));
    CHECK(dirty(r.disk, "middle") == 0);
    MUST(fl_disk_bitmap_merge(r.disk, "middle", from, 1, &why));
    CHECK(dirty(r.disk, "middle") == 2 * GRAIN + 100 && is_dirty(r.disk, "middle", GRAIN) && is_dirty(r.disk, "middle", 3 * GRAIN));
    MUST(fl_disk_bitmap_merge(r.disk, "fine", from + 1, 1, &why));      /* from coarse to fine: all of the coarse units */
    CHECK(dirty(r.disk, "fine") == 4 * GRAIN + 100);
    EXPECT(EINVAL, fl_disk_bitmap_add_persistent(r.disk, "p", GRAIN, 0, &why));
    rig_free(&r);
}

/* What comes back of a frozen bitmap, in each mode, after a commit, an abort, or nothing. */
TEST(i6_modes)
{
    enum { NOTHING, COMMIT, ABORT };
    for (int mode = FL_BITMAP_ON_SUCCESS; mode <= FL_BITMAP_NEVER; mode++)
        for (int how = NOTHING; how <= ABORT; how++)
            for (int lose = 0; lose < 2; lose++) {
                struct rig r = rig_new(64 * CLUSTER, 0);
                MUST(fl_disk_bitmap_add(r.disk, "b", GRAIN, &why));
                write_bytes(&r, NEW, 2 * GRAIN, 0);                     /* granules 0 and 1 */
                r.options.bitmap = "b";
                r.options.bitmap_mode = mode;
                r.options.on_cbw_error = FL_LOSE_RANGE;
                fl_snapshot *s = cut(&r);
                EXPECT(EBUSY, fl_disk_bitmap_clear(r.disk, "b", &why));
                EXPECT(EBUSY, fl_disk_bitmap_enable(r.disk, "b", 0, &why));
                MUST(fl_snapshot_discard(s, GRAIN, 0, &why));
                MUST(fl_snapshot_discard(s, CLUSTER, GRAIN, &why));     /* part of granule 1 */
                if (lose) {
                    fail_next(r.source, FL_OP_READ, EIO, CLUSTER, GRAIN + 5 * CLUSTER);
                    write_bytes(&r, NEWER, CLUSTER, GRAIN + 5 * CLUSTER);       /* this marks granule 1 as well */
                    CHECK(stats_of(s).clusters_lost == 1);
                    MUST(fl_disk_bitmap_add(r.disk, "other", GRAIN, &why));
                }
                if (how == COMMIT) {
                    MUST(fl_snapshot_commit(s, &why));
                    EXPECT(EINVAL, fl_snapshot_abort(s, &why));
                    MUST(fl_snapshot_commit(s, &why));
                } else if (how == ABORT) {
                    MUST(fl_snapshot_abort(s, &why));
                    EXPECT(EINVAL, fl_snapshot_commit(s, &why));
                }
                end(s);
                bool zero = mode == FL_BITMAP_NEVER || (mode == FL_BITMAP_ON_SUCCESS && how != COMMIT);
                bool one = lose || mode == FL_BITMAP_NEVER || how != COMMIT;
                CHECK(is_dirty(r.disk, "b", 0) == zero && is_dirty(r.disk, "b", GRAIN) == one && dirty(r.disk, "b") == (zero + one) * (int64_t)GRAIN,
                      "mode %d, how %d: %d %d", mode, how, is_dirty(r.disk, "b", 0), is_dirty(r.disk, "b", GRAIN));
                rig_free(&r);
            }
}

/* A lost range is dirty after a commit although nobody wrote to it since the cut: the writes that it was lost to are of a disabled bitmap. */
TEST(i6_lost_comes_back)
{
    struct rig r = rig_new(64 * CLUSTER, 0);
    MUST(fl_disk_bitmap_add(r.disk, "b", GRAIN, &why));
    write_bytes(&r, NEW, 2 * GRAIN, 0);
    MUST(fl_disk_bitmap_enable(r.disk, "b", 0, &why));
    r.options.bitmap = "b";
    r.options.on_cbw_error = FL_LOSE_RANGE;
    fl_snapshot *s = cut(&r);
    fail_next(r.source, FL_OP_READ, EIO, CLUSTER, GRAIN);
    write_bytes(&r, NEWER, CLUSTER, GRAIN);
    CHECK(dirty(r.disk, "b") == 0);
    MUST(fl_snapshot_commit(s, &why));
    CHECK(dirty(r.disk, "b") == GRAIN && is_dirty(r.disk, "b", GRAIN));
    end(s);
    rig_free(&r);
}

/* ---- the file ---- */

TEST(i6_file_is_opened_again)
{
    struct named n = named_new(100 * GRAIN + 5);
    MUST(fl_disk_bitmap_add_persistent(n.disk, "b", GRAIN, 0, &why));
    MUST(fl_disk_bitmap_add_persistent(n.disk, "fine", 4096, 1, &why));
    EXPECT(EEXIST, fl_disk_bitmap_add_persistent(n.disk, "b", GRAIN, 0, &why));
    put(n.disk, 7 * GRAIN);
    put(n.disk, 100 * GRAIN + 4);
    MUST(fl_disk_bitmap_enable(n.disk, "fine", 0, &why));
    char uuid[37];
    strcpy(uuid, state_of(n.disk, "b").uuid);
    EXPECT(EEXIST, fl_disk_bitmap_file(n.disk, n.file_path, 1, &why));
    named_close(&n);
    reopen(&n, 0);
    fl_bitmap_state s = state_of(n.disk, "fine");
    CHECK(dirty(n.disk, "b") == GRAIN + 5 && dirty(n.disk, "fine") == 4096 + 5 && s.granularity == 4096);
    CHECK(!s.enabled && s.write_intent && s.persistent && !s.inconsistent && !*s.problem && !state_of(n.disk, "b").write_intent);
    CHECK(!strcmp(uuid, state_of(n.disk, "b").uuid) && strlen(uuid) == 36);
    for (int i = 0; i < 3; i++) {
        fl_snapshot *snapshot = cut_with(n.disk, "b", 0);
        put(n.disk, 9 * GRAIN);
        if (i == 1)
            MUST(fl_snapshot_commit(snapshot, &why));
        end(snapshot);
        named_close(&n);
        reopen(&n, 0);
        CHECK(dirty(n.disk, "b") == (int64_t)(i == 0 ? 2 * GRAIN + 5 : GRAIN), "%d: %" PRId64, i, dirty(n.disk, "b"));
    }
    MUST(fl_disk_bitmap_clear(n.disk, "b", &why));
    put(n.disk, 11 * GRAIN);
    named_close(&n);
    reopen(&n, 0);
    CHECK(dirty(n.disk, "b") == GRAIN && is_dirty(n.disk, "b", 11 * GRAIN));
    MUST(fl_disk_bitmap_remove(n.disk, "b", &why));
    MUST(fl_disk_bitmap_remove(n.disk, "fine", &why));
    named_close(&n);
    CHECK(access(n.file_path, F_OK) != 0, "a file without bitmaps was left behind");
}

/* S1: while the write to the disk hangs, the file has its bit. Also of the second writer to the same unit. */
TEST(i6_in_the_file_before_the_write)
{
    struct named n = named_new(16 * GRAIN);
    struct rig r = { .disk = n.disk };
    MUST(fl_disk_bitmap_add_persistent(n.disk, "b", GRAIN, 0, &why));
    hang_next(n.source, FL_OP_WRITE, 1, 5 * GRAIN);
    struct call *w = start(WRITE, &r, 1, 5 * GRAIN);
    wait_hanging(n.source, 1);
    int fd = open(n.file_path, O_RDONLY);
    uint32_t crc;
    struct bitmap bits;
    CHECK(fd >= 0 && !bitmap_init(&bits, 16) && !area_read(fd, SIDECAR_AREAS_AT, 16, &bits, &crc));
    CHECK(bitmap_test(&bits, 5) && bitmap_count(&bits) == 1, "%" PRIu64 " bits are in the file", bitmap_count(&bits));
    bitmap_destroy(&bits);
    close(fd);
    fl_fault_resume(n.source);
    finish(w, 0);
    named_close(&n);
}

#define PAGES 8
#define FAR (4096 * 32768ull)           /* what a page of bits stands for, at 4 KiB each */

/* A disk with several pages of bits, whose file is cut off: what is mapped raises SIGBUS when it is touched. */
static void cut_off_and_write(struct named *n)
{
    put(n->disk, 0);
    CHECK(!truncate(n->file_path, 0));
    for (unsigned i = 0; i < PAGES; i++)
        put(n->disk, i * FAR + 4096);
}

/* Writes go on, the bitmap in memory is as good as ever, and at a clean close it is written anew. */
TEST(i6_file_that_fails)
{
    struct named n = named_new(PAGES * FAR);
    MUST(fl_disk_bitmap_add_persistent(n.disk, "b", 4096, 0, &why));
    cut_off_and_write(&n);
    CHECK(dirty(n.disk, "b") == (PAGES + 1) * 4096);
    fl_bitmap_state state = state_of(n.disk, "b");
    CHECK(state.problem[0] && !state.inconsistent, "'%s'", state.problem);
    fl_snapshot *s = cut_with(n.disk, "b", 0);
    put(n.disk, 8192);
    end(s);
    CHECK(dirty(n.disk, "b") == (PAGES + 2) * 4096);
    named_close(&n);
    reopen(&n, 0);
    CHECK(dirty(n.disk, "b") == (PAGES + 2) * 4096, "%" PRId64, dirty(n.disk, "b"));
    CHECK(!state_of(n.disk, "b").problem[0]);
    named_close(&n);
}

/* ---- what was changed meanwhile ---- */

static const char *problem_after(struct named *n)
{
    static char text[160];
    reopen(n, 0);
    fl_bitmap_state s = state_of(n->disk, "b");
    strcpy(text, s.problem);
    CHECK(s.inconsistent == (*text != 0));
    if (s.inconsistent) {
        fl_snapshot_options options = { .cbw_timeout = SECOND, .stage_size = 64 * CLUSTER, .bitmap = "b" };
        fl_snapshot *snapshot;
        fl_extent e;
        size_t found;
        EXPECT(FL_EINCONSISTENT, fl_snapshot_cut(&n->disk, &options, 1, &snapshot, &why));
        EXPECT(FL_EINCONSISTENT, fl_disk_bitmap_extents(n->disk, "b", 0, 1, &e, 1, &found, &why));
        const char *from = "b";
        MUST(fl_disk_bitmap_add(n->disk, "m", GRAIN, &why));
        EXPECT(FL_EINCONSISTENT, fl_disk_bitmap_merge(n->disk, "m", &from, 1, &why));
        MUST(fl_disk_bitmap_remove(n->disk, "m", &why));
        put(n->disk, 0);                                /* it is not recorded, and harms nothing */
        named_close(n);
        reopen(n, 0);                                   /* and so it stays */
        CHECK(!strcmp(state_of(n->disk, "b").problem, text), "'%s' became '%s'", text, state_of(n->disk, "b").problem);
        MUST(fl_disk_bitmap_clear(n->disk, "b", &why)); /* until it begins anew */
        CHECK(dirty(n->disk, "b") == 0);
        put(n->disk, GRAIN);
    }
    CHECK(dirty(n->disk, "b") == GRAIN, "%" PRId64, dirty(n->disk, "b"));
    named_close(n);
    reopen(n, 0);
    CHECK(dirty(n->disk, "b") == GRAIN);
    named_close(n);
    return text;
}

static void write_behind_our_back(const struct named *n)
{
    int fd = open(n->image_path, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, "y", 1, 5 * GRAIN) == 1 && !close(fd));
}

TEST(i6_changed_underneath)
{
    char command[1000];
    struct named n = named_new(16 * GRAIN);
    MUST(fl_disk_bitmap_add_persistent(n.disk, "b", GRAIN, 0, &why));
    put(n.disk, 0);
    named_close(&n);
    CHECK(!*problem_after(&n));

    CHECK(!chmod(n.image_path, 0640));                  /* no change of its content */
    CHECK(!*problem_after(&n));

    write_behind_our_back(&n);
    CHECK(strstr(problem_after(&n), "another program wrote"));

    CHECK(!truncate(n.image_path, 20 * GRAIN));
    CHECK(strstr(problem_after(&n), "another size"));
    CHECK(!truncate(n.image_path, 200000 * GRAIN));     /* its areas do not fit where they were */
    CHECK(strstr(problem_after(&n), "another size"));
    CHECK(!truncate(n.image_path, 20 * GRAIN));
    CHECK(strstr(problem_after(&n), "another size"));

    snprintf(command, sizeof command, "cd '%s' && cp -p --sparse=always disk.raw new && mv new disk.raw", directory);
    CHECK(system(command) == 0);
    CHECK(strstr(problem_after(&n), "another file or device"));
}

/* ---- kill -9 ---- */

/* Run `body` in a process that then kills itself, or is killed. */
static void killed(struct named *n, void (*body)(struct named *n))
{
    pid_t child = fork();
    if (child == 0) {
        reopen(n, 0);
        body(n);
        kill(getpid(), SIGKILL);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "%x", (unsigned)status);
}

static void write_2(struct named *n) { put(n->disk, 2 * GRAIN); }
static void cut_and_write_3(struct named *n) { cut_with(n->disk, "b", 0); put(n->disk, 3 * GRAIN); }
static void commit_and_write_4(struct named *n)
{
    fl_snapshot *s = cut_with(n->disk, "b", 0);
    put(n->disk, 4 * GRAIN);
    MUST(fl_snapshot_commit(s, &why));
}
static void abort_and_cut(struct named *n)
{
    put(n->disk, 5 * GRAIN);
    MUST(fl_snapshot_abort(cut_with(n->disk, "b", 0), &why));
    put(n->disk, 6 * GRAIN);
}
static void clear_and_write_7(struct named *n) { MUST(fl_disk_bitmap_clear(n->disk, "b", &why)); put(n->disk, 7 * GRAIN); }
static void clear_twice(struct named *n)
{
    MUST(fl_disk_bitmap_clear(n->disk, "b", &why));
    put(n->disk, 8 * GRAIN);
    MUST(fl_disk_bitmap_clear(n->disk, "b", &why));
    put(n->disk, 9 * GRAIN);
}
static void disable_and_write(struct named *n) { MUST(fl_disk_bitmap_enable(n->disk, "b", 0, &why)); put(n->disk, 10 * GRAIN); }
static void only_open(struct named *n) { (void)n; }

TEST(i6_after_kill_9)
{
    static const struct { void (*body)(struct named *); uint16_t want; } steps[] = {
        { write_2, 1 << 2 }, { only_open, 1 << 2 }, { cut_and_write_3, 1 << 2 | 1 << 3 }, { only_open, 1 << 2 | 1 << 3 }, { commit_and_write_4, 1 << 4 },
        { abort_and_cut, 1 << 4 | 1 << 5 | 1 << 6 }, { clear_and_write_7, 1 << 7 }, { clear_twice, 1 << 9 }, { disable_and_write, 1 << 9 },
    };
    struct named n = named_new(16 * GRAIN);
    MUST(fl_disk_bitmap_add_persistent(n.disk, "b", GRAIN, 0, &why));
    named_close(&n);
    for (int cleanly = 0; cleanly < 2; cleanly++) {     /* open it cleanly after each kill, or let kills follow each other */
        for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
            killed(&n, steps[i].body);
            if (!cleanly && i + 1 < sizeof steps / sizeof *steps)
                continue;
            reopen(&n, 0);
            for (unsigned bit = 0; bit < 16; bit++)
                CHECK(is_dirty(n.disk, "b", bit * GRAIN) == (steps[i].want >> bit & 1), "step %zu, unit %u", i, bit);
            named_close(&n);
        }
        reopen(&n, 0);
        MUST(fl_disk_bitmap_enable(n.disk, "b", 1, &why));
        MUST(fl_disk_bitmap_clear(n.disk, "b", &why));
        named_close(&n);
    }
    /* Another program wrote long after the kill. */
    killed(&n, write_2);
    struct timespec later[2] = { { .tv_nsec = UTIME_OMIT }, { .tv_sec = time(NULL) + 60 } };
    CHECK(!utimensat(AT_FDCWD, n.image_path, later, 0));
    reopen(&n, 0);
    CHECK(strstr(state_of(n.disk, "b").problem, "another program wrote"));
    named_close(&n);
}

/* After marks got lost, the file does not look good to the next one. */
TEST(i6_after_kill_9_of_a_file_that_failed)
{
    struct named n = named_new(PAGES * FAR);
    MUST(fl_disk_bitmap_add_persistent(n.disk, "b", 4096, 0, &why));
    named_close(&n);
    killed(&n, cut_off_and_write);
    reopen(&n, 0);
    CHECK(strstr(state_of(n.disk, "b").problem, "could not be noted"), "'%s'", state_of(n.disk, "b").problem);
    named_close(&n);
}

/* A copy of the file that was made while it was in use is no base for anything. */
TEST(i6_copy_of_the_file)
{
    char command[1000];
    struct named n = named_new(16 * GRAIN);
    MUST(fl_disk_bitmap_add_persistent(n.disk, "b", GRAIN, 0, &why));
    snprintf(command, sizeof command, "cd '%s' && cp disk.raw.fleece-bitmaps copy", directory);
    CHECK(system(command) == 0);
    put(n.disk, 0);
    EXPECT(FL_ELOCKED, ({ struct sidecar *s; int fd = open(n.image_path, O_RDONLY); int rc = sidecar_open(n.file_path, false, fd, 16 * GRAIN, &s, &why);
                          close(fd); rc; }));
    named_close(&n);
    snprintf(command, sizeof command, "cd '%s' && mv copy disk.raw.fleece-bitmaps", directory);
    CHECK(system(command) == 0);
    reopen(&n, 0);
    CHECK(strstr(state_of(n.disk, "b").problem, "copy"));
    named_close(&n);
}

/* ---- kill -9 at any moment, under load ---- */

#define UNITS 4096u
#define THREADS 3

/* Shared with the process that is killed. Of each unit: how many writes to it have begun, and ended. What a bitmap must have: all units of which more have
   ended than had begun when it was cleared: one of these began after that. */
struct shared {
    _Atomic uint32_t begun[UNITS], ended[UNITS];
    uint32_t base[2][UNITS];                    /* of "b" and "fine": begun when it was cleared */
    uint32_t at_cut[UNITS];
    _Atomic int checked[2];                     /* the bitmap is there, and base is valid */
    atomic_uint_least64_t cuts, commits, clears, merges, adds;
};

static struct shared *shared;
static fl_disk *victim;                         /* of the process that is killed */
static const char *const names[2] = { "b", "fine" };

static void *write_all_the_time(void *argument)
{
    uint64_t state = (uint64_t)(uintptr_t)argument;
    for (;;) {
        uint32_t unit = chance(&state, 50) ? (uint32_t)below(&state, 64) : (uint32_t)below(&state, UNITS);
        atomic_fetch_add(&shared->begun[unit], 1);
        if (chance(&state, 5))
            MUST(fl_disk_zero(victim, CLUSTER, unit * GRAIN, &why));
        else
            put(victim, unit * GRAIN + below(&state, GRAIN));
        atomic_fetch_add(&shared->ended[unit], 1);
    }
    return NULL;
}

static void take_base(uint32_t *base)
{
    for (uint32_t unit = 0; unit < UNITS; unit++)
        base[unit] = atomic_load(&shared->begun[unit]);
}

/* Until it is killed: whatever can be done to bitmaps. */
static void manage(struct named *n, uint64_t *state)
{
    const char *from[] = { "scratch" };
    fl_bitmap_state left;
    if (fl_disk_bitmap_state(n->disk, "scratch", &left, &why) == 0)
        MUST(fl_disk_bitmap_remove(n->disk, "scratch", &why));
    for (;;) {
        int which = (int)below(state, 2);
        const char *name = names[which];
        if (!atomic_load(&shared->checked[which])) {
            fl_bitmap_state s;
            if (fl_disk_bitmap_state(n->disk, name, &s, &why) == 0)
                MUST(fl_disk_bitmap_remove(n->disk, name, &why));
            MUST(fl_disk_bitmap_add_persistent(n->disk, name, which ? 4096 : GRAIN, 0, &why));
            take_base(shared->base[which]);
            atomic_store(&shared->checked[which], 1);
            atomic_fetch_add(&shared->adds, 1);
        }
        if (chance(state, 40)) {
            fl_snapshot *s = cut_with(n->disk, name, (int)below(state, 2));
            take_base(shared->at_cut);
            atomic_fetch_add(&shared->cuts, 1);
            if (chance(state, 50)) {
                /* From the moment that it is said to be good on, only what ended after the cut is wanted. */
                atomic_store(&shared->checked[which], 0);
                memcpy(shared->base[which], shared->at_cut, sizeof shared->at_cut);
                atomic_store(&shared->checked[which], 1);
                MUST(fl_snapshot_commit(s, &why));
                atomic_fetch_add(&shared->commits, 1);
            } else if (chance(state, 50)) {
                MUST(fl_snapshot_abort(s, &why));
            }
            end(s);
        } else if (chance(state, 30)) {
            atomic_store(&shared->checked[which], 0);
            MUST(fl_disk_bitmap_clear(n->disk, name, &why));
            take_base(shared->base[which]);
            atomic_store(&shared->checked[which], 1);
            atomic_fetch_add(&shared->clears, 1);
        } else if (chance(state, 30)) {
            MUST(fl_disk_bitmap_add_persistent(n->disk, "scratch", 8192, 0, &why));
            MUST(fl_disk_bitmap_merge(n->disk, name, from, 1, &why));
            MUST(fl_disk_bitmap_remove(n->disk, "scratch", &why));
            atomic_fetch_add(&shared->merges, 1);
        } else if (chance(state, 5)) {
            atomic_store(&shared->checked[which], 0);
            MUST(fl_disk_bitmap_remove(n->disk, name, &why));
        }
    }
}

static void check_superset(struct named *n)
{
    for (int which = 0; which < 2; which++) {
        if (!atomic_load(&shared->checked[which]))
            continue;
        fl_bitmap_state s = state_of(n->disk, names[which]);
        CHECK(!s.inconsistent, "after kill -9 '%s' is inconsistent: %s", names[which], s.problem);
        for (uint32_t unit = 0; unit < UNITS; unit++) {
            fl_extent e[20];
            size_t found, any = 0;
            if (atomic_load(&shared->ended[unit]) <= shared->base[which][unit])
                continue;
            MUST(fl_disk_bitmap_extents(n->disk, names[which], unit * GRAIN, GRAIN, e, 20, &found, &why));
            for (size_t i = 0; i < found; i++)
                any |= e[i].kind == FL_DATA;
            CHECK(any, "'%s': unit %u was written, and is not dirty (%" PRIu32 " writes ended, %" PRIu32 " had begun before)", names[which], unit,
                  (uint32_t)shared->ended[unit], shared->base[which][unit]);
        }
    }
}

TEST(i6_kill_9)
{
    const char *wanted = getenv("KILLS");
    int kills = wanted ? atoi(wanted) : 8;
    uint64_t state = clock_ns();
    printf("seed %" PRIu64 "\n", state);
    alarm((unsigned)(TIME_LIMIT + kills));
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED);
    struct named n = named_new(UNITS * GRAIN);
    MUST(fl_disk_bitmap_add_persistent(n.disk, "b", GRAIN, 0, &why));
    named_close(&n);
    for (int i = 0; i < kills; i++) {
        pid_t child = fork();
        if (child == 0) {
            reopen(&n, 0);
            check_superset(&n);         /* what the last one left, without a clean close in between */
            victim = n.disk;
            for (uint64_t t = 1; t <= THREADS; t++) {
                pthread_t thread;
                CHECK(!pthread_create(&thread, NULL, write_all_the_time, (void *)(uintptr_t)(state + t)));
            }
            manage(&n, &state);
        }
        sleep_ns((50 + below(&state, 200)) * MILLISECOND * SLOWDOWN);
        CHECK(!kill(child, SIGKILL));
        int status;
        CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status), "it ended by itself: %x", (unsigned)status);
        for (uint32_t unit = 0; unit < UNITS; unit++)           /* those that were running never end */
            atomic_store(&shared->begun[unit], atomic_load(&shared->ended[unit]));
        if (chance(&state, 50)) {
            reopen(&n, 0);
            check_superset(&n);
            named_close(&n);
        }
    }
    printf("%d kills; cuts %" PRIu64 ", commits %" PRIu64 ", clears %" PRIu64 ", merges %" PRIu64 ", adds %" PRIu64 "\n", kills, (uint64_t)shared->cuts,
           (uint64_t)shared->commits, (uint64_t)shared->clears, (uint64_t)shared->merges, (uint64_t)shared->adds);
    CHECK(shared->adds && (kills < 8 || (shared->cuts && shared->clears)), "nothing happened");
}

/* ---- damaged and hostile files ---- */

static unsigned char *read_all(const char *path, size_t *size)
{
    struct stat st;
    int fd = open(path, O_RDONLY);
    CHECK(fd >= 0 && !fstat(fd, &st));
    unsigned char *p = malloc((size_t)st.st_size);
    CHECK(p && read_whole(fd, p, (size_t)st.st_size, 0) == 0);
    close(fd);
    *size = (size_t)st.st_size;
    return p;
}

static void write_all(const char *path, const unsigned char *p, size_t size)
{
    int fd = open(path, O_RDWR);
    CHECK(fd >= 0 && write_whole(fd, p, size, 0) == 0 && !ftruncate(fd, (off_t)size));
    close(fd);
}

/* Each byte of the header, in each way of being wrong: one copy is not believed, and the other one is enough; both: a clear error. */
TEST(i6_damaged_header)
{
    struct named n = named_new(16 * GRAIN);
    MUST(fl_disk_bitmap_add_persistent(n.disk, "b", GRAIN, 0, &why));
    MUST(fl_disk_bitmap_add_persistent(n.disk, "second", 2 * GRAIN, 0, &why));
    put(n.disk, 3 * GRAIN);
    named_close(&n);
    size_t size, used = sidecar_header_bytes(2);
    unsigned char *good = read_all(n.file_path, &size);
    struct sidecar_header header;
    struct sidecar_record records[2];
    CHECK(sidecar_decode(good, used, &header, records) && header.count == 2 && header.state == SIDECAR_CLEAN);
    for (size_t at = 0; at < used; at++)
        for (int bit = 0; bit < 8; bit++) {
            uint32_t version;
            good[at] ^= (unsigned char)(1 << bit);
            CHECK(sidecar_decode_length(good, &version) != used || !sidecar_decode(good, used, &header, NULL), "a flip at %zu is not noticed", at);
            good[at] ^= (unsigned char)(1 << bit);
        }
    for (size_t at = 0; at < used; at += 173) {
        for (unsigned slots = 1; slots <= 3; slots++) {
            unsigned char *bad = malloc(size);
            CHECK(bad);
            memcpy(bad, good, size);
            for (unsigned slot = 0; slot < 2; slot++)
                if (slots >> slot & 1)
                    bad[slot * SIDECAR_SLOT_BYTES + at] ^= 0x55;
            write_all(n.file_path, bad, size);
            free(bad);
            if (slots < 3) {
                reopen(&n, 0);
                CHECK(dirty(n.disk, "b") == GRAIN && dirty(n.disk, "second") == 2 * GRAIN);
                named_close(&n);
                free(good);
                good = read_all(n.file_path, &size);    /* the times in it are new */
            } else {
                struct sidecar *s;
                int fd = open(n.image_path, O_RDONLY);
                EXPECT(FL_EFORMAT, sidecar_open(n.file_path, false, fd, 16 * GRAIN, &s, &why));
                close(fd);
                write_all(n.file_path, good, size);
            }
        }
    }
    free(good);
    reopen(&n, 0);
    CHECK(dirty(n.disk, "b") == GRAIN);
    named_close(&n);
}

/* The bits of a clean file are checked as well; a page's byte that can't be is noticed in any case. */
TEST(i6_damaged_bits)
{
    for (int what = 0; what < 4; what++) {
        struct named n = named_new(16 * GRAIN);
        MUST(fl_disk_bitmap_add_persistent(n.disk, "b", GRAIN, 0, &why));
        put(n.disk, 3 * GRAIN);
        named_close(&n);
        size_t size;
        unsigned char *p = read_all(n.file_path, &size);
        if (what == 0)
            p[SIDECAR_AREAS_AT + bitmap_words_at(16)] ^= 0x08;          /* the bit is gone */
        else if (what == 1)
            p[SIDECAR_AREAS_AT] = PAGE_UNTOUCHED;
        else if (what == 2)
            p[SIDECAR_AREAS_AT] = 77;
        write_all(n.file_path, p, what == 3 ? SIDECAR_AREAS_AT + 100 : size);
        free(p);
        reopen(&n, 0);
        CHECK(strstr(state_of(n.disk, "b").problem, "damaged"), "%d: '%s'", what, state_of(n.disk, "b").problem);
        MUST(fl_disk_bitmap_clear(n.disk, "b", &why));
        named_close(&n);
    }
}

/* Headers with a good checksum, and nonsense in them. */
TEST(i6_hostile_header)
{
    struct named n = named_new(16 * GRAIN);
    MUST(fl_disk_bitmap_add_persistent(n.disk, "b", GRAIN, 0, &why));
    MUST(fl_disk_bitmap_add_persistent(n.disk, "c", GRAIN, 0, &why));
    named_close(&n);
    size_t size, used = sidecar_header_bytes(2);
    unsigned char *good = read_all(n.file_path, &size), bad[sizeof(struct sidecar_header) + 4096];
    struct sidecar_header header;
    struct sidecar_record records[2], changed[2];
    const struct sidecar_record *list[2] = { &changed[0], &changed[1] };
    CHECK(used <= sizeof bad && sidecar_decode(good, used, &header, records));
    for (int what = 0; what < 16; what++) {
        memcpy(changed, records, sizeof changed);
        struct sidecar_header h = header;
        struct sidecar_record *r = &changed[0];
        switch (what) {
        case 0: r->granularity = 0; break;
        case 1: r->granularity = 5000; break;
        case 2: r->granularity = UINT64_C(1) << 40; break;
        case 3: r->bits = UINT64_MAX; break;
        case 4: r->bits = 15; break;
        case 5: r->area[0] = 0; break;
        case 6: r->area[0] = (UINT64_C(1) << 63) - SIDECAR_ALIGNMENT; break;
        case 7: r->area[0] += 512; break;
        case 8: r->area[0] = records[1].area[1]; break;
        case 9: r->area[1] = r->area[0]; break;
        case 10: strcpy(r->name, records[1].name); break;
        case 11: r->name[0] = 0; break;
        case 12: r->counts = 0; break;
        case 13: r->flags = 0x80; break;
        case 14: r->reason = 99; break;
        case 15: h.disk.size = UINT64_MAX; break;
        }
        sidecar_encode(&h, list, bad);
        CHECK(!sidecar_decode(bad, used, &h, changed), "nonsense %d is believed", what);
    }
    /* A size that is not the disk's, but goes with its records: no memory is asked for. */
    struct sidecar_header h = header;
    memcpy(changed, records, sizeof changed);
    h.disk.size = (uint64_t)INT64_MAX;
    for (int i = 0; i < 2; i++) {
        changed[i].bits = div_up(h.disk.size, GRAIN);
        changed[i].area[0] = align_up(SIDECAR_AREAS_AT, SIDECAR_ALIGNMENT) + (unsigned)(2 * i) * sidecar_area_bytes(changed[i].bits);
        changed[i].area[1] = changed[i].area[0] + sidecar_area_bytes(changed[i].bits);
    }
    sidecar_encode(&h, list, bad);
    memcpy(good, bad, used);
    memcpy(good + SIDECAR_SLOT_BYTES, bad, used);
    write_all(n.file_path, good, size);
    free(good);
    reopen(&n, 0);
    CHECK(strstr(state_of(n.disk, "b").problem, "size"), "%s", state_of(n.disk, "b").problem);
    named_close(&n);
    /* No such file at all, and other kinds of files. */
    struct sidecar *s;
    int fd = open(n.image_path, O_RDONLY);
    EXPECT(FL_EFORMAT, sidecar_open(n.image_path, true, fd, 16 * GRAIN, &s, &why));
    EXPECT(ENOENT, sidecar_open("/nowhere/at/all", true, fd, 16 * GRAIN, &s, &why));
    EXPECT(FL_EFORMAT, sidecar_open("/dev/null", true, fd, 16 * GRAIN, &s, &why));
    CHECK(mkfifo(strcat(n.file_path, ".fifo"), 0600) == 0 || errno == EEXIST);
    EXPECT(FL_EFORMAT, sidecar_open(n.file_path, true, fd, 16 * GRAIN, &s, &why));
    close(fd);
}
