/* bitmap.h: bitmaps of any size that cost nothing until bits are set.
 *
 * Bits live in lazily mapped memory; beside them one byte a page of 32768 bits says whether the page was ever touched, or is all ones. So
 * making one is O(1), scans skip what was never touched, and setting a range as long as the disk writes a byte a page.
 *
 * All functions but init and destroy may run at the same time. Bits are set in sequentially consistent order, and are read with acquire loads:
 * what was written before a bit was set is seen by whoever sees the bit. An acquire load may be done before an earlier store of the same thread: who sets
 * one bit and then looks at another, or at data, needs a full_fence() in between.
 */
#ifndef FL_BITMAP_H
#define FL_BITMAP_H

#include "util/util.h"

struct bitmap {
    uint64_t bits;              /* fixed */
    _Atomic uint64_t *words;
    _Atomic unsigned char *pages;
    size_t mapped;              /* bytes of the mapping that holds both; 0: it is somebody else's */
};

#define BITMAP_PAGE_SHIFT 15    /* bits in a page: 32768, 4 KiB of memory */
enum { PAGE_UNTOUCHED, PAGE_MIXED, PAGE_ONES };

int bitmap_init(struct bitmap *bitmap, uint64_t bits);  /* all zeros; -ENOMEM */
/* The same in memory that is somebody else's: bitmap_memory(bits) bytes, on a page boundary, which hold zeros or what a bitmap left there. */
void bitmap_over(struct bitmap *bitmap, uint64_t bits, void *memory);
size_t bitmap_memory(uint64_t bits);
size_t bitmap_words_at(uint64_t bits);                  /* where in that memory the bits begin; the pages' bytes are at its start */
void bitmap_destroy(struct bitmap *bitmap);             /* one that is all zero bytes: nothing */

void bitmap_set(struct bitmap *bitmap, uint64_t first, uint64_t count);
/* Set `mask` in word `word` (bit i of it is bit 64 * word + i); returns the word as it was. */
uint64_t bitmap_fetch_or(struct bitmap *bitmap, uint64_t word, uint64_t mask);
/* Only for bitmaps whose bits are all set by bitmap_fetch_or, or in ranges shorter than a page (which never become "ones"). */
void bitmap_clear(struct bitmap *bitmap, uint64_t first, uint64_t count);

static inline uint64_t bitmap_pages(uint64_t bits) { return div_up(MAX(bits, 1), UINT64_C(1) << BITMAP_PAGE_SHIFT); }

/* The first set (clear) bit in [from, end), else end. */
uint64_t bitmap_next_set(const struct bitmap *bitmap, uint64_t from, uint64_t end);
uint64_t bitmap_next_clear(const struct bitmap *bitmap, uint64_t from, uint64_t end);
/* Where the run of bits that are like bit `from` ends (at most `end`, which is behind `from`), and whether they are set. Never empty, although others set
   bits meanwhile: a bit is looked at once. Who tests a bit and then asks where the next other one is may be told that it is this one. */
uint64_t bitmap_run(const struct bitmap *bitmap, uint64_t from, uint64_t end, bool *set);
uint64_t bitmap_count(const struct bitmap *bitmap);
/* Set in `to` all that is set in `from`; both have the same number of bits. */
void bitmap_merge(struct bitmap *to, const struct bitmap *from);

/* Word `word` of the bitmap. */
static inline uint64_t bitmap_word(const struct bitmap *bitmap, uint64_t word)
{
    unsigned char page = atomic_load_explicit(&bitmap->pages[word >> (BITMAP_PAGE_SHIFT - 6)], memory_order_acquire);
    if (page != PAGE_MIXED)
        return page == PAGE_ONES ? UINT64_MAX : 0;
    return atomic_load_explicit(&bitmap->words[word], memory_order_acquire);
}

static inline bool bitmap_test(const struct bitmap *bitmap, uint64_t bit)
{
    return bitmap_word(bitmap, bit >> 6) >> (bit & 63) & 1;
}

/* The bits of word `word` that lie in [first, end). */
static inline uint64_t word_mask(uint64_t word, uint64_t first, uint64_t end)
{
    uint64_t low = word * 64, mask = UINT64_MAX;
    if (first > low)
        mask &= UINT64_MAX << (first - low);
    if (end < low + 64)
        mask &= UINT64_MAX >> (low + 64 - end);
    return mask;
}

#endif
