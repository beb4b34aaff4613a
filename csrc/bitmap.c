/* bitmap.c: see bitmap.h.
 *
 * A page byte goes from untouched to mixed before the first bit of its page is set, so a scan that finds it untouched has read the bits as
 * they were a moment ago. It goes to "ones" when a range that covers the page is set, and never leaves that.
 */
#define _GNU_SOURCE
#include "bitmap.h"

#include <sys/mman.h>

#define PAGE_BITS (UINT64_C(1) << BITMAP_PAGE_SHIFT)

size_t bitmap_words_at(uint64_t bits) { return align_up(bitmap_pages(bits), 4096); }

size_t bitmap_memory(uint64_t bits) { return bitmap_words_at(bits) + bitmap_pages(bits) * (PAGE_BITS / 8); }

void bitmap_over(struct bitmap *bitmap, uint64_t bits, void *memory)
{
    bitmap->bits = bits;
    bitmap->pages = memory;
    bitmap->words = (_Atomic uint64_t *)((char *)memory + bitmap_words_at(bits));
    bitmap->mapped = 0;
}

int bitmap_init(struct bitmap *bitmap, uint64_t bits)
{
    size_t mapped = bitmap_memory(bits);
    unsigned char *memory = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return -ENOMEM;
    madvise(memory, mapped, MADV_NOHUGEPAGE);       /* a bit must cost 4 KiB at most, not 2 MiB */
    bitmap_over(bitmap, bits, memory);
    bitmap->mapped = mapped;
    return 0;
}

void bitmap_destroy(struct bitmap *bitmap)
{
    if (bitmap->mapped)
        munmap((void *)bitmap->pages, bitmap->mapped);
    memset(bitmap, 0, sizeof *bitmap);
}

uint64_t bitmap_fetch_or(struct bitmap *bitmap, uint64_t word, uint64_t mask)
{
    _Atomic unsigned char *page = &bitmap->pages[word >> (BITMAP_PAGE_SHIFT - 6)];
    unsigned char state = atomic_load_explicit(page, memory_order_acquire);
    /* The page's byte, then the bit: each is a release, so whoever sees the bit finds the page touched. "Ones" is never taken back: the exchange fails. */
    if (UNLIKELY(state == PAGE_UNTOUCHED) && atomic_compare_exchange_strong(page, &state, PAGE_MIXED))
        state = PAGE_MIXED;
    if (state == PAGE_ONES)
        return UINT64_MAX;
    return atomic_fetch_or(&bitmap->words[word], mask);
}

void bitmap_set(struct bitmap *bitmap, uint64_t first, uint64_t count)
{
    uint64_t end = first + count;
    bool tail_counts = count >= PAGE_BITS && end == bitmap->bits;       /* a page cut off by the bitmap's end is covered whole, too */
    while (first < end) {
        uint64_t next = MIN(end, (first | 63) + 1);
        if (first % PAGE_BITS == 0 && (end - first >= PAGE_BITS || tail_counts)) {
            atomic_store(&bitmap->pages[first / PAGE_BITS], PAGE_ONES);
            next = MIN(end, first + PAGE_BITS);
        } else {
            uint64_t word = first >> 6, mask = word_mask(word, first, next);
            /* Keep the cache line shared where nothing changes. What another thread set and we saw counts as set by us, for whoever we pass it on to. */
            if ((bitmap_word(bitmap, word) & mask) != mask)
                bitmap_fetch_or(bitmap, word, mask);
        }
        first = next;
    }
}

void bitmap_clear(struct bitmap *bitmap, uint64_t first, uint64_t count)
{
    uint64_t end = first + count;
    while (first < end) {
        uint64_t next = MIN(end, (first | 63) + 1), word = first >> 6;
        atomic_fetch_and(&bitmap->words[word], ~word_mask(word, first, next));
        first = next;
    }
}

/* The first bit in [from, end) that differs from `skip`, else end. */
static uint64_t next_other(const struct bitmap *bitmap, uint64_t from, uint64_t end, bool skip)
{
    const unsigned char skipped = skip ? PAGE_ONES : PAGE_UNTOUCHED;
    const uint64_t flip = skip ? UINT64_MAX : 0;
    while (from < end) {
        if (atomic_load_explicit(&bitmap->pages[from / PAGE_BITS], memory_order_acquire) == skipped) {
            from = (from | (PAGE_BITS - 1)) + 1;
            continue;
        }
        uint64_t word = from >> 6;
        uint64_t found = (bitmap_word(bitmap, word) ^ flip) & word_mask(word, from, end);
        if (found)
            return word * 64 + (unsigned)__builtin_ctzll(found);
        from = (from | 63) + 1;
    }
    return end;
}

uint64_t bitmap_next_set(const struct bitmap *bitmap, uint64_t from, uint64_t end)
{
    return next_other(bitmap, from, end, false);
}

uint64_t bitmap_next_clear(const struct bitmap *bitmap, uint64_t from, uint64_t end)
{
    return next_other(bitmap, from, end, true);
}

uint64_t bitmap_run(const struct bitmap *bitmap, uint64_t from, uint64_t end, bool *set)
{
    uint64_t next = bitmap_next_set(bitmap, from, end);
    *set = next == from;
    return *set ? bitmap_next_clear(bitmap, from + 1, end) : next;
}

uint64_t bitmap_count(const struct bitmap *bitmap)
{
    uint64_t count = 0, bit = 0;
    while ((bit = bitmap_next_set(bitmap, bit, bitmap->bits)) < bitmap->bits) {
        uint64_t word = bit >> 6;
        if (bit % PAGE_BITS == 0 && atomic_load_explicit(&bitmap->pages[bit / PAGE_BITS], memory_order_acquire) == PAGE_ONES) {
            count += MIN(PAGE_BITS, bitmap->bits - bit);
            bit += PAGE_BITS;
            continue;
        }
        count += (unsigned)__builtin_popcountll(bitmap_word(bitmap, word) & word_mask(word, bit, bitmap->bits));
        bit = (bit | 63) + 1;
    }
    return count;
}

void bitmap_merge(struct bitmap *to, const struct bitmap *from)
{
    uint64_t bit = 0, end;
    while ((bit = bitmap_next_set(from, bit, from->bits)) < from->bits) {
        end = bitmap_next_clear(from, bit, from->bits);
        bitmap_set(to, bit, end - bit);
        bit = end;
    }
}
