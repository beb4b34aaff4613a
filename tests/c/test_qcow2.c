/* test_qcow2.c DIR: the core of the qcow2 driver, by itself: random operations against a model on images of all shapes, threads at once, what is freed
 * and when, growth, compressed clusters, broken storage. What the real tools say of the images is asked elsewhere.
 */
#define _GNU_SOURCE
#include "qcow2_kit.h"

#include <sys/resource.h>

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

static void test_model(void)
{
    const char *path = in_directory("model.qcow2");
    static const struct shape shapes[] = {
        { 3, 9, 0, 300000, NULL }, { 3, 9, 4, 300000, NULL }, { 3, 9, 6, 20000, NULL }, { 3, 10, 1, 300000, NULL }, { 3, 12, 2, 3000000, NULL },
        { 3, 12, 4, 3000320, NULL }, { 3, 13, 3, 3000320, NULL }, { 3, 16, 4, 8 << 20, NULL }, { 3, 16, 5, 8 << 20, NULL }, { 3, 21, 4, 20 << 20, NULL },
        { 2, 9, 4, 300000, NULL }, { 2, 12, 4, 3000320, NULL }, { 2, 16, 4, (5 << 20) + 512, NULL },
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        make_image(path, &shapes[i]);
        run_model(path, &shapes[i], 400, 0, i + 1);
    }
}

int main(int argc, char **argv)
{
    CHECK(argc == 2, "usage: test_qcow2 DIR");
    directory = argv[1];
    int fds = count_entries("/proc/self/fd");
    test_model();
    CHECK(count_entries("/proc/self/fd") == fds, "files were left open");
    printf("ok\n");
    return 0;
}
