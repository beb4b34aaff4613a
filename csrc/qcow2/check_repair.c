/* check_repair.c: refcounts and entries put right in place. See check.h.
 *
 * A crash in between makes nothing worse: refcounts are raised first, and durable before others are lowered; a cluster whose COPIED bit is
 * clear though its refcount is 1 is merely copied once too often.
 */
#define _GNU_SOURCE
#include "check.h"

#include <stdlib.h>

/* ---- refcounts ---- */

/* Write the refcounts of those clusters of a page that are in `mask`. */
static int write_group(struct checker *c, const struct page *page, uint64_t first, uint64_t mask)
{
    const struct header *h = c->header;
    unsigned char bytes[PAGE_CLUSTERS * 8];
    const size_t length = group_bytes(h);
    const uint64_t block = first >> block_bits(h), in_block = first & ((UINT64_C(1) << block_bits(h)) - 1);
    if (!block_at(c, block))
        return 0;
    const uint64_t offset = block_at(c, block) + in_block / PAGE_CLUSTERS * length;
    int rc = io_read_metadata(c->io, bytes, length, offset, c->error);
    for (unsigned i = 0; rc == 0 && i < PAGE_CLUSTERS; i++)
        if (mask >> i & 1)
            refcount_store(h, bytes, i, MIN((uint64_t)page->count[i], refcount_max(h)));
    return rc < 0 ? rc : io_write_metadata(c->io, bytes, length, offset, c->error);
}

static int raise_refcounts(struct checker *c)
{
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < c->pages.count; i++)
        if (page_at(c, i)->under)
            rc = write_group(c, page_at(c, i), c->pages.keys[i] * PAGE_CLUSTERS, page_at(c, i)->under);
    return rc < 0 ? rc : io_flush(c->io, c->error);
}

static int lower_block(struct checker *c, void *context, unsigned char *bytes, size_t length, uint64_t at)
{
    const uint64_t first = *(uint64_t *)context;
    const size_t group = group_bytes(c->header);
    uint64_t stored[PAGE_CLUSTERS];
    int changed = 0;
    for (size_t i = 0; i < length; i += group) {
        if (is_zero(bytes + i, group))
            continue;
        uint64_t cluster = first + (at + i) / group * PAGE_CLUSTERS;
        const struct page *page = find_page(c, cluster);
        refcounts_load(c->header, bytes + i, stored);
        for (unsigned j = 0; j < PAGE_CLUSTERS && cluster + j < c->clusters; j++) {
            uint64_t counted = page ? page->count[j] : 0;
            if (stored[j] > counted) {
                refcount_store(c->header, bytes + i, j, counted);
                changed = 1;
            }
        }
    }
    return changed;
}

static int lower_refcounts(struct checker *c)
{
    int rc = 0;
    for (uint64_t i = 0; rc >= 0 && i < c->block_count; i++) {
        uint64_t first = i << block_bits(c->header);
        if (block_at(c, i) && first < c->clusters)
            rc = visit_table(c, block_at(c, i), cluster_size(c), lower_block, &first);
    }
    return rc < 0 ? rc : io_flush(c->io, c->error);
}

int repair_refcounts(struct checker *c, bool leaks_only)
{
    int rc = leaks_only ? 0 : raise_refcounts(c);
    return rc < 0 || c->incomplete ? rc : lower_refcounts(c);
}

/* ---- entries ---- */

/* Is the refcount 1, now that the refcounts are repaired? -1: what the entry says is to stay. */
static int is_one_now(struct checker *c, uint64_t cluster, bool leaks_only)
{
    const struct page *page = find_page(c, cluster);
    uint64_t bit = UINT64_C(1) << cluster % PAGE_CLUSTERS;
    if (!page)
        return leaks_only ? -1 : 0;
    bool lowered = page->over & bit && !c->incomplete;
    if (leaks_only)
        return lowered ? page->count[cluster % PAGE_CLUSTERS] == 1 : -1;
    return page->over & bit && !lowered ? !!(page->one & bit) : page->count[cluster % PAGE_CLUSTERS] == 1;
}

static uint64_t with_copied(struct checker *c, uint64_t entry, bool leaks_only)
{
    int one = is_one_now(c, cluster_of(c, entry & OFFSET_MASK), leaks_only);
    return one < 0 ? entry : (entry & ~ENTRY_COPIED) | (one ? ENTRY_COPIED : 0);
}

struct repair { bool leaks_only, active; };

static uint64_t repaired_l2_entry(struct checker *c, const struct repair *r, uint64_t entry)
{
    const bool all = !r->leaks_only;
    const uint64_t offset = entry & OFFSET_MASK;
    switch (entry_type(entry)) {
    case ENTRY_IS_COMPRESSED:
        return all ? entry & ~ENTRY_COPIED : entry;
    case ENTRY_NONE:
    case ENTRY_ZERO_PLAIN:
        return all ? entry & ~L2_RESERVED : entry;
    case ENTRY_ZERO_ALLOCATED:
        if (all && c->header->version >= 3 && ((offset & (cluster_size(c) - 1)) || !within_file(c, offset, cluster_size(c))))
            return ENTRY_ZERO;                  /* reads the same */
        /* fall through */
    case ENTRY_DATA:
        if (all)
            entry &= ~L2_RESERVED;
        return r->active ? with_copied(c, entry, r->leaks_only) : entry;
    }
    return entry;
}

static int repair_l2(struct checker *c, void *context, unsigned char *bytes, size_t length, uint64_t at)
{
    const struct repair *r = context;
    int changed = 0;
    (void)at;
    for (size_t i = 0; i < length; i += 8) {
        uint64_t entry = load64(bytes + i), repaired = entry ? repaired_l2_entry(c, r, entry) : 0;
        if (repaired != entry) {
            store64(bytes + i, repaired);
            changed = 1;
        }
    }
    return changed;
}

static uint64_t with_new_place(struct checker *c, uint64_t entry)
{
    uint32_t number = map_find(&c->tables, entry & OFFSET_MASK);
    uint64_t moved = number == NOT_THERE ? 0 : table_at(c, number)->moved;
    return moved ? (entry & ~OFFSET_MASK) | moved : entry;
}

struct l1_repair { struct repair how; uint32_t entries; };

static int repair_l1(struct checker *c, void *context, unsigned char *bytes, size_t length, uint64_t at)
{
    const struct l1_repair *r = context;
    int changed = 0;
    for (size_t i = 0; i < length && (at + i) / 8 < r->entries; i += 8) {
        uint64_t entry = load64(bytes + i), repaired = entry;
        if (!r->how.leaks_only)
            repaired = entry & OFFSET_MASK ? entry & ~L1_RESERVED : 0;
        if (!r->how.leaks_only)
            repaired = with_new_place(c, repaired);
        if ((repaired & OFFSET_MASK) && r->how.active)
            repaired = with_copied(c, repaired, r->how.leaks_only);
        if (repaired != entry) {
            store64(bytes + i, repaired);
            changed = 1;
        }
    }
    return changed;
}

bool l1_is_alone(struct checker *c, uint64_t offset, uint32_t entries)
{
    if ((offset & (cluster_size(c) - 1)) || !within_file(c, offset, entries * UINT64_C(8)))
        return false;
    for (uint64_t i = 0; i < div_up(entries * UINT64_C(8), cluster_size(c)); i++)
        if (references(c, cluster_of(c, offset) + i) != 1)
            return false;
    return true;
}

/* A table is written only where nothing else is: what else is there may be somebody's data. */
static int repair_l1_table(struct checker *c, uint64_t offset, uint32_t entries, struct repair how)
{
    struct l1_repair r = { how, entries };
    if (entries == 0 || !l1_is_alone(c, offset, entries))
        return 0;
    return visit_table(c, offset, align_up(entries * UINT64_C(8), 512), repair_l1, &r);
}

int repair_entries(struct checker *c, bool leaks_only)
{
    const struct header *h = c->header;
    int rc = repair_l1_table(c, h->l1_offset, h->l1_size, (struct repair){ leaks_only, true });
    for (uint32_t i = 0; rc >= 0 && !leaks_only && i < c->snapshot_count; i++)
        rc = repair_l1_table(c, c->snapshots[i].offset, c->snapshots[i].entries, (struct repair){ false, false });
    for (uint32_t i = 0; rc >= 0 && i < c->tables.count; i++) {
        const struct table *table = table_at(c, i);
        struct repair how = { leaks_only, table->active > 0 };
        if (table->moved || l2_is_alone(c, i))
            rc = visit_table(c, table->moved ? table->moved : c->tables.keys[i], cluster_size(c), repair_l2, &how);
    }
    return rc < 0 ? rc : io_flush(c->io, c->error);
}
