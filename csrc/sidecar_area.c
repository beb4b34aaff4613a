/* sidecar_area.c: the bits of one bitmap in the file, read and written with system calls.
 *
 * An area is laid out as struct bitmap lays out its memory (bitmap.h), so that it can be mapped and used as one: first a byte for each page of
 * 32768 bits (0: none of them was ever set, and what is in its place does not count; 1: they are in its place; 2: all of them are set), then, from a
 * multiple of 4096 on, the pages.
 */
#define _GNU_SOURCE
#include "sidecar_format.h"

#include <stdlib.h>
#include <unistd.h>

#define PAGE_BYTES 4096u

int write_whole(int fd, const void *data, size_t length, uint64_t at)
{
    const char *p = data;
    while (length) {
        ssize_t n = pwrite(fd, p, length, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        p += n;
        length -= (size_t)n;
        at += (uint64_t)n;
    }
    return 0;
}

int read_whole(int fd, void *data, size_t length, uint64_t at)
{
    char *p = data;
    while (length) {
        ssize_t n = pread(fd, p, length, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -ENODATA;
        p += n;
        length -= (size_t)n;
        at += (uint64_t)n;
    }
    return 0;
}

static const unsigned char zeros[PAGE_BYTES];

int area_clear(int fd, uint64_t at, uint64_t bits)
{
    int rc = 0;
    for (uint64_t done = 0; done < bitmap_words_at(bits) && rc == 0; done += PAGE_BYTES)
        rc = write_whole(fd, zeros, PAGE_BYTES, at + done);
    return rc;
}

int area_touch(int fd, uint64_t at, uint64_t bits, uint64_t page)
{
    return write_whole(fd, zeros, PAGE_BYTES, at + bitmap_words_at(bits) + page * PAGE_BYTES);
}

/* Words are little-endian in the file. The mapping is used as it is: this is for processors that are so as well. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files of dirty bitmaps are little-endian");

/* One page of bits: clear what is behind the end of the bitmap. */
static void cut_off(uint64_t *words, uint64_t page, uint64_t bits)
{
    uint64_t first = page << BITMAP_PAGE_SHIFT;
    for (uint64_t word = 0; word < PAGE_BYTES / 8; word++)
        if (first + word * 64 + 64 > bits)
            words[word] &= first + word * 64 >= bits ? 0 : UINT64_MAX >> (first + word * 64 + 64 - bits);
}

static void set_words(struct bitmap *into, const uint64_t *words, uint64_t page)
{
    for (uint64_t word = 0; word < PAGE_BYTES / 8; word++)
        if (words[word])
            bitmap_fetch_or(into, page * (PAGE_BYTES / 8) + word, words[word]);
}

int area_read(int fd, uint64_t at, uint64_t bits, struct bitmap *into, uint32_t *out)
{
    const uint64_t pages = bitmap_pages(bits), words_at = at + bitmap_words_at(bits);
    unsigned char states[PAGE_BYTES];
    uint64_t words[PAGE_BYTES / 8];
    uint32_t crc = 0;
    for (uint64_t page = 0; page < pages; page++) {
        int rc = page % PAGE_BYTES ? 0 : read_whole(fd, states, sizeof states, at + page);
        unsigned char state = states[page % PAGE_BYTES];
        if (rc == 0 && state > PAGE_ONES)
            rc = -EBADMSG;
        if (rc == 0 && state == PAGE_MIXED) {
            rc = read_whole(fd, words, sizeof words, words_at + page * PAGE_BYTES);
            cut_off(words, page, bits);
        }
        if (rc)
            return rc;
        if (state == PAGE_UNTOUCHED)
            continue;
        crc = sidecar_crc(crc, &page, sizeof page);
        crc = sidecar_crc(crc, &state, 1);
        if (state == PAGE_MIXED)
            crc = sidecar_crc(crc, words, sizeof words);
        if (into && state == PAGE_MIXED)
            set_words(into, words, page);
        else if (into)
            bitmap_set(into, page << BITMAP_PAGE_SHIFT, MIN(bits - (page << BITMAP_PAGE_SHIFT), UINT64_C(1) << BITMAP_PAGE_SHIFT));
    }
    *out = crc;
    return 0;
}

int area_write(int fd, uint64_t at, const struct bitmap *bitmap)
{
    const uint64_t pages = bitmap_pages(bitmap->bits), words_at = at + bitmap_words_at(bitmap->bits);
    uint64_t words[PAGE_BYTES / 8];
    int rc = area_clear(fd, at, bitmap->bits);
    for (uint64_t page = 0; page < pages && rc == 0; page++) {
        unsigned char state = atomic_load(&bitmap->pages[page]);
        if (state == PAGE_UNTOUCHED)
            continue;
        if (state == PAGE_MIXED) {
            for (uint64_t word = 0; word < PAGE_BYTES / 8; word++)
                words[word] = atomic_load(&bitmap->words[page * (PAGE_BYTES / 8) + word]);
            rc = write_whole(fd, words, sizeof words, words_at + page * PAGE_BYTES);
        }
        if (rc == 0)
            rc = write_whole(fd, &state, 1, at + page);
    }
    return rc;
}
