/* backup_chunks.c: chunks mode: workers read ahead, fl_backup_next hands out what they read in the order of offsets, and
 * fl_backup_ack takes it back in any order.
 *
 *   work    cursor --enqueue()--> item in the ring (ITEM_WORKING) --finish()--> ITEM_DONE or ITEM_FAILED, with a list of chunks
 *   chunk   part_chunk(): CHUNK_QUEUED --fl_backup_next--> CHUNK_HANDED_OUT --fl_backup_ack--> CHUNK_FREE
 *   buffer  free --enqueue()--> the item's --its last data chunk acknowledged--> free
 *
 * A worker takes its buffer together with its work, in one go under the lock: so the earliest work always has a buffer, and a consumer
 * that holds on to all buffers but one still gets on. Runs without data need no buffer, and are any length.
 *
 * After a failure no new work is taken, but what was taken before is finished: everything before the failed offset is handed out, then
 * comes the failure. A cancel drops everything at once.
 *
 * A chunk ends at cluster boundaries, as only whole clusters can be discarded: where a hole ends inside a cluster, its zeros are made part
 * of the data.
 */
#define _GNU_SOURCE
#include "backup.h"

#include <stdlib.h>

#define INDEX_BITS 24           /* of a chunk's id; the number is above. So at most 16 million chunks can be out at once */
#define INDEX_MASK ((UINT64_C(1) << INDEX_BITS) - 1)
#define QUEUE_BEYOND_BUFFERS 64 /* pieces of work without data that are prepared ahead */

int chunks_init(fl_backup *job, uint32_t buffers)
{
    struct chunks *chunks = &job->chunks;
    chunks->buffers_count = buffers;
    chunks->ring_size = buffers + QUEUE_BEYOND_BUFFERS;
    chunks->free_chunk = NO_INDEX;
    chunks->next_number = 1;
    chunks->buffers = calloc(buffers, sizeof *chunks->buffers);
    chunks->ring = calloc(chunks->ring_size, sizeof *chunks->ring);
    if (!chunks->buffers || !chunks->ring)
        return -ENOMEM;
    chunks->free_buffer = -1;
    for (uint32_t i = buffers; i-- > 0; ) {
        chunks->buffers[i].data = job->memory + i * job->granularity;
        chunks->buffers[i].next = chunks->free_buffer;
        chunks->free_buffer = (int32_t)i;
    }
    return 0;
}

void chunks_destroy(fl_backup *job)
{
    free(job->chunks.buffers);
    free(job->chunks.ring);
    free(job->chunks.table);
}

/* ---- buffers and chunks; lock held ---- */

static void put_buffer(fl_backup *job, struct buffer *buffer)
{
    buffer->next = job->chunks.free_buffer;
    job->chunks.free_buffer = (int32_t)(buffer - job->chunks.buffers);
    pthread_cond_signal(&job->room);
}

/* A chunk's index, or NO_INDEX. */
static uint32_t new_chunk(struct chunks *chunks)
{
    if (chunks->free_chunk == NO_INDEX) {
        uint32_t size = MAX(64, chunks->table_size * 2);
        struct chunk *table = size <= INDEX_MASK + 1 ? realloc(chunks->table, size * sizeof *table) : NULL;
        if (!table)
            return NO_INDEX;
        for (uint32_t i = size; i-- > chunks->table_size; ) {
            table[i] = (struct chunk){ .state = CHUNK_FREE, .next = chunks->free_chunk };
            chunks->free_chunk = i;
        }
        chunks->table = table;
        chunks->table_size = size;
    }
    uint32_t i = chunks->free_chunk;
    chunks->free_chunk = chunks->table[i].next;
    return i;
}

static void free_chunk(struct chunks *chunks, uint32_t i)
{
    chunks->table[i].state = CHUNK_FREE;
    chunks->table[i].next = chunks->free_chunk;
    chunks->free_chunk = i;
}

/* ---- the queue's consuming end; lock held ---- */

static struct item *first_item(struct chunks *chunks) { return chunks->count ? &chunks->ring[chunks->head] : NULL; }

void chunks_drop_empty(fl_backup *job)
{
    struct chunks *chunks = &job->chunks;
    for (struct item *item; (item = first_item(chunks)) && item->state == ITEM_DONE && item->first == NO_INDEX; ) {
        chunks->head = (chunks->head + 1) % chunks->ring_size;
        chunks->count--;
        pthread_cond_signal(&job->room);
    }
}

/* The index of the chunk that is next in order, or NO_INDEX: it is not ready, or there is none. Before a failed item's end come the
   chunks that it had before it failed. */
static uint32_t first_chunk(fl_backup *job)
{
    chunks_drop_empty(job);
    const struct item *item = first_item(&job->chunks);
    return item && item->state != ITEM_WORKING ? item->first : NO_INDEX;
}

/* Take the first chunk, whose index is i, out of its item. */
static struct chunk *pop_chunk(struct chunks *chunks, uint32_t i)
{
    struct chunk *chunk = &chunks->table[i];
    chunks->ring[chunks->head].first = chunk->next;
    return chunk;
}

static void hand_out(fl_backup *job, uint32_t i, fl_chunk *out)
{
    struct chunks *chunks = &job->chunks;
    uint64_t offset = chunks->ring[chunks->head].offset;
    struct chunk *chunk = pop_chunk(chunks, i);
    chunk->state = CHUNK_HANDED_OUT;
    uint32_t next = first_chunk(job);
    /* Neighbouring zeros that are ready are one chunk: a disk that was filled with zeros comes as few as an empty one. */
    while (chunk->kind == FL_ZERO && next != NO_INDEX && chunks->table[next].kind == FL_ZERO &&
           chunks->table[next].offset == chunk->offset + chunk->length) {
        chunk->length += pop_chunk(chunks, next)->length;
        free_chunk(chunks, next);
        chunks->pending--;
        next = first_chunk(job);
    }
    *out = (fl_chunk){ .offset = chunk->offset, .length = chunk->length, .kind = chunk->kind, .id = chunk->id };
    if (chunk->kind == FL_DATA)
        out->buffer = chunk->buffer->data + (chunk->offset - offset);
    if (next != NO_INDEX)
        pthread_cond_signal(&job->news);        /* another consumer may go on */
}

/* ---- workers ---- */

static int append(struct worker *worker, int kind, uint64_t offset, uint64_t length, fl_error *error)
{
    fl_backup *job = worker->job;
    struct chunks *chunks = &job->chunks;
    struct item *item = worker->item;
    int rc = 0;
    pthread_mutex_lock(&job->lock);
    struct chunk *last = item->first == NO_INDEX ? NULL : &chunks->table[item->last];
    if (last && last->kind == kind && last->offset + last->length == offset) {
        last->length += length;
        goto out;
    }
    uint32_t i = new_chunk(chunks);
    if (i == NO_INDEX) {
        rc = fail(error, ENOMEM, FL_SIDE_NONE, offset, length, "no memory for another chunk; are chunks acknowledged?");
        goto out;
    }
    chunks->table[i] = (struct chunk){
        .state = CHUNK_QUEUED, .kind = kind, .id = chunks->next_number++ << INDEX_BITS | i,
        .offset = offset, .length = length, .buffer = kind == FL_DATA ? item->buffer : NULL, .next = NO_INDEX,
    };
    if (kind == FL_DATA)
        item->buffer->users++;
    if (item->first == NO_INDEX)
        item->first = i;
    else
        chunks->table[item->last].next = i;
    item->last = i;
    chunks->pending++;
out:
    pthread_mutex_unlock(&job->lock);
    return rc;
}

/* The data that was gathered becomes a chunk; of zeros if it holds nothing else. */
static int end_data(struct worker *worker, fl_error *error)
{
    uint64_t offset = worker->data_start, length = worker->data_end - offset;
    if (length == 0)
        return 0;
    worker->data_start = worker->data_end;
    bool zero = is_zero(worker->buffer + (offset - worker->item->offset), length);
    return append(worker, zero ? FL_ZERO : FL_DATA, offset, length, error);
}

/* More data, in its place in the buffer. */
static int gather(struct worker *worker, uint64_t offset, uint64_t length, fl_error *error)
{
    int rc = 0;
    if (length && worker->data_end != offset) {
        rc = end_data(worker, error);
        worker->data_start = worker->data_end = offset;
    }
    worker->data_end += length;
    return rc;
}

static int gather_zeros(struct worker *worker, uint64_t offset, uint64_t length, fl_error *error)
{
    memset(worker->buffer + (offset - worker->item->offset), 0, length);
    return gather(worker, offset, length, error);
}

int part_chunk(struct worker *worker, int kind, uint64_t offset, uint64_t length, fl_error *error)
{
    fl_backup *job = worker->job;
    int rc;
    if (kind == FL_DATA)
        return gather(worker, offset, length, error);
    if (!worker->buffer)        /* a run of whole granules */
        return append(worker, FL_ZERO, offset, length, error);

    uint64_t end = offset + length, start = align_up(offset, job->cluster_size);
    uint64_t stop = end == job->size ? end : align_down(end, job->cluster_size);
    bool follows_data = worker->data_start < worker->data_end && worker->data_end == offset;
    if (start >= stop || (follows_data && stop - start < LONG_ZEROS))
        return gather_zeros(worker, offset, length, error);
    if ((rc = gather_zeros(worker, offset, start - offset, error)) != 0 ||
        (rc = end_data(worker, error)) != 0 ||
        (rc = append(worker, FL_ZERO, start, stop - start, error)) != 0)
        return rc;
    return gather_zeros(worker, stop, end - stop, error);
}

/* Take work, a place in the queue for it, and a buffer if it needs one. false: there is nothing left to do. */
static bool enqueue(struct worker *worker, struct work *work)
{
    fl_backup *job = worker->job;
    struct chunks *chunks = &job->chunks;
    bool any;
    pthread_mutex_lock(&job->lock);
    while ((any = cursor_look(job, work))) {
        bool buffer = work_needs_buffer(work);
        if (chunks->count < chunks->ring_size && (!buffer || chunks->free_buffer >= 0)) {
            cursor_take(job, work);
            struct item *item = &chunks->ring[(chunks->head + chunks->count++) % chunks->ring_size];
            *item = (struct item){ .state = ITEM_WORKING, .offset = work->offset, .first = NO_INDEX, .last = NO_INDEX };
            if (buffer) {
                item->buffer = &chunks->buffers[chunks->free_buffer];
                chunks->free_buffer = item->buffer->next;
            }
            worker->item = item;
            worker->data_start = worker->data_end = work->offset;
            worker->buffer = buffer ? item->buffer->data : NULL;
            break;
        }
        pthread_cond_wait(&job->room, &job->lock);
    }
    if (!any)
        pthread_cond_broadcast(&job->room);     /* the others that wait have nothing left to do either */
    pthread_mutex_unlock(&job->lock);
    return any;
}

static void finish(struct worker *worker, int rc, const fl_error *error)
{
    fl_backup *job = worker->job;
    struct item *item = worker->item;
    pthread_mutex_lock(&job->lock);
    item->state = rc ? ITEM_FAILED : ITEM_DONE;
    if (item->buffer && item->buffer->users == 0)
        put_buffer(job, item->buffer);
    if (rc)
        job_fail(job, rc, error);
    if (item == first_item(&job->chunks))
        pthread_cond_broadcast(&job->news);
    pthread_mutex_unlock(&job->lock);
}

void chunk_loop(struct worker *worker)
{
    struct work work;
    while (enqueue(worker, &work)) {
        fl_error error = { 0 };
        int rc = work_read(worker, &work, &error);
        int ended = end_data(worker, rc ? NULL : &error);       /* of a failed one, what comes before the failure */
        if (rc == 0)
            rc = ended;
        finish(worker, rc, &error);
    }
}

/* ---- the public calls ---- */

int fl_backup_next(fl_backup *job, uint64_t timeout, fl_chunk *chunk, fl_error *error)
{
    int rc = gate_pass(&job->gate, JOB_NAME, error);
    if (rc)
        return rc;
    if (job->copies) {
        rc = fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "the backup job copies to a target: it has no chunks");
        goto leave;
    }
    uint64_t deadline = add_sat(now_ns(), timeout);
    pthread_mutex_lock(&job->lock);
    for (;;) {
        uint32_t first = job->cancelled ? NO_INDEX : first_chunk(job);
        if (first != NO_INDEX) {
            hand_out(job, first, chunk);
            break;
        }
        const struct item *item = first_item(&job->chunks);
        if (job->failed && (job->cancelled || !item || item->state == ITEM_FAILED)) {
            rc = job->failed;
            if (error)
                *error = job->failure;
            break;
        }
        if (!item && job->cursor.position == job->size) {
            rc = fail(error, FL_EEND, FL_SIDE_NONE, job->size, 0, "no more chunks");
            break;
        }
        if (job->closing) {
            rc = fail(error, FL_ECLOSED, FL_SIDE_NONE, 0, 0, "the backup job was closed");
            break;
        }
        if (now_ns() >= deadline) {
            rc = fail(error, FL_ERUNNING, FL_SIDE_NONE, 0, 0, "no chunk is ready");
            break;
        }
        cond_wait_until(&job->news, &job->lock, slice_end(deadline));
        pthread_mutex_unlock(&job->lock);
        bool stop = interrupted();
        pthread_mutex_lock(&job->lock);
        if (stop) {
            rc = fail(error, FL_EINTERRUPTED, FL_SIDE_NONE, 0, 0, "interrupted while waiting for a chunk");
            break;
        }
    }
    pthread_mutex_unlock(&job->lock);
leave:
    gate_leave(&job->gate);
    return rc;
}

int fl_backup_ack(fl_backup *job, uint64_t id, int discard, fl_error *error)
{
    struct chunks *chunks = &job->chunks;
    int rc = gate_pass(&job->gate, JOB_NAME, error);
    if (rc)
        return rc;
    pthread_mutex_lock(&job->lock);
    uint64_t i = id & INDEX_MASK;
    if (i >= chunks->table_size || chunks->table[i].id != id || chunks->table[i].state != CHUNK_HANDED_OUT) {
        pthread_mutex_unlock(&job->lock);
        rc = fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "chunk %llu was not handed out, or was acknowledged already", (unsigned long long)id);
        goto leave;
    }
    struct chunk chunk = chunks->table[i];
    free_chunk(chunks, (uint32_t)i);            /* acknowledged: whoever tries again is told so */
    if (chunk.buffer && --chunk.buffer->users == 0)
        put_buffer(job, chunk.buffer);          /* before the discard, which may take a while */
    pthread_mutex_unlock(&job->lock);

    if (discard && job->discard)
        rc = job_discard(job, chunk.offset, chunk.length, error);
    count_up(chunk.kind == FL_DATA ? &job->data_bytes : &job->zero_bytes, chunk.length);
    count_up(&job->done, chunk.length);

    pthread_mutex_lock(&job->lock);
    chunks->pending--;
    job_settle(job);
    pthread_mutex_unlock(&job->lock);
leave:
    gate_leave(&job->gate);
    return rc;
}
