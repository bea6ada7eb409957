// Package criu is all that stasis knows about CRIU: its version and features,
// the configuration file that reaches it through runc, its log, and the image
// files that it writes, which are read here for inspection and for the checks
// that precede a restore.
//
// Invariants:
//
//   - Image files are hostile until shown otherwise. They are opened relative
//     to their directory, without following links and without blocking; sizes,
//     numbers of entries and lengths are bounded before anything is allocated
//     for them. What does not parse is [checkpoint.ErrCorrupt].
//   - A check that cannot find what it must compare fails: absence of a field
//     never counts as agreement.
//   - Nothing here starts a process except [Version], [Features] and
//     [HostFacts]. Those must not be called in a shim, which reaps all of its
//     children; a shim reads the node's facts with [ReadHostFacts].
//   - No other package imports go-criu.
//
// Facts about CRIU 4.2 on which stasis relies (file:function in its sources):
//
//   - Tasks that were frozen before a dump that leaves them alive are frozen
//     afterwards and run no code of the application in between. CRIU does thaw
//     the cgroup while it traces every task in it (criu/seize.c:freeze_processes),
//     and freezes it again before it lets go of them (pstree_switch_state,
//     freezer_restore_state), after a failed dump as well.
//   - Tasks that were not frozen before cost a wait in steps of 100 ms, so a
//     dump is shorter when the cgroup is frozen first (freeze_processes).
//   - CRIU must not be killed during a dump. The tasks would be running,
//     frozen before or not, with the network locked; and a task that was just
//     made to execute a system call dies of a breakpoint. Else the parasite
//     code sees its socket close and undoes itself
//     (compel/plugins/std/infect.c:parasite_daemon).
//   - UTS and SysV IPC content of the images is written into the namespaces in
//     which the restored tasks live, joined ones too: see [RewriteHostname] and
//     [Report.SysVIPC].
//   - A periodic timerfd that has expired, and was not read yet, is restored
//     stopped: see [RearmTimers].
//   - What was told to madvise about memory is told again, and has to be
//     accepted: see [SetMergeable].
//   - The option timeout bounds the stopping of tasks only
//     (criu/seize.c:collect_pstree).
package criu
