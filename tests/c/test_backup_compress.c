/* test_backup_compress.c: copy mode with a target that compresses: whole clusters of it, put together from parts of any kind, by several workers. */
#define _GNU_SOURCE
#include "backup_kit.h"

static fl_image *new_qcow2(uint64_t size, uint32_t cluster, const char *compression, bool is_zero)
{
    char path[4096];
    fl_image_options options = { .format = "qcow2", .writable = 1, .cluster_size = cluster, .compression = compression };
    fl_image *image;
    snprintf(path, sizeof path, "%s/target.qcow2", directory);
    MUST(fl_image_create(path, size, &options, &image, &why));
    CHECK(unlink(path) == 0);
    if (!is_zero) {
        uint8_t *old = malloc(size);
        CHECK(old, "no memory");
        memset(old, OLD, size);
        MUST(fl_image_pwrite(image, old, size, 0, &why));
        free(old);
    }
    return image;
}

/* Half of the data does get smaller. */
static void make_compressible(struct fake *fake, uint64_t *random)
{
    for (uint64_t at = 0; at + 4096 <= fake->size; at += 4096)
        if (chance(random, 50) && fake_kind(fake, at) == FL_DATA && fake_kind(fake, at + 4095) == FL_DATA)
            memset(fake->bytes + at, (int)(1 + below(random, 255)), 4096);
}

static uint64_t compressed_bytes(fl_image *image)
{
    fl_image_info info;
    fl_mapping mappings[64];
    uint64_t sum = 0;
    size_t found;
    MUST(fl_image_info_get(image, &info, &why));
    for (uint64_t at = 0; at < info.size; at = mappings[found - 1].offset + mappings[found - 1].length) {
        MUST(fl_image_map(image, at, info.size - at, mappings, 64, &found, &why));
        for (size_t i = 0; i < found; i++)
            sum += mappings[i].flags & FL_MAP_COMPRESSED ? mappings[i].length : 0;
    }
    return sum;
}

static const char *const compressions[] = { "zlib", "zstd" };

static void test_copy_of_random_extents(void)
{
    static const uint32_t clusters[] = { 4096, 65536 }, target_clusters[] = { 512, 4096, 16384, 65536 };
    uint64_t random = 11, compressed = 0;
    for (int round = 0; round < 32; round++) {
        uint32_t cluster = clusters[round % 2], target_cluster = target_clusters[round / 2 % 4];
        uint64_t size = MIB / 2 + below(&random, MIB);
        bool is_zero = round & 8, discard = round & 16;
        struct fake *fake = fake_new(size, cluster, FL_DATA, true);
        scramble(fake, &random, round % 3 == 0);
        make_compressible(fake, &random);
        size_t count = fake->map_count;
        fl_extent *map = copy_of_map(fake);
        fl_image *target = new_qcow2(size + below(&random, 2) * 100000, target_cluster, compressions[round / 2 % 2], is_zero);
        fl_backup *job = start(fake, target, (fl_backup_options){
            .granularity = 65536 << below(&random, 3), .workers = (uint32_t)below(&random, 6), .discard = discard,
            .target_is_zero = is_zero, .skip_lost = 1, .compress = 1 });
        MUST(fl_backup_wait(job, 60 * SECOND, &why));
        check_target(target, fake, map, count, is_zero);
        fl_progress p = progress_of(job);
        CHECK(p.finished && p.total == size - sum_of(map, count, FL_OUTSIDE) && p.done == p.total, "%" PRIu64 " of %" PRIu64, p.done, p.total);
        CHECK(p.lost_bytes == sum_of_lost(map, count), "lost %" PRIu64, p.lost_bytes);
        CHECK(p.data_bytes + p.zero_bytes == sum_of(map, count, FL_DATA) + sum_of(map, count, FL_ZERO), "data and zeros");
        check_lost(job, map, count);
        end(job);
        compressed += compressed_bytes(target);
        fl_image_free(target);
        fake_free(fake);
        free(map);
    }
    CHECK(compressed > MIB / 2, "hardly anything was compressed: %" PRIu64, compressed);
}

/* Data and zeros in one cluster make one compressed cluster, and a cluster of nothing but zeros none. */
static void test_parts_are_put_together(void)
{
    struct fake *fake = fake_new(MIB, 4096, FL_ZERO, true);
    memset(fake->bytes, 0, fake->size);
    for (uint64_t at = 4096; at < MIB / 2; at += 8192) {        /* each other cluster of the snapshot */
        fake_set(fake, at, 4096, FL_DATA);
        memset(fake->bytes + at, 7, 4096);
    }
    fake_set(fake, MIB / 2, MIB / 4, FL_DATA);                  /* which are zeros, as it turns out */
    fl_image *target = new_qcow2(MIB, 65536, "zlib", true);
    fl_backup *job = start(fake, target, (fl_backup_options){ .granularity = 131072, .target_is_zero = 1, .compress = 1 });
    MUST(fl_backup_wait(job, 20 * SECOND, &why));
    check_target(target, fake, fake->map, fake->map_count, true);
    CHECK(compressed_bytes(target) == MIB / 2, "%" PRIu64, compressed_bytes(target));
    fl_progress p = progress_of(job);
    CHECK(p.data_bytes == MIB / 2 && p.zero_bytes == MIB / 2, "%" PRIu64 " of data", p.data_bytes);
    end(job);
    fl_image_free(target);
    fake_free(fake);
}

static void test_options(void)
{
    struct fake *fake = fake_new(MIB, 4096, FL_DATA, true);
    fl_backup *job = NULL;
    fl_backup_options options = { .granularity = 32768, .compress = 1 };
    fl_image *target = new_qcow2(MIB, 65536, "zlib", true), *raw = new_target(MIB, true);
    EXPECT(EINVAL, fl_backup_start(as_snapshot(fake), target, &options, &job, &why));
    CHECK(strstr(why.text, "target's cluster size, 65536"), "%s", why.text);
    EXPECT(EINVAL, fl_backup_start(as_snapshot(fake), NULL, &options, &job, &why));
    CHECK(strstr(why.text, "only a target that is an image"), "%s", why.text);
    EXPECT(EOPNOTSUPP, fl_backup_start(as_snapshot(fake), raw, &options, &job, &why));
    CHECK(why.side == FL_SIDE_TARGET && strstr(why.text, "raw, has no compression"), "%s", why.text);
    CHECK(job == NULL, "an output was touched on failure");
    fl_image_free(target);
    fl_image_free(raw);
    fake_free(fake);
}

/* The default granularity is not less than a cluster of the target. */
static void test_default_granularity(void)
{
    struct fake *fake = fake_new(8 * MIB, 4096, FL_DATA, true);
    fl_image *target = new_qcow2(8 * MIB, 2 * MIB, "zlib", true);
    fl_backup_options options = { .compress = 1, .target_is_zero = 1 };
    fl_backup *job;
    MUST(fl_backup_start(as_snapshot(fake), target, &options, &job, &why));
    MUST(fl_backup_wait(job, 20 * SECOND, &why));
    check_target(target, fake, fake->map, fake->map_count, true);
    end(job);
    fl_image_free(target);
    fake_free(fake);
}

/* Each compressed write fails once; the job tells it, with its place, and the target stays sound enough to be closed. */
static void test_faults(void)
{
    for (uint64_t nth = 1; nth <= 16; nth++) {
        struct fake *fake = fake_new(MIB, 4096, FL_DATA, true);
        uint64_t random = nth;
        make_compressible(fake, &random);
        fl_image *inner = new_qcow2(MIB, 65536, "zlib", true), *target;
        fl_fault fault = { .ops = FL_OP_WRITE, .action = nth % 2 ? FL_FAULT_ERROR : FL_FAULT_SHORT, .err = ENOSPC, .nth = nth, .times = 1 };
        MUST(fl_image_faulty(inner, &target, &why));
        MUST(fl_fault_add(target, &fault, &why));
        fl_backup *job = start(fake, target, (fl_backup_options){ .granularity = 131072, .workers = 3, .target_is_zero = 1, .compress = 1 });
        EXPECT(ENOSPC, fl_backup_wait(job, 20 * SECOND, &why));
        CHECK(why.side == FL_SIDE_TARGET && why.length == 65536 && why.offset % 65536 == 0, "%" PRIu64 " %" PRIu64, why.offset, why.length);
        CHECK(fl_fault_seen(target, FL_OP_WRITE) >= nth, "the fault was not met");
        end(job);
        fl_image_free(target);
        fl_image_free(inner);
        fake_free(fake);
    }
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(copy_of_random_extents), TEST(parts_are_put_together), TEST(options), TEST(default_granularity), TEST(faults),
    };
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
