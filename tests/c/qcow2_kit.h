/* qcow2_kit.h: what the tests of the qcow2 driver share: images of any version, cluster size and refcount width, and a model of their bytes. */
#ifndef QCOW2_KIT_H
#define QCOW2_KIT_H

#include "image_kit.h"
#include "qcow2_make.h"

static inline uint64_t least_of(uint64_t a, uint64_t b) { return a < b ? a : b; }

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
        memset(buffer, (int)(offset >> 9), count);
        for (uint64_t i = 0; i < count; i += 1 + below(&m->random, 40))       /* so that it does not get very small */
            buffer[i] = (unsigned char)i;
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
            const unsigned char *bytes = m->bytes + e[i].offset;
            CHECK(e[i].kind != FL_ZERO || (bytes[0] == 0 && !memcmp(bytes, bytes + 1, e[i].length - 1)), "the zero extent at %" PRIu64 " has data",
                  e[i].offset);
        }
    }
}

#endif
