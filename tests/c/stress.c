/* stress.c: many writers against snapshots that are cut, read, released, backed up and closed all the time; checked byte for byte.
 *
 * stress DIR [--seconds N] [--seed N] [--threads N] [--mode calm|tight|both] [--direct]
 *            [--source FORMAT] [--fleecing FORMAT] [--target FORMAT]
 *
 * All images are made in DIR; FORMAT: raw or qcow2, in shapes that come from the seed; the files of qcow2 sources and targets are checked when all is
 * done with them. Writers own bytes as model.h says. Cuts are of two sorts: an exact one shuts the writers out for a moment, so that every byte
 * of the snapshot is known; a hot one runs among them and is checked by what the granules say of themselves, and by chains: a writer's
 * sector X is written, then Y, then (on a second disk) Z, each after the one before was acknowledged, so at one instant Z <= Y <= X <= Z + 1.
 *
 * calm: there is always room in the end and time enough to wait for it: nothing may fail. tight: timeouts are short, fleecing images are
 * small, these and the source fail now and then: each policy happens, and only what it allows.
 *
 * A long run (LONG_RUN) fails when something that it is there to test never happened.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <signal.h>

#include "guest.h"
#include "qcow2_make.h"
#include "shot.h"

#define READERS 3
#define READ_MAX (256 * KIB)
#define LONG_RUN (10 * SLOWDOWN)        /* seconds in which everything must have happened */

static const char *directory;
static uint64_t seed = 1;
static bool direct, qcow2_source, qcow2_fleecing, qcow2_target;
static fl_image *source, *twin_image;

/* ---- the users of snapshots ---- */

static void use(struct shot *s, uint8_t *buffer, uint64_t *random)
{
    unsigned what = (unsigned)below(random, 100);
    uint64_t offset = chance(random, 5) ? DISK_SIZE - 1 - below(random, 5000) : below(random, DISK_SIZE);
    uint64_t count = random_length(random, least(DISK_SIZE - offset, READ_MAX));
    if (what < 70)
        read_and_check(s, buffer, count, offset);
    else if (what < 90)
        extents_and_check(s, chance(random, 20) ? DISK_SIZE - offset : count, offset, 1 + below(random, 32));
    else
        chain_and_check(s, (unsigned)below(random, writer_count));
}

static void *reader_body(void *argument)
{
    uint64_t random = seed * 7919 + (uintptr_t)argument;
    uint8_t *buffer = malloc(READ_MAX);
    CHECK(buffer);
    while (!atomic_load(&stop)) {
        struct shot *s = shot_get(&random);
        if (!s) {
            sleep_ns(MILLISECOND);
            continue;
        }
        for (uint64_t n = 1 + below(&random, 8); n; n--)        /* and so it may be closed meanwhile */
            use(s, buffer, &random);
        bool broken = atomic_load(&s->broken);
        shot_put(s);
        if (broken)
            sleep_ns(MILLISECOND / 4);          /* leave the processor to others */
    }
    free(buffer);
    return NULL;
}

static void *releaser_body(void *argument)
{
    uint64_t random = seed * 104729;
    (void)argument;
    while (!atomic_load(&stop)) {
        struct shot *s = shot_get(&random);
        if (s && !s->for_backup) {
            uint64_t offset = below(&random, DISK_SIZE), count = random_length(&random, DISK_SIZE - offset);
            if (chance(&random, 50)) {
                offset -= offset % s->cluster;
                count = least((1 + below(&random, 8)) * s->cluster, DISK_SIZE - offset);
            }
            release_and_mark(s, count, offset);
        }
        if (s)
            shot_put(s);
        sleep_ns(below(&random, 2 * MILLISECOND));
    }
    return NULL;
}

/* Wait for the job to end. 0, or why it failed, which its snapshot must allow. */
static int backup_end(struct shot *s, fl_backup *job, bool cancelled)
{
    int rc;
    while ((rc = fl_backup_wait(job, 100 * MILLISECOND, &why)) == -FL_ERUNNING)
        ;
    if (rc == -FL_ECANCELLED) {
        CHECK(cancelled, "%s: the backup was cancelled by nobody", s->name);
        COUNT(backups_cancelled, 1);
    } else if (rc) {
        CHECK(tight, "%s: backup: %s", s->name, why.text);
        check_failure(s, rc, DISK_SIZE, 0);
        COUNT(backups_failed, 1);
    }
    return rc;
}

/* Take all chunks, holding on to some for a while, and acknowledge them in any order. */
static void take_chunks(struct shot *s, fl_backup *job, unsigned buffers, bool cancelled, uint64_t *random)
{
    fl_chunk held[8];
    unsigned holding = 0;
    uint64_t covered = 0;
    int rc = 0;
    for (;;) {
        while (holding && (holding == buffers - 1 || rc == -FL_EEND || chance(random, 30))) {
            unsigned i = (unsigned)below(random, holding);
            MUST(fl_backup_ack(job, held[i].id, 1, &why));
            held[i] = held[--holding];
        }
        if (rc == -FL_EEND)
            break;
        fl_chunk chunk;
        while ((rc = fl_backup_next(job, 100 * MILLISECOND, &chunk, &why)) == -FL_ERUNNING)
            ;
        if (rc == 0) {
            CHECK(chunk.offset >= covered && chunk.length && chunk.offset + chunk.length <= DISK_SIZE,
                  "%s: chunk of %" PRIu64 " at %" PRIu64, s->name, chunk.length, chunk.offset);
            CHECK(tight || chunk.offset == covered, "%s: chunk at %" PRIu64 " leaves a gap from %" PRIu64, s->name, chunk.offset, covered);
            picture_check(s->picture, chunk.kind == FL_ZERO ? NULL : chunk.buffer, chunk.length, chunk.offset);
            covered = chunk.offset + chunk.length;
            held[holding++] = chunk;
        } else if (rc != -FL_EEND) {
            return;             /* backup_end judges it */
        }
    }
    CHECK(tight || cancelled || covered == DISK_SIZE, "%s: the chunks end at %" PRIu64, s->name, covered);
}

static bool was_lost(fl_backup *job, uint64_t offset, uint64_t length)
{
    fl_extent e[16];
    size_t found = 0;
    for (size_t index = 0; ; index += found) {
        MUST(fl_backup_lost(job, index, e, 16, &found, &why));
        if (found == 0)
            return false;
        for (size_t i = 0; i < found; i++)
            if (e[i].offset < offset + length && offset < e[i].offset + e[i].length)
                return true;
    }
}

static void backup_and_check(struct shot *s, unsigned number, uint64_t *random)
{
    char path[4096];
    bool chunks = chance(random, 40);
    fl_image_options create = { .format = qcow2_target ? "qcow2" : "raw", .writable = 1, .cluster_size = qcow2_target ? 512u << below(random, 8) : 0 };
    fl_backup_options options = { .granularity = s->cluster << below(random, 4), .workers = 1 + (uint32_t)below(random, 4),
                                  .buffers = chunks ? 2 + (uint32_t)below(random, 7) : 0, .discard = chunks || chance(random, 70),
                                  .target_is_zero = chance(random, 50), .skip_lost = tight };
    fl_image *target = NULL;
    fl_backup *job;
    snprintf(path, sizeof path, "%s/target-%u.raw", directory, number);
    unlink(path);               /* of a run that failed */
    if (!chunks)
        MUST(fl_image_create(path, DISK_SIZE, &create, &target, &why));
    if (options.discard)
        mark(s, s->to_release, DISK_SIZE, 0);
    int rc = fl_backup_start(s->snapshot, target, &options, &job, &why);
    if (rc == 0) {
        bool cancel = chance(random, 15);
        if (cancel) {
            sleep_ns(below(random, 10 * MILLISECOND));
            CHECK(fl_backup_cancel(job) == 0);
        }
        if (chunks)
            take_chunks(s, job, options.buffers, cancel, random);
        rc = backup_end(s, job, cancel);
    } else {
        check_failure(s, rc, DISK_SIZE, 0);
        goto out;
    }
    if (rc == 0) {
        uint8_t *buffer = malloc(s->cluster);
        CHECK(buffer);
        for (uint64_t at = 0; at < DISK_SIZE; at += s->cluster) {
            uint64_t length = least(s->cluster, DISK_SIZE - at);
            bool lost = tight && was_lost(job, at, length);
            CHECK(!lost || s->policy == FL_LOSE_RANGE, "%s: the backup lost %" PRIu64 " at %" PRIu64, s->name, length, at);
            if (!chunks && !lost) {
                MUST(fl_image_pread(target, buffer, length, at, &why));
                picture_check(s->picture, buffer, length, at);
            }
            if (options.discard && !lost)
                mark(s, s->released, length, at);
        }
        free(buffer);
        if (chunks)
            COUNT(chunk_backups, 1);
        else
            COUNT(backups, 1);
    }
    MUST(fl_backup_close(job, &why));
    fl_backup_free(job);
out:
    fl_image_free(target);
    if (!chunks && qcow2_target && rc == 0)
        check_image_that(path, 1, 1);   /* a worker that is about to end may still have it open, and what closing frees is not free yet */
    if (!chunks)
        unlink(path);
}

static void *backup_body(void *argument)
{
    uint64_t random = seed * 15485863;
    (void)argument;
    for (unsigned number = 0; !atomic_load(&stop); ) {
        struct shot *s = shot_get(&random);
        if (s && s->for_backup && !atomic_load(&s->backed_up)) {
            backup_and_check(s, number++, &random);
            atomic_store(&s->backed_up, true);
        }
        if (s)
            shot_put(s);
        sleep_ns(MILLISECOND);
    }
    return NULL;
}

/* ---- images of any format ---- */

/* A qcow2 image of a shape that `random` chooses; its caches are as small as they get. */
static fl_image *make_qcow2(const char *path, uint64_t size, bool with_backing, uint64_t *random)
{
    struct shape shape = { .version = chance(random, 85) ? 3 : 2, .cluster_bits = 9 + 3 * (unsigned)below(random, 3), .refcount_order = 4, .size = size };
    fl_image_options options = { .format = "qcow2", .writable = 1, .direct = direct, .cache_size = chance(random, 70) ? 1 : 0 };
    fl_image *image = NULL;
    char backing[4200];
    if (shape.version == 3 && shape.cluster_bits > 9)
        shape.refcount_order = (unsigned)below(random, 7);
    if (with_backing && shape.version == 3) {           /* shorter than the disk, and zeros: what it holds is not what is tested here */
        snprintf(backing, sizeof backing, "%s.backing", path);
        shape.backing = strrchr(backing, '/') + 1;
        int fd = open(backing, O_CREAT | O_TRUNC | O_WRONLY, 0666);
        CHECK(fd >= 0 && ftruncate(fd, (off_t)(size / 2)) == 0, "%s", backing);
        close(fd);
    }
    make_image(path, &shape);
    MUST(fl_image_open(path, &options, &image, &why));
    return image;
}

/* ---- cutting and closing ---- */

static fl_image *make_fleecing(uint64_t size, fl_image **inner, uint64_t *random)
{
    fl_image *faulty;
    fl_fault slow = { .ops = FL_OP_WRITE | FL_OP_READ, .action = FL_FAULT_DELAY, .nth = 1, .delay_ns = MILLISECOND, .probability = 0.1 };
    fl_fault bad_write = { .ops = FL_OP_WRITE, .action = FL_FAULT_ERROR, .err = EIO, .nth = 1, .probability = 0.1 };
    fl_fault bad_read = { .ops = FL_OP_READ, .action = FL_FAULT_ERROR, .err = EIO, .nth = 1, .probability = 0.05 };
    slow.seed = next_random(random);
    bad_write.seed = next_random(random);
    bad_read.seed = next_random(random);
    if (qcow2_fleecing) {
        char path[4096];
        snprintf(path, sizeof path, "%s/fleecing.qcow2", directory);
        *inner = make_qcow2(path, size, false, random);
        unlink(path);                   /* it lives as long as it is open */
    } else {
        MUST(fl_image_create_nameless(directory, size, inner, &why));
    }
    MUST(fl_image_faulty(*inner, &faulty, &why));
    if (tight) {
        slow.delay_ns = 10 * MILLISECOND;
        slow.probability = 0.3;
        MUST(fl_fault_add(faulty, &bad_write, &why));
        MUST(fl_fault_add(faulty, &bad_read, &why));
    }
    MUST(fl_fault_add(faulty, &slow, &why));
    return faulty;
}

/* Z <= Y <= X <= Z + 1, with Z on the twin, cut at the same instant. */
static void check_twin(struct shot *s, fl_snapshot *other)
{
    uint8_t x[SECTOR], z[SECTOR];
    for (unsigned w = 0; w < writer_count; w++) {
        uint64_t offset = TWIN_SIZE - (w + 1) * SECTOR;
        int rc = fl_snapshot_pread(s->snapshot, x, SECTOR, CHAIN_X + w * SECTOR, &why);
        if (rc) {
            check_failure(s, rc, SECTOR, CHAIN_X + w * SECTOR);
            continue;
        }
        MUST(fl_snapshot_pread(other, z, SECTOR, offset, &why));
        uint64_t nx = sector_number(x, CHAIN_X / SECTOR + w, s->name), nz = sector_number(z, offset / SECTOR, "twin");
        CHECK(nz <= nx && nx <= nz + 1, "%s: not one instant on two disks: writer %u wrote X %" PRIu64 " and Z %" PRIu64,
              s->name, w, nx, nz);
    }
    MUST(fl_snapshot_close(other, &why));
    fl_snapshot_free(other);
}

static struct shot *shot_new(unsigned number, uint64_t *random)
{
    static const char *const policies[] = { "break-snapshot", "break-guest-write", "lose-range" };
    struct shot *s = calloc(1, sizeof *s);
    CHECK(s);
    s->cluster = (uint32_t)(SMALLEST_CLUSTER << 2 * below(random, 3));
    s->clusters = (DISK_SIZE + s->cluster - 1) / s->cluster;
    s->policy = (int)below(random, 3);
    s->for_backup = chance(random, 40);
    s->to_release = calloc(s->clusters, 1);
    s->released = calloc(s->clusters, 1);
    s->lost = calloc(s->clusters, 1);
    CHECK(s->to_release && s->released && s->lost);

    bool memory = chance(random, 25), hot = chance(random, 50), group = chance(random, 30);
    fl_snapshot_options options[2] = { { .cluster_size = s->cluster, .on_cbw_error = s->policy }, { .cbw_timeout = 60 * SECOND } };
    options[0].cbw_timeout = tight ? (2 + below(random, 60)) * MILLISECOND : 60 * SECOND;
    options[0].stage_size = (3 + below(random, 30)) * s->cluster + below(random, s->cluster);
    options[1].stage_size = 2 * TWIN_SIZE;
    options[1].cluster_size = SMALLEST_CLUSTER;
    if (memory) {
        if (!tight)
            options[0].stage_size = s->clusters * s->cluster;
    } else {
        uint64_t all = s->clusters * s->cluster;
        uint64_t size = tight ? s->cluster * (1 + below(random, s->clusters)) : all + below(random, 8192);
        options[0].fleecing = s->fleecing = make_fleecing(size, &s->inner, random);
        options[0].fleecing_limit = chance(random, 50) ? 0 : tight ? least(size, s->cluster * (1 + below(random, s->clusters))) : all;
        s->faulty = tight;
    }
    snprintf(s->name, sizeof s->name, "snapshot %u (%s%s, %u KiB, %s)", number, hot ? "hot" : "exact", memory ? ", memory" : "",
             s->cluster / 1024, policies[s->policy]);

    fl_disk *disks[2] = { disk, twin };
    fl_snapshot *made[2];
    if (!hot)
        pthread_rwlock_wrlock(&exact);
    s->picture = picture_begin(s->name);
    MUST(fl_snapshot_cut(disks, options, group ? 2 : 1, made, &why));
    picture_end(s->picture);
    if (!hot)
        pthread_rwlock_unlock(&exact);
    CHECK(hot || s->picture->unknown_bytes == 0, "an exact cut with %" PRIu64 " unknown bytes", s->picture->unknown_bytes);
    s->snapshot = made[0];
    CHECK(fl_snapshot_size(s->snapshot) == DISK_SIZE && fl_snapshot_cluster_size(s->snapshot) == s->cluster, "%s", s->name);
    if (chance(random, 50)) {
        fl_image_free(s->fleecing);             /* the snapshot keeps it */
        fl_image_free(s->inner);
        s->fleecing = s->inner = NULL;
    }
    if (group)
        check_twin(s, made[1]);
    COUNT(group_cuts, group);
    COUNT(hot_unknown_bytes, s->picture->unknown_bytes);
    COUNT(hot_cuts, hot);
    COUNT(exact_cuts, !hot);
    return s;
}

/* Everything is released: the store must become empty, by itself and soon. */
static void drain(struct shot *s)
{
    fl_stats stats;
    uint64_t deadline = clock_ns() + 20 * SECOND;
    release_and_mark(s, DISK_SIZE, 0);
    if (atomic_load(&s->broken))
        return;
    for (;;) {
        MUST(fl_snapshot_stats(s->snapshot, &stats, &why));
        if (stats.staged_bytes == 0 && stats.fleecing_bytes == 0)
            break;
        CHECK(clock_ns() < deadline, "%s: all is discarded, but %" PRIu64 " bytes are staged and %" PRIu64 " in the fleecing image",
              s->name, stats.staged_bytes, stats.fleecing_bytes);
        sleep_ns(MILLISECOND);
    }
    COUNT(drained, 1);
}

/* The shot is not in the table any more, but others may still use it: they are told by errors. */
static void shot_end(struct shot *s, uint64_t *random)
{
    fl_stats stats;
    bool was_broken = atomic_load(&s->broken);
    int rc = fl_snapshot_check(s->snapshot, &why);
    if (rc)
        check_failure(s, rc, DISK_SIZE, 0);
    CHECK(rc || !was_broken, "%s: was broken, and is not any more", s->name);
    if (chance(random, 40) && rc == 0)
        drain(s);
    MUST(fl_snapshot_stats(s->snapshot, &stats, &why));
    COUNT(clusters_saved, stats.clusters_saved);
    COUNT(zero_clusters, stats.zero_clusters);
    COUNT(clusters_lost, stats.clusters_lost);
    COUNT(bytes_spilled, stats.bytes_spilled);
    COUNT(spill_errors, stats.spill_errors);
    COUNT(room_waits, stats.room_waits);
    COUNT(room_timeouts, stats.room_timeouts);
    COUNT(claim_waits, stats.claim_waits);
    COUNT(reads_repeated, stats.reads_repeated);
    CHECK(tight || (stats.room_timeouts == 0 && stats.spill_errors == 0 && stats.clusters_lost == 0), "%s: %" PRIu64 " timeouts, %" PRIu64
          " spill errors, %" PRIu64 " clusters lost", s->name, stats.room_timeouts, stats.spill_errors, stats.clusters_lost);
    CHECK(stats.clusters_saved + stats.zero_clusters <= s->clusters, "%s: %" PRIu64 " clusters saved of %" PRIu64, s->name,
          stats.clusters_saved + stats.zero_clusters, s->clusters);
    atomic_store(&s->to_close, true);
    MUST(fl_snapshot_close(s->snapshot, &why));
    atomic_store(&s->closed, true);
    pthread_mutex_lock(&shots_lock);
    while (s->users)
        pthread_cond_wait(&shot_left, &shots_lock);
    pthread_mutex_unlock(&shots_lock);
    MUST(fl_snapshot_close(s->snapshot, &why));         /* twice is allowed */
    fl_snapshot_free(s->snapshot);
    fl_image_free(s->fleecing);
    fl_image_free(s->inner);
    picture_free(s->picture);
    free(s->to_release);
    free(s->released);
    free(s->lost);
    free(s);
}

/* Take it out of the table, unless it waits for its backup. */
static struct shot *shot_take(unsigned i, bool all)
{
    pthread_mutex_lock(&shots_lock);
    struct shot *s = shots[i];
    if (s && !all && s->for_backup && !atomic_load(&s->backed_up))
        s = NULL;
    if (s)
        shots[i] = NULL;
    pthread_mutex_unlock(&shots_lock);
    return s;
}

static void *cutter_body(void *argument)
{
    uint64_t random = seed * 32452843;
    (void)argument;
    for (unsigned number = 0; !atomic_load(&stop); ) {
        unsigned i = (unsigned)below(&random, MAX_SHOTS);
        if (!shots[i]) {                /* written by this thread alone */
            struct shot *s = shot_new(number++, &random);
            pthread_mutex_lock(&shots_lock);
            shots[i] = s;
            pthread_mutex_unlock(&shots_lock);
        } else if (chance(&random, 30)) {
            struct shot *s = shot_take(i, false);
            if (s)
                shot_end(s, &random);
        }
        sleep_ns(below(&random, 20 * MILLISECOND));
    }
    return NULL;
}

/* ---- setting up and reporting ---- */

static fl_image *make_source(const char *name, uint64_t size, fl_image **inner)
{
    char path[4096];
    fl_image *faulty;
    fl_image_options options = { .format = "raw", .writable = 1, .direct = direct };
    fl_fault slow = { .ops = FL_OP_READ, .action = FL_FAULT_DELAY, .nth = 1, .delay_ns = MILLISECOND,
                      .probability = 0.05, .seed = seed };
    uint64_t random = seed;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    unlink(path);
    if (qcow2_source) {
        *inner = make_qcow2(path, size, true, &random);
    } else {
        MUST(fl_image_create(path, size, &options, inner, &why));
        unlink(path);
    }
    MUST(fl_image_faulty(*inner, &faulty, &why));
    MUST(fl_fault_add(faulty, &slow, &why));
    return faulty;
}

/* Data in about half of the zones; the rest stays holes, or is written with zeros. */
static void fill(fl_image *image)
{
    uint64_t random = seed, length;
    for (uint64_t at = 0; at < ZONE_END; at += length) {
        length = least(random_length(&random, 128 * KIB), ZONE_END - at);
        unsigned what = (unsigned)below(&random, 4);
        if (what < 2)
            random_bytes(model + at, length, &random);
        if (what < 3)
            MUST(fl_image_pwrite(image, model + at, length, at, &why));
    }
    random_bytes(model + BODY_END, 300, &random);
    MUST(fl_image_pwrite(image, model + BODY_END, 300, BODY_END, &why));
}

/* The file of a source that was closed. */
static void check_file_of(const char *name)
{
    char path[4200];
    if (!qcow2_source)
        return;
    snprintf(path, sizeof path - 10, "%s/%s", directory, name);
    check_image(path, 0);
    unlink(path);
    strcat(path, ".backing");
    unlink(path);
}

static void check_live(void)
{
    uint8_t *all = malloc(DISK_SIZE);
    CHECK(all);
    struct picture *p = picture_begin("the live disk");
    picture_end(p);
    fl_fault_clear(source);
    MUST(fl_disk_pread(disk, all, DISK_SIZE, 0, &why));
    picture_check(p, all, DISK_SIZE, 0);
    picture_free(p);
    free(all);
}

/* Let everything run for `seconds`, end it, and check what is left. */
static void run(uint64_t seconds)
{
    pthread_t threads[MAX_WRITERS + READERS + 3];
    unsigned n = 0;
    uint64_t random = seed;
    atomic_store(&stop, false);
    for (unsigned w = 0; w < writer_count; w++)
        CHECK(!pthread_create(&threads[n++], NULL, writer_body, &writer[w]));
    for (uintptr_t r = 0; r < READERS; r++)
        CHECK(!pthread_create(&threads[n++], NULL, reader_body, (void *)(r + 1)));
    CHECK(!pthread_create(&threads[n++], NULL, releaser_body, NULL));
    CHECK(!pthread_create(&threads[n++], NULL, backup_body, NULL));
    CHECK(!pthread_create(&threads[n++], NULL, cutter_body, NULL));
    sleep_ns(seconds * SECOND);
    atomic_store(&stop, true);
    for (unsigned i = 0; i < n; i++)
        CHECK(!pthread_join(threads[i], NULL));
    for (unsigned i = 0; i < MAX_SHOTS; i++) {
        struct shot *s = shot_take(i, true);
        if (s)
            shot_end(s, &random);
    }
    check_live();
}

static void report(bool calm_ran, bool tight_ran, bool demand)
{
    bool missing = false;
    for (int i = 0; i < EVENT_COUNT; i++) {
        char mode = event_table[i].mode;
        bool needed = demand && (mode == 'b' || (mode == 'c' && calm_ran) || (mode == 't' && tight_ran));
        uint64_t n = atomic_load(&event_count[i]);
        printf("%-20s %12" PRIu64 "%s\n", event_table[i].name, n, needed && !n ? "  MISSING" : "");
        missing |= needed && !n;
    }
    fflush(stdout);
    CHECK(!missing, "something that this run is there to test never happened");
}

static void timed_out(int signal)
{
    static const char text[] = "stress: it hangs\n";
    (void)signal;
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0)
        _exit(3);
    _exit(2);
}


int main(int argc, char **argv)
{
    static const struct option names[] = {
        { "seconds", required_argument, NULL, 's' }, { "seed", required_argument, NULL, 'r' }, { "threads", required_argument, NULL, 't' },
        { "mode", required_argument, NULL, 'm' }, { "direct", no_argument, NULL, 'd' },
        { "source", required_argument, NULL, 'S' }, { "fleecing", required_argument, NULL, 'F' },
        { "target", required_argument, NULL, 'T' }, { NULL, 0, NULL, 0 }
    };
    uint64_t seconds = 4;
    unsigned threads = 4;
    const char *mode = "both";
    for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1; ) {
        switch (c) {
        case 's': seconds = strtoull(optarg, NULL, 0); break;
        case 'r': seed = strtoull(optarg, NULL, 0); break;
        case 't': threads = (unsigned)strtoul(optarg, NULL, 0); break;
        case 'm': mode = optarg; break;
        case 'd': direct = true; break;
        case 'S': qcow2_source = !strcmp(optarg, "qcow2"); break;
        case 'T': qcow2_target = !strcmp(optarg, "qcow2"); break;
        case 'F': qcow2_fleecing = !strcmp(optarg, "qcow2"); break;
        default: return 2;
        }
    }
    bool calm_runs = strcmp(mode, "tight") != 0, tight_runs = strcmp(mode, "calm") != 0;
    if (optind != argc - 1 || threads < 1 || threads > MAX_WRITERS || (calm_runs && tight_runs && strcmp(mode, "both"))) {
        fprintf(stderr, "usage: stress DIR [--seconds N] [--seed N] [--threads 1..%d] [--mode calm|tight|both] [--direct] "
                "[--source raw|qcow2] [--fleecing raw|qcow2] [--target raw|qcow2]\n", MAX_WRITERS);
        return 2;
    }
    directory = argv[optind];
    signal(SIGALRM, timed_out);
    alarm((unsigned)seconds * 2 + 90);

    int tasks = tasks_at_start(), files = count_entries("/proc/self/fd");

    pthread_rwlockattr_t attr;
    pthread_rwlockattr_init(&attr);
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    CHECK(!pthread_rwlock_init(&exact, &attr));
    model_init(threads, seed);
    fl_image *twin_inner;
    source = make_source("source.img", DISK_SIZE, &beneath);
    twin_image = make_source("twin.img", TWIN_SIZE, &twin_inner);
    fill(source);
    MUST(fl_disk_open(source, &disk, &why));
    MUST(fl_disk_open(twin_image, &twin, &why));
    for (int phase = 0; phase < 2; phase++) {
        if (phase ? !tight_runs : !calm_runs)
            continue;
        tight = phase;
        if (tight) {
            fl_fault bad = { .ops = FL_OP_READ, .action = FL_FAULT_ERROR, .err = EIO, .nth = 1, .probability = 0.02, .seed = ~seed };
            MUST(fl_fault_add(source, &bad, &why));
        }
        run(calm_runs && tight_runs ? (seconds + 1) / 2 : seconds);
    }
    MUST(fl_disk_close(disk, &why));
    MUST(fl_disk_close(twin, &why));
    fl_disk_free(disk);
    fl_disk_free(twin);
    fl_image_free(source);
    fl_image_free(twin_image);
    fl_image_free(beneath);
    fl_image_free(twin_inner);
    check_file_of("source.img");
    check_file_of("twin.img");
    check_comes_down("/proc/self/task", tasks, 5 * SECOND);
    check_comes_down("/proc/self/fd", files, 5 * SECOND);
    for (unsigned w = 0; w < writer_count; w++) {
        free(writer[w].buffer);
        free(writer[w].check);
    }
    free(model);
    free(granules);
    printf("seed %" PRIu64 ", %u writers, mode %s%s%s%s%s\n", seed, threads, mode, direct ? ", direct" : "", qcow2_source ? ", qcow2 source" : "",
           qcow2_fleecing ? ", qcow2 fleecing" : "", qcow2_target ? ", qcow2 target" : "");
    report(calm_runs, tight_runs, seconds >= LONG_RUN);
    return 0;
}
