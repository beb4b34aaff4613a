/* check.c: is an image as it should be, and putting it right. See check.h.
 *
 * A check is one pass: count all references, compare them with the refcounts, look at the COPIED bits; it writes nothing. A repair is a
 * pass, then writes by what it found, then another pass, which says what is left. What is not repaired, since nobody can know what was
 * meant: entries that lead nowhere (not at a cluster's start, or beyond the end of the file). As long as there are any, nothing that looks
 * leaked is freed: it may be what they meant.
 */
#define _GNU_SOURCE
#include "check.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- findings ---- */

static uint64_t *counter_of(fl_check *result, int kind)
{
    return kind == FL_FOUND_CORRUPTION ? &result->corruptions : kind == FL_FOUND_LEAK ? &result->leaks :
           kind == FL_FOUND_ERROR ? &result->check_errors : NULL;
}

static bool follows(uint64_t before, uint64_t length, uint64_t after)
{
    return before == NOWHERE ? after == NOWHERE : after == before + length;
}

static bool is_full(const fl_check *result)
{
    return result->finding_count == FL_CHECK_FINDINGS;
}

/* A row of clusters of which the same is to be said is one finding. What is not about the image itself is always kept. */
static void keep(fl_check *result, const fl_finding *finding)
{
    if (is_full(result) && (finding->kind == FL_FOUND_ERROR || finding->kind == FL_FOUND_NOTE)) {
        result->findings[FL_CHECK_FINDINGS - 1] = *finding;
        result->findings_dropped++;
        return;
    }
    fl_finding *last = result->finding_count ? &result->findings[result->finding_count - 1] : NULL;
    if (last && last->kind == finding->kind && last->repaired == finding->repaired && last->host != NOWHERE &&
        follows(last->host, last->length, finding->host) && follows(last->guest, last->length, finding->guest) &&
        !strcmp(last->text, finding->text))
        last->length += finding->length;
    else if (!is_full(result))
        result->findings[result->finding_count++] = *finding;
    else
        result->findings_dropped++;
}

void found(struct checker *c, int kind, uint64_t guest, uint64_t host, const char *format, ...)
{
    fl_finding finding = { .kind = kind, .guest = guest, .host = host, .length = host == NOWHERE ? 0 : cluster_size(c) };
    uint64_t *counter = counter_of(c->result, kind);
    va_list args;
    if (counter)
        ++*counter;
    if (is_full(c->result) && counter && kind != FL_FOUND_ERROR) {     /* there may be millions: no time is spent on them */
        c->result->findings_dropped++;
        return;
    }
    va_start(args, format);
    vsnprintf(finding.text, sizeof finding.text, format, args);
    va_end(args);
    keep(c->result, &finding);
}

int no_memory(struct checker *c)
{
    return fail(c->error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory to check image '%s'", c->io->name);
}

int check_interrupted(struct checker *c)
{
    uint64_t now = now_ns();
    if (now - c->asked_ns < 20000000u)
        return 0;
    c->asked_ns = now;
    return interrupted() ? fail(c->error, FL_EINTERRUPTED, FL_SIDE_NONE, 0, 0, "the check of image '%s' was interrupted", c->io->name) : 0;
}

/* ---- a pass ---- */

static int pass(struct checker *c)
{
    fl_check *result = c->result;
    refs_free(c);
    memset(result, 0, sizeof *result);
    c->incomplete = c->rebuild = c->no_place = c->move_l1 = c->move_l2 = c->bitmaps_damaged = c->entries_damaged = false;
    c->length = io_length(c->io);
    c->clusters = div_up(c->length, cluster_size(c));
    c->memory_limit = CHECK_SLACK + io_allocated(c->io);
    c->table_limit = CHECK_SLACK + 2 * io_allocated(c->io);
    c->table_bytes = 0;
    c->extent.length = 0;
    c->dangling_first = NOWHERE;
    c->dangling_end = 0;
    result->total_clusters = div_up(c->header->size, cluster_size(c));
    int rc = count_all(c);
    if (rc == 0)
        rc = compare_refcounts(c);
    if (rc == 0)
        rc = check_copied(c);
    if (rc == 0)
        result->image_end_offset = c->highest << c->header->cluster_bits;
    return rc == -ELOOP ? 0 : rc;               /* a bound was reached: result->check_errors says so */
}

/* ---- repairs ---- */

#define MAX_ROUNDS 3

/* Bitmaps that can't be trusted: whoever reads them must not, so the extension becomes void, for all of them. */
static int give_up_bitmaps(struct checker *c)
{
    c->header->autoclear &= ~(uint64_t)AUTOCLEAR_BITMAPS;
    int rc = header_write(c->io, c->header, c->error);
    if (rc == 0)
        rc = io_flush(c->io, c->error);
    if (rc == 0) {
        c->header->bitmap_count = 0;
        c->header->bitmap_directory_offset = c->header->bitmap_directory_size = 0;
        rc = pass(c);
    }
    return rc;
}

/* Is something else in the clusters of an L2 table, and can it be moved, since all that lead to it can be written? */
static bool crowded_l2(struct checker *c)
{
    bool crowded = false;
    for (uint32_t i = 0; i < c->tables.count; i++)
        crowded |= !l2_is_alone(c, i);
    for (uint32_t i = 0; crowded && i < c->snapshot_count; i++)
        crowded = c->snapshots[i].entries == 0 || l1_is_alone(c, c->snapshots[i].offset, c->snapshots[i].entries);
    return crowded;
}

static int repair_all(struct checker *c)
{
    int rc = c->bitmaps_damaged ? give_up_bitmaps(c) : 0;
    if (rc < 0 || c->result->check_errors)
        return rc;
    c->move_l2 = crowded_l2(c);
    rc = c->rebuild || c->move_l1 || c->move_l2 ? rebuild_refcounts(c) : repair_refcounts(c, false);
    return rc == 0 ? repair_entries(c, false) : MIN(rc, 0);
}

static int repair_leaks(struct checker *c)
{
    if (c->rebuild || c->result->leaks == 0)
        return 0;
    int rc = repair_refcounts(c, true);
    return rc == 0 ? repair_entries(c, true) : rc;
}

static bool same_finding(const fl_finding *a, const fl_finding *b)
{
    return a->kind == b->kind && a->guest == b->guest && a->host == b->host && !strcmp(a->text, b->text);
}

/* What a repair did: the difference between the passes around it. The findings that are gone come first, then those that are left. */
static void conclude(const fl_check *before, fl_check *after)
{
    const fl_check left = *after;
    after->corruptions_fixed = before->corruptions > left.corruptions ? before->corruptions - left.corruptions : 0;
    after->leaks_fixed = before->leaks > left.leaks ? before->leaks - left.leaks : 0;
    after->finding_count = 0;
    after->findings_dropped = before->findings_dropped + left.findings_dropped;
    for (size_t i = 0; i < before->finding_count; i++) {
        fl_finding finding = before->findings[i];
        bool stays = false;
        for (size_t j = 0; j < left.finding_count; j++)
            stays |= same_finding(&finding, &left.findings[j]);
        finding.repaired = 1;
        if (!stays && finding.kind != FL_FOUND_NOTE)
            keep(after, &finding);
    }
    for (size_t i = 0; i < left.finding_count; i++)
        keep(after, &left.findings[i]);
}

static int repair_and_look_again(struct checker *c, int repair, fl_check *before)
{
    *before = *c->result;
    bool no_place = false;
    uint64_t faults = UINT64_MAX;
    int rc = 0;
    /* what is repaired may open the way to more: when no entry is left that can't be followed, leaks are freed */
    for (int i = 0; i < MAX_ROUNDS && rc == 0 && !no_place && !c->result->check_errors; i++) {
        uint64_t left = add_sat(c->result->corruptions, c->result->leaks);
        if (left == 0 || left >= faults)
            break;
        faults = left;
        rc = repair == FL_REPAIR_ALL ? repair_all(c) : repair_leaks(c);
        no_place = c->no_place;
        if (rc == 0)
            rc = pass(c);
    }
    if (rc == 0) {
        if (no_place)
            found(c, FL_FOUND_NOTE, NOWHERE, NOWHERE, "not repaired: there is no space for new refcount structures");
        if (c->incomplete && c->result->leaks)
            found(c, FL_FOUND_NOTE, NOWHERE, NOWHERE, "leaks are not freed: some entries can't be followed, and may have meant them");
        else if (c->rebuild && repair == FL_REPAIR_LEAKS)
            found(c, FL_FOUND_NOTE, NOWHERE, NOWHERE, "leaks are not freed: the refcount structures are damaged; repair all");
    }
    if (rc == 0)
        conclude(before, c->result);
    return rc;
}

/* The image is as it should be: so say its header's bits. */
static int mark_clean(struct checker *c)
{
    struct header after = *c->header;
    after.incompatible &= ~(uint64_t)(INCOMPAT_DIRTY | INCOMPAT_CORRUPT);
    if (after.incompatible == c->header->incompatible)
        return 0;
    int rc = header_write(c->io, &after, c->error);
    if (rc == 0)
        rc = io_flush(c->io, c->error);
    if (rc == 0)
        *c->header = after;
    return rc;
}

int check_file(struct io *io, struct header *header, int repair, fl_check *result, fl_error *error)
{
    struct checker c = { .io = io, .header = header, .error = error };
    fl_check *now = calloc(1, sizeof *now), *before = calloc(1, sizeof *before);
    int rc = -ENOMEM;
    c.result = now;
    c.pages.value_size = sizeof(struct page);
    c.tables.value_size = sizeof(struct table);
    c.buffer = malloc(BUFFER_SIZE);
    if (!now || !before || !c.buffer) {
        rc = no_memory(&c);
        goto out;
    }
    rc = pass(&c);
    if (rc == 0 && repair && !now->check_errors && (now->corruptions || now->leaks))
        rc = repair_and_look_again(&c, repair, before);
    if (rc == 0 && repair && !now->check_errors && !now->corruptions)
        rc = mark_clean(&c);
    if (rc == 0 && result)
        *result = *now;
out:
    refs_free(&c);
    free(c.snapshots);
    free(c.blocks);
    free(c.buffer);
    free(before);
    free(now);
    return rc;
}

/* ---- the public call ---- */

int fl_image_check(const char *path, const fl_image_options *options, int repair, fl_check *result, fl_error *error)
{
    struct header header;
    struct io io;
    if (!path || !*path || !options || !options->format || !result || repair < FL_REPAIR_NONE || repair > FL_REPAIR_ALL)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "check of an image: no path, no format, no room for the result, or no such repair");
    const char *name = strlen(path) > 200 ? path + strlen(path) - 200 : path;
    if (strcmp(options->format, "qcow2"))
        return fail(error, EOPNOTSUPP, FL_SIDE_NONE, 0, 0, "image '%s' can't be checked: %.60s images have no structure of their own",
                    name, options->format);
    int rc = io_open(&io, path, name, repair != FL_REPAIR_NONE, false, options->share, error);
    if (rc < 0)
        return rc;
    rc = header_read(&io, &header, error);
    if (rc == 0)
        rc = check_file(&io, &header, repair, result, error);
    io_close(&io);
    return rc;
}
