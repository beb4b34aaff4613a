/* test_qcow2.c DIR: the core of the qcow2 driver, by itself: random operations against a model on images of all shapes, with and
 * without backing files; the cache when it is small; damaged tables. Threads, space and crashes have programs of their own, and what the real
 * tools say of the images is asked elsewhere.
 */
#define _GNU_SOURCE
#include "qcow2_kit.h"
#include "storage.h"

/* ---- against a model ---- */

static void reopen(struct model *m, const char *path, int flags, uint64_t cache)
{
    MUST(fl_image_close(m->image, &why));
    fl_image_free(m->image);
    check_image(path, 0);
    m->image = open_qcow2(path, flags, cache);
}

static void run_model(const char *path, const struct shape *shape, unsigned steps, int flags, uint64_t seed)
{
    struct model m;
    uint64_t cache = seed % 3 ? 1 : 0;                  /* mostly the smallest */
    fl_image *image = open_qcow2(path, WRITABLE | flags, cache);
    model_init(&m, image, seed);
    m.unit = 1ull << shape->cluster_bits;
    if (shape->backing)
        MUST(fl_image_pread(image, m.bytes, m.size, 0, &why));
    for (unsigned i = 0; i < steps; i++) {
        qcow2_step(&m, 1);
        if (chance(&m.random, 2))
            reopen(&m, path, WRITABLE | flags, cache);
    }
    model_check_all(&m);
    reopen(&m, path, READ_ONLY, cache);
    model_check_all(&m);
    fl_image_free(m.image);
    model_free(&m);
}

/* Data and holes, and an end inside of a sector. */
static void make_backing(const char *path, size_t size)
{
    int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0666);
    unsigned char block[5000];
    uint64_t random = 1;
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    for (size_t at = 0; at + sizeof block <= size; at += sizeof block * (1 + below(&random, 3))) {
        memset(block, (int)(1 + below(&random, 255)), sizeof block);
        CHECK(pwrite(fd, block, sizeof block, (off_t)at) == (ssize_t)sizeof block);
    }
    memset(block, 0xab, 300);
    CHECK(pwrite(fd, block, 300, (off_t)size - 300) == 300);
    close(fd);
}

static void test_model(void)
{
    const char *path = in_directory("model.qcow2");
    static const struct shape shapes[] = {
        { 3, 9, 0, 300000, NULL }, { 3, 9, 4, 300000, NULL }, { 3, 9, 6, 20000, NULL }, { 3, 10, 1, 300000, NULL }, { 3, 12, 2, 1000000, NULL },
        { 3, 12, 4, 1000320, NULL }, { 3, 13, 3, 1000320, NULL }, { 3, 16, 4, 2 << 20, NULL }, { 3, 16, 5, 3 << 20, NULL }, { 3, 21, 4, 7 << 20, NULL },
        { 2, 9, 4, 300000, NULL }, { 2, 12, 4, 1000320, NULL }, { 2, 16, 4, (2 << 20) + 512, NULL },
        { 3, 9, 4, 300000, "base.raw" }, { 3, 12, 3, 1000320, "base.raw" }, { 3, 16, 4, 2 << 20, "base.raw" },
    };
    make_backing(in_directory("base.raw"), 700001);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        make_image(path, &shapes[i]);
        run_model(path, &shapes[i], 200, i % 4 == 3 ? DIRECT : 0, i + 1);
    }
}

/* ---- damaged tables ---- */

static void poke(const char *path, uint64_t offset, uint64_t value)
{
    unsigned char bytes[8];
    put(bytes, value, 8);
    int fd = open(path, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, bytes, 8, (off_t)offset) == 8);
    close(fd);
}

static uint64_t peek(const char *path, uint64_t offset)
{
    uint64_t value;
    int fd = open(path, O_RDONLY);
    CHECK(fd >= 0 && pread(fd, &value, 8, (off_t)offset) == 8);
    close(fd);
    return __builtin_bswap64(value);
}

/* An entry that makes no sense: an error that says where, for reads and for writes; after that nothing is written any more, and the rest is read. */
static void test_damaged_tables(void)
{
    const char *path = in_directory("damaged.qcow2");
    const struct shape shape = { 3, 12, 4, 16 << 20, NULL };
    const uint64_t cluster = 4096, copied = 1ull << 63, compressed = 1ull << 62;
    static const char *const tables[] = { "L1", "L2" };
    const uint64_t bad[] = { cluster * 100000 | copied, (cluster * 5 + 512) | copied, copied | 2, cluster * 5 | copied | 1ull << 57, copied,
                             compressed | cluster * 100000, compressed | 100 };
    for (unsigned table = 0; table < 2; table++)
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
            char text[512], back[16] = "";
            make_image(path, &shape);
            fl_image *image = open_qcow2(path, WRITABLE, 0);
            MUST(fl_image_pwrite(image, "first", 5, 0, &why));          /* under L1 entry 0 */
            MUST(fl_image_pwrite(image, "second", 6, 4 << 20, &why));   /* and 2 */
            MUST(fl_image_close(image, &why));
            fl_image_free(image);
            uint64_t l1 = 3 * cluster, l2 = peek(path, l1 + 16) & ~copied;
            poke(path, table ? l2 : l1 + 16, bad[i]);
            for (int writable = 0; writable < 2; writable++) {
                image = open_qcow2(path, writable ? WRITABLE : READ_ONLY, 0);
                EXPECT(FL_EFORMAT, fl_image_pread(image, text, 512, (4 << 20) + 512, &why));
                CHECK(strstr(why.text, "is damaged") && strstr(why.text, "4194304"), "%s, %zu: %s", tables[table], i, why.text);
                MUST(fl_image_pread(image, back, 5, 0, &why));
                CHECK(!memcmp(back, "first", 5));
                if (writable) {
                    EXPECT(FL_EFORMAT, fl_image_pwrite(image, "x", 1, 0, &why));
                    EXPECT(FL_EFORMAT, fl_image_discard(image, cluster, 0, &why));
                }
                fl_image_free(image);
            }
            image = open_qcow2(path, WRITABLE, 0);
            EXPECT(FL_EFORMAT, fl_image_pwrite(image, "x", 1, 4 << 20, &why));
            fl_image_free(image);
        }
}

/* Refcounts that call free what is in use: whoever would be given that cluster is told instead. */
static void test_damaged_refcounts(void)
{
    const char *path = in_directory("refcounts.qcow2");
    const uint64_t cluster = 4096;
    for (int in_table = 0; in_table < 2; in_table++) {
        make_image(path, &(struct shape){ 3, 12, 4, 16 << 20, NULL });
        if (in_table)
            poke(path, cluster, cluster * 100000);      /* the only block of refcounts is behind the end */
        else
            poke(path, 2 * cluster, 0);                 /* the header and the tables are free */
        fl_image *image = open_qcow2(path, WRITABLE, 0);
        EXPECT(FL_EFORMAT, fl_image_pwrite(image, "x", 1, 0, &why));
        CHECK(strstr(why.text, in_table ? "entry 0 of the refcount table" : "cluster 0 of the file is free"), "%s", why.text);
        EXPECT(FL_EFORMAT, fl_image_pwrite(image, "x", 1, 0, &why));
        CHECK(strstr(why.text, "no more writes"), "%s", why.text);
        fl_image_free(image);
    }
}

int main(int argc, char **argv)
{
    CHECK(argc == 2, "usage: test_qcow2 DIR");
    directory = argv[1];
    int fds = count_entries("/proc/self/fd");
    test_model();
    test_damaged_tables();
    test_damaged_refcounts();
    CHECK(count_entries("/proc/self/fd") == fds, "files were left open");
    printf("ok\n");
    return 0;
}
