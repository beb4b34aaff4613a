/* test_qcow2_space.c DIR: which clusters of the file a qcow2 image uses, and when: what is freed, and when it may be used again; how often the storage is
 * asked to sync; tables that grow; disks that grow; storage that fails.
 */
#define _GNU_SOURCE
#include "qcow2_kit.h"
#include "storage.h"

#define MiB (1u << 20)

static unsigned char *pattern(size_t size, unsigned seed)
{
    unsigned char *p = malloc(size);
    CHECK(p);
    for (size_t i = 0; i < size; i++)
        p[i] = (unsigned char)((i * 7 + i / 251 + seed) | 1);
    return p;
}

static const char *fresh(const char *name, const struct shape *shape)
{
    const char *path = in_directory(name);
    make_image(path, shape);
    return path;
}

static void close_and_check(fl_image *image, const char *path)
{
    MUST(fl_image_close(image, &why));
    fl_image_free(image);
    check_image(path, 0);
}

static uint64_t blocks_of(const char *path)
{
    struct stat st;
    CHECK(stat(path, &st) == 0);
    return (uint64_t)st.st_blocks * 512;
}

static uint64_t length_of(const char *path)
{
    struct stat st;
    CHECK(stat(path, &st) == 0);
    return (uint64_t)st.st_size;
}

/* Where the bytes at `offset` are in the file. */
static uint64_t host_of(fl_image *image, uint64_t offset)
{
    fl_mapping m;
    size_t found;
    MUST(fl_image_map(image, offset, 1, &m, 1, &found, &why));
    CHECK(found == 1 && m.flags == (FL_MAP_DATA | FL_MAP_ALLOCATED | FL_MAP_OFFSET) && m.depth == 0, "at %" PRIu64 ": flags %d", offset, m.flags);
    return m.host_offset;
}

static bool is_all_zero(fl_image *image, uint64_t count, uint64_t offset)
{
    unsigned char *p = malloc(count);
    CHECK(p);
    MUST(fl_image_pread(image, p, count, offset, &why));
    bool zero = p[0] == 0 && !memcmp(p, p + 1, count - 1);
    free(p);
    return zero;
}

static void test_freed_clusters_are_used_again_after_a_commit_only(void)
{
    const char *path = fresh("again.qcow2", &(struct shape){ 3, 16, 4, 8 * MiB, NULL });
    fl_image *image = open_qcow2(path, WRITABLE, 0);
    unsigned char *data = pattern(MiB, 1);
    MUST(fl_image_pwrite(image, data, MiB, 0, &why));
    MUST(fl_image_flush(image, &why));
    uint64_t first = host_of(image, 0), end = length_of(path);
    MUST(fl_image_discard(image, MiB, 0, &why));
    MUST(fl_image_pwrite(image, data, MiB, MiB, &why));         /* the old place is still what a crash would come back to */
    CHECK(host_of(image, MiB) >= end, "clusters were used again before the commit");
    MUST(fl_image_flush(image, &why));
    MUST(fl_image_pwrite(image, data, MiB, 2 * MiB, &why));
    CHECK(host_of(image, 2 * MiB) == first, "clusters were not used again after the commit");
    CHECK(is_all_zero(image, MiB, 0));
    close_and_check(image, path);
    free(data);
}

static void test_space_is_given_back(void)
{
    const char *path = fresh("back.qcow2", &(struct shape){ 3, 16, 4, 64 * MiB, NULL });
    fl_image *image = open_qcow2(path, WRITABLE, 0);
    unsigned char *data = pattern(8 * MiB, 1);
    for (unsigned i = 0; i < 4; i++)
        MUST(fl_image_pwrite(image, data, 8 * MiB, i * 8 * MiB, &why));
    MUST(fl_image_flush(image, &why));
    CHECK(blocks_of(path) >= 32 * MiB);
    MUST(fl_image_discard(image, 32 * MiB, 0, &why));
    MUST(fl_image_flush(image, &why));
    if (blocks_of(path) > 8 * MiB)
        printf("SKIP: no holes can be punched in files here\n");

    /* and without any flush: 80 times 4 MiB come and go. What one commit frees, and what is freed while it syncs, is less than 112 MiB. */
    uint64_t most = length_of(path) + 112 * MiB;
    for (unsigned i = 0; i < 80; i++) {
        MUST(fl_image_pwrite(image, data, 4 * MiB, (i % 8) * 4 * MiB, &why));
        MUST(fl_image_discard(image, 4 * MiB, (i % 8) * 4 * MiB, &why));
    }
    CHECK(length_of(path) < most, "the file grew to %" PRIu64 " bytes for want of a commit", length_of(path));
    close_and_check(image, path);
    free(data);
}

/* What is left of clusters that hold old data must be what was there on the disk. */
static void test_used_again_without_punching(void)
{
    atomic_store(&storage_cannot_punch, true);
    const char *path = fresh("dirty.qcow2", &(struct shape){ 3, 16, 4, 8 * MiB, NULL });
    fl_image *image = open_qcow2(path, WRITABLE, 0);
    unsigned char *data = pattern(MiB, 1);
    MUST(fl_image_pwrite(image, data, MiB, 0, &why));
    uint64_t first = host_of(image, 0);
    MUST(fl_image_discard(image, MiB, 0, &why));
    MUST(fl_image_flush(image, &why));
    MUST(fl_image_pwrite(image, data, 1000, 4 * MiB + 3000, &why));
    CHECK(host_of(image, 4 * MiB) == first);
    CHECK(is_all_zero(image, 3000, 4 * MiB) && is_all_zero(image, 65536 - 4000, 4 * MiB + 4000), "old data came to light");
    close_and_check(image, path);
    free(data);
    atomic_store(&storage_cannot_punch, false);
}

struct hanging { fl_image *image; const void *data; uint64_t offset; };

static void *hang_body(void *argument)
{
    struct hanging *h = argument;
    storage_hangs_me = true;
    MUST(fl_image_pwrite(h->image, h->data, 65536, h->offset, &why));
    return NULL;
}

/* A write that hangs on its way to a cluster that is taken out of the map meanwhile: nobody waits for it, and nobody gets the cluster. */
static void test_a_hanging_write_keeps_its_cluster(void)
{
    const char *path = fresh("hang.qcow2", &(struct shape){ 3, 16, 4, 8 * MiB, NULL });
    fl_image *image = open_qcow2(path, WRITABLE, 0);
    unsigned char *data = pattern(MiB, 1), *late = pattern(65536, 2), *back = malloc(MiB);
    struct hanging h = { image, late, 0 };
    pthread_t thread;
    CHECK(back);
    MUST(fl_image_pwrite(image, data, 65536, 0, &why));
    uint64_t host = host_of(image, 0);
    atomic_store(&storage_hangs, true);
    CHECK(!pthread_create(&thread, NULL, hang_body, &h));
    while (!atomic_load(&storage_hanging))
        sleep_ns(MILLISECOND);
    MUST(fl_image_discard(image, 65536, 0, &why));
    MUST(fl_image_flush(image, &why));
    MUST(fl_image_flush(image, &why));
    MUST(fl_image_pwrite(image, data, MiB, MiB, &why));
    for (uint64_t at = MiB; at < 2 * MiB; at += 65536)
        CHECK(host_of(image, at) != host, "the cluster was given to somebody else while a write to it was on its way");
    atomic_store(&storage_hangs, false);
    CHECK(!pthread_join(thread, NULL));
    MUST(fl_image_pread(image, back, MiB, MiB, &why));
    CHECK(!memcmp(back, data, MiB) && is_all_zero(image, 65536, 0));
    MUST(fl_image_pwrite(image, data, 512, 3 * MiB, &why));     /* something for a commit to do */
    MUST(fl_image_flush(image, &why));
    MUST(fl_image_pwrite(image, data, 65536, 4 * MiB, &why));
    CHECK(host_of(image, 4 * MiB) == host, "the cluster was not given back after the write had ended");
    close_and_check(image, path);
    free(data);
    free(late);
    free(back);
}

static void test_how_often_the_storage_syncs(void)
{
    const char *path = fresh("syncs.qcow2", &(struct shape){ 3, 16, 4, 512 * MiB, NULL });
    fl_image *image = open_qcow2(path, WRITABLE, 0);
    atomic_store(&storage_syncs, 0);
    for (uint64_t i = 0; i < 1000; i++)
        MUST(fl_image_pwrite(image, "data", 4, i * 65536 + 100, &why));
    MUST(fl_image_discard(image, 2 * MiB, 0, &why));
    CHECK(atomic_load(&storage_syncs) == 0, "%u syncs without a flush", storage_syncs);
    MUST(fl_image_flush(image, &why));
    CHECK(atomic_load(&storage_syncs) == 3, "%u syncs for refcounts with data, L2 and L1", storage_syncs);
    atomic_store(&storage_syncs, 0);
    MUST(fl_image_pwrite(image, "data", 4, 30 * 65536, &why));
    MUST(fl_image_flush(image, &why));
    CHECK(atomic_load(&storage_syncs) == 2, "%u syncs for refcounts with data, and L2", storage_syncs);
    atomic_store(&storage_syncs, 0);
    MUST(fl_image_pwrite(image, "data", 4, 30 * 65536 + 77, &why));
    MUST(fl_image_flush(image, &why));
    CHECK(atomic_load(&storage_syncs) == 1, "%u syncs for data", storage_syncs);
    close_and_check(image, path);
}

static void test_the_refcount_table_grows(void)
{
    for (unsigned order = 4; order <= 6; order += 2) {
        const struct shape shape = { 3, 9, order, 24 * MiB, NULL };
        unsigned char *data = pattern(MiB, order), *back = malloc(MiB);
        CHECK(back);
        /* the L1 table of such a disk needs more refcounts than one small block has: so begin small, and grow the disk */
        struct shape small = shape;
        small.size = 512 * 1024;
        const char *path = fresh("growing.qcow2", &small);
        fl_image *image = open_qcow2(path, WRITABLE, 1);
        MUST(fl_image_pwrite(image, "old", 3, 1000, &why));
        MUST(fl_image_grow(image, shape.size, &why));
        CHECK(info_of(image).size == shape.size && is_all_zero(image, shape.size - 4000, 4000));
        for (unsigned i = 1; i < 24; i++) {
            MUST(fl_image_pwrite(image, data, MiB, i * MiB, &why));
            if (i % 5 == 0)
                MUST(fl_image_flush(image, &why));
        }
        MUST(fl_image_close(image, &why));
        fl_image_free(image);
        check_image(path, 0);
        image = open_qcow2(path, READ_ONLY, 1);
        for (unsigned i = 1; i < 24; i++) {
            MUST(fl_image_pread(image, back, MiB, i * MiB, &why));
            CHECK(!memcmp(back, data, MiB), "MiB %u", i);
        }
        MUST(fl_image_pread(image, back, 3, 1000, &why));
        CHECK(!memcmp(back, "old", 3));
        fl_image_free(image);
        free(data);
        free(back);
    }
}

/* What a longer backing file holds behind the old end stays hidden. */
static void test_growth_hides_the_backing_file(void)
{
    for (unsigned version = 2; version <= 3; version++) {
        const char *backing = in_directory("long.raw");
        unsigned char *data = pattern(MiB, 5), *back = malloc(MiB);
        int fd = open(backing, O_CREAT | O_TRUNC | O_WRONLY, 0666);
        CHECK(back && fd >= 0 && write(fd, data, MiB) == MiB);
        close(fd);
        const char *path = fresh("grow.qcow2", &(struct shape){ version, 16, 4, 100000 / 512 * 512, "long.raw" });
        fl_image *image = open_qcow2(path, WRITABLE, 0);
        uint64_t old = info_of(image).size;
        EXPECT(EINVAL, fl_image_grow(image, old - 512, &why));
        EXPECT(EINVAL, fl_image_grow(image, old + 1, &why));
        MUST(fl_image_grow(image, 2 * MiB, &why));
        for (int again = 0; again < 2; again++) {
            MUST(fl_image_pread(image, back, old, 0, &why));
            CHECK(!memcmp(back, data, old) && is_all_zero(image, 2 * MiB - old, old), "version %u, again %d", version, again);
            close_and_check(image, path);
            image = open_qcow2(path, WRITABLE, 0);
        }
        fl_image_free(image);
        free(data);
        free(back);
    }
}

/* What a failed operation touched is old or new, byte for byte, and then stays that. */
static void settle_range(fl_image *image, struct model *m, uint64_t count, uint64_t offset)
{
    unsigned char *now = malloc(count);
    CHECK(now);
    MUST(fl_image_pread(image, now, count, offset, &why));
    for (uint64_t i = 0; i < count; i++)
        CHECK(now[i] == m->scratch[i] || now[i] == m->bytes[offset + i], "byte %" PRIu64 " is %02x, neither old (%02x) nor new (%02x)", offset + i, now[i],
              m->bytes[offset + i], m->scratch[i]);
    memcpy(m->bytes + offset, now, count);
    free(now);
}

/* Errors of all kinds, at random: nothing changes but what the operation was about, and the file is never corrupt. */
static void test_failing_storage(void)
{
    static const int errors[] = { EIO, ENOSPC, EDQUOT };
    for (unsigned round = 0; round < 18; round++) {
        const struct shape shape = { 3, round % 2 ? 12 : 9, round % 3 ? 4 : 3, 120000 / 512 * 512, NULL };
        const char *path = fresh("failing.qcow2", &shape);
        struct model m;
        fl_image *image = open_qcow2(path, WRITABLE, 1);
        model_init(&m, image, round + 1);
        uint64_t cluster = 1ull << shape.cluster_bits;
        unsigned failed = 0;
        atomic_store(&storage_error, errors[round % 3]);
        for (unsigned i = 0; i < 200; i++) {
            uint64_t offset = below(&m.random, m.size), count = 1 + below(&m.random, least_of(3 * cluster, m.size - offset));
            unsigned kind = (unsigned)below(&m.random, 10);
            if (kind >= 8) {
                MUST(fl_image_flush(image, &why));
                continue;
            }
            memset(m.scratch, kind < 6 ? (int)(1 + below(&m.random, 255)) : 0, count);
            atomic_store(&storage_fails, i % 3 ? 0 : 100);
            int rc = kind < 6 ? fl_image_pwrite(image, m.scratch, count, offset, &why) : fl_image_zero(image, count, offset, &why);
            atomic_store(&storage_fails, 0);
            CHECK(rc == 0 || rc == -atomic_load(&storage_error), "%d: %s", rc, why.text);
            if (rc)
                settle_range(image, &m, count, offset);
            else
                memcpy(m.bytes + offset, m.scratch, count);
            failed += rc != 0;
            MUST(fl_image_pread(image, m.scratch, m.size, 0, &why));
            CHECK(!memcmp(m.scratch, m.bytes, m.size), "round %u, step %u, operation %u of %" PRIu64 " at %" PRIu64, round, i, kind, count, offset);
        }
        CHECK(failed > 0, "nothing failed");
        MUST(fl_image_close(image, &why));
        fl_image_free(image);
        check_image(path, 1);           /* a refcount that could not be read when something was given back: a leak */
        model_free(&m);
    }
}

/* A sync that fails may have lost what was written: nothing is promised any more. */
static void test_failed_sync(void)
{
    const char *path = fresh("sync.qcow2", &(struct shape){ 3, 16, 4, 8 * MiB, NULL });
    fl_image *image = open_qcow2(path, WRITABLE, 0);
    MUST(fl_image_pwrite(image, "data", 4, 0, &why));
    atomic_store(&storage_cannot_sync, true);
    EXPECT(EIO, fl_image_flush(image, &why));
    atomic_store(&storage_cannot_sync, false);
    EXPECT(EIO, fl_image_flush(image, &why));
    EXPECT(EIO, fl_image_pwrite(image, "data", 4, 4 * MiB, &why));
    EXPECT(EIO, fl_image_close(image, &why));
    fl_image_free(image);
    check_image(path, 1);
}

/* The file is cut off under us: an error, not zeros. */
static void test_truncated_file(void)
{
    const char *path = fresh("cut.qcow2", &(struct shape){ 3, 16, 4, 8 * MiB, NULL });
    fl_image *image = open_qcow2(path, WRITABLE, 0);
    unsigned char *data = pattern(MiB, 1);
    MUST(fl_image_pwrite(image, data, MiB, 0, &why));
    CHECK(truncate(path, (off_t)host_of(image, 65536)) == 0);
    MUST(fl_image_pread(image, data, 65536, 0, &why));
    EXPECT(FL_ETRUNCATED, fl_image_pread(image, data, 65536, 65536, &why));
    fl_image_free(image);
    free(data);
}

int main(int argc, char **argv)
{
    CHECK(argc == 2, "usage: test_qcow2_space DIR");
    directory = argv[1];
    alarm(200);
    int fds = count_entries("/proc/self/fd");
    test_freed_clusters_are_used_again_after_a_commit_only();
    test_space_is_given_back();
    test_used_again_without_punching();
    test_a_hanging_write_keeps_its_cluster();
    test_how_often_the_storage_syncs();
    test_the_refcount_table_grows();
    test_growth_hides_the_backing_file();
    test_failing_storage();
    test_failed_sync();
    test_truncated_file();
    CHECK(count_entries("/proc/self/fd") == fds, "files were left open");
    printf("ok\n");
    return 0;
}
