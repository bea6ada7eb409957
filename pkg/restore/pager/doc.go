// Package pager fills the memory of tasks that CRIU restores lazily: CRIU
// registers private anonymous memory with a userfaultfd instead of reading it,
// and the pager copies it from the images, in bulk, beginning shortly before the
// tasks run, and page by page where they wait for it.
//
// Invariants:
//
//   - A page that had content never reads as zero. Closing a userfaultfd makes
//     the kernel do just that with all pages that are missing, so descriptors
//     are closed when their memory is full, or its process is gone, or CRIU can
//     no longer let the tasks run; not after a failure. Whoever touches a missing
//     page after a failure waits until it is killed: the caller kills the
//     container first and closes the pager then. The end of the pager's own
//     process closes descriptors as well: see [Keeper].
//   - No copy is under way while an event (fork, mremap, munmap, madvise) is
//     read. Reading it lets the task go on, which may put something else where
//     the copy was going; before that, the kernel refuses copies with EAGAIN.
//   - Nothing runs once Wait has returned; every wait ends with the context or a
//     deadline of [Options].
//
// The protocol is that of CRIU 4.2 (criu/uffd.c), whose own daemon this package
// replaces. CRIU connects once to lazy-pages.socket in its work directory. All
// tasks share the connection: each sends its pid in the images (int32) and then
// its userfaultfd (one byte with SCM_RIGHTS), a zombie its negative pid and
// nothing more (send_uffd, restore_one_zombie). In the end CRIU sends 0x52535446
// (lazy_pages_finish_restore): by then all memory is registered in its final
// place, and no task has run code of the application. When this last message
// cannot be sent, CRIU kills the tasks and fails (cr-restore.c:
// restore_root_task, out_kill_network_unlocked). Before it, tasks only fault,
// in CRIU's restorer, which moves each mapping to its place and registers it there
// (pie/restorer.c: vma_remap): what is registered may be filled, while copies to
// what is not are refused.
//
// Events of two threads may come in the wrong order (fs/userfaultfd.c queues
// them after the change and without its lock): memory that was unmapped is told
// to be so after other memory has been moved to its place. The pager keeps apart
// what can be in the wrong order, see space. It cannot know the order where
// memory that never had content is moved away, and memory with content is moved
// to its place by another thread within the same microseconds.
//
// What tasks waited for at the start, in each of some restores, is what they will wait
// for in the next one from the same images: see [Pager.Touched], [Options.Hot] and, for the
// form in which it is kept, [HotFile]. It orders the bulk and nothing else, so that
// a wrong record costs some waiting, at most.
package pager
