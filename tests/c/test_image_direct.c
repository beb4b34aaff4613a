/* test_image_direct.c DIR: O_DIRECT with callers who align nothing. DIR is on a file system that has O_DIRECT, or all is skipped. */
#define _GNU_SOURCE
#include "image_kit.h"

#include "image.h"

static void *aligned(size_t size)
{
    void *p = aligned_alloc(4096, align_up(size, 4096));
    CHECK(p);
    return memset(p, 0, size);
}

static void run_model(fl_image *image, uint64_t seed, int steps)
{
    struct model m;
    model_init(&m, image, seed);
    m.unit = info_of(image).alignment;
    m.discards_zero = image->punches;
    for (int i = 0; i < steps; i++) {
        model_step(&m);
        if (i % 50 == 49)
            model_check_all(&m);
    }
    MUST(fl_image_flush(image, &why));
    model_check_all(&m);
    model_free(&m);
}

static void test_model(void)
{
    const uint64_t sizes[] = { ODD_SIZE, 1 << 20, 513, 1, (3u << 20) + 4095 };
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        fl_image *image = must_create(in_directory("model"), sizes[i], WRITABLE | DIRECT);
        fl_image_info info = info_of(image);
        CHECK(info.direct && is_power_of_two(info.alignment) && info.size == sizes[i]);
        run_model(image, i, 400);
        struct stat st;
        CHECK(stat(in_directory("model"), &st) == 0 && (uint64_t)st.st_size == sizes[i], "the file's size changed");
        MUST(fl_image_zero(image, sizes[i], 0, &why));
        CHECK(info_of(image).allocated == 0, "%" PRIu64, info_of(image).allocated);
        fl_image_free(image);
    }
}

/* What was written directly is what others read, and the other way round: no stale cache on either side. */
static void test_same_bytes_as_buffered(void)
{
    const char *path = in_directory("both");
    fl_image *direct = must_create(path, ODD_SIZE, WRITABLE | DIRECT);
    fl_image *buffered = must_open(path, WRITABLE | SHARE), *reader = must_open(path, DIRECT | SHARE);
    unsigned char *a = aligned(ODD_SIZE), *b = aligned(ODD_SIZE);
    uint64_t random = 8;
    for (int i = 0; i < 200; i++) {
        uint64_t offset = below(&random, ODD_SIZE), count = 1 + below(&random, ODD_SIZE - offset);
        memset(a + offset, i, count);
        MUST(fl_image_pwrite(i % 2 ? direct : buffered, a + offset, count, offset, &why));
        MUST(fl_image_pread(i % 3 == 0 ? direct : i % 3 == 1 ? buffered : reader, b, ODD_SIZE, 0, &why));
        CHECK(!memcmp(a, b, ODD_SIZE), "after step %d", i);
    }
    EXPECT(EROFS, fl_image_pwrite(reader, a, 1, 0, &why));
    fl_image_free(direct);
    fl_image_free(buffered);
    fl_image_free(reader);
    free(a);
    free(b);
}

/* Long vectors of aligned and of unaligned pieces, and transfers larger than the bounce buffer. */
static void test_vectors(void)
{
    enum { ENTRIES = 3000, EACH = 4096 };
    static struct iovec iov[ENTRIES];
    const size_t size = (size_t)ENTRIES * EACH + 777;
    fl_image *image = must_create(in_directory("vectors"), size, WRITABLE | DIRECT);
    unsigned char *a = aligned(size + 4096), *b = aligned(size + 4096);
    uint64_t random = 3;
    for (size_t i = 0; i < size + 4096; i++)
        a[i] = (unsigned char)next_random(&random);
    for (int shift = 0; shift < 3; shift++) {   /* aligned; odd memory; odd memory and offset */
        size_t memory = shift ? 13 : 0, at = shift == 2 ? 777 : 0, length = (size_t)ENTRIES * EACH;
        for (int i = 0; i < ENTRIES; i++)
            iov[i] = (struct iovec){ a + memory + (size_t)i * EACH, EACH };
        MUST(image_writev(image, iov, ENTRIES, at, &why));
        for (int i = 0; i < ENTRIES; i++)
            iov[i].iov_base = b + memory + (size_t)i * EACH;
        memset(b, 0, size + 4096);
        MUST(image_readv(image, iov, ENTRIES, at, &why));
        CHECK(!memcmp(a + memory, b + memory, length));
        memset(b, 0, size + 4096);
        MUST(image_read(image, b + 1, length, at, &why));
        CHECK(!memcmp(a + memory, b + 1, length));
    }
    fl_image_free(image);
    free(a);
    free(b);
}

static void test_truncation(void)
{
    const char *path = in_directory("truncated");
    unsigned char *b = aligned(1 << 20);
    const uint64_t ends[] = { 8192, 8192 + 700, 0 };
    for (int i = 0; i < 3; i++) {
        fl_image *image = must_create(path, ODD_SIZE, WRITABLE | DIRECT);
        CHECK(truncate(path, (off_t)ends[i]) == 0);
        if (ends[i])
            MUST(fl_image_pread(image, b, ends[i], 0, &why));
        EXPECT(FL_ETRUNCATED, fl_image_pread(image, b, 65536, 0, &why));
        EXPECT(FL_ETRUNCATED, fl_image_pread(image, b + 1, 1, ends[i], &why));
        EXPECT(FL_ETRUNCATED, fl_image_pread(image, b + 1, 65536, 100000, &why));
        fl_image_free(image);
    }
    free(b);
}

/* ---- lost updates ---- */

/* In each round one thread writes all of block 0, one a part of it, one all of block 1, one a part of block 2; all blocks are in one page
   where the alignment is finer than a page. Afterwards every byte is what one of its writers wrote last. Without the lock in io_direct.c
   the part's writer puts back old bytes of the whole block's, or of its neighbours. */
enum { WHOLE, PART, NEIGHBOUR, NEIGHBOUR_PART, WRITERS };

struct race {
    fl_image *image;
    uint64_t block;
    int rounds;
    pthread_barrier_t start, end;
};

struct writer { struct race *race; int role; };

#define PART_AT 100
#define PART_LENGTH 200

static void *race_writer(void *argument)
{
    struct writer *w = argument;
    struct race *race = w->race;
    const uint64_t at[WRITERS] = { 0, PART_AT, race->block, 2 * race->block + PART_AT };
    const uint64_t length[WRITERS] = { race->block, PART_LENGTH, race->block, PART_LENGTH };
    unsigned char *buffer = aligned(race->block);
    for (int round = 1; round <= race->rounds; round++) {
        memset(buffer, (round * WRITERS + w->role) & 255, length[w->role]);
        pthread_barrier_wait(&race->start);
        MUST(fl_image_pwrite(race->image, buffer, length[w->role], at[w->role], &why));
        pthread_barrier_wait(&race->end);
    }
    free(buffer);
    return NULL;
}

static void check_bytes(const unsigned char *b, uint64_t from, uint64_t to, int a, int or, int round)
{
    for (uint64_t i = from; i < to; i++)
        CHECK(b[i] == (a & 255) || b[i] == (or & 255), "round %d, byte %" PRIu64 " is %02x, not %02x or %02x: an update was lost",
              round, i, b[i], a & 255, or & 255);
}

static void race(fl_image *image, int rounds)
{
    struct race r = { .image = image, .block = info_of(image).alignment, .rounds = rounds };
    struct writer writers[WRITERS];
    pthread_t threads[WRITERS];
    CHECK(pthread_barrier_init(&r.start, NULL, WRITERS + 1) == 0 && pthread_barrier_init(&r.end, NULL, WRITERS + 1) == 0);
    for (int i = 0; i < WRITERS; i++) {
        writers[i] = (struct writer){ &r, i };
        CHECK(pthread_create(&threads[i], NULL, race_writer, &writers[i]) == 0);
    }
    unsigned char *b = aligned(3 * r.block);
    for (int round = 1; round <= rounds; round++) {
        const int value = round * WRITERS;
        pthread_barrier_wait(&r.start);
        pthread_barrier_wait(&r.end);
        MUST(fl_image_pread(image, b, 3 * r.block, 0, &why));
        check_bytes(b, 0, PART_AT, value + WHOLE, value + WHOLE, round);
        check_bytes(b, PART_AT, PART_AT + PART_LENGTH, value + WHOLE, value + PART, round);
        check_bytes(b, PART_AT + PART_LENGTH, r.block, value + WHOLE, value + WHOLE, round);
        check_bytes(b, r.block, 2 * r.block, value + NEIGHBOUR, value + NEIGHBOUR, round);
        check_bytes(b, 2 * r.block, 2 * r.block + PART_AT, 0, 0, round);
        check_bytes(b, 2 * r.block + PART_AT, 2 * r.block + PART_AT + PART_LENGTH, value + NEIGHBOUR_PART, value + NEIGHBOUR_PART, round);
        check_bytes(b, 2 * r.block + PART_AT + PART_LENGTH, 3 * r.block, 0, 0, round);
    }
    for (int i = 0; i < WRITERS; i++)
        pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&r.start);
    pthread_barrier_destroy(&r.end);
    free(b);
}

static void test_no_update_is_lost(void)
{
    fl_image *image = must_create(in_directory("race"), ODD_SIZE, WRITABLE | DIRECT);
    race(image, 1500);
    fl_image_free(image);
}

/* ---- where it is different ---- */

static void test_not_supported(void)
{
    fl_image *image = NULL;
    EXPECT(EOPNOTSUPP, try_open("/proc/version", DIRECT | SHARE, &image));
    CHECK(strstr(why.text, "/proc/version") && strstr(why.text, "direct"), "%s", why.text);
}

static void test_device(const char *options, uint64_t size, uint32_t alignment)
{
    const char *file = in_directory("device.img");
    char device[64];
    CHECK(shell("rm -f '%s' && truncate -s %" PRIu64 " '%s'", file, size, file) == 0);
    int loop = loop_device(file, options, device, sizeof device);
    if (loop < 0) {
        printf("SKIP: direct loop device with '%s' (needs root and losetup)\n", options);
        return;
    }
    fl_image *image = must_open(device, WRITABLE | DIRECT);
    CHECK(info_of(image).size == (size & ~(uint64_t)(alignment - 1)), "%" PRIu64, info_of(image).size);
    CHECK(info_of(image).alignment == alignment && info_of(image).block_device, "%u", info_of(image).alignment);
    run_model(image, 5, 300);
    MUST(fl_image_zero(image, info_of(image).size, 0, &why));
    race(image, 300);
    fl_image_free(image);
    close(loop);
}

int main(int argc, char **argv)
{
    CHECK(argc == 2, "usage: test_image_direct DIR");
    directory = argv[1];
    fl_image_options o = raw_options(WRITABLE | DIRECT);
    fl_image *probe = NULL;
    int fds = count_entries("/proc/self/fd");
    unlink(in_directory("probe"));
    int rc = fl_image_create(in_directory("probe"), 4096, &o, &probe, &why);
    if (rc == -EOPNOTSUPP) {
        CHECK(access(in_directory("probe"), F_OK) != 0, "a failed creation left a file");
        printf("SKIP: direct transfers: %s\n", why.text);
        return 0;
    }
    CHECK(rc == 0, "%s", why.text);
    fl_image_free(probe);
    test_model();
    test_same_bytes_as_buffered();
    test_vectors();
    test_truncation();
    test_no_update_is_lost();
    test_not_supported();
    test_device("", 1 << 20, 512);
    test_device("-b 4096", 1 << 20, 4096);
    test_device("-b 4096", (1 << 20) + 512, 4096);
    CHECK(count_entries("/proc/self/fd") == fds, "files were left open");
    printf("ok\n");
    return 0;
}
