/* test_qcow2_crash.c DIR [STATES]: the file as it may be found after a crash at any moment of a random run.
 *
 * What the driver does to the file is recorded: writes, punches, syncs. A state: everything up to the last sync that ended before the crash, or rather
 * what had been done when that sync began, and of what came after it any part: writes are there or not, whole or some of their sectors. In
 * each state the check finds leaks at most, and each sector of the disk holds what it held at the last flush that had returned, or what was
 * written, zeroed or discarded since.
 */
#define _GNU_SOURCE
#include "qcow2_kit.h"
#include "storage.h"

#define SECTOR 512u
#define STEPS 160
#define NAME "crash.qcow2"

struct event {
    enum storage_event kind;
    uint64_t offset, length;
    unsigned char *data;
};

static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static struct event *events;
static size_t event_count, event_room;

static void record(enum storage_event kind, const struct iovec *iov, int count, uint64_t offset, uint64_t length)
{
    pthread_mutex_lock(&log_lock);
    if (event_count == event_room) {
        event_room = event_room ? event_room * 2 : 1024;
        events = realloc(events, event_room * sizeof *events);
        CHECK(events);
    }
    struct event *e = &events[event_count++];
    *e = (struct event){ kind, offset, length, NULL };
    if (kind == STORAGE_WRITE) {
        uint64_t done = 0;
        e->data = malloc(length);
        CHECK(e->data);
        for (int i = 0; i < count && done < length; i++) {
            uint64_t n = least_of(iov[i].iov_len, length - done);
            memcpy(e->data + done, iov[i].iov_base, n);
            done += n;
        }
    }
    pthread_mutex_unlock(&log_lock);
}

static size_t now(void)
{
    pthread_mutex_lock(&log_lock);
    size_t n = event_count;
    pthread_mutex_unlock(&log_lock);
    return n;
}

/* ---- the run ---- */

/* What happened to the disk. A flush is recorded when it has returned. */
struct step {
    bool flush;
    size_t begins, ends;                /* events before it began, and when it had ended */
    uint64_t first, count;              /* sectors */
    unsigned char *content;             /* of the whole disk, afterwards */
};

static struct step steps[STEPS];

static void run(fl_image *image, struct model *m, uint64_t cluster)
{
    uint64_t sectors = m->size / SECTOR, per_cluster = cluster / SECTOR;
    for (unsigned i = 0; i < STEPS; i++) {
        struct step *s = &steps[i];
        unsigned kind = (unsigned)below(&m->random, 100);
        *s = (struct step){ .flush = kind >= 88, .begins = now(), .first = below(&m->random, sectors) };
        s->count = 1 + below(&m->random, least_of(sectors - s->first, chance(&m->random, 20) ? 6 * per_cluster : per_cluster));
        uint64_t offset = s->first * SECTOR, length = s->count * SECTOR;
        if (kind < 55) {
            for (uint64_t at = 0; at < length; at += SECTOR)
                memset(m->scratch + at, (int)(1 + below(&m->random, 255)), SECTOR);
            MUST(fl_image_pwrite(image, m->scratch, length, offset, &why));
            memcpy(m->bytes + offset, m->scratch, length);
        } else if (kind < 63) {
            MUST(fl_image_zero(image, length, offset, &why));
            memset(m->bytes + offset, 0, length);
        } else if (kind < 80) {
            uint64_t first = (offset + cluster - 1) / cluster * cluster, end = offset + length;
            if (end != m->size)
                end -= end % cluster;
            MUST(fl_image_discard(image, length, offset, &why));
            if (first < end)
                memset(m->bytes + first, 0, end - first);
        } else if (kind < 88) {
            offset -= offset % cluster;
            length = least_of(cluster, m->size - offset);
            s->first = offset / SECTOR;
            s->count = length / SECTOR;
            for (uint64_t at = 0; at < length; at += SECTOR)
                memset(m->scratch + at, (int)(1 + below(&m->random, 255)), SECTOR);
            MUST(fl_image_write_compressed(image, m->scratch, length, offset, &why));
            memcpy(m->bytes + offset, m->scratch, length);
        } else {
            s->count = 0;
            MUST(fl_image_flush(image, &why));
        }
        s->ends = now();
        s->content = malloc(m->size);
        CHECK(s->content);
        memcpy(s->content, m->bytes, m->size);
    }
}

/* ---- states ---- */

static void apply(int fd, const struct event *e, bool whole, uint64_t *random)
{
    static const unsigned char zeros[65536];
    uint64_t step = whole ? e->length : SECTOR;
    for (uint64_t at = 0; at < e->length; at += step) {
        uint64_t n = least_of(step, e->length - at);
        if (!whole && chance(random, 50))
            continue;
        if (e->kind == STORAGE_WRITE) {
            CHECK(pwrite(fd, e->data + at, n, (off_t)(e->offset + at)) == (ssize_t)n);
            continue;
        }
        struct stat st;                 /* a punch makes no file longer */
        CHECK(fstat(fd, &st) == 0);
        uint64_t from = e->offset + at, end = least_of(from + n, (uint64_t)st.st_size);
        for (uint64_t part; from < end; from += part) {
            part = least_of(end - from, sizeof zeros);
            CHECK(pwrite(fd, zeros, part, (off_t)from) == (ssize_t)part);
        }
    }
}

/* The file at a crash after `crash` events. */
static void make_state(const char *path, const unsigned char *base, size_t base_size, size_t crash, uint64_t *random)
{
    size_t durable = 0, begun = 0;
    for (size_t i = 0; i < crash; i++) {
        if (events[i].kind == STORAGE_SYNC_BEGINS)
            begun = i;                  /* syncs do not overlap: there is one committer */
        else if (events[i].kind == STORAGE_SYNC)
            durable = begun;
    }
    int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0666);
    CHECK(fd >= 0 && write(fd, base, base_size) == (ssize_t)base_size);
    unsigned odds = (unsigned)below(random, 101);
    for (size_t i = 0; i < crash; i++)
        if (events[i].kind <= STORAGE_PUNCH && (i < durable || chance(random, odds)))
            apply(fd, &events[i], i < durable || chance(random, 70), random);
    close(fd);
}

static bool same(const unsigned char *a, const unsigned char *b, uint64_t sector) { return !memcmp(a + sector * SECTOR, b + sector * SECTOR, SECTOR); }

static void check_state(const char *path, size_t crash, const unsigned char *first, uint64_t size)
{
    unsigned last_flush = 0;            /* index + 1 */
    check_image(path, 1);
    for (unsigned i = 0; i < STEPS && steps[i].ends <= crash; i++)
        if (steps[i].flush)
            last_flush = i + 1;
    fl_image *image = open_qcow2(path, READ_ONLY, 0);
    unsigned char *got = malloc(size);
    CHECK(got);
    MUST(fl_image_pread(image, got, size, 0, &why));
    for (uint64_t sector = 0; sector < size / SECTOR; sector++) {
        bool fine = same(got, last_flush ? steps[last_flush - 1].content : first, sector);
        for (unsigned i = last_flush; i < STEPS && steps[i].begins <= crash && !fine; i++)
            fine = same(got, steps[i].content, sector);
        CHECK(fine, "crash after %zu events: sector %" PRIu64 " is %02x..., not what it was at the flush of step %u, nor what was written since",
              crash, sector, got[sector * SECTOR], last_flush);
    }
    fl_image_free(image);
    free(got);
}

static uint64_t file_size(const char *path)
{
    struct stat st;
    CHECK(stat(path, &st) == 0);
    return (uint64_t)st.st_size;
}

static unsigned char *read_file(const char *path, size_t *size)
{
    *size = file_size(path);
    unsigned char *data = malloc(*size);
    int fd = open(path, O_RDONLY);
    CHECK(data && fd >= 0 && read(fd, data, *size) == (ssize_t)*size);
    close(fd);
    return data;
}

static void crash(const struct shape *shape, unsigned states, uint64_t seed)
{
    const char *path = in_directory(NAME), *after = in_directory("after.qcow2");
    struct model m;
    size_t base_size;
    if (shape->backing) {
        int fd = open(in_directory(shape->backing), O_CREAT | O_TRUNC | O_WRONLY, 0666);
        CHECK(fd >= 0);
        for (uint64_t i = 0; i < shape->size; i += SECTOR)
            CHECK(pwrite(fd, &seed, 1, (off_t)i) == 1);
        close(fd);
    }
    make_image(path, shape);
    unsigned char *base = read_file(path, &base_size), *first = malloc(shape->size);
    CHECK(first);
    fl_image *image = open_qcow2(path, WRITABLE, 1);
    model_init(&m, image, seed);
    MUST(fl_image_pread(image, m.bytes, m.size, 0, &why));
    memcpy(first, m.bytes, m.size);
    storage_watch = record;
    run(image, &m, 1ull << shape->cluster_bits);
    MUST(fl_image_close(image, &why));
    storage_watch = NULL;
    fl_image_free(image);
    check_image(path, 0);
    for (unsigned i = 0; i < states; i++) {
        size_t at = i == 0 ? event_count : below(&m.random, event_count + 1);
        make_state(after, base, base_size, at, &m.random);
        check_state(after, at, first, m.size);
    }
    printf("%u-byte clusters: %zu events\n", 1u << shape->cluster_bits, event_count);
    for (size_t i = 0; i < event_count; i++)
        free(events[i].data);
    event_count = 0;
    for (unsigned i = 0; i < STEPS; i++)
        free(steps[i].content);
    model_free(&m);
    free(base);
    free(first);
}

/* ---- between making a table and filling it ---- */

static fl_image *shared;

static void *write_last(void *nothing)
{
    unsigned char data[SECTOR] = { 1 };
    storage_hangs_me = true;
    MUST(fl_image_pwrite(shared, data, SECTOR, (1 << 20) - SECTOR, &why));
    return nothing;
}

static void copy_file(const char *path, const char *copy)
{
    size_t size;
    unsigned char *data = read_file(path, &size);
    int to = open(copy, O_CREAT | O_TRUNC | O_WRONLY, 0666);
    CHECK(to >= 0 && write(to, data, size) == (ssize_t)size);
    close(to);
    free(data);
}

/* A flush may make a new L2 table known while nothing was written to it yet. Where it is the last cluster of the file, the file must reach to its end
 * all the same: else a crash leaves an entry that points behind the end. In clusters of 512 bytes: a table is for 32 KiB.
 */
static void flush_before_a_table_is_filled(void)
{
    static const struct shape shape = { 3, 9, 4, 1 << 20, NULL };
    const char *path = in_directory(NAME), *after = in_directory("after.qcow2");
    unsigned char data[SECTOR] = { 2 };
    pthread_t writer;
    make_image(path, &shape);
    shared = open_qcow2(path, WRITABLE, 0);
    MUST(fl_image_pwrite(shared, data, SECTOR, 0, &why));
    MUST(fl_image_flush(shared, &why));
    atomic_store(&storage_reads_hang_from, file_size(path));            /* so where a table is read that is new */
    CHECK(!pthread_create(&writer, NULL, write_last, NULL));
    while (!atomic_load(&storage_hanging))
        sleep_ns(MILLISECOND);
    MUST(fl_image_flush(shared, &why));
    copy_file(path, after);
    check_image(after, 1);
    fl_image *found = open_qcow2(after, WRITABLE, 0);
    for (uint64_t at = 0; at < shape.size; at += SECTOR)
        MUST(fl_image_pwrite(found, data, SECTOR, at, &why));
    MUST(fl_image_close(found, &why));
    fl_image_free(found);
    check_image(after, 1);

    atomic_store(&storage_reads_hang_from, UINT64_MAX);
    CHECK(!pthread_join(writer, NULL));
    MUST(fl_image_close(shared, &why));
    fl_image_free(shared);
    check_image(path, 0);
}

int main(int argc, char **argv)
{
    static const struct shape shapes[] = {
        { 3, 9, 4, 60 * 512, NULL }, { 3, 12, 4, 60 * 4096, NULL }, { 3, 9, 6, 40 * 512, "crash.raw" }, { 3, 10, 0, 100 * 1024, "crash.raw" },
        { 2, 9, 4, 100 * 512, NULL }, { 3, 16, 4, 20 * 65536, NULL },
    };
    CHECK(argc == 2 || argc == 3, "usage: test_qcow2_crash DIR [STATES]");
    directory = argv[1];
    unsigned states = argc == 3 ? (unsigned)atoi(argv[2]) : 144;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (uint64_t seed = 1; seed <= 2; seed++)
            crash(&shapes[i], states / 12, seed + 10 * i);
    free(events);
    flush_before_a_table_is_filled();
    printf("ok\n");
    return 0;
}
