/* codec.c: compressed clusters to bytes and back. zlib and zstd are the system's; a build without one of them (FL_HAVE_ZLIB, FL_HAVE_ZSTD:
 * see build_ffi.py) works for all images but those that need it.
 */
#define _GNU_SOURCE
#include "qcow2.h"

#ifdef FL_HAVE_ZLIB
#include <zlib.h>
#endif
#ifdef FL_HAVE_ZSTD
#include <zstd.h>
#include <zstd_errors.h>
#endif

const char *codec_name(enum compression compression)
{
    return compression == COMPRESSION_ZSTD ? "zstd" : "zlib";
}

bool codec_present(enum compression compression)
{
    switch (compression) {
#ifdef FL_HAVE_ZLIB
    case COMPRESSION_ZLIB:
        return true;
#endif
#ifdef FL_HAVE_ZSTD
    case COMPRESSION_ZSTD:
        return true;
#endif
    default:
        return false;
    }
}

int codec_require(enum compression compression, const char *name, fl_error *error)
{
    if (codec_present(compression))
        return 0;
    return fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%s' has clusters compressed with %s, which this build of the library does "
                "not have: install %s and build it anew", name, codec_name(compression),
                compression == COMPRESSION_ZSTD ? "libzstd-dev" : "zlib1g-dev");
}

/* ---- zlib: raw deflate streams; they are written with a window of 4 KiB, since that is what readers must have at least ---- */

#ifdef FL_HAVE_ZLIB
#define READ_WINDOW (-15)
#define WRITE_WINDOW (-12)

static int zlib_code(int rc)
{
    return rc == Z_MEM_ERROR ? -ENOMEM : -EIO;
}

static int zlib_inflate(const void *in, size_t in_length, void *out, size_t out_length)
{
    z_stream stream = { .next_in = (Bytef *)(uintptr_t)in, .avail_in = (uInt)in_length, .next_out = out, .avail_out = (uInt)out_length };
    int rc = inflateInit2(&stream, READ_WINDOW);
    if (rc != Z_OK)
        return zlib_code(rc);
    rc = inflate(&stream, Z_FINISH);
    /* Z_BUF_ERROR: the end of the stream was not reached, though all that is wanted may have come */
    bool complete = stream.avail_out == 0 && (rc == Z_STREAM_END || rc == Z_BUF_ERROR || rc == Z_OK);
    inflateEnd(&stream);
    return complete ? 0 : zlib_code(rc);
}

static ssize_t zlib_deflate(const void *in, size_t length, void *out, size_t max)
{
    z_stream stream = { .next_in = (Bytef *)(uintptr_t)in, .avail_in = (uInt)length, .next_out = out, .avail_out = (uInt)max };
    int rc = deflateInit2(&stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, WRITE_WINDOW, 9, Z_DEFAULT_STRATEGY);
    if (rc != Z_OK)
        return zlib_code(rc);
    rc = deflate(&stream, Z_FINISH);
    size_t used = max - stream.avail_out;
    deflateEnd(&stream);
    return rc == Z_STREAM_END ? (ssize_t)used : rc == Z_OK || rc == Z_BUF_ERROR ? -ENOSPC : -EIO;
}
#endif

/* ---- zstd: one frame; readers accept several ---- */

#ifdef FL_HAVE_ZSTD
#define ZSTD_LEVEL 3
#define MAX_WINDOW_LOG 23               /* 8 MiB: no cluster needs more than its own 2 MiB, and a frame may ask for 128 MiB of memory */

static int zstd_inflate(const void *in, size_t in_length, void *out, size_t out_length)
{
    ZSTD_DCtx *context = ZSTD_createDCtx();
    ZSTD_inBuffer input = { in, in_length, 0 };
    ZSTD_outBuffer output = { out, out_length, 0 };
    if (!context)
        return -ENOMEM;
    ZSTD_DCtx_setParameter(context, ZSTD_d_windowLogMax, MAX_WINDOW_LOG);
    while (output.pos < out_length) {
        size_t taken = input.pos, made = output.pos;
        size_t rc = ZSTD_decompressStream(context, &output, &input);
        if (ZSTD_isError(rc) || (input.pos == taken && output.pos == made))
            break;
    }
    ZSTD_freeDCtx(context);
    return output.pos == out_length ? 0 : -EIO;
}

static ssize_t zstd_deflate(const void *in, size_t length, void *out, size_t max)
{
    size_t n = ZSTD_compress(out, max, in, length, ZSTD_LEVEL);
    if (!ZSTD_isError(n))
        return (ssize_t)n;
    ZSTD_ErrorCode code = ZSTD_getErrorCode(n);
    return code == ZSTD_error_dstSize_tooSmall ? -ENOSPC : code == ZSTD_error_memory_allocation ? -ENOMEM : -EIO;
}
#endif

int codec_inflate(enum compression compression, const void *in, size_t in_length, void *out, size_t out_length)
{
    (void)in, (void)in_length, (void)out, (void)out_length;     /* in a build without codecs */
    switch (compression) {
#ifdef FL_HAVE_ZLIB
    case COMPRESSION_ZLIB:
        return zlib_inflate(in, in_length, out, out_length);
#endif
#ifdef FL_HAVE_ZSTD
    case COMPRESSION_ZSTD:
        return zstd_inflate(in, in_length, out, out_length);
#endif
    default:
        return -FL_EFORMAT;
    }
}

ssize_t codec_deflate(enum compression compression, const void *in, size_t length, void *out, size_t max)
{
    (void)in, (void)length, (void)out, (void)max;
    switch (compression) {
#ifdef FL_HAVE_ZLIB
    case COMPRESSION_ZLIB:
        return zlib_deflate(in, length, out, max);
#endif
#ifdef FL_HAVE_ZSTD
    case COMPRESSION_ZSTD:
        return zstd_deflate(in, length, out, max);
#endif
    default:
        return -FL_EFORMAT;
    }
}
