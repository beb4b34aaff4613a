/* gate.h: many users, one closer. Users pass in and out without touching a shared cache line; the closer waits until all are out.
 *
 * It serves twice: guest writes pass a disk's gate and a cut closes it for a moment; and every public object has one that its calls
 * pass, shut for good by close(), which so waits for the calls that run.
 */
#ifndef FL_GATE_H
#define FL_GATE_H

#include "util/util.h"

#define GATE_SLOTS 32           /* a power of two */

struct gate {
    struct { _Alignas(CACHE_LINE) atomic_long inside; } slot[GATE_SLOTS];   /* users inside, counted by thread */
    _Alignas(CACHE_LINE) atomic_int state;      /* GATE_OPEN, GATE_CLOSED, GATE_SHUT; changed under `lock` */
    unsigned generation;                        /* fixed */
    pthread_mutex_t lock;                       /* protects changes of `state`, and the waits */
    pthread_cond_t changed;                     /* a user left while not open, or the state changed */
};

int gate_init(struct gate *gate);
void gate_destroy(struct gate *gate);

/* Pass in. Waits while it is closed. 0, -FL_ECLOSED after gate_shut, -FL_EFORKED in a child. Not recursive. */
int gate_enter(struct gate *gate);
int gate_pass(struct gate *gate, const char *what, fl_error *error);   /* the same, and says in `error` that `what` is closed, or the parent's */
void gate_leave(struct gate *gate);             /* by the thread that entered */

/* Keep new users out and wait until all are out. 0, -FL_ECLOSED, -FL_EFORKED, or -ETIMEDOUT at `deadline`: then it is open again. */
int gate_close(struct gate *gate, uint64_t deadline);
/* The same in two steps, for whoever closes several at once: keep new users out, of all of them; then wait, for each. After the first step one of
   gate_drain (which opens it when it fails) and gate_open must come. */
int gate_bar(struct gate *gate);                /* 0, -FL_ECLOSED, -FL_EFORKED */
int gate_drain(struct gate *gate, uint64_t deadline);   /* 0, -ETIMEDOUT */
void gate_open(struct gate *gate);

/* Shut it for good and wait until all are out. true for the first that calls; the others wait too. In a forked child: false at once. */
bool gate_shut(struct gate *gate);

/* The same, but waits no longer than until `deadline`: users may still be inside when it returns. */
bool gate_shut_until(struct gate *gate, uint64_t deadline);
bool gate_is_empty(struct gate *gate);          /* once it was shut: then nobody will ever be inside again */

#endif
