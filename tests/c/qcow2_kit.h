/* qcow2_kit.h: what the tests of the qcow2 driver share: images of any version, cluster size and refcount width, and a model of their bytes. */
#ifndef QCOW2_KIT_H
#define QCOW2_KIT_H

#include <endian.h>

#include "image_kit.h"

static inline uint64_t least_of(uint64_t a, uint64_t b) { return a < b ? a : b; }

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

static inline fl_image_options qcow2_options(int flags)
{
    fl_image_options o = raw_options(flags);
    o.format = "qcow2";
    return o;
}

__attribute__((unused)) static fl_image *open_qcow2(const char *path, int flags, uint64_t cache_size)
{
    fl_image_options o = qcow2_options(flags);
    fl_image *image = NULL;
    o.cache_size = cache_size;
    MUST(fl_image_open(path, &o, &image, &why));
    return image;
}

/* Not even a leak is found, unless they are allowed. */
__attribute__((unused)) static void check_image(const char *path, int leaks_allowed)
{
    fl_image_options o = qcow2_options(READ_ONLY);
    fl_check *result = calloc(1, sizeof *result);
    CHECK(result);
    MUST(fl_image_check(path, &o, FL_REPAIR_NONE, result, &why));
    CHECK(result->corruptions == 0 && result->check_errors == 0 && (leaks_allowed || result->leaks == 0),
          "%s: %" PRIu64 " corruptions, %" PRIu64 " leaks, %" PRIu64 " errors: %s", path, result->corruptions, result->leaks, result->check_errors,
          result->finding_count ? result->findings[0].text : "");
    free(result);
}

/* One random operation on an image whose clusters have `m->unit` bytes, checked. Partial clusters keep their data when discarded. */
__attribute__((unused)) static void qcow2_step(struct model *m, int compresses)
{
    uint64_t longest = chance(&m->random, 10) ? m->size : chance(&m->random, 50) ? 5 * m->unit : m->unit;
    uint64_t offset = below(&m->random, m->size), count = 1 + below(&m->random, longest);
    if (chance(&m->random, 30))
        offset -= offset % m->unit;
    if (chance(&m->random, 30))
        count += m->unit - count % m->unit;
    if (chance(&m->random, 5) || count > m->size - offset)
        count = m->size - offset;
    unsigned char *buffer = m->scratch + (chance(&m->random, 50) ? 0 : below(&m->random, 4096));
    unsigned kind = (unsigned)below(&m->random, 100);
    if (kind < 30) {
        memset(buffer, 0xee, count);
        MUST(fl_image_pread(m->image, buffer, count, offset, &why));
        for (uint64_t i = 0; memcmp(buffer, m->bytes + offset, count) && i < count; i++)
            CHECK(buffer[i] == m->bytes[offset + i], "read of %" PRIu64 " at %" PRIu64 ": byte %" PRIu64 " is %02x, not %02x", count, offset, offset + i,
                  buffer[i], m->bytes[offset + i]);
    } else if (kind < 65) {
        uint64_t r = next_random(&m->random);
        for (uint64_t i = 0; i < count; i += 8, r = r * 0x9e3779b97f4a7c15u + 1)
            memcpy(buffer + i, &r, count - i < 8 ? count - i : 8);
        MUST(fl_image_pwrite(m->image, buffer, count, offset, &why));
        memcpy(m->bytes + offset, buffer, count);
    } else if (kind < 75) {
        MUST(fl_image_zero(m->image, count, offset, &why));
        memset(m->bytes + offset, 0, count);
    } else if (kind < 90) {
        uint64_t first = (offset + m->unit - 1) / m->unit * m->unit, end = offset + count;
        if (end != m->size)
            end -= end % m->unit;
        MUST(fl_image_discard(m->image, count, offset, &why));
        if (first < end)
            memset(m->bytes + first, 0, end - first);
    } else if (kind < 95 && compresses) {
        offset -= offset % m->unit;
        count = least_of(m->size - offset, m->unit * (1 + below(&m->random, 3)));
        for (uint64_t i = 0; i < count; i++)
            buffer[i] = (unsigned char)(chance(&m->random, 10) ? next_random(&m->random) : offset >> 9);
        MUST(fl_image_write_compressed(m->image, buffer, count, offset, &why));
        memcpy(m->bytes + offset, buffer, count);
    } else if (kind < 97) {
        MUST(fl_image_flush(m->image, &why));
    } else {
        fl_extent e[16];
        size_t found;
        MUST(fl_image_extents(m->image, offset, count, e, 16, &found, &why));
        CHECK(found > 0 && e[0].offset == offset);
        for (size_t i = 0; i < found; i++) {
            CHECK(i == 0 || (e[i].offset == e[i - 1].offset + e[i - 1].length && e[i].kind != e[i - 1].kind));
            for (uint64_t at = 0; e[i].kind == FL_ZERO && at < e[i].length; at++)
                CHECK(m->bytes[e[i].offset + at] == 0, "a zero extent at %" PRIu64 " has data", e[i].offset + at);
        }
    }
}

#endif
