// Package store keeps committed checkpoints in directories that survive
// crashes of the process, of the node and of the disk's good will.
//
// Layout below the root, which is private to its user (0700):
//
//	.stage-ID-RANDOM/          being written; RANDOM.owner beside it says by whom
//	checkpoints/HASH/ID/       committed
//	claimed/HASH/ID/           being restored; claimed/HASH/ID.owner says by whom
//	templates/NS/NAME/ID/      a version of a template; ID-RANDOM.pin beside it says who uses it
//	quarantine/ID/             set aside for study, with reason.json and logs/
//	.trash-RANDOM/             half removed
//	.locks/0 to .locks/f       whose flock serialises changes, by first digit of HASH
//
// HASH is [checkpoint.Identity.Hash]. Invariants:
//
//   - A directory below checkpoints, claimed or quarantine is complete: all its
//     files were durable before the rename that put it there. Until then it has
//     another name, which readers never look at.
//   - A version of a template is never changed and never claimed. It is not
//     removed while a living process has pinned it.
//   - A checkpoint is in one place at a time, and changes place only by a rename
//     under its lock. So a claim has one winner.
//   - An owner's file is whole before the directory that it speaks for has its
//     name, and is removed after it lost it. So a stage or claim without one
//     belongs to nobody, whereas an owner's file alone means nothing. The file's
//     content is durable before that, its name need not be: a crash that takes
//     the name took the owner as well.
//   - No operation removes a checkpoint in order to make room for another one
//     that is not committed yet.
//   - After an error of any operation the checkpoint is where it was before or,
//     if going back failed as well, where it was meant to go; trying again works.
//
// An owner is alive while a process of its number and start time runs in this
// boot. If the owner's pid namespace is not ours we cannot tell, and it counts
// as alive until the next boot. So does an owner whose file is damaged, until
// the file is [UnreadableOwnerGrace] old.
//
// Caveats: checksums find damage, not malice, and the manifest itself has none.
// A system call that hangs on a dead disk cannot be interrupted: Commit stops
// waiting for it, but it goes on.
package store
