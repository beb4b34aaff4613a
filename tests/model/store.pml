/* store.pml: where saved data lives: slots of memory (the stage), slots of the fleecing image, the map, the queue of those who wait for
   room, and the spiller. Part of cbw.pml.

   All inlines here are called within a d_step: one hold of the store's lock. The lock guards everything but the words of a slot that one has
   pinned or to oneself. */

#define FREE 0
#define HELD 1                                  /* somebody has it to himself; nothing points at it */
#define MAPPED 2
#define ORPHAN 3                                /* nothing points at it any more, but it is pinned */

byte place[N];                                  /* the map: 0 nowhere, or RAM(slot), or FILE(slot) */
byte ramstate[NS * NR], pins[NS * NR], ram0[NS * NR], ram1[NS * NR];
#if NF
byte filestate[NS * NF], file0[NS * NF], file1[NS * NF];
#endif
#define RAM(r) ((r) + 1)
#define FILE(f) ((f) + 1 + NS * NR)
#define IS_RAM(p) ((p) > 0 && (p) <= NS * NR)
#define IS_FILE(p) ((p) > NS * NR)
#define GARBAGE 9

byte room[NS];                                  /* memory slots that are neither in use nor promised */
bool aborted[NS];                               /* the snapshot broke: the store is empty and stays so */
byte first[NS], second[NS];                     /* the queue: writer + 1 */
byte need[2];                                   /* how many slots writer w waits for */
bool granted[2];                                /* and they are promised to it */

byte spilling;                                  /* FILE(slot) that is being written to */
bool hung;                                      /* and for ever */

inline grant_room(s)    /* first come, first served; all that one needs or nothing */
{
#ifndef NO_GRANT        /* mutant */
  do
  :: first[s] && room[s] >= need[first[s] - 1] ->
     room[s] = room[s] - need[first[s] - 1]; granted[first[s] - 1] = true; first[s] = second[s]; second[s] = 0
  :: else -> break
  od
#else
  skip
#endif
}

inline free_ram(r)
{
  MUST(ramstate[r] != FREE, freed_twice);
  INSIDE(pins[r] == 0, freed_twice);
  ram0[r] = GARBAGE; ram1[r] = GARBAGE; ramstate[r] = FREE; room[(r) / NR]++;
  grant_room((r) / NR)
}

inline unmap_ram(r)     /* nothing points at it any more */
{
  if
#ifndef NO_PIN_COUNT    /* mutant */
  :: pins[r] -> ramstate[r] = ORPHAN
#endif
  :: else -> free_ram(r)
  fi
}

inline unpin(r)
{
  pins[r]--;
  if
#ifdef NO_PIN_COUNT
  :: ramstate[r] == ORPHAN -> free_ram(r)
#elif !defined(NO_LAST_UNPIN) /* mutant */
  :: pins[r] == 0 && ramstate[r] == ORPHAN -> free_ram(r)
#endif
  :: else -> skip
  fi
}

#if NF
/* Only the spiller takes file slots and punches free ones, one after the other: so no slot in use is ever punched. */
inline free_file(f)
{
  MUST(filestate[f] != FREE, freed_twice);
  file0[f] = GARBAGE; file1[f] = GARBAGE; filestate[f] = FREE
}
#endif

inline forget(i)        /* free what the store has of i */
{
  if
  :: IS_RAM(place[i]) -> tmp = place[i] - 1; place[i] = 0; unmap_ram(tmp)
#if NF
  :: IS_FILE(place[i]) -> tmp = place[i] - FILE(0); place[i] = 0; free_file(tmp)
#endif
  :: else -> skip
  fi
}

inline abort_store(s, i)        /* i is the caller's, 0 before and after */
{
  aborted[s] = true;
  do
  :: i < NC -> i = i + (s) * NC; forget(i); i = i + 1 - (s) * NC
  :: else -> break
  od;
  i = 0
}

/* For a writer, with its mine, slot, credit, and i, which is 0 before and after: a slot for each claim of mine in s, or none at all and
   `missing` says how many. What was promised to me is used first. */
inline take_room(s, missing)
{
  i = s * NC; missing = 0;
  do
  :: i < (s + 1) * NC -> missing = missing + mine[i]; i++
  :: else -> break
  od;
  if
  :: credit[s] < missing && (first[s] || room[s] + credit[s] < missing) -> skip
  :: else ->
     i = s * NC;
     do
     :: i < (s + 1) * NC && mine[i] ->
        tmp = s * NR; do :: ramstate[tmp] != FREE -> tmp++ :: else -> break od;
        ramstate[tmp] = HELD; slot[i] = RAM(tmp); i++;
        if :: credit[s] -> credit[s]-- :: else -> room[s]-- fi
     :: i < (s + 1) * NC && !mine[i] -> i++
     :: else -> break
     od;
     missing = 0
  fi;
  i = 0
}

inline return_credit(s) /* of all stores; s is the caller's, 0 afterwards */
{
  s = 0;
  do
  :: s < NS -> room[s] = room[s] + credit[s]; credit[s] = 0; grant_room(s); s++
  :: else -> break
  od;
  s = 0
}

inline give_back(s)     /* my slots of s; i is 0 before and after */
{
  i = s * NC;
  do
  :: i < (s + 1) * NC ->
     if
     :: slot[i] -> tmp = slot[i] - 1; slot[i] = 0; free_ram(tmp)
     :: else -> skip
     fi;
     i++
  :: else -> break
  od;
  i = 0
}

inline enqueue(s, w)
{
#ifdef GRANT_ONE        /* mutant: wait for one slot, however many are needed */
  need[w] = 1;
#endif
  if
  :: aborted[s] -> skip
  :: !aborted[s] && !first[s] -> first[s] = VALUE(w)
  :: else -> second[s] = VALUE(w)
  fi;
#ifndef NO_LAST_LOOK    /* mutant: is there room by now? */
  grant_room(s)
#endif
}

inline dequeue(s, w)    /* whatever ended the wait: it may have been granted meanwhile */
{
  if
  :: granted[w] ->
#ifdef TIMEOUT_DROPS_GRANT /* mutant */
     if :: !late[w] -> credit[s] = need[w] :: else -> skip fi;
#else
     credit[s] = need[w];
#endif
     granted[w] = false
#ifndef STAY_IN_QUEUE   /* mutant */
  :: !granted[w] && first[s] == VALUE(w) ->
     first[s] = second[s]; second[s] = 0;
#ifndef NO_GRANT_TO_NEXT /* mutant: the next one may need less */
     grant_room(s)
#endif
  :: !granted[w] && second[s] == VALUE(w) -> second[s] = 0
#endif
  :: else -> skip
  fi;
#ifndef STAY_IN_QUEUE
  need[w] = 0
#endif
}

inline everything_is_free(i)    /* a spill that hangs keeps its two slots, and nobody else keeps any; i is the caller's */
{
  i = 0;
  do
  :: i < NS * NR -> MUST(ramstate[i] == FREE || (hung && ramstate[i] == ORPHAN && pins[i] == 1), a_slot_leaked); i++
  :: else -> break
  od;
#if NF
  i = 0;
  do
  :: i < NS * NF -> MUST(filestate[i] == FREE || (hung && spilling == FILE(i)), a_slot_leaked); i++
  :: else -> break
  od;
#endif
  i = 0;
  do
  :: i < NS -> MUST(room[i] == NR || (hung && room[i] == NR - 1), a_slot_leaked); i++
  :: else -> break
  od;
  i = 0
}

#if NF
#define FILE_FREE(s) (filestate[(s) * NF] == FREE || filestate[(s) * NF + NF - 1] == FREE)
#define CAN_SPILL(i) (IS_RAM(place[i]) && FILE_FREE(SNAPSHOT(i)))

proctype Spiller()
{
  byte i, r, f;
#ifdef FREE_HUNG_SLOT
  byte owed, owed1;             /* a write that was given up comes in the end all the same */
#endif
end_idle:
  do
#ifdef FREE_HUNG_SLOT
  :: owed -> file1[owed - FILE(0)] = owed1; owed = 0
#endif
  :: atomic {
       if
       :: CAN_SPILL(0) -> i = 0
#if N > 1
       :: CAN_SPILL(1) -> i = 1
#endif
#if N > 2
       :: CAN_SPILL(2) -> i = 2
#endif
#if N > 3
       :: CAN_SPILL(3) -> i = 3
#endif
       fi;
       d_step {                 /* pin it, and have a file slot */
         r = place[i] - 1; f = SNAPSHOT(i) * NF;
         if :: filestate[f] != FREE -> f = f + NF - 1 :: else -> skip fi;
         filestate[f] = HELD; pins[r]++; spilling = FILE(f);
#ifdef MAPPED_TOO_EARLY /* mutant */
         place[i] = FILE(f); filestate[f] = MAPPED; ramstate[r] = ORPHAN
#endif
       }
     };
     file0[f] = ram0[r];
#if HANG
     if
     :: hung = true;
end_hung:
        false
     :: true -> skip
     fi;
#endif
#ifdef FREE_HUNG_SLOT   /* mutant: a spill that takes too long is given up, and its file slot used again */
     if
     :: !owed -> owed = FILE(f); d_step { owed1 = ram1[r]; free_file(f); unpin(r); spilling = 0 }; goto end_idle
     :: true -> skip
     fi;
#endif
     file1[f] = ram1[r];
     if
     :: d_step {                /* it worked */
          true ->
#ifdef MAPPED_TOO_EARLY
          unpin(r);
#elif defined(NO_LOOK_AT_MAP) /* mutant */
          place[i] = FILE(f); filestate[f] = MAPPED; ramstate[r] = ORPHAN; unpin(r);
#else
          if
          :: place[i] == RAM(r) -> place[i] = FILE(f); filestate[f] = MAPPED; ramstate[r] = ORPHAN
          :: else -> free_file(f)       /* it was freed meanwhile */
          fi;
          unpin(r);
#endif
          r = 0; f = 0; i = 0; spilling = 0
        }
#if (!PROGRESS || defined(SPILLS_FAIL)) && !defined(MAPPED_TOO_EARLY)
     :: d_step {                /* it failed: it stays staged and is tried again */
          true -> free_file(f); unpin(r); r = 0; f = 0; i = 0; spilling = 0
        }
#endif
     fi
  od
}
#endif
