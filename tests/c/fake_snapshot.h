/* fake_snapshot.h: a snapshot for tests of the backup job, in place of snapshot.c: what each range is, which reads fail or hang, what
 * turns out to be lost only when it is read, and which clusters press, are all said by the test; and it keeps a log of what the job did.
 *
 * It defines the calls that backup*.c makes, so a program that includes it must be linked against a library from which snapshot.c is not
 * taken (an archive: nothing else asks for snapshot.o).
 */
#ifndef FAKE_SNAPSHOT_H
#define FAKE_SNAPSHOT_H

#include "check.h"
#include "snapshot.h"

static inline void eventually(bool (*true_of)(void *), void *what, const char *name)
{
    for (uint64_t deadline = clock_ns() + 5 * SECOND; !true_of(what); sleep_ns(MILLISECOND))
        CHECK(clock_ns() < deadline, "never: %s", name);
}

struct range { uint64_t offset, length; };

struct fake_fault { uint64_t offset, length, delay_ns; int code, side; bool hangs; };
struct fake_turn { uint64_t offset; int kind; };        /* this cluster becomes of this kind when it is read */

struct fake {
    uint64_t size;
    uint32_t cluster;
    uint8_t *bytes;             /* NULL: all zeros */

    pthread_mutex_t lock;       /* protects what follows */
    pthread_cond_t resumed;
    fl_extent *map;             /* in order, without gaps; neighbours differ */
    size_t map_count, map_room;
    bool closed, broken;
    unsigned references;

    struct fake_fault faults[8];
    struct fake_turn turns[8];
    size_t fault_count, turn_count;
    bool hang_extents;
    unsigned hanging, resumes;

    uint64_t *hot;              /* offsets; one presses until it is discarded */
    size_t hot_count;

    /* the log */
    struct range *reads, *discards;
    size_t read_count, read_room, discard_count, discard_room, extents_calls;
    unsigned reading, most_reading;
};

static inline struct fake *fake_of(fl_snapshot *snapshot) { return (struct fake *)(void *)snapshot; }
static fl_snapshot *as_snapshot(struct fake *fake) { return (fl_snapshot *)(void *)fake; }

static inline void log_range(struct range **log, size_t *count, size_t *room, uint64_t offset, uint64_t length)
{
    if (*count == *room) {
        *room = *room ? *room * 2 : 1024;
        *log = realloc(*log, *room * sizeof **log);
        CHECK(*log, "no memory");
    }
    (*log)[(*count)++] = (struct range){ offset, length };
}

/* ---- the map; lock held, or before the job ---- */

static inline void map_push(fl_extent **map, size_t *count, size_t *room, fl_extent extent)
{
    if (extent.length == 0)
        return;
    if (*count && (*map)[*count - 1].kind == extent.kind) {
        (*map)[*count - 1].length += extent.length;
        return;
    }
    if (*count == *room) {
        *room = *room ? *room * 2 : 64;
        *map = realloc(*map, *room * sizeof **map);
        CHECK(*map, "no memory");
    }
    (*map)[(*count)++] = extent;
}

static inline void fake_set(struct fake *fake, uint64_t offset, uint64_t length, int kind)
{
    fl_extent *map = NULL;
    size_t count = 0, room = 0;
    uint64_t end = offset + length;
    for (size_t i = 0; i < fake->map_count; i++) {
        fl_extent e = fake->map[i];
        uint64_t e_end = e.offset + e.length;
        if (e.offset < offset)
            map_push(&map, &count, &room, (fl_extent){ e.offset, MIN(e_end, offset) - e.offset, e.kind });
        if (e.offset <= offset && offset < e_end)
            map_push(&map, &count, &room, (fl_extent){ offset, length, kind });
        if (e_end > end)
            map_push(&map, &count, &room, (fl_extent){ MAX(e.offset, end), e_end - MAX(e.offset, end), e.kind });
    }
    free(fake->map);
    fake->map = map;
    fake->map_count = count;
    fake->map_room = room;
}

/* The extent that covers `offset`. */
static const fl_extent *map_at(const struct fake *fake, uint64_t offset)
{
    size_t low = 0, high = fake->map_count - 1;
    while (low < high) {
        size_t middle = (low + high + 1) / 2;
        if (fake->map[middle].offset <= offset)
            low = middle;
        else
            high = middle - 1;
    }
    return &fake->map[low];
}

static inline int fake_kind(struct fake *fake, uint64_t offset)
{
    pthread_mutex_lock(&fake->lock);
    int kind = map_at(fake, offset)->kind;
    pthread_mutex_unlock(&fake->lock);
    return kind;
}

/* All of it is `kind`. With bytes, if it is small enough to have any. */
static inline struct fake *fake_new(uint64_t size, uint32_t cluster, int kind, bool with_bytes)
{
    struct fake *fake = calloc(1, sizeof *fake);
    CHECK(fake, "no memory");
    fake->size = size;
    fake->cluster = cluster;
    fake->references = 1;
    pthread_mutex_init(&fake->lock, NULL);
    pthread_cond_init(&fake->resumed, NULL);
    map_push(&fake->map, &fake->map_count, &fake->map_room, (fl_extent){ 0, size, kind });
    if (with_bytes) {
        fake->bytes = malloc(size);
        CHECK(fake->bytes, "no memory");
        uint64_t random = size;
        for (uint64_t i = 0; i + 8 <= size; i += 8)
            *(uint64_t *)(void *)(fake->bytes + i) = next_random(&random) | 1;
        memset(fake->bytes + size / 8 * 8, 1, size % 8);
    }
    return fake;
}

/* A job's last thread lets go of the snapshot a little after the job is over, or after the system call that hung came back. */
static inline bool fake_is_let_go(void *argument)
{
    struct fake *fake = argument;
    pthread_mutex_lock(&fake->lock);
    bool let_go = fake->references == 1;
    pthread_mutex_unlock(&fake->lock);
    return let_go;
}

static inline void fake_free(struct fake *fake)
{
    eventually(fake_is_let_go, fake, "let go of the snapshot");
    pthread_mutex_destroy(&fake->lock);
    pthread_cond_destroy(&fake->resumed);
    free(fake->bytes);
    free(fake->map);
    free(fake->reads);
    free(fake->discards);
    free(fake->hot);
    free(fake);
}

static inline void fake_fault(struct fake *fake, struct fake_fault fault) { fake->faults[fake->fault_count++] = fault; }

static inline void fake_resume(struct fake *fake)
{
    pthread_mutex_lock(&fake->lock);
    fake->resumes++;
    fake->hang_extents = false;
    fake->fault_count = 0;
    pthread_cond_broadcast(&fake->resumed);
    pthread_mutex_unlock(&fake->lock);
}

static inline void fake_break(struct fake *fake)
{
    pthread_mutex_lock(&fake->lock);
    fake->broken = true;
    pthread_mutex_unlock(&fake->lock);
}

static inline void fake_hang(struct fake *fake)        /* lock held */
{
    unsigned resumes = fake->resumes;
    fake->hanging++;
    while (fake->resumes == resumes)
        pthread_cond_wait(&fake->resumed, &fake->lock);
    fake->hanging--;
}

static inline unsigned fake_hanging(struct fake *fake)
{
    pthread_mutex_lock(&fake->lock);
    unsigned n = fake->hanging;
    pthread_mutex_unlock(&fake->lock);
    return n;
}

/* ---- the calls that the job makes ---- */

uint64_t fl_snapshot_size(fl_snapshot *snapshot) { return fake_of(snapshot)->size; }
uint32_t fl_snapshot_cluster_size(fl_snapshot *snapshot) { return fake_of(snapshot)->cluster; }

static inline int refuse(struct fake *fake, fl_error *error)
{
    if (fake->broken)
        return fail(error, FL_EBROKEN, FL_SIDE_FLEECING, 0, 0, "the snapshot is broken");
    return fake->closed ? fail(error, FL_ECLOSED, FL_SIDE_NONE, 0, 0, "the snapshot is closed") : 0;
}

int fl_snapshot_check(fl_snapshot *snapshot, fl_error *error)
{
    struct fake *fake = fake_of(snapshot);
    pthread_mutex_lock(&fake->lock);
    int rc = refuse(fake, error);
    pthread_mutex_unlock(&fake->lock);
    return rc;
}

fl_snapshot *snapshot_ref(fl_snapshot *snapshot)
{
    struct fake *fake = fake_of(snapshot);
    pthread_mutex_lock(&fake->lock);
    fake->references++;
    pthread_mutex_unlock(&fake->lock);
    return snapshot;
}

void snapshot_unref(fl_snapshot *snapshot)
{
    struct fake *fake = fake_of(snapshot);
    pthread_mutex_lock(&fake->lock);
    fake->references--;
    pthread_mutex_unlock(&fake->lock);
}

uint64_t snapshot_fleecing_bytes(fl_snapshot *snapshot)
{
    (void)snapshot;
    return 0;
}

bool snapshot_is_direct(fl_snapshot *snapshot)
{
    (void)snapshot;
    return false;
}

uint64_t snapshot_total(fl_snapshot *snapshot)
{
    struct fake *fake = fake_of(snapshot);
    uint64_t total = 0;
    for (size_t i = 0; i < fake->map_count; i++)
        total += fake->map[i].kind == FL_OUTSIDE ? 0 : fake->map[i].length;
    return total;
}

bool snapshot_hot(fl_snapshot *snapshot, uint64_t *offset)
{
    struct fake *fake = fake_of(snapshot);
    bool found = false;
    pthread_mutex_lock(&fake->lock);
    for (size_t i = 0; i < fake->hot_count && !found; i++)
        if (map_at(fake, fake->hot[i])->kind != FL_DISCARDED) {
            *offset = fake->hot[i];
            found = true;
        }
    pthread_mutex_unlock(&fake->lock);
    return found;
}

int fl_snapshot_extents(fl_snapshot *snapshot, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found,
                        fl_error *error)
{
    struct fake *fake = fake_of(snapshot);
    size_t count = 0;
    pthread_mutex_lock(&fake->lock);
    fake->extents_calls++;
    CHECK(length > 0 && max > 0 && in_range(length, offset, fake->size), "extents of %" PRIu64 " at %" PRIu64, length, offset);
    if (fake->hang_extents)
        fake_hang(fake);
    int rc = refuse(fake, error);
    for (const fl_extent *e = map_at(fake, offset), *end = fake->map + fake->map_count;
         rc == 0 && e < end && e->offset < offset + length; e++) {
        if (count == max)
            break;
        uint64_t from = MAX(e->offset, offset), to = MIN(e->offset + e->length, offset + length);
        extents[count++] = (fl_extent){ from, to - from, e->kind };
    }
    pthread_mutex_unlock(&fake->lock);
    if (rc == 0)
        *found = count;
    return rc;
}

static inline int fake_fail_read(struct fake *fake, uint64_t count, uint64_t offset, fl_error *error)
{
    for (size_t i = 0; i < fake->fault_count; i++) {
        struct fake_fault f = fake->faults[i];
        if (f.offset >= offset + count || offset >= f.offset + f.length)
            continue;
        if (f.hangs)
            fake_hang(fake);
        if (f.delay_ns) {
            pthread_mutex_unlock(&fake->lock);
            sleep_ns(f.delay_ns);
            pthread_mutex_lock(&fake->lock);
        }
        if (f.code)
            return fail(error, f.code, f.side, f.offset, f.length, "injected failure at %" PRIu64, f.offset);
    }
    return 0;
}

int fl_snapshot_pread(fl_snapshot *snapshot, void *buffer, size_t count, uint64_t offset, fl_error *error)
{
    struct fake *fake = fake_of(snapshot);
    CHECK(count > 0 && in_range(count, offset, fake->size), "read of %zu at %" PRIu64, count, offset);
    pthread_mutex_lock(&fake->lock);
    if (++fake->reading > fake->most_reading)
        fake->most_reading = fake->reading;
    int rc = fake_fail_read(fake, count, offset, error);
    if (rc == 0)
        rc = refuse(fake, error);
    for (size_t i = 0; i < fake->turn_count && rc == 0; i++) {
        uint64_t at = fake->turns[i].offset;
        if (at < offset || at >= offset + count || map_at(fake, at)->kind != FL_DATA)
            continue;
        fake_set(fake, at, MIN(fake->cluster, fake->size - at), fake->turns[i].kind);
        break;                  /* one a read */
    }
    for (uint64_t at = offset; at < offset + count && rc == 0; ) {
        const fl_extent *e = map_at(fake, at);
        uint64_t end = MIN(e->offset + e->length, offset + count);
        if (e->kind == FL_DATA && fake->bytes)
            memcpy((char *)buffer + (at - offset), fake->bytes + at, end - at);
        else if (e->kind == FL_DATA || e->kind == FL_ZERO)
            memset((char *)buffer + (at - offset), 0, end - at);
        else if (e->kind == FL_LOST) {
            rc = fail(error, FL_ELOST, FL_SIDE_SOURCE, at, end - at, "lost");
            if (error)
                error->cause = EIO;
        } else {
            int code = e->kind == FL_DISCARDED ? FL_EDISCARDED : FL_EOUTSIDE;
            rc = fail(error, code, FL_SIDE_NONE, at, end - at, "%s", fl_strerror(code));
        }
        at = end;
    }
    if (rc == 0)
        log_range(&fake->reads, &fake->read_count, &fake->read_room, offset, count);
    fake->reading--;
    pthread_mutex_unlock(&fake->lock);
    return rc;
}

/* Nothing is ever shared: cloning is tested with real snapshots, in test_invariants_clone.c. */
uint64_t snapshot_unsaved(fl_snapshot *snapshot, uint64_t length, uint64_t offset)
{
    (void)snapshot, (void)length, (void)offset;
    return 0;
}

int snapshot_clone(fl_snapshot *snapshot, fl_image *target, uint64_t length, uint64_t offset, uint64_t *good)
{
    (void)snapshot, (void)target, (void)length, (void)offset, (void)good;
    return -EOPNOTSUPP;
}

int fl_snapshot_discard(fl_snapshot *snapshot, uint64_t count, uint64_t offset, fl_error *error)
{
    struct fake *fake = fake_of(snapshot);
    pthread_mutex_lock(&fake->lock);
    int rc = refuse(fake, error);
    if (rc == 0) {
        CHECK(in_range(count, offset, fake->size), "discard of %" PRIu64 " at %" PRIu64, count, offset);
        log_range(&fake->discards, &fake->discard_count, &fake->discard_room, offset, count);
        uint64_t start = align_up(offset, fake->cluster), end = offset + count;
        if (end != fake->size)
            end = align_down(end, fake->cluster);
        if (start < end)
            fake_set(fake, start, end - start, FL_DISCARDED);
    }
    pthread_mutex_unlock(&fake->lock);
    return rc;
}

/* There is none that is whole here. */
int snapshot_discard_copied(fl_snapshot *snapshot, uint64_t count, uint64_t offset, fl_error *error)
{
    return fl_snapshot_discard(snapshot, count, offset, error);
}

#endif
