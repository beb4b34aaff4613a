/* throttle.c: see throttle.h. */
#define _GNU_SOURCE
#include "throttle.h"

#define BURSTS_PER_SECOND 20    /* at most 50 ms of bytes at once, be it one piece or what an idle time saved up */
#define LONGEST_WAIT 1e12       /* ns; then look again: keeps the sum inside 64 bits at absurdly low speeds */

int throttle_init(struct throttle *throttle, uint64_t speed)
{
    memset(throttle, 0, sizeof *throttle);
    atomic_init(&throttle->speed, speed);
    throttle->since = now_ns();
    int rc = -pthread_mutex_init(&throttle->lock, NULL);
    if (rc == 0 && (rc = cond_init(&throttle->changed)) != 0)
        pthread_mutex_destroy(&throttle->lock);
    return rc;
}

void throttle_destroy(struct throttle *throttle)
{
    pthread_cond_destroy(&throttle->changed);
    pthread_mutex_destroy(&throttle->lock);
}

/* Bring `allowed` up to `now`. Lock held. */
static void catch_up(struct throttle *throttle, uint64_t now)
{
    double speed = (double)atomic_load_explicit(&throttle->speed, memory_order_relaxed);
    double most = throttle->reserved + speed / BURSTS_PER_SECOND;
    throttle->allowed += speed * (double)(now - throttle->since) / 1e9;
    if (throttle->allowed > most)
        throttle->allowed = most;
    throttle->since = now;
}

uint64_t throttle_take(struct throttle *throttle, uint64_t want, uint64_t unit)
{
    uint64_t speed = atomic_load_explicit(&throttle->speed, memory_order_relaxed);
    if (LIKELY(speed == 0))
        return want;
    pthread_mutex_lock(&throttle->lock);
    uint64_t piece = speed / BURSTS_PER_SECOND / unit * unit;
    piece = MIN(want, MAX(piece, unit));
    catch_up(throttle, now_ns());
    double before = throttle->reserved;
    throttle->reserved += (double)piece;
    while ((speed = atomic_load_explicit(&throttle->speed, memory_order_relaxed)) != 0) {
        uint64_t now = now_ns();
        catch_up(throttle, now);
        double missing = before - throttle->allowed;
        if (missing <= 0)
            break;
        double wait = missing / (double)speed * 1e9;
        cond_wait_until(&throttle->changed, &throttle->lock, now + 1 + (uint64_t)MIN(wait, LONGEST_WAIT));
    }
    pthread_mutex_unlock(&throttle->lock);
    return piece;
}

static void change(struct throttle *throttle, uint64_t speed, bool end)
{
    pthread_mutex_lock(&throttle->lock);
    if (!throttle->ended) {
        catch_up(throttle, now_ns());
        if (speed == 0)
            throttle->allowed = throttle->reserved;     /* nobody waits, so a later limit starts with nothing owed */
        atomic_store_explicit(&throttle->speed, speed, memory_order_relaxed);
        throttle->ended = end;
        pthread_cond_broadcast(&throttle->changed);
    }
    pthread_mutex_unlock(&throttle->lock);
}

void throttle_set(struct throttle *throttle, uint64_t speed)
{
    change(throttle, speed, false);
}

void throttle_end(struct throttle *throttle)
{
    change(throttle, 0, true);
}
