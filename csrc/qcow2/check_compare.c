/* check_compare.c: the refcounts that the file has against the references that were counted; then, whether COPIED says what the refcounts
 * say. See check.h.
 */
#define _GNU_SOURCE
#include "check.h"

#include <inttypes.h>
#include <stdlib.h>

/* ---- refcounts as they are stored ---- */

void refcounts_load(const struct header *h, const unsigned char *bytes, uint64_t counts[PAGE_CLUSTERS])
{
    const unsigned order = h->refcount_order, width = 1u << order;
    for (unsigned i = 0; i < PAGE_CLUSTERS; i++) {
        uint64_t count = 0;
        if (order < 3)                          /* the first one is in the lowest bits */
            count = bytes[i * width / 8] >> i * width % 8 & ((1u << width) - 1);
        else
            for (unsigned j = 0; j < width / 8; j++)
                count = count << 8 | bytes[i * (width / 8) + j];
        counts[i] = count;
    }
}

void refcount_store(const struct header *h, unsigned char *bytes, unsigned i, uint64_t count)
{
    const unsigned order = h->refcount_order, width = 1u << order;
    if (order < 3) {
        unsigned shift = i * width % 8, mask = ((1u << width) - 1) << shift;
        bytes[i * width / 8] = (unsigned char)((bytes[i * width / 8] & ~mask) | (unsigned)count << shift);
    } else {
        for (unsigned j = width / 8; j-- > 0; count >>= 8)
            bytes[i * (width / 8) + j] = (unsigned char)count;
    }
}

/* ---- refcounts that are not 0 ---- */

static void compare_one(struct checker *c, struct page *page, uint64_t cluster, uint64_t stored)
{
    unsigned i = cluster % PAGE_CLUSTERS;
    uint64_t bit = UINT64_C(1) << i, host = cluster << c->header->cluster_bits;
    uint64_t counted = page ? MIN((uint64_t)page->count[i], refcount_max(c->header)) : 0;
    c->highest = MAX(c->highest, cluster + 1);
    if (page) {
        page->stored |= bit;
        page->one |= stored == 1 ? bit : 0;
        page->over |= stored > counted ? bit : 0;
        page->under |= stored < counted ? bit : 0;
    }
    if (stored > counted)
        found(c, FL_FOUND_LEAK, NOWHERE, host, "leaked: its refcount is %" PRIu64 ", with %" PRIu64 " references", stored, counted);
    else if (stored < counted)
        found(c, FL_FOUND_CORRUPTION, NOWHERE, host, "its refcount is %" PRIu64 ", with %" PRIu64 " references", stored, counted);
}

static int compare_block(struct checker *c, void *context, unsigned char *bytes, size_t length, uint64_t at)
{
    const uint64_t first = *(uint64_t *)context;        /* the cluster of the block's first refcount */
    const size_t group = group_bytes(c->header);
    uint64_t counts[PAGE_CLUSTERS];
    for (size_t i = 0; i < length; i += group) {
        if (is_zero(bytes + i, group))
            continue;
        uint64_t cluster = first + (at + i) / group * PAGE_CLUSTERS;
        if (cluster >= c->clusters)             /* beyond the end of the file they mean nothing */
            return 0;
        refcounts_load(c->header, bytes + i, counts);
        struct page *page = find_page(c, cluster);
        for (unsigned j = 0; j < PAGE_CLUSTERS && cluster + j < c->clusters; j++)
            if (counts[j])
                compare_one(c, page, cluster + j, counts[j]);
    }
    return 0;
}

/* ---- clusters with references and no refcount ---- */

static void compare_missing(struct checker *c, struct page *page, uint64_t first)
{
    const uint64_t block = first >> block_bits(c->header);
    for (unsigned i = 0; i < PAGE_CLUSTERS; i++) {
        uint64_t bit = UINT64_C(1) << i, host = (first + i) << c->header->cluster_bits;
        if (page->count[i] == 0)
            continue;
        c->highest = MAX(c->highest, first + i + 1);
        if (page->count[i] > refcount_max(c->header))
            found(c, FL_FOUND_CORRUPTION, NOWHERE, host, "%" PRIu32 " references are more than a refcount of %u bits holds", page->count[i],
                  1u << c->header->refcount_order);
        if ((page->stored & bit) || block_unknown(c, block))
            continue;
        page->under |= bit;
        c->rebuild |= !block_at(c, block);
        found(c, FL_FOUND_CORRUPTION, NOWHERE, host, "its refcount is 0, with %" PRIu32 " references%s", page->count[i],
              !block_at(c, block) ? "; it has no refcount block" : "");
    }
}

/* Metadata that is written in place whatever the refcounts say: nobody else may be there. What was told already is not told again. */
static bool find_overlap(struct checker *c, const char *what, uint64_t offset, uint64_t clusters)
{
    bool overlaps = false;
    for (uint64_t cluster = cluster_of(c, offset); clusters > 0; cluster++, clusters--) {
        struct page *page = find_page(c, cluster);
        uint64_t bit = UINT64_C(1) << cluster % PAGE_CLUSTERS;
        if (!page || page->count[cluster % PAGE_CLUSTERS] < 2)
            continue;
        overlaps = true;
        if (!((page->over | page->under) & bit))
            found(c, FL_FOUND_CORRUPTION, NOWHERE, cluster << c->header->cluster_bits, "%s: something else is there too", what);
    }
    return overlaps;
}

int compare_refcounts(struct checker *c)
{
    const struct header *h = c->header;
    uint32_t *sorted = NULL;
    int rc = 0;
    c->highest = 0;
    for (uint64_t i = 0; rc == 0 && i < c->block_count; i++) {
        uint64_t first = i << block_bits(h);
        if (block_at(c, i) && first < c->clusters)
            rc = visit_table(c, block_at(c, i), cluster_size(c), compare_block, &first);
    }
    if (rc == 0)
        rc = pages_sorted(c, &sorted);
    for (size_t i = 0; rc == 0 && i < c->pages.count; i++)
        compare_missing(c, page_at(c, sorted[i]), c->pages.keys[sorted[i]] * PAGE_CLUSTERS);
    free(sorted);
    if (rc == 0) {
        find_overlap(c, "header", 0, 1);
        c->move_l1 = find_overlap(c, "L1 table", h->l1_offset, div_up(h->l1_size * UINT64_C(8), cluster_size(c)));
        c->rebuild |= find_overlap(c, "refcount table", h->reftable_offset, h->reftable_clusters);
    }
    return rc;
}

/* ---- COPIED ---- */

/* 1: the refcount of the cluster is 1; 0: it is not; -1: nobody knows. */
static int refcount_is_one(struct checker *c, uint64_t cluster)
{
    uint64_t block = cluster >> block_bits(c->header);
    struct page *page = find_page(c, cluster);
    return block_unknown(c, block) ? -1 : page && (page->one >> cluster % PAGE_CLUSTERS & 1);
}

static void compare_copied(struct checker *c, uint64_t entry, uint64_t guest, const char *what)
{
    uint64_t offset = entry & OFFSET_MASK;
    int one = refcount_is_one(c, cluster_of(c, offset));
    if (one < 0 || (uint64_t)one == entry >> 63)
        return;
    found(c, FL_FOUND_CORRUPTION, guest, offset, "%s: its COPIED bit is %s, and its refcount is %s1", what, one ? "clear" : "set",
          one ? "" : "not ");
    c->entries_damaged = true;
}

static int check_l2_copied(struct checker *c, void *context, unsigned char *bytes, size_t length, uint64_t at)
{
    const uint64_t guest = *(uint64_t *)context;
    for (size_t i = 0; i < length; i += 8) {
        uint64_t entry = load64(bytes + i);
        enum entry_type type = entry_type(entry);
        if (type == ENTRY_DATA || type == ENTRY_ZERO_ALLOCATED)
            compare_copied(c, entry, guest + ((at + i) / 8 << c->header->cluster_bits), "data cluster");
    }
    return 0;
}

static int check_l1_copied(struct checker *c, void *context, unsigned char *bytes, size_t length, uint64_t at)
{
    const struct header *h = c->header;
    (void)context;
    for (size_t i = 0; i < length && (at + i) / 8 < h->l1_size; i += 8) {
        uint64_t entry = load64(bytes + i);
        if (entry & OFFSET_MASK)
            compare_copied(c, entry, (at + i) / 8 << (l2_bits(h) + h->cluster_bits), "L2 table");
    }
    return 0;
}

int check_copied(struct checker *c)
{
    const struct header *h = c->header;
    int rc = visit_table(c, h->l1_offset, align_up(h->l1_size * UINT64_C(8), 512), check_l1_copied, NULL);
    for (uint32_t i = 0; rc == 0 && i < c->tables.count; i++) {
        const struct table *table = table_at(c, i);
        uint64_t guest = (uint64_t)table->l1_index << (l2_bits(h) + h->cluster_bits);
        if (table->active)
            rc = visit_table(c, c->tables.keys[i], cluster_size(c), check_l2_copied, &guest);
    }
    return rc;
}
