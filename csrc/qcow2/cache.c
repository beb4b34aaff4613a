/* cache.c: slices of L2 tables and refcount blocks in memory, in shards that each have a lock of their own.
 *
 * A slice stays while it is pinned, dirty or being written. A shard that has more slices than its share and finds none that may go takes memory for one
 * more: the bound is kept by commit_if_due, which lets nobody change anything while too much is dirty. What is given out is never moved.
 *
 * A slice is found by its place in the file. That is unambiguous since a cluster that was a table and was freed is used again only after
 * everybody who knew of the table has left (see epoch.h), and cache_forget is called before it is a table again.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "driver.h"

#define LEAST_SLICES 64u
#define SHARD_BITS 5u

int cache_init(struct qcow2 *q, uint64_t bytes)
{
    struct cache *c = &q->cache;
    c->slice_size = (uint32_t)MIN(q->cluster_size, SLICE_MAX);
    c->limit = (unsigned)MIN(MAX((bytes ? bytes : DEFAULT_CACHE) / c->slice_size, LEAST_SLICES), UINT32_MAX / 2);
    c->shard_bits = SHARD_BITS;
    while (c->shard_bits > 0 && c->limit >> c->shard_bits < 16)
        c->shard_bits--;
    c->share = c->limit >> c->shard_bits;
    while (UINT32_C(1) << c->bucket_bits < c->share && c->bucket_bits < 24)
        c->bucket_bits++;
    if (posix_memalign((void **)&c->shards, CACHE_LINE, sizeof *c->shards << c->shard_bits))
        return c->shards = NULL, -ENOMEM;
    memset(c->shards, 0, sizeof *c->shards << c->shard_bits);
    for (unsigned i = 0; i < 1u << c->shard_bits; i++) {
        struct shard *s = &c->shards[i];
        pthread_mutex_init(&s->lock, NULL);
        cond_init(&s->loaded);
        if (!(s->buckets = calloc((size_t)1 << c->bucket_bits, sizeof *s->buckets)))
            return -ENOMEM;             /* cache_destroy knows what to do */
    }
    return 0;
}

static void slice_free(struct slice *slice)
{
    free((void *)slice->words);
    free(slice);
}

/* In a forked child nothing is locked. */
void cache_destroy(struct qcow2 *q)
{
    struct cache *c = &q->cache;
    bool mine = q->io.generation == fl_generation;
    for (unsigned i = 0; c->shards && i < 1u << c->shard_bits; i++) {
        struct shard *s = &c->shards[i];
        for (unsigned j = 0; j < s->count; j++)
            slice_free(s->all[j]);
        free(s->all);
        free(s->buckets);
        if (mine && s->buckets) {
            pthread_cond_destroy(&s->loaded);
            pthread_mutex_destroy(&s->lock);
        }
    }
    free(c->shards);
    c->shards = NULL;
}

static uint64_t hash(uint64_t offset) { return (offset >> MIN_CLUSTER_BITS) * UINT64_C(0x9e3779b97f4a7c15); }

static struct shard *shard_of(struct cache *c, uint64_t offset)
{
    return c->shard_bits ? &c->shards[hash(offset) >> (64 - c->shard_bits)] : c->shards;
}

static struct slice **bucket_of(struct cache *c, struct shard *s, uint64_t offset)
{
    return &s->buckets[(hash(offset) >> (64 - SHARD_BITS - c->bucket_bits - 1)) & ((1u << c->bucket_bits) - 1)];
}

static struct slice *find(struct cache *c, struct shard *s, uint64_t offset)
{
    struct slice *slice = *bucket_of(c, s, offset);
    while (slice && slice->offset != offset)
        slice = slice->next;
    return slice;
}

static void unhash(struct cache *c, struct shard *s, struct slice *slice)
{
    struct slice **p = bucket_of(c, s, slice->offset);
    while (*p != slice)
        p = &(*p)->next;
    *p = slice->next;
}

static bool may_go(struct slice *slice)
{
    return slice->pins == 0 && slice->state != SLICE_LOADING && atomic_load(&slice->flags) == 0;
}

/* Take `all[i]` out of the shard; the caller has it for itself. */
static struct slice *take_out(struct cache *c, struct shard *s, unsigned i)
{
    struct slice *slice = s->all[i];
    if (slice->state != SLICE_FAILED)
        unhash(c, s, slice);
    s->all[i] = s->all[--s->count];
    return slice;
}

/* Second chance: the first from the hand on that was not used since it last came by. NULL: none may go. */
static struct slice *evict(struct cache *c, struct shard *s)
{
    for (unsigned n = 0; n < 2 * s->count; n++) {
        if (s->hand >= s->count)
            s->hand = 0;
        struct slice *slice = s->all[s->hand];
        if (may_go(slice) && !slice->used)
            return take_out(c, s, s->hand);
        slice->used = false;
        s->hand++;
    }
    return NULL;
}

/* A slice to be filled, in the shard and pinned; NULL: no memory. */
static struct slice *bring_in(struct cache *c, struct shard *s, enum slice_kind kind, uint64_t offset)
{
    struct slice *slice = NULL, *more;
    if (s->count >= c->share)
        slice = evict(c, s);
    if (s->count >= c->share && (more = evict(c, s)) != NULL)     /* there were more than its share: back to it */
        slice_free(more);
    if (s->count == s->room) {
        unsigned room = s->room ? s->room * 2 : 16;
        struct slice **all = realloc(s->all, room * sizeof *all);
        if (!all)
            goto no_memory;
        s->all = all;
        s->room = room;
    }
    if (!slice) {
        slice = calloc(1, sizeof *slice);
        if (!slice || posix_memalign((void **)&slice->words, CACHE_LINE, c->slice_size)) {
            free(slice);
            return NULL;
        }
    }
    slice->offset = offset;
    slice->kind = kind;
    slice->state = SLICE_LOADING;
    slice->pins = 1;
    slice->used = true;
    struct slice **bucket = bucket_of(c, s, offset);
    slice->next = *bucket;
    *bucket = slice;
    s->all[s->count++] = slice;
    return slice;
no_memory:
    if (slice)
        slice_free(slice);
    return NULL;
}

/* With the shard locked. A slice that could not be read is in no bucket, and goes with its last pin. */
static void unpin(struct shard *s, struct slice *slice)
{
    if (--slice->pins == 0 && slice->state == SLICE_FAILED) {
        for (unsigned i = 0; i < s->count; i++)
            if (s->all[i] == slice) {
                s->all[i] = s->all[--s->count];
                break;
            }
        slice_free(slice);
    }
}

static int wrong_kind(struct qcow2 *q, uint64_t offset, fl_error *error)
{
    return qcow2_corrupt(q, UINT64_MAX, error, "the cluster at %llu of the file is in an L2 table and in a refcount block", (unsigned long long)offset);
}

int cache_get(struct qcow2 *q, enum slice_kind kind, uint64_t offset, struct slice **out, fl_error *error)
{
    struct cache *c = &q->cache;
    struct shard *s = shard_of(c, offset);
    struct slice *slice;
    int rc;
    pthread_mutex_lock(&s->lock);
    while ((slice = find(c, s, offset)) != NULL) {
        if (slice->kind != kind) {
            pthread_mutex_unlock(&s->lock);
            return wrong_kind(q, offset, error);
        }
        slice->pins++;
        slice->used = true;
        while (slice->state == SLICE_LOADING)
            pthread_cond_wait(&s->loaded, &s->lock);
        if (LIKELY(slice->state == SLICE_READY)) {
            pthread_mutex_unlock(&s->lock);
            *out = slice;
            return 0;
        }
        unpin(s, slice);                /* it could not be read: try it ourselves, for an error of our own */
    }
    slice = bring_in(c, s, kind, offset);
    pthread_mutex_unlock(&s->lock);
    if (!slice)
        return fail(error, ENOMEM, FL_SIDE_NONE, offset, c->slice_size, "no memory for the tables of image '%s'", q->image.name);
    rc = io_read_metadata(&q->io, (void *)slice->words, c->slice_size, offset, error);
    pthread_mutex_lock(&s->lock);
    slice->state = rc < 0 ? SLICE_FAILED : SLICE_READY;
    pthread_cond_broadcast(&s->loaded);
    if (rc < 0) {
        unhash(c, s, slice);
        unpin(s, slice);
    }
    pthread_mutex_unlock(&s->lock);
    if (rc == 0)
        *out = slice;
    return rc;
}

void cache_put(struct qcow2 *q, struct slice *slice)
{
    struct shard *s = shard_of(&q->cache, slice->offset);
    pthread_mutex_lock(&s->lock);
    unpin(s, slice);
    pthread_mutex_unlock(&s->lock);
}

struct slice *cache_peek(struct qcow2 *q, enum slice_kind kind, uint64_t offset)
{
    struct shard *s = shard_of(&q->cache, offset);
    pthread_mutex_lock(&s->lock);
    struct slice *slice = find(&q->cache, s, offset);
    if (LIKELY(slice && slice->state == SLICE_READY && slice->kind == kind)) {
        slice->used = true;
        return slice;
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

void cache_unpeek(struct qcow2 *q, struct slice *slice)
{
    pthread_mutex_unlock(&shard_of(&q->cache, slice->offset)->lock);
}

int cache_forget(struct qcow2 *q, uint64_t offset, fl_error *error)
{
    struct cache *c = &q->cache;
    bool in_use = false;
    for (uint64_t at = offset; at < offset + q->cluster_size; at += c->slice_size) {
        struct shard *s = shard_of(c, at);
        pthread_mutex_lock(&s->lock);
        struct slice *slice = find(c, s, at);
        if (slice && may_go(slice)) {
            unsigned i = 0;
            while (s->all[i] != slice)
                i++;
            slice_free(take_out(c, s, i));
        } else if (slice) {
            in_use = true;
        }
        pthread_mutex_unlock(&s->lock);
    }
    if (!in_use)
        return 0;
    return qcow2_corrupt(q, UINT64_MAX, error, "the cluster at %llu of the file is in use, but its refcount says that it is free",
                         (unsigned long long)offset);
}

void cache_dirty(struct qcow2 *q, struct slice *slice)
{
    if (atomic_load_explicit(&slice->flags, memory_order_relaxed) & SLICE_DIRTY)
        return;
    slice->next_dirty = q->dirty[slice->kind];
    q->dirty[slice->kind] = slice;
    atomic_fetch_or(&slice->flags, SLICE_DIRTY);
    atomic_fetch_add(&q->dirty_count, 1);
}
