/* rig.h: what the scenarios for the invariants I1 to I7 are made of, and the main() that runs one of them.
 *
 * PROGRAM DIR NAME               run one; images are made in DIR
 * PROGRAM --list
 *
 * A rig is a disk of known bytes with a fault-injecting source and fleecing image. Calls run in threads of their own. An interleaving is
 * fixed by letting one operation of an image hang: a call is started, hang_next() and wait_hanging() bring it to the place in question,
 * others are made meanwhile, and fl_fault_resume() lets it go on. A scenario that takes longer than TIME_LIMIT (seconds; the environment's
 * TEST_TIME_LIMIT overrides it) has hung, which is a failure.
 */
#ifndef RIG_H
#define RIG_H

#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "check.h"

#define CLUSTER 4096ull
#define NEW 0xee                        /* what guests write: never an old byte */
#define NEWER 0xdd
#define TIME_LIMIT 60

#define SOON (SLOWDOWN * SECOND)        /* what counts as "does not wait" */
#define SLACK (SLOWDOWN * 200 * MILLISECOND)    /* what may be added to a timeout */

static const char *directory;           /* for the images */

struct rig {
    fl_image *raw, *middle, *source;    /* each around the one before: `source` hangs, `middle` fails */
    fl_disk *disk;
    fl_image *fleecing_raw, *fleecing_middle, *fleecing;         /* likewise */
    uint64_t size;
    fl_snapshot_options options;        /* for the next cut */
};

/* The byte of the disk at the cut: 1 to 200. */
static inline uint8_t old_byte(uint64_t offset)
{
    return (uint8_t)(1 + (offset + offset / 199 + offset / CLUSTER * 17) % 200);
}

static inline void old_bytes(uint8_t *p, uint64_t count, uint64_t offset)
{
    for (uint64_t i = 0; i < count; i++)
        p[i] = old_byte(offset + i);
}

/* A disk of `size` bytes, all data; `fleecing_size` 0: the stage is all there is. Stage: 64 clusters; timeout: 20 s; break-snapshot. */
__attribute__((unused)) static struct rig rig_new(uint64_t size, uint64_t fleecing_size)
{
    struct rig r = { .size = size };
    uint8_t *p = malloc(size);
    CHECK(p);
    old_bytes(p, size, 0);
    MUST(fl_image_create_nameless(directory, size, &r.raw, &why));
    MUST(fl_image_pwrite(r.raw, p, size, 0, &why));
    free(p);
    MUST(fl_image_faulty(r.raw, &r.middle, &why));
    MUST(fl_image_faulty(r.middle, &r.source, &why));
    MUST(fl_disk_open(r.source, &r.disk, &why));
    if (fleecing_size) {
        MUST(fl_image_create_nameless(directory, fleecing_size, &r.fleecing_raw, &why));
        MUST(fl_image_faulty(r.fleecing_raw, &r.fleecing_middle, &why));
        MUST(fl_image_faulty(r.fleecing_middle, &r.fleecing, &why));
    }
    r.options = (fl_snapshot_options){ .cluster_size = CLUSTER, .on_cbw_error = FL_BREAK_SNAPSHOT, .cbw_timeout = 20 * SECOND,
                                       .stage_size = 64 * CLUSTER, .fleecing = r.fleecing };
    return r;
}

/* Snapshots are the test's; everything else goes. */
__attribute__((unused)) static void rig_free(struct rig *r)
{
    MUST(fl_disk_close(r->disk, &why));
    fl_disk_free(r->disk);
    fl_image_free(r->source);
    fl_image_free(r->middle);
    fl_image_free(r->raw);
    fl_image_free(r->fleecing);
    fl_image_free(r->fleecing_middle);
    fl_image_free(r->fleecing_raw);
}

__attribute__((unused)) static fl_snapshot *cut(struct rig *r)
{
    fl_snapshot *snapshot;
    MUST(fl_snapshot_cut(&r->disk, &r->options, 1, &snapshot, &why));
    return snapshot;
}

__attribute__((unused)) static void end(fl_snapshot *snapshot)
{
    MUST(fl_snapshot_close(snapshot, &why));
    fl_snapshot_free(snapshot);
}

__attribute__((unused)) static fl_stats stats_of(fl_snapshot *snapshot)
{
    fl_stats stats;
    MUST(fl_snapshot_stats(snapshot, &stats, &why));
    return stats;
}

/* ---- what is read where ---- */

/* The snapshot reads as at the cut. */
__attribute__((unused)) static void check_old(fl_snapshot *snapshot, uint64_t count, uint64_t offset)
{
    uint8_t *p = malloc(count);
    CHECK(p);
    memset(p, 0, count);
    MUST(fl_snapshot_pread(snapshot, p, count, offset, &why));
    for (uint64_t i = 0; i < count; i++)
        CHECK(p[i] == old_byte(offset + i), "the snapshot reads %02x at %" PRIu64 ", not %02x as at the cut", p[i], offset + i,
              old_byte(offset + i));
    free(p);
}

/* Reading it raises, and so it stays. */
__attribute__((unused)) static void check_raises(fl_snapshot *snapshot, int code, uint64_t count, uint64_t offset)
{
    uint8_t *p = malloc(count);
    CHECK(p);
    EXPECT(code, fl_snapshot_pread(snapshot, p, count, offset, &why));
    EXPECT(code, fl_snapshot_pread(snapshot, p, count, offset, &why));
    free(p);
}

/* The source holds `byte` everywhere in the range; -1: the old bytes. Looks below all faults. */
__attribute__((unused)) static void check_source(struct rig *r, int byte, uint64_t count, uint64_t offset)
{
    uint8_t *p = malloc(count);
    CHECK(p);
    MUST(fl_image_pread(r->raw, p, count, offset, &why));
    for (uint64_t i = 0; i < count; i++) {
        uint8_t want = byte < 0 ? old_byte(offset + i) : (uint8_t)byte;
        CHECK(p[i] == want, "the source holds %02x at %" PRIu64 ", not %02x", p[i], offset + i, want);
    }
    free(p);
}

__attribute__((unused)) static void write_bytes(struct rig *r, uint8_t byte, uint64_t count, uint64_t offset)
{
    uint8_t *p = malloc(count);
    CHECK(p);
    memset(p, byte, count);
    MUST(fl_disk_pwrite(r->disk, p, count, offset, &why));
    free(p);
}

/* ---- faults ---- */

/* The next operation of these kinds that touches the range hangs (or does what `action` says); length 0: any range. */
__attribute__((unused)) static void fault_next(fl_image *image, int action, int ops, int err, uint64_t length, uint64_t offset)
{
    fl_fault fault = { .ops = ops, .action = action, .err = err, .nth = 1, .times = 1, .offset = offset, .length = length };
    MUST(fl_fault_add(image, &fault, &why));
}

/* From now on all of them do, until fl_fault_clear. */
__attribute__((unused)) static void fault_all(fl_image *image, int action, int ops, int err, uint64_t length, uint64_t offset)
{
    fl_fault fault = { .ops = ops, .action = action, .err = err, .nth = 1, .offset = offset, .length = length };
    MUST(fl_fault_add(image, &fault, &why));
}

#define hang_next(image, ops, length, offset) fault_next(image, FL_FAULT_HANG, ops, 0, length, offset)
#define fail_next(image, ops, err, length, offset) fault_next(image, FL_FAULT_ERROR, ops, err, length, offset)

__attribute__((unused)) static void wait_hanging(fl_image *image, uint64_t n)
{
    uint64_t deadline = clock_ns() + 10 * SECOND;
    while (fl_fault_hanging(image) != n) {
        CHECK(clock_ns() < deadline, "%" PRIu64 " operations hang, not %" PRIu64, fl_fault_hanging(image), n);
        sleep_ns(MILLISECOND / 2);
    }
}

/* Wait until the condition, which may use the snapshot's stats as `now`, holds. */
#define WAIT_FOR_STATS(snapshot, condition) do { \
        uint64_t deadline_ = clock_ns() + 10 * SECOND; \
        for (;;) { \
            fl_stats now = stats_of(snapshot); \
            if (condition) \
                break; \
            CHECK(clock_ns() < deadline_, "after 10 s it does not hold yet: saved %" PRIu64 ", staged %" PRIu64 ", fleecing %" PRIu64 \
                  ", spilled %" PRIu64, now.clusters_saved, now.staged_bytes, now.fleecing_bytes, now.bytes_spilled); \
            sleep_ns(MILLISECOND / 2); \
        } \
    } while (0)

/* Save clusters [first, first + n) and see them spilled, all of them. */
__attribute__((unused)) static void spill(struct rig *r, fl_snapshot *s, uint64_t first, uint64_t n)
{
    uint64_t before = stats_of(s).fleecing_bytes;
    write_bytes(r, NEW, n * CLUSTER, first * CLUSTER);
    WAIT_FOR_STATS(s, now.fleecing_bytes == before + n * CLUSTER && now.staged_bytes == 0);
}

/* A stage that one cluster fills, so that everything spills at once. */
__attribute__((unused)) static struct rig rig_that_spills(uint64_t size, uint64_t fleecing_size)
{
    struct rig r = rig_new(size, fleecing_size);
    r.options.stage_size = CLUSTER;
    return r;
}

/* ---- calls in threads of their own ---- */

enum what { WRITE, ZERO, DISCARD, READ, EXTENTS, RELEASE, CLOSE, CUT };

struct call {
    /* fixed */
    enum what what;
    fl_disk *disk;
    fl_snapshot *snapshot;
    fl_snapshot_options options;
    uint64_t count, offset;
    pthread_t thread;
    /* written by the thread */
    uint8_t *buffer;
    fl_extent extents[8];
    size_t found;
    fl_snapshot *made;
    int rc;
    fl_error error;
    uint64_t took;
    atomic_bool done;
};

static inline void *call_body(void *argument)
{
    struct call *c = argument;
    uint64_t start = clock_ns();
    switch (c->what) {
    case WRITE: c->rc = fl_disk_pwrite(c->disk, c->buffer, c->count, c->offset, &c->error); break;
    case ZERO: c->rc = fl_disk_zero(c->disk, c->count, c->offset, &c->error); break;
    case DISCARD: c->rc = fl_disk_discard(c->disk, c->count, c->offset, &c->error); break;
    case READ: c->rc = fl_snapshot_pread(c->snapshot, c->buffer, c->count, c->offset, &c->error); break;
    case EXTENTS: c->rc = fl_snapshot_extents(c->snapshot, c->offset, c->count, c->extents, 8, &c->found, &c->error); break;
    case RELEASE: c->rc = fl_snapshot_discard(c->snapshot, c->count, c->offset, &c->error); break;
    case CLOSE: c->rc = fl_snapshot_close(c->snapshot, &c->error); break;
    case CUT: c->rc = fl_snapshot_cut(&c->disk, &c->options, 1, &c->made, &c->error); break;
    }
    c->took = clock_ns() - start;
    atomic_store(&c->done, true);
    return NULL;
}

/* `on` is a struct rig for WRITE, ZERO, DISCARD and CUT, else a snapshot. A WRITE writes NEW. */
__attribute__((unused)) static struct call *start(enum what what, void *on, uint64_t count, uint64_t offset)
{
    struct call *c = calloc(1, sizeof *c);
    CHECK(c);
    c->what = what;
    c->count = count;
    c->offset = offset;
    if (what == WRITE || what == ZERO || what == DISCARD || what == CUT) {
        c->disk = ((struct rig *)on)->disk;
        c->options = ((struct rig *)on)->options;
    } else {
        c->snapshot = on;
    }
    if (what == WRITE || what == READ) {
        c->buffer = malloc(count);
        CHECK(c->buffer);
        memset(c->buffer, NEW, count);
    }
    CHECK(!pthread_create(&c->thread, NULL, call_body, c));
    return c;
}

/* It is still at it after `ms` more milliseconds. */
__attribute__((unused)) static void check_waits(struct call *c, unsigned ms)
{
    sleep_ns(ms * MILLISECOND);
    CHECK(!atomic_load(&c->done), "a call (%d) that had to wait returned %d", c->what, c->rc);
}

/* Wait for its end, which must be soon; it returned -code. Frees it, and gives the error that it filled. */
__attribute__((unused)) static fl_error finish(struct call *c, int code)
{
    uint64_t deadline = clock_ns() + SOON;
    while (!atomic_load(&c->done)) {
        CHECK(clock_ns() < deadline, "a call (%d) did not end", c->what);
        sleep_ns(MILLISECOND / 4);
    }
    CHECK(!pthread_join(c->thread, NULL));
    CHECK(c->rc == -code, "a call (%d) returned %d (%s), not %d", c->what, c->rc, c->error.text, -code);
    CHECK(!c->rc || c->error.code == c->rc, "returned %d, error says %d", c->rc, c->error.code);
    if (c->what == READ && c->rc == 0)
        for (uint64_t i = 0; i < c->count; i++)
            CHECK(c->buffer[i] == old_byte(c->offset + i), "the read returned %02x at %" PRIu64 ", not %02x as at the cut", c->buffer[i],
                  c->offset + i, old_byte(c->offset + i));
    fl_error error = c->error;
    free(c->buffer);
    free(c);
    return error;
}

/* ---- running one ---- */

struct scenario { const char *name; void (*run)(void); struct scenario *next; };
static struct scenario *scenarios, **last_scenario = &scenarios;

/* TEST(name) { ... } defines a scenario. */
#define TEST(name) \
    static void name(void); \
    __attribute__((constructor)) static void add_##name(void) \
    { \
        static struct scenario this = { #name, name, NULL }; \
        *last_scenario = &this; \
        last_scenario = &this.next; \
    } \
    static void name(void)

static void timed_out(int signal)
{
    static const char text[] = "it hangs\n";
    (void)signal;
    _exit(write(STDERR_FILENO, text, sizeof text - 1) < 0 ? 3 : 2);
}

int main(int argc, char **argv)
{
    const char *limit = getenv("TEST_TIME_LIMIT");
    if (argc == 2 && !strcmp(argv[1], "--list")) {
        for (struct scenario *s = scenarios; s; s = s->next)
            puts(s->name);
        return 0;
    }
    for (struct scenario *s = scenarios; argc == 3 && s; s = s->next) {
        if (strcmp(s->name, argv[2]))
            continue;
        start_first_thread();
        directory = argv[1];
        signal(SIGALRM, timed_out);
        alarm(limit ? (unsigned)atoi(limit) : TIME_LIMIT);
        s->run();
        return 0;
    }
    fprintf(stderr, "usage: %s DIR NAME, or %s --list\n", argv[0], argv[0]);
    return 2;
}

#endif
