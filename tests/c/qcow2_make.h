/* qcow2_make.h: qcow2 images of any version, cluster size and refcount width; and the check that must find nothing in them afterwards. */
#ifndef QCOW2_MAKE_H
#define QCOW2_MAKE_H

#include <fcntl.h>

#include "check.h"

struct shape {
    unsigned version, cluster_bits, refcount_order;
    uint64_t size;
    const char *backing;                /* a raw file in the same directory; version 3 or 2 */
};

static void put(unsigned char *at, uint64_t value, unsigned bytes)
{
    for (unsigned i = bytes; i-- > 0; value >>= 8)
        at[i] = (unsigned char)value;
}

/* An empty image: header, refcount table, one refcount block, L1 table, each where the one before ends. By hand, as our own create makes one shape only. */
__attribute__((unused)) static void make_image(const char *path, const struct shape *s)
{
    uint64_t cluster = 1ull << s->cluster_bits, l2 = cluster / 8, entries = (s->size + cluster * l2 - 1) / (cluster * l2);
    uint64_t l1_clusters = (entries * 8 + cluster - 1) / cluster, used = 3 + l1_clusters;
    unsigned char *file = calloc(used, cluster), *block = file + 2 * cluster;
    CHECK(file && used <= (cluster * 8) >> s->refcount_order, "the image needs more than one refcount block");
    memcpy(file, "QFI\xfb", 4);
    put(file + 4, s->version, 4);
    put(file + 20, s->cluster_bits, 4);
    put(file + 24, s->size, 8);
    put(file + 36, entries, 4);
    put(file + 40, 3 * cluster, 8);
    put(file + 48, cluster, 8);
    put(file + 56, 1, 4);
    unsigned extensions = s->version == 2 ? 72 : 104;
    if (s->version == 3) {
        put(file + 96, s->refcount_order, 4);
        put(file + 100, 104, 4);
    }
    if (s->backing) {
        put(file + extensions, 0xe2792acau, 4);
        put(file + extensions + 4, 3, 4);
        memcpy(file + extensions + 8, "raw", 3);
        put(file + 8, extensions + 24, 8);
        put(file + 16, strlen(s->backing), 4);
        memcpy(file + extensions + 24, s->backing, strlen(s->backing));
    }
    put(file + cluster, 2 * cluster, 8);
    for (uint64_t i = 0; i < used; i++) {
        if (s->refcount_order < 3)
            block[(i << s->refcount_order) / 8] |= (unsigned char)(1u << ((i << s->refcount_order) & 7));
        else
            block[((i + 1) << (s->refcount_order - 3)) - 1] = 1;
    }
    int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0666);
    CHECK(fd >= 0 && write(fd, file, used * cluster) == (ssize_t)(used * cluster), "%s", path);
    close(fd);
    free(file);
}

/* Not even a leak is found, unless they are allowed. */
__attribute__((unused)) static void check_image_that(const char *path, int leaks_allowed, int may_be_open)
{
    fl_image_options o = { .format = "qcow2", .share = may_be_open };
    fl_check *result = calloc(1, sizeof *result);
    CHECK(result);
    MUST(fl_image_check(path, &o, FL_REPAIR_NONE, result, &why));
    CHECK(result->corruptions == 0 && result->check_errors == 0 && (leaks_allowed || result->leaks == 0),
          "%s: %" PRIu64 " corruptions, %" PRIu64 " leaks, %" PRIu64 " errors: %s", path, result->corruptions, result->leaks, result->check_errors,
          result->finding_count ? result->findings[0].text : "");
    free(result);
}

static inline void check_image(const char *path, int leaks_allowed) { check_image_that(path, leaks_allowed, 0); }

#endif
