/* test_image_codec.c [DIR]: compressed clusters, both ways, with what a build has; damaged data is an error and nothing worse. In a build without a
 * codec (see build_ffi.py) it says which, and how to get it.
 */
#define _GNU_SOURCE
#include "check.h"
#include "qcow2/qcow2.h"

static const size_t sizes[] = { 512, 4096, 65536, 2 << 20 };
#define SIZES (sizeof sizes / sizeof *sizes)

static void fill_random(unsigned char *p, size_t length, uint64_t seed)
{
    for (size_t i = 0; i < length; i++)
        p[i] = (unsigned char)next_random(&seed);
}

static void fill_text(unsigned char *p, size_t length, uint64_t seed)
{
    for (size_t i = 0; i < length; i++)
        p[i] = (unsigned char)("a quick brown fox "[(i + (next_random(&seed) >> 62)) % 18]);
}

static void test_round_trip(enum compression codec, size_t size)
{
    unsigned char *data = malloc(size), *packed = malloc(size + 512), *back = malloc(size);
    CHECK(data && packed && back);
    fill_text(data, size, 1);
    ssize_t n = codec_deflate(codec, data, size, packed, size - 1);
    CHECK(n > 0 && (size_t)n < size, "%zd of %zu", n, size);
    memset(packed + n, 0xa5, 512);              /* the rest of the sector: anything */
    CHECK(codec_inflate(codec, packed, (size_t)n + 511, back, size) == 0);
    CHECK(!memcmp(data, back, size));
    CHECK(codec_inflate(codec, packed, (size_t)n, back, size) == 0, "without anything behind it");
    CHECK(codec_inflate(codec, packed, (size_t)n, back, size - 100) == 0 && !memcmp(data, back, size - 100), "not all of it is wanted");
    CHECK(codec_deflate(codec, data, size, packed, (size_t)n - 1) == -ENOSPC);
    CHECK(codec_deflate(codec, data, size, packed, 1) == -ENOSPC);
    fill_random(data, size, 2);
    CHECK(codec_deflate(codec, data, size, packed, size - 1) == -ENOSPC, "what does not get smaller");
    free(data);
    free(packed);
    free(back);
}

/* Too little is an error, and so is what is not compressed data at all; nothing behind the buffers is touched (the sanitizers look). */
static void test_damage(enum compression codec, size_t size)
{
    unsigned char *data = malloc(size), *packed = malloc(size), *back = malloc(size);
    CHECK(data && packed && back);
    fill_text(data, size, 3);
    ssize_t n = codec_deflate(codec, data, size, packed, size - 1);
    CHECK(n > 0);
    for (size_t length = 0; length + 8 < (size_t)n; length += MAX((size_t)n / 50, 1))
        CHECK(codec_inflate(codec, packed, length, back, size) == -EIO, "%zu of %zd bytes", length, n);
    unsigned char *exact = malloc((size_t)n);
    for (unsigned i = 0; i < 300; i++) {
        uint64_t state = i + 1;
        memcpy(exact, packed, (size_t)n);
        for (unsigned j = 0; j < 1 + i % 5; j++) {
            size_t at = next_random(&state) % (size_t)n;
            exact[at] = (unsigned char)(exact[at] ^ (1 + next_random(&state) % 255));
        }
        int rc = codec_inflate(codec, exact, (size_t)n, back, size);
        CHECK(rc == 0 || rc == -EIO, "%d", rc);
        fill_random(exact, (size_t)n, i);
        rc = codec_inflate(codec, exact, (size_t)n, back, size);
        CHECK(rc == 0 || rc == -EIO, "%d", rc);
    }
    memset(exact, 0, (size_t)n);
    CHECK(codec_inflate(codec, exact, (size_t)n, back, size) == -EIO);
    free(exact);
    free(data);
    free(packed);
    free(back);
}

/* A frame may ask for a window of 128 MiB and more; a cluster has 2 MiB at most. */
static void test_greedy_frame(void)
{
    static const unsigned char frame[] = { 0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x88 /* window: 2^27 */, 0x01, 0x00, 0x00 };
    unsigned char back[512];
    CHECK(codec_inflate(COMPRESSION_ZSTD, frame, sizeof frame, back, sizeof back) == -EIO);
}

static void test_absent(enum compression codec)
{
    unsigned char bytes[512] = { 0 };
    EXPECT(FL_EFORMAT, codec_require(codec, "vm.qcow2", &why));
    CHECK(strstr(why.text, "vm.qcow2") && strstr(why.text, codec_name(codec)) && strstr(why.text, "-dev"), "%s", why.text);
    CHECK(codec_inflate(codec, bytes, sizeof bytes, bytes, sizeof bytes) == -FL_EFORMAT);
    CHECK(codec_deflate(codec, bytes, sizeof bytes, bytes, sizeof bytes) == -FL_EFORMAT);
}

int main(void)
{
    for (enum compression codec = COMPRESSION_ZLIB; codec <= COMPRESSION_ZSTD; codec++) {
        printf("%s %s\n", codec_name(codec), codec_present(codec) ? "present" : "absent");
        if (!codec_present(codec)) {
            test_absent(codec);
            continue;
        }
        MUST(codec_require(codec, "vm.qcow2", &why));
        for (size_t i = 0; i < SIZES; i++)
            test_round_trip(codec, sizes[i]);
        test_damage(codec, 4096);
        test_damage(codec, 65536);
        if (codec == COMPRESSION_ZSTD)
            test_greedy_frame();
    }
    return 0;
}
