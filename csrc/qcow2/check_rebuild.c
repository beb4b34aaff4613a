/* check_rebuild.c: new refcount structures in new space, and new L1 and L2 tables where something else is in their clusters. See check.h.
 *
 * Nothing that the image refers to is changed until all that is new is durable; then one write of the header's fixed fields turns to it,
 * and the old structures are free space. A crash before that leaves the image as it was, and some clusters behind its end. L1 entries turn
 * to L2 tables that were moved after that, in repair_entries.
 */
#define _GNU_SOURCE
#include "check.h"

#include <inttypes.h>
#include <stdlib.h>

struct plan {
    uint64_t *needed;                           /* indices of blocks that must be, by the references that there are; in order */
    size_t needed_count;
    uint64_t start, clusters;                   /* the new area: first the table, then the blocks, then the L1 table, then L2 tables */
    uint64_t table_clusters, blocks, l1_clusters, l2_clusters;
};

/* ---- what is there, without what is to be replaced ---- */

/* As it was counted: what is inside of the file. */
static void forget_table(struct checker *c, uint64_t offset, uint64_t length)
{
    if (within_file(c, offset, length))
        refs_remove(c, offset, length);
    else if (offset < c->length)
        refs_remove(c, offset, c->length - offset);
}

static void forget_old(struct checker *c)
{
    const struct header *h = c->header;
    forget_table(c, h->reftable_offset, reftable_bytes(c));
    for (uint64_t i = 0; i < c->block_count; i++)
        if (c->blocks[i] & ~BLOCK_UNKNOWN)
            refs_remove(c, c->blocks[i] & ~BLOCK_UNKNOWN, cluster_size(c));
    if (c->move_l1)
        forget_table(c, h->l1_offset, h->l1_size * UINT64_C(8));
}

/* Which L2 tables are to be moved, and how many. */
static uint64_t choose_l2_tables(struct checker *c)
{
    uint64_t n = 0;
    for (uint32_t i = 0; c->move_l2 && i < c->tables.count; i++) {
        if (l2_is_alone(c, i))
            continue;
        table_at(c, i)->moved = 1;              /* where to: later */
        n++;
    }
    for (uint32_t i = 0; n > 0 && i < c->tables.count; i++)
        for (uint32_t j = table_at(c, i)->moved ? table_at(c, i)->total : 0; j > 0; j--)
            refs_remove(c, c->tables.keys[i], cluster_size(c));
    return n;
}

/* The blocks for all clusters that have references. */
static int list_needed(struct checker *c, uint64_t **list, size_t *list_count)
{
    uint32_t *sorted;
    int rc = pages_sorted(c, &sorted);
    if (rc < 0)
        return rc;
    uint64_t *blocks = malloc(MAX(c->pages.count, (size_t)1) * sizeof *blocks);
    size_t n = 0;
    for (size_t i = 0; blocks && i < c->pages.count; i++) {
        const struct page *page = page_at(c, sorted[i]);
        uint64_t block = c->pages.keys[sorted[i]] * PAGE_CLUSTERS >> block_bits(c->header);
        if (!is_zero(page->count, sizeof page->count) && (n == 0 || blocks[n - 1] != block))
            blocks[n++] = block;
    }
    free(sorted);
    if (!blocks)
        return no_memory(c);
    *list = blocks;
    *list_count = n;
    return 0;
}

/* ---- where the new is put ---- */

static uint64_t largest_offset(const struct checker *c)
{
    return c->io->device ? c->io->size : OFFSET_MASK;
}

static uint64_t area(const struct plan *p)
{
    return p->table_clusters + p->blocks + p->l1_clusters + p->l2_clusters;
}

/* Entries that lead beyond the end of the file must not lead into what is put there. */
static bool meets_dangling(const struct checker *c, uint64_t start, uint64_t clusters)
{
    return c->dangling_first != NOWHERE && start <= cluster_of(c, c->dangling_end - 1) &&
           start + clusters > cluster_of(c, c->dangling_first);
}

/* Can it begin at this cluster? The area holds blocks for itself too, so it grows until it fits. */
static bool fits(const struct checker *c, struct plan *p, uint64_t start)
{
    const struct header *h = c->header;
    const uint64_t limit = largest_offset(c) >> h->cluster_bits;
    p->start = start;
    p->clusters = 1;
    for (;;) {
        uint64_t first = start >> block_bits(h), last = (start + p->clusters - 1) >> block_bits(h), wanted = last - first + 1;
        for (size_t i = 0; i < p->needed_count; i++)
            wanted += p->needed[i] < first || p->needed[i] > last;
        if (p->needed_count)
            last = MAX(last, p->needed[p->needed_count - 1]);
        p->blocks = wanted;
        p->table_clusters = div_up((last + 1) * 8, cluster_size(c));
        if (last >= MAX_REFTABLE_BYTES / 8 || start >= limit || area(p) > limit - start ||
            p->table_clusters << h->cluster_bits > MAX_REFTABLE_BYTES)
            return false;
        if (area(p) == p->clusters)
            return !meets_dangling(c, start, p->clusters);
        p->clusters = area(p);
    }
}

/* Behind the end of the file, where nothing is; else (a device, or a file so long that the table would not reach) behind the last cluster
   in use; else behind where entries lead that should not. */
static int choose_place(struct checker *c, struct plan *p)
{
    uint64_t end = div_up(c->length, cluster_size(c));
    if (fits(c, p, MAX(end, c->highest)) || fits(c, p, c->highest) || fits(c, p, MAX(end, div_up(c->dangling_end, cluster_size(c)))))
        return 0;
    c->no_place = true;
    return 1;
}

/* ---- writing ---- */

static int prepare_space(struct checker *c, const struct plan *p)
{
    const unsigned bits = c->header->cluster_bits;
    uint64_t start = p->start << bits, end = (p->start + p->clusters) << bits;
    int rc = 0;
    if (start < c->length)
        rc = io_zero(c->io, MIN(end, c->length) - start, start, c->error);
    return rc == 0 && end > c->length ? io_set_length(c->io, end, c->error) : rc;
}

/* The blocks, from the counts, and the table that leads to them. Space that is not written reads as zeros. */
static int write_refcounts(struct checker *c, const struct plan *p)
{
    const struct header *h = c->header;
    const uint64_t at = (p->start + p->table_clusters) << h->cluster_bits;
    unsigned char *table = calloc(p->table_clusters, (size_t)cluster_size(c)), group[PAGE_CLUSTERS * 8];
    uint32_t *sorted = NULL;
    uint64_t used = 0, current = UINT64_MAX;
    int rc = table ? pages_sorted(c, &sorted) : no_memory(c);
    for (size_t i = 0; rc == 0 && i < c->pages.count; i++) {
        const struct page *page = page_at(c, sorted[i]);
        const uint64_t first = c->pages.keys[sorted[i]] * PAGE_CLUSTERS, block = first >> block_bits(h);
        if (is_zero(page->count, sizeof page->count))
            continue;
        if (block != current) {
            store64(table + block * 8, at + (used++ << h->cluster_bits));
            current = block;
        }
        memset(group, 0, sizeof group);
        for (unsigned j = 0; j < PAGE_CLUSTERS; j++)
            refcount_store(h, group, j, MIN((uint64_t)page->count[j], refcount_max(h)));
        uint64_t in_block = (first & ((UINT64_C(1) << block_bits(h)) - 1)) / PAGE_CLUSTERS * group_bytes(h);
        rc = io_write_metadata(c->io, group, group_bytes(h), load64(table + block * 8) + in_block, c->error);
    }
    if (rc == 0)
        rc = io_write_metadata(c->io, table, (size_t)(p->table_clusters << h->cluster_bits), p->start << h->cluster_bits, c->error);
    free(sorted);
    free(table);
    return rc;
}

static int copy_table(struct checker *c, uint64_t from, uint64_t to, uint64_t length)
{
    int rc = 0;
    for (uint64_t done = 0; rc == 0 && done < length; done += BUFFER_SIZE) {
        size_t n = (size_t)MIN(length - done, (uint64_t)BUFFER_SIZE);
        rc = io_read_metadata(c->io, c->buffer, n, from + done, c->error);
        if (rc == 0 && !is_zero(c->buffer, n))
            rc = io_write_metadata(c->io, c->buffer, n, to + done, c->error);
    }
    return rc;
}

/* The whole new area is counted once already. */
static int move_l2_tables(struct checker *c, uint64_t to)
{
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < c->tables.count; i++) {
        if (!table_at(c, i)->moved)
            continue;
        table_at(c, i)->moved = to;
        if (table_at(c, i)->total > 1)
            rc = refs_add(c, to, cluster_size(c), table_at(c, i)->total - 1);
        if (rc == 0)
            rc = copy_table(c, c->tables.keys[i], to, cluster_size(c));
        to += cluster_size(c);
    }
    return rc;
}

/* Everything but the header; durable. */
static int write_all(struct checker *c, const struct plan *p)
{
    const struct header *h = c->header;
    const uint64_t start = p->start << h->cluster_bits, l1 = (p->start + p->table_clusters + p->blocks) << h->cluster_bits;
    int rc = refs_add(c, start, p->clusters << h->cluster_bits, 1);
    if (rc == 0)
        rc = prepare_space(c, p);
    if (rc == 0)
        rc = move_l2_tables(c, l1 + (p->l1_clusters << h->cluster_bits));
    if (rc == 0)
        rc = write_refcounts(c, p);
    if (rc == 0 && p->l1_clusters)
        rc = copy_table(c, h->l1_offset, l1, h->l1_size * UINT64_C(8));
    return rc < 0 ? rc : io_flush(c->io, c->error);
}

/* ---- the switch ---- */

static int turn_to(struct checker *c, const struct plan *p)
{
    struct header after = *c->header;
    after.reftable_offset = p->start << after.cluster_bits;
    after.reftable_clusters = (uint32_t)p->table_clusters;
    if (p->l1_clusters)
        after.l1_offset = (p->start + p->table_clusters + p->blocks) << after.cluster_bits;
    int rc = header_write(c->io, &after, c->error);
    if (rc < 0)
        return rc;
    *c->header = after;
    /* what the counts say is now what the file says */
    c->length = io_length(c->io);
    c->extent.length = 0;
    for (uint32_t i = 0; i < c->pages.count; i++)
        page_at(c, i)->over = page_at(c, i)->under = 0;
    return io_flush(c->io, c->error);
}

int rebuild_refcounts(struct checker *c)
{
    struct plan p = { .l1_clusters = c->move_l1 ? div_up(c->header->l1_size * UINT64_C(8), cluster_size(c)) : 0 };
    int rc;
    p.l2_clusters = choose_l2_tables(c);
    forget_old(c);
    rc = list_needed(c, &p.needed, &p.needed_count);
    if (rc == 0)
        rc = choose_place(c, &p);
    if (rc == 0) {
        rc = write_all(c, &p);
        if (rc == 0)
            rc = turn_to(c, &p);
        else if (!c->io->device)
            io_set_length(c->io, c->length, NULL);      /* as it was, if that can be had */
    }
    free(p.needed);
    return rc;
}
