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
//   - Tasks that were frozen before a dump with --leave-running stay frozen
//     afterwards, and run no code of the application in between:
//     criu/seize.c:freeze_processes remembers the freezer's state, and
//     criu/seize.c:freezer_restore_state puts it back.
//   - UTS and SysV IPC content of the images is written into the namespaces in
//     which the restored tasks live, joined ones too: see [RewriteHostname].
package criu
