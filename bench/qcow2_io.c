/* qcow2_io.c: reads or writes at a fixed stride in a qcow2 image, by some threads: the counterpart of `qemu-img bench`.
 *
 *   qcow2_io IMAGE read|write COUNT SIZE STEP THREADS FLUSH_INTERVAL
 *
 * Request i is at i * STEP, modulo the size of the disk less SIZE. A flush after every FLUSH_INTERVAL requests of a thread (0: none).
 * Prints the seconds that opening took, those of the requests, and those of closing.
 *
 *   qcow2_io IMAGE open
 *
 * opens it, reads 4 KiB in the middle, and closes it.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../csrc/fleece.h"

static fl_image *image;
static uint64_t disk_size, count, step, flush_interval;
static size_t size;
static int writing;
static _Atomic uint64_t next;

static void check(int rc, const char *what, const fl_error *error)
{
    if (rc) {
        fprintf(stderr, "%s: %s\n", what, error->text);
        exit(1);
    }
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void *worker(void *unused)
{
    fl_error error;
    char *buffer;
    (void)unused;
    if (posix_memalign((void **)&buffer, 4096, size))      /* as QEMU's is: the kernel copies to others at half the speed */
        exit(1);
    memset(buffer, 0xa5, size);
    for (uint64_t i, done = 1; (i = atomic_fetch_add(&next, 1)) < count; done++) {
        uint64_t offset = i * step % (disk_size - size);
        offset -= offset % (size < 4096 ? size : 4096);
        check(writing ? fl_image_pwrite(image, buffer, size, offset, &error) : fl_image_pread(image, buffer, size, offset, &error),
              "transfer", &error);
        if (flush_interval && done % flush_interval == 0)
            check(fl_image_flush(image, &error), "flush", &error);
    }
    free(buffer);
    return NULL;
}

int main(int argc, char **argv)
{
    fl_error error;
    fl_image_info info;
    pthread_t threads[64];
    if (argc != 3 && argc != 8)
        return 2;
    writing = strcmp(argv[2], "write") == 0;
    fl_image_options options = { .format = "qcow2", .writable = writing };
    double begin = seconds();
    check(fl_image_open(argv[1], &options, &image, &error), "open", &error);
    check(fl_image_info_get(image, &info, &error), "info", &error);
    disk_size = info.size;
    if (argc == 3) {
        char buffer[4096];
        check(fl_image_pread(image, buffer, sizeof buffer, disk_size / 2, &error), "read", &error);
    }
    double opened = seconds();
    if (argc == 8) {
        count = strtoull(argv[3], NULL, 0);
        size = strtoull(argv[4], NULL, 0);
        step = strtoull(argv[5], NULL, 0);
        unsigned used = (unsigned)strtoul(argv[6], NULL, 0);
        flush_interval = strtoull(argv[7], NULL, 0);
        if (used < 1 || used > 64 || size < 1 || size >= disk_size)
            return 2;
        for (unsigned i = 0; i < used; i++)
            if (pthread_create(&threads[i], NULL, worker, NULL))
                return 1;
        for (unsigned i = 0; i < used; i++)
            pthread_join(threads[i], NULL);
    }
    double done = seconds();
    check(fl_image_close(image, &error), "close", &error);
    fl_image_free(image);
    printf("%.6f %.6f %.6f\n", opened - begin, done - opened, seconds() - done);
    return 0;
}
