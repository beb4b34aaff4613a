/* throttle.h: a speed limit that many threads share, and that can be changed, or lifted for good, while they wait.
 *
 * It counts bytes: `allowed` grows with time at `speed`, `reserved` with every taker. A taker reserves its bytes at once and then waits
 * until what was reserved before it is allowed. So each waiter has its own moment to wake up (no herd), they go in the order in which
 * they came, and over any stretch of time the bytes passed are within one burst and one piece of speed times time.
 */
#ifndef FL_THROTTLE_H
#define FL_THROTTLE_H

#include "util/util.h"

struct throttle {
    pthread_mutex_t lock;       /* protects everything; a leaf: nothing else is locked inside it */
    pthread_cond_t changed;     /* the speed was changed */
    _Atomic uint64_t speed;     /* bytes per second; 0: unlimited. Written under the lock, peeked at without it */
    uint64_t since;             /* when `allowed` was brought up to date, now_ns time */
    double allowed, reserved;   /* bytes; exact up to 8 PiB */
    bool ended;
};

int throttle_init(struct throttle *throttle, uint64_t speed);
void throttle_destroy(struct throttle *throttle);

/* Wait until the next bytes may be moved; returns how many: up to `want`, less under a limit so that a low speed is kept evenly, but a
   multiple of `unit` unless it is all of `want`. Both are not 0. */
uint64_t throttle_take(struct throttle *throttle, uint64_t want, uint64_t unit);

void throttle_set(struct throttle *throttle, uint64_t speed);

/* No limit from now on, whatever is set later; those that wait go on at once. */
void throttle_end(struct throttle *throttle);

#endif
