"""Break the engine on purpose, one line at a time, and demand that a test notices.

Each mutant replaces a piece of text, which must occur exactly once in its file (else the table is out of date, and
that is an error), in a copy of csrc; then the named scenarios of tests/c/test_invariants_*.c must fail, while they pass
on the copy as it is.

    python tests/mutants.py             all of them, as a table
    python tests/mutants.py I3 i5_pins  those of an invariant, or whose names begin like this

What can't be shown this way on x86-64: the full fences. A processor that reorders nothing but a store and a later load
hides all but one of them, and that one sits beside atomic operations that are fences themselves.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from c_programs import C, scenarios

CSRC = C.parent.parent / "csrc"
PROGRAM_OF = {name: program for program, name in scenarios()}
TIME_LIMIT = 10  # seconds: a mutant that hangs has been noticed
PARALLEL = 4  # most of the time they hang


@dataclass(frozen=True)
class Mutant:
    name: str  # begins with the invariant that it breaks
    file: str
    old: str
    new: str
    scenarios: tuple[str, ...]  # each of them must fail
    tries: int = 1  # in one of so many runs: more than one where threads race for a moment that nothing can fix


def _mutant(name: str, file: str, old: str, new: str, *scenarios: str, tries: int = 1) -> Mutant:
    return Mutant(name, file, old, new, scenarios, tries)


MUTANTS = [
    # ---- I1: saved only after the bytes are in the store ----
    _mutant(
        "i1_saved_when_claimed",
        "cbw.c",
        "        saving->mine[word - saving->word] = pending & ~before;\n",
        "        saving->mine[word - saving->word] = pending & ~before;\n"
        "        bitmap_fetch_or(&snapshot->saved, word, pending & ~before);\n",
        "i1_not_saved_before_its_bytes_are_stored",
    ),
    _mutant(
        "i1_failed_read_counts_as_read",
        "cbw.c",
        "            saving->found[number] = FOUND_NOTHING;\n",
        "            saving->found[number] = FOUND_DATA;\n",
        "i1_failed_read_saves_nothing",
    ),
    _mutant(
        "i1_released_while_saving_is_kept",
        "cbw.c",
        "        if (bitmap_test(&snapshot->saved, at) && is_mine(saving, at))\n",
        "        if (0)\n",
        "i1_released_while_saving",
    ),
    _mutant(
        "i1_zeros_without_the_bit",
        "cbw.c",
        "    bitmap_set(&snapshot->zero, first, count);\n",
        "",
        "i1_zeros_are_not_stored",
    ),
    # ---- I2: nothing changes unless saved, released, lost, or visibly broken ----
    _mutant(
        "i2_does_not_wait_for_the_other_writer",
        "cbw.c",
        "            if (savings[i].others && !wait_for_others(&savings[i]))\n",
        "            if (0)\n",
        "i2_second_writer_waits_for_the_first",
    ),
    _mutant(
        "i2_trusts_the_other_writer",
        "cbw.c",
        "                dealt_with = false;\n",
        "                dealt_with = true;\n",
        "i2_second_writer_saves_when_the_first_fails",
    ),
    _mutant(
        "i2_does_not_break",
        "cbw.c",
        "        snapshot_break(saving->snapshot, cause);\n",
        "",
        "i2_broken_and_lost_are_visible_before_the_write",
    ),
    _mutant(
        "i2_does_not_mark_lost",
        "cbw.c",
        "        bitmap_set(&saving->snapshot->lost, first, count);\n",
        "",
        "i2_broken_and_lost_are_visible_before_the_write",
    ),
    _mutant(
        "i2_writes_before_it_saves",
        "cbw.c",
        "    int rc = needs_saving ? protect(disk, *offset, piece, attempt, error) : 0;\n",
        "    int rc = apply(disk, change, data, *offset, piece, error);\n"
        "    if (rc == 0 && needs_saving)\n"
        "        rc = protect(disk, *offset, piece, attempt, error);\n",
        "i2_saved_before_the_write",
    ),
    _mutant(
        "i2_zero_and_discard_do_not_save",
        "cbw.c",
        "    int rc = needs_saving ? protect(",
        "    int rc = needs_saving && change == CHANGE_WRITE ? protect(",
        "i2_saved_before_the_write",
    ),
    _mutant(
        "i2_saves_for_one_snapshot_only",
        "cbw.c",
        "        for (unsigned i = 0; i < disk->snapshot_count; i++) {\n"
        "            struct saving *saving = &savings[count];\n",
        "        for (unsigned i = 0; i < 1; i++) {\n            struct saving *saving = &savings[count];\n",
        "i2_saved_before_the_write",
        "i1_several_snapshots_one_read",
    ),
    _mutant(
        "i2_forgets_the_last_part_of_a_cluster",
        "cbw.c",
        "            saving->end = ((end - 1) >> saving->snapshot->shift) + 1;\n",
        "            saving->end = end >> saving->snapshot->shift;\n",
        "i2_saved_before_the_write",
    ),
    _mutant(
        "i2_failed_save_lets_the_write_through",
        "cbw.c",
        "        int rc = save(savings, count, error);\n        if (rc)\n            return rc;\n",
        "        save(savings, count, error);\n",
        "i1_failed_read_saves_nothing",
    ),
    _mutant(
        "i2_cut_does_not_wait_for_writers",
        "gate.c",
        "    while (!gate_is_empty(gate))\n        if (!cond_wait_until(",
        "    while (0)\n        if (!cond_wait_until(",
        "i2_cut_waits_for_running_writes",
    ),
    # ---- I3: look again ----
    _mutant(
        "i3_does_not_look_at_saved",
        "snapshot.c",
        "    if ((found = bitmap_next_set(&snapshot->saved, first, end)) < end) {\n",
        "    if (0) {\n",
        "i3_saved_meanwhile",
        "i3_long_read_of_which_a_part_is_saved_meanwhile",
    ),
    _mutant(
        "i3_tests_a_bit_and_then_asks_where_the_next_one_is",
        "bitmap.c",
        "    uint64_t next = bitmap_next_set(bitmap, from, end);\n    *set = next == from;\n",
        "    *set = bitmap_test(bitmap, from);\n    uint64_t next = bitmap_next_set(bitmap, from, end);\n",
        "i3_looked_at_while_it_is_saved",
        tries=40,
    ),
    _mutant(
        "i3_does_not_look_at_released",
        "snapshot.c",
        "    if ((found = bitmap_next_set(&snapshot->released, first, end)) < end)\n",
        "    if (0)\n",
        "i3_released_meanwhile",
        "i3_store_released_meanwhile",
    ),
    _mutant(
        "i3_does_not_look_at_lost",
        "snapshot.c",
        "    if ((found = bitmap_next_set(&snapshot->lost, first, end)) < end)\n",
        "    if (0)\n",
        "i3_lost_meanwhile",
    ),
    _mutant(
        "i3_does_not_look_at_broken",
        "snapshot.c",
        "    int rc = check(snapshot, error);\n    if (rc)\n        return rc;\n    if ((found =",
        "    int rc = 0;\n    if ((found =",
        "i3_broken_meanwhile",
        "i3_broken_elsewhere_meanwhile",
        "i3_store_broken_meanwhile",
    ),
    _mutant(
        "i3_extents_do_not_look_again",
        "snapshot.c",
        "            continue;           /* look again, now that the source was asked */\n",
        "            if (rc == 0)\n                offset += append_view(&list, &view, offset, part);\n"
        "            continue;\n",
        "i3_extents_look_again",
        "i3_extents_of_what_is_gone_meanwhile",
    ),
    _mutant(
        "i3_looks_again_only_after_the_source",
        "snapshot.c",
        "    int again = look_again(snapshot, offset, length, state == UNSAVED, &valid, error);\n",
        "    int again = 0;\n    valid = length;\n"
        "    if (state == UNSAVED)\n        again = look_again(snapshot, offset, length, true, &valid, error);\n",
        "i3_store_released_meanwhile",
        "i3_store_broken_meanwhile",
    ),
    _mutant(
        "i3_takes_all_for_good",
        "snapshot.c",
        "        *good = (found << snapshot->shift) > offset ? (found << snapshot->shift) - offset : 0;\n",
        "",
        "i3_saved_meanwhile",
        "i3_long_read_of_which_a_part_is_saved_meanwhile",
    ),
    _mutant(
        "i3_does_not_look_again_after_a_clone",
        "snapshot.c",
        "    if (rc == 0 && look_again(snapshot, offset, length, true, &valid, NULL))\n        valid = 0;\n",
        "    valid = length;\n",
        "i3_cloned_and_saved_meanwhile",
        "i3_cloned_of_which_a_part_is_saved_meanwhile",
        "i3_cloned_and_released_meanwhile",
        "i3_cloned_and_lost_meanwhile",
        "i3_cloned_and_broken_meanwhile",
    ),
    _mutant(
        "i3_leaves_what_a_clone_brought",
        "backup_clone.c",
        "    if (good < length && (rc = image_zero(",
        "    if (0 && (rc = image_zero(",
        "i3_cloned_and_saved_meanwhile",
        "i3_cloned_and_released_meanwhile_is_left_out",
        "i3_cloned_and_lost_meanwhile",
        "i3_half_cloned",
    ),
    _mutant(
        "i3_closed_is_not_seen",
        "disk.c",
        "    atomic_store(&snapshot->state, SNAPSHOT_ENDED);",
        "    if (0) atomic_store(&snapshot->state, SNAPSHOT_ENDED);",
        "i7_close_while_a_reader_hangs",
    ),
    # ---- I4: saved and released never go back ----
    _mutant(
        "i4_saved_is_saved_again",
        "snapshot.c",
        "    uint64_t done = bitmap_word(&snapshot->saved, word) | ",
        "    uint64_t done = ",
        "i4_second_write_saves_nothing",
    ),
    _mutant(
        "i4_released_is_saved_again",
        "snapshot.c",
        " | bitmap_word(&snapshot->released, word) | ",
        " | ",
        "i4_released_is_final",
    ),
    _mutant(
        "i4_lost_is_saved_again",
        "snapshot.c",
        " | bitmap_word(&snapshot->lost, word);\n",
        ";\n",
        "i4_saved_is_not_lost_by_a_failure_beside_it",
    ),
    _mutant(
        "i4_released_is_not_marked",
        "snapshot.c",
        "    bitmap_set(&snapshot->released, first, end - first);\n",
        "",
        "i4_released_is_final",
        "i4_only_whole_clusters_are_released",
    ),
    _mutant(
        "i4_releases_clusters_in_part",
        "snapshot.c",
        "    uint64_t first = div_up(offset, snapshot->cluster_size), next;\n",
        "    uint64_t first = offset >> snapshot->shift, next;\n",
        "i4_only_whole_clusters_are_released",
    ),
    _mutant(
        "i4_keeps_the_tail",
        "snapshot.c",
        "offset + count == snapshot->size ? snapshot->clusters : (offset + count) >> snapshot->shift;\n",
        "(offset + count) >> snapshot->shift;\n",
        "i4_only_whole_clusters_are_released",
    ),
    # ---- I5: a place is used again only when nobody has it ----
    _mutant(
        "i5_pins_are_ignored_when_freed",
        "store.c",
        "    store->slots[i].state = SLOT_ORPHAN;\n    if (store->slots[i].pins == 0)\n        slot_free(store, i);\n",
        "    store->slots[i].state = SLOT_ORPHAN;\n    slot_free(store, i);\n",
        "i5_hung_spill_keeps_its_slots",
    ),
    _mutant(
        "i5_spiller_does_not_pin",
        "store_spill.c",
        "        store->slots[i].pins++;\n",
        "",
        "i5_hung_spill_keeps_its_slots",
    ),
    _mutant(
        "i5_spill_brings_back_what_was_released",
        "store_spill.c",
        "        bool wanted = slot->state == SLOT_SPILLING;\n",
        "        bool wanted = true;\n",
        "i5_hung_spill_keeps_its_slots",
    ),
    _mutant(
        "i5_failed_spill_counts_as_done",
        "store_spill.c",
        "        if (wanted && rc == 0) {\n",
        "        if (wanted) {\n",
        "i5_failed_spill_loses_nothing",
        "i5_spilling_clusters_are_readable",
    ),
    _mutant(
        "i5_failed_spill_is_forgotten",
        "store_spill.c",
        "        if (wanted && rc) {\n",
        "        if (0) {\n",
        "i5_failed_spill_loses_nothing",
        "i5_spilling_clusters_are_readable",
    ),
    _mutant(
        "i5_places_are_not_marked_as_used",
        "store_spill.c",
        "    bits_set(&store->file_used, *first, run);\n",
        "",
        "i5_punch_spares_what_is_in_use",
    ),
    _mutant(
        "i5_places_are_never_free_again",
        "store_spill.c",
        "    bitmap_clear(&store->file_used, slot, 1);\n",
        "",
        "i5_places_are_used_again",
    ),
    _mutant(
        "i5_punches_what_was_used_again",
        "store_spill.c",
        "        bitmap_clear(&store->file_stale, from, run);\n    }\n    bits_set",
        "    }\n    bits_set",
        "i5_punch_spares_what_is_in_use",
    ),
    _mutant(
        "i5_punches_everything",
        "store_spill.c",
        "    if (store->file_in_use == 0) {\n        count = MAX(store->file_high, store->file_reserved);\n",
        "    if (true) {\n        count = MAX(store->file_high, store->file_reserved);\n",
        "i5_punch_spares_what_is_in_use",
    ),
    _mutant(
        "i5_close_waits_for_the_spiller",
        "store.c",
        "    uint64_t deadline = now_ns() + CLOSE_GRACE_NS;\n",
        "    uint64_t deadline = now_ns() + 1000 * (uint64_t)CLOSE_GRACE_NS;\n",
        "i5_close_returns_while_a_spill_hangs",
    ),
    # ---- I6: dirty before the write, cleared by a cut or a commit only ----
    _mutant(
        "i6_marks_after_the_write",
        "cbw.c",
        "    mark_dirty(disk, *offset, piece);\n    full_fence();",
        "    rc = apply(disk, change, data, *offset, piece, error);\n"
        "    mark_dirty(disk, *offset, piece);\n    full_fence();",
        "i6_dirty_before_the_write",
    ),
    _mutant(
        "i6_forgets_the_last_granule",
        "cbw.c",
        "        bitmap_set(&dirty->bits, first, last - first + 1);\n",
        "        bitmap_set(&dirty->bits, first, MAX(last - first, 1u));\n",
        "i6_dirty_before_the_write",
    ),
    _mutant(
        "i6_close_forgets_what_was_frozen",
        "disk.c",
        "        if (snapshot->settled == UNSETTLED)\n",
        "        if (0)\n",
        "i6_cut_freezes_and_close_gives_back",
    ),
    _mutant(
        "i6_commit_is_ignored",
        "dirty.c",
        "    bool all = snapshot->bitmap_mode == FL_BITMAP_NEVER || (!commit && ",
        "    bool all = snapshot->bitmap_mode == FL_BITMAP_NEVER || (",
        "i6_cut_freezes_and_close_gives_back",
    ),
    _mutant(
        "i6_cut_keeps_the_old_bitmap",
        "disk.c",
        "        snapshot->frozen = part->fresh;\n",
        "        snapshot->frozen = part->fresh;\n"
        "        bitmap_merge(&part->dirty->bits, &snapshot->frozen);\n",
        "i6_cut_freezes_and_close_gives_back",
    ),
    _mutant(
        "i6_incremental_saves_what_is_outside",
        "snapshot.c",
        "    return snapshot->bounded ? done | ~inside_word(snapshot, word) : done;\n",
        "    return done;\n",
        "i6_cut_freezes_and_close_gives_back",
        "i6_incremental_is_right",
    ),
    _mutant(
        "i6_whole_incremental_saves_its_bitmap_only",
        "snapshot.c",
        "        snapshot->bounded = !options->whole;\n",
        "        snapshot->bounded = true;\n",
        "i6_whole_incremental_is_right",
    ),
    _mutant(
        "i6_whole_incremental_discards_what_was_not_copied",
        "snapshot.c",
        "    if (snapshot->bounded || !snapshot->incremental)\n",
        "    if (true)\n",
        "i6_whole_incremental_is_right",
    ),
    _mutant(
        "i6_incremental_reads_what_is_outside",
        "snapshot.c",
        "            return OUTSIDE;\n",
        "            return UNSAVED;\n",
        "i6_cut_freezes_and_close_gives_back",
        "i6_incremental_is_right",
    ),
    _mutant(
        "i6_clear_with_the_gate_open",
        "dirty.c",
        "    if (rc == 0)\n        rc = disk_close_writes(disk, error);\n    if (rc == 0) {\n        if (revive) {\n",
        "    if (rc == 0) {\n        if (revive) {\n",
        "i6_clear_waits_for_running_writes",
    ),
    _mutant(
        "i6_lost_is_forgotten",
        "dirty.c",
        "    if (commit && !atomic_load(&snapshot->clusters_lost))\n",
        "    if (commit)\n",
        "i6_lost_comes_back",
    ),
    _mutant(
        "i6_always_forgets_what_was_not_copied",
        "dirty.c",
        "bitmap_next_clear(&snapshot->released, first, end) < end)\n",
        "bitmap_next_set(&snapshot->released, first, end) == end)\n",
        "i6_modes",
    ),
    _mutant(
        "i6_memory_before_the_file",
        "cbw.c",
        "        if (dirty->kept)\n            dirty_keep(dirty, first, last - first + 1);\n"
        "        bitmap_set(&dirty->bits, first, last - first + 1);\n",
        "        bitmap_set(&dirty->bits, first, last - first + 1);\n"
        "        if (dirty->kept)\n            dirty_keep(dirty, first, last - first + 1);\n",
        "i6_in_the_file_before_the_write",
        "i6_after_kill_9",
    ),
    _mutant(
        "i6_write_intent_does_not_sync",
        "dirty.h",
        "    kept_sync(dirty->kept);\n",
        "",
        "i6_power_loss",
    ),
    _mutant(
        "i6_cut_does_not_let_the_other_area_count",
        "sidecar.c",
        "        rc = update(kept, kept->record.flags, 3, wants_sync(kept));",
        "        rc = 0;",
        "i6_after_kill_9",
        "i6_power_loss",
    ),
    _mutant(
        "i6_abort_drops_before_it_merges",
        "dirty.c",
        "    /* Bits are only added: writers may mark meanwhile. */\n",
        "    if (dirty->kept)\n        kept_drop_old(dirty->kept, NULL);\n",
        "i6_power_loss_at_an_abort",
    ),
    _mutant(
        "i6_only_one_area_is_loaded",
        "sidecar_open.c",
        "            if (record->counts >> i & 1)\n",
        "            if (record->counts == 1u << i || (record->counts == 3 && i))\n",
        "i6_after_kill_9",
    ),
    _mutant(
        "i6_in_use_after_the_first_write",
        "sidecar_open.c",
        "        rc = sidecar_write_header(sidecar, true);       /* S3",
        "        rc = sidecar_write_header(sidecar, false);       /* S3",
        "i6_power_loss",
    ),
    _mutant(
        "i6_commit_does_not_flush_the_source",
        "dirty.c",
        "    int rc = commit ? flush_source(snapshot->disk, dirty, error) : 0;\n",
        "    int rc = 0;\n",
        "i6_power_loss",
    ),
    _mutant(
        "i6_clean_close_does_not_flush_the_source",
        "dirty_file.c",
        "    int rc = image_settle(disk->source, error); ",
        "    int rc = 0;",
        "i6_power_loss",
    ),
    _mutant(
        "i6_every_boot_is_the_same",
        "sidecar_open.c",
        "        found.same_boot = boot_known && !memcmp(found.header.boot, boot, 16);\n",
        "        found.same_boot = boot_known;\n",
        "i6_power_loss",
    ),
    _mutant(
        "i6_one_copy_of_the_header",
        "sidecar.c",
        "    for (unsigned slot = 0; slot < 2; slot++) {\n        int rc = write_whole(",
        "    for (unsigned slot = 0; slot < 1; slot++) {\n        int rc = write_whole(",
        "i6_damaged_header",
    ),
    _mutant(
        "i6_file_that_failed_looks_good",
        "sidecar.c",
        "        kept->record.flags |= RECORD_INCONSISTENT;\n        kept->record.reason = REASON_STORAGE;\n"
        "        if (!sidecar->lost",
        "        if (!sidecar->lost",
        "i6_after_kill_9_of_a_file_that_failed",
    ),
    _mutant(
        "i6_file_that_fails_ends_the_process",
        "guard.c",
        "    bool ours = info->si_code > 0 && replace_page((uintptr_t)info->si_addr);\n",
        "    bool ours = false;\n    (void)replace_page;\n",
        "i6_file_that_fails",
    ),
    _mutant(
        "i6_change_by_others_is_not_seen",
        "sidecar_identity.c",
        "        return same_stamp(then->modified, now->modified) ? REASON_NONE : REASON_WRITTEN;\n",
        "        return REASON_NONE;\n",
        "i6_changed_underneath",
    ),
    _mutant(
        "i6_change_after_a_kill_is_not_seen",
        "sidecar_identity.c",
        "    return now->modified.seconds > alive + ",
        "    return 0 && now->modified.seconds > alive + ",
        "i6_after_kill_9",
    ),
    _mutant(
        "i6_another_file_is_not_seen",
        "sidecar_identity.c",
        "!(now->device ? same_device : same_file)(then, now, known, same_boot))\n",
        "(now->device && !same_device(then, now, known, same_boot)) || "
        "(0 && same_file(then, now, known, same_boot)))\n",
        "i6_changed_underneath",
    ),
    _mutant(
        "i6_copy_is_believed",
        "sidecar_open.c",
        "    if (!clean && found->header.own_inode != own_inode)\n",
        "    if (0)\n",
        "i6_copy_of_the_file",
    ),
    _mutant(
        "i6_bits_are_not_checked",
        "sidecar_open.c",
        "crc != record->checksum))\n",
        "0))\n",
        "i6_damaged_bits",
    ),
    # ---- I7: nobody waits for a reader, every wait of a writer ends ----
    _mutant(
        "i7_publishing_wakes_nobody_for_a_waiter",
        "store.c",
        "    if (store->staged > store->spill_above || store->first_waiter) ",
        "    if (store->staged > store->spill_above) ",
        "i7_room_from_what_is_published_later",
    ),
    _mutant(
        "i7_waits_for_room_inside_the_gate",
        "cbw.c",
        "        gate_leave(&disk->writes);\n        if (wait && attempt.inside_life)\n"
        "            rc = wait_for_room(&attempt, error);\n",
        "        if (wait && attempt.inside_life)\n            rc = wait_for_room(&attempt, error);\n"
        "        gate_leave(&disk->writes);\n",
        "i7_nobody_waits_for_a_writer_that_waits_for_room",
    ),
    _mutant(
        "i7_keeps_its_claims_while_it_waits",
        "cbw.c",
        "                unclaim(saving);\n                unclaim_all(savings, count);\n",
        "",
        "i7_storage_comes_back_in_time",
    ),
    _mutant(
        "i7_a_timeout_for_each_piece",
        "cbw.c",
        "    attempt->waited += now_ns() - began;\n",
        "    attempt->waited = 0;\n",
        "i7_one_timeout_for_all_pieces",
    ),
    _mutant(
        "i7_later_writes_wait_again",
        "store.c",
        "            store->stalled = true;\n",
        "",
        "i7_full_stage_and_hung_fleecing",
    ),
    _mutant(
        "i7_never_waits_again",
        "store.c",
        "    store->in_use--;\n    store->stalled = false;\n",
        "    store->in_use--;\n",
        "i7_freed_memory_is_worth_waiting_for",
    ),
    _mutant(
        "i7_full_fleecing_image_stays_full",
        "store_spill.c",
        "        store->file_full = false;\n",
        "",
        "i7_full_fleecing",
        "i7_freed_space_is_worth_waiting_for",
    ),
    _mutant(
        "i7_waits_for_the_whole_lot",
        "store.c",
        "        grant_room(store);      /* of the lot that a spill gathers; it may hang */\n",
        "",
        "i7_room_of_one_spill_while_the_next_hangs",
    ),
    _mutant(
        "lets_writers_in_one_by_one",
        "store_spill.c",
        "    store->gathering = true;\n",
        "",
        "room_comes_in_lots",
    ),
    _mutant(
        "reserved_space_stays_when_the_file_is_empty",
        "store_spill.c",
        "        count = MAX(store->file_high, store->file_reserved);\n",
        "        count = store->file_high;\n",
        "reserved_space_is_limited_and_given_back",
    ),
    _mutant(
        "reserved_space_stays_after_the_end",
        "store_spill.c",
        "    uint64_t bytes = MAX(store->file_high, store->file_reserved) << store->shift;\n",
        "    uint64_t bytes = store->file_high << store->shift;\n",
        "reserved_space_is_limited_and_given_back",
    ),
    _mutant(
        "reserves_beyond_the_limit",
        "store_spill.c",
        "MIN(store->file_slots, MAX(end, from + store->reserve_step))",
        "MAX(end, from + store->reserve_step)",
        "reserved_space_is_limited_and_given_back",
    ),
    _mutant(
        "i7_spills_under_the_lock",
        "store_spill.c",
        "    pthread_mutex_unlock(&store->lock);\n    int rc = spill_write(store, batch, &error);\n"
        "    pthread_mutex_lock(&store->lock);\n",
        "    int rc = spill_write(store, batch, &error);\n",
        "i7_room_left_and_hung_fleecing",
    ),
    _mutant(
        "i7_reads_the_fleecing_image_under_the_lock",
        "store.c",
        "        int read_rc = read_pieces(store, pieces, count, error);\n",
        "        pthread_mutex_lock(&store->lock);\n        int read_rc = read_pieces(store, pieces, count, error);\n"
        "        pthread_mutex_unlock(&store->lock);\n",
        "i7_reader_that_hangs_on_the_fleecing_image",
    ),
    _mutant(
        "i7_reader_keeps_the_stage_while_it_reads_the_fleecing_image",
        "store.c",
        "        copy_pieces(store, pieces, count);\n        int read_rc = read_pieces(store, pieces, count, error);\n",
        "        int read_rc = read_pieces(store, pieces, count, error);\n        copy_pieces(store, pieces, count);\n",
        "i7_reader_that_hangs_keeps_no_room",
    ),
    _mutant(
        "i7_close_waits_for_readers",
        "disk.c",
        "#define READERS_GRACE_NS 200000000u",
        "#define READERS_GRACE_NS 200000000000u",
        "i7_close_while_a_reader_hangs",
    ),
    _mutant(
        "i7_close_leaves_writers_waiting",
        "store.c",
        "        if (store->aborted)\n            rc = -FL_ECLOSED;\n        else if",
        "        if",
        "i7_close_ends_the_wait_for_room",
    ),
    _mutant(
        "i7_timeout_of_32_bits",
        "cbw.c",
        "add_sat(began, attempt->patience)",
        "began + (uint32_t)attempt->patience",
        "i7_long_timeouts",
    ),
    _mutant(
        "i7_timeout_wraps_around",
        "cbw.c",
        "add_sat(began, attempt->patience)",
        "began + attempt->patience",
        "i7_long_timeouts",
    ),
    _mutant(
        "i7_nobody_wakes_those_who_wait_for_a_claim",
        "snapshot.c",
        "        pthread_cond_broadcast(&snapshot->claims_changed);\n",
        "",
        "i7_chain_of_waiting_writers",
    ),
]


def make(csrc: Path, build: Path, programs: Iterable[str]) -> None:
    """Build programs from `csrc`, without sanitizers. What is in `build` already is used."""
    targets = [str(build / "plain" / program) for program in programs]
    command = ["make", "-s", "-C", str(C), f"CSRC={csrc}", f"BUILD={build}", "CFLAGS=-w -O1", *targets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"it does not build:\n{done.stderr}")


def fails(build: Path, scenario: str) -> bool:
    """Does the scenario fail, in a directory of its own?"""
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [build / "plain" / PROGRAM_OF[scenario], directory, scenario],
            env={**os.environ, "TEST_TIME_LIMIT": str(TIME_LIMIT)},
            capture_output=True,
            timeout=TIME_LIMIT + 30,
            check=False,
        )
    return done.returncode != 0


def mutate(mutant: Mutant, csrc: Path) -> None:
    file = csrc / mutant.file
    text = file.read_text(encoding="utf-8")
    found = text.count(mutant.old)
    if found != 1:
        raise LookupError(f"{mutant.name}: csrc/{mutant.file} has its text {found} times: bring the table up to date")
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def prepare(base: Path, programs: Iterable[str] = tuple(set(PROGRAM_OF.values()))) -> None:
    """Copy and build the engine as it is into `base`, for the functions below."""
    shutil.copytree(CSRC, base / "csrc", ignore=shutil.ignore_patterns("*.o", "*.so", "__pycache__"))
    (base / "build").mkdir()
    make(base / "csrc", base / "build", programs)


@contextlib.contextmanager
def mutated(mutant: Mutant, base: Path, programs: Iterable[str]) -> Iterator[Path]:
    """The build directory of the engine with the mutant in it."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        work = Path(name)
        shutil.copytree(base / "csrc", work / "csrc")
        shutil.copytree(base / "build", work / "build")
        mutate(mutant, work / "csrc")
        make(work / "csrc", work / "build", programs)
        yield work / "build"


def survives(mutant: Mutant, base: Path) -> list[str]:
    """The scenarios that should have noticed the mutant and did not."""
    with mutated(mutant, base, {PROGRAM_OF[scenario] for scenario in mutant.scenarios}) as build:
        return [
            scenario
            for scenario in mutant.scenarios
            if not any(fails(build, scenario) for _ in range(mutant.tries))
        ]


def main(wanted: list[str]) -> int:
    bad = 0
    chosen = [m for m in MUTANTS if not wanted or any(m.name.startswith(w.lower()) for w in wanted)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as name, ThreadPoolExecutor(PARALLEL) as pool:
        base = Path(name)
        prepare(base)
        for scenario in sorted({scenario for m in chosen for scenario in m.scenarios}):
            if fails(base / "build", scenario):
                print(f"{scenario} fails on the engine as it is")
                bad += 1
        jobs = [(mutant, pool.submit(survives, mutant, base)) for mutant in chosen]
        for mutant, job in jobs:
            try:
                alive = job.result()
            except (LookupError, RuntimeError) as error:
                alive = [str(error)]
            bad += len(alive)
            verdict = "SURVIVED" if alive else "noticed "
            print(f"{verdict} {mutant.name:46} {', '.join(alive or mutant.scenarios)}", flush=True)
    print(f"{len(chosen)} mutants, {bad} failures")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
