/* image_kit.h: what the tests of images share: a directory to work in, images opened in one line, loop devices, a model of the bytes. */
#ifndef IMAGE_KIT_H
#define IMAGE_KIT_H

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "check.h"

#define ODD_SIZE ((1u << 20) + 513)     /* a multiple of nothing */

static const char *directory;

/* DIR/name, in one of a few buffers in turn. */
__attribute__((unused)) static const char *in_directory(const char *name)
{
    static _Thread_local char text[8][512];
    static _Thread_local unsigned next;
    char *p = text[next++ % 8];
    snprintf(p, sizeof text[0], "%s/%s", directory, name);
    return p;
}

enum { READ_ONLY = 0, WRITABLE = 1, DIRECT = 2, SHARE = 4 };

static inline fl_image_options raw_options(int flags)
{
    return (fl_image_options){
        .format = "raw", .writable = !!(flags & WRITABLE), .direct = !!(flags & DIRECT), .share = !!(flags & SHARE),
    };
}

__attribute__((unused)) static int try_open(const char *path, int flags, fl_image **image)
{
    fl_image_options options = raw_options(flags);
    return fl_image_open(path, &options, image, &why);
}

__attribute__((unused)) static fl_image *must_open(const char *path, int flags)
{
    fl_image *image = NULL;
    MUST(try_open(path, flags, &image));
    return image;
}

__attribute__((unused)) static fl_image *must_create(const char *path, uint64_t size, int flags)
{
    fl_image_options options = raw_options(flags);
    fl_image *image = NULL;
    unlink(path);
    MUST(fl_image_create(path, size, &options, &image, &why));
    return image;
}

static inline fl_image_info info_of(fl_image *image)
{
    fl_image_info info;
    MUST(fl_image_info_get(image, &info, &why));
    return info;
}

/* Run a shell command made by a format; its exit status, output thrown away. */
__attribute__((format(printf, 1, 2), unused)) static int shell(const char *format, ...)
{
    char command[1024];
    va_list args;
    va_start(args, format);
    strcpy(command, "{ ");
    vsnprintf(command + 2, sizeof command - 30, format, args);
    va_end(args);
    strcat(command, "; } >/dev/null 2>&1");
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* A loop device over a file, named in `device`; options are losetup's. It goes when the returned descriptor (and all others of it) are
   closed, however this program ends. -1: there are none here. */
__attribute__((unused)) static int loop_device(const char *file, const char *options, char *device, size_t size)
{
    char command[1024];
    snprintf(command, sizeof command, "losetup -f --show %s '%s' 2>/dev/null", options, file);
    FILE *p = popen(command, "r");
    CHECK(p);
    char *line = fgets(device, (int)size, p);
    if (pclose(p) != 0 || !line)
        return -1;
    device[strcspn(device, "\n")] = 0;
    int fd = open(device, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0, "%s: %s", device, strerror(errno));
    CHECK(shell("losetup -d %s", device) == 0);         /* put off until the last close */
    return fd;
}

/* ---- a model of the bytes ---- */

struct model {
    fl_image *image;
    unsigned char *bytes, *scratch;     /* scratch has room for the image and a page, so that buffers can be anywhere */
    uint64_t size, random;
    uint64_t unit;                      /* offsets and lengths are often multiples of it */
    int discards_zero;                  /* discarded ranges read as zeros */
};

__attribute__((unused)) static void model_init(struct model *m, fl_image *image, uint64_t seed)
{
    memset(m, 0, sizeof *m);
    m->image = image;
    m->size = info_of(image).size;
    m->bytes = calloc(1, m->size);
    m->scratch = aligned_alloc(4096, (m->size + 3 * 4096) & ~4095ull);
    m->random = seed;
    m->unit = 512;
    m->discards_zero = 1;
    CHECK(m->bytes && m->scratch);
}

__attribute__((unused)) static void model_free(struct model *m)
{
    free(m->bytes);
    free(m->scratch);
}

__attribute__((unused)) static void model_check_all(struct model *m)
{
    MUST(fl_image_pread(m->image, m->scratch + 1, m->size, 0, &why));
    for (uint64_t i = 0; i < m->size && memcmp(m->scratch + 1, m->bytes, m->size); i++)
        CHECK(m->scratch[1 + i] == m->bytes[i], "byte %" PRIu64 " is %02x, should be %02x", i, m->scratch[1 + i], m->bytes[i]);
}

/* One random operation, checked. */
__attribute__((unused)) static void model_step(struct model *m)
{
    uint64_t longest = chance(&m->random, 20) ? m->size : chance(&m->random, 50) ? 20000 : 600;
    uint64_t offset = below(&m->random, m->size), count = 1 + below(&m->random, longest);
    if (chance(&m->random, 40))
        offset -= offset % m->unit;
    if (chance(&m->random, 40))
        count += m->unit - count % m->unit;
    if (chance(&m->random, 10) || count > m->size - offset)
        count = m->size - offset;                       /* up to the very end */
    unsigned char *buffer = m->scratch + (chance(&m->random, 50) ? 0 : below(&m->random, 4096));
    unsigned kind = (unsigned)below(&m->random, 10);
    if (kind < 4) {
        memset(buffer, 0xee, count);
        MUST(fl_image_pread(m->image, buffer, count, offset, &why));
        CHECK(!memcmp(buffer, m->bytes + offset, count), "%" PRIu64 " bytes at %" PRIu64, count, offset);
    } else if (kind < 8) {
        for (uint64_t i = 0; i < count; i += 8) {
            uint64_t r = next_random(&m->random);
            memcpy(buffer + i, &r, count - i < 8 ? count - i : 8);
        }
        MUST(fl_image_pwrite(m->image, buffer, count, offset, &why));
        memcpy(m->bytes + offset, buffer, count);
    } else if (kind == 8 || !m->discards_zero) {
        MUST(fl_image_zero(m->image, count, offset, &why));
        memset(m->bytes + offset, 0, count);
    } else {
        MUST(fl_image_discard(m->image, count, offset, &why));
        memset(m->bytes + offset, 0, count);
    }
}

#endif
